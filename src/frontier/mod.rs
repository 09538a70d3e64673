//! The frontier: shared memory as the verbs see it.
//!
//! What lives here: where each structure of `protocol` sits in shared memory, how a session attaches to the part of its database, the
//! session's copy of the ring. `notes` undoes or completes changes when transactions end; `build` makes the frontier from the log.
//! Lock order: queue, then partition; both cover memory only. Nothing is raised, allocated or waited for under them.

pub mod build;
pub mod notes;

use std::cell::RefCell;
use std::ffi::CStr;
use std::ops::DerefMut;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use awa_protocol::attempt::{Entry, EntryRef, Partition, partition_of};
use awa_protocol::lane::SubLane;
use awa_protocol::limits::LIVE_SEGMENTS;
use awa_protocol::queue::{HoleLinks, QueueFrontier};
use awa_protocol::ring::SegmentState;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Oid;

use crate::error::{Error, Result};
use crate::pg::shmem::{self, Attached, Carver, CondVar, CondVars, Layout, LwCells, LwSlices, WaitEvent};
use crate::pg::{call::Call, rel, xact};
use crate::settings;

/// Partitions of the in-flight pool of one database.
pub const PARTITIONS: usize = 32;

/// Everything in shared memory. Arrays of several databases lie one after the other.
pub struct Shared {
    databases: usize,
    queues_each: usize,
    entries_each: usize,
    /// Held while a database slot is given away.
    allocation: LwCells<u32>,
    /// Database OID and OID of the ledger (which names the incarnation of the extension); 0: free.
    identity: &'static [AtomicU64],
    /// Epoch in the high bits, one of the `STATE_` values in the low ones.
    state: &'static [AtomicU64],
    open_generation: &'static [AtomicU64],
    ring_version: &'static [AtomicU64],
    next_lease: &'static [AtomicU64],
    in_flight: &'static [AtomicU32],
    /// The same by queue.
    held: &'static [AtomicU32],
    /// One for each possible slot of the ring: 1 when claimers must look for tombstones.
    tombstones: &'static [AtomicU32],
    /// Jobs enqueued by prepared transactions, to be counted when these have ended: COMMIT PREPARED runs no callback.
    prepared: LwCells<PreparedCell>,
    rings: LwCells<RingCell>,
    queues: LwCells<QueueFrontier>,
    partitions: LwSlices<awa_protocol::attempt::PartitionHead, Entry>,
    hole_next: &'static [AtomicU32],
    hole_key: &'static [AtomicU64],
    /// Sleepers in `wait`, by queue; sleepers for a scan turn, by queue; sleepers for a build, by database.
    work: CondVars,
    turns: CondVars,
    builds: CondVars,
    /// Nobody signals this one.
    naps: CondVars,
}

const STATE_EMPTY: u64 = 0;
const STATE_BUILDING: u64 = 1;
const STATE_READY: u64 = 2;
const STATE_BITS: u64 = 2;

/// One live segment and its relations.
#[derive(Clone, Copy, Debug)]
pub struct SegmentInfo {
    pub generation: i64,
    pub slot: i32,
    pub state: SegmentState,
    pub opened_at: i64,
    pub ready: Oid,
    /// File of `ready`: another one means that the table was rewritten and places of rows are void.
    pub ready_file: u32,
    pub ready_index: Oid,
    pub claims: Oid,
    pub done: Oid,
    pub closures: Oid,
    pub closures_index: Oid,
}

/// Prepared transactions with enqueued jobs, of one database, times the sub-lanes they enqueued into.
pub const PREPARED: usize = 64;

#[derive(Clone, Copy)]
pub struct Prepared {
    pub xid: u64,
    pub queue_id: i32,
    pub queue: u16,
    pub sub: SubLane,
    pub rows: i64,
}

pub struct PreparedCell {
    pub waiting: heapless::Vec<Prepared, PREPARED>,
}

fn nothing_prepared() -> PreparedCell {
    PreparedCell { waiting: heapless::Vec::new() }
}

pub struct RingCell {
    pub segments: heapless::Vec<SegmentInfo, LIVE_SEGMENTS>,
}

fn empty_ring() -> RingCell {
    RingCell { segments: heapless::Vec::new() }
}

fn entries_each() -> usize {
    // Jobs are spread evenly over partitions, but not perfectly: an eighth more than asked for.
    let asked = settings::max_in_flight();
    (asked + asked / 8).div_ceil(PARTITIONS) * PARTITIONS
}

