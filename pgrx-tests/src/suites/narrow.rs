//! Races too narrow for luck: one session stands still at a point while others go past it. The numbers are those of docs/races.md.

use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use postgres::Client;

use super::races::{pid_of, see_blocked};
use super::{Attempt, Stage, claim, complete, drain, enqueue, ids, sorted};
use crate::points;

/// A session that stands still at a point, and goes on with what it was doing.
struct Standing<'scope, T> {
    point: &'static str,
    thread: ScopedJoinHandle<'scope, Result<T>>,
}

impl<'scope, T: Send + 'scope> Standing<'scope, T> {
    fn start<'env>(
        scope: &'scope thread::Scope<'scope, 'env>,
        stage: &Stage<'_>,
        operator: &mut Client,
        point: &'static str,
        work: impl FnOnce(&mut Client) -> Result<T> + Send + 'scope,
    ) -> Result<Self> {
        let mut client = stage.connect()?;
        points::arm_for(operator, point, "wait", pid_of(&mut client)?)?;
        let thread = scope.spawn(move || work(&mut client));
        points::wait_reached(operator, point)?;
        Ok(Self { point, thread })
    }

    fn go_on(self, operator: &mut Client) -> Result<T> {
        points::release(operator, self.point)?;
        self.thread.join().map_err(|_| anyhow!("a thread panicked"))?
    }
}

/// If the scene goes wrong, nobody is left standing. A call that hangs is an error.
fn scene(stage: &Stage<'_>, play: impl for<'scope> FnOnce(&'scope thread::Scope<'scope, '_>, &mut Client) -> Result<()>) -> Result<()> {
    let mut operator = stage.connect()?;
    points::create(&mut operator)?;
    operator.batch_execute("SET statement_timeout = '20s'; SET awa.prune_grace = 0")?;
    thread::scope(|scope| {
        let result = play(scope, &mut operator);
        if result.is_err() {
            drop(points::disarm_all(&mut operator));
        }
        result
    })
}

fn outcomes(client: &mut Client, calls: &[&str]) -> Result<Vec<String>> {
    let outcome = |call: &&str| -> Result<String> { Ok(client.query_one(&format!("SELECT outcome FROM awa.{call}"), &[])?.try_get(0)?) };
    calls.iter().map(outcome).collect()
}

/// Seals the first segment, empties it and gives its slot back.
fn prune_the_first(client: &mut Client) -> Result<()> {
    let said = outcomes(client, &["rotate()", "prune()", "prune()"])?;
    ensure!(said == ["rotated", "prune_started", "pruned"], "{said:?}");
    Ok(())
}

// 4. If this fails, a producer that was slow writes into a segment that is gone, and its committed jobs with it.
pub fn a_producer_that_slept_over_a_prune_loses_no_job(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let late = Standing::start(scope, stage, operator, "enqueue.open_segment_read", |client| enqueue(client, 3))?;
        prune_the_first(operator)?;
        let jobs = late.go_on(operator)?;
        stage.verify_clean()?;
        let drained = drain(operator)?;
        ensure!(drained == jobs, "enqueued {jobs:?}, drained {drained:?}");
        Ok(())
    })
}

// 4, 32. If this fails, a claimer that was slow reads the rows of another generation in the slot that it knew.
pub fn a_claimer_that_slept_over_a_prune_reads_no_other_segment(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        // A cancelled job lies before the scan still, so there is something to look at.
        let cancelled = enqueue(operator, 1)?;
        operator.execute("SELECT awa.cancel($1)", &[&cancelled[0]])?;
        let late = Standing::start(scope, stage, operator, "claim.segment_read", |client| claim(client, 10))?;
        prune_the_first(operator)?;
        ensure!(outcomes(operator, &["rotate()"])? == ["rotated"], "not rotated");
        let slot: i32 = operator.query_one("SELECT slot FROM awa.stat_segments WHERE state = 'open'", &[])?.try_get(0)?;
        ensure!(slot == 0, "the new segment is in slot {slot}");
        let jobs = enqueue(operator, 3)?;
        let mut claimed = late.go_on(operator)?;
        stage.verify_clean()?;
        claimed.extend(claim(operator, 10)?);
        ensure!(sorted(ids(&claimed)) == jobs, "enqueued {jobs:?}, claimed {claimed:?}");
        Ok(())
    })
}

