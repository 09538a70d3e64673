//! What one job writes: log bytes and records, heap rows, index entries and dead tuples of each verb, one session.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use postgres::Client;

use crate::Target;
use crate::counters::{self, Counters};
use crate::payload::Payload;
use crate::report::{Measurement, Recorder};
use crate::scenarios::able;
use crate::systems::{Ability, Claimed, Helper, Session, connect};

/// Records that would have been written without the load.
const BACKGROUND_RECORDS: &str = "Standby/RUNNING_XACTS|XLOG/CHECKPOINT_ONLINE|XLOG/CHECKPOINT_REDO|XLOG/NOOP";

#[derive(Args)]
pub struct WalArgs {
    /// Jobs a call
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100])]
    batches: Vec<usize>,
    /// Jobs of each measurement
    #[arg(long, default_value_t = 20_000)]
    jobs: usize,
}

const WHOLE_WAY: &str = "enqueue + claim + complete";
const CHECKPOINTS: &str = "the same, a checkpoint before each";
const ONE_CALL: &str = "complete and claim in one call";
/// For jobs that come only when a ticker says so
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(5);

/// Totals of one verb over all jobs.
struct Cost {
    bytes: f64,
    /// From pg_walinspect, where it is installed
    log: Option<LogRecords>,
    heap_rows: f64,
    dead: f64,
    catalog_dead: f64,
}

struct LogRecords {
    records: f64,
    record_bytes: f64,
    page_image_bytes: f64,
    index_entries: f64,
}

pub fn run(target: &Target, args: &WalArgs, recorder: &mut Recorder) -> Result<()> {
    let mut control = connect(&target.url)?;
    let inspect = control.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect").is_ok();
    if !inspect {
        eprintln!("pg_walinspect is not installed: no record counts, page images are not told apart");
    }
    for name in able(target, &[Ability::SqlSession], "wal-per-job", "each verb", recorder)? {
        for &batch in &args.batches {
            let system = target.system(name);
            let queue = format!("wal_{}_{batch}", std::process::id());
            system.reset(&mut control)?;
            system.create_queue(&mut control, &queue)?;
            let helper = system.helper(&target.url, &queue)?;
            let session = system.connect(&target.url, &queue)?;
            let one_call = system.lacks(Ability::OneCallCycle);
            let mut meter =
                Meter { control: &mut control, session, inspect, batch, jobs: args.jobs, one_call: one_call.is_none() };
            let open_claims = system.lacks(Ability::OpenClaims);
            let costs = if open_claims.is_none() { meter.all_verbs()? } else { meter.batch_by_batch()? };
            drop(meter);
            if let Some(reason) = open_claims {
                for verb in ["claim", "complete"] {
                    recorder.absent("wal-per-job", &format!("batch {batch}, {verb}"), name.as_str(), reason)?;
                }
            }
            helper.map_or(Ok(()), Helper::finish)?;
            if let Some(reason) = one_call {
                recorder.absent("wal-per-job", &format!("batch {batch}, {ONE_CALL}"), name.as_str(), reason)?;
            }
            for (verb, cost) in costs {
                let case = format!("batch {batch}, {verb}");
                let measurement = Measurement::new("wal-per-job", case, name.as_str(), 1);
                recorder.record(with_cost(measurement, &cost, args.jobs as f64))?;
            }
            system.drop_queue(&mut control, &queue)?;
        }
    }
    Ok(())
}

fn sum<'a>(costs: impl Iterator<Item = &'a Cost>) -> Cost {
    let mut total = Cost { bytes: 0.0, log: None, heap_rows: 0.0, dead: 0.0, catalog_dead: 0.0 };
    for cost in costs {
        total.bytes += cost.bytes;
        total.heap_rows += cost.heap_rows;
        total.dead += cost.dead;
        total.catalog_dead += cost.catalog_dead;
        if let Some(log) = &cost.log {
            let sum = total.log.get_or_insert(LogRecords {
                records: 0.0,
                record_bytes: 0.0,
                page_image_bytes: 0.0,
                index_entries: 0.0,
            });
            sum.records += log.records;
            sum.record_bytes += log.record_bytes;
            sum.page_image_bytes += log.page_image_bytes;
            sum.index_entries += log.index_entries;
        }
    }
    total
}

