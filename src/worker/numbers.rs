//! What the maintainer of a database has done, as numbers. From shared memory only.

use awa_protocol::schedule::State;

use super::shared::{Place, Standing};
use crate::error::Result;
use crate::ops::metrics::{Metric, Put};
use crate::ops::tasks::Task;
use crate::pg::xact;

pub fn maintenance(place: Option<&Place>, put: Put<'_>) -> Result<()> {
    let works = place.is_some_and(|place| place.pid != 0 && place.standing == Standing::Working);
    put(&Metric { name: "awa_maintainer_works", labels: &[], value: f64::from(u8::from(works)) })?;
    let Some(place) = place else { return Ok(()) };
    put(&Metric { name: "awa_maintainer_starts_total", labels: &[], value: place.starts as f64 })?;
    for (stat, task) in place.tasks.iter().zip(Task::ALL) {
        let since = if stat.last_run == 0 { -1.0 } else { (xact::now() - stat.last_run) as f64 / 1e6 };
        let values: [(&str, f64); 6] = [
            ("awa_task_runs_total", stat.runs as f64),
            ("awa_task_rows_total", stat.rows as f64),
            ("awa_task_errors_total", stat.errors as f64),
            ("awa_task_last_duration_seconds", stat.last_duration as f64 / 1e6),
            ("awa_task_failing", f64::from(u8::from(stat.state == State::Failing))),
            ("awa_task_idle_seconds", since),
        ];
        for (name, value) in values {
            put(&Metric { name, labels: &[("task", task.name().as_bytes())], value })?;
        }
    }
    Ok(())
}
