//! Enqueue: append ready entries to the open segment, in the caller's transaction.
//!
//! Locks: RowExclusive on ready_entries of the open segment, to the end of the transaction; the queue's lock for the moments in which
//! keys are chosen. Rows written: one ready entry a job. Never waits for another producer.
//! A crash at any step: the rows belong to a transaction that never committed.

use std::cell::Cell;

use awa_protocol::lane::{Lane, SubLane};
use awa_protocol::limits::ROWS_PER_REGISTRATION;
use awa_protocol::queue::{Refusal, TrackId, Wanted};
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result, reserve};
use crate::frontier::{Asked, Frontier, notes};
use crate::ops::handle::Queue;
use crate::pg::append::Append;
use crate::pg::points::reach;
use crate::pg::{sql, xact};
use crate::store::ready::{self, NewEntry};

/// A job that passed validation.
#[derive(Clone, Copy)]
pub struct NewJob {
    pub kind_id: i32,
    /// 0 (most urgent) to 3.
    pub priority: u8,
    pub run_at: Option<i64>,
    pub max_attempts: i16,
    pub tags: Option<Datum>,
    pub metadata: Option<Datum>,
    pub args: Datum,
}

/// Returns the identifiers, in the order of `jobs`.
pub fn enqueue(frontier: &Frontier, queue: Queue, jobs: &[NewJob]) -> Result<Vec<i64>> {
    let now = xact::now();
    let mut ids = Vec::new();
    reserve(&mut ids, jobs.len())?;
    for _ in jobs {
        ids.push(next_job_id(frontier)?);
    }
    for priority in 0..4u8 {
        for sub in [SubLane::Immediate, SubLane::Scheduled] {
            let mut entries: Vec<NewEntry> = Vec::new();
            reserve(&mut entries, jobs.len())?;
            let chosen = jobs
                .iter()
                .zip(&ids)
                .filter(|(job, _)| job.priority == priority && job.run_at.is_some() == (sub == SubLane::Scheduled))
                .map(|(job, id)| NewEntry {
                    key: job.run_at.unwrap_or(0),
                    job_id: *id,
                    lane: Lane { queue_id: queue.queue_id, priority, sub }.number(),
                    hop: 0,
                    kind_id: job.kind_id,
                    attempt: 0,
                    max_attempts: job.max_attempts,
                    enqueued_at: job.run_at.map(|_| now),
                    tags: job.tags,
                    metadata: job.metadata,
                    errors: None,
                    args: job.args,
                });
            entries.extend(chosen);
            append(frontier, queue, priority, sub, entries)?;
        }
    }
    Ok(ids)
}

/// Appends entries of one lane; the frontier chooses their keys (for scheduled ones `key` holds the time wanted).
pub fn append(frontier: &Frontier, queue: Queue, priority: u8, sub: SubLane, mut entries: Vec<NewEntry>) -> Result<()> {
    let mut rest = entries.as_mut_slice();
    while !rest.is_empty() {
        let (chunk, later) = rest.split_at_mut(rest.len().min(ROWS_PER_REGISTRATION));
        append_chunk(frontier, queue, priority, sub, chunk)?;
        rest = later;
    }
    Ok(())
}

fn append_chunk(frontier: &Frontier, queue: Queue, priority: u8, sub: SubLane, chunk: &mut [NewEntry]) -> Result<()> {
    notes::reserve(frontier, 1)?;
    let xid = xact::current_xid();
    let mut keys = [0i64; ROWS_PER_REGISTRATION];
    let mut wanted_at = [0i64; ROWS_PER_REGISTRATION];
    for (at, entry) in wanted_at.iter_mut().zip(chunk.iter()) {
        *at = entry.key;
    }
    let wanted = match sub {
        SubLane::Immediate => Wanted::Immediate { rows: chunk.len() },
        SubLane::Scheduled => Wanted::Scheduled { run_at: wanted_at.get(..chunk.len()).unwrap_or(&[]) },
    };
    loop {
        let segment = frontier.open_segment()?;
        reach("enqueue.open_segment_read");
        let rel = ready::open_for_write(&segment)?;
        frontier.check_current()?;
        let index = ready::open_index(&rel, &segment)?;
        let indexes = [index];
        let mut writer = Append::new(&rel, &indexes)?;
        reach("enqueue.segment_locked");
        match register(frontier, queue, TrackId { generation: segment.generation, priority, sub }, wanted, xid, &mut keys)? {
            Registration::Done => {}
            Registration::SegmentMoved => continue,
            Registration::Crowded => {
                xact::check_for_interrupts();
                std::thread::yield_now();
                continue;
            }
        }
        notes::push(notes::Note::Enqueued { queue: queue.place, queue_id: queue.queue_id, sub, rows: chunk.len() as i64 });
        reach("enqueue.registered");
        let mut rows = Vec::with_capacity(chunk.len());
        for (entry, key) in chunk.iter_mut().zip(keys) {
            entry.key = key;
            rows.push(entry.columns());
        }
        ready::append(&mut writer, &rows)?;
        reach("enqueue.appended");
        frontier.queue(queue.place).deregister(xact::my_proc());
        notes::set_registered(None);
        reach("enqueue.deregistered");
        return Ok(());
    }
}

