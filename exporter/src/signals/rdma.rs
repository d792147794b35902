// SPDX-License-Identifier: Apache-2.0
//! Whose queue pairs come and go, fail, or are slow to connect?
//!
//! Hooks: kprobes and kretprobes on functions of ib_core, ib_uverbs and rdma_cm (`PROGRAMS` below), and RDMA netlink for
//! the gauge. Metrics: `chandra_rdma_*`.
//!
//! Counted are the queue pairs that user space makes through the kernel; an event belongs to the cgroup that created the
//! pair, whoever modifies or destroys it. Neither hooks nor netlink see what a process makes past the kernel's verbs
//! (DEVX objects of mlx5, and NVSHMEM's IBGDA on top of them). Counters of ports and congestion are node_exporter's
//! (`node_infiniband_*`).
//!
//! The modules are never held: they can be unloaded at any time, and when they come back the hooks do.

pub mod enumeration;
pub mod host;
pub mod nldev;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::{
    include_bytes_aligned,
    maps::{self, MapData},
};
use exporter_common::{
    Loss,
    histogram::Shape,
    rdma::{
        Call, CallKey, DEVICES, EVENTS, LATENCY, LIFETIME, MEMORY, RESULTS, Resolving,
        ResolvingKey, STATES, Usage, slot,
    },
};

use self::{
    enumeration::{Enumeration, Limits, PairOwner, Report},
    host::{DeviceMap, DeviceTotals, Host, Owners, PairMaps},
};
use super::{
    Attempt, Entry, Follower, Options, Read, Scope, Signal, State, Status, entries, follow_modules,
    monotonic,
};
use crate::{
    capabilities::{BPF, NAMESPACES, NAMESPACES_OF_OTHERS, PERFMON},
    families::{Desc, Families, Kind},
    hook::{Hook, Method, Program, Reason, Target},
    kernel::{
        Kernel,
        btf::Btf,
        symbols::{self, Symbols},
    },
    ledger::{Attribution, Ledger, Names, OTHER, Opening, Shown},
    lock::try_lock,
    pods::{Labels, Resolution},
    probe::{self, Attached, Constants, Health},
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "rdma",
    question: "Whose queue pairs come and go, fail, or are slow to connect?",
    descs: &[
        &PAIRS,
        &CREATED,
        &DESTROYED,
        &DEVICE_CREATED,
        &DEVICE_DESTROYED,
        &TRANSITIONS,
        &ASYNC_EVENTS,
        &LIFETIMES,
        &CONNECTS,
        &ADDRESSES,
        &ROUTES,
        &REGIONS,
        &BYTES,
        &AGE,
    ],
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, NAMESPACES, NAMESPACES_OF_OTHERS],
    attach,
};

/// How the signal shows what is new.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How long what a new account has is shown at 0.
    pub zero_for: Duration,
}

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/rdma.o"));

/// How many counters an owner has.
pub const SLOTS: usize = slot::ALL;

/// Types of a queue pair by `enum ib_qp_type` (include/rdma/ib_verbs.h), as `rdma resource` spells them.
const TYPES: [(u8, &str); 11] = [
    (0, "SMI"),
    (1, "GSI"),
    (2, "RC"),
    (3, "UC"),
    (4, "UD"),
    (5, "RAW_IPV6"),
    (6, "RAW_ETHERTYPE"),
    (8, "RAW_PACKET"),
    (9, "XRC_INI"),
    (10, "XRC_TGT"),
    (255, "DRIVER"),
];

/// What is neither a known type nor a known state.
const STRANGE: &str = "UNKNOWN";

static PAIRS: Desc = Desc {
    name: "chandra_rdma_queue_pairs",
    kind: Kind::Gauge,
    help: "Queue pairs that exist; those of the kernel are the host's.",
    per_pod: true,
    labels: &["device", "type", "state"],
    values: &[
        (
            "type",
            &[
                "SMI",
                "GSI",
                "RC",
                "UC",
                "UD",
                "RAW_IPV6",
                "RAW_ETHERTYPE",
                "RAW_PACKET",
                "XRC_INI",
                "XRC_TGT",
                "DRIVER",
                STRANGE,
            ],
        ),
        (
            "state",
            &["RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR", STRANGE],
        ),
    ],
    source: "RDMA netlink (RDMA_NLDEV_CMD_RES_QP_GET), in every network namespace where devices live, when a scrape asks and \
             at most every 10 s; the owner is the cgroup that created the pair, or that of its thread for pairs older than the exporter",
};

