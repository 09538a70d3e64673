-- What breaks if this fails: a cancelled job runs, or a job that was not cancelled never does.
SELECT awa.create_queue('cancel');
-- Waiting, scheduled, running.
SELECT awa.enqueue('cancel', 'k', '1') AS job_id \gset
SELECT awa.cancel(:job_id, 'not needed');
SELECT state, attempt, finished_at IS NOT NULL AS finished, (SELECT jsonb_agg(e - 'at') FROM jsonb_array_elements(errors) AS e) AS errors FROM awa.job(:job_id);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT awa.enqueue('cancel', 'k', '2', run_at => now() + interval '200 milliseconds') AS job_id \gset
SELECT awa.cancel(:job_id);
SELECT state, errors FROM awa.job(:job_id);
SELECT awa.enqueue('cancel', 'k', '3') AS job_id \gset
SELECT run_lease FROM awa.claim('cancel') \gset
SELECT awa.cancel(:job_id, 'stop');
SELECT state, attempt, errors->0->>'error' AS error FROM awa.job(:job_id);
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
\set VERBOSITY default
SELECT awa.heartbeat(:job_id, :run_lease);
-- Again, finished otherwise, unknown, nothing.
SELECT awa.cancel(:job_id);
SELECT awa.enqueue('cancel', 'k', '4') AS job_id \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('cancel');
SELECT awa.cancel(:job_id);
SELECT awa.enqueue('cancel', 'k', '5') AS job_id \gset
SELECT awa.fail(job_id, run_lease, final => true) FROM awa.claim('cancel');
SELECT awa.cancel(:job_id, 'too late');
SELECT state, errors->0->>'error' AS error FROM awa.job(:job_id);
SELECT awa.cancel(999999999999);
SELECT awa.cancel(0);
SELECT awa.cancel(-1);
SELECT awa.cancel(NULL);
\echo :SQLSTATE
SELECT pg_sleep(0.2);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('cancel');
SELECT * FROM awa.verify();

-- In the middle of a lane, and at both ends; the others are not touched.
CREATE TEMP TABLE j AS SELECT n, awa.enqueue('cancel', 'k', to_jsonb(n)) AS job_id FROM generate_series(1, 9) AS n;
SELECT n, awa.cancel(job_id) FROM j WHERE n IN (1, 5, 9) ORDER BY n;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('cancel', 3) WITH ORDINALITY;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('cancel', 30) WITH ORDINALITY;
SELECT * FROM awa.verify();

