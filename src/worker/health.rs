//! The doctor's look at the background workers. From shared memory only.

use awa_protocol::schedule::State;

use super::shared::{self, Place, Standing};
use crate::ops::doctor::Check;
use crate::ops::tasks::Task;
use crate::pg::xact;
use crate::settings;

pub fn checks(place: Option<&Place>, checks: &mut Vec<Check>) {
    let Some(workers) = shared::workers() else { return };
    let (launcher, starving) = workers.with_desk(|desk| (desk.launcher, desk.starving_since));
    let in_recovery = xact::in_recovery();
    checks.push(match launcher {
        0 if in_recovery => Check::ok("launcher", "It starts when the server is promoted."),
        0 => Check::error(
            "launcher",
            "The launcher does not run.",
            "Look into the server log; max_worker_processes may be too small.",
        ),
        pid => Check::ok("launcher", format!("Process {pid}.")),
    });
    checks.push(if starving == 0 {
        Check::ok("worker_slots", "Every maintainer that was needed could be started.")
    } else {
        let detail =
            format!("The server has had no place for another maintainer for {} s.", (xact::now() - starving) / 1_000_000);
        let hint = "Raise max_worker_processes and restart the server.";
        // With a maintainer here, another database is concerned.
        let concerned = place.is_none_or(|place| place.pid == 0);
        if concerned { Check::error("worker_slots", detail, hint) } else { Check::warning("worker_slots", detail, hint) }
    });
    checks.push(maintainer(place, in_recovery));
    let Some(place) = place.filter(|place| place.pid != 0) else { return };
    if place.standing == Standing::Working {
        // A step may take long; that nothing has happened for so long is still worth a look.
        let age = xact::now().saturating_sub(place.last_look);
        let limit = (10 * settings::maintenance_interval()).max(60_000_000);
        let detail = format!("It last looked around {} s ago.", age / 1_000_000);
        checks.push(if age <= limit {
            Check::ok("last_look", detail)
        } else {
            Check::warning("last_look", detail, "See pg_stat_activity for what its process waits for.")
        });
        checks.extend(tasks(place));
    }
}

fn maintainer(place: Option<&Place>, in_recovery: bool) -> Check {
    const NAME: &str = "maintainer";
    let Some(place) = place else {
        return if in_recovery {
            Check::ok(NAME, "It starts when the server is promoted.")
        } else {
            Check::error(NAME, "None was started for this database.", "Look at the checks launcher and worker_slots.")
        };
    };
    match place.standing {
        Standing::Working => Check::ok(NAME, format!("Process {} works.", place.pid)),
        Standing::Idle if place.reason.starts_with("no queue") => {
            Check::ok(NAME, format!("Process {} is idle: {}.", place.pid, place.reason))
        }
        Standing::Idle => Check::warning(
            NAME,
            format!("Process {} is idle: {}.", place.pid, place.reason),
            "Jobs that need rescue, and old segments, stay until it works.",
        ),
        Standing::Waiting => Check::error(
            NAME,
            format!("It does not run: {}.", place.reason),
            "The launcher tries again by itself; look into the server log.",
        ),
        Standing::Starting | Standing::Looking | Standing::Free => Check::ok(NAME, "It is starting."),
    }
}

fn tasks(place: &Place) -> Vec<Check> {
    let mut found = Vec::new();
    for (stat, task) in place.tasks.iter().zip(Task::ALL) {
        match stat.state {
            State::Failing => found.push(Check::error(
                "task",
                format!("Task {} fails: {}.", task.name(), stat.error),
                "It is tried again by itself; the server log has the details.",
            )),
            State::Throttled | State::CoolingDown => found.push(Check::warning(
                "task",
                format!("Task {} takes longer than its interval: {} ms.", task.name(), stat.last_duration / 1000),
                "It runs less often. Raise awa.maintenance_interval, or look for what slows it down.",
            )),
            State::Idle | State::Ok => {}
        }
    }
    if found.is_empty() {
        found.push(Check::ok("task", "No task fails or is throttled."));
    }
    found
}
