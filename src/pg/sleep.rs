//! Sleeping and waking through shared memory: condition variables and the names their waits are shown under.
//! Waits: only `CondVar::timed_sleep`, interruptibly. Signals are legal in transaction callbacks.
use core::cell::{RefCell, UnsafeCell};
use core::ffi::CStr;

use pgrx::pg_sys;

use super::points::{Fault, may_fail};
use super::raw;

/// The name of a wait in pg_stat_activity; before 17 every extension's waits are called "Extension".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitEvent(u32);

impl WaitEvent {
    pub(super) fn number(self) -> u32 {
        self.0
    }

    /// May raise the first time in a backend; not under a lock.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    pub fn named(name: &'static CStr) -> Self {
        thread_local! {
            static KNOWN: RefCell<Vec<(*const core::ffi::c_char, u32)>> = const { RefCell::new(Vec::new()) };
        }
        let known = KNOWN.with_borrow(|all| all.iter().find(|(n, _)| *n == name.as_ptr()).map(|(_, id)| *id));
        if let Some(id) = known {
            return Self(id);
        }
        // SAFETY: the name is static. May raise (too many names): unwinds, nothing is held.
        let id = unsafe { pg_sys::WaitEventExtensionNew(name.as_ptr()) };
        KNOWN.with_borrow_mut(|all| all.push((name.as_ptr(), id)));
        Self(id)
    }

    #[cfg(not(any(feature = "pg17", feature = "pg18")))]
    pub fn named(_name: &'static CStr) -> Self {
        Self(pg_sys::PG_WAIT_EXTENSION)
    }
}

#[repr(transparent)]
pub(super) struct Shared(UnsafeCell<pg_sys::ConditionVariable>);

pub(super) fn new_condvar() -> Shared {
    let mut cv = pg_sys::ConditionVariable::default();
    // SAFETY: writes the fields of our own value; nobody sleeps on it, so it may be moved. Cannot raise.
    unsafe { raw::ConditionVariableInit(&raw mut cv) };
    Shared(UnsafeCell::new(cv))
}

/// An array of condition variables in shared memory.
pub struct CondVars {
    all: &'static [Shared],
}

// SAFETY: a condition variable is a spinlock and a list under it, made for sharing between processes.
unsafe impl Sync for CondVars {}
// SAFETY: as above.
unsafe impl Send for CondVars {}

impl CondVars {
    pub(super) fn new(all: &'static [Shared]) -> Self {
        Self { all }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// As `get`, for an index that the caller has computed from the size it asked for.
    pub fn at(&self, i: usize) -> CondVar {
        self.get(i).unwrap_or_else(|| std::process::abort())
    }

    pub fn get(&self, i: usize) -> Option<CondVar> {
        self.all.get(i).map(|shared| CondVar { shared })
    }
}

/// One condition variable. To wait: `prepare`, test the condition, `timed_sleep` and test again in a loop, `cancel`.
#[derive(Clone, Copy)]
pub struct CondVar {
    shared: &'static Shared,
}

impl CondVar {
    fn raw(self) -> *mut pg_sys::ConditionVariable {
        self.shared.0.get()
    }

    /// From now on a signal is not lost. Ends a sleep prepared on another variable.
    pub fn prepare(self) {
        // SAFETY: initialised, in shared memory. Cannot raise.
        unsafe { raw::ConditionVariablePrepareToSleep(self.raw()) }
    }

    /// Sleeps until signalled (or woken for no reason) or until the time is up, and says whether it is. Raises on cancel and
    /// on the end of the session; abort then ends the prepared sleep.
    pub fn timed_sleep(self, ms: i64, event: WaitEvent) -> bool {
        may_fail(Fault::Interrupt);
        // SAFETY: initialised, in shared memory. May raise: unwinds; the caller holds no LWLock.
        unsafe { pg_sys::ConditionVariableTimedSleep(self.raw(), ms.max(0), event.0) }
    }

    /// Ends the prepared sleep of this backend, on whatever variable; a signal that came meanwhile is passed on.
    pub fn cancel(self) {
        // SAFETY: backend-local state and the variable it names. Cannot raise.
        unsafe { pg_sys::ConditionVariableCancelSleep() };
    }

    pub fn signal(self) {
        // SAFETY: initialised, in shared memory. Cannot raise.
        unsafe { raw::ConditionVariableSignal(self.raw()) }
    }

    /// Wakes all; ends the caller's own prepared sleep.
    pub fn broadcast(self) {
        // SAFETY: initialised, in shared memory. Cannot raise.
        unsafe { raw::ConditionVariableBroadcast(self.raw()) }
    }
}
