//! A carrier: one open job of a sealed segment is closed there and appended to the open one. A waiting job under a guard, a running
//! one as a copy that is born claimed. The server moves many in one step; what happens to each is this.

use awa_protocol::attempt::{EntryRef, State};
use awa_protocol::lane::{BORN_CLAIMED, Lane, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::ring::SegmentState;

use super::log::{Copy, Row};
use super::producer::{New, Produce};
use super::world::{Config, Mode, Note, Op, World};
use super::{Choice, Step};
use crate::actions::Action;
use crate::properties::OPEN_TRUNCATED;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Carry {
    generation: i64,
    row: Row,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Take,
    /// The guard stands: is the row nobody's?
    Reach(EntryRef),
    /// The cursor does not say so: does the guard?
    Passed(EntryRef),
    /// A running attempt: the segment that gets its copy, its lease.
    Running(i64, i64),
    Closure {
        unclaimed: bool,
    },
}

impl World {
    /// Committed rows of sealed segments, but for those that carry a tombstone; also such as have ended.
    fn rows_to_carry(&self, sid: usize) -> Vec<(i64, Row)> {
        let sealed = |generation| self.ring.find(generation).is_some_and(|s| s.state == SegmentState::Sealed);
        let segments = self.log.segments.iter().filter(|s| sealed(s.generation) && self.may_write(sid, s.generation));
        let rows = segments.flat_map(|segment| segment.rows.iter().map(|row| (segment.generation, *row)));
        rows.filter(|(generation, row)| self.log.committed(row.xmin) && !self.has_tombstone(*generation, row.copy(), None))
            .collect()
    }

    pub fn carry_choices(&self, sid: usize) -> usize {
        self.rows_to_carry(sid).len()
    }

    pub fn start_carry(&mut self, sid: usize, choice: Choice) -> Op {
        let Some((generation, row)) = self.rows_to_carry(sid).get(usize::from(choice)).copied() else { return Op::Idle };
        self.begin(sid);
        self.lock(sid, generation, Mode::Write);
        Op::Carry(Carry { generation, row, phase: Phase::Take })
    }

    pub fn may_carry(&self, sid: usize, c: &Carry) -> bool {
        match c.phase {
            Phase::Take => self.ring.open().is_none_or(|open| self.may_write(sid, open.generation)),
            _ => true,
        }
    }

    pub fn step_carry(&mut self, config: &Config, sid: usize, mut c: Carry) -> Step {
        match c.phase {
            Phase::Take => self.take_to_carry(config, sid, c),
            Phase::Reach(name) => {
                let id = World::track_of(c.generation, c.row.lane);
                if self.q.will_reach(id, c.row.position, c.row.xmin) {
                    return (Action::WillReach, self.append_carried(config, sid, c, name));
                }
                c.phase = Phase::Passed(name);
                (Action::WillReach, Op::Carry(c))
            }
            // Asked and freed under one lock.
            Phase::Passed(name) => {
                let passed = self.pool.named(name).is_some_and(|guard| guard.passed);
                if passed && !config.broken("passed_guard_forgotten") {
                    return (Action::FreeOrKeepGuard, self.append_carried(config, sid, c, name));
                }
                self.free_guard(sid, name);
                (Action::FreeOrKeepGuard, Op::Idle)
            }
            Phase::Running(target, lease) => {
                self.append_born_claimed(sid, &c, target, lease);
                c.phase = Phase::Closure { unclaimed: false };
                (Action::AppendBornClaimed, Op::Carry(c))
            }
            Phase::Closure { unclaimed } => {
                if unclaimed {
                    self.raise_flag(c.generation);
                }
                let tombstone = unclaimed && !config.broken("carry_forgets_tombstone");
                self.append_closure(sid, c.generation, c.row.copy(), Outcome::Moved, tombstone);
                (Action::AppendMoved, Op::Idle)
            }
        }
    }

    /// What is in somebody's hands is left.
    fn take_to_carry(&mut self, config: &Config, sid: usize, mut c: Carry) -> Step {
        let copy = c.row.copy();
        let found = self.pool.entries.iter().zip(0u32..).find(|(e, _)| e.state != State::Free && (e.job_id, e.hop) == copy);
        let Some((entry, slot)) = found.map(|(entry, slot)| (*entry, slot)) else {
            let op = self.insert_guard(sid, copy, Outcome::Moved).map_or(Op::Idle, |name| {
                c.phase = Phase::Reach(name);
                Op::Carry(c)
            });
            return (Action::GuardToCarry, op);
        };
        let name = self.pool.name_of(slot);
        let settled = entry.claim_xid == 0 || self.log.committed(entry.claim_xid);
        match entry.state {
            State::Hole if entry.close_xid == 0 => {
                if self.has_tombstone(c.generation, copy, None) || !self.mark_and_unlink(sid, name, &entry, Outcome::Moved) {
                    return (Action::GuardHole, Op::Idle);
                }
                (Action::GuardHole, self.append_carried(config, sid, c, name))
            }
            State::Claimed if entry.close_xid == 0 && settled => {
                (Action::BeginMove, self.move_running(sid, c, name, entry.lease))
            }
            _ => (Action::GuardToCarry, Op::Idle),
        }
    }

    /// Nobody has the row, and nobody will while the guard stands: the next copy by ordinary registration, then the closure.
    fn append_carried(&mut self, config: &Config, sid: usize, mut c: Carry, name: EntryRef) -> Op {
        if self.has_tombstone(c.generation, c.row.copy(), None) {
            self.free_guard(sid, name);
            return Op::Idle;
        }
        if config.broken("guard_freed_before_commit") {
            self.free_guard(sid, name);
        }
        c.phase = Phase::Closure { unclaimed: true };
        let new = New { copy: next(c.row.copy()), run_at: c.row.run_at, attempt: c.row.attempt };
        let mut produce = Produce::new(Lane::from_number(c.row.lane).sub, vec![new]);
        produce.carried = Some(c);
        Op::Produce(produce)
    }

    fn move_running(&mut self, sid: usize, mut c: Carry, old: EntryRef, lease: i64) -> Op {
        let Some(target) = self.ring.open().map(|segment| segment.generation) else { return Op::Idle };
        self.lock(sid, target, Mode::Write);
        let xid = self.xid(sid);
        let Ok(slot) = self.pool.part().begin_move(old, xid, target) else { return Op::Idle };
        let new = self.pool.name_of(slot);
        self.note(sid, Note::Move { old, new, copy: c.row.copy() });
        c.phase = Phase::Running(target, lease);
        Op::Carry(c)
    }

    fn append_born_claimed(&mut self, sid: usize, c: &Carry, target: i64, lease: i64) {
        let (xmin, tid, copy) = (self.xid(sid), self.next_tid(sid), next(c.row.copy()));
        let row = Row { position: Position::at(BORN_CLAIMED, tid), xmin, hop: copy.1, ..c.row };
        if !self.log.append_row(target, row) || !self.log.append_claim(target, xmin, copy, lease) {
            self.violate(OPEN_TRUNCATED);
        }
        self.record_copy(copy, xmin);
    }
}

fn next(copy: Copy) -> Copy {
    (copy.0, copy.1 + 1)
}
