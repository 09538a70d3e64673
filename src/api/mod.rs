//! Thin SQL functions by audience: decode arguments, call one verb, encode the result. The file is the privilege boundary.

pub mod admin;
pub mod diagnose;
pub mod inspect;
pub mod maintenance;
#[cfg(feature = "points")]
pub mod points;
pub mod producer;
pub mod worker;
