//! The points that are armed, in shared memory: any session arms, any process of the server reaches.
//! Lock: one LWLock over the table, a leaf; taken only while something is armed.
use std::sync::atomic::{AtomicU32, Ordering};

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::super::call::raise;
use super::super::shmem::{self, Attached, Carver, CondVars, Layout, LwCells, WaitEvent};
use super::super::xact::{database_oid, my_pid};
use super::{clock, jitter};
use crate::error::{Error, Result};

/// Points armed at a time.
const SLOTS: usize = 32;
const NAME_BYTES: usize = 64;

/// What happens at a point; each but `Note` once, to the one that comes there after as many as were let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Counted only.
    Note,
    /// Sleeps until it is released; may be cancelled.
    Wait,
    /// An error, SQLSTATE XX000.
    Error,
    /// SIGKILL to itself: a crash of the server.
    Kill,
    /// The session ends, with an error that no savepoint catches.
    Exit,
}

pub const ACTIONS: [(&str, Action); 5] =
    [("note", Action::Note), ("wait", Action::Wait), ("error", Action::Error), ("kill", Action::Kill), ("exit", Action::Exit)];

#[derive(Clone, Copy)]
struct Slot {
    name: [u8; NAME_BYTES],
    len: usize,
    action: Action,
    /// How many are still let pass.
    skip: u32,
    /// Nobody else; 0 for whoever comes.
    only: i32,
    hits: u32,
    done: bool,
    waiting: i32,
    /// In whose database; 0 for processes without one.
    database: u32,
}

const FREE: Slot =
    Slot { name: [0; NAME_BYTES], len: 0, action: Action::Note, skip: 0, only: 0, hits: 0, done: false, waiting: 0, database: 0 };

impl Slot {
    fn is(&self, name: &str) -> bool {
        self.len != 0 && self.name.get(..self.len) == Some(name.as_bytes())
    }

    fn name(&self) -> String {
        String::from_utf8_lossy(self.name.get(..self.len).unwrap_or_default()).into_owned()
    }
}

type Table = [Slot; SLOTS];

struct Points {
    armed: &'static [AtomicU32],
    table: LwCells<Table>,
    sleepers: CondVars,
}

static POINTS: Attached<Points> = Attached::new();

impl Layout for Points {
    const NAME: &'static core::ffi::CStr = c"awa_points";

    fn carve(carver: &mut Carver) -> Self {
        Self { armed: carver.atomics_u32(1), table: carver.cells(1, || [FREE; SLOTS]), sleepers: carver.condvars(SLOTS) }
    }

    fn place() -> &'static Attached<Self> {
        &POINTS
    }
}

/// From `_PG_init`.
pub fn register() {
    let _ = shmem::register::<Points>();
}

/// A place with a name. Almost nothing while no point is armed.
#[inline]
pub fn reach(name: &'static str) {
    jitter::tremble();
    let Some(points) = POINTS.get() else { return };
    if points.armed.first().is_some_and(|armed| armed.load(Ordering::Relaxed) != 0) {
        reach_slowly(points, name);
    }
}

/// True where an error may be raised and a cancel would be noticed.
fn may_raise() -> bool {
    // SAFETY: plain reads of backend-local globals; cannot raise.
    unsafe { pg_sys::InterruptHoldoffCount == 0 && pg_sys::CritSectionCount == 0 }
}

#[cold]
fn reach_slowly(points: &'static Points, name: &'static str) {
    let raising_is_legal = may_raise();
    let Some((place, action)) = note(points, name, raising_is_legal) else { return };
    match action {
        Action::Note => {}
        Action::Kill => kill_myself(),
        Action::Wait => sleep(points, place, name),
        Action::Error => raise(Error::new(Code::ERRCODE_INTERNAL_ERROR, format!("point \"{name}\" was reached"))),
        Action::Exit => exit(name),
    }
}

/// Counts the visit, and says what is to be done.
fn note(points: &'static Points, name: &str, raising_is_legal: bool) -> Option<(usize, Action)> {
    let (me, database) = (my_pid(), database_oid());
    let mut table = points.table.lock(0)?;
    let (place, slot) = table.iter_mut().enumerate().find(|(_, slot)| {
        slot.is(name) && (slot.only == 0 || slot.only == me) && (slot.database == 0 || slot.database == database)
    })?;
    slot.hits = slot.hits.saturating_add(1);
    if slot.done || !(raising_is_legal || slot.action == Action::Kill) {
        return None;
    }
    if slot.skip > 0 {
        slot.skip -= 1;
        return None;
    }
    slot.done = slot.action != Action::Note;
    if slot.action == Action::Wait {
        slot.waiting = me;
    }
    Some((place, slot.action))
}

