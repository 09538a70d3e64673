//! Truncation in place, as VACUUM does it: no new files, no catalog rows, no undo.
//! Not transactional and not atomic: after an error or a crash the heap may be empty and an index or the toast not, so the
//! caller must repeat it before any use. The caller holds: AccessExclusiveLock on the table; the relation is dead to everybody.
//! Caches of other backends learn of it at commit.
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::points::{Fault, may_fail};
use super::rel::{Index, Lock, Rel, all_index_oids};
use crate::error::{Error, Result};

/// Cuts the table, its indexes and its toast table to nothing, and moves their freeze limits up. Says whether there was
/// anything to cut.
pub fn truncate_in_place(rel: &Rel) -> Result<bool> {
    if !super::rel::holds_lock(rel.oid(), Lock::AccessExclusive) {
        return Err(Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("relation \"{}\" is not locked for truncation", rel.name()),
        ));
    }
    rel.check_native()?;
    let toast = rel.toast_oid().map(|oid| Rel::open(oid, Lock::AccessExclusive)).transpose()?;
    let toast_is_empty = toast.as_ref().map_or(Ok(true), is_empty)?;
    let had_rows = !(is_empty(rel)? && toast_is_empty);
    if had_rows {
        may_fail(Fault::Append);
        // SAFETY: locked by the check above, live. May raise half-way: unwinds; the caller repeats it before any use.
        unsafe { pg_sys::heap_truncate_one_rel(rel.raw()) };
        may_fail(Fault::Alloc);
        // SAFETY: `rel` is live. Counts in backend-local memory; may raise (out of memory): unwinds.
        unsafe { pg_sys::pgstat_count_truncate(rel.raw()) };
    }
    advance_freeze_limits(rel);
    if let Some(toast) = &toast {
        advance_freeze_limits(toast);
    }
    // Also when there was nothing to cut: a truncation that broke off may have cut it, and its messages were never sent. Other
    // backends would go on from the root of a B-tree that they remember.
    for table in toast.iter().chain([rel]) {
        invalidate(table)?;
    }
    Ok(had_rows)
}

fn invalidate(rel: &Rel) -> Result<()> {
    for oid in all_index_oids(rel) {
        let index = Index::open(rel, oid)?;
        may_fail(Fault::Alloc);
        // SAFETY: `index` is live. Queues a message that commit sends; may raise (out of memory): unwinds.
        unsafe { pg_sys::CacheInvalidateRelcache(index.raw()) };
    }
    // SAFETY: `rel` is live; as above.
    unsafe { pg_sys::CacheInvalidateRelcache(rel.raw()) };
    Ok(())
}

/// No block in the heap, and nothing but a metapage in each B-tree. An index without a metapage, or of another kind, counts
/// as not empty, so that a truncation that broke off is repeated. The maps do not count: the server keeps two blocks of one.
fn is_empty(rel: &Rel) -> Result<bool> {
    if rel.blocks() != 0 {
        return Ok(false);
    }
    for oid in all_index_oids(rel) {
        let index = Index::open(rel, oid)?;
        if !index.is_btree() || index.blocks() != 1 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// An empty relation holds no transaction id, so its limits may be those of a new one. Written in place: no dead row.
fn advance_freeze_limits(rel: &Rel) {
    // SAFETY: a plain read of a backend-local global: no transaction that can still write is older.
    let xid = unsafe { pg_sys::RecentXmin };
    // SAFETY: reads shared state under an LWLock; cannot raise.
    let multi = unsafe { pg_sys::GetOldestMultiXactId() };
    if xid.into_inner() < 3 {
        return;
    }
    #[cfg(not(feature = "pg14"))]
    let (mut xid_moved, mut multi_moved) = (false, false);
    may_fail(Fault::Read);
    // SAFETY: locked and live. May raise (catalog read): unwinds. -1 tuples: never counted, as after TRUNCATE.
    unsafe {
        pg_sys::vac_update_relstats(
            rel.raw(),
            0,
            -1.0,
            0,
            #[cfg(feature = "pg18")]
            0,
            rel.has_index(),
            xid,
            multi,
            #[cfg(not(feature = "pg14"))]
            &raw mut xid_moved,
            #[cfg(not(feature = "pg14"))]
            &raw mut multi_moved,
            true,
        );
    }
}

/// Does the running server (not the one compiled for) have the fix of truncation that came with 14.16, 15.11, 16.7 and 17.3?
pub fn truncation_is_safe_here() -> bool {
    // SAFETY: a static string; gives a static or settings-owned string or null. Cannot raise with missing_ok.
    let text = unsafe { pg_sys::GetConfigOption(c"server_version_num".as_ptr(), true, false) };
    if text.is_null() {
        return false;
    }
    // SAFETY: a null-terminated string owned by the settings, read at once.
    let text = unsafe { core::ffi::CStr::from_ptr(text) };
    let number: u32 = text.to_str().ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let (major, minor) = (number / 10_000, number % 10_000);
    match major {
        14 => minor >= 16,
        15 => minor >= 11,
        16 => minor >= 7,
        17 => minor >= 3,
        _ => major >= 18,
    }
}
