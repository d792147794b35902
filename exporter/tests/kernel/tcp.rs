// SPDX-License-Identifier: Apache-2.0
//! `tcp` against the kernel's own counters: RetransSegs of each network namespace, and the kinds of TcpExt.

use std::{
    collections::BTreeMap,
    fs,
    process::{Child, Command},
    thread,
    time::Duration,
};

use super::{alone, can_lose_packets, can_trace, common::*, smoke};

const RETRANSMITS: &str = "chandra_tcp_retransmits_total";

/// A network namespace joined to the namespace of the peer by a link that loses packets, and a cgroup.
struct Side {
    /// Its network namespace; `None` for the host's.
    netns: Option<&'static str>,
    cgroup: String,
    subnet: u32,
}

impl Side {
    fn new(netns: Option<&'static str>, cgroup: String, subnet: u32, loss: &str) -> Self {
        let side = Self {
            netns,
            cgroup,
            subnet,
        };
        let n = subnet;
        let tc = side.tool("tc");
        run(&format!(
            "mkdir -p {cgroup}; {add}
             ip link add c{n} type veth peer name p{n} netns chandra-peer
             {into}
             {ip} addr add 10.79.{n}.1/24 dev c{n}; {ip} addr add fd79:{n}::1/64 dev c{n} nodad
             {ip} link set c{n} up; {ip} link set lo up
             ip -n chandra-peer addr add 10.79.{n}.2/24 dev p{n}
             ip -n chandra-peer addr add fd79:{n}::2/64 dev p{n} nodad
             ip -n chandra-peer link set p{n} up
             {tc} qdisc add dev c{n} root netem {loss} limit 100000",
            cgroup = side.cgroup,
            add = netns.map_or(String::new(), |ns| format!("ip netns add {ns}")),
            into = netns.map_or(String::new(), |ns| format!("ip link set c{n} netns {ns}")),
            ip = side.tool("ip"),
        ));
        side
    }

    fn tool(&self, tool: &str) -> String {
        self.netns
            .map_or(tool.to_owned(), |ns| format!("{tool} -n {ns}"))
    }

    /// Starts work in this side's cgroup and network namespace.
    fn spawn(&self, work: &str) -> Child {
        spawn_in(&self.cgroup, self.netns, work)
    }

    fn peer4(&self, port: u16) -> String {
        format!("10.79.{}.2:{port}", self.subnet)
    }

    fn peer6(&self, port: u16) -> String {
        format!("[fd79:{}::2]:{port}", self.subnet)
    }

    /// The kernel's counters of this side's network namespace.
    fn counters(&self) -> BTreeMap<String, f64> {
        let exec = self
            .netns
            .map_or(String::new(), |ns| format!("ip netns exec {ns} "));
        let text = run(&format!("{exec}cat /proc/net/snmp /proc/net/netstat"));
        let lines: Vec<_> = text.lines().collect();
        let pairs = lines
            .chunks(2)
            .filter_map(|pair| pair[0].split_once(": ").zip(pair[1].split_once(": ")));
        pairs
            .flat_map(|((group, names), (_, values))| {
                let values = values
                    .split(' ')
                    .map(|value| value.parse().expect("a counter"));
                names
                    .split(' ')
                    .map(move |name| format!("{group}.{name}"))
                    .zip(values)
            })
            .collect()
    }
}

fn spawn_in(cgroup: &str, netns: Option<&str>, work: &str) -> Child {
    let exec = netns.map_or(String::new(), |ns| format!("ip netns exec {ns} "));
    let traffic = build().join("examples/traffic");
    Command::new("sh")
        .args([
            "-ec",
            &format!(
                "echo $$ >{cgroup}/cgroup.procs; exec {exec}{} {work}",
                traffic.display()
            ),
        ])
        .spawn()
        .expect("sh")
}

fn finish(work: Vec<Child>) {
    for mut child in work {
        assert!(child.wait().expect("it ends").success(), "the work failed");
    }
}

