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

use core::sync::atomic::{AtomicU32, Ordering};

use crate::lane::{Position, SubLane};
use crate::limits::{
    GAPS_PER_QUEUE, GAPS_PER_SCAN, HOLE_WALK, INSERTERS_PER_QUEUE, PRIORITIES, QUEUE_NAME_BYTES, TIE_SPREAD, TRACKS_PER_QUEUE,
};

/// No process; no entry.
pub const NOBODY: u32 = u32::MAX;
/// No row is known to be waiting.
pub const NO_KEY: i64 = i64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub paused: bool,
    pub max_attempts: i32,
    /// Microseconds; 0 means none.
    pub deadline: i64,
    pub heartbeat_timeout: i64,
    pub backoff: i64,
    pub backoff_max: i64,
    pub priority_ageing: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackId {
    pub generation: i64,
    pub priority: u8,
    pub sub: SubLane,
}

#[derive(Clone, Copy, Debug)]
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
    tie_key: i64,
    tie_count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub track: TrackId,
    pub xid: u64,
    pub from: Position,
    pub to: Position,
    turn: u32,
}

#[derive(Clone, Copy, Debug)]
struct Inserter {
    process: u32,
    track: TrackId,
    xid: u64,
    lowest: i64,
    highest: i64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub immediate: i64,
    pub scheduled: i64,
    pub running: i64,
    pub completed: i64,
    pub failed: i64,
    pub cancelled: i64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub enqueued: u64,
    pub claimed: u64,
    pub completed: u64,
    pub failed_attempts: u64,
    pub snoozed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Take holes of this priority with keys not above `until`.
    Holes { priority: u8, until: i64 },
    /// Visit the rows of an ended transaction.
    Gap { track: TrackId, xid: u64 },
    /// Scan this track; take no row with a key above `until` (another source has the next one).
    Scan { track: TrackId, until: i64 },
    /// Others are at work on everything that is due.
    Busy,
    /// Nothing is due before this time (`NO_KEY`: nothing is known).
    Nothing { next: i64 },
}

/// A scan turn: what the claimer needs to read the index by itself.
#[derive(Clone, Debug)]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GapFound {
    pub xid: u64,
    pub from: Position,
    pub to: Position,
}

#[derive(Clone, Copy, Debug)]
pub struct GapTurn {
    pub track: TrackId,
    pub xid: u64,
    pub from: Position,
    pub to: Position,
}

#[derive(Clone, Copy, Debug)]
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

#[derive(Debug)]
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

const NO_SETTINGS: Settings = Settings {
    paused: false,
    max_attempts: 1,
    deadline: 0,
    heartbeat_timeout: 0,
    backoff: 0,
    backoff_max: 0,
    priority_ageing: 0,
};

