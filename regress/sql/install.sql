-- What breaks if this fails: the extension does not install, protect itself or leave as its script promises.
CREATE EXTENSION awa_queue;
SELECT awa.version() = extversion AS library_and_script_agree FROM pg_extension WHERE extname = 'awa_queue';

-- Every function and procedure, with what a planner and a pooler rely on.
CREATE TEMP VIEW member AS
SELECT classid, objid
  FROM pg_depend
 WHERE refclassid = 'pg_extension'::regclass
   AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'awa_queue')
   AND deptype = 'e';

SELECT p.oid::regprocedure AS function,
       CASE p.prokind WHEN 'p' THEN 'procedure' ELSE 'function' END AS kind,
       CASE p.provolatile WHEN 'v' THEN 'volatile' WHEN 's' THEN 'stable' ELSE 'immutable' END AS volatility,
       p.proisstrict AS strict,
       CASE p.proparallel WHEN 'u' THEN 'unsafe' WHEN 'r' THEN 'restricted' ELSE 'safe' END AS parallel
  FROM pg_proc AS p
  JOIN member ON classid = 'pg_proc'::regclass AND objid = p.oid
 ORDER BY p.oid::regprocedure::text COLLATE "C";

\pset format unaligned
-- Names of arguments and their defaults are an interface: callers use named notation.
SELECT p.proname, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
  FROM pg_proc AS p
  JOIN member ON classid = 'pg_proc'::regclass AND objid = p.oid
 ORDER BY p.oid::regprocedure::text COLLATE "C";

-- So are the columns of what a user reads, in their order.
SELECT c.relname AS relation, string_agg(a.attname || ' ' || format_type(a.atttypid, NULL), ', ' ORDER BY a.attnum) AS columns
  FROM pg_class AS c
  JOIN member ON (classid = 'pg_class'::regclass AND objid = c.oid AND c.relkind = 'v')
              OR (classid = 'pg_type'::regclass AND objid = c.reltype AND c.relkind = 'c')
  JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
 GROUP BY c.relname
 ORDER BY c.relname COLLATE "C";

\pset format aligned
-- Hot functions run as the caller and without SET clauses, which cost on each call; all are C.
SELECT p.oid::regprocedure AS exception
  FROM pg_proc AS p
  JOIN member ON classid = 'pg_proc'::regclass AND objid = p.oid
 WHERE p.prosecdef OR p.proconfig IS NOT NULL OR p.prolang <> (SELECT oid FROM pg_language WHERE lanname = 'c');

-- Nothing is granted to PUBLIC.
SELECT p.oid::regprocedure AS open_to_all
  FROM pg_proc AS p
  JOIN member ON classid = 'pg_proc'::regclass AND objid = p.oid
 WHERE has_function_privilege('public', p.oid, 'EXECUTE');
SELECT c.oid::regclass AS open_to_all
  FROM pg_class AS c
  JOIN member ON classid = 'pg_class'::regclass AND objid = c.oid
 WHERE CASE c.relkind
           WHEN 'S' THEN has_sequence_privilege('public', c.oid, 'USAGE, SELECT, UPDATE')
           WHEN 'r' THEN has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
           WHEN 'v' THEN has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
           ELSE false
       END;
SELECT nspname AS open_to_all
  FROM pg_namespace
 WHERE nspname IN ('awa', 'awa_segments') AND has_schema_privilege('public', oid, 'USAGE, CREATE');

-- Every fixed table and sequence is dumped with its rows, all of them; but not the mark that a restore is under way.
SELECT c.oid::regclass AS not_dumped
  FROM pg_class AS c
  JOIN member ON classid = 'pg_class'::regclass AND objid = c.oid
 WHERE c.relkind IN ('r', 'S') AND c.oid <> 'awa.restoring'::regclass
   AND NOT c.oid = ANY ((SELECT extconfig FROM pg_extension WHERE extname = 'awa_queue')::oid[]);
