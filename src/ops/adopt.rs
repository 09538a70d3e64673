//! Adopt: make a restored or copied database the owner of its jobs.
//!
//! Rows written: one of awa.instance. Nothing runs in a copy before this commits, so no frontier has to be changed: the next verb builds
//! it. Leases of the original are void here only when their jobs are finished or claimed again; every build draws leases anew.

use crate::error::Result;
use crate::frontier::{ledger_oid, require_preloading};
use crate::pg::sql;
use crate::store::instance;

pub fn adopt() -> Result<bool> {
    require_preloading()?;
    sql::as_owner(ledger_oid()?, instance::adopt)
}