impl QueueFrontier {
    pub const fn empty() -> Self {
        Self {
            queue_id: 0,
            existence: Existence::Free,
            stamp: 0,
            settings: NO_SETTINGS,
            counts: Counts { immediate: 0, scheduled: 0, running: 0, completed: 0, failed: 0, cancelled: 0 },
            totals: Totals { enqueued: 0, claimed: 0, completed: 0, failed_attempts: 0, snoozed: 0 },
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

    // ---- producers -----------------------------------------------------------------------------------------------------

    /// Chooses keys and makes the range known to every later scan. Keys are written to `keys`, one a row.
    /// At most one registration a process.
    pub fn register(
        &mut self,
        id: TrackId,
        wanted: Wanted<'_>,
        now: i64,
        process: u32,
        xid: u64,
        keys: &mut [i64],
    ) -> Result<(), Refusal> {
        if self.inserters.is_full() {
            return Err(Refusal::TooManyInserters);
        }
        if self.find_track(id).is_none() {
            self.add_track(id)?;
        }
        let Some(track) = self.track(id) else { return Err(Refusal::TooManyTracks) };
        let floor =
            if mutant!("register_below_horizon") { i64::MIN } else { track.horizon.max(track.cursor.key).saturating_add(1) };
        let (mut lowest, mut highest) = (i64::MAX, i64::MIN);
        match wanted {
            Wanted::Immediate { rows } => {
                let first = now.max(track.last.saturating_add(1)).max(floor);
                for (offset, key) in keys.iter_mut().take(rows).enumerate() {
                    *key = first.saturating_add(offset as i64);
                }
                lowest = first;
                highest = first.saturating_add(rows as i64 - 1);
            }
            Wanted::Scheduled { run_at } => {
                for (key, wanted_at) in keys.iter_mut().zip(run_at) {
                    let due = (*wanted_at).max(floor);
                    *key = due.saturating_add(track.spread_tie(due));
                    lowest = lowest.min(*key);
                    highest = highest.max(*key);
                }
            }
        }
        track.last = track.last.max(highest);
        track.head = track.head.min(lowest);
        track.fresh = track.fresh.min(lowest);
        let _ = self.inserters.push(Inserter { process, track: id, xid, lowest, highest });
        Ok(())
    }

    pub fn deregister(&mut self, process: u32) {
        let wanted = |inserter: &Inserter| inserter.process == process || mutant!("deregister_wrong_one");
        if let Some(index) = self.inserters.iter().position(wanted) {
            self.inserters.swap_remove(index);
        }
    }

    fn add_track(&mut self, id: TrackId) -> Result<(), Refusal> {
        let track = Track {
            id,
            cursor: Position::START,
            head: NO_KEY,
            horizon: i64::MIN,
            last: i64::MIN,
            fresh: NO_KEY,
            turn: NOBODY,
            tie_key: i64::MIN,
            tie_count: 0,
        };
        if self.tracks.is_full() {
            self.drop_finished_tracks(id.generation);
        }
        self.tracks.push(track).map_err(|_| Refusal::TooManyTracks)
    }

    /// Forgets tracks of older segments that hold nothing. Producers no longer register in them.
    pub fn drop_finished_tracks(&mut self, open_generation: i64) {
        let (gaps, inserters) = (&self.gaps, &self.inserters);
        self.tracks.retain(|track| {
            track.id.generation >= open_generation
                || (track.head != NO_KEY && !mutant!("drop_unfinished_tracks"))
                || track.turn != NOBODY
                || gaps.iter().any(|gap| gap.track == track.id)
                || inserters.iter().any(|inserter| inserter.track == track.id)
        });
    }

    /// The segment is gone: so is all that was known of it.
    pub fn forget_generation(&mut self, generation: i64) {
        self.tracks.retain(|track| track.id.generation != generation);
        self.gaps.retain(|gap| gap.track.generation != generation);
    }

    // ---- claimers ------------------------------------------------------------------------------------------------------

    /// `ended` lists the gaps' transactions that are known to have ended; `avoid` the tracks on which this caller could not get on.
    pub fn plan(&self, now: i64, ended: &[u64], avoid: &[TrackId]) -> Plan {
        if self.settings.paused || self.existence == Existence::Dropping {
            return Plan::Nothing { next: NO_KEY };
        }
        let mut busy = false;
        let mut next = NO_KEY;
        let mut best: Option<(u8, i64, Plan)> = None;
        for priority in 0..PRIORITIES as u8 {
            let Some((key, plan)) = self.best_of_lane(priority, now, ended, avoid, &mut busy, &mut next) else { continue };
            let rank = self.effective_priority(priority, now.saturating_sub(key));
            if best.is_none_or(|(other_rank, other_key, _)| (rank, key) < (other_rank, other_key)) {
                best = Some((rank, key, plan));
            }
        }
        match best {
            Some((_, _, plan)) => plan,
            None if busy => Plan::Busy,
            None => Plan::Nothing { next },
        }
    }

    /// Waiting raises a job towards priority 1, one step each `priority_ageing`; at equal rank the longer wait goes first.
    fn effective_priority(&self, priority: u8, waited: i64) -> u8 {
        if self.settings.priority_ageing <= 0 {
            return priority;
        }
        let steps = waited.max(0) / self.settings.priority_ageing;
        priority.saturating_sub(u8::try_from(steps).unwrap_or(u8::MAX))
    }

    fn best_of_lane(
        &self,
        priority: u8,
        now: i64,
        ended: &[u64],
        avoid: &[TrackId],
        busy: &mut bool,
        next: &mut i64,
    ) -> Option<(i64, Plan)> {
        let mut first: Option<(i64, Plan)> = None;
        let mut second = NO_KEY;
        let mut offer = |key: i64, plan: Plan| match first {
            Some((best, _)) if best <= key => second = second.min(key),
            previous => {
                if let Some((best, _)) = previous {
                    second = second.min(best);
                }
                first = Some((key, plan));
            }
        };
        if let Some(list) = self.holes.get(usize::from(priority)).filter(|list| list.count > 0) {
            offer(list.key, Plan::Holes { priority, until: NO_KEY });
        }
        for gap in self.gaps.iter().filter(|gap| gap.track.priority == priority && ended.contains(&gap.xid)) {
            if gap.turn == NOBODY {
                offer(gap.from.key, Plan::Gap { track: gap.track, xid: gap.xid });
            } else {
                *busy = true;
            }
        }
        let due_to = |track: &Track| match track.id.sub {
            SubLane::Immediate => NO_KEY - 1,
            SubLane::Scheduled => now,
        };
        for track in self.tracks.iter().filter(|track| track.id.priority == priority && track.head != NO_KEY) {
            if track.head > due_to(track) {
                *next = (*next).min(track.head);
            } else if track.turn != NOBODY || avoid.contains(&track.id) {
                *busy = true;
            } else if !self.behind_older_immediate(track, avoid) {
                offer(track.head, Plan::Scan { track: track.id, until: NO_KEY });
            }
        }
        first.map(|(key, plan)| match plan {
            Plan::Scan { track, .. } => (key, Plan::Scan { track, until: second }),
            Plan::Holes { priority, .. } => (key, Plan::Holes { priority, until: second }),
            other => (key, other),
        })
    }

    /// Immediate rows of an older segment go first, whatever the clock said when they were enqueued.
    fn behind_older_immediate(&self, track: &Track, avoid: &[TrackId]) -> bool {
        track.id.sub == SubLane::Immediate
            && self.tracks.iter().any(|other| {
                other.id.sub == SubLane::Immediate
                    && other.id.priority == track.id.priority
                    && other.id.generation < track.id.generation
                    && other.head != NO_KEY
                    && other.turn == NOBODY
                    && !avoid.contains(&other.id)
            })
    }

    /// Takes the turn of a track. `None`: somebody has it, or no gap could be recorded.
    pub fn begin_scan(&mut self, id: TrackId, now: i64, process: u32) -> Option<ScanTurn> {
        let room = (GAPS_PER_QUEUE - self.gaps.len()).saturating_sub(self.gaps_promised as usize).min(GAPS_PER_SCAN);
        let track = self.tracks.iter_mut().find(|track| track.id == id && (track.turn == NOBODY || mutant!("two_turns")))?;
        let mut horizon = match id.sub {
            SubLane::Immediate => track.last,
            SubLane::Scheduled if mutant!("scan_beyond_now") => track.last,
            SubLane::Scheduled => now.min(track.last),
        };
        let mut inserters: heapless::Vec<GapFound, GAPS_PER_SCAN> = heapless::Vec::new();
        let mut lost = NO_KEY;
        // Only what lies above the cursor: the rest is in a gap already, or was, and a gap that has been visited must not come back.
        let above = if mutant!("inserter_range_from_below_cursor") { Position::START } else { track.cursor.next() };
        for inserter in self.inserters.iter().filter(|inserter| inserter.track == id && inserter.lowest <= horizon) {
            let found = GapFound {
                xid: inserter.xid,
                from: Position::at(inserter.lowest, 0).max(above),
                to: Position::at(inserter.highest, u64::MAX),
            };
            if found.from > found.to || mutant!("inserters_ignored") {
                continue;
            }
            if (inserters.len() >= room || inserters.push(found).is_err()) && !mutant!("inserters_beyond_room_ignored") {
                lost = lost.min(inserter.lowest);
            }
        }
        if lost != NO_KEY {
            horizon = horizon.min(lost.saturating_sub(1));
            inserters.retain(|found| found.from.key <= horizon);
        }
        if horizon < track.cursor.key || (room == 0 && track.head > horizon) {
            return None;
        }
        track.turn = process;
        // Rows above the horizon that are registered and not there yet: the scan cannot know of them.
        let unseen = self.inserters.iter().filter(|inserter| inserter.track == id && inserter.lowest > horizon);
        track.fresh = unseen.map(|inserter| inserter.lowest).min().unwrap_or(NO_KEY);
        if mutant!("unseen_inserters_forgotten") {
            track.fresh = NO_KEY;
        }
        if !mutant!("horizon_not_published") {
            track.horizon = track.horizon.max(horizon);
        }
        if !mutant!("gaps_not_promised") {
            self.gaps_promised += room as u32;
        }
        Some(ScanTurn { track: id, from: track.cursor, horizon, inserters, gap_room: room })
    }

    /// Ends a scan: everything up to `cursor` has been taken, is dead, or is in `gaps`. `next_head` is the key of the first row
    /// not passed (`NO_KEY`: the index had none).
    pub fn finish_scan(&mut self, turn: &ScanTurn, process: u32, cursor: Position, next_head: i64, gaps: &[GapFound]) {
        self.gaps_promised = self.gaps_promised.saturating_sub(turn.gap_room as u32);
        let Some(track) = self.tracks.iter_mut().find(|track| track.id == turn.track && track.turn == process) else { return };
        debug_assert!(cursor >= track.cursor, "a cursor is never lowered");
        debug_assert!(cursor.key <= turn.horizon || cursor == track.cursor);
        track.cursor = if mutant!("cursor_lowered") { Position::at(cursor.key, 0) } else { track.cursor.max(cursor) };
        let cursor = track.cursor;
        // What the inserters of the turn have above the cursor may have come after the scan looked.
        let awaited = turn.inserters.iter().filter(|found| found.to > cursor);
        let awaited = awaited.map(|found| found.from.max(cursor.next()).key).min().unwrap_or(NO_KEY);
        track.head = next_head.min(track.fresh).min(awaited);
        if mutant!("fresh_not_applied") {
            track.head = next_head.min(awaited);
        }
        if mutant!("awaited_not_applied") {
            track.head = next_head.min(track.fresh);
        }
        // After a rebuild rows that the fold did not count (aborted, prepared) may lie above `last`: let the next scan pass them.
        if next_head != NO_KEY && !mutant!("last_not_raised") {
            track.last = track.last.max(next_head);
        }
        track.turn = NOBODY;
        for found in turn.inserters.iter().chain(gaps) {
            self.note_gap(turn.track, *found, cursor);
        }
    }

    fn note_gap(&mut self, track: TrackId, found: GapFound, cursor: Position) {
        let to = if mutant!("gap_above_cursor") { found.to } else { found.to.min(cursor) };
        if found.from > to || mutant!("gap_forgotten") {
            return;
        }
        match self.gaps.iter_mut().find(|gap| gap.track == track && gap.xid == found.xid) {
            Some(gap) => {
                gap.from = gap.from.min(found.from);
                if !mutant!("gap_not_extended") {
                    gap.to = gap.to.max(to);
                }
            }
            None => {
                let added = self.gaps.push(Gap { track, xid: found.xid, from: found.from, to, turn: NOBODY });
                debug_assert!(added.is_ok(), "room for gaps was promised");
            }
        }
    }

    pub fn begin_gap(&mut self, track: TrackId, xid: u64, process: u32) -> Option<GapTurn> {
        let gap = self
            .gaps
            .iter_mut()
            .find(|gap| gap.track == track && gap.xid == xid && (gap.turn == NOBODY || mutant!("two_gap_turns")))?;
        gap.turn = process;
        Some(GapTurn { track, xid, from: gap.from, to: gap.to })
    }

    /// `reached`: every row of the gap up to and including it has been taken or is dead. At the end of the range the gap goes.
    pub fn finish_gap(&mut self, turn: &GapTurn, process: u32, reached: Position) {
        let Some(index) = self.gaps.iter().position(|gap| gap.track == turn.track && gap.xid == turn.xid && gap.turn == process)
        else {
            return;
        };
        let Some(gap) = self.gaps.get_mut(index) else { return };
        gap.turn = NOBODY;
        if reached >= gap.to || mutant!("gap_dropped_early") || (mutant!("gap_growth_lost") && reached >= turn.to) {
            self.gaps.swap_remove(index);
        } else {
            let next = if mutant!("gap_not_advanced") { gap.from } else { reached.next() };
            gap.from = gap.from.max(next);
        }
    }

    /// Gives back a turn whose scan passed nothing. A scan that passed a row and then failed calls `finish_scan` with the place it
    /// had reached (its reserved entries become holes like those of any aborted claim): a guard that it passed may be a hole by now,
    /// and a row that is a hole must not lie above the cursor.
    pub fn abandon_scan(&mut self, turn: &ScanTurn, process: u32) {
        let keep = self.find_track(turn.track).map(|track| (track.cursor, track.head));
        if let Some((cursor, head)) = keep {
            self.gaps_promised = self.gaps_promised.saturating_sub(turn.gap_room as u32);
            if let Some(track) = self.tracks.iter_mut().find(|track| track.id == turn.track && track.turn == process) {
                track.cursor = cursor;
                track.head = head.min(track.fresh);
                track.turn = NOBODY;
            }
        }
    }

    pub fn abandon_gap(&mut self, turn: &GapTurn, process: u32) {
        if let Some(gap) = self.gaps.iter_mut().find(|gap| gap.track == turn.track && gap.xid == turn.xid && gap.turn == process)
        {
            gap.turn = NOBODY;
        }
    }

    // ---- holes ---------------------------------------------------------------------------------------------------------

    /// Links a returned entry into its lane, in order of key as far as a short walk can tell.
    pub fn push_hole(&mut self, priority: u8, entry: u32, key: i64, links: HoleLinks<'_>) {
        let Some(list) = self.holes.get_mut(usize::from(priority)) else { return };
        list.count += 1;
        let next_of = |entry: u32| links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        let set_next = |entry: u32, next: u32| {
            if let Some(link) = links.next.get(entry as usize) {
                link.store(next, Ordering::Relaxed);
            }
        };
        if list.first == NOBODY || key <= list.key {
            set_next(entry, list.first);
            list.first = entry;
            list.key = key;
            return;
        }
        let mut before = list.first;
        for _ in 0..HOLE_WALK {
            let next = next_of(before);
            if next == NOBODY || (links.key_of)(next) >= key {
                break;
            }
            before = next;
        }
        set_next(entry, if mutant!("push_hole_loses") { NOBODY } else { next_of(before) });
        set_next(before, entry);
    }

    pub fn pop_hole(&mut self, priority: u8, links: HoleLinks<'_>) -> Option<u32> {
        let list = self.holes.get_mut(usize::from(priority))?;
        if list.first == NOBODY {
            return None;
        }
        let entry = list.first;
        let next = links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        list.count = list.count.saturating_sub(1);
        list.first = next;
        list.key = if next == NOBODY { NO_KEY } else { (links.key_of)(next) };
        Some(entry)
    }

    pub fn first_hole_key(&self, priority: u8) -> i64 {
        self.holes.get(usize::from(priority)).map_or(NO_KEY, |list| list.key)
    }

    /// Unlinks one hole (it was cancelled). Walks the list: a cold path. False: a claimer has popped it and it is his; look again.
    pub fn remove_hole(&mut self, priority: u8, entry: u32, links: HoleLinks<'_>) -> bool {
        let Some(list) = self.holes.get_mut(usize::from(priority)) else { return false };
        let next_of = |entry: u32| links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        let (mut before, mut at) = (NOBODY, list.first);
        for _ in 0..list.count {
            if at == NOBODY {
                break;
            }
            let next = next_of(at);
            if at == entry && mutant!("hole_not_unlinked") {
                return true;
            }
            if at == entry {
                list.count -= 1;
                if before == NOBODY {
                    list.first = next;
                    list.key = if next == NOBODY { NO_KEY } else { (links.key_of)(next) };
                } else if let Some(link) = links.next.get(before as usize) {
                    link.store(next, Ordering::Relaxed);
                }
                return true;
            }
            (before, at) = (at, next);
        }
        false
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
