-- What breaks if this fails: the settings of a queue are lost, mixed up or not applied, or a queue with work can be dropped by mistake.
\set VERBOSITY default
SELECT awa.create_queue('plain');
SELECT queue, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing,
       created_at BETWEEN now() - interval '1 minute' AND clock_timestamp() AS created_now
  FROM awa.queues WHERE queue = 'plain';
SELECT awa.create_queue(queue => 'special', max_attempts => 3, deadline => '10 minutes', heartbeat_timeout => '30 seconds',
                        backoff => '5 seconds', backoff_max => '1 hour', priority_ageing => '0', options => '{}');
SELECT queue, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing FROM awa.queues WHERE queue = 'special';

-- alter_queue changes what is given and leaves the rest; zero switches a limit off.
SELECT awa.alter_queue('special', max_attempts => 7);
SELECT awa.alter_queue('special', deadline => '0', backoff => '250 milliseconds');
SELECT queue, paused, max_attempts, deadline, heartbeat_timeout, backoff, backoff_max, priority_ageing FROM awa.queues WHERE queue = 'special';
-- It is used by what comes after, and not by what was enqueued before.
SELECT awa.enqueue('special', 'k', '1') AS before \gset
SELECT awa.alter_queue('special', max_attempts => 2);
SELECT awa.enqueue('special', 'k', '2') AS after \gset
SELECT args, max_attempts FROM awa.claim('special', 2) ORDER BY args;
-- A change that is rolled back is no change.
BEGIN;
SELECT awa.alter_queue('special', max_attempts => 9, deadline => '1 second');
SELECT max_attempts, deadline FROM awa.queues WHERE queue = 'special';
ROLLBACK;
SELECT max_attempts, deadline FROM awa.queues WHERE queue = 'special';
SELECT awa.enqueue('special', 'k', '3') > 0 AS enqueued;
SELECT args, max_attempts, deadline_at IS NULL AS no_deadline FROM awa.claim('special');

-- Names are exact: case, spaces, quotes and any encoding.
SELECT awa.create_queue('Plain');
SELECT awa.create_queue(' plain');
SELECT awa.create_queue('it''s "über"; -- x');
SELECT awa.create_queue(repeat('n', 128));
SELECT queue = repeat('n', 128) AS longest, CASE WHEN length(queue) < 30 THEN queue END AS queue FROM awa.queues ORDER BY queue COLLATE "C";
SELECT awa.enqueue('it''s "über"; -- x', 'k') > 0 AS enqueued;
SELECT queue FROM awa.claim(ARRAY['plain', 'Plain', ' plain', 'it''s "über"; -- x'], 10);

-- Twice the same name.
SELECT awa.create_queue('plain');
\echo :SQLSTATE
-- In one transaction too, and the savepoint brings the name back.
BEGIN;
SELECT awa.create_queue('twice');
SAVEPOINT s;
SELECT awa.create_queue('twice');
ROLLBACK TO s;
SELECT awa.enqueue('twice', 'k') > 0 AS enqueued;
COMMIT;
SELECT available FROM awa.queue_counts('twice');
-- Created and rolled back: it never was.
BEGIN;
SELECT awa.create_queue('never');
SELECT awa.enqueue('never', 'k') > 0 AS enqueued;
SELECT count(*) FROM awa.queues WHERE queue = 'never';
ROLLBACK;
SELECT awa.enqueue('never', 'k');
\echo :SQLSTATE
SELECT count(*) FROM awa.queues WHERE queue = 'never';
BEGIN;
SAVEPOINT s;
SELECT awa.create_queue('never');
SELECT awa.enqueue('never', 'k') > 0 AS enqueued;
ROLLBACK TO s;
SELECT awa.enqueue('never', 'k');
ROLLBACK;
-- The same name again after that is another queue.
SELECT awa.create_queue('never', max_attempts => 4);
SELECT available, max_attempts FROM awa.queue_counts('never') JOIN awa.queues USING (queue);

