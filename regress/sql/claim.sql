-- What breaks if this fails: workers get jobs twice, in the wrong order, too early, or none at all.
SELECT awa.create_queue('claim', priority_ageing => '0');
SELECT awa.create_queue('other', priority_ageing => '0');
SELECT count(*) AS empty FROM awa.claim('claim', 10);

-- One by default; each job once; every attempt has a lease of its own.
SELECT count(awa.enqueue('claim', 'k', to_jsonb(n))) FROM generate_series(1, 6) AS n;
CREATE TEMP TABLE got AS SELECT * FROM awa.claim('claim');
INSERT INTO got SELECT * FROM awa.claim('claim');
INSERT INTO got SELECT * FROM awa.claim('claim', 3);
SELECT args, attempt FROM got ORDER BY args;
INSERT INTO got SELECT * FROM awa.claim_ready_runtime('claim', 100);
INSERT INTO got SELECT * FROM awa.claim('claim', 100);
SELECT count(*) AS claimed, count(DISTINCT job_id) AS jobs, count(DISTINCT run_lease) AS leases, bool_and(run_lease > 0) AS positive FROM got;

-- Priorities: 1 before 2 before 3 before 4, whatever came first; within one, first in first out.
SELECT count(awa.enqueue('claim', 'k', to_jsonb(n), priority => 5 - (n + 3) / 4)) FROM generate_series(1, 16) AS n;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS by_priority FROM awa.claim('claim', 7) WITH ORDINALITY;
SELECT awa.enqueue('claim', 'k', '"late and urgent"', priority => 1) > 0 AS enqueued;
SELECT string_agg(args::text, ' ' ORDER BY ordinality) AS by_priority FROM awa.claim('claim', 100) WITH ORDINALITY;

-- Ageing: waiting moves a job towards priority 1. Here a millisecond is a step, so after ten all are equal and the oldest goes first.
SELECT awa.create_queue('ageing', priority_ageing => '1 millisecond');
SELECT awa.enqueue('ageing', 'k', '"old and modest"', priority => 4) > 0 AS enqueued;
SELECT pg_sleep(0.01);
SELECT awa.enqueue('ageing', 'k', '"young and urgent"', priority => 1) > 0 AS enqueued;
SELECT args, priority FROM awa.claim('ageing', 10) WITH ORDINALITY ORDER BY ordinality;
-- With an hour a step, the urgent one goes first; one that waits for hours has aged.
SELECT awa.alter_queue('ageing', priority_ageing => '1 hour');
SELECT awa.enqueue('ageing', 'k', '"old and modest"', priority => 4) > 0 AS enqueued;
SELECT awa.enqueue('ageing', 'k', '"one step"', priority => 3, run_at => now() - interval '90 minutes') > 0 AS enqueued;
SELECT awa.enqueue('ageing', 'k', '"two steps"', priority => 4, run_at => now() - interval '150 minutes') > 0 AS enqueued;
SELECT awa.enqueue('ageing', 'k', '"middle"', priority => 2) > 0 AS enqueued;
SELECT awa.enqueue('ageing', 'k', '"young and urgent"', priority => 1) > 0 AS enqueued;
SELECT args, priority FROM awa.claim('ageing', 10) WITH ORDINALITY ORDER BY ordinality;
-- Switched off, nobody ages.
SELECT awa.alter_queue('ageing', priority_ageing => '0');
SELECT awa.enqueue('ageing', 'k', '"old and modest"', priority => 4, run_at => now() - interval '1 year') > 0 AS enqueued;
SELECT awa.enqueue('ageing', 'k', '"young and urgent"', priority => 1) > 0 AS enqueued;
SELECT args FROM awa.claim('ageing', 10) WITH ORDINALITY ORDER BY ordinality;

-- Several queues in one call: in the order given, until the batch is full. The row says where it came from.
SELECT count(awa.enqueue('claim', 'k', to_jsonb(n))), count(awa.enqueue('other', 'k', to_jsonb(10 + n))) FROM generate_series(1, 3) AS n;
SELECT queue, args FROM awa.claim(ARRAY['other', 'claim'], 4) WITH ORDINALITY ORDER BY ordinality;
SELECT queue, args FROM awa.claim(ARRAY['other', 'claim'], 10) WITH ORDINALITY ORDER BY ordinality;
SELECT awa.enqueue('claim', 'k', '"once"') > 0 AS enqueued;
SELECT queue, args FROM awa.claim(ARRAY['claim', 'claim', 'other'], 10);
-- A paused queue among them is passed over.
SELECT awa.enqueue('claim', 'k', '"paused"') > 0 AND awa.enqueue('other', 'k', '"open"') > 0 AS enqueued;
SELECT awa.pause_queue('claim');
SELECT queue, args FROM awa.claim(ARRAY['claim', 'other'], 10);
SELECT awa.resume_queue('claim');
SELECT queue, args FROM awa.claim(ARRAY['claim', 'other'], 10);

-- Deadline and heartbeat: those of the queue, or those of the call; zero means none.
SELECT awa.alter_queue('claim', deadline => '10 minutes', heartbeat_timeout => '20 seconds');
SELECT count(awa.enqueue('claim', 'k', to_jsonb(n))) FROM generate_series(1, 3) AS n;
SELECT deadline_at BETWEEN clock_timestamp() + interval '9 minutes' AND clock_timestamp() + interval '10 minutes' AS of_the_queue FROM awa.claim('claim');
SELECT deadline_at BETWEEN clock_timestamp() + interval '59 minutes' AND clock_timestamp() + interval '1 hour' AS of_the_call FROM awa.claim('claim', deadline => '1 hour');
SELECT deadline_at IS NULL AS none FROM awa.claim('claim', deadline => '0', heartbeat_timeout => '0');
SELECT args, deadline_at > now() AS has_deadline FROM awa.jobs WHERE queue = 'claim' AND deadline_at IS NOT NULL ORDER BY args;

-- A claim can be read in part, and as part of a larger query; what it took, it took.
SELECT count(awa.enqueue('other', 'k', to_jsonb(n))) FROM generate_series(1, 5) AS n;
SELECT args FROM awa.claim('other', 5) WITH ORDINALITY ORDER BY ordinality LIMIT 2;
SELECT running FROM awa.queue_counts('other');
SELECT count(*) AS left_over FROM awa.claim('other', 5);
SELECT count(awa.enqueue('other', 'k', to_jsonb(n))) FROM generate_series(1, 4) AS n;
SELECT q.queue, c.args FROM (VALUES ('other'), ('claim')) AS q (queue), LATERAL awa.claim(q.queue, 2) AS c ORDER BY c.args;
SELECT count(*) FROM (SELECT awa.claim('other', 10)) AS in_the_select_list;
-- Through a cursor.
SELECT count(awa.enqueue('other', 'k', to_jsonb(n))) FROM generate_series(1, 4) AS n;
BEGIN;
DECLARE c CURSOR FOR SELECT args FROM awa.claim('other', 4);
FETCH 1 FROM c;
CLOSE c;
COMMIT;
SELECT count(*) AS left_over FROM awa.claim('other', 5);

-- A batch much larger than what there is, and larger than a row of evidence holds.
SELECT cardinality(awa.enqueue_many('other', 'k', array_agg(to_jsonb(n)))) FROM generate_series(1, 2000) AS n;
SELECT count(*) AS claimed, count(DISTINCT run_lease) AS leases FROM awa.claim('other', 100000);

SELECT awa.drop_queue(queue, force => true) FROM awa.queues WHERE queue IN ('claim', 'other', 'ageing');
SELECT * FROM awa.verify();
