//! The fold from the log to the frontier: which copies are closed, which attempts are open, what is ready.
//!
//! A segment is read by itself: evidence first, then its ready entries twice (`first_pass` finds how far each track was claimed,
//! `second_pass` finds the unclaimed rows below that, which become holes). The same fold serves `verify()`.

use std::collections::BTreeMap;

pub use crate::closed::Copy_;
use crate::closed::{ClosedCopies, Closure, CopyMap};
use crate::lane::{BORN_CLAIMED, Lane, Position};
use crate::lifecycle::Outcome;
use crate::queue::{NO_KEY, TrackId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpenClaim {
    pub lease: i64,
    pub claimed_at: i64,
    pub deadline: i64,
    pub heartbeat_timeout: i64,
}

/// A ready entry as the fold needs it.
#[derive(Clone, Copy, Debug)]
pub struct ReadyRow {
    pub job_id: i64,
    pub hop: i32,
    pub lane: i32,
    pub position: Position,
    pub attempt: i16,
    pub max_attempts: i16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Ready,
    Open(OpenClaim),
    Closed(Outcome),
}

#[derive(Clone, Copy, Debug, Default)]
pub struct TrackFold {
    pub cursor: Option<Position>,
    /// Lowest key of an unclaimed row above the cursor: known after the second pass.
    pub head: Option<i64>,
    pub last: Option<i64>,
    pub ready: i64,
    /// Lowest key of an unclaimed row; right as a head when nothing of the track was claimed.
    lowest: Option<i64>,
    pub running: i64,
}

/// A copy with two closures, of which neither supersedes the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedTwice {
    pub copy: Copy_,
    pub outcomes: [Outcome; 2],
}

/// Evidence and tracks of one segment.
#[derive(Default)]
pub struct SegmentFold {
    pub generation: i64,
    closed: ClosedCopies,
    open: CopyMap<OpenClaim>,
    /// Each is a difference that `verify()` names.
    pub closed_twice: Vec<ClosedTwice>,
    pub tracks: BTreeMap<i32, TrackFold>,
}

impl SegmentFold {
    pub fn new(generation: i64) -> Self {
        Self { generation, ..Self::default() }
    }

    /// A finished copy may be closed once more, when the job is tried again or deleted: that evidence counts.
    /// `unclaimed`: the closure carries a tombstone, for claimers that have not reached the row.
    pub fn closure(&mut self, job_id: i64, hop: i32, outcome: Outcome, unclaimed: bool) {
        let Some(before) = self.closed.close(job_id, hop, Closure { outcome, unclaimed }) else { return };
        if outcome.supersedes(before.outcome) {
            // What was never claimed stays so: the cursor has not passed it.
            let unclaimed = before.unclaimed && !mutant!("superseded_counts_as_claimed");
            self.closed.close(job_id, hop, Closure { outcome, unclaimed });
        } else if before.outcome.supersedes(outcome) && !mutant!("superseding_evidence_lost") {
            self.closed.close(job_id, hop, Closure { outcome: before.outcome, unclaimed });
        } else {
            self.closed_twice.push(ClosedTwice { copy: (job_id, hop), outcomes: [before.outcome, outcome] });
        }
    }

    /// The evidence of nearly all jobs: a claimed copy that was completed. False: out of memory.
    pub fn completed(&mut self, job_id: i64, hop: i32) -> bool {
        if hop != 0 {
            self.closure(job_id, hop, Outcome::Completed, false);
            return true;
        }
        match self.closed.complete_first(job_id) {
            Some(true) => true,
            Some(false) => {
                let before = self.closed.get(job_id, hop).map_or(Outcome::Completed, |known| known.outcome);
                if !before.supersedes(Outcome::Completed) {
                    self.closed_twice.push(ClosedTwice { copy: (job_id, hop), outcomes: [before, Outcome::Completed] });
                }
                true
            }
            None => false,
        }
    }

