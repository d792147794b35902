// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What stands in the memory of the kernel and of the process that runs?
//!
//! What is read is integers or arrays of them, for which any bytes are a value.

use aya_ebpf::{
    Global,
    helpers::{bpf_probe_read_kernel, bpf_probe_read_user},
};
use exporter_common::Loss;

/// Loads a field through a pointer that the verifier knows by its BTF type: a wrong offset is refused at load.
///
/// # Safety
/// `base` is a BTF-typed pointer of the program's context, or was loaded from one.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the verifier checks the access against the type behind `base`, and faults read as 0.
    unsafe { core::ptr::read_volatile(base.add(offset.load() as usize).cast::<T>()) }
}

/// Reads kernel memory behind an address of which the verifier knows nothing. A wrong address reads garbage.
#[inline(always)]
pub fn read_kernel<T: Copy>(address: u64) -> Result<T, Loss> {
    // SAFETY: the helper checks the address and copies.
    unsafe { bpf_probe_read_kernel(address as *const T) }.map_err(|_| Loss::Unreadable)
}

/// Reads a field of an object of the kernel, of which the verifier knows nothing.
#[inline(always)]
pub fn field<T: Copy>(object: u64, offset: &Global<u32>) -> Result<T, Loss> {
    read_kernel(object.wrapping_add(u64::from(offset.load())))
}

/// Reads from the memory of the process that runs. A page that is not there is an error: nothing is waited for.
#[inline(always)]
pub fn read_user<T: Copy>(address: u64) -> Result<T, Loss> {
    // SAFETY: the helper checks the address and copies.
    unsafe { bpf_probe_read_user(address as *const T) }.map_err(|_| Loss::Unreadable)
}
