// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Whose is it? The id of a cgroup of version 2; [`NO_CGROUP`] where the kernel does not know.

use aya_ebpf::helpers::bpf_get_current_cgroup_id;
use exporter_common::{ABSENT, Loss, NO_CGROUP};

use crate::{
    constants,
    memory::{field, load},
};

constants!(
    OFF_SOCK_CGROUP,
    OFF_TASK_CGROUPS,
    OFF_SET_CGROUP,
    OFF_CGROUP_KN,
    OFF_KERNFS_ID,
    SOCK_CGROUP_TYPED,
);

/// Returns the id of the cgroup of the task that runs.
#[inline(always)]
pub fn cgroup() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Returns the id of the cgroup that owns a socket: the one its creator was in at `socket()` or, for an accepted
/// socket, its listener's. [`NO_CGROUP`] where the kernel does not know.
///
/// # Safety
/// `sock` is a BTF-typed `struct sock *`.
#[inline(always)]
pub unsafe fn socket_cgroup(sock: *const u8) -> Result<u64, Loss> {
    if OFF_SOCK_CGROUP.load() == ABSENT {
        return Ok(NO_CGROUP);
    }
    if SOCK_CGROUP_TYPED.load() == 1 {
        // SAFETY: every pointer in the chain is typed: sock → cgroup → kernfs_node.
        return Ok(unsafe {
            let cgroup: *const u8 = load(sock, &OFF_SOCK_CGROUP);
            if cgroup.is_null() {
                return Ok(NO_CGROUP);
            }
            let node: *const u8 = load(cgroup, &OFF_CGROUP_KN);
            if node.is_null() {
                return Ok(NO_CGROUP);
            }
            load(node, &OFF_KERNFS_ID)
        });
    }
    // SAFETY: `sock` is typed and the offset is that of `sk_cgrp_data.val`.
    recorded(unsafe { load(sock, &OFF_SOCK_CGROUP) })
}

/// Returns the id of the cgroup that a socket has recorded: a `struct cgroup *` that it holds a reference to.
///
/// Before commit 8520e224f547 (5.15, late 5.10.y) it is a u64: bit 0 says that it holds net_prio and net_cls numbers instead of
/// a pointer, bit 1 that no cgroup was recorded (`sock_cgroup_ptr` treats both as unknown).
#[inline(always)]
fn recorded(cgroup: u64) -> Result<u64, Loss> {
    if cgroup == 0 || SOCK_CGROUP_TYPED.load() != 1 && cgroup & 3 != 0 {
        return Ok(NO_CGROUP);
    }
    let node: u64 = field(cgroup, &OFF_CGROUP_KN)?;
    if node == 0 {
        return Ok(NO_CGROUP);
    }
    field(node, &OFF_KERNFS_ID)
}

/// Returns the id of the cgroup that a task is in. [`NO_CGROUP`] where the kernel does not know.
///
/// # Safety
/// `task` is a BTF-typed `struct task_struct *`.
#[inline(always)]
pub unsafe fn task_cgroup(task: *const u8) -> u64 {
    if OFF_TASK_CGROUPS.load() == ABSENT {
        return NO_CGROUP;
    }
    // SAFETY: every pointer in the chain is typed (task → css_set → cgroup → kernfs_node), and faults read as 0.
    unsafe {
        let set: *const u8 = load(task, &OFF_TASK_CGROUPS);
        let cgroup: *const u8 = load(set, &OFF_SET_CGROUP);
        let node: *const u8 = load(cgroup, &OFF_CGROUP_KN);
        load(node, &OFF_KERNFS_ID)
    }
}

/// Returns the cgroup of a socket, as [`socket_cgroup`] does, that the verifier does not know: the address of a `struct sock`
/// that is more than the head of one (not in TIME_WAIT or NEW_SYN_RECV).
#[inline(always)]
pub fn probed_socket_cgroup(sock: u64) -> Result<u64, Loss> {
    if OFF_SOCK_CGROUP.load() == ABSENT {
        return Ok(NO_CGROUP);
    }
    recorded(field(sock, &OFF_SOCK_CGROUP)?)
}
