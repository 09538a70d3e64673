//! Background workers: registering, starting, their main function, their transactions, their sleep.
//! A worker leaves with 0 (not to be started again) or 1; anything else would restart the whole server, so no panic leaves here.
//! In a worker nothing catches an error but `run_transaction`; one that comes outside of it ends the process with 1.
use core::ffi::{CStr, c_char, c_int, c_long};
use core::ptr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, Ordering};

use pgrx::pg_sys;

use super::call::error_from_panic;
use super::raw;
use super::sleep::WaitEvent;
use super::xact;
use crate::error::Result;

/// Exports `$body: fn(u64)` as the main function `$symbol` of a worker.
#[macro_export]
macro_rules! worker_main {
    ($symbol:ident, $body:path) => {
        #[allow(unsafe_code)]
        const _: () = {
            #[unsafe(export_name = stringify!($symbol))]
            unsafe extern "C-unwind" fn entry(arg: ::pgrx::pg_sys::Datum) {
                const BODY: fn(u64) = $body;
                // SAFETY: the server calls it once, as the main function of a new worker.
                unsafe { $crate::pg::bgworker::enter(arg, BODY) }
            }
        };
    };
}

/// What the server is told about a worker.
pub struct Worker<'a> {
    pub name: &'a str,
    /// Shown as backend_type.
    pub kind: &'static str,
    pub function: &'static str,
    pub arg: u64,
    /// Seconds after which the server starts it again when it left with 1. None: never.
    pub restart: Option<i32>,
}

/// Is the server being upgraded by pg_upgrade? Then nothing of ours may run.
pub fn in_binary_upgrade() -> bool {
    // SAFETY: a plain read of a process-local global; cannot raise.
    unsafe { pg_sys::IsBinaryUpgrade }
}

fn fill(target: &mut [c_char], text: &str) {
    let room = target.len().saturating_sub(1);
    let mut end = text.len().min(room);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in target.iter_mut().zip(text.as_bytes().iter().take(end)) {
        *to = *from as c_char;
    }
}

impl Worker<'_> {
    fn describe(&self) -> pg_sys::BackgroundWorker {
        let mut worker = pg_sys::BackgroundWorker::default();
        fill(&mut worker.bgw_name, self.name);
        fill(&mut worker.bgw_type, self.kind);
        fill(&mut worker.bgw_library_name, env!("CARGO_PKG_NAME"));
        fill(&mut worker.bgw_function_name, self.function);
        worker.bgw_flags = (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as c_int;
        worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished;
        worker.bgw_restart_time = self.restart.unwrap_or(pg_sys::BGW_NEVER_RESTART);
        worker.bgw_main_arg = pg_sys::Datum::from(self.arg);
        worker
    }

    /// From `_PG_init`, while the server loads its libraries: the server starts it when recovery has ended.
    pub fn register(&self) {
        let mut worker = self.describe();
        // SAFETY: the description is copied. Too many workers: the server logs it and goes on without.
        unsafe { pg_sys::RegisterBackgroundWorker(&raw mut worker) }
    }

    /// Asks the server to start it now; this process is signalled when it starts and ends. None: no place is free for another worker.
    pub fn start(&self) -> Option<Handle> {
        let mut worker = self.describe();
        worker.bgw_notify_pid = xact::my_pid();
        let mut handle = ptr::null_mut();
        // SAFETY: a plain read of a global, set for the life of the process.
        let top = unsafe { pg_sys::TopMemoryContext };
        let entered = super::memory::Entered::into_raw_context(top);
        // SAFETY: the description is copied; the handle is allocated in the top context, and freed by `Handle`. May raise (out of
        // memory): unwinds.
        let started = unsafe { pg_sys::RegisterDynamicBackgroundWorker(&raw mut worker, &raw mut handle) };
        drop(entered);
        ptr::NonNull::new(handle).filter(|_| started).map(|raw| Handle { raw })
    }
}

/// A worker that this process has asked for.
pub struct Handle {
    raw: ptr::NonNull<pg_sys::BackgroundWorkerHandle>,
}

