//! The checker against histories that are right, and against the same ones with a lie in them.

use super::*;
use crate::suites::history::record::Transaction;

const QUEUE: usize = 0;

/// A transaction that is asked to end one tick after its last call.
fn transaction(fate: Fate, calls: Vec<Call>) -> Transaction {
    let last = calls.last().map_or(0, |call| call.at.to);
    Transaction { calls, fate, end: Span { from: last + 1, to: last + 2 }, single: false }
}

fn call(from: Tick, did: Did) -> Call {
    Call { at: Span { from, to: from + 1 }, did, undone: None }
}

fn enqueued(from: Tick, job_id: i64) -> Call {
    call(from, Did::Enqueued(vec![NewJob { token: job_id, job_id, queue: QUEUE, priority: 2, timed: false }]))
}

fn claimed(from: Tick, job_id: i64, lease: i64, attempt: i32) -> Call {
    let jobs = vec![Handed { job_id, lease, token: job_id, attempt }];
    call(from, Did::Claimed { jobs, mortal: false, in_order: true })
}

fn ended(from: Tick, job_id: i64, lease: i64, word: Word) -> Call {
    call(from, Did::Ended { job_id, lease, word })
}

/// Job 1 is tried twice and completed, job 2 is cancelled, tried again and runs, job 3 waits.
fn good() -> History {
    let yes = |calls| transaction(Fate::Yes, calls);
    History {
        transactions: vec![
            yes(vec![enqueued(10, 1)]),
            yes(vec![enqueued(20, 2)]),
            yes(vec![claimed(30, 1, 101, 1)]),
            yes(vec![ended(40, 1, 101, Word::Retry)]),
            yes(vec![claimed(50, 1, 102, 2), ended(53, 1, 102, Word::Completed), ended(56, 1, 102, Word::Already)]),
            yes(vec![ended(60, 1, 101, Word::Stale)]),
            yes(vec![call(70, Did::Cancelled { job_id: 2 })]),
            yes(vec![call(80, Did::Redriven { job_id: 2 })]),
            transaction(Fate::No, vec![claimed(90, 2, 103, 1), ended(93, 2, 103, Word::Completed)]),
            yes(vec![claimed(100, 2, 104, 1)]),
            yes(vec![enqueued(110, 3)]),
        ],
        beside: Vec::new(),
    }
}

fn shown(states: &[(i64, &str)]) -> Final {
    Final { jobs: states.iter().map(|(job_id, state)| (*job_id, ((*state).to_owned(), *job_id))).collect(), shown_twice: Vec::new() }
}

fn at_the_end() -> Final {
    shown(&[(1, "completed"), (2, "running"), (3, "available")])
}

fn assert_found(history: &History, shown: &Final, what: &str) {
    let (found, _) = check(history, shown);
    assert!(found.iter().any(|line| line.contains(what)), "{what:?} is not in {found:#?}");
}

/// The good history with one more transaction.
fn and(fate: Fate, calls: Vec<Call>) -> History {
    let mut history = good();
    history.transactions.push(transaction(fate, calls));
    history
}

#[test]
fn a_good_history_passes_and_is_looked_at() {
    let (found, tally) = check(&good(), &at_the_end());
    assert!(found.is_empty(), "{found:#?}");
    assert_eq!((tally.jobs, tally.claims, tally.refusals, tally.explained), (3, 4, 1, 3));
}

#[test]
fn a_lease_given_twice_is_found() {
    assert_found(&and(Fate::No, vec![claimed(200, 3, 101, 1)]), &at_the_end(), "lease 101 was given to jobs");
}

#[test]
fn two_holders_of_one_job_are_found() {
    assert_found(&and(Fate::Yes, vec![claimed(200, 2, 105, 1)]), &at_the_end(), "were held at once");
    // Even if one of them is rolled back.
    assert_found(&and(Fate::No, vec![claimed(200, 2, 105, 1), enqueued(210, 9)]), &at_the_end(), "were held at once");
}

#[test]
fn a_claim_that_was_given_back_is_held_no_more() {
    let mut history = and(Fate::No, vec![claimed(200, 3, 105, 1)]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 3, 106, 1)]));
    let (found, _) = check(&history, &shown(&[(1, "completed"), (2, "running"), (3, "running")]));
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_claim_undone_by_a_savepoint_is_held_until_then() {
    let mut early = claimed(200, 3, 105, 1);
    early.undone = Some(220);
    let mut history = and(Fate::Yes, vec![early, enqueued(230, 9)]);
    let end = shown(&[(1, "completed"), (2, "running"), (3, "running"), (9, "available")]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(225, 3, 106, 1)]));
    assert!(check(&history, &end).0.is_empty());
    history.transactions.pop();
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 3, 106, 1)]));
    assert_found(&history, &end, "were held at once");
}

#[test]
fn a_job_handed_out_after_its_end_is_found() {
    assert_found(&and(Fate::Yes, vec![claimed(200, 1, 105, 3)]), &at_the_end(), "given after the end of the job");
    let mut history = and(Fate::Yes, vec![call(200, Did::Deleted { job_id: 1 })]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 1, 105, 1)]));
    assert_found(&history, &at_the_end(), "given after the job was deleted");
}

