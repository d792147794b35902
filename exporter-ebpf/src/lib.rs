// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What every object shares: offsets set at load, typed loads, the owner of a socket, counters, losses.
#![no_std]
#![feature(asm_experimental_arch)]

use core::arch::asm;

use aya_ebpf::{
    EbpfContext, Global,
    bindings::BPF_NOEXIST,
    helpers::{bpf_probe_read_kernel, bpf_probe_read_user},
    maps::{Array, HashMap, ProgramArray},
};
pub use exporter_common::{ABSENT, CGROUPS, Loss, NO_CGROUP};

/// Declares offsets and constants that user space sets from BTF before the load. They live in frozen `.rodata`, so
/// the verifier knows their values.
#[macro_export]
macro_rules! constants {
    ($($name:ident),* $(,)?) => { $(
        // SAFETY: user space finds the constant by this name; no other symbol of the object has it.
        #[unsafe(no_mangle)]
        static $name: aya_ebpf::Global<u32> = aya_ebpf::Global::new($crate::ABSENT);
    )* };
}

/// Declares what every object needs: its licence for the kernel, its panic handler, its losses.
#[macro_export]
macro_rules! object {
    () => {
        /// Events lost in the kernel, indexed by [`exporter_common::Loss`].
        #[aya_ebpf::macros::map]
        static LOST: aya_ebpf::maps::Array<u64> =
            aya_ebpf::maps::Array::with_max_entries(exporter_common::Loss::LABELS.len() as u32, 0);

        // "GPL" is how the kernel spells a licence that may call GPL-only helpers (include/linux/license.h).
        // SAFETY: the loader reads the section `license`; the symbol is alone in it.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 4] = *b"GPL\0";

        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo) -> ! {
            loop {}
        }
    };
}

constants!(
    OFF_SOCK_CGROUP,
    OFF_TASK_CGROUPS,
    OFF_SET_CGROUP,
    OFF_CGROUP_KN,
    OFF_KERNFS_ID,
    SOCK_CGROUP_TYPED,
    ARM64,
);

/// Whether the kernel is one for arm64.
#[inline(always)]
pub fn is_arm64() -> bool {
    ARM64.load() == 1
}

/// Returns a word of the registers that a probe was hit with.
macro_rules! register {
    ($registers:expr, $offset:literal) => {{
        let word: u64;
        // One load at a constant offset: the verifier of 5.10 takes no other from a context.
        // SAFETY: the callers pass a probe's context; the verifier checks the offset against it.
        unsafe {
            asm!(
                concat!("{0} = *(u64 *)({1} + ", $offset, ")"),
                out(reg) word, in(reg) $registers, options(readonly, nostack)
            )
        };
        word
    }};
}

/// The arguments or the return value of a function that a kprobe or kretprobe was hit in, by the calling conventions
/// of x86-64 and arm64 (`struct pt_regs` of arch/*/include/asm/ptrace.h), so that one object serves both.
#[derive(Clone, Copy)]
pub struct Registers(*const u8);

impl Registers {
    /// Takes the context of a kprobe or kretprobe.
    #[inline(always)]
    pub fn of(context: &impl EbpfContext) -> Self {
        Self(context.as_ptr().cast())
    }

    /// Returns argument `N` (0 to 5).
    #[inline(always)]
    pub fn argument<const N: u32>(self) -> u64 {
        if is_arm64() {
            match N {
                0 => register!(self.0, "0"),
                1 => register!(self.0, "8"),
                2 => register!(self.0, "16"),
                3 => register!(self.0, "24"),
                4 => register!(self.0, "32"),
                _ => register!(self.0, "40"),
            }
        } else {
            match N {
                0 => register!(self.0, "112"),
                1 => register!(self.0, "104"),
                2 => register!(self.0, "96"),
                3 => register!(self.0, "88"),
                4 => register!(self.0, "72"),
                _ => register!(self.0, "64"),
            }
        }
    }

    /// Returns argument 6 of a function of user space: on x86-64 the first that is on the stack.
    #[inline(always)]
    pub fn seventh_argument(self) -> Result<u64, Loss> {
        if is_arm64() {
            Ok(register!(self.0, "48"))
        } else {
            read_user(self.frame() + 8)
        }
    }

    /// Returns what names the call among all that are in progress, on any CPU and in any task: the address of its
    /// stack frame, at the entry of the function.
    #[inline(always)]
    pub fn frame(self) -> u64 {
        if is_arm64() {
            register!(self.0, "248")
        } else {
            register!(self.0, "152")
        }
    }

    /// Returns the same at the return of the function. On x86-64 the return has taken the return address off the stack.
    #[inline(always)]
    pub fn returned_frame(self) -> u64 {
        if is_arm64() {
            register!(self.0, "248")
        } else {
            register!(self.0, "152") - 8
        }
    }

    /// Returns the return value.
    #[inline(always)]
    pub fn returned(self) -> u64 {
        if is_arm64() {
            register!(self.0, "0")
        } else {
            register!(self.0, "80")
        }
    }
}

/// Loads a field through a pointer that the verifier knows by its BTF type: a wrong offset is refused at load.
///
/// # Safety
/// `base` is a BTF-typed pointer of the program's context, or was loaded from one.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the verifier checks the access against the type behind `base`, and faults read as 0.
    unsafe { core::ptr::read_volatile(base.add(offset.load() as usize).cast::<T>()) }
}

