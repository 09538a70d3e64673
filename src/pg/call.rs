//! The boundary between SQL and Rust: exported V1 functions, their arguments, their results, and how an `Error` or a panic
//! becomes an ereport with SQLSTATE, DETAIL and HINT.
use core::marker::PhantomData;
use core::ptr;
use std::any::Any;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::{CaughtError, ErrorReport, ErrorReportWithLevel};
use pgrx::pg_sys::{Datum, Oid};

pub use super::array::{
    array_elements, bytes_datum, bytes_of, clip, copy_varlena, datum_array_datum, datum_size, detoast, each_i64, i16_array_datum,
    i32_array_datum, i64_array_datum, jsonb_datum, text_array_datum, text_datum, text_of, timestamptz_array_datum,
};
pub use super::srf::Rows;
pub use super::trigger::TriggerRow;
use crate::error::{Error, Result};

/// Exports `$body: fn(&mut Call) -> Result<Ret>` as the SQL-callable C function `$symbol` with `$nargs` arguments.
#[macro_export]
macro_rules! sql_function {
    ($symbol:ident, $nargs:expr, $body:path) => {
        #[allow(unsafe_code)]
        const _: () = {
            #[unsafe(export_name = concat!("pg_finfo_", stringify!($symbol)))]
            extern "C-unwind" fn finfo() -> *const ::pgrx::pg_sys::Pg_finfo_record {
                const V1: ::pgrx::pg_sys::Pg_finfo_record = ::pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
                &V1
            }

            #[unsafe(export_name = stringify!($symbol))]
            unsafe extern "C-unwind" fn entry(fcinfo: ::pgrx::pg_sys::FunctionCallInfo) -> ::pgrx::pg_sys::Datum {
                const NARGS: i16 = $nargs;
                const BODY: fn(&mut $crate::pg::call::Call) -> $crate::error::Result<$crate::pg::call::Ret> = $body;
                const NAME: &str = stringify!($symbol);
                // SAFETY: the server passes its own call frame, live for the call.
                unsafe { $crate::pg::call::enter(fcinfo, NAME, NARGS, BODY) }
            }
        };
    };
}

/// What a function gives back.
pub enum Ret {
    Null,
    Void,
    Datum(Datum),
    /// The rows put into `Call::rows`.
    Rows,
}

impl Ret {
    pub fn bool(value: bool) -> Self {
        Self::Datum(Datum::from(value))
    }

    pub fn i32(value: i32) -> Self {
        Self::Datum(Datum::from(value))
    }

    pub fn i64(value: i64) -> Self {
        Self::Datum(Datum::from(value))
    }

    pub fn text(value: &str) -> Self {
        Self::Datum(text_datum(value))
    }

    pub fn opt(value: Option<Datum>) -> Self {
        value.map_or(Self::Null, Self::Datum)
    }
}

/// The whole of an exported function; for the macro only.
///
/// # Safety
/// `fcinfo` is the call frame the server passed to the exported function.
pub unsafe fn enter(
    fcinfo: pg_sys::FunctionCallInfo,
    symbol: &'static str,
    nargs: i16,
    body: fn(&mut Call) -> Result<Ret>,
) -> Datum {
    // SAFETY: entered from C on the main thread; every panic below, ours or a caught server error, becomes an ereport here,
    // after the destructors of `run` have run.
    unsafe { pg_sys::panic::pgrx_extern_c_guard(move || run(fcinfo, symbol, nargs, body)) }
}

fn run(fcinfo: pg_sys::FunctionCallInfo, symbol: &'static str, nargs: i16, body: fn(&mut Call) -> Result<Ret>) -> Datum {
    let mut call = Call { fcinfo, _frame: PhantomData };
    let outcome = if call.nargs() == nargs { body(&mut call) } else { Err(version_mismatch(symbol, call.nargs(), nargs)) };
    match outcome {
        Ok(Ret::Datum(datum)) => call.finish(datum, false),
        Ok(Ret::Void) => call.finish(Datum::null(), false),
        Ok(Ret::Null | Ret::Rows) => call.finish(Datum::null(), true),
        Err(error) => raise(error),
    }
}

fn version_mismatch(symbol: &str, found: i16, expected: i16) -> Error {
    Error::new(
        Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("function {symbol} called with {found} arguments, the library expects {expected}"),
    )
    .hint(concat!(
        "Run ALTER EXTENSION ",
        env!("CARGO_PKG_NAME"),
        " UPDATE, or restart the server to load the installed library."
    ))
}

