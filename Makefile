# Chandra: the only entry points. `make run` and `make test` install what they need.

KERNEL ?= 6.12
SIGNAL ?=
KERNELS ?= 5.10 6.1 6.12 6.18 newest
HOST_ARCH := $(if $(filter aarch64,$(shell uname -m)),arm64,amd64)
ARCH ?= $(HOST_ARCH)
LISTEN ?= 127.0.0.1:9970

CACHE := $(or $(CHANDRA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/chandra)
export PATH := $(CACHE)/tools/bin:$(PATH):/usr/sbin:/sbin
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

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

.PHONY: quick
quick: ## Format, clippy, unit, golden and rule tests: no root, no network, no VM
	@tools/checks quick

.PHONY: test
test: setup ## Everything that decides if a change is good, in a quarter of an hour: quick, servers, native kernel tests, one VM
	@KERNEL=$(KERNEL) tools/checks test

.PHONY: nightly
nightly: setup ## All there is, part by part: goes on where it was interrupted, FRESH=1 begins anew; table in target/nightly.md
	@FRESH=$(FRESH) tools/checks nightly

.PHONY: setup
setup:
	@[ -n "$(CHECKED)" ] || tools/setup test

.PHONY: ebpf
ebpf: ## Rebuild the committed BPF objects
	exporter-ebpf/build exporter-ebpf/objects
	tools/objects --record exporter-ebpf/objects

.PHONY: generate
generate: ebpf ## Rewrite all generated files
	cargo run --quiet --locked --bin chandra -- metrics >docs/metrics.md
	cargo run --quiet --locked --package chandra-mixin -- render

.PHONY: mutate-rules
mutate-rules: setup ## Change every threshold and duration of the alerts: each change has to break a test; SIGNAL=tcp
	SIGNAL=$(SIGNAL) cargo test --quiet --locked --package chandra-mixin --test mutate -- --nocapture

.PHONY: incidents
incidents: setup ## Twelve incidents at once through Prometheus and Alertmanager: the alerts expected and no other
	cargo test --quiet --locked --package chandra-mixin --test incidents -- --ignored --nocapture

.PHONY: kernel-test
kernel-test: setup ## Kernel tests in a VM: KERNEL=5.10|6.1|6.12|6.18|7.2|7.3|newest SIGNAL=tcp
	tools/kernel-test "$(SIGNAL)" $(KERNEL)

.PHONY: privileges
privileges: setup ## Take each capability away on 5.10 and 6.12, and write what stops into docs/security.md
	UPDATE_GOLDEN=1 CHANDRA_VM_CPUS=1 tools/kernel-test capabilities 5.10 6.12

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

.PHONY: dashboards
dashboards: setup ## Draw every dashboard with Grafana's components, and say what is wrong with it
	tools/setup browser
	tests/dashboards/draw

.PHONY: demo
demo: setup ## The dashboards live, with an incident every two minutes, all made up: PORT=3000
	tools/setup browser
	tests/dashboards/demo $(PORT)

.PHONY: bpftrace
bpftrace: setup ## The scripts of docs/bpftrace and the runbooks' commands in a VM: KERNEL=5.10
	cargo build --quiet --locked --bin chandra
	tests/bpftrace/check $(KERNEL)

.PHONY: image
image: ## The image as an archive, without a container engine, and what is in it run: ARCH=amd64|arm64
	tools/setup image
	$(if $(filter arm64,$(ARCH)),tools/setup arm64)
	mkdir -p target
	tools/image --arch $(ARCH) target/chandra-$(ARCH).tar
	$(if $(filter $(HOST_ARCH),$(ARCH)),$(AS_ROOT) tests/image/check,tests/vm/run --arch $(ARCH) $(KERNEL) tests/image/check) target/chandra-$(ARCH).tar

.PHONY: image-pod
image-pod: setup image ## The image in the pod that the chart renders, run by podman in a VM: each signal's smoke test. KERNEL=6.12
	tests/image/pod target/chandra-$(HOST_ARCH).tar $(KERNEL)

.PHONY: kernel-test-arm64
kernel-test-arm64: ## Kernel tests on Debian's arm64 kernel, emulated
	tools/setup arm64
	tools/kernel-test --arch arm64 "$(or $(SIGNAL),tcp)" $(KERNEL)

.PHONY: churn
churn: setup ## 500 pods created and deleted on this host, with every rule of the counters checked (needs root)
	CHANDRA_CHURN_PODS=500 cargo test --locked --test kernel -- --nocapture churn::

.PHONY: bench
bench: setup ## Overhead, scrape time, memory, sizes (needs root); queue pairs and encrypted packets in a VM
	cargo build --release --locked --bins --examples
	cargo bench --locked --bench overhead
	@if tests/vm/fetch $(KERNEL); then tools/kernel-bench $(KERNEL) rdma encryption; else echo "SKIPPED: what needs a VM (see above)"; fi
