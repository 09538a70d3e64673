//! Does a history keep the contract? Each rule takes what is certain only: where answers were lost or calls overlapped, it allows all that
//! could have been.

mod order;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::record::{Beside, Call, Did, Fate, Final, Handed, History, NewJob, Span, Tick, Word};

/// A session that was killed may take so many ticks until its transaction is over.
const DYING: Tick = 500;

/// One thing that a call did to one job.
#[derive(Clone, Debug)]
struct Fact<T> {
    at: Span,
    fate: Fate,
    /// Of its transaction, or of the rollback to a savepoint that undid it.
    end: Span,
    transaction: usize,
    single: bool,
    what: T,
}

#[derive(Clone, Debug)]
struct Taken {
    handed: Handed,
    mortal: bool,
    in_order: bool,
}

#[derive(Clone, Copy, Debug)]
struct End {
    lease: i64,
    word: Word,
}

/// All that is known of one job.
#[derive(Default)]
struct Story {
    enqueued: Option<Fact<NewJob>>,
    claims: Vec<Fact<Taken>>,
    ends: Vec<Fact<End>>,
    cancels: Vec<Fact<()>>,
    redrives: Vec<Fact<()>>,
    deletions: Vec<Fact<()>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub jobs: usize,
    pub claims: usize,
    pub exits: usize,
    pub refusals: usize,
    /// Pairs of jobs of which the first was enqueued first and had to come out first.
    pub ordered_pairs: usize,
    /// Jobs whose state at the end follows from the history.
    pub explained: usize,
}

struct Checker<'h> {
    history: &'h History,
    stories: BTreeMap<i64, Story>,
    violations: Vec<String>,
    tally: Tally,
}

/// Every violation found, and what was looked at.
pub fn check(history: &History, shown: &Final) -> (Vec<String>, Tally) {
    let mut checker = Checker { history, stories: BTreeMap::new(), violations: Vec::new(), tally: Tally::default() };
    checker.read();
    checker.names_are_unique();
    let stories = std::mem::take(&mut checker.stories);
    for (job_id, story) in &stories {
        let found = checker.judge(story, shown.jobs.get(job_id).map(|(state, _)| state.as_str()));
        checker.violations.extend(found.into_iter().map(|what| format!("job {job_id}: {what}; {}", story.tell())));
    }
    checker.nothing_is_invented(&stories, shown);
    checker.ordered(&stories);
    (checker.violations, checker.tally)
}

impl<'h> Checker<'h> {
    fn read(&mut self) {
        for (number, transaction) in self.history.transactions.iter().enumerate() {
            for call in &transaction.calls {
                let (fate, end) = match call.undone {
                    Some(tick) => (Fate::No, Span { from: tick, to: tick }),
                    None => (transaction.fate, transaction.end),
                };
                let fact = Fact { at: call.at, fate, end, transaction: number, single: transaction.single, what: () };
                self.read_call(call, &fact);
            }
        }
    }

    fn read_call(&mut self, call: &Call, fact: &Fact<()>) {
        let stories = &mut self.stories;
        match &call.did {
            Did::Enqueued(jobs) => {
                for job in jobs {
                    stories.entry(job.job_id).or_default().enqueued = Some(fact.with(job.clone()));
                }
            }
            Did::Claimed { jobs, mortal, in_order } => {
                for handed in jobs {
                    let taken = Taken { handed: handed.clone(), mortal: *mortal, in_order: *in_order };
                    stories.entry(handed.job_id).or_default().claims.push(fact.with(taken));
                }
            }
            Did::Ended { job_id, lease, word } => stories.entry(*job_id).or_default().ends.push(fact.with(End { lease: *lease, word: *word })),
            Did::Cancelled { job_id } => stories.entry(*job_id).or_default().cancels.push(fact.clone()),
            Did::Redriven { job_id } => stories.entry(*job_id).or_default().redrives.push(fact.clone()),
            Did::Deleted { job_id } => stories.entry(*job_id).or_default().deletions.push(fact.clone()),
        }
    }

