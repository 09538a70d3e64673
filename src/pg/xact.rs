//! Transactions as this backend sees them: identity, state, callbacks, and the few clocks and numbers that go with them.
//! Writes nothing but what the named server function writes. Waits only in `wait_for_xid`.
//! Callbacks: registered once per backend, raw; commit, abort and exit run where an error would be a PANIC, so the Rust
//! functions given must not panic, allocate without need, or take anything but LWLocks, atomics and latches.
use core::ffi::{c_int, c_void};
use core::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;
use pgrx::pg_sys::errcodes::PgSqlErrorCode as Code;

use super::points::{Fault, clock_offset, may_fail};
use super::raw;
use super::xid::FullXid;
use crate::error::{Error, Result};

/// Refuses a read-only transaction, a standby and a parallel worker; native writes owe this check to the executor's users.
pub fn require_writable(cmd: &str) -> Result<()> {
    // SAFETY: reads shared state, cannot raise; guarded all the same.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::new(Code::ERRCODE_READ_ONLY_SQL_TRANSACTION, format!("cannot execute {cmd} during recovery"))
            .hint("Connect to the primary server."));
    }
    // SAFETY: a plain read of a backend-local global; cannot raise.
    if unsafe { pg_sys::XactReadOnly } {
        return Err(Error::new(
            Code::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            format!("cannot execute {cmd} in a read-only transaction"),
        ));
    }
    // SAFETY: reads backend-local state; cannot raise.
    if unsafe { pg_sys::IsInParallelMode() } {
        return Err(Error::new(
            Code::ERRCODE_INVALID_TRANSACTION_STATE,
            format!("cannot execute {cmd} during a parallel operation"),
        ));
    }
    Ok(())
}

/// Is this a standby, or a server that is still recovering?
pub fn in_recovery() -> bool {
    // SAFETY: reads shared state, cannot raise; guarded all the same.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Refuses a standby, for what needs memory that only a primary has.
pub fn refuse_recovery(what: &str) -> Result<()> {
    // SAFETY: reads shared state, cannot raise; guarded all the same.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::new(Code::ERRCODE_READ_ONLY_SQL_TRANSACTION, format!("{what} is not available during recovery"))
            .hint("Connect to the primary server."));
    }
    Ok(())
}

/// Is there a database with this OID? Reads the catalog.
pub fn database_exists(oid: u32) -> bool {
    // SAFETY: inside a transaction. May raise (catalog read): unwinds, nothing is held. The name is palloc'd.
    !unsafe { pg_sys::get_database_name(pg_sys::Oid::from(oid)) }.is_null()
}

