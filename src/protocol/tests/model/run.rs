//! The scheduler: one seed, one schedule.

use crate::profile::{self, Profile};
use crate::world::{Op, Stats, World};

impl World {
    pub fn step(&mut self) {
        self.steps += 1;
        self.stats.steps += 1;
        self.now += self.rng.between(0, 2);
        self.max_now = self.max_now.max(self.now);
        let p = self.profile;
        let lot = self.rng.below(100_000);
        let (crash, rebuild, rotate) = (p.crash, p.crash + p.rebuild, p.crash + p.rebuild + p.rotate);
        let (prune, jump) = (rotate + p.prune, rotate + p.prune + p.clock_jump);
        match lot {
            n if n < crash => self.crash(),
            n if n < rebuild => {
                if self.sessions.iter().all(|s| s.tx.is_none()) && self.building.is_none() {
                    self.begin_build();
                }
            }
            n if n < rotate => {
                if self.building.is_none() {
                    self.rotate();
                }
            }
            n if n < prune => self.prune(),
            n if n < jump => {
                self.now += if self.rng.permille(500) { 700 } else { -700 };
                self.max_now = self.max_now.max(self.now);
            }
            n if n < jump + 200 => self.resolve_prepared(),
            n if n < jump + 3_000 && self.building.is_some() => self.finish_build(),
            _ => {
                let sid = self.rng.below(self.sessions.len());
                self.step_session(sid);
                // Calls of claim run through in an ordered schedule.
                while p.ordered && matches!(self.sessions[sid].op, Op::Claim(_)) {
                    self.step_session(sid);
                }
            }
        }
        self.check_step();
        let every = if p.sessions > 20 { 200 } else { 25 };
        if self.steps.is_multiple_of(every) {
            self.check_full();
        }
    }

    pub fn step_session(&mut self, sid: usize) {
        let op = std::mem::take(&mut self.sessions[sid].op);
        let next = match op {
            Op::Idle => self.choose(sid),
            Op::Produce(produce) => self.step_produce(sid, produce),
            Op::Claim(claim) => self.step_claim(sid, claim),
            Op::Finish(finish) => self.step_finish(sid, finish),
            Op::Cancel(cancel) => self.step_cancel(sid, cancel),
            Op::Redrive(redrive) => self.step_redrive(sid, redrive),
            Op::Carry(carry) => self.step_carry(sid, carry),
            Op::Undo { level, turn } => self.step_undo(sid, level, turn),
            Op::Settle => self.step_settle(sid),
        };
        self.sessions[sid].op = next;
    }

    fn choose(&mut self, sid: usize) -> Op {
        let mut weights = self.profile.weights;
        if self.profile.ordered {
            // Session 0 claims, the others do the rest; a claim is never taken back.
            if sid == 0 {
                weights = [0; 11];
                weights[profile::CLAIM] = 2;
                weights[profile::COMMIT] = 3;
            } else {
                weights[profile::CLAIM] = 0;
            }
        }
        let mut lot = self.rng.below(weights.iter().sum());
        let verb = weights.iter().position(|w| {
            let hit = lot < *w;
            lot = lot.saturating_sub(*w);
            hit
        });
        let in_tx = self.sessions[sid].tx.is_some();
        let depth = if in_tx { self.tx(sid).stack.len() } else { 0 };
        let built = self.building.is_none();
        match verb.unwrap_or(profile::COMMIT) {
            profile::PRODUCE => self.start_produce(sid),
            profile::CLAIM if built => self.start_claim(sid),
            profile::FINISH if built => self.start_finish(sid),
            profile::CANCEL if built && self.rng.permille(350) => self.start_redrive(sid),
            profile::CANCEL if built => self.start_cancel(sid),
            profile::CARRY if built => self.start_carry(sid),
            profile::SAVEPOINT if in_tx => {
                self.savepoint(sid);
                Op::Idle
            }
            profile::RELEASE if depth > 1 => {
                self.release(sid);
                Op::Idle
            }
            profile::ROLLBACK_TO if depth > 1 => {
                let level = 1 + self.rng.below(depth - 1);
                self.rollback(sid, level, None)
            }
            profile::COMMIT if in_tx => self.commit(sid),
            profile::ABORT if in_tx => self.rollback(sid, 0, None),
            profile::PREPARE if in_tx && self.may_prepare(sid) => {
                self.prepare(sid);
                Op::Idle
            }
            _ => Op::Idle,
        }
    }
}

/// Panics at the first violation.
pub fn run(seed: u64, profile: Profile, trace: &mut Option<Vec<String>>) -> Stats {
    let mut world = World::new(seed, profile);
    world.trace = trace.take();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..profile.steps {
            world.step();
        }
        world.quiesce();
        if profile.crash > 0 && world.rng.permille(500) {
            world.crash();
            world.quiesce();
        }
        world.drain();
    }));
    *trace = world.trace.take();
    if let Err(panic) = ended
        && world.stats.tracks_unfit == 0
    {
        std::panic::resume_unwind(panic);
    }
    world.stats
}
