//! How often each task comes, in multiples of `awa.maintenance_interval`. Named by name: a task without a line here is a slow one.

use awa_protocol::schedule::Pace;

use crate::ops::tasks::Task;

pub fn of(task: Task) -> Pace {
    let (every, urgent) = match task.name() {
        "rescue_expired_deadlines" | "rescue_stale_heartbeats" | "promote_deferred" => (1, true),
        "rotate" => (1, false),
        "carry_forward" | "prune" => (5, false),
        _ => (60, false),
    };
    Pace { every, urgent }
}
