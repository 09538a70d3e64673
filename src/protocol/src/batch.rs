//! How a batch is cut into evidence rows, and how an evidence row stores its hops.

use crate::limits::JOBS_PER_EVIDENCE_ROW;

/// Lengths of the rows that a batch of `jobs` becomes.
pub fn row_lengths(jobs: usize) -> impl Iterator<Item = usize> {
    let rows = jobs.div_ceil(JOBS_PER_EVIDENCE_ROW);
    (0..rows).map(move |row| JOBS_PER_EVIDENCE_ROW.min(jobs - row * JOBS_PER_EVIDENCE_ROW))
}

/// `None` when every job of the row is on its first copy: the common case costs no bytes.
pub fn stored_hops(hops: &[i32]) -> Option<&[i32]> {
    if hops.iter().all(|hop| *hop == 0) { None } else { Some(hops) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_cover_the_batch() {
        for jobs in [0, 1, 511, 512, 513, 1024, 5000] {
            assert_eq!(row_lengths(jobs).sum::<usize>(), jobs);
            assert!(row_lengths(jobs).all(|n| (1..=JOBS_PER_EVIDENCE_ROW).contains(&n)));
        }
    }
}
