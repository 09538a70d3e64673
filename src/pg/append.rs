//! Native appends: rows into a heap and its indexes without the executor.
//! What the executor would have done, and who does it here: read-only, standby and parallel checks, permissions: the caller
//! (`xact::require_writable`, EXECUTE on the SQL function) · lock: `Rel` · triggers, rules, row security: refused here · command
//! id: here · defaults, NOT NULL, CHECK: the caller knows its rows · toast, WAL, replica identity, SSI, statistics: the heap
//! access method · index entries: here · memory: a context reset per batch · interrupts: between batches.
//! Tables written: the given one. The caller holds: RowExclusive on it, an active snapshot, no LWLock.
use core::marker::PhantomData;
use core::ptr;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use super::memory::{Context, Entered};
use super::points::{Fault, may_fail};
use super::rel::{Index, Rel, all_index_oids};
use super::row::{Tid, clear_slot, tid_of};
use super::xact::check_for_interrupts;
use crate::error::{Error, Result};

/// Rows handed to the heap at a time: one WAL record a page, and small enough to stay in cache.
pub const BATCH_ROWS: usize = 256;

type Row = [Option<Datum>];

/// An index and what an insertion needs to know of it.
struct Target {
    index: pg_sys::Relation,
    info: *mut pg_sys::IndexInfo,
    /// Table columns of the index columns, counted from 0.
    columns: Vec<usize>,
    check: pg_sys::IndexUniqueCheck::Type,
    is_partial: bool,
}

/// The state of appending to one table during one call.
pub struct Append<'r> {
    rel: &'r Rel,
    targets: Vec<Target>,
    slots: Vec<*mut pg_sys::TupleTableSlot>,
    values: Vec<Datum>,
    nulls: Vec<bool>,
    natts: usize,
    /// Holds slots and index descriptions for the life of this value.
    keep: Context,
    /// Holds tuples and what the access methods leave behind; reset per batch.
    batch: Context,
    _indexes: PhantomData<&'r Index>,
}

impl<'r> Append<'r> {
    /// `indexes` must be all indexes of the table; the closure given to `append` numbers them in this order.
    pub fn new(rel: &'r Rel, indexes: &'r [Index]) -> Result<Self> {
        rel.check_native()?;
        if rel.has_index() && all_index_oids(rel).len() != indexes.len() {
            return Err(Error::new(
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("relation \"{}\" has indexes that the library does not know", rel.name()),
            )
            .detail("Its rows are written natively, and such an index would miss them.")
            .hint("Drop the index."));
        }
        let keep = Context::new(c"native append");
        let batch = Context::new(c"native append batch");
        let targets = {
            let _in_keep = keep.enter();
            indexes.iter().map(|index| Target::of(rel, index)).collect::<Result<Vec<_>>>()?
        };
        // SAFETY: `rel` is live; reads fields.
        let natts = usize::try_from(unsafe { (*(*rel.raw()).rd_att).natts }).unwrap_or(0);
        Ok(Self {
            rel,
            targets,
            slots: Vec::new(),
            values: Vec::with_capacity(natts),
            nulls: Vec::with_capacity(natts),
            natts,
            keep,
            batch,
            _indexes: PhantomData,
        })
    }

    /// Appends the rows in order and gives their places. A partial index gets an entry for a row only if
    /// `wants(row number, index number)` says so; every other index gets one for each row.
    pub fn append<R: AsRef<Row>>(&mut self, rows: &[R], wants: &mut dyn FnMut(usize, usize) -> bool) -> Result<Vec<Tid>> {
        if let Some(row) = rows.iter().find(|row| row.as_ref().len() != self.natts) {
            return Err(Error::new(
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("relation \"{}\" has {} columns, the library writes {}", self.rel.name(), self.natts, row.as_ref().len()),
            ));
        }
        for slot in &self.slots {
            // SAFETY: ours; an append whose error a subtransaction caught may have left a tuple of the batch context in it.
            unsafe { clear_slot(*slot) };
        }
        // SAFETY: inside a transaction. May raise (parallel mode): unwinds, nothing is held.
        let command = unsafe { pg_sys::GetCurrentCommandId(true) };
        let mut tids = Vec::with_capacity(rows.len());
        for batch in rows.chunks(BATCH_ROWS) {
            check_for_interrupts();
            let first = tids.len();
            let entered = self.batch.enter();
            match batch {
                [row] => tids.push(self.insert_one(row.as_ref(), command)),
                _ => self.insert_many(batch, command, &mut tids),
            }
            for (number, row) in batch.iter().enumerate() {
                if let Some(tid) = tids.get(first + number) {
                    self.insert_entries(first + number, row.as_ref(), *tid, wants);
                }
            }
            drop(entered);
            self.batch.reset();
        }
        Ok(tids)
    }

    fn form_tuple(&mut self, row: &Row) -> pg_sys::HeapTuple {
        self.values.clear();
        self.nulls.clear();
        self.values.extend(row.iter().map(|c| c.unwrap_or(Datum::null())));
        self.nulls.extend(row.iter().map(Option::is_none));
        may_fail(Fault::Alloc);
        // SAFETY: one value and flag per column, of the columns' types by the caller's contract; copied into the current
        // context. May raise (row too wide): unwinds, the context owns the rest.
        unsafe { pg_sys::heap_form_tuple((*self.rel.raw()).rd_att, self.values.as_mut_ptr(), self.nulls.as_mut_ptr()) }
    }

