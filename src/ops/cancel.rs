//! Cancel: end a job that waits or runs.
//!
//! Locks: RowExclusive on ready_entries and closures of the job's segment, to the end of the transaction; AccessShare on the tables of
//! the segments searched. Rows written: one closure; for a copy that was never claimed it carries the tombstone (lane, key).
//! A waiting job is found by reading the live segments: a cold path. Waits for a caller who is ending the same attempt.

use std::collections::HashMap;

use awa_protocol::attempt::{Entry, EntryRef, Exit, InsertRefusal, State, decide_exit};
use awa_protocol::lane::Lane;
use awa_protocol::lifecycle::Outcome;
use awa_protocol::rebuild::Fate;
use awa_protocol::ring::SegmentState;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, Reserve, SegmentInfo, build, notes};
use crate::ops::deferred;
use crate::ops::exits::{self, CLAIM_COMMIT_WAIT_MS, CLAIM_COMMIT_WAITS};
use crate::ops::handle;
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel};
use crate::pg::scan::{HeapScan, RowState, is_own};
use crate::pg::{sql, xact};
use crate::store::evidence::{self, Closure};
use crate::store::finished::{self, Shelf};
use crate::store::{errors, ready};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    Done,
    NotFound,
    AlreadyFinished,
    ClaimUncommitted,
}

impl Cancelled {
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "cancelled",
            Self::NotFound => "not_found",
            Self::AlreadyFinished => "already_finished",
            Self::ClaimUncommitted => "claim_uncommitted",
        }
    }
}

pub fn cancel(frontier: &Frontier, job_id: i64, reason: Option<&[u8]>) -> Result<Cancelled> {
    let mut waits = 0;
    loop {
        xact::check_for_interrupts();
        let Some((name, entry)) = entry_of(frontier, job_id) else {
            match cancel_waiting(frontier, job_id, reason)? {
                Some(answer) => return Ok(answer),
                None => continue,
            }
        };
        match decide_exit(&entry, None, Outcome::Cancelled, is_own, exits::is_unsettled) {
            Exit::Stale => xact::check_for_interrupts(),
            // What is being carried can be ended when it has arrived.
            Exit::Conflict(Outcome::Moved) => return Err(carried_here(job_id)),
            // This transaction has put the job back (retry, snooze): the copy that waits is the one to cancel.
            Exit::Conflict(outcome) if !outcome.is_terminal() => {
                if let Some(answer) = cancel_waiting(frontier, job_id, reason)? {
                    return Ok(answer);
                }
            }
            Exit::Conflict(Outcome::Removed) => return Ok(Cancelled::NotFound),
            Exit::Conflict(_) if notes::has_made_letter(name) => match own_letter(frontier, job_id, entry.hop)? {
                Letter::Kept => return Ok(Cancelled::AlreadyFinished),
                Letter::Gone => return Ok(Cancelled::NotFound),
                Letter::Redriven => {
                    if let Some(answer) = cancel_waiting(frontier, job_id, reason)? {
                        return Ok(answer);
                    }
                }
            },
            Exit::Already | Exit::Conflict(_) => return Ok(Cancelled::AlreadyFinished),
            Exit::WaitForCloser(xid) => xact::wait_for_xid(xid),
            Exit::ClaimUncommitted(_) if waits < CLAIM_COMMIT_WAITS => {
                waits += 1;
                crate::frontier::nap(CLAIM_COMMIT_WAIT_MS);
            }
            Exit::ClaimUncommitted(_) => return Ok(Cancelled::ClaimUncommitted),
            Exit::Proceed => {
                if let Some(answer) = cancel_entry(frontier, name, &entry, reason)? {
                    return Ok(answer);
                }
            }
        }
    }
}

fn carried_here(job_id: i64) -> Error {
    Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, format!("job {job_id} is being carried by this transaction"))
        .hint("Commit first, then cancel it.")
}

pub fn entry_of(frontier: &Frontier, job_id: i64) -> Option<(EntryRef, Entry)> {
    let partition = frontier.partition_of(job_id);
    frontier.with_partition(partition, |entries| {
        let newest = |entry: &Entry| entries.find(job_id, |other| other.hop > entry.hop).is_none();
        let slot = entries.find(job_id, newest)?;
        let stamp = entries.stamp_of(slot);
        entries.get(slot).map(|entry| (EntryRef { partition, slot, stamp }, *entry))
    })
}

