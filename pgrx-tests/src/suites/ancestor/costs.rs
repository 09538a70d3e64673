//! E8, E9: what producers take from each other, and what a call costs beside many open claims. Counted in locks and pages, never in time.

use std::thread;

use anyhow::{Result, anyhow, ensure};
use serde_json::Value;

use super::super::{Stage, claim, drain, enqueue};
use super::*;

// If this fails, producers wait for each other's commits, deadlock, or take turns in them.
pub fn e08_producers_share_no_lock_and_no_notify(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let lane = |priority: i32| format!("SELECT awa.enqueue('q', 'k', priority => {priority}) FROM generate_series(1, 3)");
    for client in [&mut one, &mut two] {
        client.batch_execute("SET lock_timeout = '20s'; BEGIN")?;
    }
    // (a) The same lane while the other is open; (b) two lanes in opposite order.
    one.batch_execute(&lane(1))?;
    two.batch_execute(&lane(2))?;
    thread::scope(|scope| -> Result<()> {
        let (other, third, fourth) = (&mut two, lane(2), lane(1));
        let crossing = scope.spawn(move || other.batch_execute(&fourth));
        one.batch_execute(&third)?;
        Ok(crossing.join().map_err(|_| anyhow!("a thread panicked"))??)
    })?;
    // (c) What they hold until they commit: locks on relations and transactions that conflict with no other producer.
    for client in [&mut one, &mut two] {
        let sql = "SELECT string_agg(DISTINCT locktype || ' ' || mode, ', ') FROM pg_locks WHERE pid = pg_backend_pid() \
                     AND NOT (locktype = 'relation' AND mode IN ('AccessShareLock', 'RowExclusiveLock')) \
                     AND locktype NOT IN ('virtualxid', 'transactionid')";
        let held: Option<String> = client.query_one(sql, &[])?.try_get(0)?;
        ensure!(held.is_none(), "a producer holds {held:?}");
        let rows: i64 = client.query_one("SELECT count(*) FROM pg_stat_xact_user_tables WHERE n_tup_upd + n_tup_del > 0", &[])?.try_get(0)?;
        ensure!(rows == 0, "a producer changes rows of {rows} tables");
    }
    two.batch_execute("COMMIT")?;
    ensure!(drain(&mut two)?.len() == 6, "the second producer's jobs wait for the first");
    one.batch_execute("COMMIT")?;
    ensure!(drain(&mut two)?.len() == 6, "jobs are missing");
    Ok(())
}

/// Pages that a statement touches.
fn pages(client: &mut Client, sql: &str) -> Result<i64> {
    let plan: Value = client.query_one(&format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}"), &[])?.try_get(0)?;
    let plan = plan.pointer("/0/Plan").cloned().unwrap_or_default();
    let of = |name: &str| plan.get(name).and_then(Value::as_i64).unwrap_or(0);
    Ok(of("Shared Hit Blocks") + of("Shared Read Blocks"))
}

/// Calls of a worker, in the order in which they are measured.
const CALLS: [&str; 6] = [
    "awa.heartbeat($job, $lease)",
    "awa.extend($job, $lease, '1 hour')",
    "awa.complete($job, $lease)",
    "awa.fail($job, $lease, 'x', retry_after => '0')",
    "awa.snooze($job, $lease, '1 hour')",
    "awa.cancel($job)",
];

/// Pages of each call on attempts of this session, and of the exact counts.
fn costs(client: &mut Client) -> Result<Vec<i64>> {
    let mut found = vec![pages(client, "SELECT * FROM awa.queue_counts()")?, pages(client, "SELECT * FROM awa.rescue_stale_heartbeats()")?];
    let attempts = claim(client, i32::try_from(CALLS.len())?)?;
    for (call, attempt) in CALLS.into_iter().zip(attempts) {
        let call = call.replace("$job", &attempt.job_id.to_string()).replace("$lease", &attempt.run_lease.to_string());
        found.push(pages(client, &format!("SELECT {call}"))?);
    }
    Ok(found)
}

// If this fails, a heartbeat or the end of one attempt takes longer the more others are running.
pub fn e09_a_call_touches_as_little_beside_many_open_claims(stage: &mut Stage<'_>) -> Result<()> {
    const OPEN: i32 = 10_000;
    let mut client = stage.connect()?;
    // Plans and catalogs come with the first calls.
    enqueue(&mut client, 3 * CALLS.len())?;
    costs(&mut client)?;
    let few = costs(&mut client)?;
    enqueue(&mut client, usize::try_from(OPEN)?)?;
    let mut open = claim(&mut client, OPEN)?.len();
    // What was put back by the measurement comes with them.
    ensure!(open >= usize::try_from(OPEN)? - CALLS.len(), "{open} are open");
    open += enqueue(&mut client, 2 * CALLS.len())?.len();
    costs(&mut client)?;
    let many = costs(&mut client)?;
    println!("        pages of counts, rescue, {CALLS:?}: {few:?} beside few, {many:?} beside {open} open claims");
    // Indexes are a level higher, and a full page is left for a new one.
    let dearer = few.iter().zip(&many).any(|(few, many)| *many > few + 12);
    ensure!(!dearer, "pages beside few open claims {few:?}, beside many {many:?}");
    // Counts and heartbeats read no page at all, and write nothing.
    ensure!([0, 2, 3].iter().all(|call| many[*call] == 0), "counts, heartbeat or extend read pages: {many:?}");
    client.batch_execute("BEGIN; SELECT count(*) FROM awa.queue_counts()")?;
    let held: i64 = client
        .query_one("SELECT count(*) FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation WHERE l.pid = pg_backend_pid() AND c.relnamespace::regnamespace::text LIKE 'awa%'", &[])?
        .try_get(0)?;
    ensure!(held == 0, "exact counts lock {held} tables");
    client.batch_execute("COMMIT")?;
    Ok(())
}
