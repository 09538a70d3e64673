//! What this transaction has changed in the frontier, so that commit, abort and rollback to a savepoint complete or undo exactly
//! that. A note is written to memory reserved beforehand, before the shared change it speaks of.
//!
//! The functions `on_*` run inside the server's transaction callbacks: they allocate nothing, raise nothing, and touch only entries
//! that a note names. Order at commit: the rows are visible already, locks are still held.

use std::cell::{Cell, RefCell};

use awa_protocol::attempt::{EntryRef, State};
use awa_protocol::lane::{Position, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::limits::GAPS_PER_SCAN;
use awa_protocol::queue::{Counts, Existence, GapFound, GapTurn, ScanTurn, Settings, Totals};
use pgrx::PgSqlErrorCode as Code;

use super::{Frontier, Prepared, SegmentInfo};
use crate::error::{Error, Result};
use crate::pg::scan::{XidState, xid_state};
use crate::pg::xact;

#[derive(Clone, Copy)]
pub enum Note {
    Enqueued {
        queue: u16,
        queue_id: i32,
        sub: SubLane,
        rows: i64,
    },
    /// `published`: the cursor has passed the row, so an abort makes it a hole; otherwise the entry just goes.
    Claimed {
        entry: EntryRef,
        queue: u16,
        queue_id: i32,
        sub: SubLane,
        published: bool,
    },
    Closing {
        entry: EntryRef,
        queue: u16,
        queue_id: i32,
        outcome: Outcome,
    },
    Guard {
        entry: EntryRef,
        queue: u16,
        queue_id: i32,
        sub: SubLane,
        was_hole: bool,
    },
    QueueCreated {
        queue: u16,
    },
    QueueSettings {
        queue: u16,
        settings: Settings,
    },
    QueueDropped {
        queue: u16,
    },
    SegmentOpened {
        segment: SegmentInfo,
    },
    SegmentPruneStarted {
        generation: i64,
    },
    /// History of a queue that leaves with a segment.
    HistoryGone {
        queue: u16,
        queue_id: i32,
        counts: Counts,
    },
    SegmentPruned {
        generation: i64,
        slot: i32,
    },
}

#[derive(Clone, Copy)]
struct Noted {
    sub: u32,
    note: Note,
}

/// A turn that this session holds right now, and how far it has got: whatever happens to the call, the turn ends there.
pub struct Held {
    pub queue: u16,
    pub turn: Turn,
}

#[expect(clippy::large_enum_variant, reason = "one value a session, kept in place")]
pub enum Turn {
    Scan {
        turn: ScanTurn,
        /// Everything up to here has been taken, is dead, or is in `gaps`.
        cursor: Position,
        /// Key of the first row not passed; `None`: not known.
        next_head: Option<i64>,
        gaps: heapless::Vec<GapFound, GAPS_PER_SCAN>,
    },
    Gap {
        turn: GapTurn,
        reached: Position,
    },
}

thread_local! {
    static NOTES: RefCell<Vec<Noted>> = const { RefCell::new(Vec::new()) };
    static FRONTIER: Cell<Option<Frontier>> = const { Cell::new(None) };
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
    static REGISTERED: Cell<Option<u16>> = const { Cell::new(None) };
    static WAITING: Cell<Option<u16>> = const { Cell::new(None) };
    /// Places of the in-flight pool that were promised to the running call and not used yet.
    static PROMISED: Cell<(u16, u32)> = const { Cell::new((0, 0)) };
    /// WAL position after the last claim row, while the transaction has done nothing but claim.
    static CLAIM_ONLY: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Makes room for `more` notes. The only call here that may fail.
pub fn reserve(frontier: &Frontier, more: usize) -> Result<()> {
    if FRONTIER.get().is_some_and(|before| before.word() != frontier.word()) && !is_empty() {
        return Err(super::rebuilt());
    }
    FRONTIER.set(Some(*frontier));
    NOTES.with_borrow_mut(|notes| {
        if notes.is_empty() && notes.capacity() > 16_384 {
            notes.shrink_to(256);
        }
        notes
            .try_reserve(more)
            .map_err(|_| Error::new(Code::ERRCODE_OUT_OF_MEMORY, "out of memory while noting changes of the queue"))
    })
}

/// Never allocates: `reserve` came before.
pub fn push(note: Note) {
    let sub = xact::current_subxact();
    NOTES.with_borrow_mut(|notes| {
        if let (Note::Enqueued { queue, sub: lane, rows, .. }, Some(last)) = (note, notes.last_mut())
            && let Note::Enqueued { queue: last_queue, sub: last_lane, rows: last_rows, .. } = &mut last.note
            && last.sub == sub
            && *last_queue == queue
            && *last_lane == lane
        {
            *last_rows += rows;
            return;
        }
        if notes.len() < notes.capacity() {
            notes.push(Noted { sub, note });
        }
    });
}

pub fn is_empty() -> bool {
    NOTES.with_borrow(Vec::is_empty)
}

/// The frontier that the notes speak of is gone.
pub fn forget_void() {
    NOTES.with_borrow_mut(Vec::clear);
    HELD.set(None);
    REGISTERED.set(None);
    PROMISED.set((0, 0));
    FRONTIER.set(None);
}

/// True if this transaction is creating the queue.
pub fn created_here(place: u16) -> bool {
    NOTES.with_borrow(|notes| notes.iter().any(|noted| matches!(noted.note, Note::QueueCreated { queue } if queue == place)))
}

/// True if this transaction has enqueued into, claimed from or cancelled in the queue.
pub fn touches(place: u16) -> bool {
    NOTES.with_borrow(|notes| {
        notes.iter().any(|noted| match noted.note {
            Note::Enqueued { queue, .. }
            | Note::Claimed { queue, .. }
            | Note::Closing { queue, .. }
            | Note::Guard { queue, .. } => queue == place,
            _ => false,
        })
    })
}

/// The segment that this transaction is opening, while there is none yet that others use.
pub fn opened_here() -> Option<SegmentInfo> {
    NOTES.with_borrow(|notes| {
        notes.iter().rev().find_map(|noted| match noted.note {
            Note::SegmentOpened { segment } => Some(segment),
            _ => None,
        })
    })
}

pub fn set_waiting(queue: Option<u16>) {
    WAITING.set(queue);
}

/// The regular end of a wait.
pub fn leave_waiting(frontier: &Frontier) {
    // Sleepers are counted by place, whoever has it.
    if let Some(queue) = WAITING.take() {
        let mut queue = frontier.queue(queue);
        queue.waiters = queue.waiters.saturating_sub(1);
    }
}

pub fn hold(held: Held) {
    HELD.set(Some(held));
}

pub fn with_turn<R>(body: impl FnOnce(&mut Turn) -> R) -> Option<R> {
    HELD.with_borrow_mut(|held| held.as_mut().map(|held| body(&mut held.turn)))
}

/// Marks the newest note, a claim, as passed by its cursor. The caller moves the cursor at the same moment.
pub fn publish_last() {
    NOTES.with_borrow_mut(|notes| {
        if let Some(Noted { note: Note::Claimed { published, .. }, .. }) = notes.last_mut() {
            *published = true;
        }
    });
}

/// Forgets the newest note: what it spoke of was undone at once.
pub fn retract_last() {
    NOTES.with_borrow_mut(|notes| {
        notes.pop();
    });
}

/// Forgets the claim of this entry.
pub fn retract_claim(name: EntryRef) {
    NOTES.with_borrow_mut(|notes| {
        let found = notes.iter().rposition(|noted| matches!(noted.note, Note::Claimed { entry, .. } if entry == name));
        if let Some(index) = found {
            notes.remove(index);
        }
    });
}

/// Places that were reserved for this queue; at most one queue at a time.
pub fn promise(queue: u16, places: u32) {
    PROMISED.set((queue, PROMISED.get().1 + places));
}

pub fn promised() -> u32 {
    PROMISED.get().1
}

pub fn use_promised() {
    let (queue, places) = PROMISED.get();
    PROMISED.set((queue, places.saturating_sub(1)));
}

/// Gives back the promised places that were not used.
pub fn settle_promise(frontier: &Frontier) {
    let (queue, rest) = PROMISED.take();
    if rest > 0 && frontier.is_current() {
        frontier.return_entries(queue, rest);
    }
}

/// Ends the turn that is held, where it stands.
pub fn end_turn(frontier: &Frontier) {
    let Some(held) = HELD.take() else { return };
    let process = xact::my_proc();
    {
        let mut queue = frontier.queue(held.queue);
        match &held.turn {
            Turn::Scan { turn, cursor, next_head, gaps } => {
                queue.finish_scan(turn, process, *cursor, next_head.unwrap_or(cursor.key), gaps);
            }
            Turn::Gap { turn, reached } => queue.finish_gap(turn, process, *reached),
        }
    }
    frontier.turn_sleeper(held.queue).signal();
}

pub fn set_registered(queue: Option<u16>) {
    REGISTERED.set(queue);
}

pub fn claim_only() -> Option<u64> {
    CLAIM_ONLY.get()
}

pub fn set_claim_only(position: Option<u64>) {
    CLAIM_ONLY.set(position);
}

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
            .detail(format!("At most {} are followed at the same time.", super::PREPARED))
            .hint("Commit or roll back prepared transactions; see pg_prepared_xacts."));
    }
    Ok(())
}

