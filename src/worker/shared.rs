//! What launcher, maintainers and sessions share: who works where, what was asked of them, how the tasks went.
//!
//! One desk for the server, one place for each database that has (or may have) the extension. Locks: desk, then place; under them only
//! memory. A place belongs to the launcher while nobody works in it, to its maintainer while its `pid` is set.
//! `pid` is set and reset by the process itself, under the lock: while it is set, the number is that of a live process.

mod sessions;

use std::cell::Cell;

use awa_protocol::limits::{ANNOUNCED_DATABASES, HELD_DATABASES, TASKS};
use awa_protocol::schedule::State;

use crate::pg::shmem::{Attached, Carver, CondVar, CondVars, Layout, LwCells};
use crate::pg::{bgworker, xact};
use crate::settings;

pub use sessions::{announce_at_commit, before_command, on_subtransaction_end, on_transaction_end, wake};

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
    /// Answers in a row that somebody was in the way, and since when.
    pub held_up: u32,
    pub held_up_since: i64,
    /// What somebody should look at, and when it was seen last.
    pub trouble: Line,
    pub trouble_at: i64,
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
            held_up: 0,
            held_up_since: 0,
            trouble: Line::new(),
            trouble_at: 0,
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
    /// The subtransaction whose end gives it back.
    subxact: u32,
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
        let first = self.with_place(place, |place| {
            let first = place.standing == Standing::Looking;
            place.stand(standing, reason);
            place.has_extension = true;
            place.last_look = now;
            first
        });
        if first {
            // Others may be waiting for the end of this look.
            self.tell_launcher(|_| {});
        }
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
