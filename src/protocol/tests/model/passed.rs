//! The beginning of a schedule of the profile "passed", which chance alone does not find: while one scan goes on, a guard that it has passed
//! is rolled back, the job runs as a hole, ends, and is carried. Or a carrier's own guard is passed at the worst moment.
//!
//! Whoever does not come as far as the next act (an error, a snapshot) leaves the rest to chance.

use awa_protocol::attempt::{State, partition_of};
use awa_protocol::lifecycle::Outcome;

use crate::world::{Op, PARTITIONS, Row, World};

const SCANNER: usize = 0;
const CANCELLER: usize = 1;
const WORKER: usize = 2;
const CARRIER: usize = 3;

impl World {
    pub fn pass_and_carry(&mut self) {
        for _ in 0..3 {
            let produce = self.start_produce(SCANNER);
            self.act(SCANNER, produce);
            self.end(SCANNER);
        }
        let Some(sealed) = self.ring.open().map(|segment| segment.generation) else { return };
        if self.rotate().is_none() {
            return;
        }
        self.sessions[SCANNER].op = self.start_claim_of(SCANNER, 1_000);
        let Some(row) = self.row_ahead(sealed) else { return };
        if self.rng.permille(300) {
            self.sessions[CARRIER].op = self.start_carry_of(CARRIER, sealed, row.clone());
            self.step_session(CARRIER);
            self.step_session(CARRIER);
            self.pass(&row);
        } else {
            let cancel = self.start_cancel_of(CANCELLER, sealed, &row);
            self.act(CANCELLER, cancel);
            if !self.pass(&row) {
                return;
            }
            let undo = self.rollback(CANCELLER, 0, None);
            self.act(CANCELLER, undo);
            let claim = self.start_claim_of(WORKER, 1);
            self.act(WORKER, claim);
            self.end(WORKER);
            let Some(work) = self.works.iter().find(|work| work.copy == (row.job, row.hop)).copied() else { return };
            let finish = self.finish(WORKER, work, Outcome::Completed);
            self.act(WORKER, finish);
            self.end(WORKER);
            self.sessions[CARRIER].op = self.start_carry_of(CARRIER, sealed, row);
        }
        let carry = std::mem::take(&mut self.sessions[CARRIER].op);
        self.act(CARRIER, carry);
        self.end(CARRIER);
    }

    /// To the end of a verb.
    fn act(&mut self, sid: usize, op: Op) {
        self.sessions[sid].op = op;
        for _ in 0..1_000 {
            if matches!(self.sessions[sid].op, Op::Idle) {
                break;
            }
            self.step_session(sid);
        }
    }

    fn end(&mut self, sid: usize) {
        if self.sessions[sid].tx.is_some() && matches!(self.sessions[sid].op, Op::Idle) {
            let settle = self.commit(sid);
            self.act(sid, settle);
        }
    }

    /// The scan has begun; a row that it comes to, but not as its last.
    fn row_ahead(&mut self, generation: i64) -> Option<Row> {
        for _ in 0..4 {
            self.step_session(SCANNER);
        }
        let track = self.q.tracks().iter().find(|track| track.has_turn() && track.id.generation == generation)?;
        let (id, cursor) = (track.id, track.cursor);
        let rows = self.segments.get(&generation)?.rows.iter();
        let held = |row: &&Row| self.pool.entries.iter().flatten().any(|e| e.state != State::Free && e.job_id == row.job);
        let mut ahead: Vec<&Row> =
            rows.filter(|row| self.track_of(generation, row.lane) == id && row.position > cursor && !held(row)).collect();
        ahead.sort_by_key(|row| row.position);
        ahead.iter().rev().nth(1).map(|row| (*row).clone())
    }

    /// The scan goes on until it has passed the guard of this row.
    fn pass(&mut self, row: &Row) -> bool {
        let partition = partition_of(row.job, PARTITIONS as u32);
        for _ in 0..200 {
            if !matches!(self.sessions[SCANNER].op, Op::Claim(_)) {
                return false;
            }
            self.step_session(SCANNER);
            let part = self.pool.part(partition);
            let Some(entry) = part.find_copy(row.job, row.hop).and_then(|slot| part.get(slot)) else { return false };
            if entry.passed {
                return true;
            }
        }
        false
    }
}
