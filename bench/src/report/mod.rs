//! Measurements as JSON lines and as Markdown tables. What could not be measured is a line, too.

mod recorder;
mod table;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

pub use recorder::Recorder;
pub use table::{Selection, distinct, markdown, samples};

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

pub fn read(path: &Path) -> Result<Run> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut run = Run::default();
    for line in BufReader::new(file).lines() {
        run.add(&serde_json::from_str(&line?)?);
    }
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_survives_its_json_line() {
        let written = Measurement::new("s", "c", "awa", 2).metric("jobs/s", 7.0).metric("a", 1.5);
        let read = Measurement::from_json(&written.to_json());
        assert_eq!(read.map(|m| m.metrics), Some(written.metrics));
    }
}
