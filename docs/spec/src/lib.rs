//! Models of awa_queue for an explicit-state checker: every interleaving of a few sessions is visited, none is drawn by lot.
//!
//! `queue`: the machine of producers, claimers, finishers, carriers, ring and crash, over the real types of `awa_protocol`.
//! `locks`: the order of locks, as `docs/locking.md` has it. `check`: runs a model, names what is violated.
//! `actions`: which function of the server does what an action of the model does; a test fails when a name is gone.
//! What a model leaves out is written at its head; README.md has the table of properties, states and witnesses.
#![forbid(unsafe_code)]

pub mod actions;
pub mod check;
pub mod locks;
pub mod properties;
pub mod queue;
