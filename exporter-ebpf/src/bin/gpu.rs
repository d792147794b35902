// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which processes drive a GPU, and how long do their threads wait for a CPU?
//!
//! Hooks: tp_btf `sched_switch`, `sched_process_fork` and `sched_process_exit`, kprobe `chrdev_open`, iterator
//! `task_file`. Maps: `DELAYS` feeds `chandra_gpu_runqueue_delay_seconds`, `PROCESSES` `chandra_gpu_processes`.
#![no_std]
#![no_main]

use core::ffi::c_void;

use aya_ebpf::{
    macros::{btf_tracepoint, kprobe, map},
    maps::{Array, HashMap, PerCpuArray},
    programs::{BtfTracePointContext, ProbeContext},
};
use exporter_common::gpu::{
    Clock, DELAY, Delays, Device, MAX_DEVICES, MAX_OWNERS, MAX_PROCESSES, MAX_THREADS, Process,
    SEARCHED, SEARCHING, Thread, WINDOW_BITS,
};
use exporter_ebpf::{
    Counters, Loss, Registers, add, cgroup, constants, entry, field, insert_new, load, lose, now,
    object, task_cgroup, thread, value,
};

object!();

constants!(
    OFF_TASK_TGID,
    OFF_TASK_PID,
    OFF_TASK_FLAGS,
    OFF_TASK_SIGNAL,
    OFF_SIGNAL_LIVE,
    OFF_QUEUED,
    OFF_RUN_DELAY,
    OFF_ARRIVALS,
    OFF_TASK_CFS_RQ,
    OFF_CFS_RQ_RQ,
    OFF_RQ_CLOCK,
    OFF_FILE_INODE,
    OFF_INODE_MODE,
    OFF_INODE_RDEV,
);

/// By process id: the filter of everything.
#[map]
static PROCESSES: HashMap<u32, Process> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// By thread id.
#[map]
static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(MAX_THREADS, 0);

/// What having a device open says, by the kernel's `dev_t`. User space writes it.
#[map]
static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(MAX_DEVICES, 0);

/// The numbers of searches of open files, at [`SEARCHING`] and [`SEARCHED`]. User space writes them.
#[map]
static SEARCH: Array<u32> = Array::with_max_entries(2, 0);

/// By cgroup id.
#[map]
static DELAYS: HashMap<u64, Delays> = HashMap::with_max_entries(MAX_OWNERS, 0);

#[map]
static CLOCKS: PerCpuArray<Clock> = PerCpuArray::with_max_entries(1, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_DELAYS: Delays = Delays {
    slots: [0; DELAY.slots()],
};

/// `PF_EXITING` (include/linux/sched.h).
const EXITING: u32 = 4;

/// `S_IFMT` and `S_IFCHR` (include/uapi/linux/stat.h).
const TYPE: u16 = 0o170_000;
const CHARACTER_DEVICE: u16 = 0o020_000;

/// `sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next)`, with a fourth argument from 5.18:
/// the run queue is locked, interrupts are off, and the kernel has not yet taken notice that `next` runs.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let next: *const u8 = ctx.arg(2);
    // SAFETY: the argument is typed as the tracepoint declares it.
    let process: u32 = unsafe { load(next, &OFF_TASK_TGID) };
    // Process 0 are the idle tasks.
    if process == 0 || !drives(process) {
        return 0;
    }
    // SAFETY: as above.
    if let Err(loss) = unsafe { arrives(next, process) } {
        lose(&LOST, loss);
    }
    0
}

/// Whether a process drives a GPU.
#[inline(always)]
fn drives(process: u32) -> bool {
    let known = PROCESSES.get_ptr(&process);
    known.is_some_and(|known| devices_of(known).drivers != 0)
}

