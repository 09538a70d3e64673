-- What breaks if this fails: the ring fills up, or a segment is destroyed while one of its jobs is unfinished.
-- A ring of its own: generations and slots are printed.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
CREATE EXTENSION awa_queue;
RESET client_min_messages;
SET awa.prune_grace = 0;
SELECT outcome, generation, slot, detail FROM awa.prune();
SELECT awa.create_queue('ring', backoff => '0', backoff_max => '0', cancelled_retention => '0');
SELECT outcome, generation, slot, detail FROM awa.prune();
SELECT generation, slot, state FROM awa.stat_segments ORDER BY generation;

-- Jobs of a segment that is sealed can still be claimed and finished, the older ones first.
CREATE TEMP TABLE j AS SELECT n, awa.enqueue('ring', 'k', to_jsonb(n)) AS job_id FROM generate_series(1, 6) AS n;
SELECT outcome, generation, slot FROM awa.rotate();
SELECT generation, slot, state FROM awa.stat_segments ORDER BY generation;
INSERT INTO j SELECT n, awa.enqueue('ring', 'k', to_jsonb(n)) FROM generate_series(7, 9) AS n;
SELECT available FROM awa.queue_counts('ring');
SELECT outcome, generation, slot, detail = format('job %s is waiting', (SELECT job_id FROM j WHERE n = 1)) AS names_the_job FROM awa.prune();
CREATE TEMP TABLE got AS SELECT args::int AS n, job_id, run_lease, ordinality AS place FROM awa.claim('ring', 8) WITH ORDINALITY;
SELECT n FROM got ORDER BY place;
SELECT outcome, detail = format('job %s is running', (SELECT job_id FROM j WHERE n = 1)) AS names_the_job FROM awa.prune();
SELECT * FROM awa.verify();
-- Each way out of the old segment: completion, a retry (which moves to the open one), a cancel.
SELECT n, awa.complete(job_id, run_lease) FROM got WHERE n <= 3 ORDER BY n;
SELECT awa.fail(job_id, run_lease, 'once', retry_after => '1 hour') FROM got WHERE n = 4;
SELECT awa.cancel(job_id) FROM got WHERE n = 5;
SELECT outcome, detail = format('job %s is running', (SELECT job_id FROM j WHERE n = 6)) AS names_the_job FROM awa.prune();
SELECT awa.snooze(job_id, run_lease, '1 hour') FROM got WHERE n = 6;
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('ring');

-- Two steps: the proof, then the truncation. In between the segment is neither read nor shown.
SELECT pg_relation_size('awa_segments.ready_entries_0') > 0 AS ready, pg_relation_size('awa_segments.lease_claims_0') > 0 AS claims,
       pg_relation_size('awa_segments.done_entries_0') > 0 AS done, pg_relation_size('awa_segments.lease_claim_closures_0') > 0 AS closures;
CREATE TEMP TABLE files AS SELECT oid, relname, relfilenode, xmin AS version FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace;
SET awa.prune_grace = 3600;
SELECT outcome, generation, slot, detail FROM awa.prune();
SELECT outcome, generation, slot, detail ~ '^\d+ ms of awa.prune_grace are left$' AS says_how_long FROM awa.prune();
SELECT generation, slot, state FROM awa.stat_segments ORDER BY generation;
SELECT * FROM awa.verify();
SET awa.prune_grace = 0;
SELECT outcome, generation, slot, detail FROM awa.prune();
SELECT outcome, detail FROM awa.prune();
SELECT generation, slot, state FROM awa.stat_segments ORDER BY generation;
SELECT generation, slot, event FROM awa.ring_rotations ORDER BY generation, at;
SELECT relname, pg_relation_size(oid) AS bytes FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relname LIKE '%\_0' ORDER BY relname COLLATE "C";
-- No new file and no new version of a catalog row, so no dead one.
SELECT relname AS changed FROM files JOIN pg_class AS c USING (oid, relname) WHERE c.relfilenode <> files.relfilenode OR c.xmin <> files.version;
-- The finished jobs are gone with it, and so are their counts; the unfinished ones are where they were.
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('ring');
SELECT args, state FROM awa.jobs ORDER BY args;
SELECT count(*) FROM awa.terminal_jobs;
SELECT count(*) FROM awa.job((SELECT job_id FROM j WHERE n = 1));
SELECT awa.cancel((SELECT job_id FROM j WHERE n = 1));
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 1;
SELECT * FROM awa.verify();

