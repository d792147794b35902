// SPDX-License-Identifier: Apache-2.0
//! Calls of CUDA against a library whose functions begin as the driver's do, and a program that knows what it called.

use std::{
    fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use super::{
    super::{alone, built_outside, common::*, compares_durations, in_vm, skip, smoke},
    DEVICE, Worker, can_drive, exporter as signal_up, processes,
};

const COUNT: &str = "chandra_cuda_call_seconds_count";
const SUM: &str = "chandra_cuda_call_seconds_sum";
const PREEMPTED: &str = "chandra_cuda_call_preempted_seconds_sum";

/// The folder with the library and the program, built by the compiler of this host. In a VM they are those that a run outside
/// of it has built.
fn built() -> Option<PathBuf> {
    let folder = build().join("cuda");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernel/gpu");
    if in_vm() {
        return built_outside(folder, "worker");
    }
    if cfg!(not(target_arch = "x86_64")) || !succeeds("cc --version") {
        skip("needs a C compiler on x86-64");
        return None;
    }
    fs::create_dir_all(&folder).expect("a folder");
    let (sources, to) = (sources.display(), folder.display());
    run(&format!(
        "cc -O2 -Wall -Werror -shared -fPIC -Wl,-soname,libcuda.so.1 -o {to}/libcuda.so.1 {sources}/libcuda.c
         cc -O2 -Wall -Werror -pthread -o {to}/worker {sources}/worker.c"
    ));
    Some(folder)
}

/// What tests in a VM need.
#[test]
fn stand_ins() {
    let _alone = alone();
    built();
}

fn start(folder: &Path, library: &Path) -> Worker {
    let mut child = Command::new(folder.join("worker"))
        .arg(DEVICE)
        .arg(library)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("worker");
    let says = BufReader::new(child.stdout.take().expect("piped"));
    let mut worker = Worker { child, says };
    worker.hear("ready");
    worker
}

/// A process that has the library mapped and the device open, for tests of other things than calls.
pub(crate) fn mapped() -> Option<Worker> {
    built().map(|folder| start(&folder, &folder.join("libcuda.so.1")))
}

/// What a worker says of its calls: seconds of all, and of the longest.
fn calls(worker: &mut Worker, what: &str) -> (f64, f64) {
    let said = worker.does(what);
    let mut seconds = said
        .split_whitespace()
        .map(|n| n.parse::<f64>().expect("a number") / 1e9);
    let mut next = || seconds.next().expect("two numbers");
    (next(), next())
}

fn exporter(budget: &str) -> Exporter {
    let flags = ["--pods", "none", "--gpu.device", DEVICE, "--cuda-calls"];
    Exporter::start(&[&flags[..], &["--cuda-calls.budget", budget]].concat())
}

fn hook(scrape: &Scrape, name: &str, reason: &str) -> bool {
    let labels = [("signal", "gpu"), ("hook", name), ("reason", reason)];
    scrape.sum("chandra_hook_info", &labels) == 1.0
}

fn lost(scrape: &Scrape) -> f64 {
    scrape.sum(
        "chandra_lost_events_total",
        &[("signal", "gpu"), ("reason", "missed_return")],
    ) + scrape.sum(
        "chandra_lost_events_total",
        &[("signal", "gpu"), ("reason", "map_full")],
    ) + scrape.sum(
        "chandra_lost_events_total",
        &[("signal", "gpu"), ("reason", "recursion")],
    )
}

/// Two overlays of a folder, as two containers of one image have it. Unmounted when dropped.
struct Overlays(PathBuf);

impl Overlays {
    fn of(folder: &Path) -> Option<Self> {
        let at = tempfile::tempdir().expect("a folder").keep();
        let (at_, lower) = (at.display(), folder.display());
        let works = succeeds(&format!(
            "set -e; mount -t tmpfs cuda {at_}; cd {at_}; mkdir lower; cp -p {lower}/libcuda.so.1 lower
             for i in 1 2; do mkdir m$i u$i w$i
             mount -t overlay -o lowerdir=lower,upperdir=u$i,workdir=w$i cuda m$i; done"
        ));
        let overlays = Self(at);
        works.then_some(overlays)
    }

    fn library(&self, of: &str) -> PathBuf {
        self.0.join(of).join("libcuda.so.1")
    }
}

impl Drop for Overlays {
    fn drop(&mut self) {
        let at = self.0.display();
        succeeds(&format!(
            "umount -l {at}/m1 {at}/m2; umount -l {at}; rmdir {at}"
        ));
    }
}

#[test]
fn smoke() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let flags = [
        "--gpu.device",
        DEVICE,
        "--cuda-calls",
        "--cuda-calls.budget",
        "1",
    ];
    let exporter = smoke::start("gpu", &[&["--pods", "none"], &flags[..]].concat());
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    exporter.scrape_until("the hooks", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    calls(&mut worker, "cuLaunchKernel 4 100 0 0");
    calls(&mut worker, "cuStreamSynchronize 2 50 0 1000");
    let scrape = exporter.scrape();
    for (call, made) in [("launch", 400.0), ("stream_synchronize", 100.0)] {
        let count = scrape.sum(COUNT, &[("call", call)]);
        assert_eq!(count, made, "{}", scrape.text);
    }
    smoke::ends("gpu", exporter);
}

#[test]
fn nothing_is_probed_unless_it_is_asked_for() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let exporter = signal_up(DEVICE);
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    exporter.scrape_until("the process is seen", processes(1.0));
    thread::sleep(Duration::from_secs(2));
    calls(&mut worker, "cuLaunchKernel 2 1000 0 0");
    let scrape = exporter.scrape();
    assert!(!scrape.has("chandra_cuda", ""), "{}", scrape.text);
    assert!(!scrape.has("chandra_hook_info", "method=\"uprobe\""));
    assert!(!scrape.has("chandra_program", "cuda_"));
}

