// SPDX-License-Identifier: Apache-2.0
//! `gpu` against what the kernel itself counts for the same threads (`/proc/PID/task/TID/schedstat`): each arrival on a CPU
//! once, and at least the wait that it admits; exactly the processes that have a device open.

#[path = "gpu/calls.rs"]
pub(crate) mod calls;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{alone, common::*, compares_durations, skip, smoke};

const COUNT: &str = "chandra_gpu_runqueue_delay_seconds_count";
const SUM: &str = "chandra_gpu_runqueue_delay_seconds_sum";
const PROCESSES: &str = "chandra_gpu_processes";

/// A device that every host has and that nobody else has open.
pub(crate) const DEVICE: &str = "/dev/full";

/// From when a worker says that it is done until all of its threads sleep.
const ASLEEP: Duration = Duration::from_millis(500);

/// `examples/gpu` at work. Killed when dropped.
pub(crate) struct Worker {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Worker {
    fn start(device: &str, threads: usize) -> Self {
        let mut child = Command::new(build().join("examples/gpu"))
            .args([device, &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("gpu");
        let says = BufReader::new(child.stdout.take().expect("piped"));
        let mut worker = Self { child, says };
        worker.hear("ready");
        worker
    }

    /// Waits for a line that ends with a word; what was before the word.
    fn hear(&mut self, word: &str) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("it speaks");
        let said = line.trim_end().strip_suffix(word);
        said.unwrap_or_else(|| panic!("said {line:?}")).to_owned()
    }

    fn does(&mut self, what: &str) -> String {
        writeln!(self.child.stdin.as_ref().expect("piped"), "{what}").expect("it listens");
        self.hear("done")
    }

    /// Of each thread, what the kernel counted: nanoseconds of `run_delay`, and arrivals.
    fn schedstat(&self) -> BTreeMap<u32, (u64, u64)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let read = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("schedstat")).expect("SCHED_INFO");
            let numbers: Vec<u64> = text
                .split_whitespace()
                .map(|n| n.parse().expect("a number"))
                .collect();
            let thread = task.file_name().to_string_lossy().parse();
            (thread.expect("a number"), (numbers[1], numbers[2]))
        };
        tasks.map(|task| read(task.expect("a thread"))).collect()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn can_drive() -> bool {
    let probe = Exporter::start(&["--pods", "none", "--gpu.device", DEVICE]);
    let scrape = probe.scrape();
    let up = [("signal", "gpu"), ("state", "up")];
    let works = scrape.sum("chandra_signal_state", &up) == 1.0;
    if !works {
        skip("needs root and a kernel with BTF");
    }
    works
}

/// A driver without hardware, whose render node is [`RENDER_NODE`].
const DRIVER: &str = "vgem";
const RENDER_NODE: &str = "/dev/dri/renderD128";

/// With the device named by flag; or, for the render node, with its driver loaded late.
fn exporter(device: &str) -> Exporter {
    if device == RENDER_NODE {
        let exporter = Exporter::start(&["--pods", "none"]);
        exporter.until_state("gpu", "absent");
        run(&format!("modprobe {DRIVER}"));
        exporter.until_state("gpu", "up");
        return exporter;
    }
    let exporter = Exporter::start(&["--pods", "none", "--gpu.device", device]);
    exporter.until_state("gpu", "up");
    exporter
}

fn processes(wanted: f64) -> impl Fn(&Scrape) -> bool {
    move |scrape| scrape.sum(PROCESSES, &[]) == wanted
}

/// Lets a process work and holds what was counted against the kernel's own.
fn counts_like_the_kernel(device: &str) {
    let exporter = exporter(device);
    let mut worker = Worker::start(device, 8);
    exporter.scrape_until("the process is seen", processes(1.0));
    // The first arrival of a thread that is seen has no wait before it on another CPU that would be known.
    worker.does("work 1");
    for _ in 0..3 {
        thread::sleep(ASLEEP);
        let (kernel, before) = (worker.schedstat(), exporter.scrape());
        worker.does("work 3");
        thread::sleep(ASLEEP);
        let (now, after) = (worker.schedstat(), exporter.scrape());
        let sum = |of: fn(&(u64, u64)) -> u64| {
            let each = now
                .iter()
                .map(|(thread, value)| of(value) - of(&kernel[thread]));
            each.sum::<u64>() as f64
        };
        let (delay, arrivals) = (sum(|of| of.0) / 1e9, sum(|of| of.1));
        let count = after.sum(COUNT, &[]) - before.sum(COUNT, &[]);
        let seconds = after.sum(SUM, &[]) - before.sum(SUM, &[]);
        let missed = [("signal", "gpu"), ("reason", "missed_switch")];
        let missed = |scrape: &Scrape| scrape.sum("chandra_lost_events_total", &missed);
        let missed = missed(&after) - missed(&before);
        println!(
            "{device}: {count} arrivals, by the kernel {arrivals}, {missed} missed; {seconds:.4} s, by the kernel at least {delay:.4} s"
        );
        assert!(arrivals > 1000.0, "too little work");
        assert_eq!(count + missed, arrivals, "{}", after.text);
        assert!(seconds >= delay * 0.999, "{}", after.text);
        // Not a multiple of it either: the kernel leaves out waits of microseconds.
        assert!(
            !compares_durations() || seconds <= delay * 1.5 + 0.02 * arrivals / 1000.0,
            "{}",
            after.text
        );
    }
}

#[test]
fn smoke() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    let exporter = smoke::start("gpu", &["--pods", "none", "--gpu.device", DEVICE]);
    let mut worker = Worker::start(DEVICE, 4);
    exporter.scrape_until("the process is seen", processes(1.0));
    // The first arrival of a thread that is seen has no wait before it on another CPU that would be known.
    worker.does("work 1");
    thread::sleep(ASLEEP);
    let (kernel, before) = (worker.schedstat(), exporter.scrape());
    worker.does("work 1");
    thread::sleep(ASLEEP);
    let (now, after) = (worker.schedstat(), exporter.scrape());
    let arrivals: u64 = now
        .iter()
        .map(|(thread, value)| value.1 - kernel[thread].1)
        .sum();
    let count = after.sum(COUNT, &[]) - before.sum(COUNT, &[]);
    assert_eq!(count, arrivals as f64, "{}", after.text);
    drop(worker);
    exporter.scrape_until("nobody", processes(0.0));
    smoke::ends("gpu", exporter);
}

