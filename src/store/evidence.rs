//! Claims, done entries and closures: what has happened to the ready entries of the same segment.
//!
//! Tables written and read: awa_segments.{lease_claims,done_entries,lease_claim_closures}_<slot>.
//! The caller has opened the segment's ready entries for writing first.

use awa_protocol::batch::{row_lengths, stored_hops};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::limits::JOBS_PER_EVIDENCE_ROW;
use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use crate::error::{Result, reserve};
use crate::frontier::SegmentInfo;
use crate::pg::append::Append;
use crate::pg::call::{array_elements, each_i64, i32_array_datum, i64_array_datum};
use crate::pg::rel::{Index, Lock, Rel};
use crate::pg::scan::{HeapScan, RowState};
use crate::store::datum;

pub const CLOSURE_JOB_ID: usize = 3;
pub const CLOSURE_HOP: usize = 5;

/// A batch of copies of jobs, in the order of their leases.
#[derive(Default)]
pub struct Copies {
    pub job_ids: Vec<i64>,
    pub hops: Vec<i32>,
}

impl Copies {
    pub fn push(&mut self, job_id: i64, hop: i32) -> Result<()> {
        reserve(&mut self.job_ids, 1)?;
        reserve(&mut self.hops, 1)?;
        self.job_ids.push(job_id);
        self.hops.push(hop);
        Ok(())
    }

    fn arrays(&self, from: usize, rows: usize) -> (Option<Datum>, Option<Datum>) {
        let ids = self.job_ids.get(from..from + rows).unwrap_or(&[]);
        let hops = self.hops.get(from..from + rows).unwrap_or(&[]);
        (Some(i64_array_datum(ids)), stored_hops(hops).map(i32_array_datum))
    }
}

pub struct ClaimTerms {
    pub claimed_at: i64,
    pub deadline_at: i64,
    pub heartbeat_timeout: i64,
    pub first_lease: i64,
}

pub fn append_claims(segment: &SegmentInfo, terms: &ClaimTerms, copies: &Copies) -> Result<()> {
    let rel = Rel::open(segment.claims, Lock::RowExclusive)?;
    rel.check_native()?;
    let mut writer = Append::new(&rel, &[])?;
    let mut from = 0;
    for rows in row_lengths(copies.job_ids.len()) {
        let (ids, hops) = copies.arrays(from, rows);
        let row = [
            Some(datum::i64(terms.claimed_at)),
            (terms.deadline_at != 0).then(|| datum::i64(terms.deadline_at)),
            (terms.heartbeat_timeout != 0).then(|| datum::i64(terms.heartbeat_timeout)),
            Some(datum::i64(terms.first_lease + from as i64)),
            ids,
            hops,
        ];
        writer.append(&[row], &mut |_, _| true)?;
        from += rows;
    }
    Ok(())
}

pub fn append_done(segment: &SegmentInfo, done_at: i64, copies: &Copies) -> Result<()> {
    let rel = Rel::open(segment.done, Lock::RowExclusive)?;
    rel.check_native()?;
    let mut writer = Append::new(&rel, &[])?;
    let mut from = 0;
    for rows in row_lengths(copies.job_ids.len()) {
        let (ids, hops) = copies.arrays(from, rows);
        writer.append(&[[Some(datum::i64(done_at)), ids, hops]], &mut |_, _| true)?;
        from += rows;
    }
    Ok(())
}

pub struct Closure {
    pub closed_at: i64,
    pub job_id: i64,
    pub hop: i32,
    /// Lane and key of a copy that was never claimed.
    pub tombstone: Option<(i32, i64)>,
    pub outcome: Outcome,
    pub errors: Option<Datum>,
}

pub fn append_closures(segment: &SegmentInfo, closures: &[Closure]) -> Result<()> {
    let rel = Rel::open(segment.closures, Lock::RowExclusive)?;
    rel.check_native()?;
    let index = Index::open(&rel, segment.closures_index)?;
    let indexes = [index];
    let mut writer = Append::new(&rel, &indexes)?;
    for closure in closures {
        let row = [
            closure.tombstone.map(|(_, key)| datum::i64(key)),
            Some(datum::i64(closure.closed_at)),
            Some(datum::i64(closure.job_id)),
            closure.tombstone.map(|(lane, _)| datum::i32(lane)),
            Some(datum::i32(closure.hop)),
            Some(Datum::from(closure.outcome as u8)),
            closure.errors,
        ];
        writer.append(&[row], &mut |_, _| closure.tombstone.is_some())?;
    }
    Ok(())
}