fn with_cost(measurement: Measurement, cost: &Cost, jobs: f64) -> Measurement {
    let log = cost.log.as_ref();
    measurement
        .metric("WAL B/job, no page images", log.map(|log| log.record_bytes / jobs))
        .metric("page images B/job", log.map(|log| log.page_image_bytes / jobs))
        .metric("WAL B/job, all", cost.bytes / jobs)
        .metric("WAL records/job", log.map(|log| log.records / jobs))
        .metric("heap rows/job", cost.heap_rows / jobs)
        .metric("index entries/job", log.map(|log| log.index_entries / jobs))
        .metric("dead tuples/job", cost.dead / jobs)
        .metric("catalog dead tuples", cost.catalog_dead)
}

struct Meter<'a> {
    control: &'a mut Client,
    session: Box<dyn Session>,
    inspect: bool,
    batch: usize,
    jobs: usize,
    one_call: bool,
}

impl Meter<'_> {
    fn all_verbs(&mut self) -> Result<Vec<(&'static str, Cost)>> {
        // Caches, dictionary entries and the first page of everything are paid for before the first measurement.
        let warm = enqueue_all(&mut *self.session, self.batch, self.batch * 2)?;
        let claimed = claim_all(&mut *self.session, self.batch, warm)?;
        complete_all(&mut *self.session, self.batch, &claimed)?;

        let (batch, jobs) = (self.batch, self.jobs);
        let mut costs = Vec::new();
        let (_, cost) = self.measure(|session| enqueue_all(session, batch, jobs))?;
        costs.push(("enqueue", cost));
        let (claimed, cost) = self.measure(|session| claim_all(session, batch, jobs))?;
        costs.push(("claim", cost));
        let (_, cost) = self.measure(|session| complete_all(session, batch, &claimed))?;
        costs.push(("complete", cost));
        let checkpoints = sum(costs.iter().map(|(_, cost)| cost));
        let (_, cost) = self.measure(|session| whole_way(session, batch, jobs))?;
        costs.push((WHOLE_WAY, cost));
        costs.push((CHECKPOINTS, checkpoints));
        if self.one_call {
            enqueue_all(&mut *self.session, batch, jobs)?;
            let (_, cost) = self.measure(|session| complete_and_claim_all(session, batch, jobs))?;
            costs.push((ONE_CALL, cost));
        }
        Ok(costs)
    }

    /// Claims and completions cannot be told apart where each claim must be completed before the next.
    fn batch_by_batch(&mut self) -> Result<Vec<(&'static str, Cost)>> {
        let (batch, jobs) = (self.batch, self.jobs);
        enqueue_all(&mut *self.session, batch, batch * 2)?;
        drain(&mut *self.session, batch, batch * 2)?;
        let (_, cost) = self.measure(|session| enqueue_all(session, batch, jobs))?;
        drain(&mut *self.session, batch, jobs)?;
        let mut costs = vec![("enqueue", cost)];
        let (_, cost) = self.measure(|session| {
            enqueue_all(session, batch, jobs)?;
            drain(session, batch, jobs)
        })?;
        costs.push((WHOLE_WAY, cost));
        Ok(costs)
    }

    /// A checkpoint first, so that the page images of `body` are those that follow any checkpoint.
    fn measure<T>(&mut self, body: impl FnOnce(&mut dyn Session) -> Result<T>) -> Result<(T, Cost)> {
        counters::publish_counts(self.session.client())?;
        counters::publish_counts(self.control)?;
        self.control.batch_execute("CHECKPOINT")?;
        let before = counters::counters(self.control)?;
        let result = body(&mut *self.session)?;
        counters::publish_counts(self.session.client())?;
        let after = counters::counters(self.control)?;
        let log = if self.inspect { Some(log_records(self.control, &before, &after)?) } else { None };
        let user = after.user.since(before.user);
        let cost = Cost {
            bytes: (after.lsn_bytes - before.lsn_bytes) as f64,
            log,
            heap_rows: user.heap_rows() as f64,
            dead: user.made_dead() as f64,
            catalog_dead: after.catalog.since(before.catalog).made_dead() as f64,
        };
        Ok((result, cost))
    }
}

