// SPDX-License-Identifier: Apache-2.0
//! What is wrong, in words?
//!
//! The measure of each signal is the threshold of its alert. The alert also waits for some minutes, and knows what was before: what is
//! said here may be over in a moment.

use std::collections::HashMap;

use serde::Serialize;

use super::{
    format::{number, share, time, visible},
    node::{Missing, Nccl, Node, RankRow, Row, Tcp, Tunnel},
    reading::Owner,
};

/// From where an alert of the mixin fires.
#[derive(Debug)]
pub struct Threshold {
    /// Its name.
    pub alert: &'static str,
    /// The signal that it belongs to.
    pub signal: &'static str,
    /// In the unit of what it looks at.
    pub value: f64,
}

impl Threshold {
    const fn new(signal: &'static str, alert: &'static str, value: f64) -> Self {
        Self {
            alert,
            signal,
            value,
        }
    }
}

/// Segments a second that a pod sends again.
pub(super) const RETRANSMITS: Threshold = Threshold::new("tcp", "TcpRetransmitsHigh", 10.0);
/// How many times over queue pairs are torn down in ten minutes.
pub(super) const TORN_DOWN: Threshold = Threshold::new("rdma", "RdmaQueuePairSpike", 2.5);
/// Queue pairs in ERR: the alert has no threshold, one is too many.
const IN_ERROR: Threshold = Threshold::new("rdma", "RdmaQueuePairErrors", 1.0);
/// The same of the host.
const HOST_IN_ERROR: Threshold = Threshold::new("rdma", "RdmaHostQueuePairErrors", 1.0);
/// Seconds since a device told its queue pairs.
const STALE: Threshold = Threshold::new("rdma", "RdmaEnumerationStale", 120.0);
/// Seconds that one wait for a CPU in a hundred exceeds.
pub(super) const RUNQUEUE: Threshold = Threshold::new("gpu", "GpuRunqueueDelayHigh", 0.065_536);
/// Seconds that ranks wait for the last one, on average.
pub(super) const STRAGGLER: Threshold = Threshold::new("nccl", "NcclStraggler", 0.001);
/// Seconds that a collective is under way.
pub(super) const STUCK: Threshold = Threshold::new("nccl", "NcclCollectiveStuck", 30.0);
/// Sessions a minute with one peer.
const SESSIONS: Threshold = Threshold::new("encryption", "EncryptionRekeyStorm", 2.0);
/// CPU cores for the encryption of one pod's packets.
pub(super) const CPU: Threshold = Threshold::new("encryption", "EncryptionCpuHigh", 1.0);

/// A signal that failed: the alert has no threshold.
const DOWN: Threshold = Threshold::new("exporter", "ChandraSignalDown", 1.0);
/// Which share of a signal's events is lost.
const EVENTS_LOST: Threshold = Threshold::new("exporter", "ChandraEventsLost", 0.01);

/// The thresholds of alerts that stand here too.
pub const THRESHOLDS: [&Threshold; 9] = [
    &RETRANSMITS,
    &TORN_DOWN,
    &STALE,
    &RUNQUEUE,
    &STRAGGLER,
    &STUCK,
    &SESSIONS,
    &CPU,
    &EVENTS_LOST,
];

/// In which share of the collectives a straggler is the last (`NcclStraggler`).
pub const LAST_ARRIVALS: f64 = 0.75;

/// Fewer collectives are chance.
const COLLECTIVES: f64 = 20.0;

/// Segments that are sent for one that is sent again, where that is no trouble (`share` of `TcpRetransmitsHigh`, inverted).
const SENT_FOR_EACH: f64 = 100.0;

/// How many events a signal has in a second at least where it is said that it loses some (`floor` of `ChandraEventsLost`).
const EVENTS: f64 = 0.1;

/// One thing that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Complaint {
    /// The alert that looks at the same: its runbook says what to do.
    pub alert: &'static str,
    /// The signal; `exporter` for what Chandra itself lacks.
    pub signal: String,
    /// Whose fault it is or who suffers, where it is one pod.
    #[serde(flatten)]
    pub owner: Option<Owner>,
    /// How far above the threshold: 1 is at it.
    pub ratio: f64,
    /// One sentence.
    pub text: String,
    /// Whether the alert would wake somebody.
    pub pages: bool,
}

