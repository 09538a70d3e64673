//! Says how to find out where the time of a backend goes. Runs nothing.

use anyhow::Result;
use clap::Args;

use crate::Target;

#[derive(Args)]
pub struct ProfileArgs {
    /// Seconds to record
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

pub fn run(target: &Target, args: &ProfileArgs) -> Result<()> {
    let url = &target.url;
    let seconds = args.seconds;
    println!(
        "\
Profile a backend under load. The release build keeps line tables; for the server itself install its debug symbols.

1. Run a load that outlasts the recording, of one system and one cycle:

     awa_bench --url '{url}' --systems awa --rounds 1 throughput-batch --cycles separate --window {window}

2. Meanwhile find what the busy backends do:

     psql '{url}' -c \"SELECT pid, state, wait_event_type, wait_event, left(query, 60)
                        FROM pg_stat_activity WHERE backend_type = 'client backend' ORDER BY query\"

3. Record one of them, or all of them (-p with a list), as root:

     perf record -F 997 -g --call-graph dwarf,16384 -p PID -o backend.data -- sleep {seconds}
     perf report -i backend.data --no-children --sort symbol --stdio | head -60
     perf script -i backend.data | stackcollapse-perf.pl | flamegraph.pl > backend.svg

4. Without perf, sample the waits: time not spent on CPU is a wait event (lock, log flush, client).

     for i in $(seq 200); do psql '{url}' -Atc \"SELECT coalesce(wait_event, 'CPU') FROM pg_stat_activity
         WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid()\"; sleep 0.05; done |
         sort | uniq -c | sort -rn

5. Exactly, and on a busy machine: count instructions in a server of one process, on a copy of a stopped cluster that has the
   extension and a queue q. Statements of one line each, sixty times the same, make what starts and ends the server small:

     valgrind --tool=callgrind --callgrind-out-file=out postgres --single -D COPY -c full_page_writes=off DATABASE <statements.sql
     callgrind_annotate --inclusive=yes out | grep awa_queue | head -40",
        window = seconds + 20,
    );
    Ok(())
}
