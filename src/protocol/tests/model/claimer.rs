//! A claimer: plan, take a turn, look at one row a step, give the turn back, append the claim; commit or abort come later.

use std::ops::Bound;

use awa_protocol::attempt::{Entry, EntryRef, InsertRefusal, State, partition_of};
use awa_protocol::lane::Position;
use awa_protocol::queue::{GapFound, GapTurn, NO_KEY, Plan, ScanTurn, TrackId};
use awa_protocol::rebuild::OpenClaim;
use awa_protocol::ring::SegmentState;

use crate::world::{Note, Op, PARTITIONS, Row, Status, Work, World, links};

pub struct Claim {
    want: usize,
    avoid: Vec<TrackId>,
    avoid_gaps: Vec<u64>,
    taken: Vec<(EntryRef, Work)>,
    phase: Phase,
}

enum Phase {
    Plan,
    Begin(Plan),
    Turn(Turn),
    Popped(EntryRef),
    Append,
}

pub enum Turn {
    Scan(Scan),
    Gap(Visit),
}

pub struct Scan {
    turn: ScanTurn,
    until: i64,
    head: i64,
    /// Everything up to here is passed.
    at: Position,
    gaps: Vec<GapFound>,
    taken: usize,
    /// Entries reserved by this scan.
    names: Vec<EntryRef>,
}

pub struct Visit {
    turn: GapTurn,
    until: i64,
    at: Option<Position>,
    names: Vec<EntryRef>,
}

enum Took {
    Yes,
    Passed,
    Full,
}

impl World {
    pub fn start_claim(&mut self, sid: usize) -> Op {
        let want = if self.rng.permille(100) { 1_000 } else { 1 + self.rng.below(5) };
        self.start_claim_of(sid, want)
    }

    pub fn start_claim_of(&mut self, sid: usize, want: usize) -> Op {
        self.begin(sid);
        Op::Claim(Box::new(Claim { want, avoid: Vec::new(), avoid_gaps: Vec::new(), taken: Vec::new(), phase: Phase::Plan }))
    }

    pub fn step_claim(&mut self, sid: usize, mut c: Box<Claim>) -> Op {
        let error = self.profile.error_permille;
        let safe = matches!(c.phase, Phase::Popped(_));
        if !safe && self.rng.permille(error) {
            let turn = if let Phase::Turn(turn) = c.phase { Some(turn) } else { None };
            return self.fail(sid, turn);
        }
        c.phase = match std::mem::replace(&mut c.phase, Phase::Plan) {
            Phase::Plan => self.plan(sid, &c),
            Phase::Begin(plan) => self.start_turn(sid, &mut c, plan),
            Phase::Turn(Turn::Scan(scan)) => self.step_scan(sid, &mut c, scan),
            Phase::Turn(Turn::Gap(visit)) => self.step_visit(sid, &mut c, visit),
            Phase::Popped(name) => self.take_hole(sid, &mut c, name),
            Phase::Append => {
                self.append_claims(sid, &c);
                return Op::Idle;
            }
        };
        Op::Claim(c)
    }

    fn ended_for(&self, sid: usize, xid: u64) -> bool {
        match self.status(xid) {
            Status::Running => false,
            Status::Aborted => true,
            Status::Committed(at) => self.tx(sid).snapshot.is_none_or(|seen| at <= seen),
        }
    }

    fn plan(&mut self, sid: usize, c: &Claim) -> Phase {
        if c.taken.len() >= c.want {
            return Phase::Append;
        }
        let ended: Vec<u64> = self
            .q
            .gaps()
            .iter()
            .map(|gap| gap.xid)
            .filter(|xid| self.ended_for(sid, *xid) && !c.avoid_gaps.contains(xid))
            .collect();
        let plan = self.q.plan(self.now, &ended, &c.avoid);
        self.say(|| format!("s{sid} plan {plan:?}"));
        match plan {
            Plan::Busy | Plan::Nothing { .. } => Phase::Append,
            plan => Phase::Begin(plan),
        }
    }

