//! A run as Markdown.

use clap::Args;

use super::{Absence, Measurement, Run};
use crate::stats;

/// What of a run is shown; empty: everything.
#[derive(Args, Default)]
pub struct Selection {
    /// Only this scenario, without the contracts
    #[arg(long)]
    scenario: Option<String>,
    /// Only these columns, besides case, system and ratio
    #[arg(long, value_delimiter = ';')]
    columns: Vec<String>,
}

/// The contracts; then one table a scenario: a line for each (case, system), a column for each metric, medians with range.
pub fn markdown(run: &Run, selection: &Selection) -> String {
    let mut text = String::new();
    if !run.contracts.is_empty() && selection.scenario.is_none() {
        text.push_str("\n### Systems\n\n| system | version | what it keeps, what it drops |\n|---|---|---|\n");
        for contract in &run.contracts {
            text.push_str(&format!("| {} | {} | {} |\n", contract.system, contract.version, contract.text));
        }
    }
    let scenarios = run.measurements.iter().map(|m| m.scenario.as_str()).chain(run.absences.iter().map(|a| a.scenario.as_str()));
    for scenario in distinct(scenarios) {
        if selection.scenario.as_ref().is_some_and(|only| only != scenario) {
            continue;
        }
        let measured: Vec<&Measurement> = run.measurements.iter().filter(|m| m.scenario == scenario).collect();
        let absent: Vec<&Absence> = run.absences.iter().filter(|a| a.scenario == scenario).collect();
        text.push_str(&table(scenario, &measured, &absent, &selection.columns));
    }
    text
}

fn table(scenario: &str, measurements: &[&Measurement], absences: &[&Absence], wanted: &[String]) -> String {
    // The fullest measurement gives the order of the columns; others may lack some of them.
    let fullest = measurements.iter().max_by_key(|m| m.metrics.len());
    let mut columns =
        distinct(fullest.into_iter().chain(measurements).flat_map(|m| m.metrics.iter().map(|(name, _)| name.as_str())));
    if !wanted.is_empty() {
        columns.retain(|column| wanted.iter().any(|name| name == column));
    }
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
pub fn number(value: f64) -> String {
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
    use serde_json::json;

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
    fn the_table_compares_with_the_last_system() {
        let both = [
            Measurement::new("s", "c", "awa", 1).metric("jobs/s", 30.0),
            Measurement::new("s", "c", "skip_locked", 1).metric("jobs/s", 10.0),
        ];
        let run = Run { measurements: both.to_vec(), ..Run::default() };
        let text = markdown(&run, &Selection::default());
        assert!(text.contains("| c | awa | 30 | 3.00 |"), "{text}");
        assert!(text.contains("| c | skip_locked | 10 | 1.00 |"), "{text}");
        let other = Selection { scenario: Some("other".to_owned()), columns: Vec::new() };
        assert_eq!(markdown(&run, &other), "");
    }

    #[test]
    fn columns_can_be_chosen() {
        let both = [Measurement::new("s", "c", "awa", 1).metric("jobs/s", 30.0).metric("lost", 0.0)];
        let run = Run { measurements: both.to_vec(), ..Run::default() };
        let text = markdown(&run, &Selection { scenario: None, columns: vec!["lost".to_owned()] });
        assert!(text.contains("| c | awa | 0 |") && !text.contains("jobs/s"), "{text}");
    }

    #[test]
    fn what_was_not_measured_has_a_line() {
        let mut run = Run::default();
        run.add(&json!({"kind": "system", "system": "pgq", "version": "3.5", "contract": "an event log"}));
        run.add(&json!({"kind": "absence", "scenario": "s", "case": "c", "system": "pgq", "reason": "no schedule"}));
        let text = markdown(&run, &Selection::default());
        assert!(text.contains("| pgq | 3.5 | an event log |"), "{text}");
        assert!(text.contains("| c | pgq | not measured: no schedule |"), "{text}");
    }
}
