//! What this transaction has changed in the frontier, so that commit, abort and rollback to a savepoint complete or undo exactly
//! that. A note is written to memory reserved beforehand, before the shared change it speaks of.
//!
//! `callbacks` completes or undoes what the notes say; `prepared` follows transactions whose end runs no callback.

mod callbacks;
mod prepared;

use std::cell::{Cell, RefCell};

use awa_protocol::attempt::{EntryRef, State};
use awa_protocol::lane::{Position, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::limits::GAPS_PER_SCAN;
use awa_protocol::queue::{Counts, Existence, GapFound, GapTurn, ScanTurn, Settings, Totals};
use pgrx::PgSqlErrorCode as Code;

use super::{Frontier, Prepared, SegmentInfo};
use crate::error::{Error, Result};
use crate::pg::points::{Fault, fails};
use crate::pg::scan::{XidState, xid_state};
use crate::pg::xact;

pub use callbacks::{add_counts, count_finished, give_back, register_callbacks, take_off, waiting};
pub use prepared::{note_prepared, settle_prepared};

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
    /// Besides `Closing`: who ended the attempt was rescue.
    Rescued {
        queue: u16,
        queue_id: i32,
    },
    /// A copy that is ended without having been claimed: cancelled, or moved. A moved one comes with a note of what was appended.
    Guard {
        entry: EntryRef,
        queue: u16,
        queue_id: i32,
        sub: SubLane,
        was_hole: bool,
        outcome: Outcome,
    },
    /// A running attempt on its way into another segment.
    Moving {
        old: EntryRef,
        new: EntryRef,
        queue: u16,
        queue_id: i32,
    },
    /// Jobs taken out of `awa.deferred_jobs`, to be appended.
    Undeferred {
        queue: u16,
        queue_id: i32,
        rows: i64,
    },
    /// A finished job of the ring is tried again or deleted: its history goes.
    Superseding {
        entry: EntryRef,
        queue: u16,
        queue_id: i32,
        ended: Outcome,
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
    /// Finished jobs of a queue that are counted no more.
    HistoryGone {
        queue: u16,
        queue_id: i32,
        counts: Counts,
    },
    SegmentPruned {
        generation: i64,
        slot: i32,
    },
    /// What memory says is void: the log was changed behind its back.
    FrontierVoid,
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
        let full = fails(Fault::Alloc) || notes.try_reserve(more).is_err();
        if full {
            return Err(Error::new(Code::ERRCODE_OUT_OF_MEMORY, "out of memory while noting changes of the queue"));
        }
        Ok(())
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
            | Note::Guard { queue, .. }
            | Note::Superseding { queue, .. }
            | Note::Moving { queue, .. }
            | Note::Undeferred { queue, .. }
            | Note::HistoryGone { queue, .. } => queue == place,
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

/// The attempt that this transaction is ending just now ends in another way.
pub fn amend_last_closing(other: Outcome) {
    NOTES.with_borrow_mut(|notes| {
        let last = notes.iter_mut().rev().find_map(|noted| match &mut noted.note {
            Note::Closing { outcome, .. } => Some(outcome),
            _ => None,
        });
        if let Some(outcome) = last {
            *outcome = other;
        }
    });
}

/// Has this transaction ended the attempt, and made a dead letter of its job? The entry itself says "failed".
pub fn has_made_letter(name: EntryRef) -> bool {
    NOTES.with_borrow(|notes| {
        notes
            .iter()
            .any(|noted| matches!(noted.note, Note::Closing { entry, outcome: Outcome::DeadLettered, .. } if entry == name))
    })
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
