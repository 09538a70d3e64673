//! Numbers for a monitoring system, in the manner of Prometheus. From shared memory only: no table is read, nothing is locked but the
//! queue that is copied.

use awa_protocol::queue::NO_KEY;
use awa_protocol::ring::SegmentState;

use crate::error::Result;
use crate::frontier::{Frontier, notes};
use crate::ops::{handle, inspect};
use crate::pg::xact;
use crate::settings;

pub struct Metric<'a> {
    pub name: &'a str,
    pub labels: &'a [(&'a str, &'a [u8])],
    pub value: f64,
}

pub type Put<'a> = &'a mut dyn FnMut(&Metric<'_>) -> Result<()>;

pub fn engine(frontier: &Frontier, put: Put<'_>) -> Result<()> {
    notes::settle_prepared(frontier);
    for place in 0..frontier.queue_slots() {
        let (name, counts, totals, holes, gaps, oldest, waiters) = {
            let queue = frontier.queue(place);
            if !handle::is_visible(place, &queue) {
                continue;
            }
            let oldest = queue.tracks().iter().map(|track| track.head).min().unwrap_or(NO_KEY);
            let name = inspect::name_of(&queue);
            (name, queue.counts, queue.totals, queue.hole_count(), queue.gaps().len(), oldest, queue.waiters)
        };
        let queue = ("queue", name.as_slice());
        let states: [(&str, i64); 7] = [
            ("available", counts.immediate),
            ("scheduled", counts.scheduled),
            ("running", counts.running),
            ("completed", counts.completed),
            ("failed", counts.failed),
            ("cancelled", counts.cancelled),
            ("dead_lettered", counts.dead_lettered),
        ];
        for (state, value) in states {
            put(&Metric { name: "awa_jobs", labels: &[queue, ("state", state.as_bytes())], value: value as f64 })?;
        }
        let waiting_since = if inspect::is_known(oldest) { xact::now().saturating_sub(oldest).max(0) } else { 0 };
        let values: [(&str, f64); 11] = [
            ("awa_jobs_enqueued_total", totals.enqueued as f64),
            ("awa_jobs_claimed_total", totals.claimed as f64),
            ("awa_jobs_completed_total", totals.completed as f64),
            ("awa_attempts_failed_total", totals.failed_attempts as f64),
            ("awa_jobs_snoozed_total", totals.snoozed as f64),
            ("awa_attempts_rescued_total", totals.rescued as f64),
            ("awa_jobs_carried_total", totals.carried as f64),
            ("awa_queue_holes", f64::from(holes)),
            ("awa_queue_gaps", gaps as f64),
            ("awa_queue_waiters", f64::from(waiters)),
            ("awa_queue_oldest_due_seconds", waiting_since as f64 / 1e6),
        ];
        for (name, value) in values {
            put(&Metric { name, labels: &[queue], value })?;
        }
    }
    let in_flight = frontier.in_flight().load(std::sync::atomic::Ordering::Relaxed);
    put(&Metric { name: "awa_in_flight", labels: &[], value: f64::from(in_flight) })?;
    put(&Metric { name: "awa_in_flight_limit", labels: &[], value: settings::max_in_flight() as f64 })?;
    let live = frontier.live_segments();
    for (name, state) in
        [("open", SegmentState::Open), ("sealed", SegmentState::Sealed), ("prune_started", SegmentState::PruneStarted)]
    {
        let count = live.iter().filter(|segment| segment.state == state).count();
        put(&Metric { name: "awa_segments", labels: &[("state", name.as_bytes())], value: count as f64 })?;
    }
    put(&Metric { name: "awa_segments_limit", labels: &[], value: settings::ring_segments() as f64 })?;
    let oldest = live.iter().map(|segment| xact::now() - segment.opened_at).max().unwrap_or(0);
    put(&Metric { name: "awa_oldest_segment_seconds", labels: &[], value: oldest as f64 / 1e6 })
}
