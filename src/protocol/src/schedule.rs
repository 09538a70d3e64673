//! Which task of maintenance runs next, and when: tasks in the order of urgency, each with its pace in ticks.
//!
//! - One step at a time is given out. An urgent task that is due goes first, once; then the others that are due have one step, the one
//!   that waits longest first; then urgent ones again. So no task waits for more than one step of each other one, however long steps take.
//! - A task with more to do is due again at once, up to a number of steps; then it waits for a tick.
//! - A task that fails waits, twice as long each time, up to a minute or its own interval; the others go on.
//! - A task that overruns is throttled (`throttle`): in its cool-down a due time passes without a step.

use heapless::Vec;

use crate::limits::{STEPS_PER_PASS, TASKS};
use crate::throttle::Throttle;

/// Longest pause after failures, unless the task's interval is longer.
pub const BACKOFF_MAX: i64 = 60_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Interval in ticks.
    pub every: u32,
    pub urgent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Has not run yet.
    Idle,
    Ok,
    Throttled,
    CoolingDown,
    Failing,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Ok => "ok",
            Self::Throttled => "throttled",
            Self::CoolingDown => "cooling_down",
            Self::Failing => "failing",
        }
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing more to do now; also: something was in the way.
    Done,
    More,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run a step of the task with this number.
    Run(usize),
    /// Nothing is due before this time.
    SleepUntil(i64),
}

#[derive(Clone, Copy, Debug)]
struct Task {
    pace: Pace,
    due: i64,
    /// Steps since the task was last due by its interval.
    steps: u32,
    failures: u32,
    ran: bool,
    /// Of an urgent task: it had its step, the others have theirs first.
    had_its_turn: bool,
    throttle: Throttle,
}

#[derive(Clone, Debug)]
pub struct Schedule {
    tasks: Vec<Task, TASKS>,
    tick: i64,
}

impl Schedule {
    /// Everything is due at once. `tick` in microseconds.
    pub fn new(paces: impl IntoIterator<Item = Pace>, tick: i64, now: i64) -> Self {
        let mut tasks = Vec::new();
        for pace in paces {
            let task = Task { pace, due: now, steps: 0, failures: 0, ran: false, had_its_turn: false, throttle: Throttle::new() };
            if tasks.push(task).is_err() {
                break;
            }
        }
        Self { tasks, tick: tick.max(1) }
    }

    fn interval_of(&self, task: &Task) -> i64 {
        self.tick.saturating_mul(i64::from(task.pace.every.max(1)))
    }

    /// Another tick holds from now on: nobody waits longer than it says.
    pub fn set_tick(&mut self, tick: i64, now: i64) {
        if self.tick == tick.max(1) {
            return;
        }
        self.tick = tick.max(1);
        for index in 0..self.tasks.len() {
            let Some(task) = self.tasks.get(index) else { break };
            let latest = now.saturating_add(self.interval_of(task));
            if let Some(task) = self.tasks.get_mut(index) {
                task.due = task.due.min(latest);
            }
        }
    }

    /// All tasks are due now, also those that fail or cool down.
    pub fn wake(&mut self, now: i64) {
        for task in &mut self.tasks {
            task.due = task.due.min(now);
            task.throttle.end_cool_down();
        }
    }

    /// After a time in which nothing was to be done: as at first, whatever was then.
    pub fn begin_anew(&mut self, now: i64) {
        for task in &mut self.tasks {
            *task = Task {
                pace: task.pace,
                due: now,
                steps: 0,
                failures: 0,
                ran: false,
                had_its_turn: false,
                throttle: Throttle::new(),
            };
        }
    }

