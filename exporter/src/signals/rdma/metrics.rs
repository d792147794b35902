// SPDX-License-Identifier: Apache-2.0
//! What does `rdma` show?

use std::collections::BTreeMap;

use exporter_common::{
    histogram::Shape,
    rdma::{EVENTS, LATENCY, LIFETIME, MEMORY, RESULTS, STATES, slot},
};

use crate::{
    families::{Desc, Families, Kind},
    pods::Labels,
};

pub(super) const DESCS: &[&Desc] = &[
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
    &PARTIAL,
];

/// How many counters an owner has.
pub const SLOTS: usize = slot::ALL;

/// Types of a queue pair by `enum ib_qp_type` (include/rdma/ib_verbs.h), as `rdma resource` spells them.
pub(super) const TYPES: [(u8, &str); 11] = [
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
pub(super) const STRANGE: &str = "UNKNOWN";

pub(crate) static PAIRS: Desc = Desc {
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

pub(crate) static CREATED: Desc = Desc {
    name: "chandra_rdma_queue_pairs_created_total",
    kind: Kind::Counter,
    help: "Queue pairs that user space created.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "kretprobe ib_core:ib_create_qp_user; before 5.15 kprobe ib_core:ib_create_qp_security within the uverbs handlers",
};

pub(crate) static DESTROYED: Desc = Desc {
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

static PARTIAL: Desc = Desc {
    name: "chandra_rdma_enumeration_partial",
    kind: Kind::Gauge,
    help: "1 if the device may have other queue pairs than are shown: its driver refuses to describe one, or the last list could not be had.",
    per_pod: false,
    labels: &["device"],
    values: &[],
    source: "an error in the kernel's list (res_get_common_dumpit of nldev.c)",
};

pub(crate) static AGE: Desc = Desc {
    name: "chandra_rdma_enumeration_age_seconds",
    kind: Kind::Gauge,
    help: "Seconds since the enumeration began that gave the device's queue pairs, or since the device was first seen.",
    per_pod: false,
    labels: &["device"],
    values: &[],
    source: "the exporter's clock; grows while the device does not answer",
};

/// Events, for the account of attribution.
pub(super) fn units(slots: &[u64; SLOTS]) -> u64 {
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
    ages: &[(String, f64, bool)],
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
    for (device, age, is_partial) in ages {
        families.add(&AGE, &[device], *age);
        families.add(&PARTIAL, &[device], f64::from(u8::from(*is_partial)));
    }
}
