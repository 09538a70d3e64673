//! What the server counts: log position, tuples by table, and the CPU of the machine.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use postgres::Client;

const FIRST_NORMAL_OBJECT_ID: i64 = 16_384;
const QUIET_WAIT_MAX: Duration = Duration::from_secs(10);
const CLOCK_TICKS_PER_SECOND: f64 = 100.0;

/// Cumulative, of one group of tables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tuples {
    pub inserted: i64,
    pub updated: i64,
    pub deleted: i64,
}

impl Tuples {
    pub fn since(self, before: Tuples) -> Tuples {
        Tuples {
            inserted: self.inserted - before.inserted,
            updated: self.updated - before.updated,
            deleted: self.deleted - before.deleted,
        }
    }

    /// Row versions written.
    pub fn heap_rows(self) -> i64 {
        self.inserted + self.updated
    }

    /// Row versions that vacuum will have to remove.
    pub fn made_dead(self) -> i64 {
        self.updated + self.deleted
    }
}

#[derive(Clone, Debug)]
pub struct Counters {
    pub lsn: String,
    pub lsn_bytes: i64,
    pub wal_records: i64,
    pub commits: i64,
    pub user: Tuples,
    pub catalog: Tuples,
}

pub fn counters(client: &mut Client) -> Result<Counters> {
    let row =
        client.query_one("SELECT lsn::text, pg_wal_lsn_diff(lsn, '0/0')::bigint FROM pg_current_wal_insert_lsn() AS lsn", &[])?;
    let (lsn, lsn_bytes) = (row.try_get(0)?, row.try_get(1)?);
    let wal_records = client.query_one("SELECT wal_records FROM pg_stat_wal", &[])?.try_get(0)?;
    let row = client.query_one("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()", &[])?;
    let commits = row.try_get(0)?;
    let row = client.query_one(
        "SELECT coalesce(sum(n_tup_ins) FILTER (WHERE is_user), 0)::bigint,
                coalesce(sum(n_tup_upd) FILTER (WHERE is_user), 0)::bigint,
                coalesce(sum(n_tup_del) FILTER (WHERE is_user), 0)::bigint,
                coalesce(sum(n_tup_ins) FILTER (WHERE NOT is_user), 0)::bigint,
                coalesce(sum(n_tup_upd) FILTER (WHERE NOT is_user), 0)::bigint,
                coalesce(sum(n_tup_del) FILTER (WHERE NOT is_user), 0)::bigint
           FROM (SELECT *, relid::bigint >= $1 AS is_user FROM pg_stat_all_tables) AS tables",
        &[&FIRST_NORMAL_OBJECT_ID],
    )?;
    let user = Tuples { inserted: row.try_get(0)?, updated: row.try_get(1)?, deleted: row.try_get(2)? };
    let catalog = Tuples { inserted: row.try_get(3)?, updated: row.try_get(4)?, deleted: row.try_get(5)? };
    Ok(Counters { lsn, lsn_bytes, wal_records, commits, user, catalog })
}

/// Only the log position: cheap enough for the edges of a measured window.
pub fn wal_position(client: &mut Client) -> Result<i64> {
    let row = client.query_one("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint", &[])?;
    Ok(row.try_get(0)?)
}

/// What the other sessions of this database were seen to do and to hold.
#[derive(Clone, Debug, Default)]
pub struct Sessions {
    /// What busy ones waited for, by looks; "CPU" if for nothing
    pub waits: BTreeMap<String, i64>,
    /// The most that one of them had in memory of its own, where the operating system tells
    pub backend_megabytes_most: Option<f64>,
    /// The oldest snapshot seen, in transactions behind
    pub snapshot_age_most: Option<f64>,
}

