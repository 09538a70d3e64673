//! The extension beside a plain SQL implementation of the same contract (`sql/reference`): random sequences of all verbs, with savepoints,
//! rollbacks, prepared transactions, errors, maintenance, rebuilds and restarts between them, in one session. After each step both must
//! have answered and show the same. A sequence that fails is made as short as possible.
//!
//! `AWA_SEED` begins with another sequence (the one that is printed repeats a failure), `AWA_SEQUENCES` is how many, `AWA_STEPS` how long.

mod compare;
mod op;
mod run;
mod statement;

use std::cell::RefCell;

use anyhow::{Context, Result, bail, ensure};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::stress_mixed::number;
use super::{Stage, claim, enqueue, ids};

/// What shrinking may cost: each try is a database of its own.
const TRIES: u32 = 300;
const SHRINK_MS: u32 = 60_000;

// If this fails, some verb does not do what is promised, in some order of calls.
pub fn every_sequence_of_verbs_is_answered_as_by_plain_sql(stage: &mut Stage<'_>) -> Result<()> {
    let first = number("AWA_SEED", u64::from(rand::random::<u32>()));
    let (sequences, steps) = (number("AWA_SEQUENCES", 40), number("AWA_STEPS", 60));
    println!("        reference: AWA_SEED={first} AWA_SEQUENCES={sequences} AWA_STEPS={steps}");
    let mut attempts = 0;
    for seed in (first..).take(usize::try_from(sequences)?) {
        attempts += one(stage, seed, usize::try_from(steps)?)?;
    }
    println!("        {attempts} attempts were handed out alike");
    Ok(())
}

fn one(stage: &mut Stage<'_>, seed: u64, steps: usize) -> Result<usize> {
    let mut bytes = [0; 32];
    for (to, from) in bytes.iter_mut().zip(seed.to_le_bytes()) {
        *to = from;
    }
    let config = Config { cases: 1, failure_persistence: None, max_shrink_iters: TRIES, max_shrink_time: SHRINK_MS, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let (stage, attempts) = (RefCell::new(stage), RefCell::new(0));
    let tested = runner.run(&op::sequence(steps), |ops| {
        let done = run::sequence(&mut stage.borrow_mut(), &ops);
        done.map(|handed_out| *attempts.borrow_mut() = handed_out).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    match tested {
        Ok(()) => Ok(attempts.into_inner()),
        Err(TestError::Fail(why, ops)) => bail!("AWA_SEED={seed} AWA_SEQUENCES=1 AWA_STEPS={steps}: {why}\nsteps: {ops:?}"),
        Err(TestError::Abort(why)) => bail!("AWA_SEED={seed}: {why}"),
    }
}

// If this fails, jobs of a lane come out in another order than they went in, because a claimer had passed by them.
pub fn jobs_passed_by_in_their_transaction_come_out_in_order(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("BEGIN")?;
    let mut expected = enqueue(&mut client, 1)?;
    client.batch_execute("SAVEPOINT s")?;
    expected.extend(enqueue(&mut client, 1)?);
    client.batch_execute("RELEASE s")?;
    expected.extend(enqueue(&mut client, 1)?);
    // Of two transactions, as it were: none of them is due for the one that has enqueued them.
    ensure!(claim(&mut client, 3)?.is_empty(), "a transaction has claimed its own jobs");
    client.batch_execute("COMMIT")?;
    let (first, rest) = (claim(&mut client, 2)?, claim(&mut client, 2)?);
    let found = [ids(&first), ids(&rest)].concat();
    ensure!(found == expected, "jobs {expected:?} came out as {found:?}");
    Ok(())
}

// If this fails, an operator is told to cancel jobs that are gone with their queue.
pub fn the_jobs_of_a_dropped_queue_are_not_found(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('gone')")?;
    // One waits, one runs, one has been cancelled.
    let jobs: Vec<i64> = client.query_one("SELECT awa.enqueue_many('gone', 'k', ARRAY['1', '2', '3']::jsonb[])", &[])?.try_get(0)?;
    client.batch_execute("SELECT awa.claim('gone')")?;
    client.query_one("SELECT awa.cancel($1)", &[jobs.last().context("three jobs")?])?;
    client.batch_execute("SELECT awa.drop_queue('gone', force => true)")?;
    for job in jobs {
        let row = client.query_one("SELECT awa.retry($1) || ' ' || awa.delete_job($1) || ' ' || awa.cancel($1)", &[&job])?;
        let answers: String = row.try_get(0)?;
        ensure!(answers == "not_found not_found not_found", "job {job}: {answers}");
    }
    Ok(())
}