-- Rolled back: the job is as before and claim gets it. A waiting one:
SELECT awa.enqueue('cancel', 'k', '"waiting"') AS job_id \gset
BEGIN;
SELECT awa.cancel(:job_id);
SELECT awa.cancel(:job_id);
SELECT state FROM awa.job(:job_id);
SELECT count(*) AS own_claim FROM awa.claim('cancel', 10);
ROLLBACK;
SELECT state FROM awa.job(:job_id);
SELECT args FROM awa.claim('cancel', 10);
SELECT * FROM awa.verify();
-- The same, behind one that a claim of the same transaction has passed:
SELECT awa.enqueue('cancel', 'k', '"first"') AS first \gset
SELECT awa.enqueue('cancel', 'k', '"second"') AS second \gset
BEGIN;
SELECT awa.cancel(:first);
SELECT args FROM awa.claim('cancel', 10);
ROLLBACK;
SELECT args FROM awa.claim('cancel', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT * FROM awa.verify();
-- A scheduled one:
SELECT awa.enqueue('cancel', 'k', '"scheduled"', run_at => now() + interval '1 day') AS job_id \gset
BEGIN;
SELECT awa.cancel(:job_id);
ROLLBACK;
SELECT state FROM awa.job(:job_id);
SELECT awa.cancel(:job_id);
-- A running one, which goes on with its lease:
SELECT awa.enqueue('cancel', 'k', '"running"') AS job_id \gset
SELECT run_lease FROM awa.claim('cancel') \gset
BEGIN;
SELECT awa.cancel(:job_id);
SAVEPOINT s;
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
\set VERBOSITY default
ROLLBACK;
SELECT state FROM awa.job(:job_id);
SELECT awa.heartbeat(:job_id, :run_lease);
SELECT awa.complete(:job_id, :run_lease);
SELECT * FROM awa.verify();
-- One that came back from a claim that rolled back:
SELECT awa.enqueue('cancel', 'k', '"came back"') AS job_id \gset
BEGIN;
SELECT args FROM awa.claim('cancel');
ROLLBACK;
BEGIN;
SELECT awa.cancel(:job_id);
SELECT count(*) AS own_claim FROM awa.claim('cancel', 10);
ROLLBACK;
SELECT args FROM awa.claim('cancel', 10);
SELECT awa.enqueue('cancel', 'k', '"came back"') AS job_id \gset
BEGIN;
SELECT args FROM awa.claim('cancel');
ROLLBACK;
SELECT awa.cancel(:job_id);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT state, attempt FROM awa.job(:job_id);
SELECT awa.cancel(:job_id);
SELECT * FROM awa.verify();

-- In the transaction that enqueues it, committed and rolled back.
BEGIN;
SELECT awa.enqueue('cancel', 'k', '"own"') AS job_id \gset
SELECT awa.enqueue('cancel', 'k', '"other"') > 0 AS enqueued;
SELECT awa.cancel(:job_id);
SELECT awa.cancel(:job_id);
COMMIT;
SELECT state FROM awa.job(:job_id);
SELECT args FROM awa.claim('cancel', 10);
BEGIN;
SELECT awa.enqueue('cancel', 'k', '"own"') AS job_id \gset
SAVEPOINT s;
SELECT awa.cancel(:job_id);
ROLLBACK TO s;
COMMIT;
SELECT args FROM awa.claim('cancel', 10);
BEGIN;
SELECT awa.enqueue('cancel', 'k', '"own"') AS job_id \gset
SELECT awa.cancel(:job_id);
ROLLBACK;
SELECT awa.cancel(:job_id);
SELECT * FROM awa.verify();
-- In the transaction that claims it.
SELECT awa.enqueue('cancel', 'k', '"own claim"') AS job_id \gset
BEGIN;
SELECT args FROM awa.claim('cancel');
SELECT awa.cancel(:job_id);
COMMIT;
SELECT state, attempt FROM awa.job(:job_id);
SELECT awa.enqueue('cancel', 'k', '"own claim"') AS job_id \gset
BEGIN;
SELECT args FROM awa.claim('cancel');
SELECT awa.cancel(:job_id);
ROLLBACK;
SELECT args, attempt FROM awa.claim('cancel');
-- A retry and a snoozed job: the copy that waits is the one that goes.
SELECT awa.enqueue('cancel', 'k', '"retry"') AS job_id \gset
SELECT awa.fail(job_id, run_lease, 'first', retry_after => '0') FROM awa.claim('cancel');
SELECT awa.cancel(:job_id, 'enough');
SELECT state, attempt, (SELECT jsonb_agg(e->>'error') FROM jsonb_array_elements(errors) AS e) AS errors FROM awa.job(:job_id);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT awa.enqueue('cancel', 'k', '"snoozed"') AS job_id \gset
SELECT awa.snooze(job_id, run_lease, '0') FROM awa.claim('cancel');
SELECT awa.cancel(:job_id);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT awa.cancel(:job_id);
-- Within the transaction that puts it back.
SELECT awa.enqueue('cancel', 'k', '"retry and cancel"') AS job_id \gset
BEGIN;
SELECT awa.fail(job_id, run_lease, 'first', retry_after => '0') FROM awa.claim('cancel');
SELECT awa.cancel(:job_id);
COMMIT;
SELECT count(*) AS rows, min(state) AS state FROM awa.job(:job_id);
SELECT count(*) AS claimed FROM awa.claim('cancel', 10);
SELECT * FROM awa.verify();
-- Many, all waiting, and claimed round them.
TRUNCATE j;
INSERT INTO j SELECT n, awa.enqueue('cancel', 'k', to_jsonb(n)) FROM generate_series(1, 300) AS n;
SELECT awa.cancel(job_id) AS result, count(*) FROM j WHERE n % 3 = 0 GROUP BY 1;
SELECT count(*) AS claimed, count(*) FILTER (WHERE args::int % 3 = 0) AS cancelled_ones FROM awa.claim('cancel', 1000);

SELECT awa.drop_queue('cancel', force => true);
SELECT * FROM awa.verify();
