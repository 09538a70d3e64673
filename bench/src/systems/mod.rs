//! What is measured: each system offers the same verbs over prepared statements and autocommit.
//!
//! The systems beside ours come from their package registries (`bench/peers/install.sh`); what a system cannot do, and one
//! that is not there, is said in the tables.

mod awa;
mod awa_client;
mod graphile_worker;
mod helper;
mod pg_boss;
mod pgmq;
mod pgq;
mod procrastinate;
mod skip_locked;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use postgres::{Client, NoTls};

pub use self::helper::Helper;
use crate::payload::Payload;

pub const KIND: &str = "bench";
const BULK_ROWS_PER_STATEMENT: u64 = 1_000;
/// In the statements that a peer made for us, this stands for the size of a batch.
const BATCH_PLACEHOLDER: &str = "987654321";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SystemName {
    Awa,
    SkipLocked,
    SkipLockedKeep,
    Pgmq,
    PgmqArchive,
    Pgq,
    Procrastinate,
    GraphileWorker,
    PgBoss,
    AwaClient,
}

impl SystemName {
    pub fn as_str(self) -> &'static str {
        match self {
            SystemName::Awa => "awa",
            SystemName::SkipLocked => "skip_locked",
            SystemName::SkipLockedKeep => "skip_locked_keep",
            SystemName::Pgmq => "pgmq",
            SystemName::PgmqArchive => "pgmq_archive",
            SystemName::Pgq => "pgq",
            SystemName::Procrastinate => "procrastinate",
            SystemName::GraphileWorker => "graphile_worker",
            SystemName::PgBoss => "pg_boss",
            SystemName::AwaClient => "awa_client",
        }
    }

    /// Its directory under `target/peers`, when it comes from a registry.
    pub fn package(self) -> Option<&'static str> {
        match self {
            SystemName::Awa | SystemName::SkipLocked | SystemName::SkipLockedKeep => None,
            SystemName::Pgmq | SystemName::PgmqArchive => Some("pgmq"),
            SystemName::Pgq
            | SystemName::Procrastinate
            | SystemName::GraphileWorker
            | SystemName::PgBoss
            | SystemName::AwaClient => Some(self.as_str()),
        }
    }

    pub fn system(self, peers: &Path) -> Box<dyn System> {
        let package = Package { dir: peers.join(self.package().unwrap_or_default()) };
        match self {
            SystemName::Awa => Box::new(awa::Awa),
            SystemName::SkipLocked => Box::new(skip_locked::SkipLocked::new(false)),
            SystemName::SkipLockedKeep => Box::new(skip_locked::SkipLocked::new(true)),
            SystemName::Pgmq => Box::new(pgmq::Pgmq { package, archive: false }),
            SystemName::PgmqArchive => Box::new(pgmq::Pgmq { package, archive: true }),
            SystemName::Pgq => Box::new(pgq::Pgq::new(package)),
            SystemName::Procrastinate => Box::new(procrastinate::Procrastinate { package }),
            SystemName::GraphileWorker => Box::new(graphile_worker::GraphileWorker { package }),
            SystemName::PgBoss => Box::new(pg_boss::PgBoss { package }),
            SystemName::AwaClient => Box::new(awa_client::AwaClient::new(package)),
        }
    }

    /// The installed version, or why there is none.
    pub fn installed(self, peers: &Path) -> Result<String, String> {
        let Some(name) = self.package() else { return Ok(String::new()) };
        let read = |file: &str| fs::read_to_string(peers.join(name).join(file)).map(|text| text.trim().to_owned());
        match (read("version"), read("failed")) {
            (Ok(version), _) => Ok(version),
            (_, Ok(reason)) => Err(format!("not installed: {reason}")),
            _ => Err("not installed: run bench/peers/install.sh".to_owned()),
        }
    }
}

/// The unpacked package of a peer.
pub struct Package {
    dir: PathBuf,
}

impl Package {
    fn read(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// What not every system can do. The reason is shown in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// Complete a batch and claim the next in one statement
    OneCallCycle,
    /// A claim returns as many jobs as were asked for, if there are
    ClaimSize,
    /// Jobs that become due later
    Schedule,
    /// A session may claim again before it has completed what it claimed first
    OpenClaims,
    /// All verbs are statements of one session, so that what they cost can be told apart
    SqlSession,
}

/// When the rows of a bulk load may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Now,
    /// Spread over one hour, from one hour ahead
    Later,
}

#[derive(Clone, Copy, Debug)]
pub struct Claimed {
    pub job_id: i64,
    /// The fence of the attempt: a lease, or the attempt number; or what else the system wants back
    pub lease: i64,
}

