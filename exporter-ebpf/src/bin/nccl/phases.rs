// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which phase of an initialisation takes how long?
//!
//! One thread goes through all of them, one after the other: each ends where the next begins, so that only the last one needs its
//! return.

use aya_ebpf::{
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::nccl::{Begun, Frame, INIT, Phase, init_slots};
use exporter_ebpf::{Registers, cgroup, keep_own_stack, lose, now, value};

use crate::{
    LOST, NOWHERE, SUCCESS,
    calls::{IN_PROGRESS, begin, call, end, end_of, frame, note},
    count, or_lose,
};

/// The address of the frame of a thread's present phase: no real frame has it.
const PRESENT: u64 = 2;

#[inline(always)]
fn present() -> Frame {
    frame(PRESENT)
}

#[inline(always)]
pub(crate) fn count_phase(phase: u64, took: u64) {
    or_lose!(count(cgroup(), init_slots(0), phase, INIT, took));
}

/// Ends the present phase, which has done what it should.
#[inline(always)]
fn end_phase() {
    let at = now();
    if let Some(begun) = end_of(&present()) {
        count_phase(begun.what, at.wrapping_sub(begun.at));
    }
}

#[inline(always)]
fn begin_phase(phase: Phase) {
    let begun = Begun {
        at: now(),
        ..call(phase as u64)
    };
    // A phase that has failed has no end: the next initialisation begins another.
    let _ = end_of(&present());
    note(&present(), begun);
}

/// commAlloc, the first.
#[uprobe]
pub fn nccl_allocate(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin_phase(Phase::Allocate);
    0
}

/// bootstrapInit, bootstrapSplit. Before 2.18 they are a part of initTransportsRank, and counted with it.
#[uprobe]
pub fn nccl_rendezvous(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let phase = value(&IN_PROGRESS, &present());
    if phase.is_some_and(|begun| begun.what == Phase::Transports as u64) {
        return 0;
    }
    end_phase();
    begin_phase(Phase::Rendezvous);
    0
}

/// initTransportsRank, the last.
#[uprobe]
pub fn nccl_transports(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    end_phase();
    begin_phase(Phase::Transports);
    0
}

#[uretprobe]
pub fn nccl_transports_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    // What has failed took another time.
    if Registers::of(&ctx).returned() as u32 as u64 == SUCCESS {
        end_phase();
    }
    0
}

/// ncclCommInitRankFunc.
#[uprobe]
pub fn nccl_total(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin(Registers::of(&ctx), 1, call(Phase::Total as u64));
    0
}

#[uretprobe]
pub fn nccl_total_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    // One that has failed.
    let _ = end_of(&present());
    let registers = Registers::of(&ctx);
    let Some(begun) = end(registers, 1) else {
        return 0;
    };
    // What has failed, or goes on without its caller, took another time.
    if registers.returned() as u32 as u64 == SUCCESS {
        count_phase(begun.what, at.wrapping_sub(begun.at));
    }
    0
}
