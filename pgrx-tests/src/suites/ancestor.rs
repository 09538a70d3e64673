//! What an earlier queue of this design did wrong, each failure reproduced there by running it: the same interleaving here.
//!
//! E12 is a table of costs: see `hot_path` and docs/benchmarks.md. Unique jobs (half of E4 and of E10) are not built.

mod costs;
mod ends;
mod history;
mod ring;

use anyhow::{Context, Result};
use postgres::{Client, GenericClient};

pub use self::costs::*;
pub use self::ends::*;
pub use self::history::*;
pub use self::ring::*;
use super::Attempt;

/// Outcome and detail of a step of maintenance.
fn step(client: &mut impl GenericClient, call: &str) -> Result<(String, String)> {
    let row = client.query_one(&format!("SELECT outcome, COALESCE(detail, '') FROM awa.{call}"), &[]).with_context(|| call.to_owned())?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Prunes until no segment moves; what was said last.
fn prune_all(client: &mut Client) -> Result<(String, String)> {
    client.batch_execute("SET awa.prune_grace = 0")?;
    for _ in 0..300 {
        let said = step(client, "prune()")?;
        if !matches!(said.0.as_str(), "prune_started" | "pruned") {
            return Ok(said);
        }
    }
    anyhow::bail!("prune does not come to an end")
}

fn rotate(client: &mut Client) -> Result<()> {
    client.batch_execute("SELECT awa.rotate()").context("rotate")
}

fn answer(client: &mut impl GenericClient, call: &str, attempt: Attempt) -> Result<String> {
    let call = call.replace("$job", &attempt.job_id.to_string()).replace("$lease", &attempt.run_lease.to_string());
    Ok(client.query_one(&format!("SELECT awa.{call}"), &[]).with_context(|| call.clone())?.try_get(0)?)
}

fn state_of(client: &mut Client, job: i64) -> Result<String> {
    let row = client.query_opt("SELECT state FROM awa.job($1)", &[&job])?;
    row.map_or(Ok("gone".to_owned()), |row| Ok(row.try_get(0)?))
}

fn live_segments(client: &mut Client) -> Result<i64> {
    Ok(client.query_one("SELECT count(*) FROM awa.stat_segments", &[])?.try_get(0)?)
}
