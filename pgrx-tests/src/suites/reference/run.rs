//! Runs a sequence on both sides, step by step, in one session.

mod answers;

use std::collections::HashSet;
use std::fmt::Write as _;

use anyhow::{Context, Result, anyhow, bail, ensure};
use postgres::Client;
use serde_json::Value;

use super::compare::{self, Comparison, Leeway, Shown};
use super::op::{NAMES, Op, QUEUES, Task, Verb};
use super::statement::{Attempt, Call, Pair, Side, microseconds, queue};
use crate::cluster::Shutdown;
use crate::process::wait_until;
use crate::suites::{DATABASE, Stage};

const REFERENCE: &str = include_str!("../../../../sql/reference/awa_ref.sql");

/// Prepared transactions of a sequence at one time.
const PREPARED: usize = 3;
/// A number above this names any job or attempt there ever was, others one to which the verb may be applied.
const ANY: u8 = 200;

/// A transaction block.
#[derive(Default)]
struct Block {
    savepoints: usize,
    /// Nothing but enqueues: may be prepared.
    only_enqueues: bool,
    /// Something was claimed, ended or changed: must not be prepared.
    has_effect: bool,
    rolled_back: bool,
}

pub struct Run<'a, 'b> {
    stage: &'a mut Stage<'b>,
    client: Client,
    /// Claims must survive a crash, for the reference's do.
    kills: bool,
    comparison: Comparison,
    jobs: Vec<Pair>,
    attempts: Vec<Attempt>,
    shown: Vec<Shown>,
    block: Option<Block>,
    prepared: Vec<String>,
    begun_at: i64,
    marks: u64,
    names: usize,
    transcript: String,
}

/// Runs the whole sequence; an error tells the statements up to it.
pub fn sequence(stage: &mut Stage<'_>, ops: &[Op]) -> Result<usize> {
    let kills = ops.iter().any(|op| matches!(op, Op::Task(Task::Restart { kill: true })));
    stage.cluster.create_database(DATABASE)?;
    let mut run = Run::begin(stage, kills)?;
    let mut all = || -> Result<()> {
        for op in ops {
            run.step(op)?;
        }
        run.finish()
    };
    let done = all();
    done.map_err(|error| anyhow!("{error:#}\nafter\n{}", run.transcript))?;
    Ok(run.attempts.len())
}

impl<'a, 'b> Run<'a, 'b> {
    fn begin(stage: &'a mut Stage<'b>, kills: bool) -> Result<Self> {
        let client = stage.connect()?;
        let mut run = Self {
            stage,
            client,
            kills,
            comparison: Comparison::default(),
            jobs: Vec::new(),
            attempts: Vec::new(),
            shown: Vec::new(),
            block: None,
            prepared: Vec::new(),
            begun_at: 0,
            marks: 0,
            names: 0,
            transcript: String::new(),
        };
        run.settle_in()?;
        run.client.batch_execute(REFERENCE).context("the reference does not load")?;
        for number in 0..NAMES.len() as u8 {
            run.create_queue(number)?;
        }
        run.begun_at = run.client.query_one("SELECT (EXTRACT(epoch FROM clock_timestamp()) * 1000000)::bigint", &[])?.try_get(0)?;
        Ok(run)
    }

    fn settle_in(&mut self) -> Result<()> {
        let durable = if self.kills { "SET awa.asynchronous_claim = off;" } else { "" };
        let limits = "SET lock_timeout = '20s'; SET statement_timeout = '60s'; SET awa.prune_grace = 0;";
        Ok(self.client.batch_execute(&format!("{durable} {limits}"))?)
    }

    fn create_queue(&mut self, number: u8) -> Result<()> {
        let settings = QUEUES.get(usize::from(number)).copied().context("no such queue")?;
        self.execute(&format!("SELECT awa.create_queue({settings})"))?;
        Ok(self.client.batch_execute(&format!("SELECT awa_ref.create_queue({settings})"))?)
    }

    /// A statement that must succeed, and that is worth telling.
    fn execute(&mut self, sql: &str) -> Result<()> {
        let _ = writeln!(self.transcript, "{sql};");
        self.client.batch_execute(sql).with_context(|| sql.to_owned())
    }

