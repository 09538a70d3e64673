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

-- Which server and database this queue belongs to. A restored or copied database names another: it does nothing until awa.adopt().
CREATE TABLE awa.instance (
    only_row          boolean     NOT NULL CONSTRAINT instance_pkey PRIMARY KEY,
    system_identifier bigint      NOT NULL,
    database_oid      oid         NOT NULL,
    since             timestamptz NOT NULL,
    CONSTRAINT instance_only_row_check CHECK (only_row)
);
COMMENT ON TABLE awa.instance IS 'the server and database whose jobs these are; changed only by awa.adopt()';

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

CREATE TYPE awa.ring_outcome AS (
    outcome    text,
    generation bigint,
    slot       integer,
    detail     text
);

CREATE FUNCTION awa.rotate() RETURNS SETOF awa.ring_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_rotate';

CREATE FUNCTION awa.prune() RETURNS SETOF awa.ring_outcome
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1 AS 'MODULE_PATHNAME', 'awa_prune';

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
    state        text,         -- scheduled, available, running, completed, failed, cancelled
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
    completed bigint,          -- finished jobs still in the ring
    failed    bigint,
    cancelled bigint
);

CREATE FUNCTION awa.queue_counts(queue text DEFAULT NULL) RETURNS SETOF awa.queue_count
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_queue_counts';

CREATE TYPE awa.segment_stat AS (
    generation bigint,
    slot       integer,
    state      text,           -- open, sealed, prune_started
    opened_at  timestamptz,
    bytes      bigint,
    ready_entries text
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
    holes           bigint,
    gaps            integer,
    oldest_due_at   timestamptz,
    waiters         integer
);

CREATE FUNCTION awa.queue_stats() RETURNS SETOF awa.queue_stat
    LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'awa_queue_stats';

CREATE VIEW awa.jobs AS
    SELECT * FROM awa.list_jobs(false);
COMMENT ON VIEW awa.jobs IS 'jobs that are not finished: scheduled, available, running; INSERT and COPY into it enqueue';

CREATE VIEW awa.terminal_jobs AS
    SELECT * FROM awa.list_jobs(true);
COMMENT ON VIEW awa.terminal_jobs IS 'finished jobs still in the ring: completed, failed, cancelled';

CREATE FUNCTION awa.jobs_insert() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'awa_jobs_insert';

CREATE TRIGGER jobs_insert INSTEAD OF INSERT ON awa.jobs
    FOR EACH ROW EXECUTE FUNCTION awa.jobs_insert();

CREATE VIEW awa.queues AS
    SELECT name AS queue, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing, created_at
      FROM awa.queue_definitions
     WHERE dropped_at IS NULL;

CREATE VIEW awa.stat_queue AS
    SELECT * FROM awa.queue_stats();

CREATE VIEW awa.stat_segments AS
    SELECT * FROM awa.segment_stats();

-- ---------------------------------------------------------------------------------------------------------------------
-- Dump: every fixed table and sequence that holds state. Segments are ordinary tables and are dumped as such.
-- ---------------------------------------------------------------------------------------------------------------------

SELECT pg_catalog.pg_extension_config_dump('awa.queue_definitions', '');
SELECT pg_catalog.pg_extension_config_dump('awa.job_kinds', '');
SELECT pg_catalog.pg_extension_config_dump('awa.ring_rotations', '');
SELECT pg_catalog.pg_extension_config_dump('awa.instance', '');
SELECT pg_catalog.pg_extension_config_dump('awa.queue_ids', '');
SELECT pg_catalog.pg_extension_config_dump('awa.kind_ids', '');
SELECT pg_catalog.pg_extension_config_dump('awa.job_ids', '');

-- ---------------------------------------------------------------------------------------------------------------------
-- Grants: EXECUTE is the grant. Nothing for PUBLIC; grant the functions of an audience to its role.
-- ---------------------------------------------------------------------------------------------------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA awa FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA awa FROM PUBLIC;
