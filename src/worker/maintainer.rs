//! The maintainer of one database: looks whether there is anything to do for it, and runs the tasks that are due, one step a transaction.
//!
//! Holds no lock and no snapshot while it sleeps. Leaves with 0 when the extension is gone or when it is asked to; an error outside a
//! step ends it with 1 and the launcher starts it again. It works only if the library's version is the extension's, and if the first verb
//! or `awa.adopt()` has made this server the owner of the jobs; else it stays, says why, and looks again at each tick.

use std::ffi::{CStr, CString};
use std::time::Instant;

use awa_protocol::schedule::{End, Next, Pace, Schedule, State};
use pgrx::PgSqlErrorCode as Code;

use super::pace;
use super::shared::{self, Line, Standing, Verdict, Workers, line};
use crate::error::{Error, Result};
use crate::frontier::{Frontier, ledger_oid};
use crate::ops::tasks::{self, Outcome, Task};
use crate::pg::shmem::WaitEvent;
use crate::pg::{bgworker, call, sql, xact};
use crate::settings;
use crate::store::{extension, instance};

/// What a look has found.
#[expect(clippy::large_enum_variant, reason = "one value at a time")]
enum Found {
    NoExtension,
    Idle(Line),
    Ready,
}

struct Maintainer {
    workers: &'static Workers,
    place: usize,
    schedule: Schedule,
    /// Microseconds since then: a clock that never goes back.
    origin: Instant,
    activities: Vec<CString>,
    /// What was said last about each task, and about the whole.
    complaints: Vec<Option<String>>,
    state: (Standing, Line),
    /// For the log.
    database: String,
}

pub fn run(arg: u64) {
    let (place, database) = ((arg & 0xffff_ffff) as usize, (arg >> 32) as u32);
    let Some(workers) = shared::workers() else { return };
    bgworker::at_exit(shared::on_maintainer_exit);
    if !workers.begin(place, database) {
        return;
    }
    bgworker::connect(Some(database));
    fix_settings();
    let event = WaitEvent::named(c"AwaMaintainerMain");
    let paces: Vec<Pace> = Task::ALL.into_iter().map(pace::of).collect();
    let mut maintainer = Maintainer {
        workers,
        place,
        schedule: Schedule::new(paces, settings::maintenance_interval(), 0),
        origin: Instant::now(),
        activities: Task::ALL.into_iter().map(activity).collect(),
        complaints: vec![None; Task::ALL.len()],
        state: (Standing::Looking, Line::new()),
        database: bgworker::run_transaction(c"awa_queue: name", || Ok(xact::database_name())).unwrap_or_default(),
    };
    let verdict = maintainer.work(event);
    workers.leave(place, verdict);
}

fn activity(task: Task) -> CString {
    CString::new(format!("awa_queue: {}", task.name())).unwrap_or_default()
}

/// What a database or a role may set for its sessions must not change what a task does. A lock that is not free soon is waited for at
/// the next tick: so no session with a lock of its own can stop the rescue of jobs for long, and where a maintainer and a command (DROP
/// EXTENSION takes its locks in an order of its own) wait for each other, it is the maintainer that gives up, long before the
/// command's deadlock_timeout. A commit waits for no standby: one that is missing would keep a prune, which holds AccessExclusive, waiting
/// for ever; a failover loses no more than the end of the log, and maintenance that is lost with it is done again.
fn fix_settings() {
    bgworker::lift_timeouts();
    let fixed: [(&'static CStr, &'static CStr); 9] = [
        (c"application_name", c"awa_queue maintainer"),
        (c"search_path", c"pg_catalog, pg_temp"),
        (c"default_transaction_isolation", c"read committed"),
        (c"default_transaction_read_only", c"off"),
        (c"default_transaction_deferrable", c"off"),
        (c"lock_timeout", c"100ms"),
        (c"deadlock_timeout", c"10ms"),
        (c"row_security", c"off"),
        (c"synchronous_commit", c"local"),
    ];
    for (name, value) in fixed {
        bgworker::fix_setting(name, value);
    }
}

