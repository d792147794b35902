// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which pod's queue pairs come and go, fail, or are slow to connect?
//!
//! Hooks: kprobes and kretprobes on functions of ib_core, ib_uverbs and rdma_cm; no type of a module is needed, since
//! what the arguments do not give is read by offsets that may be absent. Maps: `USAGE` feeds the series per pod,
//! `DEVICES` those per device, `PAIRS` says who owns a queue pair.
#![no_std]
#![no_main]

use aya_ebpf::{
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns,
        bpf_probe_read_kernel, generated,
    },
    macros::{kprobe, kretprobe, map},
    maps::{Array, HashMap},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::{
    histogram::Shape,
    rdma::{
        CALLS as MAX_CALLS, Call, CallKey, DEVICE_NAME, DEVICES as MAX_DEVICES, Device, EVENTS,
        Function, LATENCY, LIFETIME, Number, OLD_QUEUE_PAIRS, OWNERS, Pair, QUEUE_PAIRS,
        RESOLUTIONS, RTS, Resolving, ResolvingKey, STATES, Usage, WINDOW, slot,
    },
};
use exporter_ebpf::{
    ABSENT, Loss, NO_CGROUP, Registers, add, constants, entry, lose, object, unknown,
};

object!();

constants!(
    OFF_PAIR_DEVICE,
    OFF_PAIR_NUMBER,
    OFF_PAIR_REAL,
    OFF_DEVICE_INDEX,
    OFF_DEVICE_NAME,
    CORE_CREATES,
);

/// By cgroup id.
#[map]
static USAGE: HashMap<u64, Usage> = HashMap::with_max_entries(OWNERS, 0);

/// By the address of the queue pair.
#[map]
static PAIRS: HashMap<u64, Pair> = HashMap::with_max_entries(QUEUE_PAIRS, 0);

/// Owners of queue pairs that are not in `PAIRS`; written by user space.
#[map]
static OLD_PAIRS: HashMap<Number, u64> = HashMap::with_max_entries(OLD_QUEUE_PAIRS, 0);

/// By the address of the device.
#[map]
static DEVICES: HashMap<u64, Device> = HashMap::with_max_entries(MAX_DEVICES, 0);

/// Calls between entry and return.
#[map]
static CALLS: HashMap<CallKey, Call> = HashMap::with_max_entries(MAX_CALLS, 0);

/// Resolutions between the request and its event.
#[map]
static RESOLVING: HashMap<ResolvingKey, Resolving> = HashMap::with_max_entries(RESOLUTIONS, 0);

