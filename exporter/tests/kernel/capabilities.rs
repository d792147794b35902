// SPDX-License-Identifier: Apache-2.0
//! The capabilities that signals say they need (`Entry::needs`): with them every hook is attached, without one of them
//! something is missing and says which it is, and everything else is given up. The table of docs/security.md is what is seen here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use chandra::{
    capabilities::{self, CUDA_CALLS, CapabilitySet, GPU_DEVICE, Need},
    signals::{Entry, SIGNALS, State},
};

use super::{
    alone, can_trace,
    common::{
        privileges::{KERNELS, Table},
        *,
    },
    gpu::{DEVICE, Worker, calls},
    in_vm, nccl, skip,
};

/// Things to attach to: modules, a device and who has it open, a library and who has it mapped.
struct Host {
    level: String,
    children: Vec<Child>,
    job: Option<nccl::Job>,
    worker: Option<Worker>,
    /// The column of the table, where this kernel has one.
    column: Option<usize>,
    table: Table,
}

/// A level of `kernel.perf_event_paranoid` that only Debian's and Ubuntu's kernels know, and the mainline's default.
const STRICT: u32 = 3;
const DEFAULT: u32 = 2;

const PARANOID: &str = "/proc/sys/kernel/perf_event_paranoid";

impl Host {
    fn new() -> Self {
        run(
            // While there is but one network namespace: with others the kernel refuses.
            "modprobe -a rdma_rxe rdma_ucm ib_uverbs; rdma system set netns exclusive
             modprobe -a wireguard esp4 esp6 vgem
             ip link add chandra0 type dummy; ip link set chandra0 up
             rdma link add rxe0 type rxe netdev chandra0
             for i in $(seq 100); do [ -e /dev/dri/renderD128 ] && break; sleep 0.1; done",
        );
        let start = |command: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", command]).stdin(Stdio::null());
            shell.spawn().expect("sh")
        };
        Self {
            level: fs::read_to_string(PARANOID).expect("procfs"),
            children: vec![
                start("exec sleep 100000 </dev/dri/renderD128"),
                start("exec unshare --net sleep 100000"),
            ],
            worker: calls::mapped(),
            column: {
                let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
                let is = |kernel: &&str| release.starts_with(&format!("{kernel}."));
                KERNELS.iter().position(is)
            },
            table: Table::committed().completed(),
            job: nccl::known().map(|folder| {
                nccl::Job::start(
                    &folder,
                    "--ranks 1 --communicators 1 --collectives 1 --wait",
                )
            }),
        }
    }

    fn restrict(&self, level: u32) {
        fs::write(PARANOID, level.to_string()).expect("root");
    }

    fn has_nccl(&self) -> bool {
        self.job.is_some()
    }

    /// What was seen without a capability: of the table, or to become it.
    fn saw(&mut self, signal: &Entry, need: &Need, seen: &str, words: &str) {
        let Some(column) = self.column else { return };
        let cells = self.table.seen(signal.name, need, column);
        let news = [seen, words];
        // The words are those of the last kernel.
        let count = 1 + usize::from(column + 1 == KERNELS.len());
        if updates() {
            for (cell, new) in cells.into_iter().zip(&news[..count]) {
                *cell = (*new).to_owned();
            }
            return;
        }
        assert!(
            cells
                .iter()
                .zip(&news[..count])
                .all(|(cell, new)| cell == new),
            "docs/security.md (make privileges): {cells:?}, and seen {news:?}"
        );
    }
}

/// Says if the table is to be written.
fn updates() -> bool {
    std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| !value.is_empty())
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::write(PARANOID, &self.level);
        // A namespace goes some time after its last process.
        succeeds(
            "for i in $(seq 100); do rdma system set netns shared && break; sleep 0.2; done; rdma link del rxe0; ip link del chandra0; rmmod vgem",
        );
    }
}

/// What a run with some capabilities shows of one signal: its state, the reason of each hook, and its part of the page.
struct Seen {
    state: &'static str,
    hooks: BTreeMap<String, String>,
    page: String,
}

impl Seen {
    /// Attached hooks, by name and method.
    fn attached(&self) -> BTreeSet<&str> {
        let attached = self
            .hooks
            .iter()
            .filter(|(_, reason)| *reason == "attached");
        attached.map(|(hook, _)| &**hook).collect()
    }
}

