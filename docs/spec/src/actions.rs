//! The steps of the model, and the function of the server (or of `awa_protocol`) that does what each says.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! actions {
    ($($(#[$doc:meta])* $name:ident => $($file:literal $function:literal),+;)*) => {
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Action {
            $($(#[$doc])* $name,)*
            /// Of the model alone: a verb begins, the clock goes on.
            Begin,
            Tick,
        }

        /// Action, and the functions it stands for: (file, name).
        pub const MAP: &[(Action, &[(&str, &str)])] = &[$((Action::$name, &[$(($file, $function)),+])),*];
    };
}

actions! {
    // producer
    ReadOpenSegment => "src/frontier/mod.rs" "open_segment";
    /// The table is locked, then it is checked under the queue's lock that it is still open; keys are chosen.
    Register => "src/ops/enqueue.rs" "register", "src/protocol/src/queue/producers.rs" "register";
    AppendRow => "src/ops/enqueue.rs" "append_chunk", "src/store/ready.rs" "append";
    Deregister => "src/protocol/src/queue/producers.rs" "deregister";
    // claimer
    PlanClaim => "src/ops/taking/mod.rs" "take", "src/protocol/src/queue/claimers.rs" "plan";
    BeginScan => "src/ops/taking/mod.rs" "scan", "src/protocol/src/queue/claimers.rs" "begin_scan";
    ScanRow => "src/ops/taking/mod.rs" "scan_rows", "src/ops/taking/mod.rs" "reserve";
    FinishScan => "src/protocol/src/queue/claimers.rs" "finish_scan", "src/frontier/notes/mod.rs" "end_turn";
    BeginGap => "src/ops/taking/gaps.rs" "visit_gap", "src/protocol/src/queue/claimers.rs" "begin_gap";
    VisitRow => "src/ops/taking/gaps.rs" "visit_gap", "src/ops/taking/mod.rs" "reserve";
    FinishGap => "src/protocol/src/queue/claimers.rs" "finish_gap";
    ProbeTombstone => "src/ops/taking/rows.rs" "is_tombstoned";
    PopHole => "src/ops/taking/holes.rs" "take_holes", "src/protocol/src/queue/holes.rs" "pop_hole";
    VerifyHole => "src/ops/taking/holes.rs" "verify_hole";
    AppendClaim => "src/ops/claim.rs" "append_evidence", "src/store/evidence.rs" "append_claims";
    // ends of attempts
    DecideExit => "src/ops/exits.rs" "begin", "src/ops/cancel.rs" "cancel", "src/protocol/src/attempt.rs" "decide_exit";
    MarkClosing => "src/ops/exits.rs" "begin", "src/protocol/src/attempt.rs" "begin_exit";
    AppendEvidence => "src/ops/exits.rs" "complete", "src/ops/exits.rs" "conclude_failure", "src/ops/exits.rs" "append_next";
    MarkOverdue => "src/ops/rescue.rs" "end", "src/protocol/src/overdue.rs" "overdue_since";
    CancelEntry => "src/ops/cancel.rs" "cancel_entry", "src/protocol/src/attempt.rs" "begin_exit";
    FindNewest => "src/ops/cancel.rs" "find_newest";
    GuardRow => "src/ops/cancel.rs" "cancel_waiting";
    LookAgain => "src/ops/cancel.rs" "cancel_waiting", "src/frontier/build.rs" "read_evidence";
    AppendTombstone => "src/ops/cancel.rs" "close";
    // carrier
    GuardToCarry => "src/ops/carry/waiting.rs" "guard_row";
    WillReach => "src/protocol/src/queue/mod.rs" "will_reach";
    FreeOrKeepGuard => "src/ops/carry/waiting.rs" "guard_row";
    GuardHole => "src/ops/carry/waiting.rs" "guard_hole";
    BeginMove => "src/ops/carry/running.rs" "guard_running", "src/protocol/src/attempt.rs" "begin_move";
    AppendBornClaimed => "src/ops/carry/running.rs" "append_running";
    AppendMoved => "src/ops/carry/step.rs" "append";
    // ring
    OpenNext => "src/ops/rotate.rs" "open_next", "src/protocol/src/ring.rs" "rotation";
    ProveDrained => "src/ops/prune.rs" "start", "src/protocol/src/rebuild.rs" "is_drained";
    LockToTruncate => "src/ops/prune.rs" "truncate";
    TruncateReady => "src/pg/truncate.rs" "truncate_in_place";
    TruncateEvidence => "src/pg/truncate.rs" "truncate_in_place";
    AppendPruned => "src/ops/prune.rs" "truncate", "src/store/ledger.rs" "append";
    // transactions
    Commit => "src/frontier/notes/callbacks.rs" "on_pre_commit";
    OnCommit => "src/frontier/notes/callbacks.rs" "on_commit", "src/frontier/notes/callbacks.rs" "complete";
    Abort => "src/frontier/notes/callbacks.rs" "on_abort";
    DropUnpublished => "src/frontier/notes/callbacks.rs" "drop_unpublished";
    EndTurn => "src/frontier/notes/mod.rs" "end_turn";
    OnAbort => "src/frontier/notes/callbacks.rs" "undo", "src/frontier/notes/callbacks.rs" "give_back";
    Crash => "src/frontier/build.rs" "build", "src/frontier/build.rs" "restore_segment";
}

/// How often each action was taken.
pub struct Fired([AtomicU64; Action::Tick as usize + 1]);

impl Default for Fired {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Fired {
    pub fn note(&self, action: Action) {
        if let Some(count) = self.0.get(action as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn has(&self, action: Action) -> bool {
        self.0.get(action as usize).is_some_and(|count| count.load(Ordering::Relaxed) > 0)
    }
}
