//! The text of a verb, for either side. Names of jobs and attempts differ between the sides; all else is the same.

use super::op::{Limit, NAMES, Verb, When};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Extension,
    Reference,
}

impl Side {
    pub fn schema(self) -> &'static str {
        match self {
            Self::Extension => "awa",
            Self::Reference => "awa_ref",
        }
    }
}

/// One thing, as each side calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    pub extension: i64,
    pub reference: i64,
}

impl Pair {
    pub fn on(self, side: Side) -> i64 {
        match side {
            Side::Extension => self.extension,
            Side::Reference => self.reference,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub job: Pair,
    pub lease: Pair,
}

/// A verb whose jobs, attempts and times have been chosen.
pub struct Call {
    pub verb: Verb,
    pub jobs: Vec<Pair>,
    pub attempts: Vec<Attempt>,
    /// A time for each new job; `None`: at once.
    pub times: Vec<Option<i64>>,
    /// Marks the arguments of new jobs.
    pub mark: u64,
}

/// Calls that are refused; `{}` stands for the schema.
pub const REFUSED: [&str; 17] = [
    "{}.enqueue('nowhere', 'k')",
    "{}.enqueue('plain', 'k', priority => 5)",
    "{}.enqueue('plain', 'k', priority => NULL)",
    "{}.enqueue('plain', 'k', max_attempts => 0)",
    "{}.enqueue('plain', 'k', run_at => 'infinity')",
    "{}.enqueue('plain', '')",
    "{}.enqueue(NULL, 'k')",
    "{}.enqueue_many('plain', 'k', ARRAY['1', '2']::jsonb[], priorities => ARRAY[1])",
    "{}.complete(-1, -1)",
    "{}.complete(NULL, 1)",
    "{}.fail(-1, -1, retry_after => '-1 s')",
    "{}.snooze(-1, -1, NULL)",
    "{}.extend(-1, -1, '1 s')",
    "{}.retry(1, queue => 'nowhere')",
    "{}.dlq_purge(max_jobs => 0)",
    "{}.cancel(NULL)",
    "1 / 0",
];

fn time(at: Option<i64>) -> String {
    at.map_or("NULL::timestamptz".to_owned(), |at| format!("timestamptz 'epoch' + {at} * interval '1 us'"))
}

fn array<T: ToString>(values: impl Iterator<Item = T>, of: &str) -> String {
    format!("ARRAY[{}]::{of}[]", values.map(|value| value.to_string()).collect::<Vec<_>>().join(", "))
}

fn limit(limit: Limit) -> &'static str {
    match limit {
        Limit::Default => "NULL",
        Limit::None => "'0'",
        Limit::Over => "'1 us'",
        Limit::Hour => "'1 hour'",
    }
}

fn or_null<T: ToString>(value: Option<T>) -> String {
    value.map_or("NULL".to_owned(), |value| value.to_string())
}

pub fn queue(number: u8) -> String {
    format!("'{}'", NAMES.get(usize::from(number)).copied().unwrap_or("nowhere"))
}

fn kind(second: bool) -> &'static str {
    if second { "'second kind'" } else { "'kind'" }
}

