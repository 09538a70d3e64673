//! A worker: transactions of a few random statements, with savepoints, pauses, and an end that is not always a commit.

use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::{Client, Config};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::actions;
use super::book::{Book, Event, Exit, Fate};
use crate::suites::{Attempt, races::pid_of};

/// Errors that this load provokes: a stale lease, a claim not committed, serialization, deadlock, cancelled, terminated.
const EXPECTED: [&str; 8] = ["55000", "55006", "40001", "40P01", "57014", "57P01", "25P02", "53400"];

pub struct Worker<'a> {
    rng: StdRng,
    number: usize,
    book: &'a Book,
    config: &'a Config,
    pid: &'a AtomicI32,
    client: Client,
    /// Attempts of committed claims that this worker has not ended.
    open: Vec<Attempt>,
    /// What the transaction under way has done; empty outside of one.
    events: Vec<Event>,
    savepoints: Vec<usize>,
    prepared: u64,
}

impl<'a> Worker<'a> {
    pub fn new(seed: u64, number: usize, book: &'a Book, config: &'a Config, pid: &'a AtomicI32) -> Result<Self> {
        let client = super::connect(config)?;
        let rng = StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(number as u64));
        let mut worker =
            Self { rng, number, book, config, pid, client, open: Vec::new(), events: Vec::new(), savepoints: Vec::new(), prepared: 0 };
        worker.reconnect()?;
        Ok(worker)
    }

    fn reconnect(&mut self) -> Result<()> {
        self.client = super::connect(self.config)?;
        self.pid.store(pid_of(&mut self.client)?, Ordering::Relaxed);
        Ok(())
    }

    pub fn run(mut self, steps: u64) -> Result<()> {
        for step in 0..steps {
            let did = match self.rng.random_range(0..10) {
                0..=3 => self.single(),
                4..=8 => self.block(),
                _ => self.prepared(),
            };
            did.with_context(|| format!("worker {}, step {step}", self.number))?;
        }
        self.pid.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// A statement that is its own transaction.
    fn single(&mut self) -> Result<()> {
        let hurried = self.rng.random_ratio(1, 12);
        if hurried && self.client.batch_execute("SET statement_timeout = '1ms'").is_err() {
            return self.reconnect();
        }
        let claims = self.rng.random_ratio(2, 5);
        let touched = if claims { Vec::new() } else { self.some_attempts() };
        match self.act(claims, &touched) {
            Ok(events) => self.close_books(&events, Fate::Committed),
            Err(error) if self.client.is_closed() => {
                self.excuse(&error)?;
                if claims {
                    self.book.lost_claim();
                }
                let events: Vec<Event> = touched.iter().map(|attempt| Event::Claimed(*attempt)).collect();
                self.book.enter(&events, Fate::Unknown);
            }
            Err(error) => self.excuse(&error)?,
        }
        if self.client.is_closed() || (hurried && self.client.batch_execute("RESET statement_timeout").is_err()) {
            self.reconnect()?;
        }
        Ok(())
    }

    fn block(&mut self) -> Result<()> {
        let isolation = ["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][self.rng.random_range(0..4)];
        let hurry = if self.rng.random_ratio(1, 20) { "SET LOCAL statement_timeout = '1ms'" } else { "" };
        let mut alive = self.client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}; {hurry}")).is_ok();
        let steps = self.rng.random_range(1..6);
        for _ in 0..steps {
            alive = alive && self.block_step()?;
        }
        let commit = alive && self.rng.random_ratio(7, 10);
        let fate = if commit { self.commit()? } else { Fate::Aborted };
        if !commit && !self.client.is_closed() {
            drop(self.client.batch_execute("ROLLBACK"));
        }
        self.savepoints.clear();
        let events = std::mem::take(&mut self.events);
        self.close_books(&events, fate);
        if self.client.is_closed() { self.reconnect() } else { Ok(()) }
    }

    /// False: the transaction cannot go on.
    fn block_step(&mut self) -> Result<bool> {
        match self.rng.random_range(0..10) {
            0 | 1 if self.savepoints.len() < 4 => {
                self.savepoints.push(self.events.len());
                Ok(self.client.batch_execute(&format!("SAVEPOINT s{}", self.savepoints.len())).is_ok())
            }
            2 => Ok(self.roll_back_to_savepoint()),
            3 if !self.savepoints.is_empty() => {
                let name = format!("RELEASE SAVEPOINT s{}", self.savepoints.len());
                self.savepoints.pop();
                Ok(self.client.batch_execute(&name).is_ok())
            }
            4 => {
                thread::sleep(Duration::from_millis(self.rng.random_range(0..15)));
                Ok(true)
            }
            _ => {
                let claims = self.rng.random_ratio(2, 5);
                let attempts = self.some_attempts();
                match self.act(claims, &attempts) {
                    Ok(events) => {
                        self.events.extend(events);
                        Ok(true)
                    }
                    Err(error) => {
                        self.excuse(&error)?;
                        Ok(!self.client.is_closed() && !self.savepoints.is_empty() && self.roll_back_to_savepoint())
                    }
                }
            }
        }
    }

    fn roll_back_to_savepoint(&mut self) -> bool {
        if self.savepoints.is_empty() {
            return true;
        }
        let to = self.rng.random_range(0..self.savepoints.len());
        let undone = self.events.split_off(self.savepoints.get(to).copied().unwrap_or_default());
        self.savepoints.truncate(to + 1);
        self.close_books(&undone, Fate::Aborted);
        self.client.batch_execute(&format!("ROLLBACK TO SAVEPOINT s{}", to + 1)).is_ok()
    }

    /// Commits; when the answer is lost, asks the server what became of the transaction.
    fn commit(&mut self) -> Result<Fate> {
        let xid = self.client.query_one("SELECT pg_current_xact_id_if_assigned()::text", &[]);
        let xid: Option<String> = match xid {
            Ok(row) => row.try_get(0)?,
            Err(_) => return Ok(Fate::Aborted),
        };
        match self.client.batch_execute("COMMIT") {
            Ok(()) => Ok(Fate::Committed),
            Err(error) if self.client.is_closed() => {
                self.excuse(&error.into())?;
                self.ask(xid)
            }
            Err(error) => {
                self.excuse(&error.into())?;
                Ok(Fate::Aborted)
            }
        }
    }

    fn ask(&mut self, xid: Option<String>) -> Result<Fate> {
        let Some(xid) = xid else { return Ok(Fate::Aborted) };
        let mut client = super::connect(self.config)?;
        for _ in 0..1000 {
            let status: Option<String> = client.query_one("SELECT pg_xact_status(($1::text)::xid8)", &[&xid])?.try_get(0)?;
            match status.as_deref() {
                Some("committed") => return Ok(Fate::Committed),
                Some("aborted") => return Ok(Fate::Aborted),
                _ => thread::sleep(Duration::from_millis(10)),
            }
        }
        Ok(Fate::Unknown)
    }

    /// Only enqueues may be part of a prepared transaction.
    fn prepared(&mut self) -> Result<()> {
        self.prepared += 1;
        let name = format!("w{}-{}", self.number, self.prepared);
        let mut events = Vec::new();
        let mut prepare = || -> Result<()> {
            self.client.batch_execute("BEGIN")?;
            for _ in 0..self.rng.random_range(1..3) {
                events.extend(actions::enqueue(&mut self.client, &mut self.rng, self.book)?);
            }
            Ok(self.client.batch_execute(&format!("PREPARE TRANSACTION '{name}'"))?)
        };
        let done = prepare();
        if let Err(error) = done {
            self.excuse(&error)?;
            drop(self.client.batch_execute("ROLLBACK"));
        } else {
            thread::sleep(Duration::from_millis(self.rng.random_range(0..10)));
        }
        if self.client.is_closed() {
            self.reconnect()?;
        }
        let commit = self.rng.random_ratio(2, 3);
        let fate = self.decide(&name, commit)?;
        self.close_books(&events, fate);
        Ok(())
    }

    /// Commits or rolls back what is prepared under this name, however often the session is shot.
    fn decide(&mut self, name: &str, commit: bool) -> Result<Fate> {
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        let mut asked = false;
        loop {
            let there = self.client.query_opt("SELECT 1 FROM pg_prepared_xacts WHERE gid = $1", &[&name]);
            if let Ok(None) = there {
                return Ok(if asked && commit { Fate::Committed } else { Fate::Aborted });
            }
            if there.is_ok() {
                asked = true;
                drop(self.client.batch_execute(&format!("{verb} PREPARED '{name}'")));
            }
            if self.client.is_closed() {
                self.reconnect()?;
            }
        }
    }

    fn act(&mut self, claims: bool, attempts: &[Attempt]) -> Result<Vec<Event>> {
        let (client, rng, book) = (&mut self.client, &mut self.rng, self.book);
        if claims {
            return actions::claim(client, rng, book);
        }
        let one = attempts.first().copied();
        match (rng.random_range(0..15), one) {
            (0..=2, _) | (_, None) => actions::enqueue(client, rng, book),
            (3..=4, Some(attempt)) => actions::complete(client, attempt),
            (5..=7, Some(_)) => actions::complete_many(client, attempts),
            (8, Some(attempt)) => actions::fail(client, rng, attempt),
            (9, Some(attempt)) => actions::snooze(client, rng, attempt),
            (10, Some(attempt)) => actions::cancel(client, attempt.job_id),
            (11..=13, Some(attempt)) => {
                let job_id = book.failed(rng.random_range(0..60)).unwrap_or(attempt.job_id);
                actions::finished(client, rng, book, job_id)
            }
            (_, Some(attempt)) => actions::heartbeat(client, attempt),
        }
    }

    /// Attempts of this transaction, of this worker, of others; finished ones and twice the same among them.
    fn some_attempts(&mut self) -> Vec<Attempt> {
        let mut known: Vec<Attempt> = self.open.clone();
        for event in &self.events {
            if let Event::Claimed(attempt) = event {
                known.push(*attempt);
            }
        }
        for _ in 0..3 {
            known.extend(self.book.recent(self.rng.random_range(0..300)));
        }
        known.shuffle(&mut self.rng);
        known.truncate(self.rng.random_range(1..40));
        if let Some(first) = known.first().copied().filter(|_| self.rng.random_ratio(1, 4)) {
            known.push(first);
        }
        known
    }

    fn close_books(&mut self, events: &[Event], fate: Fate) {
        self.book.enter(events, fate);
        if fate == Fate::Aborted {
            return;
        }
        for event in events {
            match event {
                Event::Claimed(attempt) if fate == Fate::Committed => self.open.push(*attempt),
                Event::Ended { exit: Exit::Redriven | Exit::Removed, .. } => {}
                Event::Ended { job_id, .. } => self.open.retain(|attempt| attempt.job_id != *job_id),
                Event::Stale(stale) => self.open.retain(|attempt| attempt != stale),
                _ => {}
            }
        }
    }

    /// Errors of other kinds than this load provokes are the engine's.
    fn excuse(&self, error: &anyhow::Error) -> Result<()> {
        let Some(error) = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>()) else {
            ensure!(false, "{error:#}");
            return Ok(());
        };
        let Some(said) = error.as_db_error() else {
            ensure!(error.is_closed() || self.client.is_closed(), "{error:?}");
            self.book.count_error("connection lost".to_owned());
            return Ok(());
        };
        ensure!(EXPECTED.contains(&said.code().code()), "{} {} ({:?})", said.code().code(), said.message(), said.detail());
        self.book.count_error(said.code().code().to_owned());
        Ok(())
    }
}
