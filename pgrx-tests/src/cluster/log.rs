//! What the server of a cluster has logged.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::Result;

use super::Cluster;

impl Cluster {
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    pub fn log_size(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |found| found.len())
    }

    /// What the server logged after the log had this size.
    pub fn log_since(&self, size: u64) -> Result<String> {
        let mut file = File::open(self.log_path())?;
        file.seek(SeekFrom::Start(size))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn log_tail(&self, lines: usize) -> Result<String> {
        Ok(last_lines(&self.log_since(self.log_size().saturating_sub(64 * 1024))?, lines))
    }
}

pub(super) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_short_log_is_the_log() {
        assert_eq!(last_lines("a\nb\nc", 2), "b\nc");
        assert_eq!(last_lines("a", 5), "a");
        assert_eq!(last_lines("", 5), "");
    }
}