/// Unwinds to the nearest guard, which turns it into an ereport(ERROR).
pub fn raise(error: Error) -> ! {
    let mut report = ErrorReport::new(error.code, error.message, "");
    if let Some(detail) = error.detail {
        report = report.set_detail(detail);
    }
    if let Some(hint) = error.hint {
        report = report.set_hint(hint);
    }
    report.report(pgrx::PgLogLevel::ERROR);
    // `report` at level ERROR never returns.
    std::process::abort()
}

/// Emits a WARNING that carries the same fields; does not unwind.
pub fn warn(error: Error) {
    report(error, pgrx::PgLogLevel::WARNING);
}

/// Tells the client something that is no error.
pub fn notice(error: Error) {
    report(error, pgrx::PgLogLevel::NOTICE);
}

/// For the server's log: a change of state.
pub fn log(message: String) {
    report(Error::new(Code::ERRCODE_SUCCESSFUL_COMPLETION, message), pgrx::PgLogLevel::LOG);
}

/// For the server's log, when somebody looks closely.
pub fn debug(message: String) {
    report(Error::new(Code::ERRCODE_SUCCESSFUL_COMPLETION, message), pgrx::PgLogLevel::DEBUG1);
}

fn report(error: Error, level: pgrx::PgLogLevel) {
    let mut report = ErrorReport::new(error.code, error.message, "");
    if let Some(detail) = error.detail {
        report = report.set_detail(detail);
    }
    if let Some(hint) = error.hint {
        report = report.set_hint(hint);
    }
    report.report(level);
}

/// What a caught panic said, as an `Error`.
pub(super) fn error_from_panic(payload: Box<dyn Any + Send>) -> Error {
    let payload = match payload.downcast::<CaughtError>() {
        Ok(caught) => {
            return match &*caught {
                CaughtError::PostgresError(report)
                | CaughtError::ErrorReport(report)
                | CaughtError::RustPanic { ereport: report, .. } => error_from_report(report),
            };
        }
        Err(other) => other,
    };
    let payload = match payload.downcast::<ErrorReportWithLevel>() {
        Ok(report) => return error_from_report(&report),
        Err(other) => other,
    };
    let message = payload
        .downcast_ref::<&'static str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unexpected panic".to_owned());
    Error::new(Code::ERRCODE_INTERNAL_ERROR, message)
}

fn error_from_report(report: &ErrorReportWithLevel) -> Error {
    Error {
        code: report.sql_error_code(),
        message: report.message().to_owned(),
        detail: report.detail().map(str::to_owned),
        hint: report.hint().map(str::to_owned),
    }
}

/// One call from SQL: its arguments and its ways to answer. An argument out of range reads as NULL.
pub struct Call<'c> {
    fcinfo: pg_sys::FunctionCallInfo,
    _frame: PhantomData<&'c mut pg_sys::FunctionCallInfoBaseData>,
}

impl<'c> Call<'c> {
    pub(super) fn frame(&self) -> &pg_sys::FunctionCallInfoBaseData {
        // SAFETY: `fcinfo` is live for the call, and only `finish` writes to it, after the body.
        unsafe { &*self.fcinfo }
    }

    fn finish(self, datum: Datum, is_null: bool) -> Datum {
        // SAFETY: the frame is live; the body's borrows are over.
        unsafe { (*self.fcinfo).isnull = is_null };
        datum
    }

    /// The function that is being called.
    pub fn function_oid(&self) -> Oid {
        // SAFETY: null or live for the call; reads a field.
        unsafe { self.frame().flinfo.as_ref() }.map_or(Oid::INVALID, |info| info.fn_oid)
    }

    pub fn nargs(&self) -> i16 {
        self.frame().nargs
    }

    /// The raw argument; a varlena is not detoasted.
    pub fn datum(&self, n: usize) -> Option<Datum> {
        if n >= usize::try_from(self.nargs()).unwrap_or(0) {
            debug_assert!(false, "argument {n} does not exist");
            return None;
        }
        // SAFETY: the frame has `nargs` arguments behind it, and n is one of them.
        let arg = unsafe { *self.frame().args.as_ptr().add(n) };
        (!arg.isnull).then_some(arg.value)
    }

    pub fn is_null(&self, n: usize) -> bool {
        self.datum(n).is_none()
    }

    pub fn i64(&self, n: usize) -> Option<i64> {
        self.datum(n).map(|d| d.value() as i64)
    }

    pub fn i32(&self, n: usize) -> Option<i32> {
        self.datum(n).map(|d| d.value() as i32)
    }

    pub fn i16(&self, n: usize) -> Option<i16> {
        self.datum(n).map(|d| d.value() as i16)
    }

