//! Copies of a database, and segment tables that were changed by hand.

use anyhow::{Result, ensure};
use postgres::Client;

use super::hostile_setup::{OTHERS, READS, WRITES, all_refused, refusal};
use super::stress_mixed::{HASTY, configured};
use super::witnesses::{maintenance_rests, under_load};
use super::every_state::{self, Scene, picture, set_up, verify_clean};
use super::{Attempt, DATABASE, Stage, claim, complete, drain, enqueue, sorted};
use crate::cluster::Shutdown;
use crate::process::{run, wait_until};
use std::time::Duration;

const COPY: &str = "awa_copy";

/// The copy refuses until it is adopted, and then is what the original was.
fn check_copy(stage: &Stage<'_>, scene: &Scene, original: &[String]) -> Result<()> {
    let (mut client, mut other) = (stage.cluster.connect(COPY)?, stage.cluster.connect(COPY)?);
    every_state::adopt(&mut client, &mut other)?;
    every_state::same(original, &picture(&mut other)?)?;
    verify_clean(&mut client)?;
    every_state::goes_on(&mut client, &mut other, scene, original)
}

// If this fails, what users are shown changes with a restart although nothing has happened.
pub fn a_rebuild_and_a_restart_change_nothing_that_is_shown(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    let mut differences = Vec::new();
    let shown = |stage: &Stage<'_>| -> Result<Vec<String>> {
        let mut client = stage.connect()?;
        let mut all = picture(&mut client)?;
        for row in client.query("SELECT (to_jsonb(s) - '{drained,waiting_queues}'::text[])::text FROM awa.stat_segments AS s ORDER BY generation", &[])? {
            all.push(row.try_get(0)?);
        }
        Ok(all)
    };
    let before = shown(stage)?;
    stage.connect()?.batch_execute("SELECT awa.rebuild()")?;
    let rebuilt = shown(stage)?;
    stage.cluster.restart(Shutdown::Fast)?;
    let restarted = shown(stage)?;
    for (what, after) in [("a rebuild", rebuilt), ("a restart", restarted)] {
        ensure!(after.len() == before.len(), "{} lines before, {} after {what}", before.len(), after.len());
        let changed = before.iter().zip(&after).filter(|(then, now)| then != now);
        differences.extend(changed.map(|(then, now)| format!("before {what}\n{then}\nand after it\n{now}")));
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    complete(&mut stage.connect()?, scene.running[0])?;
    Ok(())
}

/// What the copy did is nothing to the original.
fn check_original(stage: &Stage<'_>, scene: &Scene, original: &[String]) -> Result<()> {
    let mut client = stage.connect()?;
    ensure!(picture(&mut client)? == original, "the original has changed");
    complete(&mut client, scene.running[0])?;
    stage.cluster.drop_database(COPY)
}

