//! Ready entries: one row for each copy of a job.
//!
//! Tables written and read: awa_segments.ready_entries_<slot> and its index (lane, key). The caller holds RowExclusive on the table.
//! The payload is the last column and is moved as an opaque datum.

use pgrx::pg_sys::Datum;

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::SegmentInfo;
use crate::pg::append::Append;
use crate::pg::rel::{Index, Lock, Rel};
use crate::pg::scan::{RawRow, Tid};
use crate::store::datum;

pub const KEY: usize = 1;
pub const JOB_ID: usize = 2;
pub const LANE: usize = 3;
pub const HOP: usize = 4;
pub const KIND: usize = 5;
pub const ATTEMPT: usize = 6;
pub const MAX_ATTEMPTS: usize = 7;
pub const ENQUEUED_AT: usize = 8;
pub const TAGS: usize = 9;
pub const METADATA: usize = 10;
pub const ERRORS: usize = 11;
pub const ARGS: usize = 12;
pub const COLUMNS: usize = 12;

#[derive(Clone, Copy)]
pub struct NewEntry {
    pub key: i64,
    pub job_id: i64,
    pub lane: i32,
    pub hop: i32,
    pub kind_id: i32,
    pub attempt: i16,
    pub max_attempts: i16,
    pub enqueued_at: Option<i64>,
    pub tags: Option<Datum>,
    pub metadata: Option<Datum>,
    pub errors: Option<Datum>,
    pub args: Datum,
}

impl NewEntry {
    pub fn columns(&self) -> [Option<Datum>; COLUMNS] {
        [
            Some(datum::i64(self.key)),
            Some(datum::i64(self.job_id)),
            Some(datum::i32(self.lane)),
            Some(datum::i32(self.hop)),
            Some(datum::i32(self.kind_id)),
            Some(datum::i16(self.attempt)),
            Some(datum::i16(self.max_attempts)),
            self.enqueued_at.map(datum::i64),
            self.tags,
            self.metadata,
            self.errors,
            Some(self.args),
        ]
    }
}

/// Opens the ready entries of a segment for writing. The lock is the first one taken on the segment and stays to the end of the
/// transaction: it alone proves to a prune that a writer is there.
pub fn open_for_write(segment: &SegmentInfo) -> Result<Rel> {
    let rel = Rel::open(segment.ready, Lock::RowExclusive)?;
    check_for_write(&rel, segment)?;
    Ok(rel)
}

pub fn check_for_write(rel: &Rel, segment: &SegmentInfo) -> Result<()> {
    rel.check_native()?;
    if rel.file_number() != segment.ready_file {
        return Err(Error::new(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("relation \"{}\" was rewritten while the queue was in use", rel.name()),
        )
        .detail("VACUUM FULL, CLUSTER, TRUNCATE and some forms of ALTER TABLE move its rows; the working state speaks of the old places.")
        .hint("Call awa.rebuild()."));
    }
    Ok(())
}

pub fn open_index(rel: &Rel, segment: &SegmentInfo) -> Result<Index> {
    Index::open(rel, segment.ready_index).map_err(|error| error.hint("If the index was built anew, call awa.rebuild()."))
}

/// Gives the places of the rows.
pub fn append(writer: &mut Append<'_>, entries: &[[Option<Datum>; COLUMNS]]) -> Result<Vec<Tid>> {
    writer.append(entries, &mut |_, _| true)
}

/// The fixed columns of a row.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub key: i64,
    pub job_id: i64,
    pub lane: i32,
    pub hop: i32,
    pub kind_id: i32,
    pub attempt: i16,
    pub max_attempts: i16,
    pub tid: u64,
}

/// The columns are declared NOT NULL.
pub fn head(row: &RawRow<'_>) -> Head {
    row.read_to(MAX_ATTEMPTS);
    Head {
        key: row.i64(KEY).unwrap_or(0),
        job_id: row.i64(JOB_ID).unwrap_or(0),
        lane: row.i32(LANE).unwrap_or(0),
        hop: row.i32(HOP).unwrap_or(0),
        kind_id: row.i32(KIND).unwrap_or(0),
        attempt: row.i16(ATTEMPT).unwrap_or(0),
        max_attempts: row.i16(MAX_ATTEMPTS).unwrap_or(0),
        tid: row.tid(),
    }
}
