//! The doctor's look at the background workers. From shared memory only.

use awa_protocol::schedule::State;

use super::shared::{self, Place, Standing, TaskStat};
use crate::ops::doctor::Check;
use crate::ops::tasks::Task;
use crate::pg::xact;
use crate::settings;

/// Microseconds.
const START_IS_LONG: i64 = 10_000_000;
/// A task that was held up for so long, this many ticks if that is sooner, and so often, gets nowhere.
const HELD_UP_LIMIT: i64 = 60_000_000;
const HELD_UP_TICKS: i64 = 60;
const HELD_UP_ANSWERS: u32 = 3;
/// What a task told stays to be seen: it is tried again every minute, and not mentioned meanwhile.
const TROUBLE_STAYS: i64 = 150_000_000;

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
        Standing::Working | Standing::Idle if place.pid == 0 => Check::warning(
            NAME,
            "It has ended, and was not started again yet.",
            "The launcher does it by itself: look at the check launcher, and into the server log.",
        ),
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
        Standing::Starting | Standing::Looking | Standing::Free => {
            let age = xact::now().saturating_sub(place.since);
            if age <= START_IS_LONG {
                return Check::ok(NAME, "It is starting.");
            }
            Check::warning(
                NAME,
                format!("It has been starting for {} s.", age / 1_000_000),
                "Look for a lock on the database or on a catalog: pg_locks, pg_prepared_xacts.",
            )
        }
    }
}

fn tasks(place: &Place) -> Vec<Check> {
    let found: Vec<Check> = place.tasks.iter().zip(Task::ALL).filter_map(|(stat, task)| of_task(stat, task)).collect();
    if found.is_empty() { vec![Check::ok("task", "No task fails, is held up or is throttled.")] } else { found }
}

fn of_task(stat: &TaskStat, task: Task) -> Option<Check> {
    const NAME: &str = "task";
    let (name, now) = (task.name(), xact::now());
    match stat.state {
        State::Failing => {
            let hint = "It is tried again by itself; the server log has the details.";
            return Some(Check::error(NAME, format!("Task {name} fails: {}.", stat.error), hint));
        }
        State::Throttled | State::CoolingDown => {
            let detail = format!("Task {name} takes longer than its interval: {} ms.", stat.last_duration / 1000);
            let hint = "It runs less often. Raise awa.maintenance_interval, or look for what slows it down.";
            return Some(Check::warning(NAME, detail, hint));
        }
        State::Idle | State::Ok => {}
    }
    if stat.trouble_at != 0 && now.saturating_sub(stat.trouble_at) <= TROUBLE_STAYS {
        let hint = "The others go on; these are tried again every minute. Run awa.verify().";
        return Some(Check::warning(NAME, format!("Task {name}: {}.", stat.trouble), hint));
    }
    let held_up = now.saturating_sub(stat.held_up_since);
    let limit = HELD_UP_LIMIT.min(HELD_UP_TICKS.saturating_mul(settings::maintenance_interval()));
    if stat.held_up < HELD_UP_ANSWERS || held_up <= limit {
        return None;
    }
    let detail = format!("Task {name} has been held up for {} s: {}, {}.", held_up / 1_000_000, stat.outcome, stat.detail);
    Some(Check::warning(NAME, detail, "End the sessions that hold the locks: pg_locks, pg_blocking_pids(), pg_prepared_xacts."))
}
