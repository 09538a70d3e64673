//! Operator: the tasks of maintenance, one step a call.

use awa_protocol::overdue::Overdue;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::Frontier;
use crate::ops::tasks::{self, Outcome, Task};
use crate::ops::{carry, deferred, prune, rescue, retention, rotate, validate};
use crate::pg::call::{Call, Ret, interval_datum, text_datum};
use crate::pg::xact;
use crate::sql_function;
use crate::store::datum;

sql_function!(awa_rescue_expired_deadlines, 0, rescue_expired_deadlines);
sql_function!(awa_rescue_stale_heartbeats, 0, rescue_stale_heartbeats);
sql_function!(awa_promote_deferred, 0, promote_deferred);
sql_function!(awa_rotate, 0, rotate);
sql_function!(awa_carry_forward, 1, carry_forward);
sql_function!(awa_prune, 0, prune);
sql_function!(awa_add_segments, 1, add_segments);
sql_function!(awa_retention, 0, retention);
sql_function!(awa_run_maintenance, 1, run_maintenance);

/// Runs a step and puts what it did into a row of type awa.task_outcome.
fn step(call: &mut Call<'_>, verb: &str, step: impl Fn(&Frontier) -> Result<Outcome>) -> Result<Ret> {
    xact::require_writable(verb)?;
    let call = &*call;
    let begun = xact::now();
    Frontier::with(call, |frontier| {
        let outcome = step(frontier)?;
        let mut rows = call.rows()?;
        let columns: [Option<Datum>; 6] = [
            Some(text_datum(outcome.outcome)),
            Some(datum::i64(outcome.rows)),
            outcome.generation.map(datum::i64),
            outcome.slot.map(datum::i32),
            outcome.detail.as_deref().map(text_datum),
            Some(interval_datum(xact::now().saturating_sub(begun))),
        ];
        rows.put(&columns)?;
        Ok(Ret::Rows)
    })
}

fn rescue_expired_deadlines(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.rescue_expired_deadlines()", |frontier| rescue::rescue(frontier, Overdue::Deadline))
}

fn rescue_stale_heartbeats(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.rescue_stale_heartbeats()", |frontier| rescue::rescue(frontier, Overdue::Heartbeat))
}

fn rotate(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.rotate()", rotate::rotate)
}

fn promote_deferred(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.promote_deferred()", deferred::promote)
}

fn carry_forward(call: &mut Call<'_>) -> Result<Ret> {
    let generation = call.i64(0);
    step(call, "awa.carry_forward()", |frontier| match generation {
        Some(generation) => carry::carry_segment(frontier, generation),
        None => carry::carry_forward(frontier),
    })
}

fn prune(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.prune()", prune::prune)
}

fn add_segments(call: &mut Call<'_>) -> Result<Ret> {
    xact::require_writable("awa.add_segments()")?;
    let call = &*call;
    Frontier::with(call, |frontier| {
        let count = validate::not_null(call.i32(0), "count")?;
        Ok(Ret::i32(rotate::add_segments(frontier, count)?))
    })
}

fn retention(call: &mut Call<'_>) -> Result<Ret> {
    step(call, "awa.retention()", retention::expire)
}

fn run_maintenance(call: &mut Call<'_>) -> Result<Ret> {
    let name = String::from_utf8_lossy(&validate::not_null(call.bytes(0), "task")?).into_owned();
    let Some(task) = Task::from_name(&name) else {
        let known: Vec<&str> = Task::ALL.iter().map(|task| task.name()).collect();
        return Err(Error::new(Code::ERRCODE_INVALID_PARAMETER_VALUE, format!("there is no task \"{name}\""))
            .hint(format!("Tasks are {}.", known.join(", "))));
    };
    step(call, "awa.run_maintenance()", |frontier| tasks::run(frontier, task))
}
