//! Claimers: what to do next, scan turns and gaps.

use super::*;

impl QueueFrontier {
    /// `ended` lists the gaps' transactions that are known to have ended; `avoid` the tracks on which this caller could not get on.
    pub fn plan(&self, now: i64, ended: &[u64], avoid: &[TrackId]) -> Plan {
        if self.settings.paused || self.existence == Existence::Dropping {
            return Plan::Nothing { next: NO_KEY };
        }
        let mut busy = false;
        let mut next = NO_KEY;
        let mut best: Option<(u8, i64, Plan)> = None;
        for priority in 0..PRIORITIES as u8 {
            let Some((key, plan)) = self.best_of_lane(priority, now, ended, avoid, &mut busy, &mut next) else { continue };
            let rank = self.effective_priority(priority, now.saturating_sub(key));
            if best.is_none_or(|(other_rank, other_key, _)| (rank, key) < (other_rank, other_key)) {
                best = Some((rank, key, plan));
            }
        }
        match best {
            Some((_, _, plan)) => plan,
            None if busy => Plan::Busy,
            None => Plan::Nothing { next },
        }
    }

    /// Waiting raises a job towards priority 1, one step each `priority_ageing`; at equal rank the longer wait goes first.
    fn effective_priority(&self, priority: u8, waited: i64) -> u8 {
        if self.settings.priority_ageing <= 0 {
            return priority;
        }
        let steps = waited.max(0) / self.settings.priority_ageing;
        priority.saturating_sub(u8::try_from(steps).unwrap_or(u8::MAX))
    }

    fn best_of_lane(
        &self,
        priority: u8,
        now: i64,
        ended: &[u64],
        avoid: &[TrackId],
        busy: &mut bool,
        next: &mut i64,
    ) -> Option<(i64, Plan)> {
        let mut first: Option<(i64, Plan)> = None;
        let mut second = NO_KEY;
        let mut offer = |key: i64, plan: Plan| match first {
            Some((best, _)) if best <= key => second = second.min(key),
            previous => {
                if let Some((best, _)) = previous {
                    second = second.min(best);
                }
                first = Some((key, plan));
            }
        };
        if let Some(list) = self.holes.get(usize::from(priority)).filter(|list| list.count > 0) {
            offer(list.key, Plan::Holes { priority, until: NO_KEY });
        }
        for gap in self.gaps.iter().filter(|gap| gap.track.priority == priority && ended.contains(&gap.xid)) {
            if gap.turn == NOBODY {
                offer(gap.from.key, Plan::Gap { track: gap.track, xid: gap.xid, until: NO_KEY });
            } else {
                *busy = true;
            }
        }
        let due_to = |track: &Track| match track.id.sub {
            SubLane::Immediate => NO_KEY - 1,
            SubLane::Scheduled => now,
        };
        for track in self.tracks.iter().filter(|track| track.id.priority == priority && track.head != NO_KEY) {
            if track.head > due_to(track) {
                *next = (*next).min(track.head);
            } else if track.turn != NOBODY || avoid.contains(&track.id) {
                *busy = true;
            } else if !self.behind_older_immediate(track, avoid) {
                offer(track.head, Plan::Scan { track: track.id, until: NO_KEY });
            }
        }
        first.map(|(key, plan)| match plan {
            Plan::Scan { track, .. } => (key, Plan::Scan { track, until: second }),
            Plan::Holes { priority, .. } => (key, Plan::Holes { priority, until: second }),
            Plan::Gap { track, xid, .. } if !mutant!("gap_beyond_next_source") => (key, Plan::Gap { track, xid, until: second }),
            other => (key, other),
        })
    }

