//! The ring of segments, folded from its append-only ledger.

use crate::limits::LIVE_SEGMENTS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentState {
    /// Receives new rows.
    Open,
    /// Receives no more rows; some of its jobs may be unfinished.
    Sealed,
    /// Proved drained; its tables may be partly empty. Neither read nor opened until it is pruned.
    PruneStarted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub generation: i64,
    pub slot: i32,
    pub state: SegmentState,
    pub opened_at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

#[derive(Clone, Copy, Debug)]
pub struct LedgerRow {
    pub generation: i64,
    pub slot: i32,
    pub event: Event,
    pub at: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

    /// The segment a prune should look at: one whose truncation was begun, else the oldest sealed one.
    pub fn prune_candidate(&self) -> Option<&Segment> {
        self.segments
            .iter()
            .find(|segment| segment.state == SegmentState::PruneStarted)
            .or_else(|| self.segments.iter().find(|segment| segment.state == SegmentState::Sealed))
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
        assert_eq!(ring.as_ref().and_then(|r| r.prune_candidate()).map(|s| s.generation), Some(2));
    }

    #[test]
    fn a_slot_is_never_opened_before_its_prune() {
        let rows = [row(1, 0, Event::Opened), row(2, 0, Event::Opened)];
        assert_eq!(Ring::fold(&rows), Err(LedgerFault::SlotUsedTwice { slot: 0 }));
    }
}
