// SPDX-License-Identifier: Apache-2.0
//! What does Chandra cost? Prints the tables of `docs/overhead.md`: `make bench`.
//!
//! Needs root, cgroup v2 and network namespaces; what cannot be measured here is named below the tables. The exporter
//! is the release binary as a process of its own. Nothing of the host is changed, and whatever ends this program,
//! nothing of it stays.
#![forbid(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "overhead/encryption.rs"]
mod encryption;
#[path = "overhead/exporter.rs"]
mod exporter;
#[path = "overhead/gpu.rs"]
mod gpu;
#[path = "overhead/load.rs"]
mod load;
#[path = "overhead/pods.rs"]
mod pods;
#[path = "overhead/rdma.rs"]
mod rdma;
#[path = "../tests/common/screen.rs"]
mod screen;
#[path = "overhead/top.rs"]
mod top;

use std::{
    env,
    fmt::Display,
    fs,
    io::{self, Write},
    ops::Range,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use aya::sys::{Stats, enable_stats};
use chandra::kernel::{Hierarchy, Kernel};
use exporter::Exporter;
use load::{Lab, Load, uptime};
use pods::Pods;

/// How often a load runs without the exporter, with it, and with statistics, in turn.
const ROUNDS: usize = 20;

/// From when all sockets are open until as many retransmits fall due in each second.
const SETTLE: Duration = Duration::from_secs(3);

/// How long each time: some twenty batches of retransmits, of which the lower quartile counts, for interrupts and the
/// neighbours of a virtual machine only ever add.
const PHASE: Duration = Duration::from_millis(600);

/// Fewest batches that a phase counts with: a busy neighbour may take the CPU from the load.
const FEWEST: usize = 5;

/// Pods on the node, for each column.
const SIZES: [usize; 3] = [10, 100, 1000];

/// Starts of the exporter whose time is taken.
const STARTS: usize = 5;

/// Scrapes before resident memory is read.
const WARM: usize = 20;

/// Scrapes whose time is taken, and the pause before each, in which caches go cold and threads to sleep.
const SCRAPES: usize = 50;
const PAUSE: Duration = Duration::from_millis(100);

const MIB: f64 = 1024.0 * 1024.0;

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    if let Some(("load", rest)) = args.split_first().map(|(work, rest)| (work.as_str(), rest)) {
        return match rest.split_first() {
            Some((what, rest)) if what == "switch" => gpu::work(rest),
            _ => load::work(rest),
        };
    }
    // Two at once would measure each other.
    let lock = fs::File::create(common::build().join("overhead.lock")).expect("a writable folder");
    lock.lock().expect("a lock");
    let kernel = Kernel::read();
    let mut missing = Vec::new();
    let lab = if kernel.may_trace() && kernel.btf.is_ok() {
        Lab::new()
    } else {
        Err("needs root and a kernel with BTF")
    };
    let wanted = |part: &str| args.iter().all(|arg| arg.starts_with('-') || arg == part);
    match &lab {
        Ok(lab) if wanted("events") => per_event(lab),
        Ok(_) => {}
        Err(why) => missing.push(format!("retransmits: {why}")),
    }
    match Hierarchy::of_host(None).trouble() {
        _ if !wanted("scrapes") => {}
        None if kernel.may_trace() => per_scrape(lab.as_ref().ok()),
        None => missing.push("pods: needs root".to_owned()),
        Some(why) => missing.push(format!("pods: {why}")),
    }
    match rdma::missing() {
        _ if !wanted("rdma") => {}
        None => rdma::per_operation(),
        Some(why) => missing.push(format!("queue pairs: {why}")),
    }
    match gpu::missing() {
        _ if !wanted("switches") => {}
        None => gpu::per_switch(),
        Some(why) => missing.push(format!("context switches: {why}")),
    }
    match encryption::missing() {
        _ if !wanted("encryption") => {}
        None => encryption::per_packet(),
        Some(why) => missing.push(format!("encrypted packets: {why}")),
    }
    if wanted("top") && !top::per_screen() {
        missing.push("chandra top: tmux is missing".to_owned());
    }
    if wanted("sizes") {
        once(kernel.may_trace());
    }
    println!("{}", machine(&kernel));
    for row in missing {
        println!("Not measured: {row}.");
    }
}

