//! In-flight entries: one for each copy of a job that somebody holds, that came back, or that is being cancelled.
//!
//! Entries live in partitions, by job; the caller holds the partition's lock. An entry is found by `(job_id, hop)` and named by
//! `(slot, stamp)`: a stale name finds nothing, so a late callback can never touch a newer entry.

use crate::lane::{BORN_CLAIMED, Lane};
use crate::lifecycle::Outcome;
use crate::queue::NOBODY;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Free,
    /// Handed out; the claim's transaction may be unfinished (`claim_xid`), so may the closing one (`close_xid`).
    Claimed,
    /// Came back: claimable, linked into its lane.
    Hole,
    /// Being cancelled or carried without being claimed; or the copy of a running attempt that is being carried.
    Guard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub job_id: i64,
    pub generation: i64,
    pub key: i64,
    /// Where the row was; a hint, checked when used.
    pub tid: u64,
    pub lease: i64,
    /// The transaction of the claim. It stays after its commit: whoever needs to know asks whether it has ended.
    pub claim_xid: u64,
    /// The transaction that is closing the attempt; 0: none.
    pub close_xid: u64,
    pub claimed_at: i64,
    /// Microseconds; 0: none.
    pub deadline: i64,
    pub heartbeat_at: i64,
    pub heartbeat_timeout: i64,
    pub hop: i32,
    pub lane: i32,
    pub process: u32,
    /// Set by `insert`.
    pub stamp: u32,
    pub next: u32,
    pub queue: u16,
    pub attempt: i16,
    pub max_attempts: i16,
    pub closing: Option<Outcome>,
    pub state: State,
    /// A scan went past this guard: if the cancel aborts, the row must come back as a hole.
    pub passed: bool,
}

impl Entry {
    pub const fn free() -> Self {
        Self {
            job_id: 0,
            generation: 0,
            key: 0,
            tid: 0,
            lease: 0,
            claim_xid: 0,
            close_xid: 0,
            claimed_at: 0,
            deadline: 0,
            heartbeat_at: 0,
            heartbeat_timeout: 0,
            hop: 0,
            lane: 0,
            process: NOBODY,
            stamp: 0,
            next: NOBODY,
            queue: 0,
            attempt: 0,
            max_attempts: 0,
            closing: None,
            state: State::Free,
            passed: false,
        }
    }

    pub fn priority(&self) -> u8 {
        Lane::from_number(self.lane).priority
    }

    pub fn stamp(&self) -> u32 {
        self.stamp
    }

    /// Marks an attempt or a hole as ending by this transaction, if it is still what the caller saw when it decided to end it. One step
    /// under the partition's lock: of two who have decided at the same time one is first, and the other must look again.
    pub fn begin_exit(&mut self, seen: &Self, xid: u64, outcome: Outcome) -> bool {
        let is_free = self.close_xid == 0 || mutant!("marked_over_a_mark") || mutant!("close_xid_ignored");
        if self.state != seen.state || self.lease != seen.lease || !is_free {
            return false;
        }
        self.close_xid = xid;
        self.closing = Some(outcome);
        if self.state == State::Hole {
            self.state = State::Guard;
        }
        true
    }

    /// Does the attempt with this lease run, for all that its worker can know? One that is being carried does.
    pub fn is_alive(&self, lease: i64) -> bool {
        let carried = self.closing == Some(Outcome::Moved) && !mutant!("heartbeat_lost_in_carry");
        self.state == State::Claimed && self.lease == lease && (self.close_xid == 0 || carried)
    }
}

/// Names one entry for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryRef {
    pub partition: u32,
    pub slot: u32,
    pub stamp: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartitionHead {
    free: u32,
    pub used: u32,
    /// No entry in use has a slot as high as this.
    pub reach: u32,
}

impl PartitionHead {
    pub const fn new() -> Self {
        Self { free: NOBODY, used: 0, reach: 0 }
    }
}

impl Default for PartitionHead {
    fn default() -> Self {
        Self::new()
    }
}

/// One partition under its lock.
pub struct Partition<'a> {
    pub head: &'a mut PartitionHead,
    pub entries: &'a mut [Entry],
    pub buckets: &'a mut [u32],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertRefusal {
    Full,
    /// Somebody holds this copy: the slot of the entry.
    Exists(u32),
}

