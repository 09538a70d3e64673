//! What this session remembers between steps: which queues nobody claims from, and which segments need no look for a while.
//!
//! A hint for the maintainer, who takes many steps in one session; nothing depends on it but the order of work. It is void after a rebuild.

use std::cell::RefCell;

use awa_protocol::lane::Position;
use awa_protocol::limits::LIVE_SEGMENTS;
use awa_protocol::queue::Existence;

use crate::frontier::Frontier;
use crate::pg::xact;

/// A queue from which nothing was claimed for so long, in microseconds, is stalled.
const STALL: i64 = 10_000_000;
/// A segment that could not be emptied is looked at again after this.
const PUT_OFF: i64 = 10_000_000;

#[derive(Clone, Copy, Default)]
struct Pace {
    stamp: u32,
    claimed: u64,
    since: i64,
}

#[derive(Default)]
struct Memory {
    ledger: u32,
    word: u64,
    /// By place.
    paces: Vec<Pace>,
    /// Generation, and when it may be looked at again.
    put_off: heapless::Vec<(i64, i64), LIVE_SEGMENTS>,
    /// Generation, lane, and where the last full step stopped: what is below has been moved, unless the step was rolled back.
    resume: Option<(i64, i32, Position)>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::new(Memory::default());
}

fn with_memory<R>(frontier: &Frontier, body: impl FnOnce(&mut Memory) -> R) -> R {
    MEMORY.with_borrow_mut(|memory| {
        if memory.word != frontier.word() || memory.ledger != frontier.ledger.to_u32() {
            *memory = Memory { word: frontier.word(), ledger: frontier.ledger.to_u32(), ..Memory::default() };
        }
        body(memory)
    })
}

/// By place: is nobody coming for the due jobs of this queue?
pub struct Stalled(Vec<bool>);

impl Stalled {
    pub fn look(frontier: &Frontier) -> Self {
        let now = xact::now();
        let places = frontier.queue_slots();
        with_memory(frontier, |memory| {
            memory.paces.resize(usize::from(places), Pace { since: now, ..Pace::default() });
            let look = |(place, pace): (u16, &mut Pace)| {
                let (stamp, claimed, paused, lives) = {
                    let queue = frontier.queue(place);
                    (queue.stamp, queue.totals.claimed, queue.settings.paused, queue.existence == Existence::Live)
                };
                if pace.stamp != stamp || pace.claimed != claimed {
                    *pace = Pace { stamp, claimed, since: now };
                }
                lives && (paused || now.saturating_sub(pace.since) >= STALL)
            };
            Self((0..places).zip(memory.paces.iter_mut()).map(look).collect())
        })
    }

    pub fn has(&self, place: u16) -> bool {
        self.0.get(usize::from(place)).copied().unwrap_or(false)
    }
}

pub fn is_put_off(frontier: &Frontier, generation: i64) -> bool {
    let now = xact::now();
    with_memory(frontier, |memory| {
        memory.put_off.retain(|(_, until)| *until > now && *until <= now + PUT_OFF);
        memory.put_off.iter().any(|(other, _)| *other == generation)
    })
}

pub fn put_off(frontier: &Frontier, generation: i64) {
    let until = xact::now().saturating_add(PUT_OFF);
    with_memory(frontier, |memory| {
        let _ = memory.put_off.push((generation, until));
    });
}

pub fn resume(frontier: &Frontier, generation: i64, lane: i32) -> Option<Position> {
    let here = |(other, number, _): &(i64, i32, Position)| *other == generation && *number == lane;
    with_memory(frontier, |memory| memory.resume.filter(here).map(|(.., at)| at))
}

pub fn set_resume(frontier: &Frontier, generation: i64, lane: i32, at: Position) {
    with_memory(frontier, |memory| memory.resume = Some((generation, lane, at)));
}

/// The next look at any lane begins at its cursor.
pub fn begin_anew(frontier: &Frontier) {
    with_memory(frontier, |memory| memory.resume = None);
}

/// The lane was read to its end: the next step begins at its cursor, for what was rolled back or left.
pub fn forget_resume(frontier: &Frontier, generation: i64, lane: i32) {
    if resume(frontier, generation, lane).is_some() {
        begin_anew(frontier);
    }
}
