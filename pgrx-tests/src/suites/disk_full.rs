//! A disk that is full: calls are refused and nothing is half done; when it is the disk of the log, the server goes down, as it must. When
//! there is room again everything that was acknowledged is there, and work goes on.
//!
//! The disk is a small tmpfs that holds a physical copy of the cluster. Who may not mount one (mount(8) says no: not root, or a container without
//! the right) skips these cases, and says so.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::every_state::verify_clean;
use super::witnesses::{indexes_are_sound, under_load};
use super::{DATABASE, Stage};
use crate::cluster::Cluster;
use crate::process::{run, wait_until};

const SIZE: u64 = 256 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// A disk of its own at this directory, until it is dropped.
struct Disk {
    at: PathBuf,
}

impl Disk {
    fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={SIZE},mode=0700"), "tmpfs"]).arg(at))?;
        Ok(Self { at: at.to_owned() })
    }

    /// Leaves so many bytes free.
    fn fill(&self, left: u64) -> Result<()> {
        let out = run(Command::new("df").args(["--output=avail", "--block-size=1"]).arg(&self.at))?;
        let free: u64 = String::from_utf8_lossy(&out.stdout).lines().nth(1).context("df says nothing")?.trim().parse()?;
        let filler = File::create(self.filler())?;
        // A sparse file takes no room. Who works meanwhile may have taken the last of it.
        match std::io::copy(&mut std::io::repeat(0).take(free.saturating_sub(left)), &mut &filler) {
            Err(error) if error.kind() != ErrorKind::StorageFull => Err(error)?,
            _ => Ok(()),
        }
    }

    fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.at)) {
            eprintln!("note: {error:#}");
        }
    }
}

/// A copy of the stage's cluster on a small disk; None where that cannot be had.
fn on_small_disk(stage: &Stage<'_>, log_elsewhere: bool) -> Result<Option<(Cluster, Disk)>> {
    let copy = stage.cluster.empty_copy("awa-full")?;
    let disk = match Disk::mount(&copy.data()) {
        Ok(disk) => disk,
        Err(error) => {
            println!("        disk_full: SKIPPED, a small disk cannot be mounted here: {error:#}");
            return Ok(None);
        }
    };
    let log = copy.server_dir("log")?;
    let elsewhere = format!("--waldir={}", log.display());
    let arguments = [elsewhere.as_str()];
    stage.cluster.back_up_into(&copy, if log_elsewhere { &arguments } else { &[] })?;
    copy.own(&log)?;
    Ok(Some((copy, disk)))
}

fn account_for(full: &Cluster, witnesses: &super::witnesses::Witnesses) -> Result<()> {
    let mut client: Client = full.connect(DATABASE)?;
    verify_clean(&mut client)?;
    indexes_are_sound(&mut client)?;
    let account = witnesses.account(&mut client, &witnesses.mark())?;
    ensure!(account.lost == 0, "{} acknowledged calls are lost", account.lost);
    witnesses.finish(&mut client, &account)?;
    verify_clean(&mut client)?;
    println!("        disk_full: {} calls acknowledged, {} refused", account.kept, witnesses.refused());
    Ok(())
}

// If this fails, a full disk takes the server down, or leaves half of a call behind.
pub fn a_full_disk_refuses_and_loses_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let Some((mut full, disk)) = on_small_disk(stage, true)? else { return Ok(()) };
    full.start()?;
    let config = full.config(DATABASE);
    let (witnesses, ()) = under_load(&config, "flow", |witnesses| {
        witnesses.wait_for_more(200)?;
        disk.fill(64 << 10)?;
        ensure!(wait_until(LIMIT, || witnesses.refused() >= 100), "nothing is refused although the disk is full");
        // It is not a crash, and what was begun is not half done.
        verify_clean(&mut full.connect(DATABASE)?)?;
        disk.make_room()?;
        witnesses.wait_for_more(200)?;
        full.crash()
    })?;
    full.start()?;
    account_for(&full, &witnesses)?;
    full.crash()?;
    drop(disk);
    full.remove()
}

// If this fails, a full disk under the log, which is a crash of the server, costs jobs that were acknowledged.
pub fn a_full_disk_under_the_log_loses_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let Some((mut full, disk)) = on_small_disk(stage, false)? else { return Ok(()) };
    full.start()?;
    let config = full.config(DATABASE);
    let mut operator = full.connect(DATABASE)?;
    let (witnesses, ()) = under_load(&config, "flow", |witnesses| {
        witnesses.wait_for_more(200)?;
        disk.fill(1 << 20)?;
        // Each takes another file of the log.
        let down = wait_until(LIMIT, || operator.batch_execute("SELECT pg_switch_wal()").is_err());
        ensure!(down, "the log finds room on a full disk");
        Ok(())
    })?;
    // It may have given up, or be trying to start.
    full.crash()?;
    disk.make_room()?;
    full.start()?;
    account_for(&full, &witnesses)?;
    full.crash()?;
    drop(disk);
    full.remove()
}
