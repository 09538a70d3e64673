//! Client-side tests: each is a named function that gets a database of its own in a running cluster.
//!
//! To add a test, write the function and name it below; a new suite is one line more.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use postgres::{Client, GenericClient};

use crate::build::Profile;
use crate::cluster::{Cluster, Shutdown, memcheck};
use crate::process::{Signal, children_of, signal};
use crate::report::Outcome;

pub use stress_mixed::number;
// What several suites work with.
mod every_state;
mod witnesses;

// Needs two servers: called by the test run itself.
pub mod pg_upgrade;

pub use upgrade_frame::freeze;

macro_rules! suites {
    ($($suite:ident: [$($case:ident),+ $(,)?];)+) => {
        $(mod $suite;)+
        pub const CASES: &[Case] = &[
            $($(Case { name: concat!(stringify!($suite), "::", stringify!($case)), run: $suite::$case },)+)+
        ];
    };
}

suites! {
    surface: [every_exported_function_has_its_sql, a_dropped_database_gives_its_place_back];
    points: [a_point_stops_fails_and_lets_go, a_point_kills];
    oracle: [
        verify_sees_a_missing_claim, verify_sees_a_missing_job, verify_sees_what_is_wrong_with_kept_jobs,
        verify_sees_damage_beside_a_prepared_transaction,
    ];
    visibility: [
        a_committed_enqueue_is_claimable, an_open_enqueue_is_not_claimable, a_rolled_back_enqueue_never_appears,
        rollback_to_savepoint_drops_only_its_jobs,
    ];
    attempts: [
        two_sessions_claim_disjoint_sets, a_rolled_back_claim_gives_its_jobs_back, a_rolled_back_completion_leaves_the_attempt_running,
        a_wrong_lease_finishes_nothing, a_claim_weakens_no_other_write, many_sessions_finish_every_job_once,
    ];
    crash: [
        a_killed_backend_loses_no_job, a_killed_postmaster_loses_no_job, an_immediate_shutdown_loses_no_job,
        open_attempts_keep_their_lease_over_a_restart, a_crash_under_load_loses_no_acknowledged_job,
    ];
    races: [
        a_completion_that_meets_a_rebuild_is_kept, a_cancel_that_meets_a_rebuild_is_kept,
        a_claim_that_meets_a_rebuild_leaves_the_pool_in_order, an_enqueue_that_meets_a_rebuild_succeeds,
        a_completion_in_a_dropped_queue_does_not_count_in_the_next, a_snapshot_claim_leaves_newer_jobs_that_were_given_back,
        a_job_cancelled_where_it_was_enqueued_never_runs, a_job_passed_by_while_its_cancel_rolls_back_comes_out,
        a_long_enqueue_watched_by_claimers_loses_no_row, a_pruned_segment_leaves_the_counts,
        a_slot_is_good_after_a_prune_that_was_rolled_back,
    ];
    stress_mixed: [
        every_acknowledged_job_has_one_end_in_quiet_times, every_acknowledged_job_has_one_end,
        every_acknowledged_job_has_one_end_over_rebuilds, every_acknowledged_job_has_one_end_while_segments_are_emptied,
        every_acknowledged_job_has_one_end_under_maintenance, every_acknowledged_job_has_one_end_when_everybody_stumbles,
        every_acknowledged_job_has_one_end_while_the_clock_steps,
    ];
    reference: [every_sequence_of_verbs_is_answered_as_by_plain_sql, jobs_passed_by_in_their_transaction_come_out_in_order, the_jobs_of_a_dropped_queue_are_not_found];
    history: [all_answers_fit_into_one_history, all_answers_fit_into_one_history_over_crashes];
    waiting: [
        a_commit_wakes_a_waiting_session, a_large_commit_wakes_every_waiting_session, a_rolled_back_claim_wakes_a_waiting_session,
        a_waiting_session_holds_no_snapshot, a_wait_in_a_transaction_is_refused, a_waiting_session_can_be_cancelled,
        a_terminated_wait_leaves_nothing_behind, a_scheduled_job_wakes_when_it_is_due, a_commit_prepared_wakes_a_waiting_session,
        a_prepared_transaction_wakes_a_session_that_slept_before, resuming_a_queue_wakes_its_workers,
        dropping_a_queue_and_rebuilding_wake_its_workers,
    ];
    hostile_pool: [
        a_full_pool_hands_out_fewer_jobs_and_says_so, a_rolled_back_claim_that_filled_the_pool_can_be_claimed_again,
        jobs_given_back_to_a_paused_queue_do_not_stop_another, a_full_pool_still_cancels,
        a_pool_smaller_than_the_running_jobs_refuses_and_names_the_setting, too_many_queues_are_refused,
    ];
    rescue: [
        a_pass_is_bounded_and_fair, a_job_that_cannot_be_rescued_stops_no_other, after_a_crash_every_attempt_has_a_grace,
        a_locked_table_of_dead_letters_stops_only_its_jobs, a_carried_attempt_that_dies_shows_a_time,
    ];
    ring: [
        a_queue_that_cannot_note_more_transactions_goes_on_in_a_new_segment, the_ring_grows_to_its_limit_goes_on_and_comes_back,
        an_old_snapshot_keeps_no_segment, the_ledger_is_trimmed_now_and_then,
        a_rotation_may_come_before_the_first_queue, a_wait_sleeps_over_a_segment_on_its_way_out,
    ];
    carries: [
        a_full_ring_empties_its_oldest_segment_of_due_jobs_too, a_few_jobs_among_many_tombstones_are_carried,
        running_attempts_behind_many_due_holes_are_carried, carrying_leaves_places_for_operators,
    ];
    cancels: [
        a_cancel_that_rolls_back_among_claimers_loses_no_job, a_job_is_cancelled_or_run,
        of_a_cancel_and_a_completion_at_once_one_ends_the_attempt,
    ];
    hostile_setup: [
        every_function_is_in_the_lists, without_preloading_every_function_says_so, without_preloading_nothing_is_adopted,
        a_database_too_many_is_refused_until_one_goes, sessions_outlive_a_new_extension, another_version_of_the_script_is_refused,
        a_read_only_transaction_refuses_to_write, a_standby_refuses_and_works_after_promotion,
    ];
    roles: [the_documented_roles_do_their_work_and_no_other, nothing_is_granted_to_everybody];
    hostile_input: [
        generated_calls_of_every_function_end_for_people, bytes_that_are_no_utf8_come_back_as_they_were,
        an_error_of_any_length_ends_the_attempt,
        objects_of_the_caller_are_never_taken_for_those_of_the_server, a_session_with_little_memory_raises_and_lives,
    ];
    hostile_resources: [
        the_memory_of_a_session_stays_flat_over_many_calls, the_memory_of_a_session_stays_flat_over_many_refusals,
        more_open_producers_than_gaps_delay_jobs_and_lose_none, hundreds_of_savepoints_delay_jobs_and_lose_none,
        a_transaction_of_100_000_jobs_holds_nobody_up, a_claim_of_60_000_jobs_that_rolls_back_gives_them_all_back,
        a_large_enqueue_may_be_cancelled_anywhere, a_large_claim_may_be_cancelled_anywhere,
        a_large_completion_may_be_cancelled_anywhere,
    ];
    faults: [
        an_error_anywhere_in_a_call_of_a_worker_leaves_nothing, an_error_anywhere_in_a_call_of_an_operator_leaves_nothing,
        an_error_anywhere_in_maintenance_leaves_nothing, an_error_anywhere_in_a_read_leaves_nothing,
        a_claim_that_fails_before_its_first_row_leaves_numbers_readable,
    ];
    copies: [
        a_plain_dump_restores_every_job, a_parallel_dump_restores_every_job, a_dump_while_jobs_flow_holds_every_job_of_its_moment, a_database_made_from_a_template_waits_for_adoption,
        a_marked_restore_is_left_alone_until_it_is_complete, a_restore_over_the_same_database_waits_for_adoption,
        a_rebuild_and_a_restart_change_nothing_that_is_shown, a_rewritten_segment_asks_for_a_rebuild, evidence_may_be_rewritten_and_indexes_built_anew,
        a_trigger_on_a_segment_is_refused, an_index_on_a_segment_is_refused,
    ];
    maintainer: [
        it_comes_with_the_commit_of_create_extension, it_leaves_with_the_extension_and_comes_with_the_next,
        commands_that_need_an_empty_database_succeed, after_a_command_that_failed_it_comes_back,
        segments_are_rotated_and_pruned_with_no_call_by_hand, a_stuck_job_is_given_back_with_no_call_by_hand,
        an_idle_tick_costs_no_transaction_id_and_no_wal, a_reload_changes_its_interval_and_switches_it_off_and_on,
        a_failing_task_does_not_stop_the_others, a_lock_in_the_way_is_no_failure, a_terminated_worker_comes_back,
        a_reload_while_it_starts_is_not_lost, after_a_crash_it_comes_back, a_standby_gets_one_when_it_is_promoted,
        without_a_place_for_a_worker_it_says_so_and_comes_later, another_version_is_refused_loudly,
        a_copy_is_left_alone_until_it_is_adopted, settings_of_the_database_do_not_touch_it,
        a_database_that_takes_no_sessions_is_left_alone, a_start_that_is_held_up_keeps_no_other_waiting,
        a_start_that_takes_long_is_told, errors_of_commands_arrive_unchanged, a_missing_standby_holds_nothing_up,
        the_doctor_sees_a_task_that_gets_nowhere, the_doctor_sees_a_job_that_cannot_be_rescued,
        the_doctor_sees_that_nobody_works, a_database_that_is_gone_starves_no_more, a_restore_puts_it_to_sleep_and_wakes_it,
        a_command_that_failed_in_a_savepoint_holds_nothing, a_database_may_have_any_name,
        a_place_that_waits_goes_with_its_database,
    ];
    crash_ledger: [what_clients_were_told_survives_every_crash, what_clients_were_told_survives_crashes_of_the_maintainer];
    narrow: [
        a_producer_that_slept_over_a_prune_loses_no_job, a_claimer_that_slept_over_a_prune_reads_no_other_segment,
        a_producer_that_registers_late_is_above_every_scan, a_producer_that_stands_still_holds_up_nobody_and_loses_nothing,
        a_producer_that_dies_while_it_appends_leaves_no_ghost, a_claimer_that_dies_with_a_turn_gives_it_back,
        a_retry_that_slept_over_another_changes_nothing, a_cancel_that_comes_too_late_changes_nothing,
        a_heartbeat_between_sweep_and_mark_keeps_the_attempt, a_rescue_that_slept_over_the_end_of_an_attempt_ends_nothing,
        a_finished_job_is_not_carried_while_a_scan_stands_at_it, a_finisher_that_slept_over_a_rebuild_ends_its_attempt_once,
        a_rebuild_waits_for_whoever_takes_a_finished_job, a_commit_between_look_and_sleep_wakes,
        a_late_cancel_that_is_interrupted_brings_nothing_back, of_two_who_have_decided_to_end_an_attempt_one_does,
        a_verify_that_meets_claim_after_claim_of_a_job_names_nothing,
    ];
    long_ago: [
        a_dump_older_than_a_carry_holds_the_job, a_lease_from_before_a_crash_ends_nothing, a_prepared_enqueue_outlives_a_crash,
        a_kill_between_two_tables_of_a_prune_makes_nothing_ready, a_gap_outlives_the_commit_log,
    ];
    ancestor: [
        e01_an_attempt_that_is_cancelled_and_completed_ends_once, e02_a_cancel_does_not_see_the_cancel_of_a_sibling,
        e03_a_prune_counts_nothing, e04_nothing_of_a_pruned_job_is_left,
        e05_a_paused_queue_and_an_idle_producer_pin_nothing_of_others, e06_a_claim_is_undone_as_a_whole_and_never_doubled,
        e07_a_job_outlives_the_ring_that_turned_under_its_transaction, e08_producers_share_no_lock_and_no_notify,
        e09_a_call_touches_as_little_beside_many_open_claims, e10_a_bad_deferred_job_stops_no_other,
        e11_rescue_ends_a_job_that_has_used_up_its_attempts, e13_backoff_is_clamped_at_every_attempt,
        e14_every_way_in_checks_the_same, also_completed_jobs_are_shown_as_long_as_promised,
        also_running_jobs_are_among_the_jobs, also_a_job_that_comes_back_keeps_its_place, also_a_long_task_does_not_delay_rescue,
    ];
    crash_points: [
        a_session_killed_at_any_point_has_done_all_or_nothing, a_prune_killed_between_any_two_relations_is_done_again,
        a_server_that_dies_with_sessions_at_many_points_loses_nothing, a_maintainer_killed_at_any_point_loses_nothing,
    ];
    disk_full: [a_full_disk_refuses_and_loses_nothing, a_full_disk_under_the_log_loses_nothing];
    failover: [
        a_synchronous_standby_has_every_acknowledged_commit, an_asynchronous_standby_loses_only_what_it_had_not_received,
        a_restore_to_a_point_in_time_has_what_was_there,
    ];
    upgrade_frame: [
        an_upgrade_equals_a_fresh_install, a_forgotten_step_of_an_update_is_noticed, jobs_in_every_state_survive_an_update,
        a_library_that_meets_older_sql_works_or_says_what_to_do, a_dump_of_each_release_restores_and_updates,
    ];
    adapter: [the_adapter_speaks_the_protocol_of_the_public_harness];
    hot_path: [a_job_writes_as_much_log_as_before, a_job_takes_as_many_instructions_as_before];
}

