//! Relations and their locks: open, describe, find, ask who is in the way.
//! A lock taken here is kept to the end of the transaction; dropping a `Rel` or an `Index` gives back only the relcache
//! reference (and while an error unwinds not even that: abort does it). Neither may outlive its transaction.
//! Catalog reads and lock waits happen here; never under an LWLock.
use core::marker::PhantomData;
use core::ptr::NonNull;
use std::ffi::CString;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Oid;

use super::points::{Fault, may_fail};
use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    AccessShare,
    RowExclusive,
    Share,
    ShareRowExclusive,
    /// Also against SELECT .. FOR UPDATE.
    Exclusive,
    AccessExclusive,
}

impl Lock {
    fn mode(self) -> pg_sys::LOCKMODE {
        let mode = match self {
            Self::AccessShare => pg_sys::AccessShareLock,
            Self::RowExclusive => pg_sys::RowExclusiveLock,
            Self::Share => pg_sys::ShareLock,
            Self::ShareRowExclusive => pg_sys::ShareRowExclusiveLock,
            Self::Exclusive => pg_sys::ExclusiveLock,
            Self::AccessExclusive => pg_sys::AccessExclusiveLock,
        };
        mode as pg_sys::LOCKMODE
    }
}

/// A counted relcache reference.
struct Reference {
    ptr: NonNull<pg_sys::RelationData>,
    _not_send: PhantomData<*mut ()>,
}

impl Reference {
    fn open(oid: Oid) -> Option<Self> {
        may_fail(Fault::Alloc);
        // SAFETY: inside a transaction. May raise: unwinds, nothing is held yet. The result is counted, given back on drop.
        let ptr = unsafe { pg_sys::RelationIdGetRelation(oid) };
        NonNull::new(ptr).map(|ptr| Self { ptr, _not_send: PhantomData })
    }

    fn form(&self) -> &pg_sys::FormData_pg_class {
        // SAFETY: the reference is counted, so the entry and its pg_class part are live. Cannot raise.
        unsafe { &*(*self.ptr.as_ptr()).rd_rel }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: `ptr` is counted by this value alone, in the current resource owner. Cannot raise in that case.
            unsafe { pg_sys::RelationClose(self.ptr.as_ptr()) }
        }
    }
}

/// A locked, open table.
pub struct Rel {
    reference: Reference,
}

impl Rel {
    /// Waits for the lock. The relation is looked at only after the lock, so what is read of it is true.
    pub fn open(oid: Oid, lock: Lock) -> Result<Self> {
        may_fail(Fault::Lock);
        // SAFETY: inside a transaction. May raise (deadlock, cancel): unwinds; the caller holds no LWLock.
        unsafe { pg_sys::LockRelationOid(oid, lock.mode()) };
        Self::of_locked(oid)
    }

    /// As `open`, but gives up at once if the lock is not free. An AccessExclusive try assigns an xid even if it fails.
    pub fn open_if_lockable(oid: Oid, lock: Lock) -> Result<Option<Self>> {
        may_fail(Fault::Lock);
        // SAFETY: as in `open`; does not wait.
        if !unsafe { pg_sys::ConditionalLockRelationOid(oid, lock.mode()) } {
            return Ok(None);
        }
        Self::of_locked(oid).map(Some)
    }

    fn of_locked(oid: Oid) -> Result<Self> {
        match Reference::open(oid) {
            Some(reference) => Ok(Self { reference }),
            None => Err(gone(oid)),
        }
    }

    pub(super) fn raw(&self) -> pg_sys::Relation {
        self.reference.ptr.as_ptr()
    }

    pub fn oid(&self) -> Oid {
        // SAFETY: `self` is live; reads a field, cannot raise.
        unsafe { (*self.raw()).rd_id }
    }

