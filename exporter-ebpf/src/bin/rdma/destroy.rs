// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Who destroys queue pairs, and how long have they lived?

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::rdma::{Call, Function, LIFETIME, Pair, slot};
use exporter_ebpf::{ABSENT, Loss, Registers, add, constants, field, lose, now, remove};

use crate::{
    CALLS, LOST, call_key, enter, is_success, leave,
    pair::{DEVICES, OLD_PAIRS, PAIRS, device, number, old},
    usage,
};

constants!(OFF_PAIR_REAL, CORE_CREATES);

/// `ib_destroy_qp_user(struct ib_qp *, struct ib_udata *)` of ib_core. The kernel's own callers pass no udata.
///
/// The pair leaves the map at the entry: after the return its address may belong to another. An XRC target is destroyed
/// by a call within this one for the pair behind it; the first return that is seen counts for both.
#[kprobe]
pub fn destroy(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    let address = registers.argument::<0>();
    let by_user = registers.argument::<1>() != 0;
    let mut call = Call {
        object: address,
        ..Call::default()
    };
    if let Some(pair) = remove(&PAIRS, &address) {
        call.known = 1;
        call.pair = pair;
        // The kernel ends a pair of its own, at the address of one whose end was not seen: nobody's event.
        if !by_user && CORE_CREATES.load() == 1 {
            return 0;
        }
    } else if by_user && !is_handle(address) {
        match old(address) {
            Ok(pair) => call.pair = pair,
            Err(loss) => {
                lose(&LOST, loss);
                return 0;
            }
        }
    } else {
        return 0;
    }
    if !by_user {
        // The inner call of an XRC target replaces the outer one.
        let _ = CALLS.remove(&call_key(Function::Destroy));
    }
    enter(Function::Destroy, &call);
    0
}

/// Says if this is one more handle of an XRC target (`ib_open_qp`), whose end is not that of the pair.
#[inline(always)]
fn is_handle(address: u64) -> bool {
    OFF_PAIR_REAL.load() != ABSENT
        && field::<u64>(address, &OFF_PAIR_REAL).is_ok_and(|real| real != address)
}

/// Returns 0 for success.
#[kretprobe]
pub fn destroy_return(ctx: RetProbeContext) -> u32 {
    let Some(call) = leave(Function::Destroy) else {
        return 0;
    };
    let result = if is_success(Registers::of(&ctx).returned()) {
        destroyed(&call.pair)
    } else if call.known == 1 {
        PAIRS
            .insert(&call.object, &call.pair, 0)
            .map_err(|_| Loss::MapFull)
    } else {
        Ok(())
    };
    if let Err(loss) = result {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn destroyed(pair: &Pair) -> Result<(), Loss> {
    let usage = usage(pair.cgroup)?;
    usage.add(slot::DESTROYED as u64, 1);
    if pair.created == 0 {
        let _ = OLD_PAIRS.remove(&number(pair));
    } else {
        usage.observe(slot::LIVED as u64, LIFETIME, now() - pair.created);
    }
    if pair.device != 0 {
        let named = DEVICES.get_ptr(&pair.device).is_none();
        // SAFETY: a map value.
        unsafe { add(&raw mut (*device(pair.device, named)?).destroyed, 1) };
    }
    Ok(())
}
