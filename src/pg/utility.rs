//! Commands that need a database without sessions: DROP DATABASE, RENAME, SET TABLESPACE, and its use as a TEMPLATE. Who keeps
//! sessions of his own in databases is told before such a command. For every other command the hook costs a look at its tag. No error of
//! a command passes through a guard of ours, which would lose some of its fields. Installed once, in the postmaster; the hook before it is called in any case.
use core::ffi::{CStr, c_char};
use std::sync::OnceLock;

use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;

use super::raw;

/// Told of a command that makes or changes databases, before it runs: also which database it needs empty, if that one exists and the
/// caller may do it. May wait, and raise. Not told how the command ended: the transaction's end says that.
pub type Watcher = fn(database: Option<u32>);

type Hook = unsafe extern "C-unwind" fn(
    *mut pg_sys::PlannedStmt,
    *const c_char,
    bool,
    pg_sys::ProcessUtilityContext::Type,
    pg_sys::ParamListInfo,
    *mut pg_sys::QueryEnvironment,
    *mut pg_sys::DestReceiver,
    *mut pg_sys::QueryCompletion,
);

static WATCHER: OnceLock<(Watcher, Hook)> = OnceLock::new();

/// From `_PG_init`, while the server loads its libraries.
pub fn watch(watcher: Watcher) {
    // SAFETY: the postmaster is single-threaded; the hook before is kept and called.
    unsafe {
        let before: Hook = pg_sys::ProcessUtility_hook.unwrap_or(raw::standard_ProcessUtility);
        if WATCHER.set((watcher, before)).is_ok() {
            pg_sys::ProcessUtility_hook = Some(on_utility);
        }
    }
}

/// No Rust value and no guard lives across the call of the hook before: an error of the command jumps over this frame, unchanged.
#[allow(clippy::too_many_arguments)]
unsafe extern "C-unwind" fn on_utility(
    statement: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    read_only: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    let Some((watcher, before)) = WATCHER.get() else { return };
    // SAFETY: the server passes a planned utility statement; its node begins with its tag, and is live for the call.
    let node = unsafe { (*statement).utilityStmt };
    // SAFETY: as above.
    if unsafe { is_about_databases(node) } {
        // SAFETY: entered from C on the main thread; panics become ereport here, after the destructors of the frames above.
        unsafe { pg_sys::panic::pgrx_extern_c_guard(|| watcher(named_by(node).and_then(owned_database))) };
    }
    // SAFETY: the arguments as they came.
    unsafe { before(statement, text, read_only, context, params, environment, receiver, completion) };
}

/// # Safety
/// `statement` is a live node of a statement.
unsafe fn is_about_databases(statement: *mut pg_sys::Node) -> bool {
    // SAFETY: the cast is to the type that the tag names.
    unsafe {
        match (*statement).type_ {
            NodeTag::T_DropdbStmt | NodeTag::T_AlterDatabaseStmt | NodeTag::T_CreatedbStmt => true,
            // The tag of every RENAME.
            NodeTag::T_RenameStmt => (*statement.cast::<pg_sys::RenameStmt>()).renameType == pg_sys::ObjectType::OBJECT_DATABASE,
            _ => false,
        }
    }
}

/// Whose sessions must go.
///
/// # Safety
/// `statement` is a live node of a statement about databases.
unsafe fn named_by(statement: *mut pg_sys::Node) -> Option<*const c_char> {
    // SAFETY: each cast is to the type that the tag names; options are lists of DefElem.
    unsafe {
        match (*statement).type_ {
            NodeTag::T_DropdbStmt => Some((*statement.cast::<pg_sys::DropdbStmt>()).dbname.cast_const()),
            NodeTag::T_RenameStmt => Some((*statement.cast::<pg_sys::RenameStmt>()).subname.cast_const()),
            NodeTag::T_AlterDatabaseStmt => {
                let alter = &*statement.cast::<pg_sys::AlterDatabaseStmt>();
                option_named(alter.options, c"tablespace").map(|_| alter.dbname.cast_const())
            }
            NodeTag::T_CreatedbStmt => {
                let create = &*statement.cast::<pg_sys::CreatedbStmt>();
                let template = option_named(create.options, c"template").filter(|option| !(**option).arg.is_null());
                // May raise (not a name): unwinds; the command would say the same.
                template.map(|option| pg_sys::defGetString(option).cast_const())
            }
            _ => None,
        }
    }
}

/// # Safety
/// `options` is null or a live list of DefElem.
unsafe fn option_named(options: *mut pg_sys::List, name: &CStr) -> Option<*mut pg_sys::DefElem> {
    // SAFETY: null or live.
    let options = unsafe { options.as_ref() }?;
    for n in 0..usize::try_from(options.length).unwrap_or(0) {
        // SAFETY: the list has so many cells; each points to a DefElem with a name.
        let (option, given) = unsafe {
            let option = (*options.elements.add(n)).ptr_value.cast::<pg_sys::DefElem>();
            (option, CStr::from_ptr((*option).defname))
        };
        if given == name {
            return Some(option);
        }
    }
    None
}

/// The database of this name, if it exists and the caller owns it: only then the command has a chance.
fn owned_database(name: *const c_char) -> Option<u32> {
    if name.is_null() {
        return None;
    }
    // SAFETY: inside a transaction; a null-terminated name. Catalog reads; may raise: unwinds.
    unsafe {
        let oid = pg_sys::get_database_oid(name, true);
        let user = pg_sys::GetUserId();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let owned = oid != pg_sys::InvalidOid && pg_sys::pg_database_ownercheck(oid, user);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let owned = oid != pg_sys::InvalidOid && pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, oid, user);
        owned.then_some(oid.into())
    }
}
