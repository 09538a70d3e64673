//! Verify: fold the log again and compare it with the live frontier. Rebuild: replace the live one.
//!
//! Verify takes AccessShare only and blocks nobody. Jobs on their way make differences for a moment, so a difference counts only when it
//! is still there after the transactions that were writing have ended (prepared ones, which change nothing more, aside); then the same
//! comparison is made again.
//! Rebuild takes Share on ready_entries of every live segment: it waits for all transactions that use the frontier and keeps others out.

use std::collections::{BTreeMap, HashMap};

use awa_protocol::attempt::{Entry, State};
use awa_protocol::lane::{Lane, Position};
use awa_protocol::limits::{GAPS_PER_QUEUE, TRACKS_PER_QUEUE};
use awa_protocol::queue::{Counts, Existence, Gap, Track};
use awa_protocol::rebuild::{Fate, ReadyRow};
use awa_protocol::ring::SegmentState;
use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result, out_of_memory, reserve};
use crate::frontier::{Frontier, PARTITIONS, SegmentInfo, build, notes};
use crate::ops::inspect;
use crate::ops::rotate::refuse_old_snapshot;
use crate::pg::call::{Rows, bytes_datum, text_datum};
use crate::pg::points::reach;
use crate::pg::rel::{Lock, Rel, wait_for_running_lockers};
use crate::pg::scan::{HeapScan, RowState, has_ended};
use crate::pg::sql;
use crate::store::finished::{self, Shelf};
use crate::store::{datum, deferred, queues};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    problem: &'static str,
    queue_id: i32,
    job_id: i64,
    hop: i32,
    /// Of the attempt in memory, 0 where that is not what differs: each of several claims of a job may look wrong for a moment.
    lease: i64,
}

type Differences = BTreeMap<Key, String>;

/// Comparisons before a difference is believed.
const ROUNDS: usize = 3;

pub fn verify(frontier: &Frontier, rows: &mut Rows<'_>) -> Result<()> {
    let mut found = compare(frontier)?;
    for _ in 1..ROUNDS {
        if found.is_empty() {
            return Ok(());
        }
        for info in frontier.live_segments() {
            wait_for_running_lockers(info.ready, Lock::Share);
        }
        for shelf in Shelf::ALL {
            wait_for_running_lockers(shelf.table()?, Lock::Share);
        }
        reach("verify.waited");
        let again = compare(frontier)?;
        found.retain(|key, _| again.contains_key(key));
    }
    let names = queue_names(frontier);
    for (key, detail) in found {
        rows.put(&[
            Some(text_datum(key.problem)),
            names.get(&key.queue_id).map(|name| bytes_datum(name)),
            (key.job_id != 0).then(|| datum::i64(key.job_id)),
            (key.job_id != 0).then(|| datum::i32(key.hop)),
            Some(text_datum(&detail)),
        ])?;
    }
    Ok(())
}

pub fn rebuild(frontier: &Frontier) -> Result<i64> {
    if !notes::is_empty() {
        return Err(Error::new(Code::ERRCODE_ACTIVE_SQL_TRANSACTION, "cannot rebuild in a transaction that has used the queue")
            .hint("Call awa.rebuild() in a transaction of its own."));
    }
    refuse_old_snapshot("awa.rebuild()")?;
    let _ledger = Rel::open(frontier.ledger, Lock::ShareRowExclusive)?;
    // Waits for whoever is creating, changing or dropping a queue, and keeps others out.
    let _definitions = Rel::open(queues::table()?, Lock::Exclusive)?;
    keep_users_out(frontier)?;
    build::rebuild(frontier)
}

/// Waits for all transactions that have used a built frontier, and keeps others out to the end of this one. The caller holds the ledger.
pub fn keep_users_out(frontier: &Frontier) -> Result<()> {
    for info in frontier.live_segments() {
        Rel::open(info.ready, Lock::Share)?;
    }
    // Whoever deletes finished jobs from them changes counts.
    for shelf in Shelf::ALL {
        Rel::open(shelf.table()?, Lock::Share)?;
    }
    Ok(())
}

