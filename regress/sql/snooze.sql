-- What breaks if this fails: a job that is put off loses an attempt, its place or its content.
SELECT awa.create_queue('snooze', max_attempts => 2);
SELECT awa.enqueue('snooze', 'k', '{"n": 1}', priority => 4, tags => '{t}', metadata => '{"m": 1}') AS job_id \gset
SELECT enqueued_at AS first_enqueued_at FROM awa.job(:job_id) \gset
SELECT run_lease AS lease_1 FROM awa.claim('snooze') \gset
SELECT awa.snooze(:job_id, :lease_1, '1 hour');
SELECT state, attempt, args, priority, tags, metadata, errors, enqueued_at = :'first_enqueued_at' AS enqueued_at_is_kept,
       run_at - clock_timestamp() BETWEEN interval '59 minutes' AND interval '1 hour' AS in_an_hour
  FROM awa.job(:job_id);
SELECT available, scheduled, running FROM awa.queue_counts('snooze');
\set VERBOSITY sqlstate
SELECT awa.snooze(:job_id, :lease_1, '1 hour');
SELECT awa.complete(:job_id, :lease_1);
\set VERBOSITY default
SELECT awa.cancel(:job_id);
-- Any number of times; the attempt is not used up.
SELECT awa.enqueue('snooze', 'k', '{"n": 2}') AS job_id \gset
DO $$ BEGIN FOR n IN 1..50 LOOP PERFORM awa.snooze(job_id, run_lease, '0') FROM awa.claim('snooze'); COMMIT; END LOOP; END $$;
SELECT attempt, run_lease FROM awa.claim('snooze') \gset
SELECT :attempt AS attempt;
SELECT count(*) AS shown FROM awa.jobs WHERE queue = 'snooze';
-- Between failures the history and the count of attempts stay.
SELECT awa.fail(:job_id, :run_lease, 'first', retry_after => '0');
SELECT awa.snooze(job_id, run_lease, '0') FROM awa.claim('snooze');
SELECT attempt, errors->0->>'error' AS error FROM awa.job(:job_id);
SELECT attempt, run_lease, errors->0->>'error' AS error FROM awa.claim('snooze') \gset
SELECT :attempt AS attempt, :'error' AS error;
SELECT awa.fail(:job_id, :run_lease, 'second', retry_after => '0');
SELECT state, attempt, jsonb_array_length(errors) AS errors FROM awa.job(:job_id);
-- Rolled back, the attempt runs on.
SELECT awa.enqueue('snooze', 'k', '{"n": 3}') AS job_id \gset
SELECT run_lease FROM awa.claim('snooze') \gset
BEGIN;
SELECT awa.snooze(:job_id, :run_lease, '0');
SELECT awa.snooze(:job_id, :run_lease, '0');
ROLLBACK;
SELECT state, attempt FROM awa.job(:job_id);
SELECT count(*) AS claimed FROM awa.claim('snooze', 10);
SELECT awa.complete(:job_id, :run_lease);
-- Its own transaction cannot claim what it has put back.
SELECT awa.enqueue('snooze', 'k', '{"n": 4}') AS job_id \gset
BEGIN;
SELECT awa.snooze(job_id, run_lease, '0') FROM awa.claim('snooze');
SELECT count(*) AS claimed FROM awa.claim('snooze', 10);
COMMIT;
SELECT args, attempt FROM awa.claim('snooze', 10);
-- A paused queue takes it back and keeps it.
SELECT awa.enqueue('snooze', 'k', '{"n": 5}') AS job_id \gset
SELECT run_lease FROM awa.claim('snooze') \gset
SELECT awa.pause_queue('snooze');
SELECT awa.snooze(:job_id, :run_lease, '0');
SELECT count(*) AS claimed FROM awa.claim('snooze', 10);
SELECT awa.resume_queue('snooze');
SELECT args, attempt FROM awa.claim('snooze', 10);

SELECT awa.drop_queue('snooze', force => true);
SELECT * FROM awa.verify();
