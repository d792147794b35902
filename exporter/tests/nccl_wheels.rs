// SPDX-License-Identifier: Apache-2.0
//! `nccl` against real NCCL libraries, without a GPU: which functions are found and probed, versions, build ids, arguments, and
//! where a communicator has its number and its rank.
//!
//! The libraries are those of the packages nvidia-nccl-cu12, 300 MB each, in `$CHANDRA_CACHE/nccl/VERSION`. Three are downloaded, or those that
//! CHANDRA_NCCL_VERSIONS names (`all`: `make nccl-wheels`); of the others what is there is used, and what cannot be had is skipped.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

mod common;

use common::*;

/// Versions, and where their communicators have commHash, rank, nRanks and seqNumber, by the libraries' debug information.
/// The first is too old to be known; it crashes on a communicator that is none.
const VERSIONS: [(&str, Option<[i64; 4]>); 8] = [
    ("2.18.3", None),
    ("2.21.5", Some([13528, 13536, 13540, -1])),
    ("2.26.2", Some([492_720, 492_728, 492_732, 501_008])),
    ("2.27.5", Some([1_066_160, 1_066_168, 1_066_172, 1_074_512])),
    ("2.28.9", Some([1_066_184, 1_066_192, 1_066_196, 1_075_728])),
    ("2.29.7", Some([1_181_392, 1_181_400, 1_181_404, 1_191_544])),
    ("2.30.7", Some([1_181_416, 1_181_424, 1_181_428, 1_191_576])),
    ("2.32.3", Some([1_181_408, 1_181_416, 1_181_420, 1_193_800])),
];

/// Functions of the interface with the label of each.
const FUNCTIONS: [(&str, &str); 13] = [
    ("ncclAllReduce", "all_reduce"),
    ("ncclReduceScatter", "reduce_scatter"),
    ("ncclAllGather", "all_gather"),
    ("ncclBroadcast", "broadcast"),
    ("ncclReduce", "reduce"),
    ("ncclAlltoAll", "all_to_all"),
    ("ncclGather", "gather"),
    ("ncclScatter", "scatter"),
    ("ncclSend", "send"),
    ("ncclRecv", "recv"),
    ("ncclPutSignal", "put_signal"),
    ("ncclSignal", "signal"),
    ("ncclWaitSignal", "wait_signal"),
];

fn cached(version: &str) -> Option<PathBuf> {
    let wanted = env::var("CHANDRA_NCCL_VERSIONS");
    let wanted = wanted.unwrap_or_else(|_| "2.18.3 2.27.5 2.32.3".to_owned());
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/nccl-wheels");
    let get = wanted == "all" || wanted.split_whitespace().any(|one| one == version);
    let output = Command::new(tests.join("fetch"))
        .args((!get).then_some("--cached"))
        .arg(version)
        .stderr(Stdio::inherit())
        .output()
        .expect("sh");
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let there = output.status.success() && !path.is_empty();
    there.then(|| path.into())
}

