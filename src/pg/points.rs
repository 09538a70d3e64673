//! Points: named places where a test stops a session, or makes it fail, and faults of the server's own calls, counted down.
//! With the cargo feature `points` off, as in everything that users install, all of this is nothing at all: no code, no name, no memory.
//! Under a lock, in a callback or in a critical section only `kill` acts; the other actions need a place where an error is legal.
//! Never: policy. Which point means what is said where it is reached, and in `docs/testing.md`.

#[cfg(feature = "points")]
mod armed;
#[cfg(feature = "points")]
mod clock;
#[cfg(feature = "points")]
mod faults;
#[cfg(feature = "points")]
mod jitter;

#[cfg(feature = "points")]
pub use armed::{ACTIONS, Action, Seen, arm, disarm_all, reach, reached, release};
#[cfg(feature = "points")]
pub use clock::{clock_offset, set_clock};
#[cfg(feature = "points")]
pub use faults::{clear_fault, fail_nth, fails, may_fail};
#[cfg(feature = "points")]
pub use jitter::set_jitter;

/// From `_PG_init`.
#[cfg(feature = "points")]
pub fn register() {
    armed::register();
    clock::register();
    jitter::register();
}

/// What of the server may fail. Each stands before a call that may raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Memory: of the server, or reserved by ourselves.
    Alloc,
    /// A row into a table, or its entry into an index: no room on disk.
    Append,
    /// A lock of a relation or a wait for a transaction: deadlock.
    Lock,
    /// A place where a cancel is noticed.
    Interrupt,
    /// A statement of ours, or a read of the catalog.
    Sql,
    /// A read of a table: a page that cannot be read.
    Read,
}

#[cfg(not(feature = "points"))]
#[inline(always)]
pub fn reach(_name: &'static str) {}

#[cfg(not(feature = "points"))]
#[inline(always)]
pub fn may_fail(_fault: Fault) {}

#[cfg(not(feature = "points"))]
#[inline(always)]
pub fn fails(_fault: Fault) -> bool {
    false
}

#[cfg(not(feature = "points"))]
#[inline(always)]
pub fn clock_offset() -> i64 {
    0
}

#[cfg(not(feature = "points"))]
pub fn register() {}
