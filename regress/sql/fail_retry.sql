-- What breaks if this fails: a failed job is lost, tried for ever or too soon, or its history is.
SELECT awa.create_queue('fail', max_attempts => 3, backoff => '1 minute', backoff_max => '10 minutes');
SELECT awa.enqueue('fail', 'k', '{"n": 1}', priority => 3, tags => '{t}', metadata => '{"m": 1}') AS job_id \gset
SELECT enqueued_at AS first_enqueued_at FROM awa.job(:job_id) \gset
SELECT run_lease FROM awa.claim('fail') \gset
SELECT awa.fail(:job_id, :run_lease, 'first');
-- It waits for the queue's backoff, with some jitter, and is the same job.
SELECT state, attempt, max_attempts, args, priority, tags, metadata, enqueued_at = :'first_enqueued_at' AS enqueued_at_is_kept,
       run_at - clock_timestamp() BETWEEN interval '25 seconds' AND interval '95 seconds' AS after_backoff
  FROM awa.job(:job_id);
SELECT available, scheduled, running, failed FROM awa.queue_counts('fail');
SELECT count(*) AS too_early FROM awa.claim('fail', 10);
-- The attempt before is over: its lease is worth nothing.
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
SELECT awa.fail(:job_id, :run_lease, 'again');
\set VERBOSITY default
SELECT awa.heartbeat(:job_id, :run_lease);
-- Exactly one copy of a job is shown.
SELECT count(*) AS shown FROM awa.jobs WHERE job_id = :job_id;
SELECT count(*) AS rows FROM awa.job(:job_id);
SELECT awa.cancel(:job_id);
SELECT * FROM awa.verify();

-- retry_after of the call wins; the next attempt has a new lease and knows what went wrong.
SELECT awa.enqueue('fail', 'k', '{"n": 2}') AS job_id \gset
SELECT run_lease AS lease_1 FROM awa.claim('fail') \gset
SELECT awa.fail(:job_id, :lease_1, 'first', retry_after => '0');
SELECT run_lease AS lease_2, attempt, errors FROM awa.claim('fail') \gset
SELECT :attempt AS attempt, :lease_1 <> :lease_2 AS new_lease;
SELECT e->>'attempt' AS attempt, e->>'error' AS error, (e->>'at')::timestamptz BETWEEN now() - interval '1 minute' AND clock_timestamp() AS now,
       (SELECT array_agg(k ORDER BY k) FROM jsonb_object_keys(e) AS k) AS keys
  FROM jsonb_array_elements(:'errors') AS e;
-- The lease of attempt 1 cannot end attempt 2.
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :lease_1);
\set VERBOSITY default
SELECT awa.fail(:job_id, :lease_2, NULL, retry_after => '0');
SELECT run_lease AS lease_3, attempt, jsonb_array_length(errors) AS errors FROM awa.claim('fail') \gset
SELECT :attempt AS attempt, :errors AS errors;
-- The last attempt fails the job for good, with its whole history.
SELECT awa.fail(:job_id, :lease_3, 'third', retry_after => '0');
SELECT state, attempt, finished_at IS NOT NULL AS finished, (SELECT jsonb_agg(e - 'at') FROM jsonb_array_elements(errors) AS e) AS errors FROM awa.job(:job_id);
SELECT count(*) AS claimed FROM awa.claim('fail', 10);
SELECT state, count(*) FROM awa.terminal_jobs WHERE queue = 'fail' GROUP BY state ORDER BY state;
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('fail');

-- final ends it at the first attempt.
SELECT awa.enqueue('fail', 'k', '{"n": 3}') AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'no use', final => true) FROM awa.claim('fail');
SELECT state, attempt, errors->0->>'error' AS error FROM awa.job(:job_id);
-- max_attempts of the job, not of the queue.
SELECT awa.enqueue('fail', 'k', '{"n": 4}', max_attempts => 1) AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'only one', retry_after => '0') FROM awa.claim('fail');
SELECT state, attempt, max_attempts FROM awa.job(:job_id);
-- A retry that succeeds keeps the history.
SELECT awa.enqueue('fail', 'k', '{"n": 5}') AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'once', retry_after => '0') FROM awa.claim('fail');
SELECT awa.complete(job_id, run_lease) FROM awa.claim('fail');
SELECT state, attempt, errors->0->>'error' AS error FROM awa.job(:job_id);
-- Errors are any text.
SELECT awa.enqueue('fail', 'k', '{"n": 6}') AS job_id \gset
SELECT awa.fail(job_id, run_lease, E'quote '' " back\\slash\nline ü' || repeat('x', 100000), final => true) FROM awa.claim('fail');
SELECT length(errors->0->>'error') AS length, left(errors->0->>'error', 28) AS error FROM awa.job(:job_id);

-- Backoff doubles with each attempt up to backoff_max, also when the exponent would overflow.
SELECT awa.create_queue('backoff', max_attempts => 100, backoff => '1 second', backoff_max => '1 hour');
SELECT awa.enqueue('backoff', 'k') AS job_id \gset
CREATE TEMP TABLE waits (attempt int, wait interval);
DO $$
DECLARE c record; j record; before timestamptz;
BEGIN
    FOR n IN 1..80 LOOP
        SELECT * INTO STRICT c FROM awa.claim('backoff');
        IF n IN (1, 4, 12, 43, 64, 80) THEN
            BEGIN
                before := clock_timestamp();
                PERFORM awa.fail(c.job_id, c.run_lease);
                SELECT * INTO STRICT j FROM awa.job(c.job_id);
                RAISE EXCEPTION USING MESSAGE = (j.run_at - before)::text;
            EXCEPTION WHEN raise_exception THEN
                INSERT INTO waits VALUES (n, SQLERRM::interval);
            END;
        END IF;
        PERFORM awa.fail(c.job_id, c.run_lease, retry_after => '0');
        COMMIT;
    END LOOP;
END $$;
-- Up to a quarter of it is left out, so that jobs that failed together are not tried together; never more than backoff_max.
SELECT attempt, CASE WHEN wait BETWEEN w.base * 0.74 - interval '10 seconds' AND w.base THEN 'as expected' ELSE wait::text END AS wait
  FROM waits, LATERAL (SELECT least(interval '1 hour', interval '1 second' * power(2, least(attempt, 30) - 1)) AS base) AS w ORDER BY attempt;
SELECT attempt, state FROM awa.job(:job_id);
SELECT jsonb_array_length(errors) FROM awa.job(:job_id);

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT * FROM awa.verify();
