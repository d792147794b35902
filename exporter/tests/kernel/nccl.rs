// SPDX-License-Identifier: Apache-2.0
//! `nccl` against a job that knows when its ranks arrive: a stand-in for NCCL with its interface, in tests/nccl-sim.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    alone, built_outside, can_trace, common::*, compares_durations, in_vm, process, skip, smoke,
};

#[path = "nccl/libraries.rs"]
mod libraries;

const NCCL: &str = "libnccl.so.2";
const RCCL: &str = "librccl.so.1";

const COLLECTIVES: &str = "chandra_nccl_rank_collectives_total";
const WAIT: &str = "chandra_nccl_rank_wait_seconds_total";
const LAST: &str = "chandra_nccl_rank_last_arrivals_total";
const PENDING: &str = "chandra_nccl_oldest_pending_seconds";
const OF_COMMUNICATOR: &str = "chandra_nccl_communicator_pending_seconds";
const MISSING: &str = "chandra_nccl_missing_rank_seconds";

/// The folder with the stand-in and the job, built by the compiler of this host. In a VM they are those that a run outside of it
/// has built.
fn built(version: &str, flags: &str, library: &str) -> Option<PathBuf> {
    let folder = build().join("nccl-sim").join(version);
    if in_vm() {
        return built_outside(folder, "job");
    }
    if !succeeds("cc --version") {
        skip("needs a C compiler");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/nccl-sim/build");
    run(&format!(
        "LIBRARY={library} CFLAGS='{flags}' {} {}",
        script.display(),
        folder.display()
    ));
    Some(folder)
}

/// The version that the stand-in is by default, whose communicators the exporter knows.
pub(crate) fn known() -> Option<PathBuf> {
    can_trace().then(built_known).flatten()
}

fn built_known() -> Option<PathBuf> {
    built("2.27.5", "", NCCL)
}

/// One that it does not know.
fn unknown() -> Option<PathBuf> {
    can_trace().then(built_unknown).flatten()
}

fn built_unknown() -> Option<PathBuf> {
    let flags = r#"-DSIM_VERSION=29999 -DSIM_VERSION_TEXT="2.99.99+cuda99.9""#;
    built("2.99.99", flags, NCCL)
}

/// A copy of a folder's job and library, an inode of its own for the kernel.
fn copied(folder: &Path, into: &Path, number: u64) -> PathBuf {
    let own = into.join(number.to_string());
    fs::create_dir(&own).expect("a folder");
    for file in ["job", NCCL] {
        fs::copy(folder.join(file), own.join(file)).expect("copied");
    }
    own
}

/// The library in a folder.
fn library(folder: &Path) -> PathBuf {
    let mut libraries = [NCCL, RCCL].map(|name| folder.join(name)).into_iter();
    libraries.find(|path| path.exists()).expect("it is built")
}

/// What tests in a VM need.
#[test]
fn stand_ins() {
    let _alone = alone();
    for build in [
        built_known,
        built_unknown,
        libraries::built_rccl,
        built_plugin,
    ] {
        build();
    }
}

/// A job at work. Killed when dropped.
pub(crate) struct Job {
    child: Child,
    says: BufReader<ChildStdout>,
}

impl Job {
    pub(crate) fn start(folder: &Path, arguments: &str) -> Self {
        let mut child = Command::new(folder.join("job"))
            .arg("--library")
            .arg(library(folder))
            .args(arguments.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the job starts");
        let says = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, says }
    }

    fn tell(&self, line: &str) {
        writeln!(self.child.stdin.as_ref().expect("piped"), "{line}").expect("it listens");
    }

    /// What it says until a word, or its end.
    fn hear(&mut self, word: &str) -> Vec<Value> {
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.says.read_line(&mut line).expect("it speaks");
            if read == 0 || line.trim() == word {
                return said;
            }
            said.extend(serde_json::from_str::<Value>(&line).ok());
        }
    }

    /// Lets it end, and returns what each rank of each communicator did.
    fn truth(&mut self) -> Vec<Value> {
        let mut said = self.hear("done");
        said.retain(|line| line["type"] == "rank");
        assert!(!said.is_empty(), "it says what was");
        said
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An exporter that has found the library, in a process that does nothing with it.
fn exporter(folder: &Path, flags: &[&str]) -> (Exporter, Job) {
    let idle = Job::start(folder, "--ranks 1 --communicators 1 --collectives 1 --wait");
    let exporter = Exporter::start(flags);
    found(&exporter);
    (exporter, idle)
}

fn found(exporter: &Exporter) {
    exporter.until_attached("nccl", "ncclEnqueueCheck");
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// What was counted of a rank.
fn of_rank(scrape: &Scrape, metric: &str, rank: &Value) -> f64 {
    let labels = [
        ("communicator", rank["communicator"].as_str().expect("told")),
        ("rank", &*rank["rank"].to_string()),
        ("source", "host"),
    ];
    scrape.sum(metric, &labels)
}

fn lost(scrape: &Scrape) -> f64 {
    scrape.sum("chandra_lost_events_total", &[("signal", "nccl")])
}

/// Holds what was counted against what the job knows, exactly as to counts. Returns the share of last arrivals that agree.
fn agrees(scrape: &Scrape, truth: &[Value]) -> f64 {
    let (mut wait, mut seen, mut last, mut same) = (0.0, 0.0, 0.0, 0.0);
    for rank in truth {
        let collectives = of_rank(scrape, COLLECTIVES, rank);
        assert_eq!(
            collectives,
            number(&rank["collectives"]),
            "{rank}\n{}",
            scrape.text
        );
        wait += number(&rank["wait_seconds"]);
        seen += of_rank(scrape, WAIT, rank);
        last += number(&rank["last_arrivals"]);
        same += of_rank(scrape, LAST, rank).min(number(&rank["last_arrivals"]));
    }
    println!(
        "{} ranks of communicators: waited {wait:.4} s, seen {seen:.4} s ({:.4}); last arrivals {same} of {last}",
        truth.len(),
        seen / wait
    );
    // The job reads its clock when the probe is through, which for the last rank reckons what all have waited: in an emulator
    // that is some 40 of 3000 µs.
    let off = if in_vm() { 0.04 } else { 0.02 };
    assert!(
        !compares_durations() || (seen / wait - 1.0).abs() < off,
        "{seen} s of {wait} s"
    );
    same / last
}

/// Numbers of things by operation, over all ranks.
fn by_operation(truth: &[Value], what: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for rank in truth {
        for (operation, counts) in rank["by_operation"].as_object().expect("told") {
            *sums.entry(operation.clone()).or_default() += number(&counts[what]);
        }
    }
    sums
}

/// A VM is an emulator.
fn at_most(collectives: usize) -> usize {
    if in_vm() {
        collectives / 10
    } else {
        collectives
    }
}

#[test]
fn smoke() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let idle = Job::start(
        &folder,
        "--ranks 1 --communicators 1 --collectives 1 --wait",
    );
    let exporter = smoke::start("nccl", &["--pods", "none"]);
    found(&exporter);
    let mut job = Job::start(
        &folder,
        "--ranks 4 --communicators 2 --collectives 50 --straggler 1 --delay-us 3000 --wait",
    );
    job.hear("ready");
    job.tell("");
    let truth = job.truth();
    let scrape = exporter.scrape();
    for rank in &truth {
        let counted = of_rank(&scrape, COLLECTIVES, rank);
        assert_eq!(counted, number(&rank["collectives"]), "{}", scrape.text);
    }
    assert!(scrape.sum(WAIT, &[]) > 0.0, "{}", scrape.text);
    job.tell("");
    job.child.wait().expect("it ends");
    smoke::ends("nccl", exporter);
    drop(idle);
}

#[test]
fn each_wait_is_its_ranks_and_the_straggler_comes_last() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let place = tempfile::tempdir().expect("a folder");
    let file = place.path().join("pods.json");
    let pods = [
        Pod::new("training", "worker-0", 1),
        Pod::new("training", "worker-1", 2),
    ];
    write_pods(&file, &pods);
    let root = cgroup_root();
    for rank in 0..8 {
        let cgroup = root.join(pods[rank / 4].cgroup(0));
        fs::create_dir_all(&cgroup).expect("a cgroup");
        symlink(cgroup, place.path().join(format!("rank-{rank}"))).expect("a link");
    }
    let (exporter, _idle) = exporter(&folder, &["--pods", file.to_str().expect("UTF-8")]);
    let collectives = at_most(2500);
    let mut job = Job::start(
        &folder,
        &format!(
            "--ranks 8 --communicators 4 --collectives {collectives} --straggler 3 --delay-us 3000 --wait --cgroup {}/rank-%d",
            place.path().display()
        ),
    );
    job.hear("ready");
    job.tell("");
    let truth = job.truth();
    let scrape = exporter.scrape();
    let share = agrees(&scrape, &truth);
    // Between the probe and the job's clock a rank may lose its CPU, on a busy emulator more often.
    let least = if in_vm() { 0.95 } else { 0.99 };
    assert!(!compares_durations() || share > least, "{share}");
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    for rank in &truth {
        // Ranks of the world are those of the job; a split's are not.
        let pod = ["worker-0", "worker-1"][number(&rank["job_rank"]) as usize / 4];
        let number_ = rank["rank"].to_string();
        let labels = [
            ("namespace", "training"),
            ("pod", pod),
            ("container", "main"),
            ("communicator", rank["communicator"].as_str().expect("told")),
            ("rank", &*number_),
        ];
        let counted = scrape.sum(COLLECTIVES, &labels);
        assert_eq!(counted, number(&rank["collectives"]), "{rank}");
    }
    for (operation, made) in by_operation(&truth, "collectives") {
        let labels = [("operation", &*operation), ("source", "host")];
        let counted = scrape.sum("chandra_nccl_arrival_wait_seconds_count", &labels);
        assert_eq!(counted, made, "{operation}");
    }
    let seconds = by_operation(&truth, "call_seconds");
    for (operation, made) in by_operation(&truth, "calls") {
        let labels = [("operation", &*operation)];
        let counted = scrape.sum("chandra_nccl_enqueue_seconds_count", &labels);
        assert_eq!(counted, made, "{operation}");
        let took = scrape.sum("chandra_nccl_enqueue_seconds_sum", &labels);
        assert!(
            took > 0.0 && took < seconds[&operation],
            "{operation}: {took} s"
        );
    }
    // Each made each of its communicators once; the job's first process makes none.
    for phase in ["rendezvous", "allocate", "transports", "total"] {
        let labels = [("namespace", "training"), ("phase", phase)];
        let made = scrape.sum("chandra_nccl_init_seconds_count", &labels);
        assert_eq!(made, truth.len() as f64, "{phase}\n{}", scrape.text);
    }
    let waits = scrape.sum(PENDING, &[]);
    assert_eq!(waits, 0.0, "nothing is pending");
    job.tell("");
    job.child.wait().expect("it ends");
    // Their counters outlive the ranks.
    thread::sleep(Duration::from_secs(3));
    agrees(&exporter.scrape(), &truth);
}

#[test]
fn a_job_is_followed_from_its_middle() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let mut job = Job::start(
        &folder,
        "--ranks 8 --communicators 4 --straggler 5 --delay-us 3000 --forever",
    );
    job.hear("ready");
    thread::sleep(Duration::from_secs(1));
    let exporter = Exporter::start(&["--pods", "none"]);
    found(&exporter);
    exporter.scrape_until("each rank is followed", |scrape| {
        let ranks = |rank: u32| scrape.sum(COLLECTIVES, &[("rank", &*rank.to_string())]) > 20.0;
        (0..8).all(ranks)
    });
    job.tell("mark");
    job.hear("marked");
    let before = exporter.scrape();
    thread::sleep(Duration::from_secs(10));
    job.tell("stop");
    let truth = job.truth();
    let after = exporter.scrape();
    let (mut wait, mut seen, mut made, mut counted) = (0.0, 0.0, 0.0, 0.0);
    for rank in &truth {
        let grew = |metric| of_rank(&after, metric, rank) - of_rank(&before, metric, rank);
        let all = number(&rank["collectives"]);
        // The job goes on between its mark and the scrape.
        let missing = all - grew(COLLECTIVES);
        let most = match compares_durations() {
            true => 0.02 * all + 20.0,
            false => all,
        };
        assert!((0.0..=most).contains(&missing), "{missing} of {rank}");
        wait += number(&rank["wait_seconds"]);
        made += all;
        seen += grew(WAIT);
        counted += grew(COLLECTIVES);
        let last = number(&rank["last_arrivals"]) / all;
        let share = grew(LAST) / grew(COLLECTIVES);
        assert!(
            !compares_durations() || (share - last).abs() < 0.05,
            "{share}: {rank}"
        );
    }
    let (wait, seen) = (wait / made, seen / counted);
    println!(
        "{counted} of {made}; waited {:.1} µs, seen {:.1} µs",
        wait * 1e6,
        seen * 1e6
    );
    let off = if in_vm() { 0.05 } else { 0.03 };
    assert!(
        !compares_durations() || (seen / wait - 1.0).abs() < off,
        "{seen} of {wait}"
    );
}

