//! Versions that do not exist, made out of the current script: one that will come, and one that was before. They show that the frame sees
//! what it is for, as long as there is little that was released.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use postgres::Client;

/// Scripts beside the installed ones, until this is dropped.
pub struct Scripts {
    directory: PathBuf,
    made: Vec<PathBuf>,
}

impl Scripts {
    pub fn of(client: &mut Client) -> Result<Self> {
        let share: String = client.query_one("SELECT setting FROM pg_config WHERE name = 'SHAREDIR'", &[])?.try_get(0)?;
        Ok(Self { directory: PathBuf::from(share).join("extension"), made: Vec::new() })
    }

    pub fn path(&self, version: &str) -> PathBuf {
        self.directory.join(format!("awa_queue--{version}.sql"))
    }

    pub fn read(&self, version: &str) -> Result<String> {
        fs::read_to_string(self.path(version)).with_context(|| format!("there is no script of {version}"))
    }

    /// `version` is one, or two with `--` between them for a step. One that is there already stays.
    pub fn add(&mut self, version: &str, text: &str) -> Result<()> {
        let path = self.path(version);
        if path.exists() && !self.made.contains(&path) {
            return Ok(());
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        self.made.push(path);
        Ok(())
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        for path in &self.made {
            drop(fs::remove_file(path));
        }
    }
}

fn replace(text: &str, from: &str, to: &str) -> Result<String> {
    ensure!(text.contains(from), "the script has no such place any more: {from}");
    Ok(text.replacen(from, to, 1))
}

fn cut(text: &str, from: &str, to: &str) -> Result<String> {
    let begin = text.find(from).with_context(|| format!("the script has no such place any more: {from}"))?;
    let rest = text.get(begin..).unwrap_or_default();
    let end = rest.find(to).with_context(|| format!("nothing ends with {to}"))? + to.len();
    Ok(format!("{}{}", text.get(..begin).unwrap_or_default(), rest.get(end..).unwrap_or_default()))
}

const HEAD: &str = "\\echo Use \"ALTER EXTENSION awa_queue UPDATE\" to load this file. \\quit\n";
const FIRST_OF_DUMP: &str = "SELECT pg_catalog.pg_extension_config_dump('awa.queue_definitions', '');";

pub fn step(statements: &[&str]) -> String {
    format!("{HEAD}{}", statements.join("\n"))
}

/// A new table, function and column, and two changed objects: what a fresh installation of the next version has.
pub fn next(current: &str) -> Result<String> {
    let dropped_at = "    dropped_at        timestamptz -- rows of a dropped queue count as closed\n";
    let text = replace(current, dropped_at, "    dropped_at        timestamptz,\n    note              text\n")?;
    let text = replace(&text, "    SELECT * FROM awa.queue_stats();", &STEP_TO_NEXT[VIEW].replace("CREATE OR REPLACE VIEW awa.stat_queue AS", ""))?;
    let additions = STEP_TO_NEXT.iter().enumerate().filter(|(place, _)| ![COLUMN, VIEW].contains(place)).map(|(_, statement)| *statement);
    let additions: Vec<&str> = additions.collect();
    replace(&text, FIRST_OF_DUMP, &format!("{}\n{FIRST_OF_DUMP}", additions.join("\n")))
}

const COLUMN: usize = 0;
const VIEW: usize = 1;

/// The way there. Without any one of these the result is another.
pub const STEP_TO_NEXT: &[&str] = &[
    "ALTER TABLE awa.queue_definitions ADD COLUMN note text;",
    "CREATE OR REPLACE VIEW awa.stat_queue AS SELECT *, pg_catalog.now() AS looked_at FROM awa.queue_stats();",
    "CREATE TABLE awa.notes (job_id bigint NOT NULL CONSTRAINT notes_pkey PRIMARY KEY, note text);",
    "COMMENT ON TABLE awa.notes IS 'notes of people';",
    "CREATE INDEX notes_note_idx ON awa.notes (note);",
    "CREATE FUNCTION awa.note(job_id bigint) RETURNS text LANGUAGE sql STABLE PARALLEL UNSAFE AS 'SELECT n.note FROM awa.notes AS n WHERE n.job_id = $1';",
    "COMMENT ON FUNCTION awa.note(bigint) IS 'the note of a job';",
    "REVOKE ALL ON FUNCTION awa.note(bigint) FROM PUBLIC;",
    "SELECT pg_catalog.pg_extension_config_dump('awa.notes', '');",
    "ALTER FUNCTION awa.version() COST 7;",
];

/// The script of a version that had less: one function, one column of a table, one of a result.
pub fn before(current: &str) -> Result<String> {
    let text = cut(current, "CREATE FUNCTION awa.dlq_purge(", "'awa_dlq_purge';\n")?;
    let text = cut(&text, "COMMENT ON FUNCTION awa.dlq_purge(", ";\n")?;
    let text = replace(&text, "    args         jsonb       NOT NULL,\n    problem      text                  -- why it could not be brought back\n", "    args         jsonb       NOT NULL\n")?;
    replace(&text, "    metadata     jsonb,\n    errors       jsonb\n);\n\nCREATE FUNCTION awa.claim(", "    metadata     jsonb\n);\n\nCREATE FUNCTION awa.claim(")
}

/// From there to the current version, of which the parts are copied.
pub fn step_from_before(current: &str) -> Result<String> {
    let part = |from: &str, to: &str| -> Result<String> {
        let begin = current.find(from).with_context(|| format!("the script has no such place any more: {from}"))?;
        let rest = current.get(begin..).unwrap_or_default();
        let end = rest.find(to).with_context(|| format!("nothing ends with {to}"))? + to.len();
        Ok(rest.get(..end).unwrap_or_default().to_owned())
    };
    Ok(step(&[
        "ALTER TABLE awa.deferred_jobs ADD COLUMN problem text;",
        "ALTER TYPE awa.claimed_job ADD ATTRIBUTE errors jsonb;",
        &part("CREATE FUNCTION awa.dlq_purge(", "'awa_dlq_purge';\n")?,
        &part("COMMENT ON FUNCTION awa.dlq_purge(", ";\n")?,
        "REVOKE ALL ON FUNCTION awa.dlq_purge(text, text, timestamptz, integer) FROM PUBLIC;",
    ]))
}
