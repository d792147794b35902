// SPDX-License-Identifier: Apache-2.0
//! What a context switch costs, and what is added to it: of a thread that drives no GPU, which is every other thread of
//! the node, and of one that does.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::{Several, exporter::Exporter, note};
use crate::common::{run, succeeds};

/// How often each is measured, in turn.
const ROUNDS: usize = 15;

/// Times that the token goes there and back, with two switches each.
const TRIPS: u32 = 100_000;

/// The device that stands for a GPU.
const DEVICE: &str = "/dev/full";

/// The same question asked with bpftrace: how long are threads of one process runnable before they run?
const BPFTRACE: &str = "
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new { @queued[args->pid] = nsecs; }
tracepoint:sched:sched_switch {
  if ((args->prev_state & 0xff) == 0) { @queued[args->prev_pid] = nsecs; }
  $since = @queued[args->next_pid];
  if ($since) { @delay = hist(nsecs - $since); delete(@queued[args->next_pid]); }
}
BEGIN { printf(\"READY\\n\"); }
";

/// `overhead load switch [DEVICE]`: passes a token between two threads on one CPU, and prints the nanoseconds of a switch.
pub(crate) fn work(args: &[String]) {
    let _open = args.first().map(|device| {
        let file = OpenOptions::new().read(true).write(true).open(device);
        // Until it is noticed.
        thread::sleep(std::time::Duration::from_millis(2500));
        file.expect("a device")
    });
    let mut cpus = CpuSet::new();
    cpus.set(1);
    sched_setaffinity(None, &cpus).expect("a second CPU");
    let (mut here, mut to_there) = io::pipe().expect("a pipe");
    let (mut there, mut to_here) = io::pipe().expect("a pipe");
    let partner = thread::spawn(move || {
        let mut token = [0];
        while here.read_exact(&mut token).is_ok() {
            to_here.write_all(&token).expect("it listens");
        }
    });
    let mut pass = |trips| {
        let mut token = [0];
        let begun = Instant::now();
        for _ in 0..trips {
            to_there.write_all(&token).expect("it listens");
            there.read_exact(&mut token).expect("it speaks");
        }
        begun.elapsed().as_nanos() as f64 / f64::from(2 * trips)
    };
    pass(TRIPS / 10);
    println!("{}", pass(TRIPS));
    drop(to_there);
    partner.join().expect("no panic");
}

/// Nanoseconds of a switch.
fn switch(device: Option<&str>) -> f64 {
    let output = Command::new(std::env::current_exe().expect("a path"))
        .args(["load", "switch"])
        .args(device)
        .output()
        .expect("it runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.trim().parse().expect("a number")
}

/// bpftrace at work, with tracefs mounted for it alone.
struct Bpftrace(Child);

impl Bpftrace {
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let script = folder.path().join("runqueue.bt");
        fs::write(&script, BPFTRACE).expect("written");
        let mount = "mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing
                     exec bpftrace -q -B line $0";
        let child = Command::new("unshare")
            .args(["-m", "sh", "-c", mount])
            .arg(&script)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut bpftrace = Self(child.ok()?);
        let says = bpftrace.0.stdout.take()?;
        let ready = BufReader::new(says)
            .lines()
            .any(|line| line.is_ok_and(|line| line == "READY"));
        ready.then_some(bpftrace)
    }
}

impl Drop for Bpftrace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says why nothing can be measured here.
pub(crate) fn missing() -> Option<&'static str> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let can = cpus > 1 && succeeds("[ $(id -u) = 0 ]");
    (!can).then_some("needs root and two CPUs")
}

/// Prints the table.
pub(crate) fn per_switch() {
    note(&"context switches");
    // Somebody drives a GPU, so that there is something to look for.
    let decoy = Command::new("sh")
        .args(["-c", &format!("exec 9<>{DEVICE}; exec sleep 3600")])
        .spawn();
    let mut decoy = decoy.expect("sh");
    let by_bpftrace = Bpftrace::start().is_some();
    let [mut alone, mut others, mut drivers, mut bpftrace] = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        alone.push(switch(None));
        let exporter = Exporter::start(&["--pods", "none", "--gpu.device", DEVICE]);
        let devices = exporter.scrape().sum("chandra_gpu_processes", &[]);
        assert_eq!(devices, 1.0, "the decoy is seen");
        others.push(switch(None));
        drivers.push(switch(Some(DEVICE)));
        let counted = exporter
            .scrape()
            .sum("chandra_gpu_runqueue_delay_seconds_count", &[]);
        assert!(counted > 1.9 * f64::from(TRIPS), "{counted} of the load");
        drop(exporter);
        if by_bpftrace {
            let _running = Bpftrace::start();
            bpftrace.push(switch(None));
        }
    }
    alone.push(switch(None));
    run(&format!("kill {}", decoy.id()));
    decoy.wait().expect("it ends");

    // Against the mean of the rounds before and after, since the machine's speed drifts.
    let added = |with: &[f64]| {
        let around = alone.windows(2).map(|around| (around[0] + around[1]) / 2.0);
        Several::new(
            with.iter()
                .zip(around)
                .map(|(with, without)| with - without)
                .collect(),
        )
    };
    println!("| A context switch of | Added, ns (quartiles) | Aim |\n|---|--:|---|");
    let verdict = |value: f64, aim: f64| if value <= aim { "met" } else { "missed" };
    let (other, driver) = (added(&others), added(&drivers));
    println!(
        "| a thread that drives no GPU | {} | ≤ 40: {} |",
        other.quartiles(),
        verdict(other.median(), 40.0)
    );
    println!(
        "| a thread that drives one | {} | ≤ 120: {} |",
        driver.quartiles(),
        verdict(driver.median(), 120.0)
    );
    if by_bpftrace {
        let script = added(&bpftrace);
        let share = other.median() / script.median();
        println!(
            "| any thread, by a bpftrace script for the same question | {} | |",
            script.quartiles()
        );
        println!(
            "| the first as a share of that | {share:.2} | ≤ 0.2: {} |",
            verdict(share, 0.2)
        );
    } else {
        println!(
            "| any thread, by a bpftrace script | not measured: bpftrace is not here or may not trace | |"
        );
    }
    println!(
        "\nMedian (quartiles) of {ROUNDS} rounds of {} switches between two threads on one CPU, which take {} ns by themselves.\n",
        2 * TRIPS,
        Several::new(alone).quartiles()
    );
}
