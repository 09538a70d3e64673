//! The background workers: a launcher for the server, a maintainer for each database that has the extension.
//!
//! `shared` is what they know of each other, and what sessions ask them; `launcher` starts maintainers; `maintainer` runs the tasks of
//! `ops::tasks` at the pace of `pace`; `health` and `numbers` tell of them. Rules of time are in `awa_protocol::schedule` and `throttle`.

pub mod health;
mod launcher;
mod maintainer;
pub mod numbers;
pub mod pace;
pub mod shared;

use crate::pg::bgworker::{self, Worker};
use crate::pg::{shmem, utility, xact};
use crate::worker_main;

worker_main!(awa_launcher_main, launcher::run);
worker_main!(awa_maintainer_main, maintainer::run);

/// From `_PG_init`, after the settings are defined.
pub fn register() {
    xact::at_end(shared::on_transaction_end);
    xact::at_sub_end(shared::on_subtransaction_end);
    if !shmem::preloading() || bgworker::in_binary_upgrade() {
        return;
    }
    if shmem::register::<shared::Workers>().is_err() {
        return;
    }
    utility::watch(shared::before_command);
    Worker { name: "awa_queue launcher", kind: "awa_queue launcher", function: "awa_launcher_main", arg: 0, restart: Some(5) }
        .register();
}
