-- The contract of awa in plain SQL: see README.md. Order of this file: tables, settings, producer, worker, operator, inspect.

CREATE SCHEMA awa_ref;

-- Settings change for others, and for the transaction itself, when it commits: in_force holds until then, wanted from then on.
CREATE TABLE awa_ref.queues (
    name      text  PRIMARY KEY,
    in_force  jsonb NOT NULL,
    wanted    jsonb NOT NULL,
    wanted_by xid8            -- transaction that has changed them
);

CREATE SEQUENCE awa_ref.places;

CREATE TABLE awa_ref.jobs (
    job_id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue             text        NOT NULL,
    kind              text        NOT NULL,
    args              jsonb       NOT NULL,
    priority          integer     NOT NULL,
    max_attempts      integer     NOT NULL,
    tags              text[],
    metadata          jsonb,
    errors            jsonb,
    state             text        NOT NULL DEFAULT 'waiting', -- waiting, running, completed, failed, cancelled, dead_lettered
    timed             boolean     NOT NULL,                   -- waits for a time: run_at was given, or a retry, or a snooze
    run_at            timestamptz NOT NULL,
    place             bigint      NOT NULL DEFAULT nextval('awa_ref.places'), -- among those of the same time
    appended_by       xid8        NOT NULL DEFAULT pg_current_xact_id(),
    attempt           integer     NOT NULL DEFAULT 0,         -- of the running one, or those used up so far
    enqueued_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_lease         bigint,
    claimed_by        xid8,
    claimed_at        timestamptz,
    claimed_until     timestamptz,                            -- the deadline that is on record: the claim's, or that of the last carry
    deadline_at       timestamptz,                            -- the same, unless extended
    heartbeat_timeout interval,
    heartbeat_at      timestamptz,
    finished_at       timestamptz,
    finished_by       xid8,
    observed          boolean     NOT NULL DEFAULT false      -- its times are those that the extension showed
);

CREATE SEQUENCE awa_ref.leases;

-- How attempts ended; only those of the own transaction are asked for.
CREATE TABLE awa_ref.exits (
    job_id    bigint NOT NULL,
    run_lease bigint NOT NULL,
    outcome   text   NOT NULL,
    was_last  boolean NOT NULL,                               -- attempt of the job
    ended_by  xid8   NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (job_id, run_lease)
);

CREATE TYPE awa_ref.claimed_job AS (
    job_id bigint, run_lease bigint, queue text, kind text, args jsonb, priority integer, attempt integer, max_attempts integer,
    run_at timestamptz, enqueued_at timestamptz, deadline_at timestamptz, tags text[], metadata jsonb, errors jsonb
);

CREATE TYPE awa_ref.job_result AS (job_id bigint, run_lease bigint, result text);

