//! Hand-written externs: functions that pgrx does not bind, and unguarded twins of some that it does.
//!
//! Unguarded means: an ereport(ERROR) inside would longjmp over Rust frames. So only functions that do not raise in the
//! uses made of them are declared in the first block; each line says why. All are the same from PostgreSQL 14 to 18.
use core::ffi::c_int;

use pgrx::pg_sys;

unsafe extern "C-unwind" {
    /// Raises: only "too many LWLocks taken" at 200 held, PANIC without a PGPROC. Waits uninterruptibly; holds interrupts off.
    pub fn LWLockAcquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    /// Raises: as LWLockAcquire. Never waits.
    pub fn LWLockConditionalAcquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    /// Raises: only when the lock is not held, which the guard type excludes.
    pub fn LWLockRelease(lock: *mut pg_sys::LWLock);
    /// Never raises: walks a backend-local array.
    pub fn LWLockHeldByMe(lock: *mut pg_sys::LWLock) -> bool;
    /// Never raises: writes the fields.
    pub fn LWLockInitialize(lock: *mut pg_sys::LWLock, tranche_id: c_int);

    /// Never raises: gettimeofday.
    pub fn GetCurrentTimestamp() -> pg_sys::TimestampTz;

    /// Never raises: writes the fields.
    pub fn ConditionVariableInit(cv: *mut pg_sys::ConditionVariable);
    /// Never raises: spinlock and list.
    pub fn ConditionVariablePrepareToSleep(cv: *mut pg_sys::ConditionVariable);
    /// Never raises: spinlock and SetLatch. Legal in transaction callbacks.
    pub fn ConditionVariableSignal(cv: *mut pg_sys::ConditionVariable);
    /// Never raises; ends the caller's own prepared sleep, if any. Legal in transaction callbacks.
    pub fn ConditionVariableBroadcast(cv: *mut pg_sys::ConditionVariable);

    /// Never raises on a valid xid: compares with the transaction state of this backend.
    pub fn TransactionIdIsCurrentTransactionId(xid: pg_sys::TransactionId) -> bool;
    /// Never raises: a shared LWLock around one read.
    pub fn ReadNextFullTransactionId() -> pg_sys::FullTransactionId;
    /// Never raises: reads the state of the current transaction.
    pub fn GetTopFullTransactionIdIfAny() -> pg_sys::FullTransactionId;
    /// Never raises: reads the state of the current transaction.
    pub fn GetCurrentSubTransactionId() -> pg_sys::SubTransactionId;
    /// Never raises: reads the state of the current transaction.
    pub fn GetCurrentTransactionNestLevel() -> c_int;
    /// Never raises: reads the state of the current transaction.
    pub fn IsTransactionBlock() -> bool;

    /// A signal handler: sets flags and the latch.
    pub fn die(signal: c_int);
    /// A signal handler: sets a flag and the latch.
    pub fn SignalHandlerForConfigReload(signal: c_int);
    /// RAISES. Only for a hook that has nothing to drop and calls it last; elsewhere its guarded twin.
    pub fn standard_ProcessUtility(
        statement: *mut pg_sys::PlannedStmt,
        text: *const core::ffi::c_char,
        read_only: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );

    /// Never raises: a shared LWLock around a walk of the prepared transactions.
    pub fn TwoPhaseGetXidByVirtualXID(vxid: pg_sys::VirtualTransactionId, have_more: *mut bool) -> pg_sys::TransactionId;

    /// Never raises: an LWLock around one array read. A backend id that is out of range or unused gives NULL.
    #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
    pub fn BackendIdGetProc(backend_id: c_int) -> *mut pg_sys::PGPROC;
}

#[cfg(feature = "pg14")]
unsafe extern "C" {
    /// A setting, fixed at server start.
    pub static autovacuum_max_workers: c_int;
}

mod unguarded {
    use core::ffi::c_int;

    use pgrx::pg_sys::Datum;

    unsafe extern "C-unwind" {
        pub fn datumCopy(value: Datum, by_val: bool, len: c_int) -> Datum;
    }
}

/// Raises: out of memory, as a panic. Copies into the current memory context; an external toast pointer is copied as such.
///
/// # Safety
/// `value` is a non-null Datum of a type of this width.
pub unsafe fn datum_copy(value: pg_sys::Datum, by_val: bool, len: c_int) -> pg_sys::Datum {
    // SAFETY: as promised by the caller; the closure holds nothing that needs dropping.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| unguarded::datumCopy(value, by_val, len)) }
}