/// Which partition of `partitions` a job belongs to. Neighbouring identifiers go to different partitions.
pub fn partition_of(job_id: i64, partitions: u32) -> u32 {
    (job_id as u64 % u64::from(partitions.max(1))) as u32
}

impl Partition<'_> {
    /// Makes every entry free. Stamps go on, so that names from before find nothing.
    pub fn reset(&mut self) {
        self.buckets.fill(NOBODY);
        self.head.used = 0;
        self.head.reach = 0;
        self.head.free = NOBODY;
        for (slot, entry) in self.entries.iter_mut().enumerate().rev() {
            let stamp = entry.stamp.wrapping_add(1);
            *entry = Entry { stamp, next: self.head.free, ..Entry::free() };
            self.head.free = slot as u32;
        }
    }

    fn bucket_index(&self, job_id: i64) -> usize {
        let spread = (job_id as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        (spread % (self.buckets.len().max(1) as u64)) as usize
    }

    fn chain_start(&self, job_id: i64) -> u32 {
        self.buckets.get(self.bucket_index(job_id)).copied().unwrap_or(NOBODY)
    }

    /// First entry of the job that `wanted` accepts.
    pub fn find(&self, job_id: i64, wanted: impl Fn(&Entry) -> bool) -> Option<u32> {
        let mut at = self.chain_start(job_id);
        while let Some(entry) = self.entries.get(at as usize) {
            if entry.job_id == job_id && wanted(entry) {
                return Some(at);
            }
            at = entry.next;
        }
        None
    }

    pub fn find_copy(&self, job_id: i64, hop: i32) -> Option<u32> {
        self.find(job_id, |entry| entry.hop == hop || mutant!("hop_ignored"))
    }

    /// Adds an entry; its `(job_id, hop)` must be new here.
    pub fn insert(&mut self, new: Entry) -> Result<u32, InsertRefusal> {
        if let Some(slot) = self.find_copy(new.job_id, new.hop) {
            return Err(InsertRefusal::Exists(slot));
        }
        let slot = self.head.free;
        let bucket = self.bucket_index(new.job_id);
        let first = self.chain_start(new.job_id);
        let Some(entry) = self.entries.get_mut(slot as usize) else { return Err(InsertRefusal::Full) };
        self.head.free = entry.next;
        *entry = Entry { stamp: entry.stamp, next: first, ..new };
        if let Some(bucket) = self.buckets.get_mut(bucket) {
            *bucket = slot;
        }
        self.head.used += 1;
        self.head.reach = self.head.reach.max(slot + 1);
        Ok(slot)
    }

    pub fn free(&mut self, slot: u32) {
        let Some(entry) = self.entries.get(slot as usize).copied() else { return };
        if entry.state == State::Free {
            return;
        }
        let bucket = self.bucket_index(entry.job_id);
        let mut at = self.chain_start(entry.job_id);
        if at == slot {
            if let Some(bucket) = self.buckets.get_mut(bucket) {
                *bucket = entry.next;
            }
        } else {
            while let Some(before) = self.entries.get_mut(at as usize) {
                if before.next == slot {
                    before.next = entry.next;
                    break;
                }
                at = before.next;
            }
        }
        if let Some(place) = self.entries.get_mut(slot as usize) {
            let stamp = if mutant!("stamp_reused") { entry.stamp } else { entry.stamp.wrapping_add(1) };
            *place = Entry { stamp, next: self.head.free, ..Entry::free() };
            self.head.free = slot;
            self.head.used -= 1;
            if self.head.used == 0 {
                self.head.reach = 0;
            }
        }
    }

    /// Begins to carry a running attempt into another segment: its entry is marked as ending by this transaction, and a guard stands
    /// for the next copy, which is born claimed. Both change under one lock. `Exists(old.slot)`: it is no longer as the caller saw it.
    pub fn begin_move(&mut self, old: EntryRef, xid: u64, generation: i64) -> Result<u32, InsertRefusal> {
        let Some(entry) = self.named(old).filter(|entry| entry.state == State::Claimed && entry.close_xid == 0).copied() else {
            return Err(InsertRefusal::Exists(old.slot));
        };
        let copy = Entry {
            hop: entry.hop + 1,
            generation,
            key: BORN_CLAIMED,
            tid: 0,
            state: State::Guard,
            claim_xid: 0,
            close_xid: xid,
            closing: Some(Outcome::Moved),
            passed: false,
            ..entry
        };
        let slot = self.insert(copy)?;
        if let Some(entry) = self.named(old).filter(|_| !mutant!("finisher_does_not_wait_for_carrier")) {
            entry.close_xid = xid;
            entry.closing = Some(Outcome::Moved);
        }
        Ok(slot)
    }

    /// The carrier has committed: the new entry takes over what the old one knows by now, and the old one goes. True: it was there.
    pub fn finish_move(&mut self, old: EntryRef, new: EntryRef) -> bool {
        let Some(source) = self.named(old).copied() else { return false };
        if let Some(target) = self.named(new) {
            target.state = State::Claimed;
            target.close_xid = 0;
            target.closing = None;
            if !mutant!("extension_lost_in_carry") {
                target.deadline = source.deadline;
                target.heartbeat_at = source.heartbeat_at;
                target.process = source.process;
            }
        }
        self.free(old.slot);
        true
    }

    /// The carrier has rolled back. True: the new entry was there.
    pub fn abandon_move(&mut self, old: EntryRef, new: EntryRef) -> bool {
        if let Some(source) = self.named(old) {
            source.close_xid = 0;
            source.closing = None;
        }
        let there = self.named(new).is_some();
        if there {
            self.free(new.slot);
        }
        there
    }

    pub fn get(&self, slot: u32) -> Option<&Entry> {
        self.entries.get(slot as usize).filter(|entry| entry.state != State::Free)
    }

    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Entry> {
        self.entries.get_mut(slot as usize).filter(|entry| entry.state != State::Free)
    }

    /// The entry, if the name is not stale.
    pub fn named(&mut self, name: EntryRef) -> Option<&mut Entry> {
        self.get_mut(name.slot).filter(|entry| entry.stamp == name.stamp)
    }

    pub fn stamp_of(&self, slot: u32) -> u32 {
        self.entries.get(slot as usize).map_or(0, |entry| entry.stamp)
    }

    /// Chains and free list hold each entry exactly once.
    pub fn check(&self) -> Result<(), &'static str> {
        let mut seen = 0usize;
        for bucket in self.buckets.iter() {
            let mut at = *bucket;
            while let Some(entry) = self.entries.get(at as usize) {
                seen += 1;
                if entry.state == State::Free || seen > self.entries.len() {
                    return Err("a chain holds a free entry or has a loop");
                }
                at = entry.next;
            }
        }
        if seen != self.head.used as usize {
            return Err("chains and the number of used entries disagree");
        }
        let beyond = self.entries.get(self.head.reach as usize..).unwrap_or(&[]);
        if beyond.iter().any(|entry| entry.state != State::Free) {
            return Err("an entry lies beyond the reach of its partition");
        }
        let mut at = self.head.free;
        while let Some(entry) = self.entries.get(at as usize) {
            seen += 1;
            if entry.state != State::Free || seen > self.entries.len() {
                return Err("the free list holds a used entry or has a loop");
            }
            at = entry.next;
        }
        if seen == self.entries.len() { Ok(()) } else { Err("an entry is lost") }
    }
}

