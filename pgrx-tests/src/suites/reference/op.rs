//! What a sequence is made of: steps that name jobs and attempts by small numbers, so that a shorter sequence still means something.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Queues of a sequence, by number: see `QUEUES` for their settings.
pub const NAMES: [&str; 3] = ["plain", "letters", "aged"];

/// Settings, the same for both sides.
pub const QUEUES: [&str; 3] = [
    "'plain', priority_ageing => '0', backoff => '0', backoff_max => '0', completed_retention => '1 day'",
    "'letters', priority_ageing => '0', max_attempts => 2, backoff => '1 hour', dead_letters => true, cancelled_retention => '0'",
    "'aged', priority_ageing => '10 minutes', max_attempts => 3, deadline => '1 hour', backoff => '0', backoff_max => '0'",
];

/// When a new job may run. No step waits: what is not due at once is not due within the test.
#[derive(Clone, Copy, Debug)]
pub enum When {
    Now,
    /// So many times five minutes ago.
    Past(u8),
    /// In half an hour: stays in the ring.
    Soon,
    /// In two hours: waits outside of the ring when it is carried.
    Late,
}

/// A limit of an attempt.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    Default,
    None,
    /// Passed by the time of the next statement.
    Over,
    Hour,
}

#[derive(Clone, Debug)]
pub enum Verb {
    Enqueue { queue: u8, kind: bool, priority: u8, when: When, max_attempts: Option<u8>, extras: bool, insert: bool },
    EnqueueMany { queue: u8, jobs: Vec<(u8, When)> },
    Claim { queue: u8, batch: u8, deadline: Limit, heartbeat: Limit },
    ClaimFromAll { first: u8, batch: u8 },
    Complete { attempt: u8 },
    CompleteMany { attempts: Vec<u8> },
    CompleteAndClaim { attempts: Vec<u8>, queue: u8, batch: u8 },
    Fail { attempt: u8, retry_after: Option<bool>, last: bool },
    Snooze { attempt: u8, late: bool },
    Heartbeat { attempt: u8 },
    Extend { attempt: u8, over: bool },
    Cancel { job: u8, reason: bool },
    Retry { job: u8, queue: Option<u8>, priority: Option<u8>, when: When },
    Delete { job: u8 },
    DlqRetry { job: u8, queue: Option<u8>, when: When },
    DlqRetryMany { queue: Option<u8>, max_jobs: u8, to: Option<u8> },
    DlqPurge { queue: Option<u8>, kind: Option<bool>, max_jobs: u8 },
    Rescue { heartbeats: bool },
    Pause { queue: u8 },
    Resume { queue: u8 },
    Alter { queue: u8, max_attempts: Option<u8>, dead_letters: Option<bool>, short_retention: Option<bool> },
    /// A call that is refused.
    Refused(u8),
}

#[derive(Clone, Copy, Debug)]
pub enum Task {
    Rotate,
    /// Until nothing more can be pruned.
    Prune,
    CarryForward,
    PromoteDeferred,
    Retention,
    Rebuild,
    RecreateQueue(u8),
    Restart { kill: bool },
}

#[derive(Clone, Debug)]
pub enum Op {
    /// READ COMMITTED, REPEATABLE READ, SERIALIZABLE
    Begin(u8),
    Commit,
    Rollback,
    Savepoint,
    RollbackTo(u8),
    Release,
    Prepare,
    Decide { commit: bool },
    /// `guarded`: in a savepoint of its own, so that an error does not end the transaction.
    Verb { verb: Verb, guarded: bool },
    Task(Task),
}

fn queue() -> impl Strategy<Value = u8> {
    0..NAMES.len() as u8
}

fn when() -> impl Strategy<Value = When> {
    prop_oneof![5 => Just(When::Now), 3 => (0u8..4).prop_map(When::Past), 1 => Just(When::Soon), 1 => Just(When::Late)]
}

fn limit() -> impl Strategy<Value = Limit> {
    prop_oneof![4 => Just(Limit::Default), 1 => Just(Limit::None), 1 => Just(Limit::Over), 1 => Just(Limit::Hour)]
}

fn enqueues() -> impl Strategy<Value = Verb> {
    let one = (queue(), any::<bool>(), 1u8..5, when(), option::weighted(0.3, 1u8..4), any::<bool>(), any::<bool>());
    let many = (queue(), vec((1u8..5, when()), 0..8));
    prop_oneof![
        one.prop_map(|(queue, kind, priority, when, max_attempts, extras, insert)| Verb::Enqueue {
            queue,
            kind,
            priority,
            when,
            max_attempts,
            extras,
            insert
        }),
        many.prop_map(|(queue, jobs)| Verb::EnqueueMany { queue, jobs }),
    ]
}

