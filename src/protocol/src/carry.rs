//! Which segments of the ring maintenance empties by carrying their open jobs forward.

use crate::limits::LIVE_SEGMENTS;

/// Limits of the settings and the state of the ring.
#[derive(Clone, Copy, Debug)]
pub struct Pressure {
    pub live: usize,
    /// What the ring should have at most, and to what it may grow.
    pub wanted: usize,
    pub most: usize,
    /// Open jobs above which a segment is left as it is.
    pub jobs: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is open in it: prune will take it.
    Drained,
    Carry,
    /// A full segment is honest storage: it stays, and is looked at again later.
    Dense,
}

impl Pressure {
    /// Is the ring long enough for it to be worth anybody's while?
    pub fn is_felt(&self) -> bool {
        self.is_full() || self.live >= (self.wanted / 2).max(3)
    }

    /// At the end of its growth: the oldest segment must go, whatever is in it and whoever is coming for it.
    pub fn is_full(&self) -> bool {
        self.live >= self.most.min(LIVE_SEGMENTS)
    }

    pub fn verdict(&self, open: usize, oldest: bool) -> Verdict {
        match open {
            0 => Verdict::Drained,
            n if n <= self.jobs || (oldest && self.is_full() && self.jobs > 0) => Verdict::Carry,
            _ => Verdict::Dense,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_segments_are_carried_dense_ones_only_when_the_ring_cannot_grow() {
        let ring = |live| Pressure { live, wanted: 16, most: 64, jobs: 10 };
        assert!(!ring(7).is_felt());
        assert!(ring(8).is_felt());
        assert!(!Pressure { wanted: 2, ..ring(2) }.is_felt());
        assert!(Pressure { wanted: 2, ..ring(3) }.is_felt());
        assert_eq!(ring(8).verdict(0, true), Verdict::Drained);
        assert_eq!(ring(8).verdict(10, false), Verdict::Carry);
        assert_eq!(ring(63).verdict(11, true), Verdict::Dense);
        assert_eq!(ring(64).verdict(11, true), Verdict::Carry);
        assert_eq!(ring(64).verdict(11, false), Verdict::Dense);
        assert_eq!(Pressure { jobs: 0, ..ring(64) }.verdict(1, true), Verdict::Dense);
    }
}
