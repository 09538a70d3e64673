//! The verbs, each with the jobs it is about.

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// In a transaction that has enqueued before.
    Anywhere,
    /// In a transaction that has not used the queue.
    First,
    /// Not in a transaction block.
    Statement,
}

/// When the state before the verb is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Prepared,
    /// Before the preparation: a look would do what the verb is to do.
    Before,
    /// Before the preparation, and not again until it has succeeded: nothing can be seen meanwhile.
    Never,
}

pub struct Verb {
    pub name: &'static str,
    /// Done by another session before; `{n}` is the number of the call that fails.
    pub prepare: &'static [&'static str],
    /// Gives `{job}` and `{lease}`.
    pub pick: &'static str,
    pub call: &'static str,
    /// First column of the first row of a success; empty: whatever it is.
    pub answer: &'static str,
    pub at: Where,
    /// What was prepared serves until the verb succeeds: making it anew each time would cost too much.
    pub keeps: bool,
    pub look: Look,
    /// Done after its success.
    pub undo: &'static str,
    /// So many of its calls can fail, or the faults have been lost.
    pub at_least: u32,
}

impl Verb {
    const fn new(name: &'static str, call: &'static str) -> Self {
        Self { name, prepare: &[], pick: "", call, answer: "", at: Where::Anywhere, keeps: false, look: Look::Prepared, undo: "", at_least: 10 }
    }

    const fn with(self, prepare: &'static [&'static str]) -> Self {
        Self { prepare, ..self }
    }

    const fn of(self, pick: &'static str) -> Self {
        Self { pick, ..self }
    }

    const fn gives(self, answer: &'static str) -> Self {
        Self { answer, ..self }
    }

    const fn at(self, at: Where) -> Self {
        Self { at, ..self }
    }

    const fn keeping(self) -> Self {
        Self { keeps: true, ..self }
    }

    const fn looking(self, look: Look) -> Self {
        Self { look, ..self }
    }

    const fn undone_by(self, undo: &'static str) -> Self {
        Self { undo, ..self }
    }

    const fn at_least(self, at_least: u32) -> Self {
        Self { at_least, ..self }
    }
}

const THREE_JOBS: &str = "SELECT awa.enqueue('q', 'k', '{\"n\": 1}', tags => '{a,b}', metadata => '{}') FROM generate_series(1, 3)";
const THREE: &[&str] = &[THREE_JOBS];
const A_RUNNING_ONE: &str = "SELECT job_id, run_lease FROM awa.claim('q')";
const HOLES: &[&str] = &["SELECT awa.enqueue('q', 'k') FROM generate_series(1, 3)", "BEGIN", "SELECT * FROM awa.claim('q', 64)", "ROLLBACK"];