/// Counts how long a thread that comes onto the CPU has been runnable.
#[inline(always)]
unsafe fn arrives(task: *const u8, process: u32) -> Result<(), Loss> {
    // SAFETY: every pointer is typed, from the task on.
    let (queued, clock): (u64, u64) = unsafe {
        let queue: *const u8 = load(task, &OFF_TASK_CFS_RQ);
        let queue: *const u8 = load(queue, &OFF_CFS_RQ_RQ);
        (load(task, &OFF_QUEUED), load(queue, &OFF_RQ_CLOCK))
    };
    // The kernel does not count this one either.
    if queued == 0 {
        return Ok(());
    }
    let now = now();
    let Some(ahead) = ahead(now, clock) else {
        return Ok(());
    };
    // What it waited on this CPU, and on others from which it was moved while it waited.
    let here = now.wrapping_sub(ahead).wrapping_sub(queued);
    let here = if (here as i64) < 0 { 0 } else { here };
    // SAFETY: typed.
    let elsewhere = unsafe { elsewhere(task, process, clock.wrapping_sub(queued)) };
    // SAFETY: typed.
    let cgroup = unsafe { task_cgroup(task) };
    let delays = entry(&DELAYS, &cgroup, &NO_DELAYS)?;
    let waited = here.wrapping_add(elsewhere.unwrap_or(0));
    // SAFETY: a map value.
    unsafe { Counters::at(&raw mut (*delays).slots) }.observe(0, DELAY, waited);
    // It is counted, but not what it will wait on other CPUs.
    elsewhere.map(|_| ())
}

/// How far CLOCK_MONOTONIC is ahead of the clock of this CPU's run queue: see [`Clock`].
#[inline(always)]
fn ahead(now: u64, clock: u64) -> Option<u64> {
    let difference = now.wrapping_sub(clock);
    let window = now >> WINDOW_BITS;
    let known = CLOCKS.get_ptr_mut(0)?;
    // SAFETY: a map value of this CPU, whose interrupts are off.
    let known = unsafe { &mut *known };
    if known.window != window {
        known.before = if known.window + 1 == window {
            known.least
        } else {
            u64::MAX
        };
        known.window = window;
        known.least = difference;
    } else if difference < known.least {
        known.least = difference;
    }
    Some(if known.before < known.least {
        known.before
    } else {
        known.least
    })
}

/// What a thread waited on other CPUs before it was moved to this one, where by the kernel's clock it waited for `here`: what
/// the kernel has counted since the thread was last seen. An error where there is no room to note what it has counted now.
#[inline(always)]
unsafe fn elsewhere(task: *const u8, process: u32, here: u64) -> Result<u64, Loss> {
    // SAFETY: typed.
    let (thread, run_delay, arrivals): (u32, u64, u64) = unsafe {
        (
            load(task, &OFF_TASK_PID),
            load(task, &OFF_RUN_DELAY),
            load(task, &OFF_ARRIVALS),
        )
    };
    let next = Thread {
        run_delay: run_delay.wrapping_add(here),
        arrivals: arrivals + 1,
        process: u64::from(process),
    };
    if let Some(last) = THREADS.get_ptr_mut(&thread) {
        // SAFETY: a map value that one CPU at a time uses, the one that the thread comes onto.
        let last = unsafe { core::ptr::replace(last, next) };
        if arrivals < last.arrivals {
            return Ok(0);
        }
        missed(arrivals - last.arrivals);
        return Ok(run_delay.wrapping_sub(last.run_delay));
    }
    // SAFETY: typed.
    let flags: u32 = unsafe { load(task, &OFF_TASK_FLAGS) };
    // Nobody would remove one that has been removed already.
    if flags & EXITING == 0 && THREADS.insert(&thread, &next, 0).is_err() {
        return Err(Loss::MapFull);
    }
    Ok(0)
}

/// Counts arrivals that were not seen.
#[inline(always)]
fn missed(arrivals: u64) {
    if arrivals != 0
        && let Some(counter) = LOST.get_ptr_mut(Loss::MissedSwitch as u32)
    {
        // SAFETY: a map value.
        unsafe { add(counter, arrivals) };
    }
}

/// The number of a search.
#[inline(always)]
fn search(which: u32) -> u32 {
    SEARCH.get(which).copied().unwrap_or_default()
}

/// What a process has open, as far as is known.
#[inline(always)]
fn devices_of(known: *const Process) -> Device {
    // SAFETY: a map value.
    unsafe { *known }.devices(search(SEARCHED))
}

