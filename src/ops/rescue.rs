//! Rescue: end attempts whose deadline has passed or whose heartbeat has stopped, as if their worker had failed them.
//!
//! Finds them in the in-flight pool, so the cost follows what is running, not history or backlog. Locks: RowExclusive on ready_entries and
//! closures of the segments concerned and on ready_entries of the open one, only if they are free. Rows written: as `fail`.
//! Waits for nobody: what another is ending, or what is locked, is left for the next pass. A crash before the commit: nothing happened.

use std::cell::RefCell;

use awa_protocol::attempt::EntryRef;
use awa_protocol::lane::Lane;
use awa_protocol::lifecycle::Outcome as End;
use awa_protocol::limits::{RESCUES_PER_STEP, SET_ASIDE, SLOTS_PER_LOOK};
use awa_protocol::overdue::{Overdue, Selection, overdue_since};
use awa_protocol::queue::Existence;
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, PARTITIONS, notes};
use crate::ops::exits;
use crate::ops::tasks::{Outcome, is_of_a_row};
use crate::pg::call::warn;
use crate::pg::memory::Context;
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel};
use crate::pg::xact;
use crate::store::finished::Shelf;

/// An overdue attempt as it was seen. The entry of its name may be claimed anew by the time it is marked, so lease and claim are kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    partition: u32,
    slot: u32,
    stamp: u32,
    hop: i32,
    job_id: i64,
    generation: i64,
    lease: i64,
    claim_xid: u64,
    /// It has used up its attempts and its queue keeps dead letters.
    dies: bool,
}

#[derive(Clone, Copy)]
struct Seen {
    queue: u16,
    since: i64,
    found: Found,
}

thread_local! {
    /// Copies on which rescue failed: frontier, job, hop, and until when they are passed over.
    static ASIDE: RefCell<Vec<(u64, i64, i32, i64)>> = const { RefCell::new(Vec::new()) };
}

const SET_ASIDE_FOR: i64 = 60_000_000;

/// What happened in one step.
#[derive(Default)]
struct Report {
    rescued: i64,
    bad: i64,
    first_bad: Option<String>,
}

pub fn rescue(frontier: &Frontier, by: Overdue) -> Result<Outcome> {
    let now = xact::now();
    let selection = find(frontier, by, now);
    if selection.is_empty() {
        frontier.check_current()?;
        return Ok(Outcome::new("nothing"));
    }
    let more = selection.left_out();
    let mut jobs = selection.into_turns();
    let found = jobs.len();
    lock_segments(frontier, &mut jobs)?;
    let mut report = Report::default();
    if !jobs.is_empty() {
        end_all(frontier, by, &jobs, now, &mut report)?;
    }
    let outcome = match (report.rescued, jobs.is_empty()) {
        (_, true) => "skipped_busy",
        (0, false) => "nothing",
        _ => "rescued",
    };
    let mut details = Vec::new();
    if jobs.len() < found {
        details.push(format!("{} are in a segment, or belong into a table, that another session has locked", found - jobs.len()));
    }
    if let Some(first) = &report.first_bad {
        details.push(format!("{} could not be rescued: {first}", report.bad));
    }
    Ok(Outcome {
        rows: report.rescued,
        detail: (!details.is_empty()).then(|| details.join("; ")),
        more: more && report.rescued > 0,
        trouble: report.bad > 0,
        ..Outcome::new(outcome)
    })
}

/// Sweeps the pool, a few slots under each lock; an empty partition costs a look.
fn find(frontier: &Frontier, by: Overdue, now: i64) -> Selection<Found> {
    let mut selection = Selection::new(RESCUES_PER_STEP);
    for partition in 0..PARTITIONS as u32 {
        let mut from = 0;
        loop {
            let mut seen: heapless::Vec<Seen, SLOTS_PER_LOOK> = heapless::Vec::new();
            let done = frontier.with_partition(partition, |entries| {
                let reach = (entries.head.reach as usize).min(entries.entries.len());
                let to = (from + SLOTS_PER_LOOK).min(reach);
                for slot in from..to {
                    let Some(entry) = entries.entries.get(slot) else { break };
                    let Some(since) = overdue_since(entry, by, now) else { continue };
                    let found = Found {
                        partition,
                        slot: slot as u32,
                        stamp: entry.stamp,
                        hop: entry.hop,
                        job_id: entry.job_id,
                        generation: entry.generation,
                        lease: entry.lease,
                        claim_xid: entry.claim_xid,
                        dies: exits::failure_outcome(entry, false) == End::Failed,
                    };
                    let _ = seen.push(Seen { queue: entry.queue, since, found });
                }
                to >= reach
            });
            for Seen { queue, since, mut found } in seen {
                let wanted = {
                    let held = frontier.queue(queue);
                    found.dies &= held.settings.dead_letters;
                    held.existence == Existence::Live
                };
                // An attempt that was found in the log has no claim to wait for.
                let settled = found.claim_xid == 0 || !exits::is_unsettled(found.claim_xid);
                if wanted && settled && !is_set_aside(frontier, &found, now) {
                    selection.offer(queue, since, found);
                }
            }
            if done {
                break;
            }
            xact::check_for_interrupts();
            from += SLOTS_PER_LOOK;
        }
    }
    selection
}

