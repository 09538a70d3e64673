//! What may be in the way of a start, of a task, or of a user's command because of us.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::super::hostile_pool::Configured;
use super::super::{drain, enqueue};
use super::troubles::{launcher, terminate};
use super::*;
use crate::cluster::Shutdown;

// If this fails, one database with an odd name ends maintenance on the whole server.
pub fn a_database_may_have_any_name(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let [odd, bytes, other, _] = OTHERS;
    let mut client = stage.cluster.connect("postgres")?;
    client.batch_execute(&format!("CREATE DATABASE {odd}"))?;
    client.batch_execute(&format!("CREATE DATABASE {bytes} ENCODING 'SQL_ASCII' TEMPLATE template0"))?;
    let mut bytes = stage.cluster.connect(bytes)?;
    let name = r"convert_from('\x636166e9', 'SQL_ASCII')::name";
    bytes.batch_execute(&format!("UPDATE pg_database SET datname = {name} WHERE datname = '{odd}'"))?;
    let seen = (|| -> Result<()> {
        stage.cluster.create_database(other)?;
        wait_for_maintainer(&mut client, other)?;
        Ok(())
    })();
    bytes.batch_execute(&format!("UPDATE pg_database SET datname = '{odd}' WHERE datname = {name}"))?;
    seen?;
    drop(bytes);
    end(stage)
}

// If this fails, a maintainer comes back at once into a database that shall have no sessions.
pub fn a_database_that_takes_no_sessions_is_left_alone(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let [closed, one, two, _] = OTHERS;
    let mut client = stage.cluster.connect("postgres")?;
    stage.cluster.create_database(closed)?;
    let log_start = stage.cluster.log_size();
    for (shut, open, witness) in
        [("IS_TEMPLATE true", "IS_TEMPLATE false", one), ("ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true", two)]
    {
        let pid = wait_for_maintainer(&mut client, closed)?;
        client.batch_execute(&format!("ALTER DATABASE {closed} {shut}"))?;
        let left = (|| -> Result<()> {
            wait_for_pid(&mut client, closed, |seen| seen != Some(pid), "it shall leave")?;
            // The launcher has had its rounds meanwhile.
            stage.cluster.create_database(witness)?;
            wait_for_maintainer(&mut client, witness)?;
            ensure!(pid_of(&mut client, closed)?.is_none(), "{shut}: a maintainer is there again");
            Ok(())
        })();
        client.batch_execute(&format!("ALTER DATABASE {closed} {open}"))?;
        left?;
    }
    wait_for_maintainer(&mut client, closed)?;
    let log = stage.cluster.log_since(log_start)?;
    ensure!(!log.contains("is started again"), "the log tells of maintainers that ended badly");
    end(stage)
}

