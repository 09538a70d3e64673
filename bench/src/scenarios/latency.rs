//! Open loop: jobs come at a fixed rate, whatever the system does. How long until a worker has each, and are they drained?

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::Target;
use crate::load::{self, Cycle, Phase, PhaseResult, Shape};
use crate::report::{Measurement, Recorder};
use crate::scenarios::{check_account, with_load_metrics};
use crate::stats;
use crate::systems::{SystemName, Wishes, connect};

#[derive(Args)]
pub struct PickupArgs {
    /// Jobs a second, one case each
    #[arg(long, value_delimiter = ',', default_values_t = [500.0, 800.0, 2_000.0])]
    rates: Vec<f64>,
    #[arg(long, default_value_t = 8)]
    producers: usize,
    #[arg(long, default_value_t = 1)]
    enqueue_batch: usize,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    #[arg(long, default_value_t = 1)]
    claim_batch: i32,
    /// Milliseconds between two looks of a worker that found nothing, where the system has no wait of its own
    #[arg(long, default_value_t = 5)]
    poll_ms: u64,
    #[arg(long, default_value_t = 2.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 15.0)]
    window: f64,
}

#[derive(Args)]
pub struct OfferedArgs {
    #[arg(long, default_value_t = 5_000.0)]
    rate: f64,
    #[arg(long, default_value_t = 4)]
    producers: usize,
    #[arg(long, default_value_t = 10)]
    enqueue_batch: usize,
    #[arg(long, default_value_t = 64)]
    workers: usize,
    #[arg(long, default_value_t = 16)]
    claim_batch: i32,
    #[arg(long, default_value_t = 5)]
    poll_ms: u64,
    #[arg(long, default_value_t = 3.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 30.0)]
    window: f64,
}

pub fn pickup(target: &Target, args: &PickupArgs, recorder: &mut Recorder) -> Result<()> {
    for round in 1..=target.rounds {
        for &rate in &args.rates {
            for &name in &target.systems {
                let shape = Shape {
                    producers: args.producers,
                    enqueue_batch: args.enqueue_batch,
                    workers: args.workers,
                    claim_batch: args.claim_batch,
                    ..open_loop(rate, args.poll_ms)
                };
                let case = format!("{rate}/s, {} + {}", args.producers, args.workers);
                let measurement = Measurement::new("pickup-latency", case, name.as_str(), round);
                one_window(target, name, &shape, (args.warm_up, args.window), measurement, recorder)?;
            }
        }
    }
    Ok(())
}

pub fn offered(target: &Target, args: &OfferedArgs, recorder: &mut Recorder) -> Result<()> {
    for round in 1..=target.rounds {
        for &name in &target.systems {
            let shape = Shape {
                producers: args.producers,
                enqueue_batch: args.enqueue_batch,
                workers: args.workers,
                claim_batch: args.claim_batch,
                ..open_loop(args.rate, args.poll_ms)
            };
            let case = format!("{}/s, {} workers", args.rate, args.workers);
            let measurement = Measurement::new("offered-5k", case, name.as_str(), round);
            one_window(target, name, &shape, (args.warm_up, args.window), measurement, recorder)?;
        }
    }
    Ok(())
}

fn open_loop(rate: f64, poll_ms: u64) -> Shape {
    Shape {
        producers: 1,
        enqueue_batch: 1,
        workers: 1,
        claim_batch: 1,
        cycle: Cycle::Separate,
        depth: i64::MAX,
        rate,
        idle: Duration::from_millis(poll_ms),
        work: Duration::ZERO,
        wishes: Wishes { wait: true, times: true, ..Wishes::default() },
    }
}

fn one_window(
    target: &Target,
    name: SystemName,
    shape: &Shape,
    (warm_up, window): (f64, f64),
    measurement: Measurement,
    recorder: &mut Recorder,
) -> Result<()> {
    let system = target.system(name);
    let queue = format!("latency_{}", std::process::id());
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    system.create_queue(&mut client, &queue)?;
    drop(client);
    let phases = [
        Phase { label: "warm-up", length: Duration::from_secs_f64(warm_up) },
        Phase { label: "window", length: Duration::from_secs_f64(target.window(window)) },
    ];
    let result = load::run(&target.url, &*system, &queue, shape, &phases, |_| Ok(()))?;
    let mut client = connect(&target.url)?;
    check_account(target, recorder, &mut client, &*system, &measurement.case, &result)?;
    system.drop_queue(&mut client, &queue)?;
    let measured = result.phases.last().context("a load has a window")?;
    recorder.series(&measurement.scenario, name.as_str(), measured)?;
    recorder.record(with_load_metrics(with_latencies(measurement, measured), measured, &result))
}

fn with_latencies(measurement: Measurement, window: &PhaseResult) -> Measurement {
    let quantile = stats::quantile;
    measurement
        .metric("pickup p99 ms", quantile(&window.pickup_ms, 0.99))
        .metric("pickup p95 ms", quantile(&window.pickup_ms, 0.95))
        .metric("pickup p50 ms", quantile(&window.pickup_ms, 0.5))
        .metric("end to end p50 ms", quantile(&window.end_to_end_ms, 0.5))
        .metric("end to end p99 ms", quantile(&window.end_to_end_ms, 0.99))
        .metric("enqueue p99 ms", quantile(&window.enqueue_ms, 0.99))
        .metric("offered and taken, jobs/s", window.enqueued as f64 / window.seconds)
        .metric("depth, most", window.depth_most())
}
