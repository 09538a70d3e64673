//! Prune: give back the space of drained segments, without a dead tuple.
//!
//! One step a call, each its own transaction: one proves that a segment is drained and says so in the ledger; a later one, at
//! least `awa.prune_grace` after, takes AccessExclusive on its tables if nobody is there, proves again and truncates them in place,
//! ready entries first and evidence last. Truncation is not undone by a rollback: until "pruned" is committed, the slot is neither read
//! nor opened, and the next prune truncates it again. Any sealed segment may go; what holds one does not stop the others.
//! Locks: ShareRowExclusive on the ledger; Share, later AccessExclusive, on the segment; all only if they are free.

mod patience;

pub use patience::look_soon;

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
use crate::ops::standing::{self, Standing};
use crate::ops::tasks::{Outcome, is_of_a_row};
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel, lock_conflicts};
use crate::pg::scan::{HeapScan, RowState};
use crate::pg::truncate::{truncate_in_place, truncation_is_safe_here};
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::{instance, ledger, queues, segments};

/// By hand: what memory says of a segment only orders the work.
pub fn prune(frontier: &Frontier) -> Result<Outcome> {
    refuse(frontier)?;
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else { return Ok(busy()) };
    step(frontier, |oldest, standing| oldest || standing.looks_drained())
}

/// As the maintainer does: a segment is read only if memory knows of nothing open in it, or when it has not been read for long.
pub fn prune_if_due(frontier: &Frontier) -> Result<Outcome> {
    refuse(frontier)?;
    let old = old_segments(frontier);
    if old.is_empty() {
        return Ok(Outcome::new("nothing"));
    }
    let now = xact::now();
    let standings = standing::of_segments(frontier, &old);
    let promising = old.iter().zip(&standings).any(|(segment, standing)| {
        segment.state == SegmentState::PruneStarted || patience::is_worth_a_proof(frontier, standing, now)
    });
    if !promising {
        let detail = old.first().zip(standings.first()).map(|(segment, standing)| Outcome {
            detail: Some(standing.detail()),
            ..Outcome::of_segment("skipped_active", segment.generation, segment.slot)
        });
        return Ok(detail.unwrap_or_else(|| Outcome::new("nothing")));
    }
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else { return Ok(busy()) };
    step(frontier, |_, standing| patience::is_worth_a_proof(frontier, standing, now))
}

fn refuse(frontier: &Frontier) -> Result<()> {
    if !notes::is_empty() {
        return Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot prune in a transaction that has used the queue")
            .hint("Call awa.prune() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.prune()")?;
    // What prepared transactions have left is counted late.
    notes::settle_prepared(frontier);
    Ok(())
}

fn busy() -> Outcome {
    Outcome::skipped("skipped_busy", "another session is rotating or pruning")
}

fn old_segments(frontier: &Frontier) -> Vec<SegmentInfo> {
    frontier.live_segments().into_iter().filter(|segment| segment.state != SegmentState::Open).collect()
}

/// One segment is taken a step further: the first that lets it. What holds one never stops another. The caller holds the ledger.
fn step(frontier: &Frontier, worth_a_proof: impl Fn(bool, &Standing) -> bool) -> Result<Outcome> {
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, instance::check)?;
    let ring = sql::as_owner(frontier.ledger, ledger::read)?;
    let old = old_segments(frontier);
    let standings = standing::of_segments(frontier, &old);
    let oldest_sealed =
        ring.prune_order().find(|segment| segment.state == SegmentState::Sealed).map(|segment| segment.generation);
    let (mut held, mut fault): (Option<Outcome>, Option<Error>) = (None, None);
    for segment in ring.prune_order() {
        xact::check_for_interrupts();
        let standing = standings.iter().find(|standing| standing.generation == segment.generation).copied().unwrap_or_default();
        let outcome = if segment.state == SegmentState::PruneStarted {
            truncate(frontier, segment, &segments::locate(segment)?)
        } else if worth_a_proof(oldest_sealed == Some(segment.generation), &standing) {
            let outcome = start(frontier, segment, &segments::locate(segment)?, &standing);
            if let Ok(outcome) = &outcome {
                patience::note(frontier, &standing, outcome.outcome, xact::now());
            }
            outcome
        } else {
            Ok(about("skipped_active", segment, Some(standing.detail())))
        };
        match outcome {
            Ok(done) if matches!(done.outcome, "pruned" | "prune_started") => return Ok(Outcome { more: true, ..done }),
            Ok(kept) if held.as_ref().is_none_or(|other| urgency(&kept) > urgency(other)) => held = Some(kept),
            Ok(_) => {}
            // Jobs that cannot be kept, or rows that contradict each other, hold their segment, not the others.
            Err(error) if is_of_a_row(&error) => fault = fault.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    match fault {
        Some(error) => Err(error),
        None => Ok(held.unwrap_or_else(|| Outcome::skipped("nothing", "no sealed segment"))),
    }
}

/// Which of the segments that did not move is worth telling.
fn urgency(outcome: &Outcome) -> u8 {
    match outcome.outcome {
        "blocked" => 3,
        "waiting" => 2,
        "skipped_active" => 1,
        _ => 0,
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

/// The proof holds until the mark is committed: Share on ready entries keeps out whoever would write into the segment, and those who come
/// after the commit see that it is on its way out.
fn start(frontier: &Frontier, segment: &Segment, info: &SegmentInfo, standing: &Standing) -> Result<Outcome> {
    let writers = lock_conflicts(info.ready, Lock::Share);
    if !writers.is_empty() {
        return Ok(about("blocked", segment, holders(&writers)));
    }
    let mut history = BTreeMap::new();
    // Where claimers may come by, nobody is kept out for the length of a proof that is likely to fail.
    if !standing.looks_drained()
        && let Some(reason) = unfinished(frontier, info, &mut history)?
    {
        return Ok(about("skipped_active", segment, Some(reason)));
    }
    // To the end of the transaction: nobody supersedes the end of a job whose fate is being decided here.
    if Rel::open_if_lockable(info.ready, Lock::Share)?.is_none() {
        return Ok(about("blocked", segment, holders(&lock_conflicts(info.ready, Lock::Share))));
    }
    frontier.check_current()?;
    history.clear();
    if let Some(reason) = unfinished(frontier, info, &mut history)? {
        return Ok(about("skipped_active", segment, Some(reason)));
    }
    reach("prune.proved");
    xact::subtransaction(|| retention::keep(frontier, info, &mut history))?;
    reach("prune.kept");
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
    reach("prune.marked");
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
    let mut toast = Vec::new();
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
    // Vacuum locks a toast table by itself, and one against wraparound does not give way: claimers must not queue up behind us for it.
    for oid in tables.iter().filter_map(Rel::toast_oid) {
        match Rel::open_if_lockable(oid, Lock::AccessExclusive)? {
            Some(rel) => toast.push(rel),
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
    reach("prune.locked");
    let points = ["prune.ready_truncated", "prune.closures_truncated", "prune.done_truncated", "prune.claims_truncated"];
    for (table, point) in tables.iter().zip(points) {
        truncate_in_place(table)?;
        reach(point);
    }
    sql::as_owner(frontier.ledger, || {
        ledger::append(segment.generation, segment.slot, "pruned", xact::now())?;
        ledger::trim()
    })?;
    notes::reserve(frontier, 1)?;
    notes::push(notes::Note::SegmentPruned { generation: segment.generation, slot: segment.slot });
    xact::force_synchronous_commit();
    reach("prune.pruned");
    Ok(about("pruned", segment, None))
}
