//! What is explored: few sessions, few jobs, everything that can happen between them.
//!
//! `SMALL` is for every run of the tests, `LARGE` for the long ones.

use awa_protocol::lifecycle::Outcome::{Completed, Retry, Snooze};

use super::world::{Config, Verb};
use Verb::{Cancel, Carry, Claim, Commit, Enqueue, Finish, Prune, Rescue, Rotate};

const NONE: Config = Config {
    name: "",
    sessions: &[],
    jobs: 0,
    running: 0,
    sealed: false,
    aborts: 0,
    crashes: 0,
    ticks: 0,
    max_attempts: 2,
    stale_plans: false,
    outcomes: &[Completed],
    broken: "",
};

const fn enqueue(rows: usize) -> Verb {
    Enqueue { rows, due: None }
}

const DUE: Verb = Enqueue { rows: 1, due: Some(0) };
const LATER: Verb = Enqueue { rows: 1, due: Some(5) };

/// Producers append, claimers scan.
pub const ENQUEUE_CLAIM: Config = Config {
    name: "enqueue-claim",
    sessions: &[&[enqueue(2), Commit], &[enqueue(1), Commit], &[Claim(9), Commit], &[Claim(1), Commit]],
    ..NONE
};

/// Transactions fail at any point.
pub const ENQUEUE_ABORT: Config = Config {
    name: "enqueue-abort",
    sessions: &[&[enqueue(2), Commit], &[enqueue(1), Commit], &[Claim(9), Commit, Claim(9), Commit]],
    aborts: 1,
    ..NONE
};

/// The same with a crash.
pub const ENQUEUE_CRASH: Config = Config {
    name: "enqueue-crash",
    sessions: &[&[enqueue(2), Commit], &[enqueue(1), Commit], &[Claim(9), Commit, Claim(9), Commit]],
    crashes: 1,
    ..NONE
};

/// Scheduled jobs, and a clock that goes on.
pub const SCHEDULED: Config = Config {
    name: "scheduled",
    sessions: &[&[LATER, Commit], &[DUE, Commit], &[Claim(9), Commit, Claim(9), Commit]],
    ticks: 1,
    aborts: 1,
    ..NONE
};

/// Claims that come back: holes.
pub const HOLES: Config = Config {
    name: "holes",
    sessions: &[&[enqueue(1), Commit], &[Claim(1), Commit, Claim(1), Commit], &[Claim(9), Commit]],
    jobs: 2,
    aborts: 2,
    ..NONE
};

/// Two claimers whose plans are out of date when they act on them.
pub const STALE_PLANS: Config = Config {
    name: "stale-plans",
    sessions: &[&[enqueue(1), Commit], &[Claim(9), Commit], &[Claim(1), Commit]],
    jobs: 1,
    stale_plans: true,
    aborts: 1,
    ..NONE
};

/// Unfinished transactions in two lanes: more than there is room for gaps.
pub const GAPS: Config = Config {
    name: "gaps, two claimers",
    sessions: &[&[enqueue(1), DUE, Commit], &[enqueue(1), Commit], &[Claim(9), Commit], &[Claim(1), Commit]],
    ..NONE
};

/// The same for one claimer.
pub const GAPS_ALONE: Config = Config {
    name: "gaps",
    sessions: &[&[enqueue(1), DUE, Commit], &[enqueue(1), Commit], &[Claim(9), Commit, Claim(9), Commit]],
    ..GAPS
};

/// One job; two workers who may come with any receipt, and somebody who cancels.
pub const ATTEMPT: Config = Config {
    name: "attempt",
    sessions: &[&[Claim(1), Commit, Finish, Commit], &[Claim(1), Finish, Commit], &[Cancel(1), Commit]],
    jobs: 1,
    outcomes: &[Completed, Retry],
    aborts: 1,
    ..NONE
};

/// One job; a worker who claims again after the crash, one who finishes with any receipt, rescue.
pub const ATTEMPT_CRASH: Config = Config {
    name: "attempt-crash",
    sessions: &[&[Claim(1), Commit, Claim(1), Commit], &[Finish, Commit, Finish, Commit], &[Rescue, Commit]],
    jobs: 1,
    outcomes: &[Completed, Snooze],
    crashes: 1,
    ..NONE
};

/// One overdue attempt; its worker, rescue and a cancel want to end it.
pub const RESCUE: Config = Config {
    name: "rescue",
    sessions: &[&[Claim(1), Commit, Finish, Commit], &[Rescue, Commit, Rescue, Commit], &[Cancel(1), Commit]],
    jobs: 1,
    outcomes: &[Completed, Retry],
    aborts: 1,
    ..NONE
};

/// A cancel of a waiting job against scans.
pub const CANCEL: Config = Config {
    name: "cancel",
    sessions: &[&[Claim(9), Commit], &[Cancel(1), Commit], &[Claim(1), Commit, Finish, Commit]],
    jobs: 2,
    aborts: 1,
    ..NONE
};

