//! PgQ by its SQL functions: an event log with ticks. One consumer reads batches that the ticker has cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use postgres::{Client, Statement};

use crate::payload::Payload;
use crate::systems::{
    Ability, Claimed, Helper, KIND, Package, Session, System, SystemName, Wishes, connect, ids, reinstall, schema_bytes,
};

const CONSUMER: &str = "bench";
const TICKER_INTERVAL: Duration = Duration::from_millis(50);
const DRAIN_BATCHES_MAX: usize = 1_000_000;

pub struct Pgq {
    package: Package,
    /// A consumer is one cursor: the first session that claims is it, the others find nothing.
    consumer_taken: Arc<AtomicBool>,
}

impl Pgq {
    pub fn new(package: Package) -> Pgq {
        Pgq { package, consumer_taken: Arc::default() }
    }
}

impl System for Pgq {
    fn name(&self) -> SystemName {
        SystemName::Pgq
    }

    fn contract(&self) -> &'static str {
        "its SQL functions and a ticker every 50 ms: an event log, not a job queue; one consumer takes whole batches as the ticks cut \
         them, the other workers idle; no state, attempt, retry or fence of a job, a failed batch comes again whole; no priority, no \
         schedule; events are kept until the tables rotate (2 hours)"
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        match ability {
            Ability::OneCallCycle => Some("no call that completes and claims"),
            Ability::ClaimSize => Some("the ticker cuts the batches"),
            Ability::Schedule => Some("no schedule"),
            Ability::OpenClaims => Some("one open batch at a time"),
            Ability::SqlSession => None,
        }
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        reinstall(client, "pgq", &self.package.read("schema.sql")?)
    }

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT pgq.create_queue($1::text)", &[&queue])?;
        for (setting, value) in
            [("ticker_max_lag", "100 milliseconds"), ("ticker_idle_period", "1 second"), ("ticker_max_count", "200")]
        {
            client.execute("SELECT pgq.set_queue_config($1::text, $2::text, $3::text)", &[&queue, &setting, &value])?;
        }
        client.execute("SELECT pgq.ticker($1::text)", &[&queue])?;
        client.execute("SELECT pgq.register_consumer($1::text, $2::text)", &[&queue, &CONSUMER])?;
        Ok(())
    }

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT pgq.drop_queue($1::text, true)", &[&queue])?;
        Ok(())
    }

    fn helper(&self, url: &str, _: &str) -> Result<Option<Helper>> {
        let mut client = connect(url)?;
        let tick = client.prepare("SELECT pgq.ticker()")?;
        Ok(Some(Helper::every(TICKER_INTERVAL, move || {
            client.query(&tick, &[])?;
            Ok(())
        })))
    }

    fn connect_with(&self, url: &str, queue: &str, _: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        let mut prepare = |sql: &str| client.prepare(sql);
        let insert = prepare("SELECT pgq.insert_event($1::text, $2::text, $3::text)")?;
        let insert_many = prepare("SELECT pgq.insert_event($1::text, $2::text, data) FROM unnest($3::text[]) AS data")?;
        let next_batch = prepare("SELECT pgq.next_batch($1::text, $2::text)")?;
        let events = prepare("SELECT ev_id, ev_data FROM pgq.get_batch_events($1::bigint)")?;
        let finish = prepare("SELECT pgq.finish_batch($1::bigint)")?;
        let consumer_taken = Arc::clone(&self.consumer_taken);
        let queue = queue.to_owned();
        Ok(Box::new(PgqSession {
            client,
            queue,
            consumer_taken,
            is_consumer: false,
            insert,
            insert_many,
            next_batch,
            events,
            finish,
        }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, "pgq")
    }

    fn hot_table(&self, client: &mut Client, queue: &str) -> Result<String> {
        Ok(client.query_one("SELECT queue_data_pfx FROM pgq.queue WHERE queue_name = $1", &[&queue])?.try_get(0)?)
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"SELECT count(pgq.insert_event($1::text, $2::text,
                               format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                      '"locale": "en", "try": true}', lpad(n::text, 16, '0'))))
                FROM generate_series(1, $3::integer) AS n
               WHERE NOT $4::boolean"#
            .to_owned())
    }

    /// Nothing lists what a consumer has not had yet, so the rest is delivered.
    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        client.execute("SELECT pgq.force_tick($1::text)", &[&queue])?;
        client.execute("SELECT pgq.ticker($1::text)", &[&queue])?;
        let mut left = Vec::new();
        for _ in 0..DRAIN_BATCHES_MAX {
            let row = client.query_one("SELECT pgq.next_batch($1::text, $2::text)", &[&queue, &CONSUMER])?;
            let Some(batch) = row.try_get::<_, Option<i64>>(0)? else { return Ok(left) };
            left.extend(ids(&client.query("SELECT ev_id FROM pgq.get_batch_events($1::bigint)", &[&batch])?)?);
            client.execute("SELECT pgq.finish_batch($1::bigint)", &[&batch])?;
        }
        bail!("more than {DRAIN_BATCHES_MAX} batches are left")
    }

    fn completed(&self, _: &mut Client, _: &str) -> Result<Option<i64>> {
        Ok(None)
    }
}

struct PgqSession {
    client: Client,
    queue: String,
    consumer_taken: Arc<AtomicBool>,
    is_consumer: bool,
    insert: Statement,
    insert_many: Statement,
    next_batch: Statement,
    events: Statement,
    finish: Statement,
}

impl PgqSession {
    fn finish(&mut self, batch: i64) -> Result<()> {
        let finished: i32 = self.client.query_one(&self.finish, &[&batch])?.try_get(0)?;
        if finished != 1 {
            bail!("batch {batch} was not there to be finished");
        }
        Ok(())
    }
}

impl Session for PgqSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let rows = if let [job] = jobs {
            self.client.query(&self.insert, &[&self.queue, &KIND, job])?
        } else {
            self.client.query(&self.insert_many, &[&self.queue, &KIND, &jobs])?
        };
        ids(&rows)
    }

    fn claim(&mut self, _: i32) -> Result<Vec<Claimed>> {
        if !self.is_consumer {
            if self.consumer_taken.swap(true, Ordering::Relaxed) {
                return Ok(Vec::new());
            }
            self.is_consumer = true;
        }
        let row = self.client.query_one(&self.next_batch, &[&self.queue, &CONSUMER])?;
        let Some(batch) = row.try_get::<_, Option<i64>>(0)? else { return Ok(Vec::new()) };
        let mut claimed = Vec::new();
        for row in self.client.query(&self.events, &[&batch])? {
            if row.try_get::<_, &str>(1)?.is_empty() {
                bail!("a job came without its payload");
            }
            claimed.push(Claimed { job_id: row.try_get(0)?, lease: batch });
        }
        if claimed.is_empty() {
            self.finish(batch)?;
        }
        Ok(claimed)
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        if let Some(job) = jobs.first() {
            self.finish(job.lease)?;
        }
        Ok(jobs.iter().map(|job| job.job_id).collect())
    }
}

impl Drop for PgqSession {
    fn drop(&mut self) {
        if self.is_consumer {
            self.consumer_taken.store(false, Ordering::Relaxed);
        }
    }
}
