//! A database with a job in every state, in several segments. What is shown of it must be the same wherever it is copied, restored or
//! upgraded to, and it must go on from there: `picture` and `goes_on`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use postgres::Client;

use super::hostile_setup::{OTHERS, READS, WRITES, all_refused};
use super::{Attempt, Stage, claim, complete, drain, enqueue, ids, sorted};

const STATES: [&str; 7] = ["available", "scheduled", "running", "completed", "failed", "cancelled", "dead_lettered"];

/// Jobs in every state, in several segments, one of them on its way out.
pub struct Scene {
    pub waiting: Vec<i64>,
    pub running: Vec<Attempt>,
}

pub fn set_up(stage: &Stage<'_>) -> Result<Scene> {
    let mut client = stage.connect()?;
    let refused = |client: &mut Client, attempt: Attempt| -> Result<()> {
        client.execute("SELECT awa.fail($1, $2, 'final', final => true)", &[&attempt.job_id, &attempt.run_lease])?;
        Ok(())
    };
    // The first segment has only finished jobs, and its truncation has begun.
    enqueue(&mut client, 5)?;
    drain(&mut client)?;
    client.batch_execute(
        "SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true, completed_retention => '1 year')",
    )?;
    // Finished jobs that are kept outside of the ring, and dead letters.
    for (kind, end) in [
        ("kept", "awa.complete(job_id, run_lease)"),
        ("cancelled", "awa.cancel(job_id, 'not wanted')"),
        ("letter", "awa.fail(job_id, run_lease, 'x')"),
        ("letter", "awa.fail(job_id, run_lease, 'y')"),
    ] {
        let enqueue = format!("SELECT awa.enqueue('letters', '{kind}', '{{\"n\": 1}}', tags => '{{a,b}}', metadata => '7')");
        client.batch_execute(&enqueue)?;
        client.batch_execute(&format!("SELECT {end} FROM awa.claim('letters')"))?;
    }
    rotate(&mut client)?;
    let begun: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
    ensure!(begun == "prune_started", "prune answered {begun}");
    // The second and the third hold everything.
    let (mut running, mut waiting) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        waiting.extend(enqueue(&mut client, 60)?);
        let attempts = claim(&mut client, 12)?;
        let (ended, open) = attempts.split_at(8);
        for attempt in &ended[..4] {
            complete(&mut client, *attempt)?;
        }
        refused(&mut client, ended[4])?;
        refused(&mut client, ended[5])?;
        client.execute("SELECT awa.fail($1, $2, 'again', '1 day')", &[&ended[6].job_id, &ended[6].run_lease])?;
        client.execute("SELECT awa.cancel($1, 'while it ran')", &[&ended[7].job_id])?;
        running.extend_from_slice(open);
        let cancelled = *waiting.last().context("nothing waits")?;
        client.execute("SELECT awa.cancel($1, 'while it waited')", &[&cancelled])?;
        // Rolled back, between others that are not: holes.
        let mut transaction = client.transaction()?;
        claim(&mut transaction, 5)?;
        let (kept, mut other) = (stage.connect()?, stage.connect()?);
        let beyond = claim(&mut other, 2)?;
        running.extend_from_slice(&beyond);
        transaction.rollback()?;
        drop(kept);
        let taken = [ids(&attempts), ids(&beyond)].concat();
        waiting.retain(|job| !taken.contains(job) && *job != cancelled);
        client.batch_execute(
            "SELECT awa.enqueue('q', 'later', run_at => now() + interval '1 day', tags => ARRAY['a'], metadata => '{\"m\": 1}')",
        )?;
        rotate(&mut client)?;
    }
    client.batch_execute(
        "SELECT awa.create_queue('second', max_attempts => 3, backoff => '7 s', deadline => '1 hour');
         SELECT awa.pause_queue('second');
         SELECT awa.enqueue('second', 'kind', args => '{\"deep\": [1, 2, {\"x\": null}]}', priority => p) FROM generate_series(1, 4) AS p;
         SELECT awa.create_queue('gone'); SELECT awa.enqueue('gone', 'k'); SELECT awa.drop_queue('gone', force => true)",
    )?;
    // Running and scheduled jobs of the first of the two are moved: into the open segment, and out of the ring.
    let moved: String = client.query_one("SELECT outcome FROM awa.carry_forward(2)", &[])?.try_get(0)?;
    ensure!(moved == "carried", "carry_forward answered {moved}");
    let deferred: i64 = client.query_one("SELECT count(*) FROM awa.deferred_jobs", &[])?.try_get(0)?;
    ensure!(deferred > 0, "no job waits outside of the ring");
    let states = counts(&mut client)?;
    ensure!(STATES.iter().all(|state| states.contains(state)), "not in every state: {states}");
    stage.verify_clean()?;
    Ok(Scene { waiting, running })
}

fn rotate(client: &mut Client) -> Result<()> {
    let outcome: String = client.query_one("SELECT outcome FROM awa.rotate()", &[])?.try_get(0)?;
    ensure!(outcome == "rotated", "rotate answered {outcome}");
    Ok(())
}

/// What must be the same in a copy. Whether a segment is drained is a hint: what was carried out of it is learned when somebody comes by.
pub fn picture(client: &mut Client) -> Result<Vec<String>> {
    let segments = "SELECT (to_jsonb(s) - '{bytes,opened_at,drained,waiting_queues}'::text[])::text FROM awa.stat_segments AS s ORDER BY generation";
    Ok([jobs_picture(client)?, lines(client, segments)?].concat())
}

