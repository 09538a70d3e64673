//! Points of the server library (`src/pg/points.rs`), for tests: arm them, wait until somebody is there, let him go on.
//!
//! Their SQL functions are no part of the extension: a test makes them in its own database, with `create`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use postgres::{Client, GenericClient};

const FUNCTIONS: &str = "
CREATE SCHEMA awa_points;
CREATE FUNCTION awa_points.arm(name text, action text, skip integer DEFAULT 0, only_pid integer DEFAULT 0) RETURNS void
    STRICT LANGUAGE c AS '$libdir/awa_queue', 'awa_points_arm';
CREATE FUNCTION awa_points.release(name text) RETURNS boolean
    STRICT LANGUAGE c AS '$libdir/awa_queue', 'awa_points_release';
CREATE FUNCTION awa_points.disarm_all() RETURNS void
    LANGUAGE c AS '$libdir/awa_queue', 'awa_points_disarm_all';
CREATE FUNCTION awa_points.reached() RETURNS TABLE (name text, action text, hits bigint, waiting_pid integer)
    LANGUAGE c AS '$libdir/awa_queue', 'awa_points_reached';
CREATE FUNCTION awa_points.fail_nth(class text, n integer) RETURNS void
    STRICT LANGUAGE c AS '$libdir/awa_queue', 'awa_points_fail_nth';
CREATE FUNCTION awa_points.jitter(one_in integer, at_most_us integer) RETURNS void
    STRICT LANGUAGE c AS '$libdir/awa_queue', 'awa_points_jitter';
CREATE FUNCTION awa_points.set_clock(offset_us bigint) RETURNS void
    STRICT LANGUAGE c AS '$libdir/awa_queue', 'awa_points_set_clock';
CREATE FUNCTION awa_points.clear_fault() RETURNS bigint
    LANGUAGE c AS '$libdir/awa_queue', 'awa_points_clear_fault';
";

/// How long somebody may take to come to a point.
const LIMIT: Duration = Duration::from_secs(60);

/// Makes schema `awa_points` in the client's database.
pub fn create(client: &mut impl GenericClient) -> Result<()> {
    client.batch_execute(FUNCTIONS).context("create the functions of points")
}

/// `action`: note, wait, error, kill or exit. The first who comes is meant.
pub fn arm(client: &mut impl GenericClient, name: &str, action: &str) -> Result<()> {
    client.execute("SELECT awa_points.arm($1, $2)", &[&name, &action]).with_context(|| format!("arm {name}"))?;
    Ok(())
}

/// As `arm`, for one session only: maintainers and others pass.
pub fn arm_for(client: &mut impl GenericClient, name: &str, action: &str, pid: i32) -> Result<()> {
    client.execute("SELECT awa_points.arm($1, $2, 0, $3)", &[&name, &action, &pid]).with_context(|| format!("arm {name}"))?;
    Ok(())
}

/// Waits until a session sleeps at the point; its process.
pub fn wait_reached(client: &mut Client, name: &str) -> Result<i32> {
    let until = Instant::now() + LIMIT;
    let query = "SELECT waiting_pid FROM awa_points.reached() AS r WHERE r.name = $1 AND waiting_pid IS NOT NULL";
    while Instant::now() < until {
        if let Some(row) = client.query_opt(query, &[&name])? {
            return Ok(row.try_get(0)?);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("nobody came to point {name} in {LIMIT:?}")
}

/// How often the armed point was reached.
pub fn hits(client: &mut impl GenericClient, name: &str) -> Result<i64> {
    let row = client.query_opt("SELECT hits FROM awa_points.reached() AS r WHERE r.name = $1", &[&name])?;
    row.map_or(Ok(0), |row| Ok(row.try_get(0)?))
}

/// Lets who sleeps there go on; an error if nobody does.
pub fn release(client: &mut impl GenericClient, name: &str) -> Result<()> {
    let somebody: bool = client.query_one("SELECT awa_points.release($1)", &[&name])?.try_get(0)?;
    if !somebody {
        bail!("nobody sleeps at point {name}");
    }
    Ok(())
}

pub fn disarm_all(client: &mut impl GenericClient) -> Result<()> {
    client.batch_execute("SELECT awa_points.disarm_all()")?;
    Ok(())
}