/// Cancels a running job or a hole. `None`: it changed under our hands; look again.
fn cancel_entry(frontier: &Frontier, name: EntryRef, seen: &Entry, reason: Option<&[u8]>) -> Result<Option<Cancelled>> {
    notes::reserve(frontier, 1)?;
    let xid = xact::current_xid();
    let was_hole = seen.state == State::Hole;
    reach("cancel.decided");
    {
        // The queue's lock keeps claimers from popping the hole while it is unlinked. It does not keep others from ending an attempt.
        let mut queue = frontier.queue(seen.queue);
        let link = frontier.link_of(name);
        let marked = frontier.with_named(name, |now| frontier.is_current() && now.begin_exit(seen, xid, Outcome::Cancelled));
        if marked != Some(true) {
            drop(queue);
            frontier.check_current()?;
            return Ok(None);
        }
        if was_hole {
            // Whatever is a hole is in the list, for both change under this lock.
            frontier.with_links(|links| queue.remove_hole(seen.priority(), link, links));
        }
    }
    let lane = Lane::from_number(seen.lane);
    let note = if was_hole {
        notes::Note::Guard {
            entry: name,
            queue: seen.queue,
            queue_id: lane.queue_id,
            sub: lane.sub,
            was_hole: true,
            outcome: Outcome::Cancelled,
        }
    } else {
        notes::Note::Closing { entry: name, queue: seen.queue, queue_id: lane.queue_id, outcome: Outcome::Cancelled }
    };
    notes::push(note);
    reach("cancel.marked");
    let (segment, rel) = exits::segment_of(frontier, seen.generation)?;
    let before = exits::with_row(&segment, &rel, seen, |row| row.copy_datum(ready::ERRORS))?;
    let attempts = if was_hole { i32::from(seen.attempt) - 1 } else { i32::from(seen.attempt) };
    let tombstone = was_hole.then_some((seen.lane, seen.key));
    close(frontier, &segment, seen.job_id, seen.hop, tombstone, history(frontier, before, attempts, reason)?)?;
    Ok(Some(Cancelled::Done))
}

fn history(frontier: &Frontier, before: Option<Datum>, attempt: i32, reason: Option<&[u8]>) -> Result<Option<Datum>> {
    match reason {
        Some(reason) => errors::append(frontier, before, attempt, xact::now(), Some(reason)).map(Some),
        None => Ok(before),
    }
}

fn close(
    frontier: &Frontier,
    segment: &SegmentInfo,
    job_id: i64,
    hop: i32,
    tombstone: Option<(i32, i64)>,
    errors: Option<Datum>,
) -> Result<()> {
    if tombstone.is_some() {
        frontier.set_tombstones(segment.slot, true);
    }
    let closure = Closure { closed_at: xact::now(), job_id, hop, tombstone, outcome: Outcome::Cancelled, errors };
    evidence::append_closures(segment, &[closure])
}

pub struct Found {
    pub segment: SegmentInfo,
    pub head: ready::Head,
    pub errors: Option<Datum>,
}

/// The newest copy of a job that nobody has claimed. `None`: somebody took it meanwhile; look again.
fn cancel_waiting(frontier: &Frontier, job_id: i64, reason: Option<&[u8]>) -> Result<Option<Cancelled>> {
    // A job that waits outside the ring comes in first, so that its end is on record like any other's.
    if deferred::bring_back(frontier, job_id)? {
        return Ok(None);
    }
    let Some(found) = find_newest(frontier, job_id)? else { return outside_the_ring(frontier, job_id) };
    let head = found.head;
    let lane = Lane::from_number(head.lane);
    let Some(place) = handle::place_of(frontier, lane.queue_id) else {
        frontier.check_current()?;
        return Ok(Some(Cancelled::NotFound));
    };
    notes::reserve(frontier, 1)?;
    if frontier.reserve_entries(place, 1, Reserve::Operator) == 0 {
        return Err(pool_is_full());
    }
    notes::promise(place, 1);
    let guard = Entry {
        job_id,
        hop: head.hop,
        generation: found.segment.generation,
        lane: head.lane,
        key: head.key,
        tid: head.tid,
        close_xid: xact::current_xid(),
        closing: Some(Outcome::Cancelled),
        attempt: head.attempt + 1,
        max_attempts: head.max_attempts,
        process: xact::my_proc(),
        queue: place,
        state: State::Guard,
        ..Entry::free()
    };
    let partition = frontier.partition_of(job_id);
    reach("cancel.found");
    let inserted = frontier.with_partition(partition, |entries| {
        if entries.find(job_id, |other| other.hop >= head.hop).is_some() || !frontier.is_current() {
            return Err(InsertRefusal::Exists(0));
        }
        entries.insert(guard).map(|slot| EntryRef { partition, slot, stamp: entries.stamp_of(slot) })
    });
    let name = match inserted {
        Ok(name) => name,
        Err(refusal) => {
            notes::settle_promise(frontier);
            frontier.check_current()?;
            return if refusal == InsertRefusal::Full { Err(pool_is_full()) } else { Ok(None) };
        }
    };
    notes::use_promised();
    notes::push(notes::Note::Guard {
        entry: name,
        queue: place,
        queue_id: lane.queue_id,
        sub: lane.sub,
        was_hole: false,
        outcome: Outcome::Cancelled,
    });
    reach("cancel.guarded");
    // The guard stands: whatever had happened to this copy before is in the evidence by now.
    let ready = ready::open_for_write(&found.segment)?;
    frontier.check_current()?;
    let closed = build::read_evidence(&found.segment, true)?.fold;
    let newest = find_newest(frontier, job_id)?.is_some_and(|again| again.head.hop == head.hop);
    if !newest || closed.fate(job_id, head.hop) != Fate::Ready {
        frontier.drop_entry(name);
        notes::retract_last();
        return match closed.fate(job_id, head.hop) {
            Fate::Closed(Outcome::Removed) => Ok(Some(Cancelled::NotFound)),
            Fate::Closed(outcome) if outcome.is_history() => Ok(Some(Cancelled::AlreadyFinished)),
            // A dead letter, kept or deleted. Or its next copy was appended by the transaction that closed this one, and is not in
            // the ring any more.
            Fate::Closed(_) if newest => outside_the_ring(frontier, job_id),
            Fate::Closed(_) | Fate::Open(_) | Fate::Ready => Ok(None),
        };
    }
    drop(ready);
    let errors = history(frontier, found.errors, i32::from(head.attempt), reason)?;
    close(frontier, &found.segment, job_id, head.hop, Some((head.lane, head.key)), errors)?;
    reach("cancel.closed");
    Ok(Some(Cancelled::Done))
}

