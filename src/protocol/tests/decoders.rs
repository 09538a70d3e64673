//! What is read from disk is not trusted: whatever stands there, decoding ends, without a panic and without a contradiction.

use std::collections::HashSet;

use awa_protocol::batch::{row_lengths, stored_hops};
use awa_protocol::lane::{BORN_CLAIMED, Lane, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::limits::{JOBS_PER_EVIDENCE_ROW, LIVE_SEGMENTS};
use awa_protocol::rebuild::{Fate, OpenClaim, ReadyRow, SegmentFold};
use awa_protocol::ring::{Due, Event, LedgerRow, Limits, Ring, Room, Rotation, SegmentState};
use proptest::prelude::*;

/// Small numbers meet each other; the ends of the range overflow.
fn number() -> impl Strategy<Value = i64> {
    prop_oneof![4 => -3i64..40, 1 => any::<i64>(), 1 => Just(i64::MAX), 1 => Just(i64::MIN)]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![Just(Event::Opened), Just(Event::Opened), Just(Event::PruneStarted), Just(Event::Pruned)]
}

fn ledger_row() -> impl Strategy<Value = LedgerRow> {
    let slot = prop_oneof![6 => 0i32..70, 1 => any::<i32>()];
    (number(), slot, event(), number()).prop_map(|(generation, slot, event, at)| LedgerRow { generation, slot, event, at })
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop::sample::select(b"drsfcmlvx".to_vec()).prop_map(|letter| Outcome::from_letter(letter).unwrap_or(Outcome::Completed))
}

#[derive(Clone, Debug)]
enum Evidence {
    Completed,
    Closure(Outcome, bool),
    Claim(i64),
}

fn evidence() -> impl Strategy<Value = (i64, i32, Evidence)> {
    let hop = prop_oneof![4 => 0i32..3, 1 => any::<i32>()];
    let kind = prop_oneof![
        Just(Evidence::Completed),
        (outcome(), any::<bool>()).prop_map(|(outcome, unclaimed)| Evidence::Closure(outcome, unclaimed)),
        any::<i64>().prop_map(Evidence::Claim),
    ];
    (number(), hop, kind)
}

fn ready_row() -> impl Strategy<Value = ReadyRow> {
    let key = prop_oneof![3 => 0i64..20, 1 => any::<i64>(), 1 => Just(BORN_CLAIMED), 1 => Just(i64::MAX)];
    let lane = prop_oneof![3 => 0i32..16, 1 => any::<i32>()];
    (number(), prop_oneof![4 => 0i32..3, 1 => any::<i32>()], lane, key, any::<u64>(), any::<(i16, i16)>()).prop_map(
        |(job_id, hop, lane, key, tid, (attempt, max_attempts))| ReadyRow {
            job_id,
            hop,
            lane,
            position: Position::at(key, tid),
            attempt,
            max_attempts,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn every_lane_number_is_that_of_its_lane(number in any::<i32>()) {
        let lane = Lane::from_number(number);
        prop_assert!(lane.priority < 4);
        prop_assert_eq!(lane.number(), number);
    }

    #[test]
    fn every_letter_is_that_of_its_outcome_or_of_none(letter in any::<u8>()) {
        if let Some(outcome) = Outcome::from_letter(letter) {
            prop_assert_eq!(outcome as u8, letter);
            prop_assert!(!outcome.supersedes(outcome));
        }
    }

    #[test]
    fn every_name_of_an_event_is_one_or_none(name in ".{0,20}") {
        prop_assert_eq!(Event::from_name(&name).is_some(), ["opened", "prune_started", "pruned"].contains(&name.as_str()));
    }

    #[test]
    fn the_next_place_is_above_or_the_last(key in any::<i64>(), tid in any::<u64>()) {
        let at = Position::at(key, tid);
        prop_assert!(at.next() > at || at.key == i64::MAX);
    }

    #[test]
    fn every_ledger_is_a_ring_or_a_fault(rows in prop::collection::vec(ledger_row(), 0..120), limit in 0usize..200) {
        let Ok(ring) = Ring::fold(&rows) else { return Ok(()) };
        prop_assert!(ring.segments.len() <= LIVE_SEGMENTS);
        prop_assert!(ring.segments.is_sorted_by(|a, b| a.generation <= b.generation));
        let slots: HashSet<i32> = ring.segments.iter().map(|segment| segment.slot).collect();
        prop_assert_eq!(slots.len(), ring.segments.len());
        // The last one is open, unless it has been pruned.
        prop_assert!(ring.segments.iter().rev().skip(1).all(|segment| segment.state != SegmentState::Open));
        if let Rotation::Open { slot, .. } = ring.rotation(limit) {
            prop_assert!(!slots.contains(&slot), "slot {} is in use", slot);
            prop_assert!(ring.segments.len() < limit);
        }
        let limits = Limits { rotate_age: 1, rotate_size: 1, segments: limit, segments_max: limit / 2 };
        if let Room::Open { slot, .. } = ring.make_room(&limits, Due::Pressing, limit % 2 == 0) {
            prop_assert!(!slots.contains(&slot));
        }
        prop_assert!(ring.prune_order().all(|segment| segment.state != SegmentState::Open));
    }

    #[test]
    fn every_age_and_size_has_an_answer(age in any::<i64>(), bytes in any::<u64>(), asked in any::<bool>(), limit in any::<(i64, u64)>()) {
        let limits = Limits { rotate_age: limit.0, rotate_size: limit.1, segments: 16, segments_max: 64 };
        prop_assert!(bytes != 0 || limits.due(age, bytes, asked) == Due::No);
    }

    #[test]
    fn every_segment_folds(evidence in prop::collection::vec(evidence(), 0..60), rows in prop::collection::vec(ready_row(), 0..60)) {
        let mut fold = SegmentFold::new(7);
        for (job_id, hop, what) in &evidence {
            prop_assert!(fold.reserve(1));
            match what {
                Evidence::Completed => { prop_assert!(fold.completed(*job_id, *hop)); }
                Evidence::Closure(outcome, unclaimed) => fold.closure(*job_id, *hop, *outcome, *unclaimed),
                Evidence::Claim(lease) => fold.claim(*job_id, *hop, OpenClaim { lease: *lease, claimed_at: 0, deadline: 0, heartbeat_timeout: 0 }),
            }
        }
        let fates: Vec<Fate> = rows.iter().map(|row| fold.first_pass(row)).collect();
        for (row, fate) in rows.iter().zip(&fates) {
            prop_assert_eq!(fold.fate(row.job_id, row.hop), *fate);
            // Only what no evidence names is offered again, and it is offered once: above the cursor, or as a hole.
            let is_hole = fold.second_pass(row, fate);
            prop_assert!(!is_hole || *fate == Fate::Ready);
            let named = evidence.iter().any(|(job_id, hop, _)| (*job_id, *hop) == (row.job_id, row.hop));
            prop_assert_eq!(*fate == Fate::Ready, !named);
            let (cursor, head, last) = fold.standing(row.lane);
            if *fate == Fate::Ready && !is_hole {
                prop_assert!(row.position > cursor && head <= row.position.key && last >= row.position.key);
            }
        }
        prop_assert_eq!(fold.is_drained(), fates.iter().all(|fate| matches!(fate, Fate::Closed(_))));
    }

    #[test]
    fn every_batch_is_cut_into_rows_that_fit(jobs in 0usize..200_000, hops in prop::collection::vec(any::<i32>(), 0..20)) {
        prop_assert_eq!(row_lengths(jobs).sum::<usize>(), jobs);
        prop_assert!(row_lengths(jobs).all(|rows| (1..=JOBS_PER_EVIDENCE_ROW).contains(&rows)));
        prop_assert_eq!(stored_hops(&hops).is_none(), hops.iter().all(|hop| *hop == 0));
    }
}

fn cases() -> u32 {
    std::env::var("AWA_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(300)
}