/// Where a queue pair keeps its number, in bytes, where no type says so; 0 until `copy_to` has seen it twice. Then what
/// `copy_to` saw last: the handle of an XRC target is not the pair that was created, so one sight may be wrong.
#[map]
static NUMBER_AT: Array<u32> = Array::with_max_entries(2, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_USAGE: Usage = Usage {
    slots: [0; slot::ALL],
};

// SAFETY: as above.
#[unsafe(no_mangle)]
static NO_DEVICE: Device = Device {
    created: 0,
    destroyed: 0,
    window: [0; WINDOW],
};

/// `IB_QP_STATE` of `enum ib_qp_attr_mask`.
const IB_QP_STATE: u64 = 1;

/// `UVERBS_ATTR_CREATE_QP_RESP_QP_NUM` (include/uapi/rdma/ib_user_ioctl_cmds.h).
const RESP_QP_NUM: u64 = 14;

/// `struct ib_event { struct ib_device *device; union { struct ib_qp *qp; … } element; enum ib_event_type event; }`:
/// unchanged since 2.6.11.
const EVENT_ELEMENT: u64 = 8;
const EVENT_CODE: u64 = 16;

#[inline(always)]
fn call_key(function: Function) -> CallKey {
    CallKey {
        thread: bpf_get_current_pid_tgid(),
        function: function as u64,
    }
}

/// Notes that the current thread has entered a function.
#[inline(always)]
fn enter(function: Function, call: &Call) {
    let key = call_key(function);
    if CALLS.get_ptr(&key).is_some() {
        lose(&LOST, Loss::MissedReturn);
    }
    let mut call = *call;
    // SAFETY: the helper takes no arguments.
    call.entered = unsafe { bpf_ktime_get_ns() };
    if CALLS.insert(&key, &call, 0).is_err() {
        lose(&LOST, Loss::MapFull);
    }
}

/// Returns what was noted at the entry. `None` for a call that was not to be followed, or was entered before the probe
/// was there.
#[inline(always)]
fn leave(function: Function) -> Option<Call> {
    let key = call_key(function);
    let call = *unsafe_value(CALLS.get_ptr(&key)?);
    let _ = CALLS.remove(&key);
    Some(call)
}

/// Reads a map value through its pointer.
#[inline(always)]
fn unsafe_value<'a, T>(value: *const T) -> &'a T {
    // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
    unsafe { &*value }
}

/// Reads kernel memory behind a pointer of which the verifier knows nothing.
#[inline(always)]
fn read<T: Copy>(address: u64, offset: u64) -> Result<T, Loss> {
    // SAFETY: the helper checks the address; the offset is that of a `T`.
    unsafe { bpf_probe_read_kernel((address + offset) as *const T) }.map_err(|_| Loss::Unreadable)
}

/// Says if a returned pointer is an error (`IS_ERR_OR_NULL`).
#[inline(always)]
fn is_error(pointer: u64) -> bool {
    pointer == 0 || pointer >= -4095_i64 as u64
}

/// Says if a returned `int` is 0.
#[inline(always)]
fn is_success(returned: u64) -> bool {
    returned as u32 == 0
}

#[inline(always)]
fn usage(cgroup: u64) -> Result<*mut u64, Loss> {
    Ok(entry(&USAGE, &cgroup, &NO_USAGE)?.cast())
}

#[inline(always)]
fn count(cgroup: u64, slot: usize, by: u64) -> Result<(), Loss> {
    // SAFETY: every slot that is passed is below `slot::ALL`.
    unsafe { add(usage(cgroup)?.add(slot), by) };
    Ok(())
}

/// Counts at one of a row of slots.
#[inline(always)]
fn count_in(cgroup: u64, base: usize, slots: usize, index: u64, by: u64) -> Result<(), Loss> {
    let index = unknown(index);
    if index < slots as u64 {
        // SAFETY: the row lies below `slot::ALL`.
        unsafe { add(usage(cgroup)?.add(base + index as usize), by) };
    }
    Ok(())
}

#[inline(always)]
fn observe(cgroup: u64, base: usize, shape: Shape, nanoseconds: u64) -> Result<(), Loss> {
    let bucket = shape.bucket(nanoseconds) as u64;
    count_in(cgroup, base, shape.bounds + 1, bucket, 1)?;
    count(cgroup, base + shape.sum(), nanoseconds)
}

/// Finds a device's counters. Its name is read anew where `named`, since an address may be used again.
#[inline(always)]
fn device(address: u64, named: bool) -> Result<*mut Device, Loss> {
    let device = entry(&DEVICES, &address, &NO_DEVICE)?;
    if named {
        // SAFETY: a map value; the helper writes at most its `window`, and checks the address that it reads from.
        let window = unsafe { (&raw mut (*device).window).cast::<core::ffi::c_void>() };
        let failed = if OFF_DEVICE_NAME.load() == ABSENT {
            // SAFETY: as above.
            unsafe { generated::bpf_probe_read_kernel(window, WINDOW as u32, address as *const _) }
        } else {
            let name = address + u64::from(OFF_DEVICE_NAME.load());
            // SAFETY: as above.
            unsafe {
                generated::bpf_probe_read_kernel(window, DEVICE_NAME as u32, name as *const _)
            }
        };
        if failed != 0 {
            return Err(Loss::Unreadable);
        }
    }
    Ok(device)
}

/// What the queue pair itself tells: its device and its number there.
#[inline(always)]
fn describe(address: u64, device: u64) -> Result<Pair, Loss> {
    let mut pair = Pair {
        cgroup: NO_CGROUP,
        created: 0,
        device,
        index: ABSENT,
        number: ABSENT,
        connected: 0,
    };
    if device == 0 && OFF_PAIR_DEVICE.load() != ABSENT {
        pair.device = read(address, u64::from(OFF_PAIR_DEVICE.load()))?;
    }
    if OFF_PAIR_NUMBER.load() != ABSENT {
        pair.number = read(address, u64::from(OFF_PAIR_NUMBER.load()))?;
    } else if let Some(learned) = NUMBER_AT.get(0)
        && *learned != 0
    {
        pair.number = read(address, u64::from(*learned))?;
    }
    if pair.device != 0 && OFF_DEVICE_INDEX.load() != ABSENT {
        pair.index = read(pair.device, u64::from(OFF_DEVICE_INDEX.load()))?;
    }
    Ok(pair)
}

/// A queue pair that is not in `PAIRS`: older than the exporter, so user space may know its owner.
#[inline(always)]
fn old(address: u64) -> Result<Pair, Loss> {
    let mut pair = describe(address, 0)?;
    let number = Number {
        index: pair.index,
        number: pair.number,
    };
    if let Some(cgroup) = OLD_PAIRS.get_ptr(&number) {
        pair.cgroup = *unsafe_value(cgroup);
    }
    Ok(pair)
}

#[inline(always)]
fn created(address: u64, on: u64) -> Result<(), Loss> {
    let mut pair = describe(address, on)?;
    // SAFETY: the helpers take no arguments.
    unsafe {
        pair.cgroup = bpf_get_current_cgroup_id();
        pair.created = bpf_ktime_get_ns();
    }
    // Its number may have been that of an old pair which went away unseen.
    let number = Number {
        index: pair.index,
        number: pair.number,
    };
    let _ = OLD_PAIRS.remove(&number);
    // Whatever cannot be counted, the pair keeps its owner.
    let kept = PAIRS.insert(&address, &pair, 0).map_err(|_| Loss::MapFull);
    if pair.device != 0 {
        match device(pair.device, true) {
            // SAFETY: a map value.
            Ok(device) => unsafe { add(&raw mut (*device).created, 1) },
            Err(loss) => lose(&LOST, loss),
        }
    }
    count(pair.cgroup, slot::CREATED, 1)?;
    kept
}

/// `ib_create_qp_user(struct ib_device *dev, …)` of ib_core, from 5.15: what every creation by user space goes through,
/// and none by the kernel.
#[kprobe]
pub fn create(ctx: ProbeContext) -> u32 {
    let call = Call {
        object: Registers::of(&ctx).argument::<0>(),
        ..Call::default()
    };
    enter(Function::Create, &call);
    0
}

/// Returns the `struct ib_qp *`.
#[kretprobe]
pub fn create_return(ctx: RetProbeContext) -> u32 {
    let address = Registers::of(&ctx).returned();
    if let Some(call) = leave(Function::Create)
        && !is_error(address)
    {
        note_creation(address, call.object);
    }
    0
}

#[inline(always)]
fn note_creation(address: u64, device: u64) {
    if let Err(loss) = created(address, device) {
        lose(&LOST, loss);
    }
    // For `copy_to`, within the handler.
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::CreateHandler)) {
        // SAFETY: a map value that only this thread writes.
        unsafe { (*call).object = address };
    }
}

