//! E1, E2, E6, E11, E13, E14: who ends an attempt, who gets it, and how often.

use std::io::Write;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use super::super::races::{pid_of, see_blocked};
use super::super::{Stage, claim, complete, drain, enqueue, ids};
use super::*;

// If this fails, one attempt ends twice, counts and proofs are wrong, and the ring is pinned for ever.
pub fn e01_an_attempt_that_is_cancelled_and_completed_ends_once(stage: &mut Stage<'_>) -> Result<()> {
    stage.connect()?.batch_execute("SELECT awa.alter_queue('q', cancelled_retention => '0')")?;
    for complete_first in [false, true] {
        let (mut one, mut two, mut observer) = (stage.connect()?, stage.connect()?, stage.connect()?);
        enqueue(&mut one, 3)?;
        let attempts = claim(&mut one, 3)?;
        let contested = *attempts.first().context("nothing was claimed")?;
        let (first, second) = if complete_first { ("complete($job, $lease)", "cancel($job)") } else { ("cancel($job)", "complete($job, $lease)") };
        let mut transaction = one.transaction()?;
        answer(&mut transaction, first, contested)?;
        let pid = pid_of(&mut two)?;
        let late = thread::scope(|scope| -> Result<Result<String>> {
            let late = scope.spawn(|| answer(&mut two, second, contested));
            see_blocked(&mut observer, pid)?;
            transaction.commit()?;
            late.join().map_err(|_| anyhow!("a thread panicked"))
        })?;
        if complete_first {
            ensure!(late? == "already_finished", "the cancel found no end");
        } else {
            ensure!(late.is_err(), "a cancelled attempt was completed");
        }
        for attempt in attempts.into_iter().skip(1) {
            complete(&mut observer, attempt)?;
        }
        stage.verify_clean()?;
        let sql = "SELECT completed + cancelled, running FROM awa.queue_counts('q')";
        let row = observer.query_one(sql, &[])?;
        ensure!((row.try_get::<_, i64>(0)?, row.try_get::<_, i64>(1)?) == (3, 0), "three jobs do not count as three ends");
        rotate(&mut observer)?;
        let said = prune_all(&mut observer)?;
        ensure!(live_segments(&mut observer)? == 1, "the segment is pinned: {said:?}");
    }
    Ok(())
}

// If this fails, a running job is "not found" because somebody cancels another one that was claimed with it.
pub fn e02_a_cancel_does_not_see_the_cancel_of_a_sibling(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    enqueue(&mut one, 5)?;
    let attempts = claim(&mut one, 5)?;
    let mut transaction = one.transaction()?;
    answer(&mut transaction, "cancel($job)", attempts[0])?;
    two.batch_execute("SET lock_timeout = '20s'")?;
    let calls = ["cancel($job)", "complete($job, $lease)", "fail($job, $lease)", "snooze($job, $lease, '1 hour')"];
    for (call, attempt) in calls.into_iter().zip(&attempts[1..]) {
        let said = answer(&mut two, call, *attempt)?;
        ensure!(["cancelled", "completed", "retry", "snooze"].contains(&said.as_str()), "{call} answered {said}");
    }
    transaction.rollback()?;
    ensure!(complete(&mut one, attempts[0])? == "completed", "the cancel that rolled back has ended the attempt");
    Ok(())
}

// If this fails, two workers run one job, or jobs lie behind the cursor for ever.
pub fn e06_a_claim_is_undone_as_a_whole_and_never_doubled(stage: &mut Stage<'_>) -> Result<()> {
    let (mut one, mut two) = (stage.connect()?, stage.connect()?);
    let jobs = enqueue(&mut one, 3)?;
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        one.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT count(*) FROM pg_class"))?;
        let attempts = claim(&mut two, 3)?;
        ensure!(ids(&attempts) == jobs, "claimed {attempts:?}");
        ensure!(claim(&mut one, 3)?.is_empty(), "{level}: a job was claimed twice");
        one.batch_execute("COMMIT")?;
        for attempt in attempts {
            answer(&mut two, "snooze($job, $lease, '0')", attempt)?;
        }
    }
    // E6b: claim, claim again, roll back; also to a savepoint only.
    let mut transaction = one.transaction()?;
    ensure!(claim(&mut transaction, 3)?.len() == 3 && claim(&mut transaction, 3)?.is_empty(), "the claims are not 3 and 0");
    transaction.rollback()?;
    stage.verify_clean()?;
    let mut transaction = one.transaction()?;
    let mut savepoint = transaction.transaction()?;
    ensure!(claim(&mut savepoint, 2)?.len() == 2 && claim(&mut savepoint, 2)?.len() == 1, "the claims are not 2 and 1");
    savepoint.rollback()?;
    transaction.commit()?;
    let seen: i64 = two.query_one("SELECT count(*) FROM awa.jobs WHERE state IN ('available', 'scheduled')", &[])?.try_get(0)?;
    ensure!(seen == 3, "{seen} jobs are shown");
    ensure!(drain(&mut two)? == jobs, "jobs are lost behind the cursor");
    Ok(())
}

