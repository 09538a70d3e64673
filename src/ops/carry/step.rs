//! One step: up to 512 open jobs of one segment, in the order in which a rollback can undo it. First each job gets its guard, so that
//! nobody else takes or ends it; then the next copies are appended, then the closures.

use std::rc::Rc;

use awa_protocol::attempt::{Entry, EntryRef, State};
use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::limits::JOBS_PER_CARRY;
use awa_protocol::ring::SegmentState;

use super::census::{self, Seen, Standing, lane_number};
use super::running::{Open, Running};
use super::waiting::Waiting;
use super::{Due, about, stalled};
use crate::error::{Result, reserve};
use crate::frontier::{Frontier, SegmentInfo};
use crate::ops::exits::is_unsettled;
use crate::ops::prune;
use crate::ops::taking::OpenSegment;
use crate::ops::tasks::Outcome;
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel};
use crate::pg::scan::{IndexScan, RowState, has_ended};
use crate::pg::xact;
use crate::store::evidence::{self, Closure};
use crate::store::ready;

/// Why open jobs were left.
#[derive(Clone, Copy, Default)]
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
    pub old: Rc<OpenSegment>,
    pub now: i64,
    due: Due<'a>,
    pub waiting: Vec<Waiting>,
    pub running: Vec<Running>,
    /// Where running attempts go; opened for the first of them.
    pub open: Option<Open>,
    pub left: Left,
    /// A lane has turned out to hold nothing any more.
    has_settled: bool,
    /// A lane was not read from its cursor, but from where a step before had stopped.
    resumed: bool,
}

impl<'a> Step<'a> {
    pub fn run(frontier: &'a Frontier, info: &SegmentInfo, due: Due<'a>) -> Result<Outcome> {
        let Some(rel) = Rel::open_if_lockable(info.ready, Lock::RowExclusive)? else {
            return Ok(super::blocked(info));
        };
        frontier.check_current()?;
        ready::check_for_write(&rel, info)?;
        // The lock is ours now: the segment must still be what we took it for.
        let usable = |now: SegmentInfo| now.slot == info.slot && now.state == SegmentState::Sealed;
        if !frontier.segment(info.generation).is_some_and(usable) {
            return Ok(Outcome::of_segment("nothing", info.generation, info.slot));
        }
        let index = ready::open_index(&rel, info)?;
        let old = Rc::new(OpenSegment { info: *info, rel, index });
        let (waiting, running, left) = (Vec::new(), Vec::new(), Left::default());
        let mut step =
            Self { frontier, old, now: xact::now(), due, waiting, running, open: None, left, has_settled: false, resumed: false };
        reserve(&mut step.waiting, JOBS_PER_CARRY)?;
        reserve(&mut step.running, JOBS_PER_CARRY)?;
        step.guard_entries()?;
        reach("carry.entries_guarded");
        let left = step.left;
        step.guard_rows()?;
        // The step before may have been rolled back: then what it had moved is below the place where it stopped.
        if step.waiting.is_empty() && step.running.is_empty() && step.resumed {
            step.left = left;
            stalled::begin_anew(frontier);
            step.guard_rows()?;
        }
        if step.has_settled {
            prune::look_soon(info.generation);
        }
        reach("carry.guarded");
        step.append()
    }

    fn guard_rows(&mut self) -> Result<()> {
        for standing in census::standings(self.frontier, self.old.info.generation) {
            // The next queue must not say that the next step is to begin with it.
            if self.is_full() {
                break;
            }
            self.guard_gaps(&standing)?;
            self.guard_tracks(&standing)?;
        }
        Ok(())
    }

    fn room(&self) -> usize {
        JOBS_PER_CARRY.saturating_sub(self.waiting.len() + self.running.len())
    }

    fn is_full(&self) -> bool {
        self.room() == 0 || self.left.pool_is_full
    }

    /// Rows met so far that are open, or may be.
    fn seen_open(&self) -> (usize, u64, u64) {
        (self.waiting.len(), self.left.busy, self.left.unfinished)
    }

    /// Are the due jobs of this queue left to the workers who are coming for them?
    fn leaves_due(&self, place: u16) -> bool {
        match self.due {
            Due::All => false,
            Due::Stalled(stalled) => !stalled.has(place),
        }
    }

    fn is_due(&self, sub: SubLane, key: i64) -> bool {
        sub == SubLane::Immediate || key <= self.now
    }

