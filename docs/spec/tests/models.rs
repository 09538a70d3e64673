//! Every state of every model; the numbers go into README.md. `AWA_SPEC_ACCEPT=1` writes what is generated there,
//! `AWA_SPEC_BOUND=large` explores the long ones.
// Helpers of tests, too.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod pages;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use awa_spec::actions::{Action, MAP};
use awa_spec::check::explore;
use awa_spec::locks::{self, FIRST_USES, LONG, Locks, VERBS};
use awa_spec::queue::{Config, Machine, configurations};

struct Row {
    name: &'static str,
    states: usize,
    depth: usize,
    seconds: f64,
}

fn large() -> bool {
    std::env::var("AWA_SPEC_BOUND").is_ok_and(|bound| bound == "large")
}

/// Two at a time.
fn explore_all(configs: &[Config]) -> (Vec<Row>, Vec<Action>, Vec<String>) {
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    let fired = Mutex::new(Vec::new());
    let failures = Mutex::new(Vec::new());
    let work = || {
        while let Some(config) = configs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let started = std::time::Instant::now();
            let machine = Machine::new(*config);
            let counts = machine.fired.clone();
            let report = explore(machine);
            let seconds = started.elapsed().as_secs_f64();
            let part = if report.complete { "" } else { " (not all)" };
            println!("{}: {} states{part}, depth {}, {seconds:.1} s", config.name, report.states, report.depth);
            if !large() && !report.complete {
                failures.lock().expect("not poisoned").push(format!("{}: more states than can be visited", config.name));
            }
            for (name, way) in &report.violations {
                failures.lock().expect("not poisoned").push(format!("{}: {name}: {way}", config.name));
            }
            let all = MAP.iter().map(|(action, _)| *action);
            fired.lock().expect("not poisoned").extend(all.filter(|action| counts.has(*action)));
            rows.lock().expect("not poisoned").push(Row {
                name: config.name,
                states: report.states,
                depth: report.depth,
                seconds,
            });
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let mut rows = rows.into_inner().expect("not poisoned");
    rows.sort_by_key(|row| configs.iter().position(|config| config.name == row.name));
    (rows, fired.into_inner().expect("not poisoned"), failures.into_inner().expect("not poisoned"))
}

/// No state violates anything, and every action of the model happens somewhere: a rule about what never happens proves nothing.
#[test]
fn all_states_are_sound() {
    let configs = if large() { configurations::LARGE } else { configurations::SMALL };
    let (rows, fired, failures) = explore_all(configs);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let never: Vec<Action> = MAP.iter().map(|(action, _)| *action).filter(|action| !fired.contains(action)).collect();
    if large() {
        for row in &rows {
            println!("| {} | {} | {} | {:.0} s |", row.name, row.states, row.depth, row.seconds);
        }
        return;
    }
    assert!(never.is_empty(), "these actions happen in no model: {never:?}");
    let lines = rows.iter().map(|row| format!("| `{}` | {} | {} |", row.name, row.states, row.depth));
    pages::check("README.md", "states", &lines.collect::<Vec<_>>());
}

/// No two sessions, in the long form no three, wait for each other in a circle; LWLocks are taken in their order.
#[test]
fn no_circle_of_waits() {
    let verbs: Vec<&'static locks::Verb> = VERBS.iter().collect();
    let size = if large() { 3 } else { 2 };
    let report = explore(Locks { teams: locks::teams(&verbs, size), seen_cycles_allowed: false });
    println!("{size} of {} verbs: {} states, depth {}", verbs.len(), report.states, report.depth);
    assert_eq!(report.violations, vec![]);
    if !large() {
        let line = format!("| `locks` | {} | {} |", report.states, report.depth);
        pages::check("README.md", "locks", &[line]);
    }
}

/// Transactions of several calls, and first uses after a start, can: but only where the server's detector sees it. These pairs are in
/// `docs/locking.md`.
#[test]
fn circles_of_long_transactions_are_seen() {
    let verbs: Vec<&'static locks::Verb> = VERBS.iter().chain(FIRST_USES).chain(LONG).collect();
    let report = explore(Locks { teams: locks::teams(&verbs, 2), seen_cycles_allowed: true });
    assert_eq!(report.violations, vec![]);
    let lines: Vec<String> = locks::circular_pairs(&verbs).iter().map(|(a, b)| format!("- {a} · {b}")).collect();
    pages::check("README.md", "circles", &lines);
}
