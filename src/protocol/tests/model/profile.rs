//! What kind of schedule: how many sessions, what they like to do, how often the world ends.

#[derive(Clone, Copy, Debug)]
pub struct Profile {
    pub name: &'static str,
    pub sessions: usize,
    pub steps: u64,
    /// In-flight entries of one partition.
    pub pool: usize,
    pub ring_limit: usize,
    pub priorities: usize,
    /// Rows of one registration, at most.
    pub rows: usize,
    pub scheduled_permille: u32,
    /// Weights of the verbs of an idle session.
    pub weights: [usize; 11],
    pub error_permille: u32,
    /// Per hundred thousand steps.
    pub crash: usize,
    pub rebuild: usize,
    pub rotate: usize,
    pub prune: usize,
    pub clock_jump: usize,
    pub repeatable_read_permille: u32,
    /// Calls of `claim` run without interruption, by session 0 only, and always commit: order can be checked.
    pub ordered: bool,
}

pub const PRODUCE: usize = 0;
pub const CLAIM: usize = 1;
pub const FINISH: usize = 2;
pub const CANCEL: usize = 3;
pub const SAVEPOINT: usize = 4;
pub const RELEASE: usize = 5;
pub const ROLLBACK_TO: usize = 6;
pub const COMMIT: usize = 7;
pub const ABORT: usize = 8;
pub const PREPARE: usize = 9;
pub const CARRY: usize = 10;

const MIXED: Profile = Profile {
    name: "mixed",
    sessions: 6,
    steps: 1_500,
    pool: 24,
    ring_limit: 6,
    priorities: 2,
    rows: 4,
    scheduled_permille: 350,
    weights: [30, 40, 30, 8, 12, 5, 5, 50, 10, 1, 10],
    error_permille: 8,
    crash: 60,
    rebuild: 60,
    rotate: 400,
    prune: 600,
    clock_jump: 100,
    repeatable_read_permille: 60,
    ordered: false,
};

/// Many unfinished transactions: gaps, promises, inserters and the ring run out of room.
const CROWD: Profile = Profile {
    name: "crowd",
    sessions: 220,
    steps: 4_000,
    pool: 16,
    rows: 16,
    weights: [150, 25, 8, 1, 2, 0, 0, 4, 1, 0, 1],
    error_permille: 1,
    crash: 2,
    rebuild: 2,
    rotate: 20,
    priorities: 1,
    ..MIXED
};

/// Few sessions with hundreds of subtransactions each.
const SAVEPOINTS: Profile = Profile {
    name: "savepoints",
    sessions: 8,
    steps: 3_000,
    rows: 2,
    weights: [60, 25, 15, 2, 60, 20, 8, 3, 1, 0, 3],
    error_permille: 3,
    crash: 20,
    rebuild: 10,
    priorities: 1,
    ..MIXED
};

/// Everybody wants to end the same few attempts.
const CONTENTION: Profile = Profile {
    name: "contention",
    sessions: 7,
    steps: 1_200,
    pool: 8,
    rows: 2,
    weights: [10, 40, 60, 40, 20, 8, 14, 40, 20, 0, 15],
    error_permille: 15,
    priorities: 1,
    ..MIXED
};

const CRASHES: Profile = Profile {
    name: "crashes",
    sessions: 5,
    steps: 1_200,
    crash: 1_000,
    rebuild: 200,
    weights: [35, 40, 30, 10, 8, 4, 4, 50, 10, 4, 12],
    ..MIXED
};

/// One lane, one small pool, claims that come back all the time.
const HOLES: Profile = Profile {
    name: "holes",
    sessions: 5,
    steps: 1_000,
    pool: 6,
    rows: 5,
    weights: [30, 50, 15, 15, 15, 4, 15, 25, 30, 0, 10],
    error_permille: 25,
    priorities: 1,
    scheduled_permille: 200,
    ..MIXED
};

const ROTATIONS: Profile = Profile {
    name: "rotations",
    sessions: 6,
    steps: 2_000,
    ring_limit: 20,
    priorities: 4,
    rotate: 3_000,
    prune: 3_000,
    weights: [70, 15, 15, 3, 5, 2, 2, 50, 10, 1, 12],
    ..MIXED
};

/// Nobody claims: tracks of many segments pile up.
const TRACKS: Profile = Profile {
    name: "tracks",
    steps: 3_000,
    ring_limit: 30,
    priorities: 4,
    rotate: 1_000,
    prune: 300,
    crash: 30,
    scheduled_permille: 500,
    weights: [70, 4, 4, 1, 5, 2, 2, 50, 10, 1, 8],
    ..MIXED
};

const ORDERED: Profile = Profile {
    name: "ordered",
    sessions: 6,
    steps: 1_200,
    pool: 500,
    priorities: 1,
    weights: [40, 40, 40, 0, 10, 5, 4, 60, 6, 0, 0],
    error_permille: 0,
    crash: 0,
    rebuild: 0,
    rotate: 0,
    prune: 0,
    repeatable_read_permille: 0,
    ordered: true,
    ..MIXED
};

/// The large ones are slow: each gets one seed in sixteen.
pub fn of_seed(seed: u64) -> Profile {
    match seed % 16 {
        0 => CROWD,
        1 => SAVEPOINTS,
        2 => TRACKS,
        n => [MIXED, CONTENTION, CRASHES, HOLES, ROTATIONS, ORDERED, MIXED][n as usize % 7],
    }
}
