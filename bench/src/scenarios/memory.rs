//! Shared memory that the extension asked the server for.

use anyhow::Result;

use crate::Target;
use crate::report::{Measurement, Recorder};
use crate::systems::{SystemName, connect};

pub fn run(target: &Target, recorder: &mut Recorder) -> Result<()> {
    let mut client = connect(&target.url)?;
    let rows =
        client.query("SELECT name, allocated_size FROM pg_shmem_allocations WHERE name ILIKE '%awa%' ORDER BY name", &[])?;
    for row in rows {
        let (name, bytes): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
        let measurement = Measurement::new("memory", name, SystemName::Awa.as_str(), 1);
        recorder.record(measurement.metric("bytes", bytes as f64))?;
    }
    Ok(())
}
