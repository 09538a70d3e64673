//! Operator: queues, cancel, verify and rebuild.

use pgrx::PgSqlErrorCode as Code;

use crate::error::{Error, Result};
use crate::frontier::Frontier;
use crate::ops::queues::{self, Wishes};
use crate::ops::retry::{self, Changes};
use crate::ops::{adopt, cancel, delete, dlq, handle, validate, verify};
use crate::pg::call::{Call, Ret, datum_size};
use crate::pg::xact;
use crate::sql_function;
use crate::store::finished::Filter;
use crate::worker::shared;

sql_function!(awa_create_queue, 13, create_queue);
sql_function!(awa_alter_queue, 13, alter_queue);
sql_function!(awa_drop_queue, 2, drop_queue);
sql_function!(awa_pause_queue, 1, pause_queue);
sql_function!(awa_resume_queue, 1, resume_queue);
sql_function!(awa_cancel, 2, cancel);
sql_function!(awa_retry, 4, retry);
sql_function!(awa_delete_job, 1, delete_job);
sql_function!(awa_dlq_retry, 4, dlq_retry);
sql_function!(awa_dlq_retry_many, 7, dlq_retry_many);
sql_function!(awa_dlq_purge, 4, dlq_purge);
sql_function!(awa_verify, 0, verify);
sql_function!(awa_rebuild, 0, rebuild);
sql_function!(awa_adopt, 0, adopt);
sql_function!(awa_pre_restore, 0, pre_restore);
sql_function!(awa_post_restore, 0, post_restore);

fn queue_name(call: &Call<'_>) -> Result<Vec<u8>> {
    validate::not_null(call.bytes(0), "queue")
}

fn wishes(call: &Call<'_>) -> Result<Wishes> {
    // An empty jsonb container is eight bytes.
    if call.datum(12).is_some_and(|options| datum_size(options) > 8) {
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, "unknown option of a queue")
            .hint("This version knows no further options: leave the argument out."));
    }
    Ok(Wishes {
        max_attempts: call.i32(1),
        deadline: call.interval_us(2),
        heartbeat_timeout: call.interval_us(3),
        backoff: call.interval_us(4),
        backoff_max: call.interval_us(5),
        priority_ageing: call.interval_us(6),
        completed_retention: call.interval_us(7),
        failed_retention: call.interval_us(8),
        cancelled_retention: call.interval_us(9),
        dead_letters: call.bool(10),
        dead_letter_retention: call.interval_us(11),
    })
}

fn create_queue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.create_queue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        queues::create(frontier, &queue_name(call)?, &wishes(call)?)?;
        shared::announce_at_commit();
        Ok(Ret::Void)
    })
}

fn alter_queue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.alter_queue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        queues::alter(frontier, &queue_name(call)?, &wishes(call)?)?;
        Ok(Ret::Void)
    })
}

fn drop_queue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.drop_queue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        queues::drop(frontier, &queue_name(call)?, validate::not_null(call.bool(1), "force")?)?;
        Ok(Ret::Void)
    })
}

fn pause_queue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.pause_queue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        queues::set_paused(frontier, &queue_name(call)?, true)?;
        Ok(Ret::Void)
    })
}

fn resume_queue(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.resume_queue()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        queues::set_paused(frontier, &queue_name(call)?, false)?;
        Ok(Ret::Void)
    })
}

fn cancel(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.cancel()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let job_id = validate::not_null(call.i64(0), "job_id")?;
        let outcome = cancel::cancel(frontier, job_id, call.bytes(1).as_deref())?;
        Ok(Ret::text(outcome.name()))
    })
}

/// What a retried job gets that it did not have.
fn changes(frontier: &Frontier, queue: Option<Vec<u8>>, priority: Option<i32>, run_at: Option<i64>) -> Result<Changes> {
    Ok(Changes {
        queue: queue.map(|name| handle::resolve(frontier, &name)).transpose()?,
        priority: priority.map(validate::priority).transpose()?,
        run_at: validate::run_at(run_at)?,
    })
}

fn retry(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.retry()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let job_id = validate::not_null(call.i64(0), "job_id")?;
        let changes = changes(frontier, call.bytes(1), call.i32(2), call.timestamptz(3))?;
        Ok(Ret::text(retry::retry(frontier, job_id, &changes)?.name()))
    })
}

fn delete_job(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.delete_job()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let job_id = validate::not_null(call.i64(0), "job_id")?;
        Ok(Ret::text(delete::delete(frontier, job_id)?.name()))
    })
}

fn dlq_retry(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.dlq_retry()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let job_id = validate::not_null(call.i64(0), "job_id")?;
        let changes = changes(frontier, call.bytes(1), call.i32(2), call.timestamptz(3))?;
        Ok(Ret::text(dlq::retry_one(frontier, job_id, &changes)?.name()))
    })
}

fn filter(call: &Call<'_>) -> Filter {
    Filter { queue: call.bytes(0), kind: call.bytes(1), failed_before: call.timestamptz(2) }
}

fn dlq_retry_many(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.dlq_retry_many()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let max_jobs = validate::max_jobs(call.i32(3))?;
        let changes = changes(frontier, call.bytes(4), call.i32(5), call.timestamptz(6))?;
        Ok(Ret::i64(dlq::retry_many(frontier, &filter(call), max_jobs, &changes)? as i64))
    })
}

fn dlq_purge(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.dlq_purge()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let max_jobs = validate::max_jobs(call.i32(3))?;
        Ok(Ret::i64(dlq::purge(frontier, &filter(call), max_jobs)? as i64))
    })
}

fn verify(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let mut rows = call.rows()?;
    verify::verify(&frontier, &mut rows)?;
    Ok(Ret::Rows)
}

fn adopt(_call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.adopt()")?;
    shared::announce_at_commit();
    Ok(Ret::bool(adopt::adopt()?))
}

fn pre_restore(_call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.pre_restore()")?;
    adopt::pre_restore()?;
    Ok(Ret::Void)
}

fn post_restore(_call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.post_restore()")?;
    Ok(Ret::bool(adopt::post_restore()?))
}

fn rebuild(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.rebuild()")?;
    let frontier = Frontier::attach(call)?;
    Ok(Ret::i64(verify::rebuild(&frontier)?))
}
