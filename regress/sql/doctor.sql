-- What breaks if this fails: an operator or a monitoring system is told something else than what is so. The maintainer is switched off here.
SELECT awa.create_queue('doctored');
SELECT check_name, status, replace(detail, awa.version(), '<library>') AS detail, hint
  FROM awa.doctor()
 WHERE check_name IN ('preloaded', 'version', 'recovery', 'truncation', 'instance', 'frontier', 'publication');
SELECT check_name, status FROM awa.doctor() WHERE check_name IN ('in_flight', 'gaps', 'ring', 'oldest_segment', 'worker_slots');

-- Every row has all that a reader needs.
SELECT * FROM awa.doctor() WHERE status NOT IN ('ok', 'warning', 'error') OR detail = '' OR (status = 'error' AND hint IS NULL);

-- A publication for all tables replicates no truncation in place.
SET client_min_messages = error; -- wal_level is not logical here
CREATE PUBLICATION everything FOR ALL TABLES;
RESET client_min_messages;
SELECT status, detail, hint FROM awa.doctor() WHERE check_name = 'publication';
DROP PUBLICATION everything;

-- A copy.
UPDATE awa.instance SET system_identifier = 1;
SELECT status, detail, hint FROM awa.doctor() WHERE check_name = 'instance';
SELECT awa.adopt();
SELECT status FROM awa.doctor() WHERE check_name = 'instance';

-- Another version of the script.
UPDATE pg_extension SET extversion = '9.9' WHERE extname = 'awa_queue';
SELECT status, replace(detail, awa.version(), '<library>') AS detail, hint FROM awa.doctor() WHERE check_name = 'version';
UPDATE pg_extension SET extversion = awa.version() WHERE extname = 'awa_queue';

-- Metrics: from memory, labels are JSON whatever the queue is called.
SELECT awa.create_queue(E'a "strange" \\ name\twith\u00e9');
SELECT count(*) FROM awa.enqueue_many('doctored', 'test', ARRAY['{}', '{}', '{}']::jsonb[]);
SELECT count(*) FROM awa.claim('doctored');
SELECT name, labels, value
  FROM awa.metrics()
 WHERE name IN ('awa_jobs', 'awa_jobs_enqueued_total', 'awa_jobs_claimed_total') AND labels->>'queue' ~ 'doctored|strange'
 ORDER BY name, labels::text COLLATE "C";
SELECT name, count(*) > 0 AS there FROM awa.metrics() GROUP BY name ORDER BY name COLLATE "C";
SELECT name, labels FROM awa.metrics() WHERE value IS NULL OR name !~ '^awa_[a-z_]+$' OR labels IS NULL;

-- A row for each task that run_maintenance() knows.
SELECT m.task FROM awa.stat_maintenance AS m, awa.run_maintenance(m.task) AS r WHERE r.outcome IS NULL;
SELECT count(*) > 0 AS there_are_tasks, bool_and(errors = 0) AS none_failed FROM awa.stat_maintenance;

-- Harmless where there is nothing to announce.
SELECT awa.announce();
SELECT awa.drop_queue('doctored', force => true), awa.drop_queue(E'a "strange" \\ name\twith\u00e9');