-- The slot is used again, by a new generation, and is as good as new.
SELECT outcome, generation, slot FROM awa.rotate();
SELECT count(awa.enqueue('ring', 'k', to_jsonb(n))) FROM generate_series(10, 12) AS n;
SELECT n, awa.complete(job_id, run_lease) FROM got WHERE n IN (7, 8) ORDER BY n;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('ring', 10) WITH ORDINALITY;
SELECT * FROM awa.verify();
-- Round and round: each generation is filled, emptied and pruned, and the ring does not grow.
SELECT awa.complete(job_id, run_lease) IS NOT NULL AS completed FROM awa.jobs JOIN awa.claim('ring') USING (job_id);
SELECT awa.cancel(job_id) AS result, count(*) FROM awa.jobs GROUP BY 1;
DO $$
BEGIN
    FOR lap IN 1..40 LOOP
        PERFORM awa.enqueue('ring', 'k', to_jsonb(n)) FROM generate_series(1, 100) AS n;
        COMMIT;
        PERFORM awa.complete(job_id, run_lease) FROM awa.claim('ring', 100);
        COMMIT;
        PERFORM awa.rotate();
        COMMIT;
        PERFORM awa.prune();
        COMMIT;
        PERFORM awa.prune();
        COMMIT;
    END LOOP;
END $$;
SELECT count(*) <= 3 AS few_segments, count(*) FILTER (WHERE state = 'open') AS open FROM awa.stat_segments;
SELECT count(*) AS tables FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relkind = 'r' AND relname LIKE 'ready%' HAVING count(*) > 3;
SELECT available, scheduled, running FROM awa.queue_counts('ring');
SELECT * FROM awa.verify();

-- Both refuse a transaction that has used the queue, because it might destroy what that transaction needs.
BEGIN;
SELECT awa.enqueue('ring', 'k') > 0 AS enqueued;
SAVEPOINT s;
SELECT outcome, generation, slot, detail FROM awa.rotate();
\echo :SQLSTATE
ROLLBACK TO s;
SELECT outcome, generation, slot, detail FROM awa.prune();
\echo :SQLSTATE
ROLLBACK TO s;
ROLLBACK;
-- A rotation that is rolled back.
SELECT max(generation) AS open_before FROM awa.stat_segments \gset
BEGIN;
SELECT outcome FROM awa.rotate();
ROLLBACK;
SELECT max(generation) = :open_before AS not_rotated FROM awa.stat_segments;
SELECT awa.enqueue('ring', 'k', '"after"') AS job_id \gset
SELECT awa.complete(job_id, run_lease) FROM awa.claim('ring', 10);
SELECT * FROM awa.verify();
-- A prune that is rolled back: between its steps the segment stays as it was, or is cut again later.
SELECT outcome FROM awa.rotate();
BEGIN;
SELECT outcome FROM awa.prune();
ROLLBACK;
SELECT state FROM awa.stat_segments ORDER BY generation;
DO $$ BEGIN FOR n IN 1..20 LOOP EXIT WHEN (SELECT count(*) FROM awa.stat_segments) = 2 AND (SELECT bool_or(state = 'prune_started') FROM awa.stat_segments); PERFORM awa.prune(); COMMIT; END LOOP; END $$;
SELECT state FROM awa.stat_segments ORDER BY generation;
BEGIN;
SELECT outcome FROM awa.prune();
ROLLBACK;
SELECT state FROM awa.stat_segments ORDER BY generation;
SELECT * FROM awa.verify();
SELECT outcome FROM awa.prune();
SELECT state FROM awa.stat_segments ORDER BY generation;
SELECT * FROM awa.verify();

