// SPDX-License-Identifier: Apache-2.0
//! What does `encryption` show?

use std::collections::BTreeMap;

use exporter_common::encryption::{
    ASSOCIATIONS, DIRECTIONS, HANDSHAKES, INTERVAL, PROTOCOLS, slot,
};

use super::peers::PeerLabels;
use crate::{
    families::{Desc, Families, Kind},
    pods::Labels,
};

pub(super) const DESCS: &[&Desc] = &[
    &CPU,
    &PACKETS,
    &BYTES,
    &INTERVALS,
    &SESSIONS,
    &PEER_SESSIONS,
    &HANDSHAKE_EVENTS,
    &ASSOCIATION_EVENTS,
];

/// What is counted for an owner, protocol and direction: packets, bytes, nanoseconds.
pub(super) const COUNTS: usize = 3;

/// How many counters an owner has.
pub const SLOTS: usize = PROTOCOLS.len() * DIRECTIONS.len() * COUNTS;

/// How many peers are shown by name.
pub const SHOWN_PEERS: usize = 16;

pub(crate) static CPU: Desc = Desc {
    name: "chandra_encryption_cpu_seconds_total",
    kind: Kind::Counter,
    help: "CPU seconds of encrypting or decrypting the owner's packets.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "one packet in --encryption.timed-every, from entry to return of wireguard:encrypt_packet, wireguard:decrypt_packet, \
             esp4:esp_output_tail, esp4:esp_input and those of esp6, weighted by bytes; container is empty",
};

pub(crate) static PACKETS: Desc = Desc {
    name: "chandra_encryption_packets_total",
    kind: Kind::Counter,
    help: "Packets of the owner that were encrypted or decrypted.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "each run of the same functions; the owner is the inner source of what is encrypted, or its socket's cgroup, and the \
             inner destination of what is decrypted; keepalives are not counted",
};

pub(crate) static BYTES: Desc = Desc {
    name: "chandra_encryption_bytes_total",
    kind: Kind::Counter,
    help: "Bytes of those packets before encryption.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "the length in the IP header inside the encryption",
};

static INTERVALS: Desc = Desc {
    name: "chandra_encryption_session_interval_seconds",
    kind: Kind::Histogram,
    help: "Seconds between two sessions with the same peer.",
    per_pod: false,
    labels: &["protocol", "interface"],
    values: &[("protocol", &PROTOCOLS)],
    source: "as chandra_encryption_sessions_total; a peer that is removed and added again is the same",
};

pub(crate) static SESSIONS: Desc = Desc {
    name: "chandra_encryption_sessions_total",
    kind: Kind::Counter,
    help: "Sessions that WireGuard derived, or security associations that were installed.",
    per_pod: false,
    labels: &["protocol", "interface"],
    values: &[("protocol", &PROTOCOLS)],
    source: "kretprobe wireguard:wg_noise_handshake_begin_session, xfrm_state_add and xfrm_state_update; interface is empty for ipsec",
};

pub(crate) static PEER_SESSIONS: Desc = Desc {
    name: "chandra_encryption_peer_sessions_total",
    kind: Kind::Counter,
    help: "The same for the 16 peers with most sessions of late.",
    per_pod: false,
    labels: &["protocol", "interface", "peer"],
    values: &[("protocol", &PROTOCOLS)],
    source: "as chandra_encryption_sessions_total; peer is the first 8 characters of the public key, or the remote address",
};

pub(crate) static HANDSHAKE_EVENTS: Desc = Desc {
    name: "chandra_encryption_handshakes_total",
    kind: Kind::Counter,
    help: "WireGuard handshakes by what became of them.",
    per_pod: false,
    labels: &["protocol", "interface", "event"],
    values: &[("protocol", &[PROTOCOLS[0]]), ("event", &HANDSHAKES)],
    source: "wireguard:wg_noise_handshake_create_initiation; wg_timers_handshake_complete, on both sides; \
             wg_packet_send_queued_handshake_initiation that repeats one without an answer",
};

pub(crate) static ASSOCIATION_EVENTS: Desc = Desc {
    name: "chandra_encryption_security_associations_total",
    kind: Kind::Counter,
    help: "IPsec security associations by what happened to them.",
    per_pod: false,
    labels: &["event"],
    values: &[("event", &ASSOCIATIONS)],
    source: "kretprobe xfrm_state_add, xfrm_state_update and __xfrm_state_delete, kprobe km_state_expired (hard)",
};

/// Packets, for the account of attribution.
pub(super) fn units(slots: &[u64; SLOTS]) -> u64 {
    slots.iter().step_by(COUNTS).sum()
}

/// Renders accounts by slot. Each protocol and direction appears with its first packet.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        let flows = PROTOCOLS.iter().flat_map(|protocol| {
            DIRECTIONS
                .iter()
                .map(move |direction| (protocol, direction))
        });
        for ((protocol, direction), counts) in flows.zip(slots.chunks_exact(COUNTS)) {
            if counts[0] == 0 {
                continue;
            }
            let labels = [
                &*owner.namespace,
                &*owner.pod,
                &*owner.container,
                protocol,
                direction,
            ];
            families.add(&PACKETS, &labels, counts[0] as f64);
            families.add(&BYTES, &labels, counts[1] as f64);
            families.add(&CPU, &labels, counts[2] as f64 / 1e9);
        }
    }
}

/// Renders sessions by interface and peer.
pub fn render_sessions(
    interfaces: &BTreeMap<(&'static str, String), [u64; slot::ALL]>,
    peers: &[(PeerLabels, u64)],
    families: &mut Families,
) {
    for ((protocol, interface), slots) in interfaces {
        let labels = [*protocol, interface.as_str()];
        families.add(&SESSIONS, &labels, slots[slot::SESSIONS] as f64);
        let intervals = &slots[slot::INTERVALS..slot::INTERVALS + INTERVAL.slots()];
        families.add_histogram(&INTERVALS, &labels, INTERVAL, intervals);
        if *protocol == PROTOCOLS[0] {
            for (event, count) in HANDSHAKES.iter().zip(&slots[slot::HANDSHAKE..]) {
                families.add(
                    &HANDSHAKE_EVENTS,
                    &[labels[0], labels[1], event],
                    *count as f64,
                );
            }
        } else {
            for (event, count) in ASSOCIATIONS.iter().zip(&slots[slot::ASSOCIATION..]) {
                families.add(&ASSOCIATION_EVENTS, &[event], *count as f64);
            }
        }
    }
    for ((protocol, interface, peer), sessions) in peers {
        families.add(
            &PEER_SESSIONS,
            &[protocol, interface, peer],
            *sessions as f64,
        );
    }
}
