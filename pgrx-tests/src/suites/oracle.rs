//! `awa.verify()` decides over most tests: that it says "clean" means something only if it sees damage.

use anyhow::{Result, ensure};

use super::{Stage, claim, enqueue};

// If this fails, tests pass although attempts lost their evidence.
pub fn verify_sees_a_missing_claim(stage: &mut Stage<'_>) -> Result<()> {
    sees_damage(stage, "lease_claims")
}

// If this fails, tests pass although jobs are lost.
pub fn verify_sees_a_missing_job(stage: &mut Stage<'_>) -> Result<()> {
    sees_damage(stage, "ready_entries")
}

/// Empties the tables of one family.
fn sees_damage(stage: &mut Stage<'_>, family: &str) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 10)?;
    claim(&mut client, 4)?;
    stage.verify_clean()?;
    stage.damaged = true;
    let tables = client.query(
        "SELECT oid::regclass::text FROM pg_class
          WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r' AND starts_with(relname, $1)",
        &[&family],
    )?;
    ensure!(!tables.is_empty(), "there are no {family} tables");
    for table in tables {
        client.batch_execute(&format!("DELETE FROM {}", table.try_get::<_, String>(0)?))?;
    }
    let differences = client.query("SELECT problem FROM awa.verify()", &[])?.len();
    ensure!(differences > 0, "verify() found nothing");
    Ok(())
}
