//! Leaving all snapshots behind, so that a sleeping session does not hold back VACUUM anywhere.
//! Only in a procedure called as a statement of its own, outside a transaction block, before anything was written.
use core::marker::PhantomData;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::call::Call;
use super::points::{Fault, may_fail};
use super::xact;
use crate::error::{Error, Result};

/// While this lives the session holds no snapshot: no catalog lookup that is not in a cache, no table, no toast. Dropping it
/// takes a snapshot again, as a procedure must have when it returns.
#[must_use]
pub struct NoSnapshot {
    _not_send: PhantomData<*mut ()>,
}

impl Drop for NoSnapshot {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: inside the procedure's portal. May raise (out of memory): unwinds, nothing else is being unwound.
            unsafe { pg_sys::EnsurePortalSnapshotExists() }
        }
    }
}

pub fn leave_snapshot(call: &Call) -> Result<NoSnapshot> {
    if !call.is_non_atomic() || xact::in_transaction_block() || xact::nest_level() != 1 {
        return Err(refused("The call is part of a transaction block, of another statement or of a function."));
    }
    if xact::top_xid_if_any().is_some() {
        return Err(refused("The transaction has already written."));
    }
    if xact::isolation_uses_snapshot() {
        return Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot wait in a transaction that keeps one snapshot")
            .hint("Use the isolation level READ COMMITTED."));
    }
    may_fail(Fault::Alloc);
    // SAFETY: non-atomic, so the portal may give up its snapshot. Raises if other snapshots are active: unwinds.
    unsafe { pg_sys::ForgetPortalSnapshots() };
    let left = NoSnapshot { _not_send: PhantomData };
    // SAFETY: backend-local; the next catalog scan takes a new one. Cannot raise. Recomputes our xmin.
    unsafe { pg_sys::InvalidateCatalogSnapshot() };
    if holds_xmin() {
        drop(left);
        return Err(refused("A snapshot is still in use, for example by an open cursor."));
    }
    Ok(left)
}

/// Does this session hold back VACUUM?
pub fn holds_xmin() -> bool {
    // SAFETY: MyProc is set in every process that runs SQL; only this process writes its xmin. Reads a field.
    unsafe { (*pg_sys::MyProc).xmin }.into_inner() != 0
}

fn refused(detail: &str) -> Error {
    Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot wait inside a transaction block")
        .detail(detail)
        .hint("Call awa.wait() outside a transaction block, as the only statement.")
}
