//! The list of mutants, `docs/races.md` and the code say the same: every rule that can be broken has a test, every test that is named is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::{ALSO, MUTANTS, tree};
use crate::suites::CASES;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn read(path: &str) -> String {
    fs::read_to_string(repo().join(path)).unwrap()
}

/// The source with the mutants in it.
fn broken() -> &'static Path {
    static MADE: LazyLock<PathBuf> = LazyLock::new(|| {
        let into = repo().join("target/mutants/checked");
        tree::changed_into(&repo(), &into).unwrap();
        into
    });
    &MADE
}

fn each_source(dir: &Path, body: &mut dyn FnMut(&Path, &str)) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            each_source(&path, body);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            body(&path, &fs::read_to_string(&path).unwrap());
        }
    }
}

/// `mutant!("name")` in a text.
fn broken_in(text: &str) -> impl Iterator<Item = &str> {
    text.split("mutant!(\"").skip(1).filter_map(|rest| rest.split('"').next())
}

/// The names between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Tests of pg_regress or pg_isolation_regress that have an input and a place in the schedule.
fn scheduled(dir: &str, inputs: &str, extension: &str) -> BTreeSet<String> {
    let schedule = read(&format!("{dir}/schedule"));
    let listed: BTreeSet<&str> =
        schedule.lines().filter_map(|line| line.strip_prefix("test:")).flat_map(str::split_whitespace).collect();
    let there = |name: &&str| repo().join(dir).join(inputs).join(format!("{name}.{extension}")).is_file();
    listed.into_iter().filter(there).map(str::to_owned).collect()
}

fn specs() -> BTreeSet<String> {
    scheduled("regress/isolation", "specs", "spec")
}

fn scripts() -> BTreeSet<String> {
    scheduled("regress", "sql", "sql")
}

#[test]
fn the_patch_fits_the_source() {
    assert!(broken().join("src/mutants.rs").is_file());
    assert!(!repo().join("src/mutants.rs").exists(), "mutants are in the patch only");
}

#[test]
fn every_rule_that_can_be_broken_has_a_test() {
    let mut places: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut protocol = read("src/protocol/tests/model/mutants.rs");
    each_source(&broken().join("src"), &mut |path, text| {
        if path.ends_with("mutants.rs") || path.components().any(|part| part.as_os_str() == "tests") {
            return;
        }
        for name in broken_in(text) {
            places.entry(name.to_owned()).or_default().push(path.to_owned());
        }
        // Unit tests of the crate name their mutants in its own sources.
        if path.starts_with(broken().join("src/protocol"))
            && let Some((_, tests)) = text.split_once("#[cfg(test)]")
        {
            protocol.push_str(tests);
        }
    });
    let listed: BTreeSet<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
    assert_eq!(listed.len(), MUTANTS.len(), "a name is listed twice");
    for (name, files) in &places {
        let only_protocol = files.iter().all(|file| file.starts_with(broken().join("src/protocol")));
        let modelled = only_protocol && protocol.contains(&format!("\"{name}\""));
        assert!(listed.contains(name.as_str()) || modelled, "{name} in {files:?} has no test");
    }
    for name in listed {
        assert!(places.contains_key(name), "{name} is listed, and nowhere in the code");
    }
}

#[test]
fn every_place_of_a_mutant_is_a_file_that_breaks_it() {
    for mutant in MUTANTS {
        let file = mutant.place.split([':', ',']).next().unwrap();
        assert!(
            broken_in(&fs::read_to_string(broken().join(file)).unwrap()).any(|name| name == mutant.name),
            "{file} does not break {}",
            mutant.name
        );
    }
}

#[test]
fn every_test_of_a_mutant_exists() {
    let runs = || MUTANTS.iter().flat_map(|mutant| mutant.tests().map(|test| (mutant.name, test)));
    assert_eq!(runs().count(), MUTANTS.len() + ALSO.len(), "a rule of ALSO is not in MUTANTS");
    for (name, test) in runs() {
        let there = match test.split_once('/') {
            Some(("client", test)) => CASES.iter().any(|case| case.name == test),
            Some(("isolation", test)) => specs().contains(test),
            Some(("regress", test)) => scripts().contains(test),
            _ => false,
        };
        assert!(there, "{name} should be caught by {test}, which is not there");
    }
}

/// What a line of docs/races.md may name as its test.
fn is_a_test(name: &str) -> bool {
    let of_case = |case: &str, name: &str| {
        let mut rest = Some(case);
        for part in name.split('*') {
            rest = rest.and_then(|rest| rest.split_once(part)).map(|(_, after)| after);
        }
        case == name || case.split("::").next() == Some(name) || (name.contains('*') && rest.is_some())
    };
    let in_protocol = || {
        let mut found = false;
        each_source(&repo().join("src/protocol"), &mut |_, text| {
            found |= text.contains(&format!("\"{name}\"")) || text.contains(&format!("fn {name}("));
        });
        found
    };
    let module = || repo().join("src/protocol/src").join(format!("{name}.rs")).is_file();
    CASES.iter().any(|case| of_case(case.name, name))
        || specs().contains(name)
        || scripts().contains(name)
        || in_protocol()
        || module()
}

#[test]
fn every_test_that_the_races_name_exists() {
    let text = read("docs/races.md");
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && line[2..].starts_with(|first: char| first.is_ascii_digit()))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let numbers: Vec<usize> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
    assert_eq!(numbers, (1..=rows.len()).collect::<Vec<_>>(), "the numbers of the races");
    assert!(rows.len() >= 33, "{} races", rows.len());
    for row in rows {
        let tests = row.last().unwrap();
        assert_eq!(row.len(), 5, "race {}", row[0]);
        assert!(quoted(tests).count() > 0, "race {} names no test: {tests}", row[0]);
        for name in quoted(tests) {
            assert!(is_a_test(name), "race {} names {name}, which is not there", row[0]);
        }
    }
    let (_, earlier) = text.split_once("## Failures of an earlier queue").unwrap();
    let rows: Vec<&str> = earlier.lines().filter(|line| line.starts_with("| E") || line.starts_with("| also")).collect();
    assert_eq!(rows.len(), 18);
    for row in rows {
        let tests = row.trim_matches('|').split(" | ").last().unwrap();
        assert!(quoted(tests).count() > 0 && quoted(tests).all(is_a_test), "no such test: {row}");
    }
}
