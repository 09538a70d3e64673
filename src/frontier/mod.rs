//! The frontier: shared memory as the verbs see it.
//!
//! What lives here: where each structure of `protocol` sits in shared memory, how a session attaches to the part of its database, the
//! session's copy of the ring. `notes` undoes or completes changes when transactions end; `build` makes the frontier from the log.
//! Lock order: queue, then partition; both cover memory only. Nothing is raised, allocated or waited for under them.

pub mod build;
pub mod notes;
mod shared;

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
pub use shared::{Asked, Prepared, PreparedCell, Reserve, SegmentInfo, Shared};
use shared::{OPERATOR_PLACES, PLACES_ABOVE_CARRY, SHARED, give_back, take_up_to};

/// Partitions of the in-flight pool of one database.
pub const PARTITIONS: usize = 32;

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

    /// Attaches a session that calls no function of ours.
    pub fn attach_here() -> Result<Self> {
        Self::attach_slowly()
    }

    /// The frontier if it is there, without building it. For a look that reads no table.
    pub fn attach_if_built() -> Result<Option<Self>> {
        let shared = shared()?;
        xact::refuse_recovery("the working state of the queue")?;
        let ledger = ledger_oid()?;
        let Some(database) = shared.find_database(ledger) else { return Ok(None) };
        let mut frontier = Self { shared, database, word: 0, ledger };
        frontier.word = frontier.state().load(Ordering::Acquire);
        Ok(build::is_ready(frontier.word).then_some(frontier))
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
        let mut frontier = Self::as_it_is()?;
        frontier.word = build::ensure(&frontier)?;
        Ok(frontier)
    }

    /// Attaches to whatever is there, built or not. For those who void it; others want `attach`.
    pub fn as_it_is() -> Result<Self> {
        let shared = shared()?;
        notes::register_callbacks();
        xact::refuse_recovery("the working state of the queue")?;
        let ledger = ledger_oid()?;
        let database = shared.database_slot(ledger)?;
        let frontier = Self { shared, database, word: 0, ledger };
        Ok(Self { word: frontier.state().load(Ordering::Acquire), ..frontier })
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

    /// Frees the entry, if the name is not stale, and gives its place back.
    pub fn drop_entry(&self, name: EntryRef) {
        let gone = self.with_partition(name.partition, |partition| {
            let queue = partition.named(name).map(|entry| entry.queue);
            if queue.is_some() {
                partition.free(name.slot);
            }
            queue
        });
        if let Some(queue) = gone {
            self.return_entries(queue, 1);
        }
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
            Reserve::Carry => (all - PLACES_ABOVE_CARRY, all),
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

    /// The open segment should be sealed soon: the next look of the maintainer does it.
    pub fn ask_for_rotation(&self, generation: i64, why: Asked) {
        if generation == self.open_generation() {
            let word = ((generation as u64) << 1) | why as u64;
            self.shared.rotation_asked[self.database].store(word, Ordering::Release);
        }
    }

    /// Does a session wait for the open segment to be sealed?
    pub fn rotation_asked_for(&self) -> Option<Asked> {
        let word = self.shared.rotation_asked[self.database].load(Ordering::Acquire);
        let why = if word & 1 == 0 { Asked::GapsFull } else { Asked::ClockBehind };
        (word != 0 && (word >> 1) as i64 == self.open_generation()).then_some(why)
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