// 6. If this fails, a job that gets its key after a scan went past that time is skipped for ever.
pub fn a_producer_that_registers_late_is_above_every_scan(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let late = Standing::start(scope, stage, operator, "enqueue.segment_locked", |client| {
            let sql = "SELECT awa.enqueue('q', 'late', run_at => now() - interval '1 hour')";
            Ok(client.query_one(sql, &[])?.try_get::<_, i64>(0)?)
        })?;
        operator.batch_execute("SELECT awa.enqueue('q', 'early', run_at => now() - interval '1 minute') FROM generate_series(1, 5)")?;
        ensure!(drain(operator)?.len() == 5, "too few jobs");
        let job = late.go_on(operator)?;
        stage.verify_clean()?;
        ensure!(drain(operator)? == [job], "the late job was skipped");
        Ok(())
    })
}

// 7. If this fails, a producer that is stopped for a moment holds up every claim, or loses its jobs.
pub fn a_producer_that_stands_still_holds_up_nobody_and_loses_nothing(stage: &mut Stage<'_>) -> Result<()> {
    for point in ["enqueue.registered", "enqueue.appended", "enqueue.deregistered"] {
        scene_again(stage, |scope, operator| {
            let late = Standing::start(scope, stage, operator, point, |client| enqueue(client, 4))?;
            let others = enqueue(operator, 3)?;
            ensure!(drain(operator)? == others, "{point}: it holds up the others");
            let jobs = late.go_on(operator)?;
            stage.verify_clean()?;
            let drained = drain(operator)?;
            ensure!(drained == jobs, "{point}: enqueued {jobs:?}, drained {drained:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// A scene in a database that has the functions already, or gets them now.
fn scene_again(stage: &Stage<'_>, play: impl for<'scope> FnOnce(&'scope thread::Scope<'scope, '_>, &mut Client) -> Result<()>) -> Result<()> {
    stage.connect()?.batch_execute("DROP SCHEMA IF EXISTS awa_points CASCADE")?;
    scene(stage, play)
}

// 8. If this fails, the lane of a producer that died while it was appending is blocked by its ghost.
pub fn a_producer_that_dies_while_it_appends_leaves_no_ghost(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |_, operator| {
        for (point, action) in
            [("enqueue.registered", "error"), ("enqueue.registered", "exit"), ("enqueue.appended", "error"), ("enqueue.appended", "exit")]
        {
            let mut client = stage.connect()?;
            points::arm_for(operator, point, action, pid_of(&mut client)?)?;
            ensure!(enqueue(&mut client, 300).is_err(), "{action} at {point} did not come");
            if action == "error" {
                // The same, caught, in a transaction that goes on.
                points::arm_for(operator, point, action, pid_of(&mut client)?)?;
                let caught = "DO $$ BEGIN PERFORM awa.enqueue('q', 'k'); EXCEPTION WHEN OTHERS THEN PERFORM awa.enqueue('q', 'k'); END $$";
                client.batch_execute(caught)?;
                ensure!(drain(operator)?.len() == 1, "the job after the error was lost");
            }
            let jobs = enqueue(operator, 3)?;
            let drained = drain(operator)?;
            ensure!(drained == jobs, "after {action} at {point}: enqueued {jobs:?}, drained {drained:?}");
        }
        Ok(())
    })
}

// 8. If this fails, nobody can claim from a lane any more after a worker died at the wrong moment, or a job is lost with it.
pub fn a_claimer_that_dies_with_a_turn_gives_it_back(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |_, operator| {
        for (point, action) in
            [("claim.turn_taken", "error"), ("claim.turn_taken", "exit"), ("claim.reserved", "error"), ("claim.reserved", "exit")]
        {
            let jobs = enqueue(operator, 3)?;
            let mut client = stage.connect()?;
            points::arm_for(operator, point, action, pid_of(&mut client)?)?;
            ensure!(claim(&mut client, 2).is_err(), "{action} at {point} did not come");
            stage.verify_clean()?;
            let drained = drain(operator)?;
            ensure!(drained == jobs, "after {action} at {point}: enqueued {jobs:?}, drained {drained:?}");
        }
        Ok(())
    })
}

// 27. If this fails, a job that failed is retried by two, and runs twice.
pub fn a_retry_that_slept_over_another_changes_nothing(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let job = enqueue(operator, 1)?[0];
        let attempt = claim(operator, 1)?[0];
        operator.execute("SELECT awa.fail($1, $2, 'x', final => true)", &[&attempt.job_id, &attempt.run_lease])?;
        let retry = move |client: &mut Client| -> Result<String> { Ok(client.query_one("SELECT awa.retry($1)", &[&job])?.try_get(0)?) };
        let late = Standing::start(scope, stage, operator, "supersede.found", retry)?;
        ensure!(retry(operator)? == "retried", "the first retry did nothing");
        let answer = late.go_on(operator)?;
        stage.verify_clean()?;
        ensure!(answer == "not_finished", "the second retry answered {answer}");
        ensure!(drain(operator)? == [job], "the job did not run once");
        Ok(())
    })
}

// 1. If this fails, a job is cancelled that a worker has finished meanwhile: it has two ends.
pub fn a_cancel_that_comes_too_late_changes_nothing(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let job = enqueue(operator, 1)?[0];
        let late = Standing::start(scope, stage, operator, "cancel.found", move |client| {
            Ok(client.query_one("SELECT awa.cancel($1)", &[&job])?.try_get::<_, String>(0)?)
        })?;
        ensure!(drain(operator)? == [job], "the job was not handed out");
        let answer = late.go_on(operator)?;
        stage.verify_clean()?;
        ensure!(answer == "already_finished", "cancel answered {answer}");
        let row = operator.query_one("SELECT completed, cancelled FROM awa.queue_counts('q')", &[])?;
        ensure!((row.try_get::<_, i64>(0)?, row.try_get::<_, i64>(1)?) == (1, 0), "the counts are wrong");
        Ok(())
    })
}

