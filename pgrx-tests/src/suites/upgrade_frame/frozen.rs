//! What was released: `sql/frozen/RELEASED` has a line for each version, `version sha256-of-script sha256-of-fixture`; beside it are the
//! script as it was, and its fixture, a dump of a database with a job in every state. `awa freeze` adds a version; nothing is ever
//! changed. See docs/releasing.md.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

pub struct Release {
    pub version: String,
    pub script: PathBuf,
    pub fixture: PathBuf,
}

pub fn directory(repo: &Path) -> PathBuf {
    repo.join("sql/frozen")
}

fn release(dir: &Path, version: &str) -> Release {
    Release {
        version: version.to_owned(),
        script: dir.join(format!("awa_queue--{version}.sql")),
        fixture: dir.join(format!("{version}.fixture.sql")),
    }
}

/// In the order of their release; each file is what it was then.
pub fn released(dir: &Path) -> Result<Vec<Release>> {
    let mut releases = Vec::new();
    let list = fs::read_to_string(dir.join("RELEASED")).with_context(|| format!("cannot read the list in {}", dir.display()))?;
    for line in list.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [version, script, fixture] = words[..] else { anyhow::bail!("not a line of RELEASED: {line}") };
        let found = release(dir, version);
        ensure!(digest(&found.script)? == script, "{} is not what was released", found.script.display());
        ensure!(digest(&found.fixture)? == fixture, "{} is not what was made at the release", found.fixture.display());
        releases.push(found);
    }
    Ok(releases)
}

/// Adds a version.
pub fn freeze(dir: &Path, version: &str, script: &Path, fixture: &str) -> Result<()> {
    ensure!(!released(dir)?.iter().any(|other| other.version == version), "{version} was released already");
    let new = release(dir, version);
    fs::copy(script, &new.script).with_context(|| format!("cannot copy {}", script.display()))?;
    fs::write(&new.fixture, fixture)?;
    let list = dir.join("RELEASED");
    let line = format!("{version} {} {}\n", digest(&new.script)?, digest(&new.fixture)?);
    Ok(fs::write(&list, fs::read_to_string(&list)? + &line)?)
}

fn digest(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_released_is_unchanged() {
        released(&directory(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")))).unwrap();
    }

    #[test]
    fn a_frozen_script_that_changes_is_noticed() {
        let dir = std::env::temp_dir().join(format!("awa-frozen-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("RELEASED"), "# none\n").unwrap();
        fs::write(dir.join("script"), "CREATE SCHEMA awa;").unwrap();
        freeze(&dir, "1", &dir.join("script"), "SELECT 1;").unwrap();
        assert_eq!(released(&dir).unwrap().len(), 1);
        assert!(freeze(&dir, "1", &dir.join("script"), "SELECT 1;").is_err());
        fs::write(dir.join("awa_queue--1.sql"), "CREATE SCHEMA other;").unwrap();
        assert!(released(&dir).is_err());
        fs::remove_dir_all(dir).unwrap();
    }
}
