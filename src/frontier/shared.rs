//! What lies in shared memory, and how its places are given to databases and queues.
//!
//! Arrays of several databases lie one after the other. Everything is sized by settings at server start.

use super::*;

/// Everything in shared memory. Arrays of several databases lie one after the other.
pub struct Shared {
    pub(super) databases: usize,
    pub(super) queues_each: usize,
    pub(super) entries_each: usize,
    /// Held while a database slot is given away.
    pub(super) allocation: LwCells<u32>,
    /// Database OID and OID of the ledger (which names the incarnation of the extension); 0: free.
    pub(super) identity: &'static [AtomicU64],
    /// Epoch in the high bits, one of the `STATE_` values in the low ones.
    pub(super) state: &'static [AtomicU64],
    pub(super) open_generation: &'static [AtomicU64],
    pub(super) ring_version: &'static [AtomicU64],
    /// Generation of the open segment in which somebody cannot go on, and why: void as soon as another is open.
    pub(super) rotation_asked: &'static [AtomicU64],
    pub(super) next_lease: &'static [AtomicU64],
    pub(super) in_flight: &'static [AtomicU32],
    /// The same by queue.
    pub(super) held: &'static [AtomicU32],
    /// One for each possible slot of the ring: 1 when claimers must look for tombstones.
    pub(super) tombstones: &'static [AtomicU32],
    /// Jobs enqueued by prepared transactions, to be counted when these have ended: COMMIT PREPARED runs no callback.
    pub(super) prepared: LwCells<PreparedCell>,
    pub(super) rings: LwCells<RingCell>,
    pub(super) queues: LwCells<QueueFrontier>,
    pub(super) partitions: LwSlices<awa_protocol::attempt::PartitionHead, Entry>,
    pub(super) hole_next: &'static [AtomicU32],
    pub(super) hole_key: &'static [AtomicU64],
    /// Sleepers in `wait`, by queue; sleepers for a scan turn, by queue; sleepers for a build, by database.
    pub(super) work: CondVars,
    pub(super) turns: CondVars,
    pub(super) builds: CondVars,
    /// Nobody signals this one.
    pub(super) naps: CondVars,
}

pub(super) const STATE_EMPTY: u64 = 0;
pub(super) const STATE_BUILDING: u64 = 1;
pub(super) const STATE_READY: u64 = 2;
pub(super) const STATE_BITS: u64 = 2;

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

pub(super) static SHARED: Attached<Shared> = Attached::new();

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
            rotation_asked: carver.atomics_u64(databases),
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

/// Why a session needs another segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A queue cannot note another unfinished transaction: its scans stand still there.
    GapsFull = 0,
    /// The clock was set back: keys of new jobs are ahead of it.
    ClockBehind = 1,
}

impl Asked {
    pub fn name(self) -> &'static str {
        match self {
            Self::GapsFull => "a queue has passed by as many unfinished transactions as it can note",
            Self::ClockBehind => "the clock was set back",
        }
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
pub(super) const OPERATOR_PLACES: u32 = 64;

pub(super) fn take_up_to(used: &AtomicU32, wanted: u32, limit: u32) -> u32 {
    let mut granted = 0;
    let _ = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
        granted = wanted.min(limit.saturating_sub(now));
        Some(now + granted)
    });
    granted
}

/// Never below zero: a rebuild may have counted anew in between.
pub(super) fn give_back(used: &AtomicU32, count: u32) {
    let _ = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| Some(now.saturating_sub(count)));
}

impl Shared {
    pub(super) fn forget_dropped_databases(&self) {
        for identity in self.identity {
            let seen = identity.load(Ordering::Acquire);
            if seen != 0 && !xact::database_exists((seen >> 32) as u32) {
                // Lost races are harmless: somebody else has freed or taken the place.
                let _ = identity.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }

    pub(super) fn builds_sleeper(&self, database: usize) -> CondVar {
        self.builds.at(database)
    }

    /// The place of this incarnation, if it has one.
    pub(super) fn find_database(&self, ledger: Oid) -> Option<usize> {
        let mine = (u64::from(xact::database_oid()) << 32) | u64::from(ledger.to_u32());
        self.identity.iter().position(|identity| identity.load(Ordering::Acquire) == mine)
    }

    pub(super) fn database_slot(&'static self, ledger: Oid) -> Result<usize> {
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
