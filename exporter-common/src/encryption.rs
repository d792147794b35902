// SPDX-License-Identifier: Apache-2.0
//! Encryption: packets, bytes and CPU time by owner, and sessions by interface and peer.

use crate::histogram::Shape;

/// Flows at once of pods, of the node and of cgroups: two directions for each address and each cgroup that sends. 250 pods with two
/// addresses have a thousand; those beyond are counted as nobody's. Each takes 32 bytes on every CPU.
pub const MAX_FLOWS: u32 = 1024;

/// The same of addresses that are neither a pod's nor the node's: those of pods that are not known yet, and those that somebody made
/// up. They have room of their own, so that whoever makes up many takes none from pods.
pub const MAX_STRANGERS: u32 = 128;

/// Addresses of pods and of the node.
pub const MAX_KNOWN: u32 = 1024;

/// Cgroups of which it is told in whose network they are: a node has 250 pods of a few containers, and some hundred services.
pub const MAX_SENDERS: u32 = 2048;

/// In the maps `KNOWN` and `SENDERS`, beside the numbers of pods that have a network of their own: an address that is the node's, or
/// that several pods claim; a cgroup that is in the node's network.
pub const NO_POD: u32 = 0;

/// Calls in progress: at most one for each CPU and task that is in the crypto of a packet.
pub const MAX_CALLS: u32 = 4096;

/// Peers that derived a session, on all interfaces.
pub const MAX_PEERS: u32 = 8192;

/// Interfaces and protocols that derived a session.
pub const MAX_INTERFACES: u32 = 64;

/// Bytes of an interface's name (`IFNAMSIZ`).
pub const INTERFACE_NAME: usize = 16;

/// Protocols, in the order of [`Protocol`].
pub const PROTOCOLS: [&str; 2] = ["wireguard", "ipsec"];

/// Directions, in the order of [`Direction`].
pub const DIRECTIONS: [&str; 2] = ["encrypt", "decrypt"];

/// Events of WireGuard handshakes, in the order of their slots.
pub const HANDSHAKES: [&str; 3] = ["initiated", "completed", "expired"];

/// Events of IPsec security associations, in the order of their slots.
pub const ASSOCIATIONS: [&str; 4] = ["added", "updated", "deleted", "expired"];

/// Time between two sessions with a peer: 0.25 s to 68 min, with bounds on both sides of WireGuard's 120 s.
pub const INTERVAL: Shape = Shape {
    first: 250_000_000,
    bounds: 8,
    step: 2,
};

/// How packets are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Protocol {
    /// WireGuard.
    WireGuard = 0,
    /// ESP.
    Ipsec = 1,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// The owner sends.
    Encrypt = 0,
    /// The owner receives.
    Decrypt = 1,
}

/// Whose packets, and what is done with them: the key of the per-CPU map `FLOWS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow {
    /// The inner address, an IPv4 one as `::ffff:a.b.c.d`; all 0 where the sender tells the owner, or it could not be read.
    pub address: [u8; 16],
    /// The cgroup of the socket that sent the packet; [`crate::NO_CGROUP`] where there is none, or the address tells the owner. Of a
    /// cgroup that the kernel half has not been told of, and a pod's address, both are here.
    pub cgroup: u64,
    /// A [`Protocol`].
    pub protocol: u32,
    /// A [`Direction`].
    pub direction: u32,
}

impl Flow {
    /// The flow of packets that are nobody's: it is in `FLOWS` from the start, so that there is always room for it.
    pub const fn nobodys(protocol: u32, direction: u32) -> Self {
        Self {
            address: [0; 16],
            cgroup: crate::NO_CGROUP,
            protocol,
            direction,
        }
    }
}

/// What a CPU did for a [`Flow`]; only ever added to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Work {
    /// Packets.
    pub packets: u64,
    /// Bytes of the packets as they were before encryption, by their IP header.
    pub bytes: u64,
    /// Bytes of those packets that were timed.
    pub timed_bytes: u64,
    /// Nanoseconds that the crypto of those took.
    pub timed_nanoseconds: u64,
}

/// A call between entry and return: the value of the map `CALLS`, whose key is the address of the call's stack frame
/// (`u64`). That names the call among all CPUs and tasks, and a softirq that interrupts it has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// The packet, the handshake, the security association.
    pub object: u64,
    /// CLOCK_MONOTONIC in nanoseconds at the entry, less what the thread had waited for a CPU; 0 for a packet that is not
    /// timed.
    pub entered: u64,
    /// Bytes of a packet that is timed.
    pub bytes: u64,
    /// Whose packet it is, for an encryption that is timed.
    pub flow: Flow,
}

/// An interface: the key of the map `INTERFACES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct InterfaceKey {
    /// Its name, the rest 0; all 0 for IPsec, which has none.
    pub name: [u8; INTERFACE_NAME],
    /// A [`Protocol`].
    pub protocol: u64,
}

/// Where each counter lies in [`Interface::slots`].
pub mod slot {
    use super::{ASSOCIATIONS, HANDSHAKES, INTERVAL};

    /// Sessions derived, or security associations installed.
    pub const SESSIONS: usize = 0;
    /// Handshakes by event.
    pub const HANDSHAKE: usize = SESSIONS + 1;
    /// Security associations by event.
    pub const ASSOCIATION: usize = HANDSHAKE + HANDSHAKES.len();
    /// A histogram of [`INTERVAL`].
    pub const INTERVALS: usize = ASSOCIATION + ASSOCIATIONS.len();
    /// How many there are.
    pub const ALL: usize = INTERVALS + INTERVAL.slots();
}

/// The value of the map `INTERFACES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Interface {
    /// Counters by [`slot`]; only ever added to.
    pub slots: [u64; slot::ALL],
}

/// A peer: the key of the map `PEERS`. A peer that is removed and added again is the same one; its address in the kernel
/// and WireGuard's internal id are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PeerKey {
    /// Its interface.
    pub interface: InterfaceKey,
    /// WireGuard: the public key. IPsec: the addresses of source and target, 16 bytes each, IPv4 ones as `::ffff:a.b.c.d`.
    pub identity: [u8; 32],
    /// The network namespace, by the address of its object.
    pub namespace: u64,
}

/// The value of the map `PEERS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Peer {
    /// Sessions derived with it, or security associations installed.
    pub sessions: u64,
    /// CLOCK_MONOTONIC in nanoseconds of the last.
    pub last: u64,
}

const _: () = {
    assert!(size_of::<Flow>() == 32, "no padding");
    assert!(size_of::<Work>() == 32, "no padding");
    assert!(size_of::<Call>() == 24 + 32, "no padding");
    assert!(size_of::<InterfaceKey>() == 24, "no padding");
    assert!(size_of::<Interface>() == 8 * slot::ALL, "no padding");
    assert!(size_of::<PeerKey>() == 24 + 32 + 8, "no padding");
    assert!(size_of::<Peer>() == 16, "no padding");
};

#[cfg(feature = "user")]
mod user {
    // SAFETY: each is `repr(C)` of integers or bytes without padding (asserted above), so every bit pattern is valid.
    unsafe impl aya::Pod for super::Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Work {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Call {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::InterfaceKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Interface {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Peer {}
}
