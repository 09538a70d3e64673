//! Shared memory of fixed size, laid out once at server start, seen through safe views that live for the process.
//! One function of the user describes the layout; it runs first to count bytes, then to carve. Only while the postmaster loads
//! shared_preload_libraries. Children inherit the views through fork (EXEC_BACKEND is not supported).
//! Protection: a cell or partition is reached only through its LWLock; atomics and condition variables protect themselves.
//! Under a guard: no allocation that may raise, no catalog, no buffer, no interrupt check, no second guard of the same cell.
use core::ffi::CStr;
use core::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::locked::Cell;
pub use super::locked::{Guard, LwCells, LwSlices, PartGuard};
use super::raw;
pub use super::sleep::{CondVar, CondVars, WaitEvent};
use crate::error::{Error, Result};

/// A set of views into one named area of shared memory.
pub trait Layout: Sized + 'static {
    const NAME: &'static CStr;
    /// Lays the views out. Runs twice, and must ask for the same both times: its sizes depend on server settings only. When
    /// `carver.is_counting()` the views are empty and are thrown away.
    fn carve(carver: &mut Carver) -> Self;
    /// Where the views are kept.
    fn place() -> &'static Attached<Self>;
}

/// A static that holds the views once the server has started with the library preloaded.
pub struct Attached<T: 'static>(AtomicPtr<T>);

impl<T> Attached<T> {
    pub const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    pub fn get(&self) -> Option<&'static T> {
        // SAFETY: null, or leaked by `set`, so live for ever.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }

    /// After a crash the postmaster lays everything out again; the few bytes of the views before are leaked.
    fn set(&self, value: T) {
        self.0.store(Box::into_raw(Box::new(value)), Ordering::Release);
    }
}

#[derive(Clone, Copy)]
struct Registration {
    request: fn(),
    start: fn(),
}

static REGISTERED: Mutex<Vec<Registration>> = Mutex::new(Vec::new());
static HOOKS: Mutex<Hooks> = Mutex::new(Hooks { request: None, startup: None });

struct Hooks {
    request: Option<unsafe extern "C-unwind" fn()>,
    startup: Option<unsafe extern "C-unwind" fn()>,
}

fn registrations() -> Vec<Registration> {
    REGISTERED.lock().map(|list| list.clone()).unwrap_or_default()
}

/// Is the server loading shared_preload_libraries right now?
pub fn preloading() -> bool {
    // SAFETY: a plain read of a process-local global; cannot raise.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// From `_PG_init`, after all settings are defined: a misspelt one with this prefix is refused.
pub fn reserve_settings(prefix: &'static CStr) {
    // SAFETY: a static string. May raise (out of memory): unwinds.
    #[cfg(feature = "pg14")]
    unsafe {
        pg_sys::EmitWarningsOnPlaceholders(prefix.as_ptr());
    }
    // SAFETY: as above.
    #[cfg(not(feature = "pg14"))]
    unsafe {
        pg_sys::MarkGUCPrefixReserved(prefix.as_ptr());
    }
}

/// From `_PG_init`, after the settings are defined. Fails if the library is not being preloaded.
pub fn register<L: Layout>() -> Result<()> {
    // SAFETY: a plain read of a process-local global; cannot raise.
    if !unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        return Err(Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            concat!(env!("CARGO_PKG_NAME"), " must be loaded at server start"),
        )
        .hint(concat!("Add ", env!("CARGO_PKG_NAME"), " to shared_preload_libraries and restart the server.")));
    }
    let mut list = registrations();
    let is_first = list.is_empty();
    list.push(Registration { request: request::<L>, start: start::<L> });
    if let Ok(mut registered) = REGISTERED.lock() {
        *registered = list;
    }
    if is_first {
        install_hooks();
    }
    #[cfg(feature = "pg14")]
    request::<L>();
    Ok(())
}

fn install_hooks() {
    let Ok(mut hooks) = HOOKS.lock() else { return };
    #[cfg(not(feature = "pg14"))]
    // SAFETY: the postmaster is single-threaded; the hook before is kept and called.
    unsafe {
        hooks.request = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(on_request);
    }
    // SAFETY: as above.
    unsafe {
        hooks.startup = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_startup);
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_request() {
    let before = HOOKS.lock().ok().and_then(|hooks| hooks.request);
    if let Some(before) = before {
        // SAFETY: another library's hook; the boundary turns what it raises into a panic for our own guard.
        unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| before()) }
    }
    for registration in registrations() {
        (registration.request)();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_startup() {
    let before = HOOKS.lock().ok().and_then(|hooks| hooks.startup);
    if let Some(before) = before {
        // SAFETY: as in `on_request`.
        unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| before()) }
    }
    for registration in registrations() {
        (registration.start)();
    }
}

fn bytes_of<L: Layout>() -> usize {
    let mut counter = Carver { base: ptr::null_mut(), size: 0, used: 0, is_new: false, tranche: 0 };
    let _ = L::carve(&mut counter);
    counter.used + MAX_ALIGN
}

fn request<L: Layout>() {
    // SAFETY: called from the request hook (14: from _PG_init). May raise FATAL: the server does not start.
    unsafe { pg_sys::RequestAddinShmemSpace(bytes_of::<L>() + MAX_ALIGN) }
}

/// Cache-line aligned, so that an area never shares a line with another.
const MAX_ALIGN: usize = 128;

/// Index of AddinShmemInitLock among the server's own locks, from 14 to 18.
const ADDIN_SHMEM_INIT: usize = 21;

