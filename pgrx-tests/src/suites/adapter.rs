//! The adapter for the public cross-system harness: a descriptor first, then a JSON record a metric; it takes tokens and ends in time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{DATABASE, Stage};
use crate::layout::Layout;
use crate::process::{Signal, run_visibly, signal, wait_until};

const LINE_LIMIT: Duration = Duration::from_secs(60);
const END_LIMIT: Duration = Duration::from_secs(5);
const TOKENS: usize = 40;
const JOBS_A_TOKEN: usize = 25;
const REQUIRED: [&str; 6] =
    ["claim_p50_ms", "claim_p95_ms", "claim_p99_ms", "enqueue_rate", "completion_rate", "queue_depth"];

pub fn the_adapter_speaks_the_protocol_of_the_public_harness(stage: &mut Stage<'_>) -> Result<()> {
    let layout = Layout::find()?;
    let target = layout.cargo_target("harness");
    run_visibly(Command::new("cargo").current_dir(&layout.repo).env("CARGO_TARGET_DIR", &target).args([
        "build", "--quiet", "--package", "awa_bench", "--bin", "awa_adapter",
    ]))?;
    let url = format!(
        "postgres://postgres@/{DATABASE}?host={}&port={}",
        stage.cluster.socket_dir().display(),
        stage.cluster.port()
    );
    let mut adapter = Command::new(target.join("debug/awa_adapter"))
        .env("DATABASE_URL", url)
        .envs([("PRODUCER_MODE", "fixed"), ("PRODUCER_PACING", "harness"), ("WORKER_COUNT", "4"), ("SAMPLE_EVERY_S", "1")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run the adapter")?;
    let lines = lines_of(&mut adapter)?;
    let result = converse(stage, &mut adapter, &lines, &layout);
    if result.is_err() {
        adapter.kill()?;
    }
    adapter.wait()?;
    result
}

fn converse(stage: &Stage<'_>, adapter: &mut Child, lines: &Receiver<String>, layout: &Layout) -> Result<()> {
    let descriptor = next(lines)?;
    ensure!(descriptor["kind"] == "descriptor", "the first line is {descriptor}");
    let manifest: Value = serde_json::from_str(&std::fs::read_to_string(layout.repo.join("bench/adapter/adapter.json"))?)?;
    for list in ["event_tables", "extensions"] {
        let names = |value: &Value| value[list].as_array().cloned().unwrap_or_default();
        let missing: Vec<Value> = names(&manifest).into_iter().filter(|name| !names(&descriptor).contains(name)).collect();
        ensure!(missing.is_empty(), "the descriptor lacks {missing:?} of the manifest's {list}");
    }
    ensure!(descriptor["system"] == manifest["system"], "the descriptor names {}", descriptor["system"]);

    let mut tokens = adapter.stdin.take().context("the adapter has no input")?;
    for _ in 0..TOKENS {
        writeln!(tokens, "ENQUEUE {JOBS_A_TOKEN}")?;
    }
    tokens.flush()?;
    let all = (TOKENS * JOBS_A_TOKEN) as f64;
    let (mut enqueued, mut completed, mut metrics) = (0.0, 0.0, Vec::new());
    let begun = Instant::now();
    while (completed < all || metrics.len() < REQUIRED.len()) && begun.elapsed() < LINE_LIMIT {
        let line = next(lines)?;
        ensure!(line["kind"] == "adapter" && line["subject_kind"] == "adapter", "a line after the descriptor is {line}");
        let metric = line["metric"].as_str().context("a record has no metric")?.to_owned();
        let value = line["value"].as_f64().with_context(|| format!("{metric} has no value"))?;
        ensure!(line["t"].is_string() && line["window_s"].is_number(), "{metric} has no time or no window");
        enqueued += if metric == "enqueue_rate" { value } else { 0.0 };
        completed += if metric == "completion_rate" { value } else { 0.0 };
        if REQUIRED.contains(&metric.as_str()) && !metrics.contains(&metric) {
            metrics.push(metric);
        }
    }
    ensure!(metrics.len() == REQUIRED.len(), "only {metrics:?} were told");
    // The interval is a second, so rates are counts.
    ensure!((enqueued, completed) == (all, all), "{all} jobs were asked for, {enqueued} enqueued, {completed} completed");

    signal(i32::try_from(adapter.id())?, Signal::Terminate)?;
    let mut status = None;
    wait_until(END_LIMIT, || {
        status = adapter.try_wait().ok().flatten();
        status.is_some()
    });
    match status {
        Some(status) if status.success() => {}
        other => bail!("after SIGTERM the adapter ended with {other:?}"),
    }
    let row = stage.connect()?.query_one("SELECT completed, available + running FROM awa.queue_counts('bench')", &[])?;
    let (completed, open): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    ensure!((completed as f64, open) == (all, 0), "the server has {completed} jobs completed and {open} open");
    Ok(())
}

fn lines_of(adapter: &mut Child) -> Result<Receiver<String>> {
    let out = BufReader::new(adapter.stdout.take().context("the adapter has no output")?);
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

fn next(lines: &Receiver<String>) -> Result<Value> {
    let line = lines.recv_timeout(LINE_LIMIT).context("the adapter says nothing")?;
    serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
}