    /// A copy may have been claimed more than once (a rescue gives a new hop, a lost claim leaves no row): the last claim counts.
    pub fn claim(&mut self, job_id: i64, hop: i32, claim: OpenClaim) {
        // Closures are read first: what is closed need not be remembered as claimed.
        if self.closed.get(job_id, hop).is_none() {
            self.open.insert((job_id, hop), claim);
        }
    }

    /// Room for evidence of this many copies; false: out of memory.
    pub fn reserve(&mut self, copies: usize) -> bool {
        self.closed.reserve_others(copies) && self.open.try_reserve(copies).is_ok()
    }

    pub fn fate(&self, job_id: i64, hop: i32) -> Fate {
        if self.closed.is_empty() && self.open.is_empty() {
            return Fate::Ready;
        }
        if let Some(closure) = self.closed.get(job_id, hop).filter(|_| !mutant!("closures_ignored")) {
            return Fate::Closed(closure.outcome);
        }
        self.open.get(&(job_id, hop)).filter(|_| !mutant!("claims_ignored")).map_or(Fate::Ready, |claim| Fate::Open(*claim))
    }

    pub fn has_evidence(&self) -> bool {
        !self.closed.is_empty() || !self.open.is_empty()
    }

    /// Can the second pass find anything? Not in a segment whose jobs are all claimed or closed.
    pub fn needs_second_pass(&self) -> bool {
        self.has_evidence() && self.tracks.values().any(|track| track.ready > 0)
    }

    /// All committed ready entries, in any order. The second pass is for where `needs_second_pass`.
    pub fn first_pass(&mut self, row: &ReadyRow) -> Fate {
        let fate = self.fate(row.job_id, row.hop);
        let unclaimed = self.closed.get(row.job_id, row.hop).is_some_and(|closure| closure.unclaimed);
        let track = self.tracks.entry(row.lane).or_default();
        if row.position.key == BORN_CLAIMED && !mutant!("cursor_from_born_claimed") {
            // No scan has anything to do with it: it says nothing about the track, only that its attempt runs or has ended.
            track.ready += i64::from(fate == Fate::Ready);
            track.running += i64::from(matches!(fate, Fate::Open(_)));
            return fate;
        }
        track.last = track.last.max(Some(row.position.key));
        match fate {
            Fate::Ready => {
                track.ready += 1;
                track.lowest = Some(track.lowest.map_or(row.position.key, |lowest| lowest.min(row.position.key)));
            }
            Fate::Closed(_) if unclaimed && !mutant!("cursor_from_unclaimed_closures") => {}
            Fate::Open(_) | Fate::Closed(_) => track.cursor = track.cursor.max(Some(row.position)),
        }
        track.running += i64::from(matches!(fate, Fate::Open(_)));
        fate
    }

    /// After the first pass over all committed rows, with the segment's lock held and all its writers ended: every copy is closed,
    /// each by evidence of its own. The only proof that lets a segment be truncated.
    pub fn is_drained(&self) -> bool {
        self.tracks.values().all(|track| {
            (track.ready == 0 || mutant!("pruned_with_ready_rows")) && (track.running == 0 || mutant!("pruned_with_running_jobs"))
        })
    }

    /// The same rows again, with what `first_pass` said of each. True: the row is a hole.
    pub fn second_pass(&mut self, row: &ReadyRow, fate: &Fate) -> bool {
        let Some(track) = self.tracks.get_mut(&row.lane) else { return false };
        if !matches!(fate, Fate::Ready) {
            return false;
        }
        if row.position.key == BORN_CLAIMED {
            // Its claim is missing: better that the job runs again than never.
            return true;
        }
        if track.cursor.is_some_and(|cursor| row.position <= cursor) && !mutant!("rows_below_cursor_forgotten") {
            return true;
        }
        track.head = Some(track.head.map_or(row.position.key, |head| head.min(row.position.key)));
        false
    }

    pub fn track_id(&self, lane: i32) -> TrackId {
        let lane = Lane::from_number(lane);
        TrackId { generation: self.generation, priority: lane.priority, sub: lane.sub }
    }

