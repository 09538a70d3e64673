//! What it does, and what it costs when there is nothing to do.

use anyhow::{Result, ensure};

use super::super::{claim, complete, drain, enqueue};
use super::*;

// If this fails, history grows for ever on a server that nobody looks after.
pub fn segments_are_rotated_and_pruned_with_no_call_by_hand(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.rotate_age", "1s"), ("awa.prune_grace", "0")])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let mut pruned = 0_i64;
    let done = wait_until(PATIENCE, || {
        let worked = enqueue(&mut client, 20).and_then(|_| drain(&mut client));
        let row = client.query_one("SELECT count(*) FROM awa.ring_rotations WHERE event = 'pruned'", &[]);
        pruned = row.and_then(|row| row.try_get(0)).unwrap_or(pruned);
        worked.is_err() || pruned >= 3
    });
    ensure!(done && pruned >= 3, "{pruned} segments were pruned");
    stage.verify_clean()?;
    end(stage)
}

// If this fails, a job whose worker is stuck waits for somebody to call a function.
pub fn a_stuck_job_is_given_back_with_no_call_by_hand(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    client.batch_execute("SELECT awa.alter_queue('q', backoff => '0')")?;
    let jobs = enqueue(&mut client, 2)?;
    let stuck = client.query_one("SELECT job_id, run_lease FROM awa.claim('q', 1, deadline => '50 ms')", &[])?;
    let silent = client.query_one("SELECT job_id, run_lease FROM awa.claim('q', 1, heartbeat_timeout => '50 ms')", &[])?;
    let mut again = Vec::new();
    let both = wait_until(PATIENCE, || {
        again.extend(claim(&mut client, 10).unwrap_or_default());
        again.len() >= 2
    });
    ensure!(both && again.len() == 2, "of {jobs:?} came back {again:?}");
    for row in [stuck, silent] {
        let (job_id, run_lease): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let late = client.query("SELECT awa.complete($1, $2)", &[&job_id, &run_lease]);
        ensure!(late.is_err(), "a rescued attempt of {job_id} was completed");
    }
    for attempt in again {
        complete(&mut client, attempt)?;
    }
    end(stage)
}

// If this fails, an idle server burns transaction ids, writes WAL, or holds back VACUUM.
pub fn an_idle_tick_costs_no_transaction_id_and_no_wal(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("autovacuum", "off"), ("wal_level", "replica")])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    // Some history, and a job that runs: not only an empty ring.
    enqueue(&mut client, 10)?;
    let running = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    wait_for_steps(&mut client, "prune", 3)?;
    let mut look = || -> Result<(String, String)> {
        let row = client.query_one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text, pg_current_wal_insert_lsn()::text", &[])?;
        let seen = (row.try_get(0)?, row.try_get(1)?);
        wait_for_steps(&mut client, "prune", 4)?;
        Ok(seen)
    };
    let mut seen = vec![look()?];
    // The server itself writes a little now and then; a tick that writes would leave no quiet window.
    for _ in 0..20 {
        seen.push(look()?);
        if seen.windows(2).any(|pair| pair[0].1 == pair[1].1) {
            break;
        }
    }
    ensure!(seen.iter().all(|(xid, _)| *xid == seen[0].0), "transaction ids were used: {seen:?}");
    ensure!(seen.windows(2).any(|pair| pair[0].1 == pair[1].1), "WAL was written all the time: {seen:?}");
    let held: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid) WHERE a.backend_type LIKE 'awa%' AND a.state = 'idle'",
            &[],
        )?
        .try_get(0)?;
    ensure!(held == 0, "it holds {held} locks while it sleeps");
    complete(&mut client, running)?;
    end(stage)
}

