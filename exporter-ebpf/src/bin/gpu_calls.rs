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
    macros::{map, uprobe, uretprobe},
    maps::{HashMap, ProgramArray},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::gpu::{
    CUDA_CALL, CUDA_CALL_SLOTS, CUDA_CALLS, CudaBegun, CudaCall, CudaCalls, CudaFrame,
    MAX_CUDA_IN_PROGRESS, MAX_CUDA_OWNERS,
};
use exporter_ebpf::{
    ABSENT, Counters, Loss, Registers, cgroup, constants, enter_timed, entry, keep_own_stack,
    leave, lose, now, object, run_delay, thread,
};

object!();

constants!(OFF_RUN_DELAY);

/// Empty: see [`keep_own_stack`].
#[map]
static NOWHERE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// By cgroup id.
#[map]
static CALLS: HashMap<u64, CudaCalls> = HashMap::with_max_entries(MAX_CUDA_OWNERS, 0);

/// Calls between entry and return. User space empties it when the probes are gone.
#[map]
static IN_PROGRESS: HashMap<CudaFrame, CudaBegun> =
    HashMap::with_max_entries(MAX_CUDA_IN_PROGRESS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_CALLS: CudaCalls = CudaCalls {
    slots: [0; CUDA_CALLS.len() * CUDA_CALL_SLOTS],
};

#[inline(always)]
fn begin(ctx: &ProbeContext, call: CudaCall) -> Result<(), Loss> {
    let frame = CudaFrame {
        thread: thread(),
        address: Registers::of(ctx).frame(),
    };
    let mut begun = CudaBegun {
        at: 0,
        run_delay: 0,
        call: call as u64,
    };
    if OFF_RUN_DELAY.load() != ABSENT {
        begun.run_delay = run_delay(&OFF_RUN_DELAY)?;
    }
    if let Some(begun) = enter_timed(&IN_PROGRESS, &frame, &begun, &LOST) {
        // SAFETY: a map value that is this thread's.
        unsafe { (*begun).at = now() };
    }
    Ok(())
}

macro_rules! entries {
    ($($name:ident: $call:ident),* $(,)?) => { $(
        #[uprobe]
        pub fn $name(ctx: ProbeContext) -> u32 {
            keep_own_stack(&ctx, &NOWHERE);
            if let Err(loss) = begin(&ctx, CudaCall::$call) {
                lose(&LOST, loss);
            }
            0
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
        thread: thread(),
        address: Registers::of(&ctx).returned_frame(),
    };
    if let Some(begun) = leave(&IN_PROGRESS, &frame)
        && let Err(loss) = count(&begun, end)
    {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn count(begun: &CudaBegun, end: u64) -> Result<(), Loss> {
    let calls = entry(&CALLS, &cgroup(), &NO_CALLS)?;
    // SAFETY: a map value.
    let counters = unsafe { Counters::at(&raw mut (*calls).slots) };
    let first = begun.call * CUDA_CALL_SLOTS as u64;
    counters.observe(first, CUDA_CALL, end.wrapping_sub(begun.at));
    if OFF_RUN_DELAY.load() != ABSENT {
        let preempted = run_delay(&OFF_RUN_DELAY)?.wrapping_sub(begun.run_delay);
        counters.observe(first + CUDA_CALL.slots() as u64, CUDA_CALL, preempted);
    }
    Ok(())
}
