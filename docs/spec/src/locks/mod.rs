//! The order of locks, as `docs/locking.md` has it: each verb is the sequence of locks that it takes, and all sequences of two or three
//! sessions are interleaved in every way. Heavyweight locks are kept to the end of the transaction; those asked for conditionally are
//! never waited for: if one is not free, the verb ends.
//!
//! Two segments: 0 is sealed, 1 is open. What a verb does in others is what it does in these.

mod verbs;

use std::collections::BTreeSet;

use stateright::{Model, Property};

pub use verbs::{BROKEN, BY_HAND, FIRST_USES, LONG, VERBS, Verb, verb};

use crate::properties::{DEADLOCK, LWLOCK_ORDER, UNSEEN_WAIT, WAIT_UNDER_LWLOCK};

/// As PostgreSQL has them; those that are used.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Mode {
    AccessShare,
    RowExclusive,
    Share,
    ShareRowExclusive,
    Exclusive,
    AccessExclusive,
}

impl Mode {
    pub fn conflicts(self, other: Mode) -> bool {
        use Mode::*;
        let against = |mode: Mode| -> &[Mode] {
            match mode {
                AccessShare => &[AccessExclusive],
                RowExclusive => &[Share, ShareRowExclusive, Exclusive, AccessExclusive],
                Share => &[RowExclusive, ShareRowExclusive, Exclusive, AccessExclusive],
                ShareRowExclusive => &[RowExclusive, Share, ShareRowExclusive, Exclusive, AccessExclusive],
                Exclusive => &[RowExclusive, Share, ShareRowExclusive, Exclusive, AccessExclusive],
                AccessExclusive => &[AccessShare, RowExclusive, Share, ShareRowExclusive, Exclusive, AccessExclusive],
            }
        };
        against(self).contains(&other)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Object {
    Ledger,
    QueueDefinitions,
    QueueRow,
    Restoring,
    Ready(u8),
    Closures(u8),
    Done(u8),
    Claims(u8),
    Retained,
    DeadLetters,
    FinishedRow,
    DeferredRow,
    /// The transaction that is ending an attempt: who wants to end it too waits for that one.
    Attempt(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Light {
    Queue,
    Partition(u8),
    /// Nothing is taken under it: the ring, the prepared list, the allocation of places.
    Leaf,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    Lock(Object, Mode),
    Try(Object, Mode),
    /// Until nobody else holds it in a mode that conflicts; takes nothing.
    WaitFor(Object, Mode),
    Light(Light),
    Release(Light),
    /// Says that it builds; waits for whoever is building, on a condition variable that no detector sees.
    BeginBuild,
    EndBuild,
    AwaitBuild,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Run {
    verb: &'static Verb,
    at: usize,
}

/// Who does what together, and from which property on it is a violation.
pub struct Locks {
    pub teams: Vec<Vec<&'static Verb>>,
    /// Cycles that the server's deadlock detector sees are allowed, and named in `docs/locking.md`.
    pub seen_cycles_allowed: bool,
}

/// Each multiset of so many verbs.
pub fn teams(verbs: &[&'static Verb], size: usize) -> Vec<Vec<&'static Verb>> {
    if size == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (n, verb) in verbs.iter().enumerate() {
        for mut rest in teams(&verbs[n..], size - 1) {
            rest.push(verb);
            all.push(rest);
        }
    }
    all
}

impl Run {
    fn next(&self) -> Option<Step> {
        self.verb.steps.get(self.at).copied()
    }

    fn done(&self) -> &[Step] {
        // The transaction has ended, its locks with it.
        if self.next().is_none() { &[] } else { &self.verb.steps[..self.at] }
    }

    fn holds(&self) -> impl Iterator<Item = (Object, Mode)> {
        self.done().iter().filter_map(|step| match step {
            Step::Lock(object, mode) | Step::Try(object, mode) => Some((*object, *mode)),
            _ => None,
        })
    }

    fn lights(&self) -> Vec<Light> {
        let mut held = Vec::new();
        for step in self.done() {
            match step {
                Step::Light(light) => held.push(*light),
                Step::Release(light) => held.retain(|other| other != light),
                _ => {}
            }
        }
        held
    }

    fn builds(&self) -> bool {
        self.done().iter().rev().find(|step| matches!(step, Step::BeginBuild | Step::EndBuild)) == Some(&Step::BeginBuild)
    }

    fn is_blocked_by(&self, other: &Run) -> bool {
        match self.next() {
            Some(Step::Lock(object, mode) | Step::WaitFor(object, mode)) => {
                other.holds().any(|(of, held)| of == object && mode.conflicts(held))
            }
            Some(Step::Light(light)) => other.lights().contains(&light),
            Some(Step::BeginBuild | Step::AwaitBuild) => other.builds(),
            Some(Step::Try(..) | Step::Release(_) | Step::EndBuild) | None => false,
        }
    }

    fn waits_unseen(&self) -> bool {
        matches!(self.next(), Some(Step::Light(_) | Step::BeginBuild | Step::AwaitBuild))
    }
}

/// The sessions that wait for each other in a circle, directly or not.
fn circle(runs: &[Run]) -> Vec<usize> {
    let mut left: BTreeSet<usize> = (0..runs.len()).collect();
    loop {
        // Whoever waits for nobody of those who are left will end one day.
        let free: Vec<usize> = left
            .iter()
            .copied()
            .filter(|n| !left.iter().any(|other| other != n && runs[*n].is_blocked_by(&runs[*other])))
            .collect();
        if free.is_empty() {
            return left.into_iter().collect();
        }
        free.iter().for_each(|n| {
            left.remove(n);
        });
    }
}

impl Model for Locks {
    type State = Vec<Run>;
    type Action = usize;

    fn init_states(&self) -> Vec<Vec<Run>> {
        self.teams.iter().map(|team| team.iter().map(|verb| Run { verb, at: 0 }).collect()).collect()
    }

    fn actions(&self, runs: &Vec<Run>, acts: &mut Vec<usize>) {
        let blocked = |n: usize| (0..runs.len()).any(|other| other != n && runs[n].is_blocked_by(&runs[other]));
        acts.extend((0..runs.len()).filter(|n| runs[*n].next().is_some() && !blocked(*n)));
    }

    fn next_state(&self, runs: &Vec<Run>, n: usize) -> Option<Vec<Run>> {
        let mut after = runs.clone();
        let refused = match runs[n].next()? {
            Step::Try(object, mode) => {
                let mut others = runs.iter().enumerate().filter(|(other, _)| *other != n);
                others.any(|(_, run)| run.holds().any(|(of, held)| of == object && mode.conflicts(held)))
            }
            _ => false,
        };
        after[n].at = if refused { runs[n].verb.steps.len() } else { runs[n].at + 1 };
        Some(after)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(DEADLOCK, |model: &Locks, runs: &Vec<Run>| model.seen_cycles_allowed || circle(runs).is_empty()),
            Property::always(UNSEEN_WAIT, |_, runs: &Vec<Run>| !circle(runs).iter().any(|n| runs[*n].waits_unseen())),
            Property::always(LWLOCK_ORDER, |_, runs: &Vec<Run>| runs.iter().all(in_order)),
            Property::always(WAIT_UNDER_LWLOCK, |_, runs: &Vec<Run>| {
                let waits = |run: &Run| !matches!(run.next(), Some(Step::Light(_) | Step::Release(_)) | None);
                runs.iter().all(|run| run.lights().is_empty() || !waits(run))
            }),
        ]
    }
}

/// A queue, then a partition; one of each; nothing under a leaf.
fn in_order(run: &Run) -> bool {
    let Some(Step::Light(next)) = run.next() else { return true };
    let held = run.lights();
    match next {
        Light::Queue => held.is_empty(),
        Light::Partition(_) | Light::Leaf => held.iter().all(|light| *light == Light::Queue),
    }
}

/// The pairs of verbs that can wait for each other in a circle.
pub fn circular_pairs(verbs: &[&'static Verb]) -> BTreeSet<(&'static str, &'static str)> {
    let mut found = BTreeSet::new();
    for team in teams(verbs, 2) {
        let names: Vec<&'static str> = team.iter().map(|verb| verb.name).collect();
        let model = Locks { teams: vec![team], seen_cycles_allowed: false };
        if crate::check::explore(model).names().contains(&DEADLOCK)
            && let [a, b] = names[..]
        {
            found.insert((a.min(b), a.max(b)));
        }
    }
    found
}
