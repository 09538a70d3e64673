//! Input that nobody would write: generated calls of every function, encodings that are none, sessions with little memory, other people's
//! operators. Every call ends with a result or with an error for people; no session dies, nothing inside is inconsistent.
//!
//! `AWA_FUZZ_CALLS` asks for more calls a function, `AWA_SEED` for a certain run (it is printed when a call goes wrong).

mod memory;
mod values;

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, SimpleQueryMessage};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

pub use self::memory::a_session_with_little_memory_raises_and_lives;
use self::values::literal;
use super::{Stage, enqueue};
use super::stress_mixed::number;

/// A function of the extension, as the catalog has it.
struct Function {
    name: String,
    is_procedure: bool,
    types: Vec<String>,
    defaults: usize,
}

impl Function {
    /// What it does to the database is not what the other calls expect: always rolled back.
    fn is_drastic(&self) -> bool {
        ["drop_queue", "pre_restore", "post_restore", "adopt", "add_segments", "rotate", "pause_queue"].contains(&self.name.as_str())
    }

    fn call(&self, rng: &mut StdRng) -> String {
        let given = rng.random_range(self.types.len() - self.defaults..=self.types.len());
        let arguments: Vec<String> = self.types.iter().take(given).map(|name| literal(rng, name)).collect();
        let call = format!("awa.{}({})", self.name, arguments.join(", "));
        if self.is_procedure {
            return format!("CALL {call}");
        }
        match rng.random_range(0..8) {
            0 => format!("SELECT {call}"),
            1 => format!("SELECT {call} FROM generate_series(1, 3)"),
            2 => format!("SELECT CASE WHEN random() < 2 THEN (SELECT count(*) FROM {call}) END"),
            3 => format!("DECLARE c CURSOR FOR SELECT {call}; FETCH 1 FROM c; CLOSE c"),
            4 => format!("DO $do$ BEGIN PERFORM {call}; EXCEPTION WHEN SQLSTATE 'ZZ000' THEN NULL; END $do$"),
            _ => format!("SELECT count(*) FROM {call}"),
        }
    }
}

fn functions(client: &mut Client) -> Result<Vec<Function>> {
    let rows = client.query(
        "SELECT proname::text, prokind = 'p', (SELECT COALESCE(array_agg(format_type(t, NULL) ORDER BY n), '{}')
                  FROM unnest(proargtypes) WITH ORDINALITY AS u(t, n)), pronargdefaults::integer
           FROM pg_proc WHERE pronamespace = 'awa'::regnamespace ORDER BY oid",
        &[],
    )?;
    rows.iter()
        .map(|row| {
            Ok(Function {
                name: row.try_get(0)?,
                is_procedure: row.try_get(1)?,
                types: row.try_get(2)?,
                defaults: usize::try_from(row.try_get::<_, i32>(3)?)?,
            })
        })
        .collect()
}

/// Around a call: what comes before and after it.
const FRAMES: &[(&str, &str)] = &[
    ("", ""),
    ("BEGIN", "ROLLBACK"),
    ("BEGIN; SAVEPOINT s", "ROLLBACK TO s; SELECT awa.enqueue('q', 'k'); COMMIT"),
    ("BEGIN; SELECT awa.enqueue('q', 'k'); SAVEPOINT s", "ROLLBACK TO s; COMMIT"),
    ("BEGIN READ ONLY", "ROLLBACK"),
    ("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1", "COMMIT"),
    ("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT * FROM awa.claim('q')", "COMMIT"),
];
const ROLLED_BACK: &[(&str, &str)] = &[FRAMES[1], ("BEGIN; SAVEPOINT s", "ROLLBACK TO s; COMMIT"), FRAMES[4]];

/// No bug of ours and nothing that people cannot act upon: not an internal error, not a damaged file, and not a permission, since the
/// role of half the sessions has EXECUTE on everything.
fn is_for_people(code: &str) -> bool {
    !code.starts_with("XX") && code != "42501" && code != "58P01"
}

fn run(client: &mut Client, sql: &str) -> Result<()> {
    match client.batch_execute(sql) {
        Ok(()) => Ok(()),
        Err(error) => {
            let said = error.as_db_error().with_context(|| format!("the session died: {error}"))?;
            let code = said.code().code();
            ensure!(is_for_people(code), "{code}: {} {}", said.message(), said.detail().unwrap_or_default());
            Ok(())
        }
    }
}