/// A case that takes longer has hung; its cluster is killed. A soak, of more rounds than usual, may take longer.
fn case_limit() -> Duration {
    let usual = if memcheck::is_on() { 1800 } else { number("AWA_CASE_SECONDS", 180) };
    let long = [
        20 * number("AWA_CRASH_ROUNDS", 0),
        5 * number("AWA_SEQUENCES", 0),
        number("AWA_HISTORY_STEPS", 0),
        2 * number("AWA_FUZZ_CALLS", 0),
        number("AWA_MEMORY_CALLS", 0) / 50,
    ];
    Duration::from_secs(long.into_iter().fold(usual, u64::max))
}

const DATABASE: &str = "awa_case";

pub struct Case {
    pub name: &'static str,
    run: fn(&mut Stage<'_>) -> Result<()>,
}

/// What a case works with. Its queue is called `q`.
pub struct Stage<'a> {
    pub cluster: &'a mut Cluster,
    /// The case has destroyed rows on purpose: there is nothing to verify after it.
    pub damaged: bool,
    /// How the library was built
    pub profile: Profile,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    pub job_id: i64,
    pub run_lease: i64,
}

impl Case {
    /// Runs in a new database; the database of a failed case stays for a look until the next case begins.
    pub fn run(&self, label: &str, cluster: &mut Cluster, profile: Profile) -> Outcome {
        let started = Instant::now();
        let name = format!("{label}/{}", self.name);
        let log_start = cluster.log_size();
        match with_limit(cluster, |cluster| self.run_in_database(cluster, profile)) {
            Ok(()) => Outcome::passed(name, Some(started.elapsed())),
            Err(error) => {
                let log = cluster.log_since(log_start).unwrap_or_default();
                let log: Vec<&str> = log.lines().filter(|line| !line.contains("LOG:")).collect();
                let log = log.get(log.len().saturating_sub(30)..).unwrap_or_default().join("\n");
                Outcome::failed(name, format!("{error:#}{}\nserver log:\n{log}", place_of(&error)), Some(started.elapsed()))
            }
        }
    }