    /// Immediate rows of an older segment go first, whatever the clock said when they were enqueued.
    fn behind_older_immediate(&self, track: &Track, avoid: &[TrackId]) -> bool {
        track.id.sub == SubLane::Immediate
            && self.tracks.iter().any(|other| {
                other.id.sub == SubLane::Immediate
                    && other.id.priority == track.id.priority
                    && other.id.generation < track.id.generation
                    && other.head != NO_KEY
                    && other.turn == NOBODY
                    && !avoid.contains(&other.id)
            })
    }

    /// Takes the turn of a track. `None`: somebody has it, or no gap could be recorded.
    pub fn begin_scan(&mut self, id: TrackId, now: i64, process: u32) -> Option<ScanTurn> {
        let room = (GAPS_PER_QUEUE - self.gaps.len()).saturating_sub(self.gaps_promised as usize).min(GAPS_PER_SCAN);
        let track = self.tracks.iter_mut().find(|track| track.id == id && (track.turn == NOBODY || mutant!("two_turns")))?;
        let mut horizon = match id.sub {
            SubLane::Immediate => track.last,
            SubLane::Scheduled if mutant!("scan_beyond_now") => track.last,
            SubLane::Scheduled => now.min(track.last),
        };
        let mut inserters: heapless::Vec<GapFound, GAPS_PER_SCAN> = heapless::Vec::new();
        let mut lost = NO_KEY;
        // Only what lies above the cursor: the rest is in a gap already, or was, and a gap that has been visited must not come back.
        let above = if mutant!("inserter_range_from_below_cursor") { Position::START } else { track.cursor.next() };
        for inserter in self.inserters.iter().filter(|inserter| inserter.track == id && inserter.lowest <= horizon) {
            let found = GapFound {
                xid: inserter.xid,
                from: Position::at(inserter.lowest, 0).max(above),
                to: Position::at(inserter.highest, u64::MAX),
            };
            if found.from > found.to || mutant!("inserters_ignored") {
                continue;
            }
            if (inserters.len() >= room || inserters.push(found).is_err()) && !mutant!("inserters_beyond_room_ignored") {
                lost = lost.min(inserter.lowest);
            }
        }
        if lost != NO_KEY {
            horizon = horizon.min(lost.saturating_sub(1));
            inserters.retain(|found| found.from.key <= horizon);
        }
        if horizon < track.cursor.key || (room == 0 && track.head > horizon) {
            return None;
        }
        track.turn = process;
        // Rows above the horizon that are registered and not there yet: the scan cannot know of them.
        let unseen = self.inserters.iter().filter(|inserter| inserter.track == id && inserter.lowest > horizon);
        track.fresh = unseen.map(|inserter| inserter.lowest).min().unwrap_or(NO_KEY);
        if mutant!("unseen_inserters_forgotten") {
            track.fresh = NO_KEY;
        }
        if !mutant!("horizon_not_published") {
            track.horizon = track.horizon.max(horizon);
        }
        if !mutant!("gaps_not_promised") {
            self.gaps_promised += room as u32;
        }
        Some(ScanTurn { track: id, from: track.cursor, horizon, inserters, gap_room: room })
    }

    /// Ends a scan: everything up to `cursor` has been taken, is dead, or is in `gaps`. `next_head` is the key of the first row
    /// not passed (`NO_KEY`: the index had none).
    pub fn finish_scan(&mut self, turn: &ScanTurn, process: u32, cursor: Position, next_head: i64, gaps: &[GapFound]) {
        self.gaps_promised = self.gaps_promised.saturating_sub(turn.gap_room as u32);
        let Some(track) = self.tracks.iter_mut().find(|track| track.id == turn.track && track.turn == process) else { return };
        debug_assert!(cursor >= track.cursor, "a cursor is never lowered");
        debug_assert!(cursor.key <= turn.horizon || cursor == track.cursor);
        track.cursor = if mutant!("cursor_lowered") { Position::at(cursor.key, 0) } else { track.cursor.max(cursor) };
        let cursor = track.cursor;
        // What the inserters of the turn have above the cursor may have come after the scan looked.
        let awaited = turn.inserters.iter().filter(|found| found.to > cursor);
        let awaited = awaited.map(|found| found.from.max(cursor.next()).key).min().unwrap_or(NO_KEY);
        track.head = next_head.min(track.fresh).min(awaited);
        if mutant!("fresh_not_applied") {
            track.head = next_head.min(awaited);
        }
        if mutant!("awaited_not_applied") {
            track.head = next_head.min(track.fresh);
        }
        // After a rebuild rows that the fold did not count (aborted, prepared) may lie above `last`: let the next scan pass them.
        if next_head != NO_KEY && !mutant!("last_not_raised") {
            track.last = track.last.max(next_head);
        }
        track.turn = NOBODY;
        for found in turn.inserters.iter().chain(gaps) {
            self.note_gap(turn.track, *found, cursor);
        }
    }

