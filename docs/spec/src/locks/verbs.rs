//! Which locks each verb takes, in its order. The names of `in_docs` are those of the table in `docs/locking.md`.

use std::hash::{Hash, Hasher};

use super::Light::{Leaf, Partition, Queue};
use super::Mode::*;
use super::Object::*;
use super::Step::{self, *};

pub struct Verb {
    pub name: &'static str,
    /// The verb of the table that this is; empty: of a variant, or of several calls in one transaction.
    pub in_docs: &'static str,
    pub steps: &'static [Step],
}

impl PartialEq for Verb {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}
impl Eq for Verb {}
impl Hash for Verb {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}
impl std::fmt::Debug for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

pub const fn verb(name: &'static str, in_docs: &'static str, steps: &'static [Step]) -> Verb {
    Verb { name, in_docs, steps }
}

const OLD: u8 = 0;
const OPEN: u8 = 1;

/// Each is one transaction. A commit callback runs before the locks go: its LWLocks are the last steps.
pub const VERBS: &[Verb] = &[
    verb(
        "enqueue",
        "enqueue, INSERT, COPY",
        &[
            Lock(Ready(OPEN), RowExclusive),
            Light(Queue),
            Light(Leaf),
            Release(Leaf),
            Release(Queue),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "claim",
        "claim",
        &[
            Lock(Ready(OLD), RowExclusive),
            Light(Queue),
            Release(Queue),
            Light(Partition(0)),
            Release(Partition(0)),
            Lock(Closures(OLD), RowExclusive),
            Lock(Ready(OPEN), RowExclusive),
            Light(Queue),
            Light(Partition(1)),
            Release(Partition(1)),
            Release(Queue),
            Lock(Claims(OLD), RowExclusive),
            Lock(Claims(OPEN), RowExclusive),
            Light(Queue),
            Light(Partition(0)),
            Release(Partition(0)),
            Release(Queue),
        ],
    ),
    verb(
        "complete",
        "complete",
        &[
            Light(Partition(0)),
            Release(Partition(0)),
            Lock(Attempt(0), Exclusive),
            Lock(Attempt(1), Exclusive),
            Lock(Ready(OLD), RowExclusive),
            Lock(Done(OLD), RowExclusive),
            Light(Partition(0)),
            Release(Partition(0)),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "fail",
        "fail, snooze",
        &[
            Lock(Attempt(0), Exclusive),
            Lock(Ready(OLD), RowExclusive),
            Lock(Closures(OLD), RowExclusive),
            Lock(Ready(OPEN), RowExclusive),
            Light(Queue),
            Release(Queue),
            Light(Partition(0)),
            Release(Partition(0)),
        ],
    ),
    verb(
        "fail for good",
        "fail into the dead letters",
        &[
            Lock(Attempt(0), Exclusive),
            Lock(Ready(OLD), RowExclusive),
            Lock(Closures(OLD), RowExclusive),
            Lock(DeadLetters, RowExclusive),
        ],
    ),
    verb(
        "cancel",
        "cancel",
        &[
            Lock(Ready(OPEN), AccessShare),
            Lock(Ready(OLD), AccessShare),
            Lock(Attempt(0), Exclusive),
            Light(Queue),
            Light(Partition(0)),
            Release(Partition(0)),
            Release(Queue),
            Lock(Ready(OLD), RowExclusive),
            Lock(Closures(OLD), RowExclusive),
        ],
    ),
    verb(
        "cancel a deferred job",
        "promote_deferred, cancel of a deferred job",
        &[Lock(Ready(OPEN), RowExclusive), Lock(DeferredRow, Exclusive), Light(Queue), Release(Queue)],
    ),
    verb(
        "promote_deferred",
        "promote_deferred, cancel of a deferred job",
        &[Lock(Ready(OPEN), RowExclusive), Try(DeferredRow, Exclusive), Light(Queue), Release(Queue)],
    ),
    verb(
        "retry",
        "retry, delete_job: in the ring",
        &[
            Lock(Ready(OPEN), AccessShare),
            Lock(Ready(OLD), AccessShare),
            Lock(Closures(OLD), AccessShare),
            Lock(Attempt(0), Exclusive),
            Lock(Ready(OLD), RowExclusive),
            Lock(Closures(OLD), RowExclusive),
            Lock(Ready(OPEN), RowExclusive),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "retry outside",
        "retry, delete_job, dlq_retry, dlq_retry_many, dlq_purge: outside",
        &[
            Lock(Ready(OPEN), RowExclusive),
            Lock(Retained, RowExclusive),
            Lock(DeadLetters, RowExclusive),
            Lock(FinishedRow, Exclusive),
        ],
    ),
    verb("retention", "retention", &[Try(Retained, RowExclusive), Try(DeadLetters, RowExclusive), Try(FinishedRow, Exclusive)]),
    verb(
        "read",
        "job, jobs, terminal_jobs, verify, first use after a start",
        &[
            Lock(Ready(OLD), AccessShare),
            Lock(Closures(OLD), AccessShare),
            Lock(Done(OLD), AccessShare),
            Lock(Ready(OPEN), AccessShare),
        ],
    ),
    verb(
        "verify",
        "job, jobs, terminal_jobs, verify, first use after a start",
        &[
            Lock(Ready(OLD), AccessShare),
            Lock(Closures(OLD), AccessShare),
            Lock(Ready(OPEN), AccessShare),
            WaitFor(Ready(OLD), Share),
            WaitFor(Ready(OPEN), Share),
            WaitFor(Retained, Share),
            WaitFor(DeadLetters, Share),
        ],
    ),
    verb(
        "create_queue",
        "create_queue",
        &[Lock(Ledger, ShareRowExclusive), Lock(QueueDefinitions, RowExclusive), Lock(QueueRow, Exclusive)],
    ),
    verb(
        "alter_queue",
        "alter_queue, pause_queue, resume_queue",
        &[Lock(QueueDefinitions, RowExclusive), Lock(QueueRow, Exclusive), Light(Queue), Release(Queue)],
    ),
    verb(
        "drop_queue",
        "drop_queue",
        &[
            Lock(QueueDefinitions, RowExclusive),
            Lock(QueueRow, Exclusive),
            Light(Queue),
            Release(Queue),
            WaitFor(Ready(OLD), Share),
            WaitFor(Ready(OPEN), Share),
            Light(Partition(0)),
            Release(Partition(0)),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "rescue",
        "rescue_*",
        &[
            Try(Ready(OPEN), RowExclusive),
            Try(Ready(OLD), RowExclusive),
            Try(Closures(OLD), RowExclusive),
            Try(DeadLetters, RowExclusive),
            Light(Partition(0)),
            Release(Partition(0)),
            Try(Attempt(0), Exclusive),
        ],
    ),
    verb("rotate", "rotate", &[Try(Ledger, ShareRowExclusive), Try(Ready(OPEN), AccessShare), Light(Leaf), Release(Leaf)]),
    verb("add_segments", "add_segments", &[Lock(Ledger, ShareRowExclusive), Light(Leaf), Release(Leaf)]),
    verb(
        "carry_forward",
        "carry_forward",
        &[
            Try(Ready(OLD), RowExclusive),
            Light(Queue),
            Light(Partition(0)),
            Release(Partition(0)),
            Release(Queue),
            Try(Attempt(0), Exclusive),
            Light(Partition(0)),
            Release(Partition(0)),
            Lock(Ready(OPEN), RowExclusive),
            Lock(Claims(OPEN), RowExclusive),
            Lock(Closures(OLD), RowExclusive),
        ],
    ),
    verb(
        "prune: start",
        "prune",
        &[
            Try(Ledger, ShareRowExclusive),
            Try(Ready(OLD), Share),
            Lock(Closures(OLD), AccessShare),
            Light(Leaf),
            Release(Leaf),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "prune: truncate",
        "prune",
        &[
            Try(Ledger, ShareRowExclusive),
            Try(Ready(OLD), AccessExclusive),
            Try(Closures(OLD), AccessExclusive),
            Try(Done(OLD), AccessExclusive),
            Try(Claims(OLD), AccessExclusive),
            Light(Leaf),
            Release(Leaf),
            Light(Queue),
            Release(Queue),
        ],
    ),
    verb(
        "rebuild",
        "rebuild",
        &[
            Lock(Ledger, ShareRowExclusive),
            Lock(QueueDefinitions, Exclusive),
            Lock(Ready(OLD), Share),
            Lock(Ready(OPEN), Share),
            Lock(Retained, Share),
            Lock(DeadLetters, Share),
            Lock(Restoring, AccessShare),
            BeginBuild,
            Lock(Closures(OLD), AccessShare),
            EndBuild,
        ],
    ),
    verb(
        "adopt",
        "adopt of a copy, pre_restore, post_restore",
        &[
            Lock(Ledger, ShareRowExclusive),
            Lock(QueueDefinitions, Exclusive),
            Lock(Restoring, AccessExclusive),
            Lock(Ready(OLD), Share),
            Lock(Ready(OPEN), Share),
            Lock(Retained, Share),
            Lock(DeadLetters, Share),
        ],
    ),
];

/// The first call after a start builds; those who come meanwhile wait. Then they do what they came for.
pub const FIRST_USES: &[Verb] = &[
    verb(
        "first use",
        "first use after a start, rebuild",
        &[
            Lock(Restoring, AccessShare),
            BeginBuild,
            Lock(Ready(OLD), AccessShare),
            Lock(Closures(OLD), AccessShare),
            EndBuild,
            Lock(Ready(OPEN), RowExclusive),
        ],
    ),
    verb("second use", "", &[AwaitBuild, Lock(Ready(OPEN), RowExclusive)]),
    verb(
        "first use: alter_queue",
        "",
        &[
            Lock(Restoring, AccessShare),
            BeginBuild,
            Lock(Ready(OLD), AccessShare),
            EndBuild,
            Lock(QueueDefinitions, RowExclusive),
        ],
    ),
    verb(
        "first use: create_queue",
        "",
        &[Lock(Restoring, AccessShare), BeginBuild, Lock(Ready(OLD), AccessShare), EndBuild, Lock(Ledger, ShareRowExclusive)],
    ),
];

/// Several calls in one transaction, against the order.
pub const LONG: &[Verb] = &[
    verb(
        "enqueue, then fail an older job",
        "",
        &[Lock(Ready(OPEN), RowExclusive), Lock(Attempt(0), Exclusive), Lock(Ready(OLD), RowExclusive)],
    ),
    verb("claim, newest segment first", "", &[Lock(Ready(OPEN), RowExclusive), Lock(Ready(OLD), RowExclusive)]),
    verb("complete one, then another", "", &[Lock(Attempt(0), Exclusive), Lock(Attempt(1), Exclusive)]),
    verb("complete the other, then one", "", &[Lock(Attempt(1), Exclusive), Lock(Attempt(0), Exclusive)]),
];

/// Breaks the rule of `docs/locking.md`: do not lock these tables by hand.
pub const BY_HAND: &[Verb] = &[verb("lock table, then first use", "", &[Lock(Ready(OLD), AccessExclusive), AwaitBuild])];

/// Variants that must be caught, each beside the verb that it meets.
pub const BROKEN: &[Verb] = &[
    verb("rebuild, newest segment first", "", &[Lock(Ready(OPEN), Share), Lock(Ready(OLD), Share)]),
    verb("complete, in the order of the request", "", &[Lock(Attempt(1), Exclusive), Lock(Attempt(0), Exclusive)]),
    verb("prune that waits, evidence first", "", &[Lock(Closures(OLD), AccessExclusive), Lock(Ready(OLD), AccessExclusive)]),
    verb("give back, partition first", "", &[Light(Partition(0)), Light(Queue), Release(Queue), Release(Partition(0))]),
    verb(
        "move between partitions",
        "",
        &[Light(Partition(0)), Light(Partition(1)), Release(Partition(1)), Release(Partition(0))],
    ),
    verb("enqueue, locks under the lock", "", &[Light(Queue), Lock(Ready(OPEN), RowExclusive), Release(Queue)]),
    verb("build, announced first", "", &[BeginBuild, Lock(Restoring, AccessShare), EndBuild]),
    verb("adopt that waits for the build", "", &[Lock(Restoring, AccessExclusive), AwaitBuild]),
];
