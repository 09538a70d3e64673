//! The map from the models to the source is true: the functions are there, and every verb with locks is in the model.
// Helpers of tests, too.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod pages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use awa_spec::actions::MAP;
use awa_spec::locks::{FIRST_USES, VERBS};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn has_function(file: &str, name: &str) -> bool {
    let text = std::fs::read_to_string(repository().join(file)).unwrap_or_default();
    let starts = [format!("fn {name}("), format!("fn {name}<")];
    text.lines().any(|line| !line.trim_start().starts_with("//") && starts.iter().any(|start| line.contains(start.as_str())))
}

#[test]
fn each_action_names_functions_that_exist() {
    assert!(!has_function("src/ops/enqueue.rs", "no_such_function"));
    let all = MAP.iter().flat_map(|(action, functions)| functions.iter().map(move |(file, name)| (action, file, name)));
    let gone: Vec<String> = all
        .filter(|(_, file, name)| !has_function(file, name))
        .map(|(action, file, name)| format!("{action:?}: {file} has no function {name}"))
        .collect();
    assert!(gone.is_empty(), "{}", gone.join("\n"));
    let lines = MAP.iter().map(|(action, functions)| {
        let places: Vec<String> = functions.iter().map(|(file, name)| format!("`{name}` in `{file}`")).collect();
        format!("| {action:?} | {} |", places.join(", "))
    });
    pages::check("actions.md", "actions", &lines.collect::<Vec<_>>());
}

/// A row of the table of heavyweight locks in `docs/locking.md` is a verb of the model, and the other way round.
#[test]
fn each_verb_with_locks_is_in_the_model() {
    let page = std::fs::read_to_string(repository().join("docs/locking.md")).expect("the page is there");
    let table = page.lines().skip_while(|line| !line.starts_with("| verb |")).skip(2).take_while(|line| line.starts_with('|'));
    let in_page: BTreeSet<String> = table
        .filter_map(|line| line.split('|').nth(1))
        .map(|verb| verb.trim().to_owned())
        .filter(|verb| verb != NO_LOCKS)
        .collect();
    let in_model: BTreeSet<String> =
        VERBS.iter().chain(FIRST_USES).map(|verb| verb.in_docs.to_owned()).filter(|name| !name.is_empty()).collect();
    assert_eq!(in_page, in_model);
}

const NO_LOCKS: &str = "heartbeat, extend, queue_counts, wait";

/// The dead-tuple contract of the source: nothing that could update or delete a row of a segment is called or said.
#[test]
fn the_source_only_appends() {
    let mut said = Vec::new();
    for file in files(&repository().join("src")) {
        let text = std::fs::read_to_string(&file).expect("a source file");
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let calls = ["heap_update", "heap_delete", "simple_heap_", "CatalogTupleUpdate", "CatalogTupleDelete"];
            let rewrites = |word: &str| line.contains(word) && line.contains("awa_segments");
            if calls.iter().any(|call| line.contains(call)) || ["UPDATE", "DELETE", "TRUNCATE"].into_iter().any(rewrites) {
                said.push(format!("{}:{}: {}", file.display(), n + 1, line.trim()));
            }
        }
    }
    assert!(said.is_empty(), "{}", said.join("\n"));
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
    found
}