pub fn note_prepared(waiting: &mut heapless::Vec<Prepared, { super::PREPARED }>, xid: u64, note: &Note) -> bool {
    let Note::Enqueued { queue, queue_id, sub, rows } = *note else { return true };
    match waiting.iter_mut().find(|entry| entry.xid == xid && entry.queue_id == queue_id && entry.sub == sub) {
        Some(entry) => {
            entry.rows += rows;
            true
        }
        None => waiting.push(Prepared { xid, queue_id, queue, sub, rows }).is_ok(),
    }
}

/// Counts the jobs of prepared transactions that have ended since. Not for callbacks: it asks for the state of transactions.
pub fn settle_prepared(frontier: &Frontier) {
    let mut known: heapless::Vec<Prepared, { super::PREPARED }> = heapless::Vec::new();
    let _ = known.extend_from_slice(&frontier.prepared().waiting);
    for entry in known {
        let state = xid_state(entry.xid);
        if matches!(state, XidState::InProgress | XidState::Own) {
            continue;
        }
        let mut cell = frontier.prepared();
        let Some(index) =
            cell.waiting.iter().position(|now| now.xid == entry.xid && now.queue_id == entry.queue_id && now.sub == entry.sub)
        else {
            continue;
        };
        cell.waiting.swap_remove(index);
        drop(cell);
        let mut queue = frontier.queue(entry.queue);
        if state == XidState::Committed && queue.queue_id == entry.queue_id && queue.existence != Existence::Free {
            *waiting(&mut queue.counts, entry.sub) += entry.rows;
            queue.totals.enqueued += entry.rows as u64;
        }
    }
}

