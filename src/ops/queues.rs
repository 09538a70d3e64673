//! Queues: create, alter, pause, resume, drop. Cold: rows of awa.queue_definitions, applied to the frontier when they commit.
//!
//! Locks: RowExclusive on awa.queue_definitions and the row of the queue; create_queue of the first queue also opens the first segment.

use awa_protocol::queue::{Existence, Settings};
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, notes};
use crate::ops::handle::{self, Queue};
use crate::ops::{rotate, validate};
use crate::pg::rel::{Lock, Rel, wait_for_lockers};
use crate::pg::sql;
use crate::store::queues::{self, Definition};
use crate::store::{deferred, instance};

/// In microseconds.
const DAY: i64 = 86_400_000_000;

/// What the caller gave; `None` leaves a setting as it is.
#[derive(Clone, Copy, Default)]
pub struct Wishes {
    pub max_attempts: Option<i32>,
    pub deadline: Option<i64>,
    pub heartbeat_timeout: Option<i64>,
    pub backoff: Option<i64>,
    pub backoff_max: Option<i64>,
    pub priority_ageing: Option<i64>,
    pub completed_retention: Option<i64>,
    pub failed_retention: Option<i64>,
    pub cancelled_retention: Option<i64>,
    pub dead_letters: Option<bool>,
    pub dead_letter_retention: Option<i64>,
}

impl Wishes {
    /// A length of zero switches a limit off.
    fn apply(&self, settings: &mut Settings) -> Result<()> {
        if let Some(value) = self.max_attempts {
            settings.max_attempts = i32::from(validate::max_attempts(value)?);
        }
        let wishes = [
            (self.deadline, &mut settings.deadline, "deadline"),
            (self.heartbeat_timeout, &mut settings.heartbeat_timeout, "heartbeat_timeout"),
            (self.backoff, &mut settings.backoff, "backoff"),
            (self.backoff_max, &mut settings.backoff_max, "backoff_max"),
            (self.priority_ageing, &mut settings.priority_ageing, "priority_ageing"),
            (self.completed_retention, &mut settings.completed_retention, "completed_retention"),
            (self.failed_retention, &mut settings.failed_retention, "failed_retention"),
            (self.cancelled_retention, &mut settings.cancelled_retention, "cancelled_retention"),
            (self.dead_letter_retention, &mut settings.dead_letter_retention, "dead_letter_retention"),
        ];
        for (wish, setting, name) in wishes {
            if wish.is_some() {
                *setting = validate::duration(wish, name)?;
            }
        }
        settings.dead_letters = self.dead_letters.unwrap_or(settings.dead_letters);
        if settings.backoff > settings.backoff_max {
            return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, "backoff must not be longer than backoff_max")
                .detail(format!("They are {} ms and {} ms.", settings.backoff / 1000, settings.backoff_max / 1000))
                .hint("Give both, so that backoff is the shorter one."));
        }
        Ok(())
    }
}

pub fn create(frontier: &Frontier, name: &[u8], wishes: &Wishes) -> Result<()> {
    validate::queue_name(name)?;
    let mut settings = Settings {
        paused: false,
        max_attempts: 25,
        deadline: 0,
        heartbeat_timeout: 0,
        backoff: 1_000_000,
        backoff_max: 86_400_000_000,
        priority_ageing: 60_000_000,
        completed_retention: 0,
        failed_retention: 7 * DAY,
        cancelled_retention: DAY,
        dead_letters: false,
        dead_letter_retention: 30 * DAY,
    };
    wishes.apply(&mut settings)?;
    rotate::ensure_open_segment(frontier)?;
    sql::as_owner(frontier.ledger, instance::write_if_missing)?;
    // One creator at a time: the second of two with one name waits, and then learns that the queue exists.
    let _definitions = Rel::open(queues::table()?, Lock::ShareRowExclusive)?;
    frontier.check_current()?;
    sql::as_owner(frontier.ledger, || {
        if queues::lock(name)?.is_some() {
            return Err(Error::new(Code::ERRCODE_DUPLICATE_OBJECT, format!("queue \"{}\" already exists", handle::shown(name)))
                .hint("Change its settings with awa.alter_queue()."));
        }
        let definition = Definition { queue_id: queues::next_id()?, name: name.to_vec(), settings };
        queues::insert(&definition)?;
        notes::reserve(frontier, 1)?;
        match install(frontier, &definition) {
            Some(queue) => {
                notes::push(notes::Note::QueueCreated { queue });
                Ok(())
            }
            None => Err(Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "no place is left for another queue")
                .detail(format!("awa.max_queues is {}.", frontier.queue_slots()))
                .hint("Drop unused queues, or raise awa.max_queues and restart the server.")),
        }
    })
}

