//! What the catalogs say about the extension itself. Tables read: pg_extension, pg_publication. Nothing is written.

use crate::error::Result;
use crate::pg::sql;

/// The version of the extension in this database, now; None: it is not there.
pub fn version() -> Result<Option<String>> {
    let mut version = None;
    let text = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'awa_queue'";
    sql::select_latest(text, &[], |row| {
        version = row.text(1);
        Ok(())
    })?;
    Ok(version)
}

/// A publication that takes the segments along with all tables.
pub fn publication_for_all_tables() -> Result<Option<String>> {
    let mut name = None;
    let text = "SELECT pubname::pg_catalog.text FROM pg_catalog.pg_publication WHERE puballtables ORDER BY pubname LIMIT 1";
    sql::select_latest(text, &[], |row| {
        name = row.text(1);
        Ok(())
    })?;
    Ok(name)
}
