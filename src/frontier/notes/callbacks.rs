//! The server's transaction callbacks: they complete or undo what the notes of this transaction say.
//!
//! They allocate nothing, raise nothing, and touch only entries that a note names. Order at commit: the rows are visible already, locks
//! are still held. Notes are undone newest first.

use super::*;
use crate::frontier::shared::PREPARED;
use crate::frontier::{PARTITIONS, build};
use crate::pg::points::reach;

/// Registers the callbacks, once per session.
pub fn register_callbacks() {
    xact::register_callbacks(xact::Callbacks {
        pre_commit: on_pre_commit,
        commit: on_commit,
        abort: on_abort,
        pre_prepare: on_pre_prepare,
        prepare: on_prepare,
        sub_commit: on_sub_commit,
        sub_abort: on_sub_abort,
        process_exit: on_abort,
    });
}

fn on_pre_commit() -> Result<()> {
    if FRONTIER.get().is_some() {
        reach("session.pre_commit");
    }
    if let Some(position) = CLAIM_ONLY.take()
        && position == xact::xact_last_rec_end()
        && crate::settings::asynchronous_claim()
    {
        xact::lower_synchronous_commit_here();
    }
    Ok(())
}

/// Claims and exits are fenced by memory of this server process: they cannot outlive it in a prepared transaction.
fn on_pre_prepare() -> Result<()> {
    let refused = NOTES.with_borrow(|notes| notes.iter().any(|noted| !matches!(noted.note, Note::Enqueued { .. })));
    if refused {
        return Err(Error::new(
            Code::ERRCODE_FEATURE_NOT_SUPPORTED,
            "cannot prepare a transaction that has claimed, finished or cancelled jobs, or changed queues",
        )
        .detail("Only enqueued jobs may be part of a prepared transaction.")
        .hint("Commit the transaction in one phase."));
    }
    let Some(frontier) = FRONTIER.get().filter(Frontier::is_current) else { return Ok(()) };
    settle_prepared(&frontier);
    let Some(xid) = xact::top_xid_if_any() else { return Ok(()) };
    let full = {
        let mut cell = frontier.prepared();
        NOTES.with_borrow(|notes| !notes.iter().all(|noted| note_prepared(&mut cell.waiting, xid, &noted.note)))
    };
    if full {
        frontier.prepared().waiting.retain(|entry| entry.xid != xid);
        return Err(Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "too many prepared transactions have enqueued jobs")
            .detail(format!("At most {} are followed at the same time.", PREPARED))
            .hint("Commit or roll back prepared transactions; see pg_prepared_xacts."));
    }
    Ok(())
}

/// The rows stay in progress until COMMIT PREPARED, which runs no callback: a claimer that meets them keeps a gap.
/// Sleepers are told, so that they look and learn of the gap: from then on they look again by themselves.
fn on_prepare() {
    finish_session_state();
    if let Some(frontier) = FRONTIER.get().filter(Frontier::is_current) {
        reach("session.prepare");
        NOTES.with_borrow(|notes| {
            for noted in notes.iter() {
                if let Note::Enqueued { queue, rows, .. } = noted.note {
                    frontier.wake_work(queue, rows as u64);
                }
            }
        });
    }
    NOTES.with_borrow_mut(Vec::clear);
    FRONTIER.set(None);
}

fn finish_session_state() {
    CLAIM_ONLY.set(None);
    let process = xact::my_proc();
    let Some(frontier) = FRONTIER.get() else { return };
    if !frontier.is_current() {
        leave_waiting(&frontier);
        HELD.set(None);
        REGISTERED.set(None);
        PROMISED.set((0, 0));
        return;
    }
    if let Some(queue) = REGISTERED.take() {
        frontier.queue(queue).deregister(process);
    }
    leave_waiting(&frontier);
    settle_promise(&frontier);
    drop_unpublished(&frontier);
    end_turn(&frontier);
}

/// A row that was reserved and not passed yet: its entry goes before the turn does, or the next scan would take it for somebody's.
fn drop_unpublished(frontier: &Frontier) {
    let last = NOTES.with_borrow_mut(|notes| notes.pop_if(|noted| matches!(noted.note, Note::Claimed { published: false, .. })));
    if let Some(Noted { note: Note::Claimed { entry, .. }, .. }) = last {
        frontier.drop_entry(entry);
    }
}