static CREATED: Desc = Desc {
    name: "chandra_rdma_queue_pairs_created_total",
    kind: Kind::Counter,
    help: "Queue pairs that user space created.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "kretprobe ib_core:ib_create_qp_user; before 5.15 kprobe ib_core:ib_create_qp_security within the uverbs handlers",
};

static DESTROYED: Desc = Desc {
    name: "chandra_rdma_queue_pairs_destroyed_total",
    kind: Kind::Counter,
    help: "Queue pairs of user space that were destroyed, by whomever.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "kprobe and kretprobe ib_core:ib_destroy_qp_user; the owner is the cgroup that created the pair",
};

static DEVICE_CREATED: Desc = Desc {
    name: "chandra_rdma_device_queue_pairs_created_total",
    kind: Kind::Counter,
    help: "Queue pairs that user space created on the device.",
    per_pod: false,
    labels: &["device"],
    values: &[],
    source: "as chandra_rdma_queue_pairs_created_total; present at 0 for every device",
};

static DEVICE_DESTROYED: Desc = Desc {
    name: "chandra_rdma_device_queue_pairs_destroyed_total",
    kind: Kind::Counter,
    help: "Queue pairs of user space that were destroyed on the device.",
    per_pod: false,
    labels: &["device"],
    values: &[],
    source: "as chandra_rdma_queue_pairs_destroyed_total; present at 0 for every device",
};

static TRANSITIONS: Desc = Desc {
    name: "chandra_rdma_queue_pair_transitions_total",
    kind: Kind::Counter,
    help: "Successful modifies of a queue pair to the state.",
    per_pod: true,
    labels: &["state"],
    values: &[("state", &STATES)],
    source: "kprobe and kretprobe ib_core:ib_modify_qp_with_udata and ib_core:ib_modify_qp with IB_QP_STATE; ERR is also how an \
             orderly close looks, and a failure inside the device is no modify",
};

static ASYNC_EVENTS: Desc = Desc {
    name: "chandra_rdma_queue_pair_events_total",
    kind: Kind::Counter,
    help: "Asynchronous events that the device reported of queue pairs.",
    per_pod: true,
    labels: &["event"],
    values: &[(
        "event",
        &[
            "fatal",
            "request_error",
            "access_error",
            "communication_established",
            "send_queue_drained",
            "path_migrated",
            "path_migration_error",
            "last_wqe_reached",
            "other",
        ],
    )],
    source: "kprobe ib_uverbs:ib_uverbs_qp_event_handler",
};

static LIFETIMES: Desc = Desc {
    name: "chandra_rdma_queue_pair_lifetime_seconds",
    kind: Kind::Histogram,
    help: "Seconds from the creation of a queue pair to its destruction.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "as the counters of both; pairs older than the exporter are not in it",
};

static CONNECTS: Desc = Desc {
    name: "chandra_rdma_queue_pair_connect_seconds",
    kind: Kind::Histogram,
    help: "Seconds from the creation of a queue pair to its first RTS.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "as chandra_rdma_queue_pair_transitions_total; pairs older than the exporter are not in it",
};

static ADDRESSES: Desc = Desc {
    name: "chandra_rdma_address_resolution_seconds",
    kind: Kind::Histogram,
    help: "Seconds from rdma_resolve_addr to its event or its error.",
    per_pod: true,
    labels: &["result"],
    values: &[("result", &RESULTS)],
    source: "kprobe and kretprobe rdma_cm:rdma_resolve_addr, kprobe rdma_cm:cma_cm_event_handler; the owner is the cgroup that asked; \
             an id that is destroyed before is not counted",
};

static ROUTES: Desc = Desc {
    name: "chandra_rdma_route_resolution_seconds",
    kind: Kind::Histogram,
    help: "Seconds from rdma_resolve_route to its event or its error.",
    per_pod: true,
    labels: &["result"],
    values: &[("result", &RESULTS)],
    source: "kprobe and kretprobe rdma_cm:rdma_resolve_route, kprobe rdma_cm:cma_cm_event_handler",
};

static REGIONS: Desc = Desc {
    name: "chandra_rdma_memory_regions_registered_total",
    kind: Kind::Counter,
    help: "Memory regions that were registered.",
    per_pod: true,
    labels: &["kind"],
    values: &[("kind", &MEMORY)],
    source: "kretprobe ib_uverbs:ib_uverbs_reg_mr and the REG_MR and REG_DMABUF_MR methods; dmabuf is GPUDirect",
};

