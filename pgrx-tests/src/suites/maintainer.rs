//! The background workers, for real: when they come and go, and that what they do gets done with no call by hand.

mod commands;
mod tasks;
mod troubles;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::Client;

pub use self::commands::*;
pub use self::tasks::*;
pub use self::troubles::*;
use super::hostile_pool::Configured;
use super::{DATABASE, Stage};
use crate::process::wait_until;

const PATIENCE: Duration = Duration::from_secs(30);
/// Maintenance as it is used, only faster.
const ON: &[(&str, &str)] = &[("awa.maintenance", "on"), ("awa.maintenance_interval", "20ms")];

/// Other names than the database of the case.
const OTHERS: [&str; 4] = ["awa_one", "awa_two", "awa_three", "awa_four"];

fn begin(stage: &mut Stage<'_>, more: &[(&str, &str)]) -> Result<Configured> {
    let configured = Configured::restart_with(stage, &[ON, more].concat())?;
    for name in OTHERS {
        stage.cluster.drop_database(name)?;
    }
    Ok(configured)
}

fn end(stage: &Stage<'_>) -> Result<()> {
    for name in OTHERS {
        stage.cluster.drop_database(name)?;
    }
    Ok(())
}

/// Process of the maintainer in a database.
fn pid_of(client: &mut Client, database: &str) -> Result<Option<i32>> {
    let text = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'awa_queue maintainer' AND datname = $1";
    Ok(client.query_opt(text, &[&database])?.map(|row| row.try_get(0)).transpose()?)
}

fn wait_for_pid(client: &mut Client, database: &str, wanted: impl Fn(Option<i32>) -> bool, what: &str) -> Result<Option<i32>> {
    let mut seen = None;
    let good = wait_until(PATIENCE, || {
        seen = pid_of(client, database).unwrap_or(seen);
        wanted(seen)
    });
    ensure!(good, "{what}: the maintainer of {database} is {seen:?}");
    Ok(seen)
}

fn wait_for_maintainer(client: &mut Client, database: &str) -> Result<i32> {
    wait_for_pid(client, database, |pid| pid.is_some(), "it does not come")?.context("it does not come")
}

/// What the doctor says under this heading.
fn finding(client: &mut Client, check: &str) -> Result<(String, String)> {
    let row = client.query_opt("SELECT status, detail FROM awa.doctor() WHERE check_name = $1", &[&check])?;
    row.map_or(Ok((String::new(), String::new())), |row| Ok((row.try_get(0)?, row.try_get(1)?)))
}

fn wait_for_finding(client: &mut Client, check: &str, status: &str, words: &str) -> Result<()> {
    let mut seen = (String::new(), String::new());
    let good = wait_until(PATIENCE, || {
        seen = finding(client, check).unwrap_or_default();
        seen.0 == status && seen.1.contains(words)
    });
    ensure!(good, "{check} should be {status} with {words:?}, is {seen:?}");
    Ok(())
}

fn wait_until_it_works(client: &mut Client) -> Result<()> {
    wait_for_finding(client, "maintainer", "ok", "works")
}

fn steps_of(client: &mut Client, task: &str) -> Result<i64> {
    Ok(client.query_one("SELECT runs FROM awa.stat_maintenance WHERE task = $1", &[&task])?.try_get(0)?)
}

/// Waits until so many more steps of a task were done.
fn wait_for_steps(client: &mut Client, task: &str, more: i64) -> Result<()> {
    let before = steps_of(client, task)?;
    let mut seen = before;
    let good = wait_until(PATIENCE, || {
        seen = steps_of(client, task).unwrap_or(seen);
        seen >= before + more
    });
    ensure!(good, "task {task} had {before} steps, has {seen}");
    Ok(())
}

fn set(stage: &Stage<'_>, client: &mut Client, name: &str, value: &str) -> Result<()> {
    stage.cluster.configure(name, value)?;
    client.batch_execute("SELECT pg_reload_conf()")?;
    Ok(())
}