#[test]
fn each_arrival_on_a_cpu_is_counted_as_the_kernel_counts_it() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    counts_like_the_kernel(DEVICE);
    if succeeds(&format!("modprobe -qn {DRIVER}")) && !fs::exists(RENDER_NODE).expect("/dev") {
        counts_like_the_kernel(RENDER_NODE);
        run(&format!("modprobe -r {DRIVER}"));
    } else {
        println!("no {DRIVER} here: no render node");
    }
}

#[test]
fn exactly_the_processes_that_have_a_device_open_are_seen() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    let exporter = exporter(DEVICE);
    assert_eq!(exporter.scrape().sum(PROCESSES, &[]), 0.0);
    let mut worker = Worker::start(DEVICE, 2);
    exporter.scrape_until("an open", processes(1.0));

    // Closed: seen no more, and not counted.
    worker.does("close");
    exporter.scrape_until("a close", processes(0.0));
    let before = exporter.scrape().sum(COUNT, &[]);
    worker.does("work 1");
    assert_eq!(exporter.scrape().sum(COUNT, &[]), before);
    worker.does("open");
    exporter.scrape_until("an open again", processes(1.0));

    // Children that execute another program have it closed. There are more of them than the map has room for.
    let begun = Instant::now();
    worker.does("fork 4500");
    println!("4500 children in {:?}", begun.elapsed());
    worker.does("child");
    exporter.scrape_until("only the one that has it", processes(1.0));

    // A program that inherits it has it, its parent does not any more.
    let mut shell = Command::new("sh")
        .args([
            "-c",
            &format!("exec 9<>{DEVICE}; sleep 600 & exec 9>&-; wait"),
        ])
        .spawn()
        .expect("sh");
    exporter.scrape_until("one that inherits", processes(2.0));
    run(&format!("pkill -P {}", shell.id()));
    shell.wait().expect("it ends");
    exporter.scrape_until("it ends", processes(1.0));

    // One that was handed it, by one that closes it.
    let hand_over = format!(
        "import os, socket, time
ours, theirs = socket.socketpair()
if os.fork() == 0:
    fds = socket.recv_fds(theirs, 1, 1)
    time.sleep(600)
device = os.open('{DEVICE}', os.O_RDWR)
socket.send_fds(ours, [b'x'], [device])
os.close(device)
os.wait()"
    );
    let mut python = Command::new("python3")
        .args(["-c", &hand_over])
        .spawn()
        .expect("python3");
    exporter.scrape_until("one that was handed it", processes(2.0));
    thread::sleep(Duration::from_secs(12));
    assert_eq!(exporter.scrape().sum(PROCESSES, &[]), 2.0);
    run(&format!("pkill -P {}", python.id()));
    python.wait().expect("it ends");
    exporter.scrape_until("it ends", processes(1.0));
    drop(worker);
    let end = exporter.scrape_until("nobody", processes(0.0));
    let full = [("signal", "gpu"), ("reason", "map_full")];
    assert_eq!(end.sum("chandra_lost_events_total", &full), 0.0);
}

