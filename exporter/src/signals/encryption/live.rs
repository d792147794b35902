// SPDX-License-Identifier: Apache-2.0
//! What does the object count, and what is it told?

use anyhow::{Context, anyhow};
use aya::{
    maps::{self, MapData, MapError, PerCpuValues},
    util::nr_cpus,
};
use exporter_common::encryption::{
    DIRECTIONS, Flow, Interface, InterfaceKey, PROTOCOLS, Peer, PeerKey, Work,
};

use super::{
    books::{Counted, Holders, Room},
    told::Told,
};
use crate::{probe::Attached, signals::removed};

/// The object at work.
pub(super) struct Live {
    pub(super) attached: Attached,
    flows: Flows,
    strangers: Flows,
    told: Told,
    pub(super) interfaces: maps::HashMap<MapData, InterfaceKey, Interface>,
    pub(super) peers: maps::HashMap<MapData, PeerKey, Peer>,
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
            told: Told::new(attached.map("KNOWN")?, attached.map("SENDERS")?),
            interfaces: attached.map("INTERFACES")?,
            peers: attached.map("PEERS")?,
            attached,
        })
    }

    /// Tells the kernel half who holds which address, and in whose network which cgroup is.
    pub(super) fn tell(&mut self, holders: &Holders<'_>) -> anyhow::Result<()> {
        self.told.tell(holders)
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
