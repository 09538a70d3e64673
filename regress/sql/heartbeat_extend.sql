-- What breaks if this fails: a worker that is alive is taken for dead, or one that lost its attempt believes to hold it.
SELECT awa.create_queue('heartbeat', heartbeat_timeout => '30 seconds', deadline => '1 minute');
SELECT count(awa.enqueue('heartbeat', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
CREATE TEMP TABLE got AS SELECT args::int AS n, job_id, run_lease, deadline_at FROM awa.claim('heartbeat', 3);
SELECT heartbeat_at AS first_at FROM got, awa.job(job_id) AS j WHERE n = 1 \gset
SELECT pg_sleep(0.01);
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 1;
SELECT heartbeat_at > :'first_at' AS moved, j.deadline_at = got.deadline_at AS deadline_stays FROM got, awa.job(job_id) AS j WHERE n = 1;
-- False, and no error, when the attempt is not the caller's.
SELECT awa.heartbeat(job_id, run_lease + 100000) FROM got WHERE n = 1;
SELECT awa.heartbeat(999999999, run_lease) FROM got WHERE n = 1;
SELECT awa.heartbeat(NULL, 1);
-- Many at once, each with its own answer, in the order asked.
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 2;
SELECT n, result FROM awa.heartbeat_many((SELECT array_agg(job_id ORDER BY n DESC) FROM got), (SELECT array_agg(run_lease ORDER BY n DESC) FROM got)) WITH ORDINALITY AS h (job_id, run_lease, result, place)
  JOIN got USING (job_id) ORDER BY place;
SELECT * FROM awa.heartbeat_many('{}', '{}');

-- extend sets the deadline anew, from now, and is a heartbeat.
SELECT heartbeat_at AS first_at FROM got, awa.job(job_id) AS j WHERE n = 1 \gset
SELECT pg_sleep(0.01);
SELECT awa.extend(job_id, run_lease, '2 hours') BETWEEN clock_timestamp() + interval '119 minutes' AND clock_timestamp() + interval '2 hours' AS in_two_hours FROM got WHERE n = 1;
SELECT j.deadline_at > clock_timestamp() + interval '119 minutes' AS extended, heartbeat_at > :'first_at' AS heard FROM got, awa.job(job_id) AS j WHERE n = 1;
-- It may shorten too.
SELECT awa.extend(job_id, run_lease, '1 second') <= clock_timestamp() + interval '1 second' AS shortened FROM got WHERE n = 1;
\set VERBOSITY sqlstate
SELECT awa.extend(job_id, run_lease, '1 hour') FROM got WHERE n = 2;
SELECT awa.extend(job_id, run_lease + 100000, '1 hour') FROM got WHERE n = 1;
SELECT awa.extend(job_id, run_lease, '-1 hour') FROM got WHERE n = 1;
\set VERBOSITY default
-- Both write nothing: they work in a read-only transaction, take no transaction id and log nothing.
BEGIN READ ONLY;
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 1;
SELECT awa.extend(job_id, run_lease, '1 hour') > now() AS extended FROM got WHERE n = 1;
SELECT pg_current_xact_id_if_assigned() IS NULL AS no_xid;
COMMIT;
-- They are not part of the transaction: an abort takes nothing back.
BEGIN;
SELECT awa.extend(job_id, run_lease, '3 hours') > now() AS extended FROM got WHERE n = 1;
ROLLBACK;
SELECT j.deadline_at > now() + interval '2 hours' AS still FROM got, awa.job(job_id) AS j WHERE n = 1;
-- An attempt that is being ended needs none.
BEGIN;
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 3;
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 3;
ROLLBACK;
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 3;

SELECT awa.drop_queue('heartbeat', force => true);
SELECT * FROM awa.verify();