/// Waits a while for a word on the page, if one is given: what runs beside the scrapes is told late.
fn see(signal: &Entry, flag: Option<&str>, held: CapabilitySet, word: &str) -> Seen {
    let names = held.iter_names();
    let names: String = names
        .map(|(name, _)| format!(",+{}", name.to_lowercase()))
        .collect();
    let mut others: Vec<_> = SIGNALS.iter().map(|entry| entry.name).collect();
    others.retain(|name| *name != signal.name);
    // Without devices of its own, as a container is.
    let (before, flags): (&str, &[&str]) = match flag {
        Some(GPU_DEVICE) => ("mount -t tmpfs dev /dev; ", &[GPU_DEVICE, DEVICE]),
        Some(CUDA_CALLS) => (
            "",
            &[CUDA_CALLS, "--cuda-calls.budget=1", GPU_DEVICE, DEVICE],
        ),
        _ => ("", &[]),
    };
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        &format!("{before}exec \"$@\""),
        "sh",
        "setpriv",
    ]);
    command.arg(format!("--bounding-set=-all{names}"));
    command.arg(build().join("chandra"));
    let exporter = Exporter::start_by(
        &mut command,
        &[&["--pods", "none", "--disable", &others.join(",")], flags].concat(),
    );
    if signal.name == "nccl" || flag == Some(CUDA_CALLS) {
        exporter.scrape_until("the library is found, or is said not to be", |scrape| {
            let hook = scrape.has("chandra_hook_info", "method=\"uprobe\"");
            hook || exporter.get("/").contains("CAP_")
        });
    }
    let end = Instant::now() + Duration::from_secs(20);
    let (scrape, page) = loop {
        let seen = (exporter.scrape(), exporter.get("/"));
        if seen.1.contains(word) || Instant::now() > end {
            break seen;
        }
        thread::sleep(Duration::from_millis(200));
    };
    let state = |label: &&(State, &'static str)| {
        scrape.sum(
            "chandra_signal_state",
            &[("signal", signal.name), ("state", label.1)],
        ) == 1.0
    };
    let state = State::LABELS.iter().find(state).expect("one state").1;
    let label = |series: &str, name: &str| {
        let (_, rest) = series.split_once(&format!("{name}=\"")).expect("a label");
        rest.split('"').next().unwrap_or_default().to_owned()
    };
    let of_signal = format!("signal=\"{}\"", signal.name);
    let hooks = scrape.series.keys();
    let hooks = hooks
        .filter(|series| series.starts_with("chandra_hook_info") && series.contains(&of_signal));
    let hooks = hooks.map(|series| {
        let name = format!("{} {}", label(series, "method"), label(series, "hook"));
        (name, label(series, "reason"))
    });
    Seen {
        state,
        hooks: hooks.collect(),
        page,
    }
}

/// The words of a page that end with what to do about a capability, as people read them.
fn words(page: &str, name: &str) -> String {
    let part = page
        .split(['<', '>', '\n'])
        .find(|part| part.contains(name));
    let text = part
        .unwrap_or_default()
        .replace("&#39;", "'")
        .replace("&quot;", "\"")
        .replace("&amp;", "&");
    let at = text.find(name).unwrap_or_default();
    let from = text[..at].rfind("; ").map_or(0, |at| at + 2);
    // How many more there are is this host's matter.
    let words = text[from..].trim();
    let words = words
        .split_once(" (and ")
        .map_or(words, |(before, _)| before);
    match words.split_once(" namespaces or more") {
        Some((before, after)) => {
            let before = before.trim_end_matches(|c: char| c.is_ascii_digit());
            format!("{before}N namespaces or more{after}")
        }
        None => words.to_owned(),
    }
}

