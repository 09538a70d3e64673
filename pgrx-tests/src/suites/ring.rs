//! The ring by its policy: it turns when somebody cannot go on, grows when nothing can be freed, and comes back.

use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::hostile_pool::{Configured, connect_listening};
use super::{Stage, drain, enqueue, sorted};
use crate::cluster::Shutdown;
use crate::process::wait_until;

fn step(client: &mut Client, task: &str) -> Result<(String, String)> {
    let row = client.query_one("SELECT outcome, COALESCE(detail, '') FROM awa.run_maintenance($1)", &[&task]).context("run_maintenance")?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Steps until the outcome is another one than `nothing`.
fn step_when_due(client: &mut Client, task: &str) -> Result<(String, String)> {
    let mut last = Ok((String::new(), String::new()));
    wait_until(Duration::from_secs(30), || {
        last = step(client, task);
        last.as_ref().map_or(true, |(outcome, _)| outcome != "nothing")
    });
    last
}

fn live(client: &mut Client) -> Result<i64> {
    Ok(client.query_one("SELECT count(*) FROM awa.stat_segments", &[])?.try_get(0)?)
}

/// Prunes until nothing is left to do.
fn prune_all(client: &mut Client) -> Result<()> {
    client.batch_execute("SET awa.prune_grace = 0")?;
    for _ in 0..200 {
        let (outcome, detail) = step(client, "prune")?;
        if !matches!(outcome.as_str(), "prune_started" | "pruned") {
            ensure!(outcome == "nothing", "prune answered {outcome}: {detail}");
            return Ok(());
        }
    }
    anyhow::bail!("prune does not end")
}

// If this fails, a few hundred idle transactions stop a queue until they end.
pub fn a_queue_that_cannot_note_more_transactions_goes_on_in_a_new_segment(stage: &mut Stage<'_>) -> Result<()> {
    {
        let _configured = Configured::restart_with(stage, &[("max_connections", "300")])?;
        let (mut client, mut worker) = (stage.connect()?, stage.connect()?);
        let (mut producers, mut held_back, mut committed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..210 {
            let mut producer = stage.connect()?;
            producer.batch_execute("BEGIN")?;
            held_back.extend(enqueue(&mut producer, 1)?);
            producers.push(producer);
            committed.extend(enqueue(&mut client, 1)?);
        }
        let mut done = drain(&mut worker)?;
        ensure!(done.len() < committed.len(), "the list of transactions is not full");
        let (outcome, detail) = step_when_due(&mut client, "rotate")?;
        ensure!(outcome == "rotated" && detail.contains("unfinished transactions"), "rotate answered {outcome}: {detail}");
        let (again, _) = step(&mut client, "rotate")?;
        ensure!(again == "nothing", "rotate answered {again} at once");
        let behind = enqueue(&mut client, 20)?;
        let through = drain(&mut worker)?;
        ensure!(behind.iter().all(|job| through.contains(job)), "{} of {} new jobs get through", through.len(), behind.len());
        done.extend(through);
        committed.extend(behind);
        for producer in &mut producers {
            producer.batch_execute("COMMIT")?;
        }
        done.extend(drain(&mut worker)?);
        committed.extend(held_back);
        ensure!(sorted(done.clone()) == sorted(committed.clone()), "{} of {} came out", done.len(), committed.len());
        drop(producers);
        prune_all(&mut client)?;
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

// If this fails, a paused queue stops producers, or the ring never shrinks again.
pub fn the_ring_grows_to_its_limit_goes_on_and_comes_back(stage: &mut Stage<'_>) -> Result<()> {
    let small = [("awa.ring_segments", "3"), ("awa.ring_segments_max", "5"), ("awa.rotate_age", "1")];
    {
        let _configured = Configured::restart_with(stage, &small)?;
        let (mut client, heard) = connect_listening(stage)?;
        let mut jobs = Vec::new();
        for expected in ["rotated", "rotated", "grown", "grown", "full", "full"] {
            jobs.extend(enqueue(&mut client, 3)?);
            let (outcome, detail) = step_when_due(&mut client, "rotate")?;
            ensure!(outcome == expected, "expected {expected}, rotate answered {outcome}: {detail}");
            let (pruned, _) = step(&mut client, "prune")?;
            ensure!(pruned == "skipped_active" || pruned == "nothing", "prune answered {pruned}");
        }
        ensure!(live(&mut client)? == 5, "{} segments are live", live(&mut client)?);
        let said = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let warned = |text: &str| said.iter().filter(|line| line.contains("WARNING") && line.contains(text)).count();
        ensure!(warned("has grown to") == 2 && warned("the ring is full") == 1, "said {said:?}");
        stage.verify_clean()?;
        let mut drained = drain(&mut client)?;
        ensure!(drained == jobs, "out of order: {drained:?}");
        prune_all(&mut client)?;
        ensure!(live(&mut client)? == 1, "{} segments are live", live(&mut client)?);
        jobs = enqueue(&mut client, 3)?;
        let (outcome, detail) = step_when_due(&mut client, "rotate")?;
        ensure!(outcome == "rotated", "rotate answered {outcome}: {detail}");
        // One is about to be freed: no growth for it.
        drained = drain(&mut client)?;
        ensure!(drained == jobs, "came {drained:?}");
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

// If this fails, one idle transaction keeps the ring from being freed (E5), or a reader sees half a segment.
pub fn an_old_snapshot_keeps_no_segment(stage: &mut Stage<'_>) -> Result<()> {
    let (mut client, mut reader) = (stage.connect()?, stage.connect()?);
    enqueue(&mut client, 500)?;
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")?;
    drain(&mut client)?;
    client.batch_execute("SELECT awa.rotate()")?;
    prune_all(&mut client)?;
    ensure!(live(&mut client)? == 1, "{} segments are live", live(&mut client)?);
    let sql = "SELECT kind, age_in_xids > 0 FROM awa.horizon WHERE database = current_database() AND state = 'idle in transaction'";
    let row = client.query_one(sql, &[]).context("the session is not in awa.horizon")?;
    ensure!(row.try_get::<_, String>(0)? == "session" && row.try_get::<_, bool>(1)?, "{row:?}");
    let seen: i64 = reader.query_one("SELECT count(*) FROM awa_segments.ready_entries_0", &[])?.try_get(0)?;
    ensure!(seen == 0, "the old snapshot sees {seen} rows of a freed segment");
    reader.batch_execute("COMMIT")?;
    let dead: i64 = client
        .query_one("SELECT COALESCE(sum(pg_relation_size(oid)), 0)::bigint FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r' AND relname LIKE '%\\_0'", &[])?
        .try_get(0)?;
    ensure!(dead == 0, "{dead} bytes are left");
    Ok(())
}

// If this fails, sessions that sleep for work are kept awake by a segment on its way out.
pub fn a_wait_sleeps_over_a_segment_on_its_way_out(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 3)?;
    for job in &jobs {
        client.execute("SELECT awa.cancel($1)", &[job])?;
    }
    client.batch_execute("SELECT awa.rotate(); SET awa.prune_grace = 3600")?;
    let (outcome, detail) = step(&mut client, "prune")?;
    ensure!(outcome == "prune_started", "prune answered {outcome}: {detail}");
    let row = client.query_one("SELECT oldest_due_at IS NULL, gaps FROM awa.stat_queue WHERE queue = 'q'", &[])?;
    ensure!(row.try_get::<_, bool>(0)? && row.try_get::<_, i32>(1)? == 0, "the queue still looks at the segment");
    let began = std::time::Instant::now();
    client.batch_execute("CALL awa.wait('q', '300 milliseconds')")?;
    ensure!(began.elapsed() >= Duration::from_millis(250), "the wait returned after {:?}", began.elapsed());
    Ok(())
}

// If this fails, the ledger grows for ever, and every rotation reads all of it.
pub fn the_ledger_is_trimmed_now_and_then(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute(
        "INSERT INTO awa.ring_rotations (generation, slot, event, at)
         SELECT -g, 0, event, now() FROM generate_series(1, 2100) AS g, unnest('{opened,prune_started,pruned}'::text[]) AS event;
         SELECT awa.rotate()",
    )?;
    prune_all(&mut client)?;
    let rows: i64 = client.query_one("SELECT count(*) FROM awa.ring_rotations", &[])?.try_get(0)?;
    ensure!(rows <= 3100, "the ledger has {rows} rows");
    let kept: bool = client.query_one("SELECT min(generation) = -998 FROM awa.ring_rotations", &[])?.try_get(0)?;
    ensure!(kept, "another number of generations was kept");
    let done = { enqueue(&mut client, 3)?; drain(&mut client)?.len() };
    ensure!(done == 3, "{done} of 3 jobs ran");
    Ok(())
}
