//! `CALL awa.wait`: it returns when there may be work, and costs nobody anything while it sleeps.
//!
//! No case asserts a time: a wait that is not woken ends with its timeout, which is longer than a case may take.

use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use postgres::Client;
use postgres::error::SqlState;

use super::races::pid_of;
use super::{Stage, claim, complete, enqueue};
use crate::process::wait_until;

/// Longer than a case may take: who returns was woken.
const FOR_EVER: &str = "CALL awa.wait('q', '1 hour')";

/// A session that sleeps in a wait.
struct Sleeper<'scope> {
    pid: i32,
    thread: ScopedJoinHandle<'scope, (Client, std::result::Result<(), postgres::Error>)>,
}

impl<'scope> Sleeper<'scope> {
    fn start<'env>(scope: &'scope thread::Scope<'scope, 'env>, stage: &Stage<'_>, observer: &mut Client) -> Result<Self> {
        let mut client = stage.connect()?;
        let pid = pid_of(&mut client)?;
        let sleeper = Self {
            pid,
            thread: scope.spawn(move || {
                // Not woken is an error; how long it took is not asked.
                let limited = client.batch_execute("SET statement_timeout = '20s'");
                let result = limited.and_then(|()| client.batch_execute(FOR_EVER));
                let _ = client.batch_execute("RESET statement_timeout");
                (client, result)
            }),
        };
        sleeper.see_asleep(observer)?;
        Ok(sleeper)
    }

    fn see_asleep(&self, observer: &mut Client) -> Result<()> {
        let sql = "SELECT coalesce(wait_event_type = 'Extension', false) FROM pg_stat_activity WHERE pid = $1";
        let asleep = wait_until(Duration::from_secs(20), || {
            observer.query_one(sql, &[&self.pid]).is_ok_and(|row| row.try_get(0).unwrap_or(false))
        });
        ensure!(asleep, "process {} does not sleep", self.pid);
        Ok(())
    }

    fn woken(self) -> Result<Client> {
        let (client, result) = self.thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        result.context("wait")?;
        Ok(client)
    }

    fn error(self) -> Result<(Client, postgres::Error)> {
        let (client, result) = self.thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        Ok((client, result.err().context("the wait ended without an error")?))
    }
}

/// If the scene goes wrong, the sleepers must not keep the case.
fn scene(stage: &Stage<'_>, play: impl for<'scope> FnOnce(&'scope thread::Scope<'scope, '_>, &mut Client) -> Result<()>) -> Result<()> {
    let mut observer = stage.connect()?;
    thread::scope(|scope| {
        let result = play(scope, &mut observer);
        if result.is_err() {
            let all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CALL awa.wait%' AND pid <> pg_backend_pid()";
            drop(observer.batch_execute(all));
        }
        result
    })
}

/// Waits and claims until a job comes: a return is a hint, not a promise.
fn claim_when_woken(client: &mut Client) -> Result<i64> {
    for _ in 0..1000 {
        if let Some(attempt) = claim(client, 1)?.first() {
            complete(client, *attempt)?;
            return Ok(attempt.job_id);
        }
        client.batch_execute(FOR_EVER)?;
    }
    Err(anyhow!("woken 1000 times for nothing"))
}

// If this fails, workers find new jobs only when their timeout is over.
pub fn a_commit_wakes_a_waiting_session(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        let jobs = enqueue(client, 1)?;
        ensure!(claim_when_woken(&mut sleeper.woken()?)? == jobs[0], "another job came");
        Ok(())
    })
}

// If this fails, only some of the idle workers start when work arrives.
pub fn a_large_commit_wakes_every_waiting_session(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleepers: Vec<Sleeper<'_>> = (0..5).map(|_| Sleeper::start(scope, stage, client)).collect::<Result<_>>()?;
        enqueue(client, 10)?;
        for sleeper in sleepers {
            claim_when_woken(&mut sleeper.woken()?)?;
        }
        Ok(())
    })
}

// If this fails, a job given back waits although workers are idle.
pub fn a_rolled_back_claim_wakes_a_waiting_session(stage: &mut Stage<'_>) -> Result<()> {
    let mut holder = stage.connect()?;
    enqueue(&mut holder, 1)?;
    scene(stage, |scope, client| {
        let mut transaction = holder.transaction()?;
        ensure!(claim(&mut transaction, 1)?.len() == 1, "nothing was claimed");
        let sleeper = Sleeper::start(scope, stage, client)?;
        transaction.rollback()?;
        claim_when_woken(&mut sleeper.woken()?)?;
        Ok(())
    })
}

// If this fails, a waiting worker holds back VACUUM in the whole database.
pub fn a_waiting_session_holds_no_snapshot(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        let sql = "SELECT backend_xmin IS NULL AND backend_xid IS NULL FROM pg_stat_activity WHERE pid = $1";
        let free: bool = client.query_one(sql, &[&sleeper.pid])?.try_get(0)?;
        let locks: i64 = client.query_one("SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype = 'relation'", &[&sleeper.pid])?.try_get(0)?;
        enqueue(client, 1)?;
        sleeper.woken()?;
        ensure!(free, "the waiting session had a snapshot or a transaction id");
        ensure!(locks == 0, "the waiting session had locked {locks} relations");
        Ok(())
    })
}

