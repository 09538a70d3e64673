//! One file per table family: the shape of its rows, how they are appended and read. No policy.

pub mod datum;
pub mod deferred;
pub mod errors;
pub mod evidence;
pub mod extension;
pub mod finished;
pub mod instance;
pub mod kinds;
pub mod ledger;
pub mod queues;
pub mod ready;
pub mod segments;
