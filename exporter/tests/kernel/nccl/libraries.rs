// SPDX-License-Identifier: Apache-2.0
//! What NCCL of today has, what RCCL does otherwise, and what becomes of a library that there is no room for.

use super::*;

const CALLS: &str = "chandra_nccl_enqueue_seconds_count";

/// RCCL, whose numbers of versions are NCCL's.
pub(super) fn built_rccl() -> Option<PathBuf> {
    let flags = r#"-DSIM_RCCL -DSIM_VERSION=22705 -DSIM_VERSION_TEXT="2.27.5-HEAD:0d2c4fd""#;
    built("rccl", flags, RCCL)
}

fn calls(scrape: &Scrape, operation: &str) -> f64 {
    scrape.sum(CALLS, &[("operation", operation)])
}

/// A job from its beginning to its truth.
fn truth(folder: &Path, arguments: &str) -> Vec<Value> {
    let mut job = Job::start(folder, &format!("{arguments} --wait"));
    job.hear("ready");
    job.tell("");
    job.truth()
}

fn calls_agree(scrape: &Scrape, truth: &[Value], operations: &[&str]) {
    let truth = by_operation(truth, "calls");
    for operation in operations {
        let called = truth.get(*operation).copied().unwrap_or_default();
        assert!(called > 0.0, "the job has called {operation}: {truth:?}");
        let counted = calls(scrape, operation);
        assert_eq!(counted, called, "{operation}\n{}", scrape.text);
    }
}

#[test]
fn a_communicator_that_grows_is_followed_from_its_beginning() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let collectives = at_most(500);
    let mut inits = 0.0;
    for how in ["", "--threads"] {
        let how = format!("--ranks 6 --communicators 2 --grow 2 --collectives {collectives} {how}");
        let truth = truth(&folder, &format!("{how} --straggler 1 --delay-us 3000"));
        assert_eq!(truth.len(), 10, "four ranks, and six of what has grown");
        let scrape = exporter.scrape();
        agrees(&scrape, &truth);
        assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
        inits += 10.0;
        let total = [("phase", "total")];
        assert_eq!(scrape.sum("chandra_nccl_init_seconds_count", &total), inits);
    }
    // What is not made yet when the call returns is found at its first collective.
    let truth = truth(
        &folder,
        &format!("--ranks 6 --communicators 2 --grow 2 --collectives {collectives} --blocking 0"),
    );
    let scrape = exporter.scrape();
    for rank in truth.iter().filter(|rank| number(&rank["nranks"]) == 6.0) {
        let missed = number(&rank["collectives"]) - of_rank(&scrape, COLLECTIVES, rank);
        assert!((0.0..=2.0).contains(&missed), "{rank}\n{}", scrape.text);
    }
}

#[test]
fn signals_are_operations_of_their_own() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let truth = truth(
        &folder,
        "--ranks 2 --collectives 20 --kinds all_reduce,put_signal --straggler 1 --delay-us 3000",
    );
    let scrape = exporter.scrape();
    calls_agree(
        &scrape,
        &truth,
        &["all_reduce", "put_signal", "signal", "wait_signal"],
    );
    agrees(&scrape, &truth);
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
}

#[test]
fn rccl_is_followed_by_what_it_exports() {
    let _alone = alone();
    let Some(folder) = can_trace().then(built_rccl).flatten() else {
        return;
    };
    let idle = Job::start(
        &folder,
        "--ranks 1 --communicators 1 --collectives 1 --wait",
    );
    let exporter = Exporter::start(&["--pods", "none"]);
    exporter.until_attached("nccl", "ncclAllToAllv");
    let page = exporter.get("/");
    assert!(page.contains("RCCL 2.27.5: librccl.so.1"), "{page}");
    let truth = truth(&folder, "--ranks 4 --communicators 4 --collectives 66");
    let scrape = exporter.scrape();
    assert!(!scrape.has("chandra_hook_info", "hook=\"ncclEnqueueCheck\""));
    let operations = [
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "reduce",
        "all_to_all",
        "gather",
        "scatter",
        "send",
        "recv",
    ];
    // Half of its all-to-alls are ncclAllToAllv's, which call ncclAllToAll; an all-reduce and a send call themselves once more.
    calls_agree(&scrape, &truth, &operations);
    let all: f64 = truth.iter().map(|rank| number(&rank["collectives"])).sum();
    assert_eq!(scrape.sum(COLLECTIVES, &[]), all, "{}", scrape.text);
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    let phases = |phase| scrape.sum("chandra_nccl_init_seconds_count", &[("phase", phase)]);
    assert!(phases("total") >= 12.0, "{}", scrape.text);
    assert_eq!(phases("transports"), 0.0);
    drop(idle);
}

#[test]
fn a_library_without_room_is_probed_once_there_is_some() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let copies = tempfile::tempdir().expect("a folder");
    // One more than what one unit may have probes for, each of which takes 25 of 96.
    let mut jobs: Vec<_> = (0..4)
        .map(|copy| {
            let own = copied(&folder, copies.path(), copy);
            Job::start(&own, "--ranks 1 --communicators 1 --collectives 1 --wait")
        })
        .collect();
    let exporter = Exporter::start(&["--pods", "none"]);
    let refused = |scrape: &Scrape| scrape.has("chandra_hook_info", "reason=\"no_room\"");
    exporter.scrape_until("one has no room", refused);
    exporter.until_attached("nccl", "ncclEnqueueCheck");
    // Which of them it is that has none is not said: whoever ends, once two have ended all that are left are probed.
    drop(jobs.drain(..2));
    exporter.scrape_until("there is room", |scrape| !refused(scrape));
    let mut last = jobs.pop().expect("two are left");
    let before = calls(&exporter.scrape(), "all_reduce");
    last.tell("");
    last.truth();
    let after = calls(&exporter.scrape(), "all_reduce");
    assert_eq!(after, before + 1.0, "{}", exporter.scrape().text);
}
