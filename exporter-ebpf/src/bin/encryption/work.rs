// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How many packets does a flow have encrypted and decrypted, and how long does that take?
//!
//! Every packet is counted; one in `SAMPLE` on each CPU is timed from entry to return.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{HashMap, PerCpuArray, PerCpuHashMap},
};
use exporter_common::encryption::{
    Flow, MAX_FLOWS, MAX_KNOWN, MAX_SENDERS, MAX_STRANGERS, NO_POD, Work,
};
use exporter_ebpf::{ABSENT, Loss, NO_CGROUP, add, constants, now, run_delay, value};

constants!(OFF_RUN_DELAY, SAMPLE);

/// By owner, protocol and direction.
#[map]
static FLOWS: PerCpuHashMap<Flow, Work> = PerCpuHashMap::with_max_entries(MAX_FLOWS, 0);

/// The same of addresses that are not in `KNOWN`, and of cgroups that are not in `SENDERS` and send with a pod's address.
#[map]
static STRANGERS: PerCpuHashMap<Flow, Work> = PerCpuHashMap::with_max_entries(MAX_STRANGERS, 0);

/// The addresses of pods and of the node, which user space tells: the number of the pod, or [`NO_POD`].
#[map]
static KNOWN: HashMap<[u8; 16], u32> = HashMap::with_max_entries(MAX_KNOWN, 0);

/// By cgroup id, the number of the pod whose network it is in, or [`NO_POD`]. User space tells.
#[map]
static SENDERS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_SENDERS, 0);

/// Packets that this CPU has seen, to choose those that are timed.
#[map]
static SEEN: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

const NO_WORK: Work = Work {
    packets: 0,
    bytes: 0,
    timed_bytes: 0,
    timed_nanoseconds: 0,
};

/// CLOCK_MONOTONIC in nanoseconds, less what this thread has waited for a CPU since it began: between two readings in a
/// thread lies what it ran, and interrupts. Kernels that preempt in the kernel (6.18 does, lazily) take the CPU from WireGuard's
/// workers in the middle of a packet. No thread switch is within a softirq.
#[inline(always)]
pub(crate) fn run_clock() -> u64 {
    let now = now();
    if OFF_RUN_DELAY.load() == ABSENT {
        return now;
    }
    now.wrapping_sub(run_delay(&OFF_RUN_DELAY).unwrap_or(0))
}

/// Makes a cgroup the sender of a flow. A packet with a pod's own address is that pod's, whoever's socket sent it (a proxy's, a debug
/// shell's), unless the sender is another pod, which makes up its source. Else the sender tells whose it is.
#[inline(always)]
pub(crate) fn send(flow: &mut Flow, cgroup: u64) {
    let pod = value(&KNOWN, &flow.address).unwrap_or(NO_POD);
    if pod != NO_POD {
        match value(&SENDERS, &cgroup) {
            Some(sender) if sender == NO_POD || sender == pod => return,
            Some(_) => {}
            // A new cgroup: user space will know.
            None => {
                flow.cgroup = cgroup;
                return;
            }
        }
    }
    flow.cgroup = cgroup;
    flow.address = [0; 16];
}

/// Where the packets of a flow are counted: where there is no room for it, among those that are nobody's.
#[inline(always)]
fn work(flow: &Flow) -> Result<*mut Work, Loss> {
    if let Some(work) = FLOWS.get_ptr_mut(flow) {
        return Ok(work);
    }
    let is_known = match flow.cgroup {
        NO_CGROUP => KNOWN.get_ptr(&flow.address).is_some(),
        _ => flow.address == [0; 16],
    };
    let own = if is_known {
        entry_of(&FLOWS, flow)
    } else {
        STRANGERS
            .get_ptr_mut(flow)
            .or_else(|| entry_of(&STRANGERS, flow))
    };
    or_nobodys(own, flow)
}

/// Where there is nothing of a flow: what is nobody's.
#[inline(always)]
fn or_nobodys(own: Option<*mut Work>, flow: &Flow) -> Result<*mut Work, Loss> {
    let nobodys = Flow::nobodys(flow.protocol, flow.direction);
    own.or_else(|| FLOWS.get_ptr_mut(&nobodys))
        .ok_or(Loss::MapFull)
}

#[inline(always)]
fn entry_of(map: &PerCpuHashMap<Flow, Work>, flow: &Flow) -> Option<*mut Work> {
    let _ = map.insert(flow, &NO_WORK, u64::from(BPF_NOEXIST));
    map.get_ptr_mut(flow)
}

/// Counts a packet. A softirq may interrupt this program on its CPU, so the additions are atomic.
#[inline(always)]
pub(crate) fn count(flow: &Flow, bytes: u64) -> Result<(), Loss> {
    let work = work(flow)?;
    // SAFETY: a map value.
    unsafe {
        add(&raw mut (*work).packets, 1);
        add(&raw mut (*work).bytes, bytes);
    }
    Ok(())
}

/// What took longer than this was no work on a packet: the return of an earlier call in the same frame was not seen, or
/// interrupts came without end.
const LONGEST: u64 = 100_000_000;

/// Books the time that a packet took.
#[inline(always)]
pub(crate) fn time(flow: &Flow, bytes: u64, began: u64, end: u64) -> Result<(), Loss> {
    let nanoseconds = end.wrapping_sub(began);
    if nanoseconds > LONGEST {
        return Err(Loss::Untimed);
    }
    // Where its packet was counted, or as nobody's.
    let own = FLOWS
        .get_ptr_mut(flow)
        .or_else(|| STRANGERS.get_ptr_mut(flow));
    let work = or_nobodys(own, flow)?;
    // SAFETY: a map value.
    unsafe {
        add(&raw mut (*work).timed_bytes, bytes);
        add(&raw mut (*work).timed_nanoseconds, nanoseconds);
    }
    Ok(())
}

/// Says if this packet is one that is timed.
#[inline(always)]
pub(crate) fn chosen() -> bool {
    let Some(seen) = SEEN.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a map value of this CPU; a softirq in between chooses a packet more or less.
    let number = unsafe {
        *seen += 1;
        *seen
    };
    let sample = u64::from(SAMPLE.load());
    sample != 0 && number % sample == 0
}
