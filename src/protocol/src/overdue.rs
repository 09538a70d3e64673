//! Which attempts are overdue, and which of them one pass of rescue takes: fair between queues, the most overdue of each first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::attempt::{Entry, State};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    Deadline,
    Heartbeat,
}

/// Since when the attempt is overdue. `None`: it is not, or somebody is ending it. Whether its claim has committed is asked apart.
pub fn overdue_since(entry: &Entry, by: Overdue, now: i64) -> Option<i64> {
    if entry.state != State::Claimed || (entry.close_xid != 0 && !mutant!("rescue_takes_closing")) {
        return None;
    }
    let limit = match by {
        Overdue::Deadline if entry.deadline != 0 => entry.deadline,
        Overdue::Heartbeat if entry.heartbeat_timeout != 0 => entry.heartbeat_at.saturating_add(entry.heartbeat_timeout),
        _ => return None,
    };
    (limit <= now).then_some(limit)
}

/// At most `limit` attempts, shared evenly between the queues that have any. Bounded by `limit`, however many are offered.
pub struct Selection<T> {
    limit: usize,
    chosen: usize,
    /// By queue; the top is the least overdue, the first to go.
    queues: BTreeMap<u16, BinaryHeap<(i64, T)>>,
    left_out: bool,
}

impl<T: Ord + Copy> Selection<T> {
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), chosen: 0, queues: BTreeMap::new(), left_out: false }
    }

    fn longest(&self) -> (usize, Option<u16>) {
        let longest = self.queues.iter().max_by_key(|(queue, heap)| (heap.len(), Reverse(**queue)));
        longest.map_or((0, None), |(queue, heap)| (heap.len(), Some(*queue)))
    }

    pub fn offer(&mut self, queue: u16, since: i64, item: T) {
        if self.chosen >= self.limit {
            self.left_out = true;
            let own = self.queues.get(&queue).map_or(0, BinaryHeap::len);
            let (most, longest) = self.longest();
            // A queue that has its share gives up its own least overdue one; another takes from the queue that has most.
            let giver = if own >= most || most <= own + 1 { Some(queue).filter(|_| own > 0) } else { longest };
            let giver = if mutant!("first_come_first_rescued") { None } else { giver };
            let Some(heap) = giver.and_then(|giver| self.queues.get_mut(&giver)) else { return };
            if giver == Some(queue) && heap.peek().is_some_and(|(least, _)| *least <= since) {
                return;
            }
            heap.pop();
            self.chosen -= 1;
        }
        self.queues.entry(queue).or_default().push((since, item));
        self.chosen += 1;
    }

    pub fn is_empty(&self) -> bool {
        self.chosen == 0
    }

    /// More was offered than is taken.
    pub fn left_out(&self) -> bool {
        self.left_out
    }

    /// The chosen ones, a queue after the other in turn, each with its most overdue first.
    pub fn into_turns(self) -> Vec<T> {
        let mut turns: Vec<(usize, u16, T)> = Vec::with_capacity(self.chosen);
        for (queue, heap) in self.queues {
            for (turn, (_, item)) in heap.into_sorted_vec().into_iter().enumerate() {
                turns.push((turn, queue, item));
            }
        }
        turns.sort_by_key(|(turn, queue, _)| (*turn, *queue));
        turns.into_iter().map(|(.., item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn claimed() -> Entry {
        Entry { job_id: 1, state: State::Claimed, ..Entry::free() }
    }

    fn judges_well() -> bool {
        let entry = Entry { deadline: 100, close_xid: 7, ..claimed() };
        overdue_since(&entry, Overdue::Deadline, 200).is_none()
    }

    fn shares_well() -> bool {
        let mut selection = Selection::new(2);
        for n in 0..5 {
            selection.offer(1, n, (1, n));
        }
        selection.offer(2, 9, (2, 9));
        selection.into_turns() == [(1, 0), (2, 9)]
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn mutants_of_rescue_are_caught() {
        for (name, good) in [("rescue_takes_closing", judges_well as fn() -> bool), ("first_come_first_rescued", shares_well)] {
            crate::mutants::set(name);
            let survived = good();
            crate::mutants::set("");
            assert!(!survived, "nobody noticed {name}");
        }
    }

    #[test]
    fn overdue_is_only_what_runs_and_has_passed_its_limit() {
        assert!(judges_well() && shares_well());
        let entry = Entry { deadline: 100, heartbeat_at: 50, heartbeat_timeout: 30, ..claimed() };
        assert_eq!(overdue_since(&entry, Overdue::Deadline, 99), None);
        assert_eq!(overdue_since(&entry, Overdue::Deadline, 100), Some(100));
        assert_eq!(overdue_since(&entry, Overdue::Heartbeat, 79), None);
        assert_eq!(overdue_since(&entry, Overdue::Heartbeat, 80), Some(80));
        for other in [
            Entry { close_xid: 7, ..entry },
            Entry { state: State::Hole, ..entry },
            Entry { state: State::Guard, ..entry },
            Entry { deadline: 0, heartbeat_timeout: 0, ..entry },
        ] {
            assert_eq!(overdue_since(&other, Overdue::Deadline, i64::MAX), None);
            assert_eq!(overdue_since(&other, Overdue::Heartbeat, i64::MAX), None);
        }
    }

    #[test]
    fn a_crowded_queue_leaves_room_for_the_others() {
        let mut selection = Selection::new(10);
        for n in 0..1000 {
            selection.offer(1, n, (1, n));
        }
        for n in 0..3 {
            selection.offer(2, 5000 + n, (2, n));
        }
        assert!(selection.left_out());
        let taken = selection.into_turns();
        assert_eq!(taken.len(), 10);
        assert_eq!(taken.iter().filter(|(queue, _)| *queue == 2).count(), 3);
        assert_eq!(taken.first(), Some(&(1, 0)));
        assert_eq!(taken.get(1), Some(&(2, 0)));
    }

    proptest! {
        #[test]
        fn shares_are_even_and_the_most_overdue_go_first(
            limit in 1usize..20, offers in prop::collection::vec((0u16..5, 0i64..50), 0..200)
        ) {
            let mut selection = Selection::new(limit);
            let mut offered: HashMap<u16, Vec<(i64, usize)>> = HashMap::new();
            for (number, (queue, since)) in offers.iter().enumerate() {
                selection.offer(*queue, *since, (*queue, *since, number));
                offered.entry(*queue).or_default().push((*since, number));
            }
            prop_assert_eq!(selection.left_out(), offers.len() > limit);
            let taken = selection.into_turns();
            prop_assert_eq!(taken.len(), offers.len().min(limit));
            let count = |queue: u16| taken.iter().filter(|(of, ..)| *of == queue).count();
            let most = (0..5).map(count).max().unwrap_or(0);
            for (queue, mut all) in offered {
                all.sort_unstable();
                let mine = count(queue);
                prop_assert!(mine == all.len() || mine + 1 >= most, "queue {} has {} of {}, another {}", queue, mine, all.len(), most);
                let sinces: Vec<i64> = taken.iter().filter(|(of, ..)| *of == queue).map(|(_, since, _)| *since).collect();
                let expected: Vec<i64> = all.iter().take(mine).map(|(since, _)| *since).collect();
                prop_assert_eq!(sinces, expected);
            }
        }
    }
}
