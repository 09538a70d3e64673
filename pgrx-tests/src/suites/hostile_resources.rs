//! Much of everything: calls in one session, open transactions, savepoints, rows of one transaction, jobs of one call, cancelled calls.

mod memory;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use postgres::error::SqlState;
use postgres::{Client, GenericClient};

pub use self::memory::{the_memory_of_a_session_stays_flat_over_many_calls, the_memory_of_a_session_stays_flat_over_many_refusals};
use super::hostile_pool::Configured;
use super::{Attempt, Stage, claim, enqueue, ids, sorted};
use crate::cluster::Shutdown;

/// Ends all of them in one call; each must succeed.
fn complete_all(client: &mut impl GenericClient, attempts: &[Attempt]) -> Result<()> {
    let (ids, leases): (Vec<i64>, Vec<i64>) = attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
    let rows = client.query("SELECT job_id, result FROM awa.complete_many($1, $2) WHERE result <> 'completed' LIMIT 5", &[&ids, &leases])?;
    ensure!(rows.is_empty(), "not completed: {rows:?}");
    Ok(())
}

/// Claims and completes in large batches until nothing is there.
fn drain_fast(client: &mut Client) -> Result<Vec<i64>> {
    let mut jobs = Vec::new();
    loop {
        let attempts = claim(client, 20_000)?;
        if attempts.is_empty() {
            return Ok(jobs);
        }
        complete_all(client, &attempts)?;
        jobs.extend(ids(&attempts));
    }
}

fn same(what: &str, found: Vec<i64>, expected: Vec<i64>) -> Result<()> {
    let (found, expected) = (sorted(found), sorted(expected));
    if found == expected {
        return Ok(());
    }
    let (there, wanted): (BTreeSet<i64>, BTreeSet<i64>) = (found.iter().copied().collect(), expected.iter().copied().collect());
    let (lost, extra) = (wanted.difference(&there).count(), there.difference(&wanted).count());
    ensure!(false, "{what}: {} came out, {} distinct, expected {}; {lost} are lost, {extra} unexpected", found.len(), there.len(), expected.len());
    Ok(())
}

