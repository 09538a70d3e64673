//! Values in shared memory that are reached only through an LWLock, and the guards that hold it.
//! Under a guard: nothing that may raise, no catalog, no buffer, no interrupt check, no second guard of the same cell.
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use pgrx::pg_sys;

use super::raw;

#[repr(C, align(128))]
pub(super) struct Cell<T> {
    lock: UnsafeCell<pg_sys::LWLockPadded>,
    value: UnsafeCell<T>,
}

impl<T> Cell<T> {
    pub fn new(lock: pg_sys::LWLockPadded, value: T) -> Self {
        Self { lock: UnsafeCell::new(lock), value: UnsafeCell::new(value) }
    }
}

/// An array of values, each under an LWLock.
pub struct LwCells<T: 'static> {
    cells: &'static [Cell<T>],
}

// SAFETY: a cell's value is reached only through its lock; a backend has one thread, and the lock excludes other processes.
unsafe impl<T> Sync for LwCells<T> {}
// SAFETY: as above.
unsafe impl<T> Send for LwCells<T> {}

impl<T: 'static> LwCells<T> {
    pub(super) fn new(cells: &'static [Cell<T>]) -> Self {
        Self { cells }
    }

    pub fn len(&self) -> usize {
        self.cells.len()
    }

    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Waits for the lock; None only for an index out of range. Interrupts are held off until the guard is dropped.
    pub fn lock(&self, i: usize) -> Option<Guard<T>> {
        let cell = self.cells.get(i)?;
        Some(Guard { value: cell.value.get(), held: Held::acquire(&cell.lock), _cell: PhantomData })
    }

    /// As `lock`, for an index that the caller has computed from the sizes it asked for. Another index is a broken library: then
    /// no memory may be touched any more.
    pub fn at(&self, i: usize) -> Guard<T> {
        self.lock(i).unwrap_or_else(|| std::process::abort())
    }

    /// Takes the lock only if it is free.
    pub fn try_lock(&self, i: usize) -> Option<Guard<T>> {
        let cell = self.cells.get(i)?;
        let held = Held::try_acquire(&cell.lock)?;
        Some(Guard { value: cell.value.get(), held, _cell: PhantomData })
    }
}

/// An LWLock held exclusively.
struct Held {
    lock: *mut pg_sys::LWLock,
    /// Taken by a destructor while an error unwinds: then it is ours to release even so.
    while_unwinding: bool,
}

impl Held {
    fn acquire(lock: &'static UnsafeCell<pg_sys::LWLockPadded>) -> Self {
        let lock = Self::pointer(lock);
        // SAFETY: an initialised lock in shared memory, not held by us. Raises only at 200 locks held.
        unsafe { raw::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Self { lock, while_unwinding: std::thread::panicking() }
    }

    fn try_acquire(lock: &'static UnsafeCell<pg_sys::LWLockPadded>) -> Option<Self> {
        let lock = Self::pointer(lock);
        // SAFETY: as in `acquire`; does not wait.
        unsafe { raw::LWLockConditionalAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) }
            .then(|| Self { lock, while_unwinding: std::thread::panicking() })
    }

    fn pointer(lock: &'static UnsafeCell<pg_sys::LWLockPadded>) -> *mut pg_sys::LWLock {
        // SAFETY: the padded union starts with the lock; takes an address only.
        let lock = unsafe { &raw mut (*lock.get()).lock };
        // SAFETY: walks a backend-local array; cannot raise.
        debug_assert!(unsafe { !raw::LWLockHeldByMe(lock) }, "lock is already held by this backend");
        lock
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // When an error unwinds, the server has reset its interrupt counter and abort releases all LWLocks.
        if std::thread::panicking() == self.while_unwinding {
            // SAFETY: held by this value alone. Cannot raise.
            unsafe { raw::LWLockRelease(self.lock) }
        }
    }
}

/// Exclusive access to one cell; released on drop.
pub struct Guard<T: 'static> {
    value: *mut T,
    held: Held,
    _cell: PhantomData<*mut T>,
}

impl<T> Deref for Guard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held by this guard, which is the only one for the cell.
        unsafe { &*self.value }
    }
}

impl<T> DerefMut for Guard<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`.
        unsafe { &mut *self.value }
    }
}

/// Partitions of a pool: a head, entries and hash buckets each.
pub struct LwSlices<H: 'static, E: 'static> {
    heads: LwCells<H>,
    entries: *mut E,
    buckets: *mut u32,
    per_entries: usize,
    per_buckets: usize,
}

// SAFETY: as for LwCells: entries and buckets of a partition are reached only through its lock.
unsafe impl<H, E> Sync for LwSlices<H, E> {}
// SAFETY: as above.
unsafe impl<H, E> Send for LwSlices<H, E> {}

impl<H: Copy + 'static, E: Copy + 'static> LwSlices<H, E> {
    /// # Safety
    /// Behind each pointer lie, for the life of the process, as many initialised elements per head as said beside it.
    pub(super) unsafe fn new(
        heads: LwCells<H>,
        (entries, per_entries): (*mut E, usize),
        (buckets, per_buckets): (*mut u32, usize),
    ) -> Self {
        Self { heads, entries, buckets, per_entries, per_buckets }
    }

    /// As `LwCells::at`.
    pub fn at(&self, i: usize) -> PartGuard<'_, H, E> {
        self.lock(i).unwrap_or_else(|| std::process::abort())
    }

    pub fn len(&self) -> usize {
        self.heads.len()
    }

    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    pub fn entries_each(&self) -> usize {
        self.per_entries
    }

    pub fn buckets_each(&self) -> usize {
        self.per_buckets
    }

    /// Waits for the lock of partition i; None only for an index out of range.
    pub fn lock(&self, i: usize) -> Option<PartGuard<'_, H, E>> {
        let Guard { value, held, .. } = self.heads.lock(i)?;
        // SAFETY: the partition exists, so its head, entries and buckets do; the lock just taken makes them ours while the
        // guard lives.
        let (head, entries, buckets) = unsafe {
            (
                &mut *value,
                core::slice::from_raw_parts_mut(self.entries.add(i * self.per_entries), self.per_entries),
                core::slice::from_raw_parts_mut(self.buckets.add(i * self.per_buckets), self.per_buckets),
            )
        };
        Some(PartGuard { head, entries, buckets, _held: held })
    }
}

/// Exclusive access to one partition; released on drop. The references must not be moved out of the guard.
pub struct PartGuard<'a, H, E> {
    pub head: &'a mut H,
    pub entries: &'a mut [E],
    pub buckets: &'a mut [u32],
    _held: Held,
}
