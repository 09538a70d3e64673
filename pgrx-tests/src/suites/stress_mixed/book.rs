//! What the clients were told. Each enqueued row carries a token in its args, so that a job of a lost connection can be recognised.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use postgres::{Client, Row};

use crate::suites::Attempt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pending,
    Committed,
    Aborted,
    /// The connection was lost while the commit was under way.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Completed,
    Failed,
    Cancelled,
    Retry,
    Snooze,
    /// An operator had a finished job tried again: it has another life, with an end of its own.
    Redriven,
    /// An operator deleted a finished job.
    Removed,
}

impl Exit {
    fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// What a transaction has done, to be entered when its end is known.
#[derive(Clone, Debug)]
pub enum Event {
    Enqueued { tokens: Vec<i64> },
    Claimed(Attempt),
    /// The lease is `None` for a cancel.
    Ended { job_id: i64, run_lease: Option<i64>, exit: Exit },
    /// The server refused the lease.
    Stale(Attempt),
}

#[derive(Default)]
struct Job {
    claims: BTreeSet<i64>,
    exits: Vec<(Option<i64>, Exit)>,
    stale: Vec<i64>,
    /// Some change of it may or may not have been committed.
    unknown: bool,
    /// Somebody has asked to have it tried again: it may come out after its end, before the answer is in the book.
    asked_again: bool,
    /// When its end was acknowledged.
    ended_at: Option<u64>,
}

#[derive(Default)]
struct Pages {
    clock: u64,
    next_token: i64,
    fates: BTreeMap<i64, Fate>,
    delivered: BTreeSet<i64>,
    job_of: BTreeMap<i64, i64>,
    token_of: BTreeMap<i64, i64>,
    leases: BTreeSet<i64>,
    jobs: BTreeMap<i64, Job>,
    unknown_claims: usize,
    recent: Vec<Attempt>,
    failed: Vec<i64>,
    errors: BTreeMap<String, usize>,
}

impl Pages {
    fn name_job(&mut self, token: i64, job_id: i64) -> Result<()> {
        let (job, other) = (*self.job_of.entry(token).or_insert(job_id), *self.token_of.entry(job_id).or_insert(token));
        ensure!(job == job_id && other == token, "token {token} is job {job} and {job_id}; job {job_id} has tokens {other} and {token}");
        Ok(())
    }
}

#[derive(Default)]
pub struct Book {
    /// Some jobs are scheduled seconds ahead.
    pub far: AtomicBool,
    pages: Mutex<Pages>,
}

impl Book {
    fn open(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment in the order of the book's entries.
    pub fn now(&self) -> u64 {
        let mut pages = self.open();
        pages.clock += 1;
        pages.clock
    }

    pub fn new_tokens(&self, count: usize) -> Vec<i64> {
        let mut pages = self.open();
        (0..count)
            .map(|_| {
                pages.next_token += 1;
                let token = pages.next_token;
                pages.fates.insert(token, Fate::Pending);
                token
            })
            .collect()
    }

    /// A row that a claim returned; `since` is from before the claim. Says what can be said at once.
    pub fn delivered(&self, row: &Row, since: u64) -> Result<Attempt> {
        let attempt = Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? };
        let token: i64 = row.try_get(3)?;
        let mut pages = self.open();
        ensure!(pages.leases.insert(attempt.run_lease), "{attempt:?} has a lease that was given before");
        ensure!(pages.fates.get(&token) != Some(&Fate::Aborted), "{attempt:?} was delivered, but its enqueue was rolled back");
        pages.delivered.insert(token);
        pages.name_job(token, attempt.job_id)?;
        if let Some(job) = pages.jobs.get(&attempt.job_id)
            && !job.asked_again
            && job.ended_at.is_some_and(|ended| ended < since)
        {
            bail!("{attempt:?} was delivered after its end: {:?}", job.exits);
        }
        Ok(attempt)
    }