impl Handle {
    /// True when it has ended, or will never start.
    pub fn is_over(&self) -> bool {
        let mut pid: pg_sys::pid_t = 0;
        // SAFETY: allocated by `start`, freed only on drop. Reads shared memory under an LWLock; cannot raise.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(self.raw.as_ptr(), &raw mut pid) };
        status == pg_sys::BgwHandleStatus::BGWH_STOPPED || status == pg_sys::BgwHandleStatus::BGWH_POSTMASTER_DIED
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: allocated by the server for us, in a context that lives as long as the process.
            unsafe { pg_sys::pfree(self.raw.as_ptr().cast()) }
        }
    }
}

/// The whole life of a worker process; for the macro only.
///
/// # Safety
/// Called by the server as the main function of a background worker.
pub unsafe fn enter(arg: pg_sys::Datum, body: fn(u64)) {
    // SAFETY: the body's panics become an ereport(ERROR), which the server's own handler turns into exit 1.
    unsafe {
        pg_sys::panic::pgrx_extern_c_guard(|| {
            install_signal_handlers();
            body(arg.value() as u64);
        });
    }
}

fn install_signal_handlers() {
    // The handlers' own addresses: a guarded wrapper must not run in a signal handler.
    #[cfg(not(feature = "pg18"))]
    // SAFETY: both functions are made to be handlers. Cannot raise.
    unsafe {
        pg_sys::pqsignal(pg_sys::SIGHUP as c_int, Some(raw::SignalHandlerForConfigReload));
        pg_sys::pqsignal(pg_sys::SIGTERM as c_int, Some(raw::die));
    }
    #[cfg(feature = "pg18")]
    // SAFETY: as above.
    unsafe {
        pg_sys::pqsignal_be(pg_sys::SIGHUP as c_int, Some(raw::SignalHandlerForConfigReload));
        pg_sys::pqsignal_be(pg_sys::SIGTERM as c_int, Some(raw::die));
    }
    // SAFETY: the handlers are in place; writes a flag of theirs. A SIGHUP that came before them was ignored, so the settings may be old.
    unsafe {
        pg_sys::ConfigReloadPending = 1;
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Connects to a database as the bootstrap superuser; to none, for the shared catalogs only. Once in the life of the worker.
/// A database that does not exist (any more) or takes no connections ends the worker, with 1.
pub fn connect(database: Option<u32>) {
    let database = pg_sys::Oid::from(database.unwrap_or(0));
    // SAFETY: once, before any transaction. May raise FATAL: the process ends.
    unsafe { pg_sys::BackgroundWorkerInitializeConnectionByOid(database, pg_sys::InvalidOid, 0) };
}

/// Fixes a setting for the life of this worker, whatever the database or the configuration says.
pub fn fix_setting(name: &'static CStr, value: &'static CStr) {
    // SAFETY: static strings. May raise (unknown setting): unwinds.
    unsafe {
        pg_sys::SetConfigOption(name.as_ptr(), value.as_ptr(), pg_sys::GucContext::PGC_SUSET, pg_sys::GucSource::PGC_S_OVERRIDE);
    }
}

/// No limit of time that is meant for sessions ends this worker or a transaction of it.
pub fn lift_timeouts() {
    for name in [c"statement_timeout", c"idle_in_transaction_session_timeout", c"idle_session_timeout"] {
        fix_setting(name, c"0");
    }
    // The one that every transaction arms, whoever runs it.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fix_setting(c"transaction_timeout", c"0");
}

/// Ends the process in order. `restart`: the server may start it again.
pub fn leave(restart: bool) -> ! {
    // SAFETY: runs the exit callbacks and ends the process. Rust values of the frames above are dropped with it.
    unsafe { pg_sys::proc_exit(c_int::from(restart)) };
    #[allow(unreachable_code)] // `proc_exit` does not return
    std::process::abort()
}

static EXIT_REGISTERED_IN: AtomicI32 = AtomicI32::new(0);

/// `f` runs when this process leaves shared memory; it must not raise, allocate or wait. The first `f` counts.
pub fn at_exit(f: fn()) {
    static EXIT: std::sync::OnceLock<fn()> = std::sync::OnceLock::new();
    unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
        if let Some(f) = EXIT.get() {
            xact::no_unwind(*f);
        }
    }
    let _ = EXIT.get_or_init(|| f);
    if EXIT_REGISTERED_IN.swap(xact::my_pid(), Ordering::Relaxed) != xact::my_pid() {
        // SAFETY: the function is static. Raises FATAL only when 20 are registered; nothing is held.
        unsafe { pg_sys::on_shmem_exit(Some(on_exit), pg_sys::Datum::from(0usize)) };
    }
}

/// Runs `f` in a transaction of its own, with a snapshot. An error, ours or the server's, rolls it back and is returned; nothing is
/// logged. `activity` is what pg_stat_activity shows meanwhile. The caller holds nothing.
pub fn run_transaction<T>(activity: &CStr, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let running = || -> Result<T> {
        // SAFETY: no transaction is open. May raise: caught below.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        report_activity(Some(activity));
        let value = f()?;
        // SAFETY: the snapshot pushed above is the active one; the transaction is ours. May raise: caught below.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(value)
    };
    let outcome = match catch_unwind(AssertUnwindSafe(running)) {
        Ok(outcome) => outcome,
        Err(payload) => Err(error_from_panic(payload)),
    };
    if outcome.is_err() {
        roll_back();
    }
    report_activity(None);
    // SAFETY: outside a transaction. May raise (out of memory): the process ends with 1.
    unsafe { pg_sys::pgstat_report_stat(false) };
    outcome
}

fn roll_back() {
    // A panic of ours, unlike an error of the server, leaves the counters as they were, above locks that abort releases.
    // SAFETY: plain writes of process-local globals, as the server's own error path does; abort is not to be interrupted.
    unsafe { pg_sys::InterruptHoldoffCount = 1 };
    // SAFETY: aborts whatever is open. May raise: the process ends with 1.
    unsafe { pg_sys::AbortCurrentTransaction() };
    // SAFETY: as above; nothing of the error is kept.
    unsafe {
        pg_sys::FlushErrorState();
        pg_sys::QueryCancelPending = 0;
        pg_sys::InterruptHoldoffCount = 0;
    }
}

fn report_activity(running: Option<&CStr>) {
    let (state, text) = match running {
        Some(text) => (pg_sys::BackendState::STATE_RUNNING, text.as_ptr()),
        None => (pg_sys::BackendState::STATE_IDLE, ptr::null()),
    };
    // SAFETY: the text is copied. Cannot raise.
    unsafe { pg_sys::pgstat_report_activity(state, text) };
}

/// Sleeps until this process is signalled or its latch is set, at most so long. Honours the end of the server, SIGTERM (does not come
/// back) and SIGHUP: true if settings were read again. No transaction is open, no lock is held.
pub fn sleep(ms: i64, event: WaitEvent) -> bool {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: the process's own latch. When the server has died the process ends here.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events as c_int, ms.clamp(0, 3_600_000) as c_long, event.number());
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    honour_signals()
}

/// What `sleep` does after it.
pub fn honour_signals() -> bool {
    // SAFETY: volatile reads and writes of flags of the signal handlers; cannot raise.
    let (dying, reload) = unsafe {
        // A cancel that finds nothing to cancel.
        pg_sys::QueryCancelPending = 0;
        (
            ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0,
            ptr::read_volatile(&raw const pg_sys::ConfigReloadPending) != 0,
        )
    };
    if dying {
        leave(true);
    }
    xact::check_for_interrupts();
    if reload {
        // SAFETY: outside a transaction. A mistake in the file is logged. May raise: the process ends with 1.
        unsafe {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
    reload
}

/// Does a process with this id run SQL, or maintenance, in this server?
pub fn is_backend(pid: i32) -> bool {
    // SAFETY: a shared LWLock around a walk of the array of processes; cannot raise. The pointer is only compared.
    !unsafe { pg_sys::BackendPidGetProc(pid) }.is_null()
}

/// Asks a process of this server to end. The caller knows that the number is still its own.
pub fn terminate(pid: i32) {
    if pid > 0 {
        // SAFETY: a system call; failure (the process is gone) does not matter.
        unsafe { libc_kill(pid, pg_sys::SIGTERM as c_int) };
    }
}

unsafe extern "C" {
    #[link_name = "kill"]
    fn libc_kill(pid: c_int, signal: c_int) -> c_int;
}