/// The name of the session's database, as it is now. Reads the catalog.
pub fn database_name() -> String {
    // SAFETY: inside a transaction. May raise (catalog read): unwinds, nothing is held. The name is palloc'd.
    let name = unsafe { pg_sys::get_database_name(pg_sys::MyDatabaseId) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: a null-terminated name, copied at once.
    unsafe { core::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// This transaction's commit waits for its flush, whatever the settings say.
pub fn force_synchronous_commit() {
    // SAFETY: sets a backend-local flag, which the end of the transaction resets; cannot raise.
    unsafe { pg_sys::ForceSyncCommit() }
}

/// The id of the current (sub)transaction, assigned now if it had none.
pub fn current_xid() -> FullXid {
    may_fail(Fault::Append);
    // SAFETY: inside a transaction. May raise (wraparound limit, parallel mode): unwinds, nothing is held.
    unsafe { pg_sys::GetCurrentFullTransactionId() }.value
}

/// The id of the top transaction, if one has been assigned. Assigns nothing.
pub fn top_xid_if_any() -> Option<FullXid> {
    // SAFETY: reads backend-local state; cannot raise.
    let full = unsafe { raw::GetTopFullTransactionIdIfAny() }.value;
    (full as u32 != 0).then_some(full)
}

pub fn current_subxact() -> u32 {
    // SAFETY: reads backend-local state; cannot raise.
    unsafe { raw::GetCurrentSubTransactionId() }
}

/// 1 in a top transaction, one more for each savepoint; 0 outside.
pub fn nest_level() -> i32 {
    // SAFETY: reads backend-local state; cannot raise.
    unsafe { raw::GetCurrentTransactionNestLevel() }
}

/// True between BEGIN and COMMIT (and in an implicit block of several statements).
pub fn in_transaction_block() -> bool {
    // SAFETY: reads backend-local state; cannot raise.
    unsafe { raw::IsTransactionBlock() }
}

/// True under REPEATABLE READ and SERIALIZABLE: one snapshot for the whole transaction.
pub fn isolation_uses_snapshot() -> bool {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as c_int }
}

/// Waits until the (sub)transaction has ended; raises on deadlock or cancel. Returns at once for an own or a finished one.
pub fn wait_for_xid(xid: FullXid) {
    let short = pg_sys::TransactionId::from(xid as u32);
    // SAFETY: reads backend-local state; cannot raise.
    if short.into_inner() < 3 || unsafe { raw::TransactionIdIsCurrentTransactionId(short) } {
        return;
    }
    may_fail(Fault::Lock);
    // SAFETY: the xid is normal and not ours, as the function asserts. May raise: unwinds; the caller holds no LWLock.
    unsafe {
        pg_sys::XactLockTableWait(short, ptr::null_mut(), ptr::null_mut(), pg_sys::XLTW_Oper::XLTW_None);
    }
}

/// What to run at the turns of a transaction. `pre_commit` and `pre_prepare` may fail (the transaction aborts); the others
/// must neither raise nor panic: a panic in them stops the process, which restarts the server.
#[derive(Clone, Copy)]
pub struct Callbacks {
    pub pre_commit: fn() -> Result<()>,
    pub commit: fn(),
    pub abort: fn(),
    pub pre_prepare: fn() -> Result<()>,
    pub prepare: fn(),
    pub sub_commit: fn(mine: u32, parent: u32),
    pub sub_abort: fn(mine: u32),
    /// Runs after the last transaction of the backend was aborted, before it leaves shared memory.
    pub process_exit: fn(),
}

static CALLBACKS: OnceLock<Callbacks> = OnceLock::new();
static AT_END: OnceLock<fn(bool)> = OnceLock::new();
static AT_SUB_END: OnceLock<fn(u32, Option<u32>)> = OnceLock::new();

/// From `_PG_init`: `f` is told of the end of every transaction of every session, true for a commit. The rule of
/// `Callbacks` holds: it must not raise, allocate or panic. A prepared transaction counts as rolled back.
pub fn at_end(f: fn(bool)) {
    let _ = AT_END.set(f);
}

/// From `_PG_init`: `f` is told of the end of every subtransaction: its number, and that of the one which now has what it did, if it was
/// not rolled back. The rule of `Callbacks` holds.
pub fn at_sub_end(f: fn(mine: u32, heir: Option<u32>)) {
    let _ = AT_SUB_END.set(f);
}

fn ended(committed: bool) {
    if let Some(f) = AT_END.get() {
        f(committed);
    }
}

/// The callback lists of the server are inherited through fork, and so is this flag.
static XACT_REGISTERED: AtomicBool = AtomicBool::new(false);
/// Exit callbacks are dropped by a forked child, so they are registered once per process.
static EXIT_REGISTERED_IN: AtomicI32 = AtomicI32::new(0);

/// Registers once per backend; later calls are free. Callable from `_PG_init` in the postmaster, but then each backend must
/// call it again before it relies on `process_exit`. The first set of functions given is the one that counts.
pub fn register_callbacks(callbacks: Callbacks) {
    let _ = CALLBACKS.get_or_init(|| callbacks);
    if !XACT_REGISTERED.load(Ordering::Relaxed) {
        // SAFETY: the functions are static. May raise (out of memory) before the flag is set; a second try is harmless only
        // then.
        unsafe { pg_sys::RegisterXactCallback(Some(on_xact), ptr::null_mut()) };
        // SAFETY: as above.
        unsafe { pg_sys::RegisterSubXactCallback(Some(on_subxact), ptr::null_mut()) };
        XACT_REGISTERED.store(true, Ordering::Relaxed);
    }
    // SAFETY: plain reads of process-local globals; cannot raise.
    let (pid, child) = unsafe { (pg_sys::MyProcPid, pg_sys::IsUnderPostmaster) };
    if child && EXIT_REGISTERED_IN.load(Ordering::Relaxed) != pid {
        // SAFETY: the function is static. Raises FATAL only when 20 are registered; nothing is held.
        unsafe { pg_sys::on_shmem_exit(Some(on_exit), pg_sys::Datum::from(0usize)) };
        EXIT_REGISTERED_IN.store(pid, Ordering::Relaxed);
    }
}

/// A panic cannot leave an `extern "C"` function: it aborts the process, which is the only safe end where the server cannot
/// take an error and shared memory may be half changed.
#[allow(improper_ctypes_definitions)] // called from here only: the ABI is wanted for its abort
pub(super) extern "C" fn no_unwind(f: fn()) {
    f();
}

#[allow(improper_ctypes_definitions)] // as above
extern "C" fn no_unwind_sub(f: fn(u32, u32), mine: u32, parent: u32) {
    f(mine, parent);
}

#[allow(improper_ctypes_definitions)] // as above
extern "C" fn no_unwind_told(f: fn(u32, Option<u32>), mine: u32, heir: Option<u32>) {
    f(mine, heir);
}

unsafe extern "C-unwind" fn on_xact(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_COMMIT => no_unwind(|| ended(true)),
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_PREPARE => no_unwind(|| ended(false)),
        _ => (),
    }
    let Some(callbacks) = CALLBACKS.get() else { return };
    match event {
        pg_sys::XactEvent::XACT_EVENT_COMMIT => no_unwind(callbacks.commit),
        pg_sys::XactEvent::XACT_EVENT_ABORT => no_unwind(callbacks.abort),
        pg_sys::XactEvent::XACT_EVENT_PREPARE => no_unwind(callbacks.prepare),
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => guarded(callbacks.pre_commit),
        pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => guarded(callbacks.pre_prepare),
        _ => (),
    }
}

unsafe extern "C-unwind" fn on_subxact(
    event: pg_sys::SubXactEvent::Type,
    mine: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _arg: *mut c_void,
) {
    if let Some(f) = AT_SUB_END.get() {
        match event {
            pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => no_unwind_told(*f, mine, Some(parent)),
            pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => no_unwind_told(*f, mine, None),
            _ => (),
        }
    }
    let Some(callbacks) = CALLBACKS.get() else { return };
    match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => no_unwind_sub(callbacks.sub_commit, mine, parent),
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            no_unwind_sub(
                |mine, _| {
                    if let Some(c) = CALLBACKS.get() {
                        (c.sub_abort)(mine)
                    }
                },
                mine,
                parent,
            );
        }
        _ => (),
    }
}

unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    if let Some(callbacks) = CALLBACKS.get() {
        no_unwind(callbacks.process_exit);
    }
}

/// For the two events where an error is still legal: it becomes an ereport and the transaction aborts.
fn guarded(f: fn() -> Result<()>) {
    // SAFETY: called by the server on its main thread, with no Rust frame of ours below; panics become ereport here.
    unsafe {
        pg_sys::panic::pgrx_extern_c_guard(|| {
            if let Err(error) = f() {
                super::call::raise(error);
            }
        });
    }
}

/// For the rest of this transaction, `synchronous_commit = off`, unless it is off already; undone at its end. Pre-commit only.
pub fn lower_synchronous_commit_here() {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    if unsafe { pg_sys::synchronous_commit } <= pg_sys::SyncCommitLevel::SYNCHRONOUS_COMMIT_OFF as c_int {
        return;
    }
    // SAFETY: static strings. May raise (out of memory), legal before commit: unwinds to the callback's guard.
    unsafe {
        pg_sys::set_config_option(
            c"synchronous_commit".as_ptr(),
            c"off".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// End of the last WAL record this transaction wrote; 0 if it wrote none.
pub fn xact_last_rec_end() -> u64 {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    unsafe { pg_sys::XactLastRecEnd }
}

/// Flushes everything this transaction has logged so far. The insert position itself is not asked for: on a page boundary it
/// lies behind the page header and could not be flushed.
pub fn flush_wal() {
    let upto = xact_last_rec_end();
    if upto != 0 {
        // SAFETY: the position was returned by our own insertion. May raise (PANIC on I/O errors); nothing is held.
        unsafe { pg_sys::XLogFlush(upto) }
    }
}

/// Runs `f` in an internal subtransaction. Any error, ours or the server's, rolls it back and is returned; a cancel too, so
/// what is not understood must be passed on. The caller holds no LWLock, and no relation opened inside outlives `f`.
pub fn subtransaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: plain reads of backend-local globals; cannot raise.
    let (context, owner) = unsafe { (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner) };
    let restore = || {
        // SAFETY: both belong to the enclosing transaction, which is still open. Plain writes; cannot raise.
        unsafe {
            pg_sys::CurrentMemoryContext = context;
            pg_sys::CurrentResourceOwner = owner;
        }
    };
    may_fail(Fault::Alloc);
    // SAFETY: inside a transaction. May raise: unwinds, the enclosing transaction aborts.
    unsafe { pg_sys::BeginInternalSubTransaction(ptr::null()) };
    // SAFETY: as in `restore`: results must be allocated where the caller expects them.
    unsafe { pg_sys::CurrentMemoryContext = context };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let outcome = f();
        if outcome.is_ok() {
            may_fail(Fault::Alloc);
            // SAFETY: the subtransaction begun above is current. May raise: caught here, and rolled back like any other error. An
            // error that left the subtransaction behind would leave the session in it, after the statement had ended.
            unsafe { pg_sys::ReleaseCurrentSubTransaction() };
        }
        outcome
    }));
    let error = match outcome {
        Ok(Ok(value)) => {
            restore();
            return Ok(value);
        }
        Ok(Err(error)) => error,
        Err(payload) => super::call::error_from_panic(payload),
    };
    // SAFETY: the subtransaction begun above is current; a panic has been caught, and the error state was flushed by the guard that
    // caught it.
    unsafe { pg_sys::RollbackAndReleaseCurrentSubTransaction() };
    restore();
    Err(error)
}

