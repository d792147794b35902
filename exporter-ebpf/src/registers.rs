// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What was the function called with, and what did it return?

use core::arch::asm;

use aya_ebpf::EbpfContext;
use exporter_common::Loss;

use crate::{constants, memory::read_user};

constants!(ARM64);

/// Whether the kernel is one for arm64.
#[inline(always)]
pub fn is_arm64() -> bool {
    ARM64.load() == 1
}

/// Returns a word of the registers that a probe was hit with.
macro_rules! register {
    ($registers:expr, $offset:literal) => {{
        let word: u64;
        // One load at a constant offset: the verifier of 5.10 takes no other from a context.
        // SAFETY: the callers pass a probe's context; the verifier checks the offset against it.
        unsafe {
            asm!(
                concat!("{0} = *(u64 *)({1} + ", $offset, ")"),
                out(reg) word, in(reg) $registers, options(readonly, nostack)
            )
        };
        word
    }};
}

/// The arguments or the return value of a function that a kprobe or kretprobe was hit in, by the calling conventions
/// of x86-64 and arm64 (`struct pt_regs` of arch/*/include/asm/ptrace.h), so that one object serves both.
#[derive(Clone, Copy)]
pub struct Registers(*const u8);

impl Registers {
    /// Takes the context of a kprobe or kretprobe.
    #[inline(always)]
    pub fn of(context: &impl EbpfContext) -> Self {
        Self(context.as_ptr().cast())
    }

    /// Returns argument `N` (0 to 5).
    #[inline(always)]
    pub fn argument<const N: u32>(self) -> u64 {
        if is_arm64() {
            match N {
                0 => register!(self.0, "0"),
                1 => register!(self.0, "8"),
                2 => register!(self.0, "16"),
                3 => register!(self.0, "24"),
                4 => register!(self.0, "32"),
                _ => register!(self.0, "40"),
            }
        } else {
            match N {
                0 => register!(self.0, "112"),
                1 => register!(self.0, "104"),
                2 => register!(self.0, "96"),
                3 => register!(self.0, "88"),
                4 => register!(self.0, "72"),
                _ => register!(self.0, "64"),
            }
        }
    }

    /// Returns argument 6 of a function of user space: on x86-64 the first that is on the stack.
    #[inline(always)]
    pub fn seventh_argument(self) -> Result<u64, Loss> {
        if is_arm64() {
            Ok(register!(self.0, "48"))
        } else {
            read_user(self.frame() + 8)
        }
    }

    /// Returns the eighth argument, at the entry of a function in user space: on x86-64 it is on the stack.
    ///
    /// # Errors
    /// When the stack cannot be read.
    #[inline(always)]
    pub fn eighth_argument(self) -> Result<u64, Loss> {
        if is_arm64() {
            Ok(register!(self.0, "56"))
        } else {
            read_user(self.frame() + 16)
        }
    }

    /// Returns what names the call among all that are in progress, on any CPU and in any task: the address of its
    /// stack frame, at the entry of the function.
    #[inline(always)]
    pub fn frame(self) -> u64 {
        if is_arm64() {
            register!(self.0, "248")
        } else {
            register!(self.0, "152")
        }
    }

    /// Returns the same at the return of the function. On x86-64 the return has taken the return address off the stack.
    #[inline(always)]
    pub fn returned_frame(self) -> u64 {
        if is_arm64() {
            register!(self.0, "248")
        } else {
            register!(self.0, "152") - 8
        }
    }

    /// Returns the return value.
    #[inline(always)]
    pub fn returned(self) -> u64 {
        if is_arm64() {
            register!(self.0, "0")
        } else {
            register!(self.0, "80")
        }
    }
}
