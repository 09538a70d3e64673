//! How often a segment is read to no avail: after each failed proof twice as long passes until the next, unless memory has changed its mind.
//!
//! Kept by the session, so by the maintainer of the database; bounded by the number of segments.

use std::cell::RefCell;

use awa_protocol::limits::LIVE_SEGMENTS;

use super::Standing;
use crate::frontier::Frontier;

struct Failed {
    word: u64,
    standing: Standing,
    next_at: i64,
    delay: i64,
}

thread_local! {
    static FAILED: RefCell<Vec<Failed>> = const { RefCell::new(Vec::new()) };
}

const FIRST_DELAY: i64 = 60_000_000;
const LONGEST_DELAY: i64 = 3_600_000_000;

/// Memory knows of nothing open in the segment; or it has for a minute, and may be wrong (heads are left of rows that were rolled back).
pub fn is_worth_a_proof(frontier: &Frontier, standing: &Standing, now: i64) -> bool {
    FAILED.with_borrow_mut(|failed| {
        failed.retain(|other| other.word == frontier.word());
        match failed.iter().find(|other| other.standing.generation == standing.generation) {
            Some(other) if standing.looks_drained() && !other.standing.looks_drained() => true,
            // A clock that was set back does not make it wait longer than the delay.
            Some(other) => now >= other.next_at || other.next_at.saturating_sub(now) > other.delay,
            None if standing.looks_drained() => true,
            None => {
                remember(failed, frontier, standing, now, FIRST_DELAY);
                false
            }
        }
    })
}

/// What a proof came to.
pub fn note(frontier: &Frontier, standing: &Standing, outcome: &str, now: i64) {
    FAILED.with_borrow_mut(|failed| {
        let before = failed.iter().position(|other| other.standing.generation == standing.generation);
        let delay = before.map(|index| failed.swap_remove(index).delay);
        if outcome == "skipped_active" {
            let delay = delay.map_or(FIRST_DELAY, |delay| delay.saturating_mul(2).min(LONGEST_DELAY));
            remember(failed, frontier, standing, now, delay);
        }
    });
}

/// Something has changed in this segment: the next look need not wait.
pub fn look_soon(generation: i64) {
    FAILED.with_borrow_mut(|failed| {
        if let Some(other) = failed.iter_mut().find(|other| other.standing.generation == generation) {
            other.next_at = i64::MIN;
        }
    });
}

fn remember(failed: &mut Vec<Failed>, frontier: &Frontier, standing: &Standing, now: i64, delay: i64) {
    if failed.len() >= LIVE_SEGMENTS {
        failed.remove(0);
    }
    failed.push(Failed { word: frontier.word(), standing: *standing, next_at: now.saturating_add(delay), delay });
}