#[test]
fn an_enqueue_seen_too_early_or_in_vain_is_found() {
    let mut history = and(Fate::No, vec![enqueued(200, 9)]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 9, 105, 1)]));
    assert_found(&history, &at_the_end(), "its enqueue was rolled back");
    let mut history = and(Fate::Yes, vec![enqueued(200, 9), enqueued(220, 10)]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 9, 105, 1)]));
    assert_found(&history, &at_the_end(), "given before the enqueue was committed");
}

#[test]
fn a_second_exit_is_found() {
    assert_found(&and(Fate::Yes, vec![ended(200, 1, 102, Word::Failed)]), &at_the_end(), "ended twice");
    assert_found(&and(Fate::No, vec![ended(200, 1, 102, Word::Completed)]), &at_the_end(), "of an attempt that was over");
    assert_found(&and(Fate::No, vec![ended(200, 2, 103, Word::Completed)]), &at_the_end(), "whose claim was rolled back");
    assert_found(&and(Fate::Yes, vec![ended(200, 2, 104, Word::Already)]), &at_the_end(), "had not ended it");
}

#[test]
fn a_refused_good_lease_is_found() {
    assert_found(&and(Fate::Yes, vec![ended(200, 2, 104, Word::Stale)]), &at_the_end(), "a good lease was refused");
    // Not if somebody else may have ended it: a rescue, or a cancel that was under way.
    let mut history = and(Fate::Yes, vec![ended(200, 2, 104, Word::Stale)]);
    history.transactions.push(transaction(Fate::Yes, vec![call(190, Did::Cancelled { job_id: 2 }), enqueued(210, 9)]));
    let end = shown(&[(1, "completed"), (2, "cancelled"), (3, "available"), (9, "available")]);
    assert!(check(&history, &end).0.is_empty());
}

#[test]
fn wrong_numbers_of_attempts_are_found() {
    let mut history = good();
    history.transactions.push(transaction(Fate::Yes, vec![claimed(200, 3, 105, 2)]));
    assert_found(&history, &at_the_end(), "the first attempt is number 2");
    history.transactions.pop();
    history.transactions.push(transaction(Fate::Yes, vec![ended(200, 2, 104, Word::Snooze)]));
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 2, 105, 2)]));
    assert_found(&history, &at_the_end(), "attempt 2 follows attempt 1");
}

#[test]
fn a_lost_job_is_found() {
    assert_found(&good(), &shown(&[(1, "completed"), (2, "running")]), "shown as None");
    // A completed one may be gone with its segment.
    assert!(check(&good(), &shown(&[(2, "running"), (3, "available")])).0.is_empty());
}

#[test]
fn a_wrong_state_is_found() {
    assert_found(&good(), &shown(&[(1, "failed"), (2, "running"), (3, "available")]), "Some(\"failed\")");
    assert_found(&good(), &shown(&[(1, "completed"), (2, "available"), (3, "available")]), "Some(\"available\")");
    assert_found(&good(), &shown(&[(1, "completed"), (2, "running"), (3, "running")]), "Some(\"running\")");
}

#[test]
fn an_invented_job_is_found() {
    let mut end = at_the_end();
    end.jobs.insert(77, ("available".to_owned(), 77));
    assert_found(&good(), &end, "nobody has enqueued it");
    let mut end = at_the_end();
    end.shown_twice.push(1);
    assert_found(&good(), &end, "is shown twice");
    let mut end = at_the_end();
    end.jobs.insert(3, ("available".to_owned(), 4));
    assert_found(&good(), &end, "has token 4");
}

#[test]
fn a_job_left_behind_is_found() {
    let mut history = and(Fate::Yes, vec![enqueued(200, 9)]);
    let end = shown(&[(1, "completed"), (2, "running"), (3, "running"), (9, "running")]);
    history.transactions.push(transaction(Fate::Yes, vec![claimed(210, 9, 105, 1)]));
    history.transactions.push(transaction(Fate::Yes, vec![claimed(220, 3, 106, 1)]));
    assert_found(&history, &end, "was left behind");
    let mut right = and(Fate::Yes, vec![enqueued(200, 9)]);
    right.transactions.push(transaction(Fate::Yes, vec![claimed(210, 3, 106, 1)]));
    right.transactions.push(transaction(Fate::Yes, vec![claimed(220, 9, 105, 1)]));
    let (found, tally) = check(&right, &end);
    assert!(found.is_empty() && tally.ordered_pairs > 0, "{found:#?} {tally:?}");
    // Not if another claimer was at work meanwhile, or the job was being carried.
    let mut crowded = history.clone();
    let mut other = call(209, Did::Claimed { jobs: Vec::new(), mortal: false, in_order: true });
    other.at.to = 212;
    crowded.transactions.push(transaction(Fate::Yes, vec![other]));
    assert!(check(&crowded, &end).0.is_empty());
    history.beside.push((Beside::Carry, Span { from: 205, to: 206 }));
    assert!(check(&history, &end).0.is_empty());
}