fn start<L: Layout>() {
    let size = bytes_of::<L>();
    // SAFETY: the main array exists before the startup hooks run; the lock is one of its own.
    let init_lock = unsafe { &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT)).lock };
    // SAFETY: not held. An error below ends the server's start, so that it is never left held.
    unsafe { raw::LWLockAcquire(init_lock, pg_sys::LWLockMode::LW_EXCLUSIVE) };
    let mut found = false;
    // SAFETY: the name is static. May raise (more than was requested): the server does not start.
    let base = unsafe { pg_sys::ShmemInitStruct(L::NAME.as_ptr(), size, &raw mut found) };
    let base = base.cast::<u8>();
    let base = base.wrapping_add(base.align_offset(MAX_ALIGN));
    // SAFETY: counts up a shared counter. Cannot raise.
    let tranche = unsafe { pg_sys::LWLockNewTrancheId() };
    // SAFETY: the name is static. May raise (out of memory): the server does not start. Children inherit the registration.
    unsafe { pg_sys::LWLockRegisterTranche(tranche, L::NAME.as_ptr()) };
    let mut carver = Carver { base, size, used: 0, is_new: !found, tranche };
    let views = L::carve(&mut carver);
    let fits = carver.used <= size;
    // SAFETY: acquired above.
    unsafe { raw::LWLockRelease(init_lock) };
    if !fits {
        super::call::raise(Error::new(Code::ERRCODE_INTERNAL_ERROR, "shared memory layout changed between counting and carving"));
    }
    L::place().set(views);
}

/// Hands out consecutive parts of the area and initialises them.
pub struct Carver {
    base: *mut u8,
    size: usize,
    used: usize,
    is_new: bool,
    tranche: i32,
}

impl Carver {
    pub fn is_counting(&self) -> bool {
        self.base.is_null()
    }

    /// An array of `n` elements, each written by `init`. None while counting, and None if it does not fit: `start` then fails.
    fn array<T>(&mut self, n: usize, mut init: impl FnMut() -> T) -> Option<*mut T> {
        let start = self.used.next_multiple_of(align_of::<T>().max(MAX_ALIGN));
        self.used = start.saturating_add(n.saturating_mul(size_of::<T>()));
        if self.is_counting() || self.used > self.size {
            return None;
        }
        // SAFETY: `start` lies within the area, whose size was checked.
        let first = unsafe { self.base.add(start) }.cast::<T>();
        if self.is_new {
            for i in 0..n {
                // SAFETY: element i lies within the area, aligned, and nobody else sees it yet.
                unsafe { first.add(i).write(init()) }
            }
        }
        Some(first)
    }

    /// # Safety
    /// A shared `T` must be safe to use from several processes at once.
    unsafe fn slice<T>(&mut self, n: usize, init: impl FnMut() -> T) -> &'static [T] {
        match self.array(n, init) {
            // SAFETY: n initialised elements in memory that outlives the process's use of it.
            Some(first) => unsafe { core::slice::from_raw_parts(first, n) },
            None => &[],
        }
    }

    fn init_lock(&self) -> pg_sys::LWLockPadded {
        let mut lock = pg_sys::LWLockPadded { pad: [0; 128] };
        // SAFETY: writes the fields of our own value; it has no waiters, so it may be moved. Cannot raise.
        unsafe { raw::LWLockInitialize(&raw mut lock.lock, self.tranche) };
        lock
    }

    /// `n` values, each under a lock of its own.
    pub fn cells<T: 'static>(&mut self, n: usize, init: fn() -> T) -> LwCells<T> {
        let tranche_of = Self { base: self.base, size: 0, used: 0, is_new: false, tranche: self.tranche };
        let make = || Cell::new(tranche_of.init_lock(), init());
        // SAFETY: a cell is reached only through its lock.
        LwCells::new(unsafe { self.slice(n, make) })
    }

    /// `n` partitions of one head, `entries` entries and `buckets` buckets each, each partition under a lock of its own.
    pub fn slices<H: Copy + 'static, E: Copy + 'static>(
        &mut self,
        n: usize,
        head: fn() -> H,
        entries: (usize, fn() -> E),
        buckets: (usize, u32),
    ) -> LwSlices<H, E> {
        let heads = self.cells(n, head);
        let (per_entries, entry) = entries;
        let (per_buckets, bucket) = buckets;
        let entries = self.array(n.saturating_mul(per_entries), entry);
        let buckets = self.array(n.saturating_mul(per_buckets), || bucket);
        let entries = entries.unwrap_or(ptr::NonNull::dangling().as_ptr());
        let buckets = buckets.unwrap_or(ptr::NonNull::dangling().as_ptr());
        // SAFETY: n partitions of each were carved above, initialised, for the life of the process; while counting, or if they
        // did not fit, the heads may be empty and nothing is ever reached.
        unsafe { LwSlices::new(heads, (entries, per_entries), (buckets, per_buckets)) }
    }

    pub fn atomics_u32(&mut self, n: usize) -> &'static [AtomicU32] {
        // SAFETY: atomics may be shared.
        unsafe { self.slice(n, || AtomicU32::new(0)) }
    }

    pub fn atomics_u64(&mut self, n: usize) -> &'static [AtomicU64] {
        // SAFETY: atomics may be shared.
        unsafe { self.slice(n, || AtomicU64::new(0)) }
    }

    pub fn condvars(&mut self, n: usize) -> CondVars {
        // SAFETY: a condition variable locks itself.
        CondVars::new(unsafe { self.slice(n, super::sleep::new_condvar) })
    }
}
