//! Procrastinate by the functions of its schema, which its workers call: one job a fetch, one job a finish.

use anyhow::{Context, Result, bail};
use postgres::{Client, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{Ability, Claimed, Package, Session, System, SystemName, Wishes, connect, ids, reinstall, schema_bytes};

const SCHEMA: &str = "procrastinate";

pub struct Procrastinate {
    pub package: Package,
}

impl System for Procrastinate {
    fn name(&self) -> SystemName {
        SystemName::Procrastinate
    }

    fn contract(&self) -> &'static str {
        "its SQL functions, without its Python: one job a fetch and a finish, whatever the batch; finished jobs and a row for each \
         event are kept; priorities, locks, schedule, NOTIFY; attempts counted, retried by its client; no fence"
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        match ability {
            Ability::OneCallCycle => Some("no call that completes and claims"),
            Ability::ClaimSize => Some("one job a claim"),
            Ability::Schedule | Ability::OpenClaims | Ability::SqlSession => None,
        }
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        let script = self.package.read("schema.sql")?;
        reinstall(client, SCHEMA, &format!("CREATE SCHEMA {SCHEMA}; SET search_path TO {SCHEMA};\n{script};\nRESET search_path"))
    }

    fn create_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn drop_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn connect_with(&self, url: &str, queue: &str, _: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        client.batch_execute(&format!("SET search_path TO {SCHEMA}"))?;
        let mut prepare = |sql: &str| client.prepare(sql);
        let defer = prepare(
            "SELECT procrastinate_defer_jobs_v1(ARRAY[
                 ROW($1::varchar, 'bench', 0, NULL, NULL, $2::jsonb, NULL)::procrastinate_job_to_defer_v1])",
        )?;
        let defer_many = prepare(
            "SELECT procrastinate_defer_jobs_v1(ARRAY(
                 SELECT ROW($1::varchar, 'bench', 0, NULL, NULL, args, NULL)::procrastinate_job_to_defer_v1
                   FROM unnest($2::jsonb[]) AS args))",
        )?;
        let fetch = prepare("SELECT id, args FROM procrastinate_fetch_job_v2(ARRAY[$1::varchar], $2::bigint)")?;
        let finish = prepare("SELECT procrastinate_finish_job_v1($1::bigint, 'succeeded', false)")?;
        let worker = client.query_one("SELECT worker_id FROM procrastinate_register_worker_v1()", &[])?.try_get(0)?;
        Ok(Box::new(ProcrastinateSession { client, queue: queue.to_owned(), worker, defer, defer_many, fetch, finish }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, SCHEMA)
    }

    fn hot_table(&self, _: &mut Client, _: &str) -> Result<String> {
        Ok("procrastinate.procrastinate_jobs".to_owned())
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"WITH path AS MATERIALIZED (SELECT set_config('search_path', 'procrastinate', false) AS path)
              SELECT cardinality(procrastinate.procrastinate_defer_jobs_v1(ARRAY(
                         SELECT ROW($1::varchar, $2::varchar, 0, NULL, NULL,
                                    format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                           '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::jsonb,
                                    CASE WHEN $4::boolean THEN now() + '1 hour' + random() * '1 hour'::interval END
                                   )::procrastinate.procrastinate_job_to_defer_v1
                           FROM path, generate_series(1, $3::integer) AS n)))"#
            .to_owned())
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        let sql = "SELECT id FROM procrastinate.procrastinate_jobs WHERE queue_name = $1 AND status IN ('todo', 'doing')";
        ids(&client.query(sql, &[&queue])?)
    }

    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>> {
        let sql = "SELECT count(*) FROM procrastinate.procrastinate_jobs WHERE queue_name = $1 AND status = 'succeeded'";
        Ok(Some(client.query_one(sql, &[&queue])?.try_get(0)?))
    }
}

struct ProcrastinateSession {
    client: Client,
    queue: String,
    worker: i64,
    defer: Statement,
    defer_many: Statement,
    fetch: Statement,
    finish: Statement,
}

impl Session for ProcrastinateSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let row = if let [job] = jobs {
            self.client.query_one(&self.defer, &[&self.queue, job])?
        } else {
            self.client.query_one(&self.defer_many, &[&self.queue, &jobs])?
        };
        Ok(row.try_get(0)?)
    }

    fn claim(&mut self, _: i32) -> Result<Vec<Claimed>> {
        let row = self.client.query_one(&self.fetch, &[&self.queue, &self.worker])?;
        let Some(job_id) = row.try_get::<_, Option<i64>>(0)? else { return Ok(Vec::new()) };
        let PayloadBytes(size) = row.try_get::<_, Option<_>>(1)?.context("a job came without its payload")?;
        if size == 0 {
            bail!("a job came without its payload");
        }
        Ok(vec![Claimed { job_id, lease: 0 }])
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        for job in jobs {
            self.client.query_one(&self.finish, &[&job.job_id])?;
        }
        Ok(jobs.iter().map(|job| job.job_id).collect())
    }
}
