//! Interleavings of a few sessions, each forced step by step: a session that must wait is seen waiting before the next step.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use postgres::Client;
use postgres::error::SqlState;

use super::{Stage, claim, complete, drain, enqueue, ids, sorted};
use crate::process::wait_until;

pub fn pid_of(client: &mut Client) -> Result<i32> {
    Ok(client.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?)
}

/// Until the session waits for a lock of another.
pub fn see_blocked(observer: &mut Client, pid: i32) -> Result<()> {
    let blocked = wait_until(Duration::from_secs(30), || {
        observer
            .query_one("SELECT cardinality(pg_blocking_pids($1)) > 0", &[&pid])
            .is_ok_and(|row| row.try_get(0).unwrap_or(false))
    });
    ensure!(blocked, "process {pid} never waited for a lock");
    Ok(())
}

/// A call that met a rebuild may be refused as one that met another's update: run it again.
fn persist<T>(client: &mut Client, mut work: impl FnMut(&mut Client) -> Result<T>) -> Result<T> {
    let is_refused = |error: &anyhow::Error| {
        error.downcast_ref::<postgres::Error>().is_some_and(|error| error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE))
    };
    match work(client) {
        Err(error) if is_refused(&error) => work(client),
        result => result,
    }
}

/// Runs `late` in a session that arrives while `awa.rebuild()` waits for an open transaction: it gets on after the rebuild.
fn during_a_rebuild<T: Send>(stage: &Stage<'_>, late: impl FnMut(&mut Client) -> Result<T> + Send) -> Result<T> {
    let (mut producer, mut operator, mut worker, mut observer) =
        (stage.connect()?, stage.connect()?, stage.connect()?, stage.connect()?);
    let (operator_pid, worker_pid) = (pid_of(&mut operator)?, pid_of(&mut worker)?);
    producer.batch_execute("BEGIN; SELECT awa.enqueue('q', 'open')")?;
    thread::scope(|scope| {
        let rebuild = scope.spawn(move || operator.batch_execute("SELECT awa.rebuild()"));
        see_blocked(&mut observer, operator_pid)?;
        let late = scope.spawn(move || persist(&mut worker, late));
        see_blocked(&mut observer, worker_pid)?;
        producer.batch_execute("COMMIT")?;
        rebuild.join().map_err(|_| anyhow!("a thread panicked"))?.context("rebuild")?;
        late.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

// If this fails, a job that a worker has finished runs for ever in the eyes of the queue.
pub fn a_completion_that_meets_a_rebuild_is_kept(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 1)?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    let result = during_a_rebuild(stage, |worker| complete(worker, attempt))?;
    ensure!(result == "completed", "complete answered {result}");
    stage.verify_clean()
}

// If this fails, cancelled jobs run after a rebuild.
pub fn a_cancel_that_meets_a_rebuild_is_kept(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 1)?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    during_a_rebuild(stage, |worker| Ok(worker.execute("SELECT awa.cancel($1)", &[&attempt.job_id])?))?;
    stage.verify_clean()?;
    ensure!(complete(&mut client, attempt).is_err(), "a cancelled attempt was completed");
    Ok(())
}

// If this fails, places of the pool are lost with each rebuild until no job can be claimed.
pub fn a_claim_that_meets_a_rebuild_leaves_the_pool_in_order(stage: &mut Stage<'_>) -> Result<()> {
    let jobs = enqueue(&mut stage.connect()?, 5)?;
    let early = during_a_rebuild(stage, |worker| claim(worker, 64))?;
    stage.verify_clean()?;
    let mut client = stage.connect()?;
    let mut claimed = ids(&early);
    for attempt in early {
        complete(&mut client, attempt)?;
    }
    claimed.extend(drain(&mut client)?);
    // One more than were enqueued here: the producer that held up the rebuild.
    ensure!(claimed.len() == jobs.len() + 1, "{} jobs came out", claimed.len());
    Ok(())
}

// If this fails, producers get errors whenever an operator rebuilds.
pub fn an_enqueue_that_meets_a_rebuild_succeeds(stage: &mut Stage<'_>) -> Result<()> {
    stage.connect()?.batch_execute("SELECT awa.queue_counts()")?;
    let jobs = during_a_rebuild(stage, |worker| enqueue(worker, 3))?;
    let drained = drain(&mut stage.connect()?)?;
    ensure!(jobs.iter().all(|job| drained.contains(job)), "enqueued {jobs:?}, drained {drained:?}");
    Ok(())
}

// If this fails, the counts of a new queue begin with those of an old one.
pub fn a_completion_in_a_dropped_queue_does_not_count_in_the_next(stage: &mut Stage<'_>) -> Result<()> {
    let (mut operator, mut worker) = (stage.connect()?, stage.connect()?);
    enqueue(&mut worker, 2)?;
    let attempts = claim(&mut worker, 2)?;
    operator.batch_execute("BEGIN; SELECT awa.drop_queue('q', force => true)")?;
    worker.batch_execute("BEGIN; SET LOCAL lock_timeout = '2s'")?;
    // Refused, or accepted: either is an answer, as long as nothing is left of it.
    for attempt in attempts {
        drop(complete(&mut worker, attempt));
    }
    operator.batch_execute("COMMIT; SELECT awa.create_queue('q')")?;
    worker.batch_execute("COMMIT")?;
    stage.verify_clean()?;
    let running: i64 = operator.query_one("SELECT running FROM awa.queue_counts('q')", &[])?.try_get(0)?;
    ensure!(running == 0, "the new queue counts {running} running jobs");
    Ok(())
}

// If this fails, a REPEATABLE READ worker gets a job whose business rows it cannot see.
pub fn a_snapshot_claim_leaves_newer_jobs_that_were_given_back(stage: &mut Stage<'_>) -> Result<()> {
    let (mut reader, mut other) = (stage.connect()?, stage.connect()?);
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class")?;
    let jobs = enqueue(&mut other, 3)?;
    let mut transaction = other.transaction()?;
    ensure!(claim(&mut transaction, 3)?.len() == 3, "too few jobs");
    transaction.rollback()?;
    let early = claim(&mut reader, 3)?;
    reader.batch_execute("COMMIT")?;
    ensure!(early.is_empty(), "jobs newer than the snapshot were claimed: {:?}", ids(&early));
    let drained = drain(&mut other)?;
    ensure!(sorted(drained.clone()) == sorted(jobs), "drained {drained:?}");
    Ok(())
}

// If this fails, a job enqueued and cancelled in one transaction runs, or is counted for ever.
pub fn a_job_cancelled_where_it_was_enqueued_never_runs(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    one.batch_execute("BEGIN")?;
    let jobs = enqueue(&mut one, 3)?;
    ensure!(claim(&mut two, 3)?.is_empty(), "an uncommitted job was claimed");
    one.batch_execute("SAVEPOINT s")?;
    for job in &jobs {
        one.execute("SELECT awa.cancel($1)", &[job])?;
    }
    one.batch_execute("ROLLBACK TO s")?;
    one.execute("SELECT awa.cancel($1)", &[&jobs[0]])?;
    one.batch_execute("COMMIT")?;
    let drained = drain(&mut two)?;
    ensure!(drained == jobs[1..], "enqueued {jobs:?}, the first cancelled, drained {drained:?}");
    Ok(())
}

// If this fails, a claim that meets a cancel in progress loses the job when the cancel rolls back.
pub fn a_job_passed_by_while_its_cancel_rolls_back_comes_out(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let jobs = enqueue(&mut one, 4)?;
    one.batch_execute("BEGIN")?;
    for job in &jobs[..2] {
        let answer: String = one.query_one("SELECT awa.cancel($1)", &[job])?.try_get(0)?;
        ensure!(answer == "cancelled", "cancel answered {answer}");
    }
    let passed = claim(&mut two, 4)?;
    ensure!(ids(&passed) == jobs[2..], "claimed {passed:?}");
    one.batch_execute("ROLLBACK")?;
    stage.verify_clean()?;
    ensure!(ids(&claim(&mut two, 4)?) == jobs[..2], "the jobs whose cancel was rolled back did not come out");
    Ok(())
}

// If this fails, a batch of more rows than one registration takes loses some when a claimer comes by while it is being appended.
pub fn a_long_enqueue_watched_by_claimers_loses_no_row(stage: &mut Stage<'_>) -> Result<()> {
    const ROWS: usize = 20_000;
    for _ in 0..8 {
        let (mut producer, mut worker) = (stage.connect()?, stage.connect()?);
        let mut claimed = Vec::new();
        let enqueued = thread::scope(|scope| {
            let producer = scope.spawn(move || enqueue(&mut producer, ROWS));
            while !producer.is_finished() {
                // Seldom enough that the producer gets on by more than one registration.
                claimed.extend(claim(&mut worker, 1)?);
                thread::sleep(Duration::from_millis(2));
            }
            producer.join().map_err(|_| anyhow!("a thread panicked"))?
        })?;
        stage.verify_clean()?;
        claimed.extend(claim(&mut worker, i32::try_from(ROWS)?)?);
        ensure!(sorted(ids(&claimed)) == sorted(enqueued), "{ROWS} were enqueued, {} came out", claimed.len());
        let (jobs, leases): (Vec<i64>, Vec<i64>) = claimed.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
        worker.execute("SELECT awa.complete_many($1, $2)", &[&jobs, &leases])?;
    }
    Ok(())
}

// If this fails, finished jobs are counted that are no longer in the ring.
pub fn a_pruned_segment_leaves_the_counts(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 3)?;
    drain(&mut client)?;
    let mut said = Vec::new();
    for call in ["rotate", "prune", "prune"] {
        client.batch_execute("SET awa.prune_grace = 0")?;
        said.push(client.query_one(&format!("SELECT outcome FROM awa.{call}()"), &[])?.try_get::<_, String>(0)?);
    }
    ensure!(said == ["rotated", "prune_started", "pruned"], "{said:?}");
    stage.verify_clean()
}