    /// Cursor, head and last of a track as `QueueFrontier::restore_track` wants them.
    pub fn standing(&self, lane: i32) -> (Position, i64, i64) {
        let track = self.tracks.get(&lane).copied().unwrap_or_default();
        let head = if track.cursor.is_none() { track.lowest } else { track.head };
        (track.cursor.unwrap_or(Position::START), head.unwrap_or(NO_KEY), track.last.unwrap_or(i64::MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(job_id: i64, key: i64) -> ReadyRow {
        ReadyRow { job_id, hop: 0, lane: 8, position: Position::at(key, job_id as u64), attempt: 0, max_attempts: 5 }
    }

    #[test]
    fn unclaimed_rows_below_the_cursor_are_holes() {
        let claim = OpenClaim { lease: 7, claimed_at: 0, deadline: 0, heartbeat_timeout: 0 };
        let mut fold = SegmentFold::new(3);
        fold.claim(2, 0, claim);
        fold.claim(3, 0, claim);
        fold.closure(3, 0, Outcome::Completed, false);
        fold.closure(5, 0, Outcome::Cancelled, true);
        let rows = [row(4, 40), row(1, 10), row(3, 30), row(2, 20), row(5, 50)];
        let fates: Vec<Fate> = rows.iter().map(|r| fold.first_pass(r)).collect();
        assert_eq!(
            fates,
            vec![Fate::Ready, Fate::Ready, Fate::Closed(Outcome::Completed), Fate::Open(claim), Fate::Closed(Outcome::Cancelled)]
        );
        let holes: Vec<i64> = rows.iter().zip(&fates).filter(|(r, f)| fold.second_pass(r, f)).map(|(r, _)| r.job_id).collect();
        assert_eq!(holes, vec![1]);
        assert_eq!(fold.standing(8), (Position::at(30, 3), 40, 50));
        assert!(fold.closed_twice.is_empty());
        fold.closure(3, 0, Outcome::Failed, false);
        assert_eq!(fold.closed_twice, vec![ClosedTwice { copy: (3, 0), outcomes: [Outcome::Completed, Outcome::Failed] }]);
    }

    #[test]
    fn superseding_evidence_wins_in_either_order() {
        for (end, unclaimed, later) in [
            (Outcome::Failed, false, Outcome::Redriven),
            (Outcome::Cancelled, true, Outcome::Redriven),
            (Outcome::Cancelled, true, Outcome::Removed),
            (Outcome::Completed, false, Outcome::Removed),
        ] {
            for later_first in [false, true] {
                let mut fold = SegmentFold::new(3);
                if later_first {
                    fold.closure(1, 0, later, false);
                }
                match end {
                    Outcome::Completed => assert!(fold.completed(1, 0)),
                    end => fold.closure(1, 0, end, unclaimed),
                }
                if !later_first {
                    fold.closure(1, 0, later, false);
                }
                assert_eq!(fold.first_pass(&row(1, 10)), Fate::Closed(later));
                assert!(fold.closed_twice.is_empty());
                // The row of a job that was cancelled while it waited says nothing about the cursor, then as before.
                assert_eq!(fold.standing(8).0 == Position::START, unclaimed);
            }
        }
    }

    #[test]
    fn only_the_end_of_a_job_can_be_superseded_and_once() {
        for (first, second) in [
            (Outcome::Completed, Outcome::Redriven),
            (Outcome::DeadLettered, Outcome::Redriven),
            (Outcome::Retry, Outcome::Redriven),
            (Outcome::Moved, Outcome::Removed),
            (Outcome::Redriven, Outcome::Redriven),
            (Outcome::Redriven, Outcome::Removed),
            (Outcome::Failed, Outcome::Moved),
        ] {
            let mut fold = SegmentFold::new(3);
            fold.closure(1, 0, first, false);
            fold.closure(1, 0, second, false);
            assert_eq!(fold.closed_twice, vec![ClosedTwice { copy: (1, 0), outcomes: [first, second] }]);
        }
    }
}
