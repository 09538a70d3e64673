//! Which server and database the jobs belong to.
//!
//! Tables written: awa.instance. Tables read: the same. A copy of the database carries the row of the original, and must not run its
//! jobs a second time. The caller is inside `sql::as_owner`.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::pg::{sql, xact};
use crate::store::datum;

fn mine() -> (i64, i64) {
    (xact::system_identifier() as i64, i64::from(xact::database_oid()))
}

fn written() -> Result<Option<(i64, i64)>> {
    let mut row = None;
    sql::select_latest("SELECT system_identifier, database_oid::bigint FROM awa.instance", &[], |found| {
        row = found.i64(1).zip(found.i64(2));
        Ok(())
    })?;
    Ok(row)
}

/// Are the jobs ours? None: nothing was ever enqueued here.
pub fn owned() -> Result<Option<bool>> {
    Ok(written()?.map(|theirs| theirs == mine()))
}

/// Refuses a database that is a copy. No row: nothing was ever enqueued here.
pub fn check() -> Result<()> {
    match written()? {
        Some(theirs) if theirs != mine() => Err(Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the jobs of this database belong to another server or database",
        )
        .detail("It was restored or copied; running its jobs here could run them twice.")
        .hint("If this copy is to run them, call awa.adopt().")),
        _ => Ok(()),
    }
}

pub fn write_if_missing() -> Result<()> {
    if written()?.is_none() {
        insert()?;
    }
    Ok(())
}

fn insert() -> Result<()> {
    let (system, database) = mine();
    sql::execute(
        "INSERT INTO awa.instance (only_row, system_identifier, database_oid, since) VALUES (true, $1, $2::oid, $3) \
         ON CONFLICT (only_row) DO UPDATE SET system_identifier = EXCLUDED.system_identifier, database_oid = EXCLUDED.database_oid, \
             since = EXCLUDED.since",
        &[
            (pg_sys::INT8OID, Some(datum::i64(system))),
            (pg_sys::INT8OID, Some(datum::i64(database))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(xact::now()))),
        ],
    )?;
    Ok(())
}

/// True if the row named another server or database.
pub fn adopt() -> Result<bool> {
    let foreign = written()?.is_some_and(|theirs| theirs != mine());
    if foreign {
        insert()?;
    }
    Ok(foreign)
}