/// Runs a signal with what it says that it needs, and without each of that; with a flag, without what is for the flag.
fn holds_to_its_needs(signal: &Entry, flag: Option<&str>, host: &mut Host) {
    let needs: Vec<_> = signal
        .needs
        .iter()
        .filter(|need| need.with.is_none() || need.with == flag)
        .collect();
    let set = needs.iter().fold(CapabilitySet::SYS_RESOURCE, |all, need| {
        all | need.capability
    });
    let name = [Some(signal.name), flag].into_iter().flatten();
    let name = name.collect::<Vec<_>>().join(" ");
    let all = see(signal, flag, CapabilitySet::all(), "");
    assert_eq!(all.state, "up", "{name} with everything");
    let enough = see(signal, flag, set, "");
    println!(
        "{name}: {} hooks with {}",
        enough.attached().len(),
        capabilities::Names(set)
    );
    assert_eq!(
        enough.hooks,
        all.hooks,
        "{name} with {}",
        capabilities::Names(set)
    );
    assert!(!enough.page.contains("add CAP_"), "{}", enough.page);

    // CAP_SYS_ADMIN stands for two others: they are tried without it, where the kernel does not ask for it.
    host.restrict(DEFAULT);
    let tracing = CapabilitySet::BPF | CapabilitySet::PERFMON;
    for need in needs.into_iter().filter(|need| need.with == flag) {
        let one = need.capability;
        let without = match tracing.contains(one) {
            true => set - CapabilitySet::SYS_ADMIN - one,
            false => set - one,
        };
        host.restrict(if one == CapabilitySet::SYS_ADMIN {
            STRICT
        } else {
            DEFAULT
        });
        let lacking = capabilities::Names(one).to_string();
        let seen = see(signal, flag, without, &lacking);
        let what = match seen.state {
            "up" => format!(
                "up, {} of {} hooks",
                seen.attached().len(),
                all.attached().len()
            ),
            state => state.to_owned(),
        };
        let words = words(&seen.page, &lacking);
        println!("{name} without {lacking}: {what}: {words}");
        let lost = seen.attached() != all.attached() || one == CapabilitySet::SYS_PTRACE;
        assert!(lost, "{name} works without {lacking}");
        assert!(
            seen.page.contains(&lacking),
            "nothing says {lacking}: {}",
            seen.page
        );
        host.saw(signal, need, &what, &words);
    }
    host.restrict(STRICT);
}

#[test]
fn what_a_signal_says_that_it_needs_is_enough_and_not_too_much() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    if !in_vm() {
        return skip("changes a sysctl and loads modules: only in the VM");
    }
    let mut host = Host::new();
    host.restrict(STRICT);
    for signal in SIGNALS {
        if signal.name == "nccl" && !host.has_nccl() {
            continue;
        }
        let flags: BTreeSet<_> = signal.needs.iter().map(|need| need.with).collect();
        for flag in flags {
            if flag != Some(CUDA_CALLS) || host.worker.is_some() {
                holds_to_its_needs(signal, flag, &mut host);
            }
        }
    }
    if updates() {
        host.table.write();
    }
}

/// The sets of capabilities of each thread of a process, and whether a program that it executes could have more.
fn of_threads(pid: u32) -> BTreeSet<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let of_thread = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).expect("a thread");
        let wanted = |line: &&str| line.starts_with("Cap") || line.starts_with("NoNewPrivs");
        status
            .lines()
            .filter(wanted)
            .map(|line| line.replace('\t', " "))
            .collect()
    };
    tasks
        .map(|task| of_thread(task.expect("a thread")))
        .collect()
}

#[test]
fn what_no_signal_needs_is_given_up_by_every_thread() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let hex = |set: CapabilitySet| format!("{:016x}", set.bits());
    for (flags, kept) in [
        (&[][..], SIGNALS),
        (
            &["--disable", "rdma,gpu,nccl,encryption"][..],
            &SIGNALS[..1],
        ),
    ] {
        let exporter = Exporter::start(&[&["--pods", "none"], flags].concat());
        exporter.scrape();
        let needs = kept.iter().flat_map(|entry| entry.needs);
        let kept = capabilities::of(needs.filter(|need| need.applies(&[])));
        // In a container this test itself may hold less.
        let kept = hex(kept & capabilities::held());
        let expected = vec![
            format!("CapInh: {}", hex(CapabilitySet::empty())),
            format!("CapPrm: {kept}"),
            format!("CapEff: {kept}"),
            format!("CapBnd: {kept}"),
            format!("CapAmb: {}", hex(CapabilitySet::empty())),
            "NoNewPrivs: 1".to_owned(),
        ];
        assert_eq!(
            of_threads(exporter.child.id()),
            BTreeSet::from([expected]),
            "{flags:?}"
        );
    }
}
