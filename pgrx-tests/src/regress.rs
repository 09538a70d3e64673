//! Runs PostgreSQL's own pg_regress and pg_isolation_regress on the files in `regress/`.
//!
//! The tools run as the server's user on a copy of the inputs, so that the clone need not be writable for it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::{Cluster, SUPERUSER};
use crate::layout::{Layout, open_dir};
use crate::process::{give_to, server_command};
use crate::report::Outcome;
use crate::suites::number;
use crate::tree::{DEBIAN_LIB, Tree};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sql,
    Isolation,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sql => "regress",
            Self::Isolation => "isolation",
        }
    }

    /// The directory in the repository.
    fn inputs(self, layout: &Layout) -> PathBuf {
        match self {
            Self::Sql => layout.repo.join("regress"),
            Self::Isolation => layout.repo.join("regress/isolation"),
        }
    }

    /// The tests of the schedule; none when there is no schedule.
    pub fn scheduled(self, layout: &Layout) -> Vec<String> {
        fs::read_to_string(self.inputs(layout).join("schedule")).map(|text| scheduled(&text)).unwrap_or_default()
    }

    /// Directories with the tests and their expected output.
    fn dirs(self) -> [&'static str; 2] {
        match self {
            Self::Sql => ["sql", "expected"],
            Self::Isolation => ["specs", "expected"],
        }
    }

    fn tool(self) -> &'static str {
        match self {
            Self::Sql => "regress/pg_regress",
            Self::Isolation => "isolation/pg_isolation_regress",
        }
    }
}

pub struct Run<'a> {
    pub layout: &'a Layout,
    pub tree: &'a Tree,
    pub cluster: &'a Cluster,
    pub kind: Kind,
    /// Takes the results of failed tests as the expected ones.
    pub accept: bool,
}

impl Run<'_> {
    /// Runs the tests of the schedule whose name `wanted` holds for; `None` when there is no schedule yet.
    pub fn run(&self, wanted: impl Fn(&str) -> bool) -> Result<Option<Vec<Outcome>>> {
        let inputs = self.kind.inputs(self.layout);
        let Ok(schedule) = fs::read_to_string(inputs.join("schedule")) else { return Ok(None) };
        let all = scheduled(&schedule);
        let chosen: Vec<&String> = all.iter().filter(|name| wanted(name)).collect();
        if chosen.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let place = self.place(&inputs, &all)?;
        let mut command = server_command(&self.tool()?, self.layout.user());
        command
            .arg(format!("--inputdir={}", place.join("input").display()))
            .arg(format!("--outputdir={}", place.join("output").display()))
            .arg(format!("--bindir={}", self.tree.bindir.display()))
            .arg(format!("--host={}", self.cluster.socket_dir().display()))
            .arg(format!("--port={}", self.cluster.port()))
            .args(["--user", SUPERUSER, "--dbname", &format!("awa_{}", self.kind.name())]);
        let limit = Some(number("AWA_CASE_SECONDS", 0)).filter(|seconds| *seconds > 0);
        if self.kind == Kind::Isolation {
            // A step that hangs is cancelled after so long, by default after five minutes.
            command.arg("--load-extension=awa_queue");
            if let Some(seconds) = limit {
                command.env("PGISOLATIONTIMEOUT", (seconds / 3).max(1).to_string());
            }
        }
        if let Some(seconds) = limit.filter(|_| self.kind == Kind::Sql) {
            // pg_regress itself waits for ever.
            command.env("PGOPTIONS", format!("-c statement_timeout={seconds}s"));
        }
        if chosen.len() == all.len() {
            command.arg(format!("--schedule={}", place.join("input/schedule").display()));
        } else {
            // The first test of the schedule makes what the others use.
            let first = all.first().filter(|first| self.kind == Kind::Sql && !chosen.contains(first));
            command.args(first.into_iter().chain(chosen.iter().copied()));
        }
        let out = command
            .current_dir(place.join("output"))
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", self.kind.tool()))?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let diffs = fs::read_to_string(place.join("output/regression.diffs")).unwrap_or_default();
        let mut outcomes = self.outcomes(&said, &diffs);
        let complete = chosen.iter().all(|name| outcomes.iter().any(|outcome| outcome.name.ends_with(&format!("/{name}"))));
        let failed = outcomes.iter().any(|outcome| outcome.failure.is_some());
        if !complete || (!out.status.success() && !failed) {
            let why = format!("{}\n{said}{}", out.status, String::from_utf8_lossy(&out.stderr));
            outcomes.push(Outcome::failed(self.label(self.kind.tool()), why, None));
        }
        if self.accept {
            self.take_results(&place, &outcomes)?;
        }
        Ok(Some(outcomes))
    }

    fn label(&self, test: &str) -> String {
        format!("{}/{}/{test}", self.kind.name(), self.tree.server.name())
    }

    fn outcomes(&self, said: &str, diffs: &str) -> Vec<Outcome> {
        results(said)
            .into_iter()
            .map(|(test, ok, took)| {
                if ok {
                    Outcome::passed(self.label(&test), took)
                } else {
                    let diff = diff_of(diffs, &test).unwrap_or_else(|| "no diff: see the output of the tool".to_owned());
                    Outcome::failed(self.label(&test), diff, took)
                }
            })
            .collect()
    }

    /// The tool of this tree, or else that of Debian's 15, which can drive a newer server as well.
    fn tool(&self) -> Result<PathBuf> {
        let own = self.tree.test_tool(self.kind.tool());
        if own.is_file() {
            return Ok(own);
        }
        let other = Path::new(DEBIAN_LIB).join("lib/pgxs/src/test").join(self.kind.tool());
        if !other.is_file() {
            bail!("there is no {}", other.display());
        }
        Ok(other)
    }

    fn place(&self, inputs: &Path, all: &[String]) -> Result<PathBuf> {
        let place = self.layout.dir("regress")?.join(format!("{}-{}", self.kind.name(), self.tree.server.name()));
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        open_dir(&place)?;
        for dir in ["input", "output"] {
            open_dir(&place.join(dir))?;
        }
        fs::copy(inputs.join("schedule"), place.join("input/schedule"))?;
        for dir in self.kind.dirs() {
            let (from, to) = (inputs.join(dir), place.join("input").join(dir));
            open_dir(&to)?;
            for entry in fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    fs::copy(entry.path(), to.join(entry.file_name()))?;
                }
            }
        }
        // The tool gives up at a test without expected output; an empty one gives the whole output as a diff.
        for name in all {
            let expected = place.join("input/expected").join(format!("{name}.out"));
            if !expected.exists() {
                fs::write(expected, "")?;
            }
        }
        crate::tree::make_readable(&place)?;
        give_to(&place, self.layout.user())?;
        Ok(place)
    }

    fn take_results(&self, place: &Path, outcomes: &[Outcome]) -> Result<()> {
        for outcome in outcomes.iter().filter(|outcome| outcome.failure.is_some()) {
            let Some(test) = outcome.name.rsplit('/').next() else { continue };
            let result = place.join("output/results").join(format!("{test}.out"));
            if result.is_file() {
                let expected = self.kind.inputs(self.layout).join("expected").join(format!("{test}.out"));
                fs::write(&expected, fs::read(&result)?)?;
                println!("accepted the output of {test}: read {} before you commit it", expected.display());
            }
        }
        Ok(())
    }
}