impl Maintainer {
    fn now(&self) -> i64 {
        i64::try_from(self.origin.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// Until there is a reason to leave.
    fn work(&mut self, event: WaitEvent) -> Verdict {
        let sleeper = self.workers.maintainer_sleeper(self.place);
        let mut next_look = i64::MIN;
        loop {
            if self.workers.is_asked_to_leave(self.place) {
                return Verdict::Stopped;
            }
            if self.workers.take_wake(self.place) {
                self.schedule.wake(self.now());
                next_look = i64::MIN;
            }
            let tick = settings::maintenance_interval();
            self.schedule.set_tick(tick, self.now());
            if self.now() >= next_look {
                next_look = self.now().saturating_add(tick);
                match self.look() {
                    Found::NoExtension => return Verdict::NoExtension,
                    Found::Idle(reason) => self.stand(Standing::Idle, reason),
                    Found::Ready => self.stand(Standing::Working, Line::new()),
                }
            }
            let mut sleep_until = next_look;
            if self.state.0 == Standing::Working {
                match self.schedule.next(self.now()) {
                    Next::Run(index) => {
                        sleep_until = i64::MIN;
                        if !self.step(index) {
                            next_look = i64::MIN;
                        }
                    }
                    Next::SleepUntil(due) => sleep_until = due.min(next_look),
                }
                self.show_schedule();
            }
            let ms = sleep_until.saturating_sub(self.now()).saturating_add(999) / 1000;
            sleeper.prepare();
            let reloaded = if ms > 0 && !self.workers.is_asked_for(self.place) {
                bgworker::sleep(ms, event)
            } else {
                bgworker::honour_signals()
            };
            sleeper.cancel();
            if reloaded {
                next_look = i64::MIN;
            }
        }
    }

    // ---- whether ---------------------------------------------------------------------------------------------------------

    fn look(&mut self) -> Found {
        match bgworker::run_transaction(c"awa_queue: look", look) {
            Ok(found) => found,
            // Tables that are being restored, dropped or locked: there will be another look.
            // A lock in the way for a moment changes nothing; the steps would meet it, too.
            Err(error) if is_in_the_way(&error) && self.state.0 == Standing::Working => Found::Ready,
            Err(error) => Found::Idle(line(&format!("cannot look: {}", error.message))),
        }
    }

    fn stand(&mut self, standing: Standing, reason: Line) {
        self.workers.stand(self.place, standing, &reason);
        let state = (standing, reason);
        if state == self.state {
            return;
        }
        if (self.state.0, standing) == (Standing::Idle, Standing::Working) {
            // What was in the way then says nothing of now.
            self.schedule.begin_anew(self.now());
            for index in 0..Task::ALL.len() {
                self.workers.with_task(self.place, index, |stat| stat.held_up = 0);
            }
        }
        match &state {
            (Standing::Working, _) => call::log(format!("awa_queue maintainer of database \"{}\" works", self.database)),
            (_, reason) if reason.starts_with("version") => call::warn(
                Error::new(
                    Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                    format!("awa_queue maintainer of database \"{}\" does not work", self.database),
                )
                .detail(format!("It is idle: {reason}."))
                .hint("Run ALTER EXTENSION awa_queue UPDATE, or restart the server to load the installed library."),
            ),
            (_, reason) => call::log(format!("awa_queue maintainer of database \"{}\" is idle: {reason}", self.database)),
        }
        self.state = state;
    }

    // ---- what ------------------------------------------------------------------------------------------------------------

    /// False: it is not known any more whether there is anything to do here.
    fn step(&mut self, index: usize) -> bool {
        let Some(task) = Task::ALL.get(index).copied() else { return false };
        let activity = self.activities.get(index).map_or(c"awa_queue", CString::as_c_str);
        let begun = self.now();
        let begun_at = xact::now();
        let outcome = bgworker::run_transaction(activity, || tasks::run_at_tick(&Frontier::attach_here()?, task));
        let duration = self.now().saturating_sub(begun);
        let outcome = match outcome {
            Err(error) if is_in_the_way(&error) => Ok(Outcome::skipped("blocked", error.message)),
            // What a task needs may have gone with the extension.
            Err(error) => match self.look() {
                Found::Ready => Err(error),
                _ => return false,
            },
            done => done,
        };
        let end = match &outcome {
            Ok(outcome) if outcome.more => End::More,
            Ok(_) => End::Done,
            Err(_) => End::Failed,
        };
        let now = self.now();
        self.schedule.ended(index, end, duration, now);
        self.report(index, task, &outcome);
        let (shown, detail, error) = match &outcome {
            Ok(outcome) => (outcome.outcome, outcome.detail.as_deref().unwrap_or_default(), ""),
            Err(error) => ("failed", "", error.message.as_str()),
        };
        let (detail, error) = (line(detail), line(error));
        let held_up = outcome.as_ref().is_ok_and(Outcome::is_held_up);
        let trouble = outcome.as_ref().is_ok_and(|outcome| outcome.trouble);
        let rows = outcome.as_ref().map_or(0, |outcome| outcome.rows.max(0).unsigned_abs());
        self.workers.with_task(self.place, index, |stat| {
            stat.runs += 1;
            stat.rows = stat.rows.saturating_add(rows);
            stat.errors += u64::from(end == End::Failed);
            stat.last_run = begun_at;
            stat.last_duration = duration;
            stat.outcome.clear();
            let _ = stat.outcome.push_str(shown);
            if !held_up {
                stat.held_up = 0;
            } else {
                stat.held_up = stat.held_up.saturating_add(1);
                if stat.held_up == 1 {
                    stat.held_up_since = begun_at;
                }
            }
            if trouble {
                (stat.trouble, stat.trouble_at) = (detail.clone(), begun_at);
            }
            stat.detail = detail;
            if end == End::Failed {
                stat.error = error;
            }
        });
        true
    }

    /// A failure is told once, and again when it is another one; its end is told, too.
    fn report(&mut self, index: usize, task: Task, outcome: &Result<Outcome>) {
        let Some(complaint) = self.complaints.get_mut(index) else { return };
        match outcome {
            Err(error) if complaint.as_deref() != Some(error.message.as_str()) => {
                *complaint = Some(error.message.clone());
                let mut shown = Error::new(
                    error.code,
                    format!("maintenance task \"{}\" of database \"{}\" failed: {}", task.name(), self.database, error.message),
                );
                shown.detail.clone_from(&error.detail);
                shown.hint.clone_from(&error.hint);
                call::warn(shown);
            }
            Err(_) => {}
            Ok(outcome) => {
                if complaint.take().is_some() {
                    call::log(format!("maintenance task \"{}\" of database \"{}\" works again", task.name(), self.database));
                }
                if outcome.rows > 0 || outcome.generation.is_some() {
                    call::debug(format!("maintenance task \"{}\": {}, {} rows", task.name(), outcome.outcome, outcome.rows));
                }
            }
        }
    }

    fn show_schedule(&self) {
        let (now, wall) = (self.now(), xact::now());
        let shown: heapless::Vec<(State, i64), { awa_protocol::limits::TASKS }> = (0..Task::ALL.len())
            .map(|index| (self.schedule.state(index), wall.saturating_add(self.schedule.due(index).saturating_sub(now))))
            .collect();
        self.workers.with_place(self.place, |place| {
            for (stat, (state, due)) in place.tasks.iter_mut().zip(&shown) {
                (stat.state, stat.next_due) = (*state, *due);
            }
        });
    }
}

/// 40001 and 40P01: somebody else was faster; 55P03: a lock was not free.
fn is_in_the_way(error: &Error) -> bool {
    [Code::ERRCODE_LOCK_NOT_AVAILABLE, Code::ERRCODE_T_R_SERIALIZATION_FAILURE, Code::ERRCODE_T_R_DEADLOCK_DETECTED]
        .contains(&error.code)
}

/// In a transaction. Writes nothing.
fn look() -> Result<Found> {
    let Some(version) = extension::version()? else { return Ok(Found::NoExtension) };
    if version != env!("CARGO_PKG_VERSION") {
        let reason = format!("version {version} of the extension, version {} of the library", env!("CARGO_PKG_VERSION"));
        return Ok(Found::Idle(line(&reason)));
    }
    if !settings::maintenance() {
        return Ok(Found::Idle(line("awa.maintenance is off")));
    }
    // At each look: a restore may begin at any time.
    Ok(match sql::as_owner(ledger_oid()?, instance::owned)? {
        None => Found::Idle(line("no queue was created yet")),
        Some(false) => {
            Found::Idle(line("the jobs belong to another server or database, or a restore is under way; see awa.doctor()"))
        }
        Some(true) => Found::Ready,
    })
}
