// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How long does the host take to enqueue an operation?

use aya_ebpf::{
    macros::{map, uprobe, uretprobe},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::nccl::{
    Begun, CALL, COLLECTIVES, Frame, MAX_IN_PROGRESS, OUTERMOST, Operation, Share, call_slots,
};
use exporter_ebpf::{
    Loss, Registers, cgroup, enter, keep_own_stack, leave, lose, now, read_user, thread, value,
};

use crate::{
    LOST, NOWHERE,
    arrivals::collective,
    count, or_lose,
    shares::{give, take},
};

/// Calls between entry and return.
#[map]
pub(crate) static IN_PROGRESS: HashMap<Frame, Begun> =
    HashMap::with_max_entries(MAX_IN_PROGRESS, 0);

/// Notes that a call has begun. False if there is no room. `inner` is 1 for a function whose frame is that of another.
#[inline(always)]
pub(crate) fn begin(registers: Registers, inner: u64, begun: Begun) -> bool {
    let frame = frame(registers.frame() + inner);
    if !note(&frame, begun) {
        return false;
    }
    // The clock is read last: what is done here is not the call's.
    if let Some(begun) = IN_PROGRESS.get_ptr_mut(&frame) {
        // SAFETY: a map value that is this thread's.
        unsafe { (*begun).at = now() };
    }
    true
}

/// Notes what has begun, as a part of the share of its cgroup. False if there is no room.
#[inline(always)]
pub(crate) fn note(frame: &Frame, begun: Begun) -> bool {
    let cgroup = cgroup();
    let is_new = IN_PROGRESS.get_ptr(frame).is_none();
    if is_new && let Err(loss) = take(cgroup, Share::Calls) {
        lose(&LOST, loss);
        return false;
    }
    let entered = enter(&IN_PROGRESS, frame, &Begun { cgroup, ..begun }, &LOST);
    if is_new && !entered {
        give(cgroup, Share::Calls);
    }
    entered
}

/// Returns what was noted of a call that returns.
#[inline(always)]
pub(crate) fn end(registers: Registers, inner: u64) -> Option<Begun> {
    end_of(&frame(registers.returned_frame() + inner))
}

/// Returns what was noted.
#[inline(always)]
pub(crate) fn end_of(frame: &Frame) -> Option<Begun> {
    let begun = leave(&IN_PROGRESS, frame)?;
    give(begun.cgroup, Share::Calls);
    Some(begun)
}

/// What names a call of the thread that runs.
#[inline(always)]
pub(crate) fn frame(address: u64) -> Frame {
    Frame {
        thread: thread(),
        address,
    }
}

/// A call of which only matters what it does.
pub(crate) const fn call(what: u64) -> Begun {
    Begun {
        at: 0,
        what,
        told_at: 0,
        group: 0,
        rank: 0,
        ranks: 0,
        cgroup: 0,
    }
}

/// How long, in nanoseconds, a thread is taken to be in an operation whose return is not seen.
const PATIENCE: u64 = 10_000_000_000;

/// Whether an exported operation is called by another one, and not by the program: RCCL makes an all-to-all of sends, and calls itself
/// once more for what MSCCL has no algorithm for (`mscclFallBackSavedParams`).
#[inline(always)]
fn is_inner(registers: Registers, at: u64) -> bool {
    value(&IN_PROGRESS, &frame(OUTERMOST)).is_some_and(|outer| {
        registers.frame() < outer.told_at && at.wrapping_sub(outer.at) < PATIENCE
    })
}

/// Notes that an exported operation has begun, as the outermost of its thread. Where there is no room for it what it calls counts.
#[inline(always)]
fn begin_outermost(registers: Registers, at: u64, what: Operation) {
    let outermost = frame(OUTERMOST);
    let begun = Begun {
        at,
        told_at: registers.frame(),
        ..call(what as u64)
    };
    note(&outermost, begun);
    if !begin(registers, 0, begun) {
        let _ = end_of(&outermost);
    }
}

macro_rules! collectives {
    ($($name:ident: $operation:ident, $communicator:ident;)*) => { $(
        #[uprobe]
        pub fn $name(ctx: ProbeContext) -> u32 {
            keep_own_stack(&ctx, &NOWHERE);
            let at = now();
            let registers = Registers::of(&ctx);
            if is_inner(registers, at) {
                return 0;
            }
            or_lose!($communicator(registers).and_then(|address| collective(Operation::$operation as u64, address, at)));
            begin_outermost(registers, at, Operation::$operation);
            0
        }
    )* };
}

#[inline(always)]
fn fifth(registers: Registers) -> Result<u64, Loss> {
    Ok(registers.argument::<4>())
}

#[inline(always)]
fn sixth(registers: Registers) -> Result<u64, Loss> {
    Ok(registers.argument::<5>())
}

#[inline(always)]
fn seventh(registers: Registers) -> Result<u64, Loss> {
    registers.seventh_argument()
}

#[inline(always)]
fn eighth(registers: Registers) -> Result<u64, Loss> {
    registers.eighth_argument()
}

// Where the communicator stands among the arguments (nccl.h; of ncclAllToAllv RCCL's).
collectives! {
    nccl_broadcast: Broadcast, sixth;
    nccl_reduce: Reduce, seventh;
    nccl_all_gather: AllGather, fifth;
    nccl_reduce_scatter: ReduceScatter, sixth;
    nccl_all_reduce: AllReduce, sixth;
    nccl_all_to_all: AllToAll, fifth;
    nccl_all_to_all_v: AllToAll, eighth;
    nccl_gather: Gather, sixth;
    nccl_scatter: Scatter, sixth;
}

/// Operations between two ranks: nobody arrives.
macro_rules! of_two {
    ($($name:ident: $operation:ident;)*) => { $(
        #[uprobe]
        pub fn $name(ctx: ProbeContext) -> u32 {
            keep_own_stack(&ctx, &NOWHERE);
            let at = now();
            let registers = Registers::of(&ctx);
            if !is_inner(registers, at) {
                begin_outermost(registers, at, Operation::$operation);
            }
            0
        }
    )* };
}

of_two! {
    nccl_send: Send;
    nccl_recv: Recv;
    nccl_put_signal: PutSignal;
    nccl_signal: Signal;
    nccl_wait_signal: WaitSignal;
}

/// Where `struct ncclInfo` has its operation and its communicator (info.h, alike from 2.18 on; later ones have more at the end).
const INFO_OPERATION: u64 = 0;
const INFO_COMMUNICATOR: u64 = 56;

/// An operation by its number in NCCL (`ncclFunc_t` of nccl_common.h: new ones come at the end). `None`: it is not followed.
#[inline(always)]
fn operation(number: u32) -> Option<u64> {
    let operation = match number {
        0 => Operation::Broadcast,
        1 => Operation::Reduce,
        2 => Operation::AllGather,
        3 => Operation::ReduceScatter,
        4 => Operation::AllReduce,
        6 => Operation::Send,
        7 => Operation::Recv,
        8 => Operation::AllToAll,
        9 => Operation::Scatter,
        10 => Operation::Gather,
        // 11 is NCCL's own (ncclFuncAllGatherV), and none that is called.
        12 => Operation::PutSignal,
        13 => Operation::Signal,
        14 => Operation::WaitSignal,
        _ => return None,
    };
    Some(operation as u64)
}

#[inline(always)]
fn enqueue(registers: Registers, at: u64) -> Result<(), Loss> {
    let info = registers.argument::<0>();
    let Some(what) = operation(read_user(info + INFO_OPERATION)?) else {
        // Its return is not that of an earlier call, whose own was not seen.
        let _ = end_of(&frame(registers.frame()));
        return Ok(());
    };
    let arrived = if what < COLLECTIVES as u64 {
        read_user(info + INFO_COMMUNICATOR).and_then(|address| collective(what, address, at))
    } else {
        Ok(())
    };
    begin(registers, 0, call(what));
    arrived
}

/// `ncclEnqueueCheck(struct ncclInfo *)`, through which every exported operation goes.
#[uprobe]
pub fn nccl_enqueue(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    or_lose!(enqueue(Registers::of(&ctx), at));
    0
}

#[uretprobe]
pub fn nccl_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    let Some(begun) = end(Registers::of(&ctx), 0) else {
        return 0;
    };
    if begun.told_at != 0 {
        let _ = end_of(&frame(OUTERMOST));
    }
    let took = at.wrapping_sub(begun.at);
    or_lose!(count(cgroup(), call_slots(0), begun.what, CALL, took));
    0
}
