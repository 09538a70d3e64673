//! Jobs enqueued by prepared transactions: COMMIT PREPARED runs no callback, so they are counted when somebody looks.

use super::*;
use crate::frontier::shared::PREPARED;

pub fn note_prepared(waiting: &mut heapless::Vec<Prepared, PREPARED>, xid: u64, note: &Note) -> bool {
    let Note::Enqueued { queue, queue_id, sub, rows } = *note else { return true };
    match waiting.iter_mut().find(|entry| entry.xid == xid && entry.queue_id == queue_id && entry.sub == sub) {
        Some(entry) => {
            entry.rows += rows;
            true
        }
        None => waiting.push(Prepared { xid, queue_id, queue, sub, rows }).is_ok(),
    }
}

/// Counts the jobs of prepared transactions that have ended since. Not for callbacks: it asks for the state of transactions.
pub fn settle_prepared(frontier: &Frontier) {
    let mut known: heapless::Vec<Prepared, PREPARED> = heapless::Vec::new();
    let _ = known.extend_from_slice(&frontier.prepared().waiting);
    for entry in known {
        let state = xid_state(entry.xid);
        if matches!(state, XidState::InProgress | XidState::Own) {
            continue;
        }
        let mut cell = frontier.prepared();
        let Some(index) =
            cell.waiting.iter().position(|now| now.xid == entry.xid && now.queue_id == entry.queue_id && now.sub == entry.sub)
        else {
            continue;
        };
        cell.waiting.swap_remove(index);
        drop(cell);
        let mut queue = frontier.queue(entry.queue);
        if state == XidState::Committed && queue.queue_id == entry.queue_id && queue.existence != Existence::Free {
            *waiting(&mut queue.counts, entry.sub) += entry.rows;
            queue.totals.enqueued += entry.rows as u64;
        }
    }
}
