//! Where things are: the repository, cargo's target directories, and the place for server trees and data.
//!
//! Server processes may run as another user than the harness. When that user cannot reach the clone (it lies under a
//! private home, say), trees and data go to a directory of their own under /var/tmp, and a message says so.

use std::fs::{self, DirBuilder};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::process::{ServerUser, server_command};

#[derive(Clone, Debug)]
pub struct Layout {
    pub repo: PathBuf,
    /// Trees, clusters and logs are below this directory; usually `target` of the repository.
    pub work: PathBuf,
    pub server_user: Option<ServerUser>,
}

impl Layout {
    pub fn find() -> Result<Self> {
        let here = std::env::current_dir()?;
        let repo = here
            .ancestors()
            .find(|dir| dir.join("awa_queue.control").is_file() && dir.join("pgrx-tests").is_dir())
            .map(Path::to_path_buf)
            .context("run this inside the repository of awa_queue (no awa_queue.control above the current directory)")?;
        let server_user = ServerUser::find()?;
        let target = repo.join("target");
        open_dir(&target)?;
        let work = if is_reachable(&target, server_user.as_ref()) {
            target
        } else {
            let other = outside(&repo)?;
            let user = server_user.as_ref().map_or("the server", |user| user.name.as_str());
            eprintln!("note: user {user} cannot reach {}; servers and their data go to {}", repo.display(), other.display());
            other
        };
        Ok(Self { repo, work, server_user })
    }

    pub fn user(&self) -> Option<&ServerUser> {
        self.server_user.as_ref()
    }

    /// CARGO_TARGET_DIR of one build; a library for one major must never overwrite that of another.
    pub fn cargo_target(&self, name: &str) -> PathBuf {
        self.repo.join("target").join(name)
    }

    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.work.join(name);
        open_dir(&dir)?;
        Ok(dir)
    }
}

/// Creates a directory that others may read whatever the umask is.
pub fn open_dir(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::create_dir(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn is_reachable(dir: &Path, user: Option<&ServerUser>) -> bool {
    if user.is_none() {
        return true;
    }
    server_command(Path::new("test"), user)
        .arg("-r")
        .arg(dir.join("."))
        .arg("-a")
        .arg("-x")
        .arg(dir.join("."))
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A directory in /var/tmp for this clone. Its name can be guessed, so one that belongs to somebody else is refused.
fn outside(repo: &Path) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    repo.hash(&mut hasher);
    let dir = PathBuf::from(format!("/var/tmp/awa_queue-{:08x}", hasher.finish() as u32));
    match DirBuilder::new().mode(0o755).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error)?,
        _ => {}
    }
    let found = fs::symlink_metadata(&dir)?;
    let own = fs::metadata("/proc/self")?.uid();
    if !found.is_dir() || found.uid() != own || found.mode() & 0o022 != 0 {
        bail!("{} exists and is not a directory of ours alone: remove it", dir.display());
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_outside_is_the_same_each_time() {
        let repo = Path::new("/nowhere/clone-for-this-test");
        let dir = outside(repo).unwrap();
        assert_eq!(dir, outside(repo).unwrap());
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn a_link_planted_for_us_is_refused() {
        let repo = Path::new("/nowhere/other-clone-for-this-test");
        let dir = outside(repo).unwrap();
        fs::remove_dir(&dir).unwrap();
        std::os::unix::fs::symlink("/tmp", &dir).unwrap();
        assert!(outside(repo).is_err());
        fs::remove_file(dir).unwrap();
    }
}
