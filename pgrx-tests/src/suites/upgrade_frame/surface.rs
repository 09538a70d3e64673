//! All that an installed extension is made of, as lines: what two installations must have in common to be the same.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result};
use postgres::Client;

use crate::process::run;

/// The members of the extension.
const MEMBERS: &str = "WITH member AS (
    SELECT classid, objid FROM pg_depend
     WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
       AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'awa_queue')
) ";

/// Privileges as lines, in an order of their own: two lists that grant the same are the same.
const GRANTED: &str = "(SELECT string_agg(format('%s:%s%s', grantee::regrole, privilege_type, CASE WHEN is_grantable THEN '*' END), ' '
                                ORDER BY grantee, privilege_type) FROM aclexplode(ACL))";

const QUERIES: &[(&str, &str)] = &[
    ("member", "SELECT format('%s; %s', pg_describe_object(classid, objid, 0), obj_description(objid, classid::regclass::name)) FROM member"),
    (
        "initial privileges",
        "SELECT format('%s %s: GRANTED(initprivs)', pg_describe_object(p.classoid, p.objoid, p.objsubid), privtype)
           FROM pg_init_privs AS p JOIN member ON classoid = classid AND objoid = objid",
    ),
    (
        "function",
        "SELECT format('%s; owner %s; GRANTED(proacl)', pg_get_functiondef(oid), proowner::regrole)
           FROM pg_proc JOIN member ON classid = 'pg_proc'::regclass AND objid = oid",
    ),
    (
        "relation",
        "SELECT format('%s kind %s persistence %s options %s rls %s owner %s view %s; GRANTED(relacl)', oid::regclass, relkind,
                       relpersistence, reloptions, relrowsecurity, relowner::regrole,
                       CASE WHEN relkind = 'v' THEN pg_get_viewdef(oid) END)
           FROM pg_class JOIN member ON classid = 'pg_class'::regclass AND objid = oid",
    ),
    (
        "columns",
        "SELECT format('%s: %s', r.oid::regclass, string_agg(format('%s %s notnull %s default %s storage %s generated %s identity %s comment %s GRANTED(attacl)',
                       attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid), attstorage, attgenerated,
                       attidentity, col_description(attrelid, attnum)), ', ' ORDER BY attnum))
           FROM (SELECT objid AS oid FROM member WHERE classid = 'pg_class'::regclass
                  UNION ALL SELECT typrelid FROM pg_type JOIN member ON classid = 'pg_type'::regclass AND objid = oid WHERE typtype = 'c') AS r
           JOIN pg_attribute ON attrelid = r.oid AND attnum > 0 AND NOT attisdropped
           LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
          GROUP BY r.oid",
    ),
    (
        "constraint",
        "SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(c.oid))
           FROM pg_constraint AS c JOIN member ON classid = 'pg_class'::regclass AND objid = conrelid",
    ),
    (
        "index",
        "SELECT format('%s %s', pg_get_indexdef(indexrelid), indisvalid)
           FROM pg_index JOIN member ON classid = 'pg_class'::regclass AND objid = indrelid",
    ),
    (
        "trigger",
        "SELECT format('%s; %s', pg_get_triggerdef(t.oid), obj_description(t.oid, 'pg_trigger'))
           FROM pg_trigger AS t JOIN member ON classid = 'pg_class'::regclass AND objid = tgrelid WHERE NOT tgisinternal",
    ),
    (
        "sequence",
        "SELECT format('%s %s', seqrelid::regclass, to_jsonb(s) - 'seqrelid')
           FROM pg_sequence AS s JOIN member ON classid = 'pg_class'::regclass AND objid = seqrelid",
    ),
    (
        "schema",
        "SELECT format('%s owner %s; GRANTED(nspacl)', nspname, nspowner::regrole)
           FROM pg_namespace JOIN member ON classid = 'pg_namespace'::regclass AND objid = oid",
    ),
    (
        "dumped",
        "SELECT format('%s where %L', relation::regclass, condition)
           FROM pg_extension AS e, unnest(extconfig, extcondition) AS dumped (relation, condition) WHERE extname = 'awa_queue'",
    ),
    ("extension", "SELECT format('in %s, relocatable %s, version %s', extnamespace::regnamespace, extrelocatable, extversion) FROM pg_extension WHERE extname = 'awa_queue'"),
];

pub type Surface = BTreeSet<String>;

pub fn surface(client: &mut Client) -> Result<Surface> {
    let mut lines = Surface::new();
    for (what, query) in QUERIES {
        for row in client.query(&format!("{MEMBERS}{}", with_grants(query)), &[]).with_context(|| format!("{what}: {query}"))? {
            lines.insert(format!("{what}: {}", row.try_get::<_, String>(0)?));
        }
    }
    Ok(lines)
}

/// `GRANTED(column)` at the end of a format stands for the list of grants in that column.
fn with_grants(query: &str) -> String {
    let Some((before, rest)) = query.split_once("GRANTED(") else { return query.to_owned() };
    let Some((column, after)) = rest.split_once(")'") else { return query.to_owned() };
    let Some((arguments, tail)) = closing(after) else { return query.to_owned() };
    format!("{before}%s'{arguments}, {}{tail}", GRANTED.replace("ACL", column))
}

/// Splits before the parenthesis that closes the call whose arguments these are.
fn closing(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '(' => depth += 1,
            ')' if depth == 0 => return Some(text.split_at(at)),
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// What a dump says of everything but the segments: statements, and of the data which tables and columns.
pub fn dumped(mut pg_dump: Command, database: &str) -> Result<Surface> {
    let out = run(pg_dump.args(["--exclude-schema=awa_segments", database]))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut lines = Surface::new();
    let mut in_data = false;
    for line in text.lines() {
        if in_data {
            in_data = line != "\\.";
            continue;
        }
        in_data = line.starts_with("COPY ");
        // A key of the moment, and values.
        if !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict") {
            lines.insert(format!("dump: {}", if line.contains("setval") { line.split(", ").next().unwrap_or(line) } else { line }));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_become_the_last_argument() {
        let query = with_grants("SELECT format('%s; GRANTED(proacl)', f(a, b)) FROM t");
        assert!(query.starts_with("SELECT format('%s; %s', f(a, b), (SELECT string_agg("), "{query}");
        assert!(query.contains("aclexplode(proacl)") && query.ends_with("))) FROM t") || query.ends_with(")) FROM t"), "{query}");
    }
}
