//! Crashes at each named point of each verb: the transaction that was there has happened, if its commit was written, or it has not; every
//! other job is what it was; log, memory and indexes agree; and work goes on.
//!
//! `AWA_SEED` repeats the choices of a run. `AWA_CRASH_ROUNDS` makes it longer: a quarter as many kills at each of the nine points of a prune,
//! and a 25th at each point of each verb; without it, once at each point of a prune, and at a random share of the others.

mod verbs;

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use postgres::{Client, NoTls};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use self::verbs::{Act, Change, PRUNE, VERBS, Verb, drained_segment, finish_prunes};
use super::every_state::{States, states};
use super::races::pid_of;
use super::stress_mixed::{HASTY, configured, number};
use super::witnesses::{indexes_are_sound, maintenance_rests, under_load};
use super::{Stage, enqueue};
use crate::cluster::Shutdown;
use crate::points;
use crate::process::wait_until;

/// Of all verbs and their points, in a normal run.
const SHARE: usize = 14;

/// Finished jobs stay visible when their segments are emptied.
fn set_up(stage: &Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    points::create(&mut client)?;
    let kept = "completed_retention => '1 day', failed_retention => '1 day', cancelled_retention => '1 day'";
    client.batch_execute(&format!(
        "SELECT awa.alter_queue('q', {kept}), awa.create_queue('drained', {kept}),
                awa.create_queue('letters', max_attempts => 1, dead_letters => true)"
    ))?;
    Ok(())
}

/// Kills a session at the point, and holds the server to what was before.
fn kill_at(stage: &Stage<'_>, verb: &Verb, point: &str) -> Result<()> {
    let mut operator = stage.connect()?;
    // A claim that a crash may undo would be another story.
    operator.batch_execute("SET awa.asynchronous_claim = off")?;
    let act = (verb.prepare)(&mut operator)?;
    let before = states(&mut operator)?;
    let mut victim = stage.connect()?;
    let pid = pid_of(&mut victim)?;
    let log_start = stage.cluster.log_size();
    dies(&mut operator, &mut victim, pid, point, &act)?;
    stage.cluster.wait_recovered(log_start)?;
    check(stage, &before, &act, point)
}

fn dies(operator: &mut Client, victim: &mut Client, pid: i32, point: &str, act: &Act) -> Result<()> {
    let Some((last, first)) = act.sql.split_last() else { bail!("nothing to do") };
    // What comes before the last statement commits by itself, unless a transaction is begun: its points are not the ones meant.
    let is_block = first.first().is_some_and(|sql| sql == "BEGIN");
    if is_block {
        points::arm_for(operator, point, "kill", pid)?;
    }
    for sql in first {
        if let Err(error) = victim.batch_execute(sql) {
            return is_death(&error).with_context(|| sql.clone());
        }
    }
    if !is_block {
        points::arm_for(operator, point, "kill", pid)?;
    }
    let mut death = None;
    wait_until(Duration::from_secs(20), || {
        death = victim.batch_execute(last).err();
        death.is_some() || !act.repeat
    });
    is_death(&death.with_context(|| format!("nobody came to {point}"))?).with_context(|| last.clone())
}

fn is_death(error: &postgres::Error) -> Result<()> {
    match error.as_db_error() {
        None => Ok(()),
        Some(said) => bail!("it did not die, it said: {said:?}"),
    }
}

fn check(stage: &Stage<'_>, before: &States, act: &Act, point: &str) -> Result<()> {
    let mut client = stage.connect()?;
    stage.verify_clean()?;
    indexes_are_sound(&mut client)?;
    // Prepared is neither: it is there, and decided now.
    let prepared: i64 = client.query_one("SELECT count(*) FROM pg_prepared_xacts WHERE gid = 'crash'", &[])?.try_get(0)?;
    ensure!((prepared == 1) == (point == "session.prepare"), "{prepared} prepared transactions after a crash at {point}");
    if prepared == 1 {
        ensure!(states(&mut client)? == *before, "a prepared transaction shows before its commit");
        client.batch_execute("COMMIT PREPARED 'crash'")?;
    }
    let committed = ["session.commit", "session.committed", "session.prepare"].contains(&point);
    compare(before, &states(&mut client)?, &act.change, committed)?;
    finish_prunes(&mut client)?;
    verbs::goes_on(&mut client)?;
    empty_old_segments(&mut client)?;
    indexes_are_sound(&mut client)?;
    stage.verify_clean()
}

