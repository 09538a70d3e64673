//! One file a scenario: what is prepared, what is timed, what is recorded.

pub mod backlog;
pub mod crash;
pub mod heartbeat;
pub mod horizon;
pub mod idle;
pub mod latency;
pub mod memory;
pub mod profile;
pub mod rebuild;
pub mod rescue_cost;
pub mod steady;
pub mod throughput;
pub mod wakeup;
pub mod wal_per_job;

use anyhow::Result;
use postgres::Client;

use crate::Target;
use crate::load::{Cycle, LoadResult, PhaseResult};
use crate::report::{Measurement, Recorder};
use crate::stats;
use crate::systems::{Ability, System, SystemName};

/// A system and the way its workers finish a job.
#[derive(Clone, Copy)]
pub struct Contender {
    pub name: SystemName,
    pub cycle: Cycle,
}

impl Contender {
    pub fn label(self) -> String {
        match self.cycle {
            Cycle::Separate => self.name.as_str().to_owned(),
            Cycle::Combined => format!("{} (complete and claim in one call)", self.name.as_str()),
        }
    }
}

/// The comparison of a table is with its last system: one-call cycles come first.
pub fn contenders(
    target: &Target,
    cycles: &[Cycle],
    scenario: &str,
    case: &str,
    recorder: &mut Recorder,
) -> Result<Vec<Contender>> {
    let mut list = Vec::new();
    for &name in &target.systems {
        for cycle in [Cycle::Combined, Cycle::Separate] {
            let contender = Contender { name, cycle };
            if !cycles.contains(&cycle) {
                continue;
            }
            match target.system(name).lacks(Ability::OneCallCycle) {
                Some(reason) if cycle == Cycle::Combined => recorder.absent(scenario, case, &contender.label(), reason)?,
                _ => list.push(contender),
            }
        }
    }
    Ok(list)
}

/// Says what systems of the run cannot do, and returns those that can.
pub fn able(
    target: &Target,
    abilities: &[Ability],
    scenario: &str,
    case: &str,
    recorder: &mut Recorder,
) -> Result<Vec<SystemName>> {
    let mut able = Vec::new();
    for &name in &target.systems {
        let system = target.system(name);
        match abilities.iter().find_map(|ability| system.lacks(*ability)) {
            Some(reason) => recorder.absent(scenario, case, name.as_str(), reason)?,
            None => able.push(name),
        }
    }
    Ok(able)
}

/// Fails the run, without stopping it, when a job was lost, done twice or invented.
pub fn check_account(
    target: &Target,
    recorder: &mut Recorder,
    client: &mut Client,
    system: &dyn System,
    case: &str,
    result: &LoadResult,
) -> Result<()> {
    let name = system.name().as_str();
    if !result.account.is_clean() {
        recorder.complain(&format!("{name}, {case}: {:?}", result.account))?;
    }
    if let Some(server) = result.server_completed
        && server != result.account.completed as i64
    {
        let text = format!("{name}, {case}: the server counts {server} completed jobs, the driver {}", result.account.completed);
        recorder.complain(&text)?;
    }
    if !target.no_verify {
        for problem in system.verify(client)? {
            recorder.complain(&format!("{name}, {case}: verify: {problem}"))?;
        }
    }
    Ok(())
}

/// Numbers of the measured window, and, per job of the whole run, commits and dead tuples.
pub fn with_load_metrics(measurement: Measurement, window: &PhaseResult, result: &LoadResult) -> Measurement {
    let jobs = result.account.completed as f64;
    let per_job = |count: i64| (jobs > 0.0).then(|| count as f64 / jobs);
    let user = result.after.user.since(result.before.user);
    let catalog = result.after.catalog.since(result.before.catalog);
    measurement
        .metric("jobs/s", window.completed_per_second())
        .metric("WAL B/job", window.wal_bytes_per_job())
        .metric("WAL records/job", per_job(result.after.wal_records - result.before.wal_records))
        .metric("commits/job", per_job(result.after.commits - result.before.commits))
        .metric("dead tuples/job", per_job(user.made_dead()))
        .metric("catalog dead tuples", catalog.made_dead() as f64)
        .metric("enqueue p50 ms", stats::quantile(&window.enqueue_ms, 0.5))
        .metric("claim p50 ms", stats::quantile(&window.claim_ms, 0.5))
        .metric("complete p50 ms", stats::quantile(&window.complete_ms, 0.5))
        .metric("complete p99 ms", stats::quantile(&window.complete_ms, 0.99))
        .metric("largest backend MB", window.sessions.backend_megabytes_most)
        .metric("oldest snapshot, xids", window.sessions.snapshot_age_most)
        .metric("machine CPU %", window.machine_cpu)
        .metric("driver CPU %", window.client_cpu)
        .metric("lost", result.account.lost() as f64)
        .metric("done twice", result.account.completed_twice as f64)
}
