//! For `make mutants`: the proof that is none. As many ends as copies, whosever they are.

use awa_protocol::lifecycle::Outcome;
use pgrx::pg_sys::Datum;

use crate::error::Result;
use crate::frontier::SegmentInfo;
use crate::pg::rel::{Lock, Rel};
use crate::pg::scan::{HeapScan, RowState};
use crate::store::evidence::{self, ClaimTerms, Reader};

struct Ends(usize);

impl Reader for Ends {
    fn room(&mut self, _copies: usize) -> Result<()> {
        Ok(())
    }

    fn claim(&mut self, _job_id: i64, _hop: i32, _lease: i64, _terms: &ClaimTerms) {}

    fn closure(&mut self, _: i64, _: i32, _: Outcome, _: bool, _: i64, _: &dyn Fn() -> Option<Datum>) {
        self.0 += 1;
    }
}

pub fn looks_closed(info: &SegmentInfo, ready: &Rel) -> Result<bool> {
    let mut ends = Ends(0);
    evidence::read(info, Lock::AccessShare, false, &mut ends)?;
    let mut copies = 0;
    let mut scan = HeapScan::begin(ready);
    while let Some(row) = scan.next() {
        copies += usize::from(row.state() == RowState::Committed);
    }
    Ok(ends.0 >= copies)
}
