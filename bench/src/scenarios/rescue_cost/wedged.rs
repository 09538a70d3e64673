//! How long a wedged attempt takes to be given back: from its deadline to its next claim, by the maintainer, idle and under load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::load::{self, Cycle, Phase, Shape};
use crate::report::{Measurement, Recorder};
use crate::stats;
use crate::systems::{Due, SystemName, Wishes, connect, connect_loader};

const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(60);

#[derive(Args)]
pub struct WedgedArgs {
    /// Attempts that are left to expire, in each case
    #[arg(long, default_value_t = 20)]
    attempts: usize,
    /// Closed jobs that lie in the ring before it begins
    #[arg(long, default_value_t = 0)]
    history: u64,
    /// Workers of the load beside it
    #[arg(long, default_value_t = 8)]
    load_workers: usize,
}

pub fn run(target: &Target, args: &WedgedArgs, recorder: &mut Recorder) -> Result<()> {
    let system = target.system(SystemName::Awa);
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    history(target, args.history)?;
    let case = |load: &str| format!("{load}, {} closed jobs", args.history);
    record(recorder, case("idle"), &wedge(target, args.attempts)?)?;

    let queue = format!("rescue_load_{}", std::process::id());
    system.create_queue(&mut client, &queue)?;
    drop(client);
    let shape = Shape {
        producers: 2,
        enqueue_batch: 128,
        workers: args.load_workers,
        claim_batch: 64,
        cycle: Cycle::Separate,
        depth: 4_000,
        rate: 0.0,
        idle: Duration::from_millis(1),
        work: Duration::ZERO,
        wishes: Wishes::default(),
    };
    let ready = AtomicBool::new(false);
    let phases = [
        Phase { label: "warm-up", length: Duration::from_secs(1) },
        Phase { label: "load", length: Duration::from_secs(args.attempts as u64 * 3) },
    ];
    let waits = thread::scope(|scope| {
        let loaded = scope.spawn(|| {
            load::run(&target.url, &*system, &queue, &shape, &phases, |phase| {
                ready.store(phase.label == "load", Ordering::Relaxed);
                Ok(())
            })
        });
        while !ready.load(Ordering::Relaxed) && !loaded.is_finished() {
            thread::sleep(Duration::from_millis(20));
        }
        let waits = wedge(target, args.attempts);
        loaded.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        waits
    })?;
    record(recorder, case("under load"), &waits)?;
    let mut client = connect(&target.url)?;
    system.drop_queue(&mut client, &queue)
}

fn record(recorder: &mut Recorder, case: String, waits: &[f64]) -> Result<()> {
    let measurement = Measurement::new("rescue-cost, wedged", case, SystemName::Awa.as_str(), 1)
        .metric("deadline to next claim, p50 ms", stats::quantile(waits, 0.5))
        .metric("worst ms", stats::range(waits).map(|(_, worst)| worst))
        .metric("attempts", waits.len() as f64);
    recorder.record(measurement)
}

/// Jobs that are finished before it begins. Their segments stay as long as the settings of the cluster keep them.
fn history(target: &Target, jobs: u64) -> Result<()> {
    if jobs == 0 {
        return Ok(());
    }
    let awa = target.system(SystemName::Awa);
    let queue = format!("history_{}", std::process::id());
    let mut client = connect_loader(&target.url)?;
    awa.create_queue(&mut client, &queue)?;
    awa.bulk_load(&mut client, &queue, jobs, Due::Now)?;
    loop {
        let row = client.query_one(
            "SELECT count(*) FROM (
                 SELECT awa.complete_many(array_agg(job_id), array_agg(run_lease)) FROM awa.claim($1::text, 10000)
                 HAVING count(*) > 0) AS done",
            &[&queue],
        )?;
        if row.try_get::<_, i64>(0)? == 0 {
            return Ok(());
        }
    }
}

/// Claims jobs with a short deadline one after the other, does nothing, and waits until each can be claimed again.
fn wedge(target: &Target, attempts: usize) -> Result<Vec<f64>> {
    let queue = format!("rescue_{}_{}", std::process::id(), attempts);
    let mut client = connect(&target.url)?;
    client.execute("SELECT awa.create_queue($1::text, backoff => '0', backoff_max => '0')", &[&queue])?;
    let mut waits = Vec::new();
    for _ in 0..attempts {
        client.execute("SELECT awa.enqueue($1::text, 'wedged')", &[&queue])?;
        let first = client
            .query_opt("SELECT job_id FROM awa.claim($1::text, 1, deadline => '200 milliseconds')", &[&queue])?
            .context("the job cannot be claimed")?;
        let job_id: i64 = first.try_get(0)?;
        let expired = Instant::now() + Duration::from_millis(200);
        let lease = claim_again(&mut client, &queue, job_id)?;
        waits.push(Instant::now().saturating_duration_since(expired).as_secs_f64() * 1e3);
        client.execute("SELECT awa.complete($1::bigint, $2::bigint)", &[&job_id, &lease])?;
    }
    client.execute("SELECT awa.drop_queue($1::text, force => true)", &[&queue])?;
    Ok(waits)
}

fn claim_again(client: &mut Client, queue: &str, job_id: i64) -> Result<i64> {
    let start = Instant::now();
    while start.elapsed() < GIVEN_BACK_WITHIN {
        client.execute("CALL awa.wait($1::text, '5 seconds')", &[&queue])?;
        if let Some(row) = client.query_opt("SELECT job_id, run_lease FROM awa.claim($1::text, 1)", &[&queue])? {
            if row.try_get::<_, i64>(0)? != job_id {
                bail!("another job came back");
            }
            return Ok(row.try_get(1)?);
        }
    }
    bail!("job {job_id} was not given back: is the maintainer running?")
}
