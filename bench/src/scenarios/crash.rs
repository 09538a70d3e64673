//! kill -9 of the postmaster under load: how long until the first completion, until the old rate, and is every job accounted for?
//!
//! A call that ends with the connection may or may not have happened. Its jobs are *unsure*, and are kept apart.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use postgres::error::SqlState;

use crate::Target;
use crate::accounting;
use crate::payload::Payload;
use crate::report::{Measurement, Recorder};
use crate::scenarios::able;
use crate::systems::{Ability, Claimed, Helper, Session, System, SystemName, Wishes, connect};

const STEP: Duration = Duration::from_millis(50);
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(1);
const BACK_WITHIN: Duration = Duration::from_secs(120);
/// Steps of one second, and the share of the old rate that counts as recovered
const WINDOW: usize = 20;
const RECOVERED: f64 = 0.9;

#[derive(Args)]
pub struct CrashArgs {
    #[arg(long, default_value_t = 2)]
    producers: usize,
    #[arg(long, default_value_t = 32)]
    enqueue_batch: usize,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    #[arg(long, default_value_t = 16)]
    claim_batch: i32,
    #[arg(long, default_value_t = 4_000)]
    depth: i64,
    /// Seconds of load before the crash
    #[arg(long, default_value_t = 10.0)]
    before: f64,
    /// Seconds of load after it (--seconds says the same)
    #[arg(long, default_value_t = 30.0)]
    after: f64,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    crashed: AtomicBool,
    enqueued: AtomicI64,
    completed: AtomicI64,
    /// By sessions that were opened after the crash
    completed_after: AtomicI64,
    account: Mutex<Known>,
}

/// What the client was told.
#[derive(Default)]
struct Known {
    enqueued: Vec<i64>,
    completed: Vec<i64>,
    /// Jobs whose completion was sent and not answered
    unsure_completed: Vec<i64>,
    /// Jobs that an unanswered enqueue may have left
    unsure_enqueued: usize,
}

struct Timeline {
    old_rate: f64,
    server_up: f64,
    first_completion: Option<f64>,
    old_rate_again: Option<f64>,
}

struct Bench<'a> {
    target: &'a Target,
    args: &'a CrashArgs,
    system: &'a dyn System,
    queue: &'a str,
    shared: &'a Shared,
}

pub fn run(target: &Target, args: &CrashArgs, recorder: &mut Recorder) -> Result<()> {
    let (Some(data), Some(restart)) = (&target.data, &target.restart) else {
        bail!("crash-recovery kills the server: it needs --data and --restart, as bench/run gives them")
    };
    // A runtime of its own has connections that are not ours to open again.
    let systems = able(target, &[Ability::SqlSession], "crash-recovery", "kill -9 under load", recorder)?;
    for round in 1..=target.rounds {
        for &name in &systems {
            one_crash(target, args, name, (data, restart), round, recorder)?;
        }
    }
    Ok(())
}

