//! A development cluster that stays: `awa up`, `awa down`, `awa psql`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};

use crate::cluster::{Cluster, Options, SUPERUSER, Shutdown};
use crate::layout::Layout;
use crate::process::server_command;
use crate::tree::{Server, Tree};

const DATABASE: &str = "awa";

fn name(server: Server) -> String {
    format!("dev-{}", server.name())
}

/// Starts the cluster, made at the first time, and prints how to connect.
pub fn up(layout: &Layout, tree: &Tree, foreground: bool) -> Result<()> {
    let mut cluster = match Cluster::existing(layout, tree, &name(tree.server))? {
        Some(cluster) => cluster,
        None => Cluster::create(
            layout,
            tree,
            &Options::new(&name(tree.server)).set("awa.maintenance", "on").fsync(true).preload(tree.has_library()),
        )?,
    };
    if !cluster.is_running() {
        if foreground { cluster.start()? } else { cluster.start_detached()? }
    }
    provide_database(&cluster, tree)?;
    println!("socket: host={} port={} user={SUPERUSER} dbname={DATABASE}", cluster.socket_dir().display(), cluster.port());
    println!("tcp:    postgresql://{SUPERUSER}:{}@127.0.0.1:{}/{DATABASE}", cluster.password()?, cluster.port());
    println!("log:    {}", cluster.log_path().display());
    if foreground {
        // Ctrl-C reaches the server as well, which then shuts down; see the end of it.
        while cluster.is_running() {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        return Ok(());
    }
    cluster.leave_running();
    Ok(())
}

fn provide_database(cluster: &Cluster, tree: &Tree) -> Result<()> {
    let mut client = cluster.connect("postgres")?;
    if client.query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&DATABASE])?.is_none() {
        client.batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
        if tree.has_library() {
            cluster.connect(DATABASE)?.batch_execute("CREATE EXTENSION awa_queue")?;
        }
    }
    Ok(())
}

pub fn down(layout: &Layout, tree: &Tree, remove: bool) -> Result<()> {
    let Some(mut cluster) = Cluster::existing(layout, tree, &name(tree.server))? else {
        println!("there is no development cluster of {}", tree.server.name());
        return Ok(());
    };
    cluster.stop(Shutdown::Fast)?;
    println!("stopped {}", cluster.dir().display());
    if remove {
        std::fs::remove_dir_all(cluster.dir())?;
        println!("removed it");
    }
    Ok(())
}

/// Stops every cluster of this clone that still runs, and removes what lies outside of the clone.
pub fn clean(layout: &Layout) -> Result<()> {
    for entry in std::fs::read_dir(layout.dir("cluster")?)? {
        Cluster::stop_in(&entry?.path())?;
    }
    if !layout.work.starts_with(&layout.repo) {
        std::fs::remove_dir_all(&layout.work)?;
    }
    Ok(())
}

/// Becomes psql of the tree, connected to the development cluster.
pub fn psql(layout: &Layout, tree: &Tree, args: &[String]) -> Result<()> {
    let mut cluster =
        Cluster::existing(layout, tree, &name(tree.server))?.context("there is no development cluster: run `awa up`")?;
    if !cluster.is_running() {
        bail!("the development cluster does not run: run `awa up`");
    }
    let mut command = server_command(&tree.program("psql"), None);
    command
        .current_dir(&layout.repo)
        .arg(format!("--host={}", cluster.socket_dir().display()))
        .arg(format!("--port={}", cluster.port()))
        .args(["--username", SUPERUSER, "--dbname", DATABASE])
        .args(args);
    cluster.leave_running();
    Err(command.exec()).context("cannot run psql")
}