/// The uverbs handlers of a creation: `ib_uverbs_handler_UVERBS_METHOD_QP_CREATE`, `ib_uverbs_create_qp`,
/// `ib_uverbs_ex_create_qp`. Within them a creation is user space's.
#[kprobe]
pub fn create_handler(_: ProbeContext) -> u32 {
    enter(Function::CreateHandler, &Call::default());
    0
}

/// The end of the handlers.
#[kretprobe]
pub fn create_handler_return(_: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::CreateHandler)
        && call.known == FROM_PROVIDER
        && let Some(pair) = PAIRS.get_ptr_mut(&call.object)
        && let Err(loss) = find_device(call.object, pair)
    {
        lose(&LOST, loss);
    }
    0
}

/// In [`Call::known`] of a handler: the pair's device is still to be found.
const FROM_PROVIDER: u64 = 1;

/// The core sets `device`, the first member of `struct ib_qp` from 2.6.11 on, after the provider has returned.
#[inline(always)]
fn find_device(address: u64, pair: *mut Pair) -> Result<(), Loss> {
    let on: u64 = read(address, 0)?;
    // SAFETY: map values; nobody else knows the new pair yet.
    unsafe {
        (*pair).device = on;
        add(&raw mut (*device(on, true)?).created, 1);
    }
    Ok(())
}

