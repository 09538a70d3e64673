//! `awa test`: every suite in order, one report.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::build::{Profile, build};
use crate::cluster::{Cluster, Options};
use crate::layout::Layout;
use crate::regress::{Kind, Run};
use crate::report::{Outcome, Report};
use crate::suites::{CASES, pg_upgrade};
use crate::tree::{Server, Tree};

pub struct Selection {
    /// Runs only tests whose name, e.g. `client/15/crash::a_killed_backend_loses_no_job`, contains this.
    pub filter: Option<String>,
    pub servers: Vec<Server>,
    pub profile: Profile,
    pub skip_build: bool,
    pub accept: bool,
}

impl Selection {
    pub fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }
}

/// Suites that need no server: label and cargo package.
const CARGO_SUITES: &[(&str, &str)] =
    &[("protocol", "awa_protocol"), ("spec", "awa_spec"), ("harness", "awa_harness"), ("bench", "awa_bench")];

type ServerSuite = fn(&Selection, &Layout, &Tree, &mut Cluster, &mut Report) -> Result<()>;

/// Suites that run against each server, in order.
const SERVER_SUITES: &[(&str, ServerSuite)] = &[("regress", sql_regress), ("isolation", isolation), ("client", client)];

/// True when something ran and all of it passed.
pub fn run(layout: &Layout, selection: &Selection) -> Result<bool> {
    let mut report = Report::default();
    for (label, package) in CARGO_SUITES {
        for outcome in cargo_test(layout, label, package, selection)? {
            report.record(outcome);
        }
    }
    if let Err(error) = upgrades(layout, selection, &mut report) {
        report.record(Outcome::failed(UPGRADE, format!("{error:#}"), None));
    }
    run_servers(layout, selection, SERVER_SUITES, report)
}

const UPGRADE: &str = "upgrade/15-18";

/// From one server to the later one: only when both are selected.
fn upgrades(layout: &Layout, selection: &Selection, report: &mut Report) -> Result<()> {
    let wanted: Vec<_> = pg_upgrade::CASES.iter().filter(|(name, _)| selection.wants(&format!("{UPGRADE}/{name}"))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    if ![Server::Fifteen, Server::Eighteen].iter().all(|server| selection.servers.contains(server)) {
        println!("none    {UPGRADE}: needs both servers, --pg 15,18");
        return Ok(());
    }
    let (old, new) = (Tree::provide(layout, Server::Fifteen)?, Tree::provide(layout, Server::Eighteen)?);
    for tree in [&old, &new] {
        tree.install(layout, &build(layout, tree, selection.profile, selection.skip_build)?)?;
    }
    let pair = pg_upgrade::Pair { layout, old: &old, new: &new, profile: selection.profile };
    for (name, case) in wanted {
        let started = Instant::now();
        let name = format!("{UPGRADE}/{name}");
        report.record(match case(&pair) {
            Ok(()) => Outcome::passed(name, Some(started.elapsed())),
            Err(error) => Outcome::failed(name, format!("{error:#}"), Some(started.elapsed())),
        });
    }
    Ok(())
}

/// Only the suites of pg_regress and pg_isolation_regress.
pub fn run_regress(layout: &Layout, selection: &Selection) -> Result<bool> {
    run_servers(layout, selection, &[("regress", sql_regress), ("isolation", isolation)], Report::default())
}

fn run_servers(layout: &Layout, selection: &Selection, suites: &[(&str, ServerSuite)], mut report: Report) -> Result<bool> {
    for &server in &selection.servers {
        let wanted = |suite: &str| server_suite_is_wanted(layout, selection, suite, server);
        let suites: Vec<_> = suites.iter().filter(|(suite, _)| wanted(suite)).collect();
        if suites.is_empty() {
            continue;
        }
        if let Err(error) = on_server(layout, selection, server, &suites, &mut report) {
            report.record(Outcome::failed(format!("server/{}", server.name()), format!("{error:#}"), None));
        }
    }
    if report.count() == 0 {
        report.record(Outcome::failed("selection", "no test has such a name", None));
    }
    report.finish();
    Ok(report.all_passed())
}

fn on_server(
    layout: &Layout,
    selection: &Selection,
    server: Server,
    suites: &[&(&str, ServerSuite)],
    report: &mut Report,
) -> Result<()> {
    let tree = Tree::provide(layout, server)?;
    let built = build(layout, &tree, selection.profile, selection.skip_build)?;
    tree.install(layout, &built)?;
    for (name, suite) in suites {
        // A cluster a suite, so that a crash in one is not the weather of the next.
        let mut cluster = Cluster::create(layout, &tree, &Options::new(&format!("{name}-{}", server.name())))?;
        cluster.start()?;
        suite(selection, layout, &tree, &mut cluster, report)?;
    }
    Ok(())
}

/// Whether any test of the suite may be meant; spares building a server for nothing.
fn server_suite_is_wanted(layout: &Layout, selection: &Selection, suite: &str, server: Server) -> bool {
    let names: Vec<String> = match suite {
        "client" => CASES.iter().map(|case| case.name.to_owned()).collect(),
        "regress" => Kind::Sql.scheduled(layout),
        _ => Kind::Isolation.scheduled(layout),
    };
    let label = format!("{suite}/{}", server.name());
    selection.wants(&format!("{label}/")) || names.iter().any(|name| selection.wants(&format!("{label}/{name}")))
}

fn sql_regress(selection: &Selection, layout: &Layout, tree: &Tree, cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    regress(Kind::Sql, selection, layout, tree, cluster, report)
}

fn isolation(selection: &Selection, layout: &Layout, tree: &Tree, cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    regress(Kind::Isolation, selection, layout, tree, cluster, report)
}

fn regress(
    kind: Kind,
    selection: &Selection,
    layout: &Layout,
    tree: &Tree,
    cluster: &mut Cluster,
    report: &mut Report,
) -> Result<()> {
    let label = format!("{}/{}", kind.name(), tree.server.name());
    let run = Run { layout, tree, cluster, kind, accept: selection.accept };
    match run.run(|test| selection.wants(&format!("{label}/{test}")))? {
        None => println!("none    {label}: there is no schedule yet"),
        Some(outcomes) => outcomes.into_iter().for_each(|outcome| report.record(outcome)),
    }
    Ok(())
}

fn client(selection: &Selection, _: &Layout, tree: &Tree, cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    let label = format!("client/{}", tree.server.name());
    for case in CASES {
        if selection.wants(&format!("{label}/{}", case.name)) {
            report.record(case.run(&label, cluster, selection.profile));
        }
    }
    Ok(())
}

/// Runs the tests of a crate. The filter is applied to the full name, `label/test`, after the run lists the tests.
fn cargo_test(layout: &Layout, label: &str, package: &str, selection: &Selection) -> Result<Vec<Outcome>> {
    let mut command = Command::new("cargo");
    command
        .current_dir(&layout.repo)
        .env("CARGO_TARGET_DIR", layout.cargo_target("harness"))
        .env("CARGO_TERM_COLOR", "never")
        .args(["test", "--quiet", "--package", package, "--"])
        .args(["--format=pretty"])
        .stdin(Stdio::null());
    if let Some(filter) = &selection.filter {
        match filter.strip_prefix(&format!("{label}/")) {
            Some(test) => {
                command.arg(test);
            }
            None if label.contains(filter.as_str()) => {}
            None => return Ok(Vec::new()),
        }
    }
    let out = command.output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&out.stdout);
    let mut outcomes = cargo_outcomes(label, &said);
    if !out.status.success() && outcomes.iter().all(|outcome| outcome.failure.is_none()) {
        let why = format!("{}\n{said}{}", out.status, String::from_utf8_lossy(&out.stderr));
        outcomes.push(Outcome::failed(format!("{label}/cargo"), why, None));
    }
    Ok(outcomes)
}

