// SPDX-License-Identifier: Apache-2.0
//! The exporter as a guest of the node: what it leaves behind.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use super::{alone, can_trace, common::*, skip};

/// The programs and maps that a process holds, as `prog` or `map` and an id, from its descriptors.
pub(crate) fn held(pid: u32) -> BTreeSet<(&'static str, String)> {
    // Some descriptors are closed meanwhile.
    let text = run(&format!("cat /proc/{pid}/fdinfo/* 2>/dev/null || true"));
    let ids = text.lines().filter_map(|line| {
        let (key, id) = line.split_once(':')?;
        let kind = match key {
            "prog_id" => "prog",
            "map_id" => "map",
            _ => return None,
        };
        Some((kind, id.trim().to_owned()))
    });
    ids.collect()
}

/// Says if this host can tell what is in its kernel, and prints why not.
pub(crate) fn can_look_into_the_kernel() -> bool {
    let can = succeeds("bpftool version");
    if !can {
        skip("needs bpftool");
    }
    can
}

/// Waits until the kernel has freed programs and maps, which it does after a grace period.
pub(crate) fn is_freed(held: &BTreeSet<(&'static str, String)>) {
    let end = Instant::now() + Duration::from_secs(60);
    while !held.is_disjoint(&in_kernel()) {
        assert!(Instant::now() < end, "some are left of {held:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What is in the kernel, whoever holds it.
fn in_kernel() -> BTreeSet<(&'static str, String)> {
    let ids = |kind: &'static str| {
        let text = run(&format!("bpftool -j {kind} show"));
        let list: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let list = list.as_array().cloned().unwrap_or_default();
        list.into_iter()
            .map(move |one| (kind, one["id"].to_string()))
    };
    ids("prog").chain(ids("map")).collect()
}

#[test]
fn nothing_of_ours_remains_in_the_kernel_however_it_ends() {
    let _alone = alone();
    if !can_trace() || !can_look_into_the_kernel() {
        return;
    }
    // SIGKILL leaves no time to clean up: the kernel has to do it with the process's descriptors.
    for signal in ["TERM", "INT", "KILL"] {
        let mut exporter = Exporter::start(&["--pods", "none"]);
        let held = held(exporter.pid);
        let programs = held.iter().filter(|(kind, _)| *kind == "prog").count();
        assert!(programs >= 2 && held.len() > programs, "{held:?}");
        assert!(held.is_subset(&in_kernel()), "bpftool sees all of {held:?}");
        let (status, took) = exporter.stop(signal);
        assert_eq!(
            status.code(),
            (signal != "KILL").then_some(0),
            "after SIG{signal}"
        );
        // The kernel waits for a grace period for each probe that it takes out.
        assert!(took < Duration::from_secs(60), "SIG{signal} took {took:?}");
        is_freed(&held);
    }
}
