//! Jobs that are due so late that they wait outside the ring: awa.deferred_jobs, an ordinary cold table.
//!
//! Tables written and read: awa.deferred_jobs. A row is the newest copy of its job; no evidence speaks of it. The caller is inside
//! `sql::as_owner`, and holds ready_entries of a live segment for writing before it changes a row: a rebuild then waits for it.

use pgrx::pg_sys;

use crate::error::Result;
use crate::pg::sql;
use crate::store::datum;
use crate::store::ready::NewEntry;

/// `lane` of the entry is as in the ring; its key is the time it is due.
pub fn insert(entry: &NewEntry) -> Result<()> {
    sql::execute(
        "INSERT INTO awa.deferred_jobs \
             (job_id, hop, lane, kind_id, attempt, max_attempts, run_at, look_at, enqueued_at, tags, metadata, errors, args) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $7, $8, $9, $10, $11, $12)",
        &[
            (pg_sys::INT8OID, Some(datum::i64(entry.job_id))),
            (pg_sys::INT4OID, Some(datum::i32(entry.hop))),
            (pg_sys::INT4OID, Some(datum::i32(entry.lane))),
            (pg_sys::INT4OID, Some(datum::i32(entry.kind_id))),
            (pg_sys::INT2OID, Some(datum::i16(entry.attempt))),
            (pg_sys::INT2OID, Some(datum::i16(entry.max_attempts))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(entry.key))),
            (pg_sys::TIMESTAMPTZOID, entry.enqueued_at.map(datum::i64)),
            (pg_sys::TEXTARRAYOID, entry.tags),
            (pg_sys::JSONBOID, entry.metadata),
            (pg_sys::JSONBOID, entry.errors),
            (pg_sys::JSONBOID, Some(entry.args)),
        ],
    )?;
    Ok(())
}

/// Columns in the order of `read`.
macro_rules! columns {
    () => {
        "job_id, hop, lane, kind_id, attempt, max_attempts, run_at, enqueued_at, tags, metadata, errors, args"
    };
}

fn read(row: &sql::SqlRow<'_>) -> Option<NewEntry> {
    Some(NewEntry {
        key: row.i64(7)?,
        job_id: row.i64(1)?,
        lane: row.i32(3)?,
        hop: row.i32(2)?,
        kind_id: row.i32(4)?,
        attempt: row.i16(5)?,
        max_attempts: row.i16(6)?,
        enqueued_at: row.i64(8),
        tags: row.copy_datum(9),
        metadata: row.copy_datum(10),
        errors: row.copy_datum(11),
        args: row.copy_datum(12)?,
    })
}

/// When the first row is to be looked at. By the index on look_at; takes no transaction id.
pub fn next_look() -> Result<Option<i64>> {
    let mut next = None;
    sql::select_latest("SELECT look_at FROM awa.deferred_jobs ORDER BY look_at LIMIT 1", &[], |row| {
        next = row.i64(1);
        Ok(())
    })?;
    Ok(next)
}

/// Takes out up to `limit` rows that are to be looked at before `until`, the earliest first. Rows that another transaction has in hand
/// are left to it.
pub fn take_due(until: i64, limit: usize) -> Result<Vec<NewEntry>> {
    let mut found = Vec::new();
    let text = concat!(
        "DELETE FROM awa.deferred_jobs WHERE job_id IN ( \
             SELECT job_id FROM awa.deferred_jobs WHERE look_at < $1 ORDER BY look_at LIMIT $2 FOR UPDATE SKIP LOCKED) \
         RETURNING ",
        columns!()
    );
    sql::select(
        text,
        &[(pg_sys::TIMESTAMPTZOID, Some(datum::i64(until))), (pg_sys::INT8OID, Some(datum::i64(limit as i64)))],
        false,
        |row| {
            found.extend(read(row));
            Ok(())
        },
    )?;
    Ok(found)
}

/// Waits for a transaction that has the row in hand.
pub fn take_one(job_id: i64) -> Result<Option<NewEntry>> {
    let mut found = None;
    let text = concat!("DELETE FROM awa.deferred_jobs WHERE job_id = $1 RETURNING ", columns!());
    sql::select(text, &[(pg_sys::INT8OID, Some(datum::i64(job_id)))], false, |row| {
        found = read(row);
        Ok(())
    })?;
    Ok(found)
}

/// Where a job belongs that waits here.
pub fn lane_of(job_id: i64) -> Result<Option<i32>> {
    let mut found = None;
    let text = "SELECT lane FROM awa.deferred_jobs WHERE job_id = $1";
    sql::select_latest(text, &[(pg_sys::INT8OID, Some(datum::i64(job_id)))], |row| {
        found = row.i32(1);
        Ok(())
    })?;
    Ok(found)
}

/// Puts a row back that could not be appended, to be looked at again at `look_at`.
pub fn set_aside(entry: &NewEntry, look_at: i64, problem: &str) -> Result<()> {
    insert(entry)?;
    sql::execute(
        "UPDATE awa.deferred_jobs SET look_at = $2, problem = $3 WHERE job_id = $1",
        &[
            (pg_sys::INT8OID, Some(datum::i64(entry.job_id))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(look_at))),
            (pg_sys::TEXTOID, Some(crate::pg::call::text_datum(problem))),
        ],
    )?;
    Ok(())
}

pub fn delete_of_queue(queue_id: i32) -> Result<u64> {
    sql::execute("DELETE FROM awa.deferred_jobs WHERE lane >> 3 = $1", &[(pg_sys::INT4OID, Some(datum::i32(queue_id)))])
}

/// Number of rows of each queue.
pub fn counts() -> Result<Vec<(i32, i64)>> {
    let mut found = Vec::new();
    sql::select_latest("SELECT lane >> 3, pg_catalog.count(*) FROM awa.deferred_jobs GROUP BY 1", &[], |row| {
        found.extend(row.i32(1).zip(row.i64(2)));
        Ok(())
    })?;
    Ok(found)
}

/// One job, or all.
pub fn each(job_id: Option<i64>, mut body: impl FnMut(&NewEntry) -> Result<()>) -> Result<()> {
    let mut show = |row: &sql::SqlRow<'_>| match read(row) {
        Some(entry) => body(&entry),
        None => Ok(()),
    };
    match job_id {
        Some(job_id) => {
            let text = concat!("SELECT ", columns!(), " FROM awa.deferred_jobs WHERE job_id = $1");
            sql::select_latest(text, &[(pg_sys::INT8OID, Some(datum::i64(job_id)))], &mut show)?;
        }
        None => {
            let text = concat!("SELECT ", columns!(), " FROM awa.deferred_jobs ORDER BY run_at, job_id");
            sql::select_latest(text, &[], &mut show)?;
        }
    }
    Ok(())
}
