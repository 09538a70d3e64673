//! Rotation and prune. Locks are conditional: a step that finds somebody in its way is no step.

use awa_protocol::ring::{Event, Rotation, SegmentState};

use super::crash::fold;
use super::world::{Config, Mode, Note, Op, RING_LIMIT, World};
use super::{Choice, Step};
use crate::actions::Action;

/// Between the steps of a truncation the server may die, and the transaction fail.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Maintain {
    generation: i64,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Ready,
    Evidence,
    Pruned,
}

impl World {
    pub fn may_rotate(&self, sid: usize) -> bool {
        self.ledger_is_free(sid) && matches!(self.ring.rotation(RING_LIMIT), Rotation::Open { .. })
    }

    pub fn start_rotate(&mut self, sid: usize) -> Op {
        self.begin(sid);
        let xid = self.xid(sid);
        if self.open_next(xid) {
            let tx = self.tx(sid);
            (tx.holds_ledger, tx.sync) = (true, true);
            self.note(sid, Note::Opened);
        }
        Op::Idle
    }

    /// The segments that let a prune take them a step further.
    fn prunable(&self, config: &Config, sid: usize) -> Vec<(i64, SegmentState)> {
        if !self.ledger_is_free(sid) {
            return Vec::new();
        }
        let unlocked = config.broken("prune_takes_no_lock");
        let lets = |generation: i64, state: SegmentState| match state {
            SegmentState::PruneStarted => !self.has_users(sid, generation) && !config.broken("started_prune_forgotten"),
            SegmentState::Sealed => {
                (unlocked || !self.has_writers(sid, generation)) && fold(&self.log, generation).0.is_drained()
            }
            SegmentState::Open => false,
        };
        let order = self.ring.prune_order().map(|segment| (segment.generation, segment.state));
        order.filter(|(generation, state)| lets(*generation, *state)).collect()
    }

    pub fn prune_choices(&self, config: &Config, sid: usize) -> usize {
        self.prunable(config, sid).len()
    }

    pub fn start_prune(&mut self, config: &Config, sid: usize, choice: Choice) -> Step {
        let Some((generation, state)) = self.prunable(config, sid).get(usize::from(choice)).copied() else {
            return (Action::ProveDrained, Op::Idle);
        };
        self.begin(sid);
        let xid = self.xid(sid);
        let tx = self.tx(sid);
        (tx.holds_ledger, tx.sync) = (true, true);
        if state == SegmentState::PruneStarted || config.broken("truncated_before_the_mark") {
            self.lock(sid, generation, Mode::Exclusive);
            return (Action::LockToTruncate, Op::Maintain(Maintain { generation, phase: Phase::Ready }));
        }
        // The proof and the lock that keeps it true to the commit.
        if !config.broken("prune_takes_no_lock") {
            self.lock(sid, generation, Mode::Share);
        }
        let slot = self.ring.find(generation).map_or(0, |segment| segment.slot);
        self.log.append_ledger(xid, generation, slot, Event::PruneStarted);
        self.note(sid, Note::PruneStarted(generation));
        (Action::ProveDrained, Op::Idle)
    }

    pub fn step_maintain(&mut self, sid: usize, mut m: Maintain) -> Step {
        let xid = self.xid(sid);
        match m.phase {
            Phase::Ready => {
                self.cut(m.generation, true);
                m.phase = Phase::Evidence;
                (Action::TruncateReady, Op::Maintain(m))
            }
            Phase::Evidence => {
                self.cut(m.generation, false);
                m.phase = Phase::Pruned;
                (Action::TruncateEvidence, Op::Maintain(m))
            }
            Phase::Pruned => {
                let slot = self.ring.find(m.generation).map_or(0, |segment| segment.slot);
                self.log.append_ledger(xid, m.generation, slot, Event::Pruned);
                self.note(sid, Note::Pruned(m.generation));
                (Action::AppendPruned, Op::Idle)
            }
        }
    }

    /// In place: a rollback does not undo it.
    fn cut(&mut self, generation: i64, ready: bool) {
        let Some(segment) = self.log.segment_mut(generation) else { return };
        if ready {
            segment.rows.clear();
            segment.ready_cut = true;
        } else {
            segment.claims.clear();
            segment.closures.clear();
            segment.evidence_cut = true;
        }
    }
}