    pub(super) fn note_gap(&mut self, track: TrackId, found: GapFound, cursor: Position) {
        let to = if mutant!("gap_above_cursor") { found.to } else { found.to.min(cursor) };
        if found.from > to || mutant!("gap_forgotten") {
            return;
        }
        match self.gaps.iter_mut().find(|gap| gap.track == track && gap.xid == found.xid) {
            Some(gap) => {
                gap.from = gap.from.min(found.from);
                if !mutant!("gap_not_extended") {
                    gap.to = gap.to.max(to);
                }
            }
            None => {
                let added = self.gaps.push(Gap { track, xid: found.xid, from: found.from, to, turn: NOBODY });
                debug_assert!(added.is_ok(), "room for gaps was promised");
            }
        }
    }

    pub fn begin_gap(&mut self, track: TrackId, xid: u64, process: u32) -> Option<GapTurn> {
        let gap = self
            .gaps
            .iter_mut()
            .find(|gap| gap.track == track && gap.xid == xid && (gap.turn == NOBODY || mutant!("two_gap_turns")))?;
        gap.turn = process;
        Some(GapTurn { track, xid, from: gap.from, to: gap.to })
    }

    /// `reached`: every row of the gap up to and including it has been taken or is dead. At the end of the range the gap goes.
    pub fn finish_gap(&mut self, turn: &GapTurn, process: u32, reached: Position) {
        let Some(index) = self.gaps.iter().position(|gap| gap.track == turn.track && gap.xid == turn.xid && gap.turn == process)
        else {
            return;
        };
        let Some(gap) = self.gaps.get_mut(index) else { return };
        gap.turn = NOBODY;
        if reached >= gap.to || mutant!("gap_dropped_early") || (mutant!("gap_growth_lost") && reached >= turn.to) {
            self.gaps.swap_remove(index);
        } else {
            let next = if mutant!("gap_not_advanced") { gap.from } else { reached.next() };
            gap.from = gap.from.max(next);
        }
    }

    /// Gives back a turn whose scan passed nothing. A scan that passed a row and then failed calls `finish_scan` with the place it
    /// had reached (its reserved entries become holes like those of any aborted claim): a guard that it passed may be a hole by now,
    /// and a row that is a hole must not lie above the cursor.
    pub fn abandon_scan(&mut self, turn: &ScanTurn, process: u32) {
        let keep = self.find_track(turn.track).map(|track| (track.cursor, track.head));
        if let Some((cursor, head)) = keep {
            self.gaps_promised = self.gaps_promised.saturating_sub(turn.gap_room as u32);
            if let Some(track) = self.tracks.iter_mut().find(|track| track.id == turn.track && track.turn == process) {
                track.cursor = cursor;
                track.head = head.min(track.fresh);
                track.turn = NOBODY;
            }
        }
    }

    pub fn abandon_gap(&mut self, turn: &GapTurn, process: u32) {
        if let Some(gap) = self.gaps.iter_mut().find(|gap| gap.track == turn.track && gap.xid == turn.xid && gap.turn == process)
        {
            gap.turn = NOBODY;
        }
    }
}