static SHARED: Attached<Shared> = Attached::new();

impl Layout for Shared {
    const NAME: &'static CStr = c"awa_queue";

    fn carve(carver: &mut Carver) -> Self {
        let databases = settings::max_databases();
        let queues_each = settings::max_queues();
        let entries_each = entries_each();
        Self {
            databases,
            queues_each,
            entries_each,
            allocation: carver.cells(1, || 0),
            identity: carver.atomics_u64(databases),
            state: carver.atomics_u64(databases),
            open_generation: carver.atomics_u64(databases),
            ring_version: carver.atomics_u64(databases),
            next_lease: carver.atomics_u64(databases),
            in_flight: carver.atomics_u32(databases),
            held: carver.atomics_u32(databases * queues_each),
            tombstones: carver.atomics_u32(databases * LIVE_SEGMENTS),
            prepared: carver.cells(databases, nothing_prepared),
            rings: carver.cells(databases, empty_ring),
            queues: carver.cells(databases * queues_each, QueueFrontier::empty),
            partitions: carver.slices(
                databases * PARTITIONS,
                awa_protocol::attempt::PartitionHead::new,
                (entries_each / PARTITIONS, Entry::free),
                ((entries_each / PARTITIONS).next_power_of_two(), awa_protocol::queue::NOBODY),
            ),
            hole_next: carver.atomics_u32(databases * entries_each),
            hole_key: carver.atomics_u64(databases * entries_each),
            work: carver.condvars(databases * queues_each),
            turns: carver.condvars(databases * queues_each),
            builds: carver.condvars(databases),
            naps: carver.condvars(1),
        }
    }

    fn place() -> &'static Attached<Self> {
        &SHARED
    }
}

/// Asks the server for the memory, when it loads the library at its start. Loaded later, there is none: every function says so.
pub fn register() {
    let _ = shmem::register::<Shared>();
}

/// Under this name waits are shown (from version 17 on).
pub fn wait_event() -> WaitEvent {
    WaitEvent::named(c"AwaQueue")
}

/// A short interruptible sleep.
pub fn nap(ms: i64) {
    if let Some(sleeper) = SHARED.get().and_then(|shared| shared.naps.get(0)) {
        sleeper.prepare();
        sleeper.timed_sleep(ms, wait_event());
        sleeper.cancel();
    }
}

/// The frontier of the session's database, ready to use.
#[derive(Clone, Copy)]
pub struct Frontier {
    pub shared: &'static Shared,
    database: usize,
    /// Value of the state word when this handle was made; another value means that the frontier was rebuilt.
    word: u64,
    pub ledger: Oid,
}

thread_local! {
    /// Functions of the extension that this session has called, with the ledger of their incarnation: a re-created extension has
    /// other function OIDs, so a hit needs no catalog.
    static KNOWN: RefCell<Vec<(Oid, Frontier)>> = const { RefCell::new(Vec::new()) };
    static RING: RefCell<(u64, u64, Vec<SegmentInfo>)> = const { RefCell::new((0, 0, Vec::new())) };
}

fn shared() -> Result<&'static Shared> {
    SHARED.get().ok_or_else(|| {
        Error::new(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "awa_queue is not loaded by the server")
            .detail("The queue keeps its working state in shared memory, which is reserved at server start.")
            .hint("Add awa_queue to shared_preload_libraries and restart the server.")
    })
}

/// Refuses a server that has not loaded the library at its start.
pub fn require_preloading() -> Result<()> {
    shared().map(|_| ())
}

/// The ledger's OID names the incarnation of the extension.
pub fn ledger_oid() -> Result<Oid> {
    rel::relation_oid("awa", "ring_rotations").ok_or_else(|| {
        Error::new(Code::ERRCODE_UNDEFINED_TABLE, "relation \"awa.ring_rotations\" does not exist")
            .hint("Run CREATE EXTENSION awa_queue in this database.")
    })
}

fn rebuilt() -> Error {
    Error::new(Code::ERRCODE_T_R_SERIALIZATION_FAILURE, "the working state of the queue was rebuilt during this call")
        .hint("Run the transaction again.")
}

