// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How long do calls of the CUDA driver take, and how long of that is their thread kept from running?
//!
//! Hooks: uprobes and uretprobes on functions that libcuda exports. Map: `CALLS` feeds both histograms.
//!
//! Each call has a program for its entry, since nothing else tells from 5.10 on which function was entered (attach cookies
//! are of 5.15); the return is one program's.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_current_task, bpf_ktime_get_ns,
    },
    macros::{map, uprobe, uretprobe},
    maps::{HashMap, ProgramArray},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::gpu::{
    CUDA_CALL, CUDA_CALL_SLOTS, CUDA_CALLS, CUDA_IN_PROGRESS, CUDA_OWNERS, CudaBegun, CudaCall,
    CudaCalls, CudaFrame,
};
use exporter_ebpf::{
    ABSENT, Loss, Registers, add, constants, entry, keep_own_stack, lose, object, read, unknown,
};

object!();

constants!(OFF_RUN_DELAY);

/// Empty: see [`keep_own_stack`].
#[map]
static NOWHERE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// By cgroup id.
#[map]
static CALLS: HashMap<u64, CudaCalls> = HashMap::with_max_entries(CUDA_OWNERS, 0);

/// Calls between entry and return. User space empties it when the probes are gone.
#[map]
static IN_PROGRESS: HashMap<CudaFrame, CudaBegun> = HashMap::with_max_entries(CUDA_IN_PROGRESS, 0);

const SLOTS: usize = CUDA_CALLS.len() * CUDA_CALL_SLOTS;

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_CALLS: CudaCalls = CudaCalls { slots: [0; SLOTS] };

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// What this thread has waited for a CPU since it began, the wait before it runs now included.
#[inline(always)]
fn run_delay() -> Result<u64, Loss> {
    // SAFETY: the helper takes no arguments; the offset is that of a field of a task.
    unsafe { read(bpf_get_current_task() as *const u8, &OFF_RUN_DELAY) }
}

#[inline(always)]
fn enter(ctx: &ProbeContext, call: CudaCall) -> u32 {
    let frame = CudaFrame {
        thread: bpf_get_current_pid_tgid(),
        address: Registers::of(ctx).frame(),
    };
    let mut begun = CudaBegun {
        at: 0,
        run_delay: 0,
        call: call as u64,
    };
    if OFF_RUN_DELAY.load() != ABSENT {
        match run_delay() {
            Ok(delay) => begun.run_delay = delay,
            Err(loss) => {
                lose(&LOST, loss);
                return 0;
            }
        }
    }
    if IN_PROGRESS
        .insert(&frame, &begun, u64::from(BPF_NOEXIST))
        .is_err()
    {
        // An earlier call had this frame, and its return was not seen; or there is no room.
        if IN_PROGRESS.insert(&frame, &begun, 0).is_err() {
            lose(&LOST, Loss::MapFull);
            return 0;
        }
        lose(&LOST, Loss::MissedReturn);
    }
    // The clock is read last: what is done here is not the call's.
    if let Some(begun) = IN_PROGRESS.get_ptr_mut(&frame) {
        // SAFETY: a map value that is this thread's.
        unsafe { (*begun).at = now() };
    }
    0
}

macro_rules! entries {
    ($($name:ident: $call:ident),* $(,)?) => { $(
        #[uprobe]
        pub fn $name(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
            enter(&ctx, CudaCall::$call)
        }
    )* };
}

entries!(
    cuda_launch: Launch,
    cuda_stream_sync: StreamSynchronize,
    cuda_event_sync: EventSynchronize,
    cuda_ctx_sync: ContextSynchronize,
    cuda_memcpy: Memcpy,
    cuda_graph: GraphLaunch,
);

#[uretprobe]
pub fn cuda_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let end = now();
    let frame = CudaFrame {
        thread: bpf_get_current_pid_tgid(),
        address: Registers::of(&ctx).returned_frame(),
    };
    // One that was entered before the probes came is not known.
    let Some(begun) = IN_PROGRESS.get_ptr(&frame) else {
        return 0;
    };
    // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
    let begun = unsafe { *begun };
    let _ = IN_PROGRESS.remove(&frame);
    if let Err(loss) = count(&begun, end) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn count(begun: &CudaBegun, end: u64) -> Result<(), Loss> {
    // SAFETY: the helper takes no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let slots: *mut u64 = entry(&CALLS, &cgroup, &NO_CALLS)?.cast();
    let first = begun.call * CUDA_CALL_SLOTS as u64;
    observe(slots, first, end.wrapping_sub(begun.at));
    if OFF_RUN_DELAY.load() != ABSENT {
        let preempted = run_delay()?.wrapping_sub(begun.run_delay);
        observe(slots, first + CUDA_CALL.slots() as u64, preempted);
    }
    Ok(())
}

/// Counts a time in the histogram that begins at a slot.
#[inline(always)]
fn observe(slots: *mut u64, first: u64, nanoseconds: u64) {
    let bucket = unknown(first + CUDA_CALL.bucket(nanoseconds) as u64);
    let sum = unknown(first + CUDA_CALL.sum() as u64);
    // Each is checked just before its use: 6.12's verifier takes what it learns of one number for another that differs
    // from it by a constant, and forgets the bounds of the first.
    for (slot, number) in [(bucket, 1), (sum, nanoseconds)] {
        if slot < SLOTS as u64 {
            // SAFETY: below the end of the map value.
            unsafe { add(slots.add(slot as usize), number) };
        }
    }
}