pub const PRODUCERS_AND_WORKERS: &[Verb] = &[
    Verb::new("enqueue", "SELECT awa.enqueue('q', 'k', '{\"n\": 1}', tags => '{a,b}', metadata => '{}')"),
    Verb::new("enqueue of a new kind", "SELECT awa.enqueue('q', 'kind {n}', '{\"n\": 1}', run_at => now() + '1 hour')"),
    Verb::new("enqueue of a large job", "SELECT awa.enqueue('q', 'k', (SELECT jsonb_agg(md5(i::text)) FROM generate_series(1, 400) AS i))"),
    Verb::new("enqueue_many", "SELECT cardinality(awa.enqueue_many('q', 'k', '{1,2,3,4}'::jsonb[], '{1,2,2,4}', ARRAY[NULL, NULL, now(), NULL]))").gives("4"),
    Verb::new("insert", "INSERT INTO awa.jobs (queue, kind, args, tags) VALUES ('q', 'k', '{}', '{a}'), ('q', 'k', '{}', NULL)"),
    Verb::new("claim", "SELECT count(*) FROM awa.claim('q', 3)").with(THREE).gives("3"),
    Verb::new("claim of jobs given back", "SELECT count(*) FROM awa.claim('q', 3)").with(HOLES).gives("3"),
    Verb::new("claim of several queues", "SELECT count(*) FROM awa.claim('{side,q}'::text[], 3, '1 hour', '1 minute')").with(THREE).gives("3"),
    Verb::new("claim beside a cancelled job", "SELECT count(*) FROM awa.claim('q', 3)")
        .with(&[THREE_JOBS, "SELECT awa.cancel(awa.enqueue('q', 'k', priority => 1))"])
        .gives("3"),
    Verb::new("complete", "SELECT awa.complete({job}, {lease})").with(THREE).of(A_RUNNING_ONE).gives("completed"),
    Verb::new("complete_many", "SELECT count(*) FROM awa.complete_many('{{job},1}', '{{lease},1}') WHERE result = 'completed'")
        .with(THREE)
        .of(A_RUNNING_ONE)
        .gives("1"),
    Verb::new("complete_and_claim", "SELECT count(*) FROM awa.complete_and_claim('{{job}}', '{{lease}}', 'q', 2)").with(THREE).of(A_RUNNING_ONE).gives("2"),
    Verb::new("fail", "SELECT awa.fail({job}, {lease}, 'an error', '1 hour')").with(THREE).of(A_RUNNING_ONE).gives("retry"),
    Verb::new("fail for good", "SELECT awa.fail({job}, {lease}, 'an error', final => true)").with(THREE).of(A_RUNNING_ONE).gives("failed"),
    Verb::new("snooze", "SELECT awa.snooze({job}, {lease}, '1 hour')").with(THREE).of(A_RUNNING_ONE).gives("snooze"),
    Verb::new("heartbeat", "SELECT awa.heartbeat({job}, {lease})").with(THREE).of(A_RUNNING_ONE).gives("t").at_least(1),
    Verb::new("heartbeat_many", "SELECT count(*) FROM awa.heartbeat_many('{{job},1}', '{{lease},1}')").with(THREE).of(A_RUNNING_ONE).gives("2").at_least(3),
    Verb::new("extend", "SELECT awa.extend({job}, {lease}, '1 hour') > now()").with(THREE).of(A_RUNNING_ONE).gives("t").at_least(1),
    Verb::new("wait", "CALL awa.wait('empty', '10 ms')").with(&["SELECT awa.create_queue('empty')"]).undone_by("SELECT awa.drop_queue('empty')").at(Where::Statement).keeping().at_least(3),
];

const FAILED: &[&str] = &[THREE_JOBS, "SELECT awa.fail(job_id, run_lease, 'an error', final => true) FROM awa.claim('q')"];
const LAST_FAILED: &str = "SELECT max(job_id) FROM awa.terminal_jobs WHERE state = 'failed'";
const ONE_FOR_LETTERS: &str = "SELECT awa.enqueue('letters', 'k', '{\"n\": 1}', tags => '{a}')";
const LETTER: &[&str] = &[
    ONE_FOR_LETTERS,
    "SELECT awa.fail(job_id, run_lease, 'an error', final => true) FROM awa.claim('letters')",
];
const IF_NEEDED_FRESH: &str = "SELECT awa.create_queue('fresh') WHERE NOT EXISTS (SELECT FROM awa.queues WHERE queue = 'fresh')";
const FRESH: &[&str] = &[IF_NEEDED_FRESH];
const LAST_LETTER: &str = "SELECT max(job_id) FROM awa.dlq";