#[test]
fn every_kind_of_communicator_is_followed() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let collectives = at_most(500);
    for how in [
        "--ranks 8 --communicators 7 --threads --init all",
        "--ranks 8 --communicators 5 --init scalable",
        "--ranks 6 --communicators 3 --threads --init group",
        "--ranks 2 --communicators 7 --init config",
        "--ranks 64 --communicators 2",
    ] {
        println!("{how}");
        let few = if how.contains("64") {
            collectives / 10
        } else {
            collectives
        };
        let mut job = Job::start(
            &folder,
            &format!("{how} --collectives {few} --straggler 1 --delay-us 3000 --wait"),
        );
        job.hear("ready");
        job.tell("");
        let mut truth = job.truth();
        // A communicator of one rank waits for nobody.
        truth.retain(|rank| number(&rank["nranks"]) > 1.0);
        let scrape = exporter.scrape();
        agrees(&scrape, &truth);
        assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    }
}

#[test]
fn a_version_that_is_not_known_is_followed_from_its_beginning() {
    let _alone = alone();
    let Some(folder) = unknown() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let collectives = at_most(1000);
    let mut job = Job::start(
        &folder,
        &format!("--ranks 4 --communicators 4 --collectives {collectives} --wait"),
    );
    job.hear("ready");
    job.tell("");
    let truth = job.truth();
    let scrape = exporter.scrape();
    let all: f64 = truth.iter().map(|rank| number(&rank["collectives"])).sum();
    assert_eq!(scrape.sum(COLLECTIVES, &[]), all, "{}", scrape.text);
    // Splits have a number and no rank, the others NCCL's own.
    let world = |rank: &&Value| number(&rank["nranks"]) == 4.0;
    for rank in truth.iter().filter(world) {
        let counted = of_rank(&scrape, COLLECTIVES, rank);
        assert_eq!(
            counted,
            number(&rank["collectives"]),
            "{rank}\n{}",
            scrape.text
        );
    }
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
}

