-- What breaks if this fails: INSERT and COPY into awa.jobs store other jobs than awa.enqueue() would.
SELECT awa.create_queue('insert', max_attempts => 8, priority_ageing => '0');
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '1'), ('insert', 'k', '2');
INSERT INTO awa.jobs (queue, kind, args, priority, run_at, max_attempts, tags, metadata)
VALUES ('insert', 'full', '{"n": 3}', 4, now() - interval '1 hour', 2, '{x,y}', '{"m": 1}') RETURNING job_id > 0 AS has_id, queue, kind, args, priority;
INSERT INTO awa.jobs (queue, kind, args, run_at) VALUES ('insert', 'later', '4', now() + interval '1 day');
SELECT kind, args, priority, attempt, max_attempts, run_at < now() AS due, tags, metadata FROM awa.claim('insert', 10) WITH ORDINALITY ORDER BY ordinality;
SELECT kind, state FROM awa.jobs WHERE queue = 'insert' AND state <> 'running';

-- The identifier that RETURNING gives is the job's.
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '5') RETURNING job_id AS given \gset
SELECT job_id = :given AS same FROM awa.claim('insert');

-- INSERT .. SELECT, and COPY.
INSERT INTO awa.jobs (queue, kind, args) SELECT 'insert', 'k', to_jsonb(n) FROM generate_series(1, 600) AS n;
SELECT count(*) AS claimed, bool_and(args::int = ordinality) AS in_order FROM awa.claim('insert', 1000) WITH ORDINALITY;
COPY awa.jobs (queue, kind, args, priority, tags) FROM stdin;
insert	copied	{"n": 1}	2	{a}
insert	copied	{"n": 2}	1	\N
insert	copied	"tab\\tin text"	\N	{}
\.
SELECT kind, args, priority, tags FROM awa.claim('insert', 10) WITH ORDINALITY ORDER BY ordinality;

-- A bad row ends the whole statement.
\set VERBOSITY sqlstate
COPY awa.jobs (queue, kind, args, priority) FROM stdin;
insert	copied	{"n": 1}	2
insert	copied	{"n": 2}	5
\.
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '1'), ('unknown queue', 'k', '2');
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', NULL);
INSERT INTO awa.jobs (queue, kind) VALUES ('insert', 'k');
INSERT INTO awa.jobs (kind, args) VALUES ('k', '1');
INSERT INTO awa.jobs (queue, args) VALUES ('insert', '1');
INSERT INTO awa.jobs (queue, kind, args, run_at) VALUES ('insert', 'k', '1', 'infinity');
\set VERBOSITY default
-- What the queue itself decides cannot be set.
INSERT INTO awa.jobs (queue, kind, args, state) VALUES ('insert', 'k', '1', 'completed');
\echo :SQLSTATE
\set VERBOSITY sqlstate
INSERT INTO awa.jobs (queue, kind, args, job_id) VALUES ('insert', 'k', '1', 1);
INSERT INTO awa.jobs (queue, kind, args, attempt) VALUES ('insert', 'k', '1', 1);
INSERT INTO awa.jobs (queue, kind, args, enqueued_at) VALUES ('insert', 'k', '1', now());
INSERT INTO awa.jobs (queue, kind, args, errors) VALUES ('insert', 'k', '1', '[]');
-- The view shows jobs; it is no way to change or remove them.
UPDATE awa.jobs SET priority = 1 WHERE queue = 'insert';
DELETE FROM awa.jobs WHERE queue = 'insert';
INSERT INTO awa.terminal_jobs (queue, kind, args) VALUES ('insert', 'k', '1');
-- The trigger's function is for its trigger.
SELECT awa.jobs_insert();
CREATE TEMP TABLE other (queue text, kind text, args jsonb);
CREATE TRIGGER other BEFORE INSERT ON other FOR EACH ROW EXECUTE FUNCTION awa.jobs_insert();
INSERT INTO other VALUES ('insert', 'k', '1');
\set VERBOSITY default
SELECT available, scheduled FROM awa.queue_counts('insert');
SELECT count(*) AS claimed FROM awa.claim('insert', 10);

-- In the caller's transaction.
BEGIN;
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '"rolled back"');
ROLLBACK;
BEGIN;
SAVEPOINT s;
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '"rolled back"');
ROLLBACK TO s;
INSERT INTO awa.jobs (queue, kind, args) VALUES ('insert', 'k', '"kept"');
COMMIT;
SELECT args FROM awa.claim('insert', 10);

SELECT awa.drop_queue('insert', force => true);
SELECT * FROM awa.verify();