fn on_sub_commit(mine: u32, parent: u32) {
    NOTES.with_borrow_mut(|notes| {
        for noted in notes.iter_mut().rev() {
            if noted.sub != mine {
                break;
            }
            noted.sub = parent;
        }
    });
}

fn on_sub_abort(mine: u32) {
    build::on_abort();
    finish_session_state();
    let Some(frontier) = FRONTIER.get() else { return };
    reach("session.sub_abort");
    let current = frontier.is_current();
    while let Some(note) = NOTES.with_borrow_mut(|notes| notes.pop_if(|noted| noted.sub == mine)) {
        if current {
            undo(&frontier, note.note);
        }
    }
}

fn on_abort() {
    build::on_abort();
    finish_session_state();
    let Some(frontier) = FRONTIER.take() else { return };
    reach("session.abort");
    let current = frontier.is_current();
    while let Some(note) = NOTES.with_borrow_mut(Vec::pop) {
        if current {
            undo(&frontier, note.note);
        }
    }
}

fn on_commit() {
    finish_session_state();
    let Some(frontier) = FRONTIER.take() else { return };
    reach("session.commit");
    let current = frontier.is_current();
    NOTES.with_borrow_mut(|notes| {
        if current {
            let mut tally = Tally { frontier, changes: heapless::Vec::new() };
            for noted in notes.iter() {
                complete(&frontier, noted.note, &mut tally);
            }
            tally.flush();
        }
        notes.clear();
    });
    reach("session.committed");
}

#[derive(Clone, Copy, Default)]
struct Change {
    queue: u16,
    queue_id: i32,
    counts: Counts,
    totals: Totals,
    /// Rows that may wake a sleeper.
    appended: u64,
}

/// Sums up by queue, so that each queue is locked once.
struct Tally {
    frontier: Frontier,
    changes: heapless::Vec<Change, 8>,
}

impl Tally {
    fn of(&mut self, queue: u16, queue_id: i32) -> &mut Change {
        let same = |change: &Change| change.queue == queue && change.queue_id == queue_id;
        if !self.changes.iter().any(same) {
            if self.changes.is_full() {
                self.flush();
            }
            let _ = self.changes.push(Change { queue, queue_id, ..Change::default() });
        }
        let index = self.changes.iter().position(same).unwrap_or(0);
        &mut self.changes[index]
    }

    fn flush(&mut self) {
        for change in &self.changes {
            let waiters = {
                let mut queue = self.frontier.queue(change.queue);
                // The queue may have been dropped, its place given to another.
                if queue.queue_id != change.queue_id {
                    continue;
                }
                add_counts(&mut queue.counts, &change.counts);
                let totals = &mut queue.totals;
                totals.enqueued = totals.enqueued.wrapping_add(change.totals.enqueued);
                totals.claimed += change.totals.claimed;
                totals.completed += change.totals.completed;
                totals.failed_attempts += change.totals.failed_attempts;
                totals.snoozed += change.totals.snoozed;
                totals.rescued += change.totals.rescued;
                totals.carried += change.totals.carried;
                queue.waiters
            };
            if waiters > 0 && change.appended > 0 {
                self.frontier.wake_work(change.queue, change.appended.min(u64::from(waiters)));
            }
        }
        self.changes.clear();
    }
}

pub fn add_counts(to: &mut Counts, change: &Counts) {
    to.immediate += change.immediate;
    to.scheduled += change.scheduled;
    to.running += change.running;
    to.completed += change.completed;
    to.failed += change.failed;
    to.cancelled += change.cancelled;
    to.dead_lettered += change.dead_lettered;
}

/// Counts finished jobs; other ends leave no history.
pub fn count_finished(counts: &mut Counts, outcome: Outcome, jobs: i64) {
    match outcome {
        Outcome::Completed => counts.completed += jobs,
        Outcome::Failed => counts.failed += jobs,
        Outcome::Cancelled => counts.cancelled += jobs,
        Outcome::DeadLettered => counts.dead_lettered += jobs,
        Outcome::Retry | Outcome::Snooze | Outcome::Moved | Outcome::Redriven | Outcome::Removed => {}
    }
}