/// Says what is wrong on a node, and how much each pod hurts.
pub(super) fn judge(node: &mut Node) {
    let mut complaints = signals(node);
    for tunnel in &node.tunnels {
        complaints.extend(sessions(tunnel, node));
    }
    for device in node
        .devices
        .iter()
        .filter(|of| of.age_seconds > STALE.value)
    {
        let text = format!(
            "RDMA device {} has not told its queue pairs for {}: their number is history",
            visible(&device.device),
            time(device.age_seconds)
        );
        complaints.push(complaint(&STALE, None, device.age_seconds, text));
    }
    let waits = waits(node);
    let seconds = node.seconds;
    for row in &mut node.pods {
        let (of_pod, nearest) = of_pod(row, seconds, &waits);
        row.hurts = nearest;
        row.pages = of_pod.iter().any(|one| one.pages);
        complaints.extend(of_pod);
    }
    complaints.sort_by(|a, b| b.pages.cmp(&a.pages).then(b.ratio.total_cmp(&a.ratio)));
    node.complaints = complaints;
}

fn complaint(threshold: &Threshold, owner: Option<&Owner>, value: f64, text: String) -> Complaint {
    Complaint {
        alert: threshold.alert,
        signal: threshold.signal.to_owned(),
        owner: owner.cloned(),
        ratio: value / threshold.value,
        text,
        pages: false,
    }
}

/// What Chandra itself lacks.
fn signals(node: &Node) -> Vec<Complaint> {
    let mut all = Vec::new();
    for (name, signal) in &node.signals {
        let name = visible(name);
        if signal.state == "failed" {
            let text = format!("{name} does not work: chandra check says why");
            all.push(complaint(&DOWN, None, DOWN.value, text));
        }
        let seen = signal.lost_events + signal.events;
        if signal.lost_events > EVENTS_LOST.value * seen && seen > EVENTS * node.seconds {
            let text = format!(
                "{name} could not count {} of {} events in {}: its numbers are too low",
                number(signal.lost_events),
                number(seen),
                time(node.seconds)
            );
            all.push(complaint(&EVENTS_LOST, None, EVENTS_LOST.value, text));
        }
    }
    all
}

/// The pods with most encrypted traffic, who wait while a session is rebuilt.
fn busiest(node: &Node) -> String {
    let mut pods: Vec<_> = node
        .pods
        .iter()
        .filter_map(|row| Some((row.encryption.as_ref()?.bytes_per_second, &row.owner)))
        .filter(|(bytes, _)| *bytes > 0.0)
        .collect();
    pods.sort_by(|a, b| b.0.total_cmp(&a.0));
    let names = pods.iter().take(3).map(|(_, owner)| visible(&owner.name()));
    names.collect::<Vec<_>>().join(", ")
}

fn sessions(tunnel: &Tunnel, node: &Node) -> Option<Complaint> {
    let worst = tunnel.peers.iter().find(|peer| peer.is_steady)?;
    if worst.sessions_per_minute <= SESSIONS.value {
        return None;
    }
    let at = match &*tunnel.interface {
        "" => String::new(),
        interface => format!(" {}", visible(interface)),
    };
    let mut text = format!(
        "{}{at} derives {} sessions a minute with peer {}, and packets wait for each",
        visible(&tunnel.protocol),
        number(worst.sessions_per_minute),
        visible(&worst.peer)
    );
    let busiest = busiest(node);
    if !busiest.is_empty() {
        text += &format!("; most encrypted traffic: {busiest}");
    }
    let mut complaint = complaint(&SESSIONS, None, worst.sessions_per_minute, text);
    complaint.pages = true;
    Some(complaint)
}

/// By namespace and communicator, what its ranks wait in each collective on average.
type Waits = HashMap<(String, String), f64>;

fn waits(node: &Node) -> Waits {
    let mut sums: HashMap<(String, String), (f64, f64)> = HashMap::new();
    for row in &node.pods {
        for rank in row.nccl.iter().flat_map(|nccl| &nccl.ranks) {
            let key = (row.owner.namespace.clone(), rank.communicator.clone());
            let (waited, collectives) = sums.entry(key).or_default();
            *waited += rank.mean_wait_seconds * rank.collectives_per_second;
            *collectives += rank.collectives_per_second;
        }
    }
    let mean = |(key, (waited, collectives)): (_, (f64, f64))| {
        (collectives > 0.0).then(|| (key, waited / collectives))
    };
    sums.into_iter().filter_map(mean).collect()
}