static BYTES: Desc = Desc {
    name: "chandra_rdma_memory_registered_bytes_total",
    kind: Kind::Counter,
    help: "Bytes of the memory regions that were registered.",
    per_pod: true,
    labels: &["kind"],
    values: &[("kind", &MEMORY)],
    source: "the size that ib_umem_get, ib_umem_odp_get or ib_umem_dmabuf_get is asked for during a registration",
};

static AGE: Desc = Desc {
    name: "chandra_rdma_enumeration_age_seconds",
    kind: Kind::Gauge,
    help: "Seconds since the enumeration began that gave the device's queue pairs, or since the device was first seen.",
    per_pod: false,
    labels: &["device"],
    values: &[],
    source: "the exporter's clock; grows while the device does not answer",
};

/// What ends a pair, on every kernel. Attached before what begins one: a pair whose end was not seen would keep its number
/// and address.
const DESTROY: &[Program] = &[
    Program::required("destroy", Target::Kprobe(&["ib_destroy_qp_user"])),
    Program::required("destroy_return", Target::Kretprobe(&["ib_destroy_qp_user"])),
];

/// What else every kernel has.
const PROGRAMS: &[Program] = &[
    Program::required("modify_user", Target::Kprobe(&["ib_modify_qp_with_udata"])),
    Program::wanted("modify_kernel", Target::Kprobe(&["ib_modify_qp"])),
    Program::required(
        "modify_return",
        Target::Kretprobe(&["ib_modify_qp_with_udata", "ib_modify_qp"]),
    ),
    Program::wanted("qp_event", Target::Kprobe(&["ib_uverbs_qp_event_handler"])),
    Program::wanted("resolve_addr", Target::Kprobe(&["rdma_resolve_addr"])),
    Program::wanted(
        "resolve_addr_return",
        Target::Kretprobe(&["rdma_resolve_addr"]),
    ),
    Program::wanted("resolve_route", Target::Kprobe(&["rdma_resolve_route"])),
    Program::wanted(
        "resolve_route_return",
        Target::Kretprobe(&["rdma_resolve_route"]),
    ),
    Program::wanted("cm_event", Target::Kprobe(&["cma_cm_event_handler"])),
    Program::wanted("destroy_id", Target::Kprobe(&["rdma_destroy_id"])),
    Program::wanted("register", Target::Kprobe(REGISTER)),
    Program::wanted("register_return", Target::Kretprobe(REGISTER)),
    Program::wanted(
        "pin_user",
        Target::Kprobe(&["ib_umem_get", "ib_umem_odp_get"]),
    ),
    Program::if_there("pin_user_attr", Target::Kprobe(&["ib_umem_get_attr_or_va"])),
    Program::if_there(
        "pin_dmabuf",
        Target::Kprobe(&[
            "ib_umem_dmabuf_get",
            "ib_umem_dmabuf_get_pinned",
            "ib_umem_dmabuf_get_pinned_revocable_and_lock",
        ]),
    ),
    Program::if_there(
        "pin_dmabuf_for",
        Target::Kprobe(&["ib_umem_dmabuf_get_pinned_with_dma_device"]),
    ),
];

const REGISTER: &[&str] = &[
    "ib_uverbs_reg_mr",
    "ib_uverbs_handler_UVERBS_METHOD_REG_MR",
    "ib_uverbs_handler_UVERBS_METHOD_REG_DMABUF_MR",
];

/// A creation by user space, from 5.15 (commit 514aee660df4).
const CREATE: &[Program] = &[
    Program::required("create", Target::Kprobe(&["ib_create_qp_user"])),
    Program::required("create_return", Target::Kretprobe(&["ib_create_qp_user"])),
];

const HANDLERS: &[&str] = &[
    "ib_uverbs_handler_UVERBS_METHOD_QP_CREATE",
    "ib_uverbs_create_qp",
    "ib_uverbs_ex_create_qp",
];

/// What tells a creation by user space before, and the new pair's number where no type does.
const HANDLE: &[Program] = &[
    Program::wanted("create_handler", Target::Kprobe(HANDLERS)),
    Program::wanted("create_handler_return", Target::Kretprobe(HANDLERS)),
];

const SECURITY: &[Program] = &[Program::required(
    "create_security",
    Target::Kprobe(&["ib_create_qp_security"]),
)];

