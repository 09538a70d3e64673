//! The machine as the checker sees it: states, actions, properties.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use awa_protocol::mutants;
use stateright::{Model, Property};

use super::Choice;
use super::log::Status;
use super::world::{Config, Op, Verb, World};
use crate::actions::{Action, Fired};
use crate::properties::*;

pub struct Machine {
    pub config: Config,
    /// Which actions have happened.
    pub fired: Arc<Fired>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Act {
    /// A session begins its next verb, in one of several ways.
    Start(usize, Choice),
    Step(usize),
    /// There is nothing for this verb to do, and nobody is left who could change that.
    Skip(usize),
    Abort(usize),
    Crash {
        lose: bool,
    },
    Tick,
}

impl World {
    /// In how many ways the next verb can begin; 0: not now.
    fn ways_to_start(&self, config: &Config, sid: usize) -> usize {
        match self.verb(config, sid) {
            None => 0,
            Some(Verb::Enqueue { .. } | Verb::Claim(_) | Verb::Cancel(_) | Verb::Commit) => 1,
            Some(Verb::Finish) => self.finish_choices(config),
            Some(Verb::Rescue) => self.rescue_choices(config, sid),
            Some(Verb::Carry) => self.carry_choices(sid),
            Some(Verb::Rotate) => usize::from(self.may_rotate(sid)),
            Some(Verb::Prune) => self.prune_choices(config, sid),
        }
    }

    fn verb(&self, config: &Config, sid: usize) -> Option<Verb> {
        config.sessions.get(sid)?.get(self.sessions[sid].at).copied()
    }

    pub fn start(&mut self, config: &Config, sid: usize, verb: Verb, choice: Choice) -> Action {
        let (action, op) = match verb {
            Verb::Enqueue { rows, due } => (Action::Begin, self.start_enqueue(sid, rows, due)),
            Verb::Claim(want) => {
                self.begin(sid);
                (Action::Begin, Op::Claim(super::claimer::Claim::new(want)))
            }
            Verb::Finish => (Action::Begin, self.start_finish(config, choice).map_or(Op::Idle, Op::Finish)),
            Verb::Rescue => (Action::MarkOverdue, self.start_rescue(config, sid, choice)),
            Verb::Cancel(job) => (Action::Begin, Op::Cancel(super::Cancel::new(job))),
            Verb::Carry => (Action::Begin, self.start_carry(sid, choice)),
            Verb::Rotate => (Action::OpenNext, self.start_rotate(sid)),
            Verb::Prune => self.start_prune(config, sid, choice),
            Verb::Commit if self.sessions[sid].tx.is_some() => self.commit(sid),
            Verb::Commit => (Action::Commit, Op::Idle),
        };
        self.sessions[sid].op = op;
        action
    }

    /// It does not wait for anybody.
    pub fn may_step(&self, config: &Config, sid: usize) -> bool {
        match &self.sessions[sid].op {
            Op::Idle => false,
            Op::Produce(produce) => self.may_produce(sid, produce),
            Op::Claim(claim) => self.may_claim(config, sid, claim),
            Op::Finish(finish) => self.may_finish(config, sid, finish),
            Op::Cancel(cancel) => self.may_cancel(config, sid, cancel),
            Op::Carry(carry) => self.may_carry(sid, carry),
            Op::Maintain(_) | Op::Undo { .. } | Op::Settle => true,
        }
    }

    pub fn step(&mut self, config: &Config, sid: usize) -> Action {
        let (action, op) = match std::mem::take(&mut self.sessions[sid].op) {
            Op::Idle => (Action::Begin, Op::Idle),
            Op::Produce(produce) => self.step_produce(config, sid, produce),
            Op::Claim(claim) => self.step_claim(config, sid, claim),
            Op::Finish(finish) => self.step_finish(config, sid, finish),
            Op::Cancel(cancel) => self.step_cancel(config, sid, cancel),
            Op::Carry(carry) => self.step_carry(config, sid, carry),
            Op::Maintain(maintain) => self.step_maintain(sid, maintain),
            Op::Undo { turn } => self.step_undo(config, sid, turn),
            Op::Settle => self.step_settle(sid),
        };
        self.sessions[sid].op = op;
        action
    }

    /// A commit of a transaction that did nothing is no step.
    fn pass_idle_commits(&mut self, config: &Config) {
        for sid in 0..config.sessions.len() {
            while self.sessions[sid].tx.is_none()
                && self.sessions[sid].op == Op::Idle
                && matches!(self.verb(config, sid), Some(Verb::Commit))
            {
                self.sessions[sid].at += 1;
            }
        }
    }

    fn first(config: &Config) -> Self {
        let mut world = Self::empty(config);
        let sid = world.helper();
        let xid = world.log.begin(sid);
        world.open_next(xid);
        world.log.set_status(xid, Status::Committed { flushed: true });
        world.ring = world.log.ring().unwrap_or_default();
        let mut verbs = Vec::new();
        if config.jobs > 0 {
            verbs.extend([Verb::Enqueue { rows: config.jobs, due: None }, Verb::Commit]);
        }
        if config.running > 0 {
            verbs.extend([Verb::Claim(config.running), Verb::Commit]);
        }
        if config.sealed {
            verbs.extend([Verb::Rotate, Verb::Commit]);
        }
        for verb in verbs {
            world.run_verb(config, sid, verb);
        }
        world.log.flush();
        world
    }
}

impl Machine {
    pub fn new(config: Config) -> Self {
        Self { config, fired: Arc::new(Fired::default()) }
    }