struct Loader {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Loader {
    fn start(program: &Path, library: &Path, places: [i64; 4]) -> Self {
        let mut child = Command::new(program)
            .arg(library)
            .args(places.map(|place| place.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the loader starts");
        let says = BufReader::new(child.stdout.take().expect("piped"));
        let mut loader = Self { child, says };
        loader.hear("ready");
        loader
    }

    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim() != word {
            line.clear();
            let read = self.says.read_line(&mut line).expect("it speaks");
            assert_ne!(read, 0, "the loader ended before {word:?}");
        }
    }

    fn does(&mut self, what: &str) {
        writeln!(self.child.stdin.as_ref().expect("piped"), "{what}").expect("it listens");
        self.hear("done");
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn attached(scrape: &Scrape, hook: &str) -> bool {
    let labels = [("signal", "nccl"), ("hook", hook), ("reason", "attached")];
    scrape.sum("chandra_hook_info", &labels) == 1.0
}

fn unreadable(scrape: &Scrape) -> f64 {
    let labels = [("signal", "nccl"), ("reason", "unreadable")];
    scrape.sum("chandra_lost_events_total", &labels)
}

#[test]
fn real_libraries_are_found_and_their_calls_understood() {
    let kernel = chandra::kernel::Kernel::read();
    if !kernel.may_trace() || !succeeds("cc --version && nm --version && readelf --version") {
        return skip("needs root, a C compiler and binutils");
    }
    let program = build().join("nccl-loader");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl_wheels/loader.c");
    run(&format!(
        "cc -O2 -Wall -Werror -o {} {} -ldl",
        program.display(),
        source.display()
    ));
    let mut met = 0;
    for (version, places) in VERSIONS {
        if let Some(library) = cached(version) {
            one(version, places, &library, &program);
            met += 1;
        }
    }
    println!("{met} of {} versions", VERSIONS.len());
}

fn one(version: &str, places: Option<[i64; 4]>, library: &Path, program: &Path) {
    println!("NCCL {version}");
    let shown = library.display();
    let mut loader = Loader::start(program, library, places.unwrap_or([-1; 4]));
    let exporter = Exporter::start(&["--pods", "none", "--web.show-paths"]);
    let scrape = exporter.scrape_until("it is probed", |scrape| {
        attached(scrape, "ncclEnqueueCheck")
    });

    // What the library has, by binutils.
    let exported = run(&format!("nm -D --defined-only {shown}"));
    let exports = |name: &str| {
        exported
            .lines()
            .any(|line| line.ends_with(&format!(" {name}")))
    };
    // All of them come through one place, which is probed instead.
    for (function, _) in FUNCTIONS {
        assert!(!attached(&scrape, function), "{function}");
    }
    for function in [
        "ncclCommInitRank",
        "ncclCommInitRankConfig",
        "ncclCommInitRankScalable",
        "ncclCommInitAll",
        "ncclCommSplit",
        "ncclCommShrink",
        "ncclCommGrow",
        "ncclCommDestroy",
        "ncclCommAbort",
    ] {
        assert_eq!(attached(&scrape, function), exports(function), "{function}");
    }
    for phase in [
        "ncclCommInitRankFunc",
        "bootstrapInit",
        "commAlloc",
        "initTransportsRank",
    ] {
        assert!(attached(&scrape, phase), "{phase}");
    }
    let refused = [("signal", "nccl"), ("reason", "failed")];
    assert_eq!(scrape.sum("chandra_hook_info", &refused), 0.0);

    let notes = run(&format!("readelf -n {shown}"));
    let id = notes
        .lines()
        .find_map(|line| line.trim().strip_prefix("Build ID: "));
    let page = exporter.get("/");
    assert!(page.contains(&format!("NCCL {version}: ")), "{page}");
    assert!(
        id.is_none_or(|id| page.contains(&format!("build id {id}"))),
        "{page}"
    );
    let from_the_middle = places.is_some_and(|[.., sequence]| sequence >= 0);
    assert_eq!(page.contains("from their beginning only"), !from_the_middle);

    // One that crashes on what is no communicator is not called.
    let Some([.., sequence]) = places else { return };
    let mut collectives = 0.0;
    for (index, (function, operation)) in FUNCTIONS.into_iter().enumerate() {
        let times = if exports(function) { 3 + index } else { 0 };
        loader.does(&format!("call {function} 0 {times}"));
        collectives += if index < 8 { times as f64 } else { 0.0 };
        let scrape = exporter.scrape();
        let seen = scrape.sum(
            "chandra_nccl_enqueue_seconds_count",
            &[("operation", operation)],
        );
        assert_eq!(seen, times as f64, "{function}");
    }
    loader.does("call ncclBcast 0 4");
    let scrape = exporter.scrape();
    let seen = scrape.sum(
        "chandra_nccl_enqueue_seconds_count",
        &[("operation", "broadcast")],
    );
    assert_eq!(seen, 6.0 + 4.0, "ncclBcast calls ncclBroadcast");
    if sequence < 0 {
        assert_eq!(unreadable(&scrape), collectives + 4.0, "{}", scrape.text);
        return;
    }
    assert_eq!(unreadable(&scrape), 0.0, "{}", scrape.text);

    // Two ranks, of which the second comes 20 ms later, ten times.
    loader.does("number 1000");
    for _ in 0..10 {
        loader.does("call ncclAllReduce 0 1");
        thread::sleep(Duration::from_millis(20));
        loader.does("call ncclAllReduce 1 1");
    }
    let scrape = exporter.scrape();
    let of = |metric: &str, rank: &str| {
        let labels = [
            ("communicator", "abcdef0123456789"),
            ("rank", rank),
            ("source", "host"),
        ];
        scrape.sum(metric, &labels)
    };
    // The first made the second known.
    for (rank, last) in [("0", 0.0), ("1", 9.0)] {
        let collectives = of("chandra_nccl_rank_collectives_total", rank);
        assert_eq!(collectives, 9.0, "{rank}: {}", scrape.text);
        assert_eq!(of("chandra_nccl_rank_last_arrivals_total", rank), last);
    }
    let waited = of("chandra_nccl_rank_wait_seconds_total", "0");
    assert!((0.18..0.4).contains(&waited), "{waited} s");
    assert_eq!(of("chandra_nccl_rank_wait_seconds_total", "1"), 0.0);

    // An initialisation that fails leaves nothing behind.
    loader.does("init");
    thread::sleep(Duration::from_secs(2));
    let scrape = exporter.scrape();
    assert_eq!(scrape.sum("chandra_nccl_oldest_pending_seconds", &[]), 0.0);
    let text = fs::read_to_string(format!("/proc/{}/maps", loader.child.id())).expect("it lives");
    assert!(text.contains("libnccl"), "it has not crashed");
    println!(
        "  {} functions, waits {:.4} s of 9 times 20 ms",
        FUNCTIONS.len(),
        waited
    );
}