    fn start_turn(&mut self, sid: usize, c: &mut Claim, plan: Plan) -> Phase {
        match plan {
            Plan::Holes { priority, until } => {
                if self.q.first_hole_key(priority) > until {
                    return Phase::Plan;
                }
                let links = links!(self);
                let Some(global) = self.q.pop_hole(priority, links) else { return Phase::Plan };
                // The stamp is read under the queue's lock: nobody can free a linked hole.
                self.popped += 1;
                Phase::Popped(self.pool.name_of(global))
            }
            Plan::Gap { track, xid, until } => {
                if !self.lock_for_scan(sid, track) {
                    c.avoid.push(track);
                    return Phase::Append;
                }
                match self.q.begin_gap(track, xid, sid as u32) {
                    Some(turn) => {
                        self.say(|| format!("s{sid} begin gap {turn:?}"));
                        Phase::Turn(Turn::Gap(Visit { turn, until, at: None, names: Vec::new() }))
                    }
                    None => Phase::Plan,
                }
            }
            Plan::Scan { track, until } => {
                let head = self.q.find_track(track).map_or(NO_KEY, |t| t.head);
                let turn = if self.lock_for_scan(sid, track) { self.q.begin_scan(track, self.now, sid as u32) } else { None };
                let Some(turn) = turn else {
                    c.avoid.push(track);
                    return Phase::Plan;
                };
                self.say(|| format!("s{sid} begin scan {turn:?}"));
                let (at, gaps, names) = (turn.from, Vec::new(), Vec::new());
                Phase::Turn(Turn::Scan(Scan { turn, until, head, at, gaps, taken: 0, names }))
            }
            Plan::Busy | Plan::Nothing { .. } => Phase::Append,
        }
    }

    fn lock_for_scan(&mut self, sid: usize, track: TrackId) -> bool {
        self.tx_mut(sid).locks.insert(track.generation);
        self.ring.find(track.generation).is_some_and(|segment| segment.state != SegmentState::PruneStarted)
    }

    fn next_row(&self, track: TrackId, after: Position, to: Position) -> Option<&Row> {
        let lane = World::lane_number(track);
        let segment = self.segments.get(&track.generation)?;
        let low = if after == Position::START {
            Bound::Included((lane, Position::START.key, 0))
        } else {
            Bound::Excluded((lane, after.key, after.tid))
        };
        if after >= to {
            return None;
        }
        let (_, row) = segment.index.range((low, Bound::Included((lane, to.key, to.tid)))).next()?;
        segment.rows.get(*row)
    }

    fn step_scan(&mut self, sid: usize, c: &mut Claim, mut scan: Scan) -> Phase {
        let end = Position::at(i64::MAX, u64::MAX);
        let Some(row) = self.next_row(scan.turn.track, scan.at, end).cloned() else {
            return self.end_scan(sid, c, scan, NO_KEY, true);
        };
        let key = row.position.key;
        if key > scan.turn.horizon {
            return self.end_scan(sid, c, scan, key, true);
        }
        if key > scan.until || c.taken.len() >= c.want {
            return self.end_scan(sid, c, scan, key, false);
        }
        let bound = scan.turn.inserters.iter().any(|i| i.xid == row.xmin) && !crate::broken("committed_rows_of_inserters_taken");
        let known = scan.gaps.iter().position(|gap| gap.xid == row.xmin);
        let status = self.status(row.xmin);
        if bound || known.is_some() || status == Status::Running {
            if let Some(known) = known {
                scan.gaps[known].to = row.position;
            } else if !(bound && crate::broken("gap_of_inserter_not_widened")) {
                let inserters = &scan.turn.inserters;
                let new = scan.gaps.iter().filter(|gap| inserters.iter().all(|i| i.xid != gap.xid)).count();
                if !bound && inserters.len() + new + 1 > scan.turn.gap_room {
                    self.stats.gap_room_refused += 1;
                    c.avoid.push(scan.turn.track);
                    return self.end_scan(sid, c, scan, key, false);
                }
                scan.gaps.push(GapFound { xid: row.xmin, from: row.position, to: row.position });
            }
        } else if let Status::Committed(at) = status {
            if self.tx(sid).snapshot.is_some_and(|seen| at > seen) && !crate::broken("unseen_rows_become_gaps") {
                c.avoid.push(scan.turn.track);
                return self.end_scan(sid, c, scan, key, false);
            }
            if self.tx(sid).snapshot.is_some_and(|seen| at > seen) {
                scan.gaps.push(GapFound { xid: row.xmin, from: row.position, to: row.position });
            } else {
                match self.take(sid, c, scan.turn.track, &row, true, &mut scan.names) {
                    Took::Yes => scan.taken += 1,
                    Took::Passed => {}
                    Took::Full => {
                        // Holes may be left: they need no new entry.
                        c.avoid.push(scan.turn.track);
                        return self.end_scan(sid, c, scan, key, false);
                    }
                }
            }
        }
        scan.at = row.position;
        Phase::Turn(Turn::Scan(scan))
    }