    /// No lease is given twice, not even one of a claim that was rolled back; a job is one token.
    fn names_are_unique(&mut self) {
        let (mut leases, mut tokens) = (BTreeMap::new(), BTreeMap::new());
        let mut faults = Vec::new();
        for (job_id, story) in &mut self.stories {
            story.claims.sort_by_key(|claim| claim.at.to);
            self.tally.jobs += 1;
            self.tally.claims += story.claims.len();
            for claim in &story.claims {
                let handed = &claim.what.handed;
                if let Some(other) = leases.insert(handed.lease, *job_id) {
                    faults.push(format!("lease {} was given to jobs {other} and {job_id}", handed.lease));
                }
                if *tokens.entry(handed.token).or_insert(*job_id) != *job_id {
                    faults.push(format!("token {} came out as two jobs, one of them {job_id}", handed.token));
                }
            }
            if let Some(new) = &story.enqueued
                && *tokens.entry(new.what.token).or_insert(*job_id) != *job_id
            {
                faults.push(format!("token {} is two jobs, one of them {job_id}", new.what.token));
            }
        }
        self.violations.extend(faults);
    }

    fn judge(&mut self, story: &Story, state: Option<&str>) -> Vec<String> {
        let mut faults = Vec::new();
        faults.extend(story.claims.iter().filter_map(|claim| self.claim_fault(story, claim)));
        for (n, claim) in story.claims.iter().enumerate() {
            for other in story.claims.iter().skip(n + 1) {
                if claim.at.to.max(other.at.to) < self.release(story, claim).min(self.release(story, other)) {
                    faults.push(format!("leases {} and {} were held at once", claim.what.handed.lease, other.what.handed.lease));
                }
            }
        }
        faults.extend(story.ends.iter().filter_map(|end| self.end_fault(story, end)));
        faults.extend(story.double_exits());
        faults.extend(self.attempts(story));
        faults.extend(self.last_state(story, state));
        faults
    }

