//! Adopt: make a restored or copied database the owner of its jobs; and the two ends of a restore.
//!
//! Locks: ShareRowExclusive on the ledger, Exclusive on awa.queue_definitions, AccessExclusive on awa.restoring, then Share on
//! ready_entries of the segments that memory knows: nobody builds the working state, and nobody uses it. Rows written: of awa.instance and
//! awa.restoring. When the transaction commits the working state is void; the next verb builds it from what is there by then.
//! Leases of the original are void only when their jobs are finished or claimed again; every build draws leases anew.

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, build, notes, require_preloading};
use crate::ops::rotate::refuse_old_snapshot;
use crate::ops::verify;
use crate::pg::rel::{Lock, Rel};
use crate::pg::sql;
use crate::store::{instance, queues};

pub fn adopt() -> Result<bool> {
    require_preloading()?;
    let frontier = Frontier::as_it_is()?;
    if !sql::as_owner(frontier.ledger, instance::is_foreign)? {
        return Ok(false);
    }
    void(&frontier, "awa.adopt()", || {
        let foreign = instance::is_foreign()?;
        instance::write()?;
        Ok(foreign)
    })
}

pub fn pre_restore() -> Result<()> {
    require_preloading()?;
    void(&Frontier::as_it_is()?, "awa.pre_restore()", || instance::set_restoring(true))
}

pub fn post_restore() -> Result<bool> {
    require_preloading()?;
    void(&Frontier::as_it_is()?, "awa.post_restore()", || {
        let foreign = instance::is_foreign_anyway()?;
        if foreign {
            instance::write()?;
        }
        instance::set_restoring(false)?;
        Ok(foreign)
    })
}

/// Waits for whoever uses the working state, keeps others out, and voids it when the transaction commits.
fn void<R>(seen: &Frontier, verb: &str, change: impl FnOnce() -> Result<R>) -> Result<R> {
    if !notes::is_empty() {
        return Err(Error::new(
            Code::ERRCODE_ACTIVE_SQL_TRANSACTION,
            format!("cannot run {verb} in a transaction that has used the queue"),
        )
        .hint("Call it in a transaction of its own."));
    }
    refuse_old_snapshot(verb)?;
    let _ledger = Rel::open(seen.ledger, Lock::ShareRowExclusive)?;
    let _definitions = Rel::open(queues::table()?, Lock::Exclusive)?;
    let _builders = Rel::open(build::builders_lock()?, Lock::AccessExclusive)?;
    // Nobody builds, creates, rotates or prunes from here on: the ring stays what memory says now.
    let frontier = Frontier::as_it_is()?;
    // A working state that was never built has no users, and names segments of who knows when.
    if build::is_ready(frontier.word()) {
        verify::keep_users_out(&frontier)?;
    }
    let answer = sql::as_owner(frontier.ledger, change)?;
    notes::reserve(&frontier, 1)?;
    notes::push(notes::Note::FrontierVoid);
    Ok(answer)
}
