//! Have both sides answered the same?

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Run;
use crate::suites::reference::op::Verb;
use crate::suites::reference::statement::{Attempt, Call, Pair, Side};

impl Run<'_, '_> {
    pub(super) fn answers(&mut self, call: &Call, extension: &[Value], reference: &[Value]) -> Result<()> {
        let both = || format!("{:?}: the extension answers {extension:?}, the reference {reference:?}", call.verb);
        ensure!(extension.len() == reference.len(), both());
        let mut effect = false;
        match &call.verb {
            Verb::Enqueue { .. } | Verb::EnqueueMany { .. } => {
                let ids = |rows: &[Value]| -> Vec<i64> {
                    let one = rows.first().map_or(&Value::Null, |row| row);
                    one.as_array().map_or_else(|| one.as_i64().into_iter().collect(), |ids| ids.iter().filter_map(Value::as_i64).collect())
                };
                let (extension, reference) = (ids(extension), ids(reference));
                ensure!(extension.len() == reference.len(), both());
                for (extension, reference) in extension.into_iter().zip(reference) {
                    let pair = Pair { extension, reference };
                    ensure!(self.comparison.pair(extension).is_none(), "job {extension} was there before");
                    self.comparison.add(pair);
                    self.jobs.push(pair);
                }
            }
            Verb::Claim { .. } | Verb::ClaimFromAll { .. } | Verb::CompleteAndClaim { .. } => {
                for (extension, reference) in extension.iter().zip(reference) {
                    let attempt = self.attempt_of(extension, reference).with_context(both)?;
                    self.attempts.push(attempt);
                    effect = true;
                }
                effect |= !call.attempts.is_empty();
            }
            Verb::CompleteMany { .. } => {
                let (extension, reference) = (self.results(call, extension, Side::Extension), self.results(call, reference, Side::Reference));
                ensure!(extension == reference, both());
                effect = extension.iter().any(|(_, word)| word == "completed");
            }
            _ => {
                ensure!(extension == reference, both());
                let words = ["completed", "retry", "failed", "dead_lettered", "snooze", "cancelled", "deleted", ""];
                let retries = matches!(call.verb, Verb::Retry { .. } | Verb::DlqRetry { .. });
                effect = extension.iter().any(|answer| match answer {
                    // Of a retry this says why nothing was done.
                    Value::String(word) if retries => word == "retried",
                    Value::String(word) => words.contains(&word.as_str()),
                    Value::Number(number) => number.as_i64() != Some(0),
                    _ => false,
                });
            }
        }
        if let Some(block) = self.block.as_mut() {
            block.has_effect |= effect;
        }
        Ok(())
    }

    /// The same job, handed out with the same words.
    fn attempt_of(&self, extension: &Value, reference: &Value) -> Result<Attempt> {
        let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_i64).with_context(|| format!("no {name}"));
        let pair = |name: &str| -> Result<Pair> { Ok(Pair { extension: number(extension, name)?, reference: number(reference, name)? }) };
        let job = pair("job_id")?;
        ensure!(self.comparison.pair(job.extension) == Some(job), "jobs {} and {} are not the same", job.extension, job.reference);
        let lease = pair("run_lease")?;
        ensure!(!self.attempts.iter().any(|attempt| attempt.lease.extension == lease.extension), "lease {} was given before", lease.extension);
        for name in ["queue", "kind", "args", "priority", "attempt", "max_attempts", "tags", "metadata", "run_at", "enqueued_at"] {
            ensure!(extension.get(name) == reference.get(name), "{name} differs");
        }
        let has_deadline = |of: &Value| of.get("deadline_at").is_some_and(|at| !at.is_null());
        ensure!(has_deadline(extension) == has_deadline(reference), "only one has a deadline");
        ensure!(without_times(extension.get("errors")) == without_times(reference.get("errors")), "errors differ");
        Ok(Attempt { job, lease })
    }

    /// The same pair twice in a batch: either may be the first.
    fn results(&self, call: &Call, rows: &[Value], side: Side) -> Vec<(usize, String)> {
        let mut results = Vec::new();
        for row in rows {
            let number = |name: &str| row.get(name).and_then(Value::as_i64);
            let of = |attempt: &Attempt| number("job_id") == Some(attempt.job.on(side)) && number("run_lease") == Some(attempt.lease.on(side));
            let word = row.get("result").and_then(Value::as_str).unwrap_or_default();
            results.push((call.attempts.iter().position(of).unwrap_or(usize::MAX), word.to_owned()));
        }
        results.sort();
        results
    }
}

fn without_times(errors: Option<&Value>) -> Option<Value> {
    let mut errors = errors.cloned();
    for error in errors.iter_mut().filter_map(Value::as_array_mut).flatten() {
        if let Some(fields) = error.as_object_mut() {
            fields.remove("at");
        }
    }
    errors
}
