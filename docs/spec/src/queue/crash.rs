//! Crash, restart, rebuild. Nobody uses shared memory before it is built, so the three are one step.
//!
//! Not here: transactions that were prepared; a rebuild under load. `src/protocol/tests/model` has them.

use awa_protocol::attempt::{Entry, State};
use awa_protocol::queue::{NO_KEY, NOBODY};
use awa_protocol::rebuild::{Fate, OpenClaim, ReadyRow, SegmentFold};
use awa_protocol::ring::{Ring, SegmentState};

use super::log::{Log, Row, Status};
use super::world::{Config, NOW, Op, POOL, Pool, Session, Verb, World};
use crate::properties::{OPEN_TRUNCATED, STUCK};

/// The fold of a segment, and what it says of each committed row.
pub fn fold(log: &Log, generation: i64) -> (SegmentFold, Vec<(Row, ReadyRow, Fate)>) {
    let mut fold = SegmentFold::new(generation);
    let Some(segment) = log.segment(generation) else { return (fold, Vec::new()) };
    for closure in segment.closures.iter().filter(|closure| log.committed(closure.xmin)) {
        fold.closure(closure.copy.0, closure.copy.1, closure.outcome, closure.unclaimed);
    }
    for (_, copy, lease) in segment.claims.iter().filter(|(xmin, ..)| log.committed(*xmin)) {
        let claim = OpenClaim { lease: *lease, claimed_at: 0, deadline: 1, heartbeat_timeout: 0 };
        fold.claim(copy.0, copy.1, claim);
    }
    let committed = segment.rows.iter().filter(|row| log.committed(row.xmin));
    let rows: Vec<(Row, ReadyRow, Fate)> = committed
        .map(|row| {
            let ready = ReadyRow {
                job_id: row.job,
                hop: row.hop,
                lane: row.lane,
                position: row.position,
                attempt: row.attempt,
                max_attempts: 5,
            };
            let fate = fold.first_pass(&ready);
            (*row, ready, fate)
        })
        .collect();
    (fold, rows)
}

impl World {
    /// `lose`: commits that were not flushed are lost.
    pub fn crash(&mut self, config: &Config, lose: bool) {
        for status in self.log.xids.iter_mut().flatten() {
            *status = match *status {
                Status::Running => Status::Aborted,
                Status::Committed { flushed: false } if lose => Status::Aborted,
                Status::Committed { .. } => Status::Committed { flushed: true },
                Status::Aborted => Status::Aborted,
            };
        }
        for sid in 0..self.sessions.len() {
            let at = self.after_transaction(config, sid);
            let Session { jobs, tids, .. } = self.sessions[sid];
            self.sessions[sid] = Session { at, jobs, tids, ..Session::default() };
        }
        // The clock may have been set back meanwhile.
        self.now = self.now.min(NOW) - 20;
        if !config.broken("nonce_is_kept") {
            self.nonce += 1;
        }
        match self.log.ring() {
            Some(ring) => self.ring = ring,
            None => self.violate(OPEN_TRUNCATED),
        }
        // What an unfinished rotation made is rolled back; what was pruned is empty.
        let ring: &Ring = &self.ring;
        let gone: Vec<i64> =
            self.log.segments.iter().map(|s| s.generation).filter(|generation| ring.find(*generation).is_none()).collect();
        gone.into_iter().for_each(|generation| self.forget_segment(generation));
        self.rebuild();
    }

    /// Where the script goes on after the transaction that was broken off.
    pub fn after_transaction(&self, config: &Config, sid: usize) -> usize {
        let session = &self.sessions[sid];
        let script = config.sessions.get(sid).copied().unwrap_or(&[]);
        if session.tx.is_none() && session.op == Op::Idle {
            return session.at;
        }
        let rest = script.iter().skip(session.at);
        let end = rest.zip(session.at..).find(|(verb, _)| matches!(verb, Verb::Commit)).map(|(_, at)| at + 1);
        // It has been counted already.
        let ending = matches!(session.op, Op::Settle | Op::Undo { .. });
        if ending { session.at } else { end.unwrap_or(script.len()) }
    }

    /// Shared memory from the log.
    pub fn rebuild(&mut self) {
        self.install();
        self.pool = Pool::new(POOL);
        self.flags.clear();
        self.held.clear();
        let segments: Vec<_> = self.ring.segments.iter().copied().collect();
        for segment in segments.iter().filter(|segment| segment.state != SegmentState::PruneStarted) {
            if self.log.segment(segment.generation).is_some_and(|segment| segment.ready_cut) {
                self.violate(OPEN_TRUNCATED);
            }
            self.restore(segment.generation, segment.state == SegmentState::Open);
        }
    }

    fn restore(&mut self, generation: i64, open: bool) {
        let (mut fold, rows) = fold(&self.log, generation);
        let holes: Vec<bool> = rows.iter().map(|(_, ready, fate)| fold.second_pass(ready, fate)).collect();
        let lanes: Vec<i32> = fold.tracks.keys().copied().collect();
        for lane in lanes {
            let (cursor, head, last) = fold.standing(lane);
            let has_hole = rows.iter().zip(&holes).any(|((row, ..), hole)| *hole && row.lane == lane);
            if head == NO_KEY && !has_hole && !open {
                continue;
            }
            if self.q.restore_track(fold.track_id(lane), cursor, head, last).is_err() {
                self.violate(STUCK);
            }
        }
        // From the highest key down, so that each lands in front of the list.
        let mut found: Vec<(Row, Fate, bool)> =
            rows.iter().zip(holes).map(|((row, _, fate), hole)| (*row, *fate, hole)).collect();
        found.sort_by_key(|(row, ..)| std::cmp::Reverse(row.position));
        for (row, fate, hole) in found {
            let claim = if let Fate::Open(claim) = fate { Some(claim) } else { None };
            if claim.is_some() || hole {
                self.restore_entry(generation, &row, claim);
            }
        }
        let Some(segment) = self.log.segment(generation) else { return };
        if segment.closures.iter().any(|closure| closure.unclaimed) {
            self.raise_flag(generation);
        }
    }

    fn restore_entry(&mut self, generation: i64, row: &Row, claim: Option<OpenClaim>) {
        let entry = Entry {
            job_id: row.job,
            hop: row.hop,
            generation,
            lane: row.lane,
            key: row.position.key,
            tid: row.position.tid,
            attempt: row.attempt + 1,
            lease: claim.map_or(0, |claim| claim.lease),
            deadline: claim.map_or(0, |claim| claim.deadline),
            process: NOBODY,
            state: State::Claimed,
            ..Entry::free()
        };
        let Ok(slot) = self.pool.part().insert(entry) else {
            self.violate(STUCK);
            return;
        };
        match claim {
            Some(claim) => self.hold(row.copy(), claim.lease),
            None => {
                let name = self.pool.name_of(slot);
                self.give_back(name);
            }
        }
    }
}
