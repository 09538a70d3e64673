//! Running attempts: the copy in the open segment is born claimed. It has the lease of the attempt and a key below every scan, so that
//! nobody is offered it; finishers wait for the carrier and then find it; heartbeats go on meanwhile.

use awa_protocol::attempt::{Entry, EntryRef, InsertRefusal};
use awa_protocol::lane::{BORN_CLAIMED, Lane};
use awa_protocol::ring::SegmentState;

use super::step::Step;
use super::waiting::Row;
use crate::error::{Result, reserve};
use crate::frontier::{Frontier, Reserve, SegmentInfo, notes};
use crate::ops::handle::Queue;
use crate::pg::append::Append;
use crate::pg::rel::Rel;
use crate::pg::xact;
use crate::store::evidence::{self, ClaimTerms, Copies};
use crate::store::ready;

pub struct Running {
    pub row: Row,
    new: EntryRef,
    /// As it was when the move began.
    seen: Entry,
}

/// The segment that receives them.
pub struct Open {
    info: SegmentInfo,
    rel: Rel,
}

impl Open {
    /// It may be sealed by the time we have its lock: while we hold that, it is not pruned.
    fn lock(frontier: &Frontier) -> Result<Self> {
        loop {
            let info = frontier.open_segment()?;
            let rel = ready::open_for_write(&info)?;
            frontier.check_current()?;
            let alive = |now: SegmentInfo| now.slot == info.slot && now.state != SegmentState::PruneStarted;
            if frontier.segment(info.generation).is_some_and(alive) {
                return Ok(Self { info, rel });
            }
            xact::check_for_interrupts();
        }
    }
}

impl Step<'_> {
    /// False: somebody is ending the attempt, or its queue is being dropped.
    pub fn guard_running(&mut self, name: EntryRef, seen: &Entry) -> Result<bool> {
        let frontier = self.frontier;
        let queue_id = Lane::from_number(seen.lane).queue_id;
        let is_usable = {
            let held = frontier.queue(seen.queue);
            Queue::at(seen.queue, &held).is_usable(&held) && held.queue_id == queue_id
        };
        if !is_usable {
            return Ok(false);
        }
        let Some(row) = self.copy_row(seen)? else { return Ok(false) };
        if self.open.is_none() {
            self.open = Some(Open::lock(frontier)?);
        }
        let generation = self.open.as_ref().map_or(0, |open| open.info.generation);
        notes::reserve(frontier, 1)?;
        reserve(&mut self.running, 1)?;
        // May raise: before a place is taken that nothing would give back.
        let xid = xact::current_xid();
        if frontier.reserve_entries(seen.queue, 1, Reserve::Carry) == 0 {
            self.left.pool_is_full = true;
            return Ok(true);
        }
        let partition = name.partition;
        let moved = frontier.with_partition(partition, |entries| {
            let inserted = entries.begin_move(name, xid, generation);
            inserted.map(|slot| EntryRef { partition, slot, stamp: entries.stamp_of(slot) })
        });
        match moved {
            Ok(new) => {
                notes::push(notes::Note::Moving { old: name, new, queue: seen.queue, queue_id });
                self.running.push(Running { row, new, seen: *seen });
                Ok(true)
            }
            Err(refusal) => {
                frontier.return_entries(seen.queue, 1);
                self.left.pool_is_full |= refusal == InsertRefusal::Full;
                Ok(false)
            }
        }
    }

    pub fn append_running(&mut self) -> Result<()> {
        let Some(open) = self.open.as_ref().filter(|_| !self.running.is_empty()) else { return Ok(()) };
        let index = ready::open_index(&open.rel, &open.info)?;
        let indexes = [index];
        let mut writer = Append::new(&open.rel, &indexes)?;
        let rows: Vec<_> = self.running.iter().map(|job| job.row.next(BORN_CLAIMED).columns()).collect();
        let places = ready::append(&mut writer, &rows)?;
        for (job, tid) in self.running.iter().zip(places) {
            self.frontier.with_named(job.new, |entry| entry.tid = tid);
        }
        // The leases were drawn by batches, and a claim row speaks of leases that follow each other.
        self.running.sort_unstable_by_key(|job| job.seen.lease);
        let terms = |entry: &Entry| (entry.claimed_at, entry.deadline, entry.heartbeat_timeout);
        let follows = |a: &Running, b: &Running| b.seen.lease == a.seen.lease + 1 && terms(&a.seen) == terms(&b.seen);
        for run in self.running.chunk_by(follows) {
            let Some(first) = run.first() else { continue };
            let (claimed_at, deadline_at, heartbeat_timeout) = terms(&first.seen);
            let mut copies = Copies::default();
            for job in run {
                copies.push(job.row.head.job_id, job.row.head.hop + 1)?;
            }
            let claim = ClaimTerms { claimed_at, deadline_at, heartbeat_timeout, first_lease: first.seen.lease };
            evidence::append_claims(&open.info, &claim, &copies)?;
        }
        Ok(())
    }
}
