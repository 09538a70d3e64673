//! The launcher: one for the server, connected to no database. It sees to it that each database with the extension has a maintainer.
//!
//! Tables read: pg_database. Writes nothing, takes no transaction id. A database is looked at by starting a maintainer in it, which leaves
//! again if there is no extension; one such look at a time. What it knows lives in its own memory and is found anew after a restart;
//! who works where is in `shared`. Waits only in its sleep.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use awa_protocol::schedule::restart_pause;
use pgrx::PgSqlErrorCode as Code;

use super::shared::{self, Standing, Verdict, Workers, line};
use crate::error::Error;
use crate::pg::bgworker::{self, Handle, Worker};
use crate::pg::shmem::WaitEvent;
use crate::pg::{call, databases, xact};

/// The list of databases is read again after so long, for those that came without a message.
const LIST_EVERY: Duration = Duration::from_secs(60);
/// A database without the extension is looked at again after so long (a prepared transaction may have created it), one each `LOOK_EVERY`.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// When the server has no place for a worker.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// A maintainer that worked for so long did not fail to start.
const GOOD_LIFE: Duration = Duration::from_secs(60);
/// A start that takes longer is held up (by a lock on its database, say): others do not wait for it any more.
const LOOK_ALONE_FOR: Duration = Duration::from_secs(5);
/// A worker that has not begun after so long will not.
const START_LIMIT: Duration = Duration::from_secs(60);

enum Case {
    /// To be looked at.
    Due,
    Started {
        place: usize,
        /// None: an earlier launcher has started it.
        handle: Option<Handle>,
        at: Instant,
    },
    WithoutExtension {
        since: Instant,
    },
    Paused {
        until: Instant,
    },
}

struct Known {
    name: String,
    /// False: it was dropped, became a template, or takes no connections any more; known only until its worker has ended.
    listed: bool,
    case: Case,
    failures: u32,
    /// The server had no place for its worker when it was last to be started.
    starves: bool,
}

impl Known {
    fn new(case: Case) -> Self {
        Self { name: String::new(), listed: true, case, failures: 0, starves: false }
    }
}

struct Launcher {
    workers: &'static Workers,
    known: HashMap<u32, Known>,
    listed: Option<Instant>,
    last_look: Instant,
    /// What was complained about, so that it is not repeated.
    starving: bool,
    crowded: bool,
}

pub fn run(_arg: u64) {
    let Some(workers) = shared::workers() else { return };
    bgworker::at_exit(shared::on_launcher_exit);
    bgworker::connect(None);
    bgworker::lift_timeouts();
    // It waits for a lock on pg_database as long as the lock is there, as it would for every session that connects.
    bgworker::fix_setting(c"lock_timeout", c"0");
    bgworker::fix_setting(c"default_transaction_isolation", c"read committed");
    workers.with_desk(|desk| desk.launcher = xact::my_pid());
    let event = WaitEvent::named(c"AwaLauncherMain");
    let mut launcher =
        Launcher { workers, known: HashMap::new(), listed: None, last_look: Instant::now(), starving: false, crowded: false };
    launcher.adopt_workers();
    loop {
        let pause = launcher.round();
        let pause = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX).saturating_add(1);
        let sleeper = workers.launcher_sleeper();
        sleeper.prepare();
        bgworker::sleep(if workers.has_news() { 0 } else { pause }, event);
        sleeper.cancel();
    }
}

impl Launcher {
    /// Maintainers that an earlier launcher has started go on. A place that waits is known, too: its database may have gone meanwhile.
    fn adopt_workers(&mut self) {
        for place in 0..self.workers.places() {
            let (database, standing) = self.workers.with_place(place, |place| (place.database, place.standing));
            let case = match standing {
                Standing::Free => continue,
                Standing::Waiting => Case::Due,
                Standing::Starting | Standing::Looking | Standing::Idle | Standing::Working => {
                    Case::Started { place, handle: None, at: Instant::now() }
                }
            };
            self.known.insert(database, Known::new(case));
        }
    }

    /// Does what there is to do; gives the time until there may be more without a message.
    fn round(&mut self) -> Duration {
        let orders = self.workers.take_orders();
        let unknown = orders.announced.iter().any(|database| !self.known.contains_key(database));
        let now = Instant::now();
        if unknown || orders.databases_changed || orders.look_everywhere || self.listed.is_none_or(|at| now - at >= LIST_EVERY) {
            self.list_databases(now);
        }
        for (database, known) in &mut self.known {
            let announced = orders.look_everywhere || orders.announced.contains(database);
            if announced && !matches!(known.case, Case::Started { .. }) {
                known.case = Case::Due;
            }
        }
        self.collect_ended(now);
        self.workers.drop_dead_holds();
        self.start_what_is_due(now);
        self.see_who_starves();
        self.pause(now)
    }

    /// Nobody any more: each was started, or its database has gone.
    fn see_who_starves(&mut self) {
        if self.starving && !self.known.values().any(|known| known.starves) {
            self.starving = false;
            self.workers.with_desk(|desk| desk.starving_since = 0);
            call::log("no database lacks a background worker of awa_queue any more".to_owned());
        }
    }

    fn list_databases(&mut self, now: Instant) {
        let found = match bgworker::run_transaction(c"awa_queue: list of databases", || Ok(databases::open_to_connections())) {
            Ok(found) => found,
            Err(error) => {
                call::warn(error);
                return;
            }
        };
        self.listed = Some(now);
        for known in self.known.values_mut() {
            known.listed = false;
        }
        for database in found {
            let known = self.known.entry(database.oid).or_insert_with(|| Known::new(Case::Due));
            known.name = database.name;
            known.listed = true;
        }
        self.forget_unlisted();
    }