fn compare(before: &States, after: &States, change: &Change, committed: bool) -> Result<()> {
    let gone: Vec<&i64> = before.keys().filter(|id| !after.contains_key(id)).collect();
    ensure!(gone.is_empty(), "jobs are gone: {gone:?}");
    let added = after.iter().filter(|(id, _)| !before.contains_key(id)).count();
    let changed: BTreeMap<i64, &str> = before
        .iter()
        .filter_map(|(id, state)| after.get(id).filter(|now| *now != state).map(|now| (*id, now.as_str())))
        .collect();
    let (adds, sets) = match change {
        _ if !committed => (0, BTreeMap::new()),
        Change::Nothing => (0, BTreeMap::new()),
        Change::Adds(count) => (*count, BTreeMap::new()),
        Change::Set(ids, state) => (0, ids.iter().map(|id| (*id, *state)).collect()),
        Change::Claims(count) => {
            let claimed = changed.iter().filter(|(id, now)| **now == "running" && before.get(id).is_some_and(|then| then == "waiting"));
            ensure!(claimed.count() == *count, "{count} were claimed, changed: {changed:?}");
            (0, changed.clone())
        }
    };
    ensure!(added == adds, "{added} jobs were added, not {adds}");
    ensure!(changed == sets, "committed: {committed}; expected {sets:?}, changed {changed:?}");
    Ok(())
}

/// Else the ring is full after a while.
fn empty_old_segments(client: &mut Client) -> Result<()> {
    let sealed = "SELECT generation FROM awa.stat_segments WHERE state = 'sealed' ORDER BY generation";
    for row in client.query(sealed, &[])? {
        let generation: i64 = row.try_get(0)?;
        let carried: String = client.query_one("SELECT outcome FROM awa.carry_forward($1)", &[&generation])?.try_get(0)?;
        ensure!(["carried", "nothing"].contains(&carried.as_str()), "carry_forward({generation}) answered {carried}");
    }
    finish_prunes(client)
}

// If this fails, a crash at some point of a verb loses a job, does half of what was asked, or leaves an index that lies.
pub fn a_session_killed_at_any_point_has_done_all_or_nothing(stage: &mut Stage<'_>) -> Result<()> {
    set_up(stage)?;
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let asked = number("AWA_CRASH_ROUNDS", 0);
    let mut places: Vec<(&Verb, &str)> =
        VERBS.iter().flat_map(|verb| verb.points.iter().map(move |point| (verb, *point))).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let share = if asked == 0 { SHARE } else { places.len() };
    println!("        crash_points: AWA_SEED={seed}, {share} of {} places", places.len());
    // What is carried and due in more than two seconds waits outside of the ring.
    configured(stage, &[("awa.deferral", "2s")], |stage| {
        for _ in 0..asked / 25 + 1 {
            places.shuffle(&mut rng);
            for (verb, point) in places.iter().take(share) {
                kill_at(stage, verb, point).with_context(|| format!("{}, killed at {point}", verb.name))?;
            }
        }
        Ok(())
    })
}

// If this fails, a crash between two tables of a truncation leaves a slot that is read, or an index over rows that are gone.
pub fn a_prune_killed_between_any_two_relations_is_done_again(stage: &mut Stage<'_>) -> Result<()> {
    set_up(stage)?;
    for round in 0..number("AWA_CRASH_ROUNDS", 0) / 4 + 1 {
        for point in PRUNE.points {
            kill_at(stage, &PRUNE, point).with_context(|| format!("round {round}, killed at {point}"))?;
            // Not by hand: whoever comes first after the crash must leave the slot alone until it is pruned.
            let mut client = stage.connect()?;
            drained_segment(&mut client)?;
            finish_prunes(&mut client)?;
        }
    }
    Ok(())
}

