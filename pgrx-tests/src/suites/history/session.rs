//! A session that does anything, in transactions with savepoints and without, and writes down what it was told.

mod verbs;

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, Config};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::record::{Beside, Call, Did, Fate, Span, Tick, Transaction, Word};
use crate::process::wait_until;
use crate::suites::races::pid_of;
use crate::suites::{Attempt, stress_mixed};

/// Errors that this load provokes: a claim not committed, serialization, deadlock, cancelled, a failed transaction, no place, and those
/// of a server that goes down or comes up.
const EXPECTED: [&str; 10] = ["55006", "40001", "40P01", "57014", "57P01", "57P02", "57P03", "25P02", "53400", "08006"];

/// What sessions share: the clock of the history, and jobs to quarrel about.
#[derive(Default)]
pub struct Desk {
    clock: AtomicU64,
    tokens: AtomicI64,
    recent: Mutex<Vec<Attempt>>,
    ended: Mutex<Vec<i64>>,
}

impl Desk {
    pub fn tick(&self) -> Tick {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn token(&self) -> i64 {
        self.tokens.fetch_add(1, Ordering::SeqCst)
    }

    /// Puts one on the pile, and gives the `back`-th from the top.
    fn pile<T: Copy>(pile: &Mutex<Vec<T>>, new: Option<T>, back: usize) -> Option<T> {
        let mut pile = pile.lock().unwrap_or_else(PoisonError::into_inner);
        pile.extend(new);
        pile.len().checked_sub(1 + back).and_then(|index| pile.get(index)).copied()
    }
}

pub struct Session<'a> {
    number: usize,
    rng: StdRng,
    desk: &'a Desk,
    config: &'a Config,
    pid: &'a AtomicI32,
    client: Client,
    open: Vec<Attempt>,
    calls: Vec<Call>,
    savepoints: Vec<usize>,
    in_order: bool,
    prepared: usize,
    /// The server has said that it ends this session.
    lost: bool,
    /// When the last statement was asked for: if it failed, what it has aborted may be over since then.
    asked: Tick,
    pub transactions: Vec<Transaction>,
    pub beside: Vec<(Beside, Span)>,
}

/// How a statement went.
enum Went {
    Well,
    /// An error; the connection is there.
    Wrong,
    Lost,
}