/// Kernels before 5.15 without CONFIG_SECURITY_INFINIBAND have no function of ib_core that every new pair passes, so each
/// provider's own is hooked (drivers/infiniband of 5.10).
const PROVIDERS: &[Program] = &[Program::wanted(
    "create_provider_return",
    Target::Kretprobe(&[
        "mlx5_ib_create_qp",
        "mlx4_ib_create_qp",
        "irdma_create_qp",
        "i40iw_create_qp",
        "bnxt_re_create_qp",
        "qedr_create_qp",
        "efa_create_qp",
        "hns_roce_create_qp",
        "c4iw_create_qp",
        "rvt_create_qp",
        "ocrdma_create_qp",
        "pvrdma_create_qp",
        "usnic_ib_create_qp",
        "mthca_create_qp",
        "siw_create_qp",
        "rxe_create_qp",
    ]),
)];

const COPY_TO: &[Program] = &[Program::wanted(
    "copy_to",
    Target::Kprobe(&["uverbs_copy_to"]),
)];

/// Functions of before 5.8 also had the name `ib_create_qp_user`, with other arguments; this one came with its own.
const CREATE_KERNEL: &str = "ib_create_qp_kernel";

/// The modules whose functions are hooked, the providers' included. Without the first there is no RDMA.
const MODULES: [&str; 21] = [
    "ib_core",
    "ib_uverbs",
    "ib_uverbs_support",
    "rdma_cm",
    "mlx5_ib",
    "mlx4_ib",
    "irdma",
    "i40iw",
    "bnxt_re",
    "qedr",
    "efa",
    "hns_roce",
    "hns_roce_hw_v2",
    "iw_cxgb4",
    "rdmavt",
    "ocrdma",
    "vmw_pvrdma",
    "usnic_verbs",
    "ib_mthca",
    "siw",
    "rdma_rxe",
];

/// Chooses the programs for this kernel.
fn programs(symbols: &Symbols, numbered: bool) -> Vec<Program> {
    let by_user = symbols.has("ib_create_qp_user") && symbols.has(CREATE_KERNEL);
    let mut programs = Vec::from(DESTROY);
    programs.extend(match by_user {
        true => CREATE,
        false if symbols.has("ib_create_qp_security") => SECURITY,
        false => PROVIDERS,
    });
    if !by_user || !numbered {
        programs.extend(HANDLE);
    }
    if !numbered {
        programs.extend(COPY_TO);
    }
    programs.extend(PROGRAMS);
    programs
}

fn resolve(constants: &mut Constants<'_>) {
    constants.offset("OFF_PAIR_DEVICE", &[("ib_qp", "device")]);
    constants.offset("OFF_PAIR_NUMBER", &[("ib_qp", "qp_num")]);
    constants.offset("OFF_PAIR_REAL", &[("ib_qp", "real_qp")]);
    constants.offset("OFF_DEVICE_INDEX", &[("ib_device", "index")]);
    constants.offset("OFF_DEVICE_NAME", &[("ib_device", "name")]);
}

/// The types of ib_core, where it carries some.
fn types_of_module(kernel: &Kernel) -> Result<Btf, String> {
    let base = kernel.btf.as_ref().map_err(Clone::clone)?;
    Btf::module("ib_core", Arc::clone(base)).map_err(|error| error.to_string())
}

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Rdma::new(kernel, options))
}

/// Totals of the kernel half at one time.
#[derive(Debug, Default)]
struct Reading {
    usage: Vec<(u64, [u64; SLOTS])>,
    devices: Vec<DeviceTotals>,
}

/// The object at work.
struct Live {
    attached: Attached,
    programs: Vec<Program>,
    usage: maps::HashMap<MapData, u64, Usage>,
    calls: maps::HashMap<MapData, CallKey, Call>,
    resolving: maps::HashMap<MapData, ResolvingKey, Resolving>,
}

impl Live {
    fn reading(&self, owners: &Owners) -> anyhow::Result<Reading> {
        let usage = entries(&self.usage)?.into_iter();
        Ok(Reading {
            usage: usage.map(|(cgroup, usage)| (cgroup, usage.slots)).collect(),
            devices: owners.devices()?,
        })
    }

    /// Removes calls whose return was not seen and ids that were never answered. Returns how many.
    fn sweep(&mut self) -> u64 {
        let now = monotonic();
        let old = |since: u64| now.saturating_sub(since) > SWEEP_AFTER.as_nanos() as u64;
        let calls = self.calls.iter().filter_map(Result::ok);
        let calls: Vec<_> = calls.filter(|(_, call)| old(call.entered)).collect();
        let mut swept = 0;
        for (key, _) in calls {
            swept += u64::from(self.calls.remove(&key).is_ok());
        }
        let resolving = self.resolving.iter().filter_map(Result::ok);
        let resolving: Vec<_> = resolving
            .filter(|(_, resolving)| old(resolving.started))
            .collect();
        for (key, _) in resolving {
            swept += u64::from(self.resolving.remove(&key).is_ok());
        }
        swept
    }
}