/// The way with three tracepoints: from the wake-up, or the switch away of a thread that stays runnable, to the switch to it.
const BY_WAKEUPS: &str = r#"
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new { @queued[args->pid] = nsecs; }
tracepoint:sched:sched_switch {
  if ((args->prev_state & 0xff) == 0) { @queued[args->prev_pid] = nsecs; }
  $since = @queued[args->next_pid];
  if ($since) {
    $delay = nsecs - $since;
    @sum[args->next_pid] = @sum[args->next_pid] + $delay;
    @count[args->next_pid] = @count[args->next_pid] + 1;
    if ($delay > 256000) { @long[args->next_pid] = @long[args->next_pid] + 1; }
    delete(@queued[args->next_pid]);
  }
}
BEGIN { printf("READY\n"); }
END { clear(@queued); }
"#;

#[test]
fn the_wait_is_that_of_a_program_which_sees_each_wake_up() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    // In an emulator each of its programs takes as long as a wait.
    if super::in_vm() || !compares_durations() {
        return println!("SKIPPED: compares durations: make kernel-test KERNEL=host SIGNAL=gpu");
    }
    if !succeeds("bpftrace --version >/dev/null") {
        return skip("needs bpftrace");
    }
    let exporter = exporter(DEVICE);
    let mut worker = Worker::start(DEVICE, 8);
    exporter.scrape_until("the process is seen", processes(1.0));
    worker.does("work 1");

    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("wakeups.bt");
    fs::write(&script, BY_WAKEUPS).expect("written");
    // It needs tracefs where it looks for it, which is mounted for it alone.
    let mount = "mount -t tracefs none /sys/kernel/tracing; exec bpftrace -q -B line $0";
    let mut oracle = Command::new("unshare")
        .args(["-m", "sh", "-c", mount])
        .arg(&script)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("unshare");
    let mut says = BufReader::new(oracle.stdout.take().expect("piped"));
    let mut line = String::new();
    while line != "READY\n" {
        line.clear();
        let bytes = says.read_line(&mut line).expect("it speaks");
        if bytes == 0 {
            let _ = oracle.wait();
            return skip("needs a bpftrace that may trace the scheduler here");
        }
    }
    let before = exporter.scrape();
    worker.does("work 5");
    thread::sleep(ASLEEP);
    let after = exporter.scrape();
    run(&format!("kill -INT {}", oracle.id()));
    let mut text = String::new();
    says.read_to_string(&mut text).expect("it speaks");
    oracle.wait().expect("it ends");

    let threads = worker.schedstat();
    let of = |map: &str| {
        let lines = text.lines().filter_map(|line| {
            let (thread, value) = line
                .strip_prefix(map)?
                .strip_prefix('[')?
                .split_once("]: ")?;
            let known = threads.contains_key(&thread.parse().ok()?);
            known.then(|| value.parse::<f64>().expect("a number"))
        });
        lines.sum::<f64>()
    };
    let (count, seconds) = (of("@count"), of("@sum") / 1e9);
    let by = |metric: &str, labels: &[(&str, &str)]| {
        after.sum(metric, labels) - before.sum(metric, labels)
    };
    let (ours, ours_seconds) = (by(COUNT, &[]), by(SUM, &[]));
    let bucket = "chandra_gpu_runqueue_delay_seconds_bucket";
    let short = by(bucket, &[("le", "0.000256")]);
    let shares = [1.0 - short / ours, of("@long") / count].map(|share| 100.0 * share);
    let ratio = ours_seconds / seconds;
    println!(
        "{ours} arrivals, {ours_seconds:.4} s, {:.2} % above 256 µs; by wake-ups {count}, {seconds:.4} s, {:.2} %: {ratio:.4}",
        shares[0], shares[1]
    );
    assert!((0.98..=1.02).contains(&ratio));
    assert!((shares[0] - shares[1]).abs() < 2.0);
}

