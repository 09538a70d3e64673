//! What passed, what failed, and the one line that says it.

use std::time::Duration;

#[derive(Debug)]
pub struct Outcome {
    pub name: String,
    /// Why it failed: a message, a diff.
    pub failure: Option<String>,
    pub took: Option<Duration>,
}

impl Outcome {
    pub fn passed(name: impl Into<String>, took: Option<Duration>) -> Self {
        Self { name: name.into(), failure: None, took }
    }

    pub fn failed(name: impl Into<String>, why: impl Into<String>, took: Option<Duration>) -> Self {
        Self { name: name.into(), failure: Some(why.into()), took }
    }
}

#[derive(Debug, Default)]
pub struct Report {
    passed: u64,
    failed: Vec<String>,
}

impl Report {
    pub fn record(&mut self, outcome: Outcome) {
        let took = outcome.took.map_or(String::new(), |took| format!("  {} ms", took.as_millis()));
        match outcome.failure {
            None => {
                self.passed += 1;
                println!("ok      {}{took}", outcome.name);
            }
            Some(why) => {
                println!("FAILED  {}{took}", outcome.name);
                for line in why.lines() {
                    println!("        {line}");
                }
                self.failed.push(outcome.name);
            }
        }
    }

    pub fn count(&self) -> u64 {
        self.passed + self.failed.len() as u64
    }

    pub fn all_passed(&self) -> bool {
        self.failed.is_empty()
    }

    /// Ends the output: the failed names again, then the count alone on its line.
    pub fn finish(&self) {
        if !self.failed.is_empty() {
            println!("\nfailed:");
            for name in &self.failed {
                println!("  {name}");
            }
        }
        println!("\n{}", self.summary());
    }

    pub fn summary(&self) -> String {
        format!("{} passed, {} failed", self.passed, self.failed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_both() {
        let mut report = Report::default();
        assert!(report.all_passed());
        report.record(Outcome::passed("a", None));
        report.record(Outcome::failed("b", "because", Some(Duration::from_millis(3))));
        assert_eq!(report.summary(), "1 passed, 1 failed");
        assert!(!report.all_passed());
    }
}