// If this fails, a power failure or an immediate shutdown in the middle of everything loses jobs, or does half of something.
pub fn a_server_that_dies_with_sessions_at_many_points_loses_nothing(stage: &mut Stage<'_>) -> Result<()> {
    const STOPS: [(&str, &str); 9] = [
        ("enqueue", "enqueue.appended"),
        ("claim", "claim.taken"),
        ("complete", "complete.recorded"),
        ("fail", "fail.closed"),
        ("snooze", "enqueue.registered"),
        ("cancel a waiting job", "cancel.guarded"),
        ("cancel a running job", "cancel.marked"),
        ("retry", "retry.closed"),
        ("retry a dead letter", "retry.taken_from_shelf"),
    ];
    set_up(stage)?;
    for round in 0..number("AWA_CRASH_ROUNDS", 2) {
        let mut operator = stage.connect()?;
        operator.batch_execute("SET awa.asynchronous_claim = off")?;
        enqueue(&mut operator, 50)?;
        let mut victims = Vec::new();
        for (name, point) in STOPS {
            let verb = VERBS.iter().find(|verb| verb.name == name).with_context(|| format!("there is no verb {name}"))?;
            victims.push((point, (verb.prepare)(&mut operator)?));
        }
        let before = states(&mut operator)?;
        thread::scope(|scope| -> Result<()> {
            let mut sessions = Vec::new();
            for (point, act) in &victims {
                let mut victim = stage.config().connect(NoTls)?;
                victim.batch_execute("SET awa.asynchronous_claim = off")?;
                points::arm_for(&mut operator, point, "wait", pid_of(&mut victim)?)?;
                sessions.push(scope.spawn(move || act.sql.iter().try_for_each(|sql| victim.batch_execute(sql))));
                points::wait_reached(&mut operator, point)?;
            }
            if round % 2 == 0 { stage.cluster.crash()? } else { stage.cluster.stop(Shutdown::Immediate)? }
            for session in sessions {
                let ended = session.join().map_err(|_| anyhow!("a session panicked"))?;
                ensure!(ended.is_err(), "a session went on");
            }
            Ok(())
        })?;
        stage.cluster.start()?;
        let act = Act { sql: Vec::new(), change: Change::Nothing, repeat: false };
        check(stage, &before, &act, "many points").with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

// If this fails, a maintainer that dies in the middle of its work, under load, loses jobs that were acknowledged.
pub fn a_maintainer_killed_at_any_point_loses_nothing(stage: &mut Stage<'_>) -> Result<()> {
    let mut points = vec![
        "rotate.opened",
        "carry.waiting_appended",
        "carry.appended",
        "carry.closed",
        "prune.proved",
        "prune.kept",
        "prune.marked",
        "prune.ready_truncated",
        "prune.closures_truncated",
        "prune.done_truncated",
        "prune.claims_truncated",
        "prune.pruned",
    ];
    set_up(stage)?;
    let seed = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let rounds = number("AWA_CRASH_ROUNDS", 3) as usize;
    println!("        crash_points: AWA_SEED={seed}, {rounds} rounds");
    let mut rng = StdRng::seed_from_u64(seed);
    points.shuffle(&mut rng);
    configured(stage, &HASTY, |stage| {
        for (round, point) in points.iter().cycle().take(rounds).enumerate() {
            let dose = rng.random_range(50..400);
            maintainer_dies(stage, point, round, dose).with_context(|| format!("killed at {point}, after {dose} answers"))?;
        }
        Ok(())
    })
}

fn maintainer_dies(stage: &Stage<'_>, point: &str, round: usize, dose: usize) -> Result<()> {
    let mut operator = stage.connect()?;
    operator.batch_execute("ALTER SYSTEM SET awa.maintenance = on")?;
    operator.batch_execute("SELECT pg_reload_conf()")?;
    let config = stage.config();
    let log_start = stage.cluster.log_size();
    let queue = format!("flow-{round}");
    let (witnesses, ()) = under_load(&config, &queue, |witnesses| {
        witnesses.wait_for_more(dose)?;
        points::arm(&mut operator, point, "kill")?;
        stage.cluster.wait_recovered(log_start)
    })?;
    let mut client = stage.connect()?;
    maintenance_rests(&mut client)?;
    stage.verify_clean()?;
    indexes_are_sound(&mut client)?;
    let account = witnesses.account(&mut client, &witnesses.mark())?;
    ensure!(account.lost == 0, "{} acknowledged calls are lost", account.lost);
    witnesses.finish(&mut client, &account)?;
    indexes_are_sound(&mut client)?;
    // There is not a place for a queue of each of a hundred rounds.
    client.execute("SELECT awa.drop_queue($1, force => true)", &[&queue])?;
    stage.verify_clean()
}
