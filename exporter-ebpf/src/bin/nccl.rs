// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which rank do the others wait for, and how long does NCCL take to initialise?
//!
//! Hooks: uprobes and uretprobes on functions that libnccl exports or has symbols of, on the profiler plugin, and on
//! libcuda's launch of graphs. Where there are symbols every call is seen at ncclEnqueueCheck, else at the exported functions.
//! Maps: `SEATS` feeds the counters of ranks, `OWNERS` the histograms, `PAIRS` and `STARTED` the age of what is pending.
//!
//! Ranks of one communicator meet in `PAIRS`, at the n-th call of an operation. The one whose arrival completes it reckons what
//! each of them waited. 5.10 has no atomic operation that tells what it changed, so whether an arrival is the last one is
//! decided by who enters the pair into `CLAIMS`.
#![no_std]
#![no_main]

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::{map, uprobe, uretprobe},
    maps::{HashMap, ProgramArray},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::{
    histogram::Shape,
    nccl::{
        ANCHORED, ANY_PROCESS, Arrivals, Begun, CALL, CLAIMS, COLLECTIVES, COMMUNICATORS,
        Communicator, Frame, GRAPH_SLOT, GROUP_SEATS, GROUPS, Group, Handle, IN_PROGRESS, INIT,
        LATE, LEARNT, Layout, MAGIC, Member, NO_RANK, NUMBERED, OWNERS, Operation, Owner, PAIRS,
        PROCESSES, Pair, Phase, SHARE, SHARES, SLOTS, STARTED, Seat, Share, Shares, Since, Source,
        Started, TOGETHER, WAIT, WANTED, call_slots, duration_slots, init_slots, wait_slots,
    },
    nccl_profiler::{FINE, OVERWRITTEN, Told},
};
use exporter_ebpf::{
    ABSENT, Loss, NO_CGROUP, Registers, add, entry, is_arm64, keep_own_stack, lose, object,
    read_user, unknown,
};

object!();

/// Empty: see [`keep_own_stack`].
#[map]
static NOWHERE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// By cgroup id.
#[map(name = "OWNERS")]
static OWNERS_: HashMap<u64, Owner> = HashMap::with_max_entries(OWNERS, 0);

#[map(name = "COMMUNICATORS")]
static COMMUNICATORS_: HashMap<Communicator, Handle> = HashMap::with_max_entries(COMMUNICATORS, 0);

#[map(name = "GROUPS")]
static GROUPS_: HashMap<u64, Group> = HashMap::with_max_entries(GROUPS, 0);

#[map]
static SEATS: HashMap<Seat, Member> = HashMap::with_max_entries(COMMUNICATORS, 0);

#[map(name = "PAIRS")]
static PAIRS_: HashMap<Pair, Arrivals> = HashMap::with_max_entries(PAIRS, 0);

/// Pairs that are being completed.
#[map(name = "CLAIMS")]
static CLAIMS_: HashMap<Pair, u64> = HashMap::with_max_entries(CLAIMS, 0);

#[map(name = "STARTED")]
static STARTED_: HashMap<Started, Since> = HashMap::with_max_entries(STARTED, 0);

/// By group, the ranks of which user space has found that they are gone.
#[map]
static LEFT: HashMap<u64, u64> = HashMap::with_max_entries(GROUPS, 0);

/// By cgroup, what it has of the maps.
#[map(name = "SHARES")]
static SHARES_: HashMap<u64, Shares> = HashMap::with_max_entries(SHARES, 0);

/// What of that user space has given back.
#[map]
static RETURNED: HashMap<u64, Shares> = HashMap::with_max_entries(SHARES, 0);

/// By process id. User space tells what it has found, of processes that want it.
#[map]
static LAYOUTS: HashMap<u32, Layout> = HashMap::with_max_entries(PROCESSES, 0);

