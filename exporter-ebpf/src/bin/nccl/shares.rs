// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How much of the maps may a cgroup have?

use aya_ebpf::{macros::map, maps::HashMap};
use exporter_common::nccl::{MAX_SHARES, SHARE, Share, Shares};
use exporter_ebpf::{Loss, NO_CGROUP, add, entry, insert_new};

/// By cgroup, what it has of the maps.
#[map]
static SHARES: HashMap<u64, Shares> = HashMap::with_max_entries(MAX_SHARES, 0);

/// What of that user space has given back.
#[map]
static RETURNED: HashMap<u64, Shares> = HashMap::with_max_entries(MAX_SHARES, 0);

const NO_SHARES: Shares = Shares {
    counts: [0; SHARE.len()],
};

/// Whose share a cgroup has a part of: that of all for which there was no room, if it is one of them.
#[inline(always)]
fn sharer(cgroup: u64) -> u64 {
    match SHARES.get_ptr(&cgroup) {
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
pub(crate) fn take(cgroup: u64, kind: Share) -> Result<(), Loss> {
    let _ = entry(&SHARES, &cgroup, &NO_SHARES);
    let sharer = sharer(cgroup);
    let taken = share(&SHARES, sharer, kind).ok_or(Loss::MapFull)?;
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
pub(crate) fn give(cgroup: u64, kind: Share) {
    if let Some(taken) = share(&SHARES, sharer(cgroup), kind) {
        // SAFETY: a map value.
        unsafe { add(taken, u64::MAX) };
    }
}

/// Enters what is not there yet, as a part of the share of a cgroup. False if it is there.
#[inline(always)]
pub(crate) fn insert_shared<K, V>(
    map: &HashMap<K, V>,
    key: &K,
    value: &V,
    cgroup: u64,
    kind: Share,
) -> Result<bool, Loss> {
    take(cgroup, kind)?;
    let entered = insert_new(map, key, value);
    if entered != Ok(true) {
        give(cgroup, kind);
    }
    entered
}
