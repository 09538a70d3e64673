//! The batch load before, while and after a REPEATABLE READ transaction with an xid and a snapshot sits idle.

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
use crate::systems::{SystemName, Wishes, connect};

const CLEAN: &str = "clean";
const PINNED: &str = "pinned";
const RECOVERY: &str = "recovery";
const CATALOGS: [&str; 3] = ["pg_catalog.pg_class", "pg_catalog.pg_attribute", "pg_catalog.pg_statistic"];
const RELATIONS_SHOWN_MAX: usize = 8;

#[derive(Args)]
pub struct PinnedArgs {
    /// Seconds before the snapshot is taken, after a warm-up
    #[arg(long, default_value_t = 30.0)]
    clean: f64,
    /// Seconds with the snapshot held
    #[arg(long, default_value_t = 300.0)]
    pinned: f64,
    /// Seconds after it is gone
    #[arg(long, default_value_t = 10.0)]
    recovery: f64,
    #[arg(long, default_value_t = 5.0)]
    warm_up: f64,
    /// Jobs a second offered; 0: saturation
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Seconds of the end of the pinned phase that are compared with the clean phase
    #[arg(long, default_value_t = 60.0)]
    last: f64,
}

pub fn run(target: &Target, args: &PinnedArgs, recorder: &mut Recorder) -> Result<()> {
    for &name in &target.systems {
        one_system(target, args, name, recorder)?;
    }
    Ok(())
}

fn one_system(target: &Target, args: &PinnedArgs, name: SystemName, recorder: &mut Recorder) -> Result<()> {
    let system = name.system();
    let queue = format!("pinned_{}", std::process::id());
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    system.create_queue(&mut client, &queue)?;
    counters::publish_counts(&mut client)?;
    client.batch_execute("VACUUM")?; // what the reset left in the catalogs is not the load's
    drop(client);
    let shape = Shape {
        producers: 2,
        enqueue_batch: if args.rate > 0.0 { 8 } else { 128 },
        workers: args.workers,
        claim_batch: 64,
        cycle: Cycle::Separate,
        depth: 4_000,
        rate: args.rate,
        idle: Duration::from_millis(1),
        work: Duration::ZERO,
        wishes: Wishes { wait: args.rate > 0.0, pickup: args.rate > 0.0, ..Wishes::default() },
    };
    let seconds = Duration::from_secs_f64;
    let phases = [
        Phase { label: "warm-up", length: seconds(args.warm_up) },
        Phase { label: CLEAN, length: seconds(args.clean) },
        Phase { label: PINNED, length: seconds(args.pinned) },
        Phase { label: RECOVERY, length: seconds(args.recovery) },
    ];

    let mut sizes: Vec<(&'static str, i64)> = Vec::new();
    let mut pin: Option<Client> = None;
    let mut dead_before_phase: Vec<(&'static str, Vec<DeadTuples>)> = Vec::new();
    let result = load::run(&target.url, &*system, &queue, &shape, &phases, |phase| {
        dead_before_phase.push((phase.label, counters::dead_tuples(&mut connect(&target.url)?)?));
        sizes.push((phase.label, system.bytes(&mut connect(&target.url)?)?));
        pin = if phase.label == PINNED { Some(hold_snapshot(&target.url)?) } else { None };
        Ok(())
    })?;

    let phase = |label: &str| result.phases.iter().find(|phase| phase.label == label).context("the phase did not run");
    let clean = phase(CLEAN)?.completed_per_second();
    for (label, next) in [(CLEAN, PINNED), (PINNED, RECOVERY)] {
        let dead = dead_before_phase.iter().find(|(label, _)| *label == next).map(|(_, dead)| dead);
        let bytes = sizes.iter().find(|(label, _)| *label == next).map_or(0, |(_, bytes)| *bytes);
        record(name, phase(label)?, clean, bytes, args, dead.map_or(&[], Vec::as_slice), recorder)?;
    }
    let mut client = connect(&target.url)?;
    let dead = counters::dead_tuples(&mut client)?;
    let bytes = system.bytes(&mut client)?;
    record(name, phase(RECOVERY)?, clean, bytes, args, &dead, recorder)?;
    check_account(target, recorder, &mut client, &*system, "pinned", &result)?;
    system.drop_queue(&mut client, &queue)
}

fn record(
    name: SystemName,
    phase: &PhaseResult,
    clean: f64,
    bytes: i64,
    args: &PinnedArgs,
    dead_at_end: &[DeadTuples],
    recorder: &mut Recorder,
) -> Result<()> {
    let seconds = phase.per_second.len();
    let last = phase.per_second.get(seconds.saturating_sub(args.last as usize)..).unwrap_or_default();
    let last = last.iter().sum::<f64>() / last.len().max(1) as f64;
    let dead = |is_catalog: bool| {
        dead_at_end.iter().filter(|table| table.is_catalog == is_catalog).map(|table| table.dead as f64).sum::<f64>()
    };
    let mut measurement = Measurement::new("pinned", phase.label, name.as_str(), 1)
        .metric("jobs/s", phase.completed_per_second())
        .metric("jobs/s at the end", last)
        .metric("end / clean", (clean > 0.0).then(|| last / clean))
        .metric("worst second", stats::range(&phase.per_second).map(|(worst, _)| worst))
        .metric("claim p99 ms", stats::quantile(&phase.claim_ms, 0.99))
        .metric("complete p99 ms", stats::quantile(&phase.complete_ms, 0.99))
        .metric("pickup p50 ms", stats::quantile(&phase.pickup_ms, 0.5))
        .metric("pickup p99 ms", stats::quantile(&phase.pickup_ms, 0.99))
        .metric("MB on disk at the end", bytes as f64 / 1e6)
        .metric("WAL B/job", phase.wal_bytes_per_job())
        .metric("dead tuples in tables", dead(false))
        .metric("dead tuples in catalogs", dead(true));
    for catalog in CATALOGS {
        let count = dead_at_end.iter().find(|table| table.relation == catalog).map_or(0, |table| table.dead);
        measurement = measurement.metric(catalog, count as f64);
    }
    for table in dead_at_end.iter().take(RELATIONS_SHOWN_MAX) {
        eprintln!("  {}: {} dead tuples in {}", phase.label, table.dead, table.relation);
    }
    recorder.record(measurement)
}

/// Pins the horizon in both ways: by an xid and by a snapshot.
fn hold_snapshot(url: &str) -> Result<Client> {
    let mut client = connect(url)?;
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")?;
    Ok(client)
}