/// Says on standard error what is being measured.
fn note(what: &dyn Display) {
    let _ = writeln!(io::stderr(), "measuring {what}");
}

/// Several measurements of one thing.
struct Several(Vec<f64>);

impl Several {
    fn new(mut all: Vec<f64>) -> Self {
        assert!(!all.is_empty(), "nothing was measured");
        all.sort_by(f64::total_cmp);
        Self(all)
    }

    /// The value that this part of all is below.
    fn quantile(&self, part: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * part).round() as usize]
    }

    fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    fn within(&self, low: f64, high: f64) -> String {
        let [middle, low, high] = [0.5, low, high].map(|part| self.quantile(part));
        format!("{middle:.0} ({low:.0} to {high:.0})")
    }

    fn quartiles(&self) -> String {
        self.within(0.25, 0.75)
    }

    fn range(&self) -> String {
        self.within(0.0, 1.0)
    }
}

/// What a retransmit costs the kernel, and what the programs add to it.
fn per_event(lab: &Lab) {
    println!(
        "| Segment sent again | Program | Kernel alone, ns | Added by Chandra, ns | Share | Program by bpf statistics, ns |"
    );
    println!("|---|---|--:|--:|--:|--:|");
    for load in Load::ALL {
        let (what, program) = match load {
            Load::Syn => ("SYN", "tcp_retransmit_skb"),
            Load::Rto => ("data", "tcp_retransmit_skb"),
            Load::SynAck => ("SYN-ACK", "tcp_retransmit_synack"),
        };
        note(&format_args!("retransmits of {what}"));
        let running = lab.start(load);
        thread::sleep(SETTLE);
        let [mut without, mut with] = [const { Vec::new() }; 2];
        let mut ran = Vec::new();
        for _ in 0..ROUNDS {
            without.push(phase());
            let exporter = Exporter::start(&["--pods", "none"]);
            with.push(phase());
            let counted = exporter.scrape().sum("chandra_tcp_retransmits_total", &[]);
            assert!(counted > 0.0, "the exporter counts the load");
            let _statistics = enable_stats(Stats::RunTime).expect("a kernel from 5.8 and root");
            thread::sleep(PHASE);
            let scrape = exporter.scrape();
            let of = |metric| scrape.sum(metric, &[("program", program)]);
            let runs = of("chandra_program_runs_total");
            assert!(runs > 0.0, "{program} did not run");
            ran.push(1e9 * of("chandra_program_run_seconds_total") / runs);
        }
        without.push(phase());
        let batches = running.stop();
        let cost = |phase: &Range<f64>| {
            let batches = batches.iter().filter(|batch| phase.contains(&batch.at));
            let costs: Vec<_> = batches.map(|batch| batch.cost).collect();
            (costs.len() >= FEWEST).then(|| Several::new(costs).quantile(0.25))
        };
        let without: Vec<_> = without.iter().map(cost).collect();
        // Against the mean of the phases before and after, since the machine's speed drifts.
        let added = without.windows(2).zip(&with).filter_map(|(around, with)| {
            let around = (around[0]? + around[1]?) / 2.0;
            Some(cost(with)? - around)
        });
        let (added, ran) = (Several::new(added.collect()), Several::new(ran));
        let alone = Several::new(without.into_iter().flatten().collect());
        println!(
            "| {what} | `{program}` | {} | {} | {:.1} % | {} |",
            alone.quartiles(),
            added.quartiles(),
            100.0 * added.median() / alone.median(),
            ran.quartiles(),
        );
    }
    println!(
        "\nMedian (quartiles) of {ROUNDS} rounds: without the exporter, with it, and with bpf statistics, whose two \
         readings of the clock are part of their number.\n"
    );
}

