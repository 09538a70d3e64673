//! One state of the machine: the log, shared memory (the real frontier, the real in-flight pool), the sessions, and what only the model knows.

use std::sync::atomic::{AtomicU32, Ordering};

use awa_protocol::attempt::{Entry, EntryRef, Partition, PartitionHead, State};
use awa_protocol::lane::{Lane, SubLane};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{Existence, HoleLinks, NOBODY, QueueFrontier, Settings, TrackId};
use awa_protocol::ring::{Event, Ring, Rotation};

use super::claimer::{Claim, Turn};
use super::log::{Copy, Log, Row, Segment, Status, Xid};
use super::producer::Produce;
use super::{Cancel, Carry, Finish, Maintain};

pub const QUEUE: i32 = 1;
pub const LANE: Lane = Lane { queue_id: QUEUE, priority: 0, sub: SubLane::Immediate };
pub const NOW: i64 = 1_000;

/// What a session does, one after the other; everything up to `Commit` is one transaction.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    /// `due`: from now, for scheduled jobs.
    Enqueue {
        rows: usize,
        due: Option<i64>,
    },
    Claim(usize),
    /// With any receipt that a worker was ever given, and any of the outcomes of the configuration.
    Finish,
    Rescue,
    /// The job with this number.
    Cancel(i64),
    Carry,
    Rotate,
    /// The next step of a prune: the proof, or the truncation.
    Prune,
    Commit,
}

#[derive(Clone, Copy)]
pub struct Config {
    pub name: &'static str,
    pub sessions: &'static [&'static [Verb]],
    /// Jobs that are there at first, and how many of them run already.
    pub jobs: usize,
    pub running: usize,
    /// A second segment is open at first: the jobs lie in a sealed one.
    pub sealed: bool,
    /// How often a transaction may fail, the server crash, the clock go on.
    pub aborts: u8,
    pub crashes: u8,
    pub ticks: u8,
    pub max_attempts: i16,
    /// A claimer plans in one step and takes the turn in the next: others come between.
    pub stale_plans: bool,
    pub outcomes: &'static [Outcome],
    /// The rule that this variant breaks; empty: none.
    pub broken: &'static str,
}

