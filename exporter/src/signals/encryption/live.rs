// SPDX-License-Identifier: Apache-2.0
//! What does the object count, and what is it told?

use std::collections::{BTreeSet, HashSet};

use anyhow::{Context, anyhow};
use aya::{
    maps::{self, MapData, MapError, PerCpuValues},
    util::nr_cpus,
};
use exporter_common::encryption::{
    DIRECTIONS, Flow, Interface, InterfaceKey, MAX_KNOWN, PROTOCOLS, Peer, PeerKey, Work,
};

use super::{
    addresses::bytes,
    books::{Counted, Holders, Room},
};
use crate::{probe::Attached, signals::removed};

/// The object at work.
pub(super) struct Live {
    pub(super) attached: Attached,
    flows: Flows,
    strangers: Flows,
    known: maps::HashMap<MapData, [u8; 16], u32>,
    pub(super) interfaces: maps::HashMap<MapData, InterfaceKey, Interface>,
    pub(super) peers: maps::HashMap<MapData, PeerKey, Peer>,
    /// The addresses that the kernel half has been told of.
    told: HashSet<[u8; 16]>,
}

type Flows = maps::PerCpuHashMap<MapData, Flow, Work>;

impl Live {
    pub(super) fn build(mut attached: Attached) -> anyhow::Result<Self> {
        let mut flows: Flows = attached.map("FLOWS")?;
        let cpus = nr_cpus().map_err(|(path, error)| anyhow!("read {path}: {error}"))?;
        for protocol in 0..PROTOCOLS.len() as u32 {
            for direction in 0..DIRECTIONS.len() as u32 {
                let none = PerCpuValues::try_from(vec![Work::default(); cpus])?;
                let flow = Flow::nobodys(protocol, direction);
                flows
                    .insert(flow, none, 0)
                    .context("reserve an entry of the map FLOWS")?;
            }
        }
        Ok(Self {
            flows,
            strangers: attached.map("STRANGERS")?,
            known: attached.map("KNOWN")?,
            interfaces: attached.map("INTERFACES")?,
            peers: attached.map("PEERS")?,
            attached,
            told: HashSet::new(),
        })
    }

    /// Tells the kernel half which addresses are a pod's or the node's. Those for which there is no room it takes for strangers'.
    pub(super) fn tell(&mut self, holders: &Holders<'_>) -> anyhow::Result<()> {
        // Those of pods first. A node that balances services by IPVS has all of their addresses.
        let of_pods: BTreeSet<_> = holders.addresses.keys().map(bytes).collect();
        let of_host: BTreeSet<_> = holders.host.iter().map(bytes).collect();
        let told = |address: &&[u8; 16]| self.told.contains(*address);
        let (old, new): (Vec<_>, Vec<_>) = of_host.difference(&of_pods).partition(told);
        let all = of_pods.iter().chain(old).chain(new);
        let now: HashSet<_> = all.copied().take(MAX_KNOWN as usize).collect();
        for gone in self.told.difference(&now).copied().collect::<Vec<_>>() {
            removed(self.known.remove(&gone))?;
            self.told.remove(&gone);
        }
        for new in now {
            if !self.told.contains(&new) {
                let entered = self.known.insert(new, 0, 0);
                entered.context("enter an address into a map")?;
                self.told.insert(new);
            }
        }
        Ok(())
    }

    /// Removes a flow that is done with.
    pub(super) fn remove(&mut self, (room, flow): Counted) -> anyhow::Result<()> {
        removed(match room {
            Room::Known => self.flows.remove(&flow),
            Room::Strangers => self.strangers.remove(&flow),
        })
    }

    /// What all CPUs did for each flow.
    pub(super) fn work(&self) -> anyhow::Result<Vec<(Counted, Work)>> {
        let mut all = Vec::new();
        for (room, map) in [
            (Room::Known, &self.flows),
            (Room::Strangers, &self.strangers),
        ] {
            let flows = Self::sums(map)?.into_iter();
            all.extend(flows.map(|(flow, work)| ((room, flow), work)));
        }
        Ok(all)
    }

    fn sums(map: &Flows) -> anyhow::Result<Vec<(Flow, Work)>> {
        let there = |entry: &Result<_, MapError>| !matches!(entry, Err(MapError::KeyNotFound));
        let sum = |(flow, cpus): (Flow, maps::PerCpuValues<Work>)| {
            let mut all = Work::default();
            for work in cpus.iter() {
                all.packets += work.packets;
                all.bytes += work.bytes;
                all.timed_bytes += work.timed_bytes;
                all.timed_nanoseconds += work.timed_nanoseconds;
            }
            (flow, all)
        };
        let flows: Result<Vec<_>, _> = map.iter().filter(there).collect();
        let flows = flows.context("read a map of flows")?;
        Ok(flows.into_iter().map(sum).collect())
    }
}
