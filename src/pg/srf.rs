//! A set of rows as the result of a function: materialized in a tuplestore, never detoasted.
use core::marker::PhantomData;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use super::call::is_node;
use super::memory::Entered;
use super::points::{Fault, may_fail};
use crate::error::{Error, Result};

/// The rows of one call. The tuplestore belongs to the executor, which frees it at the end of the query.
pub struct Rows<'c> {
    store: *mut pg_sys::Tuplestorestate,
    desc: pg_sys::TupleDesc,
    values: Vec<Datum>,
    nulls: Vec<bool>,
    count: u64,
    _frame: PhantomData<&'c ()>,
}

impl<'c> Rows<'c> {
    pub(super) fn begin(frame: &pg_sys::FunctionCallInfoBaseData) -> Result<Self> {
        let info = frame.resultinfo.cast::<pg_sys::ReturnSetInfo>();
        if !is_node(frame.resultinfo, pg_sys::NodeTag::T_ReturnSetInfo) {
            return Err(unsupported());
        }
        // SAFETY: the tag says it is a ReturnSetInfo, live for the call and written by nobody else meanwhile.
        let info = unsafe { &mut *info };
        let materialize = pg_sys::SetFunctionReturnMode::SFRM_Materialize as i32;
        if info.allowedModes & materialize == 0 || info.expectedDesc.is_null() {
            return Err(unsupported());
        }
        // SAFETY: the expression context is live for the call; reads a field.
        let per_query = unsafe { (*info.econtext).ecxt_per_query_memory };
        let entered = Entered::into_raw_context(per_query);
        may_fail(Fault::Alloc);
        // SAFETY: the expected descriptor is live for the call. May raise (out of memory): unwinds. The executor frees it.
        let desc = unsafe { pg_sys::CreateTupleDescCopy(info.expectedDesc) };
        let random = info.allowedModes & pg_sys::SetFunctionReturnMode::SFRM_Materialize_Random as i32 != 0;
        may_fail(Fault::Alloc);
        // SAFETY: may raise (out of memory): unwinds. The store lives in the per-query context.
        let store = unsafe { pg_sys::tuplestore_begin_heap(random, false, pg_sys::work_mem) };
        drop(entered);
        info.returnMode = pg_sys::SetFunctionReturnMode::SFRM_Materialize;
        info.setResult = store;
        info.setDesc = desc;
        // SAFETY: the descriptor was made above; reads a field.
        let natts = usize::try_from(unsafe { (*desc).natts }).unwrap_or(0);
        Ok(Self {
            store,
            desc,
            values: Vec::with_capacity(natts),
            nulls: Vec::with_capacity(natts),
            count: 0,
            _frame: PhantomData,
        })
    }

    /// Adds one row, column by column as declared in SQL. Values are copied; external toast pointers stay pointers.
    pub fn put(&mut self, columns: &[Option<Datum>]) -> Result<()> {
        // SAFETY: the descriptor lives as long as the query; reads a field.
        let natts = usize::try_from(unsafe { (*self.desc).natts }).unwrap_or(0);
        if columns.len() != natts {
            return Err(Error::new(
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("function returns {} columns, its declaration has {natts}", columns.len()),
            )
            .hint(concat!("Run ALTER EXTENSION ", env!("CARGO_PKG_NAME"), " UPDATE.")));
        }
        self.values.clear();
        self.nulls.clear();
        self.values.extend(columns.iter().map(|c| c.unwrap_or(Datum::null())));
        self.nulls.extend(columns.iter().map(Option::is_none));
        may_fail(Fault::Append);
        // SAFETY: both arrays have one element per column, and the Datums are of the declared types by the caller's contract.
        // May raise (temporary file): unwinds, the executor's contexts own the rest.
        unsafe {
            pg_sys::tuplestore_putvalues(self.store, self.desc, self.values.as_mut_ptr(), self.nulls.as_mut_ptr());
        }
        self.count += 1;
        Ok(())
    }

    pub fn len(&self) -> u64 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

fn unsupported() -> Error {
    Error::new(Code::ERRCODE_FEATURE_NOT_SUPPORTED, "set-valued function called in context that cannot accept a set")
}
