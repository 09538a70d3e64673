//! The ledger against the database, while nobody else works.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use postgres::Client;
use rand::Rng;
use rand::rngs::StdRng;

use super::super::{Attempt, Stage, claim, complete};
use super::book::{Book, Story};

/// Four consumers claim up to 15 jobs, the holder one.
const MOST_ON_THEIR_WAY: usize = 61;

type States = BTreeMap<i64, String>;

/// What the crashes of a run have left: a run in which these are zero has tested little.
#[derive(Debug, Default)]
pub struct Found {
    pub survived_open: usize,
    /// Committed asynchronously, and not on disk.
    pub claims_lost: usize,
    pub ends_in_doubt: usize,
    pub prepared: usize,
    pub orphans: usize,
}

pub fn after_a_crash(stage: &Stage<'_>, book: &Book, rng: &mut StdRng, found: &mut Found) -> Result<()> {
    let mut client = stage.connect()?;
    let prepared = names_prepared(&mut client)?;
    for (name, ids) in &book.read()?.maybe_prepared {
        let word = if prepared.contains(name) { "prepared" } else { "unknown" };
        book.transaction(word, name, ids)?;
    }
    let story = book.read()?;
    for name in story.prepared.keys() {
        ensure!(prepared.contains(name), "prepared transaction {name} is gone");
    }
    stage.verify_clean()?;
    let states = states(&mut client)?;
    enqueued_and_completed(&story, &states)?;
    let before = story.void.len();
    attempts(&mut client, book, &story, &states)?;
    found.orphans += end_orphans(&mut client, book, &states)?;
    found.survived_open += story.open.len();
    found.claims_lost += book.read()?.void.len() - before;
    found.ends_in_doubt += story.ending.len();
    found.prepared += story.prepared.len();
    finish_some(&mut client, book, rng)?;
    decide_some(&mut client, book, rng)?;
    stage.verify_clean()
}

fn names_prepared(client: &mut Client) -> Result<Vec<String>> {
    let rows = client.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()", &[])?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

fn states(client: &mut Client) -> Result<States> {
    let mut states = States::new();
    for view in ["awa.jobs", "awa.terminal_jobs"] {
        for row in client.query(&format!("SELECT job_id, state FROM {view}"), &[])? {
            let (id, state): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
            if let Some(other) = states.insert(id, state.clone()) {
                bail!("job {id} is {other} and {state}");
            }
        }
    }
    Ok(states)
}

fn enqueued_and_completed(story: &Story, states: &States) -> Result<()> {
    let lost: Vec<&i64> = story.enqueued.iter().filter(|id| !states.contains_key(id)).collect();
    ensure!(lost.is_empty(), "{} acknowledged jobs are lost: {lost:?}", lost.len());
    let undone: Vec<_> = story.completed.keys().filter(|id| states.get(id).is_none_or(|state| state != "completed")).collect();
    ensure!(undone.is_empty(), "{} acknowledged completions are undone: {undone:?}", undone.len());
    let there = story.prepared.values().flatten().chain(&story.rolled_back).find(|id| states.contains_key(id));
    ensure!(there.is_none(), "job {there:?} is there, but its transaction did not commit");
    Ok(())
}

/// By attempt: is its lease current?
fn alive(client: &mut Client, attempts: impl Iterator<Item = Attempt>) -> Result<Vec<(Attempt, bool)>> {
    let (ids, leases): (Vec<i64>, Vec<i64>) = attempts.map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
    let rows = client.query("SELECT job_id, run_lease, result = 'alive' FROM awa.heartbeat_many($1, $2)", &[&ids, &leases])?;
    rows.iter().map(|row| Ok((Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? }, row.try_get(2)?))).collect()
}

/// Open attempts are open, with their lease; what was in doubt is entered into the ledger.
fn attempts(client: &mut Client, book: &Book, story: &Story, states: &States) -> Result<()> {
    let state = |attempt: Attempt| states.get(&attempt.job_id).map_or("gone", String::as_str);
    for (attempt, alive) in alive(client, story.open.iter().copied())? {
        ensure!(alive && state(attempt) == "running", "{attempt:?} was open; alive: {alive}, its job is {}", state(attempt));
    }
    for (attempt, alive) in alive(client, story.void.iter().copied())? {
        ensure!(!alive, "{attempt:?} was rolled back, and its lease is current");
    }
    for (attempt, alive) in alive(client, story.maybe_open.iter().copied())? {
        // Not alive, and the job runs: the claim was rolled back when its session was terminated, another session took the job, and was
        // terminated before it had the answer. Such a job is an orphan, and `end_orphans` knows how many there can be.
        ensure!(!alive || state(attempt) == "running", "{attempt:?}: alive, its job is {}", state(attempt));
        book.attempts(if alive { "claimed" } else { "void" }, &[attempt])?;
    }
    for (attempt, alive) in alive(client, story.ending.iter().copied())? {
        let word = match (alive, state(attempt)) {
            (true, "running") => "not_ended",
            (false, "completed") => "completed",
            // Its claim had not reached the disk.
            (false, "available") => "void",
            (_, other) => bail!("{attempt:?} was being completed; alive: {alive}, its job is {other}"),
        };
        book.attempts(word, &[attempt])?;
    }
    Ok(())
}

