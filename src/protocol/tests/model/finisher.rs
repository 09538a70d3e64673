//! Finishers and cancels: one decision point for each exit, evidence, and the next attempt in the same transaction.

use awa_protocol::attempt::{Entry, EntryRef, Exit, InsertRefusal, State, decide_exit, partition_of};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::rebuild::Copy_;
use awa_protocol::ring::SegmentState;

use crate::world::{Note, Op, PARTITIONS, Row, Status, Work, World};

pub struct Finish {
    work: Work,
    outcome: Outcome,
    phase: Phase,
}

pub struct Cancel {
    copy: Copy_,
    generation: i64,
    row: (i32, i64, u64),
    unclaimed: bool,
    guard: Option<EntryRef>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Look,
    /// Decided, on this copy of the entry; others may come before the mark.
    Mark(EntryRef, Entry),
    Recheck,
    Evidence,
    Again,
}

impl World {
    pub fn start_finish(&mut self, sid: usize) -> Op {
        if self.works.is_empty() {
            return Op::Idle;
        }
        let n = self.rng.below(self.works.len());
        if self.rng.permille(300) {
            self.extend(self.works[n]);
            return Op::Idle;
        }
        // A worker may come back any number of times, with any answer.
        let work = self.works[n];
        if self.rng.permille(600) {
            self.works.swap_remove(n);
        }
        let outcome = match self.rng.below(10) {
            0 | 1 if work.copy.1 < 6 => Outcome::Retry,
            2 if work.copy.1 < 6 => Outcome::Snooze,
            3 => Outcome::Failed,
            _ => Outcome::Completed,
        };
        self.finish(sid, work, outcome)
    }

    pub fn finish(&mut self, sid: usize, work: Work, outcome: Outcome) -> Op {
        self.begin(sid);
        Op::Finish(Finish { work, outcome, phase: Phase::Look })
    }

    /// The lock comes first: after it the segment is alive for this transaction, or was pruned.
    fn lock_segment(&mut self, sid: usize, generation: i64) -> bool {
        self.tx_mut(sid).locks.insert(generation);
        self.ring.find(generation).is_some_and(|segment| segment.state != SegmentState::PruneStarted)
    }

    fn decide(&self, sid: usize, entry: &Entry, lease: Option<i64>, outcome: Outcome) -> Exit {
        let tx = self.tx(sid);
        // An aborted claim whose callbacks have not run is as unfinished as one in progress.
        let unsettled = |xid| {
            if crate::broken("aborted_claim_counts_as_settled") {
                self.status(xid) == Status::Running
            } else {
                !self.committed(xid)
            }
        };
        decide_exit(entry, lease, outcome, |xid| tx.owns(xid), unsettled)
    }

    pub fn step_finish(&mut self, sid: usize, mut f: Finish) -> Op {
        let error = self.profile.error_permille;
        if self.rng.permille(error) {
            return self.fail(sid, None);
        }
        let copy = f.work.copy;
        match f.phase {
            Phase::Again => self.start_again(f.work.lane, copy, f.work.attempt + i16::from(f.outcome == Outcome::Retry)),
            Phase::Evidence => {
                self.append_closure(sid, f.work.generation, copy, f.outcome, false);
                if matches!(f.outcome, Outcome::Retry | Outcome::Snooze) {
                    f.phase = Phase::Again;
                    return Op::Finish(f);
                }
                Op::Idle
            }
            Phase::Mark(name, seen) => {
                f.phase = if self.mark(sid, name, &seen, f.outcome) { Phase::Evidence } else { Phase::Look };
                Op::Finish(f)
            }
            Phase::Look | Phase::Recheck => {
                let partition = partition_of(copy.0, PARTITIONS as u32);
                let part = self.pool.part(partition);
                // By the lease: the attempt may have been carried since the worker was told of it.
                let by_lease = part.find(copy.0, |entry| entry.state == State::Claimed && entry.lease == f.work.lease);
                let Some(slot) = by_lease.or_else(|| part.find_copy(copy.0, copy.1)) else {
                    self.stats.stale += 1;
                    return Op::Idle;
                };
                let Some(entry) = part.get(slot).copied() else { return Op::Idle };
                if by_lease.is_some() {
                    (f.work.copy, f.work.generation) = ((entry.job_id, entry.hop), entry.generation);
                }
                let copy = f.work.copy;
                if !self.lock_segment(sid, f.work.generation) {
                    return Op::Idle;
                }
                match self.decide(sid, &entry, Some(f.work.lease), f.outcome) {
                    Exit::Proceed => {
                        if self.held.get(&copy) != Some(&f.work.lease) {
                            self.violation(format!("lease {} ends {copy:?}, held is {:?}", f.work.lease, self.held.get(&copy)));
                        }
                        f.phase = Phase::Mark(EntryRef { partition, slot, stamp: entry.stamp() }, entry);
                        Op::Finish(f)
                    }
                    Exit::WaitForCloser(xid) => self.wait(sid, xid, Op::Finish(f)),
                    Exit::ClaimUncommitted(xid) => {
                        self.stats.uncommitted += 1;
                        self.wait(sid, xid, Op::Finish(f))
                    }
                    Exit::Stale => {
                        self.stats.stale += 1;
                        Op::Idle
                    }
                    Exit::Already | Exit::Conflict(_) => Op::Idle,
                }
            }
        }
    }