pub fn pool_is_full() -> Error {
    Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "no place is left for another job in flight")
        .hint("Finish running jobs, or raise awa.max_in_flight and restart the server.")
}

/// What has become of a dead letter that this transaction has made.
pub enum Letter {
    Kept,
    /// Deleted.
    Gone,
    /// Its next copy lies in the ring.
    Redriven,
}

pub fn own_letter(frontier: &Frontier, job_id: i64, hop: i32) -> Result<Letter> {
    if sql::as_owner(frontier.ledger, || finished::standing(Shelf::DeadLetters, job_id))?.is_some() {
        return Ok(Letter::Kept);
    }
    let again = find_newest(frontier, job_id)?.is_some_and(|found| found.head.hop > hop);
    Ok(if again { Letter::Redriven } else { Letter::Gone })
}

/// A job of which the ring knows nothing, or only former copies. `None`: it waits outside, since a moment ago; look again.
fn outside_the_ring(frontier: &Frontier, job_id: i64) -> Result<Option<Cancelled>> {
    for shelf in Shelf::ALL {
        if sql::as_owner(frontier.ledger, || finished::standing(shelf, job_id))?.is_some() {
            return Ok(Some(Cancelled::AlreadyFinished));
        }
    }
    Ok(if deferred::waits_outside(frontier, job_id)? { None } else { Some(Cancelled::NotFound) })
}

/// Reads every live segment, the newest first: copies of a job only move forward.
pub fn find_newest(frontier: &Frontier, job_id: i64) -> Result<Option<Found>> {
    let segments: Vec<SegmentInfo> = frontier.live_segments();
    let mut best: HashMap<i64, Found> = HashMap::new();
    for info in segments.into_iter().rev().filter(|info| info.state != SegmentState::PruneStarted) {
        let Some(rel) = open_to_read(frontier, &info)? else { continue };
        let mut scan = HeapScan::begin(&rel);
        while let Some(row) = scan.next() {
            if row.i64(ready::JOB_ID) != Some(job_id) || !matches!(row.state(), RowState::Committed | RowState::Own(_)) {
                continue;
            }
            let head = ready::head(&row);
            if best.get(&job_id).is_none_or(|other| other.head.hop < head.hop) {
                best.insert(job_id, Found { segment: info, head, errors: row.copy_datum(ready::ERRORS) });
            }
        }
        if best.contains_key(&job_id) {
            break;
        }
    }
    Ok(best.remove(&job_id))
}

/// Locks a segment for reading. `None`: its prune has begun meanwhile, so what it holds is finished and not to be read.
pub fn open_to_read(frontier: &Frontier, info: &SegmentInfo) -> Result<Option<Rel>> {
    let rel = Rel::open(info.ready, Lock::AccessShare)?;
    let now = frontier.segment(info.generation).or_else(|| notes::opened_here().filter(|own| own.generation == info.generation));
    Ok(now.filter(|now| now.state != SegmentState::PruneStarted).map(|_| rel))
}
