//! Worker: claim, finish, stay alive, wait.

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result, reserve};
use crate::frontier::Frontier;
use crate::ops::claim::{self, Request};
use crate::ops::exits::{self, Answer, Failure};
use crate::ops::handle::{self, Queue};
use crate::ops::{validate, wait};
use crate::pg::call::{Call, Ret, Rows, text_datum};
use crate::pg::xact;
use crate::sql_function;
use crate::store::datum;

sql_function!(awa_claim, 4, claim);
sql_function!(awa_claim_queues, 4, claim_queues);
sql_function!(awa_complete, 2, complete);
sql_function!(awa_complete_many, 2, complete_many);
sql_function!(awa_complete_and_claim, 6, complete_and_claim);
sql_function!(awa_fail, 5, fail);
sql_function!(awa_snooze, 3, snooze);
sql_function!(awa_heartbeat, 2, heartbeat);
sql_function!(awa_heartbeat_many, 2, heartbeat_many);
sql_function!(awa_extend, 3, extend);
sql_function!(awa_wait, 2, wait);

fn named(frontier: &Frontier, name: Vec<u8>) -> Result<(Queue, Vec<u8>)> {
    Ok((handle::resolve(frontier, &name)?, name))
}

fn claim(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.claim()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let queue = named(frontier, validate::not_null(call.bytes(0), "queue")?)?;
        let request = Request::new(call.i32(1), call.interval_us(2), call.interval_us(3))?;
        let mut rows = call.rows()?;
        claim::claim(frontier, &[queue], &request, &mut rows)?;
        Ok(Ret::Rows)
    })
}

fn claim_queues(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.claim()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let names = validate::not_null(call.array_datums(0, pgrx::pg_sys::TEXTOID)?, "queues")?;
        if names.is_empty() {
            return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, "queues must name at least one queue")
                .detail("The array is empty.")
                .hint("Give the names in the order in which they are to be served."));
        }
        let mut queues = Vec::with_capacity(names.len());
        for name in names {
            let name = validate::not_null(name, "an element of queues")?;
            queues.push(named(frontier, crate::pg::call::bytes_of(name))?);
        }
        let request = Request::new(call.i32(1), call.interval_us(2), call.interval_us(3))?;
        let mut rows = call.rows()?;
        claim::claim(frontier, &queues, &request, &mut rows)?;
        Ok(Ret::Rows)
    })
}

/// Two arrays of the same length, without nulls.
fn pairs(call: &Call<'_>) -> Result<Vec<(i64, i64)>> {
    let ids = validate::not_null(call.array_i64(0)?, "job_ids")?;
    let leases = validate::not_null(call.array_i64(1)?, "run_leases")?;
    validate::same_length("job_ids", ids.len(), "run_leases", leases.len())?;
    validate::batch_length(ids.len())?;
    let mut jobs = Vec::new();
    reserve(&mut jobs, ids.len())?;
    for (id, lease) in ids.into_iter().zip(leases) {
        jobs.push((validate::not_null(id, "an element of job_ids")?, validate::not_null(lease, "an element of run_leases")?));
    }
    Ok(jobs)
}

fn ids(call: &Call<'_>) -> Result<(i64, i64)> {
    Ok((validate::not_null(call.i64(0), "job_id")?, validate::not_null(call.i64(1), "run_lease")?))
}

fn put_answers(rows: &mut Rows<'_>, jobs: &[(i64, i64)], answers: impl Iterator<Item = &'static str>) -> Result<()> {
    for ((job_id, lease), answer) in jobs.iter().zip(answers) {
        rows.put(&[Some(datum::i64(*job_id)), Some(datum::i64(*lease)), Some(text_datum(answer))])?;
    }
    Ok(())
}

fn complete(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.complete()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let (job_id, lease) = ids(call)?;
        let answers = exits::complete(frontier, &[(job_id, lease)])?;
        let answer = answers.first().copied().unwrap_or(Answer::Stale).or_raise(job_id, lease)?;
        Ok(Ret::text(answer.name()))
    })
}

fn complete_many(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.complete_many()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let jobs = pairs(call)?;
        let answers = exits::complete(frontier, &jobs)?;
        let mut rows = call.rows()?;
        put_answers(&mut rows, &jobs, answers.into_iter().map(Answer::name))?;
        Ok(Ret::Rows)
    })
}

/// All or nothing: a lease that is not current raises, so that the caller learns of it before new work is handed out.
fn complete_and_claim(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.complete_and_claim()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let jobs = pairs(call)?;
        let queue = named(frontier, validate::not_null(call.bytes(2), "queue")?)?;
        let request = Request::new(call.i32(3), call.interval_us(4), call.interval_us(5))?;
        let mut rows = call.rows()?;
        let answers = exits::complete(frontier, &jobs)?;
        for ((job_id, lease), answer) in jobs.iter().zip(answers) {
            answer.or_raise(*job_id, *lease)?;
        }
        claim::claim(frontier, &[queue], &request, &mut rows)?;
        Ok(Ret::Rows)
    })
}

fn fail(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.fail()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let (job_id, lease) = ids(call)?;
        let retry_after = call.interval_us(3);
        validate::duration(retry_after, "retry_after")?;
        let failure = Failure { error: call.bytes(2), retry_after, is_final: call.bool(4).unwrap_or(false) };
        let answer = exits::fail(frontier, job_id, lease, &failure)?.or_raise(job_id, lease)?;
        Ok(Ret::text(answer.name()))
    })
}

fn snooze(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.snooze()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let (job_id, lease) = ids(call)?;
        let delay = validate::duration(Some(validate::not_null(call.interval_us(2), "delay")?), "delay")?;
        let answer = exits::snooze(frontier, job_id, lease, delay)?.or_raise(job_id, lease)?;
        Ok(Ret::text(answer.name()))
    })
}

fn heartbeat(call: &mut Call<'_>) -> Result<Ret> {
    let call = &*call;
    Frontier::with(call, |frontier| {
        let (job_id, lease) = ids(call)?;
        Ok(Ret::bool(exits::heartbeat(frontier, job_id, lease)?))
    })
}

fn heartbeat_many(call: &mut Call<'_>) -> Result<Ret> {
    let call = &*call;
    Frontier::with(call, |frontier| {
        let jobs = pairs(call)?;
        let mut answers: Vec<&'static str> = Vec::new();
        reserve(&mut answers, jobs.len())?;
        for (job_id, lease) in &jobs {
            answers.push(if exits::heartbeat(frontier, *job_id, *lease)? { "alive" } else { "stale" });
        }
        let mut rows = call.rows()?;
        put_answers(&mut rows, &jobs, answers.into_iter())?;
        Ok(Ret::Rows)
    })
}

fn extend(call: &mut Call<'_>) -> Result<Ret> {
    let call = &*call;
    Frontier::with(call, |frontier| {
        let (job_id, lease) = ids(call)?;
        let by = validate::duration(Some(validate::not_null(call.interval_us(2), "by")?), "by")?;
        match exits::extend(frontier, job_id, lease, by)? {
            Some(deadline) => Ok(Ret::i64(deadline)),
            None => Answer::Stale.or_raise(job_id, lease).map(|_| Ret::Null),
        }
    })
}

fn wait(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let queue = validate::not_null(call.bytes(0), "queue")?;
    let timeout = validate::duration(Some(validate::not_null(call.interval_us(1), "timeout")?), "timeout")?;
    wait::wait(&frontier, call, &queue, timeout)?;
    Ok(Ret::Void)
}
