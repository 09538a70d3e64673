//! PostgreSQL's own programs, run against a cluster: dump, restore, base backup.

use std::process::Command;

use anyhow::{Context, Result};

use super::{Cluster, SUPERUSER, Shutdown, open_dir, run, server_command, socket_dir};
use crate::process::give_to;

impl Cluster {
    /// A program of this server's installation with the arguments that connect it here; it runs as the caller.
    pub fn program(&self, name: &str) -> Command {
        let mut command = server_command(&self.bindir.join(name), None);
        command.arg("--host").arg(&self.socket_dir).arg("--port").arg(self.port.to_string()).args([
            "--username",
            SUPERUSER,
            "--no-password",
        ]);
        command
    }

    /// A hot standby that follows this cluster, running. One of the same name is stopped and removed first.
    pub fn standby(&self, name: &str) -> Result<Self> {
        let dir = self.dir.parent().context("a cluster is in a directory")?.join(name);
        if dir.exists() {
            Self::stop_in(&dir)?;
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        open_dir(&dir)?;
        let mut standby = Self {
            socket_dir: socket_dir::provide(&dir, self.user.as_ref())?,
            bindir: self.bindir.clone(),
            user: self.user.clone(),
            port: 0,
            postmaster: None,
            dir,
        };
        run(self.program("pg_basebackup").arg("--pgdata").arg(standby.data()).args([
            "--checkpoint=fast",
            "--write-recovery-conf",
            "--no-sync",
        ]))?;
        give_to(&standby.data(), self.user.as_ref())?;
        standby.start()?;
        Ok(standby)
    }

    /// Ends this cluster and removes its files.
    pub fn remove(mut self) -> Result<()> {
        self.stop(Shutdown::Immediate)?;
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }
}
