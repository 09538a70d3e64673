//! Every verb, failing at its first, second, third ... call of the server, until it succeeds: nothing may be half done, held or forgotten.
//!
//! Every other n (which ones, is left to chance) is met, in turn by a session of its own, so with nothing cached, and in a savepoint of a
//! session that has failed before. `AWA_FAULTS=all` meets each n both ways.

mod verbs;

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, SimpleQueryMessage};

use self::verbs::{Look, MAINTENANCE, OPERATORS, PRODUCERS_AND_WORKERS, READERS, Verb, Where};
use super::{Stage, claim, enqueue};
use super::races::pid_of;
use crate::points;

/// More calls of the server than any verb makes.
const MOST: u32 = 50_000;

/// What everybody may see, but for queue `side`, which the failing sessions use themselves.
const STATE: &str = "
SELECT format(E'jobs %s\\nfinished %s\\nletters %s\\ncounts %s\\nqueues %s\\nring %s\\ndeferred %s\\nmarks %s',
    (SELECT string_agg(format('%s', (job_id, queue, kind, replace(state, 'available', 'scheduled'), priority, attempt, max_attempts, run_at, enqueued_at, claimed_at, deadline_at, tags, metadata, errors, md5(args::text))), E'\\n' ORDER BY job_id)
       FROM awa.jobs WHERE queue <> 'side'),
    (SELECT string_agg(format('%s', (job_id, queue, state, finished_at, attempt, errors)), E'\\n' ORDER BY job_id) FROM awa.terminal_jobs WHERE queue <> 'side'),
    (SELECT string_agg(format('%s', (job_id, queue, failed_at, errors)), E'\\n' ORDER BY job_id) FROM awa.dlq),
    (SELECT string_agg(format('%s', (queue, available, scheduled, running, completed, failed, cancelled, dead_lettered)), E'\\n' ORDER BY queue) FROM awa.queue_counts() WHERE queue <> 'side'),
    (SELECT string_agg(format('%s', q), E'\\n' ORDER BY queue) FROM awa.queues AS q),
    (SELECT string_agg(format('%s', r), E'\\n' ORDER BY generation, event) FROM awa.ring_rotations AS r),
    (SELECT string_agg(format('%s', d), E'\\n' ORDER BY job_id) FROM awa.deferred_jobs AS d),
    (SELECT count(*) FROM awa.restoring))";

/// Places of the pool that are neither a running attempt nor a job given back.
const LEAKED_PLACES: &str = "
SELECT (sum(value) FILTER (WHERE name = 'awa_in_flight') - COALESCE(sum(value) FILTER (WHERE name = 'awa_queue_holes'), 0)
        - COALESCE(sum(value) FILTER (WHERE name = 'awa_jobs' AND labels ->> 'state' = 'running'), 0))::bigint
  FROM awa.metrics()";

/// What the server says when something was not given back, or was noticed too late.
const COMPLAINTS: [&str; 8] =
    ["WARNING:", "PANIC:", "TRAP:", "leak", "still referenced", "was terminated by signal", "not the current", "cannot abort transaction"];
/// Warnings of our own.
const EXPECTED: [&str; 3] = ["could not rescue job", "cannot come back into the ring", "the ring has grown"];

struct Faults<'a> {
    stage: &'a Stage<'a>,
    observer: Client,
    /// Lives through all failures of the verb.
    warm: Client,
    class: &'static str,
}

/// What became of a call with a fault in it.
enum Met {
    /// The fault came, and the error reached the client.
    Failed,
    /// The fault came, and the verb went on without what it had been about to do.
    Survived,
    /// The verb makes fewer calls: it has succeeded.
    Never,
}

fn connect(stage: &Stage<'_>) -> Result<Client> {
    let mut client = stage.connect()?;
    client.batch_execute("SET awa.prune_grace = 0")?;
    Ok(client)
}

