//! Who may do what: the roles that the documentation gives, and everybody else.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::{Stage, claim, enqueue};
use crate::layout::Layout;

const ROLES: &[&str] = &["queue_producer", "queue_worker", "queue_monitor", "queue_operator"];

/// The statements of the section on roles, as people copy them.
fn documented() -> Result<String> {
    let text = std::fs::read_to_string(Layout::find()?.repo.join("docs/operations.md"))?;
    let section = text.split("\n## Roles\n").nth(1).context("docs/operations.md has no section on roles")?;
    let block = section.split("```sql").nth(1).and_then(|rest| rest.split("```").next()).context("the section has no statements")?;
    Ok(block.to_owned())
}

fn drop_roles(client: &mut Client) -> Result<()> {
    for role in ROLES {
        client.batch_execute(&format!(
            "DO $$ BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN DROP OWNED BY {role}; DROP ROLE {role}; END IF; END $$"
        ))?;
    }
    Ok(())
}

/// What each role may call.
fn callable(client: &mut Client) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let rows = client.query(
        "SELECT r, p.proname::text FROM unnest($1::text[]) AS r, pg_proc AS p
          WHERE p.pronamespace = 'awa'::regnamespace AND has_function_privilege(r, p.oid, 'EXECUTE')",
        &[&ROLES],
    )?;
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in rows {
        all.entry(row.try_get(0)?).or_default().insert(row.try_get(1)?);
    }
    Ok(all)
}

fn as_role(client: &mut Client, role: &str, calls: &[&str], allowed: bool) -> Result<()> {
    for call in calls {
        client.batch_execute(&format!("SET ROLE {role}"))?;
        let outcome = client.batch_execute(call);
        client.batch_execute("RESET ROLE")?;
        match outcome {
            Ok(()) => ensure!(allowed, "{role} may do this: {call}"),
            Err(error) => {
                let said = error.as_db_error().with_context(|| format!("{call}: {error}"))?;
                ensure!(!allowed && said.code().code() == "42501", "{role}: {call}: {} {}", said.code().code(), said.message());
            }
        }
    }
    Ok(())
}

const PRODUCES: &[&str] = &[
    "SELECT awa.enqueue('q', 'a new kind', '{}')",
    "SELECT awa.enqueue_many('q', 'another kind', '{1,2}'::jsonb[])",
    "INSERT INTO awa.jobs (queue, kind, args) VALUES ('q', 'inserted', '{}')",
];
const WORKS: &[&str] = &[
    "SELECT awa.complete(job_id, run_lease) FROM awa.claim('q')",
    "SELECT awa.heartbeat(job_id, run_lease), awa.extend(job_id, run_lease, '1 hour'), awa.fail(job_id, run_lease, 'x', '0') FROM awa.claim('{q}'::text[])",
    "SELECT awa.snooze(job_id, run_lease, '0') FROM awa.claim_ready_runtime('q')",
    "SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('letters')",
    "SELECT awa.complete_and_claim('{}', '{}', 'q')",
    "SELECT awa.complete_many('{}', '{}'), awa.heartbeat_many('{}', '{}')",
    "CALL awa.wait('q', '0')",
];
const WATCHES: &[&str] = &[
    "SELECT * FROM awa.jobs",
    "SELECT * FROM awa.terminal_jobs",
    "SELECT * FROM awa.dlq",
    "SELECT * FROM awa.queues",
    "SELECT * FROM awa.stat_queue",
    "SELECT * FROM awa.stat_segments",
    "SELECT * FROM awa.stat_maintenance",
    "SELECT * FROM awa.horizon",
    "SELECT awa.version(), awa.metrics(), awa.doctor(), awa.queue_counts(), awa.job(1)",
];
const OPERATES: &[&str] = &[
    "SELECT awa.create_queue('new')",
    "SELECT awa.alter_queue('new', max_attempts => 3), awa.pause_queue('new'), awa.resume_queue('new')",
    "SELECT awa.cancel(max(job_id)) FROM awa.jobs",
    "SELECT awa.retry(max(job_id)) FROM awa.terminal_jobs WHERE state = 'cancelled'",
    "SELECT awa.delete_job(min(job_id)) FROM awa.terminal_jobs",
    "SELECT awa.dlq_retry_many('letters')",
    "SELECT awa.dlq_retry(1)",
    "SELECT awa.dlq_purge('letters')",
    "SELECT awa.rotate()",
    "SELECT awa.carry_forward()",
    "SELECT awa.prune()",
    "SELECT awa.rescue_expired_deadlines()",
    "SELECT awa.rescue_stale_heartbeats()",
    "SELECT awa.promote_deferred()",
    "SELECT awa.retention()",
    "SELECT awa.add_segments(1)",
    "SELECT awa.run_maintenance('rotate')",
    "SELECT awa.wake_maintenance()",
    "SELECT awa.verify()",
    "SELECT awa.rebuild()",
    "SELECT awa.drop_queue('new')",
];
const NOBODYS: &[&str] = &[
    "SELECT awa.adopt()",
    "SELECT awa.pre_restore()",
    "SELECT awa.post_restore()",
    "SELECT * FROM awa.queue_definitions",
    "SELECT * FROM awa.job_kinds",
    "SELECT * FROM awa.ring_rotations",
    "SELECT * FROM awa.dlq_entries",
    "SELECT * FROM awa.retained_jobs",
    "SELECT * FROM awa.deferred_jobs",
    "SELECT * FROM awa.instance",
    "SELECT nextval('awa.job_ids')",
    "SELECT * FROM awa_segments.ready_entries_0",
    "CREATE TABLE awa.mine ()",
];

