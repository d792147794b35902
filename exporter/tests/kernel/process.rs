// SPDX-License-Identifier: Apache-2.0
//! The exporter as a guest of the node: what it leaves behind.

use std::time::Duration;

use super::{can_trace, common::*, skip};

/// Programs and maps of ours that the kernel holds, by any process.
fn ours() -> String {
    run(
        "bpftool prog show 2>/dev/null | grep -E 'name tcp_retransmit_s' || true; bpftool map show 2>/dev/null | grep -E 'name RETRANSMITS' || true",
    )
}

#[test]
fn nothing_of_ours_remains_in_the_kernel_however_it_ends() {
    if !can_trace() {
        return;
    }
    if !succeeds("bpftool version") {
        return skip("needs bpftool");
    }
    // SIGKILL leaves no time to clean up: the kernel has to do it with the process's descriptors.
    for signal in ["TERM", "INT", "KILL"] {
        let before = ours();
        let mut exporter = Exporter::start(&["--pods", "none"]);
        assert!(ours().len() > before.len(), "bpftool sees the programs");
        let (status, took) = exporter.stop(signal);
        assert_eq!(
            status.code(),
            (signal != "KILL").then_some(0),
            "after SIG{signal}"
        );
        assert!(took < Duration::from_secs(2), "SIG{signal} took {took:?}");
        // Programs and maps are freed after a grace period.
        let freed = (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            ours() == before
        });
        assert!(freed, "SIG{signal} left:\n{}", ours());
    }
}
