//! Single rules: what the schedules found, written down as the shortest case, and small structures against plain ones.

use std::sync::atomic::AtomicU32;

use awa_protocol::lane::{Position, SubLane};
use awa_protocol::limits::{GAPS_PER_QUEUE, GAPS_PER_SCAN, INSERTERS_PER_QUEUE, TRACKS_PER_QUEUE};
use awa_protocol::queue::{Existence, GapFound, HoleLinks, NO_KEY, Plan, QueueFrontier, Refusal, TrackId, Wanted};
use proptest::prelude::*;

use crate::world::SETTINGS;

const SCHEDULED: TrackId = TrackId { generation: 1, priority: 0, sub: SubLane::Scheduled };
const IMMEDIATE: TrackId = TrackId { generation: 1, priority: 0, sub: SubLane::Immediate };

fn frontier() -> Box<QueueFrontier> {
    let mut q = Box::new(QueueFrontier::empty());
    q.install(1, b"rules", Existence::Live, SETTINGS);
    q
}

fn due(q: &mut QueueFrontier, run_at: &[i64], process: u32) {
    let mut keys = [0; 256];
    assert_eq!(q.register(SCHEDULED, Wanted::Scheduled { run_at }, 0, process, u64::from(process), &mut keys), Ok(()));
}

fn now_rows(q: &mut QueueFrontier, rows: usize, process: u32) -> i64 {
    let mut keys = [0; 256];
    assert_eq!(q.register(IMMEDIATE, Wanted::Immediate { rows }, 0, process, u64::from(process), &mut keys), Ok(()));
    keys[0]
}

/// A job at +1 h is registered, a scan of what is due finds the index empty, the row is appended after: the head must keep it.
#[test]
fn head_keeps_what_was_registered_before_the_scan_and_above_its_horizon() {
    let mut q = frontier();
    due(&mut q, &[50], 1);
    q.deregister(1);
    due(&mut q, &[3_600], 2);
    let turn = q.begin_scan(SCHEDULED, 100, 9).expect("a turn");
    assert!(turn.inserters.is_empty());
    q.finish_scan(&turn, 9, Position::at(50, 7), NO_KEY, &[]);
    assert_eq!(q.plan(100, &[], &[]), Plan::Nothing { next: 3_600 });
}

/// A scan that stops early leaves rows of its own inserters above the cursor: they may come after it has looked.
#[test]
fn head_keeps_what_the_turn_did_not_reach() {
    let mut q = frontier();
    due(&mut q, &[50, 60], 1);
    let turn = q.begin_scan(SCHEDULED, 100, 9).expect("a turn");
    q.finish_scan(&turn, 9, Position::at(50, 7), NO_KEY, &[]);
    assert!(matches!(q.plan(100, &[], &[]), Plan::Scan { .. }));
}

/// The gap of a registered inserter is visited and goes; a scan that began before must not bring it back, for its jobs may be done.
#[test]
fn a_visited_gap_does_not_come_back() {
    let mut q = frontier();
    let first = now_rows(&mut q, 4, 1);
    now_rows(&mut q, 4, 2);
    q.deregister(2);
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    let reached = Position::at(first + 5, 1);
    q.finish_scan(&turn, 9, reached, first + 6, &[]);
    assert_eq!(q.gaps().len(), 1);
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    q.deregister(1);
    let visit = q.begin_gap(IMMEDIATE, 1, 8).expect("a gap");
    q.finish_gap(&visit, 8, visit.to);
    q.finish_scan(&turn, 9, Position::at(first + 7, 1), NO_KEY, &[]);
    assert!(q.gaps().is_empty(), "{:?}", q.gaps());
}

/// A scan passes the guard of a cancel; that is rolled back, and the job, a hole now, is claimed and completed while the scan goes on:
/// a carrier who finds the row above the cursor, with no entry and no tombstone, must not take it for nobody's.
#[test]
fn a_row_above_the_cursor_of_a_scan_that_runs_may_be_done() {
    let mut q = frontier();
    let row = Position::at(now_rows(&mut q, 2, 1), 1);
    q.deregister(1);
    assert!(q.will_reach(IMMEDIATE, row, 1));
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    assert!(!q.will_reach(IMMEDIATE, row, 1));
    q.finish_scan(&turn, 9, turn.from, row.key, &[]);
    assert!(q.will_reach(IMMEDIATE, row, 1));
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    q.finish_scan(&turn, 9, row, NO_KEY, &[GapFound { xid: 1, from: row, to: row }]);
    assert!(q.will_reach(IMMEDIATE, row, 1));
    let visit = q.begin_gap(IMMEDIATE, 1, 9).expect("a gap");
    assert!(!q.will_reach(IMMEDIATE, row, 1));
    q.finish_gap(&visit, 9, visit.to);
    assert!(!q.will_reach(IMMEDIATE, row, 1));
}

/// All rows of a lane were carried: its head goes, unless somebody appended while they were read, even below the head.
#[test]
fn a_lane_is_settled_only_if_nobody_appended_meanwhile() {
    let mut q = frontier();
    due(&mut q, &[100], 1);
    assert!(q.look(SCHEDULED).is_none(), "its rows may not be there yet");
    q.deregister(1);
    let seen = q.look(SCHEDULED).expect("nobody is there");
    due(&mut q, &[150], 2);
    assert!(!q.settle(&seen));
    q.deregister(2);
    assert!(!q.settle(&seen), "the reader may have been past the row");
    let seen = q.look(SCHEDULED).expect("nobody is there");
    let turn = q.begin_scan(SCHEDULED, 120, 9).expect("a turn");
    assert!(!q.settle(&seen));
    q.finish_scan(&turn, 9, Position::at(120, 0), 150, &[]);
    assert!(q.settle(&seen));
    assert_eq!(q.plan(500, &[], &[]), Plan::Nothing { next: NO_KEY });
    due(&mut q, &[130], 3);
    q.deregister(3);
    assert!(matches!(q.plan(500, &[], &[]), Plan::Scan { .. }));
}

