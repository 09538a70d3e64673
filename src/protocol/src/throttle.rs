//! Throttle: a task whose steps take longer than its interval gives way, so that it cannot fill all of the time.
//!
//! A sample is how long one step took, in percent of the interval: above 150 it is an overrun, below 70 on time; between, in the dead
//! band, nothing changes. Three overruns in a row (on-time samples between them break the row, those of the dead band do not) flip the
//! state; then each overrun begins a cool-down of about twice the time the step took, in which the body is skipped. Three samples on
//! time flip it back. A skipped tick is no sample, and a sample counts once, because it is given once: by value, at the end of the step.

/// Samples in a row that flip the state.
pub const ROW: u8 = 3;
/// Longest cool-down, in ticks.
pub const COOL_DOWN_MAX: u32 = 120;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttle {
    throttled: bool,
    /// Samples in a row that speak for the other state.
    row: u8,
    /// Ticks still to be skipped.
    cool_down: u32,
}

impl Throttle {
    pub const fn new() -> Self {
        Self { throttled: false, row: 0, cool_down: 0 }
    }

    pub fn is_throttled(&self) -> bool {
        self.throttled
    }

    pub fn is_cooling_down(&self) -> bool {
        self.cool_down > 0
    }

    /// Asked once at each tick on which the task is due: may its body run?
    pub fn admits(&mut self) -> bool {
        if self.cool_down == 0 {
            return true;
        }
        self.cool_down -= 1;
        false
    }

    /// Somebody wants the body to run now.
    pub fn end_cool_down(&mut self) {
        self.cool_down = 0;
    }

    /// A body ran: this is how long it took.
    pub fn sample(&mut self, duration: i64, interval: i64) {
        let (duration, interval) = (duration.max(0), interval.max(1));
        let overrun = i128::from(duration) * 2 > i128::from(interval) * 3;
        let on_time = i128::from(duration) * 10 < i128::from(interval) * 7;
        let speaks_for_the_other = if self.throttled { on_time } else { overrun };
        let speaks_for_this = if self.throttled { overrun } else { on_time };
        if speaks_for_the_other {
            self.row += 1;
        } else if speaks_for_this {
            self.row = 0;
        }
        if self.row >= ROW {
            self.throttled = !self.throttled;
            self.row = 0;
            self.cool_down = 0;
        }
        if self.throttled && overrun {
            let ticks = duration.saturating_mul(2).saturating_add(interval - 1) / interval;
            self.cool_down = u32::try_from(ticks).unwrap_or(COOL_DOWN_MAX).clamp(1, COOL_DOWN_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: i64 = 1000;

    fn fed(samples: &[i64]) -> Throttle {
        let mut throttle = Throttle::new();
        for duration in samples {
            // The cool-down of the test before a sample is let pass.
            while !throttle.admits() {}
            throttle.sample(*duration, INTERVAL);
        }
        throttle
    }

    #[test]
    fn a_new_one_admits() {
        let mut throttle = Throttle::new();
        assert!(throttle.admits() && !throttle.is_throttled() && !throttle.is_cooling_down());
    }

    #[test]
    fn exactly_one_and_a_half_is_no_overrun() {
        assert!(!fed(&[1500, 1500, 1500]).is_throttled());
        assert!(fed(&[1501, 1501, 1501]).is_throttled());
    }

    #[test]
    fn two_overruns_change_nothing() {
        let mut throttle = fed(&[9000, 9000]);
        assert!(!throttle.is_throttled() && throttle.admits());
    }

    #[test]
    fn three_in_a_row_throttle_and_begin_a_cool_down() {
        let throttle = fed(&[2000, 2000, 2000]);
        assert!(throttle.is_throttled() && throttle.is_cooling_down());
    }

    #[test]
    fn a_sample_on_time_breaks_the_row() {
        assert!(!fed(&[2000, 2000, 100, 2000, 2000]).is_throttled());
    }

    #[test]
    fn a_sample_of_the_dead_band_changes_nothing() {
        assert_eq!(fed(&[700, 1000, 1500]), Throttle::new());
        assert_eq!(fed(&[2000, 2000, 1000]), fed(&[2000, 2000]));
        assert!(fed(&[2000, 2000, 1000, 2000]).is_throttled());
        let before = fed(&[2000, 2000, 2000, 100, 100]);
        assert_eq!(fed(&[2000, 2000, 2000, 100, 100, 1000]), Throttle { cool_down: before.cool_down, ..before });
    }

    #[test]
    fn the_cool_down_is_twice_the_step_and_bounded() {
        for (duration, ticks) in [(1501, 4), (2000, 4), (2001, 5), (1_000_000_000, COOL_DOWN_MAX), (i64::MAX, COOL_DOWN_MAX)] {
            let mut throttle = fed(&[duration; 3]);
            let skipped = (0..1000).take_while(|_| !throttle.admits()).count();
            assert_eq!(skipped as u32, ticks, "after {duration}");
        }
    }

    #[test]
    fn a_skipped_tick_is_no_sample() {
        let mut throttle = fed(&[5000, 5000, 5000]);
        while !throttle.admits() {}
        // However long it cooled down, it is still throttled and the next body runs.
        assert!(throttle.is_throttled() && throttle.admits() && throttle.admits());
    }

    #[test]
    fn an_overrun_after_the_cool_down_begins_another_one() {
        let mut throttle = fed(&[5000, 5000, 5000, 5000]);
        assert!(!throttle.admits());
    }

    #[test]
    fn the_body_of_a_task_that_always_overruns_still_runs() {
        let mut throttle = Throttle::new();
        let mut ran = 0;
        for _ in 0..1000 {
            if throttle.admits() {
                ran += 1;
                throttle.sample(10 * INTERVAL, INTERVAL);
            }
        }
        assert!((45..60).contains(&ran), "{ran} of 1000");
    }

    #[test]
    fn recovery_takes_three_samples_on_time() {
        assert!(fed(&[2000, 2000, 2000, 100, 100]).is_throttled());
        assert!(!fed(&[2000, 2000, 2000, 100, 100, 100]).is_throttled());
        assert!(fed(&[2000, 2000, 2000, 100, 100, 2000, 100, 100]).is_throttled());
    }

    #[test]
    fn while_throttled_a_sample_on_time_begins_no_cool_down() {
        let mut throttle = fed(&[2000, 2000, 2000, 100]);
        assert!(throttle.is_throttled() && throttle.admits());
    }

    #[test]
    fn after_recovery_it_takes_three_again() {
        assert!(!fed(&[2000, 2000, 2000, 1, 1, 1, 2000, 2000]).is_throttled());
        assert!(fed(&[2000, 2000, 2000, 1, 1, 1, 2000, 2000, 2000]).is_throttled());
    }

    #[test]
    fn strange_numbers_do_no_harm() {
        let mut throttle = Throttle::new();
        throttle.sample(-5, 0);
        throttle.sample(i64::MAX, i64::MAX);
        throttle.sample(i64::MIN, i64::MIN);
        assert!(throttle.admits());
    }
}
