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
            _ => return None,
        })
    }

    /// The job is finished, not only this copy of it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Retry => "retry",
            Self::Snooze => "snooze",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Moved => "moved",
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
