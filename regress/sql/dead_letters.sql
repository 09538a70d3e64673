-- What breaks if this fails: a job that failed for good is lost, runs again by itself, or an operator cannot bring it back.
SET awa.prune_grace = 0;
SELECT awa.create_queue('dlq', max_attempts => 2, backoff => '0', backoff_max => '0', dead_letters => true, completed_retention => '0');
SELECT awa.create_queue('other', max_attempts => 2, backoff => '0', backoff_max => '0');
SELECT awa.enqueue('dlq', 'mail', '{"n": 1}', priority => 3, tags => '{t}', metadata => '{"m": 1}') AS job_id \gset
SELECT run_lease FROM awa.claim('dlq') \gset
SELECT awa.fail(:job_id, :run_lease, 'once');
SELECT count(*) AS letters FROM awa.dlq;
SELECT run_lease FROM awa.claim('dlq') \gset
BEGIN;
SELECT awa.fail(:job_id, :run_lease, 'twice');
-- The second exit of one transaction.
SELECT awa.fail(:job_id, :run_lease, 'twice');
SELECT count(*) AS letters FROM awa.dlq;
SELECT failed, dead_lettered, running FROM awa.queue_counts('dlq');
ROLLBACK;
SELECT count(*) AS letters FROM awa.dlq;
SELECT awa.fail(:job_id, :run_lease, 'twice');
SELECT job_id = :job_id AS the_job, queue, kind, args, priority, attempt, max_attempts, error, jsonb_array_length(errors) AS errors, failed_at > enqueued_at AS later, tags, metadata FROM awa.dlq;
SELECT * FROM awa.queue_counts('dlq');
SELECT state, attempt, priority, args, claimed_at IS NOT NULL AS claimed, finished_at IS NOT NULL AS finished FROM awa.job(:job_id);
-- It is no part of the history, and nobody can end it again.
SELECT count(*) FROM awa.terminal_jobs WHERE queue = 'dlq';
SELECT count(*) FROM awa.jobs WHERE queue = 'dlq';
SELECT awa.cancel(:job_id);
SELECT count(*) FROM awa.claim('dlq');
SELECT * FROM awa.verify();

-- Retried: the same job, attempts from the start, its history kept; the letter is gone.
SELECT awa.dlq_retry(:job_id);
SELECT awa.dlq_retry(:job_id);
SELECT count(*) AS letters FROM awa.dlq;
SELECT state, priority, attempt, jsonb_array_length(errors) AS errors, args, tags, metadata FROM awa.job(:job_id);
SELECT * FROM awa.queue_counts('dlq');
SELECT job_id = :job_id AS the_job, attempt, jsonb_array_length(errors) AS errors, run_lease FROM awa.claim('dlq') \gset
SELECT :'the_job' AS the_job, :attempt AS attempt, :errors AS errors;
SELECT awa.fail(:job_id, :run_lease, 'third', final => true);
SELECT error, attempt, jsonb_array_length(errors) AS errors FROM awa.dlq;
-- Elsewhere, more urgent, and later.
SELECT awa.dlq_retry(:job_id, queue => 'other', priority => 1, run_at => now() + interval '1 hour');
SELECT queue, state, priority, run_at > now() + interval '50 minutes' AS later FROM awa.job(:job_id);
SELECT * FROM awa.queue_counts() WHERE queue IN ('dlq', 'other') ORDER BY queue;
SELECT awa.cancel(:job_id);
SELECT * FROM awa.verify();
-- A queue without dead letters keeps failed jobs as history; the setting holds from its commit on.
SELECT awa.enqueue('other', 'mail', '2') AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('other');
SELECT awa.dlq_retry(:job_id);
SELECT awa.alter_queue('other', dead_letters => true);
SELECT awa.enqueue('other', 'mail', '3') AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('other');
-- retry() finds dead letters too.
SELECT awa.retry(:job_id);
SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('other');
SELECT awa.delete_job(:job_id);
SELECT awa.delete_job(:job_id);
SELECT count(*) AS shown FROM awa.job(:job_id);
SELECT * FROM awa.queue_counts('other');
SELECT * FROM awa.verify();
-- Rescue is another way to fail for good.
SELECT awa.enqueue('other', 'slow', '4', max_attempts => 1) AS job_id \gset
SELECT count(*) FROM awa.claim('other', deadline => '1 microsecond');
DO $$
BEGIN
    FOR n IN 1..100 LOOP
        EXIT WHEN (SELECT outcome FROM awa.rescue_expired_deadlines()) = 'rescued';
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;
SELECT kind, error FROM awa.dlq WHERE job_id = :job_id;
SELECT dead_lettered FROM awa.queue_counts('other');
SELECT * FROM awa.verify();

-- By filter, the oldest first.
CREATE TABLE n AS SELECT n, awa.enqueue(CASE WHEN n % 2 = 0 THEN 'dlq' ELSE 'other' END, 'kind ' || n % 3, to_jsonb(n), max_attempts => 1) AS id FROM generate_series(1, 12) AS n;
DO $$
DECLARE job record;
BEGIN
    FOR job IN SELECT job_id, run_lease FROM awa.claim('{dlq,other}'::text[], 100) ORDER BY args::int LOOP
        PERFORM awa.fail(job.job_id, job.run_lease, 'bad');
        COMMIT;
    END LOOP;
