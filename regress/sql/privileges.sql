-- What breaks if this fails: a role does what it was not granted, or makes the library do it with the rights of its owner.
SELECT awa.create_queue('priv');
SET client_min_messages = warning;
CREATE ROLE awa_nobody;
CREATE ROLE awa_producer;
CREATE ROLE awa_worker;
CREATE SCHEMA evil;
GRANT USAGE, CREATE ON SCHEMA evil TO awa_producer, awa_worker;
RESET client_min_messages;
\set VERBOSITY sqlstate
-- Without a grant: nothing, not even looking.
SET ROLE awa_nobody;
SELECT awa.enqueue('priv', 'k');
SELECT awa.version();
SELECT * FROM awa.jobs;
SELECT * FROM awa.verify();
SELECT count(*) FROM awa.ring_rotations;
SELECT count(*) FROM awa_segments.ready_entries_0;
RESET ROLE;
-- Usage of the schema alone: still nothing.
GRANT USAGE ON SCHEMA awa TO awa_nobody, awa_producer, awa_worker;
SET ROLE awa_nobody;
SELECT awa.enqueue('priv', 'k');
SELECT * FROM awa.claim('priv');
SELECT * FROM awa.jobs;
SELECT * FROM awa.terminal_jobs;
SELECT * FROM awa.queues;
SELECT * FROM awa.stat_queue;
SELECT awa.cancel(1);
SELECT * FROM awa.rotate();
SELECT awa.rebuild();
SELECT count(*) FROM awa.ring_rotations;
SELECT count(*) FROM awa.queue_definitions;
SELECT nextval('awa.job_ids');
CALL awa.wait('priv', '0');
RESET ROLE;
\set VERBOSITY default

-- EXECUTE on enqueue is all that a producer needs, and gives nothing else. The kind is new: its dictionary is not the producer's.
GRANT EXECUTE ON FUNCTION awa.enqueue(text, text, jsonb, integer, timestamptz, integer, text[], jsonb) TO awa_producer;
SET ROLE awa_producer;
SELECT awa.enqueue('priv', 'kind of the producer', '1') > 0 AS enqueued;
SELECT current_user, current_setting('search_path');
\set VERBOSITY sqlstate
SELECT * FROM awa.claim('priv');
SELECT * FROM awa.jobs;
SELECT awa.create_queue('mine');
SELECT awa.enqueue_many('priv', 'k', '{}');
INSERT INTO awa.jobs (queue, kind, args) VALUES ('priv', 'k', '1');
SELECT count(*) FROM awa_segments.ready_entries_0;
SELECT count(*) FROM awa.job_kinds;
\set VERBOSITY default
RESET ROLE;
-- INSERT on the view for those who COPY: the row's rights are the view's and the trigger's.
GRANT INSERT ON awa.jobs TO awa_producer;
SET ROLE awa_producer;
INSERT INTO awa.jobs (queue, kind, args) VALUES ('priv', 'inserted', '2');
\set VERBOSITY sqlstate
SELECT * FROM awa.jobs;
\set VERBOSITY default
RESET ROLE;

-- A worker needs claim and the exits. The error history is built by the owner, who is not impersonated in anything else.
GRANT EXECUTE ON FUNCTION awa.claim(text, integer, interval, interval), awa.complete(bigint, bigint),
      awa.fail(bigint, bigint, text, interval, boolean), awa.heartbeat(bigint, bigint), awa.snooze(bigint, bigint, interval) TO awa_worker;
GRANT EXECUTE ON PROCEDURE awa.wait(text, interval) TO awa_worker;
SET ROLE awa_worker;
SELECT kind, args FROM awa.claim('priv', 10) WITH ORDINALITY ORDER BY ordinality;
CALL awa.wait('priv', '1 millisecond');
RESET ROLE;
SELECT awa.enqueue('priv', 'k', '3') > 0 AS enqueued;
SET ROLE awa_worker;
SELECT job_id, run_lease FROM awa.claim('priv') \gset
SELECT awa.fail(:job_id, :run_lease, 'by the worker', retry_after => '0');
SELECT run_lease FROM awa.claim('priv') \gset
SELECT awa.heartbeat(:job_id, :run_lease);
SELECT awa.complete(:job_id, :run_lease);
\set VERBOSITY sqlstate
SELECT awa.cancel(:job_id);
SELECT awa.enqueue('priv', 'k');
\set VERBOSITY default
RESET ROLE;