#[test]
fn each_call_is_counted_once_and_as_long_as_it_took() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let exporter = exporter("1");
    // One file by three paths of two devices, and its copy.
    let overlays = Overlays::of(&folder);
    let mut libraries = vec![folder.join("libcuda.so.1")];
    match &overlays {
        Some(overlays) => libraries.extend(["lower", "m1", "m2"].map(|of| overlays.library(of))),
        None => println!("no overlay can be mounted here: one path only"),
    }
    let mut workers: Vec<_> = libraries
        .iter()
        .map(|library| start(&folder, library))
        .collect();
    let n = workers.len() as f64;
    exporter.scrape_until("they are seen", processes(n));
    exporter.scrape_until("the hooks", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    // Every process has been looked at, and its library probed.
    thread::sleep(Duration::from_secs(3));

    let plan = [
        ("cuLaunchKernel", "launch", 4, 2500, 0, 0),
        ("cuLaunchKernel_ptsz", "launch", 1, 500, 0, 0),
        ("cuLaunchKernelEx", "launch", 2, 500, 10, 0),
        ("cuStreamSynchronize", "stream_synchronize", 3, 100, 0, 2000),
        ("cuEventSynchronize", "event_synchronize", 2, 100, 50, 500),
        ("cuMemcpyHtoD_v2", "memcpy", 2, 200, 100, 0),
        ("cuGraphLaunch", "graph_launch", 1, 300, 20, 0),
        ("cuCtxSynchronize", "", 1, 100, 0, 0),
        ("cuMemcpyDtoH_v2", "", 1, 100, 0, 0),
    ];
    let mut expected: Vec<(&str, f64, f64)> = Vec::new();
    for worker in &mut workers {
        for (function, call, threads, calls_, computes, sleeps) in plan {
            let line = format!("{function} {threads} {calls_} {computes} {sleeps}");
            let (seconds, _) = calls(worker, &line);
            expected.push((call, f64::from(threads * calls_), seconds));
        }
    }
    let scrape = exporter.scrape();
    for call in [
        "launch",
        "stream_synchronize",
        "event_synchronize",
        "memcpy",
        "graph_launch",
        "context_synchronize",
    ] {
        let of_call = |of: fn(&(&str, f64, f64)) -> f64| {
            let all = expected.iter().filter(|(name, ..)| *name == call);
            all.map(of).sum::<f64>()
        };
        let (made, took) = (of_call(|of| of.1), of_call(|of| of.2));
        let labels = [("call", call)];
        let (count, seconds) = (scrape.sum(COUNT, &labels), scrape.sum(SUM, &labels));
        let preempted = scrape.sum(PREEMPTED, &labels);
        println!(
            "{call}: {count} calls, made {made}; {seconds:.4} s, by the program {took:.4} s; {preempted:.4} s preempted"
        );
        assert_eq!(count, made, "{}", scrape.text);
        // The program's time has the probe in it.
        assert!(seconds <= took && preempted <= seconds, "{}", scrape.text);
        // In an emulator two traps take long.
        let probe = if in_vm() { 500e-6 } else { 20e-6 };
        assert!(
            !compares_durations() || seconds >= took - made * probe - took * 0.2,
            "{}",
            scrape.text
        );
    }
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    for name in [
        "cuLaunchKernel",
        "cuLaunchKernel_ptsz",
        "cuEventSynchronize",
    ] {
        assert!(hook(&scrape, name, "attached"), "{name}\n{}", scrape.text);
    }
    for name in ["cuCtxSynchronize", "cuMemcpyDtoH_v2"] {
        assert!(hook(&scrape, name, "expensive"), "{name}\n{}", scrape.text);
    }
}

