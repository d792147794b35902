// SPDX-License-Identifier: Apache-2.0
//! What happened on the node between two readings, by pod: what the table, the screen and `--json` show.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    growth::grew_each,
    history::History,
    reading::{Arrivals, Counts, Owner, Rank, Reading},
    words::{self, Complaint},
};

/// Waits for a CPU that a quantile is said of at least.
const WAITS: f64 = 100.0;

/// Times ten seconds in which sessions were derived, of those that are looked at: fewer are a rotation of keys, or a restart.
const STEADY: usize = 3;

/// The node over some seconds. Its JSON is an interface: members are added, never renamed.
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// The exporter's version.
    pub version: String,
    /// Seconds that rates are over.
    pub seconds: f64,
    /// The state of each signal, and events that it lost in that time.
    pub signals: BTreeMap<String, Signal>,
    /// What is wrong, the worst first.
    pub complaints: Vec<Complaint>,
    /// Those with something to show, by what hurts most.
    pub pods: Vec<Row>,
    /// Encryption between this node and others.
    pub tunnels: Vec<Tunnel>,
    /// RDMA devices.
    pub devices: Vec<Device>,
}

/// A signal.
#[derive(Clone, Debug, Serialize)]
pub struct Signal {
    /// up, absent, disabled or failed.
    pub state: String,
    /// Events that it saw and could not count, in that time.
    pub lost_events: f64,
    /// Those that it counted.
    pub events: f64,
}

/// A pod, a cgroup of the host, or the host.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Whose numbers these are.
    #[serde(flatten)]
    pub owner: Owner,
    /// How far it is above the alert that it is nearest to: 1 is the threshold.
    pub hurts: f64,
    /// Whether one of its complaints would wake somebody: such rows come first.
    pub pages: bool,
    /// Each signal that says something of it.
    pub tcp: Option<Tcp>,
    /// RDMA queue pairs.
    pub rdma: Option<Rdma>,
    /// Threads that drive a GPU.
    pub gpu: Option<Gpu>,
    /// NCCL's ranks.
    pub nccl: Option<Nccl>,
    /// Its encrypted packets.
    pub encryption: Option<Encryption>,
}

/// TCP segments that were sent again.
#[derive(Clone, Debug, Serialize)]
pub struct Tcp {
    /// In a second.
    pub retransmits_per_second: f64,
    /// In a second, by kind.
    pub by_kind: BTreeMap<String, f64>,
}

/// Queue pairs.
#[derive(Clone, Debug, Serialize)]
pub struct Rdma {
    /// That exist.
    pub queue_pairs: f64,
    /// In state ERR.
    pub in_error: f64,
    /// In a second.
    pub created_per_second: f64,
    /// In a second.
    pub destroyed_per_second: f64,
    /// How many times over they were torn down, in the last ten minutes or since `top` began.
    pub times_torn_down: f64,
    /// By device, type and state.
    pub by_state: Vec<Pairs>,
}

/// Queue pairs that are alike.
#[derive(Clone, Debug, Serialize)]
pub struct Pairs {
    /// The RDMA device.
    pub device: String,
    /// RC, UD and others.
    pub r#type: String,
    /// RESET to ERR.
    pub state: String,
    /// How many.
    pub count: f64,
}

/// Processes that have a GPU open.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// By driver, and by GPU where that is known.
    pub processes: Vec<Processes>,
    /// Arrivals of their threads on a CPU, in a second.
    pub arrivals_per_second: f64,
    /// Seconds that they waited for a CPU, in a second.
    pub waited_per_second: f64,
    /// What half of the waits were at most; none with fewer than 100.
    pub p50_seconds: Option<f64>,
    /// What 99 in 100 waits were at most.
    pub p99_seconds: Option<f64>,
}

/// Processes of one driver.
#[derive(Clone, Debug, Serialize)]
pub struct Processes {
    /// nvidia, amdkfd, drm and others.
    pub driver: String,
    /// The N of `/dev/nvidiaN`; empty of others.
    pub gpu: String,
    /// How many.
    pub count: f64,
}

/// Ranks of NCCL.
#[derive(Clone, Debug, Serialize)]
pub struct Nccl {
    /// What a rank waited for the last one of the node in each collective, on average; none without a collective.
    pub mean_wait_seconds: Option<f64>,
    /// Who was last most often.
    pub last: Option<Last>,
    /// Age of the oldest collective that has not ended.
    pub oldest_pending_seconds: f64,
    /// Each rank.
    pub ranks: Vec<RankRow>,
    /// Ranks that others have waited for, for 10 s and more.
    pub missing: Vec<Missing>,
}

