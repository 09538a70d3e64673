//! Producers: choosing keys above every scan, and being known while rows are appended.

use super::*;

impl QueueFrontier {
    /// Chooses keys and makes the range known to every later scan. Keys are written to `keys`, one a row.
    /// At most one registration a process.
    pub fn register(
        &mut self,
        id: TrackId,
        wanted: Wanted<'_>,
        now: i64,
        process: u32,
        xid: u64,
        keys: &mut [i64],
    ) -> Result<(), Refusal> {
        if self.inserters.is_full() {
            return Err(Refusal::TooManyInserters);
        }
        if self.find_track(id).is_none() {
            self.add_track(id)?;
        }
        let Some(track) = self.track(id) else { return Err(Refusal::TooManyTracks) };
        let floor =
            if mutant!("register_below_horizon") { i64::MIN } else { track.horizon.max(track.cursor.key).saturating_add(1) };
        let (mut lowest, mut highest) = (i64::MAX, i64::MIN);
        match wanted {
            Wanted::Immediate { rows } => {
                let first = now.max(track.last.saturating_add(1)).max(floor);
                for (offset, key) in keys.iter_mut().take(rows).enumerate() {
                    *key = first.saturating_add(offset as i64);
                }
                lowest = first;
                highest = first.saturating_add(rows as i64 - 1);
            }
            Wanted::Scheduled { run_at } => {
                for (key, wanted_at) in keys.iter_mut().zip(run_at) {
                    let due = (*wanted_at).max(floor);
                    *key = due.saturating_add(track.spread_tie(due));
                    lowest = lowest.min(*key);
                    highest = highest.max(*key);
                }
            }
        }
        track.registered = track.registered.wrapping_add(1);
        track.last = track.last.max(highest);
        track.head = track.head.min(lowest);
        track.fresh = track.fresh.min(lowest);
        let _ = self.inserters.push(Inserter { process, track: id, xid, lowest, highest });
        Ok(())
    }

    pub fn deregister(&mut self, process: u32) {
        let wanted = |inserter: &Inserter| inserter.process == process || mutant!("deregister_wrong_one");
        if let Some(index) = self.inserters.iter().position(wanted) {
            self.inserters.swap_remove(index);
        }
    }

    pub(super) fn add_track(&mut self, id: TrackId) -> Result<(), Refusal> {
        let track = Track {
            id,
            cursor: Position::START,
            head: NO_KEY,
            horizon: i64::MIN,
            last: i64::MIN,
            fresh: NO_KEY,
            turn: NOBODY,
            registered: 0,
            tie_key: i64::MIN,
            tie_count: 0,
        };
        if self.tracks.is_full() {
            self.drop_finished_tracks(id.generation);
        }
        self.tracks.push(track).map_err(|_| Refusal::TooManyTracks)
    }

    /// Forgets tracks of older segments that hold nothing. Producers no longer register in them.
    pub fn drop_finished_tracks(&mut self, open_generation: i64) {
        let (gaps, inserters) = (&self.gaps, &self.inserters);
        self.tracks.retain(|track| {
            track.id.generation >= open_generation
                || track.head != NO_KEY
                || track.turn != NOBODY
                || gaps.iter().any(|gap| gap.track == track.id)
                || inserters.iter().any(|inserter| inserter.track == track.id)
        });
    }

    /// The segment is gone: so is all that was known of it.
    pub fn forget_generation(&mut self, generation: i64) {
        self.tracks.retain(|track| track.id.generation != generation);
        self.gaps.retain(|gap| gap.track.generation != generation);
    }
}
