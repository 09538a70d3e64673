//! Processes: the user that servers run as, signals, and commands whose failure explains itself.
//!
//! The only unsafe code of the harness is here.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The unprivileged user that runs every server process when the harness itself is root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

impl ServerUser {
    /// `None` when the harness is not root: everything then runs as the caller.
    pub fn find() -> Result<Option<Self>> {
        if effective_uid() != 0 {
            return Ok(None);
        }
        let name = "postgres".to_owned();
        let id = |flag: &str| -> Result<u32> {
            let out = Command::new("id").args([flag, &name]).output().context("cannot run id(1)")?;
            if !out.status.success() {
                bail!(
                    "PostgreSQL does not run as root, and there is no user \"{name}\" to run it as: install postgresql-15 or use another account"
                );
            }
            let text = String::from_utf8_lossy(&out.stdout);
            text.trim().parse().with_context(|| format!("unexpected output of id {flag} {name}: {text}"))
        };
        Ok(Some(Self { uid: id("-u")?, gid: id("-g")?, name }))
    }
}

/// A command that runs as the server's user, without anything of the caller's PostgreSQL or Rust environment.
pub fn server_command(program: &Path, user: Option<&ServerUser>) -> Command {
    let mut command = Command::new(program);
    for name in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE", "LANGUAGE"] {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") || name.to_string_lossy().starts_with("LC_") {
            command.env_remove(&name);
        }
    }
    command.env("LC_ALL", "C.UTF-8").current_dir("/");
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid).env("HOME", "/").env("USER", &user.name).env("LOGNAME", &user.name);
    }
    command
}

/// Gives `path` and all below it to the server's user.
pub fn give_to(path: &Path, user: Option<&ServerUser>) -> Result<()> {
    let Some(user) = user else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
        .with_context(|| format!("cannot give {} to user {}", path.display(), user.name))?;
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path)? {
            give_to(&entry?.path(), Some(user))?;
        }
    }
    Ok(())
}

/// Runs to the end; a failure shows the command and what it said.
pub fn run(command: &mut Command) -> Result<Output> {
    let shown = show(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    if !out.status.success() {
        bail!("{shown}: {}\n{}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    }
    Ok(out)
}

/// Runs to the end with the caller's terminal; a failure names the command.
pub fn run_visibly(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

pub fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Interrupt,
    Terminate,
    Quit,
    Kill,
    Stop,
    Continue,
}

/// Sends a signal to one process. A process that is gone already is not an error.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    if pid <= 1 {
        bail!("refusing to signal process {pid}");
    }
    let number = match signal {
        Signal::Interrupt => libc::SIGINT,
        Signal::Terminate => libc::SIGTERM,
        Signal::Quit => libc::SIGQUIT,
        Signal::Kill => libc::SIGKILL,
        Signal::Stop => libc::SIGSTOP,
        Signal::Continue => libc::SIGCONT,
    };
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    let rc = unsafe { libc::kill(pid, number) };
    if rc == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) {
        return Ok(());
    }
    Err(error).with_context(|| format!("cannot send {signal:?} to process {pid}"))
}

fn effective_uid() -> u32 {
    // SAFETY: geteuid(2) has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// Whether the process exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    stat_fields(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// The processes whose parent is `pid`.
pub fn children_of(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|&child| stat_fields(child).is_some_and(|(_, parent)| parent == pid))
        .collect()
}

/// State and parent from /proc/pid/stat; the name in the middle may hold spaces and parentheses.
fn stat_fields(pid: i32) -> Option<(char, i32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    Some((state, parent))
}

/// Looks every few milliseconds until `done` holds or the time is over; says which.
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_gone_may_be_signalled() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
        signal(pid, Signal::Terminate).unwrap();
    }

    #[test]
    fn init_is_never_signalled() {
        assert!(signal(1, Signal::Continue).is_err());
        assert!(signal(-1, Signal::Continue).is_err());
    }

    #[test]
    fn children_are_found_by_their_parent() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(is_alive(pid));
        assert!(children_of(i32::try_from(std::process::id()).unwrap()).contains(&pid));
        signal(pid, Signal::Kill).unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }

    #[test]
    fn a_failed_command_says_what_it_printed() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("out") && error.contains("err"), "{error}");
    }
}