impl<'a> Session<'a> {
    pub fn new(seed: u64, number: usize, desk: &'a Desk, config: &'a Config, pid: &'a AtomicI32) -> Result<Self> {
        let rng = StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(number as u64));
        let client = connect(config, pid)?;
        Ok(Self {
            number,
            rng,
            desk,
            config,
            pid,
            client,
            open: Vec::new(),
            calls: Vec::new(),
            savepoints: Vec::new(),
            in_order: true,
            prepared: 0,
            lost: false,
            asked: 0,
            transactions: Vec::new(),
            beside: Vec::new(),
        })
    }

    pub fn run(&mut self, steps: u64) -> Result<()> {
        for step in 0..steps {
            let done = match self.rng.random_range(0..20) {
                0..=8 => self.single(),
                9..=18 => self.block(),
                _ => self.prepare(),
            };
            done.with_context(|| format!("session {}, step {step}", self.number))?;
            if self.is_lost() {
                self.reconnect()?;
            }
        }
        self.pid.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn is_lost(&self) -> bool {
        self.lost || self.client.is_closed()
    }

    fn reconnect(&mut self) -> Result<()> {
        self.client = connect(self.config, self.pid)?;
        self.lost = false;
        Ok(())
    }

    // ---- transactions --------------------------------------------------------------------------------------------------

    /// A statement of its own.
    fn single(&mut self) -> Result<()> {
        self.in_order = true;
        let from = self.desk.tick();
        let verb = self.choose();
        match self.perform(&verb)? {
            Went::Well => self.close(Fate::Yes, Span { from, to: self.desk.tick() }, true),
            Went::Wrong => self.close(Fate::No, Span { from, to: self.desk.tick() }, true),
            Went::Lost => {
                let span = Span { from, to: self.desk.tick() };
                self.beside.push((verb.lost(), span));
                self.calls.extend(verb.feared().into_iter().map(|did| Call { at: span, did, undone: None }));
                self.close(Fate::Maybe, span, true);
            }
        }
        Ok(())
    }

    fn block(&mut self) -> Result<()> {
        let isolation = ["READ COMMITTED", "READ COMMITTED", "READ COMMITTED", "REPEATABLE READ"][self.rng.random_range(0..4)];
        self.in_order = isolation == "READ COMMITTED";
        let begun = self.desk.tick();
        let mut alive = self.client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).is_ok();
        for _ in 0..self.rng.random_range(1..6) {
            alive = alive && self.block_step()?;
        }
        let last = self.calls.last().map_or(begun, |call| call.at.to);
        let from = if alive { self.desk.tick() } else { last.min(self.asked) };
        let fate = if alive && self.rng.random_ratio(3, 4) { self.commit()? } else { Fate::No };
        if fate == Fate::No && !self.is_lost() && self.client.batch_execute("ROLLBACK").is_err() {
            self.lost = true;
        }
        let span = Span { from: if self.is_lost() { last.min(from) } else { from }, to: self.desk.tick() };
        if self.is_lost() {
            self.beside.push((Beside::Killed, span));
        }
        // One that is lost in its commit may have committed as early as that was asked for.
        self.close(fate, if fate == Fate::No { span } else { Span { from, ..span } }, false);
        Ok(())
    }

    /// False: the transaction cannot go on.
    fn block_step(&mut self) -> Result<bool> {
        match self.rng.random_range(0..10) {
            0 | 1 if self.savepoints.len() < 4 => {
                self.savepoints.push(self.calls.len());
                Ok(self.client.batch_execute(&format!("SAVEPOINT s{}", self.savepoints.len())).is_ok())
            }
            2 if !self.savepoints.is_empty() => {
                self.asked = self.desk.tick();
                Ok(self.roll_back_to_savepoint())
            }
            3 if !self.savepoints.is_empty() => {
                let name = format!("RELEASE SAVEPOINT s{}", self.savepoints.len());
                self.savepoints.pop();
                Ok(self.client.batch_execute(&name).is_ok())
            }
            _ => {
                let verb = self.choose();
                Ok(match self.perform(&verb)? {
                    Went::Well => true,
                    Went::Wrong => !self.savepoints.is_empty() && self.roll_back_to_savepoint(),
                    Went::Lost => false,
                })
            }
        }
    }

    /// What it undoes may be over since the last statement was asked for: an error has undone some of it before.
    fn roll_back_to_savepoint(&mut self) -> bool {
        let to = self.rng.random_range(0..self.savepoints.len());
        let first = self.savepoints.get(to).copied().unwrap_or_default();
        self.savepoints.truncate(to + 1);
        if self.client.batch_execute(&format!("ROLLBACK TO SAVEPOINT s{}", to + 1)).is_err() {
            // The session had been killed before: since when is not known.
            self.lost = true;
            return false;
        }
        for call in self.calls.iter_mut().skip(first) {
            call.undone = call.undone.or(Some(self.asked));
        }
        true
    }

    /// When the answer is lost, the server is asked what became of the transaction.
    fn commit(&mut self) -> Result<Fate> {
        let Ok(row) = self.client.query_one("SELECT pg_current_xact_id_if_assigned()::text", &[]) else {
            self.lost = true;
            return Ok(Fate::No);
        };
        let xid: Option<String> = row.try_get(0)?;
        let Err(error) = self.client.batch_execute("COMMIT") else { return Ok(Fate::Yes) };
        self.excuse(&error)?;
        self.lost |= ends_the_session(&error);
        let (Some(xid), true) = (xid, self.is_lost()) else { return Ok(Fate::No) };
        let mut fate = Fate::Maybe;
        let config = self.config;
        wait_until(Duration::from_secs(60), || {
            let status = stress_mixed::connect(config).and_then(|mut client| {
                let row = client.query_one("SELECT pg_xact_status(($1::text)::xid8)", &[&xid])?;
                Ok(row.try_get::<_, Option<String>>(0)?)
            });
            fate = match status.ok().flatten().as_deref() {
                Some("committed") => Fate::Yes,
                Some("aborted") => Fate::No,
                _ => Fate::Maybe,
            };
            fate != Fate::Maybe
        });
        Ok(fate)
    }

    /// Only enqueues may be part of a prepared transaction.
    fn prepare(&mut self) -> Result<()> {
        self.prepared += 1;
        self.in_order = true;
        let name = format!("history {} {}", self.number, self.prepared);
        let mut alive = self.client.batch_execute("BEGIN").is_ok();
        for _ in 0..self.rng.random_range(1..3) {
            let verb = self.some_enqueue();
            alive = alive && matches!(self.perform(&verb)?, Went::Well);
        }
        let begun = self.desk.tick();
        if alive && let Err(error) = self.client.batch_execute(&format!("PREPARE TRANSACTION '{name}'")) {
            self.excuse(&error)?;
            self.lost |= ends_the_session(&error);
        }
        if !alive && !self.is_lost() {
            drop(self.client.batch_execute("ROLLBACK"));
        }
        let commit = self.rng.random_ratio(2, 3);
        let from = self.desk.tick();
        let fate = self.decide(&name, commit)?;
        let span = Span { from: if fate == Fate::Yes { from } else { begun }, to: self.desk.tick() };
        self.close(fate, span, false);
        Ok(())
    }

    /// Commits or rolls back what is prepared under this name, however often the session is shot.
    fn decide(&mut self, name: &str, commit: bool) -> Result<Fate> {
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        let mut asked = false;
        for _ in 0..1000 {
            if self.is_lost() {
                self.reconnect()?;
            }
            match self.client.query_opt("SELECT 1 FROM pg_prepared_xacts WHERE gid = $1", &[&name]) {
                Ok(None) => return Ok(if asked && commit { Fate::Yes } else { Fate::No }),
                Ok(Some(_)) => {
                    asked = true;
                    drop(self.client.batch_execute(&format!("{verb} PREPARED '{name}'")));
                }
                Err(error) => {
                    self.excuse(&error)?;
                    self.lost |= ends_the_session(&error);
                }
            }
        }
        bail!("{name} cannot be decided")
    }

    /// The transaction is over; what it has done is entered.
    fn close(&mut self, fate: Fate, end: Span, single: bool) {
        let calls = std::mem::take(&mut self.calls);
        self.savepoints.clear();
        for call in calls.iter().filter(|call| call.undone.is_none()) {
            match &call.did {
                Did::Claimed { jobs, .. } if fate == Fate::Yes => {
                    for job in jobs {
                        let attempt = Attempt { job_id: job.job_id, run_lease: job.lease };
                        self.open.push(attempt);
                        Desk::pile(&self.desk.recent, Some(attempt), 0);
                    }
                }
                Did::Ended { job_id, lease, word } if fate != Fate::No => {
                    self.open.retain(|attempt| attempt.run_lease != *lease);
                    if *word == Word::Failed {
                        Desk::pile(&self.desk.ended, Some(*job_id), 0);
                    }
                }
                Did::Ended { lease, word: Word::Stale, .. } => self.open.retain(|attempt| attempt.run_lease != *lease),
                Did::Cancelled { job_id } if fate == Fate::Yes => {
                    Desk::pile(&self.desk.ended, Some(*job_id), 0);
                }
                _ => {}
            }
        }
        if !calls.is_empty() {
            self.transactions.push(Transaction { calls, fate, end, single });
        }
    }

    /// Errors of other kinds than this load provokes are the engine's.
    fn excuse(&self, error: &postgres::Error) -> Result<()> {
        match error.as_db_error() {
            None => ensure!(error.is_closed() || self.client.is_closed(), "{error:?}"),
            Some(said) => {
                ensure!(EXPECTED.contains(&said.code().code()), "{} {} ({:?})", said.code().code(), said.message(), said.detail());
            }
        }
        Ok(())
    }
}

fn ends_the_session(error: &postgres::Error) -> bool {
    error.is_closed() || error.code().is_some_and(|code| code.code().starts_with("57P"))
}

/// A server that was killed takes a moment to come back.
pub fn connect(config: &Config, pid: &AtomicI32) -> Result<Client> {
    let mut found = None;
    wait_until(Duration::from_secs(60), || {
        found = stress_mixed::connect(config).ok().and_then(|mut client| pid_of(&mut client).ok().map(|pid| (client, pid)));
        found.is_some()
    });
    let (mut client, number) = found.context("the server does not come back")?;
    client.batch_execute("SET deadlock_timeout = '100ms'")?;
    pid.store(number, Ordering::Relaxed);
    Ok(client)
}