fn claims() -> impl Strategy<Value = Verb> {
    let one = (queue(), 1u8..6, limit(), limit());
    prop_oneof![
        5 => one.prop_map(|(queue, batch, deadline, heartbeat)| Verb::Claim { queue, batch, deadline, heartbeat }),
        1 => (queue(), 1u8..8).prop_map(|(first, batch)| Verb::ClaimFromAll { first, batch }),
    ]
}

fn exits() -> impl Strategy<Value = Verb> {
    let attempts = || vec(any::<u8>(), 0..5);
    let fail = (any::<u8>(), option::of(any::<bool>()), prop::bool::weighted(0.2));
    prop_oneof![
        2 => any::<u8>().prop_map(|attempt| Verb::Complete { attempt }),
        2 => attempts().prop_map(|attempts| Verb::CompleteMany { attempts }),
        1 => (attempts(), queue(), 1u8..5).prop_map(|(attempts, queue, batch)| Verb::CompleteAndClaim { attempts, queue, batch }),
        4 => fail.prop_map(|(attempt, retry_after, last)| Verb::Fail { attempt, retry_after, last }),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(attempt, late)| Verb::Snooze { attempt, late }),
        1 => any::<u8>().prop_map(|attempt| Verb::Heartbeat { attempt }),
        2 => (any::<u8>(), prop::bool::weighted(0.7)).prop_map(|(attempt, over)| Verb::Extend { attempt, over }),
    ]
}

fn operations() -> impl Strategy<Value = Verb> {
    let to = || option::weighted(0.3, queue());
    let retry = (any::<u8>(), to(), option::weighted(0.3, 1u8..5), when());
    let alter = (queue(), option::of(1u8..4), option::of(any::<bool>()), option::weighted(0.2, any::<bool>()));
    prop_oneof![
        4 => (any::<u8>(), any::<bool>()).prop_map(|(job, reason)| Verb::Cancel { job, reason }),
        4 => retry.prop_map(|(job, queue, priority, when)| Verb::Retry { job, queue, priority, when }),
        2 => any::<u8>().prop_map(|job| Verb::Delete { job }),
        1 => (any::<u8>(), to(), when()).prop_map(|(job, queue, when)| Verb::DlqRetry { job, queue, when }),
        1 => (to(), 1u8..4, to()).prop_map(|(queue, max_jobs, to)| Verb::DlqRetryMany { queue, max_jobs, to }),
        1 => (to(), option::weighted(0.3, any::<bool>()), 1u8..4).prop_map(|(queue, kind, max_jobs)| Verb::DlqPurge { queue, kind, max_jobs }),
        3 => any::<bool>().prop_map(|heartbeats| Verb::Rescue { heartbeats }),
        1 => queue().prop_map(|queue| Verb::Pause { queue }),
        2 => queue().prop_map(|queue| Verb::Resume { queue }),
        1 => alter.prop_map(|(queue, max_attempts, dead_letters, short_retention)| Verb::Alter { queue, max_attempts, dead_letters, short_retention }),
        1 => any::<u8>().prop_map(Verb::Refused),
    ]
}

fn task() -> impl Strategy<Value = Task> {
    prop_oneof![
        6 => Just(Task::Rotate),
        6 => Just(Task::Prune),
        4 => Just(Task::CarryForward),
        1 => Just(Task::PromoteDeferred),
        1 => Just(Task::Retention),
        2 => Just(Task::Rebuild),
        1 => queue().prop_map(Task::RecreateQueue),
        1 => any::<bool>().prop_map(|kill| Task::Restart { kill }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let verb = prop_oneof![5 => enqueues(), 5 => claims(), 6 => exits(), 5 => operations()];
    prop_oneof![
        60 => (verb, prop::bool::weighted(0.7)).prop_map(|(verb, guarded)| Op::Verb { verb, guarded }),
        6 => (0u8..5).prop_map(|level| Op::Begin(level.saturating_sub(2))),
        5 => Just(Op::Commit),
        2 => Just(Op::Rollback),
        4 => Just(Op::Savepoint),
        3 => any::<u8>().prop_map(Op::RollbackTo),
        1 => Just(Op::Release),
        2 => Just(Op::Prepare),
        2 => prop::bool::weighted(0.7).prop_map(|commit| Op::Decide { commit }),
        12 => task().prop_map(Op::Task),
    ]
}

/// Sequences of about so many steps.
pub fn sequence(steps: usize) -> impl Strategy<Value = Vec<Op>> {
    vec(op(), steps / 2..=steps + steps / 2)
}