const MOCK: &str = "/dev/mock_gpu";

/// A shell in a cgroup of its own that has the device of the kernel's GPU scheduler open.
struct Submitter {
    cgroup: String,
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Submitter {
    fn start(name: &str) -> Self {
        let cgroup = format!("/sys/fs/cgroup/{name}");
        run(&format!("mkdir -p {cgroup}"));
        let script = format!(
            "echo $$ >{cgroup}/cgroup.procs; exec 9<>{MOCK}; echo ready; while read -r jobs; do echo \"$jobs\" >&9; echo done; done"
        );
        let mut child = Command::new("bash")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let mut says = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        says.read_line(&mut line).expect("it speaks");
        assert_eq!(line, "ready\n");
        Self {
            cgroup,
            child,
            says,
        }
    }

    fn submit(&mut self, jobs: u32, microseconds: u32) {
        let mut to = self.child.stdin.as_ref().expect("piped");
        writeln!(to, "{jobs} {microseconds}").expect("it listens");
        let mut line = String::new();
        self.says.read_line(&mut line).expect("it speaks");
        assert_eq!(line, "done\n");
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        succeeds(&format!("rmdir {}", self.cgroup));
    }
}

/// What the kernel's own tracer saw of a tracepoint: how often, and the sum of the times in seconds.
fn traced(trace: &str, names: [&str; 2]) -> (f64, f64) {
    let times = trace.lines().filter_map(|line| {
        let (before, _) = names
            .iter()
            .find_map(|name| line.split_once(&format!(": {name}: ")))?;
        before.split_whitespace().next_back()?.parse::<f64>().ok()
    });
    times.fold((0.0, 0.0), |(count, sum), time| (count + 1.0, sum + time))
}

/// A module of tests/vm/gpu_sched, where it has been built for this kernel.
fn module(name: &str) -> Option<String> {
    let one = std::env::var("CHANDRA_MOCK_GPU").unwrap_or_default();
    let module = Path::new(&one).with_file_name(name);
    let there = !one.is_empty() && module.exists();
    if !there {
        println!(
            "SKIPPED: needs tests/vm/gpu_sched/{name} for this kernel, which make kernel-test builds where the kernel's headers are to be had"
        );
    }
    there.then(|| module.display().to_string())
}

/// What a process has open is told by where it opened it: devices with the numbers of NVIDIA's, and an accelerator.
#[test]
fn which_gpu_and_whose_accelerator_a_process_has_open_is_seen() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    let Some(module) = module("mock_devices.ko") else {
        return;
    };
    run(&format!("modprobe -q drm; insmod {module}"));
    let text = fs::read_to_string("/proc/devices").expect("it is there");
    let uvm = text
        .lines()
        .find_map(|line| line.trim().strip_suffix(" nvidia-uvm"));
    let uvm = uvm.expect("the module has made it");
    let nodes = tempfile::tempdir().expect("a folder");
    let node = |name: &str, major: &str, minor: u32| {
        let path = nodes.path().join(name).display().to_string();
        run(&format!("mknod {path} c {major} {minor}"));
        path
    };
    let compute = node("uvm", uvm, 0);
    let gpus = [0, 5, 200].map(|gpu| node(&format!("nvidia{gpu}"), "195", gpu));

