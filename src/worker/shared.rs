//! What launcher, maintainers and sessions share: who works where, what was asked of them, how the tasks went.
//!
//! One desk for the server, one place for each database that has (or may have) the extension. Locks: desk, then place; under them only
//! memory. A place belongs to the launcher while nobody works in it, to its maintainer while its `pid` is set.
//! `pid` is set and reset by the process itself, under the lock: while it is set, the number is that of a live process.

use std::cell::Cell;

use awa_protocol::limits::{ANNOUNCED_DATABASES, HELD_DATABASES, TASKS};
use awa_protocol::schedule::State;

use crate::frontier::wait_event;
use crate::pg::shmem::{Attached, Carver, CondVar, CondVars, Layout, LwCells};
use crate::pg::{bgworker, xact};
use crate::settings;

/// A line for people, cut where it does not fit; ASCII, so that it is right in every encoding.
pub type Line = heapless::String<200>;

pub fn line(text: &str) -> Line {
    let mut line = Line::new();
    for character in text.chars() {
        let shown = if character.is_ascii_graphic() || character == ' ' { character } else { '?' };
        if line.push(shown).is_err() {
            break;
        }
    }
    line
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Free,
    /// The server was asked for a worker, which has not begun.
    Starting,
    /// It finds out whether there is anything to do.
    Looking,
    /// It stays and looks again; `reason` says why it does not work.
    Idle,
    Working,
    /// It has gone, and will be started again; `reason` says why not now.
    Waiting,
}

/// Why a maintainer has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It did not say: killed, or an error.
    Unknown,
    NoExtension,
    /// It was asked to.
    Stopped,
}

#[derive(Clone, Debug)]
pub struct TaskStat {
    pub state: State,
    pub runs: u64,
    pub rows: u64,
    pub errors: u64,
    /// Microseconds; 0: never.
    pub last_run: i64,
    pub last_duration: i64,
    pub next_due: i64,
    pub outcome: heapless::String<32>,
    pub detail: Line,
    pub error: Line,
}

impl TaskStat {
    const fn new() -> Self {
        Self {
            state: State::Idle,
            runs: 0,
            rows: 0,
            errors: 0,
            last_run: 0,
            last_duration: 0,
            next_due: 0,
            outcome: heapless::String::new(),
            detail: Line::new(),
            error: Line::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Place {
    pub database: u32,
    pub pid: i32,
    pub standing: Standing,
    pub reason: Line,
    /// A maintainer has seen the extension there.
    pub has_extension: bool,
    pub since: i64,
    pub last_look: i64,
    pub starts: u64,
    pub verdict: Verdict,
    stop: bool,
    wake: bool,
    pub tasks: [TaskStat; TASKS],
}

impl Place {
    fn free() -> Self {
        Self {
            database: 0,
            pid: 0,
            standing: Standing::Free,
            reason: Line::new(),
            has_extension: false,
            since: 0,
            last_look: 0,
            starts: 0,
            verdict: Verdict::Unknown,
            stop: false,
            wake: false,
            tasks: [const { TaskStat::new() }; TASKS],
        }
    }

    fn stand(&mut self, standing: Standing, reason: &Line) {
        if self.standing != standing {
            self.since = xact::now();
        }
        self.standing = standing;
        self.reason.clear();
        let _ = self.reason.push_str(reason);
    }
}

#[derive(Clone, Copy)]
struct Hold {
    database: u32,
    pid: i32,
}

pub struct Desk {
    pub launcher: i32,
    holds: heapless::Vec<Hold, HELD_DATABASES>,
    announced: heapless::Vec<u32, ANNOUNCED_DATABASES>,
    /// More was announced than there was room for.
    look_everywhere: bool,
    databases_changed: bool,
    /// The launcher has something to look at.
    news: bool,
    /// Since when the server has no place for a worker of ours; 0: it has.
    pub starving_since: i64,
}

fn empty_desk() -> Desk {
    Desk {
        launcher: 0,
        holds: heapless::Vec::new(),
        announced: heapless::Vec::new(),
        look_everywhere: false,
        databases_changed: false,
        news: false,
        starving_since: 0,
    }
}

pub struct Workers {
    desk: LwCells<Desk>,
    places: LwCells<Place>,
    launcher: CondVars,
    maintainers: CondVars,
    /// Those who wait for a maintainer to leave.
    leaving: CondVars,
}

static WORKERS: Attached<Workers> = Attached::new();

impl Layout for Workers {
    const NAME: &'static std::ffi::CStr = c"awa_queue workers";

    fn carve(carver: &mut Carver) -> Self {
        // Some more than may use the queue: databases where the extension was created and never used, and one that is looked at.
        let places = 2 * settings::max_databases() + 1;
        Self {
            desk: carver.cells(1, empty_desk),
            places: carver.cells(places, Place::free),
            launcher: carver.condvars(1),
            maintainers: carver.condvars(places),
            leaving: carver.condvars(1),
        }
    }

    fn place() -> &'static Attached<Self> {
        &WORKERS
    }
}

/// None if the server has not loaded the library at its start.
pub fn workers() -> Option<&'static Workers> {
    WORKERS.get()
}

/// What the launcher was told since it last asked.
pub struct Orders {
    pub announced: heapless::Vec<u32, ANNOUNCED_DATABASES>,
    pub look_everywhere: bool,
    pub databases_changed: bool,
}

impl Workers {
    pub fn with_desk<R>(&self, body: impl FnOnce(&mut Desk) -> R) -> R {
        body(&mut self.desk.at(0))
    }

