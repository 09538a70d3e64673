//! Carry-forward where settings or the size of things matter; the ordinary cases are in `regress/sql/carry_forward.sql`.

use anyhow::{Context, Result, ensure};
use postgres::{Client, GenericClient};

use super::hostile_pool::Configured;
use super::{Stage, claim, enqueue};

fn rotate(client: &mut Client, times: usize) -> Result<()> {
    for _ in 0..times {
        client.batch_execute("SELECT awa.rotate()").context("rotate")?;
    }
    Ok(())
}

/// Outcome, rows and detail of one step.
fn carry(client: &mut impl GenericClient, call: &str) -> Result<(String, i64, String)> {
    let row = client.query_one(&format!("SELECT outcome, rows, COALESCE(detail, '') FROM awa.{call}"), &[]).context("carry")?;
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

fn by_policy(client: &mut Client) -> Result<(String, i64, String)> {
    carry(client, "run_maintenance('carry_forward')")
}

// If this fails, jobs that nobody ever comes for, behind a constant load of higher priority, keep the ring full for ever.
pub fn a_full_ring_empties_its_oldest_segment_of_due_jobs_too(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, &[("awa.ring_segments", "4"), ("awa.ring_segments_max", "4")])?;
    let mut client = stage.connect()?;
    enqueue(&mut client, 5)?;
    rotate(&mut client, 2)?;
    ensure!(by_policy(&mut client)?.0 == "skipped_active", "the ring is not full, and somebody may come");
    let mut client = stage.connect()?;
    rotate(&mut client, 1)?;
    let (outcome, rows, detail) = by_policy(&mut client)?;
    ensure!((outcome.as_str(), rows) == ("carried", 5), "carry_forward answered {outcome}, {rows} rows: {detail}");
    stage.verify_clean()
}

// If this fails, a few jobs keep a segment for ever because so many others were moved out of it.
pub fn a_few_jobs_among_many_tombstones_are_carried(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, &[("awa.carry_jobs", "10")])?;
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.pause_queue('q')")?;
    enqueue(&mut client, 3 * 512 + 5)?;
    rotate(&mut client, 7)?;
    for _ in 0..3 {
        carry(&mut client, "carry_forward(1)")?;
    }
    let mut client = stage.connect()?;
    let (outcome, rows, detail) = by_policy(&mut client)?;
    ensure!((outcome.as_str(), rows) == ("carried", 5), "carry_forward answered {outcome}, {rows} rows: {detail}");
    stage.verify_clean()
}

// If this fails, running attempts never leave a segment in which a busy queue has many jobs that came back.
pub fn running_attempts_behind_many_due_holes_are_carried(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 2_200)?;
    let mut transaction = client.transaction()?;
    ensure!(claim(&mut transaction, 2_200)?.len() == 2_200, "not all were claimed");
    transaction.rollback()?;
    client.batch_execute("SELECT awa.create_queue('run'); SELECT awa.enqueue('run', 'k') FROM generate_series(1, 64)")?;
    let running = client.query("SELECT job_id FROM awa.claim('run', 64)", &[])?.len() as i64;
    ensure!(running == 64, "{running} are running");
    rotate(&mut client, 7)?;
    let (outcome, rows, detail) = by_policy(&mut client)?;
    ensure!((outcome.as_str(), rows) == ("carried", running), "carry_forward answered {outcome}, {rows} rows: {detail}");
    stage.verify_clean()
}

// If this fails, nobody can cancel or retry a job while segments are emptied.
pub fn carrying_leaves_places_for_operators(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, &[("awa.max_in_flight", "1024")])?;
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.pause_queue('q')")?;
    let jobs = enqueue(&mut client, 1_200)?;
    rotate(&mut client, 1)?;
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let (mut one, mut two) = (one.transaction()?, two.transaction()?);
    let rows = carry(&mut one, "carry_forward(1)")?.1 + carry(&mut two, "carry_forward(1)")?.1;
    ensure!(rows == 1024 - 32, "{rows} jobs are on their way");
    let last = jobs.last().context("no job")?;
    let answer: String = client.query_one("SELECT awa.cancel($1)", &[last])?.try_get(0)?;
    ensure!(answer == "cancelled", "cancel answered {answer}");
    one.commit()?;
    two.rollback()?;
    stage.verify_clean()
}
