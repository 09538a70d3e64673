-- What breaks if this fails: damage to memory or to the log is not found, or a rebuild is not what it was built from.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
CREATE EXTENSION awa_queue;
RESET client_min_messages;
SELECT awa.rebuild();
SELECT awa.create_queue('rebuild', backoff => '0', backoff_max => '0');
-- One job in each state, holes, and several segments.
CREATE TEMP TABLE j AS SELECT n, awa.enqueue('rebuild', 'k', to_jsonb(n), priority => n % 4 + 1) AS job_id FROM generate_series(1, 40) AS n;
CREATE TEMP TABLE got AS SELECT args::int AS n, job_id, run_lease, attempt FROM awa.claim('rebuild', 10, deadline => '1 hour', heartbeat_timeout => '5 minutes');
SELECT count(awa.complete(job_id, run_lease)) FROM (SELECT * FROM got ORDER BY n LIMIT 3) AS g;
SELECT awa.fail(job_id, run_lease, 'x', retry_after => '0') FROM (SELECT * FROM got ORDER BY n OFFSET 3 LIMIT 1) AS g;
SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM (SELECT * FROM got ORDER BY n OFFSET 4 LIMIT 1) AS g;
SELECT awa.snooze(job_id, run_lease, '1 hour') FROM (SELECT * FROM got ORDER BY n OFFSET 5 LIMIT 1) AS g;
SELECT awa.cancel(job_id) FROM (SELECT * FROM got ORDER BY n OFFSET 6 LIMIT 1) AS g;
SELECT awa.cancel(job_id) FROM j WHERE n IN (20, 21);
SELECT outcome FROM awa.rotate();
INSERT INTO j SELECT n, awa.enqueue('rebuild', 'k', to_jsonb(n)) FROM generate_series(41, 50) AS n;
BEGIN;
SELECT count(*) FROM awa.claim('rebuild', 7);
ROLLBACK;
SELECT count(*) FROM awa.claim('rebuild', 3);
SELECT * FROM awa.verify();
-- A rebuild changes nothing that one can see. It reads every row of the log once.
CREATE TEMP TABLE before AS SELECT job_id, queue, kind, state, priority, attempt, max_attempts, run_at, enqueued_at, claimed_at, deadline_at, errors, args FROM awa.jobs;
CREATE TEMP TABLE counts AS SELECT * FROM awa.queue_counts();
SELECT awa.rebuild();
SELECT * FROM awa.verify();
(TABLE before EXCEPT SELECT job_id, queue, kind, state, priority, attempt, max_attempts, run_at, enqueued_at, claimed_at, deadline_at, errors, args FROM awa.jobs)
UNION ALL
(SELECT job_id, queue, kind, state, priority, attempt, max_attempts, run_at, enqueued_at, claimed_at, deadline_at, errors, args FROM awa.jobs EXCEPT TABLE before);
(TABLE counts EXCEPT SELECT * FROM awa.queue_counts()) UNION ALL (SELECT * FROM awa.queue_counts() EXCEPT TABLE counts);
SELECT queue, max_attempts, backoff, paused FROM awa.queues;
-- Open attempts keep their lease; leases of later claims are new.
SELECT bool_and(awa.heartbeat(job_id, run_lease)) AS alive, count(*) FROM (SELECT * FROM got ORDER BY n OFFSET 7) AS g;
SELECT awa.complete(job_id, run_lease) FROM (SELECT * FROM got ORDER BY n OFFSET 7 LIMIT 1) AS g;
SELECT count(*) AS rows, count(DISTINCT c.job_id) AS jobs, count(*) FILTER (WHERE c.run_lease IN (SELECT run_lease FROM got)) AS old_leases
  FROM awa.claim('rebuild', 100) AS c;
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('rebuild');
SELECT awa.rebuild();
SELECT * FROM awa.verify();
SELECT count(*) AS claimed FROM awa.claim('rebuild', 100);
-- A paused queue is paused after it, an altered one altered, a dropped one gone.
SELECT awa.pause_queue('rebuild');
SELECT awa.alter_queue('rebuild', priority_ageing => '0', max_attempts => 5);
SELECT awa.create_queue('gone');
SELECT awa.drop_queue('gone');
SELECT awa.enqueue('rebuild', 'k', '51') > 0 AS enqueued;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT queue FROM awa.queue_counts();
SELECT count(*) AS claimed FROM awa.claim('rebuild', 100);
SELECT awa.resume_queue('rebuild');
SELECT args, max_attempts FROM awa.claim('rebuild', 100);
-- With a prepared transaction in the middle of a lane.
BEGIN;
SELECT awa.enqueue('rebuild', 'k', '"prepared"') > 0 AS enqueued;
PREPARE TRANSACTION 'awa rebuild';
SELECT awa.enqueue('rebuild', 'k', '"behind"') > 0 AS enqueued;
SELECT args FROM awa.claim('rebuild', 10);
SELECT * FROM awa.verify();
COMMIT PREPARED 'awa rebuild';
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
SELECT args FROM awa.claim('rebuild', 10);
-- It refuses a transaction that has used the queue.
BEGIN;
SELECT awa.enqueue('rebuild', 'k') > 0 AS enqueued;
SELECT awa.rebuild();
\echo :SQLSTATE
ROLLBACK;
-- Rolled back itself, it leaves a frontier that works.
BEGIN;
SELECT awa.rebuild() > 0 AS rebuilt;
ROLLBACK;
SELECT awa.enqueue('rebuild', 'k', '52') > 0 AS enqueued;
SELECT args FROM awa.claim('rebuild', 10);
SELECT * FROM awa.verify();

