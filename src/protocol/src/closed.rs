//! Which copies of a segment are closed, and how. Nearly all are first copies of jobs with neighbouring identifiers that were completed:
//! these take a bit each; the rest takes a place in a map.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::lifecycle::Outcome;

/// A copy of a job.
pub type Copy_ = (i64, i32);

/// Job identifiers are spread already: one multiplication is hash enough.
#[derive(Default, Clone, Copy)]
pub struct CopyHasher(u64);

impl Hasher for CopyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_i64(&mut self, n: i64) {
        self.write_u64(n as u64);
    }
    fn write_i32(&mut self, n: i32) {
        self.write_u64(n as u64);
    }
    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

pub type CopyMap<V> = HashMap<Copy_, V, BuildHasherDefault<CopyHasher>>;

/// Identifiers of one chunk of bits.
const CHUNK: i64 = 4096;
const WORDS: usize = CHUNK as usize / 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closure {
    pub outcome: Outcome,
    /// Closed without ever having been claimed, so it says nothing about the cursor.
    pub unclaimed: bool,
}

#[derive(Default)]
pub struct ClosedCopies {
    index: HashMap<i64, u32, BuildHasherDefault<CopyHasher>>,
    chunks: Vec<[u64; WORDS]>,
    /// Number and place of the chunk met last: rows come in the order of identifiers, mostly.
    last: Cell<Option<(i64, u32)>>,
    others: CopyMap<Closure>,
}

impl ClosedCopies {
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.others.is_empty()
    }

    /// Room for so many more; false: out of memory. Each may need a chunk of its own, but that is asked for when it does.
    pub fn reserve_others(&mut self, copies: usize) -> bool {
        self.others.try_reserve(copies).is_ok()
    }

    fn place(job_id: i64) -> (i64, usize, u64) {
        let offset = job_id.rem_euclid(CHUNK);
        (job_id.div_euclid(CHUNK), (offset / 64) as usize, 1 << (offset % 64))
    }

    fn chunk(&self, number: i64) -> Option<u32> {
        if let Some((_, place)) = self.last.get().filter(|(last, _)| *last == number) {
            return Some(place);
        }
        let place = *self.index.get(&number)?;
        self.last.set(Some((number, place)));
        Some(place)
    }

    /// A first copy that was completed. `None`: out of memory. `Some(false)`: it was known already.
    pub fn complete_first(&mut self, job_id: i64) -> Option<bool> {
        let (number, word, bit) = Self::place(job_id);
        let place = match self.chunk(number) {
            Some(place) => place,
            None => {
                self.index.try_reserve(1).ok()?;
                self.chunks.try_reserve(1).ok()?;
                let place = u32::try_from(self.chunks.len()).ok()?;
                self.chunks.push([0; WORDS]);
                self.index.insert(number, place);
                self.last.set(Some((number, place)));
                place
            }
        };
        let bits = self.chunks.get_mut(place as usize)?.get_mut(word)?;
        let is_new = *bits & bit == 0 && (self.others.is_empty() || !self.others.contains_key(&(job_id, 0)));
        *bits |= bit;
        Some(is_new)
    }

    /// Any other closure; gives the one known before.
    pub fn close(&mut self, job_id: i64, hop: i32, closure: Closure) -> Option<Closure> {
        let before = self.get(job_id, hop);
        self.others.insert((job_id, hop), closure);
        before
    }

    /// What is known of a copy: of two closures the one that `close` was told last.
    pub fn get(&self, job_id: i64, hop: i32) -> Option<Closure> {
        if !self.others.is_empty()
            && let Some(closure) = self.others.get(&(job_id, hop))
        {
            return Some(*closure);
        }
        if hop != 0 {
            return None;
        }
        let (number, word, bit) = Self::place(job_id);
        let place = self.chunk(number)?;
        let bits = self.chunks.get(place as usize)?.get(word)?;
        (bits & bit != 0).then_some(Closure { outcome: Outcome::Completed, unclaimed: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_and_map_behave_as_one_map(steps in prop::collection::vec((-9000i64..9000, 0i32..2, any::<bool>()), 0..400)) {
            let mut closed = ClosedCopies::default();
            let mut model: HashMap<(i64, i32), Closure> = HashMap::new();
            for (job_id, hop, completes) in steps {
                if completes && hop == 0 {
                    let is_new = !model.contains_key(&(job_id, 0));
                    assert_eq!(closed.complete_first(job_id), Some(is_new));
                    model.entry((job_id, 0)).or_insert(Closure { outcome: Outcome::Completed, unclaimed: false });
                } else {
                    let closure = Closure { outcome: Outcome::Failed, unclaimed: completes };
                    assert_eq!(closed.close(job_id, hop, closure), model.insert((job_id, hop), closure));
                }
                assert_eq!(closed.get(job_id, hop), model.get(&(job_id, hop)).copied());
                assert_eq!(closed.get(job_id + 1, hop), model.get(&(job_id + 1, hop)).copied());
            }
        }
    }
}