pub fn command_counter_increment() {
    may_fail(Fault::Alloc);
    // SAFETY: inside a transaction. May raise (2^32 commands): unwinds, nothing is held.
    unsafe { pg_sys::CommandCounterIncrement() }
}

/// Raises if the statement was cancelled or the session must end. Never under an LWLock.
#[inline]
pub fn check_for_interrupts() {
    may_fail(Fault::Interrupt);
    // SAFETY: a volatile read of the flag that signal handlers set; cannot raise.
    if unsafe { ptr::read_volatile(&raw const pg_sys::InterruptPending) } != 0 {
        // SAFETY: may raise: unwinds; the caller holds no LWLock and no half-made change.
        unsafe { pg_sys::ProcessInterrupts() }
    }
}

/// Microseconds since 2000-01-01 UTC, by the wall clock.
#[inline]
pub fn now() -> i64 {
    // SAFETY: cannot raise.
    let now = unsafe { raw::GetCurrentTimestamp() };
    now.saturating_add(clock_offset())
}

pub fn random_u64() -> Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: writes `len` bytes into the array. Reports failure by its result.
    let good = unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) };
    if good {
        Ok(u64::from_ne_bytes(bytes))
    } else {
        Err(Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "could not generate random values"))
    }
}

/// A small number that is this backend's alone while it lives: its index in the array of all backends.
pub fn my_proc() -> u32 {
    #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
    // SAFETY: MyProc is set in every process that runs SQL, and points into shared memory for its whole life.
    let number = unsafe { (*pg_sys::MyProc).pgprocno };
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    // SAFETY: a plain read of a backend-local global; cannot raise.
    let number = unsafe { pg_sys::MyProcNumber };
    number as u32
}

pub fn my_pid() -> i32 {
    // SAFETY: a plain read of a process-local global; cannot raise.
    unsafe { pg_sys::MyProcPid }
}

/// An upper limit of `my_proc() + 1` over all processes that can run SQL. Known when shared memory is requested.
pub fn max_backends() -> u32 {
    #[cfg(feature = "pg14")]
    // SAFETY: plain reads of settings. On 14 the server has not yet computed MaxBackends when libraries are loaded.
    let n = unsafe {
        pg_sys::MaxConnections + raw::autovacuum_max_workers + 1 + pg_sys::max_worker_processes + pg_sys::max_wal_senders
    };
    #[cfg(not(feature = "pg14"))]
    // SAFETY: a plain read; computed before the shared memory request hooks run.
    let n = unsafe { pg_sys::MaxBackends };
    n as u32
}

pub fn database_oid() -> u32 {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    unsafe { pg_sys::MyDatabaseId }.into()
}

pub fn system_identifier() -> u64 {
    // SAFETY: reads the control file copy in shared memory; cannot raise once the server runs.
    unsafe { pg_sys::GetSystemIdentifier() }
}
