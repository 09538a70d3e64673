//! A sustained load: producers and workers in threads, phases cut by one controller, every job id kept.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;
use postgres::Client;

use crate::accounting::{self, Account};
use crate::counters::{self, Counters, Cpu, Sessions};
use crate::payload::Payload;
use crate::progress::Progress;
use crate::systems::{Claimed, Helper, Session, System, Wishes, connect};

const STOPPED: usize = usize::MAX;
const PRODUCER_PAUSE: Duration = Duration::from_micros(200);
const CONTROLLER_STEP: Duration = Duration::from_millis(50);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Cycle {
    /// Two calls: claim, then complete
    Separate,
    /// One call: complete the last batch and claim the next
    Combined,
}

#[derive(Clone, Debug)]
pub struct Shape {
    pub producers: usize,
    pub enqueue_batch: usize,
    pub workers: usize,
    pub claim_batch: i32,
    pub cycle: Cycle,
    /// Producers stop while more jobs than this are enqueued and not completed.
    pub depth: i64,
    /// Jobs a second over all producers; 0 means as fast as the depth allows.
    pub rate: f64,
    /// Sleep of a worker that found nothing.
    pub idle: Duration,
    /// Time that a worker takes for each job.
    pub work: Duration,
    pub wishes: Wishes,
}

pub struct Phase {
    pub label: &'static str,
    pub length: Duration,
}

#[derive(Default, Debug)]
pub struct PhaseResult {
    pub label: &'static str,
    pub seconds: f64,
    pub enqueued: i64,
    pub completed: i64,
    pub wal_bytes: i64,
    /// Completions of each second
    pub per_second: Vec<f64>,
    /// Unfinished jobs at the end of each second
    pub depth_per_second: Vec<f64>,
    /// Looked at once a second
    pub sessions: Sessions,
    pub machine_cpu: Option<f64>,
    pub client_cpu: Option<f64>,
    /// Round trips in milliseconds
    pub enqueue_ms: Vec<f64>,
    pub claim_ms: Vec<f64>,
    pub complete_ms: Vec<f64>,
    /// From when a job was due to be enqueued (unpaced: from the start of that call) to the return of the call that claimed it
    pub pickup_ms: Vec<f64>,
    /// ... and of the one that completed it
    pub end_to_end_ms: Vec<f64>,
}

impl PhaseResult {
    pub fn completed_per_second(&self) -> f64 {
        self.completed as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    pub fn depth_most(&self) -> Option<f64> {
        self.depth_per_second.iter().copied().max_by(f64::total_cmp)
    }

    pub fn wal_bytes_per_job(&self) -> Option<f64> {
        (self.completed > 0).then(|| self.wal_bytes as f64 / self.completed as f64)
    }
}

pub struct LoadResult {
    pub phases: Vec<PhaseResult>,
    pub account: Account,
    pub before: Counters,
    pub after: Counters,
    /// Finished jobs by the server's account, where it keeps one.
    pub server_completed: Option<i64>,
}

#[derive(Clone, Copy)]
enum Verb {
    Enqueue,
    Claim,
    Complete,
}

struct Sample {
    phase: usize,
    verb: Verb,
    milliseconds: f64,
}

/// What happened to a job, when, and in which phase.
#[derive(Clone, Copy)]
struct Moment {
    job_id: i64,
    phase: usize,
    at: Instant,
}

#[derive(Default)]
struct Outcome {
    enqueued: Vec<i64>,
    completed: Vec<i64>,
    samples: Vec<Sample>,
    /// Only when the load wishes for times
    begun: Vec<Moment>,
    claimed: Vec<Moment>,
    finished: Vec<Moment>,
}

impl Outcome {
    fn time<T>(&mut self, shared: &Shared, verb: Verb, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let phase = shared.phase.load(Ordering::Relaxed);
        let start = Instant::now();
        let result = call()?;
        self.samples.push(Sample { phase, verb, milliseconds: start.elapsed().as_secs_f64() * 1e3 });
        Ok(result)
    }
}

#[derive(Default)]
struct Shared {
    phase: AtomicUsize,
    failed: AtomicBool,
    enqueued: AtomicI64,
    completed: AtomicI64,
}

impl Shared {
    fn runs(&self) -> bool {
        self.phase.load(Ordering::Relaxed) != STOPPED
    }

