// SPDX-License-Identifier: Apache-2.0
//! NCCL: when the ranks of a node call it, how long they wait for each other, how long initialisation takes.
//!
//! A *group* is what this node has of a communicator: its ranks here, each on a *seat* of it. What the host's calls tell and what
//! the profiler plugin tells are groups of their own.

use crate::histogram::Shape;

/// Seats of a group. Ranks of one communicator on one node beyond these are not seen, and counted as lost.
pub const MAX_SEATS: usize = 64;

/// Groups, over all pods and processes.
pub const MAX_GROUPS: u32 = 2048;

/// Communicators of all processes. One more counts as lost.
pub const MAX_COMMUNICATORS: u32 = 4096;

/// Collectives that some rank has joined and another has not, at once: a rank that comes late does so by hundreds.
pub const MAX_PAIRS: u32 = 2048;

/// Collectives that the plugin has told the start of, and not the end. One job on eight GPUs may have some thousand.
pub const MAX_STARTED: u32 = 16384;

/// Processes that have a communicator, on a node with several versions of NCCL.
pub const MAX_PROCESSES: u32 = 2048;

/// Their cgroups.
pub const MAX_OWNERS: u32 = 96;

/// Calls in progress: at most one and its inner ones for each thread, and of a library without symbols which of them is outermost.
pub const MAX_IN_PROGRESS: u32 = 2048;

/// Cgroups of which it is known how much of the maps they have.
pub const MAX_SHARES: u32 = 256;

/// What a cgroup has a share of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Share {
    /// Ranks: each has a seat, and most a communicator.
    Seats = 0,
    /// Groups, of the cgroup of whose rank was the first.
    Groups = 1,
    /// Collectives that wait for a rank, of the cgroup that has the group.
    Pairs = 2,
    /// Collectives whose start the plugin has told.
    Started = 3,
    /// Calls in progress.
    Calls = 4,
}

/// How much of each a cgroup may have at once, so that no job takes the room of all others.
pub const SHARE: [u64; 5] = [
    MAX_COMMUNICATORS as u64 / 4,
    MAX_GROUPS as u64 / 4,
    MAX_PAIRS as u64 / 2,
    MAX_STARTED as u64 / 2,
    MAX_IN_PROGRESS as u64 / 2,
];

/// By [`Share`], how many a cgroup has taken, less what the kernel half has given back: the value of the map `SHARES`, whose key is a
/// cgroup id (`u64`), or [`crate::NO_CGROUP`] for all for which there is no room. By how much that is too many user space tells in the map
/// `RETURNED`, by the same key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Shares {
    /// Those.
    pub counts: [u64; SHARE.len()],
}

/// Collectives that are being completed, at most one for each CPU.
pub const MAX_CLAIMS: u32 = 256;

/// What is done: the labels, in the order of [`Operation`]. New ones come at the end: the plugin in a job may be older than the exporter.
pub const OPERATIONS: [&str; 14] = [
    "broadcast",
    "reduce",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "gather",
    "scatter",
    "send",
    "recv",
    "other",
    "put_signal",
    "signal",
    "wait_signal",
];

/// How many of [`OPERATIONS`] are collectives, in which all ranks take part. They come first.
pub const COLLECTIVES: usize = 8;

/// Operations of which a communicator of NCCL itself counts how many there were (`seqNumber`). They come first, in its order
/// (`ncclFunc_t`, alike from 2.18 to 2.32).
pub const NUMBERED: usize = 5;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Operation {
    /// ncclBroadcast.
    Broadcast = 0,
    /// ncclReduce.
    Reduce = 1,
    /// ncclAllGather.
    AllGather = 2,
    /// ncclReduceScatter.
    ReduceScatter = 3,
    /// ncclAllReduce.
    AllReduce = 4,
    /// ncclAlltoAll, from 2.28 on; ncclAllToAll and ncclAllToAllv of RCCL.
    AllToAll = 5,
    /// ncclGather, from 2.28 on.
    Gather = 6,
    /// ncclScatter, from 2.28 on.
    Scatter = 7,
    /// ncclSend.
    Send = 8,
    /// ncclRecv.
    Recv = 9,
    /// What the plugin has no name for.
    Other = 10,
    /// ncclPutSignal, from 2.29 on: data into a peer's memory, and a signal.
    PutSignal = 11,
    /// ncclSignal, from 2.29 on.
    Signal = 12,
    /// ncclWaitSignal, from 2.29 on.
    WaitSignal = 13,
}

