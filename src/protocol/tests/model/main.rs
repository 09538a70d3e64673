//! A model of PostgreSQL and random schedules for the frontier.
#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used)]

mod check;
mod claimer;
mod crash;
mod finisher;
mod producer;
mod profile;
mod run;
mod tx;
mod world;

use std::panic::catch_unwind;

use world::Stats;

/// A rule of the callers (not of the crate) that a mutant breaks.
#[cfg(feature = "mutants")]
pub fn broken(name: &'static str) -> bool {
    awa_protocol::mutants::is(name)
}
#[cfg(not(feature = "mutants"))]
pub fn broken(_name: &'static str) -> bool {
    false
}

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map_or("?".to_owned(), |text| (*text).to_owned()),
    }
}

fn attempt(seed: u64) -> Result<Stats, String> {
    catch_unwind(|| run::run(seed, profile::of_seed(seed), &mut None)).map_err(message)
}

fn add(sum: &mut Stats, one: Stats) {
    sum.steps += one.steps;
    sum.taken += one.taken;
    sum.drained += one.drained;
    sum.gaps_max = sum.gaps_max.max(one.gaps_max);
    sum.gap_room_refused += one.gap_room_refused;
    sum.inserters_refused += one.inserters_refused;
    sum.tracks_refused += one.tracks_refused;
    sum.tracks_unfit += one.tracks_unfit;
    sum.pool_full += one.pool_full;
    sum.guards_passed += one.guards_passed;
    sum.tombstones_met += one.tombstones_met;
    sum.crashes += one.crashes;
    sum.claims_lost += one.claims_lost;
    sum.prunes += one.prunes;
    sum.ring_full += one.ring_full;
    sum.rechecks += one.rechecks;
    sum.waits += one.waits;
    sum.stale += one.stale;
    sum.uncommitted += one.uncommitted;
    sum.stale_names += one.stale_names;
}

#[test]
fn schedules() {
    let seeds: u64 = std::env::var("AWA_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let started = std::time::Instant::now();
    let half = |odd: u64| {
        move || {
            let mut sum = Stats::default();
            for seed in (odd..seeds).step_by(2) {
                match attempt(seed) {
                    Ok(one) => add(&mut sum, one),
                    Err(text) => return Err(format!("AWA_SEED={seed} cargo test replay: {text}")),
                }
            }
            Ok(sum)
        }
    };
    let threads = [std::thread::spawn(half(0)), std::thread::spawn(half(1))];
    let mut sum = Stats::default();
    let mut failures = Vec::new();
    for thread in threads {
        match thread.join().expect("the thread ends") {
            Ok(one) => add(&mut sum, one),
            Err(text) => failures.push(text),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{seeds} schedules in {:?}: {sum:?}", started.elapsed());
}

/// `AWA_SEED=n cargo test replay`: one schedule again, with its last steps.
#[test]
fn replay() {
    let Some(seed) = std::env::var("AWA_SEED").ok().and_then(|n| n.parse().ok()) else { return };
    let mut trace = Some(Vec::new());
    let profile = profile::of_seed(seed);
    let ended = catch_unwind(std::panic::AssertUnwindSafe(|| run::run(seed, profile, &mut trace)));
    let lines = trace.unwrap_or_default();
    let shown: usize = std::env::var("AWA_LINES").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    for line in lines.iter().skip(lines.len().saturating_sub(shown)) {
        println!("{line}");
    }
    if let Err(panic) = ended {
        panic!("seed {seed} ({}): {}", profile.name, message(panic));
    }
}
