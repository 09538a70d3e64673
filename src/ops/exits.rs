//! How a running attempt ends: complete, fail, snooze. One decision point, the in-flight entry, for every exit.
//!
//! Locks: RowExclusive on ready_entries and on the evidence table of the job's segment, to the end of the transaction.
//! Rows written: one done row a segment for a batch of completions; one closure for any other exit, plus the ready entry of the next
//! attempt. Waits: for the transaction of another caller who is ending the same attempt; briefly for the claim's own commit.
//! Durable when the caller's transaction is. A crash before that: the attempt is open again, with its lease.

use std::collections::BTreeMap;

use awa_protocol::attempt::{Entry, EntryRef, Exit, State, decide_exit};
use awa_protocol::backoff;
use awa_protocol::lane::{Lane, SubLane};
use awa_protocol::lifecycle::{Outcome, after_failure};
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result, reserve};
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::handle;
use crate::ops::taking::is_row_of;
use crate::ops::{dlq, enqueue};
use crate::pg::points::reach;
use crate::pg::rel::Rel;
use crate::pg::scan::{IndexScan, RawRow, TidFetch, XidState, has_ended, is_own, next_full_xid, xid_state};
use crate::pg::xact;
use crate::store::errors;
use crate::store::evidence::{self, Closure, Copies};
use crate::store::ready::{self, NewEntry};

/// What became of a request to end an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Done(Outcome),
    Already,
    Conflict(Outcome),
    Stale,
    ClaimUncommitted,
}

impl Answer {
    pub fn name(self) -> &'static str {
        match self {
            Self::Done(outcome) => outcome.name(),
            Self::Already => "already",
            Self::Conflict(_) => "conflict",
            Self::Stale => "stale",
            Self::ClaimUncommitted => "claim_uncommitted",
        }
    }

    /// For the fenced single call: anything but success is an error, so that the caller's other writes roll back with it.
    pub fn or_raise(self, job_id: i64, lease: i64) -> Result<Self> {
        let error = |message: String| Error::new(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, message);
        match self {
            Self::Done(_) | Self::Already => Ok(self),
            Self::Stale => Err(error(format!("lease {lease} of job {job_id} is not current"))
                .detail("The attempt was finished, cancelled or given to another worker, or it never existed.")
                .hint("Discard the work of this attempt; awa.job() shows the state of the job.")),
            Self::Conflict(outcome) => Err(error(format!("job {job_id} has already ended in this transaction"))
                .detail(format!("The outcome of the attempt was \"{}\".", outcome.name()))),
            Self::ClaimUncommitted => {
                Err(Error::new(Code::ERRCODE_OBJECT_IN_USE, format!("the claim of job {job_id} is not committed"))
                    .detail("Only the claiming transaction may finish the attempt before it commits.")
                    .hint("Commit the claim, then try again."))
            }
        }
    }
}

/// How long a call that finishes attempts waits for commits of claims, all in all.
pub const CLAIM_COMMIT_WAITS: u32 = 100;
pub const CLAIM_COMMIT_WAIT_MS: i64 = 1;

/// Is the claim's transaction unfinished, or aborted a moment ago, its entry about to be given back? An entry that has outlived a
/// million transactions is settled: its claim is not looked up in a commit log that may be gone.
pub fn is_unsettled(claim_xid: u64) -> bool {
    if next_full_xid().saturating_sub(claim_xid) < 1_000_000 {
        xid_state(claim_xid) != XidState::Committed
    } else {
        !has_ended(claim_xid)
    }
}

