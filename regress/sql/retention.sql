-- What breaks if this fails: a finished job vanishes with its segment although it was to be kept, is kept for ever, or is counted twice.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
CREATE EXTENSION awa_queue;
RESET client_min_messages;
SET awa.prune_grace = 0;
CREATE PROCEDURE drain() LANGUAGE plpgsql AS $$
BEGIN
    PERFORM awa.rotate();
    COMMIT;
    FOR n IN 1..200 LOOP
        EXIT WHEN (SELECT outcome FROM awa.prune()) NOT IN ('prune_started', 'pruned');
        COMMIT;
    END LOOP;
END $$;

-- By default failed jobs are kept for a week, cancelled ones for a day, completed ones not; zero switches off.
SELECT awa.create_queue('plain');
SELECT awa.create_queue('all', backoff => '0', backoff_max => '0', completed_retention => '1 day');
SELECT awa.create_queue('none', backoff => '0', backoff_max => '0', failed_retention => '0', cancelled_retention => '0', dead_letter_retention => '0');
SELECT queue, completed_retention, failed_retention, cancelled_retention, dead_letters, dead_letter_retention FROM awa.queues ORDER BY queue;
SELECT awa.create_queue('wrong', failed_retention => '-1 second');

-- Every way to finish, in two queues.
CREATE TABLE j AS
    SELECT q, n, awa.enqueue(q, 'kind ' || n, to_jsonb(n), priority => n % 4 + 1, tags => ARRAY[q], metadata => to_jsonb(q), max_attempts => 2,
                           run_at => CASE WHEN n = 6 THEN now() + interval '1 hour' END) AS id
      FROM unnest('{all,none}'::text[]) AS q, generate_series(1, 6) AS n;
CREATE TABLE got (n int, id bigint, lease bigint);
INSERT INTO got SELECT args::int, job_id, run_lease FROM awa.claim('{all,none}'::text[], 100);
SELECT n, awa.complete(id, lease) FROM got WHERE n = 1;
SELECT n, awa.fail(id, lease, 'first') FROM got WHERE n IN (2, 3) ORDER BY n;
SELECT n, awa.fail(id, lease, 'final', final => true) FROM got WHERE n = 4;
SELECT n, awa.cancel(id, 'not wanted') FROM got WHERE n = 5;
TRUNCATE got;
INSERT INTO got SELECT args::int, job_id, run_lease FROM awa.claim('{all,none}'::text[], 100);
SELECT n, awa.complete(id, lease) FROM got WHERE n = 2;
SELECT n, awa.fail(id, lease, 'second') FROM got WHERE n = 3;
SELECT n, awa.cancel(id) FROM j WHERE n = 6;
CREATE TABLE before AS SELECT * FROM awa.terminal_jobs;
SELECT queue, kind, state, priority, attempt, max_attempts, args, tags, metadata, claimed_at IS NOT NULL AS claimed,
       (SELECT array_agg(e->>'error') FROM jsonb_array_elements(errors) AS e) AS errors
  FROM before ORDER BY queue, kind;
SELECT * FROM awa.queue_counts() ORDER BY queue;
SELECT * FROM awa.verify();

-- Its segment goes; what is to be kept is shown as before, to the last column, and once. The rest is gone.
CALL drain();
SELECT count(*) AS live_segments FROM awa.stat_segments;
SELECT queue, count(*) FROM awa.terminal_jobs GROUP BY queue;
(SELECT * FROM before WHERE queue = 'all' EXCEPT SELECT * FROM awa.terminal_jobs) UNION ALL (SELECT * FROM awa.terminal_jobs EXCEPT SELECT * FROM before);
SELECT n, (SELECT state FROM awa.job(id)) FROM j WHERE q = 'all' ORDER BY n;
SELECT count(*) AS shown FROM j, awa.job(id) WHERE q = 'none';
SELECT * FROM awa.queue_counts() ORDER BY queue;
SELECT * FROM awa.verify();
SELECT DISTINCT awa.cancel(id) AS of_kept_jobs FROM j WHERE q = 'all';
SELECT DISTINCT awa.cancel(id) AS of_gone_jobs FROM j WHERE q = 'none';
-- Memory can be lost: the counts come from the table.
SELECT awa.rebuild() >= 0 AS rebuilt;
SELECT * FROM awa.queue_counts() ORDER BY queue;
SELECT * FROM awa.verify();

