// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What does a communicator know of itself, and which were there before their probes?

use aya_ebpf::{macros::map, maps::HashMap};
use exporter_common::nccl::{
    ANY_PROCESS, Communicator, Handle, LATE, LEARNT, Layout, MAGIC, MAX_PROCESSES, WANTED,
};
use exporter_ebpf::{ABSENT, Loss, insert_new, lose, now, read_user, value};

use crate::{
    LOST,
    seats::{ANY_SEAT, COMMUNICATORS, GROUPS, SEATS, expect, group, process, sit},
};

/// By process id. User space tells what it has found, of processes that want it.
#[map]
static LAYOUTS: HashMap<u32, Layout> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// What communicators of this process look like. Where all libraries are of one version, that is known before user space has
/// looked at the process.
#[inline(always)]
pub(crate) fn layout() -> Option<Layout> {
    let process = process() as u32;
    let own = value(&LAYOUTS, &process);
    let Some(layout) = own.or_else(|| value(&LAYOUTS, &ANY_PROCESS)) else {
        let wanted = Layout {
            hash: WANTED,
            rank: 0,
            ranks: 0,
            sequence: 0,
        };
        if let Err(loss) = insert_new(&LAYOUTS, &process, &wanted) {
            lose(&LOST, loss);
        }
        return None;
    };
    (layout.hash != WANTED).then_some(layout)
}

/// What a communicator says of itself.
struct Told {
    hash: u64,
    rank: u64,
    ranks: u64,
}

/// Asks a communicator whose layout is known. `None` if it says what cannot be, as one does that is not made yet: NCCL tells it its number
/// before its rank (`ncclCommInitRankFunc`).
#[inline(always)]
fn ask(name: &Handle, layout: &Layout) -> Result<Option<Told>, Loss> {
    let hash: u64 = read_user(name.address + u64::from(layout.hash))?;
    let rank: i32 = read_user(name.address + u64::from(layout.rank))?;
    let ranks: i32 = read_user(name.address + u64::from(layout.ranks))?;
    Ok((hash != 0 && rank >= 0 && rank < ranks).then_some(Told {
        hash,
        rank: rank as u64,
        ranks: ranks as u64,
    }))
}

/// Asks a communicator for its number and its rank, where it is known where they are. False if user space has not looked at
/// the process yet.
#[inline(always)]
pub(crate) fn learn(name: &Handle, known: *mut Communicator) -> Result<bool, Loss> {
    let Some(layout) = layout() else {
        return Ok(false);
    };
    // SAFETY: a map value; one thread at a time uses a communicator.
    unsafe { (*known).state |= LEARNT };
    if layout.hash == ABSENT || read_user::<u64>(name.address)? != MAGIC {
        return Ok(true);
    }
    let Some(told) = ask(name, &layout)? else {
        return Ok(true);
    };
    // SAFETY: as above.
    let seat = unsafe { (*known).seat() };
    if let Some(group) = GROUPS.get_ptr_mut(&seat.group) {
        // SAFETY: a map value; all ranks write the same.
        unsafe {
            (*group).hash = told.hash;
            (*group).ranks = told.ranks;
        }
    }
    if let Some(member) = SEATS.get_ptr_mut(&seat) {
        // SAFETY: a map value that is this communicator's.
        unsafe { (*member).rank = told.rank };
    }
    Ok(true)
}

/// Takes a communicator in that has just been made by a call of which not all ranks have a key in common. Where it cannot be asked yet it is
/// found at its first collective.
#[inline(always)]
pub(crate) fn adopt_new(name: Handle) -> Result<(), Loss> {
    match adopt(name) {
        Err(Loss::Unreadable) => Ok(()),
        adopted => adopted,
    }
}

/// Takes a communicator in whose beginning was not seen, once user space has looked at its process.
#[inline(always)]
fn adopt(name: Handle) -> Result<(), Loss> {
    let Some(layout) = layout() else {
        return Ok(());
    };
    let can_tell = layout.hash != ABSENT && layout.sequence != ABSENT;
    if !can_tell || read_user::<u64>(name.address)? != MAGIC {
        return Err(Loss::Unreadable);
    }
    let told = ask(&name, &layout)?.ok_or(Loss::Unreadable)?;
    join_late(told.hash, told.hash, name, told.rank, told.ranks)
}

/// Takes a rank in that has been there for some time.
#[inline(always)]
pub(crate) fn join_late(
    key: u64,
    hash: u64,
    name: Handle,
    rank: u64,
    ranks: u64,
) -> Result<(), Loss> {
    let at = now();
    let group = group(key, ranks, hash, at)?;
    sit::<ANY_SEAT>(key, name, rank, LATE | LEARNT)?;
    // SAFETY: a map value; of several that come at once any will do.
    unsafe { (*group).adopted = at };
    expect(group);
    Ok(())
}

/// Finds a communicator that the host names, or takes it in. `None` if it has to wait.
#[inline(always)]
pub(crate) fn known(name: &Handle) -> Result<Option<*mut Communicator>, Loss> {
    if let Some(known) = COMMUNICATORS.get_ptr_mut(name) {
        return Ok(Some(known));
    }
    adopt(*name)?;
    Ok(COMMUNICATORS.get_ptr_mut(name))
}