    fn run_in_database(&self, cluster: &mut Cluster, profile: Profile) -> Result<()> {
        // With fresh shared memory, a case does not meet what an earlier one left in it.
        if cluster.is_running() {
            cluster.stop(Shutdown::Fast)?;
        }
        // Settings of a case that failed or was killed are not those of the next.
        std::fs::write(cluster.data().join("postgresql.auto.conf"), "")?;
        cluster.start()?;
        cluster.create_database(DATABASE)?;
        let mut stage = Stage { cluster, damaged: false, profile };
        stage.connect()?.batch_execute("SELECT awa.create_queue('q')")?;
        (self.run)(&mut stage)?;
        if !stage.damaged {
            stage.verify_clean()?;
        }
        stage.cluster.drop_database(DATABASE)
    }
}

/// Runs `work`; when it takes too long, kills the server, which makes every client's call fail.
fn with_limit(cluster: &mut Cluster, work: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    let (done, wait) = channel::<()>();
    let (data, limit) = (cluster.data(), case_limit());
    thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let hung = wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if hung {
                kill_server(&data);
            }
            hung
        });
        let result = work(cluster);
        drop(done);
        match watchdog.join() {
            Ok(true) => result.and_then(|()| bail!("took too long")).with_context(|| format!("killed after {limit:?}")),
            _ => result,
        }
    })
}

