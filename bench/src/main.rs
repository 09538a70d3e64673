//! The benchmark driver: one subcommand a scenario, one JSON line a measurement, one Markdown table at the end.
//!
//! It talks to a running cluster through the wire protocol only, like any client. Every scenario runs the systems side
//! by side in rounds (A B A B), because ratios within one run hold where absolute numbers do not.

mod accounting;
mod counters;
mod load;
mod payload;
mod plot;
mod progress;
mod report;
mod scenarios;
mod statements;
mod stats;
mod systems;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::report::{Recorder, Selection};
use crate::scenarios::{
    backlog, crash, heartbeat, horizon, idle, latency, memory, profile, rebuild, rescue_cost, steady, throughput, wakeup,
    wal_per_job,
};
use crate::systems::{System, SystemName};

#[derive(Parser)]
#[command(name = "awa_bench", about = "Measure awa_queue beside other queues in PostgreSQL")]
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
    /// Where bench/peers/install.sh has put the systems of others
    #[arg(long, global = true, default_value = "target/peers")]
    peers: PathBuf,
    /// Rounds of A B A B
    #[arg(long, global = true, default_value_t = 3)]
    rounds: u32,
    /// Seconds of the measured window, where a scenario has one
    #[arg(long, global = true)]
    seconds: Option<f64>,
    /// Do not run awa.verify() after each load
    #[arg(long, global = true)]
    no_verify: bool,
    /// The server's data directory (for crash-recovery)
    #[arg(long, global = true)]
    data: Option<PathBuf>,
    /// A command that starts the server (for crash-recovery)
    #[arg(long, global = true)]
    restart: Option<String>,
}

impl Target {
    pub fn system(&self, name: SystemName) -> Box<dyn System> {
        name.system(&self.peers)
    }

    /// The measured window: what the command line says, or what the scenario would take.
    pub fn window(&self, usual: f64) -> f64 {
        self.seconds.unwrap_or(usual)
    }
}

#[derive(Subcommand)]
enum Scenario {
    /// Producers enqueue 128 a commit, workers claim 64 and complete 64
    ThroughputBatch(throughput::BatchArgs),
    /// Producers and workers handle one job a call
    ThroughputSingle(throughput::SingleArgs),
    /// Both shapes at 1 to 256 worker sessions
    WorkerScaling(throughput::ScalingArgs),
    /// From enqueue to the worker, and to the end, at fixed rates
    PickupLatency(latency::PickupArgs),
    /// 5,000 jobs a second for one queue and 64 workers: are they drained?
    #[command(name = "offered-5k")]
    Offered5k(latency::OfferedArgs),
    /// Many workers with deadlines and without; and from the deadline of a wedged attempt to its next claim
    RescueCost(rescue_cost::RescueCostArgs),
    /// Load before, during and after a pinned snapshot
    PinnedHorizon(horizon::PinnedArgs),
    /// A fixed rate: clean, beside an idle transaction, recovery, beside active readers, recovery
    LongHorizon(horizon::LongArgs),
    /// Round trip of claim(queue, 64) in front of millions of waiting jobs
    Backlog(backlog::BacklogArgs),
    /// ... with a million jobs scheduled ahead
    ScheduledBacklog(backlog::ScheduledArgs),
    /// ... behind an open transaction with 100,000 jobs
    LongTransaction(backlog::TransactionArgs),
    /// kill -9 of the server under load: until the first completion, until the old rate, every job accounted for
    CrashRecovery(crash::CrashArgs),
    /// Load rows (--load), or measure awa.rebuild() over what is there
    Rebuild(rebuild::RebuildArgs),
    /// WAL, heap rows, index entries and dead tuples of each verb
    WalPerJob(wal_per_job::WalArgs),
    /// Transaction ids, log and CPU of a server that nobody uses
    IdleCost(idle::IdleArgs),
    /// From commit of an enqueue to the return of a waiting session
    Wakeup(wakeup::WakeupArgs),
    /// Cost of awa.heartbeat beside an empty statement
    Heartbeat(heartbeat::HeartbeatArgs),
    /// A steady rate for a long time: sizes, latency, dead tuples (needs the maintainer)
    Steady(steady::SteadyArgs),
    /// Shared memory held by the extension
    Memory,
    /// Print how to profile a backend under load
    Profile(profile::ProfileArgs),
    /// Print the Markdown tables of a file of JSON lines
    Report {
        /// File written by --out
        file: PathBuf,
        #[command(flatten)]
        selection: Selection,
    },
    /// Draw the plots of a file of JSON lines, as SVG
    Plot {
        /// File written by --out
        file: PathBuf,
        /// Directory of the plots
        #[arg(long)]
        into: PathBuf,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let mut target = cli.target;
    match &cli.scenario {
        Scenario::Report { file, selection } => {
            print!("{}", report::markdown(&report::read(file)?, selection));
            return Ok(());
        }
        Scenario::Plot { file, into } => {
            for path in plot::draw(&report::read(file)?, into)? {
                println!("{}", path.display());
            }
            return Ok(());
        }
        Scenario::Profile(args) => return profile::run(&target, args),
        _ => {}
    }
    let mut recorder = Recorder::open(&target)?;
    let peers = target.peers.clone();
    target.systems.retain(|name| name.installed(&peers).is_ok());
    match &cli.scenario {
        Scenario::ThroughputBatch(args) => throughput::batch(&target, args, &mut recorder)?,
        Scenario::ThroughputSingle(args) => throughput::single(&target, args, &mut recorder)?,
        Scenario::WorkerScaling(args) => throughput::scaling(&target, args, &mut recorder)?,
        Scenario::PickupLatency(args) => latency::pickup(&target, args, &mut recorder)?,
        Scenario::Offered5k(args) => latency::offered(&target, args, &mut recorder)?,
        Scenario::RescueCost(args) => rescue_cost::run(&target, args, &mut recorder)?,
        Scenario::PinnedHorizon(args) => horizon::pinned(&target, args, &mut recorder)?,
        Scenario::LongHorizon(args) => horizon::long(&target, args, &mut recorder)?,
        Scenario::Backlog(args) => backlog::backlog(&target, args, &mut recorder)?,
        Scenario::ScheduledBacklog(args) => backlog::scheduled(&target, args, &mut recorder)?,
        Scenario::LongTransaction(args) => backlog::long_transaction(&target, args, &mut recorder)?,
        Scenario::CrashRecovery(args) => crash::run(&target, args, &mut recorder)?,
        Scenario::Rebuild(args) => rebuild::run(&target, args, &mut recorder)?,
        Scenario::WalPerJob(args) => wal_per_job::run(&target, args, &mut recorder)?,
        Scenario::IdleCost(args) => idle::run(&target, args, &mut recorder)?,
        Scenario::Wakeup(args) => wakeup::run(&target, args, &mut recorder)?,
        Scenario::Heartbeat(args) => heartbeat::run(&target, args, &mut recorder)?,
        Scenario::Steady(args) => steady::run(&target, args, &mut recorder)?,
        Scenario::Memory => memory::run(&target, &mut recorder)?,
        Scenario::Report { .. } | Scenario::Plot { .. } | Scenario::Profile(_) => {}
    }
    print!("{}", report::markdown(recorder.run(), &Selection::default()));
    if recorder.broken() > 0 {
        bail!("{} measurement(s) failed their accounting", recorder.broken());
    }
    Ok(())
}
