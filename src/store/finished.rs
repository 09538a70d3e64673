//! Finished jobs outside the ring: history that outlives its segment, and dead letters. Two tables of nearly the same shape.
//!
//! Tables written: awa.retained_jobs, awa.dlq_entries. Tables read: these, awa.queue_definitions, awa.job_kinds and, when a segment is
//! about to be pruned, its four tables. Cold and ordinary: rows are deleted, autovacuum does its job. A row lock decides between two
//! callers who want the same job. The caller is inside `sql::as_owner`.

use std::collections::BTreeMap;

use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::Counts;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::notes;
use crate::pg::call::{bytes_datum, i64_array_datum};
use crate::pg::{rel, sql};
use crate::store::datum;

/// Where a finished job lies that has left the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shelf {
    Retained,
    DeadLetters,
}

impl Shelf {
    pub const ALL: [Self; 2] = [Self::Retained, Self::DeadLetters];

    pub fn table(self) -> Result<pg_sys::Oid> {
        let name = match self {
            Self::Retained => "retained_jobs",
            Self::DeadLetters => "dlq_entries",
        };
        rel::relation_oid("awa", name).ok_or_else(|| {
            Error::new(Code::ERRCODE_UNDEFINED_TABLE, format!("relation \"awa.{name}\" does not exist"))
                .hint("Run CREATE EXTENSION awa_queue in this database.")
        })
    }

    fn choose(self, retained: &'static str, dead_letters: &'static str) -> &'static str {
        match self {
            Self::Retained => retained,
            Self::DeadLetters => dead_letters,
        }
    }
}

/// What `per_shelf!` fills in: the table, its state, the column with the time of the end.
macro_rules! per_shelf {
    ($shelf:expr, $text:ident) => {
        $shelf.choose(
            $text!("awa.retained_jobs", "t.state", "finished_at", "t.generation"),
            $text!("awa.dlq_entries", "'l'::\"char\"", "failed_at", "NULL::bigint"),
        )
    };
}

/// A job taken from its shelf, as its next copy needs it.
pub struct Finished {
    pub job_id: i64,
    pub queue_id: i32,
    pub kind_id: i32,
    pub outcome: Outcome,
    /// 0 (most urgent) to 3.
    pub priority: u8,
    pub max_attempts: i16,
    pub hop: i32,
    pub enqueued_at: Option<i64>,
    pub tags: Option<Datum>,
    pub metadata: Option<Datum>,
    pub errors: Option<Datum>,
    pub args: Option<Datum>,
}

fn finished(row: &sql::SqlRow<'_>) -> Option<Finished> {
    Some(Finished {
        job_id: row.i64(1)?,
        queue_id: row.i32(2)?,
        kind_id: row.i32(3)?,
        outcome: Outcome::from_letter(row.datum(4)?.value() as u8)?,
        priority: u8::try_from(row.i16(5)?.checked_sub(1)?).ok()?,
        max_attempts: row.i16(6)?,
        hop: row.i32(7)?,
        enqueued_at: row.i64(8),
        tags: row.copy_datum(9),
        metadata: row.copy_datum(10),
        errors: row.copy_datum(11),
        args: row.copy_datum(12),
    })
}

macro_rules! returning {
    ($state:literal) => {
        concat!(
            " RETURNING t.job_id, t.queue_id, t.kind_id, ",
            $state,
            ", t.priority, t.max_attempts, t.hop, t.enqueued_at, t.tags, t.metadata, t.errors, t.args"
        )
    };
}

/// Takes a job from its shelf: whoever deletes the row has it. A completed one only if `completed_too`. Waits for a transaction that is
/// taking the same job. Jobs of a dropped queue are nobody's.
pub fn take(shelf: Shelf, job_id: i64, completed_too: bool) -> Result<Option<Finished>> {
    macro_rules! text {
        ($table:literal, $state:literal, $ended:literal, $generation:literal) => {
            concat!(
                "DELETE FROM ",
                $table,
                " AS t WHERE t.job_id = $1 AND ($2 OR ",
                $state,
                " <> 'd') AND EXISTS (SELECT FROM awa.queue_definitions AS q WHERE q.queue_id = t.queue_id AND q.dropped_at IS NULL)",
                returning!($state)
            )
        };
    }
    let mut found = None;
    let args = [(pg_sys::INT8OID, Some(datum::i64(job_id))), (pg_sys::BOOLOID, Some(Datum::from(completed_too)))];
    sql::select(per_shelf!(shelf, text), &args, false, |row| {
        found = finished(row);
        Ok(())
    })?;
    Ok(found)
}

