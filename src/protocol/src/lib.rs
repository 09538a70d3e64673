//! The rules of awa_queue as pure code.
//!
//! What lives here: keys, lanes, tracks, gaps, holes, inserters, attempts, the ring ledger, backoff and the fold that rebuilds
//! a frontier from the log; when which task of maintenance runs. Every transition of the frontier is a function of this crate.
//! What it never does: look at a clock, draw a random number, touch PostgreSQL, allocate on the hot path, panic on input.
//! Times are microseconds; transaction identifiers are 64 bits; "process" is a small number that names a backend.
#![forbid(unsafe_code)]

#[macro_use]
pub mod mutants;

pub mod attempt;
pub mod backoff;
pub mod batch;
pub mod carry;
pub mod closed;
pub mod lane;
pub mod lifecycle;
pub mod limits;
pub mod overdue;
pub mod queue;
pub mod rebuild;
pub mod ring;
pub mod schedule;
pub mod throttle;
