//! The error history of a job: a jsonb array, one object a failed attempt. Built by the server, so no jsonb is decoded here.

use awa_protocol::limits::ERROR_BYTES;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::Frontier;
use crate::pg::call::{bytes_datum, clip};
use crate::pg::sql;
use crate::store::datum;

pub fn append(frontier: &Frontier, before: Option<Datum>, attempt: i32, at: i64, error: Option<&[u8]>) -> Result<Datum> {
    let mut history = None;
    sql::as_owner(frontier.ledger, || {
        sql::select(
            "SELECT COALESCE($1, '[]'::jsonb) || jsonb_build_array(jsonb_build_object('attempt', $2, 'at', $3, 'error', $4))",
            &[
                (pg_sys::JSONBOID, before),
                (pg_sys::INT4OID, Some(datum::i32(attempt))),
                (pg_sys::TIMESTAMPTZOID, Some(datum::i64(at))),
                (pg_sys::TEXTOID, error.map(|error| bytes_datum(clip(error, ERROR_BYTES)))),
            ],
            false,
            |row| {
                history = row.copy_datum(1);
                Ok(())
            },
        )
    })?;
    history.ok_or_else(|| Error::new(pgrx::PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "could not build the error history"))
}
