// SPDX-License-Identifier: Apache-2.0
//! What the layers promise each other, checked against the source tree: names, label values, files, limits.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use chandra::{
    args::Args,
    families::{Desc, Families, Kind, POD},
    hook::{Method, Reason},
    kernel::{Hierarchy, Kernel},
    ledger::{Ledger, Opening},
    pods::{Place, Pods, Record, Source},
    reference,
    scrape::{self, Exporter},
    server::Site,
    signals::{
        self, Options, SIGNALS, State, encryption, gpu,
        nccl::{
            pending::Pending,
            ranks::{Ranks, Reading},
        },
        rdma,
        running::{self, Running},
        tcp,
    },
};
use clap::Parser;
use exporter_common::{
    Loss,
    nccl::{self, call_slots, init_slots, wait_slots},
    tcp::Kind as Retransmit,
};

mod common;

use common::privileges::Table;

fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the workspace").to_owned()
}

fn descs() -> impl Iterator<Item = &'static Desc> {
    let of_signals = SIGNALS.iter().flat_map(|entry| entry.descs);
    of_signals.chain(scrape::DESCS).copied()
}

/// Every file below a folder of the source tree whose name has an ending, with its text.
fn files(folder: &str, ending: &str) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for entry in entries {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                if !path.ends_with("target") {
                    folders.push(path);
                }
            } else if path.to_string_lossy().ends_with(ending) {
                let text = fs::read(&path).expect("readable");
                found.insert(path, String::from_utf8_lossy(&text).into_owned());
            }
        }
    }
    found
}

/// The values that are declared for a label of a metric.
fn declared(metric: &str, label: &str) -> Vec<&'static str> {
    let desc = descs()
        .find(|desc| desc.name == metric)
        .unwrap_or_else(|| panic!("no metric {metric}"));
    let (_, values) = desc
        .values
        .iter()
        .find(|(name, _)| *name == label)
        .unwrap_or_else(|| panic!("{metric} has no enum {label}"));
    values.to_vec()
}

#[test]
fn the_declared_label_values_are_those_that_the_code_produces() {
    // A variant more is refused here by the compiler, until it is in the list beside it.
    let kinds = [
        Retransmit::Syn,
        Retransmit::SynAck,
        Retransmit::Rto,
        Retransmit::Fast,
        Retransmit::Probe,
    ];
    let produced = kinds.map(|kind| match kind {
        Retransmit::Syn
        | Retransmit::SynAck
        | Retransmit::Rto
        | Retransmit::Fast
        | Retransmit::Probe => Retransmit::LABELS[kind as usize].1,
    });
    assert_eq!(produced, Retransmit::LABELS.map(|(_, label)| label));
    assert_eq!(declared("chandra_tcp_retransmits_total", "kind"), produced);

    let states = [State::Up, State::Absent, State::Disabled, State::Failed];
    let produced = states.map(|state| match state {
        State::Up | State::Absent | State::Disabled | State::Failed => state.label(),
    });
    assert_eq!(
        State::LABELS,
        std::array::from_fn(|i| (states[i], produced[i]))
    );
    assert_eq!(declared("chandra_signal_state", "state"), produced);

    let methods = [
        Method::TpBtf,
        Method::Inotify,
        Method::Kprobe,
        Method::Kretprobe,
        Method::Netlink,
        Method::Iter,
        Method::Tracepoint,
        Method::Uprobe,
        Method::Uretprobe,
    ];
    let produced = methods.map(|method| match method {
        Method::TpBtf
        | Method::Inotify
        | Method::Kprobe
        | Method::Kretprobe
        | Method::Netlink
        | Method::Iter
        | Method::Tracepoint
        | Method::Uprobe
        | Method::Uretprobe => method.label(),
    });
    assert_eq!(declared("chandra_hook_info", "method"), produced);

    let reasons = [
        Reason::Attached,
        Reason::NoBtf,
        Reason::NoHook,
        Reason::NoField,
        Reason::NoPermission,
        Reason::NoMemory,
        Reason::Rejected,
        Reason::Failed,
        Reason::NoCgroupV2,
        Reason::PartOfHierarchy,
        Reason::ContainersElsewhere,
        Reason::Expensive,
        Reason::NoRoom,
    ];
    let produced = reasons.map(|reason| match reason {
        Reason::Attached
        | Reason::NoBtf
        | Reason::NoHook
        | Reason::NoField
        | Reason::NoPermission
        | Reason::NoMemory
        | Reason::Rejected
        | Reason::Failed
        | Reason::NoCgroupV2
        | Reason::PartOfHierarchy
        | Reason::ContainersElsewhere
        | Reason::Expensive
        | Reason::NoRoom => reason.label(),
    });
    assert_eq!(declared("chandra_hook_info", "reason"), produced);

    let losses = [
        Loss::MapFull,
        Loss::Unreadable,
        Loss::MissedReturn,
        Loss::Untimed,
        Loss::MissedSwitch,
    ];
    let in_kernel = losses.map(|loss| match loss {
        Loss::MapFull
        | Loss::Unreadable
        | Loss::MissedReturn
        | Loss::Untimed
        | Loss::MissedSwitch => Loss::LABELS[loss as usize].1,
    });
    assert_eq!(in_kernel, Loss::LABELS.map(|(_, label)| label));
    let reasons = declared("chandra_lost_events_total", "reason");
    assert_eq!(
        reasons,
        [&in_kernel[..], &["recursion", "read_failed"]].concat()
    );
    for running in failed_signals() {
        let produced: Vec<_> = running.lost().map(|(reason, _)| reason).collect();
        assert_eq!(produced, reasons, "{}", running.entry.name);
    }
}

