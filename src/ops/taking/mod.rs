//! Taking jobs from one queue: the steps of a claim. Each step holds at most one turn, reserves an in-flight entry for each row before
//! the cursor passes it, and notes how far it has got, so that an error at any point ends the turn exactly there.
//!
//! Locks: RowExclusive on ready_entries of each segment visited, to the end of the transaction. The queue's lock covers taking and
//! returning turns, never a scan.

mod gaps;
mod holes;
mod rows;

use std::rc::Rc;

use awa_protocol::attempt::{Entry, EntryRef, State};
use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::limits::GAPS_PER_SCAN;
use awa_protocol::queue::{GapFound, Plan, QueueFrontier, TrackId};
use awa_protocol::ring::SegmentState;
use pgrx::pg_sys::Datum;

use crate::error::{Result, reserve};
use crate::frontier::notes::{self, Held, Note, Turn};
use crate::frontier::{Asked, Frontier, SegmentInfo, wait_event};
use crate::ops::handle::Queue;
use crate::pg::points::reach;
use crate::pg::rel::{Index, Lock, Rel};
use crate::pg::scan::{IndexScan, RawRow, RowState, TidFetch, has_ended, visible_to_caller};
use crate::pg::xact;
use crate::store::ready;

use rows::{Met, copy_row, has_ended_for_good, head_of, insert_or_pass};
pub use rows::{is_row_of, is_tombstoned};

/// A segment opened by this call.
pub struct OpenSegment {
    pub info: SegmentInfo,
    pub rel: Rel,
    pub index: Index,
}

/// One job taken, with what the worker is given.
pub struct Taken {
    pub generation: i64,
    pub head: ready::Head,
    pub lease: i64,
    pub enqueued_at: Option<Datum>,
    pub tags: Option<Datum>,
    pub metadata: Option<Datum>,
    pub errors: Option<Datum>,
    pub args: Option<Datum>,
}

#[derive(Clone, Copy)]
pub struct Terms {
    pub now: i64,
    /// 0: none.
    pub deadline_at: i64,
    pub heartbeat_timeout: i64,
}

pub struct Taker<'f> {
    pub frontier: &'f Frontier,
    pub queue: Queue,
    pub terms: Terms,
    pub limit: usize,
    pub taken: Vec<Taken>,
    /// Next lease and end of those drawn so far.
    leases: (i64, i64),
    opened: Vec<Rc<OpenSegment>>,
    /// Tracks and gaps on which this call could not get on.
    avoid: Vec<TrackId>,
    avoid_gaps: Vec<u64>,
    xid: Option<u64>,
    pub pool_is_full: bool,
    /// Holes whose rows the caller's snapshot does not show: given back at the end of the call.
    set_aside: Vec<EntryRef>,
    snapshot_bound: bool,
}

enum Reserved {
    Yes,
    /// Somebody has this copy, or it is cancelled.
    No,
    PoolFull,
}

/// How often a claim waits for the turn of another before it returns what it has.
const TURN_WAITS: usize = 50;
const TURN_WAIT_MS: i64 = 10;

impl<'f> Taker<'f> {
    pub fn new(frontier: &'f Frontier, queue: Queue, terms: Terms, limit: usize) -> Self {
        Self {
            frontier,
            queue,
            terms,
            limit,
            taken: Vec::new(),
            leases: (0, 0),
            opened: Vec::new(),
            avoid: Vec::new(),
            avoid_gaps: Vec::new(),
            xid: None,
            pool_is_full: false,
            set_aside: Vec::new(),
            snapshot_bound: xact::isolation_uses_snapshot(),
        }
    }

    pub fn run(&mut self) -> Result<()> {
        self.take()?;
        for name in std::mem::take(&mut self.set_aside) {
            notes::retract_claim(name);
            notes::give_back(self.frontier, name, self.queue.place);
        }
        Ok(())
    }