/// The same of queues and jobs only, and without those of a load that goes on meanwhile.
pub fn jobs_picture(client: &mut Client) -> Result<Vec<String>> {
    let mut picture = Vec::new();
    for sql in [
        "SELECT c::text FROM awa.queue_counts() AS c WHERE queue NOT LIKE 'flow%' ORDER BY queue",
        "SELECT (to_jsonb(j) - 'heartbeat_at' - 'deadline_at')::text FROM awa.jobs AS j WHERE queue NOT LIKE 'flow%' ORDER BY job_id",
        "SELECT to_jsonb(j)::text FROM awa.terminal_jobs AS j WHERE queue NOT LIKE 'flow%' ORDER BY job_id",
        "SELECT to_jsonb(d)::text FROM awa.dlq AS d ORDER BY job_id",
        "SELECT q::text FROM awa.queues AS q WHERE queue NOT LIKE 'flow%' ORDER BY queue",
    ] {
        picture.extend(lines(client, sql)?);
    }
    Ok(picture)
}

fn lines(client: &mut Client, sql: &str) -> Result<Vec<String>> {
    client.query(sql, &[]).with_context(|| sql.to_owned())?.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

pub fn verify_clean(client: &mut Client) -> Result<()> {
    let rows = client.query("SELECT d::text FROM awa.verify() AS d", &[])?;
    let said: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(said.is_empty(), "verify() found:\n{}", said.join("\n"));
    Ok(())
}

/// Jobs by state, as `state=count`; from the log, not from memory.
pub fn counts(client: &mut Client) -> Result<String> {
    let sql = "SELECT string_agg(state || '=' || jobs, ' ' ORDER BY state)
                 FROM (SELECT state, count(*) AS jobs
                         FROM (SELECT state FROM awa.jobs UNION ALL SELECT state FROM awa.terminal_jobs
                               UNION ALL SELECT 'dead_lettered' FROM awa.dlq
                               UNION ALL SELECT 'deferred' FROM awa.deferred_jobs) AS every
                        GROUP BY state) AS counted";
    Ok(client.query_one(sql, &[])?.try_get::<_, Option<String>>(0)?.unwrap_or_default())
}

/// Each job once; `waiting` stands for available and scheduled, because time goes by.
pub type States = BTreeMap<i64, String>;

pub fn states(client: &mut Client) -> Result<States> {
    let mut states = States::new();
    let sql = "SELECT job_id, CASE WHEN state IN ('available', 'scheduled') THEN 'waiting' ELSE state END FROM (
                   SELECT job_id, state FROM awa.jobs UNION ALL SELECT job_id, state FROM awa.terminal_jobs
                   UNION ALL SELECT job_id, 'dead_lettered' FROM awa.dlq) AS every";
    for row in client.query(sql, &[])? {
        let (id, state): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
        if let Some(other) = states.insert(id, state.clone()) {
            bail!("job {id} is {other} and {state}");
        }
    }
    Ok(states)
}

/// Two pictures are one.
pub fn same(original: &[String], copy: &[String]) -> Result<()> {
    for (there, here) in original.iter().zip(copy) {
        ensure!(there == here, "the original has\n{there}\nthe copy has\n{here}");
    }
    ensure!(copy.len() == original.len(), "{} lines about the original, {} about the copy", original.len(), copy.len());
    Ok(())
}

/// Nothing works before this is adopted, by whichever session.
pub fn adopt(client: &mut Client, other: &mut Client) -> Result<()> {
    all_refused(client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.adopt()")?;
    all_refused(other, &["SELECT awa.claim('q')"], "55000", "awa.adopt()")?;
    for expected in [true, false] {
        let adopted: bool = client.query_one("SELECT awa.adopt()", &[])?.try_get(0)?;
        ensure!(adopted == expected, "adopt answered {adopted}");
    }
    Ok(())
}

/// Running attempts can be finished, everything that waits comes out once, and all that lies elsewhere can be brought back.
pub fn goes_on(client: &mut Client, other: &mut Client, scene: &Scene, original: &[String]) -> Result<()> {
    // New leases are not those of the original; its own are valid here.
    let fresh = claim(client, 3)?;
    ensure!(fresh.len() == 3 && fresh.iter().all(|attempt| scene.waiting.contains(&attempt.job_id)), "claimed {fresh:?}");
    ensure!(fresh.iter().all(|new| scene.running.iter().all(|old| old.run_lease != new.run_lease)), "a lease was used twice");
    for attempt in scene.running.iter().chain(&fresh) {
        let answer = complete(client, *attempt)?;
        ensure!(answer == "completed", "{attempt:?}: complete answered {answer}");
    }
    let drained = [ids(&fresh), drain(client)?].concat();
    ensure!(sorted(drained.clone()) == sorted(scene.waiting.clone()), "waiting were {:?}, came {drained:?}", scene.waiting);
    let more = enqueue(client, 300)?;
    ensure!(
        more.iter().all(|id| original.iter().all(|line| !line.contains(&format!("\"job_id\": {id},")))),
        "an identifier was given out again"
    );
    ensure!(drain(other)? == more, "new jobs do not come out");
    // What lay outside of the ring can be brought back there.
    let letters: i64 = client.query_one("SELECT awa.dlq_retry_many('letters')", &[])?.try_get(0)?;
    let kept = "SELECT awa.retry(job_id) FROM awa.terminal_jobs WHERE queue = 'letters' AND state = 'cancelled'";
    let kept: String = client.query_one(kept, &[])?.try_get(0)?;
    let out: i64 = client.query_one("SELECT count(*) FROM awa.claim('letters', 10)", &[])?.try_get(0)?;
    ensure!(
        (letters, kept.as_str(), out) == (2, "retried", 3),
        "{letters} letters came back, the kept job was {kept}, {out} came out"
    );
    client.batch_execute("SET awa.prune_grace = 0")?;
    let pruned: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
    ensure!(pruned == "pruned", "prune answered {pruned}");
    verify_clean(other)
}
