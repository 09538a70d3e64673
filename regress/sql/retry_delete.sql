-- What breaks if this fails: a retried job runs twice or never, a deleted one comes back, or counts drift.
SET awa.prune_grace = 0;
SELECT awa.create_queue('redo', max_attempts => 2, backoff => '0', backoff_max => '0', completed_retention => '1 day');
SELECT awa.create_queue('urgent');
CREATE TABLE j AS SELECT n, awa.enqueue('redo', 'k', to_jsonb(n), priority => 3, tags => '{t}') AS id FROM generate_series(1, 8) AS n;
CREATE TABLE got AS SELECT args::int AS n, job_id, run_lease FROM awa.claim('redo', 7);
SELECT n, awa.complete(job_id, run_lease) FROM got WHERE n = 1;
SELECT n, awa.fail(job_id, run_lease, 'e', final => true) FROM got WHERE n IN (2, 3, 4) ORDER BY n;
SELECT n, awa.cancel(job_id, 'c') FROM got WHERE n = 5;
SELECT n, awa.cancel(id) FROM j WHERE n = 8;
SELECT * FROM awa.queue_counts('redo');
-- What cannot be retried or deleted.
SELECT n, awa.retry(id) FROM j WHERE n IN (1, 6) ORDER BY n;
SELECT n, awa.delete_job(id) FROM j WHERE n = 6;
SELECT awa.retry(-1), awa.delete_job(-1), awa.retry(9000000000000000000);
\set VERBOSITY terse
SELECT awa.retry(NULL);
SELECT awa.delete_job(NULL);
SELECT awa.retry((SELECT id FROM j WHERE n = 2), queue => 'no such queue');
SELECT awa.retry((SELECT id FROM j WHERE n = 2), priority => 0);
SELECT awa.retry((SELECT id FROM j WHERE n = 2), run_at => 'infinity');
\set VERBOSITY default

-- Retried: the same job, attempts from the start, the error history kept; shown once, counted once.
SELECT awa.retry(id) FROM j WHERE n = 2;
SELECT awa.retry(id) FROM j WHERE n = 2;
SELECT awa.delete_job(id) FROM j WHERE n = 2;
SELECT state, attempt, priority, tags, errors->0->>'error' AS error FROM j, awa.job(id) WHERE n = 2;
SELECT awa.retry(id, queue => 'urgent', priority => 1) FROM j WHERE n = 3;
SELECT queue, state, attempt, priority FROM j, awa.job(id) WHERE n = 3;
SELECT awa.retry(id, run_at => now() + interval '1 hour') FROM j WHERE n = 5;
SELECT state, run_at > now() AS later, errors->0->>'error' AS reason FROM j, awa.job(id) WHERE n = 5;
-- A job that was cancelled before anybody had claimed it.
SELECT awa.retry(id) FROM j WHERE n = 8;
SELECT * FROM awa.queue_counts() WHERE queue IN ('redo', 'urgent') ORDER BY queue;
SELECT string_agg(args::text, ' ' ORDER BY args::int) AS finished FROM awa.terminal_jobs WHERE queue = 'redo';
SELECT * FROM awa.verify();
SELECT args, attempt, jsonb_array_length(errors) AS errors FROM awa.claim('redo', 10) ORDER BY args::int;
SELECT args FROM awa.claim('urgent', 10);
SELECT * FROM awa.verify();
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.queue_counts() WHERE queue IN ('redo', 'urgent') ORDER BY queue;
SELECT * FROM awa.verify();

-- Deleted: not shown, not counted, for nobody to end or to retry.
SELECT awa.delete_job(id) FROM j WHERE n IN (1, 4) ORDER BY n;
SELECT awa.delete_job(id), awa.retry(id), awa.cancel(id) FROM j WHERE n IN (1, 4) ORDER BY n;
SELECT count(*) AS shown FROM j, awa.job(id) WHERE n IN (1, 4);
SELECT * FROM awa.queue_counts('redo');
SELECT * FROM awa.verify();
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.queue_counts('redo');

-- Within one transaction, and undone by a rollback, also to a savepoint.
SELECT awa.enqueue('redo', 'k', '20') AS id \gset
SELECT awa.cancel(:id);
BEGIN;
SAVEPOINT s;
SELECT awa.retry(:id);
SELECT state FROM awa.job(:id);
SELECT awa.retry(:id), awa.delete_job(:id);
ROLLBACK TO s;
SELECT state FROM awa.job(:id);
SELECT awa.delete_job(:id);
SELECT awa.retry(:id), awa.delete_job(:id), awa.cancel(:id);
SELECT count(*) AS shown FROM awa.job(:id);
ROLLBACK;
SELECT state FROM awa.job(:id);
SELECT * FROM awa.verify();
BEGIN;
SELECT awa.retry(:id);
-- The copy that waits is the one to cancel; an end that is not committed cannot be retried.
SELECT awa.cancel(:id);
SELECT awa.retry(:id);
COMMIT;
SELECT state, attempt FROM awa.job(:id);
SELECT * FROM awa.verify();
BEGIN;
SELECT awa.retry(:id);
PREPARE TRANSACTION 'awa retry';
SELECT state FROM awa.job(:id);

