//! The machine of the queue: producers, claimers, finishers, carriers, the ring, crashes, over the real types of `awa_protocol`.
//!
//! A session has a script of verbs; a verb is a sequence of steps, each of which is what happens under one lock, or one append, or one
//! callback. A state is the log, shared memory and how far everybody has come; `actions` lists all steps that may come next, and the
//! checker takes them all. Histories that differ only in who came first are one state wherever nothing depends on it.

mod carrier;
mod claimer;
pub mod configurations;
mod crash;
mod finisher;
mod invariants;
mod log;
mod maintainer;
mod model;
mod producer;
mod transactions;
mod world;

pub use carrier::Carry;
pub use finisher::{Cancel, Finish};
pub use maintainer::Maintain;
pub use model::{Act, Machine};
pub use world::{Config, Verb, World};

use crate::actions::Action;
use world::Op;

/// Which of several possibilities a step takes.
pub type Choice = u8;
/// What was done, and what the session does next.
pub type Step = (Action, Op);
