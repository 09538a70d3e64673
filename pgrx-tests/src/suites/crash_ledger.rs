//! Clients under load keep a ledger outside of the database while the server is killed at random moments, again and again. After each
//! crash the database is held to what they were told.
//!
//! The cluster runs with fsync=off. That is legitimate here: a killed process loses what it had in its own memory, and with it the
//! WAL that was not written yet (claims that commit asynchronously are lost for real), but not what it had handed to the kernel; fsync
//! matters when the kernel or the power goes, which no test of processes can play.
//!
//! `AWA_SEED` repeats the choices of a run (not the order in which the server meets them), `AWA_CRASH_ROUNDS` makes it longer.

mod audit;
mod book;
mod load;

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::book::Book;
use self::load::{Role, Worker};
use super::Stage;
use super::stress_mixed::{HASTY, configured, number};
use super::witnesses::{maintenance_goes_on, maintenance_rests};
use crate::cluster::Shutdown;
use crate::process::wait_until;

const ROLES: [Role; 9] = [
    Role::Producer,
    Role::Producer,
    Role::Consumer,
    Role::Consumer,
    Role::Consumer,
    Role::Consumer,
    Role::Holder,
    Role::Preparer,
    Role::Operator,
];

#[derive(Clone, Copy, Debug)]
enum Blow {
    KillBackend,
    KillServer,
    Immediate,
    Clean,
    KillMaintainer,
}

// If this fails, a crash of the server loses jobs, undoes work that was acknowledged, or makes running attempts worthless.
pub fn what_clients_were_told_survives_every_crash(stage: &mut Stage<'_>) -> Result<()> {
    rounds_of(stage, &[Blow::KillServer, Blow::KillBackend, Blow::Immediate, Blow::Clean])
}

// If this fails, a crash in the middle of a rotation, a prune, a carry or a rescue does.
pub fn what_clients_were_told_survives_crashes_of_the_maintainer(stage: &mut Stage<'_>) -> Result<()> {
    // Finished jobs stay visible although their segments are pruned all the time.
    stage.connect()?.batch_execute("SELECT awa.alter_queue('q', completed_retention => '1 day')")?;
    configured(stage, &HASTY, |stage| {
        rounds_of(stage, &[Blow::KillMaintainer, Blow::KillServer, Blow::KillMaintainer, Blow::Immediate, Blow::KillMaintainer])
    })
}

fn rounds_of(stage: &mut Stage<'_>, blows: &[Blow]) -> Result<()> {
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let rounds = number("AWA_CRASH_ROUNDS", 6);
    println!("        crash_ledger: AWA_SEED={seed} AWA_CRASH_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let book = Book::create(&stage.cluster.dir().join("crash_ledger.txt"))?;
    // The operator of the load rotates and does not prune: finished jobs must stay visible.
    stage.connect()?.batch_execute("SELECT awa.create_queue('unused')")?;
    let mut found = audit::Found::default();
    let is_maintained = blows.iter().any(|blow| matches!(blow, Blow::KillMaintainer));
    // Who reads all jobs may meet one twice while it is carried.
    let quiet = |stage: &Stage<'_>| if is_maintained { maintenance_rests(&mut stage.connect()?) } else { Ok(()) };
    for round in 0..rounds {
        // Each kind comes up in the normal run.
        let Some(blow) = blows.get(round as usize % blows.len()).copied() else { break };
        let after = Duration::from_millis(rng.random_range(150..1500));
        strike(stage, &book, rng.random(), round, blow, after).with_context(|| format!("round {round}: {blow:?} after {after:?}"))?;
        quiet(stage)?;
        audit::after_a_crash(stage, &book, &mut rng, &mut found).with_context(|| format!("after round {round}: {blow:?} after {after:?}"))?;
        if is_maintained {
            maintenance_goes_on(&mut stage.connect()?)?;
        }
    }
    quiet(stage)?;
    let report = audit::at_the_end(stage, &book)?;
    println!("        crash_ledger: {report}; {found:?}");
    ensure!(found.survived_open > 0 && found.ends_in_doubt > 0 && found.prepared > 0, "the crashes found nothing to destroy");
    Ok(())
}

/// Load, then the blow, then a server that answers again.
fn strike(stage: &mut Stage<'_>, book: &Book, seed: u64, round: u64, blow: Blow, after: Duration) -> Result<()> {
    let over = AtomicBool::new(false);
    let pids: Vec<AtomicI32> = ROLES.iter().map(|_| AtomicI32::new(0)).collect();
    let config = stage.config();
    let (struck, results): (Result<()>, Vec<Result<()>>) = thread::scope(|scope| {
        let workers: Vec<_> = (0u64..)
            .zip(ROLES)
            .zip(&pids)
            .map(|((number, role), pid)| {
                let (config, over) = (&config, &over);
                let rng = StdRng::seed_from_u64(seed ^ (number << 32));
                scope.spawn(move || Worker::new(role, round * 100 + number, rng, book, config, pid)?.run(over))
            })
            .collect();
        // Who could not connect says so when it is joined.
        wait_until(Duration::from_secs(10), || pids.iter().all(|pid| pid.load(Ordering::Relaxed) != 0));
        thread::sleep(after);
        let struck = match blow {
            Blow::KillServer => stage.cluster.crash(),
            Blow::Immediate => stage.cluster.stop(Shutdown::Immediate),
            Blow::Clean => stage.cluster.stop(Shutdown::Fast),
            Blow::KillBackend => {
                let pid = pids.iter().map(|pid| pid.load(Ordering::Relaxed)).find(|pid| *pid != 0);
                pid.context("no worker has connected").and_then(|pid| stage.cluster.kill_backend(pid))
            }
            Blow::KillMaintainer => maintainer(stage).and_then(|pid| stage.cluster.kill_backend(pid)),
        };
        over.store(true, Ordering::Relaxed);
        let join = |worker: thread::ScopedJoinHandle<'_, Result<()>>| worker.join().unwrap_or_else(|_| Err(anyhow!("a worker panicked")));
        (struck, workers.into_iter().map(join).collect())
    });
    struck?;
    results.into_iter().collect::<Result<Vec<()>>>()?;
    if !matches!(blow, Blow::KillBackend | Blow::KillMaintainer) {
        stage.cluster.start()?;
    }
    ensure!(stage.cluster.is_running(), "the server does not run");
    Ok(())
}

fn maintainer(stage: &Stage<'_>) -> Result<i32> {
    let mut client = stage.connect()?;
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'awa_queue maintainer' AND datname = current_database()";
    let mut pid = None;
    wait_until(Duration::from_secs(20), || {
        pid = client.query_opt(sql, &[]).ok().flatten().and_then(|row| row.try_get(0).ok());
        pid.is_some()
    });
    pid.context("there is no maintainer")
}