    /// Holes and running attempts.
    fn guard_entries(&mut self) -> Result<()> {
        let mut found: Vec<(EntryRef, Entry)> = Vec::new();
        let generation = self.old.info.generation;
        // What will be left is not counted: it must not keep the others from being found.
        census::sweep(self.frontier, |name, entry| {
            if entry.generation == generation && found.len() < 4 * JOBS_PER_CARRY && self.takes_entry(entry) {
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
            let guarded = match entry.state {
                State::Hole => self.guard_hole(name, &entry)?,
                State::Claimed => self.guard_running(name, &entry)?,
                State::Guard | State::Free => false,
            };
            self.left.busy += u64::from(!guarded);
        }
        Ok(())
    }

    /// False: it is left, and noted as such.
    fn takes_entry(&mut self, entry: &Entry) -> bool {
        let is_settled = entry.close_xid == 0 && (entry.claim_xid == 0 || !is_unsettled(entry.claim_xid));
        match entry.state {
            State::Free => false,
            State::Hole if self.leaves_due(entry.queue) && self.is_due(Lane::from_number(entry.lane).sub, entry.key) => {
                self.left.due = true;
                false
            }
            State::Hole => true,
            State::Claimed if is_settled => true,
            State::Claimed | State::Guard => {
                self.left.busy += 1;
                false
            }
        }
    }

    /// Rows that scans have passed by because their transactions had not ended.
    fn guard_gaps(&mut self, standing: &Standing) -> Result<()> {
        let old = Rc::clone(&self.old);
        for gap in &standing.gaps {
            if !has_ended(gap.xid) {
                self.left.unfinished += 1;
                continue;
            }
            if self.leaves_due(standing.queue.place) && self.is_due(gap.track.sub, gap.from.key) {
                self.left.due = true;
                continue;
            }
            let lane = lane_number(&standing.queue, gap.track);
            let mut scan = IndexScan::begin(&old.rel, &old.index, lane, gap.from.key)?;
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

    /// Rows above the cursors. The cursors stay: what is moved has a tombstone, and what is not due must never be below a cursor.
    fn guard_tracks(&mut self, standing: &Standing) -> Result<()> {
        let old = Rc::clone(&self.old);
        for Seen { id, cursor, head, quiet } in &standing.tracks {
            let lane = lane_number(&standing.queue, *id);
            let open_before = self.seen_open();
            let resume = stalled::resume(self.frontier, id.generation, lane).filter(|at| at > cursor);
            self.resumed |= resume.is_some();
            let mut from = resume.unwrap_or(*cursor);
            let mut is_whole = resume.is_none();
            if self.leaves_due(standing.queue.place) {
                let is_due = self.is_due(id.sub, *head);
                self.left.due |= is_due;
                if id.sub == SubLane::Immediate {
                    continue;
                }
                is_whole &= !is_due;
                from = from.max(Position::at(self.now, u64::MAX));
            }
            let mut scan = IndexScan::begin(&old.rel, &old.index, lane, from.key)?;
            scan.seek(lane, from.key, Some(from.tid).filter(|_| from != Position::START));
            let mut is_through = true;
            while let Some((key, row)) = scan.next() {
                if self.is_full() {
                    is_through = false;
                    break;
                }
                match row.state() {
                    RowState::Committed => self.guard_row(&standing.queue, *id, &row)?,
                    RowState::InProgress(_) | RowState::Own(_) => self.left.unfinished += 1,
                    RowState::Dead => {}
                }
                from = Position::at(key, row.tid());
            }
            drop(scan);
            if self.is_full() && !is_through {
                stalled::set_resume(self.frontier, id.generation, lane, from);
                return Ok(());
            }
            stalled::forget_resume(self.frontier, id.generation, lane);
            // Nothing of it is open: no scan may ever come to say so, and while the head promises rows nobody tries to prune.
            if let Some(seen) = quiet.filter(|_| is_whole && !self.is_full() && self.seen_open() == open_before) {
                let mut held = self.frontier.queue(standing.queue.place);
                self.has_settled |= standing.queue.is_usable(&held) && held.settle(&seen);
            }
        }
        Ok(())
    }

    fn append(mut self) -> Result<Outcome> {
        let info = self.old.info;
        if self.waiting.is_empty() && self.running.is_empty() {
            return Ok(self.nothing_moved());
        }
        let more = self.room() == 0;
        self.waiting.sort_unstable_by_key(|job| (job.row.head.lane, job.row.head.key, job.row.head.tid));
        let deferred = self.append_waiting()?;
        reach("carry.waiting_appended");
        self.append_running()?;
        reach("carry.appended");
        if !self.waiting.is_empty() {
            // Before the closures: a claimer who comes when the guards are gone must look for them.
            self.frontier.set_tombstones(info.slot, true);
        }
        let mut closures = Vec::new();
        reserve(&mut closures, self.waiting.len() + self.running.len())?;
        closures.extend(self.waiting.iter().map(|job| self.closure(&job.row.head, true)));
        closures.extend(self.running.iter().map(|job| self.closure(&job.row.head, false)));
        evidence::append_closures(&info, &closures)?;
        reach("carry.closed");
        let (waiting, running) = (self.waiting.len() - deferred, self.running.len());
        let detail = format!("{waiting} waiting, {deferred} deferred, {running} running");
        Ok(Outcome { rows: closures.len() as i64, more, ..about(&info, "carried", detail) })
    }

    fn closure(&self, head: &ready::Head, unclaimed: bool) -> Closure {
        Closure {
            closed_at: self.now,
            job_id: head.job_id,
            hop: head.hop,
            tombstone: unclaimed.then_some((head.lane, head.key)),
            outcome: awa_protocol::lifecycle::Outcome::Moved,
            errors: None,
        }
    }

    fn nothing_moved(&self) -> Outcome {
        let info = &self.old.info;
        if self.left.pool_is_full {
            about(info, "blocked", "no place is left for another job in flight".to_owned())
        } else if self.left.unfinished > 0 {
            about(info, "blocked", "a row belongs to an unfinished transaction".to_owned())
        } else if self.left.busy > 0 {
            about(info, "skipped_active", format!("{} jobs are being claimed, finished or cancelled", self.left.busy))
        } else if self.left.due {
            about(info, "skipped_active", "workers are claiming its jobs".to_owned())
        } else {
            Outcome::of_segment("nothing", info.generation, info.slot)
        }
    }
}
