//! One step: up to 512 open jobs of one segment, in the order in which a rollback can undo it. First each job gets its guard, so that
//! nobody else takes or ends it; then the closures are appended, then the next copies.

use awa_protocol::attempt::{Entry, EntryRef, State};
use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::lifecycle::Outcome as End;
use awa_protocol::limits::JOBS_PER_CARRY;
use awa_protocol::ring::SegmentState;

use super::census::{self, Standing, lane_number};
use super::running::{self, Running};
use super::waiting::Waiting;
use super::{Due, about, blocked, now};
use crate::error::{Result, reserve};
use crate::frontier::{Frontier, SegmentInfo};
use crate::ops::exits::is_unsettled;
use crate::ops::tasks::Outcome;
use crate::pg::rel::{Index, Lock, Rel};
use crate::pg::scan::{IndexScan, RowState, has_ended};
use crate::settings;
use crate::store::evidence::{self, Closure};
use crate::store::ready;

/// Why open jobs were left.
#[derive(Default)]
pub struct Left {
    /// Being claimed, finished or cancelled at this moment.
    pub busy: u64,
    /// Rows of unfinished transactions.
    pub unfinished: u64,
    /// Jobs that workers are coming for.
    pub due: bool,
    pub pool_is_full: bool,
}

pub struct Step<'a> {
    pub frontier: &'a Frontier,
    pub segment: SegmentInfo,
    pub rel: Rel,
    pub index: Index,
    pub now: i64,
    due: Due<'a>,
    pub waiting: Vec<Waiting>,
    pub running: Vec<Running>,
    pub left: Left,
}

impl<'a> Step<'a> {
    pub fn run(frontier: &'a Frontier, info: &SegmentInfo, due: Due<'a>) -> Result<Outcome> {
        let Some(rel) = Rel::open_if_lockable(info.ready, Lock::RowExclusive)? else {
            return Ok(blocked(info).unwrap_or_else(|| Outcome::new("blocked")));
        };
        frontier.check_current()?;
        ready::check_for_write(&rel, info)?;
        // The lock is ours now: the segment must still be what we took it for.
        let usable = |now: SegmentInfo| now.slot == info.slot && now.state == SegmentState::Sealed;
        if !frontier.segment(info.generation).is_some_and(usable) {
            return Ok(Outcome::of_segment("nothing", info.generation, info.slot));
        }
        let index = ready::open_index(&rel, info)?;
        let (waiting, running, left) = (Vec::new(), Vec::new(), Left::default());
        let mut step = Self { frontier, segment: *info, rel, index, now: now(), due, waiting, running, left };
        reserve(&mut step.waiting, JOBS_PER_CARRY)?;
        reserve(&mut step.running, JOBS_PER_CARRY)?;
        step.guard_entries()?;
        for standing in census::standings(frontier, info.generation) {
            step.guard_gaps(&standing)?;
            step.guard_tracks(&standing)?;
        }
        step.append()
    }

    pub fn is_full(&self) -> bool {
        self.waiting.len() + self.running.len() >= JOBS_PER_CARRY
    }

    /// Is this job left to the workers who are coming for it?
    fn is_left(&self, place: u16, sub: SubLane, key: i64) -> bool {
        let is_due = sub == SubLane::Immediate || key <= self.now;
        match self.due {
            Due::All => false,
            Due::Stalled(stalled) => is_due && !stalled.has(place),
        }
    }

    /// Holes and running attempts.
    fn guard_entries(&mut self) -> Result<()> {
        let mut found: Vec<(EntryRef, Entry)> = Vec::new();
        let (generation, frontier) = (self.segment.generation, self.frontier);
        census::sweep(frontier, |name, entry| {
            if entry.generation == generation && found.len() < 2 * JOBS_PER_CARRY {
                reserve(&mut found, 1)?;
                found.push((name, *entry));
            }
            Ok(())
        })?;
        found.sort_unstable_by_key(|(_, entry)| (entry.lane, entry.key, entry.job_id));
        for (name, entry) in found {
            if self.is_full() {
                break;
            }
            let sub = Lane::from_number(entry.lane).sub;
            let taken = match entry.state {
                State::Hole if self.is_left(entry.queue, sub, entry.key) => {
                    self.left.due = true;
                    continue;
                }
                State::Hole => self.guard_hole(name, &entry)?,
                State::Claimed if entry.close_xid == 0 && (entry.claim_xid == 0 || !is_unsettled(entry.claim_xid)) => {
                    self.guard_running(name, &entry)?
                }
                State::Claimed | State::Guard | State::Free => false,
            };
            self.left.busy += u64::from(!taken);
        }
        Ok(())
    }

    /// Rows that scans had passed by because their transactions had not ended.
    fn guard_gaps(&mut self, standing: &Standing) -> Result<()> {
        for gap in &standing.gaps {
            if !has_ended(gap.xid) {
                self.left.unfinished += 1;
                continue;
            }
            if self.is_left(standing.queue.place, gap.track.sub, gap.from.key) {
                self.left.due = true;
                continue;
            }
            let lane = lane_number(&standing.queue, gap.track);
            let (rel, index) = (self.rel.again()?, self.index_again()?);
            let mut scan = IndexScan::begin(&rel, &index, lane, gap.from.key)?;
            while let Some((key, row)) = scan.next() {
                if Position::at(key, row.tid()) > gap.to || self.is_full() {
                    break;
                }
                if row.xmin_full() == gap.xid && row.state() == RowState::Committed {
                    self.guard_row(&standing.queue, gap.track, &row)?;
                }
            }
        }
        Ok(())
    }
}
