// SPDX-License-Identifier: Apache-2.0
//! What is the kernel half told of pods: who holds which address, and in whose network is which cgroup?

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use anyhow::Context;
use aya::{
    Pod,
    maps::{HashMap as Map, MapData},
};
use exporter_common::encryption::{MAX_KNOWN, MAX_SENDERS, NO_POD};

use super::{addresses::bytes, books::Holders};
use crate::signals::removed;

/// Cgroups of one pod that are told: its containers' and a few in them. One that may make cgroups can make thousands.
const OF_POD: usize = 64;

/// Both maps, and the numbers of pods in them.
pub(super) struct Told {
    known: Written<[u8; 16]>,
    senders: Written<u64>,
    /// By uid.
    numbers: HashMap<Arc<str>, u32>,
    /// The last number that was given.
    last: u32,
}

impl Told {
    pub(super) fn new(known: Map<MapData, [u8; 16], u32>, senders: Map<MapData, u64, u32>) -> Self {
        Self {
            known: Written::new(known),
            senders: Written::new(senders),
            numbers: HashMap::new(),
            last: NO_POD,
        }
    }

    /// Tells which addresses are a pod's or the node's, and which cgroups are in a pod's network or the node's. Those for which there is
    /// no room the kernel half takes for strangers'.
    pub(super) fn tell(&mut self, holders: &Holders<'_>) -> anyhow::Result<()> {
        let pod_at = |address| holders.pod_at(address).map(|owner| &owner.uid);
        let networks = || holders.networks.values();
        let of_networks = networks().filter_map(|network| network.pod.as_ref());
        let here: HashSet<_> = of_networks.collect();
        self.number(
            holders
                .addresses
                .keys()
                .filter_map(pod_at)
                .chain(here.iter().copied()),
        );
        let number = |uid: Option<&Arc<str>>| uid.map_or(NO_POD, |uid| self.numbers[uid]);

        // This node's pods, the node, and the pods of others, where the source lists those. A node that balances services by IPVS has all
        // of their addresses.
        let of_pods = holders.addresses.keys().map(|address| {
            let pod = pod_at(address);
            let rank = if pod.is_some_and(|pod| here.contains(pod)) {
                0
            } else {
                2
            };
            (rank, bytes(address), number(pod))
        });
        let of_host = holders.host.iter();
        let of_host = of_host.filter(|address| !holders.addresses.contains_key(address));
        let of_host = of_host.map(|address| (1, bytes(address), NO_POD));
        let known: Vec<_> = of_pods.chain(of_host).collect();

        let mut of_pod: HashMap<&Arc<str>, usize> = HashMap::new();
        let mut cgroups: Vec<_> = holders.networks.iter().collect();
        cgroups.sort_by_key(|(id, _)| !self.senders.told.contains_key(id));
        let senders = cgroups.into_iter().filter_map(|(id, network)| {
            let rank = match &network.pod {
                _ if network.is_gone => 2,
                None => 1,
                Some(pod) => {
                    let told = of_pod.entry(pod).or_default();
                    *told += 1;
                    if *told > OF_POD {
                        return None;
                    }
                    0
                }
            };
            Some((rank, *id, number(network.pod.as_ref())))
        });
        let senders = senders.collect();
        self.senders.write(senders, MAX_SENDERS)?;
        self.known.write(known, MAX_KNOWN)
    }

    /// Gives each pod a number that no other had, and forgets those of pods that are gone.
    fn number<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<str>>) {
        let mut before = std::mem::take(&mut self.numbers);
        for uid in pods {
            if !self.numbers.contains_key(uid) {
                let number = before.remove(uid).unwrap_or_else(|| {
                    self.last = self.last.wrapping_add(1).max(NO_POD + 1);
                    self.last
                });
                self.numbers.insert(Arc::clone(uid), number);
            }
        }
    }
}

/// A map that user space writes, and what it has written.
struct Written<K> {
    map: Map<MapData, K, u32>,
    told: HashMap<K, u32>,
}

impl<K: Pod + Eq + Hash> Written<K> {
    fn new(map: Map<MapData, K, u32>) -> Self {
        Self {
            map,
            told: HashMap::new(),
        }
    }

    /// Makes the map have these, as far as there is room: by their rank, and what it has before what is new.
    fn write(&mut self, mut all: Vec<(u8, K, u32)>, room: u32) -> anyhow::Result<()> {
        all.sort_by_key(|(rank, key, _)| (*rank, !self.told.contains_key(key)));
        let all = all.into_iter().take(room as usize);
        let now: HashMap<_, _> = all.map(|(_, key, pod)| (key, pod)).collect();
        let told = self.told.keys().filter(|key| !now.contains_key(key));
        for key in told.copied().collect::<Vec<_>>() {
            removed(self.map.remove(&key))?;
            self.told.remove(&key);
        }
        for (key, pod) in now {
            if self.told.get(&key) != Some(&pod) {
                let entered = self.map.insert(key, pod, 0);
                entered.context("enter what is known of pods into a map")?;
                self.told.insert(key, pod);
            }
        }
        Ok(())
    }
}