    pub fn enter(&self, events: &[Event], fate: Fate) {
        let mut pages = self.open();
        pages.clock += 1;
        let now = pages.clock;
        for event in events {
            match (event, fate) {
                (Event::Enqueued { tokens }, _) => {
                    for token in tokens {
                        pages.fates.insert(*token, fate);
                    }
                }
                (_, Fate::Aborted | Fate::Pending) => {}
                (Event::Claimed(attempt), Fate::Committed) => {
                    pages.jobs.entry(attempt.job_id).or_default().claims.insert(attempt.run_lease);
                    pages.recent.push(*attempt);
                }
                (Event::Ended { job_id, run_lease, exit }, Fate::Committed) => {
                    let job = pages.jobs.entry(*job_id).or_default();
                    job.exits.push((*run_lease, *exit));
                    if exit.is_terminal() {
                        job.ended_at.get_or_insert(now);
                    }
                    if matches!(exit, Exit::Failed | Exit::Cancelled) {
                        pages.failed.push(*job_id);
                    }
                }
                (Event::Stale(attempt), _) => pages.jobs.entry(attempt.job_id).or_default().stale.push(attempt.run_lease),
                (Event::Claimed(Attempt { job_id, .. }) | Event::Ended { job_id, .. }, Fate::Unknown) => {
                    pages.jobs.entry(*job_id).or_default().unknown = true;
                }
            }
        }
    }

    /// To be said before the server is asked to have a job tried again.
    pub fn ask_again(&self, job_id: i64) {
        self.open().jobs.entry(job_id).or_default().asked_again = true;
    }

    /// Finished jobs that must be shown once: those that never completed, were not deleted, and of which every answer is known.
    pub fn check_history(&self, shown: &[i64]) -> Result<()> {
        let mut times: BTreeMap<i64, usize> = BTreeMap::new();
        for job_id in shown {
            *times.entry(*job_id).or_default() += 1;
        }
        let twice: Vec<_> = times.iter().filter(|(_, times)| **times > 1).take(10).collect();
        ensure!(twice.is_empty(), "shown more than once: {twice:?}");
        let mut checked = 0;
        for (job_id, job) in &self.open().jobs {
            let has = |wanted: Exit| job.exits.iter().any(|(_, exit)| *exit == wanted);
            if job.unknown || job.ended_at.is_none() || has(Exit::Completed) {
                continue;
            }
            let (removed, is_shown) = (has(Exit::Removed), times.contains_key(job_id));
            ensure!(removed != is_shown, "job {job_id}: shown {is_shown}, deleted {removed}; exits {:?}", job.exits);
            checked += 1;
        }
        println!("        {checked} finished jobs are where they should be");
        Ok(())
    }

    /// A claim whose answer was lost: its jobs run, and nobody has their lease.
    pub fn lost_claim(&self) {
        self.open().unknown_claims += 1;
    }

    pub fn count_error(&self, what: String) {
        *self.open().errors.entry(what).or_default() += 1;
    }

    /// An attempt that some session has had lately; it may be finished.
    pub fn recent(&self, choice: usize) -> Option<Attempt> {
        let pages = self.open();
        let first = pages.recent.len().saturating_sub(300);
        let recent = pages.recent.get(first..).unwrap_or_default();
        recent.get(choice.checked_rem(recent.len())?).copied()
    }

    /// A job that failed or was cancelled lately; it may have been tried again or deleted.
    pub fn failed(&self, choice: usize) -> Option<i64> {
        let pages = self.open();
        let first = pages.failed.len().saturating_sub(60);
        let failed = pages.failed.get(first..).unwrap_or_default();
        failed.get(choice.checked_rem(failed.len())?).copied()
    }

    pub fn drained(&self, attempt: Attempt) {
        let ended = Event::Ended { job_id: attempt.job_id, run_lease: Some(attempt.run_lease), exit: Exit::Completed };
        self.enter(&[Event::Claimed(attempt), ended], Fate::Committed);
    }