/// What lies on the shelf for this job now, whatever the snapshot of the caller.
pub fn standing(shelf: Shelf, job_id: i64) -> Result<Option<Outcome>> {
    macro_rules! text {
        ($table:literal, $state:literal, $ended:literal, $generation:literal) => {
            concat!(
                "SELECT ",
                $state,
                " FROM ",
                $table,
                " AS t JOIN awa.queue_definitions AS q ON q.queue_id = t.queue_id AND q.dropped_at IS NULL WHERE t.job_id = $1"
            )
        };
    }
    let mut found = None;
    sql::select_latest(per_shelf!(shelf, text), &[(pg_sys::INT8OID, Some(datum::i64(job_id)))], |row| {
        found = row.datum(1).and_then(|letter| Outcome::from_letter(letter.value() as u8));
        Ok(())
    })?;
    Ok(found)
}

/// Which dead letters an operator means.
#[derive(Clone, Default)]
pub struct Filter {
    pub queue: Option<Vec<u8>>,
    pub kind: Option<Vec<u8>>,
    pub failed_before: Option<i64>,
}

/// Takes at most `limit` dead letters, the oldest first, and gives each to `each`.
/// Passes by those that another transaction is taking.
pub fn take_dead_letters(filter: &Filter, limit: usize, mut each: impl FnMut(Finished)) -> Result<()> {
    let args = [
        (pg_sys::TEXTOID, filter.queue.as_deref().map(bytes_datum)),
        (pg_sys::TEXTOID, filter.kind.as_deref().map(bytes_datum)),
        (pg_sys::TIMESTAMPTZOID, filter.failed_before.map(datum::i64)),
        (pg_sys::INT8OID, Some(datum::i64(limit as i64))),
    ];
    let text = concat!(
        "DELETE FROM awa.dlq_entries AS t \
          USING (SELECT d.job_id FROM awa.dlq_entries AS d \
                  WHERE d.queue_id IN (SELECT q.queue_id FROM awa.queue_definitions AS q \
                                        WHERE q.dropped_at IS NULL AND ($1 IS NULL OR q.name = $1)) \
                    AND ($2 IS NULL OR d.kind_id IN (SELECT k.kind_id FROM awa.job_kinds AS k WHERE k.name = $2)) \
                    AND ($3 IS NULL OR d.failed_at < $3) \
                  ORDER BY d.failed_at, d.job_id LIMIT $4 FOR UPDATE OF d SKIP LOCKED) AS chosen \
          WHERE t.job_id = chosen.job_id",
        returning!("'l'::\"char\"")
    );
    sql::select(text, &args, false, |row| {
        if let Some(found) = finished(row) {
            each(found);
        }
        Ok(())
    })?;
    Ok(())
}

/// The ready row of a job that has failed for good, as its dead letter keeps it.
pub struct DeadLetter {
    pub job_id: i64,
    pub queue_id: i32,
    pub kind_id: i32,
    pub priority: i16,
    pub attempt: i16,
    pub max_attempts: i16,
    pub hop: i32,
    pub run_at: i64,
    pub enqueued_at: i64,
    pub claimed_at: i64,
    pub failed_at: i64,
    pub tags: Option<Datum>,
    pub metadata: Option<Datum>,
    pub errors: Datum,
    pub args: Option<Datum>,
}

pub fn add_dead_letter(new: &DeadLetter) -> Result<()> {
    sql::execute(
        "INSERT INTO awa.dlq_entries (job_id, queue_id, kind_id, priority, attempt, max_attempts, hop, run_at, enqueued_at, claimed_at, \
                                      failed_at, tags, metadata, errors, args) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
        &[
            (pg_sys::INT8OID, Some(datum::i64(new.job_id))),
            (pg_sys::INT4OID, Some(datum::i32(new.queue_id))),
            (pg_sys::INT4OID, Some(datum::i32(new.kind_id))),
            (pg_sys::INT2OID, Some(datum::i16(new.priority))),
            (pg_sys::INT2OID, Some(datum::i16(new.attempt))),
            (pg_sys::INT2OID, Some(datum::i16(new.max_attempts))),
            (pg_sys::INT4OID, Some(datum::i32(new.hop))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(new.run_at))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(new.enqueued_at))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(new.claimed_at))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(new.failed_at))),
            (pg_sys::TEXTARRAYOID, new.tags),
            (pg_sys::JSONBOID, new.metadata),
            (pg_sys::JSONBOID, Some(new.errors)),
            (pg_sys::JSONBOID, new.args),
        ],
    )?;
    Ok(())
}

