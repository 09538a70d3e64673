-- What breaks if this fails: the job of a worker that hangs or died is never run again, or one that is well is taken from its worker.
SELECT awa.create_queue('rescue', max_attempts => 2, backoff => '0', backoff_max => '0');
SELECT awa.create_queue('rescue late', max_attempts => 3, backoff => '1 hour');
SELECT outcome, rows, generation, slot, detail FROM awa.rescue_expired_deadlines();
SELECT outcome, rows, generation, slot, detail FROM awa.rescue_stale_heartbeats();

-- 1: overdue; 2: healthy, though it has run longer; 3: no deadline at all.
SELECT awa.enqueue('rescue', 'k', '1') AS job1, awa.enqueue('rescue', 'k', '2') AS job2, awa.enqueue('rescue', 'k', '3') AS job3 \gset
SELECT run_lease AS lease1 FROM awa.claim('rescue', deadline => '1 hour') \gset
SELECT run_lease AS lease2 FROM awa.claim('rescue', deadline => '1 hour') \gset
SELECT run_lease AS lease3 FROM awa.claim('rescue') \gset
SELECT outcome, rows, detail FROM awa.rescue_expired_deadlines();
SELECT awa.extend(:job1, :lease1, '0') IS NOT NULL AS expired;
-- A deadline is not a heartbeat.
SELECT outcome, rows, detail FROM awa.rescue_stale_heartbeats();
SELECT outcome, rows, detail FROM awa.rescue_expired_deadlines();
SELECT outcome, rows, detail FROM awa.rescue_expired_deadlines();
SELECT args, state, attempt, (errors -> 0) - 'at' AS error FROM awa.jobs WHERE queue = 'rescue' ORDER BY args;
-- The late worker learns of it, however it wants to end.
\set VERBOSITY sqlstate
SELECT awa.complete(:job1, :lease1);
SELECT awa.fail(:job1, :lease1);
SELECT awa.snooze(:job1, :lease1, '1 s');
SELECT awa.extend(:job1, :lease1, '1 hour');
\set VERBOSITY default
SELECT awa.heartbeat(:job1, :lease1);
SELECT result FROM awa.complete_many(ARRAY[:job1], ARRAY[:lease1]);
-- The next attempt is the last one: max_attempts holds for rescue too.
SELECT attempt, run_lease AS lease1, run_lease <> :lease1 AS new_lease FROM awa.claim('rescue', heartbeat_timeout => '1 microsecond') \gset
SELECT :attempt AS attempt, :'new_lease' AS new_lease;
SELECT outcome, rows, detail FROM awa.rescue_expired_deadlines();
SELECT outcome, rows, detail FROM awa.rescue_stale_heartbeats();
SELECT args, state, attempt, (errors -> 0) - 'at' AS first, (errors -> 1) - 'at' AS second FROM awa.terminal_jobs WHERE queue = 'rescue';
SELECT available, scheduled, running, completed, failed FROM awa.queue_counts('rescue');
SELECT claimed, failed_attempts, rescued FROM awa.stat_queue WHERE queue = 'rescue';
SELECT * FROM awa.verify();

-- The backoff of the queue holds.
SELECT awa.enqueue('rescue late', 'k') > 0 AS enqueued;
SELECT awa.extend(job_id, run_lease, '0') IS NOT NULL AS expired FROM awa.claim('rescue late', deadline => '1 hour');
SELECT outcome, rows FROM awa.run_maintenance('rescue_expired_deadlines');
SELECT state, run_at > now() + interval '40 minutes' AS later, errors -> 0 ->> 'error' AS error FROM awa.jobs WHERE queue = 'rescue late';

-- A heartbeat in time keeps the attempt; so does an extended deadline.
SELECT awa.enqueue('rescue', 'k', '4') AS job4 \gset
SELECT run_lease AS lease4 FROM awa.claim('rescue', deadline => '1 microsecond', heartbeat_timeout => '1 hour') \gset
SELECT awa.heartbeat(:job4, :lease4), awa.extend(:job4, :lease4, '1 hour') > now() AS extended;
SELECT outcome FROM awa.rescue_expired_deadlines() UNION ALL SELECT outcome FROM awa.rescue_stale_heartbeats();
SELECT awa.complete(:job4, :lease4);

-- A claim that is not committed is not judged, and one that somebody is ending neither. A rescue that is rolled back has not happened.
SELECT awa.enqueue('rescue', 'k', '5') AS job5 \gset
BEGIN;
SELECT run_lease AS lease5 FROM awa.claim('rescue', deadline => '1 microsecond') \gset
SELECT outcome FROM awa.rescue_expired_deadlines();
COMMIT;
BEGIN;
SELECT awa.complete(:job5, :lease5);
SELECT outcome FROM awa.rescue_expired_deadlines();
ROLLBACK;
BEGIN;
SELECT outcome, rows FROM awa.rescue_expired_deadlines();
\set VERBOSITY sqlstate
SAVEPOINT s;
SELECT awa.complete(:job5, :lease5);
ROLLBACK TO s;
\set VERBOSITY default
ROLLBACK;
SELECT rescued FROM awa.stat_queue WHERE queue = 'rescue';
SELECT awa.complete(:job5, :lease5);
SELECT outcome FROM awa.rescue_expired_deadlines();

-- Jobs of a sealed segment too: the next attempt goes to the open one. A paused queue does not keep its dead attempts.
SELECT awa.enqueue('rescue', 'k', '6') > 0 AS enqueued;
CREATE TEMP TABLE got AS SELECT * FROM awa.claim('rescue', deadline => '1 microsecond');
SELECT outcome FROM awa.rotate();
SELECT awa.pause_queue('rescue');
SELECT outcome, rows FROM awa.rescue_expired_deadlines();
SELECT awa.resume_queue('rescue');
SELECT awa.complete(c.job_id, c.run_lease), attempt FROM awa.claim('rescue') AS c;

-- Nothing is written, and no transaction id taken, when nothing is overdue.
BEGIN;
SELECT outcome FROM awa.rescue_expired_deadlines() UNION ALL SELECT outcome FROM awa.rescue_stale_heartbeats();
SELECT pg_current_xact_id_if_assigned() IS NULL AS no_xid;
COMMIT;
SET default_transaction_read_only = on;
\set VERBOSITY sqlstate
SELECT awa.rescue_expired_deadlines();
\set VERBOSITY default
RESET default_transaction_read_only;

SELECT awa.complete(:job2, :lease2), awa.complete(:job3, :lease3);
SELECT available, scheduled, running, completed, failed FROM awa.queue_counts('rescue');
SELECT * FROM awa.verify();
SELECT awa.rebuild() >= 0 AS rebuilt;
SELECT available, scheduled, running, completed, failed FROM awa.queue_counts('rescue');
SELECT * FROM awa.verify();
SELECT awa.drop_queue('rescue', force => true);
SELECT awa.drop_queue('rescue late', force => true);
