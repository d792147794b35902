// SPDX-License-Identifier: Apache-2.0
//! Whose is what each flow counted, when addresses change hands?

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use exporter_common::{
    NO_CGROUP,
    encryption::{DIRECTIONS, Flow, PROTOCOLS, Work},
};

use super::{
    addresses::address,
    metrics::{COUNTS, SLOTS},
};
use crate::{
    ledger::{Growth, Ledger},
    pods::{Network, Owner, Resolution, View},
};

/// Whose a packet is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Whose {
    Owner(Owner),
    Host,
    Unknown,
}

/// In which map the kernel half counts a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Room {
    /// That of pods, the node and cgroups.
    Known,
    /// That of other addresses. One that becomes known is counted in the other map from then on.
    Strangers,
}

/// A flow in a map.
pub type Counted = (Room, Flow);

/// Counts of flows, turned into counts of owners as they grow.
#[derive(Debug, Default)]
pub struct Books {
    /// What each flow grew by: packets, bytes, and bytes and nanoseconds that were timed.
    growth: Growth<Counted, 4>,
    /// Addresses that a pod has held, and when it last did: the next to hold one has no claim on what came before.
    held: HashMap<IpAddr, Instant>,
    /// Nanoseconds and bytes that were timed, by protocol and direction.
    timed: [[(u64, u64); DIRECTIONS.len()]; PROTOCOLS.len()],
    /// Totals by owner; those of owners that are forgotten are free.
    totals: Vec<[u64; SLOTS]>,
    whose: Vec<Option<Whose>>,
    /// Where each owner's are.
    index: HashMap<Whose, usize>,
    free: Vec<usize>,
}

/// Who holds which address at one time.
#[derive(Debug)]
pub struct Holders<'a> {
    /// The pods.
    pub pods: &'a View<'a>,
    /// The addresses of this node itself.
    pub host: &'a HashSet<IpAddr>,
    /// The pod that holds each address; none where several claim it.
    pub addresses: HashMap<IpAddr, Option<Owner>>,
    /// In whose network each cgroup is.
    pub networks: HashMap<u64, Network>,
}

impl<'a> Holders<'a> {
    /// Looks up who holds what now.
    pub fn new(pods: &'a View<'a>, host: &'a HashSet<IpAddr>) -> Self {
        Self {
            pods,
            host,
            addresses: pods.addresses(),
            networks: pods.networks(),
        }
    }

    /// The one pod that an address is the own one of.
    pub fn pod_at(&self, address: &IpAddr) -> Option<&Owner> {
        let owner = self.addresses.get(address)?.as_ref();
        owner.filter(|_| !self.host.contains(address))
    }
}

/// How long a pair stays after it has counted last, if its cgroup is known.
const PAIR_STAYS: Duration = Duration::from_secs(10);

/// Says if a flow has both a sender and a pod's address.
fn is_pair(flow: &Flow) -> bool {
    flow.cgroup != NO_CGROUP && !address(flow).is_unspecified()
}

impl Books {
    /// Books what the flows grew by to those who hold their addresses now. What may still find its owner is left for
    /// later.
    pub fn book(&mut self, work: &[(Counted, Work)], holders: &Holders<'_>, now: Instant) {
        let held = holders.addresses.keys();
        self.held.extend(held.map(|address| (*address, now)));
        for (counted, work) in work {
            let (_, flow) = counted;
            let (protocol, direction) = (flow.protocol as usize, flow.direction as usize);
            if protocol < PROTOCOLS.len() && direction < DIRECTIONS.len() {
                let totals = [
                    work.packets,
                    work.bytes,
                    work.timed_bytes,
                    work.timed_nanoseconds,
                ];
                self.growth.note(*counted, totals, now);
            }
        }
        let mut known = Vec::new();
        for counted in self.growth.held() {
            let (_, flow) = &counted;
            let whose = match self.whose(flow, holders) {
                Some(whose) => whose,
                None if self.growth.may_wait(&counted, now) => continue,
                None => Whose::Unknown,
            };
            known.push((whose, counted));
        }
        self.give(known);
    }

