//! Memory of one backend over many calls: that of the server's contexts, and what the process has from the system (the library's own
//! allocations are only in the latter). `AWA_MEMORY_CALLS` asks for more calls.

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::super::Stage;
use super::super::hostile_pool::Configured;
use super::super::races::pid_of;
use super::super::stress_mixed::number;
use crate::cluster::Shutdown;

/// What a session may grow by, over all calls of one kind. A leak of 25 bytes a call is about as much in 20,000 calls.
const CONTEXTS: i64 = 100 * 1024;
const PROCESS: i64 = 500 * 1024;

/// A name, what is done in each call, and one in how many calls it is worth (those that read the whole ring).
const CALLS: &[(&str, &str, u64)] = &[
    ("enqueue", "PERFORM awa.enqueue('q', 'k', '{\"a\": 1}', 1 + i % 4, tags => ARRAY['a', 'b'], metadata => '{}')", 1),
    ("enqueue, scheduled", "PERFORM awa.enqueue('far', 'k', run_at => now() + i * interval '1 s')", 1),
    ("insert", "INSERT INTO awa.jobs (queue, kind, args) VALUES ('q', 'k', '{}')", 1),
    ("enqueue_many", "PERFORM awa.enqueue_many('q', 'k', ARRAY['{}', '{}', '{}']::jsonb[], ARRAY[1, 2, 3])", 1),
    ("claim, complete", "SELECT * INTO j FROM awa.claim('q'); PERFORM awa.complete(j.job_id, j.run_lease)", 1),
    ("claim of several, complete_many",
     "SELECT * INTO j FROM awa.claim(ARRAY['far', 'q']); PERFORM awa.complete_many(ARRAY[j.job_id], ARRAY[j.run_lease])", 1),
    ("complete_and_claim",
     "SELECT * INTO k FROM awa.complete_and_claim(CASE WHEN j.job_id IS NULL THEN '{}' ELSE ARRAY[j.job_id] END, \
          CASE WHEN j.job_id IS NULL THEN '{}' ELSE ARRAY[j.run_lease] END, 'q'); j := k", 1),
    ("fail", "PERFORM awa.enqueue('q', 'k'); SELECT * INTO j FROM awa.claim('q'); PERFORM awa.fail(j.job_id, j.run_lease, 'an error', '1 hour')", 1),
    ("snooze", "PERFORM awa.enqueue('q', 'k'); SELECT * INTO j FROM awa.claim('q'); PERFORM awa.snooze(j.job_id, j.run_lease, '1 hour')", 1),
    ("heartbeat", "IF i = 0 THEN PERFORM awa.enqueue('q', 'k'); END IF; IF j IS NULL THEN SELECT * INTO j FROM awa.claim('q'); END IF; \
         PERFORM awa.heartbeat(j.job_id, j.run_lease), awa.heartbeat_many(ARRAY[j.job_id], ARRAY[j.run_lease]), \
             awa.extend(j.job_id, j.run_lease, '1 hour')", 1),
    ("cancel of a running job", "PERFORM awa.enqueue('q', 'k'); SELECT * INTO j FROM awa.claim('q'); PERFORM awa.cancel(j.job_id, 'reason')", 1),
    ("counts", "PERFORM awa.queue_counts(), awa.queue_stats(), awa.segment_stats()", 1),
    ("settings", "PERFORM awa.pause_queue('far'); PERFORM awa.alter_queue('far', max_attempts => 1 + (i % 9)::integer); PERFORM awa.resume_queue('far')", 10),
    ("queues", "PERFORM awa.create_queue('passing'); COMMIT; PERFORM awa.drop_queue('passing')", 20),
    ("rotate, prune", "PERFORM awa.rotate(); COMMIT; PERFORM awa.prune(); COMMIT; PERFORM awa.prune()", 500),
    ("job", "PERFORM awa.job(i)", 1000),
    ("jobs", "PERFORM count(*) FROM awa.jobs", 2000),
    ("verify", "PERFORM awa.verify()", 2000),
    ("cancel of a waiting job", "PERFORM awa.cancel(awa.enqueue('q', 'k'))", 1000),
    ("rebuild", "PERFORM awa.rebuild()", 2000),
    ("claim_ready_runtime", "PERFORM awa.enqueue('q', 'k'); SELECT * INTO j FROM awa.claim_ready_runtime('q'); PERFORM awa.complete(j.job_id, j.run_lease)", 10),
    ("a deadline that has passed", "PERFORM awa.enqueue('few', 'k'), awa.claim('few', 1, '1 microsecond'); COMMIT; PERFORM awa.rescue_expired_deadlines()", 20),
    ("a heartbeat that is late", "PERFORM awa.enqueue('few', 'k'), awa.claim('few', 1, NULL, '1 microsecond'); COMMIT; PERFORM awa.rescue_stale_heartbeats()", 20),
    ("dead letters",
     "PERFORM awa.enqueue('letters', 'k'); COMMIT; SELECT * INTO j FROM awa.claim('letters'); PERFORM awa.fail(j.job_id, j.run_lease, 'x', final => true); COMMIT; \
          PERFORM awa.dlq_retry(j.job_id); COMMIT; SELECT * INTO j FROM awa.claim('letters'); PERFORM awa.fail(j.job_id, j.run_lease, 'x', final => true); COMMIT; \
          PERFORM awa.dlq_retry_many('letters'); COMMIT; SELECT * INTO j FROM awa.claim('letters'); PERFORM awa.fail(j.job_id, j.run_lease, 'x', final => true); COMMIT; \
          PERFORM awa.dlq_purge('letters')", 50),
    ("retry and delete of a finished job",
     "PERFORM awa.enqueue('letters', 'k'); COMMIT; SELECT * INTO j FROM awa.claim('letters'); PERFORM awa.cancel(j.job_id); COMMIT; PERFORM awa.retry(j.job_id); COMMIT; \
          SELECT * INTO j FROM awa.claim('letters'); PERFORM awa.complete(j.job_id, j.run_lease); COMMIT; PERFORM awa.delete_job(j.job_id)", 1000),
    ("maintenance",
     "PERFORM awa.retention(); COMMIT; PERFORM awa.promote_deferred(); COMMIT; PERFORM awa.carry_forward(); COMMIT; PERFORM awa.run_maintenance('rescue_stale_heartbeats'); COMMIT; \
          PERFORM awa.run_maintenance('prune')", 100),
    ("numbers", "PERFORM awa.metrics(), awa.doctor(), awa.maintenance_stats(), awa.wake_maintenance(), awa.version(), awa.adopt()", 50),
    ("finished jobs", "PERFORM count(*) FROM awa.terminal_jobs", 2000),
    ("restore", "PERFORM awa.pre_restore(); COMMIT; PERFORM awa.post_restore(); COMMIT; PERFORM awa.queue_counts()", 2000),
];

