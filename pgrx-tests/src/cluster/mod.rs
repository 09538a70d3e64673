//! One PostgreSQL cluster of our own: made, started, stopped, killed, started again.
//!
//! Local connections come through a socket in a directory that only the server's user (and root) may enter and need no
//! password; TCP listens on the loopback address only, on a free port, and wants the password made for this cluster.
//! Dropping a cluster stops it at once and keeps its files: logs and data are there for a look after a failure.

mod log;
pub mod memcheck;
mod pid_file;
mod socket_dir;
mod tools;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use postgres::{Client, Config, NoTls};
use rand::Rng;
use rand::distr::Alphanumeric;

use crate::layout::{Layout, open_dir};
use crate::process::{ServerUser, Signal, children_of, give_to, is_alive, run, server_command, signal, wait_until};
use crate::tree::Tree;
use log::last_lines;
use pid_file::PidFile;

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const PORT_TRIES: usize = 5;
pub const SUPERUSER: &str = "postgres";

#[derive(Clone, Debug)]
pub struct Options {
    pub name: String,
    /// Whether awa_queue is in shared_preload_libraries.
    pub preload: bool,
    pub fsync: bool,
    /// Lines of postgresql.conf, later ones win.
    pub settings: Vec<(String, String)>,
    /// More arguments of initdb.
    pub initdb: Vec<String>,
}

impl Options {
    pub fn new(name: &str) -> Self {
        // Maintenance at times of its own would make tests of single steps depend on luck.
        let settings = vec![("awa.maintenance".to_owned(), "off".to_owned())];
        Self { name: name.to_owned(), preload: true, fsync: false, settings, initdb: Vec::new() }
    }

    #[must_use]
    pub fn fsync(mut self, on: bool) -> Self {
        self.fsync = on;
        self
    }

    #[must_use]
    pub fn preload(mut self, on: bool) -> Self {
        self.preload = on;
        self
    }

    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn initdb(mut self, argument: impl Into<String>) -> Self {
        self.initdb.push(argument.into());
        self
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// waits for the sessions to end
    Smart,
    /// rolls back and writes a checkpoint
    Fast,
    /// no checkpoint: the next start recovers
    Immediate,
}

#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    socket_dir: PathBuf,
    bindir: PathBuf,
    user: Option<ServerUser>,
    port: u16,
    postmaster: Option<Postmaster>,
}

#[derive(Debug)]
struct Postmaster {
    pid: i32,
    /// `None` for a server that an earlier run of the harness left running.
    child: Option<Child>,
}

impl Cluster {
    /// A new cluster, not started; one of the same name is stopped and removed first.
    pub fn create(layout: &Layout, tree: &Tree, options: &Options) -> Result<Self> {
        let dir = layout.dir("cluster")?.join(&options.name);
        if let Some(mut old) = Self::existing(layout, tree, &options.name)? {
            old.stop(Shutdown::Immediate)?;
        }
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        open_dir(&dir)?;
        let cluster = Self::at(layout, tree, dir)?;
        cluster.initdb(options)?;
        Ok(cluster)
    }

    /// The cluster of this name, running or not, if it was made before.
    pub fn existing(layout: &Layout, tree: &Tree, name: &str) -> Result<Option<Self>> {
        let dir = layout.dir("cluster")?.join(name);
        if !dir.join("data/PG_VERSION").exists() {
            return Ok(None);
        }
        let mut cluster = Self::at(layout, tree, dir)?;
        if let Some(found) = PidFile::read(&cluster.data()).filter(|found| found.is_live(&cluster.data())) {
            cluster.port = found.port.unwrap_or(0);
            cluster.postmaster = Some(Postmaster { pid: found.pid, child: None });
        }
        Ok(Some(cluster))
    }

