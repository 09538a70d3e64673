//! The clients. Each writes to the ledger what it is about to end, and what it was told, before its next call.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use postgres::error::SqlState;
use postgres::{Client, Config, NoTls};
use rand::Rng;
use rand::rngs::StdRng;

use super::super::races::pid_of;
use super::super::{Attempt, claim, complete, enqueue};
use super::book::Book;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Producer,
    /// Claims and completes.
    Consumer,
    /// Claims and keeps: its attempts are open when the server dies.
    Holder,
    /// Enqueues in prepared transactions.
    Preparer,
    /// Rotates, writes checkpoints, asks for counts.
    Operator,
}

pub struct Worker<'a> {
    role: Role,
    number: u64,
    rng: StdRng,
    book: &'a Book,
    client: Client,
    prepared: u32,
}

impl<'a> Worker<'a> {
    pub fn new(role: Role, number: u64, rng: StdRng, book: &'a Book, config: &Config, pid: &AtomicI32) -> Result<Self> {
        let mut client = config.connect(NoTls)?;
        pid.store(pid_of(&mut client)?, Ordering::Relaxed);
        Ok(Self { role, number, rng, book, client, prepared: 0 })
    }

    /// Until the server goes. Any other failure is the engine's.
    pub fn run(&mut self, over: &AtomicBool) -> Result<()> {
        while !over.load(Ordering::Relaxed) {
            let done = match self.role {
                Role::Producer => self.produce(),
                Role::Consumer => self.consume(),
                Role::Holder => self.hold(),
                Role::Preparer => self.prepare(),
                Role::Operator => self.operate(),
            };
            if let Err(error) = done {
                return if self.is_end_of_server(&error) { Ok(()) } else { Err(error.context(format!("{:?} {}", self.role, self.number))) };
            }
            thread::sleep(Duration::from_millis(self.rng.random_range(0..4)));
        }
        Ok(())
    }