-- Pause: enqueue goes on, claim gives nothing, what runs may be finished.
SELECT awa.enqueue('plain', 'k', '1') > 0 AND awa.enqueue('plain', 'k', '2') > 0 AS enqueued;
SELECT job_id, run_lease FROM awa.claim('plain') \gset
SELECT awa.pause_queue('plain');
SELECT paused FROM awa.queues WHERE queue = 'plain';
SELECT awa.enqueue('plain', 'k', '3') > 0 AS enqueued;
SELECT count(*) AS claimed FROM awa.claim('plain', 10);
SELECT awa.complete(:job_id, :run_lease);
SELECT awa.pause_queue('plain');
SELECT available, running, completed FROM awa.queue_counts('plain');
SELECT awa.resume_queue('plain');
SELECT paused FROM awa.queues WHERE queue = 'plain';
SELECT args FROM awa.claim('plain', 10) ORDER BY args;
-- Rolled back, a pause pauses nothing; until it commits it pauses nobody.
SELECT awa.enqueue('plain', 'k', '4') > 0 AS enqueued;
BEGIN;
SELECT awa.pause_queue('plain');
ROLLBACK;
SELECT args FROM awa.claim('plain', 10);
-- Altering a paused queue does not resume it, nor does resuming one change its settings.
SELECT awa.pause_queue('special');
SELECT awa.alter_queue('special', max_attempts => 11);
SELECT paused, max_attempts FROM awa.queues WHERE queue = 'special';
SELECT awa.resume_queue('special');
SELECT paused, max_attempts FROM awa.queues WHERE queue = 'special';

-- Drop refuses while there is work: waiting, scheduled, running.
SELECT awa.create_queue('leaving');
SELECT awa.enqueue('leaving', 'k') AS waiting \gset
SELECT awa.drop_queue('leaving');
\echo :SQLSTATE
SELECT awa.cancel(:waiting);
SELECT awa.enqueue('leaving', 'k', run_at => now() + interval '1 day') AS scheduled \gset
SELECT awa.drop_queue('leaving');
SELECT awa.cancel(:scheduled);
SELECT awa.enqueue('leaving', 'k') > 0 AS enqueued;
SELECT job_id, run_lease FROM awa.claim('leaving') \gset
SELECT awa.drop_queue('leaving');
-- After a refusal the queue is as before.
SELECT awa.enqueue('leaving', 'k') > 0 AS enqueued;
SELECT awa.complete(:job_id, :run_lease);
SELECT job_id, run_lease FROM awa.claim('leaving') \gset
SELECT awa.complete(:job_id, :run_lease);
-- Nothing open: it goes, and takes its history from sight.
SELECT count(*) FROM awa.terminal_jobs WHERE queue = 'leaving';
SELECT awa.drop_queue('leaving');
SELECT count(*) FROM awa.terminal_jobs WHERE queue = 'leaving';
SELECT count(*) FROM awa.job(:waiting);
SELECT count(*) FROM awa.queues WHERE queue = 'leaving';
SELECT awa.enqueue('leaving', 'k');
SELECT * FROM awa.claim('leaving');
SELECT awa.drop_queue('leaving');
\echo :SQLSTATE
-- Forced: unfinished jobs are discarded, and a worker who still holds one is told.
SELECT awa.create_queue('leaving');
SELECT count(awa.enqueue('leaving', 'k')) FROM generate_series(1, 5);
SELECT job_id, run_lease FROM awa.claim('leaving') \gset
SELECT awa.drop_queue('leaving', force => true);
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :run_lease);
\set VERBOSITY default
SELECT awa.cancel(:job_id);
SELECT awa.heartbeat(:job_id, :run_lease);
SELECT * FROM awa.verify();
-- A new queue of the same name has nothing of the old one.
SELECT awa.create_queue('leaving');
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('leaving');
SELECT count(*) AS claimed FROM awa.claim('leaving', 10);
-- A drop that is rolled back.
SELECT awa.enqueue('leaving', 'k', '{"kept": true}') > 0 AS enqueued;
BEGIN;
SELECT awa.drop_queue('leaving', true);
SELECT awa.enqueue('leaving', 'k');
ROLLBACK;
BEGIN;
SAVEPOINT s;
SELECT awa.drop_queue('leaving', true);
ROLLBACK TO s;
SELECT awa.enqueue('leaving', 'k', '{"kept": 2}') > 0 AS enqueued;
COMMIT;
SELECT args FROM awa.claim('leaving', 10) ORDER BY args;
-- In one transaction with the enqueue that is its work.
BEGIN;
SELECT awa.create_queue('brief');
SELECT awa.enqueue('brief', 'k') > 0 AS enqueued;
\set VERBOSITY sqlstate
SELECT awa.drop_queue('brief');
\set VERBOSITY default
ROLLBACK;
BEGIN;
SELECT awa.create_queue('brief');
SELECT awa.drop_queue('brief');
COMMIT;
SELECT count(*) FROM awa.queues WHERE queue = 'brief';

SELECT count(awa.drop_queue(queue, true)) FROM awa.queues;
SELECT count(*) FROM awa.queues;
SELECT count(*) FROM awa.queue_counts();
SELECT * FROM awa.verify();
