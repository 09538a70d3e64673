//! Servers and databases that are not set up as they should be: each function says so, with what to do, and the session lives on.

mod standby;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use postgres::Client;

pub use self::standby::{a_read_only_transaction_refuses_to_write, a_standby_refuses_and_works_after_promotion};
use super::hostile_pool::Configured;
use super::{Stage, claim, complete, drain, enqueue};
use crate::cluster::Shutdown;

/// A call of each function that writes.
pub const WRITES: &[&str] = &[
    "SELECT awa.enqueue('q', 'k')",
    "SELECT awa.enqueue_many('q', 'k', ARRAY['{}'::jsonb])",
    "INSERT INTO awa.jobs (queue, kind, args) VALUES ('q', 'k', '{}')",
    "SELECT awa.claim('q')",
    "SELECT awa.claim(ARRAY['q'])",
    "SELECT awa.claim_ready_runtime('q')",
    "SELECT awa.complete(1, 1)",
    "SELECT awa.complete_many(ARRAY[1], ARRAY[1])",
    "SELECT awa.complete_and_claim('{}', '{}', 'q')",
    "SELECT awa.fail(1, 1, 'error')",
    "SELECT awa.snooze(1, 1, '1 s')",
    "SELECT awa.cancel(1)",
    "SELECT awa.retry(1)",
    "SELECT awa.delete_job(1)",
    "SELECT awa.dlq_retry(1)",
    "SELECT awa.dlq_retry_many('q')",
    "SELECT awa.dlq_purge('q')",
    "SELECT awa.retention()",
    "SELECT awa.create_queue('other')",
    "SELECT awa.alter_queue('q', max_attempts => 3)",
    "SELECT awa.pause_queue('q')",
    "SELECT awa.resume_queue('q')",
    "SELECT awa.drop_queue('q')",
    "SELECT awa.promote_deferred()",
    "SELECT awa.rotate()",
    "SELECT awa.carry_forward()",
    "SELECT awa.prune()",
    "SELECT awa.rescue_expired_deadlines()",
    "SELECT awa.rescue_stale_heartbeats()",
    "SELECT awa.run_maintenance('rotate')",
    "SELECT awa.add_segments(1)",
    "SELECT awa.retry(1)",
    "SELECT awa.delete_job(1)",
    "SELECT awa.dlq_retry(1)",
    "SELECT awa.dlq_retry_many()",
    "SELECT awa.dlq_purge()",
    "SELECT awa.retention()",
];

/// A call of each function that reads, or changes memory only.
pub const READS: &[&str] = &[
    "SELECT awa.heartbeat(1, 1)",
    "SELECT awa.heartbeat_many(ARRAY[1], ARRAY[1])",
    "SELECT awa.job(1)",
    "SELECT count(*) FROM awa.jobs",
    "SELECT count(*) FROM awa.terminal_jobs",
    "SELECT awa.list_jobs(true)",
    "SELECT awa.queue_counts()",
    "SELECT awa.queue_counts('q')",
    "SELECT awa.queue_stats()",
    "SELECT awa.segment_stats()",
    "SELECT count(*) FROM awa.stat_queue",
    "SELECT count(*) FROM awa.stat_segments",
    "SELECT awa.verify()",
    "CALL awa.wait('q', '0')",
];

/// Those that are neither: no attempt is current where these are called, and an operator decides.
pub const OTHERS: &[&str] = &["SELECT awa.extend(1, 1, '1 s')", "SELECT awa.rebuild()"];

/// They answer wherever they are called, or have a case of their own.
const UNLISTED: &[&str] =
    &["version", "adopt", "jobs_insert", "announce", "doctor", "wake_maintenance", "maintenance_stats", "metrics", "pre_restore", "post_restore"];

#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: String,
    pub message: String,
    pub hint: String,
}

/// How the server refuses this; not being refused is an error, and so is a session that ends.
pub fn refusal(client: &mut Client, sql: &str) -> Result<Refusal> {
    let error = client.batch_execute(sql).err().with_context(|| format!("not refused: {sql}"))?;
    let said = error.as_db_error().with_context(|| format!("{sql}: {error}"))?;
    let refusal = Refusal {
        code: said.code().code().to_owned(),
        message: said.message().to_owned(),
        hint: said.hint().unwrap_or_default().to_owned(),
    };
    client.batch_execute("SELECT 1").with_context(|| format!("the session did not survive: {sql}"))?;
    Ok(refusal)
}

