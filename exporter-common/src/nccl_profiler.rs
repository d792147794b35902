// SPDX-License-Identifier: Apache-2.0
//! NCCL: what the profiler plugin hands, in the process that uses NCCL, to the functions that the exporter probes.

/// Exported by the plugin: a communicator was made. `sequence`, `duration`, `operation` and `outcome` are 0.
pub const OPENED: &str = "nccl_profiler_opened";
/// Exported by the plugin: a collective was handed to the GPU's queue. `duration` and `outcome` are 0.
pub const STARTED: &str = "nccl_profiler_started";
/// Exported by the plugin: all channels of a collective have stopped, or no more is learned of it: see [`Told::outcome`].
pub const FINISHED: &str = "nccl_profiler_finished";
/// Exported by the plugin: a communicator was closed. `sequence`, `duration`, `operation` and `outcome` are 0. Of its
/// collectives that were still open nothing more is told.
pub const CLOSED: &str = "nccl_profiler_closed";

/// What the plugin tells of: handed by address, as first argument, to the exported functions. Valid during the call.
///
/// A collective is told of as started once; then as finished once, unless its communicator closes first. NCCL loses the
/// times of a channel now and then (its own rings hold 64 per channel), so that a collective stays open although it has
/// ended: one hangs only if nothing that started later in its communicator has finished either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Told {
    /// NCCL's own number of the communicator (`commHash` of ABI v4, `commId` of v5 and newer): the same in all ranks.
    pub communicator: u64,
    /// Which one of its operation in the communicator (NCCL's `seqNumber`): the same in all ranks.
    pub sequence: u64,
    /// Finished: nanoseconds of the GPU's clock from the first channel's start to the last one's stop; else 0.
    pub duration: u64,
    /// This rank.
    pub rank: u32,
    /// Ranks of the communicator.
    pub ranks: u32,
    /// An index into [`crate::nccl::OPERATIONS`].
    pub operation: u32,
    /// Finished: [`FINE`], [`IMPOSSIBLE`] or [`OVERWRITTEN`].
    pub outcome: u32,
}

/// The duration is true.
pub const FINE: u32 = 0;
/// A channel stopped before it started, or never reported both times, or the duration is over an hour: not to be used.
pub const IMPOSSIBLE: u32 = 1;
/// The plugin needed its place before it ended: nothing is known.
pub const OVERWRITTEN: u32 = 2;

/// Versions of NCCL that the plugin must not be used with. No ABI of the plugin tells it NCCL's version: the exporter,
/// which reads it from the library, can warn; the plugin cannot refuse.
pub const DENIED: &[(u32, u32, u32)] = &[
    // Crashes with events of kernel channels were reported.
    (2, 27, 7),
    // Segmentation fault of an all-to-all between nodes, with any profiler plugin: https://github.com/NVIDIA/nccl/issues/2112
    (2, 30, 3),
    // Events of kernel channels cost 4 to 13 % of an all-reduce of 128 KiB to 4 MiB, because they also switch on the times
    // of each kernel's phases: https://github.com/NVIDIA/nccl/issues/2355
    (2, 31, 2),
];

const _: () = assert!(size_of::<Told>() == 3 * 8 + 4 * 4, "no padding");

#[cfg(feature = "user")]
mod user {
    // SAFETY: `repr(C)` of integers without padding (asserted above), so every bit pattern is valid.
    unsafe impl aya::Pod for super::Told {}
}
