//! Delay before the next attempt: exponential, clamped before it is computed, shortened by up to a quarter of jitter.

/// `attempt` counts from 1. `seed` is any 64 random bits. Never negative, never above `max`.
pub fn delay(base: i64, max: i64, attempt: u32, seed: u64) -> i64 {
    let max = max.max(0);
    let base = base.clamp(0, max);
    let doublings = attempt.saturating_sub(1);
    let fits = base.leading_zeros() > doublings + 1;
    let raw = if fits {
        (base << doublings).min(max)
    } else if base == 0 {
        0
    } else {
        max
    };
    let jitter_range = raw / 4;
    if jitter_range == 0 {
        return raw;
    }
    raw - (seed % (jitter_range as u64 + 1)) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn doubles_then_stays_at_the_maximum() {
        let second = 1_000_000;
        assert_eq!(delay(second, 86_400 * second, 1, 0), second);
        assert_eq!(delay(second, 86_400 * second, 4, 0), 8 * second);
        for attempt in [18, 43, 44, 63, 64, 65, 1000, u32::MAX] {
            assert_eq!(delay(second, 86_400 * second, attempt, 0), 86_400 * second);
        }
    }

    proptest! {
        #[test]
        fn is_bounded_for_every_input(base in any::<i64>(), max in any::<i64>(), attempt in any::<u32>(), seed in any::<u64>()) {
            let d = delay(base, max, attempt, seed);
            prop_assert!(d >= 0);
            prop_assert!(d <= max.max(0));
        }
    }
}
