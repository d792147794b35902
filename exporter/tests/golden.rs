// SPDX-License-Identifier: Apache-2.0
//! The exposition, byte for byte: made-up accounts in, a committed page out. `UPDATE_GOLDEN=1` rewrites the pages.
//! promtool then says if Prometheus would take them.

mod common;

use std::{
    collections::HashSet,
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use chandra::{
    VERSION,
    args::Args,
    families::{Desc, Families, Kind, POD},
    kernel::{Hierarchy, Kernel},
    pods::{Labels, Owner, Pods, Resolution, Source, cgroups},
    scrape::{self, Exporter},
    server::Site,
    signals::{
        Options, SIGNALS, encryption, gpu, nccl,
        nccl::{
            pending::Pending,
            ranks::{Ranks, Reading},
        },
        rdma, running, tcp,
    },
};
use clap::Parser;

use common::skip;

type Make = fn() -> String;

/// The committed pages, by name, and what makes each.
const PAGES: &[(&str, Make)] = &[
    ("gpu", gpu_page),
    ("encryption", encryption_page),
    ("exporter", exporter_page),
    ("nccl", nccl_page),
    ("rdma", rdma_page),
    ("tcp", tcp_page),
    ("tcp_names", names_page),
];

fn encode(families: Families) -> String {
    let mut page = Vec::new();
    families.encode(&mut page).expect("a vector takes all");
    String::from_utf8(page).expect("the format is UTF-8")
}

/// What cgroups are called on hosts without Kubernetes: each of the cases by a name of its own.
fn names_page() -> String {
    let pods = Pods::new(&Source::None, Duration::from_secs(300));
    let mut accounts = Vec::new();
    for case in ["slurm-sluid", "odd-host-paths"] {
        let file = format!(
            "{}/tests/cases/{case}/paths.txt",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = fs::read_to_string(file).expect("a case");
        for path in text.lines().filter(|line| line.starts_with('/')) {
            let id = 100 + accounts.len() as u64;
            pods.cgroup_found(id, cgroups::place(path));
            let labels = pods.view().resolve(id).labels();
            accounts.push((labels, [0, 0, 0, id, 0]));
        }
    }
    let distinct: HashSet<_> = accounts.iter().map(|(labels, _)| labels).collect();
    assert_eq!(distinct.len(), accounts.len(), "two cgroups have one name");
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    tcp::render(borrowed, &mut families);
    encode(families)
}

fn tcp_page() -> String {
    let labels = |namespace: &str, pod: &str, container: &str| Labels {
        namespace: namespace.into(),
        pod: pod.into(),
        container: container.into(),
    };
    let accounts = [
        (Labels::default(), [1, 2, 3, 4, 5]),
        (Labels::only_pod("unknown"), [0; tcp::KINDS]),
        (Labels::only_pod("other"), [0, 0, 1, 0, 0]),
        (labels("inference", "vllm-0", ""), [0, 1, 0, 0, 0]),
        // From 2^53 on not every whole number is a sample value.
        (
            labels("inference", "vllm-0", "main"),
            [7, 1_000_000, (1 << 53) - 1, 1 << 53, u64::MAX],
        ),
        // How systemd escapes a dash in a unit's name.
        (
            labels("", "", r"run-nvidia\x2dfabric.mount"),
            [6; tcp::KINDS],
        ),
        (
            labels("\"quoted\"", "back\\slash\\", "two\nlines"),
            [8; tcp::KINDS],
        ),
        (labels("ünïcode", "चन्द्र", "容器🔭"), [9; tcp::KINDS]),
        (labels("{a=\"b\"}", "# HELP", " 1\t"), [10; tcp::KINDS]),
    ];
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    tcp::render(borrowed, &mut families);
    encode(families)
}

fn rdma_page() -> String {
    let pod = Labels {
        namespace: "training".into(),
        pod: "llama-worker-0".into(),
        container: "worker".into(),
    };
    // Every slot its own number, so that none can stand in another's place.
    let all = std::array::from_fn(|slot| slot as u64 + 1);
    let mut few = [0; rdma::SLOTS];
    few[..4].copy_from_slice(&[3, 2, 0, 5]);
    let accounts = [
        (Labels::default(), few),
        (Labels::only_pod("unknown"), [0; rdma::SLOTS]),
        (pod.clone(), all),
    ];
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    let fresh = Labels {
        pod: "llama-worker-1".into(),
        ..pod.clone()
    };
    let accounts = borrowed.chain([(fresh.clone(), &accounts[2].1)]);
    rdma::render(accounts, |labels| *labels == fresh, &mut families);
    let devices = [("mlx5_0".to_owned(), [4, 3]), ("mlx5_1".to_owned(), [0, 0])];
    rdma::render_devices(&devices.into(), &mut families);
    let host = Labels::default();
    let rows = [
        (&host, "mlx5_0", "GSI", "RTS", 1),
        (&pod, "mlx5_0", "RC", "ERR", 2),
        (&pod, "mlx5_0", "RC", "RTS", 10_000),
    ];
    let ages = [
        ("mlx5_0".to_owned(), 0.25, false),
        ("mlx5_1".to_owned(), 17.0, true),
    ];
    rdma::render_gauge(rows, &ages, &mut families);
    encode(families)
}

fn gpu_page() -> String {
    let pod = Labels {
        namespace: "inference".into(),
        pod: "vllm-0".into(),
        container: "engine".into(),
    };
    // Every slot its own number; the host drives none.
    let slots = std::array::from_fn(|slot| slot as u64 + 1);
    let accounts = [(Labels::default(), [0; gpu::SLOTS]), (pod.clone(), slots)];
    let driven = |driver: &str, gpu, count| ((driver.into(), gpu), count);
    let processes = [
        (Labels::default(), [driven("drm", None, 1)].into()),
        (
            pod.clone(),
            [
                driven("nvidia", Some(0), 8),
                driven("nvidia", Some(31), 1),
                driven("nvidia", None, 1),
                driven("drm", None, 1),
                driven("habanalabs", None, 2),
                driven("other", None, 2),
            ]
            .into(),
        ),
    ];
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    gpu::render(borrowed, &processes.into(), &mut families);
    // One that still runs has queued; the host has had none.
    let slots = std::array::from_fn(|slot| slot as u64 + 1);
    let queued = std::array::from_fn(|slot| u64::from(slot == 0));
    let none = [0; gpu::jobs::SLOTS];
    let pod = |name: &str| Labels {
        pod: name.into(),
        ..pod.clone()
    };
    for (device, ring, owner, slots) in [
        ("0000:c3:00.0", "gfx_0.0.0", Labels::default(), &none),
        ("0000:c3:00.0", "gfx_0.0.0", pod("vllm-0"), &slots),
        ("", "rcs0", pod("vllm-1"), &queued),
    ] {
        gpu::jobs::render(device, ring, [(owner, slots)], &mut families);
    }
    // Every slot its own number; an owner that only copies, on a kernel that does not tell what a thread waits.
    let all = std::array::from_fn(|slot| slot as u64 + 1);
    let mut some = [0; gpu::calls::SLOTS];
    let memcpy = exporter_common::gpu::CudaCall::Memcpy as usize;
    some[memcpy * exporter_common::gpu::CUDA_CALL_SLOTS] = 3;
    let accounts = [(Labels::default(), some), (pod("vllm-0"), all)];
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    gpu::calls::render(borrowed, &mut families);
    encode(families)
}

fn nccl_page() -> String {
    let pod = Labels {
        namespace: "training".into(),
        pod: "worker-0".into(),
        container: "main".into(),
    };
    // Every slot its own number; the host has launched a graph.
    let all = std::array::from_fn(|slot| slot as u64 + 1);
    let mut some = [0; exporter_common::nccl::SLOTS];
    some[exporter_common::nccl::GRAPH_SLOT] = 7;
    let accounts = [(Labels::default(), some), (pod.clone(), all)];
    // Beyond 32 communicators they are `other`; of the plugin one, of a rank that is not known one.
    let reading = |communicator: u64, rank: u64, source: usize| {
        let handle = exporter_common::nccl::Handle {
            process: (source as u64) << 32,
            address: communicator,
        };
        let seat = exporter_common::nccl::Seat {
            group: communicator,
            index: source as u64,
        };
        let member = exporter_common::nccl::Member {
            cgroup: 1,
            handle,
            rank,
            wait: 1_000_000 * (40 - communicator),
            collectives: 100 + communicator,
            last: communicator,
            duration: 2_000_000_000 * source as u64,
            ended: 0,
        };
        Reading {
            seat,
            member,
            communicator,
            source,
        }
    };
    let mut readings: Vec<_> = (0..34).map(|number| reading(number, 5, 0)).collect();
    readings.push(reading(0, 5, 1));
    readings.push(reading(1, exporter_common::nccl::NO_RANK, 1));
    let owner = Owner {
        labels: pod.clone(),
        uid: "uid".into(),
    };
    let mut ranks = Ranks::new(10);
    let resolve = |_| Resolution::Owner(owner.clone());
    let (retention, now) = (Duration::from_secs(300), Instant::now());
    ranks.book(&[owner.clone()].into(), &readings, resolve, retention, now);
    let ages = [
        (Labels::default(), Duration::ZERO),
        (pod, Duration::from_millis(121_500)),
    ];
    let pending = Pending::example(ages, "000000000000000d");
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    nccl::render(borrowed, &ranks, &pending, &mut families);
    encode(families)
}

fn encryption_page() -> String {
    let pod = Labels {
        namespace: "inference".into(),
        pod: "vllm-0".into(),
        container: "".into(),
    };
    // Every slot its own number; packets, bytes and nanoseconds of each protocol and direction.
    let all = std::array::from_fn(|slot| (slot as u64 + 1) * 1_000_000_000);
    let mut some = [0; encryption::SLOTS];
    some[3..6].copy_from_slice(&[7, 9800, 12_345]);
    let accounts = [
        (Labels::default(), some),
        (Labels::only_pod("unknown"), [0; encryption::SLOTS]),
        (pod, all),
    ];
    let mut families = Families::default();
    let borrowed = accounts.iter().map(|(labels, n)| (labels.clone(), n));
    encryption::render(borrowed, &mut families);
    let slots = std::array::from_fn(|slot| slot as u64 + 1);
    let interfaces = [
        (("wireguard", "cilium_wg0".to_owned()), slots),
        (("ipsec", String::new()), slots.map(|n| n + 100)),
    ];
    let peer =
        |protocol, interface: &str, peer: &str| (protocol, interface.to_owned(), peer.to_owned());
    let peers = [
        (peer("ipsec", "", "fd90::2"), 4),
        (peer("wireguard", "cilium_wg0", "QXQXysKN"), 120),
    ];
    encryption::render_sessions(&interfaces.into(), &peers, &mut families);
    encode(families)
}

/// What the exporter tells of itself, with a signal that fails in the same way on every host, and without what depends
/// on the build and the clock.
fn exporter_page() -> String {
    let mut kernel = Kernel::read();
    kernel.btf = Err("this kernel has no BTF".to_owned());
    let options = Options {
        max_owners: 1,
        ..Options::default()
    };
    let mut signals = running::attach(&kernel, &[], &options);
    signals.retain(|running| running.entry.name == "tcp");
    let args = Args::try_parse_from(["chandra", "--pods", "pods.json"]).expect("valid flags");
    let pods = Pods::new(&args.serve.source(), Duration::from_secs(300));
    let file = tempfile::NamedTempFile::new().expect("a file");
    let web = chandra::web::Web::load(file.path()).expect("an empty file");
    let exporter = Exporter::new(
        signals,
        Arc::new(pods),
        Arc::new(web),
        None,
        &kernel,
        &Hierarchy::Absent,
        &args.serve,
    );
    let page = String::from_utf8(exporter.metrics().expect("a page")).expect("UTF-8");
    let version = format!("\"{VERSION}\"");
    let constant = page.lines().map(|line| {
        let line = match line.split_once(' ') {
            Some((name @ "chandra_pods_age_seconds", _)) => format!("{name} 0"),
            _ => line.replace(&version, "\"0.0.0\""),
        };
        line + "\n"
    });
    constant.collect()
}

#[test]
fn every_page_is_the_committed_one() {
    for (name, make) in PAGES {
        let page = make();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.prom"));
        if env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &page).expect("a writable source tree");
        }
        let golden = fs::read_to_string(&path).unwrap_or_default();
        let only = |page: &str, other: &str, mark| {
            let lines = page.lines().filter(|line| !other.contains(*line));
            lines
                .map(|line| format!("{mark} {line}\n"))
                .collect::<String>()
        };
        assert!(
            page == golden,
            "the page is not {} (UPDATE_GOLDEN=1 cargo test --test golden rewrites it):\n{}{}",
            path.display(),
            only(&golden, &page, '-'),
            only(&page, &golden, '+'),
        );
    }
}

