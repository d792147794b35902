// SPDX-License-Identifier: Apache-2.0
//! Which sessions have been derived, on which interface and with whom?

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use exporter_common::encryption::{INTERVAL, MAX_PEERS, slot};

use super::{
    live::Live,
    metrics::render_sessions,
    peers::{PeerLabels, PeerTotal, Peers, interface, peer_labels, protocol},
};
use crate::{
    families::Families,
    signals::{Scope, entries, monotonic, removed},
};

/// Sessions as they are shown.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    interfaces: BTreeMap<(&'static str, String), [u64; slot::ALL]>,
    /// When each of them last counted anything.
    counted: HashMap<(&'static str, String), Instant>,
    peers: Peers,
}

impl Sessions {
    /// Whether there have been none.
    pub(super) fn is_empty(&self) -> bool {
        self.interfaces.is_empty()
    }

    pub(super) fn render(&self, families: &mut Families) {
        render_sessions(&self.interfaces, &self.peers.shown, families);
    }

    /// Reads all. `interfaces` and `host` are the names of the node's interfaces and its addresses.
    pub(super) fn read(
        &mut self,
        live: &mut Live,
        interfaces: &HashSet<String>,
        host: &HashSet<IpAddr>,
        scope: &Scope<'_>,
    ) -> anyhow::Result<()> {
        self.read_interfaces(live, interfaces, scope)?;
        self.read_peers(live, host, scope)
    }

    /// Reads what was counted by interface, and forgets those that are gone: an interface that is there may be quiet for long.
    fn read_interfaces(
        &mut self,
        live: &mut Live,
        there: &HashSet<String>,
        scope: &Scope<'_>,
    ) -> anyhow::Result<()> {
        let before = std::mem::take(&mut self.interfaces);
        for (key, value) in entries(&live.interfaces)? {
            let labels = (protocol(&key), interface(&key));
            let has_grown = before.get(&labels) != Some(&value.slots);
            let counted = self.counted.entry(labels.clone()).or_insert(scope.now);
            if has_grown {
                *counted = scope.now;
            }
            let idle = scope.now.saturating_duration_since(*counted) >= scope.retention;
            let stays = labels.1.is_empty() || there.contains(&labels.1);
            if idle && !stays {
                removed(live.interfaces.remove(&key))?;
            } else {
                self.interfaces.insert(labels, value.slots);
            }
        }
        self.counted
            .retain(|labels, _| self.interfaces.contains_key(labels));
        Ok(())
    }

    /// Reads sessions by peer, and forgets peers that have none any more.
    fn read_peers(
        &mut self,
        live: &mut Live,
        host: &HashSet<IpAddr>,
        scope: &Scope<'_>,
    ) -> anyhow::Result<()> {
        let now = monotonic();
        let all = entries(&live.peers)?;
        // The time of the last session is kept for as long as an interval is told, if there is room.
        let longest = INTERVAL
            .bound(INTERVAL.bounds - 1)
            .map(Duration::from_nanos);
        let is_roomy = all.len() < MAX_PEERS as usize / 2;
        let kept = longest
            .filter(|_| is_roomy)
            .unwrap_or_default()
            .max(scope.retention);
        let mut peers: BTreeMap<PeerLabels, PeerTotal> = BTreeMap::new();
        for (key, peer) in all {
            let idle = Duration::from_nanos(now.saturating_sub(peer.last));
            if idle >= kept {
                removed(live.peers.remove(&key))?;
                continue;
            }
            let total = peers.entry(peer_labels(&key, host)).or_default();
            total.sessions += peer.sessions;
            total.is_fresh |= idle < scope.retention;
        }
        self.peers.update(peers, scope.now);
        Ok(())
    }
}
