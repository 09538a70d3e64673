//! Commands that need a database without sessions: DROP DATABASE, RENAME, SET TABLESPACE, and its use as a TEMPLATE. Who keeps
//! sessions of his own in databases is told before such a command and after it. For every other command the hook costs a look at its
//! tag. Installed once, in the postmaster; the hook before it is called in any case.
use core::ffi::{CStr, c_char};
use std::sync::OnceLock;

use pgrx::pg_sys;
use pgrx::pg_sys::NodeTag;

use super::raw;
use crate::error::Result;

#[derive(Clone, Copy)]
pub struct Watcher {
    /// The caller may do it, and the database exists. May wait, and raise.
    pub before: fn(database: u32),
    /// A command that makes or changes a database, or one that `before` was told of, has ended, well or badly; its transaction has
    /// not. Must not raise. Not called when the session ends meanwhile.
    pub after: fn(),
}

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

/// No Rust value lives across the plain call: an error of the command may jump over this frame.
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
    // SAFETY: the server passes a planned utility statement; its node begins with its tag.
    let tag = unsafe { (*(*statement).utilityStmt).type_ };
    if !matches!(tag, NodeTag::T_DropdbStmt | NodeTag::T_RenameStmt | NodeTag::T_AlterDatabaseStmt | NodeTag::T_CreatedbStmt) {
        // SAFETY: the arguments as they came.
        unsafe { before(statement, text, read_only, context, params, environment, receiver, completion) };
        return;
    }
    // SAFETY: entered from C on the main thread; panics become ereport here, after the destructors of `watched` have run.
    unsafe {
        pg_sys::panic::pgrx_extern_c_guard(|| {
            let mut watch = Watch { watcher: *watcher, concerned: false };
            watch.begin((*statement).utilityStmt);
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                before(statement, text, read_only, context, params, environment, receiver, completion);
            });
        });
    }
}

/// Between `before` and `after`; ended by its destructor, also when an error unwinds.
struct Watch {
    watcher: Watcher,
    concerned: bool,
}

impl Watch {
    fn begin(&mut self, statement: *mut pg_sys::Node) {
        // SAFETY: the node of the utility statement, live for the call.
        let (name, changes) = unsafe { database_named_by(statement) };
        self.concerned = changes;
        if let Some(database) = name.and_then(owned_database) {
            // Noted first: `before` may raise after it has done something.
            self.concerned = true;
            (self.watcher.before)(database);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.concerned {
            (self.watcher.after)();
        }
    }
}

/// Whose sessions must go, and whether databases change.
///
/// # Safety
/// `statement` is a live node of a statement.
unsafe fn database_named_by(statement: *mut pg_sys::Node) -> (Option<*const c_char>, bool) {
    // SAFETY: each cast is to the type that the tag names; options are lists of DefElem.
    unsafe {
        match (*statement).type_ {
            NodeTag::T_DropdbStmt => (Some((*statement.cast::<pg_sys::DropdbStmt>()).dbname.cast_const()), false),
            NodeTag::T_RenameStmt => {
                let rename = &*statement.cast::<pg_sys::RenameStmt>();
                let of_database = rename.renameType == pg_sys::ObjectType::OBJECT_DATABASE;
                (of_database.then_some(rename.subname.cast_const()), of_database)
            }
            NodeTag::T_AlterDatabaseStmt => {
                let alter = &*statement.cast::<pg_sys::AlterDatabaseStmt>();
                let moves = option_named(alter.options, c"tablespace").is_some();
                (moves.then_some(alter.dbname.cast_const()), true)
            }
            NodeTag::T_CreatedbStmt => {
                let create = &*statement.cast::<pg_sys::CreatedbStmt>();
                let template = option_named(create.options, c"template").filter(|option| !(**option).arg.is_null());
                // May raise (not a name): unwinds; the command would say the same.
                (template.map(|option| pg_sys::defGetString(option).cast_const()), true)
            }
            _ => (None, false),
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
