//! Faults of this session: the n-th call of a class fails as the server would fail it.
use std::cell::Cell;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;

use super::{Fault, jitter};
use crate::error::{Error, Result};
use crate::pg::call::raise;

/// A class, or any; and how many calls to the one that fails, 0 for none.
type Countdown = (Option<Fault>, u32);

thread_local! {
    static LEFT: Cell<Countdown> = const { Cell::new((None, 0)) };
}

const CLASSES: [(&str, Option<Fault>); 7] = [
    ("pg.any", None),
    ("pg.alloc", Some(Fault::Alloc)),
    ("pg.append", Some(Fault::Append)),
    ("pg.lock", Some(Fault::Lock)),
    ("pg.interrupt", Some(Fault::Interrupt)),
    ("pg.sql", Some(Fault::Sql)),
    ("pg.read", Some(Fault::Read)),
];

/// The n-th call of the class from now on fails, once.
pub fn fail_nth(class: &str, n: u32) -> Result<()> {
    let Some((_, fault)) = CLASSES.iter().find(|(name, _)| *name == class) else {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, format!("there is no class of faults \"{class}\"")));
    };
    LEFT.set((*fault, n));
    Ok(())
}

/// How many calls were still to come; 0 when it has failed.
pub fn clear_fault() -> u32 {
    LEFT.replace((None, 0)).1
}

/// Stands before a call of the server that may raise.
#[inline]
pub fn may_fail(fault: Fault) {
    if fails(fault) {
        raise(injected(fault));
    }
}

/// For a call of ours that reports failure by its result.
#[inline]
pub fn fails(fault: Fault) -> bool {
    jitter::tremble();
    let (class, left) = LEFT.get();
    left != 0 && class.is_none_or(|class| class == fault) && count_down(class, left)
}

#[cold]
fn count_down(class: Option<Fault>, left: u32) -> bool {
    // SAFETY: plain reads of backend-local globals; cannot raise.
    if unsafe { pg_sys::InterruptHoldoffCount != 0 || pg_sys::CritSectionCount != 0 } {
        return false;
    }
    LEFT.set((class, left - 1));
    left == 1
}

fn injected(fault: Fault) -> Error {
    let (code, what) = match fault {
        Fault::Alloc => (Code::ERRCODE_OUT_OF_MEMORY, "out of memory"),
        Fault::Append => (Code::ERRCODE_DISK_FULL, "could not extend file"),
        Fault::Lock => (Code::ERRCODE_T_R_DEADLOCK_DETECTED, "deadlock detected"),
        Fault::Interrupt => (Code::ERRCODE_QUERY_CANCELED, "canceling statement due to user request"),
        Fault::Sql => (Code::ERRCODE_INSUFFICIENT_RESOURCES, "a statement of the library failed"),
        Fault::Read => (Code::ERRCODE_IO_ERROR, "could not read block"),
    };
    Error::new(code, format!("{what} (injected)"))
}
