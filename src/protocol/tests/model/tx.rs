//! Transactions and subtransactions: begin, savepoints, the moment of commit or abort, and the callbacks that come after it.
//!
//! As in PostgreSQL the transaction's state changes first; its callbacks run later, one note at a time, and its locks go last.

use awa_protocol::attempt::State;

use crate::claimer::Turn;
use crate::world::{Note, Op, Status, Tx, World, links};

impl World {
    pub fn begin(&mut self, sid: usize) {
        if self.sessions[sid].tx.is_some() {
            return;
        }
        let top = self.new_xid();
        let repeatable_read = self.profile.repeatable_read_permille;
        let snapshot = self.rng.permille(repeatable_read).then_some(self.commits);
        self.sessions[sid].tx = Some(Tx { stack: vec![top], xids: vec![(top, 0)], snapshot, ..Tx::default() });
        self.say(|| format!("s{sid} begin {top} snapshot {snapshot:?}"));
    }

    pub fn savepoint(&mut self, sid: usize) {
        let xid = self.new_xid();
        let tx = self.tx_mut(sid);
        tx.xids.push((xid, tx.stack.len()));
        tx.stack.push(xid);
        self.say(|| format!("s{sid} savepoint {xid}"));
    }

    pub fn release(&mut self, sid: usize) {
        let tx = self.tx_mut(sid);
        let level = tx.stack.len() - 1;
        if level == 0 {
            return;
        }
        tx.stack.pop();
        tx.xids.iter_mut().filter(|(_, l)| *l == level).for_each(|(_, l)| *l = level - 1);
        tx.notes.iter_mut().filter(|(l, _)| *l == level).for_each(|(l, _)| *l = level - 1);
        self.say(|| format!("s{sid} release to level {}", level - 1));
    }

    /// Everything from this level up is aborted; the callbacks run in later steps.
    pub fn rollback(&mut self, sid: usize, level: usize, turn: Option<Turn>) -> Op {
        let gone: Vec<_> = self.tx(sid).xids.iter().filter(|(_, l)| *l >= level).map(|(x, _)| *x).collect();
        for xid in &gone {
            self.xids[*xid as usize] = Status::Aborted;
        }
        self.say(|| format!("s{sid} abort from level {level}: {gone:?}"));
        Op::Undo { level, turn }
    }

    /// An error in the middle of a verb: the innermost subtransaction or everything is rolled back.
    pub fn fail(&mut self, sid: usize, turn: Option<Turn>) -> Op {
        let depth = self.tx(sid).stack.len();
        let level = if depth > 1 && self.rng.permille(600) { depth - 1 } else { 0 };
        self.rollback(sid, level, turn)
    }

    pub fn commit(&mut self, sid: usize) -> Op {
        self.commits += 1;
        let at = self.commits;
        let tx = self.tx(sid);
        let (xids, sync) = (tx.xids.clone(), tx.sync);
        let closes: Vec<_> = tx
            .notes
            .iter()
            .filter_map(|(_, n)| if let Note::Close(_, copy) | Note::Move(.., copy) = n { Some(*copy) } else { None })
            .collect();
        for (xid, _) in &xids {
            self.xids[*xid as usize] = Status::Committed(at);
        }
        if sync || self.rng.permille(300) {
            self.flushed = at;
        }
        for copy in closes {
            let exits = self.exits.get(&copy).map_or(0, |exits| exits.iter().filter(|(x, _)| self.committed(*x)).count());
            if exits != 1 {
                self.violation(format!("copy {copy:?} has {exits} committed exits"));
            }
        }
        let redriven: Vec<_> = self
            .tx(sid)
            .notes
            .iter()
            .filter_map(|(_, n)| if let Note::Supersede(_, copy) = n { Some(*copy) } else { None })
            .collect();
        redriven.into_iter().for_each(|copy| self.check_superseded(copy));
        self.say(|| format!("s{sid} commit {xids:?} sync {sync}"));
        Op::Settle
    }

    pub fn may_prepare(&self, sid: usize) -> bool {
        self.tx(sid).notes.iter().all(|(_, note)| matches!(note, Note::Registered))
    }

    pub fn prepare(&mut self, sid: usize) {
        if let Some(tx) = self.sessions[sid].tx.take() {
            self.say(|| format!("s{sid} prepare {:?}", tx.xids));
            self.prepared.push(tx);
        }
    }

    /// COMMIT or ROLLBACK PREPARED: no callback runs.
    pub fn resolve_prepared(&mut self) {
        if self.prepared.is_empty() {
            return;
        }
        let n = self.rng.below(self.prepared.len());
        let tx = self.prepared.swap_remove(n);
        let status = if self.rng.permille(600) {
            self.commits += 1;
            self.flushed = self.commits;
            Status::Committed(self.commits)
        } else {
            Status::Aborted
        };
        tx.xids.iter().for_each(|(xid, _)| self.xids[*xid as usize] = status);
        self.say(|| format!("prepared {:?} becomes {status:?}", tx.xids));
    }