/// A resolution's longest time-out is some seconds, and so is the longest call.
const SWEEP_AFTER: Duration = Duration::from_secs(600);

/// How often the leftovers are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Enough for the some seconds that a chain of modules takes.
const LOOKS: u8 = 5;

/// What follows the modules: used by the scrape and by the thread that hears of modules.
struct Core {
    live: Option<Live>,
    status: Status,
    /// Which load of each module the hooks are in.
    loads: [Option<u64>; MODULES.len()],
    /// How often what is missing is still looked for: a module is announced before all of it is in place.
    looks: u8,
    owners: Arc<Owners>,
    /// Readings of objects that were dropped, for the next scrape.
    farewells: Vec<Reading>,
    /// What dropped objects had lost, what was swept up of them included, and run.
    health: Health,
    swept: u64,
}

impl Follower for Core {
    /// Attaches to what has been loaded, and lets go of what has been unloaded.
    fn follow(&mut self, kernel: impl FnOnce() -> Kernel) {
        let loads = MODULES.map(symbols::loaded);
        if loads == self.loads {
            let lacks = |hook: &Hook| hook.reason != Reason::Attached;
            if self.looks == 0 || !self.status.hooks.iter().any(lacks) {
                return;
            }
            self.looks -= 1;
        } else {
            self.looks = LOOKS;
        }
        let core_is_same = loads[0] == self.loads[0] && self.live.is_some();
        self.loads = loads;
        if loads[0].is_none() {
            self.drop_live();
            self.status = Status::bare(State::Absent);
            return;
        }
        let kernel = kernel();
        if core_is_same && let Some(live) = &mut self.live {
            self.status.hooks = live.attached.follow_modules(&live.programs, &kernel);
            return;
        }
        self.drop_live();
        self.load(&kernel);
        if self.live.is_none() && !symbols::settled(MODULES[0]) {
            // On its way in or out: not failed, but to be looked at again.
            self.loads = [None; MODULES.len()];
            self.status = Status::bare(State::Absent);
        }
    }

    fn status(&self) -> &Status {
        &self.status
    }
}

impl Core {
    fn new(owners: Arc<Owners>) -> Self {
        Self {
            live: None,
            status: Status::bare(State::Absent),
            loads: [None; MODULES.len()],
            looks: 0,
            owners,
            farewells: Vec::new(),
            health: Health::default(),
            swept: 0,
        }
    }

    fn load(&mut self, kernel: &Kernel) {
        let types = types_of_module(kernel);
        let has_number = |types: &Btf| types.field("ib_qp", "qp_num").is_ok();
        let numbered = types.as_ref().is_ok_and(has_number);
        let names = ["ib_create_qp_user", CREATE_KERNEL, "ib_create_qp_security"];
        let symbols = Symbols::of_kernel(names).unwrap_or_default();
        let programs = programs(&symbols, numbered);
        let types = types.as_ref().map_err(String::as_str);
        let by_core = programs.iter().any(|program| program.name == "create");
        let constants = |constants: &mut Constants<'_>| {
            constants.set("CORE_CREATES", u32::from(by_core));
            resolve(constants);
        };
        let outcome = probe::attach(OBJECT, &programs, types, constants, kernel);
        let mut notes = Vec::new();
        // All are missing for one reason, or none is.
        if let Some(why) = outcome.notes.first() {
            notes.push(format!(
                "ib_core tells no types ({why}): queue pairs older than the exporter end as unknown"
            ));
        }
        let live = outcome.attached.and_then(|attached| {
            let live = self.build(attached, programs, numbered);
            live.map_err(|error| notes.push(format!("{error:#}"))).ok()
        });
        self.status = Status {
            state: if live.is_some() {
                State::Up
            } else {
                State::Failed
            },
            hooks: outcome.hooks,
            notes,
            found: Vec::new(),
        };
        self.live = live;
    }

    fn build(
        &self,
        mut attached: Attached,
        programs: Vec<Program>,
        numbered: bool,
    ) -> anyhow::Result<Live> {
        let named = attached
            .values()
            .iter()
            .any(|(name, _)| *name == "OFF_DEVICE_NAME");
        let pairs = PairMaps {
            pairs: attached.map("PAIRS")?,
            old: attached.map("OLD_PAIRS")?,
            missing: HashSet::new(),
            numbered,
        };
        let devices = DeviceMap {
            devices: attached.map("DEVICES")?,
            named,
        };
        let live = Live {
            usage: attached.map("USAGE")?,
            calls: attached.map("CALLS")?,
            resolving: attached.map("RESOLVING")?,
            attached,
            programs,
        };
        self.owners.replace(Some((pairs, devices)));
        Ok(live)
    }

    /// Tells what a scrape shows beside the counts.
    fn tell(&self) -> anyhow::Result<Told> {
        let mut health = self.health.clone();
        if let Some(live) = &self.live {
            health += live.attached.health()?;
        }
        health.losses[Loss::MissedReturn] += self.swept;
        Ok(Told {
            status: self.status.clone(),
            health,
        })
    }

    fn drop_live(&mut self) {
        let Some(live) = &self.live else {
            return;
        };
        match live.reading(&self.owners) {
            Ok(reading) => self.farewells.push(reading),
            Err(error) => tracing::error!("signal rdma: the last counts are lost: {error:#}"),
        }
        match self.tell() {
            Ok(told) => {
                self.health = told.health;
                self.swept = 0;
            }
            Err(error) => tracing::error!("signal rdma: the last losses are lost: {error:#}"),
        }
        self.owners.replace(None);
        self.live = None;
    }
}

