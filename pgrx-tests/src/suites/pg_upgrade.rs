//! From one major release of the server to a later one. These cases need two servers, so they run only when both are selected, as
//! `upgrade/15-18/...`.

use anyhow::{Result, ensure};

use super::every_state::{self, counts, picture};
use super::{DATABASE, Stage};
use crate::build::Profile;
use crate::cluster::{Cluster, Options, Shutdown};
use crate::layout::Layout;
use crate::process::{run, wait_until};
use crate::tree::Tree;
use std::time::Duration;

/// The two servers, each with the extension installed.
pub struct Pair<'a> {
    pub layout: &'a Layout,
    pub old: &'a Tree,
    pub new: &'a Tree,
    pub profile: Profile,
}

pub type Case = (&'static str, fn(&Pair<'_>) -> Result<()>);

pub const CASES: &[Case] = &[
    ("pg_upgrade::every_job_survives", every_job_survives),
    ("pg_upgrade::a_dump_restores_into_the_later_server", a_dump_restores_into_the_later_server),
];

impl Pair<'_> {
    /// A running cluster of the old server, with a queue.
    fn old_cluster(&self) -> Result<Cluster> {
        let mut old = Cluster::create(self.layout, self.old, &Options::new("upgrade-old"))?;
        old.start()?;
        old.create_database(DATABASE)?;
        old.connect(DATABASE)?.batch_execute("SELECT awa.create_queue('q')")?;
        Ok(old)
    }

    fn new_cluster(&self) -> Result<Cluster> {
        // From 18 on initdb switches checksums on; the two clusters must agree.
        let mut options = Options::new("upgrade-new");
        if self.new.server.major() >= 18 {
            options = options.initdb("--no-data-checksums");
        }
        Cluster::create(self.layout, self.new, &options)
    }
}

/// From the minor releases of November 2026 on (15.20), a server marks each column with an option, `pg_attver`, that the programs of later majors
/// know from their releases of that month on only; 18.6 cannot upgrade or dump any table of such a server. The databases of before have
/// no such marks.
fn forget_marks_of_columns(cluster: &Cluster) -> Result<()> {
    let mut client = cluster.connect(DATABASE)?;
    client.batch_execute("SET allow_system_table_mods = on")?;
    client.batch_execute(
        "UPDATE pg_attribute
            SET attoptions = (SELECT array_agg(option) FROM unnest(attoptions) AS option WHERE option NOT LIKE 'pg_attver=%')
          WHERE attoptions IS NOT NULL",
    )?;
    Ok(())
}

/// As docs/operations.md says: stop, pg_upgrade, start, `awa.adopt()`.
// If this fails, the next major release of the server costs the jobs, or runs them twice.
fn every_job_survives(pair: &Pair<'_>) -> Result<()> {
    let mut old = pair.old_cluster()?;
    let (scene, original, before) = {
        let stage = Stage { cluster: &mut old, damaged: false, profile: pair.profile };
        let scene = every_state::set_up(&stage)?;
        let mut client = stage.connect()?;
        (scene, picture(&mut client)?, counts(&mut client)?)
    };
    forget_marks_of_columns(&old)?;
    old.stop(Shutdown::Fast)?;
    let mut new = pair.new_cluster()?;
    // pg_upgrade starts both servers, and nothing of ours may work in them.
    for cluster in [&old, &new] {
        cluster.configure("awa.maintenance", "on")?;
        cluster.configure("awa.maintenance_interval", "10ms")?;
    }
    let said = new.upgrade_from(&old)?;
    ensure!(
        !said.contains("awa_queue launcher") && !said.contains("awa_queue maintainer"),
        "workers ran during pg_upgrade:\n{said}"
    );
    new.configure("awa.maintenance", "off")?;
    new.start()?;
    let (mut client, mut other) = (new.connect(DATABASE)?, new.connect(DATABASE)?);
    every_state::adopt(&mut client, &mut other)?;
    every_state::same(&original, &picture(&mut other)?)?;
    let after = counts(&mut client)?;
    ensure!(before == after, "before: {before}; after: {after}");
    println!("        pg_upgrade: {after}");
    every_state::verify_clean(&mut client)?;
    every_state::goes_on(&mut client, &mut other, &scene, &original)?;
    works_by_itself(&new)
}

/// The maintainer comes by itself, also where it was not there when the extension was created.
fn works_by_itself(cluster: &Cluster) -> Result<()> {
    let mut client = cluster.connect(DATABASE)?;
    client.batch_execute("ALTER SYSTEM SET awa.maintenance = on")?;
    client.batch_execute("SELECT pg_reload_conf()")?;
    let ran = "SELECT count(*) FROM awa.stat_maintenance WHERE runs > 0";
    let works = wait_until(Duration::from_secs(30), || {
        client.query_one(ran, &[]).is_ok_and(|row| row.try_get::<_, i64>(0).unwrap_or(0) > 0)
    });
    ensure!(works, "no maintainer works in the upgraded database");
    every_state::verify_clean(&mut client)
}

// If this fails, who upgrades by dump and restore loses jobs.
fn a_dump_restores_into_the_later_server(pair: &Pair<'_>) -> Result<()> {
    let mut old = pair.old_cluster()?;
    let stage = Stage { cluster: &mut old, damaged: false, profile: pair.profile };
    let scene = every_state::set_up(&stage)?;
    let original = picture(&mut stage.connect()?)?;
    let mut new = pair.new_cluster()?;
    new.start()?;
    forget_marks_of_columns(stage.cluster)?;
    let dump = new.dir().join("old.dump");
    // The later pg_dump reads the earlier server.
    run(old.program_of(&new, "pg_dump").args(["--format=custom", "--file"]).arg(&dump).arg(DATABASE))?;
    new.connect("postgres")?.batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
    run(new.program("pg_restore").args(["--exit-on-error", "-d", DATABASE]).arg(&dump))?;
    let (mut client, mut other) = (new.connect(DATABASE)?, new.connect(DATABASE)?);
    every_state::adopt(&mut client, &mut other)?;
    every_state::same(&original, &picture(&mut other)?)?;
    every_state::verify_clean(&mut client)?;
    every_state::goes_on(&mut client, &mut other, &scene, &original)
}
