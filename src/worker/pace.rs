//! How often each task comes, in multiples of `awa.maintenance_interval`.

use awa_protocol::schedule::Pace;

use crate::ops::tasks::Task;

pub fn of(task: Task) -> Pace {
    match task {
        Task::Rotate => Pace { every: 1, urgent: false },
        Task::Prune => Pace { every: 5, urgent: false },
    }
}
