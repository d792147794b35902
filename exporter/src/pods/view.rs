// SPDX-License-Identifier: Apache-2.0
//! Who owns what, while a scrape reads?

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, RwLockReadGuard},
    time::{Duration, Instant},
};

use super::{Known, Owner, Resolution, State};

/// In whose network a cgroup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The pod, by its uid; `None` for the host's.
    pub pod: Option<Arc<str>>,
    /// Whether the cgroup has been removed. Its sockets may still send.
    pub is_gone: bool,
}

/// The directory during one scrape.
#[derive(Debug)]
pub struct View<'a> {
    pub(super) state: RwLockReadGuard<'a, State>,
    pub(super) named: bool,
}

impl View<'_> {
    /// Returns the owner of a cgroup.
    pub fn resolve(&self, cgroup: u64) -> Resolution {
        match self.state.cgroups.get(cgroup) {
            Some(cgroup) => self.state.resolve(cgroup, self.named),
            None => Resolution::Pending(None),
        }
    }

    /// Returns the pods that hold an address now, by address. One that several pods claim has no owner.
    pub fn addresses(&self) -> HashMap<IpAddr, Option<Owner>> {
        let mut addresses = HashMap::new();
        for known in self.state.pods.values().flatten() {
            let holder = self.state.holder(&known.record.uid);
            let holds = holder.is_some_and(|holder| std::ptr::eq(holder, known));
            for address in known.addresses() {
                addresses
                    .entry(*address)
                    .and_modify(|owner| *owner = None)
                    .or_insert_with(|| holds.then(|| known.record.owner("")));
            }
        }
        addresses
    }

    /// Returns the cgroups of which it is known in whose network they are.
    pub fn networks(&self) -> HashMap<u64, Network> {
        let cgroups = self.state.cgroups.all();
        let known = cgroups.filter_map(|(id, cgroup)| {
            let pod = self.state.network(cgroup)?;
            let is_gone = cgroup.gone.is_some();
            Some((id, Network { pod, is_gone }))
        });
        known.collect()
    }

    /// Says if a cgroup is known, gone or not.
    pub fn knows(&self, cgroup: u64) -> bool {
        self.state.cgroups.get(cgroup).is_some()
    }

    /// Returns every owner that has a cgroup, gone ones within the retention time included. A container's pod is one as
    /// well: it owns what comes before the container's name, or without it.
    pub fn owners(&self) -> HashSet<Owner> {
        let mut owners = HashSet::new();
        for (_, cgroup) in self.state.cgroups.all() {
            if let Resolution::Owner(owner) | Resolution::Pending(Some(owner)) =
                self.state.resolve(cgroup, self.named)
            {
                if !owner.labels.pod.is_empty() {
                    let mut pod = owner.clone();
                    pod.labels.container = "".into();
                    owners.insert(pod);
                }
                owners.insert(owner);
            }
        }
        owners
    }

    /// How long ago the pods' source last answered; `None` if it never did.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.state.fresh.map(|at| now.saturating_duration_since(at))
    }

    /// Why the pods' source does not answer.
    pub fn trouble(&self) -> Option<&str> {
        self.state.trouble.as_deref()
    }

    /// The pods that the source lists, as namespace, name and number of containers, sorted.
    pub fn listed(&self) -> Vec<(Arc<str>, Arc<str>, usize)> {
        let known = self.state.pods.values().flatten();
        let live = known.filter(|pod| pod.gone.is_none());
        let mut all: Vec<_> = live
            .map(|pod| {
                (
                    Arc::clone(&pod.record.namespace),
                    Arc::clone(&pod.record.name),
                    pod.record.containers.len(),
                )
            })
            .collect();
        all.sort();
        all
    }

    /// Says if there is a cgroup of a pod.
    pub fn has_pods(&self) -> bool {
        let mut all = self.state.cgroups.all();
        all.any(|(_, cgroup)| self.state.place(cgroup).uid().is_some())
    }

    /// How many pods that run have containers, if none of them has a cgroup here.
    pub fn misplaced(&self) -> Option<usize> {
        let known = self
            .state
            .pods
            .iter()
            .flat_map(|(uid, all)| all.iter().map(move |known| (uid, known)));
        let runs = |known: &Known| {
            known.gone.is_none() && known.record.is_running && !known.record.containers.is_empty()
        };
        let listed: HashSet<_> = known
            .filter(|(_, known)| runs(known))
            .map(|(uid, _)| uid)
            .collect();
        let mut cgroups = self.state.cgroups.all();
        let is_of_one = |cgroup| {
            self.state
                .place(cgroup)
                .uid()
                .is_some_and(|uid| listed.contains(uid))
        };
        let is_here = !listed.is_empty() && cgroups.any(|(_, cgroup)| is_of_one(cgroup));
        (!listed.is_empty() && !is_here).then_some(listed.len())
    }

    /// How many cgroups exist.
    pub fn cgroups(&self) -> usize {
        let all = self.state.cgroups.all();
        all.filter(|(_, cgroup)| cgroup.gone.is_none()).count()
    }
}