/// After a rebuild an aborted row lies above the last committed key: the track must come to an end all the same.
#[test]
fn rows_above_the_restored_last_key_are_passed() {
    let mut q = frontier();
    assert_eq!(q.restore_track(IMMEDIATE, Position::START, 10, 10), Ok(()));
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    assert_eq!(turn.horizon, 10);
    q.finish_scan(&turn, 9, Position::at(10, 1), 25, &[]);
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    assert_eq!(turn.horizon, 25);
    q.finish_scan(&turn, 9, Position::at(25, 1), NO_KEY, &[]);
    assert_eq!(q.plan(0, &[], &[]), Plan::Nothing { next: NO_KEY });
}

/// Every pool says that it is full; none forgets.
#[test]
fn full_pools_refuse() {
    let mut q = frontier();
    for process in 0..INSERTERS_PER_QUEUE as u32 {
        now_rows(&mut q, 2, process);
    }
    let mut keys = [0; 4];
    let refused = q.register(IMMEDIATE, Wanted::Immediate { rows: 1 }, 0, 999, 999, &mut keys);
    assert_eq!(refused, Err(Refusal::TooManyInserters));
    // The scan has room for so many inserters and stays below the first one that it cannot note.
    let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
    assert_eq!((turn.inserters.len(), turn.gap_room), (GAPS_PER_SCAN, GAPS_PER_SCAN));
    assert!(turn.inserters.iter().all(|found| found.to.key <= turn.horizon));
    q.finish_scan(&turn, 9, Position::at(turn.horizon, u64::MAX), NO_KEY, &[]);
    assert!(matches!(q.plan(0, &[], &[]), Plan::Scan { .. }), "the others' rows are still to come");
    for process in 0..INSERTERS_PER_QUEUE as u32 {
        q.deregister(process);
    }
    // Gaps until none is left; then a scan may still take what needs no gap.
    let mut xid = 10_000;
    while q.gaps().len() < GAPS_PER_QUEUE {
        let key = now_rows(&mut q, 1, 5);
        q.deregister(5);
        let turn = q.begin_scan(IMMEDIATE, 0, 9).expect("a turn");
        xid += 1;
        let at = Position::at(key, 1);
        q.finish_scan(&turn, 9, at, NO_KEY, &[GapFound { xid, from: at, to: at }]);
    }
    now_rows(&mut q, 1, 5);
    assert!(q.begin_scan(IMMEDIATE, 0, 9).is_none(), "its inserter could not be noted");
    q.deregister(5);
    assert_eq!(q.begin_scan(IMMEDIATE, 0, 9).map(|turn| turn.gap_room), Some(0));
    let more = (2..).map(|generation| TrackId { generation, ..IMMEDIATE });
    let refused = more.take(TRACKS_PER_QUEUE).map(|id| {
        let result = q.register(id, Wanted::Immediate { rows: 1 }, 0, 5, 5, &mut keys);
        q.deregister(5);
        result
    });
    assert!(refused.last() == Some(Err(Refusal::TooManyTracks)));
}

proptest! {
    /// Same `run_at`: neighbouring keys, no long tie; never before the wish.
    #[test]
    fn ties_are_spread(run_at in 0i64..1_000, rows in 1usize..=256, batches in 1usize..4) {
        let mut q = frontier();
        let mut seen = Vec::new();
        for _ in 0..batches {
            let mut keys = [0; 256];
            prop_assert_eq!(q.register(SCHEDULED, Wanted::Scheduled { run_at: &vec![run_at; rows] }, 0, 1, 1, &mut keys), Ok(()));
            q.deregister(1);
            seen.extend_from_slice(&keys[..rows]);
        }
        prop_assert!(seen.iter().all(|key| *key >= run_at && *key < run_at + 1_024));
        seen.sort_unstable();
        seen.dedup();
        prop_assert_eq!(seen.len(), rows * batches);
    }

    /// Holes: none lost, none twice, and in order of key while the list is short.
    #[test]
    fn holes_behave_as_a_sorted_list(steps in prop::collection::vec((0u32..40, 0u8..3), 0..200), keys in prop::collection::vec(0i64..30, 40)) {
        let mut q = frontier();
        let next: Vec<AtomicU32> = (0..40).map(|_| AtomicU32::new(u32::MAX)).collect();
        let key_of = |entry: u32| keys[entry as usize];
        let mut model: Vec<u32> = Vec::new();
        for (entry, what) in steps {
            let links = HoleLinks { next: &next, key_of: &key_of };
            let held = model.contains(&entry);
            match what {
                0 if !held => {
                    q.push_hole(1, entry, key_of(entry), links);
                    model.push(entry);
                }
                1 => {
                    let lowest = model.iter().map(|e| key_of(*e)).min();
                    let popped = q.pop_hole(1, links);
                    prop_assert_eq!(popped.map(key_of), lowest);
                    model.retain(|e| Some(*e) != popped);
                }
                _ => {
                    prop_assert_eq!(q.remove_hole(1, entry, links), held);
                    model.retain(|e| *e != entry);
                }
            }
            prop_assert_eq!(q.hole_count() as usize, model.len());
            prop_assert_eq!(q.first_hole_key(1), model.iter().map(|e| key_of(*e)).min().unwrap_or(NO_KEY));
        }
    }
}