    fn beside(&self, what: Beside) -> impl Iterator<Item = Span> + '_ {
        self.history.beside.iter().filter(move |(other, _)| *other == what).map(|(_, span)| *span)
    }

    /// May a claim whose answer was lost have taken a job between these?
    fn has_lost(&self, since: Tick, until: Tick) -> bool {
        self.beside(Beside::LostClaim).any(|span| span.to + DYING > since && span.from < until)
    }

    /// Until when the attempt was certainly held by its claimer: the first thing that may have ended it.
    fn release(&self, story: &Story, claim: &Fact<Taken>) -> Tick {
        // It may have been handed out as soon as it was asked for.
        let since = claim.at.from;
        match claim.fate {
            Fate::No => return claim.end.from,
            Fate::Maybe => return claim.at.to,
            Fate::Yes => {}
        }
        let lease = claim.what.handed.lease;
        let ends = story.ends.iter().filter(|end| end.what.lease == lease && end.what.word.is_exit() && end.fate != Fate::No);
        let cancels = story.cancels.iter().filter(|cancel| cancel.fate != Fate::No && cancel.at.to > since);
        let rescues = self.beside(Beside::Rescue).filter(|span| claim.what.mortal && span.to > since);
        let crashes = self.beside(Beside::Crash).filter(|span| claim.single && span.to > since);
        let ticks = ends.map(|end| end.at.from).chain(cancels.map(|cancel| cancel.at.from));
        ticks.chain(rescues.chain(crashes).map(|span| span.from)).min().unwrap_or(Tick::MAX)
    }

    /// Only what was enqueued comes out, not before its commit, and not after its end unless somebody had it tried again.
    fn claim_fault(&self, story: &Story, claim: &Fact<Taken>) -> Option<String> {
        let lease = claim.what.handed.lease;
        match &story.enqueued {
            Some(new) if new.fate == Fate::No => return Some(format!("lease {lease}: its enqueue was rolled back")),
            Some(new) if new.end.from > claim.at.to => return Some(format!("lease {lease}: given before the enqueue was committed")),
            None if self.beside(Beside::LostEnqueue).next().is_none() => return Some(format!("lease {lease}: nobody has enqueued the job")),
            _ => {}
        }
        if story.deletions.iter().any(|gone| gone.fate == Fate::Yes && gone.end.to < claim.at.from) {
            return Some(format!("lease {lease}: given after the job was deleted"));
        }
        let may_live_again = |since: Tick| {
            story.redrives.iter().any(|again| again.fate != Fate::No && again.end.to > since && again.end.from < claim.at.to)
        };
        let over = story.terminal_ends().into_iter().find(|end| end.to < claim.at.from && !may_live_again(end.from));
        over.map(|_| format!("lease {lease}: given after the end of the job"))
    }

    /// What was refused had to be, and what was accepted might be.
    fn end_fault(&mut self, story: &Story, end: &Fact<End>) -> Option<String> {
        let lease = end.what.lease;
        let claim = story.claims.iter().find(|claim| claim.what.handed.lease == lease)?;
        let same_transaction = claim.transaction == end.transaction;
        match end.what.word {
            Word::Already => {
                let before = |other: &&Fact<End>| {
                    other.transaction == end.transaction && other.what.lease == lease && other.what.word.is_exit() && (other.at == end.at || other.at.to < end.at.from)
                };
                let standing = story.ends.iter().filter(before).any(|other| other.fate != Fate::No || other.end.from > end.at.from);
                (!standing).then(|| format!("lease {lease}: \"already\", but this transaction had not ended it"))
            }
            Word::Stale => {
                self.tally.refusals += 1;
                let settled = same_transaction || (claim.fate == Fate::Yes && claim.end.to < end.at.from);
                let good = settled && claim.at.to < end.at.from && self.release(story, claim) > end.at.to;
                good.then(|| format!("lease {lease}: a good lease was refused"))
            }
            Word::Conflict | Word::Uncommitted => None,
            // Its answer was lost: it may have been refused.
            _ if end.fate == Fate::Maybe => None,
            Word::Completed | Word::Failed | Word::Retry | Word::Snooze => {
                self.tally.exits += 1;
                let void = claim.fate == Fate::No && claim.end.to < end.at.from;
                let other = |other: &Fact<End>| other.what.lease == lease && other.what.word.is_exit() && other.fate == Fate::Yes;
                let ended = story.ends.iter().any(|before| other(before) && before.end.to < end.at.from);
                let cancelled = |cancel: &Fact<()>| cancel.fate == Fate::Yes && cancel.at.from > claim.at.to && cancel.end.to < end.at.from;
                let over = ended || story.cancels.iter().any(cancelled);
                let why = if void { "whose claim was rolled back" } else { "of an attempt that was over" };
                (void || over).then(|| format!("lease {lease}: a lease was accepted {why}"))
            }
        }
    }

    /// Each claim follows from the end of the attempt before, and has the number that follows.
    fn attempts(&self, story: &Story) -> Vec<String> {
        let certain: Vec<&Fact<Taken>> = story.claims.iter().filter(|claim| claim.fate == Fate::Yes).collect();
        if story.is_vague() {
            return Vec::new();
        }
        let mut faults = Vec::new();
        let since = story.enqueued.as_ref().map_or(0, |new| new.at.from);
        if let Some(first) = certain.first().filter(|first| first.what.handed.attempt != 1 && !self.has_lost(since, first.at.to)) {
            faults.push(format!("the first attempt is number {}", first.what.handed.attempt));
        }
        for pair in certain.windows(2) {
            let [before, after] = pair else { continue };
            let (last, next) = (before.what.handed.attempt, after.what.handed.attempt);
            let mut possible = Vec::new();
            for end in story.ends.iter().filter(|end| end.fate == Fate::Yes && end.what.lease == before.what.handed.lease) {
                possible.extend(match end.what.word {
                    Word::Retry => Some(last + 1),
                    Word::Snooze => Some(last),
                    _ => None,
                });
            }
            let between = |span: Span| span.to > before.at.from && span.from < after.at.to;
            if before.what.mortal && self.beside(Beside::Rescue).any(between) {
                possible.push(last + 1);
            }
            if before.single && self.beside(Beside::Crash).any(between) {
                possible.push(last);
            }
            if story.redrives.iter().any(|again| between(again.end)) {
                possible.push(1);
            }
            if !possible.contains(&next) && !self.has_lost(before.at.to, after.at.to) {
                faults.push(format!("attempt {next} follows attempt {last}, where {possible:?} might"));
            }
        }
        faults
    }

    /// Nothing is lost, and the state at the end is that of the last thing that happened.
    fn last_state(&mut self, story: &Story, state: Option<&str>) -> Option<String> {
        let new = story.enqueued.as_ref()?;
        if story.is_vague() || new.fate != Fate::Yes {
            let invented = new.fate == Fate::No && state.is_some();
            return invented.then(|| format!("shown as {state:?}, but its enqueue was rolled back"));
        }
        let ends = story.terminal_ends();
        let lives = 1 + story.redrives.iter().filter(|again| again.fate == Fate::Yes).count();
        let deleted = story.deletions.iter().filter(|gone| gone.fate == Fate::Yes).count();
        let is_open = |claim: &&Fact<Taken>| {
            let ended = |end: &Fact<End>| end.fate == Fate::Yes && end.what.lease == claim.what.handed.lease && end.what.word.is_exit();
            let cancelled = |cancel: &Fact<()>| cancel.fate == Fate::Yes && cancel.end.to > claim.at.to;
            claim.fate == Fate::Yes && !story.ends.iter().any(ended) && !story.cancels.iter().any(cancelled)
        };
        let open: Vec<&Fact<Taken>> = story.claims.iter().filter(is_open).collect();
        let crash_after = |claim: &Fact<Taken>| claim.single && self.beside(Beside::Crash).any(|span| span.to > claim.at.to);
        if story.claims.iter().any(|claim| claim.what.mortal) || open.iter().any(|claim| crash_after(claim)) {
            // Rescue tells nobody which attempts it has ended, and a crash not which claims it has lost.
            let lost = state.is_none() && deleted == 0 && !story.has_end(Word::Completed);
            return lost.then(|| "it is gone".to_owned());
        }
        if ends.len() + 1 < lives || ends.len() > lives || deleted > 1 {
            return Some(format!("{} ends of {lives} lives, deleted {deleted} times", ends.len()));
        }
        self.tally.explained += 1;
        let expected: &[Option<&str>] = if deleted == 1 {
            &[None]
        } else if ends.len() == lives {
            match story.last_end() {
                Some(Some(Word::Completed)) => &[Some("completed"), None],
                Some(Some(_)) => &[Some("failed"), Some("dead_lettered")],
                _ => &[Some("cancelled")],
            }
        } else if !open.is_empty() {
            &[Some("running")]
        } else if self.has_lost(new.at.from, Tick::MAX) {
            &[Some("available"), Some("scheduled"), Some("running"), Some("failed"), Some("dead_lettered")]
        } else {
            &[Some("available"), Some("scheduled")]
        };
        (!expected.contains(&state)).then(|| format!("shown as {state:?}, where {expected:?} is right"))
    }

    /// Every job that is shown was enqueued, and is shown once.
    fn nothing_is_invented(&mut self, stories: &BTreeMap<i64, Story>, shown: &Final) {
        self.violations.extend(shown.shown_twice.iter().map(|job_id| format!("job {job_id} is shown twice")));
        let lost_enqueues = self.beside(Beside::LostEnqueue).next().is_some();
        for (job_id, (state, token)) in &shown.jobs {
            let known = stories.get(job_id).and_then(|story| story.enqueued.as_ref());
            match known {
                Some(new) if new.what.token != *token => {
                    self.violations.push(format!("job {job_id} has token {token}, not {}", new.what.token));
                }
                None if !lost_enqueues => self.violations.push(format!("job {job_id} is {state}, and nobody has enqueued it")),
                _ => {}
            }
        }
    }
}

