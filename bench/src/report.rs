//! Measurements as JSON lines and as Markdown tables.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use postgres::{Client, NoTls};
use serde_json::{Map, Value, json};

use crate::Target;
use crate::stats;

#[derive(Clone, Debug)]
pub struct Measurement {
    pub scenario: String,
    /// What was varied: batch size, sessions, backlog. One line of the table is one (case, system).
    pub case: String,
    pub system: String,
    pub round: u32,
    /// The first metric is the one compared between systems.
    pub metrics: Vec<(String, f64)>,
}

impl Measurement {
    pub fn new(scenario: &str, case: impl Into<String>, system: impl Into<String>, round: u32) -> Self {
        Measurement { scenario: scenario.to_owned(), case: case.into(), system: system.into(), round, metrics: Vec::new() }
    }

    pub fn metric(mut self, name: &str, value: impl Into<Option<f64>>) -> Self {
        if let Some(value) = value.into() {
            self.metrics.push((name.to_owned(), value));
        }
        self
    }

    fn to_json(&self) -> Value {
        let metrics: Map<String, Value> = self.metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let order: Vec<&str> = self.metrics.iter().map(|(name, _)| name.as_str()).collect();
        json!({
            "kind": "measurement",
            "scenario": self.scenario,
            "case": self.case,
            "system": self.system,
            "round": self.round,
            "order": order,
            "metrics": metrics,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = |name: &str| Some(value.get(name)?.as_str()?.to_owned());
        let values = value.get("metrics")?;
        let metrics = value
            .get("order")?
            .as_array()?
            .iter()
            .filter_map(|name| Some((name.as_str()?.to_owned(), values.get(name.as_str()?)?.as_f64()?)))
            .collect();
        let round = u32::try_from(value.get("round")?.as_u64()?).ok()?;
        Some(Measurement { scenario: text("scenario")?, case: text("case")?, system: text("system")?, round, metrics })
    }
}

/// Settings that decide what a number means; written once a run.
const SETTINGS: [&str; 12] = [
    "server_version",
    "synchronous_commit",
    "fsync",
    "full_page_writes",
    "wal_level",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "autovacuum",
    "data_checksums",
    "shared_preload_libraries",
    "debug_assertions",
];

pub struct Recorder {
    out: Option<File>,
    measurements: Vec<Measurement>,
    broken: usize,
}

impl Recorder {
    pub fn open(target: &Target) -> Result<Self> {
        let out = match &target.out {
            Some(path) => Some(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("cannot write {}", path.display()))?,
            ),
            None => None,
        };
        let mut recorder = Recorder { out, measurements: Vec::new(), broken: 0 };
        let mut client = Client::connect(&target.url, NoTls).context("cannot connect")?;
        let mut settings = Map::new();
        for name in SETTINGS {
            let row = client.query_one("SELECT pg_catalog.current_setting($1, true)", &[&name])?;
            settings.insert(name.to_owned(), json!(row.get::<_, Option<String>>(0)));
        }
        recorder.line(&json!({"kind": "server", "settings": settings}))?;
        Ok(recorder)
    }

    /// A line for those who plot; not part of a table.
    pub fn note(&mut self, value: &Value) -> Result<()> {
        self.line(value)
    }

    pub fn record(&mut self, measurement: Measurement) -> Result<()> {
        let shown: Vec<String> = measurement.metrics.iter().map(|(name, value)| format!("{name}={}", number(*value))).collect();
        eprintln!(
            "{} | {} | {} | round {} | {}",
            measurement.scenario,
            measurement.case,
            measurement.system,
            measurement.round,
            shown.join(" ")
        );
        self.line(&measurement.to_json())?;
        self.measurements.push(measurement);
        Ok(())
    }

    /// A check that did not hold. The run goes on, so that its numbers can be looked at, and fails at the end.
    pub fn complain(&mut self, text: &str) -> Result<()> {
        eprintln!("BROKEN: {text}");
        self.broken += 1;
        self.line(&json!({"kind": "broken", "text": text}))
    }

    pub fn measurements(&self) -> &[Measurement] {
        &self.measurements
    }

    pub fn broken(&self) -> usize {
        self.broken
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        if let Some(out) = &mut self.out {
            writeln!(out, "{value}")?;
        }
        Ok(())
    }
}

pub fn read(path: &Path) -> Result<Vec<Measurement>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut measurements = Vec::new();
    for line in BufReader::new(file).lines() {
        let value: Value = serde_json::from_str(&line?)?;
        if value.get("kind").and_then(Value::as_str) == Some("measurement") {
            measurements.extend(Measurement::from_json(&value));
        }
    }
    Ok(measurements)
}

