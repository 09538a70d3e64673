//! A load before, beside and after what pins the MVCC horizon: an idle transaction, or readers of the hot table.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::counters::{self, DeadTuples};
use crate::load::{self, Cycle, Phase, PhaseResult, Shape};
use crate::report::{Measurement, Recorder};
use crate::scenarios::check_account;
use crate::stats;
use crate::systems::{Helper, System, SystemName, Wishes, connect};

const WARM_UP: &str = "warm-up";
const CLEAN: &str = "clean";
const CATALOGS: [&str; 3] = ["pg_catalog.pg_class", "pg_catalog.pg_attribute", "pg_catalog.pg_statistic"];
const RELATIONS_SHOWN_MAX: usize = 8;
const READERS: usize = 4;
const READER_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct PinnedArgs {
    /// Seconds before the snapshot is taken, after a warm-up
    #[arg(long, default_value_t = 30.0)]
    clean: f64,
    /// Seconds with the snapshot held (--seconds says the same)
    #[arg(long, default_value_t = 300.0)]
    pinned: f64,
    /// Seconds after it is gone
    #[arg(long, default_value_t = 10.0)]
    recovery: f64,
    #[command(flatten)]
    load: LoadArgs,
    /// Jobs a second offered; 0: saturation
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
}

#[derive(Args)]
pub struct LongArgs {
    /// Seconds of each phase but the warm-up (--seconds says the same)
    #[arg(long, default_value_t = 600.0)]
    phase: f64,
    #[command(flatten)]
    load: LoadArgs,
    /// Jobs a second offered
    #[arg(long, default_value_t = 800.0)]
    rate: f64,
}

#[derive(Args)]
struct LoadArgs {
    #[arg(long, default_value_t = 5.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Seconds of the end of a phase that are compared with the clean phase
    #[arg(long, default_value_t = 60.0)]
    last: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    Nothing,
    /// A REPEATABLE READ transaction with an xid and a snapshot, which does nothing
    IdleTransaction,
    /// Four REPEATABLE READ transactions that never end and count the rows of the hot table ten times a second
    Readers,
}

struct Step {
    label: &'static str,
    seconds: f64,
    disturbance: Disturbance,
}

impl Step {
    fn new(label: &'static str, seconds: f64, disturbance: Disturbance) -> Step {
        Step { label, seconds, disturbance }
    }
}

/// What is there at the end of a phase.
struct Edge {
    dead: Vec<DeadTuples>,
    bytes: i64,
}

/// Held while a phase lasts.
#[derive(Default)]
struct Held {
    transaction: Option<Client>,
    readers: Vec<Helper>,
}

pub fn pinned(target: &Target, args: &PinnedArgs, recorder: &mut Recorder) -> Result<()> {
    let steps = [
        Step::new(WARM_UP, args.load.warm_up, Disturbance::Nothing),
        Step::new(CLEAN, args.clean, Disturbance::Nothing),
        Step::new("pinned", target.window(args.pinned), Disturbance::IdleTransaction),
        Step::new("recovery", args.recovery, Disturbance::Nothing),
    ];
    for &name in &target.systems {
        one_system(target, &args.load, args.rate, name, "pinned-horizon", &steps, recorder)?;
    }
    Ok(())
}

pub fn long(target: &Target, args: &LongArgs, recorder: &mut Recorder) -> Result<()> {
    let seconds = target.window(args.phase);
    let steps = [
        Step::new(WARM_UP, args.load.warm_up, Disturbance::Nothing),
        Step::new(CLEAN, seconds, Disturbance::Nothing),
        Step::new("idle transaction", seconds, Disturbance::IdleTransaction),
        Step::new("recovery", seconds, Disturbance::Nothing),
        Step::new("active readers", seconds, Disturbance::Readers),
        Step::new("second recovery", seconds, Disturbance::Nothing),
    ];
    for &name in &target.systems {
        one_system(target, &args.load, args.rate, name, "long-horizon", &steps, recorder)?;
    }
    Ok(())
}

