// SPDX-License-Identifier: Apache-2.0
//! What does one page of an exporter say of each pod, and of what is the node's?

use std::{collections::BTreeMap, time::Instant};

use serde::Serialize;

use super::exposition::{self, Series};
use crate::{
    families::Desc,
    scrape,
    signals::{encryption, gpu, nccl, rdma, tcp},
};

/// Whose series these are: a pod, a cgroup of the host by its name, or the host (all empty).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Owner {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name; `unknown` or `other` without a namespace are no pods.
    pub pod: String,
    /// The container's name; where there is no pod, the cgroup's. Empty of a pod as a whole.
    pub container: String,
}

impl Owner {
    fn of(series: &Series<'_>) -> Self {
        let [namespace, pod, container] =
            ["namespace", "pod", "container"].map(|label| series.label(label).to_owned());
        Self {
            namespace,
            pod,
            container,
        }
    }

    /// The pod that it is of; a cgroup of the host is itself.
    pub(super) fn of_pod(&self) -> Self {
        let mut owner = self.clone();
        if !owner.pod.is_empty() {
            owner.container.clear();
        }
        owner
    }

    /// Whether it is a pod or a cgroup by its name, and not the host or what is left of pods.
    pub(super) fn is_named(&self) -> bool {
        !self.namespace.is_empty() || !self.container.is_empty()
    }

    /// Its name for people. What is no name is in parentheses, and no cgroup's name begins with one.
    pub fn name(&self) -> String {
        match (&*self.namespace, &*self.pod, &*self.container) {
            ("", "", "") => "(host)".to_owned(),
            ("", "", cgroup) if cgroup.starts_with('(') => format!("./{cgroup}"),
            ("", "", cgroup) => cgroup.to_owned(),
            ("", "unknown", _) => "(unknown pods)".to_owned(),
            ("", "other", _) => "(beyond --max-owners)".to_owned(),
            (namespace, pod, _) => format!("{namespace}/{pod}"),
        }
    }
}

/// A page, and when it was read. All counts are those since the exporter began.
#[derive(Clone, Debug)]
pub struct Reading {
    /// When it was asked for.
    pub at: Instant,
    /// The exporter's version.
    pub version: String,
    /// The state of each signal: up, absent, disabled or failed.
    pub states: BTreeMap<String, String>,
    /// Events that each signal saw and could not count.
    pub lost: BTreeMap<String, f64>,
    /// Those that it counted.
    pub counted: BTreeMap<String, f64>,
    /// By whose they are.
    pub owners: BTreeMap<Owner, Counts>,
    /// By protocol and interface.
    pub tunnels: BTreeMap<(String, String), Tunnel>,
    /// Seconds since each RDMA device last told its queue pairs.
    pub devices: BTreeMap<String, f64>,
}

/// What is counted of one owner. What a signal does not tell is empty.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Retransmitted segments, by kind.
    pub retransmits: BTreeMap<String, f64>,
    /// Queue pairs that exist, by device, type and state.
    pub pairs: BTreeMap<(String, String, String), f64>,
    /// Queue pairs that were created.
    pub created: Option<f64>,
    /// Queue pairs that were destroyed.
    pub destroyed: f64,
    /// Processes on a GPU, by driver and GPU.
    pub processes: BTreeMap<(String, String), f64>,
    /// How long threads that drive a GPU waited for a CPU.
    pub delay: Delay,
    /// What came of each rank, by communicator and rank, as calls of the host tell it.
    pub ranks: BTreeMap<Rank, Arrivals>,
    /// The same, as the profiler plugin tells it: what the GPUs waited.
    pub ranks_on_gpu: BTreeMap<Rank, Arrivals>,
    /// Age of the oldest collective that has not ended, in seconds.
    pub pending: f64,
    /// Ranks that others wait for, with their state and for how many seconds.
    pub missing: BTreeMap<Rank, (String, f64)>,
    /// Encrypted packets, by protocol and direction.
    pub encrypted: BTreeMap<(String, String), Encrypted>,
}

/// A communicator and a rank of it.
pub type Rank = (String, String);

/// A histogram: upper bounds in seconds with how many were at most that long.
#[derive(Clone, Debug, Default)]
pub struct Delay {
    /// In the order of the bounds, the last without one.
    pub buckets: Vec<(f64, f64)>,
    /// All seconds together.
    pub sum: f64,
}