pub const OPERATORS: &[Verb] = &[
    Verb::new("cancel of a running job", "SELECT awa.cancel({job}, 'reason')").with(THREE).of(A_RUNNING_ONE).gives("cancelled"),
    Verb::new("cancel of a waiting job", "SELECT awa.cancel({job}, 'reason')")
        .with(THREE)
        .of("SELECT max(job_id) FROM awa.jobs WHERE queue = 'q' AND state = 'available'")
        .gives("cancelled").keeping(),
    Verb::new("cancel of a job given back", "SELECT awa.cancel({job}, 'reason')")
        .with(HOLES)
        .of("SELECT max(job_id) FROM awa.jobs WHERE queue = 'q' AND state = 'available'")
        .gives("cancelled").keeping(),
    Verb::new("retry", "SELECT awa.retry({job}, priority => 1)").with(FAILED).of(LAST_FAILED).gives("retried").keeping(),
    Verb::new("delete_job", "SELECT awa.delete_job({job})").with(FAILED).of(LAST_FAILED).gives("deleted").keeping(),
    Verb::new("fail into the dead letters", "SELECT awa.fail({job}, {lease}, 'an error', final => true)")
        .with(&[ONE_FOR_LETTERS])
        .of("SELECT job_id, run_lease FROM awa.claim('letters')")
        .gives("dead_lettered"),
    Verb::new("dlq_retry", "SELECT awa.dlq_retry({job}, 'q')").with(LETTER).of(LAST_LETTER).gives("retried"),
    Verb::new("delete_job of a dead letter", "SELECT awa.delete_job({job})").with(LETTER).of(LAST_LETTER).gives("deleted").keeping(),
    Verb::new("dlq_retry_many", "SELECT awa.dlq_retry_many('letters', to_queue => 'q') > 0").with(LETTER).gives("t").keeping(),
    Verb::new("dlq_purge", "SELECT awa.dlq_purge('letters', 'k') > 0").with(LETTER).gives("t").keeping(),
    Verb::new("create_queue", "SELECT awa.create_queue('fresh')").undone_by("SELECT awa.drop_queue('fresh')"),
    Verb::new("alter_queue", "SELECT awa.alter_queue('fresh', max_attempts => 7, deadline => '1 hour')").with(FRESH),
    Verb::new("pause_queue", "SELECT awa.pause_queue('fresh')").with(FRESH),
    Verb::new("resume_queue", "SELECT awa.resume_queue('fresh')").with(FRESH),
    Verb::new("drop_queue", "SELECT awa.drop_queue('fresh', force => true)")
        .with(&[IF_NEEDED_FRESH, "SELECT awa.enqueue('fresh', 'k')"])
        .keeping(),
];

/// Nothing is open any more, and the ring has a new segment.
const CLEARED: &str = "
DO $$ BEGIN
    LOOP
        PERFORM awa.complete(job_id, run_lease) FROM awa.claim('{q,side,kept}'::text[], 64);
        EXIT WHEN NOT FOUND;
        COMMIT;
    END LOOP;
    PERFORM awa.cancel(job_id) FROM awa.jobs;
END $$";
const ROTATED: &str = "SELECT awa.rotate()";
const PRUNED: &str = "
DO $$ BEGIN
    FOR i IN 1..200 LOOP
        EXIT WHEN (SELECT outcome FROM awa.prune()) NOT IN ('prune_started', 'pruned');
        COMMIT;
    END LOOP;
END $$";

/// A sealed segment, in which one job has failed and one, to be kept, is completed.
macro_rules! drained {
    ($($then:expr)?) => {
        &[
            CLEARED,
            ROTATED,
            PRUNED,
            "SELECT awa.enqueue('q', 'k'), awa.enqueue('kept', 'k')",
            "SELECT awa.fail(job_id, run_lease, 'an error', final => true) FROM awa.claim('q')",
            "SELECT awa.complete(job_id, run_lease) FROM awa.claim('kept')",
            ROTATED,
            $($then)?
        ]
    };
}