/// The lines of this directory that the error passed, when a backtrace was asked for.
fn place_of(error: &anyhow::Error) -> String {
    let trace = error.backtrace().to_string();
    let mut place = String::new();
    for line in trace.lines().map(str::trim).filter(|line| line.starts_with("at ") && line.contains("/suites/")) {
        if !line.contains("/suites/mod.rs") {
            place.push_str("\n  ");
            place.push_str(line);
        }
    }
    place
}

fn kill_server(data: &std::path::Path) {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok()) else { return };
    let children = children_of(pid);
    for process in std::iter::once(pid).chain(children) {
        if let Err(error) = signal(process, Signal::Kill) {
            eprintln!("note: {error:#}");
        }
    }
}

impl Stage<'_> {
    pub fn connect(&self) -> Result<Client> {
        self.cluster.connect(DATABASE)
    }

    pub fn config(&self) -> postgres::Config {
        self.cluster.config(DATABASE)
    }

    /// The oracle: log and frontier tell the same story.
    pub fn verify_clean(&self) -> Result<()> {
        self.verify_clean_by(&mut self.connect()?)
    }

    pub fn verify_clean_by(&self, client: &mut Client) -> Result<()> {
        let rows = client.query("SELECT d::text FROM awa.verify() AS d", &[]).context("verify")?;
        let differences: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        ensure!(differences.is_empty(), "verify() found {} differences:\n{}", differences.len(), differences.join("\n"));
        Ok(())
    }
}

