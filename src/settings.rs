//! Every setting: name, unit, range, when a change takes hold. Read once per call by `ops` and passed down.

use std::ffi::CStr;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::pg::shmem;

static ASYNCHRONOUS_CLAIM: GucSetting<bool> = GucSetting::<bool>::new(true);
static CARRY_JOBS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static DEFERRAL: GucSetting<i32> = GucSetting::<i32>::new(3600);
static MAINTENANCE: GucSetting<bool> = GucSetting::<bool>::new(true);
static MAINTENANCE_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(1000);
static MAX_DATABASES: GucSetting<i32> = GucSetting::<i32>::new(4);
static MAX_IN_FLIGHT: GucSetting<i32> = GucSetting::<i32>::new(32_768);
static MAX_QUEUES: GucSetting<i32> = GucSetting::<i32>::new(64);
static PRUNE_GRACE: GucSetting<i32> = GucSetting::<i32>::new(60);
static RING_SEGMENTS: GucSetting<i32> = GucSetting::<i32>::new(16);
static RING_SEGMENTS_MAX: GucSetting<i32> = GucSetting::<i32>::new(64);
static ROTATE_AGE: GucSetting<i32> = GucSetting::<i32>::new(600);
static ROTATE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256);

/// Registers the settings. Those that size shared memory exist only when the server itself loads the library.
pub fn register() {
    GucRegistry::define_bool_guc(
        c"awa.asynchronous_claim",
        c"Commits a transaction that did nothing but claim jobs without waiting for its flush.",
        c"If a crash loses such a claim, its jobs are ready again. The caller's own writes are never weakened. Takes hold at once.",
        &ASYNCHRONOUS_CLAIM,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"awa.carry_jobs",
        c"Unfinished jobs of one old segment that maintenance appends again to free it.",
        c"A segment that holds more of them is left as it is. Zero: none is carried. Takes hold at once.",
        &CARRY_JOBS,
        0,
        10_000_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"awa.deferral",
        c"A job that is due later than this, when it is carried out of its segment, waits outside the ring.",
        c"It comes back when half of this time is left. Takes hold at once.",
        &DEFERRAL,
        2,
        31_536_000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_bool_guc(
        c"awa.maintenance",
        c"Lets the maintainers of all databases work.",
        c"Off: they sleep, and rotation, pruning and rescue happen only when their functions are called. Takes hold at once.",
        &MAINTENANCE,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"awa.maintenance_interval",
        c"Milliseconds between two looks of a maintainer.",
        c"Rescue happens at each, other tasks at some of them. Takes hold at the next one.",
        &MAINTENANCE_INTERVAL,
        10,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"awa.prune_grace",
        c"Seconds between the proof that a segment is drained and its truncation.",
        c"A dump that took its snapshot before the proof must have locked the tables by then. Takes hold at once.",
        &PRUNE_GRACE,
        0,
        86_400,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"awa.ring_segments",
        c"Segments that the ring should have at most.",
        c"Maintenance carries unfinished jobs out of old segments to keep to it. Takes hold at the next rotation.",
        &RING_SEGMENTS,
        2,
        64,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"awa.ring_segments_max",
        c"Segments to which the ring may grow when old ones cannot be freed.",
        c"Beyond it producers go on in the open segment. Takes hold at the next rotation.",
        &RING_SEGMENTS_MAX,
        2,
        64,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"awa.rotate_age",
        c"Age at which the open segment is sealed, if it holds anything.",
        c"Takes hold at once.",
        &ROTATE_AGE,
        1,
        31_536_000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"awa.rotate_size",
        c"Size of its tables at which the open segment is sealed.",
        c"Takes hold at once.",
        &ROTATE_SIZE,
        1,
        1_048_576,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    if !shmem::preloading() {
        shmem::reserve_settings(c"awa");
        return;
    }
    let sized = |name: &'static CStr,
                 short: &'static CStr,
                 long: &'static CStr,
                 setting: &'static GucSetting<i32>,
                 low: i32,
                 high: i32| {
        GucRegistry::define_int_guc(name, short, long, setting, low, high, GucContext::Postmaster, GucFlags::default());
    };
    sized(
        c"awa.max_databases",
        c"Databases of this server that may use awa_queue at the same time.",
        c"Sizes shared memory. Takes hold at server start.",
        &MAX_DATABASES,
        1,
        64,
    );
    sized(
        c"awa.max_in_flight",
        c"Jobs of one database that may be claimed and unfinished at the same time.",
        c"Sizes shared memory, about 200 bytes each. A claim beyond it returns fewer jobs. Takes hold at server start.",
        &MAX_IN_FLIGHT,
        1024,
        16_777_216,
    );
    sized(
        c"awa.max_queues",
        c"Queues of one database.",
        c"Sizes shared memory, about 80 kB each. Takes hold at server start.",
        &MAX_QUEUES,
        1,
        32_768,
    );
    shmem::reserve_settings(c"awa");
}

pub fn asynchronous_claim() -> bool {
    ASYNCHRONOUS_CLAIM.get()
}

pub fn max_databases() -> usize {
    MAX_DATABASES.get() as usize
}

pub fn max_in_flight() -> usize {
    MAX_IN_FLIGHT.get() as usize
}

pub fn max_queues() -> usize {
    MAX_QUEUES.get() as usize
}

pub fn ring_segments() -> usize {
    RING_SEGMENTS.get() as usize
}

pub fn ring_segments_max() -> usize {
    RING_SEGMENTS_MAX.get() as usize
}

pub fn carry_jobs() -> usize {
    CARRY_JOBS.get() as usize
}

/// Microseconds.
pub fn deferral() -> i64 {
    i64::from(DEFERRAL.get()) * 1_000_000
}

pub fn maintenance() -> bool {
    MAINTENANCE.get()
}

/// Microseconds.
pub fn maintenance_interval() -> i64 {
    i64::from(MAINTENANCE_INTERVAL.get()) * 1000
}

/// Microseconds.
pub fn rotate_age() -> i64 {
    i64::from(ROTATE_AGE.get()) * 1_000_000
}

/// Bytes.
pub fn rotate_size() -> u64 {
    ROTATE_SIZE.get() as u64 * 1024 * 1024
}

/// Microseconds.
pub fn prune_grace() -> i64 {
    i64::from(PRUNE_GRACE.get()) * 1_000_000
}