    pub fn with_place<R>(&self, place: usize, body: impl FnOnce(&mut Place) -> R) -> R {
        body(&mut self.places.at(place))
    }

    pub fn places(&self) -> usize {
        self.places.len()
    }

    pub fn launcher_sleeper(&self) -> CondVar {
        self.launcher.at(0)
    }

    pub fn maintainer_sleeper(&self, place: usize) -> CondVar {
        self.maintainers.at(place)
    }

    pub fn place_of(&self, database: u32) -> Option<usize> {
        (0..self.places())
            .find(|place| self.with_place(*place, |place| place.standing != Standing::Free && place.database == database))
    }

    /// A copy, for a look.
    pub fn seen(&self, database: u32) -> Option<Box<Place>> {
        let mut copy = Box::new(Place::free());
        let place = self.place_of(database)?;
        self.with_place(place, |place| copy.as_mut().clone_from(place));
        Some(copy)
    }

    // ---- the launcher's side -------------------------------------------------------------------------------------------

    pub fn take_orders(&self) -> Orders {
        self.with_desk(|desk| {
            desk.news = false;
            Orders {
                announced: std::mem::take(&mut desk.announced),
                look_everywhere: std::mem::take(&mut desk.look_everywhere),
                databases_changed: std::mem::take(&mut desk.databases_changed),
            }
        })
    }

    /// Something has changed since `take_orders`.
    pub fn has_news(&self) -> bool {
        self.with_desk(|desk| desk.news)
    }

    fn tell_launcher(&self, message: impl FnOnce(&mut Desk)) {
        self.with_desk(|desk| {
            desk.news = true;
            message(desk);
        });
        self.launcher_sleeper().signal();
    }

    /// Holds whose session has ended without giving them back do not count any more.
    pub fn drop_dead_holds(&self) {
        let holds = self.with_desk(|desk| desk.holds.clone());
        for hold in holds.iter().filter(|hold| !bgworker::is_backend(hold.pid)) {
            self.with_desk(|desk| desk.holds.retain(|seen| seen.pid != hold.pid || seen.database != hold.database));
        }
    }

    pub fn is_held(&self, database: u32) -> bool {
        self.with_desk(|desk| desk.is_held(database))
    }

