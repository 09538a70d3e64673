//! Reading natively: in index order, in physical order, or by place. All under SnapshotAny with our own judgement
//! (`row::RowState`), but for `HeapScan::begin_mvcc`.
//! Tables written: none. The caller holds: a lock on the table, an active snapshot (the server asserts one), no LWLock.
//! A scan pins the buffers it stands on: end it before waiting for anything. Each turn checks for interrupts.
use core::marker::PhantomData;
use core::ptr;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::points::{Fault, may_fail};
use super::rel::{Index, Rel};
pub use super::row::{RawRow, RowState, Tid};
use super::row::{Reader, clear_slot, pointer_of, tid_of};
use super::xact::check_for_interrupts;
pub use super::xid::{FullXid, XidState, full_xid, has_ended, is_own, next_full_xid, top_of, visible_to_caller, xid_state};
use crate::error::{Error, Result};

fn any_snapshot() -> pg_sys::Snapshot {
    &raw mut pg_sys::SnapshotAnyData
}

/// Rows with one value of the first index column, ordered by the second and then by place.
pub struct IndexScan<'r> {
    scan: pg_sys::IndexScanDesc,
    reader: Reader,
    from_key: i64,
    after: Option<Tid>,
    _relations: PhantomData<&'r Rel>,
}

impl<'r> IndexScan<'r> {
    /// Begins at the first row with this first column (int4) whose second column (eight bytes, ordered as int8) is at least
    /// `from_key`. The index must be a valid B-tree of this table.
    pub fn begin(rel: &'r Rel, index: &'r Index, first: i32, from_key: i64) -> Result<Self> {
        check_shape(rel, index)?;
        let reader = Reader::new(rel);
        may_fail(Fault::Alloc);
        // SAFETY: both relations are live for 'r, the snapshot is static. May raise: unwinds. The scan is ended on drop.
        let scan = unsafe {
            pg_sys::index_beginscan(
                rel.raw(),
                index.raw(),
                any_snapshot(),
                #[cfg(feature = "pg18")]
                ptr::null_mut(),
                2,
                0,
            )
        };
        // The index tuple carries the key, so rows can be passed over without a visit to the heap.
        // SAFETY: the scan is ours; must be set before the first rescan.
        unsafe { (*scan).xs_want_itup = true };
        let mut this = Self { scan, reader, from_key, after: None, _relations: PhantomData };
        this.seek(first, from_key, None);
        Ok(this)
    }

    /// Begins anew behind `(first, from_key, after)`; a row at exactly that place is not given again.
    pub fn seek(&mut self, first: i32, from_key: i64, after: Option<Tid>) {
        self.from_key = from_key;
        self.after = after;
        let mut keys = [pg_sys::ScanKeyData::default(), pg_sys::ScanKeyData::default()];
        let [equal, least] = &mut keys;
        // SAFETY: writes one key, of a built-in function. May raise (out of memory): unwinds.
        unsafe {
            pg_sys::ScanKeyInit(
                equal,
                1,
                pg_sys::BTEqualStrategyNumber as u16,
                pg_sys::Oid::from(pg_sys::F_INT4EQ),
                pg_sys::Datum::from(first),
            );
        }
        // SAFETY: as above.
        unsafe {
            pg_sys::ScanKeyInit(
                least,
                2,
                pg_sys::BTGreaterEqualStrategyNumber as u16,
                pg_sys::Oid::from(pg_sys::F_INT8GE),
                pg_sys::Datum::from(from_key),
            );
        }
        // SAFETY: the scan is live and has room for two keys, which it copies. May raise: unwinds.
        unsafe { pg_sys::index_rescan(self.scan, keys.as_mut_ptr(), 2, ptr::null_mut(), 0) }
    }

    /// The next index entry, without a visit to the heap: second column and place. The row may be of anybody.
    pub fn next_entry(&mut self) -> Option<(i64, Tid)> {
        loop {
            check_for_interrupts();
            // SAFETY: the scan is live. May raise (I/O): unwinds, abort releases its pins.
            let pointer = unsafe { pg_sys::index_getnext_tid(self.scan, pg_sys::ScanDirection::ForwardScanDirection) };
            // SAFETY: null at the end, else inside the scan descriptor.
            let tid = tid_of(unsafe { pointer.as_ref() }?);
            let key = self.entry_key();
            let passed = key == self.from_key && self.after.is_some_and(|after| tid <= after);
            if !passed {
                return Some((key, tid));
            }
        }
    }

