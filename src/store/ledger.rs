//! Tables written: awa.ring_rotations. Tables read: the same. Cold: a few rows a rotation.

use awa_protocol::ring::{Event, LedgerFault, LedgerRow, Ring};
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::pg::call::text_datum;
use crate::pg::sql;
use crate::store::datum;

/// Generations that were pruned are left out, however many there were. With the latest snapshot: memory has no older one.
pub fn read() -> Result<Ring> {
    let mut rows = Vec::new();
    let text = "SELECT generation, slot, event, at FROM awa.ring_rotations AS r \
         WHERE NOT EXISTS (SELECT FROM awa.ring_rotations AS p WHERE p.generation = r.generation AND p.event = 'pruned') \
            OR generation = (SELECT pg_catalog.max(generation) FROM awa.ring_rotations)";
    sql::select_latest(text, &[], |row| {
        if let (Some(generation), Some(slot), Some(event), Some(at)) = (row.i64(1), row.i32(2), row.text(3), row.i64(4))
            && let Some(event) = Event::from_name(&event)
        {
            rows.push(LedgerRow { generation, slot, event, at });
        }
        Ok(())
    })?;
    Ring::fold(&rows).map_err(|fault| {
        let detail = match fault {
            LedgerFault::TooManySegments => "More segments are live than the library can hold.".to_owned(),
            LedgerFault::SlotUsedTwice { slot } => format!("Slot {slot} was opened again before it was pruned."),
        };
        Error::new(Code::ERRCODE_DATA_CORRUPTED, "the ledger of the ring contradicts itself")
            .detail(detail)
            .hint("Save a copy of schema awa_segments before changing anything.")
    })
}

pub fn append(generation: i64, slot: i32, event: &str, at: i64) -> Result<()> {
    sql::execute(
        "INSERT INTO awa.ring_rotations (generation, slot, event, at) VALUES ($1, $2, $3, $4)",
        &[
            (pg_sys::INT8OID, Some(datum::i64(generation))),
            (pg_sys::INT4OID, Some(datum::i32(slot))),
            (pg_sys::TEXTOID, Some(text_datum(event))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(at))),
        ],
    )?;
    Ok(())
}

/// Rows of generations that were pruned long ago are of no use, and every reader passes them. Seldom, and many at a time, so that the
/// ledger has no dead rows for most of its life. A thousand generations stay for people to look at.
pub fn trim() -> Result<()> {
    sql::execute(
        "DELETE FROM awa.ring_rotations AS r \
          WHERE (SELECT pg_catalog.count(*) FROM awa.ring_rotations) > 6000 \
            AND r.generation < (SELECT pg_catalog.max(generation) - 1000 FROM awa.ring_rotations) \
            AND EXISTS (SELECT FROM awa.ring_rotations AS p WHERE p.generation = r.generation AND p.event = 'pruned')",
        &[],
    )?;
    Ok(())
}

pub fn started_at(generation: i64) -> Result<Option<i64>> {
    let at = sql::select_one(
        "SELECT at FROM awa.ring_rotations WHERE generation = $1 AND event = 'prune_started'",
        &[(pg_sys::INT8OID, Some(datum::i64(generation)))],
        false,
    )?;
    Ok(at.map(|at| at.value() as i64))
}