    fn take(&self, world: &mut World, act: Act) -> Action {
        let config = &self.config;
        match act {
            Act::Start(sid, choice) => {
                let Some(verb) = world.verb(config, sid) else { return Action::Begin };
                world.sessions[sid].at += 1;
                let action = world.start(config, sid, verb, choice);
                // To begin is nobody else's concern: it is one with the first step.
                let at_once = matches!(verb, Verb::Enqueue { .. } | Verb::Claim(_) | Verb::Finish | Verb::Cancel(_));
                if at_once && world.may_step(config, sid) { world.step(config, sid) } else { action }
            }
            Act::Step(sid) => world.step(config, sid),
            Act::Skip(sid) => {
                world.sessions[sid].at += 1;
                Action::Begin
            }
            Act::Abort(sid) => {
                world.aborts -= 1;
                world.sessions[sid].at = world.after_transaction(config, sid);
                world.abort(sid);
                Action::Abort
            }
            Act::Crash { lose } => {
                world.crashes -= 1;
                world.crash(config, lose);
                Action::Crash
            }
            Act::Tick => {
                world.ticks -= 1;
                world.now += 10;
                Action::Tick
            }
        }
    }
}

impl Model for Machine {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        // The first state is made by sound rules: what a variant breaks, it breaks from there.
        mutants::set("");
        let sound = Config { broken: "", ..self.config };
        vec![World::first(&sound)]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        if world.violation.is_some() {
            return;
        }
        mutants::set(self.config.broken);
        let config = &self.config;
        let scripted = 0..config.sessions.len();
        for sid in scripted.clone() {
            if world.sessions[sid].op == Op::Idle {
                acts.extend((0..world.ways_to_start(config, sid)).map(|choice| Act::Start(sid, choice as Choice)));
            } else if world.may_step(config, sid) {
                acts.push(Act::Step(sid));
            }
        }
        if acts.is_empty() {
            let idle = |sid: &usize| world.sessions[*sid].op == Op::Idle && world.verb(config, *sid).is_some();
            acts.extend(scripted.clone().filter(idle).map(Act::Skip));
        }
        for sid in scripted.filter(|_| world.aborts > 0) {
            let ending = matches!(world.sessions[sid].op, Op::Undo { .. } | Op::Settle);
            if world.sessions[sid].tx.is_some() && !ending {
                acts.push(Act::Abort(sid));
            }
        }
        if world.crashes > 0 {
            acts.push(Act::Crash { lose: false });
            let unflushed = |status: &Status| *status == Status::Committed { flushed: false };
            if world.log.xids.iter().flatten().any(unflushed) {
                acts.push(Act::Crash { lose: true });
            }
        }
        if world.ticks > 0 {
            acts.push(Act::Tick);
        }
    }

    fn next_state(&self, before: &World, act: Act) -> Option<World> {
        mutants::set(self.config.broken);
        let mut world = before.clone();
        // An overflow or an assertion of the engine is a violation as well.
        let taken = catch_unwind(AssertUnwindSafe(|| {
            let action = self.take(&mut world, act);
            world.pass_idle_commits(&self.config);
            action
        }));
        match taken {
            Ok(action) => self.fired.note(action),
            Err(_) => world.violate(ASSERTION),
        }
        if world.violation.is_none() {
            world.violation = judge_step(before, &world, act);
        }
        if world.violation.is_none() {
            let judged = catch_unwind(AssertUnwindSafe(|| world.violated(&self.config)));
            world.violation = judged.unwrap_or(Some(ASSERTION)).or_else(|| self.judge_end(&world));
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! always {
            ($($name:ident),*) => { vec![$(Property::always($name, |_, world: &World| world.violation != Some($name))),*] };
        }
        always!(
            LOST,
            SKIPPED,
            REACHED_TWICE,
            TWO_ATTEMPTS,
            CLOSED_TWICE,
            STALE_FINISH,
            OPEN_TRUNCATED,
            REBUILD_DIFFERS,
            TOO_EARLY,
            CURSOR_LOWERED,
            FOREIGN_ENTRY,
            NOT_AN_APPEND,
            NEVER_CLAIMED,
            NEVER_SLEEPS,
            NEVER_PRUNED,
            STUCK,
            ASSERTION
        )
    }
}

impl Machine {
    /// Nobody can do anything, and somebody has not ended.
    fn judge_end(&self, world: &World) -> Option<&'static str> {
        let config = &self.config;
        let all = 0..config.sessions.len();
        let can = |sid: usize| {
            if world.sessions[sid].op == Op::Idle { world.verb(config, sid).is_some() } else { world.may_step(config, sid) }
        };
        (!all.clone().any(can) && all.clone().any(|sid| world.sessions[sid].op != Op::Idle)).then_some(STUCK)
    }
}

/// What a step must not do, whatever it is.
fn judge_step(before: &World, after: &World, act: Act) -> Option<&'static str> {
    if !before.log.only_appended(&after.log) {
        return Some(NOT_AN_APPEND);
    }
    let lowered = before.q.tracks().iter().any(|old| after.q.find_track(old.id).is_some_and(|new| new.cursor < old.cursor));
    (lowered && !matches!(act, Act::Crash { .. })).then_some(CURSOR_LOWERED)
}