    /// A worker says that he needs longer.
    fn extend(&mut self, work: Work) {
        let until = self.now + 1_000 + self.steps as i64;
        let mut part = self.pool.part(partition_of(work.copy.0, PARTITIONS as u32));
        let running = part.find(work.copy.0, |entry| entry.state == State::Claimed && entry.lease == work.lease);
        let alive = part.find(work.copy.0, |entry| entry.is_alive(work.lease));
        let Some(entry) = running.and_then(|slot| part.get_mut(slot)) else { return };
        let carried = entry.closing == Some(Outcome::Moved);
        if alive.is_some() {
            entry.deadline = until;
            self.deadlines.insert(work.lease, until);
            self.stats.heartbeats_carried += u64::from(carried);
        } else if carried || entry.close_xid == 0 {
            self.violation(format!("the worker of {:?} is told that lease {} is stale", work.copy, work.lease));
        }
    }

    /// A waiter looks again until it loses patience; then its call, and perhaps its transaction, fails.
    pub fn wait(&mut self, sid: usize, xid: u64, op: Op) -> Op {
        self.stats.waits += 1;
        if !self.profile.ordered && !self.rng.permille(700) || self.status(xid) == Status::Running && self.rng.permille(100) {
            return if self.rng.permille(300) { self.fail(sid, None) } else { Op::Idle };
        }
        op
    }

    /// False: somebody else was first, or the entry is another one by now; look again.
    pub fn mark(&mut self, sid: usize, name: EntryRef, seen: &Entry, outcome: Outcome) -> bool {
        let xid = self.xid(sid);
        let marked = self.pool.named(name).and_then(|entry| entry.begin_exit(seen, xid, outcome).then_some(*entry));
        let Some(entry) = marked else {
            self.stats.marked_late += 1;
            return false;
        };
        let copy = (entry.job_id, entry.hop);
        let others = self.exits.get(&copy).into_iter().flatten();
        if let Some((other, _)) = others.into_iter().find(|(x, _)| self.status(*x) != Status::Aborted) {
            self.violation(format!("{copy:?} gets a second exit beside that of transaction {other}"));
        }
        self.note(sid, Note::Close(name, copy));
        self.say(|| format!("s{sid} closes {copy:?} as {outcome:?} xid {xid}"));
        true
    }

    // ---- cancel --------------------------------------------------------------------------------------------------------

    pub fn start_cancel(&mut self, sid: usize) -> Op {
        let n = self.rng.below(self.segments.len());
        let Some((generation, segment)) = self.segments.iter().nth(n) else { return Op::Idle };
        let generation = *generation;
        let back = self.rng.below(segment.rows.len().min(12));
        let Some(row) = segment.rows.iter().rev().nth(back).cloned() else { return Op::Idle };
        if !self.committed(row.xmin) {
            return Op::Idle;
        }
        self.start_cancel_of(sid, generation, &row)
    }

    pub fn start_cancel_of(&mut self, sid: usize, generation: i64, row: &Row) -> Op {
        let place = (row.lane, row.position.key, row.position.tid);
        let copy = (row.job, row.hop);
        self.begin(sid);
        Op::Cancel(Cancel { copy, generation, row: place, unclaimed: true, guard: None, phase: Phase::Look })
    }

