// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which pod's queue pairs come and go, fail, or are slow to connect?
//!
//! Hooks: kprobes and kretprobes on functions of ib_core, ib_uverbs and rdma_cm; no type of a module is needed, since
//! what the arguments do not give is read by offsets that may be absent. Maps: `USAGE` feeds the series per pod,
//! `DEVICES` those per device, `PAIRS` says who owns a queue pair.
#![no_std]
#![no_main]

mod create;
mod destroy;
mod modify;
mod pair;
mod register;
mod resolve;

use aya_ebpf::{macros::map, maps::HashMap};
use exporter_common::rdma::{Call, CallKey, Function, MAX_CALLS, MAX_OWNERS, Usage, slot};
use exporter_ebpf::{Counters, Loss, entry, now, object, thread};

object!();

/// By cgroup id.
#[map]
static USAGE: HashMap<u64, Usage> = HashMap::with_max_entries(MAX_OWNERS, 0);

/// Calls between entry and return.
#[map]
static CALLS: HashMap<CallKey, Call> = HashMap::with_max_entries(MAX_CALLS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_USAGE: Usage = Usage {
    slots: [0; slot::ALL],
};

/// What names a call of a function in the thread that runs.
#[inline(always)]
fn call_key(function: Function) -> CallKey {
    CallKey {
        thread: thread(),
        function: function as u64,
    }
}

/// Notes that the thread that runs has entered a function.
#[inline(always)]
fn enter(function: Function, call: &Call) {
    let call = Call {
        entered: now(),
        ..*call
    };
    exporter_ebpf::enter(&CALLS, &call_key(function), &call, &LOST);
}

/// Returns what was noted at the entry.
#[inline(always)]
fn leave(function: Function) -> Option<Call> {
    exporter_ebpf::leave(&CALLS, &call_key(function))
}

/// Says if a returned `int` is 0.
#[inline(always)]
fn is_success(returned: u64) -> bool {
    returned as u32 == 0
}

/// The counters of a cgroup.
#[inline(always)]
fn usage(cgroup: u64) -> Result<Counters<{ slot::ALL }>, Loss> {
    let usage = entry(&USAGE, &cgroup, &NO_USAGE)?;
    // SAFETY: a map value.
    Ok(unsafe { Counters::at(&raw mut (*usage).slots) })
}