/// Each raises; the error is caught, so that its subtransaction rolls back.
const REFUSALS: &[(&str, &str)] = &[
    ("stale completion", "PERFORM awa.complete(1, 1)"),
    ("unknown queue", "PERFORM awa.claim('nowhere')"),
    ("bad arguments", "PERFORM awa.enqueue('q', repeat('k', 300))"),
    ("an enqueue that rolls back", "PERFORM awa.enqueue('q', 'k', priority => 1 + (i % 4)::integer); PERFORM 1 / 0"),
    ("a claim that rolls back", "PERFORM awa.enqueue_many('q', 'k', ARRAY['{}', '{}']::jsonb[]), awa.claim('full', 5); PERFORM 1 / 0"),
];

fn session(client: &mut Client, body: &str, calls: u64) -> Result<()> {
    let block = format!(
        "DO $$ DECLARE j awa.claimed_job; k awa.claimed_job; BEGIN FOR i IN 0..{} LOOP {body}; COMMIT; END LOOP; END $$",
        calls.saturating_sub(1)
    );
    client.batch_execute(&block).with_context(|| block.clone())
}

/// Bytes of the server's memory contexts, and of the process without shared memory.
fn measure(client: &mut Client, pid: i32) -> Result<(i64, i64)> {
    let contexts: i64 = client.query_one("SELECT sum(total_bytes)::bigint FROM pg_backend_memory_contexts", &[])?.try_get(0)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kilobytes: i64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok((contexts, kilobytes * 1024))
}

