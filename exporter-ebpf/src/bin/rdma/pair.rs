// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which queue pair is it, whose, and on which device?

use aya_ebpf::{
    helpers::generated,
    macros::map,
    maps::{Array, HashMap},
};
use exporter_common::rdma::{
    DEVICE_NAME, Device, MAX_DEVICES, MAX_OLD_QUEUE_PAIRS, MAX_QUEUE_PAIRS, Number, Pair, WINDOW,
};
use exporter_ebpf::{ABSENT, Loss, NO_CGROUP, constants, entry, field, read_kernel, value};

constants!(
    OFF_PAIR_DEVICE,
    OFF_PAIR_NUMBER,
    OFF_DEVICE_INDEX,
    OFF_DEVICE_NAME,
);

/// By the address of the queue pair.
#[map]
pub(crate) static PAIRS: HashMap<u64, Pair> = HashMap::with_max_entries(MAX_QUEUE_PAIRS, 0);

/// Owners of queue pairs that are not in `PAIRS`; written by user space.
#[map]
pub(crate) static OLD_PAIRS: HashMap<Number, u64> =
    HashMap::with_max_entries(MAX_OLD_QUEUE_PAIRS, 0);

/// By the address of the device.
#[map]
pub(crate) static DEVICES: HashMap<u64, Device> = HashMap::with_max_entries(MAX_DEVICES, 0);

/// Where a queue pair keeps its number, in bytes, where no type says so; 0 until `copy_to` has seen it twice. Then what
/// `copy_to` saw last: the handle of an XRC target is not the pair that was created, so one sight may be wrong.
#[map]
static NUMBER_AT: Array<u32> = Array::with_max_entries(2, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_DEVICE: Device = Device {
    created: 0,
    destroyed: 0,
    window: [0; WINDOW],
};

/// Finds a device's counters. Its name is read anew where `named`, since an address may be used again.
#[inline(always)]
pub(crate) fn device(address: u64, named: bool) -> Result<*mut Device, Loss> {
    let device = entry(&DEVICES, &address, &NO_DEVICE)?;
    if named {
        // SAFETY: a map value; the helper writes at most its `window`, and checks the address that it reads from.
        let window = unsafe { (&raw mut (*device).window).cast::<core::ffi::c_void>() };
        let failed = if OFF_DEVICE_NAME.load() == ABSENT {
            // SAFETY: as above.
            unsafe { generated::bpf_probe_read_kernel(window, WINDOW as u32, address as *const _) }
        } else {
            let name = address + u64::from(OFF_DEVICE_NAME.load());
            // SAFETY: as above.
            unsafe {
                generated::bpf_probe_read_kernel(window, DEVICE_NAME as u32, name as *const _)
            }
        };
        if failed != 0 {
            return Err(Loss::Unreadable);
        }
    }
    Ok(device)
}

/// What the queue pair itself tells: its device and its number there.
#[inline(always)]
pub(crate) fn describe(address: u64, device: u64) -> Result<Pair, Loss> {
    let mut pair = Pair {
        cgroup: NO_CGROUP,
        created: 0,
        device,
        index: ABSENT,
        number: ABSENT,
        connected: 0,
    };
    if device == 0 && OFF_PAIR_DEVICE.load() != ABSENT {
        pair.device = field(address, &OFF_PAIR_DEVICE)?;
    }
    if OFF_PAIR_NUMBER.load() != ABSENT {
        pair.number = field(address, &OFF_PAIR_NUMBER)?;
    } else if let Some(learned) = NUMBER_AT.get(0)
        && *learned != 0
    {
        pair.number = read_kernel(address + u64::from(*learned))?;
    }
    if pair.device != 0 && OFF_DEVICE_INDEX.load() != ABSENT {
        pair.index = field(pair.device, &OFF_DEVICE_INDEX)?;
    }
    Ok(pair)
}

/// What names a queue pair for user space.
#[inline(always)]
pub(crate) fn number(pair: &Pair) -> Number {
    Number {
        index: pair.index,
        number: pair.number,
    }
}

/// A queue pair that is not in `PAIRS`: older than the exporter, so user space may know its owner.
#[inline(always)]
pub(crate) fn old(address: u64) -> Result<Pair, Loss> {
    let mut pair = describe(address, 0)?;
    if let Some(cgroup) = value(&OLD_PAIRS, &number(&pair)) {
        pair.cgroup = cgroup;
    }
    Ok(pair)
}

/// Learns from one pair where all have their number.
#[inline(always)]
pub(crate) fn learn(offset: u64) {
    let (Some(learned), Some(last)) = (NUMBER_AT.get_ptr_mut(0), NUMBER_AT.get_ptr_mut(1)) else {
        return;
    };
    // `struct ib_qp` takes some hundred bytes.
    if offset == 0 || offset >= 4096 {
        return;
    }
    // SAFETY: map values of one word each; whoever writes the first writes what was seen twice.
    unsafe {
        if *last == offset as u32 {
            if *learned == 0 {
                *learned = offset as u32;
            }
        } else {
            *last = offset as u32;
        }
    }
}
