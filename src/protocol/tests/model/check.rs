//! What must hold after each step, now and then, and when everybody has gone home.

use std::collections::{BTreeSet, HashMap};

use awa_protocol::attempt::{Entry, State};
use awa_protocol::lane::{BORN_CLAIMED, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{GapTurn, NO_KEY, Plan, TrackId};
use awa_protocol::rebuild::{Copy_, Fate};

use crate::claimer::visit_of;
use crate::world::{Op, PARTITIONS, Row, Status, Work, World};

impl World {
    /// Cheap: after every step.
    pub fn check_step(&mut self) {
        for n in 0..self.q.tracks().len() {
            let (id, cursor) = (self.q.tracks()[n].id, self.q.tracks()[n].cursor);
            let before = self.cursors.insert((id.generation, World::lane_number(id)), cursor);
            if before.is_some_and(|before| cursor < before) {
                self.violation(format!("the cursor of {id:?} went from {before:?} to {cursor:?}"));
            }
        }
        let gaps = self.q.gaps();
        self.stats.gaps_max = self.stats.gaps_max.max(gaps.len());
        for (n, gap) in gaps.iter().enumerate() {
            let cursor = self.q.find_track(gap.track).map(|track| track.cursor);
            if gap.from > gap.to || cursor.is_none_or(|cursor| gap.to > cursor) {
                self.violation(format!("{gap:?} against cursor {cursor:?}"));
            }
            if self.steps.is_multiple_of(8) && gaps[..n].iter().any(|other| other.track == gap.track && other.xid == gap.xid) {
                self.violation(format!("two gaps of one transaction in one track: {gap:?}"));
            }
        }
    }

    /// The oracle of each hand-out.
    pub fn check_take(&mut self, row: &Row, track: TrackId, ordered: bool) {
        let copy = (row.job, row.hop);
        if !self.committed(row.xmin) {
            self.violation(format!("{copy:?} is taken, its transaction {} is {:?}", row.xmin, self.status(row.xmin)));
        }
        if self.closed(copy) {
            self.violation(format!("{copy:?} is taken after its end"));
        }
        let exits = self.exits.get(&copy).into_iter().flatten();
        if exits.into_iter().any(|(xid, _)| self.status(*xid) == Status::Running) {
            self.violation(format!("{copy:?} is taken while an exit of it is in progress"));
        }
        if track.sub == SubLane::Scheduled && row.run_at > self.max_now {
            self.violation(format!("{copy:?} is taken at {} and due at {}", self.now, row.run_at));
        }
        if self.profile.ordered {
            self.check_order(row, track, ordered);
        }
    }

    fn check_order(&mut self, row: &Row, track: TrackId, scanned: bool) {
        let last = self.last_by_xid.insert((track.generation, row.lane, row.xmin), row.position.key);
        if last.is_some_and(|last| last > row.position.key) {
            self.violation(format!("({}, {}) of transaction {} comes after a later row of it", row.job, row.hop, row.xmin));
        }
        if !scanned {
            return;
        }
        let Some(segment) = self.segments.get(&track.generation) else { return };
        // Rows of one key are due at the same moment, whatever their places.
        for (_, n) in segment.index.range((row.lane, i64::MIN, 0)..(row.lane, row.position.key, 0)) {
            let other = &segment.rows[*n];
            let copy = (other.job, other.hop);
            if self.committed(other.xmin) && !self.closed(copy) && !self.held.contains_key(&copy) {
                self.violation(format!("({}, {}) is taken before {copy:?}, which is ahead of it", row.job, row.hop));
            }
        }
    }

    /// Every open copy can be reached in exactly one way; no closed copy can be reached at all.
    pub fn check_full(&mut self) {
        for n in 0..PARTITIONS {
            if let Err(text) = self.pool.part(n as u32).check() {
                self.violation(text.to_owned());
            }
        }
        let holes = self.pool.all().filter(|e| e.state == State::Hole).count();
        let popped = self.popped;
        if holes > self.q.hole_count() as usize + popped || self.q.hole_count() as usize > holes {
            self.violation(format!("{holes} holes, {} linked, {popped} just popped", self.q.hole_count()));
        }
        if self.building.is_some() {
            return;
        }
        let entries: HashMap<Copy_, Entry> = self.pool.all().map(|e| ((e.job_id, e.hop), *e)).collect();
        let visits: Vec<GapTurn> = self.sessions.iter().filter_map(|s| visit_of(&s.op)).collect();
        for generation in self.readable() {
            for row in self.segments.get(&generation).map_or(&[][..], |s| &s.rows[..]) {
                if self.status(row.xmin) != Status::Aborted {
                    self.check_row(generation, row, entries.get(&(row.job, row.hop)), &visits);
                }
            }
        }
    }

    fn check_row(&self, generation: i64, row: &Row, entry: Option<&Entry>, visits: &[GapTurn]) {
        let copy = (row.job, row.hop);
        let id = self.track_of(generation, row.lane);
        let track = self.q.find_track(id);
        let above = track.is_some_and(|track| row.position > track.cursor);
        let within = |from, to| row.position >= from && row.position <= to;
        let in_gap = self.q.gaps().iter().any(|gap| gap.track == id && gap.xid == row.xmin && within(gap.from, gap.to));
        let visited = visits.iter().any(|turn| turn.track == id && turn.xid == row.xmin && within(turn.from, turn.to));
        if (above && track.is_some_and(|track| track.has_turn())) || visited {
            return;
        }
        if row.position.key == BORN_CLAIMED {
            // Never offered: its entry is all there is, from the moment it is appended.
            if above || in_gap || (entry.is_none() && !self.closed(copy)) {
                self.violation(format!("{copy:?} was born claimed: above {above}, gap {in_gap}, {entry:?}"));
            }
            return;
        }
        if self.closed(copy) {
            let tombstone = self.segments[&generation].tombstones.get(&copy);
            let dead = tombstone.is_some_and(|xids| xids.iter().any(|xid| self.committed(*xid)));
            if !dead && (above || in_gap) {
                self.violation(format!("{copy:?} has ended and will be met again: above {above}, gap {in_gap}"));
            }
            return;
        }
        let by_entry = entry.is_some_and(|entry| entry.state != State::Guard || entry.passed);
        let ways = usize::from(by_entry) + usize::from(above) + usize::from(in_gap);
        if ways != 1 {
            self.violation(format!(
                "{copy:?} xid {} key {} can be reached in {ways} ways: {entry:?}, above {above}, gap {in_gap}, {track:?}",
                row.xmin, row.position.key
            ));
        }
        if above && track.is_some_and(|track| track.head > row.position.key) {
            self.violation(format!("{copy:?} with key {} is hidden by the head of {track:?}", row.position.key));
        }
    }

    /// The log, folded, against what the frontier and the oracle say.
    pub fn check_log(&mut self) {
        let mut ready = 0;
        for generation in self.readable() {
            let (_, rows) = self.fold(generation);
            for (row, _, fate) in rows {
                let copy = (row.job, row.hop);
                let held = self.held.get(&copy).copied();
                let right = match fate {
                    Fate::Open(claim) => held == Some(claim.lease),
                    Fate::Ready | Fate::Closed(_) => held.is_none(),
                };
                let ended = matches!(fate, Fate::Closed(_)) == self.closed(copy);
                if !right || !ended {
                    self.violation(format!("{copy:?} is {fate:?} in the log, held {held:?}, closed {}", self.closed(copy)));
                }
                ready += usize::from(fate == Fate::Ready);
            }
        }
        let running = self.pool.all().filter(|e| e.state == State::Claimed).count();
        if running != self.held.len()
            || self.pool.all().any(|e| e.state == State::Claimed && self.held.get(&(e.job_id, e.hop)) != Some(&e.lease))
        {
            self.violation(format!("{running} entries run, the log has {} open attempts, {ready} ready", self.held.len()));
        }
    }

    /// Everybody ends what he has begun.
    pub fn quiesce(&mut self) {
        self.profile.error_permille = 0;
        for _ in 0..2_000_000u32 {
            let busy: Vec<usize> = (0..self.sessions.len()).filter(|s| !matches!(self.sessions[*s].op, Op::Idle)).collect();
            if busy.is_empty() {
                break;
            }
            let sid = busy[self.rng.below(busy.len())];
            self.step_session(sid);
            self.check_step();
            if self.building.is_some() {
                self.finish_build();
            }
        }
        for sid in 0..self.sessions.len() {
            if !matches!(self.sessions[sid].op, Op::Idle) {
                self.violation(format!("session {sid} does not come to an end"));
            }
            if self.sessions[sid].tx.is_some() {
                let commit = self.profile.ordered || self.rng.permille(600);
                self.sessions[sid].op = if commit { self.commit(sid) } else { self.rollback(sid, 0, None) };
                self.run_op(sid);
            }
        }
        while self.building.is_some() {
            self.finish_build();
        }
        while !self.prepared.is_empty() {
            self.resolve_prepared();
        }
        self.check_full();
        self.check_log();
    }

    fn run_op(&mut self, sid: usize) {
        for _ in 0..1_000_000u32 {
            if matches!(self.sessions[sid].op, Op::Idle) {
                return;
            }
            self.step_session(sid);
            self.check_step();
        }
        self.violation(format!("session {sid} does not come to an end"));
    }

    /// One claimer takes and completes everything. At the end no committed job is open.
    pub fn drain(&mut self) {
        self.now = self.now.max(self.max_now) + 1_000_000_000;
        self.max_now = self.now;
        self.profile.repeatable_read_permille = 0;
        self.draining = true;
        let mut left = BTreeSet::new();
        for generation in self.readable() {
            let rows = self.segments.get(&generation).map_or(&[][..], |s| &s.rows[..]);
            left.extend(rows.iter().filter(|r| self.committed(r.xmin) && !self.closed((r.job, r.hop))).map(|r| (r.job, r.hop)));
        }
        let running: Vec<Entry> = self.pool.all().filter(|e| e.state == State::Claimed).copied().collect();
        self.works = running
            .iter()
            .map(|e| Work { copy: (e.job_id, e.hop), lease: e.lease, generation: e.generation, lane: e.lane, attempt: e.attempt })
            .collect();
        loop {
            for work in std::mem::take(&mut self.works) {
                self.stats.drained += 1;
                if !left.remove(&work.copy) {
                    self.violation(format!("{:?} is drained twice", work.copy));
                }
                self.sessions[0].op = self.finish(0, work, Outcome::Completed);
                self.run_op(0);
                if !self.closed_by(0, work.copy) {
                    self.violation(format!("{:?} with lease {} cannot be completed", work.copy, work.lease));
                }
                self.sessions[0].op = self.commit(0);
                self.run_op(0);
            }
            self.sessions[0].op = self.start_claim(0);
            self.run_op(0);
            self.sessions[0].op = self.commit(0);
            self.run_op(0);
            if self.works.is_empty() {
                break;
            }
        }
        if let Some(copy) = left.first() {
            self.violation(format!(
                "{} jobs are never handed out, {copy:?} among them; plan: {:?}",
                left.len(),
                self.q.plan(self.now, &[], &[])
            ));
        }
        // Nothing is left, and the frontier knows it: a claimer would sleep, not spin.
        let plan = self.q.plan(self.now, &[], &[]);
        if plan != (Plan::Nothing { next: NO_KEY }) {
            self.violation(format!("everything is done and the plan is still {plan:?}"));
        }
        self.check_full();
    }

    fn closed_by(&self, sid: usize, copy: Copy_) -> bool {
        let tx = self.tx(sid);
        self.exits.get(&copy).is_some_and(|exits| exits.iter().any(|(xid, _)| tx.owns(*xid)))
    }
}