/// The signals on a kernel without BTF: none attaches, whatever the host is.
fn failed_signals() -> Vec<Running> {
    let mut kernel = Kernel::read();
    kernel.btf = Err("this kernel has no BTF".to_owned());
    let options = Options {
        max_owners: 1200,
        ..Options::default()
    };
    running::attach(&kernel, &[], &options)
}

#[test]
fn metrics_are_named_as_prometheus_has_it() {
    let mut names = HashSet::new();
    for desc in descs() {
        let name = desc.name;
        assert!(names.insert(name), "{name} is declared twice");
        let rest = name.strip_prefix("chandra_").unwrap_or_default();
        assert!(
            !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
            "{name}"
        );
        let total = name.ends_with("_total");
        assert_eq!(total, desc.kind == Kind::Counter, "{name}");
        for unit in [
            "_ms",
            "_us",
            "_ns",
            "_milliseconds",
            "_kb",
            "_mb",
            "_percent",
        ] {
            let stem = name.trim_end_matches("_total");
            assert!(!stem.ends_with(unit), "{name} has no base unit");
        }
    }
}

#[test]
fn help_is_one_sentence() {
    for Desc {
        name, help, source, ..
    } in descs()
    {
        let begins = help.starts_with(|c: char| c.is_ascii_uppercase() || c.is_ascii_digit());
        assert!(begins && help.ends_with('.'), "{name}: {help}");
        assert!(
            !help.contains(". ") && !help.contains('\n'),
            "{name}: {help}"
        );
        assert!(!source.is_empty(), "{name} has no source");
        for cell in [help, source] {
            assert!(
                !cell.contains('|'),
                "{name}: a bar ends a cell of the reference"
            );
        }
    }
}

