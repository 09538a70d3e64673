//! PostgreSQL's own programs, run against a cluster: dump, restore, base backup.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Cluster, SUPERUSER, Shutdown, open_dir, run, server_command, socket_dir};
use crate::process::give_to;

impl Cluster {
    /// A program of this server's installation with the arguments that connect it here; it runs as the caller.
    pub fn program(&self, name: &str) -> Command {
        self.program_of(self, name)
    }

    /// A program of the other's installation, connected to this server.
    pub fn program_of(&self, other: &Self, name: &str) -> Command {
        let mut command = server_command(&other.bindir.join(name), None);
        command.arg("--host").arg(&self.socket_dir).arg("--port").arg(self.port.to_string()).args([
            "--username",
            SUPERUSER,
            "--no-password",
        ]);
        command
    }

    /// A hot standby that follows this cluster, running. One of the same name is stopped and removed first.
    pub fn standby(&self, name: &str) -> Result<Self> {
        let mut standby = self.base_backup(name, &["--write-recovery-conf"])?;
        standby.start()?;
        Ok(standby)
    }

    /// A physical copy of this running cluster, not started, with the log that it needs. One of the same name is stopped and removed first.
    pub fn base_backup(&self, name: &str, arguments: &[&str]) -> Result<Self> {
        let copy = self.empty_copy(name)?;
        self.back_up_into(&copy, arguments)?;
        Ok(copy)
    }

    /// A place for a copy of this cluster, without its data.
    pub fn empty_copy(&self, name: &str) -> Result<Self> {
        let dir = self.dir.parent().context("a cluster is in a directory")?.join(name);
        if dir.exists() {
            Self::stop_in(&dir)?;
            // A run that was broken off may have left a disk mounted there.
            if run(Command::new("mountpoint").arg("--quiet").arg(dir.join("data"))).is_ok() {
                run(Command::new("umount").arg(dir.join("data")))?;
            }
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        open_dir(&dir)?;
        Ok(Self {
            socket_dir: socket_dir::provide(&dir, self.user.as_ref())?,
            bindir: self.bindir.clone(),
            user: self.user.clone(),
            port: 0,
            postmaster: None,
            dir,
        })
    }

    pub fn back_up_into(&self, copy: &Self, arguments: &[&str]) -> Result<()> {
        run(self
            .program("pg_basebackup")
            .arg("--pgdata")
            .arg(copy.data())
            .args(["--checkpoint=fast", "--no-sync"])
            .args(arguments))?;
        self.own(&copy.data())
    }

    /// Gives what the caller has made to the server's user.
    pub fn own(&self, path: &Path) -> Result<()> {
        give_to(path, self.user.as_ref())
    }

    /// Makes this cluster, whose server was never started, the successor of `old`, whose server has stopped. What the servers said
    /// meanwhile.
    pub fn upgrade_from(&self, old: &Self) -> Result<String> {
        let dir = self.dir.join("upgrade");
        open_dir(&dir)?;
        give_to(&dir, self.user.as_ref())?;
        let mut command = server_command(&self.bindir.join("pg_upgrade"), self.user.as_ref());
        command.current_dir(&dir).args(["--username", SUPERUSER, "--retain", "--no-sync"]);
        command.arg("--old-bindir").arg(&old.bindir).arg("--new-bindir").arg(&self.bindir);
        command.arg("--old-datadir").arg(old.data()).arg("--new-datadir").arg(self.data());
        run(command.arg("--socketdir").arg(&self.socket_dir))?;
        let mut said = String::new();
        for file in files_below(&self.data().join("pg_upgrade_output.d"))? {
            if file.extension().is_some_and(|extension| extension == "log") {
                said.push_str(&String::from_utf8_lossy(&std::fs::read(&file)?));
            }
        }
        Ok(said)
    }

    /// The next start recovers from an archive.
    pub fn signal_recovery(&self) -> Result<()> {
        let file = self.data().join("recovery.signal");
        std::fs::write(&file, "")?;
        give_to(&file, self.user.as_ref())
    }

    /// A directory beside the data that the server may write into; what was there before is gone.
    pub fn server_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        open_dir(&dir)?;
        give_to(&dir, self.user.as_ref())?;
        Ok(dir)
    }

    /// Ends this cluster and removes its files.
    pub fn remove(mut self) -> Result<()> {
        self.stop(Shutdown::Immediate)?;
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    Ok(files)
}