    /// Gives what flows grew by to owners.
    fn give(&mut self, known: Vec<(Whose, Counted)>) {
        let taken = known.into_iter().map(|(whose, counted)| {
            let (_, flow) = &counted;
            let (protocol, direction) = (flow.protocol as usize, flow.direction as usize);
            let by = self.growth.take(&counted);
            let [_, _, timed_bytes, timed_nanoseconds] = by;
            let (nanoseconds, bytes) = &mut self.timed[protocol][direction];
            *nanoseconds += timed_nanoseconds;
            *bytes += timed_bytes;
            (whose, protocol, direction, by)
        });
        // What a byte takes on average is known when all have been taken.
        for (whose, protocol, direction, by) in taken.collect::<Vec<_>>() {
            self.add(whose, protocol, direction, by);
        }
    }

    fn add(&mut self, whose: Whose, protocol: usize, direction: usize, by: [u64; 4]) {
        let [packets, all_bytes, timed_bytes, timed_nanoseconds] = by;
        // An owner of whose packets none was timed has what a byte takes on average.
        let (nanoseconds, bytes) = match timed_bytes {
            0 => self.timed[protocol][direction],
            bytes => (timed_nanoseconds, bytes),
        };
        let product = u128::from(nanoseconds) * u128::from(all_bytes);
        let nanoseconds = product.checked_div(u128::from(bytes)).unwrap_or_default() as u64;
        let base = (protocol * DIRECTIONS.len() + direction) * COUNTS;
        let totals = self.totals_of(whose);
        totals[base] += packets;
        totals[base + 1] += all_bytes;
        totals[base + 2] += nanoseconds;
    }

    /// Ends what was booked before addresses change hands: what waits for its sender and has a pod's address is nobody's from now on, since
    /// that may be another's next.
    pub fn close(&mut self) {
        let held = self.growth.held().into_iter();
        let pairs = held.filter(|(_, flow)| is_pair(flow));
        let pairs = pairs.map(|counted| (Whose::Unknown, counted)).collect();
        self.give(pairs);
    }

    /// Who a flow belongs to; `None` if that may still be told.
    fn whose(&self, flow: &Flow, holders: &Holders<'_>) -> Option<Whose> {
        let address = address(flow);
        if flow.cgroup != NO_CGROUP {
            if let Some(owner) = holders.pod_at(&address) {
                // A packet with a pod's own address is that pod's, unless the sender is another, which makes up its source.
                match &holders.networks.get(&flow.cgroup)?.pod {
                    Some(sender) if *sender != owner.uid => {}
                    _ => return Some(Whose::Owner(owner.clone())),
                }
            }
            return match holders.pods.resolve(flow.cgroup) {
                Resolution::Owner(mut owner) | Resolution::Pending(Some(mut owner)) => {
                    // An address does not know the container, so no packet of a pod does.
                    if !owner.labels.pod.is_empty() {
                        owner.labels.container = "".into();
                    }
                    Some(Whose::Owner(owner))
                }
                Resolution::Host => Some(Whose::Host),
                Resolution::Pending(None) => None,
                Resolution::Unknown => Some(Whose::Unknown),
            };
        }
        if address.is_unspecified() {
            return Some(Whose::Unknown);
        }
        match holders.addresses.get(&address) {
            _ if holders.host.contains(&address) => Some(Whose::Host),
            Some(Some(owner)) => Some(Whose::Owner(owner.clone())),
            Some(None) => Some(Whose::Unknown),
            None if self.held.contains_key(&address) => Some(Whose::Unknown),
            None => None,
        }
    }

    fn totals_of(&mut self, whose: Whose) -> &mut [u64; SLOTS] {
        let at = match self.index.get(&whose) {
            Some(at) => *at,
            None => {
                let at = self.free.pop().unwrap_or(self.totals.len());
                if at == self.totals.len() {
                    self.totals.push([0; SLOTS]);
                    self.whose.push(None);
                }
                self.whose[at] = Some(whose.clone());
                self.index.insert(whose, at);
                at
            }
        };
        &mut self.totals[at]
    }