    /// Every attempt that was claimed and not ended is completed with the lease it has; those with a lost lease are cancelled.
    pub fn finish_open_attempts(&self, client: &mut Client) -> Result<()> {
        let mut open = Vec::new();
        for (job_id, job) in &self.open().jobs {
            let ended: BTreeSet<i64> = job.exits.iter().filter_map(|(lease, _)| *lease).collect();
            let cancelled = job.exits.iter().any(|(_, exit)| *exit == Exit::Cancelled);
            if !cancelled && !job.unknown {
                open.extend(job.claims.difference(&ended).map(|lease| Attempt { job_id: *job_id, run_lease: *lease }));
            }
        }
        let running = "SELECT job_id FROM awa.jobs WHERE state = 'running'";
        for attempt in open {
            let done = client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease]);
            ensure!(done.is_ok(), "{attempt:?} was open and could not be completed: {done:?}; {:?}", self.job_text(attempt.job_id));
            let ended = Event::Ended { job_id: attempt.job_id, run_lease: Some(attempt.run_lease), exit: Exit::Completed };
            self.enter(&[ended], Fate::Committed);
        }
        for row in client.query(running, &[])? {
            let job_id: i64 = row.try_get(0)?;
            let excused = self.open().unknown_claims > 0
                || self.open().jobs.get(&job_id).is_some_and(|job| job.unknown || job.asked_again);
            ensure!(excused, "job {job_id} runs, but every claim of it has ended: {}", self.job_text(job_id));
            client.query_one("SELECT awa.cancel($1)", &[&job_id])?;
            let mut pages = self.open();
            let job = pages.jobs.entry(job_id).or_default();
            job.unknown |= !job.asked_again;
            job.exits.push((None, Exit::Cancelled));
        }
        Ok(())
    }

    fn job_text(&self, job_id: i64) -> String {
        self.open().jobs.get(&job_id).map_or("never heard of".to_owned(), |job| {
            format!("claims {:?}, exits {:?}, stale {:?}, unknown {}", job.claims, job.exits, job.stale, job.unknown)
        })
    }

    /// After everything has been drained: one end for each acknowledged job, one exit for each attempt.
    pub fn balance(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let pages = self.open();
        for (token, fate) in &pages.fates {
            let job = pages.job_of.get(token);
            let has_ended = job.and_then(|job| pages.jobs.get(job)).is_some_and(|job| job.unknown || job.ended_at.is_some());
            match fate {
                Fate::Committed if !has_ended => wrong.push(format!("job {job:?} never ended")),
                Fate::Aborted if pages.delivered.contains(token) => wrong.push(format!("job {job:?} came out, but was rolled back")),
                Fate::Pending => wrong.push(format!("the fate of job {job:?} was never entered")),
                _ => {}
            }
        }
        for (job_id, job) in &pages.jobs {
            let ends = job.exits.iter().filter(|(_, exit)| exit.is_terminal()).count();
            let count_of = |wanted: Exit| job.exits.iter().filter(|(_, exit)| *exit == wanted).count();
            let cancelled = count_of(Exit::Cancelled) > 0;
            let again = count_of(Exit::Retry) + count_of(Exit::Snooze);
            let lives = 1 + count_of(Exit::Redriven);
            let mut leases: Vec<i64> = job.exits.iter().filter_map(|(lease, _)| *lease).collect();
            let count = leases.len();
            leases.sort_unstable();
            leases.dedup();
            let mut faults = Vec::new();
            if (ends != lives && !job.unknown) || count_of(Exit::Removed) > 1 {
                faults.push(format!("{ends} ends of {lives} lives"));
            }
            if leases.len() != count {
                faults.push("two exits of one attempt".to_owned());
            }
            let open = job.claims.len().checked_sub(again);
            let claimed_lives = lives.saturating_sub(count_of(Exit::Cancelled))..=lives;
            if !(job.unknown || open.is_some_and(|open| claimed_lives.contains(&open))) {
                faults.push(format!("{} claims, {again} of them to be repeated", job.claims.len()));
            }
            let refused = |lease: &&i64| job.claims.contains(*lease) && !leases.contains(*lease);
            if !cancelled && !job.unknown && job.stale.iter().any(|lease| refused(&lease)) {
                faults.push("a good lease was refused".to_owned());
            }
            if !faults.is_empty() {
                wrong.push(format!("job {job_id}: {}; claims {:?}, exits {:?}", faults.join(", "), job.claims, job.exits));
            }
        }
        let committed = pages.fates.values().filter(|fate| **fate == Fate::Committed).count();
        let claims: usize = pages.jobs.values().map(|job| job.claims.len()).sum();
        let redriven = pages.jobs.values().flat_map(|job| &job.exits).filter(|(_, exit)| *exit == Exit::Redriven).count();
        println!(
            "        {committed} jobs, {claims} claims, {redriven} tried again, {} lost answers; errors {:?}",
            pages.unknown_claims, pages.errors
        );
        ensure!(wrong.is_empty(), "{} entries do not balance:\n{}", wrong.len(), wrong.iter().take(20).cloned().collect::<Vec<_>>().join("\n"));
        Ok(())
    }

    pub fn name_jobs(&self, tokens: &[i64], ids: &[i64]) -> Result<()> {
        ensure!(tokens.len() == ids.len(), "{} rows, {} identifiers", tokens.len(), ids.len());
        let mut pages = self.open();
        tokens.iter().zip(ids).try_for_each(|(token, id)| pages.name_job(*token, *id))
    }
}