// If this fails, a change of the settings needs a restart.
pub fn a_reload_changes_its_interval_and_switches_it_off_and_on(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.maintenance_interval", "1h")])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    wait_for_finding(&mut client, "task", "ok", "")?;
    let all_ran = "SELECT bool_and(runs >= 1) FROM awa.stat_maintenance";
    let ran = wait_until(PATIENCE, || client.query_one(all_ran, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
    ensure!(ran, "not every task has run at first");
    let woken: bool = client.query_one("SELECT awa.wake_maintenance()", &[])?.try_get(0)?;
    ensure!(woken, "nobody was woken");
    wait_until(PATIENCE, || steps_of(&mut client, "rotate").is_ok_and(|steps| steps >= 2));
    let before = steps_of(&mut client, "rotate")?;
    ensure!(before >= 2, "a wake changed nothing");
    set(stage, &mut client, "awa.maintenance_interval", "10ms")?;
    wait_for_steps(&mut client, "rotate", 5)?;
    set(stage, &mut client, "awa.maintenance", "off")?;
    wait_for_finding(&mut client, "maintainer", "warning", "awa.maintenance is off")?;
    let asleep = steps_of(&mut client, "rotate")?;
    client.batch_execute("SELECT awa.wake_maintenance()")?;
    wait_for_finding(&mut client, "maintainer", "warning", "awa.maintenance is off")?;
    ensure!(steps_of(&mut client, "rotate")? == asleep, "it works while it is switched off");
    set(stage, &mut client, "awa.maintenance", "on")?;
    wait_until_it_works(&mut client)?;
    wait_for_steps(&mut client, "rotate", 2)?;
    end(stage)
}

// If this fails, one broken task stops rescue, or fills the log.
pub fn a_failing_task_does_not_stop_the_others(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    set(stage, &mut client, "awa.maintenance", "off")?;
    wait_for_finding(&mut client, "maintainer", "warning", "off")?;
    enqueue(&mut client, 5)?;
    drain(&mut client)?;
    client.batch_execute("SELECT awa.rotate()")?;
    let log_start = stage.cluster.log_size();
    client.batch_execute("ALTER TABLE awa_segments.done_entries_0 RENAME TO hidden")?;
    set(stage, &mut client, "awa.maintenance", "on")?;
    wait_for_finding(&mut client, "task", "error", "prune")?;
    let failing = wait_until(PATIENCE, || {
        let row = client.query_one("SELECT errors >= 3 AND state = 'failing' FROM awa.stat_maintenance WHERE task = 'prune'", &[]);
        row.is_ok_and(|row| row.try_get(0).unwrap_or(false))
    });
    ensure!(failing, "prune is not shown as failing");
    wait_for_steps(&mut client, "rescue_expired_deadlines", 5)?;
    wait_for_steps(&mut client, "rotate", 5)?;
    client.batch_execute("ALTER TABLE awa_segments.hidden RENAME TO done_entries_0; SELECT awa.wake_maintenance()")?;
    wait_for_finding(&mut client, "task", "ok", "")?;
    let log = stage.cluster.log_since(log_start)?;
    let told = |words: &str| log.lines().filter(|line| line.contains("\"prune\"") && line.contains(words)).count();
    ensure!((told("failed"), told("works again")) == (1, 1), "the log tells of it {} and {} times", told("failed"), told("works again"));
    end(stage)
}

// If this fails, a task that meets a lock is called broken, or rescue waits for whoever holds it.
pub fn a_lock_in_the_way_is_no_failure(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.rotate_age", "1s")])?;
    let (mut client, mut holder) = (stage.connect()?, stage.connect()?);
    wait_until_it_works(&mut client)?;
    // Rotation is due in a second, and needs the ledger.
    enqueue(&mut client, 1)?;
    let mut transaction = holder.transaction()?;
    transaction.batch_execute("LOCK TABLE awa.ring_rotations IN ACCESS EXCLUSIVE MODE")?;
    let blocked = wait_until(PATIENCE, || {
        let text = "SELECT bool_or(last_outcome IN ('blocked', 'skipped_busy')), sum(errors) = 0 FROM awa.maintenance_stats()";
        client.query_one(text, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false) && row.try_get(1).unwrap_or(false))
    });
    transaction.rollback()?;
    ensure!(blocked, "no task says that it is blocked, or one failed");
    wait_until_it_works(&mut client)?;
    drain(&mut client)?;
    end(stage)
}