    /// Books what owners grew by to their accounts, and forgets owners that are gone and have not grown for `retention`.
    pub fn settle(
        &mut self,
        ledger: &mut Ledger<usize, SLOTS>,
        holders: &Holders<'_>,
        retention: Duration,
        now: Instant,
    ) {
        let readings = self.index.values().map(|at| (*at, self.totals[*at]));
        let resolve = |at: usize| match &self.whose[at] {
            Some(Whose::Owner(owner)) => Resolution::Owner(owner.clone()),
            Some(Whose::Host) => Resolution::Host,
            Some(Whose::Unknown) | None => Resolution::Unknown,
        };
        let mut owners = holders.pods.owners();
        owners.extend(holders.addresses.values().flatten().cloned());
        ledger.book(&owners, readings, resolve, now);
        let dead = |at: usize| match &self.whose[at] {
            Some(Whose::Owner(owner)) => !owners.contains(owner),
            _ => false,
        };
        for at in ledger.retire(retention, dead, now) {
            if let Some(whose) = self.whose[at].take() {
                self.index.remove(&whose);
                self.totals[at] = [0; SLOTS];
                self.free.push(at);
            }
        }
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < retention;
        self.held.retain(|_, at| is_fresh(*at));
    }

    /// Flows that have not grown for a time and whose address nobody holds: their entries may be removed.
    pub fn idle(&self, idle: Duration, holders: &Holders<'_>, now: Instant) -> Vec<Counted> {
        let gone = |(room, flow): &Counted| {
            if *room == Room::Strangers {
                return true;
            }
            if flow.cgroup != NO_CGROUP {
                return !holders.pods.knows(flow.cgroup);
            }
            let address = address(flow);
            let is_held =
                holders.addresses.contains_key(&address) || holders.host.contains(&address);
            !is_held && !address.is_unspecified()
        };
        // The kernel half counts a pair no more once it has been told of the cgroup. A program may be at it for a moment.
        let told = |(_, flow): &Counted| {
            let network = holders.networks.get(&flow.cgroup);
            is_pair(flow) && network.is_some_and(|network| !network.is_gone)
        };
        let old = self.growth.idle(idle, now).filter(gone);
        let pairs = self.growth.idle(PAIR_STAYS.min(idle), now).filter(told);
        old.chain(pairs)
            .collect::<HashSet<_>>()
            .into_iter()
            .collect()
    }

