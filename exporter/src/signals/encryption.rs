// SPDX-License-Identifier: Apache-2.0
//! What do WireGuard and IPsec cost, whose traffic is it, and are sessions derived too often?
//!
//! Hooks: kprobes and kretprobes on functions of wireguard, esp4 and esp6, and on those of the kernel that install
//! security associations (`PROGRAMS` below). Metrics: `chandra_encryption_*`.
//!
//! A packet belongs to the pod that has its inner address: the source of what is encrypted, the destination of what is
//! decrypted. A packet that still has its socket belongs to the socket's cgroup, which tells apart pods in the host's
//! network. An address has its owner at the time of the packet: before addresses change hands, what was counted for the
//! old owners is read ([`Drain`]). One that no running pod holds is the host's, if it is an address of this node, and
//! nobody's otherwise.
//!
//! The modules are never held: they can be unloaded at any time, and when they come back the hooks do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use aya::{
    include_bytes_aligned,
    maps::{self, MapData, MapError, PerCpuValues},
    util::nr_cpus,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use exporter_common::{
    NO_CGROUP,
    encryption::{
        ASSOCIATIONS, DIRECTIONS, Flow, HANDSHAKES, INTERVAL, Interface, InterfaceKey, KNOWN,
        PEERS, PROTOCOLS, Peer, PeerKey, Protocol, Work, slot,
    },
};

use super::{
    Attempt, Entry, Follower, Options, Read, Scope, Signal, State, Status, entries, follow_modules,
    monotonic, removed,
};
use crate::{
    capabilities::{BPF, KPROBES, PERFMON},
    families::{Desc, Families, Kind},
    hook::{Program, Reason, Target},
    kernel::{Kernel, btf::Btf, symbols},
    ledger::{Attribution, Ledger, Opening, PATIENCE},
    lock::{lock, try_lock},
    pods::{Drain, Labels, Owner, Resolution, View},
    probe::{self, Attached, Constants, Health},
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "encryption",
    question: "What do WireGuard and IPsec cost, whose traffic is it, and are sessions derived too often?",
    descs: &[
        &CPU,
        &PACKETS,
        &BYTES,
        &INTERVALS,
        &SESSIONS,
        &PEER_SESSIONS,
        &HANDSHAKE_EVENTS,
        &ASSOCIATION_EVENTS,
    ],
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, KPROBES],
    attach,
};

static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/encryption.o"));

/// What is counted for an owner, protocol and direction: packets, bytes, nanoseconds.
const COUNTS: usize = 3;

/// How many counters an owner has.
pub const SLOTS: usize = PROTOCOLS.len() * DIRECTIONS.len() * COUNTS;

/// How many peers are shown by name.
pub const SHOWN_PEERS: usize = 16;

static CPU: Desc = Desc {
    name: "chandra_encryption_cpu_seconds_total",
    kind: Kind::Counter,
    help: "CPU seconds of encrypting or decrypting the owner's packets.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "one packet in --encryption.timed-every, from entry to return of wireguard:encrypt_packet, wireguard:decrypt_packet, \
             esp4:esp_output_tail, esp4:esp_input and those of esp6, weighted by bytes; container is empty",
};

static PACKETS: Desc = Desc {
    name: "chandra_encryption_packets_total",
    kind: Kind::Counter,
    help: "Packets of the owner that were encrypted or decrypted.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "each run of the same functions; the owner is the inner source of what is encrypted, or its socket's cgroup, and the \
             inner destination of what is decrypted; keepalives are not counted",
};

static BYTES: Desc = Desc {
    name: "chandra_encryption_bytes_total",
    kind: Kind::Counter,
    help: "Bytes of those packets before encryption.",
    per_pod: true,
    labels: &["protocol", "direction"],
    values: &[("protocol", &PROTOCOLS), ("direction", &DIRECTIONS)],
    source: "the length in the IP header inside the encryption",
};

static INTERVALS: Desc = Desc {
    name: "chandra_encryption_session_interval_seconds",
    kind: Kind::Histogram,
    help: "Seconds between two sessions with the same peer.",
    per_pod: false,
    labels: &["protocol", "interface"],
    values: &[("protocol", &PROTOCOLS)],
    source: "as chandra_encryption_sessions_total; a peer that is removed and added again is the same",
};

