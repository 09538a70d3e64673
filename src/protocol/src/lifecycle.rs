//! How an attempt may end, and what a caller who wants to end it is told.

/// The evidence that closes a copy of a job. The letter is what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    Completed = b'd',
    Retry = b'r',
    Snooze = b's',
    Failed = b'f',
    Cancelled = b'c',
    Moved = b'm',
    /// Failed for good, and kept as a dead letter: the job has left the ring.
    DeadLettered = b'l',
    /// A finished job is tried again: its next copy was appended. Supersedes the evidence of the end.
    Redriven = b'v',
    /// A finished job was deleted. Supersedes the evidence of the end.
    Removed = b'x',
}

impl Outcome {
    pub fn from_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'd' => Self::Completed,
            b'r' => Self::Retry,
            b's' => Self::Snooze,
            b'f' => Self::Failed,
            b'c' => Self::Cancelled,
            b'm' => Self::Moved,
            b'l' => Self::DeadLettered,
            b'v' => Self::Redriven,
            b'x' => Self::Removed,
            _ => return None,
        })
    }

    /// The job is finished, not only this copy of it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::DeadLettered | Self::Removed)
    }

    /// The finished job is shown and counted where its copy lies.
    pub fn is_history(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// An operator may have the job tried again.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Failed | Self::Cancelled | Self::DeadLettered)
    }

    /// May this evidence follow that one for the same copy? Then this one counts, whatever the order of the rows.
    pub fn supersedes(self, before: Self) -> bool {
        match self {
            Self::Redriven => matches!(before, Self::Failed | Self::Cancelled),
            Self::Removed => before.is_history(),
            _ => false,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Retry => "retry",
            Self::Snooze => "snooze",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Moved => "moved",
            Self::DeadLettered => "dead_lettered",
            Self::Redriven => "redriven",
            Self::Removed => "removed",
        }
    }
}

/// What a worker asks for when an attempt fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureVerdict {
    Retry,
    Failed,
}

impl FailureVerdict {
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Retry => Outcome::Retry,
            Self::Failed => Outcome::Failed,
        }
    }
}

/// Exhaustion is decided here and nowhere else. `attempt` is the number of the attempt that failed, from 1.
pub fn after_failure(attempt: i32, max_attempts: i32, is_final: bool) -> FailureVerdict {
    if is_final || attempt >= max_attempts { FailureVerdict::Failed } else { FailureVerdict::Retry }
}