#[test]
fn what_hangs_is_pending_until_nobody_waits_any_more() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    for (how, state) in [("stop", "sleeping"), ("exit", "gone")] {
        let mut job = Job::start(
            &folder,
            &format!(
                "--ranks 4 --communicators 3 --drop 2 --drop-at 20 --drop-how {how} --hold 600"
            ),
        );
        job.hear("left");
        let scrape = exporter.scrape_until("it hangs", |scrape| scrape.sum(PENDING, &[]) > 4.0);
        let age = scrape.sum(PENDING, &[]);
        thread::sleep(Duration::from_secs(2));
        let later = exporter.scrape().sum(PENDING, &[]);
        assert!(later > age + 1.0, "{later} s after {age} s");
        let scrape = exporter.scrape_until("it is told who is missing", |scrape| {
            scrape.sum(MISSING, &[]) > 20.0
        });
        // Rank 2 of the job is rank 0 of the smaller communicator that it is a part of; the third has not got it.
        for rank in ["2", "0"] {
            let waited = scrape.sum(MISSING, &[("rank", rank), ("state", state)]);
            assert!(waited > 10.0, "{rank}: {}", scrape.text);
        }
        let all = scrape.sum(MISSING, &[]);
        assert_eq!(scrape.sum(MISSING, &[("state", state)]), all);
        assert!(all < 2.0 * 60.0, "nobody else: {}", scrape.text);
        let communicators = scrape
            .series
            .iter()
            .filter(|(name, _)| name.starts_with(OF_COMMUNICATOR) && !name.contains("\"other\""));
        let ages: Vec<f64> = communicators.map(|(_, age)| *age).collect();
        let hang = ages.iter().filter(|age| **age > 4.0).count();
        assert_eq!((ages.len(), hang), (2, 2), "{}", scrape.text);
        // The ranks die with the process that started them.
        drop(job);
        let scrape =
            exporter.scrape_until("nobody waits", |scrape| scrape.sum(PENDING, &[]) == 0.0);
        assert_eq!(scrape.sum(MISSING, &[]), 0.0, "{}", scrape.text);
    }
    let mut job = Job::start(
        &folder,
        "--ranks 4 --communicators 3 --drop 2 --drop-at 20 --drop-how abort --abort-after-ms 4000 --wait --hold 1",
    );
    job.hear("ready");
    job.tell("");
    exporter.scrape_until("it hangs", |scrape| scrape.sum(PENDING, &[]) > 1.0);
    job.truth();
    exporter.scrape_until("it is aborted", |scrape| scrape.sum(PENDING, &[]) == 0.0);
    let scrape = exporter.scrape();
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
}