fn queue_names(frontier: &Frontier) -> HashMap<i32, Vec<u8>> {
    (0..frontier.queue_slots())
        .filter_map(|place| inspect::named(frontier, place))
        .map(|(id, name)| (id, name.to_vec()))
        .collect()
}

/// Its claim or its end is not committed: the log cannot say the same yet.
fn is_on_its_way(entry: &Entry) -> bool {
    let unfinished = |xid: u64| xid != 0 && !has_ended(xid);
    unfinished(entry.close_xid) || (entry.state == State::Claimed && unfinished(entry.claim_xid))
}

/// An entry as it was before the log was read.
struct InFlight {
    entry: Entry,
    /// Then: the log may have been read before its transaction ended, though it has by now.
    was_on_its_way: bool,
}

impl InFlight {
    fn is_on_its_way(&self) -> bool {
        self.was_on_its_way || is_on_its_way(&self.entry)
    }
}

fn shown(counts: &Counts) -> String {
    format!(
        "{} available, {} scheduled, {} running, {} completed, {} failed, {} cancelled, {} dead-lettered",
        counts.immediate,
        counts.scheduled,
        counts.running,
        counts.completed,
        counts.failed,
        counts.cancelled,
        counts.dead_lettered
    )
}

/// What the frontier says of a queue, copied out under its lock.
struct Live {
    place: u16,
    tracks: Vec<Track>,
    gaps: Vec<Gap>,
    counts: Counts,
    activity: [u64; 6],
}

fn snapshot(frontier: &Frontier) -> HashMap<i32, Live> {
    let mut all = HashMap::new();
    for place in 0..frontier.queue_slots() {
        // Nothing may be allocated under the lock.
        let mut tracks = Vec::with_capacity(TRACKS_PER_QUEUE);
        let mut gaps = Vec::with_capacity(GAPS_PER_QUEUE);
        let queue = frontier.queue(place);
        if queue.existence == Existence::Free {
            continue;
        }
        tracks.extend_from_slice(queue.tracks());
        gaps.extend_from_slice(queue.gaps());
        let (queue_id, counts, t) = (queue.queue_id, queue.counts, queue.totals);
        drop(queue);
        let activity = [t.enqueued, t.claimed, t.completed, t.failed_attempts, t.snoozed, t.carried];
        all.insert(queue_id, Live { place, tracks, gaps, counts, activity });
    }
    all
}

fn entries(frontier: &Frontier, differences: &mut Differences) -> Result<HashMap<(i64, i32), InFlight>> {
    let mut all = HashMap::new();
    for partition in 0..PARTITIONS as u32 {
        let mut used: Vec<Entry> = Vec::new();
        reserve(&mut used, frontier.entries_of_a_partition())?;
        let fault = frontier.with_partition(partition, |pool| {
            used.extend(pool.entries.iter().filter(|entry| entry.state != State::Free));
            pool.check().err()
        });
        if let Some(fault) = fault {
            let key = Key { problem: "pool_broken", queue_id: 0, job_id: 0, hop: partition as i32, lease: 0 };
            differences.insert(key, format!("partition {partition} of the in-flight pool: {fault}"));
        }
        all.try_reserve(used.len()).map_err(|_| out_of_memory())?;
        let known = |entry: Entry| ((entry.job_id, entry.hop), InFlight { was_on_its_way: is_on_its_way(&entry), entry });
        all.extend(used.into_iter().map(known));
    }
    Ok(all)
}

struct Comparison {
    live: HashMap<i32, Live>,
    entries: HashMap<(i64, i32), InFlight>,
    differences: Differences,
    counts: HashMap<i32, Counts>,
    unfinished: HashMap<i32, bool>,
    /// Highest committed copy of each unclosed job.
    open_copies: HashMap<i64, i32>,
}

fn compare(frontier: &Frontier) -> Result<Differences> {
    let mut differences = Differences::new();
    notes::settle_prepared(frontier);
    let live = snapshot(frontier);
    let entries = entries(frontier, &mut differences)?;
    let mut comparison = Comparison {
        live,
        entries,
        differences,
        counts: HashMap::new(),
        unfinished: HashMap::new(),
        open_copies: HashMap::new(),
    };
    for info in frontier.live_segments().iter().filter(|info| info.state != SegmentState::PruneStarted) {
        comparison.segment(info)?;
    }
    comparison.deferred(frontier)?;
    comparison.leftovers();
    comparison.finished(frontier)?;
    let after = snapshot(frontier);
    comparison.compare_counts(&after);
    Ok(comparison.differences)
}