/// Lets the load run for a while, and returns when.
fn phase() -> Range<f64> {
    let begin = uptime();
    thread::sleep(PHASE);
    begin..uptime()
}

/// What one size of node measured.
struct Node {
    first_scrape: Several,
    cpu: [f64; 2],
    wall: Several,
    series: usize,
    plain: usize,
    gzip: usize,
    resident: f64,
    peak: f64,
}

/// What a scrape costs the exporter, by pods.
fn per_scrape(lab: Option<&Lab>) {
    let folder = tempfile::tempdir().expect("a folder");
    let list = folder.path().join("pods.json");
    let mut pods = Pods::new();
    let nodes = SIZES.map(|size| {
        note(&format_args!("{size} pods"));
        pods.grow(size, &list);
        node(&pods, size, &list.display().to_string(), lab)
    });
    let columns = SIZES.map(|size| format!("{size} pods")).join(" | ");
    println!("| Scrape | {columns} | Aim at {} pods |", SIZES[2]);
    println!("|---|--:|--:|--:|---|");
    let row = |what: &str, value: &dyn Fn(&Node) -> String, aim: String| {
        let [a, b, c] = [0, 1, 2].map(|i| value(&nodes[i]));
        println!("| {what} | {a} | {b} | {c} | {aim} |");
    };
    let most = &nodes[2];
    row(
        "CPU time, ms, gzipped",
        &|node| format!("{:.2}", node.cpu[0]),
        aim(most.cpu[0], 20.0, "< 20"),
    );
    row(
        "CPU time, ms, plain",
        &|node| format!("{:.2}", node.cpu[1]),
        String::new(),
    );
    row(
        "wall time, ms, median",
        &|node| format!("{:.1}", node.wall.median()),
        String::new(),
    );
    row(
        "wall time, ms, longest",
        &|node| format!("{:.1}", node.wall.quantile(1.0)),
        String::new(),
    );
    row("series", &|node| node.series.to_string(), String::new());
    let kib = |bytes: usize| format!("{:.1}", bytes as f64 / 1024.0);
    row("page, KiB, plain", &|node| kib(node.plain), String::new());
    row("page, KiB, gzipped", &|node| kib(node.gzip), String::new());
    row(
        &format!("resident memory after {WARM} scrapes, MiB"),
        &|node| format!("{:.1}", node.resident / MIB),
        aim(most.resident, 25.0 * MIB, "< 25"),
    );
    row(
        "peak resident memory, MiB",
        &|node| format!("{:.1}", node.peak / MIB),
        String::new(),
    );
    row(
        &format!("start to first page, ms, median (range) of {STARTS} starts"),
        &|node| node.first_scrape.range(),
        aim(most.first_scrape.median(), 1000.0, "< 1000"),
    );
    println!();
}