    fn insert_one(&mut self, row: &Row, command: pg_sys::CommandId) -> Tid {
        let tuple = self.form_tuple(row);
        may_fail(Fault::Append);
        // SAFETY: the relation is live and locked, the tuple ours. May raise: unwinds, abort releases buffers.
        unsafe { pg_sys::heap_insert(self.rel.raw(), tuple, command, 0, ptr::null_mut()) };
        // SAFETY: heap_insert has set the place in our tuple.
        tid_of(unsafe { &(*tuple).t_self })
    }

    fn insert_many<R: AsRef<Row>>(&mut self, rows: &[R], command: pg_sys::CommandId, tids: &mut Vec<Tid>) {
        self.make_slots(rows.len());
        for (number, row) in rows.iter().enumerate() {
            let tuple = self.form_tuple(row.as_ref());
            if let Some(slot) = self.slots.get(number) {
                // SAFETY: slot and tuple are ours. Owned by the slot, the tuple is neither copied nor materialised again.
                unsafe { pg_sys::ExecStoreHeapTuple(tuple, *slot, true) };
            }
        }
        may_fail(Fault::Append);
        // SAFETY: the relation is live and locked, the slots filled. No bulk state: its ring would evict pages about to be
        // read. May raise: unwinds, abort releases buffers. What it leaks is in the batch context.
        unsafe {
            pg_sys::heap_multi_insert(self.rel.raw(), self.slots.as_mut_ptr(), rows.len() as i32, command, 0, ptr::null_mut());
        }
        for slot in self.slots.iter().take(rows.len()) {
            // SAFETY: heap_multi_insert has set the place in each slot.
            tids.push(tid_of(unsafe { &(**slot).tts_tid }));
            // SAFETY: the slot is ours; frees the tuple before its context is reset. Cannot raise.
            unsafe { clear_slot(*slot) };
        }
    }

    fn make_slots(&mut self, wanted: usize) {
        let _in_keep = self.keep.enter();
        while self.slots.len() < wanted {
            may_fail(Fault::Alloc);
            // SAFETY: descriptor and operations are live. May raise (out of memory): unwinds. Dropped with this value.
            let slot = unsafe { pg_sys::MakeSingleTupleTableSlot((*self.rel.raw()).rd_att, &raw const pg_sys::TTSOpsHeapTuple) };
            self.slots.push(slot);
        }
    }

    fn insert_entries(&self, number: usize, row: &Row, tid: Tid, wants: &mut dyn FnMut(usize, usize) -> bool) {
        for (target_number, target) in self.targets.iter().enumerate() {
            if !target.is_partial || wants(number, target_number) {
                target.insert(self.rel, row, tid);
            }
        }
    }
}

impl Target {
    fn of(rel: &Rel, index: &Index) -> Result<Self> {
        if index.form().indrelid != rel.oid() {
            return Err(unusable(index, "It belongs to another table."));
        }
        may_fail(Fault::Alloc);
        // SAFETY: the index is live. May raise (out of memory, catalog): unwinds. The result is in the keep context.
        let info = unsafe { pg_sys::BuildIndexInfo(index.raw()) };
        // SAFETY: made above; reads fields.
        let described = unsafe { &*info };
        if !described.ii_ReadyForInserts {
            return Err(unusable(index, "It is not ready for insertions."));
        }
        if !described.ii_Expressions.is_null() || !described.ii_ExclusionOps.is_null() {
            return Err(unusable(index, "It has an expression or an exclusion constraint."));
        }
        if described.ii_Unique && !index.form().indimmediate {
            return Err(unusable(index, "Its uniqueness check is deferrable."));
        }
        let columns = described
            .ii_IndexAttrNumbers
            .iter()
            .take(usize::try_from(described.ii_NumIndexAttrs).unwrap_or(0))
            .map(|number| usize::try_from(number - 1).ok())
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| unusable(index, "It has a system column."))?;
        let check = if described.ii_Unique {
            pg_sys::IndexUniqueCheck::UNIQUE_CHECK_YES
        } else {
            pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO
        };
        let is_partial = !described.ii_Predicate.is_null();
        Ok(Self { index: index.raw(), info, columns, check, is_partial })
    }

    fn insert(&self, rel: &Rel, row: &Row, tid: Tid) {
        const MAX: usize = pg_sys::INDEX_MAX_KEYS as usize;
        let mut values = [Datum::null(); MAX];
        let mut nulls = [true; MAX];
        for ((value, null), column) in values.iter_mut().zip(&mut nulls).zip(&self.columns) {
            if let Some(Some(datum)) = row.get(*column) {
                (*value, *null) = (*datum, false);
            }
        }
        let mut pointer = super::row::pointer_of(tid);
        may_fail(Fault::Append);
        // SAFETY: table and index are live and locked, the arrays have room for every index column, the values are those of
        // the row just written. May raise (duplicate key): unwinds, abort undoes the row.
        unsafe {
            pg_sys::index_insert(
                self.index,
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
                &raw mut pointer,
                rel.raw(),
                self.check,
                false,
                self.info,
            );
        }
    }
}

fn unusable(index: &Index, what: &str) -> Error {
    Error::new(
        Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("index \"{}\" cannot be maintained natively", index.name()),
    )
    .detail(what)
    .hint("Drop the index if it was added by hand.")
}

impl Drop for Append<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let _in_keep: Entered = self.keep.enter();
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        for target in &self.targets {
            // SAFETY: index and description are live. Releases what the access method cached (BRIN keeps pins).
            unsafe { pg_sys::index_insert_cleanup(target.index, target.info) }
        }
        for slot in &self.slots {
            // SAFETY: ours, made by MakeSingleTupleTableSlot, cleared after each batch. Cannot raise.
            unsafe { pg_sys::ExecDropSingleTupleTableSlot(*slot) }
        }
    }
}
