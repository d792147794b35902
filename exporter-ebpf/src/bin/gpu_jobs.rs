// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How long do jobs wait in the kernel's GPU scheduler, and how long do they run?
//!
//! Hooks: tracepoints of `gpu_scheduler`: `drm_sched_job_queue`, `drm_sched_job_run` and `drm_sched_job_done`, before 6.16
//! `drm_sched_job`, `drm_run_job` and `drm_sched_process_job`. Map: `RINGS` feeds `chandra_gpu_job_queue_seconds` and
//! `chandra_gpu_job_run_seconds`.
#![no_std]
#![no_main]

use aya_ebpf::{
    EbpfContext, Global,
    helpers::bpf_probe_read_kernel_str_bytes,
    macros::{map, tracepoint},
    maps::HashMap,
    programs::TracePointContext,
};
use exporter_common::gpu::{JOB, Job, Jobs, MAX_JOBS, MAX_RINGS, NAME, Ring};
use exporter_ebpf::{
    ABSENT, Counters, Loss, cgroup, constants, entry, leave, lose, now, object, read_kernel,
};

object!();

// Where the records have their fields, as tracefs tells. A fence is known by its context and number, or by its address.
constants!(
    OFF_QUEUE_FENCE,
    OFF_QUEUE_SEQNO,
    OFF_QUEUE_DEVICE,
    OFF_QUEUE_RING,
    RING_IS_POINTER,
    OFF_RUN_FENCE,
    OFF_RUN_SEQNO,
    OFF_DONE_FENCE,
    OFF_DONE_SEQNO,
);

/// Jobs that are queued or run.
#[map]
static JOBS: HashMap<[u64; 2], Job> = HashMap::with_max_entries(MAX_JOBS, 0);

/// By owner and ring.
#[map]
static RINGS: HashMap<Ring, Jobs> = HashMap::with_max_entries(MAX_RINGS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_JOBS: Jobs = Jobs {
    slots: [0; 2 * JOB.slots()],
};

/// The address of a field of a record. A load through a context at an offset that was added to it is refused by older
/// verifiers; the helper takes it.
#[inline(always)]
fn at(ctx: &TracePointContext, offset: u32) -> *const u8 {
    ctx.as_ptr().cast::<u8>().wrapping_add(offset as usize)
}

#[inline(always)]
fn read<T: Copy>(ctx: &TracePointContext, offset: &Global<u32>) -> Result<T, Loss> {
    read_kernel(at(ctx, offset.load()) as u64)
}

/// What names a job in all its records.
#[inline(always)]
fn key(
    ctx: &TracePointContext,
    fence: &Global<u32>,
    seqno: &Global<u32>,
) -> Result<[u64; 2], Loss> {
    let number = if seqno.load() == ABSENT {
        0
    } else {
        read(ctx, seqno)?
    };
    Ok([read(ctx, fence)?, number])
}

/// Where a string of a record is (`__data_loc`: it begins in the record where the low half says, and is as long as the high half
/// says).
#[inline(always)]
fn string(ctx: &TracePointContext, offset: &Global<u32>) -> Result<*const u8, Loss> {
    let location: u32 = read(ctx, offset)?;
    Ok(at(ctx, location & 0xffff))
}

#[inline(always)]
fn copy(from: *const u8, to: &mut [u8; NAME]) -> Result<(), Loss> {
    // SAFETY: the helper checks the address, copies up to the first 0 and ends with one.
    let copied = unsafe { bpf_probe_read_kernel_str_bytes(from, to) };
    copied.map(|_| ()).map_err(|_| Loss::Unreadable)
}

/// In the thread that submits.
#[tracepoint]
pub fn job_queued(ctx: TracePointContext) -> u32 {
    if let Err(loss) = queued(&ctx) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn queued(ctx: &TracePointContext) -> Result<(), Loss> {
    let mut job = Job {
        ring: Ring {
            cgroup: cgroup(),
            device: [0; NAME],
            name: [0; NAME],
        },
        since: now(),
        runs: 0,
    };
    if OFF_QUEUE_DEVICE.load() != ABSENT {
        copy(string(ctx, &OFF_QUEUE_DEVICE)?, &mut job.ring.device)?;
    }
    let name = if RING_IS_POINTER.load() == 1 {
        read::<u64>(ctx, &OFF_QUEUE_RING)? as *const u8
    } else {
        string(ctx, &OFF_QUEUE_RING)?
    };
    copy(name, &mut job.ring.name)?;
    let key = key(ctx, &OFF_QUEUE_FENCE, &OFF_QUEUE_SEQNO)?;
    JOBS.insert(&key, &job, 0).map_err(|_| Loss::MapFull)
}

/// In a thread of the scheduler, before the driver hands it to the hardware. The job may then wait in the ring for others
/// that the hardware has got.
#[tracepoint]
pub fn job_runs(ctx: TracePointContext) -> u32 {
    if let Err(loss) = runs(&ctx) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn runs(ctx: &TracePointContext) -> Result<(), Loss> {
    let now = now();
    let key = key(ctx, &OFF_RUN_FENCE, &OFF_RUN_SEQNO)?;
    // One that was queued before Chandra looked, or is given to the hardware again after a reset.
    let Some(job) = JOBS.get_ptr_mut(&key) else {
        return Ok(());
    };
    // SAFETY: a map value; one job is handed over by one thread.
    let (ring, since) = unsafe {
        if (*job).runs != 0 {
            return Ok(());
        }
        let since = (*job).since;
        (*job).runs = 1;
        (*job).since = now;
        ((*job).ring, since)
    };
    observe(&ring, 0, now.wrapping_sub(since))
}

/// Where the hardware's end of it is heard of, mostly in an interrupt.
#[tracepoint]
pub fn job_done(ctx: TracePointContext) -> u32 {
    if let Err(loss) = done(&ctx) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn done(ctx: &TracePointContext) -> Result<(), Loss> {
    let now = now();
    let key = key(ctx, &OFF_DONE_FENCE, &OFF_DONE_SEQNO)?;
    let Some(job) = leave(&JOBS, &key) else {
        return Ok(());
    };
    if job.runs == 0 {
        // Ended without the hardware.
        return Ok(());
    }
    observe(&job.ring, JOB.slots(), now.wrapping_sub(job.since))
}

/// Adds to one of the two histograms, which begins at a slot.
#[inline(always)]
fn observe(ring: &Ring, first: usize, nanoseconds: u64) -> Result<(), Loss> {
    let jobs = entry(&RINGS, ring, &NO_JOBS)?;
    // SAFETY: a map value.
    unsafe { Counters::at(&raw mut (*jobs).slots) }.observe(first as u64, JOB, nanoseconds);
    Ok(())
}
