//! The tables of a segment.
//!
//! Tables written: none here. Creates `awa_segments.{ready_entries,lease_claims,done_entries,lease_claim_closures}_<slot>`.
//! They are ordinary tables, not members of the extension, so a dump carries their definition and their data; the schema is a member,
//! so a plain DROP EXTENSION refuses while they exist.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Oid;

use awa_protocol::ring::{Segment, SegmentState};

use crate::error::{Error, Result};
use crate::frontier::SegmentInfo;
use crate::pg::{rel, sql};

/// Vacuum has nothing to remove from these tables and statistics of a queue mislead: only freezing against wraparound remains.
/// Arrays are stored plain, and added after the table was made, so that no toast table exists: a batch row fits its page.
const SHAPE: &str = "
CREATE TABLE awa_segments.ready_entries_{slot} (
    key          timestamptz NOT NULL, -- the job may run from this time on; also its place in the lane
    job_id       bigint      NOT NULL,
    lane         integer     NOT NULL, -- queue_id * 8 + (priority - 1) * 2 + (0 immediate, 1 scheduled)
    hop          integer     NOT NULL, -- which copy of the job: 0 at enqueue, one more for each re-append
    kind_id      integer     NOT NULL,
    attempt      smallint    NOT NULL, -- attempts used before this copy is claimed
    max_attempts smallint    NOT NULL,
    enqueued_at  timestamptz,          -- NULL: equal to key
    tags         text[],
    metadata     jsonb,
    errors       jsonb,                -- array of the failed attempts so far
    args         jsonb       NOT NULL  -- last: never decoded, moved as an opaque datum
) USING heap WITH ({storage});
CREATE INDEX ready_entries_{slot}_lane_key_idx ON awa_segments.ready_entries_{slot} (lane, key) WITH (deduplicate_items = off);
CREATE TABLE awa_segments.lease_claims_{slot} (
    claimed_at        timestamptz NOT NULL,
    deadline_at       timestamptz,          -- NULL: none
    heartbeat_timeout bigint,               -- microseconds; NULL: none
    first_lease       bigint      NOT NULL  -- the n-th job of the row has first_lease + n - 1
) USING heap WITH ({storage});
ALTER TABLE awa_segments.lease_claims_{slot}
    ADD COLUMN job_ids bigint[] NOT NULL,
    ADD COLUMN hops integer[],              -- NULL: all zero
    ALTER COLUMN job_ids SET STORAGE PLAIN,
    ALTER COLUMN hops SET STORAGE PLAIN;
CREATE TABLE awa_segments.done_entries_{slot} (
    done_at timestamptz NOT NULL
) USING heap WITH ({storage});
ALTER TABLE awa_segments.done_entries_{slot}
    ADD COLUMN job_ids bigint[] NOT NULL,
    ADD COLUMN hops integer[],              -- NULL: all zero
    ALTER COLUMN job_ids SET STORAGE PLAIN,
    ALTER COLUMN hops SET STORAGE PLAIN;
CREATE TABLE awa_segments.lease_claim_closures_{slot} (
    key       timestamptz,                  -- with lane: only for a copy that was never claimed; claimers probe (lane, key)
    closed_at timestamptz NOT NULL,
    job_id    bigint      NOT NULL,
    lane      integer,
    hop       integer     NOT NULL,
    outcome   \"char\"    NOT NULL,         -- r retry, s snooze, f failed, c cancelled, l dead-lettered, m moved; v redriven, x removed: after f or c (x: any end)
    errors    jsonb                         -- error history of a finished job
) USING heap WITH ({storage});
CREATE INDEX lease_claim_closures_{slot}_lane_key_idx ON awa_segments.lease_claim_closures_{slot} (lane, key) WHERE lane IS NOT NULL;
REVOKE ALL ON awa_segments.ready_entries_{slot}, awa_segments.lease_claims_{slot}, awa_segments.done_entries_{slot}, awa_segments.lease_claim_closures_{slot} FROM PUBLIC
";

const STORAGE: &str = "autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 2147483647";

pub fn exists(slot: i32) -> bool {
    rel::relation_oid("awa_segments", &format!("ready_entries_{slot}")).is_some()
}

/// Creates the tables of a slot unless they are there. The caller is inside `sql::as_owner`.
pub fn create_if_missing(slot: i32) -> Result<()> {
    if exists(slot) {
        return Ok(());
    }
    let script = SHAPE.replace("{slot}", &slot.to_string()).replace("{storage}", STORAGE);
    sql::ddl(&script)
}

/// Relations of a live segment.
pub fn locate(segment: &Segment) -> Result<SegmentInfo> {
    let slot = segment.slot;
    let find = |name: String| -> Result<Oid> {
        rel::relation_oid("awa_segments", &name).ok_or_else(|| {
            Error::new(Code::ERRCODE_UNDEFINED_TABLE, format!("relation \"awa_segments.{name}\" does not exist"))
                .detail(format!("The ledger says that generation {} lives in slot {slot}.", segment.generation))
                .hint("Restore the table from a backup; jobs of this segment are in it.")
        })
    };
    let ready = find(format!("ready_entries_{slot}"))?;
    Ok(SegmentInfo {
        generation: segment.generation,
        slot,
        state: segment.state,
        opened_at: segment.opened_at,
        ready,
        ready_file: rel::Rel::open(ready, rel::Lock::AccessShare)?.file_number(),
        ready_index: find(format!("ready_entries_{slot}_lane_key_idx"))?,
        claims: find(format!("lease_claims_{slot}"))?,
        done: find(format!("done_entries_{slot}"))?,
        closures: find(format!("lease_claim_closures_{slot}"))?,
        closures_index: find(format!("lease_claim_closures_{slot}_lane_key_idx"))?,
    })
}

pub fn state_name(state: SegmentState) -> &'static str {
    match state {
        SegmentState::Open => "open",
        SegmentState::Sealed => "sealed",
        SegmentState::PruneStarted => "prune_started",
    }
}
