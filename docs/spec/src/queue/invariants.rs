//! What must hold in every state, and what must follow from those in which everybody has ended what he had begun.

use awa_protocol::attempt::{Entry, State};
use awa_protocol::lane::BORN_CLAIMED;
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{GapTurn, NO_KEY, Plan};
use awa_protocol::ring::{Event, SegmentState};

use super::finisher::Finish;
use super::log::{Copy, Row, Status};
use super::world::{Config, Note, Op, Verb, Work, World};
use crate::properties::{
    CLOSED_TWICE, LOST, NEVER_CLAIMED, NEVER_PRUNED, NEVER_SLEEPS, OPEN_TRUNCATED, REACHED_TWICE, REBUILD_DIFFERS, SKIPPED,
    TWO_ATTEMPTS,
};

impl World {
    /// The first property that this state violates.
    pub fn violated(&self, config: &Config) -> Option<&'static str> {
        self.violation
            .or_else(|| self.judge_exits())
            .or_else(|| self.judge_truncation())
            .or_else(|| self.judge_attempts())
            .or_else(|| self.judge_rows())
            .or_else(|| self.judge_jobs())
            .or_else(|| if self.is_quiet() { self.judge_rest(config) } else { None })
    }

    fn committed_exits(&self, copy: Copy) -> impl Iterator<Item = Outcome> {
        self.exits.iter().filter(move |(of, xid, _)| *of == copy && self.log.committed(*xid)).map(|(_, _, outcome)| *outcome)
    }

    fn judge_exits(&self) -> Option<&'static str> {
        let twice = self.exits.iter().any(|(copy, ..)| self.committed_exits(*copy).count() > 1);
        twice.then_some(CLOSED_TWICE)
    }

    /// From the commit of `prune_started` nothing in it is open, or may become so.
    fn judge_truncation(&self) -> Option<&'static str> {
        let started = self.log.ledger.iter().filter(|(xmin, row)| row.event == Event::PruneStarted && self.log.committed(*xmin));
        let doomed = started.filter_map(|(_, row)| self.log.segment(row.generation));
        let open = |row: &Row| match self.status(row.xmin) {
            Status::Running => true,
            Status::Committed { .. } => !self.closed(row.copy()),
            Status::Aborted => false,
        };
        doomed.flat_map(|segment| &segment.rows).any(open).then_some(OPEN_TRUNCATED)
    }

    fn judge_attempts(&self) -> Option<&'static str> {
        let alive = |(copy, _): &&(Copy, i64)| !self.closed(*copy);
        let mut jobs: Vec<i64> = self.held.iter().filter(alive).map(|((job, _), _)| *job).collect();
        jobs.sort_unstable();
        jobs.windows(2).any(|pair| pair.first() == pair.last()).then_some(TWO_ATTEMPTS)
    }

    /// Every committed copy that is open lies in a segment that will be read, and leads somewhere.
    fn judge_jobs(&self) -> Option<&'static str> {
        let has_copy = |copy: Copy| self.copies.iter().any(|(of, xid)| *of == copy && self.log.committed(*xid));
        if self.acknowledged.iter().any(|job| !has_copy((*job, 0))) {
            return Some(LOST);
        }
        for (copy, _) in self.copies.iter().filter(|(_, xid)| self.log.committed(*xid)) {
            match self.committed_exits(*copy).next() {
                Some(outcome) if outcome.is_terminal() => {}
                Some(_) if has_copy((copy.0, copy.1 + 1)) => {}
                Some(_) => return Some(LOST),
                None => {
                    let readable = |generation| {
                        let segment = self.ring.find(generation);
                        segment.is_none_or(|segment| segment.state != SegmentState::PruneStarted)
                    };
                    if !self.row_of(*copy).is_some_and(|(generation, _)| readable(generation)) {
                        return Some(LOST);
                    }
                }
            }
        }
        None
    }

    fn visits(&self) -> impl Iterator<Item = GapTurn> {
        self.sessions.iter().filter_map(|session| match &session.op {
            Op::Claim(claim) => claim.turn().and_then(|turn| turn.visit()),
            Op::Undo { turn: Some(turn) } => turn.visit(),
            _ => None,
        })
    }

    /// Every open copy can be reached in exactly one way; no closed one in any.
    fn judge_rows(&self) -> Option<&'static str> {
        let live = self.ring.segments.iter().filter(|segment| segment.state != SegmentState::PruneStarted);
        let segments = live.filter_map(|segment| self.log.segment(segment.generation));
        let rows = segments.flat_map(|segment| segment.rows.iter().map(|row| (segment.generation, row)));
        rows.filter(|(_, row)| self.status(row.xmin) != Status::Aborted)
            .find_map(|(generation, row)| self.judge_row(generation, row))
    }

    fn judge_row(&self, generation: i64, row: &Row) -> Option<&'static str> {
        let id = World::track_of(generation, row.lane);
        let track = self.q.find_track(id);
        let above = track.is_some_and(|track| row.position > track.cursor);
        let within = |from, to| row.position >= from && row.position <= to;
        let in_gap = self.q.gaps().iter().any(|gap| gap.track == id && gap.xid == row.xmin && within(gap.from, gap.to));
        let visited = self.visits().any(|turn| turn.track == id && turn.xid == row.xmin && within(turn.from, turn.to));
        // Between one row and the next only the scan itself knows where it is.
        if (above && track.is_some_and(|track| track.has_turn())) || visited {
            return None;
        }
        let entry = self.pool.all().find(|entry| (entry.job_id, entry.hop) == row.copy());
        if row.position.key == BORN_CLAIMED {
            let nobodys = entry.is_none() && !self.closed(row.copy());
            return (above || in_gap || nobodys).then_some(if nobodys { SKIPPED } else { REACHED_TWICE });
        }
        if self.closed(row.copy()) {
            return (!self.has_tombstone(generation, row.copy(), None) && (above || in_gap)).then_some(REACHED_TWICE);
        }
        let by_entry = entry.is_some_and(|entry| entry.state != State::Guard || self.comes_back(entry));
        match u8::from(by_entry) + u8::from(above) + u8::from(in_gap) {
            0 => Some(SKIPPED),
            1 => (above && track.is_some_and(|track| track.head > row.position.key)).then_some(SKIPPED),
            _ => Some(REACHED_TWICE),
        }
    }

    /// A guard that a scan has passed, or that was a hole.
    fn comes_back(&self, guard: &Entry) -> bool {
        let was_hole = |note: &Note| match note {
            Note::Guard { name, was_hole, .. } => *was_hole && self.pool.entries.get(name.slot as usize) == Some(guard),
            _ => false,
        };
        guard.passed || self.sessions.iter().filter_map(|session| session.tx.as_ref()).flat_map(|tx| &tx.notes).any(was_hole)
    }

    // ---- where everybody rests -----------------------------------------------------------------------------------------

    pub fn is_quiet(&self) -> bool {
        self.sessions.iter().all(|session| session.tx.is_none() && session.op == Op::Idle)
    }

    fn judge_rest(&self, config: &Config) -> Option<&'static str> {
        let mut built = self.clone();
        built.rebuild();
        let same = built.held == self.held && built.violation.is_none() && built.judge_rows().is_none();
        if !same || !self.entries_agree() {
            return Some(REBUILD_DIFFERS);
        }
        self.clone().drain(config)
    }

    /// Everything that runs was handed out, with this lease; there is nothing else but holes.
    fn entries_agree(&self) -> bool {
        let agrees = |entry: &Entry| match entry.state {
            State::Claimed => self.lease_of((entry.job_id, entry.hop)) == Some(entry.lease),
            State::Hole => true,
            State::Guard | State::Free => false,
        };
        let running = self.pool.all().filter(|entry| entry.state == State::Claimed).count();
        self.pool.all().all(agrees) && running == self.held.len()
    }

    /// The weakest fair future: nobody else comes, one worker takes what is due and finishes it, maintenance goes on.
    fn drain(mut self, config: &Config) -> Option<&'static str> {
        let sid = self.helper();
        self.now += 1_000;
        for _ in 0..12 {
            for (copy, lease) in self.held.clone() {
                self.sessions[sid].op = Op::Finish(Finish::new(Work { copy, lease }, Outcome::Completed));
                self.run(config, sid);
                self.run_verb(config, sid, Verb::Commit);
            }
            self.run_verb(config, sid, Verb::Claim(9));
            self.run_verb(config, sid, Verb::Commit);
            if self.held.is_empty() {
                break;
            }
        }
        let mut open = self.copies.iter().filter(|(copy, xid)| self.log.committed(*xid) && !self.closed(*copy));
        if self.violation.is_none() && open.next().is_some() {
            return Some(NEVER_CLAIMED);
        }
        if self.violation.is_none() && self.q.plan(self.now, &[], &[]) != (Plan::Nothing { next: NO_KEY }) {
            return Some(NEVER_SLEEPS);
        }
        for _ in 0..16 {
            if self.prune_choices(config, sid) == 0 {
                break;
            }
            self.run_verb(config, sid, Verb::Prune);
            self.run_verb(config, sid, Verb::Commit);
        }
        let sealed = self.ring.segments.iter().any(|segment| segment.state != SegmentState::Open);
        self.violation.or(sealed.then_some(NEVER_PRUNED))
    }

    /// A verb from its begin to its end, with nobody between.
    pub fn run_verb(&mut self, config: &Config, sid: usize, verb: Verb) {
        self.start(config, sid, verb, 0);
        self.run(config, sid);
    }

    fn run(&mut self, config: &Config, sid: usize) {
        for _ in 0..200 {
            if self.sessions[sid].op == Op::Idle {
                return;
            }
            if !self.may_step(config, sid) {
                break;
            }
            self.step(config, sid);
        }
        self.violate(NEVER_CLAIMED);
    }
}
