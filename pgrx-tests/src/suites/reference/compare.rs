//! What both sides show, and where they may differ: only in times that the contract leaves open, within bounds.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, Row};
use serde_json::Value;

use super::statement::Pair;

/// What the step before a comparison may have changed without saying so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leeway {
    None,
    /// New copies, at the time that was asked for, but not before a scan that has gone past it.
    Asked,
    /// New copies, some time from now.
    Clock,
    /// Jobs may have been carried: their place in the lane is a new one.
    Moved,
    /// Finished jobs whose retention is over may have gone.
    Forgotten,
}

/// A job as the last comparison saw it.
#[derive(Clone, Debug)]
pub struct Shown {
    pub job: Pair,
    pub state: String,
    /// As the reference calls it.
    pub lease: Option<i64>,
}

struct Job {
    id: i64,
    body: Value,
    run_at: i64,
    enqueued_at: i64,
    finished_at: Option<i64>,
}

/// The part of a job that must be the same, then its times in microseconds.
const COLUMNS: &str = "
    job_id,
    jsonb_build_object(
        'queue', queue, 'kind', kind, 'state', state, 'priority', priority, 'attempt', attempt, 'max_attempts', max_attempts,
        'tags', tags, 'metadata', metadata, 'args', args,
        'errors', (SELECT jsonb_agg(e - 'at' ORDER BY n) FROM jsonb_array_elements(errors) WITH ORDINALITY AS x (e, n)),
        'was claimed', state <> 'dead_lettered' AND claimed_at IS NOT NULL),
    (EXTRACT(epoch FROM run_at) * 1000000)::bigint,
    (EXTRACT(epoch FROM enqueued_at) * 1000000)::bigint,
    (EXTRACT(epoch FROM finished_at) * 1000000)::bigint";

const SHOWN_BY_EXTENSION: &str = "
    (SELECT job_id, queue, kind, state, priority, attempt, max_attempts, tags, metadata, args, errors, claimed_at, deadline_at, run_at,
            enqueued_at, finished_at FROM awa.jobs
      UNION ALL
     SELECT job_id, queue, kind, state, priority, attempt, max_attempts, tags, metadata, args, errors, claimed_at, deadline_at, run_at,
            enqueued_at, finished_at FROM awa.terminal_jobs
      UNION ALL
     SELECT job_id, queue, kind, 'dead_lettered', priority, attempt, max_attempts, tags, metadata, args, errors, NULL, NULL, run_at,
            enqueued_at, failed_at FROM awa.dlq) AS j";

fn job(row: &Row) -> Result<Job> {
    Ok(Job {
        id: row.try_get(0)?,
        body: row.try_get(1)?,
        run_at: row.try_get(2)?,
        enqueued_at: row.try_get(3)?,
        finished_at: row.try_get(4)?,
    })
}

#[derive(Default)]
pub struct Comparison {
    /// When each job was enqueued, by the name of the reference; never changes.
    enqueued: BTreeMap<i64, i64>,
    /// Pairs of all jobs that were ever enqueued, by the name of the reference.
    names: BTreeMap<i64, Pair>,
}

/// Clocks are read at several places of one step.
const SLACK: i64 = 5_000_000;
/// How much later than now a job may be put that is due now: ties are spread.
const SPREAD: i64 = 5_000;

impl Comparison {
    pub fn add(&mut self, job: Pair) {
        self.names.insert(job.reference, job);
    }

    pub fn pair(&self, extension: i64) -> Option<Pair> {
        self.names.values().find(|pair| pair.extension == extension).copied()
    }

    /// Compares all jobs, tells the reference what it could not know, and returns what is there.
    pub fn jobs(&mut self, client: &mut Client, leeway: Leeway) -> Result<Vec<Shown>> {
        let mut extension: BTreeMap<i64, Job> = BTreeMap::new();
        for row in client.query(&format!("SELECT {COLUMNS} FROM {SHOWN_BY_EXTENSION}"), &[]).context("the extension's jobs")? {
            let job = job(&row)?;
            let id = job.id;
            if let Some(twice) = extension.insert(id, job) {
                bail!("job {id} is shown twice, once as {}", twice.body);
            }
        }
        let sql = format!(
            "SELECT {COLUMNS}, observed, (SELECT run_lease FROM awa_ref.jobs AS j WHERE j.job_id = a.job_id AND state = 'running'),
                    (SELECT timed FROM awa_ref.jobs AS j WHERE j.job_id = a.job_id), (EXTRACT(epoch FROM clock_timestamp()) * 1000000)::bigint
               FROM awa_ref.all_jobs AS a ORDER BY 1"
        );
        let mut shown = Vec::new();
        let mut seen: Vec<Job> = Vec::new();
        for row in client.query(&sql, &[]).context("the reference's jobs")? {
            let reference = job(&row)?;
            let pair = self.names.get(&reference.id).copied().with_context(|| format!("the reference invents job {}", reference.id))?;
            let Some(mut found) = extension.remove(&pair.extension) else {
                ensure!(leeway == Leeway::Forgotten && forget(client, reference.id)?, "job {} is gone: {}", pair.extension, reference.body);
                continue;
            };
            let at = Moment { observed: row.try_get(5)?, timed: row.try_get(7)?, now: row.try_get(8)?, leeway };
            self.check(&found, &reference, at).with_context(|| format!("job {}: {}", pair.extension, reference.body))?;
            let state = reference.body.get("state").and_then(Value::as_str).unwrap_or_default().to_owned();
            shown.push(Shown { job: pair, state, lease: row.try_get(6)? });
            found.id = reference.id;
            let same = (found.run_at, found.enqueued_at, found.finished_at) == (reference.run_at, reference.enqueued_at, reference.finished_at);
            if !at.observed || !same {
                seen.push(found);
            }
        }
        if let Some(job) = extension.into_values().next() {
            bail!("job {} is there, and should not be: {}", job.id, job.body);
        }
        observe(client, &seen)?;
        Ok(shown)
    }

