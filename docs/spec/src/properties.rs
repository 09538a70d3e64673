//! What must hold. The names are what a witness is expected to violate.

/// A committed job that is not finished has its row in a segment that will be read.
pub const LOST: &str = "job lost";
/// Its row is ahead of a cursor, in a gap, or has an entry.
pub const SKIPPED: &str = "job skipped";
/// ... and only one of these; what has ended can be reached in no way.
pub const REACHED_TWICE: &str = "job reached twice";
/// At most one attempt of a job runs.
pub const TWO_ATTEMPTS: &str = "two live attempts";
/// A copy is closed by at most one transaction that commits.
pub const CLOSED_TWICE: &str = "closure not unique";
/// Only the worker who has the attempt can end it; no receipt is given twice.
pub const STALE_FINISH: &str = "stale finish";
/// A segment is truncated only when each of its jobs is closed, and receives nothing afterwards.
pub const OPEN_TRUNCATED: &str = "open job truncated";
/// What the log says is what memory says.
pub const REBUILD_DIFFERS: &str = "rebuild differs from live";
/// Only committed rows that are due are handed out.
pub const TOO_EARLY: &str = "handed out too early";
pub const CURSOR_LOWERED: &str = "cursor lowered";
/// A callback changes only what its own transaction did.
pub const FOREIGN_ENTRY: &str = "foreign entry touched";
/// Tables change by appends, and by truncation of a whole segment that was proved drained.
pub const NOT_AN_APPEND: &str = "not an append";
/// From wherever everybody has ended: every job can be claimed and finished.
pub const NEVER_CLAIMED: &str = "due job never claimable";
/// ... after which a claimer would sleep, not look again at once,
pub const NEVER_SLEEPS: &str = "claimer never sleeps";
/// ... and every sealed segment pruned.
pub const NEVER_PRUNED: &str = "drained segment never pruned";
/// Whoever has begun can go on, now or when others have.
pub const STUCK: &str = "nobody can go on";
/// An assertion or an overflow in the code of the engine.
pub const ASSERTION: &str = "assertion of the engine";

/// Of `locks`.
pub const DEADLOCK: &str = "cycle of waits";
pub const LWLOCK_ORDER: &str = "lwlock order";
pub const WAIT_UNDER_LWLOCK: &str = "wait under an lwlock";
pub const UNSEEN_WAIT: &str = "wait that no detector sees";
