// SPDX-License-Identifier: Apache-2.0
//! What does `nccl` show, besides what is pending?

use exporter_common::nccl::{
    CALL, COLLECTIVES, GRAPH_SLOT, INIT, NUMBERED, OPERATIONS, PHASES, SLOTS, SOURCES, Source,
    WAIT, call_slots, duration_slots, init_slots, wait_slots,
};

use super::{
    pending::{self, Pending},
    ranks::Ranks,
};
use crate::{
    families::{Desc, Families, Kind},
    pods::Labels,
};

pub(super) const DESCS: &[&Desc] = &[
    &INIT_SECONDS,
    &ENQUEUE,
    &ARRIVAL_WAIT,
    &RANK_WAIT,
    &RANK_COLLECTIVES,
    &RANK_LAST,
    &RANK_DURATION,
    &COLLECTIVE,
    &pending::PENDING,
    &pending::OF_COMMUNICATOR,
    &pending::MISSING,
    &GRAPHS,
];

static INIT_SECONDS: Desc = Desc {
    name: "chandra_nccl_init_seconds",
    kind: Kind::Histogram,
    help: "Seconds that communicators took to initialise, by phase.",
    per_pod: true,
    labels: &["phase"],
    values: &[("phase", &PHASES)],
    source: "uprobes on ncclCommInitRankFunc (total), commAlloc, bootstrapInit and bootstrapSplit (rendezvous), initTransportsRank, each phase \
             until the next begins; of a library without symbols only the total, of the exported functions, which return too early in a group \
             and where they do not block",
};

static ENQUEUE: Desc = Desc {
    name: "chandra_nccl_enqueue_seconds",
    kind: Kind::Histogram,
    help: "Seconds that calls of NCCL took on the host, which is not how long the collective took.",
    per_pod: true,
    labels: &["operation"],
    values: &[("operation", &OPERATIONS)],
    source: "uprobes on ncclEnqueueCheck, entry to return; of a library without symbols, and of RCCL, on the exported functions; not \
             what a CUDA graph replays",
};

static ARRIVAL_WAIT: Desc = Desc {
    name: "chandra_nccl_arrival_wait_seconds",
    kind: Kind::Histogram,
    help: "Seconds that ranks waited for the last one of this node to arrive at a collective.",
    per_pod: true,
    labels: &["operation", "source"],
    values: &[("operation", &OPERATIONS), ("source", &SOURCES)],
    source: "host: from a rank's call to the last rank's call; kernel: from the profiler plugin, how much longer the collective took the rank \
             than the one that it took the shortest (all_gather, reduce_scatter, all_reduce)",
};

pub(crate) static RANK_WAIT: Desc = Desc {
    name: "chandra_nccl_rank_wait_seconds_total",
    kind: Kind::Counter,
    help: "Seconds that a rank waited for the last one of this node.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the histogram of waits; communicator is NCCL's commHash, with --nccl.salt-file a keyed hash of it, the same on all nodes; the 32 \
             communicators of a container with most wait, 64 ranks of each, at most 512 ranks of a container and 2048 of a node, the rest is other",
};

pub(crate) static RANK_COLLECTIVES: Desc = Desc {
    name: "chandra_nccl_rank_collectives_total",
    kind: Kind::Counter,
    help: "Collectives at which all ranks of this node arrived.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the waits of ranks",
};

pub(crate) static RANK_LAST: Desc = Desc {
    name: "chandra_nccl_rank_last_arrivals_total",
    kind: Kind::Counter,
    help: "Those of them at which the rank was the last of this node.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the waits of ranks",
};

static RANK_DURATION: Desc = Desc {
    name: "chandra_nccl_rank_collective_seconds_total",
    kind: Kind::Counter,
    help: "Seconds that the collectives took on the rank's GPU: of several ranks the one with least came last, whatever node it is on.",
    per_pod: true,
    labels: &["communicator", "rank"],
    values: &[],
    source: "profiler plugin: all_gather, reduce_scatter, all_reduce",
};

static COLLECTIVE: Desc = Desc {
    name: "chandra_nccl_collective_seconds",
    kind: Kind::Histogram,
    help: "Seconds that collectives took on the GPU, the wait for the last rank included.",
    per_pod: true,
    labels: &["operation", "source"],
    values: &[("operation", &OPERATIONS), ("source", &["kernel"])],
    source: "profiler plugin: from the first channel's start to the last one's stop, by the GPU's clock",
};

static GRAPHS: Desc = Desc {
    name: "chandra_nccl_graph_launches_total",
    kind: Kind::Counter,
    help: "Launches of CUDA graphs by processes with NCCL: the collectives in them are not seen.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "uprobe on cuGraphLaunch",
};

/// How many calls, durations and initialisations there were.
pub(super) fn units(slots: &[u64; SLOTS]) -> u64 {
    let calls = (0..OPERATIONS.len()).map(|i| (call_slots(i), CALL));
    let durations = (0..COLLECTIVES).map(|i| (duration_slots(i), WAIT));
    let inits = (0..PHASES.len()).map(|i| (init_slots(i), INIT));
    let all = calls.chain(durations).chain(inits);
    all.flat_map(|(first, shape)| &slots[first..first + shape.sum()])
        .sum()
}

/// Renders accounts by slot, ranks, and ages of what is pending. Each appears with its first.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    ranks: &Ranks,
    pending: &Pending,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        let owner = [&*owner.namespace, &*owner.pod, &*owner.container];
        let mut histogram =
            |desc, labels: &[&str], first: usize, shape: exporter_common::histogram::Shape| {
                let slots = &slots[first..first + shape.slots()];
                if slots[..shape.sum()].iter().any(|count| *count > 0) {
                    families.add_histogram(desc, &[&owner[..], labels].concat(), shape, slots);
                }
            };
        for (index, phase) in PHASES.iter().enumerate() {
            histogram(&INIT_SECONDS, &[phase], init_slots(index), INIT);
        }
        for (index, operation) in OPERATIONS.iter().enumerate() {
            histogram(&ENQUEUE, &[operation], call_slots(index), CALL);
        }
        let [host, kernel] = SOURCES;
        for (index, operation) in OPERATIONS[..COLLECTIVES].iter().enumerate() {
            histogram(
                &COLLECTIVE,
                &[operation, kernel],
                duration_slots(index),
                WAIT,
            );
            let place = wait_slots(Source::Host as usize, index);
            histogram(&ARRIVAL_WAIT, &[operation, host], place, WAIT);
        }
        for (index, operation) in OPERATIONS[..NUMBERED].iter().enumerate() {
            let place = wait_slots(Source::Kernel as usize, index);
            histogram(&ARRIVAL_WAIT, &[operation, kernel], place, WAIT);
        }
        if slots[GRAPH_SLOT] > 0 {
            families.add(&GRAPHS, &owner, slots[GRAPH_SLOT] as f64);
        }
    }
    ranks.each(|owner, communicator, rank, source, counts| {
        let labels = [
            &*owner.namespace,
            &*owner.pod,
            &*owner.container,
            communicator,
            rank,
            source,
        ];
        let [wait, collectives, last, duration] = *counts;
        families.add(&RANK_WAIT, &labels, wait as f64 / 1e9);
        families.add(&RANK_COLLECTIVES, &labels, collectives as f64);
        families.add(&RANK_LAST, &labels, last as f64);
        if source == SOURCES[Source::Kernel as usize] {
            families.add(&RANK_DURATION, &labels[..5], duration as f64 / 1e9);
        }
    });
    pending.render(families);
}
