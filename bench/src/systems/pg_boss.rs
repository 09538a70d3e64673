//! pg-boss by the statements that its JavaScript builds: insert, fetch and complete.

use std::error::Error;

use anyhow::{Result, bail};
use bytes::{BufMut, BytesMut};
use postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use postgres::{Client, Row, Statement};

use crate::payload::{Payload, PayloadBytes};
use crate::systems::{
    Ability, BATCH_PLACEHOLDER, Claimed, Package, Session, System, SystemName, Wishes, connect, reinstall, schema_bytes,
};

const SCHEMA: &str = "pgboss";
const QUEUE_PLACEHOLDER: &str = "bench_queue_name";

pub struct PgBoss {
    pub package: Package,
}

impl PgBoss {
    fn statement(&self, name: &str, queue: &str) -> Result<String> {
        Ok(self.package.read(&format!("{name}.sql"))?.replace(QUEUE_PLACEHOLDER, queue))
    }
}

impl System for PgBoss {
    fn name(&self) -> SystemName {
        SystemName::PgBoss
    }

    fn contract(&self) -> &'static str {
        "its SQL, without its Node.js runtime (whose workers poll every half second): batch insert, fetch and complete (finished jobs \
         are kept); retries, expiry, priorities, schedule, dead letters, dependencies; no fence by default"
    }

    fn lacks(&self, ability: Ability) -> Option<&'static str> {
        (ability == Ability::OneCallCycle).then_some("no call that completes and claims")
    }

    fn reset(&self, client: &mut Client) -> Result<()> {
        reinstall(client, SCHEMA, &self.package.read("schema.sql")?)
    }

    fn create_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        Ok(client.batch_execute(&self.statement("create_queue", queue)?)?)
    }

    fn drop_queue(&self, client: &mut Client, queue: &str) -> Result<()> {
        client.execute("SELECT pgboss.delete_queue($1::text)", &[&queue])?;
        Ok(())
    }

    fn connect_with(&self, url: &str, queue: &str, _: Wishes) -> Result<Box<dyn Session>> {
        let mut client = connect(url)?;
        // Its client sends unnamed statements, which are planned at each call. A plan made while the table was empty would stay.
        client.batch_execute("SET plan_cache_mode = force_custom_plan")?;
        let enqueue = client.prepare(&self.statement("enqueue", queue)?)?;
        let complete = client.prepare(&self.statement("complete", queue)?)?;
        let claim = client.prepare(&self.statement("claim", queue)?.replace(BATCH_PLACEHOLDER, "$1::integer"))?;
        Ok(Box::new(PgBossSession { client, queue: queue.to_owned(), enqueue, claim, complete }))
    }

    fn bytes(&self, client: &mut Client) -> Result<i64> {
        schema_bytes(client, SCHEMA)
    }

    fn hot_table(&self, _: &mut Client, _: &str) -> Result<String> {
        Ok("pgboss.job".to_owned())
    }

    fn bulk_statement(&self) -> Result<String> {
        let jobs = r#"(SELECT json_agg(json_build_object(
                                  'data', format('{"n": "%s", "to": "someone@example.org", "template": "welcome", '
                                                 '"locale": "en", "try": true}', lpad(n::text, 16, '0'))::json,
                                  'startAfter', CASE WHEN $4::boolean THEN (3600 + random() * 3600)::integer::text END))
                         FROM generate_series(1, $3::integer) AS n
                        WHERE $2::text IS NOT NULL)"#;
        let text = self.package.read("enqueue.sql")?;
        Ok(text.replace("$1", jobs).replace(&format!("'{QUEUE_PLACEHOLDER}'"), "$1::text"))
    }

    fn left(&self, client: &mut Client, queue: &str) -> Result<Vec<i64>> {
        let rows = client.query("SELECT id FROM pgboss.job WHERE name = $1 AND state < 'completed'", &[&queue])?;
        rows.iter().map(|row| Ok(row.try_get::<_, Uuid>(0)?.split().0)).collect()
    }

    fn completed(&self, client: &mut Client, queue: &str) -> Result<Option<i64>> {
        let sql = "SELECT count(*) FROM pgboss.job WHERE name = $1 AND state = 'completed'";
        Ok(Some(client.query_one(sql, &[&queue])?.try_get(0)?))
    }
}

struct PgBossSession {
    client: Client,
    queue: String,
    enqueue: Statement,
    claim: Statement,
    complete: Statement,
}

impl Session for PgBossSession {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn enqueue(&mut self, jobs: &[Payload]) -> Result<Vec<i64>> {
        let jobs: Vec<String> = jobs.iter().map(|job| format!(r#"{{"data":{}}}"#, job.as_str())).collect();
        let rows = self.client.query(&self.enqueue, &[&format!("[{}]", jobs.join(","))])?;
        rows.iter().map(|row| Ok(row.try_get::<_, Uuid>(0)?.split().0)).collect()
    }

    fn claim(&mut self, batch_size: i32) -> Result<Vec<Claimed>> {
        let rows = self.client.query(&self.claim, &[&batch_size])?;
        rows.iter().map(claimed).collect()
    }

    fn complete(&mut self, jobs: &[Claimed]) -> Result<Vec<i64>> {
        let ids: Vec<Uuid> = jobs.iter().map(|job| Uuid::join(job.job_id, job.lease)).collect();
        let output: Option<Payload> = None;
        let row = self.client.query_one(&self.complete, &[&self.queue, &ids, &output])?;
        let done: i64 = row.try_get(0)?;
        if done != jobs.len() as i64 {
            bail!("{done} of {} completions found their row", jobs.len());
        }
        Ok(jobs.iter().map(|job| job.job_id).collect())
    }
}

fn claimed(row: &Row) -> Result<Claimed> {
    let PayloadBytes(size) = row.try_get("data")?;
    if size == 0 {
        bail!("a job came without its payload");
    }
    let (job_id, lease) = row.try_get::<_, Uuid>("id")?.split();
    Ok(Claimed { job_id, lease })
}

/// Both halves identify the job; the first alone does so among the jobs of a run (60 random bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Uuid(u128);

impl Uuid {
    fn split(self) -> (i64, i64) {
        ((self.0 >> 64) as i64, self.0 as i64)
    }

    fn join(high: i64, low: i64) -> Uuid {
        Uuid((u128::from(high as u64) << 64) | u128::from(low as u64))
    }
}

impl ToSql for Uuid {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_u128(self.0);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }

    to_sql_checked!();
}

impl FromSql<'_> for Uuid {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Uuid(u128::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_survives_its_halves() {
        let uuid = Uuid(0xf123_4567_89ab_cdef_8edc_ba98_7654_3210);
        let (high, low) = uuid.split();
        assert_eq!(Uuid::join(high, low), uuid);
    }
}
