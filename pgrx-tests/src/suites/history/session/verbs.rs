//! One statement of a session: chosen, sent, and what it was told.

use postgres::{Error, Row};
use rand::Rng;
use rand::seq::SliceRandom;

use super::{Desk, Session, Went, ends_the_session};
use crate::suites::Attempt;
use crate::suites::history::QUEUES;
use crate::suites::history::record::{Beside, Call, Did, Handed, NewJob, Span, Tick, Word};

pub enum Verb {
    Enqueue { queue: usize, jobs: Vec<(i64, i32, Option<f64>)> },
    Claim { queues: Vec<usize>, batch: i32, mortal: bool },
    Complete(Attempt),
    CompleteMany(Vec<Attempt>),
    CompleteAndClaim { attempts: Vec<Attempt>, queue: usize, batch: i32 },
    Fail { attempt: Attempt, last: bool },
    Snooze(Attempt),
    Cancel(i64),
    Retry { job_id: i64, dead_letter: bool },
    Delete(i64),
    Heartbeat(Attempt),
}

impl Verb {
    /// What it may have done when its answer is lost.
    pub fn lost(&self) -> Beside {
        match self {
            Self::Enqueue { .. } => Beside::LostEnqueue,
            Self::Claim { .. } | Self::CompleteAndClaim { .. } => Beside::LostClaim,
            _ => Beside::Killed,
        }
    }

    pub fn feared(&self) -> Vec<Did> {
        let ended = |attempt: &Attempt, word: Word| Did::Ended { job_id: attempt.job_id, lease: attempt.run_lease, word };
        match self {
            Self::Complete(attempt) => vec![ended(attempt, Word::Completed)],
            Self::CompleteMany(attempts) | Self::CompleteAndClaim { attempts, .. } => {
                attempts.iter().map(|attempt| ended(attempt, Word::Completed)).collect()
            }
            Self::Fail { attempt, last } => vec![ended(attempt, if *last { Word::Failed } else { Word::Retry })],
            Self::Snooze(attempt) => vec![ended(attempt, Word::Snooze)],
            Self::Cancel(job_id) => vec![Did::Cancelled { job_id: *job_id }],
            Self::Retry { job_id, .. } => vec![Did::Redriven { job_id: *job_id }],
            Self::Delete(job_id) => vec![Did::Deleted { job_id: *job_id }],
            Self::Enqueue { .. } | Self::Claim { .. } | Self::Heartbeat(_) => Vec::new(),
        }
    }

    /// The attempt that a single call wants to end.
    fn only_attempt(&self) -> Option<Attempt> {
        match self {
            Self::Complete(attempt) | Self::Snooze(attempt) | Self::Fail { attempt, .. } => Some(*attempt),
            Self::CompleteAndClaim { attempts, .. } if attempts.len() == 1 => attempts.first().copied(),
            _ => None,
        }
    }
}

fn word(text: &str) -> Option<Word> {
    Some(match text {
        "completed" => Word::Completed,
        "failed" | "dead_lettered" => Word::Failed,
        "retry" => Word::Retry,
        "snooze" => Word::Snooze,
        "already" => Word::Already,
        "conflict" => Word::Conflict,
        "stale" => Word::Stale,
        "claim_uncommitted" => Word::Uncommitted,
        _ => return None,
    })
}

fn unzip(attempts: &[Attempt]) -> (Vec<i64>, Vec<i64>) {
    attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip()
}