/// Each call is refused with this SQLSTATE, and the word is in its hint. All that are not are named.
pub fn all_refused<'a>(client: &mut Client, calls: impl IntoIterator<Item = &'a &'a str>, code: &str, hint: &str) -> Result<()> {
    let mut wrong = Vec::new();
    for sql in calls {
        match refusal(client, sql) {
            Ok(refusal) if refusal.code == code && refusal.hint.contains(hint) => {}
            Ok(refusal) => wrong.push(format!("{sql}: {refusal:?}")),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    ensure!(wrong.is_empty(), "expected {code} with the hint {hint:?}:\n{}", wrong.join("\n"));
    Ok(())
}

// If this fails, a function was added that no case of refusal calls.
pub fn every_function_is_in_the_lists(stage: &mut Stage<'_>) -> Result<()> {
    let rows = stage.connect()?.query("SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'awa'::regnamespace", &[])?;
    let named = |name: &str| [WRITES, READS, OTHERS].concat().iter().any(|sql| sql.contains(&format!("awa.{name}(")));
    let there = rows.iter().map(|row| row.try_get(0)).collect::<Result<BTreeSet<String>, _>>()?;
    let missing: Vec<_> = there.iter().filter(|name| !named(name) && !UNLISTED.contains(&name.as_str())).collect();
    ensure!(!there.is_empty() && missing.is_empty(), "not in the lists: {missing:?}");
    Ok(())
}

// If this fails, who forgot shared_preload_libraries gets a riddle, or a crash.
pub fn without_preloading_every_function_says_so(stage: &mut Stage<'_>) -> Result<()> {
    let jobs = enqueue(&mut stage.connect()?, 3)?;
    {
        let _configured = Configured::restart_with(stage, &[("shared_preload_libraries", "")])?;
        let mut client = stage.connect()?;
        all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "shared_preload_libraries")?;
        let maintenance = ["SELECT awa.wake_maintenance()", "SELECT * FROM awa.stat_maintenance", "SELECT awa.metrics()"];
        all_refused(&mut client, &maintenance, "55000", "shared_preload_libraries")?;
        let found = client.query_one("SELECT status, hint FROM awa.doctor() WHERE check_name = 'preloaded'", &[])?;
        ensure!(found.try_get::<_, String>(0)? == "error", "the doctor sees nothing wrong");
        ensure!(found.try_get::<_, String>(1)?.contains("shared_preload_libraries"), "the doctor does not say what to do");
        // A dump must be restorable here, too.
        client.batch_execute("BEGIN; DROP EXTENSION awa_queue CASCADE; CREATE EXTENSION awa_queue; ROLLBACK")?;
        let version: String = client.query_one("SELECT awa.version()", &[])?.try_get(0)?;
        ensure!(!version.is_empty(), "no version");
    }
    stage.cluster.restart(Shutdown::Fast)?;
    ensure!(drain(&mut stage.connect()?)? == jobs, "the jobs are not what they were");
    Ok(())
}

