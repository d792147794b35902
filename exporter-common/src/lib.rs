// SPDX-License-Identifier: Apache-2.0
//! The contract between the kernel half and the user half: keys, values, sizes.
//!
//! Everything here is `repr(C)` with fixed-width fields and no padding, asserted beside each type.
#![no_std]

pub mod encryption;
pub mod gpu;
pub mod histogram;
pub mod nccl;
pub mod nccl_profiler;
pub mod rdma;
pub mod tcp;

/// A field offset that this kernel does not have. The verifier knows the value of the frozen constant and
/// prunes every branch that needs the field.
pub const ABSENT: u32 = u32::MAX;

/// The owner of an event whose cgroup cannot be known. No cgroup has id 0: kernfs numbers its nodes from 1.
pub const NO_CGROUP: u64 = 0;

/// Cgroups that one map can hold at once. A large node has 250 pods of 2 containers and some 200 host units; this
/// leaves a factor of ten. When a map is full, the event counts as [`Loss::MapFull`].
pub const MAX_CGROUPS: u32 = 8192;

/// Why the kernel half lost an event. The value is the index into the object's `LOST` map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Loss {
    /// The map had no room for another owner.
    MapFull = 0,
    /// A kernel object could not be read.
    Unreadable = 1,
    /// A function was entered again by a thread whose last return from it had not been seen.
    MissedReturn = 2,
    /// A packet that was to be timed, whose crypto went on in another thread or took impossibly long: it is counted, its CPU
    /// time is taken from others. A job of a GPU whose end was never told.
    Untimed = 3,
    /// A thread that drives a GPU came onto a CPU unseen.
    MissedSwitch = 4,
}

impl Loss {
    /// All reasons, in the order of their indexes, with the label that each has in `chandra_lost_events_total`.
    pub const LABELS: [(Self, &str); 5] = [
        (Self::MapFull, "map_full"),
        (Self::Unreadable, "unreadable"),
        (Self::MissedReturn, "missed_return"),
        (Self::Untimed, "untimed"),
        (Self::MissedSwitch, "missed_switch"),
    ];
}
