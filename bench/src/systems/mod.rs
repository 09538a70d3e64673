//! What is measured: each system offers the same verbs over prepared statements and autocommit.

mod awa;
mod skip_locked;

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use postgres::{Client, NoTls};

use crate::payload::Payload;

pub const KIND: &str = "bench";
const BULK_ROWS_PER_STATEMENT: u64 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SystemName {
    Awa,
    SkipLocked,
}

impl SystemName {
    pub fn as_str(self) -> &'static str {
        match self {
            SystemName::Awa => "awa",
            SystemName::SkipLocked => "skip_locked",
        }
    }

    pub fn system(self) -> Box<dyn System> {
        match self {
            SystemName::Awa => Box::new(awa::Awa),
            SystemName::SkipLocked => Box::new(skip_locked::SkipLocked),
        }
    }
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
    /// The fence of the attempt: a lease, or the attempt number
    pub lease: i64,
    /// From the time at which the job was to run, by the server's clock, to the claim.
    pub pickup_ms: f64,
}

/// What a session does beyond the plain verbs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Claims carry a deadline of so many seconds.
    pub deadline: Option<u32>,
    /// A worker that finds nothing sleeps in the server, where the system offers that.
    pub wait: bool,
    /// Claims tell how long each job was due: it costs the server a little.
    pub pickup: bool,
}

impl Wishes {
    /// The column of `Claimed::pickup_ms`.
    fn pickup_column(self) -> &'static str {
        if self.pickup { "(extract(epoch FROM clock_timestamp() - run_at) * 1000)::float8" } else { "0::float8" }
    }
}

pub trait System: Send + Sync {
    fn name(&self) -> SystemName;

    /// As clean a slate as the system offers.
    fn reset(&self, client: &mut Client) -> Result<()>;

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()>;

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()>;

    fn connect(&self, url: &str, queue: &str) -> Result<Box<dyn Session>> {
        self.connect_with(url, queue, Wishes::default())
    }

    fn connect_with(&self, url: &str, queue: &str, wishes: Wishes) -> Result<Box<dyn Session>>;

    /// Bytes of the tables and indexes that hold jobs.
    fn bytes(&self, client: &mut Client) -> Result<i64>;

    /// Enqueues `count` jobs in the open transaction, or in one of each statement.
    fn bulk_statement(&self) -> &'static str;

    /// Ids of the jobs that are not finished, by the server's own account.
    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>>;

    /// Number of finished jobs by the server's own account, where it keeps one.
    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>>;

    /// Problems found by the system's own check.
    fn verify(&self, client: &mut Client) -> Result<Vec<String>>;

    fn bulk_load(&self, client: &mut Client, queue: &str, count: u64, due: Due) -> Result<()> {
        let statement = client.prepare(self.bulk_statement())?;
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

    /// Completes `jobs` and claims the next batch in one call.
    fn complete_and_claim(&mut self, jobs: &[Claimed], batch_size: i32) -> Result<Vec<Claimed>>;
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
