// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! On whose stack does a program run?

use aya_ebpf::{EbpfContext, maps::ProgramArray};

use crate::registers::Registers;

/// Keeps a program of a uprobe on the stack of its own task. To be called by each, before anything else.
///
/// Since 6.13 the verifier gives programs of this type whose stack is 64 bytes or more one stack for each CPU
/// (`bpf_enable_priv_stack`), as if nothing could run a program twice at once on a CPU. That holds for kprobes, but the programs of
/// uprobes may be preempted: where the kernel is preemptible, as 7.3 is by default, two tasks then write over each other's stacks.
/// Programs with a tail call have none of that. This one is never taken, and nothing is in its map.
#[inline(always)]
pub fn keep_own_stack(ctx: &impl EbpfContext, nowhere: &ProgramArray) {
    if Registers::of(ctx).frame() == 0 {
        // SAFETY: the map is empty, so that the call fails and the program goes on.
        unsafe { nowhere.tail_call(ctx, 0) };
    }
}
