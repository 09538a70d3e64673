//! Retry: a job that failed, was cancelled or became a dead letter is tried again, under its own identifier.
//!
//! Its next copy has hop + 1 and counts attempts from 0; the error history stays. From the ring: superseding evidence (`supersede`); from
//! a shelf: its row is deleted, and whoever deletes it has the job. Locks: RowExclusive on ready_entries of the open segment, then of
//! the job's segment with its closures, or on the shelf. Waits for a transaction that is ending, retrying or deleting the same job.

use awa_protocol::lane::{Lane, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::Counts;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, notes};
use crate::ops::handle::{self, Queue};
use crate::ops::supersede::{self, Ended, Ring};
use crate::ops::{enqueue, exits};
use crate::pg::points::reach;
use crate::pg::{sql, xact};
use crate::store::finished::{self, Finished, Shelf};
use crate::store::ready::{self, NewEntry};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retried {
    Done,
    NotFound,
    NotFinished,
    /// A completed job is not tried again: it would run twice.
    Completed,
}

impl Retried {
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "retried",
            Self::NotFound => "not_found",
            Self::NotFinished => "not_finished",
            Self::Completed => "completed",
        }
    }
}

/// What differs from the job as it was.
#[derive(Clone, Copy, Default)]
pub struct Changes {
    pub queue: Option<Queue>,
    /// 0 (most urgent) to 3.
    pub priority: Option<u8>,
    pub run_at: Option<i64>,
}

/// Shelves are asked twice: between a look at the ring and a look at the shelves the job may go from one to the other.
const LOOKS: usize = 2;

pub fn retry(frontier: &Frontier, job_id: i64, changes: &Changes) -> Result<Retried> {
    for _ in 0..LOOKS {
        match supersede::take(frontier, job_id, Outcome::Redriven, Outcome::is_retryable)? {
            Ring::Mine(ended) => return from_ring(frontier, &ended, changes),
            Ring::NotFinished => return Ok(Retried::NotFinished),
            Ring::Unwanted => return Ok(Retried::Completed),
            Ring::RemovedHere => return Ok(Retried::NotFound),
            Ring::Elsewhere => {}
        }
        for shelf in Shelf::ALL {
            if let Some(answer) = from_shelf(frontier, shelf, job_id, changes)? {
                return Ok(answer);
            }
        }
    }
    Ok(Retried::NotFound)
}

fn from_ring(frontier: &Frontier, ended: &Ended, changes: &Changes) -> Result<Retried> {
    let guard = &ended.guard;
    let lane = Lane::from_number(guard.lane);
    let new = exits::with_row(&ended.segment, &ended.ready, guard, |row| {
        let head = ready::head(row);
        NewEntry {
            key: 0,
            job_id: head.job_id,
            lane: head.lane,
            hop: head.hop + 1,
            kind_id: head.kind_id,
            attempt: 0,
            max_attempts: head.max_attempts,
            enqueued_at: row.i64(ready::ENQUEUED_AT).or(Some(head.key)),
            tags: row.copy_datum(ready::TAGS),
            metadata: row.copy_datum(ready::METADATA),
            errors: ended.errors.or_else(|| row.copy_datum(ready::ERRORS)),
            args: row.copy_datum(ready::ARGS).unwrap_or_else(|| Datum::from(0)),
        }
    })?;
    supersede::close(ended, Outcome::Redriven)?;
    reach("retry.closed");
    let queue = match changes.queue {
        Some(queue) => queue,
        None => handle::of_job(frontier, guard.queue, lane.queue_id)?,
    };
    append_again(frontier, queue, lane.priority, changes, new)?;
    Ok(Retried::Done)
}

/// `None`: the job does not lie here.
pub fn from_shelf(frontier: &Frontier, shelf: Shelf, job_id: i64, changes: &Changes) -> Result<Option<Retried>> {
    let Some(job) = take_from_shelf(frontier, shelf, job_id, false)? else {
        let completed = sql::as_owner(frontier.ledger, || finished::standing(shelf, job_id))?.is_some();
        return Ok(completed.then_some(Retried::Completed));
    };
    reach("retry.taken_from_shelf");
    again(frontier, &job, changes)?;
    Ok(Some(Retried::Done))
}

/// Deletes the row of a job, in the order of locks. A row that this transaction's snapshot does not show is a conflict, not a miss.
pub fn take_from_shelf(frontier: &Frontier, shelf: Shelf, job_id: i64, completed_too: bool) -> Result<Option<Finished>> {
    let wanted = |outcome: Outcome| completed_too || outcome.is_retryable();
    loop {
        if !sql::as_owner(frontier.ledger, || finished::standing(shelf, job_id))?.is_some_and(wanted) {
            return Ok(None);
        }
        let _open = ready::open_for_write(&frontier.open_segment()?)?;
        frontier.check_current()?;
        notes::reserve(frontier, 1)?;
        reach("retry.shelf_found");
        if let Some(job) = sql::as_owner(frontier.ledger, || finished::take(shelf, job_id, completed_too))? {
            let mut gone = Counts::default();
            notes::count_finished(&mut gone, job.outcome, 1);
            note_gone(frontier, job.queue_id, gone);
            return Ok(Some(job));
        }
        if xact::isolation_uses_snapshot() {
            return Err(Error::new(
                Code::ERRCODE_T_R_SERIALIZATION_FAILURE,
                format!("job {job_id} was finished or moved by a transaction that this one does not see"),
            )
            .hint("Run the transaction again."));
        }
        xact::check_for_interrupts();
    }
}

/// Finished jobs of this queue are counted no more once the transaction commits. Room for the note was reserved.
pub fn note_gone(frontier: &Frontier, queue_id: i32, counts: Counts) {
    if let Some(queue) = handle::place_of(frontier, queue_id) {
        notes::push(notes::Note::HistoryGone { queue, queue_id, counts });
    }
}

/// Appends the next copy of a job that was taken from its shelf.
pub fn again(frontier: &Frontier, job: &Finished, changes: &Changes) -> Result<()> {
    let queue = match changes.queue {
        Some(queue) => queue,
        None => handle::by_id(frontier, job.queue_id)?,
    };
    let new = NewEntry {
        key: 0,
        job_id: job.job_id,
        lane: 0,
        hop: job.hop + 1,
        kind_id: job.kind_id,
        attempt: 0,
        max_attempts: job.max_attempts,
        enqueued_at: job.enqueued_at,
        tags: job.tags,
        metadata: job.metadata,
        errors: job.errors,
        args: job.args.unwrap_or_else(|| Datum::from(0)),
    };
    append_again(frontier, queue, job.priority, changes, new)
}

fn append_again(frontier: &Frontier, queue: Queue, priority: u8, changes: &Changes, mut new: NewEntry) -> Result<()> {
    let priority = changes.priority.unwrap_or(priority);
    let sub = if changes.run_at.is_some() { SubLane::Scheduled } else { SubLane::Immediate };
    new.lane = Lane { queue_id: queue.queue_id, priority, sub }.number();
    new.key = changes.run_at.unwrap_or(0);
    enqueue::append(frontier, queue, priority, sub, vec![new])
}