fn dump_and_restore(stage: &Stage<'_>, dump: &[&str], restore: &[&str]) -> Result<()> {
    let scene = set_up(stage)?;
    let original = picture(&mut stage.connect()?)?;
    let target = stage.cluster.dir().join("copies.dump");
    drop(std::fs::remove_dir_all(&target));
    drop(std::fs::remove_file(&target));
    run(stage.cluster.program("pg_dump").args(dump).arg("--file").arg(&target).arg(DATABASE))?;
    stage.cluster.drop_database(COPY)?;
    stage.cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {COPY}"))?;
    if restore.is_empty() {
        run(stage.cluster.program("psql").args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", COPY, "-f"]).arg(&target))?;
    } else {
        run(stage.cluster.program("pg_restore").args(restore).args(["--exit-on-error", "-d", COPY]).arg(&target))?;
    }
    check_copy(stage, &scene, &original)?;
    check_original(stage, &scene, &original)
}

// If this fails, a backup is worth nothing, or a restored copy runs the jobs of the original.
pub fn a_plain_dump_restores_every_job(stage: &mut Stage<'_>) -> Result<()> {
    dump_and_restore(stage, &["--format=plain"], &[])
}

// If this fails, the same, with the fast format.
pub fn a_parallel_dump_restores_every_job(stage: &mut Stage<'_>) -> Result<()> {
    dump_and_restore(stage, &["--format=directory", "--jobs=2"], &["--jobs=2"])
}

// If this fails, a backup taken while the queue is in use lacks jobs, or holds a ring of which the half is gone (docs/races.md, 11).
pub fn a_dump_while_jobs_flow_holds_every_job_of_its_moment(stage: &mut Stage<'_>) -> Result<()> {
    // Jobs are carried and segments truncated all the time, but not within the grace.
    let settings: Vec<_> = HASTY.into_iter().chain([("awa.prune_grace", "1s")]).collect();
    configured(stage, &settings, |stage| {
        let target = stage.cluster.dir().join("copies.dump");
        drop(std::fs::remove_dir_all(&target));
        drop(std::fs::remove_file(&target));
        stage.cluster.drop_database(COPY)?;
        let mut client = stage.connect()?;
        let (witnesses, mark) = under_load(&stage.config(), "flow", |witnesses| {
            let pruned = "SELECT count(*) > 0 FROM awa.ring_rotations WHERE event = 'pruned'";
            let turns = wait_until(Duration::from_secs(60), || client.query_one(pruned, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
            ensure!(turns, "no segment is pruned");
            let mark = witnesses.mark();
            run(stage.cluster.program("pg_dump").arg("--format=custom").arg("--file").arg(&target).arg(DATABASE))?;
            witnesses.wait_for_more(100)?;
            Ok(mark)
        })?;
        stage.cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {COPY}"))?;
        run(stage.cluster.program("pg_restore").args(["--exit-on-error", "-d", COPY]).arg(&target))?;
        let mut copy = stage.cluster.connect(COPY)?;
        maintenance_rests(&mut copy)?;
        copy.batch_execute("SELECT awa.adopt()")?;
        verify_clean(&mut copy)?;
        let account = witnesses.account(&mut copy, &mark)?;
        ensure!(account.lost > 0, "the dump holds what came after it");
        witnesses.finish(&mut copy, &account)?;
        verify_clean(&mut copy)?;
        drop(copy);
        stage.cluster.drop_database(COPY)
    })
}

// If this fails, a maintainer frees a ring of which the half is not restored yet.
pub fn a_marked_restore_is_left_alone_until_it_is_complete(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    let original = picture(&mut stage.connect()?)?;
    let target = stage.cluster.dir().join("copies.dump");
    drop(std::fs::remove_dir_all(&target));
    drop(std::fs::remove_file(&target));
    run(stage.cluster.program("pg_dump").arg("--format=custom").arg("--file").arg(&target).arg(DATABASE))?;
    stage.cluster.drop_database(COPY)?;
    stage.cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {COPY}"))?;
    let mut client = stage.cluster.connect(COPY)?;
    // Somebody has used it before, so that there is something to void.
    for sql in ["CREATE EXTENSION awa_queue", "SELECT count(*) FROM awa.stat_queue", "SELECT awa.pre_restore()", "SELECT awa.pre_restore()"] {
        client.batch_execute(sql)?;
    }
    all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.post_restore()")?;
    all_refused(&mut client, &["SELECT awa.adopt()"], "55000", "awa.post_restore()")?;
    run(stage.cluster.program("pg_restore").args(["--exit-on-error", "-d", COPY]).arg(&target))?;
    drop(client);
    stage.cluster.restart(Shutdown::Fast)?;
    let mut client = stage.cluster.connect(COPY)?;
    all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.post_restore()")?;
    for expected in [true, false] {
        let adopted: bool = client.query_one("SELECT awa.post_restore()", &[])?.try_get(0)?;
        ensure!(adopted == expected, "post_restore answered {adopted}");
    }
    ensure!(picture(&mut client)? == original, "the copy is not what the original was");
    verify_clean(&mut client)?;
    drop(client);
    check_original(stage, &scene, &original)
}

// If this fails, a backup that is restored over its own database runs jobs again that were finished after it was taken.
pub fn a_restore_over_the_same_database_waits_for_adoption(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    let original = picture(&mut stage.connect()?)?;
    let target = stage.cluster.dir().join("copies.dump");
    drop(std::fs::remove_dir_all(&target));
    drop(std::fs::remove_file(&target));
    run(stage.cluster.program("pg_dump").arg("--format=custom").arg("--file").arg(&target).arg(DATABASE))?;
    let mut client = stage.connect()?;
    client.batch_execute("SET client_min_messages = error; DROP EXTENSION awa_queue CASCADE")?;
    run(stage.cluster.program("pg_restore").args(["--exit-on-error", "-d", DATABASE]).arg(&target))?;
    all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.adopt()")?;
    let adopted: bool = client.query_one("SELECT awa.adopt()", &[])?.try_get(0)?;
    ensure!(adopted, "adopt found nothing to do");
    ensure!(picture(&mut client)? == original, "the restored database is not what it was");
    complete(&mut client, scene.running[0])?;
    verify_clean(&mut client)
}

// If this fails, a database made from a template runs the jobs of the template.
pub fn a_database_made_from_a_template_waits_for_adoption(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    let original = picture(&mut stage.connect()?)?;
    stage.cluster.drop_database(COPY)?;
    let mut client = stage.cluster.connect("postgres")?;
    // Sessions that have just closed may take a moment to go.
    client.batch_execute(&format!("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{DATABASE}'"))?;
    client.batch_execute(&format!("CREATE DATABASE {COPY} TEMPLATE {DATABASE}"))?;
    check_copy(stage, &scene, &original)?;
    check_original(stage, &scene, &original)
}

/// The ready entries of the open segment, and the index that claims use.
fn open_segment(client: &mut Client) -> Result<(String, String)> {
    let table: String = client.query_one("SELECT ready_entries FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
    let index: String = client
        .query_one("SELECT min(relname)::text FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indrelid = ($1::text)::regclass", &[&table])?
        .try_get(0)?;
    Ok((table, index))
}

fn rewritten(stage: &Stage<'_>, command: impl Fn(&str, &str) -> String) -> Result<()> {
    let (mut client, mut other) = (stage.connect()?, stage.connect()?);
    let jobs = enqueue(&mut client, 20)?;
    let attempts = claim(&mut client, 5)?;
    let (table, index) = open_segment(&mut client)?;
    client.batch_execute(&command(&table, &index))?;
    let Attempt { job_id, run_lease } = attempts[0];
    let pair = format!("{job_id}, {run_lease}");
    let calls = [
        "SELECT awa.enqueue('q', 'k')".to_owned(),
        "SELECT awa.claim('q', 3)".to_owned(),
        format!("SELECT awa.complete({pair})"),
        format!("SELECT awa.fail({pair})"),
        format!("SELECT awa.cancel({job_id})"),
        format!("SELECT awa.cancel({})", jobs[10]),
    ];
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    all_refused(&mut client, &calls, "55000", "awa.rebuild()")?;
    all_refused(&mut other, &calls, "55000", "awa.rebuild()")?;
    client.batch_execute("SELECT awa.rebuild()")?;
    verify_clean(&mut client)?;
    for attempt in &attempts {
        complete(&mut other, *attempt)?;
    }
    let more = enqueue(&mut client, 5)?;
    let drained = drain(&mut other)?;
    ensure!(sorted(drained.clone()) == sorted([&jobs[5..], &more].concat()), "drained {drained:?}");
    Ok(())
}

// If this fails, an operator who compacts a table loses jobs, or does not learn how to go on.
pub fn a_rewritten_segment_asks_for_a_rebuild(stage: &mut Stage<'_>) -> Result<()> {
    rewritten(stage, |table, _| format!("VACUUM FULL {table}"))?;
    rewritten(stage, |table, index| format!("CLUSTER {table} USING {index}"))
}

// If this fails, maintenance that is documented as harmless is not.
pub fn evidence_may_be_rewritten_and_indexes_built_anew(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 20)?;
    let attempts = claim(&mut client, 10)?;
    complete(&mut client, attempts[0])?;
    client.execute("SELECT awa.fail($1, $2, 'error', '0')", &[&attempts[1].job_id, &attempts[1].run_lease])?;
    let (table, _) = open_segment(&mut client)?;
    for row in client.query("SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r'", &[])? {
        let other: String = row.try_get(0)?;
        client.batch_execute(&format!("REINDEX TABLE {other}"))?;
        client.batch_execute(&format!("VACUUM {} {other}", if other == table { "FREEZE" } else { "FULL" }))?;
        verify_clean(&mut client)?;
    }
    for attempt in &attempts[2..] {
        complete(&mut client, *attempt)?;
    }
    let drained = drain(&mut client)?;
    let mut rest = jobs[10..].to_vec();
    rest.push(attempts[1].job_id);
    ensure!(sorted(drained.clone()) == sorted(rest), "drained {drained:?}");
    Ok(())
}

// If this fails, a trigger on an internal table is passed over in silence, or breaks the queue for good.
pub fn a_trigger_on_a_segment_is_refused(stage: &mut Stage<'_>) -> Result<()> {
    refuses_while(
        stage,
        |table| format!("CREATE TRIGGER by_hand BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"),
        |table| format!("DROP TRIGGER by_hand ON {table}"),
    )
}

// If this fails, an index on an internal table is not kept up, in silence, and queries by hand give wrong answers.
pub fn an_index_on_a_segment_is_refused(stage: &mut Stage<'_>) -> Result<()> {
    refuses_while(
        stage,
        |table| format!("CREATE INDEX by_hand ON {table} (job_id)"),
        |_| "DROP INDEX awa_segments.by_hand".to_owned(),
    )
}

fn refuses_while(stage: &Stage<'_>, add: impl Fn(&str) -> String, remove: impl Fn(&str) -> String) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 5)?;
    let (table, _) = open_segment(&mut client)?;
    client.batch_execute(&add(&table))?;
    let refused = refusal(&mut client, "SELECT awa.enqueue('q', 'k')");
    client.batch_execute(&remove(&table))?;
    let refused = refused?;
    ensure!(refused.code == "55000" && refused.message.contains(table.trim_start_matches("awa_segments.")), "{refused:?}");
    ensure!(!refused.hint.is_empty(), "no hint: {refused:?}");
    ensure!(drain(&mut client)? == jobs, "the jobs are not what they were");
    Ok(())
}
