//! Clients under load, each of which remembers, in order, what it was told. What is taken from their server at one moment (the log that a
//! standby has received, a point in an archive, the snapshot of a dump) must hold everything that they were told before that moment, and of
//! what each of them was told after it a beginning: never a thing without those that came before it.
//!
//! Their attempts are workers that live on: `finish` has them answer to the server that took over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use postgres::error::SqlState;
use postgres::{Client, Config, GenericClient, NoTls};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::Attempt;
use crate::process::wait_until;

#[derive(Clone, Copy)]
enum Role {
    Producer,
    Consumer,
    /// Claims and keeps.
    Holder,
}

const ROLES: [Role; 6] = [Role::Producer, Role::Producer, Role::Consumer, Role::Consumer, Role::Consumer, Role::Holder];
const CLAIM_MOST: i32 = 8;
/// Claims that were committed when their answer had not arrived.
const ON_THEIR_WAY: usize = 3 * CLAIM_MOST as usize + 1;

#[derive(Debug)]
enum Event {
    Enqueued(Vec<i64>),
    /// By a claim that was committed as durably as its caller asked.
    Claimed(Attempt),
    Completed(Attempt),
}

#[derive(Default)]
struct Told {
    events: Vec<Event>,
    /// Each attempt that it was handed, by whatever claim.
    drew: Vec<Attempt>,
}

pub struct Witnesses {
    queue: String,
    told: Vec<Mutex<Told>>,
    /// Calls that were refused because the disk is full.
    refused: AtomicUsize,
}

/// What was found of what they were told.
#[derive(Debug, Default)]
pub struct Account {
    pub kept: usize,
    pub lost: usize,
    alive: Vec<Attempt>,
    stale: Vec<Attempt>,
    orphans: Vec<i64>,
}

/// Runs `body` while they work on a queue of this name, made for them, and ends them.
pub fn under_load<R>(config: &Config, queue: &str, body: impl FnOnce(&Witnesses) -> Result<R>) -> Result<(Witnesses, R)> {
    config.connect(NoTls)?.execute("SELECT awa.create_queue($1, completed_retention => '1 day')", &[&queue])?;
    let witnesses = Witnesses {
        queue: queue.to_owned(),
        told: ROLES.iter().map(|_| Mutex::default()).collect(),
        refused: AtomicUsize::new(0),
    };
    let over = AtomicBool::new(false);
    let (done, results) = thread::scope(|scope| {
        let clients: Vec<_> = (0..)
            .zip(ROLES)
            .zip(&witnesses.told)
            .map(|((number, role), told)| {
                let (over, refused) = (&over, &witnesses.refused);
                scope.spawn(move || Session::new(config, queue, number, told)?.run(role, over, refused))
            })
            .collect();
        let done = body(&witnesses);
        over.store(true, Ordering::Relaxed);
        let join = |client: thread::ScopedJoinHandle<'_, Result<()>>| {
            client.join().unwrap_or_else(|_| Err(anyhow!("a client panicked")))
        };
        (done, clients.into_iter().map(join).collect::<Vec<_>>())
    });
    let done = done?;
    results.into_iter().collect::<Result<Vec<()>>>()?;
    Ok((witnesses, done))
}

impl Witnesses {
    /// How much each was told so far.
    pub fn mark(&self) -> Vec<usize> {
        self.told.iter().map(|told| locked(told).events.len()).collect()
    }

    pub fn wait_for_more(&self, more: usize) -> Result<()> {
        let goal = self.mark().iter().sum::<usize>() + more;
        ensure!(wait_until(Duration::from_secs(60), || self.mark().iter().sum::<usize>() >= goal), "the clients do not get on");
        Ok(())
    }

    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// Nobody works any more. What was told before the mark is there, and of the rest a beginning for each.
    pub fn account(&self, client: &mut Client, mark: &[usize]) -> Result<Account> {
        let states = self.states(client)?;
        let drew: Vec<Attempt> = self.told.iter().flat_map(|told| locked(told).drew.clone()).collect();
        let alive: BTreeSet<Attempt> = self.alive(client, &drew)?;
        let mut account =
            Account { stale: drew.iter().filter(|attempt| !alive.contains(attempt)).copied().collect(), ..Account::default() };
        for (number, (told, mark)) in self.told.iter().zip(mark).enumerate() {
            let told = locked(told);
            let mut first_lost = None;
            for (place, event) in told.events.iter().enumerate() {
                if is_there(event, &states, &alive).with_context(|| format!("client {number}, line {place}"))? {
                    account.kept += 1;
                    ensure!(
                        first_lost.is_none(),
                        "client {number}: {event:?} is there, and {first_lost:?}, which came before, is not"
                    );
                } else {
                    account.lost += 1;
                    ensure!(place >= *mark, "client {number}: {event:?} (line {place} of {mark}) is lost");
                    first_lost = first_lost.or(Some(event));
                }
            }
        }
        for attempt in &alive {
            let state = states.get(&attempt.job_id).map_or("gone", String::as_str);
            ensure!(state == "running", "{attempt:?} is alive, its job is {state}");
        }
        let owned: BTreeSet<i64> = alive.iter().map(|attempt| attempt.job_id).collect();
        account.orphans =
            states.iter().filter(|(id, state)| *state == "running" && !owned.contains(id)).map(|(id, _)| *id).collect();
        ensure!(account.orphans.len() <= ON_THEIR_WAY, "{} jobs run, and nobody has claimed them", account.orphans.len());
        account.alive = alive.into_iter().collect();
        Ok(account)
    }

