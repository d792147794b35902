// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How often? Numbers in map values that several CPUs add to.

use core::arch::asm;

use aya_ebpf::maps::Array;
use exporter_common::Loss;

/// Adds to a counter that other CPUs add to as well.
///
/// # Safety
/// `counter` points into a map value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, by: u64) {
    // BPF_XADD, the only atomic of 5.10 (core offers no atomic read-modify-write for a target without compare-and-swap).
    // SAFETY: map values are 8-byte aligned and live as long as the program runs.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) by, options(nostack)) };
}

/// Counts a lost event.
#[inline(always)]
pub fn lose(lost: &Array<u64>, loss: Loss) {
    if let Some(counter) = lost.get_ptr_mut(loss as u32) {
        // SAFETY: a map value.
        unsafe { add(counter, 1) };
    }
}

/// Returns the number as it is, of which the compiler then knows nothing: a comparison with a bound stays in the program,
/// on the very register that is used after it, where the verifier needs it.
#[inline(always)]
pub fn unknown(mut number: u64) -> u64 {
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(reg) number, options(nomem, nostack, preserves_flags)) };
    number
}

/// The counters in a map value.
#[derive(Clone, Copy)]
pub struct Counters<const SLOTS: usize>(*mut [u64; SLOTS]);

impl<const SLOTS: usize> Counters<SLOTS> {
    /// Takes those at an address.
    ///
    /// # Safety
    /// `slots` points into a map value.
    #[inline(always)]
    pub unsafe fn at(slots: *mut [u64; SLOTS]) -> Self {
        Self(slots)
    }

    /// Adds to one of them. There is none beyond the last: nothing is added.
    ///
    /// The number is checked just before its use: 5.10 forgets what it knew of one that was on the stack, and 6.12 takes what
    /// it learns of one for another that differs from it by a constant, and forgets the bounds of the first.
    #[inline(always)]
    pub fn add(self, slot: u64, by: u64) {
        let slot = unknown(slot);
        if slot < SLOTS as u64 {
            // SAFETY: below the end of the array in a map value.
            unsafe { add(self.0.cast::<u64>().add(slot as usize), by) };
        }
    }
}
