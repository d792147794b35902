// SPDX-License-Identifier: Apache-2.0
//! NCCL's interface to profiler plugins: the tables that it looks up by name, newest first.
//!
//! NCCL 2.26 looks for v3, 2.27 for v4, 2.28 for v5, 2.29 and 2.30 for v6, 2.31 and 2.32 for v7. Layouts are those of
//! `profiler_vN.h` (<https://github.com/NVIDIA/nccl/tree/v2.30.7-1/src/include/plugin/profiler>); v7's is that of the
//! debug information of NCCL 2.32.3. Between v4 and v7 the fields that are read here stand where they stood, but for the
//! width of `kind` and the order of `init`'s arguments.

use core::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use core::ptr::{null_mut, without_provenance_mut};

use crate::{
    collectives::{self, Ticket},
    communicators::{self, Communicator},
};

/// Kinds of events: also the bits of the mask that `init` asks for.
mod kind {
    pub(super) const GROUP: u64 = 1 << 0;
    pub(super) const COLLECTIVE: u64 = 1 << 1;
    pub(super) const KERNEL_CHANNEL: u64 = 1 << 6;
}

/// `ncclProfilerKernelChStop`: the state whose argument is a channel's end.
const KERNEL_CHANNEL_STOP: c_int = 22;

/// `ncclSuccess`. Nothing here returns anything else: NCCL 2.27 goes on without its profiler after an error of one
/// communicator, and forgets to close the others.
const SUCCESS: c_int = 0;

/// `ncclDebugLogger_t`: level, subsystems, file or function, line, format.
type Logger = unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, ...);
/// `NCCL_LOG_WARN`.
const WARN: c_int = 2;
/// `NCCL_INIT`.
const INIT: c_ulong = 1;

/// The head of `ncclProfilerEventDescr_vN_t`. A union by kind follows.
#[repr(C)]
struct Head<Kind> {
    kind: Kind,
    parent: *mut c_void,
    rank: c_int,
}

/// The descriptor of a collective, as far as it is read.
#[repr(C)]
struct Collective<Kind> {
    head: Head<Kind>,
    sequence: u64,
    operation: *const c_char,
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    root: c_int,
    data_type: *const c_char,
    channels: u8,
}

/// The descriptor of a kernel channel.
#[repr(C)]
struct KernelChannel<Kind> {
    head: Head<Kind>,
    channel: u8,
    /// Nanoseconds of the GPU's clock.
    time: u64,
}

// Kind is u8 in v4, u64 in v5 and newer.
const _: () = {
    assert!(core::mem::offset_of!(Collective<u8>, channels) == 24 + 56);
    assert!(core::mem::offset_of!(Collective<u64>, channels) == 24 + 56);
    assert!(core::mem::offset_of!(KernelChannel<u8>, time) == 24 + 8);
    assert!(core::mem::offset_of!(KernelChannel<u64>, time) == 24 + 8);
};

/// `ncclProfiler_vN_t`: 48 bytes.
#[repr(C)]
pub(crate) struct Table<Init> {
    name: *const c_char,
    init: Init,
    start: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *const c_void) -> c_int,
    stop: unsafe extern "C" fn(*mut c_void) -> c_int,
    record: unsafe extern "C" fn(*mut c_void, c_int, *const u64) -> c_int,
    finalize: unsafe extern "C" fn(*mut c_void) -> c_int,
}

// SAFETY: only a pointer to a constant string stands in the way, and nothing writes through it.
unsafe impl<Init> Sync for Table<Init> {}

type InitV3 = unsafe extern "C" fn(*mut *mut c_void, *mut c_int) -> c_int;
type InitV4 = unsafe extern "C" fn(
    *mut *mut c_void,
    *mut c_int,
    *const c_char,
    u64,
    c_int,
    c_int,
    c_int,
    Option<Logger>,
) -> c_int;
type InitV5 = unsafe extern "C" fn(
    *mut *mut c_void,
    u64,
    *mut c_int,
    *const c_char,
    c_int,
    c_int,
    c_int,
    Option<Logger>,
) -> c_int;

