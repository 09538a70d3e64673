//! The files that the demo's jobs read, and what a direct computation says about them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::layout::Layout;
use crate::process::run;
use crate::tree::Tree;

pub const MISSING: usize = 20;
const FILES_MIN: usize = 1000;

pub struct Inputs {
    pub files: Vec<PathBuf>,
    /// Paths that do not exist: their jobs fail.
    pub missing: Vec<PathBuf>,
    server_files: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    pub bytes: i64,
    pub lines: i64,
    pub sha256: String,
}

pub fn digest(path: &Path) -> std::io::Result<Digest> {
    let content = fs::read(path)?;
    let lines = content.iter().filter(|&&byte| byte == b'\n').count();
    let sha256 = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Digest { bytes: content.len() as i64, lines: lines as i64, sha256 })
}

pub fn collect(layout: &Layout, tree: &Tree) -> Result<Inputs> {
    let mut files = Vec::new();
    for option in ["--sharedir", "--pkglibdir", "--includedir-server"] {
        let out = run(std::process::Command::new(&tree.build_pg_config).arg(option))?;
        let dir = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
        walk(&dir, &mut files).with_context(|| format!("cannot list {}", dir.display()))?;
    }
    let server_files = files.len();
    walk(&layout.repo, &mut files)?;
    if files.len() < FILES_MIN {
        bail!("only {} input files", files.len());
    }
    let missing = (1..=MISSING).map(|number| layout.repo.join(format!("missing-input-{number:02}"))).collect();
    Ok(Inputs { files, missing, server_files })
}

impl Inputs {
    /// All paths, the missing ones spread among the others.
    pub fn all(&self) -> Vec<PathBuf> {
        let stride = self.files.len() / self.missing.len().max(1);
        let mut missing = self.missing.iter();
        let mut all = Vec::with_capacity(self.files.len() + self.missing.len());
        for part in self.files.chunks(stride.max(1)) {
            all.extend_from_slice(part);
            all.extend(missing.next().cloned());
        }
        all.extend(missing.cloned());
        all
    }

    pub fn describe(&self) -> String {
        format!(
            "{} files of the installed PostgreSQL (share, library and header directories), {} of this repository, {} paths that do not exist",
            self.server_files,
            self.files.len() - self.server_files,
            self.missing.len()
        )
    }
}

/// Regular, readable files with a name that is text; no build output, nothing hidden.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if name != "target" && name != ".git" {
                walk(&path, files)?;
            }
        } else if kind.is_file() && path.to_str().is_some() && fs::File::open(&path).is_ok() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_enqueued_once() {
        for (files, missing) in [(100, 20), (3, 20), (41, 20), (0, 2)] {
            let name =
                |kind: &str, count: usize| -> Vec<PathBuf> { (0..count).map(|n| PathBuf::from(format!("{kind}{n}"))).collect() };
            let inputs = Inputs { files: name("f", files), missing: name("m", missing), server_files: 0 };
            let mut all = inputs.all();
            assert_eq!(all.len(), files + missing);
            all.sort();
            all.dedup();
            assert_eq!(all.len(), files + missing);
        }
    }

    #[test]
    fn a_digest_is_that_of_the_well_known_tools() {
        let path = std::env::temp_dir().join(format!("awa-digest-{}", std::process::id()));
        fs::write(&path, "abc").unwrap();
        let found = digest(&path).unwrap();
        assert_eq!((found.bytes, found.lines), (3, 0));
        assert_eq!(found.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        fs::write(&path, "a\nb\n").unwrap();
        assert_eq!(digest(&path).unwrap().lines, 2);
        fs::remove_file(&path).unwrap();
        assert!(digest(&path).is_err());
    }
}
