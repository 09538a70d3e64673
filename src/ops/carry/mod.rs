//! Carry forward: append the few open jobs of an old segment again, so that it can be pruned.
//!
//! `census` counts what is open, `step` moves up to 512 jobs in the caller's transaction: `waiting` those that nobody has, `running`
//! those that somebody has. This file decides which segment, and which of its jobs.
//!
//! Locks: RowExclusive on ready_entries of the old segment, if it is free, then of the open one; then on closures of the old and claims
//! of the open one; to the end of the transaction. Rows written: for each job a closure "moved" in the old segment and its next copy,
//! in the open segment or in awa.deferred_jobs; for a running one also its claim. Waits for no transaction: a job that somebody is
//! claiming, finishing or cancelling, and a row of an unfinished transaction, is left for the next step.
//! A crash or a rollback at any step: the rows belong to a transaction that never committed, the jobs are where they were.

mod census;
mod running;
mod stalled;
mod step;
mod waiting;

use awa_protocol::carry::{Pressure, Verdict};
use awa_protocol::ring::SegmentState;
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::rotate::refuse_old_snapshot;
use crate::ops::tasks::Outcome;
use crate::pg::sql;
use crate::settings;
use crate::store::instance;
use census::Census;
use stalled::Stalled;
use step::Step;

/// Which jobs that could run at once are moved. One that is moved goes behind those that were enqueued meanwhile.
#[derive(Clone, Copy)]
enum Due<'a> {
    /// An operator wants the segment empty, or the ring can grow no more: with a constant load of higher priority nobody may ever come for
    /// the jobs of the oldest segment.
    All,
    /// Only those that nobody is coming for: of queues that are paused or from which nobody claims.
    Stalled(&'a Stalled),
}

/// One step by the policy of the settings: the oldest segment that holds few open jobs, if the ring is long.
pub fn carry_forward(frontier: &Frontier) -> Result<Outcome> {
    begin(frontier)?;
    let live = frontier.live_segments();
    let ring = Pressure {
        live: live.len(),
        wanted: settings::ring_segments(),
        most: settings::ring_segments_max(),
        jobs: settings::carry_jobs(),
    };
    let mut sealed = live.iter().filter(|info| info.state == SegmentState::Sealed).peekable();
    if !ring.is_felt() || ring.jobs == 0 || sealed.peek().is_none() {
        return Ok(Outcome::new("nothing"));
    }
    let mut skipped = None;
    let pool = census::by_generation(frontier)?;
    let stalled = Stalled::look(frontier);
    for (number, info) in sealed.enumerate() {
        if stalled::is_put_off(frontier, info.generation) {
            continue;
        }
        let outcome = match Census::take(frontier, info, &pool, ring.jobs)? {
            None => Some(blocked(info)),
            // The step finds out, and is bounded: better than to leave a few jobs among many tombstones for ever.
            Some(census) if !census.is_counted => Some(Step::run(frontier, info, Due::Stalled(&stalled))?),
            Some(census) => match ring.verdict(census.open, number == 0) {
                Verdict::Drained if !census.expected => None,
                // Only what memory still expects of it is to be read, and settled: there is nothing to tell.
                Verdict::Drained => {
                    let outcome = Step::run(frontier, info, Due::Stalled(&stalled))?;
                    (outcome.outcome != "nothing").then_some(outcome)
                }
                Verdict::Dense => Some(about(info, "skipped_active", format!("more than {} jobs are open", ring.jobs))),
                Verdict::Carry if number == 0 && ring.is_full() => Some(Step::run(frontier, info, Due::All)?),
                Verdict::Carry => Some(Step::run(frontier, info, Due::Stalled(&stalled))?),
            },
        };
        match outcome {
            Some(outcome) if outcome.rows > 0 => return Ok(outcome),
            other => {
                stalled::put_off(frontier, info.generation);
                skipped = skipped.or(other);
            }
        }
    }
    Ok(skipped.unwrap_or_else(|| Outcome::new("nothing")))
}

/// One step out of this segment, whatever is in it.
pub fn carry_segment(frontier: &Frontier, generation: i64) -> Result<Outcome> {
    begin(frontier)?;
    let sealed = frontier.segment(generation).filter(|info| info.state == SegmentState::Sealed);
    let Some(info) = sealed else {
        return Err(Error::new(
            Code::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("generation {generation} is not a sealed segment"),
        )
        .hint("See awa.stat_segments; the open segment is sealed by awa.rotate()."));
    };
    Step::run(frontier, &info, Due::All)
}

fn begin(frontier: &Frontier) -> Result<()> {
    if !notes::is_empty() {
        return Err(Error::new(
            Code::ERRCODE_ACTIVE_SQL_TRANSACTION,
            "cannot carry jobs in a transaction that has used the queue",
        )
        .hint("Call awa.carry_forward() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.carry_forward()")?;
    sql::as_owner(frontier.ledger, instance::check)
}

fn about(info: &SegmentInfo, outcome: &'static str, detail: String) -> Outcome {
    Outcome { detail: Some(detail), ..Outcome::of_segment(outcome, info.generation, info.slot) }
}

/// Somebody keeps every writer out of the segment.
fn blocked(info: &SegmentInfo) -> Outcome {
    about(info, "blocked", "another session holds a lock on the segment".to_owned())
}