/// Notes that a process has devices open.
#[inline(always)]
fn admit(process: u32, devices: Device, cgroup: u64) {
    let new = Process {
        cgroup,
        gpus: devices.gpus,
        gpus_before: 0,
        drivers: devices.drivers as u16,
        drivers_before: 0,
        search: search(SEARCHING),
    };
    if PROCESSES.get_ptr(&process).is_none() {
        match insert_new(&PROCESSES, &process, &new) {
            Ok(false) => {}
            Ok(true) => return,
            Err(loss) => return lose(&LOST, loss),
        }
    }
    let Some(known) = PROCESSES.get_ptr_mut(&process) else {
        return;
    };
    // SAFETY: a map value. 5.10 has no atomic OR. Of two threads that open a driver and a GPU at once neither writes what the other does;
    // of two that open two drivers, or two GPUs, one may be forgotten until the next search. So may be what is opened in the moment in which
    // a search first sees the process.
    unsafe {
        if (*known).search != new.search {
            let before = devices_of(known);
            *known = Process {
                gpus_before: before.gpus,
                drivers_before: before.drivers as u16,
                ..new
            };
            return;
        }
        (*known).cgroup = cgroup;
        if new.drivers != 0 {
            (*known).drivers |= new.drivers;
        }
        if new.gpus != 0 {
            (*known).gpus |= new.gpus;
        }
    }
}

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`: a child has its parent's open files. If it
/// closes them (it mostly executes another program), the next search sees that.
#[btf_tracepoint(function = "sched_process_fork")]
pub fn sched_process_fork(ctx: BtfTracePointContext) -> i32 {
    let (parent, child): (*const u8, *const u8) = (ctx.arg(0), ctx.arg(1));
    // SAFETY: the arguments are typed as the tracepoint declares them.
    let (parent, new): (u32, u32) =
        unsafe { (load(parent, &OFF_TASK_TGID), load(child, &OFF_TASK_TGID)) };
    if parent == new {
        return 0;
    }
    if let Some(parent) = PROCESSES.get_ptr(&parent) {
        // SAFETY: a typed task.
        let cgroup = unsafe { task_cgroup(child) };
        admit(new, devices_of(parent), cgroup);
    }
    0
}

/// `sched_process_exit(struct task_struct *p)`, with a second argument from 6.16: after the thread has left its process.
#[btf_tracepoint(function = "sched_process_exit")]
pub fn sched_process_exit(ctx: BtfTracePointContext) -> i32 {
    let task: *const u8 = ctx.arg(0);
    // SAFETY: the argument is typed as the tracepoint declares it.
    let process: u32 = unsafe { load(task, &OFF_TASK_TGID) };
    if PROCESSES.get_ptr(&process).is_none() {
        return 0;
    }
    // SAFETY: typed, from the task on.
    let (thread, left): (u32, i32) = unsafe {
        let signal: *const u8 = load(task, &OFF_TASK_SIGNAL);
        (load(task, &OFF_TASK_PID), load(signal, &OFF_SIGNAL_LIVE))
    };
    let _ = THREADS.remove(&thread);
    if left <= 0 {
        let _ = PROCESSES.remove(&process);
    }
    0
}

/// `chrdev_open(struct inode *inode, struct file *filp)`: the first open of every character device's file goes through it.
#[kprobe]
pub fn device_open(ctx: ProbeContext) -> u32 {
    let inode = Registers::of(&ctx).argument::<0>();
    let device: u32 = match field(inode, &OFF_INODE_RDEV) {
        Ok(device) => device,
        Err(loss) => {
            lose(&LOST, loss);
            return 0;
        }
    };
    if let Some(device) = value(&DEVICES, &device) {
        admit((thread() >> 32) as u32, device, cgroup());
    }
    0
}

/// Every open file of every task. `struct bpf_iter__task_file`: meta, task, descriptor, file, eight bytes each.
// SAFETY: the loader finds the program by its section and its name, which no other has.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn open_files(context: *mut c_void) -> i32 {
    let context: *const *const u8 = context.cast_const().cast();
    // SAFETY: the context has four words; the verifier knows the types behind them.
    let (task, file) = unsafe {
        (
            core::ptr::read_volatile(context.add(1)),
            core::ptr::read_volatile(context.add(3)),
        )
    };
    // After the last one.
    if task.is_null() || file.is_null() {
        return 0;
    }
    // SAFETY: typed, from the file on.
    let (mode, device): (u16, u32) = unsafe {
        let inode: *const u8 = load(file, &OFF_FILE_INODE);
        (load(inode, &OFF_INODE_MODE), load(inode, &OFF_INODE_RDEV))
    };
    if mode & TYPE != CHARACTER_DEVICE {
        return 0;
    }
    if let Some(device) = value(&DEVICES, &device) {
        // SAFETY: a typed task.
        let (process, cgroup) = unsafe { (load(task, &OFF_TASK_TGID), task_cgroup(task)) };
        admit(process, device, cgroup);
    }
    0
}
