//! Transaction ids with their epoch, and what became of a transaction. Sets no hint bits, assigns nothing, waits for nothing.
use core::ffi::c_int;

use pgrx::pg_sys;

use super::{raw, xact};

/// A transaction id with its epoch: unique for the life of the cluster.
pub type FullXid = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XidState {
    Committed,
    Aborted,
    InProgress,
    /// The current transaction or a live or committed subtransaction of it.
    Own,
}

/// What became of this transaction. Raises if it is so old that its commit state has been truncated.
pub fn xid_state(xid: FullXid) -> XidState {
    short_xid_state(pg_sys::TransactionId::from(xid as u32))
}

/// Is this transaction the current one or a part of it? Reads backend-local state only.
pub fn is_own(xid: FullXid) -> bool {
    // SAFETY: reads backend-local state; cannot raise.
    unsafe { raw::TransactionIdIsCurrentTransactionId(pg_sys::TransactionId::from(xid as u32)) }
}

/// The top transaction of one that is in progress.
pub fn top_of(xid: FullXid) -> FullXid {
    // SAFETY: reads pg_subtrans; may raise (I/O): unwinds, the caller holds no LWLock.
    full_xid(unsafe { pg_sys::SubTransGetTopmostTransaction(pg_sys::TransactionId::from(xid as u32)) })
}

/// Has this transaction ended, one way or the other? Asks no commit log, so it may be of any age.
pub fn has_ended(xid: FullXid) -> bool {
    let next = next_full_xid();
    if next.saturating_sub(xid) > 1 << 30 {
        // The server refuses new ids long before a running transaction gets this old.
        return true;
    }
    // SAFETY: reads shared memory and at most pg_subtrans; may raise (I/O): unwinds, the caller holds no LWLock.
    !is_own(xid) && !unsafe { pg_sys::TransactionIdIsInProgress(pg_sys::TransactionId::from(xid as u32)) }
}

/// The order matters: in progress must be asked before commit, or a transaction that ends between would be called aborted.
pub(super) fn short_xid_state(xid: pg_sys::TransactionId) -> XidState {
    match xid.into_inner() {
        0 => return XidState::Aborted,
        1 | 2 => return XidState::Committed,
        _ => (),
    }
    // SAFETY: the xid is normal; cannot raise.
    if unsafe { raw::TransactionIdIsCurrentTransactionId(xid) } {
        return XidState::Own;
    }
    // SAFETY: the xid is normal. May raise (reading pg_subtrans): unwinds; the caller holds pins only, which abort releases.
    if unsafe { pg_sys::TransactionIdIsInProgress(xid) } {
        return XidState::InProgress;
    }
    // SAFETY: as above (reading pg_xact).
    if unsafe { pg_sys::TransactionIdDidCommit(xid) } { XidState::Committed } else { XidState::Aborted }
}

/// Adds the epoch; right for ids at most 2^31 behind the next one.
pub fn full_xid(xid: pg_sys::TransactionId) -> FullXid {
    full_near(next_full_xid(), xid)
}

/// The id that the next transaction will get.
pub fn next_full_xid() -> FullXid {
    // SAFETY: an LWLock around one read; cannot raise.
    unsafe { raw::ReadNextFullTransactionId() }.value
}

/// Adds the epoch by distance from `near`, a full id at most 2^31 away in either direction.
pub(super) fn full_near(near: FullXid, xid: pg_sys::TransactionId) -> FullXid {
    let short = xid.into_inner();
    if short < 3 {
        return u64::from(short);
    }
    let distance = short.wrapping_sub(near as u32) as i32;
    near.wrapping_add_signed(i64::from(distance))
}

/// Under REPEATABLE READ and SERIALIZABLE: had this committed transaction ended when the snapshot was taken? Else true.
pub fn visible_to_caller(xid: FullXid) -> bool {
    if !xact::isolation_uses_snapshot() || (xid as u32) < 3 {
        return true;
    }
    // SAFETY: reads backend-local state; cannot raise.
    if !unsafe { pg_sys::ActiveSnapshotSet() } {
        return true;
    }
    // SAFETY: a snapshot is active. May raise (reading pg_subtrans): unwinds.
    unsafe { !pg_sys::XidInMVCCSnapshot(pg_sys::TransactionId::from(xid as u32), pg_sys::GetActiveSnapshot()) }
}

/// The last few answers, so that a run of rows of one transaction asks once. "In progress" may be older than the row asked
/// about, never newer than the truth: who notes it must test the transaction again.
pub(super) struct Memo {
    near: FullXid,
    entries: [(u32, XidState); Self::SIZE],
    next: usize,
}

impl Memo {
    const SIZE: usize = 8;

    pub fn new() -> Self {
        Self { near: next_full_xid(), entries: [(0, XidState::Aborted); Self::SIZE], next: 0 }
    }

    pub fn state(&mut self, xid: pg_sys::TransactionId) -> XidState {
        let short = xid.into_inner();
        if let Some((_, state)) = self.entries.iter().find(|(known, _)| *known == short) {
            return *state;
        }
        let state = short_xid_state(xid);
        if let Some(entry) = self.entries.get_mut(self.next) {
            *entry = (short, state);
        }
        self.next = (self.next + 1) % Self::SIZE;
        state
    }

    pub fn full(&self, xid: pg_sys::TransactionId) -> FullXid {
        full_near(self.near, xid)
    }
}

const _: () = assert!(size_of::<c_int>() == 4);
