-- What breaks if this fails: work that was done is done again, or a worker that lost its attempt finishes that of another.
SELECT awa.create_queue('complete');
SELECT count(awa.enqueue('complete', 'k', to_jsonb(n))) FROM generate_series(1, 6) AS n;
SELECT job_id, run_lease FROM awa.claim('complete') \gset
SELECT awa.complete(:job_id, :run_lease);
SELECT state, attempt, finished_at BETWEEN claimed_at AND clock_timestamp() AS finished_now, errors FROM awa.job(:job_id);
SELECT running, completed FROM awa.queue_counts('complete');
-- A finished job cannot be finished again, with what lease ever.
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
SELECT awa.complete(:job_id, :run_lease + 1);
SELECT awa.fail(:job_id, :run_lease, 'late');
SELECT awa.snooze(:job_id, :run_lease, '1 second');
SELECT awa.extend(:job_id, :run_lease, '1 second');
\set VERBOSITY default
SELECT awa.cancel(:job_id);
SELECT awa.heartbeat(:job_id, :run_lease);
-- A wrong lease, that of another job, and a job that does not exist.
SELECT job_id, run_lease FROM awa.claim('complete') \gset
SELECT job_id AS job_id_2, run_lease AS run_lease_2 FROM awa.claim('complete') \gset
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease_2);
SELECT awa.complete(:job_id, 0);
SELECT awa.complete(:job_id, -1);
SELECT awa.complete(-1, :run_lease);
SELECT awa.complete(9223372036854775807, 9223372036854775807);
\set VERBOSITY default
-- The message names job and lease, so that the worker's log is of use.
SELECT awa.complete(9223372036854775807, 1);
\echo :SQLSTATE
SELECT awa.complete(NULL, :run_lease);
\echo :SQLSTATE
SELECT awa.complete(:job_id, :run_lease);
SELECT awa.complete(:job_id_2, :run_lease_2);

-- The writes of a worker that lost its attempt roll back with its completion.
CREATE TEMP TABLE work (result text);
SELECT job_id, run_lease FROM awa.claim('complete') \gset
SELECT awa.cancel(:job_id);
BEGIN;
INSERT INTO work VALUES ('stale');
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
\set VERBOSITY default
COMMIT;
SELECT * FROM work;
-- And those of one that has it commit with it.
SELECT job_id, run_lease FROM awa.claim('complete') \gset
BEGIN;
INSERT INTO work VALUES ('good');
SELECT awa.complete(:job_id, :run_lease);
COMMIT;
SELECT result, state FROM work, awa.job(:job_id);

-- Twice in one transaction is once; another outcome in the same transaction is a conflict.
SELECT job_id, run_lease FROM awa.claim('complete') \gset
BEGIN;
SELECT awa.complete(:job_id, :run_lease);
SELECT awa.complete(:job_id, :run_lease);
SAVEPOINT s;
\set VERBOSITY sqlstate
SELECT awa.fail(:job_id, :run_lease, 'no');
ROLLBACK TO s;
SELECT awa.snooze(:job_id, :run_lease, '1 second');
ROLLBACK TO s;
\set VERBOSITY default
SELECT awa.heartbeat(:job_id, :run_lease);
SELECT awa.cancel(:job_id);
COMMIT;
SELECT state FROM awa.job(:job_id);
SELECT available, running, completed, cancelled FROM awa.queue_counts('complete');

-- Claim, work and completion in one transaction: nothing is left running if it fails.
SELECT awa.enqueue('complete', 'k', '"in one"') AS job_id \gset
BEGIN;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('complete');
ROLLBACK;
SELECT state, attempt FROM awa.job(:job_id);
BEGIN;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('complete');
COMMIT;
SELECT state, attempt FROM awa.job(:job_id);

SELECT awa.drop_queue('complete', force => true);
SELECT * FROM awa.verify();
