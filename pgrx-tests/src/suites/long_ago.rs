//! Races with something that is long over: a snapshot, a crash, a transaction.

use anyhow::{Context, Result, ensure};

use super::{Attempt, Stage, claim, complete, drain, enqueue, ids};
use crate::points;

// 11. If this fails, a dump that began before a job was carried, and came to its tables after, holds the job nowhere.
pub fn a_dump_older_than_a_carry_holds_the_job(stage: &mut Stage<'_>) -> Result<()> {
    let (mut dump, mut client) = (stage.connect()?, stage.connect()?);
    let job: i64 = client.query_one("SELECT awa.enqueue('q', 'k', run_at => now() + interval '10 minutes')", &[])?.try_get(0)?;
    dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class")?;
    let mut said = Vec::new();
    for call in ["rotate()", "carry_forward(1)", "prune()", "prune()"] {
        said.push(client.query_one(&format!("SELECT outcome FROM awa.{call}"), &[])?.try_get::<_, String>(0)?);
    }
    // What it sees was fixed before the carry; now it locks the tables and reads them.
    let mut copies = 0;
    for table in ["awa_segments.ready_entries_0", "awa_segments.ready_entries_1", "awa.deferred_jobs"] {
        dump.batch_execute(&format!("LOCK TABLE {table} IN ACCESS SHARE MODE"))?;
        copies += dump.query_one(&format!("SELECT count(*) FROM {table} WHERE job_id = $1"), &[&job])?.try_get::<_, i64>(0)?;
    }
    ensure!(copies == 1, "the dump holds {copies} copies of the job; said {said:?}");
    ensure!(said == ["rotated", "carried", "prune_started", "waiting"], "{said:?}");
    dump.batch_execute("COMMIT")?;
    client.batch_execute("SET awa.prune_grace = 0; SELECT awa.prune()")?;
    let state: String = client.query_one("SELECT state FROM awa.job($1)", &[&job])?.try_get(0)?;
    ensure!(state == "scheduled", "the job is {state}");
    Ok(())
}

// 12. If this fails, a worker from before a crash ends the attempt of another.
pub fn a_lease_from_before_a_crash_ends_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 1)?;
    let mut old: Vec<Attempt> = Vec::new();
    for _ in 0..2 {
        let mut client = stage.connect()?;
        // The claim is lost with the crash; its worker has the job all the same.
        client.batch_execute("BEGIN")?;
        let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
        ensure!(old.iter().all(|other| other.run_lease != attempt.run_lease), "a lease came again");
        old.push(attempt);
        stage.cluster.crash()?;
        stage.cluster.start()?;
    }
    let mut client = stage.connect()?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    for stale in old {
        ensure!(complete(&mut client, stale).is_err(), "a lease from before the crash has ended the attempt");
    }
    ensure!(complete(&mut client, attempt)? == "completed", "the attempt was ended by another");
    Ok(())
}

// 16, 20. If this fails, a crash loses jobs whose transaction was prepared before it, or hands them out before it commits.
pub fn a_prepared_enqueue_outlives_a_crash(stage: &mut Stage<'_>) -> Result<()> {
    let (mut producer, mut client) = (stage.connect()?, stage.connect()?);
    producer.batch_execute("BEGIN")?;
    let prepared = enqueue(&mut producer, 2)?;
    producer.batch_execute("PREPARE TRANSACTION 'outlives'")?;
    let others = enqueue(&mut client, 3)?;
    ensure!(drain(&mut client)? == others, "the prepared transaction holds up others");
    stage.cluster.crash()?;
    stage.cluster.start()?;
    let mut client = stage.connect()?;
    let others = enqueue(&mut client, 3)?;
    ensure!(drain(&mut client)? == others, "after the crash the prepared transaction holds up others, or was claimed");
    client.batch_execute("COMMIT PREPARED 'outlives'")?;
    let drained = drain(&mut client)?;
    ensure!(drained == prepared, "prepared {prepared:?}, drained {drained:?}");
    Ok(())
}

