//! A producer: lock the open segment, register, append row by row, deregister; the commit comes some time later.

use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::limits::ROWS_PER_REGISTRATION;
use awa_protocol::queue::{NOBODY, Refusal, TrackId, Wanted};
use awa_protocol::rebuild::Copy_;

use crate::world::{Note, Op, QUEUE, Row, World};

#[derive(Default)]
pub struct Produce {
    phase: Phase,
    generation: i64,
    priority: u8,
    scheduled: bool,
    /// (job, hop, run_at, attempt)
    rows: Vec<(Copy_, i64, i16)>,
    keys: Vec<i64>,
}

#[derive(Default, Clone, Copy)]
enum Phase {
    #[default]
    Lock,
    Register,
    Append(usize),
    Deregister,
}

impl World {
    pub fn start_produce(&mut self, sid: usize) -> Op {
        self.begin(sid);
        let rows = if self.rng.permille(3) { ROWS_PER_REGISTRATION } else { 1 + self.rng.below(self.profile.rows) };
        let scheduled = self.profile.scheduled_permille;
        let scheduled = rows < ROWS_PER_REGISTRATION && self.rng.permille(scheduled);
        let run_at = self.now + self.rng.between(-20, 60);
        let mut produce = Produce { scheduled, priority: self.rng.below(self.profile.priorities) as u8, ..Produce::default() };
        for _ in 0..rows {
            let tie = self.rng.permille(500);
            let due = if tie { run_at } else { self.now + self.rng.between(-20, 60) };
            produce.rows.push(((self.next_job, 0), due, 1));
            self.next_job += 1;
        }
        Op::Produce(produce)
    }

    /// The next attempt of a job whose closure was appended in the same transaction.
    pub fn start_again(&mut self, lane: i32, copy: Copy_, attempt: i16) -> Op {
        let run_at = self.now + self.rng.between(-5, 40);
        let priority = Lane::from_number(lane).priority;
        Op::Produce(Produce {
            priority,
            scheduled: true,
            rows: vec![((copy.0, copy.1 + 1), run_at, attempt)],
            ..Produce::default()
        })
    }

    /// The next copy of a job that is carried: all as it was.
    pub fn start_next(&mut self, lane: i32, scheduled: bool, copy: Copy_, run_at: i64, attempt: i16) -> Op {
        let (priority, rows) = (Lane::from_number(lane).priority, vec![((copy.0, copy.1 + 1), run_at, attempt)]);
        Op::Produce(Produce { priority, scheduled, rows, ..Produce::default() })
    }

    pub fn step_produce(&mut self, sid: usize, mut p: Produce) -> Op {
        let error = self.profile.error_permille;
        if self.rng.permille(error) {
            return self.fail(sid, None);
        }
        match p.phase {
            Phase::Lock => {
                let Some(open) = self.ring.open().map(|segment| segment.generation) else { return self.fail(sid, None) };
                if self.building == Some(None) {
                    return if self.rng.permille(50) { self.fail(sid, None) } else { Op::Produce(p) };
                }
                p.generation = open;
                p.phase = Phase::Register;
                // A producer may have read the pointer and sleep before it locks.
                Op::Produce(p)
            }
            Phase::Register => self.register(sid, p),
            Phase::Append(n) => {
                let track = p.track();
                let (copy, run_at, attempt) = p.rows[n];
                let (xmin, lane) = (self.xid(sid), World::lane_number(track));
                let key = p.keys[n];
                let position = Position::at(key, 0);
                self.append_row(sid, p.generation, Row { lane, position, xmin, job: copy.0, hop: copy.1, run_at, attempt });
                self.say(|| format!("s{sid} append {copy:?} key {key} lane {lane} segment {} xid {xmin}", p.generation));
                p.phase = if n + 1 == p.rows.len() { Phase::Deregister } else { Phase::Append(n + 1) };
                Op::Produce(p)
            }
            Phase::Deregister => {
                self.q.deregister(sid as u32);
                self.say(|| format!("s{sid} deregister"));
                Op::Idle
            }
        }
    }

    fn register(&mut self, sid: usize, mut p: Produce) -> Op {
        self.tx_mut(sid).locks.insert(p.generation);
        let open = self.ring.open().map(|segment| segment.generation);
        if (open != Some(p.generation) || self.building == Some(None)) && !crate::broken("no_recheck_of_open_segment") {
            self.stats.rechecks += 1;
            p.phase = Phase::Lock;
            return Op::Produce(p);
        }
        let track = p.track();
        let before = self.q.find_track(track).copied();
        let due: Vec<i64> = p.rows.iter().map(|(_, run_at, _)| *run_at).collect();
        let wanted = if p.scheduled { Wanted::Scheduled { run_at: &due } } else { Wanted::Immediate { rows: p.rows.len() } };
        let (now, xid) = (self.now, self.xid(sid));
        let mut keys = [0i64; ROWS_PER_REGISTRATION];
        match self.q.register(track, wanted, now, sid as u32, xid, &mut keys) {
            Ok(()) => {}
            Err(Refusal::TooManyInserters) => {
                self.stats.inserters_refused += 1;
                return Op::Produce(p);
            }
            Err(Refusal::TooManyTracks) => {
                self.stats.tracks_refused += 1;
                return self.fail(sid, None);
            }
        }
        self.note(sid, Note::Registered);
        self.tx_mut(sid).sync = true;
        p.keys = keys[..p.rows.len()].to_vec();
        self.check_keys(&p, before.map(|t| (t.horizon.max(t.cursor.key), t.last)), &due);
        p.phase = Phase::Append(0);
        self.say(|| format!("s{sid} register {track:?} xid {xid} keys {:?}", (p.keys.first(), p.keys.last())));
        Op::Produce(p)
    }

    fn check_keys(&self, p: &Produce, before: Option<(i64, i64)>, due: &[i64]) {
        let (floor, last) = before.unwrap_or((i64::MIN, i64::MIN));
        let mut seen = p.keys.clone();
        seen.sort_unstable();
        seen.dedup();
        if let Some(key) = p.keys.iter().find(|key| **key <= floor) {
            self.violation(format!("key {key} is not above the horizon {floor}"));
        }
        if p.scheduled {
            if let Some((key, run_at)) = p.keys.iter().zip(due).find(|(key, run_at)| key < run_at) {
                self.violation(format!("key {key} is before its run_at {run_at}"));
            }
        } else if seen != p.keys || p.keys.first().is_some_and(|key| *key <= last) {
            self.violation(format!("immediate keys do not ascend above {last}: {:?}", p.keys));
        }
    }
}

impl Produce {
    fn track(&self) -> TrackId {
        let sub = if self.scheduled { SubLane::Scheduled } else { SubLane::Immediate };
        debug_assert!(QUEUE != NOBODY as i32);
        TrackId { generation: self.generation, priority: self.priority, sub }
    }
}
