//! Twelve sessions do everything at once, at random, and are cancelled and killed while they do it. The clients keep their own books:
//! at the end each acknowledged job has had exactly one end, and log and frontier tell the same story, before and after a rebuild.
//!
//! `AWA_SEED` repeats the choices of a run (not the order in which the server meets them), `AWA_STRESS_STEPS` makes it longer,
//! `AWA_JITTER=100` lets sessions stumble at one in a hundred places, `AWA_CLOCK_STEPS=1` sets the clock, in every test of the suite.

mod actions;
mod book;
mod carrier;
mod operator;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use postgres::{Client, NoTls};

use self::book::Book;
use self::worker::Worker;
use super::witnesses::maintenance_rests;
use super::Stage;
use crate::points;
use crate::process::wait_until;

const WORKERS: usize = 12;
pub const QUEUES: [&str; 3] = ["q", "second", "third"];

/// A number from the environment, for longer runs and for repeating one.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What the operator may do besides cancelling and killing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mischief {
    None,
    /// Rotate, prune, pause, alter, cancel and terminate.
    Usual,
    /// The same, and rebuilds.
    Rebuilds,
    /// The same, and jobs are carried out of their segments all the time.
    Carries,
}

// If this fails, jobs are lost, run twice, or counted wrongly in ordinary use with failures.
pub fn every_acknowledged_job_has_one_end(stage: &mut Stage<'_>) -> Result<()> {
    run(stage, Mischief::Usual)
}

// If this fails, it does even when nobody is cancelled or killed and the ring stands still.
pub fn every_acknowledged_job_has_one_end_in_quiet_times(stage: &mut Stage<'_>) -> Result<()> {
    run(stage, Mischief::None)
}

// If this fails, an operator cannot rebuild while the queue is in use.
pub fn every_acknowledged_job_has_one_end_over_rebuilds(stage: &mut Stage<'_>) -> Result<()> {
    run(stage, Mischief::Rebuilds)
}

// If this fails, jobs are lost or doubled, or workers lose their leases, when segments are emptied under them.
pub fn every_acknowledged_job_has_one_end_while_segments_are_emptied(stage: &mut Stage<'_>) -> Result<()> {
    // Whatever is due in more than two seconds waits outside the ring.
    configured(stage, &[("awa.deferral", "2s")], |stage| run(stage, Mischief::Carries))
}

// If this fails, the maintainer, which does everything by itself and all the time, harms jobs.
pub fn every_acknowledged_job_has_one_end_under_maintenance(stage: &mut Stage<'_>) -> Result<()> {
    configured(stage, &HASTY, |stage| run(stage, Mischief::Carries))
}

// If this fails, there is an order of events that is rare on this machine, and not on another, in which jobs are lost or doubled.
pub fn every_acknowledged_job_has_one_end_when_everybody_stumbles(stage: &mut Stage<'_>) -> Result<()> {
    configured(stage, &HASTY, |stage| run_on(stage, Mischief::Carries, Ground { jitter: number("AWA_JITTER", 200), ..Ground::usual() }))
}

// If this fails, a clock that is set back or forward loses jobs, doubles them, or leaves them where nobody comes.
pub fn every_acknowledged_job_has_one_end_while_the_clock_steps(stage: &mut Stage<'_>) -> Result<()> {
    configured(stage, &HASTY, |stage| run_on(stage, Mischief::Carries, Ground { clock_steps: true, ..Ground::usual() }))
}

/// A maintainer that never rests.
pub const HASTY: [(&str, &str); 7] = [
    ("awa.maintenance", "on"),
    ("awa.maintenance_interval", "10ms"),
    ("awa.rotate_age", "1s"),
    ("awa.rotate_size", "1MB"),
    ("awa.ring_segments", "4"),
    ("awa.prune_grace", "0"),
    ("awa.deferral", "2s"),
];