-- Again and again: each end is of another copy.
DO $$
DECLARE id bigint := awa.enqueue('redo', 'k', '30');
BEGIN
    COMMIT;
    FOR lap IN 1..20 LOOP
        PERFORM awa.cancel(id);
        COMMIT;
        IF awa.retry(id) <> 'retried' THEN
            RAISE EXCEPTION 'lap %', lap;
        END IF;
        COMMIT;
        PERFORM awa.rotate();
        COMMIT;
        PERFORM awa.prune();
        COMMIT;
    END LOOP;
    PERFORM awa.cancel(id);
END $$;
SELECT count(*) AS shown, min(state) AS state FROM awa.job((SELECT job_id FROM awa.terminal_jobs WHERE args = '30'));
SELECT * FROM awa.verify();

-- When the segment is gone the job is retried, or deleted, from where it is kept. Superseded copies are not kept.
SELECT awa.cancel(job_id) AS result, count(*) FROM awa.jobs WHERE queue IN ('redo', 'urgent') GROUP BY 1;
CREATE TABLE shown AS SELECT * FROM awa.terminal_jobs WHERE queue IN ('redo', 'urgent');
CREATE PROCEDURE drain() LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa.rotate();
    COMMIT;
    FOR n IN 1..200 LOOP
        EXIT WHEN (SELECT outcome FROM awa.prune()) NOT IN ('prune_started', 'pruned');
        COMMIT;
    END LOOP;
END $$;
CALL drain();
CALL drain();
SELECT count(*) AS in_the_ring FROM awa.stat_segments;
(TABLE shown EXCEPT SELECT * FROM awa.terminal_jobs WHERE queue IN ('redo', 'urgent')) UNION ALL (SELECT * FROM awa.terminal_jobs WHERE queue IN ('redo', 'urgent') EXCEPT TABLE shown);
SELECT string_agg(args::text, ' ' ORDER BY args::int) AS kept, (SELECT string_agg(args::text, ' ' ORDER BY args::int) FROM shown) AS shown FROM awa.retained_jobs JOIN awa.queue_definitions USING (queue_id) WHERE name IN ('redo', 'urgent') AND dropped_at IS NULL;
SELECT * FROM awa.queue_counts() WHERE queue IN ('redo', 'urgent') ORDER BY queue;
BEGIN;
SELECT awa.retry(id), awa.retry(id) FROM j WHERE n = 5;
ROLLBACK;
SELECT awa.retry(id) FROM j WHERE n = 5;
SELECT awa.retry(id) FROM j WHERE n = 5;
SELECT state, attempt, errors->0->>'error' AS reason FROM j, awa.job(id) WHERE n = 5;
SELECT awa.delete_job(id) FROM j WHERE n = 8;
SELECT awa.delete_job(id), awa.retry(id) FROM j WHERE n = 8;
SELECT awa.delete_job(id), awa.retry(id) FROM j WHERE n = 4;
SELECT * FROM awa.queue_counts() WHERE queue IN ('redo', 'urgent') ORDER BY queue;
SELECT * FROM awa.verify();
-- A completed job that is kept is not run again.
SELECT awa.enqueue('redo', 'k', '40') AS id \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('redo', 10) WHERE args = '40';
CALL drain();
SELECT awa.retry(:id);
SELECT awa.delete_job(:id);
SELECT awa.retry(:id);
SELECT * FROM awa.verify();
-- Retried to a time far ahead it is carried out of the ring, where it is as unfinished as in it.
SELECT awa.retry(id, run_at => now() + interval '1 week') FROM j WHERE n = 6;
SELECT outcome FROM awa.rotate();
SELECT outcome FROM awa.carry_forward((SELECT max(generation) FROM awa.stat_segments WHERE state = 'sealed'));
SELECT count(*) AS outside FROM j JOIN awa.deferred_jobs ON job_id = id WHERE n = 6;
SELECT awa.retry(id), awa.delete_job(id) FROM j WHERE n = 6;
SELECT awa.cancel(id) FROM j WHERE n = 6;
SELECT awa.retry(id) FROM j WHERE n = 6;
SELECT state, attempt FROM j, awa.job(id) WHERE n = 6;
SELECT * FROM awa.verify();
-- A job of a dropped queue is nobody's.
SELECT id FROM j WHERE n = 3 \gset
SELECT state FROM awa.job(:id);
SELECT awa.drop_queue('urgent');
SELECT awa.retry(:id), awa.retry(:id, queue => 'redo'), awa.delete_job(:id), awa.cancel(:id);
SELECT outcome, rows > 0 AS some FROM awa.retention();
SELECT * FROM awa.verify();
DROP TABLE j, got, shown;
DROP PROCEDURE drain;
SELECT awa.drop_queue('redo', true);
