//! How many jobs of a segment are open: bounded reads, of memory and of index entries. An estimate to decide by, never a proof.
//!
//! Locks: RowExclusive on ready_entries of the segment, if it is free, and on its closures: those of the step that may follow.

use std::collections::HashMap;

use awa_protocol::attempt::{Entry, EntryRef, State};
use awa_protocol::lane::{Lane, Position};
use awa_protocol::limits::{GAPS_PER_QUEUE, TRACKS_PER_QUEUE};
use awa_protocol::queue::{Gap, NO_KEY, Track, TrackId};

use crate::error::{Result, reserve};
use crate::frontier::{Frontier, PARTITIONS, SegmentInfo};
use crate::ops::handle::Queue;
use crate::pg::rel::{Index, Lock, Rel};
use crate::pg::scan::{IndexScan, RowState, has_ended};
use crate::store::ready;

/// Entries looked at under one hold of a partition's lock.
const SWEEP: usize = 512;

/// Gives each used entry of the pool to `body`, outside the locks.
pub fn sweep(frontier: &Frontier, mut body: impl FnMut(EntryRef, &Entry) -> Result<()>) -> Result<()> {
    let each = frontier.entries_of_a_partition();
    let mut seen: Vec<(EntryRef, Entry)> = Vec::new();
    reserve(&mut seen, SWEEP)?;
    for partition in 0..PARTITIONS as u32 {
        for from in (0..each).step_by(SWEEP) {
            frontier.with_partition(partition, |pool| {
                let slots = from..(from + SWEEP).min(each);
                seen.extend(slots.filter_map(|slot| {
                    let slot = slot as u32;
                    let stamp = pool.stamp_of(slot);
                    pool.get(slot).map(|entry| (EntryRef { partition, slot, stamp }, *entry))
                }));
            });
            for (name, entry) in seen.drain(..) {
                body(name, &entry)?;
            }
        }
    }
    Ok(())
}

/// Entries of each generation, whatever their state.
pub fn by_generation(frontier: &Frontier) -> Result<HashMap<i64, usize>> {
    let mut found = HashMap::new();
    sweep(frontier, |_, entry| {
        if entry.state != State::Free {
            *found.entry(entry.generation).or_insert(0) += 1;
        }
        Ok(())
    })?;
    Ok(found)
}

/// A track as it was before its rows were read.
#[derive(Clone, Copy)]
pub struct Seen {
    pub id: TrackId,
    pub cursor: Position,
    pub head: i64,
    /// `None`: somebody was scanning it or appending to it.
    pub quiet: Option<Track>,
}

/// What the frontier knows of one segment in one queue.
pub struct Standing {
    pub queue: Queue,
    pub tracks: Vec<Seen>,
    pub gaps: Vec<Gap>,
}

/// Live queues that have anything above a cursor, or in a gap, of this generation.
pub fn standings(frontier: &Frontier, generation: i64) -> Vec<Standing> {
    let mut found = Vec::new();
    let mut tracks = Vec::with_capacity(TRACKS_PER_QUEUE);
    let mut gaps = Vec::with_capacity(GAPS_PER_QUEUE);
    for place in 0..frontier.queue_slots() {
        let queue = {
            let held = frontier.queue(place);
            let queue = Queue::at(place, &held);
            if !queue.is_usable(&held) {
                continue;
            }
            let open = held.tracks().iter().filter(|track| track.id.generation == generation && track.head != NO_KEY);
            let seen = |track: &Track| Seen { id: track.id, cursor: track.cursor, head: track.head, quiet: held.look(track.id) };
            tracks.extend(open.map(seen));
            gaps.extend(held.gaps().iter().filter(|gap| gap.track.generation == generation).copied());
            queue
        };
        if !tracks.is_empty() || !gaps.is_empty() {
            found.push(Standing { queue, tracks: tracks.clone(), gaps: gaps.clone() });
        }
        tracks.clear();
        gaps.clear();
    }
    found
}

pub fn lane_number(queue: &Queue, id: TrackId) -> i32 {
    Lane { queue_id: queue.queue_id, priority: id.priority, sub: id.sub }.number()
}

pub struct Census {
    /// Open jobs; above the limit, it is only known that there are more.
    pub open: usize,
    /// False: there are so many tombstones that the rows left between them were not counted.
    pub is_counted: bool,
    /// Memory expects rows above a cursor, or in a gap.
    pub expected: bool,
}

impl Census {
    /// `None`: somebody keeps writers out of the segment.
    pub fn take(frontier: &Frontier, info: &SegmentInfo, pool: &HashMap<i64, usize>, limit: usize) -> Result<Option<Self>> {
        let mut open = pool.get(&info.generation).copied().unwrap_or(0);
        let standings = standings(frontier, info.generation);
        if open > limit || standings.is_empty() {
            return Ok(Some(Self { open, is_counted: true, expected: !standings.is_empty() }));
        }
        let Some(rel) = Rel::open_if_lockable(info.ready, Lock::RowExclusive)? else { return Ok(None) };
        let index = ready::open_index(&rel, info)?;
        for Standing { queue, tracks, gaps } in &standings {
            for Seen { id, cursor, .. } in tracks {
                let lane = lane_number(queue, *id);
                // Cancelled and carried rows are still in the index: as many as there are tombstones.
                let Some(dead) = tombstones(frontier, info, lane, *cursor, limit)? else {
                    return Ok(Some(Self { open, is_counted: false, expected: true }));
                };
                let mut scan = IndexScan::begin(&rel, &index, lane, cursor.key)?;
                scan.seek(lane, cursor.key, Some(cursor.tid).filter(|_| *cursor != Position::START));
                let mut rows = 0;
                while open + rows <= limit + dead && scan.next_entry().is_some() {
                    rows += 1;
                }
                open += rows.saturating_sub(dead);
            }
            for gap in gaps {
                open += rows_of_gap(&rel, &index, lane_number(queue, gap.track), gap, limit)?;
            }
            if open > limit {
                break;
            }
        }
        Ok(Some(Self { open, is_counted: true, expected: true }))
    }
}

/// `None`: more than are worth counting.
fn tombstones(frontier: &Frontier, info: &SegmentInfo, lane: i32, cursor: Position, limit: usize) -> Result<Option<usize>> {
    if !frontier.has_tombstones(info.slot) {
        return Ok(Some(0));
    }
    let rel = Rel::open(info.closures, Lock::RowExclusive)?;
    let index = Index::open(&rel, info.closures_index)?;
    let mut scan = IndexScan::begin(&rel, &index, lane, cursor.key)?;
    let bound = limit.saturating_mul(4).max(1024);
    let mut found = 0;
    while found < bound && scan.next_entry().is_some() {
        found += 1;
    }
    Ok((found < bound).then_some(found))
}

/// Rows of the gap's transaction. One that has not ended counts as one job: it keeps the segment.
fn rows_of_gap(rel: &Rel, index: &Index, lane: i32, gap: &Gap, limit: usize) -> Result<usize> {
    if !has_ended(gap.xid) {
        return Ok(1);
    }
    let mut scan = IndexScan::begin(rel, index, lane, gap.from.key)?;
    let (mut found, mut visited) = (0, 0);
    while let Some((key, row)) = scan.next() {
        visited += 1;
        if Position::at(key, row.tid()) > gap.to || found > limit || visited > limit.saturating_mul(4).max(1024) {
            break;
        }
        found += usize::from(row.xmin_full() == gap.xid && row.state() == RowState::Committed);
    }
    Ok(found)
}
