//! Prune: give back the space of the oldest drained segment, without a dead tuple.
//!
//! One step a call, each its own transaction: a first call proves that the segment is drained and says so in the ledger; a later one, at
//! least `awa.prune_grace` after, takes AccessExclusive on its tables if nobody is there, proves again and truncates them in place,
//! ready entries first and evidence last. Truncation is not undone by a rollback: until "pruned" is committed, the slot is neither read
//! nor opened, and the next prune truncates it again.

use std::collections::BTreeMap;

use awa_protocol::lane::Lane;
use awa_protocol::queue::Counts;
use awa_protocol::rebuild::Fate;
use awa_protocol::ring::{Segment, SegmentState};
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, SegmentInfo, build, notes};
use crate::ops::retention;
use crate::ops::rotate::refuse_old_snapshot;
use crate::ops::tasks::Outcome;
use crate::pg::rel::{Lock, Rel, lock_conflicts};
use crate::pg::scan::{HeapScan, RowState};
use crate::pg::truncate::{truncate_in_place, truncation_is_safe_here};
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::{instance, ledger, queues, segments};

pub fn prune(frontier: &Frontier) -> Result<Outcome> {
    if !notes::is_empty() {
        return Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot prune in a transaction that has used the queue")
            .hint("Call awa.prune() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.prune()")?;
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else {
        return Ok(Outcome::skipped("skipped_busy", "another session is rotating or pruning"));
    };
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, instance::check)?;
    let ring = sql::as_owner(frontier.ledger, ledger::read)?;
    let Some(segment) = ring.prune_candidate().copied() else {
        return Ok(Outcome::skipped("nothing", "no sealed segment"));
    };
    let info = segments::locate(&segment)?;
    match segment.state {
        SegmentState::PruneStarted => truncate(frontier, &segment, &info),
        _ => start(frontier, &segment, &info),
    }
}

fn about(outcome: &'static str, segment: &Segment, detail: Option<String>) -> Outcome {
    Outcome { detail, ..Outcome::of_segment(outcome, segment.generation, segment.slot) }
}

fn holders(pids: &[i32]) -> Option<String> {
    let names: Vec<String> =
        pids.iter().map(|pid| if *pid == 0 { "a prepared transaction".to_owned() } else { format!("process {pid}") }).collect();
    Some(format!("held by {}", names.join(", ")))
}

fn start(frontier: &Frontier, segment: &Segment, info: &SegmentInfo) -> Result<Outcome> {
    let writers = lock_conflicts(info.ready, Lock::Share);
    if !writers.is_empty() {
        return Ok(about("blocked", segment, holders(&writers)));
    }
    // To the end of the transaction: nobody supersedes the end of a job whose fate is being decided here.
    let Some(_quiet) = Rel::open_if_lockable(info.ready, Lock::Share)? else {
        return Ok(about("blocked", segment, holders(&lock_conflicts(info.ready, Lock::Share))));
    };
    let mut history = BTreeMap::new();
    if let Some(reason) = unfinished(frontier, info, &mut history)? {
        return Ok(about("skipped_active", segment, Some(reason)));
    }
    retention::keep(frontier, info, &mut history)?;
    sql::as_owner(frontier.ledger, || ledger::append(segment.generation, segment.slot, "prune_started", xact::now()))?;
    notes::reserve(frontier, 1 + usize::from(frontier.queue_slots()))?;
    notes::push(notes::Note::SegmentPruneStarted { generation: segment.generation });
    for place in 0..frontier.queue_slots() {
        let queue_id = frontier.queue(place).queue_id;
        if let Some(counts) = history.get(&queue_id) {
            notes::push(notes::Note::HistoryGone { queue: place, queue_id, counts: *counts });
        }
    }
    xact::force_synchronous_commit();
    Ok(about("prune_started", segment, None))
}

/// Per job, never by counting: every committed copy must be closed, and no row may be of an unfinished transaction.
/// `history`: finished jobs by queue.
fn unfinished(frontier: &Frontier, info: &SegmentInfo, history: &mut BTreeMap<i32, Counts>) -> Result<Option<String>> {
    let rel = Rel::open(info.ready, Lock::AccessShare)?;
    let fold = build::read_evidence(info, false)?.fold;
    // From the table, not from memory: a queue that is not known to have been dropped is alive.
    let dropped = sql::as_owner(frontier.ledger, queues::dropped_ids)?;
    let mut scan = HeapScan::begin(&rel);
    while let Some(row) = scan.next() {
        match row.state() {
            RowState::Dead => {}
            RowState::Own(_) | RowState::InProgress(_) => {
                return Ok(Some("a row belongs to an unfinished transaction".to_owned()));
            }
            RowState::Committed => {
                let seen = build::ready_row(&row);
                let queue_id = Lane::from_number(seen.lane).queue_id;
                let open = match fold.fate(seen.job_id, seen.hop) {
                    Fate::Closed(outcome) => {
                        if outcome.is_history() {
                            notes::count_finished(history.entry(queue_id).or_default(), outcome, 1);
                        }
                        None
                    }
                    Fate::Open(_) => Some("running"),
                    Fate::Ready => Some("waiting"),
                };
                if let Some(state) = open.filter(|_| !dropped.contains(&queue_id)) {
                    return Ok(Some(format!("job {} is {state}", seen.job_id)));
                }
            }
        }
    }
    Ok(None)
}

fn truncate(frontier: &Frontier, segment: &Segment, info: &SegmentInfo) -> Result<Outcome> {
    let started = sql::as_owner(frontier.ledger, || ledger::started_at(segment.generation))?.unwrap_or(i64::MIN);
    let due = started.saturating_add(settings::prune_grace());
    if xact::now() < due {
        return Ok(about("waiting", segment, Some(format!("{} ms of awa.prune_grace are left", (due - xact::now()) / 1000))));
    }
    if !truncation_is_safe_here() {
        return Err(Error::new(
            Code::ERRCODE_FEATURE_NOT_SUPPORTED,
            "this release of the server cannot truncate a table in place safely",
        )
        .detail("Releases before 14.16, 15.11, 16.7 and 17.3 lack a fix that truncation needs.")
        .hint("Update the server to the newest minor release."));
    }
    // Ready entries first: with them locked nobody can begin to use the segment.
    let mut tables = Vec::new();
    for oid in [info.ready, info.closures, info.done, info.claims] {
        let conflicts = lock_conflicts(oid, Lock::AccessExclusive);
        if !conflicts.is_empty() {
            return Ok(about("blocked", segment, holders(&conflicts)));
        }
        match Rel::open_if_lockable(oid, Lock::AccessExclusive)? {
            Some(rel) => tables.push(rel),
            None => return Ok(about("blocked", segment, holders(&lock_conflicts(oid, Lock::AccessExclusive)))),
        }
    }
    if let Some(reason) = unfinished(frontier, info, &mut BTreeMap::new())? {
        return Err(Error::new(
            Code::ERRCODE_DATA_CORRUPTED,
            format!("segment {} has unfinished jobs after it was proved drained", segment.generation),
        )
        .detail(format!("Found: {reason}."))
        .hint("Nothing was truncated. Run awa.verify()."));
    }
    for table in &tables {
        truncate_in_place(table)?;
    }
    sql::as_owner(frontier.ledger, || ledger::append(segment.generation, segment.slot, "pruned", xact::now()))?;
    notes::reserve(frontier, 1)?;
    notes::push(notes::Note::SegmentPruned { generation: segment.generation, slot: segment.slot });
    xact::force_synchronous_commit();
    Ok(about("pruned", segment, None))
}
