//! SQL for the cold paths: statements with saved plans, DDL, and running as the owner of a relation.
//! Never assigns a transaction id for a statement that only reads. Errors of the statement come as panics (see `call`); a
//! subtransaction (`xact::subtransaction`) makes them values.
use core::cell::RefCell;
use core::ffi::c_char;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use std::collections::HashMap;
use std::ffi::{CStr, CString};

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::{Datum, Oid};

use super::array;
use super::memory::{self, Entered};
use super::points::{Fault, may_fail};
use super::rel::Rel;
use crate::error::{Error, Result};

thread_local! {
    /// Plans by the text of their statement, saved for the life of the backend; nothing is freed at exit.
    static PLANS: RefCell<ManuallyDrop<HashMap<&'static str, pg_sys::SPIPlanPtr>>> =
        RefCell::new(ManuallyDrop::new(HashMap::new()));
}

/// An open SPI level; closed on drop, by abort when unwinding.
struct Connection {
    _not_send: PhantomData<*mut ()>,
}

impl Connection {
    fn open() -> Result<Self> {
        may_fail(Fault::Alloc);
        // SAFETY: inside a transaction. May raise (out of memory): unwinds, abort closes.
        check(unsafe { pg_sys::SPI_connect() }, "SPI_connect")?;
        Ok(Self { _not_send: PhantomData })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: levels nest, so ours is the current one; switches back to the context before `open`.
            unsafe { pg_sys::SPI_finish() };
        }
    }
}

fn check(code: i32, what: &str) -> Result<i32> {
    if code >= 0 {
        return Ok(code);
    }
    // SAFETY: gives a static string, or one in a static buffer; copied at once. Cannot raise.
    let name = unsafe { CStr::from_ptr(pg_sys::SPI_result_code_string(code)) };
    Err(Error::new(Code::ERRCODE_INTERNAL_ERROR, format!("{what} failed: {}", name.to_string_lossy())))
}

fn c_string(sql: &str) -> Result<CString> {
    CString::new(sql).map_err(|_| Error::new(Code::ERRCODE_SYNTAX_ERROR, "statement contains a null character"))
}

fn plan_of(sql: &'static str, args: &[(Oid, Option<Datum>)]) -> Result<pg_sys::SPIPlanPtr> {
    if let Some(plan) = PLANS.with_borrow(|plans| plans.get(sql).copied()) {
        return Ok(plan);
    }
    let text = c_string(sql)?;
    let mut types: Vec<Oid> = args.iter().map(|(oid, _)| *oid).collect();
    may_fail(Fault::Sql);
    // SAFETY: inside an SPI level; text and types outlive the call. May raise (syntax, missing object): unwinds.
    let plan = unsafe { pg_sys::SPI_prepare(text.as_ptr(), types.len() as i32, types.as_mut_ptr()) };
    if plan.is_null() {
        return Err(Error::new(Code::ERRCODE_INTERNAL_ERROR, "SPI_prepare failed").detail(sql));
    }
    // SAFETY: a plan made just now; moved to memory that lasts as long as the backend. Cannot raise.
    check(unsafe { pg_sys::SPI_keepplan(plan) }, "SPI_keepplan")?;
    PLANS.with_borrow_mut(|plans| plans.insert(sql, plan));
    Ok(plan)
}

/// Runs the saved plan; the result is in the SPI globals until the level is closed.
fn run(sql: &'static str, args: &[(Oid, Option<Datum>)], read_only: bool) -> Result<u64> {
    let plan = plan_of(sql, args)?;
    let mut values: Vec<Datum> = args.iter().map(|(_, v)| v.unwrap_or(Datum::null())).collect();
    let nulls: Vec<c_char> = args.iter().map(|(_, v)| if v.is_some() { b' ' } else { b'n' } as c_char).collect();
    may_fail(Fault::Sql);
    // SAFETY: the plan is saved and takes as many arguments as it was prepared with, which the static text fixes; the arrays
    // outlive the call. May raise: unwinds, destructors run, abort closes the level.
    let code = unsafe { pg_sys::SPI_execute_plan(plan, values.as_mut_ptr(), nulls.as_ptr(), read_only, 0) };
    check(code, "SPI_execute_plan")?;
    // SAFETY: a plain read of a backend-local global; cannot raise.
    Ok(unsafe { pg_sys::SPI_processed })
}

