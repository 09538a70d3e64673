//! Operator: how maintenance is going, what is wrong, numbers for a monitoring system. Read only, but for the wake.

use awa_protocol::schedule::State;
use pgrx::pg_sys::Datum;

use crate::error::Result;
use crate::frontier::{Frontier, require_preloading};
use crate::ops::doctor::{self, Check};
use crate::ops::metrics::{self, Metric};
use crate::ops::tasks::Task;
use crate::pg::call::{Call, Ret, Rows, bytes_datum, interval_datum, jsonb_datum, text_datum};
use crate::pg::xact;
use crate::sql_function;
use crate::store::datum;
use crate::worker::shared::{self, Line, Place};
use crate::worker::{health, numbers};

sql_function!(awa_announce, 0, announce);
sql_function!(awa_wake_maintenance, 0, wake_maintenance);
sql_function!(awa_maintenance_stats, 0, maintenance_stats);
sql_function!(awa_doctor, 0, run_doctor);
sql_function!(awa_metrics, 0, run_metrics);

/// Last statement of the installation script. Says nothing when the library is not preloaded: the first verb does.
fn announce(_call: &mut Call<'_>) -> Result<Ret> {
    shared::announce_at_commit();
    Ok(Ret::Void)
}

fn wake_maintenance(_call: &mut Call<'_>) -> Result<Ret> {
    require_preloading()?;
    Ok(Ret::bool(shared::workers().is_some_and(|workers| shared::wake(workers, xact::database_oid()))))
}

fn seen() -> Option<Box<Place>> {
    shared::workers().and_then(|workers| workers.seen(xact::database_oid()))
}

fn maintenance_stats(call: &mut Call<'_>) -> Result<Ret> {
    require_preloading()?;
    let place = seen();
    let runs = place.as_ref().is_some_and(|place| place.pid != 0);
    let mut rows = call.rows()?;
    for (index, task) in Task::ALL.into_iter().enumerate() {
        let stat = place.as_ref().and_then(|place| place.tasks.get(index));
        let time = |at: i64| (at != 0).then(|| datum::i64(at));
        let words = |line: &Line| (!line.is_empty()).then(|| text_datum(line));
        rows.put(&[
            Some(text_datum(task.name())),
            Some(text_datum(stat.map_or(State::Idle, |stat| stat.state).name())),
            Some(datum::i64(stat.map_or(0, |stat| stat.runs as i64))),
            Some(datum::i64(stat.map_or(0, |stat| stat.rows as i64))),
            Some(datum::i64(stat.map_or(0, |stat| stat.errors as i64))),
            stat.and_then(|stat| time(stat.last_run)),
            stat.filter(|stat| stat.last_run != 0).map(|stat| interval_datum(stat.last_duration)),
            stat.filter(|_| runs).and_then(|stat| time(stat.next_due)),
            stat.filter(|stat| !stat.outcome.is_empty()).map(|stat| text_datum(&stat.outcome)),
            stat.and_then(|stat| words(&stat.detail)),
            stat.and_then(|stat| words(&stat.error)),
        ])?;
    }
    Ok(Ret::Rows)
}

fn run_doctor(call: &mut Call<'_>) -> Result<Ret> {
    let mut checks: Vec<Check> = Vec::new();
    doctor::server(&mut checks);
    health::checks(seen().as_deref(), &mut checks);
    doctor::engine(&mut checks);
    let mut rows = call.rows()?;
    for check in checks {
        rows.put(&[
            Some(text_datum(check.name)),
            Some(text_datum(check.status)),
            Some(text_datum(&check.detail)),
            (!check.hint.is_empty()).then(|| text_datum(&check.hint)),
        ])?;
    }
    Ok(Ret::Rows)
}

fn put_metric(rows: &mut Rows<'_>, metric: &Metric<'_>) -> Result<()> {
    let mut json = vec![b'{'];
    for (name, value) in metric.labels {
        if json.len() > 1 {
            json.push(b',');
        }
        quote(&mut json, name.as_bytes());
        json.push(b':');
        quote(&mut json, value);
    }
    json.push(b'}');
    let value: Datum = datum::f64(metric.value);
    rows.put(&[Some(bytes_datum(metric.name.as_bytes())), Some(jsonb_datum(json)), Some(value)])
}

/// A JSON string of bytes in the server's encoding, whose ASCII bytes are what they look like.
fn quote(json: &mut Vec<u8>, text: &[u8]) {
    json.push(b'"');
    for byte in text {
        match byte {
            b'"' | b'\\' => json.extend([b'\\', *byte]),
            0..=0x1f => json.extend(format!("\\u{byte:04x}").bytes()),
            _ => json.push(*byte),
        }
    }
    json.push(b'"');
}

fn run_metrics(call: &mut Call<'_>) -> Result<Ret> {
    require_preloading()?;
    let mut rows = call.rows()?;
    let mut put = |metric: &Metric<'_>| put_metric(&mut rows, metric);
    if let Some(frontier) = Frontier::attach_if_built()? {
        metrics::engine(&frontier, &mut put)?;
    }
    numbers::maintenance(seen().as_deref(), &mut put)?;
    Ok(Ret::Rows)
}
