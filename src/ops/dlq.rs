//! Dead letters: jobs that failed for good in a queue that keeps them until somebody decides.
//!
//! Tables: awa.dlq_entries. Locks: RowExclusive on ready_entries of the open segment, then rows of awa.dlq_entries; rows that another
//! transaction is taking are passed by. A row is added by the transaction that ends the attempt, so it is there if and only if the attempt
//! has ended so.

use std::collections::BTreeMap;

use awa_protocol::attempt::Entry;
use awa_protocol::lane::{BORN_CLAIMED, Lane};
use awa_protocol::queue::Counts;
use pgrx::pg_sys::Datum;

use crate::error::Result;
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::retry::{self, Changes, Retried};
use crate::ops::{exits, handle};
use crate::pg::memory::Context;
use crate::pg::rel::{Lock, Rel};
use crate::pg::{sql, xact};
use crate::store::finished::{self, DeadLetter, Filter, Finished, Shelf};
use crate::store::ready;

/// Does the queue of this entry keep what fails for good?
pub fn wanted(frontier: &Frontier, entry: &Entry) -> bool {
    frontier.queue(entry.queue).settings.dead_letters
}

/// Keeps the job of an attempt that this transaction ends.
pub fn add(frontier: &Frontier, entry: &Entry, segment: &SegmentInfo, ready: &Rel, failed_at: i64, errors: Datum) -> Result<()> {
    let lane = Lane::from_number(entry.lane);
    let letter = exits::with_row(segment, ready, entry, |row| {
        let head = ready::head(row);
        DeadLetter {
            job_id: head.job_id,
            queue_id: lane.queue_id,
            kind_id: head.kind_id,
            priority: i16::from(lane.priority) + 1,
            attempt: entry.attempt,
            max_attempts: head.max_attempts,
            hop: head.hop,
            // A running attempt that was carried has no key of its own.
            run_at: if head.key == BORN_CLAIMED { row.i64(ready::ENQUEUED_AT).unwrap_or(head.key) } else { head.key },
            enqueued_at: row.i64(ready::ENQUEUED_AT).unwrap_or(head.key),
            claimed_at: entry.claimed_at,
            failed_at,
            tags: row.copy_datum(ready::TAGS),
            metadata: row.copy_datum(ready::METADATA),
            errors,
            args: row.copy_datum(ready::ARGS),
        }
    })?;
    sql::as_owner(frontier.ledger, || finished::add_dead_letter(&letter))
}

/// One dead letter back into a queue. What lies elsewhere is not found here.
pub fn retry_one(frontier: &Frontier, job_id: i64, changes: &Changes) -> Result<Retried> {
    Ok(retry::from_shelf(frontier, Shelf::DeadLetters, job_id, changes)?.unwrap_or(Retried::NotFound))
}

/// Rows taken and appended at a time: what they need is freed with them.
const CHUNK: usize = 256;

/// Dead letters back into queues, the oldest first; returns how many.
pub fn retry_many(frontier: &Frontier, filter: &Filter, max_jobs: usize, changes: &Changes) -> Result<usize> {
    take(frontier, filter, max_jobs, |job| retry::again(frontier, job, changes))
}

/// Deletes dead letters, the oldest first; returns how many.
pub fn purge(frontier: &Frontier, filter: &Filter, max_jobs: usize) -> Result<usize> {
    take(frontier, filter, max_jobs, |_| Ok(()))
}

fn take(frontier: &Frontier, filter: &Filter, max_jobs: usize, mut each: impl FnMut(&Finished) -> Result<()>) -> Result<usize> {
    if let Some(name) = &filter.queue {
        handle::resolve(frontier, name)?;
    }
    let _open = ready::open_for_write(&frontier.open_segment()?)?;
    let _letters = Rel::open(Shelf::DeadLetters.table()?, Lock::RowExclusive)?;
    frontier.check_current()?;
    let context = Context::new(c"awa dead letters");
    let mut taken = 0;
    while taken < max_jobs {
        xact::check_for_interrupts();
        context.reset();
        let _entered = context.enter();
        let limit = CHUNK.min(max_jobs - taken);
        let mut jobs = Vec::with_capacity(limit);
        sql::as_owner(frontier.ledger, || finished::take_dead_letters(filter, limit, |job| jobs.push(job)))?;
        let mut gone: BTreeMap<i32, Counts> = BTreeMap::new();
        for job in &jobs {
            notes::count_finished(gone.entry(job.queue_id).or_default(), job.outcome, 1);
        }
        notes::reserve(frontier, gone.len())?;
        for (queue_id, counts) in gone {
            retry::note_gone(frontier, queue_id, counts);
        }
        for job in &jobs {
            each(job)?;
        }
        taken += jobs.len();
        if jobs.len() < limit {
            break;
        }
    }
    Ok(taken)
}