/// What the evidence tables of a segment say, row by row.
pub trait Reader {
    /// Called before each row, with the number of copies that it names.
    fn room(&mut self, copies: usize) -> Result<()>;
    fn claim(&mut self, job_id: i64, hop: i32, lease: i64, terms: &ClaimTerms);
    fn closure(&mut self, job_id: i64, hop: i32, outcome: Outcome, unclaimed: bool, at: i64, errors: &dyn Fn() -> Option<Datum>);
    /// A closure of a claimed copy by completion: nearly all are.
    fn completed(&mut self, job_id: i64, hop: i32, at: i64) -> Result<()> {
        self.closure(job_id, hop, Outcome::Completed, false, at, &|| None);
        Ok(())
    }
}

/// Calls `each` for every copy that an evidence row names, with its number in the row.
fn each_copy(
    reader: &mut dyn Reader,
    job_ids: Option<Datum>,
    hops: Option<Datum>,
    mut each: impl FnMut(&mut dyn Reader, usize, i64, i32) -> Result<()>,
) -> Result<()> {
    let Some(job_ids) = job_ids else { return Ok(()) };
    let hops = match hops {
        Some(array) => array_elements(array, pg_sys::INT4OID)?,
        None => Vec::new(),
    };
    reader.room(JOBS_PER_EVIDENCE_ROW)?;
    let mut outcome = Ok(());
    each_i64(job_ids, |index, job_id| {
        let hop = hops.get(index).copied().flatten().map_or(0, |hop| hop.value() as i32);
        if outcome.is_ok() {
            outcome = each(reader, index, job_id, hop);
        }
    })?;
    outcome
}

/// Reads committed evidence; with `own` also what this transaction has written. `lock` is taken on the tables.
pub fn read(segment: &SegmentInfo, lock: Lock, own: bool, reader: &mut dyn Reader) -> Result<()> {
    let counts = |state: RowState| state == RowState::Committed || (own && matches!(state, RowState::Own(_)));
    let done = Rel::open(segment.done, lock)?;
    let mut scan = HeapScan::begin(&done);
    while let Some(row) = scan.next() {
        if !counts(row.state()) {
            continue;
        }
        let at = row.i64(1).unwrap_or(0);
        each_copy(reader, row.datum(2), row.datum(3), |reader, _, job_id, hop| reader.completed(job_id, hop, at))?;
    }
    drop(scan);
    let closures = Rel::open(segment.closures, lock)?;
    let mut scan = HeapScan::begin(&closures);
    while let Some(row) = scan.next() {
        if !counts(row.state()) {
            continue;
        }
        let Some(outcome) = row.datum(6).and_then(|letter| Outcome::from_letter(letter.value() as u8)) else { continue };
        let (Some(job_id), Some(hop), Some(at)) = (row.i64(3), row.i32(5), row.i64(2)) else { continue };
        reader.room(1)?;
        reader.closure(job_id, hop, outcome, row.datum(4).is_some(), at, &|| row.copy_datum(7));
    }
    drop(scan);
    let claims = Rel::open(segment.claims, lock)?;
    let mut scan = HeapScan::begin(&claims);
    while let Some(row) = scan.next() {
        if !counts(row.state()) {
            continue;
        }
        let terms = ClaimTerms {
            claimed_at: row.i64(1).unwrap_or(0),
            deadline_at: row.i64(2).unwrap_or(0),
            heartbeat_timeout: row.i64(3).unwrap_or(0),
            first_lease: row.i64(4).unwrap_or(0),
        };
        each_copy(reader, row.datum(5), row.datum(6), |reader, offset, job_id, hop| {
            reader.claim(job_id, hop, terms.first_lease + offset as i64, &terms);
            Ok(())
        })?;
    }
    Ok(())
}