    pub fn step_cancel(&mut self, sid: usize, mut c: Cancel) -> Op {
        let error = self.profile.error_permille;
        if self.rng.permille(error) {
            return self.fail(sid, None);
        }
        match c.phase {
            Phase::Look => {
                if !self.lock_segment(sid, c.generation) {
                    return Op::Idle;
                }
                let partition = partition_of(c.copy.0, PARTITIONS as u32);
                let part = self.pool.part(partition);
                let found = part.find_copy(c.copy.0, c.copy.1).and_then(|slot| part.get(slot).map(|e| (slot, *e)));
                match found {
                    Some((slot, entry)) => self.cancel_entry(sid, c, EntryRef { partition, slot, stamp: entry.stamp() }, entry),
                    None => self.cancel_unclaimed(sid, c, partition),
                }
            }
            Phase::Mark(name, seen) => self.mark_cancelled(sid, c, name, &seen),
            Phase::Recheck => {
                // With a new snapshot: the attempt may have ended between the look-up of the row and the guard.
                if self.closed(c.copy) && !crate::broken("cancel_without_second_look") {
                    if let Some(name) = c.guard {
                        self.pool.part(name.partition).free(name.slot);
                        self.tx_mut(sid).notes.pop_back();
                    }
                    return Op::Idle;
                }
                if let Some(segment) = self.segments.get_mut(&c.generation) {
                    segment.tombstone_flag = true;
                }
                c.phase = Phase::Evidence;
                Op::Cancel(c)
            }
            Phase::Evidence | Phase::Again => {
                self.append_closure(sid, c.generation, c.copy, Outcome::Cancelled, c.unclaimed);
                Op::Idle
            }
        }
    }

    fn cancel_entry(&mut self, sid: usize, mut c: Cancel, name: EntryRef, entry: Entry) -> Op {
        match self.decide(sid, &entry, None, Outcome::Cancelled) {
            Exit::Proceed => {
                c.phase = Phase::Mark(name, entry);
                Op::Cancel(c)
            }
            Exit::WaitForCloser(xid) | Exit::ClaimUncommitted(xid) => self.wait(sid, xid, Op::Cancel(c)),
            Exit::Already | Exit::Conflict(_) | Exit::Stale => Op::Idle,
        }
    }

    fn mark_cancelled(&mut self, sid: usize, mut c: Cancel, name: EntryRef, seen: &Entry) -> Op {
        let is_hole = seen.state == State::Hole;
        // Under the queue's lock. A hole that is not linked has just been popped by a claimer, who will look at it in a moment: it is his.
        let is_still = self.pool.named(name).is_some_and(|entry| entry.state == State::Hole && entry.lease == seen.lease);
        let is_popped = is_hole && is_still && !self.unlink_hole(name, seen.priority());
        if is_popped && !crate::broken("cancel_of_a_popped_hole") {
            c.phase = Phase::Look;
            return self.wait(sid, 0, Op::Cancel(c));
        }
        if !self.mark(sid, name, seen, Outcome::Cancelled) {
            c.phase = Phase::Look;
            return Op::Cancel(c);
        }
        c.unclaimed = is_hole;
        c.phase = if is_hole { Phase::Recheck } else { Phase::Evidence };
        if let Some(entry) = self.pool.named(name).filter(|entry| entry.state == State::Guard) {
            entry.passed = true;
            self.say(|| format!("s{sid} hole {:?} becomes a guard", c.copy));
        }
        Op::Cancel(c)
    }

    fn cancel_unclaimed(&mut self, sid: usize, mut c: Cancel, partition: u32) -> Op {
        let mut guard = Entry::free();
        (guard.job_id, guard.hop) = c.copy;
        guard.generation = c.generation;
        (guard.lane, guard.key, guard.tid) = c.row;
        guard.state = State::Guard;
        guard.attempt = 1;
        match self.pool.part(partition).insert(guard) {
            Ok(slot) => {
                let stamp = self.pool.part(partition).stamp_of(slot);
                let name = EntryRef { partition, slot, stamp };
                let xid = self.xid(sid);
                if let Some(entry) = self.pool.named(name) {
                    entry.close_xid = xid;
                    entry.closing = Some(Outcome::Cancelled);
                }
                self.note(sid, Note::Close(name, c.copy));
                self.say(|| format!("s{sid} guards {:?} xid {xid}", c.copy));
                c.guard = Some(name);
                c.phase = Phase::Recheck;
                Op::Cancel(c)
            }
            Err(InsertRefusal::Full) => {
                self.stats.pool_full += 1;
                Op::Idle
            }
            Err(InsertRefusal::Exists(_)) => Op::Cancel(c),
        }
    }
}