/// Runs a query and gives each row to `each`, in the memory context of the caller; an `Err` ends the walk.
/// With `read_only` it sees what the active snapshot sees; without, a fresh snapshot, own changes included.
pub fn select(
    sql: &'static str,
    args: &[(Oid, Option<Datum>)],
    read_only: bool,
    mut each: impl FnMut(&SqlRow) -> Result<()>,
) -> Result<u64> {
    let callers = memory::current();
    let _connection = Connection::open()?;
    let count = run(sql, args, read_only)?;
    give_rows(count, callers, &mut each)?;
    Ok(count)
}

/// Walks the result of the statement just run.
fn give_rows(count: u64, callers: pg_sys::MemoryContext, each: &mut dyn FnMut(&SqlRow) -> Result<()>) -> Result<()> {
    // SAFETY: a plain read of a backend-local global; cannot raise.
    let table = unsafe { pg_sys::SPI_tuptable };
    if table.is_null() {
        return Err(Error::new(Code::ERRCODE_INTERNAL_ERROR, "the statement returns no rows"));
    }
    let _in_callers = Entered::into_raw_context(callers);
    for i in 0..count as usize {
        super::xact::check_for_interrupts();
        // SAFETY: the tuple table has `count` tuples and lives until our level is closed; a nested level has its own.
        let row = unsafe { SqlRow { tuple: *(*table).vals.add(i), desc: (*table).tupdesc, _level: PhantomData } };
        each(&row)?;
    }
    Ok(())
}

/// As `select`, with a snapshot taken now, whatever the isolation level of the caller: it sees what has committed by now and what this
/// transaction has done before.
pub fn select_latest(sql: &'static str, args: &[(Oid, Option<Datum>)], each: impl FnMut(&SqlRow) -> Result<()>) -> Result<u64> {
    in_latest_snapshot(|| select(sql, args, true, each))
}

/// Several reads with one snapshot, taken now.
pub fn in_latest_snapshot<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    may_fail(Fault::Alloc);
    // SAFETY: inside a transaction. May raise: unwinds, abort pops what was pushed.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let outcome = read();
    // SAFETY: pops the snapshot pushed above; an `Err` has left the stack as it was. Cannot raise.
    unsafe { pg_sys::PopActiveSnapshot() };
    outcome
}

/// Runs a statement that is made up at run time, and gives its rows to `each`, in the memory context of the caller.
pub fn select_made_up(text: &str, args: &[(Oid, Option<Datum>)], mut each: impl FnMut(&SqlRow) -> Result<()>) -> Result<u64> {
    let text = c_string(text)?;
    let callers = memory::current();
    let _connection = Connection::open()?;
    let mut types: Vec<Oid> = args.iter().map(|(oid, _)| *oid).collect();
    let mut values: Vec<Datum> = args.iter().map(|(_, v)| v.unwrap_or(Datum::null())).collect();
    let nulls: Vec<c_char> = args.iter().map(|(_, v)| if v.is_some() { b' ' } else { b'n' } as c_char).collect();
    may_fail(Fault::Sql);
    // SAFETY: inside an SPI level; text and arrays outlive the call, and each array has one element an argument. May raise: unwinds,
    // abort closes the level.
    let code = unsafe {
        pg_sys::SPI_execute_with_args(
            text.as_ptr(),
            types.len() as i32,
            types.as_mut_ptr(),
            values.as_mut_ptr(),
            nulls.as_ptr(),
            false,
            0,
        )
    };
    check(code, "SPI_execute_with_args")?;
    // SAFETY: a plain read of a backend-local global; cannot raise.
    let count = unsafe { pg_sys::SPI_processed };
    give_rows(count, callers, &mut each)?;
    Ok(count)
}

/// The first column of the first row, copied into the memory context of the caller.
pub fn select_one(sql: &'static str, args: &[(Oid, Option<Datum>)], read_only: bool) -> Result<Option<Datum>> {
    let mut first = None;
    select(sql, args, read_only, |row| {
        if first.is_none() {
            first = Some(row.copy_datum(1));
        }
        Ok(())
    })?;
    Ok(first.flatten())
}

/// Runs a statement that writes, and gives the number of rows it touched.
pub fn execute(sql: &'static str, args: &[(Oid, Option<Datum>)]) -> Result<u64> {
    let _connection = Connection::open()?;
    run(sql, args, false)
}

