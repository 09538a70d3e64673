//! The doctor: what an operator should know, a line each, worst cases with what to do. Works without the library being preloaded, on a
//! standby, and with another version of the script. Reads the ledger and catalogs; no table of the hot path, writes nothing.

use awa_protocol::limits::GAPS_PER_QUEUE;
use awa_protocol::ring::SegmentState;

use crate::frontier::{Frontier, ledger_oid, require_preloading};
use crate::ops::{handle, inspect};
use crate::pg::rel::{Lock, lock_conflicts};
use crate::pg::truncate::truncation_is_safe_here;
use crate::pg::{sql, xact};
use crate::settings;
use crate::store::{extension, instance};

pub struct Check {
    pub name: &'static str,
    pub status: &'static str,
    pub detail: String,
    pub hint: String,
}

impl Check {
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: "ok", detail: detail.into(), hint: String::new() }
    }

    pub fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: "warning", detail: detail.into(), hint: hint.into() }
    }

    pub fn error(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, status: "error", detail: detail.into(), hint: hint.into() }
    }
}

/// What the server is and has loaded.
pub fn server(checks: &mut Vec<Check>) {
    checks.push(if require_preloading().is_ok() {
        Check::ok("preloaded", "The server has loaded the library at its start.")
    } else {
        Check::error(
            "preloaded",
            "The server has not loaded the library at its start: no function but this one works.",
            "Add awa_queue to shared_preload_libraries and restart the server.",
        )
    });
    let library = env!("CARGO_PKG_VERSION");
    checks.push(match xact::subtransaction(extension::version) {
        Ok(Some(version)) if version == library => Check::ok("version", format!("Extension and library are {library}.")),
        Ok(version) => Check::error(
            "version",
            format!("The extension is {}, the library is {library}.", version.as_deref().unwrap_or("not there")),
            "Run ALTER EXTENSION awa_queue UPDATE, or restart the server to load the installed library.",
        ),
        Err(error) => Check::error("version", error.message, "Look at pg_extension."),
    });
    checks.push(if xact::in_recovery() {
        Check::ok("recovery", "This is a standby: the queue works after promotion.")
    } else {
        Check::ok("recovery", "This is a primary.")
    });
    checks.push(if truncation_is_safe_here() {
        Check::ok("truncation", "This release of the server truncates in place safely.")
    } else {
        Check::error(
            "truncation",
            "This release of the server lacks a fix that truncation in place needs: no segment is pruned.",
            "Update the server to the newest minor release.",
        )
    });
    match xact::subtransaction(extension::publication_for_all_tables) {
        Ok(None) => checks.push(Check::ok("publication", "No publication is for all tables.")),
        Ok(Some(name)) => checks.push(Check::warning(
            "publication",
            format!("Publication \"{name}\" is for all tables: truncation in place is not replicated, so subscribers only grow."),
            "Publish schemas or tables by name, without awa_segments.",
        )),
        Err(error) => checks.push(Check::warning("publication", error.message, "")),
    }
}

/// The queue itself.
pub fn engine(checks: &mut Vec<Check>) {
    // Tables of another version may be other ones: then that is what was found.
    let owned = xact::subtransaction(|| {
        let ledger = ledger_oid()?;
        sql::as_owner(ledger, instance::check)?;
        sql::as_owner(ledger, instance::owned)
    });
    checks.push(match owned {
        Ok(None) => Check::ok("instance", "No queue was created yet."),
        Ok(Some(_)) => Check::ok("instance", "The jobs belong to this server and database."),
        Err(error) => {
            let hint = error.hint.unwrap_or_else(|| "See the check version.".to_owned());
            Check::error("instance", format!("Nothing runs here: {}.", error.message), hint)
        }
    });
    if require_preloading().is_err() || xact::in_recovery() {
        return;
    }
    let frontier = match xact::subtransaction(Frontier::attach_if_built) {
        Ok(Some(frontier)) => frontier,
        Ok(None) => {
            checks
                .push(Check::ok("frontier", "Shared memory is filled at the next call of a function or look of the maintainer."));
            return;
        }
        Err(error) => {
            checks.push(Check::error("frontier", error.message, error.hint.unwrap_or_default()));
            return;
        }
    };
    checks.push(Check::ok("frontier", "Shared memory is filled."));
    pool(&frontier, checks);
    gaps(&frontier, checks);
    ring(&frontier, checks);
}

fn pool(frontier: &Frontier, checks: &mut Vec<Check>) {
    let used = frontier.in_flight().load(std::sync::atomic::Ordering::Relaxed) as usize;
    let all = settings::max_in_flight();
    let detail = format!("{used} of {all} places for running jobs are in use.");
    checks.push(if used * 4 < all * 3 {
        Check::ok("in_flight", detail)
    } else {
        Check::warning("in_flight", detail, "Raise awa.max_in_flight, or look for workers that claim and do not finish.")
    });
}

fn gaps(frontier: &Frontier, checks: &mut Vec<Check>) {
    let mut worst = (0, String::new());
    for place in 0..frontier.queue_slots() {
        let (count, name) = {
            let queue = frontier.queue(place);
            if !handle::is_visible(place, &queue) {
                continue;
            }
            (queue.gaps().len(), inspect::name_of(&queue))
        };
        if count > worst.0 {
            worst = (count, String::from_utf8_lossy(&name).into_owned());
        }
    }
    let (count, name) = worst;
    checks.push(if count * 2 < GAPS_PER_QUEUE {
        Check::ok("gaps", format!("At most {count} unfinished transactions were passed by in a queue."))
    } else {
        Check::warning(
            "gaps",
            format!("{count} of {GAPS_PER_QUEUE} unfinished transactions were passed by in queue \"{name}\"."),
            "Look for sessions that enqueue and do not commit: pg_stat_activity, state idle in transaction; pg_prepared_xacts.",
        )
    });
}

fn ring(frontier: &Frontier, checks: &mut Vec<Check>) {
    let live = frontier.live_segments();
    let (wanted, most) = (settings::ring_segments(), settings::ring_segments_max());
    let detail = format!("{} segments are live; awa.ring_segments is {wanted}, at most {most}.", live.len());
    let hint = "See awa.stat_segments for what keeps the oldest ones.";
    checks.push(match live.len() {
        count if count < wanted => Check::ok("ring", detail),
        count if count < most.max(wanted) => Check::warning("ring", detail, hint),
        _ => Check::error("ring", detail, hint),
    });
    let Some(oldest) = live.iter().find(|segment| segment.state != SegmentState::Open) else {
        checks.push(Check::ok("oldest_segment", "No segment is sealed."));
        return;
    };
    let age = (xact::now() - oldest.opened_at) / 1_000_000;
    let holders = lock_conflicts(oldest.ready, Lock::AccessExclusive);
    let held = if holders.is_empty() {
        "nobody holds a lock on it".to_owned()
    } else {
        let pids: Vec<String> = holders
            .iter()
            .map(|pid| if *pid == 0 { "a prepared transaction".to_owned() } else { format!("process {pid}") })
            .collect();
        format!("locked by {}", pids.join(", "))
    };
    let detail = format!("Generation {} was opened {age} s ago; {held}.", oldest.generation);
    let expected = settings::rotate_age() / 1_000_000 * (wanted as i64) + settings::prune_grace() / 1_000_000;
    checks.push(if age <= expected {
        Check::ok("oldest_segment", detail)
    } else {
        Check::warning("oldest_segment", detail, "End the sessions named, or see awa.stat_segments and awa.stat_maintenance.")
    });
}
