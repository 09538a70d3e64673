//! What takes over from a server that is gone: a standby, or a backup with its archive. Clients work until the last moment, and then go on
//! with the server that took over, as docs/operations.md tells them to.
//!
//! `AWA_CRASH_ROUNDS` makes it longer: one round more for each ten.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::every_state::{self, Scene, counts, jobs_picture, verify_clean};
use super::hostile_pool::Configured;
use super::hostile_setup::{OTHERS, READS, WRITES, all_refused};
use super::stress_mixed::{HASTY, number};
use super::witnesses::{Account, Witnesses, indexes_are_sound, maintenance_rests, under_load};
use super::{DATABASE, Stage};
use crate::cluster::{Cluster, Shutdown};
use crate::process::{Signal, signal, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

fn rounds() -> u64 {
    number("AWA_CRASH_ROUNDS", 0) / 10 + 1
}

fn until(what: &str, client: &mut Client, sql: &str) -> Result<()> {
    let holds = wait_until(LIMIT, || client.query_one(sql, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
    ensure!(holds, "not within {LIMIT:?}: {what}");
    Ok(())
}

/// The receiver of a standby, stopped in its tracks: what the primary writes from now on does not arrive.
struct Deaf(i32);

impl Deaf {
    fn make(standby: &mut Client) -> Result<Self> {
        let pid = standby.query_opt("SELECT pid FROM pg_stat_wal_receiver", &[])?.context("the standby receives nothing")?.try_get(0)?;
        signal(pid, Signal::Stop)?;
        Ok(Self(pid))
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        if let Err(error) = signal(self.0, Signal::Continue) {
            eprintln!("note: {error:#}");
        }
    }
}

fn promote(client: &mut Client) -> Result<()> {
    client.batch_execute("SELECT pg_promote()")?;
    until("promotion", client, "SELECT NOT pg_is_in_recovery()")
}

fn set(stage: &Stage<'_>, settings: &[(&str, &str)]) -> Result<()> {
    let mut client = stage.connect()?;
    for (name, value) in settings {
        client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
    }
    Ok(client.batch_execute("SELECT pg_reload_conf()")?)
}

/// The primary of a case is as it was, whatever became of it.
fn put_back(stage: &mut Stage<'_>, settings: &[(&str, &str)]) -> Result<()> {
    if !stage.cluster.is_running() {
        stage.cluster.start()?;
    }
    let mut client = stage.connect()?;
    for (name, _) in settings {
        client.batch_execute(&format!("ALTER SYSTEM RESET {name}"))?;
    }
    Ok(client.batch_execute("SELECT pg_reload_conf()")?)
}

fn check(what: &str, client: &mut Client, witnesses: &Witnesses, mark: &[usize]) -> Result<Account> {
    verify_clean(client)?;
    let account = witnesses.account(client, mark)?;
    let before = counts(client)?;
    indexes_are_sound(client)?;
    witnesses.finish(client, &account)?;
    verify_clean(client)?;
    println!("        {what}: {} kept, {} lost; {before}; afterwards {}", account.kept, account.lost, counts(client)?);
    Ok(account)
}

fn check_scene(client: &mut Client, other: &mut Client, scene: &Scene, original: &[String]) -> Result<()> {
    every_state::same(original, &jobs_picture(client)?)?;
    every_state::goes_on(client, other, scene, original)
}

// If this fails, a commit that was acknowledged is lost although a synchronous standby took over.
pub fn a_synchronous_standby_has_every_acknowledged_commit(stage: &mut Stage<'_>) -> Result<()> {
    const SETTINGS: [(&str, &str); 1] = [("synchronous_standby_names", "*")];
    let scene = every_state::set_up(stage)?;
    let original = jobs_picture(&mut stage.connect()?)?;
    for round in 0..rounds() {
        // Made before the setting: the one that takes over waits for nobody.
        let standby = stage.cluster.standby("awa-synchronous")?;
        set(stage, &SETTINGS)?;
        let result = synchronous(stage, &standby, &scene, &original, &format!("flow-{round}"));
        if result.is_ok() {
            standby.remove()?;
        }
        put_back(stage, &SETTINGS)?;
        result.with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn synchronous(stage: &mut Stage<'_>, standby: &Cluster, scene: &Scene, original: &[String], queue: &str) -> Result<()> {
    let (mut client, mut other) = (standby.connect(DATABASE)?, standby.connect("postgres")?);
    let mut primary = stage.connect()?;
    until("a synchronous standby", &mut primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")?;
    let config = stage.config();
    let (witnesses, deaf) = under_load(&config, queue, |witnesses| {
        witnesses.wait_for_more(600)?;
        // From here on nothing may be acknowledged; the last moment is one in which commits wait.
        let deaf = Deaf::make(&mut client)?;
        until("commits that wait", &mut primary, "SELECT count(*) >= 3 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")?;
        stage.cluster.crash()?;
        Ok(deaf)
    })?;
    drop(deaf);
    promote(&mut other)?;
    let account = check("synchronous", &mut client, &witnesses, &witnesses.mark())?;
    ensure!(account.lost == 0, "{} acknowledged commits are lost", account.lost);
    let mut other = standby.connect(DATABASE)?;
    check_scene(&mut client, &mut other, scene, original)
}

// If this fails, a failover to a standby that lags loses more than what it had not received, or accepts what a worker of the lost
// future sends.
pub fn an_asynchronous_standby_loses_only_what_it_had_not_received(stage: &mut Stage<'_>) -> Result<()> {
    for round in 0..rounds() {
        // The maintainer never rests, and prunes are replayed.
        set(stage, &HASTY)?;
        let standby = stage.cluster.standby("awa-asynchronous")?;
        let result = asynchronous(stage, &standby, &format!("flow-{round}"));
        if result.is_ok() {
            standby.remove()?;
        }
        put_back(stage, &HASTY)?;
        result.with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn asynchronous(stage: &mut Stage<'_>, standby: &Cluster, queue: &str) -> Result<()> {
    let mut client = standby.connect(DATABASE)?;
    let mut primary = stage.connect()?;
    let config = stage.config();
    let (witnesses, mark) = under_load(&config, queue, |witnesses| {
        witnesses.wait_for_more(600)?;
        let mark = witnesses.mark();
        let flushed: String = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[])?.try_get(0)?;
        until("the log received", &mut client, &format!("SELECT written_lsn >= '{flushed}' FROM pg_stat_wal_receiver"))?;
        let _deaf = Deaf::make(&mut client)?;
        // More than what lies in buffers on the way, so that all that is acknowledged after it is lost.
        primary.batch_execute("SELECT pg_logical_emit_message(false, 'awa', repeat('x', 16000000))")?;
        witnesses.wait_for_more(300)?;
        stage.cluster.crash()?;
        Ok(mark)
    })?;
    promote(&mut client)?;
    maintenance_rests(&mut client)?;
    let account = check("asynchronous", &mut client, &witnesses, &mark)?;
    ensure!(account.lost >= 300, "only {} are lost: the standby was not behind", account.lost);
    Ok(())
}

// If this fails, a backup with its archive does not hold what was there at the point to which it is restored.
pub fn a_restore_to_a_point_in_time_has_what_was_there(stage: &mut Stage<'_>) -> Result<()> {
    let archive = stage.cluster.server_dir("archive")?;
    let command = format!("cp %p {}/%f", archive.display());
    let result = {
        let _configured = Configured::restart_with(stage, &[("archive_mode", "on"), ("archive_command", command.as_str())])?;
        point_in_time(stage, &archive.display().to_string())
    };
    stage.cluster.restart(Shutdown::Fast)?;
    result
}

fn point_in_time(stage: &mut Stage<'_>, archive: &str) -> Result<()> {
    let scene = every_state::set_up(stage)?;
    let mut primary = stage.connect()?;
    let original = jobs_picture(&mut primary)?;
    let config = stage.config();
    let (witnesses, (mut restored, mark, point)) = under_load(&config, "flow", |witnesses| {
        witnesses.wait_for_more(200)?;
        let restored = stage.cluster.base_backup("awa-restored", &[])?;
        witnesses.wait_for_more(300)?;
        let mark = witnesses.mark();
        let point: String = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[])?.try_get(0)?;
        witnesses.wait_for_more(300)?;
        Ok((restored, mark, point))
    })?;
    // What must not be in it.
    primary.batch_execute("SELECT awa.drop_queue('q', force => true)")?;
    let last: String = primary.query_one("SELECT pg_walfile_name(pg_current_wal_lsn())", &[])?.try_get(0)?;
    primary.batch_execute("SELECT pg_switch_wal()")?;
    until("the log in the archive", &mut primary, &format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver"))?;

    let restore = format!("cp {archive}/%f %p");
    for (name, value) in [
        ("archive_mode", "off"),
        ("restore_command", restore.as_str()),
        ("recovery_target_lsn", point.as_str()),
        ("recovery_target_action", "promote"),
        // Until it is clear who runs the jobs from now on.
        ("awa.maintenance", "off"),
    ] {
        restored.configure(name, value)?;
    }
    restored.signal_recovery()?;
    restored.start()?;
    let mut client = restored.connect(DATABASE)?;
    until("the end of recovery", &mut client, "SELECT NOT pg_is_in_recovery()")?;
    // A physical copy is not recognised as one; who opens it beside the original keeps it shut by hand.
    client.batch_execute("SELECT awa.pre_restore()")?;
    all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.post_restore()")?;
    let foreign: bool = client.query_one("SELECT awa.post_restore()", &[])?.try_get(0)?;
    ensure!(!foreign, "a physical copy has another identity");
    let account = check("point in time", &mut client, &witnesses, &mark)?;
    ensure!(account.lost > 100, "only {} are lost: the restore went too far", account.lost);
    let mut other = restored.connect(DATABASE)?;
    check_scene(&mut client, &mut other, &scene, &original)?;
    drop((client, other));
    restored.remove()
}