#[test]
fn labels_are_words_and_declared_values_belong_to_them() {
    for desc in descs() {
        let mut seen: HashSet<_> = POD.into_iter().filter(|_| desc.per_pod).collect();
        for label in desc.labels {
            let word = label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(word && seen.insert(label), "{} {label}", desc.name);
        }
        for (label, values) in desc.values {
            assert!(desc.labels.contains(label), "{} {label}", desc.name);
            let unique: HashSet<_> = values.iter().collect();
            assert_eq!(unique.len(), values.len(), "{} {label}", desc.name);
            // Ours are lower case; what the kernel's tools spell in capitals stays so.
            for value in *values {
                let word = |letter: fn(&u8) -> bool| {
                    let rest = |b: &u8| b.is_ascii_digit() || *b == b'_';
                    value.bytes().all(|b| letter(&b) || rest(&b))
                };
                let is_word = word(u8::is_ascii_lowercase) || word(u8::is_ascii_uppercase);
                assert!(is_word, "{} {label} {value}", desc.name);
            }
        }
    }
}

#[test]
fn every_metric_name_stands_once_in_the_sources() {
    let mut literals: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for (path, text) in files("exporter/src", ".rs") {
        for (at, _) in text.match_indices("\"chandra_") {
            let name: String = text[at + 1..].chars().take_while(|c| *c != '"').collect();
            literals.entry(name).or_default().push(path.clone());
        }
    }
    let once: BTreeSet<_> = literals.keys().map(String::as_str).collect();
    let known: BTreeSet<_> = descs().map(|desc| desc.name).collect();
    assert_eq!(
        once, known,
        "a literal without a metric, or a metric in no list"
    );
    for (name, places) in literals {
        assert_eq!(places.len(), 1, "{name} stands in {places:?}");
    }
}

#[test]
fn the_reference_is_what_the_binary_prints() {
    let committed = fs::read_to_string(root().join("docs/metrics.md")).unwrap_or_default();
    assert!(
        committed == reference::markdown(),
        "docs/metrics.md is not what `chandra metrics` prints: run make generate"
    );
    for desc in descs() {
        let row = format!("| `{}` | ", desc.name);
        assert_eq!(committed.matches(&row).count(), 1, "{}", desc.name);
    }
}

#[test]
fn a_signals_word_is_a_file_in_every_layer_and_no_file_lacks_its_signal() {
    let signals: BTreeSet<_> = SIGNALS.iter().map(|entry| entry.name.to_owned()).collect();
    assert_eq!(signals.len(), SIGNALS.len(), "two signals have one name");
    for name in &signals {
        let word = name.bytes().all(|b| b.is_ascii_lowercase());
        assert!(word, "{name} is not one word");
    }
    // `gpu_jobs` is an object of `gpu`.
    let is_part = |name: &str| {
        let signal = name.split_once('_').map(|(signal, _)| signal);
        signal.is_some_and(|signal| signals.contains(signal))
    };
    for (folder, ending, shared) in [
        ("exporter-common/src", ".rs", &["lib", "histogram"][..]),
        ("exporter-ebpf/src/bin", ".rs", &[]),
        ("exporter-ebpf/objects", ".o", &[]),
        ("exporter/src/signals", ".rs", &["mod", "follow", "running"]),
        ("exporter/tests/golden", ".prom", &["exporter"]),
    ] {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(root().join(folder)).expect("a folder of the source tree") {
            let entry = entry.expect("readable");
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // A large one is a folder.
            let name = match name.strip_suffix(ending) {
                None if entry.path().is_dir() => Some(&*name),
                name => name,
            };
            if let Some(name) = name
                && !shared.contains(&name)
                && !is_part(name)
            {
                found.insert(name.to_owned());
            }
        }
        assert_eq!(found, signals, "{folder}/*{ending}");
    }
}

#[test]
fn objects_say_nothing_of_the_machine_that_built_them() {
    let root = root();
    let here = root.to_str().expect("UTF-8");
    for entry in SIGNALS {
        let bytes = entry.objects.iter().copied().flatten();
        let text: String = bytes.map(|byte| char::from(*byte)).collect();
        // A mangled name has the crate's hash, which depends on the folder of the build: inline the function.
        for place in [
            "_RN", here, "/home/", "/root/", "/work/", "/tmp/", "/usr/", "/build/", "/rustc/",
            ".cargo", ".rustup",
        ] {
            assert!(!text.contains(place), "{}.o contains {place}", entry.name);
        }
    }
}