impl Comparison {
    fn differ(&mut self, problem: &'static str, row: &ReadyRow, lease: i64, detail: String) {
        let key = Key { problem, queue_id: Lane::from_number(row.lane).queue_id, job_id: row.job_id, hop: row.hop, lease };
        self.differences.insert(key, detail);
    }

    fn segment(&mut self, info: &SegmentInfo) -> Result<()> {
        let rel = Rel::open(info.ready, Lock::AccessShare)?;
        let mut evidence = build::read_evidence(info, false)?;
        for twice in std::mem::take(&mut evidence.fold.closed_twice) {
            let ((job_id, hop), [one, other]) = (twice.copy, twice.outcomes);
            let key = Key { problem: "closed_twice", queue_id: 0, job_id, hop, lease: 0 };
            let detail = format!("closed as {} and as {} in generation {}", one.name(), other.name(), info.generation);
            self.differences.insert(key, detail);
        }
        reach("verify.evidence_read");
        let mut scan = HeapScan::begin(&rel);
        while let Some(row) = scan.next() {
            let seen = build::ready_row(&row);
            let queue_id = Lane::from_number(seen.lane).queue_id;
            match row.state() {
                RowState::Dead => continue,
                RowState::Own(_) | RowState::InProgress(_) => {
                    self.unfinished.insert(queue_id, true);
                    continue;
                }
                RowState::Committed => {}
            }
            if !self.live.contains_key(&queue_id) {
                continue;
            }
            let fate = evidence.fold.first_pass(&seen);
            self.count(&seen, &fate);
            self.judge(info, &seen, &fate, row.xmin_full());
        }
        Ok(())
    }

    fn count(&mut self, row: &ReadyRow, fate: &Fate) {
        let lane = Lane::from_number(row.lane);
        let counts = self.counts.entry(lane.queue_id).or_default();
        match fate {
            Fate::Ready => *notes::waiting(counts, lane.sub) += 1,
            Fate::Open(_) => counts.running += 1,
            // A dead letter is counted where it lies.
            Fate::Closed(outcome) if outcome.is_history() => notes::count_finished(counts, *outcome, 1),
            Fate::Closed(_) => {}
        }
    }

    fn judge(&mut self, info: &SegmentInfo, row: &ReadyRow, fate: &Fate, xmin: u64) {
        let entry = self.entries.remove(&(row.job_id, row.hop));
        if entry.as_ref().is_some_and(InFlight::is_on_its_way) {
            return;
        }
        let entry = entry.map(|known| known.entry);
        match fate {
            Fate::Closed(_) => {
                if let Some(entry) = entry {
                    let detail = "the log has a closure, the frontier an entry".to_owned();
                    self.differ("closed_but_in_flight", row, entry.lease, detail);
                }
                return;
            }
            Fate::Open(claim) => match entry {
                None => self.differ("claimed_but_not_in_flight", row, claim.lease, format!("the log has lease {}", claim.lease)),
                Some(entry) if entry.state != State::Claimed || entry.lease != claim.lease => {
                    let detail =
                        format!("the log has lease {}, the frontier {:?} with lease {}", claim.lease, entry.state, entry.lease);
                    self.differ("other_lease", row, entry.lease, detail);
                }
                Some(_) => {}
            },
            Fate::Ready => self.judge_ready(info, row, entry, xmin),
        }
        if self.open_copies.try_reserve(1).is_err() {
            return;
        }
        if let Some(other) = self.open_copies.insert(row.job_id, row.hop) {
            self.differ("two_copies_are_live", row, 0, format!("copy {other} is live too"));
        }
    }