    fn step(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Verb { verb, guarded } => return self.verb(verb, *guarded),
            Op::Task(task) if self.block.is_none() => return self.task(*task),
            Op::Begin(level) if self.block.is_none() => {
                let level = match level {
                    1 => "REPEATABLE READ",
                    // Beside another serializable transaction the reference, which locks what it looks at, may be refused alone.
                    2 if self.prepared.is_empty() => "SERIALIZABLE",
                    _ => "READ COMMITTED",
                };
                self.execute(&format!("BEGIN ISOLATION LEVEL {level}"))?;
                self.block = Some(Block { only_enqueues: true, ..Block::default() });
            }
            Op::Decide { commit } if self.block.is_none() => {
                let Some(name) = self.prepared.pop() else { return Ok(()) };
                self.execute(&format!("{} PREPARED '{name}'", if *commit { "COMMIT" } else { "ROLLBACK" }))?;
            }
            Op::Commit if self.block.is_some() => self.end_block("COMMIT")?,
            Op::Rollback if self.block.is_some() => self.end_block("ROLLBACK")?,
            Op::Prepare => self.prepare()?,
            Op::Savepoint | Op::RollbackTo(_) | Op::Release => self.savepoint(op)?,
            _ => return Ok(()),
        }
        self.compare(Leeway::None)
    }

    fn end_block(&mut self, how: &str) -> Result<()> {
        self.block = None;
        self.execute(how)
    }

    fn savepoint(&mut self, op: &Op) -> Result<()> {
        let Some(block) = self.block.as_mut() else { return Ok(()) };
        let text = match op {
            Op::Savepoint if block.savepoints < 6 => {
                block.savepoints += 1;
                format!("SAVEPOINT s{}", block.savepoints)
            }
            Op::RollbackTo(number) if block.savepoints > 0 => {
                block.savepoints = 1 + usize::from(*number) % block.savepoints;
                block.rolled_back = true;
                format!("ROLLBACK TO SAVEPOINT s{}", block.savepoints)
            }
            Op::Release if block.savepoints > 0 => {
                block.savepoints -= 1;
                format!("RELEASE SAVEPOINT s{}", block.savepoints + 1)
            }
            _ => return Ok(()),
        };
        self.execute(&text)
    }

    /// Only enqueues can be prepared. What may or may not be refused is committed instead.
    fn prepare(&mut self) -> Result<()> {
        let Some(block) = self.block.take() else { return Ok(()) };
        let refused = block.has_effect && !block.rolled_back;
        if self.prepared.len() >= PREPARED || (!block.only_enqueues && !refused) {
            return self.end_block("COMMIT");
        }
        self.names += 1;
        let name = format!("reference {}", self.names);
        let prepared = self.execute(&format!("PREPARE TRANSACTION '{name}'"));
        match (refused, prepared) {
            (false, Ok(())) => self.prepared.push(name),
            (true, Err(error)) => {
                let code = code_of(&error).unwrap_or_default();
                ensure!(code == "0A000", "PREPARE was refused by {code}");
            }
            (true, Ok(())) => bail!("a transaction that has claimed or ended jobs was prepared"),
            (false, Err(error)) => return Err(error),
        }
        Ok(())
    }

    // ---- verbs ---------------------------------------------------------------------------------------------------------

    fn verb(&mut self, verb: &Verb, guarded: bool) -> Result<()> {
        let verb = match verb {
            // An extension is not taken back by a rollback, which the reference cannot say.
            Verb::Extend { attempt, .. } if self.block.is_some() => Verb::Heartbeat { attempt: *attempt },
            other => other.clone(),
        };
        let call = self.choose(verb);
        let text = call.text(Side::Extension);
        let _ = writeln!(self.transcript, "{text};");
        let (extension, reference) = if self.block.is_some() {
            let reference = self.guarded(&call.text(Side::Reference))?;
            let extension = if guarded { self.guarded(&text)? } else { self.bare(&text)? };
            (extension, reference)
        } else {
            (rows(&mut self.client, &text), rows(&mut self.client, &call.text(Side::Reference)))
        };
        if let Some(block) = self.block.as_mut() {
            block.only_enqueues &= matches!(call.verb, Verb::Enqueue { .. } | Verb::EnqueueMany { .. } | Verb::Refused(_));
        }
        match (extension, reference) {
            (Ok(extension), Ok(reference)) => self.answers(&call, &extension, &reference)?,
            (Err(extension), Err(reference)) => {
                let (extension, reference) = (code_of(&extension).with_context(|| format!("{extension:#}"))?, code_of(&reference));
                ensure!(Some(&extension) == reference.as_ref(), "{text}: refused by {extension}, not by {reference:?}");
            }
            (Err(error), Ok(reference)) => bail!("{text}: {error:#}; the reference answers {reference:?}"),
            (Ok(extension), Err(error)) => bail!("{text}: {extension:?}; the reference says {error:#}"),
        }
        let asked = matches!(call.verb, Verb::Enqueue { .. } | Verb::EnqueueMany { .. } | Verb::Retry { .. } | Verb::DlqRetry { .. });
        self.compare(if asked { Leeway::Asked } else { Leeway::Clock })
    }

    /// In a savepoint of its own.
    fn guarded(&mut self, sql: &str) -> Result<Result<Vec<Value>>> {
        self.client.batch_execute("SAVEPOINT guard")?;
        let done = rows(&mut self.client, sql);
        self.client.batch_execute(if done.is_ok() { "RELEASE guard" } else { "ROLLBACK TO guard; RELEASE guard" })?;
        Ok(done)
    }

    /// An error ends the transaction.
    fn bare(&mut self, sql: &str) -> Result<Result<Vec<Value>>> {
        let done = rows(&mut self.client, sql);
        if done.is_err() {
            self.end_block("ROLLBACK")?;
        }
        Ok(done)
    }

    fn choose(&mut self, verb: Verb) -> Call {
        let mut call = Call { verb, jobs: Vec::new(), attempts: Vec::new(), times: Vec::new(), mark: 0 };
        self.marks += 1;
        call.mark = self.marks;
        let mut whens = Vec::new();
        match &call.verb {
            Verb::Enqueue { when, .. } => whens.push(*when),
            Verb::EnqueueMany { jobs, .. } => whens.extend(jobs.iter().map(|(_, when)| *when)),
            Verb::Complete { attempt } | Verb::Heartbeat { attempt } => call.attempts.extend(self.attempt(*attempt)),
            Verb::Fail { attempt, .. } | Verb::Snooze { attempt, .. } | Verb::Extend { attempt, .. } => {
                call.attempts.extend(self.attempt(*attempt));
            }
            Verb::CompleteMany { attempts } | Verb::CompleteAndClaim { attempts, .. } => {
                call.attempts.extend(attempts.iter().filter_map(|attempt| self.attempt(*attempt)));
            }
            Verb::Cancel { job, .. } => call.jobs.extend(self.job(*job, &["scheduled", "available", "running"])),
            Verb::Delete { job } => call.jobs.extend(self.job(*job, &["completed", "failed", "cancelled", "dead_lettered"])),
            Verb::Retry { job, when, .. } => {
                call.jobs.extend(self.job(*job, &["failed", "cancelled", "dead_lettered"]));
                whens.push(*when);
            }
            Verb::DlqRetry { job, when, .. } => {
                call.jobs.extend(self.job(*job, &["dead_lettered"]));
                whens.push(*when);
            }
            _ => {}
        }
        for (n, when) in whens.into_iter().enumerate() {
            let distinct = i64::try_from(self.marks).unwrap_or(0) * 1100 + i64::try_from(n).unwrap_or(0);
            call.times.push(microseconds(when, self.begun_at, distinct));
        }
        call
    }

    fn job(&self, number: u8, states: &[&str]) -> Option<Pair> {
        let fitting: Vec<Pair> = self.shown.iter().filter(|job| states.contains(&job.state.as_str())).map(|job| job.job).collect();
        pick(number, &fitting, &self.jobs)
    }

    fn attempt(&self, number: u8) -> Option<Attempt> {
        let runs = |attempt: &&Attempt| {
            self.shown.iter().any(|job| job.job == attempt.job && job.lease == Some(attempt.lease.reference))
        };
        let running: Vec<Attempt> = self.attempts.iter().filter(runs).copied().collect();
        pick(number, &running, &self.attempts)
    }

    fn compare(&mut self, leeway: Leeway) -> Result<()> {
        self.shown = self.comparison.jobs(&mut self.client, leeway)?;
        if self.block.is_none() { compare::counts(&mut self.client) } else { Ok(()) }
    }

    /// The copies of jobs that the ring holds, in the order in which they lie in their segment.
    fn copies(&mut self) -> Result<Vec<(i64, i32)>> {
        let tables = "SELECT 'SELECT job_id, hop, ctid AS place FROM awa_segments.' || relname FROM pg_class
                       WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r' AND relname LIKE 'ready_entries%'";
        let selects: Vec<String> = self.client.query(tables, &[])?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let all = format!("SELECT job_id, hop FROM ({}) AS all_copies ORDER BY place", selects.join(" UNION ALL "));
        self.client.query(&all, &[])?.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    /// What is new in the ring since then was put into the open segment by maintenance.
    fn tell_moved(&mut self, before: &[(i64, i32)]) -> Result<()> {
        let before: HashSet<&(i64, i32)> = before.iter().collect();
        let after = self.copies()?;
        let new = after.iter().filter(|copy| !before.contains(copy));
        let moved: Vec<i64> = new.filter_map(|(job, _)| self.comparison.pair(*job)).map(|pair| pair.reference).collect();
        self.client.execute("SELECT awa_ref.moved($1)", &[&moved])?;
        Ok(())
    }

    // ---- maintenance ---------------------------------------------------------------------------------------------------

    fn task(&mut self, task: Task) -> Result<()> {
        let leeway = match task {
            Task::Rotate => {
                self.execute("SELECT awa.rotate()")?;
                Leeway::None
            }
            Task::Prune => {
                self.prune()?;
                Leeway::Forgotten
            }
            Task::CarryForward => {
                let before = self.copies()?;
                self.execute("SELECT awa.carry_forward(min(generation)) FROM awa.stat_segments WHERE state = 'sealed' HAVING count(*) > 0")?;
                self.tell_moved(&before)?;
                Leeway::Moved
            }
            Task::PromoteDeferred => {
                let before = self.copies()?;
                self.deferral("10h")?;
                self.execute("SELECT awa.promote_deferred()")?;
                self.deferral("1h")?;
                self.tell_moved(&before)?;
                Leeway::Moved
            }
            Task::Retention => {
                self.execute("SELECT awa.retention()")?;
                Leeway::Forgotten
            }
            // These wait for all transactions, prepared ones too.
            Task::Rebuild | Task::RecreateQueue(_) if !self.prepared.is_empty() => return Ok(()),
            Task::Rebuild => {
                self.execute("SELECT awa.rebuild()")?;
                self.client.batch_execute("SELECT awa_ref.begin_anew()")?;
                Leeway::None
            }
            Task::RecreateQueue(number) => {
                self.execute(&format!("SELECT awa.drop_queue({}, force => true)", queue(number)))?;
                self.client.batch_execute(&format!("SELECT awa_ref.drop_queue({}, true)", queue(number)))?;
                self.create_queue(number)?;
                Leeway::None
            }
            Task::Restart { kill } => {
                let _ = writeln!(self.transcript, "-- restart, kill {kill}");
                if kill {
                    self.stage.cluster.crash()?;
                    self.stage.cluster.start()?;
                } else {
                    self.stage.cluster.restart(Shutdown::Fast)?;
                }
                self.client = self.stage.connect()?;
                self.settle_in()?;
                self.client.batch_execute("SELECT awa_ref.begin_anew()")?;
                Leeway::None
            }
        };
        self.compare(leeway)
    }

    fn prune(&mut self) -> Result<()> {
        for _ in 0..40 {
            let _ = writeln!(self.transcript, "SELECT awa.prune();");
            let outcome: String = self.client.query_one("SELECT outcome FROM awa.prune()", &[]).context("prune")?.try_get(0)?;
            if !["prune_started", "pruned"].contains(&outcome.as_str()) {
                return Ok(());
            }
        }
        bail!("the ring can be pruned without end")
    }

    /// What waits outside of the ring comes back when it is nearer than half of this.
    fn deferral(&mut self, value: &str) -> Result<()> {
        self.execute(&format!("ALTER SYSTEM SET awa.deferral = '{value}'"))?;
        self.client.batch_execute("SELECT pg_reload_conf()")?;
        let client = &mut self.client;
        let known = wait_until(std::time::Duration::from_secs(30), || {
            client.query_one("SHOW awa.deferral", &[]).is_ok_and(|row| row.try_get::<_, String>(0).is_ok_and(|now| now == value))
        });
        ensure!(known, "awa.deferral was not reloaded");
        Ok(())
    }

    // ---- the end -------------------------------------------------------------------------------------------------------

    /// Everything is decided; log and memory agree, before and after a rebuild; whatever is due comes out in order.
    fn finish(&mut self) -> Result<()> {
        self.step(&Op::Commit)?;
        while !self.prepared.is_empty() {
            self.step(&Op::Decide { commit: true })?;
        }
        self.stage.verify_clean()?;
        self.task(Task::Rebuild)?;
        self.stage.verify_clean()?;
        for number in 0..NAMES.len() as u8 {
            self.verb(&Verb::Resume { queue: number }, false)?;
            let before = self.attempts.len();
            for _ in 0..200 {
                let claimed = self.attempts.len();
                let claim = Verb::ClaimFromAll { first: number, batch: 5 };
                self.verb(&claim, false)?;
                if self.attempts.len() == claimed {
                    break;
                }
            }
            let taken: Vec<Attempt> = self.attempts.get(before..).unwrap_or_default().to_vec();
            for attempt in taken {
                self.client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job.extension, &attempt.lease.extension])?;
                self.client.query_one("SELECT awa_ref.complete($1, $2)", &[&attempt.job.reference, &attempt.lease.reference])?;
            }
            self.compare(Leeway::Clock)?;
        }
        self.stage.verify_clean()
    }
}

/// One of those that fit, or any.
fn pick<T: Copy>(number: u8, fitting: &[T], all: &[T]) -> Option<T> {
    let from = if number < ANY && !fitting.is_empty() { fitting } else { all };
    usize::from(number).checked_rem(from.len()).and_then(|index| from.get(index)).copied()
}

fn rows(client: &mut Client, sql: &str) -> Result<Vec<Value>> {
    client.query(sql, &[])?.iter().map(|row| Ok(row.try_get::<_, Option<Value>>(0)?.unwrap_or(Value::Null))).collect()
}

fn code_of(error: &anyhow::Error) -> Option<String> {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>())?;
    error.code().map(|code| code.code().to_owned())
}
