// SPDX-License-Identifier: Apache-2.0
//! What does one signal say of one pod?

use super::{
    format::{number, share, time, visible},
    node::{Encryption, Gpu, Nccl, Node, Rdma, Row, Tcp, Tunnel},
};

/// A signal, by its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    /// t
    Tcp,
    /// r
    Rdma,
    /// g
    Gpu,
    /// n
    Nccl,
    /// e
    Encryption,
}

impl Detail {
    /// All, with their keys and names.
    pub(super) const KEYS: [(char, &'static str, Self); 5] = [
        ('t', "tcp", Self::Tcp),
        ('r', "rdma", Self::Rdma),
        ('g', "gpu", Self::Gpu),
        ('n', "nccl", Self::Nccl),
        ('e', "encryption", Self::Encryption),
    ];

    /// Its signal's name.
    pub(super) fn name(self) -> &'static str {
        let found = Self::KEYS.iter().find(|(.., detail)| *detail == self);
        found.map_or("", |(_, name, _)| name)
    }

    /// Line by line.
    pub(super) fn lines(self, row: &Row, node: &Node) -> Vec<String> {
        let lines = match self {
            Self::Tcp => row.tcp.as_ref().map(tcp),
            Self::Rdma => row.rdma.as_ref().map(|of_pod| rdma(of_pod, node)),
            Self::Gpu => row.gpu.as_ref().map(gpu),
            Self::Nccl => row.nccl.as_ref().map(nccl),
            Self::Encryption => {
                let of_pod = row.encryption.as_ref().map(encryption);
                let tunnels = node.tunnels.iter().flat_map(peers);
                Some(
                    of_pod
                        .unwrap_or_default()
                        .into_iter()
                        .chain(tunnels)
                        .collect(),
                )
            }
        };
        match lines {
            Some(lines) if !lines.is_empty() => lines,
            _ => {
                let name = self.name();
                let state = node.signals.get(name).map_or("not there", |of| &*of.state);
                vec![format!(
                    "{name} is {} and says nothing of it",
                    visible(state)
                )]
            }
        }
    }
}

fn tcp(tcp: &Tcp) -> Vec<String> {
    let mut lines = vec![format!(
        "{} segments a second were sent again:",
        number(tcp.retransmits_per_second)
    )];
    for (kind, rate) in &tcp.by_kind {
        let why = match &**kind {
            "syn" => "connecting: who is called does not answer",
            "synack" => "accepting: who calls does not answer",
            "rto" => "nothing was acknowledged in time",
            "fast" => "others arrived, this one did not",
            "probe" => "the tail of what was sent is asked for",
            _ => "",
        };
        lines.push(format!(
            "  {:<8}{:>7}/s  {why}",
            visible(kind),
            number(*rate)
        ));
    }
    lines
}

fn rdma(rdma: &Rdma, node: &Node) -> Vec<String> {
    let mut lines = vec![format!(
        "{} queue pairs; in a second {} are created and {} destroyed; torn down {} times over in ten minutes, as far as it was seen",
        number(rdma.queue_pairs),
        number(rdma.created_per_second),
        number(rdma.destroyed_per_second),
        number(rdma.times_torn_down)
    )];
    for pairs in &rdma.by_state {
        lines.push(format!(
            "  {:<12}{:<6}{:<6}{:>7}",
            visible(&pairs.device),
            visible(&pairs.r#type),
            visible(&pairs.state),
            number(pairs.count)
        ));
    }
    for device in &node.devices {
        lines.push(format!(
            "{} told its pairs {} ago",
            visible(&device.device),
            time(device.age_seconds)
        ));
    }
    lines
}

fn gpu(gpu: &Gpu) -> Vec<String> {
    let quantile = |of: Option<f64>| of.map_or("-".to_owned(), time);
    let mut lines = vec![
        format!(
            "its GPU threads came to a CPU {} times a second, and waited {} of each second for it, all together",
            number(gpu.arrivals_per_second),
            time(gpu.waited_per_second)
        ),
        format!(
            "half of the waits at most {}, 99 in 100 at most {}",
            quantile(gpu.p50_seconds),
            quantile(gpu.p99_seconds)
        ),
    ];
    for processes in &gpu.processes {
        let on = match &*processes.gpu {
            "" => String::new(),
            gpu => format!(" on GPU {}", visible(gpu)),
        };
        lines.push(format!(
            "  {} processes by driver {}{on}",
            number(processes.count),
            visible(&processes.driver)
        ));
    }
    lines
}

fn nccl(nccl: &Nccl) -> Vec<String> {
    let mut lines = Vec::new();
    if nccl.oldest_pending_seconds > 0.0 {
        lines.push(format!(
            "a collective has been under way for {}",
            time(nccl.oldest_pending_seconds)
        ));
    }
    for rank in &nccl.missing {
        lines.push(format!(
            "rank {} of {} has been waited for {}: its process is {}",
            visible(&rank.rank),
            visible(&rank.communicator),
            time(rank.seconds),
            visible(&rank.state)
        ));
    }
    let line =
        |communicator: &str, rank: &str, collectives: &str, waits: &str, last: &str, by: &str| {
            format!("{communicator:<20}{rank:>6}  {collectives:>13}  {waits:>10}  {last:>5}  {by}")
        };
    lines.push(line(
        "communicator",
        "rank",
        "collectives/s",
        "waits each",
        "last",
        "by",
    ));
    for rank in &nccl.ranks {
        lines.push(line(
            &visible(&rank.communicator),
            &visible(&rank.rank),
            &number(rank.collectives_per_second),
            &time(rank.mean_wait_seconds),
            &share(rank.last_share),
            match rank.source {
                "kernel" => "its GPU (plugin)",
                _ => "its calls",
            },
        ));
    }
    lines
}

fn encryption(all: &Encryption) -> Vec<String> {
    let mut lines = vec![format!(
        "the encryption of its packets takes {}% of a core",
        number(all.cpu_cores * 100.0)
    )];
    for one in &all.by_direction {
        lines.push(format!(
            "  {:<11}{:<9}{:>6}% CPU {:>7} packets/s {:>7}B/s",
            visible(&one.protocol),
            visible(&one.direction),
            number(one.cpu_cores * 100.0),
            number(one.packets_per_second),
            number(one.bytes_per_second)
        ));
    }
    lines
}

/// The node's peers: sessions have no pod.
fn peers(tunnel: &Tunnel) -> Vec<String> {
    let name = [&*tunnel.protocol, &*tunnel.interface]
        .map(visible)
        .join(" ");
    let events = tunnel.events_per_second.iter();
    let events = events.map(|(event, rate)| format!("{} {}/s", visible(event), number(*rate)));
    let mut lines = vec![format!(
        "the node's {}: {}",
        name.trim_end(),
        events.collect::<Vec<_>>().join(", ")
    )];
    for peer in &tunnel.peers {
        lines.push(format!(
            "  {:<40}{:>6} sessions, {} a minute",
            visible(&peer.peer),
            number(peer.sessions),
            number(peer.sessions_per_minute)
        ));
    }
    lines
}
