//! What happens to it: signals, crashes, a failover, too few workers, another version, a copied database.

use anyhow::{Result, ensure};

use super::super::{Stage, drain, enqueue};
use super::*;
use crate::process::children_of;

pub fn terminate(client: &mut Client, pid: i32) -> Result<()> {
    let was_there: bool = client.query_one("SELECT pg_terminate_backend($1)", &[&pid])?.try_get(0)?;
    ensure!(was_there, "process {pid} was not there");
    Ok(())
}

pub fn launcher(client: &mut Client) -> Result<Option<i32>> {
    let row = client.query_opt("SELECT pid FROM pg_stat_activity WHERE backend_type = 'awa_queue launcher'", &[])?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

// If this fails, a worker that is ended once is never seen again, or takes the server along.
pub fn a_terminated_worker_comes_back(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let first = wait_for_maintainer(&mut client, DATABASE)?;
    client.query_one("SELECT pg_cancel_backend($1)", &[&first])?;
    wait_for_steps(&mut client, "rotate", 3)?;
    ensure!(pid_of(&mut client, DATABASE)? == Some(first), "a cancel has ended it");
    terminate(&mut client, first)?;
    let second = wait_for_pid(&mut client, DATABASE, |pid| pid.is_some_and(|pid| pid != first), "it was terminated")?;
    wait_until_it_works(&mut client)?;
    // The launcher: the maintainer goes on, and the next launcher takes it over.
    let old = launcher(&mut client)?.context("no launcher")?;
    terminate(&mut client, old)?;
    wait_until(PATIENCE, || launcher(&mut client).is_ok_and(|pid| pid.is_some_and(|pid| pid != old)));
    ensure!(launcher(&mut client)?.is_some_and(|pid| pid != old), "the launcher does not come back");
    ensure!(pid_of(&mut client, DATABASE)? == second, "the maintainer did not outlive the launcher");
    let second = second.context("no maintainer")?;
    terminate(&mut client, second)?;
    wait_for_pid(&mut client, DATABASE, |pid| pid.is_some_and(|pid| pid != second), "the launcher took it over")?;
    wait_until_it_works(&mut client)?;
    wait_for_finding(&mut client, "launcher", "ok", "Process")?;
    end(stage)
}

// If this fails, a reload that comes in the first moments of a maintainer is lost: it works although maintenance was switched off.
pub fn a_reload_while_it_starts_is_not_lost(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let first = wait_for_maintainer(&mut client, DATABASE)?;
    // The server itself lets a new process sleep for so long, before it may hear a signal.
    set(stage, &mut client, "post_auth_delay", "2")?;
    terminate(&mut client, first)?;
    let postmaster = stage.cluster.postmaster_pid().context("the server does not run")?;
    let is_maintainer = |pid: &i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        *pid != first && line.contains("awa_queue maintainer of")
    };
    ensure!(wait_until(PATIENCE, || children_of(postmaster).iter().any(is_maintainer)), "it does not come back");
    set(stage, &mut client, "awa.maintenance", "off")?;
    wait_for_finding(&mut client, "maintainer", "warning", "awa.maintenance is off")?;
    set(stage, &mut client, "post_auth_delay", "0")?;
    end(stage)
}

// If this fails, a crash of a worker, which restarts the server, leaves the queue without maintenance.
pub fn after_a_crash_it_comes_back(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let jobs = enqueue(&mut client, 10)?;
    let pid = wait_for_maintainer(&mut client, DATABASE)?;
    stage.cluster.kill_backend(pid)?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    ensure!(drain(&mut client)? == jobs, "the jobs are not what they were");
    drop(client);
    stage.cluster.crash()?;
    stage.cluster.start()?;
    wait_until_it_works(&mut stage.connect()?)?;
    end(stage)
}

// If this fails, nobody rescues jobs after a failover, or a standby is written to.
pub fn a_standby_gets_one_when_it_is_promoted(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    wait_until_it_works(&mut stage.connect()?)?;
    let standby = stage.cluster.standby("awa-maintained")?;
    let promoted = (|| -> Result<()> {
        let mut client = standby.connect(DATABASE)?;
        ensure!(launcher(&mut client)?.is_none(), "a launcher runs on a standby");
        wait_for_finding(&mut client, "maintainer", "ok", "promoted")?;
        wait_for_finding(&mut client, "recovery", "ok", "standby")?;
        client.batch_execute("SELECT pg_promote()")?;
        wait_until_it_works(&mut client)
    })();
    if promoted.is_ok() {
        standby.remove()?;
    }
    promoted?;
    end(stage)
}

