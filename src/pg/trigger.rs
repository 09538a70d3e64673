//! The new row of an INSTEAD OF INSERT FOR EACH ROW trigger.
use core::marker::PhantomData;
use std::ffi::CString;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use super::call::{Ret, is_node};
use crate::error::{Error, Result};

pub struct TriggerRow<'c> {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
    relation: pg_sys::Oid,
    _frame: PhantomData<&'c ()>,
}

impl<'c> TriggerRow<'c> {
    pub(super) fn of_insert(frame: &pg_sys::FunctionCallInfoBaseData) -> Result<Self> {
        if !is_node(frame.context, pg_sys::NodeTag::T_TriggerData) {
            return Err(protocol_error());
        }
        // SAFETY: the tag says it is a TriggerData, live for the call.
        let data = unsafe { &*frame.context.cast::<pg_sys::TriggerData>() };
        let expected = pg_sys::TRIGGER_EVENT_INSERT | pg_sys::TRIGGER_EVENT_ROW | pg_sys::TRIGGER_EVENT_INSTEAD;
        let mask = pg_sys::TRIGGER_EVENT_OPMASK | pg_sys::TRIGGER_EVENT_ROW | pg_sys::TRIGGER_EVENT_TIMINGMASK;
        if data.tg_event & mask != expected || data.tg_trigtuple.is_null() {
            return Err(protocol_error());
        }
        // SAFETY: the trigger's relation is open for the call; reads a field.
        let desc = unsafe { (*data.tg_relation).rd_att };
        // SAFETY: as above; reads a field.
        let relation = unsafe { (*data.tg_relation).rd_id };
        Ok(Self { tuple: data.tg_trigtuple, desc, relation, _frame: PhantomData })
    }

    /// A column by name, not detoasted.
    /// The table or view that fired.
    pub fn relation_oid(&self) -> pg_sys::Oid {
        self.relation
    }

    pub fn get(&self, name: &str) -> Result<Option<Datum>> {
        let number = self.column(name)?;
        let mut is_null = false;
        // SAFETY: tuple and descriptor are the trigger's, live for the call. Cannot raise for a column that exists.
        let datum = unsafe { pg_sys::SPI_getbinval(self.tuple, self.desc, number, &raw mut is_null) };
        Ok((!is_null).then_some(datum))
    }

    fn column(&self, name: &str) -> Result<i32> {
        let missing = || Error::new(Code::ERRCODE_UNDEFINED_COLUMN, format!("column \"{name}\" does not exist"));
        let c_name = CString::new(name).map_err(|_| missing())?;
        // SAFETY: the descriptor is live, the string terminated. Reports a missing column by its result.
        let number = unsafe { pg_sys::SPI_fnumber(self.desc, c_name.as_ptr()) };
        if number > 0 { Ok(number) } else { Err(missing()) }
    }

    /// The row as it came: tells the executor that it was inserted.
    pub fn result(self) -> Ret {
        Ret::Datum(Datum::from(self.tuple))
    }

    /// The row with some columns replaced, for INSERT .. RETURNING.
    pub fn result_with(self, changes: &[(&str, Option<Datum>)]) -> Result<Ret> {
        let mut numbers = Vec::with_capacity(changes.len());
        let mut values = Vec::with_capacity(changes.len());
        let mut nulls = Vec::with_capacity(changes.len());
        for (name, value) in changes {
            numbers.push(self.column(name)?);
            values.push(value.unwrap_or(Datum::null()));
            nulls.push(value.is_none());
        }
        // SAFETY: three arrays of equal length, copied by the call. May raise (out of memory): unwinds. The new tuple is in
        // the current context, as a trigger's result must be.
        let tuple = unsafe {
            pg_sys::heap_modify_tuple_by_cols(
                self.tuple,
                self.desc,
                numbers.len() as i32,
                numbers.as_mut_ptr(),
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
            )
        };
        Ok(Ret::Datum(Datum::from(tuple)))
    }
}

fn protocol_error() -> Error {
    Error::new(
        Code::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
        "function must be called by a trigger INSTEAD OF INSERT FOR EACH ROW",
    )
}