    /// Stops the server of a cluster directory, if one runs there, without knowing its tree.
    pub fn stop_in(dir: &Path) -> Result<()> {
        let data = dir.join("data");
        if let Some(found) = PidFile::read(&data).filter(|found| found.is_live(&data)) {
            signal(found.pid, Signal::Interrupt)?;
            if !(Postmaster { pid: found.pid, child: None }).gone_within(STOP_LIMIT) {
                bail!("the server in {} does not stop", dir.display());
            }
        }
        Ok(())
    }

    fn at(layout: &Layout, tree: &Tree, dir: PathBuf) -> Result<Self> {
        let socket_dir = socket_dir::provide(&dir, layout.user())?;
        Ok(Self { dir, socket_dir, bindir: tree.bindir.clone(), user: layout.server_user.clone(), port: 0, postmaster: None })
    }

    fn initdb(&self, options: &Options) -> Result<()> {
        let password_file = self.dir.join("password");
        let password: String = rand::rng().sample_iter(Alphanumeric).take(32).map(char::from).collect();
        fs::write(&password_file, &password)?;
        fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600))?;
        DirBuilder::new().mode(0o700).create(self.data())?;
        give_to(&password_file, self.user.as_ref())?;
        give_to(&self.data(), self.user.as_ref())?;
        run(server_command(&self.bindir.join("initdb"), self.user.as_ref())
            .arg("--pgdata")
            .arg(self.data())
            .args(["--username", SUPERUSER, "--encoding=UTF8", "--no-locale", "--no-sync"])
            .args(["--auth-local=trust", "--auth-host=scram-sha-256", "--pwfile"])
            .arg(&password_file)
            .args(&options.initdb))?;

        let mut settings = vec![
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("unix_socket_permissions", "0777".to_owned()),
            ("max_connections", "100".to_owned()),
            ("max_prepared_transactions", "20".to_owned()),
            ("fsync", if options.fsync { "on" } else { "off" }.to_owned()),
            ("log_line_prefix", "%m [%p] %q%d ".to_owned()),
            ("log_timezone", "UTC".to_owned()),
            ("timezone", "UTC".to_owned()),
        ];
        if options.preload {
            settings.push(("shared_preload_libraries", "awa_queue".to_owned()));
        }
        settings.extend(options.settings.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let mut text = String::from("\n# awa harness\n");
        for (name, value) in settings {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        append(&self.data().join("postgresql.conf"), &text)
    }

    /// Adds lines to postgresql.conf; they hold from the next start or reload.
    pub fn configure(&self, name: &str, value: &str) -> Result<()> {
        append(&self.data().join("postgresql.conf"), &format!("{name} = '{}'\n", value.replace('\'', "''")))
    }

    pub fn start(&mut self) -> Result<()> {
        self.start_as(false)
    }

    /// The server outlives the harness and does not hear the terminal's Ctrl-C.
    pub fn start_detached(&mut self) -> Result<()> {
        self.start_as(true)
    }

    fn start_as(&mut self, detached: bool) -> Result<()> {
        if self.is_running() {
            bail!("the cluster {} runs already", self.dir.display());
        }
        for _ in 0..PORT_TRIES {
            if self.port == 0 {
                self.port = free_port()?;
            }
            let log_start = self.log_size();
            if self.try_start(detached)? {
                return Ok(());
            }
            let said = self.log_since(log_start)?;
            if !said.contains("could not create any TCP/IP sockets") {
                bail!("the server did not start; {} ends with\n{}", self.log_path().display(), last_lines(&said, 20));
            }
            self.port = 0; // somebody took the port between our look and the server's
        }
        bail!("found no free port in {PORT_TRIES} tries");
    }

    fn try_start(&mut self, detached: bool) -> Result<bool> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let postgres = self.bindir.join("postgres");
        let mut command = if memcheck::is_on() {
            let mut command = server_command(Path::new("valgrind"), self.user.as_ref());
            command.args(memcheck::arguments(&self.data())).arg(&postgres);
            command
        } else {
            server_command(&postgres, self.user.as_ref())
        };
        command
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(&self.socket_dir)
            .arg("-p")
            .arg(self.port.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if detached {
            command.process_group(0);
        }
        let mut child = command.spawn().context("cannot run postgres")?;
        let pid = i32::try_from(child.id())?;
        let mut exited = false;
        let data = self.data();
        let ready = wait_until(START_LIMIT, || {
            exited = !matches!(child.try_wait(), Ok(None));
            exited || PidFile::read(&data).is_some_and(|found| found.pid == pid && found.accepts)
        });
        if exited {
            return Ok(false);
        }
        self.postmaster = Some(Postmaster { pid, child: Some(child) });
        if !ready {
            let said = self.log_tail(20)?;
            self.crash()?;
            bail!("the server was not ready within {START_LIMIT:?}; its log ends with\n{said}");
        }
        Ok(true)
    }

    pub fn stop(&mut self, how: Shutdown) -> Result<()> {
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        signal(
            postmaster.pid,
            match how {
                Shutdown::Smart => Signal::Terminate,
                Shutdown::Fast => Signal::Interrupt,
                Shutdown::Immediate => Signal::Quit,
            },
        )?;
        if postmaster.gone_within(STOP_LIMIT) {
            return Ok(());
        }
        let said = self.log_tail(20)?;
        self.postmaster = Some(postmaster);
        self.crash()?;
        bail!("the server did not stop ({how:?}) within {STOP_LIMIT:?} and was killed; its log ends with\n{said}");
    }

    pub fn restart(&mut self, how: Shutdown) -> Result<()> {
        self.stop(how)?;
        self.start()
    }

    /// `kill -9` of the postmaster and all its children: what a power failure leaves, but for the kernel's cache.
    pub fn crash(&mut self) -> Result<()> {
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        signal(postmaster.pid, Signal::Stop)?; // else it starts new children while we count
        let children = children_of(postmaster.pid);
        signal(postmaster.pid, Signal::Kill)?;
        for &child in &children {
            signal(child, Signal::Kill)?;
        }
        let gone =
            postmaster.gone_within(STOP_LIMIT) && wait_until(STOP_LIMIT, || !children.iter().any(|&child| is_alive(child)));
        if !gone {
            bail!("killed processes of the cluster {} are still there", self.dir.display());
        }
        Ok(())
    }

    /// `kill -9` of one backend; returns when the postmaster has restarted all the others and recovered.
    pub fn kill_backend(&self, pid: i32) -> Result<()> {
        let postmaster = self.postmaster.as_ref().context("the cluster does not run")?;
        if !children_of(postmaster.pid).contains(&pid) {
            bail!("process {pid} is no child of the postmaster {}", postmaster.pid);
        }
        let log_start = self.log_size();
        signal(pid, Signal::Kill)?;
        self.wait_recovered(log_start).with_context(|| format!("after the kill of {pid}"))
    }

    /// Waits until the postmaster has recovered from the crash of a process, which came when the log had this size.
    pub fn wait_recovered(&self, log_start: u64) -> Result<()> {
        // The log tells it in order; a connection might still be served before the postmaster has noticed.
        let recovered = |said: String| said.contains("database system is ready to accept connections");
        if !wait_until(START_LIMIT, || self.log_since(log_start).is_ok_and(recovered)) {
            bail!("no recovery; the log ends with\n{}", self.log_tail(20)?);
        }
        Ok(())
    }

    /// From now on the server process may have no more than so many bytes of address space, shared memory included; `None`: as many as it
    /// likes. Done as the server's own user, who may.
    pub fn limit_address_space(&self, pid: i32, bytes: Option<u64>) -> Result<()> {
        let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
        run(server_command(Path::new("prlimit"), self.user.as_ref()).arg(format!("--pid={pid}")).arg(format!("--as={limit}:")))?;
        Ok(())
    }

    pub fn is_running(&mut self) -> bool {
        let gone = self.postmaster.as_mut().is_none_or(|postmaster| postmaster.gone_within(Duration::ZERO));
        if gone {
            self.postmaster = None;
        }
        !gone
    }

    /// How an ordinary driver connects; clone it into other threads.
    pub fn config(&self, database: &str) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.socket_dir)
            .port(self.port)
            .user(SUPERUSER)
            .dbname(database)
            .application_name("awa_harness")
            .connect_timeout(Duration::from_secs(30));
        config
    }

    pub fn connect(&self, database: &str) -> Result<Client> {
        self.config(database).connect(NoTls).with_context(|| format!("cannot connect to database {database}"))
    }

    /// Feeds statements to a server of one process on a copy of this cluster, which must be stopped; what it printed. Nothing
    /// else runs in such a server, so the same statements cost the same each time. `under` names a program to run it under.
    pub fn single_user(&self, under: &[&str], database: &str, statements: &str) -> Result<String> {
        let (copy, script) = (self.dir.join("single"), self.dir.join("single.sql"));
        if copy.exists() {
            fs::remove_dir_all(&copy)?;
        }
        run(std::process::Command::new("cp").arg("-a").arg(self.data()).arg(&copy))?;
        fs::write(&script, statements)?;
        let postgres = self.bindir.join("postgres");
        let mut command = match under.split_first() {
            None => server_command(&postgres, self.user.as_ref()),
            Some((program, arguments)) => {
                let mut command = server_command(Path::new(program), self.user.as_ref());
                command.args(arguments).arg(&postgres);
                command
            }
        };
        command.args(["--single", "-c", "full_page_writes=off", "-D"]).arg(&copy).arg(database).stdin(File::open(&script)?);
        let out = command.output().context("cannot run a single-user server")?;
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if !out.status.success() || said.contains("ERROR:") || said.contains("FATAL:") {
            bail!("the single-user server failed: {}", last_lines(&said, 20));
        }
        fs::remove_dir_all(&copy)?;
        Ok(said)
    }

    /// A new database with the extension in it; an old one of the name goes.
    pub fn create_database(&self, name: &str) -> Result<()> {
        let mut client = self.connect("postgres")?;
        // What a failed case has left prepared would keep the database, and fail every case after it.
        for row in client.query("SELECT gid FROM pg_prepared_xacts WHERE database = $1", &[&name])? {
            let gid: String = row.try_get(0)?;
            self.connect(name)?.batch_execute(&format!("ROLLBACK PREPARED '{}'", gid.replace('\'', "''")))?;
        }
        client.batch_execute(&format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)"))?;
        client.batch_execute(&format!("CREATE DATABASE \"{name}\""))?;
        self.connect(name)?.batch_execute("CREATE EXTENSION awa_queue")?;
        Ok(())
    }

    pub fn drop_database(&self, name: &str) -> Result<()> {
        self.connect("postgres")?.batch_execute(&format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)"))?;
        Ok(())
    }

    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn password(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("password"))?)
    }

    pub fn postmaster_pid(&self) -> Option<i32> {
        self.postmaster.as_ref().map(|postmaster| postmaster.pid)
    }

    /// Leaves the server running when this value goes.
    pub fn leave_running(mut self) {
        self.postmaster = None;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.stop(Shutdown::Immediate) {
            eprintln!("note: {error:#}");
        }
        if !self.socket_dir.starts_with(&self.dir) && self.postmaster.is_none() && !self.dir.join("data/postmaster.pid").exists()
        {
            // Only a directory of ours under /tmp, and only when it is empty.
            drop(fs::remove_dir(&self.socket_dir));
        }
    }
}

impl Postmaster {
    fn gone_within(&mut self, limit: Duration) -> bool {
        let pid = self.pid;
        match &mut self.child {
            Some(child) => wait_until(limit, || !matches!(child.try_wait(), Ok(None))),
            None => wait_until(limit, || !is_alive(pid)),
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn append(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    OpenOptions::new()
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
