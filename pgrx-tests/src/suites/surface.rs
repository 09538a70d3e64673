//! The SQL script is written by hand: it and the library must not drift apart.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Stage;
use crate::process::run;

// If this fails, a function was added to the library and forgotten in the script. (The other direction fails at CREATE
// EXTENSION, which looks up each symbol.)
pub fn every_exported_function_has_its_sql(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let dir: String = client.query_one("SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR'", &[])?.try_get(0)?;
    let out = run(Command::new("nm").args(["--dynamic", "--defined-only", "--format=posix"]).arg(format!("{dir}/awa_queue.so")))?;
    let exported: BTreeSet<String> = String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| line.strip_prefix("pg_finfo_")?.split(' ').next().map(str::to_owned))
        // Tests make these, see the suite of points.
        .filter(|name| !name.starts_with("awa_points_"))
        .collect();
    let rows = client.query("SELECT DISTINCT prosrc FROM pg_proc WHERE probin = '$libdir/awa_queue'", &[])?;
    let declared = rows.iter().map(|row| row.try_get(0)).collect::<Result<BTreeSet<String>, _>>()?;
    let forgotten: Vec<&String> = exported.difference(&declared).collect();
    ensure!(!declared.is_empty(), "the script declares no function of the library");
    ensure!(forgotten.is_empty(), "no SQL function uses {forgotten:?}");
    Ok(())
}

// If this fails, a server where databases come and go (tests, tenants) refuses awa_queue until it is restarted.
pub fn a_dropped_database_gives_its_place_back(stage: &mut Stage<'_>) -> Result<()> {
    let places: String = stage.connect()?.query_one("SELECT current_setting('awa.max_databases')", &[])?.try_get(0)?;
    for number in 0..=places.parse::<u32>()? {
        let name = format!("awa_place_{number}");
        stage.cluster.create_database(&name)?;
        let used = stage.cluster.connect(&name)?.batch_execute("SELECT awa.create_queue('q')");
        used.with_context(|| format!("database {} of {places}", number + 1))?;
        stage.cluster.drop_database(&name)?;
    }
    Ok(())
}
