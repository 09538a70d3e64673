//! Every fixed size, in one place. A size that a user may change is a setting instead and is not here.
//!
//! The feature `small` makes the pools of a queue so small that the models of `docs/spec` can fill them; a server never has it.

const SMALL: bool = cfg!(feature = "small");

/// Longest queue name, in bytes.
pub const QUEUE_NAME_BYTES: usize = if SMALL { 4 } else { 128 };
/// Longest job kind, in bytes.
pub const KIND_NAME_BYTES: usize = 200;
/// Priorities run from 1, the most urgent, to this.
pub const PRIORITIES: usize = 4;
/// Live (priority, sub-lane, segment) combinations of one queue: all there can be.
pub const TRACKS_PER_QUEUE: usize = if SMALL { 6 } else { 2 * PRIORITIES * LIVE_SEGMENTS };
/// Unfinished transactions that the scans of one queue may have passed by.
pub const GAPS_PER_QUEUE: usize = if SMALL { 2 } else { 192 };
/// Gaps that one scan may add.
pub const GAPS_PER_SCAN: usize = if SMALL { 2 } else { 64 };
/// Sessions that may be appending to one queue at the same moment.
pub const INSERTERS_PER_QUEUE: usize = if SMALL { 3 } else { 128 };
/// Rows of one registration of an inserter.
pub const ROWS_PER_REGISTRATION: usize = 256;
/// Jobs named by one claim row or one done row: the row fits a page.
pub const JOBS_PER_EVIDENCE_ROW: usize = 512;
/// Jobs that one call may claim, complete or enqueue.
pub const JOBS_PER_CALL: usize = 100_000;
/// Segments of the ring that may be live at the same time.
pub const LIVE_SEGMENTS: usize = if SMALL { 4 } else { 64 };
/// Attempts of a job.
pub const MAX_ATTEMPTS: i32 = 1000;
/// Tags of a job, and bytes of one tag.
pub const TAGS: usize = 20;
pub const TAG_BYTES: usize = 200;
/// Bytes of `args` or `metadata`.
pub const PAYLOAD_BYTES: usize = 16 * 1024 * 1024;
/// Same `run_at` in a row: keys are spread over this many microseconds, so that a tie is never long.
pub const TIE_SPREAD: u32 = 1024;
/// Finished jobs that one step of retention deletes from each table.
pub const RETENTION_ROWS: usize = 1000;
/// Jobs that one step of carry-forward moves, or of the way back from `awa.deferred_jobs`.
pub const JOBS_PER_CARRY: usize = 512;
/// Steps of the walk that keeps holes in order.
pub const HOLE_WALK: u32 = 64;
/// Tasks of maintenance.
pub const TASKS: usize = 16;
/// Steps that a task may take one after the other while it says that there is more to do; then it waits for the next tick.
pub const STEPS_PER_PASS: u32 = 64;
/// Databases that may be kept free of maintenance at the same time, by commands that need them empty.
pub const HELD_DATABASES: usize = 32;
/// Messages to the launcher that it has not read; beyond them it looks at all databases.
pub const ANNOUNCED_DATABASES: usize = 64;
/// Attempts that one step of rescue ends.
pub const RESCUES_PER_STEP: usize = 500;
/// Jobs that a session remembers as set aside, because rescue failed on them.
pub const SET_ASIDE: usize = 1024;
/// Slots of the in-flight pool that a sweep looks at under one lock.
pub const SLOTS_PER_LOOK: usize = 256;
