//! Where nothing may be written: read-only transactions and a hot standby.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::super::{Attempt, Stage, claim, complete, drain, enqueue, sorted};
use super::{OTHERS, READS, WRITES, all_refused};
use crate::cluster::Cluster;
use crate::process::wait_until;

// If this fails, a read-only transaction writes, or cannot look.
pub fn a_read_only_transaction_refuses_to_write(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 3)?;
    let attempt = *claim(&mut client, 1)?.first().context("nothing was claimed")?;
    client.batch_execute("SET default_transaction_read_only = on")?;
    all_refused(&mut client, WRITES.iter().chain(&["SELECT awa.adopt()"]), "25006", "")?;
    for sql in READS {
        client.batch_execute(sql).with_context(|| format!("in a read-only transaction: {sql}"))?;
    }
    let Attempt { job_id, run_lease } = attempt;
    let alive: bool = client.query_one("SELECT awa.heartbeat($1, $2)", &[&job_id, &run_lease])?.try_get(0)?;
    ensure!(alive, "a heartbeat in a read-only transaction did not find its attempt");
    client.query_one("SELECT awa.extend($1, $2, '1 hour')::text", &[&job_id, &run_lease])?;
    client.batch_execute("RESET default_transaction_read_only")?;
    complete(&mut client, attempt)?;
    ensure!(drain(&mut client)? == jobs[1..], "the jobs are not what they were");
    Ok(())
}

fn catch_up(primary: &mut Client, standby: &mut Client) -> Result<()> {
    let written: String = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[])?.try_get(0)?;
    let replayed = wait_until(Duration::from_secs(60), || {
        let reached = standby.query_one("SELECT pg_last_wal_replay_lsn() >= ($1::text)::pg_lsn", &[&written]);
        reached.is_ok_and(|row| row.try_get(0).unwrap_or(false))
    });
    ensure!(replayed, "the standby did not reach {written}");
    Ok(())
}

fn verify_clean(client: &mut Client) -> Result<()> {
    let rows = client.query("SELECT d::text FROM awa.verify() AS d", &[])?;
    let said: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(said.is_empty(), "verify() found:\n{}", said.join("\n"));
    Ok(())
}

// If this fails, a failover loses jobs or running attempts, or a standby answers with something that is not so.
pub fn a_standby_refuses_and_works_after_promotion(stage: &mut Stage<'_>) -> Result<()> {
    let mut primary = stage.connect()?;
    enqueue(&mut primary, 5)?;
    drain(&mut primary)?;
    // Some of it comes with the base backup, some through streaming.
    let early = enqueue(&mut primary, 20)?;
    let standby = stage.cluster.standby("awa-standby")?;
    let result = fail_over(stage, primary, &standby, early);
    if result.is_ok() {
        standby.remove()?;
    }
    if !stage.cluster.is_running() {
        stage.cluster.start()?;
        // Undecided in both from now on.
        stage.connect()?.batch_execute("ROLLBACK PREPARED 'over'")?;
    }
    result
}

fn fail_over(stage: &mut Stage<'_>, mut primary: Client, standby: &Cluster, early: Vec<i64>) -> Result<()> {
    let mut client = standby.connect(super::super::DATABASE)?;
    let mut transaction = primary.transaction()?;
    let running = claim(&mut transaction, 8)?;
    transaction.commit()?;
    complete(&mut primary, running[0])?;
    let late = enqueue(&mut primary, 10)?;
    primary.batch_execute("SELECT awa.rotate()")?;
    let latest = enqueue(&mut primary, 10)?;
    primary.batch_execute("BEGIN; SELECT awa.enqueue('q', 'prepared'); PREPARE TRANSACTION 'over'")?;
    catch_up(&mut primary, &mut client)?;

    let calls = [WRITES, READS, OTHERS, &["SELECT awa.adopt()"]].concat();
    all_refused(&mut client, calls.iter().filter(|sql| !sql.starts_with("INSERT")), "25006", "")?;
    all_refused(&mut client, &["SELECT count(*) FROM awa.jobs", "SELECT awa.claim('q')"], "25006", "")?;
    all_refused(&mut client, &["INSERT INTO awa.jobs (queue, kind, args) VALUES ('q', 'k', '{}')"], "25006", "")?;
    let version: String = client.query_one("SELECT awa.version()", &[])?.try_get(0)?;
    let queues: i64 = client.query_one("SELECT count(*) FROM awa.queues", &[])?.try_get(0)?;
    ensure!(!version.is_empty() && queues == 1, "version {version:?}, {queues} queues");

    drop(primary);
    stage.cluster.crash()?;
    client.batch_execute("SELECT pg_promote()")?;
    let alone = wait_until(Duration::from_secs(60), || {
        client.query_one("SELECT NOT pg_is_in_recovery()", &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false))
    });
    ensure!(alone, "the standby was not promoted");
    // The session that was refused before, and no adoption: it is the same system.
    verify_clean(&mut client)?;
    for attempt in &running[1..] {
        let answer = complete(&mut client, *attempt)?;
        ensure!(answer == "completed", "{attempt:?} ran over the failover: {answer}");
    }
    client.batch_execute("COMMIT PREPARED 'over'")?;
    let drained = drain(&mut client)?;
    let rest: Vec<i64> = early[running.len()..].iter().chain(&late).chain(&latest).copied().collect();
    ensure!(drained.len() == rest.len() + 1 && sorted(drained.clone()).starts_with(&sorted(rest.clone())), "waiting were {rest:?} and a prepared one, came {drained:?}");
    let more = enqueue(&mut client, 300)?;
    ensure!(more.iter().all(|id| !early.contains(id) && !drained.contains(id)), "an identifier was given out again");
    ensure!(drain(&mut client)? == more, "new jobs do not come out");
    verify_clean(&mut client)?;
    let adopted: bool = client.query_one("SELECT awa.adopt()", &[])?.try_get(0)?;
    ensure!(!adopted, "there was something to adopt");
    Ok(())
}