pub const MAINTENANCE: &[Verb] = &[
    Verb::new("rotate", "SELECT outcome FROM awa.rotate()").gives("rotated").at(Where::First),
    Verb::new("add_segments", "SELECT awa.add_segments(1) > 0").gives("t").at(Where::First),
    Verb::new("carry_forward", "SELECT outcome FROM awa.carry_forward({job})")
        .with(&[
            CLEARED,
            ROTATED,
            PRUNED,
            "SELECT awa.enqueue('q', 'k') FROM generate_series(1, 4)",
            "SELECT * FROM awa.claim('q', 2)",
            "SELECT awa.enqueue('q', 'k', run_at => now() + '1 hour'), awa.enqueue('q', 'k', run_at => now() + '100 years')",
            "BEGIN",
            "SELECT * FROM awa.claim('q', 1)",
            "ROLLBACK",
            ROTATED,
        ])
        .of("SELECT max(generation) FROM awa.stat_segments WHERE state = 'sealed'")
        .gives("carried")
        .at(Where::First)
        .keeping()
        .at_least(50),
    Verb::new("promote_deferred", "SELECT outcome FROM awa.promote_deferred()")
        .with(&[
            CLEARED,
            ROTATED,
            PRUNED,
            "SELECT awa.enqueue('q', 'k', run_at => now() + '100 years') FROM generate_series(1, 2)",
            ROTATED,
            "SELECT awa.carry_forward((SELECT max(generation) FROM awa.stat_segments WHERE state = 'sealed'))",
            "UPDATE awa.deferred_jobs SET run_at = now() + '1 second', look_at = now()",
        ])
        .gives("promoted")
        .at(Where::First)
        .keeping(),
    Verb::new("rescue_expired_deadlines", "SELECT outcome FROM awa.rescue_expired_deadlines()")
        .with(&[THREE_JOBS, "SELECT * FROM awa.claim('q', 2, deadline => '1 microsecond')"])
        .gives("rescued")
        .at(Where::First),
    Verb::new("rescue_stale_heartbeats", "SELECT outcome FROM awa.rescue_stale_heartbeats()")
        .with(&[THREE_JOBS, "SELECT * FROM awa.claim('q', 2, heartbeat_timeout => '1 microsecond')"])
        .gives("rescued")
        .at(Where::First),
    Verb::new("prune, the proof", "SELECT outcome FROM awa.prune()")
        .with(drained!())
        .gives("prune_started")
        .at(Where::First)
        .keeping()
        .at_least(50),
    Verb::new("prune, the truncation", "SELECT outcome FROM awa.prune()")
        .with(drained!("SELECT awa.prune()"))
        .gives("pruned")
        .at(Where::First)
        .keeping()
        .at_least(30),
    Verb::new("retry of a kept job", "SELECT awa.retry({job})")
        .of("SELECT max(job_id) FROM awa.terminal_jobs WHERE state = 'failed'")
        .gives("retried")
        .keeping(),
    Verb::new("delete_job of a kept job", "SELECT awa.delete_job({job})")
        .of("SELECT max(job_id) FROM awa.terminal_jobs WHERE state = 'completed'")
        .gives("deleted")
        .keeping(),
    Verb::new("retention", "SELECT outcome FROM awa.retention()").with(LETTER).gives("deleted").at(Where::First),
    Verb::new("rebuild", "SELECT awa.rebuild() > 0").with(HOLES).gives("t").at(Where::First).at_least(40).keeping(),
    Verb::new("pre_restore", "SELECT awa.pre_restore()").at(Where::First).undone_by("SELECT awa.post_restore()"),
    Verb::new("post_restore", "SELECT awa.post_restore()").with(&["SELECT awa.pre_restore()"]).at(Where::First).keeping().looking(Look::Never),
    Verb::new("first use", "SELECT count(*) > 0 FROM awa.queue_counts()")
        .with(&["SELECT awa.pre_restore()", "SELECT awa.post_restore()"])
        .gives("t")
        .at(Where::First)
        .looking(Look::Before)
        .at_least(40),
];

pub const READERS: &[Verb] = &[
    Verb::new("job", "SELECT state FROM awa.job({job})").with(THREE).of(A_RUNNING_ONE).gives("running").keeping(),
    Verb::new("jobs", "SELECT count(*) > 0 FROM awa.jobs").with(THREE).gives("t").keeping(),
    Verb::new("terminal_jobs", "SELECT count(*) > 0 FROM awa.terminal_jobs").with(FAILED).gives("t").keeping(),
    Verb::new("queue_counts", "SELECT count(*) FROM awa.queue_counts('q')").gives("1").at_least(4),
    Verb::new("stat_queue", "SELECT count(*) FROM awa.stat_queue").gives("2").at_least(4),
    Verb::new("stat_segments", "SELECT count(*) FROM awa.stat_segments").gives("1").at_least(4),
    Verb::new("verify", "SELECT count(*) FROM awa.verify()").with(THREE).gives("0").at_least(30).keeping(),
    Verb::new("metrics", "SELECT count(*) > 0 FROM awa.metrics()").gives("t").at_least(10),
    Verb::new("doctor", "SELECT count(*) > 0 FROM awa.doctor()").gives("t").at_least(10).keeping(),
];
