//! PostgreSQL 15 with assertions, built from the source package that belongs to the installed one.
//!
//! apt verifies the source; it gets a state directory of its own, so that the system's package lists stay as they are.
//! The plain upstream archive is used: Debian's patches would move directories. Its parsers are generated already, so
//! no bison, flex, readline, ICU or zlib is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::layout::Layout;
use crate::process::run;
use crate::tree::{make_readable, replace_unless_current};

const CONTRIB: &[&str] = &[
    "amcheck",
    "pageinspect",
    "pg_buffercache",
    "pg_freespacemap",
    "pg_stat_statements",
    "pg_visibility",
    "pg_walinspect",
    "pgstattuple",
    "pgrowlocks",
];

pub fn provide(layout: &Layout, prefix: &Path) -> Result<()> {
    replace_unless_current(prefix, "cassert 2\n", |fresh| {
        let archive = match std::env::var_os("AWA_PG15_SOURCE") {
            Some(path) => PathBuf::from(path),
            None => download(layout).context("no source of PostgreSQL 15: name an archive in AWA_PG15_SOURCE")?,
        };
        compile(layout, &archive, prefix, fresh)
    })
}

fn compile(layout: &Layout, archive: &Path, prefix: &Path, fresh: &Path) -> Result<()> {
    let source = layout.dir("cassert-source")?;
    eprintln!("building PostgreSQL 15 with assertions (some minutes) from {}", archive.display());
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&source).arg("--strip-components=1"))?;
    // Configured for the final place and installed through a staging directory, so that a failure leaves the old tree.
    run(Command::new("./configure")
        .current_dir(&source)
        .arg(format!("--prefix={}", prefix.display()))
        .args(["--enable-cassert", "--enable-debug", "--without-icu", "--without-readline", "--without-zlib"])
        .arg("CFLAGS=-O1 -g -fno-omit-frame-pointer"))?;
    let jobs = format!("-j{}", std::thread::available_parallelism().map_or(1, usize::from));
    let staged = prefix.with_extension("staged");
    run(Command::new("make").current_dir(&source).args(["-s", &jobs]))?;
    let mut dirs = vec![source.clone()];
    for name in CONTRIB {
        let dir = source.join("contrib").join(name);
        run(Command::new("make").current_dir(&dir).args(["-s", &jobs]))?;
        dirs.push(dir);
    }
    for dir in dirs {
        run(Command::new("make").current_dir(&dir).args(["-s", "install"]).arg(format!("DESTDIR={}", staged.display())))?;
    }
    let relative = prefix.strip_prefix("/").context("the prefix is not absolute")?;
    for entry in fs::read_dir(staged.join(relative))? {
        let entry = entry?;
        fs::rename(entry.path(), fresh.join(entry.file_name()))?;
    }
    fs::remove_dir_all(&staged)?;
    make_readable(fresh)
}

/// The newest upstream archive of postgresql-15 that the configured package sources have.
fn download(layout: &Layout) -> Result<PathBuf> {
    let state = layout.dir("cassert-apt")?;
    for dir in ["sources", "lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(dir))?;
    }
    fs::write(state.join("sources/source.sources"), source_entries()?)?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command
            .current_dir(&state)
            .args(["-q", "-o", "Dir::Etc::SourceList=/dev/null", "-o", "APT::Sandbox::User=root"])
            .args(["-o".into(), format!("Dir::Etc::SourceParts={}", state.join("sources").display())])
            .args(["-o".into(), format!("Dir::State::Lists={}", state.join("lists").display())])
            .args(["-o".into(), format!("Dir::Cache={}", state.join("cache").display())]);
        command
    };
    run(apt("apt-get").arg("update"))?;
    let known = run(apt("apt-cache").args(["showsrc", "--only-source", "postgresql-15"]))?;
    let mut errors = Vec::new();
    // A mirror may list a version whose archive it does not have: any minor version will do.
    for version in versions(&String::from_utf8_lossy(&known.stdout)) {
        match run(apt("apt-get").args(["source", "--download-only", &format!("postgresql-15={version}")])) {
            Ok(_) => return archive_in(&state),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    bail!("no version of postgresql-15 could be downloaded\n{}", errors.join("\n"))
}

fn archive_in(state: &Path) -> Result<PathBuf> {
    fs::read_dir(state)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".orig.tar.")))
        .filter(|path| !path.to_string_lossy().ends_with(".asc"))
        .max()
        .context("apt-get downloaded no source archive")
}

/// Newest first, by their numbers.
fn versions(known: &str) -> Vec<String> {
    let mut found: Vec<&str> = known.lines().filter_map(|line| line.strip_prefix("Version: ")).collect();
    let minor = |version: &str| -> Option<u32> {
        let (_, rest) = version.split_once('.')?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    found.sort_by_key(|version| std::cmp::Reverse(minor(version)));
    found.dedup();
    found.into_iter().map(str::to_owned).collect()
}

/// The system's binary package sources, as source package sources.
fn source_entries() -> Result<String> {
    let mut text = String::new();
    let dir = Path::new("/etc/apt/sources.list.d");
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|ext| ext == "sources") {
            for line in fs::read_to_string(entry.path())?.lines() {
                text.push_str(if line.starts_with("Types:") { "Types: deb-src" } else { line });
                text.push('\n');
            }
            text.push('\n');
        }
    }
    if text.is_empty() {
        bail!("no package sources in the deb822 format in {}", dir.display());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_comes_first() {
        let known = "Package: postgresql-15\nVersion: 15.9-1\n\nVersion: 15.18-0+deb12u1\nVersion: 15.20-0+deb12u1\n";
        assert_eq!(versions(known), ["15.20-0+deb12u1", "15.18-0+deb12u1", "15.9-1"]);
    }

    #[test]
    fn source_entries_name_source_packages_only() {
        if let Ok(text) = source_entries() {
            assert!(text.lines().filter(|line| line.starts_with("Types:")).all(|line| line == "Types: deb-src"));
        }
    }
}
