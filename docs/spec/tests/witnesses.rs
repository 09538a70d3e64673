//! Beside each property a model that breaks it: one rule is left out, and the violation must have the name that is expected.
//!
//! Where a rule belongs to `awa_protocol`, it is broken there (`mutants`): the witness is the code of the engine without it.
// Helpers of tests, too.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod pages;

use awa_spec::check::{explore, explore_until};
use awa_spec::locks::{BROKEN, BY_HAND, FIRST_USES, LONG, Locks, VERBS, Verb};
use awa_spec::properties::*;
use awa_spec::queue::configurations::*;
use awa_spec::queue::{Config, Machine};

struct Witness {
    broken: &'static str,
    model: Config,
    violates: &'static str,
}

fn witness(violates: &'static str, model: Config, broken: &'static str) -> Witness {
    Witness { broken, model, violates }
}

fn all() -> Vec<Witness> {
    vec![
        witness(LOST, ENQUEUE_CRASH, "enqueue_is_not_flushed"),
        witness(SKIPPED, ENQUEUE_CLAIM, "inserters_ignored"),
        witness(SKIPPED, SCHEDULED, "register_below_horizon"),
        witness(SKIPPED, SCHEDULED, "horizon_not_published"),
        witness(SKIPPED, ENQUEUE_CLAIM, "gap_forgotten"),
        witness(SKIPPED, ENQUEUE_CLAIM, "gap_dropped_early"),
        witness(SKIPPED, ENQUEUE_CLAIM, "awaited_not_applied"),
        witness(SKIPPED, SCHEDULED, "fresh_not_applied"),
        witness(SKIPPED, SCHEDULED, "unseen_inserters_forgotten"),
        witness(SKIPPED, ENQUEUE_CLAIM, "inserters_beyond_room_ignored"),
        witness(SKIPPED, ENQUEUE_CLAIM, "deregister_wrong_one"),
        witness(SKIPPED, ENQUEUE_CLAIM, "gap_growth_lost"),
        witness(SKIPPED, CARRY_WAITING, "passed_guard_forgotten"),
        witness(REACHED_TWICE, ENQUEUE_CLAIM, "gap_above_cursor"),
        witness(REACHED_TWICE, ENQUEUE_CLAIM, "gap_not_advanced"),
        witness(REACHED_TWICE, ENQUEUE_CLAIM, "committed_rows_of_inserters_taken"),
        witness(REACHED_TWICE, ENQUEUE_CLAIM, "inserter_range_from_below_cursor"),
        witness(REACHED_TWICE, STALE_PLANS, "two_turns"),
        witness(REACHED_TWICE, STALE_PLANS, "two_gap_turns"),
        witness(REACHED_TWICE, CANCEL, "hole_not_unlinked"),
        witness(REACHED_TWICE, ATTEMPT, "hop_ignored"),
        witness(REACHED_TWICE, CANCEL, "unpublished_becomes_a_hole"),
        witness(REACHED_TWICE, CARRY_WAITING, "carry_forgets_tombstone"),
        witness(TWO_ATTEMPTS, CANCEL, "no_tombstone_probe"),
        witness(TWO_ATTEMPTS, CARRY_WAITING, "guard_freed_before_commit"),
        witness(CLOSED_TWICE, ATTEMPT, "close_xid_ignored"),
        witness(CLOSED_TWICE, RESCUE, "marked_over_a_mark"),
        witness(CLOSED_TWICE, CANCEL, "cancel_without_second_look"),
        witness(CLOSED_TWICE, CARRY_RUNNING, "finisher_does_not_wait_for_carrier"),
        witness(CLOSED_TWICE, ATTEMPT_CRASH, "rescue_takes_closing"),
        witness(CLOSED_TWICE, CARRY_WAITING, "carry_of_passed_rows"),
        witness(CLOSED_TWICE, CARRY_PASSED, "held_turn_ignored"),
        witness(STALE_FINISH, ATTEMPT, "lease_ignored"),
        witness(STALE_FINISH, ATTEMPT_CRASH, "nonce_is_kept"),
        witness(OPEN_TRUNCATED, RING, "no_recheck_of_open_segment"),
        witness(OPEN_TRUNCATED, RING, "prune_takes_no_lock"),
        witness(OPEN_TRUNCATED, RING, "slot_reused_before_prune"),
        witness(OPEN_TRUNCATED, CARRY_WAITING, "pruned_with_ready_rows"),
        witness(OPEN_TRUNCATED, PRUNE_CRASH, "pruned_with_running_jobs"),
        witness(REBUILD_DIFFERS, HOLES, "rows_below_cursor_forgotten"),
        witness(REBUILD_DIFFERS, ATTEMPT, "closures_ignored"),
        witness(REBUILD_DIFFERS, ATTEMPT_CRASH, "claims_ignored"),
        witness(TOO_EARLY, ENQUEUE_CLAIM, "unfinished_rows_taken"),
        witness(TOO_EARLY, SCHEDULED, "scan_beyond_now"),
        witness(CURSOR_LOWERED, HOLES, "cursor_put_back_on_abort"),
        witness(REACHED_TWICE, HOLES, "cursor_lowered"),
        witness(FOREIGN_ENTRY, OWN_EXITS, "undo_oldest_first"),
        witness(FOREIGN_ENTRY, ATTEMPT, "aborted_claim_counts_as_settled"),
        witness(FOREIGN_ENTRY, RESCUE, "rescue_of_unsettled_claims"),
        witness(FOREIGN_ENTRY, ATTEMPT, "claim_in_progress_ignored"),
        witness(NOT_AN_APPEND, ATTEMPT, "end_deletes_the_row"),
        witness(NOT_AN_APPEND, ATTEMPT, "claim_marks_the_row"),
        witness(NOT_AN_APPEND, PRUNE_CRASH, "truncated_before_the_mark"),
        witness(NEVER_CLAIMED, ENQUEUE_ABORT, "turn_is_kept"),
        witness(SKIPPED, ENQUEUE_ABORT, "gap_not_extended"),
        witness(NEVER_CLAIMED, HOLES, "push_hole_loses"),
        witness(NEVER_SLEEPS, ENQUEUE_CRASH, "last_not_raised"),
        witness(NEVER_SLEEPS, ENQUEUE_ABORT, "registration_is_kept"),
        witness(NEVER_PRUNED, PRUNE_CRASH, "started_prune_forgotten"),
        witness(NEVER_PRUNED, PRUNE_CRASH, "prune_started_forgotten"),
        witness(NEVER_PRUNED, PRUNE_CRASH, "evidence_goes_to_the_open_segment"),
        witness(STUCK, OWN_EXITS, "own_exit_counts_as_foreign"),
        witness(ASSERTION, GAPS, "gaps_not_promised"),
    ]
}