// If this fails, a wait in a transaction pins what it has read for as long as it sleeps.
pub fn a_wait_in_a_transaction_is_refused(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let in_function = "DO $$ BEGIN CALL awa.wait('q', '1 hour'); END $$";
    for opening in ["BEGIN", "BEGIN; SELECT awa.enqueue('q', 'test')", "BEGIN ISOLATION LEVEL REPEATABLE READ", "BEGIN; SAVEPOINT s"] {
        client.batch_execute(opening)?;
        let error = client.batch_execute("CALL awa.wait('q', '1 hour')").err().context("the wait was not refused")?;
        ensure!(error.code() == Some(&SqlState::ACTIVE_SQL_TRANSACTION), "after {opening}: {error}");
        client.batch_execute("ROLLBACK")?;
    }
    client.batch_execute("BEGIN")?;
    let error = client.batch_execute(in_function).err().context("the wait in a block was not refused")?;
    ensure!(error.code() == Some(&SqlState::ACTIVE_SQL_TRANSACTION), "in a DO block: {error}");
    client.batch_execute("ROLLBACK")?;
    client.batch_execute("SET default_transaction_isolation = 'repeatable read'")?;
    let error = client.batch_execute("CALL awa.wait('q', '1 hour')").err().context("the wait was not refused")?;
    ensure!(error.code() == Some(&SqlState::ACTIVE_SQL_TRANSACTION), "under REPEATABLE READ: {error}");
    Ok(())
}

// If this fails, an idle worker cannot be stopped.
pub fn a_waiting_session_can_be_cancelled(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.execute("SELECT pg_cancel_backend($1)", &[&sleeper.pid])?;
        let (mut worker, error) = sleeper.error()?;
        ensure!(error.code() == Some(&SqlState::QUERY_CANCELED), "{error}");
        worker.batch_execute("SET statement_timeout = '50ms'")?;
        let error = worker.batch_execute(FOR_EVER).err().context("the wait was not cancelled")?;
        ensure!(error.code() == Some(&SqlState::QUERY_CANCELED), "{error}");
        worker.batch_execute("RESET statement_timeout")?;
        enqueue(client, 1)?;
        claim_when_woken(&mut worker)?;
        let waiters: i32 = client.query_one("SELECT waiters FROM awa.queue_stats() WHERE queue = 'q'", &[])?.try_get(0)?;
        ensure!(waiters == 0, "{waiters} sessions are said to wait");
        Ok(())
    })
}

// If this fails, a worker that is killed in its sleep is counted for ever.
pub fn a_terminated_wait_leaves_nothing_behind(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.execute("SELECT pg_terminate_backend($1)", &[&sleeper.pid])?;
        drop(sleeper.error()?);
        let sql = "SELECT waiters FROM awa.queue_stats() WHERE queue = 'q'";
        let gone = wait_until(Duration::from_secs(20), || client.query_one(sql, &[]).is_ok_and(|row| row.try_get::<_, i32>(0).is_ok_and(|n| n == 0)));
        ensure!(gone, "a session is said to wait");
        Ok(())
    })
}

// If this fails, a scheduled job runs only when something else happens.
pub fn a_scheduled_job_wakes_when_it_is_due(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.batch_execute("SELECT awa.enqueue('q', 'test', run_at => clock_timestamp() + interval '300 ms')")?;
        claim_when_woken(&mut sleeper.woken()?)?;
        client.batch_execute("SELECT awa.enqueue('q', 'test', run_at => clock_timestamp() + interval '300 ms')")?;
        let mut late = stage.connect()?;
        claim_when_woken(&mut late)?;
        Ok(())
    })
}

// If this fails, jobs of prepared transactions wait for the next ordinary one.
pub fn a_commit_prepared_wakes_a_waiting_session(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        client.batch_execute("BEGIN; SELECT awa.enqueue('q', 'test'); PREPARE TRANSACTION 'p1'")?;
        let mut worker = stage.connect()?;
        let pid = pid_of(&mut worker)?;
        let worker = scope.spawn(move || claim_when_woken(&mut worker));
        let sql = "SELECT coalesce(wait_event_type = 'Extension', false) FROM pg_stat_activity WHERE pid = $1";
        wait_until(Duration::from_secs(20), || client.query_one(sql, &[&pid]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
        client.batch_execute("COMMIT PREPARED 'p1'")?;
        worker.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok(())
    })
}

// The same, for a worker that slept already when the transaction was prepared.
pub fn a_prepared_transaction_wakes_a_session_that_slept_before(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.batch_execute("BEGIN; SELECT awa.enqueue('q', 'test'); PREPARE TRANSACTION 'p2'")?;
        client.batch_execute("COMMIT PREPARED 'p2'")?;
        // Whatever its answer, verify() settles what prepared transactions have left.
        client.batch_execute("SELECT awa.verify()")?;
        claim_when_woken(&mut sleeper.woken()?)?;
        Ok(())
    })
}

// If this fails, workers of a paused queue sleep on after it was resumed.
pub fn resuming_a_queue_wakes_its_workers(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        client.batch_execute("SELECT awa.pause_queue('q')")?;
        enqueue(client, 1)?;
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.batch_execute("SELECT awa.resume_queue('q')")?;
        claim_when_woken(&mut sleeper.woken()?)?;
        Ok(())
    })
}

// If this fails, workers of a dropped queue never learn of it; or they sleep through a rebuild.
pub fn dropping_a_queue_and_rebuilding_wake_its_workers(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, client| {
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.batch_execute("SELECT awa.rebuild()")?;
        enqueue(client, 1)?;
        claim_when_woken(&mut sleeper.woken()?)?;
        let sleeper = Sleeper::start(scope, stage, client)?;
        client.batch_execute("SELECT awa.drop_queue('q', force => true)")?;
        drop(sleeper.woken()?);
        client.batch_execute("SELECT awa.create_queue('q')")?;
        Ok(())
    })
}
