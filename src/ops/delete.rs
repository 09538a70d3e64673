//! Delete: a finished job is shown and counted no more, and cannot be tried again.
//!
//! In the ring evidence is written that supersedes its end (`terminal_removed` of the seeds); its row goes with its segment. On a shelf
//! the row is deleted. Locks, waits: as `retry`.

use awa_protocol::lifecycle::Outcome;

use crate::error::Result;
use crate::frontier::Frontier;
use crate::ops::retry::take_from_shelf;
use crate::ops::supersede::{self, Ring};
use crate::store::finished::Shelf;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    Done,
    NotFound,
    NotFinished,
}

impl Deleted {
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "deleted",
            Self::NotFound => "not_found",
            Self::NotFinished => "not_finished",
        }
    }
}

pub fn delete(frontier: &Frontier, job_id: i64) -> Result<Deleted> {
    for _ in 0..2 {
        match supersede::take(frontier, job_id, Outcome::Removed, Outcome::is_history)? {
            Ring::Mine(ended) => {
                supersede::close(&ended, Outcome::Removed)?;
                return Ok(Deleted::Done);
            }
            Ring::NotFinished => return Ok(Deleted::NotFinished),
            Ring::RemovedHere => return Ok(Deleted::NotFound),
            Ring::Unwanted | Ring::Elsewhere => {}
        }
        for shelf in Shelf::ALL {
            if take_from_shelf(frontier, shelf, job_id, true)?.is_some() {
                return Ok(Deleted::Done);
            }
        }
    }
    Ok(Deleted::NotFound)
}