#[test]
fn every_signal_has_a_page() {
    for entry in SIGNALS {
        assert!(
            PAGES.iter().any(|(name, _)| *name == entry.name),
            "no page of made-up accounts for {}",
            entry.name
        );
    }
}

/// Where promtool is, if it is anywhere.
fn promtool() -> Option<PathBuf> {
    if let Some(path) = env::var_os("PROMTOOL").filter(|path| !path.is_empty()) {
        return Some(path.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join("promtool"))
        .find(|file| file.is_file())
}

/// Asks promtool about a page; it has to have nothing to say.
fn lint(promtool: &Path, name: &str, page: &str) {
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {}: {error}", promtool.display()));
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(page.as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = child.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success() && said.is_empty(),
        "promtool check metrics <{name}: {}\n{said}",
        output.status
    );
}

#[test]
fn prometheus_takes_every_page() {
    let Some(promtool) = promtool() else {
        return skip("needs promtool, on PATH or named by $PROMTOOL");
    };
    for (name, make) in PAGES {
        lint(&promtool, name, &make());
    }

    // A signal that works has metrics that the page of one that failed lacks.
    let mut all = Families::default();
    let of_signals = SIGNALS.iter().flat_map(|entry| entry.descs);
    for desc in of_signals.chain(scrape::DESCS) {
        let desc: &'static Desc = desc;
        let of_pod = if desc.per_pod { POD.len() } else { 0 };
        let labels = vec!["x"; of_pod + desc.labels.len()];
        if desc.kind == Kind::Histogram {
            let shape = exporter_common::rdma::LATENCY;
            all.add_histogram(desc, &labels, shape, &vec![1; shape.slots()]);
        } else {
            all.add(desc, &labels, 1.0);
        }
    }
    lint(&promtool, "every metric", &encode(all));
}