/// Phases of an initialisation: the labels, in the order of [`Phase`].
pub const PHASES: [&str; 4] = ["rendezvous", "allocate", "transports", "total"];

/// A phase of an initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Phase {
    /// Until all ranks have met (`bootstrapInit`, `bootstrapSplit`).
    Rendezvous = 0,
    /// Memory (`commAlloc`).
    Allocate = 1,
    /// Queue pairs, sockets, shared memory (`initTransportsRank`).
    Transports = 2,
    /// All of it.
    Total = 3,
}

/// How long a call takes on the host: 32 µs to 131 ms, by factors of sixteen.
pub const CALL: Shape = Shape {
    first: 32_000,
    bounds: 4,
    step: 4,
};

/// How long a rank waits for the last one, or a collective takes: 16 µs to 262 ms, by factors of four.
pub const WAIT: Shape = Shape {
    first: 16_000,
    bounds: 8,
    step: 2,
};

/// How long an initialisation takes: 250 ms to 256 s, by factors of four, 64 s among them.
pub const INIT: Shape = Shape {
    first: 250_000_000,
    bounds: 6,
    step: 2,
};

/// Who tells when a rank arrives: the labels, in the order of [`Source`].
pub const SOURCES: [&str; 2] = ["host", "kernel"];

/// Who tells when a rank arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Source {
    /// The call of NCCL.
    Host = 0,
    /// The GPU's kernel, through the profiler plugin.
    Kernel = 1,
}

/// Where a histogram of `shape`, the `index`-th of its kind, begins among the slots of [`Owner`].
const fn place(before: usize, shape: Shape, index: usize) -> usize {
    before + index * shape.slots()
}

/// Where the histogram of an operation's host time begins: [`CALL`].
pub const fn call_slots(operation: usize) -> usize {
    place(0, CALL, operation)
}

/// Where that of the waits of a collective begins: [`WAIT`]. The plugin tells those of the first [`NUMBERED`] only.
pub const fn wait_slots(source: usize, operation: usize) -> usize {
    place(
        call_slots(OPERATIONS.len()),
        WAIT,
        source * COLLECTIVES + operation,
    )
}

/// Where that of the duration of a collective begins: [`WAIT`].
pub const fn duration_slots(operation: usize) -> usize {
    place(wait_slots(1, NUMBERED), WAIT, operation)
}

/// Where that of a phase begins: [`INIT`].
pub const fn init_slots(phase: usize) -> usize {
    place(duration_slots(COLLECTIVES), INIT, phase)
}

/// The slot of launches of CUDA graphs.
pub const GRAPH_SLOT: usize = init_slots(PHASES.len());

/// How many counters an owner has.
pub const SLOTS: usize = GRAPH_SLOT + 1;

/// The value of the map `OWNERS`, whose key is a cgroup id (`u64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// Histograms, as the functions above say where, and launches of graphs. Only ever added to.
    pub slots: [u64; SLOTS],
}

/// What a rank calls its communicator: an `ncclComm_t` in its process, or what the plugin tells. The key of the map
/// `COMMUNICATORS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Handle {
    /// The process, and in the upper half the [`Source`].
    pub process: u64,
    /// Its address, or what the plugin calls it.
    pub address: u64,
}