    /// The next row, of anybody, with its judgement; the key is the second index column.
    pub fn next(&mut self) -> Option<(i64, RawRow<'_>)> {
        loop {
            let (key, _) = self.next_entry()?;
            may_fail(Fault::Read);
            // SAFETY: the scan stands on an entry, the slot is a buffer heap slot of the table. May raise (I/O): unwinds.
            if unsafe { pg_sys::index_fetch_heap(self.scan, self.reader.slot()) } {
                return Some((key, self.reader.row()));
            }
        }
    }

    /// The second column of the current index tuple: the first is four bytes, so it lies eight behind the start of the data.
    fn entry_key(&self) -> i64 {
        // SAFETY: `xs_want_itup` makes index_getnext_tid keep the tuple of the entry it returned.
        let (tuple, info) = unsafe { ((*self.scan).xs_itup, (*(*self.scan).xs_itup).t_info) };
        let data = if u32::from(info) & INDEX_NULL_MASK == 0 { 8 } else { 16 };
        // SAFETY: `check_shape` has seen an int4 and an eight-byte column passed by value; neither is null, for both have a
        // scan key. The bytes are inside the tuple.
        unsafe { tuple.cast::<u8>().add(data + 8).cast::<i64>().read_unaligned() }
    }
}

/// Set in an index tuple's info word if it has a null bitmap (an included column may be null).
const INDEX_NULL_MASK: u32 = 0x8000;

impl Drop for IndexScan<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the scan is ours and live; the slot still pins its own buffer. Abort does it when unwinding.
            unsafe { pg_sys::index_endscan(self.scan) }
        }
    }
}

fn check_shape(rel: &Rel, index: &Index) -> Result<()> {
    let wrong = |what: &str| {
        Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("index \"{}\" cannot be scanned natively", index.name()),
        )
        .detail(what)
        .hint(format!("Run REINDEX TABLE on \"{}\".", rel.name()))
    };
    if index.form().indrelid != rel.oid() {
        return Err(wrong("It belongs to another table."));
    }
    if !index.is_btree() || !index.is_valid() {
        return Err(wrong("It is not a valid B-tree."));
    }
    // SAFETY: the index is live; reads a field.
    let desc = unsafe { (*index.raw()).rd_att };
    // SAFETY: the descriptor and the opclass input types are live with the index; a B-tree of two keys has two of each.
    let good = unsafe {
        index.form().indnkeyatts >= 2
            && *(*index.raw()).rd_opcintype == pg_sys::INT4OID
            && matches!(*(*index.raw()).rd_opcintype.add(1), pg_sys::INT8OID | pg_sys::TIMESTAMPTZOID | pg_sys::TIMESTAMPOID)
            && (*desc).natts >= 2
            && *(*index.raw()).rd_indoption & 3 == 0
            && *(*index.raw()).rd_indoption.add(1) & 3 == 0
    };
    if good { Ok(()) } else { Err(wrong("Its first columns are not (int4, int8) in ascending order.")) }
}

/// Rows in physical order.
pub struct HeapScan<'r> {
    scan: pg_sys::TableScanDesc,
    reader: Reader,
    _relation: PhantomData<&'r Rel>,
}

impl<'r> HeapScan<'r> {
    /// Every row that is there, of anybody.
    pub fn begin(rel: &'r Rel) -> Self {
        Self::begin_with(rel, any_snapshot(), 0)
    }

    /// The rows that the active snapshot sees.
    pub fn begin_mvcc(rel: &'r Rel) -> Self {
        // SAFETY: a snapshot is active in every call from SQL. May raise (out of memory): unwinds. Unregistered by heap_endscan.
        let snapshot = unsafe { pg_sys::RegisterSnapshot(pg_sys::GetActiveSnapshot()) };
        Self::begin_with(rel, snapshot, pg_sys::ScanOptions::SO_ALLOW_PAGEMODE | pg_sys::ScanOptions::SO_TEMP_SNAPSHOT)
    }

