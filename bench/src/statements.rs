//! What each statement of a load cost the server, by pg_stat_statements, where that is preloaded.

use anyhow::Result;
use postgres::Client;

use crate::report::{Measurement, Recorder};

const SHOWN_MAX: i64 = 6;
const TEXT_SHOWN_MAX: usize = 60;

/// Collects from its making to its end, in sessions that connect in between.
pub struct Statements {
    _private: (),
}

impl Statements {
    /// None where the server has not loaded the module.
    pub fn begin(client: &mut Client) -> Result<Option<Statements>> {
        let row = client.query_one("SELECT current_setting('shared_preload_libraries') LIKE '%pg_stat_statements%'", &[])?;
        if !row.try_get::<_, bool>(0)? {
            return Ok(None);
        }
        client.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")?;
        Self::track(client, "top")?;
        client.batch_execute("SELECT pg_stat_statements_reset()")?;
        Ok(Some(Statements { _private: () }))
    }

    /// A line for each of the most expensive statements.
    pub fn end(self, client: &mut Client, scenario: &str, system: &str, round: u32, recorder: &mut Recorder) -> Result<()> {
        Self::track(client, "none")?;
        let rows = client.query(
            "SELECT regexp_replace(query, '[[:space:]]+', ' ', 'g'), calls::float8, mean_exec_time * 1000, max_exec_time,
                    (shared_blks_hit + shared_blks_read)::float8 / calls, wal_records::float8 / calls, wal_bytes::float8 / calls
               FROM pg_stat_statements
              WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND query ~* '^(select|call) .*(awa[.])' AND calls > 100
              ORDER BY total_exec_time DESC
              LIMIT $1",
            &[&SHOWN_MAX],
        )?;
        for row in rows {
            let text: String = row.try_get(0)?;
            let text: String = text.chars().take(TEXT_SHOWN_MAX).collect();
            let measurement = Measurement::new(&format!("{scenario}, statements"), format!("`{text}`"), system, round)
                .metric("mean us", row.try_get::<_, f64>(2)?)
                .metric("calls", row.try_get::<_, f64>(1)?)
                .metric("worst ms", row.try_get::<_, f64>(3)?)
                .metric("buffers/call", row.try_get::<_, f64>(4)?)
                .metric("WAL records/call", row.try_get::<_, f64>(5)?)
                .metric("WAL B/call", row.try_get::<_, f64>(6)?);
            recorder.record(measurement)?;
        }
        Ok(())
    }

    fn track(client: &mut Client, what: &str) -> Result<()> {
        let database: String = client.query_one("SELECT quote_ident(current_database())", &[])?.try_get(0)?;
        client.batch_execute(&format!("ALTER DATABASE {database} SET pg_stat_statements.track = '{what}'"))?;
        Ok(())
    }
}
