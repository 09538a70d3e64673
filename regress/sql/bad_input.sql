-- What breaks if this fails: bad input is stored, half done, or ends in an error that nobody can act on.
SELECT awa.create_queue('bad');
SELECT awa.create_queue('paused');
SELECT awa.pause_queue('paused');
-- One of each kind with its words; the SQLSTATE follows.
SELECT awa.enqueue('unknown', 'k');
\echo :SQLSTATE
SELECT awa.enqueue('it''s unknown', 'k');
SELECT awa.enqueue(NULL, 'k');
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', priority => 5);
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', max_attempts => 0);
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', run_at => 'infinity');
\echo :SQLSTATE
SELECT awa.enqueue('bad', repeat('k', 201));
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', to_jsonb(repeat('x', 17 * 1024 * 1024)));
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', tags => array_fill('t'::text, ARRAY[21]));
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', tags => ARRAY[repeat('t', 201)]);
\echo :SQLSTATE
SELECT awa.enqueue('bad', 'k', tags => '{a,NULL}');
\echo :SQLSTATE
SELECT awa.enqueue_many('bad', 'k', '{1,2}'::text[]::jsonb[], priorities => '{1}');
\echo :SQLSTATE
SELECT awa.enqueue_many('bad', 'k', '{1,NULL}'::text[]::jsonb[]);
\echo :SQLSTATE
SELECT awa.enqueue_many('bad', 'k', array_fill('1'::jsonb, ARRAY[100001]));
\echo :SQLSTATE
SELECT awa.claim('bad', 0);
\echo :SQLSTATE
SELECT awa.claim('bad', deadline => '-1 second');
\echo :SQLSTATE
SELECT awa.claim('bad', deadline => '1000 years');
\echo :SQLSTATE
SELECT awa.claim('{}'::text[]);
\echo :SQLSTATE
SELECT * FROM awa.complete_many('{1,2}', '{1}');
\echo :SQLSTATE
SELECT * FROM awa.complete_many('{1,NULL}', '{1,2}');
\echo :SQLSTATE
SELECT awa.create_queue('');
\echo :SQLSTATE
SELECT awa.create_queue(repeat('q', 129));
\echo :SQLSTATE
SELECT awa.create_queue('b', backoff => '2 days', backoff_max => '1 day');
\echo :SQLSTATE
SELECT awa.create_queue('b', options => '{"ring": "own"}');
\echo :SQLSTATE

-- The others by their SQLSTATE.
\set VERBOSITY sqlstate
SELECT awa.enqueue('bad', NULL);
SELECT awa.enqueue('bad', '');
SELECT awa.enqueue('', 'k');
SELECT awa.enqueue('bad', 'k', NULL);
SELECT awa.enqueue('bad', 'k', priority => NULL);
SELECT awa.enqueue('bad', 'k', priority => 0);
SELECT awa.enqueue('bad', 'k', priority => -1);
SELECT awa.enqueue('bad', 'k', priority => 2147483647);
SELECT awa.enqueue('bad', 'k', priority => 258);
SELECT awa.enqueue('bad', 'k', max_attempts => -1);
SELECT awa.enqueue('bad', 'k', max_attempts => 1001);
SELECT awa.enqueue('bad', 'k', max_attempts => 65537);
SELECT awa.enqueue('bad', 'k', run_at => '-infinity');
SELECT awa.enqueue('bad', 'k', run_at => '294276-12-31');
SELECT awa.enqueue('bad', 'k', metadata => to_jsonb(repeat('x', 17 * 1024 * 1024)));
SELECT awa.enqueue('bad', 'k', tags => '{{a,b},{c,d}}');
SELECT awa.enqueue_many('bad', 'k', NULL);
SELECT awa.enqueue_many(NULL, 'k', '{}');
SELECT awa.enqueue_many('unknown', 'k', '{}');
SELECT awa.enqueue_many('bad', NULL, '{1}'::text[]::jsonb[]);
SELECT awa.enqueue_many('bad', 'k', '{1,2}'::text[]::jsonb[], priorities => '{1,NULL}');
SELECT awa.enqueue_many('bad', 'k', '{1,2}'::text[]::jsonb[], priorities => '{1,0}');
SELECT awa.enqueue_many('bad', 'k', '{1,2}'::text[]::jsonb[], run_ats => '{now}');
SELECT awa.enqueue_many('bad', 'k', '{1,2}'::text[]::jsonb[], run_ats => '{now,infinity}');
SELECT awa.enqueue_many('bad', 'k', ARRAY['1'::jsonb, to_jsonb(repeat('x', 17 * 1024 * 1024))]);
SELECT awa.claim('unknown');
SELECT awa.claim(NULL::text);
SELECT awa.claim(NULL::text[]);
SELECT awa.claim(ARRAY['bad', NULL]);
SELECT awa.claim(ARRAY['bad', 'unknown']);
SELECT awa.claim('bad', -1);
SELECT awa.claim('bad', NULL);
SELECT awa.claim('bad', 100001);
SELECT awa.claim('bad', 2147483647);
SELECT awa.claim('bad', heartbeat_timeout => '-1 second');
SELECT awa.claim('bad', heartbeat_timeout => '178000000 years');
SELECT awa.claim('bad', deadline => '2147483647 days');
SELECT awa.claim('bad', deadline => '-178000000 years');
SELECT * FROM awa.complete_many(NULL, '{}');
SELECT * FROM awa.complete_many('{}', NULL);
SELECT * FROM awa.complete_many(array_fill(1::bigint, ARRAY[100001]), array_fill(1::bigint, ARRAY[100001]));
SELECT * FROM awa.complete_and_claim('{1}', '{}', 'bad');
SELECT * FROM awa.complete_and_claim(NULL, NULL, 'bad');
SELECT * FROM awa.complete_and_claim('{}', '{}', NULL);
SELECT * FROM awa.complete_and_claim('{}', '{}', 'bad', -5);
SELECT * FROM awa.heartbeat_many('{1}', '{}');
SELECT * FROM awa.heartbeat_many('{1}', '{NULL}');
SELECT awa.fail(NULL, 1);
SELECT awa.fail(1, NULL);
SELECT awa.fail(1, 1);
SELECT awa.fail(1, 1, 'x', retry_after => '-1 second');
SELECT awa.fail(1, 1, 'x', retry_after => '178000000 years');
SELECT awa.snooze(1, 1, '-1 second');
SELECT awa.snooze(1, 1, '178000000 years');
SELECT awa.extend(1, 1, '178000000 years');
SELECT awa.create_queue(NULL);
SELECT awa.create_queue('b', max_attempts => 0);
SELECT awa.create_queue('b', max_attempts => 100000);
SELECT awa.create_queue('b', deadline => '-1 second');
SELECT awa.create_queue('b', heartbeat_timeout => '-1 second');
SELECT awa.create_queue('b', backoff => '-1 second');
SELECT awa.create_queue('b', backoff_max => '-1 day');
SELECT awa.create_queue('b', backoff_max => '178000000 years');
SELECT awa.create_queue('b', priority_ageing => '-1 minute');
SELECT awa.create_queue('b', options => '[1]');
SELECT awa.alter_queue('unknown');
SELECT awa.alter_queue(NULL);
SELECT awa.alter_queue('bad', max_attempts => -1);
SELECT awa.alter_queue('bad', backoff => '2 days');
SELECT awa.alter_queue('bad', options => '{"colour": "red"}');
SELECT awa.complete(1, NULL);
SELECT awa.heartbeat(1, NULL);
SELECT awa.extend(1, 1, NULL);
SELECT awa.snooze(1, 1, NULL);
SELECT awa.pause_queue(NULL);
SELECT awa.resume_queue(NULL);
SELECT awa.drop_queue(NULL);
SELECT awa.pause_queue('unknown');
SELECT awa.resume_queue('unknown');
SELECT awa.drop_queue('unknown');
CALL awa.wait('unknown');
CALL awa.wait('bad', NULL);
CALL awa.wait('bad', '-1 second');
CALL awa.wait(NULL);
\set VERBOSITY default