// 5. If this fails, a crash in the middle of a prune brings finished jobs back, or the slot is never free again.
pub fn a_kill_between_two_tables_of_a_prune_makes_nothing_ready(stage: &mut Stage<'_>) -> Result<()> {
    let steps = ["prune.locked", "prune.ready_truncated", "prune.closures_truncated", "prune.done_truncated", "prune.claims_truncated", "prune.pruned"];
    points::create(&mut stage.connect()?)?;
    for step in steps {
        let mut client = stage.connect()?;
        client.batch_execute("SET awa.prune_grace = 0; SELECT awa.alter_queue('q', failed_retention => '0', cancelled_retention => '0')")?;
        // Ends of each kind: completed, cancelled before and after the claim, failed.
        let jobs = enqueue(&mut client, 400)?;
        client.execute("SELECT awa.cancel($1)", &[&jobs[7]])?;
        let attempts = claim(&mut client, 2)?;
        client.execute("SELECT awa.cancel($1)", &[&attempts[0].job_id])?;
        client.execute("SELECT awa.fail($1, $2, 'x', final => true)", &[&attempts[1].job_id, &attempts[1].run_lease])?;
        drain(&mut client)?;
        for (call, wanted) in [("rotate()", "rotated"), ("prune()", "prune_started")] {
            let said: String = client.query_one(&format!("SELECT outcome FROM awa.{call}"), &[])?.try_get(0)?;
            ensure!(said == wanted, "before {step}: {call} said {said}");
        }
        points::arm(&mut client, step, "kill")?;
        let log_start = stage.cluster.log_size();
        ensure!(client.batch_execute("SELECT awa.prune()").is_err(), "the prune went past {step}");
        stage.cluster.wait_recovered(log_start)?;
        stage.verify_clean()?;
        let mut client = stage.connect()?;
        client.batch_execute("SET awa.prune_grace = 0")?;
        let again = claim(&mut client, 10)?;
        ensure!(again.is_empty(), "after a kill at {step} {:?} came back", ids(&again));
        let said: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
        ensure!(said == "pruned", "after a kill at {step} the prune said {said}");
    }
    // The slots are as good as new.
    let mut client = stage.connect()?;
    for _ in 0..2 {
        let jobs = enqueue(&mut client, 300)?;
        ensure!(drain(&mut client)? == jobs, "jobs are missing");
        client.batch_execute("SELECT awa.rotate()")?;
    }
    Ok(())
}

/// More than a file of the commit log holds.
const TRANSACTIONS: i32 = 1_100_000;

// 21. If this fails, jobs that a scan passed by, in a queue that was paused for weeks, raise an error instead of coming out.
pub fn a_gap_outlives_the_commit_log(stage: &mut Stage<'_>) -> Result<()> {
    let (mut producer, mut client) = (stage.connect()?, stage.connect()?);
    producer.batch_execute("BEGIN")?;
    let jobs = enqueue(&mut producer, 3)?;
    enqueue(&mut client, 1)?;
    ensure!(drain(&mut client)?.len() == 1, "the scan did not go past the open transaction");
    client.batch_execute("SELECT awa.pause_queue('q')")?;
    producer.batch_execute("COMMIT")?;
    client.batch_execute(&format!(
        "CREATE UNLOGGED TABLE burnt (a int); \
         DO $$ BEGIN FOR n IN 1..{TRANSACTIONS} LOOP BEGIN INSERT INTO burnt VALUES (n); EXCEPTION WHEN OTHERS THEN RAISE; END; END LOOP; END $$; \
         DROP TABLE burnt"
    ))?;
    client.batch_execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")?;
    let frozen = (|| -> Result<()> {
        let databases = client.query("SELECT datname FROM pg_database WHERE datallowconn", &[])?;
        for row in databases {
            stage.cluster.connect(row.try_get(0)?)?.batch_execute("VACUUM FREEZE")?;
        }
        Ok(())
    })();
    client.batch_execute("ALTER DATABASE template0 ALLOW_CONNECTIONS false")?;
    frozen?;
    let kept: bool = client.query_one("SELECT EXISTS (SELECT FROM pg_ls_dir('pg_xact') AS file WHERE file = '0000')", &[])?.try_get(0)?;
    ensure!(!kept, "the commit log is still there");
    client.batch_execute("SELECT awa.resume_queue('q')")?;
    stage.verify_clean()?;
    let drained = drain(&mut client)?;
    ensure!(drained == jobs, "enqueued {jobs:?}, drained {drained:?}");
    Ok(())
}
