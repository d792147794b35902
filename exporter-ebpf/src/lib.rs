// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What every object shares. A program reads what it was called with (`registers`, `memory`), finds out whose it is (`owner`)
//! and when (`clock`), follows calls to their return (`calls`), and counts (`counters`, `histogram`).
//!
//! Every function is inlined: an object has no functions but its programs.
#![no_std]
#![feature(asm_experimental_arch)]

mod calls;
mod clock;
mod counters;
mod histogram;
mod maps;
mod memory;
mod owner;
mod registers;
mod stack;

pub use calls::{enter, enter_timed, leave, thread};
pub use clock::{now, run_delay};
pub use counters::{Counters, add, lose, unknown};
pub use exporter_common::{ABSENT, Loss, MAX_CGROUPS, NO_CGROUP};
pub use maps::{entry, insert_new, remove, value};
pub use memory::{field, load, read_kernel, read_user};
pub use owner::{cgroup, probed_socket_cgroup, socket_cgroup, task_cgroup};
pub use registers::{Registers, is_arm64};
pub use stack::keep_own_stack;

/// Declares offsets and constants that user space sets from BTF before the load. They live in frozen `.rodata`, so
/// the verifier knows their values.
#[macro_export]
macro_rules! constants {
    ($($name:ident),* $(,)?) => { $(
        // SAFETY: user space finds the constant by this name; no other symbol of the object has it.
        #[unsafe(no_mangle)]
        static $name: aya_ebpf::Global<u32> = aya_ebpf::Global::new($crate::ABSENT);
    )* };
}

/// Declares what every object needs: its licence for the kernel, its panic handler, its losses.
#[macro_export]
macro_rules! object {
    () => {
        /// Events lost in the kernel, indexed by [`exporter_common::Loss`].
        #[aya_ebpf::macros::map]
        static LOST: aya_ebpf::maps::Array<u64> =
            aya_ebpf::maps::Array::with_max_entries(exporter_common::Loss::LABELS.len() as u32, 0);

        // "GPL" is how the kernel spells a licence that may call GPL-only helpers (include/linux/license.h).
        // SAFETY: the loader reads the section `license`; the symbol is alone in it.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 4] = *b"GPL\0";

        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo) -> ! {
            loop {}
        }
    };
}
