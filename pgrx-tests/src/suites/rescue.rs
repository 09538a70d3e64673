//! Rescue with many attempts, with a damaged row, and over a restart.

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::{Stage, claim, enqueue, ids};
use crate::cluster::Shutdown;

fn step(client: &mut Client, task: &str) -> Result<(String, i64, Option<String>)> {
    let row = client.query_one("SELECT outcome, rows, detail FROM awa.run_maintenance($1)", &[&task]).context("run_maintenance")?;
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

fn running(client: &mut Client, queue: &str) -> Result<i64> {
    Ok(client.query_one("SELECT running FROM awa.queue_counts($1)", &[&queue])?.try_get(0)?)
}

// If this fails, the stuck jobs of one queue wait behind those of another, or one pass takes for ever.
pub fn a_pass_is_bounded_and_fair(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute(
        "SELECT awa.create_queue('small'); SELECT awa.create_queue('well');
         SELECT awa.enqueue('q', 'k') FROM generate_series(1, 3000);
         SELECT awa.enqueue('small', 'k') FROM generate_series(1, 40);
         SELECT awa.enqueue('well', 'k') FROM generate_series(1, 500)",
    )?;
    // The healthy ones run longest, without a deadline or far from it.
    client.batch_execute(
        "SELECT count(*) FROM awa.claim('well', 250); SELECT count(*) FROM awa.claim('well', 250, deadline => '1 hour');
         SELECT count(*) FROM awa.claim('q', 3000, deadline => '1 microsecond', heartbeat_timeout => '1 hour');
         SELECT count(*) FROM awa.claim('small', 40, deadline => '1 microsecond', heartbeat_timeout => '1 hour')",
    )?;
    let (outcome, rows, detail) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 500 && detail.is_none(), "the first pass: {outcome} {rows} {detail:?}");
    ensure!(running(&mut client, "small")? == 0, "the small queue has to wait");
    ensure!(running(&mut client, "q")? == 2540, "{} run in the large queue", running(&mut client, "q")?);
    stage.verify_clean()?;
    let mut rescued = rows;
    for _ in 0..10 {
        let (outcome, rows, _) = step(&mut client, "rescue_expired_deadlines")?;
        rescued += rows;
        if outcome == "nothing" {
            break;
        }
    }
    ensure!(rescued == 3040, "{rescued} were rescued");
    ensure!(running(&mut client, "well")? == 500, "a healthy attempt was ended");
    let (outcome, ..) = step(&mut client, "rescue_stale_heartbeats")?;
    ensure!(outcome == "nothing", "heartbeats: {outcome}");
    let counted: i64 = client.query_one("SELECT sum(rescued)::bigint FROM awa.stat_queue", &[])?.try_get(0)?;
    ensure!(counted == 3040, "stat_queue has {counted}");
    Ok(())
}

// If this fails, one damaged job keeps every stuck job of the database where it is (E10).
pub fn a_job_that_cannot_be_rescued_stops_no_other(stage: &mut Stage<'_>) -> Result<()> {
    stage.damaged = true;
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 100)?;
    client.batch_execute("SELECT count(*) FROM awa.claim('q', 100, deadline => '1 microsecond')")?;
    let bad = jobs[41];
    let table: String = client.query_one("SELECT ready_entries FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
    client.execute(&format!("DELETE FROM {table} WHERE job_id = $1"), &[&bad])?;
    let (outcome, rows, detail) = step(&mut client, "rescue_expired_deadlines")?;
    let detail = detail.unwrap_or_default();
    ensure!(outcome == "rescued" && rows == 99, "{outcome} {rows} {detail}");
    ensure!(detail.contains(&format!("job {bad}:")), "the detail does not name job {bad}: {detail}");
    ensure!(running(&mut client, "q")? == 1, "{} run", running(&mut client, "q")?);
    // It is left alone for a while, and does not cost the next ones anything.
    let more = enqueue(&mut client, 5)?;
    let (outcome, ..) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "nothing", "it was not set aside: {outcome}");
    let attempts = claim(&mut client, 5)?;
    ensure!(ids(&attempts) == more, "claimed {attempts:?}");
    // Another session tries it again, and also goes on.
    client.execute("SELECT awa.extend($1, $2, '0')", &[&attempts[0].job_id, &attempts[0].run_lease])?;
    let (outcome, rows, detail) = step(&mut stage.connect()?, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 1 && detail.is_some(), "the other session: {outcome} {rows} {detail:?}");
    Ok(())
}

