//! A finished job of the ring is wanted by an operator: to be tried again, or to be deleted. One decision point, a guard entry.
//!
//! Steps: find the newest copy and how it ended; insert a guard for that copy (whoever finds one waits for its transaction and looks
//! again); lock ready_entries of its segment; see that no prune has begun and that the end still stands; append evidence that supersedes
//! it. A prune that is about to begin holds Share on ready_entries, so it has seen either no such evidence or all of it.
//!
//! Locks: AccessShare on the segments searched; RowExclusive on ready_entries and closures of the job's segment. Rows written: one closure.

use awa_protocol::attempt::{Entry, EntryRef, InsertRefusal, State};
use awa_protocol::lane::Lane;
use awa_protocol::lifecycle::Outcome;
use awa_protocol::ring::SegmentState;
use pgrx::pg_sys::Datum;

use crate::error::Result;
use crate::frontier::{Frontier, Reserve, SegmentInfo, notes};
use crate::ops::cancel::{self, Found, Letter};
use crate::ops::{deferred, handle};
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel};
use crate::pg::scan::is_own;
use crate::pg::xact;
use crate::store::evidence::{self, ClaimTerms, Closure, Reader};
use crate::store::ready;

/// What the ring says of a job that somebody wants.
pub enum Ring {
    /// Ended as wanted, and from here on for this transaction alone to supersede.
    Mine(Box<Ended>),
    /// It waits or runs, or its end is not committed.
    NotFinished,
    /// Ended in a way that the caller does not want.
    Unwanted,
    /// This transaction has deleted it.
    RemovedHere,
    /// It never was here, its segment was pruned, or its last copy has left the ring.
    Elsewhere,
}

/// A finished copy under its guard, its segment locked.
pub struct Ended {
    pub segment: SegmentInfo,
    pub ready: Rel,
    pub guard: Entry,
    /// The error history that the end has left; `None`: that of the row.
    pub errors: Option<Datum>,
}

/// How one copy was closed, by the evidence that counts.
struct End {
    job_id: i64,
    hop: i32,
    found: Option<(Outcome, Option<Datum>)>,
}

impl Reader for End {
    fn room(&mut self, _copies: usize) -> Result<()> {
        Ok(())
    }

    fn claim(&mut self, _job_id: i64, _hop: i32, _lease: i64, _terms: &ClaimTerms) {}

    fn closure(
        &mut self,
        job_id: i64,
        hop: i32,
        outcome: Outcome,
        _unclaimed: bool,
        _at: i64,
        errors: &dyn Fn() -> Option<Datum>,
    ) {
        let here = job_id == self.job_id && hop == self.hop;
        if here && !self.found.is_some_and(|(before, _)| before.supersedes(outcome)) {
            self.found = Some((outcome, errors()));
        }
    }
}

fn end_of(segment: &SegmentInfo, job_id: i64, hop: i32) -> Result<Option<(Outcome, Option<Datum>)>> {
    let mut end = End { job_id, hop, found: None };
    evidence::read(segment, Lock::AccessShare, true, &mut end)?;
    Ok(end.found)
}

/// Gets hold of a finished job whose end `wanted` accepts, to supersede it by `by`.
pub fn take(frontier: &Frontier, job_id: i64, by: Outcome, wanted: fn(Outcome) -> bool) -> Result<Ring> {
    match take_in_ring(frontier, job_id, by, wanted)? {
        Ring::Elsewhere if deferred::waits_outside(frontier, job_id)? => Ok(Ring::NotFinished),
        found => Ok(found),
    }
}