/// What a caller who wants to end an attempt must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Mark the entry as closing and append the evidence.
    Proceed,
    /// This transaction has ended the attempt in the same way.
    Already,
    /// This transaction has ended the attempt in another way.
    Conflict(Outcome),
    /// Another transaction is ending it: wait for that transaction, then look again.
    WaitForCloser(u64),
    /// The claim's transaction is unfinished and not the caller's.
    ClaimUncommitted(u64),
    /// The lease does not name a running attempt.
    Stale,
}

/// `own`: is this transaction part of the caller's? `in_progress`: has it not committed? An aborted claim counts as in progress until
/// its callbacks have made the entry a hole: else its attempt could be ended while they run.
pub fn decide_exit(
    entry: &Entry,
    lease: Option<i64>,
    outcome: Outcome,
    own: impl Fn(u64) -> bool,
    in_progress: impl Fn(u64) -> bool,
) -> Exit {
    let holds = match entry.state {
        State::Claimed => lease.is_none_or(|lease| lease == entry.lease || mutant!("lease_ignored")),
        State::Guard | State::Hole => lease.is_none(),
        State::Free => false,
    };
    if !holds {
        return Exit::Stale;
    }
    if entry.close_xid != 0 && !mutant!("close_xid_ignored") {
        return if !own(entry.close_xid) {
            Exit::WaitForCloser(entry.close_xid)
        } else if entry.closing == Some(outcome) {
            Exit::Already
        } else {
            Exit::Conflict(entry.closing.unwrap_or(outcome))
        };
    }
    if entry.state == State::Claimed
        && entry.claim_xid != 0
        && !own(entry.claim_xid)
        && in_progress(entry.claim_xid)
        && !mutant!("claim_in_progress_ignored")
    {
        return Exit::ClaimUncommitted(entry.claim_xid);
    }
    Exit::Proceed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn with_partition(entries: usize, body: impl FnOnce(&mut Partition<'_>)) {
        let mut head = PartitionHead::new();
        let mut pool = vec![Entry::free(); entries];
        let mut buckets = vec![NOBODY; 4];
        let mut partition = Partition { head: &mut head, entries: &mut pool, buckets: &mut buckets };
        partition.reset();
        body(&mut partition);
    }

    fn entry(job_id: i64, hop: i32) -> Entry {
        Entry { job_id, hop, state: State::Claimed, ..Entry::free() }
    }

    proptest! {
        #[test]
        fn partition_behaves_as_a_map(steps in prop::collection::vec((0i64..12, 0i32..3, any::<bool>()), 0..300)) {
            with_partition(16, |partition| {
                let mut model: HashMap<(i64, i32), EntryRef> = HashMap::new();
                for (job_id, hop, add) in steps {
                    if add {
                        match partition.insert(entry(job_id, hop)) {
                            Ok(slot) => {
                                let name = EntryRef { partition: 0, slot, stamp: partition.stamp_of(slot) };
                                assert!(model.insert((job_id, hop), name).is_none());
                            }
                            Err(InsertRefusal::Exists(_)) => assert!(model.contains_key(&(job_id, hop))),
                            Err(InsertRefusal::Full) => assert_eq!(model.len(), 16),
                        }
                    } else if let Some(name) = model.remove(&(job_id, hop)) {
                        assert!(partition.named(name).is_some());
                        partition.free(name.slot);
                        assert!(partition.named(name).is_none(), "a name must not outlive its entry");
                    }
                    assert_eq!(partition.check(), Ok(()));
                    for ((job_id, hop), name) in &model {
                        assert_eq!(partition.find_copy(*job_id, *hop), Some(name.slot));
                    }
                }
            });
        }
    }

    #[test]
    fn one_decision_point_for_every_exit() {
        let mut e = entry(1, 0);
        e.lease = 9;
        e.claim_xid = 50;
        let ended = |_| false;
        let running = |_| true;
        let mine = |x| x == 50;
        let nobodys = |_| false;
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, nobodys, ended), Exit::Proceed);
        assert_eq!(decide_exit(&e, Some(8), Outcome::Completed, nobodys, ended), Exit::Stale);
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, nobodys, running), Exit::ClaimUncommitted(50));
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, mine, running), Exit::Proceed);
        e.close_xid = 60;
        e.closing = Some(Outcome::Completed);
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, nobodys, running), Exit::WaitForCloser(60));
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, |x| x == 60, running), Exit::Already);
        assert_eq!(decide_exit(&e, Some(9), Outcome::Retry, |x| x == 60, running), Exit::Conflict(Outcome::Completed));
        e.state = State::Hole;
        e.close_xid = 0;
        assert_eq!(decide_exit(&e, Some(9), Outcome::Completed, nobodys, ended), Exit::Stale);
        assert_eq!(decide_exit(&e, None, Outcome::Cancelled, nobodys, ended), Exit::Proceed);
    }
}
