// SPDX-License-Identifier: Apache-2.0
//! What each signal's `smoke` test has in common: all hooks attached, some events counted to the last one, then nothing left in
//! the kernel. `make test` runs them together in one VM; the other tests of a signal are `make kernel-test`.

use chandra::signals::SIGNALS;

use super::{common::*, process};

/// What is no fault: a function that this kernel does not have or names otherwise, one whose probe would cost too much.
const ABSENT: [&str; 2] = ["no_hook", "expensive"];

/// An exporter with one signal alone, once it is up.
pub(crate) fn start(signal: &str, flags: &[&str]) -> Exporter {
    let others: Vec<_> = SIGNALS
        .iter()
        .map(|entry| entry.name)
        .filter(|name| *name != signal)
        .collect();
    let others = others.join(",");
    let exporter = Exporter::start(&[&["--disable", &others], flags].concat());
    exporter.until_state(signal, "up");
    exporter
}

/// Holds that every hook is attached that this kernel has, and nothing is lost; ends it, and holds that nothing of it remains.
pub(crate) fn ends(signal: &str, mut exporter: Exporter) {
    let scrape = exporter.scrape();
    let of_signal = format!("signal=\"{signal}\"");
    let hooks: Vec<_> = scrape
        .series
        .keys()
        .filter(|series| series.starts_with("chandra_hook_info{") && series.contains(&of_signal))
        .collect();
    let (attached, others): (Vec<_>, Vec<_>) = hooks
        .into_iter()
        .partition(|series| series.contains("reason=\"attached\""));
    println!(
        "{signal}: {} hooks attached, not there: {others:?}",
        attached.len()
    );
    assert!(!attached.is_empty(), "{}", scrape.text);
    for hook in others {
        let absent = |reason: &&str| hook.contains(&format!("reason=\"{reason}\""));
        assert!(ABSENT.iter().any(absent), "{hook}");
    }
    let lost = scrape.sum("chandra_lost_events_total", &[("signal", signal)]);
    assert_eq!(lost, 0.0, "{}", scrape.text);
    let held = process::held(exporter.pid);
    assert!(!held.is_empty(), "it holds no program");
    let (status, took) = exporter.stop("TERM");
    println!("{signal}: ended in {took:?}");
    assert!(status.success(), "{status}");
    process::is_freed(&held);
    let probes = "cat /sys/kernel/debug/kprobes/list 2>/dev/null || true";
    assert_eq!(run(probes), "", "kprobes are left");
}