/// Declares tables by the name under which NCCL looks them up.
macro_rules! tables {
    ($($(#[$attribute:meta])* $symbol:ident: $signature:ty = $name:expr, $init:ident, $start:expr;)*) => { $(
        $(#[$attribute])*
        // SAFETY: no other symbol of the plugin has this name.
        #[unsafe(no_mangle)]
        pub(crate) static $symbol: Table<$signature> = Table {
            name: $name.as_ptr(),
            init: $init,
            start: $start,
            stop,
            record,
            finalize,
        };
    )* };
}

const NAME: &CStr = c"Chandra";

tables! {
    /// NCCL 2.26. Its kernel channels have no times, and its `init` has no logger: but NCCL writes the name.
    ncclProfiler_v3: InitV3 = c"Chandra (sees nothing: this NCCL is too old, 2.27 is needed)", init_v3, start_v3;
    /// NCCL 2.27.
    ncclProfiler_v4: InitV4 = NAME, init_v4, start::<u8>;
    /// NCCL 2.28.
    ncclProfiler_v5: InitV5 = NAME, init_v5, start::<u64>;
    /// NCCL 2.29 and 2.30.
    ncclProfiler_v6: InitV5 = NAME, init_v5, start::<u64>;
    /// NCCL 2.31 and 2.32.
    ncclProfiler_v7: InitV5 = NAME, init_v5, start::<u64>;
}

/// What NCCL keeps for the plugin and hands back: 64 bits that it only compares with NULL. No pointer of user space has
/// these highest bytes, so a stray pointer is recognised.
mod handle {
    use super::{Ticket, c_void, without_provenance_mut};

    const SHIFT: u32 = 56;
    const COMMUNICATOR: u64 = 0xc1;
    const GROUP: u64 = 0xc2;
    const COLLECTIVE: u64 = 0xc3;
    const CHANNEL: u64 = 0xc4;
    const CHANNEL_SHIFT: u32 = 48;

    fn pack(kind: u64, value: u64) -> *mut c_void {
        without_provenance_mut((kind << SHIFT | value) as usize)
    }

    fn unpack(handle: *mut c_void, kind: u64) -> Option<u64> {
        let bits = handle.addr() as u64;
        (bits >> SHIFT == kind).then_some(bits & ((1 << SHIFT) - 1))
    }

    pub(super) fn of_communicator(index: usize) -> *mut c_void {
        pack(COMMUNICATOR, index as u64)
    }

    pub(super) fn communicator(handle: *mut c_void) -> Option<usize> {
        unpack(handle, COMMUNICATOR).map(|index| index as usize)
    }

    /// Groups have nothing to remember. NCCL 2.27 starts collectives only in groups whose handle is not NULL.
    pub(super) fn of_group() -> *mut c_void {
        pack(GROUP, 0)
    }

    pub(super) fn of_collective(ticket: Ticket) -> *mut c_void {
        pack(COLLECTIVE, ticket.0)
    }

    pub(super) fn collective(handle: *mut c_void) -> Option<Ticket> {
        unpack(handle, COLLECTIVE).map(Ticket)
    }

    pub(super) fn of_channel(ticket: Ticket, channel: u8) -> *mut c_void {
        pack(CHANNEL, u64::from(channel) << CHANNEL_SHIFT | ticket.0)
    }

    pub(super) fn channel(handle: *mut c_void) -> Option<(Ticket, u8)> {
        let value = unpack(handle, CHANNEL)?;
        Some((
            Ticket(value & ((1 << CHANNEL_SHIFT) - 1)),
            (value >> CHANNEL_SHIFT) as u8,
        ))
    }
}

unsafe extern "C" fn init_v3(context: *mut *mut c_void, mask: *mut c_int) -> c_int {
    // SAFETY: NCCL passes two places to write to.
    unsafe {
        *context = null_mut();
        *mask = 0;
    }
    SUCCESS
}

unsafe extern "C" fn init_v4(
    context: *mut *mut c_void,
    mask: *mut c_int,
    _name: *const c_char,
    number: u64,
    _nodes: c_int,
    ranks: c_int,
    rank: c_int,
    logger: Option<Logger>,
) -> c_int {
    // SAFETY: passed on as NCCL passed them.
    unsafe { init(context, mask, number, ranks, rank, logger) }
}

unsafe extern "C" fn init_v5(
    context: *mut *mut c_void,
    number: u64,
    mask: *mut c_int,
    _name: *const c_char,
    _nodes: c_int,
    ranks: c_int,
    rank: c_int,
    logger: Option<Logger>,
) -> c_int {
    // SAFETY: passed on as NCCL passed them.
    unsafe { init(context, mask, number, ranks, rank, logger) }
}

/// # Safety
/// `context` and `mask` can be written to; `logger` is NCCL's.
unsafe fn init(
    context: *mut *mut c_void,
    mask: *mut c_int,
    number: u64,
    ranks: c_int,
    rank: c_int,
    logger: Option<Logger>,
) -> c_int {
    let opened = communicators::open(number, rank as u32, ranks as u32);
    // SAFETY: by this function's contract. The mask is one for the whole process, so that a communicator without a place must
    // not clear it: NCCL calls for its events too, and gets no handles.
    unsafe {
        *context = opened.map_or(null_mut(), handle::of_communicator);
        *mask = (kind::GROUP | kind::COLLECTIVE | kind::KERNEL_CHANNEL) as c_int;
    }
    if let (None, Some(log)) = (opened, logger) {
        let message = c"Chandra: more than 1024 communicators are open, this one is not seen";
        // SAFETY: the format has no conversions, so it takes no further arguments.
        unsafe { log(WARN, INIT, c"chandra".as_ptr(), 0, message.as_ptr()) };
    }
    SUCCESS
}

unsafe extern "C" fn start_v3(_: *mut c_void, event: *mut *mut c_void, _: *const c_void) -> c_int {
    // SAFETY: NCCL passes a place to write to.
    unsafe { *event = null_mut() };
    SUCCESS
}

unsafe extern "C" fn start<Kind: Copy + Into<u64>>(
    context: *mut c_void,
    event: *mut *mut c_void,
    descriptor: *const c_void,
) -> c_int {
    // SAFETY: every descriptor begins with a head.
    let head = unsafe { &*descriptor.cast::<Head<Kind>>() };
    let started = match head.kind.into() {
        kind::GROUP => {
            communicators::get(handle::communicator(context)).map(|_| handle::of_group())
        }
        kind::COLLECTIVE => {
            communicators::get(handle::communicator(context)).and_then(|communicator| {
                // SAFETY: the kind says that it is a collective's.
                let collective = unsafe { &*descriptor.cast::<Collective<Kind>>() };
                start_collective(communicator, collective)
            })
        }
        kind::KERNEL_CHANNEL => handle::collective(head.parent).and_then(|ticket| {
            // SAFETY: the kind says that it is a kernel channel's.
            let channel = unsafe { &*descriptor.cast::<KernelChannel<Kind>>() };
            collectives::channel_started(ticket, channel.channel, channel.time)
                .then(|| handle::of_channel(ticket, channel.channel))
        }),
        _ => None,
    };
    // SAFETY: NCCL passes a place to write to.
    unsafe { *event = started.unwrap_or(null_mut()) };
    SUCCESS
}

fn start_collective<Kind>(
    communicator: &'static Communicator,
    collective: &Collective<Kind>,
) -> Option<*mut c_void> {
    let operation = if collective.operation.is_null() {
        collectives::OTHER
    } else {
        // SAFETY: NCCL passes one of its constant strings.
        collectives::operation(unsafe { name(collective.operation) })
    };
    collectives::start(
        communicator,
        operation,
        collective.sequence,
        collective.channels,
    )
    .map(handle::of_collective)
}

/// Returns a string as [`collectives::operation`] takes it. The C library's functions are not at hand.
///
/// # Safety
/// `string` ends with NUL.
unsafe fn name(string: *const c_char) -> u128 {
    let mut name = 0;
    for index in 0..size_of::<u128>() {
        // SAFETY: everything before was not NUL, so this is still inside of the string.
        match unsafe { *string.add(index) } {
            0 => break,
            letter => name = name << 8 | letter as u8 as u128,
        }
    }
    name
}

/// NCCL stops a collective once it is in the GPU's queue, which says nothing of its end.
unsafe extern "C" fn stop(event: *mut c_void) -> c_int {
    if let Some((ticket, _)) = handle::channel(event) {
        collectives::channel_stopped(ticket);
    }
    SUCCESS
}

unsafe extern "C" fn record(event: *mut c_void, state: c_int, argument: *const u64) -> c_int {
    if state == KERNEL_CHANNEL_STOP
        && !argument.is_null()
        && let Some((ticket, channel)) = handle::channel(event)
    {
        // SAFETY: with this state the argument is the time; it was checked to be there.
        collectives::channel_ended(ticket, channel, unsafe { *argument });
    }
    SUCCESS
}

/// NCCL 2.27 calls it with NULL for a communicator that got no context.
unsafe extern "C" fn finalize(context: *mut c_void) -> c_int {
    if let Some(index) = handle::communicator(context) {
        communicators::close(index);
    }
    SUCCESS
}
