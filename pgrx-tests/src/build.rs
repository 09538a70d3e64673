//! Builds the extension with plain cargo, one target directory a server, against that server's headers.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::layout::Layout;
use crate::process::run_visibly;
use crate::tree::Tree;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// quickest to build; for development
    Dev,
    /// what users install
    Release,
    /// optimized, with every assertion on
    TestServer,
    /// can break its rules, one at a time; for `awa mutants` only
    Mutants,
}

impl Profile {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Release => "release",
            Self::TestServer => "test-server",
            Self::Mutants => "mutants",
        }
    }

    /// Features of the library besides the one of its server.
    fn features(self) -> &'static str {
        match self {
            Self::Mutants => ",mutants",
            Self::Dev | Self::Release | Self::TestServer => "",
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            other => other.name(),
        }
    }
}

#[derive(Debug)]
pub struct Built {
    pub library: PathBuf,
}

/// With `skip`, takes the library that an earlier build left, which must exist.
pub fn build(layout: &Layout, tree: &Tree, profile: Profile, skip: bool) -> Result<Built> {
    let target = layout.cargo_target(tree.server.cargo_target());
    let library = target.join(profile.directory()).join("libawa_queue.so");
    if !skip {
        run_visibly(
            Command::new("cargo")
                .current_dir(&layout.repo)
                .env("CARGO_TARGET_DIR", &target)
                .env("PGRX_PG_CONFIG_PATH", &tree.build_pg_config)
                .args(["build", "--quiet", "--package", "awa_queue", "--lib", "--profile", profile.name()])
                .args(["--no-default-features", "--features", &format!("pg{}{}", tree.server.major(), profile.features())]),
        )?;
    }
    if !library.is_file() {
        bail!("there is no {}: build it first", library.display());
    }
    Ok(Built { library })
}