/// Runs with other settings of the server, and puts them back.
pub fn configured(stage: &mut Stage<'_>, settings: &[(&str, &str)], body: impl FnOnce(&mut Stage<'_>) -> Result<()>) -> Result<()> {
    let mut client = stage.connect()?;
    for (name, value) in settings {
        client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
    }
    client.batch_execute("SELECT pg_reload_conf()")?;
    drop(client);
    // A case that has failed may have left no server behind.
    body(stage)?;
    let mut client = stage.connect()?;
    for (name, _) in settings {
        client.batch_execute(&format!("ALTER SYSTEM RESET {name}"))?;
    }
    client.batch_execute("SELECT pg_reload_conf()")?;
    Ok(())
}

fn run(stage: &mut Stage<'_>, mischief: Mischief) -> Result<()> {
    run_on(stage, mischief, Ground::usual())
}

/// What is uncertain below everybody's feet.
#[derive(Clone, Copy)]
struct Ground {
    /// At one in so many of the places where a point or a fault could be, a session sleeps for up to `AWA_JITTER_US`; 0 for nowhere.
    jitter: u64,
    /// The operator sets the clock, by up to an hour.
    clock_steps: bool,
}

impl Ground {
    fn usual() -> Self {
        Self { jitter: number("AWA_JITTER", 0), clock_steps: number("AWA_CLOCK_STEPS", 0) != 0 }
    }

    fn moves(self) -> bool {
        self.jitter != 0 || self.clock_steps
    }
}

fn run_on(stage: &mut Stage<'_>, mischief: Mischief, ground: Ground) -> Result<()> {
    let result = play(stage, mischief, ground);
    // Clock and jitter are the server's, and other tests follow. One that has failed may have left no server behind.
    if ground.moves()
        && let Ok(mut client) = stage.connect()
    {
        points::disarm_all(&mut client)?;
    }
    result
}

fn play(stage: &mut Stage<'_>, mischief: Mischief, ground: Ground) -> Result<()> {
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let steps = number("AWA_STRESS_STEPS", 250);
    println!("        stress_mixed: AWA_SEED={seed} AWA_STRESS_STEPS={steps}");
    stage.connect()?.batch_execute("SELECT awa.create_queue('second', max_attempts => 3), awa.create_queue('third', backoff => '10 ms', dead_letters => true)")?;
    // The kind is known before any snapshot that a worker will keep.
    stage.connect()?.batch_execute("SELECT awa.cancel(awa.enqueue('q', 'stress'))")?;
    if ground.moves() {
        let mut client = stage.connect()?;
        points::create(&mut client)?;
        client.batch_execute(&format!("SELECT awa_points.jitter({}, {})", ground.jitter, number("AWA_JITTER_US", 2000)))?;
    }
    let book = Book::default();
    book.far.store(mischief == Mischief::Carries, Ordering::Relaxed);
    let carried = AtomicU64::new(0);
    let pids: Vec<AtomicI32> = (0..=WORKERS).map(|_| AtomicI32::new(0)).collect();
    let config = stage.config();
    let over = AtomicBool::new(false);
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let workers: Vec<_> = pids
            .iter()
            .take(WORKERS)
            .enumerate()
            .map(|(number, pid)| {
                let (book, config) = (&book, &config);
                let builder = thread::Builder::new().name(format!("worker {number}"));
                builder.spawn_scoped(scope, move || Worker::new(seed, number, book, config, pid)?.run(steps))
            })
            .collect();
        let operator = (mischief != Mischief::None).then(|| scope.spawn(|| operator::run(seed, mischief, ground.clock_steps, &config, &pids, &over)));
        let carrier = pids.get(WORKERS).filter(|_| mischief == Mischief::Carries);
        let carrier = carrier.map(|pid| scope.spawn(|| carrier::run(seed, &config, pid, &over, &carried)));
        let mut results: Vec<Result<()>> = Vec::new();
        for worker in workers {
            results.push(match worker {
                Ok(worker) => worker.join().unwrap_or_else(|_| Err(anyhow!("a worker panicked"))),
                Err(error) => Err(error.into()),
            });
        }
        over.store(true, Ordering::Relaxed);
        results.extend(operator.map(|operator| operator.join().unwrap_or_else(|_| Err(anyhow!("the operator panicked")))));
        results.extend(carrier.map(|carrier| carrier.join().unwrap_or_else(|_| Err(anyhow!("the carrier panicked")))));
        results
    });
    results.into_iter().collect::<Result<Vec<()>>>()?;
    if ground.moves() {
        points::disarm_all(&mut stage.connect()?)?;
        // What was put off while the clock was ahead is due by that clock.
        let later = if ground.clock_steps { 7_200_000_000_i64 } else { 0 };
        stage.connect()?.execute("SELECT awa_points.set_clock($1)", &[&later])?;
    }
    stage.connect()?.batch_execute(&QUEUES.map(|queue| format!("SELECT awa.resume_queue('{queue}');")).concat())?;
    settle(stage)?;
    stage.verify_clean()?;
    if mischief == Mischief::Carries {
        println!("        {} jobs were carried", carried.load(Ordering::Relaxed));
        ensure!(carried.load(Ordering::Relaxed) > 0, "nothing was carried");
    }
    // A prune between the two counts would take finished jobs with it.
    let mut client = stage.connect()?;
    if client.query_one("SHOW awa.maintenance", &[])?.try_get::<_, String>(0)? == "on" {
        maintenance_rests(&mut client)?;
    }
    let before = counts(stage)?;
    client.batch_execute("SELECT awa.rebuild()")?;
    stage.verify_clean()?;
    let after = counts(stage)?;
    ensure!(before == after, "counts before the rebuild\n{before:#?}\nand after it\n{after:#?}");
    book.finish_open_attempts(&mut stage.connect()?)?;
    drain(&book, &mut stage.connect()?)?;
    stage.verify_clean()?;
    book.check_history(&history(stage)?)?;
    book.balance()
}

