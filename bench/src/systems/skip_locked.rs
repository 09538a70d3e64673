//! The plain table: claim updates the row under SKIP LOCKED, complete deletes it, or updates it again to keep it.

use anyhow::{Result, bail};
use postgres::{Client, Row, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{Claimed, KIND, Session, System, SystemName, Wishes, connect, ids, job_ids};

const SCHEMA: &str = "
    DROP SCHEMA IF EXISTS skip_locked CASCADE;
    CREATE SCHEMA skip_locked;
    CREATE TABLE skip_locked.jobs (
        id       bigserial   NOT NULL PRIMARY KEY,
        queue    text        NOT NULL,
        kind     text        NOT NULL,
        priority integer     NOT NULL DEFAULT 2,
        run_at   timestamptz NOT NULL DEFAULT now(),
        state    text        NOT NULL DEFAULT 'ready',
        attempt  integer     NOT NULL DEFAULT 0,
        payload  jsonb       NOT NULL,
        finished_at timestamptz
    );
    CREATE INDEX jobs_ready_idx ON skip_locked.jobs (queue, priority, run_at, id) WHERE state = 'ready';
    CHECKPOINT";

/// `= ANY (ARRAY(...))` keeps the planner on the primary key, whatever it believes about the size of the table.
const CLAIM: &str = "
    UPDATE skip_locked.jobs
       SET state = 'running',
           attempt = attempt + 1
     WHERE id = ANY (ARRAY(SELECT id
                             FROM skip_locked.jobs
                            WHERE queue = $1
                              AND state = 'ready'
                              AND run_at <= now()
                            ORDER BY priority, run_at, id
                            LIMIT $2
                              FOR UPDATE SKIP LOCKED))
 RETURNING id, attempt, payload";

/// The limit makes the deletes come first. The other way round two sessions deadlock: SKIP LOCKED also locks, and then
/// passes over, rows that another session has just claimed and is about to delete.
const COMPLETE_AND_CLAIM: &str = "
    WITH done AS (
        FINISH WHERE id = ANY ($3::bigint[]) AND state = 'running' RETURNING id
    )
    UPDATE skip_locked.jobs
       SET state = 'running',
           attempt = attempt + 1
     WHERE id = ANY (ARRAY(SELECT id
                             FROM skip_locked.jobs
                            WHERE queue = $1
                              AND state = 'ready'
                              AND run_at <= now()
                            ORDER BY priority, run_at, id
                            LIMIT $2 + (SELECT 0 * count(*) FROM done)
                              FOR UPDATE SKIP LOCKED))
 RETURNING id, attempt, payload";

/// What completes a row, before its `WHERE`.
const DELETE: &str = "DELETE FROM skip_locked.jobs";
const KEEP: &str = "UPDATE skip_locked.jobs SET state = 'done', finished_at = now()";

pub struct SkipLocked {
    keep: bool,
    finish: &'static str,
}

impl SkipLocked {
    pub fn new(keep: bool) -> SkipLocked {
        SkipLocked { keep, finish: if keep { KEEP } else { DELETE } }
    }
}

impl System for SkipLocked {
    fn name(&self) -> SystemName {
        if self.keep { SystemName::SkipLockedKeep } else { SystemName::SkipLocked }
    }

    fn contract(&self) -> &'static str {
        if self.keep {
            "a table of our own: claim updates the row, complete updates it again (finished jobs are kept); attempts counted, \
             priorities, schedule; no lease, fence, retry policy or rescue"
        } else {
            "a table of our own: claim updates the row, complete deletes it (nothing is kept); attempts counted, priorities, \
             schedule; no lease, fence, retry policy or rescue"
        }
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        client.batch_execute("SET client_min_messages = warning")?;
        client.batch_execute(SCHEMA)?;
        Ok(())
    }

    fn create_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("DELETE FROM skip_locked.jobs WHERE queue = $1", &[&queue])?;
        Ok(())
    }

    fn connect_with(&self, url: &str, queue: &str, _: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        let mut prepare = |sql: &str| client.prepare(sql);
        let enqueue = prepare("INSERT INTO skip_locked.jobs (queue, kind, payload) VALUES ($1, $2, $3) RETURNING id")?;
        let enqueue_many = prepare(
            "INSERT INTO skip_locked.jobs (queue, kind, payload)
             SELECT $1, $2, payload FROM unnest($3::jsonb[]) AS payload
             RETURNING id",
        )?;
        let claim = prepare(CLAIM)?;
        let finish = self.finish;
        let complete = prepare(&format!("{finish} WHERE id = $1 AND state = 'running' RETURNING id"))?;
        let complete_many = prepare(&format!("{finish} WHERE id = ANY ($1::bigint[]) AND state = 'running' RETURNING id"))?;
        let complete_and_claim = prepare(&COMPLETE_AND_CLAIM.replace("FINISH", finish))?;
        Ok(Box::new(SkipLockedSession {
            queue: queue.to_owned(),
            enqueue,
            enqueue_many,
            claim,
            complete,
            complete_many,
            complete_and_claim,
            client,
        }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        Ok(client.query_one("SELECT pg_total_relation_size('skip_locked.jobs')", &[])?.try_get(0)?)
    }

    fn hot_table(&self, _: &mut Client, _: &str) -> Result<String> {
        Ok("skip_locked.jobs".to_owned())
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"INSERT INTO skip_locked.jobs (queue, kind, payload, run_at)
           SELECT $1,
                  $2,
                  format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                         '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::jsonb,
                  CASE WHEN $4::boolean THEN now() + '1 hour' + random() * '1 hour'::interval ELSE now() END
             FROM generate_series(1, $3::integer) AS n"#
            .to_owned())
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        ids(&client.query("SELECT id FROM skip_locked.jobs WHERE queue = $1 AND state <> 'done'", &[&queue])?)
    }

    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>> {
        if !self.keep {
            return Ok(None);
        }
        let sql = "SELECT count(*) FROM skip_locked.jobs WHERE queue = $1 AND state = 'done'";
        Ok(Some(client.query_one(sql, &[&queue])?.try_get(0)?))
    }
}