/// Marks the attempt as ending by this transaction. `Ok(Err(answer))`: it is not for this caller to end.
fn begin(
    frontier: &Frontier,
    job_id: i64,
    lease: i64,
    outcome: Outcome,
    patience: &mut u32,
) -> Result<std::result::Result<(EntryRef, Entry), Answer>> {
    let partition = frontier.partition_of(job_id);
    let holds = |entry: &Entry| entry.state == State::Claimed && entry.lease == lease;
    loop {
        let found = frontier.with_partition(partition, |entries| {
            let slot = entries.find(job_id, holds)?;
            let stamp = entries.stamp_of(slot);
            entries.get(slot).map(|entry| (EntryRef { partition, slot, stamp }, *entry))
        });
        let Some((name, entry)) = found else {
            frontier.check_current()?;
            return Ok(Err(Answer::Stale));
        };
        reach("exit.found");
        match decide_exit(&entry, Some(lease), outcome, is_own, is_unsettled) {
            Exit::Stale => return Ok(Err(Answer::Stale)),
            Exit::Already => return Ok(Err(Answer::Already)),
            Exit::Conflict(other) => return Ok(Err(Answer::Conflict(other))),
            Exit::WaitForCloser(xid) => xact::wait_for_xid(xid),
            Exit::ClaimUncommitted(_) if *patience > 0 => {
                *patience -= 1;
                crate::frontier::nap(CLAIM_COMMIT_WAIT_MS);
            }
            Exit::ClaimUncommitted(_) => return Ok(Err(Answer::ClaimUncommitted)),
            Exit::Proceed => {
                notes::reserve(frontier, 1)?;
                let xid = xact::current_xid();
                reach("exit.decided");
                // A rebuild resets the partition under this lock: an entry of a current frontier is not a restored one.
                let marked = frontier.with_named(name, |now| frontier.is_current() && now.begin_exit(&entry, xid, outcome));
                frontier.check_current()?;
                if marked == Some(true) {
                    let queue_id = Lane::from_number(entry.lane).queue_id;
                    notes::push(notes::Note::Closing { entry: name, queue: entry.queue, queue_id, outcome });
                    reach("exit.marked");
                    return Ok(Ok((name, entry)));
                }
            }
        }
    }
}

/// Completes a batch; answers in the order of the request.
pub fn complete(frontier: &Frontier, jobs: &[(i64, i64)]) -> Result<Vec<Answer>> {
    let (mut order, mut answers) = (Vec::new(), Vec::new());
    reserve(&mut order, jobs.len())?;
    reserve(&mut answers, jobs.len())?;
    order.extend(0..jobs.len());
    answers.resize(jobs.len(), Answer::Stale);
    order.sort_unstable_by_key(|index| jobs.get(*index));
    let mut patience = CLAIM_COMMIT_WAITS;
    let mut by_segment: BTreeMap<i64, Copies> = BTreeMap::new();
    for index in order {
        let (Some((job_id, lease)), Some(answer)) = (jobs.get(index), answers.get_mut(index)) else { continue };
        *answer = match begin(frontier, *job_id, *lease, Outcome::Completed, &mut patience)? {
            Ok((_, entry)) => {
                by_segment.entry(entry.generation).or_default().push(entry.job_id, entry.hop)?;
                Answer::Done(Outcome::Completed)
            }
            Err(answer) => answer,
        };
    }
    let done_at = xact::now();
    for (generation, copies) in by_segment {
        let (segment, _ready) = segment_of(frontier, generation)?;
        evidence::append_done(&segment, done_at, &copies)?;
        reach("complete.recorded");
    }
    Ok(answers)
}

/// A segment with an unfinished job is never pruned, so it is there.
pub fn segment_of(frontier: &Frontier, generation: i64) -> Result<(SegmentInfo, Rel)> {
    let segment = frontier.segment(generation).ok_or_else(|| {
        Error::new(
            Code::ERRCODE_INTERNAL_ERROR,
            format!("generation {generation} of the ring is gone while one of its jobs runs"),
        )
    })?;
    let ready = ready::open_for_write(&segment)?;
    frontier.check_current()?;
    Ok((segment, ready))
}