/// Devices that are shown by name. A node has some ten; whoever may administer its network can make and rename others.
const SHOWN_DEVICES: usize = 64;

/// A row of the gauge: labels, device, type and state.
type Row = (Labels, String, &'static str, &'static str);

struct Rdma {
    core: Arc<Mutex<Core>>,
    stopped: Arc<AtomicBool>,
    enumeration: Enumeration,
    ledger: Ledger<u64, SLOTS>,
    max_owners: usize,
    /// Created and destroyed, by device.
    devices: BTreeMap<String, [u64; 2]>,
    /// Which of them have names of their own.
    names: Names<String>,
    /// The kernel's totals at the last scrape, by the device's address.
    seen: HashMap<u64, [u64; 2]>,
    /// The names under which they were booked.
    booked: HashMap<u64, String>,
    rows: BTreeMap<Row, u64>,
    ages: Vec<(String, f64)>,
    troubles: Vec<String>,
    swept: Option<Instant>,
    last: Told,
}

/// What was told of the kernel half when it last could be asked: while modules are followed, no scrape waits.
#[derive(Clone, Debug)]
struct Told {
    status: Status,
    health: Health,
}

impl Drop for Rdma {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Rdma {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let owners = Arc::new(Owners::default());
        let mut core = Core::new(Arc::clone(&owners));
        core.follow(|| kernel.clone());
        let last = core.tell()?;
        let core = Arc::new(Mutex::new(core));
        let stopped = Arc::new(AtomicBool::new(false));
        let (of_thread, stop) = (Arc::clone(&core), Arc::clone(&stopped));
        thread::Builder::new()
            .name("rdma-modules".to_owned())
            .stack_size(1 << 20)
            .spawn(move || follow_modules("rdma", &of_thread, &stop))
            .context("start the thread that follows modules")?;
        let host = Host {
            owners,
            cgroups: options.cgroups.clone(),
        };
        let enumeration = Enumeration::start(host, Limits::default())
            .context("start the thread that enumerates queue pairs")?;
        // The first scrape has something to show.
        enumeration.ask();
        Ok(Self {
            core,
            stopped,
            enumeration,
            ledger: Ledger::new(options.max_owners, units)
                .opening(Opening::Events)
                .new_for(options.rdma.zero_for),
            max_owners: options.max_owners,
            devices: BTreeMap::new(),
            names: Names::new(SHOWN_DEVICES),
            seen: HashMap::new(),
            booked: HashMap::new(),
            rows: BTreeMap::new(),
            ages: Vec::new(),
            troubles: Vec::new(),
            swept: None,
            last,
        })
    }

    fn status_now(&self) -> Status {
        let mut status = self.last.status.clone();
        if status.state != State::Absent {
            let reason = if self.troubles.is_empty() {
                Reason::Attached
            } else {
                Reason::Failed
            };
            status.hooks.push(Hook {
                name: "RDMA_NLDEV_CMD_RES_QP_GET",
                method: Method::Netlink,
                reason,
                detail: self.troubles.join("; "),
            });
        }
        status
    }

