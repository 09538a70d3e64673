//! Copies of a database, and segment tables that were changed by hand.

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::hostile_setup::{OTHERS, READS, WRITES, all_refused, refusal};
use super::{Attempt, DATABASE, Stage, claim, complete, drain, enqueue, ids, sorted};
use crate::cluster::Shutdown;
use crate::process::run;

const COPY: &str = "awa_copy";

/// Jobs in every state, in several segments, one of them on its way out.
struct Scene {
    waiting: Vec<i64>,
    running: Vec<Attempt>,
}

fn set_up(stage: &Stage<'_>) -> Result<Scene> {
    let mut client = stage.connect()?;
    let refused = |client: &mut Client, attempt: Attempt| -> Result<()> {
        client.execute("SELECT awa.fail($1, $2, 'final', final => true)", &[&attempt.job_id, &attempt.run_lease])?;
        Ok(())
    };
    // The first segment has only finished jobs, and its truncation has begun.
    enqueue(&mut client, 5)?;
    drain(&mut client)?;
    client.batch_execute("SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true, completed_retention => '1 year')")?;
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
        client.batch_execute("SELECT awa.enqueue('q', 'later', run_at => now() + interval '1 day', tags => ARRAY['a'], metadata => '{\"m\": 1}')")?;
        rotate(&mut client)?;
    }
    client.batch_execute(
        "SELECT awa.create_queue('second', max_attempts => 3, backoff => '7 s', deadline => '1 hour');
         SELECT awa.pause_queue('second');
         SELECT awa.enqueue('second', 'kind', args => '{\"deep\": [1, 2, {\"x\": null}]}', priority => p) FROM generate_series(1, 4) AS p;
         SELECT awa.create_queue('gone'); SELECT awa.enqueue('gone', 'k'); SELECT awa.drop_queue('gone', force => true)",
    )?;
    stage.verify_clean()?;
    Ok(Scene { waiting, running })
}

fn rotate(client: &mut Client) -> Result<()> {
    let outcome: String = client.query_one("SELECT outcome FROM awa.rotate()", &[])?.try_get(0)?;
    ensure!(outcome == "rotated", "rotate answered {outcome}");
    Ok(())
}

/// What must be the same in a copy.
fn picture(client: &mut Client) -> Result<Vec<String>> {
    let mut picture = Vec::new();
    for sql in [
        "SELECT c::text FROM awa.queue_counts() AS c ORDER BY queue",
        "SELECT (to_jsonb(j) - 'heartbeat_at' - 'deadline_at')::text FROM awa.jobs AS j ORDER BY job_id",
        "SELECT to_jsonb(j)::text FROM awa.terminal_jobs AS j ORDER BY job_id",
        "SELECT to_jsonb(d)::text FROM awa.dlq AS d ORDER BY job_id",
        "SELECT q::text FROM awa.queues AS q ORDER BY queue",
        "SELECT (to_jsonb(s) - 'bytes' - 'opened_at')::text FROM awa.stat_segments AS s ORDER BY generation",
    ] {
        for row in client.query(sql, &[]).context(sql)? {
            picture.push(row.try_get(0)?);
        }
    }
    Ok(picture)
}

fn verify_clean(client: &mut Client) -> Result<()> {
    let rows = client.query("SELECT d::text FROM awa.verify() AS d", &[])?;
    let said: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    ensure!(said.is_empty(), "verify() found:\n{}", said.join("\n"));
    Ok(())
}

/// The copy refuses until it is adopted, and then is what the original was.
fn check_copy(stage: &Stage<'_>, scene: &Scene, original: &[String]) -> Result<()> {
    let (mut client, mut other) = (stage.cluster.connect(COPY)?, stage.cluster.connect(COPY)?);
    all_refused(&mut client, [WRITES, READS, OTHERS].concat().iter(), "55000", "awa.adopt()")?;
    all_refused(&mut other, &["SELECT awa.claim('q')"], "55000", "awa.adopt()")?;
    for expected in [true, false] {
        let adopted: bool = client.query_one("SELECT awa.adopt()", &[])?.try_get(0)?;
        ensure!(adopted == expected, "adopt answered {adopted}");
    }
    let copy = picture(&mut other)?;
    for (there, here) in original.iter().zip(&copy) {
        ensure!(there == here, "the original has\n{there}\nthe copy has\n{here}");
    }
    ensure!(copy.len() == original.len(), "{} lines about the original, {} about the copy", original.len(), copy.len());
    verify_clean(&mut client)?;
    // New leases are not those of the original; its own are valid here.
    let fresh = claim(&mut client, 3)?;
    ensure!(fresh.len() == 3 && fresh.iter().all(|attempt| scene.waiting.contains(&attempt.job_id)), "claimed {fresh:?}");
    ensure!(fresh.iter().all(|new| scene.running.iter().all(|old| old.run_lease != new.run_lease)), "a lease was used twice");
    for attempt in scene.running.iter().chain(&fresh) {
        let answer = complete(&mut client, *attempt)?;
        ensure!(answer == "completed", "{attempt:?}: complete answered {answer}");
    }
    let drained = [ids(&fresh), drain(&mut client)?].concat();
    ensure!(sorted(drained.clone()) == sorted(scene.waiting.clone()), "waiting were {:?}, came {drained:?}", scene.waiting);
    let more = enqueue(&mut client, 300)?;
    ensure!(more.iter().all(|id| original.iter().all(|line| !line.contains(&format!("\"job_id\": {id},")))), "an identifier was given out again");
    ensure!(drain(&mut other)? == more, "new jobs do not come out");
    // What lay outside of the ring can be brought back there.
    let letters: i64 = client.query_one("SELECT awa.dlq_retry_many('letters')", &[])?.try_get(0)?;
    let kept = "SELECT awa.retry(job_id) FROM awa.terminal_jobs WHERE queue = 'letters' AND state = 'cancelled'";
    let kept: String = client.query_one(kept, &[])?.try_get(0)?;
    let out: i64 = client.query_one("SELECT count(*) FROM awa.claim('letters', 10)", &[])?.try_get(0)?;
    ensure!((letters, kept.as_str(), out) == (2, "retried", 3), "{letters} letters came back, the kept job was {kept}, {out} came out");
    client.batch_execute("SET awa.prune_grace = 0")?;
    let pruned: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
    ensure!(pruned == "pruned", "prune answered {pruned}");
    verify_clean(&mut other)
}

// If this fails, what users are shown changes with a restart although nothing has happened.
pub fn a_rebuild_and_a_restart_change_nothing_that_is_shown(stage: &mut Stage<'_>) -> Result<()> {
    let scene = set_up(stage)?;
    let mut differences = Vec::new();
    let shown = |stage: &Stage<'_>| -> Result<Vec<String>> {
        let mut client = stage.connect()?;
        let mut all = picture(&mut client)?;
        for row in client.query("SELECT s::text FROM awa.stat_segments AS s ORDER BY generation", &[])? {
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
