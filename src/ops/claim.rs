//! Claim: hand out due jobs of one or several queues.
//!
//! Locks: RowExclusive on ready_entries and lease_claims of each segment visited, to the end of the transaction.
//! Rows written: one claim row for each run of jobs of one segment (at most 512 jobs each). Waits: shortly, for the scan turn of another
//! claimer. A crash before the commit: the jobs are ready again. A rollback gives them back at once.

use awa_protocol::lane::Lane;
use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::Datum;

use crate::error::{Error, Result};
use crate::frontier::{Frontier, Reserve, notes};
use crate::ops::handle::Queue;
use crate::ops::taking::{Taken, Taker, Terms};
use crate::ops::validate;
use crate::pg::call::{Rows, bytes_datum, notice};
use crate::pg::points::reach;
use crate::pg::xact;
use crate::store::evidence::{self, ClaimTerms, Copies};
use crate::store::{datum, kinds};

pub struct Request {
    pub batch_size: usize,
    /// `None`: as the queue says.
    pub deadline: Option<i64>,
    pub heartbeat_timeout: Option<i64>,
}

impl Request {
    pub fn new(batch_size: Option<i32>, deadline: Option<i64>, heartbeat_timeout: Option<i64>) -> Result<Self> {
        validate::duration(deadline, "deadline")?;
        validate::duration(heartbeat_timeout, "heartbeat_timeout")?;
        Ok(Self { batch_size: validate::batch_size(batch_size)?, deadline, heartbeat_timeout })
    }
}

/// Claims from the queues in the order given until the batch is full; puts the jobs into `rows`. The second element names the queue.
pub fn claim(frontier: &Frontier, queues: &[(Queue, Vec<u8>)], request: &Request, rows: &mut Rows<'_>) -> Result<usize> {
    let alone = claims_alone();
    notes::reserve(frontier, 0)?;
    let mut count = 0;
    for (queue, name) in queues {
        if count >= request.batch_size {
            break;
        }
        let settings = queue.settings(frontier);
        let now = xact::now();
        let deadline = request.deadline.unwrap_or(settings.deadline);
        let terms = Terms {
            now,
            deadline_at: if deadline > 0 { now + deadline } else { 0 },
            heartbeat_timeout: request.heartbeat_timeout.unwrap_or(settings.heartbeat_timeout),
        };
        let mut taker = Taker::new(frontier, *queue, terms, request.batch_size - count);
        let wanted = u32::try_from(request.batch_size - count).unwrap_or(u32::MAX);
        notes::promise(queue.place, frontier.reserve_entries(queue.place, wanted, Reserve::Claim));
        taker.run()?;
        notes::settle_promise(frontier);
        count += taker.taken.len();
        reach("claim.taken");
        append_evidence(frontier, &terms, &taker.taken)?;
        reach("claim.recorded");
        for job in &taker.taken {
            put(frontier, rows, name, &terms, job)?;
        }
        if taker.pool_is_full {
            notice(
                Error::new(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "fewer jobs were claimed than are due: too many jobs are in flight")
                    .detail("Every claimed and unfinished job takes a place in shared memory; all places, or the three quarters a queue may have, are used up.")
                    .hint("Finish or cancel running jobs, or raise awa.max_in_flight and restart the server."),
            );
        }
    }
    if count > 0 {
        notes::set_claim_only(alone.then(xact::xact_last_rec_end));
    }
    Ok(count)
}

/// Has the transaction logged nothing but claims so far, and will it end with this statement?
fn claims_alone() -> bool {
    let logged = xact::xact_last_rec_end();
    !xact::in_transaction_block() && (logged == 0 || notes::claim_only() == Some(logged))
}

fn append_evidence(frontier: &Frontier, terms: &Terms, taken: &[Taken]) -> Result<()> {
    let follows = |a: &Taken, b: &Taken| a.generation == b.generation && b.lease == a.lease + 1;
    for run in taken.chunk_by(follows) {
        let Some(first) = run.first() else { continue };
        let segment = frontier.segment(first.generation).ok_or_else(|| {
            Error::new(
                Code::ERRCODE_INTERNAL_ERROR,
                format!("generation {} of the ring is gone during a claim", first.generation),
            )
        })?;
        let mut copies = Copies::default();
        for job in run {
            copies.push(job.head.job_id, job.head.hop)?;
        }
        let claim = ClaimTerms {
            claimed_at: terms.now,
            deadline_at: terms.deadline_at,
            heartbeat_timeout: terms.heartbeat_timeout,
            first_lease: first.lease,
        };
        evidence::append_claims(&segment, &claim, &copies)?;
    }
    Ok(())
}

fn put(frontier: &Frontier, rows: &mut Rows<'_>, queue: &[u8], terms: &Terms, job: &Taken) -> Result<()> {
    let head = &job.head;
    let kind = kinds::name(frontier, head.kind_id)?;
    let columns: [Option<Datum>; 14] = [
        Some(datum::i64(head.job_id)),
        Some(datum::i64(job.lease)),
        Some(bytes_datum(queue)),
        Some(bytes_datum(&kind)),
        job.args,
        Some(datum::i32(i32::from(Lane::from_number(head.lane).priority) + 1)),
        Some(datum::i32(i32::from(head.attempt) + 1)),
        Some(datum::i32(i32::from(head.max_attempts))),
        Some(datum::i64(head.key)),
        job.enqueued_at.or(Some(datum::i64(head.key))),
        (terms.deadline_at > 0).then(|| datum::i64(terms.deadline_at)),
        job.tags,
        job.metadata,
        job.errors,
    ];
    rows.put(&columns)
}
