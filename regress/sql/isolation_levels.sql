-- What breaks if this fails: a caller under REPEATABLE READ or SERIALIZABLE gets other jobs than its snapshot allows, or loses some.
SELECT awa.create_queue('levels');
SELECT count(awa.enqueue('levels', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT args FROM awa.claim('levels', 2) WITH ORDINALITY ORDER BY ordinality;
SELECT awa.enqueue('levels', 'k', '4') > 0 AS enqueued;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('levels');
ROLLBACK;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('levels', 10) WITH ORDINALITY;
SELECT count(awa.enqueue('levels', 'k', to_jsonb(n))) FROM generate_series(5, 7) AS n;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('levels', 2);
SELECT awa.enqueue('levels', 'k', '8') > 0 AS enqueued;
COMMIT;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('levels', 10) WITH ORDINALITY;
SELECT running, completed FROM awa.queue_counts('levels');
-- The default of the session, as an ORM sets it.
SET default_transaction_isolation = 'serializable';
SELECT awa.enqueue('levels', 'k', '9') AS job_id \gset
SELECT run_lease FROM awa.claim('levels') \gset
SELECT awa.fail(:job_id, :run_lease, 'x', retry_after => '0');
SELECT run_lease, attempt FROM awa.claim('levels') \gset
SELECT awa.complete(:job_id, :run_lease), :attempt AS attempt;
SELECT awa.enqueue('levels', 'k', '10') AS job_id \gset
SELECT awa.cancel(:job_id);
-- A serializable, read-only, deferrable reader.
BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE;
SELECT state FROM awa.job(:job_id);
SELECT * FROM awa.verify();
COMMIT;
RESET default_transaction_isolation;

SELECT awa.drop_queue('levels', force => true);
SELECT * FROM awa.verify();
