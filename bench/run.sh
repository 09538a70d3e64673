#!/bin/sh
# Measures everything on a private cluster: bench/run.sh [short|full]
#
#   PGBIN=DIR     PostgreSQL programs of an installation that has awa_queue; without it, the harness provides one (PG=15)
#   SYSTEMS=LIST  awa,skip_locked; only skip_locked where awa_queue is not installed
#   OUT=DIR       results.jsonl and results.md (target/bench)
#   ONLY=LIST     scenarios, e.g. ONLY="throughput-single wakeup"
#   DATA=DIR      where the cluster is made and removed (/var/tmp); the disk decides what a commit costs
#   SETTINGS=TEXT further lines of postgresql.conf
#   KEEP=1        leave the stopped cluster there
set -eu

form=${1:-short}
case $form in short | full) ;; *) echo "usage: bench/run.sh [short|full]" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
repo=$(pwd)
out=${OUT:-$repo/target/bench}
mkdir -p "$out"
results=$out/results.jsonl
: >"$results"

# -- the driver, and the server programs -------------------------------------------------------------------------------

CARGO_TARGET_DIR=$repo/target/harness cargo build --quiet --release --package awa_bench
bench=$repo/target/harness/release/awa_bench

if [ -z "${PGBIN:-}" ]; then
    CARGO_TARGET_DIR=$repo/target/harness cargo build --quiet --package awa_harness
    PGBIN=$("$repo/target/harness/debug/awa" provision --pg "${PG:-15}" --profile release | tail -n 1)
fi
if [ -f "$("$PGBIN/pg_config" --sharedir)/extension/awa_queue.control" ]; then
    systems=${SYSTEMS:-awa,skip_locked}
else
    systems=${SYSTEMS:-skip_locked}
    echo "awa_queue is not installed for $PGBIN: measuring $systems"
fi
case ,$systems, in *,awa,*) preload=awa_queue ;; *) preload= ;; esac

# -- a private cluster: no TCP, a socket in a directory that only the server's user may enter ----------------------------

if [ "$(id -u)" = 0 ]; then
    server_user=postgres
    as_server() { runuser -u "$server_user" -- "$@"; }
else
    server_user=$(id -un)
    as_server() { "$@"; }
fi
dir=$(mktemp -d "${DATA:-/var/tmp}/awa_bench.XXXXXX")
chmod 700 "$dir"
chown "$server_user" "$dir"

stop() {
    [ ! -f "$dir/data/postmaster.pid" ] || as_server "$PGBIN/pg_ctl" -D "$dir/data" -m fast -w stop >/dev/null || true
}
finish() {
    stop
    if [ -n "${KEEP:-}" ]; then echo "cluster kept in $dir"; else rm -rf "$dir"; fi
}
trap finish EXIT
trap 'exit 130' INT TERM

cd /
as_server "$PGBIN/initdb" -D "$dir/data" -U postgres --auth=trust --encoding=UTF8 --no-locale >/dev/null
cat >>"$dir/data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$dir'
port = 5432
max_connections = 200
shared_buffers = 1GB
max_wal_size = 4GB
synchronous_commit = on
shared_preload_libraries = '$preload'
${SETTINGS:-}
CONF
start() { as_server "$PGBIN/pg_ctl" -D "$dir/data" -l "$dir/log" -w start >/dev/null || { tail -n 20 "$dir/log" >&2; exit 1; }; }
start
url="host=$dir port=5432 user=postgres dbname=bench"
as_server "$PGBIN/createdb" -h "$dir" -p 5432 -U postgres bench

# -- what the disk makes of a commit -------------------------------------------------------------------------------------

if [ -x "$PGBIN/pg_test_fsync" ]; then
    as_server "$PGBIN/pg_test_fsync" -s 1 -f "$dir/flush" 2>/dev/null | grep -m 1 -E '^ +fdatasync +[0-9]' | tee "$out/flush.txt" || true
fi

# -- the scenarios ---------------------------------------------------------------------------------------------------------

failed=
scenario() {
    scenario_name=$1
    case " ${ONLY:-$scenario_name} " in *" $scenario_name "*) ;; *) return 0 ;; esac
    echo "== $*"
    RUST_BACKTRACE=0 "$bench" --url "$url" --out "$results" --systems "$systems" "$@" || failed="$failed $scenario_name"
}
has_awa() { [ -n "$preload" ]; }

if [ "$form" = short ]; then
    scenario throughput-batch --rounds 3 --warm-up 2 --window 5
    scenario throughput-single --rounds 3 --warm-up 2 --window 5
    scenario scaling --rounds 1 --warm-up 1 --window 3
    scenario wal-per-job --jobs 5000
    scenario claim-cost --waiting 1000000 --scheduled 1000000 --uncommitted 100000
    scenario wakeup --rounds 1
    rebuild_rows=1000000
else
    scenario throughput-batch --rounds 5
    scenario throughput-single --rounds 5
    scenario scaling --rounds 3
    scenario wal-per-job
    scenario claim-cost
    scenario wakeup
    rebuild_rows="1000000 10000000"
fi
if has_awa; then
    scenario memory
    scenario heartbeat
    scenario heartbeat --running 10000
fi
if [ "$form" = short ]; then
    scenario pinned --clean 10 --pinned 60 --recovery 5 --last 20
else
    scenario pinned
fi
if has_awa; then
    loaded=0
    for rows in $rebuild_rows; do
        scenario rebuild --load --rows $((rows - loaded))
        loaded=$rows
        stop
        start
        scenario rebuild --rows "$rows"
    done
fi

"$bench" report "$results" >"$out/results.md"
echo "results: $results and $out/results.md"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