/// The lines of a source that are code, with their numbers. No string here spans lines and holds `//`.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate();
    lines.map(|(at, line)| (at, line.split("//").next().unwrap_or_default()))
}

/// Whether a keyword stands in a line of code. In `'<keyword>-inline'` it does not.
fn has_keyword(line: &str, keyword: &str) -> bool {
    line.match_indices(keyword).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + keyword.len()..].chars().next();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
            && matches!(after, None | Some(' ' | '('))
    })
}

#[test]
fn unsafe_stands_only_beside_the_kernel_and_says_why_it_is_sound() {
    // Not written out, so that this file has none.
    let word = ["un", "safe"].concat();
    let mut met = 0;
    for (path, text) in files("", ".rs") {
        let shown = path.strip_prefix(root()).expect("below the root");
        let lines: Vec<_> = text.lines().collect();
        let allowed = ["exporter-ebpf", "exporter-common", "nccl-profiler"];
        let allowed = allowed.iter().any(|folder| shown.starts_with(folder));
        for (at, line) in code(&text).filter(|(_, line)| has_keyword(line, &word)) {
            met += 1;
            let place = format!("{}:{}: {}", shown.display(), at + 1, line.trim());
            assert!(allowed, "{place}");
            let above = &lines[at.saturating_sub(3)..at];
            let says = |what: &str| above.iter().any(|line| line.contains(what));
            // Who calls such a function has a block of its own; only others have to be told what to keep.
            let line_ = line.trim_start();
            let private_fn = [format!("{word} fn"), format!("{word} extern \"C\" fn")];
            let private_fn = private_fn.iter().any(|begin| line_.starts_with(begin));
            // The type of a function, and the declaration of others' functions.
            let only_says = line.contains(&format!("{word} extern \"C\" fn("))
                || line.contains(&format!("{word} extern \"C\" {{"));
            let sound = private_fn || only_says || says("// SAFETY: ") || {
                has_keyword(line, "pub") && says("/// # Safety")
            };
            assert!(sound, "nothing in the 3 lines above says why: {place}");
        }
    }
    assert!(met > 10, "the objects cannot do without");
    for file in ["exporter/src/lib.rs", "exporter/src/main.rs"] {
        let text = fs::read_to_string(root().join(file)).expect(file);
        assert!(text.contains(&format!("#![forbid({word}_code)]")), "{file}");
    }
}

/// What the kernel half has of a rank that has waited once.
fn reading(communicator: u64, rank: u64, cgroup: u64) -> Reading {
    let handle = nccl::Handle {
        process: 1,
        address: communicator,
    };
    let member = nccl::Member {
        cgroup,
        handle,
        rank,
        wait: 1,
        collectives: 1,
        last: 0,
        duration: 0,
        ended: 0,
    };
    let seat = nccl::Seat {
        group: communicator,
        index: rank,
    };
    Reading {
        seat,
        member,
        communicator,
        source: 0,
    }
}

/// Series of a node with 8 GPU pods, as docs/design.md promises.
const BUDGET: usize = 2500;

