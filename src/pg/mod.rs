//! What lives here: everything that touches PostgreSQL by pointer, and all `unsafe` of the crate.
//! Contract: the vocabulary offered upwards is safe and total; errors of the server arrive as panics that the call
//! boundary (`call`) turns back into an ereport, so destructors run; our own errors are `crate::error::Error`.
//! Never: policy. Nothing here knows what the rows mean.
//! Order to read: raw, xact, rel, call, append, xid, scan, shmem, sql, truncate, wait, bgworker, utility.
#![allow(unsafe_code, dead_code, unused_imports)]

pub mod append;
pub mod array;
pub mod bgworker;
#[macro_use]
pub mod call;
pub mod databases;
mod locked;
pub mod memory;
pub mod points;
mod raw;
pub mod rel;
pub mod row;
pub mod scan;
pub mod shmem;
pub mod sleep;
pub mod sql;
pub mod srf;
pub mod trigger;
pub mod truncate;
pub mod utility;
pub mod wait;
pub mod xact;
pub mod xid;