/// Each variant violates what it is expected to; every property has one.
#[test]
fn each_broken_rule_is_named() {
    let only = std::env::var("AWA_WITNESS").unwrap_or_default();
    let chosen: Vec<Witness> = all().into_iter().filter(|witness| witness.broken.contains(&only)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let survived = std::sync::Mutex::new(Vec::new());
    let work = || {
        while let Some(witness) = chosen.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            let started = std::time::Instant::now();
            let machine = Machine::new(Config { broken: witness.broken, ..witness.model });
            let report = explore_until(machine, witness.violates);
            let seconds = started.elapsed().as_secs_f64();
            let found = report.names();
            println!("{} ({}): {found:?} after {} states, {seconds:.1} s", witness.broken, witness.model.name, report.states);
            if !found.contains(&witness.violates) {
                survived.lock().expect("not poisoned").push(format!(
                    "{} ({}) does not violate \"{}\" but {found:?}",
                    witness.broken, witness.model.name, witness.violates
                ));
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let survived = survived.into_inner().expect("not poisoned");
    assert!(survived.is_empty(), "{}", survived.join("\n"));
    if only.is_empty() {
        pages::check("README.md", "witnesses", &table());
    }
}

fn table() -> Vec<String> {
    let all = all();
    let mut names: Vec<&'static str> = Vec::new();
    all.iter().map(|witness| witness.violates).for_each(|name| {
        if !names.contains(&name) {
            names.push(name);
        }
    });
    names
        .into_iter()
        .map(|name| {
            let of: Vec<String> = all
                .iter()
                .filter(|witness| witness.violates == name)
                .map(|witness| format!("`{}` in {}", witness.broken, witness.model.name))
                .collect();
            format!("| {name} | {} |", of.join(", "))
        })
        .collect()
}

fn find(name: &str) -> &'static Verb {
    let all = || VERBS.iter().chain(FIRST_USES).chain(LONG).chain(BY_HAND).chain(BROKEN);
    all().find(|verb| verb.name == name).unwrap_or_else(|| panic!("no verb {name}"))
}

#[test]
fn each_broken_order_of_locks_is_named() {
    for (broken, beside, violates) in [
        ("rebuild, newest segment first", "fail", DEADLOCK),
        ("complete, in the order of the request", "complete", DEADLOCK),
        ("prune that waits, evidence first", "claim", DEADLOCK),
        ("give back, partition first", "enqueue", LWLOCK_ORDER),
        ("give back, partition first", "claim", DEADLOCK),
        ("give back, partition first", "claim", UNSEEN_WAIT),
        ("move between partitions", "enqueue", LWLOCK_ORDER),
        ("enqueue, locks under the lock", "enqueue", WAIT_UNDER_LWLOCK),
        ("build, announced first", "adopt that waits for the build", UNSEEN_WAIT),
        ("lock table, then first use", "first use", UNSEEN_WAIT),
    ] {
        let teams = vec![vec![find(broken), find(beside)]];
        let report = explore_until(Locks { teams, seen_cycles_allowed: false }, violates);
        assert!(report.names().contains(&violates), "{broken} beside {beside}: {:?}", report.violations);
        println!("{broken}, beside {beside}: {violates}");
    }
    // The wait for a build is safe as it is: the lock comes first.
    let teams = vec![vec![find("first use"), find("adopt that waits for the build")]];
    assert_eq!(explore(Locks { teams, seen_cycles_allowed: false }).violations, vec![]);
}
