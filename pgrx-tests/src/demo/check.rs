//! What the demo proves: compares the table with a direct computation, and the queue with what was enqueued.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::Result;
use postgres::Client;

use super::inputs::{Inputs, digest};
use super::{Shared, lock};

#[derive(Debug, Default)]
pub struct Found {
    enqueued: usize,
    completed: i64,
    dead: i64,
    lost: usize,
    duplicated: usize,
    differences: Vec<String>,
    /// Anything else that should not be; each is a sentence.
    problems: Vec<String>,
    notes: Vec<String>,
}

pub fn check(client: &mut Client, shared: &Shared, inputs: &Inputs, started: Instant) -> Result<Found> {
    let enqueued = lock(&shared.enqueued).clone();
    let mut found = Found { enqueued: enqueued.len(), ..Found::default() };

    let counts = client
        .query_one("SELECT available + scheduled, running, completed, failed, cancelled FROM awa.queue_counts('files')", &[])?;
    let (open, running, cancelled): (i64, i64, i64) = (counts.try_get(0)?, counts.try_get(1)?, counts.try_get(4)?);
    found.completed = counts.try_get(2)?;
    found.dead = counts.try_get(3)?;
    if (open, running, cancelled) != (0, 0, 0) {
        found.problems.push(format!("queue_counts still shows {open} waiting, {running} running and {cancelled} cancelled jobs"));
    }

    let mut rows: BTreeMap<i64, usize> = BTreeMap::new();
    for row in client.query("SELECT job_id FROM demo_files", &[])? {
        *rows.entry(row.try_get(0)?).or_default() += 1;
    }
    let mut dead = BTreeSet::new();
    for row in client.query(
        "SELECT job_id, jsonb_array_length(errors) FROM awa.terminal_jobs WHERE queue = 'files' AND state = 'failed'",
        &[],
    )? {
        dead.insert(row.try_get::<_, i64>(0)?);
        let attempts: Option<i32> = row.try_get(1)?;
        if attempts != Some(3) {
            found
                .problems
                .push(format!("failed job {} has {attempts:?} errors in its history, not 3", row.try_get::<_, i64>(0)?));
        }
    }
    found.lost = enqueued.iter().filter(|&id| !rows.contains_key(id) && !dead.contains(id)).count();
    found.duplicated = rows.iter().map(|(id, count)| count - 1 + usize::from(dead.contains(id))).sum();

    let strangers = rows.keys().chain(&dead).filter(|&id| !enqueued.contains(id)).count();
    let leaked = lock(&shared.rolled_back).iter().filter(|&id| rows.contains_key(id) || dead.contains(id)).count();
    if strangers + leaked > 0 {
        found.problems.push(format!(
            "{strangers} jobs that nobody committed were run, {leaked} of them from the transaction that was rolled back"
        ));
    }
    if rows.len() as i64 != found.completed || dead.len() as i64 != found.dead {
        found.problems.push(format!(
            "the tables show {} completed and {} failed jobs, queue_counts others",
            rows.len(),
            dead.len()
        ));
    }
    if !shared.victim_killed.load(std::sync::atomic::Ordering::Relaxed) {
        found.problems.push("no session was killed: the run was too short".to_owned());
    }

    compare_files(client, inputs, started, &mut found)?;

    for row in client
        .query("SELECT problem, coalesce(queue, ''), coalesce(job_id::text, ''), coalesce(detail, '') FROM awa.verify()", &[])?
    {
        let field = |index| row.try_get::<_, String>(index);
        found.differences.push(format!("{} queue {} job {} {}", field(0)?, field(1)?, field(2)?, field(3)?));
    }
    Ok(found)
}

/// Every file once, with the digest that we compute here and now.
fn compare_files(client: &mut Client, inputs: &Inputs, started: Instant, found: &mut Found) -> Result<()> {
    let began = SystemTime::now().checked_sub(started.elapsed());
    let mut stored = BTreeMap::new();
    for row in client.query("SELECT path, bytes, lines, sha256 FROM demo_files", &[])? {
        let digest = (row.try_get::<_, i64>(1)?, row.try_get::<_, i64>(2)?, row.try_get::<_, String>(3)?);
        if stored.insert(row.try_get::<_, String>(0)?, digest).is_some() {
            found.problems.push(format!("{} was stored twice", row.try_get::<_, String>(0)?));
        }
    }
    let (mut same, mut changed) = (0, 0);
    for path in &inputs.files {
        let now = digest(path).ok().map(|now| (now.bytes, now.lines, now.sha256));
        let then = stored.remove(&path.to_string_lossy().into_owned());
        if then.is_some() && then == now {
            same += 1;
        } else if then.is_some() && was_changed_since(path, began) {
            changed += 1; // somebody edits the repository while we run
        } else {
            found.problems.push(format!("{}: stored {then:?}, computed {now:?}", path.display()));
        }
    }
    for path in stored.keys() {
        found.problems.push(format!("{path} is stored but is no input"));
    }
    found
        .notes
        .push(format!("{same} of {} files have the size, line count and SHA-256 of a direct computation", inputs.files.len()));
    if changed > 0 {
        found.notes.push(format!("{changed} files were changed by somebody while the demo ran and were not compared"));
    }
    Ok(())
}

fn was_changed_since(path: &Path, began: Option<SystemTime>) -> bool {
    match (fs::metadata(path).and_then(|found| found.modified()), began) {
        (Ok(modified), Some(began)) => modified >= began,
        (Err(_), _) => true, // gone meanwhile
        _ => false,
    }
}

impl Found {
    /// Prints what was found; whether all is well.
    pub fn report(&self) -> bool {
        for line in &self.notes {
            println!("{line}");
        }
        for line in &self.problems {
            println!("problem: {line}");
        }
        for line in &self.differences {
            println!("verify: {line}");
        }
        let counted = self.completed + self.dead == self.enqueued as i64;
        if !counted {
            println!("problem: completed and dead jobs do not add up to the enqueued ones");
        }
        counted && self.lost == 0 && self.duplicated == 0 && self.problems.is_empty() && self.differences.is_empty()
    }

    pub fn last_line(&self) -> String {
        let verify = match self.differences.len() {
            0 => "clean".to_owned(),
            count => format!("{count}-differences"),
        };
        format!(
            "demo: enqueued={} completed={} dead={} lost={} duplicated={} verify={verify}",
            self.enqueued, self.completed, self.dead, self.lost, self.duplicated
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_the_promised_one() {
        let found = Found { enqueued: 3, completed: 2, dead: 1, ..Found::default() };
        assert!(found.report());
        assert_eq!(found.last_line(), "demo: enqueued=3 completed=2 dead=1 lost=0 duplicated=0 verify=clean");
    }

    #[test]
    fn one_lost_job_is_enough_to_fail() {
        assert!(!Found { enqueued: 3, completed: 2, dead: 1, lost: 1, ..Found::default() }.report());
        assert!(!Found { enqueued: 3, completed: 2, dead: 0, ..Found::default() }.report());
        assert!(!Found { problems: vec!["x".into()], ..Found::default() }.report());
        assert!(!Found { differences: vec!["x".into()], ..Found::default() }.report());
    }
}
