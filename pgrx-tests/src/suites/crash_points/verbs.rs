//! Each verb, the points that it passes, and what it changes.

use anyhow::{Context, Result, bail, ensure};
use postgres::Client;

use super::super::{claim, complete, enqueue, ids};

/// What a verb does to the jobs when it commits. Before that it does nothing to them.
pub enum Change {
    /// It moves rows, not jobs.
    Nothing,
    /// These jobs are in this state.
    Set(Vec<i64>, &'static str),
    /// So many that waited run.
    Claims(usize),
    /// So many more wait.
    Adds(usize),
}

/// What one session does, and dies of.
pub struct Act {
    pub sql: Vec<String>,
    pub change: Change,
    /// The last statement is repeated until it finds something to do.
    pub repeat: bool,
}

pub struct Verb {
    pub name: &'static str,
    pub prepare: fn(&mut Client) -> Result<Act>,
    pub points: &'static [&'static str],
}

fn act(sql: &[&str], change: Change) -> Act {
    Act { sql: sql.iter().map(|sql| (*sql).to_owned()).collect(), change, repeat: false }
}

/// The parts of a commit, for each verb that writes.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "enqueue",
        prepare: |_| Ok(act(&["SELECT awa.enqueue_many('q', 'k', array_fill('{}'::jsonb, ARRAY[7]))"], Change::Adds(7))),
        points: &[
            "enqueue.open_segment_read",
            "enqueue.segment_locked",
            "enqueue.registered",
            "enqueue.appended",
            "enqueue.deregistered",
            "session.pre_commit",
            "session.commit",
            "session.committed",
        ],
    },
    Verb {
        name: "prepare",
        prepare: |_| {
            let sql = ["BEGIN", "SELECT awa.enqueue_many('q', 'k', array_fill('{}'::jsonb, ARRAY[7]))", "PREPARE TRANSACTION 'crash'"];
            Ok(act(&sql, Change::Adds(7)))
        },
        points: &["session.prepare"],
    },
    Verb {
        name: "claim",
        prepare: |client| {
            enqueue(client, 20)?;
            Ok(act(&["BEGIN", "SELECT awa.claim('q', 5)", "COMMIT"], Change::Claims(5)))
        },
        points: &[
            "claim.segment_locked",
            "claim.turn_taken",
            "claim.reserved",
            "claim.turn_ended",
            "claim.taken",
            "claim.recorded",
            "session.pre_commit",
            "session.commit",
            "session.committed",
        ],
    },
    Verb {
        name: "complete",
        prepare: |client| {
            let attempts = running(client, 3)?;
            let sql = format!("SELECT awa.complete_many(ARRAY[{}], ARRAY[{}])", list(&attempts, 0), list(&attempts, 1));
            Ok(act(&[&sql], Change::Set(attempts.iter().map(|attempt| attempt.0).collect(), "completed")))
        },
        points: &["exit.found", "exit.marked", "complete.recorded", "session.pre_commit", "session.commit", "session.committed"],
    },
    Verb {
        name: "fail",
        prepare: |client| ended(client, "awa.fail({}, 'again', '1 day')", "waiting"),
        points: &["exit.marked", "fail.closed", "enqueue.registered", "enqueue.appended", "session.commit"],
    },
    Verb {
        name: "fail for good",
        prepare: |client| ended(client, "awa.fail({}, 'final', final => true)", "failed"),
        points: &["fail.closed", "session.commit"],
    },
    Verb {
        name: "snooze",
        prepare: |client| ended(client, "awa.snooze({}, '1 day')", "waiting"),
        points: &["snooze.closed", "enqueue.appended", "session.commit"],
    },
    Verb {
        name: "cancel a waiting job",
        prepare: |client| {
            let job = *enqueue(client, 3)?.get(1).context("three were enqueued")?;
            Ok(act(&[&format!("SELECT awa.cancel({job})")], Change::Set(vec![job], "cancelled")))
        },
        points: &["cancel.found", "cancel.guarded", "cancel.closed", "session.commit"],
    },
    Verb {
        name: "cancel a running job",
        prepare: |client| {
            let (job, _) = one_running(client)?;
            Ok(act(&[&format!("SELECT awa.cancel({job})")], Change::Set(vec![job], "cancelled")))
        },
        points: &["cancel.marked", "session.commit"],
    },
    Verb {
        name: "retry",
        prepare: |client| {
            let (job, lease) = one_running(client)?;
            client.execute("SELECT awa.fail($1, $2, 'final', final => true)", &[&job, &lease])?;
            Ok(act(&[&format!("SELECT awa.retry({job})")], Change::Set(vec![job], "waiting")))
        },
        points: &["supersede.guarded", "retry.closed", "enqueue.appended", "session.commit"],
    },
    Verb {
        name: "retry a dead letter",
        prepare: |client| {
            // What an earlier kill has left waiting would be claimed instead.
            client.batch_execute("SELECT awa.complete(job_id, run_lease) FROM awa.claim('letters', 1000)")?;
            let job: i64 = client.query_one("SELECT awa.enqueue('letters', 'k')", &[])?.try_get(0)?;
            client.batch_execute("SELECT awa.fail(job_id, run_lease, 'x') FROM awa.claim('letters')")?;
            Ok(act(&[&format!("SELECT awa.dlq_retry({job})")], Change::Set(vec![job], "waiting")))
        },
        points: &["retry.taken_from_shelf", "enqueue.appended", "session.commit"],
    },
    Verb {
        name: "rescue",
        prepare: |client| {
            enqueue(client, 5)?;
            let rows = client.query("SELECT job_id FROM awa.claim('q', 3, deadline => '1 ms')", &[])?;
            let jobs = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
            let rescue = act(&["SELECT awa.rescue_expired_deadlines()"], Change::Set(jobs, "waiting"));
            Ok(Act { repeat: true, ..rescue })
        },
        points: &["rescue.found", "rescue.marked", "fail.closed"],
    },
    Verb {
        name: "rotate",
        prepare: |_| Ok(act(&["SELECT awa.rotate()"], Change::Nothing)),
        points: &["rotate.opened", "session.pre_commit", "session.commit", "session.committed"],
    },
    Verb {
        name: "carry",
        prepare: |client| {
            enqueue(client, 10)?;
            running(client, 3)?;
            let deferred = "SELECT awa.enqueue('q', 'later', run_at => now() + interval '1 day')";
            client.batch_execute(deferred)?;
            Ok(act(&[&carry(client)?], Change::Nothing))
        },
        points: &[
            "carry.entries_guarded",
            "carry.guarded",
            "carry.waiting_appended",
            "carry.appended",
            "carry.closed",
            "session.commit",
        ],
    },
    Verb {
        name: "promote",
        prepare: |client| {
            client.batch_execute("SELECT awa.enqueue('q', 'soon', run_at => now() + interval '3 s')")?;
            let carry = carry(client)?;
            client.batch_execute(&carry)?;
            let deferred: i64 = client.query_one("SELECT count(*) FROM awa.deferred_jobs WHERE run_at < now() + interval '1 h'", &[])?.try_get(0)?;
            ensure!(deferred > 0, "the job was not deferred");
            Ok(Act { repeat: true, ..act(&["SELECT awa.promote_deferred()"], Change::Nothing) })
        },
        points: &["promote.taken", "enqueue.appended"],
    },
    Verb {
        name: "begin to prune",
        prepare: |client| {
            drained_segment(client)?;
            Ok(act(&["SELECT awa.prune()"], Change::Nothing))
        },
        points: &["prune.proved", "prune.kept", "prune.marked", "session.pre_commit", "session.commit", "session.committed"],
    },
    PRUNE,
    Verb {
        name: "rebuild",
        prepare: |_| Ok(act(&["SELECT awa.rebuild()"], Change::Nothing)),
        points: &["build.begun", "build.segment_restored", "build.counted"],
    },
];