// If this fails, a copy can be adopted by a server that will not run it.
pub fn without_preloading_nothing_is_adopted(stage: &mut Stage<'_>) -> Result<()> {
    {
        let _configured = Configured::restart_with(stage, &[("shared_preload_libraries", "")])?;
        all_refused(&mut stage.connect()?, &["SELECT awa.adopt()"], "55000", "shared_preload_libraries")?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

// If this fails, one database too many breaks another, or a place is never free again.
pub fn a_database_too_many_is_refused_until_one_goes(stage: &mut Stage<'_>) -> Result<()> {
    let jobs = enqueue(&mut stage.connect()?, 3)?;
    {
        let _configured = Configured::restart_with(stage, &[("awa.max_databases", "1")])?;
        stage.cluster.create_database("awa_other")?;
        let mut other = stage.cluster.connect("awa_other")?;
        other.batch_execute("SELECT awa.create_queue('q')")?;
        let mut client = stage.connect()?;
        all_refused(&mut client, [WRITES, READS].concat().iter(), "53400", "awa.max_databases")?;
        ensure!(drain_named(&mut other)? == 0, "the other database is not empty");
        enqueue(&mut other, 2)?;
        ensure!(drain_named(&mut other)? == 2, "the other database is broken");
        drop(other);
        stage.cluster.drop_database("awa_other")?;
        // The same session, which was refused before.
        ensure!(drain(&mut client)? == jobs, "the jobs are not what they were");
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

fn drain_named(client: &mut Client) -> Result<usize> {
    Ok(drain(client)?.len())
}

// If this fails, sessions that stay connected while the extension is created anew write into the old one, or crash.
pub fn sessions_outlive_a_new_extension(stage: &mut Stage<'_>) -> Result<()> {
    let (mut worker, mut producer, mut operator) = (stage.connect()?, stage.connect()?, stage.connect()?);
    for _ in 0..3 {
        enqueue(&mut producer, 10)?;
        let old = *claim(&mut worker, 5)?.first().context("nothing was claimed")?;
        let enqueue_again = producer.prepare("SELECT awa.enqueue('q', 'prepared')")?;
        producer.query_one(&enqueue_again, &[])?;
        operator.batch_execute("DROP EXTENSION awa_queue CASCADE")?;
        let gone = refusal(&mut worker, "SELECT awa.claim('q')")?;
        ensure!(["3F000", "42883"].contains(&gone.code.as_str()), "without the extension: {gone:?}");
        operator.batch_execute("CREATE EXTENSION awa_queue")?;
        let missing = refusal(&mut worker, "SELECT awa.claim('q')")?;
        ensure!(missing.code == "42704", "without the queue: {missing:?}");
        operator.batch_execute("SELECT awa.create_queue('q')")?;
        let jobs = enqueue(&mut producer, 3)?;
        producer.query_one("SELECT awa.enqueue('q', 'prepared')", &[])?;
        let stale = refusal(&mut worker, &format!("SELECT awa.complete({}, {})", old.job_id, old.run_lease))?;
        ensure!(stale.code == "55000", "a lease of the old extension: {stale:?}");
        let drained = drain(&mut worker)?;
        ensure!(drained.len() == 4 && drained.starts_with(&jobs), "enqueued {jobs:?}, drained {drained:?}");
        stage.verify_clean()?;
    }
    Ok(())
}

// If this fails, a library of another version than the script reads arguments that are not there.
pub fn another_version_of_the_script_is_refused(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 2)?;
    let library = "LANGUAGE c AS '$libdir/awa_queue'";
    client.batch_execute(&format!(
        "CREATE SCHEMA other;
         CREATE FUNCTION other.enqueue(text) RETURNS bigint {library}, 'awa_enqueue';
         CREATE FUNCTION other.version(text) RETURNS text {library}, 'awa_version';
         CREATE FUNCTION other.claim(text, integer, interval, interval, text) RETURNS SETOF awa.claimed_job {library}, 'awa_claim';
         CREATE FUNCTION other.wide_claim(text, integer, interval, interval) RETURNS TABLE (a bigint, b bigint) {library}, 'awa_claim';
         CREATE FUNCTION other.scalar_claim(text, integer, interval, interval) RETURNS bigint {library}, 'awa_claim';
         CREATE FUNCTION other.texts(text[], bigint[]) RETURNS SETOF awa.job_result {library}, 'awa_complete_many'",
    ))?;
    for (sql, code, hint) in [
        ("SELECT other.enqueue('q')", "55000", "ALTER EXTENSION"),
        ("SELECT other.version('q')", "55000", "ALTER EXTENSION"),
        ("SELECT other.claim('q', 1, NULL, NULL, 'x')", "55000", "ALTER EXTENSION"),
        ("SELECT other.wide_claim('q', 1, NULL, NULL)", "55000", "ALTER EXTENSION"),
        ("SELECT other.scalar_claim('q', 1, NULL, NULL)", "0A000", ""),
        ("SELECT other.texts(ARRAY['1'], ARRAY[1])", "42804", ""),
    ] {
        all_refused(&mut client, &[sql], code, hint)?;
    }
    client.batch_execute("DROP SCHEMA other CASCADE")?;
    let attempts = claim(&mut client, 10)?;
    ensure!(super::ids(&attempts) == jobs, "a refused call took jobs: {attempts:?} are left of {jobs:?}");
    for attempt in attempts {
        complete(&mut client, attempt)?;
    }
    Ok(())
}
