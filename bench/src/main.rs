//! The benchmark driver: one subcommand a scenario, one JSON line a measurement, one Markdown table at the end.
//!
//! It talks to a running cluster through the wire protocol only, like any client. Every scenario runs the systems side
//! by side in rounds (A B A B), because ratios within one run hold where absolute numbers do not.

mod accounting;
mod counters;
mod load;
mod payload;
mod report;
mod scenarios;
mod stats;
mod systems;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::report::Recorder;
use crate::scenarios::{
    claim_cost, deadlines, heartbeat, idle, memory, pinned, profile, rebuild, rescue, steady, throughput, wakeup, wal_per_job,
};
use crate::systems::SystemName;

#[derive(Parser)]
#[command(name = "awa_bench", about = "Measure awa_queue beside a plain SKIP LOCKED table")]
struct Cli {
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Args, Clone)]
pub struct Target {
    /// Connection string, e.g. "host=/tmp port=5433 user=postgres dbname=bench"
    #[arg(long, global = true, default_value = "host=127.0.0.1 user=postgres dbname=bench")]
    url: String,
    /// File to append the JSON lines to
    #[arg(long, global = true)]
    out: Option<PathBuf>,
    /// Systems to measure, in this order in each round
    #[arg(long, global = true, value_delimiter = ',', default_values = ["awa", "skip_locked"])]
    systems: Vec<SystemName>,
    /// Rounds of A B A B
    #[arg(long, global = true, default_value_t = 3)]
    rounds: u32,
    /// Do not run awa.verify() after each load
    #[arg(long, global = true)]
    no_verify: bool,
}

#[derive(Subcommand)]
enum Scenario {
    /// Producers enqueue 128 a commit, workers claim 64 and complete 64
    ThroughputBatch(throughput::BatchArgs),
    /// Producers and workers handle one job a call
    ThroughputSingle(throughput::SingleArgs),
    /// Both shapes at 1 to 64 worker sessions
    Scaling(throughput::ScalingArgs),
    /// WAL, heap rows, index entries and dead tuples of each verb
    WalPerJob(wal_per_job::WalArgs),
    /// Round trip of claim(queue, 64) in front of, and behind, much other work
    ClaimCost(claim_cost::ClaimCostArgs),
    /// Load rows (--load), or measure awa.rebuild() over what is there
    Rebuild(rebuild::RebuildArgs),
    /// Shared memory held by the extension
    Memory,
    /// From commit of an enqueue to the return of a waiting session
    Wakeup(wakeup::WakeupArgs),
    /// Cost of awa.heartbeat beside an empty statement
    Heartbeat(heartbeat::HeartbeatArgs),
    /// Batch load before, during and after a pinned snapshot
    Pinned(pinned::PinnedArgs),
    /// Many workers with deadlines and without
    Deadlines(deadlines::DeadlinesArgs),
    /// From the deadline of a wedged attempt to its next claim (needs the maintainer)
    Rescue(rescue::RescueArgs),
    /// A steady rate for a long time: sizes, latency, dead tuples (needs the maintainer)
    Steady(steady::SteadyArgs),
    /// Transaction ids, log and CPU of a server that nobody uses
    Idle(idle::IdleArgs),
    /// Print how to profile a backend under load
    Profile(profile::ProfileArgs),
    /// Print the Markdown tables of a file of JSON lines
    Report {
        /// File written by --out
        file: PathBuf,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let target = &cli.target;
    match &cli.scenario {
        Scenario::Report { file } => {
            print!("{}", report::markdown(&report::read(file)?));
            return Ok(());
        }
        Scenario::Profile(args) => return profile::run(target, args),
        _ => {}
    }
    let mut recorder = Recorder::open(target)?;
    match &cli.scenario {
        Scenario::ThroughputBatch(args) => throughput::batch(target, args, &mut recorder)?,
        Scenario::ThroughputSingle(args) => throughput::single(target, args, &mut recorder)?,
        Scenario::Scaling(args) => throughput::scaling(target, args, &mut recorder)?,
        Scenario::WalPerJob(args) => wal_per_job::run(target, args, &mut recorder)?,
        Scenario::ClaimCost(args) => claim_cost::run(target, args, &mut recorder)?,
        Scenario::Rebuild(args) => rebuild::run(target, args, &mut recorder)?,
        Scenario::Memory => memory::run(target, &mut recorder)?,
        Scenario::Wakeup(args) => wakeup::run(target, args, &mut recorder)?,
        Scenario::Heartbeat(args) => heartbeat::run(target, args, &mut recorder)?,
        Scenario::Deadlines(args) => deadlines::run(target, args, &mut recorder)?,
        Scenario::Rescue(args) => rescue::run(target, args, &mut recorder)?,
        Scenario::Steady(args) => steady::run(target, args, &mut recorder)?,
        Scenario::Idle(args) => idle::run(target, args, &mut recorder)?,
        Scenario::Pinned(args) => pinned::run(target, args, &mut recorder)?,
        Scenario::Report { .. } | Scenario::Profile(_) => {}
    }
    print!("{}", report::markdown(recorder.measurements()));
    if recorder.broken() > 0 {
        bail!("{} measurement(s) failed their accounting", recorder.broken());
    }
    Ok(())
}
