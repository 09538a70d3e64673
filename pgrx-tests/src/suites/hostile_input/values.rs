//! Arguments by type, as SQL: what is usual, what is just out of range, and what is nowhere near it.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const TEXTS: &[&str] = &[
    "NULL",
    "''",
    "'q'",
    "'q'",
    "'letters'",
    "'other'",
    "'unknown'",
    "'Q'",
    "' q'",
    "E'q\\n'",
    "'q''; DROP TABLE awa.job_kinds; --'",
    "'%s%n%d'",
    "U&'\\FFFF'",
    "U&'\\+01F980'",
    "repeat('é', 64)",
    "repeat('é', 65)",
    "repeat('q', 128)",
    "repeat('q', 129)",
    "repeat('k', 200)",
    "repeat('k', 201)",
    "repeat('x', 1000000)",
    "'q'::hostile_text",
    "'rotate'",
    "'prune'",
    "'carry_forward'",
    "(SELECT string_agg(chr(n), '') FROM generate_series(1, 100) AS n)",
];

const INTEGERS: &[&str] = &[
    "NULL", "0", "1", "1", "2", "3", "5", "64", "-1", "100000", "100001", "65537", "32768", "2147483647", "(-2147483648)", "258",
];

const BIGINTS: &[&str] = &[
    "NULL",
    "0",
    "1",
    "-1",
    "9223372036854775807",
    "(-9223372036854775808)",
    "4611686018427387904",
    "7::hostile_bigint",
    "(SELECT max(job_id) FROM awa.jobs)",
    "(SELECT min(job_id) FROM awa.jobs WHERE state = 'running')",
    "(SELECT max(job_id) FROM awa.terminal_jobs WHERE state = 'failed')",
    "(SELECT max(job_id) FROM awa.terminal_jobs WHERE state = 'completed')",
    "(SELECT max(job_id) FROM awa.dlq)",
    "(SELECT job_id FROM awa.claim('q') UNION ALL SELECT 3 LIMIT 1)",
];

const BOOLEANS: &[&str] = &["NULL", "true", "false"];

const TIMES: &[&str] = &[
    "NULL",
    "'infinity'",
    "'-infinity'",
    "now()",
    "'4713-01-01 BC'",
    "'294276-12-31'",
    "'1970-01-01'",
    "'2000-01-01'",
    "now() + '1 hour'",
    "now() + '100 years'",
];

const INTERVALS: &[&str] = &[
    "NULL",
    "'0'",
    "'1 microsecond'",
    "'-1 microsecond'",
    "'1 second'",
    "'1 hour'",
    "'178000000 years'",
    "'-178000000 years'",
    "'2147483647 months'",
    "'2147483647 days'",
    "'1 mon -30 days'",
    "'-1 mon +31 days'",
    "'100 years'",
    "make_interval(secs => 9000000000)",
];

const JSONS: &[&str] = &[
    "NULL",
    "'{}'",
    "'{\"a\": 1}'",
    "'null'",
    "'[]'",
    "'\"x\"'",
    "'1e400'",
    "('1' || repeat('0', 10000))::jsonb",
    "(repeat('[', 3000) || repeat(']', 3000))::jsonb",
    "(repeat('{\"a\":', 2000) || '1' || repeat('}', 2000))::jsonb",
    "to_jsonb(repeat('x', 1000000))",
    "(SELECT jsonb_agg(md5(n::text)) FROM generate_series(1, 3000) AS n)",
    "'{\"\": \"\"}'",
    "'{\"ring\": \"own\"}'",
    "'{\"a\": 1}'::hostile_jsonb",
    "'\"\\u00e9\\ud83e\\udd80\"'",
];

/// Arrays of a type, from its own values and in shapes of their own.
fn array(rng: &mut StdRng, element: &str, values: &[&str]) -> String {
    let pick = |rng: &mut StdRng| (*values.choose(rng).unwrap_or(&"NULL")).to_owned();
    match rng.random_range(0..24) {
        0 => "NULL".to_owned(),
        1 => format!("'{{}}'::{element}[]"),
        2 => format!("'{{NULL}}'::{element}[]"),
        3 => format!("'[5:5]={{1}}'::{element}[]"),
        4 => format!("'[-2147483648:-2147483647]={{1,2}}'::{element}[]"),
        5 => format!("'{{{{1,2}},{{3,4}}}}'::{element}[]"),
        6 => format!("'{{{{{{{{{{{{1}}}}}}}}}}}}'::{element}[]"),
        7 => format!("array_fill({}::{element}, ARRAY[1000])", pick(rng)),
        8 if rng.random_bool(0.1) => format!("array_fill('1'::{element}, ARRAY[100001])"),
        9 => format!("array_fill(NULL::{element}, ARRAY[5])"),
        10 if element == "bigint" => "(SELECT array_agg(job_id) FROM awa.jobs WHERE state = 'running')".to_owned(),
        11 if element == "bigint" => "ARRAY[7, 8]::hostile_bigint[]".to_owned(),
        12 if element == "text" => "ARRAY['q', 'other']::hostile_text[]".to_owned(),
        13 if element == "jsonb" => "ARRAY['1', '{}']::hostile_jsonb[]".to_owned(),
        _ => {
            let many = rng.random_range(1..5);
            let items: Vec<String> = (0..many).map(|_| format!("{}::{element}", pick(rng))).collect();
            format!("ARRAY[{}]", items.join(", "))
        }
    }
}

fn values(name: &str) -> &'static [&'static str] {
    match name {
        "text" => TEXTS,
        "integer" => INTEGERS,
        "bigint" => BIGINTS,
        "boolean" => BOOLEANS,
        "timestamp with time zone" => TIMES,
        "interval" => INTERVALS,
        "jsonb" => JSONS,
        _ => &["NULL"],
    }
}

/// A value of this type. Domains are used without a cast, as a caller would.
pub fn literal(rng: &mut StdRng, name: &str) -> String {
    if let Some(element) = name.strip_suffix("[]") {
        return array(rng, element, values(element));
    }
    let value = *values(name).choose(rng).unwrap_or(&"NULL");
    if value.contains("hostile_") { value.to_owned() } else { format!("{value}::{name}") }
}
