// SPDX-License-Identifier: Apache-2.0
//! What a queue pair costs the kernel to create, to modify and to destroy, and what the programs add to each.

use std::process::Command;

use aya::sys::{Stats, enable_stats};

use super::{Several, exporter::Exporter, note};
use crate::common::{Scrape, build, run, succeeds};

/// How often: without the exporter, with it, and with statistics, in turn.
const ROUNDS: usize = 10;

/// Queue pairs each time; the lower quartile of each operation counts.
const PAIRS: usize = 400;

/// What is measured, with its programs.
const OPERATIONS: [(&str, &[&str]); 3] = [
    ("create", &["create", "create_return"]),
    ("modify", &["modify_user", "modify_return"]),
    ("destroy", &["destroy", "destroy_return"]),
];

/// A device of rdma_rxe. Removed when dropped.
struct Rxe;

impl Drop for Rxe {
    fn drop(&mut self) {
        succeeds("rdma link del rxe0; ip link del chandra0");
    }
}

/// Says why nothing can be measured here.
pub(crate) fn missing() -> Option<&'static str> {
    let can = succeeds("modprobe -qa rdma_rxe ib_uverbs && command -v rdma");
    (!can).then_some("needs root, rdma_rxe and the rdma tool; `make bench` has them in a VM")
}

/// Nanoseconds of each operation, as `verbs` measures them.
fn time() -> [f64; 3] {
    let output = Command::new(build().join("examples/verbs"))
        .args(["/dev/infiniband/uverbs0", "time", &PAIRS.to_string()])
        .output()
        .expect("verbs runs");
    assert!(output.status.success(), "verbs failed");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut numbers = text
        .split_whitespace()
        .map(|number| number.parse().expect("a number"));
    std::array::from_fn(|_| numbers.next().expect("three numbers"))
}

/// Nanoseconds that the programs of an operation ran for each time that it was done.
fn ran(scrape: &Scrape, programs: &[&str]) -> f64 {
    let each = programs.iter().map(|program| {
        let of = |metric| scrape.sum(metric, &[("signal", "rdma"), ("program", program)]);
        let runs = of("chandra_program_runs_total");
        assert!(runs > 0.0, "{program} did not run");
        1e9 * of("chandra_program_run_seconds_total") / runs
    });
    each.sum()
}

/// Prints the table.
pub(crate) fn per_operation() {
    run(
        "modprobe -a rdma_rxe ib_uverbs; ip link add chandra0 type dummy
         ip addr add 10.78.0.1/24 dev chandra0; ip link set chandra0 up
         rdma link add rxe0 type rxe netdev chandra0; mkdir -p /dev/infiniband
         [ -e /dev/infiniband/uverbs0 ] || sleep 1
         [ -e /dev/infiniband/uverbs0 ] ||
           mknod /dev/infiniband/uverbs0 c $(tr : ' ' </sys/class/infiniband_verbs/uverbs0/dev)",
    );
    let _rxe = Rxe;
    note(&"queue pairs of rdma_rxe");
    let [mut without, mut with, mut programs] = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        without.push(time());
        let exporter = Exporter::start(&["--pods", "none"]);
        with.push(time());
        let created = exporter
            .scrape()
            .sum("chandra_rdma_queue_pairs_created_total", &[]);
        assert_eq!(created, PAIRS as f64, "the exporter counts the load");
        let _statistics = enable_stats(Stats::RunTime).expect("a kernel from 5.8 and root");
        time();
        let scrape = exporter.scrape();
        programs.push(OPERATIONS.map(|(_, programs)| ran(&scrape, programs)));
    }
    without.push(time());
    println!(
        "| Queue pair of rdma_rxe | Programs | Kernel alone, ns | Added by Chandra, ns | Share | Programs by bpf statistics, ns |"
    );
    println!("|---|---|--:|--:|--:|--:|");
    for (i, (operation, names)) in OPERATIONS.iter().enumerate() {
        // Against the mean of the times before and after, since the machine's speed drifts.
        let added = without
            .windows(2)
            .zip(&with)
            .map(|(around, with)| with[i] - (around[0][i] + around[1][i]) / 2.0);
        let added = Several::new(added.collect());
        let alone = Several::new(without.iter().map(|all| all[i]).collect());
        let ran = Several::new(programs.iter().map(|all| all[i]).collect());
        println!(
            "| {operation} | `{}` | {} | {} | {:.1} % | {} |",
            names.join("`, `"),
            alone.quartiles(),
            added.quartiles(),
            100.0 * added.median() / alone.median(),
            ran.quartiles(),
        );
    }
    println!(
        "\nMedian (quartiles) of {ROUNDS} rounds of {PAIRS} queue pairs, of each the lower quartile. An adapter's own commands \
         take far longer than those of rdma_rxe, so the share on one is far smaller.\n"
    );
}
