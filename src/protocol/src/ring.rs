//! The ring of segments, folded from its append-only ledger.

use crate::limits::LIVE_SEGMENTS;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SegmentState {
    /// Receives new rows.
    Open,
    /// Receives no more rows; some of its jobs may be unfinished.
    Sealed,
    /// Proved drained; its tables may be partly empty. Neither read nor opened until it is pruned.
    PruneStarted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    pub generation: i64,
    pub slot: i32,
    pub state: SegmentState,
    pub opened_at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Opened,
    PruneStarted,
    Pruned,
}

impl Event {
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "opened" => Self::Opened,
            "prune_started" => Self::PruneStarted,
            "pruned" => Self::Pruned,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LedgerRow {
    pub generation: i64,
    pub slot: i32,
    pub event: Event,
    pub at: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ring {
    /// Live segments in order of generation; the last one is open.
    pub segments: heapless::Vec<Segment, LIVE_SEGMENTS>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Open this generation in this slot.
    Open { generation: i64, slot: i32 },
    /// As many live segments as the limit allows: the open one goes on.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerFault {
    TooManySegments,
    SlotUsedTwice { slot: i32 },
}

impl Ring {
    /// Order of the rows does not matter.
    pub fn fold(rows: &[LedgerRow]) -> Result<Self, LedgerFault> {
        let mut ring = Self::default();
        let mut opened: Vec<&LedgerRow> = rows.iter().filter(|row| row.event == Event::Opened).collect();
        opened.sort_by_key(|row| row.generation);
        let newest = opened.last().map(|row| row.generation);
        for row in opened {
            let has = |event| rows.iter().any(|other| other.generation == row.generation && other.event == event);
            if has(Event::Pruned) {
                continue;
            }
            let state = if has(Event::PruneStarted) && !mutant!("prune_started_forgotten") {
                SegmentState::PruneStarted
            } else if Some(row.generation) == newest {
                SegmentState::Open
            } else {
                SegmentState::Sealed
            };
            if ring.segments.iter().any(|segment| segment.slot == row.slot) {
                return Err(LedgerFault::SlotUsedTwice { slot: row.slot });
            }
            let segment = Segment { generation: row.generation, slot: row.slot, state, opened_at: row.at };
            ring.segments.push(segment).map_err(|_| LedgerFault::TooManySegments)?;
        }
        Ok(ring)
    }

    pub fn open(&self) -> Option<&Segment> {
        self.segments.iter().rev().find(|segment| segment.state == SegmentState::Open)
    }

    pub fn find(&self, generation: i64) -> Option<&Segment> {
        self.segments.iter().find(|segment| segment.generation == generation)
    }

    /// What a rotation may do when at most `limit` segments may be live. The lowest free slot is taken: few tables stay warm.
    pub fn rotation(&self, limit: usize) -> Rotation {
        let generation = self.segments.last().map_or(1, |segment| segment.generation + 1);
        if self.segments.len() >= limit.min(LIVE_SEGMENTS) {
            return Rotation::Full;
        }
        let used = |slot: i32| self.segments.iter().any(|segment| segment.slot == slot) && !mutant!("slot_reused_before_prune");
        match (0..LIVE_SEGMENTS as i32).find(|slot| !used(*slot)) {
            Some(slot) => Rotation::Open { generation, slot },
            None => Rotation::Full,
        }
    }

    /// In the order in which a prune should look at them: those whose truncation was begun, then the sealed ones, each the oldest first.
    pub fn prune_order(&self) -> impl Iterator<Item = &Segment> {
        let of = |state| self.segments.iter().filter(move |segment| segment.state == state);
        of(SegmentState::PruneStarted).chain(of(SegmentState::Sealed))
    }

    /// Makes room for the rows to come, if the limits allow. Up to `segments` freely; beyond only when waiting for an old one does
    /// not help: none is about to be freed, or it has been waited for already.
    pub fn make_room(&self, limits: &Limits, due: Due, one_is_being_freed: bool) -> Room {
        if let Rotation::Open { generation, slot } = self.rotation(limits.segments) {
            return Room::Open { generation, slot, grown: false };
        }
        if one_is_being_freed && due == Due::Yes && !mutant!("ring_grows_at_once") {
            return Room::Soon;
        }
        match self.rotation(limits.segments_max.max(limits.segments)) {
            Rotation::Open { generation, slot } => Room::Open { generation, slot, grown: true },
            Rotation::Full => Room::Full,
        }
    }
}

/// When and how far the ring may turn; times in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub rotate_age: i64,
    pub rotate_size: u64,
    pub segments: usize,
    pub segments_max: usize,
}

/// Should the open segment be sealed?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    No,
    Yes,
    /// It was asked for, or the segment has twice the age or size at which it should have been sealed.
    Pressing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Open {
        generation: i64,
        slot: i32,
        grown: bool,
    },
    /// As many segments as there should be; one of them is about to be freed.
    Soon,
    Full,
}