impl Sessions {
    /// One look.
    pub fn look(&mut self, client: &mut Client) -> Result<()> {
        let rows = client.query(
            "SELECT pid, CASE WHEN state = 'active' THEN coalesce(wait_event_type || '/' || wait_event, 'CPU') END,
                    age(backend_xmin)::float8
               FROM pg_stat_activity
              WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()",
            &[],
        )?;
        for row in rows {
            if let Some(wait) = row.try_get::<_, Option<String>>(1)? {
                *self.waits.entry(wait).or_insert(0) += 1;
            }
            keep_most(&mut self.backend_megabytes_most, megabytes_of(row.try_get(0)?));
            keep_most(&mut self.snapshot_age_most, row.try_get(2)?);
        }
        Ok(())
    }
}

fn keep_most(most: &mut Option<f64>, value: Option<f64>) {
    if let Some(value) = value {
        *most = Some(most.map_or(value, |most| most.max(value)));
    }
}

/// Memory of a process that it shares with nobody.
fn megabytes_of(process: i32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

pub struct DeadTuples {
    pub relation: String,
    pub is_catalog: bool,
    pub dead: i64,
}

/// Relations with dead tuples now, most first.
pub fn dead_tuples(client: &mut Client) -> Result<Vec<DeadTuples>> {
    let rows = client.query(
        "SELECT schemaname || '.' || relname, relid::bigint < $1, n_dead_tup
           FROM pg_stat_all_tables
          WHERE n_dead_tup > 0
          ORDER BY n_dead_tup DESC",
        &[&FIRST_NORMAL_OBJECT_ID],
    )?;
    rows.iter()
        .map(|row| Ok(DeadTuples { relation: row.try_get(0)?, is_catalog: row.try_get(1)?, dead: row.try_get(2)? }))
        .collect()
}

pub fn server_version(client: &mut Client) -> Result<i32> {
    let row = client.query_one("SELECT current_setting('server_version_num')::integer", &[])?;
    Ok(row.try_get(0)?)
}

/// Makes the counts of this session's work visible to others.
pub fn publish_counts(client: &mut Client) -> Result<()> {
    if server_version(client)? >= 150_000 {
        client.batch_execute("SELECT pg_stat_force_next_flush()")?;
    } else {
        sleep(Duration::from_millis(1_200)); // the collector takes counts of a session at most twice a second
        client.batch_execute("SELECT 1")?;
        sleep(Duration::from_millis(600));
    }
    Ok(())
}

/// Waits until the sessions of a load are gone: a session publishes its last counts when it ends.
pub fn wait_until_alone(client: &mut Client) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < QUIET_WAIT_MAX {
        let row = client.query_one(
            "SELECT count(*) FROM pg_stat_activity
              WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()",
            &[],
        )?;
        if row.try_get::<_, i64>(0)? == 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    bail!("other sessions are connected to this database: the benchmark needs it for itself")
}

/// CPU seconds used so far, where the operating system tells.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    machine: f64,
    client: f64,
    at: Instant,
}

impl Cpu {
    pub fn now() -> Option<Cpu> {
        let machine = fs::read_to_string("/proc/stat").ok()?;
        let fields: Vec<f64> =
            machine.lines().next()?.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; guest time is counted in user already
        let busy: f64 = fields.iter().take(8).enumerate().filter(|(n, _)| *n != 3 && *n != 4).map(|(_, t)| t).sum();
        let process = fs::read_to_string("/proc/self/stat").ok()?;
        let after_name = process.rsplit_once(')')?.1;
        let ticks: f64 = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        Some(Cpu { machine: busy / CLOCK_TICKS_PER_SECOND, client: ticks / CLOCK_TICKS_PER_SECOND, at: Instant::now() })
    }

    /// Percent of one core: (whole machine, this driver).
    pub fn percent_since(self, before: Cpu) -> (f64, f64) {
        let seconds = self.at.duration_since(before.at).as_secs_f64().max(0.001);
        (100.0 * (self.machine - before.machine) / seconds, 100.0 * (self.client - before.client) / seconds)
    }
}
