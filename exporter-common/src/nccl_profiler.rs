// SPDX-License-Identifier: Apache-2.0
//! What the NCCL profiler plugin hands to the functions that the exporter probes.

/// What the plugin tells of: handed by address, as first argument, to the exported functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Told {
    /// NCCL's own number of the communicator (commHash of ABI v4, commId of v5 and newer), the same in all ranks.
    pub communicator: u64,
    /// Which one of its operation in the communicator (NCCL's seqNumber).
    pub sequence: u64,
    /// When finished: nanoseconds of the GPU's clock from the first channel's start to the last one's stop; else 0.
    pub duration: u64,
    /// Its rank.
    pub rank: u32,
    /// Ranks of the communicator.
    pub ranks: u32,
    /// A [`crate::nccl::Operation`].
    pub operation: u32,
    /// When finished: [`FINE`], or why not to be used.
    pub outcome: u32,
}

/// The duration can be used.
pub const FINE: u32 = 0;