#[test]
fn what_a_call_waits_for_a_cpu_is_told_from_what_it_sleeps() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let exporter = exporter("1");
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    exporter.scrape_until("the hooks", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    let cpus = thread::available_parallelism().expect("known").get();
    let mut hogs: Vec<_> = (0..cpus)
        .map(|_| {
            let mut hog = Command::new("sh");
            hog.args(["-c", "while :; do :; done"]).spawn().expect("sh")
        })
        .collect();
    // Each call computes for 20 ms, which beside a hog takes about twice as long.
    let computed = cpus as f64 * 50.0 * 0.02;
    calls(&mut worker, &format!("cuLaunchKernel {cpus} 50 20000 0"));
    for hog in &mut hogs {
        hog.kill().expect("it runs");
        hog.wait().expect("it ends");
    }
    calls(
        &mut worker,
        &format!("cuStreamSynchronize {cpus} 50 0 20000"),
    );
    let scrape = exporter.scrape();
    let of = |metric, call| scrape.sum(metric, &[("call", call)]);
    let (took, preempted) = (of(SUM, "launch"), of(PREEMPTED, "launch"));
    println!("beside a hog: {took:.3} s, {preempted:.3} s preempted, {computed:.3} s computed");
    assert!(preempted > 0.0, "{}", scrape.text);
    if !compares_durations() {
        return;
    }
    assert!(preempted > 0.1 * took, "{}", scrape.text);
    // What is not one is the other; the hypervisor takes its share too.
    let rest = took - preempted;
    assert!(
        (0.95..=1.3).contains(&(rest / computed)),
        "{rest} of {computed}"
    );
    let (slept, preempted) = (
        of(SUM, "stream_synchronize"),
        of(PREEMPTED, "stream_synchronize"),
    );
    println!("alone: {slept:.3} s, {preempted:.3} s preempted");
    assert!(
        slept >= computed && preempted < 0.1 * slept,
        "{}",
        scrape.text
    );
}

#[test]
fn the_budget_limits_the_share_of_the_time() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let exporter = exporter("0.2");
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    exporter.scrape_until("the first window", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    let (_, longest) = calls(&mut worker, "cuLaunchKernel 2 9000 0 5000");
    let scrape = exporter.scrape();
    let count = scrape.sum(COUNT, &[]);
    let share = count / 18_000.0;
    println!(
        "seen {count} of 18000, {:.1} %; the longest took {longest:.4} s",
        share * 100.0
    );
    // Detaching takes long, and is within the budget: most of the calls that a window allows are not seen.
    let least = if in_vm() { 0.002 } else { 0.03 };
    let (least, most) = match compares_durations() {
        true => (least, 0.2),
        false => (0.0, 1.0),
    };
    assert!(share > least && share < most, "{}", scrape.text);
    // No entry of one window is paired with a return of another.
    let bucket = |le: &str| scrape.sum("chandra_cuda_call_seconds_bucket", &[("le", le)]);
    for (le, bound) in [
        ("0.016384", 0.016384),
        ("0.065536", 0.065536),
        ("0.262144", 0.262144),
        ("1.048576", 1.048576),
    ] {
        assert!(longest > bound || bucket(le) == count, "{}", scrape.text);
    }
    assert!(scrape.sum(SUM, &[]) >= count * 0.005, "{}", scrape.text);
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);

    // A process that goes takes its library along, and one that comes is seen anew.
    drop(worker);
    let before = exporter.scrape_until("nothing is probed", |scrape| {
        !scrape.has("chandra_hook_info", "method=\"uprobe\"")
    });
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    exporter.scrape_until("a library", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    calls(&mut worker, "cuLaunchKernel 1 6000 0 5000");
    assert!(exporter.scrape().sum(COUNT, &[]) > before.sum(COUNT, &[]));
}

#[test]
#[ignore = "a measurement: prints what a probe costs"]
fn the_cost_of_a_launch() {
    let _alone = alone();
    let Some(folder) = can_drive().then(built).flatten() else {
        return;
    };
    let mut worker = start(&folder, &folder.join("libcuda.so.1"));
    let mut cost = |what: &str| {
        let mut least = |function: &str| {
            let runs = (0..5).map(|_| calls(&mut worker, &format!("{function} 1 200000 0 0")).0);
            runs.fold(f64::MAX, f64::min) / 200_000.0 * 1e9
        };
        let (stub, push) = (least("cuLaunchKernel"), least("cuEventSynchronize"));
        println!(
            "{what}: {stub:.0} ns a call of a stub (je), {push:.0} ns of a function that begins with push"
        );
    };
    cost("without the exporter");
    let exporter = exporter("1");
    exporter.scrape_until("the hooks", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    thread::sleep(Duration::from_secs(1));
    cost("probed");
    let scrape = exporter.scrape();
    let labels = [("call", "launch")];
    let own = scrape.sum(SUM, &labels) / scrape.sum(COUNT, &labels) * 1e9;
    println!("of which {own:.0} ns are in chandra_cuda_call_seconds");
    drop(exporter);
    thread::sleep(Duration::from_secs(2));
    cost("after it has ended");
    let exporter = super::calls::exporter("0.00001");
    exporter.scrape_until("the first window", |scrape| {
        hook(scrape, "cuLaunchKernel", "attached")
    });
    // The window, and the detaching.
    thread::sleep(Duration::from_secs(5));
    cost("between two windows");
}
