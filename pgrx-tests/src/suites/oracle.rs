//! `awa.verify()` decides over most tests: that it says "clean" means something only if it sees damage.

use anyhow::{Result, ensure};

use super::{DATABASE, Stage, claim, enqueue};

// If this fails, tests pass although attempts lost their evidence.
pub fn verify_sees_a_missing_claim(stage: &mut Stage<'_>) -> Result<()> {
    sees_damage(stage, "lease_claims")
}

// If this fails, tests pass although jobs are lost.
pub fn verify_sees_a_missing_job(stage: &mut Stage<'_>) -> Result<()> {
    sees_damage(stage, "ready_entries")
}

// If this fails, tests pass although a job that is kept as finished runs again, or kept jobs are lost.
pub fn verify_sees_what_is_wrong_with_kept_jobs(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('letters', max_attempts => 1, dead_letters => true)")?;
    let fail = "SELECT awa.fail(job_id, run_lease, 'x') FROM awa.claim('letters')";
    client.batch_execute("SELECT awa.enqueue('letters', 'k')")?;
    client.batch_execute(fail)?;
    stage.verify_clean()?;
    stage.damaged = true;
    client.batch_execute("CREATE TABLE letter AS TABLE awa.dlq_entries; SELECT awa.dlq_retry(job_id) FROM letter")?;
    client.batch_execute("INSERT INTO awa.dlq_entries TABLE letter")?;
    let problems = "SELECT string_agg(problem, ' ' ORDER BY problem) FROM awa.verify()";
    let both: Option<String> = client.query_one(problems, &[])?.try_get(0)?;
    ensure!(both.as_deref() == Some("counts finished_and_live"), "verify() found {both:?}");
    client.batch_execute("DELETE FROM awa.dlq_entries")?;
    client.batch_execute(fail)?;
    stage.verify_clean()?;
    client.batch_execute("DELETE FROM awa.dlq_entries")?;
    let lost: Option<String> = client.query_one(problems, &[])?.try_get(0)?;
    ensure!(lost.as_deref() == Some("counts"), "verify() found {lost:?}");
    Ok(())
}

// If this fails, verify() hangs as long as somebody forgets to decide a prepared transaction.
pub fn verify_sees_damage_beside_a_prepared_transaction(stage: &mut Stage<'_>) -> Result<()> {
    let mut other = stage.connect()?;
    other.batch_execute("BEGIN; SELECT awa.enqueue('q', 'k'); PREPARE TRANSACTION 'undecided'")?;
    stage.connect()?.batch_execute(&format!("ALTER DATABASE {DATABASE} SET statement_timeout = '20s'"))?;
    let seen = sees_damage(stage, "lease_claims");
    other.batch_execute("ROLLBACK PREPARED 'undecided'")?;
    seen
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
