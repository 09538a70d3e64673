//! Operators: a finished job is tried again or deleted. The evidence of its end is superseded, under a guard.

use awa_protocol::attempt::{Entry, EntryRef, State, partition_of};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::rebuild::Copy_;
use awa_protocol::ring::SegmentState;

use crate::world::{Note, Op, PARTITIONS, Row, Status, World};

pub struct Redrive {
    copy: Copy_,
    generation: i64,
    row: (i32, i64, u64),
    by: Outcome,
    guard: Option<EntryRef>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Look,
    Guard,
    Recheck,
    Evidence,
    Again,
}

impl World {
    pub fn start_redrive(&mut self, sid: usize) -> Op {
        let finished = |row: &&Row| row.hop < 8 && self.ended_for_good((row.job, row.hop)).is_some();
        let rows = self.segments.iter().flat_map(|(generation, s)| s.rows.iter().filter(finished).map(|row| (*generation, row)));
        let mut found: Vec<(i64, Row)> = rows.map(|(generation, row)| (generation, row.clone())).collect();
        if found.is_empty() {
            return Op::Idle;
        }
        // Operators see the same list: several want the same job.
        let from = found.len().saturating_sub(3);
        let (generation, row) = found.swap_remove(from + self.rng.below(found.len() - from));
        let by = if self.rng.permille(750) { Outcome::Redriven } else { Outcome::Removed };
        self.begin(sid);
        let place = (row.lane, row.position.key, row.position.tid);
        Op::Redrive(Redrive { copy: (row.job, row.hop), generation, row: place, by, guard: None, phase: Phase::Look })
    }

    /// The committed end of a job, unless it was superseded.
    fn ended_for_good(&self, copy: Copy_) -> Option<Outcome> {
        if self.superseded.get(&copy).is_some_and(|by| by.iter().any(|xid| self.committed(*xid))) {
            return None;
        }
        let exits = self.exits.get(&copy)?;
        exits.iter().find(|(xid, outcome)| self.committed(*xid) && outcome.is_history()).map(|(_, outcome)| *outcome)
    }

    fn may_supersede(&self, r: &Redrive) -> bool {
        self.ended_for_good(r.copy).is_some_and(|ended| r.by.supersedes(ended))
    }

    pub fn step_redrive(&mut self, sid: usize, mut r: Redrive) -> Op {
        let error = self.profile.error_permille;
        if self.rng.permille(error) {
            return self.fail(sid, None);
        }
        // Between any two steps evidence is read, which takes long.
        if self.rng.permille(500) {
            return Op::Redrive(r);
        }
        let partition = partition_of(r.copy.0, PARTITIONS as u32);
        match r.phase {
            Phase::Look => {
                let part = self.pool.part(partition);
                let other =
                    part.find(r.copy.0, |entry| entry.hop >= r.copy.1).and_then(|slot| part.get(slot)).map(|e| e.close_xid);
                match other {
                    Some(xid) if xid != 0 && self.status(xid) == Status::Running && !self.tx(sid).owns(xid) => {
                        self.wait(sid, xid, Op::Redrive(r))
                    }
                    Some(_) => Op::Idle,
                    None if !self.may_supersede(&r) => Op::Idle,
                    None => {
                        r.phase = Phase::Guard;
                        Op::Redrive(r)
                    }
                }
            }
            Phase::Guard => self.guard_finished(sid, r, partition),
            Phase::Recheck => {
                if !crate::broken("redrive_without_lock") {
                    self.tx_mut(sid).locks.insert(r.generation);
                }
                let alive = self.ring.find(r.generation).is_some_and(|segment| segment.state != SegmentState::PruneStarted);
                let still = alive && self.may_supersede(&r);
                if !still && !crate::broken("redrive_without_second_look") {
                    if let Some(name) = r.guard {
                        self.pool.part(name.partition).free(name.slot);
                        self.tx_mut(sid).notes.pop_back();
                    }
                    return Op::Idle;
                }
                r.phase = Phase::Evidence;
                Op::Redrive(r)
            }
            Phase::Evidence => {
                self.append_superseding(sid, r.generation, r.copy, r.by);
                if r.by == Outcome::Removed {
                    return Op::Idle;
                }
                r.phase = Phase::Again;
                Op::Redrive(r)
            }
            Phase::Again => self.start_again(r.row.0, r.copy, 0),
        }
    }

    fn guard_finished(&mut self, sid: usize, mut r: Redrive, partition: u32) -> Op {
        let mut guard = Entry::free();
        (guard.job_id, guard.hop) = r.copy;
        guard.generation = r.generation;
        (guard.lane, guard.key, guard.tid) = r.row;
        guard.state = State::Guard;
        guard.close_xid = self.xid(sid);
        guard.closing = Some(r.by);
        let mut part = self.pool.part(partition);
        if part.find(r.copy.0, |entry| entry.hop >= r.copy.1).is_some() {
            r.phase = Phase::Look;
            return Op::Redrive(r);
        }
        let Ok(slot) = part.insert(guard) else {
            self.stats.pool_full += 1;
            return Op::Idle;
        };
        let name = EntryRef { partition, slot, stamp: part.stamp_of(slot) };
        self.note(sid, Note::Supersede(name, r.copy));
        self.say(|| format!("s{sid} guards the finished {:?}", r.copy));
        r.guard = Some(name);
        r.phase = Phase::Recheck;
        Op::Redrive(r)
    }

    fn append_superseding(&mut self, sid: usize, generation: i64, copy: Copy_, by: Outcome) {
        let xid = self.xid(sid);
        let others = self.superseded.get(&copy).into_iter().flatten();
        if let Some(other) = others.into_iter().find(|xid| self.status(**xid) != Status::Aborted) {
            self.violation(format!("the end of {copy:?} is superseded beside transaction {other}"));
        }
        if self.ring.find(generation).is_none_or(|segment| segment.state == SegmentState::PruneStarted) {
            self.violation(format!("the end of {copy:?} is superseded after its fate was decided by prune"));
        }
        self.superseded.entry(copy).or_default().push(xid);
        self.stats.superseded += 1;
        self.append_evidence(sid, generation, copy, by, false);
        self.say(|| format!("s{sid} supersedes the end of {copy:?} by {by:?} xid {xid}"));
    }

    /// Two copies of one job that are both to run would be told here.
    pub fn check_superseded(&self, copy: Copy_) {
        let committed = self.superseded.get(&copy).map_or(0, |by| by.iter().filter(|xid| self.committed(**xid)).count());
        if committed != 1 {
            self.violation(format!("the end of {copy:?} is superseded {committed} times"));
        }
    }
}
