//! Counts and latencies since the last sample, in bounded memory, and their lines of JSON.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

pub const SYSTEM: &str = "awa_queue";
const LATENCY_WINDOW: Duration = Duration::from_secs(30);
const LATENCY_MAX_US: u64 = 3_600_000_000;
const FIGURES: u8 = 3;

pub struct Samples {
    enqueued: AtomicI64,
    completed: AtomicI64,
    latencies: Mutex<Latencies>,
    every: Duration,
    instance: u32,
}

/// One histogram for each interval between samples; the last 30 seconds of them count.
struct Latencies {
    now: Histogram<u64>,
    before: VecDeque<Histogram<u64>>,
}

impl Samples {
    pub fn new(every: Duration, instance: u32) -> Result<Samples> {
        let latencies = Mutex::new(Latencies { now: histogram()?, before: VecDeque::new() });
        Ok(Samples { enqueued: AtomicI64::new(0), completed: AtomicI64::new(0), latencies, every, instance })
    }

    pub fn enqueued(&self, jobs: usize) {
        self.enqueued.fetch_add(jobs as i64, Ordering::Relaxed);
    }

    pub fn completed(&self, jobs: usize) {
        self.completed.fetch_add(jobs as i64, Ordering::Relaxed);
    }

    pub fn claimed_after(&self, latency: Duration) -> Result<()> {
        let mut latencies = self.latencies.lock().map_err(|_| anyhow!("the latencies are lost"))?;
        latencies.now.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1));
        Ok(())
    }

    /// The lines of one interval, which is over.
    pub fn take(&self, at: SystemTime, depth: Option<(i64, i64)>) -> Result<Vec<Value>> {
        let seconds = self.every.as_secs_f64();
        let rate = |count: &AtomicI64| count.swap(0, Ordering::Relaxed) as f64 / seconds;
        let mut list = vec![("enqueue_rate", rate(&self.enqueued), seconds), ("completion_rate", rate(&self.completed), seconds)];
        let recent = self.recent()?;
        for (metric, quantile) in [("claim_p50_ms", 0.5), ("claim_p95_ms", 0.95), ("claim_p99_ms", 0.99)] {
            list.push((metric, recent.value_at_quantile(quantile) as f64 / 1e3, LATENCY_WINDOW.as_secs_f64()));
        }
        if let Some((waiting, running)) = depth {
            list.push(("queue_depth", waiting as f64, 0.0));
            list.push(("running_depth", running as f64, 0.0));
            list.push(("total_backlog", (waiting + running) as f64, 0.0));
        }
        let time = timestamp(at);
        let line = |(metric, value, window): (&str, f64, f64)| {
            json!({"t": time, "system": SYSTEM, "kind": "adapter", "subject_kind": "adapter", "subject": "", "metric": metric,
                   "value": value, "window_s": window, "instance_id": self.instance})
        };
        Ok(list.into_iter().map(line).collect())
    }

    fn recent(&self) -> Result<Histogram<u64>> {
        let mut latencies = self.latencies.lock().map_err(|_| anyhow!("the latencies are lost"))?;
        let finished = std::mem::replace(&mut latencies.now, histogram()?);
        latencies.before.push_back(finished);
        let kept = LATENCY_WINDOW.as_secs().div_ceil(self.every.as_secs().max(1)) as usize;
        while latencies.before.len() > kept {
            latencies.before.pop_front();
        }
        let mut recent = histogram()?;
        for part in &latencies.before {
            recent.add(part)?;
        }
        Ok(recent)
    }
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(LATENCY_MAX_US, FIGURES)?)
}

/// How long until the next multiple of the interval, so that the samples of all systems line up.
pub fn until_next(now: SystemTime, every: Duration) -> Duration {
    let passed = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let every_ms = every.as_millis().max(1);
    Duration::from_millis(u64::try_from(every_ms - passed.as_millis() % every_ms).unwrap_or(1))
}

/// 2026-04-17T09:00:10.000Z
pub fn timestamp(at: SystemTime) -> String {
    let passed = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = passed.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", passed.subsec_millis())
}

/// Year, month and day, so many days after 1970-01-01.
fn date(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(400) || (year.is_multiple_of(4) && !year.is_multiple_of(100));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_dates() {
        let at = |seconds: u64| timestamp(UNIX_EPOCH + Duration::from_millis(seconds * 1_000 + 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(1_776_416_410), "2026-04-17T09:00:10.007Z");
    }

    #[test]
    fn samples_line_up_with_the_clock() {
        let now = UNIX_EPOCH + Duration::from_millis(12_300);
        assert_eq!(until_next(now, Duration::from_secs(5)), Duration::from_millis(2_700));
    }

    #[test]
    fn an_interval_gives_a_line_a_metric() -> Result<()> {
        let samples = Samples::new(Duration::from_secs(2), 3)?;
        samples.enqueued(10);
        samples.completed(4);
        samples.claimed_after(Duration::from_millis(8))?;
        let lines = samples.take(UNIX_EPOCH, Some((5, 1)))?;
        let value = |metric: &str| lines.iter().find(|line| line["metric"] == metric).and_then(|line| line["value"].as_f64());
        assert_eq!(value("enqueue_rate"), Some(5.0));
        assert_eq!(value("completion_rate"), Some(2.0));
        assert_eq!(value("queue_depth"), Some(5.0));
        assert!(value("claim_p99_ms").is_some_and(|ms| (7.9..8.1).contains(&ms)));
        assert!(lines.iter().all(|line| line["instance_id"] == 3 && line["kind"] == "adapter"));
        let next = samples.take(UNIX_EPOCH, None)?;
        assert!(next.iter().any(|line| line["metric"] == "enqueue_rate" && line["value"] == 0.0));
        Ok(())
    }
}
