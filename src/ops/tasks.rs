//! The tasks of maintenance: one step of each, bounded, in the caller's transaction. The maintainer and the SQL functions call the same.

use awa_protocol::overdue::Overdue;

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::Frontier;
use crate::ops::{carry, deferred, prune, rescue, retention, rotate};

/// In the order of urgency: a stuck job first, space later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    RescueExpiredDeadlines,
    RescueStaleHeartbeats,
    PromoteDeferred,
    Rotate,
    CarryForward,
    Prune,
    Retention,
}

impl Task {
    pub const ALL: [Self; 7] = [
        Self::RescueExpiredDeadlines,
        Self::RescueStaleHeartbeats,
        Self::PromoteDeferred,
        Self::Rotate,
        Self::CarryForward,
        Self::Prune,
        Self::Retention,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::RescueExpiredDeadlines => "rescue_expired_deadlines",
            Self::RescueStaleHeartbeats => "rescue_stale_heartbeats",
            Self::PromoteDeferred => "promote_deferred",
            Self::Rotate => "rotate",
            Self::CarryForward => "carry_forward",
            Self::Prune => "prune",
            Self::Retention => "retention",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }
}

/// What one step of a task did.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub outcome: &'static str,
    /// Jobs or rows handled.
    pub rows: i64,
    pub generation: Option<i64>,
    pub slot: Option<i32>,
    pub detail: Option<String>,
    /// There is more to do at once: the next step should not wait for the next tick.
    pub more: bool,
    /// Somebody should look at what `detail` says.
    pub trouble: bool,
}

impl Outcome {
    pub fn new(outcome: &'static str) -> Self {
        Self { outcome, rows: 0, generation: None, slot: None, detail: None, more: false, trouble: false }
    }

    pub fn skipped(outcome: &'static str, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..Self::new(outcome) }
    }

    /// Somebody was in the way. Over and over again, that is worth a look.
    pub fn is_held_up(&self) -> bool {
        matches!(self.outcome, "blocked" | "skipped_busy")
    }

    pub fn of_segment(outcome: &'static str, generation: i64, slot: i32) -> Self {
        Self { generation: Some(generation), slot: Some(slot), ..Self::new(outcome) }
    }
}

/// Is the error the fault of the row, or of the segment, that was being handled? A cancel, a lock, a lack of memory or disk or a rebuild is
/// not: the step ends, and is tried again.
pub fn is_of_a_row(error: &Error) -> bool {
    let class = |code: Code| code as i32 & 0xFFF;
    let others = [
        Code::ERRCODE_QUERY_CANCELED,
        Code::ERRCODE_INSUFFICIENT_RESOURCES,
        Code::ERRCODE_TRANSACTION_ROLLBACK,
        Code::ERRCODE_INVALID_TRANSACTION_STATE,
    ];
    error.code != Code::ERRCODE_LOCK_NOT_AVAILABLE && !others.into_iter().any(|code| class(code) == class(error.code))
}

/// One step in a session that comes back at each tick: it remembers what needs no look for a while.
pub fn run_at_tick(frontier: &Frontier, task: Task) -> Result<Outcome> {
    match task {
        Task::PromoteDeferred => deferred::promote_if_due(frontier),
        Task::Retention => retention::expire_if_due(frontier),
        other => run(frontier, other),
    }
}

/// One step: only what is due by the policy of the settings.
pub fn run(frontier: &Frontier, task: Task) -> Result<Outcome> {
    match task {
        Task::RescueExpiredDeadlines => rescue::rescue(frontier, Overdue::Deadline),
        Task::RescueStaleHeartbeats => rescue::rescue(frontier, Overdue::Heartbeat),
        Task::Rotate => rotate::rotate_if_due(frontier),
        Task::Prune => prune::prune_if_due(frontier),
        Task::Retention => retention::expire(frontier),
        Task::PromoteDeferred => deferred::promote(frontier),
        Task::CarryForward => carry::carry_forward(frontier),
    }
}
