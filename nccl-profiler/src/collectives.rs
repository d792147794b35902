// SPDX-License-Identifier: Apache-2.0
//! Collectives in flight: their channels, and what comes of their times.

use core::ptr;
use core::sync::atomic::{
    AtomicPtr, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use exporter_common::{
    nccl::Operation,
    nccl_profiler::{FINE, IMPOSSIBLE, OVERWRITTEN, Told},
};

use crate::{communicators::Communicator, nccl_profiler_finished, nccl_profiler_started};

/// Collectives that can be in flight at once. CUDA queues some 1024 kernels of a stream before a launch waits. A place has
/// 1088 bytes, and only as many are ever touched as were in flight together: 2.2 MB at most.
const PLACES: usize = 2048;

/// Channels of a collective: NCCL's `MAXCHANNELS`.
const CHANNELS: usize = 64;

/// A longer duration, in nanoseconds, is taken for a broken clock: an hour. NCCL's own watchdogs end a job earlier.
const LONGEST: i64 = 3_600_000_000_000;

/// A place and how often it was used, in 48 bits: generation × [`PLACES`] + place. No two collectives of a process have the same.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(pub(crate) u64);

impl Ticket {
    fn index(self) -> usize {
        self.0 as usize % PLACES
    }

    fn place(self) -> &'static Place {
        &ALL[self.index()]
    }

    /// The 16 bits of the generation that [`Stamp`] has for it.
    fn generation(self) -> u64 {
        (self.0 / PLACES as u64) & 0xffff
    }
}

static ALL: [Place; PLACES] = [const { Place::new() }; PLACES];

/// A place for a collective.
///
/// It is live while channels are left in its state. Whoever brings them to 0 has the place for itself until it frees it, but
/// for stamps: a thread that found its collective there may stamp a channel late, when the place is another's. Such a
/// stamp has another generation, and is not taken for a time; the other's channel, if its stamp was lost, makes it impossible.
#[repr(C, align(64))]
struct Place {
    /// The ticket, shifted by 8; below it the channels that have not stopped.
    state: AtomicU64,
    communicator: AtomicPtr<Communicator>,
    number: AtomicU64,
    sequence: AtomicU64,
    rank: AtomicU32,
    ranks: AtomicU32,
    operation: AtomicU32,
    channels: AtomicU32,
    /// While it is free: the free place below it, by [`link`].
    below: AtomicU32,
    times: [Times; CHANNELS],
}

/// The channels left in a state.
const LEFT: u64 = 0xff;

/// When a channel started, and when it stopped.
struct Times {
    start: Stamp,
    stop: Stamp,
}

const _: () = {
    assert!(PLACES.is_power_of_two());
    assert!((CHANNELS as u64) <= LEFT);
    assert!(size_of::<Place>() == 64 + 16 * CHANNELS);
};

/// A time of the GPU's clock with the generation of the place that it was written for, in one word: 48 bits of
/// nanoseconds, which turn over every 78 hours, and 16 of the generation. 0 is none.
struct Stamp(AtomicU64);

impl Stamp {
    const TIME_BITS: u32 = 48;

    fn set(&self, ticket: Ticket, time: u64) {
        let time = time & ((1 << Self::TIME_BITS) - 1);
        self.0
            .store(ticket.generation() << Self::TIME_BITS | time, Relaxed);
    }

    /// Clears it, and returns the time if it was of this generation.
    fn take(&self, ticket: Ticket) -> Option<u64> {
        let stamp = self.0.load(Relaxed);
        if stamp == 0 {
            return None;
        }
        self.0.store(0, Relaxed);
        (stamp >> Self::TIME_BITS == ticket.generation()).then_some(stamp)
    }

    /// Nanoseconds between two stamps of one generation.
    fn between(from: u64, to: u64) -> i64 {
        let unused = u64::BITS - Self::TIME_BITS;
        (to.wrapping_sub(from) << unused) as i64 >> unused
    }
}

