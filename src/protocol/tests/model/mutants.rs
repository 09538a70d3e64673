//! Each rule broken once: the schedules must notice. Run with `cargo test --features mutants`.
//!
//! The number is the line of `docs/races.md` that the rule closes; 0: a rule without a line of its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::attempt;

/// Rules of the crate.
const PROTOCOL: &[(&str, u32)] = &[
    ("inserters_ignored", 6),
    ("inserters_beyond_room_ignored", 20),
    ("inserter_range_from_below_cursor", 7),
    ("unseen_inserters_forgotten", 6),
    ("awaited_not_applied", 6),
    ("fresh_not_applied", 6),
    ("last_not_raised", 16),
    ("horizon_not_published", 6),
    ("register_below_horizon", 6),
    ("deregister_wrong_one", 8),
    ("two_turns", 0),
    ("scan_beyond_now", 19),
    ("cursor_lowered", 19),
    ("gap_forgotten", 7),
    ("gap_above_cursor", 7),
    ("gap_not_extended", 20),
    ("gap_dropped_early", 7),
    ("gap_growth_lost", 20),
    ("gap_not_advanced", 7),
    ("two_gap_turns", 7),
    ("gap_beyond_next_source", 0),
    ("gaps_not_promised", 20),
    ("push_hole_loses", 22),
    ("hole_not_unlinked", 22),
    ("hop_ignored", 2),
    ("stamp_reused", 2),
    ("lease_ignored", 12),
    ("close_xid_ignored", 15),
    ("marked_over_a_mark", 15),
    ("claim_in_progress_ignored", 13),
    ("closures_ignored", 3),
    ("claims_ignored", 3),
    ("cursor_from_unclaimed_closures", 1),
    ("rows_below_cursor_forgotten", 16),
    ("superseding_evidence_lost", 27),
    ("superseded_counts_as_claimed", 27),
    ("pruned_with_ready_rows", 4),
    ("pruned_with_running_jobs", 4),
    ("slot_reused_before_prune", 4),
    ("prune_started_forgotten", 5),
    ("finisher_does_not_wait_for_carrier", 9),
    ("heartbeat_lost_in_carry", 9),
    ("extension_lost_in_carry", 9),
    ("cursor_from_born_claimed", 9),
    ("carry_of_passed_rows", 10),
    ("held_turn_ignored", 10),
];

/// Rules of the callers, which the model plays.
const CALLERS: &[(&str, u32)] = &[
    ("no_recheck_of_open_segment", 4),
    ("committed_rows_of_inserters_taken", 7),
    ("gap_of_inserter_not_widened", 7),
    ("unseen_rows_become_gaps", 24),
    ("abandon_after_reserving", 1),
    ("no_tombstone_probe", 1),
    ("cancel_without_second_look", 1),
    ("cancel_of_a_popped_hole", 1),
    ("undo_oldest_first", 15),
    ("aborted_claim_counts_as_settled", 13),
    ("nonce_is_kept", 12),
    ("redrive_without_second_look", 27),
    ("redrive_without_lock", 27),
    ("superseding_guard_becomes_a_hole", 27),
    ("born_claimed_copy_offered", 9),
    ("carry_keeps_old_key", 10),
    ("carry_forgets_tombstone", 10),
    ("guard_freed_before_commit", 10),
    ("passed_guard_forgotten", 10),
    ("guard_freed_after_a_look", 10),
];

/// Schedules that a mutant may survive.
const BOUND: u64 = 6_000;

fn caught(name: &'static str) -> Option<(u64, String)> {
    awa_protocol::mutants::set(name);
    let found = (0..BOUND).find_map(|seed| attempt(seed).err().map(|text| (seed, text)));
    awa_protocol::mutants::set("");
    found
}

#[test]
fn every_mutant_is_caught() {
    crate::quiet();
    for seed in 0..300 {
        assert_eq!(attempt(seed).err(), None, "schedule {seed} without a mutant");
    }
    // `AWA_MUTANT=redrive` runs those whose name contains it.
    let wanted = std::env::var("AWA_MUTANT").unwrap_or_default();
    let all: Vec<(&str, u32)> = PROTOCOL.iter().chain(CALLERS).copied().filter(|(name, _)| name.contains(&wanted)).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut survived = Vec::new();
        while let Some((name, line)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            match caught(name) {
                Some((seed, text)) => {
                    println!("{name} (line {line}): schedule {seed}: {}", text.chars().take(110).collect::<String>())
                }
                None => survived.push(*name),
            }
        }
        survived
    };
    let survived: Vec<&str> = std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().flat_map(|thread| thread.join().expect("the thread ends")).collect()
    });
    assert!(survived.is_empty(), "nobody noticed {survived:?}");
    println!("{} mutants caught", all.len());
}