fn kill_myself() {
    // SAFETY: a system call; nothing of ours runs after it.
    unsafe { kill(my_pid(), SIGKILL) };
}

const SIGKILL: i32 = 9;

unsafe extern "C" {
    /// Never raises: a system call.
    fn kill(pid: i32, signal: i32) -> i32;
}

/// The end of a session as an administrator's command brings it: callbacks run, destructors do not.
fn exit(name: &str) {
    pg_sys::panic::ErrorReport::new(Code::ERRCODE_ADMIN_SHUTDOWN, format!("session ended at point \"{name}\""), "")
        .report(pgrx::PgLogLevel::FATAL);
}

/// Marks its slot as left, also when a cancel unwinds.
struct Sleeping {
    points: &'static Points,
    place: usize,
}

impl Drop for Sleeping {
    fn drop(&mut self) {
        let me = my_pid();
        if let Some(mut table) = self.points.table.lock(0)
            && let Some(slot) = table.get_mut(self.place).filter(|slot| slot.waiting == me)
        {
            slot.waiting = 0;
        }
    }
}

fn sleep(points: &'static Points, place: usize, name: &str) {
    let Some(sleeper) = points.sleepers.get(place) else { return };
    let event = WaitEvent::named(c"AwaPoint");
    let me = my_pid();
    let left = Sleeping { points, place };
    sleeper.prepare();
    while points.table.lock(0).is_some_and(|table| table.get(place).is_some_and(|slot| slot.is(name) && slot.waiting == me)) {
        sleeper.timed_sleep(1000, event);
    }
    sleeper.cancel();
    drop(left);
}

fn points() -> Result<&'static Points> {
    POINTS.get().ok_or_else(|| {
        Error::new(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "points need the library in shared_preload_libraries")
    })
}

/// Arms a point anew, in this database only; what waited there goes on.
pub fn arm(name: &str, action: Action, skip: u32, only: i32) -> Result<()> {
    if name.is_empty() || name.len() > NAME_BYTES {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, "the name of a point has 1 to 64 bytes"));
    }
    let points = points()?;
    release(name)?;
    let database = database_oid();
    let mut full = false;
    if let Some(mut table) = points.table.lock(0) {
        let place = table.iter().position(|slot| slot.is(name)).or_else(|| table.iter().position(|slot| slot.len == 0));
        if let Some(slot) = place.and_then(|place| table.get_mut(place)) {
            *slot = Slot { action, skip, only, database, len: name.len(), ..FREE };
            if let Some(bytes) = slot.name.get_mut(..name.len()) {
                bytes.copy_from_slice(name.as_bytes());
            }
        } else {
            full = true;
        }
        count(points, &table);
    }
    if full {
        return Err(Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, format!("more than {SLOTS} points are armed")));
    }
    Ok(())
}

fn count(points: &Points, table: &Table) {
    let armed = table.iter().filter(|slot| slot.len != 0).count();
    if let Some(count) = points.armed.first() {
        count.store(u32::try_from(armed).unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

/// Lets whoever waits at the point go on; says whether anybody did. Others that come pass.
pub fn release(name: &str) -> Result<bool> {
    let points = points()?;
    let mut found = None;
    if let Some(mut table) = points.table.lock(0)
        && let Some((place, slot)) = table.iter_mut().enumerate().find(|(_, slot)| slot.is(name))
    {
        found = Some((place, slot.waiting != 0));
        slot.waiting = 0;
        slot.done = true;
    }
    let Some((place, somebody)) = found else { return Ok(false) };
    if let Some(sleeper) = points.sleepers.get(place) {
        sleeper.broadcast();
    }
    Ok(somebody)
}

pub fn disarm_all() -> Result<()> {
    jitter::set_jitter(0, 0);
    clock::set_clock(0);
    let points = points()?;
    if let Some(mut table) = points.table.lock(0) {
        *table = [FREE; SLOTS];
        count(points, &table);
    }
    for place in 0..SLOTS {
        if let Some(sleeper) = points.sleepers.get(place) {
            sleeper.broadcast();
        }
    }
    Ok(())
}

pub struct Seen {
    pub name: String,
    pub action: Action,
    pub hits: u32,
    pub waiting: i32,
}

/// What is armed, and who came there.
pub fn reached() -> Result<Vec<Seen>> {
    // Copied first: nothing may be allocated under the lock.
    let table = points()?.table.lock(0).map(|table| *table).unwrap_or([FREE; SLOTS]);
    let seen = |slot: &Slot| Seen { name: slot.name(), action: slot.action, hits: slot.hits, waiting: slot.waiting };
    Ok(table.iter().filter(|slot| slot.len != 0).map(seen).collect())
}
