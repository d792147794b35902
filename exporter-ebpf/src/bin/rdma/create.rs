// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Who creates queue pairs?

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::rdma::{Call, Function, Pair, slot};
use exporter_ebpf::{Loss, Registers, add, cgroup, lose, now, read_kernel, value};

use crate::{
    CALLS, LOST, call_key, enter, leave,
    pair::{OLD_PAIRS, PAIRS, describe, device, learn, number},
    usage,
};

/// `UVERBS_ATTR_CREATE_QP_RESP_QP_NUM` (include/uapi/rdma/ib_user_ioctl_cmds.h).
const RESP_QP_NUM: u64 = 14;

/// Says if a returned pointer is an error (`IS_ERR_OR_NULL`).
#[inline(always)]
fn is_error(pointer: u64) -> bool {
    pointer == 0 || pointer >= -4095_i64 as u64
}

#[inline(always)]
fn created(address: u64, on: u64) -> Result<(), Loss> {
    let mut pair = describe(address, on)?;
    pair.cgroup = cgroup();
    pair.created = now();
    // Its number may have been that of an old pair which went away unseen.
    let _ = OLD_PAIRS.remove(&number(&pair));
    // Whatever cannot be counted, the pair keeps its owner.
    let kept = PAIRS.insert(&address, &pair, 0).map_err(|_| Loss::MapFull);
    if pair.device != 0 {
        match device(pair.device, true) {
            // SAFETY: a map value.
            Ok(device) => unsafe { add(&raw mut (*device).created, 1) },
            Err(loss) => lose(&LOST, loss),
        }
    }
    usage(pair.cgroup)?.add(slot::CREATED as u64, 1);
    kept
}

/// `ib_create_qp_user(struct ib_device *dev, …)` of ib_core, from 5.15: what every creation by user space goes through,
/// and none by the kernel.
#[kprobe]
pub fn create(ctx: ProbeContext) -> u32 {
    let call = Call {
        object: Registers::of(&ctx).argument::<0>(),
        ..Call::default()
    };
    enter(Function::Create, &call);
    0
}

/// Returns the `struct ib_qp *`.
#[kretprobe]
pub fn create_return(ctx: RetProbeContext) -> u32 {
    let address = Registers::of(&ctx).returned();
    if let Some(call) = leave(Function::Create)
        && !is_error(address)
    {
        note_creation(address, call.object);
    }
    0
}

#[inline(always)]
fn note_creation(address: u64, device: u64) {
    if let Err(loss) = created(address, device) {
        lose(&LOST, loss);
    }
    // For `copy_to`, within the handler.
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::CreateHandler)) {
        // SAFETY: a map value that only this thread writes.
        unsafe { (*call).object = address };
    }
}

/// The uverbs handlers of a creation: `ib_uverbs_handler_UVERBS_METHOD_QP_CREATE`, `ib_uverbs_create_qp`,
/// `ib_uverbs_ex_create_qp`. Within them a creation is user space's.
#[kprobe]
pub fn create_handler(_: ProbeContext) -> u32 {
    enter(Function::CreateHandler, &Call::default());
    0
}

/// The end of the handlers.
#[kretprobe]
pub fn create_handler_return(_: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::CreateHandler)
        && call.known == FROM_PROVIDER
        && let Some(pair) = PAIRS.get_ptr_mut(&call.object)
        && let Err(loss) = find_device(call.object, pair)
    {
        lose(&LOST, loss);
    }
    0
}

/// In [`Call::known`] of a handler: the pair's device is still to be found.
const FROM_PROVIDER: u64 = 1;

/// The core sets `device`, the first member of `struct ib_qp` from 2.6.11 on, after the provider has returned.
#[inline(always)]
fn find_device(address: u64, pair: *mut Pair) -> Result<(), Loss> {
    let on: u64 = read_kernel(address)?;
    // SAFETY: map values; nobody else knows the new pair yet.
    unsafe {
        (*pair).device = on;
        add(&raw mut (*device(on, true)?).created, 1);
    }
    Ok(())
}

/// The providers' `create_qp(struct ib_pd *, struct ib_qp_init_attr *, struct ib_udata *)` before 5.15, which returned
/// the `struct ib_qp *`: for kernels that are built without `ib_create_qp_security`.
#[kretprobe]
pub fn create_provider_return(ctx: RetProbeContext) -> u32 {
    let address = Registers::of(&ctx).returned();
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::CreateHandler))
        && !is_error(address)
    {
        note_creation(address, 0);
        // SAFETY: a map value that only this thread writes.
        unsafe { (*call).known = FROM_PROVIDER };
    }
    0
}

/// `ib_create_qp_security(struct ib_qp *qp, struct ib_device *dev)` of ib_core: before 5.15, the first function that a
/// new queue pair passes, by whatever way it was made.
#[kprobe]
pub fn create_security(ctx: ProbeContext) -> u32 {
    if CALLS.get_ptr(&call_key(Function::CreateHandler)).is_some() {
        let registers = Registers::of(&ctx);
        note_creation(registers.argument::<0>(), registers.argument::<1>());
    }
    0
}

/// `uverbs_copy_to(const struct uverbs_attr_bundle *, size_t idx, const void *from, size_t size)` of ib_uverbs: tells
/// the number of the new queue pair, and where every other has its own, where no type does: `from` is `&qp->qp_num`.
#[kprobe]
pub fn copy_to(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if registers.argument::<1>() as u32 as u64 != RESP_QP_NUM || registers.argument::<3>() != 4 {
        return 0;
    }
    let Some(call) = value(&CALLS, &call_key(Function::CreateHandler)) else {
        return 0;
    };
    let from = registers.argument::<2>();
    if let Some(pair) = PAIRS.get_ptr_mut(&call.object)
        && let Ok(number) = read_kernel::<u32>(from)
    {
        // SAFETY: a map value; the pair is not handed to user space before this.
        unsafe { (*pair).number = number };
        learn(from.wrapping_sub(call.object));
    }
    0
}
