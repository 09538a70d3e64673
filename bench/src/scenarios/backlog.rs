//! Whether a claim costs more in front of ten million jobs, of jobs not yet due, or behind an open transaction.
//!
//! Two queues in turn, call by call in one session: one empty but for the jobs about to be claimed, one loaded. Both get
//! as many jobs as are claimed, so the state under test does not change while it is measured.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::payload::Payload;
use crate::report::{Measurement, Recorder};
use crate::scenarios::able;
use crate::stats;
use crate::systems::{Ability, Due, Session, System, SystemName, connect, connect_loader};

#[derive(Args)]
struct CallArgs {
    /// Jobs a claim
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Claims timed on each queue
    #[arg(long, default_value_t = 300)]
    calls: usize,
}

#[derive(Args)]
pub struct BacklogArgs {
    #[command(flatten)]
    calls: CallArgs,
    /// Jobs waiting in the loaded queue, one case each
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1_000_000, 10_000_000])]
    waiting: Vec<u64>,
}

#[derive(Args)]
pub struct ScheduledArgs {
    #[command(flatten)]
    calls: CallArgs,
    /// Jobs scheduled an hour or two ahead
    #[arg(long, default_value_t = 1_000_000)]
    scheduled: u64,
}

#[derive(Args)]
pub struct TransactionArgs {
    #[command(flatten)]
    calls: CallArgs,
    /// Jobs of the open transaction
    #[arg(long, default_value_t = 100_000)]
    uncommitted: u64,
}

struct Bench<'a> {
    target: &'a Target,
    calls: &'a CallArgs,
    scenario: &'static str,
    system: Box<dyn System>,
    name: SystemName,
    round: u32,
}

impl<'a> Bench<'a> {
    fn new(target: &'a Target, calls: &'a CallArgs, scenario: &'static str, name: SystemName) -> Self {
        // Loading takes far longer than measuring: the interleaving is between the two queues, so one round is enough.
        Bench { target, calls, scenario, system: target.system(name), name, round: 1 }
    }
}

pub fn backlog(target: &Target, args: &BacklogArgs, recorder: &mut Recorder) -> Result<()> {
    for name in able(target, &[Ability::ClaimSize], "backlog", "claims of a set size", recorder)? {
        let bench = Bench::new(target, &args.calls, "backlog", name);
        for &waiting in &args.waiting {
            bench.case(&format!("{waiting} waiting"), recorder, |bench, queue| bench.load(queue, waiting, Due::Now))?;
        }
    }
    Ok(())
}

pub fn scheduled(target: &Target, args: &ScheduledArgs, recorder: &mut Recorder) -> Result<()> {
    let case = format!("{} scheduled ahead", args.scheduled);
    for name in able(target, &[Ability::ClaimSize, Ability::Schedule], "scheduled-backlog", &case, recorder)? {
        let bench = Bench::new(target, &args.calls, "scheduled-backlog", name);
        bench.case(&case, recorder, |bench, queue| bench.load(queue, args.scheduled, Due::Later))?;
    }
    Ok(())
}

pub fn long_transaction(target: &Target, args: &TransactionArgs, recorder: &mut Recorder) -> Result<()> {
    let case = format!("behind an open transaction with {} jobs", args.uncommitted);
    for name in able(target, &[Ability::ClaimSize], "long-transaction", &case, recorder)? {
        Bench::new(target, &args.calls, "long-transaction", name).behind_open_transaction(&case, args.uncommitted, recorder)?;
    }
    Ok(())
}