static SESSIONS: Desc = Desc {
    name: "chandra_encryption_sessions_total",
    kind: Kind::Counter,
    help: "Sessions that WireGuard derived, or security associations that were installed.",
    per_pod: false,
    labels: &["protocol", "interface"],
    values: &[("protocol", &PROTOCOLS)],
    source: "kretprobe wireguard:wg_noise_handshake_begin_session, xfrm_state_add and xfrm_state_update; interface is empty for ipsec",
};

static PEER_SESSIONS: Desc = Desc {
    name: "chandra_encryption_peer_sessions_total",
    kind: Kind::Counter,
    help: "The same for the 16 peers with most sessions of late.",
    per_pod: false,
    labels: &["protocol", "interface", "peer"],
    values: &[("protocol", &PROTOCOLS)],
    source: "as chandra_encryption_sessions_total; peer is the first 8 characters of the public key, or the remote address",
};

static HANDSHAKE_EVENTS: Desc = Desc {
    name: "chandra_encryption_handshakes_total",
    kind: Kind::Counter,
    help: "WireGuard handshakes by what became of them.",
    per_pod: false,
    labels: &["protocol", "interface", "event"],
    values: &[("protocol", &[PROTOCOLS[0]]), ("event", &HANDSHAKES)],
    source: "wireguard:wg_noise_handshake_create_initiation; wg_timers_handshake_complete, on both sides; \
             wg_packet_send_queued_handshake_initiation that repeats one without an answer",
};

static ASSOCIATION_EVENTS: Desc = Desc {
    name: "chandra_encryption_security_associations_total",
    kind: Kind::Counter,
    help: "IPsec security associations by what happened to them.",
    per_pod: false,
    labels: &["event"],
    values: &[("event", &ASSOCIATIONS)],
    source: "kretprobe xfrm_state_add, xfrm_state_update and __xfrm_state_delete, kprobe km_state_expired (hard)",
};

/// What the signal looks at, and how closely.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Of how many packets one is timed.
    pub timed_every: u32,
    /// UDP port of VXLAN inside the encryption.
    pub vxlan_port: u16,
    /// UDP port of Geneve inside the encryption.
    pub geneve_port: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timed_every: 32,
            vxlan_port: 8472,
            geneve_port: 6081,
        }
    }
}

const PACKET: &[&str] = &[
    "OFF_SKB_HEAD",
    "OFF_SKB_DATA",
    "OFF_SKB_TAIL",
    "OFF_SKB_LEN",
    "OFF_SKB_SOCK",
    "OFF_SKB_NETWORK",
    "OFF_SOCK_STATE",
];
/// How an association encrypts, besides.
const ESP: &[&str] = &[
    "OFF_SKB_HEAD",
    "OFF_SKB_DATA",
    "OFF_SKB_TAIL",
    "OFF_SKB_LEN",
    "OFF_SKB_SOCK",
    "OFF_SKB_NETWORK",
    "OFF_SKB_TRANSPORT",
    "OFF_SOCK_STATE",
    "OFF_STATE_MODE",
    "OFF_STATE_HEADER",
];
const NETDEV: &[&str] = &["OFF_NETDEV_NAME", "OFF_NETDEV_NET"];
const STATE: &[&str] = &[
    "OFF_STATE_TARGET",
    "OFF_STATE_SOURCE",
    "OFF_STATE_FAMILY",
    "OFF_STATE_MODE",
    "OFF_STATE_NET",
];

