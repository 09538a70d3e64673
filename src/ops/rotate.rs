//! Rotate: open a new segment; the one before receives no more rows.
//!
//! Locks: ShareRowExclusive on the ledger, conditionally: whoever holds it is rotating or pruning; by policy AccessShare on the open
//! segment. Rows written: one ledger row.
//! Creates the tables of a slot when it is used for the first time. The frontier follows when the transaction commits; producers who
//! still append to the old segment are found by its relation lock.

use std::cell::Cell;

use awa_protocol::limits::LIVE_SEGMENTS;
use awa_protocol::ring::{Due, Limits, Room, Rotation, Segment, SegmentState};
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, SegmentInfo, notes};
use crate::ops::standing;
use crate::ops::tasks::Outcome;
use crate::pg::call::warn;
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel};
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::{instance, ledger, segments};

/// By hand: at once, whatever the age and the size of the open segment.
pub fn rotate(frontier: &Frontier) -> Result<Outcome> {
    refuse_used_transaction()?;
    refuse_old_snapshot("awa.rotate()")?;
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else { return Ok(busy()) };
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, instance::check)?;
    open_next(frontier)
}

/// As the maintainer does: when the open segment is old or large enough, or a session has asked for it. Until it is due this reads the
/// sizes of four tables and takes no transaction id.
pub fn rotate_if_due(frontier: &Frontier) -> Result<Outcome> {
    refuse_used_transaction()?;
    refuse_old_snapshot("the task \"rotate\"")?;
    let Ok(open) = frontier.open_segment() else { return Ok(Outcome::skipped("nothing", "the ring has no segment")) };
    let limits = limits();
    let asked = frontier.rotation_asked_for();
    let Some(bytes) = bytes_of(&open)? else { return Ok(busy()) };
    let due = limits.due(xact::now().saturating_sub(open.opened_at), bytes, asked.is_some());
    if due == Due::No {
        return Ok(Outcome::new("nothing"));
    }
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else { return Ok(busy()) };
    frontier.check_current()?;
    if frontier.open_generation() != open.generation {
        return Ok(Outcome::skipped("nothing", "another session has rotated"));
    }
    sql::as_owner(frontier.ledger, instance::check)?;
    let ring = sql::as_owner(frontier.ledger, ledger::read)?;
    match ring.make_room(&limits, due, one_is_being_freed(frontier)) {
        Room::Open { generation, slot, grown } => {
            let live = ring.segments.len() + 1;
            let opened = sql::as_owner(frontier.ledger, || open_segment(frontier, generation, slot))?;
            if grown {
                warn(grown_to(live));
            }
            let detail = asked.map(|asked| format!("asked for: {}", asked.name()));
            Ok(Outcome { outcome: if grown { "grown" } else { "rotated" }, detail, ..opened })
        }
        Room::Soon => Ok(Outcome::skipped("full", "a segment is about to be freed")),
        Room::Full => {
            if WARNED_FULL.replace((frontier.word(), open.generation)) != (frontier.word(), open.generation) {
                warn(full());
            }
            Ok(Outcome::skipped("full", "the ring has awa.ring_segments_max segments; producers go on in the open one"))
        }
    }
}

thread_local! {
    /// Frontier and open segment of which it was said that there is no room behind it.
    static WARNED_FULL: Cell<(u64, i64)> = const { Cell::new((0, 0)) };
}

fn grown_to(live: usize) -> Error {
    Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, format!("the ring has grown to {live} segments"))
        .detail(format!("awa.ring_segments is {}; the old segments cannot be freed.", settings::ring_segments()))
        .hint("awa.stat_segments shows what holds them; awa.horizon shows who.")
}

fn full() -> Error {
    let limit = settings::ring_segments_max().max(settings::ring_segments());
    Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "the ring is full: producers go on in its open segment")
        .detail(format!("{limit} segments are live, as many as awa.ring_segments_max allows."))
        .hint("awa.stat_segments shows what holds the old ones; awa.horizon shows who.")
}

fn busy() -> Outcome {
    Outcome::skipped("skipped_busy", "another session is rotating or pruning")
}

pub fn refuse_used_transaction() -> Result<()> {
    if notes::is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot rotate in a transaction that has used the queue")
        .hint("Call awa.rotate() in a transaction of its own."))
}

