//! A carrier: one open job of a sealed segment is closed there and appended to the open one. A waiting job by a guard and a tombstone, as
//! for a cancel; a running one as a copy that is born claimed.

use awa_protocol::attempt::{Entry, EntryRef, State, partition_of};
use awa_protocol::lane::{BORN_CLAIMED, Lane, Position, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::rebuild::{Copy_, OpenClaim};
use awa_protocol::ring::SegmentState;

use crate::world::{Note, Op, PARTITIONS, Row, World};

pub struct Carry {
    row: Row,
    generation: i64,
    name: Option<EntryRef>,
    phase: Phase,
}

enum Phase {
    Look,
    /// The guard stands: is the row nobody's?
    Recheck,
    /// The cursor does not say so: does the guard? What it said a step ago (read only by a mutant).
    Passed(bool),
    Evidence,
    Append,
    /// A running attempt: the segment that gets the copy, and the lease.
    Running(i64, i64),
}

impl Carry {
    fn copy(&self) -> Copy_ {
        (self.row.job, self.row.hop)
    }
}

impl World {
    fn is_sealed(&self, generation: i64) -> bool {
        self.ring.find(generation).is_some_and(|segment| segment.state == SegmentState::Sealed)
    }

    pub fn start_carry(&mut self, sid: usize) -> Op {
        let sealed: Vec<i64> = self.segments.keys().copied().filter(|generation| self.is_sealed(*generation)).collect();
        if sealed.is_empty() {
            return Op::Idle;
        }
        let generation = sealed[self.rng.below(sealed.len())];
        let row = self.row_to_carry(generation);
        let Some(row) = row.filter(|row| self.committed(row.xmin)) else { return Op::Idle };
        self.start_carry_of(sid, generation, row)
    }

    pub fn start_carry_of(&mut self, sid: usize, generation: i64, row: Row) -> Op {
        self.begin(sid);
        Op::Carry(Carry { row, generation, name: None, phase: Phase::Look })
    }

    /// Any; rather one that a scan is passing at this moment, for then the cursor says least, and of those one that is done already.
    fn row_to_carry(&mut self, generation: i64) -> Option<Row> {
        let rows = self.segments.get(&generation).map_or(0, |segment| segment.rows.len());
        let mut best: Option<(u8, Row)> = None;
        for _ in 0..16 {
            let n = self.rng.below(rows);
            let row = self.segments.get(&generation)?.rows.get(n)?;
            let track = self.q.find_track(self.track_of(generation, row.lane));
            let in_turn = track.is_some_and(|track| track.has_turn() && row.position > track.cursor);
            let copy = (row.job, row.hop);
            let rank = u8::from(in_turn) * (1 + u8::from(self.closed(copy) && !self.has_tombstone(generation, copy)));
            if best.as_ref().is_none_or(|(other, _)| rank > *other) {
                best = Some((rank, row.clone()));
            }
            if rank == 2 || self.rng.permille(300) {
                break;
            }
        }
        best.map(|(_, row)| row)
    }

    pub fn step_carry(&mut self, sid: usize, mut c: Carry) -> Op {
        let error = self.profile.error_permille;
        if self.rng.permille(error) {
            return self.fail(sid, None);
        }
        match c.phase {
            Phase::Look => {
                self.tx_mut(sid).locks.insert(c.generation);
                if !self.is_sealed(c.generation) {
                    return Op::Idle;
                }
                let partition = partition_of(c.row.job, PARTITIONS as u32);
                let part = self.pool.part(partition);
                let found = part.find_copy(c.row.job, c.row.hop).and_then(|slot| part.get(slot).map(|e| (slot, *e)));
                match found {
                    None => self.guard_row(sid, c, partition),
                    Some((slot, entry)) => self.carry_entry(sid, c, EntryRef { partition, slot, stamp: entry.stamp() }, entry),
                }
            }
            Phase::Recheck => {
                let id = self.track_of(c.generation, c.row.lane);
                if self.q.will_reach(id, c.row.position, c.row.xmin) {
                    return self.carry_guarded(sid, c);
                }
                c.phase = Phase::Passed(c.name.and_then(|name| self.pool.named(name)).is_some_and(|guard| guard.passed));
                Op::Carry(c)
            }
            // Asked and freed under one lock: a scan that comes between would leave the row to a guard that is gone.
            Phase::Passed(before) => {
                let now = c.name.and_then(|name| self.pool.named(name)).is_some_and(|guard| guard.passed);
                let passed = if crate::broken("guard_freed_after_a_look") { before } else { now };
                if passed && !crate::broken("passed_guard_forgotten") {
                    return self.carry_guarded(sid, c);
                }
                self.free_guard(sid, &c)
            }
            Phase::Evidence => {
                let tombstone = !crate::broken("carry_forgets_tombstone");
                self.append_closure(sid, c.generation, c.copy(), Outcome::Moved, tombstone);
                if let Some(name) = c.name.filter(|_| crate::broken("guard_freed_before_commit")) {
                    self.pool.part(name.partition).free(name.slot);
                    self.tx_mut(sid).notes.pop_back();
                }
                c.phase = Phase::Append;
                Op::Carry(c)
            }
            Phase::Append if crate::broken("carry_keeps_old_key") => self.append_with_old_key(sid, &c),
            Phase::Append => {
                let scheduled = Lane::from_number(c.row.lane).sub == SubLane::Scheduled;
                self.stats.carried += 1;
                self.start_next(c.row.lane, scheduled, c.copy(), c.row.run_at, c.row.attempt)
            }
            Phase::Running(target, lease) => {
                self.append_born_claimed(sid, &c, target, lease);
                Op::Idle
            }
        }
    }

    /// The guard stands on a row that nobody has taken.
    fn carry_guarded(&mut self, sid: usize, mut c: Carry) -> Op {
        if self.has_tombstone(c.generation, c.copy()) {
            return self.free_guard(sid, &c);
        }
        if let Some(segment) = self.segments.get_mut(&c.generation) {
            segment.tombstone_flag = true;
        }
        c.phase = Phase::Evidence;
        Op::Carry(c)
    }

    fn free_guard(&mut self, sid: usize, c: &Carry) -> Op {
        if let Some(name) = c.name {
            self.pool.part(name.partition).free(name.slot);
            self.tx_mut(sid).notes.pop_back();
        }
        Op::Idle
    }

    fn has_tombstone(&self, generation: i64, copy: Copy_) -> bool {
        let tombstones = self.segments.get(&generation).and_then(|segment| segment.tombstones.get(&copy));
        tombstones.is_some_and(|xids| xids.iter().any(|xid| self.committed(*xid)))
    }

    fn guard_row(&mut self, sid: usize, mut c: Carry, partition: u32) -> Op {
        let xid = self.xid(sid);
        let guard = Entry {
            job_id: c.row.job,
            hop: c.row.hop,
            generation: c.generation,
            lane: c.row.lane,
            key: c.row.position.key,
            tid: c.row.position.tid,
            state: State::Guard,
            attempt: c.row.attempt,
            close_xid: xid,
            closing: Some(Outcome::Moved),
            ..Entry::free()
        };
        let Ok(slot) = self.pool.part(partition).insert(guard) else {
            self.stats.pool_full += 1;
            return Op::Idle;
        };
        let name = EntryRef { partition, slot, stamp: self.pool.part(partition).stamp_of(slot) };
        self.note(sid, Note::Close(name, c.copy()));
        self.say(|| format!("s{sid} guards {:?} to carry it, xid {xid}", c.copy()));
        (c.name, c.phase) = (Some(name), Phase::Recheck);
        Op::Carry(c)
    }

    /// What is in somebody's hands is left.
    fn carry_entry(&mut self, sid: usize, mut c: Carry, name: EntryRef, entry: Entry) -> Op {
        if entry.close_xid != 0 {
            return Op::Idle;
        }
        match entry.state {
            State::Hole if self.unlink_hole(name, entry.priority()) => {
                self.mark(sid, name, &entry, Outcome::Moved);
                if let Some(entry) = self.pool.named(name) {
                    entry.passed = true;
                }
                if let Some(segment) = self.segments.get_mut(&c.generation) {
                    segment.tombstone_flag = true;
                }
                c.phase = Phase::Evidence;
                Op::Carry(c)
            }
            State::Claimed if entry.claim_xid == 0 || self.committed(entry.claim_xid) => {
                let Some(target) = self.ring.open().map(|segment| segment.generation) else { return Op::Idle };
                if self.building.is_some() {
                    return Op::Idle;
                }
                self.tx_mut(sid).locks.insert(target);
                let xid = self.xid(sid);
                let Ok(slot) = self.pool.part(name.partition).begin_move(name, xid, target) else {
                    self.stats.pool_full += 1;
                    return Op::Idle;
                };
                let new = EntryRef { slot, stamp: self.pool.part(name.partition).stamp_of(slot), ..name };
                self.note(sid, Note::Move(name, new, c.copy()));
                self.say(|| format!("s{sid} carries the running {:?} to segment {target}, xid {xid}", c.copy()));
                c.phase = Phase::Running(target, entry.lease);
                Op::Carry(c)
            }
            _ => Op::Idle,
        }
    }

    fn append_born_claimed(&mut self, sid: usize, c: &Carry, target: i64, lease: i64) {
        let copy = (c.row.job, c.row.hop + 1);
        let xmin = self.xid(sid);
        let key = if crate::broken("born_claimed_copy_offered") { self.now } else { BORN_CLAIMED };
        self.append_row(sid, target, Row { position: Position::at(key, 0), xmin, hop: copy.1, ..c.row.clone() });
        self.append_closure(sid, c.generation, c.copy(), Outcome::Moved, false);
        let claim = OpenClaim { lease, claimed_at: self.now, deadline: 0, heartbeat_timeout: 0 };
        if let Some(segment) = self.segments.get_mut(&target) {
            segment.claims.push((xmin, copy, claim));
        }
        self.stats.carried_running += 1;
    }

    /// What interleaving 10 warns of.
    fn append_with_old_key(&mut self, sid: usize, c: &Carry) -> Op {
        if let Some(target) = self.ring.open().map(|segment| segment.generation).filter(|_| self.building.is_none()) {
            self.tx_mut(sid).locks.insert(target);
            let xmin = self.xid(sid);
            self.append_row(sid, target, Row { xmin, hop: c.row.hop + 1, ..c.row.clone() });
        }
        Op::Idle
    }
}