/// Where a packet begins is attached after where it ends, or its end would be taken for another's.
const PROGRAMS: &[Program] = &[
    Program::if_there(
        "wireguard_encrypt_return",
        Target::Kretprobe(&["encrypt_packet"]),
    )
    .needing(PACKET),
    Program::if_there("wireguard_encrypt", Target::Kprobe(&["encrypt_packet"])).needing(PACKET),
    Program::if_there(
        "wireguard_decrypt_return",
        Target::Kretprobe(&["decrypt_packet"]),
    )
    .needing(PACKET),
    Program::if_there("wireguard_decrypt", Target::Kprobe(&["decrypt_packet"])).needing(PACKET),
    Program::if_there(
        "wireguard_session_return",
        Target::Kretprobe(&["wg_noise_handshake_begin_session"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_session",
        Target::Kprobe(&["wg_noise_handshake_begin_session"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_initiation_return",
        Target::Kretprobe(&["wg_noise_handshake_create_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_initiation",
        Target::Kprobe(&["wg_noise_handshake_create_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_complete",
        Target::Kprobe(&["wg_timers_handshake_complete"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_expired",
        Target::Kprobe(&["wg_packet_send_queued_handshake_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "esp_encrypt_return",
        Target::Kretprobe(&["esp_output_tail", "esp6_output_tail"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_encrypt",
        Target::Kprobe(&["esp_output_tail", "esp6_output_tail"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_decrypted_return",
        Target::Kretprobe(&["esp_input_done2", "esp6_input_done2"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_decrypted",
        Target::Kprobe(&["esp_input_done2", "esp6_input_done2"]),
    )
    .needing(ESP),
    Program::if_there("esp_decrypt", Target::Kprobe(&["esp_input", "esp6_input"])).needing(ESP),
    Program::if_there("association_added", Target::Kretprobe(&["xfrm_state_add"])).needing(STATE),
    Program::if_there(
        "association_updated",
        Target::Kretprobe(&["xfrm_state_update"]),
    )
    .needing(STATE),
    Program::if_there(
        "association_deleted",
        Target::Kretprobe(&["__xfrm_state_delete"]),
    )
    .needing(STATE),
    Program::if_there(
        "association",
        Target::Kprobe(&["xfrm_state_add", "xfrm_state_update", "__xfrm_state_delete"]),
    )
    .needing(STATE),
    Program::if_there("association_expired", Target::Kprobe(&["km_state_expired"])).needing(STATE),
];

/// The modules whose functions are hooked, and what each cannot do without.
const MODULES: [(&str, &[&str]); 3] = [
    (
        "wireguard",
        &[
            "encrypt_packet",
            "decrypt_packet",
            "wg_noise_handshake_begin_session",
        ],
    ),
    ("esp4", &["esp_output_tail", "esp_input_done2"]),
    ("esp6", &["esp6_output_tail", "esp6_input_done2"]),
];

fn resolve(constants: &mut Constants<'_>, kernel: &Kernel, settings: &Settings) {
    for (constant, member) in [
        ("OFF_SKB_HEAD", "head"),
        ("OFF_SKB_DATA", "data"),
        ("OFF_SKB_TAIL", "tail"),
        ("OFF_SKB_LEN", "len"),
        ("OFF_SKB_SOCK", "sk"),
        ("OFF_SKB_NETWORK", "network_header"),
        ("OFF_SKB_TRANSPORT", "transport_header"),
    ] {
        constants.offset(constant, &[("sk_buff", member)]);
    }
    constants.offset("OFF_SOCK_STATE", &[("sock", "__sk_common.skc_state")]);
    constants.socket_cgroup();
    constants.offset("OFF_NETDEV_NAME", &[("net_device", "name")]);
    constants.offset("OFF_NETDEV_NET", &[("net_device", "nd_net.net")]);
    constants.offset("OFF_STATE_TARGET", &[("xfrm_state", "id.daddr")]);
    constants.offset("OFF_STATE_SOURCE", &[("xfrm_state", "props.saddr")]);
    constants.offset("OFF_STATE_FAMILY", &[("xfrm_state", "props.family")]);
    constants.offset("OFF_STATE_MODE", &[("xfrm_state", "props.mode")]);
    constants.offset("OFF_STATE_HEADER", &[("xfrm_state", "props.header_len")]);
    constants.offset("OFF_STATE_NET", &[("xfrm_state", "xs_net.net")]);
    constants.offset("OFF_RUN_DELAY", &[("task_struct", "sched_info.run_delay")]);
    // Debian's 5.10 has no types of modules, and a module may be loaded after the exporter's start. The structs have begun like
    // this on every 64-bit kernel since WireGuard came (5.6 to 7.3; drivers/net/wireguard/{noise,peerlookup,peer,device}.h);
    // where the types can be read, they decide.
    let wireguard = kernel
        .btf
        .as_ref()
        .ok()
        .and_then(|base| Btf::module("wireguard", Arc::clone(base)).ok());
    let of_module = |name: &str, path: &str, usual: u32| {
        let field = wireguard
            .as_ref()
            .and_then(|types| types.field(name, path).ok());
        field.map_or(usual, |field| field.offset)
    };
    constants.set(
        "OFF_HANDSHAKE_PEER",
        of_module("noise_handshake", "entry.peer", 0),
    );
    constants.set(
        "OFF_HANDSHAKE_KEY",
        of_module("noise_handshake", "remote_static", 88),
    );
    constants.set("OFF_PEER_DEVICE", of_module("wg_peer", "device", 0));
    constants.set("OFF_DEVICE_NETDEV", of_module("wg_device", "dev", 0));
    constants.set("SAMPLE", settings.timed_every);
    constants.set("PORT_VXLAN", u32::from(settings.vxlan_port));
    constants.set("PORT_GENEVE", u32::from(settings.geneve_port));
}

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Encryption::new(kernel, options))
}

/// The object at work.
struct Live {
    attached: Attached,
    flows: Flows,
    strangers: Flows,
    known: maps::HashMap<MapData, [u8; 16], u32>,
    interfaces: maps::HashMap<MapData, InterfaceKey, Interface>,
    peers: maps::HashMap<MapData, PeerKey, Peer>,
    /// The addresses that the kernel half has been told of.
    told: HashSet<[u8; 16]>,
}

type Flows = maps::PerCpuHashMap<MapData, Flow, Work>;

impl Live {
    fn build(mut attached: Attached) -> anyhow::Result<Self> {
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
    fn tell(&mut self, holders: &Holders<'_>) -> anyhow::Result<()> {
        // Those of pods first. A node that balances services by IPVS has all of their addresses.
        let of_pods: BTreeSet<_> = holders.addresses.keys().map(bytes).collect();
        let of_host: BTreeSet<_> = holders.host.iter().map(bytes).collect();
        let told = |address: &&[u8; 16]| self.told.contains(*address);
        let (old, new): (Vec<_>, Vec<_>) = of_host.difference(&of_pods).partition(told);
        let all = of_pods.iter().chain(old).chain(new);
        let now: HashSet<_> = all.copied().take(KNOWN as usize).collect();
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
    fn remove(&mut self, (room, flow): Counted) -> anyhow::Result<()> {
        removed(match room {
            Room::Known => self.flows.remove(&flow),
            Room::Strangers => self.strangers.remove(&flow),
        })
    }

    /// What all CPUs did for each flow.
    fn work(&self) -> anyhow::Result<Vec<(Counted, Work)>> {
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
    /// What was booked of each flow, and when it last grew.
    seen: HashMap<Counted, (Work, Instant)>,
    /// Flows whose owner may still be told, since when.
    waiting: HashMap<Counted, Instant>,
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
}

impl<'a> Holders<'a> {
    /// Looks up who holds what now.
    pub fn new(pods: &'a View<'a>, host: &'a HashSet<IpAddr>) -> Self {
        let addresses = pods.addresses();
        Self {
            pods,
            host,
            addresses,
        }
    }
}

impl Books {
    /// Books what the flows grew by to those who hold their addresses now. What may still find its owner is left for
    /// later.
    pub fn book(&mut self, work: &[(Counted, Work)], holders: &Holders<'_>, now: Instant) {
        let held = holders.addresses.keys();
        self.held.extend(held.map(|address| (*address, now)));
        let mut known = Vec::new();
        for (counted, work) in work {
            let (_, flow) = counted;
            let (protocol, direction) = (flow.protocol as usize, flow.direction as usize);
            let seen = self.seen.get(counted);
            let seen = seen.map_or_else(Work::default, |(work, _)| *work);
            let by = Work {
                packets: work.packets.saturating_sub(seen.packets),
                bytes: work.bytes.saturating_sub(seen.bytes),
                timed_bytes: work.timed_bytes.saturating_sub(seen.timed_bytes),
                timed_nanoseconds: work
                    .timed_nanoseconds
                    .saturating_sub(seen.timed_nanoseconds),
            };
            if by.packets == 0 || protocol >= PROTOCOLS.len() || direction >= DIRECTIONS.len() {
                continue;
            }
            let whose = match self.whose(flow, holders) {
                Some(whose) => whose,
                None => {
                    let since = *self.waiting.entry(*counted).or_insert(now);
                    if now.saturating_duration_since(since) < PATIENCE {
                        continue;
                    }
                    Whose::Unknown
                }
            };
            self.waiting.remove(counted);
            self.seen.insert(*counted, (*work, now));
            let (nanoseconds, bytes) = &mut self.timed[protocol][direction];
            *nanoseconds += by.timed_nanoseconds;
            *bytes += by.timed_bytes;
            known.push((whose, protocol, direction, by));
        }
        for (whose, protocol, direction, by) in known {
            // An owner of whose packets none was timed has what a byte takes on average.
            let (nanoseconds, bytes) = match by.timed_bytes {
                0 => self.timed[protocol][direction],
                bytes => (by.timed_nanoseconds, bytes),
            };
            let product = u128::from(nanoseconds) * u128::from(by.bytes);
            let nanoseconds = product.checked_div(u128::from(bytes)).unwrap_or_default() as u64;
            let base = (protocol * DIRECTIONS.len() + direction) * COUNTS;
            let totals = self.totals_of(whose);
            totals[base] += by.packets;
            totals[base + 1] += by.bytes;
            totals[base + 2] += nanoseconds;
        }
    }

    /// Who a flow belongs to; `None` if that may still be told.
    fn whose(&self, flow: &Flow, holders: &Holders<'_>) -> Option<Whose> {
        if flow.cgroup != NO_CGROUP {
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
        let address = address(flow);
        if address.is_unspecified() {
            return Some(Whose::Unknown);
        }
        match holders.addresses.get(&address) {
            Some(Some(owner)) => Some(Whose::Owner(owner.clone())),
            Some(None) => Some(Whose::Unknown),
            None if holders.host.contains(&address) => Some(Whose::Host),
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
        let old = |grew: Instant| now.saturating_duration_since(grew) >= idle;
        let idle = self.seen.iter().filter(|(counted, (_, grew))| {
            old(*grew) && gone(counted) && !self.waiting.contains_key(counted)
        });
        idle.map(|(counted, _)| *counted).collect()
    }

    /// Forgets a flow whose entry has been removed.
    pub fn forget(&mut self, counted: &Counted) {
        self.seen.remove(counted);
    }
}

/// The inner address of a flow.
fn address(flow: &Flow) -> IpAddr {
    Ipv6Addr::from(flow.address).to_canonical()
}

/// An address as a flow has it.
fn bytes(address: &IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => *v6,
    }
    .octets()
}

/// A table of this node's network, as its first process sees it.
fn of_host(table: &str) -> String {
    let of_host = fs::read_to_string(Path::new("/proc/1/net").join(table));
    of_host
        .or_else(|_| fs::read_to_string(Path::new("/proc/self/net").join(table)))
        .unwrap_or_default()
}

/// The addresses of this node.
fn host_addresses() -> HashSet<IpAddr> {
    let mut addresses: HashSet<_> = local_v4(&of_host("fib_trie")).map(IpAddr::V4).collect();
    addresses.extend(local_v6(&of_host("if_inet6")).map(IpAddr::V6));
    addresses
}

/// The names of the interfaces of `/proc/net/dev`: the first word of each line, before a colon.
fn interfaces(table: &str) -> impl Iterator<Item = &str> {
    table
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
}

/// The local addresses of `/proc/net/fib_trie`: `|-- 10.0.0.1`, and below it `/32 host LOCAL`.
fn local_v4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut last = None;
    text.lines().filter_map(move |line| {
        if let Some((_, address)) = line.split_once("|-- ") {
            last = address.trim().parse().ok();
        }
        line.contains("/32 host LOCAL").then_some(last).flatten()
    })
}

/// The addresses of `/proc/net/if_inet6`, the first word of each line.
fn local_v6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines().filter_map(|line| {
        let bits = u128::from_str_radix(line.split_whitespace().next()?, 16).ok()?;
        Some(Ipv6Addr::from(bits))
    })
}

/// What follows the modules: used by scrapes, changes of pods, and the thread that hears of modules.
struct Core {
    live: Option<Live>,
    status: Status,
    settings: Settings,
    /// Which load of each module the hooks are in.
    loads: [Option<u64>; MODULES.len()],
    /// How often what is missing is still looked for: a module is announced before all of it is in place.
    looks: u8,
    books: Books,
    host: HashSet<IpAddr>,
    interfaces: HashSet<String>,
    /// When the node's addresses and interfaces were read.
    listed: Option<Instant>,
}

/// Enough for the some seconds that a chain of modules takes.
const LOOKS: u8 = 5;

/// How old the lists of the node's addresses and interfaces may be.
const HOST_EVERY: Duration = Duration::from_secs(10);

impl Follower for Core {
    /// Attaches to what has been loaded, and lets go of what has been unloaded. The object stays: it has counted.
    fn follow(&mut self, kernel: impl FnOnce() -> Kernel) {
        let loads = MODULES.map(|(module, _)| symbols::loaded(module));
        let absent = loads.iter().all(Option::is_none);
        if loads == self.loads && (absent || self.looks == 0 || self.complete()) {
            return;
        }
        self.looks = if loads == self.loads {
            self.looks - 1
        } else {
            LOOKS
        };
        self.loads = loads;
        let kernel = kernel();
        match &mut self.live {
            Some(live) => self.status.hooks = live.attached.follow_modules(PROGRAMS, &kernel),
            None if absent => {}
            None => self.load(&kernel),
        }
        self.status.state = match (absent, &self.live) {
            (true, _) => State::Absent,
            (false, Some(_)) if self.complete() => State::Up,
            // On its way in or out: to be looked at again.
            (false, Some(_)) if self.looks > 0 && !self.settled() => State::Absent,
            (false, _) => State::Failed,
        };
    }

    fn status(&self) -> &Status {
        &self.status
    }
}

impl Core {
    fn settled(&self) -> bool {
        MODULES
            .iter()
            .all(|(module, _)| symbols::loaded(module).is_none() || symbols::settled(module))
    }

    /// Says if each module that is loaded has the hooks that it cannot do without.
    fn complete(&self) -> bool {
        let attached = |function: &&str| {
            let hooks = self
                .status
                .hooks
                .iter()
                .filter(|hook| hook.name == *function);
            let mut hooks = hooks.peekable();
            hooks.peek().is_some() && hooks.all(|hook| hook.reason == Reason::Attached)
        };
        let modules = MODULES
            .iter()
            .zip(&self.loads)
            .filter(|(_, load)| load.is_some());
        self.live.is_some()
            && modules
                .flat_map(|((_, needs), _)| needs.iter())
                .all(attached)
    }

    fn load(&mut self, kernel: &Kernel) {
        let settings = self.settings;
        let constants = |constants: &mut Constants<'_>| resolve(constants, kernel, &settings);
        let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), constants, kernel);
        self.status.hooks = outcome.hooks;
        self.status.notes = outcome.notes;
        match outcome.attached.map(Live::build) {
            Some(Ok(live)) => self.live = Some(live),
            Some(Err(error)) => self.status.notes.push(format!("{error:#}")),
            None => {}
        }
    }

    /// Reads the node's addresses and interfaces anew, if the lists are old.
    fn list_host(&mut self, now: Instant) {
        let stale = self
            .listed
            .is_none_or(|at| now.saturating_duration_since(at) >= HOST_EVERY);
        if stale {
            self.host = host_addresses();
            let names = of_host("dev");
            self.interfaces = interfaces(&names).map(str::to_owned).collect();
            self.listed = Some(now);
        }
    }
}

/// Reads what was counted before addresses change hands.
struct Drained(Arc<Mutex<Core>>);

impl Drain for Drained {
    fn drain(&self, pods: &View<'_>) {
        let mut core = lock(&self.0);
        let core = &mut *core;
        let Some(live) = &core.live else {
            return;
        };
        match live.work() {
            Ok(work) => {
                let now = Instant::now();
                core.list_host(now);
                core.books.book(&work, &Holders::new(pods, &core.host), now);
            }
            Err(error) => tracing::error!(
                "signal encryption: addresses change hands, and what was counted cannot be read: {error:#}"
            ),
        }
    }

    fn changed(&self, pods: &View<'_>) {
        let mut core = lock(&self.0);
        let core = &mut *core;
        if let Some(live) = &mut core.live
            && let Err(error) = live.tell(&Holders::new(pods, &core.host))
        {
            tracing::error!(
                "signal encryption: a new address is a stranger's until the next scrape: {error:#}"
            );
        }
    }
}

/// A peer by what its series are called.
type PeerLabels = (&'static str, String, String);

struct Encryption {
    core: Arc<Mutex<Core>>,
    drain: Arc<dyn Drain>,
    stopped: Arc<AtomicBool>,
    ledger: Ledger<usize, SLOTS>,
    interfaces: BTreeMap<(&'static str, String), [u64; slot::ALL]>,
    /// When each of them last counted anything.
    counted: HashMap<(&'static str, String), Instant>,
    peers: Peers,
    status: Status,
    health: Health,
}

impl Drop for Encryption {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Encryption {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let mut core = Core {
            live: None,
            status: Status::bare(State::Absent),
            settings: options.encryption,
            loads: [None; MODULES.len()],
            looks: 0,
            books: Books::default(),
            host: HashSet::new(),
            interfaces: HashSet::new(),
            listed: None,
        };
        core.follow(|| kernel.clone());
        let status = core.status.clone();
        let core = Arc::new(Mutex::new(core));
        let stopped = Arc::new(AtomicBool::new(false));
        let (of_thread, stop) = (Arc::clone(&core), Arc::clone(&stopped));
        thread::Builder::new()
            .name("encryption".to_owned())
            .stack_size(1 << 20)
            .spawn(move || follow_modules("encryption", &of_thread, &stop))
            .context("start the thread that follows modules")?;
        Ok(Self {
            drain: Arc::new(Drained(Arc::clone(&core))),
            core,
            stopped,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
            interfaces: BTreeMap::new(),
            counted: HashMap::new(),
            peers: Peers::default(),
            status,
            health: Health::default(),
        })
    }
}

impl Encryption {
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
        let is_roomy = all.len() < PEERS as usize / 2;
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

/// Packets, for the account of attribution.
fn units(slots: &[u64; SLOTS]) -> u64 {
    slots.iter().step_by(COUNTS).sum()
}

fn protocol(key: &InterfaceKey) -> &'static str {
    PROTOCOLS
        .get(key.protocol as usize)
        .unwrap_or(&PROTOCOLS[0])
}

fn interface(key: &InterfaceKey) -> String {
    let end = key
        .name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(key.name.len());
    String::from_utf8_lossy(&key.name[..end]).into_owned()
}

/// What a peer has: its sessions, and whether there was one within the retention time.
#[derive(Clone, Copy, Debug, Default)]
struct PeerTotal {
    sessions: u64,
    is_fresh: bool,
}

/// The peers that are shown: those with most sessions of late.
#[derive(Debug, Default)]
struct Peers {
    /// Sessions, and those of late: each weighs half as much after five minutes.
    known: BTreeMap<PeerLabels, (u64, f64)>,
    scored: Option<Instant>,
    shown: Vec<(PeerLabels, u64)>,
}

/// After how long a session counts half.
const HALF_LIFE: Duration = Duration::from_secs(300);

impl Peers {
    fn update(&mut self, peers: BTreeMap<PeerLabels, PeerTotal>, now: Instant) {
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
fn peer_labels(key: &PeerKey, host: &HashSet<IpAddr>) -> PeerLabels {
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

impl Signal for Encryption {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        let core = Arc::clone(&self.core);
        let Some(mut core) = try_lock(&core) else {
            return Ok(Read::Before);
        };
        let core = &mut *core;
        self.status = core.status.clone();
        if core.live.is_some() {
            core.list_host(scope.now);
        }
        let holders = Holders::new(scope.pods, &core.host);
        if let Some(live) = &mut core.live {
            core.books.book(&live.work()?, &holders, scope.now);
        }
        core.books
            .settle(&mut self.ledger, &holders, scope.retention, scope.now);
        let Some(live) = &mut core.live else {
            return Ok(Read::Now);
        };
        live.tell(&holders)?;
        for counted in core.books.idle(scope.retention, &holders, scope.now) {
            live.remove(counted)?;
            core.books.forget(&counted);
        }
        self.read_interfaces(live, &core.interfaces, scope)?;
        self.read_peers(live, &core.host, scope)?;
        self.health = live.attached.health()?;
        Ok(Read::Now)
    }

    fn render(&self, families: &mut Families) {
        if self.status.state == State::Absent && self.interfaces.is_empty() {
            return;
        }
        render(self.ledger.accounts(), families);
        render_sessions(&self.interfaces, &self.peers.shown, families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.health.clone())
    }

    fn drain(&self) -> Option<Arc<dyn Drain>> {
        Some(Arc::clone(&self.drain))
    }

    fn status(&self) -> Option<Status> {
        Some(self.status.clone())
    }
}

/// Renders accounts by slot. Each protocol and direction appears with its first packet.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        let flows = PROTOCOLS.iter().flat_map(|protocol| {
            DIRECTIONS
                .iter()
                .map(move |direction| (protocol, direction))
        });
        for ((protocol, direction), counts) in flows.zip(slots.chunks_exact(COUNTS)) {
            if counts[0] == 0 {
                continue;
            }
            let labels = [
                &*owner.namespace,
                &*owner.pod,
                &*owner.container,
                protocol,
                direction,
            ];
            families.add(&PACKETS, &labels, counts[0] as f64);
            families.add(&BYTES, &labels, counts[1] as f64);
            families.add(&CPU, &labels, counts[2] as f64 / 1e9);
        }
    }
}

/// Renders sessions by interface and peer.
pub fn render_sessions(
    interfaces: &BTreeMap<(&'static str, String), [u64; slot::ALL]>,
    peers: &[(PeerLabels, u64)],
    families: &mut Families,
) {
    for ((protocol, interface), slots) in interfaces {
        let labels = [*protocol, interface.as_str()];
        families.add(&SESSIONS, &labels, slots[slot::SESSIONS] as f64);
        let intervals = &slots[slot::INTERVALS..slot::INTERVALS + INTERVAL.slots()];
        families.add_histogram(&INTERVALS, &labels, INTERVAL, intervals);
        if *protocol == PROTOCOLS[0] {
            for (event, count) in HANDSHAKES.iter().zip(&slots[slot::HANDSHAKE..]) {
                families.add(
                    &HANDSHAKE_EVENTS,
                    &[labels[0], labels[1], event],
                    *count as f64,
                );
            }
        } else {
            for (event, count) in ASSOCIATIONS.iter().zip(&slots[slot::ASSOCIATION..]) {
                families.add(&ASSOCIATION_EVENTS, &[event], *count as f64);
            }
        }
    }
    for ((protocol, interface, peer), sessions) in peers {
        families.add(
            &PEER_SESSIONS,
            &[protocol, interface, peer],
            *sessions as f64,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{Pods, Record, Source};

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

    impl Drain for Drainer {
        fn drain(&self, pods: &View<'_>) {
            let work: Vec<_> = self
                .kernel
                .lock()
                .expect("no panic")
                .clone()
                .into_iter()
                .collect();
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
            let work: Vec<_> = self
                .kernel
                .lock()
                .expect("no panic")
                .clone()
                .into_iter()
                .collect();
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
        assert_eq!(node.books.lock().expect("no panic").waiting.len(), 2);
        node.pods
            .pod_found(pod("u1", "late", &["10.0.0.1"]), node.began);
        node.scrape(5);
        assert_eq!(node.packets(), are(&[("late u1", 4)]));
        node.scrape(31);
        assert_eq!(node.packets(), are(&[("late u1", 4), ("unknown", 6)]));
        assert_eq!(node.counts(COUNTS), are(&[("host", 8)]));
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

    #[test]
    fn the_addresses_of_the_node_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.0.0.5\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(
            local_v4(trie).collect::<Vec<_>>(),
            [Ipv4Addr::new(10, 0, 0, 5)]
        );
        let six = "fe80000000000000000000fffe000001 02 40 20 80 eth0\nnonsense\n";
        assert_eq!(local_v6(six).count(), 1);
    }

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