/// A leak grows each time; what the process keeps of memory it has had, or a cache, once.
const LOOKS: usize = 3;

fn stays_flat(client: &mut Client, pid: i32, name: &str, body: &str, calls: u64, warm: u64) -> Result<Option<String>> {
    session(client, body, warm)?;
    let mut before = measure(client, pid)?;
    let mut said = String::new();
    for _ in 0..LOOKS {
        session(client, body, calls)?;
        let after = measure(client, pid)?;
        let (contexts, process) = (after.0 - before.0, after.1 - before.1);
        said = format!("{name}: after {calls} calls contexts have {contexts} bytes more, the process {process}");
        if std::env::var_os("AWA_MEMORY_SHOW").is_some() {
            println!("        {said}");
        }
        if contexts <= CONTEXTS && process <= PROCESS {
            return Ok(None);
        }
        before = after;
    }
    Ok(Some(said))
}

fn settings(calls: u64) -> Vec<(&'static str, String)> {
    vec![("awa.max_in_flight", (4 * calls).max(32_768).to_string()), ("awa.max_databases", "2".to_owned()), ("synchronous_commit", "off".to_owned())]
}

fn prepared(stage: &mut Stage<'_>, calls: u64) -> Result<Configured> {
    let settings = settings(calls);
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Configured::restart_with(stage, &settings)
}

// If this fails, a worker that stays connected for weeks uses up the memory of the machine.
pub fn the_memory_of_a_session_stays_flat_over_many_calls(stage: &mut Stage<'_>) -> Result<()> {
    let calls = number("AWA_MEMORY_CALLS", 20_000);
    {
        let _configured = prepared(stage, calls)?;
        let mut client = stage.connect()?;
        let pid = pid_of(&mut client)?;
        client.batch_execute(
            "SELECT awa.create_queue('far'), awa.create_queue('few'), awa.create_queue('letters', dead_letters => true); SET awa.prune_grace = 0",
        )?;
        let mut grown = Vec::new();
        for (name, body, seldom) in CALLS {
            grown.extend(stays_flat(&mut client, pid, name, body, (calls / seldom).max(5), (calls / seldom / 10).clamp(3, 2000))?);
        }
        grown.extend(waits(&mut client, pid, calls / 10)?);
        ensure!(grown.is_empty(), "{}", grown.join("\n"));
        drop(client);
        stage.verify_clean()?;
    }
    stage.cluster.restart(Shutdown::Fast)
}

/// `wait` is a statement of its own, so each is a call from here.
fn waits(client: &mut Client, pid: i32, calls: u64) -> Result<Option<String>> {
    client.batch_execute("SELECT awa.create_queue('empty')")?;
    let call = client.prepare("CALL awa.wait('empty', '0')")?;
    let mut before = (0, 0);
    for number in 0..calls + 200 {
        if number == 200 {
            before = measure(client, pid)?;
        }
        client.execute(&call, &[])?;
    }
    let after = measure(client, pid)?;
    let grown = after.0 - before.0 > CONTEXTS || after.1 - before.1 > PROCESS;
    Ok(grown.then(|| format!("wait: {calls} calls, {before:?} before, {after:?} after")))
}

// If this fails, a worker that meets errors for weeks uses up the memory of the machine.
pub fn the_memory_of_a_session_stays_flat_over_many_refusals(stage: &mut Stage<'_>) -> Result<()> {
    let calls = number("AWA_MEMORY_CALLS", 20_000);
    let mut client = stage.connect()?;
    let pid = pid_of(&mut client)?;
    client.batch_execute("SELECT awa.create_queue('full'), awa.create_queue('probe'); SELECT awa.enqueue('full', 'k') FROM generate_series(1, 50)")?;
    let mut grown = Vec::new();
    for (name, call) in REFUSALS {
        let body = format!("BEGIN {call}; RAISE 'not refused' USING ERRCODE = 'ZZ000'; EXCEPTION WHEN SQLSTATE 'ZZ000' THEN RAISE; WHEN OTHERS THEN NULL; END");
        grown.extend(stays_flat(&mut client, pid, name, &body, calls, calls / 10)?);
    }
    ensure!(grown.is_empty(), "{}", grown.join("\n"));
    drop(client);
    stage.verify_clean()
}