impl<T> Fact<T> {
    fn with<U>(&self, what: U) -> Fact<U> {
        Fact { at: self.at, fate: self.fate, end: self.end, transaction: self.transaction, single: self.single, what }
    }
}

impl Story {
    /// Some change of it may or may not have happened.
    fn is_vague(&self) -> bool {
        let maybe = |fate: Fate| fate == Fate::Maybe;
        self.enqueued.as_ref().is_none_or(|new| maybe(new.fate))
            || self.claims.iter().any(|claim| maybe(claim.fate))
            || self.ends.iter().any(|end| end.what.word.is_exit() && maybe(end.fate))
            || [&self.cancels, &self.redrives, &self.deletions].iter().any(|facts| facts.iter().any(|fact| maybe(fact.fate)))
    }

    /// Spans of the commits of ends that hold.
    fn terminal_ends(&self) -> Vec<Span> {
        let ends = self.ends.iter().filter(|end| end.fate == Fate::Yes && end.what.word.is_terminal()).map(|end| end.end);
        ends.chain(self.cancels.iter().filter(|cancel| cancel.fate == Fate::Yes).map(|cancel| cancel.end)).collect()
    }

    fn has_end(&self, word: Word) -> bool {
        self.ends.iter().any(|end| end.fate == Fate::Yes && end.what.word == word)
    }