    fn judge_ready(&mut self, info: &SegmentInfo, row: &ReadyRow, entry: Option<Entry>, xmin: u64) {
        let lane = Lane::from_number(row.lane);
        let Some(live) = self.live.get(&lane.queue_id) else { return };
        let id = awa_protocol::queue::TrackId { generation: info.generation, priority: lane.priority, sub: lane.sub };
        let track = live.tracks.iter().find(|track| track.id == id);
        let above = track.is_some_and(|track| row.position > track.cursor && row.position.key >= track.head);
        let in_gap =
            live.gaps.iter().any(|gap| gap.track == id && gap.xid == xmin && row.position >= gap.from && row.position <= gap.to);
        let place = live.place;
        match entry {
            Some(entry) if matches!(entry.state, State::Hole | State::Guard) && entry.queue == place => {
                if entry.state == State::Hole && above {
                    self.differ("hole_above_cursor", row, entry.lease, "the row would be handed out twice".to_owned());
                }
            }
            Some(entry) => {
                let detail = format!("the frontier has {:?} with lease {}, the log has no claim", entry.state, entry.lease);
                self.differ("in_flight_but_not_claimed", row, entry.lease, detail);
            }
            None if above || in_gap => {}
            None => {
                let cursor: Option<Position> = track.map(|track| track.cursor);
                self.differ(
                    "skipped",
                    row,
                    0,
                    format!("a ready row below the cursor is neither a hole nor in a gap (cursor {cursor:?})"),
                );
            }
        }
    }

    /// Jobs that wait outside the ring are in no segment.
    fn deferred(&mut self, frontier: &Frontier) -> Result<()> {
        let (counts, open, differences) = (&mut self.counts, &self.open_copies, &mut self.differences);
        sql::as_owner(frontier.ledger, || {
            deferred::each(None, |entry| {
                let queue_id = Lane::from_number(entry.lane).queue_id;
                counts.entry(queue_id).or_default().scheduled += 1;
                if let Some(other) = open.get(&entry.job_id) {
                    let key = Key { problem: "two_copies_are_live", queue_id, job_id: entry.job_id, hop: entry.hop, lease: 0 };
                    differences.insert(key, format!("deferred, and copy {other} is live in the ring"));
                }
                Ok(())
            })
        })
    }

    /// Jobs that have left the ring when they were finished do not run in it.
    fn finished(&mut self, frontier: &Frontier) -> Result<()> {
        for (queue_id, counts) in sql::as_owner(frontier.ledger, finished::counts)? {
            notes::add_counts(self.counts.entry(queue_id).or_default(), &counts);
        }
        let (open, differences) = (&self.open_copies, &mut self.differences);
        for shelf in Shelf::ALL {
            sql::as_owner(frontier.ledger, || {
                finished::each_job(shelf, |job_id, queue_id, hop| {
                    if let Some(other) = open.get(&job_id) {
                        let key = Key { problem: "finished_and_live", queue_id, job_id, hop, lease: 0 };
                        differences.insert(key, format!("kept as finished, and copy {other} is live in the ring"));
                    }
                })
            })?;
        }
        Ok(())
    }

    /// Entries for which the log has no row.
    fn leftovers(&mut self) {
        let rest: Vec<InFlight> = self.entries.drain().map(|(_, entry)| entry).collect();
        for InFlight { entry, .. } in rest.into_iter().filter(|entry| !entry.is_on_its_way()) {
            let key = Key {
                problem: "in_flight_without_row",
                queue_id: Lane::from_number(entry.lane).queue_id,
                job_id: entry.job_id,
                hop: entry.hop,
                lease: entry.lease,
            };
            self.differences.insert(key, format!("the frontier has {:?} in generation {}", entry.state, entry.generation));
        }
    }

    /// Counts are compared only where nothing moved meanwhile.
    fn compare_counts(&mut self, after: &HashMap<i32, Live>) {
        for (queue_id, before) in &self.live {
            let still =
                after.get(queue_id).is_some_and(|after| after.activity == before.activity && after.counts == before.counts);
            if !still || self.unfinished.contains_key(queue_id) {
                continue;
            }
            let expected = self.counts.get(queue_id).copied().unwrap_or_default();
            if expected != before.counts {
                let key = Key { problem: "counts", queue_id: *queue_id, job_id: 0, hop: 0, lease: 0 };
                self.differences
                    .insert(key, format!("the log has {}; the frontier has {}", shown(&expected), shown(&before.counts)));
            }
        }
    }
}
