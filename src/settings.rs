//! Every setting: name, unit, range, when a change takes hold. Read once per call by `ops` and passed down.

use std::ffi::CStr;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::pg::shmem;

static ASYNCHRONOUS_CLAIM: GucSetting<bool> = GucSetting::<bool>::new(true);
static MAX_DATABASES: GucSetting<i32> = GucSetting::<i32>::new(4);
static MAX_IN_FLIGHT: GucSetting<i32> = GucSetting::<i32>::new(32_768);
static MAX_QUEUES: GucSetting<i32> = GucSetting::<i32>::new(64);
static PRUNE_GRACE: GucSetting<i32> = GucSetting::<i32>::new(60);
static RING_SEGMENTS: GucSetting<i32> = GucSetting::<i32>::new(16);

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
        c"Segments of the ring that rotation keeps live at most.",
        c"A full ring goes on appending to its open segment. Takes hold at the next rotation.",
        &RING_SEGMENTS,
        2,
        64,
        GucContext::Sighup,
        GucFlags::default(),
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

/// Microseconds.
pub fn prune_grace() -> i64 {
    i64::from(PRUNE_GRACE.get()) * 1_000_000
}