fn one_system(
    target: &Target,
    args: &LoadArgs,
    rate: f64,
    name: SystemName,
    scenario: &'static str,
    steps: &[Step],
    recorder: &mut Recorder,
) -> Result<()> {
    let system = target.system(name);
    let queue = format!("horizon_{}", std::process::id());
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    system.create_queue(&mut client, &queue)?;
    counters::publish_counts(&mut client)?;
    client.batch_execute("VACUUM")?; // what the reset left in the catalogs is not the load's
    drop(client);
    let paced = rate > 0.0;
    let shape = Shape {
        producers: 2,
        enqueue_batch: if paced { 8 } else { 128 },
        workers: args.workers,
        claim_batch: 64,
        cycle: Cycle::Separate,
        depth: if paced { i64::MAX } else { 4_000 },
        rate,
        idle: Duration::from_millis(if paced { 5 } else { 1 }),
        work: Duration::ZERO,
        wishes: Wishes { wait: paced, times: paced, ..Wishes::default() },
    };
    let phases: Vec<Phase> =
        steps.iter().map(|step| Phase { label: step.label, length: Duration::from_secs_f64(step.seconds) }).collect();

    let mut edges: Vec<Edge> = Vec::new();
    let mut held = Held::default();
    let result = load::run(&target.url, &*system, &queue, &shape, &phases, |phase| {
        edges.push(edge(&target.url, &*system)?);
        held.release()?;
        if let Some(step) = steps.iter().find(|step| step.label == phase.label) {
            held = disturb(&target.url, &*system, &queue, step.disturbance)?;
        }
        Ok(())
    })?;
    edges.push(edge(&target.url, &*system)?);

    let clean = result.phases.iter().find(|phase| phase.label == CLEAN).context("the clean phase did not run")?;
    let clean = clean.completed_per_second();
    for (number, phase) in result.phases.iter().enumerate() {
        recorder.series(scenario, name.as_str(), phase)?;
        if let Some(edge) = edges.get(number + 1).filter(|_| phase.label != WARM_UP) {
            let measurement = Measurement::new(scenario, phase.label, name.as_str(), 1);
            recorder.record(with_phase(measurement, phase, clean, edge, args.last))?;
        }
    }
    let mut client = connect(&target.url)?;
    check_account(target, recorder, &mut client, &*system, scenario, &result)?;
    system.drop_queue(&mut client, &queue)
}

fn edge(url: &str, system: &dyn System) -> Result<Edge> {
    let mut client = connect(url)?;
    Ok(Edge { dead: counters::dead_tuples(&mut client)?, bytes: system.bytes(&mut client)? })
}

fn with_phase(measurement: Measurement, phase: &PhaseResult, clean: f64, edge: &Edge, last: f64) -> Measurement {
    let seconds = phase.per_second.len();
    let last = phase.per_second.get(seconds.saturating_sub(last as usize)..).unwrap_or_default();
    let last = last.iter().sum::<f64>() / last.len().max(1) as f64;
    let dead = |is_catalog: bool| {
        edge.dead.iter().filter(|table| table.is_catalog == is_catalog).map(|table| table.dead as f64).sum::<f64>()
    };
    for table in edge.dead.iter().take(RELATIONS_SHOWN_MAX) {
        eprintln!("  {}: {} dead tuples in {}", phase.label, table.dead, table.relation);
    }
    let mut measurement = measurement
        .metric("jobs/s", phase.completed_per_second())
        .metric("jobs/s at the end", last)
        .metric("end / clean", (clean > 0.0).then(|| last / clean))
        .metric("worst second", stats::range(&phase.per_second).map(|(worst, _)| worst))
        .metric("depth, most", phase.depth_most())
        .metric("claim p99 ms", stats::quantile(&phase.claim_ms, 0.99))
        .metric("complete p99 ms", stats::quantile(&phase.complete_ms, 0.99))
        .metric("pickup p50 ms", stats::quantile(&phase.pickup_ms, 0.5))
        .metric("pickup p99 ms", stats::quantile(&phase.pickup_ms, 0.99))
        .metric("oldest snapshot, xids", phase.sessions.snapshot_age_most)
        .metric("largest backend MB", phase.sessions.backend_megabytes_most)
        .metric("MB on disk at the end", edge.bytes as f64 / 1e6)
        .metric("WAL B/job", phase.wal_bytes_per_job())
        .metric("dead tuples in tables", dead(false))
        .metric("dead tuples in catalogs", dead(true));
    for catalog in CATALOGS {
        let count = edge.dead.iter().find(|table| table.relation == catalog).map_or(0, |table| table.dead);
        measurement = measurement.metric(catalog, count as f64);
    }
    measurement
}

impl Held {
    fn release(&mut self) -> Result<()> {
        self.transaction = None;
        for reader in self.readers.drain(..) {
            reader.finish()?;
        }
        Ok(())
    }
}

fn disturb(url: &str, system: &dyn System, queue: &str, disturbance: Disturbance) -> Result<Held> {
    let mut held = Held::default();
    match disturbance {
        Disturbance::Nothing => {}
        // Pins the horizon in both ways: by an xid and by a snapshot.
        Disturbance::IdleTransaction => {
            let mut client = connect(url)?;
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")?;
            held.transaction = Some(client);
        }
        Disturbance::Readers => {
            let table = system.hot_table(&mut connect(url)?, queue)?;
            for _ in 0..READERS {
                let mut client = connect(url)?;
                client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ")?;
                let count = client.prepare(&format!("SELECT count(*) FROM {table}"))?;
                held.readers.push(Helper::every(READER_INTERVAL, move || {
                    client.query(&count, &[])?;
                    Ok(())
                }));
            }
        }
    }
    Ok(held)
}
