//! The end of the world and after: crash, restart, rebuild; rotation and prune, which only a durable ledger remembers.

use std::collections::HashMap;

use awa_protocol::attempt::{Entry, EntryRef, State, partition_of};
use awa_protocol::lane::{BORN_CLAIMED, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{Existence, GapFound, NO_KEY};
use awa_protocol::rebuild::{Copy_, Fate, OpenClaim, ReadyRow, SegmentFold};
use awa_protocol::ring::{Event, Ring, Rotation, SegmentState};

use crate::world::{PARTITIONS, Pool, QUEUE, Row, SETTINGS, Segment, Session, Status, World};

impl World {
    pub fn rotate(&mut self) -> Option<i64> {
        match self.ring.rotation(self.profile.ring_limit) {
            Rotation::Full => {
                self.stats.ring_full += 1;
                None
            }
            Rotation::Open { generation, slot } => {
                if self.segments.values().any(|segment| segment.slot == slot) {
                    self.violation(format!("slot {slot} is opened while it holds rows"));
                }
                self.segments.insert(generation, Segment { slot, ..Segment::default() });
                self.append_ledger(generation, slot, Event::Opened);
                self.say(|| format!("rotate: segment {generation} in slot {slot}"));
                Some(generation)
            }
        }
    }

    fn locked(&self, generation: i64) -> bool {
        let sessions = self.sessions.iter().filter_map(|s| s.tx.as_ref());
        sessions.chain(&self.prepared).any(|tx| tx.locks.contains(&generation))
    }

    /// One stage of a prune: proof and mark; rows; evidence and the end. Locks are conditional.
    pub fn prune(&mut self) {
        let order: Vec<_> = self.ring.prune_order().copied().collect();
        if let Some(candidate) = order.into_iter().find(|segment| self.may_prune(segment)) {
            self.prune_segment(candidate);
        }
    }

    /// Any drained one, not only the oldest.
    fn may_prune(&mut self, segment: &awa_protocol::ring::Segment) -> bool {
        if self.building.is_some() || self.locked(segment.generation) {
            return false;
        }
        segment.state == SegmentState::PruneStarted || self.fold(segment.generation).0.is_drained()
    }

    fn prune_segment(&mut self, candidate: awa_protocol::ring::Segment) {
        let generation = candidate.generation;
        if candidate.state != SegmentState::PruneStarted {
            let (fold, _) = self.fold(generation);
            if !fold.is_drained() {
                return;
            }
            let rows = self.segments.get(&generation).map_or(&[][..], |s| &s.rows[..]);
            if let Some(row) = rows.iter().find(|row| self.committed(row.xmin) && !self.closed((row.job, row.hop))) {
                self.violation(format!("prune of segment {generation} destroys ({}, {})", row.job, row.hop));
            }
            self.append_ledger(generation, candidate.slot, Event::PruneStarted);
            self.poisoned.insert(generation);
            let scanned = self.q.tracks().iter().any(|t| t.id.generation == generation && t.has_turn());
            if scanned || self.q.gaps().iter().any(|gap| gap.track.generation == generation && gap.has_turn()) {
                self.violation(format!("segment {generation} is scanned and nobody holds its lock"));
            }
            self.q.forget_generation(generation);
            self.say(|| format!("prune of {generation} started"));
            return;
        }
        match self.segments.get_mut(&generation) {
            Some(segment) if !segment.rows.is_empty() => {
                segment.rows.clear();
                segment.index.clear();
            }
            _ => {
                self.segments.remove(&generation);
                self.append_ledger(generation, candidate.slot, Event::Pruned);
                self.stats.prunes += 1;
                self.say(|| format!("segment {generation} pruned"));
            }
        }
    }

    /// Shared memory and everything unflushed are gone; prepared transactions stay.
    pub fn crash(&mut self) {
        self.stats.crashes += 1;
        self.say(|| "CRASH".to_owned());
        let prepared: Vec<_> = self.prepared.iter().flat_map(|tx| tx.xids.iter().map(|(x, _)| *x)).collect();
        for xid in 0..self.xids.len() {
            match self.xids[xid] {
                Status::Running if !prepared.contains(&(xid as u64)) => self.xids[xid] = Status::Aborted,
                Status::Committed(at) if at > self.flushed => {
                    self.stats.claims_lost += 1;
                    self.xids[xid] = Status::Aborted;
                }
                _ => {}
            }
        }
        self.commits = self.flushed;
        for session in &mut self.sessions {
            *session = Session::default();
        }
        if self.rng.permille(300) {
            self.now -= 2_000;
        }
        self.begin_build();
    }

    /// A new frontier: a fresh segment for producers first, then the older ones are read.
    pub fn begin_build(&mut self) {
        self.q.clear();
        self.q.install(QUEUE, b"model", Existence::Live, SETTINGS);
        self.pool.reset();
        self.popped = 0;
        self.cursors.clear();
        self.last_by_xid.clear();
        self.held.clear();
        self.deadlines.clear();
        if !crate::broken("nonce_is_kept") {
            self.nonce += 1;
        }
        self.lease_counter = 0;
        self.segments.values_mut().for_each(|s| s.tombstone_flag = false);
        match Ring::fold(&self.ledger) {
            Ok(ring) if ring == self.ring => {}
            other => self.violation(format!("the ledger folds to {other:?}, not to {:?}", self.ring)),
        }
        let fresh = self.rotate();
        self.building = Some(fresh);
    }

    /// The fold of one segment, with the fate of each committed row.
    pub fn fold(&self, generation: i64) -> (SegmentFold, Vec<(Row, ReadyRow, Fate)>) {
        let mut fold = SegmentFold::new(generation);
        let Some(segment) = self.segments.get(&generation) else { return (fold, Vec::new()) };
        for closure in segment.closures.iter().filter(|c| self.committed(c.xmin)) {
            fold.closure(closure.copy.0, closure.copy.1, closure.outcome, closure.unclaimed);
        }
        for (_, copy, claim) in segment.claims.iter().filter(|(xmin, ..)| self.committed(*xmin)) {
            fold.claim(copy.0, copy.1, *claim);
        }
        let mut rows = Vec::new();
        for row in segment.rows.iter().filter(|row| self.committed(row.xmin)) {
            let ready = ReadyRow {
                job_id: row.job,
                hop: row.hop,
                lane: row.lane,
                position: row.position,
                attempt: row.attempt,
                max_attempts: 5,
            };
            let fate = fold.first_pass(&ready);
            rows.push((row.clone(), ready, fate));
        }
        if let Some(twice) = fold.closed_twice.first() {
            self.violation(format!("copy {:?} is closed twice in the log", twice.copy));
        }
        (fold, rows)
    }

    pub fn readable(&self) -> Vec<i64> {
        let live = self.ring.segments.iter().filter(|s| s.state != SegmentState::PruneStarted).map(|s| s.generation);
        let live: Vec<i64> = live.collect();
        if let Some(generation) = live.iter().find(|g| self.poisoned.contains(g)) {
            self.violation(format!("segment {generation} is read while it is truncated"));
        }
        live
    }

    pub fn finish_build(&mut self) {
        let Some(fresh) = self.building else { return };
        let mut unfit = false;
        for generation in self.readable().into_iter().filter(|g| Some(*g) != fresh) {
            unfit |= !self.restore(generation);
        }
        if unfit {
            // "Refuse with the setting needed": the operator raises it and starts again.
            self.stats.pool_full += 1;
            let per = self.pool.per * 2;
            self.sessions.iter_mut().for_each(|s| *s = Session::default());
            for xid in 0..self.xids.len() {
                let prepared = self.prepared.iter().any(|tx| tx.owns(xid as u64));
                if self.xids[xid] == Status::Running && !prepared {
                    self.xids[xid] = Status::Aborted;
                }
            }
            self.pool = Pool::new(per);
            self.begin_build();
            return;
        }
        self.building = None;
        self.say(|| "built".to_owned());
        self.check_log();
        self.check_full();
    }

    fn restore(&mut self, generation: i64) -> bool {
        let (mut fold, rows) = self.fold(generation);
        let holes: Vec<bool> = rows.iter().map(|(_, ready, fate)| fold.second_pass(ready, fate)).collect();
        self.check_fold(&fold, &rows, &holes);
        // Rows of prepared transactions, which the fold does not see: below the cursor they are gaps, above it they count for head and last.
        let unfinished: Vec<Row> = match self.segments.get(&generation) {
            Some(s) => s.rows.iter().filter(|row| self.status(row.xmin) == Status::Running).cloned().collect(),
            None => return true,
        };
        let mut lanes: Vec<i32> = fold.tracks.keys().copied().chain(unfinished.iter().map(|row| row.lane)).collect();
        lanes.sort_unstable();
        lanes.dedup();
        let open = self.ring.open().is_some_and(|segment| segment.generation == generation);
        for lane in lanes {
            let (cursor, mut head, mut last) = fold.standing(lane);
            let waiting: Vec<&Row> = unfinished.iter().filter(|row| row.lane == lane).collect();
            for row in &waiting {
                last = last.max(row.position.key);
                if row.position > cursor {
                    head = head.min(row.position.key);
                }
            }
            if head == NO_KEY && waiting.is_empty() && !open {
                continue;
            }
            let id = fold.track_id(lane);
            if self.q.restore_track(id, cursor, head, last).is_err() {
                // Known limit: after a crash a queue may need more tracks than producers were ever allowed to fill.
                self.stats.tracks_unfit += 1;
                panic!("LIMIT the tracks of the log do not fit");
            }
            for row in waiting.iter().filter(|row| row.position <= cursor) {
                let found = GapFound { xid: row.xmin, from: row.position, to: row.position };
                if !self.q.restore_gap(id, found) {
                    self.violation("a gap could not be restored".to_owned());
                }
            }
        }
        for ((row, _, fate), hole) in rows.iter().zip(holes) {
            let open = if let Fate::Open(claim) = fate { Some(*claim) } else { None };
            if (hole || open.is_some()) && !self.restore_entry(generation, row, open) {
                return false;
            }
        }
        if let Some(segment) = self.segments.get_mut(&generation) {
            segment.tombstone_flag = !segment.tombstones.is_empty();
        }
        true
    }

    fn restore_entry(&mut self, generation: i64, row: &Row, open: Option<OpenClaim>) -> bool {
        let mut entry = Entry::free();
        (entry.job_id, entry.hop) = (row.job, row.hop);
        entry.generation = generation;
        (entry.key, entry.tid) = (row.position.key, row.position.tid);
        entry.lane = row.lane;
        entry.attempt = row.attempt;
        entry.state = if open.is_some() { State::Claimed } else { State::Hole };
        entry.lease = open.map_or(0, |claim| claim.lease);
        let partition = partition_of(row.job, PARTITIONS as u32);
        let Ok(slot) = self.pool.part(partition).insert(entry) else { return false };
        if let Some(claim) = open {
            self.held.insert((row.job, row.hop), claim.lease);
        } else {
            let stamp = self.pool.part(partition).stamp_of(slot);
            self.make_hole(EntryRef { partition, slot, stamp });
        }
        true
    }

    /// The fold against a plain reading of the same rows.
    fn check_fold(&self, fold: &SegmentFold, rows: &[(Row, ReadyRow, Fate)], holes: &[bool]) {
        let truth = self.open_claims();
        let mut cursors: HashMap<i32, Position> = HashMap::new();
        let segment = &self.segments[&fold.generation];
        for (row, _, fate) in rows {
            let copy = (row.job, row.hop);
            let mut closures = segment.closures.iter().filter(|c| c.copy == copy && self.committed(c.xmin));
            let closure = closures.clone().find(|c| !matches!(c.outcome, Outcome::Redriven | Outcome::Removed));
            let later = closures.find(|c| matches!(c.outcome, Outcome::Redriven | Outcome::Removed));
            let right = match fate {
                Fate::Closed(outcome) => closure.is_some() && later.or(closure).is_some_and(|c| c.outcome == *outcome),
                Fate::Open(claim) => closure.is_none() && truth.get(&copy) == Some(&claim.lease),
                Fate::Ready => closure.is_none() && !truth.contains_key(&copy),
            };
            if !right {
                self.violation(format!("the fold says {fate:?} of {copy:?}"));
            }
            let scanned = row.position.key != BORN_CLAIMED;
            if scanned && (closure.is_some_and(|c| !c.unclaimed) || truth.contains_key(&copy)) {
                let cursor = cursors.entry(row.lane).or_insert(Position::START);
                *cursor = (*cursor).max(row.position);
            }
        }
        for ((row, _, fate), hole) in rows.iter().zip(holes) {
            let cursor = cursors.get(&row.lane).copied().unwrap_or(Position::START);
            let (found, head, last) = fold.standing(row.lane);
            if found != cursor || last < row.position.key {
                self.violation(format!("lane {} stands at {found:?}, last {last}; claimed up to {cursor:?}", row.lane));
            }
            let ready = *fate == Fate::Ready;
            if *hole != (ready && row.position <= cursor) || (ready && row.position > cursor && head > row.position.key) {
                self.violation(format!("({}, {}) hole {hole}, cursor {cursor:?}, head {head}", row.job, row.hop));
            }
        }
    }

    /// Claims without an exit, read from the whole log.
    pub fn open_claims(&self) -> HashMap<Copy_, i64> {
        let mut open = HashMap::new();
        for generation in self.readable() {
            let Some(segment) = self.segments.get(&generation) else { continue };
            for (_, copy, claim) in segment.claims.iter().filter(|(xmin, ..)| self.committed(*xmin)) {
                if !self.closed(*copy) && open.insert(*copy, claim.lease).is_some() {
                    self.violation(format!("{copy:?} has two committed claims"));
                }
            }
        }
        open
    }
}