#[test]
fn a_node_with_eight_gpu_pods_stays_within_the_series_budget() {
    let pods = Pods::new(&Source::Kube, Duration::from_secs(300));
    let now = Instant::now();
    pods.cgroup_found(1, Place::Unit("/".into()));
    let mut cgroups = vec![exporter_common::NO_CGROUP, 1];
    for pod in 0..8_u64 {
        let uid: Arc<str> = format!("uid-{pod}").into();
        let id = |container: u64| -> Arc<str> { format!("{pod}-{container}").into() };
        let containers = [(id(0), "worker".into()), (id(1), "sidecar".into())];
        let record = Record {
            uid: uid.clone(),
            object: uid.clone(),
            namespace: "training".into(),
            name: format!("llama-worker-{pod}").into(),
            created: 0,
            containers: containers.into(),
            is_running: true,
            in_host: false,
            addresses: Vec::new(),
        };
        pods.pod_found(record, now);
        let first = 10 + 3 * pod;
        pods.cgroup_found(first, Place::Pod { uid: uid.clone() });
        for container in 0..2 {
            let (uid, id) = (uid.clone(), id(container));
            pods.cgroup_found(first + 1 + container, Place::Container { uid, id });
        }
        cgroups.extend(first..first + 3);
    }
    let view = pods.view();
    let mut families = Families::default();
    let (mut jobs, mut nccl_alone) = (0, 0);
    for entry in SIGNALS {
        let before = families.series();
        match entry.name {
            "tcp" => {
                let mut ledger = Ledger::new(1200, |kinds: &[u64; tcp::KINDS]| kinds.iter().sum());
                let totals = cgroups.iter().map(|cgroup| (*cgroup, [1; tcp::KINDS]));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                tcp::render(ledger.accounts(), &mut families);
            }
            // Each worker does everything that there is, on 8 devices; nobody else has a queue pair.
            "rdma" => {
                let sum = |slots: &[u64; rdma::SLOTS]| slots.iter().sum();
                let mut ledger = Ledger::new(1200, sum).opening(Opening::Events);
                let workers = cgroups.iter().filter(|cgroup| **cgroup % 3 == 2);
                let totals = workers.map(|cgroup| (*cgroup, [1; rdma::SLOTS]));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                rdma::render(ledger.accounts(), |_| false, &mut families);
                let devices: Vec<String> = (0..8).map(|i| format!("mlx5_{i}")).collect();
                let created = devices.iter().map(|device| (device.clone(), [1, 1]));
                rdma::render_devices(&created.collect(), &mut families);
                let ages: Vec<_> = devices
                    .iter()
                    .map(|device| (device.clone(), 1.0, false))
                    .collect();
                let accounts: Vec<_> = ledger.accounts().map(|(labels, _)| labels).collect();
                let own = accounts
                    .iter()
                    .filter(|labels| !labels.container.is_empty());
                // Each GPU has a NIC beside it; a pod uses that one, and the kernel's pairs are on every one.
                let pairs = own.zip(&devices).flat_map(|(labels, device)| {
                    let states = ["RTS", "ERR", "INIT"];
                    states.map(|state| (labels, &**device, "RC", state, 1))
                });
                let kernel = devices
                    .iter()
                    .map(|device| (&accounts[0], &**device, "GSI", "RTS", 1));
                rdma::render_gauge(pairs.chain(kernel), &ages, &mut families);
            }
            // As many pods as a node has GPUs drive one each.
            "gpu" => {
                let sum = |slots: &[u64; gpu::SLOTS]| slots.iter().sum();
                let mut ledger = Ledger::new(1200, sum).opening(Opening::Events);
                let pods = cgroups.iter().filter(|cgroup| **cgroup % 3 == 1).take(16);
                let totals = pods.map(|cgroup| (*cgroup, [1; gpu::SLOTS]));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                let each = |gpu: usize| [(("nvidia".into(), u32::try_from(gpu).ok()), 1)].into();
                let processes = ledger.accounts().enumerate();
                let processes = processes.map(|(gpu, (labels, _))| (labels, each(gpu)));
                gpu::render(ledger.accounts(), &processes.collect(), &mut families);
                let alone = families.series();
                // Each has jobs on a ring of its device.
                let sum = |slots: &[u64; gpu::jobs::SLOTS]| slots.iter().sum();
                let mut ledger = Ledger::new(1200, sum).opening(Opening::Events);
                let pods = cgroups.iter().filter(|cgroup| **cgroup % 3 == 1).take(8);
                let totals = pods.map(|cgroup| (*cgroup, [1; gpu::jobs::SLOTS]));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                gpu::jobs::render("0000:c3:00.0", "comp", ledger.accounts(), &mut families);
                jobs = families.series() - alone;
            }
            // Every pod sends and receives through one kind of encryption, as the host does; all peers are shown.
            "encryption" => {
                let sum = |slots: &[u64; encryption::SLOTS]| slots.iter().sum();
                let mut ledger = Ledger::new(1200, sum).opening(Opening::Events);
                let mut slots = [0; encryption::SLOTS];
                slots[..encryption::SLOTS / 2].fill(1);
                let pods = cgroups.iter().filter(|cgroup| **cgroup % 3 == 1);
                let totals = pods.map(|cgroup| (*cgroup, slots));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                encryption::render(ledger.accounts(), &mut families);
                let interface = ("wireguard", "cilium_wg0".to_owned());
                let peers = (0..encryption::SHOWN_PEERS)
                    .map(|i| ((interface.0, interface.1.clone(), format!("{i:08}")), 1));
                let peers: Vec<_> = peers.collect();
                let slots = [1; exporter_common::encryption::slot::ALL];
                encryption::render_sessions(&[(interface, slots)].into(), &peers, &mut families);
            }
            // A rank in each pod, with four communicators and the three collectives of a training step; none has the plugin.
            "nccl" => {
                let sum = |slots: &[u64; nccl::SLOTS]| slots.iter().sum();
                let mut ledger = Ledger::new(1200, sum).opening(Opening::Events);
                let mut slots = [0; nccl::SLOTS];
                for operation in 2..5 {
                    slots[call_slots(operation)] = 1;
                    slots[wait_slots(0, operation)] = 1;
                }
                for phase in 0..nccl::PHASES.len() {
                    slots[init_slots(phase)] = 1;
                }
                let workers = cgroups.iter().filter(|cgroup| **cgroup % 3 == 2);
                let totals = workers.clone().map(|cgroup| (*cgroup, slots));
                ledger.book(&view.owners(), totals, |cgroup| view.resolve(cgroup), now);
                let mut ranks = Ranks::new(1200);
                let readings: Vec<_> = (0..4)
                    .flat_map(|communicator| {
                        let ranks = workers.clone().enumerate();
                        ranks.map(move |(rank, cgroup)| reading(communicator, rank as u64, *cgroup))
                    })
                    .collect();
                let resolve = |cgroup| view.resolve(cgroup);
                let retention = Duration::from_secs(300);
                ranks.book(&view.owners(), &readings, resolve, retention, now);
                let accounts = ledger.accounts().skip(2);
                let ages = accounts.map(|(labels, _)| (labels, Duration::from_secs(1)));
                let pending = Pending::example(ages, "0");
                let before = families.series();
                signals::nccl::render(ledger.accounts(), &ranks, &pending, &mut families);
                nccl_alone = families.series() - before;
            }
            other => panic!("what do the pods' series of {other} come to?"),
        }
        println!("{}: {} series", entry.name, families.series() - before);
    }

    let args = Args::try_parse_from(["chandra", "--pods", "pods.json"]).expect("valid flags");
    let exporter = Exporter::new(
        failed_signals(),
        Arc::new(Pods::new(&Source::Kube, Duration::from_secs(300))),
        Arc::default(),
        None,
        &Kernel::read(),
        &Hierarchy::Absent,
        &args.serve,
    );
    let page = String::from_utf8(exporter.metrics().expect("a page")).expect("UTF-8");
    let own = page.lines().filter(|line| !line.starts_with('#')).count();
    // What only a signal that is attached has: 3 of attribution, 2 of the scrape, 2 for each program's cost.
    let attached = SIGNALS.len() * (3 + 2 + 2 * 16);
    // NCCL is NVIDIA's, whose driver does without the kernel's scheduler of jobs: a node has one or the other.
    let all = families.series() - jobs.min(nccl_alone) + own + attached;
    println!("the exporter itself: at most {} series", own + attached);
    assert!(all <= BUDGET, "{all} series");
}

#[test]
fn the_documentation_has_every_capability_that_a_signal_needs_and_no_other() {
    let problems = Table::committed().problems();
    assert!(problems.is_empty(), "docs/security.md: {problems:#?}");
}
