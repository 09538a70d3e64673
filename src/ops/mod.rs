//! The verbs: one file each, readable as a script over `frontier`, `store` and `protocol`. No `unsafe`, no SQL text.

pub mod adopt;
pub mod cancel;
pub mod carry;
pub mod claim;
pub mod deferred;
pub mod delete;
pub mod dlq;
pub mod doctor;
pub mod enqueue;
pub mod exits;
pub mod handle;
pub mod inspect;
pub mod metrics;
pub mod prune;
pub mod queues;
pub mod rescue;
pub mod retention;
pub mod retry;
pub mod rotate;
pub mod standing;
pub mod supersede;
pub mod taking;
pub mod tasks;
pub mod validate;
pub mod verify;
pub mod wait;