// If this fails, a live worker loses its attempt because the server was restarted, or a dead one keeps it for ever.
pub fn after_a_crash_every_attempt_has_a_grace(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 3)?;
    let lease = |client: &mut Client, terms: &str| -> Result<(i64, i64)> {
        let row = client.query_one(&format!("SELECT job_id, run_lease FROM awa.claim('q', {terms})"), &[])?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    };
    let beating = lease(&mut client, "deadline => '1 microsecond', heartbeat_timeout => '1 hour'")?;
    let extended = lease(&mut client, "deadline => '20 minutes'")?;
    let dead = lease(&mut client, "deadline => '1 microsecond'")?;
    for (job, lease) in [beating, extended] {
        client.execute("SELECT awa.extend($1, $2, '2 hours')", &[&job, &lease])?;
    }
    client.batch_execute("CHECKPOINT")?;
    drop(client);
    stage.cluster.restart(Shutdown::Immediate)?;
    let mut client = stage.connect()?;
    let left = |client: &mut Client, job: i64| -> Result<f64> {
        let sql = "SELECT extract(epoch FROM deadline_at - clock_timestamp())::float8 FROM awa.job($1)";
        Ok(client.query_one(sql, &[&job])?.try_get(0)?)
    };
    for (job, seconds) in [(beating.0, 3600.0), (extended.0, 1200.0)] {
        let left = left(&mut client, job)?;
        ensure!(left > seconds - 120.0 && left <= seconds, "job {job} has {left} s left");
    }
    let (outcome, rows, detail) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 1, "{outcome} {rows} {detail:?}");
    let stale = client.query_one("SELECT awa.complete($1, $2)", &[&dead.0, &dead.1]);
    ensure!(stale.is_err_and(|error| error.code().is_some_and(|code| code.code() == "55000")), "a late completion was accepted");
    for (job, lease) in [beating, extended] {
        let answer: String = client.query_one("SELECT awa.complete($1, $2)", &[&job, &lease])?.try_get(0)?;
        ensure!(answer == "completed", "job {job}: {answer}");
    }
    Ok(())
}

// If this fails, a lock on the table of dead letters keeps every stuck job where it is.
pub fn a_locked_table_of_dead_letters_stops_only_its_jobs(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute(
        "SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true);
         SELECT awa.enqueue('letters', 'k') FROM generate_series(1, 20);
         SELECT awa.enqueue('q', 'k') FROM generate_series(1, 20)",
    )?;
    client.batch_execute("SELECT count(*) FROM awa.claim(ARRAY['letters', 'q'], 40, deadline => '1 microsecond')")?;
    let mut other = stage.connect()?;
    other.batch_execute("BEGIN; LOCK TABLE awa.dlq_entries IN SHARE MODE")?;
    client.batch_execute("SET lock_timeout = '10s'")?;
    let (outcome, rows, detail) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 20, "{outcome} {rows}");
    ensure!(detail.is_some_and(|detail| detail.starts_with("20 ")), "the others are not mentioned");
    ensure!(running(&mut client, "letters")? == 20 && running(&mut client, "q")? == 0, "the wrong ones were ended");
    let (outcome, ..) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "skipped_busy", "{outcome}");
    other.batch_execute("ROLLBACK")?;
    let (outcome, rows, _) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 20, "after the lock: {outcome} {rows}");
    let letters: i64 = client.query_one("SELECT count(*) FROM awa.dlq WHERE queue = 'letters'", &[])?.try_get(0)?;
    ensure!(letters == 20, "{letters} dead letters");
    Ok(())
}

// If this fails, operators read that a job was to run in the year -infinity.
pub fn a_carried_attempt_that_dies_shows_a_time(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute(
        "SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true);
         SELECT awa.enqueue('letters', 'k'), awa.enqueue('q', 'k', max_attempts => 1)",
    )?;
    client.batch_execute("SELECT count(*) FROM awa.claim(ARRAY['letters', 'q'], 2, deadline => '1 microsecond')")?;
    let open: i64 = client.query_one("SELECT generation FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
    client.batch_execute("SELECT awa.rotate()")?;
    client.execute("SELECT awa.carry_forward($1)", &[&open])?;
    let (outcome, rows, _) = step(&mut client, "rescue_expired_deadlines")?;
    ensure!(outcome == "rescued" && rows == 2, "{outcome} {rows}");
    client.batch_execute("SELECT awa.rotate(); SET awa.prune_grace = 0")?;
    for _ in 0..4 {
        client.batch_execute("SELECT awa.prune()")?;
    }
    let sql = "SELECT count(*), bool_and(isfinite(run_at) AND run_at = enqueued_at) FROM
                   (SELECT run_at, enqueued_at FROM awa.dlq UNION ALL SELECT run_at, enqueued_at FROM awa.terminal_jobs) AS t";
    let row = client.query_one(sql, &[])?;
    let (count, good): (i64, Option<bool>) = (row.try_get(0)?, row.try_get(1)?);
    ensure!(count == 2 && good == Some(true), "{count} jobs, with times that are good: {good:?}");
    Ok(())
}
