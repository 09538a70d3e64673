//! The source with every mutant in it: a copy of the tree, and the patch on top. What users build knows no mutants.
//!
//! To add one: `awa mutants --edit` makes the copy in `target/mutants/tree`, in which `mutant!("name")` may be used; `awa mutants --save`
//! writes the difference back to the patch. When a change of the source moves what the patch stands on, the test
//! `the_patch_fits_the_source` says so: apply it by hand in the copy (`git apply --reject`), and save.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const PATCH: &str = "pgrx-tests/mutants/server.patch";
/// All that the patch may change.
const CHANGED: [&str; 2] = ["Cargo.toml", "src"];

pub fn copy_of(repo: &Path) -> PathBuf {
    repo.join("target/mutants/tree")
}

/// Makes the copy, or brings it up to date: files that are the same keep their times, so that cargo builds little.
pub fn provide(repo: &Path) -> Result<PathBuf> {
    let (tree, fresh) = (copy_of(repo), repo.join("target/mutants/fresh"));
    remove(&fresh)?;
    copy(repo, &fresh)?;
    apply(repo, &fresh)?;
    update(&fresh, &tree)?;
    remove(&fresh)?;
    Ok(tree)
}

/// Only what the patch changes, with the patch.
#[cfg(test)]
pub fn changed_into(repo: &Path, into: &Path) -> Result<()> {
    remove(into)?;
    for part in CHANGED {
        copy(&repo.join(part), &into.join(part))?;
    }
    apply(repo, into)
}

/// Writes what the copy differs in from the source.
pub fn save(repo: &Path) -> Result<()> {
    let sides = repo.join("target/mutants/sides");
    remove(&sides)?;
    for part in CHANGED {
        copy(&repo.join(part), &sides.join("a").join(part))?;
        copy(&copy_of(repo).join(part), &sides.join("b").join(part))?;
    }
    let out =
        git(&sides).args(["diff", "--no-index", "--no-prefix", "--no-color", "a", "b"]).output().context("cannot run git")?;
    // 1: there are differences.
    ensure!(out.status.code() == Some(1), "git diff: {}", String::from_utf8_lossy(&out.stderr));
    remove(&sides)?;
    fs::write(repo.join(PATCH), out.stdout).context("cannot write the patch")
}

fn apply(repo: &Path, tree: &Path) -> Result<()> {
    let out = git(tree).args(["apply", "--whitespace=nowarn"]).arg(repo.join(PATCH)).output().context("cannot run git")?;
    ensure!(out.status.success(), "{PATCH} does not fit the source:\n{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// In a directory that is no repository, wherever it lies.
fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(dir).env_remove("GIT_DIR").env("GIT_CEILING_DIRECTORIES", dir.parent().unwrap_or(dir));
    command
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() { fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display())) } else { Ok(()) }
}

fn is_made(name: &OsStr) -> bool {
    name == "target" || name == ".git"
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            if !is_made(&entry.file_name()) {
                copy(&entry.path(), &to.join(entry.file_name()))?;
            }
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn update(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !from.join(entry.file_name()).exists() {
            if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
        }
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (new, old) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            update(&new, &old)?;
        } else if fs::read(&old).ok() != Some(fs::read(&new)?) {
            fs::copy(&new, &old)?;
        }
    }
    Ok(())
}