const SETUP: &str = "
SELECT awa.create_queue('letters', dead_letters => true), awa.create_queue('other');
SELECT awa.enqueue(q, 'k', '{\"a\": 1}', 1 + n % 4, CASE WHEN n % 5 = 0 THEN now() + n * interval '1 day' END)
  FROM unnest('{q,letters,other}'::text[]) AS q, generate_series(1, 60) AS n;
SELECT * FROM awa.claim('{q,letters,other}'::text[], 60);
SELECT awa.fail(job_id, run_lease, 'x', final => true) FROM awa.claim('{letters,q}'::text[], 20);
SELECT awa.complete(job_id, run_lease) FROM awa.claim('other', 10);
SELECT awa.cancel(max(job_id)) FROM awa.jobs WHERE state = 'available';
CREATE DOMAIN hostile_bigint AS bigint CHECK (VALUE > -10); CREATE DOMAIN hostile_text AS text; CREATE DOMAIN hostile_jsonb AS jsonb;
DROP ROLE IF EXISTS awa_everything; CREATE ROLE awa_everything;
GRANT USAGE ON SCHEMA awa TO awa_everything; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA awa TO awa_everything;
GRANT EXECUTE ON ALL PROCEDURES IN SCHEMA awa TO awa_everything; GRANT SELECT ON awa.jobs, awa.terminal_jobs, awa.dlq TO awa_everything;
GRANT CREATE ON SCHEMA public TO awa_everything";

// If this fails, somebody who may call a function can crash the server, or read an error that says nothing.
pub fn generated_calls_of_every_function_end_for_people(stage: &mut Stage<'_>) -> Result<()> {
    let calls = number("AWA_FUZZ_CALLS", 40);
    let seed = number("AWA_SEED", rand::random::<u32>().into());
    let log_start = stage.cluster.log_size();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut owner = stage.connect()?;
    for statement in SETUP.split(";\n") {
        owner.batch_execute(statement).context("setup")?;
    }
    let mut wrong = Vec::new();
    for function in functions(&mut owner)? {
        if wrong.len() > 20 {
            break;
        }
        let mut client = stage.connect()?;
        let timeout = if function.is_procedure { "50ms" } else { "20s" };
        client.batch_execute(&format!("SET statement_timeout = '{timeout}'; SET awa.prune_grace = 0"))?;
        for _ in 0..calls {
            let frames = if function.is_drastic() { ROLLED_BACK } else { FRAMES };
            let (before, after) = if function.is_procedure { FRAMES[0] } else { *frames.choose(&mut rng).unwrap_or(&FRAMES[0]) };
            let call = function.call(&mut rng);
            let as_role = rng.random_bool(0.5);
            if as_role {
                client.batch_execute("SET ROLE awa_everything")?;
            }
            client.batch_execute(before).context(before)?;
            let met = run(&mut client, &call);
            let ended = client.batch_execute(after);
            if let Err(error) = met.and_then(|()| if before.is_empty() { Ok(()) } else { run_end(ended, &mut client) }) {
                let shown: String = call.chars().take(400).collect();
                wrong.push(format!("seed {seed}, {before} .. {after}: {shown}\n    {error:#}"));
                client = stage.connect()?;
                continue;
            }
            client.batch_execute("RESET ROLE")?;
        }
        // One at a time, so that the function at fault is known.
        stage.verify_clean_by(&mut owner).with_context(|| format!("seed {seed}, after calls of {}", function.name))?;
    }
    owner.batch_execute("DROP OWNED BY awa_everything; DROP ROLE awa_everything")?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    no_complaints(stage, log_start)
}

/// A COMMIT may fail (serialization); then the transaction is over all the same.
fn run_end(ended: Result<(), postgres::Error>, client: &mut Client) -> Result<()> {
    match ended {
        Ok(()) => Ok(()),
        Err(error) => {
            let code = error.as_db_error().map(|said| said.code().code().to_owned()).with_context(|| format!("the session died: {error}"))?;
            client.batch_execute("ROLLBACK")?;
            ensure!(is_for_people(&code), "at the end: {error}");
            Ok(())
        }
    }
}

