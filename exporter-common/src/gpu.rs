// SPDX-License-Identifier: Apache-2.0
//! GPU: processes that drive one, and how long their threads wait for a CPU.

use crate::histogram::Shape;

/// Processes that have a GPU's device open, at once. One more counts as lost.
pub const MAX_PROCESSES: u32 = 4096;

/// Threads of these. Those of eight training ranks are some thousands.
pub const MAX_THREADS: u32 = 16384;

/// Device files that drive a GPU.
pub const MAX_DEVICES: u32 = 384;

/// Cgroups of these processes.
pub const MAX_OWNERS: u32 = 1024;

/// Time from runnable to running: 4 µs to 8.4 s, by factors of two.
pub const DELAY: Shape = Shape {
    first: 4_000,
    bounds: 22,
    step: 1,
};

/// Who makes the device that is open: the labels, in the order of [`Driver`].
pub const DRIVERS: [&str; 4] = ["nvidia", "amdkfd", "drm", "other"];

/// Drivers that are told apart: those of [`DRIVERS`], and of accelerators, which user space numbers as they come. One more is
/// [`Driver::Other`].
pub const MAX_DRIVERS: usize = 16;

/// GPUs of NVIDIA that are told apart, those with the least numbers. Its driver takes as many (`NV_MAX_DEVICES` of nvlimits.h).
pub const MAX_GPUS: u32 = 32;

/// Who makes a device. The bit of a driver in [`Device::drivers`] is 1 shifted by its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Driver {
    /// nvidia-uvm, which CUDA opens and monitoring does not.
    Nvidia = 0,
    /// kfd, which ROCm opens.
    Amdkfd = 1,
    /// A render node.
    Drm = 2,
    /// A device that was named by flag.
    Other = 3,
}

/// What having a device open says of a process, or all that it has open: the value of the map `DEVICES`, whose key is the kernel's `dev_t`
/// (`u32`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Device {
    /// By which drivers it drives a GPU, a bit for each [`Driver`]. By none: it has an NVIDIA GPU open and does not compute on it, as monitoring
    /// does, or not yet.
    pub drivers: u32,
    /// Of NVIDIA's GPUs, a bit for each: N of `/dev/nvidiaN`, below [`MAX_GPUS`].
    pub gpus: u32,
}

/// A process that has a device of a GPU open: the value of the map `PROCESSES`, whose key is the process id (`u32`) in the initial
/// namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Process {
    /// Its cgroup when it was last seen with a device.
    pub cgroup: u64,
    /// Of [`Device`], as far as the search that is named below has come, and what it has opened since.
    pub gpus: u32,
    /// Of [`Device`], by the search before: it may have it still, as long as that search is under way.
    pub gpus_before: u32,
    /// As `gpus`.
    pub drivers: u16,
    /// As `gpus_before`.
    pub drivers_before: u16,
    /// The last search of open files that saw it, or was under way when it opened a device.
    pub search: u32,
}

impl Process {
    /// What it has open, where the last search that is through is `done`.
    pub const fn devices(&self, done: u32) -> Device {
        let (drivers, gpus) = if self.search == done {
            (self.drivers, self.gpus)
        } else {
            (
                self.drivers | self.drivers_before,
                self.gpus | self.gpus_before,
            )
        };
        Device {
            drivers: drivers as u32,
            gpus,
        }
    }
}

/// The place in the map `SEARCH` of the search of open files that is under way, or was the last.
pub const SEARCHING: u32 = 0;

/// That of the last one that is through.
pub const SEARCHED: u32 = 1;

/// A thread of these: the value of the map `THREADS`, whose key is the thread id (`u32`). What the kernel will have
/// counted for it once it runs (`struct sched_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Thread {
    /// Nanoseconds of `run_delay`, the wait before it runs now included.
    pub run_delay: u64,
    /// Arrivals on a CPU, this one included.
    pub arrivals: u64,
    /// Its process.
    pub process: u64,
}

/// The value of the map `DELAYS`, whose key is a cgroup id (`u64`): a histogram of [`DELAY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Delays {
    /// Only ever added to.
    pub slots: [u64; DELAY.slots()],
}

/// What a CPU knows of its run queue's clock: the value of the per-CPU map `CLOCKS`.
///
/// That clock and CLOCK_MONOTONIC differ by a number that hardly changes. But the run queue's clock stands still at times (a
/// wake-up that preempts reuses the last reading), and then lies behind: the least difference of late is the true one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Clock {
    /// The present window.
    pub window: u64,
    /// The least difference in it.
    pub least: u64,
    /// The least difference in the window before.
    pub before: u64,
}

/// Jobs of the kernel's GPU scheduler that are queued or run, at once. One more counts as lost.
pub const MAX_JOBS: u32 = 4096;

/// Cgroups with the rings on which their jobs run. One more counts as lost.
pub const MAX_RINGS: u32 = 512;

