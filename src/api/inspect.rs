//! Inspect: read only.

use crate::error::Result;
use crate::frontier::Frontier;
use crate::ops::inspect::{self, Wanted};
use crate::ops::validate;
use crate::pg::call::{Call, Ret};
use crate::sql_function;

sql_function!(awa_version, 0, version);
sql_function!(awa_job, 1, job);
sql_function!(awa_list_jobs, 1, list_jobs);
sql_function!(awa_queue_counts, 1, queue_counts);
sql_function!(awa_queue_stats, 0, queue_stats);
sql_function!(awa_segment_stats, 0, segment_stats);

fn version(_call: &mut Call<'_>) -> Result<Ret> {
    Ok(Ret::text(env!("CARGO_PKG_VERSION")))
}

fn job(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let job_id = validate::not_null(call.i64(0), "job_id")?;
    let mut rows = call.rows()?;
    inspect::jobs(&frontier, Wanted::One(job_id), &mut rows)?;
    Ok(Ret::Rows)
}

fn list_jobs(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let wanted = if call.bool(0) == Some(true) { Wanted::Finished } else { Wanted::Unfinished };
    let mut rows = call.rows()?;
    inspect::jobs(&frontier, wanted, &mut rows)?;
    Ok(Ret::Rows)
}

fn queue_counts(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let name = call.bytes(0);
    let mut rows = call.rows()?;
    inspect::queue_counts(&frontier, name.as_deref(), &mut rows)?;
    Ok(Ret::Rows)
}

fn queue_stats(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let mut rows = call.rows()?;
    inspect::queue_stats(&frontier, &mut rows)?;
    Ok(Ret::Rows)
}

fn segment_stats(call: &mut Call<'_>) -> Result<Ret> {
    let frontier = Frontier::attach(call)?;
    let mut rows = call.rows()?;
    inspect::segment_stats(&frontier, &mut rows)?;
    Ok(Ret::Rows)
}
