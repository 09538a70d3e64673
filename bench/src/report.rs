//! Measurements as JSON lines and as Markdown tables. What could not be measured is a line, too.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use postgres::{Client, NoTls};
use serde_json::{Map, Value, json};

use crate::Target;
use crate::load::PhaseResult;
use crate::stats;
use crate::systems::SystemName;

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

/// Something that a system could not do, or a system that is not there: a line of the table all the same.
#[derive(Clone, Debug)]
pub struct Absence {
    pub scenario: String,
    pub case: String,
    pub system: String,
    pub reason: String,
}

/// A system of the run, and what it keeps and drops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contract {
    pub system: String,
    pub version: String,
    pub text: String,
}

/// What happened second by second, in one phase of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub scenario: String,
    pub system: String,
    pub phase: String,
    /// Completions of each second
    pub rate: Vec<f64>,
    /// Unfinished jobs at the end of each second
    pub depth: Vec<f64>,
}

/// Everything that a file of JSON lines says.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub contracts: Vec<Contract>,
    pub measurements: Vec<Measurement>,
    pub absences: Vec<Absence>,
    pub series: Vec<Series>,
}

impl Run {
    /// A file of several scenarios names its systems several times.
    fn add_contract(&mut self, contract: Contract) {
        if !self.contracts.contains(&contract) {
            self.contracts.push(contract);
        }
    }