fn one_crash(
    target: &Target,
    args: &CrashArgs,
    name: SystemName,
    server: (&Path, &str),
    round: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    let system = target.system(name);
    let queue = format!("crash_{}_{round}", std::process::id());
    let mut client = connect(&target.url)?;
    system.reset(&mut client)?;
    system.create_queue(&mut client, &queue)?;
    drop(client);
    let shared = Shared::default();
    let bench = Bench { target, args, system: &*system, queue: &queue, shared: &shared };
    let timeline = thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in 0..args.producers {
            let bench = &bench;
            threads.push(scope.spawn(move || bench.watched(|| bench.produce(number))));
        }
        for _ in 0..args.workers {
            let bench = &bench;
            threads.push(scope.spawn(move || bench.watched(|| bench.work())));
        }
        let timeline = bench.conduct(server);
        shared.over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a load thread panicked"))??;
        }
        timeline
    })?;

    let known = shared.account.into_inner().map_err(|_| anyhow!("the account was not kept"))?;
    let mut client = connect(&target.url)?;
    // Our own rescue gives an attempt back after its grace; others keep it running, or read it again: it is left either way.
    let left = system.left(&mut client, &queue)?;
    let unsure = known.unsure_completed;
    let mut account = accounting::settle(known.enqueued, known.completed, left);
    let unanswered = account.lost_ids.iter().filter(|id| unsure.contains(id)).count();
    account.lost_ids.retain(|id| !unsure.contains(id));
    let lost = account.lost_ids.len();
    if lost > 0 || account.completed_twice > 0 || account.left_though_completed > 0 || account.unknown > known.unsure_enqueued {
        let text = format!("{}, crash: {account:?}, {} enqueues unanswered", name.as_str(), known.unsure_enqueued);
        recorder.complain(&text)?;
    }
    if !target.no_verify {
        for problem in system.verify(&mut client)? {
            recorder.complain(&format!("{}, crash: verify: {problem}", name.as_str()))?;
        }
    }
    system.drop_queue(&mut client, &queue)?;
    let measurement = Measurement::new("crash-recovery", "kill -9 under load", name.as_str(), round)
        .metric("kill to first completion, s", timeline.first_completion)
        .metric("kill to the old rate, s", timeline.old_rate_again)
        .metric("kill to connections, s", timeline.server_up)
        .metric("old rate, jobs/s", timeline.old_rate)
        .metric("acknowledged jobs", account.enqueued as f64)
        .metric("completed", account.completed as f64)
        .metric("left", account.left as f64)
        .metric("unanswered completions that happened", unanswered as f64)
        .metric("unanswered enqueues that happened", account.unknown as f64)
        .metric("lost", lost as f64)
        .metric("done twice", account.completed_twice as f64);
    recorder.record(measurement)
}

