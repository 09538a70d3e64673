//! End-to-end throughput of durable completions, in batches and one job a call, and how it scales with sessions.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::Target;
use crate::load::{self, Cycle, Phase, Shape};
use crate::report::{Measurement, Recorder};
use crate::scenarios::{Contender, check_account, contenders, with_load_metrics};
use crate::systems::{Wishes, connect};

#[derive(Args, Clone)]
pub struct WindowArgs {
    /// Seconds of load before the window
    #[arg(long, default_value_t = 3.0)]
    pub warm_up: f64,
    /// Seconds measured
    #[arg(long, default_value_t = 8.0)]
    pub window: f64,
    /// Ways to finish a job
    #[arg(long, value_delimiter = ',', default_values = ["separate", "combined"])]
    pub cycles: Vec<Cycle>,
    /// Microseconds a worker sleeps when it found nothing
    #[arg(long, default_value_t = 1_000)]
    pub idle_us: u64,
    /// Workers that find nothing sleep in the server, where the system offers that
    #[arg(long)]
    pub wait: bool,
    /// Jobs a second offered; 0: as fast as the depth allows
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
}

#[derive(Args)]
pub struct BatchArgs {
    #[command(flatten)]
    window: WindowArgs,
    #[arg(long, default_value_t = 2)]
    producers: usize,
    #[arg(long, default_value_t = 128)]
    enqueue_batch: usize,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    #[arg(long, default_value_t = 64)]
    claim_batch: i32,
    /// Producers stop above this number of unfinished jobs
    #[arg(long, default_value_t = 4_000)]
    depth: i64,
}

#[derive(Args)]
pub struct SingleArgs {
    #[command(flatten)]
    window: WindowArgs,
    #[arg(long, default_value_t = 8)]
    producers: usize,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Producers stop above this number of unfinished jobs
    #[arg(long, default_value_t = 1_000)]
    depth: i64,
}

#[derive(Args)]
pub struct ScalingArgs {
    #[command(flatten)]
    window: WindowArgs,
    /// Worker sessions; batches keep 2 producers, single jobs have as many producers as workers
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64, 128, 256])]
    sessions: Vec<usize>,
}

pub fn batch(target: &Target, args: &BatchArgs, recorder: &mut Recorder) -> Result<()> {
    let shape = Shape {
        producers: args.producers,
        enqueue_batch: args.enqueue_batch,
        workers: args.workers,
        claim_batch: args.claim_batch,
        cycle: Cycle::Separate,
        depth: args.depth,
        rate: args.window.rate,
        idle: Duration::from_micros(args.window.idle_us),
        work: Duration::ZERO,
        wishes: Wishes { wait: args.window.wait, ..Wishes::default() },
    };
    let case = format!("{} x {} / {} x {}", args.producers, args.enqueue_batch, args.workers, args.claim_batch);
    rounds(target, &args.window, "throughput-batch", &[(case, shape)], recorder)
}

pub fn single(target: &Target, args: &SingleArgs, recorder: &mut Recorder) -> Result<()> {
    let case = format!("{} + {}", args.producers, args.workers);
    let shape = single_shape(args.producers, args.workers, args.depth, &args.window);
    rounds(target, &args.window, "throughput-single", &[(case, shape)], recorder)
}

pub fn scaling(target: &Target, args: &ScalingArgs, recorder: &mut Recorder) -> Result<()> {
    let mut batches = Vec::new();
    let mut singles = Vec::new();
    for &sessions in &args.sessions {
        let shape = Shape {
            producers: 2,
            enqueue_batch: 128,
            workers: sessions,
            claim_batch: 64,
            cycle: Cycle::Separate,
            depth: 4_000.max(sessions as i64 * 128),
            rate: args.window.rate,
            idle: Duration::from_micros(args.window.idle_us),
            work: Duration::ZERO,
            wishes: Wishes { wait: args.window.wait, ..Wishes::default() },
        };
        batches.push((format!("batch, {sessions} sessions"), shape));
        singles.push((format!("single, {sessions} sessions"), single_shape(sessions, sessions, 1_000, &args.window)));
    }
    rounds(target, &args.window, "worker-scaling, batch", &batches, recorder)?;
    rounds(target, &args.window, "worker-scaling, single", &singles, recorder)
}

fn single_shape(producers: usize, workers: usize, depth: i64, window: &WindowArgs) -> Shape {
    Shape {
        producers,
        enqueue_batch: 1,
        workers,
        claim_batch: 1,
        cycle: Cycle::Separate,
        depth,
        rate: window.rate,
        idle: Duration::from_micros(window.idle_us),
        work: Duration::ZERO,
        wishes: Wishes { wait: window.wait, ..Wishes::default() },
    }
}

/// A B A B: within a round every contender runs every case once, side by side.
fn rounds(
    target: &Target,
    window: &WindowArgs,
    scenario: &str,
    cases: &[(String, Shape)],
    recorder: &mut Recorder,
) -> Result<()> {
    let contenders = contenders(target, &window.cycles, scenario, cases.first().map_or("", |(case, _)| case), recorder)?;
    for round in 1..=target.rounds {
        for (case, shape) in cases {
            for &contender in &contenders {
                let shape = Shape { cycle: contender.cycle, ..shape.clone() };
                let measurement = Measurement::new(scenario, case, contender.label(), round);
                one_window(target, window, contender, &shape, measurement, recorder)?;
            }
        }
    }
    Ok(())
}

fn one_window(
    target: &Target,
    window: &WindowArgs,
    contender: Contender,
    shape: &Shape,
    measurement: Measurement,
    recorder: &mut Recorder,
) -> Result<()> {
    let system = target.system(contender.name);
    let queue = format!("bench_{}", std::process::id());
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    system.create_queue(&mut client, &queue)?;
    drop(client);

    let phases = [
        Phase { label: "warm-up", length: Duration::from_secs_f64(window.warm_up) },
        Phase { label: "window", length: Duration::from_secs_f64(target.window(window.window)) },
    ];
    let result = load::run(&target.url, &*system, &queue, shape, &phases, |_| Ok(()))?;

    let mut client = connect(&target.url)?;
    check_account(target, recorder, &mut client, &*system, &measurement.case, &result)?;
    system.drop_queue(&mut client, &queue)?;
    let measured = result.phases.last().context("a load has a window")?;
    recorder.series(&measurement.scenario, &measurement.system, measured)?;
    recorder.record(with_load_metrics(measurement, measured, &result))
}
