//! pgmq by its SQL functions, from the script that its Python package carries.

use anyhow::{Result, bail};
use postgres::{Client, Row, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{
    Ability, Claimed, Package, Session, System, SystemName, Wishes, connect, ids, job_ids, reinstall, schema_bytes,
};

const VISIBILITY_SECONDS: u32 = 30;

pub struct Pgmq {
    pub package: Package,
    pub archive: bool,
}

impl System for Pgmq {
    fn name(&self) -> SystemName {
        if self.archive { SystemName::PgmqArchive } else { SystemName::Pgmq }
    }

    fn contract(&self) -> &'static str {
        if self.archive {
            "its SQL functions: read, archive (finished messages are kept); visibility timeout and read count; no attempt limit, \
             retry policy, fence or priority; delays"
        } else {
            "its SQL functions: read, delete (nothing is kept); visibility timeout and read count; no attempt limit, retry \
             policy, fence or priority; delays"
        }
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        (ability == Ability::OneCallCycle).then_some("no call that completes and claims")
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        reinstall(client, "pgmq", &self.package.read("schema.sql")?)
    }

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT pgmq.create($1::text)", &[&queue])?;
        Ok(())
    }

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT pgmq.drop_queue($1::text)", &[&queue])?;
        Ok(())
    }

    fn connect_with(&self, url: &str, queue: &str, wishes: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        let seconds = wishes.deadline.unwrap_or(VISIBILITY_SECONDS);
        let finish = if self.archive { "archive" } else { "delete" };
        let mut prepare = |sql: &str| client.prepare(sql);
        let send = prepare("SELECT * FROM pgmq.send($1::text, $2::jsonb)")?;
        let send_batch = prepare("SELECT * FROM pgmq.send_batch($1::text, $2::jsonb[])")?;
        let read = prepare(&format!("SELECT msg_id, read_ct, message FROM pgmq.read($1::text, {seconds}, $2::integer)"))?;
        let finish_one = prepare(&format!("SELECT pgmq.{finish}($1::text, $2::bigint)"))?;
        let finish_many = prepare(&format!("SELECT * FROM pgmq.{finish}($1::text, $2::bigint[])"))?;
        Ok(Box::new(PgmqSession { client, queue: queue.to_owned(), send, send_batch, read, finish_one, finish_many }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, "pgmq")
    }

    fn hot_table(&self, _: &mut Client, queue: &str) -> Result<String> {
        Ok(format!("pgmq.q_{queue}"))
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"SELECT count(*)
                FROM pgmq.send_batch(
                         $1::text,
                         (SELECT array_agg(format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                                  '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::jsonb)
                            FROM generate_series(1, $3::integer) AS n
                           WHERE $2::text IS NOT NULL),
                         CASE WHEN $4::boolean THEN 3600 + (random() * 3600)::integer ELSE 0 END)"#
            .to_owned())
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        ids(&client.query(&format!("SELECT msg_id FROM pgmq.q_{queue}"), &[])?)
    }

    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>> {
        if !self.archive {
            return Ok(None);
        }
        let row = client.query_one(&format!("SELECT count(*) FROM pgmq.a_{queue}"), &[])?;
        Ok(Some(row.try_get(0)?))
    }
}

struct PgmqSession {
    client: Client,
    queue: String,
    send: Statement,
    send_batch: Statement,
    read: Statement,
    finish_one: Statement,
    finish_many: Statement,
}

impl Session for PgmqSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let rows = if let [job] = jobs {
            self.client.query(&self.send, &[&self.queue, job])?
        } else {
            self.client.query(&self.send_batch, &[&self.queue, &jobs])?
        };
        ids(&rows)
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        let rows = self.client.query(&self.read, &[&self.queue, &batch_size])?;
        rows.iter().map(claimed).collect()
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        if let [job] = jobs {
            if !self.client.query_one(&self.finish_one, &[&self.queue, &job.job_id])?.try_get::<_, bool>(0)? {
                bail!("message {} was not there to be finished", job.job_id);
            }
            return Ok(vec![job.job_id]);
        }
        ids(&self.client.query(&self.finish_many, &[&self.queue, &job_ids(jobs)])?)
    }
}

fn claimed(row: &Row) -> Result<Claimed> {
    let PayloadBytes(size) = row.try_get(2)?;
    if size == 0 {
        bail!("a job came without its payload");
    }
    let reads: i32 = row.try_get(1)?;
    Ok(Claimed { job_id: row.try_get(0)?, lease: i64::from(reads) })
}
