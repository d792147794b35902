// SPDX-License-Identifier: Apache-2.0
//! A profiler plugin for NCCL, which tells of collectives to whoever probes it.
//!
//! NCCL loads it into the process of the job. It opens no file, calls no system call, allocates nothing and needs no
//! library. What it learns it hands to the functions `chandra_nccl_*`, which do nothing: without a uprobe on them the
//! plugin is as good as absent.
//!
//! In the order in which the data flows: `abi` (what NCCL calls), `communicators`, `collectives` (their times), and the
//! functions that are probed, here.
#![no_std]

mod abi;
mod collectives;
mod communicators;

use core::arch::naked_asm;

use exporter_common::nccl_profiler::Told;

// A program that links this crate has a handler of its own, and unwinds; the plugin does not.
#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Declares functions that do nothing but be probed. The first instruction is one that the kernel can replace: on x86-64 a
/// nop of five bytes, which since Linux 6.18 becomes a call instead of a trap. Aligned to 16 bytes, it never straddles two
/// pages, which the kernel would not replace.
macro_rules! probed {
    ($($(#[$attribute:meta])* $name:ident)*) => { $(
        $(#[$attribute])*
        // SAFETY: no other symbol of the plugin has this name, and its library is opened with names of its own (RTLD_LOCAL).
        // It returns at once, and touches neither stack nor registers.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(_: *const Told) {
            #[cfg(target_arch = "x86_64")]
            naked_asm!(".byte 0x0f, 0x1f, 0x44, 0x00, 0x00", "ret", ".balign 16");
            #[cfg(target_arch = "aarch64")]
            naked_asm!("nop", "ret", ".balign 16");
        }
    )* };
}

probed! {
    /// A communicator was made.
    nccl_profiler_opened
    /// A collective was handed to the GPU's queue.
    nccl_profiler_started
    /// A collective has ended, or no more is learned of it.
    nccl_profiler_finished
    /// A communicator was closed.
    nccl_profiler_closed
}