/// A kill before, between and after the relations of a segment.
pub const PRUNE: Verb = Verb {
    name: "prune",
    prepare: |client| {
        drained_segment(client)?;
        let begun: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
        ensure!(begun == "prune_started", "prune answered {begun}");
        let held = "SELECT count(*) FROM awa.stat_segments WHERE state = 'prune_started' AND bytes > 0";
        ensure!(client.query_one(held, &[])?.try_get::<_, i64>(0)? == 1, "nothing is there to be truncated");
        // Else recovery writes again what was cut off, and there is nothing to see.
        client.batch_execute("CHECKPOINT")?;
        Ok(act(&["SET awa.prune_grace = 0", "SELECT awa.prune()"], Change::Nothing))
    },
    points: &[
        "prune.locked",
        "prune.ready_truncated",
        "prune.closures_truncated",
        "prune.done_truncated",
        "prune.claims_truncated",
        "prune.pruned",
        "session.pre_commit",
        "session.commit",
        "session.committed",
    ],
};

fn list(pairs: &[(i64, i64)], which: usize) -> String {
    let numbers: Vec<String> = pairs.iter().map(|pair| if which == 0 { pair.0 } else { pair.1 }.to_string()).collect();
    numbers.join(", ")
}

/// Claimed as durably as the caller asks.
fn running(client: &mut Client, count: usize) -> Result<Vec<(i64, i64)>> {
    enqueue(client, count)?;
    let mut transaction = client.transaction()?;
    let attempts = claim(&mut transaction, count as i32)?;
    transaction.commit()?;
    ensure!(attempts.len() == count, "{} of {count} jobs were claimed", attempts.len());
    Ok(attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).collect())
}