    /// A place for a worker that is about to be started. None: all are taken.
    pub fn prepare_place(&self, database: u32) -> Option<usize> {
        let free = || (0..self.places()).find(|place| self.with_place(*place, |place| place.standing == Standing::Free));
        let known = self.place_of(database);
        let place = known.or_else(free)?;
        self.with_place(place, |place| {
            if known.is_none() {
                *place = Place::free();
                place.database = database;
            }
            place.stand(Standing::Starting, &Line::new());
            place.verdict = Verdict::Unknown;
            place.stop = false;
            place.starts += 1;
        });
        Some(place)
    }

    /// The place stays, so that the database can be told why nobody works there; if it has the extension at all.
    pub fn keep_waiting(&self, place: usize, reason: &Line) {
        self.with_place(place, |place| {
            if place.has_extension {
                place.stand(Standing::Waiting, reason);
            } else {
                place.standing = Standing::Free;
            }
        });
    }

    pub fn free_place(&self, place: usize) {
        self.with_place(place, |place| *place = Place::free());
    }

    pub fn ask_to_leave(&self, place: usize) {
        self.with_place(place, |place| place.stop = true);
        self.maintainer_sleeper(place).broadcast();
    }

    // ---- the maintainer's side -----------------------------------------------------------------------------------------

    /// The worker takes its place, unless the database must be kept free or the place was given away.
    pub fn begin(&self, place: usize, database: u32) -> bool {
        if place >= self.places() {
            return false;
        }
        let pid = xact::my_pid();
        let desk = self.desk.at(0);
        let held = desk.is_held(database);
        let taken = self.with_place(place, |place| {
            if place.database != database || place.standing != Standing::Starting || place.pid != 0 {
                return false;
            }
            place.pid = pid;
            if held {
                place.verdict = Verdict::Stopped;
            } else {
                place.stand(Standing::Looking, &Line::new());
            }
            true
        });
        drop(desk);
        if taken {
            MY_PLACE.set(Some(place));
        }
        taken && !held
    }

    pub fn stand(&self, place: usize, standing: Standing, reason: &Line) {
        let now = xact::now();
        self.with_place(place, |place| {
            place.stand(standing, reason);
            place.has_extension = true;
            place.last_look = now;
        });
    }

    pub fn is_asked_to_leave(&self, place: usize) -> bool {
        self.with_place(place, |place| place.stop)
    }

    /// Something was asked for that the maintainer has not seen.
    pub fn is_asked_for(&self, place: usize) -> bool {
        self.with_place(place, |place| place.stop || place.wake)
    }

    pub fn take_wake(&self, place: usize) -> bool {
        self.with_place(place, |place| std::mem::take(&mut place.wake))
    }

    pub fn leave(&self, place: usize, verdict: Verdict) {
        self.with_place(place, |place| place.verdict = verdict);
    }

