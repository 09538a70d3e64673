//! Jobs that nobody has: a guard keeps claimers and cancels off until the move is decided. As for a cancelled job, nothing but the guard
//! stands between the row and a claimer, and a tombstone closes it for those who come later.
//!
//! Rows are guarded without a turn: a guard on a row that a claimer would still come to by himself (`will_reach`) proves that nobody has
//! taken it. While somebody has the turn of its lane, only a guard that he passes proves it; other rows are left until his turn is over.
//! If the move is rolled back, a scan that went past the guard finds the job as a hole.

use awa_protocol::attempt::{Entry, EntryRef, InsertRefusal, State};
use awa_protocol::lane::{Lane, Position, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::TrackId;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use super::step::Step;
use crate::error::{Result, reserve};
use crate::frontier::{Reserve, notes};
use crate::ops::handle::Queue;
use crate::ops::{enqueue, exits, taking};
use crate::pg::scan::RawRow;
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::deferred;
use crate::store::ready::{self, NewEntry};

/// A row, copied out.
pub struct Row {
    pub head: ready::Head,
    enqueued_at: i64,
    tags: Option<Datum>,
    metadata: Option<Datum>,
    errors: Option<Datum>,
    args: Option<Datum>,
}

impl Row {
    pub fn copy(row: &RawRow<'_>) -> Self {
        let head = ready::head(row);
        Self {
            head,
            enqueued_at: row.i64(ready::ENQUEUED_AT).unwrap_or(head.key),
            tags: row.copy_datum(ready::TAGS),
            metadata: row.copy_datum(ready::METADATA),
            errors: row.copy_datum(ready::ERRORS),
            args: row.copy_datum(ready::ARGS),
        }
    }

    /// The next copy of the job: all as it was, but for the place in the lane.
    pub fn next(&self, key: i64) -> NewEntry {
        NewEntry {
            key,
            job_id: self.head.job_id,
            lane: self.head.lane,
            hop: self.head.hop + 1,
            kind_id: self.head.kind_id,
            attempt: self.head.attempt,
            max_attempts: self.head.max_attempts,
            enqueued_at: Some(self.enqueued_at),
            tags: self.tags,
            metadata: self.metadata,
            errors: self.errors,
            args: self.args.unwrap_or_else(|| Datum::from(0)),
        }
    }
}

pub struct Waiting {
    pub row: Row,
    queue: Queue,
}

impl Step<'_> {
    /// The row of an entry. One that is missing is for verify() to name: it must not keep the others in their segment.
    pub fn copy_row(&self, seen: &Entry) -> Result<Option<Row>> {
        match exits::with_row(&self.old.info, &self.old.rel, seen, Row::copy) {
            Ok(row) => Ok(Some(row)),
            Err(error) if error.code == Code::ERRCODE_DATA_CORRUPTED => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A hole becomes a guard. False: a claimer has it, or its queue is being dropped.
    pub fn guard_hole(&mut self, name: EntryRef, seen: &Entry) -> Result<bool> {
        let Some(row) = self.copy_row(seen)? else { return Ok(false) };
        // Cancelled: a claimer will find out, and drop the hole. No cancel can begin after this, for it needs the hole as well.
        if self.frontier.has_tombstones(self.old.info.slot) && taking::is_tombstoned(&self.old.info, &row.head)? {
            return Ok(false);
        }
        notes::reserve(self.frontier, 1)?;
        reserve(&mut self.waiting, 1)?;
        let xid = xact::current_xid();
        let lane = Lane::from_number(seen.lane);
        let queue = {
            // The queue's lock keeps claimers from popping the hole while it is unlinked.
            let mut held = self.frontier.queue(seen.queue);
            let queue = Queue::at(seen.queue, &held);
            let link = self.frontier.link_of(name);
            if !queue.is_usable(&held)
                || self.frontier.with_named(name, |now| now.begin_exit(seen, xid, Outcome::Moved)) != Some(true)
            {
                return Ok(false);
            }
            // Whatever is a hole is in the list, for both change under this lock.
            self.frontier.with_links(|links| held.remove_hole(lane.priority, link, links));
            queue
        };
        notes::push(notes::Note::Guard {
            entry: name,
            queue: seen.queue,
            queue_id: lane.queue_id,
            sub: lane.sub,
            was_hole: true,
            outcome: Outcome::Moved,
        });
        self.waiting.push(Waiting { row, queue });
        Ok(true)
    }

    /// Guards a committed row that nobody has taken.
    pub fn guard_row(&mut self, queue: &Queue, id: TrackId, row: &RawRow<'_>) -> Result<()> {
        let (frontier, info) = (self.frontier, self.old.info);
        let head = ready::head(row);
        // Moved or cancelled before: the common case of a row that is left, so it is passed without a guard.
        if frontier.has_tombstones(info.slot) && taking::is_tombstoned(&info, &head)? {
            return Ok(());
        }
        notes::reserve(frontier, 1)?;
        reserve(&mut self.waiting, 1)?;
        if frontier.reserve_entries(queue.place, 1, Reserve::Carry) == 0 {
            self.left.pool_is_full = true;
            return Ok(());
        }
        notes::promise(queue.place, 1);
        let guard = Entry {
            job_id: head.job_id,
            hop: head.hop,
            generation: info.generation,
            lane: head.lane,
            key: head.key,
            tid: head.tid,
            close_xid: xact::current_xid(),
            closing: Some(Outcome::Moved),
            attempt: head.attempt + 1,
            max_attempts: head.max_attempts,
            process: xact::my_proc(),
            queue: queue.place,
            state: State::Guard,
            ..Entry::free()
        };
        let partition = frontier.partition_of(head.job_id);
        let inserted =
            frontier.with_partition(partition, |entries| match entries.find(head.job_id, |other| other.hop >= head.hop) {
                Some(slot) => Err(InsertRefusal::Exists(slot)),
                None => entries.insert(guard).map(|slot| EntryRef { partition, slot, stamp: entries.stamp_of(slot) }),
            });
        let name = match inserted {
            Ok(name) => name,
            Err(refusal) => {
                notes::settle_promise(frontier);
                match refusal {
                    InsertRefusal::Exists(_) => self.left.busy += 1,
                    InsertRefusal::Full => self.left.pool_is_full = true,
                }
                return Ok(());
            }
        };
        notes::use_promised();
        notes::push(notes::Note::Guard {
            entry: name,
            queue: queue.place,
            queue_id: queue.queue_id,
            sub: id.sub,
            was_hole: false,
            outcome: Outcome::Moved,
        });
        let position = Position::at(head.key, head.tid);
        let will_reach = frontier.queue(queue.place).will_reach(id, position, row.xmin_full());
        // In this order: whoever goes past the guard says so before his cursor does. One decision under one lock: a guard that a scan
        // passes is not freed, for the scan has left the row to it.
        let is_nobodys = will_reach
            || frontier.with_partition(partition, |entries| {
                let passed = entries.named(name).map(|guard| guard.passed);
                if passed == Some(false) {
                    entries.free(name.slot);
                }
                passed == Some(true)
            });
        if !is_nobodys {
            self.left.busy += 1;
            frontier.return_entries(queue.place, 1);
            notes::retract_last();
            return Ok(());
        }
        // Asked again with the guard standing: no cancel can slip between.
        if frontier.has_tombstones(info.slot) && taking::is_tombstoned(&info, &head)? {
            frontier.drop_entry(name);
            notes::retract_last();
            return Ok(());
        }
        self.waiting.push(Waiting { row: Row::copy(row), queue: *queue });
        Ok(())
    }

    /// Appends the next copies; gives the number of those that wait outside the ring.
    pub fn append_waiting(&mut self) -> Result<usize> {
        let late = self.now.saturating_add(settings::deferral());
        let is_late = |job: &Waiting| Lane::from_number(job.row.head.lane).sub == SubLane::Scheduled && job.row.head.key > late;
        let mut deferred = 0;
        for lane in self.waiting.chunk_by(|a, b| a.row.head.lane == b.row.head.lane) {
            let Some(first) = lane.first() else { continue };
            let (number, queue) = (Lane::from_number(first.row.head.lane), first.queue);
            let mut copies = Vec::new();
            reserve(&mut copies, lane.len())?;
            copies.extend(lane.iter().filter(|job| !is_late(job)).map(|job| job.row.next(job.row.head.key)));
            enqueue::append(self.frontier, queue, number.priority, number.sub, copies)?;
            for job in lane.iter().filter(|job| is_late(job)) {
                notes::reserve(self.frontier, 1)?;
                sql::as_owner(self.frontier.ledger, || deferred::insert(&job.row.next(job.row.head.key)))?;
                let (place, queue_id) = (queue.place, queue.queue_id);
                notes::push(notes::Note::Enqueued { queue: place, queue_id, sub: SubLane::Scheduled, rows: 1 });
                deferred += 1;
            }
        }
        Ok(deferred)
    }
}
