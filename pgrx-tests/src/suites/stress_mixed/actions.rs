//! One statement of a worker, and what it means for the book if its transaction commits.

use std::sync::atomic::Ordering;

use anyhow::{Error, Result, anyhow};
use postgres::Client;
use rand::Rng;
use rand::rngs::StdRng;

use super::QUEUES;
use super::book::{Book, Event, Exit};
use crate::suites::Attempt;

pub const CLAIM: &str = "SELECT job_id, run_lease, attempt, (args ->> 't')::bigint FROM awa.claim($1::text[], $2)";

pub fn queue(rng: &mut StdRng) -> &'static str {
    QUEUES[rng.random_range(0..QUEUES.len())]
}

/// Microseconds from now, as a text that the server adds to its clock.
fn some_time(rng: &mut StdRng, past: bool) -> f64 {
    let early = if past { -1.0 } else { 0.0 };
    rng.random_range(early..0.25)
}

fn some_or_late_time(rng: &mut StdRng, far: bool) -> f64 {
    if far && rng.random_ratio(1, 3) { rng.random_range(2.0..5.0) } else { some_time(rng, true) }
}

pub fn enqueue(client: &mut Client, rng: &mut StdRng, book: &Book) -> Result<Vec<Event>> {
    let count = if rng.random_ratio(1, 2) { 1 } else { rng.random_range(1..60) };
    let tokens = book.new_tokens(count);
    let answer = enqueue_tokens(client, rng, book, &tokens);
    if answer.is_err() {
        // Whatever the reason, even a lost connection: who asks again must know that it may have happened.
        let sure = !client.is_closed();
        book.enter(&[Event::Enqueued { tokens: tokens.clone() }], if sure { super::book::Fate::Aborted } else { super::book::Fate::Unknown });
    }
    book.name_jobs(&tokens, &answer?)?;
    Ok(vec![Event::Enqueued { tokens }])
}

fn enqueue_tokens(client: &mut Client, rng: &mut StdRng, book: &Book, tokens: &[i64]) -> Result<Vec<i64>> {
    let (queue, far) = (queue(rng), book.far.load(Ordering::Relaxed));
    let args: Vec<serde_json::Value> = tokens.iter().map(|token| serde_json::json!({ "t": token, "pad": "x".repeat(rng.random_range(0..80)) })).collect();
    let priorities: Vec<i32> = tokens.iter().map(|_| rng.random_range(1..5)).collect();
    if let ([one], [priority]) = (args.as_slice(), priorities.as_slice()) {
        let delay = rng.random_ratio(1, 3).then(|| some_or_late_time(rng, far));
        let sql = "SELECT awa.enqueue($1, 'stress', $2, $3, clock_timestamp() + $4 * interval '1 second')";
        return Ok(vec![client.query_one(sql, &[&queue, one, priority, &delay])?.try_get(0)?]);
    }
    let delays: Vec<Option<f64>> = tokens.iter().map(|_| rng.random_ratio(1, 4).then(|| some_or_late_time(rng, far))).collect();
    let sql = "SELECT awa.enqueue_many($1, 'stress', $2, $3,
                   ARRAY(SELECT clock_timestamp() + d * interval '1 second' FROM unnest($4::float8[]) WITH ORDINALITY AS u (d, n) ORDER BY n))";
    Ok(client.query_one(sql, &[&queue, &args, &priorities, &delays])?.try_get(0)?)
}

pub fn claim(client: &mut Client, rng: &mut StdRng, book: &Book) -> Result<Vec<Event>> {
    let first = rng.random_range(0..QUEUES.len());
    let queues: Vec<&str> = QUEUES.iter().cycle().skip(first).take(rng.random_range(1..=QUEUES.len())).copied().collect();
    let count: i32 = if rng.random_ratio(1, 3) { 1 } else { rng.random_range(1..65) };
    let since = book.now();
    let rows = client.query(CLAIM, &[&queues, &count])?;
    rows.iter().map(|row| book.delivered(row, since).map(Event::Claimed)).collect()
}

pub fn complete(client: &mut Client, attempt: Attempt) -> Result<Vec<Event>> {
    let row = client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease])?;
    answer(attempt, row.try_get(0)?)
}