impl Config {
    /// Is a rule of the callers broken? Those of the crate ask for themselves.
    pub fn broken(&self, rule: &str) -> bool {
        self.broken == rule
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// RowExclusive: of all who write.
    Write,
    Share,
    Exclusive,
}

/// What a transaction did to shared memory: completed by its commit, undone by its abort.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Note {
    /// `published`: the cursor has passed the row.
    Claim {
        name: EntryRef,
        copy: Copy,
        published: bool,
    },
    Close(EntryRef, Copy),
    Guard {
        name: EntryRef,
        copy: Copy,
        was_hole: bool,
    },
    Move {
        old: EntryRef,
        new: EntryRef,
        copy: Copy,
    },
    Opened,
    PruneStarted(i64),
    Pruned(i64),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Tx {
    pub xid: Xid,
    pub notes: Vec<Note>,
    /// Locks on ready entries, by generation.
    pub locks: Vec<(i64, Mode)>,
    pub holds_ledger: bool,
    pub registered: bool,
    /// More than claims: its commit is flushed.
    pub sync: bool,
    /// Jobs that are acknowledged when it commits.
    pub enqueued: Vec<i64>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Op {
    #[default]
    Idle,
    Produce(Produce),
    Claim(Claim),
    Finish(Finish),
    Cancel(Cancel),
    Carry(Carry),
    Maintain(Maintain),
    /// Aborted; the callbacks still run.
    Undo {
        turn: Option<Turn>,
    },
    /// Committed; the callbacks still run.
    Settle,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Session {
    /// The next verb of its script.
    pub at: usize,
    pub tx: Option<Tx>,
    pub op: Op,
    pub leases: i64,
    pub jobs: i64,
    pub tids: u64,
}

/// What a worker was told. It may come back with it at any time, after a crash too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Work {
    pub copy: Copy,
    pub lease: i64,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Pool {
    pub head: PartitionHead,
    pub entries: Vec<Entry>,
    pub buckets: Vec<u32>,
    pub links: Vec<u32>,
}

impl Pool {
    pub fn new(entries: usize) -> Self {
        let mut pool = Self {
            head: PartitionHead::new(),
            entries: vec![Entry::free(); entries],
            buckets: vec![NOBODY; 2],
            links: vec![NOBODY; entries],
        };
        pool.part().reset();
        pool
    }

    /// One partition: what the locks of several would let happen at once are separate steps here anyway.
    pub fn part(&mut self) -> Partition<'_> {
        Partition { head: &mut self.head, entries: &mut self.entries, buckets: &mut self.buckets }
    }

    pub fn named(&mut self, name: EntryRef) -> Option<&mut Entry> {
        self.entries.get_mut(name.slot as usize).filter(|entry| entry.state != State::Free && entry.stamp() == name.stamp)
    }

    pub fn name_of(&self, slot: u32) -> EntryRef {
        let stamp = self.entries.get(slot as usize).map_or(0, Entry::stamp);
        EntryRef { partition: 0, slot, stamp }
    }

    pub fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.state != State::Free)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub log: Log,
    // Shared memory.
    pub ring: Ring,
    pub q: Box<QueueFrontier>,
    pub pool: Pool,
    /// Segments whose tombstones must be looked for.
    pub flags: Vec<i64>,
    pub nonce: i64,
    // The clients and the outside.
    pub sessions: Vec<Session>,
    pub works: Vec<Work>,
    pub now: i64,
    pub aborts: u8,
    pub crashes: u8,
    pub ticks: u8,
    // What only the model knows.
    /// Enqueued by a transaction whose commit was acknowledged.
    pub acknowledged: Vec<i64>,
    /// Every copy and every exit that was appended, pruned segments included.
    pub copies: Vec<(Copy, Xid)>,
    pub exits: Vec<(Copy, Xid, Outcome)>,
    /// Copies handed out, with the lease.
    pub held: Vec<(Copy, i64)>,
    pub violation: Option<&'static str>,
}

const SETTINGS: Settings = Settings {
    paused: false,
    max_attempts: 5,
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

pub const POOL: usize = 6;
pub const RING_LIMIT: usize = 4;

impl World {
    pub fn empty(config: &Config) -> Self {
        let sessions = config.sessions.len() + 1;
        let mut world = Self {
            log: Log { xids: vec![Vec::new(); sessions], ..Log::default() },
            ring: Ring::default(),
            q: Box::new(QueueFrontier::empty()),
            pool: Pool::new(POOL),
            flags: Vec::new(),
            nonce: 1,
            sessions: vec![Session::default(); sessions],
            works: Vec::new(),
            now: NOW,
            aborts: config.aborts,
            crashes: config.crashes,
            ticks: config.ticks,
            acknowledged: Vec::new(),
            copies: Vec::new(),
            exits: Vec::new(),
            held: Vec::new(),
            violation: None,
        };
        world.install();
        world
    }

    pub fn install(&mut self) {
        self.q.clear();
        self.q.stamp = 0;
        self.q.install(QUEUE, b"", Existence::Live, SETTINGS);
    }

    /// The session that makes the first state, and drains the last.
    pub fn helper(&self) -> usize {
        self.sessions.len() - 1
    }

    pub fn violate(&mut self, name: &'static str) {
        self.violation.get_or_insert(name);
    }

    // ---- transactions --------------------------------------------------------------------------------------------------

    pub fn begin(&mut self, sid: usize) {
        if self.sessions[sid].tx.is_none() {
            let xid = self.log.begin(sid);
            self.sessions[sid].tx = Some(Tx { xid, ..Tx::default() });
        }
    }

    pub fn tx(&mut self, sid: usize) -> &mut Tx {
        self.sessions[sid].tx.get_or_insert_with(Tx::default)
    }

    pub fn xid(&self, sid: usize) -> Xid {
        self.sessions[sid].tx.as_ref().map_or(0, |tx| tx.xid)
    }

    pub fn note(&mut self, sid: usize, note: Note) {
        self.tx(sid).notes.push(note);
    }

    /// Its callbacks have not all run: its locks are held.
    pub fn is_alive(&self, xid: Xid) -> bool {
        self.sessions.iter().filter_map(|session| session.tx.as_ref()).any(|tx| tx.xid == xid)
    }

    pub fn closed(&self, copy: Copy) -> bool {
        self.exits.iter().any(|(of, xid, _)| *of == copy && self.log.committed(*xid))
    }

    // ---- locks ---------------------------------------------------------------------------------------------------------

    fn others_hold(&self, sid: usize, generation: i64, conflicts: impl Fn(Mode) -> bool) -> bool {
        let others = self.sessions.iter().enumerate().filter(|(other, _)| *other != sid).filter_map(|(_, s)| s.tx.as_ref());
        others.flat_map(|tx| &tx.locks).any(|(of, mode)| *of == generation && conflicts(*mode))
    }

    pub fn may_write(&self, sid: usize, generation: i64) -> bool {
        !self.others_hold(sid, generation, |mode| mode != Mode::Write)
    }

    pub fn has_writers(&self, sid: usize, generation: i64) -> bool {
        self.others_hold(sid, generation, |mode| mode == Mode::Write)
    }

    pub fn has_users(&self, sid: usize, generation: i64) -> bool {
        self.others_hold(sid, generation, |_| true)
    }

    pub fn lock(&mut self, sid: usize, generation: i64, mode: Mode) {
        let locks = &mut self.tx(sid).locks;
        if !locks.contains(&(generation, mode)) {
            locks.push((generation, mode));
            locks.sort_unstable_by_key(|(generation, mode)| (*generation, *mode as u8));
        }
    }

    pub fn ledger_is_free(&self, sid: usize) -> bool {
        let mut others = self.sessions.iter().enumerate().filter(|(other, _)| *other != sid);
        !others.any(|(_, session)| session.tx.as_ref().is_some_and(|tx| tx.holds_ledger))
    }

    // ---- rows ----------------------------------------------------------------------------------------------------------

    /// Tuple identifiers ascend within a session, not across sessions.
    pub fn next_tid(&mut self, sid: usize) -> u64 {
        let session = &mut self.sessions[sid];
        session.tids += 1;
        (sid as u64 + 1) * 32 + session.tids
    }

    pub fn next_job(&mut self, sid: usize) -> i64 {
        let first = if sid == self.helper() { 0 } else { (sid as i64 + 1) * 10 };
        let session = &mut self.sessions[sid];
        session.jobs += 1;
        first + session.jobs
    }

    pub fn next_lease(&mut self, sid: usize) -> i64 {
        let nonce = self.nonce;
        let session = &mut self.sessions[sid];
        session.leases += 1;
        nonce * 10_000 + (sid as i64 + 1) * 100 + session.leases
    }

    pub fn track_of(generation: i64, lane: i32) -> TrackId {
        let lane = Lane::from_number(lane);
        TrackId { generation, priority: lane.priority, sub: lane.sub }
    }

    pub fn lane_of(track: TrackId) -> i32 {
        Lane { queue_id: QUEUE, priority: track.priority, sub: track.sub }.number()
    }

    pub fn row_of(&self, copy: Copy) -> Option<(i64, Row)> {
        self.log
            .segments
            .iter()
            .find_map(|segment| segment.rows.iter().find(|row| row.copy() == copy).map(|row| (segment.generation, *row)))
    }

    pub fn has_tombstone(&self, generation: i64, copy: Copy, of: Option<Xid>) -> bool {
        let Some(segment) = self.log.segment(generation) else { return false };
        let seen = |xmin| self.log.committed(xmin) || Some(xmin) == of;
        segment.closures.iter().any(|closure| closure.copy == copy && closure.unclaimed && seen(closure.xmin))
    }

    pub fn raise_flag(&mut self, generation: i64) {
        if !self.flags.contains(&generation) {
            self.flags.push(generation);
            self.flags.sort_unstable();
        }
    }

    pub fn record_copy(&mut self, copy: Copy, xid: Xid) {
        self.copies.push((copy, xid));
        self.copies.sort_unstable();
    }

    pub fn record_exit(&mut self, copy: Copy, xid: Xid, outcome: Outcome) {
        self.exits.push((copy, xid, outcome));
        self.exits.sort_unstable_by_key(|(copy, xid, outcome)| (*copy, *xid, *outcome as u8));
    }

    pub fn hold(&mut self, copy: Copy, lease: i64) {
        self.held.push((copy, lease));
        self.held.sort_unstable();
    }

    pub fn release(&mut self, copy: Copy) {
        self.held.retain(|(of, _)| *of != copy);
    }

    pub fn lease_of(&self, copy: Copy) -> Option<i64> {
        self.held.iter().find(|(of, _)| *of == copy).map(|(_, lease)| *lease)
    }

    // ---- ring and holes ------------------------------------------------------------------------------------------------

    /// The tables of a new segment, and what is to be said in the ledger of it.
    pub fn open_next(&mut self, xmin: Xid) -> bool {
        let Rotation::Open { generation, slot } = self.ring.rotation(RING_LIMIT) else { return false };
        if self.log.segments.iter().any(|segment| segment.slot == slot) {
            self.violate(crate::properties::OPEN_TRUNCATED);
        }
        self.log.segments.push(Segment { generation, slot, ..Segment::default() });
        self.log.append_ledger(xmin, generation, slot, Event::Opened);
        true
    }

    fn with_links<R>(&mut self, body: impl FnOnce(&mut QueueFrontier, HoleLinks<'_>) -> R) -> R {
        let next: Vec<AtomicU32> = self.pool.links.iter().map(|link| AtomicU32::new(*link)).collect();
        let entries = &self.pool.entries;
        let key_of = |slot: u32| entries.get(slot as usize).map_or(0, |entry| entry.key);
        let result = body(&mut self.q, HoleLinks { next: &next, key_of: &key_of });
        self.pool.links = next.iter().map(|link| link.load(Ordering::Relaxed)).collect();
        result
    }

    /// The row is claimable again: its entry becomes a hole.
    pub fn give_back(&mut self, name: EntryRef) {
        let Some(entry) = self.pool.named(name) else { return };
        entry.state = State::Hole;
        // No other part of the machine reads them of a hole.
        (entry.lease, entry.deadline, entry.process) = (0, 0, NOBODY);
        entry.claim_xid = 0;
        entry.close_xid = 0;
        entry.closing = None;
        entry.passed = false;
        let (priority, key) = (entry.priority(), entry.key);
        self.with_links(|q, links| q.push_hole(priority, name.slot, key, links));
    }

    pub fn pop_hole(&mut self, priority: u8) -> Option<u32> {
        self.with_links(|q, links| q.pop_hole(priority, links))
    }

    /// False: a claimer has popped it.
    pub fn unlink_hole(&mut self, name: EntryRef, priority: u8) -> bool {
        self.with_links(|q, links| q.remove_hole(priority, name.slot, links))
    }

    pub fn status(&self, xid: Xid) -> Status {
        self.log.status(xid)
    }
}
