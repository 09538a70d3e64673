//! One worker of the demo: claims 16 jobs, does each in a transaction of its own, and one of the workers is killed.

use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use postgres::error::SqlState;
use postgres::{Client, NoTls, Statement, Transaction};

use super::Shared;
use super::inputs::digest;

const CLAIM_BATCH: i32 = 16;
/// The worker whose session is killed.
const VICTIM: usize = 3;
/// It is killed with at least this many claimed jobs unfinished.
const VICTIM_HOLDS_MIN: usize = 8;

/// One attempt that this worker may finish: the lease is the right to do it.
#[derive(Clone, Debug)]
pub struct Held {
    pub job_id: i64,
    pub run_lease: i64,
    pub path: String,
    pub attempt: i32,
}

struct Session {
    client: Client,
    claim: Statement,
    insert: Statement,
    complete: Statement,
    fail: Statement,
}

impl Session {
    fn open(shared: &Shared) -> Result<Self> {
        let mut client = shared.config.connect(NoTls)?;
        Ok(Self {
            claim: client.prepare("SELECT job_id, run_lease, args->>'path', attempt FROM awa.claim('files', $1)")?,
            insert: client.prepare("INSERT INTO demo_files VALUES ($1, $2, $3, $4, $5, $6, $7)")?,
            complete: client.prepare("SELECT awa.complete($1, $2)")?,
            fail: client.prepare("SELECT awa.fail($1, $2, $3)")?,
            client,
        })
    }

    fn claim(&mut self) -> Result<Vec<Held>> {
        let rows = self.client.query(&self.claim, &[&CLAIM_BATCH]).context("claim")?;
        rows.iter()
            .map(|row| {
                Ok(Held { job_id: row.try_get(0)?, run_lease: row.try_get(1)?, path: row.try_get(2)?, attempt: row.try_get(3)? })
            })
            .collect()
    }
}

enum Done {
    Completed,
    Retry,
    Dead,
}

pub fn run(shared: &Shared, number: usize) -> Result<()> {
    let mut session = Session::open(shared)?;
    while !shared.is_over() {
        let jobs = session.claim()?;
        if jobs.is_empty() {
            session.client.batch_execute("CALL awa.wait('files', '100 milliseconds')").context("wait")?;
            continue;
        }
        let dies = number == VICTIM && jobs.len() > VICTIM_HOLDS_MIN && is_time_to_kill(shared);
        let kill_at = dies.then(|| jobs.len() - VICTIM_HOLDS_MIN);
        for (index, held) in jobs.iter().enumerate() {
            if kill_at == Some(index) {
                let rest = jobs.get(index..).unwrap_or_default();
                session = die(shared, session, number, rest)?;
                break;
            }
            process(shared, &mut session, number, held)?;
        }
    }
    Ok(())
}

fn is_time_to_kill(shared: &Shared) -> bool {
    !shared.victim_killed.load(Ordering::Relaxed) && shared.completed.load(Ordering::Relaxed) >= shared.expected / 3
}

fn process(shared: &Shared, session: &mut Session, number: usize, held: &Held) -> Result<()> {
    let Session { client, insert, complete, fail, .. } = session;
    let mut transaction = client.transaction()?;
    let done = match attempt(&mut transaction, (insert, complete, fail), number, held) {
        // Too slow: the attempt was given to another worker, and what this one has written goes with the transaction.
        Err(error) if is_stale(&error) => return Ok(()),
        done => done.with_context(|| format!("job {}", held.job_id))?,
    };
    transaction.commit()?;
    match done {
        Done::Completed => shared.completed.fetch_add(1, Ordering::AcqRel),
        Done::Retry => shared.retries.fetch_add(1, Ordering::Relaxed),
        Done::Dead => shared.dead.fetch_add(1, Ordering::AcqRel),
    };
    Ok(())
}

fn is_stale(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code);
    code == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
}

/// The business of a job: everything here commits, or rolls back, together.
fn attempt(
    transaction: &mut Transaction<'_>,
    (insert, complete, fail): (&Statement, &Statement, &Statement),
    number: usize,
    held: &Held,
) -> Result<Done> {
    match digest(Path::new(&held.path)) {
        Ok(found) => {
            let worker = i32::try_from(number)?;
            transaction.execute(
                insert,
                &[&held.job_id, &held.path, &found.bytes, &found.lines, &found.sha256, &worker, &held.attempt],
            )?;
            let result: String = transaction.query_one(complete, &[&held.job_id, &held.run_lease])?.try_get(0)?;
            match result.as_str() {
                "completed" => Ok(Done::Completed),
                other => bail!("complete answered {other}"),
            }
        }
        Err(error) => {
            let result: String = transaction.query_one(fail, &[&held.job_id, &held.run_lease, &error.to_string()])?.try_get(0)?;
            match result.as_str() {
                "retry" => Ok(Done::Retry),
                "failed" => Ok(Done::Dead),
                other => bail!("fail answered {other}"),
            }
        }
    }
}

/// Terminates the session of this worker in the middle of a transaction that has finished a job. It forgets what it had claimed, as a
/// process does that dies, and goes on in a new session.
fn die(shared: &Shared, mut session: Session, number: usize, rest: &[Held]) -> Result<Session> {
    let Some(first) = rest.first() else { return Ok(session) };
    let pid: i32 = session.client.query_one("SELECT pg_backend_pid()", &[])?.try_get(0)?;
    let Session { client, insert, complete, fail, .. } = &mut session;
    let mut transaction = client.transaction()?;
    attempt(&mut transaction, (insert, complete, fail), number, first)?;
    let gone: bool = shared.config.connect(NoTls)?.query_one("SELECT pg_terminate_backend($1, 10000)", &[&pid])?.try_get(0)?;
    if !gone {
        bail!("the session of worker {number} did not end");
    }
    if transaction.commit().is_ok() {
        bail!("the commit of a terminated session succeeded");
    }
    println!(
        "worker {number}: its session was terminated inside a transaction, {} claimed jobs unfinished; their attempts end when their \
         deadline of 5 seconds has passed, and other workers get the jobs",
        rest.len()
    );
    shared.victim_killed.store(true, Ordering::Relaxed);
    Session::open(shared)
}