    fn is_end_of_server(&self, error: &anyhow::Error) -> bool {
        let said = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>());
        let code = said.and_then(postgres::Error::code).map(|code| code.code().to_owned());
        match code {
            // Terminated by an administrator, by the crash of another process, or not accepting connections.
            Some(code) => code.starts_with("57P"),
            None => said.is_some() || self.client.is_closed(),
        }
    }

    fn produce(&mut self) -> Result<()> {
        let count = self.rng.random_range(1..20);
        if self.rng.random_ratio(1, 2) {
            let ids = enqueue(&mut self.client, count)?;
            self.book.jobs("ids", &ids)?;
            return self.book.jobs("enqueued", &ids);
        }
        let mut transaction = self.client.transaction()?;
        let ids = enqueue(&mut transaction, count)?;
        self.book.jobs("ids", &ids)?;
        if self.rng.random_ratio(1, 5) {
            return Ok(transaction.rollback()?);
        }
        transaction.commit()?;
        self.book.jobs("enqueued", &ids)
    }

    fn consume(&mut self) -> Result<()> {
        let count = self.rng.random_range(1..16);
        match self.rng.random_range(0..4) {
            0 => self.claim_and_complete_in_one_transaction(count),
            1 => {
                let attempts = self.claim_durably(count, true)?;
                self.complete_each(&attempts)
            }
            _ => {
                let since = self.book.now();
                let attempts = claim(&mut self.client, count)?;
                self.book.drew(since, &attempts)?;
                if self.rng.random_ratio(1, 2) { self.complete_each(&attempts) } else { self.complete_all(&attempts) }
            }
        }
    }

    /// In a transaction block the claim is as durable as its caller asks.
    fn claim_durably(&mut self, count: i32, may_roll_back: bool) -> Result<Vec<Attempt>> {
        let mut transaction = self.client.transaction()?;
        let since = self.book.now();
        let attempts = claim(&mut transaction, count)?;
        self.book.drew(since, &attempts)?;
        if may_roll_back && self.rng.random_ratio(1, 3) {
            // Before: others may have the jobs at once.
            self.book.attempts("void", &attempts)?;
            transaction.rollback()?;
            return Ok(Vec::new());
        }
        transaction.commit()?;
        self.book.attempts("claimed", &attempts)?;
        Ok(attempts)
    }

    fn complete_each(&mut self, attempts: &[Attempt]) -> Result<()> {
        for attempt in attempts {
            let one = [*attempt];
            self.book.attempts("ending", &one)?;
            if self.rng.random_ratio(1, 10) {
                let mut transaction = self.client.transaction()?;
                complete(&mut transaction, *attempt)?;
                transaction.rollback()?;
                self.book.attempts("not_ended", &one)?;
                self.book.attempts("ending", &one)?;
            }
            let answer = complete(&mut self.client, *attempt)?;
            ensure!(answer == "completed", "complete answered {answer}");
            self.book.attempts("completed", &one)?;
        }
        Ok(())
    }

    fn complete_all(&mut self, attempts: &[Attempt]) -> Result<()> {
        let (ids, leases): (Vec<i64>, Vec<i64>) = attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip();
        self.book.attempts("ending", attempts)?;
        for row in self.client.query("SELECT job_id, result FROM awa.complete_many($1, $2)", &[&ids, &leases])? {
            let (job_id, answer): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
            if answer != "completed" {
                bail!("job {job_id}: complete_many answered {answer}");
            }
        }
        self.book.attempts("completed", attempts)
    }

    fn claim_and_complete_in_one_transaction(&mut self, count: i32) -> Result<()> {
        let mut transaction = self.client.transaction()?;
        let since = self.book.now();
        let attempts = claim(&mut transaction, count)?;
        self.book.drew(since, &attempts)?;
        for attempt in &attempts {
            complete(&mut transaction, *attempt)?;
        }
        self.book.attempts("ending", &attempts)?;
        transaction.commit()?;
        self.book.attempts("completed", &attempts)
    }

    fn hold(&mut self) -> Result<()> {
        self.claim_durably(1, false)?;
        thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        self.prepared += 1;
        let name = format!("crash-{}-{}", self.number, self.prepared);
        self.client.batch_execute("BEGIN")?;
        let ids = enqueue(&mut self.client, self.rng.random_range(1..10))?;
        self.book.jobs("ids", &ids)?;
        self.book.transaction("preparing", &name, &ids)?;
        self.client.batch_execute(&format!("PREPARE TRANSACTION '{name}'"))?;
        self.book.transaction("prepared", &name, &ids)?;
        thread::sleep(Duration::from_millis(self.rng.random_range(5..50)));
        // At most a few stay undecided: the cluster takes twenty.
        match self.rng.random_range(0..8) {
            0 if self.prepared < 8 => Ok(()),
            1..=3 => {
                self.book.transaction("deciding", &name, &ids)?;
                self.client.batch_execute(&format!("ROLLBACK PREPARED '{name}'"))?;
                self.book.transaction("rolled_back", &name, &ids)
            }
            _ => {
                self.book.transaction("deciding", &name, &ids)?;
                self.client.batch_execute(&format!("COMMIT PREPARED '{name}'"))?;
                self.book.transaction("committed", &name, &ids)
            }
        }
    }

    fn operate(&mut self) -> Result<()> {
        let call = match self.rng.random_range(0..40) {
            0 => "CHECKPOINT",
            1 | 13 => "SELECT awa.rotate()",
            2..=5 => "SELECT awa.job(1)",
            6..=12 => {
                "SELECT c FROM (SELECT generation FROM awa.stat_segments WHERE state = 'sealed' ORDER BY random() LIMIT 1) AS s,
                     awa.carry_forward(s.generation) AS c"
            }
            _ => "SELECT awa.queue_counts()",
        };
        match self.client.batch_execute(call) {
            // The maintainer has taken the segment between the look and the call.
            Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => Ok(()),
            done => Ok(done?),
        }
    }
}