fn claim_stale(client: &mut Client) -> Result<Attempt> {
    let row = client.query_one("SELECT job_id, run_lease FROM awa.claim('q', heartbeat_timeout => '1 microsecond')", &[])?;
    Ok(Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? })
}

fn rescue(client: &mut Client) -> Result<String> {
    Ok(client.query_one("SELECT outcome FROM awa.rescue_stale_heartbeats()", &[])?.try_get(0)?)
}

// 31. If this fails, a worker loses an attempt although it has just said that it lives.
pub fn a_heartbeat_between_sweep_and_mark_keeps_the_attempt(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        enqueue(operator, 1)?;
        let attempt = claim_stale(operator)?;
        let late = Standing::start(scope, stage, operator, "rescue.found", rescue)?;
        let alive: bool = operator.query_one("SELECT awa.heartbeat($1, $2)", &[&attempt.job_id, &attempt.run_lease])?.try_get(0)?;
        ensure!(alive, "the attempt does not run");
        let outcome = late.go_on(operator)?;
        ensure!(outcome == "nothing", "rescue said {outcome}");
        ensure!(complete(operator, attempt)? == "completed", "the attempt was taken away");
        Ok(())
    })
}

// 31. If this fails, rescue ends what has ended, or the next attempt of the same job.
pub fn a_rescue_that_slept_over_the_end_of_an_attempt_ends_nothing(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        enqueue(operator, 2)?;
        operator.batch_execute("SELECT awa.alter_queue('q', backoff => '0', backoff_max => '0')")?;
        let (finished, failed) = (claim_stale(operator)?, claim_stale(operator)?);
        let late = Standing::start(scope, stage, operator, "rescue.found", rescue)?;
        complete(operator, finished)?;
        operator.execute("SELECT awa.fail($1, $2, 'once', retry_after => '0')", &[&failed.job_id, &failed.run_lease])?;
        let again = claim(operator, 1)?;
        ensure!(ids(&again) == [failed.job_id], "the second attempt was not handed out: {again:?}");
        let outcome = late.go_on(operator)?;
        ensure!(outcome == "nothing", "rescue said {outcome}");
        stage.verify_clean()?;
        ensure!(complete(operator, again[0])? == "completed", "the second attempt was taken away");
        Ok(())
    })
}