    fn depth(&self) -> i64 {
        self.enqueued.load(Ordering::Relaxed) - self.completed.load(Ordering::Relaxed)
    }
}

/// `between` runs in the controller before each phase.
pub fn run(
    url: &str,
    system: &dyn System,
    queue: &str,
    shape: &Shape,
    phases: &[Phase],
    mut between: impl FnMut(&Phase) -> Result<()>,
) -> Result<LoadResult> {
    let mut control = connect(url)?;
    counters::wait_until_alone(&mut control)?;
    let in_flight = shape.workers * usize::try_from(shape.claim_batch)?;
    let wishes = Wishes { in_flight, ..shape.wishes };
    let mut producers = Vec::new();
    for _ in 0..shape.producers {
        producers.push(system.connect_with(url, queue, wishes)?);
    }
    let mut workers = Vec::new();
    for _ in 0..shape.workers {
        workers.push(system.connect_with(url, queue, wishes)?);
    }
    let helper = system.helper(url, queue)?;
    let before = counters::counters(&mut control)?;
    let shared = Shared::default();
    let (phase_results, outcomes) = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, session) in producers.into_iter().enumerate() {
            let shared = &shared;
            threads.push(scope.spawn(move || watched(shared, || produce(session, shape, number, shared))));
        }
        for session in workers {
            let shared = &shared;
            threads.push(scope.spawn(move || watched(shared, || work(session, shape, shared))));
        }
        let phase_results = conduct(&mut control, &shared, phases, &mut between);
        shared.phase.store(STOPPED, Ordering::Relaxed);
        let outcomes: Result<Vec<Outcome>> =
            threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a load thread panicked"))?).collect();
        (phase_results, outcomes)
    });
    let outcomes = outcomes?;
    let mut phases = phase_results?;
    helper.map_or(Ok(()), Helper::finish)?;
    counters::wait_until_alone(&mut control)?;
    let after = counters::counters(&mut control)?;

    add_times(&mut phases, &outcomes);
    let (mut enqueued, mut completed) = (Vec::new(), Vec::new());
    for outcome in outcomes {
        enqueued.extend(outcome.enqueued);
        completed.extend(outcome.completed);
        for sample in outcome.samples {
            if let Some(phase) = phases.get_mut(sample.phase) {
                match sample.verb {
                    Verb::Enqueue => phase.enqueue_ms.push(sample.milliseconds),
                    Verb::Claim => phase.claim_ms.push(sample.milliseconds),
                    Verb::Complete => phase.complete_ms.push(sample.milliseconds),
                }
            }
        }
    }
    let left = system.left(&mut control, queue)?;
    let account = accounting::settle(enqueued, completed, left);
    let server_completed = system.completed(&mut control, queue)?;
    Ok(LoadResult { phases, account, before, after, server_completed })
}

/// Runs the phases one after the other and reads the counters at their edges.
fn conduct(
    control: &mut Client,
    shared: &Shared,
    phases: &[Phase],
    between: &mut impl FnMut(&Phase) -> Result<()>,
) -> Result<Vec<PhaseResult>> {
    let mut results = Vec::new();
    let progress = Progress::over(phases.iter().map(|phase| phase.length).sum());
    for (number, phase) in phases.iter().enumerate() {
        progress.enter(phase.label);
        between(phase)?;
        shared.phase.store(number, Ordering::Relaxed);
        let wal = counters::wal_position(control)?;
        let cpu = Cpu::now();
        let (enqueued, completed) = (shared.enqueued.load(Ordering::Relaxed), shared.completed.load(Ordering::Relaxed));
        let start = Instant::now();
        let mut result = PhaseResult { label: phase.label, ..PhaseResult::default() };
        let (mut sampled_at, mut sampled) = (start, completed);
        while start.elapsed() < phase.length {
            if shared.failed.load(Ordering::Relaxed) {
                return Err(anyhow!("a load thread failed"));
            }
            thread::sleep(CONTROLLER_STEP.min(phase.length.saturating_sub(start.elapsed())));
            if sampled_at.elapsed() >= SAMPLE_INTERVAL {
                let now = shared.completed.load(Ordering::Relaxed);
                result.per_second.push((now - sampled) as f64 / sampled_at.elapsed().as_secs_f64());
                (sampled_at, sampled) = (Instant::now(), now);
                result.depth_per_second.push(shared.depth() as f64);
                result.sessions.look(control)?;
                progress.pass(SAMPLE_INTERVAL, result.per_second.last().copied());
            }
        }
        result.seconds = start.elapsed().as_secs_f64();
        result.completed = shared.completed.load(Ordering::Relaxed) - completed;
        result.enqueued = shared.enqueued.load(Ordering::Relaxed) - enqueued;
        if let (Some(before), Some(after)) = (cpu, Cpu::now()) {
            let (machine, client) = after.percent_since(before);
            (result.machine_cpu, result.client_cpu) = (Some(machine), Some(client));
        }
        result.wal_bytes = counters::wal_position(control)? - wal;
        results.push(result);
    }
    Ok(results)
}

/// A thread that fails tells the controller, which stops the others; its error is the one reported.
fn watched(shared: &Shared, body: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    let result = body();
    if result.is_err() {
        shared.failed.store(true, Ordering::Relaxed);
    }
    result
}