fn no_complaints(stage: &Stage<'_>, log_start: u64) -> Result<()> {
    let log = stage.cluster.log_since(log_start)?;
    let bad = ["PANIC:", "TRAP:", "was terminated by signal", "leak", "still referenced"];
    let lines: Vec<&str> = log.lines().filter(|line| bad.iter().any(|word| line.contains(word))).take(10).collect();
    ensure!(lines.is_empty(), "the server complains:\n{}", lines.join("\n"));
    Ok(())
}

fn texts(client: &mut Client, sql: &str) -> Result<Vec<String>> {
    let messages = client.simple_query(sql).with_context(|| sql.to_owned())?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|n| row.get(n).unwrap_or("NULL")).collect::<Vec<_>>().join(" ")),
            _ => None,
        })
        .collect())
}

// If this fails, what is not UTF-8 comes back as something else, or crashes the session.
pub fn bytes_that_are_no_utf8_come_back_as_they_were(stage: &mut Stage<'_>) -> Result<()> {
    for (encoding, byte) in [("SQL_ASCII", "ff"), ("SQL_ASCII", "c3"), ("LATIN1", "e9")] {
        let mut root = stage.cluster.connect("postgres")?;
        root.batch_execute("DROP DATABASE IF EXISTS awa_encoded WITH (FORCE)")?;
        root.batch_execute(&format!(
            "CREATE DATABASE awa_encoded ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        ))?;
        let mut client = stage.cluster.connect("awa_encoded")?;
        // The strange bytes are made, and looked at, inside the server: the driver speaks UTF-8 only.
        let odd = format!("convert_from('\\x61{byte}62', '{encoding}')");
        for statement in [
            "CREATE EXTENSION awa_queue".to_owned(),
            format!("SELECT awa.create_queue({odd})"),
            format!(
                "SELECT awa.enqueue({odd}, {odd}, to_jsonb({odd}), tags => ARRAY[{odd}]), awa.enqueue({odd}, {odd}, run_at => now() + '1 day')"
            ),
            format!("CREATE TABLE got AS SELECT * FROM awa.claim({odd})"),
            format!("SELECT awa.fail(job_id, run_lease, {odd}, '0') FROM got; TRUNCATE got"),
            format!("INSERT INTO got SELECT * FROM awa.claim({odd})"),
        ] {
            client.batch_execute(&statement).with_context(|| statement.clone())?;
        }
        let same = texts(
            &mut client,
            &format!(
                "SELECT queue = {odd}, kind = {odd}, args = to_jsonb({odd}), tags = ARRAY[{odd}], errors -> 0 ->> 'error' = {odd} FROM got"
            ),
        )?;
        ensure!(same == ["t t t t t"], "{encoding} {byte}: what was claimed is not what was enqueued: {same:?}");
        let same = texts(
            &mut client,
            &format!(
                "SELECT (SELECT count(*) FROM awa.jobs WHERE queue = {odd} AND kind = {odd}), (SELECT count(*) FROM awa.queue_counts({odd})),
                        (SELECT count(*) FROM awa.stat_queue WHERE queue = {odd}), (SELECT count(*) FROM awa.queues WHERE queue = {odd}),
                        (SELECT count(*) FROM awa.doctor()), (SELECT count(*) FROM awa.verify())"
            ),
        )?;
        ensure!(same.iter().all(|row| row.starts_with("2 1 1 1 ") && row.ends_with(" 0")), "{encoding} {byte}: {same:?}");
        // Labels are jsonb, which may be unable to hold them: an error then, no crash.
        for call in ["SELECT count(*) FROM awa.metrics()".to_owned(), format!("SELECT awa.claim(ARRAY[{odd}, 'none'])"), format!("SELECT awa.drop_queue({odd})")] {
            run(&mut client, &call).with_context(|| format!("{encoding} {byte}: {call}"))?;
        }
        drop(client);
        stage.cluster.drop_database("awa_encoded")?;
    }
    Ok(())
}

// If this fails, a worker that reports long errors makes a job that nobody can end any more: its history outgrows a jsonb.
pub fn an_error_of_any_length_ends_the_attempt(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    enqueue(&mut client, 2)?;
    client.batch_execute(
        "CREATE TEMP TABLE j AS SELECT * FROM awa.claim('q', 2);
         SELECT awa.fail(job_id, run_lease, 'a' || repeat('é', 1000000), '0') FROM (SELECT * FROM j ORDER BY job_id LIMIT 1) AS first;
         SELECT awa.cancel(max(job_id), repeat('é', 1000000)) FROM j",
    )?;
    let errors = texts(
        &mut client,
        "SELECT octet_length(e), e = left(e, 1) || repeat('é', length(e) - 1) FROM (SELECT errors FROM awa.jobs UNION ALL SELECT errors FROM awa.terminal_jobs) AS j,
                LATERAL (SELECT errors -> -1 ->> 'error' AS e) AS l ORDER BY 1",
    )?;
    ensure!(errors == ["16383 t", "16384 t"], "errors of other lengths are kept: {errors:?}");
    Ok(())
}

/// Each operator of a type that statements of the library may use, as a trap of the caller's.
const TRAPS: &str = "
CREATE SCHEMA trap; CREATE TABLE trap.caught (who name, what text);
GRANT USAGE ON SCHEMA trap TO PUBLIC; GRANT INSERT ON trap.caught TO PUBLIC;
CREATE DOMAIN trap.text AS pg_catalog.text; CREATE DOMAIN trap.jsonb AS pg_catalog.jsonb; CREATE DOMAIN trap.interval AS pg_catalog.interval;
DO $$
DECLARE o record; n integer := 0;
BEGIN
    FOR o IN SELECT oprname, (SELECT quote_ident(typname) FROM pg_type WHERE oid = oprleft) AS l,
                    (SELECT quote_ident(typname) FROM pg_type WHERE oid = oprright) AS r, (SELECT quote_ident(typname) FROM pg_type WHERE oid = oprresult) AS res
               FROM pg_operator
              WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprkind = 'b'
                AND oprleft IN ('text'::regtype, 'bigint'::regtype, 'integer'::regtype, 'smallint'::regtype, 'jsonb'::regtype, 'timestamptz'::regtype,
                                'interval'::regtype, 'oid'::regtype, '\"char\"'::regtype, 'name'::regtype, 'boolean'::regtype)
                AND oprresult <> 0 AND oprright <> 0
    LOOP
        n := n + 1;
        BEGIN
            EXECUTE format('CREATE FUNCTION trap.f%s(pg_catalog.%s, pg_catalog.%s) RETURNS pg_catalog.%s LANGUAGE plpgsql AS %L', n, o.l, o.r, o.res,
                format('BEGIN INSERT INTO trap.caught VALUES (current_user, %L); RAISE EXCEPTION ''trap'' USING ERRCODE = ''ZZ001''; END', o.oprname));
            EXECUTE format('CREATE OPERATOR trap.%s (LEFTARG = pg_catalog.%s, RIGHTARG = pg_catalog.%s, FUNCTION = trap.f%s)', o.oprname, o.l, o.r, n);
        EXCEPTION WHEN syntax_error OR undefined_object OR datatype_mismatch OR invalid_function_definition THEN NULL;
        END;
    END LOOP;
    FOR o IN SELECT DISTINCT proname, pg_get_function_identity_arguments(oid) AS a, format_type(prorettype, NULL) AS res
               FROM pg_proc
              WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND NOT proretset
                AND proname IN ('now', 'nextval', 'currval', 'to_jsonb', 'jsonb_build_object', 'jsonb_build_array', 'count', 'format', 'md5', 'clock_timestamp',
                                'lower', 'length', 'array_length', 'make_interval', 'age', 'pg_backend_pid', 'current_database', 'to_regclass', 'justify_hours')
    LOOP
        n := n + 1;
        BEGIN
            EXECUTE format('CREATE FUNCTION trap.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', o.proname, o.a, o.res,
                format('BEGIN RAISE EXCEPTION ''trap %%'', %L USING ERRCODE = ''ZZ001''; END', o.proname));
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
END $$;
CREATE TABLE trap.queue_definitions (queue_id integer); CREATE TABLE trap.job_kinds (kind_id integer, name pg_catalog.text);
CREATE TABLE trap.ring_rotations (generation bigint); CREATE TABLE trap.instance (only_row boolean); CREATE TABLE trap.pg_class (oid oid)";

// If this fails, whoever may create a schema makes the library run his code with the rights of its owner.
pub fn objects_of_the_caller_are_never_taken_for_those_of_the_server(stage: &mut Stage<'_>) -> Result<()> {
    let mut client = stage.connect()?;
    client.batch_execute("SELECT awa.create_queue('letters', dead_letters => true)")?;
    client.batch_execute(TRAPS).context("set the traps")?;
    let traps: i64 = client.query_one("SELECT count(*) FROM pg_operator WHERE oprnamespace = 'trap'::regnamespace", &[])?.try_get(0)?;
    ensure!(traps > 100, "only {traps} operators are trapped");
    // The trap works: else this proves nothing.
    client.batch_execute("SET search_path = trap, pg_catalog, pg_temp; SET awa.prune_grace = 0")?;
    ensure!(client.batch_execute("SELECT 'a'::pg_catalog.text = 'a'::pg_catalog.text").is_err(), "the trap does not work");
    for call in EVERY_WAY {
        if let Err(error) = client.batch_execute(call) {
            let said = error.as_db_error().map(|said| format!("{} {}", said.code().code(), said.message())).unwrap_or_else(|| error.to_string());
            bail!("{call}: {said}");
        }
    }
    client.batch_execute("RESET search_path")?;
    let caught: i64 = client.query_one("SELECT count(*) FROM trap.caught", &[])?.try_get(0)?;
    ensure!(caught == 0, "{caught} calls went into a trap");
    client.batch_execute("DROP SCHEMA trap CASCADE")?;
    Ok(())
}

/// Written without any operator, so that only what the library does by itself can go into a trap.
const EVERY_WAY: &[&str] = &[
    "SELECT awa.enqueue('q', 'kind 1', '{}'), awa.enqueue('q', 'kind 2', '{}'), awa.enqueue('letters', 'kind 3')",
    "INSERT INTO awa.jobs (queue, kind, args) VALUES ('q', 'kind 4', '{}')",
    "SELECT awa.enqueue_many('q', 'kind 5', '{1,2,3}'::pg_catalog.jsonb[])",
    "SELECT awa.complete(job_id, run_lease) FROM awa.claim('q')",
    "SELECT awa.fail(job_id, run_lease, 'error', '0') FROM awa.claim('q')",
    "SELECT awa.fail(job_id, run_lease, 'error', final => true) FROM awa.claim('letters')",
    "SELECT awa.snooze(job_id, run_lease, '0') FROM awa.claim('q')",
    "SELECT awa.fail(job_id, run_lease, 'error', final => true) FROM awa.claim('q')",
    "SELECT awa.retry(job_id) FROM awa.terminal_jobs",
    "SELECT awa.cancel(job_id, 'reason') FROM awa.jobs",
    "SELECT awa.delete_job(job_id) FROM awa.terminal_jobs",
    "SELECT awa.dlq_retry_many('letters', 'kind 3')",
    "SELECT awa.fail(job_id, run_lease, 'error', final => true) FROM awa.claim('letters')",
    "SELECT awa.dlq_retry(job_id) FROM awa.dlq",
    "SELECT awa.fail(job_id, run_lease, 'error', final => true) FROM awa.claim('letters')",
    "SELECT awa.dlq_purge('letters', 'kind 3')",
    "SELECT awa.enqueue('q', 'late', run_at => '2999-01-01'), awa.enqueue('q', 'kept')",
    "SELECT awa.fail(job_id, run_lease, 'error', final => true) FROM awa.claim('q', 100)",
    "SELECT awa.rotate()",
    "SELECT awa.carry_forward()",
    "SELECT awa.prune()",
    "SELECT awa.prune()",
    "SELECT awa.retention()",
    "SELECT awa.promote_deferred()",
    "SELECT awa.rescue_expired_deadlines(), awa.rescue_stale_heartbeats()",
    "SELECT awa.add_segments(2)",
    "SELECT awa.rebuild()",
    "SELECT awa.create_queue('new'), awa.create_queue('newer')",
    "SELECT awa.alter_queue('new', max_attempts => 2)",
    "SELECT awa.pause_queue('new'), awa.resume_queue('new')",
    "SELECT awa.drop_queue('new')",
    "SELECT awa.verify(), awa.doctor(), awa.metrics(), awa.queue_counts(), awa.queue_stats(), awa.segment_stats(), awa.maintenance_stats()",
    "SELECT * FROM awa.stat_queue",
    "SELECT * FROM awa.stat_segments",
    "SELECT * FROM awa.horizon",
    "SELECT * FROM awa.queues",
    "SELECT awa.adopt()",
    "SELECT awa.pre_restore()",
    "SELECT awa.post_restore()",
    "CALL awa.wait('q', '0')",
];
