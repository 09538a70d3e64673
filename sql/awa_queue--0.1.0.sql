\echo Use "CREATE EXTENSION awa_queue" to load this file. \quit

-- Order of this file: schemas, shapes of the segment tables, cold tables, functions by audience, views, dump, grants.
-- Every object is schema-qualified; nothing is granted to PUBLIC.

CREATE SCHEMA awa;
COMMENT ON SCHEMA awa IS 'awa_queue: functions and views of the job queue';

CREATE SCHEMA awa_segments;
COMMENT ON SCHEMA awa_segments IS 'awa_queue: tables of the ring of segments, created at run time; never change them by hand';

-- ---------------------------------------------------------------------------------------------------------------------
-- Cold tables: ordinary, few rows, maintained by the functions below.
-- ---------------------------------------------------------------------------------------------------------------------

CREATE SEQUENCE awa.queue_ids AS integer MAXVALUE 268435455;
CREATE SEQUENCE awa.kind_ids AS integer;
CREATE SEQUENCE awa.job_ids AS bigint INCREMENT BY 256; -- each session takes a block of 256 identifiers at a time

CREATE TABLE awa.queue_definitions (
    queue_id          integer     NOT NULL CONSTRAINT queue_definitions_pkey PRIMARY KEY,
    name              text        NOT NULL,
    paused            boolean     NOT NULL,
    max_attempts      integer     NOT NULL,
    deadline          interval,
    heartbeat_timeout interval,
    backoff           interval    NOT NULL,
    backoff_max       interval    NOT NULL,
    priority_ageing   interval,
    completed_retention   interval,
    failed_retention      interval,
    cancelled_retention   interval,
    dead_letters          boolean     NOT NULL,
    dead_letter_retention interval,
    created_at        timestamptz NOT NULL,
    dropped_at        timestamptz -- rows of a dropped queue count as closed
);
COMMENT ON TABLE awa.queue_definitions IS 'settings of each queue; read the view awa.queues, change them with awa.alter_queue()';
CREATE UNIQUE INDEX queue_definitions_name_idx ON awa.queue_definitions (name) WHERE dropped_at IS NULL;

-- No unique index on name: two transactions may add the same kind at once without waiting; either number is right.
CREATE TABLE awa.job_kinds (
    kind_id integer NOT NULL CONSTRAINT job_kinds_pkey PRIMARY KEY,
    name    text    NOT NULL
);
COMMENT ON TABLE awa.job_kinds IS 'dictionary of job kinds; a name may have several numbers';
CREATE INDEX job_kinds_name_idx ON awa.job_kinds (name);

CREATE TABLE awa.ring_rotations (
    generation bigint      NOT NULL,
    slot       integer     NOT NULL,
    event      text        NOT NULL CONSTRAINT ring_rotations_event_check CHECK (event IN ('opened', 'prune_started', 'pruned')),
    at         timestamptz NOT NULL,
    CONSTRAINT ring_rotations_pkey PRIMARY KEY (generation, event)
);
COMMENT ON TABLE awa.ring_rotations IS 'append-only ledger of the ring of segments';

-- Finished jobs that outlive their segment. Ordinary tables: rows are deleted, autovacuum does its job.
CREATE TABLE awa.retained_jobs (
    job_id       bigint      NOT NULL CONSTRAINT retained_jobs_pkey PRIMARY KEY,
    queue_id     integer     NOT NULL,
    kind_id      integer     NOT NULL,
    state        "char"      NOT NULL, -- d completed, f failed, c cancelled
    priority     smallint    NOT NULL,
    attempt      smallint    NOT NULL,
    max_attempts smallint    NOT NULL,
    hop          integer     NOT NULL, -- of the copy that was finished
    generation   bigint      NOT NULL, -- of the segment it was copied from
    run_at       timestamptz NOT NULL,
    enqueued_at  timestamptz NOT NULL,
    claimed_at   timestamptz,
    finished_at  timestamptz NOT NULL,
    tags         text[],
    metadata     jsonb,
    errors       jsonb,
    args         jsonb       NOT NULL,
    CONSTRAINT retained_jobs_state_check CHECK (state IN ('d', 'f', 'c'))
);
COMMENT ON TABLE awa.retained_jobs IS 'finished jobs whose segment was pruned before their retention was over; read the view awa.terminal_jobs';
CREATE INDEX retained_jobs_queue_state_finished_idx ON awa.retained_jobs (queue_id, state, finished_at);

CREATE TABLE awa.dlq_entries (
    job_id       bigint      NOT NULL CONSTRAINT dlq_entries_pkey PRIMARY KEY,
    queue_id     integer     NOT NULL,
    kind_id      integer     NOT NULL,
    priority     smallint    NOT NULL,
    attempt      smallint    NOT NULL,
    max_attempts smallint    NOT NULL,
    hop          integer     NOT NULL, -- of the copy that failed for good
    run_at       timestamptz NOT NULL,
    enqueued_at  timestamptz NOT NULL,
    claimed_at   timestamptz NOT NULL,
    failed_at    timestamptz NOT NULL,
    tags         text[],
    metadata     jsonb,
    errors       jsonb       NOT NULL,
    args         jsonb       NOT NULL
);
COMMENT ON TABLE awa.dlq_entries IS 'dead letters: jobs that failed for good in a queue with dead_letters; read the view awa.dlq';
CREATE INDEX dlq_entries_queue_failed_idx ON awa.dlq_entries (queue_id, failed_at);

-- Which server and database this queue belongs to. A restored or copied database names another: it does nothing until awa.adopt().
CREATE TABLE awa.instance (
    only_row          boolean     NOT NULL CONSTRAINT instance_pkey PRIMARY KEY,
    system_identifier bigint      NOT NULL,
    database_oid      oid         NOT NULL,
    ledger_oid        oid         NOT NULL, -- of awa.ring_rotations: another one after DROP EXTENSION and a restore into the same database
    since             timestamptz NOT NULL,
    CONSTRAINT instance_only_row_check CHECK (only_row)
);
COMMENT ON TABLE awa.instance IS 'the server and database whose jobs these are; changed only by awa.adopt() and awa.post_restore()';

-- A row here: a restore is under way. Not dumped. Also a lock: who builds the working state holds AccessShare, who voids it AccessExclusive.
CREATE TABLE awa.restoring (
    only_row boolean     NOT NULL CONSTRAINT restoring_pkey PRIMARY KEY,
    since    timestamptz NOT NULL,
    CONSTRAINT restoring_only_row_check CHECK (only_row)
);
COMMENT ON TABLE awa.restoring IS 'has a row between awa.pre_restore() and awa.post_restore(); never dumped';

