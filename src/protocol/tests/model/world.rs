//! PostgreSQL and the shared memory of one queue, as values: transactions, heap, index, evidence, sessions, a clock, a crash.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};

use awa_protocol::attempt::{Entry, EntryRef, Partition, PartitionHead, State};
use awa_protocol::lane::{Lane, Position};
use awa_protocol::lifecycle::Outcome;
use awa_protocol::queue::{Existence, HoleLinks, NOBODY, QueueFrontier, Settings, TrackId};
use awa_protocol::rebuild::{Copy_, OpenClaim};
use awa_protocol::ring::{Event, LedgerRow, Ring};

use crate::carrier::Carry;
use crate::claimer::{Claim, Turn};
use crate::finisher::{Cancel, Finish};
use crate::producer::Produce;
use crate::profile::Profile;
use crate::redrive::Redrive;

pub type Xid = u64;
pub const QUEUE: i32 = 1;
pub const PARTITIONS: usize = 2;

/// splitmix64: one number is the whole schedule.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) % n.max(1) as u64) as usize
    }
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1).max(1) as usize) as i64
    }
    /// True `n` times in a thousand.
    pub fn permille(&mut self, n: u32) -> bool {
        (self.below(1000) as u32) < n
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Running,
    /// In the order of commits: a crash loses those behind the last flush.
    Committed(u64),
    Aborted,
}

#[derive(Clone, Debug)]
pub struct Row {
    pub lane: i32,
    pub position: Position,
    pub xmin: Xid,
    pub job: i64,
    pub hop: i32,
    pub run_at: i64,
    pub attempt: i16,
}

pub struct Closure {
    pub xmin: Xid,
    pub copy: Copy_,
    pub outcome: Outcome,
    pub unclaimed: bool,
}

#[derive(Default)]
pub struct Segment {
    pub slot: i32,
    pub rows: Vec<Row>,
    pub index: BTreeMap<(i32, i64, u64), usize>,
    pub claims: Vec<(Xid, Copy_, OpenClaim)>,
    pub closures: Vec<Closure>,
    pub tombstones: HashMap<Copy_, Vec<Xid>>,
    /// Shared memory: claimers probe only when it is set.
    pub tombstone_flag: bool,
    pub pages: u64,
}

/// What a session did to the frontier, to be undone by a rollback.
#[derive(Clone, Copy, Debug)]
pub enum Note {
    Registered,
    Claim(EntryRef),
    Close(EntryRef, Copy_),
    Supersede(EntryRef, Copy_),
    /// A running attempt, its old entry and its new one.
    Move(EntryRef, EntryRef, Copy_),
}

#[derive(Default)]
pub struct Tx {
    /// Open (sub)transactions, the top first.
    pub stack: Vec<Xid>,
    /// All of its own, released ones included, with the level they now belong to.
    pub xids: Vec<(Xid, usize)>,
    pub notes: VecDeque<(usize, Note)>,
    pub locks: BTreeSet<i64>,
    /// REPEATABLE READ: nothing committed later is visible.
    pub snapshot: Option<u64>,
    /// It did more than claim: its commit must be flushed.
    pub sync: bool,
}

impl Tx {
    pub fn owns(&self, xid: Xid) -> bool {
        self.xids.iter().any(|(own, _)| *own == xid)
    }
}

#[derive(Default)]
pub enum Op {
    #[default]
    Idle,
    Produce(Produce),
    Claim(Box<Claim>),
    Finish(Finish),
    Cancel(Cancel),
    Redrive(Redrive),
    Carry(Carry),
    /// The transaction's xids are aborted down to this level; the callbacks still run.
    Undo {
        level: usize,
        turn: Option<Turn>,
    },
    /// The transaction is committed; the callbacks still run.
    Settle,
}

#[derive(Default)]
pub struct Session {
    pub tx: Option<Tx>,
    pub op: Op,
    /// Where this backend appends: (generation, page, rows on it).
    pub page: Option<(i64, u64, u64)>,
}

