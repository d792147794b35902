// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which ranks of which communicators are here?

use core::ptr::addr_of_mut;

use aya_ebpf::{macros::map, maps::HashMap};
use exporter_common::nccl::{
    COLLECTIVES, Communicator, Group, Handle, MAX_COMMUNICATORS, MAX_GROUPS, MAX_SEATS, Member,
    Seat, Share,
};
use exporter_ebpf::{Loss, add, cgroup, insert_new, thread, value};

use crate::shares::{give, insert_shared, take};

#[map]
pub(crate) static COMMUNICATORS: HashMap<Handle, Communicator> =
    HashMap::with_max_entries(MAX_COMMUNICATORS, 0);

#[map]
pub(crate) static GROUPS: HashMap<u64, Group> = HashMap::with_max_entries(MAX_GROUPS, 0);

#[map]
pub(crate) static SEATS: HashMap<Seat, Member> = HashMap::with_max_entries(MAX_COMMUNICATORS, 0);

/// By group, the ranks of which user space has found that they are gone.
#[map]
static LEFT: HashMap<u64, u64> = HashMap::with_max_entries(MAX_GROUPS, 0);

/// The process that runs.
#[inline(always)]
pub(crate) fn process() -> u64 {
    thread() >> 32
}

/// What a communicator is called that the host's call names by its address.
#[inline(always)]
pub(crate) fn handle(address: u64) -> Handle {
    Handle {
        process: process(),
        address,
    }
}

/// Makes a number of two that another pair hardly makes.
#[inline(always)]
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    // The finaliser of SplitMix64.
    let mut x = a ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Finds the group, or makes it.
#[inline(always)]
pub(crate) fn group(key: u64, ranks: u64, hash: u64, adopted: u64) -> Result<*mut Group, Loss> {
    if let Some(group) = GROUPS.get_ptr_mut(&key) {
        return Ok(group);
    }
    let cgroup = cgroup();
    let new = Group {
        members: 0,
        ranks,
        hash,
        adopted,
        cgroup,
    };
    insert_shared(&GROUPS, &key, &new, cgroup, Share::Groups)?;
    GROUPS.get_ptr_mut(&key).ok_or(Loss::MapFull)
}

/// Ranks of a group that are here.
#[inline(always)]
pub(crate) fn members(key: u64, group: *const Group) -> u64 {
    let left = value(&LEFT, &key).unwrap_or(0);
    // SAFETY: a map value.
    let members = unsafe { (*group).members }.wrapping_sub(left);
    if (members as i64) < 0 { 0 } else { members }
}

/// Takes one of so many seats, the one of the rank if that is free. `members` of the group is the caller's.
#[inline(always)]
pub(crate) fn sit<const TRIES: u64>(
    group: u64,
    name: Handle,
    rank: u64,
    state: u64,
) -> Result<(), Loss> {
    // What had this name before ended without a word.
    leave(&name);
    let cgroup = cgroup();
    take(cgroup, Share::Seats)?;
    let seated = sit_on_one::<TRIES>(group, name, rank, state, cgroup);
    if seated.is_err() {
        give(cgroup, Share::Seats);
    }
    seated
}

/// All seats of a group.
pub(crate) const ANY_SEAT: u64 = MAX_SEATS as u64;

#[inline(always)]
fn sit_on_one<const TRIES: u64>(
    group: u64,
    name: Handle,
    rank: u64,
    state: u64,
    cgroup: u64,
) -> Result<(), Loss> {
    let member = Member {
        cgroup,
        handle: name,
        rank,
        wait: 0,
        collectives: 0,
        last: 0,
        duration: 0,
        ended: 0,
    };
    for probe in 0..TRIES {
        let seat = Seat {
            group,
            index: rank.wrapping_add(probe) % MAX_SEATS as u64,
        };
        // It may be taken.
        if !insert_new(&SEATS, &seat, &member)? {
            continue;
        }
        let communicator = Communicator {
            group,
            seat: seat.index,
            state,
            children: 0,
            finished: 0,
            made: [0; COLLECTIVES],
        };
        // Of two that come at once with one name one sits.
        if insert_new(&COMMUNICATORS, &name, &communicator) == Ok(true) {
            return Ok(());
        }
        let _ = SEATS.remove(&seat);
        return Err(Loss::MapFull);
    }
    Err(Loss::MapFull)
}

/// Ends a communicator. The seat of one that has counted is user space's to clear.
#[inline(always)]
pub(crate) fn leave(name: &Handle) {
    let Some(known) = value(&COMMUNICATORS, name) else {
        return;
    };
    // Of two that end it at once one succeeds.
    if COMMUNICATORS.remove(name).is_err() {
        return;
    }
    let seat = known.seat();
    if let Some(member) = SEATS.get_ptr_mut(&seat) {
        // SAFETY: a map value; preallocated, so its memory stays.
        let (cgroup, counted) = unsafe {
            (*member).ended = 1;
            let counted = (*member).collectives | (*member).duration;
            ((*member).cgroup, counted)
        };
        if counted == 0 && SEATS.remove(&seat).is_ok() {
            give(cgroup, Share::Seats);
        }
    }
    expect_less(known.group);
}

/// One rank more of a group is expected.
#[inline(always)]
pub(crate) fn expect(group: *mut Group) {
    // SAFETY: a map value.
    unsafe { add(addr_of_mut!((*group).members), 1) };
}

/// One rank less of a group is.
#[inline(always)]
pub(crate) fn expect_less(group: u64) {
    if let Some(group) = GROUPS.get_ptr_mut(&group) {
        // SAFETY: a map value.
        unsafe { add(addr_of_mut!((*group).members), u64::MAX) };
    }
}