    fn states(&self, client: &mut Client) -> Result<BTreeMap<i64, String>> {
        let mut states = BTreeMap::new();
        for view in ["awa.jobs", "awa.terminal_jobs"] {
            for row in client.query(&format!("SELECT job_id, state FROM {view} WHERE queue = $1"), &[&self.queue])? {
                let (id, state): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
                if let Some(other) = states.insert(id, state.clone()) {
                    bail!("job {id} is {other} and {state}");
                }
            }
        }
        Ok(states)
    }

    fn alive(&self, client: &mut Client, attempts: &[Attempt]) -> Result<BTreeSet<Attempt>> {
        let (ids, leases) = unzipped(attempts);
        let rows =
            client.query("SELECT job_id, run_lease FROM awa.heartbeat_many($1, $2) WHERE result = 'alive'", &[&ids, &leases])?;
        rows.iter().map(|row| Ok(Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? })).collect()
    }

    /// The workers answer to the server that took over: who still has a lease can use it, and nobody else; all that waits comes out once.
    pub fn finish(&self, client: &mut Client, account: &Account) -> Result<()> {
        let told: BTreeSet<i64> = self
            .told
            .iter()
            .flat_map(|told| locked(told).drew.iter().map(|attempt| attempt.run_lease).collect::<Vec<_>>())
            .collect();
        let mut fresh = Vec::new();
        loop {
            let more = claim(client, &self.queue, 1000)?;
            if more.is_empty() {
                break;
            }
            fresh.extend(more);
        }
        ensure!(fresh.iter().all(|attempt| !told.contains(&attempt.run_lease)), "a lease was given out twice");
        // While the same jobs run again under other leases.
        ensure!(completed(client, &account.stale)? == 0, "a stale lease has finished a job");
        for (attempts, what) in [(&fresh, "new"), (&account.alive, "old")] {
            let done = completed(client, attempts)?;
            ensure!(done == attempts.len(), "{done} of {} {what} attempts could be finished", attempts.len());
        }
        ensure!(completed(client, &account.stale)? == 0, "a stale lease has finished a finished job");
        for job in &account.orphans {
            let answer: String = client.query_one("SELECT awa.cancel($1, 'its claim was never answered')", &[job])?.try_get(0)?;
            ensure!(answer == "cancelled", "job {job} runs; cancel answered {answer}");
        }
        let left = self.states(client)?.into_iter().find(|(id, state)| state != "completed" && !account.orphans.contains(id));
        ensure!(left.is_none(), "unfinished in an empty queue: {left:?}");
        Ok(())
    }
}

/// An error: it is there in part, or in a state that it cannot have.
fn is_there(event: &Event, states: &BTreeMap<i64, String>, alive: &BTreeSet<Attempt>) -> Result<bool> {
    match event {
        Event::Enqueued(ids) => {
            let there = ids.iter().filter(|id| states.contains_key(id)).count();
            ensure!(there == 0 || there == ids.len(), "{there} of the {} jobs of one call are there", ids.len());
            Ok(there > 0)
        }
        Event::Claimed(attempt) => {
            Ok(alive.contains(attempt) || states.get(&attempt.job_id).is_some_and(|state| state == "completed"))
        }
        Event::Completed(attempt) => match states.get(&attempt.job_id).map(String::as_str) {
            Some("completed") => Ok(true),
            Some("running" | "available") | None => Ok(false),
            other => bail!("{attempt:?} was completed, its job is {other:?}"),
        },
    }
}

fn locked(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unzipped(attempts: &[Attempt]) -> (Vec<i64>, Vec<i64>) {
    attempts.iter().map(|attempt| (attempt.job_id, attempt.run_lease)).unzip()
}

fn claim(client: &mut impl GenericClient, queue: &str, count: i32) -> Result<Vec<Attempt>> {
    let rows = client.query("SELECT job_id, run_lease FROM awa.claim($1::text, $2)", &[&queue, &count])?;
    rows.iter().map(|row| Ok(Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? })).collect()
}

