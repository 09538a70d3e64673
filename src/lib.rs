//! awa_queue: a complete job queue inside PostgreSQL.
pgrx::pg_module_magic!();

mod error;
