// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Into which states do queue pairs go, and what do their devices report of them?

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::rdma::{Call, EVENTS, Function, LATENCY, Pair, RTS, STATES, slot};
use exporter_ebpf::{Loss, Registers, lose, now, read_kernel, value};

use crate::{
    LOST, enter, is_success, leave,
    pair::{PAIRS, old},
    usage,
};

/// `IB_QP_STATE` of `enum ib_qp_attr_mask`.
const IB_QP_STATE: u64 = 1;

/// `struct ib_event { struct ib_device *device; union { struct ib_qp *qp; … } element; enum ib_event_type event; }`:
/// unchanged since 2.6.11.
const EVENT_ELEMENT: u64 = 8;
const EVENT_CODE: u64 = 16;

/// `ib_modify_qp_with_udata(struct ib_qp *, struct ib_qp_attr *, int attr_mask, …)` of ib_core: user space modifies.
#[kprobe]
pub fn modify_user(ctx: ProbeContext) -> u32 {
    modify(Registers::of(&ctx), true);
    0
}

/// `ib_modify_qp(struct ib_qp *, struct ib_qp_attr *, int attr_mask)` of ib_core: the kernel modifies, perhaps a queue
/// pair of user space (iw_cm).
#[kprobe]
pub fn modify_kernel(ctx: ProbeContext) -> u32 {
    modify(Registers::of(&ctx), false);
    0
}

#[inline(always)]
fn modify(registers: Registers, by_user: bool) {
    if registers.argument::<2>() & IB_QP_STATE == 0 {
        return;
    }
    let address = registers.argument::<0>();
    let known = value(&PAIRS, &address);
    if known.is_none() && !by_user {
        return;
    }
    match describe_modify(address, known, registers.argument::<1>()) {
        Ok(call) => enter(Function::Modify, &call),
        Err(loss) => lose(&LOST, loss),
    }
}

#[inline(always)]
fn describe_modify(address: u64, known: Option<Pair>, attributes: u64) -> Result<Call, Loss> {
    Ok(Call {
        entered: 0,
        object: address,
        // `qp_state` is the first member of `struct ib_qp_attr`.
        detail: u64::from(read_kernel::<u32>(attributes)?),
        known: 0,
        pair: match known {
            Some(pair) => pair,
            None => old(address)?,
        },
    })
}

/// Returns 0 for success.
#[kretprobe]
pub fn modify_return(ctx: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::Modify)
        && is_success(Registers::of(&ctx).returned())
        && let Err(loss) = modified(&call)
    {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn modified(call: &Call) -> Result<(), Loss> {
    let state = call.detail;
    let usage = usage(call.pair.cgroup)?;
    if state < STATES.len() as u64 {
        usage.add(slot::TRANSITIONS as u64 + state, 1);
    }
    if state == u64::from(RTS)
        && call.pair.created != 0
        && call.pair.connected == 0
        && let Some(pair) = PAIRS.get_ptr_mut(&call.object)
    {
        // SAFETY: a map value; modifies of one pair exclude each other.
        unsafe { (*pair).connected = 1 };
        usage.observe(slot::CONNECTED as u64, LATENCY, now() - call.pair.created);
    }
    Ok(())
}

/// `ib_uverbs_qp_event_handler(struct ib_event *event, void *)` of ib_uverbs: what the device reports of a queue pair
/// of user space, in whatever context its interrupt ran.
#[kprobe]
pub fn qp_event(ctx: ProbeContext) -> u32 {
    if let Err(loss) = try_qp_event(Registers::of(&ctx).argument::<0>()) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn try_qp_event(event: u64) -> Result<(), Loss> {
    let address: u64 = read_kernel(event + EVENT_ELEMENT)?;
    let code: u32 = read_kernel(event + EVENT_CODE)?;
    let pair = match value(&PAIRS, &address) {
        Some(pair) => pair,
        None => old(address)?,
    };
    let kind = match code {
        1..=7 => u64::from(code) - 1,
        16 => 7,
        _ => EVENTS.len() as u64 - 1,
    };
    usage(pair.cgroup)?.add(slot::ASYNC as u64 + kind, 1);
    Ok(())
}