// If this fails, a lock on one database stops the start of every maintainer of the server.
pub fn a_start_that_is_held_up_keeps_no_other_waiting(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let [held, other, ..] = OTHERS;
    let mut client = stage.cluster.connect("postgres")?;
    stage.cluster.create_database(held)?;
    wait_for_maintainer(&mut client, held)?;
    client.batch_execute(&format!("BEGIN; ALTER DATABASE {held} RENAME TO x; PREPARE TRANSACTION 'held'"))?;
    let come = (|| -> Result<()> {
        let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND NOT granted)";
        let waiting = wait_until(PATIENCE, || client.query_one(waits, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
        ensure!(waiting, "nobody waits for the lock");
        stage.cluster.create_database(other)?;
        wait_for_maintainer(&mut client, other)?;
        Ok(())
    })();
    client.batch_execute("ROLLBACK PREPARED 'held'")?;
    come?;
    wait_for_maintainer(&mut client, held)?;
    end(stage)
}

// If this fails, the doctor calls a start that never ends a good one.
pub fn a_start_that_takes_long_is_told(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let pid = wait_for_maintainer(&mut client, DATABASE)?;
    // Every new session reads the settings of its database.
    client.batch_execute("BEGIN; LOCK TABLE pg_db_role_setting IN ACCESS EXCLUSIVE MODE")?;
    terminate(&mut client, pid)?;
    wait_for_finding(&mut client, "maintainer", "warning", "has been starting")?;
    client.batch_execute("ROLLBACK")?;
    wait_until_it_works(&mut client)?;
    end(stage)
}

/// Every field of the errors that these commands meet.
fn errors_of(stage: &Stage<'_>) -> Result<String> {
    let mut shown = String::new();
    let mut here = stage.connect()?;
    here.batch_execute(
        "CREATE TABLE t (a int); \
         CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
             RAISE EXCEPTION 'refused' USING ERRCODE = '23514', DETAIL = 'd', HINT = 'h', COLUMN = 'c', CONSTRAINT = 'k', \
                 DATATYPE = 'y', TABLE = 't', SCHEMA = 's'; \
         END $$; \
         CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('ALTER VIEW') EXECUTE FUNCTION refuse(); \
         CREATE VIEW v AS SELECT 1 AS one",
    )?;
    let mut elsewhere = stage.cluster.connect("postgres")?;
    for (is_here, sql) in [
        (true, "ALTER TABLE t RENAME nope TO b"),
        (true, "DO $$ BEGIN ALTER TABLE t RENAME nope TO b; END $$"),
        (true, "ALTER VIEW v RENAME TO w"),
        (false, "CREATE DATABASE x nonsense = 1"),
        (false, "CREATE DATABASE x ENCODING = 'nonsense'"),
        (false, "CREATE DATABASE x TEMPLATE nope"),
        (false, "ALTER DATABASE awa_case RENAME TO postgres"),
        (false, "ALTER DATABASE awa_case nonsense = 1"),
        (false, "DROP DATABASE nope"),
    ] {
        let client = if is_here { &mut here } else { &mut elsewhere };
        let Err(error) = client.batch_execute(sql) else { anyhow::bail!("no error: {sql}") };
        writeln!(shown, "{sql}: {:?}", error.as_db_error())?;
    }
    here.batch_execute("DROP EVENT TRIGGER refuse; DROP FUNCTION refuse(); DROP VIEW v; DROP TABLE t")?;
    Ok(shown)
}

// If this fails, a tool that reads the fields of an error does not find them any more.
pub fn errors_of_commands_arrive_unchanged(stage: &mut Stage<'_>) -> Result<()> {
    let with = errors_of(stage)?;
    let without = {
        let _configured = Configured::restart_with(stage, &[("shared_preload_libraries", "")])?;
        errors_of(stage)
    };
    stage.cluster.restart(Shutdown::Fast)?;
    let without = without?;
    let different: Vec<_> = with.lines().zip(without.lines()).filter(|(with, without)| with != without).collect();
    ensure!(different.is_empty(), "with the library and without: {different:#?}");
    ensure!(without.contains("position: Some(") && without.contains("constraint: Some("), "nothing to compare: {without}");
    Ok(())
}

// If this fails, a prune that waits for a standby keeps every session out of a segment, and nothing is rescued meanwhile.
pub fn a_missing_standby_holds_nothing_up(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.rotate_age", "1s"), ("awa.prune_grace", "0")])?;
    let mut client = stage.connect()?;
    client.batch_execute("SET synchronous_commit = local")?;
    wait_until_it_works(&mut client)?;
    set(stage, &mut client, "synchronous_standby_names", "nobody")?;
    let mut pruned = false;
    wait_until(PATIENCE, || {
        let worked = enqueue(&mut client, 2).and_then(|_| drain(&mut client));
        let text = "SELECT count(*) >= 2 FROM awa.ring_rotations WHERE event = 'pruned'";
        pruned = client.query_one(text, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false));
        worked.is_err() || pruned
    });
    set(stage, &mut client, "synchronous_standby_names", "")?;
    ensure!(pruned, "it waits for the standby");
    end(stage)
}

// If this fails, the doctor calls maintenance good that gets nowhere.
pub fn the_doctor_sees_a_task_that_gets_nowhere(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("awa.rotate_age", "1s")])?;
    let (mut client, mut holder) = (stage.connect()?, stage.connect()?);
    wait_until_it_works(&mut client)?;
    let mut transaction = holder.transaction()?;
    // It may be read: the doctor does.
    transaction.batch_execute("LOCK TABLE awa.ring_rotations IN SHARE ROW EXCLUSIVE MODE")?;
    // Not before: a segment that is rotated at once leaves an empty one, which needs no rotation.
    enqueue(&mut client, 1)?;
    wait_for_finding(&mut client, "task", "warning", "Task rotate has been held up")?;
    transaction.rollback()?;
    wait_for_finding(&mut client, "task", "ok", "")?;
    drain(&mut client)?;
    end(stage)
}

