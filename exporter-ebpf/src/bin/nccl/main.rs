// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which rank do the others wait for, and how long does NCCL take to initialise?
//!
//! Hooks: uprobes and uretprobes on functions that libnccl exports or has symbols of, on the profiler plugin, and on
//! libcuda's launch of graphs. Where there are symbols every call is seen at ncclEnqueueCheck, else at the exported functions.
//! Maps: `SEATS` feeds the counters of ranks, `OWNERS` the histograms, `PAIRS` and `STARTED` the age of what is pending.
#![no_std]
#![no_main]

mod arrivals;
mod calls;
mod init;
mod late;
mod phases;
mod plugin;
mod seats;
mod shares;

use aya_ebpf::{
    macros::{map, uprobe},
    maps::{HashMap, ProgramArray},
    programs::ProbeContext,
};
use exporter_common::{
    histogram::Shape,
    nccl::{GRAPH_SLOT, MAX_OWNERS, Owner, SLOTS},
};
use exporter_ebpf::{Counters, Loss, cgroup, entry, keep_own_stack, lose, object};

object!();

/// Empty: see [`keep_own_stack`].
#[map]
static NOWHERE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// By cgroup id.
#[map]
static OWNERS: HashMap<u64, Owner> = HashMap::with_max_entries(MAX_OWNERS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_OWNER: Owner = Owner { slots: [0; SLOTS] };

/// ncclSuccess of nccl.h.
const SUCCESS: u64 = 0;

/// Counts the loss of what failed.
macro_rules! or_lose {
    ($result:expr) => {
        if let Err(loss) = $result {
            lose(&LOST, loss);
        }
    };
}
pub(crate) use or_lose;

/// The counters of a cgroup.
#[inline(always)]
fn owner(cgroup: u64) -> Result<Counters<SLOTS>, Loss> {
    let owner = entry(&OWNERS, &cgroup, &NO_OWNER)?;
    // SAFETY: a map value.
    Ok(unsafe { Counters::at(&raw mut (*owner).slots) })
}

/// Counts a time of a cgroup in the `index`-th of the histograms of one shape that begin at a slot.
#[inline(always)]
fn count(cgroup: u64, first: usize, index: u64, shape: Shape, time: u64) -> Result<(), Loss> {
    let first = first as u64 + index * shape.slots() as u64;
    owner(cgroup)?.observe(first, shape, time);
    Ok(())
}

/// cuGraphLaunch: collectives of a graph are launched with it, and no call of NCCL is made.
#[uprobe]
pub fn nccl_graph(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    match owner(cgroup()) {
        Ok(counters) => counters.add(GRAPH_SLOT as u64, 1),
        Err(loss) => lose(&LOST, loss),
    }
    0
}
