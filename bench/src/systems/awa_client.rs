//! awa by its own Python client and worker runtime, in a process beside the driver (`bench/peers/awa_client.py`).
//!
//! Its workers take jobs by themselves: a claim of ours is what they have taken. As many may be in flight as all our workers
//! together would hold. It keeps its tables in the schema `awa`, as we do, so the two take turns in the database.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use postgres::Client;
use postgres::config::Host;
use serde_json::{Value, json};

use crate::payload::Payload;
use crate::systems::{Ability, Claimed, Package, Session, System, SystemName, Wishes, connect, schema_bytes};

const SCRIPT: &str = "bench/peers/awa_client.py";
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const END_LIMIT: Duration = Duration::from_secs(20);
const IN_FLIGHT: usize = 64;

pub struct AwaClient {
    package: Package,
    /// The process of the sessions that are open now
    process: Mutex<Weak<Process>>,
    drained: Arc<Mutex<Vec<i64>>>,
}

impl AwaClient {
    pub fn new(package: Package) -> AwaClient {
        AwaClient { package, process: Mutex::default(), drained: Arc::default() }
    }

    fn python(&self, url: &str) -> Result<Command> {
        let script = script(&self.package.dir)?;
        let mut command = Command::new("python3");
        command.arg(script).arg(self.package.dir.join("package")).arg(address(url)?);
        Ok(command)
    }

    fn process(&self, url: &str, queue: &str, in_flight: usize) -> Result<Arc<Process>> {
        let mut current = locked(&self.process)?;
        if let Some(process) = current.upgrade() {
            return Ok(process);
        }
        let mut command = self.python(url)?;
        command.arg("run").arg(queue).arg(in_flight.to_string());
        let process = Arc::new(Process::start(&mut command, &self.drained)?);
        *current = Arc::downgrade(&process);
        Ok(process)
    }
}

impl System for AwaClient {
    fn name(&self) -> SystemName {
        SystemName::AwaClient
    }

    fn contract(&self) -> &'static str {
        "its own Python client and worker runtime (a native module) in one process, as many jobs in flight as our workers would hold; \
         counted when the handler returns, before its completion is durable; attempts with leases, heartbeats, deadlines, retries, \
         dead letters, priorities, schedule, NOTIFY; finished jobs are kept for a lap of its ring"
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        match ability {
            Ability::OneCallCycle => Some("no call that completes and claims"),
            Ability::ClaimSize | Ability::SqlSession => Some("its runtime claims by itself"),
            Ability::Schedule | Ability::OpenClaims => None,
        }
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        client.batch_execute(
            "SET client_min_messages = warning;
             DROP EXTENSION IF EXISTS awa_queue CASCADE;
             DROP SCHEMA IF EXISTS awa, awa_segments CASCADE",
        )?;
        locked(&self.drained)?.clear();
        Ok(())
    }

    /// Here, because it is told the address only in a session; a queue needs no making.
    fn create_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn drop_queue(&self, client: &mut Client, _: &str) -> Result<()> {
        self.reset(client)
    }

    fn connect_with(&self, url: &str, queue: &str, wishes: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        if client.query_opt("SELECT 1 FROM pg_namespace WHERE nspname = 'awa'", &[])?.is_none() {
            let done = self.python(url)?.arg("migrate").stdin(Stdio::null()).output().context("cannot run python3")?;
            if !done.status.success() {
                bail!("its migration failed: {}", String::from_utf8_lossy(&done.stderr));
            }
        }
        let in_flight = if wishes.in_flight > 0 { wishes.in_flight } else { IN_FLIGHT };
        Ok(Box::new(ClientSession { client, process: self.process(url, queue, in_flight)? }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, "awa")
    }

    fn hot_table(&self, client: &mut Client, _: &str) -> Result<String> {
        let row = client.query_one(
            "SELECT oid::regclass::text
               FROM pg_class
              WHERE relkind = 'r' AND relnamespace = 'awa'::regnamespace AND relname LIKE 'ready_entries%'
              ORDER BY pg_relation_size(oid) DESC
              LIMIT 1",
            &[],
        )?;
        Ok(row.try_get(0)?)
    }

    fn bulk_statement(&self) -> Result<String> {
        bail!("it has no statement that enqueues")
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        let rows = client.query(
            "SELECT args->>'n' FROM awa.jobs WHERE queue = $1 AND state::text NOT IN ('completed', 'failed', 'cancelled')",
            &[&queue],
        )?;
        let mut left: Vec<i64> = rows.iter().map(|row| number(row.try_get(0)?)).collect::<Result<_>>()?;
        // Their handlers ended with the load; they are done, but not by us. Its view may still show them running.
        left.extend(locked(&self.drained)?.iter());
        Ok(left)
    }

    fn completed(&self, _: &mut Client, _: &str) -> Result<Option<i64>> {
        Ok(None)
    }
}

struct ClientSession {
    client: Client,
    process: Arc<Process>,
}