/// The rank of a pod that was last most often.
#[derive(Clone, Debug, Serialize)]
pub struct Last {
    /// Its number.
    pub rank: String,
    /// In which share of the collectives.
    pub share: f64,
}

/// A rank in a communicator.
#[derive(Clone, Debug, Serialize)]
pub struct RankRow {
    /// NCCL's hash of it, perhaps keyed.
    pub communicator: String,
    /// Its number.
    pub rank: String,
    /// host: by when it called; kernel: by when its GPU was there.
    pub source: &'static str,
    /// In a second.
    pub collectives_per_second: f64,
    /// What it waited in each, on average.
    pub mean_wait_seconds: f64,
    /// In which share of them it was the last.
    pub last_share: f64,
}

/// A rank that others wait for.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// NCCL's hash of its communicator.
    pub communicator: String,
    /// Its number.
    pub rank: String,
    /// What its process does: running, sleeping, stopped, gone or unread.
    pub state: String,
    /// For how long.
    pub seconds: f64,
}

/// Encryption of a pod's packets.
#[derive(Clone, Debug, Serialize)]
pub struct Encryption {
    /// CPU cores that it takes.
    pub cpu_cores: f64,
    /// Packets in a second.
    pub packets_per_second: f64,
    /// Bytes in a second.
    pub bytes_per_second: f64,
    /// By protocol and direction.
    pub by_direction: Vec<Direction>,
}

/// One direction of a protocol.
#[derive(Clone, Debug, Serialize)]
pub struct Direction {
    /// wireguard or ipsec.
    pub protocol: String,
    /// encrypt or decrypt.
    pub direction: String,
    /// CPU cores.
    pub cpu_cores: f64,
    /// In a second.
    pub packets_per_second: f64,
    /// In a second, before encryption.
    pub bytes_per_second: f64,
}

/// An interface of WireGuard, or IPsec.
#[derive(Clone, Debug, Serialize)]
pub struct Tunnel {
    /// wireguard or ipsec.
    pub protocol: String,
    /// The interface; empty for IPsec.
    pub interface: String,
    /// Sessions with each peer, the most first.
    pub peers: Vec<Peer>,
    /// Handshakes or associations in a second, by what became of them.
    pub events_per_second: BTreeMap<String, f64>,
}

/// A peer.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// The first 8 characters of its key, or its address.
    pub peer: String,
    /// Sessions that were derived in the last two minutes or since `top` began.
    pub sessions: f64,
    /// In a minute, of at least one.
    pub sessions_per_minute: f64,
    /// Whether they came one after the other, and not at once as in a rotation of keys.
    pub is_steady: bool,
}

/// An RDMA device.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// Its name.
    pub device: String,
    /// Seconds since it told its queue pairs.
    pub age_seconds: f64,
}

impl Node {
    /// What happened between the oldest reading of the window and the newest; none before there are two.
    pub fn of(history: &History) -> Option<Self> {
        let (before, now) = history.window()?;
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        let mut pods: BTreeMap<Owner, (Counts, f64)> = BTreeMap::new();
        for (owner, counts) in &now.owners {
            let (all, times) = pods.entry(owner.of_pod()).or_default();
            all.add(counts.since(before.owners.get(owner)));
            *times = times.max(history.times_torn_down(owner));
        }
        let rows = pods
            .into_iter()
            .map(|(owner, (counts, times))| row(owner, &counts, times, seconds));
        let mut node = Self {
            version: now.version.clone(),
            seconds,
            signals: signals(before, now),
            complaints: Vec::new(),
            pods: rows.filter(Row::says_something).collect(),
            tunnels: tunnels(before, now, history, seconds),
            devices: now
                .devices
                .iter()
                .map(|(device, age)| Device {
                    device: device.clone(),
                    age_seconds: *age,
                })
                .collect(),
        };
        words::judge(&mut node);
        let by_hurt = |a: &Row, b: &Row| {
            b.pages
                .cmp(&a.pages)
                .then(b.hurts.total_cmp(&a.hurts))
                .then_with(|| a.owner.cmp(&b.owner))
        };
        node.pods.sort_by(by_hurt);
        Some(node)
    }
}

