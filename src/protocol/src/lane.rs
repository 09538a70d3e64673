//! A lane is `(queue, priority)`; it has two sub-lanes of one index. The number stored in rows packs the three.

/// Immediate jobs take keys in the order of enqueue; scheduled ones (run_at, retry, snooze) take the time they are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SubLane {
    Immediate = 0,
    Scheduled = 1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane {
    pub queue_id: i32,
    /// 0 (most urgent) to 3; users see 1 to 4.
    pub priority: u8,
    pub sub: SubLane,
}

impl Lane {
    pub fn number(self) -> i32 {
        self.queue_id * 8 + i32::from(self.priority) * 2 + self.sub as i32
    }

    pub fn from_number(number: i32) -> Self {
        let sub = if number & 1 == 0 { SubLane::Immediate } else { SubLane::Scheduled };
        Self { queue_id: number >> 3, priority: ((number >> 1) & 3) as u8, sub }
    }
}

/// Key of a copy that carries its lease from another segment: below every scan, so that nobody is offered it. No producer gets it.
pub const BORN_CLAIMED: i64 = i64::MIN;

/// A place in a lane's index: rows of equal key are ordered by their tuple identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub key: i64,
    pub tid: u64,
}

impl Position {
    /// Before the first row that a scan may offer, and above every row that is born claimed.
    pub const START: Self = Self { key: BORN_CLAIMED + 1, tid: 0 };

    pub fn at(key: i64, tid: u64) -> Self {
        Self { key, tid }
    }

    /// The lowest place above this one.
    pub fn next(self) -> Self {
        match self.tid.checked_add(1) {
            Some(tid) => Self { key: self.key, tid },
            None => Self { key: self.key.saturating_add(1), tid: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_number_round_trips() {
        for queue_id in [0, 1, 7, 268_435_454] {
            for priority in 0..4 {
                for sub in [SubLane::Immediate, SubLane::Scheduled] {
                    let lane = Lane { queue_id, priority, sub };
                    assert_eq!(Lane::from_number(lane.number()), lane);
                }
            }
        }
    }
}
