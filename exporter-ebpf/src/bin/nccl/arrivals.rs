// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which rank comes last to a collective, and how long did the others wait?
//!
//! Ranks of one communicator meet in `PAIRS`, at the n-th call of an operation. The one whose arrival completes it reckons what
//! each of them waited. 5.10 has no atomic operation that tells what it changed, so whether an arrival is the last one is
//! decided by who enters the pair into `CLAIMS`.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{macros::map, maps::HashMap};
use exporter_common::nccl::{
    ANCHORED, Arrivals, COLLECTIVES, Communicator, Group, LATE, LEARNT, MAX_CLAIMS, MAX_PAIRS,
    MAX_SEATS, NUMBERED, Pair, Seat, Share, Source, WAIT, wait_slots,
};
use exporter_ebpf::{Loss, add, insert_new, lose, now, read_user, unknown};

use crate::{
    LOST, count,
    late::{known, layout, learn},
    or_lose,
    seats::{GROUPS, SEATS, handle, members},
    shares::{give, insert_shared},
};

#[map]
static PAIRS: HashMap<Pair, Arrivals> = HashMap::with_max_entries(MAX_PAIRS, 0);

/// Pairs that are being completed.
#[map]
static CLAIMS: HashMap<Pair, u64> = HashMap::with_max_entries(MAX_CLAIMS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_ARRIVALS: Arrivals = Arrivals {
    expected: 0,
    count: 0,
    since: 0,
    at: [0; MAX_SEATS],
};

/// How long a group waits for ranks whose beginning was not seen to show up, in nanoseconds.
const PATIENCE: u64 = 2_000_000_000;

/// A rank arrives at a collective.
#[inline(always)]
pub(crate) fn arrive(
    group: *const Group,
    pair: &Pair,
    seat: u64,
    at: u64,
    source: Source,
) -> Result<(), Loss> {
    let members = members(pair.group, group);
    // SAFETY: a map value.
    let (ranks, adopted, cgroup) = unsafe { ((*group).ranks, (*group).adopted, (*group).cgroup) };
    // With nobody beside it there is nothing to compare with.
    if members < 2 {
        return Ok(());
    }
    if adopted != 0 && members != ranks && now().wrapping_sub(adopted) < PATIENCE {
        return Ok(());
    }
    if PAIRS.get_ptr(pair).is_none() {
        insert_shared(&PAIRS, pair, &NO_ARRIVALS, cgroup, Share::Pairs)?;
    }
    let arrivals = PAIRS.get_ptr_mut(pair).ok_or(Loss::MapFull)?;
    // SAFETY: a map value.
    unsafe {
        if (*arrivals).expected == 0 {
            // Two that come at once write the same.
            (*arrivals).expected = members;
            (*arrivals).since = now();
        }
    }
    // Bounded just before its use: 5.10 forgets what it knew of a number that was on the stack.
    let seat = unknown(seat);
    if seat >= MAX_SEATS as u64 {
        return Ok(());
    }
    // SAFETY: a map value, and below the end of its array; the seat is this rank's alone.
    let (count, expected) = unsafe {
        let slot = addr_of_mut!((*arrivals).at)
            .cast::<u64>()
            .add(seat as usize);
        slot.write_volatile(at);
        // A locked instruction: who sees the count sees the arrivals.
        add(addr_of_mut!((*arrivals).count), 1);
        (
            addr_of!((*arrivals).count).read_volatile(),
            addr_of!((*arrivals).expected).read_volatile(),
        )
    };
    if count < expected {
        return Ok(());
    }
    // Several may see that all are there. One reckons.
    if !insert_new(&CLAIMS, pair, &unknown(1))? {
        return Ok(());
    }
    // Where there is none, another has reckoned and is done with it.
    if let Some(arrivals) = PAIRS.get_ptr_mut(pair) {
        complete(pair, arrivals, source);
        if PAIRS.remove(pair).is_ok() {
            give(cgroup, Share::Pairs);
        }
    }
    let _ = CLAIMS.remove(pair);
    Ok(())
}

/// Reckons what each rank waited for the last one.
#[inline(always)]
fn complete(pair: &Pair, arrivals: *mut Arrivals, source: Source) {
    let mut last = 0;
    let mut who = 0;
    for index in 0..MAX_SEATS {
        // SAFETY: below the end of the array of a map value.
        let at = unsafe { addr_of!((*arrivals).at[index]).read_volatile() };
        if at > last {
            last = at;
            who = index as u64;
        }
    }
    // Through memory, since the verifier would look at the rest once for each seat and each time that it might be.
    // SAFETY: a map value, which nobody else uses any more.
    let (last, who) = unsafe {
        addr_of_mut!((*arrivals).since).write_volatile(who);
        addr_of_mut!((*arrivals).expected).write_volatile(last);
        (
            addr_of!((*arrivals).expected).read_volatile(),
            addr_of!((*arrivals).since).read_volatile(),
        )
    };
    for index in 0..MAX_SEATS {
        // SAFETY: below the end of the array of a map value.
        let at = unsafe { addr_of!((*arrivals).at[index]).read_volatile() };
        if at == 0 {
            continue;
        }
        let seat = Seat {
            group: pair.group,
            index: index as u64,
        };
        let Some(member) = SEATS.get_ptr_mut(&seat) else {
            continue;
        };
        let waited = last.wrapping_sub(at);
        // Of a comparison with the index the verifier would remember for each seat how it went.
        let is_last = unknown(who ^ index as u64) == 0;
        // SAFETY: a map value.
        let cgroup = unsafe {
            add(addr_of_mut!((*member).wait), waited);
            add(addr_of_mut!((*member).collectives), 1);
            if is_last {
                add(addr_of_mut!((*member).last), 1);
            }
            (*member).cgroup
        };
        let first = wait_slots(source as usize, 0);
        or_lose!(count(cgroup, first, pair.operation, WAIT, waited));
    }
}

/// The host calls a collective, one of the first [`COLLECTIVES`] operations.
#[inline(always)]
pub(crate) fn collective(operation: u64, address: u64, at: u64) -> Result<(), Loss> {
    let name = handle(address);
    let Some(known) = known(&name)? else {
        return Ok(());
    };
    let index = operation as usize;
    // Bounded just before its use: 5.10 forgets what it knew of a number that was on the stack.
    // SAFETY: within the array of a map value.
    let own = |known: *mut Communicator| unsafe {
        let index = unknown(operation) & (COLLECTIVES as u64 - 1);
        addr_of_mut!((*known).made)
            .cast::<u64>()
            .add(index as usize)
    };
    // SAFETY: a map value; one thread at a time uses a communicator, as NCCL demands.
    unsafe {
        if (*known).state & LEARNT == 0 {
            learn(&name, known)?;
        }
        if (*known).state & LATE != 0 {
            let Some(layout) = layout() else {
                return Ok(());
            };
            // They grow at the end of a group: within one ours are ahead.
            let place = address + u64::from(layout.sequence);
            // Where the page is away for a moment, ours are right: this is for what was not seen.
            if let Ok(made) = read_user::<[u64; NUMBERED]>(place) {
                for (known, made) in (*known).made.iter_mut().zip(made) {
                    if made > *known {
                        *known = made;
                    }
                }
            }
            if index < NUMBERED {
                (*known).state |= ANCHORED;
            } else if (*known).state & ANCHORED == 0 {
                return Err(Loss::Unreadable);
            }
        }
        if index >= NUMBERED {
            let numbered: u64 = (&(*known).made)[..NUMBERED].iter().sum();
            let least = numbered << 16;
            if *own(known) < least {
                *own(known) = least;
            }
        }
        let pair = Pair {
            group: (*known).group,
            operation,
            sequence: *own(known),
        };
        *own(known) = pair.sequence + 1;
        let seat = (*known).seat;
        match GROUPS.get_ptr(&pair.group) {
            Some(group) => arrive(group, &pair, seat, at, Source::Host),
            None => Ok(()),
        }
    }
}