    /// What to do now. Passes over the due times of tasks that cool down.
    pub fn next(&mut self, now: i64) -> Next {
        for index in 0..self.tasks.len() {
            let Some(interval) = self.tasks.get(index).map(|task| self.interval_of(task)) else { break };
            if let Some(task) = self.tasks.get_mut(index).filter(|task| task.due <= now)
                && !task.throttle.admits()
            {
                task.due = now.saturating_add(interval);
            }
        }
        let due = |task: &Task| task.due <= now;
        let urgent = self.tasks.iter().position(|task| due(task) && task.pace.urgent && !task.had_its_turn);
        let longest = || {
            let waiting = self.tasks.iter().enumerate().filter(|(_, task)| due(task) && !task.pace.urgent);
            waiting.min_by_key(|(_, task)| task.due).map(|(index, _)| index)
        };
        let any = || self.tasks.iter().position(due);
        if let Some(index) = urgent.or_else(longest).or_else(any) {
            return Next::Run(index);
        }
        Next::SleepUntil(self.tasks.iter().map(|task| task.due).min().unwrap_or(now.saturating_add(self.tick)))
    }

    /// A step that `next` has given out ended, after so long.
    pub fn ended(&mut self, index: usize, end: End, duration: i64, now: i64) {
        let Some(interval) = self.tasks.get(index).map(|task| self.interval_of(task)) else { return };
        let tick = self.tick;
        if let Some(task) = self.tasks.get_mut(index) {
            task.ran = true;
            task.had_its_turn = task.pace.urgent;
            task.throttle.sample(duration, interval);
            task.steps += 1;
            task.failures = if end == End::Failed { task.failures.saturating_add(1) } else { 0 };
            let pause = match end {
                End::More if task.steps < STEPS_PER_PASS => 0,
                End::More => tick,
                End::Done => interval,
                End::Failed => backoff(interval, task.failures),
            };
            if pause > 0 {
                task.steps = 0;
            }
            task.due = now.saturating_add(pause);
        }
        if !self.tasks.get(index).is_some_and(|task| task.pace.urgent) {
            for task in &mut self.tasks {
                task.had_its_turn = false;
            }
        }
    }

    pub fn state(&self, index: usize) -> State {
        match self.tasks.get(index) {
            Some(task) if task.failures > 0 => State::Failing,
            Some(task) if task.throttle.is_cooling_down() => State::CoolingDown,
            Some(task) if task.throttle.is_throttled() => State::Throttled,
            Some(task) if task.ran => State::Ok,
            _ => State::Idle,
        }
    }

    pub fn due(&self, index: usize) -> i64 {
        self.tasks.get(index).map_or(i64::MAX, |task| task.due)
    }
}

/// The interval, doubled for each failure after the first, up to a minute; never less than the interval.
pub fn backoff(interval: i64, failures: u32) -> i64 {
    let doubled = crate::backoff::delay(interval, BACKOFF_MAX, failures.max(1), 0);
    doubled.max(interval)
}

