-- If this fails, the extension does not install, protect itself or leave as its script promises.
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

-- Every fixed table and sequence is dumped with its rows.
SELECT c.oid::regclass AS not_dumped
  FROM pg_class AS c
  JOIN member ON classid = 'pg_class'::regclass AND objid = c.oid
 WHERE c.relkind IN ('r', 'S')
   AND NOT c.oid = ANY ((SELECT extconfig FROM pg_extension WHERE extname = 'awa_queue')::oid[]);

-- Everything that a user can see is explained.
SELECT t.oid::regclass AS unexplained
  FROM pg_class AS t
  JOIN member ON classid = 'pg_class'::regclass AND objid = t.oid
 WHERE t.relkind IN ('r', 'v') AND obj_description(t.oid, 'pg_class') IS NULL
 ORDER BY 1;

-- Jobs cannot be lost by a plain DROP EXTENSION; everything works on afterwards.
SELECT awa.create_queue('install');
SELECT awa.enqueue('install', 'nothing') > 0 AS enqueued;
\set VERBOSITY terse
DROP EXTENSION awa_queue;
\set VERBOSITY default
SELECT available FROM awa.queue_counts('install');
SELECT count(*) FROM awa.claim('install');
SELECT count(*) AS differences FROM awa.verify();

-- CASCADE says that one means it. Nothing stays behind, and a new extension starts empty.
SET client_min_messages = warning;
DROP EXTENSION awa_queue CASCADE;
RESET client_min_messages;
SELECT nspname FROM pg_namespace WHERE nspname LIKE 'awa%';
CREATE EXTENSION awa_queue;
SELECT count(*) FROM awa.queue_counts();
SELECT count(*) FROM awa.jobs;
SELECT awa.create_queue('install');
SELECT count(*) FROM awa.claim('install');
SELECT count(*) AS differences FROM awa.verify();
SELECT awa.drop_queue('install');
