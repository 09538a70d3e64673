//! Writes what a run found, line by line, and keeps it for the tables at its end.

use std::fs::{File, OpenOptions};
use std::io::Write;

use anyhow::{Context, Result};
use postgres::{Client, NoTls};
use serde_json::{Map, Value, json};

use super::table::number;
use super::{Measurement, Run};
use crate::Target;
use crate::load::PhaseResult;
use crate::systems::SystemName;

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
            "waits": phase.sessions.waits,
            "backend_megabytes_most": phase.sessions.backend_megabytes_most,
            "snapshot_age_most": phase.sessions.snapshot_age_most,
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