impl Frontier {
    /// Attaches the session; builds the frontier from the log if nobody has done so since the server started.
    pub fn attach(call: &Call) -> Result<Self> {
        let function = call.function_oid();
        let known = KNOWN.with_borrow(|known| known.iter().find(|(oid, _)| *oid == function).map(|(_, frontier)| *frontier));
        if let Some(frontier) = known.filter(Frontier::is_current) {
            return Ok(frontier);
        }
        let frontier = Self::attach_slowly()?;
        KNOWN.with_borrow_mut(|known| {
            known.retain(|(oid, _)| *oid != function);
            known.push((function, frontier));
        });
        Ok(frontier)
    }

    /// Attaches and runs a verb. If the frontier was rebuilt under its hands, before this transaction had done anything, it runs again.
    pub fn with<R>(call: &Call, mut verb: impl FnMut(&Self) -> Result<R>) -> Result<R> {
        loop {
            let first = notes::is_empty();
            let frontier = Self::attach(call)?;
            match verb(&frontier) {
                Err(error) if first && error.code == Code::ERRCODE_T_R_SERIALIZATION_FAILURE && !frontier.is_current() => {
                    notes::forget_void();
                    xact::check_for_interrupts();
                }
                answer => return answer,
            }
        }
    }

    pub fn is_current(&self) -> bool {
        self.state().load(Ordering::Acquire) == self.word
    }

    /// To be asked after a lock on a segment was waited for: a rebuild may have come first, and what this call has read of the
    /// frontier is void.
    pub fn check_current(&self) -> Result<()> {
        if self.is_current() {
            return Ok(());
        }
        Err(rebuilt())
    }

    fn attach_slowly() -> Result<Self> {
        let shared = shared()?;
        notes::register_callbacks();
        xact::refuse_recovery("the working state of the queue")?;
        let ledger = ledger_oid()?;
        let database = shared.database_slot(ledger)?;
        let mut frontier = Self { shared, database, word: 0, ledger };
        frontier.word = build::ensure(&frontier)?;
        Ok(frontier)
    }