/// What a worker was told: it may come back with it at any time, after a crash too.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub copy: Copy_,
    pub lease: i64,
    pub generation: i64,
    pub lane: i32,
    pub attempt: i16,
}

pub struct Pool {
    pub heads: Vec<PartitionHead>,
    pub entries: Vec<Vec<Entry>>,
    pub buckets: Vec<Vec<u32>>,
    pub links: Vec<AtomicU32>,
    pub per: usize,
}

impl Pool {
    pub fn new(per: usize) -> Self {
        let mut pool = Self {
            heads: vec![PartitionHead::new(); PARTITIONS],
            entries: vec![vec![Entry::free(); per]; PARTITIONS],
            buckets: vec![vec![NOBODY; (per / 2).max(1)]; PARTITIONS],
            links: (0..per * PARTITIONS).map(|_| AtomicU32::new(NOBODY)).collect(),
            per,
        };
        pool.reset();
        pool
    }
    pub fn reset(&mut self) {
        for n in 0..PARTITIONS {
            self.part(n as u32).reset();
        }
        self.links.iter().for_each(|link| link.store(NOBODY, Ordering::Relaxed));
    }
    pub fn part(&mut self, n: u32) -> Partition<'_> {
        let n = n as usize;
        Partition { head: &mut self.heads[n], entries: &mut self.entries[n], buckets: &mut self.buckets[n] }
    }
    pub fn named(&mut self, name: EntryRef) -> Option<&mut Entry> {
        let n = name.partition as usize;
        self.entries[n].get_mut(name.slot as usize).filter(|e| e.state != State::Free)?;
        // Through the crate's own check, so that its mutants are seen.
        let alive = self.part(name.partition).named(name).is_some();
        if alive { self.entries[n].get_mut(name.slot as usize) } else { None }
    }
    pub fn global(&self, name: EntryRef) -> u32 {
        name.partition * self.per as u32 + name.slot
    }
    pub fn name_of(&self, global: u32) -> EntryRef {
        let (partition, slot) = (global / self.per as u32, global % self.per as u32);
        EntryRef { partition, slot, stamp: self.entries[partition as usize][slot as usize].stamp() }
    }
    pub fn key_of(&self, global: u32) -> i64 {
        self.entries[global as usize / self.per][global as usize % self.per].key
    }
    pub fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().flatten().filter(|e| e.state != State::Free)
    }
}

/// Links and keys of holes, as the frontier wants them.
macro_rules! links {
    ($world:expr) => {
        awa_protocol::queue::HoleLinks { next: &$world.pool.links, key_of: &|entry| $world.pool.key_of(entry) }
    };
}
pub(crate) use links;

pub struct World {
    pub rng: Rng,
    pub profile: Profile,
    pub trace: Option<Vec<String>>,
    pub steps: u64,
    pub now: i64,
    /// Highest reading of the clock so far: what was due stays due.
    pub max_now: i64,
    pub xids: Vec<Status>,
    pub commits: u64,
    pub flushed: u64,
    pub ledger: Vec<LedgerRow>,
    pub ring: Ring,
    pub segments: BTreeMap<i64, Segment>,
    pub q: Box<QueueFrontier>,
    pub pool: Pool,
    pub sessions: Vec<Session>,
    pub prepared: Vec<Tx>,
    /// A build is under way; this generation was opened for producers first (`None`: the ring was full, they wait).
    pub building: Option<Option<i64>>,
    /// Their truncation has begun: whatever the ledger says, nobody may read them.
    pub poisoned: HashSet<i64>,
    pub nonce: i64,
    pub lease_counter: i64,
    pub leases: HashSet<i64>,
    pub works: Vec<Work>,
    /// Copies handed out or just reserved, with the lease: the oracle of "none twice at once".
    pub held: HashMap<Copy_, i64>,
    /// Every exit that was appended, pruned segments included.
    pub exits: HashMap<Copy_, Vec<(Xid, Outcome)>>,
    /// Transactions that have superseded the end of a copy.
    pub superseded: HashMap<Copy_, Vec<Xid>>,
    pub next_job: i64,
    pub cursors: HashMap<(i64, i32), Position>,
    pub last_by_xid: HashMap<(i64, i32, Xid), i64>,
    pub popped: usize,
    /// By lease: what its worker said last.
    pub deadlines: HashMap<i64, i64>,
    pub draining: bool,
    pub stats: Stats,
}