/// The tests of a schedule, each once, in order.
fn scheduled(text: &str) -> Vec<String> {
    let mut seen = BTreeSet::new();
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("test:"))
        .flat_map(str::split_whitespace)
        .filter(|name| seen.insert(name.to_string()))
        .map(str::to_owned)
        .collect()
}

/// Name, success and time of each test, from the output of pg_regress before and since version 16 (which speaks TAP).
fn results(said: &str) -> Vec<(String, bool, Option<Duration>)> {
    said.lines().filter_map(|line| tap_result(line).or_else(|| old_result(line))).collect()
}

fn tap_result(line: &str) -> Option<(String, bool, Option<Duration>)> {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let mut words = rest.split_whitespace();
    words.next()?.parse::<u32>().ok()?;
    if !matches!(words.next()?, "-" | "+") {
        return None;
    }
    Some((words.next()?.to_owned(), ok, milliseconds(line)))
}

fn old_result(line: &str) -> Option<(String, bool, Option<Duration>)> {
    let (name, result) = line.split_once(" ... ")?;
    let name = name.trim().trim_start_matches("test ").trim();
    let ok = result.trim_start().starts_with("ok");
    if !ok && !result.trim_start().starts_with("FAILED") && !result.trim_start().starts_with("failed") {
        return None;
    }
    Some((name.to_owned(), ok, milliseconds(line)))
}

fn milliseconds(line: &str) -> Option<Duration> {
    let number = line.trim_end().strip_suffix("ms")?.trim_end().rsplit(' ').next()?;
    number.parse().ok().map(Duration::from_millis)
}

/// The part of regression.diffs that belongs to one test.
fn diff_of(diffs: &str, test: &str) -> Option<String> {
    let result = format!("/results/{test}.out");
    let mut part = String::new();
    let mut inside = false;
    for line in diffs.lines() {
        if line.starts_with("diff ") {
            inside = line.contains(&result);
        }
        if inside {
            part.push_str(line);
            part.push('\n');
        }
    }
    (!part.is_empty()).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_is_read_in_order() {
        assert_eq!(scheduled("# comment\ntest: install\ntest: b a\n\ntest: a\n"), ["install", "b", "a"]);
    }

    #[test]
    fn the_output_of_15_is_understood() {
        let said = "============== running regression test queries ==============\n\
                    test install                      ... ok           35 ms\n\
                    parallel group (2 tests):  b a\n     a                            ... FAILED        2 ms\n     \
                    b                            ... FAILED (test process exited with exit code 2)       11 ms\n";
        let found = results(said);
        assert_eq!(found[0], ("install".into(), true, Some(Duration::from_millis(35))));
        assert_eq!(found[1], ("a".into(), false, Some(Duration::from_millis(2))));
        assert_eq!((found[2].0.as_str(), found[2].1, found.len()), ("b", false, 3));
    }

    #[test]
    fn the_output_of_16_and_later_is_understood() {
        let said = "# using postmaster on /s, port 1\nok 1         - install                                     35 ms\n\
                    # parallel group (2 tests):  a b\nok 2         + a                                           12 ms\n\
                    not ok 3     + b                                            7 ms\n1..3\n# 1 of 3 tests failed.\n";
        let found = results(said);
        assert_eq!(
            found.iter().map(|(name, ok, _)| (name.as_str(), *ok)).collect::<Vec<_>>(),
            [("install", true), ("a", true), ("b", false)]
        );
        assert_eq!(found[2].2, Some(Duration::from_millis(7)));
    }

    #[test]
    fn each_test_gets_its_own_diff() {
        let diffs = "diff -U3 /i/expected/a.out /o/results/a.out\n-1\n+2\ndiff -U3 /i/expected/b.out /o/results/b.out\n-3\n";
        assert_eq!(diff_of(diffs, "b").unwrap(), "diff -U3 /i/expected/b.out /o/results/b.out\n-3\n");
        assert!(diff_of(diffs, "c").is_none());
    }
}
