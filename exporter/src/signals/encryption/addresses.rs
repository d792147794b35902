// SPDX-License-Identifier: Apache-2.0
//! Which addresses has a flow, and which has this node?

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use exporter_common::encryption::Flow;

/// The inner address of a flow.
pub(super) fn address(flow: &Flow) -> IpAddr {
    Ipv6Addr::from(flow.address).to_canonical()
}

/// An address as a flow has it.
pub(super) fn bytes(address: &IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => *v6,
    }
    .octets()
}

/// A table of this node's network, as its first process sees it.
pub(super) fn of_host(table: &str) -> String {
    let of_host = fs::read_to_string(Path::new("/proc/1/net").join(table));
    of_host
        .or_else(|_| fs::read_to_string(Path::new("/proc/self/net").join(table)))
        .unwrap_or_default()
}

/// The addresses of this node.
pub(super) fn host_addresses() -> HashSet<IpAddr> {
    let mut addresses: HashSet<_> = local_v4(&of_host("fib_trie")).map(IpAddr::V4).collect();
    addresses.extend(local_v6(&of_host("if_inet6")).map(IpAddr::V6));
    addresses
}

/// The names of the interfaces of `/proc/net/dev`: the first word of each line, before a colon.
pub(super) fn interfaces(table: &str) -> impl Iterator<Item = &str> {
    table
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
}

/// The local addresses of `/proc/net/fib_trie`: `|-- 10.0.0.1`, and below it `/32 host LOCAL`.
fn local_v4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut last = None;
    text.lines().filter_map(move |line| {
        if let Some((_, address)) = line.split_once("|-- ") {
            last = address.trim().parse().ok();
        }
        line.contains("/32 host LOCAL").then_some(last).flatten()
    })
}

/// The addresses of `/proc/net/if_inet6`, the first word of each line.
fn local_v6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines().filter_map(|line| {
        let bits = u128::from_str_radix(line.split_whitespace().next()?, 16).ok()?;
        Some(Ipv6Addr::from(bits))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_the_node_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.0.0.5\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(
            local_v4(trie).collect::<Vec<_>>(),
            [Ipv4Addr::new(10, 0, 0, 5)]
        );
        let six = "fe80000000000000000000fffe000001 02 40 20 80 eth0\nnonsense\n";
        assert_eq!(local_v6(six).count(), 1);
    }
}