-- As the maintainer does it: nothing is due in a young and small segment. A tick that has nothing to do takes no transaction id.
BEGIN;
SELECT task, outcome FROM unnest(ARRAY['rotate', 'prune']) AS task, awa.run_maintenance(task) AS m;
SELECT pg_current_xact_id_if_assigned() IS NULL AS no_xid;
COMMIT;
-- Two that are drained and one before them that is not: the younger ones go first, and what memory knows of each is shown.
SELECT awa.enqueue('ring', 'k', '"stays"') AS stays \gset
SELECT outcome FROM awa.rotate();
SELECT awa.enqueue('ring', 'k', '"ends"', priority => 1) > 0 AS enqueued;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('ring');
SELECT outcome FROM awa.rotate();
SELECT awa.enqueue('ring', 'k', '"ends too"', priority => 1) > 0 AS enqueued;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('ring');
SELECT outcome FROM awa.rotate();
SELECT state, running, given_back, passed_by, waiting_queues, drained, holder_pids, held_by FROM awa.stat_segments ORDER BY generation;
SELECT outcome, detail FROM awa.run_maintenance('prune');
SELECT outcome, detail FROM awa.run_maintenance('prune');
SELECT state, drained FROM awa.stat_segments ORDER BY generation;
SELECT outcome, detail FROM awa.run_maintenance('prune');
SELECT outcome, detail FROM awa.run_maintenance('prune');
BEGIN;
SELECT outcome, detail FROM awa.run_maintenance('prune');
SELECT pg_current_xact_id_if_assigned() IS NULL AS no_xid;
COMMIT;
SELECT awa.cancel(:stays);
-- A cancelled row may still lie before the scans of its queue: nobody waits for one that is not there.
DO $$ BEGIN FOR n IN 1..6 LOOP PERFORM awa.run_maintenance('prune'); COMMIT; END LOOP; END $$;
SELECT state, drained FROM awa.stat_segments ORDER BY generation;
SELECT * FROM awa.verify();

-- Tables ahead of time.
SELECT count(*) AS slots FROM pg_class WHERE relnamespace = 'awa_segments'::regnamespace AND relname LIKE 'ready\_entries\__' AND relkind = 'r' \gset
SELECT awa.add_segments(2) - :slots AS added;
\set VERBOSITY sqlstate
SELECT awa.add_segments(0);
SELECT awa.add_segments(65);
SELECT awa.add_segments(64);
\set VERBOSITY default
-- Not under an old snapshot, which might show an old ring.
\set VERBOSITY sqlstate
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT awa.rotate();
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT awa.prune();
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT awa.run_maintenance('rotate');
ROLLBACK;
\set VERBOSITY default

-- A full ring goes on with its open segment, and says so.
DO $$ BEGIN FOR n IN 1..20 LOOP PERFORM awa.enqueue('ring', 'k', to_jsonb(n)); COMMIT; PERFORM awa.rotate(); COMMIT; END LOOP; END $$;
SELECT count(*) AS live, current_setting('awa.ring_segments') AS ring_segments FROM awa.stat_segments;
SELECT outcome, generation IS NULL AS no_generation, detail FROM awa.rotate();
SELECT awa.enqueue('ring', 'k', '21') > 0 AS enqueued;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS in_order FROM awa.claim('ring', 100) WITH ORDINALITY;
SELECT * FROM awa.verify();
-- A dropped queue holds nothing back.
SELECT awa.drop_queue('ring', force => true);
DO $$ BEGIN FOR n IN 1..40 LOOP PERFORM awa.prune(); COMMIT; END LOOP; END $$;
SELECT state FROM awa.stat_segments ORDER BY generation;
SELECT * FROM awa.verify();
RESET awa.prune_grace;
