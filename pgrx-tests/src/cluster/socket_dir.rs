//! Where a cluster has its socket: inside its directory, or under the temporary directory when that path is too long.
//!
//! Only the server's user (and root) may enter it, since local connections need no password.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rand::Rng;
use rand::distr::Alphanumeric;

use crate::process::{ServerUser, give_to};

/// A socket's path must fit into `sun_path` with its file name.
const SOCKET_DIR_BYTES_MAX: usize = 85;

pub fn provide(dir: &Path, user: Option<&ServerUser>) -> Result<PathBuf> {
    let near = dir.join("socket");
    let link = dir.join("socket-dir");
    if let Ok(known) = fs::read_to_string(&link) {
        let owner = fs::metadata(dir.join("data")).map(|found| found.uid()).ok();
        let found = fs::symlink_metadata(&known);
        if found.is_ok_and(|found| found.is_dir() && Some(found.uid()) == owner && found.mode() & 0o077 == 0) {
            return Ok(PathBuf::from(known));
        }
    }
    let chosen = if near.as_os_str().len() <= SOCKET_DIR_BYTES_MAX {
        near
    } else {
        let tag: String = rand::rng().sample_iter(Alphanumeric).take(12).map(char::from).collect();
        std::env::temp_dir().join(format!("awa-{tag}"))
    };
    if !chosen.is_dir() {
        DirBuilder::new().mode(0o700).create(&chosen).with_context(|| format!("cannot create {}", chosen.display()))?;
        give_to(&chosen, user)?;
    }
    fs::write(link, chosen.to_string_lossy().as_bytes())?;
    Ok(chosen)
}
