-- What breaks if this fails: one old job keeps a segment, or a job is lost, doubled or taken from its worker when its segment is emptied.
-- A ring of its own: generations and slots are printed.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
CREATE EXTENSION awa_queue;
RESET client_min_messages;
SET awa.prune_grace = 0;
SELECT outcome, generation, slot, rows, detail FROM awa.carry_forward();
SELECT awa.create_queue('ring', backoff => '0', backoff_max => '0');
SELECT awa.create_queue('other');
-- The open segment is not carried, nor one that does not exist.
SELECT awa.carry_forward(1);
SELECT awa.carry_forward(99);
SELECT outcome FROM awa.carry_forward(NULL);

-- One job of each kind: waiting in two priorities, scheduled soon, due by its time, given back, retried, running with and without a deadline.
CREATE TEMP TABLE j (n int, job_id bigint);
INSERT INTO j SELECT n, awa.enqueue('ring', 'k', to_jsonb(n), tags => ARRAY['t'], metadata => '{"m": 1}') FROM generate_series(1, 4) AS n;
INSERT INTO j VALUES (5, awa.enqueue('ring', 'k', '5', priority => 4)),
    (6, awa.enqueue('ring', 'k', '6', run_at => now() + '10 min')),
    (7, awa.enqueue('ring', 'k', '7', run_at => now() - interval '1 min', priority => 3)),
    (8, awa.enqueue('other', 'k', '8')),
    (9, awa.enqueue('ring', 'k', '9', max_attempts => 7));
CREATE TEMP TABLE times AS SELECT n, j.run_at, j.enqueued_at FROM j AS mine, awa.job(mine.job_id) AS j;
CREATE TEMP TABLE got AS
    SELECT args::int AS n, job_id, run_lease, claimed.run_at, claimed.enqueued_at, claimed.deadline_at
      FROM awa.claim('ring', 2, deadline => '1 hour', heartbeat_timeout => '30 min') AS claimed;
SELECT n FROM got ORDER BY n;
BEGIN;
SELECT args FROM awa.claim('ring', 1);
ROLLBACK;
SELECT outcome, generation FROM awa.rotate();
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('ring');

-- All of them in one step; the answers and the counts stay what they were.
SELECT outcome, generation, slot, rows, detail FROM awa.carry_forward(1);
SELECT outcome, rows, detail FROM awa.carry_forward(1);
SELECT * FROM awa.verify();
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('ring');
SELECT available FROM awa.queue_counts('other');
SELECT j.args, j.state, j.priority, j.attempt, j.max_attempts, j.tags, j.metadata, j.enqueued_at = t.enqueued_at AS same_enqueued_at,
       j.state <> 'scheduled' OR j.run_at = t.run_at AS same_run_at, j.run_at > '2000-01-01' AS has_time, j.deadline_at = got.deadline_at AS same_deadline
  FROM awa.jobs AS j JOIN times AS t ON t.n = j.args::int LEFT JOIN got ON got.n = t.n ORDER BY t.n;
-- Each copy is one further; the evidence of the move is in the old segment.
SELECT outcome, lane IS NOT NULL AS tombstone, count(*) FROM awa_segments.lease_claim_closures_0 GROUP BY 1, 2 ORDER BY 2;
SELECT hop, key = '-infinity' AS born_claimed, count(*) FROM awa_segments.ready_entries_1 GROUP BY 1, 2 ORDER BY 2;
SELECT deadline_at IS NOT NULL AS deadline, heartbeat_timeout, cardinality(job_ids) AS jobs, hops FROM awa_segments.lease_claims_1;

-- The old segment goes, and after it everything is still there: in memory, in the log, and after a rebuild.
SELECT outcome, generation FROM awa.prune();
SELECT outcome, generation FROM awa.prune();
SELECT * FROM awa.verify();
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 1;
SELECT awa.extend(job_id, run_lease, '2 hours') > now() + interval '119 min' AS extended FROM got WHERE n = 1;
SELECT awa.rebuild() > 0 AS rebuilt;
SELECT * FROM awa.verify();
SELECT available, scheduled, running FROM awa.queue_counts('ring');
SELECT args, state FROM awa.jobs ORDER BY args::int;
SELECT awa.heartbeat(job_id, run_lease) FROM got WHERE n = 7;
-- The lease is the one the worker has; nobody else is offered the running jobs, the others come in their order.
SELECT r.result FROM got, awa.complete_many(ARRAY[job_id], ARRAY[run_lease + 1000]) AS r WHERE n = 1;
SELECT n, awa.complete(job_id, run_lease) FROM got WHERE n = 1;
SELECT awa.fail(job_id, run_lease, 'once', retry_after => '0') FROM got WHERE n = 7;
SELECT args, priority, attempt, errors -> 0 ->> 'error' AS error FROM awa.claim('ring', 20);
SELECT * FROM awa.verify();

-- It must be a transaction of its own, at READ COMMITTED.
BEGIN;
SELECT count(awa.enqueue('ring', 'k'));
SELECT awa.carry_forward(2);
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT awa.carry_forward(2);
ROLLBACK;

