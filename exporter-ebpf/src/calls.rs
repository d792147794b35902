// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which call returns? A call is noted under what names it (its thread, its stack frame) from entry to return.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::bpf_get_current_pid_tgid,
    maps::{Array, HashMap},
};
use exporter_common::Loss;

use crate::{
    counters::lose,
    maps::{insert_new, remove},
};

/// Returns the thread that runs: its process in the upper half, its own id in the lower, of the initial namespace.
#[inline(always)]
pub fn thread() -> u64 {
    bpf_get_current_pid_tgid()
}

/// Notes a call that begins. One that had its name before was not seen to return, which is a loss. False if there is no room,
/// which is one too.
#[inline(always)]
pub fn enter<K, V>(calls: &HashMap<K, V>, name: &K, call: &V, lost: &Array<u64>) -> bool {
    let loss = match insert_new(calls, name, call) {
        Ok(true) => return true,
        Ok(false) if calls.insert(name, call, u64::from(BPF_ANY)).is_ok() => Loss::MissedReturn,
        _ => Loss::MapFull,
    };
    lose(lost, loss);
    matches!(loss, Loss::MissedReturn)
}

/// The same for one that is timed: returns where it is noted, to have the clock read last, since what is done here is not the
/// call's. Nobody else writes there before the call returns.
#[inline(always)]
pub fn enter_timed<K, V>(
    calls: &HashMap<K, V>,
    name: &K,
    call: &V,
    lost: &Array<u64>,
) -> Option<*mut V> {
    if enter(calls, name, call, lost) {
        calls.get_ptr_mut(name)
    } else {
        None
    }
}

/// Returns what was noted when the call began, and forgets it. `None` for one that was not to be followed, or had begun before
/// the probe was there.
#[inline(always)]
pub fn leave<K, V: Copy>(calls: &HashMap<K, V>, name: &K) -> Option<V> {
    remove(calls, name)
}
