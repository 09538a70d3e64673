//! A claimer: plan, take a turn, look at one row a step, give the turn back, append the claim. The commit comes some time later.
//!
//! Planning and taking the turn are one step but in configurations with `stale_plans`: `begin_scan` and `begin_gap` ask again under the
//! same lock, so a plan that is out of date is refused and nothing else, which those show. Not here: snapshots (REPEATABLE READ), savepoints, several priorities; `src/protocol/tests/model` has them.

use awa_protocol::attempt::{Entry, EntryRef, InsertRefusal, State};
use awa_protocol::lane::{Position, SubLane};
use awa_protocol::queue::{GapFound, GapTurn, NO_KEY, Plan, ScanTurn, TrackId};
use awa_protocol::ring::SegmentState;

use super::Step;
use super::log::{Row, Status, Xid};
use super::world::{Config, Mode, Note, Op, Work, World};
use crate::actions::Action;
use crate::properties::{OPEN_TRUNCATED, REACHED_TWICE, SKIPPED, STALE_FINISH, TOO_EARLY, TWO_ATTEMPTS};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Claim {
    want: usize,
    avoid: Vec<TrackId>,
    avoid_gaps: Vec<Xid>,
    taken: Vec<(i64, Work)>,
    phase: Phase,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Plan,
    Begin(Plan),
    Turn(Turn),
    /// An entry is reserved for this row: was it closed without being claimed?
    Probe(Turn, Row, EntryRef),
    Verify(EntryRef),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Turn {
    Scan(Scan),
    Gap(Visit),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Scan {
    turn: ScanTurn,
    until: i64,
    head: i64,
    /// Everything up to here is passed.
    at: Position,
    gaps: Vec<GapFound>,
    taken: usize,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Visit {
    pub turn: GapTurn,
    at: Option<Position>,
}

enum Reserved {
    Yes(EntryRef),
    /// Somebody has this copy, or it is cancelled.
    No,
    PoolFull,
}

impl Claim {
    pub fn new(want: usize) -> Self {
        Self { want, avoid: Vec::new(), avoid_gaps: Vec::new(), taken: Vec::new(), phase: Phase::Plan }
    }

    /// What the abort has to give back.
    pub fn into_turn(self) -> Option<Turn> {
        match self.phase {
            Phase::Turn(turn) | Phase::Probe(turn, ..) => Some(turn),
            Phase::Plan | Phase::Begin(_) | Phase::Verify(_) => None,
        }
    }

    pub fn turn(&self) -> Option<&Turn> {
        match &self.phase {
            Phase::Turn(turn) | Phase::Probe(turn, ..) => Some(turn),
            Phase::Plan | Phase::Begin(_) | Phase::Verify(_) => None,
        }
    }
}

impl World {
    fn plan(&self, c: &Claim) -> Plan {
        if c.taken.len() >= c.want {
            return Plan::Nothing { next: NO_KEY };
        }
        let has_ended = |xid: Xid| self.status(xid) != Status::Running && !c.avoid_gaps.contains(&xid);
        let ended: Vec<Xid> = self.q.gaps().iter().map(|gap| gap.xid).filter(|xid| has_ended(*xid)).collect();
        self.q.plan(self.now, &ended, &c.avoid)
    }

    /// It waits for the lock of a segment that is being pruned.
    pub fn may_claim(&self, config: &Config, sid: usize, c: &Claim) -> bool {
        match &c.phase {
            Phase::Plan if config.stale_plans => true,
            Phase::Plan => self.may_begin(sid, self.plan(c)),
            Phase::Begin(plan) => self.may_begin(sid, *plan),
            Phase::Verify(name) => {
                self.pool.entries.get(name.slot as usize).is_none_or(|entry| self.may_write(sid, entry.generation))
            }
            _ => true,
        }
    }

    fn may_begin(&self, sid: usize, plan: Plan) -> bool {
        match plan {
            Plan::Scan { track, .. } | Plan::Gap { track, .. } => self.may_write(sid, track.generation),
            Plan::Holes { .. } | Plan::Busy | Plan::Nothing { .. } => true,
        }
    }

    pub fn step_claim(&mut self, config: &Config, sid: usize, mut c: Claim) -> Step {
        let phase = std::mem::replace(&mut c.phase, Phase::Plan);
        let (action, phase) = match phase {
            Phase::Plan => match self.plan(&c) {
                Plan::Busy | Plan::Nothing { .. } => {
                    self.append_claims(config, sid, &c);
                    return (Action::AppendClaim, Op::Idle);
                }
                plan if config.stale_plans => (Action::PlanClaim, Phase::Begin(plan)),
                plan => self.begin_turn(sid, &mut c, plan),
            },
            Phase::Begin(plan) => self.begin_turn(sid, &mut c, plan),
            Phase::Turn(Turn::Scan(scan)) => self.step_scan(config, sid, &mut c, scan),
            Phase::Turn(Turn::Gap(visit)) => self.step_visit(config, sid, &mut c, visit),
            Phase::Probe(turn, row, name) => (Action::ProbeTombstone, self.probe(config, sid, &mut c, turn, row, name)),
            Phase::Verify(name) => (Action::VerifyHole, self.verify_hole(sid, &mut c, name)),
        };
        c.phase = phase;
        (action, Op::Claim(c))
    }

    fn begin_turn(&mut self, sid: usize, c: &mut Claim, plan: Plan) -> (Action, Phase) {
        match plan {
            Plan::Busy | Plan::Nothing { .. } => (Action::BeginScan, Phase::Plan),
            Plan::Holes { priority, .. } => {
                let Some(slot) = self.pop_hole(priority) else { return (Action::PopHole, Phase::Plan) };
                let name = self.pool.name_of(slot);
                let (lease, xid) = (self.next_lease(sid), self.xid(sid));
                let Some(entry) = self.pool.named(name).filter(|entry| entry.state == State::Hole) else {
                    self.violate(REACHED_TWICE);
                    return (Action::PopHole, Phase::Plan);
                };
                entry.state = State::Claimed;
                entry.lease = lease;
                entry.claim_xid = xid;
                entry.deadline = 1;
                entry.process = sid as u32;
                let copy = (entry.job_id, entry.hop);
                self.note(sid, Note::Claim { name, copy, published: true });
                (Action::PopHole, Phase::Verify(name))
            }
            Plan::Gap { track, xid } => {
                if !self.lock_to_scan(sid, track) {
                    c.avoid_gaps.push(xid);
                    return (Action::BeginGap, Phase::Plan);
                }
                let phase = match self.q.begin_gap(track, xid, sid as u32) {
                    Some(turn) => Phase::Turn(Turn::Gap(Visit { turn, at: None })),
                    None => Phase::Plan,
                };
                (Action::BeginGap, phase)
            }
            Plan::Scan { track, until } => {
                let head = self.q.find_track(track).map_or(NO_KEY, |found| found.head);
                let turn = if self.lock_to_scan(sid, track) { self.q.begin_scan(track, self.now, sid as u32) } else { None };
                let Some(turn) = turn else {
                    c.avoid.push(track);
                    return (Action::BeginScan, Phase::Plan);
                };
                let at = turn.from;
                let scan = Scan { turn, until, head, at, gaps: Vec::new(), taken: 0 };
                (Action::BeginScan, Phase::Turn(Turn::Scan(scan)))
            }
        }
    }

    fn lock_to_scan(&mut self, sid: usize, track: TrackId) -> bool {
        self.lock(sid, track.generation, Mode::Write);
        self.ring.find(track.generation).is_some_and(|segment| segment.state != SegmentState::PruneStarted)
    }

    fn next_row(&self, track: TrackId, after: Position, to: Position) -> Option<Row> {
        let lane = World::lane_of(track);
        let rows = &self.log.segment(track.generation)?.rows;
        rows.iter().find(|row| row.lane == lane && row.position > after && row.position <= to).copied()
    }

    fn step_scan(&mut self, config: &Config, sid: usize, c: &mut Claim, mut scan: Scan) -> (Action, Phase) {
        let Some(row) = self.next_row(scan.turn.track, scan.at, Position::at(i64::MAX, u64::MAX)) else {
            return (Action::FinishScan, self.finish_scan(sid, c, scan, NO_KEY, false));
        };
        let key = row.position.key;
        if key > scan.turn.horizon.min(scan.until) || c.taken.len() >= c.want {
            return (Action::FinishScan, self.finish_scan(sid, c, scan, key, false));
        }
        let is_of_gap = scan.gaps.iter().any(|gap| gap.xid == row.xmin)
            || scan.turn.inserters.iter().any(|found| found.xid == row.xmin)
                && !config.broken("committed_rows_of_inserters_taken");
        let status = self.status(row.xmin);
        let passed = match status {
            Status::Aborted => true,
            Status::Running if config.broken("unfinished_rows_taken") => {
                return self.reserve_row(config, sid, c, Turn::Scan(scan), row);
            }
            Status::Running => note_gap(&mut scan, &row),
            Status::Committed { .. } if is_of_gap => note_gap(&mut scan, &row),
            Status::Committed { .. } => return self.reserve_row(config, sid, c, Turn::Scan(scan), row),
        };
        if !passed {
            return (Action::FinishScan, self.finish_scan(sid, c, scan, key, true));
        }
        scan.at = row.position;
        (Action::ScanRow, Phase::Turn(Turn::Scan(scan)))
    }

    fn finish_scan(&mut self, sid: usize, c: &mut Claim, scan: Scan, next_head: i64, stuck: bool) -> Phase {
        self.q.finish_scan(&scan.turn, sid as u32, scan.at, next_head, &scan.gaps);
        let head = self.q.find_track(scan.turn.track).map_or(NO_KEY, |track| track.head);
        let moved = scan.at > scan.turn.from || head != scan.head;
        if stuck || (!moved && scan.taken == 0) {
            c.avoid.push(scan.turn.track);
        }
        Phase::Plan
    }

    fn step_visit(&mut self, config: &Config, sid: usize, c: &mut Claim, mut visit: Visit) -> (Action, Phase) {
        let GapTurn { track, xid, from, to } = visit.turn;
        let Some(row) = self.next_row(track, visit.at.unwrap_or(just_before(from)), to) else {
            self.q.finish_gap(&visit.turn, sid as u32, to);
            return (Action::FinishGap, Phase::Plan);
        };
        if row.xmin == xid && self.log.committed(xid) {
            if c.taken.len() >= c.want {
                c.avoid_gaps.push(xid);
                self.end_turn(config, sid, Turn::Gap(visit));
                return (Action::FinishGap, Phase::Plan);
            }
            return self.reserve_row(config, sid, c, Turn::Gap(visit), row);
        }
        visit.at = Some(row.position);
        (Action::VisitRow, Phase::Turn(Turn::Gap(visit)))
    }

    /// An entry is reserved first, the tombstone is looked for after it: no cancel can slip between.
    fn reserve_row(&mut self, config: &Config, sid: usize, c: &mut Claim, turn: Turn, row: Row) -> (Action, Phase) {
        let action = if matches!(turn, Turn::Scan(_)) { Action::ScanRow } else { Action::VisitRow };
        match self.reserve(sid, &turn, &row) {
            Reserved::Yes(name) => {
                let generation = track_of(&turn).generation;
                if config.broken("no_tombstone_probe") || !self.flags.contains(&generation) && !may_be_flagged(config) {
                    return (action, self.hand_out_row(sid, c, turn, row, name));
                }
                (action, Phase::Probe(turn, row, name))
            }
            Reserved::No => (action, Phase::Turn(passed(turn, &row))),
            Reserved::PoolFull => match turn {
                Turn::Scan(scan) => (Action::FinishScan, self.finish_scan(sid, c, scan, row.position.key, true)),
                Turn::Gap(visit) => {
                    c.avoid_gaps.push(visit.turn.xid);
                    self.end_turn(config, sid, Turn::Gap(visit));
                    (Action::FinishGap, Phase::Plan)
                }
            },
        }
    }

    fn reserve(&mut self, sid: usize, turn: &Turn, row: &Row) -> Reserved {
        let entry = Entry {
            job_id: row.job,
            hop: row.hop,
            generation: track_of(turn).generation,
            lane: row.lane,
            key: row.position.key,
            tid: row.position.tid,
            lease: self.next_lease(sid),
            claim_xid: self.xid(sid),
            deadline: 1,
            attempt: row.attempt + 1,
            process: sid as u32,
            state: State::Claimed,
            ..Entry::free()
        };
        match self.pool.part().insert(entry) {
            Ok(slot) => {
                let name = self.pool.name_of(slot);
                self.note(sid, Note::Claim { name, copy: row.copy(), published: false });
                Reserved::Yes(name)
            }
            Err(InsertRefusal::Full) => Reserved::PoolFull,
            Err(InsertRefusal::Exists(slot)) => {
                match self.pool.part().get_mut(slot).filter(|found| found.state == State::Guard) {
                    Some(guard) => guard.passed = true,
                    // A scan comes to a row once.
                    None => self.violate(REACHED_TWICE),
                }
                Reserved::No
            }
        }
    }

    fn probe(&mut self, config: &Config, sid: usize, c: &mut Claim, turn: Turn, row: Row, name: EntryRef) -> Phase {
        let generation = track_of(&turn).generation;
        let own = Some(self.xid(sid));
        let seen = self.flags.contains(&generation) && self.has_tombstone(generation, row.copy(), own);
        if seen && !config.broken("no_tombstone_probe") {
            self.pool.part().free(name.slot);
            self.tx(sid).notes.pop();
            return Phase::Turn(passed(turn, &row));
        }
        self.hand_out_row(sid, c, turn, row, name)
    }

    fn hand_out_row(&mut self, sid: usize, c: &mut Claim, turn: Turn, row: Row, name: EntryRef) -> Phase {
        if let Some(Note::Claim { published, .. }) = self.tx(sid).notes.last_mut() {
            *published = true;
        }
        self.hand_out(c, &row, track_of(&turn).generation, name);
        let mut turn = passed(turn, &row);
        if let Turn::Scan(scan) = &mut turn {
            scan.taken += 1;
        }
        Phase::Turn(turn)
    }

    fn hand_out(&mut self, c: &mut Claim, row: &Row, generation: i64, name: EntryRef) {
        let lease = self.pool.named(name).map_or(0, |entry| entry.lease);
        let copy = row.copy();
        let is_due = World::track_of(generation, row.lane).sub == SubLane::Immediate || row.run_at <= self.now;
        if !self.log.committed(row.xmin) || !is_due {
            self.violate(TOO_EARLY);
        }
        // One of an aborted claim whose callbacks are on their way, or of a copy that has ended, is no longer alive.
        let alive = self.held.iter().any(|((job, hop), _)| *job == row.job && !self.closed((*job, *hop)));
        let ending = self.exits.iter().any(|(of, xid, _)| *of == copy && self.status(*xid) != Status::Aborted);
        if alive || ending {
            self.violate(TWO_ATTEMPTS);
        }
        // Whoever has the old receipt could end the new attempt.
        if self.works.iter().any(|work| work.lease == lease) {
            self.violate(STALE_FINISH);
        }
        self.hold(copy, lease);
        c.taken.push((generation, Work { copy, lease }));
    }

    /// A hole is only as good as its row.
    fn verify_hole(&mut self, sid: usize, c: &mut Claim, name: EntryRef) -> Phase {
        let Some(entry) = self.pool.named(name).copied() else {
            self.violate(REACHED_TWICE);
            return Phase::Plan;
        };
        let (copy, generation) = ((entry.job_id, entry.hop), entry.generation);
        self.lock(sid, generation, Mode::Write);
        let own = Some(self.xid(sid));
        let is_dead = self.flags.contains(&generation) && self.has_tombstone(generation, copy, own);
        match self.row_of(copy).filter(|_| !is_dead) {
            Some((_, row)) => self.hand_out(c, &row, generation, name),
            None => {
                self.pool.part().free(name.slot);
                self.tx(sid).notes.retain(|note| !matches!(note, Note::Claim { name: of, .. } if *of == name));
                if !is_dead && !self.closed(copy) {
                    self.violate(SKIPPED);
                }
            }
        }
        Phase::Plan
    }

    fn append_claims(&mut self, config: &Config, sid: usize, c: &Claim) {
        let xmin = self.xid(sid);
        for (generation, work) in &c.taken {
            if !self.log.append_claim(*generation, xmin, work.copy, work.lease) {
                self.violate(OPEN_TRUNCATED);
            }
            if config.broken("claim_marks_the_row") {
                self.mark_row(work.copy);
            }
            // Rows may reach a streaming client before the claim commits.
            self.works.push(*work);
            self.works.sort_unstable();
        }
    }

    /// As queues of mutable rows do.
    pub fn mark_row(&mut self, copy: super::log::Copy) {
        for row in self.log.segments.iter_mut().flat_map(|segment| &mut segment.rows).filter(|row| row.copy() == copy) {
            row.attempt += 1;
        }
    }

    /// A turn ends before its range is through, by choice or by an error. What was passed stays passed: a guard that was passed may have
    /// become a hole already.
    pub fn end_turn(&mut self, config: &Config, sid: usize, turn: Turn) {
        if config.broken("turn_is_kept") {
            return;
        }
        match turn {
            Turn::Scan(scan) if config.broken("cursor_put_back_on_abort") => {
                self.q.finish_scan(&scan.turn, sid as u32, scan.at, scan.at.key, &scan.gaps);
                let _ = self.q.restore_track(scan.turn.track, Position::START, Position::START.key, scan.turn.horizon);
            }
            Turn::Scan(scan) => self.q.finish_scan(&scan.turn, sid as u32, scan.at, scan.at.key, &scan.gaps),
            Turn::Gap(visit) => self.q.finish_gap(&visit.turn, sid as u32, visit.at.unwrap_or(just_before(visit.turn.from))),
        }
    }
}

fn just_before(position: Position) -> Position {
    match position.tid.checked_sub(1) {
        Some(tid) => Position::at(position.key, tid),
        None => Position::at(position.key.saturating_sub(1), u64::MAX),
    }
}

fn track_of(turn: &Turn) -> TrackId {
    match turn {
        Turn::Scan(scan) => scan.turn.track,
        Turn::Gap(visit) => visit.turn.track,
    }
}

/// Does anybody in this configuration write tombstones? Else the probe is no step of its own.
fn may_be_flagged(config: &Config) -> bool {
    use super::world::Verb;
    config.sessions.iter().flat_map(|script| script.iter()).any(|verb| matches!(verb, Verb::Cancel(_) | Verb::Carry))
}

fn passed(mut turn: Turn, row: &Row) -> Turn {
    match &mut turn {
        Turn::Scan(scan) => scan.at = row.position,
        Turn::Gap(visit) => visit.at = Some(row.position),
    }
    turn
}

/// Adds a row to the gap of its transaction. False: no room for another gap.
fn note_gap(scan: &mut Scan, row: &Row) -> bool {
    let (xid, position) = (row.xmin, row.position);
    if let Some(gap) = scan.gaps.iter_mut().find(|gap| gap.xid == xid) {
        gap.to = gap.to.max(position);
        return true;
    }
    let room = scan.turn.gap_room.saturating_sub(scan.turn.inserters.len());
    if let Some(found) = scan.turn.inserters.iter_mut().find(|found| found.xid == xid) {
        found.from = found.from.min(position);
        found.to = found.to.max(position);
        return true;
    }
    if scan.gaps.len() >= room {
        return false;
    }
    scan.gaps.push(GapFound { xid, from: position, to: position });
    true
}

impl Turn {
    pub fn visit(&self) -> Option<GapTurn> {
        match self {
            Turn::Gap(visit) => Some(visit.turn),
            Turn::Scan(_) => None,
        }
    }
}
