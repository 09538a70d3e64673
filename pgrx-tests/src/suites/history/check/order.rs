//! Jobs of a lane come out in the order in which they went in. Claimers that are at work at once may pass each other, so only a claim that
//! met no other is judged: whatever was committed before it, and nobody had touched, had to come before what was enqueued later.

use std::collections::BTreeMap;

use super::{Checker, DYING, Fact, Story, Taken};
use crate::suites::history::record::{Beside, Did, Fate, NewJob, Span, Tick};

struct Waiting<'s> {
    new: &'s Fact<NewJob>,
    job_id: i64,
    /// When anybody first wanted anything of it.
    touched_at: Tick,
    first_claim: Option<&'s Fact<Taken>>,
}

impl Checker<'_> {
    pub(super) fn ordered(&mut self, stories: &BTreeMap<i64, Story>) {
        let mut lanes: BTreeMap<(usize, i32), Vec<Waiting<'_>>> = BTreeMap::new();
        for (job_id, story) in stories {
            let Some(new) = story.enqueued.as_ref().filter(|new| !new.what.timed && new.fate == Fate::Yes) else { continue };
            let claims = story.claims.iter().map(|claim| claim.at.from);
            let cancels = story.cancels.iter().map(|cancel| cancel.at.from);
            let touched_at = claims.chain(cancels).min().unwrap_or(Tick::MAX);
            let first_claim = story.claims.first().filter(|claim| claim.at.from == touched_at);
            lanes.entry((new.what.queue, new.what.priority)).or_default().push(Waiting { new, job_id: *job_id, touched_at, first_claim });
        }
        let busy = self.busy();
        for lane in lanes.into_values() {
            self.lane_in_order(lane, &busy);
        }
    }

    /// Calls that may move a cursor or have jobs in hand.
    fn busy(&self) -> Vec<Span> {
        let calls = self.history.transactions.iter().flat_map(|transaction| &transaction.calls);
        let claims = calls.filter(|call| matches!(call.did, Did::Claimed { .. })).map(|call| call.at);
        let others = self.history.beside.iter().filter_map(|(what, span)| match what {
            Beside::LostClaim | Beside::LostEnqueue | Beside::Killed => Some(Span { from: span.from, to: span.to + DYING }),
            Beside::Carry | Beside::Rebuild | Beside::Crash => Some(*span),
            Beside::Rescue => None,
        });
        let mut all: Vec<Span> = claims.chain(others).collect();
        all.sort_by_key(|span| span.from);
        all
    }

    fn lane_in_order(&mut self, mut lane: Vec<Waiting<'_>>, busy: &[Span]) {
        lane.sort_by_key(|job| job.new.end.to);
        let carries: Vec<Span> = self.beside(Beside::Carry).collect();
        for later in &lane {
            let Some(claim) = later.first_claim.filter(|claim| claim.what.in_order && is_alone(claim.at, busy)) else { continue };
            // Everything that was committed before the later one was asked for.
            for earlier in lane.iter().take_while(|job| job.new.end.to < later.new.at.from) {
                let carried = carries.iter().any(|carry| carry.to > earlier.new.at.from && carry.from < claim.at.to);
                self.tally.ordered_pairs += 1;
                let lost = self.has_lost(earlier.new.at.from, claim.at.to);
                if carried || lost || earlier.touched_at < claim.at.to {
                    continue;
                }
                self.violations.push(format!(
                    "job {} (enqueued at {:?}) was left behind by job {} (enqueued at {:?}), claimed at {:?}",
                    earlier.job_id, earlier.new.at, later.job_id, later.new.at, claim.at
                ));
            }
        }
    }
}

/// No other call that takes jobs overlaps this one.
fn is_alone(at: Span, busy: &[Span]) -> bool {
    !busy.iter().any(|other| *other != at && other.from < at.to && other.to > at.from)
}