    fn add(&mut self, value: &Value) {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let numbers = |name: &str| -> Vec<f64> {
            value.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        match text("kind").as_str() {
            "measurement" => self.measurements.extend(Measurement::from_json(value)),
            "absence" => self.absences.push(Absence {
                scenario: text("scenario"),
                case: text("case"),
                system: text("system"),
                reason: text("reason"),
            }),
            "system" => {
                self.add_contract(Contract { system: text("system"), version: text("version"), text: text("contract") });
            }
            "series" => self.series.push(Series {
                scenario: text("scenario"),
                system: text("system"),
                phase: text("phase"),
                rate: numbers("rate"),
                depth: numbers("depth"),
            }),
            _ => {}
        }
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
    run: Run,
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
        let mut recorder = Recorder { out, run: Run::default(), broken: 0 };
        let mut client = Client::connect(&target.url, NoTls).context("cannot connect")?;
        let mut settings = Map::new();
        for name in SETTINGS {
            let row = client.query_one("SELECT pg_catalog.current_setting($1, true)", &[&name])?;
            settings.insert(name.to_owned(), json!(row.get::<_, Option<String>>(0)));
        }
        recorder.line(&json!({"kind": "server", "settings": settings}))?;
        for &name in &target.systems {
            recorder.introduce(target, name)?;
        }
        Ok(recorder)
    }

    fn introduce(&mut self, target: &Target, name: SystemName) -> Result<()> {
        let (version, contract) = match name.installed(&target.peers) {
            Ok(version) => (version, target.system(name).contract().to_owned()),
            Err(reason) => {
                eprintln!("{} is not measured: {reason}", name.as_str());
                (String::new(), format!("NOT MEASURED, {reason}"))
            }
        };
        self.keep(&json!({"kind": "system", "system": name.as_str(), "version": version, "contract": contract}))
    }

    pub fn absent(&mut self, scenario: &str, case: &str, system: &str, reason: &str) -> Result<()> {
        self.keep(&json!({"kind": "absence", "scenario": scenario, "case": case, "system": system, "reason": reason}))
    }

    /// For the plots: each second of each phase.
    pub fn series(&mut self, scenario: &str, system: &str, phase: &PhaseResult) -> Result<()> {
        self.keep(&json!({
            "kind": "series",
            "scenario": scenario,
            "system": system,
            "phase": phase.label,
            "rate": phase.per_second,
            "depth": phase.depth_per_second,
            "waits": phase.waits,
        }))
    }

    fn keep(&mut self, value: &Value) -> Result<()> {
        self.run.add(value);
        self.line(value)
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
        self.run.measurements.push(measurement);
        Ok(())
    }

    /// A check that did not hold. The run goes on, so that its numbers can be looked at, and fails at the end.
    pub fn complain(&mut self, text: &str) -> Result<()> {
        eprintln!("BROKEN: {text}");
        self.broken += 1;
        self.line(&json!({"kind": "broken", "text": text}))
    }

    pub fn run(&self) -> &Run {
        &self.run
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

pub fn read(path: &Path) -> Result<Run> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut run = Run::default();
    for line in BufReader::new(file).lines() {
        run.add(&serde_json::from_str(&line?)?);
    }
    Ok(run)
}

/// The contracts; then one table a scenario: a line for each (case, system), a column for each metric, medians with range.
pub fn markdown(run: &Run) -> String {
    let mut text = String::new();
    if !run.contracts.is_empty() {
        text.push_str("\n### Systems\n\n| system | version | what it keeps, what it drops |\n|---|---|---|\n");
        for contract in &run.contracts {
            text.push_str(&format!("| {} | {} | {} |\n", contract.system, contract.version, contract.text));
        }
    }
    let scenarios = run.measurements.iter().map(|m| m.scenario.as_str()).chain(run.absences.iter().map(|a| a.scenario.as_str()));
    for scenario in distinct(scenarios) {
        let measured: Vec<&Measurement> = run.measurements.iter().filter(|m| m.scenario == scenario).collect();
        let absent: Vec<&Absence> = run.absences.iter().filter(|a| a.scenario == scenario).collect();
        text.push_str(&table(scenario, &measured, &absent));
    }
    text
}

fn table(scenario: &str, measurements: &[&Measurement], absences: &[&Absence]) -> String {
    // The fullest measurement gives the order of the columns; others may lack some of them.
    let fullest = measurements.iter().max_by_key(|m| m.metrics.len());
    let columns = distinct(fullest.into_iter().chain(measurements).flat_map(|m| m.metrics.iter().map(|(name, _)| name.as_str())));
    let compares = distinct(measurements.iter().map(|m| m.system.as_str())).len() > 1;
    let width = columns.len() + usize::from(compares);
    let mut text = format!("\n### {scenario}\n\n| case | system |");
    for column in &columns {
        text.push_str(&format!(" {column} |"));
    }
    text.push_str(if compares { " ratio |\n|---|---|" } else { "\n|---|---|" });
    text.push_str(&"--:|".repeat(width));
    text.push('\n');
    let cases = measurements.iter().map(|m| m.case.as_str()).chain(absences.iter().map(|a| a.case.as_str()));
    for case in distinct(cases) {
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
        for (system, reason) in distinct_absences(absences, case) {
            text.push_str(&format!("| {case} | {system} | not measured: {reason} |{}\n", " |".repeat(width.saturating_sub(1))));
        }
    }
    if compares {
        text.push_str("\n`ratio`: first column of numbers, relative to the last system of the case.\n");
    }
    text
}

/// Rounds repeat them.
fn distinct_absences<'a>(absences: &[&'a Absence], case: &str) -> Vec<(&'a str, &'a str)> {
    let mut seen = Vec::new();
    for absence in absences.iter().filter(|absence| absence.case == case) {
        let line = (absence.system.as_str(), absence.reason.as_str());
        if !seen.contains(&line) {
            seen.push(line);
        }
    }
    seen
}

pub fn samples(measurements: &[&Measurement], system: &str, metric: &str) -> Vec<f64> {
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

pub fn distinct<'a>(items: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
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
        let text = markdown(&Run { measurements: both.to_vec(), ..Run::default() });
        assert!(text.contains("| c | awa | 30 | 3.00 |"), "{text}");
        assert!(text.contains("| c | skip_locked | 10 | 1.00 |"), "{text}");
    }

    #[test]
    fn what_was_not_measured_has_a_line() {
        let mut run = Run::default();
        run.add(&json!({"kind": "system", "system": "pgq", "version": "3.5", "contract": "an event log"}));
        run.add(&json!({"kind": "absence", "scenario": "s", "case": "c", "system": "pgq", "reason": "no schedule"}));
        let text = markdown(&run);
        assert!(text.contains("| pgq | 3.5 | an event log |"), "{text}");
        assert!(text.contains("| c | pgq | not measured: no schedule |"), "{text}");
    }
}