/// A rotation that was asked for comes at the earliest so long after the one before.
pub const ASKED_PAUSE: i64 = 5_000_000;

impl Limits {
    /// `age` may be negative: the clock was set back. `asked`: a claimer or a producer cannot go on in this segment.
    pub fn due(&self, age: i64, bytes: u64, asked: bool) -> Due {
        if bytes == 0 && !mutant!("empty_segment_sealed") {
            return Due::No;
        }
        let rested = !(0..ASKED_PAUSE).contains(&age) || mutant!("asked_without_a_pause");
        if (asked && rested) || bytes >= self.rotate_size.saturating_mul(2) || age >= self.rotate_age.saturating_mul(2) {
            Due::Pressing
        } else if bytes >= self.rotate_size || age >= self.rotate_age {
            Due::Yes
        } else {
            Due::No
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(generation: i64, slot: i32, event: Event) -> LedgerRow {
        LedgerRow { generation, slot, event, at: generation }
    }

    #[test]
    fn fold_knows_open_sealed_started_and_pruned() {
        let rows = [
            row(3, 2, Event::Opened),
            row(1, 0, Event::Opened),
            row(2, 1, Event::Opened),
            row(2, 1, Event::PruneStarted),
            row(1, 0, Event::PruneStarted),
            row(1, 0, Event::Pruned),
        ];
        let ring = Ring::fold(&rows).ok();
        let states: Option<Vec<_>> = ring.as_ref().map(|r| r.segments.iter().map(|s| (s.generation, s.state)).collect());
        assert_eq!(states, Some(vec![(2, SegmentState::PruneStarted), (3, SegmentState::Open)]));
        assert_eq!(ring.as_ref().map(|r| r.rotation(16)), Some(Rotation::Open { generation: 4, slot: 0 }));
        assert_eq!(ring.as_ref().map(|r| r.rotation(2)), Some(Rotation::Full));
        assert_eq!(ring.as_ref().map(|r| r.prune_order().map(|s| s.generation).collect::<Vec<_>>()), Some(vec![2]));
    }

    #[test]
    fn a_slot_is_never_opened_before_its_prune() {
        let rows = [row(1, 0, Event::Opened), row(2, 0, Event::Opened)];
        assert_eq!(Ring::fold(&rows), Err(LedgerFault::SlotUsedTwice { slot: 0 }));
    }

    const LIMITS: Limits = Limits { rotate_age: 600_000_000, rotate_size: 1000, segments: 3, segments_max: 4 };

    fn ring_of(states: &[SegmentState]) -> Ring {
        let mut ring = Ring::default();
        for (generation, state) in (1i64..).zip(states) {
            let _ = ring.segments.push(Segment { generation, slot: generation as i32 - 1, state: *state, opened_at: 0 });
        }
        ring
    }

    fn policy_holds() -> bool {
        use SegmentState::{Open, PruneStarted, Sealed};
        let three = ring_of(&[PruneStarted, Sealed, Open]);
        let fourth = Room::Open { generation: 4, slot: 3, grown: true };
        LIMITS.due(i64::MAX, 0, true) == Due::No
            && LIMITS.due(1, 1, false) == Due::No
            && LIMITS.due(1, 1, true) == Due::No
            && LIMITS.due(ASKED_PAUSE, 1, true) == Due::Pressing
            && LIMITS.due(-1, 1, true) == Due::Pressing
            && LIMITS.due(-1, 1, false) == Due::No
            && LIMITS.due(1, 1000, false) == Due::Yes
            && LIMITS.due(1, 2000, false) == Due::Pressing
            && LIMITS.due(600_000_000, 1, false) == Due::Yes
            && LIMITS.due(1_200_000_000, 1, false) == Due::Pressing
            && ring_of(&[Sealed, Open]).make_room(&LIMITS, Due::Yes, false) == Room::Open { generation: 3, slot: 2, grown: false }
            && three.make_room(&LIMITS, Due::Yes, true) == Room::Soon
            && three.make_room(&LIMITS, Due::Yes, false) == fourth
            && three.make_room(&LIMITS, Due::Pressing, true) == fourth
            && ring_of(&[Sealed, Sealed, Sealed, Open]).make_room(&LIMITS, Due::Pressing, true) == Room::Full
    }

    #[test]
    fn the_ring_turns_when_it_is_due_and_grows_only_when_it_must() {
        assert!(policy_holds());
        let order: Vec<i64> =
            ring_of(&[SegmentState::Sealed, SegmentState::PruneStarted, SegmentState::Sealed, SegmentState::Open])
                .prune_order()
                .map(|segment| segment.generation)
                .collect();
        assert_eq!(order, vec![2, 1, 3]);
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn mutants_of_the_policy_are_caught() {
        for name in ["ring_grows_at_once", "empty_segment_sealed", "asked_without_a_pause"] {
            crate::mutants::set(name);
            let survived = policy_holds();
            crate::mutants::set("");
            assert!(!survived, "nobody noticed {name}");
        }
    }
}