    /// Changes when the relation is rewritten or truncated the ordinary way.
    pub fn file_number(&self) -> u32 {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        // SAFETY: `self` is live; reads a field, cannot raise.
        let number = unsafe { (*self.raw()).rd_node.relNode };
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        // SAFETY: `self` is live; reads a field, cannot raise.
        let number = unsafe { (*self.raw()).rd_locator.relNumber };
        number.into()
    }

    pub fn name(&self) -> String {
        super::raw::name(&self.reference.form().relname)
    }

    pub fn owner(&self) -> Oid {
        self.reference.form().relowner
    }

    pub fn natts(&self) -> usize {
        usize::try_from(self.reference.form().relnatts).unwrap_or(0)
    }

    pub fn has_index(&self) -> bool {
        self.reference.form().relhasindex
    }

    pub fn toast_oid(&self) -> Option<Oid> {
        let oid = self.reference.form().reltoastrelid;
        (oid != Oid::INVALID).then_some(oid)
    }

    /// Native access bypasses the executor, so it refuses what only the executor would honour.
    pub fn check_native(&self) -> Result<()> {
        // SAFETY: `self` is live; reads fields, cannot raise.
        let (triggers, rules, policies, am) = unsafe {
            let rel = &*self.raw();
            (!rel.trigdesc.is_null(), !rel.rd_rules.is_null(), !rel.rd_rsdesc.is_null(), rel.rd_tableam)
        };
        let form = self.reference.form();
        let what = if form.relkind as u8 != pg_sys::RELKIND_RELATION {
            "It is not an ordinary table."
        // SAFETY: returns the address of a static; cannot raise.
        } else if !core::ptr::eq(am, unsafe { pg_sys::GetHeapamTableAmRoutine() }) {
            "It does not use the heap access method."
        } else if triggers {
            "It has triggers."
        } else if rules {
            "It has rules."
        } else if policies || form.relrowsecurity {
            "It has row security."
        } else {
            return Ok(());
        };
        Err(Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("relation \"{}\" cannot be accessed natively", self.name()),
        )
        .detail(what)
        .hint("Remove what was added to this internal table."))
    }

    /// Blocks of the main fork, as the file system knows them now.
    pub fn blocks(&self) -> u32 {
        blocks_of(self.raw())
    }

    pub fn bytes(&self) -> u64 {
        u64::from(self.blocks()) * u64::from(pg_sys::BLCKSZ)
    }

    /// With what is stored out of line. Takes AccessShareLock on the toast table.
    pub fn bytes_with_toast(&self) -> Result<u64> {
        let toast = self.toast_oid().map(|oid| Self::open(oid, Lock::AccessShare)).transpose()?;
        Ok(self.bytes() + toast.map_or(0, |toast| toast.bytes()))
    }
}

fn blocks_of(rel: pg_sys::Relation) -> u32 {
    may_fail(Fault::Read);
    // SAFETY: the caller holds a counted reference. May raise (I/O): unwinds, nothing is held.
    unsafe { pg_sys::RelationGetNumberOfBlocksInFork(rel, pg_sys::ForkNumber::MAIN_FORKNUM) }
}

/// An open index. It takes no lock of its own: the lock on its table, held to the end of the transaction, keeps it.
pub struct Index {
    reference: Reference,
}

impl Index {
    pub fn open(table: &Rel, oid: Oid) -> Result<Self> {
        let Some(reference) = Reference::open(oid) else { return Err(gone(oid)) };
        // SAFETY: the reference is live; `rd_index` is null unless it is an index. Reads fields, cannot raise.
        let owner = unsafe { (*reference.ptr.as_ptr()).rd_index.as_ref() }.map(|form| form.indrelid);
        if owner != Some(table.oid()) {
            return Err(Error::new(
                Code::ERRCODE_WRONG_OBJECT_TYPE,
                format!("relation with OID {oid} is not an index of \"{}\"", table.name()),
            ));
        }
        Ok(Self { reference })
    }

