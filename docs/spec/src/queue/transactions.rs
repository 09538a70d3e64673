//! Commit and abort. The transaction's state changes first; its callbacks run later, one note a step; its locks go last.

use awa_protocol::attempt::{EntryRef, State};

use super::Step;
use super::claimer::Turn;
use super::log::{Copy, Status};
use super::world::{Config, Note, Op, World};
use crate::actions::Action;
use crate::properties::FOREIGN_ENTRY;

impl World {
    pub fn commit(&mut self, sid: usize) -> Step {
        let xid = self.xid(sid);
        let tx = self.tx(sid);
        let (sync, enqueued) = (tx.sync, std::mem::take(&mut tx.enqueued));
        // The commit of a claim changes nothing that matters: its transaction is looked up when somebody asks (ADR 012).
        tx.notes.retain(|note| !matches!(note, Note::Claim { .. }));
        let settled = tx.notes.is_empty();
        self.log.set_status(xid, Status::Committed { flushed: sync });
        if sync {
            self.log.flush();
        }
        self.acknowledged.extend(enqueued);
        self.acknowledged.sort_unstable();
        if settled {
            self.sessions[sid].tx = None;
            return (Action::Commit, Op::Idle);
        }
        (Action::Commit, Op::Settle)
    }

    /// One step of the commit callbacks.
    pub fn step_settle(&mut self, sid: usize) -> Step {
        let notes = &mut self.tx(sid).notes;
        let note = if notes.is_empty() { None } else { Some(notes.remove(0)) };
        if let Some(note) = note {
            self.settle(note);
        }
        if self.tx(sid).notes.is_empty() {
            self.sessions[sid].tx = None;
            return (Action::OnCommit, Op::Idle);
        }
        (Action::OnCommit, Op::Settle)
    }

    fn settle(&mut self, note: Note) {
        match note {
            Note::Claim { .. } => {}
            Note::Close(name, copy) | Note::Guard { name, copy, .. } => {
                if !self.is_of(name, copy) {
                    self.violate(FOREIGN_ENTRY);
                }
                self.pool.part().free(name.slot);
                self.release(copy);
            }
            Note::Move { old, new, copy } => {
                let lease = self.pool.named(old).map(|entry| entry.lease);
                if !self.pool.part().finish_move(old, new) || lease.is_none() {
                    self.violate(FOREIGN_ENTRY);
                }
                self.release(copy);
                self.hold((copy.0, copy.1 + 1), lease.unwrap_or(0));
            }
            Note::Opened => self.follow_ledger(),
            Note::PruneStarted(generation) => {
                self.follow_ledger();
                self.q.forget_generation(generation);
            }
            Note::Pruned(generation) => {
                self.follow_ledger();
                self.q.forget_generation(generation);
                self.forget_segment(generation);
            }
        }
    }

    fn follow_ledger(&mut self) {
        match self.log.ring() {
            Some(ring) => self.ring = ring,
            None => self.violate(crate::properties::OPEN_TRUNCATED),
        }
    }

    pub fn forget_segment(&mut self, generation: i64) {
        self.flags.retain(|of| *of != generation);
        self.log.segments.retain(|segment| segment.generation != generation);
    }

    fn is_of(&mut self, name: EntryRef, copy: Copy) -> bool {
        // Through the crate's own check of names, so that its rules are what is tested.
        self.pool.part().named(name).is_some_and(|entry| (entry.job_id, entry.hop) == copy)
    }

    /// An error, a cancel, the end of the process: whatever it was doing.
    pub fn abort(&mut self, sid: usize) {
        let xid = self.xid(sid);
        self.log.set_status(xid, Status::Aborted);
        let turn = match std::mem::take(&mut self.sessions[sid].op) {
            Op::Claim(claim) => claim.into_turn(),
            _ => None,
        };
        self.tx(sid).enqueued.clear();
        self.sessions[sid].op = Op::Undo { turn };
    }

    /// One step of the abort callbacks: what was not finished, the turn, then the notes, the newest first.
    pub fn step_undo(&mut self, config: &Config, sid: usize, turn: Option<Turn>) -> Step {
        if self.tx(sid).registered {
            self.tx(sid).registered = false;
            if !config.broken("registration_is_kept") {
                self.q.deregister(sid as u32);
            }
            return (Action::OnAbort, Op::Undo { turn });
        }
        let unpublished = matches!(self.tx(sid).notes.last(), Some(Note::Claim { published: false, .. }));
        if unpublished && !config.broken("unpublished_becomes_a_hole") {
            if let Some(Note::Claim { name, .. }) = self.tx(sid).notes.pop() {
                self.pool.part().free(name.slot);
            }
            return (Action::DropUnpublished, Op::Undo { turn });
        }
        if let Some(turn) = turn {
            self.end_turn(config, sid, turn);
            return (Action::EndTurn, Op::Undo { turn: None });
        }
        let notes = &mut self.tx(sid).notes;
        let oldest = config.broken("undo_oldest_first") && !notes.is_empty();
        let note = if oldest { Some(notes.remove(0)) } else { notes.pop() };
        if let Some(note) = note {
            self.undo(sid, note);
        }
        if self.tx(sid).notes.is_empty() {
            self.sessions[sid].tx = None;
            return (Action::OnAbort, Op::Idle);
        }
        (Action::OnAbort, Op::Undo { turn: None })
    }

    fn undo(&mut self, sid: usize, note: Note) {
        let xid = self.xid(sid);
        match note {
            Note::Claim { name, copy, .. } => {
                let own = self
                    .pool
                    .named(name)
                    .is_some_and(|entry| entry.claim_xid == xid && entry.state == State::Claimed && entry.close_xid == 0);
                if !own {
                    self.violate(FOREIGN_ENTRY);
                }
                self.release(copy);
                self.give_back(name);
            }
            Note::Close(name, copy) => {
                if !self.is_of(name, copy) {
                    self.violate(FOREIGN_ENTRY);
                }
                if let Some(entry) = self.pool.named(name) {
                    entry.close_xid = 0;
                    entry.closing = None;
                }
            }
            Note::Guard { name, was_hole, .. } => match self.pool.named(name).map(|guard| guard.passed) {
                Some(passed) if passed || was_hole => self.give_back(name),
                Some(_) => self.pool.part().free(name.slot),
                None => {}
            },
            Note::Move { old, new, .. } => {
                self.pool.part().abandon_move(old, new);
            }
            // The tables of a new slot go with the transaction that made them.
            Note::Opened => {
                let mine = self.log.ledger.iter().find(|(xmin, _)| *xmin == xid).map(|(_, row)| row.generation);
                if let Some(generation) = mine {
                    self.forget_segment(generation);
                }
            }
            Note::PruneStarted(_) | Note::Pruned(_) => {}
        }
    }
}