/// Runs statements that are made up at run time, once, without arguments.
pub fn ddl(sql: &str) -> Result<()> {
    let text = c_string(sql)?;
    let _connection = Connection::open()?;
    may_fail(Fault::Sql);
    // SAFETY: inside an SPI level; the text outlives the call. May raise: unwinds, abort closes the level.
    check(unsafe { pg_sys::SPI_execute(text.as_ptr(), false, 0) }, "SPI_execute").map(|_| ())
}

/// A row of a result; columns are counted from 1. A column that does not exist is NULL.
pub struct SqlRow<'l> {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
    _level: PhantomData<&'l ()>,
}

impl SqlRow<'_> {
    /// Not detoasted, and good only within the closure.
    pub fn datum(&self, column: i32) -> Option<Datum> {
        let mut is_null = true;
        // SAFETY: tuple and descriptor are live. Cannot raise; a missing column leaves the flag set.
        let datum = unsafe { pg_sys::SPI_getbinval(self.tuple, self.desc, column, &raw mut is_null) };
        (!is_null).then_some(datum)
    }

    /// Copied into the memory context of the caller of `select`; an external toast pointer stays one.
    pub fn copy_datum(&self, column: i32) -> Option<Datum> {
        let datum = self.datum(column)?;
        // SAFETY: the column exists, for it has a value. Reads the descriptor or the type cache; may raise: unwinds.
        let oid = unsafe { pg_sys::SPI_gettypeid(self.desc, column) };
        let (mut len, mut by_val) = (0i16, false);
        // SAFETY: two out parameters of ours. May raise (catalog read): unwinds.
        unsafe { pg_sys::get_typlenbyval(oid, &raw mut len, &raw mut by_val) };
        Some(array::copy(datum, by_val, len))
    }

    pub fn i64(&self, column: i32) -> Option<i64> {
        self.datum(column).map(|d| d.value() as i64)
    }

    pub fn i32(&self, column: i32) -> Option<i32> {
        self.datum(column).map(|d| d.value() as i32)
    }

    pub fn i16(&self, column: i32) -> Option<i16> {
        self.datum(column).map(|d| d.value() as i16)
    }

    pub fn oid(&self, column: i32) -> Option<Oid> {
        self.datum(column).map(|d| Oid::from(d.value() as u32))
    }

    pub fn bool(&self, column: i32) -> Option<bool> {
        self.datum(column).map(|d| d.value() as u8 != 0)
    }

    pub fn f64(&self, column: i32) -> Option<f64> {
        self.datum(column).map(|d| f64::from_bits(d.value() as u64))
    }

    pub fn timestamptz(&self, column: i32) -> Option<i64> {
        self.i64(column)
    }

    pub fn text(&self, column: i32) -> Option<String> {
        self.datum(column).map(array::text_of)
    }

    pub fn bytes(&self, column: i32) -> Option<Vec<u8>> {
        self.datum(column).map(array::bytes_of)
    }
}

/// Runs `f` with the rights of the owner of this relation and a search path of `pg_catalog, pg_temp`. Both are put back at
/// return, and by abort if an error unwinds. Takes AccessShareLock on it.
pub fn as_owner<T>(relation: Oid, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let owner = Rel::open(relation, super::rel::Lock::AccessShare)?.owner();
    let (mut user, mut context) = (Oid::INVALID, 0);
    // SAFETY: two out parameters of ours; cannot raise.
    unsafe { pg_sys::GetUserIdAndSecContext(&raw mut user, &raw mut context) };
    let restricted = (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32;
    // SAFETY: sets two backend-local values, which abort resets; cannot raise.
    unsafe { pg_sys::SetUserIdAndSecContext(owner, context | restricted) };
    // SAFETY: counts a level; cannot raise.
    let level = unsafe { pg_sys::NewGUCNestLevel() };
    may_fail(Fault::Alloc);
    // SAFETY: static strings. May raise (out of memory): unwinds, abort restores user and settings.
    unsafe {
        pg_sys::set_config_option(
            c"search_path".as_ptr(),
            c"pg_catalog, pg_temp".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
    let outcome = f();
    // SAFETY: the level opened above is the innermost. Undoes the setting.
    unsafe { pg_sys::AtEOXact_GUC(false, level) };
    // SAFETY: the values read above.
    unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    outcome
}
