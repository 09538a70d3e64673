# awa_queue. The two commands of the README are `make demo` and `make test`; they install what is missing.
#
#   make test T=crash           only tests whose name contains "crash"
#   make test PG=15             only on one server (15, 18; both by default)
#   make mutants                breaks the rules of the code, one at a time: each must be noticed
#   make test-cassert           all server tests on a PostgreSQL 15 built with assertions
#   make test-valgrind          every verb once, and the suite of attempts, in servers under valgrind (minutes)
#   make build                  the library for PG_CONFIG, as users install it
#   make install PG_CONFIG=...  build and install it into that PostgreSQL

PG        ?= 15 18
PG_CONFIG ?= pg_config
T         ?=

comma := ,
empty :=
space := $(empty) $(empty)

awa = target/harness/debug/awa
pg_list = $(subst $(space),$(comma),$(strip $(PG)))

# What `make install` works with; evaluated only when asked for.
pg_major    = $(shell $(PG_CONFIG) --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
pg_path     = $(shell command -v $(PG_CONFIG))
build_dir   = target/pg$(pg_major)
library     = $(build_dir)/release/libawa_queue.so
pkglibdir   = $(DESTDIR)$(shell $(PG_CONFIG) --pkglibdir)
extdir      = $(DESTDIR)$(shell $(PG_CONFIG) --sharedir)/extension

.PHONY: demo test test-cassert test-valgrind mutants soak bench bench-full build install uninstall harness fmt fmt-check clippy clean

demo:
	scripts/prerequisites.sh 15
	$(MAKE) --no-print-directory harness
	$(awa) demo

test:
	scripts/prerequisites.sh $(PG)
	$(MAKE) --no-print-directory harness
	$(awa) test --pg $(pg_list) $(if $(T),'$(T)')

test-cassert:
	scripts/prerequisites.sh 15 cassert
	$(MAKE) --no-print-directory harness
	$(awa) test --pg cassert '$(if $(T),$(T),/cassert/)'

# Wrong accesses to memory that no assertion sees. Another T is another filter.
test-valgrind:
	scripts/prerequisites.sh 15 valgrind
	$(MAKE) --no-print-directory harness
	AWA_VALGRIND=1 $(awa) test --pg 15 '$(if $(T),$(T),client/15/attempts)'
	$(if $(T),,AWA_VALGRIND=1 $(awa) test --no-build --pg 15 client/15/hostile_input::objects)

# Rules broken one at a time, of the model and of the code of the server: each time a test must fail. T=carry: only those with such a name.
mutants:
	scripts/prerequisites.sh 15
	$(MAKE) --no-print-directory harness
	cd src/protocol && AWA_MUTANT='$(T)' CARGO_TARGET_DIR=$(CURDIR)/target/harness cargo test --release --features mutants
	$(awa) mutants $(if $(T),'$(T)')

# Longer: more crashes, more schedules, more steps of the stress suites.
soak:
	scripts/prerequisites.sh 15
	$(MAKE) --no-print-directory harness
	cd src/protocol && AWA_SEEDS=40000 CARGO_TARGET_DIR=$(CURDIR)/target/harness cargo test --release --test model
	cd docs/spec && AWA_SPEC_BOUND=large CARGO_TARGET_DIR=$(CURDIR)/target/harness cargo test --test models -- --nocapture
	AWA_CRASH_ROUNDS=100 AWA_STRESS_STEPS=4000 $(awa) test --pg 15 client/15/crash
	AWA_CRASH_ROUNDS=100 $(awa) test --pg 15 client/15/failover
	AWA_SEQUENCES=1500 AWA_STEPS=100 $(awa) test --pg 15 --no-build client/15/reference
	AWA_HISTORY_STEPS=4000 AWA_HISTORY_KILLS=25 $(awa) test --pg 15 --no-build client/15/history
	AWA_STRESS_STEPS=4000 $(awa) test --pg 15 client/15/stress
	AWA_STRESS_STEPS=1000 AWA_JITTER=100 AWA_CLOCK_STEPS=1 $(awa) test --pg 15 --no-build client/15/stress
	AWA_CANCEL_WAVES=20000 $(awa) test --pg 15 --no-build client/15/cancels
	AWA_FAULTS=all $(awa) test --no-build --pg 15 client/15/faults
	AWA_FUZZ_CALLS=2000 $(awa) test --no-build --pg 15 client/15/hostile_input
	AWA_MEMORY_CALLS=100000 $(awa) test --no-build --pg 15 client/15/hostile_resources::the_memory
	$(MAKE) --no-print-directory mutants

# Need a quiet machine: ten minutes, or hours. One scenario alone: see bench/run.
bench:
	scripts/prerequisites.sh 15
	bench/run short

bench-full:
	scripts/prerequisites.sh 15
	bench/run full

harness:
	CARGO_TARGET_DIR=target/harness cargo build --quiet --package awa_harness

build:
	@command -v $(PG_CONFIG) >/dev/null || { echo "There is no $(PG_CONFIG): name one with PG_CONFIG=..."; exit 1; }
	PGRX_PG_CONFIG_PATH=$(pg_path) CARGO_TARGET_DIR=$(build_dir) \
	    cargo build --release --package awa_queue --lib --no-default-features --features pg$(pg_major)

# The library is renamed into place: a running server may have the old one mapped.
install: build
	install -d "$(pkglibdir)" "$(extdir)"
	install -m 755 $(library) "$(pkglibdir)/awa_queue.so.new"
	mv -f "$(pkglibdir)/awa_queue.so.new" "$(pkglibdir)/awa_queue.so"
	install -m 644 awa_queue.control sql/awa_queue--*.sql "$(extdir)/"
	@echo "Add awa_queue to shared_preload_libraries, restart the server, then: CREATE EXTENSION awa_queue"

uninstall:
	rm -f "$(pkglibdir)/awa_queue.so" "$(extdir)/awa_queue.control" "$(extdir)"/awa_queue--*.sql

fmt:
	cargo fmt --all

fmt-check:
	cargo fmt --all --check

# The library needs the headers of a server; 15 is the one that every developer has.
clippy:
	scripts/prerequisites.sh 15
	CARGO_TARGET_DIR=target/harness cargo clippy --quiet --package awa_harness --package awa_protocol --package awa_bench --all-targets -- -D warnings
	CARGO_TARGET_DIR=target/harness cargo clippy --quiet --package awa_spec --all-targets -- -D warnings
	PGRX_PG_CONFIG_PATH=/usr/lib/postgresql/15/bin/pg_config CARGO_TARGET_DIR=target/pg15 \
	    cargo clippy --quiet --package awa_queue --no-default-features --features pg15 -- -D warnings

clean:
	@[ ! -x $(awa) ] || $(awa) clean
	rm -rf target
