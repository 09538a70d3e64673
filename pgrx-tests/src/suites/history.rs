//! Many sessions do anything at once, are cancelled and killed, and write down what they were told. Afterwards a checker looks whether
//! all of it fits into one history that the contract allows: nothing that was answered is taken back, nobody holds what another holds,
//! leases are refused only if they are over, jobs of a lane come out in order, and what is shown at the end is what the answers say.
//! `stress_mixed` counts ends; this looks at times.
//!
//! `AWA_SEED` repeats the choices of a run (not the order in which the server meets them), `AWA_HISTORY_STEPS` makes it longer,
//! `AWA_HISTORY_KILLS` is the number of backends that are killed so that the server starts again.

mod check;
mod operator;
mod record;
mod session;

use std::sync::atomic::{AtomicBool, AtomicI32};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use self::operator::Operator;
use self::record::{Final, History};
use self::session::{Desk, Session};
use super::Stage;
use super::stress_mixed::number;
use crate::process::wait_until;

const SESSIONS: usize = 8;
pub const QUEUES: [&str; 2] = ["q", "second"];

// If this fails, some session was told what is not so.
pub fn all_answers_fit_into_one_history(stage: &mut Stage<'_>) -> Result<()> {
    run(stage, number("AWA_HISTORY_STEPS", 250), 0)
}

// If this fails, a crash takes back what was answered, or makes true what was refused.
pub fn all_answers_fit_into_one_history_over_crashes(stage: &mut Stage<'_>) -> Result<()> {
    run(stage, number("AWA_HISTORY_STEPS", 120), number("AWA_HISTORY_KILLS", 1))
}

fn run(stage: &mut Stage<'_>, steps: u64, kills: u64) -> Result<()> {
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    println!("        history: AWA_SEED={seed} AWA_HISTORY_STEPS={steps} AWA_HISTORY_KILLS={kills}");
    let create = "SELECT awa.create_queue('second', max_attempts => 3, backoff => '1 ms', dead_letters => true)";
    stage.connect()?.batch_execute(create)?;
    // The kind is known before any snapshot that a session will keep.
    stage.connect()?.batch_execute("SELECT awa.delete_job(j) FROM awa.enqueue('q', 'history') AS j")?;
    stage.connect()?.batch_execute("SELECT awa.complete(job_id, run_lease) FROM awa.claim('q')")?;
    let history = load(stage, seed, steps, kills)?;
    settle(stage)?;
    stage.verify_clean()?;
    let shown = shown(stage)?;
    let (violations, tally) = check::check(&history, &shown);
    println!("        {tally:?}");
    let first: Vec<&str> = violations.iter().take(10).map(String::as_str).collect();
    ensure!(violations.is_empty(), "{} violations:\n{}", violations.len(), first.join("\n"));
    let looked = [tally.ordered_pairs, tally.refusals, tally.exits, tally.explained];
    ensure!(looked.iter().all(|count| *count > 0), "the history says nothing: {tally:?}");
    nothing_is_stuck(stage)
}

fn load(stage: &Stage<'_>, seed: u64, steps: u64, kills: u64) -> Result<History> {
    let (desk, over, config) = (Desk::default(), AtomicBool::new(false), stage.config());
    let pids: Vec<AtomicI32> = (0..SESSIONS).map(|_| AtomicI32::new(0)).collect();
    let cluster = &*stage.cluster;
    let mut history = History::default();
    thread::scope(|scope| -> Result<()> {
        let mut sessions = Vec::new();
        for (number, pid) in pids.iter().enumerate() {
            let (desk, config) = (&desk, &config);
            sessions.push(scope.spawn(move || -> Result<History> {
                let mut session = Session::new(seed, number, desk, config, pid)?;
                session.run(steps)?;
                Ok(History { transactions: session.transactions, beside: session.beside })
            }));
        }
        let mut operator = Operator { desk: &desk, cluster, pids: &pids, over: &over, kills, beside: Vec::new() };
        let operator = scope.spawn(move || operator.run(seed).map(|()| operator.beside));
        let parts: Vec<_> = sessions.into_iter().map(|session| session.join().unwrap_or_else(|_| Err(anyhow!("a session panicked")))).collect();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        history.beside.extend(operator.join().unwrap_or_else(|_| Err(anyhow!("the operator panicked")))?);
        for part in parts {
            let part = part?;
            history.transactions.extend(part.transactions);
            history.beside.extend(part.beside);
        }
        Ok(())
    })?;
    Ok(history)
}

/// Killed sessions may take a moment to go.
fn settle(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let others = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let gone = wait_until(Duration::from_secs(30), || {
        client.query_one(others, &[]).is_ok_and(|row| row.try_get::<_, i64>(0).is_ok_and(|count| count == 0))
    });
    ensure!(gone, "sessions are still there");
    Ok(())
}

fn shown(stage: &Stage<'_>) -> Result<Final> {
    let sql = "SELECT job_id, state, (args ->> 't')::bigint FROM awa.jobs
               UNION ALL SELECT job_id, state, (args ->> 't')::bigint FROM awa.terminal_jobs
               UNION ALL SELECT job_id, 'dead_lettered', (args ->> 't')::bigint FROM awa.dlq";
    let mut shown = Final::default();
    for row in stage.connect()?.query(sql, &[])? {
        let (job_id, state, token): (i64, String, Option<i64>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        // The job that made the kind known has no token.
        let Some(token) = token else { continue };
        if shown.jobs.insert(job_id, (state, token)).is_some() {
            shown.shown_twice.push(job_id);
        }
    }
    Ok(shown)
}

/// Whatever waits can be had.
fn nothing_is_stuck(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let take = "SELECT count(awa.complete(job_id, run_lease)) FROM awa.claim($1::text[], 100)";
    let mut failure = None;
    let empty = wait_until(Duration::from_secs(60), || {
        let mut round = || -> Result<bool> {
            client.query_one(take, &[&QUEUES.as_slice()])?;
            let waiting = client.query_one("SELECT count(*) FROM awa.jobs WHERE state <> 'running'", &[])?;
            Ok(waiting.try_get::<_, i64>(0)? == 0)
        };
        round().unwrap_or_else(|error| {
            failure = Some(error);
            true
        })
    });
    failure.map_or(Ok(()), Err).context("taking what waits")?;
    ensure!(empty, "jobs that never come out");
    Ok(())
}
