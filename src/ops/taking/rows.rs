//! A row beside its entry, its tombstone, and what of it a worker is given.

use awa_protocol::attempt::{InsertRefusal, Partition, State};

use super::*;

pub(super) fn head_of(entry: &Entry) -> ready::Head {
    ready::Head {
        key: entry.key,
        job_id: entry.job_id,
        lane: entry.lane,
        hop: entry.hop,
        kind_id: 0,
        attempt: 0,
        max_attempts: 0,
        tid: entry.tid,
    }
}

pub fn is_row_of(row: &RawRow<'_>, entry: &Entry) -> bool {
    row.state() == RowState::Committed && row.i64(ready::JOB_ID) == Some(entry.job_id) && row.i32(ready::HOP) == Some(entry.hop)
}

/// What a scan finds in the pool at a row that it comes to.
pub(super) enum Met {
    Mine(EntryRef),
    Full,
    /// A cancel in progress, not passed yet: whether the row had ended before it is to be asked first.
    Guard(EntryRef),
    Passed,
}

pub(super) fn insert_or_pass(entries: &mut Partition<'_>, partition: u32, entry: Entry, guard_is_first: Option<EntryRef>) -> Met {
    let slot = match entries.insert(entry) {
        Ok(slot) => return Met::Mine(EntryRef { partition, slot, stamp: entries.stamp_of(slot) }),
        Err(InsertRefusal::Full) => return Met::Full,
        Err(InsertRefusal::Exists(slot)) => slot,
    };
    let name = EntryRef { partition, slot, stamp: entries.stamp_of(slot) };
    match entries.get_mut(slot).filter(|other| other.state == State::Guard) {
        Some(_) if guard_is_first != Some(name) => Met::Guard(name),
        // If it aborts, the row must come back, because this scan goes past it.
        Some(guard) => {
            guard.passed = true;
            Met::Passed
        }
        None => Met::Passed,
    }
}

/// Was this copy closed without ever having been claimed?
pub fn is_tombstoned(segment: &SegmentInfo, head: &ready::Head) -> Result<bool> {
    tombstone(segment, head, |state| matches!(state, RowState::Committed | RowState::Own(_)))
}

/// The same, for good: what this transaction has written may be rolled back.
pub(super) fn has_ended_for_good(segment: &SegmentInfo, head: &ready::Head) -> Result<bool> {
    tombstone(segment, head, |state| matches!(state, RowState::Committed))
}

fn tombstone(segment: &SegmentInfo, head: &ready::Head, counts: impl Fn(RowState) -> bool) -> Result<bool> {
    let rel = Rel::open(segment.closures, Lock::RowExclusive)?;
    let index = Index::open(&rel, segment.closures_index)?;
    let mut scan = IndexScan::begin(&rel, &index, head.lane, head.key)?;
    while let Some((key, row)) = scan.next() {
        if key != head.key {
            break;
        }
        let closes = row.i64(crate::store::evidence::CLOSURE_JOB_ID) == Some(head.job_id)
            && row.i32(crate::store::evidence::CLOSURE_HOP) == Some(head.hop);
        if closes && counts(row.state()) {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) fn copy_row(row: &RawRow<'_>, generation: i64, head: ready::Head, lease: i64) -> Taken {
    Taken {
        generation,
        head,
        lease,
        enqueued_at: row.copy_datum(ready::ENQUEUED_AT),
        tags: row.copy_datum(ready::TAGS),
        metadata: row.copy_datum(ready::METADATA),
        errors: row.copy_datum(ready::ERRORS),
        args: row.copy_datum(ready::ARGS),
    }
}
