//! E4 and the remarks beside the table: what is left of a finished job, how long it is shown, and what is shown of a running one.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::hostile_pool::Configured;
use super::super::{Stage, claim, complete, drain, enqueue, ids};
use super::*;
use crate::points;
use crate::process::wait_until;

// If this fails, something of every job stays for ever. (Keys of unique jobs were it there; there are none here yet.)
pub fn e04_nothing_of_a_pruned_job_is_left(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute(
        "SELECT awa.alter_queue('q', completed_retention => '0', failed_retention => '0', cancelled_retention => '0');
         SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true)",
    )?;
    let jobs = enqueue(&mut client, 50)?;
    client.execute("SELECT awa.cancel($1)", &[&jobs[49]])?;
    let attempts = claim(&mut client, 4)?;
    for (call, attempt) in ["cancel($job)", "fail($job, $lease, final => true)", "fail($job, $lease, retry_after => '0')", "snooze($job, $lease, '0')"]
        .into_iter()
        .zip(&attempts)
    {
        answer(&mut client, call, *attempt)?;
    }
    for sql in ["SELECT awa.enqueue('letters', 'k')", "SELECT awa.fail(job_id, run_lease) FROM awa.claim('letters')", "SELECT awa.dlq_purge('letters')"] {
        client.batch_execute(sql)?;
    }
    client.batch_execute("SELECT awa.enqueue('q', 'k', run_at => now() + interval '1 week')")?;
    rotate(&mut client)?;
    ensure!(step(&mut client, "carry_forward(1)")?.0 == "carried", "nothing was carried");
    client.batch_execute("SELECT awa.cancel(job_id) FROM awa.jobs WHERE state = 'scheduled' AND run_at > now() + interval '1 day'")?;
    drain(&mut client)?;
    rotate(&mut client)?;
    let said = prune_all(&mut client)?;
    ensure!(live_segments(&mut client)? == 1, "a segment stays: {said:?}");
    stage.verify_clean()?;
    let tables = client.query(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('awa', 'awa_segments') \
            AND tablename NOT IN ('queue_definitions', 'job_kinds', 'ring_rotations', 'instance')",
        &[],
    )?;
    ensure!(tables.len() > 8, "only {} tables were looked at", tables.len());
    for row in tables {
        let table: String = row.try_get(0)?;
        let rows: i64 = client.query_one(&format!("SELECT count(*) FROM {table}"), &[])?.try_get(0)?;
        ensure!(rows == 0, "{table} has {rows} rows of jobs that are gone");
    }
    let row = client.query_one("SELECT sum(available + scheduled + running + completed + failed + cancelled + dead_lettered)::bigint FROM awa.queue_counts()", &[])?;
    ensure!(row.try_get::<_, i64>(0)? == 0, "jobs that are gone are counted");
    Ok(())
}

// If this fails, finished jobs are shown for one turn of the ring, whatever was promised.
pub fn also_completed_jobs_are_shown_as_long_as_promised(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.alter_queue('q', completed_retention => '1 hour')")?;
    let jobs = enqueue(&mut client, 5)?;
    drain(&mut client)?;
    for _ in 0..20 {
        rotate(&mut client)?;
        prune_all(&mut client)?;
        client.batch_execute("SELECT awa.retention()")?;
    }
    ensure!(live_segments(&mut client)? == 1, "the ring did not turn");
    let shown: Vec<i64> = client.query("SELECT job_id FROM awa.terminal_jobs ORDER BY 1", &[])?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(shown == jobs, "completed {jobs:?}, shown {shown:?}");
    Ok(())
}

// If this fails, an operator does not see what is running.
pub fn also_running_jobs_are_among_the_jobs(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 3)?;
    let attempts = claim(&mut client, 2)?;
    let look = |client: &mut Client| -> Result<Vec<i64>> {
        let rows = client.query("SELECT job_id FROM awa.jobs WHERE state = 'running' AND claimed_at IS NOT NULL AND attempt = 1 ORDER BY 1", &[])?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    };
    ensure!(look(&mut client)? == ids(&attempts), "running {:?}, shown {:?}", ids(&attempts), look(&mut client)?);
    rotate(&mut client)?;
    ensure!(step(&mut client, "carry_forward(1)")?.0 == "carried", "nothing was carried");
    ensure!(look(&mut client)? == ids(&attempts), "after a carry {:?}", look(&mut client)?);
    client.batch_execute("SELECT awa.rebuild()")?;
    ensure!(look(&mut client)? == ids(&attempts), "after a rebuild {:?}", look(&mut client)?);
    for attempt in attempts {
        complete(&mut client, attempt)?;
    }
    Ok(())
}