/// Finished jobs by queue.
pub type Tallies = BTreeMap<i32, Counts>;

/// A row of (queue_id, state, number).
fn tally(into: &mut Tallies, row: &sql::SqlRow<'_>) {
    let outcome = row.datum(2).and_then(|letter| Outcome::from_letter(letter.value() as u8));
    let (Some(queue_id), Some(outcome), Some(jobs)) = (row.i32(1), outcome, row.i64(3)) else { return };
    notes::count_finished(into.entry(queue_id).or_default(), outcome, jobs);
}

/// Rows of both shelves, with a snapshot taken now. Uses the indexes that begin with queue_id.
pub fn counts() -> Result<Tallies> {
    let mut found = Tallies::new();
    let text = "SELECT queue_id, state, pg_catalog.count(*) FROM awa.retained_jobs GROUP BY queue_id, state \
                UNION ALL \
                SELECT queue_id, 'l', pg_catalog.count(*) FROM awa.dlq_entries GROUP BY queue_id";
    sql::select_latest(text, &[], |row| {
        tally(&mut found, row);
        Ok(())
    })?;
    Ok(found)
}

/// Each job of a shelf, by identifier.
pub fn each_job(shelf: Shelf, mut each: impl FnMut(i64, i32, i32)) -> Result<()> {
    macro_rules! text {
        ($table:literal, $state:literal, $ended:literal, $generation:literal) => {
            concat!("SELECT t.job_id, t.queue_id, t.hop FROM ", $table, " AS t WHERE t.job_id > $1 ORDER BY t.job_id LIMIT $2")
        };
    }
    sql::in_latest_snapshot(|| {
        let mut last = i64::MIN;
        loop {
            let args = [(pg_sys::INT8OID, Some(datum::i64(last))), (pg_sys::INT8OID, Some(datum::i64(PAGE)))];
            let read = sql::select(per_shelf!(shelf, text), &args, true, |row| {
                last = row.i64(1).unwrap_or(i64::MAX);
                each(last, row.i32(2).unwrap_or(0), row.i32(3).unwrap_or(0));
                Ok(())
            })?;
            if read < PAGE as u64 {
                return Ok(());
            }
        }
    })
}