/// The providers' `create_qp(struct ib_pd *, struct ib_qp_init_attr *, struct ib_udata *)` before 5.15, which returned
/// the `struct ib_qp *`: for kernels that are built without `ib_create_qp_security`.
#[kretprobe]
pub fn create_provider_return(ctx: RetProbeContext) -> u32 {
    let address = Registers::of(&ctx).returned();
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::CreateHandler))
        && !is_error(address)
    {
        note_creation(address, 0);
        // SAFETY: a map value that only this thread writes.
        unsafe { (*call).known = FROM_PROVIDER };
    }
    0
}

/// `ib_create_qp_security(struct ib_qp *qp, struct ib_device *dev)` of ib_core: before 5.15, the first function that a
/// new queue pair passes, by whatever way it was made.
#[kprobe]
pub fn create_security(ctx: ProbeContext) -> u32 {
    if CALLS.get_ptr(&call_key(Function::CreateHandler)).is_some() {
        let registers = Registers::of(&ctx);
        note_creation(registers.argument::<0>(), registers.argument::<1>());
    }
    0
}

/// `uverbs_copy_to(const struct uverbs_attr_bundle *, size_t idx, const void *from, size_t size)` of ib_uverbs: tells
/// the number of the new queue pair, and where every other has its own, where no type does: `from` is `&qp->qp_num`.
#[kprobe]
pub fn copy_to(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if registers.argument::<1>() as u32 as u64 != RESP_QP_NUM || registers.argument::<3>() != 4 {
        return 0;
    }
    let Some(call) = CALLS.get_ptr(&call_key(Function::CreateHandler)) else {
        return 0;
    };
    let address = unsafe_value(call).object;
    let from = registers.argument::<2>();
    if let Some(pair) = PAIRS.get_ptr_mut(&address)
        && let Ok(number) = read::<u32>(from, 0)
    {
        // SAFETY: a map value; the pair is not handed to user space before this.
        unsafe { (*pair).number = number };
        learn(from.wrapping_sub(address));
    }
    0
}

#[inline(always)]
fn learn(offset: u64) {
    let (Some(learned), Some(last)) = (NUMBER_AT.get_ptr_mut(0), NUMBER_AT.get_ptr_mut(1)) else {
        return;
    };
    // `struct ib_qp` takes some hundred bytes.
    if offset == 0 || offset >= 4096 {
        return;
    }
    // SAFETY: map values of one word each; whoever writes the first writes what was seen twice.
    unsafe {
        if *last == offset as u32 {
            if *learned == 0 {
                *learned = offset as u32;
            }
        } else {
            *last = offset as u32;
        }
    }
}

/// `ib_modify_qp_with_udata(struct ib_qp *, struct ib_qp_attr *, int attr_mask, …)` of ib_core: user space modifies.
#[kprobe]
pub fn modify_user(ctx: ProbeContext) -> u32 {
    modify(Registers::of(&ctx), true);
    0
}

/// `ib_modify_qp(struct ib_qp *, struct ib_qp_attr *, int attr_mask)` of ib_core: the kernel modifies, perhaps a queue
/// pair of user space (iw_cm).
#[kprobe]
pub fn modify_kernel(ctx: ProbeContext) -> u32 {
    modify(Registers::of(&ctx), false);
    0
}

#[inline(always)]
fn modify(registers: Registers, by_user: bool) {
    if registers.argument::<2>() & IB_QP_STATE == 0 {
        return;
    }
    let address = registers.argument::<0>();
    let known = PAIRS.get_ptr(&address);
    if known.is_none() && !by_user {
        return;
    }
    match describe_modify(address, known, registers.argument::<1>()) {
        Ok(call) => enter(Function::Modify, &call),
        Err(loss) => lose(&LOST, loss),
    }
}

#[inline(always)]
fn describe_modify(
    address: u64,
    known: Option<*const Pair>,
    attributes: u64,
) -> Result<Call, Loss> {
    Ok(Call {
        entered: 0,
        object: address,
        // `qp_state` is the first member of `struct ib_qp_attr`.
        detail: u64::from(read::<u32>(attributes, 0)?),
        known: 0,
        pair: match known {
            Some(pair) => *unsafe_value(pair),
            None => old(address)?,
        },
    })
}

