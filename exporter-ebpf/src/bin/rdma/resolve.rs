// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How long do addresses and routes of connections take to resolve?

use aya_ebpf::{
    macros::{kprobe, kretprobe, map},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::rdma::{
    Call, Function, LATENCY, MAX_RESOLUTIONS, Resolving, ResolvingKey, slot,
};
use exporter_ebpf::{Loss, Registers, cgroup, lose, now, read_kernel, remove};

use crate::{LOST, enter, is_success, leave, usage};

/// Resolutions between the request and its event.
#[map]
static RESOLVING: HashMap<ResolvingKey, Resolving> = HashMap::with_max_entries(MAX_RESOLUTIONS, 0);

/// `rdma_resolve_addr(struct rdma_cm_id *id, …)` of rdma_cm.
#[kprobe]
pub fn resolve_addr(ctx: ProbeContext) -> u32 {
    resolve(
        Registers::of(&ctx).argument::<0>(),
        Function::ResolveAddress,
    );
    0
}

/// Returns 0 where an event will follow.
#[kretprobe]
pub fn resolve_addr_return(ctx: RetProbeContext) -> u32 {
    refused(Registers::of(&ctx).returned(), Function::ResolveAddress);
    0
}

/// `rdma_resolve_route(struct rdma_cm_id *id, …)` of rdma_cm.
#[kprobe]
pub fn resolve_route(ctx: ProbeContext) -> u32 {
    resolve(Registers::of(&ctx).argument::<0>(), Function::ResolveRoute);
    0
}

/// Returns 0 where an event will follow.
#[kretprobe]
pub fn resolve_route_return(ctx: RetProbeContext) -> u32 {
    refused(Registers::of(&ctx).returned(), Function::ResolveRoute);
    0
}

#[inline(always)]
fn resolving_key(id: u64, function: Function) -> ResolvingKey {
    ResolvingKey {
        id,
        function: function as u64,
    }
}

#[inline(always)]
fn resolve(id: u64, function: Function) {
    // The event may come before the return, on another CPU, so it is keyed by the id.
    let resolving = Resolving {
        cgroup: cgroup(),
        started: now(),
    };
    if RESOLVING
        .insert(&resolving_key(id, function), &resolving, 0)
        .is_err()
    {
        lose(&LOST, Loss::MapFull);
        return;
    }
    let call = Call {
        object: id,
        ..Call::default()
    };
    enter(function, &call);
}

#[inline(always)]
fn refused(returned: u64, function: Function) {
    if let Some(call) = leave(function)
        && !is_success(returned)
    {
        resolved(call.object, function, 1);
    }
}

#[inline(always)]
fn resolved(id: u64, function: Function, result: usize) {
    let key = resolving_key(id, function);
    let Some(Resolving { cgroup, started }) = remove(&RESOLVING, &key) else {
        return;
    };
    let base = match function {
        Function::ResolveAddress => slot::ADDRESS,
        _ => slot::ROUTE,
    };
    let first = (base + result * LATENCY.slots()) as u64;
    match usage(cgroup) {
        Ok(usage) => usage.observe(first, LATENCY, now() - started),
        Err(loss) => lose(&LOST, loss),
    }
}

/// `cma_cm_event_handler(struct rdma_id_private *id_priv, struct rdma_cm_event *event)` of rdma_cm: every event passes
/// it. The id is the first member of the private one, the code the first of the event.
#[kprobe]
pub fn cm_event(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    let id = registers.argument::<0>();
    // RDMA_CM_EVENT_ADDR_RESOLVED, _ADDR_ERROR, _ROUTE_RESOLVED, _ROUTE_ERROR (include/rdma/rdma_cm.h, uapi).
    match read_kernel::<u32>(registers.argument::<1>()) {
        Ok(0) => resolved(id, Function::ResolveAddress, 0),
        Ok(1) => resolved(id, Function::ResolveAddress, 1),
        Ok(2) => resolved(id, Function::ResolveRoute, 0),
        Ok(3) => resolved(id, Function::ResolveRoute, 1),
        Ok(_) => {}
        Err(loss) => lose(&LOST, loss),
    }
    0
}

/// `rdma_destroy_id(struct rdma_cm_id *id)` of rdma_cm: a resolution in progress ends without an event.
#[kprobe]
pub fn destroy_id(ctx: ProbeContext) -> u32 {
    let id = Registers::of(&ctx).argument::<0>();
    let _ = RESOLVING.remove(&resolving_key(id, Function::ResolveAddress));
    let _ = RESOLVING.remove(&resolving_key(id, Function::ResolveRoute));
    0
}