-- A proof whose transaction rolls back keeps nothing.
SELECT awa.enqueue('all', 'k') AS id \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('all');
SELECT outcome FROM awa.rotate();
BEGIN;
SELECT outcome FROM awa.prune();
ROLLBACK;
SELECT count(*) AS shown FROM awa.job(:id);
SELECT count(*) AS kept FROM awa.retained_jobs WHERE job_id = :id;
SELECT completed FROM awa.queue_counts('all');
-- One that commits does, and the job is shown once at each moment.
SELECT outcome FROM awa.prune();
SELECT count(*) AS shown, min(state) AS state FROM awa.job(:id);
SELECT count(*) AS shown FROM awa.terminal_jobs WHERE job_id = :id;
SELECT completed FROM awa.queue_counts('all');
SELECT * FROM awa.verify();
SELECT outcome FROM awa.prune();
SELECT count(*) AS shown FROM awa.terminal_jobs WHERE job_id = :id;
SELECT * FROM awa.verify();

-- Nothing is over yet. An idle step takes no transaction id.
BEGIN;
SELECT outcome, rows FROM awa.retention();
SELECT pg_current_xact_id_if_assigned() IS NULL AS idle;
COMMIT;
-- A shorter retention holds for what is kept already.
SELECT awa.alter_queue('all', failed_retention => '1 microsecond');
SELECT outcome, rows FROM awa.retention();
SELECT * FROM awa.queue_counts('all');
SELECT count(*) AS shown FROM j, awa.job(id) WHERE q = 'all' AND n IN (3, 4);
SELECT * FROM awa.verify();
SELECT awa.alter_queue('all', cancelled_retention => '0');
BEGIN;
SELECT outcome, rows FROM awa.retention();
SELECT count(*) FROM awa.terminal_jobs WHERE state = 'cancelled';
ROLLBACK;
SELECT * FROM awa.queue_counts('all');
SELECT outcome, rows FROM awa.run_maintenance('retention');
SELECT * FROM awa.queue_counts('all');
SELECT outcome FROM awa.retention();
SELECT * FROM awa.verify();

-- A step is bounded. What was kept of a dropped queue goes, whatever its retention.
SELECT awa.create_queue('many', completed_retention => '1 year');
SELECT array_length(awa.enqueue_many('many', 'k', array_fill('{}'::jsonb, ARRAY[2500])), 1);
SELECT result, count(*) FROM (SELECT array_agg(job_id) AS ids, array_agg(run_lease) AS leases FROM awa.claim('many', 3000)) AS c, awa.complete_many(ids, leases) GROUP BY 1;
CALL drain();
SELECT completed FROM awa.queue_counts('many');
SELECT count(*), count(DISTINCT job_id) FROM awa.terminal_jobs WHERE queue = 'many';
SELECT outcome FROM awa.retention();
SELECT awa.drop_queue('many');
SELECT count(*) FROM awa.terminal_jobs WHERE queue = 'many';
SELECT outcome, rows FROM awa.retention();
SELECT outcome, rows FROM awa.retention();
SELECT outcome, rows FROM awa.retention();
SELECT outcome, rows FROM awa.retention();
SELECT * FROM awa.verify();

-- A job that cannot be kept holds its own segment, not the next one.
SELECT awa.create_queue('kept', completed_retention => '1 year');
ALTER TABLE awa.retained_jobs ADD CONSTRAINT refused CHECK (args <> '"refused"') NOT VALID;
SELECT awa.enqueue('kept', 'k', '"refused"') AS refused \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('kept');
SELECT outcome FROM awa.rotate();
SELECT awa.enqueue('kept', 'k', '"good"') AS good \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('kept');
SELECT outcome FROM awa.rotate();
SELECT outcome FROM awa.prune();
SELECT outcome FROM awa.prune();
\set VERBOSITY terse
SELECT outcome FROM awa.prune();
\set VERBOSITY default
SELECT args, state FROM awa.terminal_jobs WHERE queue = 'kept' ORDER BY job_id;
SELECT job_id = :good AS is_good FROM awa.retained_jobs WHERE job_id >= :refused;
SELECT * FROM awa.verify();
ALTER TABLE awa.retained_jobs DROP CONSTRAINT refused;
CALL drain();
SELECT count(*) FROM awa.retained_jobs WHERE job_id IN (:refused, :good);
SELECT * FROM awa.verify();
DROP TABLE j, got, before;
DROP PROCEDURE drain;
SELECT awa.drop_queue(queue) FROM awa.queues ORDER BY queue;
