//! Which server and database the jobs belong to.
//!
//! Tables written: awa.instance, awa.restoring. Tables read: the same, awa.ring_rotations. A copy of the database carries the row of the
//! original, and must not run its jobs a second time. The caller is inside `sql::as_owner`.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::pg::{rel, sql, xact};
use crate::store::datum;

/// System identifier, database, and the ledger: it names the installation of the extension.
type Owner = (i64, i64, i64);

fn mine() -> Result<Owner> {
    let ledger = rel::relation_oid("awa", "ring_rotations").map_or(0, |oid| i64::from(oid.to_u32()));
    Ok((xact::system_identifier() as i64, i64::from(xact::database_oid()), ledger))
}

struct Written {
    owner: Option<Owner>,
    restoring: bool,
    has_ring: bool,
}

fn written() -> Result<Written> {
    let mut found = Written { owner: None, restoring: false, has_ring: false };
    let text = "SELECT i.system_identifier, i.database_oid::bigint, i.ledger_oid::bigint, \
                EXISTS (SELECT FROM awa.restoring), EXISTS (SELECT FROM awa.ring_rotations) \
           FROM (SELECT) AS one LEFT JOIN awa.instance AS i ON true";
    sql::select_latest(text, &[], |row| {
        found = Written {
            owner: row.i64(1).zip(row.i64(2)).zip(row.i64(3)).map(|((system, database), ledger)| (system, database, ledger)),
            restoring: row.bool(4).unwrap_or(false),
            has_ring: row.bool(5).unwrap_or(false),
        };
        Ok(())
    })?;
    Ok(found)
}

/// Are the jobs ours? None: nothing was ever enqueued here. Not while a restore is under way.
pub fn owned() -> Result<Option<bool>> {
    let found = written()?;
    if found.restoring || (found.owner.is_none() && found.has_ring) {
        return Ok(Some(false));
    }
    let mine = mine()?;
    Ok(found.owner.map(|theirs| theirs == mine))
}

fn under_restore() -> Error {
    Error::new(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "a restore into this database is under way")
        .detail("awa.pre_restore() was called; until the restore is complete nothing may look at the jobs.")
        .hint("When it is complete, call awa.post_restore().")
}

/// Refuses a database that is a copy, or is being restored: a ring without an owner is half there. Neither: nothing was ever enqueued.
pub fn check() -> Result<()> {
    let found = written()?;
    if found.restoring {
        return Err(under_restore());
    }
    let foreign = match found.owner {
        Some(theirs) => theirs != mine()?,
        None => found.has_ring,
    };
    if !foreign {
        return Ok(());
    }
    Err(Error::new(
        Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "the jobs of this database belong to another server or database",
    )
    .detail("It was restored or copied; running its jobs here could run them twice.")
    .hint("If this copy is to run them, call awa.adopt()."))
}

pub fn set_restoring(restoring: bool) -> Result<()> {
    if restoring {
        let at = xact::now();
        sql::execute(
            "INSERT INTO awa.restoring (only_row, since) VALUES (true, $1) ON CONFLICT DO NOTHING",
            &[(pg_sys::TIMESTAMPTZOID, Some(datum::i64(at)))],
        )?;
    } else {
        sql::execute("DELETE FROM awa.restoring", &[])?;
    }
    Ok(())
}

pub fn write_if_missing() -> Result<()> {
    if written()?.owner.is_none() {
        write()?;
    }
    Ok(())
}

/// Makes this server, database and installation the owner.
pub fn write() -> Result<()> {
    let (system, database, ledger) = mine()?;
    sql::execute(
        "INSERT INTO awa.instance (only_row, system_identifier, database_oid, ledger_oid, since) \
         VALUES (true, $1, $2::oid, $3::oid, $4) \
         ON CONFLICT (only_row) DO UPDATE SET system_identifier = EXCLUDED.system_identifier, database_oid = EXCLUDED.database_oid, \
             ledger_oid = EXCLUDED.ledger_oid, since = EXCLUDED.since",
        &[
            (pg_sys::INT8OID, Some(datum::i64(system))),
            (pg_sys::INT8OID, Some(datum::i64(database))),
            (pg_sys::INT8OID, Some(datum::i64(ledger))),
            (pg_sys::TIMESTAMPTZOID, Some(datum::i64(xact::now()))),
        ],
    )?;
    Ok(())
}

/// Do the jobs belong to another? Refuses while a restore is under way.
pub fn is_foreign() -> Result<bool> {
    let found = written()?;
    if found.restoring {
        return Err(under_restore());
    }
    is_foreign_anyway()
}

/// As `is_foreign`, also while a restore is under way.
pub fn is_foreign_anyway() -> Result<bool> {
    let found = written()?;
    Ok(match found.owner {
        Some(theirs) => theirs != mine()?,
        None => found.has_ring,
    })
}