/// Returns 0 for success.
#[kretprobe]
pub fn modify_return(ctx: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::Modify)
        && is_success(Registers::of(&ctx).returned())
        && let Err(loss) = modified(&call)
    {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn modified(call: &Call) -> Result<(), Loss> {
    let state = call.detail;
    let cgroup = call.pair.cgroup;
    count_in(cgroup, slot::TRANSITIONS, STATES.len(), state, 1)?;
    if state == u64::from(RTS)
        && call.pair.created != 0
        && call.pair.connected == 0
        && let Some(pair) = PAIRS.get_ptr_mut(&call.object)
    {
        // SAFETY: a map value; modifies of one pair exclude each other.
        unsafe { (*pair).connected = 1 };
        // SAFETY: the helper takes no arguments.
        let took = unsafe { bpf_ktime_get_ns() } - call.pair.created;
        observe(cgroup, slot::CONNECTED, LATENCY, took)?;
    }
    Ok(())
}

/// `ib_destroy_qp_user(struct ib_qp *, struct ib_udata *)` of ib_core. The kernel's own callers pass no udata.
///
/// The pair leaves the map at the entry: after the return its address may belong to another. An XRC target is destroyed
/// by a call within this one for the pair behind it; the first return that is seen counts for both.
#[kprobe]
pub fn destroy(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    let address = registers.argument::<0>();
    let by_user = registers.argument::<1>() != 0;
    let mut call = Call {
        object: address,
        ..Call::default()
    };
    if let Some(pair) = PAIRS.get_ptr(&address) {
        call.known = 1;
        call.pair = *unsafe_value(pair);
        let _ = PAIRS.remove(&address);
        // The kernel ends a pair of its own, at the address of one whose end was not seen: nobody's event.
        if !by_user && CORE_CREATES.load() == 1 {
            return 0;
        }
    } else if by_user && !is_handle(address) {
        match old(address) {
            Ok(pair) => call.pair = pair,
            Err(loss) => {
                lose(&LOST, loss);
                return 0;
            }
        }
    } else {
        return 0;
    }
    if !by_user {
        // The inner call of an XRC target replaces the outer one.
        let _ = CALLS.remove(&call_key(Function::Destroy));
    }
    enter(Function::Destroy, &call);
    0
}

/// Says if this is one more handle of an XRC target (`ib_open_qp`), whose end is not that of the pair.
#[inline(always)]
fn is_handle(address: u64) -> bool {
    OFF_PAIR_REAL.load() != ABSENT
        && read::<u64>(address, u64::from(OFF_PAIR_REAL.load())).is_ok_and(|real| real != address)
}

/// Returns 0 for success.
#[kretprobe]
pub fn destroy_return(ctx: RetProbeContext) -> u32 {
    let Some(call) = leave(Function::Destroy) else {
        return 0;
    };
    let result = if is_success(Registers::of(&ctx).returned()) {
        destroyed(&call.pair)
    } else if call.known == 1 {
        PAIRS
            .insert(&call.object, &call.pair, 0)
            .map_err(|_| Loss::MapFull)
    } else {
        Ok(())
    };
    if let Err(loss) = result {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn destroyed(pair: &Pair) -> Result<(), Loss> {
    count(pair.cgroup, slot::DESTROYED, 1)?;
    if pair.created == 0 {
        let number = Number {
            index: pair.index,
            number: pair.number,
        };
        let _ = OLD_PAIRS.remove(&number);
    } else {
        // SAFETY: the helper takes no arguments.
        let lived = unsafe { bpf_ktime_get_ns() } - pair.created;
        observe(pair.cgroup, slot::LIVED, LIFETIME, lived)?;
    }
    if pair.device != 0 {
        let named = DEVICES.get_ptr(&pair.device).is_none();
        // SAFETY: a map value.
        unsafe { add(&raw mut (*device(pair.device, named)?).destroyed, 1) };
    }
    Ok(())
}

/// `ib_uverbs_qp_event_handler(struct ib_event *event, void *)` of ib_uverbs: what the device reports of a queue pair
/// of user space, in whatever context its interrupt ran.
#[kprobe]
pub fn qp_event(ctx: ProbeContext) -> u32 {
    if let Err(loss) = try_qp_event(Registers::of(&ctx).argument::<0>()) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn try_qp_event(event: u64) -> Result<(), Loss> {
    let address: u64 = read(event, EVENT_ELEMENT)?;
    let code: u32 = read(event, EVENT_CODE)?;
    let pair = match PAIRS.get_ptr(&address) {
        Some(pair) => *unsafe_value(pair),
        None => old(address)?,
    };
    let kind = match code {
        1..=7 => u64::from(code) - 1,
        16 => 7,
        _ => EVENTS.len() as u64 - 1,
    };
    count_in(pair.cgroup, slot::ASYNC, EVENTS.len(), kind, 1)
}

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
    // SAFETY: the helpers take no arguments.
    let resolving = unsafe {
        Resolving {
            cgroup: bpf_get_current_cgroup_id(),
            started: bpf_ktime_get_ns(),
        }
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
    let Some(resolving) = RESOLVING.get_ptr(&key) else {
        return;
    };
    let Resolving { cgroup, started } = *unsafe_value(resolving);
    let _ = RESOLVING.remove(&key);
    let base = match function {
        Function::ResolveAddress => slot::ADDRESS,
        _ => slot::ROUTE,
    };
    // SAFETY: the helper takes no arguments.
    let took = unsafe { bpf_ktime_get_ns() } - started;
    if let Err(loss) = observe(cgroup, base + result * LATENCY.slots(), LATENCY, took) {
        lose(&LOST, loss);
    }
}

/// `cma_cm_event_handler(struct rdma_id_private *id_priv, struct rdma_cm_event *event)` of rdma_cm: every event passes
/// it. The id is the first member of the private one, the code the first of the event.
#[kprobe]
pub fn cm_event(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    let id = registers.argument::<0>();
    // RDMA_CM_EVENT_ADDR_RESOLVED, _ADDR_ERROR, _ROUTE_RESOLVED, _ROUTE_ERROR (include/rdma/rdma_cm.h, uapi).
    match read::<u32>(registers.argument::<1>(), 0) {
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

/// `ib_uverbs_reg_mr`, `ib_uverbs_handler_UVERBS_METHOD_REG_MR` and `…_REG_DMABUF_MR` of ib_uverbs.
#[kprobe]
pub fn register(_: ProbeContext) -> u32 {
    enter(Function::Register, &Call::default());
    0
}

/// Returns 0 for success.
#[kretprobe]
pub fn register_return(ctx: RetProbeContext) -> u32 {
    if let Some(call) = leave(Function::Register)
        && is_success(Registers::of(&ctx).returned())
    {
        // A device that pins memory by itself (none upstream since 6.10) tells neither kind nor size.
        let kind = usize::from(call.known == 2);
        // SAFETY: the helper takes no arguments.
        let cgroup = unsafe { bpf_get_current_cgroup_id() };
        let result = count(cgroup, slot::REGIONS + kind, 1)
            .and_then(|()| count(cgroup, slot::BYTES + kind, call.detail));
        if let Err(loss) = result {
            lose(&LOST, loss);
        }
    }
    0
}

/// Takes the size of the first memory that is pinned during a registration.
#[inline(always)]
fn pinned(size: u64, known: u64) {
    if let Some(call) = CALLS.get_ptr_mut(&call_key(Function::Register)) {
        // SAFETY: a map value that only this thread writes.
        unsafe {
            if (*call).known == 0 {
                (*call).known = known;
                (*call).detail = size;
            }
        }
    }
}

/// `ib_umem_get(dev, addr, size, …)` and `ib_umem_odp_get(dev, addr, size, …)`.
#[kprobe]
pub fn pin_user(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<2>(), 1);
    0
}

/// `ib_umem_get_attr_or_va(dev, attrs, attr_id, addr, size, …)`, which takes the place of `ib_umem_get` from 7.2.
#[kprobe]
pub fn pin_user_attr(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<4>(), 1);
    0
}

/// `ib_umem_dmabuf_get(dev, offset, size, …)` and its relatives with the same order of arguments.
#[kprobe]
pub fn pin_dmabuf(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<2>(), 2);
    0
}

/// `ib_umem_dmabuf_get_pinned_with_dma_device(dev, dma_device, offset, size, …)`.
#[kprobe]
pub fn pin_dmabuf_for(ctx: ProbeContext) -> u32 {
    pinned(Registers::of(&ctx).argument::<3>(), 2);
    0
}