// If this fails, verify() takes several claims of one job, each seen for a moment, for damage that lasts.
pub fn a_verify_that_meets_claim_after_claim_of_a_job_names_nothing(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        enqueue(operator, 1)?;
        let mut claimer = stage.connect()?;
        let mut verifier = stage.connect()?;
        let pid = pid_of(&mut verifier)?;
        claimer.batch_execute("BEGIN")?;
        claim(&mut claimer, 1)?;
        points::arm_for(operator, "verify.evidence_read", "wait", pid)?;
        let verify = scope.spawn(move || Ok::<_, anyhow::Error>(verifier.query("SELECT problem FROM awa.verify()", &[])?.len()));
        while !verify.is_finished() {
            // In every round the claim is there when memory is read, not yet in the log, and over when the two are compared.
            points::arm_for(operator, "verify.waited", "wait", pid)?;
            points::wait_reached(operator, "verify.evidence_read")?;
            claimer.batch_execute("ROLLBACK")?;
            points::release(operator, "verify.evidence_read")?;
            while !verify.is_finished() && !is_standing(operator, "verify.waited")? {
                thread::yield_now();
            }
            if !verify.is_finished() {
                claimer.batch_execute("BEGIN")?;
                claim(&mut claimer, 1)?;
                points::arm_for(operator, "verify.evidence_read", "wait", pid)?;
                points::release(operator, "verify.waited")?;
            }
        }
        let found = verify.join().map_err(|_| anyhow!("a thread panicked"))??;
        ensure!(found == 0, "verify() found {found} differences");
        Ok(())
    })
}

fn is_standing(client: &mut Client, point: &str) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT FROM awa_points.reached() AS r WHERE r.name = $1 AND waiting_pid IS NOT NULL)";
    Ok(client.query_one(sql, &[&point])?.try_get(0)?)
}

// 34. If this fails, two who have decided to end the same attempt both end it: a worker and an operator, or a worker twice.
pub fn of_two_who_have_decided_to_end_an_attempt_one_does(stage: &mut Stage<'_>) -> Result<()> {
    let ways: [(&str, &str); 3] = [
        ("exit.decided", "SELECT awa.complete($1, $2)"),
        ("exit.decided", "SELECT awa.fail($1, $2, 'late', final => true)"),
        ("cancel.decided", "SELECT awa.cancel($1, 'lease ' || $2::bigint)"),
    ];
    for (point, late_way) in ways {
        for (_, first_way) in ways {
            for commits in [true, false] {
                scene_again(stage, |scope, operator| {
                    enqueue(operator, 1)?;
                    let attempt = claim(operator, 1)?[0];
                    let end = move |client: &mut Client, sql: &str| -> Result<String> {
                        Ok(client.query_one(sql, &[&attempt.job_id, &attempt.run_lease])?.try_get(0)?)
                    };
                    let late = Standing::start(scope, stage, operator, point, move |client| Ok(end(client, late_way)))?;
                    let its_pid = points::wait_reached(operator, point)?;
                    let mut first = stage.connect()?;
                    first.batch_execute("BEGIN")?;
                    let said = end(&mut first, first_way)?;
                    points::release(operator, point)?;
                    see_blocked(operator, its_pid)?;
                    first.batch_execute(if commits { "COMMIT" } else { "ROLLBACK" })?;
                    let late_said = late.thread.join().map_err(|_| anyhow!("a thread panicked"))??;
                    stage.verify_clean()?;
                    let late_said = late_said.unwrap_or_else(|error| format!("{error:#}"));
                    let has_ended = ["completed", "failed", "cancelled"].contains(&late_said.as_str());
                    ensure!(has_ended != commits, "{first_way} said {said}, commits {commits}; then {late_way} said {late_said}");
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

// 1. If this fails, a job that was cancelled comes back into the pool as one that waits, when a second cancel of it is interrupted.
pub fn a_late_cancel_that_is_interrupted_brings_nothing_back(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let jobs = enqueue(operator, 2)?;
        let cancelled = jobs[0];
        let mut late = stage.connect()?;
        let pid = pid_of(&mut late)?;
        points::arm_for(operator, "cancel.found", "wait", pid)?;
        let thread = scope.spawn(move || late.query("SELECT awa.cancel($1)", &[&cancelled]).map(|_| ()));
        points::wait_reached(operator, "cancel.found")?;
        let answer: String = operator.query_one("SELECT awa.cancel($1)", &[&cancelled])?.try_get(0)?;
        ensure!(answer == "cancelled", "the first cancel says {answer}");
        points::arm_for(operator, "cancel.guarded", "wait", pid)?;
        points::release(operator, "cancel.found")?;
        points::wait_reached(operator, "cancel.guarded")?;
        // Its guard stands at a row that has ended, and a scan comes.
        let taken = claim(operator, 10)?;
        ensure!(ids(&taken) == jobs[1..], "claimed {taken:?}");
        operator.execute("SELECT pg_cancel_backend($1)", &[&pid])?;
        let said = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        ensure!(said.is_err(), "the second cancel was not interrupted");
        let holes: f64 = operator.query_one("SELECT sum(value) FROM awa.metrics() WHERE name = 'awa_queue_holes'", &[])?.try_get(0)?;
        ensure!(holes == 0.0, "{holes} jobs came back");
        stage.verify_clean()?;
        ensure!(drain(operator)?.is_empty(), "a cancelled job was handed out");
        complete(operator, taken[0])?;
        stage.verify_clean()
    })
}

// 10. If this fails, a job that was finished while a scan stood at its row is carried, and runs again.
pub fn a_finished_job_is_not_carried_while_a_scan_stands_at_it(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let jobs = enqueue(operator, 2)?;
        ensure!(outcomes(operator, &["rotate()"])? == ["rotated"], "not rotated");
        let mut canceller = stage.connect()?;
        canceller.batch_execute("BEGIN")?;
        canceller.execute("SELECT awa.cancel($1)", &[&jobs[0]])?;
        // It goes past the guard of the first job, and stands at the second.
        let late = Standing::start(scope, stage, operator, "claim.reserved", |client| claim(client, 2))?;
        canceller.batch_execute("ROLLBACK")?;
        let first = claim(operator, 1)?;
        ensure!(ids(&first) == jobs[..1], "claimed {first:?}");
        complete(operator, first[0])?;
        let said = outcomes(operator, &["carry_forward(1)"])?;
        ensure!(said == ["skipped_active"], "carry_forward said {said:?}");
        let second = late.go_on(operator)?;
        ensure!(ids(&second) == jobs[1..], "claimed {second:?}");
        complete(operator, second[0])?;
        stage.verify_clean()?;
        let more = drain(operator)?;
        ensure!(more.is_empty(), "handed out again: {more:?}");
        Ok(())
    })
}

// 17. If this fails, a worker that was slow ends an attempt in memory that is gone.
pub fn a_finisher_that_slept_over_a_rebuild_ends_its_attempt_once(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        enqueue(operator, 3)?;
        let attempts = claim(operator, 3)?;
        let attempt = attempts[1];
        let late = Standing::start(scope, stage, operator, "exit.found", move |client| complete(client, attempt))?;
        operator.batch_execute("SELECT awa.rebuild()")?;
        let answer = late.go_on(operator)?;
        ensure!(answer == "completed", "complete answered {answer}");
        stage.verify_clean()?;
        for other in [attempts[0], attempts[2]] {
            complete(operator, other)?;
        }
        Ok(())
    })
}