/// The rows stay in progress until COMMIT PREPARED, which runs no callback: a claimer that meets them keeps a gap.
/// Sleepers are told, so that they look and learn of the gap: from then on they look again by themselves.
fn on_prepare() {
    finish_session_state();
    if let Some(frontier) = FRONTIER.get().filter(Frontier::is_current) {
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
        drop_entry(frontier, entry);
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
    super::build::on_abort();
    finish_session_state();
    let Some(frontier) = FRONTIER.get() else { return };
    let current = frontier.is_current();
    while let Some(note) = NOTES.with_borrow_mut(|notes| notes.pop_if(|noted| noted.sub == mine)) {
        if current {
            undo(&frontier, note.note);
        }
    }
}

fn on_abort() {
    super::build::on_abort();
    finish_session_state();
    let Some(frontier) = FRONTIER.take() else { return };
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
            let change = &mut tally.of(queue, queue_id).counts;
            change.completed -= counts.completed;
            change.failed -= counts.failed;
            change.cancelled -= counts.cancelled;
        }
        Note::Closing { entry, queue, queue_id, outcome } => {
            drop_entry(frontier, entry);
            let change = tally.of(queue, queue_id);
            change.counts.running -= 1;
            match outcome {
                Outcome::Completed => {
                    change.counts.completed += 1;
                    change.totals.completed += 1;
                }
                Outcome::Failed => {
                    change.counts.failed += 1;
                    change.totals.failed_attempts += 1;
                }
                Outcome::Cancelled => change.counts.cancelled += 1,
                // The next copy of the same job is no new job.
                Outcome::Retry => {
                    change.totals.failed_attempts += 1;
                    change.totals.enqueued = change.totals.enqueued.wrapping_sub(1);
                }
                Outcome::Snooze => {
                    change.totals.snoozed += 1;
                    change.totals.enqueued = change.totals.enqueued.wrapping_sub(1);
                }
                Outcome::Moved => {}
            }
        }
        Note::Guard { entry, queue, queue_id, sub, .. } => {
            drop_entry(frontier, entry);
            let change = tally.of(queue, queue_id);
            *waiting(&mut change.counts, sub) -= 1;
            change.counts.cancelled += 1;
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
        Note::SegmentPruneStarted { generation } => frontier.change_ring(|segments| {
            for segment in segments.iter_mut().filter(|segment| segment.generation == generation) {
                segment.state = awa_protocol::ring::SegmentState::PruneStarted;
            }
            // Nothing in it can be claimed: what its tracks and gaps still promise would only keep sleepers awake.
            for place in 0..frontier.queue_slots() {
                frontier.queue(place).forget_generation(generation);
            }
        }),
        Note::SegmentPruned { generation, slot } => {
            frontier.change_ring(|segments| segments.retain(|segment| segment.generation != generation));
            frontier.set_tombstones(slot, false);
            for place in 0..frontier.queue_slots() {
                frontier.queue(place).forget_generation(generation);
            }
        }
    }
}

fn drop_entry(frontier: &Frontier, entry: EntryRef) {
    let gone = frontier.with_partition(entry.partition, |partition| {
        let queue = partition.named(entry).map(|entry| entry.queue);
        if queue.is_some() {
            partition.free(entry.slot);
        }
        queue
    });
    if let Some(queue) = gone {
        frontier.return_entries(queue, 1);
    }
}

/// Entries of a dropped queue go with it: its rows count as closed.
fn forget_queue(frontier: &Frontier, queue: u16) {
    for partition in 0..super::PARTITIONS as u32 {
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
        Note::Enqueued { .. } | Note::QueueSettings { .. } => {}
        Note::Claimed { entry, queue, published, .. } => {
            if published {
                give_back(frontier, entry, queue);
            } else {
                drop_entry(frontier, entry);
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
        Note::QueueCreated { queue } => frontier.queue(queue).clear(),
        Note::QueueDropped { queue } => {
            let mut queue = frontier.queue(queue);
            if queue.existence == Existence::Dropping {
                queue.existence = Existence::Live;
            }
        }
        Note::SegmentOpened { .. } | Note::SegmentPruneStarted { .. } | Note::SegmentPruned { .. } | Note::HistoryGone { .. } => {
        }
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
