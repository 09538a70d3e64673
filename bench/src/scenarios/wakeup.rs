//! From the commit of an enqueue to a session that waits for it: `CALL awa.wait` against polling.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use crate::Target;
use crate::payload::Payload;
use crate::report::{Measurement, Recorder};
use crate::scenarios::able;
use crate::stats;
use crate::systems::{Ability, Helper, Session, SystemName, connect};

const JOB_WAIT_MAX: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct WakeupArgs {
    /// Jobs, one at a time
    #[arg(long, default_value_t = 500)]
    jobs: usize,
    /// Milliseconds between two looks of the polling worker
    #[arg(long, default_value_t = 10)]
    poll_ms: u64,
    /// Milliseconds that the waiting session gets to fall asleep
    #[arg(long, default_value_t = 5)]
    pause_ms: u64,
}

/// What the waiting session saw, in its own time.
struct Woken {
    returned: Instant,
    claimed: Instant,
    job_id: i64,
}

pub fn run(target: &Target, args: &WakeupArgs, recorder: &mut Recorder) -> Result<()> {
    let systems = able(target, &[Ability::SqlSession], "wakeup", "one waiting session", recorder)?;
    for round in 1..=target.rounds {
        for &name in &systems {
            let system = target.system(name);
            let queue = format!("wakeup_{}", std::process::id());
            let mut client = connect(&target.url)?;
            system.reset(&mut client)?;
            system.create_queue(&mut client, &queue)?;
            let helper = system.helper(&target.url, &queue)?;
            let producer = system.connect(&target.url, &queue)?;
            let worker = system.connect(&target.url, &queue)?;
            let (method, waiter) = match name {
                SystemName::Awa => ("CALL awa.wait".to_owned(), Waiter::Call(queue.clone())),
                _ => (format!("polling every {} ms", args.poll_ms), Waiter::Poll(Duration::from_millis(args.poll_ms))),
            };
            let measurement = Measurement::new("wakeup", "one waiting session", format!("{}, {method}", name.as_str()), round);
            recorder.record(measure(args, producer, worker, &waiter, measurement)?)?;
            helper.map_or(Ok(()), Helper::finish)?;
            system.drop_queue(&mut client, &queue)?;
        }
    }
    Ok(())
}

enum Waiter {
    Call(String),
    Poll(Duration),
}

fn measure(
    args: &WakeupArgs,
    producer: Box<dyn Session>,
    worker: Box<dyn Session>,
    waiter: &Waiter,
    measurement: Measurement,
) -> Result<Measurement> {
    let (ready_sender, ready) = channel();
    let (woken_sender, woken) = channel();
    thread::scope(|scope| {
        let waiting = scope.spawn(move || wait_loop(args, worker, waiter, &ready_sender, &woken_sender));
        let produced = produce(args, producer, &ready, &woken, measurement);
        drop(ready);
        drop(woken);
        let waited = waiting.join().map_err(|_| anyhow!("the waiting thread panicked"))?;
        waited.and(produced)
    })
}

fn produce(
    args: &WakeupArgs,
    mut producer: Box<dyn Session>,
    ready: &Receiver<()>,
    woken: &Receiver<Woken>,
    measurement: Measurement,
) -> Result<Measurement> {
    let (mut returned, mut after_reply, mut claimed, mut commits) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..args.jobs {
        ready.recv().context("the waiting session ended")?;
        thread::sleep(Duration::from_millis(args.pause_ms) + jitter(args, number));
        producer.client().batch_execute("BEGIN")?;
        let ids = producer.enqueue(&[Payload::numbered(number as u64)])?;
        let sent = Instant::now();
        producer.client().batch_execute("COMMIT")?;
        let replied = Instant::now();
        let woken = woken.recv().context("the waiting session ended")?;
        if ids != [woken.job_id] {
            bail!("jobs {ids:?} were enqueued, job {} came", woken.job_id);
        }
        commits.push(milliseconds(sent, replied));
        returned.push(milliseconds(sent, woken.returned));
        after_reply.push(milliseconds(replied, woken.returned));
        claimed.push(milliseconds(sent, woken.claimed));
    }
    Ok(measurement
        .metric("commit sent to wait returned, p50 ms", stats::quantile(&returned, 0.5))
        .metric("p99 ms", stats::quantile(&returned, 0.99))
        .metric("commit sent to job claimed, p50 ms", stats::quantile(&claimed, 0.5))
        .metric("claimed p99 ms", stats::quantile(&claimed, 0.99))
        .metric("the commit itself, p50 ms", stats::quantile(&commits, 0.5))
        .metric("commit's reply to wait returned, p50 ms", stats::quantile(&after_reply, 0.5)))
}

/// Spreads the commits evenly over the interval of the polling worker, which would otherwise keep step with them.
fn jitter(args: &WakeupArgs, number: usize) -> Duration {
    const STRIDE: u64 = 618; // of 1,000: golden-ratio steps fill any interval evenly
    Duration::from_micros(args.poll_ms * (number as u64 * STRIDE % 1_000))
}

fn wait_loop(
    args: &WakeupArgs,
    mut worker: Box<dyn Session>,
    waiter: &Waiter,
    ready: &Sender<()>,
    woken: &Sender<Woken>,
) -> Result<()> {
    let wait = match waiter {
        Waiter::Call(_) => Some(worker.client().prepare("CALL awa.wait($1::text, '10 s'::interval)")?),
        Waiter::Poll(_) => None,
    };
    for _ in 0..args.jobs {
        if ready.send(()).is_err() {
            return Ok(()); // the producer failed and says why
        }
        let start = Instant::now();
        let (jobs, returned) = loop {
            match (waiter, &wait) {
                (Waiter::Call(queue), Some(wait)) => {
                    worker.client().execute(wait, &[queue])?;
                }
                (Waiter::Poll(interval), _) => thread::sleep(*interval),
                (Waiter::Call(_), None) => bail!("the wait is not prepared"),
            }
            let returned = Instant::now();
            let jobs = worker.claim(1)?;
            if !jobs.is_empty() {
                break (jobs, returned);
            }
            if start.elapsed() > JOB_WAIT_MAX {
                bail!("no job came in {JOB_WAIT_MAX:?}");
            }
        };
        let claimed = Instant::now();
        worker.complete(&jobs)?;
        let job_id = jobs.first().map(|job| job.job_id).context("a claim returned no job")?;
        if woken.send(Woken { returned, claimed, job_id }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Negative when the waiting session was told before the committing one.
fn milliseconds(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(later) => later.as_secs_f64() * 1e3,
        None => -from.duration_since(to).as_secs_f64() * 1e3,
    }
}