struct SkipLockedSession {
    client: Client,
    queue: String,
    enqueue: Statement,
    enqueue_many: Statement,
    claim: Statement,
    complete: Statement,
    complete_many: Statement,
    complete_and_claim: Statement,
}

impl Session for SkipLockedSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let rows = if let [job] = jobs {
            self.client.query(&self.enqueue, &[&self.queue, &KIND, job])?
        } else {
            self.client.query(&self.enqueue_many, &[&self.queue, &KIND, &jobs])?
        };
        ids(&rows)
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        let rows = self.client.query(&self.claim, &[&self.queue, &i64::from(batch_size)])?;
        rows.iter().map(claimed).collect()
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        let rows = if let [job] = jobs {
            self.client.query(&self.complete, &[&job.job_id])?
        } else {
            self.client.query(&self.complete_many, &[&job_ids(jobs)])?
        };
        if rows.len() != jobs.len() {
            bail!("{} of {} completions found their row", rows.len(), jobs.len());
        }
        ids(&rows)
    }

    fn complete_and_claim(&mut self, jobs: &[Claimed], batch_size: i32) -> Result<Vec<Claimed>> {
        let parameters: &[&(dyn postgres::types::ToSql + Sync)] = &[&self.queue, &i64::from(batch_size), &job_ids(jobs)];
        let rows = self.client.query(&self.complete_and_claim, parameters)?;
        rows.iter().map(claimed).collect()
    }
}

fn claimed(row: &Row) -> Result<Claimed> {
    let PayloadBytes(size) = row.try_get(2)?;
    if size == 0 {
        bail!("a job came without its payload");
    }
    let attempt: i32 = row.try_get(1)?;
    Ok(Claimed { job_id: row.try_get(0)?, lease: i64::from(attempt) })
}