    let exporter = Exporter::start(&["--pods", "none"]);
    exporter.until_state("gpu", "up");
    let seen = |scrape: &Scrape, driver: &str, gpu: &str| {
        scrape.sum(PROCESSES, &[("driver", driver), ("gpu", gpu)])
    };
    // In any order.
    let holds = |paths: &[&String]| {
        let text = format!(
            "import time\nkept = [open(path, 'rb', 0) for path in {paths:?}]\nprint('ready', flush=True)\nwhile True: time.sleep(0.002)"
        );
        let mut child = Command::new("python3")
            .args(["-c", &text])
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut line = String::new();
        let mut says = BufReader::new(child.stdout.take().expect("piped"));
        says.read_line(&mut line).expect("it speaks");
        assert_eq!(line, "ready\n");
        child
    };
    let end = |mut child: Child| {
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    };
    let monitoring = holds(&[&gpus[0], &gpus[1]]);
    thread::sleep(Duration::from_secs(11));
    let scrape = exporter.scrape();
    let (open, waits) = (scrape.sum(PROCESSES, &[]), scrape.sum(COUNT, &[]));
    assert_eq!((open, waits), (0.0, 0.0), "monitoring drives no GPU");
    let first = holds(&[&gpus[0], &compute]);
    let both = holds(&[&compute, &gpus[0], &gpus[1]]);
    let without = holds(&[&compute]);
    let beyond = holds(&[&compute, &gpus[2]]);
    let expected =
        |scrape: &Scrape| ["0", "5", ""].map(|gpu| seen(scrape, "nvidia", gpu)) == [2.0, 1.0, 2.0];
    exporter.scrape_until("each under its GPUs", expected);
    // The same by two searches as by the opens, in which nobody is forgotten for a moment, whatever comes first among its files.
    let missed = [("signal", "gpu"), ("reason", "missed_switch")];
    let missed = |scrape: &Scrape| scrape.sum("chandra_lost_events_total", &missed);
    let before = exporter.scrape();
    thread::sleep(Duration::from_secs(22));
    let scrape = exporter.scrape();
    assert!(expected(&scrape), "{}", scrape.text);
    assert_eq!(scrape.sum(PROCESSES, &[]), 5.0);
    assert_eq!(missed(&scrape), missed(&before), "{}", scrape.text);
    let waits = scrape.sum(COUNT, &[]) - before.sum(COUNT, &[]);
    assert!(
        waits > 4.0 * 1000.0,
        "{waits} arrivals of four that sleep 2 ms at a time"
    );
    end(both);
    exporter.scrape_until("one less on both", |scrape| {
        seen(scrape, "nvidia", "0") == 1.0 && seen(scrape, "nvidia", "5") == 0.0
    });
    assert_eq!(exporter.scrape().sum(PROCESSES, &[]), 3.0);
    [monitoring, first, without, beyond]
        .into_iter()
        .for_each(end);
    exporter.scrape_until("nobody", processes(0.0));