fn one_running(client: &mut Client) -> Result<(i64, i64)> {
    running(client, 1)?.first().copied().context("nothing was claimed")
}

fn ended(client: &mut Client, call: &str, state: &'static str) -> Result<Act> {
    let (job, lease) = one_running(client)?;
    Ok(act(&[&format!("SELECT {}", call.replace("{}", &format!("{job}, {lease}")))], Change::Set(vec![job], state)))
}

/// Seals the open segment; the call that carries what is open in it.
fn carry(client: &mut Client) -> Result<String> {
    let generation: i64 = client.query_one("SELECT generation FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
    let rotated: String = client.query_one("SELECT outcome FROM awa.rotate()", &[])?.try_get(0)?;
    ensure!(rotated == "rotated", "rotate answered {rotated}");
    Ok(format!("SELECT awa.carry_forward({generation})"))
}

/// A sealed segment in which every job is finished, with rows in each of its tables and indexes of more than one page.
pub fn drained_segment(client: &mut Client) -> Result<()> {
    client.batch_execute("SELECT awa.rotate()")?;
    // What is empty goes first: it is not what is to be truncated when somebody dies.
    finish_prunes(client)?;
    let jobs = client.query_one("SELECT awa.enqueue_many('drained', 'k', array_fill('{}'::jsonb, ARRAY[600]))", &[])?;
    let jobs: Vec<i64> = jobs.try_get(0)?;
    for job in jobs.iter().rev().take(40) {
        client.execute("SELECT awa.cancel($1)", &[job])?;
    }
    client.batch_execute("SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('drained', 30)")?;
    let rest = "WITH c AS (SELECT array_agg(job_id) AS jobs, array_agg(run_lease) AS leases FROM awa.claim('drained', 1000))
                SELECT count(*) FROM c, awa.complete_many(jobs, leases) WHERE result = 'completed'";
    let done: i64 = client.query_one(rest, &[])?.try_get(0)?;
    ensure!(done == 530, "{done} jobs were completed");
    let rotated: String = client.query_one("SELECT outcome FROM awa.rotate()", &[])?.try_get(0)?;
    ensure!(rotated == "rotated", "rotate answered {rotated}");
    Ok(())
}

/// Whatever is drained is pruned; so is what a crash has left half truncated.
pub fn finish_prunes(client: &mut Client) -> Result<()> {
    client.batch_execute("SET awa.prune_grace = 0")?;
    for _ in 0..200 {
        let done: String = client.query_one("SELECT outcome FROM awa.prune()", &[])?.try_get(0)?;
        if !["pruned", "prune_started"].contains(&done.as_str()) {
            let left: i64 =
                client.query_one("SELECT count(*) FROM awa.stat_segments WHERE state = 'prune_started'", &[])?.try_get(0)?;
            ensure!(left == 0, "{left} segments are not pruned; prune answers {done}");
            return Ok(client.batch_execute("RESET awa.prune_grace")?);
        }
    }
    bail!("prune finds no end")
}

/// Work goes on: what was claimed before the crash can be finished, and jobs come and go.
pub fn goes_on(client: &mut Client) -> Result<()> {
    let jobs = enqueue(client, 3)?;
    let attempts = claim(client, 2)?;
    ensure!(attempts.len() == 2 && !ids(&attempts).iter().all(|id| *id == 0), "{} of {} jobs come out", attempts.len(), jobs.len());
    for attempt in attempts {
        let answer = complete(client, attempt)?;
        ensure!(answer == "completed", "{attempt:?}: complete answered {answer}");
    }
    Ok(())
}
