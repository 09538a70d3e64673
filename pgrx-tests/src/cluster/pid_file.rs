//! `postmaster.pid`: what a running server tells about itself.

use std::fs;
use std::path::Path;

use crate::process::is_alive;

/// What a postmaster tells about itself in its data directory.
pub struct PidFile {
    pub pid: i32,
    pub port: Option<u16>,
    pub accepts: bool,
}

impl PidFile {
    pub fn read(data: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(data.join("postmaster.pid")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        Some(Self {
            pid: lines.first()?.parse().ok()?,
            port: lines.get(3).and_then(|port| port.parse().ok()),
            accepts: lines.get(7).is_some_and(|&state| state == "ready" || state == "standby"),
        })
    }

    /// The file may outlive its server, and its number may be another process by now.
    pub fn is_live(&self, data: &Path) -> bool {
        let cwd = fs::read_link(format!("/proc/{}/cwd", self.pid));
        is_alive(self.pid) && cwd.is_ok_and(|cwd| data.canonicalize().is_ok_and(|data| data == cwd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_postmaster_is_ready_only_when_it_says_so() {
        let text = "4711\n/data\n1700000000\n5544\n/sock\n127.0.0.1\n  123  456\nready   \n";
        let found = PidFile::parse(text).unwrap();
        assert_eq!((found.pid, found.port, found.accepts), (4711, Some(5544), true));
        assert!(!PidFile::parse(&text.replace("ready", "starting")).unwrap().accepts);
        assert!(PidFile::parse("4711\n/data\n").is_some_and(|found| !found.accepts));
        assert!(PidFile::parse("").is_none());
    }
}