END $$;
SELECT string_agg(args::text, ' ' ORDER BY failed_at) AS letters FROM awa.dlq WHERE kind LIKE 'kind%';
SELECT awa.dlq_retry_many('dlq', max_jobs => 2);
SELECT awa.dlq_retry_many('other', 'kind 1');
SELECT awa.dlq_retry_many('other', 'no such kind');
SELECT awa.dlq_retry_many('other', failed_before => (SELECT failed_at FROM awa.dlq WHERE args = '5'), to_queue => 'dlq', to_priority => 4);
SELECT string_agg(args::text, ' ' ORDER BY failed_at) AS letters FROM awa.dlq WHERE kind LIKE 'kind%';
SELECT queue, string_agg(args::text, ' ' ORDER BY args::int) AS waiting FROM awa.jobs WHERE queue IN ('dlq', 'other') GROUP BY queue ORDER BY queue;
SELECT * FROM awa.queue_counts() WHERE queue IN ('dlq', 'other') ORDER BY queue;
SELECT awa.dlq_purge('other', 'kind 2', max_jobs => 1);
SELECT awa.dlq_purge('dlq');
SELECT string_agg(args::text, ' ' ORDER BY failed_at) AS letters FROM awa.dlq;
SELECT * FROM awa.verify();
\set VERBOSITY terse
SELECT awa.dlq_retry_many('no such queue');
SELECT awa.dlq_retry_many('dlq', max_jobs => 0);
SELECT awa.dlq_purge('dlq', max_jobs => 1000000);
SELECT awa.dlq_retry(NULL);
SELECT awa.dlq_retry(1, priority => 9);
\set VERBOSITY default
-- One that is purged is not found, at once and by the transaction that made it.
SELECT awa.create_queue('purged', max_attempts => 1, dead_letters => true);
SELECT awa.enqueue('purged', 'k') AS purged \gset
SELECT awa.fail(job_id, run_lease, 'x') FROM awa.claim('purged');
SELECT awa.cancel(:purged);
SELECT awa.dlq_purge('purged');
SELECT awa.cancel(:purged), awa.retry(:purged), awa.delete_job(:purged);
SELECT awa.enqueue('purged', 'k') AS purged \gset
SELECT run_lease AS lease FROM awa.claim('purged') \gset
BEGIN;
SELECT awa.fail(:purged, :lease, 'x');
SELECT awa.cancel(:purged), awa.retry(:purged), awa.delete_job(:purged);
SAVEPOINT s;
SELECT awa.dlq_purge('purged');
SELECT awa.cancel(:purged), awa.retry(:purged), awa.delete_job(:purged), awa.fail(:purged, :lease, 'x');
ROLLBACK TO s;
SELECT awa.dlq_retry(:purged);
SELECT awa.retry(:purged), awa.delete_job(:purged);
SELECT awa.cancel(:purged);
COMMIT;
SELECT state FROM awa.job(:purged);
SELECT * FROM awa.verify();
SELECT awa.drop_queue('purged');
-- More than are taken at a time.
SELECT awa.create_queue('flood', max_attempts => 1, dead_letters => true);
SELECT array_length(awa.enqueue_many('flood', 'k', array_fill(to_jsonb(repeat('x', 3000)), ARRAY[600])), 1);
SELECT count(awa.fail(job_id, run_lease, 'x')) FROM awa.claim('flood', 600);
SELECT dead_lettered FROM awa.queue_counts('flood');
BEGIN;
SELECT awa.dlq_retry_many('flood');
SELECT count(*) FROM awa.dlq WHERE queue = 'flood';
ROLLBACK;
SELECT dead_lettered, available FROM awa.queue_counts('flood');
SELECT awa.dlq_retry_many('flood', max_jobs => 550);
SELECT dead_lettered, available FROM awa.queue_counts('flood');
SELECT count(*), min(length(args::text)) FROM awa.claim('flood', 1000);
SELECT * FROM awa.verify();

-- They outlive their segments and a loss of memory; a queue that has some is not dropped by mistake.
SELECT awa.rebuild() >= 0 AS rebuilt;
SELECT * FROM awa.queue_counts() WHERE queue IN ('dlq', 'flood', 'other') ORDER BY queue;
SELECT awa.cancel(job_id) AS result, count(*) FROM awa.jobs WHERE queue = 'flood' GROUP BY 1;
SELECT awa.drop_queue('flood');
SELECT awa.drop_queue('flood', force => true);
SELECT count(*) FROM awa.dlq WHERE queue = 'flood';
SELECT outcome, rows >= 50 AS all_of_them FROM awa.retention();
-- Retention: zero keeps a dead letter until somebody decides.
SELECT awa.alter_queue('other', dead_letter_retention => '0');
SELECT outcome, rows FROM awa.retention();
SELECT awa.alter_queue('other', dead_letter_retention => '1 microsecond');
SELECT dead_lettered FROM awa.queue_counts('other');
SELECT outcome, rows FROM awa.retention();
SELECT dead_lettered FROM awa.queue_counts('other');
SELECT * FROM awa.verify();
DROP TABLE n;
SELECT awa.drop_queue(queue, true) FROM awa.queues WHERE queue IN ('dlq', 'other') ORDER BY queue;