impl Session for ClientSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let mut numbers = Vec::new();
        for job in jobs {
            let value: Value = serde_json::from_str(job.as_str())?;
            numbers.push(value.get("n").and_then(Value::as_str).context("a payload has no number")?.to_owned());
        }
        self.process.enqueue(&numbers)?;
        numbers.iter().map(|text| number(text)).collect()
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        self.process.claimed(usize::try_from(batch_size)?)
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        let numbers: Vec<String> = jobs.iter().map(|job| format!("{:016}", job.job_id)).collect();
        self.process.send(&json!({"complete": numbers}))?;
        Ok(jobs.iter().map(|job| job.job_id).collect())
    }
}

struct Process {
    child: Mutex<Child>,
    input: Mutex<Option<ChildStdin>>,
    heard: Arc<Heard>,
}

/// What the process has said and nobody has taken yet.
#[derive(Default)]
struct Heard {
    claimed: Mutex<VecDeque<i64>>,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, Sender<()>>,
    over: bool,
}

impl Process {
    fn start(command: &mut Command, drained: &Arc<Mutex<Vec<i64>>>) -> Result<Process> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run python3")?;
        let input = child.stdin.take().context("the process has no input")?;
        let output = BufReader::new(child.stdout.take().context("the process has no output")?);
        let heard: Arc<Heard> = Arc::default();
        let (ready, is_ready) = channel();
        let (listener, drained) = (Arc::clone(&heard), Arc::clone(drained));
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Err(error) = listener.hear(&line, &ready, &drained) {
                    eprintln!("awa_client: {error:#}: {line}");
                }
            }
            if let Ok(mut calls) = listener.calls.lock() {
                calls.over = true;
                calls.waiting.clear();
            }
        });
        let process = Process { child: Mutex::new(child), input: Mutex::new(Some(input)), heard };
        is_ready.recv_timeout(ANSWER_LIMIT).context("its client did not start")?;
        Ok(process)
    }

    fn send(&self, line: &Value) -> Result<()> {
        let mut input = locked(&self.input)?;
        let input = input.as_mut().context("the process has ended")?;
        writeln!(input, "{line}").context("the process has ended")
    }

    fn enqueue(&self, numbers: &[String]) -> Result<()> {
        let (done, is_done) = channel();
        let call = {
            let mut calls = locked(&self.heard.calls)?;
            calls.next += 1;
            let call = calls.next;
            calls.waiting.insert(call, done);
            call
        };
        self.send(&json!({"call": call, "enqueue": numbers}))?;
        is_done.recv_timeout(ANSWER_LIMIT).context("its client did not answer an enqueue")
    }

    fn claimed(&self, most: usize) -> Result<Vec<Claimed>> {
        if locked(&self.heard.calls)?.over {
            bail!("the process has ended");
        }
        let mut claimed = locked(&self.heard.claimed)?;
        let taken = most.min(claimed.len());
        Ok(claimed.drain(..taken).map(|job_id| Claimed { job_id, lease: 0 }).collect())
    }

    fn end(&self) -> Result<()> {
        drop(locked(&self.input)?.take());
        let mut child = locked(&self.child)?;
        let begun = Instant::now();
        while child.try_wait()?.is_none() {
            if begun.elapsed() > END_LIMIT {
                child.kill()?;
                child.wait()?;
                bail!("its client did not end");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// The last session takes it along, so its connections are gone before the account is settled.
impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("awa_client: {error:#}");
        }
    }
}

impl Heard {
    fn hear(&self, line: &str, ready: &Sender<()>, drained: &Mutex<Vec<i64>>) -> Result<()> {
        let said: Value = serde_json::from_str(line)?;
        if let Some(job) = said.get("claimed").and_then(Value::as_str) {
            locked(&self.claimed)?.push_back(number(job)?);
        } else if let Some(call) = said.get("call").and_then(Value::as_u64) {
            if let Some(done) = locked(&self.calls)?.waiting.remove(&call) {
                let _ = done.send(()); // whoever asked may have given up
            }
        } else if let Some(jobs) = said.get("drained").and_then(Value::as_array) {
            for job in jobs.iter().filter_map(Value::as_str) {
                locked(drained)?.push(number(job)?);
            }
        } else if said.get("ready").is_some() {
            let _ = ready.send(());
        }
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| anyhow!("a thread that speaks to the process panicked"))
}

fn number(text: &str) -> Result<i64> {
    text.parse().with_context(|| format!("not a job's number: {text}"))
}

/// Beside `target/peers/awa_client` there is the repository.
fn script(package: &Path) -> Result<PathBuf> {
    let repository = package.ancestors().nth(3).context("the peers are not in target/peers of the repository")?;
    Ok(repository.join(SCRIPT))
}

/// Our connection string as an URL.
fn address(url: &str) -> Result<String> {
    let config: postgres::Config = url.parse()?;
    let user = config.get_user().unwrap_or("postgres");
    let database = config.get_dbname().unwrap_or("postgres");
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match config.get_hosts().first() {
        Some(Host::Unix(dir)) => Ok(format!("postgres://{user}@localhost:{port}/{database}?host={}", dir.display())),
        Some(Host::Tcp(name)) => Ok(format!("postgres://{user}@{name}:{port}/{database}")),
        None => bail!("the connection string names no host"),
    }
}