    /// `all`: no row up to the horizon is left.
    fn end_scan(&mut self, sid: usize, c: &mut Claim, scan: Scan, next_head: i64, all: bool) -> Phase {
        let mut cursor = scan.at;
        if all && self.rng.permille(500) {
            cursor = cursor.max(Position::at(scan.turn.horizon, u64::MAX));
        }
        self.q.finish_scan(&scan.turn, sid as u32, cursor, next_head, &scan.gaps);
        self.say(|| format!("s{sid} finish scan cursor {cursor:?} head {next_head} gaps {:?}", scan.gaps));
        let head = self.q.find_track(scan.turn.track).map_or(NO_KEY, |t| t.head);
        if scan.taken == 0 && cursor == scan.turn.from && head <= scan.head {
            c.avoid.push(scan.turn.track);
        }
        Phase::Plan
    }

    fn step_visit(&mut self, sid: usize, c: &mut Claim, mut visit: Visit) -> Phase {
        let GapTurn { track, xid, from, to } = visit.turn;
        let before = if from.tid == 0 { Position::at(from.key - 1, u64::MAX) } else { Position::at(from.key, from.tid - 1) };
        let Some(row) = self.next_row(track, visit.at.unwrap_or(before), to).cloned() else {
            self.say(|| format!("s{sid} finish gap {:?}", visit.turn));
            self.q.finish_gap(&visit.turn, sid as u32, to);
            return Phase::Plan;
        };
        if row.position.key > visit.until {
            let at = row.position;
            let before = if at.tid == 0 { Position::at(at.key - 1, u64::MAX) } else { Position::at(at.key, at.tid - 1) };
            self.q.finish_gap(&visit.turn, sid as u32, before);
            return Phase::Plan;
        }
        if row.xmin == xid && self.committed(xid) {
            let enough = c.taken.len() >= c.want;
            if enough || matches!(self.take(sid, c, track, &row, true, &mut visit.names), Took::Full) {
                c.avoid_gaps.push(xid);
                self.give_back(sid, Turn::Gap(visit));
                return Phase::Plan;
            }
        }
        visit.at = Some(row.position);
        Phase::Turn(Turn::Gap(visit))
    }

    /// A turn that ends before its range is through, by choice or by an error. What was passed stays passed: a guard that was
    /// passed may have become a hole already. Reserved entries are given back by the notes.
    pub fn give_back(&mut self, sid: usize, turn: Turn) {
        let abandon = crate::broken("abandon_after_reserving");
        match turn {
            Turn::Scan(scan) if scan.at == scan.turn.from || abandon => {
                scan.names.iter().for_each(|name| self.unreserve(*name));
                self.q.abandon_scan(&scan.turn, sid as u32);
            }
            Turn::Scan(scan) => self.q.finish_scan(&scan.turn, sid as u32, scan.at, scan.at.key, &scan.gaps),
            Turn::Gap(visit) => match visit.at {
                Some(reached) => self.q.finish_gap(&visit.turn, sid as u32, reached),
                None => self.q.abandon_gap(&visit.turn, sid as u32),
            },
        }
        self.say(|| format!("s{sid} gives its turn back"));
    }

    fn unreserve(&mut self, name: EntryRef) {
        if let Some(entry) = self.pool.named(name).copied() {
            self.held.remove(&(entry.job_id, entry.hop));
            self.pool.part(name.partition).free(name.slot);
        }
    }

    /// Reserve first, probe tombstones after.
    fn take(&mut self, sid: usize, c: &mut Claim, track: TrackId, row: &Row, scanned: bool, names: &mut Vec<EntryRef>) -> Took {
        let copy = (row.job, row.hop);
        let partition = partition_of(row.job, PARTITIONS as u32);
        let mut entry = Entry::free();
        entry.job_id = row.job;
        entry.hop = row.hop;
        entry.generation = track.generation;
        entry.key = row.position.key;
        entry.tid = row.position.tid;
        entry.lane = row.lane;
        entry.lease = self.new_lease();
        entry.claim_xid = self.xid(sid);
        entry.claimed_at = self.now;
        entry.attempt = row.attempt;
        entry.state = State::Claimed;
        entry.process = sid as u32;
        let slot = match self.pool.part(partition).insert(entry) {
            Ok(slot) => slot,
            Err(InsertRefusal::Full) => {
                self.stats.pool_full += 1;
                return Took::Full;
            }
            Err(InsertRefusal::Exists(slot)) => {
                // The guard of a cancel that came late, and has not noticed yet: nothing must come back.
                if self.tombstoned(track.generation, copy) {
                    return Took::Passed;
                }
                let mut part = self.pool.part(partition);
                let Some(found) = part.get_mut(slot) else { return Took::Passed };
                let foreign = (found.job_id, found.hop) != copy;
                if found.state != State::Guard || foreign {
                    let text = format!("a scan that comes to {copy:?} for the first time finds {found:?}");
                    self.violation(text);
                }
                found.passed = true;
                self.stats.guards_passed += 1;
                self.say(|| format!("s{sid} passes the guard of {copy:?}"));
                return Took::Passed;
            }
        };
        let name = EntryRef { partition, slot, stamp: self.pool.part(partition).stamp_of(slot) };
        self.note(sid, Note::Claim(name));
        if self.tombstoned(track.generation, copy) {
            self.stats.tombstones_met += 1;
            self.pool.part(partition).free(slot);
            return Took::Passed;
        }
        names.push(name);
        self.check_take(row, track, scanned);
        self.hand_out(sid, c, name, entry);
        Took::Yes
    }