// If this fails, a server without room for another worker says nothing, or never tries again.
pub fn without_a_place_for_a_worker_it_says_so_and_comes_later(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("max_worker_processes", "2"), ("max_logical_replication_workers", "0")])?;
    wait_until_it_works(&mut stage.connect()?)?;
    let log_start = stage.cluster.log_size();
    let [one, ..] = OTHERS;
    stage.cluster.create_database(one)?;
    let mut client = stage.cluster.connect(one)?;
    wait_for_finding(&mut client, "worker_slots", "error", "no place")?;
    wait_for_finding(&mut client, "maintainer", "error", "")?;
    wait_for_finding(&mut stage.connect()?, "maintainer", "ok", "works")?;
    wait_for_finding(&mut stage.connect()?, "worker_slots", "warning", "another")?;
    stage.connect()?.batch_execute("DROP EXTENSION awa_queue CASCADE")?;
    wait_for_finding(&mut client, "maintainer", "ok", "no queue")?;
    wait_for_finding(&mut client, "worker_slots", "ok", "")?;
    let log = stage.cluster.log_since(log_start)?;
    let told = log.lines().filter(|line| line.contains("out of background worker slots")).count();
    ensure!(told == 1, "the log tells of it {told} times");
    ensure!(log.contains("max_worker_processes"), "the log has no hint");
    drop(client);
    stage.damaged = true;
    end(stage)
}

// If this fails, a maintainer works on tables that it does not know.
pub fn another_version_is_refused_loudly(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let log_start = stage.cluster.log_size();
    let set_version = "UPDATE pg_extension SET extversion = $1 WHERE extname = 'awa_queue'";
    let mine: String = client.query_one("SELECT awa.version()", &[])?.try_get(0)?;
    client.execute(set_version, &[&"9.9"])?;
    wait_for_finding(&mut client, "maintainer", "warning", "version 9.9 of the extension")?;
    wait_for_finding(&mut client, "version", "error", "9.9")?;
    let steps = steps_of(&mut client, "rotate")?;
    client.batch_execute("SELECT awa.wake_maintenance()")?;
    wait_for_finding(&mut client, "maintainer", "warning", "version 9.9 of the extension")?;
    ensure!(steps_of(&mut client, "rotate")? == steps, "it works all the same");
    client.execute(set_version, &[&mine])?;
    wait_until_it_works(&mut client)?;
    let log = stage.cluster.log_since(log_start)?;
    let told = log.lines().filter(|line| line.contains("WARNING") && line.contains("does not work")).count();
    ensure!(told == 1 && log.contains("ALTER EXTENSION"), "the log tells of it {told} times");
    end(stage)
}

// If this fails, a copied database sends production's e-mails, or is never maintained after it was adopted.
pub fn a_copy_is_left_alone_until_it_is_adopted(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let [one, ..] = OTHERS;
    wait_until_it_works(&mut stage.connect()?)?;
    let jobs = enqueue(&mut stage.connect()?, 3)?;
    stage.cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {one} TEMPLATE {DATABASE}"))?;
    let mut copy = stage.cluster.connect(one)?;
    wait_for_finding(&mut copy, "maintainer", "warning", "another server or database")?;
    wait_for_finding(&mut copy, "instance", "error", "another server or database")?;
    copy.batch_execute("SELECT awa.adopt()")?;
    wait_until_it_works(&mut copy)?;
    ensure!(drain(&mut copy)? == jobs, "the copy has other jobs");
    drop(copy);
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    ensure!(drain(&mut client)? == jobs, "the original has lost its jobs to the copy");
    end(stage)
}

// If this fails, settings of a database break its maintenance.
pub fn settings_of_the_database_do_not_touch_it(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.rotate_age", "1s")])?;
    let mut client = stage.connect()?;
    let row = client.query_one("SELECT current_setting('server_version_num')::int >= 170000", &[])?;
    // A limit that has no name yet is no setting; the first one again does no harm.
    let transaction_timeout = if row.try_get(0)? { "transaction_timeout = '1ms'" } else { "statement_timeout = '1ms'" };
    for setting in [
        transaction_timeout,
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '1ms'",
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "statement_timeout = '1ms'",
        "search_path = 'nowhere'",
        "lock_timeout = '1ms'",
    ] {
        client.batch_execute(&format!("ALTER DATABASE {DATABASE} SET {setting}"))?;
    }
    let pid = wait_for_maintainer(&mut client, DATABASE)?;
    terminate(&mut client, pid)?;
    wait_for_pid(&mut client, DATABASE, |seen| seen.is_some_and(|seen| seen != pid), "it was terminated")?;
    enqueue(&mut client, 3)?;
    let rotated = wait_until(PATIENCE, || {
        let text = "SELECT rows >= 0 AND errors = 0 AND EXISTS (SELECT FROM awa.ring_rotations WHERE generation = 2) \
                      FROM awa.stat_maintenance WHERE task = 'rotate'";
        client.query_one(text, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false))
    });
    ensure!(rotated, "nothing was rotated");
    drain(&mut client)?;
    client.batch_execute(&format!("ALTER DATABASE {DATABASE} RESET ALL"))?;
    drop(client);
    end(stage)
}