pub fn take_off(counts: &mut Counts, gone: &Counts) {
    counts.completed -= gone.completed;
    counts.failed -= gone.failed;
    counts.cancelled -= gone.cancelled;
    counts.dead_lettered -= gone.dead_lettered;
}

pub fn waiting(counts: &mut Counts, sub: SubLane) -> &mut i64 {
    match sub {
        SubLane::Immediate => &mut counts.immediate,
        SubLane::Scheduled => &mut counts.scheduled,
    }
}

fn complete(frontier: &Frontier, note: Note, tally: &mut Tally) {
    match note {
        Note::Enqueued { queue, queue_id, sub, rows } => {
            let change = tally.of(queue, queue_id);
            *waiting(&mut change.counts, sub) += rows;
            // Each sleeper must learn of an earlier due time; of work for at once, as many as there are jobs.
            change.appended = match sub {
                SubLane::Scheduled => u64::MAX,
                SubLane::Immediate => change.appended.saturating_add(rows as u64),
            };
            change.totals.enqueued = change.totals.enqueued.wrapping_add(rows as u64);
        }
        Note::Claimed { queue, queue_id, sub, .. } => {
            let change = tally.of(queue, queue_id);
            *waiting(&mut change.counts, sub) -= 1;
            change.counts.running += 1;
            change.totals.claimed += 1;
        }
        Note::HistoryGone { queue, queue_id, counts } => {
            take_off(&mut tally.of(queue, queue_id).counts, &counts);
        }
        Note::Superseding { entry, queue, queue_id, ended } => {
            frontier.drop_entry(entry);
            let mut gone = Counts::default();
            count_finished(&mut gone, ended, 1);
            take_off(&mut tally.of(queue, queue_id).counts, &gone);
        }
        Note::Closing { entry, queue, queue_id, outcome } => {
            frontier.drop_entry(entry);
            let change = tally.of(queue, queue_id);
            change.counts.running -= 1;
            count_finished(&mut change.counts, outcome, 1);
            match outcome {
                Outcome::Completed => change.totals.completed += 1,
                Outcome::Failed | Outcome::DeadLettered => change.totals.failed_attempts += 1,
                // The next copy of the same job is no new job.
                Outcome::Retry => {
                    change.totals.failed_attempts += 1;
                    change.totals.enqueued = change.totals.enqueued.wrapping_sub(1);
                }
                Outcome::Snooze => {
                    change.totals.snoozed += 1;
                    change.totals.enqueued = change.totals.enqueued.wrapping_sub(1);
                }
                Outcome::Cancelled | Outcome::Moved | Outcome::Redriven | Outcome::Removed => {}
            }
        }
        Note::Rescued { queue, queue_id } => tally.of(queue, queue_id).totals.rescued += 1,
        Note::Guard { entry, queue, queue_id, sub, outcome, .. } => {
            frontier.drop_entry(entry);
            let change = tally.of(queue, queue_id);
            *waiting(&mut change.counts, sub) -= 1;
            if outcome == Outcome::Moved {
                change.totals.enqueued = change.totals.enqueued.wrapping_sub(1);
                change.totals.carried += 1;
            } else {
                change.counts.cancelled += 1;
            }
        }
        Note::Moving { old, new, queue, queue_id } => {
            if frontier.with_partition(old.partition, |partition| partition.finish_move(old, new)) {
                frontier.return_entries(queue, 1);
            }
            tally.of(queue, queue_id).totals.carried += 1;
        }
        Note::Undeferred { queue, queue_id, rows } => {
            let change = tally.of(queue, queue_id);
            change.counts.scheduled -= rows;
            change.totals.enqueued = change.totals.enqueued.wrapping_sub(rows as u64);
            change.totals.carried += rows as u64;
        }
        Note::QueueCreated { queue } => {
            let mut queue = frontier.queue(queue);
            if queue.existence == Existence::Creating {
                queue.existence = Existence::Live;
            }
        }
        Note::QueueSettings { queue, settings } => {
            frontier.queue(queue).settings = settings;
            frontier.wake_work(queue, u64::MAX);
        }
        Note::QueueDropped { queue } => forget_queue(frontier, queue),
        Note::SegmentOpened { segment } => frontier.change_ring(|segments| {
            for older in segments.iter_mut().filter(|older| older.state == awa_protocol::ring::SegmentState::Open) {
                older.state = awa_protocol::ring::SegmentState::Sealed;
            }
            let _ = segments.push(segment);
        }),
        Note::SegmentPruneStarted { generation } => {
            frontier.change_ring(|segments| {
                for segment in segments.iter_mut().filter(|segment| segment.generation == generation) {
                    segment.state = awa_protocol::ring::SegmentState::PruneStarted;
                }
            });
            // Nothing in it can be claimed: what its tracks and gaps still promise would only keep sleepers awake. Not under the lock
            // of the ring, below which no other is taken.
            for place in 0..frontier.queue_slots() {
                frontier.queue(place).forget_generation(generation);
            }
        }
        Note::FrontierVoid => build::void(frontier),
        Note::SegmentPruned { generation, slot } => {
            frontier.change_ring(|segments| segments.retain(|segment| segment.generation != generation));
            frontier.set_tombstones(slot, false);
            for place in 0..frontier.queue_slots() {
                frontier.queue(place).forget_generation(generation);
            }
        }
    }
}

