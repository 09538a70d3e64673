-- What breaks if this fails: jobs and the caller's data do not commit and roll back together.
SELECT awa.create_queue('tx', backoff => '0', backoff_max => '0');
-- Rollback: of an enqueue, of a claim, of both.
BEGIN;
SELECT awa.enqueue('tx', 'k', '"rolled back"') > 0 AS enqueued;
SELECT count(*) AS own_is_not_claimable FROM awa.claim('tx', 10);
SELECT state FROM awa.jobs WHERE queue = 'tx';
ROLLBACK;
SELECT count(*) AS jobs FROM awa.jobs WHERE queue = 'tx';
SELECT count(*) AS claimed FROM awa.claim('tx', 10);
SELECT count(awa.enqueue('tx', 'k', to_jsonb(n))) FROM generate_series(1, 5) AS n;
BEGIN;
SELECT args FROM awa.claim('tx', 2) WITH ORDINALITY ORDER BY ordinality;
ROLLBACK;
SELECT available, running FROM awa.queue_counts('tx');
-- Each time it comes back it comes back in its place.
DO $$ BEGIN FOR n IN 1..20 LOOP PERFORM awa.claim('tx', n % 5 + 1); ROLLBACK; END LOOP; END $$;
SELECT string_agg(args::text || '/' || attempt, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('tx', 3) WITH ORDINALITY;
SELECT string_agg(args::text || '/' || attempt, ' ' ORDER BY ordinality) AS claimed FROM awa.claim('tx', 10) WITH ORDINALITY;
SELECT * FROM awa.verify();
-- A lease that was handed out by a claim that rolled back is worth nothing, even when the job runs again.
SELECT awa.enqueue('tx', 'k', '"once more"') AS job_id \gset
BEGIN;
SELECT run_lease AS lost FROM awa.claim('tx') \gset
ROLLBACK;
SELECT run_lease FROM awa.claim('tx') \gset
\set VERBOSITY sqlstate
SELECT awa.complete(:job_id, :lost);
\set VERBOSITY default
SELECT awa.complete(:job_id, :run_lease);
-- A statement that fails in the middle, after the claim.
SELECT awa.enqueue('tx', 'k', '"division"') > 0 AS enqueued;
\set VERBOSITY sqlstate
SELECT 1 / (attempt - 1) FROM awa.claim('tx');
SELECT awa.enqueue('tx', 'k', '"division 2"') / 0;
\set VERBOSITY default
SELECT args FROM awa.claim('tx', 10);

-- Savepoints, nested three deep, with everything in each. What is rolled back is undone, what is released stays.
SELECT count(awa.enqueue('tx', 'k', to_jsonb('j' || n))) FROM generate_series(1, 8) AS n;
CREATE TEMP TABLE got (n text, job_id bigint, run_lease bigint);
BEGIN;
INSERT INTO got SELECT args #>> '{}', job_id, run_lease FROM awa.claim('tx', 2);            -- j1 j2
SAVEPOINT a;
INSERT INTO got SELECT args #>> '{}', job_id, run_lease FROM awa.claim('tx', 2);            -- j3 j4
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 'j1';
SELECT awa.enqueue('tx', 'k', '"in a"') > 0 AS enqueued;
SAVEPOINT b;
INSERT INTO got SELECT args #>> '{}', job_id, run_lease FROM awa.claim('tx', 2);            -- j5 j6
SELECT awa.complete(job_id, run_lease) FROM got WHERE n = 'j3';
SELECT awa.enqueue('tx', 'k', '"in b"') > 0 AS enqueued;
SELECT awa.cancel(job_id) FROM got WHERE n = 'j2';
SAVEPOINT c;
INSERT INTO got SELECT args #>> '{}', job_id, run_lease FROM awa.claim('tx', 2);            -- j7 j8
SELECT awa.complete(job_id, run_lease) FROM got WHERE n IN ('j5', 'j7') ORDER BY n;
SELECT awa.fail(job_id, run_lease, 'in c', retry_after => '0') FROM got WHERE n = 'j4';
SELECT awa.snooze(job_id, run_lease, '0') FROM got WHERE n = 'j8';
SELECT awa.enqueue('tx', 'k', '"in c"') > 0 AS enqueued;
RELEASE c;                                                                                  -- into b
ROLLBACK TO b;                                                                              -- b and c are gone
SELECT n FROM got ORDER BY n;
SELECT string_agg(args #>> '{}', ' ' ORDER BY args) AS claimable_again FROM awa.claim('tx', 10);
ROLLBACK TO b;
SELECT awa.complete(job_id, run_lease) FROM got WHERE n IN ('j2', 'j3') ORDER BY n;         -- neither cancelled nor completed any more
SAVEPOINT d;
SELECT awa.snooze(job_id, run_lease, '0') FROM got WHERE n = 'j4';
ROLLBACK TO d;
SELECT awa.fail(job_id, run_lease, 'after d', retry_after => '0') FROM got WHERE n = 'j4';
RELEASE a;
COMMIT;
SELECT n, state, attempt FROM got, awa.job(job_id) AS j ORDER BY n;
SELECT string_agg((args #>> '{}') || '/' || attempt, ' ' ORDER BY args) AS left_over FROM awa.claim('tx', 20);
SELECT * FROM awa.verify();
-- The same, rolled back as a whole after releases.
SELECT count(awa.enqueue('tx', 'k', to_jsonb('r' || n))) FROM generate_series(1, 4) AS n;
BEGIN;
SAVEPOINT a;
SELECT awa.complete(job_id, run_lease) FROM awa.claim('tx');
SAVEPOINT b;
SELECT awa.fail(job_id, run_lease, 'x', retry_after => '0') FROM awa.claim('tx');
SAVEPOINT c;
SELECT awa.cancel(job_id) FROM awa.jobs WHERE args = '"r3"' AND queue = 'tx';
SELECT awa.enqueue('tx', 'k', '"r5"') > 0 AS enqueued;
RELEASE c;
RELEASE b;
RELEASE a;
ROLLBACK;
SELECT string_agg((args #>> '{}') || '/' || attempt, ' ' ORDER BY ordinality) AS all_back FROM awa.claim('tx', 20) WITH ORDINALITY;
SELECT * FROM awa.verify();
-- A completion that a savepoint takes back can be made otherwise.
SELECT awa.enqueue('tx', 'k') AS job_id \gset
SELECT run_lease FROM awa.claim('tx') \gset
BEGIN;
SAVEPOINT a;
SELECT awa.complete(:job_id, :run_lease);
ROLLBACK TO a;
SELECT awa.fail(:job_id, :run_lease, 'after all', final => true);
COMMIT;
SELECT state FROM awa.job(:job_id);
-- A thousand savepoints.
DO $$
BEGIN
    FOR n IN 1..1000 LOOP
        BEGIN
            PERFORM awa.enqueue('tx', 'k', to_jsonb(n));
            IF n % 2 = 0 THEN RAISE EXCEPTION 'even'; END IF;
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END LOOP;
END $$;
SELECT count(*) AS claimed, bool_and(args::int % 2 = 1) AS odd, bool_and(args::int = ordinality * 2 - 1) AS in_order FROM awa.claim('tx', 1000) WITH ORDINALITY;
SELECT * FROM awa.verify();

-- Exception blocks: the worker's usual shape, where the work fails and the failure is recorded.
SELECT count(awa.enqueue('tx', 'k', to_jsonb(n), max_attempts => 1)) FROM generate_series(1, 4) AS n;
CREATE TEMP TABLE done (n int);
DO $$
DECLARE c record;
BEGIN
    FOR c IN SELECT * FROM awa.claim('tx', 10) LOOP
        BEGIN
            INSERT INTO done VALUES (c.args::int);
            PERFORM awa.complete(c.job_id, c.run_lease);
            IF c.args::int IN (2, 3) THEN RAISE EXCEPTION 'no %', c.args; END IF;
        EXCEPTION WHEN raise_exception THEN
            PERFORM awa.fail(c.job_id, c.run_lease, SQLERRM);
        END;
    END LOOP;
END $$;
SELECT n FROM done ORDER BY n;
SELECT args, state, errors->0->>'error' AS error FROM awa.terminal_jobs WHERE queue = 'tx' AND max_attempts = 1 ORDER BY args;
-- Errors of the library itself, caught.
DO $$
BEGIN
    BEGIN PERFORM awa.enqueue('no such queue', 'k'); EXCEPTION WHEN undefined_object THEN RAISE NOTICE '%', SQLERRM; END;
    BEGIN PERFORM awa.enqueue('tx', 'k', priority => 9); EXCEPTION WHEN invalid_parameter_value THEN RAISE NOTICE '%', SQLERRM; END;
    BEGIN PERFORM awa.complete(1, 1); EXCEPTION WHEN object_not_in_prerequisite_state THEN RAISE NOTICE 'stale'; END;
    PERFORM awa.enqueue('tx', 'k', '"after errors"');
END $$;
SELECT args FROM awa.claim('tx', 10);
-- A procedure with commits of its own.
CREATE PROCEDURE tx_worker() LANGUAGE plpgsql AS $$
DECLARE c record;
BEGIN
    LOOP
        SELECT * INTO c FROM awa.claim('tx');
        EXIT WHEN NOT FOUND;
        COMMIT;
        PERFORM awa.complete(c.job_id, c.run_lease);
        IF c.args::int % 2 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
    END LOOP;
END $$;
SELECT count(awa.enqueue('tx', 'worker', to_jsonb(n))) FROM generate_series(1, 6) AS n;
CALL tx_worker();
SELECT args, state FROM awa.jobs WHERE kind = 'worker' UNION ALL SELECT args, state FROM awa.terminal_jobs WHERE kind = 'worker' ORDER BY args;
DROP PROCEDURE tx_worker;
SELECT * FROM awa.verify();

-- Prepared transactions: an enqueue is a gap until it is decided, and no obstacle for the jobs behind it.
BEGIN;
SELECT awa.enqueue('tx', 'k', '"prepared, committed"') > 0 AS enqueued;
PREPARE TRANSACTION 'awa 1';
BEGIN;
SELECT awa.enqueue('tx', 'k', '"prepared, rolled back"') > 0 AS enqueued;
PREPARE TRANSACTION 'awa 2';
SELECT awa.enqueue('tx', 'k', '"behind"') > 0 AS enqueued;
SELECT args FROM awa.claim('tx', 10);
SELECT count(*) AS claimed FROM awa.claim('tx', 10);
SELECT * FROM awa.verify();
COMMIT PREPARED 'awa 1';
ROLLBACK PREPARED 'awa 2';
SELECT args FROM awa.claim('tx', 10);
SELECT count(*) AS claimed FROM awa.claim('tx', 10);
SELECT * FROM awa.verify();
SELECT running = (SELECT count(*) FROM awa.jobs WHERE queue = 'tx') AS counted, available, scheduled FROM awa.queue_counts('tx');
-- What lives in memory cannot outlive its session: the rest is refused, and rolled back.
SELECT awa.enqueue('tx', 'k', '"not prepared"') AS job_id \gset
BEGIN;
SELECT args FROM awa.claim('tx');
PREPARE TRANSACTION 'awa 3';
\echo :SQLSTATE
SELECT run_lease FROM awa.claim('tx') \gset
\set VERBOSITY sqlstate
BEGIN; SELECT awa.complete(:job_id, :run_lease); PREPARE TRANSACTION 'awa 3';
BEGIN; SELECT awa.fail(:job_id, :run_lease, 'x'); PREPARE TRANSACTION 'awa 3';
BEGIN; SELECT awa.snooze(:job_id, :run_lease, '0'); PREPARE TRANSACTION 'awa 3';
BEGIN; SELECT awa.cancel(:job_id); PREPARE TRANSACTION 'awa 3';
BEGIN; SELECT awa.pause_queue('tx'); PREPARE TRANSACTION 'awa 3';
BEGIN; SELECT awa.create_queue('tx 2'); PREPARE TRANSACTION 'awa 3';
-- A claim that a savepoint has undone is no hindrance.
\set VERBOSITY default
SELECT awa.enqueue('tx', 'k', '"savepoint"') > 0 AS enqueued;
BEGIN;
SAVEPOINT s;
SELECT args FROM awa.claim('tx');
ROLLBACK TO s;
SELECT awa.enqueue('tx', 'k', '"prepared after all"') > 0 AS enqueued;
PREPARE TRANSACTION 'awa 4';
COMMIT PREPARED 'awa 4';
SELECT args FROM awa.claim('tx', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT state FROM awa.job(:job_id);
SELECT awa.complete(:job_id, :run_lease);
SELECT count(*) FROM pg_prepared_xacts;
SELECT count(*) FROM awa.queues WHERE queue = 'tx 2';

-- Read-only: looking is allowed, the rest says why not.
BEGIN READ ONLY;
SAVEPOINT s;
SELECT awa.enqueue('tx', 'k');
ROLLBACK TO s;
SELECT * FROM awa.claim('tx');
ROLLBACK TO s;
\set VERBOSITY sqlstate
SELECT awa.enqueue_many('tx', 'k', '{}');
ROLLBACK TO s;
INSERT INTO awa.jobs (queue, kind, args) VALUES ('tx', 'k', '1');
ROLLBACK TO s;
SELECT awa.complete(1, 1);
ROLLBACK TO s;
SELECT * FROM awa.complete_many('{1}', '{1}');
ROLLBACK TO s;
SELECT * FROM awa.complete_and_claim('{1}', '{1}', 'tx');
ROLLBACK TO s;
SELECT awa.fail(1, 1);
ROLLBACK TO s;
SELECT awa.snooze(1, 1, '0');
ROLLBACK TO s;
SELECT awa.cancel(1);
ROLLBACK TO s;
SELECT awa.create_queue('x');
ROLLBACK TO s;
SELECT awa.alter_queue('tx');
ROLLBACK TO s;
SELECT awa.drop_queue('tx');
ROLLBACK TO s;
SELECT awa.pause_queue('tx');
ROLLBACK TO s;
SELECT awa.resume_queue('tx');
ROLLBACK TO s;
SELECT outcome, generation, slot, detail FROM awa.rotate();
ROLLBACK TO s;
SELECT outcome, generation, slot, detail FROM awa.prune();
ROLLBACK TO s;
SELECT awa.rebuild();
ROLLBACK TO s;
\set VERBOSITY default
SELECT count(*) > 0 AS jobs FROM awa.jobs;
SELECT available FROM awa.queue_counts('tx');
SELECT * FROM awa.verify();
COMMIT;

SELECT awa.drop_queue('tx', force => true);
SELECT * FROM awa.verify();
