//! awa_queue: a complete job queue inside PostgreSQL.
//!
//! Calls go one way: `api`, `worker` -> `ops` -> `store`, `frontier`, `protocol` -> `pg`. Only `pg` has `unsafe`; it knows nothing of queues.
#![deny(unsafe_code)]

pgrx::pg_module_magic!();

mod api;
mod error;
mod frontier;
mod ops;
mod pg;
mod settings;
mod store;
mod worker;

#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::register();
    frontier::notes::register_callbacks();
    frontier::register();
    pg::points::register();
    worker::register();
}
