//! A producer: read the open segment, lock it, register, append row by row, deregister. The commit comes some time later.
//!
//! Locking and the check inside the registration are one step: between them nothing that anybody else does is undone by the check.

use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::queue::{Refusal, TrackId, Wanted};

use super::log::{Copy, Row};
use super::world::{Config, LANE, Mode, Op, QUEUE, World};
use super::{Carry, Step};
use crate::actions::Action;
use crate::properties::{OPEN_TRUNCATED, STUCK};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Produce {
    pub sub: SubLane,
    pub rows: Vec<New>,
    /// A copy is carried: its closure comes afterwards.
    pub carried: Option<Carry>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct New {
    pub copy: Copy,
    pub run_at: i64,
    pub attempt: i16,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Read,
    Register(i64),
    Append { generation: i64, n: usize, keys: [i64; 4] },
    Deregister,
}

impl Produce {
    pub fn new(sub: SubLane, rows: Vec<New>) -> Self {
        Self { sub, rows, carried: None, phase: Phase::Read }
    }

    fn track(&self, generation: i64) -> TrackId {
        TrackId { generation, priority: LANE.priority, sub: self.sub }
    }
}

impl World {
    pub fn start_enqueue(&mut self, sid: usize, rows: usize, due: Option<i64>) -> Op {
        self.begin(sid);
        let sub = if due.is_some() { SubLane::Scheduled } else { SubLane::Immediate };
        let run_at = self.now + due.unwrap_or(0);
        let rows: Vec<New> = (0..rows).map(|_| New { copy: (self.next_job(sid), 0), run_at, attempt: 0 }).collect();
        self.tx(sid).enqueued.extend(rows.iter().map(|row| row.copy.0));
        Op::Produce(Produce::new(sub, rows))
    }

    pub fn may_produce(&self, sid: usize, p: &Produce) -> bool {
        match p.phase {
            Phase::Register(generation) => self.may_write(sid, generation),
            _ => true,
        }
    }

    pub fn step_produce(&mut self, config: &Config, sid: usize, mut p: Produce) -> Step {
        match p.phase {
            Phase::Read => {
                let Some(open) = self.ring.open().map(|segment| segment.generation) else {
                    self.violate(STUCK);
                    return (Action::ReadOpenSegment, Op::Idle);
                };
                p.phase = Phase::Register(open);
                (Action::ReadOpenSegment, Op::Produce(p))
            }
            Phase::Register(generation) => {
                self.lock(sid, generation, Mode::Write);
                let is_open = self.ring.open().is_some_and(|segment| segment.generation == generation);
                if !is_open && !config.broken("no_recheck_of_open_segment") {
                    p.phase = Phase::Read;
                    return (Action::Register, Op::Produce(p));
                }
                let due: Vec<i64> = p.rows.iter().map(|row| row.run_at).collect();
                let wanted = match p.sub {
                    SubLane::Immediate => Wanted::Immediate { rows: due.len() },
                    SubLane::Scheduled => Wanted::Scheduled { run_at: &due },
                };
                let (track, now, xid) = (p.track(generation), self.now, self.xid(sid));
                let mut keys = [0; 4];
                match self.q.register(track, wanted, now, sid as u32, xid, &mut keys) {
                    Ok(()) => {}
                    // It tries again until another has appended his rows.
                    Err(Refusal::TooManyInserters) => return (Action::Register, Op::Produce(p)),
                    Err(Refusal::TooManyTracks) => {
                        self.violate(STUCK);
                        return (Action::Register, Op::Idle);
                    }
                }
                let tx = self.tx(sid);
                tx.registered = true;
                tx.sync = !config.broken("enqueue_is_not_flushed");
                p.phase = Phase::Append { generation, n: 0, keys };
                (Action::Register, Op::Produce(p))
            }
            Phase::Append { generation, n, keys } => {
                let (new, tid, xmin) = (p.rows[n], self.next_tid(sid), self.xid(sid));
                let lane = Lane { queue_id: QUEUE, priority: LANE.priority, sub: p.sub }.number();
                let position = Position::at(keys[n], tid);
                let (job, hop) = new.copy;
                let row = Row { lane, position, xmin, job, hop, run_at: new.run_at, attempt: new.attempt };
                if !self.log.append_row(generation, row) {
                    self.violate(OPEN_TRUNCATED);
                }
                self.record_copy(new.copy, xmin);
                p.phase = if n + 1 < p.rows.len() { Phase::Append { generation, n: n + 1, keys } } else { Phase::Deregister };
                (Action::AppendRow, Op::Produce(p))
            }
            Phase::Deregister => {
                self.q.deregister(sid as u32);
                self.tx(sid).registered = false;
                let next = p.carried.map_or(Op::Idle, Op::Carry);
                (Action::Deregister, next)
            }
        }
    }
}
