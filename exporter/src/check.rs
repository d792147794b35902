// SPDX-License-Identifier: Apache-2.0
//! What will work on this host, and why not?
//!
//! Signals are really attached, for a moment, since nothing else tells what a kernel permits.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    capabilities::{CapabilitySet, Names},
    hook::Reason,
    kernel::{Hierarchy, Kernel},
    libraries, maps,
    pods::{Pods, Record, Source, cgroups},
    signals::{
        Options, SIGNALS, State, Status,
        running::{self, Running},
    },
};

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether every signal that this host has the means for works.
    pub ok: bool,
    /// What the host has.
    pub host: Vec<Fact>,
    /// What came of each signal.
    pub signals: Vec<Signal>,
    /// Kernel memory of all maps.
    pub maps: Maps,
}

/// One thing that the host has or lacks.
#[derive(Debug, Serialize)]
pub struct Fact {
    /// What.
    pub name: &'static str,
    /// `false` where something is missing that a signal may need.
    pub ok: bool,
    /// What was found, or what to do.
    pub detail: String,
}

/// What came of a signal.
#[derive(Debug, Serialize)]
pub struct Signal {
    /// Its name.
    pub name: &'static str,
    /// What has become of it.
    #[serde(flatten)]
    pub status: Status,
}

/// Kernel memory of all maps, in bytes.
#[derive(Debug, Serialize)]
pub struct Maps {
    /// CPUs that this kernel has room for.
    pub cpus: usize,
    /// On this host.
    pub bytes: u64,
    /// On a host with 256 CPUs.
    pub bytes_at_256_cpus: u64,
    /// What they may take there at most.
    pub budget: u64,
}

/// What is to be looked at.
#[derive(Debug)]
pub struct Look {
    /// Where cgroup v2 is mounted, if not where this process sees it.
    pub cgroupfs: Option<PathBuf>,
    /// Whether there is a secret for the names of NCCL's communicators.
    pub is_salted: bool,
    /// The pods of this node, where they are told.
    pub pods: Option<Vec<Record>>,
}

/// Looks at everything.
///
/// # Errors
/// When an embedded object cannot be parsed.
pub fn run(look: Look) -> anyhow::Result<Report> {
    let kernel = Kernel::read();
    let hierarchy = Hierarchy::of_host(look.cgroupfs.as_deref());
    let host = facts(&kernel, followed(&hierarchy, look.pods), look.is_salted);
    let options = Options {
        show_paths: true,
        ..Options::default()
    };
    // What processes have mapped is looked at right away.
    options.gate.open();
    let signals = running::attach(&kernel, &[], &options).into_iter();
    let signals: Vec<_> = signals
        .map(|Running { entry, status, .. }| Signal {
            name: entry.name,
            status,
        })
        .collect();
    let bytes = |cpus| {
        SIGNALS
            .iter()
            .flat_map(|entry| entry.objects)
            .map(|object| maps::bytes(object, cpus))
            .sum::<anyhow::Result<u64>>()
    };
    let maps = Maps {
        cpus: kernel.possible_cpus,
        bytes: bytes(kernel.possible_cpus)?,
        bytes_at_256_cpus: bytes(maps::MANY_CPUS)?,
        budget: maps::BUDGET,
    };
    let ok = signals
        .iter()
        .all(|signal| signal.status.state != State::Failed);
    Ok(Report {
        ok,
        host,
        signals,
        maps,
    })
}

/// Where cgroups are looked for, and if the containers of pods are there.
fn followed(hierarchy: &Hierarchy, records: Option<Vec<Record>>) -> Result<String, String> {
    let Hierarchy::V2 { root, whole: true } = hierarchy else {
        return Err(hierarchy.trouble().unwrap_or_default());
    };
    let pods = Arc::new(Pods::new(&Source::Kube, Duration::ZERO));
    // It walks once.
    let walked = cgroups::Watcher::new(root.clone(), Arc::clone(&pods));
    walked.map_err(|error| format!("{error:#}"))?;
    let has_pods = pods.view().has_pods();
    pods.pods_listed(records.unwrap_or_default(), Instant::now());
    let trouble = match pods.view().misplaced() {
        Some(pods) => cgroups::misplaced(hierarchy, pods),
        None if has_pods => None,
        None => cgroups::unplaced(root),
    };
    trouble.map_or_else(|| Ok(format!("v2 at {}", root.display())), Err)
}

fn facts(kernel: &Kernel, cgroups: Result<String, String>, is_salted: bool) -> Vec<Fact> {
    let fact = |name, result: Result<String, String>| match result {
        Ok(detail) => Fact {
            name,
            ok: true,
            detail,
        },
        Err(detail) => Fact {
            name,
            ok: false,
            detail,
        },
    };
    let capabilities = if kernel.may_trace() {
        may(kernel)
    } else {
        Err("CAP_BPF and CAP_PERFMON (before 5.8: CAP_SYS_ADMIN) are missing: run as root or add them".to_owned())
    };
    let lockdown = match kernel.lockdown() {
        Some(mode @ ("integrity" | "confidentiality")) => Err(format!(
            "{mode}: the kernel may refuse kprobes and fentry; tracepoints work under integrity"
        )),
        _ => Ok("off".to_owned()),
    };
    vec![
        fact("kernel", release(&kernel.release)),
        fact(
            "BTF",
            kernel
                .btf
                .as_ref()
                .map(|_| "/sys/kernel/btf/vmlinux".to_owned())
                .map_err(Clone::clone),
        ),
        fact("capabilities", capabilities),
        fact("lockdown", lockdown),
        fact("tracefs", tracefs()),
        fact("cgroups", cgroups),
        fact("Kubernetes", Ok(kubernetes().to_owned())),
        fact(
            "RDMA",
            Ok(listed(
                "/sys/class/infiniband",
                "no RDMA device (/sys/class/infiniband)",
            )),
        ),
        fact("GPU", Ok(gpu())),
        fact("NCCL", Ok(nccl())),
        fact("NCCL salt", salt(is_salted)),
    ]
}