/// Keeps the jobs whose segments can be locked at once, in the outer transaction: a later error gives back none of these locks.
fn lock_segments(frontier: &Frontier, jobs: &mut Vec<Found>) -> Result<()> {
    let open = frontier.open_segment()?;
    if Rel::open_if_lockable(open.ready, Lock::RowExclusive)?.is_none() {
        jobs.clear();
        return Ok(());
    }
    let mut generations: Vec<i64> = jobs.iter().map(|job| job.generation).collect();
    generations.sort_unstable();
    generations.dedup();
    for generation in generations {
        let free = match frontier.segment(generation) {
            Some(info) => {
                Rel::open_if_lockable(info.ready, Lock::RowExclusive)?.is_some()
                    && Rel::open_if_lockable(info.closures, Lock::RowExclusive)?.is_some()
            }
            None => false,
        };
        if !free {
            jobs.retain(|job| job.generation != generation);
        }
    }
    // A rebuild or an index being built holds the dead letters for a while: attempts that would become one wait for it, others do not.
    if jobs.iter().any(|job| job.dies) && Rel::open_if_lockable(Shelf::DeadLetters.table()?, Lock::RowExclusive)?.is_none() {
        jobs.retain(|job| !job.dies);
    }
    frontier.check_current()
}

/// All in one subtransaction; if it fails, each half by itself, down to the job that is at fault.
fn end_all(frontier: &Frontier, by: Overdue, jobs: &[Found], now: i64, report: &mut Report) -> Result<()> {
    let ended = xact::subtransaction(|| {
        let mut ended = 0;
        for job in jobs {
            xact::check_for_interrupts();
            ended += i64::from(end(frontier, by, job, now)?);
        }
        Ok(ended)
    });
    match (ended, jobs) {
        (Ok(ended), _) => report.rescued += ended,
        (Err(error), _) if !is_of_a_row(&error) => return Err(error),
        // The queue is being dropped, its jobs with it.
        (Err(error), [_]) if error.code == Code::ERRCODE_UNDEFINED_OBJECT => {}
        (Err(error), [job]) => set_aside(frontier, job, error, now, report),
        (Err(_), _) => {
            let (left, right) = jobs.split_at(jobs.len() / 2);
            end_all(frontier, by, left, now, report)?;
            end_all(frontier, by, right, now, report)?;
        }
    }
    Ok(())
}

/// False: the attempt is not overdue any more, or somebody else is ending it.
fn end(frontier: &Frontier, by: Overdue, job: &Found, now: i64) -> Result<bool> {
    // What a job needs is freed with it.
    let context = Context::new(c"awa rescue");
    let _entered = context.enter();
    notes::reserve(frontier, 2)?;
    let xid = xact::current_xid();
    let name = EntryRef { partition: job.partition, slot: job.slot, stamp: job.stamp };
    reach("rescue.found");
    let marked = frontier.with_named(name, |entry| {
        let same = entry.lease == job.lease && entry.claim_xid == job.claim_xid && frontier.is_current();
        if !same || overdue_since(entry, by, now).is_none() {
            return None;
        }
        let outcome = exits::failure_outcome(entry, false);
        let seen = *entry;
        entry.begin_exit(&seen, xid, outcome).then_some((*entry, outcome))
    });
    let Some((entry, outcome)) = marked.flatten() else {
        frontier.check_current()?;
        return Ok(false);
    };
    let queue_id = Lane::from_number(entry.lane).queue_id;
    notes::push(notes::Note::Closing { entry: name, queue: entry.queue, queue_id, outcome });
    notes::push(notes::Note::Rescued { queue: entry.queue, queue_id });
    reach("rescue.marked");
    let reason: &[u8] = match by {
        Overdue::Deadline => b"deadline of the attempt expired",
        Overdue::Heartbeat => b"heartbeat lost",
    };
    exits::conclude_failure(frontier, &entry, outcome, Some(reason), None)?;
    Ok(true)
}

fn is_set_aside(frontier: &Frontier, job: &Found, now: i64) -> bool {
    ASIDE.with_borrow(|aside| {
        aside.iter().any(|(word, job_id, hop, until)| {
            (*word, *job_id, *hop) == (frontier.word(), job.job_id, job.hop)
                && now < *until
                && now.saturating_add(SET_ASIDE_FOR) >= *until
        })
    })
}

/// Passed over for a while, by this session; said once.
fn set_aside(frontier: &Frontier, job: &Found, error: Error, now: i64, report: &mut Report) {
    report.bad += 1;
    let known = (frontier.word(), job.job_id, job.hop);
    let is_new = ASIDE.with_borrow_mut(|aside| {
        let is_new = !aside.iter().any(|(word, job_id, hop, _)| (*word, *job_id, *hop) == known);
        aside.retain(|(word, job_id, hop, _)| *word == known.0 && (*job_id, *hop) != (known.1, known.2));
        if aside.len() >= SET_ASIDE {
            aside.remove(0);
        }
        aside.push((known.0, known.1, known.2, now.saturating_add(SET_ASIDE_FOR)));
        is_new
    });
    if report.first_bad.is_none() {
        report.first_bad = Some(format!("job {}: {}", job.job_id, error.message));
    }
    if is_new {
        let hint = "The others go on; this one is tried again every minute. Run awa.verify().";
        warn(Error::new(error.code, format!("could not rescue job {}: {}", job.job_id, error.message)).hint(hint));
    }
}