    fn take(&mut self) -> Result<()> {
        let mut waits = 0;
        while self.taken.len() < self.limit {
            let ended = self.ended_gaps();
            let plan = self
                .with_queue(|queue, this| this.queue.is_usable(queue).then(|| queue.plan(this.terms.now, &ended, &this.avoid)));
            if plan.is_none() {
                self.frontier.check_current()?;
            }
            match plan.unwrap_or(Plan::Nothing { next: i64::MAX }) {
                Plan::Holes { priority, until } => self.take_holes(priority, until)?,
                Plan::Gap { track, xid, until } => self.visit_gap(track, xid, until)?,
                Plan::Scan { track, until } => self.scan(track, until)?,
                Plan::Nothing { .. } => break,
                Plan::Busy => {
                    waits += 1;
                    if !self.taken.is_empty() || waits > TURN_WAITS || !self.wait_for_turn(&ended) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn with_queue<R>(&self, body: impl FnOnce(&mut QueueFrontier, &Self) -> R) -> R {
        body(&mut self.frontier.queue(self.queue.place), self)
    }

    /// True if something has changed and a new plan is worth while.
    fn wait_for_turn(&self, ended: &[u64]) -> bool {
        let occupied = self.with_queue(|queue, this| {
            queue.tracks().iter().any(|track| track.has_turn() && !this.avoid.contains(&track.id))
                || queue.gaps().iter().any(|gap| gap.has_turn() && ended.contains(&gap.xid))
        });
        if !occupied {
            return self.with_queue(|queue, this| !matches!(queue.plan(this.terms.now, ended, &this.avoid), Plan::Busy));
        }
        let sleeper = self.frontier.turn_sleeper(self.queue.place);
        sleeper.prepare();
        reach("claim.waits_for_turn");
        let still = self.with_queue(|queue, this| matches!(queue.plan(this.terms.now, ended, &this.avoid), Plan::Busy));
        if still {
            sleeper.timed_sleep(TURN_WAIT_MS, wait_event());
        }
        sleeper.cancel();
        true
    }

    /// Transactions of gaps that have ended and whose rows this caller may see.
    fn ended_gaps(&self) -> Vec<u64> {
        let mut xids: Vec<u64> = Vec::new();
        let waiting = self.with_queue(|queue, _| queue.gap_xids());
        for xid in waiting {
            if has_ended(xid) && !self.avoid_gaps.contains(&xid) && (!self.snapshot_bound || visible_to_caller(xid)) {
                xids.push(xid);
            }
        }
        xids
    }

    pub fn open(&mut self, generation: i64) -> Result<Option<Rc<OpenSegment>>> {
        if let Some(found) = self.opened.iter().find(|segment| segment.info.generation == generation) {
            return Ok(Some(Rc::clone(found)));
        }
        let Some(info) = self.frontier.segment(generation) else { return Ok(None) };
        reach("claim.segment_read");
        let rel = ready::open_for_write(&info)?;
        self.frontier.check_current()?;
        // The lock is ours now: the segment must still be what we took it for.
        let usable = |now: SegmentInfo| now.slot == info.slot && now.state != SegmentState::PruneStarted;
        if !self.frontier.segment(generation).is_some_and(usable) {
            return Ok(None);
        }
        let index = ready::open_index(&rel, &info)?;
        let segment = Rc::new(OpenSegment { info, rel, index });
        self.opened.push(Rc::clone(&segment));
        Ok(Some(segment))
    }

    fn lane_of(&self, track: TrackId) -> i32 {
        Lane { queue_id: self.queue.queue_id, priority: track.priority, sub: track.sub }.number()
    }

    // ---- scan ----------------------------------------------------------------------------------------------------------

    fn scan(&mut self, track: TrackId, until: i64) -> Result<()> {
        let Some(segment) = self.open(track.generation)? else {
            self.avoid.push(track);
            return Ok(());
        };
        notes::reserve(self.frontier, 0)?;
        reach("claim.segment_locked");
        let begun = self.with_queue(|queue, this| {
            if !this.queue.is_usable(queue) {
                return None;
            }
            let head = queue.find_track(track).map(|t| t.head);
            let turn = queue.begin_scan(track, this.terms.now, xact::my_proc())?;
            let (from, horizon, room) = (turn.from, turn.horizon, turn.gap_room - turn.inserters.len());
            let appending: heapless::Vec<u64, GAPS_PER_SCAN> = turn.inserters.iter().map(|found| found.xid).collect();
            notes::hold(Held {
                queue: this.queue.place,
                turn: Turn::Scan { turn, cursor: from, next_head: None, gaps: heapless::Vec::new() },
            });
            Some((from, horizon, room, appending, head))
        });
        let Some((from, horizon, room, appending, old_head)) = begun else {
            self.ask_if_gaps_are_full(track);
            self.avoid.push(track);
            return Ok(());
        };
        let before = self.taken.len();
        reach("claim.turn_taken");
        let reached = self.scan_rows(&segment, track, from, horizon.min(until), room, &appending)?;
        notes::end_turn(self.frontier);
        reach("claim.turn_ended");
        let moved = reached.cursor > from || old_head.is_none_or(|head| reached.next_head != head);
        if reached.stuck || (!moved && self.taken.len() == before) {
            self.ask_if_gaps_are_full(track);
            self.avoid.push(track);
        }
        Ok(())
    }

    /// A lane that can note no further unfinished transaction goes on in the next segment.
    fn ask_if_gaps_are_full(&self, track: TrackId) {
        let full = self.with_queue(|queue, _| queue.gaps_are_full());
        if full {
            self.frontier.ask_for_rotation(track.generation, Asked::GapsFull);
        }
    }

    fn scan_rows(
        &mut self,
        segment: &OpenSegment,
        track: TrackId,
        from: Position,
        last_key: i64,
        room: usize,
        appending: &[u64],
    ) -> Result<Reached> {
        let mut scan = IndexScan::begin(&segment.rel, &segment.index, self.lane_of(track), from.key)?;
        scan.seek(self.lane_of(track), from.key, Some(from.tid).filter(|_| from != Position::START));
        let mut reached = Reached { cursor: from, next_head: i64::MAX, stuck: false };
        while let Some((key, row)) = scan.next() {
            let position = Position::at(key, row.tid());
            if key > last_key || self.taken.len() >= self.limit {
                reached.next_head = key;
                break;
            }
            let passed = match row.state() {
                RowState::Dead => true,
                RowState::Own(xid) | RowState::InProgress(xid) => note_gap(xid, position, room),
                RowState::Committed if Self::is_left_to_gap(&row, appending) => note_gap(row.xmin_full(), position, room),
                // The caller's snapshot does not show this row: others will take it, this call goes no further here.
                RowState::Committed if self.snapshot_bound && !row.visible_to_caller() => false,
                RowState::Committed => match self.reserve(segment, &row, track.sub)? {
                    Reserved::Yes => {
                        notes::publish_last();
                        true
                    }
                    Reserved::No => true,
                    Reserved::PoolFull => {
                        self.pool_is_full = true;
                        false
                    }
                },
            };
            if !passed {
                reached.next_head = key;
                reached.stuck = true;
                break;
            }
            reached.cursor = position;
            notes::with_turn(|turn| {
                if let Turn::Scan { cursor, .. } = turn {
                    *cursor = position;
                }
            });
        }
        notes::with_turn(|turn| {
            if let Turn::Scan { next_head, .. } = turn {
                *next_head = Some(reached.next_head);
            }
        });
        Ok(reached)
    }

    /// Rows of a transaction that this scan knows as a gap stay with the gap, even if it has committed since.
    fn is_left_to_gap(row: &RawRow<'_>, appending: &[u64]) -> bool {
        (!appending.is_empty() && appending.contains(&row.xmin_full())) || is_gap_of_turn(row)
    }

    // ---- reservation ---------------------------------------------------------------------------------------------------

    /// Leases of a batch follow each other as long as nothing comes between.
    fn lease(&mut self) -> i64 {
        let (mut next, mut end) = self.leases;
        if next == end {
            let count = self.limit.saturating_sub(self.taken.len()).max(1) as i64;
            next = self.frontier.draw_leases(count as u64);
            end = next + count;
        }
        self.leases = (next + 1, end);
        next
    }

    fn xid(&mut self) -> u64 {
        *self.xid.get_or_insert_with(xact::current_xid)
    }

    /// Reserves an entry for a committed row, then looks for a tombstone: in this order, no cancel can slip between.
    fn reserve(&mut self, segment: &OpenSegment, row: &RawRow<'_>, sub: SubLane) -> Result<Reserved> {
        if notes::promised() == 0 {
            return Ok(Reserved::PoolFull);
        }
        notes::reserve(self.frontier, 1)?;
        reserve(&mut self.taken, 1)?;
        row.read_to(ready::COLUMNS);
        let head = ready::head(row);
        let lease = self.lease();
        let entry = Entry {
            job_id: head.job_id,
            hop: head.hop,
            generation: segment.info.generation,
            lane: head.lane,
            key: head.key,
            tid: head.tid,
            lease,
            claim_xid: self.xid(),
            claimed_at: self.terms.now,
            deadline: self.terms.deadline_at,
            heartbeat_at: self.terms.now,
            heartbeat_timeout: self.terms.heartbeat_timeout,
            attempt: head.attempt + 1,
            max_attempts: head.max_attempts,
            process: xact::my_proc(),
            queue: self.queue.place,
            state: State::Claimed,
            ..Entry::free()
        };
        let partition = self.frontier.partition_of(head.job_id);
        let mut guard_is_first = None;
        let name = loop {
            match self.frontier.with_partition(partition, |entries| insert_or_pass(entries, partition, entry, guard_is_first)) {
                Met::Mine(name) => break name,
                Met::Full => return Ok(Reserved::PoolFull),
                Met::Passed => return Ok(Reserved::No),
                // Of a row that had ended before, this guard is the mistake of a cancel that came late: nothing must come back.
                Met::Guard(_) if self.frontier.has_tombstones(segment.info.slot) && has_ended_for_good(&segment.info, &head)? => {
                    return Ok(Reserved::No);
                }
                Met::Guard(name) => guard_is_first = Some(name),
            }
        };
        notes::use_promised();
        notes::push(Note::Claimed { entry: name, queue: self.queue.place, queue_id: self.queue.queue_id, sub, published: false });
        reach("claim.reserved");
        if self.frontier.has_tombstones(segment.info.slot) && is_tombstoned(&segment.info, &head)? {
            self.frontier.with_partition(partition, |entries| entries.free(name.slot));
            notes::retract_last();
            notes::promise(self.queue.place, 1);
            return Ok(Reserved::No);
        }
        self.taken.push(copy_row(row, segment.info.generation, head, lease));
        Ok(Reserved::Yes)
    }
}

struct Reached {
    cursor: Position,
    next_head: i64,
    /// No room for another gap: nothing behind this row can be reached for now.
    stuck: bool,
}

/// Adds a row to the gap of its transaction. False: no room for another gap.
fn note_gap(xid: u64, position: Position, room: usize) -> bool {
    notes::with_turn(|turn| {
        let Turn::Scan { turn, gaps, .. } = turn else { return false };
        if let Some(gap) = gaps.iter_mut().find(|gap| gap.xid == xid) {
            gap.to = gap.to.max(position);
            return true;
        }
        if let Some(found) = turn.inserters.iter_mut().find(|found| found.xid == xid) {
            found.from = found.from.min(position);
            found.to = found.to.max(position);
            return true;
        }
        gaps.len() < room && gaps.push(GapFound { xid, from: position, to: position }).is_ok()
    })
    .unwrap_or(false)
}

fn is_gap_of_turn(row: &RawRow<'_>) -> bool {
    notes::with_turn(|turn| match turn {
        Turn::Scan { gaps, .. } => !gaps.is_empty() && gaps.iter().any(|gap| gap.xid == row.xmin_full()),
        Turn::Gap { .. } => false,
    })
    .unwrap_or(false)
}
