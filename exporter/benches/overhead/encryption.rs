// SPDX-License-Identifier: Apache-2.0
//! What the programs cost a packet that is encrypted or decrypted, counted or timed, and what is left of a tunnel's
//! throughput.

use std::{
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use aya::sys::{Stats, enable_stats};

use super::{Several, exporter::Exporter, note};
use crate::common::{Pod, Scrape, run, succeeds, write_pods};

/// How often: without the exporter, as it comes, and with statistics, in turn.
const ROUNDS: usize = 6;

/// Seconds that each lasts.
const SECONDS: u32 = 4;

/// What is hooked, with the programs at entry and return. ESP's decryption has two entries.
const FUNCTIONS: [(&str, &str, &str, &[&str]); 4] = [
    (
        "WireGuard",
        "wireguard",
        "encrypt",
        &["wireguard_encrypt", "wireguard_encrypt_return"],
    ),
    (
        "WireGuard",
        "wireguard",
        "decrypt",
        &["wireguard_decrypt", "wireguard_decrypt_return"],
    ),
    (
        "ESP",
        "ipsec",
        "encrypt",
        &["esp_encrypt", "esp_encrypt_return"],
    ),
    (
        "ESP",
        "ipsec",
        "decrypt",
        &["esp_decrypt", "esp_decrypted", "esp_decrypted_return"],
    ),
];

const COUNTED: &str = "1000000";
const TIMED: &str = "1";

/// Two network namespaces with a tunnel of each kind between them. Removed when dropped.
struct Tunnels {
    /// Whose the addresses are.
    pods: tempfile::NamedTempFile,
}

impl Tunnels {
    fn lay() -> Self {
        Self::sweep();
        let folder = tempfile::tempdir().expect("a folder");
        let keys = folder.path().display();
        run(&format!(
            "modprobe -a wireguard veth esp4 xfrm_user gcm
             ip netns add chandra-a; ip netns add chandra-b
             ip link add u netns chandra-a type veth peer name u netns chandra-b
             for n in a b; do wg genkey >{keys}/$n; wg pubkey <{keys}/$n >{keys}/$n.pub; done"
        ));
        for (node, other, own, peer) in [("a", "b", 1, 2), ("b", "a", 2, 1)] {
            run(&format!(
                "ip -n chandra-{node} -b - <<EOF
link set lo up
addr add 192.168.90.{own}/24 dev u
addr add 192.168.91.{own}/24 dev u
link set u up
link add wg0 type wireguard
addr add 10.77.0.{own}/24 dev wg0
EOF
ip netns exec chandra-{node} wg set wg0 listen-port 51871 private-key {keys}/{node} \\
  peer $(cat {keys}/{other}.pub) allowed-ips 10.77.0.0/24 endpoint 192.168.90.{peer}:51871
ip -n chandra-{node} link set wg0 up"
            ));
            for (direction, from, to) in [("out", own, peer), ("in", peer, own)] {
                let ends = format!("src 192.168.91.{from} dst 192.168.91.{to}");
                run(&format!(
                    "ip -n chandra-{node} xfrm state add {ends} proto esp spi 0x100{from} reqid 1 mode tunnel \\
                       aead 'rfc4106(gcm(aes))' 0x000102030405060708090a0b0c0d0e0f10111213 128
                     ip -n chandra-{node} xfrm policy add {ends} dir {direction} tmpl {ends} proto esp reqid 1 mode tunnel"
                ));
            }
        }
        let pods = [1, 2].map(|i| {
            let addresses = [format!("10.77.0.{i}"), format!("192.168.91.{i}")];
            let pod = Pod::new("bench", &format!("end-{i}"), i);
            pod.at(&addresses.each_ref().map(String::as_str))
        });
        let file = tempfile::NamedTempFile::new().expect("a file");
        write_pods(file.path(), &pods);
        Self { pods: file }
    }

    /// The exporter, with this signal alone.
    fn exporter(&self, timed_every: &str) -> Exporter {
        let pods = self.pods.path().display().to_string();
        let disable = ["tcp", "rdma", "gpu"].map(|signal| format!("--disable={signal}"));
        let mut args = vec!["--pods", &pods, "--encryption.timed-every", timed_every];
        args.extend(disable.iter().map(String::as_str));
        Exporter::start(&args)
    }

    fn sweep() {
        succeeds("for n in a b; do ip netns del chandra-$n; done");
    }
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        Self::sweep();
    }
}

/// Says why nothing can be measured here.
pub(crate) fn missing() -> Option<&'static str> {
    let can = succeeds("modprobe -qa wireguard esp4 && command -v wg iperf3");
    (!can).then_some("needs root, wireguard, esp4, wg and iperf3; `make bench` has them in a VM")
}