    /// Forgets a flow whose entry has been removed.
    pub fn forget(&mut self, counted: &Counted) {
        self.growth.forget(counted);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::pods::{Drain, Place, Pods, Record, Source};

    /// A node with pods, whose signal is asked for what it has booked.
    struct Node {
        pods: Arc<Pods>,
        books: Arc<Mutex<Books>>,
        kernel: Arc<Mutex<HashMap<Counted, Work>>>,
        host: HashSet<IpAddr>,
        began: Instant,
        drain: Option<Arc<dyn Drain>>,
    }

    struct Drainer {
        books: Arc<Mutex<Books>>,
        kernel: Arc<Mutex<HashMap<Counted, Work>>>,
        host: HashSet<IpAddr>,
        began: Instant,
    }

    fn all(kernel: &Mutex<HashMap<Counted, Work>>) -> Vec<(Counted, Work)> {
        let kernel = kernel.lock().expect("no panic");
        kernel.iter().map(|(flow, work)| (*flow, *work)).collect()
    }

    impl Drain for Drainer {
        fn drain(&self, pods: &View<'_>) {
            let work = all(&self.kernel);
            let holders = Holders::new(pods, &self.host);
            self.books
                .lock()
                .expect("no panic")
                .book(&work, &holders, self.began);
        }

        fn changed(&self, _: &View<'_>) {}
    }

    fn flow(address: &str, direction: u32) -> Flow {
        let address: IpAddr = address.parse().expect("an address");
        let address = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Flow {
            address: address.octets(),
            cgroup: NO_CGROUP,
            protocol: 0,
            direction,
        }
    }

    fn pod(uid: &str, name: &str, addresses: &[&str]) -> Record {
        Record {
            uid: uid.into(),
            object: uid.into(),
            namespace: "ml".into(),
            name: name.into(),
            created: 1,
            containers: HashMap::new(),
            is_running: true,
            in_host: false,
            addresses: addresses
                .iter()
                .map(|a| a.parse().expect("an address"))
                .collect(),
        }
    }

    impl Node {
        fn new() -> Self {
            let pods = Arc::new(Pods::new(&Source::Kube, Duration::from_secs(300)));
            let mut node = Self {
                pods,
                books: Arc::default(),
                kernel: Arc::default(),
                host: ["192.168.0.1".parse().expect("an address")].into(),
                began: Instant::now(),
                drain: None,
            };
            let drain: Arc<dyn Drain> = Arc::new(Drainer {
                books: Arc::clone(&node.books),
                kernel: Arc::clone(&node.kernel),
                host: node.host.clone(),
                began: node.began,
            });
            node.pods.drain_by(&drain);
            node.drain = Some(drain);
            node
        }

        fn works(&self, flow: Flow, packets: u64) {
            let mut kernel = self.kernel.lock().expect("no panic");
            let work = kernel.entry((Room::Known, flow)).or_default();
            work.packets += packets;
            work.bytes += packets * 100;
        }

        fn times(&self, flow: Flow, packets: u64, nanoseconds: u64) {
            let mut kernel = self.kernel.lock().expect("no panic");
            let work = kernel.entry((Room::Known, flow)).or_default();
            work.timed_bytes += packets * 100;
            work.timed_nanoseconds += nanoseconds;
        }

        fn scrape(&self, after: u64) {
            let view = self.pods.view();
            let work = all(&self.kernel);
            let holders = Holders::new(&view, &self.host);
            let now = self.began + Duration::from_secs(after);
            self.books
                .lock()
                .expect("no panic")
                .book(&work, &holders, now);
        }

        /// Packets by owner: the pod's name and uid, or `host` or `unknown`.
        fn packets(&self) -> BTreeMap<String, u64> {
            self.counts(0)
        }

        fn counts(&self, slot: usize) -> BTreeMap<String, u64> {
            let books = self.books.lock().expect("no panic");
            let named = books.index.iter().map(|(whose, at)| {
                let name = match whose {
                    Whose::Owner(owner) => format!("{} {}", owner.labels.pod, owner.uid),
                    Whose::Host => "host".to_owned(),
                    Whose::Unknown => "unknown".to_owned(),
                };
                (name, books.totals[*at][slot])
            });
            named.filter(|(_, count)| *count > 0).collect()
        }
    }

    fn are(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    #[test]
    fn an_address_that_is_used_again_never_moves_counts() {
        let node = Node::new();
        node.pods
            .pods_listed(vec![pod("u1", "old", &["10.0.0.1", "fd00::1"])], node.began);
        node.works(flow("10.0.0.1", 0), 5);
        node.works(flow("fd00::1", 0), 2);
        // The pod goes: what it sent is booked before, what still comes is nobody's.
        node.pods.pod_gone("u1", node.began);
        assert_eq!(node.packets(), are(&[("old u1", 7)]));
        node.works(flow("10.0.0.1", 0), 3);
        // Its address comes to another pod, between two scrapes.
        node.pods
            .pod_found(pod("u2", "new", &["10.0.0.1"]), node.began);
        node.works(flow("10.0.0.1", 0), 11);
        node.scrape(1);
        assert_eq!(
            node.packets(),
            are(&[("new u2", 11), ("old u1", 7), ("unknown", 3)])
        );
        // A list without the new one, and with a third.
        node.works(flow("10.0.0.1", 0), 1);
        node.pods
            .pods_listed(vec![pod("u3", "third", &["10.0.0.1"])], node.began);
        node.works(flow("10.0.0.1", 0), 100);
        node.scrape(2);
        assert_eq!(
            node.packets(),
            are(&[
                ("new u2", 12),
                ("old u1", 7),
                ("third u3", 100),
                ("unknown", 3)
            ])
        );
    }

    #[test]
    fn what_nobody_holds_waits_for_its_pod_and_then_is_unknown() {
        let node = Node::new();
        node.works(flow("10.0.0.1", 0), 4);
        node.works(flow("10.0.0.9", 0), 6);
        node.works(flow("192.168.0.1", 1), 8);
        node.scrape(0);
        assert_eq!(node.books.lock().expect("no panic").growth.held().len(), 2);
        node.pods
            .pod_found(pod("u1", "late", &["10.0.0.1"]), node.began);
        node.scrape(5);
        assert_eq!(node.packets(), are(&[("late u1", 4)]));
        node.scrape(31);
        assert_eq!(node.packets(), are(&[("late u1", 4), ("unknown", 6)]));
        assert_eq!(node.counts(COUNTS), are(&[("host", 8)]));
    }

    #[test]
    fn a_pods_own_address_tells_more_than_whose_socket_it_was() {
        let node = Node::new();
        let host = Record {
            in_host: true,
            ..pod("u3", "agent", &[])
        };
        let all = vec![
            pod("u1", "a", &["10.0.0.1"]),
            pod("u2", "b", &["10.0.0.2"]),
            host,
        ];
        node.pods.pods_listed(all, node.began);
        for (cgroup, uid) in [(11, "u1"), (12, "u2"), (13, "u3")] {
            let place = Place::Pod { uid: uid.into() };
            node.pods.cgroup_found(cgroup, place);
        }
        node.pods.cgroup_found(14, Place::Unit("envoy".into()));
        let from = |cgroup, address| Flow {
            cgroup,
            ..flow(address, 0)
        };
        for (cgroup, address, packets) in [
            (11, "10.0.0.1", 1),
            // A pod in the node's network, a service of the node: they may be proxies.
            (13, "10.0.0.1", 10),
            (14, "10.0.0.1", 100),
            // Another pod makes the source up.
            (12, "10.0.0.1", 1000),
            // The node's own address, and one that nobody holds.
            (13, "192.168.0.1", 10_000),
            (12, "10.9.9.9", 100_000),
        ] {
            node.works(from(cgroup, address), packets);
        }
        // Who sends is not known yet.
        node.works(from(15, "10.0.0.2"), 7);
        node.scrape(0);
        assert_eq!(
            node.packets(),
            are(&[("a u1", 111), ("agent u3", 10_000), ("b u2", 101_000)])
        );
        node.pods.cgroup_found(15, Place::Pod { uid: "u1".into() });
        node.scrape(1);
        assert_eq!(
            node.packets(),
            are(&[("a u1", 118), ("agent u3", 10_000), ("b u2", 101_000)])
        );
    }

    #[test]
    fn an_address_that_two_pods_claim_has_no_owner() {
        let node = Node::new();
        let both = [
            pod("u1", "one", &["10.0.0.1"]),
            pod("u2", "other", &["10.0.0.1"]),
        ];
        node.pods.pods_listed(both.into(), node.began);
        node.works(flow("10.0.0.1", 0), 4);
        node.scrape(0);
        assert_eq!(node.packets(), are(&[("unknown", 4)]));
    }

    #[test]
    fn time_is_weighted_by_bytes_and_never_falls() {
        let node = Node::new();
        node.pods.pods_listed(
            vec![pod("u1", "a", &["10.0.0.1"]), pod("u2", "b", &["10.0.0.2"])],
            node.began,
        );
        let (a, b) = (flow("10.0.0.1", 0), flow("10.0.0.2", 0));
        node.works(a, 40);
        node.times(a, 4, 4_000);
        // None of b's was timed: what a byte took on average.
        node.works(b, 10);
        node.scrape(0);
        assert_eq!(node.counts(2), are(&[("a u1", 40_000), ("b u2", 10_000)]));
        node.works(a, 10);
        node.times(a, 1, 100);
        node.scrape(1);
        assert_eq!(node.counts(2), are(&[("a u1", 41_000), ("b u2", 10_000)]));
        node.scrape(2);
        assert_eq!(node.counts(2), are(&[("a u1", 41_000), ("b u2", 10_000)]));
    }
}
