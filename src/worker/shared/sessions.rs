//! The sessions' side of what is shared with launcher and maintainers: telling them at commit, and keeping a database free of them while a
//! command needs it empty. The transaction callbacks only change memory; `before_command` may wait, and raise.

use std::cell::Cell;

use super::{Hold, Standing, Workers, workers};
use crate::frontier::{nap, wait_event};
use crate::pg::{bgworker, xact};

thread_local! {
    /// This transaction creates the extension, the first queue, or adopts the jobs.
    static ANNOUNCES: Cell<bool> = const { Cell::new(false) };
    /// This transaction runs, or has run, a command on databases. Others see what it did when the transaction has ended.
    static COMMANDED: Cell<bool> = const { Cell::new(false) };
}

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

/// Transaction callback. A command that was rolled back by itself keeps no database any more.
pub fn on_subtransaction_end(mine: u32, heir: Option<u32>) {
    if !COMMANDED.get() {
        return;
    }
    let Some(workers) = workers() else { return };
    let pid = xact::my_pid();
    match heir {
        Some(heir) => workers.with_desk(|desk| {
            for hold in desk.holds.iter_mut().filter(|hold| hold.pid == pid && hold.subxact == mine) {
                hold.subxact = heir;
            }
        }),
        None => workers.tell_launcher(|desk| desk.holds.retain(|hold| hold.pid != pid || hold.subxact != mine)),
    }
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

/// Before a command that makes or changes databases. If it needs one empty, the maintainer there leaves, and no other comes until the
/// transaction has ended; then the launcher looks at the databases.
pub fn before_command(database: Option<u32>) {
    // First: what follows may raise after it has done something.
    COMMANDED.set(true);
    if let Some(database) = database {
        hold(database);
    }
}

fn hold(database: u32) {
    let Some(workers) = workers() else { return };
    let (pid, subxact) = (xact::my_pid(), xact::current_subxact());
    workers.with_desk(|desk| {
        // No room: the command takes its chance.
        let _ = desk.holds.push(Hold { database, pid, subxact });
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
        nap(1);
    }
}