-- ---------------------------------------------------------------------------------------------------------------------
-- What is refused
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa_ref.refuse(is_wrong boolean, sqlstate_ text, message text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF is_wrong THEN
        RAISE EXCEPTION '%', message USING ERRCODE = sqlstate_;
    END IF;
END $$;

CREATE FUNCTION awa_ref.need(is_given boolean, argument text) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.refuse(NOT is_given, '22004', argument || ' must not be null')
$$;

CREATE FUNCTION awa_ref.not_negative(length interval, argument text) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.refuse(COALESCE(length < '0', false), '22023', argument || ' must not be negative')
$$;

CREATE FUNCTION awa_ref.between(value integer, low integer, high integer, argument text) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.need(value IS NOT NULL, argument), awa_ref.refuse(value NOT BETWEEN low AND high, '22023', argument)
$$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Queues
-- ---------------------------------------------------------------------------------------------------------------------

-- The settings that hold for this transaction.
CREATE FUNCTION awa_ref.settings(queue_ text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    q awa_ref.queues;
BEGIN
    PERFORM awa_ref.need(queue_ IS NOT NULL, 'queue');
    SELECT * INTO q FROM awa_ref.queues WHERE name = queue_;
    PERFORM awa_ref.refuse(q.name IS NULL, '42704', 'no such queue');
    RETURN CASE WHEN q.wanted_by = pg_current_xact_id() THEN q.in_force ELSE q.wanted END;
END $$;

-- Lengths of time: zero means none.
CREATE FUNCTION awa_ref.setting(queue_ text, name text) RETURNS interval LANGUAGE sql AS $$
    SELECT NULLIF((awa_ref.settings(queue_) ->> name)::interval, '0')
$$;

CREATE FUNCTION awa_ref.change(queue_ text, wishes jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    now_in_force jsonb := awa_ref.settings(queue_);
    changed      jsonb := (SELECT wanted FROM awa_ref.queues WHERE name = queue_) || jsonb_strip_nulls(wishes);
BEGIN
    PERFORM awa_ref.between((changed ->> 'max_attempts')::integer, 1, 1000, 'max_attempts');
    PERFORM awa_ref.refuse((changed ->> 'backoff')::interval > (changed ->> 'backoff_max')::interval, '22023', 'backoff');
    UPDATE awa_ref.queues SET in_force = now_in_force, wanted = changed, wanted_by = pg_current_xact_id() WHERE name = queue_;
END $$;

CREATE FUNCTION awa_ref.create_queue(
    queue text, max_attempts integer DEFAULT 25, deadline interval DEFAULT NULL, heartbeat_timeout interval DEFAULT NULL,
    backoff interval DEFAULT '1 second', backoff_max interval DEFAULT '1 day', priority_ageing interval DEFAULT '1 minute',
    completed_retention interval DEFAULT '0', failed_retention interval DEFAULT '7 days', cancelled_retention interval DEFAULT '1 day',
    dead_letters boolean DEFAULT false
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    settings jsonb := jsonb_build_object(
        'paused', false, 'max_attempts', max_attempts, 'deadline', COALESCE(deadline, '0'),
        'heartbeat_timeout', COALESCE(heartbeat_timeout, '0'), 'backoff', backoff, 'backoff_max', backoff_max,
        'priority_ageing', priority_ageing, 'completed_retention', completed_retention, 'failed_retention', failed_retention,
        'cancelled_retention', cancelled_retention, 'dead_letters', dead_letters);
BEGIN
    PERFORM awa_ref.between(max_attempts, 1, 1000, 'max_attempts');
    PERFORM awa_ref.refuse(EXISTS (SELECT FROM awa_ref.queues WHERE name = queue), '42710', 'exists already');
    INSERT INTO awa_ref.queues VALUES (queue, settings, settings, NULL);
END $$;

CREATE FUNCTION awa_ref.alter_queue(
    queue text, max_attempts integer DEFAULT NULL, backoff interval DEFAULT NULL, backoff_max interval DEFAULT NULL,
    failed_retention interval DEFAULT NULL, cancelled_retention interval DEFAULT NULL, dead_letters boolean DEFAULT NULL
) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.change(queue, jsonb_build_object(
        'max_attempts', max_attempts, 'backoff', backoff, 'backoff_max', backoff_max, 'failed_retention', failed_retention,
        'cancelled_retention', cancelled_retention, 'dead_letters', dead_letters))
$$;

CREATE FUNCTION awa_ref.pause_queue(queue text) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.change(queue, '{"paused": true}')
$$;

CREATE FUNCTION awa_ref.resume_queue(queue text) RETURNS void LANGUAGE sql AS $$
    SELECT awa_ref.change(queue, '{"paused": false}')
$$;

CREATE FUNCTION awa_ref.drop_queue(queue_ text, force boolean DEFAULT false) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    keeps boolean := EXISTS (SELECT FROM awa_ref.jobs AS j WHERE j.queue = queue_ AND state IN ('waiting', 'running', 'dead_lettered'));
BEGIN
    PERFORM awa_ref.settings(queue_);
    PERFORM awa_ref.refuse(keeps AND NOT force, '55006', 'has unfinished jobs or dead letters');
    DELETE FROM awa_ref.jobs WHERE queue = queue_;
    DELETE FROM awa_ref.queues WHERE name = queue_;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Producer
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa_ref.enqueue(
    queue text, kind text, args jsonb DEFAULT '{}', priority integer DEFAULT 2, run_at timestamptz DEFAULT NULL,
    max_attempts integer DEFAULT NULL, tags text[] DEFAULT NULL, metadata jsonb DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    settings jsonb := awa_ref.settings(queue);
    new_id   bigint;
BEGIN
    PERFORM awa_ref.need(kind IS NOT NULL, 'kind'), awa_ref.need(args IS NOT NULL, 'args');
    PERFORM awa_ref.refuse(octet_length(kind) NOT BETWEEN 1 AND 200, '22023', 'kind');
    PERFORM awa_ref.between(priority, 1, 4, 'priority');
    PERFORM awa_ref.between(COALESCE(max_attempts, 1), 1, 1000, 'max_attempts');
    PERFORM awa_ref.refuse(COALESCE(NOT isfinite(run_at), false), '22023', 'run_at');
    INSERT INTO awa_ref.jobs (queue, kind, args, priority, max_attempts, tags, metadata, timed, run_at)
    VALUES (queue, kind, args, priority, COALESCE(max_attempts, (settings ->> 'max_attempts')::integer), tags, metadata,
            run_at IS NOT NULL, COALESCE(run_at, clock_timestamp()))
    RETURNING jobs.job_id INTO new_id;
    RETURN new_id;
END $$;

CREATE FUNCTION awa_ref.enqueue_many(
    queue text, kind text, args jsonb[], priorities integer[] DEFAULT NULL, run_ats timestamptz[] DEFAULT NULL,
    max_attempts integer DEFAULT NULL, tags text[] DEFAULT NULL, metadata jsonb DEFAULT NULL
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[] := '{}';
BEGIN
    PERFORM awa_ref.settings(queue);
    PERFORM awa_ref.refuse(cardinality(priorities) <> cardinality(args) OR cardinality(run_ats) <> cardinality(args), '2202E', 'length');
    FOR n IN 1 .. cardinality(args) LOOP
        PERFORM awa_ref.need(priorities IS NULL OR priorities[n] IS NOT NULL, 'an element of priorities');
        ids := ids || awa_ref.enqueue(queue, kind, args[n], COALESCE(priorities[n], 2), run_ats[n], max_attempts, tags, metadata);
    END LOOP;
    RETURN ids;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Worker
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa_ref.claim(
    queue text, batch_size integer DEFAULT 1, deadline interval DEFAULT NULL, heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa_ref.claimed_job LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    settings jsonb := awa_ref.settings(queue);
    ageing   interval := awa_ref.setting(queue, 'priority_ageing');
    lasting  interval := NULLIF(COALESCE(deadline, awa_ref.setting(queue, 'deadline')), '0');
    silence  interval := NULLIF(COALESCE(heartbeat_timeout, awa_ref.setting(queue, 'heartbeat_timeout')), '0');
    at_      timestamptz := clock_timestamp();
    job      awa_ref.jobs;
BEGIN
    PERFORM awa_ref.not_negative(deadline, 'deadline'), awa_ref.not_negative(heartbeat_timeout, 'heartbeat_timeout');
    PERFORM awa_ref.between(batch_size, 1, 100000, 'batch_size');
    FOR job IN
        SELECT * FROM awa_ref.jobs AS j
         WHERE j.queue = claim.queue AND state = 'waiting' AND run_at <= at_ AND appended_by <> pg_current_xact_id()
           AND NOT (settings ->> 'paused')::boolean
         ORDER BY GREATEST(1, priority - COALESCE(floor(EXTRACT(epoch FROM at_ - run_at) / EXTRACT(epoch FROM ageing)), 0)), run_at, place
         LIMIT batch_size FOR UPDATE
    LOOP
        UPDATE awa_ref.jobs AS j
           SET state = 'running', attempt = attempt + 1, run_lease = nextval('awa_ref.leases'), claimed_by = pg_current_xact_id(),
               claimed_at = at_, claimed_until = at_ + lasting, deadline_at = at_ + lasting, heartbeat_timeout = silence, heartbeat_at = at_
         WHERE j.job_id = job.job_id RETURNING * INTO job;
        RETURN NEXT ROW(job.job_id, job.run_lease, job.queue, job.kind, job.args, job.priority, job.attempt, job.max_attempts,
                        job.run_at, job.enqueued_at, job.deadline_at, job.tags, job.metadata, job.errors)::awa_ref.claimed_job;
    END LOOP;
END $$;

-- Several queues, each for what the ones before have left of the batch.
CREATE FUNCTION awa_ref.claim(
    queues text[], batch_size integer DEFAULT 1, deadline interval DEFAULT NULL, heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa_ref.claimed_job LANGUAGE plpgsql AS $$
DECLARE
    name text;
    rest integer := batch_size;
    job  awa_ref.claimed_job;
BEGIN
    PERFORM awa_ref.refuse(cardinality(queues) = 0, '22023', 'no queue');
    PERFORM awa_ref.settings(q) FROM unnest(queues) AS q;
    PERFORM awa_ref.between(batch_size, 1, 100000, 'batch_size');
    FOREACH name IN ARRAY queues LOOP
        EXIT WHEN rest = 0;
        FOR job IN SELECT * FROM awa_ref.claim(name, rest, deadline, heartbeat_timeout) LOOP
            rest := rest - 1;
            RETURN NEXT job;
        END LOOP;
    END LOOP;
END $$;

-- The one place where an attempt ends: 'go' with the evidence written, or why not.
CREATE FUNCTION awa_ref.end_attempt(job_id_ bigint, lease bigint, outcome_ text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job    awa_ref.jobs;
    before text := (SELECT outcome FROM awa_ref.exits
                     WHERE job_id = job_id_ AND run_lease = lease AND ended_by = pg_current_xact_id());
BEGIN
    SELECT * INTO job FROM awa_ref.jobs WHERE job_id = job_id_ AND state = 'running' AND run_lease = lease FOR UPDATE;
    IF FOUND THEN
        INSERT INTO awa_ref.exits VALUES (job_id_, lease, outcome_, job.attempt >= job.max_attempts);
        RETURN 'go';
    END IF;
    RETURN CASE WHEN before IS NULL THEN 'stale' WHEN before = outcome_ THEN 'already' ELSE 'conflict' END;
END $$;

-- For the single verbs: what is neither success nor its repetition raises.
CREATE FUNCTION awa_ref.or_raise(answer text) RETURNS text LANGUAGE sql AS $$
    SELECT awa_ref.refuse(answer IN ('stale', 'conflict'), '55000', answer);
    SELECT answer
$$;

CREATE FUNCTION awa_ref.finish(job_id_ bigint, state_ text) RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs SET state = state_, finished_at = clock_timestamp(), finished_by = pg_current_xact_id(), observed = false
     WHERE job_id = job_id_
$$;

-- Puts the job back.
CREATE FUNCTION awa_ref.append(job_id_ bigint, run_at_ timestamptz, attempt_ integer) RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs
       SET state = 'waiting', timed = run_at_ IS NOT NULL, run_at = COALESCE(run_at_, clock_timestamp()), attempt = attempt_,
           place = nextval('awa_ref.places'), appended_by = pg_current_xact_id(), run_lease = NULL, claimed_by = NULL, claimed_at = NULL, deadline_at = NULL,
           heartbeat_at = NULL, finished_at = NULL, finished_by = NULL, observed = false
     WHERE job_id = job_id_
$$;

CREATE FUNCTION awa_ref.remember(job_id_ bigint, error_ text) RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs
       SET errors = COALESCE(errors, '[]') || jsonb_build_array(jsonb_build_object('attempt', attempt, 'at', now(), 'error', error_))
     WHERE job_id = job_id_
$$;

CREATE FUNCTION awa_ref.complete_quietly(job_id bigint, run_lease bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    answer text := awa_ref.end_attempt(job_id, run_lease, 'completed');
BEGIN
    IF answer = 'go' THEN
        PERFORM awa_ref.finish(job_id, 'completed');
        RETURN 'completed';
    END IF;
    RETURN answer;
END $$;

CREATE FUNCTION awa_ref.complete(job_id bigint, run_lease bigint) RETURNS text LANGUAGE sql AS $$
    SELECT awa_ref.need(job_id IS NOT NULL, 'job_id'), awa_ref.need(run_lease IS NOT NULL, 'run_lease');
    SELECT awa_ref.or_raise(awa_ref.complete_quietly(job_id, run_lease))
$$;

CREATE FUNCTION awa_ref.complete_many(job_ids bigint[], run_leases bigint[]) RETURNS SETOF awa_ref.job_result LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa_ref.refuse(cardinality(job_ids) <> cardinality(run_leases), '2202E', 'length');
    FOR n IN 1 .. cardinality(job_ids) LOOP
        PERFORM awa_ref.need(job_ids[n] IS NOT NULL AND run_leases[n] IS NOT NULL, 'an element');
        RETURN NEXT ROW(job_ids[n], run_leases[n], awa_ref.complete_quietly(job_ids[n], run_leases[n]))::awa_ref.job_result;
    END LOOP;
END $$;

CREATE FUNCTION awa_ref.complete_and_claim(
    job_ids bigint[], run_leases bigint[], queue text, batch_size integer DEFAULT 1, deadline interval DEFAULT NULL,
    heartbeat_timeout interval DEFAULT NULL
) RETURNS SETOF awa_ref.claimed_job LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa_ref.or_raise(r.result) FROM awa_ref.complete_many(job_ids, run_leases) AS r;
    RETURN QUERY SELECT * FROM awa_ref.claim(queue, batch_size, deadline, heartbeat_timeout);
END $$;

-- An attempt that has failed, whoever says so: again after a while, or for good.
CREATE FUNCTION awa_ref.conclude_failure(job_id_ bigint, outcome text, error_ text, retry_after interval) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job      awa_ref.jobs := (SELECT j FROM awa_ref.jobs AS j WHERE job_id = job_id_);
    settings jsonb := awa_ref.settings(job.queue);
    doubled  interval;
BEGIN
    PERFORM awa_ref.remember(job_id_, error_);
    IF outcome = 'failed' THEN
        outcome := CASE WHEN (settings ->> 'dead_letters')::boolean THEN 'dead_lettered' ELSE 'failed' END;
        PERFORM awa_ref.finish(job_id_, outcome);
        RETURN outcome;
    END IF;
    doubled := LEAST((settings ->> 'backoff')::interval * (2 ^ LEAST(job.attempt - 1, 30)), (settings ->> 'backoff_max')::interval);
    PERFORM awa_ref.append(job_id_, clock_timestamp() + COALESCE(retry_after, doubled), job.attempt);
    RETURN 'retry';
END $$;

CREATE FUNCTION awa_ref.fail(
    job_id bigint, run_lease bigint, error text DEFAULT NULL, retry_after interval DEFAULT NULL, final boolean DEFAULT false
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    job     awa_ref.jobs := (SELECT j FROM awa_ref.jobs AS j WHERE j.job_id = fail.job_id);
    -- A repeated call is judged by the attempt as it was.
    before  boolean := (SELECT was_last FROM awa_ref.exits AS e WHERE e.job_id = fail.job_id AND e.run_lease = fail.run_lease);
    is_last boolean := final OR COALESCE(before, job.attempt >= job.max_attempts);
    outcome text := CASE WHEN is_last THEN 'failed' ELSE 'retry' END;
    answer  text;
BEGIN
    PERFORM awa_ref.need(job_id IS NOT NULL, 'job_id'), awa_ref.need(run_lease IS NOT NULL, 'run_lease');
    PERFORM awa_ref.not_negative(retry_after, 'retry_after');
    answer := awa_ref.or_raise(awa_ref.end_attempt(job_id, run_lease, outcome));
    RETURN CASE answer WHEN 'go' THEN awa_ref.conclude_failure(job_id, outcome, error, retry_after) ELSE answer END;
END $$;

CREATE FUNCTION awa_ref.snooze(job_id bigint, run_lease bigint, delay interval) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    answer text;
BEGIN
    PERFORM awa_ref.need(job_id IS NOT NULL, 'job_id'), awa_ref.need(run_lease IS NOT NULL, 'run_lease');
    PERFORM awa_ref.need(delay IS NOT NULL, 'delay'), awa_ref.not_negative(delay, 'delay');
    answer := awa_ref.or_raise(awa_ref.end_attempt(job_id, run_lease, 'snooze'));
    IF answer = 'go' THEN
        PERFORM awa_ref.append(job_id, clock_timestamp() + delay, (SELECT attempt - 1 FROM awa_ref.jobs AS j WHERE j.job_id = snooze.job_id));
        RETURN 'snooze';
    END IF;
    RETURN answer;
END $$;

CREATE FUNCTION awa_ref.heartbeat(job_id_ bigint, lease bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE awa_ref.jobs SET heartbeat_at = clock_timestamp() WHERE job_id = job_id_ AND state = 'running' AND run_lease = lease;
    RETURN FOUND;
END $$;

CREATE FUNCTION awa_ref.extend(job_id_ bigint, lease bigint, by interval) RETURNS timestamptz LANGUAGE plpgsql AS $$
DECLARE
    until timestamptz := clock_timestamp() + by;
BEGIN
    PERFORM awa_ref.need(by IS NOT NULL, 'by'), awa_ref.not_negative(by, 'by');
    UPDATE awa_ref.jobs SET deadline_at = until, heartbeat_at = clock_timestamp()
     WHERE job_id = job_id_ AND state = 'running' AND run_lease = lease;
    PERFORM awa_ref.refuse(NOT FOUND, '55000', 'stale');
    RETURN until;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Operator
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa_ref.cancel(job_id_ bigint, reason text DEFAULT NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job awa_ref.jobs;
BEGIN
    PERFORM awa_ref.need(job_id_ IS NOT NULL, 'job_id');
    SELECT * INTO job FROM awa_ref.jobs WHERE job_id = job_id_ FOR UPDATE;
    IF job.job_id IS NULL THEN
        RETURN 'not_found';
    ELSIF job.state NOT IN ('waiting', 'running') THEN
        RETURN 'already_finished';
    ELSIF job.state = 'running' THEN
        PERFORM awa_ref.end_attempt(job_id_, job.run_lease, 'cancelled');
    END IF;
    IF reason IS NOT NULL THEN
        PERFORM awa_ref.remember(job_id_, reason);
    END IF;
    PERFORM awa_ref.finish(job_id_, 'cancelled');
    RETURN 'cancelled';
END $$;

-- Another life: attempts from 0, the error history stays.
CREATE FUNCTION awa_ref.again(job_id_ bigint, queue_ text, priority_ integer, run_at_ timestamptz) RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs SET queue = COALESCE(queue_, queue), priority = COALESCE(priority_, priority) WHERE job_id = job_id_;
    SELECT awa_ref.append(job_id_, run_at_, 0)
$$;

CREATE FUNCTION awa_ref.retry(
    job_id_ bigint, queue text DEFAULT NULL, priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job awa_ref.jobs;
BEGIN
    PERFORM awa_ref.settings(queue) WHERE queue IS NOT NULL;
    PERFORM awa_ref.between(COALESCE(priority, 1), 1, 4, 'priority');
    SELECT * INTO job FROM awa_ref.jobs WHERE job_id = job_id_ FOR UPDATE;
    IF job.job_id IS NULL THEN
        RETURN 'not_found';
    ELSIF job.state IN ('waiting', 'running') OR job.finished_by = pg_current_xact_id() THEN
        RETURN 'not_finished';
    ELSIF job.state = 'completed' THEN
        RETURN 'completed';
    END IF;
    PERFORM awa_ref.again(job_id_, queue, priority, run_at);
    RETURN 'retried';
END $$;

CREATE FUNCTION awa_ref.delete_job(job_id_ bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job awa_ref.jobs;
BEGIN
    SELECT * INTO job FROM awa_ref.jobs WHERE job_id = job_id_ FOR UPDATE;
    IF job.job_id IS NULL THEN
        RETURN 'not_found';
    ELSIF job.state IN ('waiting', 'running') OR job.finished_by = pg_current_xact_id() THEN
        RETURN 'not_finished';
    END IF;
    DELETE FROM awa_ref.jobs WHERE job_id = job_id_;
    RETURN 'deleted';
END $$;

-- A dead letter is a row of a table: also one of this transaction.
CREATE FUNCTION awa_ref.dlq_retry(
    job_id_ bigint, queue text DEFAULT NULL, priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa_ref.settings(queue) WHERE queue IS NOT NULL;
    PERFORM awa_ref.between(COALESCE(priority, 1), 1, 4, 'priority');
    PERFORM FROM awa_ref.jobs WHERE job_id = job_id_ AND state = 'dead_lettered' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'not_found';
    END IF;
    PERFORM awa_ref.again(job_id_, queue, priority, run_at);
    RETURN 'retried';
END $$;

CREATE FUNCTION awa_ref.dead_letters(queue_ text, kind_ text, failed_before timestamptz, max_jobs integer) RETURNS SETOF bigint
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa_ref.between(max_jobs, 1, 100000, 'max_jobs');
    PERFORM awa_ref.settings(queue_) WHERE queue_ IS NOT NULL;
    RETURN QUERY SELECT job_id FROM awa_ref.jobs
                  WHERE state = 'dead_lettered' AND (queue_ IS NULL OR queue = queue_) AND (kind_ IS NULL OR kind = kind_)
                    AND (failed_before IS NULL OR finished_at < failed_before)
                  ORDER BY finished_at, job_id LIMIT max_jobs FOR UPDATE;
END $$;

CREATE FUNCTION awa_ref.dlq_retry_many(
    queue text DEFAULT NULL, kind text DEFAULT NULL, failed_before timestamptz DEFAULT NULL, max_jobs integer DEFAULT 1000,
    to_queue text DEFAULT NULL, to_priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa_ref.settings(to_queue) WHERE to_queue IS NOT NULL;
    PERFORM awa_ref.between(COALESCE(to_priority, 1), 1, 4, 'priority');
    RETURN (SELECT count(awa_ref.again(d, to_queue, to_priority, run_at) IS NULL)
              FROM awa_ref.dead_letters(queue, kind, failed_before, max_jobs) AS d);
END $$;

CREATE FUNCTION awa_ref.dlq_purge(
    queue text DEFAULT NULL, kind text DEFAULT NULL, failed_before timestamptz DEFAULT NULL, max_jobs integer DEFAULT 1000
) RETURNS bigint LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    chosen bigint[] := ARRAY(SELECT awa_ref.dead_letters(queue, kind, failed_before, max_jobs));
BEGIN
    DELETE FROM awa_ref.jobs WHERE job_id = ANY (chosen);
    RETURN cardinality(chosen);
END $$;

-- Ends what is overdue as if its worker had failed it; gives the number. Leaves alone what this transaction has claimed.
CREATE FUNCTION awa_ref.rescue(by_heartbeat boolean) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    job     awa_ref.jobs;
    rescued bigint := 0;
    outcome text;
BEGIN
    FOR job IN
        SELECT * FROM awa_ref.jobs
         WHERE state = 'running' AND claimed_by <> pg_current_xact_id()
           AND clock_timestamp() >= CASE WHEN by_heartbeat THEN heartbeat_at + heartbeat_timeout ELSE deadline_at END
         ORDER BY job_id FOR UPDATE
    LOOP
        outcome := CASE WHEN job.attempt >= job.max_attempts THEN 'failed' ELSE 'retry' END;
        PERFORM awa_ref.end_attempt(job.job_id, job.run_lease, outcome);
        PERFORM awa_ref.conclude_failure(job.job_id, outcome,
                    CASE WHEN by_heartbeat THEN 'heartbeat lost' ELSE 'deadline of the attempt expired' END, NULL);
        rescued := rescued + 1;
    END LOOP;
    RETURN rescued;
END $$;

CREATE FUNCTION awa_ref.rescue_expired_deadlines() RETURNS bigint LANGUAGE sql AS $$ SELECT awa_ref.rescue(false) $$;
CREATE FUNCTION awa_ref.rescue_stale_heartbeats() RETURNS bigint LANGUAGE sql AS $$ SELECT awa_ref.rescue(true) $$;

-- After a restart or a rebuild each running attempt has a fresh heartbeat, and its deadline is not before the end of a grace.
CREATE FUNCTION awa_ref.begin_anew() RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs
       SET heartbeat_at = clock_timestamp(),
           deadline_at = claimed_until + GREATEST('0', clock_timestamp() + COALESCE(heartbeat_timeout, claimed_until - claimed_at) - claimed_until)
     WHERE state = 'running'
$$;

-- Maintenance has put these jobs elsewhere, in this order. The deadline that a running attempt had at that moment is on record now.
CREATE FUNCTION awa_ref.moved(job_ids bigint[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    job_id_ bigint;
BEGIN
    FOREACH job_id_ IN ARRAY job_ids LOOP
        UPDATE awa_ref.jobs
           SET place = nextval('awa_ref.places'),
               claimed_until = CASE WHEN state = 'running' THEN deadline_at ELSE claimed_until END
         WHERE job_id = job_id_;
    END LOOP;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Inspect
-- ---------------------------------------------------------------------------------------------------------------------

CREATE FUNCTION awa_ref.queue_counts() RETURNS TABLE (
    queue text, available bigint, scheduled bigint, running bigint, completed bigint, failed bigint, cancelled bigint, dead_lettered bigint
) LANGUAGE sql AS $$
    SELECT q.name, count(*) FILTER (WHERE state = 'waiting' AND NOT timed), count(*) FILTER (WHERE state = 'waiting' AND timed),
           count(*) FILTER (WHERE state = 'running'), count(*) FILTER (WHERE state = 'completed'),
           count(*) FILTER (WHERE state = 'failed'), count(*) FILTER (WHERE state = 'cancelled'),
           count(*) FILTER (WHERE state = 'dead_lettered')
      FROM awa_ref.queues AS q LEFT JOIN awa_ref.jobs AS j ON j.queue = q.name
     GROUP BY q.name
$$;

-- As awa.jobs, awa.terminal_jobs and awa.dlq show them together.
CREATE VIEW awa_ref.all_jobs AS
    SELECT job_id, queue, kind,
           CASE WHEN state <> 'waiting' THEN state WHEN run_at > clock_timestamp() THEN 'scheduled' ELSE 'available' END AS state,
           priority, attempt, max_attempts, run_at, enqueued_at, claimed_at, deadline_at, finished_at, tags, metadata, errors, args,
           observed
      FROM awa_ref.jobs;

-- May this finished job be forgotten with its segment, or by awa.retention()?
CREATE FUNCTION awa_ref.forget(job_id_ bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM awa_ref.jobs
     WHERE job_id = job_id_
       AND finished_at + COALESCE(awa_ref.setting(queue, NULLIF(state, 'dead_lettered') || '_retention'), '0') <= clock_timestamp()
       AND state <> 'dead_lettered';
    RETURN FOUND;
END $$;

-- What the contract leaves open, as it was seen.
CREATE FUNCTION awa_ref.observe(
    job_ids bigint[], run_ats timestamptz[], enqueued_ats timestamptz[], finished_ats timestamptz[]
) RETURNS void LANGUAGE sql AS $$
    UPDATE awa_ref.jobs AS j SET run_at = s.run_at, enqueued_at = s.enqueued_at, finished_at = s.finished_at, observed = true
      FROM unnest(job_ids, run_ats, enqueued_ats, finished_ats) AS s (job_id, run_at, enqueued_at, finished_at)
     WHERE j.job_id = s.job_id
$$;