/// Collectives of a rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrivals {
    /// Seconds that it waited for the last one.
    pub waited: f64,
    /// At which all ranks of the node arrived.
    pub collectives: f64,
    /// At which it was the last.
    pub last: f64,
}

/// Encryption of an owner's packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Encrypted {
    /// CPU seconds.
    pub cpu: f64,
    /// Packets.
    pub packets: f64,
    /// Bytes before encryption.
    pub bytes: f64,
}

/// An interface of WireGuard, or IPsec as a whole.
#[derive(Clone, Debug, Default)]
pub struct Tunnel {
    /// Sessions that were derived.
    pub sessions: f64,
    /// Those with each peer.
    pub peers: BTreeMap<String, f64>,
    /// Handshakes, by what became of them.
    pub handshakes: BTreeMap<String, f64>,
}

/// Containers of a page at most: ten times what an exporter names by default.
const OWNERS: usize = 12_000;

/// Buckets of a histogram at most: twice what there are.
const BUCKETS: usize = 64;

/// What is done with a series.
type Take = fn(&mut Reading, &Series<'_>);

/// Each metric that is read, what its series' names have behind it, and what is done with them.
static TAKEN: [(&Desc, &str, Take); 24] = [
    (&scrape::BUILD_INFO, "", |reading, series| {
        reading.version = series.label("version").to_owned();
    }),
    (&scrape::SIGNAL_STATE, "", |reading, series| {
        if series.value == 1.0 {
            let [signal, state] = ["signal", "state"].map(|label| series.label(label).to_owned());
            reading.states.insert(signal, state);
        }
    }),
    (&scrape::LOST_EVENTS, "", |reading, series| {
        // A scrape that failed is no event.
        if series.label("reason") != "read_failed" {
            *entry(&mut reading.lost, series, "signal") += series.value;
        }
    }),
    (&scrape::ATTRIBUTION, "", |reading, series| {
        *entry(&mut reading.counted, series, "signal") += series.value;
    }),
    (&tcp::RETRANSMITS, "", |reading, series| {
        *entry(&mut reading.owner(series).retransmits, series, "kind") += series.value;
    }),
    (&rdma::metrics::PAIRS, "", |reading, series| {
        let key = three(series, ["device", "type", "state"]);
        *reading.owner(series).pairs.entry(key).or_default() += series.value;
    }),
    (&rdma::metrics::CREATED, "", |reading, series| {
        *reading.owner(series).created.get_or_insert_default() += series.value;
    }),
    (&rdma::metrics::DESTROYED, "", |reading, series| {
        reading.owner(series).destroyed += series.value;
    }),
    (&rdma::metrics::AGE, "", |reading, series| {
        *entry(&mut reading.devices, series, "device") = series.value;
    }),
    (&gpu::metrics::PROCESSES, "", |reading, series| {
        let key = two(series, ["driver", "gpu"]);
        *reading.owner(series).processes.entry(key).or_default() += series.value;
    }),
    (
        &gpu::metrics::RUNQUEUE_DELAY,
        "_bucket",
        |reading, series| {
            let Ok(bound) = series.label("le").parse() else {
                return;
            };
            reading.owner(series).delay.add(bound, series.value);
        },
    ),
    (&gpu::metrics::RUNQUEUE_DELAY, "_sum", |reading, series| {
        reading.owner(series).delay.sum += series.value;
    }),
    (&nccl::metrics::RANK_WAIT, "", |reading, series| {
        reading.arrivals(series).waited += series.value;
    }),
    (&nccl::metrics::RANK_COLLECTIVES, "", |reading, series| {
        reading.arrivals(series).collectives += series.value;
    }),
    (&nccl::metrics::RANK_LAST, "", |reading, series| {
        reading.arrivals(series).last += series.value;
    }),
    (&nccl::pending::PENDING, "", |reading, series| {
        let pending = &mut reading.owner(series).pending;
        *pending = pending.max(series.value);
    }),
    (&nccl::pending::MISSING, "", |reading, series| {
        let rank = two(series, ["communicator", "rank"]);
        let missing = (series.label("state").to_owned(), series.value);
        reading.owner(series).missing.insert(rank, missing);
    }),
    (&encryption::metrics::CPU, "", |reading, series| {
        reading.encrypted(series).cpu += series.value;
    }),
    (&encryption::metrics::PACKETS, "", |reading, series| {
        reading.encrypted(series).packets += series.value;
    }),
    (&encryption::metrics::BYTES, "", |reading, series| {
        reading.encrypted(series).bytes += series.value;
    }),
    (&encryption::metrics::SESSIONS, "", |reading, series| {
        reading.tunnel(series).sessions += series.value;
    }),
    (
        &encryption::metrics::PEER_SESSIONS,
        "",
        |reading, series| {
            *entry(&mut reading.tunnel(series).peers, series, "peer") += series.value;
        },
    ),
    (
        &encryption::metrics::HANDSHAKE_EVENTS,
        "",
        |reading, series| {
            *entry(&mut reading.tunnel(series).handshakes, series, "event") += series.value;
        },
    ),
    (
        &encryption::metrics::ASSOCIATION_EVENTS,
        "",
        |reading, series| {
            let key = ("ipsec".to_owned(), String::new());
            let tunnel = reading.tunnels.entry(key).or_default();
            *entry(&mut tunnel.handshakes, series, "event") += series.value;
        },
    ),
];

fn taker(name: &str) -> Option<Take> {
    let is = |(desc, suffix, _): &&(&Desc, &str, Take)| {
        name.strip_prefix(desc.name)
            .is_some_and(|end| end == *suffix)
    };
    TAKEN.iter().find(is).map(|(.., take)| *take)
}

impl Reading {
    /// Reads a page.
    ///
    /// # Errors
    /// When it is none of Chandra's.
    pub fn of(page: &str, at: Instant) -> anyhow::Result<Self> {
        let mut reading = Self {
            at,
            version: String::new(),
            states: BTreeMap::new(),
            lost: BTreeMap::new(),
            counted: BTreeMap::new(),
            owners: BTreeMap::new(),
            tunnels: BTreeMap::new(),
            devices: BTreeMap::new(),
        };
        for (take, series) in exposition::series(page, taker) {
            take(&mut reading, &series);
            anyhow::ensure!(
                reading.owners.len() <= OWNERS,
                "its page has more than {OWNERS} containers"
            );
        }
        anyhow::ensure!(
            !reading.version.is_empty(),
            "what answers is no exporter of Chandra's: its page has no {}",
            scrape::BUILD_INFO.name
        );
        Ok(reading)
    }

    fn owner(&mut self, series: &Series<'_>) -> &mut Counts {
        self.owners.entry(Owner::of(series)).or_default()
    }

    fn tunnel(&mut self, series: &Series<'_>) -> &mut Tunnel {
        let key = two(series, ["protocol", "interface"]);
        self.tunnels.entry(key).or_default()
    }

    fn arrivals(&mut self, series: &Series<'_>) -> &mut Arrivals {
        let counts = self.owner(series);
        let ranks = match series.label("source") {
            "kernel" => &mut counts.ranks_on_gpu,
            _ => &mut counts.ranks,
        };
        ranks
            .entry(two(series, ["communicator", "rank"]))
            .or_default()
    }

    fn encrypted(&mut self, series: &Series<'_>) -> &mut Encrypted {
        let key = two(series, ["protocol", "direction"]);
        self.owner(series).encrypted.entry(key).or_default()
    }
}

impl Delay {
    /// Adds how many there are up to a bound.
    pub(super) fn add(&mut self, bound: f64, count: f64) {
        let known = self.buckets.iter().position(|(known, _)| *known == bound);
        match known {
            Some(at) => self.buckets[at].1 += count,
            None if self.buckets.len() < BUCKETS => self.buckets.push((bound, count)),
            None => {}
        }
    }
}

fn entry<'a>(map: &'a mut BTreeMap<String, f64>, series: &Series<'_>, label: &str) -> &'a mut f64 {
    map.entry(series.label(label).to_owned()).or_default()
}

fn two(series: &Series<'_>, labels: [&str; 2]) -> (String, String) {
    let [one, other] = labels.map(|label| series.label(label).to_owned());
    (one, other)
}

fn three(series: &Series<'_>, labels: [&str; 3]) -> (String, String, String) {
    let [one, two, three] = labels.map(|label| series.label(label).to_owned());
    (one, two, three)
}
