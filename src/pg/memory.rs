//! A private memory context and the switch into one. Allocation here may raise (out of memory).
use core::ffi::CStr;
use core::marker::PhantomData;

use pgrx::pg_sys;

use super::points::{Fault, may_fail};

/// A memory context of our own, child of the one current at creation; deleted on drop.
pub struct Context {
    raw: pg_sys::MemoryContext,
    _not_send: PhantomData<*mut ()>,
}

impl Context {
    pub fn new(name: &'static CStr) -> Self {
        may_fail(Fault::Alloc);
        // SAFETY: the current context outlives this value, which lives within one call. May raise: out of memory; nothing
        // is owned yet. The name is static, as aset.c requires.
        let raw = unsafe {
            pg_sys::AllocSetContextCreateInternal(
                pg_sys::CurrentMemoryContext,
                name.as_ptr(),
                pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            )
        };
        Self { raw, _not_send: PhantomData }
    }

    pub fn reset(&self) {
        // SAFETY: `raw` is live until drop. Nothing allocated in it is used after a reset: callers reset between batches.
        unsafe { pg_sys::MemoryContextReset(self.raw) }
    }

    /// Makes this context current until the guard is dropped.
    pub fn enter(&self) -> Entered {
        Entered::into_raw_context(self.raw)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // While an error unwinds, the parent context is about to go and takes this one along.
        if !std::thread::panicking() {
            // SAFETY: `raw` is live, owned by this value, and not current: `Entered` restored its predecessor.
            unsafe { pg_sys::MemoryContextDelete(self.raw) }
        }
    }
}

/// Restores the previously current memory context on drop; plain memory, so safe while unwinding.
pub struct Entered {
    before: pg_sys::MemoryContext,
    _not_send: PhantomData<*mut ()>,
}

impl Entered {
    pub(super) fn into_raw_context(context: pg_sys::MemoryContext) -> Self {
        // SAFETY: the caller passes a live context. Two plain accesses of a backend-local global; cannot raise.
        let before = unsafe {
            let before = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = context;
            before
        };
        Self { before, _not_send: PhantomData }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: guards nest, so `before` outlives this one. A plain write; cannot raise.
        unsafe { pg_sys::CurrentMemoryContext = self.before }
    }
}

/// The memory context current now, for results that must outlive a later switch.
pub(super) fn current() -> pg_sys::MemoryContext {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    unsafe { pg_sys::CurrentMemoryContext }
}