    fn state(&self) -> &'static AtomicU64 {
        &self.shared.state[self.database]
    }

    pub fn word(&self) -> u64 {
        self.word
    }

    // ---- queues --------------------------------------------------------------------------------------------------------

    pub fn queue_slots(&self) -> u16 {
        self.shared.queues_each as u16
    }

    fn queue_index(&self, queue: u16) -> usize {
        self.database * self.shared.queues_each + usize::from(queue)
    }

    pub fn queue(&self, queue: u16) -> impl DerefMut<Target = QueueFrontier> + use<> {
        self.shared.queues.at(self.queue_index(queue))
    }

    pub fn wake_work(&self, queue: u16, jobs: u64) {
        let sleeper = self.shared.work.at(self.queue_index(queue));
        if jobs <= 2 {
            for _ in 0..jobs {
                sleeper.signal();
            }
        } else {
            sleeper.broadcast();
        }
    }

    pub fn work_sleeper(&self, queue: u16) -> CondVar {
        self.shared.work.at(self.queue_index(queue))
    }

    pub fn turn_sleeper(&self, queue: u16) -> CondVar {
        self.shared.turns.at(self.queue_index(queue))
    }

    // ---- in-flight entries ---------------------------------------------------------------------------------------------

    pub fn partition_of(&self, job_id: i64) -> u32 {
        partition_of(job_id, PARTITIONS as u32)
    }

    pub fn with_partition<R>(&self, partition: u32, body: impl FnOnce(&mut Partition<'_>) -> R) -> R {
        let guard = self.shared.partitions.at(self.database * PARTITIONS + partition as usize);
        body(&mut Partition { head: guard.head, entries: guard.entries, buckets: guard.buckets })
    }

    pub fn with_named<R>(&self, name: EntryRef, body: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        self.with_partition(name.partition, |partition| partition.named(name).map(body))
    }

    pub fn entries_of_a_partition(&self) -> usize {
        self.shared.entries_each / PARTITIONS
    }

    /// A number for the entry within the database, as hole lists use it.
    pub fn link_of(&self, name: EntryRef) -> u32 {
        name.partition * (self.shared.entries_each / PARTITIONS) as u32 + name.slot
    }

    pub fn place_of(&self, link: u32) -> (u32, u32) {
        let each = (self.shared.entries_each / PARTITIONS) as u32;
        (link / each, link % each)
    }

    fn links_range(&self) -> std::ops::Range<usize> {
        let start = self.database * self.shared.entries_each;
        start..start + self.shared.entries_each
    }

    /// Runs `body` with the memory of hole links. The key of a hole is set before it is pushed.
    pub fn with_links<R>(&self, body: impl FnOnce(HoleLinks<'_>) -> R) -> R {
        let keys = &self.shared.hole_key[self.links_range()];
        let key_of = |entry: u32| keys.get(entry as usize).map_or(i64::MAX, |key| key.load(Ordering::Relaxed) as i64);
        body(HoleLinks { next: &self.shared.hole_next[self.links_range()], key_of: &key_of })
    }

    pub fn set_hole_key(&self, link: u32, key: i64) {
        if let Some(place) = self.shared.hole_key[self.links_range()].get(link as usize) {
            place.store(key as u64, Ordering::Relaxed);
        }
    }

    pub fn in_flight(&self) -> &'static AtomicU32 {
        &self.shared.in_flight[self.database]
    }

    pub fn held(&self, queue: u16) -> &'static AtomicU32 {
        &self.shared.held[self.queue_index(queue)]
    }

    /// Reserves `wanted` places in the pool for a queue, or as many as there are. Claims leave some for operators, and a queue may not
    /// have all of them: jobs given back to a paused queue must not stop another one.
    pub fn reserve_entries(&self, queue: u16, wanted: u32, reserve: Reserve) -> u32 {
        let all = settings::max_in_flight() as u32;
        let (limit, quota) = match reserve {
            Reserve::Claim => (all - OPERATOR_PLACES, all - all / 4),
            Reserve::Operator => (all, all),
        };
        let own = take_up_to(self.held(queue), wanted, quota);
        let granted = take_up_to(self.in_flight(), own, limit);
        give_back(self.held(queue), own - granted);
        granted
    }

    pub fn return_entries(&self, queue: u16, count: u32) {
        give_back(self.held(queue), count);
        give_back(self.in_flight(), count);
    }

    /// `count` leases that nobody has had before.
    pub fn draw_leases(&self, count: u64) -> i64 {
        self.shared.next_lease[self.database].fetch_add(count, Ordering::Relaxed) as i64
    }

    pub fn prepared(&self) -> impl DerefMut<Target = PreparedCell> + use<> {
        self.shared.prepared.at(self.database)
    }

    // ---- ring ----------------------------------------------------------------------------------------------------------

    pub fn open_generation(&self) -> i64 {
        self.shared.open_generation[self.database].load(Ordering::Acquire) as i64
    }

    /// Runs `body` over the live segments (the session's copy, refreshed when the ring has changed).
    pub fn with_ring<R>(&self, body: impl FnOnce(&[SegmentInfo]) -> R) -> R {
        let version = self.shared.ring_version[self.database].load(Ordering::Acquire);
        let identity = self.shared.identity[self.database].load(Ordering::Relaxed);
        RING.with_borrow_mut(|(known_identity, known_version, segments)| {
            if *known_version != version || *known_identity != identity {
                segments.reserve(LIVE_SEGMENTS);
                let cell = self.shared.rings.at(self.database);
                segments.clear();
                segments.extend_from_slice(&cell.segments);
                (*known_identity, *known_version) = (identity, version);
            }
            body(segments)
        })
    }

    pub fn live_segments(&self) -> Vec<SegmentInfo> {
        let mut live = self.with_ring(<[SegmentInfo]>::to_vec);
        if live.is_empty() {
            live.extend(notes::opened_here());
        }
        live
    }

    pub fn segment(&self, generation: i64) -> Option<SegmentInfo> {
        self.with_ring(|segments| segments.iter().find(|segment| segment.generation == generation).copied())
    }

    pub fn open_segment(&self) -> Result<SegmentInfo> {
        let open = self.open_generation();
        // A transaction that creates the first queue of all opens the first segment too, and may use it at once.
        self.segment(open).or_else(|| notes::opened_here().filter(|_| open == 0)).ok_or_else(|| {
            Error::new(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "the ring has no open segment")
                .hint("Create a queue with awa.create_queue().")
        })
    }

    /// Does this generation receive new rows of the session?
    pub fn is_open(&self, generation: i64) -> bool {
        let open = self.open_generation();
        open == generation || (open == 0 && notes::opened_here().is_some_and(|segment| segment.generation == generation))
    }

    /// Replaces the ring. `open`: generation that receives new rows, 0 for none.
    pub fn set_ring(&self, segments: &[SegmentInfo], open: i64) {
        let mut cell = self.shared.rings.at(self.database);
        cell.segments.clear();
        let _ = cell.segments.extend_from_slice(segments);
        self.shared.open_generation[self.database].store(open as u64, Ordering::Release);
        self.shared.ring_version[self.database].fetch_add(1, Ordering::AcqRel);
    }

    /// Changes the ring in place: called when a transaction that rotated or pruned has committed.
    pub fn change_ring(&self, change: impl FnOnce(&mut heapless::Vec<SegmentInfo, LIVE_SEGMENTS>)) {
        let mut cell = self.shared.rings.at(self.database);
        change(&mut cell.segments);
        let open = cell.segments.iter().rev().find(|segment| segment.state == SegmentState::Open).map_or(0, |s| s.generation);
        self.shared.open_generation[self.database].store(open as u64, Ordering::Release);
        self.shared.ring_version[self.database].fetch_add(1, Ordering::AcqRel);
    }

    pub fn has_tombstones(&self, slot: i32) -> bool {
        self.tombstone_flag(slot).is_some_and(|flag| flag.load(Ordering::Acquire) != 0)
    }

    pub fn set_tombstones(&self, slot: i32, there_are: bool) {
        if let Some(flag) = self.tombstone_flag(slot) {
            flag.store(u32::from(there_are), Ordering::Release);
        }
    }

    fn tombstone_flag(&self, slot: i32) -> Option<&'static AtomicU32> {
        let slot = usize::try_from(slot).ok().filter(|slot| *slot < LIVE_SEGMENTS)?;
        self.shared.tombstones.get(self.database * LIVE_SEGMENTS + slot)
    }
}

