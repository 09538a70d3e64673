-- What breaks if this fails: one bad pair in a batch spoils the others, or a result is reported for the wrong job.
SELECT awa.create_queue('batch');
SELECT count(awa.enqueue('batch', 'k', to_jsonb(n))) FROM generate_series(1, 10) AS n;
CREATE TEMP TABLE got AS SELECT args::int AS n, job_id, run_lease FROM awa.claim('batch', 10);
-- Answers come in the order of the request, whatever order that is.
SELECT g.n, r.run_lease = g.run_lease AS same_lease, r.result
  FROM awa.complete_many((SELECT array_agg(job_id ORDER BY n DESC) FROM got WHERE n <= 4), (SELECT array_agg(run_lease ORDER BY n DESC) FROM got WHERE n <= 4))
       WITH ORDINALITY AS r (job_id, run_lease, result, place)
  JOIN got AS g USING (job_id) ORDER BY place;
SELECT running, completed FROM awa.queue_counts('batch');
-- A problem of one job is its result: finished before, a wrong lease, an unknown job, the same pair twice.
SELECT g.n, r.result
  FROM awa.complete_many((SELECT array_agg(CASE n WHEN 99 THEN 999999999 ELSE job_id END ORDER BY o) FROM unnest(ARRAY[5, 1, 6, 99, 5, 7]) WITH ORDINALITY AS u (n, o) LEFT JOIN got USING (n)),
                         (SELECT array_agg(CASE n WHEN 99 THEN 1 WHEN 6 THEN run_lease + 1000000 ELSE run_lease END ORDER BY o) FROM unnest(ARRAY[5, 1, 6, 99, 5, 7]) WITH ORDINALITY AS u (n, o) LEFT JOIN got USING (n)))
       WITH ORDINALITY AS r (job_id, run_lease, result, place)
  LEFT JOIN got AS g USING (job_id) ORDER BY place;
SELECT running, completed FROM awa.queue_counts('batch');
SELECT n, state FROM got, awa.job(job_id) AS j ORDER BY n;
-- Nothing to do.
SELECT * FROM awa.complete_many('{}', '{}');
-- Rolled back, all run on, and can be completed after all.
BEGIN;
SELECT result, count(*) FROM awa.complete_many((SELECT array_agg(job_id) FROM got WHERE n >= 8), (SELECT array_agg(run_lease) FROM got WHERE n >= 8)) GROUP BY result;
ROLLBACK;
SELECT running, completed FROM awa.queue_counts('batch');
SELECT result, count(*) FROM awa.complete_many((SELECT array_agg(job_id) FROM got WHERE n >= 8), (SELECT array_agg(run_lease) FROM got WHERE n >= 8)) GROUP BY result;
-- In a transaction that has ended one of them otherwise.
SELECT count(awa.enqueue('batch', 'k', to_jsonb(n))) FROM generate_series(11, 13) AS n;
INSERT INTO got SELECT args::int, job_id, run_lease FROM awa.claim('batch', 10);
BEGIN;
SELECT awa.fail(job_id, run_lease, 'no', retry_after => '1 hour') FROM got WHERE n = 11;
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 12;
SELECT n, result FROM awa.complete_many((SELECT array_agg(job_id ORDER BY n) FROM got WHERE n >= 11), (SELECT array_agg(run_lease ORDER BY n) FROM got WHERE n >= 11)) JOIN got USING (job_id) ORDER BY n;
COMMIT;
SELECT n, state FROM got, awa.job(job_id) AS j WHERE n >= 11 ORDER BY n;

-- A batch larger than one row of evidence, over two queues.
SELECT awa.create_queue('batch 2');
SELECT cardinality(awa.enqueue_many(q, 'k', array_agg(to_jsonb(n)))) FROM generate_series(1, 1500) AS n, unnest(ARRAY['batch', 'batch 2']) AS q GROUP BY q;
CREATE TEMP TABLE large AS SELECT job_id, run_lease FROM awa.claim(ARRAY['batch', 'batch 2'], 5000);
SELECT result, count(*) FROM awa.complete_many((SELECT array_agg(job_id ORDER BY md5(job_id::text)) FROM large), (SELECT array_agg(run_lease ORDER BY md5(job_id::text)) FROM large)) GROUP BY result;
SELECT queue, available, running, completed FROM awa.queue_counts() ORDER BY queue;
SELECT queue, state, count(*) FROM awa.terminal_jobs GROUP BY 1, 2 ORDER BY 1, 2;

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT * FROM awa.verify();