#[test]
fn smoke() {
    let _alone = alone();
    if !can_trace() || !can_lose_packets() {
        return;
    }
    let root = cgroup_root().display().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("pods.json");
    let pod = Pod::new("inference", "smoke", 6);
    write_pods(&file, std::slice::from_ref(&pod));
    run("ip netns add chandra-peer");
    let cgroup = format!("{root}/{}", pod.cgroup(0));
    let side = Side::new(Some("chandra-s"), cgroup, 7, "delay 1ms");
    // An address of the peer's network that is nobody's: its SYNs are sent again.
    run("ip -n chandra-s neigh add 10.79.7.9 lladdr 02:00:00:00:00:09 dev c7 nud permanent");
    let exporter = smoke::start("tcp", &["--pods", &file.display().to_string()]);
    finish(vec![side.spawn("knock 10.79.7.9:81 4 4")]);
    let kernel = side.counters()["Tcp.RetransSegs"];
    assert!(kernel >= 4.0, "{kernel}");
    exporter.scrape_until("the pod's are the kernel's", |scrape| {
        scrape.sum(RETRANSMITS, &[("pod", "smoke"), ("kind", "syn")]) == kernel
    });
    assert_eq!(exporter.scrape().sum(RETRANSMITS, &[]), kernel);
    smoke::ends("tcp", exporter);
    run("ip netns del chandra-s; ip netns del chandra-peer");
    while fs::remove_dir(&side.cgroup).is_err() {
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn every_pod_has_the_retransmits_of_its_own_network_namespace() {
    let _alone = alone();
    if !can_trace() || !can_lose_packets() {
        return;
    }
    let root = cgroup_root().display().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("pods.json");
    let pods = [
        Pod::new("inference", "vllm-0", 1),
        Pod::new("inference", "vllm-1", 2),
        Pod::new("inference", "gateway", 3),
        Pod::new("training", "host-network", 4),
    ];
    write_pods(&file, &pods);

    run("ip netns add chandra-peer; ip -n chandra-peer link set lo up");
    let cgroup = |pod: usize| format!("{root}/{}", pods[pod].cgroup(0));
    let bulk = Side::new(Some("chandra-a"), cgroup(0), 1, "loss 3% delay 2ms");
    let mixed = Side::new(Some("chandra-b"), cgroup(1), 2, "loss 10% delay 2ms");
    let server = Side::new(Some("chandra-c"), cgroup(2), 3, "loss 40% delay 2ms");
    let host_network = Side::new(None, cgroup(3), 4, "loss 3% delay 2ms");
    let unit = Side::new(
        Some("chandra-d"),
        format!("{root}/system.slice/backup.service"),
        5,
        "loss 3% delay 2ms",
    );
    // The peer's clients run in the root cgroup: the host's, like the unit.
    let peer = Side {
        netns: Some("chandra-peer"),
        cgroup: root.clone(),
        subnet: 0,
    };
    let sides = [&bulk, &mixed, &server, &host_network, &unit, &peer];
    // Whole segments and super-segments both: TSO makes one event of many segments.
    run("ip netns exec chandra-b ethtool -K c2 tso off gso off gro off");

    let exporter = Exporter::start(&["--pods", &file.display().to_string()]);
    let first = exporter.scrape();
    for pod in &pods {
        let labels = [
            ("namespace", &*pod.namespace),
            ("pod", &*pod.name),
            ("container", "main"),
        ];
        assert!(
            first.has(RETRANSMITS, &format!("pod=\"{}\"", pod.name)),
            "{} is not there at 0",
            pod.name
        );
        assert_eq!(first.sum(RETRANSMITS, &labels), 0.0);
    }
    let before: Vec<_> = sides.iter().map(|side| side.counters()).collect();

    let mut servers = vec![
        peer.spawn("serve [::]:5201"),
        server.spawn("serve 0.0.0.0:5202"),
    ];
    thread::sleep(Duration::from_secs(1));
    // Nobody answers these: an address of the peer's network that is nobody's, with a neighbour that is not there.
    run("ip -n chandra-a neigh add 10.79.1.9 lladdr 02:00:00:00:00:09 dev c1 nud permanent");
    let mut work = vec![
        bulk.spawn(&format!("send {} 8", bulk.peer4(5201))),
        bulk.spawn("knock 10.79.1.9:81 5 8"),
        mixed.spawn(&format!("send {} 2", mixed.peer6(5201))),
        mixed.spawn(&format!("chat {} 300", mixed.peer4(5201))),
        host_network.spawn(&format!("send {} 6", host_network.peer4(5201))),
        unit.spawn(&format!("send {} 6", unit.peer6(5201))),
    ];
    // The server's SYN-ACKs and answers cross the lossy link.
    work.extend((0..10).map(|_| peer.spawn("chat 10.79.3.1:5202 3")));
    finish(work);
    for server in &mut servers {
        server.kill().expect("it runs");
        server.wait().expect("it ends");
    }
    // Connections that are still being closed go on sending.
    for side in sides {
        let exec = side
            .netns
            .map_or(String::new(), |ns| format!("ip netns exec {ns} "));
        let open = format!("{exec}ss -Htn state connected exclude time-wait | grep 10.79 || true");
        while !run(&open).is_empty() {
            thread::sleep(Duration::from_millis(500));
        }
    }
    let grown = |side: &Side, before: &BTreeMap<String, f64>| -> BTreeMap<String, f64> {
        side.counters()
            .into_iter()
            .map(|(name, value)| (name.clone(), value - before[&name]))
            .collect()
    };
    let deltas = || -> Vec<f64> {
        let mut deltas: Vec<_> = sides
            .iter()
            .zip(&before)
            .map(|(side, before)| grown(side, before)["Tcp.RetransSegs"])
            .collect();
        let peer = deltas.pop().expect("the peer is the last");
        deltas[4] += peer;
        deltas
    };
    let ours = |scrape: &Scrape| {
        let pod = |i: usize| {
            scrape.sum(
                RETRANSMITS,
                &[("namespace", &*pods[i].namespace), ("pod", &*pods[i].name)],
            )
        };
        let host = scrape.sum(
            RETRANSMITS,
            &[("namespace", ""), ("pod", ""), ("container", "")],
        );
        vec![pod(0), pod(1), pod(2), pod(3), host]
    };
    let scrape = exporter.scrape_until("the pods' counters are the kernel's", |scrape| {
        let equal = ours(scrape) == deltas();
        if !equal {
            println!(
                "not yet: {:?}, the kernel says {:?}",
                ours(scrape),
                deltas()
            );
        }
        equal
    });
    let deltas = deltas();
    println!(
        "retransmitted segments by side: {deltas:?}, by Chandra: {:?}",
        ours(&scrape)
    );
    assert!(
        deltas.iter().all(|delta| *delta > 0.0),
        "every side lost something"
    );
    let total: f64 = deltas.iter().sum();
    assert_eq!(
        scrape.sum(RETRANSMITS, &[]),
        total,
        "the sum over pods is the kernel's"
    );
    assert_eq!(scrape.sum(RETRANSMITS, &[("pod", "unknown")]), 0.0);
    assert_eq!(scrape.sum("chandra_lost_events_total", &[]), 0.0);
    assert_eq!(
        scrape.sum("chandra_attribution_total", &[("result", "host")]),
        deltas[4]
    );
    assert_eq!(
        scrape.sum("chandra_attribution_total", &[("result", "pod")]),
        total - deltas[4]
    );

    // The kinds, against what TcpExt tells.
    let kind =
        |i: usize, kind: &str| scrape.sum(RETRANSMITS, &[("pod", &*pods[i].name), ("kind", kind)]);
    for (i, side) in sides.iter().enumerate().take(4) {
        let ext = grown(side, &before[i]);
        let kinds: Vec<_> = ["syn", "synack", "rto", "fast", "probe"]
            .iter()
            .map(|k| kind(i, k))
            .collect();
        let [syn, synack, rto, fast, probe] = kinds[..] else {
            unreachable!()
        };
        let ext = |name: &str| ext[&format!("TcpExt.{name}")];
        println!(
            "{}: syn {syn} synack {synack} (TCPSynRetrans {}), fast {fast} (TCPFastRetrans {}), rto {rto} \
             (TCPSlowStartRetrans {}, TCPTimeouts {}), probe {probe} (TCPLossProbes {})",
            pods[i].name,
            ext("TCPSynRetrans"),
            ext("TCPFastRetrans"),
            ext("TCPSlowStartRetrans"),
            ext("TCPTimeouts"),
            ext("TCPLossProbes"),
        );
        assert_eq!(syn + synack, ext("TCPSynRetrans"));
        assert!(probe <= ext("TCPLossProbes"));
        assert!(rto >= ext("TCPSlowStartRetrans"));
        // A probe that fires in Recovery counts as fast; TcpExt does not count it there.
        assert!(
            fast >= ext("TCPFastRetrans") && fast <= ext("TCPFastRetrans") + ext("TCPLossProbes")
        );
    }
    assert!(
        kind(0, "syn") >= 5.0,
        "each of the five sockets knocked again"
    );
    assert!(kind(0, "fast") > 0.0 && kind(1, "probe") > 0.0 && kind(2, "synack") > 0.0);

    for side in sides {
        if let Some(netns) = side.netns {
            run(&format!("ip netns del {netns}"));
        }
    }
    for side in sides.iter().take(5) {
        // A dead process leaves its cgroup a little later.
        while fs::remove_dir(&side.cgroup).is_err() {
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn sockets_without_a_cgroup_pointer_are_unknown_rather_than_wrong() {
    let _alone = alone();
    if !can_trace() || !can_lose_packets() {
        return;
    }
    // Where the field is a word of pointer and flags (before 5.15, and before its fix reached 5.10.y), using net_cls
    // takes the cgroup from every later socket, for good: not on a real host.
    if std::env::var_os("CHANDRA_TEST_VM").is_none() {
        return println!("SKIPPED: only in a VM, which does not mind net_cls");
    }
    let root = cgroup_root().display().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let (file, class) = (folder.path().join("pods.json"), folder.path().join("class"));
    let pod = Pod::new("inference", "classed", 5);
    write_pods(&file, std::slice::from_ref(&pod));
    run("ip netns add chandra-peer");
    let side = Side::new(
        Some("chandra-e"),
        format!("{root}/{}", pod.cgroup(0)),
        6,
        "delay 1ms",
    );
    run("ip -n chandra-e neigh add 10.79.6.9 lladdr 02:00:00:00:00:09 dev c6 nud permanent");
    let class = class.display();
    run(&format!(
        "mkdir {class}; mount -t cgroup -o net_cls none {class}; mkdir {class}/ai; echo 0x10001 >{class}/ai/net_cls.classid"
    ));
    let exporter = Exporter::start(&["--pods", &file.display().to_string()]);
    let work = format!(
        "echo $$ >{class}/ai/cgroup.procs; echo $$ >{}/cgroup.procs; exec ip netns exec chandra-e {} knock 10.79.6.9:81 4 5",
        side.cgroup,
        build().join("examples/traffic").display(),
    );
    run(&work);
    let kernel = side.counters()["Tcp.RetransSegs"];
    let scrape = exporter.scrape_until("all are counted", |scrape| {
        scrape.sum(RETRANSMITS, &[]) == kernel
    });
    let types = chandra::kernel::Kernel::read().btf.expect("BTF");
    let pointer = types
        .field("sock", "sk_cgrp_data.cgroup")
        .is_ok_and(|field| field.pointer);
    let owner = if pointer { "classed" } else { "unknown" };
    println!("{kernel} segments, all of {owner}");
    assert!(kernel >= 4.0);
    assert_eq!(scrape.sum(RETRANSMITS, &[("pod", owner)]), kernel);
    drop(exporter);
    run(&format!(
        "ip netns del chandra-e; ip netns del chandra-peer; rmdir {class}/ai; umount {class}"
    ));
}