// If this fails, many open producers stop a queue for good, lose jobs, or a rotation does not help.
pub fn more_open_producers_than_gaps_delay_jobs_and_lose_none(stage: &mut Stage<'_>) -> Result<()> {
    // A queue follows 192 unfinished transactions.
    const PRODUCERS: usize = 230;
    {
        let _configured = Configured::restart_with(stage, &[("max_connections", "300")])?;
        let (mut client, mut worker) = (stage.connect()?, stage.connect()?);
        let (mut committed, mut held_back, mut never) = (Vec::new(), Vec::new(), Vec::new());
        let mut producers = Vec::new();
        for number in 0..PRODUCERS {
            let mut producer = stage.connect()?;
            producer.batch_execute("BEGIN")?;
            let jobs = enqueue(&mut producer, 2)?;
            if number % 3 == 0 { &mut never } else { &mut held_back }.extend(jobs);
            producers.push(producer);
            committed.extend(enqueue(&mut client, 2)?);
        }
        let mut done = drain_fast(&mut worker)?;
        ensure!(done.iter().all(|job| committed.contains(job)), "uncommitted jobs came out");
        ensure!(done.len() >= 2 * 191, "with {PRODUCERS} open producers only {} of {} committed jobs came out", done.len(), committed.len());
        ensure!(claim(&mut worker, 5)?.is_empty(), "more came without a change");
        stage.verify_clean()?;
        let outcome: String = client.query_one("SELECT outcome FROM awa.rotate()", &[])?.try_get(0)?;
        ensure!(outcome == "rotated", "rotate answered {outcome}");
        let behind = enqueue(&mut client, 10)?;
        let through = drain_fast(&mut worker)?;
        ensure!(behind.iter().all(|job| through.contains(job)), "after a rotation new jobs do not get through: {} of {}", through.len(), behind.len());
        done.extend(through);
        committed.extend(behind);
        for (number, producer) in producers.iter_mut().enumerate() {
            producer.batch_execute(if number % 3 == 0 { "ROLLBACK" } else { "COMMIT" })?;
            if number % 50 == 0 {
                done.extend(drain_fast(&mut worker)?);
                stage.verify_clean()?;
            }
        }
        drop(producers);
        done.extend(drain_fast(&mut worker)?);
        committed.extend(held_back);
        same("after all producers have ended", done, committed)?;
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

// If this fails, a producer with many savepoints (an ORM, a PL/pgSQL loop with handlers) loses jobs or stops the queue for good.
pub fn hundreds_of_savepoints_delay_jobs_and_lose_none(stage: &mut Stage<'_>) -> Result<()> {
    for commit in [true, false] {
        let (mut producer, mut client, mut worker) = (stage.connect()?, stage.connect()?, stage.connect()?);
        let (mut kept, mut committed, mut done) = (Vec::new(), Vec::new(), Vec::new());
        producer.batch_execute("BEGIN")?;
        for number in 0..300 {
            producer.batch_execute(&format!("SAVEPOINT s{number}"))?;
            let jobs = enqueue(&mut producer, 2)?;
            match number % 4 {
                0 => producer.batch_execute(&format!("ROLLBACK TO s{number}; RELEASE s{number}"))?,
                1 => {
                    producer.batch_execute(&format!("RELEASE s{number}"))?;
                    kept.extend(jobs);
                }
                _ => kept.extend(jobs),
            }
            committed.extend(enqueue(&mut client, 1)?);
            if number % 100 == 50 {
                done.extend(drain_fast(&mut worker)?);
            }
        }
        done.extend(drain_fast(&mut worker)?);
        ensure!(done.len() >= 100 && done.iter().all(|job| committed.contains(job)), "{} jobs came out", done.len());
        stage.verify_clean()?;
        producer.batch_execute(if commit { "COMMIT" } else { "ROLLBACK" })?;
        stage.verify_clean()?;
        done.extend(drain_fast(&mut worker)?);
        committed.extend(if commit { kept } else { Vec::new() });
        same(if commit { "after the commit" } else { "after the rollback" }, done, committed)?;
    }
    Ok(())
}

// If this fails, one large transaction stops everybody else, or some of its jobs never come out.
pub fn a_transaction_of_100_000_jobs_holds_nobody_up(stage: &mut Stage<'_>) -> Result<()> {
    for commit in [true, false] {
        let (mut producer, mut client, mut worker) = (stage.connect()?, stage.connect()?, stage.connect()?);
        let mut transaction = producer.transaction()?;
        let mut large = enqueue(&mut transaction, 50_000)?;
        let mut others = enqueue(&mut client, 100)?;
        same("between", drain_fast(&mut worker)?, others.clone())?;
        large.extend(enqueue(&mut transaction, 50_000)?);
        let more = enqueue(&mut client, 100)?;
        same("behind", drain_fast(&mut worker)?, more.clone())?;
        others.extend(more);
        if commit {
            transaction.commit()?;
        } else {
            transaction.rollback()?;
            large.clear();
        }
        same("at the end", drain_fast(&mut worker)?, large)?;
        stage.verify_clean()?;
    }
    Ok(())
}

// If this fails, a worker that claimed too much and died takes jobs with it, or their order.
pub fn a_claim_of_60_000_jobs_that_rolls_back_gives_them_all_back(stage: &mut Stage<'_>) -> Result<()> {
    const JOBS: usize = 60_000;
    {
        let _configured = Configured::restart_with(stage, &[("awa.max_in_flight", "100000")])?;
        let mut client = stage.connect()?;
        let jobs = enqueue(&mut client, JOBS)?;
        let mut transaction = client.transaction()?;
        ensure!(claim(&mut transaction, i32::try_from(JOBS)?)?.len() == JOBS, "too few jobs were claimed");
        transaction.rollback()?;
        stage.verify_clean()?;
        let again = claim(&mut client, i32::try_from(JOBS)?)?;
        same("claimed again", ids(&again), jobs)?;
        complete_all(&mut client, &again)?;
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

/// Runs `call` with a statement_timeout that grows from 1 ms until it succeeds; after each cancelled one `check` must hold.
fn with_growing_timeout<T>(
    client: &mut Client,
    mut call: impl FnMut(&mut Client) -> Result<T>,
    mut check: impl FnMut() -> Result<()>,
) -> Result<T> {
    let (mut limit, mut times) = (1.0f64, 0);
    for _ in 0..80 {
        client.batch_execute(&format!("SET statement_timeout = {}", limit as u32))?;
        let result = call(client);
        client.batch_execute("RESET statement_timeout")?;
        match result {
            Err(error) if cancelled(&error) => check().with_context(|| format!("after a call that was cancelled after {limit:.0} ms"))?,
            other => {
                ensure!(times > 0, "nothing was cancelled: the batch is too small for this machine");
                return other;
            }
        }
        times += 1;
        limit = (limit * 1.25).max(limit + 1.0);
    }
    call(client)
}

fn cancelled(error: &anyhow::Error) -> bool {
    let code = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>()).and_then(postgres::Error::code);
    code == Some(&SqlState::QUERY_CANCELED)
}

const BATCH: usize = 15_000;

// If this fails, a cancelled enqueue leaves jobs, or a mark that stops claimers.
pub fn a_large_enqueue_may_be_cancelled_anywhere(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let first = enqueue(&mut client, 10)?;
    let jobs = with_growing_timeout(&mut client, |client| enqueue(client, BATCH), || stage.verify_clean())?;
    same("enqueued", drain_fast(&mut client)?, [first, jobs].concat())
}

// If this fails, a cancelled claim keeps jobs, or hands some out twice.
pub fn a_large_claim_may_be_cancelled_anywhere(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, BATCH)?;
    let attempts = with_growing_timeout(&mut client, |client| claim(client, i32::try_from(BATCH)?), || stage.verify_clean())?;
    same("claimed", ids(&attempts), jobs)?;
    complete_all(&mut client, &attempts)
}

// If this fails, a cancelled completion ends some attempts, or stops them from being ended.
pub fn a_large_completion_may_be_cancelled_anywhere(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, BATCH)?;
    let attempts = claim(&mut client, i32::try_from(BATCH)?)?;
    ensure!(attempts.len() == BATCH, "{} were claimed", attempts.len());
    with_growing_timeout(&mut client, |client| complete_all(client, &attempts), || stage.verify_clean())?;
    ensure!(claim(&mut client, 1)?.is_empty(), "a completed job was claimed");
    Ok(())
}
