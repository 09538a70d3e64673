//! What an operator does meanwhile: rotates, prunes, pauses, changes settings, looks, cancels and kills sessions.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use postgres::error::SqlState;
use postgres::{Client, Config};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Mischief, actions};

pub fn run(seed: u64, mischief: Mischief, clock_steps: bool, config: &Config, pids: &[AtomicI32], over: &AtomicBool) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x6f70);
    let mut client = super::connect(config)?;
    client.batch_execute("SET awa.prune_grace = 0; SET deadlock_timeout = '100ms'")?;
    let mut paused: Option<&str> = None;
    while !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(rng.random_range(5..40)));
        let queue = actions::queue(&mut rng);
        match rng.random_range(0..18) {
            0 | 1 => client.batch_execute("SELECT awa.rotate()")?,
            2..=4 => client.batch_execute("SELECT awa.prune()")?,
            5 => {
                if let Some(paused) = paused.take() {
                    client.batch_execute(&format!("SELECT awa.resume_queue('{paused}')"))?;
                } else {
                    client.batch_execute(&format!("SELECT awa.pause_queue('{queue}')"))?;
                    paused = Some(queue);
                }
            }
            6 => client.batch_execute(&format!("SELECT awa.alter_queue('{queue}', max_attempts => {})", rng.random_range(1..6)))?,
            7 => client.batch_execute("SELECT count(*) FROM awa.jobs; SELECT awa.queue_counts(); SELECT awa.segment_stats()")?,
            8 => look(&mut client)?,
            9 if mischief == Mischief::Rebuilds || mischief == Mischief::Carries => rebuild(&mut client)?,
            10..=12 => shoot(&mut client, &mut rng, pids, "pg_cancel_backend")?,
            13 => shoot(&mut client, &mut rng, pids, "pg_terminate_backend")?,
            14 => client.batch_execute(&format!("SELECT awa.alter_queue('{queue}', dead_letters => {})", rng.random_bool(0.6)))?,
            15 => client.batch_execute("SELECT awa.retention()")?,
            16 if clock_steps => {
                let offset = rng.random_range(-1.0..=1.0) * [0.01, 1.0, 60.0, 3600.0][rng.random_range(0..4)];
                client.batch_execute(&format!("SELECT awa_points.set_clock(({offset} * 1e6)::bigint)"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// It locks one segment after the other, and so do transactions that use several: one of them may have to give way.
fn rebuild(client: &mut Client) -> Result<()> {
    match client.batch_execute("SELECT awa.rebuild()") {
        Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => Ok(()),
        result => Ok(result?),
    }
}

/// In the middle of everything, log and frontier agree as well.
fn look(client: &mut Client) -> Result<()> {
    let rows = client.query("SELECT d::text FROM awa.verify() AS d LIMIT 20", &[])?;
    let differences: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    if differences.is_empty() {
        return Ok(());
    }
    let jobs = client.query("SELECT DISTINCT job_id FROM awa.verify() WHERE job_id IS NOT NULL LIMIT 3", &[])?;
    let jobs: Vec<i64> = jobs.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let mut story = Vec::new();
    for job_id in jobs {
        story.extend(rows_of(client, job_id)?);
    }
    bail!("verify() in the middle of the load:\n{}\n{}", differences.join("\n"), story.join("\n"));
}

/// All that the committed log says of a job, by table.
fn rows_of(client: &mut Client, job_id: i64) -> Result<Vec<String>> {
    let tables = client.query("SELECT relname::text FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r' ORDER BY 1", &[])?;
    let mut story = Vec::new();
    for table in &tables {
        let table: String = table.try_get(0)?;
        let its = if table.starts_with("lease_claims") || table.starts_with("done") { "$1 = ANY (job_ids)" } else { "job_id = $1" };
        let sql = format!("SELECT '{table} ' || t.ctid || ' xmin ' || t.xmin || ' ' || pg_xact_status(t.xmin::text::xid8) || ' ' || t::text FROM awa_segments.{table} AS t WHERE {its}");
        for row in client.query(&sql, &[&job_id])? {
            story.push(row.try_get(0)?);
        }
    }
    Ok(story)
}

fn shoot(client: &mut Client, rng: &mut StdRng, pids: &[AtomicI32], how: &str) -> Result<()> {
    let pid = pids[rng.random_range(0..pids.len())].load(Ordering::Relaxed);
    if pid != 0 {
        client.query_one(&format!("SELECT {how}($1)"), &[&pid])?;
    }
    Ok(())
}