/// What a session does beyond the plain verbs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Claims carry a deadline of so many seconds.
    pub deadline: Option<u32>,
    /// A worker that finds nothing sleeps in the server, where the system offers that.
    pub wait: bool,
    /// Jobs that all workers of the load may hold at a time; 0 when there is no load.
    pub in_flight: usize,
    /// Note when each job was enqueued, claimed and completed: it costs the driver a little.
    pub times: bool,
}

pub trait System: Send + Sync {
    fn name(&self) -> SystemName;

    /// What it keeps and what it drops, in a line, for the reader of a table.
    fn contract(&self) -> &'static str;

    /// Why it cannot do this, if it cannot.
    fn lacks(&self, _: Ability) -> Option<&'static str> {
        None
    }

    /// As clean a slate as the system offers.
    fn reset(&self, client: &mut Client) -> Result<()>;

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()>;

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()>;

    /// A process that the system needs beside producers and workers while they run.
    fn helper(&self, _url: &str, _queue: &str) -> Result<Option<Helper>> {
        Ok(None)
    }

    fn connect(&self, url: &str, queue: &str) -> Result<Box<dyn Session>> {
        self.connect_with(url, queue, Wishes::default())
    }

    fn connect_with(&self, url: &str, queue: &str, wishes: Wishes) -> Result<Box<dyn Session>>;

    /// Bytes of the tables and indexes that hold jobs.
    fn bytes(&self, client: &mut Client) -> Result<i64>;

    /// The table that the queue's jobs are in now.
    fn hot_table(&self, client: &mut Client, queue: &str) -> Result<String>;

    /// Enqueues `$3` jobs of kind `$2` in queue `$1`, due later if `$4`; in the open transaction, or in one of each statement.
    fn bulk_statement(&self) -> Result<String>;

    /// Ids of the jobs that are not finished, by the server's own account.
    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>>;

    /// Number of finished jobs by the server's own account, where it keeps one.
    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>>;

    /// Problems found by the system's own check.
    fn verify(&self, _: &mut Client) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn bulk_load(&self, client: &mut Client, queue: &str, count: u64, due: Due) -> Result<()> {
        let statement = client.prepare(&self.bulk_statement()?)?;
        let later = due == Due::Later;
        let mut first = 0;
        while first < count {
            let rows = i32::try_from(BULK_ROWS_PER_STATEMENT.min(count - first))?;
            client.execute(&statement, &[&queue, &KIND, &rows, &later])?;
            first += BULK_ROWS_PER_STATEMENT;
        }
        Ok(())
    }
}

/// One connection. A batch of one job uses the single-job statement.
pub trait Session: Send {
    fn client(&mut self) -> &mut Client;

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>>;

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>>;

    /// The ids whose completion the server acknowledged.
    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>>;

    /// Sleeps because nothing was found.
    fn idle(&mut self, pause: Duration) -> Result<()> {
        thread::sleep(pause);
        Ok(())
    }

    /// Completes `jobs` and claims the next batch in one call, where the system offers that; in two otherwise.
    fn complete_and_claim(&mut self, jobs: &[Claimed], batch_size: i32) -> Result<Vec<Claimed>> {
        self.complete(jobs)?;
        self.claim(batch_size)
    }
}

pub fn connect(url: &str) -> Result<Client> {
    Client::connect(url, NoTls).context("cannot connect")
}

/// Rows that must survive the run, not its crash: the load itself is not what is measured.
pub fn connect_loader(url: &str) -> Result<Client> {
    let mut client = connect(url)?;
    client.batch_execute("SET synchronous_commit = off")?;
    Ok(client)
}

fn job_ids(jobs: &[Claimed]) -> Vec<i64> {
    jobs.iter().map(|job| job.job_id).collect()
}

/// The first column of each row.
fn ids(rows: &[postgres::Row]) -> Result<Vec<i64>> {
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

fn schema_bytes(client: &mut Client, schema: &str) -> Result<i64> {
    let row = client.query_one(
        "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
           FROM pg_class AS c
          WHERE c.relkind = 'r' AND c.relnamespace = to_regnamespace($1::text)",
        &[&schema],
    )?;
    Ok(row.try_get(0)?)
}

/// Drops the schema of a system and runs the script that makes it.
fn reinstall(client: &mut Client, schema: &str, script: &str) -> Result<()> {
    client.batch_execute("SET client_min_messages = warning")?;
    client.batch_execute(&format!("DROP SCHEMA IF EXISTS {schema} CASCADE"))?;
    client.batch_execute(script).with_context(|| format!("cannot create the schema {schema}"))?;
    client.batch_execute("CHECKPOINT")?;
    Ok(())
}
