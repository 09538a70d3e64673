//! What a job costs, in units that a busy machine does not change: bytes of log, and instructions of the server.
//!
//! `bench/baseline.json` has what it cost when somebody last looked. A change beyond the tolerance, in either direction, is
//! explained in the commit that updates the file: `AWA_BASELINE=write awa test hot_path`.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::{DATABASE, Stage};
use crate::cluster::Shutdown;
use crate::layout::Layout;

/// Plan, dictionaries, the first page of everything
const WARM_UP: usize = 3;
const COUNTER: &[&str] = &["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"];

/// Statements that take jobs from enqueue to done.
struct Shape {
    name: &'static str,
    jobs: usize,
    statements: &'static str,
    /// Repetitions for the log; for the instructions, the lower and the higher number
    repeat: usize,
    counted: (usize, usize),
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "batches of 100",
        jobs: 100,
        statements: "SELECT cardinality(awa.enqueue_many('q', 'test', array_agg('{\"n\": 1, \"to\": \"someone@example.org\"}'::jsonb))) FROM generate_series(1, 100);\n\
                     SELECT count(d) FROM (SELECT array_agg(job_id) AS j, array_agg(run_lease) AS l FROM awa.claim('q', 100)) AS c, LATERAL awa.complete_many(c.j, c.l) AS d;\n",
        repeat: 50,
        counted: (5, 25),
    },
    Shape {
        name: "one job a call",
        jobs: 1,
        statements: "SELECT awa.enqueue('q', 'test', '{\"n\": 1, \"to\": \"someone@example.org\"}');\n\
                     SELECT awa.complete(job_id, run_lease) FROM awa.claim('q', 1);\n",
        repeat: 300,
        counted: (20, 120),
    },
];

impl Shape {
    fn script(&self, repeat: usize) -> String {
        let mark = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint AS wal_position;\n";
        format!("{}{mark}{}{mark}", self.statements.repeat(WARM_UP), self.statements.repeat(repeat))
    }
}

pub fn a_job_writes_as_much_log_as_before(stage: &mut Stage<'_>) -> Result<()> {
    let major = major(stage)?;
    stage.cluster.stop(Shutdown::Fast)?;
    let mut measured = Map::new();
    for shape in &SHAPES {
        let said = stage.cluster.single_user(&[], DATABASE, &shape.script(shape.repeat))?;
        let positions: Vec<f64> = said.lines().filter_map(|line| quoted(line, "wal_position = ")).collect();
        let [before, after] = positions[..] else { bail!("{} log positions were printed", positions.len()) };
        measured.insert(shape.name.to_owned(), json!(rounded((after - before) / (shape.repeat * shape.jobs) as f64)));
    }
    stage.cluster.start()?;
    compare("WAL bytes a job", &major, &measured)
}

pub fn a_job_takes_as_many_instructions_as_before(stage: &mut Stage<'_>) -> Result<()> {
    let key = format!("{}, {}", major(stage)?, stage.profile.name());
    let asserts: String = stage.connect()?.query_one("SHOW debug_assertions", &[])?.try_get(0)?;
    if asserts == "on" {
        println!("NOT RUN hot_path: a server with assertions takes other instructions");
        return Ok(());
    }
    if !counts_instructions() {
        println!("NOT RUN hot_path: valgrind is not installed, so no instructions are counted");
        return Ok(());
    }
    stage.cluster.stop(Shutdown::Fast)?;
    let mut measured = Map::new();
    for shape in &SHAPES {
        let (few, many) = shape.counted;
        // The difference of two runs leaves out what starting and ending cost.
        let low = instructions(&stage.cluster.single_user(COUNTER, DATABASE, &shape.script(few))?)?;
        let high = instructions(&stage.cluster.single_user(COUNTER, DATABASE, &shape.script(many))?)?;
        measured.insert(shape.name.to_owned(), json!(rounded((high - low) / ((many - few) * shape.jobs) as f64)));
    }
    stage.cluster.start()?;
    compare("instructions a job", &key, &measured)
}

fn major(stage: &Stage<'_>) -> Result<String> {
    let number: i32 = stage.connect()?.query_one("SELECT current_setting('server_version_num')::integer", &[])?.try_get(0)?;
    Ok(format!("PostgreSQL {}", number / 10_000))
}

fn counts_instructions() -> bool {
    let mut command = Command::new("valgrind");
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// `I refs:  1,234` of cachegrind.
fn instructions(said: &str) -> Result<f64> {
    let line = said.lines().find(|line| line.contains("I") && line.contains("refs:")).context("cachegrind printed no count")?;
    let count: String = line.rsplit(':').next().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    count.parse().with_context(|| format!("no number in: {line}"))
}

fn quoted(line: &str, name: &str) -> Option<f64> {
    line.split_once(name)?.1.split('"').nth(1)?.parse().ok()
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn baseline_file() -> Result<PathBuf> {
    Ok(Layout::find()?.repo.join("bench/baseline.json"))
}

fn compare(what: &str, key: &str, measured: &Map<String, Value>) -> Result<()> {
    let file = baseline_file()?;
    let mut baseline: Value = serde_json::from_str(&fs::read_to_string(&file).context("cannot read bench/baseline.json")?)?;
    let entry = baseline.get_mut(what).context("the baseline does not know this measure")?;
    if std::env::var_os("AWA_BASELINE").is_some_and(|value| value == "write") {
        entry.as_object_mut().context("the baseline is malformed")?.insert(key.to_owned(), Value::Object(measured.clone()));
        return Ok(fs::write(&file, format!("{baseline:#}\n"))?);
    }
    let tolerance = entry.get("tolerance").and_then(Value::as_f64).context("the baseline has no tolerance")?;
    let Some(expected) = entry.get(key).and_then(Value::as_object) else {
        println!("NOT COMPARED hot_path: no {what} for {key} in bench/baseline.json; measured {}", Value::Object(measured.clone()));
        return Ok(());
    };
    let mut differences = Vec::new();
    for (shape, value) in measured {
        let (is, was) = (value.as_f64().unwrap_or_default(), expected.get(shape).and_then(Value::as_f64).unwrap_or_default());
        if (is - was).abs() > tolerance * was {
            differences.push(format!("{what}, {key}, {shape}: was {was}, is {is} ({:+.1} %)", 100.0 * (is / was - 1.0)));
        }
    }
    ensure!(
        differences.is_empty(),
        "{}\nIf that is meant, say why in the commit that updates bench/baseline.json (AWA_BASELINE=write).",
        differences.join("\n")
    );
    Ok(())
}
