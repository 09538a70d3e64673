//! Gaps: rows that a scan passed by because their transaction had not ended. When it has, the range is visited again for rows of it.

use super::*;

impl Taker<'_> {
    pub(super) fn visit_gap(&mut self, track: TrackId, xid: u64, until: i64) -> Result<()> {
        let Some(segment) = self.open(track.generation)? else {
            self.avoid_gaps.push(xid);
            return Ok(());
        };
        notes::reserve(self.frontier, 0)?;
        let begun = self.with_queue(|queue, this| {
            if !this.queue.is_usable(queue) {
                return None;
            }
            let turn = queue.begin_gap(track, xid, xact::my_proc())?;
            let before = Position::at(turn.from.key, turn.from.tid);
            notes::hold(Held { queue: this.queue.place, turn: Turn::Gap { turn, reached: just_before(before) } });
            Some(turn)
        });
        let Some(turn) = begun else {
            self.avoid_gaps.push(xid);
            return Ok(());
        };
        let mut reached = turn.to;
        let mut scan = IndexScan::begin(&segment.rel, &segment.index, self.lane_of(track), turn.from.key)?;
        scan.seek(self.lane_of(track), turn.from.key, turn.from.tid.checked_sub(1));
        let mut last_done = just_before(turn.from);
        while let Some((key, row)) = scan.next() {
            let position = Position::at(key, row.tid());
            if position > turn.to {
                break;
            }
            // Another source has the next row. The gap begins here from now on, so that its place among the others is right.
            if key > until {
                reached = just_before(position);
                break;
            }
            if row.xmin_full() == xid && row.state() == RowState::Committed {
                if self.taken.len() >= self.limit {
                    reached = last_done;
                    break;
                }
                match self.reserve(&segment, &row, track.sub)? {
                    Reserved::Yes => notes::publish_last(),
                    Reserved::No => {}
                    Reserved::PoolFull => {
                        self.pool_is_full = true;
                        self.avoid_gaps.push(xid);
                        reached = last_done;
                        break;
                    }
                }
            }
            last_done = position;
            set_gap_reached(position);
        }
        drop(scan);
        set_gap_reached(reached);
        notes::end_turn(self.frontier);
        Ok(())
    }
}

fn just_before(position: Position) -> Position {
    match position.tid.checked_sub(1) {
        Some(tid) => Position::at(position.key, tid),
        None => Position::at(position.key.saturating_sub(1), u64::MAX),
    }
}

fn set_gap_reached(position: Position) {
    notes::with_turn(|turn| {
        if let Turn::Gap { reached, .. } = turn {
            *reached = position;
        }
    });
}
