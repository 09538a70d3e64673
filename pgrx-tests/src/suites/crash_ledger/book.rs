//! The ledger: a file outside of the database, one line an event, written at once and in one piece.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use super::super::Attempt;

pub struct Book {
    path: PathBuf,
    file: Mutex<File>,
    lines: AtomicU64,
}

/// What the ledger says, read from the beginning.
#[derive(Default)]
pub struct Story {
    /// Every identifier that any call returned, also in transactions that rolled back.
    pub ids: BTreeSet<i64>,
    pub enqueued: BTreeSet<i64>,
    /// By lease: the job it was for.
    pub leases: BTreeMap<i64, i64>,
    /// Commit acknowledged and durable, neither ended nor being ended.
    pub open: BTreeSet<Attempt>,
    /// Handed out by a claim whose durability is not known.
    pub maybe_open: BTreeSet<Attempt>,
    /// Its end was sent, no answer came.
    pub ending: BTreeSet<Attempt>,
    /// With the line that says so.
    pub completed: BTreeMap<i64, u64>,
    /// Running when the server came back, by a claim whose answer nobody has received.
    pub orphans: BTreeSet<i64>,
    /// Claims that were rolled back.
    pub void: BTreeSet<Attempt>,
    /// By name, with its jobs. Prepared, not decided.
    pub prepared: BTreeMap<String, Vec<i64>>,
    /// `PREPARE`, or the decision, was sent, no answer came.
    pub maybe_prepared: BTreeMap<String, Vec<i64>>,
    pub rolled_back: BTreeSet<i64>,
}

impl Book {
    pub fn create(path: &Path) -> Result<Self> {
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let file = OpenOptions::new().append(true).open(path)?;
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), lines: AtomicU64::new(0) })
    }

    fn line(&self, text: &str) -> Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(format!("{text}\n").as_bytes())?;
        self.lines.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The number of lines so far. Taken before a claim is sent: its answer may be entered late, and its jobs may have been given back
    /// and finished by others until then, but what was in the ledger before it was sent must not come out any more.
    pub fn now(&self) -> u64 {
        self.lines.load(Ordering::Acquire)
    }

    pub fn drew(&self, since: u64, attempts: &[Attempt]) -> Result<()> {
        self.attempts(&format!("drew {since}"), attempts)
    }

    pub fn jobs(&self, word: &str, ids: &[i64]) -> Result<()> {
        let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
        if ids.is_empty() { Ok(()) } else { self.line(&format!("{word} {}", ids.join(" "))) }
    }

    pub fn attempts(&self, word: &str, attempts: &[Attempt]) -> Result<()> {
        let attempts: Vec<String> = attempts.iter().map(|attempt| format!("{}:{}", attempt.job_id, attempt.run_lease)).collect();
        if attempts.is_empty() { Ok(()) } else { self.line(&format!("{word} {}", attempts.join(" "))) }
    }

    pub fn transaction(&self, word: &str, name: &str, ids: &[i64]) -> Result<()> {
        let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
        self.line(&format!("{word} {name} {}", ids.join(" ")))
    }

    /// Reads it from the file. Fails where two lines contradict each other: an identifier or a lease given out twice, a job handed
    /// out after its completion.
    pub fn read(&self) -> Result<Story> {
        let text = std::fs::read_to_string(&self.path)?;
        let mut story = Story::default();
        for (number, line) in (1..).zip(text.lines()) {
            story.take(number, line).with_context(|| format!("{}:{number}: {line}", self.path.display()))?;
        }
        Ok(story)
    }
}

fn numbers(rest: &str) -> Result<Vec<i64>> {
    rest.split_whitespace().map(|word| word.parse().with_context(|| format!("no number: {word}"))).collect()
}

fn pairs(rest: &str) -> Result<Vec<Attempt>> {
    rest.split_whitespace()
        .map(|word| {
            let (job_id, lease) = word.split_once(':').context("no pair")?;
            Ok(Attempt { job_id: job_id.parse()?, run_lease: lease.parse()? })
        })
        .collect()
}

impl Story {
    fn take(&mut self, number: u64, line: &str) -> Result<()> {
        let (word, rest) = line.split_once(' ').context("an incomplete line")?;
        match word {
            "ids" => {
                for id in numbers(rest)? {
                    ensure!(self.ids.insert(id), "job id {id} was given out twice");
                }
            }
            "enqueued" => self.enqueued.extend(numbers(rest)?),
            "drew" => {
                let (since, rest) = rest.split_once(' ').context("no line number")?;
                let since = since.parse()?;
                for attempt in pairs(rest)? {
                    self.deliver(attempt, since)?;
                }
            }
            "orphans" => self.orphans.extend(numbers(rest)?),
            "claimed" => {
                for attempt in pairs(rest)? {
                    self.maybe_open.remove(&attempt);
                    if let Some(other) = self.open_attempt(attempt.job_id) {
                        bail!("job {} was claimed while lease {} of it was running", attempt.job_id, other.run_lease);
                    }
                    self.open.insert(attempt);
                }
            }
            "void" => {
                for attempt in pairs(rest)? {
                    self.forget(attempt);
                    self.void.insert(attempt);
                }
            }
            "ending" => {
                for attempt in pairs(rest)? {
                    self.forget(attempt);
                    self.ending.insert(attempt);
                }
            }
            // The transaction of the end was rolled back: the attempt runs on.
            "not_ended" => {
                for attempt in pairs(rest)? {
                    self.ending.remove(&attempt);
                    self.open.insert(attempt);
                }
            }
            "completed" => {
                for attempt in pairs(rest)? {
                    self.forget(attempt);
                    let before = self.completed.insert(attempt.job_id, number);
                    ensure!(before.is_none(), "job {} was completed twice", attempt.job_id);
                }
            }
            "preparing" | "deciding" | "prepared" | "committed" | "rolled_back" | "unknown" => self.transaction(word, rest)?,
            _ => bail!("an unknown word"),
        }
        Ok(())
    }

    fn forget(&mut self, attempt: Attempt) {
        self.open.remove(&attempt);
        self.maybe_open.remove(&attempt);
        self.ending.remove(&attempt);
    }

    fn open_attempt(&self, job_id: i64) -> Option<Attempt> {
        let all = Attempt { job_id, run_lease: i64::MIN }..=Attempt { job_id, run_lease: i64::MAX };
        self.open.range(all).next().copied()
    }

    fn deliver(&mut self, attempt: Attempt, since: u64) -> Result<()> {
        let job_id = attempt.job_id;
        let late = self.completed.get(&job_id).is_some_and(|line| *line <= since);
        ensure!(!late, "job {job_id} was handed out after its completion was acknowledged");
        ensure!(!self.rolled_back.contains(&job_id), "job {job_id} was handed out, and its transaction was rolled back");
        if let Some(other) = self.leases.insert(attempt.run_lease, job_id) {
            bail!("lease {} was given out twice, for job {other} and job {job_id}", attempt.run_lease);
        }
        self.maybe_open.insert(attempt);
        Ok(())
    }

    fn transaction(&mut self, word: &str, rest: &str) -> Result<()> {
        let (name, rest) = rest.split_once(' ').context("no name")?;
        let ids = numbers(rest)?;
        self.maybe_prepared.remove(name);
        self.prepared.remove(name);
        match word {
            "preparing" | "deciding" => drop(self.maybe_prepared.insert(name.to_owned(), ids)),
            "prepared" => drop(self.prepared.insert(name.to_owned(), ids)),
            "committed" => self.enqueued.extend(ids),
            "rolled_back" => self.rolled_back.extend(ids),
            _ => {}
        }
        Ok(())
    }
}