/// Two exits in one transaction.
pub const OWN_EXITS: Config = Config {
    name: "own-exits",
    sessions: &[&[Claim(1), Finish, Finish, Commit], &[Cancel(1), Cancel(1), Commit], &[Finish, Commit]],
    jobs: 1,
    outcomes: &[Completed, Retry],
    aborts: 1,
    ..NONE
};

/// Producers against rotation and prune.
pub const RING: Config = Config {
    name: "ring",
    sessions: &[&[enqueue(1), Commit], &[Claim(9), Commit, Finish, Commit], &[Rotate, Commit], &[Prune, Commit, Prune, Commit]],
    aborts: 1,
    ..NONE
};

/// A prune that is broken off at any point.
pub const PRUNE_CRASH: Config = Config {
    name: "prune-crash",
    sessions: &[&[Finish, Commit], &[Prune, Commit, Prune, Commit, Prune, Commit], &[enqueue(1), Commit], &[Rotate, Commit]],
    jobs: 1,
    running: 1,
    sealed: true,
    crashes: 1,
    aborts: 1,
    ..NONE
};

/// A waiting job is carried while it is claimed.
pub const CARRY_WAITING: Config = Config {
    name: "carry-waiting",
    sessions: &[&[Carry, Commit], &[Claim(9), Commit, Finish, Commit], &[Prune, Commit, Prune, Commit]],
    jobs: 2,
    sealed: true,
    aborts: 1,
    ..NONE
};

/// While a scan goes on, a guard that it has passed is rolled back, the job runs as a hole, ends, and is carried.
pub const CARRY_PASSED: Config = Config {
    name: "carry-passed",
    sessions: &[&[Claim(9), Commit], &[Cancel(1), Commit], &[Claim(1), Commit, Finish, Commit], &[Carry, Commit]],
    jobs: 1,
    sealed: true,
    aborts: 1,
    ..NONE
};

/// A running job is carried while it ends.
pub const CARRY_RUNNING: Config = Config {
    name: "carry-running",
    sessions: &[&[Carry, Commit], &[Finish, Commit], &[Cancel(1), Commit], &[Prune, Commit, Prune, Commit]],
    jobs: 1,
    running: 1,
    sealed: true,
    aborts: 1,
    crashes: 1,
    ..NONE
};

pub const SMALL: &[Config] = &[
    ENQUEUE_CLAIM,
    ENQUEUE_ABORT,
    ENQUEUE_CRASH,
    SCHEDULED,
    HOLES,
    STALE_PLANS,
    GAPS_ALONE,
    ATTEMPT,
    ATTEMPT_CRASH,
    RESCUE,
    CANCEL,
    OWN_EXITS,
    RING,
    PRUNE_CRASH,
    CARRY_WAITING,
    CARRY_RUNNING,
];

/// Longer scripts, more failures, crashes everywhere. The largest are not seen to their end (`check::STEPS_MAX`).
pub const LARGE: &[Config] = &[
    Config {
        name: "enqueue-claim, large",
        sessions: &[&[enqueue(2), Commit], &[enqueue(2), Commit], &[Claim(9), Commit, Claim(9), Commit], &[Claim(1), Commit]],
        aborts: 2,
        ..ENQUEUE_CLAIM
    },
    Config {
        name: "enqueue-crash, large",
        sessions: &[&[enqueue(2), Commit], &[enqueue(1), Commit, enqueue(1), Commit], &[Claim(2), Commit, Claim(9), Commit]],
        crashes: 2,
        aborts: 1,
        ..ENQUEUE_CRASH
    },
    Config { name: "scheduled, large", ticks: 2, aborts: 2, crashes: 1, ..SCHEDULED },
    Config { name: "holes, large", jobs: 3, aborts: 3, crashes: 1, ..HOLES },
    GAPS,
    Config { name: "gaps, large", aborts: 1, crashes: 1, ..GAPS_ALONE },
    Config { name: "attempt, large", outcomes: &[Completed, Retry, Snooze], aborts: 2, crashes: 1, ..ATTEMPT },
    Config { name: "attempt-crash, large", outcomes: &[Completed, Retry], aborts: 2, crashes: 2, ..ATTEMPT_CRASH },
    Config { name: "cancel, large", aborts: 2, crashes: 1, ..CANCEL },
    Config { name: "own-exits, large", aborts: 2, crashes: 1, ..OWN_EXITS },
    Config { name: "ring, large", aborts: 2, crashes: 1, ..RING },
    Config { name: "prune-crash, large", aborts: 2, crashes: 2, ..PRUNE_CRASH },
    Config { name: "carry-waiting, large", aborts: 2, crashes: 1, ..CARRY_WAITING },
    CARRY_PASSED,
    Config { name: "carry-passed, large", jobs: 2, ..CARRY_PASSED },
    Config { name: "rescue, large", aborts: 2, crashes: 1, ..RESCUE },
    Config { name: "stale-plans, large", jobs: 2, aborts: 2, ..STALE_PLANS },
    Config { name: "carry-running, large", aborts: 2, crashes: 2, ..CARRY_RUNNING },
];