/// Calls between entry and return.
#[map(name = "IN_PROGRESS")]
static IN_PROGRESS_: HashMap<Frame, Begun> = HashMap::with_max_entries(IN_PROGRESS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_OWNER: Owner = Owner { slots: [0; SLOTS] };

// SAFETY: as above.
#[unsafe(no_mangle)]
static NO_ARRIVALS: Arrivals = Arrivals {
    expected: 0,
    count: 0,
    since: 0,
    at: [0; GROUP_SEATS],
};

/// How long a group waits for ranks whose beginning was not seen to show up, in nanoseconds.
const PATIENCE: u64 = 2_000_000_000;

/// ncclSuccess and ncclInProgress of nccl.h.
const SUCCESS: u64 = 0;
const NCCL_IN_PROGRESS: u64 = 7;

/// NCCL_SPLIT_NOCOLOR of nccl.h: no new communicator.
const NO_COLOR: u64 = 0xffff_ffff;

/// Bytes of ncclUniqueId in nccl.h.
const UNIQUE_ID: usize = 128;

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn cgroup() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

#[inline(always)]
fn process() -> u64 {
    bpf_get_current_pid_tgid() >> 32
}

/// What a communicator is called that the host's call names by its address.
#[inline(always)]
fn handle(address: u64) -> Communicator {
    Communicator {
        process: process(),
        address,
    }
}

/// What one is called that the plugin names by NCCL's number and its rank.
#[inline(always)]
fn plugin_handle(told: &Told) -> Communicator {
    Communicator {
        process: process() | (Source::Kernel as u64) << 32,
        address: mix(told.communicator, u64::from(told.rank)),
    }
}

/// Makes a number of two that another pair hardly makes.
#[inline(always)]
fn mix(a: u64, b: u64) -> u64 {
    // The finaliser of SplitMix64.
    let mut x = a ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Counts a time in the histogram of an owner that begins at a slot.
#[inline(always)]
fn observe(slots: *mut u64, bucket: u64, sum: u64, nanoseconds: u64) {
    // Each is checked just before its use, see gpu_calls.rs.
    for (slot, number) in [(unknown(bucket), 1), (unknown(sum), nanoseconds)] {
        if slot < SLOTS as u64 {
            // SAFETY: below the end of the map value.
            unsafe { add(slots.add(slot as usize), number) };
        }
    }
}

#[inline(always)]
fn owner(cgroup: u64) -> Result<*mut u64, Loss> {
    Ok(entry(&OWNERS_, &cgroup, &NO_OWNER)?.cast())
}

/// Counts a time of a cgroup in the `index`-th of the histograms of one shape that begin at a slot.
#[inline(always)]
fn count(cgroup: u64, first: usize, index: u64, shape: Shape, time: u64) -> Result<(), Loss> {
    let slots = owner(cgroup)?;
    let first = first as u64 + index * shape.slots() as u64;
    observe(
        slots,
        first + shape.bucket(time) as u64,
        first + shape.sum() as u64,
        time,
    );
    Ok(())
}

macro_rules! or_lose {
    ($result:expr) => {
        if let Err(loss) = $result {
            lose(&LOST, loss);
        }
    };
}

// Shares.

const NO_SHARES: Shares = Shares {
    counts: [0; SHARE.len()],
};

/// Whose share a cgroup has a part of: that of all for which there was no room, if it is one of them.
#[inline(always)]
fn sharer(cgroup: u64) -> u64 {
    match SHARES_.get_ptr(&cgroup) {
        Some(_) => cgroup,
        None => NO_CGROUP,
    }
}

/// Where a count of shares stands.
#[inline(always)]
fn share(map: &HashMap<u64, Shares>, sharer: u64, kind: Share) -> Option<*mut u64> {
    let shares = map.get_ptr_mut(&sharer)?;
    // SAFETY: within the array of a map value.
    Some(unsafe { shares.cast::<u64>().add(kind as usize) })
}

/// Takes one of what a cgroup may have. User space counts what it has once a second, so that nothing is out for good.
#[inline(always)]
fn take(cgroup: u64, kind: Share) -> Result<(), Loss> {
    let _ = entry(&SHARES_, &cgroup, &NO_SHARES);
    let sharer = sharer(cgroup);
    let taken = share(&SHARES_, sharer, kind).ok_or(Loss::MapFull)?;
    let most = SHARE[kind as usize] as i64;
    // SAFETY: a map value. Of several that come at once one more may be let through than there are.
    unsafe {
        let has = taken.read_volatile();
        if has as i64 >= most {
            let returned = share(&RETURNED, sharer, kind);
            let returned = returned.map_or(0, |returned| returned.read_volatile());
            if has.wrapping_sub(returned) as i64 >= most {
                return Err(Loss::MapFull);
            }
        }
        add(taken, 1);
    }
    Ok(())
}

/// Gives it back.
#[inline(always)]
fn give(cgroup: u64, kind: Share) {
    if let Some(taken) = share(&SHARES_, sharer(cgroup), kind) {
        // SAFETY: a map value.
        unsafe { add(taken, u64::MAX) };
    }
}

/// Enters what is not there yet, as a part of the share of a cgroup. False if it is there.
#[inline(always)]
fn enter_new<K, V>(
    map: &HashMap<K, V>,
    key: &K,
    value: &V,
    cgroup: u64,
    kind: Share,
) -> Result<bool, Loss> {
    take(cgroup, kind)?;
    let entered = map.insert(key, value, u64::from(BPF_NOEXIST));
    if entered.is_err() {
        give(cgroup, kind);
    }
    match entered {
        Ok(()) => Ok(true),
        Err(EXISTS) => Ok(false),
        Err(_) => Err(Loss::MapFull),
    }
}

/// `-EEXIST`.
const EXISTS: i32 = -17;

// What comes and goes.

/// Finds the group, or makes it.
#[inline(always)]
fn group(key: u64, ranks: u64, hash: u64, adopted: u64) -> Result<*mut Group, Loss> {
    if let Some(group) = GROUPS_.get_ptr_mut(&key) {
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
    enter_new(&GROUPS_, &key, &new, cgroup, Share::Groups)?;
    GROUPS_.get_ptr_mut(&key).ok_or(Loss::MapFull)
}

/// Ranks of a group that are here.
#[inline(always)]
fn members(key: u64, group: *const Group) -> u64 {
    let left = LEFT.get_ptr(&key);
    // SAFETY: map values.
    let members = unsafe {
        let left = left.map_or(0, |left| *left);
        (*group).members.wrapping_sub(left)
    };
    if (members as i64) < 0 { 0 } else { members }
}

/// Takes one of so many seats, the one of the rank if that is free. `members` of the group is the caller's.
#[inline(always)]
fn sit<const TRIES: u64>(
    group: u64,
    name: Communicator,
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
const ANY_SEAT: u64 = GROUP_SEATS as u64;

#[inline(always)]
fn sit_on_one<const TRIES: u64>(
    group: u64,
    name: Communicator,
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
            index: rank.wrapping_add(probe) % GROUP_SEATS as u64,
        };
        match SEATS.insert(&seat, &member, u64::from(BPF_NOEXIST)) {
            Ok(()) => {
                let handle = Handle {
                    group,
                    seat: seat.index,
                    state,
                    children: 0,
                    finished: 0,
                    made: [0; COLLECTIVES],
                };
                // Of two that come at once with one name one sits.
                return match COMMUNICATORS_.insert(&name, &handle, u64::from(BPF_NOEXIST)) {
                    Ok(()) => Ok(()),
                    Err(_) => {
                        let _ = SEATS.remove(&seat);
                        Err(Loss::MapFull)
                    }
                };
            }
            // It is taken.
            Err(EXISTS) => {}
            Err(_) => return Err(Loss::MapFull),
        }
    }
    Err(Loss::MapFull)
}

/// Ends a communicator. The seat of one that has counted is user space's to clear.
#[inline(always)]
fn leave(name: &Communicator) {
    let Some(known) = COMMUNICATORS_.get_ptr(name) else {
        return;
    };
    // SAFETY: a map value; preallocated, so its memory stays.
    let (key, index) = unsafe { ((*known).group, (*known).seat) };
    // Of two that end it at once one succeeds.
    if COMMUNICATORS_.remove(name).is_err() {
        return;
    }
    let seat = Seat { group: key, index };
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
    if let Some(group) = GROUPS_.get_ptr_mut(&key) {
        // SAFETY: a map value.
        unsafe { add(addr_of_mut!((*group).members), u64::MAX) };
    }
}

/// What communicators of this process look like. Where all libraries are of one version, that is known before user space has
/// looked at the process.
#[inline(always)]
fn layout() -> Option<Layout> {
    let process = process() as u32;
    let own = LAYOUTS.get_ptr(&process);
    let Some(layout) = own.or_else(|| LAYOUTS.get_ptr(&ANY_PROCESS)) else {
        let wanted = Layout {
            hash: WANTED,
            rank: 0,
            ranks: 0,
            sequence: 0,
        };
        if LAYOUTS
            .insert(&process, &wanted, u64::from(BPF_NOEXIST))
            .is_err()
        {
            lose(&LOST, Loss::MapFull);
        }
        return None;
    };
    // SAFETY: a map value.
    let layout = unsafe { *layout };
    (layout.hash != WANTED).then_some(layout)
}

/// Asks a communicator for its number and its rank, where it is known where they are. False if user space has not looked at
/// the process yet.
#[inline(always)]
fn learn(name: &Communicator, known: *mut Handle) -> Result<bool, Loss> {
    let Some(layout) = layout() else {
        return Ok(false);
    };
    // SAFETY: a map value; one thread at a time uses a communicator.
    unsafe { (*known).state |= LEARNT };
    if layout.hash == ABSENT || read_user::<u64>(name.address)? != MAGIC {
        return Ok(true);
    }
    let hash: u64 = read_user(name.address + u64::from(layout.hash))?;
    let rank: i32 = read_user(name.address + u64::from(layout.rank))?;
    let ranks: i32 = read_user(name.address + u64::from(layout.ranks))?;
    // SAFETY: as above.
    let (key, index) = unsafe { ((*known).group, (*known).seat) };
    if rank < 0 || rank >= ranks {
        return Ok(true);
    }
    if let Some(group) = GROUPS_.get_ptr_mut(&key) {
        // SAFETY: a map value; all ranks write the same.
        unsafe {
            (*group).hash = hash;
            (*group).ranks = ranks as u64;
        }
    }
    if let Some(seat) = SEATS.get_ptr_mut(&Seat { group: key, index }) {
        // SAFETY: a map value that is this communicator's.
        unsafe { (*seat).rank = rank as u64 };
    }
    Ok(true)
}

/// Takes a communicator in whose beginning was not seen. False if it has to wait until user space has looked at its process.
#[inline(always)]
fn adopt(name: Communicator) -> Result<bool, Loss> {
    let Some(layout) = layout() else {
        return Ok(false);
    };
    let can_tell = layout.hash != ABSENT && layout.sequence != ABSENT;
    if !can_tell || read_user::<u64>(name.address)? != MAGIC {
        return Err(Loss::Unreadable);
    }
    let hash: u64 = read_user(name.address + u64::from(layout.hash))?;
    let rank: i32 = read_user(name.address + u64::from(layout.rank))?;
    let ranks: i32 = read_user(name.address + u64::from(layout.ranks))?;
    if rank < 0 || rank >= ranks {
        return Err(Loss::Unreadable);
    }
    join_late(hash, hash, name, rank as u64, ranks as u64)?;
    Ok(true)
}

#[inline(always)]
fn join_late(key: u64, hash: u64, name: Communicator, rank: u64, ranks: u64) -> Result<(), Loss> {
    let at = now();
    let group = group(key, ranks, hash, at)?;
    sit::<ANY_SEAT>(key, name, rank, LATE | LEARNT)?;
    // SAFETY: a map value; of several that come at once any will do.
    unsafe {
        (*group).adopted = at;
        add(addr_of_mut!((*group).members), 1);
    }
    Ok(())
}

// Arrivals.

/// A rank arrives at a collective.
#[inline(always)]
fn arrive(
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
    if PAIRS_.get_ptr(pair).is_none() {
        enter_new(&PAIRS_, pair, &NO_ARRIVALS, cgroup, Share::Pairs)?;
    }
    let arrivals = PAIRS_.get_ptr_mut(pair).ok_or(Loss::MapFull)?;
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
    if seat >= GROUP_SEATS as u64 {
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
    match CLAIMS_.insert(pair, &unknown(1), u64::from(BPF_NOEXIST)) {
        Ok(()) => {}
        Err(EXISTS) => return Ok(()),
        Err(_) => return Err(Loss::MapFull),
    }
    // Where there is none, another has reckoned and is done with it.
    if let Some(arrivals) = PAIRS_.get_ptr_mut(pair) {
        complete(pair, arrivals, source);
        if PAIRS_.remove(pair).is_ok() {
            give(cgroup, Share::Pairs);
        }
    }
    let _ = CLAIMS_.remove(pair);
    Ok(())
}

/// Reckons what each rank waited for the last one.
#[inline(always)]
fn complete(pair: &Pair, arrivals: *mut Arrivals, source: Source) {
    let mut last = 0;
    let mut who = 0;
    for index in 0..GROUP_SEATS {
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
    for index in 0..GROUP_SEATS {
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
fn collective(operation: u64, address: u64, at: u64) -> Result<(), Loss> {
    let name = handle(address);
    let known = match COMMUNICATORS_.get_ptr_mut(&name) {
        Some(known) => known,
        None => {
            if !adopt(name)? {
                return Ok(());
            }
            match COMMUNICATORS_.get_ptr_mut(&name) {
                Some(known) => known,
                None => return Ok(()),
            }
        }
    };
    let index = operation as usize;
    // Bounded just before its use: 5.10 forgets what it knew of a number that was on the stack.
    // SAFETY: within the array of a map value.
    let own = |known: *mut Handle| unsafe {
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
        match GROUPS_.get_ptr(&pair.group) {
            Some(group) => arrive(group, &pair, seat, at, Source::Host),
            None => Ok(()),
        }
    }
}

// Calls, from entry to return.

#[inline(always)]
fn begin(registers: Registers, phase: u64, begun: Begun) -> bool {
    let frame = Frame {
        thread: bpf_get_current_pid_tgid(),
        address: registers.frame() + phase,
    };
    if !note(&frame, begun) {
        return false;
    }
    // The clock is read last: what is done here is not the call's.
    if let Some(begun) = IN_PROGRESS_.get_ptr_mut(&frame) {
        // SAFETY: a map value that is this thread's.
        unsafe { (*begun).at = now() };
    }
    true
}

/// Notes what has begun. What had the same name was not seen to end, which is a loss. False if there is no room.
#[inline(always)]
fn note(frame: &Frame, begun: Begun) -> bool {
    let cgroup = cgroup();
    let begun = Begun { cgroup, ..begun };
    let noted = enter_new(&IN_PROGRESS_, frame, &begun, cgroup, Share::Calls).and_then(|is_new| {
        if is_new {
            return Ok(());
        }
        lose(&LOST, Loss::MissedReturn);
        let again = IN_PROGRESS_.insert(frame, &begun, u64::from(BPF_ANY));
        again.map_err(|_| Loss::MapFull)
    });
    or_lose!(noted);
    noted.is_ok()
}

#[inline(always)]
fn end(registers: Registers, phase: u64) -> Option<Begun> {
    end_of(registers.returned_frame() + phase)
}

#[inline(always)]
fn end_of(address: u64) -> Option<Begun> {
    let frame = Frame {
        thread: bpf_get_current_pid_tgid(),
        address,
    };
    let begun = IN_PROGRESS_.get_ptr(&frame)?;
    // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
    let begun = unsafe { *begun };
    if IN_PROGRESS_.remove(&frame).is_ok() {
        give(begun.cgroup, Share::Calls);
    }
    Some(begun)
}

const fn call(what: u64) -> Begun {
    Begun {
        at: 0,
        what,
        told_at: 0,
        group: 0,
        rank: 0,
        ranks: 0,
        cgroup: 0,
    }
}

macro_rules! collectives {
    ($($name:ident: $operation:ident, $communicator:ident;)*) => { $(
        #[uprobe]
        pub fn $name(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
            let at = now();
            let registers = Registers::of(&ctx);
            or_lose!($communicator(registers).and_then(|address| collective(Operation::$operation as u64, address, at)));
            begin(registers, 0, call(Operation::$operation as u64));
            0
        }
    )* };
}

#[inline(always)]
fn fifth(registers: Registers) -> Result<u64, Loss> {
    Ok(registers.argument::<4>())
}

#[inline(always)]
fn sixth(registers: Registers) -> Result<u64, Loss> {
    Ok(registers.argument::<5>())
}

#[inline(always)]
fn seventh(registers: Registers) -> Result<u64, Loss> {
    registers.seventh_argument()
}

// Where the communicator stands among the arguments (nccl.h).
collectives! {
    nccl_broadcast: Broadcast, sixth;
    nccl_reduce: Reduce, seventh;
    nccl_all_gather: AllGather, fifth;
    nccl_reduce_scatter: ReduceScatter, sixth;
    nccl_all_reduce: AllReduce, sixth;
    nccl_all_to_all: AllToAll, fifth;
    nccl_gather: Gather, sixth;
    nccl_scatter: Scatter, sixth;
}

#[uprobe]
pub fn nccl_send(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin(Registers::of(&ctx), 0, call(Operation::Send as u64));
    0
}

#[uprobe]
pub fn nccl_recv(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin(Registers::of(&ctx), 0, call(Operation::Recv as u64));
    0
}

/// Where `struct ncclInfo` has its operation and its communicator (info.h, alike from 2.18 on; later ones have more at the end).
const INFO_OPERATION: u64 = 0;
const INFO_COMMUNICATOR: u64 = 56;

/// An operation by its number in NCCL (`ncclFunc_t` of nccl_common.h: new ones come at the end). `None`: it is not followed.
#[inline(always)]
fn operation(number: u32) -> Option<u64> {
    let operation = match number {
        0 => Operation::Broadcast,
        1 => Operation::Reduce,
        2 => Operation::AllGather,
        3 => Operation::ReduceScatter,
        4 => Operation::AllReduce,
        6 => Operation::Send,
        7 => Operation::Recv,
        8 => Operation::AllToAll,
        9 => Operation::Scatter,
        10 => Operation::Gather,
        _ => return None,
    };
    Some(operation as u64)
}

#[inline(always)]
fn enqueue(registers: Registers, at: u64) -> Result<(), Loss> {
    let info = registers.argument::<0>();
    let Some(what) = operation(read_user(info + INFO_OPERATION)?) else {
        // Its return is not that of an earlier call, whose own was not seen.
        let _ = end_of(registers.frame());
        return Ok(());
    };
    let arrived = if what < COLLECTIVES as u64 {
        read_user(info + INFO_COMMUNICATOR).and_then(|address| collective(what, address, at))
    } else {
        Ok(())
    };
    begin(registers, 0, call(what));
    arrived
}

/// `ncclEnqueueCheck(struct ncclInfo *)`, through which every exported operation goes.
#[uprobe]
pub fn nccl_enqueue(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    or_lose!(enqueue(Registers::of(&ctx), at));
    0
}

#[uretprobe]
pub fn nccl_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    let Some(begun) = end(Registers::of(&ctx), 0) else {
        return 0;
    };
    let took = at.wrapping_sub(begun.at);
    or_lose!(count(cgroup(), call_slots(0), begun.what, CALL, took));
    0
}

// Initialisation.

/// A rank begins to initialise: from now on it is expected.
#[inline(always)]
fn enter(registers: Registers, key: u64, told_at: u64, rank: u64, ranks: u64) -> Result<(), Loss> {
    let group = group(key, ranks, 0, 0)?;
    // SAFETY: a map value.
    unsafe { add(addr_of_mut!((*group).members), 1) };
    // It will be wanted at the first collective.
    let _ = layout();
    let begun = begin(
        registers,
        0,
        Begun {
            at: 0,
            what: 0,
            told_at,
            group: key,
            rank,
            ranks,
            cgroup: 0,
        },
    );
    if !begun {
        // Nobody will hear of its end.
        // SAFETY: a map value.
        unsafe { add(addr_of_mut!((*group).members), u64::MAX) };
    }
    Ok(())
}

/// The number of a communicator by its unique id: the same that NCCL makes of it (`getHash` of src/include/utils.h).
#[inline(always)]
fn hash(id: u64) -> Result<u64, Loss> {
    let mut hash: u64 = 5381;
    for word in 0..UNIQUE_ID as u64 / 8 {
        let bytes: u64 = read_user(id + 8 * word)?;
        for byte in 0..8 {
            let byte = bytes >> (8 * byte);
            // A `char` has a sign on x86-64 and none on arm64.
            let byte = if is_arm64() {
                byte & 0xff
            } else {
                byte as i8 as i64 as u64
            };
            hash = (hash << 5).wrapping_add(hash) ^ byte;
        }
    }
    Ok(hash)
}

#[inline(always)]
fn init_rank(registers: Registers) -> Result<(), Loss> {
    let told_at = registers.argument::<0>();
    let ranks = registers.argument::<1>() as u32;
    // The id is handed by value: on x86-64 on the stack, on arm64 by the address of a copy.
    let (id, rank) = if is_arm64() {
        (registers.argument::<2>(), registers.argument::<3>() as u32)
    } else {
        (registers.frame() + 8, registers.argument::<2>() as u32)
    };
    enter(
        registers,
        hash(id)?,
        told_at,
        u64::from(rank),
        u64::from(ranks),
    )
}

#[uprobe]
pub fn nccl_init(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(init_rank(Registers::of(&ctx)));
    0
}

#[uprobe]
pub fn nccl_init_scalable(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    let ranks = registers.argument::<1>() as u32;
    let rank = registers.argument::<2>() as u32;
    or_lose!(hash(registers.argument::<4>()).and_then(|key| enter(
        registers,
        key,
        registers.argument::<0>(),
        u64::from(rank),
        u64::from(ranks)
    )));
    0
}

/// A communicator that is made of another, by calls that all its ranks make in one order.
#[inline(always)]
fn child(registers: Registers, told_at: u64, which: u64) -> Result<(), Loss> {
    let parent = handle(registers.argument::<0>());
    let known = match COMMUNICATORS_.get_ptr_mut(&parent) {
        Some(known) => known,
        None => {
            if !adopt(parent)? {
                return Ok(());
            }
            match COMMUNICATORS_.get_ptr_mut(&parent) {
                Some(known) => known,
                None => return Ok(()),
            }
        }
    };
    // SAFETY: a map value; one thread at a time uses a communicator.
    let (group, number, late) = unsafe {
        (*known).children += 1;
        ((*known).group, (*known).children, (*known).state & LATE)
    };
    // How many were made of it before is not known: its children are found at their first collective.
    if late != 0 || which == NO_COLOR {
        return Ok(());
    }
    enter(
        registers,
        mix(mix(group, number), which),
        told_at,
        NO_RANK,
        0,
    )
}

#[uprobe]
pub fn nccl_split(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    let color = registers.argument::<1>() as u32;
    or_lose!(child(
        registers,
        registers.argument::<3>(),
        u64::from(color)
    ));
    0
}

#[uprobe]
pub fn nccl_shrink(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    // No color is as large.
    or_lose!(child(registers, registers.argument::<3>(), 1 << 32));
    0
}

/// Takes the seat of a communicator that has been told. False if it will be told later, as where a split does not block: it is
/// found at its first collective.
#[inline(always)]
fn made(begun: &Begun) -> Result<bool, Loss> {
    let address: u64 = read_user(begun.told_at)?;
    if address == 0 {
        return Ok(false);
    }
    sit::<ANY_SEAT>(begun.group, handle(address), begun.rank, 0)?;
    Ok(true)
}

/// The end of an exported function that makes a communicator. With `timed` what it took counts as the whole of the initialisation.
#[inline(always)]
fn init_return(registers: Registers, timed: bool) {
    let at = now();
    let Some(begun) = end(registers, 0) else {
        return;
    };
    let result = registers.returned() as u32 as u64;
    if timed && result == SUCCESS {
        count_phase(Phase::Total as u64, at.wrapping_sub(begun.at));
    }
    let made = if result == SUCCESS || result == NCCL_IN_PROGRESS {
        made(&begun)
    } else {
        Ok(false)
    };
    if made != Ok(true)
        && let Some(group) = GROUPS_.get_ptr_mut(&begun.group)
    {
        // SAFETY: a map value.
        unsafe { add(addr_of_mut!((*group).members), u64::MAX) };
    }
    or_lose!(made);
}

#[uretprobe]
pub fn nccl_init_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    init_return(Registers::of(&ctx), false);
    0
}

/// Of a library without symbols of what is inside.
#[uretprobe]
pub fn nccl_init_timed_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    init_return(Registers::of(&ctx), true);
    0
}

#[uprobe]
pub fn nccl_init_all(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    begin(
        registers,
        0,
        Begun {
            at: 0,
            what: 0,
            told_at: registers.argument::<0>(),
            group: 0,
            rank: 0,
            ranks: u64::from(registers.argument::<1>() as u32),
            cgroup: 0,
        },
    );
    0
}

#[uretprobe]
pub fn nccl_init_all_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    let Some(begun) = end(registers, 0) else {
        return 0;
    };
    if registers.returned() as u32 as u64 != SUCCESS {
        return 0;
    }
    let key = mix(mix(process(), begun.told_at), begun.at);
    let group = match group(key, begun.ranks, 0, 0) {
        Ok(group) => group,
        Err(loss) => {
            lose(&LOST, loss);
            return 0;
        }
    };
    if begun.ranks > GROUP_SEATS as u64 {
        lose(&LOST, Loss::MapFull);
    }
    for rank in 0..GROUP_SEATS as u64 {
        if rank >= begun.ranks {
            break;
        }
        // In a group that nobody else knows yet its own seat is free.
        let made = read_user::<u64>(begun.told_at + 8 * rank)
            .and_then(|address| sit::<1>(key, handle(address), rank, 0));
        match made {
            // SAFETY: a map value.
            Ok(()) => unsafe { add(addr_of_mut!((*group).members), 1) },
            Err(loss) => lose(&LOST, loss),
        }
    }
    0
}

/// ncclCommDestroy, ncclCommAbort.
#[uprobe]
pub fn nccl_end(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    leave(&handle(Registers::of(&ctx).argument::<0>()));
    0
}

// Phases of an initialisation. One thread goes through all of them, one after the other: each ends where the next begins, so that only
// the last one needs its return.

/// The address of the frame of a thread's present phase: no real frame has it.
const PRESENT: u64 = 2;

#[inline(always)]
fn present() -> Frame {
    Frame {
        thread: bpf_get_current_pid_tgid(),
        address: PRESENT,
    }
}

#[inline(always)]
fn count_phase(phase: u64, took: u64) {
    or_lose!(count(cgroup(), init_slots(0), phase, INIT, took));
}

/// Ends the present phase, which has done what it should.
#[inline(always)]
fn end_phase() {
    let at = now();
    if let Some(begun) = end_of(PRESENT) {
        count_phase(begun.what, at.wrapping_sub(begun.at));
    }
}

#[inline(always)]
fn begin_phase(phase: Phase) {
    let begun = Begun {
        at: now(),
        ..call(phase as u64)
    };
    // A phase that has failed has no end: the next initialisation begins another.
    let _ = end_of(PRESENT);
    note(&present(), begun);
}

/// commAlloc, the first.
#[uprobe]
pub fn nccl_allocate(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin_phase(Phase::Allocate);
    0
}

/// bootstrapInit, bootstrapSplit. Before 2.18 they are a part of initTransportsRank, and counted with it.
#[uprobe]
pub fn nccl_rendezvous(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    if let Some(begun) = IN_PROGRESS_.get_ptr(&present()) {
        // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
        if unsafe { (*begun).what } == Phase::Transports as u64 {
            return 0;
        }
    }
    end_phase();
    begin_phase(Phase::Rendezvous);
    0
}

/// initTransportsRank, the last.
#[uprobe]
pub fn nccl_transports(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    end_phase();
    begin_phase(Phase::Transports);
    0
}

#[uretprobe]
pub fn nccl_transports_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    // What has failed took another time.
    if Registers::of(&ctx).returned() as u32 as u64 == SUCCESS {
        end_phase();
    }
    0
}

/// ncclCommInitRankFunc.
#[uprobe]
pub fn nccl_total(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    begin(Registers::of(&ctx), 1, call(Phase::Total as u64));
    0
}

#[uretprobe]
pub fn nccl_total_return(ctx: RetProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let at = now();
    // One that has failed.
    let _ = end_of(PRESENT);
    let registers = Registers::of(&ctx);
    let Some(begun) = end(registers, 1) else {
        return 0;
    };
    // What has failed, or goes on without its caller, took another time.
    if registers.returned() as u32 as u64 == SUCCESS {
        count_phase(begun.what, at.wrapping_sub(begun.at));
    }
    0
}

/// cuGraphLaunch: collectives of a graph are launched with it, and no call of NCCL is made.
#[uprobe]
pub fn nccl_graph(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    match owner(cgroup()) {
        // SAFETY: a slot of a map value.
        Ok(slots) => unsafe { add(slots.add(GRAPH_SLOT), 1) },
        Err(loss) => lose(&LOST, loss),
    }
    0
}

// The profiler plugin.

#[inline(always)]
fn told(ctx: &ProbeContext) -> Result<Told, Loss> {
    read_user(Registers::of(ctx).argument::<0>())
}

/// Groups of the plugin and of the host are different ones.
#[inline(always)]
fn plugin_group(told: &Told) -> u64 {
    mix(told.communicator, !0)
}

#[inline(always)]
fn opened(told: &Told) -> Result<(), Loss> {
    let key = plugin_group(told);
    let group = group(key, u64::from(told.ranks), told.communicator, 0)?;
    sit::<ANY_SEAT>(key, plugin_handle(told), u64::from(told.rank), LEARNT)?;
    // SAFETY: a map value.
    unsafe { add(addr_of_mut!((*group).members), 1) };
    Ok(())
}

#[uprobe]
pub fn plugin_opened(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| opened(&told)));
    0
}

