//! Retention: history that outlives its segment, and its end.
//!
//! `keep` copies finished jobs whose retention is not over out of a drained segment, in the transaction that says that its prune has
//! begun: from that commit on the segment is not read any more, so a job is shown and counted once at any time. `expire` deletes what
//! has been kept long enough, in bounded steps. Locks: RowExclusive on awa.retained_jobs or awa.dlq_entries. Never waits.

use std::cell::Cell;
use std::collections::BTreeMap;

use awa_protocol::limits::RETENTION_ROWS;
use awa_protocol::queue::Counts;

use crate::error::Result;
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::retry::note_gone;
use crate::ops::tasks::Outcome;
use crate::pg::rel::{Lock, Rel};
use crate::pg::{sql, xact};
use crate::store::finished::{self, Shelf};
use crate::store::{instance, queues};

/// `history`: the finished jobs of the segment by queue; what is kept is taken off, the rest goes with the segment.
pub fn keep(frontier: &Frontier, info: &SegmentInfo, history: &mut BTreeMap<i32, Counts>) -> Result<()> {
    let definitions = sql::as_owner(frontier.ledger, queues::all_live)?;
    let (mut closed, mut completed) = (false, false);
    for definition in &definitions {
        let Some(counts) = history.get(&definition.queue_id) else { continue };
        let settings = &definition.settings;
        closed |= counts.failed > 0 && settings.failed_retention > 0;
        closed |= counts.cancelled > 0 && settings.cancelled_retention > 0;
        completed |= counts.completed > 0 && settings.completed_retention > 0;
    }
    let now = xact::now();
    for (wanted, by_completion) in [(closed, false), (completed, true)] {
        if !wanted {
            continue;
        }
        let kept = sql::as_owner(frontier.ledger, || finished::keep(info.generation, info.slot, by_completion, now))?;
        for (queue_id, counts) in kept {
            notes::take_off(history.entry(queue_id).or_default(), &counts);
        }
    }
    Ok(())
}

thread_local! {
    /// The frontier, when this session found nothing to delete, and until when it does not look again.
    static QUIET: Cell<(u64, i64, i64)> = const { Cell::new((0, 0, 0)) };
}

/// Nobody waits for history to go, and while old snapshots keep dead rows each look walks over all that were deleted before.
const QUIET_TIME: i64 = 10_000_000;

/// As `expire`, but not at each tick.
pub fn expire_if_due(frontier: &Frontier) -> Result<Outcome> {
    let ((word, since, until), now) = (QUIET.get(), xact::now());
    if word == frontier.word() && since <= now && now < until {
        return Ok(Outcome::new("nothing"));
    }
    let outcome = expire(frontier)?;
    let is_quiet = outcome.outcome == "nothing";
    QUIET.set(if is_quiet { (frontier.word(), now, now.saturating_add(QUIET_TIME)) } else { (0, 0, 0) });
    Ok(outcome)
}

/// One step: deletes at most `RETENTION_ROWS` finished jobs whose time is over, or whose queue was dropped.
pub fn expire(frontier: &Frontier) -> Result<Outcome> {
    let now = xact::now();
    let mut deleted = 0;
    let mut more = false;
    for shelf in Shelf::ALL {
        // A rebuild is counting the rows: it will be over soon, and nobody needs this now.
        let Some(_rows) = Rel::open_if_lockable(shelf.table()?, Lock::RowExclusive)? else {
            return Ok(Outcome::skipped("skipped_busy", "another session has locked the finished jobs"));
        };
        frontier.check_current()?;
        sql::as_owner(frontier.ledger, instance::check)?;
        let gone = sql::as_owner(frontier.ledger, || finished::expire(shelf, now, RETENTION_ROWS))?;
        notes::reserve(frontier, gone.len())?;
        let mut rows = 0;
        for (queue_id, counts) in gone {
            rows += counts.completed + counts.failed + counts.cancelled + counts.dead_lettered;
            note_gone(frontier, queue_id, counts);
        }
        more |= rows >= RETENTION_ROWS as i64;
        deleted += rows;
    }
    if deleted == 0 {
        return Ok(Outcome::new("nothing"));
    }
    Ok(Outcome { rows: deleted, more, ..Outcome::new("deleted") })
}