    let accel = "/dev/accel/accel0".to_owned();
    if fs::exists(&accel).expect("/dev") {
        let one = holds(&[&accel]);
        exporter.scrape_until("by its driver's name", |scrape| {
            seen(scrape, "mock_accel", "") == 1.0
        });
        end(one);
        exporter.scrape_until("nobody", processes(0.0));
    } else {
        println!("this kernel has no class accel");
    }
    drop(exporter);
    run("rmmod mock_devices");
}

#[test]
fn jobs_of_the_kernels_gpu_scheduler_are_timed_as_its_tracer_times_them() {
    let _alone = alone();
    if !can_drive() {
        return;
    }
    let Some(module) = module("mock_gpu.ko") else {
        return;
    };
    run(&format!(
        "modprobe gpu_sched && insmod {module} schedulers=2"
    ));
    let exporter = exporter(MOCK);
    let mut submitters = ["mock-a", "mock-b"].map(Submitter::start);
    let attached = [
        ("signal", "gpu"),
        ("method", "tracepoint"),
        ("reason", "attached"),
    ];
    exporter.scrape_until("the tracepoints are attached", |scrape| {
        scrape.sum("chandra_hook_info", &attached) == 3.0
    });
    let tracer = "/sys/kernel/tracing/instances/chandra";
    run(&format!(
        "mkdir {tracer} && echo mono >{tracer}/trace_clock && echo 1 >{tracer}/events/gpu_scheduler/enable"
    ));
    for _ in 0..3 {
        submitters[0].submit(20, 5_000);
        submitters[1].submit(10, 20_000);
    }
    let (queue, run_) = (
        "chandra_gpu_job_queue_seconds",
        "chandra_gpu_job_run_seconds",
    );
    let total = |scrape: &Scrape, metric: &str, part: &str, labels: &[(&str, &str)]| {
        scrape.sum(&format!("{metric}_{part}"), labels)
    };
    let end = exporter.scrape_until("all jobs have ended", |scrape| {
        total(scrape, run_, "count", &[]) == 90.0
    });
    let trace = fs::read_to_string(format!("{tracer}/trace")).expect("a trace");
    run(&format!(
        "echo 0 >{tracer}/events/gpu_scheduler/enable && rmdir {tracer}"
    ));
    for (owner, jobs) in [("mock-a", 60.0), ("mock-b", 30.0)] {
        for metric in [queue, run_] {
            let count = total(&end, metric, "count", &[("container", owner)]);
            assert_eq!(count, jobs, "{owner} {metric}\n{}", end.text);
        }
    }
    // Each open file has a ring of its own.
    for ring in ["mock0", "mock1"] {
        assert!(
            total(&end, queue, "count", &[("ring", ring)]) >= 30.0,
            "{}",
            end.text
        );
    }
    let queued = traced(&trace, ["drm_sched_job_queue", "drm_sched_job"]);
    let handed = traced(&trace, ["drm_sched_job_run", "drm_run_job"]);
    let done = traced(&trace, ["drm_sched_job_done", "drm_sched_process_job"]);
    assert_eq!([queued.0, handed.0, done.0], [90.0; 3], "{trace}");
    for (metric, oracle) in [(queue, handed.1 - queued.1), (run_, done.1 - handed.1)] {
        let ours = total(&end, metric, "sum", &[]);
        println!(
            "{metric}: {ours:.6} s in 90 jobs, by the tracer {oracle:.6} s: {:.4}",
            ours / oracle
        );
        // The two read the clock one after the other.
        assert!(
            (ours - oracle).abs() < 0.02 * oracle + 90.0 * 0.0001,
            "{}",
            end.text
        );
    }
    // The hardware works on one job at a time.
    assert!(total(&end, run_, "sum", &[("container", "mock-a")]) >= 60.0 * 0.005);
    assert!(total(&end, run_, "sum", &[("container", "mock-b")]) >= 30.0 * 0.02);
    let device = end.has(queue, "device=\"\"");
    println!("device: {}", if device { "not told" } else { "told" });
    drop(submitters);
    exporter.scrape_until("nobody has it open", processes(0.0));
    run("rmmod mock_gpu");
}