/// Looks at the row of an entry: by its place, else by its key.
pub fn with_row<R>(segment: &SegmentInfo, ready: &Rel, entry: &Entry, body: impl FnOnce(&RawRow<'_>) -> R) -> Result<R> {
    let mut fetch = TidFetch::begin(ready);
    if let Some(row) = fetch.fetch(entry.tid)
        && is_row_of(&row, entry)
    {
        return Ok(body(&row));
    }
    let index = ready::open_index(ready, segment)?;
    let mut scan = IndexScan::begin(ready, &index, entry.lane, entry.key)?;
    while let Some((key, row)) = scan.next() {
        if key != entry.key {
            break;
        }
        if is_row_of(&row, entry) {
            return Ok(body(&row));
        }
    }
    Err(Error::new(Code::ERRCODE_DATA_CORRUPTED, format!("the row of job {} is missing", entry.job_id))
        .detail(format!("Copy {} should be in generation {}.", entry.hop, entry.generation))
        .hint("Run awa.verify() and awa.rebuild()."))
}

/// The next copy of a job, as the row of the last one says.
struct NextCopy {
    attempt: i16,
    run_at: i64,
    errors: Option<Datum>,
}

fn append_next(frontier: &Frontier, entry: &Entry, segment: &SegmentInfo, ready: &Rel, next: NextCopy) -> Result<()> {
    let lane = Lane::from_number(entry.lane);
    let new = with_row(segment, ready, entry, |row| {
        let head = ready::head(row);
        NewEntry {
            key: next.run_at,
            job_id: head.job_id,
            lane: Lane { sub: SubLane::Scheduled, ..lane }.number(),
            hop: head.hop + 1,
            kind_id: head.kind_id,
            attempt: next.attempt,
            max_attempts: head.max_attempts,
            enqueued_at: row.i64(ready::ENQUEUED_AT).or(Some(head.key)),
            tags: row.copy_datum(ready::TAGS),
            metadata: row.copy_datum(ready::METADATA),
            errors: next.errors.or_else(|| row.copy_datum(ready::ERRORS)),
            args: row.copy_datum(ready::ARGS).unwrap_or_else(|| Datum::from(0)),
        }
    })?;
    let queue = handle::of_job(frontier, entry.queue, lane.queue_id)?;
    enqueue::append(frontier, queue, lane.priority, SubLane::Scheduled, vec![new])
}

pub struct Failure {
    pub error: Option<Vec<u8>>,
    pub retry_after: Option<i64>,
    pub is_final: bool,
}

/// Ends the attempt as failed: the job is tried again after the queue's backoff, or it is finished.
pub fn fail(frontier: &Frontier, job_id: i64, lease: i64, failure: &Failure) -> Result<Answer> {
    // The verdict needs the entry, the entry is locked by its mark: ask first, mark with the outcome that follows.
    let partition = frontier.partition_of(job_id);
    let seen = frontier.with_partition(partition, |entries| {
        let slot = entries.find(job_id, |entry| entry.state == State::Claimed && entry.lease == lease)?;
        entries.get(slot).copied()
    });
    let Some(seen) = seen else {
        frontier.check_current()?;
        return Ok(Answer::Stale);
    };
    let outcome = failure_outcome(&seen, failure.is_final);
    let entry = match begin(frontier, job_id, lease, outcome, &mut { CLAIM_COMMIT_WAITS })? {
        Ok((_, entry)) => entry,
        Err(answer) => return Ok(answer),
    };
    let outcome = conclude_failure(frontier, &entry, outcome, failure.error.as_deref(), failure.retry_after)?;
    Ok(Answer::Done(outcome))
}

pub fn failure_outcome(entry: &Entry, is_final: bool) -> Outcome {
    after_failure(i32::from(entry.attempt), i32::from(entry.max_attempts), is_final).outcome()
}

/// The evidence of an attempt that failed and that this transaction has marked as closing, whoever found it failed: a worker, or rescue.
pub fn conclude_failure(
    frontier: &Frontier,
    entry: &Entry,
    outcome: Outcome,
    error: Option<&[u8]>,
    retry_after: Option<i64>,
) -> Result<Outcome> {
    let (segment, ready) = segment_of(frontier, entry.generation)?;
    let now = xact::now();
    let before = with_row(&segment, &ready, entry, |row| row.copy_datum(ready::ERRORS))?;
    let history = errors::append(frontier, before, i32::from(entry.attempt), now, error)?;
    // Whether the job is kept as a dead letter is asked of the queue here, for every way to fail; the entry and its mark say "failed".
    let dead_letter = outcome == Outcome::Failed && dlq::wanted(frontier, entry);
    let outcome = if dead_letter { Outcome::DeadLettered } else { outcome };
    if dead_letter {
        notes::amend_last_closing(outcome);
    }
    let closure = Closure {
        closed_at: now,
        job_id: entry.job_id,
        hop: entry.hop,
        tombstone: None,
        outcome,
        errors: (outcome == Outcome::Failed).then_some(history),
    };
    evidence::append_closures(&segment, &[closure])?;
    reach("fail.closed");
    if dead_letter {
        dlq::add(frontier, entry, &segment, &ready, now, history)?;
    }
    if outcome.is_terminal() {
        // The job is finished: nothing more to append.
        return Ok(outcome);
    }
    let delay = match retry_after {
        Some(delay) => delay,
        None => {
            let settings = frontier.queue(entry.queue).settings;
            backoff::delay(settings.backoff, settings.backoff_max, entry.attempt.max(1) as u32, xact::random_u64()?)
        }
    };
    let next = NextCopy { attempt: entry.attempt, run_at: now.saturating_add(delay), errors: Some(history) };
    append_next(frontier, entry, &segment, &ready, next)?;
    Ok(outcome)
}

/// Ends the attempt without using it up: the job runs again after `delay`.
pub fn snooze(frontier: &Frontier, job_id: i64, lease: i64, delay: i64) -> Result<Answer> {
    let entry = match begin(frontier, job_id, lease, Outcome::Snooze, &mut { CLAIM_COMMIT_WAITS })? {
        Ok((_, entry)) => entry,
        Err(answer) => return Ok(answer),
    };
    let (segment, ready) = segment_of(frontier, entry.generation)?;
    let now = xact::now();
    let closure = Closure { closed_at: now, job_id, hop: entry.hop, tombstone: None, outcome: Outcome::Snooze, errors: None };
    evidence::append_closures(&segment, &[closure])?;
    reach("snooze.closed");
    let next = NextCopy { attempt: entry.attempt - 1, run_at: now.saturating_add(delay), errors: None };
    append_next(frontier, &entry, &segment, &ready, next)?;
    Ok(Answer::Done(Outcome::Snooze))
}

/// Says that the attempt is alive. Writes nothing to disk.
pub fn heartbeat(frontier: &Frontier, job_id: i64, lease: i64) -> Result<bool> {
    let now = xact::now();
    Ok(touch(frontier, job_id, lease, |entry| entry.heartbeat_at = entry.heartbeat_at.max(now))?.is_some())
}

/// Moves the deadline of the attempt to `by` from now. Memory only: after a crash the later of the claimed deadline and a grace holds.
pub fn extend(frontier: &Frontier, job_id: i64, lease: i64, by: i64) -> Result<Option<i64>> {
    let now = xact::now();
    touch(frontier, job_id, lease, |entry| {
        entry.deadline = now.saturating_add(by);
        entry.heartbeat_at = entry.heartbeat_at.max(now);
        entry.deadline
    })
}

fn touch<R>(frontier: &Frontier, job_id: i64, lease: i64, body: impl FnOnce(&mut Entry) -> R) -> Result<Option<R>> {
    let touched = frontier.with_partition(frontier.partition_of(job_id), |entries| {
        let slot = entries.find(job_id, |entry| entry.is_alive(lease))?;
        entries.get_mut(slot).map(body)
    });
    // While the frontier is built, nothing is there.
    if touched.is_none() {
        frontier.check_current()?;
    }
    Ok(touched)
}
