//! One heap row as it lies in its page, whoever wrote it, and the judgement of what became of its writer.
//! Never sets a hint bit, never waits. Values point into a pinned buffer: they are good until the reader moves on.
use core::marker::PhantomData;
use core::ptr::NonNull;

use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use super::points::{Fault, may_fail};
use super::rel::Rel;
use super::xid::{FullXid, Memo, XidState};
use super::{array, xid};

/// A row's place: block number, shifted left by 16, and the line pointer.
pub type Tid = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowState {
    Committed,
    /// Written by the current transaction or a subtransaction of it.
    Own(FullXid),
    /// Written by another transaction, which had not ended when the scan first met it.
    InProgress(FullXid),
    /// Its writer aborted, or it was deleted.
    Dead,
}

#[derive(Clone, Copy)]
pub(super) struct Width {
    by_val: bool,
    len: i16,
}

/// A slot for one row at a time, with what is needed to read and judge it.
pub(super) struct Reader {
    slot: NonNull<pg_sys::TupleTableSlot>,
    widths: Box<[Width]>,
    memo: Memo,
    _not_send: PhantomData<*mut ()>,
}

impl Reader {
    pub fn new(rel: &Rel) -> Self {
        // SAFETY: `rel` is live and locked, so its descriptor stays. Reads a field.
        let desc = unsafe { (*rel.raw()).rd_att };
        let widths = widths(desc);
        may_fail(Fault::Alloc);
        // SAFETY: descriptor and slot operations are live. May raise (out of memory): unwinds. The slot is given back on drop.
        let slot = unsafe { pg_sys::MakeSingleTupleTableSlot(desc, &raw const pg_sys::TTSOpsBufferHeapTuple) };
        // SAFETY: palloc never gives NULL.
        let slot = unsafe { NonNull::new_unchecked(slot) };
        Self { slot, widths, memo: Memo::new(), _not_send: PhantomData }
    }

    pub fn slot(&self) -> *mut pg_sys::TupleTableSlot {
        self.slot.as_ptr()
    }

    /// The row now in the slot.
    pub fn row(&mut self) -> RawRow<'_> {
        // SAFETY: a buffer heap slot starts with a heap slot; it has just been filled, its buffer is pinned. Reads fields.
        let tuple = unsafe { &*(*self.slot().cast::<pg_sys::HeapTupleTableSlot>()).tuple };
        // SAFETY: the tuple lies in the pinned page.
        let header = unsafe { &*tuple.t_data };
        let (xmin, state) = judge(header, &mut self.memo);
        RawRow {
            slot: self.slot,
            widths: &self.widths,
            tid: tid_of(&tuple.t_self),
            xmin: self.memo.full(xmin),
            frozen: has(header.t_infomask, pg_sys::HEAP_XMIN_FROZEN),
            state,
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: ours alone, made by MakeSingleTupleTableSlot; releases the pin. Abort does it when unwinding.
            unsafe { pg_sys::ExecDropSingleTupleTableSlot(self.slot()) }
        }
    }
}

fn widths(desc: pg_sys::TupleDesc) -> Box<[Width]> {
    // SAFETY: the descriptor is live; reads a field.
    let natts = unsafe { (*desc).natts };
    (0..natts).map(|i| width(desc, i)).collect()
}

#[cfg(not(feature = "pg18"))]
fn width(desc: pg_sys::TupleDesc, i: i32) -> Width {
    // SAFETY: the descriptor is live and has more than `i` attributes behind it.
    let attribute = unsafe { &*(*desc).attrs.as_ptr().add(i as usize) };
    Width { by_val: attribute.attbyval, len: attribute.attlen }
}

#[cfg(feature = "pg18")]
fn width(desc: pg_sys::TupleDesc, i: i32) -> Width {
    // SAFETY: the descriptor is live and has more than `i` attributes behind it.
    let attribute = unsafe { &*(*desc).compact_attrs.as_ptr().add(i as usize) };
    Width { by_val: attribute.attbyval, len: attribute.attlen }
}

/// A row, good until the scan moves on.
pub struct RawRow<'s> {
    slot: NonNull<pg_sys::TupleTableSlot>,
    widths: &'s [Width],
    tid: Tid,
    xmin: FullXid,
    frozen: bool,
    state: RowState,
}

