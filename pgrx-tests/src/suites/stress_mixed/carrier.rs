//! A session that empties sealed segments and brings deferred jobs back, as the maintainer would, only without a pause; it changes its mind
//! now and then, and is shot at like a worker.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use anyhow::{Result, ensure};
use postgres::{Client, Config};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::suites::races::pid_of;

/// Cancelled or terminated; in the way of a rebuild; the segment was pruned meanwhile; the queue is full.
const EXPECTED: [&str; 6] = ["57014", "57P01", "40P01", "40001", "22023", "25P02"];

pub fn run(seed: u64, config: &Config, pid: &AtomicI32, over: &AtomicBool, carried: &AtomicU64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x6361_7272);
    let mut client = connect(config, pid)?;
    while !over.load(Ordering::Relaxed) {
        match step(&mut client, &mut rng) {
            Ok(rows) => {
                carried.fetch_add(rows, Ordering::Relaxed);
            }
            Err(error) => {
                if let Some(said) = error.as_db_error() {
                    ensure!(EXPECTED.contains(&said.code().code()), "carrier: {} {}", said.code().code(), said.message());
                }
                if !client.is_closed() {
                    drop(client.batch_execute("ROLLBACK"));
                }
            }
        }
        if client.is_closed() {
            client = connect(config, pid)?;
        }
    }
    pid.store(0, Ordering::Relaxed);
    Ok(())
}

fn connect(config: &Config, pid: &AtomicI32) -> Result<Client> {
    let mut client = super::connect(config)?;
    client.batch_execute("SET awa.prune_grace = 0; SET deadlock_timeout = '100ms'")?;
    pid.store(pid_of(&mut client)?, Ordering::Relaxed);
    Ok(client)
}

fn step(client: &mut Client, rng: &mut StdRng) -> Result<u64, postgres::Error> {
    if rng.random_ratio(1, 6) {
        client.batch_execute("SELECT awa.promote_deferred()")?;
    }
    let sealed = client.query("SELECT generation FROM awa.stat_segments WHERE state = 'sealed' ORDER BY generation", &[])?;
    if sealed.len() < 2 {
        client.batch_execute("SELECT awa.rotate()")?;
    }
    // The oldest most of the time, so that it can be pruned.
    let choice = if rng.random_ratio(2, 3) { 0 } else { rng.random_range(0..sealed.len().max(1)) };
    let Some(generation) = sealed.get(choice).map(|row| row.try_get::<_, i64>(0)).transpose()? else { return Ok(0) };
    let carry = "SELECT coalesce(sum(rows), 0)::bigint FROM awa.carry_forward($1)";
    let (begin, end) = match rng.random_range(0..10) {
        0..=5 => ("", ""),
        6 => ("BEGIN", "ROLLBACK"),
        7 => ("BEGIN; SAVEPOINT s", "ROLLBACK TO s; COMMIT"),
        8 => ("BEGIN; SAVEPOINT s", "RELEASE s; COMMIT"),
        _ => ("BEGIN", "SELECT pg_sleep(0.01); COMMIT"),
    };
    client.batch_execute(begin)?;
    let rows: i64 = client.query_one(carry, &[&generation])?.try_get(0)?;
    client.batch_execute(end)?;
    client.batch_execute("SELECT awa.prune()")?;
    Ok(if end.contains("ROLLBACK") { 0 } else { rows.max(0) as u64 })
}