    pub fn oid(&self, n: usize) -> Option<Oid> {
        self.datum(n).map(|d| Oid::from(d.value() as u32))
    }

    pub fn bool(&self, n: usize) -> Option<bool> {
        self.datum(n).map(|d| d.value() as u8 != 0)
    }

    /// Microseconds since 2000-01-01 UTC; the infinities are the ends of the range.
    pub fn timestamptz(&self, n: usize) -> Option<i64> {
        self.i64(n)
    }

    /// Microseconds, saturating; a day has 24 hours and a month 30 days.
    pub fn interval_us(&self, n: usize) -> Option<i64> {
        // SAFETY: the caller's SQL declaration says interval, a fixed-width type passed by reference; copied at once.
        self.datum(n).map(|d| unsafe { d.cast_mut_ptr::<pg_sys::Interval>().read() }).map(|i| interval_us(&i))
    }

    pub fn text(&self, n: usize) -> Option<String> {
        self.datum(n).map(text_of)
    }

    /// The bytes of a `text` (in the server encoding) or `bytea`.
    pub fn bytes(&self, n: usize) -> Option<Vec<u8>> {
        self.datum(n).map(bytes_of)
    }

    /// By-reference elements point into the detoasted array; they live as long as the call.
    pub fn array_datums(&self, n: usize, element: Oid) -> Result<Option<Vec<Option<Datum>>>> {
        self.datum(n).map(|d| array_elements(d, element)).transpose()
    }

    fn array_of<T>(&self, n: usize, element: Oid, f: fn(Datum) -> T) -> Result<Option<Vec<Option<T>>>> {
        let elements = self.array_datums(n, element)?;
        Ok(elements.map(|elements| elements.into_iter().map(|e| e.map(f)).collect()))
    }

    pub fn array_i64(&self, n: usize) -> Result<Option<Vec<Option<i64>>>> {
        self.array_of(n, pg_sys::INT8OID, |d| d.value() as i64)
    }

    pub fn array_i32(&self, n: usize) -> Result<Option<Vec<Option<i32>>>> {
        self.array_of(n, pg_sys::INT4OID, |d| d.value() as i32)
    }

    pub fn array_i16(&self, n: usize) -> Result<Option<Vec<Option<i16>>>> {
        self.array_of(n, pg_sys::INT2OID, |d| d.value() as i16)
    }

    pub fn array_timestamptz(&self, n: usize) -> Result<Option<Vec<Option<i64>>>> {
        self.array_of(n, pg_sys::TIMESTAMPTZOID, |d| d.value() as i64)
    }

    pub fn array_text(&self, n: usize) -> Result<Option<Vec<Option<String>>>> {
        self.array_of(n, pg_sys::TEXTOID, text_of)
    }

    /// Begins a set of rows; answer with `Ret::Rows`.
    pub fn rows(&self) -> Result<Rows<'c>> {
        Rows::begin(self.frame())
    }

    /// The new row of an INSTEAD OF INSERT FOR EACH ROW trigger.
    pub fn trigger_row(&self) -> Result<TriggerRow<'c>> {
        TriggerRow::of_insert(self.frame())
    }

    /// True in a procedure that was called outside a transaction block, as a statement of its own.
    pub fn is_non_atomic(&self) -> bool {
        let context = self.frame().context;
        if !is_node(context, pg_sys::NodeTag::T_CallContext) {
            return false;
        }
        // SAFETY: the tag says it is a CallContext, live for the call.
        unsafe { !(*context.cast::<pg_sys::CallContext>()).atomic }
    }
}

/// Is this non-null, and a node with this tag?
pub(super) fn is_node(node: pg_sys::fmNodePtr, tag: pg_sys::NodeTag) -> bool {
    // SAFETY: null, or a node of the server, whose first field is its tag; live for the call.
    !ptr::eq(node, ptr::null()) && unsafe { (*node.cast::<pg_sys::Node>()).type_ } == tag
}

/// An interval of so many microseconds, without days and months.
pub fn interval_datum(us: i64) -> Datum {
    let interval = pg_sys::Interval { time: us, day: 0, month: 0 };
    // SAFETY: palloc may raise: unwinds. The new block has the size of an interval and is ours.
    unsafe {
        let place = pg_sys::palloc(size_of::<pg_sys::Interval>()).cast::<pg_sys::Interval>();
        place.write(interval);
        Datum::from(place)
    }
}

fn interval_us(interval: &pg_sys::Interval) -> i64 {
    const DAY: i64 = 86_400_000_000;
    let days = i64::from(interval.day).saturating_add(i64::from(interval.month) * 30);
    interval.time.saturating_add(days.saturating_mul(DAY))
}
