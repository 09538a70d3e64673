//! What memory knows of the jobs that hold a segment. A hint, never a proof: it says which segments are worth reading.
//!
//! Reads shared memory only, a queue or a few slots of the pool under each lock.

use awa_protocol::attempt::State;
use awa_protocol::lane::SubLane;
use awa_protocol::limits::{LIVE_SEGMENTS, SLOTS_PER_LOOK};
use awa_protocol::queue::{Existence, NO_KEY, QueueFrontier};

use crate::frontier::{Frontier, PARTITIONS, SegmentInfo};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub generation: i64,
    pub running: u32,
    /// Came back, or being cancelled.
    pub holes: u32,
    /// Transactions that scans have passed by.
    pub gaps: u32,
    /// Queues whose scans have rows of it before them.
    pub waiting: u32,
}

impl Standing {
    pub fn looks_drained(&self) -> bool {
        *self == Self { generation: self.generation, ..Self::default() }
    }

    /// For people.
    pub fn detail(&self) -> String {
        let mut parts = Vec::new();
        let mut say = |count: u32, what: &str| {
            if count > 0 {
                parts.push(format!("{count} {what}"));
            }
        };
        say(self.running, "running");
        say(self.holes, "given back");
        say(self.gaps, "transactions passed by");
        say(self.waiting, "queues with jobs waiting in it");
        parts.join(", ")
    }
}

struct Board {
    all: heapless::Vec<Standing, LIVE_SEGMENTS>,
}

impl Board {
    fn of(&mut self, generation: i64) -> Option<&mut Standing> {
        self.all.iter_mut().find(|standing| standing.generation == generation)
    }

    fn add_queue(&mut self, queue: &QueueFrontier) {
        let waits = |sub: SubLane| match sub {
            SubLane::Immediate => queue.counts.immediate > 0,
            SubLane::Scheduled => queue.counts.scheduled > 0,
        };
        for gap in queue.gaps() {
            if let Some(standing) = self.of(gap.track.generation) {
                standing.gaps += 1;
            }
        }
        for index in 0..self.all.len() {
            let Some(standing) = self.all.get_mut(index) else { continue };
            // A head may be left of rows that were rolled back or cancelled: it counts only if the queue has such jobs at all.
            let open = |track: &awa_protocol::queue::Track| {
                track.id.generation == standing.generation && (track.has_turn() || (track.head != NO_KEY && waits(track.id.sub)))
            };
            if queue.tracks().iter().any(open) {
                standing.waiting += 1;
            }
        }
    }
}

/// Of each of these segments, in the same order.
pub fn of_segments(frontier: &Frontier, segments: &[SegmentInfo]) -> heapless::Vec<Standing, LIVE_SEGMENTS> {
    let mut board = Board { all: heapless::Vec::new() };
    for segment in segments {
        let _ = board.all.push(Standing { generation: segment.generation, ..Standing::default() });
    }
    for place in 0..frontier.queue_slots() {
        let queue = frontier.queue(place);
        if queue.existence != Existence::Free {
            board.add_queue(&queue);
        }
    }
    for partition in 0..PARTITIONS as u32 {
        let mut from = 0;
        loop {
            let done = frontier.with_partition(partition, |entries| {
                let reach = (entries.head.reach as usize).min(entries.entries.len());
                let to = (from + SLOTS_PER_LOOK).min(reach);
                for entry in entries.entries.get(from..to).unwrap_or(&[]) {
                    match entry.state {
                        State::Free => {}
                        State::Claimed => {
                            if let Some(standing) = board.of(entry.generation) {
                                standing.running += 1;
                            }
                        }
                        State::Hole | State::Guard => {
                            if let Some(standing) = board.of(entry.generation) {
                                standing.holes += 1;
                            }
                        }
                    }
                }
                to >= reach
            });
            if done {
                break;
            }
            from += SLOTS_PER_LOOK;
        }
    }
    board.all
}
