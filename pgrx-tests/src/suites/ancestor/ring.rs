//! E3, E5, E7, E10: what keeps a segment, what destroys it, and what a bad row stops.

use anyhow::{Result, ensure};

use super::super::hostile_pool::Configured;
use super::super::{Stage, claim, complete, drain, enqueue, ids};
use super::*;

// If this fails, a running job is destroyed because another one in its segment has two closures.
pub fn e03_a_prune_counts_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 2)?;
    let attempts = claim(&mut client, 2)?;
    answer(&mut client, "fail($job, $lease, 'x', final => true)", attempts[0])?;
    rotate(&mut client)?;
    // It is tried again: the first copy has two closures now, as many as there are copies in the segment.
    ensure!(answer(&mut client, "retry($job)", attempts[0])? == "retried", "not retried");
    let said = prune_all(&mut client)?;
    ensure!(said.0 == "skipped_active" && said.1.contains("running"), "prune said {said:?}");
    ensure!(state_of(&mut client, attempts[1].job_id)? == "running", "the running job is {}", state_of(&mut client, attempts[1].job_id)?);
    ensure!(complete(&mut client, attempts[1])? == "completed", "the running job is gone");
    ensure!(drain(&mut client)? == [attempts[0].job_id], "the retried job is gone");
    rotate(&mut client)?;
    prune_all(&mut client)?;
    ensure!(live_segments(&mut client)? == 1, "a drained segment stays");
    Ok(())
}

// If this fails, one job that nobody claims, or one idle producer, keeps the history of every queue.
pub fn e05_a_paused_queue_and_an_idle_producer_pin_nothing_of_others(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, &[("awa.ring_segments", "6")])?;
    let (mut client, mut idle) = (stage.connect()?, stage.connect()?);
    client.batch_execute("SELECT awa.create_queue('still'); SELECT awa.pause_queue('still')")?;
    let mut still = Vec::new();
    let mut producer = idle.transaction()?;
    let open = enqueue(&mut producer, 1)?;
    let mut most = 0;
    for _ in 0..30 {
        still.push(client.query_one("SELECT awa.enqueue('still', 'k')", &[])?.try_get::<_, i64>(0)?);
        let jobs = enqueue(&mut client, 20)?;
        ensure!(drain(&mut client)? == jobs, "jobs are missing");
        let said = step(&mut client, "rotate()")?;
        ensure!(said.0 == "rotated", "the ring stands still: {said:?}");
        // What the maintainer does at its ticks.
        for _ in 0..20 {
            if step(&mut client, "run_maintenance('carry_forward')")?.0 != "carried" {
                break;
            }
        }
        prune_all(&mut client)?;
        most = most.max(live_segments(&mut client)?);
    }
    ensure!(most <= 6, "{most} segments were live at a time");
    let rows: i64 = client.query_one("SELECT sum(bytes)::bigint FROM awa.stat_segments", &[])?.try_get(0)?;
    ensure!(rows < 1024 * 1024, "they hold {rows} bytes");
    producer.commit()?;
    client.batch_execute("SELECT awa.resume_queue('still')")?;
    ensure!(drain(&mut client)? == open, "the job of the idle producer is gone");
    let rows = client.query("SELECT job_id FROM awa.claim('still', 100) ORDER BY job_id", &[])?;
    let claimed: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(claimed == still, "of the paused jobs {still:?} came out {claimed:?}");
    Ok(())
}

// If this fails, a committed job is destroyed, or stops every rescue, because its transaction was open while the ring turned.
pub fn e07_a_job_outlives_the_ring_that_turned_under_its_transaction(stage: &mut Stage<'_>) -> Result<()> {
    for claimed_before in [false, true] {
        let (mut client, mut slow) = (stage.connect()?, stage.connect()?);
        let mut producer = slow.transaction()?;
        let jobs = enqueue(&mut producer, 2)?;
        let lap = |client: &mut Client, others: bool| -> Result<()> {
            for _ in 0..20 {
                if others {
                    enqueue(client, 3)?;
                    ensure!(drain(client)?.len() == 3, "jobs of others are missing");
                }
                rotate(client)?;
                prune_all(client)?;
            }
            Ok(())
        };
        lap(&mut client, true)?;
        producer.commit()?;
        let attempts = if claimed_before { claim(&mut client, 2)? } else { Vec::new() };
        lap(&mut client, claimed_before)?;
        stage.verify_clean()?;
        for job in &jobs {
            let state = state_of(&mut client, *job)?;
            ensure!(state == if claimed_before { "running" } else { "available" }, "the job is {state}");
        }
        ensure!(step(&mut client, "rescue_stale_heartbeats()")?.0 == "nothing", "rescue found something");
        let attempts = if claimed_before { attempts } else { claim(&mut client, 2)? };
        ensure!(ids(&attempts) == jobs, "claimed {attempts:?}");
        answer(&mut client, "fail($job, $lease, 'again', retry_after => '0')", attempts[0])?;
        complete(&mut client, attempts[1])?;
        ensure!(drain(&mut client)? == jobs[..1], "the failed job did not come again");
        rotate(&mut client)?;
        prune_all(&mut client)?;
    }
    Ok(())
}

// If this fails, one job that cannot come back stops promotion for every queue, or its lane for ever.
pub fn e10_a_bad_deferred_job_stops_no_other(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('other')")?;
    for queue in ["q", "other", "q"] {
        client.execute("SELECT awa.enqueue($1, 'k', run_at => now() + interval '1 week')", &[&queue])?;
    }
    rotate(&mut client)?;
    ensure!(step(&mut client, "carry_forward(1)")?.0 == "carried", "nothing was carried");
    // The first of queue q belongs to no queue any more.
    client.batch_execute("UPDATE awa.deferred_jobs SET look_at = now()")?;
    let sql = "UPDATE awa.deferred_jobs SET lane = 8 * 999 + 1 WHERE job_id = (SELECT min(job_id) FROM awa.deferred_jobs) RETURNING job_id, \
               (SELECT lane FROM awa.deferred_jobs ORDER BY job_id LIMIT 1)";
    let row = client.query_one(sql, &[])?;
    let (bad, lane): (i64, i32) = (row.try_get(0)?, row.try_get(1)?);
    for round in 0..2 {
        let row = client.query_one("SELECT outcome, rows, COALESCE(detail, '') FROM awa.promote_deferred()", &[])?;
        let (outcome, rows, detail): (String, i64, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let wanted = if round == 0 { ("promoted", 2, true) } else { ("nothing", 0, false) };
        ensure!((outcome.as_str(), rows, detail.contains("set aside")) == wanted, "round {round}: {outcome}, {rows} rows: {detail}");
    }
    let left: i64 = client.query_one("SELECT job_id FROM awa.deferred_jobs", &[])?.try_get(0)?;
    ensure!(left == bad, "{left} was left outside");
    // Mended, it goes the way of the others.
    client.execute("UPDATE awa.deferred_jobs SET lane = $1, look_at = now()", &[&lane])?;
    ensure!(step(&mut client, "promote_deferred()")?.0 == "promoted", "it does not come back");
    let waiting: i64 = client.query_one("SELECT sum(scheduled)::bigint FROM awa.queue_counts()", &[])?.try_get(0)?;
    ensure!(waiting == 3, "{waiting} jobs wait");
    Ok(())
}