fn install(frontier: &Frontier, definition: &Definition) -> Option<u16> {
    (0..frontier.queue_slots()).find(|place| {
        let mut queue = frontier.queue(*place);
        let free = queue.existence == Existence::Free;
        if free {
            queue.install(definition.queue_id, &definition.name, Existence::Creating, definition.settings);
        }
        free
    })
}

fn change(frontier: &Frontier, name: &[u8], change: impl FnOnce(&mut Settings) -> Result<()>) -> Result<()> {
    let queue = handle::resolve(frontier, name)?;
    sql::as_owner(frontier.ledger, || {
        let mut definition = queues::lock(name)?.ok_or_else(|| handle::missing(name))?;
        frontier.check_current()?;
        change(&mut definition.settings)?;
        queues::update(&definition)?;
        notes::reserve(frontier, 1)?;
        notes::push(notes::Note::QueueSettings { queue: queue.place, settings: definition.settings });
        Ok(())
    })
}

pub fn alter(frontier: &Frontier, name: &[u8], wishes: &Wishes) -> Result<()> {
    change(frontier, name, |settings| wishes.apply(settings))
}

pub fn set_paused(frontier: &Frontier, name: &[u8], paused: bool) -> Result<()> {
    change(frontier, name, |settings| {
        settings.paused = paused;
        Ok(())
    })
}

/// Without `force` a queue with unfinished jobs or dead letters stays; what was kept of its history goes with it, deleted by retention. New enqueues are refused from the call on; those under way are waited for.
pub fn drop(frontier: &Frontier, name: &[u8], force: bool) -> Result<()> {
    let queue = handle::resolve(frontier, name)?;
    notes::reserve(frontier, 1)?;
    let definition = sql::as_owner(frontier.ledger, || queues::lock(name))?.ok_or_else(|| handle::missing(name))?;
    frontier.check_current()?;
    begin_drop(frontier, queue)?;
    for segment in frontier.live_segments() {
        wait_for_lockers(segment.ready, Lock::Share);
    }
    notes::settle_prepared(frontier);
    let counts = frontier.queue(queue.place).counts;
    let unfinished = counts.immediate + counts.scheduled + counts.running;
    let own = notes::touches(queue.place);
    if (unfinished > 0 || own) && !force {
        return Err(Error::new(Code::ERRCODE_OBJECT_IN_USE, format!("queue \"{}\" has unfinished jobs", handle::shown(name)))
            .detail(if own {
                "This transaction has enqueued, claimed or finished jobs of it.".to_owned()
            } else {
                format!("{} are waiting, {} are running.", counts.immediate + counts.scheduled, counts.running)
            })
            .hint("Finish or cancel them, or use awa.drop_queue(queue, force => true) to discard them."));
    }
    if counts.dead_lettered > 0 && !force {
        return Err(Error::new(Code::ERRCODE_OBJECT_IN_USE, format!("queue \"{}\" has dead letters", handle::shown(name)))
            .detail(format!("There are {}; see awa.dlq.", counts.dead_lettered))
            .hint("Retry or purge them, or use awa.drop_queue(queue, force => true) to discard them."));
    }
    sql::as_owner(frontier.ledger, || {
        deferred::delete_of_queue(definition.queue_id)?;
        queues::mark_dropped(definition.queue_id)
    })
}

fn begin_drop(frontier: &Frontier, queue: Queue) -> Result<()> {
    {
        let mut held = frontier.queue(queue.place);
        if queue.is_usable(&held) {
            if held.existence == Existence::Live {
                held.existence = Existence::Dropping;
            }
        } else {
            std::mem::drop(held);
            frontier.check_current()?;
            return Err(Error::new(Code::ERRCODE_UNDEFINED_OBJECT, "the queue has been dropped"));
        }
    }
    notes::push(notes::Note::QueueDropped { queue: queue.place });
    Ok(())
}