// If this fails, a job that kills its worker is tried for ever.
pub fn e11_rescue_ends_a_job_that_has_used_up_its_attempts(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.alter_queue('q', backoff => '0', backoff_max => '0')")?;
    for (terms, rescue) in
        [("deadline => '1 microsecond'", "rescue_expired_deadlines()"), ("heartbeat_timeout => '1 microsecond'", "rescue_stale_heartbeats()")]
    {
        let job: i64 = client.query_one("SELECT awa.enqueue('q', 'poison', max_attempts => 2)", &[])?.try_get(0)?;
        for attempt in 1..=2 {
            let sql = format!("SELECT attempt FROM awa.claim('q', 10, {terms})");
            let attempts: Vec<i32> = client.query(&sql, &[])?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
            ensure!(attempts == [attempt], "claimed attempts {attempts:?}");
            ensure!(step(&mut client, rescue)?.0 == "rescued", "nothing was rescued");
        }
        ensure!(state_of(&mut client, job)? == "failed", "the job is {}", state_of(&mut client, job)?);
        ensure!(claim(&mut client, 10)?.is_empty(), "a third attempt was handed out");
        stage.verify_clean()?;
    }
    Ok(())
}

/// Attempts after which the default backoff is asked for: a second, doubled each time, a day at most. The ancestor failed at 43, and was negative at 44 to 46.
const LATE: [i32; 9] = [17, 18, 42, 43, 44, 46, 47, 64, 65];

// If this fails, a job that has failed often is not put back, or is to run in the past or after years.
pub fn e13_backoff_is_clamped_at_every_attempt(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    for target in LATE {
        client.execute("SELECT awa.enqueue('q', 'k', to_jsonb($1::int), max_attempts => 1000)", &[&target])?;
    }
    for round in 1..=LATE[LATE.len() - 1] {
        let rows = client.query("SELECT job_id, run_lease, attempt, args::int FROM awa.claim('q', 64)", &[])?;
        ensure!(!rows.is_empty(), "no job is left in round {round}");
        for row in rows {
            let (job, lease, attempt, target): (i64, i64, i32, i32) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            ensure!(attempt == round, "attempt {attempt} in round {round}");
            let late = if attempt == target { "" } else { ", retry_after => '0'" };
            client.execute(&format!("SELECT awa.fail($1, $2, 'again'{late})"), &[&job, &lease])?;
        }
    }
    let sql = "SELECT args::int, extract(epoch FROM run_at - (errors -> -1 ->> 'at')::timestamptz)::float8 FROM awa.jobs ORDER BY 1";
    let delays = client.query(sql, &[])?;
    ensure!(delays.len() == LATE.len(), "{} jobs wait", delays.len());
    for row in delays {
        let (attempt, delay): (i32, f64) = (row.try_get(0)?, row.try_get(1)?);
        let longest = f64::from(86_400.min(1 << (attempt - 1).min(20)));
        ensure!(delay >= 0.74 * longest && delay <= longest + 1.0, "after attempt {attempt} it waits {delay} s, not {longest} at most");
    }
    Ok(())
}

// If this fails, jobs that nobody can handle come in by the fast path.
pub fn e14_every_way_in_checks_the_same(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let values = [("queue", "''"), ("kind", "''"), ("priority", "9"), ("priority", "0"), ("max_attempts", "30000"), ("max_attempts", "0")];
    for (column, value) in values {
        let given = |of: &str, usual: &str| if of == column { value.to_owned() } else { usual.to_owned() };
        let (queue, kind) = (given("queue", "'q'"), given("kind", "'k'"));
        let (priority, most) = (given("priority", "2"), given("max_attempts", "5"));
        let ways = [
            format!("SELECT awa.enqueue({queue}, {kind}, '{{}}', {priority}, max_attempts => {most})"),
            format!("SELECT awa.enqueue_many({queue}, {kind}, ARRAY['1', '2']::jsonb[], ARRAY[2, {priority}], max_attempts => {most})"),
            format!("INSERT INTO awa.jobs (queue, kind, priority, max_attempts, args) VALUES ('q', 'k', 2, 5, '1'), ({queue}, {kind}, {priority}, {most}, '2')"),
        ];
        for way in &ways {
            refused(client.batch_execute(way), way)?;
        }
        let line = format!("{}\t{}\t{priority}\t{most}\t1\n", queue.trim_matches('\''), kind.trim_matches('\''));
        let copied = copy(&mut client, &line);
        refused(copied, &format!("COPY of {line}"))?;
    }
    ensure!(claim(&mut client, 10)?.is_empty(), "a job came in all the same");
    let jobs = enqueue(&mut client, 1)?;
    ensure!(ids(&claim(&mut client, 10)?) == jobs, "the queue is broken");
    Ok(())
}

fn copy(client: &mut Client, line: &str) -> std::result::Result<(), postgres::Error> {
    let mut copy = client.copy_in("COPY awa.jobs (queue, kind, priority, max_attempts, args) FROM STDIN")?;
    // What the server thinks of it comes with the end.
    let _ = copy.write_all(line.as_bytes());
    copy.finish().map(|_| ())
}

/// With an error of the caller, not of ours.
fn refused(result: std::result::Result<(), postgres::Error>, what: &str) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("accepted: {what}") };
    let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
    ensure!(["22023", "42704"].contains(&code.as_str()), "{what}: {code} {error}");
    Ok(())
}
