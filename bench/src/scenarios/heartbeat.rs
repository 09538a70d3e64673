//! Cost of a heartbeat: as a round trip beside an empty statement, and inside the server without the protocol.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::counters;
use crate::payload::Payload;
use crate::report::{Measurement, Recorder};
use crate::systems::{Session, SystemName, connect};

const BLOCK: usize = 500;

#[derive(Args)]
pub struct HeartbeatArgs {
    /// Round trips of each statement
    #[arg(long, default_value_t = 20_000)]
    calls: usize,
    /// Calls inside one statement
    #[arg(long, default_value_t = 1_000_000)]
    server_calls: i64,
    /// Other jobs running at the same time
    #[arg(long, default_value_t = 0)]
    running: usize,
}

pub fn run(target: &Target, args: &HeartbeatArgs, recorder: &mut Recorder) -> Result<()> {
    let awa = target.system(SystemName::Awa);
    let queue = format!("heartbeat_{}", std::process::id());
    let mut client = connect(&target.url)?;
    awa.reset(&mut client)?;
    awa.create_queue(&mut client, &queue)?;
    let mut session = awa.connect(&target.url, &queue)?;
    claim_others(&mut *session, args.running)?;
    session.enqueue(&[Payload::numbered(0)])?;
    let job = session.claim(1)?.into_iter().next().context("the job cannot be claimed")?;
    let client = session.client();
    for round in 1..=target.rounds {
        let wal = counters::wal_position(client)?;
        let (beat, empty) = round_trips(client, args.calls, job.job_id, job.lease)?;
        let (beat_in_server, empty_in_server) = in_server(client, args.server_calls, job.job_id, job.lease)?;
        let wal = counters::wal_position(client)? - wal;
        let case = format!("{} jobs running", args.running + 1);
        let measurement = Measurement::new("heartbeat", case, SystemName::Awa.as_str(), round)
            .metric("in the server, ns", beat_in_server - empty_in_server)
            .metric("round trip, ns", beat)
            .metric("SELECT 1 round trip, ns", empty)
            .metric("difference, ns", beat - empty)
            .metric("WAL bytes in all", wal as f64);
        recorder.record(measurement)?;
    }
    session.complete(&[job])?;
    drop(session);
    let mut client = connect(&target.url)?;
    awa.drop_queue(&mut client, &queue)
}

fn claim_others(session: &mut dyn Session, running: usize) -> Result<()> {
    let mut claimed = 0;
    while claimed < running {
        let jobs = (running - claimed).min(100);
        let payloads: Vec<Payload> = (0..).take(jobs).map(Payload::numbered).collect();
        session.enqueue(&payloads)?;
        claimed += session.claim(i32::try_from(jobs)?)?.len();
    }
    Ok(())
}

/// Nanoseconds of (heartbeat, empty statement), in alternating blocks of round trips.
fn round_trips(client: &mut Client, calls: usize, job_id: i64, lease: i64) -> Result<(f64, f64)> {
    let heartbeat = client.prepare("SELECT awa.heartbeat($1::bigint, $2::bigint)")?;
    let empty = client.prepare("SELECT 1")?;
    let (mut beat_seconds, mut empty_seconds, mut done) = (0.0, 0.0, 0);
    while done < calls {
        let start = Instant::now();
        for _ in 0..BLOCK {
            let row = client.query_one(&heartbeat, &[&job_id, &lease])?;
            if !row.try_get::<_, bool>(0)? {
                bail!("a heartbeat of a running job was refused");
            }
        }
        beat_seconds += start.elapsed().as_secs_f64();
        let start = Instant::now();
        for _ in 0..BLOCK {
            client.query_one(&empty, &[])?;
        }
        empty_seconds += start.elapsed().as_secs_f64();
        done += BLOCK;
    }
    Ok((beat_seconds * 1e9 / done as f64, empty_seconds * 1e9 / done as f64))
}

/// Nanoseconds a row of one statement that calls (the heartbeat, nothing) for each row.
fn in_server(client: &mut Client, calls: i64, job_id: i64, lease: i64) -> Result<(f64, f64)> {
    let start = Instant::now();
    let beats: i64 = client
        .query_one(
            "SELECT count(*) FILTER (WHERE awa.heartbeat($1::bigint, $2::bigint)) FROM generate_series(1, $3::bigint)",
            &[&job_id, &lease, &calls],
        )?
        .try_get(0)?;
    let beat = start.elapsed().as_secs_f64();
    if beats != calls {
        bail!("{beats} of {calls} heartbeats were accepted");
    }
    let start = Instant::now();
    client.query_one("SELECT count(*) FILTER (WHERE n > 0) FROM generate_series(1, $1::bigint) AS n", &[&calls])?;
    let empty = start.elapsed().as_secs_f64();
    Ok((beat * 1e9 / calls as f64, empty * 1e9 / calls as f64))
}