fn produce(mut session: Box<dyn Session>, shape: &Shape, number: usize, shared: &Shared) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut next = (number as u64) << 40;
    let interval = pace(shape);
    let mut due = Instant::now();
    while shared.runs() {
        if shared.depth() > shape.depth || interval.is_some_and(|_| Instant::now() < due) {
            thread::sleep(PRODUCER_PAUSE);
            continue;
        }
        // A producer that is late sends at once: the job waits since it was due, not since we came to it.
        let start = if interval.is_some() { due } else { Instant::now() };
        due += interval.unwrap_or_default();
        let jobs: Vec<Payload> = (next..).take(shape.enqueue_batch).map(Payload::numbered).collect();
        next += jobs.len() as u64;
        let ids = outcome.time(shared, Verb::Enqueue, || session.enqueue(&jobs))?;
        if shape.wishes.times {
            let phase = shared.phase.load(Ordering::Relaxed);
            outcome.begun.extend(ids.iter().map(|&job_id| Moment { job_id, phase, at: start }));
        }
        shared.enqueued.fetch_add(ids.len() as i64, Ordering::Relaxed);
        outcome.enqueued.extend(ids);
    }
    Ok(outcome)
}

/// Time between two batches of one producer, when the load is paced.
fn pace(shape: &Shape) -> Option<Duration> {
    if shape.rate <= 0.0 {
        return None;
    }
    Some(Duration::from_secs_f64(shape.enqueue_batch as f64 * shape.producers as f64 / shape.rate))
}

fn work(mut session: Box<dyn Session>, shape: &Shape, shared: &Shared) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut held: Vec<Claimed> = Vec::new();
    while shared.runs() {
        let mut finished = std::mem::take(&mut held);
        if finished.is_empty() {
            let before = outcome.samples.len();
            finished = outcome.time(shared, Verb::Claim, || session.claim(shape.claim_batch))?;
            if finished.is_empty() {
                outcome.samples.truncate(before); // only calls that returned jobs are comparable
                session.idle(shape.idle)?;
                continue;
            }
            note_claimed(&mut outcome, &finished, shape, shared);
        }
        if !shape.work.is_zero() {
            thread::sleep(shape.work * u32::try_from(finished.len())?);
        }
        match shape.cycle {
            Cycle::Separate => {
                let acknowledged = outcome.time(shared, Verb::Complete, || session.complete(&finished))?;
                if acknowledged.len() != finished.len() {
                    bail!("{} of {} completions were acknowledged", acknowledged.len(), finished.len());
                }
            }
            Cycle::Combined => {
                let call = || session.complete_and_claim(&finished, shape.claim_batch);
                held = outcome.time(shared, Verb::Complete, call)?;
                note_claimed(&mut outcome, &held, shape, shared);
            }
        }
        note_completed(&mut outcome, &finished, shape, shared);
    }
    if !held.is_empty() {
        session.complete(&held)?;
        note_completed(&mut outcome, &held, shape, shared);
    }
    Ok(outcome)
}

fn note_claimed(outcome: &mut Outcome, claimed: &[Claimed], shape: &Shape, shared: &Shared) {
    if shape.wishes.times {
        let (phase, at) = (shared.phase.load(Ordering::Relaxed), Instant::now());
        outcome.claimed.extend(claimed.iter().map(|job| Moment { job_id: job.job_id, phase, at }));
    }
}

fn note_completed(outcome: &mut Outcome, finished: &[Claimed], shape: &Shape, shared: &Shared) {
    if shape.wishes.times {
        let (phase, at) = (shared.phase.load(Ordering::Relaxed), Instant::now());
        outcome.finished.extend(finished.iter().map(|job| Moment { job_id: job.job_id, phase, at }));
    }
    outcome.completed.extend(finished.iter().map(|job| job.job_id));
    shared.completed.fetch_add(finished.len() as i64, Ordering::Relaxed);
}

/// A job counts in the phase in which it was claimed, or completed.
fn add_times(phases: &mut [PhaseResult], outcomes: &[Outcome]) {
    let begun: HashMap<i64, Instant> =
        outcomes.iter().flat_map(|outcome| &outcome.begun).map(|moment| (moment.job_id, moment.at)).collect();
    let since = |moment: &Moment| {
        let start = begun.get(&moment.job_id)?;
        Some(moment.at.saturating_duration_since(*start).as_secs_f64() * 1e3)
    };
    for outcome in outcomes {
        for moment in &outcome.claimed {
            if let (Some(phase), Some(milliseconds)) = (phases.get_mut(moment.phase), since(moment)) {
                phase.pickup_ms.push(milliseconds);
            }
        }
        for moment in &outcome.finished {
            if let (Some(phase), Some(milliseconds)) = (phases.get_mut(moment.phase), since(moment)) {
                phase.end_to_end_ms.push(milliseconds);
            }
        }
    }
}
