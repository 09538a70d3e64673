//! Looking: counts and statistics from the frontier, jobs from the log. Writes nothing.
//!
//! Locks: AccessShare on the tables of the live segments when jobs are read.

use std::collections::HashMap;

use awa_protocol::attempt::State;
use awa_protocol::lane::{BORN_CLAIMED, Lane, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::limits::QUEUE_NAME_BYTES;
use awa_protocol::queue::{NO_KEY, QueueFrontier};
use awa_protocol::ring::SegmentState;
use pgrx::pg_sys::Datum;

use crate::error::{Result, out_of_memory, reserve};
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::cancel::open_to_read;
use crate::ops::{handle, standing};
use crate::pg::call::{Rows, bytes_datum, i32_array_datum, text_datum};
use crate::pg::rel::{Lock, Rel, lock_conflicts};
use crate::pg::scan::{HeapScan, RawRow, RowState};
use crate::pg::{sql, xact};
use crate::store::evidence::{self, ClaimTerms, Reader};
use crate::store::{datum, deferred, finished, kinds, ready, segments};

/// Copied out under the lock of the queue, where nothing may be allocated.
type Name = heapless::Vec<u8, QUEUE_NAME_BYTES>;

pub fn name_of(queue: &QueueFrontier) -> Name {
    let mut name = Name::new();
    let _ = name.extend_from_slice(queue.name());
    name
}

pub fn named(frontier: &Frontier, place: u16) -> Option<(i32, Name)> {
    let queue = frontier.queue(place);
    handle::is_visible(place, &queue).then(|| (queue.queue_id, name_of(&queue)))
}

pub fn queue_counts(frontier: &Frontier, name: Option<&[u8]>, rows: &mut Rows<'_>) -> Result<()> {
    notes::settle_prepared(frontier);
    if let Some(name) = name {
        handle::resolve(frontier, name)?;
    }
    for place in 0..frontier.queue_slots() {
        let (shown, counts) = {
            let queue = frontier.queue(place);
            if !handle::is_visible(place, &queue) || name.is_some_and(|name| name != queue.name()) {
                continue;
            }
            (name_of(&queue), queue.counts)
        };
        rows.put(&[
            Some(bytes_datum(&shown)),
            Some(datum::i64(counts.immediate)),
            Some(datum::i64(counts.scheduled)),
            Some(datum::i64(counts.running)),
            Some(datum::i64(counts.completed)),
            Some(datum::i64(counts.failed)),
            Some(datum::i64(counts.cancelled)),
            Some(datum::i64(counts.dead_lettered)),
        ])?;
    }
    Ok(())
}

/// A scan that was interrupted before its first row says of its track only that there may be something to find.
pub fn is_known(head: i64) -> bool {
    head > Position::START.key
}

pub fn queue_stats(frontier: &Frontier, rows: &mut Rows<'_>) -> Result<()> {
    notes::settle_prepared(frontier);
    for place in 0..frontier.queue_slots() {
        let (shown, totals, holes, gaps, oldest, waiters) = {
            let queue = frontier.queue(place);
            if !handle::is_visible(place, &queue) {
                continue;
            }
            let oldest = queue.tracks().iter().map(|track| track.head).min().unwrap_or(NO_KEY);
            (name_of(&queue), queue.totals, queue.hole_count(), queue.gaps().len(), oldest, queue.waiters)
        };
        rows.put(&[
            Some(bytes_datum(&shown)),
            Some(datum::i64(totals.enqueued as i64)),
            Some(datum::i64(totals.claimed as i64)),
            Some(datum::i64(totals.completed as i64)),
            Some(datum::i64(totals.failed_attempts as i64)),
            Some(datum::i64(totals.snoozed as i64)),
            Some(datum::i64(totals.rescued as i64)),
            Some(datum::i64(i64::from(holes))),
            Some(datum::i32(gaps as i32)),
            (oldest <= xact::now() && is_known(oldest)).then(|| datum::i64(oldest)),
            Some(datum::i32(waiters as i32)),
        ])?;
    }
    Ok(())
}

pub fn segment_stats(frontier: &Frontier, rows: &mut Rows<'_>) -> Result<()> {
    let live = frontier.live_segments();
    for (info, standing) in live.iter().zip(standing::of_segments(frontier, &live)) {
        // Asked before this session has locks of its own there.
        let holders = match info.state {
            SegmentState::Open => None,
            _ => Some(holders_of(info)),
        };
        let mut bytes = 0;
        for oid in [info.ready, info.claims, info.done, info.closures] {
            bytes += Rel::open(oid, Lock::AccessShare)?.bytes();
        }
        rows.put(&[
            Some(datum::i64(info.generation)),
            Some(datum::i32(info.slot)),
            Some(text_datum(segments::state_name(info.state))),
            Some(datum::i64(info.opened_at)),
            Some(datum::i64(bytes as i64)),
            Some(text_datum(&format!("awa_segments.ready_entries_{}", info.slot))),
            Some(datum::i64(i64::from(standing.running))),
            Some(datum::i64(i64::from(standing.holes))),
            Some(datum::i32(standing.gaps as i32)),
            Some(datum::i32(standing.waiting as i32)),
            Some(Datum::from(info.state != SegmentState::Open && standing.looks_drained())),
            holders.map(|pids| i32_array_datum(&pids)),
        ])?;
    }
    Ok(())
}

/// Processes with a lock that keeps the segment from being truncated; 0 stands for prepared transactions.
fn holders_of(info: &SegmentInfo) -> Vec<i32> {
    let mut pids: Vec<i32> = [info.ready, info.closures, info.done, info.claims]
        .into_iter()
        .flat_map(|oid| lock_conflicts(oid, Lock::AccessExclusive))
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Which jobs a reader wants.
#[derive(Clone, Copy)]
pub enum Wanted {
    One(i64),
    Unfinished,
    Finished,
}

#[derive(Default)]
struct Story {
    wanted: Option<i64>,
    closed: HashMap<(i64, i32), (Outcome, i64, Option<Datum>)>,
    claimed: HashMap<(i64, i32), (i64, i64)>,
}

impl Story {
    fn matters(&self, job_id: i64) -> bool {
        self.wanted.is_none_or(|wanted| wanted == job_id)
    }
}

impl Reader for Story {
    fn room(&mut self, copies: usize) -> Result<()> {
        let fits = self.wanted.is_some() || (self.closed.try_reserve(copies).is_ok() && self.claimed.try_reserve(copies).is_ok());
        if fits { Ok(()) } else { Err(out_of_memory()) }
    }

    fn claim(&mut self, job_id: i64, hop: i32, _lease: i64, terms: &ClaimTerms) {
        if self.matters(job_id) {
            self.claimed.insert((job_id, hop), (terms.claimed_at, terms.deadline_at));
        }
    }

    fn closure(
        &mut self,
        job_id: i64,
        hop: i32,
        outcome: Outcome,
        _unclaimed: bool,
        at: i64,
        errors: &dyn Fn() -> Option<Datum>,
    ) {
        let superseded = |before: &(Outcome, i64, Option<Datum>)| before.0.supersedes(outcome);
        if self.matters(job_id) && !self.closed.get(&(job_id, hop)).is_some_and(superseded) {
            self.closed.insert((job_id, hop), (outcome, at, errors()));
        }
    }
}

pub fn jobs(frontier: &Frontier, wanted: Wanted, rows: &mut Rows<'_>) -> Result<()> {
    let mut names: HashMap<i32, Vec<u8>> = HashMap::new();
    for place in 0..frontier.queue_slots() {
        if let Some((queue_id, name)) = named(frontier, place) {
            names.insert(queue_id, name.to_vec());
        }
    }
    match wanted {
        Wanted::Unfinished => {
            ring_jobs(frontier, wanted, &names, rows)?;
            deferred_jobs(frontier, None, &names, rows)
        }
        Wanted::Finished => {
            let read = ring_jobs(frontier, wanted, &names, rows)?;
            sql::as_owner(frontier.ledger, || finished::show_retained(&read, |row| rows.put(row)))
        }
        Wanted::One(job_id) => {
            // Twice: between the look at the ring and the look outside, the job may go from one to the other.
            for _ in 0..2 {
                ring_jobs(frontier, wanted, &names, rows)?;
                deferred_jobs(frontier, Some(job_id), &names, rows)?;
                if !rows.is_empty() || sql::as_owner(frontier.ledger, || finished::show(job_id, |row| rows.put(row)))? > 0 {
                    break;
                }
            }
            Ok(())
        }
    }
}

/// Jobs of the ring; gives the generations that were read. Jobs that were copied out of one of them, because its prune has begun since,
/// have been shown here.
fn ring_jobs(frontier: &Frontier, wanted: Wanted, names: &HashMap<i32, Vec<u8>>, rows: &mut Rows<'_>) -> Result<Vec<i64>> {
    let mut read = Vec::new();
    for info in frontier.live_segments().iter().filter(|info| info.state != SegmentState::PruneStarted) {
        if let Some(rel) = open_to_read(frontier, info)? {
            segment_jobs(frontier, info, &rel, wanted, names, rows)?;
            read.push(info.generation);
        }
    }
    Ok(read)
}

/// Jobs that wait outside the ring.
fn deferred_jobs(frontier: &Frontier, job_id: Option<i64>, names: &HashMap<i32, Vec<u8>>, rows: &mut Rows<'_>) -> Result<()> {
    let mut found = Vec::new();
    sql::as_owner(frontier.ledger, || {
        deferred::each(job_id, |entry| {
            reserve(&mut found, 1)?;
            found.push(*entry);
            Ok(())
        })
    })?;
    for entry in found {
        let lane = Lane::from_number(entry.lane);
        let Some(queue) = names.get(&lane.queue_id) else { continue };
        let kind = kinds::name(frontier, entry.kind_id)?;
        let mut columns: [Option<Datum>; 17] = [None; 17];
        let known = [
            Some(datum::i64(entry.job_id)),
            Some(bytes_datum(queue)),
            Some(bytes_datum(&kind)),
            Some(text_datum("scheduled")),
            Some(datum::i32(i32::from(lane.priority) + 1)),
            Some(datum::i32(i32::from(entry.attempt))),
            Some(datum::i32(i32::from(entry.max_attempts))),
            Some(datum::i64(entry.key)),
            entry.enqueued_at.map(datum::i64),
        ];
        let last = [entry.tags, entry.metadata, entry.errors, Some(entry.args)];
        for (column, value) in columns.iter_mut().zip(known.into_iter().chain([None; 4]).chain(last)) {
            *column = value;
        }
        rows.put(&columns)?;
    }
    Ok(())
}

fn segment_jobs(
    frontier: &Frontier,
    info: &SegmentInfo,
    rel: &Rel,
    wanted: Wanted,
    names: &HashMap<i32, Vec<u8>>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let only = match wanted {
        Wanted::One(job_id) => Some(job_id),
        _ => None,
    };
    let mut story = Story { wanted: only, ..Story::default() };
    evidence::read(info, Lock::AccessShare, true, &mut story)?;
    let mut scan = HeapScan::begin(rel);
    while let Some(row) = scan.next() {
        if only.is_some_and(|job_id| row.i64(ready::JOB_ID) != Some(job_id)) {
            continue;
        }
        if !matches!(row.state(), RowState::Committed | RowState::Own(_)) {
            continue;
        }
        put_job(frontier, &story, wanted, names, &row, rows)?;
    }
    Ok(())
}

fn put_job(
    frontier: &Frontier,
    story: &Story,
    wanted: Wanted,
    names: &HashMap<i32, Vec<u8>>,
    row: &RawRow<'_>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let head = ready::head(row);
    let lane = Lane::from_number(head.lane);
    let Some(queue) = names.get(&lane.queue_id) else { return Ok(()) };
    let copy = (head.job_id, head.hop);
    let closed = story.closed.get(&copy);
    if closed.is_some_and(|(outcome, ..)| !outcome.is_history()) {
        return Ok(());
    }
    let fits = match wanted {
        Wanted::One(_) => true,
        Wanted::Unfinished => closed.is_none(),
        Wanted::Finished => closed.is_some(),
    };
    if !fits {
        return Ok(());
    }
    let claimed = story.claimed.get(&copy);
    let state = match (closed, claimed) {
        (Some((outcome, ..)), _) => outcome.name(),
        (None, Some(_)) => "running",
        (None, None) if head.key > xact::now() => "scheduled",
        (None, None) => "available",
    };
    let attempt = i32::from(head.attempt) + i32::from(claimed.is_some());
    let live = (state == "running").then(|| live_times(frontier, head.job_id)).flatten();
    let kind = kinds::name(frontier, head.kind_id)?;
    rows.put(&[
        Some(datum::i64(head.job_id)),
        Some(bytes_datum(queue)),
        Some(bytes_datum(&kind)),
        Some(text_datum(state)),
        Some(datum::i32(i32::from(lane.priority) + 1)),
        Some(datum::i32(attempt)),
        Some(datum::i32(i32::from(head.max_attempts))),
        // A copy that was born claimed has no time of its own.
        Some(head.key).filter(|key| *key != BORN_CLAIMED).map(datum::i64).or_else(|| row.datum(ready::ENQUEUED_AT)),
        row.datum(ready::ENQUEUED_AT).or(Some(datum::i64(head.key))),
        claimed.map(|(at, _)| datum::i64(*at)),
        live.map(|(deadline, _)| deadline).or(claimed.map(|(_, deadline)| *deadline)).filter(|at| *at != 0).map(datum::i64),
        live.map(|(_, heartbeat)| datum::i64(heartbeat)),
        closed.map(|(_, at, _)| datum::i64(*at)),
        row.datum(ready::TAGS),
        row.datum(ready::METADATA),
        closed.and_then(|(.., errors)| *errors).or_else(|| row.datum(ready::ERRORS)),
        row.datum(ready::ARGS),
    ])
}

fn live_times(frontier: &Frontier, job_id: i64) -> Option<(i64, i64)> {
    frontier.with_partition(frontier.partition_of(job_id), |entries| {
        let slot = entries.find(job_id, |entry| entry.state == State::Claimed)?;
        entries.get(slot).map(|entry| (entry.deadline, entry.heartbeat_at))
    })
}