    /// Books what devices grew by to their names. A device whose name is not known yet is booked later.
    fn book_devices(&mut self, devices: Vec<DeviceTotals>, now: Instant) {
        for device in devices {
            let DeviceTotals {
                address,
                name: Some(name),
                totals,
            } = device
            else {
                continue;
            };
            let seen = self.seen.entry(address).or_default();
            self.booked.insert(address, name.clone());
            let by: [u64; 2] = std::array::from_fn(|i| totals[i].saturating_sub(seen[i]));
            *seen = totals;
            // One that has gone counts no more.
            if by == [0; 2] {
                continue;
            }
            let name = shown(&mut self.names, name, now);
            let account = self.devices.entry(name).or_default();
            for (account, by) in account.iter_mut().zip(by) {
                *account += by;
            }
        }
    }

    /// Makes room for devices to come, once half of the map is taken: forgets those that have gone and are booked.
    fn forget_devices(&mut self, owners: &Owners, listed: &BTreeSet<String>) {
        if self.booked.len() < DEVICES as usize / 2 {
            return;
        }
        let gone = |name: &String| !listed.is_empty() && !listed.contains(name);
        for (address, _) in self.booked.extract_if(|_, name| gone(name)) {
            owners.forget(address);
            self.seen.remove(&address);
        }
    }

    fn count_pairs(&mut self, reports: Vec<Report>, scope: &Scope<'_>) {
        self.rows.clear();
        let mut owners = Shown::new(self.max_owners);
        let mut ages: BTreeMap<String, f64> = BTreeMap::new();
        for Report {
            device,
            age,
            counts,
        } in reports
        {
            let device = shown(&mut self.names, device, scope.now);
            self.devices.entry(device.clone()).or_default();
            for ((owner, kind, state), pairs) in counts.iter().flat_map(|counts| counts.iter()) {
                let labels = owners.of(resolution(*owner, scope));
                let kind = TYPES
                    .iter()
                    .find(|(code, _)| code == kind)
                    .map_or(STRANGE, |(_, name)| name);
                let state = STATES.get(usize::from(*state)).unwrap_or(&STRANGE);
                *self
                    .rows
                    .entry((labels, device.clone(), kind, state))
                    .or_default() += pairs;
            }
            let oldest = ages.entry(device).or_default();
            *oldest = oldest.max(age.as_secs_f64());
        }
        self.ages = ages.into_iter().collect();
        for gone in self.names.expire(scope.retention, scope.now) {
            self.devices.remove(&gone);
        }
    }
}

/// The name under which a device is shown.
fn shown(names: &mut Names<String>, device: String, now: Instant) -> String {
    match names.meet(&device, now) {
        true => device,
        false => OTHER.to_owned(),
    }
}

/// Whose a queue pair is.
fn resolution(owner: PairOwner, scope: &Scope<'_>) -> Resolution {
    match owner {
        PairOwner::Kernel => Resolution::Host,
        PairOwner::Unknown => Resolution::Unknown,
        PairOwner::Cgroup(cgroup) => scope.resolve(cgroup),
    }
}

/// Events, for the account of attribution.
fn units(slots: &[u64; SLOTS]) -> u64 {
    let events = slots[slot::CREATED..slot::LIVED].iter();
    let resolved = |base: usize| {
        (0..RESULTS.len()).flat_map(move |result| {
            let base = base + result * LATENCY.slots();
            base..=base + LATENCY.bounds
        })
    };
    let resolved = resolved(slot::ADDRESS)
        .chain(resolved(slot::ROUTE))
        .map(|slot| slots[slot]);
    let regions = &slots[slot::REGIONS..slot::BYTES];
    events.sum::<u64>() + resolved.sum::<u64>() + regions.iter().sum::<u64>()
}

impl Signal for Rdma {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.enumeration.ask();
        let reports = self.enumeration.reports(scope.now);
        self.troubles = self.enumeration.troubles(scope.now);
        let listed = reports.iter().map(|report| report.device.clone()).collect();
        self.count_pairs(reports, scope);

