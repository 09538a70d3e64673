//! The durable part: transactions, the tables of each segment, the ledger. It can only be appended to, or truncated by segment.

use awa_protocol::lane::Position;
use awa_protocol::lifecycle::Outcome;
use awa_protocol::ring::{Event, LedgerRow, Ring};

/// (job_id, hop)
pub type Copy = (i64, i32);
pub type Xid = u64;

/// Transactions of session s have the numbers from `FIRST + s * EACH`: so that the order in which they begin makes no other state.
const FIRST: u64 = 64;
const EACH: u64 = 64;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Status {
    Running,
    /// What is not flushed may be lost by a crash.
    Committed {
        flushed: bool,
    },
    Aborted,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Row {
    pub lane: i32,
    pub position: Position,
    pub xmin: Xid,
    pub job: i64,
    pub hop: i32,
    pub run_at: i64,
    pub attempt: i16,
}

impl Row {
    pub fn copy(&self) -> Copy {
        (self.job, self.hop)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Closure {
    pub xmin: Xid,
    pub copy: Copy,
    pub outcome: Outcome,
    /// It carries a tombstone.
    pub unclaimed: bool,
}

/// The four tables of a slot. Rows are kept in order: who appended first makes no other state.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Segment {
    pub generation: i64,
    pub slot: i32,
    pub rows: Vec<Row>,
    pub claims: Vec<(Xid, Copy, i64)>,
    pub closures: Vec<Closure>,
    pub ready_cut: bool,
    pub evidence_cut: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Log {
    pub ledger: Vec<(Xid, LedgerRow)>,
    pub segments: Vec<Segment>,
    /// By session, in the order in which they began.
    pub xids: Vec<Vec<Status>>,
}

/// Inserts behind all that sort before it; equal ones stay side by side.
fn insert_sorted<T, K: Ord>(rows: &mut Vec<T>, row: T, key: impl Fn(&T) -> K) {
    let wanted = key(&row);
    let at = rows.partition_point(|other| key(other) <= wanted);
    rows.insert(at, row);
}

/// Is each row of `before`, in order, in `after`?
fn is_extended<T: PartialEq>(before: &[T], after: &[T]) -> bool {
    let mut rest = after.iter();
    before.iter().all(|row| rest.any(|other| other == row))
}

impl Log {
    pub fn begin(&mut self, session: usize) -> Xid {
        let own = &mut self.xids[session];
        own.push(Status::Running);
        FIRST + session as u64 * EACH + own.len() as u64 - 1
    }

    fn place(xid: Xid) -> (usize, usize) {
        let n = xid - FIRST;
        ((n / EACH) as usize, (n % EACH) as usize)
    }

    pub fn status(&self, xid: Xid) -> Status {
        let (session, n) = Self::place(xid);
        self.xids[session][n]
    }

    pub fn set_status(&mut self, xid: Xid, status: Status) {
        let (session, n) = Self::place(xid);
        self.xids[session][n] = status;
    }

    pub fn committed(&self, xid: Xid) -> bool {
        matches!(self.status(xid), Status::Committed { .. })
    }

    pub fn flush(&mut self) {
        for status in self.xids.iter_mut().flatten() {
            if matches!(status, Status::Committed { .. }) {
                *status = Status::Committed { flushed: true };
            }
        }
    }

    pub fn segment(&self, generation: i64) -> Option<&Segment> {
        self.segments.iter().find(|segment| segment.generation == generation)
    }

    pub fn segment_mut(&mut self, generation: i64) -> Option<&mut Segment> {
        self.segments.iter_mut().find(|segment| segment.generation == generation)
    }

    /// False: the segment is gone, or on its way out.
    pub fn append_row(&mut self, generation: i64, row: Row) -> bool {
        let Some(segment) = self.segment_mut(generation).filter(|segment| !segment.ready_cut) else { return false };
        insert_sorted(&mut segment.rows, row, |row| (row.lane, row.position, row.xmin));
        true
    }

    pub fn append_claim(&mut self, generation: i64, xmin: Xid, copy: Copy, lease: i64) -> bool {
        let Some(segment) = self.segment_mut(generation).filter(|segment| !segment.ready_cut) else { return false };
        insert_sorted(&mut segment.claims, (xmin, copy, lease), |claim| *claim);
        true
    }

    pub fn append_closure(&mut self, generation: i64, closure: Closure) -> bool {
        let Some(segment) = self.segment_mut(generation).filter(|segment| !segment.ready_cut) else { return false };
        insert_sorted(&mut segment.closures, closure, |closure| (closure.copy, closure.xmin, closure.outcome as u8));
        true
    }

    pub fn append_ledger(&mut self, xmin: Xid, generation: i64, slot: i32, event: Event) {
        self.ledger.push((xmin, LedgerRow { generation, slot, event, at: 0 }));
    }

    /// The ring as a reader of the ledger sees it. `None`: the ledger contradicts itself.
    pub fn ring(&self) -> Option<Ring> {
        let rows: Vec<LedgerRow> = self.ledger.iter().filter(|(xmin, _)| self.committed(*xmin)).map(|(_, row)| *row).collect();
        Ring::fold(&rows).ok()
    }

    fn has_started(&self, generation: i64) -> bool {
        let started = |row: &LedgerRow| row.generation == generation && row.event == Event::PruneStarted;
        self.ledger.iter().any(|(xmin, row)| started(row) && self.committed(*xmin))
    }

    /// The dead-tuple contract: is `after` this log, appended to, or with tables truncated whole whose prune has started?
    pub fn only_appended(&self, after: &Log) -> bool {
        let segments = self.segments.iter().all(|old| match after.segment(old.generation) {
            // Pruned; or made by a rotation that was rolled back.
            None => old.rows.is_empty() && old.claims.is_empty() && old.closures.is_empty(),
            Some(new) => {
                let may_cut = self.has_started(old.generation);
                let ready_cut = may_cut && new.ready_cut && new.rows.is_empty();
                let evidence_cut = may_cut && new.evidence_cut && new.claims.is_empty() && new.closures.is_empty();
                (ready_cut || is_extended(&old.rows, &new.rows))
                    && (evidence_cut || is_extended(&old.claims, &new.claims) && is_extended(&old.closures, &new.closures))
            }
        });
        segments && is_extended(&self.ledger, &after.ledger)
    }
}