// If this fails, a retry or a job that waited outside the ring comes back to another place than its own.
pub fn also_a_job_that_comes_back_keeps_its_place(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let facts = |client: &mut Client| -> Result<Vec<String>> {
        let rows = client.query("SELECT format('%s %s %s %s %s', job_id, queue, kind, priority, enqueued_at) FROM awa.jobs ORDER BY job_id", &[])?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    };
    client.batch_execute("SELECT awa.enqueue('q', 'k', to_jsonb(n), priority => n % 4 + 1, run_at => now() + n * interval '2 hours') FROM generate_series(1, 8) AS n")?;
    let before = facts(&mut client)?;
    rotate(&mut client)?;
    ensure!(step(&mut client, "carry_forward(1)")?.0 == "carried", "nothing was carried");
    client.batch_execute("UPDATE awa.deferred_jobs SET look_at = now()")?;
    client.batch_execute("SELECT awa.promote_deferred()")?;
    ensure!(facts(&mut client)? == before, "promoted jobs have changed");
    // Of one priority, in the order of their times: the same as before.
    let order = "SELECT bool_and(ordered) FROM (SELECT job_id > lag(job_id, 1, 0::bigint) OVER (PARTITION BY priority ORDER BY run_at) AS ordered FROM awa.jobs) AS t";
    ensure!(client.query_one(order, &[])?.try_get::<_, bool>(0)?, "the order of the promoted jobs has changed");
    client.batch_execute("SELECT awa.cancel(job_id) FROM awa.jobs")?;
    // Retried at once, a job stands where its time puts it: behind what was there, before what comes.
    let first = enqueue(&mut client, 2)?;
    let attempt = claim(&mut client, 1)?;
    answer(&mut client, "fail($job, $lease, retry_after => '0')", attempt[0])?;
    let later = enqueue(&mut client, 2)?;
    let wanted = vec![first[1], first[0], later[0], later[1]];
    let drained = drain(&mut client)?;
    ensure!(drained == wanted, "drained {drained:?}, not {wanted:?}");
    Ok(())
}

// If this fails, a stuck job waits until a long task of another kind is through.
pub fn also_a_long_task_does_not_delay_rescue(stage: &mut Stage<'_>) -> Result<()> {
    let full = [("awa.maintenance_interval", "10ms"), ("awa.ring_segments", "2"), ("awa.ring_segments_max", "2"), ("awa.carry_jobs", "100000")];
    let _configured = Configured::restart_with(stage, &full)?;
    let mut client = stage.connect()?;
    points::create(&mut client)?;
    client.batch_execute("SELECT awa.pause_queue('q'); SELECT awa.create_queue('stuck')")?;
    enqueue(&mut client, 5_000)?;
    rotate(&mut client)?;
    // The maintainer stands still at the end of its second step of many.
    client.batch_execute("SELECT awa_points.arm('carry.closed', 'wait', 1)")?;
    stage.cluster.configure("awa.maintenance", "on")?;
    client.batch_execute("SELECT pg_reload_conf()")?;
    points::wait_reached(&mut client, "carry.closed")?;
    client.batch_execute("SELECT awa.enqueue('stuck', 'k')")?;
    let job: i64 = client.query_one("SELECT job_id FROM awa.claim('stuck', deadline => '1 microsecond')", &[])?.try_get(0)?;
    // Rescue has been due for more than a tick.
    client.batch_execute("SELECT pg_sleep(0.05)")?;
    // Whoever stands there goes on, and stands still again two steps later: rescue had its turn before that.
    client.batch_execute("SELECT awa_points.arm('carry.closed', 'wait', 1)")?;
    points::wait_reached(&mut client, "carry.closed")?;
    let state = state_of(&mut client, job)?;
    points::disarm_all(&mut client)?;
    ensure!(state == "scheduled", "the stuck job is {state} while another task goes on");
    let carried = wait_until(Duration::from_secs(30), || {
        let sql = "SELECT COALESCE(sum(rows), 0)::bigint FROM awa.stat_maintenance WHERE task = 'carry_forward'";
        client.query_one(sql, &[]).is_ok_and(|row| row.try_get::<_, i64>(0).unwrap_or(0) >= 5_000)
    });
    ensure!(carried, "the other task does not come to its end");
    Ok(())
}
