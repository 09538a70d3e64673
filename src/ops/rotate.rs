//! Rotate: open a new segment; the one before receives no more rows.
//!
//! Locks: ShareRowExclusive on the ledger, conditionally: whoever holds it is rotating or pruning. Rows written: one ledger row.
//! Creates the tables of a slot when it is used for the first time. The frontier follows when the transaction commits; producers who
//! still append to the old segment are found by its relation lock.

use awa_protocol::ring::{Rotation, Segment, SegmentState};
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, notes};
use crate::ops::tasks::Outcome;
use crate::pg::rel::{Lock, Rel};
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::{instance, ledger, segments};

pub fn rotate(frontier: &Frontier) -> Result<Outcome> {
    if !notes::is_empty() {
        return Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot rotate in a transaction that has used the queue")
            .hint("Call awa.rotate() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.rotate()")?;
    let Some(_ledger) = Rel::open_if_lockable(frontier.ledger, Lock::ShareRowExclusive)? else {
        return Ok(Outcome::skipped("skipped_busy", "another session is rotating or pruning"));
    };
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, instance::check)?;
    open_next(frontier)
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
    sql::as_owner(frontier.ledger, || {
        let ring = ledger::read()?;
        match ring.rotation(settings::ring_segments()) {
            Rotation::Full => Ok(Outcome::skipped("full", "no segment is free: prune, or raise awa.ring_segments")),
            Rotation::Open { generation, slot } => {
                segments::create_if_missing(slot)?;
                let opened_at = xact::now();
                ledger::append(generation, slot, "opened", opened_at)?;
                let segment = Segment { generation, slot, state: SegmentState::Open, opened_at };
                let info = segments::locate(&segment)?;
                notes::reserve(frontier, 1)?;
                notes::push(notes::Note::SegmentOpened { segment: info });
                Ok(Outcome::of_segment("rotated", generation, slot))
            }
        }
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
    open_next(frontier).map(|_| ())
}