-- CALL wait in a transaction block or a function would hold a snapshot: it says what to do instead.
BEGIN;
CALL awa.wait('bad', '1 second');
\echo :SQLSTATE
ROLLBACK;
DO $$ BEGIN CALL awa.wait('bad', '1 millisecond'); END $$;
CREATE FUNCTION pg_temp.waits() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CALL awa.wait('bad', '1 millisecond'); END $$;
\set VERBOSITY sqlstate
SELECT pg_temp.waits();
\set VERBOSITY default

-- A paused queue takes jobs and gives none.
SELECT awa.enqueue('paused', 'k') > 0 AS enqueued;
SELECT count(*) AS claimed FROM awa.claim('paused', 10);
-- The limits themselves are good.
SELECT awa.enqueue('bad', 'k', '1', priority => 4, max_attempts => 1000) > 0 AS enqueued;
SELECT awa.enqueue('bad', repeat('k', 200), priority => 1, max_attempts => 1, tags => array_fill(repeat('t', 200), ARRAY[20])) > 0 AS enqueued;
SELECT awa.enqueue('bad', 'k', to_jsonb(repeat('x', 1024 * 1024 * 16 - 100)), priority => 2) > 0 AS enqueued;
SELECT awa.enqueue('bad', 'k', priority => 3, run_at => '100000-12-31') AS last_year \gset
SELECT priority, max_attempts, length(kind), length(args #>> '{}') FROM awa.claim('bad', 100000, deadline => '36500 days') WITH ORDINALITY ORDER BY ordinality;
SELECT awa.cancel(:last_year);
SELECT awa.create_queue(repeat('q', 128), max_attempts => 1, backoff => '1 day', backoff_max => '1 day');
SELECT awa.drop_queue(repeat('q', 128));
-- Nothing of all this was half done.
SELECT available, scheduled, running FROM awa.queue_counts('bad');
SELECT queue FROM awa.queues ORDER BY queue;
SELECT * FROM awa.verify();

-- A statement that is cancelled in the middle of a claim gives everything back.
SELECT cardinality(awa.enqueue_many('bad', 'k', array_agg(to_jsonb(n)))) FROM generate_series(1, 1000) AS n;
SET statement_timeout = '50ms';
\set VERBOSITY sqlstate
SELECT count(*), pg_sleep(5) FROM awa.claim('bad', 500);
\set VERBOSITY default
RESET statement_timeout;
SELECT available FROM awa.queue_counts('bad');
SELECT count(*) AS claimed, bool_and(args::int = ordinality) AS in_order FROM awa.claim('bad', 5000) WITH ORDINALITY;

SELECT awa.drop_queue(queue, force => true) FROM awa.queues;
SELECT * FROM awa.verify();
