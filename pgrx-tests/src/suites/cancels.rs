//! A cancel that rolls back while claimers pass its job: the job comes out, once.
//!
//! Two steps instead of one in the undo of a guard lost a job about every 1,700 waves: `AWA_CANCEL_WAVES=20000` is a soak.

use std::sync::Barrier;
use std::thread;

use anyhow::{Result, anyhow, ensure};
use postgres::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::stress_mixed::number;
use super::{Attempt, Stage, claim, complete, drain, enqueue, sorted};

const JOBS: usize = 6;
const CLAIMERS: usize = 3;

// If this fails, a job is lost when its cancel rolls back at the moment at which a claimer passes it.
pub fn a_cancel_that_rolls_back_among_claimers_loses_no_job(stage: &mut Stage<'_>) -> Result<()> {
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let waves = number("AWA_CANCEL_WAVES", 2000);
    println!("        cancels: AWA_SEED={seed} AWA_CANCEL_WAVES={waves}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut operator, mut canceller) = (stage.connect()?, stage.connect()?);
    operator.batch_execute("SET awa.prune_grace = 0")?;
    let mut claimers: Vec<Client> = (0..CLAIMERS).map(|_| stage.connect()).collect::<Result<_>>()?;
    for wave in 0..waves {
        let jobs = enqueue(&mut operator, JOBS)?;
        // Some jobs have been claimed and given back: their cancel begins at a hole.
        if rng.random_ratio(1, 4) {
            let mut transaction = operator.transaction()?;
            claim(&mut transaction, i32::try_from(JOBS / 2)?)?;
            transaction.rollback()?;
        }
        let early = rng.random_ratio(1, 2);
        let end = if rng.random_ratio(1, 2) { "ROLLBACK" } else { "ROLLBACK TO s; COMMIT" };
        let begun = Barrier::new(CLAIMERS + 1);
        let results: Vec<Result<Vec<i64>>> = thread::scope(|scope| {
            let threads: Vec<_> = claimers
                .iter_mut()
                .map(|client| {
                    let begun = &begun;
                    let batches: Vec<i32> = (0..3).map(|_| rng.random_range(1..4)).collect();
                    scope.spawn(move || {
                        begun.wait();
                        take(client, &batches)
                    })
                })
                .collect();
            let cancelled = cancel_and_roll_back(&mut canceller, &jobs, &begun, early, end).map(|()| Vec::new());
            let mut results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))).collect();
            results.push(cancelled);
            results
        });
        let mut finished = drain(&mut operator)?;
        for result in results {
            finished.extend(result?);
        }
        ensure!(sorted(finished.clone()) == jobs, "wave {wave} ({end}): of {jobs:?} came out {:?}", sorted(finished));
        if wave % 50 == 49 {
            stage.verify_clean()?;
            // A cancel reads the live segments: they are kept short.
            for call in ["rotate", "prune", "prune"] {
                operator.batch_execute(&format!("SELECT awa.{call}()"))?;
            }
        }
    }
    Ok(())
}

/// `early`: the cancels are under way before the claimers begin; else they begin together.
fn cancel_and_roll_back(client: &mut Client, jobs: &[i64], begun: &Barrier, early: bool, end: &str) -> Result<()> {
    let work = |client: &mut Client| -> Result<()> {
        for job in jobs {
            client.query_one("SELECT awa.cancel($1)", &[job])?;
        }
        Ok(())
    };
    let mut done = client.batch_execute("BEGIN; SAVEPOINT s").map_err(Into::into);
    if early {
        done = done.and_then(|()| work(client));
    }
    begun.wait();
    if !early {
        done = done.and_then(|()| work(client));
    }
    done.and_then(|()| Ok(client.batch_execute(end)?))
}

fn take(client: &mut Client, batches: &[i32]) -> Result<Vec<i64>> {
    let mut finished = Vec::new();
    for batch in batches {
        for attempt in claim(client, *batch)? {
            // An uncommitted cancel of a running job is waited for.
            let answer = complete(client, attempt)?;
            ensure!(answer == "completed", "complete answered {answer}");
            finished.push(attempt.job_id);
        }
    }
    Ok(finished)
}