fn signals(before: &Reading, now: &Reading) -> BTreeMap<String, Signal> {
    let lost = grew_each(Some(&before.lost), &now.lost);
    let counted = grew_each(Some(&before.counted), &now.counted);
    let of = |events: &BTreeMap<String, f64>, name| events.get(name).copied().unwrap_or_default();
    let states = now.states.iter().map(|(name, state)| {
        let signal = Signal {
            state: state.clone(),
            lost_events: of(&lost, name),
            events: of(&counted, name),
        };
        (name.clone(), signal)
    });
    states.collect()
}

fn row(owner: Owner, grown: &Counts, times: f64, seconds: f64) -> Row {
    Row {
        owner,
        hurts: 0.0,
        pages: false,
        tcp: tcp(grown, seconds),
        rdma: rdma(grown, times, seconds),
        gpu: gpu(grown, seconds),
        nccl: nccl(grown, seconds),
        encryption: encryption(grown, seconds),
    }
}

impl Row {
    /// Whether any signal tells of it more than that it was there.
    fn says_something(&self) -> bool {
        self.owner.is_named()
            || self
                .tcp
                .as_ref()
                .is_some_and(|tcp| tcp.retransmits_per_second > 0.0)
            || self
                .rdma
                .as_ref()
                .is_some_and(|rdma| rdma.queue_pairs > 0.0)
            || self
                .gpu
                .as_ref()
                .is_some_and(|gpu| gpu.arrivals_per_second > 0.0)
            || self
                .encryption
                .as_ref()
                .is_some_and(|all| all.packets_per_second > 0.0)
    }
}

fn tcp(grown: &Counts, seconds: f64) -> Option<Tcp> {
    let by_kind = rates(&grown.retransmits, seconds);
    (!by_kind.is_empty()).then(|| Tcp {
        retransmits_per_second: by_kind.values().sum(),
        by_kind,
    })
}

fn rates(grown: &BTreeMap<String, f64>, seconds: f64) -> BTreeMap<String, f64> {
    let rate = |(key, events): (&String, &f64)| (key.clone(), events / seconds);
    grown.iter().map(rate).collect()
}

fn rdma(grown: &Counts, times: f64, seconds: f64) -> Option<Rdma> {
    if grown.created.is_none() && grown.pairs.is_empty() {
        return None;
    }
    let in_error = grown.jobs_pairs().filter(|(state, _)| *state == "ERR");
    let by_state = grown
        .pairs
        .iter()
        .map(|((device, kind, state), count)| Pairs {
            device: device.clone(),
            r#type: kind.clone(),
            state: state.clone(),
            count: *count,
        });
    Some(Rdma {
        queue_pairs: grown.jobs_pairs().map(|(_, count)| count).sum(),
        in_error: in_error.map(|(_, count)| count).sum(),
        created_per_second: grown.created.unwrap_or_default() / seconds,
        destroyed_per_second: grown.destroyed / seconds,
        times_torn_down: times,
        by_state: by_state.collect(),
    })
}

fn gpu(grown: &Counts, seconds: f64) -> Option<Gpu> {
    let waits = &grown.delay.buckets;
    if grown.processes.is_empty() && waits.is_empty() {
        return None;
    }
    let arrivals = waits.last().map_or(0.0, |(_, count)| *count);
    let processes = grown.processes.iter();
    let processes = processes.map(|((driver, gpu), count)| Processes {
        driver: driver.clone(),
        gpu: gpu.clone(),
        count: *count,
    });
    // Of fewer waits one in a hundred is none.
    let quantile = |share| quantile(share, waits).filter(|_| arrivals >= WAITS);
    Some(Gpu {
        processes: processes.collect(),
        arrivals_per_second: arrivals / seconds,
        waited_per_second: grown.delay.sum / seconds,
        p50_seconds: quantile(0.5),
        p99_seconds: quantile(0.99),
    })
}

/// As Prometheus' `histogram_quantile` does: linear within a bucket, the last bound where there is no higher one.
fn quantile(share: f64, buckets: &[(f64, f64)]) -> Option<f64> {
    let all = buckets.last()?.1;
    let wanted = share * all;
    let at = buckets.iter().position(|(_, count)| *count >= wanted)?;
    let (low, below) = match at {
        0 => (0.0, 0.0),
        at => buckets[at - 1],
    };
    let (high, count) = buckets[at];
    match (all > 0.0, high.is_finite()) {
        (false, _) => None,
        (true, false) => Some(low),
        (true, true) if count > below => {
            Some(low + (high - low) * (wanted - below) / (count - below))
        }
        (true, true) => Some(high),
    }
}