-- Jobs due so late that they do not wait in the ring. A row is the newest copy of its job, with the columns of a ready entry.
CREATE TABLE awa.deferred_jobs (
    job_id       bigint      NOT NULL CONSTRAINT deferred_jobs_pkey PRIMARY KEY,
    hop          integer     NOT NULL,
    lane         integer     NOT NULL, -- queue_id * 8 + (priority - 1) * 2 + 1
    kind_id      integer     NOT NULL,
    attempt      smallint    NOT NULL,
    max_attempts smallint    NOT NULL,
    run_at       timestamptz NOT NULL,
    look_at      timestamptz NOT NULL, -- run_at; later if it could not be brought back
    enqueued_at  timestamptz,
    tags         text[],
    metadata     jsonb,
    errors       jsonb,
    args         jsonb       NOT NULL,
    problem      text                  -- why it could not be brought back
);
COMMENT ON TABLE awa.deferred_jobs IS 'jobs that were carried out of an old segment long before they are due; brought back by awa.promote_deferred()';
CREATE INDEX deferred_jobs_look_at_idx ON awa.deferred_jobs (look_at);

-- ---------------------------------------------------------------------------------------------------------------------
-- Producer
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa.enqueue(
    queue        text,
    kind         text,
    args         jsonb       DEFAULT '{}',
    priority     integer     DEFAULT 2,
    run_at       timestamptz DEFAULT NULL,
    max_attempts integer     DEFAULT NULL,
    tags         text[]      DEFAULT NULL,
    metadata     jsonb       DEFAULT NULL
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_enqueue';

CREATE FUNCTION awa.enqueue_many(
    queue        text,
    kind         text,
    args         jsonb[],
    priorities   integer[]     DEFAULT NULL,
    run_ats      timestamptz[] DEFAULT NULL,
    max_attempts integer       DEFAULT NULL,
    tags         text[]        DEFAULT NULL,
    metadata     jsonb         DEFAULT NULL
) RETURNS bigint[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_enqueue_many';

-- ---------------------------------------------------------------------------------------------------------------------
-- Worker
-- ---------------------------------------------------------------------------------------------------------------------

CREATE TYPE awa.claimed_job AS (
    job_id       bigint,
    run_lease    bigint,
    queue        text,
    kind         text,
    args         jsonb,
    priority     integer,
    attempt      integer,
    max_attempts integer,
    run_at       timestamptz,
    enqueued_at  timestamptz,
    deadline_at  timestamptz,
    tags         text[],
    metadata     jsonb,
    errors       jsonb
);

CREATE FUNCTION awa.claim(
    queue             text,
    batch_size        integer  DEFAULT 1,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa.claimed_job
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_claim';

CREATE FUNCTION awa.claim(
    queues            text[],
    batch_size        integer  DEFAULT 1,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa.claimed_job
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_claim_queues';

CREATE FUNCTION awa.claim_ready_runtime(
    queue             text,
    batch_size        integer  DEFAULT 1,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa.claimed_job
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_claim';

CREATE TYPE awa.job_result AS (
    job_id    bigint,
    run_lease bigint,
    result    text
);

CREATE FUNCTION awa.complete(job_id bigint, run_lease bigint) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_complete';

CREATE FUNCTION awa.complete_many(job_ids bigint[], run_leases bigint[]) RETURNS SETOF awa.job_result
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_complete_many';

CREATE FUNCTION awa.complete_and_claim(
    job_ids           bigint[],
    run_leases        bigint[],
    queue             text,
    batch_size        integer  DEFAULT 1,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa.claimed_job
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_complete_and_claim';

CREATE FUNCTION awa.fail(
    job_id      bigint,
    run_lease   bigint,
    error       text     DEFAULT NULL,
    retry_after interval DEFAULT NULL,
    final       boolean  DEFAULT false
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_fail';

CREATE FUNCTION awa.snooze(job_id bigint, run_lease bigint, delay interval) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_snooze';

CREATE FUNCTION awa.heartbeat(job_id bigint, run_lease bigint) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_heartbeat';

CREATE FUNCTION awa.heartbeat_many(job_ids bigint[], run_leases bigint[]) RETURNS SETOF awa.job_result
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 64 AS 'MODULE_PATHNAME', 'awa_heartbeat_many';

CREATE FUNCTION awa.extend(job_id bigint, run_lease bigint, by interval) RETURNS timestamptz
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_extend';

CREATE PROCEDURE awa.wait(queue text, timeout interval DEFAULT '30 seconds')
    LANGUAGE c AS 'MODULE_PATHNAME', 'awa_wait';

-- ---------------------------------------------------------------------------------------------------------------------
-- Operator
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa.create_queue(
    queue             text,
    max_attempts      integer  DEFAULT 25,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL,
    backoff           interval DEFAULT '1 second',
    backoff_max       interval DEFAULT '1 day',
    priority_ageing   interval DEFAULT '1 minute',
    completed_retention   interval DEFAULT '0',
    failed_retention      interval DEFAULT '7 days',
    cancelled_retention   interval DEFAULT '1 day',
    dead_letters          boolean  DEFAULT false,
    dead_letter_retention interval DEFAULT '30 days',
    options           jsonb    DEFAULT '{}'
) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_create_queue';

CREATE FUNCTION awa.alter_queue(
    queue             text,
    max_attempts      integer  DEFAULT NULL,
    deadline          interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL,
    backoff           interval DEFAULT NULL,
    backoff_max       interval DEFAULT NULL,
    priority_ageing   interval DEFAULT NULL,
    completed_retention   interval DEFAULT NULL,
    failed_retention      interval DEFAULT NULL,
    cancelled_retention   interval DEFAULT NULL,
    dead_letters          boolean  DEFAULT NULL,
    dead_letter_retention interval DEFAULT NULL,
    options           jsonb    DEFAULT '{}'
) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_alter_queue';

CREATE FUNCTION awa.drop_queue(queue text, force boolean DEFAULT false) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_drop_queue';

CREATE FUNCTION awa.pause_queue(queue text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_pause_queue';

CREATE FUNCTION awa.resume_queue(queue text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_resume_queue';

CREATE FUNCTION awa.cancel(job_id bigint, reason text DEFAULT NULL) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_cancel';

CREATE FUNCTION awa.retry(
    job_id   bigint,
    queue    text        DEFAULT NULL,
    priority integer     DEFAULT NULL,
    run_at   timestamptz DEFAULT NULL
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_retry';

CREATE FUNCTION awa.delete_job(job_id bigint) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_delete_job';

CREATE FUNCTION awa.dlq_retry(
    job_id   bigint,
    queue    text        DEFAULT NULL,
    priority integer     DEFAULT NULL,
    run_at   timestamptz DEFAULT NULL
) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_dlq_retry';

CREATE FUNCTION awa.dlq_retry_many(
    queue         text        DEFAULT NULL,
    kind          text        DEFAULT NULL,
    failed_before timestamptz DEFAULT NULL,
    max_jobs      integer     DEFAULT 1000,
    to_queue      text        DEFAULT NULL,
    to_priority   integer     DEFAULT NULL,
    run_at        timestamptz DEFAULT NULL
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_dlq_retry_many';

CREATE FUNCTION awa.dlq_purge(
    queue         text        DEFAULT NULL,
    kind          text        DEFAULT NULL,
    failed_before timestamptz DEFAULT NULL,
    max_jobs      integer     DEFAULT 1000
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_dlq_purge';

CREATE TYPE awa.task_outcome AS (
    outcome    text,
    rows       bigint,         -- jobs or rows handled
    generation bigint,         -- of the segment concerned
    slot       integer,
    detail     text,
    duration   interval
);

CREATE FUNCTION awa.rescue_expired_deadlines() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_rescue_expired_deadlines';

CREATE FUNCTION awa.rescue_stale_heartbeats() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_rescue_stale_heartbeats';
CREATE FUNCTION awa.promote_deferred() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_promote_deferred';

CREATE FUNCTION awa.rotate() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_rotate';

CREATE FUNCTION awa.carry_forward(generation bigint DEFAULT NULL) RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_carry_forward';

CREATE FUNCTION awa.prune() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_prune';

CREATE FUNCTION awa.add_segments(count integer) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_add_segments';

CREATE FUNCTION awa.retention() RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_retention';

CREATE FUNCTION awa.run_maintenance(task text) RETURNS SETOF awa.task_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_run_maintenance';

CREATE FUNCTION awa.wake_maintenance() RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_wake_maintenance';

CREATE FUNCTION awa.announce() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_announce';

CREATE TYPE awa.difference AS (
    problem text,
    queue   text,
    job_id  bigint,
    hop     integer,
    detail  text
);

CREATE FUNCTION awa.verify() RETURNS SETOF awa.difference
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_verify';

CREATE FUNCTION awa.adopt() RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_adopt';

CREATE FUNCTION awa.pre_restore() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_pre_restore';

CREATE FUNCTION awa.post_restore() RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_post_restore';

CREATE FUNCTION awa.rebuild() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_rebuild';

-- ---------------------------------------------------------------------------------------------------------------------
-- Inspect
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa.version() RETURNS text
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_version';

CREATE TYPE awa.job_row AS (
    job_id       bigint,
    queue        text,
    kind         text,
    state        text,         -- scheduled, available, running, completed, failed, cancelled, dead_lettered
    priority     integer,
    attempt      integer,
    max_attempts integer,
    run_at       timestamptz,
    enqueued_at  timestamptz,
    claimed_at   timestamptz,
    deadline_at  timestamptz,
    heartbeat_at timestamptz,
    finished_at  timestamptz,
    tags         text[],
    metadata     jsonb,
    errors       jsonb,
    args         jsonb
);

CREATE FUNCTION awa.job(job_id bigint) RETURNS SETOF awa.job_row
    LANGUAGE c STABLE STRICT PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_job';

CREATE FUNCTION awa.list_jobs(finished boolean) RETURNS SETOF awa.job_row
    LANGUAGE c STABLE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_list_jobs';

CREATE TYPE awa.queue_count AS (
    queue     text,
    available bigint,          -- enqueued to run at once and not claimed
    scheduled bigint,          -- with a run_at, a retry or a snooze, and not claimed (due or not)
    running   bigint,
    completed bigint,          -- finished jobs that are still shown
    failed    bigint,
    cancelled bigint,
    dead_lettered bigint
);

CREATE FUNCTION awa.queue_counts(queue text DEFAULT NULL) RETURNS SETOF awa.queue_count
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_queue_counts';

CREATE TYPE awa.segment_stat AS (
    generation bigint,
    slot       integer,
    state      text,           -- open, sealed, prune_started
    opened_at  timestamptz,
    bytes      bigint,
    ready_entries text,
    running    bigint,         -- attempts in it, as memory knows them
    given_back bigint,         -- holes
    passed_by  integer,        -- transactions that scans have passed by in it
    waiting_queues integer,    -- queues that still have rows of it to claim
    drained    boolean,        -- memory knows of nothing open in it
    holder_pids integer[]      -- processes whose locks keep it from being truncated; 0: a prepared transaction
);

CREATE FUNCTION awa.segment_stats() RETURNS SETOF awa.segment_stat
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_segment_stats';

CREATE TYPE awa.queue_stat AS (
    queue           text,
    enqueued        bigint,    -- since the frontier was built
    claimed         bigint,
    completed       bigint,
    failed_attempts bigint,
    snoozed         bigint,
    rescued         bigint,    -- of the failed attempts: those ended for their deadline or heartbeat
    holes           bigint,
    gaps            integer,
    oldest_due_at   timestamptz,
    waiters         integer
);

CREATE FUNCTION awa.queue_stats() RETURNS SETOF awa.queue_stat
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_queue_stats';

CREATE TYPE awa.maintenance_stat AS (
    task          text,
    state         text,         -- idle, ok, throttled, cooling_down, failing
    runs          bigint,       -- steps
    rows          bigint,       -- jobs or rows handled
    errors        bigint,
    last_run      timestamptz,
    last_duration interval,
    next_due      timestamptz,
    last_outcome  text,
    last_detail   text,
    last_error    text
);

CREATE FUNCTION awa.maintenance_stats() RETURNS SETOF awa.maintenance_stat
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 8 AS 'MODULE_PATHNAME', 'awa_maintenance_stats';

CREATE TYPE awa.finding AS (
    check_name text,
    status     text,            -- ok, warning, error
    detail     text,
    hint       text
);

CREATE FUNCTION awa.doctor() RETURNS SETOF awa.finding
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 16 AS 'MODULE_PATHNAME', 'awa_doctor';

CREATE TYPE awa.metric AS (
    name   text,
    labels jsonb,
    value  double precision
);

CREATE FUNCTION awa.metrics() RETURNS SETOF awa.metric
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_metrics';

CREATE VIEW awa.jobs AS
    SELECT * FROM awa.list_jobs(false);
COMMENT ON VIEW awa.jobs IS 'jobs that are not finished: scheduled, available, running; INSERT and COPY into it enqueue';

CREATE VIEW awa.terminal_jobs AS
    SELECT * FROM awa.list_jobs(true);
COMMENT ON VIEW awa.terminal_jobs IS 'finished jobs: completed, failed, cancelled; in the ring, or kept until their retention is over';

CREATE VIEW awa.dlq AS
    SELECT d.job_id, q.name AS queue, k.name AS kind, d.args, d.priority::integer AS priority, d.attempt::integer AS attempt,
           d.max_attempts::integer AS max_attempts, d.errors -> -1 ->> 'error' AS error, d.errors, d.failed_at, d.enqueued_at, d.run_at,
           d.tags, d.metadata
      FROM awa.dlq_entries AS d
      JOIN awa.queue_definitions AS q ON q.queue_id = d.queue_id AND q.dropped_at IS NULL
      LEFT JOIN awa.job_kinds AS k ON k.kind_id = d.kind_id;
COMMENT ON VIEW awa.dlq IS 'dead letters: jobs that failed for good in a queue with dead_letters; error: that of the last attempt; readable on a standby';

CREATE FUNCTION awa.jobs_insert() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'awa_jobs_insert';

CREATE TRIGGER jobs_insert INSTEAD OF INSERT ON awa.jobs
    FOR EACH ROW EXECUTE FUNCTION awa.jobs_insert();

CREATE VIEW awa.queues AS
    SELECT name AS queue, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing,
           pg_catalog.justify_hours(completed_retention) AS completed_retention,
           pg_catalog.justify_hours(failed_retention) AS failed_retention,
           pg_catalog.justify_hours(cancelled_retention) AS cancelled_retention, dead_letters,
           pg_catalog.justify_hours(dead_letter_retention) AS dead_letter_retention, created_at
      FROM awa.queue_definitions
     WHERE dropped_at IS NULL;

CREATE VIEW awa.stat_queue AS
    SELECT * FROM awa.queue_stats();

CREATE VIEW awa.stat_segments AS
    SELECT s.generation, s.slot, s.state, s.opened_at, s.bytes, s.ready_entries, s.running, s.given_back, s.passed_by, s.waiting_queues,
           s.drained, s.holder_pids,
           (SELECT pg_catalog.string_agg(
                       pg_catalog.format('%s %s, %s since %s', COALESCE(a.backend_type, 'process'), a.pid, COALESCE(a.state, 'running'),
                                         COALESCE(a.xact_start, a.backend_start)), '; ' ORDER BY a.pid)
              FROM pg_catalog.pg_stat_activity AS a
             WHERE a.pid = ANY (s.holder_pids))
           || CASE WHEN 0 = ANY (s.holder_pids) THEN '; a prepared transaction' ELSE '' END AS held_by
      FROM awa.segment_stats() AS s;

-- Everything that keeps old row versions alive, or a segment from being truncated. Plain SQL: works on a standby, and when nothing else does.
CREATE VIEW awa.horizon AS
    WITH locked AS (
        SELECT l.pid, l.virtualtransaction, pg_catalog.array_agg(DISTINCT c.relname::text ORDER BY c.relname::text) AS tables
          FROM pg_catalog.pg_locks AS l
          JOIN pg_catalog.pg_class AS c ON c.oid = l.relation
         WHERE l.locktype = 'relation' AND l.granted
           AND l.database = (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = pg_catalog.current_database())
           AND c.relnamespace = 'awa_segments'::pg_catalog.regnamespace AND c.relkind = 'r'
         GROUP BY l.pid, l.virtualtransaction
    )
    SELECT CASE WHEN a.backend_type = 'walsender' THEN 'walsender' ELSE 'session' END AS kind,
           a.pid, a.usename::text AS name, a.datname::text AS database, a.application_name, a.state,
           GREATEST(pg_catalog.age(a.backend_xmin), pg_catalog.age(a.backend_xid)) AS age_in_xids,
           a.xact_start, a.query_start, l.tables AS segment_tables, a.query
      FROM pg_catalog.pg_stat_activity AS a
      LEFT JOIN locked AS l ON l.pid = a.pid
     WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL OR l.tables IS NOT NULL)
       AND a.pid <> pg_catalog.pg_backend_pid()
    UNION ALL
    SELECT 'prepared transaction', NULL, p.gid, p.database::text, NULL, NULL, pg_catalog.age(p.transaction), p.prepared, NULL, l.tables, NULL
      FROM pg_catalog.pg_prepared_xacts AS p
      LEFT JOIN pg_catalog.pg_locks AS x
        ON x.locktype = 'transactionid' AND x.pid IS NULL AND x.transactionid = p.transaction AND x.mode = 'ExclusiveLock'
      LEFT JOIN locked AS l ON l.pid IS NULL AND l.virtualtransaction = x.virtualtransaction
    UNION ALL
    SELECT 'replication slot', r.active_pid, r.slot_name::text, r.database::text, NULL, CASE WHEN r.active THEN 'active' ELSE 'inactive' END,
           GREATEST(pg_catalog.age(r.xmin), pg_catalog.age(r.catalog_xmin)), NULL, NULL, NULL, NULL
      FROM pg_catalog.pg_replication_slots AS r
     WHERE r.xmin IS NOT NULL OR r.catalog_xmin IS NOT NULL
     ORDER BY 7 DESC NULLS LAST;

CREATE VIEW awa.stat_maintenance AS
    SELECT * FROM awa.maintenance_stats();

-- ---------------------------------------------------------------------------------------------------------------------
-- Comments. Of every function: what it does, arguments with units, result, errors of its own with SQLSTATE, locks to the end of the
-- transaction. What any of them may raise besides: 55000 the library is not preloaded, or is of another version; 25006 on a standby;
-- 53400 no place in shared memory for another database; 42704 the queue does not exist; 22004 an argument is null that must not be.
-- ---------------------------------------------------------------------------------------------------------------------

COMMENT ON SEQUENCE awa.queue_ids IS 'numbers of queues; a number is never used again';
COMMENT ON SEQUENCE awa.kind_ids IS 'numbers of job kinds';
COMMENT ON SEQUENCE awa.job_ids IS 'blocks of 256 job identifiers: a session takes a block and uses it up, so identifiers have gaps and no order between sessions';

COMMENT ON COLUMN awa.queue_definitions.deadline IS 'how long an attempt may take unless the claim says otherwise; NULL: no deadline';
COMMENT ON COLUMN awa.queue_definitions.heartbeat_timeout IS 'how long an attempt may stay silent unless the claim says otherwise; NULL: no heartbeat expected';
COMMENT ON COLUMN awa.queue_definitions.backoff IS 'delay after the first failed attempt; doubles with each further one';
COMMENT ON COLUMN awa.queue_definitions.backoff_max IS 'longest delay between attempts, before up to a quarter of jitter is taken off';
COMMENT ON COLUMN awa.queue_definitions.priority_ageing IS 'time of waiting that raises a job by one priority when lanes are compared; NULL: never';
COMMENT ON COLUMN awa.queue_definitions.completed_retention IS 'how long a completed job is shown at least; NULL: until its segment is pruned';
COMMENT ON COLUMN awa.queue_definitions.failed_retention IS 'how long a failed job is shown, and can be retried, at least; NULL: until its segment is pruned';
COMMENT ON COLUMN awa.queue_definitions.cancelled_retention IS 'how long a cancelled job is shown, and can be retried, at least; NULL: until its segment is pruned';
COMMENT ON COLUMN awa.queue_definitions.dead_letters IS 'jobs that fail for good leave the ring and become dead letters';
COMMENT ON COLUMN awa.queue_definitions.dead_letter_retention IS 'how long a dead letter is kept; NULL: until it is retried, deleted or purged';
COMMENT ON COLUMN awa.ring_rotations.generation IS 'number of the segment, from 1, never used again';
COMMENT ON COLUMN awa.ring_rotations.slot IS 'the segment lives in awa_segments.ready_entries_<slot> and its siblings';
COMMENT ON COLUMN awa.ring_rotations.event IS 'opened; prune_started: proved drained, neither read nor opened from here on; pruned: its tables are empty, the slot is free';

COMMENT ON TYPE awa.claimed_job IS
'One attempt, handed to a worker. run_lease is its fencing token (up to 2^62: keep it as a 64-bit integer or as text); attempt counts
from 1; run_at is the time from which the job could run; deadline_at is NULL without a deadline; errors is an array of
{attempt, at, error}, one for each failed attempt.';
COMMENT ON TYPE awa.job_result IS 'What became of one job of a batch: the pair as it was given, and a word';
COMMENT ON TYPE awa.task_outcome IS
'What one step of a maintenance task did: a word, the jobs or rows it handled, the segment concerned, why not more, and how long it took';
COMMENT ON TYPE awa.difference IS 'A difference between the log and shared memory, as found by verify(); hop says which copy of the job';
COMMENT ON TYPE awa.job_row IS
'A job as the log shows it. state: scheduled, available, running, completed, failed, cancelled or dead_lettered. attempt: of the running attempt, or
attempts used so far. heartbeat_at and an extended deadline_at come from shared memory and exist only while the job runs.';
COMMENT ON TYPE awa.queue_count IS 'Jobs of a queue by state; finished ones count as long as they are shown';
COMMENT ON TYPE awa.segment_stat IS 'A live segment of the ring; bytes is the size of its four tables without indexes and toast; what is open in it, and who holds it';
COMMENT ON TYPE awa.queue_stat IS 'Activity of a queue since shared memory was last built, and what its claimers still have to look at';

COMMENT ON TYPE awa.maintenance_stat IS 'What the maintainer has done for one task since it has its place in shared memory';
COMMENT ON TYPE awa.finding IS 'One thing that the doctor has looked at, what it found, and what to do about it';
COMMENT ON TYPE awa.metric IS 'A number for a monitoring system; times are seconds, names that end in _total only grow';

COMMENT ON FUNCTION awa.enqueue(text, text, jsonb, integer, timestamptz, integer, text[], jsonb) IS
'Adds a job in the caller''s transaction and returns its identifier. kind: 1 to 200 bytes, what a worker dispatches on; args: at most
16 MiB; priority: 1 (most urgent) to 4; run_at: not before this time (NULL: at once); max_attempts: 1 to 1000 (NULL: the queue''s);
tags: at most 20 of 200 bytes; metadata: at most 16 MiB. The job is claimable when the transaction has committed.
Never waits for another producer. Works in a prepared transaction.
Errors: 22023 value out of range; 54000 args or metadata too large; 55000 ring without an open segment, or a segment table was rewritten;
25006 read-only transaction; 40001 rebuild() ran meanwhile. Locks: RowExclusive on ready_entries of the open segment.';
COMMENT ON FUNCTION awa.enqueue_many(text, text, jsonb[], integer[], timestamptz[], integer, text[], jsonb) IS
'As enqueue(), for one job for each element of args (at most 100000, none null), all of one kind; returns the identifiers in the same order.
priorities and run_ats, if given, have one element for each job; a null run_at means at once. All or nothing.
Errors: as enqueue(), with the number of the bad element in the HINT; 2202E arrays of different length or dimension; 54000 too many.';

COMMENT ON FUNCTION awa.claim(text, integer, interval, interval) IS
'Hands out at most batch_size (1 to 100000) due jobs of the queue, a row each: first from the priority whose oldest due job
ranks highest, ageing counted, and of it the oldest first, as many as fit; no row when
nothing is due, the queue is paused, or others hold what is due. Never two callers get the same attempt. deadline and heartbeat_timeout:
for these attempts (NULL: as the queue says; zero: none). A rollback, also to a savepoint, gives the jobs back at once, at no cost of an attempt.
Alone in its transaction the commit does not wait for the disk (awa.asynchronous_claim): a crash may then give the jobs back.
Waits at most half a second, for claimers that hold the turn. Fewer rows with a NOTICE of SQLSTATE 53400: awa.max_in_flight, or the
queue''s three quarters of it, are used up.
Errors: 22023 value out of range; 25006 read-only; 55000 a segment table was rewritten; 40001 rebuild() ran meanwhile.
Locks: RowExclusive on ready_entries and lease_claims of each segment visited.';
COMMENT ON FUNCTION awa.claim(text[], integer, interval, interval) IS
'As claim(text, ...), from several queues: each is asked in the order given for what the ones before left of batch_size.
Errors: as claim(text, ...); 22023 no queue named.';
COMMENT ON FUNCTION awa.claim_ready_runtime(text, integer, interval, interval) IS 'The same as claim(queue, ...), under another name';

COMMENT ON FUNCTION awa.complete(bigint, bigint) IS
'Ends the attempt with success, in the caller''s transaction. Returns completed, or already when this transaction has completed it before.
Raises otherwise, so that the caller''s other writes roll back with it: 55000 the lease is not current, or the attempt was ended in another
way in this transaction; 55006 the claim is another session''s and still not committed after 0.1 s. Also 25006 read-only; 40001 rebuild() ran.
Waits for a transaction that is ending the same attempt. As durable as the caller''s commit.
Locks: RowExclusive on ready_entries and done_entries of the job''s segment.';
COMMENT ON FUNCTION awa.complete_many(bigint[], bigint[]) IS
'As complete(), for pairs (at most 100000); a row for each pair, in the same order, with completed, already, conflict (ended in another way in
this transaction), stale (not the lease of a running attempt) or claim_uncommitted. A job that cannot be completed does not raise.
Errors: 2202E arrays of different length; 22004 a null element; 54000 too many.';
COMMENT ON FUNCTION awa.complete_and_claim(bigint[], bigint[], text, integer, interval, interval) IS
'complete_many() and claim() in one statement and one commit: rows as of claim(). All or nothing: a pair that cannot be completed raises as in
complete(), and nothing is claimed. Two empty arrays only claim. The commit waits for the disk when something was completed.';
COMMENT ON FUNCTION awa.fail(bigint, bigint, text, interval, boolean) IS
'Ends the attempt as failed, in the caller''s transaction; error goes into the job''s history. Returns retry: the job runs again after
retry_after (NULL: the queue''s backoff, doubled for each attempt, at most backoff_max, less up to a quarter of jitter); or failed: final was
given or max_attempts are used up, and the job is finished. Also already. Errors and waits: as complete(); 22023 negative retry_after.
Locks: RowExclusive on ready_entries and lease_claim_closures of the job''s segment, and on ready_entries of the open one.';
COMMENT ON FUNCTION awa.snooze(bigint, bigint, interval) IS
'Ends the attempt without using it up: the job runs again after delay, with the same attempt number. Returns snooze, or already.
Errors, waits and locks: as fail().';
COMMENT ON FUNCTION awa.heartbeat(bigint, bigint) IS
'Says that the attempt is alive; false: the lease is not that of a running attempt, or the attempt is being ended. Memory only: writes nothing,
takes no transaction id and no lock, works in a read-only transaction, and a rollback does not take it back.';
COMMENT ON FUNCTION awa.heartbeat_many(bigint[], bigint[]) IS
'As heartbeat(), for pairs; a row for each pair, in the same order, with alive or stale. Errors: 2202E, 22004, 54000 as complete_many().';
COMMENT ON FUNCTION awa.extend(bigint, bigint, interval) IS
'Sets the deadline of the attempt to now plus by (shorter is possible) and counts as a heartbeat; returns the new deadline. Memory only: not
taken back by a rollback; after a restart the deadline is again that of the claim, or the end of a grace, if later: heartbeat_timeout, or
without one as long as the claim had allowed.
Errors: 55000 the lease is not current; 22023 negative by.';
COMMENT ON PROCEDURE awa.wait(text, interval) IS
'Sleeps until the queue may have work, or until timeout. A return is a hint, not a promise: call claim(). Holds no snapshot and no lock while
asleep, so VACUUM is not held back; wakes at the commit that makes work due, and at the next scheduled time it
has seen; looks again at least once a minute.
Errors: 25001 unless it is a statement of its own outside a transaction block, under READ COMMITTED; 22023 negative timeout.';

COMMENT ON FUNCTION awa.create_queue(text, integer, interval, interval, interval, interval, interval, interval, interval, interval, boolean, interval, jsonb) IS
'Creates a queue (name: 1 to 128 bytes), for others when the transaction commits. max_attempts: 1 to 1000; deadline, heartbeat_timeout and
priority_ageing: NULL or zero for none, where NULL of priority_ageing means its default; backoff, backoff_max: see fail(); completed_retention, failed_retention,
cancelled_retention: how long a finished job is shown at least, and a failed or cancelled one can be retried (zero: until its segment is pruned);
dead_letters: a job that fails for good becomes a dead letter (view awa.dlq), which is kept for dead_letter_retention (zero: until somebody
deletes it); options: must be empty.
Lengths of time are at most 100 years; a month counts 30 days. The first queue opens the first segment of the ring.
Errors: 42710 exists already; 22023 value out of range; 53400 awa.max_queues is used up; 25006 read-only.
Locks: RowExclusive on awa.queue_definitions; for the first queue also ShareRowExclusive on awa.ring_rotations.';
COMMENT ON FUNCTION awa.alter_queue(text, integer, interval, interval, interval, interval, interval, interval, interval, interval, boolean, interval, jsonb) IS
'Changes the settings given; NULL leaves a setting as it is, zero switches a length of time off. Holds from the commit on, for jobs enqueued,
claimed or failed after it; a retention also for jobs that are kept already. Errors: as create_queue(). Locks: the row of the queue.';
COMMENT ON FUNCTION awa.drop_queue(text, boolean) IS
'Drops the queue. New jobs are refused from the call on; waits for transactions that are writing to any live segment. With force, unfinished
jobs and dead letters are discarded; workers find their leases stale. Finished and discarded rows stay in the ring until their segments are
pruned; what was kept of its history is deleted by retention().
Errors: 55006 unfinished jobs or dead letters, without force; 25006 read-only. Locks: the row of the queue.';
COMMENT ON FUNCTION awa.pause_queue(text) IS
'From the commit on, claims of this queue return nothing; enqueues and running attempts go on. Locks: the row of the queue.';
COMMENT ON FUNCTION awa.resume_queue(text) IS 'Ends a pause and wakes those who wait. Locks: the row of the queue.';
COMMENT ON FUNCTION awa.cancel(bigint, text) IS
'Ends a job that waits or runs, in the caller''s transaction; reason goes into its error history. Returns cancelled, already_finished,
not_found, or claim_uncommitted (its claim has not committed within 0.1 s). The worker of a running job finds its lease stale. A waiting job is
searched by reading the live segments. Waits for a transaction that is ending the same attempt. Errors: 53400 awa.max_in_flight is used up.
Locks: RowExclusive on ready_entries and lease_claim_closures of the job''s segment; AccessShare on the segments searched.';
COMMENT ON FUNCTION awa.rescue_expired_deadlines() IS
'Ends attempts whose deadline has passed, at most 500 a call, the most overdue of each queue first. Each ends as with fail(): its job runs
again after the queue''s backoff, or is failed when max_attempts are used up; the worker finds its lease stale. Attempts that somebody is
ending, and claims that are not committed, are left alone. outcome: rescued, nothing, or skipped_busy (a segment is locked); detail names a
job that could not be rescued: it is set aside for a minute. Reads no table to find them. Never waits for another transaction.
Locks: RowExclusive on ready_entries and lease_claim_closures of their segments, and on ready_entries of the open one, if they are free.';
COMMENT ON FUNCTION awa.rescue_stale_heartbeats() IS
'As rescue_expired_deadlines(), for attempts from which no heartbeat has come for longer than their heartbeat_timeout';
COMMENT ON FUNCTION awa.retry(bigint, text, integer, timestamptz) IS
'Has a failed, cancelled or dead-lettered job tried again, in the caller''s transaction: the same identifier, attempts counted from the start,
the error history kept. queue, priority: NULL leaves the job where it was; run_at: not before this time (NULL: at once). Returns retried,
completed (it succeeded: enqueue a new job instead), not_finished (it waits or runs, or its end is not committed) or not_found (never there,
deleted, or its retention is over). Reads live segments, as cancel(). Waits for a transaction that is ending, retrying or deleting the job.
Errors: 42704 no such queue; 22023 value out of range; 53400 awa.max_in_flight is used up; 40001 under REPEATABLE READ, the job has changed.
Locks: RowExclusive on ready_entries of the open segment, and on ready_entries and lease_claim_closures of the job''s segment or on the row
that keeps it.';
COMMENT ON FUNCTION awa.delete_job(bigint) IS
'Deletes a finished job, completed or not, in the caller''s transaction: it is not shown, counted or retried any more. Its bytes stay on disk until its
segment is pruned. Returns deleted, not_finished (cancel it first) or not_found. Errors, waits and locks: as retry().';
COMMENT ON FUNCTION awa.dlq_retry(bigint, text, integer, timestamptz) IS
'As retry(), for a dead letter only; needs no look at the ring. Returns retried or not_found.';
COMMENT ON FUNCTION awa.dlq_retry_many(text, text, timestamptz, integer, text, integer, timestamptz) IS
'Has dead letters tried again, the oldest first, and returns how many: those of queue, of kind, that failed before failed_before (NULL: any), at
most max_jobs (1 to 100000). to_queue, to_priority, run_at: as queue, priority and run_at of retry(). Passes by those that another transaction
is retrying or deleting. Errors: as retry(). Locks: RowExclusive on ready_entries of the open segment; the rows of awa.dlq_entries.';
COMMENT ON FUNCTION awa.dlq_purge(text, text, timestamptz, integer) IS
'Deletes dead letters, chosen as by dlq_retry_many(), and returns how many. One of them: delete_job(). Errors and locks: as dlq_retry_many().';
COMMENT ON FUNCTION awa.retention() IS
'One step of deleting finished jobs that were kept beyond their segment, and dead letters, whose retention is over or whose queue was dropped: at
most 1000 of each. outcome: deleted, nothing, skipped_busy (a rebuild is counting them). Never waits; passes by jobs that another transaction
is taking. Locks: RowExclusive on awa.retained_jobs and awa.dlq_entries, if they are free.';
COMMENT ON FUNCTION awa.promote_deferred() IS
'Brings up to 512 jobs back from awa.deferred_jobs into the open segment, those that are due in less than half of awa.deferral.
outcome: promoted (detail names those that could not be), set_aside (none could; they are looked at again in a minute), nothing.
Rows that another transaction has in hand are left. Errors: 25001 the transaction has used the queue, or is not READ COMMITTED.
Locks: RowExclusive on ready_entries of the open segment; the rows.';
COMMENT ON FUNCTION awa.carry_forward(bigint) IS
'One step that empties an old segment: up to 512 of its open jobs are appended again, with a new copy each; jobs due later than awa.deferral
go to awa.deferred_jobs; running attempts keep their lease. generation: the sealed segment to empty, whatever is in it; NULL: the oldest one
that has at most awa.carry_jobs open jobs, when the ring has awa.ring_segments / 2 segments (at least 3), leaving due jobs of queues
from which somebody claims. outcome: carried (rows of them; call it again), skipped_active (jobs are in somebody''s hands, or too many),
blocked (an unfinished transaction, a lock, no place in shared memory), nothing. Waits for no transaction; who wants to end a job that is being carried
waits for the commit. Errors: 25001 the transaction has used the queue, or is not READ COMMITTED; 22023 not a sealed segment.
Locks: RowExclusive on ready_entries of the two segments, on closures of the old and claims of the open one.';
COMMENT ON FUNCTION awa.rotate() IS
'Opens the next segment, in the first free slot; the one before receives no more rows. outcome: rotated, full (awa.ring_segments are live:
producers go on in the open one) or skipped_busy (another session rotates or prunes). Errors: 25001 the transaction has used the queue.
Locks: ShareRowExclusive on awa.ring_rotations, if it is free.';
COMMENT ON FUNCTION awa.prune() IS
'One step towards reuse of the oldest sealed segment; call it again until it answers nothing. outcome: prune_started (each of its jobs is
proved finished), waiting (awa.prune_grace), pruned (its tables were truncated in place), skipped_active (detail names an unfinished
job), blocked (detail names who holds a lock), skipped_busy, nothing. Reads the whole segment. Never waits for a lock.
Errors: 25001 the transaction has used the queue; XX001 a job is unfinished after the proof (nothing is truncated).
Locks: ShareRowExclusive on awa.ring_rotations; for the last step AccessExclusive on the four tables of the segment, if they are free.';
COMMENT ON FUNCTION awa.run_maintenance(text) IS
'One step of a task, as the maintainer runs it: only what is due by the settings. task: a name of awa.stat_maintenance.
Errors: 22023 no such task; else as the task. Locks: those of the task.';
COMMENT ON FUNCTION awa.add_segments(integer) IS
'Creates the tables of so many further slots ahead of time, so that no rotation has to (1 to 64, at most 64 slots in all); returns how many
slots have tables. Errors: 22023 count out of range; 53400 more than 64 slots. Locks: ShareRowExclusive on awa.ring_rotations; those of DDL.';
COMMENT ON FUNCTION awa.pre_restore() IS
'Call it, after CREATE EXTENSION, before data are restored into this database. From its commit on every function refuses (55000) and
maintenance rests, so that nothing reads or frees a ring that is half there; the mark outlives a crash. Waits for transactions that use the
queue. Errors: 25001 the transaction has used the queue. Locks: as rebuild(), and AccessExclusive on awa.restoring.';
COMMENT ON FUNCTION awa.post_restore() IS
'Call it when the restore is complete: ends what pre_restore() began and adopts the jobs as adopt() does. Also after a restore without
pre_restore(). True: the jobs were of another server, database or installation. Errors and locks: as pre_restore().';
COMMENT ON FUNCTION awa.wake_maintenance() IS
'Makes all tasks of this database due now, and wakes its maintainer; false: there is none at the moment. Memory only, takes no lock.';
COMMENT ON FUNCTION awa.announce() IS
'Tells the launcher, when the transaction has committed, that this database has the extension: called by the installation script. Harmless
at any other time. Without effect if the library is not preloaded.';
COMMENT ON FUNCTION awa.adopt() IS
'Makes this server and database the owner of the jobs, after a restore or a copy: until then every other function raises 55000, so that jobs
do not run in two places. True: it was a copy; false: nothing to do. Errors: 25006 read-only; 55000 a restore is under way.
Locks: the row of awa.instance; as pre_restore() if it was a copy.';
COMMENT ON FUNCTION awa.verify() IS
'Folds the log again and compares it with shared memory; a row for each difference, none when all is well. Reads all live segments.
A difference counts if it is still there after the transactions that write have ended, so it may wait for them.
Locks: AccessShare on the tables of live segments.';
COMMENT ON FUNCTION awa.rebuild() IS
'Builds shared memory anew from the log; returns the rows read. Waits for all transactions that have used the queue, and keeps others out
until it commits. Open attempts keep their leases. Errors: 25001 the transaction has used the queue; 53400 shared memory is too small.
Locks: ShareRowExclusive on awa.ring_rotations, Share on ready_entries of all live segments.';

COMMENT ON FUNCTION awa.version() IS 'Version of the loaded library; works on a standby too';
COMMENT ON FUNCTION awa.job(bigint) IS
'The job, or no row when it never existed, was deleted, or its segment was pruned and its retention is over. Sees committed rows, and those of the caller, not only those of its snapshot.
Reads all live segments: for people, not for workers. Locks: AccessShare on the tables of live segments.';
COMMENT ON FUNCTION awa.list_jobs(boolean) IS
'Behind the views awa.jobs (false: unfinished) and awa.terminal_jobs (true: finished). Reads all live segments, as job() does; true: also what is kept outside of them';
COMMENT ON FUNCTION awa.queue_counts(text) IS
'Jobs by state, of one queue or (NULL) of all, from shared memory: exact, no table is read. An uncommitted change does not count yet';
COMMENT ON FUNCTION awa.segment_stats() IS 'Behind the view awa.stat_segments. Locks: AccessShare on the tables of live segments';
COMMENT ON FUNCTION awa.queue_stats() IS 'Behind the view awa.stat_queue; from shared memory, reads no table';
COMMENT ON FUNCTION awa.maintenance_stats() IS
'Behind the view awa.stat_maintenance; from shared memory, also when the maintainer does not run. Takes no lock';
COMMENT ON FUNCTION awa.doctor() IS
'Looks at what keeps the queue from working, or soon will: a row for each check, with status ok, warning or error, and what to do. Works when
the library is not preloaded, on a standby, and when the versions of library and extension differ. Writes nothing, fills no shared memory.
Locks: AccessShare on awa.ring_rotations and awa.instance.';
COMMENT ON FUNCTION awa.metrics() IS
'Numbers for a monitoring system, named in the manner of Prometheus, from shared memory: no table is read. Those of queues are missing
until shared memory has been filled after a start. Takes no lock';
COMMENT ON FUNCTION awa.jobs_insert() IS
'Makes INSERT and COPY into awa.jobs enqueue. Give queue, kind, args, and if wanted priority, run_at, max_attempts, tags, metadata;
RETURNING job_id works. Errors: as enqueue(); 0A000 another column was given';
COMMENT ON TRIGGER jobs_insert ON awa.jobs IS 'see awa.jobs_insert()';

COMMENT ON VIEW awa.queues IS 'queues and their settings; readable on a standby';
COMMENT ON VIEW awa.stat_queue IS 'activity of each queue since shared memory was last built; holes: jobs that came back; gaps: unfinished transactions passed by; waiters: sessions in wait()';
COMMENT ON VIEW awa.stat_segments IS
'Live segments of the ring, the last one open. A sealed one is freed when it is drained: no attempt running in it, none given_back, no
transaction passed_by, no waiting_queues. If it is drained and stays, held_by names the sessions whose locks prune steps back from (never
waits for): end them, or wait. What holds back old row versions is in awa.horizon.';
COMMENT ON VIEW awa.horizon IS
'What holds back VACUUM in the whole server or the truncation of a segment, the oldest first: sessions and walsenders with a snapshot or a
transaction, prepared transactions, replication slots. age_in_xids: transactions begun since; segment_tables: tables of the ring that it has
locked. The queue itself leaves no dead rows behind; other tables do. To end a session: pg_terminate_backend(pid); a prepared transaction:
COMMIT or ROLLBACK PREPARED name; a slot: pg_drop_replication_slot(name). Columns of other users'' sessions are null without pg_read_all_stats.';
COMMENT ON VIEW awa.stat_maintenance IS
'each task of maintenance: state (idle: has not run; throttled, cooling_down: takes longer than its interval; failing: its last step raised
an error), steps, rows, errors, last step and its duration, when it is due next (NULL: no maintainer runs), what it did and why not more';

-- ---------------------------------------------------------------------------------------------------------------------
-- Dump: every fixed table and sequence that holds state. Segments are ordinary tables and are dumped as such.
-- ---------------------------------------------------------------------------------------------------------------------

SELECT pg_catalog.pg_extension_config_dump('awa.queue_definitions', '');
SELECT pg_catalog.pg_extension_config_dump('awa.job_kinds', '');
SELECT pg_catalog.pg_extension_config_dump('awa.ring_rotations', '');
SELECT pg_catalog.pg_extension_config_dump('awa.retained_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('awa.dlq_entries', '');
SELECT pg_catalog.pg_extension_config_dump('awa.instance', '');
SELECT pg_catalog.pg_extension_config_dump('awa.deferred_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('awa.queue_ids', '');
SELECT pg_catalog.pg_extension_config_dump('awa.kind_ids', '');
SELECT pg_catalog.pg_extension_config_dump('awa.job_ids', '');

-- ---------------------------------------------------------------------------------------------------------------------
-- Grants: EXECUTE is the grant. Nothing for PUBLIC; grant the functions of an audience to its role.
-- ---------------------------------------------------------------------------------------------------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA awa FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA awa FROM PUBLIC;

-- The maintainer comes when this has committed.
SELECT awa.announce();