-- A search path full of traps: tables, functions and operators of the caller are never taken for those of the server.
SET ROLE awa_producer;
SET search_path = evil, public, pg_catalog;
CREATE TABLE evil.job_kinds (kind_id int, name text);
CREATE FUNCTION evil.nextval(text) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: nextval as %', current_user; END $$;
CREATE FUNCTION evil.nextval(regclass) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: nextval as %', current_user; END $$;
CREATE FUNCTION evil.jsonb_build_object(text, integer, text, timestamptz, text, text) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: jsonb_build_object as %', current_user; END $$;
CREATE FUNCTION evil.text_trap(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: = as %', current_user; END $$;
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.text_trap);
CREATE FUNCTION evil.jsonb_trap(jsonb, jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: || as %', current_user; END $$;
CREATE OPERATOR evil.|| (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = evil.jsonb_trap);
SELECT awa.enqueue('priv', 'another new kind', '4') > 0 AS enqueued;
RESET ROLE;
GRANT SELECT ON ALL TABLES IN SCHEMA evil TO awa_worker;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA evil TO awa_worker;
SET ROLE awa_worker;
SELECT kind, job_id, run_lease FROM awa.claim('priv') \gset
SELECT :'kind' AS kind;
SELECT awa.fail(:job_id, :run_lease, 'trapped?', retry_after => '0');
SELECT run_lease FROM awa.claim('priv') \gset
SELECT awa.fail(:job_id, :run_lease, 'trapped?', final => true);
SHOW search_path;
RESET search_path;
RESET ROLE;
SELECT count(*) AS caught FROM evil.job_kinds;
SELECT kind, state, jsonb_array_length(errors) AS errors FROM awa.job(:job_id);
-- Temporary objects come first in every search path that does not say otherwise.
SET ROLE awa_producer;
CREATE TEMP TABLE job_kinds (kind_id int, name text);
CREATE FUNCTION pg_temp.nextval(regclass) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap: nextval as %', current_user; END $$;
SELECT awa.enqueue('priv', 'yet another kind', '5') > 0 AS enqueued;
RESET ROLE;
SELECT count(*) AS caught FROM pg_temp.job_kinds;

-- The user of the session is what it was after an error inside.
SET ROLE awa_producer;
\set VERBOSITY sqlstate
SELECT awa.enqueue('priv', repeat('k', 1000));
\set VERBOSITY default
SELECT current_user;
RESET ROLE;
-- A role may call through a definer's function, as one does to give out one queue.
CREATE FUNCTION evil.only_priv(args jsonb) RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog AS $$ SELECT awa.enqueue('priv', 'definer', args) $$;
GRANT USAGE ON SCHEMA evil TO awa_nobody;
SET ROLE awa_nobody;
SELECT evil.only_priv('6') > 0 AS enqueued;
RESET ROLE;
SELECT kind, args FROM awa.claim('priv', 10) WITH ORDINALITY ORDER BY ordinality;
-- Who may change prune_grace: the superuser only.
SET ROLE awa_worker;
\set VERBOSITY sqlstate
SET awa.prune_grace = 0;
\set VERBOSITY default
SET awa.asynchronous_claim = off;
RESET awa.asynchronous_claim;
RESET ROLE;

SET client_min_messages = warning;
DROP TABLE pg_temp.job_kinds;
DROP SCHEMA evil CASCADE;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA awa FROM awa_producer, awa_worker;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA awa FROM awa_worker;
REVOKE ALL ON awa.jobs FROM awa_producer;
REVOKE ALL ON SCHEMA awa FROM awa_nobody, awa_producer, awa_worker;
DROP OWNED BY awa_nobody, awa_producer, awa_worker;
DROP ROLE awa_nobody, awa_producer, awa_worker;
SELECT awa.drop_queue('priv', force => true);
SELECT * FROM awa.verify();