/// Processes that have the library mapped and do nothing with it, as data loaders have. Killed when dropped.
struct Idlers(Vec<Child>);

impl Idlers {
    fn start(folder: &Path, count: usize) -> Self {
        let start = |_| {
            let mut sleep = Command::new("sleep");
            sleep
                .arg("1000")
                .env("LD_PRELOAD", folder.join("libnccl.so.2"));
            sleep.spawn().expect("sleep")
        };
        Self((0..count).map(start).collect())
    }
}

impl Drop for Idlers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// More processes than any map has room for have NCCL mapped, of two versions, so that each is told of by itself: what the dead leave
/// behind is cleared as ever.
#[test]
fn many_processes_with_nccl_do_not_keep_what_the_dead_leave_behind() {
    let _alone = alone();
    let (Some(folder), Some(other)) = (known(), unknown()) else {
        return;
    };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let _idlers = [Idlers::start(&folder, 1100), Idlers::start(&other, 1100)];
    let mut job = Job::start(
        &folder,
        "--ranks 4 --communicators 3 --drop 2 --drop-at 20 --drop-how exit --hold 600",
    );
    job.hear("left");
    exporter.scrape_until("it hangs", |scrape| scrape.sum(PENDING, &[]) > 4.0);
    drop(job);
    let begin = Instant::now();
    exporter.scrape_until("nobody waits", |scrape| scrape.sum(PENDING, &[]) == 0.0);
    let took = begin.elapsed();
    println!("cleared in {took:?}");
    assert!(!compares_durations() || took < Duration::from_secs(10));
    // And whoever comes then is followed, from the beginning and from the middle.
    let mut job = Job::start(
        &folder,
        "--ranks 4 --communicators 3 --collectives 600 --interval-us 5000 --init-delay-rank 1 --init-delay-us 2000000 --hold 2",
    );
    let truth = job.truth();
    let scrape = exporter.scrape();
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    agrees(&scrape, &truth);
}