    /// One step of the abort callbacks: the turn, then the notes, the newest first.
    pub fn step_undo(&mut self, sid: usize, level: usize, turn: Option<Turn>) -> Op {
        if let Some(turn) = turn {
            self.give_back(sid, turn);
            return Op::Undo { level, turn: None };
        }
        let tx = self.tx_mut(sid);
        let found = if crate::broken("undo_oldest_first") {
            tx.notes.iter().position(|(l, _)| *l >= level)
        } else {
            tx.notes.iter().rposition(|(l, _)| *l >= level)
        };
        if let Some((_, note)) = found.and_then(|at| tx.notes.remove(at)) {
            self.undo(sid, note);
            return Op::Undo { level, turn: None };
        }
        let tx = self.tx_mut(sid);
        if level == 0 {
            self.sessions[sid].tx = None;
        } else {
            tx.stack.truncate(level);
            tx.xids.retain(|(_, l)| *l < level);
        }
        Op::Idle
    }

    fn undo(&mut self, sid: usize, note: Note) {
        match note {
            Note::Registered => self.q.deregister(sid as u32),
            Note::Claim(name) => {
                let Some(entry) = self.pool.named(name).copied() else {
                    self.stats.stale_names += 1;
                    return;
                };
                if !self.tx(sid).owns(entry.claim_xid) || entry.state != State::Claimed || entry.close_xid != 0 {
                    self.violation(format!("the abort of a claim of s{sid} meets an entry that is not its own: {entry:?}"));
                }
                self.held.remove(&(entry.job_id, entry.hop));
                self.make_hole(name);
                self.say(|| format!("s{sid} ({}, {}) is a hole", entry.job_id, entry.hop));
            }
            // A scan may have passed the guard: the row has ended all the same.
            Note::Supersede(name, _) if self.pool.named(name).is_none() => self.stats.stale_names += 1,
            Note::Supersede(name, _) => {
                if crate::broken("superseding_guard_becomes_a_hole") {
                    self.make_hole(name);
                } else {
                    self.pool.part(name.partition).free(name.slot);
                }
            }
            Note::Move(old, new, copy) => {
                self.pool.part(old.partition).abandon_move(old, new);
                self.say(|| format!("s{sid} {copy:?} stays"));
            }
            Note::Close(name, copy) => {
                let Some(entry) = self.pool.named(name) else {
                    self.stats.stale_names += 1;
                    return;
                };
                if (entry.job_id, entry.hop) != copy {
                    let text = format!("the abort of an exit of {copy:?} meets another entry: {entry:?}");
                    self.violation(text);
                }
                entry.close_xid = 0;
                entry.closing = None;
                match (entry.state, entry.passed) {
                    (State::Guard, true) => self.make_hole(name),
                    (State::Guard, false) => self.pool.part(name.partition).free(name.slot),
                    _ => {}
                }
                self.say(|| format!("s{sid} exit of {copy:?} is undone"));
            }
        }
    }

    /// One step of the commit callbacks.
    pub fn step_settle(&mut self, sid: usize) -> Op {
        match self.tx_mut(sid).notes.pop_front() {
            Some((_, Note::Close(name, copy))) => {
                match self.pool.named(name) {
                    Some(entry) if (entry.job_id, entry.hop) == copy && entry.close_xid != 0 && entry.state != State::Hole => {}
                    Some(entry) => {
                        let text = format!("the commit of an exit of {copy:?} meets {entry:?}");
                        self.violation(text);
                    }
                    None => self.violation(format!("the commit of an exit of {copy:?} finds no entry")),
                }
                self.pool.part(name.partition).free(name.slot);
                self.held.remove(&copy);
                self.say(|| format!("s{sid} entry of {copy:?} is freed"));
                Op::Settle
            }
            Some((_, Note::Supersede(name, copy))) => {
                let there = self.pool.named(name).is_some_and(|entry| (entry.job_id, entry.hop) == copy);
                if !there {
                    self.violation(format!("the commit of a retry of {copy:?} finds no entry"));
                }
                self.pool.part(name.partition).free(name.slot);
                Op::Settle
            }
            Some((_, Note::Move(old, new, copy))) => {
                let lease = self.pool.named(old).map(|entry| entry.lease);
                if !self.pool.part(old.partition).finish_move(old, new) || lease.is_none() {
                    self.violation(format!("the commit of a carrier of {copy:?} finds no entry"));
                }
                self.held.remove(&copy);
                let lease = lease.unwrap_or(0);
                self.held.insert((copy.0, copy.1 + 1), lease);
                let deadline = self.pool.named(new).map(|entry| entry.deadline);
                if let Some(said) = self.deadlines.get(&lease).filter(|said| deadline != Some(**said)) {
                    self.violation(format!("{copy:?} with lease {lease} was extended to {said}, its copy has {deadline:?}"));
                }
                self.say(|| format!("s{sid} {copy:?} with lease {lease} has moved"));
                Op::Settle
            }
            Some(_) => Op::Settle,
            None => {
                self.sessions[sid].tx = None;
                Op::Idle
            }
        }
    }

    /// Unlinks a hole that is being cancelled. False: a claimer has popped it and not looked at it yet.
    pub fn unlink_hole(&mut self, name: awa_protocol::attempt::EntryRef, priority: u8) -> bool {
        let global = self.pool.global(name);
        let links = links!(self);
        self.q.remove_hole(priority, global, links)
    }
}
