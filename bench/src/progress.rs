//! A bar on the terminal for loads that take long; nothing where nobody looks.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const LONG: Duration = Duration::from_secs(20);

pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Hides itself when the output is not a terminal.
    pub fn over(length: Duration) -> Progress {
        if length < LONG {
            return Progress { bar: ProgressBar::hidden() };
        }
        let bar = ProgressBar::new(length.as_secs());
        if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} [{wide_bar}] {eta_precise} {msg}") {
            bar.set_style(style);
        }
        Progress { bar }
    }

    pub fn enter(&self, phase: &str) {
        self.bar.set_prefix(phase.to_owned());
        self.bar.set_message(phase.to_owned());
    }

    pub fn pass(&self, time: Duration, rate: Option<f64>) {
        self.bar.inc(time.as_secs());
        if let Some(rate) = rate {
            self.bar.set_message(format!("{}: {rate:.0} jobs/s", self.bar.prefix()));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