/// Whoever comes while it is being looked who is there is not taken for gone: the exporter stands still at any moment.
#[test]
fn ranks_that_come_during_a_look_keep_their_communicators() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    let (exporter, _idle) = exporter(&folder, &["--pods", "none"]);
    let pid = exporter.child.id();
    let over = std::sync::atomic::AtomicBool::new(false);
    let mut truths = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                run(&format!(
                    "kill -STOP {pid}; sleep 0.7; kill -CONT {pid}; sleep 0.02"
                ));
            }
        });
        for _ in 0..12 {
            let mut job = Job::start(
                &folder,
                "--ranks 4 --communicators 1 --collectives 100 --interval-us 5000",
            );
            truths.extend(job.truth());
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let scrape = exporter.scrape();
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);

    let did: f64 = truths.iter().map(|rank| number(&rank["collectives"])).sum();
    let counted = scrape.sum(COLLECTIVES, &[("source", "host")]);
    assert_eq!(counted, did, "{}", scrape.text);
}

/// The profiler plugin, and a program that calls it as NCCL does.
fn plugin() -> Option<PathBuf> {
    can_trace().then(built_plugin).flatten()
}

fn built_plugin() -> Option<PathBuf> {
    let folder = build().join("nccl-profiler");
    if in_vm() {
        return built_outside(folder, "plugin");
    }
    if !succeeds("cc --version && cargo --version") {
        skip("needs a C compiler and cargo");
        return None;
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    run(&format!(
        "CARGO_TARGET_DIR={folder}/target {package}/../nccl-profiler/build {folder}
         cc -O2 -Wall -Werror -o {folder}/plugin {package}/tests/kernel/nccl/plugin.c -ldl",
        folder = folder.display(),
        package = package.display()
    ));
    Some(folder)
}

/// A program that calls the plugin as NCCL does, once it is ready.
fn start_plugin(folder: &Path, ranks: u32, collectives: u32) -> Job {
    let mut child = Command::new(folder.join("plugin"))
        .arg(folder.join("libnccl-profiler.so"))
        .args([ranks.to_string(), collectives.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let says = BufReader::new(child.stdout.take().expect("piped"));
    let mut job = Job { child, says };
    job.hear("ready");
    job
}

fn plugin_found(exporter: &Exporter) {
    exporter.until_attached("nccl", "nccl_profiler_finished");
}

#[test]
fn the_plugin_tells_how_long_collectives_took_on_the_gpu_and_who_came_last() {
    let _alone = alone();
    let Some(folder) = plugin() else { return };
    let (ranks, collectives) = (8, 2000);
    let start = |ranks: u32| start_plugin(&folder, ranks, collectives);
    let idle = start(1);
    let exporter = Exporter::start(&["--pods", "none"]);
    plugin_found(&exporter);
    let mut job = start(ranks);
    let does = |job: &mut Job, what: &str| {
        job.tell(what);
        job.hear("done");
    };
    does(&mut job, "run");
    let scrape = exporter.scrape();
    assert_eq!(lost(&scrape), 0.0, "{}", scrape.text);
    // What the program made up: the first rank's durations, and what each rank takes less.
    let quarter = f64::from(collectives) / 4.0;
    let first: f64 = (0..collectives)
        .filter(|i| i % 4 == 0)
        .map(|i| 0.0004 + 1e-6 * f64::from(i % 1000) + 1e-3 * f64::from(ranks))
        .sum();
    let labels = [("operation", "all_reduce"), ("source", "kernel")];
    let seen = scrape.sum("chandra_nccl_collective_seconds_count", &labels);
    assert_eq!(seen, quarter * f64::from(ranks), "{}", scrape.text);
    let seconds = scrape.sum("chandra_nccl_collective_seconds_sum", &labels);
    let less = 1e-3 * f64::from(ranks * (ranks - 1) / 2) * quarter;
    let made = first * f64::from(ranks) - less;
    assert!((seconds - made).abs() < 1e-6, "{seconds} s of {made} s");
    for rank in 0..ranks {
        let name = rank.to_string();
        let of = |metric| {
            let labels = [
                ("communicator", "00000000feedc0de"),
                ("rank", &*name),
                ("source", "kernel"),
            ];
            scrape.sum(metric, &labels)
        };
        // Not the broadcasts.
        assert_eq!(of(COLLECTIVES), 3.0 * quarter, "{}", scrape.text);
        let waited = 3.0 * quarter * 1e-3 * f64::from(ranks - 1 - rank);
        assert!((of(WAIT) - waited).abs() < 1e-6, "{rank}: {}", of(WAIT));
        let last = if rank == ranks - 1 {
            3.0 * quarter
        } else {
            0.0
        };
        assert_eq!(of(LAST), last, "{rank}");
    }
    let labels = [("operation", "broadcast"), ("source", "kernel")];
    let waits = scrape.sum("chandra_nccl_arrival_wait_seconds_count", &labels);
    assert_eq!(waits, 0.0, "a broadcast does not end together");

    does(&mut job, "hang");
    exporter.scrape_until("it hangs", |scrape| scrape.sum(PENDING, &[]) > 2.0);
    job.tell("end");
    job.child.wait().expect("it ends");
    exporter.scrape_until("it is gone", |scrape| scrape.sum(PENDING, &[]) == 0.0);
    // One whose end NCCL never tells, while a later one ends, does not hang.
    let mut job = start(2);
    does(&mut job, "lose");
    thread::sleep(Duration::from_secs(3));
    let scrape = exporter.scrape();
    assert_eq!(scrape.sum(PENDING, &[]), 0.0, "{}", scrape.text);
    assert_eq!(lost(&scrape), 1.0, "{}", scrape.text);
    drop(idle);
}

/// Nanoseconds of a rank's call, on average.
fn call_of(folder: &Path, ranks: u32) -> f64 {
    let mut job = Job::start(
        folder,
        &format!(
            "--ranks {ranks} --kinds all_reduce --groups 0 --interval-us 0 --sync-every 500 --collectives 20000 --wait"
        ),
    );
    job.hear("ready");
    job.tell("");
    let truth = job.truth();
    let sum = |what: &str| by_operation(&truth, what)["all_reduce"];
    1e9 * sum("call_seconds") / sum("calls")
}

#[test]
#[ignore = "a measurement: prints what the host tier adds to a call"]
fn the_cost_of_a_call() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    // Without and with the exporter in turn, so that both see the same machine.
    for ranks in [1, 2, 8] {
        let mut added = Vec::new();
        for _ in 0..5 {
            let without = call_of(&folder, ranks);
            let (exporter, idle) = exporter(&folder, &["--pods", "none"]);
            let with = call_of(&folder, ranks);
            drop((exporter, idle));
            added.push((with - without, without));
        }
        added.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (least, (median, without), most) = (added[0].0, added[2], added[4].0);
        println!(
            "{ranks} ranks: a call of {without:.0} ns, added {median:.0} ns ({least:.0} to {most:.0})"
        );
    }
}

/// The kernel takes a tenth of a second for each probe of a file that it takes out, while the process can do nothing else.
#[test]
fn it_ends_soon_beside_a_job_of_both_tiers_and_leaves_nothing() {
    let _alone = alone();
    let (Some(folder), Some(plugin)) = (known(), plugin()) else {
        return;
    };
    if !process::can_look_into_the_kernel() {
        return;
    }
    let mut job = Job::start(
        &folder,
        "--ranks 8 --communicators 2 --straggler 1 --delay-us 3000 --forever",
    );
    job.hear("ready");
    let _plugin = start_plugin(&plugin, 8, 100);
    for signal in ["TERM", "KILL"] {
        let mut exporter = Exporter::start(&["--pods", "none"]);
        found(&exporter);
        plugin_found(&exporter);
        let held = process::held(exporter.pid);
        let (_, took) = exporter.stop(signal);
        let begin = Instant::now();
        process::is_freed(&held);
        let left = begin.elapsed();
        println!("SIG{signal}: ended in {took:?}, nothing left after {left:?}");
        let limit = Duration::from_secs(if in_vm() { 10 } else { 5 });
        assert!(!compares_durations() || took.max(left) < limit);
    }
    job.tell("stop");
}

#[test]
fn it_ends_in_half_a_minute_whatever_is_mapped() {
    let _alone = alone();
    let Some(folder) = known() else { return };
    if !compares_durations() {
        return println!(
            "SKIPPED: a minute, and durations: make kernel-test KERNEL=host SIGNAL=nccl"
        );
    }
    let copies = tempfile::tempdir().expect("a folder");
    let root = cgroup_root();
    // Of eight pods, since one may have a part of the places only.
    let jobs: Vec<_> = (0..24)
        .map(|copy| {
            let own = copied(&folder, copies.path(), copy);
            let pod = Pod::new("training", "worker", 100 + copy % 8);
            let cgroup = root.join(pod.cgroup(0));
            fs::create_dir_all(&cgroup).expect("a cgroup");
            symlink(cgroup, own.join("cgroup")).expect("a link");
            let place = own.join("cgroup");
            Job::start(
                &own,
                &format!(
                    "--ranks 1 --communicators 1 --collectives 1 --wait --cgroup {}",
                    place.display()
                ),
            )
        })
        .collect();
    let mut exporter = Exporter::start(&["--pods", "none"]);
    exporter.scrape_until("what has no room is said", |scrape| {
        scrape.has("chandra_hook_info", "reason=\"no_room\"")
    });
    let page = exporter.get("/");
    assert!(
        page.contains("probes of files that may be attached"),
        "{page}"
    );
    assert!(page.contains("one more than the 16 files"), "{page}");
    let (status, took) = exporter.stop("TERM");
    println!("ended in {took:?}");
    assert!(status.success(), "{status}");
    // An emulator shares its host.
    let limit = Duration::from_secs(if in_vm() { 60 } else { 30 });
    assert!(took < limit, "{took:?}");
    drop(jobs);
}