fn completed(client: &mut Client, attempts: &[Attempt]) -> Result<usize> {
    let (ids, leases) = unzipped(attempts);
    Ok(client.query("SELECT 1 FROM awa.complete_many($1, $2) WHERE result = 'completed'", &[&ids, &leases])?.len())
}

struct Session<'a> {
    client: Client,
    queue: &'a str,
    rng: StdRng,
    told: &'a Mutex<Told>,
}

impl<'a> Session<'a> {
    fn new(config: &Config, queue: &'a str, number: u64, told: &'a Mutex<Told>) -> Result<Self> {
        Ok(Self { client: config.connect(NoTls)?, queue, rng: StdRng::seed_from_u64(number), told })
    }

    /// Until it is over or the server goes. A full disk is told, and tried again. Any other failure is the engine's.
    fn run(&mut self, role: Role, over: &AtomicBool, refused: &AtomicUsize) -> Result<()> {
        while !over.load(Ordering::Relaxed) {
            let done = match role {
                Role::Producer => self.produce(),
                Role::Consumer => self.consume(),
                Role::Holder => self.claim_durably(1).map(drop),
            };
            if let Err(error) = done {
                let said = error.chain().find_map(|cause| cause.downcast_ref::<postgres::Error>());
                if said.and_then(postgres::Error::code) == Some(&SqlState::DISK_FULL) {
                    refused.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
                let is_end = match said.and_then(postgres::Error::code) {
                    Some(code) => code.code().starts_with("57P"),
                    None => said.is_some(),
                };
                return if is_end { Ok(()) } else { Err(error) };
            }
            // Two processors serve this load, and what it is the load for.
            thread::sleep(Duration::from_millis(self.rng.random_range(0..if matches!(role, Role::Holder) { 40 } else { 4 })));
        }
        Ok(())
    }

    fn produce(&mut self) -> Result<()> {
        let args: Vec<serde_json::Value> = (0..self.rng.random_range(1..12)).map(|n| serde_json::json!({ "n": n })).collect();
        let row = self.client.query_one("SELECT awa.enqueue_many($1, 'flow', $2)", &[&self.queue, &args])?;
        locked(self.told).events.push(Event::Enqueued(row.try_get(0)?));
        Ok(())
    }

    fn claim_durably(&mut self, count: i32) -> Result<Vec<Attempt>> {
        let mut transaction = self.client.transaction()?;
        let attempts = claim(&mut transaction, self.queue, count)?;
        locked(self.told).drew.extend(&attempts);
        transaction.commit()?;
        locked(self.told).events.extend(attempts.iter().map(|attempt| Event::Claimed(*attempt)));
        Ok(attempts)
    }

    fn consume(&mut self) -> Result<()> {
        let count = self.rng.random_range(1..=CLAIM_MOST);
        let attempts = if self.rng.random_ratio(1, 3) {
            self.claim_durably(count)?
        } else {
            let attempts = claim(&mut self.client, self.queue, count)?;
            locked(self.told).drew.extend(&attempts);
            attempts
        };
        for attempt in attempts {
            let row = self.client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease])?;
            let answer: String = row.try_get(0)?;
            ensure!(answer == "completed", "{attempt:?}: complete answered {answer}");
            locked(self.told).events.push(Event::Completed(attempt));
        }
        Ok(())
    }
}

/// Until somebody switches it on again. Who reads jobs in two statements may meet one that is moved between them.
pub fn maintenance_rests(client: &mut Client) -> Result<()> {
    client.batch_execute("ALTER SYSTEM SET awa.maintenance = off")?;
    client.batch_execute("SELECT pg_reload_conf()")?;
    let rests =
        "SELECT count(*) = 1 FROM awa.doctor() WHERE check_name = 'maintainer' AND detail LIKE '%awa.maintenance is off%'";
    let resting =
        wait_until(Duration::from_secs(60), || client.query_one(rests, &[]).is_ok_and(|row| row.try_get(0).unwrap_or(false)));
    ensure!(resting, "the maintainer does not rest");
    Ok(())
}

pub fn maintenance_goes_on(client: &mut Client) -> Result<()> {
    client.batch_execute("ALTER SYSTEM SET awa.maintenance = on")?;
    Ok(client.batch_execute("SELECT pg_reload_conf()")?)
}

/// Each index of the ring has an entry for each row, and no other.
pub fn indexes_are_sound(client: &mut Client) -> Result<()> {
    client.batch_execute("SET client_min_messages = warning")?;
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS amcheck")?;
    // Whoever truncates steps back from this; one that was truncated meanwhile is checked as it is now.
    let checked = client.query(
        "SELECT bt_index_check(oid, true) FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'i'",
        &[],
    )?;
    ensure!(!checked.is_empty(), "there are no indexes");
    client.batch_execute("RESET client_min_messages")?;
    Ok(())
}
