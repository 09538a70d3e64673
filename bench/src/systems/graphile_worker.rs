//! graphile-worker by its SQL: add_job(s) of its schema, and the statements that its JavaScript sends to get and finish jobs.

use anyhow::{Result, bail};
use postgres::{Client, Row, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{
    Ability, BATCH_PLACEHOLDER, Claimed, KIND, Package, Session, System, SystemName, Wishes, connect, ids, job_ids, reinstall,
    schema_bytes,
};

const SCHEMA: &str = "graphile_worker";

pub struct GraphileWorker {
    pub package: Package,
}

impl System for GraphileWorker {
    fn name(&self) -> SystemName {
        SystemName::GraphileWorker
    }

    fn contract(&self) -> &'static str {
        "its SQL, without its Node.js runtime: add_jobs, its own batch get and batch complete (finished jobs are deleted); attempts, \
         retries, priorities, schedule, NOTIFY; no fence on completion"
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        (ability == Ability::OneCallCycle).then_some("no call that completes and claims")
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        reinstall(client, SCHEMA, &self.package.read("schema.sql")?)?;
        client.execute("INSERT INTO graphile_worker._private_tasks (identifier) VALUES ($1) ON CONFLICT DO NOTHING", &[&KIND])?;
        Ok(())
    }

    fn create_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn drop_queue(&self, _: &mut Client, _: &str) -> Result<()> {
        Ok(())
    }

    fn connect_with(&self, url: &str, _: &str, _: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        let add = client.prepare("SELECT id FROM graphile_worker.add_job($1::text, $2::json)")?;
        let add_many = client.prepare(
            "SELECT id
               FROM graphile_worker.add_jobs(ARRAY(
                        SELECT json_populate_record(NULL::graphile_worker.job_spec,
                                                    json_build_object('identifier', $1::text, 'payload', payload))
                          FROM unnest($2::json[]) AS payload))",
        )?;
        let complete = client.prepare(&self.package.read("complete.sql")?)?;
        let complete_many = client.prepare(&self.package.read("complete_many.sql")?)?;
        let sql = "SELECT id FROM graphile_worker._private_tasks WHERE identifier = $1";
        let task: i32 = client.query_one(sql, &[&KIND])?.try_get(0)?;
        let worker = format!("bench-{:?}", std::thread::current().id());
        let claim_text = self.package.read("claim.sql")?;
        Ok(Box::new(GraphileSession {
            client,
            worker,
            tasks: vec![task],
            add,
            add_many,
            claim_text,
            claim: None,
            complete,
            complete_many,
        }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, SCHEMA)
    }

    fn hot_table(&self, _: &mut Client, _: &str) -> Result<String> {
        Ok("graphile_worker._private_jobs".to_owned())
    }

    fn bulk_statement(&self) -> Result<String> {
        Ok(r#"SELECT count(*)
                FROM graphile_worker.add_jobs(ARRAY(
                         SELECT json_populate_record(
                                    NULL::graphile_worker.job_spec,
                                    json_build_object(
                                        'identifier', $2::text,
                                        'payload', format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                                          '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::json,
                                        'run_at', CASE WHEN $4::boolean
                                                       THEN now() + '1 hour' + random() * '1 hour'::interval END))
                           FROM generate_series(1, $3::integer) AS n
                          WHERE $1::text IS NOT NULL))"#
            .to_owned())
    }

    fn left(&self, client: &mut Client, _: &str) -> Result<Vec<i64>> {
        ids(&client.query("SELECT id FROM graphile_worker._private_jobs", &[])?)
    }

    fn completed(&self, _: &mut Client, _: &str) -> Result<Option<i64>> {
        Ok(None)
    }
}

struct GraphileSession {
    client: Client,
    worker: String,
    tasks: Vec<i32>,
    add: Statement,
    add_many: Statement,
    claim_text: String,
    /// The size of a batch is part of the text.
    claim: Option<(i32, Statement)>,
    complete: Statement,
    complete_many: Statement,
}

impl Session for GraphileSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let rows = if let [job] = jobs {
            self.client.query(&self.add, &[&KIND, job])?
        } else {
            self.client.query(&self.add_many, &[&KIND, &jobs])?
        };
        ids(&rows)
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        let statement = match &self.claim {
            Some((size, statement)) if *size == batch_size => statement.clone(),
            _ => {
                let text = self.claim_text.replace(BATCH_PLACEHOLDER, &batch_size.to_string());
                let statement = self.client.prepare(&text)?;
                self.claim = Some((batch_size, statement.clone()));
                statement
            }
        };
        let rows = self.client.query(&statement, &[&self.worker, &self.tasks])?;
        rows.iter().map(claimed).collect()
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        let deleted = if let [job] = jobs {
            self.client.execute(&self.complete, &[&job.job_id])?
        } else {
            self.client.execute(&self.complete_many, &[&job_ids(jobs)])?
        };
        if deleted != jobs.len() as u64 {
            bail!("{deleted} of {} completions found their row", jobs.len());
        }
        Ok(job_ids(jobs))
    }
}

fn claimed(row: &Row) -> Result<Claimed> {
    let PayloadBytes(size) = row.try_get("payload")?;
    if size == 0 {
        bail!("a job came without its payload");
    }
    let attempts: i16 = row.try_get("attempts")?;
    Ok(Claimed { job_id: row.try_get("id")?, lease: i64::from(attempts) })
}