// 30. If this fails, a finished job that is deleted while memory is built anew is counted for ever.
pub fn a_rebuild_waits_for_whoever_takes_a_finished_job(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        enqueue(operator, 2)?;
        for attempt in claim(operator, 2)? {
            operator.execute("SELECT awa.fail($1, $2, 'x', final => true)", &[&attempt.job_id, &attempt.run_lease])?;
        }
        prune_the_first(operator)?;
        let job: i64 = operator.query_one("SELECT min(job_id) FROM awa.retained_jobs", &[])?.try_get(0)?;
        let late = Standing::start(scope, stage, operator, "retry.shelf_found", move |client| {
            Ok(client.query_one("SELECT awa.delete_job($1)", &[&job])?.try_get::<_, String>(0)?)
        })?;
        let mut rebuilder = stage.connect()?;
        let pid = pid_of(&mut rebuilder)?;
        let rebuild = scope.spawn(move || rebuilder.batch_execute("SELECT awa.rebuild()"));
        see_blocked(operator, pid)?;
        ensure!(late.go_on(operator)? == "deleted", "the job was not deleted");
        rebuild.join().map_err(|_| anyhow!("a thread panicked"))??;
        stage.verify_clean()?;
        let failed: i64 = operator.query_one("SELECT failed FROM awa.queue_counts('q')", &[])?.try_get(0)?;
        ensure!(failed == 1, "{failed} failed jobs are counted");
        Ok(())
    })
}

// 26. If this fails, a job that is committed between the look and the sleep of a worker waits for its timeout.
pub fn a_commit_between_look_and_sleep_wakes(stage: &mut Stage<'_>) -> Result<()> {
    scene(stage, |scope, operator| {
        let sleeper = Standing::start(scope, stage, operator, "wait.looked", |client| {
            client.batch_execute("SET statement_timeout = '20s'")?;
            client.batch_execute("CALL awa.wait('q', '1 hour')").context("wait")
        })?;
        enqueue(operator, 1)?;
        sleeper.go_on(operator)
    })
}
