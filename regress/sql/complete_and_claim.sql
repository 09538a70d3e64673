-- What breaks if this fails: a worker's loop of one statement loses or repeats work.
SELECT awa.create_queue('loop');
SELECT count(awa.enqueue('loop', 'k', to_jsonb(n))) FROM generate_series(1, 7) AS n;
-- The first round has nothing to complete.
CREATE TEMP TABLE held AS SELECT args::int AS n, job_id, run_lease FROM awa.complete_and_claim('{}', '{}', 'loop', 3);
SELECT n FROM held ORDER BY n;
-- Each round completes what the one before claimed.
CREATE TEMP TABLE next AS
SELECT args::int AS n, job_id, run_lease
  FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM held), (SELECT array_agg(run_lease) FROM held), 'loop', batch_size => 3, deadline => '1 hour');
SELECT n FROM next ORDER BY n;
SELECT available, running, completed FROM awa.queue_counts('loop');
-- A lease that is not current raises: nothing is completed, nothing is claimed.
\set VERBOSITY sqlstate
SELECT * FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM next), (SELECT array_agg(run_lease + (n = 6)::int * 1000) FROM next), 'loop', 3);
SELECT * FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM held), (SELECT array_agg(run_lease) FROM held), 'loop', 3);
-- So does a queue that is not there, before anything is done.
SELECT * FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM next), (SELECT array_agg(run_lease) FROM next), 'no such queue', 3);
SELECT * FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM next), (SELECT array_agg(run_lease) FROM next), 'loop', 0);
\set VERBOSITY default
SELECT available, running, completed FROM awa.queue_counts('loop');
-- The claim may be of another queue, or find nothing.
SELECT awa.create_queue('empty');
SELECT count(*) AS claimed FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM next), (SELECT array_agg(run_lease) FROM next), 'empty', 3);
SELECT available, running, completed FROM awa.queue_counts('loop');
-- Rolled back: both parts.
CREATE TEMP TABLE last AS SELECT args::int AS n, job_id, run_lease FROM awa.claim('loop');
SELECT awa.enqueue('loop', 'k', '8') > 0 AS enqueued;
BEGIN;
SELECT args FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM last), (SELECT array_agg(run_lease) FROM last), 'loop');
ROLLBACK;
SELECT available, running, completed FROM awa.queue_counts('loop');
SELECT args, attempt FROM awa.complete_and_claim((SELECT array_agg(job_id) FROM last), (SELECT array_agg(run_lease) FROM last), 'loop');
SELECT available, running, completed FROM awa.queue_counts('loop');

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT * FROM awa.verify();