/// Entries of a dropped queue go with it: its rows count as closed.
fn forget_queue(frontier: &Frontier, queue: u16) {
    for partition in 0..PARTITIONS as u32 {
        let gone = frontier.with_partition(partition, |entries| {
            let mut gone = 0;
            for slot in 0..entries.entries.len() as u32 {
                if entries.get(slot).is_some_and(|entry| entry.queue == queue) {
                    entries.free(slot);
                    gone += 1;
                }
            }
            gone
        });
        frontier.return_entries(queue, gone);
    }
    frontier.queue(queue).clear();
    frontier.wake_work(queue, u64::MAX);
}

fn undo(frontier: &Frontier, note: Note) {
    match note {
        Note::Enqueued { .. } | Note::Undeferred { .. } | Note::QueueSettings { .. } | Note::Rescued { .. } => {}
        Note::Claimed { entry, queue, published, .. } => {
            if published {
                give_back(frontier, entry, queue);
            } else {
                frontier.drop_entry(entry);
            }
        }
        Note::Closing { entry, .. } => {
            frontier.with_named(entry, |entry| {
                entry.close_xid = 0;
                entry.closing = None;
            });
        }
        Note::Guard { entry, queue, was_hole, .. } => {
            // One decision under one lock: a claimer that meets the guard afterwards must find it still there, or not at all.
            let (freed, must_return) = frontier.with_partition(entry.partition, |partition| {
                let Some(guard) = partition.named(entry) else { return (false, false) };
                if guard.passed || was_hole {
                    return (false, true);
                }
                partition.free(entry.slot);
                (true, false)
            });
            if must_return {
                give_back(frontier, entry, queue);
            } else if freed {
                frontier.return_entries(queue, 1);
            }
        }
        // A scan may have passed the guard: the row has ended all the same.
        Note::Superseding { entry, .. } => frontier.drop_entry(entry),
        Note::Moving { old, new, queue, .. } => {
            if frontier.with_partition(old.partition, |partition| partition.abandon_move(old, new)) {
                frontier.return_entries(queue, 1);
            }
        }
        Note::QueueCreated { queue } => frontier.queue(queue).clear(),
        Note::QueueDropped { queue } => {
            let mut queue = frontier.queue(queue);
            if queue.existence == Existence::Dropping {
                queue.existence = Existence::Live;
            }
        }
        Note::SegmentOpened { .. }
        | Note::SegmentPruneStarted { .. }
        | Note::SegmentPruned { .. }
        | Note::HistoryGone { .. }
        | Note::FrontierVoid => {}
    }
}

/// The row is claimable again: its entry becomes a hole.
pub fn give_back(frontier: &Frontier, name: EntryRef, queue: u16) {
    let waiters = {
        let mut held = frontier.queue(queue);
        let place = frontier.with_named(name, |entry| {
            entry.state = State::Hole;
            entry.claim_xid = 0;
            entry.close_xid = 0;
            entry.closing = None;
            entry.passed = false;
            (entry.priority(), entry.key)
        });
        if let Some((priority, key)) = place {
            let link = frontier.link_of(name);
            frontier.set_hole_key(link, key);
            frontier.with_links(|links| held.push_hole(priority, link, key, links));
        }
        held.waiters
    };
    if waiters > 0 {
        frontier.wake_work(queue, 1);
    }
}