/// What a rank has of its communicator: the value of the map `COMMUNICATORS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Communicator {
    /// Its group.
    pub group: u64,
    /// Its seat there.
    pub seat: u64,
    /// Bits: [`LATE`], [`LEARNT`], [`ANCHORED`].
    pub state: u64,
    /// Communicators that were split from it.
    pub children: u64,
    /// By the plugin: of its collectives that have finished, when the one that started last did, as CLOCK_MONOTONIC in
    /// nanoseconds. What started before and has not finished is lost.
    pub finished: u64,
    /// The number of its next collective, by [`Operation`]. Those of the first [`NUMBERED`] are counted, as NCCL does; of the others
    /// it is how many of the first there were, and in the low 16 bits how many of its own since the last of these.
    pub made: [u64; COLLECTIVES],
}

impl Communicator {
    /// Where it sits.
    pub const fn seat(&self) -> Seat {
        Seat {
            group: self.group,
            index: self.seat,
        }
    }
}

/// Of a communicator whose beginning was not seen: how many collectives it has made is asked of it at each.
pub const LATE: u64 = 1;

/// Of a communicator that has been asked for its number and its rank, or cannot be.
pub const LEARNT: u64 = 2;

/// Of a late communicator of which a collective with a number has been seen since.
pub const ANCHORED: u64 = 4;

/// The value of the map `GROUPS`, whose key is a number that all ranks of a communicator agree on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Group {
    /// Ranks here that have begun to initialise and not ended, and those that are gone without a word. By how much it is too many user
    /// space tells in the map `LEFT`, by the same key, since the kernel half adds to this meanwhile.
    pub members: u64,
    /// Ranks everywhere; 0 if that is not known.
    pub ranks: u64,
    /// NCCL's own number of the communicator, the same on all nodes; 0 as long as that is not known.
    pub hash: u64,
    /// CLOCK_MONOTONIC in nanoseconds when a rank was last found whose beginning had not been seen; 0 if all were.
    pub adopted: u64,
    /// The cgroup that it is a part of the share of.
    pub cgroup: u64,
}

/// The key of the map `SEATS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Seat {
    /// The group.
    pub group: u64,
    /// Below [`MAX_SEATS`].
    pub index: u64,
}

/// The value of the map `SEATS`: a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Member {
    /// The cgroup of its process.
    pub cgroup: u64,
    /// Which of the communicator's handles it is.
    pub handle: Handle,
    /// Its rank; [`NO_RANK`] if that is not known.
    pub rank: u64,
    /// Nanoseconds that it has waited for the last one.
    pub wait: u64,
    /// Collectives that all ranks here have joined.
    pub collectives: u64,
    /// Those of them in which it was the last.
    pub last: u64,
    /// Nanoseconds that its collectives took on the GPU.
    pub duration: u64,
    /// 1 when it has ended: what it counted is to be read once more.
    pub ended: u64,
}

/// The rank of a communicator that cannot tell it.
pub const NO_RANK: u64 = u64::MAX;

/// A collective of a group: the key of the map `PAIRS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Pair {
    /// The group.
    pub group: u64,
    /// An [`Operation`].
    pub operation: u64,
    /// Which of its operation.
    pub sequence: u64,
}

/// The value of the map `PAIRS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Arrivals {
    /// Ranks that are to come.
    pub expected: u64,
    /// Ranks that have come.
    pub count: u64,
    /// CLOCK_MONOTONIC in nanoseconds when the first was seen.
    pub since: u64,
    /// When each seat arrived; 0 if it has not. On the host CLOCK_MONOTONIC in nanoseconds; from the plugin a number that is the
    /// less the longer the collective took, since they end together.
    pub at: [u64; MAX_SEATS],
}

/// What an arrival by the plugin is counted from: the duration is taken off.
pub const TOGETHER: u64 = 1 << 62;

