//! Builds the extension with plain cargo, one target directory a server, against that server's headers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::layout::Layout;
use crate::mutants;
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
            Self::Mutants => ",points,mutants",
            Self::TestServer => ",points",
            Self::Dev | Self::Release => "",
        }
    }

    /// Tests stop and fail sessions at points; nothing else has them.
    pub fn has_points(self) -> bool {
        matches!(self, Self::TestServer | Self::Mutants)
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
        let source = if profile == Profile::Mutants { mutants::tree::provide(&layout.repo)? } else { layout.repo.clone() };
        run_visibly(
            Command::new("cargo")
                .current_dir(source)
                .env("CARGO_TARGET_DIR", &target)
                .env("PGRX_PG_CONFIG_PATH", &tree.build_pg_config)
                .args(["build", "--quiet", "--package", "awa_queue", "--lib", "--profile", profile.name()])
                .args(["--no-default-features", "--features", &format!("pg{}{}", tree.server.major(), profile.features())]),
        )?;
    }
    if !library.is_file() {
        bail!("there is no {}: build it first", library.display());
    }
    // A file left by an earlier build may be of the wrong kind, too.
    if names_points(&library)? != profile.has_points() {
        bail!("{} has points where it must not, or none where tests need them", library.display());
    }
    if names(&library, &MUTANT_MARKS)? != (profile == Profile::Mutants) {
        bail!("{} can break its rules where it must not, or cannot where `awa mutants` needs it", library.display());
    }
    Ok(Built { library })
}

/// Does the library have a symbol or a text of the points, of which tests know the name?
pub fn names_points(library: &Path) -> Result<bool> {
    names(library, &POINT_MARKS)
}

fn names(library: &Path, marks: &[&[u8]]) -> Result<bool> {
    let bytes = fs::read(library).with_context(|| format!("cannot read {}", library.display()))?;
    Ok(marks.iter().any(|mark| bytes.windows(mark.len()).any(|window| window == *mark)))
}

/// Symbols, the area in shared memory, and the name of the point that is reached in every pass of prune.
const POINT_MARKS: [&[u8]; 2] = [b"awa_points", b"prune.ready_truncated"];

/// From where a server that can break its rules learns which.
const MUTANT_MARKS: [&[u8]; 1] = [b"AWA_MUTANT"];