    fn check(&mut self, found: &Job, reference: &Job, at: Moment) -> Result<()> {
        ensure!(found.body == reference.body, "the extension shows {}", found.body);
        let enqueued = *self.enqueued.entry(reference.id).or_insert(found.enqueued_at);
        let is_close = (found.enqueued_at - reference.enqueued_at).abs() < SLACK;
        ensure!(found.enqueued_at == enqueued && is_close, "enqueued at {}, now at {}", enqueued, found.enqueued_at);
        let finish_is_right = match (found.finished_at, reference.finished_at) {
            (None, None) => true,
            (Some(found), Some(reference)) => found == reference || (!at.observed && (found - reference).abs() < SLACK),
            _ => false,
        };
        ensure!(finish_is_right, "finished at {:?}, not at {:?}", found.finished_at, reference.finished_at);
        let waits = matches!(reference.body.get("state").and_then(Value::as_str), Some("scheduled" | "available"));
        at.place(found.run_at, reference.run_at, waits)
    }
}

#[derive(Clone, Copy)]
struct Moment {
    observed: bool,
    timed: bool,
    now: i64,
    leeway: Leeway,
}

impl Moment {
    /// Is the time from which the job may run where it may be?
    fn place(self, found: i64, wanted: i64, waits: bool) -> Result<()> {
        let at_once = self.now + SPREAD;
        let span = (wanted - self.now).max(0);
        let (low, high) = match (self.observed || !waits, self.leeway) {
            // A running attempt that is carried has no time of its own any more.
            (true, Leeway::Moved) if !waits => (i64::MIN, wanted.max(at_once)),
            (true, Leeway::Moved) => (wanted, wanted.max(at_once) + SPREAD),
            (true, _) if self.observed => (wanted, wanted),
            (true, _) => (wanted, wanted + SPREAD),
            (false, Leeway::Asked) if self.timed => (wanted, wanted.max(self.now) + SPREAD),
            // Backoff is shortened by up to a quarter.
            (false, _) if span > SLACK => (wanted - span / 4 - SLACK, wanted + SLACK),
            (false, _) => (wanted - SLACK, wanted.max(self.now) + SPREAD),
        };
        ensure!((low..=high).contains(&found), "may run from {found}, not from {wanted} ({:?}, now {})", self.leeway, self.now);
        Ok(())
    }
}

fn forget(client: &mut Client, id: i64) -> Result<bool> {
    Ok(client.query_one("SELECT awa_ref.forget($1)", &[&id])?.try_get(0)?)
}

fn observe(client: &mut Client, seen: &[Job]) -> Result<()> {
    if seen.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = seen.iter().map(|job| job.id).collect();
    let run_ats: Vec<i64> = seen.iter().map(|job| job.run_at).collect();
    let enqueued_ats: Vec<i64> = seen.iter().map(|job| job.enqueued_at).collect();
    let finished_ats: Vec<Option<i64>> = seen.iter().map(|job| job.finished_at).collect();
    let times = |n: usize| format!("ARRAY(SELECT timestamptz 'epoch' + t * interval '1 us' FROM unnest(${n}::bigint[]) WITH ORDINALITY AS u (t, n) ORDER BY n)");
    let sql = format!("SELECT awa_ref.observe($1, {}, {}, {})::text", times(2), times(3), times(4));
    client.query_one(&sql, &[&ids, &run_ats, &enqueued_ats, &finished_ats]).context("observe")?;
    Ok(())
}

/// Jobs by state, of each queue. Only what is committed counts, so it is asked outside of transactions.
pub fn counts(client: &mut Client) -> Result<()> {
    let of = |client: &mut Client, from: &str| -> Result<Value> {
        let sql = format!("SELECT COALESCE(jsonb_agg(to_jsonb(c) ORDER BY queue), '[]') FROM {from} AS c");
        Ok(client.query_one(&sql, &[])?.try_get(0)?)
    };
    let (extension, reference) = (of(client, "awa.queue_counts()")?, of(client, "awa_ref.queue_counts()")?);
    ensure!(extension == reference, "the extension counts {extension}, the reference {reference}");
    Ok(())
}
