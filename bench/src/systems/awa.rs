//! awa_queue through its SQL functions. Parameters carry their type, because `awa.claim` takes one queue or several.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use postgres::{Client, Row, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{Claimed, KIND, Session, System, SystemName, Wishes, connect, ids};

const RESULT_COMPLETED: &str = "completed";
/// One call prunes one segment.
const PRUNES_MAX: usize = 32;

pub struct Awa;

impl System for Awa {
    fn name(&self) -> SystemName {
        SystemName::Awa
    }

    fn contract(&self) -> &'static str {
        "finished jobs are kept until their segment is pruned (and beyond, within their retention); attempts with leases that fence \
         every exit, deadlines, heartbeats, retries with backoff, dead letters, priorities, schedule"
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        client.batch_execute("SET client_min_messages = warning")?;
        // The client of the ancestor has its tables in a schema of the same name.
        if client.query_opt("SELECT 1 FROM pg_extension WHERE extname = 'awa_queue'", &[])?.is_none() {
            client.batch_execute("DROP SCHEMA IF EXISTS awa CASCADE; CREATE EXTENSION awa_queue")?;
        }
        // A ring that cannot rotate or prune now is no reason not to measure.
        if let Err(error) = rotate_and_prune(client) {
            eprintln!("the ring keeps its segments: {error:#}");
        }
        client.batch_execute("CHECKPOINT")?;
        Ok(())
    }

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT awa.create_queue($1::text)", &[&queue])?;
        Ok(())
    }

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT awa.drop_queue($1::text, force => true)", &[&queue])?;
        Ok(())
    }

    fn connect_with(&self, url: &str, queue: &str, wishes: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        let mut prepare = |sql: &str| client.prepare(sql);
        let enqueue = prepare("SELECT awa.enqueue($1::text, $2::text, $3::jsonb)")?;
        let enqueue_many = prepare("SELECT awa.enqueue_many($1::text, $2::text, $3::jsonb[])")?;
        let deadline = wishes.deadline.map_or(String::new(), |seconds| format!(", deadline => '{seconds} seconds'"));
        let claim = prepare(&format!("SELECT job_id, run_lease, attempt, args FROM awa.claim($1::text, $2::integer{deadline})"))?;
        let complete = prepare("SELECT awa.complete($1::bigint, $2::bigint)")?;
        let complete_many = prepare("SELECT job_id, result FROM awa.complete_many($1::bigint[], $2::bigint[])")?;
        let complete_and_claim = prepare(&format!(
            "SELECT job_id, run_lease, attempt, args
                   FROM awa.complete_and_claim($1::bigint[], $2::bigint[], $3::text, $4::integer{deadline})"
        ))?;
        Ok(Box::new(AwaSession {
            queue: queue.to_owned(),
            enqueue,
            enqueue_many,
            claim,
            complete,
            complete_many,
            complete_and_claim,
            wait: wishes.wait,
            client,
        }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        let row = client.query_one(
            "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
               FROM pg_class AS c
              WHERE c.relkind = 'r' AND c.relnamespace IN ('awa'::regnamespace, 'awa_segments'::regnamespace)",
            &[],
        )?;
        Ok(row.try_get(0)?)
    }

    fn hot_table(&self, client: &mut Client, _: &str) -> Result<String> {
        let row = client.query_one(
            "SELECT oid::regclass::text
               FROM pg_class
              WHERE relkind = 'r' AND relnamespace = 'awa_segments'::regnamespace
              ORDER BY pg_relation_size(oid) DESC
              LIMIT 1",
            &[],
        )?;
        Ok(row.try_get(0)?)
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"SELECT cardinality(awa.enqueue_many(
                      $1::text,
                      $2::text,
                      array_agg(format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                       '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::jsonb),
                      run_ats => CASE WHEN $4::boolean
                                      THEN array_agg(now() + '1 hour' + random() * '1 hour'::interval)
                                 END))
             FROM generate_series(1, $3::integer) AS n"#
            .to_owned())
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        ids(&client.query("SELECT job_id FROM awa.jobs WHERE queue = $1", &[&queue])?)
    }

    /// Of those whose segments have been pruned only the sum knows, and of those before a restart only the ring.
    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>> {
        let row = client.query_opt("SELECT greatest(c.completed, s.completed) FROM awa.queue_counts($1::text) AS c, awa.stat_queue AS s WHERE s.queue = $1::text", &[&queue])?;
        row.map(|row| Ok(row.try_get(0)?)).transpose()
    }

    fn verify(&self, client: &mut Client) -> Result<Vec<String>> {
        let rows = client
            .query("SELECT pg_catalog.concat_ws(', ', problem, queue, job_id::text, detail) FROM awa.verify() LIMIT 20", &[])?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }
}

fn rotate_and_prune(client: &mut Client) -> Result<()> {
    client.batch_execute("SELECT awa.rotate()")?;
    for _ in 0..PRUNES_MAX {
        let outcome: Option<String> = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
        if !outcome.is_some_and(|outcome| outcome.starts_with("prune")) {
            break;
        }
    }
    Ok(())
}

struct AwaSession {
    client: Client,
    queue: String,
    enqueue: Statement,
    enqueue_many: Statement,
    claim: Statement,
    complete: Statement,
    complete_many: Statement,
    complete_and_claim: Statement,
    wait: bool,
}

impl Session for AwaSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        if let [job] = jobs {
            let row = self.client.query_one(&self.enqueue, &[&self.queue, &KIND, job])?;
            return Ok(vec![row.try_get(0)?]);
        }
        let row = self.client.query_one(&self.enqueue_many, &[&self.queue, &KIND, &jobs])?;
        Ok(row.try_get(0)?)
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        let rows = self.client.query(&self.claim, &[&self.queue, &batch_size])?;
        rows.iter().map(claimed).collect()
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        if let [job] = jobs {
            let row = self.client.query_one(&self.complete, &[&job.job_id, &job.lease])?;
            return Ok(vec![acknowledged(job.job_id, row.try_get(0)?)?]);
        }
        let (job_ids, leases) = identities(jobs);
        let rows = self.client.query(&self.complete_many, &[&job_ids, &leases])?;
        rows.iter().map(|row| acknowledged(row.try_get(0)?, row.try_get(1)?)).collect()
    }

    fn idle(&mut self, pause: Duration) -> Result<()> {
        if self.wait {
            self.client.execute("CALL awa.wait($1::text, '200 milliseconds')", &[&self.queue])?;
        } else {
            thread::sleep(pause);
        }
        Ok(())
    }

    fn complete_and_claim(&mut self, jobs: &[Claimed], batch_size: i32) -> Result<Vec<Claimed>> {
        let (job_ids, leases) = identities(jobs);
        let rows = self.client.query(&self.complete_and_claim, &[&job_ids, &leases, &self.queue, &batch_size])?;
        rows.iter().map(claimed).collect()
    }
}

fn claimed(row: &Row) -> Result<Claimed> {
    let PayloadBytes(size) = row.try_get(3)?;
    if size == 0 {
        bail!("a job came without its payload");
    }
    Ok(Claimed { job_id: row.try_get(0)?, lease: row.try_get(1)? })
}

fn acknowledged(job_id: i64, result: &str) -> Result<i64> {
    if result != RESULT_COMPLETED {
        bail!("completion of job {job_id} was answered with \"{result}\"");
    }
    Ok(job_id)
}

fn identities(jobs: &[Claimed]) -> (Vec<i64>, Vec<i64>) {
    jobs.iter().map(|job| (job.job_id, job.lease)).unzip()
}
