// SPDX-License-Identifier: Apache-2.0
//! RDMA: queue pairs, address and route resolutions and memory registrations, by owner.

use crate::histogram::Shape;

/// Cgroups that use RDMA at once. A node has one or a few for each NIC or GPU; this leaves a factor of a hundred.
pub const MAX_OWNERS: u32 = 1536;

/// Queue pairs of user space that can exist at once. NCCL makes at most some thousand on a node; storage and MPI
/// all-to-all some ten thousand.
pub const MAX_QUEUE_PAIRS: u32 = 32768;

/// Queue pairs older than the exporter whose owner user space has found out.
pub const MAX_OLD_QUEUE_PAIRS: u32 = 16384;

/// RDMA devices: those that are enumerated, and those that can be met between two loads of the object. A node has some ten, with
/// virtual functions (SR-IOV) some hundred.
pub const MAX_DEVICES: u32 = 256;

/// Calls in progress: at most one of each function for each thread that is in the kernel.
pub const MAX_CALLS: u32 = 8192;

/// Resolutions in progress.
pub const MAX_RESOLUTIONS: u32 = 4096;

/// Bytes of a device's name (`IB_DEVICE_NAME_MAX`, unchanged since 2.6.11).
pub const DEVICE_NAME: usize = 64;

/// Bytes of `struct ib_device` that hold its name wherever ib_core carries no BTF: the name follows the table of
/// operations, some hundred and fifty pointers.
pub const WINDOW: usize = 2048;

/// States of a queue pair in the order of `enum ib_qp_state` (include/rdma/ib_verbs.h), as `rdma resource` spells them.
pub const STATES: [&str; 7] = ["RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"];

/// `IB_QPS_RTS`.
pub const RTS: u32 = 3;

/// Asynchronous events of a queue pair: the code of `enum ib_event_type` and the label. The last label takes every
/// other code.
pub const EVENTS: [(u32, &str); 9] = [
    (1, "fatal"),
    (2, "request_error"),
    (3, "access_error"),
    (4, "communication_established"),
    (5, "send_queue_drained"),
    (6, "path_migrated"),
    (7, "path_migration_error"),
    (16, "last_wqe_reached"),
    (u32::MAX, "other"),
];

/// What a resolution came to.
pub const RESULTS: [&str; 2] = ["ok", "error"];

/// What memory was registered: of the process, or a dma-buf (GPUDirect).
pub const MEMORY: [&str; 2] = ["user", "dmabuf"];

/// Create → destroy: 1 ms to 4.7 h.
pub const LIFETIME: Shape = Shape {
    first: 1_000_000,
    bounds: 13,
    step: 2,
};

/// Create → RTS, and resolutions: 16 µs to 16.8 s.
pub const LATENCY: Shape = Shape {
    first: 16_000,
    bounds: 11,
    step: 2,
};

/// Where each counter lies in [`Usage::slots`].
pub mod slot {
    use super::{EVENTS, LATENCY, LIFETIME, MEMORY, RESULTS, STATES};

    /// Queue pairs created.
    pub const CREATED: usize = 0;
    /// Queue pairs destroyed.
    pub const DESTROYED: usize = 1;
    /// Successful modifies to each state.
    pub const TRANSITIONS: usize = 2;
    /// Asynchronous events.
    pub const ASYNC: usize = TRANSITIONS + STATES.len();
    /// A histogram of [`LIFETIME`].
    pub const LIVED: usize = ASYNC + EVENTS.len();
    /// A histogram of [`LATENCY`].
    pub const CONNECTED: usize = LIVED + LIFETIME.slots();
    /// A histogram of [`LATENCY`] for each result.
    pub const ADDRESS: usize = CONNECTED + LATENCY.slots();
    /// A histogram of [`LATENCY`] for each result.
    pub const ROUTE: usize = ADDRESS + RESULTS.len() * LATENCY.slots();
    /// Memory regions of each kind.
    pub const REGIONS: usize = ROUTE + RESULTS.len() * LATENCY.slots();
    /// Bytes of the memory regions of each kind.
    pub const BYTES: usize = REGIONS + MEMORY.len();
    /// How many there are.
    pub const ALL: usize = BYTES + MEMORY.len();
}

/// The value of the map `USAGE`, whose key is the cgroup id (`u64`) of the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Usage {
    /// Counters by [`slot`]; only ever added to, by the kernel.
    pub slots: [u64; slot::ALL],
}