fn node(pods: &Pods, size: usize, list: &str, lab: Option<&Lab>) -> Node {
    let start = || Exporter::start(&["--pods", list]);
    let starts = (1..STARTS).map(|_| start().first_scrape.as_secs_f64() * 1e3);
    let mut starts: Vec<_> = starts.collect();
    let exporter = start();
    starts.push(exporter.first_scrape.as_secs_f64() * 1e3);
    let born = exporter.scrape();
    let named = |scrape: &common::Scrape, kind: &str, least: f64| {
        let series = scrape.series.iter();
        series
            .filter(|(name, value)| {
                name.contains("pod=\"decode-") && name.contains(kind) && **value >= least
            })
            .count()
    };
    assert_eq!(named(&born, "kind=\"syn\"", 0.0), size, "all are born at 0");
    if let Some(lab) = lab {
        let _knocking = lab.knock_from(&pods.cgroups());
        let end = Instant::now() + Duration::from_secs(60);
        // Each then has an entry in the kernel's map.
        while named(&exporter.scrape(), "kind=\"syn\"", 1.0) < size {
            assert!(Instant::now() < end, "not every pod sent again in 60 s");
            thread::sleep(PAUSE);
        }
    }
    for _ in 0..WARM {
        thread::sleep(PAUSE);
        exporter.fetch("gzip");
    }
    let resident = exporter.memory("VmRSS:");
    let mut wall = Vec::new();
    let cpu = ["gzip", "identity"].map(|coding| {
        let before = exporter.cpu();
        for _ in 0..SCRAPES {
            thread::sleep(PAUSE);
            let begin = Instant::now();
            exporter.fetch(coding);
            if coding == "gzip" {
                wall.push(begin.elapsed().as_secs_f64() * 1e3);
            }
        }
        (exporter.cpu() - before).as_secs_f64() * 1e3 / SCRAPES as f64
    });
    let (plain, gzip) = (exporter.fetch("identity"), exporter.fetch("gzip"));
    let series = plain
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty() && line[0] != b'#');
    Node {
        first_scrape: Several::new(starts),
        cpu,
        wall: Several::new(wall),
        series: series.count(),
        plain: plain.len(),
        gzip: gzip.len(),
        resident,
        peak: exporter.memory("VmHWM:"),
    }
}

/// What does not depend on events or pods.
fn once(root: bool) {
    note(&"sizes");
    let binary = common::build().join("chandra");
    let size = fs::metadata(&binary).expect("cargo builds it").len() as f64;
    let output = Command::new(&binary).args(["check", "--json"]).output();
    let report: serde_json::Value =
        serde_json::from_slice(&output.expect("it runs").stdout).expect("JSON");
    let maps = |key: &str| report["maps"][key].as_f64().expect("a number");
    let cpus = maps("cpus");
    println!("| Once | Value | Aim |");
    println!("|---|--:|---|");
    println!(
        "| binary, stripped, MiB | {:.2} | {} |",
        size / MIB,
        aim(size, 12.0 * MIB, "< 12")
    );
    let starts = (0..STARTS).map(|_| Exporter::start(&["--pods", "none"]).first_scrape);
    let starts = Several::new(starts.map(|took| took.as_secs_f64() * 1e3).collect());
    println!(
        "| start to first page without pods, ms, median (range) of {STARTS} starts | {} | {} |",
        starts.range(),
        aim(starts.median(), 1000.0, "< 1000")
    );
    let kib = |bytes: f64| format!("{:.1}", bytes / 1024.0);
    println!(
        "| maps at {cpus} CPUs by `chandra check`, KiB | {} | |",
        kib(maps("bytes"))
    );
    if root {
        let exporter = Exporter::start(&["--pods", "none"]);
        println!(
            "| maps at {cpus} CPUs by the kernel's memlock, KiB | {} | |",
            kib(exporter.maps() as f64)
        );
    }
    let many = maps("bytes_at_256_cpus");
    println!(
        "| maps at 256 CPUs by `chandra check`, KiB | {} | {} |",
        kib(many),
        aim(many, 32.0 * MIB, "≤ 32768")
    );
    println!();
}

fn aim(value: f64, limit: f64, text: &str) -> String {
    let met = if text.starts_with('<') {
        value < limit
    } else {
        value <= limit
    };
    format!("{text}: {}", if met { "met" } else { "**missed**" })
}

/// This machine, in words.
fn machine(kernel: &Kernel) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |key: &str| {
        let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let value = lines.find(|(name, _)| name.trim() == key);
        value
            .map_or("unknown", |(_, value)| value.trim())
            .to_owned()
    };
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let virtual_machine = if of("flags").split(' ').any(|flag| flag == "hypervisor") {
        ", a virtual machine"
    } else {
        ""
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "Machine: {} (family {}, model {}), {cpus} CPUs{virtual_machine}, Linux {}. Load average at the end: {load}.",
        of("model name"),
        of("cpu family"),
        of("model"),
        kernel.release,
    )
}