/// Deletes at most `limit` jobs whose time is over, or whose queue is gone. Looks only at pairs of queue and state that are there (an
/// index probe each), in any order, so that no queue is always first; passes by jobs that another transaction is taking. Takes no
/// transaction id when there is nothing to do.
pub fn expire(shelf: Shelf, now: i64, limit: usize) -> Result<Tallies> {
    let text = match shelf {
        Shelf::Retained => {
            "WITH RECURSIVE pairs AS ( \
                 (SELECT queue_id, state FROM awa.retained_jobs ORDER BY queue_id, state LIMIT 1) \
                 UNION ALL \
                 SELECT n.queue_id, n.state FROM pairs AS p CROSS JOIN LATERAL \
                     (SELECT r.queue_id, r.state FROM awa.retained_jobs AS r \
                       WHERE (r.queue_id, r.state) > (p.queue_id, p.state) ORDER BY r.queue_id, r.state LIMIT 1) AS n \
             ), until AS ( \
                 SELECT p.queue_id, p.state, \
                        CASE WHEN q.queue_id IS NULL THEN 'infinity' \
                             ELSE $1 - COALESCE(CASE p.state WHEN 'd' THEN q.completed_retention WHEN 'f' THEN q.failed_retention \
                                                             ELSE q.cancelled_retention END, '0') END AS ended_before \
                   FROM pairs AS p LEFT JOIN awa.queue_definitions AS q ON q.queue_id = p.queue_id AND q.dropped_at IS NULL \
                  ORDER BY pg_catalog.random() \
             ), expired AS MATERIALIZED ( \
                 SELECT e.job_id FROM until AS u CROSS JOIN LATERAL \
                     (SELECT r.job_id FROM awa.retained_jobs AS r \
                       WHERE r.queue_id = u.queue_id AND r.state = u.state AND r.finished_at <= u.ended_before \
                       ORDER BY r.finished_at LIMIT $2 FOR UPDATE SKIP LOCKED) AS e \
                  LIMIT $2 \
             ), gone AS ( \
                 DELETE FROM awa.retained_jobs AS r USING expired AS e WHERE r.job_id = e.job_id RETURNING r.queue_id, r.state \
             ) SELECT queue_id, state, pg_catalog.count(*) FROM gone GROUP BY queue_id, state"
        }
        Shelf::DeadLetters => {
            "WITH RECURSIVE queues AS ( \
                 (SELECT queue_id FROM awa.dlq_entries ORDER BY queue_id LIMIT 1) \
                 UNION ALL \
                 SELECT n.queue_id FROM queues AS p CROSS JOIN LATERAL \
                     (SELECT r.queue_id FROM awa.dlq_entries AS r WHERE r.queue_id > p.queue_id ORDER BY r.queue_id LIMIT 1) AS n \
             ), until AS ( \
                 SELECT p.queue_id, CASE WHEN q.queue_id IS NULL THEN 'infinity' ELSE $1 - q.dead_letter_retention END AS ended_before \
                   FROM queues AS p LEFT JOIN awa.queue_definitions AS q ON q.queue_id = p.queue_id AND q.dropped_at IS NULL \
                  ORDER BY pg_catalog.random() \
             ), expired AS MATERIALIZED ( \
                 SELECT e.job_id FROM until AS u CROSS JOIN LATERAL \
                     (SELECT r.job_id FROM awa.dlq_entries AS r \
                       WHERE r.queue_id = u.queue_id AND r.failed_at <= u.ended_before \
                       ORDER BY r.failed_at LIMIT $2 FOR UPDATE SKIP LOCKED) AS e \
                  LIMIT $2 \
             ), gone AS ( \
                 DELETE FROM awa.dlq_entries AS r USING expired AS e WHERE r.job_id = e.job_id RETURNING r.queue_id \
             ) SELECT queue_id, 'l'::\"char\", pg_catalog.count(*) FROM gone GROUP BY queue_id"
        }
    };
    let mut gone = Tallies::new();
    let args = [(pg_sys::TIMESTAMPTZOID, Some(datum::i64(now))), (pg_sys::INT8OID, Some(datum::i64(limit as i64)))];
    sql::select(text, &args, false, |row| {
        tally(&mut gone, row);
        Ok(())
    })?;
    Ok(gone)
}

/// Copies the finished jobs of a drained segment whose retention is not over: those that ended by a closure, or the completed ones.
/// A copy that was tried again or deleted is not kept. `{slot}` and `{generation}` are numbers.
const KEEP: &str = "
WITH kept AS (
    INSERT INTO awa.retained_jobs
        (job_id, queue_id, kind_id, state, priority, attempt, max_attempts, hop, generation, run_at, enqueued_at, claimed_at,
         finished_at, tags, metadata, errors, args)
    SELECT r.job_id, q.queue_id, r.kind_id, e.state, ((r.lane & 7) >> 1) + 1,
           r.attempt + CASE WHEN c.job_id IS NULL THEN 0 ELSE 1 END, r.max_attempts, r.hop, {generation},
           COALESCE(NULLIF(r.key, '-infinity'), r.enqueued_at), -- a running attempt that was carried has no key of its own
          
           COALESCE(r.enqueued_at, r.key), c.claimed_at, e.ended_at, r.tags, r.metadata, COALESCE(e.errors, r.errors), r.args
      FROM ({ended}) AS e
      JOIN awa_segments.ready_entries_{slot} AS r ON r.job_id = e.job_id AND r.hop = e.hop
      JOIN awa.queue_definitions AS q ON q.queue_id = r.lane >> 3 AND q.dropped_at IS NULL
      LEFT JOIN (SELECT u.job_id, COALESCE(u.hop, 0) AS hop, pg_catalog.max(l.claimed_at) AS claimed_at
                   FROM awa_segments.lease_claims_{slot} AS l
                  CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(l.job_ids), pg_catalog.unnest(l.hops)) AS u(job_id, hop)
                  GROUP BY 1, 2) AS c ON c.job_id = e.job_id AND c.hop = e.hop
     WHERE e.ended_at > $1 - CASE e.state WHEN 'd' THEN q.completed_retention WHEN 'f' THEN q.failed_retention
                                          ELSE q.cancelled_retention END
       AND NOT EXISTS (SELECT FROM awa_segments.lease_claim_closures_{slot} AS s
                        WHERE s.job_id = e.job_id AND s.hop = e.hop AND s.outcome IN ('v', 'x'))
        ON CONFLICT (job_id) DO NOTHING
    RETURNING queue_id, state
) SELECT queue_id, state, pg_catalog.count(*) FROM kept GROUP BY queue_id, state";

