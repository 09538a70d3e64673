//! Jobs outside the ring: those that were carried out of their segment long before they are due. They come back in time, or when
//! somebody wants to end them.
//!
//! Locks: RowExclusive on ready_entries of the open segment, before anything else, to the end of the transaction; rows of
//! awa.deferred_jobs. Rows written: a row leaves awa.deferred_jobs and the next copy of the job is appended, in one transaction.
//! A session that looks again and again (the maintainer) remembers when it need not: see `promote_if_due`.
//! A pass takes at most 512 rows. One that cannot be appended is set aside with the reason, the others go on.

use std::cell::Cell;

use awa_protocol::lane::{Lane, SubLane};
use awa_protocol::limits::JOBS_PER_CARRY;
use awa_protocol::queue::Existence;
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, notes};
use crate::ops::enqueue;
use crate::ops::handle::Queue;
use crate::ops::rotate::refuse_old_snapshot;
use crate::ops::tasks::Outcome;
use crate::pg::call::warn;
use crate::pg::points::reach;
use crate::pg::rel::Rel;
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::ready::{self, NewEntry};
use crate::store::{deferred, instance, queues};

/// How long a row that could not be appended is left alone, in microseconds.
const SET_ASIDE: i64 = 60_000_000;

/// When a look found nothing to bring back, and until when there will be nothing.
#[derive(Clone, Copy, Default)]
struct Quiet {
    word: u64,
    since: i64,
    until: i64,
}

thread_local! {
    static QUIET: Cell<Quiet> = const { Cell::new(Quiet { word: 0, since: 0, until: 0 }) };
}

/// As `promote`, but not at each tick: while old snapshots keep dead rows, each look walks over all that were brought back before.
/// A row that is put here is due later than now + awa.deferral, so that an eighth of it passes before one can have been missed.
pub fn promote_if_due(frontier: &Frontier) -> Result<Outcome> {
    let (quiet, now) = (QUIET.get(), xact::now());
    // A clock that was set back ends it too.
    if quiet.word == frontier.word() && quiet.since <= now && now < quiet.until {
        return Ok(Outcome::new("nothing"));
    }
    promote(frontier)
}