    pub(super) fn raw(&self) -> pg_sys::Relation {
        self.reference.ptr.as_ptr()
    }

    pub(super) fn form(&self) -> &pg_sys::FormData_pg_index {
        // SAFETY: `open` has seen that it is an index; the counted reference keeps the entry. Cannot raise.
        unsafe { &*(*self.raw()).rd_index }
    }

    pub fn oid(&self) -> Oid {
        // SAFETY: `self` is live; reads a field, cannot raise.
        unsafe { (*self.raw()).rd_id }
    }

    pub fn name(&self) -> String {
        super::raw::name(&self.reference.form().relname)
    }

    pub fn is_btree(&self) -> bool {
        self.reference.form().relam == pg_sys::BTREE_AM_OID
    }

    /// May be scanned: valid, and ready for inserts all along.
    pub fn is_valid(&self) -> bool {
        self.form().indisvalid && self.is_ready()
    }

    /// Must get an entry for each row.
    pub fn is_ready(&self) -> bool {
        self.form().indisready && self.form().indislive
    }

    pub fn blocks(&self) -> u32 {
        blocks_of(self.raw())
    }
}

fn gone(oid: Oid) -> Error {
    Error::new(Code::ERRCODE_UNDEFINED_TABLE, format!("relation with OID {oid} does not exist"))
}

/// Finds a relation by name, without a lock: what it names may be gone at once.
pub fn relation_oid(schema: &str, name: &str) -> Option<Oid> {
    let (schema, name) = (CString::new(schema).ok()?, CString::new(name).ok()?);
    may_fail(Fault::Sql);
    // SAFETY: a terminated string that outlives the call. May raise (catalog read): unwinds, destructors run.
    let namespace = unsafe { pg_sys::get_namespace_oid(schema.as_ptr(), true) };
    if namespace == Oid::INVALID {
        return None;
    }
    // SAFETY: as above.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), namespace) };
    (oid != Oid::INVALID).then_some(oid)
}

/// The indexes of a table that are valid and ready.
pub fn index_oids(rel: &Rel) -> Result<Vec<Oid>> {
    let mut oids = all_index_oids(rel);
    let mut bad = None;
    oids.retain(|oid| match Index::open(rel, *oid) {
        Ok(index) => index.is_valid(),
        Err(error) => {
            bad = Some(error);
            false
        }
    });
    bad.map_or(Ok(oids), Err)
}

/// All live indexes, even those still being built.
pub(super) fn all_index_oids(rel: &Rel) -> Vec<Oid> {
    may_fail(Fault::Alloc);
    // SAFETY: `rel` is live. May raise (catalog read): unwinds. The list is our copy, freed below.
    let list = unsafe { pg_sys::RelationGetIndexList(rel.raw()) };
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a list of OIDs, `length` cells from `elements`; ours until freed.
    let cells = unsafe { core::slice::from_raw_parts((*list).elements, (*list).length as usize) };
    // SAFETY: RelationGetIndexList makes an OID list, so that variant of the union is set.
    let oids = cells.iter().map(|cell| unsafe { cell.oid_value }).collect();
    // SAFETY: our copy, no longer referenced.
    unsafe { pg_sys::list_free(list) };
    oids
}

fn lock_tag(oid: Oid) -> pg_sys::LOCKTAG {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    let database = unsafe { pg_sys::MyDatabaseId };
    pg_sys::LOCKTAG {
        locktag_field1: database.into(),
        locktag_field2: oid.into(),
        locktag_field3: 0,
        locktag_field4: 0,
        locktag_type: pg_sys::LockTagType::LOCKTAG_RELATION as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    }
}

/// The processes that hold a lock in conflict with this one, without ourselves; 0 stands for a prepared transaction. Takes no
/// lock and no xid; what it says may be over when it returns.
pub fn lock_conflicts(oid: Oid, lock: Lock) -> Vec<i32> {
    conflicting(oid, lock).iter().filter_map(holder_pid).collect()
}

