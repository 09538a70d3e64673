//! How an attempt ends: by its worker, by rescue, by a cancel. One decision point, the entry; the evidence; the next copy.

use awa_protocol::attempt::{Entry, EntryRef, Exit, InsertRefusal, State, decide_exit};
use awa_protocol::lane::SubLane;
use awa_protocol::lifecycle::{Outcome, after_failure};
use awa_protocol::overdue::{Overdue, overdue_since};
use awa_protocol::ring::SegmentState;

use super::log::{Closure, Copy, Status, Xid};
use super::producer::{New, Produce};
use super::world::{Config, Mode, Note, Op, Work, World};
use super::{Choice, Step};
use crate::actions::Action;
use crate::properties::{ASSERTION, OPEN_TRUNCATED, STALE_FINISH};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Finish {
    work: Work,
    outcome: Outcome,
    phase: FinishPhase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum FinishPhase {
    Decide,
    /// Decided, on this copy of the entry; others may come before the mark.
    Mark(EntryRef, Entry),
    /// Marked: the generation of the row, and its attempt.
    Evidence(i64, i16),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cancel {
    job: i64,
    phase: CancelPhase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum CancelPhase {
    Look,
    Mark(EntryRef, Entry),
    /// No entry: this copy was the newest in the log.
    Guard(Copy),
    /// The guard stands: is the copy still open?
    Again(EntryRef, Copy),
    Evidence {
        generation: i64,
        copy: Copy,
        unclaimed: bool,
    },
}

impl Finish {
    pub fn new(work: Work, outcome: Outcome) -> Self {
        Self { work, outcome, phase: FinishPhase::Decide }
    }
}

impl Cancel {
    pub fn new(job: i64) -> Self {
        Self { job, phase: CancelPhase::Look }
    }
}

impl World {
    fn owns(&self, sid: usize, xid: Xid) -> bool {
        self.xid(sid) == xid
    }

    fn decide(&self, config: &Config, sid: usize, entry: &Entry, lease: Option<i64>, outcome: Outcome) -> Exit {
        let own = |xid| self.owns(sid, xid) && !config.broken("own_exit_counts_as_foreign");
        // An aborted claim whose callbacks have not run is as unfinished as one in progress.
        let unsettled = |xid| match self.status(xid) {
            Status::Running => true,
            Status::Committed { .. } => false,
            Status::Aborted => !config.broken("aborted_claim_counts_as_settled"),
        };
        decide_exit(entry, lease, outcome, own, unsettled)
    }

    /// By the lease: the attempt may have been carried since the worker was told of it.
    fn entry_of_work(&self, work: Work) -> Option<(u32, Entry)> {
        let mut all = self.pool.entries.iter().zip(0u32..).filter(|(entry, _)| entry.state != State::Free);
        let by_lease = all.clone().find(|(e, _)| e.job_id == work.copy.0 && e.state == State::Claimed && e.lease == work.lease);
        by_lease.or_else(|| all.find(|(entry, _)| (entry.job_id, entry.hop) == work.copy)).map(|(entry, slot)| (slot, *entry))
    }

    // ---- finish --------------------------------------------------------------------------------------------------------

    pub fn finish_choices(&self, config: &Config) -> usize {
        self.works.len() * config.outcomes.len()
    }

    pub fn start_finish(&self, config: &Config, choice: Choice) -> Option<Finish> {
        let choice = usize::from(choice);
        let work = self.works.get(choice / config.outcomes.len().max(1))?;
        let outcome = config.outcomes.get(choice % config.outcomes.len().max(1))?;
        Some(Finish::new(*work, *outcome))
    }

    pub fn may_finish(&self, config: &Config, sid: usize, f: &Finish) -> bool {
        match f.phase {
            FinishPhase::Evidence(generation, _) => self.may_write(sid, generation),
            FinishPhase::Mark(..) => true,
            FinishPhase::Decide => match self.entry_of_work(f.work) {
                Some((_, entry)) => match self.decide(config, sid, &entry, Some(f.work.lease), f.outcome) {
                    Exit::WaitForCloser(xid) | Exit::ClaimUncommitted(xid) => !self.is_alive(xid),
                    _ => true,
                },
                None => true,
            },
        }
    }

    pub fn step_finish(&mut self, config: &Config, sid: usize, mut f: Finish) -> Step {
        match f.phase {
            FinishPhase::Decide => {
                let Some((slot, entry)) = self.entry_of_work(f.work) else { return (Action::DecideExit, Op::Idle) };
                if self.decide(config, sid, &entry, Some(f.work.lease), f.outcome) != Exit::Proceed {
                    return (Action::DecideExit, Op::Idle);
                }
                f.phase = FinishPhase::Mark(self.pool.name_of(slot), entry);
                (Action::DecideExit, Op::Finish(f))
            }
            FinishPhase::Mark(name, seen) => {
                self.begin(sid);
                let copy = (seen.job_id, seen.hop);
                f.phase = FinishPhase::Decide;
                if self.mark(sid, name, &seen, f.outcome) {
                    if self.lease_of(copy) != Some(f.work.lease) && !self.closed(copy) {
                        self.violate(STALE_FINISH);
                    }
                    f.work.copy = copy;
                    f.phase = FinishPhase::Evidence(seen.generation, seen.attempt);
                }
                (Action::MarkClosing, Op::Finish(f))
            }
            FinishPhase::Evidence(generation, attempt) => {
                self.append_end(config, sid, generation, f.work.copy, f.outcome);
                (Action::AppendEvidence, self.next_copy(f.work.copy, f.outcome, attempt))
            }
        }
    }

    /// False: somebody else was first, or the entry is another one by now.
    fn mark(&mut self, sid: usize, name: EntryRef, seen: &Entry, outcome: Outcome) -> bool {
        let xid = self.xid(sid);
        if !self.pool.named(name).is_some_and(|entry| entry.begin_exit(seen, xid, outcome)) {
            return false;
        }
        let copy = (seen.job_id, seen.hop);
        let note = if seen.state == State::Hole { Note::Guard { name, copy, was_hole: true } } else { Note::Close(name, copy) };
        self.note(sid, note);
        true
    }

    /// What `evidence::append_*` does: a row in the segment that holds the row of the job.
    pub fn append_end(&mut self, config: &Config, sid: usize, generation: i64, copy: Copy, outcome: Outcome) {
        let open = self.ring.open().map_or(generation, |segment| segment.generation);
        let generation = if config.broken("evidence_goes_to_the_open_segment") { open } else { generation };
        self.append_closure(sid, generation, copy, outcome, false);
        if config.broken("end_deletes_the_row") {
            for segment in &mut self.log.segments {
                segment.rows.retain(|row| row.copy() != copy);
            }
        }
    }

    pub fn append_closure(&mut self, sid: usize, generation: i64, copy: Copy, outcome: Outcome, unclaimed: bool) {
        self.lock(sid, generation, Mode::Write);
        let xmin = self.xid(sid);
        if !self.log.append_closure(generation, Closure { xmin, copy, outcome, unclaimed }) {
            self.violate(OPEN_TRUNCATED);
        }
        self.record_exit(copy, xmin, outcome);
        self.tx(sid).sync = true;
    }

    /// A job that is to run again is appended again, in the same transaction.
    fn next_copy(&self, copy: Copy, outcome: Outcome, attempt: i16) -> Op {
        let attempt = match outcome {
            Outcome::Retry => attempt,
            Outcome::Snooze => attempt - 1,
            _ => return Op::Idle,
        };
        let new = New { copy: (copy.0, copy.1 + 1), run_at: self.now, attempt };
        Op::Produce(Produce::new(SubLane::Scheduled, vec![new]))
    }

    // ---- rescue --------------------------------------------------------------------------------------------------------

    /// Attempts that are overdue (here all are, from the start), whose claim has committed, and whose segment is free.
    fn overdue(&self, config: &Config, sid: usize) -> Vec<u32> {
        let free = |generation| self.may_write(sid, generation);
        let open = self.ring.open().is_some_and(|segment| free(segment.generation));
        let takes = |entry: &Entry| {
            overdue_since(entry, Overdue::Deadline, self.now).is_some()
                && (entry.claim_xid == 0 || self.log.committed(entry.claim_xid) || config.broken("rescue_of_unsettled_claims"))
                && free(entry.generation)
                && open
        };
        self.pool.entries.iter().zip(0u32..).filter(|(entry, _)| takes(entry)).map(|(_, slot)| slot).collect()
    }

    pub fn rescue_choices(&self, config: &Config, sid: usize) -> usize {
        self.overdue(config, sid).len()
    }

    pub fn start_rescue(&mut self, config: &Config, sid: usize, choice: Choice) -> Op {
        let Some(slot) = self.overdue(config, sid).get(usize::from(choice)).copied() else { return Op::Idle };
        let Some(entry) = self.pool.entries.get(slot as usize).copied() else { return Op::Idle };
        self.begin(sid);
        if let Some(open) = self.ring.open().map(|segment| segment.generation) {
            self.lock(sid, open, Mode::Write);
        }
        self.lock(sid, entry.generation, Mode::Write);
        let outcome = after_failure(i32::from(entry.attempt), i32::from(config.max_attempts), false).outcome();
        // Looked at, decided and marked under one lock.
        let name = self.pool.name_of(slot);
        if let Some(entry) = self.pool.named(name).filter(|_| config.broken("rescue_takes_closing")) {
            entry.close_xid = 0;
        }
        if !self.mark(sid, name, &entry, outcome) {
            return Op::Idle;
        }
        let work = Work { copy: (entry.job_id, entry.hop), lease: entry.lease };
        Op::Finish(Finish { work, outcome, phase: FinishPhase::Evidence(entry.generation, entry.attempt) })
    }

    // ---- cancel --------------------------------------------------------------------------------------------------------

    fn newest_entry(&self, job: i64) -> Option<(u32, Entry)> {
        let all = self.pool.entries.iter().zip(0u32..).filter(|(entry, _)| entry.state != State::Free && entry.job_id == job);
        all.max_by_key(|(entry, _)| entry.hop).map(|(entry, slot)| (slot, *entry))
    }

    /// Of the rows that this transaction sees in the segments that may be read.
    fn newest_copy(&self, sid: usize, job: i64) -> Option<Copy> {
        let readable = |generation| self.ring.find(generation).is_some_and(|s| s.state != SegmentState::PruneStarted);
        let segments = self.log.segments.iter().filter(|segment| readable(segment.generation));
        let seen = |xmin| self.log.committed(xmin) || self.owns(sid, xmin);
        let rows = segments.flat_map(|segment| &segment.rows).filter(|row| row.job == job && seen(row.xmin));
        rows.map(|row| row.copy()).max()
    }

    pub fn may_cancel(&self, config: &Config, sid: usize, c: &Cancel) -> bool {
        match c.phase {
            CancelPhase::Look => match self.newest_entry(c.job) {
                Some((_, entry)) => match self.decide(config, sid, &entry, None, Outcome::Cancelled) {
                    Exit::WaitForCloser(xid) | Exit::ClaimUncommitted(xid) => !self.is_alive(xid),
                    _ => true,
                },
                None => true,
            },
            CancelPhase::Guard(_) | CancelPhase::Mark(..) => true,
            CancelPhase::Again(_, copy) => self.row_of(copy).is_none_or(|(generation, _)| self.may_write(sid, generation)),
            CancelPhase::Evidence { generation, .. } => self.may_write(sid, generation),
        }
    }

    pub fn step_cancel(&mut self, config: &Config, sid: usize, mut c: Cancel) -> Step {
        match c.phase {
            CancelPhase::Look => match self.newest_entry(c.job) {
                Some((slot, entry)) => {
                    if self.decide(config, sid, &entry, None, Outcome::Cancelled) != Exit::Proceed {
                        return (Action::DecideExit, Op::Idle);
                    }
                    c.phase = CancelPhase::Mark(self.pool.name_of(slot), entry);
                    (Action::DecideExit, Op::Cancel(c))
                }
                None => match self.newest_copy(sid, c.job) {
                    Some(copy) => {
                        c.phase = CancelPhase::Guard(copy);
                        (Action::FindNewest, Op::Cancel(c))
                    }
                    None => (Action::FindNewest, Op::Idle),
                },
            },
            CancelPhase::Mark(name, seen) => (Action::CancelEntry, self.cancel_entry(sid, c, name, &seen)),
            CancelPhase::Guard(copy) => (Action::GuardRow, self.guard_to_cancel(sid, c, copy)),
            CancelPhase::Again(name, copy) => (Action::LookAgain, self.look_again(config, sid, c, name, copy)),
            CancelPhase::Evidence { generation, copy, unclaimed } => {
                if unclaimed {
                    self.raise_flag(generation);
                }
                self.append_closure(sid, generation, copy, Outcome::Cancelled, unclaimed);
                (Action::AppendTombstone, Op::Idle)
            }
        }
    }

    fn cancel_entry(&mut self, sid: usize, mut c: Cancel, name: EntryRef, seen: &Entry) -> Op {
        self.begin(sid);
        if !self.mark_and_unlink(sid, name, seen, Outcome::Cancelled) {
            c.phase = CancelPhase::Look;
            return Op::Cancel(c);
        }
        let (generation, copy) = (seen.generation, (seen.job_id, seen.hop));
        c.phase = CancelPhase::Evidence { generation, copy, unclaimed: seen.state == State::Hole };
        Op::Cancel(c)
    }

    /// A hole becomes a guard; scans have passed its row long ago. Under the queue's lock, as every change of a hole.
    pub fn mark_and_unlink(&mut self, sid: usize, name: EntryRef, seen: &Entry, outcome: Outcome) -> bool {
        let marked = self.mark(sid, name, seen, outcome);
        if marked && seen.state == State::Hole && !self.unlink_hole(name, seen.priority()) {
            self.violate(ASSERTION);
        }
        marked
    }

    /// A guard on a row that has no entry. `None`: somebody has this copy, or a later one.
    pub fn insert_guard(&mut self, sid: usize, copy: Copy, outcome: Outcome) -> Option<EntryRef> {
        let (generation, row) = self.row_of(copy)?;
        let guard = Entry {
            job_id: copy.0,
            hop: copy.1,
            generation,
            lane: row.lane,
            key: row.position.key,
            tid: row.position.tid,
            close_xid: self.xid(sid),
            closing: Some(outcome),
            attempt: row.attempt + 1,
            state: State::Guard,
            ..Entry::free()
        };
        let mut part = self.pool.part();
        let known = part.find(copy.0, |entry| entry.hop >= copy.1).map(InsertRefusal::Exists);
        let slot = known.map_or_else(|| part.insert(guard), Err).ok()?;
        let name = self.pool.name_of(slot);
        self.note(sid, Note::Guard { name, copy, was_hole: false });
        Some(name)
    }

    pub fn free_guard(&mut self, sid: usize, name: EntryRef) {
        self.pool.part().free(name.slot);
        self.tx(sid).notes.retain(|note| !matches!(note, Note::Guard { name: of, .. } if *of == name));
    }

    fn guard_to_cancel(&mut self, sid: usize, mut c: Cancel, copy: Copy) -> Op {
        self.begin(sid);
        c.phase = match self.insert_guard(sid, copy, Outcome::Cancelled) {
            Some(name) => CancelPhase::Again(name, copy),
            None => CancelPhase::Look,
        };
        Op::Cancel(c)
    }

    /// The guard stands: whatever had happened to this copy before is in the evidence by now.
    fn look_again(&mut self, config: &Config, sid: usize, mut c: Cancel, name: EntryRef, copy: Copy) -> Op {
        let Some((generation, _)) = self.row_of(copy) else {
            self.free_guard(sid, name);
            return Op::Idle;
        };
        self.lock(sid, generation, Mode::Write);
        let is_newest = self.newest_copy(sid, c.job) == Some(copy);
        let is_open = !self.is_closed_for(sid, copy) && !self.is_claimed_in_log(copy);
        if config.broken("cancel_without_second_look") || is_newest && is_open {
            c.phase = CancelPhase::Evidence { generation, copy, unclaimed: true };
            return Op::Cancel(c);
        }
        self.free_guard(sid, name);
        if self.is_closed_for(sid, copy) && is_newest {
            return Op::Idle;
        }
        c.phase = CancelPhase::Look;
        Op::Cancel(c)
    }

    fn is_closed_for(&self, sid: usize, copy: Copy) -> bool {
        self.exits.iter().any(|(of, xid, _)| *of == copy && (self.log.committed(*xid) || self.owns(sid, *xid)))
    }

    fn is_claimed_in_log(&self, copy: Copy) -> bool {
        let claims = self.log.segments.iter().flat_map(|segment| &segment.claims);
        claims.into_iter().any(|(xmin, of, _)| *of == copy && self.log.committed(*xmin))
    }
}
