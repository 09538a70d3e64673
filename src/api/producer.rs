//! Producer: enqueue by function, INSERT and COPY.

use pgrx::pg_sys;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result, reserve};
use crate::frontier::Frontier;
use crate::ops::enqueue::{self, NewJob};
use crate::ops::handle::{self, Queue};
use crate::ops::validate;
use crate::pg::call::{Call, Ret, bytes_of, i64_array_datum};
use crate::pg::{rel, xact};
use crate::sql_function;
use crate::store::kinds;

sql_function!(awa_enqueue, 8, enqueue);
sql_function!(awa_enqueue_many, 8, enqueue_many);
sql_function!(awa_jobs_insert, 0, jobs_insert);

/// What all jobs of a call have in common.
struct Common {
    queue: Queue,
    kind_id: i32,
    max_attempts: i16,
    tags: Option<Datum>,
    metadata: Option<Datum>,
}

fn common(
    frontier: &Frontier,
    queue: Option<Vec<u8>>,
    kind: Option<Vec<u8>>,
    max_attempts: Option<i32>,
    tags: Option<Datum>,
    metadata: Option<Datum>,
) -> Result<Common> {
    let queue = handle::resolve(frontier, &validate::not_null(queue, "queue")?)?;
    let kind = validate::not_null(kind, "kind")?;
    validate::tags(tags)?;
    if let Some(metadata) = metadata {
        validate::payload(metadata, "metadata")?;
    }
    let max_attempts = match max_attempts {
        Some(value) => validate::max_attempts(value)?,
        None => queue.settings(frontier).max_attempts as i16,
    };
    Ok(Common { queue, kind_id: kinds::number(frontier, &kind)?, max_attempts, tags, metadata })
}

fn job(common: &Common, args: Datum, priority: i32, run_at: Option<i64>) -> Result<NewJob> {
    validate::payload(args, "args")?;
    Ok(NewJob {
        kind_id: common.kind_id,
        priority: validate::priority(priority)?,
        run_at: validate::run_at(run_at)?,
        max_attempts: common.max_attempts,
        tags: common.tags,
        metadata: common.metadata,
        args,
    })
}

fn enqueue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.enqueue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let common = common(frontier, call.bytes(0), call.bytes(1), call.i32(5), call.datum(6), call.datum(7))?;
        let args = validate::not_null(call.datum(2), "args")?;
        let priority = validate::not_null(call.i32(3), "priority")?;
        let new = job(&common, args, priority, call.timestamptz(4))?;
        let ids = enqueue::enqueue(frontier, common.queue, &[new])?;
        Ok(ids.first().map_or(Ret::Null, |id| Ret::i64(*id)))
    })
}

fn enqueue_many(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.enqueue_many()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let common = common(frontier, call.bytes(0), call.bytes(1), call.i32(5), call.datum(6), call.datum(7))?;
        let args = validate::not_null(call.array_datums(2, pg_sys::JSONBOID)?, "args")?;
        validate::batch_length(args.len())?;
        let priorities = call.array_i32(3)?;
        let run_ats = call.array_timestamptz(4)?;
        if let Some(priorities) = &priorities {
            validate::same_length("priorities", priorities.len(), "args", args.len())?;
        }
        if let Some(run_ats) = &run_ats {
            validate::same_length("run_ats", run_ats.len(), "args", args.len())?;
        }
        let mut jobs = Vec::new();
        reserve(&mut jobs, args.len())?;
        for (index, args) in args.iter().enumerate() {
            let element = |error: Error| error.hint(format!("See element {} of the arrays.", index + 1));
            let args = validate::not_null(*args, "an element of args").map_err(element)?;
            let priority = match &priorities {
                Some(all) => {
                    validate::not_null(all.get(index).copied().flatten(), "an element of priorities").map_err(element)?
                }
                None => 2,
            };
            let run_at = run_ats.as_ref().and_then(|all| all.get(index).copied().flatten());
            jobs.push(job(&common, args, priority, run_at).map_err(element)?);
        }
        let ids = enqueue::enqueue(frontier, common.queue, &jobs)?;
        Ok(Ret::Datum(i64_array_datum(&ids)))
    })
}

/// INSERT and COPY into awa.jobs. Columns that a job receives from the queue must be left out.
fn jobs_insert(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("INSERT INTO awa.jobs")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let row = call.trigger_row()?;
        if Some(row.relation_oid()) != rel::relation_oid("awa", "jobs") {
            return Err(Error::new(
                pgrx::PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "function awa.jobs_insert() is the trigger of the view awa.jobs only",
            ));
        }
        for column in
            ["state", "attempt", "enqueued_at", "claimed_at", "deadline_at", "heartbeat_at", "finished_at", "errors", "job_id"]
        {
            if row.get(column)?.is_some() {
                return Err(Error::new(
                    pgrx::PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                    format!("column \"{column}\" of awa.jobs cannot be set"),
                )
                .hint("Give queue, kind, args, priority, run_at, max_attempts, tags and metadata only."));
            }
        }
        let number = |name: &str| -> Result<Option<i32>> { Ok(row.get(name)?.map(|datum| datum.value() as i32)) };
        let common = common(
            frontier,
            row.get("queue")?.map(bytes_of),
            row.get("kind")?.map(bytes_of),
            number("max_attempts")?,
            row.get("tags")?,
            row.get("metadata")?,
        )?;
        let args = validate::not_null(row.get("args")?, "args")?;
        let run_at = row.get("run_at")?.map(|datum| datum.value() as i64);
        let new = job(&common, args, number("priority")?.unwrap_or(2), run_at)?;
        let ids = enqueue::enqueue(frontier, common.queue, &[new])?;
        let id = ids.first().map(|id| crate::store::datum::i64(*id));
        row.result_with(&[("job_id", id)])
    })
}