/// What a version of NCCL has in a communicator, in bytes: the value of the map `LAYOUTS`, whose key is a process id (`u32`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Layout {
    /// `commHash`, u64. [`crate::ABSENT`] if nothing is known of this version.
    pub hash: u32,
    /// `rank`, i32.
    pub rank: u32,
    /// `nRanks`, i32.
    pub ranks: u32,
    /// `seqNumber`, u64 for each of the first [`NUMBERED`] operations; [`crate::ABSENT`] before 2.23.
    pub sequence: u32,
}

/// The key of the map `LAYOUTS` for processes that have none of their own: there if all libraries are alike.
pub const ANY_PROCESS: u32 = 0;

/// [`Layout::hash`] of a process that has a communicator of which user space has not told the layout yet.
pub const WANTED: u32 = u32::MAX - 1;

/// What stands at the beginning of a communicator since 2.21 (`startMagic`).
pub const MAGIC: u64 = 0x0280_0280_0280_0280;

/// What names a call between entry and return: the key of the map `IN_PROGRESS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Frame {
    /// Process (upper half) and thread.
    pub thread: u64,
    /// The address of its stack frame; 1 more for a phase of an initialisation. Or [`OUTERMOST`].
    pub address: u64,
}

/// What names, in place of an address, the operation of a thread that no other one has called, where that is asked for: in libraries that
/// are probed at what they export.
pub const OUTERMOST: u64 = 1;

/// The value of the map `IN_PROGRESS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Begun {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub at: u64,
    /// An [`Operation`] or a [`Phase`].
    pub what: u64,
    /// Of an initialisation: where the communicator will be told. Of an operation that is [`OUTERMOST`]: its frame.
    pub told_at: u64,
    /// Its group.
    pub group: u64,
    /// Its rank.
    pub rank: u64,
    /// Ranks of the communicator; of one that initialises all at once, how many.
    pub ranks: u64,
    /// The cgroup of its process.
    pub cgroup: u64,
}

/// What the plugin has told the start of: the key of the map `STARTED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Started {
    /// Which communicator of which process.
    pub handle: Handle,
    /// Which rank of it (there are several in a process that drives several GPUs), and in the upper half the [`Operation`].
    pub rank: u64,
    /// Which of its operation.
    pub sequence: u64,
}

/// The value of the map `STARTED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Since {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub at: u64,
    /// The cgroup of the process.
    pub cgroup: u64,
}

const _: () = {
    assert!(size_of::<Owner>() == 8 * SLOTS, "no padding");
    assert!(size_of::<Handle>() == 16, "no padding");
    assert!(
        size_of::<Communicator>() == 40 + 8 * COLLECTIVES,
        "no padding"
    );
    assert!(size_of::<Group>() == 40, "no padding");
    assert!(size_of::<Shares>() == 8 * SHARE.len(), "no padding");
    assert!(size_of::<Seat>() == 16, "no padding");
    assert!(size_of::<Member>() == 72, "no padding");
    assert!(size_of::<Pair>() == 24, "no padding");
    assert!(size_of::<Arrivals>() == 24 + 8 * MAX_SEATS, "no padding");
    assert!(size_of::<Layout>() == 16, "no padding");
    assert!(size_of::<Frame>() == 16, "no padding");
    assert!(size_of::<Begun>() == 56, "no padding");
    assert!(size_of::<Started>() == 32, "no padding");
    assert!(size_of::<Since>() == 16, "no padding");
};

#[cfg(feature = "user")]
mod user {
    macro_rules! pods {
        ($($name:ident),* $(,)?) => { $(
            // SAFETY: `repr(C)` of integers without padding (asserted above), so every bit pattern is valid.
            unsafe impl aya::Pod for super::$name {}
        )* };
    }
    pods!(
        Owner,
        Handle,
        Communicator,
        Group,
        Shares,
        Seat,
        Member,
        Pair,
        Arrivals,
        Layout,
        Frame,
        Begun,
        Started,
        Since,
    );
}