-- A step that is rolled back, to a savepoint or to the top, has not happened.
SELECT awa.drop_queue('ring', true), awa.drop_queue('other', true);
SELECT awa.create_queue('back');
TRUNCATE j, got;
INSERT INTO j SELECT n, awa.enqueue('back', 'k', to_jsonb(n)) FROM generate_series(1, 5) AS n;
INSERT INTO got SELECT args::int, job_id, run_lease FROM awa.claim('back', 2);
BEGIN; SELECT args FROM awa.claim('back', 1); ROLLBACK;
SELECT outcome, generation FROM awa.rotate();
BEGIN;
SELECT outcome, rows, detail FROM awa.carry_forward(2);
SELECT args, state FROM awa.jobs ORDER BY args::int;
-- Nobody else ends what is on its way, this transaction neither.
SELECT n, r.result FROM got, awa.complete_many(ARRAY[got.job_id], ARRAY[got.run_lease]) AS r ORDER BY n;
SELECT awa.heartbeat(job_id, run_lease) FROM got ORDER BY n;
SAVEPOINT s;
SELECT awa.cancel(job_id) FROM j WHERE n = 1;
ROLLBACK TO s;
SELECT awa.cancel(job_id) FROM j WHERE n = 5;
ROLLBACK;
SELECT * FROM awa.verify();
BEGIN;
SAVEPOINT s;
SELECT outcome, rows, detail FROM awa.carry_forward(2);
ROLLBACK TO s;
SELECT outcome, rows, detail FROM awa.carry_forward(2);
SAVEPOINT s;
RELEASE s;
COMMIT;
SELECT * FROM awa.verify();
SELECT n, awa.complete(job_id, run_lease) FROM got ORDER BY n;
SELECT args FROM awa.claim('back', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT available, scheduled, running, completed, failed, cancelled FROM awa.queue_counts('back');
SELECT * FROM awa.verify();
-- A transaction that has carried cannot be prepared.
SELECT outcome, generation FROM awa.rotate();
BEGIN;
SELECT outcome, rows FROM awa.carry_forward(3);
PREPARE TRANSACTION 'carried';
SELECT outcome, rows FROM awa.carry_forward(3);

-- Cancelled jobs stay ended, carried jobs can be cancelled, and their history says so.
SELECT awa.drop_queue('back', true);
SELECT awa.create_queue('ends');
TRUNCATE j;
INSERT INTO j SELECT n, awa.enqueue('ends', 'k', to_jsonb(n)) FROM generate_series(1, 4) AS n;
SELECT awa.cancel(job_id) FROM j WHERE n = 2;
SELECT outcome, generation FROM awa.rotate();
SELECT outcome, rows, detail FROM awa.carry_forward(4);
SELECT n, awa.cancel(job_id) FROM j WHERE n < 4 ORDER BY n;
SELECT * FROM awa.verify();
SELECT args FROM awa.claim('ends', 10);
SELECT args, state FROM awa.terminal_jobs WHERE queue = 'ends' ORDER BY args;

-- A large value goes along as it is; so does a batch of more than one step.
SELECT awa.create_queue('bulk');
SELECT count(awa.enqueue('bulk', 'k', jsonb_build_object('big', (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 3000) AS g))));
SELECT count(*) FROM unnest(awa.enqueue_many('bulk', 'k', ARRAY(SELECT to_jsonb(n) FROM generate_series(1, 1200) AS n)));
SELECT outcome, generation FROM awa.rotate();
SELECT outcome, rows, detail FROM awa.carry_forward(5);
SELECT outcome, rows, detail FROM awa.carry_forward(5);
SELECT outcome, rows, detail FROM awa.carry_forward(5);
SELECT outcome, rows, detail FROM awa.carry_forward(5);
SELECT * FROM awa.verify();
SELECT available FROM awa.queue_counts('bulk');
SELECT length(args ->> 'big') FROM awa.claim('bulk', 1);
SELECT count(*), bool_and(args::int = n) AS in_order FROM awa.claim('bulk', 2000) WITH ORDINALITY AS c(a, b, c, d, args, e, f, g, h, i, k, l, m, o, n);

