// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Who registers memory, how much, and of which kind?

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::rdma::{Call, Function, slot};
use exporter_ebpf::{Registers, cgroup, lose};

use crate::{CALLS, LOST, call_key, enter, is_success, leave, usage};

/// `ib_uverbs_reg_mr`, `ib_uverbs_handler_UVERBS_METHOD_REG_MR` and `…_REG_DMABUF_MR` of ib_uverbs.
#[kprobe]
pub fn register(_: ProbeContext) -> u32 {
    enter(Function::Register, &Call::default());
    0
}

/// Returns 0 for success.
#[kretprobe]
pub fn register_return(ctx: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::Register)
        && is_success(Registers::of(&ctx).returned())
    {
        // A device that pins memory by itself (none upstream since 6.10) tells neither kind nor size.
        let kind = usize::from(call.known == 2);
        match usage(cgroup()) {
            Ok(usage) => {
                usage.add((slot::REGIONS + kind) as u64, 1);
                usage.add((slot::BYTES + kind) as u64, call.detail);
            }
            Err(loss) => lose(&LOST, loss),
        }
    }
    0
}

/// Takes the size of the first memory that is pinned during a registration.
#[inline(always)]
fn pinned(size: u64, known: u64) {
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::Register)) {
        // SAFETY: a map value that only this thread writes.
        unsafe {
            if (*call).known == 0 {
                (*call).known = known;
                (*call).detail = size;
            }
        }
    }
}

/// `ib_umem_get(dev, addr, size, …)`, `ib_umem_odp_get(dev, addr, size, …)` and, of kernels with peer memory (a patch of NVIDIA's that
/// Ubuntu has), `ib_umem_get_peer(dev, addr, size, …)`, whose memory may be a GPU's.
#[kprobe]
pub fn pin_user(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<2>(), 1);
    0
}

/// `ib_umem_get_attr_or_va(dev, attrs, attr_id, addr, size, …)`, which takes the place of `ib_umem_get` from 7.2.
#[kprobe]
pub fn pin_user_attr(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<4>(), 1);
    0
}

/// `ib_umem_dmabuf_get(dev, offset, size, …)` and its relatives with the same order of arguments.
#[kprobe]
pub fn pin_dmabuf(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<2>(), 2);
    0
}

/// `ib_umem_dmabuf_get_pinned_with_dma_device(dev, dma_device, offset, size, …)`.
#[kprobe]
pub fn pin_dmabuf_for(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<3>(), 2);
    0
}
