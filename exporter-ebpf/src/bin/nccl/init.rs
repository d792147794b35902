// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which communicators are made, of which ranks, and which end?

use aya_ebpf::{
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::nccl::{Begun, LATE, MAX_SEATS, NO_RANK, Phase};
use exporter_ebpf::{Loss, Registers, is_arm64, keep_own_stack, lose, now, read_user};

use crate::{
    LOST, NOWHERE, SUCCESS,
    calls::{begin, call, end},
    late::{adopt_new, known, layout},
    or_lose,
    phases::count_phase,
    seats::{ANY_SEAT, expect, expect_less, group, handle, leave, mix, process, sit},
};

/// ncclInProgress of nccl.h.
const IN_PROGRESS: u64 = 7;

/// NCCL_SPLIT_NOCOLOR of nccl.h: no new communicator.
const NO_COLOR: u64 = 0xffff_ffff;

/// Bytes of ncclUniqueId in nccl.h.
const UNIQUE_ID: usize = 128;

/// A rank begins to initialise: from now on it is expected.
#[inline(always)]
fn begin_rank(
    registers: Registers,
    key: u64,
    told_at: u64,
    rank: u64,
    ranks: u64,
) -> Result<(), Loss> {
    expect(group(key, ranks, 0, 0)?);
    // It will be wanted at the first collective.
    let _ = layout();
    let begun = begin(
        registers,
        0,
        Begun {
            told_at,
            group: key,
            rank,
            ranks,
            ..call(0)
        },
    );
    if !begun {
        // Nobody will hear of its end.
        expect_less(key);
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
    begin_rank(
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
    or_lose!(hash(registers.argument::<4>()).and_then(|key| begin_rank(
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
    let Some(known) = known(&parent)? else {
        return Ok(());
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
    begin_rank(
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

/// What a call of ncclCommGrow (from 2.29 on) does, which has no group yet. Its old ranks know their communicator and its new ones the id that
/// one of these has made: nothing by which they could be joined before the communicator tells its number.
const GROWS: u64 = 1;

#[uprobe]
pub fn nccl_grow(ctx: ProbeContext) -> u32 {
    keep_own_stack(&ctx, &NOWHERE);
    let registers = Registers::of(&ctx);
    let _ = layout();
    begin(
        registers,
        0,
        Begun {
            told_at: registers.argument::<4>(),
            ..call(GROWS)
        },
    );
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
    if begun.what == GROWS {
        return adopt_new(handle(address)).map(|()| true);
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
    let made = if result == SUCCESS || result == IN_PROGRESS {
        made(&begun)
    } else {
        Ok(false)
    };
    if made != Ok(true) && begun.what != GROWS {
        expect_less(begun.group);
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
            told_at: registers.argument::<0>(),
            ranks: u64::from(registers.argument::<1>() as u32),
            ..call(0)
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
    if begun.ranks > MAX_SEATS as u64 {
        lose(&LOST, Loss::MapFull);
    }
    for rank in 0..MAX_SEATS as u64 {
        if rank >= begun.ranks {
            break;
        }
        // In a group that nobody else knows yet its own seat is free.
        let made = read_user::<u64>(begun.told_at + 8 * rank)
            .and_then(|address| sit::<1>(key, handle(address), rank, 0));
        match made {
            Ok(()) => expect(group),
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
