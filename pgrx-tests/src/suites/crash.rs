//! After a crash the frontier is rebuilt from the log: no acknowledged job is lost, no attempt is handed out twice.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use postgres::{Client, Config, NoTls};

use super::{Attempt, Stage, claim, complete, drain, enqueue, ids, sorted};
use crate::cluster::Shutdown;
use crate::process::wait_until;

/// Some jobs completed, some running, some waiting, and two open transactions that a crash undoes.
struct Scene {
    waiting: Vec<i64>,
    running: Vec<Attempt>,
    _claimer: Client,
    _producer: Client,
}

fn set_up(stage: &Stage<'_>) -> Result<Scene> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 400)?;
    // In a transaction block the claim is as durable as its caller asks, so that the crash cannot undo it.
    let mut transaction = client.transaction()?;
    let claimed = claim(&mut transaction, 150)?;
    transaction.commit()?;
    let (finished, running) = claimed.split_at(100);
    for &attempt in finished {
        complete(&mut client, attempt)?;
    }
    let (mut claimer, mut producer) = (stage.connect()?, stage.connect()?);
    claimer.batch_execute("BEGIN")?;
    ensure!(claim(&mut claimer, 50)?.len() == 50, "too few jobs to claim");
    producer.batch_execute("BEGIN")?;
    enqueue(&mut producer, 50)?;
    let taken: BTreeSet<i64> = ids(&claimed).into_iter().collect();
    let waiting = jobs.into_iter().filter(|id| !taken.contains(id)).collect();
    Ok(Scene { waiting, running: running.to_vec(), _claimer: claimer, _producer: producer })
}

fn check(stage: &Stage<'_>, scene: &Scene) -> Result<()> {
    stage.verify_clean()?;
    let mut client = stage.connect()?;
    let drained = drain(&mut client)?;
    ensure!(sorted(drained.clone()) == sorted(scene.waiting.clone()), "waiting were {} jobs, {} came out", scene.waiting.len(), drained.len());
    for &attempt in &scene.running {
        let result = complete(&mut client, attempt)?;
        ensure!(result == "completed", "job {}: complete answered {result}", attempt.job_id);
    }
    ensure!(claim(&mut client, 10)?.is_empty(), "there are jobs left");
    Ok(())
}

// If this fails, the crash of one session loses jobs of others.
pub fn a_killed_backend_loses_no_job(stage: &mut Stage<'_>) -> Result<()> {
    let mut scene = set_up(stage)?;
    let pid: i32 = scene._claimer.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
    stage.cluster.kill_backend(pid)?;
    check(stage, &scene)
}

// If this fails, a power failure loses jobs.
pub fn a_killed_postmaster_loses_no_job(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    stage.cluster.crash()?;
    stage.cluster.start()?;
    check(stage, &scene)
}

// If this fails, an immediate shutdown loses jobs.
pub fn an_immediate_shutdown_loses_no_job(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    stage.cluster.restart(Shutdown::Immediate)?;
    check(stage, &scene)
}

// If this fails, a restart makes every worker's work of the moment worthless.
pub fn open_attempts_keep_their_lease_over_a_restart(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    stage.cluster.restart(Shutdown::Fast)?;
    check(stage, &scene)
}

/// What clients were told before the server died.
#[derive(Default)]
struct Told {
    enqueued: Mutex<BTreeSet<i64>>,
    completed: Mutex<Vec<i64>>,
}

// If this fails, an acknowledged job is lost, or finished twice, when the server is killed under load.
pub fn a_crash_under_load_loses_no_acknowledged_job(stage: &mut Stage<'_>) -> Result<()> {
    for round in 0..3 {
        let told = Told::default();
        let dead = AtomicBool::new(false);
        thread::scope(|scope| {
            for worker in 0..6 {
                let (told, dead, config) = (&told, &dead, stage.config());
                scope.spawn(move || if worker < 2 { keep_enqueuing(&config, told, dead) } else { keep_completing(&config, told, dead) });
            }
            // In the middle of it, a little later each time.
            let completed = || told.completed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len();
            let is_busy = wait_until(Duration::from_secs(30), || completed() >= 300 * (round + 1));
            let result = stage.cluster.crash();
            dead.store(true, Ordering::Relaxed);
            ensure!(is_busy, "only {} jobs were completed", completed());
            result
        })?;
        stage.cluster.start()?;
        stage.verify_clean()?;
        account_for(stage, &told)?;
    }
    Ok(())
}

fn keep_enqueuing(config: &Config, told: &Told, dead: &AtomicBool) {
    let Ok(mut client) = config.connect(NoTls) else { return };
    while !dead.load(Ordering::Relaxed) {
        let Ok(jobs) = enqueue(&mut client, 10) else { return };
        told.enqueued.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(jobs);
    }
}

fn keep_completing(config: &Config, told: &Told, dead: &AtomicBool) {
    let Ok(mut client) = config.connect(NoTls) else { return };
    while !dead.load(Ordering::Relaxed) {
        let Ok(attempts) = claim(&mut client, 5) else { return };
        for attempt in attempts {
            if complete(&mut client, attempt).is_err() {
                return;
            }
            told.completed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(attempt.job_id);
        }
    }
}

/// Every job that a client was told of is finished, running or waiting; none was completed twice.
fn account_for(stage: &Stage<'_>, told: &Told) -> Result<()> {
    let mut client = stage.connect()?;
    let mut state_of = std::collections::BTreeMap::new();
    for view in ["awa.jobs", "awa.terminal_jobs"] {
        for row in client.query(&format!("SELECT job_id, state FROM {view}"), &[])? {
            let (id, state): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
            if let Some(other) = state_of.insert(id, state.clone()) {
                bail!("job {id} is {other} and {state}");
            }
        }
    }
    let enqueued = told.enqueued.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let completed = told.completed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    ensure!(!enqueued.is_empty() && !completed.is_empty(), "the load did nothing: {} enqueued, {} completed", enqueued.len(), completed.len());
    let lost: Vec<&i64> = enqueued.iter().filter(|id| !state_of.contains_key(id)).collect();
    ensure!(lost.is_empty(), "{} acknowledged jobs are lost: {lost:?}", lost.len());
    let distinct: BTreeSet<i64> = completed.iter().copied().collect();
    ensure!(distinct.len() == completed.len(), "a job was completed twice");
    let undone: Vec<&i64> = distinct.iter().filter(|id| state_of.get(id).is_none_or(|state| state != "completed")).collect();
    ensure!(undone.is_empty(), "{} acknowledged completions are lost: {undone:?}", undone.len());
    Ok(())
}
