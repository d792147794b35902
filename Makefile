# Chandra: the only entry points. `make run` and `make test` install what they need.

KERNEL ?= 6.12
SIGNAL ?=
KERNELS ?= 5.10 6.1 6.12 6.18 newest
LISTEN ?= 127.0.0.1:9970

CACHE := $(or $(CHANDRA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/chandra)
export PATH := $(CACHE)/tools/bin:$(PATH):/usr/sbin:/sbin
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
SHELL_FILES := $(shell git ls-files | xargs grep -lE '^\#!.*/(env )?(ba)?sh' 2>/dev/null)

.PHONY: help
help: ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: run
run: ## Build, and run the exporter on this host
	tools/setup run
	cargo build --release --locked
	@echo; echo "What works on this host, and why not:"; echo
	@$(AS_ROOT) target/release/chandra check || true
	@echo; echo "Open http://$(LISTEN)/ for people, http://$(LISTEN)/metrics for Prometheus. Ctrl-C ends it."; echo
	@exec $(AS_ROOT) target/release/chandra --web.listen-address $(LISTEN)

.PHONY: test
# The churn test measures time, which a loaded emulator does not keep: here it runs natively only.
test: setup lint generate-check rendered-check ## Everything that a development machine can check
	@objects=$$(tools/objects) || exit; [ -z "$$objects" ] || export CHANDRA_EBPF_OBJECTS=$$objects; \
	cargo test --locked --workspace || exit; \
	cargo test --locked --manifest-path nccl-profiler/Cargo.toml || exit; \
	tests/nccl-sim/check straggler kinds versions || exit; \
	if tests/vm/fetch $(KERNEL); then CHANDRA_KERNEL_TEST_ARGS="--skip churn::" tools/kernel-test "$(SIGNAL)" $(KERNEL); \
	else echo "SKIPPED: kernel tests in a VM (see above)"; [ -z "$$CI" ]; fi

.PHONY: setup
setup:
	tools/setup test

.PHONY: lint
lint: ## Format, clippy, cargo-deny, shellcheck
	cargo fmt --check
	cargo fmt --check --manifest-path exporter-ebpf/Cargo.toml
	cargo fmt --check --manifest-path nccl-profiler/Cargo.toml
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --manifest-path nccl-profiler/Cargo.toml --all-targets -- -D warnings
	cargo deny --log-level error check licenses bans sources
	cargo deny --manifest-path nccl-profiler/Cargo.toml --config deny.toml --log-level error check licenses bans sources
	shellcheck $(SHELL_FILES)

.PHONY: ebpf
ebpf: ## Rebuild the committed BPF objects
	exporter-ebpf/build exporter-ebpf/objects

.PHONY: generate
generate: ebpf ## Rewrite all generated files
	cargo run --quiet --locked --bin chandra -- metrics >docs/metrics.md
	cargo run --quiet --locked --package chandra-mixin -- render

.PHONY: generate-check
generate-check:
	@cargo run --quiet --locked --bin chandra -- metrics | diff -u docs/metrics.md - || \
		{ echo "docs/metrics.md is not what the sources make: run make generate" >&2; exit 1; }
	@cargo run --quiet --locked --package chandra-mixin -- render --check || { echo "run make generate" >&2; exit 1; }

.PHONY: rendered-check
rendered-check: ## Dashboards, manifests and Helm values against Grafana's types, the operator's models, the charts
	tests/schema/check
	tests/helm/check

.PHONY: mutate-rules
mutate-rules: setup ## Change every threshold and duration of the alerts: each change has to break a test
	cargo test --quiet --locked --package chandra-mixin --test mutate -- --nocapture

.PHONY: kernel-test
kernel-test: setup ## Kernel tests in a VM: KERNEL=5.10|6.1|6.12|6.18|7.2|7.3|newest SIGNAL=tcp
	tools/kernel-test "$(SIGNAL)" $(KERNEL)

.PHONY: kernel-matrix
kernel-matrix: setup ## Kernel tests on every kernel
	tools/kernel-test "$(SIGNAL)" $(KERNELS)

.PHONY: scenario
scenario: setup ## Incidents replayed in a VM, from the cause to the webhook: NAME=loss KERNEL=6.12
	tools/scenario -k $(KERNEL) $(NAME)

.PHONY: nccl-wheels
nccl-wheels: setup ## The profiler plugin, and what is probed, in real NCCL libraries (300 MB of packages for each version)
	tests/nccl-wheels/check
	CHANDRA_NCCL_VERSIONS=all cargo test --locked --package exporter --test nccl_wheels -- --nocapture

.PHONY: churn
churn: setup ## 500 pods created and deleted on this host, with every rule of the counters checked (needs root)
	CHANDRA_CHURN_PODS=500 cargo test --locked --test kernel -- --nocapture churn::

.PHONY: bench
bench: setup ## Overhead, scrape time, memory, sizes (needs root); queue pairs and encrypted packets in a VM
	cargo build --release --locked --bins --examples
	cargo bench --locked --bench overhead
	@if tests/vm/fetch $(KERNEL); then tools/kernel-bench $(KERNEL) rdma encryption; else echo "SKIPPED: what needs a VM (see above)"; fi