fn cargo_outcomes(label: &str, said: &str) -> Vec<Outcome> {
    said.lines()
        .filter_map(|line| {
            let (test, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
            let name = format!("{label}/{}", test.trim_end_matches(" - should panic"));
            match result.split_whitespace().next()? {
                "ok" => Some(Outcome::passed(name, None)),
                "FAILED" => Some(Outcome::failed(name, captured(said, test), None)),
                _ => None,
            }
        })
        .collect()
}

/// What the test printed, from the section of failures.
fn captured(said: &str, test: &str) -> String {
    let head = format!("---- {test} stdout ----");
    said.lines()
        .skip_while(|line| *line != head)
        .skip(1)
        .take_while(|line| !line.starts_with("---- ") && *line != "failures:")
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_test_of_a_crate_counts() {
        let said = "running 3 tests\ntest a::b ... ok\ntest a::c ... FAILED\ntest d - should panic ... ok\n\nfailures:\n\n\
                    ---- a::c stdout ----\nthread panicked\n\nfailures:\n    a::c\n\ntest result: FAILED. 2 passed; 1 failed\n";
        let found = cargo_outcomes("x", said);
        assert_eq!(found.iter().map(|outcome| outcome.name.as_str()).collect::<Vec<_>>(), ["x/a::b", "x/a::c", "x/d"]);
        assert_eq!(found[1].failure.as_deref(), Some("thread panicked\n"));
        assert!(found[0].failure.is_none());
    }

    #[test]
    fn a_filter_is_a_part_of_the_name() {
        let mut selection = Selection { filter: None, servers: vec![], profile: Profile::Dev, skip_build: true, accept: false };
        assert!(selection.wants("client/15/crash::x"));
        selection.filter = Some("crash".into());
        assert!(selection.wants("client/15/crash::x"));
        assert!(!selection.wants("client/15/visibility::x"));
    }

    #[test]
    fn names_of_cases_are_unique() {
        let mut names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CASES.len());
    }
}