pub fn complete_many(client: &mut Client, attempts: &[Attempt]) -> Result<Vec<Event>> {
    let ids: Vec<i64> = attempts.iter().map(|attempt| attempt.job_id).collect();
    let leases: Vec<i64> = attempts.iter().map(|attempt| attempt.run_lease).collect();
    let mut events = Vec::new();
    for row in client.query("SELECT job_id, run_lease, result FROM awa.complete_many($1, $2)", &[&ids, &leases])? {
        events.extend(answer(Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? }, row.try_get(2)?)?);
    }
    Ok(events)
}

pub fn fail(client: &mut Client, rng: &mut StdRng, attempt: Attempt) -> Result<Vec<Event>> {
    let sql = "SELECT awa.fail($1, $2, 'no luck', $3 * interval '1 second', $4)";
    let (delay, last) = (some_time(rng, false) / 4.0, rng.random_ratio(1, 5));
    answer(attempt, client.query_one(sql, &[&attempt.job_id, &attempt.run_lease, &delay, &last])?.try_get(0)?)
}

pub fn snooze(client: &mut Client, rng: &mut StdRng, attempt: Attempt) -> Result<Vec<Event>> {
    let sql = "SELECT awa.snooze($1, $2, $3 * interval '1 second')";
    answer(attempt, client.query_one(sql, &[&attempt.job_id, &attempt.run_lease, &(some_time(rng, false) / 4.0)])?.try_get(0)?)
}

pub fn cancel(client: &mut Client, job_id: i64) -> Result<Vec<Event>> {
    let result: String = client.query_one("SELECT awa.cancel($1, 'because')", &[&job_id])?.try_get(0)?;
    match result.as_str() {
        "cancelled" => Ok(vec![Event::Ended { job_id, run_lease: None, exit: Exit::Cancelled }]),
        "not_found" | "already_finished" | "claim_uncommitted" => Ok(Vec::new()),
        other => Err(unexpected("cancel", other)),
    }
}

/// Has a finished job tried again, or deletes it, wherever it lies; most often it is not finished, or not there.
pub fn finished(client: &mut Client, rng: &mut StdRng, book: &Book, job_id: i64) -> Result<Vec<Event>> {
    let delay = rng.random_ratio(1, 3).then(|| some_time(rng, true));
    let to = rng.random_ratio(1, 3).then(|| queue(rng));
    let sql = match rng.random_range(0..10) {
        0 => "SELECT awa.delete_job($1)",
        1..=3 => "SELECT awa.dlq_retry($1, $2, run_at => clock_timestamp() + $3 * interval '1 second')",
        _ => "SELECT awa.retry($1, $2, run_at => clock_timestamp() + $3 * interval '1 second')",
    };
    let answer = if sql.contains("delete") {
        client.query_one(sql, &[&job_id])
    } else {
        book.ask_again(job_id);
        client.query_one(sql, &[&job_id, &to, &delay])
    };
    if answer.is_err() && client.is_closed() {
        book.enter(&[Event::Ended { job_id, run_lease: None, exit: Exit::Redriven }], super::book::Fate::Unknown);
    }
    let answer: String = answer?.try_get(0)?;
    let exit = match answer.as_str() {
        "retried" => Exit::Redriven,
        "deleted" => Exit::Removed,
        "not_found" | "not_finished" | "completed" => return Ok(Vec::new()),
        other => return Err(unexpected("retry or delete", other)),
    };
    Ok(vec![Event::Ended { job_id, run_lease: None, exit }])
}

pub fn heartbeat(client: &mut Client, attempt: Attempt) -> Result<Vec<Event>> {
    client.query_one("SELECT awa.heartbeat($1, $2)", &[&attempt.job_id, &attempt.run_lease])?;
    client.query_one("SELECT awa.extend($1, $2, '1 day')", &[&attempt.job_id, &attempt.run_lease])?;
    Ok(Vec::new())
}

fn answer(attempt: Attempt, result: &str) -> Result<Vec<Event>> {
    let exit = match result {
        "completed" => Exit::Completed,
        "failed" | "dead_lettered" => Exit::Failed,
        "retry" => Exit::Retry,
        "snooze" | "snoozed" => Exit::Snooze,
        "stale" => return Ok(vec![Event::Stale(attempt)]),
        "already" | "conflict" | "claim_uncommitted" => return Ok(Vec::new()),
        other => return Err(unexpected("an exit", other)),
    };
    Ok(vec![Event::Ended { job_id: attempt.job_id, run_lease: Some(attempt.run_lease), exit }])
}

fn unexpected(what: &str, answer: &str) -> Error {
    anyhow!("{what} answered {answer}")
}