    pub fn with_task(&self, place: usize, task: usize, body: impl FnOnce(&mut TaskStat)) {
        self.with_place(place, |place| {
            if let Some(stat) = place.tasks.get_mut(task) {
                body(stat);
            }
        });
    }
}

impl Desk {
    fn is_held(&self, database: u32) -> bool {
        self.holds.iter().any(|hold| hold.database == database)
    }
}

thread_local! {
    static MY_PLACE: Cell<Option<usize>> = const { Cell::new(None) };
    /// This transaction creates the extension, the first queue, or adopts the jobs.
    static ANNOUNCES: Cell<bool> = const { Cell::new(false) };
    /// This transaction has run a command on databases, which has ended. Others see what it did when the transaction has.
    static COMMANDED: Cell<bool> = const { Cell::new(false) };
}

/// The end of a maintainer, whatever the reason. Runs where nothing may raise.
pub fn on_maintainer_exit() {
    let (Some(place), Some(workers)) = (MY_PLACE.take(), workers()) else { return };
    workers.with_place(place, |place| {
        place.pid = 0;
        place.since = xact::now();
    });
    workers.tell_launcher(|_| {});
    workers.leaving.at(0).broadcast();
}

pub fn on_launcher_exit() {
    if let Some(workers) = workers() {
        workers.with_desk(|desk| desk.launcher = 0);
    }
}

// ---- the sessions' side ------------------------------------------------------------------------------------------------

/// When this transaction has committed, the launcher learns that the database has the extension, and its maintainer that something has
/// changed. Without effect if the library is not preloaded. A prepared transaction tells nobody: the launcher finds it in time.
pub fn announce_at_commit() {
    ANNOUNCES.set(true);
}

/// Transaction callback.
pub fn on_transaction_end(committed: bool) {
    let (announces, commanded) = (ANNOUNCES.take(), COMMANDED.take());
    if !announces && !commanded {
        return;
    }
    let Some(workers) = workers() else { return };
    if commanded {
        let pid = xact::my_pid();
        workers.tell_launcher(|desk| {
            desk.holds.retain(|hold| hold.pid != pid);
            desk.databases_changed = true;
        });
    }
    if !announces || !committed {
        return;
    }
    let database = xact::database_oid();
    workers.tell_launcher(|desk| {
        if !desk.announced.contains(&database) && desk.announced.push(database).is_err() {
            desk.look_everywhere = true;
        }
    });
    wake(workers, database);
}

/// All tasks of the database are due now. False: nobody works there.
pub fn wake(workers: &Workers, database: u32) -> bool {
    let Some(place) = workers.place_of(database) else { return false };
    let working = workers.with_place(place, |place| {
        place.wake = true;
        place.pid != 0 && matches!(place.standing, Standing::Working | Standing::Idle)
    });
    workers.maintainer_sleeper(place).broadcast();
    working
}

/// A maintainer that is in the middle of a step is given so long; then it is told to break it off.
const PATIENCE_MS: i64 = 500;
/// After so long the command goes on, and says itself who is in its way.
const LEAVING_LIMIT_MS: i64 = 10_000;

/// Before a command that needs the database empty: its maintainer leaves, and no other comes until `release`.
pub fn hold(database: u32) {
    let Some(workers) = workers() else { return };
    let pid = xact::my_pid();
    workers.with_desk(|desk| {
        // No room: the command takes its chance.
        let _ = desk.holds.push(Hold { database, pid });
    });
    let sleeper = workers.leaving.at(0);
    let begun = xact::now();
    let mut told = false;
    while let Some((place, worker)) = working_in(workers, database) {
        if !told {
            workers.ask_to_leave(place);
        }
        told = true;
        let waited = (xact::now() - begun) / 1000;
        if waited > LEAVING_LIMIT_MS {
            break;
        }
        if waited > PATIENCE_MS {
            workers.with_place(place, |place| {
                if place.pid == worker {
                    bgworker::terminate(worker);
                }
            });
        }
        sleeper.prepare();
        if working_in(workers, database).is_some() {
            sleeper.timed_sleep(50, wait_event());
        }
        sleeper.cancel();
        if !workers.with_place(place, |place| place.pid == worker) {
            wait_until_gone(worker);
        }
    }
}

fn working_in(workers: &Workers, database: u32) -> Option<(usize, i32)> {
    (0..workers.places()).find_map(|place| {
        let pid = workers.with_place(place, |seen| if seen.database == database { seen.pid } else { 0 });
        (pid != 0).then_some((place, pid))
    })
}

/// It has left its place, and is about to leave the server: a matter of milliseconds.
fn wait_until_gone(pid: i32) {
    for _ in 0..200 {
        if !bgworker::is_backend(pid) {
            return;
        }
        crate::frontier::nap(1);
    }
}

/// The command has ended; at the end of its transaction the maintainer may come back, and the launcher looks at the databases.
pub fn after_command() {
    COMMANDED.set(true);
}
