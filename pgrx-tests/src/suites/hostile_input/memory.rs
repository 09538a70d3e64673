//! Sessions that may not have as much memory as their call needs: what the library takes by itself fails like what the server takes.

use anyhow::{Context, Result, ensure};
use postgres::Client;

use super::super::Stage;
use super::super::races::pid_of;
use super::no_complaints;

const MEGABYTE: u64 = 1024 * 1024;

/// Calls that need much: a preparation, and the call. The first ones need it before they can refuse.
const GREEDY: &[(&str, &str, &str)] = &[
    ("a name of 60 MB", "", "SELECT awa.enqueue(repeat('q', 60000000), 'k')"),
    ("a kind of 60 MB", "", "SELECT awa.enqueue('q', repeat('k', 60000000))"),
    ("three million identifiers", "", "SELECT awa.complete_many(array_fill(1::bigint, ARRAY[3000000]), array_fill(1::bigint, ARRAY[3000000]))"),
    ("three million tags", "", "SELECT awa.enqueue('q', 'k', tags => array_fill('t'::text, ARRAY[3000000]))"),
    ("an error of 60 MB", "SELECT awa.enqueue('q', 'k')", "SELECT awa.fail(job_id, run_lease, repeat('e', 60000000)) FROM awa.claim('q')"),
    ("100000 jobs", "", "SELECT cardinality(awa.enqueue_many('q', 'k', array_fill('{}'::jsonb, ARRAY[100000])))"),
    ("a claim of 20000", "", "SELECT count(*) FROM awa.claim('q', 20000)"),
    (
        "20000 completions",
        "",
        "SELECT count(d) FROM (SELECT array_agg(job_id) AS j, array_agg(run_lease) AS l FROM awa.claim('q', 20000)) AS c, LATERAL awa.complete_many(c.j, c.l) AS d",
    ),
    ("all jobs", "", "SELECT count(*) FROM awa.jobs"),
    ("verify", "", "SELECT count(*) FROM awa.verify()"),
    ("rebuild", "", "SELECT awa.rebuild()"),
];

fn address_space(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).context("no VmSize")?;
    Ok(line.split_whitespace().next().context("no number")?.parse::<u64>()? * 1024)
}

/// Ok(true): it fitted. An error of the server is fine, the end of the session is not.
fn try_with(stage: &Stage<'_>, client: &mut Client, pid: i32, call: &str, more: u64) -> Result<bool> {
    stage.cluster.limit_address_space(pid, Some(address_space(pid)? + more))?;
    let outcome = client.batch_execute(call);
    let fitted = match outcome {
        Ok(()) => true,
        Err(error) => {
            let said = error.as_db_error().with_context(|| format!("the session died: {error}"))?;
            let code = said.code().code();
            ensure!(!code.starts_with("XX"), "{code}: {}", said.message());
            code != "53200"
        }
    };
    stage.cluster.limit_address_space(pid, None).context("after the call")?;
    client.batch_execute("SELECT 1").context("after the call")?;
    Ok(fitted)
}

// If this fails, one greedy call, or a machine that is short of memory, brings the whole server down.
pub fn a_session_with_little_memory_raises_and_lives(stage: &mut Stage<'_>) -> Result<()> {
    let log_start = stage.cluster.log_size();
    let (mut refused, mut given_up) = (0, 0);
    let mut wrong = Vec::new();
    for (name, prepare, call) in GREEDY {
        for more in [1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 135, 200, 300, 450].map(|megabytes| megabytes * MEGABYTE) {
            let mut client = stage.connect()?;
            client.batch_execute("SELECT awa.queue_counts()")?;
            client.batch_execute(prepare)?;
            let pid = pid_of(&mut client)?;
            let log_before = stage.cluster.log_size();
            match try_with(stage, &mut client, pid, call, more) {
                Ok(true) => break,
                Ok(false) => refused += 1,
                // The boundary to the server copies each error; where not even that fits, the server gives up.
                Err(_) if stage.cluster.log_since(log_before)?.contains("ERRORDATA_STACK_SIZE") => {
                    given_up += 1;
                    stage.cluster.wait_recovered(log_before)?;
                }
                Err(error) => {
                    wrong.push(format!("{name}, {} MB: {error:#}", more / MEGABYTE));
                    drop(client);
                    // A crash takes the other sessions along.
                    if stage.connect().is_err() {
                        stage.cluster.wait_recovered(log_before)?;
                    }
                    break;
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(refused > 20, "only {refused} calls had too little memory");
    ensure!(given_up < 5, "{given_up} times the server gave up");
    if given_up > 0 { Ok(()) } else { no_complaints(stage, log_start) }
}