/// What there is to say of a pod, and how near it is to the alert that it is nearest to.
fn of_pod(row: &Row, seconds: f64, waits: &Waits) -> (Vec<Complaint>, f64) {
    let owner = &row.owner;
    let mut all = Vec::new();
    let mut nearest = 0.0_f64;
    // Most pods are far below: their sentences are not made.
    let mut say = |threshold: &Threshold, value: f64, pages, text: &dyn Fn() -> String| {
        nearest = nearest.max(value / threshold.value);
        if value >= threshold.value {
            let text = format!("{} {}", visible(&owner.name()), text());
            let mut complaint = complaint(threshold, Some(owner), value, text);
            complaint.pages = pages;
            all.push(complaint);
        }
    };
    if let Some(tcp) = &row.tcp {
        let (judged, is_slow) = retransmits(tcp);
        say(&RETRANSMITS, judged, false, &|| {
            let rate = number(tcp.retransmits_per_second);
            match is_slow {
                true => format!("sends {rate} TCP segments a second again"),
                false => format!(
                    "sends {rate} TCP segments a second again, which is much if it sends less than {} a second",
                    number(tcp.retransmits_per_second * SENT_FOR_EACH)
                ),
            }
        });
    }
    if let Some(rdma) = &row.rdma {
        say(&TORN_DOWN, rdma.times_torn_down, false, &|| {
            format!(
                "has torn down its queue pairs {} times over: it dies, or NCCL starts over",
                number(rdma.times_torn_down)
            )
        });
        let is_host = *owner == Owner::default();
        let threshold = if is_host { &HOST_IN_ERROR } else { &IN_ERROR };
        say(threshold, rdma.in_error, owner.is_named(), &|| {
            let (pairs, carry) = match rdma.in_error {
                1.0 => (
                    "queue pair",
                    "it carries nothing, and who waits for it hangs",
                ),
                _ => (
                    "queue pairs",
                    "they carry nothing, and who waits for them hangs",
                ),
            };
            format!("has {} {pairs} in ERR: {carry}", number(rdma.in_error))
        });
    }
    if let Some(wait) = row.gpu.as_ref().and_then(|gpu| gpu.p99_seconds) {
        say(&RUNQUEUE, wait, false, &|| {
            format!(
                "waits for a CPU to drive its GPU, one time in a hundred for more than {}",
                time(wait)
            )
        });
    }
    if let Some(encryption) = &row.encryption {
        say(&CPU, encryption.cpu_cores, false, &|| {
            format!(
                "has traffic whose encryption takes {} CPU cores",
                number(encryption.cpu_cores)
            )
        });
    }
    if let Some(nccl) = &row.nccl {
        let age = nccl.oldest_pending_seconds;
        let never_comes = nccl.missing.iter().any(Missing::never_comes);
        // Whether the communicator is slow by nature is not known here: it may be idle, unless a rank will never come.
        let judged = if never_comes {
            age
        } else {
            age.min(STUCK.value)
        };
        say(&STUCK, judged, never_comes, &|| {
            format!(
                "has had a collective under way for {}{}",
                time(age),
                missing(nccl)
            )
        });
        if let Some((rank, wait)) = straggler(row, seconds, waits) {
            say(&STRAGGLER, wait, false, &|| {
                format!(
                    "has rank {}, the last in {} of the collectives: in each the ranks wait {}",
                    visible(&rank.rank),
                    share(rank.last_share),
                    time(wait)
                )
            });
        }
    }
    (all, nearest)
}

/// By how many retransmits a second a pod is judged, and whether they are much whatever it sends: timers and handshakes are, what was sent
/// again at once is where it is one in a hundred.
fn retransmits(tcp: &Tcp) -> (f64, bool) {
    let rate = tcp.retransmits_per_second;
    let fast = ["fast", "probe"].map(|kind| tcp.by_kind.get(kind).copied());
    let slow = rate - fast.into_iter().flatten().sum::<f64>();
    let is_slow = slow > RETRANSMITS.value;
    let judged = if is_slow {
        rate
    } else {
        rate.min(RETRANSMITS.value)
    };
    (judged, is_slow)
}

/// Which ranks a collective waits for.
fn missing(nccl: &Nccl) -> String {
    let Some(first) = nccl.missing.first() else {
        return " (normal where a server waits for requests)".to_owned();
    };
    let more = match nccl.missing.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let (rank, state) = (visible(&first.rank), visible(&first.state));
    format!(", for rank {rank} ({state}){more}")
}

impl Missing {
    /// Whether its process cannot call any more.
    fn never_comes(&self) -> bool {
        matches!(&*self.state, "stopped" | "gone")
    }
}

/// The rank of a pod for which the others wait, and how long.
fn straggler<'a>(row: &'a Row, seconds: f64, waits: &Waits) -> Option<(&'a RankRow, f64)> {
    let ranks = row.nccl.iter().flat_map(|nccl| &nccl.ranks);
    let late = ranks.filter(|rank| {
        rank.communicator != "other"
            && rank.last_share > LAST_ARRIVALS
            && rank.collectives_per_second * seconds >= COLLECTIVES
    });
    let with_wait = late.filter_map(|rank| {
        let key = (row.owner.namespace.clone(), rank.communicator.clone());
        Some((rank, *waits.get(&key)?))
    });
    with_wait.max_by(|a, b| a.1.total_cmp(&b.1))
}