#[uprobe]
pub fn plugin_closed(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    match told(&ctx) {
        Ok(told) => leave(&plugin_handle(&told)),
        Err(loss) => lose(&LOST, loss),
    }
    0
}

#[inline(always)]
fn started_key(told: &Told) -> Started {
    Started {
        handle: plugin_handle(told),
        rank: u64::from(told.rank) | u64::from(told.operation) << 32,
        sequence: told.sequence,
    }
}

#[inline(always)]
fn started(told: &Told) -> Result<(), Loss> {
    let name = plugin_handle(told);
    if COMMUNICATORS_.get_ptr(&name).is_none() {
        // The plugin was there before its probes.
        join_late(
            plugin_group(told),
            told.communicator,
            name,
            u64::from(told.rank),
            u64::from(told.ranks),
        )?;
    }
    let since = Since {
        at: now(),
        cgroup: cgroup(),
    };
    let key = started_key(told);
    if !enter_new(&STARTED_, &key, &since, since.cgroup, Share::Started)? {
        STARTED_
            .insert(&key, &since, u64::from(BPF_ANY))
            .map_err(|_| Loss::MapFull)?;
    }
    Ok(())
}

#[uprobe]
pub fn plugin_started(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| started(&told)));
    0
}

/// Operations of which all ranks end together, so that the one that takes the shortest came last.
#[inline(always)]
fn ends_together(operation: u32) -> bool {
    operation == Operation::AllGather as u32
        || operation == Operation::ReduceScatter as u32
        || operation == Operation::AllReduce as u32
}

