//! What an idle server with the extension does: transaction ids, log and CPU time, over a while in which nobody calls.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::counters;
use crate::report::{Measurement, Recorder};
use crate::systems::{SystemName, connect};

const SECONDS: f64 = 600.0;
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Args)]
pub struct IdleArgs {
    /// Seconds until what the setting up has caused (a rotation, a checkpoint's own record) is over
    #[arg(long, default_value_t = 20)]
    settle: u64,
}

pub fn run(target: &Target, args: &IdleArgs, recorder: &mut Recorder) -> Result<()> {
    for name in target.systems.iter().filter(|name| **name != SystemName::Awa) {
        recorder.absent(
            "idle-cost",
            "idle",
            name.as_str(),
            "it runs nothing in the server; its maintenance is its clients' work",
        )?;
    }
    let awa = target.system(SystemName::Awa);
    let queue = format!("idle_{}", std::process::id());
    let mut client = connect(&target.url)?;
    awa.reset(&mut client)?;
    awa.create_queue(&mut client, &queue)?;
    client.batch_execute("CHECKPOINT")?;
    thread::sleep(Duration::from_secs(args.settle));
    let seconds = target.window(SECONDS);
    let (xid, wal, cpu) = (next_xid(&mut client)?, counters::wal_position(&mut client)?, maintainer_cpu(&mut client)?);
    thread::sleep(Duration::from_secs_f64(seconds));
    let measurement = Measurement::new("idle-cost", format!("{seconds} s"), SystemName::Awa.as_str(), 1)
        .metric("transaction ids", (next_xid(&mut client)? - xid) as f64)
        .metric("WAL bytes of the whole server", (counters::wal_position(&mut client)? - wal) as f64)
        .metric("CPU ms of launcher and maintainer", (maintainer_cpu(&mut client)? - cpu) * 1e3);
    recorder.record(measurement)?;
    awa.drop_queue(&mut client, &queue)
}

/// Takes none.
fn next_xid(client: &mut Client) -> Result<i64> {
    let row = client.query_one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint", &[])?;
    Ok(row.try_get(0)?)
}

/// CPU seconds of our background workers.
fn maintainer_cpu(client: &mut Client) -> Result<f64> {
    let rows = client.query("SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'awa_queue%'", &[])?;
    let mut seconds = 0.0;
    for row in rows {
        let pid: i32 = row.try_get(0)?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: f64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        seconds += ticks / TICKS_PER_SECOND;
    }
    Ok(seconds)
}
