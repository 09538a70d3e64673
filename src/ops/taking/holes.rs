//! Holes: jobs that came back. They have an entry already; their rows are looked up again before they are handed out.

use super::*;

impl Taker<'_> {
    pub(super) fn take_holes(&mut self, priority: u8, until: i64) -> Result<()> {
        // A hole has a place of its own: a pool full of holes must not keep anybody from taking them.
        let holes = self.with_queue(|queue, _| queue.hole_count()) as usize;
        let wanted = (self.limit - self.taken.len()).min(holes.max(1));
        notes::reserve(self.frontier, wanted)?;
        reserve(&mut self.taken, wanted)?;
        let xid = self.xid();
        let mut popped: Vec<(EntryRef, Entry)> = Vec::new();
        reserve(&mut popped, wanted)?;
        {
            let mut queue = self.frontier.queue(self.queue.place);
            // A rebuild empties the queue under this lock: what is seen under it of a current frontier is good.
            let usable = self.queue.is_usable(&queue);
            while usable && self.frontier.is_current() && popped.len() < wanted && queue.first_hole_key(priority) <= until {
                let Some(link) = self.frontier.with_links(|links| queue.pop_hole(priority, links)) else { break };
                let (partition, slot) = self.frontier.place_of(link);
                let lease = self.lease();
                let claimed = self.frontier.with_partition(partition, |entries| {
                    let stamp = entries.stamp_of(slot);
                    let entry = entries.get_mut(slot).filter(|entry| entry.state == State::Hole)?;
                    entry.state = State::Claimed;
                    entry.claim_xid = xid;
                    entry.lease = lease;
                    entry.claimed_at = self.terms.now;
                    entry.deadline = self.terms.deadline_at;
                    entry.heartbeat_at = self.terms.now;
                    entry.heartbeat_timeout = self.terms.heartbeat_timeout;
                    entry.process = xact::my_proc();
                    Some((EntryRef { partition, slot, stamp }, *entry))
                });
                if let Some((name, entry)) = claimed {
                    let sub = Lane::from_number(entry.lane).sub;
                    notes::push(Note::Claimed {
                        entry: name,
                        queue: self.queue.place,
                        queue_id: self.queue.queue_id,
                        sub,
                        published: true,
                    });
                    popped.push((name, entry));
                }
            }
        }
        // A hole has an entry of its own already.
        for (name, entry) in popped {
            self.verify_hole(name, &entry)?;
        }
        Ok(())
    }

    /// A hole is only as good as its row: it is looked up again, and dropped if it is gone or cancelled.
    fn verify_hole(&mut self, name: EntryRef, entry: &Entry) -> Result<()> {
        let row_is_there = match self.open(entry.generation)? {
            None => false,
            Some(segment) => {
                if self.frontier.has_tombstones(segment.info.slot) && is_tombstoned(&segment.info, &head_of(entry))? {
                    false
                } else {
                    self.take_hole_row(&segment, name, entry)?
                }
            }
        };
        if !row_is_there {
            self.frontier.drop_entry(name);
            notes::retract_claim(name);
        }
        Ok(())
    }

    fn take_hole_row(&mut self, segment: &OpenSegment, name: EntryRef, entry: &Entry) -> Result<bool> {
        let mut fetch = TidFetch::begin(&segment.rel);
        if let Some(row) = fetch.fetch(entry.tid)
            && is_row_of(&row, entry)
        {
            self.accept_hole(&row, name, entry);
            return Ok(true);
        }
        let mut scan = IndexScan::begin(&segment.rel, &segment.index, entry.lane, entry.key)?;
        while let Some((key, row)) = scan.next() {
            if key != entry.key {
                break;
            }
            if is_row_of(&row, entry) {
                self.accept_hole(&row, name, entry);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn accept_hole(&mut self, row: &RawRow<'_>, name: EntryRef, entry: &Entry) {
        if self.snapshot_bound && !row.visible_to_caller() {
            self.set_aside.push(name);
        } else {
            self.taken.push(copy_row(row, entry.generation, ready::head(row), entry.lease));
        }
    }
}
