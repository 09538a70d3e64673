//! Holes: entries that came back, linked into their lane in order of key.

use super::*;

impl QueueFrontier {
    /// Links a returned entry into its lane, in order of key as far as a short walk can tell.
    pub fn push_hole(&mut self, priority: u8, entry: u32, key: i64, links: HoleLinks<'_>) {
        let Some(list) = self.holes.get_mut(usize::from(priority)) else { return };
        list.count += 1;
        let next_of = |entry: u32| links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        let set_next = |entry: u32, next: u32| {
            if let Some(link) = links.next.get(entry as usize) {
                link.store(next, Ordering::Relaxed);
            }
        };
        if list.first == NOBODY || key <= list.key {
            set_next(entry, list.first);
            list.first = entry;
            list.key = key;
            return;
        }
        let mut before = list.first;
        for _ in 0..HOLE_WALK {
            let next = next_of(before);
            if next == NOBODY || (links.key_of)(next) >= key {
                break;
            }
            before = next;
        }
        set_next(entry, if mutant!("push_hole_loses") { NOBODY } else { next_of(before) });
        set_next(before, entry);
    }

    pub fn pop_hole(&mut self, priority: u8, links: HoleLinks<'_>) -> Option<u32> {
        let list = self.holes.get_mut(usize::from(priority))?;
        if list.first == NOBODY {
            return None;
        }
        let entry = list.first;
        let next = links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        list.count = list.count.saturating_sub(1);
        list.first = next;
        list.key = if next == NOBODY { NO_KEY } else { (links.key_of)(next) };
        Some(entry)
    }

    pub fn first_hole_key(&self, priority: u8) -> i64 {
        self.holes.get(usize::from(priority)).map_or(NO_KEY, |list| list.key)
    }

    /// Unlinks one hole (it is cancelled or carried). Walks the list: a cold path. False: it is not in the list, so a claimer has it.
    pub fn remove_hole(&mut self, priority: u8, entry: u32, links: HoleLinks<'_>) -> bool {
        let Some(list) = self.holes.get_mut(usize::from(priority)) else { return false };
        let next_of = |entry: u32| links.next.get(entry as usize).map_or(NOBODY, |link| link.load(Ordering::Relaxed));
        let (mut before, mut at) = (NOBODY, list.first);
        for _ in 0..list.count {
            if at == NOBODY {
                break;
            }
            let next = next_of(at);
            if at == entry && mutant!("hole_not_unlinked") {
                return true;
            }
            if at == entry {
                list.count -= 1;
                if before == NOBODY {
                    list.first = next;
                    list.key = if next == NOBODY { NO_KEY } else { (links.key_of)(next) };
                } else if let Some(link) = links.next.get(before as usize) {
                    link.store(next, Ordering::Relaxed);
                }
                return true;
            }
            (before, at) = (at, next);
        }
        false
    }
}