fn first_value(messages: Vec<SimpleQueryMessage>) -> Option<String> {
    messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

impl<'a> Faults<'a> {
    fn begin(stage: &'a Stage<'a>) -> Result<Self> {
        let mut observer = connect(stage)?;
        points::create(&mut observer)?;
        observer.batch_execute("SELECT awa.create_queue('side')")?;
        Ok(Self { stage, warm: connect(stage)?, observer, class: "pg.any" })
    }

    fn state(&mut self) -> Result<String> {
        Ok(self.observer.query_one(STATE, &[]).context("look at the state")?.try_get(0)?)
    }

    /// Fails the verb at each of its calls; how many there are.
    fn fail_everywhere(&mut self, verb: &Verb) -> Result<u32> {
        let log_start = self.stage.cluster.log_size();
        let both = std::env::var("AWA_FAULTS").is_ok_and(|how| how == "all");
        let mut survived = 0;
        let mut calls = 0;
        for savepoints in if both { vec![false, true] } else { vec![false] } {
            let mut prepared: Option<String> = None;
            // One session after the other fails; by halves, which half by chance, or all.
            let step = if both { 1 } else { 2 };
            let mut n: u32 = if both { 0 } else { rand::random_range(0..2) };
            for turn in 1.. {
                // What reads the whole ring makes many calls that are the same: further on, not each of them fails.
                n += if turn == 1 { 1 } else { step + n.saturating_sub(60) / 4 };
                ensure!(n < MOST, "{}: still not through after {n} faults", verb.name);
                let in_savepoint = verb.at != Where::Statement && (savepoints || (!both && turn % 2 == 0));
                let before = match verb.look {
                    Look::Prepared => None,
                    Look::Before => Some(self.state()?),
                    Look::Never => Some(String::new()),
                };
                let call = match prepared.take().filter(|_| verb.keeps) {
                    Some(call) => call,
                    None => self.prepare(verb, n)?,
                };
                let before = match before {
                    Some(state) => state,
                    None => self.state()?,
                };
                let met = self.meet(verb, &call, n, in_savepoint).with_context(|| format!("{}, call {n}", verb.name))?;
                match met {
                    Met::Failed if verb.look == Look::Never => prepared = Some(call),
                    Met::Failed => {
                        let after = self.state()?;
                        ensure!(before == after, "{}: an error at call {n} left traces:\n{}", verb.name, changes(&before, &after));
                        prepared = Some(call);
                    }
                    Met::Survived => survived += 1,
                    Met::Never => {
                        calls = calls.max(n - 1);
                        break;
                    }
                }
                // What is lost stays lost: it need not be looked for each time.
                if verb.look != Look::Never && (both || turn % 8 == 0) {
                    self.check_sound().with_context(|| format!("{}, after errors up to call {n}", verb.name))?;
                }
            }
            self.observer.batch_execute(verb.undo)?;
            self.check_sound().with_context(|| format!("{}, after it succeeded", verb.name))?;
        }
        let log = self.stage.cluster.log_since(log_start)?;
        let complaint = |line: &&str| COMPLAINTS.iter().any(|word| line.contains(word)) && !EXPECTED.iter().any(|word| line.contains(word));
        let complaints: Vec<&str> = log.lines().filter(complaint).collect();
        ensure!(complaints.is_empty(), "{}: the server complains:\n{}", verb.name, complaints.join("\n"));
        if std::env::var_os("AWA_FAULTS_SHOW").is_some() {
            println!("        {}: {calls} calls that may fail, {survived} survived", verb.name);
        }
        Ok(calls)
    }

    /// Makes the jobs that the verb is about; the call with their names.
    fn prepare(&mut self, verb: &Verb, n: u32) -> Result<String> {
        let what = || format!("{}: preparation {n}", verb.name);
        for statement in verb.prepare {
            self.observer.batch_execute(&statement.replace("{n}", &n.to_string())).with_context(what)?;
        }
        let mut call = verb.call.replace("{n}", &n.to_string());
        if !verb.pick.is_empty() {
            let row = self.observer.query_one(verb.pick, &[]).with_context(what)?;
            for (index, name) in ["{job}", "{lease}"].iter().enumerate().take(row.len()) {
                call = call.replace(name, &row.try_get::<_, i64>(index)?.to_string());
            }
        }
        Ok(call)
    }

    fn meet(&mut self, verb: &Verb, call: &str, n: u32, in_savepoint: bool) -> Result<Met> {
        if !in_savepoint {
            let mut client = connect(self.stage)?;
            let met = fail(&mut client, verb, call, self.class, n)?;
            if matches!(met, Met::Failed) {
                let pid = pid_of(&mut client)?;
                let held: i64 =
                    self.observer.query_one("SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype <> 'virtualxid'", &[&pid])?.try_get(0)?;
                ensure!(held == 0, "{held} locks are still held");
            }
            return Ok(met);
        }
        self.warm.batch_execute("BEGIN")?;
        if verb.at == Where::Anywhere {
            self.warm.batch_execute("SELECT awa.enqueue('side', 'before')")?;
        }
        self.warm.batch_execute("SAVEPOINT s")?;
        let met = fail(&mut self.warm, verb, call, self.class, n)?;
        if matches!(met, Met::Failed) {
            self.warm.batch_execute("ROLLBACK TO SAVEPOINT s; SELECT awa_points.clear_fault()")?;
        }
        if verb.at == Where::Anywhere {
            self.warm.batch_execute("SELECT awa.enqueue('side', 'after')")?;
        }
        self.warm.batch_execute("COMMIT")?;
        Ok(met)
    }

    /// Memory and log agree, no place of the pool is lost, and nobody has kept a turn: a claim and an enqueue of another session go through.
    fn check_sound(&mut self) -> Result<()> {
        self.stage.verify_clean_by(&mut self.observer)?;
        let leaked: i64 = self.observer.query_one(LEAKED_PLACES, &[])?.try_get(0)?;
        ensure!(leaked == 0, "{leaked} places of the pool are lost");
        self.observer.batch_execute("SELECT awa.enqueue('side', 'probe')").context("an enqueue after it")?;
        let row = self.observer.query_one(
            "WITH c AS MATERIALIZED (SELECT * FROM awa.claim('side', 64)) SELECT count(*), count(awa.complete(job_id, run_lease)) FROM c",
            &[],
        )?;
        let (claimed, completed): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        ensure!(claimed > 0 && claimed == completed, "{claimed} jobs could be claimed, {completed} completed");
        Ok(())
    }
}

/// The call, with its n-th call of the server failing.
fn fail(client: &mut Client, verb: &Verb, call: &str, class: &str, n: u32) -> Result<Met> {
    client.batch_execute(&format!("SELECT awa_points.fail_nth('{class}', {n})"))?;
    match client.simple_query(call) {
        Err(error) => {
            let said = error.as_db_error().with_context(|| format!("the session died: {error}"))?;
            ensure!(said.message().contains("injected") || said.code().code() == "53200", "another error: {said} {:?}", said.detail());
            Ok(Met::Failed)
        }
        Ok(messages) => {
            let answer = first_value(messages).unwrap_or_default();
            let left = first_value(client.simple_query("SELECT awa_points.clear_fault()")?).context("no count")?;
            if left == "0" {
                return Ok(Met::Survived);
            }
            if !verb.answer.is_empty() && answer != verb.answer {
                bail!("answered \"{answer}\", not \"{}\"", verb.answer);
            }
            Ok(Met::Never)
        }
    }
}

fn changes(before: &str, after: &str) -> String {
    let gone = before.lines().filter(|line| !after.contains(line)).map(|line| format!("- {line}"));
    let new = after.lines().filter(|line| !before.contains(line)).map(|line| format!("+ {line}"));
    gone.chain(new).take(20).collect::<Vec<_>>().join("\n")
}

fn fail_all(stage: &Stage<'_>, verbs: &[Verb]) -> Result<()> {
    let mut faults = Faults::begin(stage)?;
    let mut wrong = Vec::new();
    for verb in verbs {
        match faults.fail_everywhere(verb) {
            // A verb that cannot fail is not tested: a change has taken the faults out of its way.
            Ok(calls) if calls < verb.at_least => wrong.push(format!("{}: only {calls} calls could fail", verb.name)),
            Ok(_) => {}
            Err(error) => {
                wrong.push(format!("{error:#}"));
                faults.warm = connect(stage)?;
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

// If these fail, a full disk, a deadlock, a cancel or too little memory in the middle of a call leaves something half done.
pub fn an_error_anywhere_in_a_call_of_a_worker_leaves_nothing(stage: &mut Stage<'_>) -> Result<()> {
    fail_all(stage, PRODUCERS_AND_WORKERS)
}

pub fn an_error_anywhere_in_a_call_of_an_operator_leaves_nothing(stage: &mut Stage<'_>) -> Result<()> {
    stage.connect()?.batch_execute("SELECT awa.create_queue('letters', dead_letters => true)")?;
    fail_all(stage, OPERATORS)
}

pub fn an_error_anywhere_in_maintenance_leaves_nothing(stage: &mut Stage<'_>) -> Result<()> {
    stage.connect()?.batch_execute("SELECT awa.create_queue('letters', dead_letters => true, dead_letter_retention => '1 millisecond'); SELECT awa.create_queue('kept', completed_retention => '1 day')")?;
    fail_all(stage, MAINTENANCE)
}

pub fn an_error_anywhere_in_a_read_leaves_nothing(stage: &mut Stage<'_>) -> Result<()> {
    fail_all(stage, READERS)
}

// If this fails, one claim that is cancelled early makes the numbers of its queue unreadable.
pub fn a_claim_that_fails_before_its_first_row_leaves_numbers_readable(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    points::create(&mut client)?;
    enqueue(&mut client, 1)?;
    points::arm(&mut client, "claim.turn_taken", "error")?;
    ensure!(claim(&mut client, 1).is_err(), "the claim did not fail");
    client.simple_query("SELECT * FROM awa.stat_queue").context("stat_queue")?;
    let row = client.query_one("SELECT max(value) FROM awa.metrics() WHERE name = 'awa_queue_oldest_due_seconds'", &[]).context("metrics")?;
    let seconds: f64 = row.try_get(0)?;
    ensure!((0.0..3600.0).contains(&seconds), "the oldest job has waited for {seconds} s");
    ensure!(claim(&mut client, 1)?.len() == 1, "the job is not handed out");
    Ok(())
}
