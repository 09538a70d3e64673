//! The dictionary of job kinds.
//!
//! Tables written: awa.job_kinds. Tables read: the same. A kind may have several numbers: two transactions that meet a new kind at once
//! each add a row and neither waits. A number added by this transaction is remembered only when it has committed, because a rollback
//! takes the row with it.

use std::cell::RefCell;
use std::collections::HashMap;

use awa_protocol::limits::KIND_NAME_BYTES;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::frontier::Frontier;
use crate::pg::call::bytes_datum;
use crate::pg::{sql, xid};
use crate::store::datum;

#[derive(Default)]
struct Known {
    ledger: u32,
    by_name: HashMap<Vec<u8>, i32>,
    by_id: HashMap<i32, Box<[u8]>>,
}

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::new(Known::default());
}

const KNOWN_KINDS: usize = 10_000;

fn with_known<R>(frontier: &Frontier, body: impl FnOnce(&mut Known) -> R) -> R {
    KNOWN.with_borrow_mut(|known| {
        let ledger = frontier.ledger.to_u32();
        if known.ledger != ledger || known.by_id.len() > KNOWN_KINDS || known.by_name.len() > KNOWN_KINDS {
            *known = Known { ledger, ..Known::default() };
        }
        body(known)
    })
}

/// The number of a kind; adds it to the dictionary if it is new.
pub fn number(frontier: &Frontier, name: &[u8]) -> Result<i32> {
    if let Some(id) = with_known(frontier, |known| known.by_name.get(name).copied()) {
        return Ok(id);
    }
    if name.is_empty() || name.len() > KIND_NAME_BYTES {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, "kind must have 1 to 200 bytes")
            .detail(format!("It has {}.", name.len()))
            .hint("Put variable parts into args."));
    }
    let text = bytes_datum(name);
    let mut found = None;
    let mut committed = false;
    sql::as_owner(frontier.ledger, || {
        sql::select(
            "SELECT kind_id, xmin::text::bigint FROM awa.job_kinds WHERE name OPERATOR(pg_catalog.=) $1 ORDER BY kind_id LIMIT 1",
            &[(pg_sys::TEXTOID, Some(text))],
            false,
            |row| {
                found = row.i32(1);
                committed = row.i64(2).is_some_and(|xmin| !xid::is_own(xmin as u64));
                Ok(())
            },
        )?;
        if found.is_none() {
            sql::select(
                "INSERT INTO awa.job_kinds (kind_id, name) VALUES (pg_catalog.nextval('awa.kind_ids'), $1) RETURNING kind_id",
                &[(pg_sys::TEXTOID, Some(text))],
                false,
                |row| {
                    found = row.i32(1);
                    Ok(())
                },
            )?;
        }
        Ok(())
    })?;
    let id = found.ok_or_else(|| Error::new(Code::ERRCODE_INTERNAL_ERROR, "could not add a job kind"))?;
    if committed {
        with_known(frontier, |known| {
            known.by_name.insert(name.to_vec(), id);
        });
    }
    Ok(id)
}

/// The name of a kind. Rows never change, so what was once seen stays true.
pub fn name(frontier: &Frontier, id: i32) -> Result<Box<[u8]>> {
    if let Some(name) = with_known(frontier, |known| known.by_id.get(&id).cloned()) {
        return Ok(name);
    }
    let mut found: Option<Box<[u8]>> = None;
    sql::as_owner(frontier.ledger, || {
        sql::select_latest(
            "SELECT name FROM awa.job_kinds WHERE kind_id = $1",
            &[(pg_sys::INT4OID, Some(datum::i32(id)))],
            |row| {
                found = row.bytes(1).map(Vec::into_boxed_slice);
                Ok(())
            },
        )
    })?;
    let name = found.ok_or_else(|| {
        Error::new(Code::ERRCODE_DATA_CORRUPTED, format!("job kind {id} is not in the dictionary"))
            .hint("Restore awa.job_kinds from a backup.")
    })?;
    with_known(frontier, |known| {
        known.by_id.insert(id, name.clone());
    });
    Ok(name)
}