/// Identifiers of all finished jobs that are shown, wherever they lie.
fn history(stage: &Stage<'_>) -> Result<Vec<i64>> {
    let sql = "SELECT job_id FROM awa.terminal_jobs UNION ALL SELECT job_id FROM awa.dlq";
    let rows = stage.connect()?.query(sql, &[])?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

/// Killed sessions may take a moment to go.
fn settle(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let gone = wait_until(Duration::from_secs(30), || {
        let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
        client.query_one(others, &[]).is_ok_and(|row| row.try_get::<_, i64>(0).is_ok_and(|count| count == 0))
    });
    ensure!(gone, "sessions of workers are still there");
    Ok(())
}

fn counts(stage: &Stage<'_>) -> Result<Vec<String>> {
    let rows = stage.connect()?.query("SELECT c::text FROM awa.queue_counts() AS c ORDER BY queue", &[])?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

/// Claims and completes until no job is left, those of the near future included.
fn drain(book: &Book, client: &mut Client) -> Result<()> {
    let claim = "SELECT job_id, run_lease, attempt, (args ->> 't')::bigint FROM awa.claim($1::text[], 64)";
    let mut failure = None;
    let empty = wait_until(Duration::from_secs(60), || {
        let mut round = || -> Result<bool> {
            let since = book.now();
            client.batch_execute("SELECT awa.promote_deferred()")?;
            let rows = client.query(claim, &[&QUEUES.as_slice()])?;
            for row in &rows {
                let attempt = book.delivered(row, since)?;
                client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease])?;
                book.drained(attempt);
            }
            Ok(rows.is_empty() && client.query_one("SELECT count(*) FROM awa.jobs", &[])?.try_get::<_, i64>(0)? == 0)
        };
        round().unwrap_or_else(|error| {
            failure = Some(error);
            true
        })
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let left = client.query("SELECT j::text FROM awa.jobs AS j LIMIT 10", &[])?;
    let left: Vec<String> = left.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(empty, "jobs that never come out:\n{}", left.join("\n"));
    Ok(())
}

pub fn connect(config: &postgres::Config) -> Result<Client> {
    Ok(config.connect(NoTls)?)
}