SELECT DISTINCT condition AS dumped_in_part
  FROM pg_extension, unnest(extcondition) AS condition
 WHERE extname = 'awa_queue' AND condition <> '';

-- Everything that a user can see is explained.
SELECT pg_describe_object(classid, objid, 0) COLLATE "C" AS unexplained
  FROM member
 WHERE classid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_namespace'::regclass)
   AND obj_description(objid, classid::regclass::name) IS NULL
   AND NOT EXISTS (SELECT FROM pg_class WHERE oid = objid AND relkind IN ('S', 'i', 'c'))
 ORDER BY unexplained;

-- Looking at a fresh database writes nothing and needs no queue.
SELECT count(*) AS queues FROM awa.queue_counts();
SELECT (SELECT count(*) FROM awa.jobs) AS jobs,
       (SELECT count(*) FROM awa.terminal_jobs) AS terminal_jobs,
       (SELECT count(*) FROM awa.queues) AS queues,
       (SELECT count(*) FROM awa.stat_queue) AS stat_queue,
       (SELECT count(*) FROM awa.stat_segments) AS stat_segments,
       (SELECT count(*) FROM awa.job(1)) AS job;
SELECT * FROM awa.verify();

-- Jobs cannot be lost by a plain DROP EXTENSION; everything works on afterwards.
SELECT awa.create_queue('install');
SELECT awa.enqueue('install', 'nothing') > 0 AS enqueued;
\set VERBOSITY sqlstate
DROP EXTENSION awa_queue;
\set VERBOSITY default
SELECT available FROM awa.queue_counts('install');
SELECT count(*) FROM awa.claim('install');
SELECT * FROM awa.verify();

-- A segment is not a member of the extension, so that dumps carry it, but hangs on it.
SELECT c.relname,
       EXISTS (SELECT FROM member WHERE classid = 'pg_class'::regclass AND objid = c.oid) AS is_member,
       c.relpersistence AS persistence,
       has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') AS open_to_all
  FROM pg_class AS c
 WHERE c.relnamespace = 'awa_segments'::regnamespace AND c.relkind = 'r'
 ORDER BY c.relname COLLATE "C";

-- CASCADE says that one means it. Nothing stays behind, and a new extension starts empty, in the same session and with the same names.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
RESET client_min_messages;
SELECT nspname FROM pg_namespace WHERE nspname LIKE 'awa%';
SELECT proname FROM pg_proc WHERE proname LIKE 'awa%' OR probin LIKE '%awa_queue%';
SELECT relname FROM pg_class WHERE relname ~ '^(ready_entries|lease_claims|done_entries|lease_claim_closures)_';
CREATE EXTENSION awa_queue;
SELECT count(*) AS queues FROM awa.queue_counts();
SELECT count(*) AS jobs FROM awa.jobs;
SELECT awa.enqueue('install', 'nothing');
SELECT awa.create_queue('install');
SELECT count(*) AS claimed FROM awa.claim('install');
SELECT awa.enqueue('install', 'nothing') > 0 AS enqueued;
SELECT count(*) AS claimed FROM awa.claim('install');
SELECT * FROM awa.verify();

-- A DROP that is rolled back leaves everything as it was, in memory too.
BEGIN;
SET LOCAL client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'awa%';
ROLLBACK;
SELECT running FROM awa.queue_counts('install');
SELECT awa.enqueue('install', 'nothing') > 0 AS enqueued;
SELECT count(*) AS claimed FROM awa.claim('install');
SELECT * FROM awa.verify();

-- A CREATE that is rolled back leaves nothing.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
RESET client_min_messages;
BEGIN;
CREATE EXTENSION awa_queue;
SELECT awa.create_queue('install');
SELECT awa.enqueue('install', 'nothing') > 0 AS enqueued;
ROLLBACK;
SELECT nspname FROM pg_namespace WHERE nspname LIKE 'awa%';
-- The tests after this one use the extension that is made here.
CREATE EXTENSION awa_queue;
SELECT count(*) AS queues FROM awa.queue_counts();
SELECT * FROM awa.verify();
