//! The demonstration: a few thousand real files go through a real cluster, and everything is checked afterwards.
//!
//! Each job is a file of the installed PostgreSQL or of this repository. Eight sessions read the files and store size,
//! line count and SHA-256 in the same transaction that completes the job. Some inputs do not exist and go through
//! retries until they are failed; one session is killed in the middle of a transaction; one transaction with enqueued
//! jobs is rolled back. At the end the table is compared with a direct computation.

mod check;
mod inputs;
mod worker;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use postgres::{Config, NoTls};

use crate::build::{Profile, build};
use crate::cluster::{Cluster, Options};
use crate::layout::Layout;
use crate::tree::{Server, Tree};

pub const WORKERS: usize = 8;
const PRODUCERS: usize = 2;
/// Jobs in one enqueuing transaction.
const ENQUEUE_BATCH: usize = 64;
const STALL_LIMIT: Duration = Duration::from_secs(60);

const SETUP: &str = "
    CREATE TABLE demo_files (
        job_id  bigint  NOT NULL,
        path    text    NOT NULL,
        bytes   bigint  NOT NULL,
        lines   bigint  NOT NULL,
        sha256  text    NOT NULL,
        worker  integer NOT NULL,
        attempt integer NOT NULL
    );
    SELECT awa.create_queue('files', max_attempts => 3, backoff => '100 ms', deadline => '5 seconds')";

/// What the threads share. The durable truth is in the database; this is how the harness knows when to stop.
pub struct Shared {
    config: Config,
    /// Jobs of committed transactions, by identifier.
    enqueued: Mutex<BTreeSet<i64>>,
    rolled_back: Mutex<BTreeSet<i64>>,
    expected: u64,
    completed: AtomicU64,
    retries: AtomicU64,
    dead: AtomicU64,
    producing: AtomicBool,
    victim_killed: AtomicBool,
    /// Claimed, unfinished jobs of the killed session, with the leases it held.
    abort: AtomicBool,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.abort.load(Ordering::Relaxed)
            || (!self.producing.load(Ordering::Acquire) && self.finished() >= self.enqueued_count())
    }

    fn finished(&self) -> u64 {
        self.completed.load(Ordering::Acquire) + self.dead.load(Ordering::Acquire)
    }

    fn enqueued_count(&self) -> u64 {
        lock(&self.enqueued).len() as u64
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub fn run(layout: &Layout, server: Server, profile: Profile, skip_build: bool) -> Result<()> {
    let tree = Tree::provide(layout, server)?;
    let built = build(layout, &tree, profile, skip_build)?;
    tree.install(layout, &built)?;
    let mut cluster = Cluster::create(
        layout,
        &tree,
        &Options::new(&format!("demo-{}", server.name())).set("awa.maintenance", "on").fsync(true),
    )?;
    cluster.start()?;
    cluster.create_database("demo")?;

    let inputs = inputs::collect(layout, &tree)?;
    let shared = Shared {
        config: cluster.config("demo"),
        enqueued: Mutex::default(),
        rolled_back: Mutex::default(),
        expected: inputs.all().len() as u64,
        completed: AtomicU64::new(0),
        retries: AtomicU64::new(0),
        dead: AtomicU64::new(0),
        producing: AtomicBool::new(true),
        victim_killed: AtomicBool::new(false),
        abort: AtomicBool::new(false),
    };
    let mut client = shared.config.connect(NoTls)?;
    let version: String = client.query_one("SHOW server_version", &[])?.try_get(0)?;
    let extension: String = client.query_one("SELECT awa.version()", &[])?.try_get(0)?;
    println!("PostgreSQL {version}, awa_queue {extension}, fsync on, synchronous_commit on");
    println!("inputs: {}", inputs.describe());
    client.batch_execute(SETUP).context("cannot create the table and the queue of the demo")?;

    let started = Instant::now();
    let outcome = work(&shared, &inputs.all());
    let took = started.elapsed();
    if let Err(error) = outcome {
        println!("the server's log ends with\n{}", cluster.log_tail(20)?);
        return Err(error);
    }
    let finished = shared.finished();
    println!(
        "{finished} jobs in {:.2} s: {:.0} jobs a second, each with its own durable commit; {} attempts were retried",
        took.as_secs_f64(),
        finished as f64 / took.as_secs_f64(),
        shared.retries.load(Ordering::Relaxed)
    );
    let rescued: i64 = client.query_one("SELECT rescued FROM awa.stat_queue WHERE queue = 'files'", &[])?.try_get(0)?;
    println!("the maintainer, a background worker of the server, gave back {rescued} attempts whose worker was gone");
    let found = check::check(&mut client, &shared, &inputs, started)?;
    cluster.stop(crate::cluster::Shutdown::Fast)?;
    let passed = found.report();
    println!("{}", found.last_line());
    if !passed {
        bail!("the demo found differences");
    }
    Ok(())
}

/// Runs producers and workers to the end; the first error stops all of them.
fn work(shared: &Shared, all: &[PathBuf]) -> Result<()> {
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in 1..=WORKERS {
            threads.push(
                scope.spawn(move || stopping(shared, || worker::run(shared, number).with_context(|| format!("worker {number}")))),
            );
        }
        let share = all.len().div_ceil(PRODUCERS).max(1);
        let producers: Vec<_> = all
            .chunks(share)
            .enumerate()
            .map(|(index, part)| scope.spawn(move || stopping(shared, || produce(shared, part, index == 0).context("producer"))))
            .collect();
        threads.push(scope.spawn(move || {
            let results: Vec<Result<()>> = producers.into_iter().map(joined).collect();
            shared.producing.store(false, Ordering::Release);
            results.into_iter().collect()
        }));
        watch(shared);
        threads.into_iter().try_for_each(joined)
    })
}