/// For whom places of the pool are reserved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reserve {
    Claim,
    /// Cancels, and the rebuild of what was in flight.
    Operator,
}

/// Places that claims leave free.
const OPERATOR_PLACES: u32 = 64;

fn take_up_to(used: &AtomicU32, wanted: u32, limit: u32) -> u32 {
    let mut granted = 0;
    let _ = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
        granted = wanted.min(limit.saturating_sub(now));
        Some(now + granted)
    });
    granted
}

/// Never below zero: a rebuild may have counted anew in between.
fn give_back(used: &AtomicU32, count: u32) {
    let _ = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| Some(now.saturating_sub(count)));
}

impl Shared {
    fn forget_dropped_databases(&self) {
        for identity in self.identity {
            let seen = identity.load(Ordering::Acquire);
            if seen != 0 && !xact::database_exists((seen >> 32) as u32) {
                // Lost races are harmless: somebody else has freed or taken the place.
                let _ = identity.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }

    fn builds_sleeper(&self, database: usize) -> CondVar {
        self.builds.at(database)
    }

    fn database_slot(&'static self, ledger: Oid) -> Result<usize> {
        let mine = (u64::from(xact::database_oid()) << 32) | u64::from(ledger.to_u32());
        let find =
            |wanted: &dyn Fn(u64) -> bool| self.identity.iter().position(|identity| wanted(identity.load(Ordering::Acquire)));
        if let Some(database) = find(&|identity| identity == mine) {
            return Ok(database);
        }
        self.forget_dropped_databases();
        let _held = self.allocation.at(0);
        let same_database = |identity: u64| identity >> 32 == mine >> 32;
        let place =
            find(&|identity| identity == mine).or_else(|| find(&same_database)).or_else(|| find(&|identity| identity == 0));
        let Some(database) = place else {
            drop(_held);
            return Err(Error::new(
                Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "too many databases use awa_queue on this server",
            )
            .detail(format!("All {} places are taken.", self.databases))
            .hint("Raise awa.max_databases and restart the server."));
        };
        let identity = &self.identity[database];
        if identity.load(Ordering::Acquire) != mine {
            // Another incarnation of the extension in this database: its frontier is void.
            let epoch = (self.state[database].load(Ordering::Acquire) >> STATE_BITS) + 1;
            self.state[database].store((epoch << STATE_BITS) | STATE_EMPTY, Ordering::Release);
            self.ring_version[database].fetch_add(1, Ordering::AcqRel);
            identity.store(mine, Ordering::Release);
        }
        Ok(database)
    }
}
