//! Tables written: awa.queue_definitions. Tables read: the same. The caller is inside `sql::as_owner`.

use awa_protocol::queue::Settings;
use pgrx::pg_sys;

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::pg::call::bytes_datum;
use crate::pg::{rel, sql, xact};
use crate::store::datum;

pub struct Definition {
    pub queue_id: i32,
    pub name: Vec<u8>,
    pub settings: Settings,
}

/// Durations are stored as intervals for people and handled as microseconds.
macro_rules! columns {
    () => {
        "queue_id, name, paused, max_attempts, \
         (EXTRACT(epoch FROM deadline) * 1000000)::bigint, (EXTRACT(epoch FROM heartbeat_timeout) * 1000000)::bigint, \
         (EXTRACT(epoch FROM backoff) * 1000000)::bigint, (EXTRACT(epoch FROM backoff_max) * 1000000)::bigint, \
         (EXTRACT(epoch FROM priority_ageing) * 1000000)::bigint, \
         (EXTRACT(epoch FROM completed_retention) * 1000000)::bigint, (EXTRACT(epoch FROM failed_retention) * 1000000)::bigint, \
         (EXTRACT(epoch FROM cancelled_retention) * 1000000)::bigint, dead_letters, \
         (EXTRACT(epoch FROM dead_letter_retention) * 1000000)::bigint"
    };
}

fn read(row: &sql::SqlRow<'_>) -> Option<Definition> {
    Some(Definition {
        queue_id: row.i32(1)?,
        name: row.bytes(2)?,
        settings: Settings {
            paused: row.bool(3)?,
            max_attempts: row.i32(4)?,
            deadline: row.i64(5).unwrap_or(0),
            heartbeat_timeout: row.i64(6).unwrap_or(0),
            backoff: row.i64(7)?,
            backoff_max: row.i64(8)?,
            priority_ageing: row.i64(9).unwrap_or(0),
            completed_retention: row.i64(10).unwrap_or(0),
            failed_retention: row.i64(11).unwrap_or(0),
            cancelled_retention: row.i64(12).unwrap_or(0),
            dead_letters: row.bool(13)?,
            dead_letter_retention: row.i64(14).unwrap_or(0),
        },
    })
}

pub fn table() -> Result<pg_sys::Oid> {
    rel::relation_oid("awa", "queue_definitions").ok_or_else(|| {
        Error::new(Code::ERRCODE_UNDEFINED_TABLE, "relation \"awa.queue_definitions\" does not exist")
            .hint("Run CREATE EXTENSION awa_queue in this database.")
    })
}

pub fn all_live() -> Result<Vec<Definition>> {
    let mut found = Vec::new();
    let text = concat!("SELECT ", columns!(), " FROM awa.queue_definitions WHERE dropped_at IS NULL ORDER BY queue_id");
    sql::select_latest(text, &[], |row| {
        found.extend(read(row));
        Ok(())
    })?;
    Ok(found)
}

/// Queues that were dropped: only their rows count as closed without evidence.
pub fn dropped_ids() -> Result<Vec<i32>> {
    let mut found = Vec::new();
    sql::select_latest("SELECT queue_id FROM awa.queue_definitions WHERE dropped_at IS NOT NULL", &[], |row| {
        found.extend(row.i32(1));
        Ok(())
    })?;
    Ok(found)
}

/// Locks the row against other changes of the same queue.
pub fn lock(name: &[u8]) -> Result<Option<Definition>> {
    let mut found = None;
    let text =
        concat!("SELECT ", columns!(), " FROM awa.queue_definitions WHERE name = $1 AND dropped_at IS NULL FOR NO KEY UPDATE");
    sql::select(text, &[(pg_sys::TEXTOID, Some(bytes_datum(name)))], false, |row| {
        found = read(row);
        Ok(())
    })?;
    Ok(found)
}

pub fn next_id() -> Result<i32> {
    let mut id = 0;
    sql::select("SELECT pg_catalog.nextval('awa.queue_ids')::integer", &[], false, |row| {
        id = row.i32(1).unwrap_or(0);
        Ok(())
    })?;
    Ok(id)
}

fn duration_or_null(value: i64) -> Option<pg_sys::Datum> {
    (value > 0).then(|| datum::i64(value))
}

