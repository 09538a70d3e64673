//! A small pool of places: fewer jobs are handed out, and it says so; nothing is stuck and nothing is lost.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use postgres::{Client, NoTls};

use super::{Stage, claim, complete, drain, enqueue, ids, sorted};
use crate::cluster::Shutdown;

/// Settings for one case; the next one finds the defaults again.
pub struct Configured {
    undo: Vec<String>,
    conf: std::path::PathBuf,
}

impl Configured {
    pub fn restart_with(stage: &mut Stage<'_>, settings: &[(&str, &str)]) -> Result<Self> {
        let conf = stage.cluster.data().join("postgresql.conf");
        let before = std::fs::read_to_string(&conf)?;
        let configured = Self { undo: vec![before], conf };
        for (name, value) in settings {
            stage.cluster.configure(name, value)?;
        }
        stage.cluster.restart(Shutdown::Fast)?;
        Ok(configured)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if let Some(before) = self.undo.pop()
            && let Err(error) = std::fs::write(&self.conf, before)
        {
            eprintln!("note: {}: {error}", self.conf.display());
        }
    }
}

/// A session whose notices can be read.
pub fn connect_listening(stage: &Stage<'_>) -> Result<(Client, Arc<Mutex<Vec<String>>>)> {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ears = Arc::clone(&heard);
    let mut config = stage.config();
    config.notice_callback(move |notice| {
        ears.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{}: {}", notice.severity(), notice.message()));
    });
    Ok((config.connect(NoTls)?, heard))
}

const SMALL: &[(&str, &str)] = &[("awa.max_in_flight", "1024")];

// If this fails, a full pool stops the queue, or hands out jobs that it cannot follow.
pub fn a_full_pool_hands_out_fewer_jobs_and_says_so(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, SMALL)?;
    let (mut client, heard) = connect_listening(stage)?;
    let jobs = enqueue(&mut client, 3000)?;
    let first = claim(&mut client, 3000)?;
    ensure!(!first.is_empty() && first.len() <= 1024, "{} jobs were claimed", first.len());
    let notices = std::mem::take(&mut *heard.lock().unwrap_or_else(PoisonError::into_inner));
    ensure!(notices.iter().any(|said| said.starts_with("NOTICE") && said.contains("in flight")), "said {notices:?}");
    ensure!(claim(&mut client, 10)?.is_empty(), "more jobs came out of a full pool");
    stage.verify_clean()?;
    let mut finished = Vec::new();
    for attempt in first {
        complete(&mut client, attempt)?;
        finished.push(attempt.job_id);
    }
    finished.extend(drain(&mut client)?);
    ensure!(sorted(finished.clone()) == sorted(jobs), "{} jobs came out", finished.len());
    Ok(())
}

// If this fails, one rolled-back claim stops every queue of the database.
pub fn a_rolled_back_claim_that_filled_the_pool_can_be_claimed_again(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, SMALL)?;
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 1500)?;
    let mut transaction = client.transaction()?;
    let taken = claim(&mut transaction, 1500)?.len();
    transaction.rollback()?;
    stage.verify_clean()?;
    let again = claim(&mut client, 10)?;
    ensure!(again.len() == 10, "after {taken} jobs were given back, {} of 10 could be claimed", again.len());
    let mut finished = ids(&again);
    for attempt in again {
        complete(&mut client, attempt)?;
    }
    finished.extend(drain(&mut client)?);
    ensure!(sorted(finished.clone()) == sorted(jobs), "{} jobs came out", finished.len());
    Ok(())
}

// If this fails, jobs given back to one queue (paused, say) stop all the others.
pub fn jobs_given_back_to_a_paused_queue_do_not_stop_another(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, SMALL)?;
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('other')")?;
    enqueue(&mut client, 1500)?;
    let mut transaction = client.transaction()?;
    claim(&mut transaction, 1500)?;
    transaction.rollback()?;
    client.batch_execute("SELECT awa.pause_queue('q'); SELECT awa.enqueue('other', 'test')")?;
    let rows = client.query("SELECT job_id FROM awa.claim('other', 1)", &[])?;
    ensure!(rows.len() == 1, "nothing can be claimed from the other queue");
    Ok(())
}

// If this fails, waiting jobs cannot be cancelled when the pool is full.
pub fn a_full_pool_still_cancels(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, SMALL)?;
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 1500)?;
    let first = claim(&mut client, 1500)?;
    for job in jobs.iter().rev().take(10).chain(ids(&first).iter().take(10)) {
        let answer: String = client.query_one("SELECT awa.cancel($1)", &[job])?.try_get(0)?;
        ensure!(answer == "cancelled", "cancel answered {answer}");
    }
    Ok(())
}

// If this fails, a restart with a smaller pool drops running attempts.
pub fn a_pool_smaller_than_the_running_jobs_refuses_and_names_the_setting(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    let jobs = enqueue(&mut client, 3000)?;
    let mut transaction = client.transaction()?;
    let attempts = claim(&mut transaction, 2500)?;
    transaction.commit()?;
    drop(client);
    {
        let _configured = Configured::restart_with(stage, SMALL)?;
        let mut client = stage.connect()?;
        for _ in 0..2 {
            let error = claim(&mut client, 1).err().map(|error| format!("{error:#} {error:?}")).unwrap_or_default();
            ensure!(error.contains("max_in_flight"), "claim said: {error}");
        }
        ensure!(client.query_one("SELECT 1", &[]).is_ok(), "the session is broken");
    }
    stage.cluster.restart(Shutdown::Fast)?;
    let mut client = stage.connect()?;
    for &attempt in &attempts {
        complete(&mut client, attempt)?;
    }
    let mut finished = ids(&attempts);
    finished.extend(drain(&mut client)?);
    ensure!(sorted(finished.clone()) == sorted(jobs), "{} jobs came out", finished.len());
    Ok(())
}

// If this fails, one queue too many breaks the others.
pub fn too_many_queues_are_refused(stage: &mut Stage<'_>) -> Result<()> {
    let _configured = Configured::restart_with(stage, &[("awa.max_queues", "2")])?;
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('second')")?;
    let error = client.batch_execute("SELECT awa.create_queue('third')").err();
    let error = error.as_ref().and_then(postgres::Error::as_db_error).map(|error| (error.code().code().to_owned(), error.hint().unwrap_or("").to_owned()));
    ensure!(error.as_ref().is_some_and(|(code, hint)| code == "53400" && hint.contains("awa.max_queues")), "got {error:?}");
    enqueue(&mut client, 3)?;
    ensure!(drain(&mut client)?.len() == 3, "the first queue is broken");
    client.batch_execute("SELECT awa.drop_queue('second')")?;
    client.batch_execute("SELECT awa.create_queue('third')")?;
    Ok(())
}