/// What this process may do of what signals need, and what the rest is for.
fn may(kernel: &Kernel) -> Result<String, String> {
    let needs = || {
        SIGNALS
            .iter()
            .flat_map(|entry| entry.needs.iter().map(move |need| (entry, need)))
    };
    let all = needs().fold(CapabilitySet::empty(), |all, (_, need)| {
        all | need.capability
    });
    let held = Names(kernel.capabilities & all);
    let lacking = kernel.lacks(all);
    if lacking.is_empty() {
        return Ok(held.to_string());
    }
    let lost = needs()
        .filter(|(_, need)| lacking.contains(need.capability))
        .map(|(entry, need)| {
            let flag = need.with.map(|flag| format!(" {flag}")).unwrap_or_default();
            format!(
                "{} for {}{flag}: {}",
                Names(need.capability),
                entry.name,
                need.why
            )
        });
    let lost = lost.collect::<Vec<_>>().join("; ");
    Err(format!("{held}; not held: {lost}"))
}

fn release(release: &str) -> Result<String, String> {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 10) {
        Ok(release.to_owned())
    } else {
        Err(format!(
            "{release} is older than 5.10, the oldest kernel that Chandra is tested on"
        ))
    }
}

fn tracefs() -> Result<String, String> {
    ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .into_iter()
        .find(|dir| Path::new(dir).join("events").is_dir())
        .map(str::to_owned)
        .ok_or(
            "not mounted or not readable: mount -t tracefs tracefs /sys/kernel/tracing".to_owned(),
        )
}

fn kubernetes() -> &'static str {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        "inside a cluster: pod names come from the API server"
    } else {
        "outside of a cluster: name a pods file with --pods, or series carry cgroup names"
    }
}

fn listed(dir: &str, none: &str) -> String {
    let mut names: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    if names.is_empty() {
        none.to_owned()
    } else {
        names.join(", ")
    }
}

/// Character devices that GPU drivers register (`/proc/devices`).
fn gpu() -> String {
    let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
    let drivers: Vec<_> = ["nvidia-uvm", "kfd", "drm"]
        .into_iter()
        .filter(|driver| {
            devices
                .lines()
                .any(|line| line.split_whitespace().nth(1) == Some(driver))
        })
        .collect();
    if drivers.is_empty() {
        "no GPU driver (nvidia-uvm, kfd or drm in /proc/devices)".to_owned()
    } else {
        drivers.join(", ")
    }
}

/// Whether pages tell by what the kernel half joins ranks.
fn salt(is_given: bool) -> Result<String, String> {
    match is_given {
        true => Ok("communicators are named by a keyed hash".to_owned()),
        false => Err(
            "none: pages name communicators by NCCL's own number, and whoever reads it can pretend to be a rank; give all nodes one secret by \
             --nccl.salt-file"
                .to_owned(),
        ),
    }
}

/// Processes that have NCCL mapped.
fn nccl() -> String {
    let there = libraries::watch::processes().unwrap_or_default();
    let maps_nccl = |process: &&u32| libraries::has_nccl(**process);
    match there.iter().filter(maps_nccl).count() {
        0 => "no process has libnccl or librccl mapped".to_owned(),
        n => format!("libnccl or librccl is mapped by {n} processes"),
    }
}

/// Writes the report as a table for people.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    let mark = |ok| if ok { "ok  " } else { "no  " };
    for fact in &report.host {
        let _ = writeln!(text, "{}{:<14}{}", mark(fact.ok), fact.name, fact.detail);
    }
    text.push('\n');
    for Signal { name, status } in &report.signals {
        let (ok, state) = (status.state != State::Failed, status.state.label());
        let _ = writeln!(text, "{}{name:<14}{state}", mark(ok));
        for hook in &status.hooks {
            let (method, reason) = (hook.method.label(), hook.reason.label());
            let ok = mark(hook.reason == Reason::Attached);
            let _ = writeln!(text, "    {ok}{method} {}: {reason}", hook.name);
            if !hook.detail.is_empty() {
                let _ = writeln!(text, "        {}", hook.detail);
            }
        }
        for found in &status.found {
            let _ = writeln!(text, "    {found}");
        }
        for note in &status.notes {
            let _ = writeln!(text, "    works with less: {note}");
        }
    }
    let kib = |bytes: u64| bytes.div_ceil(1024);
    let maps = &report.maps;
    let _ = writeln!(
        text,
        "\nmaps: {} KiB of kernel memory with {} possible CPUs, {} KiB with 256 (budget {} KiB)",
        kib(maps.bytes),
        maps.cpus,
        kib(maps.bytes_at_256_cpus),
        kib(maps.budget)
    );
    text
}