fn conflicting(oid: Oid, lock: Lock) -> Vec<pg_sys::VirtualTransactionId> {
    let tag = lock_tag(oid);
    let mut count = 0;
    may_fail(Fault::Alloc);
    // SAFETY: tag and count are ours. May raise (out of memory): unwinds. The result is palloc'd in the current context.
    let holders = unsafe { pg_sys::GetLockConflicts(&raw const tag, lock.mode(), &raw mut count) };
    if holders.is_null() || count <= 0 {
        return Vec::new();
    }
    // SAFETY: `count` entries, valid until the context is reset; copied here.
    unsafe { core::slice::from_raw_parts(holders, count as usize) }.to_vec()
}

/// The process of a virtual transaction id; 0 if it has been prepared since; none if it has ended.
fn holder_pid(holder: &pg_sys::VirtualTransactionId) -> Option<i32> {
    if holder_backend(holder) < 0 {
        return Some(0);
    }
    if let Some(proc) = holder_proc(holder)
        && proc_lxid(proc) == holder.localTransactionId
        && proc.pid != 0
    {
        return Some(proc.pid);
    }
    // A prepared transaction keeps the virtual id of the session that prepared it.
    let mut have_more = false;
    // SAFETY: reads shared state under an LWLock; cannot raise. The id is valid: GetLockConflicts lists no other.
    let xid = unsafe { super::raw::TwoPhaseGetXidByVirtualXID(*holder, &raw mut have_more) };
    (xid.into_inner() != 0).then_some(0)
}

#[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
fn holder_backend(holder: &pg_sys::VirtualTransactionId) -> i32 {
    holder.backendId
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
fn holder_backend(holder: &pg_sys::VirtualTransactionId) -> i32 {
    holder.procNumber
}

fn holder_proc(holder: &pg_sys::VirtualTransactionId) -> Option<&'static pg_sys::PGPROC> {
    #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
    // SAFETY: cannot raise; an unused id gives NULL. PGPROCs live as long as the server.
    let proc = unsafe { super::raw::BackendIdGetProc(holder.backendId).as_ref() };
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    // SAFETY: cannot raise; an unused number gives NULL. PGPROCs live as long as the server.
    let proc = unsafe { pg_sys::ProcNumberGetProc(holder.procNumber).as_ref() };
    proc
}

#[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
fn proc_lxid(proc: &pg_sys::PGPROC) -> u32 {
    proc.lxid
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
fn proc_lxid(proc: &pg_sys::PGPROC) -> u32 {
    proc.vxid.lxid
}

/// Waits until each transaction that now holds a conflicting lock has ended, prepared ones too. Takes nothing itself.
pub fn wait_for_lockers(oid: Oid, lock: Lock) {
    may_fail(Fault::Lock);
    // SAFETY: inside a transaction. May raise (deadlock, cancel): unwinds; the caller holds no LWLock.
    unsafe { pg_sys::WaitForLockers(lock_tag(oid), lock.mode(), false) }
}

/// As `wait_for_lockers`, but for those that are prepared, which may stay for ever (one that is being prepared just now is waited for).
pub fn wait_for_running_lockers(oid: Oid, lock: Lock) {
    for holder in conflicting(oid, lock) {
        if holder_pid(&holder).is_some_and(|pid| pid != 0) {
            may_fail(Fault::Lock);
            // SAFETY: inside a transaction. May raise (deadlock, cancel): unwinds, and drops the list; the caller holds no LWLock.
            unsafe { pg_sys::VirtualXactLock(holder, true) };
        }
    }
}

/// Does this session hold this lock or a stronger one?
pub fn holds_lock(oid: Oid, lock: Lock) -> bool {
    // SAFETY: reads the local lock table; cannot raise.
    unsafe { pg_sys::CheckRelationOidLockedByMe(oid, lock.mode(), true) }
}
