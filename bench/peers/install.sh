#!/bin/sh
# Fetches the other queues from their package registries, through the ordinary clients, into target/peers:
#
#   bench/peers/install.sh [pgmq pgq procrastinate graphile_worker pg_boss awa_client]     all of them by default
#
# What is there already is kept; REFRESH=1 fetches anew. Each directory holds either a file `version` or a file `failed`
# with the reason, which the tables of the benchmark then show. Nothing is installed outside of target/peers, so no root is
# needed, except to refresh the lists of apt where they are empty. PG=15 is the server that PgQ is wanted for.
set -u
cd "$(dirname "$0")/../.."
repo=$(pwd)
peers=$repo/target/peers
major=${PG:-15}

fail() { # the reason; ends the installation of this peer
    echo "$*" >"$dir/failed"
    exit 1
}
need() {
    command -v "$1" >/dev/null || fail "$1 is missing"
}
quietly() { # a command, whose last words are the reason when it fails
    "$@" >"$dir/log" 2>&1 || fail "$1 failed: $(grep -v '^$' "$dir/log" | grep -i -m 1 error || tail -n 1 "$dir/log")"
}
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

wheel() { # a package of Python, unpacked without its dependencies
    need python3
    quietly python3 -m pip download --quiet --no-deps --dest "$dir/download" "$1"
    quietly python3 -m zipfile -e "$dir"/download/*.whl "$dir/package"
}
version_of_wheel() {
    basename "$(ls -d "$dir"/package/*.dist-info)" .dist-info | sed 's/^.*-//'
}
tarball() { # a package of npm, unpacked without its dependencies
    need npm
    mkdir -p "$dir/download" "$dir/package"
    # Some clients print warnings beside the name of the file: look at what came.
    (cd "$dir/download" && quietly npm pack --silent "$1") || exit 1
    quietly tar -xzf "$dir"/download/*.tgz -C "$dir/package" --strip-components=1
}
version_of_npm() {
    node -p "require('$1/package.json').version"
}

# The Python package carries the SQL of the extension.
install_pgmq() {
    wheel pgmq
    quietly cp "$dir/package/pgmq/sql/pgmq.sql" "$dir/schema.sql"
    echo "pgmq $(cat "$dir/package/pgmq/sql/VERSION")" >"$dir/version"
}

install_procrastinate() {
    wheel procrastinate
    quietly cp "$dir/package/procrastinate/sql/schema.sql" "$dir/schema.sql"
    echo "procrastinate $(version_of_wheel)" >"$dir/version"
}

# Debian's build for PostgreSQL 15: SQL, and the two libraries that its functions in C are in.
install_pgq() {
    need apt-get
    need dpkg-deb
    package=postgresql-$major-pgq3
    if ! apt-cache show "$package" >/dev/null 2>&1; then
        as_root apt-get update -qq >"$dir/log" 2>&1 || true
        apt-cache show "$package" >/dev/null 2>&1 || fail "apt knows no package $package"
    fi
    mkdir -p "$dir/download"
    (cd "$dir/download" && quietly apt-get download -qq "$package") || exit 1
    quietly dpkg-deb -x "$dir"/download/*.deb "$dir/package"
    libraries=$dir/package/usr/lib/postgresql/$major/lib
    sed "s|\\\$libdir/|$libraries/|" "$dir/package/usr/share/postgresql/$major/contrib/pgq.sql" >"$dir/schema.sql"
    echo "PgQ $(dpkg-deb -f "$dir"/download/*.deb Version)" >"$dir/version"
}

# The statements of these two are made by their JavaScript: ask it for them, and write them down.
install_graphile_worker() {
    need node
    need npm
    mkdir -p "$dir/package"
    quietly npm install --silent --no-audit --no-fund --prefix "$dir/package" graphile-worker@latest
    package=$dir/package/node_modules/graphile-worker
    quietly node "$repo/bench/peers/graphile_worker.cjs" "$package" "$dir"
    echo "graphile-worker $(version_of_npm "$package")" >"$dir/version"
}

install_pg_boss() {
    need node
    tarball pg-boss@latest
    quietly node "$repo/bench/peers/pg_boss.mjs" "$dir/package" "$dir"
    echo "pg-boss $(version_of_npm "$dir/package")" >"$dir/version"
}

install_awa_client() {
    need python3
    quietly python3 -m pip install --quiet --target "$dir/package" awa-pg
    echo "awa-pg $(version_of_wheel)" >"$dir/version"
}

for name in ${*:-pgmq pgq procrastinate graphile_worker pg_boss awa_client}; do
    dir=$peers/$name
    if [ -z "${REFRESH:-}" ] && [ -f "$dir/version" ]; then
        echo "$name: $(cat "$dir/version"), kept"
        continue
    fi
    rm -rf "$dir"
    mkdir -p "$dir"
    started=$(date +%s)
    case $name in
        pgmq | pgq | procrastinate | graphile_worker | pg_boss | awa_client) (install_"$name") ;;
        *) echo "there is no recipe for $name" >"$dir/failed" ;;
    esac
    if [ -f "$dir/failed" ]; then
        echo "$name: NOT INSTALLED, $(cat "$dir/failed")"
    elif [ -f "$dir/version" ]; then
        echo "$name: $(cat "$dir/version"), $(($(date +%s) - started)) s"
    else
        echo "the installation did not finish" >"$dir/failed"
        echo "$name: NOT INSTALLED, $(cat "$dir/failed")"
    fi
done
