//! Speed of building the frontier from the log. Load first, restart the server, then measure: the restart is the caller's.

use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::Target;
use crate::report::{Measurement, Recorder};
use crate::systems::{Due, SystemName, connect, connect_loader};

const QUEUE: &str = "rebuild";

#[derive(Args)]
pub struct RebuildArgs {
    /// Rows to load, or rows that were loaded
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Load the rows and stop
    #[arg(long)]
    load: bool,
}

pub fn run(target: &Target, args: &RebuildArgs, recorder: &mut Recorder) -> Result<()> {
    if args.load { load(target, args) } else { measure(target, args, recorder) }
}

fn load(target: &Target, args: &RebuildArgs) -> Result<()> {
    let awa = target.system(SystemName::Awa);
    let mut client = connect_loader(&target.url)?;
    awa.reset(&mut client)?;
    let exists = client.query_opt("SELECT 1 FROM awa.queues WHERE queue = $1", &[&QUEUE])?.is_some();
    if !exists {
        awa.create_queue(&mut client, QUEUE)?;
    }
    let start = Instant::now();
    awa.bulk_load(&mut client, QUEUE, args.rows, Due::Now)?;
    client.batch_execute("CHECKPOINT")?;
    eprintln!("{} jobs loaded in {:.0} s", args.rows, start.elapsed().as_secs_f64());
    Ok(())
}

fn measure(target: &Target, args: &RebuildArgs, recorder: &mut Recorder) -> Result<()> {
    let mut client = connect(&target.url)?;
    let available = "SELECT available FROM awa.queue_counts($1::text)";
    let start = Instant::now();
    let counted: Option<i64> = client.query_opt(available, &[&QUEUE])?.map(|row| row.try_get(0)).transpose()?;
    let first_use = start.elapsed().as_secs_f64();
    for round in 1..=target.rounds {
        let start = Instant::now();
        let rebuilt: i64 = client.query_one("SELECT awa.rebuild()", &[])?.try_get(0)?;
        let seconds = start.elapsed().as_secs_f64();
        let measurement = Measurement::new("rebuild", format!("{} rows", args.rows), SystemName::Awa.as_str(), round)
            .metric("rows/s", args.rows as f64 / seconds)
            .metric("seconds", seconds)
            .metric("returned", rebuilt as f64)
            .metric("first use after the start, seconds", (round == 1).then_some(first_use));
        recorder.record(measurement)?;
    }
    let after: Option<i64> = client.query_opt(available, &[&QUEUE])?.map(|row| row.try_get(0)).transpose()?;
    if after != counted {
        recorder.complain(&format!("rebuild: {counted:?} jobs available before, {after:?} after"))?;
    }
    if !target.no_verify {
        for problem in target.system(SystemName::Awa).verify(&mut client)? {
            recorder.complain(&format!("rebuild: verify: {problem}"))?;
        }
    }
    Ok(())
}