impl RawRow<'_> {
    pub fn tid(&self) -> Tid {
        self.tid
    }

    pub fn state(&self) -> RowState {
        self.state
    }

    /// The (sub)transaction that wrote the row, also if the row has been frozen since.
    pub fn xmin_full(&self) -> FullXid {
        self.xmin
    }

    /// Would the caller's snapshot see this committed row? Always, below REPEATABLE READ.
    pub fn visible_to_caller(&self) -> bool {
        self.frozen || xid::visible_to_caller(self.xmin)
    }

    /// Takes the row apart up to this column in one go: who will read several says so, for each call of the server has a price.
    pub fn read_to(&self, attno: usize) {
        let attno = attno.min(self.widths.len());
        // SAFETY: the slot is live and filled while this borrow of its reader lasts; reads a field.
        let valid = unsafe { self.slot.as_ref() }.tts_nvalid;
        if usize::try_from(valid).unwrap_or(0) < attno {
            // SAFETY: the attribute exists. Cannot raise for a well-formed tuple; fills the slot's own arrays.
            unsafe { pg_sys::slot_getsomeattrs_int(self.slot.as_ptr(), attno as i32) }
        }
    }

    /// A column, counted from 1. A varlena is not detoasted; it points into the page. A column that does not exist is NULL.
    pub fn datum(&self, attno: usize) -> Option<Datum> {
        if attno == 0 || attno > self.widths.len() {
            debug_assert!(false, "column {attno} does not exist");
            return None;
        }
        self.read_to(attno);
        // SAFETY: both arrays have one element per attribute, and the first `attno` are filled.
        let (value, null) = unsafe {
            let slot = self.slot.as_ref();
            (*slot.tts_values.add(attno - 1), *slot.tts_isnull.add(attno - 1))
        };
        (!null).then_some(value)
    }

    /// As `datum`, copied into the current memory context; an external toast pointer is copied as a pointer.
    pub fn copy_datum(&self, attno: usize) -> Option<Datum> {
        let value = self.datum(attno)?;
        let width = self.widths.get(attno - 1)?;
        Some(if width.by_val { value } else { array::copy(value, false, width.len) })
    }

    pub fn i64(&self, attno: usize) -> Option<i64> {
        self.datum(attno).map(|d| d.value() as i64)
    }

    pub fn i32(&self, attno: usize) -> Option<i32> {
        self.datum(attno).map(|d| d.value() as i32)
    }

    pub fn i16(&self, attno: usize) -> Option<i16> {
        self.datum(attno).map(|d| d.value() as i16)
    }

    pub fn bool(&self, attno: usize) -> Option<bool> {
        self.datum(attno).map(|d| d.value() as u8 != 0)
    }
}

/// Empties a slot.
///
/// # Safety
/// `slot` is live and filled, if at all, with a tuple or pin that it still owns: then clearing cannot raise.
pub(super) unsafe fn clear_slot(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: promised by the caller; reads a field of a static table.
    if let Some(clear) = unsafe { (*(*slot).tts_ops).clear } {
        // SAFETY: frees the slot's own tuple or releases its own pin, which cannot raise.
        unsafe { clear(slot) }
    }
}

pub(super) fn tid_of(pointer: &pg_sys::ItemPointerData) -> Tid {
    let block = (u64::from(pointer.ip_blkid.bi_hi) << 16) | u64::from(pointer.ip_blkid.bi_lo);
    (block << 16) | u64::from(pointer.ip_posid)
}

pub(super) fn pointer_of(tid: Tid) -> pg_sys::ItemPointerData {
    pg_sys::ItemPointerData {
        ip_blkid: pg_sys::BlockIdData { bi_hi: (tid >> 32) as u16, bi_lo: (tid >> 16) as u16 },
        ip_posid: tid as u16,
    }
}

fn has(infomask: u16, bits: u32) -> bool {
    u32::from(infomask) & bits == bits
}

/// Hint bits first; then own, in progress, committed, aborted, in this order. The raw xmin is returned even of a frozen row.
fn judge(header: &pg_sys::HeapTupleHeaderData, memo: &mut Memo) -> (pg_sys::TransactionId, RowState) {
    // SAFETY: a heap tuple on a page always uses this variant of the union. Reads fields.
    let (xmin, xmax) = unsafe { (header.t_choice.t_heap.t_xmin, header.t_choice.t_heap.t_xmax) };
    let mask = header.t_infomask;
    let inserted = if has(mask, pg_sys::HEAP_XMIN_COMMITTED) {
        RowState::Committed
    } else if has(mask, pg_sys::HEAP_XMIN_INVALID) {
        RowState::Dead
    } else {
        match memo.state(xmin) {
            XidState::Committed => RowState::Committed,
            XidState::Aborted => RowState::Dead,
            XidState::Own => RowState::Own(memo.full(xmin)),
            XidState::InProgress => RowState::InProgress(memo.full(xmin)),
        }
    };
    if inserted == RowState::Committed && is_deleted(header, mask, xmax, memo) {
        return (xmin, RowState::Dead);
    }
    (xmin, inserted)
}

fn is_deleted(header: &pg_sys::HeapTupleHeaderData, mask: u16, xmax: pg_sys::TransactionId, memo: &mut Memo) -> bool {
    let lock_only = has(mask, pg_sys::HEAP_XMAX_LOCK_ONLY)
        || u32::from(mask) & (pg_sys::HEAP_XMAX_IS_MULTI | pg_sys::HEAP_LOCK_MASK) == pg_sys::HEAP_XMAX_EXCL_LOCK;
    if has(mask, pg_sys::HEAP_XMAX_INVALID) || lock_only || xmax.into_inner() == 0 {
        return false;
    }
    if !has(mask, pg_sys::HEAP_XMAX_IS_MULTI) {
        return has(mask, pg_sys::HEAP_XMAX_COMMITTED) || memo.state(xmax) == XidState::Committed;
    }
    // SAFETY: a multixact that is not lock-only, on a pinned page. May raise (reading pg_multixact): unwinds, abort unpins.
    let updater = unsafe { pg_sys::HeapTupleGetUpdateXid((&raw const *header).cast_mut()) };
    memo.state(updater) == XidState::Committed
}