        let core = Arc::clone(&self.core);
        let Some(mut core) = try_lock(&core) else {
            return Ok(Read::Before);
        };
        for farewell in std::mem::take(&mut core.farewells) {
            self.book_devices(farewell.devices, scope.now);
            self.seen.clear();
            self.booked.clear();
            scope.book_totals(&mut self.ledger, farewell.usage);
            self.ledger.restart();
        }
        let due = self
            .swept
            .is_none_or(|at| scope.now.saturating_duration_since(at) >= SWEEP_EVERY);
        let core = &mut *core;
        let swept = match &mut core.live {
            None => {
                scope.book_totals(&mut self.ledger, []);
                0
            }
            Some(live) => {
                let devices = core.owners.devices()?;
                self.book_devices(devices, scope.now);
                self.forget_devices(&core.owners, &listed);
                scope.book(&mut self.ledger, &mut live.usage, |usage| usage.slots)?;
                if due {
                    self.swept = Some(scope.now);
                    live.sweep()
                } else {
                    0
                }
            }
        };
        core.swept += swept;
        self.last = core.tell()?;
        Ok(Read::Now)
    }

    fn render(&self, families: &mut Families) {
        if self.last.status.state == State::Absent && self.devices.is_empty() {
            return;
        }
        render(
            self.ledger.accounts(),
            |owner| self.ledger.is_new(owner),
            families,
        );
        render_devices(&self.devices, families);
        let rows = self
            .rows
            .iter()
            .map(|((labels, device, kind, state), pairs)| {
                (labels, &**device, *kind, *state, *pairs)
            });
        render_gauge(rows, &self.ages, families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.last.health.clone())
    }

    fn status(&self) -> Option<Status> {
        Some(self.status_now())
    }
}

/// Renders accounts by slot. Events, histograms and registrations appear with their first: most owners of queue pairs
/// never have most of them. What a new account has is shown, at 0: an account is opened by its first event, and Prometheus' rate() counts
/// from the first value that it saw.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    is_new: impl Fn(&Labels) -> bool,
    families: &mut Families,
) {
    for (owner, counted) in accounts {
        let slots = if is_new(&owner) { &[0; SLOTS] } else { counted };
        let pod = [&*owner.namespace, &*owner.pod, &*owner.container];
        let with = |label: &'static str| [pod[0], pod[1], pod[2], label];
        families.add(&CREATED, &pod, slots[slot::CREATED] as f64);
        families.add(&DESTROYED, &pod, slots[slot::DESTROYED] as f64);
        for (state, count) in STATES.iter().zip(&slots[slot::TRANSITIONS..]) {
            families.add(&TRANSITIONS, &with(state), *count as f64);
        }
        for (i, (_, event)) in EVENTS.iter().enumerate() {
            let at = slot::ASYNC + i;
            if counted[at] > 0 {
                families.add(&ASYNC_EVENTS, &with(event), slots[at] as f64);
            }
        }
        let mut histogram = |desc, labels: &[&str], shape: Shape, base: usize| {
            let range = base..base + shape.slots();
            if counted[range.clone()].iter().any(|count| *count > 0) {
                families.add_histogram(desc, labels, shape, &slots[range]);
            }
        };
        histogram(&LIFETIMES, &pod, LIFETIME, slot::LIVED);
        histogram(&CONNECTS, &pod, LATENCY, slot::CONNECTED);
        for (desc, base) in [(&ADDRESSES, slot::ADDRESS), (&ROUTES, slot::ROUTE)] {
            for (i, result) in RESULTS.iter().enumerate() {
                histogram(desc, &with(result), LATENCY, base + i * LATENCY.slots());
            }
        }
        for (i, kind) in MEMORY.iter().enumerate() {
            let (regions, bytes) = (slots[slot::REGIONS + i], slots[slot::BYTES + i]);
            if counted[slot::REGIONS + i] > 0 {
                families.add(&REGIONS, &with(kind), regions as f64);
                families.add(&BYTES, &with(kind), bytes as f64);
            }
        }
    }
}

/// Renders created and destroyed, by device.
pub fn render_devices(devices: &BTreeMap<String, [u64; 2]>, families: &mut Families) {
    for (device, [created, destroyed]) in devices {
        families.add(&DEVICE_CREATED, &[device], *created as f64);
        families.add(&DEVICE_DESTROYED, &[device], *destroyed as f64);
    }
}

/// Renders the queue pairs by owner, device, type and state, and the age of each device's.
pub fn render_gauge<'a>(
    rows: impl IntoIterator<Item = (&'a Labels, &'a str, &'static str, &'static str, u64)>,
    ages: &[(String, f64)],
    families: &mut Families,
) {
    for (owner, device, kind, state, pairs) in rows {
        let labels = [
            &*owner.namespace,
            &*owner.pod,
            &*owner.container,
            device,
            kind,
            state,
        ];
        families.add(&PAIRS, &labels, pairs as f64);
    }
    for (device, age) in ages {
        families.add(&AGE, &[device], *age);
    }
}
