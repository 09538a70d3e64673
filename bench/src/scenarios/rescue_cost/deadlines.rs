//! What deadlines cost: many workers, one job at a time, a millisecond of work, claims with a deadline and without, in turns.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::Target;
use crate::load::{self, Cycle, Phase, Shape};
use crate::report::{Measurement, Recorder};
use crate::scenarios::{check_account, with_load_metrics};
use crate::statements::Statements;
use crate::stats;
use crate::systems::{SystemName, Wishes, connect};

const MEASURED: &str = "measured";

#[derive(Args)]
pub struct DeadlinesArgs {
    #[arg(long, default_value_t = 256)]
    workers: usize,
    #[arg(long, default_value_t = 4_000)]
    depth: i64,
    /// Milliseconds of work for each job
    #[arg(long, default_value_t = 1)]
    work_ms: u64,
    #[arg(long, default_value_t = 1)]
    claim_batch: i32,
    /// Seconds until the deadline
    #[arg(long, default_value_t = 30)]
    deadline: u32,
    #[arg(long, default_value_t = 3.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 20.0)]
    window: f64,
}

pub fn run(target: &Target, args: &DeadlinesArgs, recorder: &mut Recorder) -> Result<()> {
    let system = target.system(SystemName::Awa);
    for round in 1..=target.rounds {
        // The last system of a case is the one compared with.
        for deadline in [Some(args.deadline), None] {
            let label = if deadline.is_some() { "awa, deadlines on" } else { "awa, deadlines off" };
            let queue = format!("deadlines_{}_{round}_{}", std::process::id(), deadline.is_some());
            let mut client = connect(&target.url)?;
            system.reset(&mut client)?;
            system.create_queue(&mut client, &queue)?;
            let statements = Statements::begin(&mut client)?;
            drop(client);
            let shape = Shape {
                producers: 2,
                enqueue_batch: 128,
                workers: args.workers,
                claim_batch: args.claim_batch,
                cycle: Cycle::Separate,
                depth: args.depth,
                rate: 0.0,
                idle: Duration::from_millis(1),
                work: Duration::from_millis(args.work_ms),
                wishes: Wishes { deadline, ..Wishes::default() },
            };
            let phases = [
                Phase { label: "warm-up", length: Duration::from_secs_f64(args.warm_up) },
                Phase { label: MEASURED, length: Duration::from_secs_f64(target.window(args.window)) },
            ];
            let result = load::run(&target.url, &*system, &queue, &shape, &phases, |_| Ok(()))?;
            let case = format!("{} workers, {} ms of work", args.workers, args.work_ms);
            for window in result.phases.iter().filter(|phase| phase.label == MEASURED) {
                let measurement = Measurement::new("rescue-cost", case.clone(), label, round);
                let measurement = with_load_metrics(measurement, window, &result)
                    .metric("claim p99 ms", stats::quantile(&window.claim_ms, 0.99));
                recorder.record(measurement)?;
            }
            let mut client = connect(&target.url)?;
            if let Some(statements) = statements {
                statements.end(&mut client, "rescue-cost", label, round, recorder)?;
            }
            check_account(target, recorder, &mut client, &*system, label, &result)?;
            system.drop_queue(&mut client, &queue)?;
        }
    }
    Ok(())
}
