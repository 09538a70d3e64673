//! A history: what each session asked for, when, what it was told, and what became of its transaction. Pure data; ticks come from one
//! clock that all sessions share, so a call that was answered before another was made has the lower ticks.

use std::collections::BTreeMap;

pub type Tick = u64;

/// Asked, answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from: Tick,
    pub to: Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Yes,
    No,
    /// The connection was lost when it was decided.
    Maybe,
}

#[derive(Clone, Debug)]
pub struct NewJob {
    /// Is in the arguments of the job: a job of a lost answer is known by it.
    pub token: i64,
    pub job_id: i64,
    pub queue: usize,
    pub priority: i32,
    /// Has a run_at: its place is not that of its enqueue.
    pub timed: bool,
}

#[derive(Clone, Debug)]
pub struct Handed {
    pub job_id: i64,
    pub lease: i64,
    pub token: i64,
    pub attempt: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Completed,
    /// For good, as a dead letter or not.
    Failed,
    Retry,
    Snooze,
    Already,
    Conflict,
    Stale,
    Uncommitted,
}

impl Word {
    pub fn is_exit(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Retry | Self::Snooze)
    }

    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }
}

#[derive(Clone, Debug)]
pub enum Did {
    Enqueued(Vec<NewJob>),
    Claimed {
        jobs: Vec<Handed>,
        /// They have deadlines or heartbeats that rescue finds passed.
        mortal: bool,
        /// Sees what others have committed: jobs come in order.
        in_order: bool,
    },
    Ended { job_id: i64, lease: i64, word: Word },
    Cancelled { job_id: i64 },
    Redriven { job_id: i64 },
    Deleted { job_id: i64 },
}

#[derive(Clone, Debug)]
pub struct Call {
    pub at: Span,
    pub did: Did,
    /// When a rollback to a savepoint that undid it was asked for.
    pub undone: Option<Tick>,
}

#[derive(Clone, Debug)]
pub struct Transaction {
    pub calls: Vec<Call>,
    pub fate: Fate,
    /// When its end was asked for, and known. Of a session that was killed: since when it may have ended.
    pub end: Span,
    /// One statement outside of a block: a claim in it may be lost by a crash.
    pub single: bool,
}

/// What happened beside the sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    Rescue,
    Carry,
    Rebuild,
    /// All sessions were killed.
    Crash,
    /// A claim whose answer was lost: it may have taken any job.
    LostClaim,
    /// Enqueues whose answer was lost: jobs that nobody knows may be there.
    LostEnqueue,
    /// A transaction whose session was killed: it may take a while to end.
    Killed,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub transactions: Vec<Transaction>,
    pub beside: Vec<(Beside, Span)>,
}

/// What is shown when everything is over.
#[derive(Clone, Debug, Default)]
pub struct Final {
    /// State and token of each job.
    pub jobs: BTreeMap<i64, (String, i64)>,
    pub shown_twice: Vec<i64>,
}