/// The plugin tells nothing that took longer, in nanoseconds: an hour. Sums of it stay within their numbers.
const LONGEST: u64 = 3_600_000_000_000;

#[inline(always)]
fn finished(told: &Told) -> Result<(), Loss> {
    let key = started_key(told);
    let since = STARTED_.get_ptr(&key);
    // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
    let since = since.map(|since| unsafe { *since });
    if STARTED_.remove(&key).is_ok()
        && let Some(since) = since
    {
        give(since.cgroup, Share::Started);
    }
    let since = since.map(|since| since.at);
    let name = plugin_handle(told);
    let known = COMMUNICATORS_.get_ptr_mut(&name);
    if let (Some(known), Some(since)) = (known, since)
        && told.outcome != OVERWRITTEN
    {
        // SAFETY: a map value. Of two that finish at once the later may be forgotten: it is told with the next one.
        unsafe {
            if (*known).finished < since {
                (*known).finished = since;
            }
        }
    }
    if told.outcome != FINE || told.duration > LONGEST {
        return Err(Loss::Untimed);
    }
    let operation = unknown(u64::from(told.operation));
    if operation >= COLLECTIVES as u64 {
        return Ok(());
    }
    count(cgroup(), duration_slots(0), operation, WAIT, told.duration)?;
    if !ends_together(told.operation) {
        return Ok(());
    }
    let Some(known) = known else {
        return Ok(());
    };
    // SAFETY: map values.
    unsafe {
        let seat = (*known).seat;
        let pair = Pair {
            group: (*known).group,
            operation,
            sequence: told.sequence,
        };
        let own = Seat {
            group: pair.group,
            index: seat,
        };
        let Some(group) = GROUPS_.get_ptr(&pair.group) else {
            return Ok(());
        };
        if let Some(member) = SEATS.get_ptr_mut(&own) {
            add(addr_of_mut!((*member).duration), told.duration);
            // The only one of this node: other nodes have the rest, and its own duration tells.
            if members(pair.group, group) < 2 {
                add(addr_of_mut!((*member).collectives), 1);
            }
        }
        let at = TOGETHER.wrapping_sub(told.duration);
        arrive(group, &pair, seat, at, Source::Kernel)
    }
}

#[uprobe]
pub fn plugin_finished(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    or_lose!(told(&ctx).and_then(|told| finished(&told)));
    0
}