    /// Not synchronised with other scans, so the order is that of the blocks; a large table goes through a ring of buffers.
    fn begin_with(rel: &'r Rel, snapshot: pg_sys::Snapshot, flags: u32) -> Self {
        let reader = Reader::new(rel);
        let flags = flags | pg_sys::ScanOptions::SO_TYPE_SEQSCAN | pg_sys::ScanOptions::SO_ALLOW_STRAT;
        may_fail(Fault::Alloc);
        // SAFETY: the relation is a live heap table for 'r, the snapshot static or registered. May raise: unwinds.
        let scan = unsafe { pg_sys::heap_beginscan(rel.raw(), snapshot, 0, ptr::null_mut(), ptr::null_mut(), flags) };
        Self { scan, reader, _relation: PhantomData }
    }

    pub fn next(&mut self) -> Option<RawRow<'_>> {
        check_for_interrupts();
        may_fail(Fault::Read);
        // SAFETY: scan and slot are ours and of the same table. May raise (I/O): unwinds, abort releases the pins.
        let found =
            unsafe { pg_sys::heap_getnextslot(self.scan, pg_sys::ScanDirection::ForwardScanDirection, self.reader.slot()) };
        found.then(|| self.reader.row())
    }
}

impl Drop for HeapScan<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the scan is ours and live; ends the registered snapshot too. Abort does both when unwinding.
            unsafe { pg_sys::heap_endscan(self.scan) }
        }
    }
}

/// Rows by place, one after the other, through one slot.
pub struct TidFetch<'r> {
    rel: &'r Rel,
    reader: Reader,
    blocks: u32,
}

impl<'r> TidFetch<'r> {
    pub fn begin(rel: &'r Rel) -> Self {
        Self { rel, reader: Reader::new(rel), blocks: rel.blocks() }
    }

    /// The row at this place, of anybody; none if there is no such block or the line pointer is unused.
    pub fn fetch(&mut self, tid: Tid) -> Option<RawRow<'_>> {
        check_for_interrupts();
        self.fill(tid).then(|| self.reader.row())
    }

    fn fill(&mut self, tid: Tid) -> bool {
        let pointer = pointer_of(tid);
        let block = tid >> 16;
        if pointer.ip_posid == 0 {
            return false;
        }
        if block >= u64::from(self.blocks) {
            self.blocks = self.rel.blocks();
            if block >= u64::from(self.blocks) {
                return false;
            }
        }
        // SAFETY: the slot is ours; forgets the row before, so that its place in the slot can be written.
        unsafe { clear_slot(self.reader.slot()) };
        // SAFETY: a buffer heap slot starts with a heap slot, which has room for one tuple; both live as long as the reader.
        let tuple = unsafe { &raw mut (*self.reader.slot().cast::<pg_sys::HeapTupleTableSlot>()).tupdata };
        // SAFETY: `tuple` is ours and unused since the slot is clear.
        unsafe { (*tuple).t_self = pointer };
        let mut buffer: pg_sys::Buffer = 0;
        may_fail(Fault::Read);
        // SAFETY: the relation is live, the block exists. May raise (I/O): unwinds. On true the buffer is pinned for us.
        let found = unsafe {
            pg_sys::heap_fetch(
                self.rel.raw(),
                any_snapshot(),
                tuple,
                &raw mut buffer,
                #[cfg(not(feature = "pg14"))]
                false,
            )
        };
        if found {
            // SAFETY: the tuple lies in the pinned buffer; the pin passes to the slot. Cannot raise.
            unsafe { pg_sys::ExecStorePinnedBufferHeapTuple(tuple, self.reader.slot(), buffer) };
        }
        found
    }
}

/// One row that keeps its own pin.
pub struct FetchedRow {
    reader: Reader,
}

impl FetchedRow {
    pub fn row(&mut self) -> RawRow<'_> {
        self.reader.row()
    }
}

/// The row at this place, of anybody. For many rows, a `TidFetch` is cheaper.
pub fn fetch_by_tid(rel: &Rel, tid: Tid) -> Option<FetchedRow> {
    let mut fetch = TidFetch::begin(rel);
    let found = fetch.fill(tid);
    found.then_some(FetchedRow { reader: fetch.reader })
}