/// Brings jobs back into the ring when less than half of awa.deferral is left.
pub fn promote(frontier: &Frontier) -> Result<Outcome> {
    if !notes::is_empty() {
        return Err(Error::new(
            Code::ERRCODE_ACTIVE_SQL_TRANSACTION,
            "cannot bring jobs back into the ring in a transaction that has used the queue",
        )
        .hint("Call awa.promote_deferred() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.promote_deferred()")?;
    QUIET.set(Quiet::default());
    let (now, lead) = (xact::now(), settings::deferral() / 2);
    let until = now.saturating_add(lead);
    let next = sql::as_owner(frontier.ledger, deferred::next_look)?;
    if next.is_none_or(|next| next >= until) {
        let due = next.map_or(i64::MAX, |next| next.saturating_sub(lead));
        QUIET.set(Quiet { word: frontier.word(), since: now, until: due.min(now.saturating_add(lead / 4)) });
        return Ok(Outcome::new("nothing"));
    }
    if frontier.open_segment().is_err() {
        return Ok(Outcome::new("nothing"));
    }
    let _ready = hold_ring(frontier)?;
    sql::as_owner(frontier.ledger, instance::check)?;
    let mut due = sql::as_owner(frontier.ledger, || deferred::take_due(until, JOBS_PER_CARRY))?;
    let more = due.len() == JOBS_PER_CARRY;
    due.sort_unstable_by_key(|entry| (entry.lane, entry.key, entry.job_id));
    reach("promote.taken");
    let mut report = Report::default();
    // All at once; if that fails, each by itself, so that one bad row holds up nobody.
    let together = xact::subtransaction(|| due.chunk_by(|a, b| a.lane == b.lane).try_for_each(|lane| append(frontier, lane)));
    match together {
        Ok(()) => report.promoted = due.len() as i64,
        Err(error) => {
            pass_on(error)?;
            for entry in &due {
                promote_alone(frontier, entry, &mut report)?;
            }
        }
    }
    let outcome = match (report.promoted, report.set_aside) {
        (0, 0) => "nothing",
        (0, _) => "set_aside",
        _ => "promoted",
    };
    let trouble = report.set_aside > 0;
    Ok(Outcome { rows: report.promoted, detail: report.detail(), more, trouble, ..Outcome::new(outcome) })
}

#[derive(Default)]
struct Report {
    promoted: i64,
    discarded: i64,
    set_aside: i64,
    problem: Option<String>,
}

impl Report {
    fn detail(self) -> Option<String> {
        let mut parts = Vec::new();
        if self.discarded > 0 {
            parts.push(format!("{} of dropped queues are discarded", self.discarded));
        }
        if let Some(problem) = self.problem {
            parts.push(format!("{} are set aside: {problem}", self.set_aside));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

fn promote_alone(frontier: &Frontier, entry: &NewEntry, report: &mut Report) -> Result<()> {
    let queue_id = Lane::from_number(entry.lane).queue_id;
    if place_of(frontier, queue_id).is_none() && sql::as_owner(frontier.ledger, queues::dropped_ids)?.contains(&queue_id) {
        report.discarded += 1;
        return Ok(());
    }
    let Err(error) = xact::subtransaction(|| append(frontier, std::slice::from_ref(entry))) else {
        report.promoted += 1;
        return Ok(());
    };
    let error = pass_on(error)?;
    let look_at = xact::now().saturating_add(settings::deferral() / 2 + SET_ASIDE);
    sql::as_owner(frontier.ledger, || deferred::set_aside(entry, look_at, &error.message))?;
    report.set_aside += 1;
    if report.problem.is_none() {
        warn(Error {
            message: format!("job {} cannot come back into the ring: {}", entry.job_id, error.message),
            ..error.clone()
        });
        report.problem = Some(error.message);
    }
    Ok(())
}

/// What is not the fault of a row ends the pass.
fn pass_on(error: Error) -> Result<Error> {
    let not_of_the_row = [
        Code::ERRCODE_QUERY_CANCELED,
        Code::ERRCODE_ADMIN_SHUTDOWN,
        Code::ERRCODE_CRASH_SHUTDOWN,
        Code::ERRCODE_T_R_SERIALIZATION_FAILURE,
        Code::ERRCODE_T_R_DEADLOCK_DETECTED,
        Code::ERRCODE_LOCK_NOT_AVAILABLE,
    ];
    if not_of_the_row.contains(&error.code) { Err(error) } else { Ok(error) }
}

/// Does this job of a live queue wait outside the ring?
pub fn waits_outside(frontier: &Frontier, job_id: i64) -> Result<bool> {
    let lane = sql::as_owner(frontier.ledger, || deferred::lane_of(job_id))?;
    Ok(lane.is_some_and(|lane| place_of(frontier, Lane::from_number(lane).queue_id).is_some()))
}

/// For a caller who wants to end this job. True: look again in the ring, it is there now or somebody else has just taken it.
pub fn bring_back(frontier: &Frontier, job_id: i64) -> Result<bool> {
    let Some(lane) = sql::as_owner(frontier.ledger, || deferred::lane_of(job_id))? else { return Ok(false) };
    if place_of(frontier, Lane::from_number(lane).queue_id).is_none() {
        return Ok(false);
    }
    let _ready = hold_ring(frontier)?;
    match sql::as_owner(frontier.ledger, || deferred::take_one(job_id))? {
        Some(entry) => append(frontier, &[entry])?,
        None if xact::isolation_uses_snapshot() => {
            return Err(Error::new(
                Code::ERRCODE_T_R_SERIALIZATION_FAILURE,
                format!("job {job_id} was moved after the snapshot of this transaction was taken"),
            )
            .hint("Run the transaction again."));
        }
        None => {}
    }
    Ok(true)
}

/// A rebuild counts the deferred jobs; with a segment locked it waits for us, or we for it.
fn hold_ring(frontier: &Frontier) -> Result<Rel> {
    let ready = ready::open_for_write(&frontier.open_segment()?)?;
    frontier.check_current()?;
    Ok(ready)
}

fn place_of(frontier: &Frontier, queue_id: i32) -> Option<Queue> {
    (0..frontier.queue_slots()).find_map(|place| {
        let queue = frontier.queue(place);
        (queue.queue_id == queue_id && queue.existence == Existence::Live).then(|| Queue::at(place, &queue))
    })
}

/// Rows of one lane, as the next copies of their jobs.
fn append(frontier: &Frontier, rows: &[NewEntry]) -> Result<()> {
    let Some(first) = rows.first() else { return Ok(()) };
    let lane = Lane::from_number(first.lane);
    let queue = place_of(frontier, lane.queue_id)
        .ok_or_else(|| Error::new(Code::ERRCODE_UNDEFINED_OBJECT, format!("queue number {} does not exist", lane.queue_id)))?;
    let copies = rows.iter().map(|row| NewEntry { hop: row.hop + 1, ..*row }).collect();
    enqueue::append(frontier, queue, lane.priority, SubLane::Scheduled, copies)?;
    notes::reserve(frontier, 1)?;
    notes::push(notes::Note::Undeferred { queue: queue.place, queue_id: lane.queue_id, rows: rows.len() as i64 });
    Ok(())
}