// If this fails, nobody hears of a job that is stuck for good.
pub fn the_doctor_sees_a_job_that_cannot_be_rescued(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let jobs = enqueue(&mut client, 3)?;
    let table: String = client.query_one("SELECT ready_entries FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
    client.batch_execute("BEGIN; SELECT count(*) FROM awa.claim('q', 3, deadline => '1 microsecond')")?;
    client.execute(&format!("DELETE FROM {table} WHERE job_id = $1"), &[&jobs[1]])?;
    client.batch_execute("COMMIT")?;
    let words = format!("job {}:", jobs[1]);
    wait_for_finding(&mut client, "task", "warning", &words)?;
    // Also while the job is set aside, and the task has nothing to do.
    wait_for_steps(&mut client, "rescue_expired_deadlines", 5)?;
    wait_for_finding(&mut client, "task", "warning", &words)?;
    stage.damaged = true;
    end(stage)
}

// If this fails, a maintainer that has ended is said to work.
pub fn the_doctor_sees_that_nobody_works(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let pid = wait_for_maintainer(&mut client, DATABASE)?;
    let starter = launcher(&mut client)?.context("no launcher")?;
    terminate(&mut client, starter)?;
    ensure!(wait_until(PATIENCE, || launcher(&mut client).is_ok_and(|pid| pid != Some(starter))), "the launcher does not end");
    terminate(&mut client, pid)?;
    wait_for_finding(&mut client, "maintainer", "warning", "has ended")?;
    wait_until_it_works(&mut client)?;
    end(stage)
}

// If this fails, the doctor complains for ever about a database that is gone.
pub fn a_database_that_is_gone_starves_no_more(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[("max_worker_processes", "2"), ("max_logical_replication_workers", "0")])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    let [one, ..] = OTHERS;
    stage.cluster.create_database(one)?;
    wait_for_finding(&mut client, "worker_slots", "warning", "another")?;
    stage.cluster.drop_database(one)?;
    wait_for_finding(&mut client, "worker_slots", "ok", "")?;
    end(stage)
}

// If this fails, maintenance disturbs a restore, or sleeps on after it.
pub fn a_restore_puts_it_to_sleep_and_wakes_it(stage: &mut Stage<'_>) -> Result<()> {
    // Only what it is told wakes it.
    let _configured = begin(stage, &[("awa.maintenance_interval", "1h")])?;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    client.batch_execute("SELECT awa.pre_restore()")?;
    wait_for_finding(&mut client, "maintainer", "warning", "a restore is under way")?;
    client.batch_execute("SELECT awa.wake_maintenance()")?;
    wait_for_finding(&mut client, "maintainer", "warning", "a restore is under way")?;
    client.batch_execute("SELECT awa.post_restore()")?;
    wait_until_it_works(&mut client)?;
    let errors: bool = client.query_one("SELECT bool_or(errors > 0) FROM awa.stat_maintenance", &[])?.try_get(0)?;
    ensure!(!errors, "a task has failed");
    end(stage)
}

// If this fails, a command that failed keeps a database without maintenance as long as its transaction lasts.
pub fn a_command_that_failed_in_a_savepoint_holds_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = begin(stage, &[])?;
    let mut client = stage.cluster.connect("postgres")?;
    wait_until_it_works(&mut stage.connect()?)?;
    let mut commander = stage.cluster.connect("postgres")?;
    commander.batch_execute("BEGIN; SAVEPOINT one; SAVEPOINT two")?;
    let refused = commander.batch_execute(&format!("ALTER DATABASE {DATABASE} RENAME TO postgres"));
    ensure!(refused.is_err(), "not refused");
    commander.batch_execute("ROLLBACK TO two")?;
    wait_for_maintainer(&mut client, DATABASE)?;
    // One that succeeded holds it until its savepoint is rolled back, too.
    commander.batch_execute(&format!("ALTER DATABASE {DATABASE} RENAME TO {}; RELEASE two", OTHERS[0]))?;
    ensure!(pid_of(&mut client, DATABASE)?.is_none(), "it is back before the command has ended");
    commander.batch_execute("ROLLBACK TO one")?;
    wait_for_maintainer(&mut client, DATABASE)?;
    commander.batch_execute("ROLLBACK")?;
    wait_until_it_works(&mut stage.connect()?)?;
    end(stage)
}

// If this fails, each database that is dropped while the launcher is away takes a place with it, until none is left.
pub fn a_place_that_waits_goes_with_its_database(stage: &mut Stage<'_>) -> Result<()> {
    // So there are three places.
    let _configured = begin(stage, &[("awa.max_databases", "1")])?;
    let [passing, last, ..] = OTHERS;
    let mut client = stage.connect()?;
    wait_until_it_works(&mut client)?;
    for _ in 0..2 {
        stage.cluster.create_database(passing)?;
        let mut inside = stage.cluster.connect(passing)?;
        wait_for_finding(&mut inside, "maintainer", "ok", "no queue was created yet")?;
        let pid = wait_for_maintainer(&mut inside, passing)?;
        let starter = launcher(&mut inside)?.context("no launcher")?;
        terminate(&mut inside, pid)?;
        wait_for_finding(&mut inside, "maintainer", "error", "ended unexpectedly")?;
        terminate(&mut inside, starter)?;
        ensure!(wait_until(PATIENCE, || launcher(&mut inside).is_ok_and(|pid| pid != Some(starter))), "the launcher stays");
        drop(inside);
        stage.cluster.drop_database(passing)?;
        ensure!(wait_until(PATIENCE, || launcher(&mut client).is_ok_and(|pid| pid.is_some())), "the launcher does not come back");
    }
    stage.cluster.create_database(last)?;
    wait_for_maintainer(&mut client, last)?;
    end(stage)
}
