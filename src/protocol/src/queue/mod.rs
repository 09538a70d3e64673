//! The frontier of one queue: where each scan stands, what it passed by, who is appending, and what came back.
//!
//! A *track* is one sub-lane in one segment; rows of a track are ordered by (key, tid). Everything at or below its cursor is
//! accounted for: handed out, in a *gap* (its transaction had not ended), a *hole* (came back), or dead.
//! Contract with the caller, who holds the queue's lock for each call and never across a scan:
//!   producer  `register` -> append rows -> `deregister`
//!   claimer   `plan` -> `begin_scan` -> scan -> `finish_scan`, or the same with a gap; `release` undoes a turn after an error
//! Rules that keep every row (see the model tests):
//!   keys are chosen above the horizon of every scan that has begun; whoever registered before is known to the scan as a gap;
//!   a gap never reaches above its track's cursor; a cursor is never lowered.

mod claimers;
mod holes;
mod producers;

use core::sync::atomic::{AtomicU32, Ordering};

use crate::lane::{Position, SubLane};
use crate::limits::{
    GAPS_PER_QUEUE, GAPS_PER_SCAN, HOLE_WALK, INSERTERS_PER_QUEUE, PRIORITIES, QUEUE_NAME_BYTES, TIE_SPREAD, TRACKS_PER_QUEUE,
};