const CLOSED: &str = "SELECT job_id, hop, outcome AS state, closed_at AS ended_at, errors
              FROM awa_segments.lease_claim_closures_{slot} WHERE outcome IN ('f', 'c')";

const COMPLETED: &str =
    "SELECT u.job_id, COALESCE(u.hop, 0) AS hop, 'd'::\"char\" AS state, d.done_at AS ended_at, NULL::jsonb AS errors
              FROM awa_segments.done_entries_{slot} AS d
             CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(d.job_ids), pg_catalog.unnest(d.hops)) AS u(job_id, hop)";

pub fn keep(generation: i64, slot: i32, completed: bool, now: i64) -> Result<Tallies> {
    let ended = if completed { COMPLETED } else { CLOSED };
    let text =
        KEEP.replace("{ended}", ended).replace("{slot}", &slot.to_string()).replace("{generation}", &generation.to_string());
    let mut kept = Tallies::new();
    sql::select_made_up(&text, &[(pg_sys::TIMESTAMPTZOID, Some(datum::i64(now)))], |row| {
        tally(&mut kept, row);
        Ok(())
    })?;
    Ok(kept)
}

/// Columns of awa.job_row.
macro_rules! job_row {
    ($table:literal, $state:literal, $ended:literal, $where:literal) => {
        concat!(
            "SELECT t.job_id, q.name, k.name, CASE ",
            $state,
            " WHEN 'd' THEN 'completed' WHEN 'f' THEN 'failed' WHEN 'c' THEN 'cancelled' ELSE 'dead_lettered' END, \
                    t.priority::integer, t.attempt::integer, t.max_attempts::integer, t.run_at, t.enqueued_at, t.claimed_at, \
                    NULL::timestamptz, NULL::timestamptz, t.",
            $ended,
            ", t.tags, t.metadata, t.errors, t.args \
               FROM ",
            $table,
            " AS t JOIN awa.queue_definitions AS q ON q.queue_id = t.queue_id AND q.dropped_at IS NULL \
               LEFT JOIN awa.job_kinds AS k ON k.kind_id = t.kind_id \
              WHERE ",
            $where
        )
    };
}

pub const JOB_ROW_COLUMNS: usize = 17;
pub type JobRow = [Option<Datum>; JOB_ROW_COLUMNS];

fn job_row_of(row: &sql::SqlRow<'_>) -> JobRow {
    std::array::from_fn(|index| row.datum(index as i32 + 1))
}

/// One job, wherever it lies.
pub fn show(job_id: i64, mut each: impl FnMut(&JobRow) -> Result<()>) -> Result<u64> {
    macro_rules! text {
        ($table:literal, $state:literal, $ended:literal, $generation:literal) => {
            job_row!($table, $state, $ended, "t.job_id = $1")
        };
    }
    let mut shown = 0;
    for shelf in Shelf::ALL {
        let args = [(pg_sys::INT8OID, Some(datum::i64(job_id)))];
        shown += sql::select_latest(per_shelf!(shelf, text), &args, |row| each(&job_row_of(row)))?;
    }
    Ok(shown)
}

/// Rows read at a time: the server keeps a result in memory.
const PAGE: i64 = 1000;

/// All retained jobs but those of the segments that the caller has read.
pub fn show_retained(read: &[i64], mut each: impl FnMut(&JobRow) -> Result<()>) -> Result<()> {
    const TEXT: &str = job_row!(
        "awa.retained_jobs",
        "t.state",
        "finished_at",
        "t.job_id > $1 AND t.generation <> ALL ($2) ORDER BY t.job_id LIMIT $3"
    );
    sql::in_latest_snapshot(|| {
        let mut last = i64::MIN;
        loop {
            let args = [
                (pg_sys::INT8OID, Some(datum::i64(last))),
                (pg_sys::INT8ARRAYOID, Some(i64_array_datum(read))),
                (pg_sys::INT8OID, Some(datum::i64(PAGE))),
            ];
            let shown = sql::select(TEXT, &args, true, |row| {
                last = row.i64(1).unwrap_or(i64::MAX);
                each(&job_row_of(row))
            })?;
            if shown < PAGE as u64 {
                return Ok(());
            }
        }
    })
}
