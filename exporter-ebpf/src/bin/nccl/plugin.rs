// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! When do collectives start and end on the GPU? The profiler plugin tells.

use core::ptr::addr_of_mut;

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::{map, uprobe},
    maps::HashMap,
    programs::ProbeContext,
};
use exporter_common::{
    nccl::{
        COLLECTIVES, Handle, LEARNT, MAX_STARTED, Operation, Pair, Seat, Share, Since, Source,
        Started, TOGETHER, WAIT, duration_slots,
    },
    nccl_profiler::{FINE, OVERWRITTEN, Told},
};
use exporter_ebpf::{
    Loss, Registers, add, cgroup, keep_own_stack, lose, now, read_user, unknown, value,
};

use crate::{
    LOST, NOWHERE,
    arrivals::arrive,
    count,
    late::join_late,
    or_lose,
    seats::{
        ANY_SEAT, COMMUNICATORS, GROUPS, SEATS, expect, group, leave, members, mix, process, sit,
    },
    shares::{give, insert_shared},
};

#[map]
static STARTED: HashMap<Started, Since> = HashMap::with_max_entries(MAX_STARTED, 0);

/// What one is called that the plugin names by NCCL's number and its rank.
#[inline(always)]
fn plugin_handle(told: &Told) -> Handle {
    Handle {
        process: process() | (Source::Kernel as u64) << 32,
        address: mix(told.communicator, u64::from(told.rank)),
    }
}

#[inline(always)]
fn told(ctx: &ProbeContext) -> Result<Told, Loss> {
    read_user(Registers::of(ctx).argument::<0>())
}

/// Groups of the plugin and of the host are different ones.
#[inline(always)]
fn plugin_group(told: &Told) -> u64 {
    mix(told.communicator, !0)
}

#[inline(always)]
fn opened(told: &Told) -> Result<(), Loss> {
    let key = plugin_group(told);
    let group = group(key, u64::from(told.ranks), told.communicator, 0)?;
    sit::<ANY_SEAT>(key, plugin_handle(told), u64::from(told.rank), LEARNT)?;
    expect(group);
    Ok(())
}

#[uprobe]
pub fn plugin_opened(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| opened(&told)));
    0
}

#[uprobe]
pub fn plugin_closed(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    match told(&ctx) {
        Ok(told) => leave(&plugin_handle(&told)),
        Err(loss) => lose(&LOST, loss),
    }
    0
}

#[inline(always)]
fn started_key(told: &Told) -> Started {
    Started {
        handle: plugin_handle(told),
        rank: u64::from(told.rank) | u64::from(told.operation) << 32,
        sequence: told.sequence,
    }
}

#[inline(always)]
fn started(told: &Told) -> Result<(), Loss> {
    let name = plugin_handle(told);
    if COMMUNICATORS.get_ptr(&name).is_none() {
        // The plugin was there before its probes.
        join_late(
            plugin_group(told),
            told.communicator,
            name,
            u64::from(told.rank),
            u64::from(told.ranks),
        )?;
    }
    let since = Since {
        at: now(),
        cgroup: cgroup(),
    };
    let key = started_key(told);
    if !insert_shared(&STARTED, &key, &since, since.cgroup, Share::Started)? {
        STARTED
            .insert(&key, &since, u64::from(BPF_ANY))
            .map_err(|_| Loss::MapFull)?;
    }
    Ok(())
}

#[uprobe]
pub fn plugin_started(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| started(&told)));
    0
}

/// Operations of which all ranks end together, so that the one that takes the shortest came last.
#[inline(always)]
fn ends_together(operation: u32) -> bool {
    operation == Operation::AllGather as u32
        || operation == Operation::ReduceScatter as u32
        || operation == Operation::AllReduce as u32
}

/// The plugin tells nothing that took longer, in nanoseconds: an hour. Sums of it stay within their numbers.
const LONGEST: u64 = 3_600_000_000_000;

#[inline(always)]
fn finished(told: &Told) -> Result<(), Loss> {
    let known = COMMUNICATORS.get_ptr_mut(&plugin_handle(told));
    let since = end_started(told);
    if let (Some(known), Some(since)) = (known, since)
        && told.outcome != OVERWRITTEN
    {
        // SAFETY: a map value. Of two that finish at once the later may be forgotten: it is told with the next one.
        unsafe {
            if (*known).finished < since {
                (*known).finished = since;
            }
        }
    }
    if told.outcome != FINE || told.duration > LONGEST {
        return Err(Loss::Untimed);
    }
    let operation = unknown(u64::from(told.operation));
    if operation >= COLLECTIVES as u64 {
        return Ok(());
    }
    count(cgroup(), duration_slots(0), operation, WAIT, told.duration)?;
    match known {
        // SAFETY: a map value.
        Some(known) if ends_together(told.operation) => {
            arrived(told, operation, unsafe { (*known).seat() })
        }
        _ => Ok(()),
    }
}

/// Forgets the start of a collective, and returns when it was.
#[inline(always)]
fn end_started(told: &Told) -> Option<u64> {
    let key = started_key(told);
    let since = value(&STARTED, &key)?;
    if STARTED.remove(&key).is_ok() {
        give(since.cgroup, Share::Started);
    }
    Some(since.at)
}

/// The rank on a seat arrives at a collective of which all ranks end together.
#[inline(always)]
fn arrived(told: &Told, operation: u64, seat: Seat) -> Result<(), Loss> {
    let Some(group) = GROUPS.get_ptr(&seat.group) else {
        return Ok(());
    };
    if let Some(member) = SEATS.get_ptr_mut(&seat) {
        // SAFETY: map values.
        unsafe {
            add(addr_of_mut!((*member).duration), told.duration);
            // The only one of this node: other nodes have the rest, and its own duration tells.
            if members(seat.group, group) < 2 {
                add(addr_of_mut!((*member).collectives), 1);
            }
        }
    }
    let pair = Pair {
        group: seat.group,
        operation,
        sequence: told.sequence,
    };
    let at = TOGETHER.wrapping_sub(told.duration);
    arrive(group, &pair, seat.index, at, Source::Kernel)
}

#[uprobe]
pub fn plugin_finished(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| finished(&told)));
    0
}