// If this fails, a job is both cancelled and run, or neither, when cancels commit and roll back among claimers.
pub fn a_job_is_cancelled_or_run(stage: &mut Stage<'_>) -> Result<()> {
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    println!("        cancels: AWA_SEED={seed}");
    let mut operator = stage.connect()?;
    operator.batch_execute("SET awa.prune_grace = 0")?;
    for wave in 0..20u64 {
        let jobs = enqueue(&mut operator, 60)?;
        let (config, jobs_of) = (stage.config(), &jobs);
        let connect = || -> Result<Client> { Ok(config.connect(postgres::NoTls)?) };
        let connect = &connect;
        // Each gives what it cancelled (first) and what it ran.
        let results: Vec<Result<(Vec<i64>, Vec<i64>)>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4u64)
                .map(|number| {
                    scope.spawn(move || {
                        let mut rng = StdRng::seed_from_u64(seed ^ (wave << 8) ^ number);
                        let mut client = connect()?;
                        if number < 2 { Ok((cancel_some(&mut client, jobs_of, &mut rng)?, Vec::new())) } else { Ok((Vec::new(), run_some(&mut client, &mut rng)?)) }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))).collect()
        });
        let mut ended = drain(&mut operator)?;
        for result in results {
            let (cancelled, ran) = result?;
            ended.extend(cancelled);
            ended.extend(ran);
        }
        ensure!(sorted(ended.clone()) == jobs, "wave {wave}: of {jobs:?} ended {:?}", sorted(ended));
        stage.verify_clean()?;
        for call in ["rotate", "prune", "prune"] {
            operator.batch_execute(&format!("SELECT awa.{call}()"))?;
        }
    }
    Ok(())
}

fn cancel_some(client: &mut Client, jobs: &[i64], rng: &mut StdRng) -> Result<Vec<i64>> {
    let mut cancelled = Vec::new();
    for _ in 0..30 {
        let mut transaction = client.transaction()?;
        let job = jobs[rng.random_range(0..jobs.len())];
        let answer: String = transaction.query_one("SELECT awa.cancel($1)", &[&job])?.try_get(0)?;
        if rng.random_ratio(1, 3) {
            transaction.commit()?;
            cancelled.extend((answer == "cancelled").then_some(job));
        } else {
            transaction.rollback()?;
        }
    }
    Ok(cancelled)
}

// If this fails, a worker and an operator are both told that they have ended the same attempt.
pub fn of_a_cancel_and_a_completion_at_once_one_ends_the_attempt(stage: &mut Stage<'_>) -> Result<()> {
    let waves = number("AWA_CANCEL_WAVES", 2000) / 50;
    let mut operator = stage.connect()?;
    operator.batch_execute("SET awa.prune_grace = 0")?;
    let (mut worker, mut canceller) = (stage.connect()?, stage.connect()?);
    let mut both_won = 0;
    for wave in 0..waves {
        enqueue(&mut operator, 100)?;
        let attempts = claim(&mut operator, 100)?;
        let together = Barrier::new(2);
        let (completed, cancelled) = thread::scope(|scope| {
            let (attempts, together) = (&attempts, &together);
            let completes = scope.spawn(|| end_each(&mut worker, "SELECT awa.complete($1, $2)", attempts, together));
            let cancels = scope.spawn(|| end_each(&mut canceller, "SELECT awa.cancel($1, 'lease ' || $2::bigint)", attempts, together));
            (completes.join(), cancels.join())
        });
        let (completed, cancelled) = (completed.map_err(|_| anyhow!("a thread panicked"))?, cancelled.map_err(|_| anyhow!("a thread panicked"))?);
        both_won += completed.iter().zip(&cancelled).filter(|(completed, cancelled)| **completed && **cancelled).count();
        let nobody = completed.iter().zip(&cancelled).any(|(completed, cancelled)| !completed && !cancelled);
        ensure!(!nobody, "wave {wave}: an attempt that nobody has ended");
        if wave % 10 == 9 {
            for call in ["rotate", "prune", "prune"] {
                operator.batch_execute(&format!("SELECT awa.{call}()"))?;
            }
        }
    }
    ensure!(both_won == 0, "{both_won} attempts were completed and cancelled");
    Ok(())
}

/// Ends one attempt after the other, each when the other session does; says which it has ended itself.
fn end_each(client: &mut Client, sql: &str, attempts: &[Attempt], together: &Barrier) -> Vec<bool> {
    let statement = client.prepare(sql);
    let end = |attempt: &Attempt| {
        together.wait();
        let Ok(statement) = &statement else { return false };
        let row = client.query_one(statement, &[&attempt.job_id, &attempt.run_lease]);
        row.and_then(|row| row.try_get::<_, String>(0)).is_ok_and(|answer| answer == "completed" || answer == "cancelled")
    };
    attempts.iter().map(end).collect()
}

/// Finds some of its leases stale: its job was cancelled.
fn run_some(client: &mut Client, rng: &mut StdRng) -> Result<Vec<i64>> {
    let mut ran = Vec::new();
    for _ in 0..25 {
        let mut transaction = client.transaction()?;
        let attempts = claim(&mut transaction, rng.random_range(1..4))?;
        if rng.random_ratio(1, 3) {
            transaction.rollback()?;
            continue;
        }
        transaction.commit()?;
        let (ids, leases): (Vec<i64>, Vec<i64>) = attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
        for row in client.query("SELECT job_id FROM awa.complete_many($1, $2) WHERE result = 'completed'", &[&ids, &leases])? {
            ran.push(row.try_get(0)?);
        }
    }
    Ok(ran)
}
