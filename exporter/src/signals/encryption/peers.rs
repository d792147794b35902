// SPDX-License-Identifier: Apache-2.0
//! With which peers are sessions derived, and which of them are shown?

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use exporter_common::encryption::{InterfaceKey, PROTOCOLS, PeerKey, Protocol};

use super::metrics::SHOWN_PEERS;

/// A peer by what its series are called: protocol, interface, peer.
pub type PeerLabels = (&'static str, String, String);

/// What a peer has: its sessions, and whether there was one within the retention time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PeerTotal {
    pub(super) sessions: u64,
    pub(super) is_fresh: bool,
}

/// The peers that are shown: those with most sessions of late.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// Sessions, and those of late: each weighs half as much after five minutes.
    known: BTreeMap<PeerLabels, (u64, f64)>,
    scored: Option<Instant>,
    pub(super) shown: Vec<(PeerLabels, u64)>,
}

/// After how long a session counts half.
const HALF_LIFE: Duration = Duration::from_secs(300);

impl Peers {
    pub(super) fn update(&mut self, peers: BTreeMap<PeerLabels, PeerTotal>, now: Instant) {
        let passed = self
            .scored
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let weight = 0.5_f64.powf(passed.as_secs_f64() / HALF_LIFE.as_secs_f64());
        self.scored = Some(now);
        self.known.retain(|peer, _| peers.contains_key(peer));
        for (peer, total) in &peers {
            let (before, score) = self.known.entry(peer.clone()).or_default();
            *score = *score * weight + total.sessions.saturating_sub(*before) as f64;
            *before = total.sessions;
        }
        let fresh = |(peer, _): &(&PeerLabels, _)| peers.get(*peer).is_some_and(|of| of.is_fresh);
        let mut order: Vec<_> = self.known.iter().filter(fresh).collect();
        order.sort_by(|(_, (_, one)), (_, (_, other))| other.total_cmp(one));
        let shown = order.into_iter().take(SHOWN_PEERS);
        self.shown = shown
            .map(|(peer, (sessions, _))| (peer.clone(), *sessions))
            .collect();
        self.shown.sort();
    }
}

/// What a peer is called.
pub(super) fn peer_labels(key: &PeerKey, host: &HashSet<IpAddr>) -> PeerLabels {
    let peer = if key.interface.protocol == Protocol::WireGuard as u64 {
        let mut text = BASE64_STANDARD.encode(key.identity);
        text.truncate(8);
        text
    } else {
        let end = |from: usize| {
            let bytes: [u8; 16] = key.identity[from..from + 16].try_into().unwrap_or_default();
            Ipv6Addr::from(bytes).to_canonical()
        };
        let (source, target) = (end(0), end(16));
        let remote = if host.contains(&target) {
            source
        } else {
            target
        };
        remote.to_string()
    };
    (protocol(&key.interface), interface(&key.interface), peer)
}

pub(super) fn protocol(key: &InterfaceKey) -> &'static str {
    PROTOCOLS
        .get(key.protocol as usize)
        .unwrap_or(&PROTOCOLS[0])
}

pub(super) fn interface(key: &InterfaceKey) -> String {
    let end = key
        .name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(key.name.len());
    String::from_utf8_lossy(&key.name[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_that_rebuild_of_late_are_shown() {
        let mut peers = Peers::default();
        let now = Instant::now();
        let key = |i: usize| ("wireguard", "wg0".to_owned(), format!("{i:03}"));
        // A hundred old peers with many sessions, and one that begins to rebuild.
        let at = |storm: u64| -> BTreeMap<_, _> {
            let all = (0..100).map(|i| (key(i), 5000)).chain([(key(500), storm)]);
            let fresh = |sessions| PeerTotal {
                sessions,
                is_fresh: true,
            };
            all.map(|(key, sessions)| (key, fresh(sessions))).collect()
        };
        peers.update(at(0), now);
        for minute in 1..=30 {
            peers.update(at(0), now + Duration::from_secs(60 * minute));
        }
        for minute in 31..=50 {
            peers.update(
                at((minute - 30) * 12),
                now + Duration::from_secs(60 * minute),
            );
        }
        assert_eq!(peers.shown.len(), SHOWN_PEERS);
        assert!(
            peers
                .shown
                .iter()
                .any(|(peer, sessions)| *peer == key(500) && *sessions == 240)
        );
    }
}