/// Sends as much as goes through a tunnel; the bits a second that arrived.
fn send(protocol: &str) -> f64 {
    let target = if protocol == "wireguard" {
        "10.77.0.2"
    } else {
        "192.168.91.2"
    };
    let mut server = Command::new("ip")
        .args(["netns", "exec", "chandra-b", "iperf3", "-s", "-1"])
        .stdout(Stdio::null())
        .spawn()
        .expect("iperf3");
    let listens = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(100));
        succeeds("ip netns exec chandra-b ss -ltn | grep -q :5201")
    });
    assert!(listens, "iperf3 does not listen");
    let told = run(&format!(
        "ip netns exec chandra-a iperf3 -J -c {target} -t {SECONDS}"
    ));
    server.wait().expect("it ends");
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let bits = told["end"]["sum_received"]["bits_per_second"].as_f64();
    bits.expect("a number")
}

/// Nanoseconds that these programs ran for each packet.
fn ran(scrape: &Scrape, protocol: &str, direction: &str, programs: &[&str]) -> f64 {
    let packets = [("protocol", protocol), ("direction", direction)];
    let packets = scrape.sum("chandra_encryption_packets_total", &packets);
    assert!(packets > 100.0, "{protocol} {direction}: {packets} packets");
    let each = programs.iter().map(|program| {
        let labels = [("signal", "encryption"), ("program", program)];
        scrape.sum("chandra_program_run_seconds_total", &labels)
    });
    1e9 * each.sum::<f64>() / packets
}

/// What the programs took for each packet of both directions of a protocol, and what the crypto itself took where all
/// are timed.
fn measure(tunnels: &Tunnels, protocol: &str, timed_every: &str) -> [[f64; 2]; 2] {
    let _statistics = enable_stats(Stats::RunTime).expect("a kernel from 5.8 and root");
    let exporter = tunnels.exporter(timed_every);
    send(protocol);
    let scrape = exporter.scrape();
    let of_protocol = FUNCTIONS.iter().filter(|of| of.1 == protocol);
    let each: Vec<_> = of_protocol
        .map(|(_, protocol, direction, programs)| {
            let labels = [("protocol", *protocol), ("direction", *direction)];
            let sum = |metric| scrape.sum(metric, &labels);
            let crypto = sum("chandra_encryption_cpu_seconds_total");
            let packets = sum("chandra_encryption_packets_total");
            [
                ran(&scrape, protocol, direction, programs),
                1e9 * crypto / packets,
            ]
        })
        .collect();
    [each[0], each[1]]
}

/// Prints the tables.
pub(crate) fn per_packet() {
    let tunnels = Tunnels::lay();
    let mut rows = Vec::new();
    println!(
        "| Packet | Program while it is counted, ns | while it is timed, ns | One in 32 timed, ns | The crypto itself, ns | Share |"
    );
    println!("|---|--:|--:|--:|--:|--:|");
    for (name, protocol) in [("WireGuard", "wireguard"), ("ESP", "ipsec")] {
        note(&format_args!("packets of {name}"));
        send(protocol);
        let [mut without, mut with] = [const { Vec::new() }; 2];
        let [mut counted, mut timed] = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            without.push(send(protocol));
            let exporter = tunnels.exporter("32");
            with.push(send(protocol));
            drop(exporter);
            counted.push(measure(&tunnels, protocol, COUNTED));
            timed.push(measure(&tunnels, protocol, TIMED));
        }
        without.push(send(protocol));
        for (i, (_, _, direction, _)) in FUNCTIONS.iter().filter(|of| of.1 == protocol).enumerate()
        {
            let several = |of: &[[[f64; 2]; 2]], what: usize| {
                Several::new(of.iter().map(|round| round[i][what]).collect())
            };
            let (count, time) = (several(&counted, 0), several(&timed, 0));
            let crypto = several(&timed, 1);
            let usual = count.median() + (time.median() - count.median()) / 32.0;
            println!(
                "| {name} {direction} | {} | {} | {usual:.0} | {} | {:.1} % |",
                count.quartiles(),
                time.quartiles(),
                crypto.quartiles(),
                100.0 * usual / crypto.median(),
            );
        }
        // Against the mean of the rounds before and after, since the machine's speed drifts.
        let kept = without
            .windows(2)
            .zip(&with)
            .map(|(around, with)| 100.0 * with / ((around[0] + around[1]) / 2.0));
        let kept = Several::new(kept.collect());
        let megabits = |all: &[f64]| Several::new(all.iter().map(|bits| bits / 1e6).collect());
        rows.push(format!(
            "| {name} | {} | {} | {} |",
            megabits(&without).quartiles(),
            megabits(&with).quartiles(),
            kept.quartiles()
        ));
    }
    println!(
        "\n| iperf3 through | without, Mbit/s | with Chandra, Mbit/s | of it is left, % |\n|---|--:|--:|--:|"
    );
    println!("{}", rows.join("\n"));
    println!(
        "\nMedian (quartiles) of {ROUNDS} rounds of {SECONDS} s. Programs by bpf statistics, whose two readings of the clock for each \
         program are part of their number; the traps of the kprobes are not.\n"
    );
}