-- Damage, on purpose: rows that nobody but a superuser can write. Each is named, and gone after a rebuild.
SELECT count(awa.enqueue('rebuild', 'damage', to_jsonb(n))) FROM generate_series(1, 6) AS n;
TRUNCATE got;
INSERT INTO got SELECT args::int, job_id, run_lease, attempt FROM awa.claim('rebuild', 2);
CREATE TEMP TABLE d AS SELECT args::int AS n, job_id FROM awa.jobs WHERE kind = 'damage';
-- A completion of a running job that no worker has made.
INSERT INTO awa_segments.done_entries_1 (done_at, job_ids) SELECT now(), ARRAY[job_id] FROM d WHERE n = 1;
SELECT problem, queue, n, hop FROM awa.verify() LEFT JOIN d USING (job_id) ORDER BY problem;
SELECT detail FROM awa.verify() WHERE problem = 'closed_but_in_flight';
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
SELECT state FROM d, awa.job(job_id) AS j WHERE n = 1;
\set VERBOSITY sqlstate
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 1;
\set VERBOSITY default
-- A claim that no worker has made: the job counts as running after the rebuild.
INSERT INTO awa_segments.lease_claims_1 (claimed_at, first_lease, job_ids) SELECT now(), 4711, ARRAY[job_id] FROM d WHERE n = 3;
SELECT problem, queue, n, hop, detail FROM awa.verify() LEFT JOIN d USING (job_id) WHERE problem <> 'counts' ORDER BY problem;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
SELECT args FROM awa.claim('rebuild', 1);
SELECT awa.complete(job_id, 4711) FROM d WHERE n = 3;
-- A closure of a job that waits.
INSERT INTO awa_segments.lease_claim_closures_1 (key, closed_at, job_id, lane, hop, outcome)
SELECT r.key, now(), r.job_id, r.lane, r.hop, 'c' FROM awa_segments.ready_entries_1 AS r JOIN d USING (job_id) WHERE n = 5;
SELECT problem, queue, n FROM awa.verify() LEFT JOIN d USING (job_id) ORDER BY problem;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
SELECT state FROM d, awa.job(job_id) AS j WHERE n = 5;
-- The same job closed twice is not what a rebuild can mend: it is named for as long as it is there.
INSERT INTO awa_segments.done_entries_1 (done_at, job_ids) SELECT now(), ARRAY[job_id] FROM d WHERE n = 5;
SELECT problem, n FROM awa.verify() LEFT JOIN d USING (job_id) ORDER BY problem;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT problem, n FROM awa.verify() LEFT JOIN d USING (job_id) ORDER BY problem;
DELETE FROM awa_segments.done_entries_1 WHERE job_ids = (SELECT ARRAY[job_id] FROM d WHERE n = 5);
SELECT * FROM awa.verify();
-- A ready entry that disappears while its job runs.
DELETE FROM awa_segments.ready_entries_1 USING d WHERE ready_entries_1.job_id = d.job_id AND n = 2;
SELECT problem, n FROM awa.verify() LEFT JOIN d USING (job_id) ORDER BY problem;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
-- A second live copy of a job.
INSERT INTO awa_segments.ready_entries_1 (key, job_id, lane, hop, kind_id, attempt, max_attempts, args)
SELECT key + interval '1 hour', r.job_id, lane, hop + 1, kind_id, attempt, max_attempts, args FROM awa_segments.ready_entries_1 AS r JOIN d USING (job_id) WHERE n = 6;
SELECT problem, n FROM awa.verify() LEFT JOIN d USING (job_id) WHERE problem <> 'counts' ORDER BY problem;
DELETE FROM awa_segments.ready_entries_1 USING d WHERE ready_entries_1.job_id = d.job_id AND n = 6 AND hop = 1;
SELECT * FROM awa.verify();
-- A ledger that contradicts itself is no ground to build on; the frontier that stands goes on.
BEGIN;
INSERT INTO awa.ring_rotations VALUES (99, 0, 'opened', now());
SELECT awa.rebuild();
\echo :SQLSTATE
ROLLBACK;
SELECT * FROM awa.verify();
SELECT awa.enqueue('rebuild', 'k', '"after all"') > 0 AS enqueued;

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT * FROM awa.verify();