fn log_records(control: &mut Client, before: &Counters, after: &Counters) -> Result<LogRecords> {
    // The log up to `after` must be flushed before it can be read; an asynchronous commit may still be in memory.
    control.batch_execute("SELECT pg_logical_emit_message(true, 'awa_bench', '')")?;
    // A new index entry is one leaf insert, one insert into a posting list, or one split.
    let row = control.query_one(
        "SELECT coalesce(sum(count), 0)::float8,
                coalesce(sum(record_size), 0)::float8,
                coalesce(sum(fpi_size), 0)::float8,
                coalesce(sum(count) FILTER (WHERE name ~ '^Btree/(INSERT_LEAF|INSERT_POST|SPLIT_[LR])'), 0)::float8
           FROM pg_get_wal_stats($1::text::pg_lsn, $2::text::pg_lsn, true)
                AS stats (name, count, count_percent, record_size, record_percent, fpi_size, fpi_percent, size, percent)
          WHERE NOT name = ANY (string_to_array($3::text, '|'))",
        &[&before.lsn, &after.lsn, &BACKGROUND_RECORDS],
    )?;
    Ok(LogRecords {
        records: row.try_get(0)?,
        record_bytes: row.try_get(1)?,
        page_image_bytes: row.try_get(2)?,
        index_entries: row.try_get(3)?,
    })
}

fn enqueue_all(session: &mut dyn Session, batch: usize, jobs: usize) -> Result<usize> {
    let mut enqueued = 0;
    while enqueued < jobs {
        let payloads: Vec<Payload> = (enqueued as u64..).take(batch).map(Payload::numbered).collect();
        enqueued += session.enqueue(&payloads)?.len();
    }
    Ok(enqueued)
}

/// What is claimed is completed before the next claim.
fn drain(session: &mut dyn Session, batch: usize, jobs: usize) -> Result<()> {
    let mut done = 0;
    while done < jobs {
        let claimed = claim_all(session, batch, 1)?;
        done += session.complete(&claimed)?.len();
    }
    Ok(())
}

fn claim_all(session: &mut dyn Session, batch: usize, jobs: usize) -> Result<Vec<Claimed>> {
    let mut claimed = Vec::new();
    let mut asked = Instant::now();
    while claimed.len() < jobs {
        let next = session.claim(i32::try_from(batch)?)?;
        if !next.is_empty() {
            asked = Instant::now();
        } else if asked.elapsed() > CLAIM_WAIT_MAX {
            bail!("{} of {jobs} jobs could be claimed", claimed.len());
        } else {
            thread::sleep(Duration::from_millis(1));
        }
        claimed.extend(next);
    }
    Ok(claimed)
}

fn complete_all(session: &mut dyn Session, batch: usize, claimed: &[Claimed]) -> Result<()> {
    for jobs in claimed.chunks(batch) {
        session.complete(jobs)?;
    }
    Ok(())
}

fn whole_way(session: &mut dyn Session, batch: usize, jobs: usize) -> Result<()> {
    let mut done = 0;
    while done < jobs {
        done += enqueue_all(session, batch, batch)?;
        let claimed = claim_all(session, batch, batch)?;
        complete_all(session, batch, &claimed)?;
    }
    Ok(())
}

fn complete_and_claim_all(session: &mut dyn Session, batch: usize, jobs: usize) -> Result<()> {
    let mut done = 0;
    let mut held = session.claim(i32::try_from(batch)?)?;
    while !held.is_empty() {
        done += held.len();
        held = session.complete_and_claim(&held, i32::try_from(batch)?)?;
    }
    if done != jobs {
        bail!("{done} of {jobs} jobs were completed");
    }
    Ok(())
}
