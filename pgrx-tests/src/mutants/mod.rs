//! `awa mutants`: each rule of the server code is broken once, and the test that is named for it must fail.
//!
//! The library is built once, from a copy of the source with `pgrx-tests/mutants/server.patch` (`tree`); which rule is broken, the server
//! learns from `AWA_MUTANT` when it starts. Each mutant is a run of `awa test` of its own, with nothing left of the one before. First all the named tests run with no rule broken.

mod list;
#[cfg(test)]
mod sources;
pub mod tree;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use self::list::{ALSO, MUTANTS};
use crate::build::{Profile, build};
use crate::layout::Layout;
use crate::tree::{Server, Tree};

/// A rule that can be broken, and the test that must notice.
pub struct Mutant {
    pub name: &'static str,
    /// File and function.
    pub place: &'static str,
    /// What the broken code does.
    pub breaks: &'static str,
    /// `suite/test`, as `awa test` shows it, without the server.
    pub test: &'static str,
}

impl Mutant {
    /// All tests that must notice.
    pub fn tests(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.test).chain(ALSO.iter().filter(|(name, _)| *name == self.name).map(|(_, test)| *test))
    }
}

/// The name of a test on a server, e.g. `client/15/races::..`.
fn on(server: Server, test: &str) -> String {
    let (suite, test) = test.split_once('/').unwrap_or(("client", test));
    format!("{suite}/{}/{test}", server.name())
}

/// A broken rule may make a test wait for ever: seconds for a case, or a step of a spec.
const CASE_SECONDS: &str = "60";

/// True if no mutant survived.
pub fn run(layout: &Layout, server: Server, filter: Option<&str>, skip_build: bool) -> Result<bool> {
    let wanted = |(mutant, test): &(&Mutant, &str)| {
        let contains = |filter: &str| [mutant.name, mutant.place, *test].iter().any(|text| text.contains(filter));
        filter.is_none_or(|filter| filter.split('|').any(contains))
    };
    let all = MUTANTS.iter().flat_map(|mutant| mutant.tests().map(move |test| (mutant, test)));
    let chosen: Vec<(&Mutant, &str)> = all.filter(wanted).collect();
    ensure!(!chosen.is_empty(), "no mutant has such a name");
    build(layout, &Tree::provide(layout, server)?, Profile::Mutants, skip_build)?;
    // Not one by one: most of them share their clusters.
    let tests: BTreeSet<String> = chosen.iter().map(|(_, test)| on(server, test)).collect();
    let filter: Vec<&str> = tests.iter().map(String::as_str).collect();
    let sound = test(server, &filter.join("|"), "")?;
    for test in &tests {
        if let Some(why) = sound.of(test)? {
            bail!("{test} fails with no rule broken: {why}");
        }
    }
    println!("{} tests pass with no rule broken, {} s\n", tests.len(), sound.took.as_secs());
    let mut survived = Vec::new();
    for (mutant, name) in &chosen {
        let full = on(server, name);
        let run = test(server, &full, mutant.name)?;
        let why = run.of(&full)?;
        let verdict = if why.is_some() { "caught  " } else { "SURVIVED" };
        println!("{verdict}  {:<38} {name:<90} {:>3} s  {}", mutant.name, run.took.as_secs(), why.as_deref().unwrap_or_default());
        if why.is_none() {
            survived.push((mutant, name));
        }
    }
    println!();
    for (mutant, name) in &survived {
        println!("survived: {} in {}: {}; {name} should notice", mutant.name, mutant.place, mutant.breaks);
    }
    println!("{} runs with a broken rule, {} caught, {} survived", chosen.len(), chosen.len() - survived.len(), survived.len());
    Ok(survived.is_empty())
}

struct Ran {
    said: String,
    took: Duration,
}

impl Ran {
    /// Why the test failed; `None`: it passed. A test that did not run is an error.
    fn of(&self, test: &str) -> Result<Option<String>> {
        let result = |line: &str| line.split_whitespace().nth(1) == Some(test);
        let mut lines = self.said.lines().skip_while(|line| !result(line));
        match lines.next() {
            Some(line) if line.starts_with("FAILED") => Ok(Some(reason(lines.take_while(|line| line.starts_with("        "))))),
            Some(line) if line.starts_with("ok ") => Ok(None),
            _ => bail!("{test} did not run:\n{}", self.said),
        }
    }
}

/// Of a diff, the first line that differs; else the first line.
fn reason<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let lines: Vec<&str> = lines.map(str::trim).collect();
    let differs = |line: &&&str| {
        (line.starts_with('+') || line.starts_with('-')) && !line.starts_with("+++") && !line.starts_with("---") && line.len() > 1
    };
    let shown =
        if lines.first().is_some_and(|line| line.starts_with("diff ")) { lines.iter().find(differs) } else { lines.first() };
    shown.map_or_else(String::new, |line| line.chars().take(110).collect())
}

/// Runs `awa test` with one rule broken; none if the name is empty.
fn test(server: Server, filter: &str, mutant: &str) -> Result<Ran> {
    let begun = Instant::now();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["test", "--no-build", "--profile", Profile::Mutants.name(), "--pg", server.name(), filter])
        .env_remove("AWA_MUTANT")
        .stdin(Stdio::null());
    if !mutant.is_empty() {
        command.env("AWA_MUTANT", mutant).env("AWA_CASE_SECONDS", CASE_SECONDS);
    }
    let out = command.output().context("cannot run the tests")?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Ok(Ran { said, took: begun.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_said_is_understood() {
        let said = "ok      client/15/a::b  5 ms\nFAILED  isolation/15/c  7 ms\n        diff -U3 x y\n        --- x\n        +++ y\n\
                    \x20        same\n        +other\n\nfailed:\n  isolation/15/c\n";
        let ran = Ran { said: said.to_owned(), took: Duration::ZERO };
        assert_eq!(ran.of("client/15/a::b").unwrap(), None);
        assert_eq!(ran.of("isolation/15/c").unwrap(), Some("+other".to_owned()));
        assert!(ran.of("isolation/15/d").is_err());
    }
}