pub fn enqueue(client: &mut impl GenericClient, count: usize) -> Result<Vec<i64>> {
    let args: Vec<serde_json::Value> = (0..count).map(|n| serde_json::json!({ "n": n })).collect();
    Ok(client.query_one("SELECT awa.enqueue_many('q', 'test', $1)", &[&args]).context("enqueue_many")?.try_get(0)?)
}

pub fn claim(client: &mut impl GenericClient, count: i32) -> Result<Vec<Attempt>> {
    let rows = client.query("SELECT job_id, run_lease FROM awa.claim('q', $1)", &[&count]).context("claim")?;
    rows.iter().map(|row| Ok(Attempt { job_id: row.try_get(0)?, run_lease: row.try_get(1)? })).collect()
}

pub fn complete(client: &mut impl GenericClient, attempt: Attempt) -> Result<String> {
    Ok(client.query_one("SELECT awa.complete($1, $2)", &[&attempt.job_id, &attempt.run_lease]).context("complete")?.try_get(0)?)
}

/// Claims and completes until nothing is there; the jobs in the order of their claims.
pub fn drain(client: &mut Client) -> Result<Vec<i64>> {
    let mut jobs = Vec::new();
    loop {
        let attempts = claim(client, 64)?;
        if attempts.is_empty() {
            return Ok(jobs);
        }
        for attempt in attempts {
            let result = complete(client, attempt)?;
            ensure!(result == "completed", "complete answered {result}");
            jobs.push(attempt.job_id);
        }
    }
}

pub fn ids(attempts: &[Attempt]) -> Vec<i64> {
    attempts.iter().map(|attempt| attempt.job_id).collect()
}

pub fn sorted(mut ids: Vec<i64>) -> Vec<i64> {
    ids.sort_unstable();
    ids
}