    fn forget_unlisted(&mut self) {
        let workers = self.workers;
        self.known.retain(|database, known| {
            if known.listed {
                return true;
            }
            if let Case::Started { place, .. } = known.case {
                workers.ask_to_leave(place);
                return true;
            }
            if let Some(place) = workers.place_of(*database) {
                workers.free_place(place);
            }
            false
        });
    }

    fn collect_ended(&mut self, now: Instant) {
        let workers = self.workers;
        for (database, known) in &mut self.known {
            let Case::Started { place, handle, at } = &known.case else { continue };
            let (pid, standing, verdict) = workers.with_place(*place, |place| (place.pid, place.standing, place.verdict));
            let begun = standing != Standing::Starting || verdict != Verdict::Unknown;
            let over = if begun {
                pid == 0
            } else {
                // The handle may say so just before the worker takes its place: its place is then looked at again here.
                let never = handle.as_ref().is_some_and(Handle::is_over) || now - *at > START_LIMIT;
                never && workers.with_place(*place, |place| place.pid == 0)
            };
            if !over {
                continue;
            }
            let (place, life) = (*place, now - *at);
            if !known.listed {
                // Forgotten below.
                known.case = Case::Due;
                continue;
            }
            match verdict {
                Verdict::NoExtension => {
                    workers.free_place(place);
                    known.case = Case::WithoutExtension { since: now };
                    known.failures = 0;
                }
                Verdict::Stopped => {
                    workers.keep_waiting(place, &line("asked to leave"));
                    known.case = Case::Due;
                }
                Verdict::Unknown => {
                    known.failures = if life >= GOOD_LIFE { 1 } else { known.failures.saturating_add(1) };
                    let pause = Duration::from_micros(restart_pause(known.failures).unsigned_abs());
                    workers.keep_waiting(place, &line("ended unexpectedly; see the server log"));
                    call::log(format!(
                        "awa_queue maintainer of database \"{}\" (OID {database}) ended, is started again in {} s",
                        known.name,
                        pause.as_secs()
                    ));
                    known.case = Case::Paused { until: now + pause };
                }
            }
        }
        self.forget_unlisted();
    }

    fn start_what_is_due(&mut self, now: Instant) {
        // One look at a time, for as long as looks take: so a server with many databases does not fill with workers.
        let looking = self.known.values().any(|known| match known.case {
            Case::Started { place, at, .. } if now - at < LOOK_ALONE_FOR => {
                self.workers.with_place(place, |place| matches!(place.standing, Standing::Starting | Standing::Looking))
            }
            _ => false,
        });
        if looking {
            return;
        }
        let due = |known: &Known| match known.case {
            Case::Due => Some(0),
            Case::Paused { until } if until <= now => Some(1),
            Case::WithoutExtension { since } if now - since >= LOOK_AGAIN_AFTER && now - self.last_look >= LOOK_EVERY => Some(2),
            _ => None,
        };
        let mut waiting: Vec<(u8, u32)> =
            self.known.iter().filter_map(|(database, known)| due(known).map(|order| (order, *database))).collect();
        waiting.sort_unstable();
        for (_, database) in waiting {
            if !self.workers.is_held(database) {
                self.start(database, now);
                return;
            }
        }
    }

    fn start(&mut self, database: u32, now: Instant) {
        let Some(known) = self.known.get_mut(&database) else { return };
        let pause = Case::Paused { until: now + TRY_AGAIN_AFTER };
        let Some(place) = self.workers.prepare_place(database) else {
            known.case = Case::Paused { until: now + LIST_EVERY };
            if !std::mem::replace(&mut self.crowded, true) {
                call::warn(
                    Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "too many databases have awa_queue on this server")
                        .detail(format!("Database \"{}\" gets no maintainer.", known.name))
                        .hint("Raise awa.max_databases and restart the server."),
                );
            }
            return;
        };
        self.last_look = now;
        let worker = Worker {
            name: &format!("awa_queue maintainer of {}", known.name),
            kind: "awa_queue maintainer",
            function: "awa_maintainer_main",
            arg: (u64::from(database) << 32) | place as u64,
            restart: None,
        };
        match worker.start() {
            Some(handle) => {
                known.case = Case::Started { place, handle: Some(handle), at: now };
                known.starves = false;
            }
            None => {
                known.case = pause;
                known.starves = true;
                self.workers.keep_waiting(place, &line("the server has no place for another background worker"));
                if !std::mem::replace(&mut self.starving, true) {
                    let since = xact::now();
                    self.workers.with_desk(|desk| desk.starving_since = since);
                    call::warn(
                        Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "out of background worker slots")
                            .detail(format!("The awa_queue maintainer of database \"{}\" could not be started.", known.name))
                            .hint("Raise max_worker_processes and restart the server."),
                    );
                }
            }
        }
    }

    fn pause(&self, now: Instant) -> Duration {
        let mut pause = self.listed.map_or(Duration::from_secs(1), |at| (at + LIST_EVERY).saturating_duration_since(now));
        for known in self.known.values() {
            let next = match known.case {
                Case::Due => Some(now + Duration::from_secs(1)), // held, or another one is being looked at
                Case::Paused { until } => Some(until),
                Case::WithoutExtension { since } => Some((since + LOOK_AGAIN_AFTER).max(self.last_look + LOOK_EVERY)),
                // A worker tells of its end; one that never begins does not.
                Case::Started { at, .. } if now - at < START_LIMIT => Some(now + Duration::from_secs(2)),
                Case::Started { .. } => None,
            };
            if let Some(next) = next {
                pause = pause.min(next.saturating_duration_since(now));
            }
        }
        pause.max(Duration::from_millis(1))
    }
}