    fn tombstoned(&self, generation: i64, copy: (i64, i32)) -> bool {
        let Some(segment) = self.segments.get(&generation) else { return false };
        segment.tombstone_flag
            && !crate::broken("no_tombstone_probe")
            && segment.tombstones.get(&copy).is_some_and(|xids| xids.iter().any(|xid| self.committed(*xid)))
    }

    fn hand_out(&mut self, sid: usize, c: &mut Claim, name: EntryRef, entry: Entry) {
        let copy = (entry.job_id, entry.hop);
        if let Some(lease) = self.held.insert(copy, entry.lease) {
            self.violation(format!("copy {copy:?} is handed out while lease {lease} runs"));
        }
        self.stats.taken += 1;
        let work = Work { copy, lease: entry.lease, generation: entry.generation, lane: entry.lane, attempt: entry.attempt };
        c.taken.push((name, work));
        self.say(|| format!("s{sid} takes {copy:?} key {} lease {} xid {}", entry.key, entry.lease, entry.claim_xid));
    }

    fn take_hole(&mut self, sid: usize, c: &mut Claim, name: EntryRef) -> Phase {
        self.popped -= 1;
        let xid = self.xid(sid);
        let lease = self.new_lease();
        let snapshot = self.tx(sid).snapshot;
        // It was popped, so it is nobody else's: whoever wants to cancel it must find it linked.
        let Some(entry) = self.pool.named(name).filter(|entry| entry.state == State::Hole) else {
            self.violation(format!(
                "the popped hole {name:?} is {:?}",
                self.pool.entries[name.partition as usize][name.slot as usize]
            ))
        };
        let copy = (entry.job_id, entry.hop);
        let (generation, at) = (entry.generation, (entry.lane, entry.key, entry.tid));
        let row = self.segments.get(&generation).and_then(|s| s.index.get(&at).and_then(|row| s.rows.get(*row))).cloned();
        let Some(row) = row.filter(|row| (row.job, row.hop) == copy) else {
            self.violation(format!("hole {copy:?} has no row"));
        };
        if let (Status::Committed(at), Some(seen)) = (self.status(row.xmin), snapshot)
            && at > seen
        {
            self.make_hole(name);
            return Phase::Append;
        }
        self.tx_mut(sid).locks.insert(generation);
        if let Some(entry) = self.pool.named(name) {
            entry.state = State::Claimed;
            entry.lease = lease;
            entry.claim_xid = xid;
            entry.process = sid as u32;
            let entry = *entry;
            self.note(sid, Note::Claim(name));
            self.check_take(&row, self.track_of(generation, row.lane), true);
            self.hand_out(sid, c, name, entry);
        }
        Phase::Plan
    }

    fn append_claims(&mut self, sid: usize, c: &Claim) {
        let xmin = self.xid(sid);
        for (_, work) in &c.taken {
            let claim = OpenClaim { lease: work.lease, claimed_at: self.now, deadline: 0, heartbeat_timeout: 0 };
            let Some(segment) = self.segments.get_mut(&work.generation) else {
                self.violation(format!("a claim is appended to segment {}, which was pruned", work.generation))
            };
            segment.claims.push((xmin, work.copy, claim));
            // Rows reach a streaming client before the claim commits.
            self.works.push(*work);
        }
        while self.works.len() > 60 && !self.draining {
            let n = self.rng.below(self.works.len());
            self.works.swap_remove(n);
        }
    }
}

/// The gap that this session is visiting.
pub fn visit_of(op: &Op) -> Option<GapTurn> {
    match op {
        Op::Claim(claim) => match &claim.phase {
            Phase::Turn(Turn::Gap(visit)) => Some(visit.turn),
            _ => None,
        },
        Op::Undo { turn: Some(Turn::Gap(visit)), .. } => Some(visit.turn),
        _ => None,
    }
}
