-- What breaks if this fails: a job reaches its worker changed, out of order or at the wrong time.
SELECT awa.create_queue('enqueue', max_attempts => 6);

-- What is given arrives; what is not given has its default.
SELECT awa.enqueue('enqueue', 'mail.send', '{"to": "ada", "n": [1, null, {"deep": "ü"}]}', priority => 1, max_attempts => 3,
                   tags => '{a,"b c",ä}', metadata => '{"trace": "00-1"}') AS full_id \gset
SELECT awa.enqueue('enqueue', 'mail.send') AS bare_id \gset
SELECT :full_id > 0 AND :bare_id > :full_id AS ids_are_positive_and_grow;
SELECT job_id = :full_id AS is_full, queue, kind, args, priority, attempt, max_attempts, run_at = enqueued_at AS due_at_once,
       enqueued_at BETWEEN now() - interval '1 minute' AND clock_timestamp() AS enqueued_now, deadline_at, tags, metadata, errors
  FROM awa.claim('enqueue', 10) ORDER BY priority;

-- Any jsonb is an argument, also one that is a scalar, a null or very large.
SELECT count(awa.enqueue('enqueue', 'json', args))
  FROM (VALUES ('1'::jsonb), ('"text"'), ('null'), ('[]'), ('{}'), ('[1, [2, [3]]]'), ('true')) AS v (args);
SELECT args FROM awa.claim('enqueue', 10) WITH ORDINALITY ORDER BY ordinality;
CREATE TEMP TABLE big AS
SELECT n, jsonb_build_object('n', n, 'text', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, n) AS i)) AS args
  FROM unnest(ARRAY[1, 60, 250, 4000, 50000]) AS n;
SELECT n, awa.enqueue('enqueue', 'big', args) > 0 AS enqueued FROM big ORDER BY n;
TRUNCATE big; -- whatever a job holds is its own
SELECT args->'n' AS n, length(args->>'text') AS length,
       args->>'text' = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, (args->>'n')::int) AS i) AS unchanged
  FROM awa.claim('enqueue', 10) WITH ORDINALITY ORDER BY ordinality;
-- Large tags, metadata and arguments that compress.
SELECT awa.enqueue('enqueue', 'k', to_jsonb(repeat('x', 3000000)), tags => (SELECT array_agg(repeat(i::text, 50)) FROM generate_series(1, 20) AS i),
                   metadata => to_jsonb(repeat('y', 100000))) > 0 AS enqueued;
SELECT length(args #>> '{}') AS args, cardinality(tags) AS tags, length(tags[20]) AS tag, length(metadata #>> '{}') AS metadata FROM awa.claim('enqueue');

-- First in, first out, within one statement and over many.
SELECT count(awa.enqueue('enqueue', 'k', to_jsonb(n))) FROM generate_series(1, 700) AS n;
DO $$ BEGIN FOR n IN 701..1000 LOOP PERFORM awa.enqueue('enqueue', 'k', to_jsonb(n)); END LOOP; END $$;
SELECT count(*) AS claimed, bool_and(args::int = ordinality) AS in_order FROM awa.claim('enqueue', 600) WITH ORDINALITY;
SELECT count(*) AS claimed, bool_and(args::int = 600 + ordinality) AS in_order FROM awa.claim('enqueue', 600) WITH ORDINALITY;
SELECT count(DISTINCT job_id) AS jobs, count(*) AS rows FROM awa.jobs WHERE queue = 'enqueue' AND kind = 'k' AND jsonb_typeof(args) = 'number';

-- run_at: a job of the future waits, one of the past is due, and what has waited longer goes first.
SELECT awa.enqueue('enqueue', 'k', '"tomorrow"', run_at => now() + interval '1 day') AS tomorrow \gset
SELECT awa.enqueue('enqueue', 'k', '"minute ago"', run_at => now() - interval '1 minute') > 0 AS enqueued;
SELECT awa.enqueue('enqueue', 'k', '"hour ago"', run_at => now() - interval '1 hour') > 0 AS enqueued;
SELECT awa.enqueue('enqueue', 'k', '"now"') > 0 AS enqueued;
SELECT awa.enqueue('enqueue', 'k', '"year 9999"', run_at => '9999-12-31') AS year_9999 \gset
SELECT awa.enqueue('enqueue', 'k', '"4713 BC"', run_at => '4713-01-01 BC') > 0 AS enqueued;
SELECT args, run_at < enqueued_at AS was_due FROM awa.claim('enqueue', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT args, state, run_at > now() + interval '23 hours' AS later FROM awa.jobs WHERE job_id IN (:tomorrow, :year_9999) ORDER BY job_id;
SELECT available, scheduled FROM awa.queue_counts('enqueue');
-- Due is due within the second.
SELECT awa.enqueue('enqueue', 'k', '"soon"', run_at => clock_timestamp() + interval '300 milliseconds') > 0 AS enqueued;
SELECT count(*) AS too_early FROM awa.claim('enqueue', 10);
SELECT pg_sleep(0.35);
SELECT args FROM awa.claim('enqueue', 10);
-- Many jobs at the very same time.
SELECT count(awa.enqueue('enqueue', 'tie', to_jsonb(n), run_at => '2020-02-02')) FROM generate_series(1, 3000) AS n;
SELECT count(*) AS claimed, count(DISTINCT args) AS different FROM awa.claim('enqueue', 1100);
SELECT count(*) AS claimed, count(DISTINCT args) AS different FROM awa.claim('enqueue', 5000);

-- A kind that was first seen by a transaction that rolled back.
BEGIN;
SELECT awa.enqueue('enqueue', 'kind.rolled.back') > 0 AS enqueued;
SELECT awa.enqueue('enqueue', 'kind.rolled.back') > 0 AS enqueued;
ROLLBACK;
SELECT awa.enqueue('enqueue', 'kind.rolled.back') > 0 AS enqueued;
SELECT kind FROM awa.claim('enqueue', 10);
-- The longest kind, the longest tag, and the most tags.
SELECT awa.enqueue('enqueue', repeat('k', 200), tags => array_fill(repeat('t', 190), ARRAY[20])) > 0 AS enqueued;
SELECT length(kind) AS kind, cardinality(tags) AS tags FROM awa.claim('enqueue', 10);
-- Arrays with a lower bound of their own, and an empty one.
SELECT awa.enqueue('enqueue', 'k', tags => '[5:6]={a,b}') > 0 AS enqueued;
SELECT awa.enqueue('enqueue', 'k', tags => '{}') > 0 AS enqueued;
SELECT tags FROM awa.claim('enqueue', 10) WITH ORDINALITY ORDER BY ordinality;

-- From a trigger of the caller's table, in the caller's transaction.
CREATE TABLE orders (id int PRIMARY KEY);
CREATE FUNCTION order_placed() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM awa.enqueue('enqueue', 'order', to_jsonb(NEW.id)); RETURN NEW; END $$;
CREATE TRIGGER order_placed AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION order_placed();
INSERT INTO orders SELECT generate_series(1, 5);
INSERT INTO orders VALUES (6), (1);
SELECT args FROM awa.claim('enqueue', 10) WITH ORDINALITY ORDER BY ordinality;
DROP TABLE orders;
DROP FUNCTION order_placed;

SELECT awa.drop_queue('enqueue', force => true);
SELECT * FROM awa.verify();