impl Call {
    /// A statement that gives rows of one jsonb.
    pub fn text(&self, side: Side) -> String {
        let schema = side.schema();
        let one = |call: String| format!("SELECT to_jsonb({schema}.{call})");
        let rows = |call: String| format!("SELECT to_jsonb(r) FROM {schema}.{call} AS r");
        let nothing = |call: String| format!("SELECT to_jsonb({schema}.{call}::text)");
        let job = self.jobs.first().map_or(-1, |job| job.on(side));
        let (in_job, lease) = self.attempts.first().map_or((-1, -1), |attempt| (attempt.job.on(side), attempt.lease.on(side)));
        let at = time(self.times.first().copied().flatten());
        let pairs = || {
            let jobs = array(self.attempts.iter().map(|attempt| attempt.job.on(side)), "bigint");
            format!("{jobs}, {}", array(self.attempts.iter().map(|attempt| attempt.lease.on(side)), "bigint"))
        };
        match &self.verb {
            Verb::Enqueue { .. } => self.enqueue_text(side),
            Verb::EnqueueMany { queue: to, jobs } => {
                let args = array(jobs.iter().enumerate().map(|(n, _)| format!("'{{\"mark\": {}.{n}}}'", self.mark)), "jsonb");
                let priorities = array(jobs.iter().map(|(priority, _)| *priority), "integer");
                let times = array(self.times.iter().map(|at| time(*at)), "timestamptz");
                one(format!("enqueue_many({}, 'kind', {args}, {priorities}, {times})", queue(*to)))
            }
            Verb::Claim { queue: from, batch, deadline, heartbeat } => {
                let batch = fitting(*from, *batch);
                rows(format!("claim({}, {batch}, {}, {})", queue(*from), limit(*deadline), limit(*heartbeat)))
            }
            Verb::ClaimFromAll { first, batch } => {
                let from = array((0..2).map(|n| queue((n + first) % 2)), "text");
                rows(format!("claim({from}, {batch})"))
            }
            Verb::Complete { .. } => one(format!("complete({in_job}, {lease})")),
            Verb::CompleteMany { .. } => rows(format!("complete_many({})", pairs())),
            Verb::CompleteAndClaim { queue: from, batch, .. } => rows(format!("complete_and_claim({}, {}, {})", pairs(), queue(*from), fitting(*from, *batch))),
            Verb::Fail { retry_after, last, .. } => {
                let after = retry_after.map_or("NULL", |late| if late { "'1 hour'" } else { "'0'" });
                one(format!("fail({in_job}, {lease}, 'no luck', {after}, {last})"))
            }
            Verb::Snooze { late, .. } => one(format!("snooze({in_job}, {lease}, '{}')", if *late { "1 hour" } else { "0" })),
            Verb::Heartbeat { .. } => one(format!("heartbeat({in_job}, {lease})")),
            Verb::Extend { over, .. } => {
                format!("SELECT to_jsonb({schema}.extend({in_job}, {lease}, '{}') IS NOT NULL)", if *over { "0" } else { "2 hours" })
            }
            Verb::Cancel { reason, .. } => one(format!("cancel({job}, {})", if *reason { "'because'" } else { "NULL" })),
            Verb::Retry { queue: to, priority, .. } => {
                one(format!("retry({job}, {}, {}, {at})", or_null(to.map(queue)), or_null(*priority)))
            }
            Verb::Delete { .. } => one(format!("delete_job({job})")),
            Verb::DlqRetry { queue: to, .. } => one(format!("dlq_retry({job}, {}, NULL, {at})", or_null(to.map(queue)))),
            Verb::DlqRetryMany { queue: of, max_jobs, to } => {
                one(format!("dlq_retry_many({}, NULL, NULL, {max_jobs}, {})", or_null(of.map(queue)), or_null(to.map(queue))))
            }
            Verb::DlqPurge { queue: of, kind: only, max_jobs } => {
                one(format!("dlq_purge({}, {}, NULL, {max_jobs})", or_null(of.map(queue)), or_null(only.map(kind))))
            }
            Verb::Rescue { heartbeats } => {
                let what = if *heartbeats { "rescue_stale_heartbeats()" } else { "rescue_expired_deadlines()" };
                match side {
                    Side::Extension => format!("SELECT to_jsonb(rows) FROM awa.{what}"),
                    Side::Reference => one(what.to_owned()),
                }
            }
            Verb::Pause { queue: of } => nothing(format!("pause_queue({})", queue(*of))),
            Verb::Resume { queue: of } => nothing(format!("resume_queue({})", queue(*of))),
            Verb::Alter { queue: of, max_attempts, dead_letters, short_retention } => {
                let retention = or_null(short_retention.map(|short| if short { "'1 us'" } else { "'7 days'" }));
                nothing(format!(
                    "alter_queue({}, max_attempts => {}, dead_letters => {}, failed_retention => {retention}, cancelled_retention => {retention})",
                    queue(*of),
                    or_null(*max_attempts),
                    or_null(*dead_letters)
                ))
            }
            Verb::Refused(number) => {
                let call = REFUSED.get(usize::from(*number) % REFUSED.len()).copied().unwrap_or_default();
                format!("SELECT to_jsonb({})", call.replace("{}", schema))
            }
        }
    }

    fn enqueue_text(&self, side: Side) -> String {
        let Verb::Enqueue { queue: to, kind: second, priority, max_attempts, extras, insert, .. } = &self.verb else {
            return String::new();
        };
        let at = time(self.times.first().copied().flatten());
        let args = format!("'{{\"mark\": {}}}'", self.mark);
        let (tags, metadata) = if *extras { ("ARRAY['a', 'b']", "'{\"of\": \"mine\"}'") } else { ("NULL::text[]", "NULL::jsonb") };
        let (to, kind, attempts) = (queue(*to), kind(*second), or_null(*max_attempts));
        if *insert && side == Side::Extension {
            return format!(
                "INSERT INTO awa.jobs (queue, kind, args, priority, run_at, max_attempts, tags, metadata)
                 VALUES ({to}, {kind}, {args}, {priority}, {at}, {attempts}, {tags}, {metadata}) RETURNING to_jsonb(job_id)"
            );
        }
        format!("SELECT to_jsonb({}.enqueue({to}, {kind}, {args}, {priority}, {at}, {attempts}, {tags}, {metadata}))", side.schema())
    }
}

/// A batch goes on with the priority with which it has begun, whatever the age of its other jobs: only of the first job is it certain, in a
/// queue where age counts.
fn fitting(from: u8, batch: u8) -> u8 {
    if from == 2 { 1 } else { batch }
}

/// Minutes before the beginning of the sequence: in the middle between two steps of ageing.
pub fn microseconds(when: When, now: i64, distinct: i64) -> Option<i64> {
    const MINUTE: i64 = 60_000_000;
    match when {
        When::Now => None,
        When::Past(steps) => Some(now - (5 + 10 * i64::from(steps)) * MINUTE + distinct),
        When::Soon => Some(now + 30 * MINUTE + distinct),
        When::Late => Some(now + 120 * MINUTE + distinct),
    }
}
