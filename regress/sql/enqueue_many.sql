-- What breaks if this fails: a batch of jobs is stored in part, in another order, or with one job's settings given to another.
SELECT awa.create_queue('many', max_attempts => 4, priority_ageing => '0');

-- One identifier for each job, in the order given.
SELECT ids AS many_ids, cardinality(ids) AS jobs,
       (SELECT bool_and(a < b) FROM unnest(ids, ids[2:]) AS t (a, b) WHERE b IS NOT NULL) AS ids_grow
  FROM awa.enqueue_many('many', 'k', ARRAY['1', '"two"', 'null', '{"four": 4}']::jsonb[], tags => '{t}', metadata => '{"m": 1}') AS ids \gset
SELECT :jobs AS jobs, :'ids_grow' AS ids_grow;
SELECT (:'many_ids'::bigint[])[ordinality] = job_id AS same_id, args, kind, priority, max_attempts, tags, metadata, run_at = enqueued_at AS due_at_once
  FROM awa.claim('many', 10) WITH ORDINALITY ORDER BY ordinality;

-- Priorities and times belong to their job.
SELECT cardinality(awa.enqueue_many('many', 'k', ARRAY['"p3"', '"p1"', '"p4"', '"p2"', '"p1 again"', '"p2 past"', '"p2 future"']::jsonb[],
                   priorities => '{3,1,4,2,1,2,2}',
                   run_ats => ARRAY[NULL, NULL, NULL, NULL, NULL, now() - interval '1 hour', now() + interval '1 hour'], max_attempts => 9));
SELECT args, priority, max_attempts, run_at < enqueued_at AS past FROM awa.claim('many', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT args, state FROM awa.jobs WHERE queue = 'many' AND state <> 'running';

-- No job is a batch too, and a batch is larger than any block inside.
SELECT awa.enqueue_many('many', 'k', '{}');
SELECT cardinality(awa.enqueue_many('many', 'k', array_agg(to_jsonb(n)))) FROM generate_series(1, 5000) AS n;
SELECT count(*) AS claimed, bool_and(args::int = ordinality) AS in_order, count(DISTINCT job_id) AS ids
  FROM awa.claim('many', 5000) WITH ORDINALITY;
SELECT count(*) AS more FROM awa.claim('many');

-- All or nothing.
SELECT available FROM awa.queue_counts('many');
\set VERBOSITY sqlstate
SELECT awa.enqueue_many('many', 'k', ARRAY['1', '2', '3']::jsonb[], priorities => '{1,2,5}');
SELECT awa.enqueue_many('many', 'k', ARRAY['1', NULL, '3']::jsonb[]);
SELECT awa.enqueue_many('many', 'k', ARRAY['1', '2', '3']::jsonb[], priorities => '{1,2}');
BEGIN;
SELECT cardinality(awa.enqueue_many('many', 'k', ARRAY['1', '2', '3']::jsonb[]));
SAVEPOINT s;
SELECT awa.enqueue_many('many', 'k', ARRAY['1', '2', '3']::jsonb[], run_ats => ARRAY['infinity', NULL, NULL]::timestamptz[]);
ROLLBACK TO s;
ROLLBACK;
\set VERBOSITY default
SELECT available FROM awa.queue_counts('many');
SELECT count(*) AS claimed FROM awa.claim('many', 10);

-- Large arguments in a batch, out of line.
SELECT cardinality(awa.enqueue_many('many', 'k', array_agg(jsonb_build_object('n', n, 'x', (SELECT string_agg(md5((n * i)::text), '') FROM generate_series(1, 300) AS i)))))
  FROM generate_series(1, 50) AS n;
SELECT count(*) AS claimed, bool_and(args->>'x' = (SELECT string_agg(md5(((args->>'n')::int * i)::text), '') FROM generate_series(1, 300) AS i)) AS unchanged
  FROM awa.claim('many', 100);

SELECT awa.drop_queue('many', force => true);
SELECT * FROM awa.verify();
