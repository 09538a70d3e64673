//! Makes the frontier from the log: on first use after a start, and when an operator asks for it.
//!
//! Locks: AccessShare on the tables of every live segment. Only one session builds; the others wait for it, interruptibly.
//! What the log says: closed copies are gone, claimed ones are open attempts with their lease, the rest is ready. A cursor stands at
//! the highest claimed row of its track; unclaimed rows below it are holes, rows of unfinished transactions below it are gaps.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use awa_protocol::attempt::{Entry, EntryRef, State};
use awa_protocol::lane::{Lane, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{Counts, Existence, GapFound};
use awa_protocol::rebuild::{Fate, OpenClaim, ReadyRow, SegmentFold};
use awa_protocol::ring::SegmentState;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::{Datum, Oid};

use super::shared::{STATE_BITS, STATE_BUILDING, STATE_EMPTY, STATE_READY};
use super::{Frontier, PARTITIONS, Reserve, SegmentInfo, notes};
use crate::error::{Error, Result, out_of_memory, reserve};
use crate::pg::points::{Fault, fails, reach};
use crate::pg::rel::{self, Lock, Rel};
use crate::pg::scan::{HeapScan, RawRow, RowState, top_of};
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::evidence::{self, ClaimTerms, Reader};
use crate::store::{deferred, finished, instance, ledger, queues, ready, segments};

thread_local! {
    /// The build that this session has begun and not ended.
    static BUILDING: Cell<Option<Frontier>> = const { Cell::new(None) };
    static ROWS_READ: Cell<i64> = const { Cell::new(0) };
}

/// Builds the frontier unless it is there; gives the state word of a ready frontier.
pub fn ensure(frontier: &Frontier) -> Result<u64> {
    let mut lock = None;
    loop {
        let word = frontier.state().load(Ordering::Acquire);
        match word & ((1 << STATE_BITS) - 1) {
            STATE_READY => return Ok(word),
            // The lock first: who voids the frontier must not meet a build that has begun and cannot be seen to end.
            STATE_EMPTY if lock.is_none() => lock = Some(Rel::open(builders_lock()?, Lock::AccessShare)?),
            STATE_EMPTY => {
                let epoch = word >> STATE_BITS;
                let building = (epoch << STATE_BITS) | STATE_BUILDING;
                BUILDING.set(Some(*frontier));
                if frontier.state().compare_exchange(word, building, Ordering::AcqRel, Ordering::Acquire).is_err() {
                    BUILDING.set(None);
                    continue;
                }
                build(frontier)?;
                return Ok(publish(frontier, epoch + 1));
            }
            _ => wait_for_builder(frontier),
        }
    }
}

/// Whoever builds holds AccessShare on this table to the end of the transaction; whoever voids the frontier, AccessExclusive.
pub fn builders_lock() -> Result<Oid> {
    rel::relation_oid("awa", "restoring").ok_or_else(|| {
        Error::new(Code::ERRCODE_UNDEFINED_TABLE, "relation \"awa.restoring\" does not exist")
            .hint("Run CREATE EXTENSION awa_queue in this database.")
    })
}

/// Transaction callback: what memory says is void; the next verb builds it anew. The caller's locks have kept everybody out.
pub fn void(frontier: &Frontier) {
    let word = frontier.state().load(Ordering::Acquire);
    let epoch = (word >> STATE_BITS) + 1;
    frontier.state().store((epoch << STATE_BITS) | STATE_EMPTY, Ordering::Release);
    for place in 0..frontier.queue_slots() {
        frontier.work_sleeper(place).broadcast();
    }
}

pub fn is_ready(word: u64) -> bool {
    word & ((1 << STATE_BITS) - 1) == STATE_READY
}

fn publish(frontier: &Frontier, epoch: u64) -> u64 {
    let ready = (epoch << STATE_BITS) | STATE_READY;
    frontier.state().store(ready, Ordering::Release);
    BUILDING.set(None);
    frontier.shared.builds_sleeper(frontier.database).broadcast();
    // Queues may have other places now: whoever sleeps for one looks again.
    for place in 0..frontier.queue_slots() {
        frontier.work_sleeper(place).broadcast();
    }
    ready
}

fn wait_for_builder(frontier: &Frontier) {
    let sleeper = frontier.shared.builds_sleeper(frontier.database);
    sleeper.prepare();
    if frontier.state().load(Ordering::Acquire) & ((1 << STATE_BITS) - 1) == STATE_BUILDING {
        sleeper.timed_sleep(1000, super::wait_event());
    }
    sleeper.cancel();
}

/// Transaction callback: a build that did not end leaves an empty frontier.
pub fn on_abort() {
    let Some(frontier) = BUILDING.take() else { return };
    let word = frontier.state().load(Ordering::Acquire);
    if word & ((1 << STATE_BITS) - 1) == STATE_BUILDING {
        frontier.state().store((word >> STATE_BITS) << STATE_BITS | STATE_EMPTY, Ordering::Release);
    }
    frontier.shared.builds_sleeper(frontier.database).broadcast();
}

/// Builds anew. The caller has seen to it that no transaction uses the frontier and none can begin to.
pub fn rebuild(frontier: &Frontier) -> Result<i64> {
    let word = frontier.state().load(Ordering::Acquire);
    let epoch = word >> STATE_BITS;
    let _lock = Rel::open(builders_lock()?, Lock::AccessShare)?;
    BUILDING.set(Some(*frontier));
    frontier.state().store((epoch << STATE_BITS) | STATE_BUILDING, Ordering::Release);
    build(frontier)?;
    publish(frontier, epoch + 1);
    Ok(ROWS_READ.get())
}

fn build(frontier: &Frontier) -> Result<()> {
    ROWS_READ.set(0);
    for place in 0..frontier.queue_slots() {
        frontier.queue(place).clear();
    }
    for partition in 0..PARTITIONS as u32 {
        frontier.with_partition(partition, |entries| entries.reset());
    }
    frontier.in_flight().store(0, Ordering::Release);
    for place in 0..frontier.queue_slots() {
        frontier.held(place).store(0, Ordering::Release);
    }
    frontier.prepared().waiting.clear();
    // Far from every other start: no lease of an earlier build, of a copy or of a lost claim can come again.
    let start = xact::random_u64()? >> 2;
    frontier.shared.next_lease[frontier.database].store(start.max(1), Ordering::Release);
    sql::as_owner(frontier.ledger, instance::check)?;
    reach("build.begun");
    let places = install_queues(frontier)?;
    let mut infos: Vec<SegmentInfo> = Vec::new();
    let ring = sql::as_owner(frontier.ledger, ledger::read)?;
    for segment in &ring.segments {
        infos.push(segments::locate(segment)?);
    }
    frontier.set_ring(&infos, ring.open().map_or(0, |segment| segment.generation));
    for info in infos.iter().filter(|info| info.state != SegmentState::PruneStarted) {
        restore_segment(frontier, info, &places)?;
        reach("build.segment_restored");
    }
    for (queue_id, counts) in sql::as_owner(frontier.ledger, finished::counts)? {
        if let Some(place) = places.get(&queue_id) {
            notes::add_counts(&mut frontier.queue(*place).counts, &counts);
        }
    }
    reach("build.counted");
    for (queue_id, waiting) in sql::as_owner(frontier.ledger, deferred::counts)? {
        if let Some(place) = places.get(&queue_id) {
            frontier.queue(*place).counts.scheduled += waiting;
        }
    }
    Ok(())
}

fn install_queues(frontier: &Frontier) -> Result<HashMap<i32, u16>> {
    let definitions = sql::as_owner(frontier.ledger, queues::all_live)?;
    if definitions.len() > usize::from(frontier.queue_slots()) {
        return Err(Error::new(
            Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            "more queues exist than shared memory was reserved for",
        )
        .detail(format!("There are {} queues; awa.max_queues is {}.", definitions.len(), frontier.queue_slots()))
        .hint("Raise awa.max_queues and restart the server."));
    }
    let mut places = HashMap::new();
    for (place, definition) in (0u16..).zip(definitions) {
        frontier.queue(place).install(definition.queue_id, &definition.name, Existence::Live, definition.settings);
        places.insert(definition.queue_id, place);
    }
    Ok(places)
}

/// Reads the evidence of a segment into a fold.
pub struct Evidence {
    pub fold: SegmentFold,
    pub tombstones: bool,
}

impl Reader for Evidence {
    fn room(&mut self, copies: usize) -> Result<()> {
        if !fails(Fault::Alloc) && self.fold.reserve(copies) { Ok(()) } else { Err(out_of_memory()) }
    }

    fn claim(&mut self, job_id: i64, hop: i32, lease: i64, terms: &ClaimTerms) {
        let claim = OpenClaim {
            lease,
            claimed_at: terms.claimed_at,
            deadline: terms.deadline_at,
            heartbeat_timeout: terms.heartbeat_timeout,
        };
        self.fold.claim(job_id, hop, claim);
    }

    fn completed(&mut self, job_id: i64, hop: i32, _at: i64) -> Result<()> {
        if self.fold.completed(job_id, hop) { Ok(()) } else { Err(out_of_memory()) }
    }

    fn closure(
        &mut self,
        job_id: i64,
        hop: i32,
        outcome: Outcome,
        unclaimed: bool,
        _at: i64,
        _errors: &dyn Fn() -> Option<Datum>,
    ) {
        self.tombstones |= unclaimed;
        self.fold.closure(job_id, hop, outcome, unclaimed);
    }
}

pub fn read_evidence(info: &SegmentInfo, own: bool) -> Result<Evidence> {
    let mut evidence = Evidence { fold: SegmentFold::new(info.generation), tombstones: false };
    evidence::read(info, Lock::AccessShare, own, &mut evidence)?;
    Ok(evidence)
}

pub fn ready_row(row: &RawRow<'_>) -> ReadyRow {
    let head = ready::head(row);
    ReadyRow {
        job_id: head.job_id,
        hop: head.hop,
        lane: head.lane,
        position: Position::at(head.key, head.tid),
        attempt: head.attempt,
        max_attempts: head.max_attempts,
    }
}

fn restore_segment(frontier: &Frontier, info: &SegmentInfo, places: &HashMap<i32, u16>) -> Result<()> {
    // Ready entries are locked first, as everywhere: the evidence cannot be truncated between the reads.
    let rel = Rel::open(info.ready, Lock::AccessShare)?;
    let mut evidence = read_evidence(info, false)?;
    frontier.set_tombstones(info.slot, evidence.tombstones);
    let fold = &mut evidence.fold;
    let now = xact::now();
    let mut counts: HashMap<u16, Counts> = HashMap::new();
    let mut unfinished: Vec<(i32, u64, Position)> = Vec::new();
    let mut scan = HeapScan::begin(&rel);
    while let Some(row) = scan.next() {
        match row.state() {
            RowState::Dead => continue,
            RowState::Own(xid) | RowState::InProgress(xid) => {
                let seen = ready_row(&row);
                reserve(&mut unfinished, 1)?;
                unfinished.push((seen.lane, xid, seen.position));
                continue;
            }
            RowState::Committed => {}
        }
        let seen = ready_row(&row);
        let lane = Lane::from_number(seen.lane);
        let Some(place) = places.get(&lane.queue_id).copied() else { continue };
        ROWS_READ.set(ROWS_READ.get() + 1);
        let count = counts.entry(place).or_default();
        match fold.first_pass(&seen) {
            Fate::Ready => *notes::waiting(count, lane.sub) += 1,
            Fate::Open(claim) => {
                count.running += 1;
                restore_entry(frontier, info, place, &seen, State::Claimed, Some(&claim), now)?;
            }
            // A dead letter is counted where it lies.
            Fate::Closed(outcome) if outcome.is_history() => notes::count_finished(count, outcome, 1),
            Fate::Closed(_) => {}
        }
    }
    drop(scan);
    for (place, found) in counts {
        notes::add_counts(&mut frontier.queue(place).counts, &found);
    }
    let mut unfinished_xids: Vec<u64> = unfinished.iter().map(|(_, xid, _)| *xid).collect();
    unfinished_xids.sort_unstable();
    unfinished_xids.dedup();
    let mut holes: Vec<Unclaimed> = Vec::new();
    if fold.needs_second_pass() {
        let mut scan = HeapScan::begin(&rel);
        while let Some(row) = scan.next() {
            let xmin = row.xmin_full();
            // A transaction that ended between the passes stays what the first pass made of it: a gap.
            if row.state() != RowState::Committed || unfinished_xids.binary_search(&xmin).is_ok() {
                continue;
            }
            let seen = ready_row(&row);
            let fate = fold.fate(seen.job_id, seen.hop);
            if fold.second_pass(&seen, &fate) && places.contains_key(&Lane::from_number(seen.lane).queue_id) {
                reserve(&mut holes, 1)?;
                holes.push(Unclaimed { row: seen, xmin });
            }
        }
    }
    for (lane, xid, _) in &unfinished {
        let (lane, xid) = (Lane::from_number(*lane), top_of(*xid));
        let Some(place) = places.get(&lane.queue_id).copied() else { continue };
        let note = notes::Note::Enqueued { queue: place, queue_id: lane.queue_id, sub: lane.sub, rows: 1 };
        if !notes::note_prepared(&mut frontier.prepared().waiting, xid, &note) {
            return Err(too_many_unfinished());
        }
    }
    let keep: HashSet<i32> = holes.iter().map(|hole| hole.row.lane).collect();
    restore_tracks(frontier, fold, places, &unfinished, &keep)?;
    if holes.len() > MANY_HOLES {
        holes = as_gaps(frontier, fold, places, &rel, holes)?;
    }
    // From the highest key down, so that each lands in front of the list.
    holes.sort_unstable_by_key(|hole| std::cmp::Reverse(hole.row.position));
    for Unclaimed { row, .. } in &holes {
        let lane = Lane::from_number(row.lane);
        let Some(place) = places.get(&lane.queue_id).copied() else { continue };
        let name = restore_entry(frontier, info, place, row, State::Hole, None, now)?;
        let link = frontier.link_of(name);
        frontier.set_hole_key(link, row.position.key);
        let mut queue = frontier.queue(place);
        frontier.with_links(|links| queue.push_hole(lane.priority, link, row.position.key, links));
    }
    Ok(())
}

/// A committed row below the cursor that nobody has claimed.
struct Unclaimed {
    row: ReadyRow,
    xmin: u64,
}

/// Each hole takes a place of the pool. More of them than this come from a large transaction that scans had passed by: they go back
/// into the gap of that transaction, which takes one.
const MANY_HOLES: usize = 1024;

/// Gives back those that must be holes all the same. A gap may hold only rows above the highest claimed row of its transaction, because
/// a visit takes every row of that transaction in the range.
fn as_gaps(
    frontier: &Frontier,
    fold: &SegmentFold,
    places: &HashMap<i32, u16>,
    rel: &Rel,
    mut holes: Vec<Unclaimed>,
) -> Result<Vec<Unclaimed>> {
    let mut claimed: HashMap<(i32, u64), Position> = HashMap::new();
    for hole in &holes {
        claimed.entry((hole.row.lane, hole.xmin)).or_insert(Position::START);
    }
    let mut scan = HeapScan::begin(rel);
    while let Some(row) = scan.next() {
        if row.state() != RowState::Committed {
            continue;
        }
        let seen = ready_row(&row);
        let was_claimed = !matches!(fold.fate(seen.job_id, seen.hop), Fate::Ready);
        if let Some(highest) = claimed.get_mut(&(seen.lane, row.xmin_full())).filter(|_| was_claimed) {
            *highest = seen.position.max(*highest);
        }
    }
    drop(scan);
    holes.sort_unstable_by_key(|hole| (hole.row.lane, hole.xmin, hole.row.position));
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    let mut start = 0;
    for group in holes.chunk_by(|a, b| a.row.lane == b.row.lane && a.xmin == b.xmin) {
        groups.push(start..start + group.len());
        start += group.len();
    }
    groups.sort_unstable_by_key(|group| std::cmp::Reverse(group.len()));
    let mut in_gap = vec![false; holes.len()];
    for group in groups.into_iter().filter(|group| group.len() > 16) {
        let rows = holes.get(group.clone()).unwrap_or(&[]);
        let Some(first) = rows.first() else { continue };
        let floor = claimed.get(&(first.row.lane, first.xmin)).copied().unwrap_or(Position::START);
        let below = rows.partition_point(|hole| hole.row.position <= floor);
        let (Some(from), Some(to)) = (rows.get(below), rows.last()) else { continue };
        let Some(place) = places.get(&Lane::from_number(first.row.lane).queue_id).copied() else { continue };
        let found = GapFound { xid: first.xmin, from: from.row.position, to: to.row.position };
        if frontier.queue(place).restore_gap(fold.track_id(first.row.lane), found) {
            for index in group.start + below..group.end {
                if let Some(mark) = in_gap.get_mut(index) {
                    *mark = true;
                }
            }
        }
    }
    let mut marks = in_gap.into_iter();
    holes.retain(|_| !marks.next().unwrap_or(false));
    Ok(holes)
}

fn restore_tracks(
    frontier: &Frontier,
    fold: &SegmentFold,
    places: &HashMap<i32, u16>,
    unfinished: &[(i32, u64, Position)],
    keep: &HashSet<i32>,
) -> Result<()> {
    let open = frontier.open_generation();
    let mut lanes: Vec<i32> = fold.tracks.keys().copied().chain(unfinished.iter().map(|(lane, ..)| *lane)).collect();
    lanes.sort_unstable();
    lanes.dedup();
    for number in lanes {
        let Some(place) = places.get(&Lane::from_number(number).queue_id).copied() else { continue };
        let (cursor, mut head, mut last) = fold.standing(number);
        let mine = || unfinished.iter().filter(|(lane, ..)| *lane == number);
        for (_, _, position) in mine() {
            last = last.max(position.key);
            if *position > cursor {
                head = head.min(position.key);
            }
        }
        let has_gap = mine().any(|(_, _, position)| *position <= cursor);
        if fold.generation < open && head == i64::MAX && !has_gap && !keep.contains(&number) {
            continue;
        }
        let id = fold.track_id(number);
        let mut queue = frontier.queue(place);
        let restored = queue.restore_track(id, cursor, head, last).is_ok()
            && mine()
                .filter(|(_, _, position)| *position <= cursor)
                .all(|(_, xid, position)| queue.restore_gap(id, GapFound { xid: *xid, from: *position, to: *position }));
        drop(queue);
        if !restored {
            return Err(too_many_unfinished());
        }
    }
    Ok(())
}

fn too_many_unfinished() -> Error {
    Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "too many unfinished transactions have enqueued jobs")
        .hint("Commit or roll back prepared transactions; see pg_prepared_xacts.")
}