// If this fails, the grants of the documentation are too few to work, or so many that a producer may claim.
pub fn the_documented_roles_do_their_work_and_no_other(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    drop_roles(&mut client)?;
    client.batch_execute(&documented()?).context("the statements of the documentation")?;
    client.batch_execute("SELECT awa.create_queue('letters', dead_letters => true); SELECT awa.enqueue('letters', 'k') FROM generate_series(1, 3)")?;
    for (role, work) in [("queue_producer", PRODUCES), ("queue_worker", WORKS), ("queue_monitor", WATCHES), ("queue_operator", WATCHES), ("queue_operator", OPERATES)] {
        enqueue(&mut client, 5)?;
        as_role(&mut client, role, work, true)?;
    }
    let jobs = claim(&mut client, 1)?;
    ensure!(!jobs.is_empty(), "nothing is left to claim");
    for (role, others) in [
        ("queue_producer", [WORKS, WATCHES, OPERATES, NOBODYS].concat()),
        ("queue_worker", [PRODUCES, WATCHES, OPERATES, NOBODYS].concat()),
        ("queue_monitor", [PRODUCES, WORKS, OPERATES, NOBODYS].concat()),
        ("queue_operator", [PRODUCES, WORKS, NOBODYS].concat()),
    ] {
        as_role(&mut client, role, &others, false)?;
    }
    // Every function is somebody's, or on purpose nobody's.
    let all = callable(&mut client)?;
    let given: BTreeSet<&String> = all.values().flatten().collect();
    let rows = client.query("SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'awa'::regnamespace", &[])?;
    let there = rows.iter().map(|row| row.try_get(0)).collect::<Result<BTreeSet<String>, _>>()?;
    let left: Vec<&str> = there.iter().filter(|name| !given.contains(name)).map(String::as_str).collect();
    ensure!(left == ["adopt", "announce", "jobs_insert", "post_restore", "pre_restore"], "nobody may call {left:?}");
    drop_roles(&mut client)
}

// If this fails, a function or table was added that everybody may use, or one that runs its caller's objects as its owner.
pub fn nothing_is_granted_to_everybody(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let rows = client.query(
        "SELECT p.oid::regprocedure::text FROM pg_proc AS p
          WHERE p.pronamespace = 'awa'::regnamespace AND (p.prosecdef OR p.proconfig IS NOT NULL OR p.proacl IS NULL
                OR EXISTS (SELECT FROM aclexplode(p.proacl) AS a WHERE a.grantee = 0))
         UNION ALL
         SELECT c.oid::regclass::text FROM pg_class AS c, aclexplode(c.relacl) AS a
          WHERE c.relnamespace IN ('awa'::regnamespace, 'awa_segments'::regnamespace) AND a.grantee = 0
         UNION ALL
         SELECT n.nspname::text FROM pg_namespace AS n, aclexplode(n.nspacl) AS a WHERE n.nspname IN ('awa', 'awa_segments') AND a.grantee = 0",
        &[],
    )?;
    let open = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
    ensure!(open.is_empty(), "everybody may use, or the owner is impersonated by: {open:?}");
    Ok(())
}
