//! From the name of a queue to its place in the frontier. A hit in the session's cache costs no lock; it is checked later, under the
//! queue's lock, by its stamp.

use std::cell::RefCell;
use std::collections::HashMap;

use awa_protocol::limits::QUEUE_NAME_BYTES;
use awa_protocol::queue::{Existence, QueueFrontier, Settings};
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, notes};
use crate::pg::call::clip;

#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub place: u16,
    pub queue_id: i32,
    stamp: u32,
}

thread_local! {
    static KNOWN: RefCell<(u64, u32, HashMap<Vec<u8>, Queue>)> = RefCell::new((0, 0, HashMap::new()));
}

pub fn shown(name: &[u8]) -> String {
    // A name that is nobody's may have any length.
    String::from_utf8_lossy(clip(name, QUEUE_NAME_BYTES)).into_owned()
}

pub fn missing(name: &[u8]) -> Error {
    Error::new(Code::ERRCODE_UNDEFINED_OBJECT, format!("queue \"{}\" does not exist", shown(name)))
        .hint(format!("Create it with awa.create_queue('{}').", shown(name).replace('\'', "''")))
}

/// Finds a queue by name. A queue that another transaction is creating is not there yet.
pub fn resolve(frontier: &Frontier, name: &[u8]) -> Result<Queue> {
    let known = KNOWN.with_borrow(|(word, ledger, queues)| {
        (*word == frontier.word() && *ledger == frontier.ledger.to_u32()).then(|| queues.get(name).copied()).flatten()
    });
    if let Some(queue) = known
        && queue.is_usable(&frontier.queue(queue.place))
    {
        return Ok(queue);
    }
    let found = match search(frontier, name) {
        Some(found) => found,
        None => {
            // While the frontier is built no queue is there.
            frontier.check_current()?;
            return Err(missing(name));
        }
    };
    KNOWN.with_borrow_mut(|(word, ledger, queues)| {
        if *word != frontier.word() || *ledger != frontier.ledger.to_u32() || queues.len() > 4096 {
            queues.clear();
            *word = frontier.word();
            *ledger = frontier.ledger.to_u32();
        }
        queues.insert(name.to_vec(), found);
    });
    Ok(found)
}

/// The place of a queue by its number, whoever may see it.
pub fn place_of(frontier: &Frontier, queue_id: i32) -> Option<u16> {
    (0..frontier.queue_slots()).find(|place| {
        let queue = frontier.queue(*place);
        queue.queue_id == queue_id && queue.existence != Existence::Free
    })
}

/// The queue of a row that names it by number.
pub fn by_id(frontier: &Frontier, queue_id: i32) -> Result<Queue> {
    match place_of(frontier, queue_id) {
        Some(place) => Ok(Queue::at(place, &frontier.queue(place))),
        None => {
            frontier.check_current()?;
            Err(Error::new(Code::ERRCODE_UNDEFINED_OBJECT, "the queue of the job has been dropped")
                .hint("Name another queue; see awa.queues."))
        }
    }
}

fn search(frontier: &Frontier, name: &[u8]) -> Option<Queue> {
    (0..frontier.queue_slots()).find_map(|place| {
        let queue = frontier.queue(place);
        let handle = Queue { place, queue_id: queue.queue_id, stamp: queue.stamp };
        (queue.name() == name && handle.is_usable(&queue)).then_some(handle)
    })
}

/// Does the queue exist for this session? One that is being dropped still does, one that another transaction creates not yet.
pub fn is_visible(place: u16, queue: &QueueFrontier) -> bool {
    match queue.existence {
        Existence::Live | Existence::Dropping => true,
        Existence::Creating => notes::created_here(place),
        Existence::Free => false,
    }
}

/// The queue of a job that was found in the frontier. Its place may have been given to another queue while this call waited for a lock.
pub fn of_job(frontier: &Frontier, place: u16, queue_id: i32) -> Result<Queue> {
    let queue = {
        let held = frontier.queue(place);
        (held.queue_id == queue_id).then(|| Queue::at(place, &held))
    };
    match queue {
        Some(queue) => Ok(queue),
        None => {
            frontier.check_current()?;
            Err(Error::new(Code::ERRCODE_UNDEFINED_OBJECT, "the queue has been dropped").detail("Its jobs went with it."))
        }
    }
}

impl Queue {
    pub fn at(place: u16, queue: &QueueFrontier) -> Self {
        Self { place, queue_id: queue.queue_id, stamp: queue.stamp }
    }

    pub fn is_usable(&self, queue: &QueueFrontier) -> bool {
        queue.stamp == self.stamp
            && match queue.existence {
                Existence::Live => true,
                Existence::Creating => notes::created_here(self.place),
                Existence::Free | Existence::Dropping => false,
            }
    }

    pub fn settings(&self, frontier: &Frontier) -> Settings {
        frontier.queue(self.place).settings
    }
}
