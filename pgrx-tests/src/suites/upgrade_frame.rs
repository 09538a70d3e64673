//! From one version of the extension to the next: an updated installation is the same as a fresh one, jobs in every state survive the
//! update, and a library that meets the SQL of another version works, or says what to do.
//!
//! What was released is frozen (`sql/frozen`, docs/releasing.md); each such version is taken through all of it. Versions made up of the current
//! script (`versions`) show that the frame sees what it is for.

pub mod frozen;
mod surface;
mod versions;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use postgres::Client;

use self::surface::{Surface, dumped, surface};
use self::versions::{STEP_TO_NEXT, Scripts, before, next, step, step_from_before};
use super::every_state::{self, jobs_picture, states, verify_clean};
use super::hostile_setup::{OTHERS, READS, WRITES};
use super::stress_mixed::configured;
use super::{Attempt, DATABASE, Stage, claim, complete, enqueue};
use crate::build::Profile;
use crate::cluster::{Cluster, Options};
use crate::layout::Layout;
use crate::process::{run, wait_until};
use crate::tree::Tree;
use std::time::Duration;

const OTHER: &str = "awa_other_version";

fn current_version(client: &mut Client) -> Result<String> {
    Ok(client.query_one("SELECT default_version FROM pg_available_extensions WHERE name = 'awa_queue'", &[])?.try_get(0)?)
}

/// An empty database in which this was done.
fn fresh(cluster: &Cluster, statements: &[String]) -> Result<Client> {
    cluster.drop_database(OTHER)?;
    cluster.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {OTHER}"))?;
    let mut client = cluster.connect(OTHER)?;
    for sql in statements {
        client.batch_execute(sql).with_context(|| sql.clone())?;
    }
    Ok(client)
}

fn create(version: &str) -> String {
    format!("CREATE EXTENSION awa_queue VERSION '{version}'")
}

fn update(version: &str) -> String {
    format!("ALTER EXTENSION awa_queue UPDATE TO '{version}'")
}

fn whole(cluster: &Cluster, statements: &[String]) -> Result<Surface> {
    let mut client = fresh(cluster, statements)?;
    let mut lines = surface(&mut client)?;
    lines.extend(dumped(cluster.program("pg_dump"), OTHER)?);
    drop(client);
    cluster.drop_database(OTHER)?;
    Ok(lines)
}

fn differences(fresh: &Surface, updated: &Surface) -> String {
    let missing = fresh.difference(updated).map(|line| format!("only when fresh:   {line}"));
    let added = updated.difference(fresh).map(|line| format!("only when updated: {line}"));
    missing.chain(added).collect::<Vec<_>>().join("\n")
}

// If this fails, an updated database is another one than a fresh one: a function without its grants, a table that no dump carries.
pub fn an_upgrade_equals_a_fresh_install(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut scripts = Scripts::of(&mut client)?;
    let current = current_version(&mut client)?;
    let now = scripts.read(&current)?;
    scripts.add("next", &next(&now)?)?;
    scripts.add(&format!("{current}--next"), &step(STEP_TO_NEXT))?;
    let mut ways = vec![(current.clone(), "next".to_owned())];
    for release in frozen::released(&frozen::directory(&Layout::find()?.repo))? {
        scripts.add(&release.version, &std::fs::read_to_string(&release.script)?)?;
        if release.version != current {
            ways.push((release.version, current.clone()));
        }
    }
    for (from, to) in ways {
        let expected = whole(stage.cluster, &[create(&to)])?;
        let updated = whole(stage.cluster, &[create(&from), update(&to)])?;
        ensure!(expected.len() > 300, "a surface of {} lines only", expected.len());
        ensure!(expected == updated, "from {from} to {to}:\n{}", differences(&expected, &updated));
    }
    Ok(())
}

// If this fails, the case above passes although a step of an update was forgotten.
pub fn a_forgotten_step_of_an_update_is_noticed(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut scripts = Scripts::of(&mut client)?;
    let current = current_version(&mut client)?;
    scripts.add("next", &next(&scripts.read(&current)?)?)?;
    let mut other = fresh(stage.cluster, &[create("next")])?;
    let expected = surface(&mut other)?;
    for (forgotten, statement) in STEP_TO_NEXT.iter().enumerate() {
        let rest: Vec<&str> = STEP_TO_NEXT.iter().enumerate().filter(|(place, _)| *place != forgotten).map(|(_, sql)| *sql).collect();
        scripts.add(&format!("{current}--next"), &step(&rest))?;
        other.batch_execute("DROP EXTENSION awa_queue")?;
        other.batch_execute(&create(&current))?;
        // Some cannot even run without the one before.
        if other.batch_execute(&update("next")).is_ok() {
            ensure!(expected != surface(&mut other)?, "nobody misses: {statement}");
        }
    }
    drop(other);
    stage.cluster.drop_database(OTHER)
}