-- The policy: nothing while the ring is short; then paused queues, running jobs and what is not due, but not what workers are coming for.
SELECT awa.drop_queue('bulk', true), awa.drop_queue('ends', true);
SELECT awa.create_queue('paused'), awa.create_queue('busy');
SELECT awa.pause_queue('paused');
SELECT count(awa.enqueue('paused', 'k', to_jsonb(n))) FROM generate_series(1, 2) AS n;
SELECT count(awa.enqueue('busy', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
SELECT count(awa.enqueue('busy', 'k', '4', run_at => now() + '1 min'));
SELECT args FROM awa.claim('busy', 1);
SELECT outcome, generation, rows, detail FROM awa.run_maintenance('carry_forward');
SELECT 'SELECT outcome, generation FROM awa.prune()' FROM generate_series(1, 8) \gexec
SELECT 'SELECT outcome, generation FROM awa.rotate()' FROM generate_series(1, 6) \gexec
SELECT outcome, generation, rows, detail FROM awa.run_maintenance('carry_forward');
SELECT outcome, generation FROM awa.rotate();
SELECT count(*) FROM awa.stat_segments;
SELECT outcome, generation, rows, detail FROM awa.run_maintenance('carry_forward');
SELECT outcome, generation, rows, detail FROM awa.run_maintenance('carry_forward');
SELECT * FROM awa.verify();
SELECT queue, args, state FROM awa.jobs WHERE queue IN ('paused', 'busy') ORDER BY 1, 2;
SELECT awa.resume_queue('paused');
SELECT args FROM awa.claim(ARRAY['busy', 'paused'], 10);
SELECT * FROM awa.verify();

-- A paused queue, a job that runs all day and a job of next week: the ring goes round all the same, and each comes to its end.
SELECT awa.drop_queue('paused', true), awa.drop_queue('busy', true);
SELECT awa.create_queue('still'), awa.create_queue('long'), awa.create_queue('far');
SELECT count(awa.enqueue('still', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
SELECT awa.pause_queue('still');
SELECT count(awa.enqueue('long', 'k', '4'));
SELECT count(awa.enqueue('far', 'k', '5', run_at => now() + '1 week'));
TRUNCATE got;
INSERT INTO got SELECT args::int, job_id, run_lease FROM awa.claim('long', heartbeat_timeout => '1 day');
\o /dev/null
\set ECHO none
SELECT format('SELECT outcome FROM awa.%s', call) FROM generate_series(1, 30) AS lap,
    unnest(ARRAY['rotate()', 'run_maintenance(''carry_forward'')', 'prune()', 'prune()']) WITH ORDINALITY AS c (call, n) ORDER BY lap, n \gexec
\set ECHO all
\o
SELECT max(generation) > 40 AS went_round, count(*) <= 9 AS is_short, min(generation) > 30 AS moved_on FROM awa.stat_segments;
SELECT * FROM awa.verify();
SELECT queue, state, args FROM awa.jobs ORDER BY args;
SELECT count(*) FROM awa.deferred_jobs;
SELECT awa.heartbeat(job_id, run_lease), awa.complete(job_id, run_lease) FROM got;
SELECT awa.resume_queue('still');
SELECT args FROM awa.claim(ARRAY['still', 'long', 'far'], 10);
SELECT * FROM awa.verify();
-- Looking takes no transaction id.
BEGIN;
SELECT outcome FROM awa.run_maintenance('carry_forward');
SELECT outcome FROM awa.run_maintenance('promote_deferred');
SELECT pg_current_xact_id_if_assigned();
COMMIT;

-- A full step is rolled back: the next one does not begin where it had stopped and find nothing.
SELECT awa.drop_queue(queue, true) FROM unnest(ARRAY['still', 'long', 'far']) AS queue;
SELECT awa.create_queue('steps');
SELECT awa.pause_queue('steps');
TRUNCATE j;
INSERT INTO j SELECT n, job_id FROM unnest(awa.enqueue_many('steps', 'k', ARRAY(SELECT to_jsonb(n) FROM generate_series(1, 513) AS n))) WITH ORDINALITY AS e (job_id, n);
SELECT outcome FROM awa.rotate();
SELECT max(generation) - 1 AS generation FROM awa.stat_segments \gset
BEGIN;
SELECT outcome, rows, detail FROM awa.carry_forward(:generation);
ROLLBACK;
SELECT awa.cancel(job_id) FROM j WHERE n = 513;
SELECT outcome, rows, detail FROM awa.carry_forward(:generation);
SELECT outcome, rows, detail FROM awa.carry_forward(:generation);
SELECT * FROM awa.verify();

-- A segment that was emptied looks drained at once: what lies above the cursors has a tombstone, row by row.
SELECT awa.drop_queue('steps', true);
SELECT awa.create_queue('empty');
SELECT awa.pause_queue('empty');
SELECT count(awa.enqueue('empty', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
SELECT count(awa.enqueue('empty', 'k', '4', run_at => now() + '10 min'));
\o /dev/null
\set ECHO none
SELECT 'SELECT outcome FROM awa.rotate()' FROM generate_series(1, 8) \gexec
\set ECHO all
\o
SELECT s.generation FROM awa.stat_segments AS s WHERE waiting_queues > 0 ORDER BY 1 LIMIT 1 \gset
\o /dev/null
\set ECHO none
SELECT 'SELECT outcome FROM awa.run_maintenance(''prune'')' FROM generate_series(1, 50) \gexec
\set ECHO all
\o
SELECT outcome, detail FROM awa.run_maintenance('prune');
\o /dev/null
\set ECHO none
SELECT 'SELECT outcome FROM awa.rotate()' FROM generate_series(1, 8) \gexec
\set ECHO all
\o
SELECT outcome, rows, detail FROM awa.run_maintenance('carry_forward');
SELECT waiting_queues FROM awa.stat_segments WHERE generation = :generation;
SELECT outcome FROM awa.run_maintenance('carry_forward');
SELECT waiting_queues, drained FROM awa.stat_segments WHERE generation = :generation;
SELECT outcome, generation = :generation AS this_one FROM awa.run_maintenance('prune');
SELECT * FROM awa.verify();