/// Time of a job in its queue or on the hardware: 4 µs to 17 s, by factors of four.
pub const JOB: Shape = Shape {
    first: 4_000,
    bounds: 12,
    step: 2,
};

/// Bytes of a device's or a ring's name, the rest 0; a longer one is cut.
pub const NAME: usize = 24;

/// Where a job runs, and whose it is: the key of the map `RINGS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Ring {
    /// The cgroup that submitted.
    pub cgroup: u64,
    /// The device, all 0 where the kernel does not tell (before 6.16).
    pub device: [u8; NAME],
    /// The hardware's ring or the driver's queue before it.
    pub name: [u8; NAME],
}

/// A job between its submission and its end: the value of the map `JOBS`, whose key is `[u64; 2]`: its fence's context and
/// sequence number, or the fence's address and 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Job {
    /// Where it will run.
    pub ring: Ring,
    /// CLOCK_MONOTONIC in nanoseconds when it was queued, and from the handover to the hardware on, when that was.
    pub since: u64,
    /// 1 from the handover on.
    pub runs: u64,
}

/// The value of the map `RINGS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Jobs {
    /// Two histograms of [`JOB`]: queued, and run. Only ever added to.
    pub slots: [u64; 2 * JOB.slots()],
}

/// Nanoseconds of a [`Clock::window`], as a power of two: 134 ms.
pub const WINDOW_BITS: u32 = 27;

/// Calls of the CUDA driver that are timed: the labels, in the order of [`CudaCall`].
pub const CUDA_CALLS: [&str; 6] = [
    "launch",
    "stream_synchronize",
    "event_synchronize",
    "context_synchronize",
    "memcpy",
    "graph_launch",
];

/// What a call of the CUDA driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CudaCall {
    /// It launches a kernel.
    Launch = 0,
    /// It waits for a stream.
    StreamSynchronize = 1,
    /// It waits for an event.
    EventSynchronize = 2,
    /// It waits for the whole device.
    ContextSynchronize = 3,
    /// It copies, and returns when that is done.
    Memcpy = 4,
    /// It launches a graph.
    GraphLaunch = 5,
}

/// How long such a call takes: 4 µs to 4.2 s, by factors of four.
pub const CUDA_CALL: Shape = Shape {
    first: 4_000,
    bounds: 11,
    step: 2,
};

/// Slots of each of [`CUDA_CALLS`]: how long it took, and how long of that its thread was runnable and did not run.
pub const CUDA_CALL_SLOTS: usize = 2 * CUDA_CALL.slots();

/// Cgroups of those that call.
pub const MAX_CUDA_OWNERS: u32 = 192;

/// Calls in progress: at most one for each thread. One more counts as lost.
pub const MAX_CUDA_IN_PROGRESS: u32 = 4096;

/// The value of the map `CALLS`, whose key is a cgroup id (`u64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CudaCalls {
    /// By [`CudaCall`], [`CUDA_CALL_SLOTS`] each: two histograms of [`CUDA_CALL`]. Only ever added to.
    pub slots: [u64; CUDA_CALLS.len() * CUDA_CALL_SLOTS],
}

/// What names a call between entry and return: the key of the map `IN_PROGRESS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct CudaFrame {
    /// Process (upper half) and thread.
    pub thread: u64,
    /// The address of its stack frame, which is one call's alone in a thread.
    pub address: u64,
}

/// The value of the map `IN_PROGRESS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CudaBegun {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub at: u64,
    /// What the thread had waited for a CPU since it began.
    pub run_delay: u64,
    /// A [`CudaCall`].
    pub call: u64,
}

const _: () = {
    assert!(
        size_of::<CudaCalls>() == 8 * CUDA_CALLS.len() * CUDA_CALL_SLOTS,
        "no padding"
    );
    assert!(size_of::<CudaFrame>() == 16, "no padding");
    assert!(size_of::<CudaBegun>() == 24, "no padding");
    assert!(size_of::<Device>() == 8, "no padding");
    assert!(size_of::<Process>() == 24, "no padding");
    assert!(size_of::<Thread>() == 24, "no padding");
    assert!(size_of::<Delays>() == 8 * DELAY.slots(), "no padding");
    assert!(size_of::<Clock>() == 24, "no padding");
    assert!(size_of::<Ring>() == 8 + 2 * NAME, "no padding");
    assert!(size_of::<Job>() == 24 + 2 * NAME, "no padding");
    assert!(size_of::<Jobs>() == 16 * JOB.slots(), "no padding");
};

#[cfg(feature = "user")]
mod user {
    // SAFETY: each is `repr(C)` of integers without padding (asserted above), so every bit pattern is valid.
    unsafe impl aya::Pod for super::Process {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Device {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Thread {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Delays {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Ring {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Job {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Jobs {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::CudaCalls {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::CudaFrame {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::CudaBegun {}
}
