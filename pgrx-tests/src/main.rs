//! `awa`: what the Makefile calls, and what a developer uses between two commits.

use std::process::ExitCode;

use anyhow::Result;
use awa_harness::build::{Profile, build};
use awa_harness::layout::Layout;
use awa_harness::test_run::{self, Selection};
use awa_harness::tree::{Server, Tree};
use awa_harness::{demo, dev, mutants};
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "awa", about = "Clusters, tests and the demo of awa_queue", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Args)]
struct Build {
    /// Install the library of an earlier build instead of building
    #[arg(long)]
    no_build: bool,
    #[arg(long, value_enum)]
    profile: Option<Profile>,
}

#[derive(Subcommand)]
enum Task {
    /// Make a private PostgreSQL tree and install the extension into it
    Provision {
        #[arg(long, default_value = "15")]
        pg: Server,
        /// Only the tree, without the extension
        #[arg(long)]
        bare: bool,
        #[command(flatten)]
        build: Build,
    },
    /// Run thousands of real jobs and check every one of them
    Demo {
        #[arg(long, default_value = "15")]
        pg: Server,
        #[command(flatten)]
        build: Build,
    },
    /// Run all tests, or those whose name contains FILTER
    Test {
        filter: Option<String>,
        #[arg(long, value_delimiter = ',', default_value = "15,18")]
        pg: Vec<Server>,
        #[command(flatten)]
        build: Build,
    },
    /// Break the rules of the server code one at a time: each time the named test must fail
    Mutants {
        /// Only mutants whose name, place or test contains this
        filter: Option<String>,
        #[arg(long, default_value = "15")]
        pg: Server,
        #[arg(long)]
        no_build: bool,
        /// Only make the copy of the source in which mutants are written
        #[arg(long)]
        edit: bool,
        /// Only write the patch anew from that copy
        #[arg(long, conflicts_with = "edit")]
        save: bool,
    },
    /// Run pg_regress and pg_isolation_regress only
    Regress {
        filter: Option<String>,
        #[arg(long, default_value = "15")]
        pg: Server,
        /// Take the output of failed tests as the expected one
        #[arg(long)]
        accept: bool,
        #[command(flatten)]
        build: Build,
    },
    /// Keep script and fixture of the current version in sql/frozen, when it is released
    Freeze {
        #[command(flatten)]
        build: Build,
    },
    /// Start the development cluster and print how to connect
    Up {
        #[arg(long, default_value = "15")]
        pg: Server,
        /// Stay until the server ends
        #[arg(long)]
        foreground: bool,
        #[command(flatten)]
        build: Build,
    },
    /// Stop the development cluster
    Down {
        #[arg(long, default_value = "15")]
        pg: Server,
        /// Remove its data as well
        #[arg(long)]
        remove: bool,
    },
    /// Stop all clusters of this clone and remove what lies outside of it; `make clean` does the rest
    Clean,
    /// psql on the development cluster
    Psql {
        #[arg(long, default_value = "15")]
        pg: Server,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("awa: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<bool> {
    let layout = Layout::find()?;
    match task {
        Task::Provision { pg, bare, build } => {
            let tree = Tree::provide(&layout, pg)?;
            if !bare {
                install(&layout, &tree, &build, Profile::Release)?;
            }
            println!("{}", tree.bindir.display());
        }
        Task::Demo { pg, build } => demo::run(&layout, pg, build.profile.unwrap_or(Profile::Release), build.no_build)?,
        Task::Test { filter, pg, build } => {
            return test_run::run(&layout, &selection(filter, pg, &build, false));
        }
        Task::Mutants { edit: true, .. } => println!("{}", mutants::tree::provide(&layout.repo)?.display()),
        Task::Mutants { save: true, .. } => mutants::tree::save(&layout.repo)?,
        Task::Mutants { filter, pg, no_build, .. } => return mutants::run(&layout, pg, filter.as_deref(), no_build),
        Task::Regress { filter, pg, accept, build } => {
            return test_run::run_regress(&layout, &selection(filter, vec![pg], &build, accept));
        }
        Task::Freeze { build } => {
            let tree = Tree::provide(&layout, Server::Fifteen)?;
            let profile = build.profile.unwrap_or(Profile::Release);
            install(&layout, &tree, &build, profile)?;
            println!("{} is frozen in sql/frozen", awa_harness::suites::freeze(&layout, &tree, profile)?);
        }
        Task::Up { pg, foreground, build } => {
            let tree = Tree::provide(&layout, pg)?;
            if build.profile.is_some() || !build.no_build {
                install(&layout, &tree, &build, Profile::Dev)?;
            }
            dev::up(&layout, &tree, foreground)?;
        }
        Task::Down { pg, remove } => dev::down(&layout, &Tree::provide(&layout, pg)?, remove)?,
        Task::Clean => dev::clean(&layout)?,
        Task::Psql { pg, args } => dev::psql(&layout, &Tree::provide(&layout, pg)?, &args)?,
    }
    Ok(true)
}

fn selection(filter: Option<String>, servers: Vec<Server>, build: &Build, accept: bool) -> Selection {
    Selection { filter, servers, profile: build.profile.unwrap_or(Profile::TestServer), skip_build: build.no_build, accept }
}

fn install(layout: &Layout, tree: &Tree, choice: &Build, default: Profile) -> Result<()> {
    let built = build(layout, tree, choice.profile.unwrap_or(default), choice.no_build)?;
    tree.install(layout, &built)
}
