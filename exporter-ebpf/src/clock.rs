// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! When was it?

use aya_ebpf::{
    Global,
    helpers::{bpf_get_current_task, bpf_ktime_get_ns},
};
use exporter_common::Loss;

use crate::memory::field;

/// Returns CLOCK_MONOTONIC in nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Returns how long the thread that runs has waited for a CPU since it began, in nanoseconds, the wait before it runs now
/// included: `sched_info.run_delay` of `struct task_struct`, which is at the offset.
#[inline(always)]
pub fn run_delay(offset: &Global<u32>) -> Result<u64, Loss> {
    // SAFETY: the helper takes no arguments.
    field(unsafe { bpf_get_current_task() }, offset)
}
