//! Servers under valgrind's memcheck, when `AWA_VALGRIND` is set: each process writes what it finds beside the data.
//!
//! Only wrong accesses count, and only below a function of the library. What was never written cannot be told: each process has a shadow
//! of its own of the memory that all share, and does not learn what another has written there.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const PREFIX: &str = "memcheck.";

pub fn is_on() -> bool {
    std::env::var_os("AWA_VALGRIND").is_some()
}

/// What comes before the server's own arguments.
pub fn arguments(data: &Path) -> Vec<OsString> {
    let mut log = OsString::from("--log-file=");
    log.push(data.join(format!("{PREFIX}%p")));
    let fixed =
        ["--tool=memcheck", "--quiet", "--trace-children=yes", "--error-limit=no", "--undef-value-errors=no", "--num-callers=40"];
    fixed.iter().map(OsString::from).chain([log]).collect()
}

/// What concerns the library; and how many processes were watched.
pub fn findings(data: &Path) -> Result<(Vec<String>, usize)> {
    let mut found = Vec::new();
    let mut processes = 0;
    for entry in fs::read_dir(data).with_context(|| format!("cannot read {}", data.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            processes += 1;
            let text = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
            found.extend(blocks(&text).into_iter().filter(|block| is_ours(block)));
        }
    }
    Ok((found, processes))
}

/// One finding each, without the prefix of its lines.
fn blocks(text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| line.split_once("== ").map_or("", |(_, rest)| rest));
    let mut blocks = vec![String::new()];
    for line in lines {
        match blocks.last_mut() {
            Some(block) if !line.trim().is_empty() => {
                block.push_str(line);
                block.push('\n');
            }
            _ => blocks.push(String::new()),
        }
    }
    blocks.retain(|block| !block.is_empty());
    blocks
}

fn is_ours(block: &str) -> bool {
    let is_rust = |line: &str| line.contains(".rs:") || line.contains("awa_queue.so");
    let is_frame = |line: &&str| line.contains("at 0x") || line.contains("by 0x");
    let head = block.lines().next().unwrap_or_default();
    let is_access =
        ["Invalid", "Source and destination", "Process terminating", "Mismatched"].iter().any(|kind| head.starts_with(kind));
    is_access && block.lines().filter(is_frame).any(is_rust)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "==12== Invalid read of size 8\n==12==    at 0x1: memcpy (vg_replace_strmem.c:1)\n==12==    by 0x2: claim (claim.rs:7)\n==12== \n";
    const SERVERS: &str =
        "==12== Invalid read of size 8\n==12==    at 0x1: XLogInsert (xlog.c:1)\n==12==    by 0x2: main (main.c:7)\n";

    #[test]
    fn a_wrong_access_below_the_library_counts_and_one_of_the_server_does_not() {
        let blocks = blocks(&format!("{OURS}{SERVERS}"));
        assert_eq!(blocks.len(), 2);
        assert!(is_ours(&blocks[0]) && !is_ours(&blocks[1]));
    }
}