/// Keys of immediate jobs further ahead of the clock than this: it was set back.
const CLOCK_STEP: i64 = 5_000_000;

enum Registration {
    Done,
    /// The segment was sealed between reading the ring and locking the table: take the new one.
    SegmentMoved,
    /// As many sessions are appending as the queue can note: a matter of microseconds.
    Crowded,
}

fn register(
    frontier: &Frontier,
    queue: Queue,
    track: TrackId,
    wanted: Wanted<'_>,
    xid: u64,
    keys: &mut [i64],
) -> Result<Registration> {
    notes::set_registered(Some(queue.place));
    let refusal = {
        let mut held = frontier.queue(queue.place);
        if !queue.is_usable(&held) {
            None
        } else if !frontier.is_open(track.generation) {
            notes::set_registered(None);
            return Ok(Registration::SegmentMoved);
        } else {
            let now = xact::now();
            match held.register(track, wanted, now, xact::my_proc(), xid, keys) {
                Ok(()) => {
                    let ahead = keys.first().is_some_and(|key| key.saturating_sub(now) > CLOCK_STEP);
                    if ahead && track.sub == SubLane::Immediate {
                        frontier.ask_for_rotation(track.generation, Asked::ClockBehind);
                    }
                    return Ok(Registration::Done);
                }
                Err(refusal) => Some(refusal),
            }
        }
    };
    notes::set_registered(None);
    match refusal {
        Some(Refusal::TooManyInserters) => Ok(Registration::Crowded),
        Some(Refusal::TooManyTracks) => {
            Err(Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "too many segments hold unclaimed jobs of this queue")
                .detail("Each priority of a queue is followed in each live segment.")
                .hint("Claim or cancel the oldest jobs of the queue; see awa.stat_segments."))
        }
        None => {
            frontier.check_current()?;
            Err(Error::new(Code::ERRCODE_UNDEFINED_OBJECT, "the queue has been dropped or is being dropped")
                .hint("Enqueue into a queue that exists; see awa.queues."))
        }
    }
}

thread_local! {
    /// Incarnation, next identifier, end of the block.
    static BLOCK: Cell<(u32, i64, i64)> = const { Cell::new((0, 0, 0)) };
}

const BLOCK_SIZE: i64 = 256;

/// Identifiers come in blocks that no other session can get again, not even after a crash: a block is on disk before its first use.
fn next_job_id(frontier: &Frontier) -> Result<i64> {
    let (ledger, next, end) = BLOCK.get();
    if ledger == frontier.ledger.to_u32() && next < end {
        BLOCK.set((ledger, next + 1, end));
        return Ok(next);
    }
    let logged_before = xact::xact_last_rec_end();
    let mut first = None;
    sql::as_owner(frontier.ledger, || {
        sql::select("SELECT pg_catalog.nextval('awa.job_ids')", &[], false, |row| {
            first = row.i64(1);
            Ok(())
        })
    })?;
    let first = first.ok_or_else(|| Error::new(Code::ERRCODE_INTERNAL_ERROR, "could not draw job identifiers"))?;
    if xact::xact_last_rec_end() != logged_before {
        xact::flush_wal();
    }
    BLOCK.set((frontier.ledger.to_u32(), first + 1, first + BLOCK_SIZE));
    Ok(first)
}
