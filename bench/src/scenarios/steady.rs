//! A steady rate for a long time: does anything grow? Sizes, depth, segments and dead tuples, sampled; the first quarter beside the last.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::Args;
use postgres::Client;
use serde_json::json;

use crate::Target;
use crate::counters;
use crate::load::{self, Cycle, Phase, Shape};
use crate::report::{Measurement, Recorder};
use crate::scenarios::check_account;
use crate::stats;
use crate::systems::{System, Wishes, connect};

const SECONDS: f64 = 7_200.0;

#[derive(Args)]
pub struct SteadyArgs {
    #[arg(long, default_value_t = 800.0)]
    rate: f64,
    #[arg(long, default_value_t = 30.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Seconds between two samples
    #[arg(long, default_value_t = 10.0)]
    sample: f64,
}

#[derive(Clone, Copy, Debug)]
struct Size {
    megabytes: f64,
    dead: f64,
    catalog_dead: f64,
}

pub fn run(target: &Target, args: &SteadyArgs, recorder: &mut Recorder) -> Result<()> {
    for &name in &target.systems {
        let system = target.system(name);
        let queue = format!("steady_{}", std::process::id());
        let mut client = connect(&target.url)?;
        system.reset(&mut client)?;
        system.create_queue(&mut client, &queue)?;
        counters::publish_counts(&mut client)?;
        client.batch_execute("VACUUM")?;
        drop(client);
        let shape = Shape {
            producers: 2,
            enqueue_batch: 4,
            workers: args.workers,
            claim_batch: 16,
            cycle: Cycle::Separate,
            depth: 100_000,
            rate: args.rate,
            idle: Duration::from_millis(1),
            work: Duration::ZERO,
            wishes: Wishes { wait: true, times: true, ..Wishes::default() },
        };
        let phases = [
            Phase { label: "warm-up", length: Duration::from_secs_f64(args.warm_up) },
            Phase { label: "steady", length: Duration::from_secs_f64(target.window(SECONDS)) },
        ];
        let (begun, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let samples = Mutex::new(Vec::new());
        let (result, watched) = thread::scope(|scope| {
            let watcher = scope.spawn(|| watch(target, args, &*system, &begun, &over, &samples));
            let result = load::run(&target.url, &*system, &queue, &shape, &phases, |phase| {
                begun.store(phase.label == "steady", Ordering::Relaxed);
                Ok(())
            });
            over.store(true, Ordering::Relaxed);
            (result, watcher.join().map_err(|_| anyhow!("the sampling thread panicked")))
        });
        let result = result?;
        watched??;
        let samples = samples.into_inner().map_err(|_| anyhow!("the sampling thread panicked"))?;
        for sample in &samples {
            recorder.note(&json!({"kind": "sample", "scenario": "steady", "system": name.as_str(), "sample": sample}))?;
        }
        let sizes: Vec<Size> = samples.iter().map(|(_, size)| *size).collect();
        let quarter = sizes.len() / 4;
        let mean = |of: &[Size]| of.iter().map(|size| size.megabytes).sum::<f64>() / of.len().max(1) as f64;
        let first = mean(sizes.get(..quarter).unwrap_or_default());
        let last = mean(sizes.get(sizes.len() - quarter..).unwrap_or_default());
        let largest = sizes.iter().map(|size| size.megabytes).fold(0.0, f64::max);
        for window in result.phases.iter().filter(|phase| phase.label == "steady") {
            let measurement =
                Measurement::new("steady", format!("{}/s for {} s", args.rate, target.window(SECONDS)), name.as_str(), 1)
                    .metric("jobs/s", window.completed_per_second())
                    .metric("MB, first quarter", first)
                    .metric("MB, last quarter", last)
                    .metric("MB, largest", largest)
                    .metric("last / first", (first > 0.0).then(|| last / first))
                    .metric("pickup p50 ms", stats::quantile(&window.pickup_ms, 0.5))
                    .metric("pickup p99 ms", stats::quantile(&window.pickup_ms, 0.99))
                    .metric("WAL B/job", window.wal_bytes_per_job())
                    .metric("dead tuples, most", sizes.iter().map(|size| size.dead).fold(0.0, f64::max))
                    .metric("catalog dead tuples, most", sizes.iter().map(|size| size.catalog_dead).fold(0.0, f64::max))
                    .metric("machine CPU %", window.machine_cpu)
                    .metric("driver CPU %", window.client_cpu);
            recorder.record(measurement)?;
        }
        let mut client = connect(&target.url)?;
        check_account(target, recorder, &mut client, &*system, "steady", &result)?;
        system.drop_queue(&mut client, &queue)?;
    }
    Ok(())
}

type Samples = Mutex<Vec<(f64, Size)>>;

impl serde::Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({"mb": self.megabytes, "dead": self.dead, "catalog_dead": self.catalog_dead}).serialize(serializer)
    }
}

fn watch(
    target: &Target,
    args: &SteadyArgs,
    system: &dyn System,
    begun: &AtomicBool,
    over: &AtomicBool,
    samples: &Samples,
) -> Result<()> {
    let mut next = Instant::now();
    let start = Instant::now();
    while !over.load(Ordering::Relaxed) {
        if !begun.load(Ordering::Relaxed) || Instant::now() < next {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        next = Instant::now() + Duration::from_secs_f64(args.sample);
        // A connection of its own each time: the load waits at its end until it is alone.
        let size = sample(&mut connect(&target.url)?, system)?;
        samples.lock().map_err(|_| anyhow!("a sample was not kept"))?.push((start.elapsed().as_secs_f64(), size));
    }
    Ok(())
}

fn sample(client: &mut Client, system: &dyn System) -> Result<Size> {
    let dead = counters::dead_tuples(client)?;
    let of = |is_catalog: bool| dead.iter().filter(|table| table.is_catalog == is_catalog).map(|table| table.dead as f64).sum();
    Ok(Size { megabytes: system.bytes(client)? as f64 / 1e6, dead: of(false), catalog_dead: of(true) })
}
