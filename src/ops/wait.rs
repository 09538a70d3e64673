//! Wait: sleep until a queue may have work, with no snapshot held.
//!
//! Locks: none while asleep. Rows written: none. The session joins the sleepers of the queue before it looks, so no commit is missed;
//! it looks at holes, ended gaps and the heads of the lanes. A return is a hint, not a promise: claim to find out.

use awa_protocol::queue::Plan;

use crate::error::Result;
use crate::frontier::{Frontier, notes, wait_event};
use crate::ops::handle::{self, Queue};
use crate::pg::call::Call;
use crate::pg::points::reach;
use crate::pg::scan::has_ended;
use crate::pg::wait::leave_snapshot;
use crate::pg::xact;

/// While a transaction of a gap is unfinished nobody may wake us when it ends: look again after this long.
const GAP_POLL_US: i64 = 20_000;
/// The longest sleep without a look.
const LONGEST_US: i64 = 60_000_000;

pub fn wait(frontier: &Frontier, call: &Call<'_>, name: &[u8], timeout: i64) -> Result<()> {
    let queue = handle::resolve(frontier, name)?;
    notes::reserve(frontier, 0)?;
    let _no_snapshot = leave_snapshot(call)?;
    let until = xact::now().saturating_add(timeout);
    notes::set_waiting(Some(queue.place));
    {
        let mut held = frontier.queue(queue.place);
        held.waiters += 1;
    }
    let sleeper = frontier.work_sleeper(queue.place);
    reach("wait.joined");
    loop {
        sleeper.prepare();
        let Some(look_again) = next_look(frontier, queue) else { break };
        reach("wait.looked");
        let now = xact::now();
        if now >= until {
            break;
        }
        let sleep_us = look_again.min(until).saturating_sub(now).clamp(1_000, LONGEST_US);
        sleeper.timed_sleep(sleep_us.div_euclid(1000) + i64::from(sleep_us % 1000 != 0), wait_event());
    }
    sleeper.cancel();
    notes::leave_waiting(frontier);
    Ok(())
}

/// When to look again; `None`: there may be work now, or the queue is gone.
fn next_look(frontier: &Frontier, queue: Queue) -> Option<i64> {
    let now = xact::now();
    let xids = frontier.queue(queue.place).gap_xids();
    let ended: Vec<u64> = xids.iter().copied().filter(|xid| has_ended(*xid)).collect();
    let (plan, has_gaps) = {
        let held = frontier.queue(queue.place);
        if !queue.is_usable(&held) {
            return None;
        }
        (held.plan(now, &ended, &[]), held.has_gaps())
    };
    match plan {
        Plan::Nothing { next } if has_gaps => Some(next.min(now + GAP_POLL_US)),
        Plan::Nothing { next } => Some(next),
        Plan::Busy => Some(now + GAP_POLL_US),
        Plan::Holes { .. } | Plan::Gap { .. } | Plan::Scan { .. } => None,
    }
}