    /// How the last life ended: by a word, or (`None` inside) by a cancel.
    fn last_end(&self) -> Option<Option<Word>> {
        let ends = self.ends.iter().filter(|end| end.fate == Fate::Yes && end.what.word.is_terminal());
        let cancels = self.cancels.iter().filter(|cancel| cancel.fate == Fate::Yes).map(|cancel| (cancel.end.to, None));
        ends.map(|end| (end.end.to, Some(end.what.word))).chain(cancels).max_by_key(|(tick, _)| *tick).map(|(_, word)| word)
    }

    fn double_exits(&self) -> Vec<String> {
        let mut seen = BTreeMap::new();
        let certain = self.ends.iter().filter(|end| end.fate == Fate::Yes && end.what.word.is_exit());
        certain
            .filter_map(|end| {
                let before = seen.insert(end.what.lease, end.what.word)?;
                Some(format!("lease {} ended twice, {before:?} and {:?}", end.what.lease, end.what.word))
            })
            .collect()
    }

    fn tell(&self) -> String {
        let mut lines: Vec<(Tick, String)> = Vec::new();
        let mut add = |at: Span, fate: Fate, end: Span, what: String| {
            lines.push((at.from, format!("{}..{} {what} ({fate:?} at {}..{})", at.from, at.to, end.from, end.to)));
        };
        if let Some(new) = &self.enqueued {
            add(new.at, new.fate, new.end, format!("enqueued {:?}", new.what));
        }
        for claim in &self.claims {
            add(claim.at, claim.fate, claim.end, format!("claimed {:?}", claim.what.handed));
        }
        for end in &self.ends {
            add(end.at, end.fate, end.end, format!("{:?} with lease {}", end.what.word, end.what.lease));
        }
        for (facts, what) in [(&self.cancels, "cancelled"), (&self.redrives, "tried again"), (&self.deletions, "deleted")] {
            for fact in facts {
                add(fact.at, fact.fate, fact.end, what.to_owned());
            }
        }
        lines.sort();
        lines.into_iter().map(|(_, line)| format!("\n      {line}")).collect()
    }
}
