//! The points themselves: what the other suites stop and fail sessions with does what it says.

use anyhow::{Result, ensure};
use postgres::error::SqlState;

use super::{Stage, enqueue};
use crate::points;

/// A session that enqueues in a thread, and is at the point when this returns.
fn enqueue_to(stage: &Stage<'_>, point: &str, meanwhile: impl FnOnce(i32) -> Result<()>) -> Result<Result<Vec<i64>>> {
    let mut observer = stage.connect()?;
    let mut client = stage.connect()?;
    std::thread::scope(|scope| {
        let producer = scope.spawn(move || enqueue(&mut client, 1));
        let met = points::wait_reached(&mut observer, point).and_then(meanwhile);
        let outcome = producer.join().map_err(|_| anyhow::anyhow!("the producer panicked"))?;
        met.map(|()| outcome)
    })
}

// If this fails, tests that stop a session at a point prove nothing.
pub fn a_point_stops_fails_and_lets_go(stage: &mut Stage<'_>) -> Result<()> {
    let mut operator = stage.connect()?;
    points::create(&mut operator)?;
    points::arm(&mut operator, "enqueue.registered", "wait")?;
    enqueue_to(stage, "enqueue.registered", |_| points::release(&mut operator, "enqueue.registered"))??;
    // Whoever sleeps there can be cancelled, and leaves nothing behind.
    points::arm(&mut operator, "enqueue.registered", "wait")?;
    let cancelled = enqueue_to(stage, "enqueue.registered", |pid| {
        operator.execute("SELECT pg_cancel_backend($1)", &[&pid])?;
        Ok(())
    })?;
    let code = cancelled.err().and_then(|error| error.downcast_ref::<postgres::Error>().and_then(|error| error.code().cloned()));
    ensure!(code == Some(SqlState::QUERY_CANCELED), "a cancelled wait ended with {code:?}");
    ensure!(points::release(&mut operator, "enqueue.registered").is_err(), "somebody still sleeps at the point");

    points::arm(&mut operator, "enqueue.appended", "error")?;
    let mut client = stage.connect()?;
    let failed = enqueue(&mut client, 1).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(failed.contains("enqueue.appended"), "the armed error did not come: {failed}");
    // Once only; and what was let pass was let pass.
    enqueue(&mut client, 1)?;
    operator.batch_execute("SELECT awa_points.arm('enqueue.appended', 'exit', skip := 1)")?;
    enqueue(&mut client, 1)?;
    ensure!(enqueue(&mut client, 1).is_err() && client.simple_query("SELECT 1").is_err(), "the session did not end at the point");
    points::disarm_all(&mut operator)?;
    let jobs: i64 = operator.query_one("SELECT count(*) FROM awa.jobs", &[])?.try_get(0)?;
    ensure!(jobs == 3, "{jobs} jobs where 3 were enqueued");
    Ok(())
}

// If this fails, a test that kills a session at a point kills nothing.
pub fn a_point_kills(stage: &mut Stage<'_>) -> Result<()> {
    let mut operator = stage.connect()?;
    points::create(&mut operator)?;
    enqueue(&mut operator, 2)?;
    // Where an error would be a PANIC, nothing else acts.
    points::arm(&mut operator, "session.commit", "error")?;
    enqueue(&mut stage.connect()?, 1)?;
    ensure!(points::hits(&mut operator, "session.commit")? > 0, "no commit came by");
    // In the callback of the commit, where nothing else may act: the job is there, its session never heard of it.
    points::arm(&mut operator, "session.commit", "kill")?;
    let mut client = stage.connect()?;
    let log_start = stage.cluster.log_size();
    ensure!(enqueue(&mut client, 1).is_err(), "the session lives on");
    stage.cluster.wait_recovered(log_start)?;
    let jobs: i64 = stage.connect()?.query_one("SELECT count(*) FROM awa.jobs", &[])?.try_get(0)?;
    ensure!(jobs == 4, "{jobs} jobs after the crash, of 4 that were committed");
    Ok(())
}