fn nccl(grown: &Counts, seconds: f64) -> Option<Nccl> {
    let of_host = ranks(&grown.ranks, "host", seconds);
    let of_gpu = ranks(&grown.ranks_on_gpu, "kernel", seconds);
    if of_host.is_empty() && of_gpu.is_empty() && grown.pending == 0.0 && grown.missing.is_empty() {
        return None;
    }
    // What the GPUs waited is what counts; who called first may be the last to be there.
    let key = |row: &RankRow| (row.communicator.clone(), row.rank.clone());
    let told: BTreeSet<Rank> = of_gpu
        .iter()
        .filter(|row| row.collectives_per_second > 0.0)
        .map(key)
        .collect();
    let of_host = of_host.into_iter().filter(|row| !told.contains(&key(row)));
    let ranks: Vec<_> = of_gpu.into_iter().chain(of_host).collect();
    let collectives: f64 = ranks.iter().map(|row| row.collectives_per_second).sum();
    let waited = ranks
        .iter()
        .map(|row| row.collectives_per_second * row.mean_wait_seconds)
        .sum::<f64>();
    let busy = ranks.iter().filter(|row| row.collectives_per_second > 0.0);
    let last = busy.max_by(|a, b| a.last_share.total_cmp(&b.last_share));
    Some(Nccl {
        mean_wait_seconds: (collectives > 0.0).then(|| waited / collectives),
        last: last.map(|row| Last {
            rank: row.rank.clone(),
            share: row.last_share,
        }),
        oldest_pending_seconds: grown.pending,
        missing: grown
            .missing
            .iter()
            .map(|((communicator, rank), (state, seconds))| Missing {
                communicator: communicator.clone(),
                rank: rank.clone(),
                state: state.clone(),
                seconds: *seconds,
            })
            .collect(),
        ranks,
    })
}

fn ranks(grown: &BTreeMap<Rank, Arrivals>, source: &'static str, seconds: f64) -> Vec<RankRow> {
    let rows = grown.iter().map(|((communicator, rank), all)| {
        let each = |of: f64| match all.collectives > 0.0 {
            true => of / all.collectives,
            false => 0.0,
        };
        RankRow {
            collectives_per_second: all.collectives / seconds,
            mean_wait_seconds: each(all.waited),
            last_share: each(all.last),
            communicator: communicator.clone(),
            rank: rank.clone(),
            source,
        }
    });
    rows.collect()
}

fn encryption(grown: &Counts, seconds: f64) -> Option<Encryption> {
    let directions = grown.encrypted.iter().map(|(key, all)| Direction {
        protocol: key.0.clone(),
        direction: key.1.clone(),
        cpu_cores: all.cpu / seconds,
        packets_per_second: all.packets / seconds,
        bytes_per_second: all.bytes / seconds,
    });
    let by_direction: Vec<_> = directions.collect();
    if by_direction.is_empty() {
        return None;
    }
    let sum = |of: fn(&Direction) -> f64| by_direction.iter().map(of).sum();
    Some(Encryption {
        cpu_cores: sum(|one| one.cpu_cores),
        packets_per_second: sum(|one| one.packets_per_second),
        bytes_per_second: sum(|one| one.bytes_per_second),
        by_direction,
    })
}

fn tunnels(before: &Reading, now: &Reading, history: &History, seconds: f64) -> Vec<Tunnel> {
    let tunnels = now.tunnels.iter().map(|(key, tunnel)| {
        let old = before.tunnels.get(key).map(|old| &old.handshakes);
        let peers = tunnel.peers.keys().map(|peer| {
            let seen = history.sessions(key, peer);
            Peer {
                peer: peer.clone(),
                sessions: seen.sessions,
                sessions_per_minute: seen.sessions / (seen.seconds / 60.0).max(1.0),
                is_steady: seen.bursts >= STEADY,
            }
        });
        let mut peers: Vec<_> = peers.collect();
        peers.sort_by(|a, b| b.sessions.total_cmp(&a.sessions));
        Tunnel {
            protocol: key.0.clone(),
            interface: key.1.clone(),
            peers,
            events_per_second: rates(&grew_each(old, &tunnel.handshakes), seconds),
        }
    });
    tunnels.collect()
}