fn take_in_ring(frontier: &Frontier, job_id: i64, by: Outcome, wanted: fn(Outcome) -> bool) -> Result<Ring> {
    loop {
        xact::check_for_interrupts();
        if let Some((name, entry)) = cancel::entry_of(frontier, job_id) {
            match (entry.close_xid, entry.closing) {
                (0, _) => return Ok(Ring::NotFinished),
                (xid, _) if !is_own(xid) => {
                    xact::wait_for_xid(xid);
                    continue;
                }
                (_, Some(Outcome::Removed)) => return Ok(Ring::RemovedHere),
                _ if notes::has_made_letter(name) => {
                    let is_gone = matches!(cancel::own_letter(frontier, job_id, entry.hop)?, Letter::Gone);
                    return Ok(if is_gone { Ring::RemovedHere } else { Ring::NotFinished });
                }
                _ => return Ok(Ring::NotFinished),
            }
        }
        let Some(found) = cancel::find_newest(frontier, job_id)? else { return Ok(Ring::Elsewhere) };
        // The jobs of a dropped queue went with it, finished or not.
        let lane = Lane::from_number(found.head.lane);
        let Some(place) = handle::place_of(frontier, lane.queue_id) else {
            frontier.check_current()?;
            return Ok(Ring::Elsewhere);
        };
        let outcome = match end_of(&found.segment, job_id, found.head.hop)? {
            None => return Ok(Ring::NotFinished),
            Some((outcome, _)) if outcome.is_history() && wanted(outcome) => outcome,
            Some((outcome, _)) if outcome.is_history() => return Ok(Ring::Unwanted),
            // Its next copy was appended by the transaction that closed this one. Seen from now on, or it is not in the ring.
            Some(_) => match cancel::find_newest(frontier, job_id)? {
                Some(again) if again.head.hop != found.head.hop => continue,
                _ => return Ok(Ring::Elsewhere),
            },
        };
        reach("supersede.found");
        let Some((name, guard)) = stand_guard(frontier, &found, place, by)? else { continue };
        notes::push(notes::Note::Superseding { entry: name, queue: place, queue_id: lane.queue_id, ended: outcome });
        reach("supersede.guarded");
        let ready = ready::open_for_write(&found.segment)?;
        frontier.check_current()?;
        let alive = frontier.segment(found.segment.generation).is_some_and(|now| now.state != SegmentState::PruneStarted);
        let end = if alive { end_of(&found.segment, job_id, found.head.hop)? } else { None };
        match end {
            Some((still, errors)) if still == outcome => {
                return Ok(Ring::Mine(Box::new(Ended { segment: found.segment, ready, guard, errors })));
            }
            _ => {
                // It was pruned, or somebody else was first.
                frontier.drop_entry(name);
                notes::retract_last();
            }
        }
    }
}

/// `None`: somebody else has an entry of the job; look again. The caller notes the guard at once.
fn stand_guard(frontier: &Frontier, found: &Found, place: u16, by: Outcome) -> Result<Option<(EntryRef, Entry)>> {
    let head = found.head;
    notes::reserve(frontier, 1)?;
    let xid = xact::current_xid();
    if frontier.reserve_entries(place, 1, Reserve::Operator) == 0 {
        return Err(cancel::pool_is_full());
    }
    notes::promise(place, 1);
    let guard = Entry {
        job_id: head.job_id,
        hop: head.hop,
        generation: found.segment.generation,
        lane: head.lane,
        key: head.key,
        tid: head.tid,
        close_xid: xid,
        closing: Some(by),
        attempt: head.attempt,
        max_attempts: head.max_attempts,
        process: xact::my_proc(),
        queue: place,
        state: State::Guard,
        ..Entry::free()
    };
    let partition = frontier.partition_of(head.job_id);
    let inserted = frontier.with_partition(partition, |entries| {
        if entries.find(head.job_id, |other| other.hop >= head.hop).is_some() || !frontier.is_current() {
            return Err(InsertRefusal::Exists(0));
        }
        entries.insert(guard).map(|slot| EntryRef { partition, slot, stamp: entries.stamp_of(slot) })
    });
    match inserted {
        Ok(name) => {
            notes::use_promised();
            Ok(Some((name, guard)))
        }
        Err(refusal) => {
            notes::settle_promise(frontier);
            frontier.check_current()?;
            if refusal == InsertRefusal::Full { Err(cancel::pool_is_full()) } else { Ok(None) }
        }
    }
}

/// Writes the evidence.
pub fn close(ended: &Ended, by: Outcome) -> Result<()> {
    let closure = Closure {
        closed_at: xact::now(),
        job_id: ended.guard.job_id,
        hop: ended.guard.hop,
        tombstone: None,
        outcome: by,
        errors: None,
    };
    evidence::append_closures(&ended.segment, &[closure])
}