// If this fails, an update of the extension costs jobs, or the sessions that are connected while it runs.
pub fn jobs_in_every_state_survive_an_update(stage: &mut Stage<'_>) -> Result<()> {
    let scene = every_state::set_up(stage)?;
    let (mut worker, mut operator) = (stage.connect()?, stage.connect()?);
    let mut scripts = Scripts::of(&mut operator)?;
    let current = current_version(&mut operator)?;
    scripts.add("next", &next(&scripts.read(&current)?)?)?;
    scripts.add(&format!("{current}--next"), &step(STEP_TO_NEXT))?;
    let original = jobs_picture(&mut worker)?;
    operator.batch_execute(&update("next"))?;
    every_state::same(&original, &jobs_picture(&mut worker)?)?;
    verify_clean(&mut operator)?;
    every_state::goes_on(&mut worker, &mut operator, &scene, &original)
}

/// What each call answers, by its text: the SQLSTATE, and the hint if there is one.
fn answers(client: &mut Client) -> Result<BTreeMap<&'static str, (String, String)>> {
    let mut answers = BTreeMap::new();
    for sql in [WRITES, READS, OTHERS].concat() {
        // `wait` takes no transaction block.
        let block = !sql.starts_with("CALL");
        if block {
            client.batch_execute("BEGIN")?;
        }
        let said = match client.batch_execute(sql) {
            Ok(()) => (String::new(), String::new()),
            Err(error) => {
                let error = error.as_db_error().with_context(|| format!("{sql}: {error}"))?;
                (error.code().code().to_owned(), error.hint().unwrap_or_default().to_owned())
            }
        };
        answers.insert(sql, said);
        if block {
            client.batch_execute("ROLLBACK")?;
        }
    }
    Ok(answers)
}

// If this fails, who has installed a new library and not updated the extension gets riddles, or wrong answers.
pub fn a_library_that_meets_older_sql_works_or_says_what_to_do(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut scripts = Scripts::of(&mut client)?;
    let current = current_version(&mut client)?;
    let now = scripts.read(&current)?;
    enqueue(&mut client, 5)?;
    let usual = answers(&mut client)?;
    scripts.add("before", &before(&now)?)?;
    scripts.add(&format!("before--{current}"), &step_from_before(&now)?)?;
    let mut old = fresh(stage.cluster, &[create("before"), "SELECT awa.create_queue('q')".to_owned()])?;
    let jobs = enqueue(&mut old, 5)?;
    let (mut works, mut says, mut riddles) = (0, 0, Vec::new());
    for (sql, (code, hint)) in answers(&mut old)? {
        let unknown = code == "42883" && sql.contains("dlq_purge");
        match usual.get(sql) {
            _ if hint.contains("ALTER EXTENSION awa_queue UPDATE") || unknown => says += 1,
            Some((usual, _)) if *usual == code => works += 1,
            usual => riddles.push(format!("{sql}: {code} ({hint}), with its own SQL {usual:?}")),
        }
    }
    ensure!(riddles.is_empty() && works > 20 && says > 2, "{works} work, {says} say what to do, and:\n{}", riddles.join("\n"));
    println!("        upgrade_frame: with older SQL {works} calls work, {says} say what to do");
    let found = old.query_one("SELECT status, hint FROM awa.doctor() WHERE check_name = 'version'", &[])?;
    let (status, hint): (String, String) = (found.try_get(0)?, found.try_get(1)?);
    ensure!(status == "error" && hint.contains("ALTER EXTENSION awa_queue UPDATE"), "the doctor says {status}: {hint}");
    // The maintainer keeps away until then.
    configured(stage, &[("awa.maintenance", "on")], |_| {
        let maintainer = "SELECT coalesce(string_agg(detail, ''), '') FROM awa.doctor() WHERE check_name = 'maintainer'";
        let mut says = |word: &str| {
            wait_until(Duration::from_secs(60), || {
                old.query_one(maintainer, &[]).is_ok_and(|row| row.try_get::<_, String>(0).is_ok_and(|said| said.contains(word)))
            })
        };
        ensure!(says("version before of the extension"), "the maintainer does not say that it is of another version");
        update_to(&mut old, &current)?;
        let mut says = |word: &str| {
            wait_until(Duration::from_secs(60), || {
                old.query_one(maintainer, &[]).is_ok_and(|row| row.try_get::<_, String>(0).is_ok_and(|said| said.contains(word)))
            })
        };
        ensure!(says("works"), "the maintainer does not work after the update");
        Ok(())
    })?;
    for (sql, (code, hint)) in answers(&mut old)? {
        let expected = usual.get(sql).map(|(code, _)| code.as_str());
        ensure!(expected == Some(code.as_str()), "{sql}: {code} ({hint}) after the update, usually {expected:?}");
    }
    verify_clean(&mut old)?;
    let out = claim(&mut old, 10)?.len();
    ensure!(out == jobs.len(), "{out} of {} jobs come out after the update", jobs.len());
    drop(old);
    stage.cluster.drop_database(OTHER)
}

