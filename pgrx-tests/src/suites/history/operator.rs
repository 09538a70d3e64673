//! What goes on beside the sessions: maintenance all the time, sessions that are cancelled and terminated, backends that are killed.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use postgres::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::record::{Beside, Span};
use super::session::{Desk, connect};
use crate::cluster::Cluster;
use crate::suites::DATABASE;

/// In the way of a rebuild or a cancel, the ring is being changed, and what a killed server says.
const EXPECTED: [&str; 9] = ["40P01", "40001", "57014", "57P01", "57P02", "57P03", "22023", "08006", "25001"];

pub struct Operator<'a> {
    pub desk: &'a Desk,
    pub cluster: &'a Cluster,
    pub pids: &'a [AtomicI32],
    pub over: &'a AtomicBool,
    /// Backends still to be killed, one of these each time the server has been up for a while.
    pub kills: u64,
    pub beside: Vec<(Beside, Span)>,
}

impl Operator<'_> {
    pub fn run(&mut self, seed: u64) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x6f70);
        let (config, own) = (self.cluster.config(DATABASE), AtomicI32::new(0));
        let mut client = connect(&config, &own)?;
        client.batch_execute("SET awa.prune_grace = 0")?;
        let mut rounds = 0;
        while !self.over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(rng.random_range(2..20)));
            rounds += 1;
            if self.kills > 0 && rounds % 100 == 0 {
                self.kill(&mut rng)?;
            } else if let Err(error) = self.step(&mut client, &mut rng) {
                let known = error.as_db_error().is_none_or(|said| EXPECTED.contains(&said.code().code()));
                ensure!(known, "operator: {error:?}");
            }
            if client.is_closed() {
                client = connect(&config, &own)?;
                client.batch_execute("SET awa.prune_grace = 0")?;
            }
        }
        Ok(())
    }

    fn step(&mut self, client: &mut Client, rng: &mut StdRng) -> Result<(), postgres::Error> {
        let pid = self.pids.get(rng.random_range(0..self.pids.len())).map_or(0, |pid| pid.load(Ordering::Relaxed));
        let carry = "SELECT awa.carry_forward(min(generation)) FROM awa.stat_segments WHERE state = 'sealed' HAVING count(*) > 1";
        let (what, sql) = match rng.random_range(0..30) {
            0..=3 => (None, "SELECT awa.rotate()".to_owned()),
            4..=10 => (None, "SELECT awa.prune()".to_owned()),
            11 | 12 => (Some(Beside::Carry), carry.to_owned()),
            13..=16 => (Some(Beside::Rescue), "SELECT awa.rescue_expired_deadlines()".to_owned()),
            17 if rng.random_ratio(1, 3) => (Some(Beside::Rebuild), "SELECT awa.rebuild()".to_owned()),
            18 => (None, "SELECT awa.retention()".to_owned()),
            19 => (None, "SELECT count(*) FROM awa.jobs".to_owned()),
            20..=22 if pid != 0 => (None, format!("SELECT pg_cancel_backend({pid})")),
            23 if pid != 0 && rng.random_ratio(1, 3) => (None, format!("SELECT pg_terminate_backend({pid})")),
            _ => return Ok(()),
        };
        let from = self.desk.tick();
        let done = client.batch_execute(&sql);
        if let Some(what) = what {
            self.beside.push((what, Span { from, to: self.desk.tick() }));
        }
        done
    }

    /// The whole server starts again.
    fn kill(&mut self, rng: &mut StdRng) -> Result<()> {
        let pid = self.pids.get(rng.random_range(0..self.pids.len())).map_or(0, |pid| pid.load(Ordering::Relaxed));
        if pid == 0 {
            return Ok(());
        }
        let from = self.desk.tick();
        // It may have gone by itself meanwhile.
        if self.cluster.kill_backend(pid).is_ok() {
            self.kills -= 1;
            self.beside.push((Beside::Crash, Span { from, to: self.desk.tick() }));
        }
        Ok(())
    }
}