/// Reads a field through a pointer that the verifier does not know.
///
/// # Safety
/// `base + offset` is where a `T` lies in the kernel; a bad address is an error, a wrong one reads garbage.
#[inline(always)]
pub unsafe fn read<T: Copy>(base: *const u8, offset: &Global<u32>) -> Result<T, Loss> {
    // SAFETY: the helper checks the address and copies.
    unsafe { bpf_probe_read_kernel(base.add(offset.load() as usize).cast::<T>()) }
        .map_err(|_| Loss::Unreadable)
}

/// Reads from the memory of the process that runs. A page that is not there is an error: nothing is waited for.
#[inline(always)]
pub fn read_user<T: Copy>(address: u64) -> Result<T, Loss> {
    // SAFETY: the helper checks the address and copies.
    unsafe { bpf_probe_read_user(address as *const T) }.map_err(|_| Loss::Unreadable)
}

/// Keeps a program of a uprobe on the stack of its own task. To be called by each, before anything else.
///
/// Since 6.13 the verifier gives programs of this type whose stack is 64 bytes or more one stack for each CPU
/// (`bpf_enable_priv_stack`), as if nothing could run a program twice at once on a CPU. That holds for kprobes, but the programs of
/// uprobes may be preempted: where the kernel is preemptible, as 7.3 is by default, two tasks then write over each other's stacks.
/// Programs with a tail call have none of that. This one is never taken, and nothing is in its map.
#[inline(always)]
pub fn keep_own_stack(ctx: &impl EbpfContext, nowhere: &ProgramArray) {
    if Registers::of(ctx).frame() == 0 {
        // SAFETY: the map is empty, so that the call fails and the program goes on.
        unsafe { nowhere.tail_call(ctx, 0) };
    }
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
    // Before commit 8520e224f547 (5.15, late 5.10.y) the field is a u64: bit 0 says that it holds net_prio and net_cls numbers instead of a pointer,
    // bit 1 that no cgroup was recorded (`sock_cgroup_ptr` treats both as unknown).
    // SAFETY: `sock` is typed and the offset is that of `sk_cgrp_data.val`.
    let word: u64 = unsafe { load(sock, &OFF_SOCK_CGROUP) };
    if word == 0 || word & 3 != 0 {
        return Ok(NO_CGROUP);
    }
    // SAFETY: the word is a `struct cgroup *` that the socket holds a reference to, so both objects live.
    unsafe {
        let node: *const u8 = read(word as *const u8, &OFF_CGROUP_KN)?;
        read(node, &OFF_KERNFS_ID)
    }
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

/// Returns the cgroup of a socket, as [`socket_cgroup`] does, that the verifier does not know.
///
/// # Safety
/// `sock` is the address of a `struct sock` that is more than the head of one (not in TIME_WAIT or NEW_SYN_RECV).
#[inline(always)]
pub unsafe fn probed_socket_cgroup(sock: *const u8) -> Result<u64, Loss> {
    if OFF_SOCK_CGROUP.load() == ABSENT {
        return Ok(NO_CGROUP);
    }
    // SAFETY: the offsets are those of the fields; the helper checks the addresses.
    unsafe {
        let cgroup: u64 = read(sock, &OFF_SOCK_CGROUP)?;
        // The two low bits are flags where the field is a word (see above).
        if cgroup == 0 || SOCK_CGROUP_TYPED.load() != 1 && cgroup & 3 != 0 {
            return Ok(NO_CGROUP);
        }
        let node: *const u8 = read(cgroup as *const u8, &OFF_CGROUP_KN)?;
        if node.is_null() {
            return Ok(NO_CGROUP);
        }
        read(node, &OFF_KERNFS_ID)
    }
}

/// Returns the value of `key`, inserted as `zero` when absent.
///
/// Two CPUs may race to insert: one is told that the key exists and finds the other's entry.
#[inline(always)]
pub fn entry<K, V>(map: &HashMap<K, V>, key: &K, zero: &V) -> Result<*mut V, Loss> {
    if let Some(value) = map.get_ptr_mut(key) {
        return Ok(value);
    }
    let _ = map.insert(key, zero, u64::from(BPF_NOEXIST));
    map.get_ptr_mut(key).ok_or(Loss::MapFull)
}

/// Adds to a counter that other CPUs add to as well.
///
/// # Safety
/// `counter` points into a map value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, by: u64) {
    // BPF_XADD, the only atomic of 5.10 (core offers no atomic read-modify-write for a target without compare-and-swap).
    // SAFETY: map values are 8-byte aligned and live as long as the program runs.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) by, options(nostack)) };
}

/// Counts a lost event.
#[inline(always)]
pub fn lose(lost: &Array<u64>, loss: Loss) {
    if let Some(counter) = lost.get_ptr_mut(loss as u32) {
        // SAFETY: a map value.
        unsafe { add(counter, 1) };
    }
}

/// Returns the number as it is, of which the compiler then knows nothing: a comparison with a bound stays in the program,
/// on the very register that is used after it, where the verifier needs it.
#[inline(always)]
pub fn unknown(mut number: u64) -> u64 {
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(reg) number, options(nomem, nostack, preserves_flags)) };
    number
}
