-- What breaks if this fails: a job scheduled far ahead keeps its segment, or is lost, late or invisible while it waits outside the ring.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
CREATE EXTENSION awa_queue;
RESET client_min_messages;
SET awa.prune_grace = 0;
SELECT outcome, rows FROM awa.promote_deferred();
SELECT awa.create_queue('q');
SELECT outcome, rows FROM awa.promote_deferred();
CREATE TEMP TABLE j AS
    SELECT n, awa.enqueue('q', 'k', to_jsonb(n), priority => n % 4 + 1, run_at => now() + n * interval '1 week', max_attempts => 9, tags => ARRAY['t'],
                          metadata => jsonb_build_object('n', n)) AS job_id
      FROM generate_series(1, 6) AS n;
INSERT INTO j VALUES (7, awa.enqueue('q', 'k', '7', run_at => now() + '10 min'));
CREATE TEMP TABLE before AS SELECT * FROM awa.jobs;
-- A retry far ahead is no different.
INSERT INTO j VALUES (8, awa.enqueue('q', 'k', '8'));
SELECT awa.fail(job_id, run_lease, 'later', retry_after => '3 days') FROM awa.claim('q');
SELECT available, scheduled, running FROM awa.queue_counts('q');
SELECT outcome, generation FROM awa.rotate();
SELECT outcome, rows, detail FROM awa.carry_forward(1);
SELECT * FROM awa.verify();
SELECT outcome, generation FROM awa.prune();
SELECT outcome, generation FROM awa.prune();
SELECT available, scheduled, running FROM awa.queue_counts('q');
SELECT hop, lane, attempt, max_attempts, run_at = look_at AS at_its_time, problem, args FROM awa.deferred_jobs ORDER BY run_at;
-- Seen as any other job, by everybody who looks.
SELECT args, state, priority, attempt, max_attempts, tags, metadata, errors -> 0 ->> 'error' AS error, claimed_at, finished_at FROM awa.jobs ORDER BY args;
SELECT count(*) FROM (SELECT * FROM before EXCEPT SELECT * FROM awa.jobs) AS changed;
SELECT args, state FROM j, awa.job(j.job_id) WHERE n IN (1, 7, 8) ORDER BY args;
SELECT count(*) FROM awa.terminal_jobs;
SELECT args FROM awa.claim('q', 10);
-- A restart finds them, for they are counted when memory is built.
SELECT awa.rebuild();
SELECT available, scheduled, running FROM awa.queue_counts('q');
SELECT * FROM awa.verify();
-- A queue is not dropped over them without force.
SELECT awa.drop_queue('q');

-- Cancelled: on record like any other.
SELECT awa.cancel(job_id, 'not wanted') FROM j WHERE n = 2;
SELECT awa.cancel(job_id, 'not wanted') FROM j WHERE n = 2;
BEGIN;
SELECT awa.cancel(job_id) FROM j WHERE n = 3;
SELECT available, scheduled, cancelled FROM awa.queue_counts('q');
ROLLBACK;
SELECT args, state, errors -> 0 ->> 'error' AS error FROM awa.terminal_jobs;
SELECT available, scheduled, running, cancelled FROM awa.queue_counts('q');
SELECT args FROM awa.deferred_jobs ORDER BY args;
SELECT * FROM awa.verify();
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT awa.cancel(job_id) FROM j WHERE n = 3;
SELECT awa.promote_deferred();
ROLLBACK;

-- Nothing is brought back before its time. Then in batches, with its time, and only once.
SELECT outcome, rows FROM awa.promote_deferred();
UPDATE awa.deferred_jobs SET look_at = now() WHERE args IN ('1', '3', '8');
BEGIN;
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT args, state FROM awa.jobs ORDER BY args;
ROLLBACK;
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT available, scheduled, running FROM awa.queue_counts('q');
SELECT args, (to_jsonb(b) - 'run_at') = (to_jsonb(j) - 'run_at') AS same, j.run_at - b.run_at < '1 ms' AS same_time FROM before AS b JOIN awa.jobs AS j USING (job_id, args) ORDER BY args;
SELECT args, hop FROM awa_segments.ready_entries_1 AS r WHERE args IN ('1', '3', '8') ORDER BY args;
SELECT * FROM awa.verify();
-- Not in a transaction that did more.
BEGIN;
SELECT count(awa.enqueue('q', 'k', '9', run_at => now() + '1 year'));
SELECT awa.promote_deferred();
ROLLBACK;

-- One bad row is set aside, the others go on (E10).
UPDATE awa.deferred_jobs SET look_at = now();
UPDATE awa.deferred_jobs SET lane = 8 * 999 + 1 WHERE args = '4';
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT args, problem, look_at > now() AS later FROM awa.deferred_jobs ORDER BY args;
UPDATE awa.deferred_jobs SET lane = (SELECT queue_id * 8 + 1 FROM awa.queue_definitions), look_at = now();
SELECT outcome, rows, detail FROM awa.promote_deferred();
SELECT available, scheduled, running FROM awa.queue_counts('q');
SELECT * FROM awa.verify();

-- Dropped with its queue.
SELECT outcome, generation FROM awa.rotate();
SELECT outcome, rows, detail FROM awa.carry_forward(2);
SELECT awa.drop_queue('q', true);
SELECT count(*) FROM awa.deferred_jobs;
SELECT * FROM awa.verify();