fn limits() -> Limits {
    Limits {
        rotate_age: settings::rotate_age(),
        rotate_size: settings::rotate_size(),
        segments: settings::ring_segments(),
        segments_max: settings::ring_segments_max(),
    }
}

/// Of its four tables with what is stored out of line. `None`: somebody has locked one by hand.
fn bytes_of(segment: &SegmentInfo) -> Result<Option<u64>> {
    let mut bytes = 0;
    for oid in [segment.ready, segment.claims, segment.done, segment.closures] {
        let Some(rel) = Rel::open_if_lockable(oid, Lock::AccessShare)? else { return Ok(None) };
        bytes += rel.bytes_with_toast()?;
    }
    Ok(Some(bytes))
}

/// A segment whose truncation has begun, or will at the next look.
fn one_is_being_freed(frontier: &Frontier) -> bool {
    let old: Vec<SegmentInfo> =
        frontier.live_segments().into_iter().filter(|segment| segment.state != SegmentState::Open).collect();
    old.iter()
        .zip(standing::of_segments(frontier, &old))
        .any(|(segment, standing)| segment.state == SegmentState::PruneStarted || standing.looks_drained())
}

/// The ledger and the queues must be read as they are now.
pub fn refuse_old_snapshot(verb: &str) -> Result<()> {
    if !xact::isolation_uses_snapshot() {
        return Ok(());
    }
    Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, format!("{verb} needs isolation level READ COMMITTED"))
        .detail("A transaction with a snapshot of its own may read an old state of the ring.")
        .hint("Call it in a transaction of its own, at READ COMMITTED."))
}

fn open_next(frontier: &Frontier) -> Result<Outcome> {
    sql::as_owner(frontier.ledger, || match ledger::read()?.rotation(settings::ring_segments()) {
        Rotation::Full => Ok(Outcome::skipped("full", "no segment is free: prune, or raise awa.ring_segments")),
        Rotation::Open { generation, slot } => open_segment(frontier, generation, slot),
    })
}

/// The caller holds the ledger and is inside `sql::as_owner`.
fn open_segment(frontier: &Frontier, generation: i64, slot: i32) -> Result<Outcome> {
    segments::create_if_missing(slot)?;
    // Who opens the first segment owns the ring: one without an owner is taken for half a restore.
    if generation == 1 {
        instance::write_if_missing()?;
    }
    let opened_at = xact::now();
    ledger::append(generation, slot, "opened", opened_at)?;
    reach("rotate.opened");
    let segment = Segment { generation, slot, state: SegmentState::Open, opened_at };
    let info = segments::locate(&segment)?;
    notes::reserve(frontier, 1)?;
    notes::push(notes::Note::SegmentOpened { segment: info });
    Ok(Outcome::of_segment("rotated", generation, slot))
}

/// Creates the tables of further slots; how many slots have tables.
pub fn add_segments(frontier: &Frontier, count: i32) -> Result<i32> {
    let most = LIVE_SEGMENTS as i32;
    if !(1..=most).contains(&count) {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, format!("count must be between 1 and {most}"))
            .detail(format!("It is {count}."))
            .hint("A segment of the ring has four tables; few are needed."));
    }
    let _ledger = Rel::open(frontier.ledger, Lock::ShareRowExclusive)?;
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, || {
        let mut missing: Vec<i32> = (0..most).filter(|slot| !segments::exists(*slot)).collect();
        let existing = most - missing.len() as i32;
        if existing + count > most {
            return Err(Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, format!("a ring has at most {most} segments"))
                .detail(format!("{existing} have tables already."))
                .hint("Ask for fewer."));
        }
        missing.truncate(count as usize);
        for slot in missing {
            segments::create_if_missing(slot)?;
        }
        Ok(existing + count)
    })
}

/// The first queue of a database opens the first segment.
pub fn ensure_open_segment(frontier: &Frontier) -> Result<()> {
    if frontier.open_segment().is_ok() {
        return Ok(());
    }
    let _ledger = Rel::open(frontier.ledger, Lock::ShareRowExclusive)?;
    if frontier.open_segment().is_ok() {
        return Ok(());
    }
    sql::as_owner(frontier.ledger, instance::check)?;
    open_next(frontier).map(|_| ())
}