/// A queue pair of user space: the value of the map `PAIRS`, whose key is the address of its `struct ib_qp` (`u64`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pair {
    /// Cgroup id of the thread that created it.
    pub cgroup: u64,
    /// CLOCK_MONOTONIC in nanoseconds at its creation; 0 where that was before the exporter's start.
    pub created: u64,
    /// Address of its `struct ib_device`; 0 if unknown.
    pub device: u64,
    /// Index of its device, as nldev numbers it; [`crate::ABSENT`] if unknown.
    pub index: u32,
    /// Its number on the device; [`crate::ABSENT`] if unknown.
    pub number: u32,
    /// 1 once it has been in RTS.
    pub connected: u64,
}

/// The key of the map `OLD_PAIRS`, whose value is the owner's cgroup id (`u64`), filled by user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Number {
    /// Index of the device.
    pub index: u32,
    /// The queue pair's number on it.
    pub number: u32,
}

/// The value of the map `DEVICES`, whose key is the address of a `struct ib_device` (`u64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Device {
    /// Queue pairs that user space created on it.
    pub created: u64,
    /// Queue pairs of user space that were destroyed on it.
    pub destroyed: u64,
    /// The name, in the first [`DEVICE_NAME`] bytes, where its offset is known; else the start of the struct.
    pub window: [u8; WINDOW],
}

/// The functions whose calls are followed from entry to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Function {
    /// `ib_create_qp_user`.
    Create = 0,
    /// The uverbs handlers that create a queue pair.
    CreateHandler = 1,
    /// `ib_modify_qp_with_udata` and `ib_modify_qp`.
    Modify = 2,
    /// `ib_destroy_qp_user`.
    Destroy = 3,
    /// `rdma_resolve_addr`.
    ResolveAddress = 4,
    /// `rdma_resolve_route`.
    ResolveRoute = 5,
    /// The uverbs handlers that register memory.
    Register = 6,
}

/// The key of the map `CALLS`. All of these functions run in process context and none calls itself, except for the
/// destruction of an XRC target, which `destroy` deals with; so thread and function name one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CallKey {
    /// As `bpf_get_current_pid_tgid` gives it.
    pub thread: u64,
    /// A [`Function`].
    pub function: u64,
}

/// A call in progress: the value of the map `CALLS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// CLOCK_MONOTONIC in nanoseconds at the entry.
    pub entered: u64,
    /// Address of the queue pair, the cm_id or, for a creation, the device.
    pub object: u64,
    /// The state that a modify asks for, or the bytes that are registered.
    pub detail: u64,
    /// For a destroy, 1 if the pair was in `PAIRS`; for a registration, 1 + the kind of memory once that is known; for a
    /// handler of a creation, 1 if the pair's device is still to be found.
    pub known: u64,
    /// The queue pair, for modify and destroy.
    pub pair: Pair,
}

/// The key of the map `RESOLVING`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ResolvingKey {
    /// Address of the `struct rdma_cm_id`.
    pub id: u64,
    /// [`Function::ResolveAddress`] or [`Function::ResolveRoute`].
    pub function: u64,
}

/// A resolution in progress: the value of the map `RESOLVING`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Resolving {
    /// Cgroup id of the thread that asked.
    pub cgroup: u64,
    /// CLOCK_MONOTONIC in nanoseconds.
    pub started: u64,
}

const _: () = {
    assert!(size_of::<Usage>() == 8 * slot::ALL, "no padding");
    assert!(size_of::<Pair>() == 40, "no padding");
    assert!(size_of::<Number>() == 8, "no padding");
    assert!(size_of::<Device>() == 16 + WINDOW, "no padding");
    assert!(size_of::<CallKey>() == 16, "no padding");
    assert!(size_of::<Call>() == 72, "no padding");
    assert!(size_of::<ResolvingKey>() == 16, "no padding");
    assert!(size_of::<Resolving>() == 16, "no padding");
};

#[cfg(feature = "user")]
mod user {
    // SAFETY: each is `repr(C)` of integers or bytes without padding (asserted above), so every bit pattern is valid.
    unsafe impl aya::Pod for super::Usage {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Pair {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Number {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Device {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::CallKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Call {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ResolvingKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Resolving {}
}