/// No process; no entry.
pub const NOBODY: u32 = u32::MAX;
/// No row is known to be waiting.
pub const NO_KEY: i64 = i64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    pub paused: bool,
    pub max_attempts: i32,
    /// Microseconds; 0 means none.
    pub deadline: i64,
    pub heartbeat_timeout: i64,
    pub backoff: i64,
    pub backoff_max: i64,
    pub priority_ageing: i64,
    /// How long finished jobs are kept beyond their segment; 0: not at all.
    pub completed_retention: i64,
    pub failed_retention: i64,
    pub cancelled_retention: i64,
    /// Jobs that fail for good become dead letters.
    pub dead_letters: bool,
    /// 0: until somebody deletes them.
    pub dead_letter_retention: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TrackId {
    pub generation: i64,
    pub priority: u8,
    pub sub: SubLane,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Track {
    pub id: TrackId,
    pub cursor: Position,
    /// No row above the cursor has a lower key. `NO_KEY`: none is known.
    pub head: i64,
    /// Highest key that a scan may have gone up to; producers choose keys above it.
    pub horizon: i64,
    /// Highest key chosen so far.
    pub last: i64,
    /// Lowest key registered since the running scan began.
    fresh: i64,
    turn: u32,
    /// Registrations so far.
    registered: u32,
    tie_key: i64,
    tie_count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gap {
    pub track: TrackId,
    pub xid: u64,
    pub from: Position,
    pub to: Position,
    turn: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Inserter {
    process: u32,
    track: TrackId,
    xid: u64,
    lowest: i64,
    highest: i64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    pub immediate: i64,
    pub scheduled: i64,
    pub running: i64,
    pub completed: i64,
    pub failed: i64,
    pub cancelled: i64,
    pub dead_lettered: i64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Totals {
    pub enqueued: u64,
    pub claimed: u64,
    pub completed: u64,
    pub failed_attempts: u64,
    pub snoozed: u64,
    /// Attempts that rescue has ended.
    pub rescued: u64,
    /// Copies moved to another segment, or into the ring or out of it.
    pub carried: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Existence {
    Free,
    /// Created by a transaction that has not committed.
    Creating,
    Live,
    Dropping,
}

/// Keys to give to a batch of rows.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    Immediate { rows: usize },
    Scheduled { run_at: &'a [i64] },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Registrations last microseconds: try again.
    TooManyInserters,
    /// Too many live segments hold rows of this queue.
    TooManyTracks,
}

/// What a claimer should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// Take holes of this priority with keys not above `until`.
    Holes { priority: u8, until: i64 },
    /// Visit the rows of an ended transaction; take no row with a key above `until`.
    Gap { track: TrackId, xid: u64, until: i64 },
    /// Scan this track; take no row with a key above `until` (another source has the next one).
    Scan { track: TrackId, until: i64 },
    /// Others are at work on everything that is due.
    Busy,
    /// Nothing is due before this time (`NO_KEY`: nothing is known).
    Nothing { next: i64 },
}

/// A scan turn: what the claimer needs to read the index by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ScanTurn {
    pub track: TrackId,
    pub from: Position,
    /// Rows with keys above this must not be passed.
    pub horizon: i64,
    /// Transactions that were appending when the turn was taken; their ranges become gaps.
    pub inserters: heapless::Vec<GapFound, GAPS_PER_SCAN>,
    /// Gaps that may be added at the end, the inserters' included.
    pub gap_room: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GapFound {
    pub xid: u64,
    pub from: Position,
    pub to: Position,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GapTurn {
    pub track: TrackId,
    pub xid: u64,
    pub from: Position,
    pub to: Position,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct HoleList {
    first: u32,
    count: u32,
    /// Key of the first hole, `NO_KEY` when empty.
    key: i64,
}

/// Memory of the links between holes: one number for each in-flight entry, and the key of that entry.
#[derive(Clone, Copy)]
pub struct HoleLinks<'a> {
    pub next: &'a [AtomicU32],
    pub key_of: &'a dyn Fn(u32) -> i64,
}

/// Cloned and compared by the models of `docs/spec` only: on a server it lives in shared memory, once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct QueueFrontier {
    pub queue_id: i32,
    pub existence: Existence,
    /// Raised whenever the slot is given to another queue: a cached index is checked with it.
    pub stamp: u32,
    pub settings: Settings,
    pub counts: Counts,
    pub totals: Totals,
    pub waiters: u32,
    name: [u8; QUEUE_NAME_BYTES],
    name_len: u8,
    tracks: heapless::Vec<Track, TRACKS_PER_QUEUE>,
    gaps: heapless::Vec<Gap, GAPS_PER_QUEUE>,
    gaps_promised: u32,
    inserters: heapless::Vec<Inserter, INSERTERS_PER_QUEUE>,
    holes: [HoleList; PRIORITIES],
}

const NO_HOLES: HoleList = HoleList { first: NOBODY, count: 0, key: NO_KEY };

const NO_COUNTS: Counts =
    Counts { immediate: 0, scheduled: 0, running: 0, completed: 0, failed: 0, cancelled: 0, dead_lettered: 0 };

const NO_SETTINGS: Settings = Settings {
    paused: false,
    max_attempts: 1,
    deadline: 0,
    heartbeat_timeout: 0,
    backoff: 0,
    backoff_max: 0,
    priority_ageing: 0,
    completed_retention: 0,
    failed_retention: 0,
    cancelled_retention: 0,
    dead_letters: false,
    dead_letter_retention: 0,
};

impl QueueFrontier {
    pub const fn empty() -> Self {
        Self {
            queue_id: 0,
            existence: Existence::Free,
            stamp: 0,
            settings: NO_SETTINGS,
            counts: NO_COUNTS,
            totals: Totals { enqueued: 0, claimed: 0, completed: 0, failed_attempts: 0, snoozed: 0, rescued: 0, carried: 0 },
            waiters: 0,
            name: [0; QUEUE_NAME_BYTES],
            name_len: 0,
            tracks: heapless::Vec::new(),
            gaps: heapless::Vec::new(),
            gaps_promised: 0,
            inserters: heapless::Vec::new(),
            holes: [NO_HOLES; PRIORITIES],
        }
    }

    /// Makes this slot the frontier of a queue. The name must fit (checked where queues are created).
    pub fn install(&mut self, queue_id: i32, name: &[u8], existence: Existence, settings: Settings) {
        self.clear();
        let len = name.len().min(QUEUE_NAME_BYTES);
        if let (Some(to), Some(from)) = (self.name.get_mut(..len), name.get(..len)) {
            to.copy_from_slice(from);
        }
        self.name_len = len as u8;
        self.queue_id = queue_id;
        self.existence = existence;
        self.settings = settings;
    }

    pub fn clear(&mut self) {
        self.existence = Existence::Free;
        self.stamp = self.stamp.wrapping_add(1);
        self.queue_id = 0;
        self.name_len = 0;
        self.settings = NO_SETTINGS;
        self.counts = Counts::default();
        self.totals = Totals::default();
        self.tracks.clear();
        self.gaps.clear();
        self.gaps_promised = 0;
        self.inserters.clear();
        self.holes = [NO_HOLES; PRIORITIES];
    }

    pub fn name(&self) -> &[u8] {
        self.name.get(..usize::from(self.name_len)).unwrap_or(&[])
    }

    pub fn tracks(&self) -> &[Track] {
        &self.tracks
    }

    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    pub fn hole_count(&self) -> u32 {
        self.holes.iter().map(|list| list.count).sum()
    }

    fn track(&mut self, id: TrackId) -> Option<&mut Track> {
        self.tracks.iter_mut().find(|track| track.id == id)
    }

    pub fn find_track(&self, id: TrackId) -> Option<&Track> {
        self.tracks.iter().find(|track| track.id == id)
    }

    /// Would claimers come to this committed row by themselves? It lies above its cursor, or in the gap of its transaction, and nobody
    /// has the turn: whoever has it may be past the row already (it moves the cursor only when it ends), and if it passed a guard that
    /// was rolled back, the job may have run as a hole and ended since. Asked after a guard was set on the row, a yes proves that nobody
    /// has taken this copy, and that nobody will while the guard stands. After a no only the guard itself can prove it, by being marked
    /// as passed: a claimer comes to a row once, so nobody had before.
    pub fn will_reach(&self, id: TrackId, row: Position, xmin: u64) -> bool {
        let is_free = |turn: u32| turn == NOBODY || mutant!("held_turn_ignored");
        let above = self.find_track(id).is_some_and(|track| row > track.cursor && is_free(track.turn));
        let in_gap = |gap: &Gap| gap.track == id && gap.xid == xmin && row >= gap.from && row <= gap.to && is_free(gap.turn);
        above || self.gaps.iter().any(in_gap) || mutant!("carry_of_passed_rows")
    }

    /// As it is now, to be shown to `settle` after its rows were read. `None`: somebody is scanning it or appending to it.
    pub fn look(&self, id: TrackId) -> Option<Track> {
        let appended_to = self.inserters.iter().any(|inserter| inserter.track == id);
        self.find_track(id).filter(|track| track.turn == NOBODY && !appended_to).copied()
    }

    /// Every row above the cursor is dead or closed for good: so says a reader who began after `look` had given `seen`. The head promises
    /// nothing then, unless somebody has appended meanwhile, where the reader may have been past.
    pub fn settle(&mut self, seen: &Track) -> bool {
        let unchanged = self.look(seen.id).is_some_and(|now| now.registered == seen.registered);
        if let Some(track) = self.track(seen.id).filter(|_| unchanged) {
            track.head = NO_KEY;
        }
        unchanged
    }

    // ---- rebuild -------------------------------------------------------------------------------------------------------

    /// Puts a track where the log says it stands. `head` counts the rows above the cursor of unfinished (prepared) transactions too;
    /// those below the cursor are given to `restore_gap`. `last` may be too low in a segment that receives no more rows.
    pub fn restore_track(&mut self, id: TrackId, cursor: Position, head: i64, last: i64) -> Result<(), Refusal> {
        if self.find_track(id).is_none() {
            self.add_track(id)?;
        }
        if let Some(track) = self.track(id) {
            track.cursor = cursor;
            track.head = head;
            track.last = last;
            track.horizon = cursor.key;
        }
        Ok(())
    }

    pub fn restore_gap(&mut self, track: TrackId, found: GapFound) -> bool {
        let known = self.gaps.iter().any(|gap| gap.track == track && gap.xid == found.xid);
        if !known && self.gaps.is_full() {
            return false;
        }
        let Some(cursor) = self.find_track(track).map(|track| track.cursor) else { return false };
        self.note_gap(track, found, cursor);
        true
    }

    // ---- waiting -------------------------------------------------------------------------------------------------------

    /// Earliest time at which something may be claimable; gaps make it unknown, so the caller bounds its sleep.
    pub fn has_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }

    pub fn gaps_are_full(&self) -> bool {
        self.gaps.is_full()
    }

    /// Transactions of the gaps, each once.
    pub fn gap_xids(&self) -> heapless::Vec<u64, GAPS_PER_QUEUE> {
        let mut xids = heapless::Vec::new();
        for gap in &self.gaps {
            if !xids.contains(&gap.xid) {
                let _ = xids.push(gap.xid);
            }
        }
        xids
    }
}

impl Gap {
    pub fn has_turn(&self) -> bool {
        self.turn != NOBODY
    }
}

impl Track {
    /// Rows due at the same microsecond get neighbouring keys, so that no long tie has to be skipped by a scan.
    fn spread_tie(&mut self, due: i64) -> i64 {
        if self.tie_key == due {
            self.tie_count = (self.tie_count + 1) % TIE_SPREAD;
        } else {
            self.tie_key = due;
            self.tie_count = 0;
        }
        i64::from(self.tie_count)
    }

    pub fn has_turn(&self) -> bool {
        self.turn != NOBODY
    }
}
