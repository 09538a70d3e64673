//! The harness of awa_queue: private PostgreSQL trees, clusters, regression runs, client-side tests and the demo.
//!
//! It talks to servers through an ordinary driver and through signals only. It never links pgrx.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod build;
pub mod cassert;
pub mod cluster;
pub mod demo;
pub mod dev;
pub mod layout;
pub mod mutants;
pub mod points;
pub mod process;
pub mod regress;
pub mod report;
pub mod suites;
pub mod test_run;
pub mod tree;
