#!/usr/bin/env bash
# Checks what the build and the tests need, and installs the Debian packages among it that are missing.
# Usage: scripts/prerequisites.sh [15] [18] [cassert] [valgrind]     the PostgreSQL majors and tools that will be used
set -euo pipefail

if ! command -v cargo >/dev/null; then
    echo "There is no Rust toolchain: install rustup, which then takes the version in rust-toolchain.toml by itself." >&2
    exit 1
fi

needed=()
need() { # package, and a file that shows it is there
    [ -e "$2" ] || needed+=("$1")
}

command -v cc >/dev/null || needed+=(gcc libc6-dev)
# Counts the instructions of the hot path.
need valgrind /usr/bin/valgrind
# The headers of PostgreSQL, pg_regress, and the libclang that reads the headers for Rust (also for other majors).
need postgresql-server-dev-15 /usr/lib/postgresql/15/lib/pgxs/src/test/regress/pg_regress
for major in "$@"; do
    case $major in
    15)
        need postgresql-15 /usr/lib/postgresql/15/bin/postgres
        ;;
    18)
        command -v python3 >/dev/null || needed+=(python3)
        python3 -m pip --version >/dev/null 2>&1 || needed+=(python3-pip)
        ;;
    cassert)
        command -v make >/dev/null || needed+=(make)
        ;;
    valgrind)
        command -v valgrind >/dev/null || needed+=(valgrind)
        ;;
    *)
        echo "no recipe for PostgreSQL $major here; see make install PG_CONFIG=..." >&2
        exit 1
        ;;
    esac
done
[ ${#needed[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "Missing, and there is no apt-get to install it: ${needed[*]}" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "Missing, and there is no sudo to install it: ${needed[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
echo "installing: ${needed[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${needed[@]}"