// If this fails, a prune that broke off half-way leaves sessions with the root of an index that is gone: they can use the slot no more.
pub fn a_slot_is_good_after_a_prune_that_was_rolled_back(stage: &mut Stage<'_>) -> Result<()> {
    let (mut client, mut other) = (stage.connect()?, stage.connect()?);
    // So many that the index has a root above its leaves, which both sessions remember.
    enqueue(&mut client, 2000)?;
    enqueue(&mut other, 2000)?;
    drain(&mut other)?;
    client.batch_execute("SET awa.prune_grace = 0")?;
    for call in ["rotate", "prune"] {
        client.batch_execute(&format!("SELECT awa.{call}()"))?;
    }
    let mut transaction = client.transaction()?;
    transaction.batch_execute("SELECT awa.prune()")?;
    transaction.rollback()?;
    for call in ["prune", "rotate", "prune", "prune", "rotate"] {
        client.batch_execute(&format!("SELECT awa.{call}()"))?;
    }
    let slots = client.query("SELECT slot FROM awa.stat_segments WHERE state = 'open'", &[])?;
    ensure!(slots.len() == 1, "no open segment");
    for session in [&mut client, &mut other] {
        enqueue(session, 100)?;
        ensure!(drain(session)?.len() == 100, "jobs are missing");
    }
    stage.verify_clean()
}