impl Session<'_> {
    pub(super) fn choose(&mut self) -> Verb {
        let attempts = self.some_attempts();
        let one = attempts.first().copied();
        match (self.rng.random_range(0..32), one) {
            (0..=7, _) => self.some_claim(),
            (8..=12, _) | (_, None) => self.some_enqueue(),
            (13 | 14, Some(attempt)) => Verb::Complete(attempt),
            (15..=17, Some(_)) => Verb::CompleteMany(attempts),
            (18 | 19, Some(_)) => {
                let mut attempts = self.open.clone();
                attempts.truncate(self.rng.random_range(0..3));
                Verb::CompleteAndClaim { attempts, queue: self.rng.random_range(0..QUEUES.len()), batch: self.rng.random_range(1..8) }
            }
            (20..=22, Some(attempt)) => Verb::Fail { attempt, last: self.rng.random_ratio(1, 4) },
            (23 | 24, Some(attempt)) => Verb::Snooze(attempt),
            (25 | 26, Some(attempt)) => Verb::Cancel(attempt.job_id),
            (27..=29, Some(attempt)) => Verb::Retry { job_id: self.some_ended(attempt), dead_letter: self.rng.random_ratio(1, 3) },
            (30, Some(attempt)) => Verb::Delete(self.some_ended(attempt)),
            (_, Some(attempt)) => Verb::Heartbeat(attempt),
        }
    }

    pub(super) fn some_enqueue(&mut self) -> Verb {
        let count = if self.rng.random_ratio(1, 2) { 1 } else { self.rng.random_range(1..12) };
        let mut job = || {
            let delay = self.rng.random_ratio(1, 5).then(|| self.rng.random_range(-0.05..0.05));
            (self.desk.token(), self.rng.random_range(1..3), delay)
        };
        let jobs = (0..count).map(|_| job()).collect();
        Verb::Enqueue { queue: self.rng.random_range(0..QUEUES.len()), jobs }
    }

    fn some_claim(&mut self) -> Verb {
        let first = self.rng.random_range(0..QUEUES.len());
        let queues = (0..self.rng.random_range(1..=QUEUES.len())).map(|n| (first + n) % QUEUES.len()).collect();
        Verb::Claim { queues, batch: self.rng.random_range(1..10), mortal: self.rng.random_ratio(1, 8) }
    }

    fn some_ended(&mut self, attempt: Attempt) -> i64 {
        Desk::pile(&self.desk.ended, None, self.rng.random_range(0..40)).unwrap_or(attempt.job_id)
    }

    /// Attempts of this session and of others, finished ones and twice the same among them.
    fn some_attempts(&mut self) -> Vec<Attempt> {
        let mut known = self.open.clone();
        let own = self.calls.iter().filter_map(|call| match &call.did {
            Did::Claimed { jobs, .. } => Some(jobs.iter().map(|job| Attempt { job_id: job.job_id, run_lease: job.lease })),
            _ => None,
        });
        known.extend(own.flatten());
        known.extend(Desk::pile(&self.desk.recent, None, self.rng.random_range(0..100)));
        known.shuffle(&mut self.rng);
        known.truncate(self.rng.random_range(1..12));
        if let Some(first) = known.first().copied().filter(|_| self.rng.random_ratio(1, 6)) {
            known.push(first);
        }
        known
    }

    /// Sends the statement and writes down what was told.
    pub(super) fn perform(&mut self, verb: &Verb) -> anyhow::Result<Went> {
        let from = self.desk.tick();
        self.asked = from;
        let told = self.send(verb);
        let to = self.desk.tick();
        let at = Span { from, to };
        let undone = |did: Did| Call { at, did, undone: Some(to) };
        match told {
            Ok(dids) => {
                self.calls.extend(dids.into_iter().map(|did| Call { at, did, undone: None }));
                Ok(Went::Well)
            }
            Err(error) if self.client.is_closed() || ends_the_session(&error) => {
                self.lost = true;
                Ok(Went::Lost)
            }
            Err(error) if error.code().is_some_and(|code| code.code() == "55000") => {
                if let Some(attempt) = verb.only_attempt() {
                    let word = if self.has_touched(attempt, from) { Word::Conflict } else { Word::Stale };
                    let did = Did::Ended { job_id: attempt.job_id, lease: attempt.run_lease, word };
                    self.calls.push(Call { at, did, undone: None });
                }
                Ok(Went::Wrong)
            }
            Err(error) => {
                self.excuse(&error)?;
                // For a while it may have had jobs in hand.
                match verb {
                    Verb::Claim { .. } | Verb::CompleteAndClaim { .. } => {
                        self.calls.push(undone(Did::Claimed { jobs: Vec::new(), mortal: false, in_order: false }));
                    }
                    Verb::Cancel(job_id) => self.calls.push(undone(Did::Cancelled { job_id: *job_id })),
                    _ => {}
                }
                Ok(Went::Wrong)
            }
        }
    }

    /// Has this transaction ended the attempt, or cancelled its job, before?
    fn has_touched(&self, attempt: Attempt, before: Tick) -> bool {
        self.calls.iter().filter(|call| call.undone.is_none() && call.at.to < before).any(|call| match &call.did {
            Did::Ended { lease, word, .. } => *lease == attempt.run_lease && word.is_exit(),
            Did::Cancelled { job_id } => *job_id == attempt.job_id,
            _ => false,
        })
    }

    fn send(&mut self, verb: &Verb) -> Result<Vec<Did>, Error> {
        let in_order = self.in_order;
        // Whether this transaction has completed them before.
        let again: Vec<bool> = match verb {
            Verb::CompleteAndClaim { attempts, .. } => attempts.iter().map(|attempt| self.has_touched(*attempt, Tick::MAX)).collect(),
            _ => Vec::new(),
        };
        let client = &mut self.client;
        let ended = |attempt: &Attempt, row: &Row, column: usize| -> Result<Did, Error> {
            let word = word(row.try_get(column)?).unwrap_or(Word::Conflict);
            Ok(Did::Ended { job_id: attempt.job_id, lease: attempt.run_lease, word })
        };
        let changed = |row: &Row, wanted: &str, did: Did| -> Result<Vec<Did>, Error> {
            Ok(if row.try_get::<_, &str>(0)? == wanted { vec![did] } else { Vec::new() })
        };
        Ok(match verb {
            Verb::Enqueue { queue, jobs } => {
                let args: Vec<serde_json::Value> = jobs.iter().map(|(token, ..)| serde_json::json!({ "t": token })).collect();
                let priorities: Vec<i32> = jobs.iter().map(|(_, priority, _)| *priority).collect();
                let delays: Vec<Option<f64>> = jobs.iter().map(|(.., delay)| *delay).collect();
                let sql = "SELECT awa.enqueue_many($1, 'history', $2, $3,
                               ARRAY(SELECT clock_timestamp() + d * interval '1 second' FROM unnest($4::float8[]) WITH ORDINALITY AS u (d, n) ORDER BY n))";
                let name = QUEUES.get(*queue).copied().unwrap_or_default();
                let ids: Vec<i64> = client.query_one(sql, &[&name, &args, &priorities, &delays])?.try_get(0)?;
                let new = jobs.iter().zip(ids).map(|((token, priority, delay), job_id)| NewJob {
                    token: *token,
                    job_id,
                    queue: *queue,
                    priority: *priority,
                    timed: delay.is_some(),
                });
                vec![Did::Enqueued(new.collect())]
            }
            Verb::Claim { queues, batch, mortal } => {
                let names: Vec<&str> = queues.iter().filter_map(|queue| QUEUES.get(*queue)).copied().collect();
                let deadline = if *mortal { "'1 us'" } else { "NULL" };
                let sql = format!("SELECT job_id, run_lease, (args ->> 't')::bigint, attempt FROM awa.claim($1::text[], $2, {deadline})");
                vec![Did::Claimed { jobs: handed(&client.query(&sql, &[&names, batch])?)?, mortal: *mortal, in_order }]
            }
            Verb::Complete(attempt) => {
                vec![ended(attempt, &client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease])?, 0)?]
            }
            Verb::CompleteMany(attempts) => {
                let (ids, leases) = unzip(attempts);
                let rows = client.query("SELECT result FROM awa.complete_many($1, $2)", &[&ids, &leases])?;
                attempts.iter().zip(&rows).map(|(attempt, row)| ended(attempt, row, 0)).collect::<Result<_, _>>()?
            }
            Verb::CompleteAndClaim { attempts, queue, batch } => {
                let ((ids, leases), name) = (unzip(attempts), QUEUES.get(*queue).copied().unwrap_or_default());
                let sql = "SELECT job_id, run_lease, (args ->> 't')::bigint, attempt FROM awa.complete_and_claim($1, $2, $3, $4)";
                let rows = client.query(sql, &[&ids, &leases, &name, batch])?;
                let ends = attempts.iter().zip(again).map(|(attempt, again)| Did::Ended {
                    job_id: attempt.job_id,
                    lease: attempt.run_lease,
                    word: if again { Word::Already } else { Word::Completed },
                });
                ends.chain([Did::Claimed { jobs: handed(&rows)?, mortal: false, in_order }]).collect()
            }
            Verb::Fail { attempt, last } => {
                let sql = "SELECT awa.fail($1, $2, 'no luck', '1 ms', $3)";
                vec![ended(attempt, &client.query_one(sql, &[&attempt.job_id, &attempt.run_lease, last])?, 0)?]
            }
            Verb::Snooze(attempt) => {
                let sql = "SELECT awa.snooze($1, $2, '1 ms')";
                vec![ended(attempt, &client.query_one(sql, &[&attempt.job_id, &attempt.run_lease])?, 0)?]
            }
            Verb::Cancel(job_id) => {
                let row = client.query_one("SELECT awa.cancel($1, 'because')", &[job_id])?;
                changed(&row, "cancelled", Did::Cancelled { job_id: *job_id })?
            }
            Verb::Retry { job_id, dead_letter } => {
                let sql = if *dead_letter { "SELECT awa.dlq_retry($1)" } else { "SELECT awa.retry($1)" };
                changed(&client.query_one(sql, &[job_id])?, "retried", Did::Redriven { job_id: *job_id })?
            }
            Verb::Delete(job_id) => {
                let row = client.query_one("SELECT awa.delete_job($1)", &[job_id])?;
                changed(&row, "deleted", Did::Deleted { job_id: *job_id })?
            }
            Verb::Heartbeat(attempt) => {
                client.query_one("SELECT awa.heartbeat($1, $2)", &[&attempt.job_id, &attempt.run_lease])?;
                Vec::new()
            }
        })
    }
}

fn handed(rows: &[Row]) -> Result<Vec<Handed>, Error> {
    let one = |row: &Row| -> Result<Handed, Error> {
        Ok(Handed { job_id: row.try_get(0)?, lease: row.try_get(1)?, token: row.try_get(2)?, attempt: row.try_get(3)? })
    };
    rows.iter().map(one).collect()
}
