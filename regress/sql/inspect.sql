-- What breaks if this fails: an operator sees jobs that are not there, in a state they are not in, or counts that do not add up.
SELECT awa.create_queue('inspect', backoff => '1 hour');
SELECT awa.create_queue('quiet');
SELECT awa.enqueue('inspect', 'a', '{"n": 1}', tags => '{t}', metadata => '{"m": 1}') AS available \gset
SELECT awa.enqueue('inspect', 'b', '{"n": 2}', priority => 4, run_at => now() + interval '1 day') AS scheduled \gset
SELECT awa.enqueue('inspect', 'c', '{"n": 3}', priority => 1) AS running \gset
SELECT run_lease FROM awa.claim('inspect', deadline => '1 hour', heartbeat_timeout => '1 minute') \gset
SELECT awa.enqueue('inspect', 'd', '{"n": 4}', priority => 1) AS completed \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('inspect');
SELECT awa.enqueue('inspect', 'e', '{"n": 5}', priority => 1) AS failed \gset
SELECT awa.fail(job_id, run_lease, 'broken', final => true) FROM awa.claim('inspect');
SELECT awa.enqueue('inspect', 'f', '{"n": 6}', priority => 1) AS cancelled \gset
SELECT awa.cancel(:cancelled, 'by hand');
SELECT awa.enqueue('inspect', 'g', '{"n": 7}', priority => 1) AS retry \gset
SELECT awa.fail(job_id, run_lease, 'again') FROM awa.claim('inspect');
SELECT awa.enqueue('inspect', 'h', '{"n": 8}', priority => 1) AS snoozed \gset
SELECT awa.snooze(job_id, run_lease, '1 hour') FROM awa.claim('inspect');

-- Each job is in one place and one state, and says all that is known of it.
SELECT kind, queue, state, priority, attempt, max_attempts, run_at > now() AS later, enqueued_at <= now() AS enqueued, claimed_at IS NOT NULL AS claimed,
       deadline_at IS NOT NULL AS deadline, heartbeat_at IS NOT NULL AS heartbeat, finished_at IS NOT NULL AS finished, tags, metadata, errors IS NOT NULL AS errors, args
  FROM awa.jobs ORDER BY kind;
SELECT kind, queue, state, priority, attempt, max_attempts, enqueued_at <= finished_at AS finished_later, claimed_at IS NOT NULL AS claimed,
       deadline_at IS NOT NULL AS deadline, heartbeat_at IS NOT NULL AS heartbeat, errors->0->>'error' AS error, args
  FROM awa.terminal_jobs ORDER BY kind;
-- job() says the same as the view that the job is in.
SELECT v.kind, v = j AS same
  FROM (SELECT * FROM awa.jobs UNION ALL SELECT * FROM awa.terminal_jobs) AS v, awa.job(v.job_id) AS j ORDER BY v.kind;
SELECT count(*) FROM awa.job(999999999);
SELECT count(*) FROM awa.job(NULL);
-- Counts are those of the views.
SELECT * FROM awa.queue_counts() ORDER BY queue;
SELECT * FROM awa.queue_counts('inspect');
SELECT * FROM awa.queue_counts('unknown');
SELECT state, count(*) FROM (SELECT * FROM awa.jobs UNION ALL SELECT * FROM awa.terminal_jobs) AS v GROUP BY state ORDER BY state;
SELECT queue, enqueued, claimed, completed, failed_attempts, snoozed, holes, gaps, oldest_due_at BETWEEN now() - interval '1 minute' AND clock_timestamp() AS oldest_is_due, waiters
  FROM awa.stat_queue ORDER BY queue;
SELECT generation > 0 AS generation, slot >= 0 AS slot, state, opened_at < clock_timestamp() AS opened, bytes > 0 AS has_bytes, to_regclass(ready_entries) IS NOT NULL AS table_exists FROM awa.stat_segments
 WHERE state = 'open';
SELECT queue FROM awa.queues ORDER BY queue;

-- Own changes are seen, those of a rollback are not.
BEGIN;
SELECT awa.enqueue('quiet', 'own', '1') AS own \gset
SELECT state, attempt FROM awa.job(:own);
SELECT count(*) FROM awa.jobs WHERE queue = 'quiet';
ROLLBACK;
SELECT count(*) FROM awa.job(:own);
BEGIN;
SELECT awa.complete(:running, :run_lease);
SELECT state, finished_at IS NOT NULL AS finished FROM awa.job(:running);
ROLLBACK;
SELECT state, finished_at IS NOT NULL AS finished FROM awa.job(:running);
-- Exactly one row for a job between two attempts of one transaction.
BEGIN;
SELECT awa.fail(:running, :run_lease, 'x', retry_after => '1 hour');
SELECT count(*), min(state) AS state FROM awa.job(:running);
ROLLBACK;
-- Holes are counted, and look like what they are: available.
SELECT awa.enqueue('quiet', 'hole', '1') AS hole \gset
BEGIN;
SELECT count(*) FROM awa.claim('quiet');
SELECT state, attempt FROM awa.job(:hole);
ROLLBACK;
SELECT state, attempt FROM awa.job(:hole);
SELECT holes FROM awa.stat_queue WHERE queue = 'quiet';
SELECT available, running FROM awa.queue_counts('quiet');
SELECT awa.cancel(:hole);
SELECT holes FROM awa.stat_queue WHERE queue = 'quiet';

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT count(*) FROM awa.jobs;
SELECT count(*) FROM awa.terminal_jobs;
SELECT * FROM awa.verify();