/// A claim commits before its answer is sent: when the server dies between, its jobs run under a lease that nobody knows. They are ended
/// as the documentation says. There cannot be more than the claims that were on their way.
fn end_orphans(client: &mut Client, book: &Book, states: &States) -> Result<usize> {
    let known: BTreeSet<i64> = book.read()?.open.iter().map(|attempt| attempt.job_id).collect();
    let orphans: Vec<i64> =
        states.iter().filter(|(id, state)| *state == "running" && !known.contains(id)).map(|(id, _)| *id).collect();
    ensure!(orphans.len() <= MOST_ON_THEIR_WAY, "{} jobs run, and nobody has claimed them: {orphans:?}", orphans.len());
    for job in &orphans {
        let answer: String = client.query_one("SELECT awa.cancel($1, 'its claim was never answered')", &[job])?.try_get(0)?;
        ensure!(answer == "cancelled", "job {job} runs; cancel answered {answer}");
    }
    book.jobs("orphans", &orphans)?;
    Ok(orphans.len())
}

/// Half of the open attempts; the others live on into the next crash.
fn finish_some(client: &mut Client, book: &Book, rng: &mut StdRng) -> Result<()> {
    for attempt in book.read()?.open {
        if rng.random_ratio(1, 2) {
            finish(client, book, attempt)?;
        }
    }
    Ok(())
}

fn finish(client: &mut Client, book: &Book, attempt: Attempt) -> Result<()> {
    book.attempts("ending", &[attempt])?;
    let answer = complete(client, attempt).with_context(|| format!("{attempt:?} was open"))?;
    ensure!(answer == "completed", "{attempt:?} was open; complete answered {answer}");
    book.attempts("completed", &[attempt])
}

fn available(client: &mut Client) -> Result<i64> {
    Ok(client.query_one("SELECT available FROM awa.queue_counts('q')", &[])?.try_get(0)?)
}

fn decide_some(client: &mut Client, book: &Book, rng: &mut StdRng) -> Result<()> {
    for (name, ids) in book.read()?.prepared {
        match rng.random_range(0..4) {
            0 => {}
            1 => decide(client, book, &name, &ids, false)?,
            _ => decide(client, book, &name, &ids, true)?,
        }
    }
    Ok(())
}

fn decide(client: &mut Client, book: &Book, name: &str, ids: &[i64], commit: bool) -> Result<()> {
    let before = available(client)?;
    client.batch_execute(&format!("{} PREPARED '{name}'", if commit { "COMMIT" } else { "ROLLBACK" }))?;
    book.transaction(if commit { "committed" } else { "rolled_back" }, name, ids)?;
    let (after, more) = (available(client)?, if commit { ids.len() as i64 } else { 0 });
    ensure!(after == before + more, "{name} has {} jobs; {before} were available, now {after} (commit: {commit})", ids.len());
    Ok(())
}

/// Everything comes out, once.
pub fn at_the_end(stage: &Stage<'_>, book: &Book) -> Result<String> {
    let mut client = stage.connect()?;
    for (name, ids) in book.read()?.prepared {
        decide(&mut client, book, &name, &ids, true)?;
    }
    for attempt in book.read()?.open {
        finish(&mut client, book, attempt)?;
    }
    loop {
        let since = book.now();
        let attempts = claim(&mut client, 1000)?;
        if attempts.is_empty() {
            break;
        }
        book.drew(since, &attempts)?;
        let (ids, leases): (Vec<i64>, Vec<i64>) = attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
        let refused = client.query("SELECT job_id, result FROM awa.complete_many($1, $2) WHERE result <> 'completed'", &[&ids, &leases])?;
        ensure!(refused.is_empty(), "{refused:?}");
        book.attempts("completed", &attempts)?;
    }
    let story = book.read()?;
    let left: Vec<_> = story.enqueued.iter().filter(|id| !story.completed.contains_key(id) && !story.orphans.contains(id)).collect();
    if let Some(first) = left.first() {
        let state = states(&mut client)?.remove(first);
        let again = claim(&mut client, 1000)?.len();
        stage.verify_clean().context("jobs never came out")?;
        bail!("{} acknowledged jobs never came out: {left:?}; the first is {state:?}; verify() is clean; {again} come now", left.len());
    }
    let never: Vec<_> = story.rolled_back.iter().filter(|id| story.completed.contains_key(id)).collect();
    ensure!(never.is_empty(), "jobs of rolled-back transactions came out: {never:?}");
    let states = states(&mut client)?;
    enqueued_and_completed(&story, &states)?;
    let unfinished = states.iter().filter(|(id, state)| *state != "completed" && !story.orphans.contains(id)).count();
    ensure!(unfinished == 0, "{unfinished} jobs are unfinished in an empty queue");
    stage.verify_clean()?;
    Ok(format!("{} enqueued, {} completed, {} leases", story.enqueued.len(), story.completed.len(), story.leases.len()))
}