pub fn insert(definition: &Definition) -> Result<()> {
    let s = &definition.settings;
    sql::execute(
        "INSERT INTO awa.queue_definitions \
             (queue_id, name, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing, \
              completed_retention, failed_retention, cancelled_retention, dead_letters, dead_letter_retention, created_at) \
         VALUES ($1, $2, false, $3, $4 * interval '1 microsecond', $5 * interval '1 microsecond', \
                 $6 * interval '1 microsecond', $7 * interval '1 microsecond', $8 * interval '1 microsecond', \
                 $9 * interval '1 microsecond', $10 * interval '1 microsecond', $11 * interval '1 microsecond', $12, \
                 $13 * interval '1 microsecond', $14)",
        &[
            (pg_sys::INT4OID, Some(datum::i32(definition.queue_id))),
            (pg_sys::TEXTOID, Some(bytes_datum(&definition.name))),
            (pg_sys::INT4OID, Some(datum::i32(s.max_attempts))),
            (pg_sys::INT8OID, duration_or_null(s.deadline)),
            (pg_sys::INT8OID, duration_or_null(s.heartbeat_timeout)),
            (pg_sys::INT8OID, Some(datum::i64(s.backoff))),
            (pg_sys::INT8OID, Some(datum::i64(s.backoff_max))),
            (pg_sys::INT8OID, duration_or_null(s.priority_ageing)),
            (pg_sys::INT8OID, duration_or_null(s.completed_retention)),
            (pg_sys::INT8OID, duration_or_null(s.failed_retention)),
            (pg_sys::INT8OID, duration_or_null(s.cancelled_retention)),
            (pg_sys::BOOLOID, Some(pg_sys::Datum::from(s.dead_letters))),
            (pg_sys::INT8OID, duration_or_null(s.dead_letter_retention)),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(xact::now()))),
        ],
    )?;
    Ok(())
}

pub fn update(definition: &Definition) -> Result<()> {
    let s = &definition.settings;
    sql::execute(
        "UPDATE awa.queue_definitions \
            SET paused = $2, max_attempts = $3, deadline = $4 * interval '1 microsecond', \
                heartbeat_timeout = $5 * interval '1 microsecond', backoff = $6 * interval '1 microsecond', \
                backoff_max = $7 * interval '1 microsecond', priority_ageing = $8 * interval '1 microsecond', \
                completed_retention = $9 * interval '1 microsecond', failed_retention = $10 * interval '1 microsecond', \
                cancelled_retention = $11 * interval '1 microsecond', dead_letters = $12, \
                dead_letter_retention = $13 * interval '1 microsecond' \
          WHERE queue_id = $1",
        &[
            (pg_sys::INT4OID, Some(datum::i32(definition.queue_id))),
            (pg_sys::BOOLOID, Some(pg_sys::Datum::from(s.paused))),
            (pg_sys::INT4OID, Some(datum::i32(s.max_attempts))),
            (pg_sys::INT8OID, duration_or_null(s.deadline)),
            (pg_sys::INT8OID, duration_or_null(s.heartbeat_timeout)),
            (pg_sys::INT8OID, Some(datum::i64(s.backoff))),
            (pg_sys::INT8OID, Some(datum::i64(s.backoff_max))),
            (pg_sys::INT8OID, duration_or_null(s.priority_ageing)),
            (pg_sys::INT8OID, duration_or_null(s.completed_retention)),
            (pg_sys::INT8OID, duration_or_null(s.failed_retention)),
            (pg_sys::INT8OID, duration_or_null(s.cancelled_retention)),
            (pg_sys::BOOLOID, Some(pg_sys::Datum::from(s.dead_letters))),
            (pg_sys::INT8OID, duration_or_null(s.dead_letter_retention)),
        ],
    )?;
    Ok(())
}

pub fn mark_dropped(queue_id: i32) -> Result<()> {
    sql::execute(
        "UPDATE awa.queue_definitions SET dropped_at = $2 WHERE queue_id = $1",
        &[(pg_sys::INT4OID, Some(datum::i32(queue_id))), (pg_sys::TIMESTAMPTZOID, Some(datum::i64(xact::now())))],
    )?;
    Ok(())
}
