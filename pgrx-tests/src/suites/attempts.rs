//! Claims and completions belong to the transaction of their caller, and an attempt has one owner.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use postgres::{Client, NoTls};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::hostile_pool::Configured;
use super::{Attempt, Stage, claim, complete, drain, enqueue, ids, sorted};

// If this fails, two workers run one job.
pub fn two_sessions_claim_disjoint_sets(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let jobs = enqueue(&mut one, 40)?;
    let mut first = one.transaction()?;
    let mut second = two.transaction()?;
    let mut claimed = ids(&claim(&mut first, 15)?);
    claimed.extend(ids(&claim(&mut second, 15)?));
    claimed.extend(ids(&claim(&mut first, 15)?));
    first.commit()?;
    second.commit()?;
    ensure!(sorted(claimed.clone()) == sorted(jobs), "claimed {claimed:?}");
    Ok(())
}

// If this fails, the jobs of a worker that lost its connection wait for a deadline, or for ever.
pub fn a_rolled_back_claim_gives_its_jobs_back(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let jobs = enqueue(&mut one, 20)?;
    let mut transaction = one.transaction()?;
    let first = claim(&mut transaction, 12)?;
    ensure!(ids(&claim(&mut two, 8)?) == jobs.get(12..).unwrap_or_default(), "the other session did not get the rest");
    transaction.rollback()?;
    let again = claim(&mut two, 20)?;
    ensure!(ids(&again) == ids(&first), "given back {:?}, claimed again {:?}", ids(&first), ids(&again));
    ensure!(again.iter().zip(&first).all(|(now, then)| now.run_lease != then.run_lease), "a lease was used twice");
    Ok(())
}

// If this fails, a job is lost when the transaction that completed it rolls back.
pub fn a_rolled_back_completion_leaves_the_attempt_running(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 1)?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    let mut transaction = client.transaction()?;
    complete(&mut transaction, attempt)?;
    transaction.rollback()?;
    ensure!(claim(&mut client, 1)?.is_empty(), "the running job was claimed again");
    let result = complete(&mut client, attempt)?;
    ensure!(result == "completed", "complete answered {result}");
    Ok(())
}

// If this fails, a stale worker can finish the attempt of another.
pub fn a_wrong_lease_finishes_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 1)?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    let stale = Attempt { run_lease: attempt.run_lease.wrapping_add(1), ..attempt };
    ensure!(complete(&mut client, stale).is_err(), "a wrong lease completed the job");
    let result = complete(&mut client, attempt)?;
    ensure!(result == "completed", "complete answered {result}");
    Ok(())
}

// If this fails, a crash loses what a worker has written, although its commit had returned.
pub fn a_claim_weakens_no_other_write(stage: &mut Stage<'_>) -> Result<()> {
    // Nobody flushes the log but those who commit.
    let _configured = Configured::restart_with(stage, &[("wal_writer_delay", "10s"), ("autovacuum", "off")])?;
    let mut client = stage.connect()?;
    client.batch_execute("CREATE TABLE written (n int); CREATE TABLE lease (job_id bigint, run_lease bigint)")?;
    let alone = "SELECT count(*) FROM awa.claim('q')";
    let with_writes = [
        "BEGIN; INSERT INTO written VALUES (1); SELECT count(*) FROM awa.claim('q'); COMMIT",
        "BEGIN; SELECT count(*) FROM awa.claim('q'); INSERT INTO written VALUES (1); COMMIT",
        "WITH w AS (INSERT INTO written VALUES (1) RETURNING n) SELECT count(*) FROM awa.claim('q'), w",
        "INSERT INTO lease SELECT job_id, run_lease FROM awa.claim('q')",
        "SELECT awa.complete(job_id, run_lease) FROM awa.claim('q')",
        "SELECT awa.enqueue('q', 'k'), count(*) FROM awa.claim('q')",
        "SELECT count(*) FROM awa.claim('q'); INSERT INTO written VALUES (1)",
    ];
    let mut durable = |sql: &str| -> Result<bool> {
        enqueue(&mut client, 1)?;
        let before: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])?.try_get(0)?;
        client.batch_execute(sql)?;
        Ok(client.query_one("SELECT pg_current_wal_flush_lsn() > $1::text::pg_lsn", &[&before])?.try_get(0)?)
    };
    for round in 0..10 {
        for sql in with_writes {
            ensure!(durable(sql)?, "round {round}: not durable when its commit had returned: {sql}");
        }
    }
    let lone: Vec<bool> = (0..10).map(|_| durable(alone)).collect::<Result<_>>()?;
    ensure!(lone.contains(&false), "a claim alone waits for its flush, so there was nothing to see");
    Ok(())
}

// If this fails, a job is lost or run twice while producers and workers commit and roll back at the same time.
pub fn many_sessions_finish_every_job_once(stage: &mut Stage<'_>) -> Result<()> {
    const PRODUCERS: u64 = 2;
    const WORKERS: u64 = 6;
    let seed: u64 = rand::random();
    println!("        many_sessions_finish_every_job_once: seed {seed}");
    let config = stage.config();
    let connect = || -> Result<Client> { Ok(config.connect(NoTls)?) };
    let connect = &connect;
    let results: Vec<Result<(bool, Vec<i64>)>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..PRODUCERS + WORKERS)
            .map(|number| {
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed ^ number);
                    let produces = number < PRODUCERS;
                    let jobs = if produces { produce(&mut connect()?, &mut rng) } else { consume(&mut connect()?, &mut rng) };
                    jobs.map(|jobs| (produces, jobs))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))).collect()
    });
    let (mut enqueued, mut completed) = (Vec::new(), drain(&mut stage.connect()?)?);
    for result in results {
        let (produced, jobs) = result?;
        if produced { &mut enqueued } else { &mut completed }.extend(jobs);
    }
    ensure!(sorted(enqueued.clone()) == sorted(completed.clone()), "{} enqueued, {} completed, or not the same", enqueued.len(), completed.len());
    Ok(())
}

fn produce(client: &mut Client, rng: &mut StdRng) -> Result<Vec<i64>> {
    let mut committed = Vec::new();
    for _ in 0..150 {
        let mut transaction = client.transaction()?;
        let count = rng.random_range(1..40);
        let jobs = enqueue(&mut transaction, count)?;
        if rng.random_ratio(1, 5) {
            transaction.rollback()?;
        } else {
            transaction.commit()?;
            committed.extend(jobs);
        }
    }
    Ok(committed)
}

fn consume(client: &mut Client, rng: &mut StdRng) -> Result<Vec<i64>> {
    let mut completed = Vec::new();
    for _ in 0..150 {
        let mut transaction = client.transaction()?;
        let attempts = claim(&mut transaction, rng.random_range(1..30))?;
        if rng.random_ratio(1, 5) {
            transaction.rollback()?;
            continue;
        }
        transaction.commit()?;
        for attempt in attempts {
            if rng.random_ratio(1, 5) {
                let mut transaction = client.transaction()?;
                complete(&mut transaction, attempt)?;
                transaction.rollback()?;
            }
            complete(client, attempt)?;
            completed.push(attempt.job_id);
        }
    }
    Ok(completed)
}
