//! Runs a model to its end, or until it violates what it is expected to.

use std::collections::BTreeSet;
use std::fmt::{Debug, Write};
use std::hash::Hash;

use stateright::{Checker, HasDiscoveries, Model};

/// No run takes more steps than this, the nearest first; each state is reached by several.
pub const STEPS_MAX: usize = 8_000_000;

pub struct Report {
    pub states: usize,
    /// All there are.
    pub complete: bool,
    pub depth: usize,
    /// Names of violated properties, each with the shortest way to it.
    pub violations: Vec<(&'static str, String)>,
}

impl Report {
    pub fn names(&self) -> Vec<&'static str> {
        self.violations.iter().map(|(name, _)| *name).collect()
    }
}

/// All states; stops at the first violation.
pub fn explore<M>(model: M) -> Report
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + Send + Sync + Clone + PartialEq,
    M::Action: Debug + Send + Sync + Clone + PartialEq,
{
    run(model, HasDiscoveries::AnyFailures)
}

/// Until this property is violated.
pub fn explore_until<M>(model: M, expected: &'static str) -> Report
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + Send + Sync + Clone + PartialEq,
    M::Action: Debug + Send + Sync + Clone + PartialEq,
{
    run(model, HasDiscoveries::AnyOf(BTreeSet::from([expected])))
}

fn run<M>(model: M, until: HasDiscoveries) -> Report
where
    M: Model + Send + Sync + 'static,
    M::State: Debug + Hash + Send + Sync + Clone + PartialEq,
    M::Action: Debug + Send + Sync + Clone + PartialEq,
{
    quiet();
    let checker = model.checker().threads(1).finish_when(until).target_state_count(STEPS_MAX).spawn_bfs().join();
    let mut violations = Vec::new();
    for (name, path) in checker.discoveries() {
        let mut way = String::new();
        for act in path.into_actions() {
            let _ = write!(way, "{act:?} ");
        }
        violations.push((name, way));
    }
    violations.sort();
    let complete = checker.state_count() < STEPS_MAX;
    Report { states: checker.unique_state_count(), complete, depth: checker.max_depth(), violations }
}

/// Assertions of the engine are told as violations, not on the screen.
fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let of_engine = info.location().is_some_and(|at| at.file().contains("protocol/src"));
            if !of_engine {
                loud(info);
            }
        }));
    });
}