fn restore_entry(
    frontier: &Frontier,
    info: &SegmentInfo,
    place: u16,
    row: &ReadyRow,
    state: State,
    claim: Option<&OpenClaim>,
    now: i64,
) -> Result<EntryRef> {
    let heartbeat_timeout = claim.map_or(0, |claim| claim.heartbeat_timeout);
    // Its worker could not report while the server was down, and an extended deadline is lost: a fresh grace for the heartbeat, and the
    // deadline not before its end. Without heartbeats the grace is what the claim had allowed.
    let deadline = claim.filter(|claim| claim.deadline != 0).map_or(0, |claim| {
        let allowed = claim.deadline.saturating_sub(claim.claimed_at).max(0);
        let grace = if heartbeat_timeout > 0 { heartbeat_timeout } else { allowed };
        claim.deadline.max(now.saturating_add(grace))
    });
    let entry = Entry {
        job_id: row.job_id,
        hop: row.hop,
        generation: info.generation,
        lane: row.lane,
        key: row.position.key,
        tid: row.position.tid,
        lease: claim.map_or(0, |claim| claim.lease),
        claimed_at: claim.map_or(0, |claim| claim.claimed_at),
        deadline,
        heartbeat_at: now,
        heartbeat_timeout,
        attempt: row.attempt + 1,
        max_attempts: row.max_attempts,
        queue: place,
        state,
        ..Entry::free()
    };
    let partition = frontier.partition_of(row.job_id);
    let inserted = frontier.with_partition(partition, |entries| {
        entries.insert(entry).map(|slot| EntryRef { partition, slot, stamp: entries.stamp_of(slot) })
    });
    match inserted {
        Ok(name) if frontier.reserve_entries(place, 1, Reserve::Operator) == 1 => Ok(name),
        _ => Err(Error::new(
            Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            "more jobs are in flight than shared memory was reserved for",
        )
        .detail(format!("awa.max_in_flight is {}.", settings::max_in_flight()))
        .hint("Raise awa.max_in_flight to what it was when the jobs were claimed, and restart the server.")),
    }
}
