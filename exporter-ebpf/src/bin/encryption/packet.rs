// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Whose packet is it, and how long?

use exporter_common::encryption::{Direction, Flow, Protocol};
use exporter_ebpf::{Loss, NO_CGROUP, constants, field, probed_socket_cgroup, read_kernel};

use crate::work::send;

constants!(
    OFF_SKB_HEAD,
    OFF_SKB_DATA,
    OFF_SKB_TAIL,
    OFF_SKB_LEN,
    OFF_SKB_SOCK,
    OFF_SKB_NETWORK,
    OFF_SKB_TRANSPORT,
    OFF_SOCK_STATE,
    PORT_VXLAN,
    PORT_GENEVE,
);

/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// `TCP_TIME_WAIT` and `TCP_NEW_SYN_RECV` (include/net/tcp_states.h): sockets that are only the head of one.
const TIME_WAIT: u8 = 6;
const NEW_SYN_RECV: u8 = 12;

/// What an IP header says.
#[derive(Clone, Copy)]
struct Header {
    source: [u8; 16],
    target: [u8; 16],
    /// Bytes of the whole packet.
    bytes: u64,
    protocol: u8,
    /// Where the payload begins.
    payload: u64,
}

/// An IPv4 address as `::ffff:a.b.c.d`.
#[inline(always)]
pub(crate) fn mapped(a: u8, b: u8, c: u8, d: u8) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Reads the IP header at an address, of which it and its payload lie before `end`.
#[inline(always)]
fn header(at: u64, end: u64) -> Option<Header> {
    if at + 20 > end {
        return None;
    }
    let b: [u8; 20] = read_kernel(at).ok()?;
    if b[0] >> 4 == 4 {
        return Some(Header {
            source: mapped(b[12], b[13], b[14], b[15]),
            target: mapped(b[16], b[17], b[18], b[19]),
            bytes: u64::from(b[2]) << 8 | u64::from(b[3]),
            protocol: b[9],
            payload: at + u64::from(b[0] & 15) * 4,
        });
    }
    if b[0] >> 4 != 6 || at + 40 > end {
        return None;
    }
    Some(Header {
        source: read_kernel(at + 8).ok()?,
        target: read_kernel(at + 24).ok()?,
        bytes: 40 + (u64::from(b[4]) << 8 | u64::from(b[5])),
        protocol: b[6],
        payload: at + 40,
    })
}

/// Looks through VXLAN and Geneve: the header of the packet inside, or the one that was given. `None` where there is one
/// inside that cannot be read.
#[inline(always)]
fn innermost(outer: Header, end: u64) -> Option<Header> {
    if outer.protocol != UDP || outer.payload + 16 > end {
        return Some(outer);
    }
    // Source and destination port, length, checksum; then eight bytes of VXLAN or Geneve.
    let b: [u8; 16] = read_kernel(outer.payload).ok()?;
    let port = u32::from(b[2]) << 8 | u32::from(b[3]);
    let options = if port == PORT_VXLAN.load() {
        0
    } else if port == PORT_GENEVE.load() {
        u64::from(b[8] & 0x3f) * 4
    } else {
        return Some(outer);
    };
    let frame = outer.payload + 16 + options;
    if frame + 14 > end {
        return None;
    }
    let kind: [u8; 2] = read_kernel(frame + 12).ok()?;
    match kind {
        [0x08, 0x00] | [0x86, 0xdd] => header(frame + 14, end),
        // ARP and the like are the nodes' own.
        _ => Some(outer),
    }
}

/// Where a packet's network header begins.
#[inline(always)]
pub(crate) fn network(skb: u64) -> Result<u64, Loss> {
    let offset: u16 = field(skb, &OFF_SKB_NETWORK)?;
    Ok(field::<u64>(skb, &OFF_SKB_HEAD)? + u64::from(offset))
}

/// Where a packet's transport header begins.
#[inline(always)]
pub(crate) fn transport(skb: u64) -> Result<u64, Loss> {
    let offset: u16 = field(skb, &OFF_SKB_TRANSPORT)?;
    Ok(field::<u64>(skb, &OFF_SKB_HEAD)? + u64::from(offset))
}

/// Where a packet's data begins.
#[inline(always)]
pub(crate) fn data(skb: u64) -> Result<u64, Loss> {
    field(skb, &OFF_SKB_DATA)
}

/// Bytes of a packet's data.
#[inline(always)]
pub(crate) fn length(skb: u64) -> Result<u32, Loss> {
    field(skb, &OFF_SKB_LEN)
}

/// Returns the cgroup of the socket that a packet was sent from. [`NO_CGROUP`] where there is none any more.
#[inline(always)]
fn sender(skb: u64) -> Result<u64, Loss> {
    let sock: u64 = field(skb, &OFF_SKB_SOCK)?;
    if sock == 0 {
        return Ok(NO_CGROUP);
    }
    let state: u8 = field(sock, &OFF_SOCK_STATE)?;
    if state == TIME_WAIT || state == NEW_SYN_RECV {
        return Ok(NO_CGROUP);
    }
    // A packet holds its socket, and this one is whole.
    probed_socket_cgroup(sock)
}

/// What ESP in transport mode encrypts: the payload of a packet whose IP header speaks of ESP.
#[derive(Clone, Copy)]
pub(crate) struct Payload {
    /// What the IP header says without encryption.
    pub(crate) protocol: u8,
    pub(crate) at: u64,
    /// Bytes of the packet without encryption.
    pub(crate) bytes: u64,
}

/// Whose packet it is, and its bytes. `at` is where its IP header begins.
#[inline(always)]
pub(crate) fn flow(
    skb: u64,
    at: u64,
    payload: Option<Payload>,
    protocol: Protocol,
    direction: Direction,
) -> Result<(Flow, u64), Loss> {
    let head: u64 = field(skb, &OFF_SKB_HEAD)?;
    let tail: u32 = field(skb, &OFF_SKB_TAIL)?;
    let end = head + u64::from(tail);
    let mut flow = Flow {
        address: [0; 16],
        cgroup: NO_CGROUP,
        protocol: protocol as u32,
        direction: direction as u32,
    };
    let bytes = match header(at, end) {
        Some(mut outer) => {
            if let Some(payload) = payload {
                outer.protocol = payload.protocol;
                outer.payload = payload.at;
                outer.bytes = payload.bytes;
            }
            if let Some(inner) = innermost(outer, end) {
                flow.address = match direction {
                    Direction::Encrypt => inner.source,
                    Direction::Decrypt => inner.target,
                };
            }
            outer.bytes
        }
        // Not in the linear part, or no IP: counted for nobody.
        None => u64::from(length(skb)?),
    };
    if matches!(direction, Direction::Encrypt) {
        let cgroup = sender(skb)?;
        if cgroup != NO_CGROUP {
            send(&mut flow, cgroup);
        }
    }
    Ok((flow, bytes))
}