/// One table a scenario: a line for each (case, system), a column for each metric, medians with their range.
pub fn markdown(measurements: &[Measurement]) -> String {
    let mut text = String::new();
    for scenario in distinct(measurements.iter().map(|m| m.scenario.as_str())) {
        let of_scenario: Vec<&Measurement> = measurements.iter().filter(|m| m.scenario == scenario).collect();
        text.push_str(&table(scenario, &of_scenario));
    }
    text
}

fn table(scenario: &str, measurements: &[&Measurement]) -> String {
    // The fullest measurement gives the order of the columns; others may lack some of them.
    let fullest = measurements.iter().max_by_key(|m| m.metrics.len());
    let columns = distinct(fullest.into_iter().chain(measurements).flat_map(|m| m.metrics.iter().map(|(name, _)| name.as_str())));
    let mut text = format!("\n### {scenario}\n\n| case | system |");
    for column in &columns {
        text.push_str(&format!(" {column} |"));
    }
    let compares = distinct(measurements.iter().map(|m| m.system.as_str())).len() > 1;
    text.push_str(if compares { " ratio |\n|---|---|" } else { "\n|---|---|" });
    text.push_str(&"--:|".repeat(columns.len() + usize::from(compares)));
    text.push('\n');
    for case in distinct(measurements.iter().map(|m| m.case.as_str())) {
        let of_case: Vec<&Measurement> = measurements.iter().copied().filter(|m| m.case == case).collect();
        let systems = distinct(of_case.iter().map(|m| m.system.as_str()));
        let baseline = systems.last().and_then(|system| primary(&of_case, system));
        for system in &systems {
            text.push_str(&format!("| {case} | {system} |"));
            for column in &columns {
                text.push_str(&format!(" {} |", cell(&samples(&of_case, system, column))));
            }
            if compares {
                text.push_str(&format!(" {} |", ratio(primary(&of_case, system), baseline)));
            }
            text.push('\n');
        }
    }
    if compares {
        text.push_str("\n`ratio`: first column of numbers, relative to the last system of the case.\n");
    }
    text
}

fn samples(measurements: &[&Measurement], system: &str, metric: &str) -> Vec<f64> {
    let of_system = measurements.iter().filter(|m| m.system == system);
    of_system.flat_map(|m| m.metrics.iter().filter(|(name, _)| name == metric).map(|(_, value)| *value)).collect()
}

fn primary(measurements: &[&Measurement], system: &str) -> Option<f64> {
    let (name, _) = measurements.iter().find(|m| m.system == system)?.metrics.first()?;
    stats::median(&samples(measurements, system, name))
}

fn ratio(value: Option<f64>, baseline: Option<f64>) -> String {
    match (value, baseline) {
        (Some(value), Some(baseline)) if baseline != 0.0 => format!("{:.2}", value / baseline),
        _ => String::new(),
    }
}

fn cell(samples: &[f64]) -> String {
    match (stats::median(samples), stats::range(samples)) {
        (Some(median), Some((min, max))) if samples.len() > 1 && min != max => {
            format!("{} ({}–{})", number(median), number(min), number(max))
        }
        (Some(median), _) => number(median),
        _ => String::new(),
    }
}

/// Three significant digits below 1,000, whole numbers with separators above.
fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if size < 1_000.0 {
        let decimals = (2 - size.log10().floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.decimals$}");
        return if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text };
    }
    let digits = format!("{size:.0}");
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn distinct<'a>(items: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(0.12345), "0.123");
        assert_eq!(number(12.5), "12.5");
        assert_eq!(number(999.6), "1000");
        assert_eq!(number(-1_234_567.0), "-1,234,567");
    }

    #[test]
    fn a_measurement_survives_its_json_line() {
        let written = Measurement::new("s", "c", "awa", 2).metric("jobs/s", 7.0).metric("a", 1.5);
        let read = Measurement::from_json(&written.to_json());
        assert_eq!(read.map(|m| m.metrics), Some(written.metrics));
    }

    #[test]
    fn the_table_compares_with_the_last_system() {
        let both = [
            Measurement::new("s", "c", "awa", 1).metric("jobs/s", 30.0),
            Measurement::new("s", "c", "skip_locked", 1).metric("jobs/s", 10.0),
        ];
        let text = markdown(&both);
        assert!(text.contains("| c | awa | 30 | 3.00 |"), "{text}");
        assert!(text.contains("| c | skip_locked | 10 | 1.00 |"), "{text}");
    }
}