#[derive(Default, Debug, Clone, Copy)]
pub struct Stats {
    pub steps: u64,
    pub taken: u64,
    pub drained: u64,
    pub gaps_max: usize,
    pub gap_room_refused: u64,
    pub inserters_refused: u64,
    pub tracks_refused: u64,
    pub tracks_unfit: u64,
    pub pool_full: u64,
    pub guards_passed: u64,
    pub tombstones_met: u64,
    pub crashes: u64,
    pub claims_lost: u64,
    pub prunes: u64,
    pub ring_full: u64,
    pub rechecks: u64,
    pub waits: u64,
    pub stale: u64,
    /// Decided, and then somebody else was first.
    pub marked_late: u64,
    pub uncommitted: u64,
    pub stale_names: u64,
    pub superseded: u64,
    pub carried: u64,
    pub carried_running: u64,
    pub heartbeats_carried: u64,
}

pub const SETTINGS: Settings = Settings {
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

impl World {
    pub fn new(seed: u64, profile: Profile) -> Self {
        let mut q = Box::new(QueueFrontier::empty());
        q.install(QUEUE, b"model", Existence::Live, SETTINGS);
        let mut world = Self {
            rng: Rng::new(seed),
            trace: None,
            steps: 0,
            now: 1_000,
            max_now: 1_000,
            xids: vec![Status::Aborted; 3],
            commits: 0,
            flushed: 0,
            ledger: Vec::new(),
            ring: Ring::default(),
            segments: BTreeMap::new(),
            q,
            pool: Pool::new(profile.pool),
            sessions: (0..profile.sessions).map(|_| Session::default()).collect(),
            prepared: Vec::new(),
            building: None,
            poisoned: HashSet::new(),
            nonce: 1,
            lease_counter: 0,
            leases: HashSet::new(),
            works: Vec::new(),
            held: HashMap::new(),
            exits: HashMap::new(),
            superseded: HashMap::new(),
            next_job: 1,
            cursors: HashMap::new(),
            last_by_xid: HashMap::new(),
            popped: 0,
            deadlines: HashMap::new(),
            draining: false,
            stats: Stats::default(),
            profile,
        };
        world.rotate();
        world
    }

    pub fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:5} t={} {}", self.steps, self.now, text()));
        }
    }

    pub fn violation(&self, text: String) -> ! {
        panic!("VIOLATION {text}");
    }

    // ---- transactions --------------------------------------------------------------------------------------------------

    pub fn status(&self, xid: Xid) -> Status {
        self.xids[xid as usize]
    }
    pub fn committed(&self, xid: Xid) -> bool {
        matches!(self.status(xid), Status::Committed(_))
    }
    pub fn new_xid(&mut self) -> Xid {
        self.xids.push(Status::Running);
        self.xids.len() as Xid - 1
    }
    pub fn tx(&self, sid: usize) -> &Tx {
        self.sessions[sid].tx.as_ref().expect("in a transaction")
    }
    pub fn tx_mut(&mut self, sid: usize) -> &mut Tx {
        self.sessions[sid].tx.as_mut().expect("in a transaction")
    }
    pub fn xid(&self, sid: usize) -> Xid {
        *self.tx(sid).stack.last().expect("a current transaction")
    }
    pub fn note(&mut self, sid: usize, note: Note) {
        let tx = self.tx_mut(sid);
        let level = tx.stack.len() - 1;
        tx.notes.push_back((level, note));
    }

    // ---- storage -------------------------------------------------------------------------------------------------------

    pub fn append_ledger(&mut self, generation: i64, slot: i32, event: Event) {
        self.ledger.push(LedgerRow { generation, slot, event, at: self.now });
        self.ring = match Ring::fold(&self.ledger) {
            Ok(ring) => ring,
            Err(fault) => self.violation(format!("the ledger does not fold: {fault:?}")),
        };
    }

    /// Backends append to pages of their own: tuple identifiers ascend within a session, not across sessions.
    pub fn next_tid(&mut self, sid: usize, generation: i64) -> u64 {
        let segment = self.segments.get_mut(&generation).expect("a live segment");
        let page = match self.sessions[sid].page {
            Some((of, page, used)) if of == generation && used < 4 => (of, page, used + 1),
            _ => {
                segment.pages += 1;
                (generation, segment.pages, 1)
            }
        };
        self.sessions[sid].page = Some(page);
        page.1 * 8 + page.2
    }

    pub fn append_row(&mut self, sid: usize, generation: i64, mut row: Row) {
        if !self.segments.contains_key(&generation) {
            self.violation(format!("a row is appended to segment {generation}, which was pruned"));
        }
        row.position.tid = self.next_tid(sid, generation);
        if let Some(segment) = self.segments.get_mut(&generation) {
            segment.index.insert((row.lane, row.position.key, row.position.tid), segment.rows.len());
            segment.rows.push(row);
        }
    }

    pub fn append_closure(&mut self, sid: usize, generation: i64, copy: Copy_, outcome: Outcome, unclaimed: bool) {
        let xmin = self.xid(sid);
        self.exits.entry(copy).or_default().push((xmin, outcome));
        self.append_evidence(sid, generation, copy, outcome, unclaimed);
    }

    pub fn append_evidence(&mut self, sid: usize, generation: i64, copy: Copy_, outcome: Outcome, unclaimed: bool) {
        let xmin = self.xid(sid);
        let Some(segment) = self.segments.get_mut(&generation) else {
            self.violation(format!("evidence is appended to segment {generation}, which was pruned"))
        };
        // Backends append to pages of their own: the order of rows is not that of commits.
        let place = self.rng.below(segment.closures.len() + 1);
        segment.closures.insert(place, Closure { xmin, copy, outcome, unclaimed });
        if unclaimed {
            segment.tombstones.entry(copy).or_default().push(xmin);
        }
        self.tx_mut(sid).sync = true;
    }

    pub fn closed(&self, copy: Copy_) -> bool {
        self.exits.get(&copy).is_some_and(|exits| exits.iter().any(|(xid, _)| self.committed(*xid)))
    }

    pub fn track_of(&self, generation: i64, lane: i32) -> TrackId {
        let lane = Lane::from_number(lane);
        TrackId { generation, priority: lane.priority, sub: lane.sub }
    }

    pub fn lane_number(track: TrackId) -> i32 {
        Lane { queue_id: QUEUE, priority: track.priority, sub: track.sub }.number()
    }

    // ---- holes ---------------------------------------------------------------------------------------------------------

    /// Partition lock, then the queue's lock inside it: nobody sees a hole that is not linked.
    pub fn make_hole(&mut self, name: EntryRef) {
        let global = self.pool.global(name);
        let Some(entry) = self.pool.named(name) else { return };
        entry.state = State::Hole;
        entry.lease = 0;
        entry.claim_xid = 0;
        entry.close_xid = 0;
        entry.closing = None;
        entry.passed = false;
        let (priority, key) = (entry.priority(), entry.key);
        let links: HoleLinks<'_> = links!(self);
        self.q.push_hole(priority, global, key, links);
    }

    pub fn new_lease(&mut self) -> i64 {
        self.lease_counter += 1;
        let lease = self.nonce * 1_000_000 + self.lease_counter;
        if !self.leases.insert(lease) {
            self.violation(format!("lease {lease} was used before"));
        }
        lease
    }
}
