//! The adapter for the public cross-system harness: README.md beside this file says how it is used.
//!
//! Telemetry goes to stdout, a JSON object a line; everything else to stderr.

mod config;
mod samples;

use std::io::{BufRead, Write, stdin, stdout};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use postgres::{Client, NoTls};
use serde_json::{Value, json};

use config::{Config, Producer};
use samples::{SYSTEM, Samples, timestamp, until_next};

const QUEUE: &str = "bench";
const KIND: &str = "bench";
const SETUP_LIMIT: Duration = Duration::from_secs(30);
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
const WAIT: &str = "500 milliseconds";
const TICK: Duration = Duration::from_millis(200);
const TOKENS_WAITING_MAX: usize = 10_000;
/// Workers that do not notice the end within this time are left behind: the harness allows five seconds.
const END_LIMIT: Duration = Duration::from_secs(4);

static OVER: AtomicBool = AtomicBool::new(false);

fn over() -> bool {
    OVER.load(Ordering::Relaxed)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("awa_adapter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let config = Config::read(|name| std::env::var(name).ok())?;
    ctrlc::set_handler(|| OVER.store(true, Ordering::Relaxed)).context("cannot listen for SIGTERM")?;
    emit(&[set_up(&config)?])?;
    let samples = Samples::new(config.sample_every, config.instance)?;
    // Threads of a scope are waited for without a limit; these two outlive it only in a process that ends.
    let shared: &'static (Config, Samples) = Box::leak(Box::new((config, samples)));
    let (config, samples) = shared;
    let mut threads = Vec::new();
    if config.produces {
        threads.push(thread::spawn(move || {
            let tokens = (config.producer == Producer::Tokens).then(tokens);
            again_and_again(config, |client| produce(client, config, samples, tokens.as_ref()));
        }));
    }
    for _ in 0..config.workers {
        threads.push(thread::spawn(move || again_and_again(config, |client| work(client, config, samples))));
    }
    sample(config, samples)?;
    let end = Instant::now() + END_LIMIT;
    while Instant::now() < end && !threads.iter().all(thread::JoinHandle::is_finished) {
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn emit(lines: &[Value]) -> Result<()> {
    let mut out = stdout().lock();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(out.flush()?)
}

/// Extension and queue, whoever of the replicas comes first; the descriptor.
fn set_up(config: &Config) -> Result<Value> {
    let begun = Instant::now();
    let mut client = loop {
        match config.database.connect(NoTls) {
            Ok(client) => break client,
            Err(error) if begun.elapsed() > SETUP_LIMIT => return Err(error).context("cannot connect"),
            Err(_) => thread::sleep(RECONNECT_PAUSE),
        }
    };
    client.batch_execute("SET client_min_messages = warning")?;
    while let Err(error) = create(&mut client) {
        if begun.elapsed() > SETUP_LIMIT {
            return Err(error).context("cannot create the queue");
        }
        thread::sleep(RECONNECT_PAUSE);
    }
    let version: String = client.query_one("SELECT extversion FROM pg_extension WHERE extname = 'awa_queue'", &[])?.try_get(0)?;
    let tables = client.query(
        "SELECT relnamespace::regnamespace::text || '.' || relname
           FROM pg_class
          WHERE relkind = 'r' AND relnamespace = 'awa_segments'::regnamespace
          ORDER BY relname LIKE 'ready%' DESC, relname",
        &[],
    )?;
    let tables: Vec<String> = tables.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    Ok(json!({
        "kind": "descriptor",
        "system": SYSTEM,
        "event_tables": tables,
        "extensions": ["awa_queue"],
        "version": version,
        "schema_version": version,
        "db_name": config.database.get_dbname(),
        "started_at": timestamp(SystemTime::now()),
    }))
}

fn create(client: &mut Client) -> Result<()> {
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS awa_queue")?;
    if client.query_opt("SELECT 1 FROM awa.queues WHERE queue = $1", &[&QUEUE])?.is_none() {
        client.execute("SELECT awa.create_queue($1::text)", &[&QUEUE])?;
    }
    Ok(())
}

/// Runs `body` on a connection, and on a new one whenever the old one is lost, until the end.
fn again_and_again(config: &Config, body: impl Fn(Client) -> Result<()>) {
    while !over() {
        let result = config.database.connect(NoTls).map_err(anyhow::Error::from).and_then(&body);
        if let Err(error) = result {
            if !over() {
                eprintln!("awa_adapter: {error:#}; trying again");
            }
            thread::sleep(RECONNECT_PAUSE);
        }
    }
}

fn produce(mut client: Client, config: &Config, samples: &Samples, tokens: Option<&Receiver<usize>>) -> Result<()> {
    let enqueue = client.prepare(
        "SELECT cardinality(awa.enqueue_many($1::text, $2::text, ARRAY(
                    SELECT jsonb_build_object('t', $3::bigint, 'pad', $4::text) FROM generate_series(1, $5::integer))))",
    )?;
    let depth = client.prepare("SELECT available FROM awa.queue_counts($1::text)")?;
    let pad = "x".repeat(config.payload_bytes.saturating_sub(40));
    let send = |client: &mut Client, jobs: usize| -> Result<()> {
        let mut left = jobs;
        while left > 0 && !over() {
            let batch = left.min(config.batch_max);
            client.query_one(&enqueue, &[&QUEUE, &KIND, &now_us(), &pad, &i32::try_from(batch)?])?;
            samples.enqueued(batch);
            left -= batch;
        }
        Ok(())
    };
    match config.producer {
        Producer::Tokens => {
            let tokens = tokens.context("nobody reads the tokens")?;
            while !over() {
                match tokens.recv_timeout(TICK) {
                    Ok(jobs) => send(&mut client, jobs)?,
                    Err(RecvTimeoutError::Timeout) => {}
                    // The harness closed our input: the phases are over, SIGTERM follows.
                    Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
                }
            }
        }
        Producer::Rate => {
            let (mut last, mut credit) = (Instant::now(), 0.0);
            while !over() {
                thread::sleep(config.batch_interval);
                let now = Instant::now();
                credit += config.rate_now() * now.duration_since(last).as_secs_f64();
                last = now;
                let jobs = credit as usize;
                credit -= jobs as f64;
                send(&mut client, jobs)?;
            }
        }
        Producer::Depth => {
            while !over() {
                let waiting: i64 = client.query_one(&depth, &[&QUEUE])?.try_get(0)?;
                if waiting < config.target_depth {
                    send(&mut client, usize::try_from(config.target_depth - waiting)?.min(config.batch_max))?;
                } else {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
    Ok(())
}

/// The lines of our input, read by a thread of their own: a read cannot be given up.
fn tokens() -> Receiver<usize> {
    let (sender, receiver) = sync_channel(TOKENS_WAITING_MAX);
    thread::spawn(move || {
        for line in stdin().lock().lines().map_while(Result::ok) {
            match line.strip_prefix("ENQUEUE ").map(|count| count.trim().parse()) {
                Some(Ok(jobs)) => {
                    if sender.send(jobs).is_err() {
                        return;
                    }
                }
                _ => eprintln!("awa_adapter: not a token: {line}"),
            }
        }
    });
    receiver
}

fn work(mut client: Client, config: &Config, samples: &Samples) -> Result<()> {
    let deadline = config.deadline.map_or(String::new(), |limit| format!(", deadline => '{} milliseconds'", limit.as_millis()));
    let columns = "job_id, run_lease, (args->>'t')::bigint";
    let claim = client.prepare(&format!("SELECT {columns} FROM awa.claim($1::text, 1{deadline})"))?;
    let next = client.prepare(&format!(
        "SELECT {columns} FROM awa.complete_and_claim(ARRAY[$2::bigint], ARRAY[$3::bigint], $1::text, 1{deadline})"
    ))?;
    let finish = client.prepare("SELECT awa.complete($1::bigint, $2::bigint)")?;
    let wait = client.prepare(&format!("CALL awa.wait($1::text, '{WAIT}')"))?;
    let mut held = None;
    while !over() {
        let row = match held {
            None => client.query_opt(&claim, &[&QUEUE])?,
            Some((job_id, lease)) => {
                let row = client.query_opt(&next, &[&QUEUE, &job_id, &lease])?;
                samples.completed(1);
                row
            }
        };
        held = match row {
            None => {
                client.execute(&wait, &[&QUEUE])?;
                None
            }
            Some(row) => {
                let (job_id, lease, enqueued): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
                let latency = u64::try_from(now_us() - enqueued).unwrap_or(0);
                samples.claimed_after(Duration::from_micros(latency))?;
                thread::sleep(config.work);
                Some((job_id, lease))
            }
        };
    }
    if let Some((job_id, lease)) = held {
        let result: String = client.query_one(&finish, &[&job_id, &lease])?.try_get(0)?;
        if result != "completed" {
            bail!("a completion was answered with {result}");
        }
    }
    Ok(())
}

/// A line a metric at each multiple of the interval, until the end; what is pending then is flushed.
fn sample(config: &Config, samples: &Samples) -> Result<()> {
    let mut client: Option<Client> = None;
    while !over() {
        let due = SystemTime::now() + until_next(SystemTime::now(), config.sample_every);
        while !over() && SystemTime::now() < due {
            thread::sleep(Duration::from_millis(20));
        }
        if client.is_none() {
            client = config.database.connect(NoTls).ok();
        }
        // A server that is away has no depth to show; rates and latencies are ours.
        let depth = client.as_mut().and_then(|client| depth(client).ok());
        if depth.is_none() {
            client = None;
        }
        emit(&samples.take(SystemTime::now(), depth)?)?;
    }
    Ok(())
}

fn depth(client: &mut Client) -> Result<(i64, i64)> {
    let row = client.query_one("SELECT available, running FROM awa.queue_counts($1::text)", &[&QUEUE])?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| i64::try_from(passed.as_micros()).unwrap_or(i64::MAX))
}