/// Pause before a maintainer that ended badly is started again: a second, doubled each time, up to a minute.
pub fn restart_pause(failures: u32) -> i64 {
    crate::backoff::delay(1_000_000, BACKOFF_MAX, failures.max(1), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: i64 = 1000;
    const RESCUE: Pace = Pace { every: 1, urgent: true };
    const SLOW: Pace = Pace { every: 5, urgent: false };

    /// Runs steps until the schedule sleeps or `limit` steps were taken; each takes `cost`.
    fn run(schedule: &mut Schedule, now: &mut i64, limit: usize, cost: i64, end: impl Fn(usize) -> End) -> std::vec::Vec<usize> {
        let mut ran = std::vec::Vec::new();
        while ran.len() < limit {
            let Next::Run(index) = schedule.next(*now) else { break };
            *now += cost;
            schedule.ended(index, end(index), cost, *now);
            ran.push(index);
        }
        ran
    }

    #[test]
    fn all_are_due_at_first_in_the_order_of_urgency() {
        let mut schedule = Schedule::new([RESCUE, RESCUE, SLOW, SLOW], TICK, 0);
        assert_eq!(run(&mut schedule, &mut 0, 100, 1, |_| End::Done), [0, 1, 2, 3]);
    }

    #[test]
    fn each_comes_at_its_own_pace() {
        let mut schedule = Schedule::new([RESCUE, SLOW], TICK, 0);
        let mut ran = [0, 0];
        for tick in 0..100 {
            for index in run(&mut schedule, &mut (tick * TICK), 10, 0, |_| End::Done) {
                ran[index] += 1;
            }
        }
        assert_eq!(ran, [100, 20]);
    }

    #[test]
    fn it_sleeps_until_the_next_due_time() {
        let mut schedule = Schedule::new([SLOW, RESCUE], TICK, 0);
        run(&mut schedule, &mut 0, 10, 0, |_| End::Done);
        assert_eq!(schedule.next(10), Next::SleepUntil(TICK));
        assert_eq!(Schedule::new([], TICK, 7).next(7), Next::SleepUntil(7 + TICK));
    }

    #[test]
    fn a_due_rescue_comes_between_the_steps_of_a_slow_task() {
        let mut schedule = Schedule::new([RESCUE, SLOW], TICK, 0);
        // A slow step lasts two ticks: after each of them rescue is due.
        let mut now = 0;
        let mut ran = std::vec::Vec::new();
        for _ in 0..9 {
            let Next::Run(index) = schedule.next(now) else { break };
            now += if index == 1 { 2 * TICK } else { 1 };
            schedule.ended(index, if index == 1 { End::More } else { End::Done }, 1, now);
            ran.push(index);
        }
        assert_eq!(ran, [0, 1, 0, 1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn a_rescue_that_is_always_due_starves_nobody() {
        let mut schedule = Schedule::new([RESCUE, RESCUE, SLOW, SLOW], TICK, 0);
        let ran = run(&mut schedule, &mut 0, 60, 1400, |_| End::More);
        for index in 0..4 {
            let count = ran.iter().filter(|seen| **seen == index).count();
            assert!(count >= 8, "task {index} ran {count} times of {ran:?}");
        }
        // Both rescues run before each step of another task.
        assert!(ran.windows(4).all(|window| window.iter().any(|index| *index < 2)));
    }

    #[test]
    fn slow_tasks_with_more_to_do_take_turns() {
        let mut schedule = Schedule::new([SLOW, SLOW, SLOW], TICK, 0);
        let ran = run(&mut schedule, &mut 0, 9, 1, |_| End::More);
        assert_eq!(ran, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn more_and_more_to_do_ends_at_the_limit() {
        let mut schedule = Schedule::new([SLOW], TICK, 0);
        let mut now = 0;
        let ran = run(&mut schedule, &mut now, 1000, 0, |_| End::More);
        assert_eq!(ran.len(), STEPS_PER_PASS as usize);
        assert_eq!(schedule.next(now), Next::SleepUntil(TICK));
        now += TICK;
        assert_eq!(run(&mut schedule, &mut now, 1000, 0, |_| End::More).len(), STEPS_PER_PASS as usize);
    }

    #[test]
    fn a_failing_task_waits_longer_each_time_and_the_others_go_on() {
        let second = 1_000_000;
        let mut schedule = Schedule::new([RESCUE, SLOW], second, 0);
        let fails = |index| if index == 1 { End::Failed } else { End::Done };
        run(&mut schedule, &mut 0, 10, 0, fails);
        assert_eq!((schedule.state(0), schedule.state(1)), (State::Ok, State::Failing));
        assert_eq!(schedule.due(1), 5 * second);
        run(&mut schedule, &mut (5 * second), 10, 0, fails);
        assert_eq!(schedule.due(1), 15 * second);
        for _ in 0..100 {
            let due = schedule.due(1);
            run(&mut schedule, &mut due.clone(), 10, 0, fails);
            assert!(schedule.due(1) - due <= BACKOFF_MAX);
            assert_eq!(schedule.state(0), State::Ok);
        }
        let due = schedule.due(1);
        run(&mut schedule, &mut due.clone(), 10, 0, |_| End::Done);
        assert_eq!((schedule.state(1), schedule.due(1)), (State::Ok, due + 5 * second));
    }

    #[test]
    fn the_pause_after_failures_is_never_shorter_than_the_interval() {
        assert_eq!(backoff(3600 * BACKOFF_MAX, 1), 3600 * BACKOFF_MAX);
        assert_eq!(backoff(1_000_000, 4), 8_000_000);
        assert_eq!(backoff(1_000_000, u32::MAX), BACKOFF_MAX);
    }

    #[test]
    fn a_shorter_tick_holds_at_once() {
        let mut schedule = Schedule::new([SLOW], 1_000_000, 0);
        run(&mut schedule, &mut 0, 1, 0, |_| End::Done);
        assert_eq!(schedule.due(0), 5_000_000);
        schedule.set_tick(10, 100);
        assert_eq!(schedule.due(0), 150);
        schedule.set_tick(1_000_000, 120);
        assert_eq!(schedule.due(0), 150);
    }

    #[test]
    fn a_wake_makes_everything_due() {
        let mut schedule = Schedule::new([RESCUE, SLOW, SLOW], TICK, 0);
        run(&mut schedule, &mut 0, 10, 0, |index| if index == 1 { End::Failed } else { End::Done });
        schedule.wake(1);
        assert_eq!(run(&mut schedule, &mut 1, 10, 0, |_| End::Done), [0, 1, 2]);
    }

    #[test]
    fn after_a_time_of_idleness_nothing_is_held_against_a_task() {
        let mut schedule = Schedule::new([RESCUE, SLOW], TICK, 0);
        let mut now = 0;
        run(&mut schedule, &mut now, 3, 2 * TICK, |_| End::More);
        for _ in 0..5 {
            now = schedule.due(1);
            run(&mut schedule, &mut now, 10, 1, |index| if index == 1 { End::Failed } else { End::Done });
        }
        assert_eq!(schedule.state(1), State::Failing);
        schedule.begin_anew(now);
        assert_eq!((schedule.state(0), schedule.state(1)), (State::Idle, State::Idle));
        assert_eq!(run(&mut schedule, &mut now, 10, 1, |index| if index == 1 { End::Failed } else { End::Done }), [0, 1]);
        assert_eq!(schedule.due(1), now + 5 * TICK);
    }

    #[test]
    fn a_task_that_overruns_skips_due_times_and_comes_back() {
        let mut schedule = Schedule::new([RESCUE], TICK, 0);
        let mut now = 0;
        run(&mut schedule, &mut now, 3, 2 * TICK, |_| End::More);
        assert_eq!(schedule.state(0), State::CoolingDown);
        let mut skipped = 0;
        while let Next::SleepUntil(due) = schedule.next(now) {
            now = due;
            skipped += 1;
        }
        assert_eq!((skipped, schedule.state(0)), (4, State::Throttled));
        for _ in 0..3 {
            run(&mut schedule, &mut now, 1, 1, |_| End::More);
        }
        assert_eq!(schedule.state(0), State::Ok);
    }

    #[test]
    fn the_states_have_names() {
        assert_eq!(Schedule::new([SLOW], TICK, 0).state(0), State::Idle);
        let names = [State::Idle, State::Ok, State::Throttled, State::CoolingDown, State::Failing].map(State::name);
        assert_eq!(names, ["idle", "ok", "throttled", "cooling_down", "failing"]);
    }

    #[test]
    fn a_maintainer_is_started_again_after_a_second_and_a_minute_at_most() {
        assert_eq!([1, 2, 3, 6, 7, 1000].map(restart_pause), [1, 2, 4, 32, 60, 60].map(|seconds| seconds * 1_000_000));
    }
}