impl Bench<'_> {
    fn case(&self, case: &str, recorder: &mut Recorder, prepare: impl FnOnce(&Self, &str) -> Result<()>) -> Result<()> {
        let (control_queue, loaded_queue) = self.create_queues()?;
        prepare(self, &loaded_queue)?;
        self.measure(case, &control_queue, &loaded_queue, recorder)?;
        self.drop_queues(&control_queue, &loaded_queue)
    }

    /// The rows of the open transaction are older than all others; afterwards each must be handed out exactly once.
    fn behind_open_transaction(&self, case: &str, uncommitted: u64, recorder: &mut Recorder) -> Result<()> {
        let (control_queue, loaded_queue) = self.create_queues()?;
        let mut holder = connect_loader(&self.target.url)?;
        holder.batch_execute("BEGIN")?;
        self.system.bulk_load(&mut holder, &loaded_queue, uncommitted, Due::Now)?;
        self.measure(case, &control_queue, &loaded_queue, recorder)?;
        holder.batch_execute("COMMIT")?;
        let drained = self.drain(&loaded_queue)?;
        // Systems without queues of their own share one table: the control queue is in it, and empty.
        if drained != uncommitted {
            recorder.complain(&format!("{}, {case}: {drained} jobs came out after its commit", self.name.as_str()))?;
        }
        self.drop_queues(&control_queue, &loaded_queue)
    }

    fn create_queues(&self) -> Result<(String, String)> {
        let mut client = connect(&self.target.url)?;
        let queues = (format!("control_{}", std::process::id()), format!("loaded_{}", std::process::id()));
        self.system.reset(&mut client)?;
        self.system.create_queue(&mut client, &queues.0)?;
        self.system.create_queue(&mut client, &queues.1)?;
        Ok(queues)
    }

    fn drop_queues(&self, control_queue: &str, loaded_queue: &str) -> Result<()> {
        let mut client = connect(&self.target.url)?;
        self.system.drop_queue(&mut client, control_queue)?;
        self.system.drop_queue(&mut client, loaded_queue)
    }

    fn load(&self, queue: &str, count: u64, due: Due) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let start = Instant::now();
        let mut client = connect_loader(&self.target.url)?;
        self.system.bulk_load(&mut client, queue, count, due)?;
        settle(&mut client)?;
        eprintln!("{}: {count} jobs loaded in {:.0} s", self.name.as_str(), start.elapsed().as_secs_f64());
        Ok(())
    }

    fn measure(&self, case: &str, control_queue: &str, loaded_queue: &str, recorder: &mut Recorder) -> Result<()> {
        let mut control = self.system.connect(&self.target.url, control_queue)?;
        let mut loaded = self.system.connect(&self.target.url, loaded_queue)?;
        let nothing = self.time_empty_claims(&mut *control)?;
        let warm_up = self.calls.calls / 10 + 5;
        let (mut control_us, mut loaded_us) = (Vec::new(), Vec::new());
        for call in 0..warm_up + self.calls.calls {
            let (alone, behind) = (self.one_call(&mut *control)?, self.one_call(&mut *loaded)?);
            if call >= warm_up {
                control_us.push(alone);
                loaded_us.push(behind);
            }
        }
        let (alone, behind) = (stats::quantile(&control_us, 0.5), stats::quantile(&loaded_us, 0.5));
        let slowdown = alone.zip(behind).map(|(alone, behind)| behind / alone);
        let measurement = Measurement::new(self.scenario, case, self.name.as_str(), self.round)
            .metric("claim p50 us", behind)
            .metric("claim p99 us", stats::quantile(&loaded_us, 0.99))
            .metric("empty queue p50 us", alone)
            .metric("empty queue p99 us", stats::quantile(&control_us, 0.99))
            .metric("p50 / empty queue", slowdown)
            .metric("nothing to claim p50 us", stats::quantile(&nothing, 0.5));
        recorder.record(measurement)
    }

    /// Enqueue a batch, claim a batch (timed), complete it: the depth of the queue does not change.
    fn one_call(&self, session: &mut dyn Session) -> Result<f64> {
        let payloads: Vec<Payload> = (0..).take(self.calls.batch).map(Payload::numbered).collect();
        session.enqueue(&payloads)?;
        let start = Instant::now();
        let claimed = session.claim(i32::try_from(self.calls.batch)?)?;
        let microseconds = start.elapsed().as_secs_f64() * 1e6;
        if claimed.len() != self.calls.batch {
            bail!("a claim of {} jobs returned {}", self.calls.batch, claimed.len());
        }
        session.complete(&claimed)?;
        Ok(microseconds)
    }

    fn time_empty_claims(&self, session: &mut dyn Session) -> Result<Vec<f64>> {
        let mut microseconds = Vec::new();
        for _ in 0..self.calls.calls {
            let start = Instant::now();
            let claimed = session.claim(i32::try_from(self.calls.batch)?)?;
            microseconds.push(start.elapsed().as_secs_f64() * 1e6);
            if !claimed.is_empty() {
                bail!("an empty queue returned {} jobs", claimed.len());
            }
        }
        Ok(microseconds)
    }

    fn drain(&self, queue: &str) -> Result<u64> {
        let mut session = self.system.connect(&self.target.url, queue)?;
        session.client().batch_execute("SET synchronous_commit = off")?;
        let mut drained = 0;
        loop {
            let claimed = session.claim(1_000)?;
            if claimed.is_empty() {
                return Ok(drained);
            }
            drained += claimed.len() as u64;
            session.complete(&claimed)?;
        }
    }
}

/// What a load leaves behind (dirty pages, missing statistics) is not what the next call should pay for.
fn settle(client: &mut Client) -> Result<()> {
    client.batch_execute("VACUUM ANALYZE")?;
    client.batch_execute("CHECKPOINT")?;
    Ok(())
}