fn joined(thread: thread::ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the demo panicked")))
}

/// Stops all threads when `work` fails or panics.
fn stopping(shared: &Shared, work: impl FnOnce() -> Result<()>) -> Result<()> {
    struct Guard<'a>(&'a AtomicBool, bool);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            if !self.1 {
                self.0.store(true, Ordering::Relaxed);
            }
        }
    }
    let mut guard = Guard(&shared.abort, false);
    let result = work();
    guard.1 = result.is_ok();
    result
}

/// Prints progress once a second, and stops everything when nothing has moved for a long time.
fn watch(shared: &Shared) {
    let started = Instant::now();
    let mut moved = (0, Instant::now());
    let mut printed = Instant::now();
    while !shared.is_over() {
        thread::sleep(Duration::from_millis(20));
        let finished = shared.finished();
        if finished != moved.0 {
            moved = (finished, Instant::now());
        }
        if moved.1.elapsed() > STALL_LIMIT {
            println!("nothing has moved for {STALL_LIMIT:?}: giving up");
            shared.abort.store(true, Ordering::Relaxed);
        }
        if printed.elapsed() >= Duration::from_secs(1) {
            printed = Instant::now();
            println!(
                "{:5.1} s  enqueued {:5} of {}  completed {:5}  retries {:3}  dead {:3}",
                started.elapsed().as_secs_f64(),
                shared.enqueued_count(),
                shared.expected,
                shared.completed.load(Ordering::Relaxed),
                shared.retries.load(Ordering::Relaxed),
                shared.dead.load(Ordering::Relaxed),
            );
        }
    }
}

/// Enqueues its part in transactions; the first producer also rolls one back in the middle.
fn produce(shared: &Shared, paths: &[PathBuf], rolls_back: bool) -> Result<()> {
    let mut client = shared.config.connect(NoTls)?;
    let statement = client.prepare("SELECT awa.enqueue_many('files', 'digest', $1)")?;
    let batches: Vec<&[PathBuf]> = paths.chunks(ENQUEUE_BATCH).collect();
    for (index, batch) in batches.iter().enumerate() {
        if shared.abort.load(Ordering::Relaxed) {
            return Ok(());
        }
        let args: Vec<serde_json::Value> = batch.iter().map(|path| serde_json::json!({ "path": path })).collect();
        if rolls_back && index == batches.len() / 2 {
            // The same paths as of the transaction that follows: jobs that leaked would show up twice.
            let mut transaction = client.transaction()?;
            let ids: Vec<i64> = transaction.query_one(&statement, &[&args])?.try_get(0)?;
            println!("producer: rolls back a transaction with {} enqueued jobs", ids.len());
            transaction.rollback()?;
            lock(&shared.rolled_back).extend(ids);
        }
        let mut transaction = client.transaction()?;
        let ids: Vec<i64> = transaction.query_one(&statement, &[&args])?.try_get(0)?;
        if ids.len() != batch.len() {
            bail!("enqueue_many returned {} identifiers for {} jobs", ids.len(), batch.len());
        }
        // Before the commit, or a worker may finish them first; a failed commit ends the demo anyway.
        lock(&shared.enqueued).extend(ids);
        transaction.commit()?;
    }
    Ok(())
}