impl Place {
    const fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            communicator: AtomicPtr::new(ptr::null_mut()),
            number: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            rank: AtomicU32::new(0),
            ranks: AtomicU32::new(0),
            operation: AtomicU32::new(0),
            channels: AtomicU32::new(0),
            below: AtomicU32::new(0),
            times: [const {
                Times {
                    start: Stamp(AtomicU64::new(0)),
                    stop: Stamp(AtomicU64::new(0)),
                }
            }; CHANNELS],
        }
    }

    /// Ends it if `of` says so of it, whatever channels are left: then the caller has the place.
    fn end(&self, of: impl Fn(&Self) -> bool) -> bool {
        let mut state = self.state.load(Acquire);
        while state & LEFT != 0 && of(self) {
            match self
                .state
                .compare_exchange_weak(state, state & !LEFT, AcqRel, Acquire)
            {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    /// What is told of it, by the one who has it.
    fn told(&self, duration: u64, outcome: u32) -> Told {
        Told {
            communicator: self.number.load(Relaxed),
            sequence: self.sequence.load(Relaxed),
            duration,
            rank: self.rank.load(Relaxed),
            ranks: self.ranks.load(Relaxed),
            operation: self.operation.load(Relaxed),
            outcome,
        }
    }

    /// Whether the collective with this ticket is there and not over.
    fn has(&self, ticket: Ticket) -> bool {
        let state = self.state.load(Acquire);
        state >> 8 == ticket.0 && state & LEFT != 0
    }

    /// Takes the times of all channels. Returns the duration in nanoseconds, and what it is worth.
    fn take(&self, ticket: Ticket) -> (u64, u32) {
        let channels = self.channels.load(Relaxed);
        let mut found = 0;
        let mut outcome = FINE;
        let mut origin = 0;
        let mut first = i64::MAX;
        let mut last = i64::MIN;
        for times in &self.times {
            if found == channels {
                break;
            }
            let (start, stop) = match (times.start.take(ticket), times.stop.take(ticket)) {
                (Some(start), Some(stop)) => (start, stop),
                (None, None) => continue,
                _ => {
                    outcome = IMPOSSIBLE;
                    continue;
                }
            };
            if found == 0 {
                origin = start;
            }
            found += 1;
            let (start, stop) = (Stamp::between(origin, start), Stamp::between(origin, stop));
            if stop < start {
                outcome = IMPOSSIBLE;
            }
            first = first.min(start);
            last = last.max(stop);
        }
        if found != channels || !(0..=LONGEST).contains(&last.wrapping_sub(first)) {
            outcome = IMPOSSIBLE;
        }
        if outcome == FINE {
            ((last - first) as u64, FINE)
        } else {
            (0, outcome)
        }
    }

    fn clear(&self) {
        for times in &self.times {
            times.start.0.store(0, Relaxed);
            times.stop.0.store(0, Relaxed);
        }
    }
}

/// What has none of the names.
pub(crate) const OTHER: u32 = Operation::Other as u32;

/// Returns an [`Operation`] by NCCL's name of it: its bytes, the last one lowest.
pub(crate) fn operation(name: u128) -> u32 {
    const NAMES: [u128; 10] = [
        packed("Broadcast"),
        packed("Reduce"),
        packed("AllGather"),
        packed("ReduceScatter"),
        packed("AllReduce"),
        packed("AlltoAll"),
        packed("Gather"),
        packed("Scatter"),
        packed("Send"),
        packed("Recv"),
    ];
    NAMES
        .iter()
        .position(|known| *known == name)
        .map_or(OTHER, |index| index as u32)
}

const fn packed(name: &str) -> u128 {
    let (bytes, mut packed, mut index) = (name.as_bytes(), 0, 0);
    while index < bytes.len() {
        packed = packed << 8 | bytes[index] as u128;
        index += 1;
    }
    packed
}

/// The topmost free place that was used before, by [`link`], and above it a count of all changes: so that a thread that slept
/// between reading and changing it notices.
static FREE: AtomicU64 = AtomicU64::new(0);
/// Places that were never used begin here. Once it is [`PLACES`] there are none.
static FRESH: AtomicU32 = AtomicU32::new(0);
/// The place that is overwritten next when none is free.
static VICTIM: AtomicU32 = AtomicU32::new(0);
/// Places that are tried when none is free: those that another thread has just then are passed over.
const TRIES: u32 = 16;

/// How a place is named in a list whose end is 0.
const fn link(index: u32) -> u32 {
    index + 1
}

fn free(index: usize) {
    let mut top = FREE.load(Relaxed);
    loop {
        ALL[index % PLACES].below.store(top as u32, Relaxed);
        let new = ((top >> 32) + 1) << 32 | u64::from(link(index as u32));
        match FREE.compare_exchange_weak(top, new, Release, Relaxed) {
            Ok(_) => return,
            Err(now) => top = now,
        }
    }
}

/// Takes the place that was freed last, else one that was never used.
fn unused() -> Option<usize> {
    let mut top = FREE.load(Acquire);
    while let Some(index) = (top as u32).checked_sub(1) {
        let below = ALL[index as usize % PLACES].below.load(Relaxed);
        let new = ((top >> 32) + 1) << 32 | u64::from(below);
        match FREE.compare_exchange_weak(top, new, Acquire, Acquire) {
            Ok(_) => return Some(index as usize),
            Err(now) => top = now,
        }
    }
    let fresh = FRESH.fetch_update(Relaxed, Relaxed, |fresh| {
        ((fresh as usize) < PLACES).then_some(fresh + 1)
    });
    fresh.ok().map(|fresh| fresh as usize)
}

/// Takes a place from a collective that is still open.
fn overwrite() -> Option<usize> {
    (0..TRIES).find_map(|_| {
        let index = VICTIM.fetch_add(1, Relaxed) as usize % PLACES;
        ALL[index].end(|_| true).then_some(index)
    })
}

/// Finds a place for a collective and tells of it. Returns none if it cannot be followed: NCCL counts no channels for
/// collectives of CollNet, of symmetric kernels and of copy engines.
pub(crate) fn start(
    communicator: &'static Communicator,
    operation: u32,
    sequence: u64,
    channels: u8,
) -> Option<Ticket> {
    if channels == 0 || usize::from(channels) > CHANNELS {
        return None;
    }
    let (index, overwritten) = match unused() {
        Some(index) => (index % PLACES, None),
        None => {
            let index = overwrite()?;
            ALL[index].clear();
            (index, Some(ALL[index].told(0, OVERWRITTEN)))
        }
    };
    let place = &ALL[index];
    let generation = (place.state.load(Relaxed) >> 8) / PLACES as u64 + 1;
    let ticket = Ticket(generation * PLACES as u64 + index as u64);
    let told = Told {
        sequence,
        operation,
        ..communicator.told()
    };
    place
        .communicator
        .store(ptr::from_ref(communicator).cast_mut(), Relaxed);
    place.number.store(told.communicator, Relaxed);
    place.sequence.store(sequence, Relaxed);
    place.rank.store(told.rank, Relaxed);
    place.ranks.store(told.ranks, Relaxed);
    place.operation.store(operation, Relaxed);
    place.channels.store(u32::from(channels), Relaxed);
    place
        .state
        .store(ticket.0 << 8 | u64::from(channels), Release);
    if let Some(overwritten) = overwritten {
        nccl_profiler_finished(&overwritten);
    }
    nccl_profiler_started(&told);
    Some(ticket)
}

/// A channel has started, at a time of the GPU's clock in nanoseconds; 0 is none. Returns whether its collective is still
/// followed.
pub(crate) fn channel_started(ticket: Ticket, channel: u8, time: u64) -> bool {
    let place = ticket.place();
    let Some(times) = place.times.get(usize::from(channel)) else {
        return false;
    };
    if !place.has(ticket) {
        return false;
    }
    if time != 0 {
        times.start.set(ticket, time);
    }
    true
}

/// NCCL has the time at which a channel stopped.
pub(crate) fn channel_ended(ticket: Ticket, channel: u8, time: u64) {
    let place = ticket.place();
    if let Some(times) = place.times.get(usize::from(channel))
        && time != 0
        && place.has(ticket)
    {
        times.stop.set(ticket, time);
    }
}

/// A channel has stopped. With the last one the collective is over, and is told of.
pub(crate) fn channel_stopped(ticket: Ticket) {
    let place = ticket.place();
    let mut state = place.state.load(Relaxed);
    loop {
        if state >> 8 != ticket.0 || state & LEFT == 0 {
            return;
        }
        match place
            .state
            .compare_exchange_weak(state, state - 1, AcqRel, Relaxed)
        {
            Ok(_) if state & LEFT == 1 => break,
            Ok(_) => return,
            Err(now) => state = now,
        }
    }
    let (duration, outcome) = place.take(ticket);
    let told = place.told(duration, outcome);
    free(ticket.index());
    nccl_profiler_finished(&told);
}

/// Drops what is open of a communicator: nothing more is told of it.
pub(crate) fn forget(communicator: &'static Communicator) {
    let used = FRESH.load(Relaxed) as usize;
    for (index, place) in ALL.iter().enumerate().take(used) {
        if place.end(|place| ptr::eq(place.communicator.load(Relaxed), communicator)) {
            place.clear();
            free(index);
        }
    }
}
