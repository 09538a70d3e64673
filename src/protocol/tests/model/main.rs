//! A model of PostgreSQL, random schedules for the frontier, and a list of everything that may go wrong.
//!
//! `schedules` runs seeds (`AWA_SEEDS=n`), `AWA_SEED=n cargo test replay` shows one; with `--features mutants` each rule is broken
//! once and must be noticed. What a line of `docs/races.md` has here:
//!
//! | line | schedules in which it happens | mutants |
//! |---|---|---|
//! | 1 | cancels of waiting rows, of guards in passing, of holes; tombstones after the guard is gone | no_tombstone_probe, cancel_without_second_look, cancel_of_a_popped_hole, abandon_after_reserving, cursor_from_unclaimed_closures |
//! | 2 | commit and its callbacks are separate steps; retry and snooze | hop_ignored, stamp_reused |
//! | 3 | several hops of a job in one segment; keys tie, identifiers do not ascend across sessions | closures_ignored, claims_ignored |
//! | 4 | the pointer is read, then locked, then checked in the registration; rotation and prune between | no_recheck_of_open_segment, slot_reused_before_prune, pruned_with_ready_rows, pruned_with_running_jobs |
//! | 5 | prune in three steps, a crash between any two | prune_started_forgotten |
//! | 6 | registrations at any point of a scan | inserters_ignored, register_below_horizon, horizon_not_published, fresh_not_applied, unseen_inserters_forgotten, awaited_not_applied |
//! | 7 | a producer sleeps between any two rows | gap_*, two_gap_turns, inserter_range_from_below_cursor, committed_rows_of_inserters_taken, gap_of_inserter_not_widened |
//! | 8 | errors while registered, to a savepoint or to the top | deregister_wrong_one |
//! | 9 | a running attempt is carried; its worker, cancels, heartbeats and scans come at any moment | finisher_does_not_wait_for_carrier, born_claimed_copy_offered, heartbeat_lost_in_carry, extension_lost_in_carry, cursor_from_born_claimed |
//! | 10 | waiting jobs, holes and rows in gaps are carried, rather while a scan passes them (profile `passed`); retries go into the open segment by ordinary registration | carry_keeps_old_key, carry_forgets_tombstone, guard_freed_before_commit, guard_freed_after_a_look, carry_of_passed_rows, held_turn_ignored, register_below_horizon |
//! | 12 | asynchronous claims lost by a crash; workers come back with old leases | lease_ignored, nonce_is_kept |
//! | 13 | the worker has its rows before the claim commits; the claim aborts | claim_in_progress_ignored, aborted_claim_counts_as_settled |
//! | 27 | failed and cancelled jobs are tried again and deleted, by several at once; rows of evidence in any order | superseding_evidence_lost, superseded_counts_as_claimed, redrive_without_second_look, redrive_without_lock, superseding_guard_becomes_a_hole |
//! | 15 | several exits in one transaction, savepoints between; others come between a decision and its mark | undo_oldest_first, close_xid_ignored, marked_over_a_mark |
//! | 16 | a build opens a segment first, producers go on, the clock is set back; prepared transactions | last_not_raised, rows_below_cursor_forgotten |
//! | 17 | stale names in local lists | stamp_reused |
//! | 19 | ties, clock jumps | scan_beyond_now, cursor_lowered; `ties_are_spread` |
//! | 20 | profiles `crowd`, `savepoints`: gaps, promises, inserters and tracks run out | gaps_not_promised, inserters_beyond_room_ignored, gap_not_extended, gap_growth_lost; `full_pools_refuse` |
//! | 22 | profile `holes`: the pool is full of holes | push_hole_loses, hole_not_unlinked |
//! | 23 | a build that finds the pool too small begins again with a larger one | |
//! | 24 | REPEATABLE READ claimers stop before what they do not see | unseen_rows_become_gaps |
//!
//! Not here: 11 (dumps), 14 (lock waits), 18, 21, 25, 26.
#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used)]
// A value of each session, moved once a step.
#![allow(clippy::large_enum_variant)]

mod carrier;
mod check;
mod claimer;
mod crash;
mod finisher;
#[cfg(feature = "mutants")]
mod mutants;
mod passed;
mod producer;
mod profile;
mod redrive;
mod rules;
mod run;
mod tx;
mod world;

use std::panic::catch_unwind;

use world::Stats;

/// A rule of the callers (not of the crate) that a mutant breaks.
pub fn broken(name: &'static str) -> bool {
    awa_protocol::mutants::is(name)
}

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map_or("?".to_owned(), |text| (*text).to_owned()),
    }
}

/// Violations are told once, by the test that looks for them.
fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload().downcast_ref::<String>().map_or("", String::as_str);
            let text = info.payload().downcast_ref::<&str>().copied().unwrap_or(text);
            if !text.starts_with("VIOLATION") && !text.starts_with("LIMIT") {
                loud(info);
            }
        }));
    });
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
    sum.marked_late += one.marked_late;
    sum.uncommitted += one.uncommitted;
    sum.stale_names += one.stale_names;
    sum.superseded += one.superseded;
    sum.carried += one.carried;
    sum.carried_running += one.carried_running;
    sum.heartbeats_carried += one.heartbeats_carried;
}

#[test]
fn schedules() {
    let seeds: u64 = std::env::var("AWA_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3_000);
    quiet();
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
    let shown: usize = std::env::var("AWA_LINES").ok().and_then(|n| n.parse().ok()).unwrap_or(4_000);
    for line in lines.iter().skip(lines.len().saturating_sub(shown)) {
        println!("{line}");
    }
    if let Err(panic) = ended {
        panic!("seed {seed} ({}): {}", profile.name, message(panic));
    }
}
