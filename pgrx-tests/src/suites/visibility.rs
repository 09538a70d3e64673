//! An enqueue belongs to the transaction of its caller.

use anyhow::{Result, ensure};

use super::{Stage, claim, drain, enqueue, ids};

// If this fails, nothing works.
pub fn a_committed_enqueue_is_claimable(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 100)?;
    let claimed = ids(&claim(&mut stage.connect()?, 100)?);
    ensure!(claimed == jobs, "enqueued {jobs:?}, claimed {claimed:?}");
    Ok(())
}

// If this fails, workers see jobs whose business rows are not there yet.
pub fn an_open_enqueue_is_not_claimable(stage: &mut Stage<'_>) -> Result<()> {
    let (mut producer, mut worker) = (stage.connect()?, stage.connect()?);
    let mut transaction = producer.transaction()?;
    let held_back = enqueue(&mut transaction, 10)?;
    let others = enqueue(&mut stage.connect()?, 10)?;
    let first = drain(&mut worker)?;
    ensure!(first == others, "claimed {first:?}, committed were {others:?}");
    transaction.commit()?;
    let second = drain(&mut worker)?;
    ensure!(second == held_back, "after the commit: claimed {second:?} of {held_back:?}");
    Ok(())
}

// If this fails, work is done for an order that was never placed.
pub fn a_rolled_back_enqueue_never_appears(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut transaction = client.transaction()?;
    enqueue(&mut transaction, 300)?;
    transaction.rollback()?;
    let kept = enqueue(&mut client, 3)?;
    let claimed = drain(&mut client)?;
    ensure!(claimed == kept, "claimed {claimed:?}, committed were {kept:?}");
    Ok(())
}

// If this fails, a savepoint takes jobs with it that it should not, or leaves some behind.
pub fn rollback_to_savepoint_drops_only_its_jobs(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let mut transaction = client.transaction()?;
    let mut kept = enqueue(&mut transaction, 5)?;
    let mut inner = transaction.savepoint("middle")?;
    enqueue(&mut inner, 5)?;
    inner.rollback()?;
    kept.extend(enqueue(&mut transaction, 5)?);
    transaction.commit()?;
    let claimed = drain(&mut client)?;
    ensure!(claimed == kept, "claimed {claimed:?}, kept were {kept:?}");
    Ok(())
}