impl Bench<'_> {
    /// A thread that fails stops the run.
    fn watched(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let result = body();
        if result.is_err() {
            self.shared.over.store(true, Ordering::Relaxed);
        }
        result
    }

    fn conduct(&self, (data, restart): (&Path, &str)) -> Result<Timeline> {
        let helper = self.system.helper(&self.target.url, self.queue)?;
        thread::sleep(Duration::from_secs_f64(self.args.before / 2.0));
        let (begun, completed) = (Instant::now(), self.shared.completed.load(Ordering::Relaxed));
        thread::sleep(Duration::from_secs_f64(self.args.before / 2.0));
        let done = self.shared.completed.load(Ordering::Relaxed) - completed;
        let old_rate = done as f64 / begun.elapsed().as_secs_f64();

        let killed = Instant::now();
        self.shared.crashed.store(true, Ordering::Relaxed);
        kill(data)?;
        if let Some(helper) = helper {
            // It lost its connection, which is no news.
            let _ = helper.finish();
        }
        self.start(restart)?;
        let server_up = killed.elapsed().as_secs_f64();
        let helper = self.system.helper(&self.target.url, self.queue)?;
        let mut timeline = Timeline { old_rate, server_up, first_completion: None, old_rate_again: None };
        let end = Instant::now() + Duration::from_secs_f64(self.target.window(self.args.after));
        let mut counts = vec![self.shared.completed.load(Ordering::Relaxed)];
        while Instant::now() < end && !self.shared.over.load(Ordering::Relaxed) {
            thread::sleep(STEP);
            if timeline.first_completion.is_none() && self.shared.completed_after.load(Ordering::Relaxed) > 0 {
                timeline.first_completion = Some(killed.elapsed().as_secs_f64());
            }
            counts.push(self.shared.completed.load(Ordering::Relaxed));
            let window = counts.len().checked_sub(WINDOW + 1).and_then(|first| Some(counts.last()? - counts.get(first)?));
            let rate = window.map(|done| done as f64 / (STEP.as_secs_f64() * WINDOW as f64));
            if timeline.old_rate_again.is_none() && rate.is_some_and(|rate| rate >= RECOVERED * old_rate) {
                timeline.old_rate_again = Some(killed.elapsed().as_secs_f64());
            }
        }
        helper.map_or(Ok(()), Helper::finish)?;
        Ok(timeline)
    }

    /// The orphans of the killed server hold its shared memory for a moment; until they are gone a start is refused.
    fn start(&self, restart: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let output = Command::new("sh").arg("-c").arg(restart).output().context("cannot run the restart command")?;
            if connect(&self.target.url).is_ok() {
                return Ok(());
            }
            if begun.elapsed() > BACK_WITHIN {
                bail!("the server did not come back: {}", String::from_utf8_lossy(&output.stderr));
            }
            thread::sleep(STEP);
        }
    }

    fn over(&self) -> bool {
        self.shared.over.load(Ordering::Relaxed)
    }

    fn known(&self) -> Result<std::sync::MutexGuard<'_, Known>> {
        self.shared.account.lock().map_err(|_| anyhow!("the account was not kept"))
    }

    /// A session, as soon as there is a server; and whether it was opened after the crash.
    fn session(&self) -> Result<Option<(Box<dyn Session>, bool)>> {
        while !self.over() {
            let after = self.shared.crashed.load(Ordering::Relaxed);
            match self.system.connect_with(&self.target.url, self.queue, Wishes::default()) {
                Ok(session) => return Ok(Some((session, after))),
                Err(error) if is_crash(&error) => thread::sleep(RECONNECT_PAUSE),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn produce(&self, number: usize) -> Result<()> {
        let mut next = (number as u64) << 40;
        while let Some((mut session, _)) = self.session()? {
            while !self.over() {
                let depth = self.shared.enqueued.load(Ordering::Relaxed) - self.shared.completed.load(Ordering::Relaxed);
                if depth > self.args.depth {
                    thread::sleep(PAUSE);
                    continue;
                }
                let jobs: Vec<Payload> = (next..).take(self.args.enqueue_batch).map(Payload::numbered).collect();
                next += jobs.len() as u64;
                match session.enqueue(&jobs) {
                    Ok(ids) => {
                        self.shared.enqueued.fetch_add(ids.len() as i64, Ordering::Relaxed);
                        self.known()?.enqueued.extend(ids);
                    }
                    Err(error) if is_crash(&error) => {
                        self.known()?.unsure_enqueued += jobs.len();
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn work(&self) -> Result<()> {
        while let Some((mut session, after)) = self.session()? {
            while !self.over() {
                let claimed = match session.claim(self.args.claim_batch) {
                    Ok(claimed) if claimed.is_empty() => {
                        thread::sleep(PAUSE);
                        continue;
                    }
                    Ok(claimed) => claimed,
                    Err(error) if is_crash(&error) => break,
                    Err(error) => return Err(error),
                };
                match session.complete(&claimed) {
                    Ok(ids) => self.note_completed(&ids, after)?,
                    Err(error) if is_crash(&error) => {
                        self.known()?.unsure_completed.extend(claimed.iter().map(|job: &Claimed| job.job_id));
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn note_completed(&self, ids: &[i64], after: bool) -> Result<()> {
        self.known()?.completed.extend(ids);
        self.shared.completed.fetch_add(ids.len() as i64, Ordering::Relaxed);
        if after {
            self.shared.completed_after.fetch_add(ids.len() as i64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The connection ended, or there is no server yet.
fn is_crash(error: &anyhow::Error) -> bool {
    let Some(error) = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>()) else { return false };
    match error.code() {
        Some(code) => {
            [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW, SqlState::DATABASE_DROPPED]
                .contains(code)
        }
        None => true,
    }
}

fn kill(data: &Path) -> Result<()> {
    let file = data.join("postmaster.pid");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let pid: u32 = text.lines().next().unwrap_or_default().trim().parse().context("the pid file has no pid")?;
    // The shell's own: a small machine has no program of that name.
    let status = Command::new("sh").arg("-c").arg(format!("kill -9 {pid}")).status().context("cannot run sh")?;
    if !status.success() {
        bail!("cannot kill process {pid}");
    }
    Ok(())
}