fn update_to(client: &mut Client, version: &str) -> Result<()> {
    client.batch_execute(&update(version)).context("update")
}

/// A dump of the stage's database with a job in every state, and what must be found in it again: lines of comments at its head.
pub fn fixture(stage: &Stage<'_>) -> Result<String> {
    let scene = every_state::set_up(stage)?;
    let mut client = stage.connect()?;
    let mut text = String::from("-- A database with a job in every state, as this version made it.\n");
    for (job, state) in states(&mut client)? {
        text.push_str(&format!("-- job {job} {state}\n"));
    }
    for attempt in &scene.running {
        text.push_str(&format!("-- attempt {} {}\n", attempt.job_id, attempt.run_lease));
    }
    let dump = run(stage.cluster.program("pg_dump").args(["--format=plain", DATABASE]))?;
    Ok(text + &String::from_utf8_lossy(&dump.stdout))
}

/// Restores the fixture as its version, updates, and holds it to its first lines. `to`: None for no update.
fn check_fixture(stage: &Stage<'_>, fixture: &str, version: &str, to: Option<&str>) -> Result<()> {
    let plain = "CREATE EXTENSION IF NOT EXISTS awa_queue WITH SCHEMA pg_catalog;";
    ensure!(fixture.contains(plain), "the fixture does not create the extension");
    let file = stage.cluster.dir().join("fixture.sql");
    std::fs::write(&file, fixture.replace(plain, &format!("{};", create(version))))?;
    let mut client = fresh(stage.cluster, &[])?;
    run(stage.cluster.program("psql").args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", OTHER, "-f"]).arg(&file))?;
    if let Some(to) = to {
        update_to(&mut client, to)?;
    }
    client.batch_execute("SELECT awa.adopt()")?;
    verify_clean(&mut client)?;
    let (mut expected, mut attempts) = (BTreeMap::new(), Vec::new());
    for line in fixture.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["--", "job", job, state] => drop(expected.insert(job.parse::<i64>()?, state.to_owned())),
            ["--", "attempt", job, lease] => attempts.push(Attempt { job_id: job.parse()?, run_lease: lease.parse()? }),
            _ => {}
        }
    }
    let found = states(&mut client)?;
    ensure!(expected == found && !attempts.is_empty(), "the fixture has {expected:?}, found {found:?}");
    for attempt in attempts {
        let answer = complete(&mut client, attempt)?;
        ensure!(answer == "completed", "{attempt:?}: complete answered {answer}");
    }
    ensure!(!claim(&mut client, 1000)?.is_empty(), "nothing comes out");
    verify_clean(&mut client)?;
    drop(client);
    stage.cluster.drop_database(OTHER)
}

// If this fails, a backup made with an earlier version cannot be used any more.
pub fn a_dump_of_each_release_restores_and_updates(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut scripts = Scripts::of(&mut client)?;
    let current = current_version(&mut client)?;
    for release in frozen::released(&frozen::directory(&Layout::find()?.repo))? {
        scripts.add(&release.version, &std::fs::read_to_string(&release.script)?)?;
        let text = std::fs::read_to_string(&release.fixture)?;
        let to = Some(current.as_str()).filter(|current| *current != release.version);
        check_fixture(stage, &text, &release.version, to).with_context(|| format!("the fixture of {}", release.version))?;
    }
    // The current one as if it were released now, then the next.
    let text = fixture(stage)?;
    scripts.add("next", &next(&scripts.read(&current)?)?)?;
    scripts.add(&format!("{current}--next"), &step(STEP_TO_NEXT))?;
    check_fixture(stage, &text, &current, Some("next")).context("a fixture of today")?;
    // Restored right into the next version, as who moves to another server does.
    check_fixture(stage, &text, "next", None).context("a dump of today in the next version")
}

/// `awa freeze`: the current version is released. Keeps its script, and a fixture made by the library that is installed in the tree.
pub fn freeze(layout: &Layout, tree: &Tree, profile: Profile) -> Result<String> {
    let mut cluster = Cluster::create(layout, tree, &Options::new("freeze"))?;
    cluster.start()?;
    cluster.create_database(DATABASE)?;
    let stage = Stage { cluster: &mut cluster, damaged: false, profile };
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('q')")?;
    let version = current_version(&mut client)?;
    let script = layout.repo.join(format!("sql/awa_queue--{version}.sql"));
    frozen::freeze(&frozen::directory(&layout.repo), &version, &script, &fixture(&stage)?)?;
    drop(client);
    cluster.remove()?;
    Ok(version)
}
