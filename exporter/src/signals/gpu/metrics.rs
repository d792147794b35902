// SPDX-License-Identifier: Apache-2.0
//! What does `gpu` show, besides jobs and calls?

use std::{collections::BTreeMap, sync::Arc};

use exporter_common::gpu::DELAY;

use super::{calls, jobs};
use crate::{
    families::{Desc, Families, Kind},
    pods::Labels,
};

pub(super) const DESCS: &[&Desc] = &[
    &PROCESSES,
    &RUNQUEUE_DELAY,
    &jobs::QUEUE,
    &jobs::RUN,
    &calls::CALL,
    &calls::PREEMPTED,
];

/// How many counters an owner has.
pub const SLOTS: usize = DELAY.slots();

pub(crate) static PROCESSES: Desc = Desc {
    name: "chandra_gpu_processes",
    kind: Kind::Gauge,
    help: "Processes that have a GPU's device open, under each of the GPUs that they have open.",
    per_pod: true,
    labels: &["driver", "gpu"],
    values: &[],
    source: "open files of nvidia-uvm (driver nvidia), kfd (amdkfd), a render node (drm), an accelerator of the class accel (its driver's name) \
             or a device of --gpu.device (other); gpu is the N of /dev/nvidiaN, below 32, and empty of others; monitoring tools that open \
             nvidiactl and /dev/nvidiaN only do not count; not older than ten seconds",
};

pub(crate) static RUNQUEUE_DELAY: Desc = Desc {
    name: "chandra_gpu_runqueue_delay_seconds",
    kind: Kind::Histogram,
    help: "Seconds that threads of these processes were runnable before they ran.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "tracepoint sched:sched_switch and sched_info of the thread: one observation for each arrival on a CPU, after a wake-up, a \
             preemption or the end of a time slice; a CPU limit that throttles the pod is in it",
};

/// By which driver which GPU of NVIDIA's is driven, if that is known.
pub type Driven = (Arc<str>, Option<u32>);

/// Processes of an owner.
pub type Processes = BTreeMap<Driven, u64>;

/// Arrivals on a CPU, for the account of attribution.
pub(super) fn units(slots: &[u64; SLOTS]) -> u64 {
    slots[..DELAY.sum()].iter().sum()
}

/// Renders accounts by slot, and processes. Each appears with its first.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    processes: &BTreeMap<Labels, Processes>,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        if slots[..DELAY.sum()].iter().any(|count| *count > 0) {
            let labels = [&*owner.namespace, &*owner.pod, &*owner.container];
            families.add_histogram(&RUNQUEUE_DELAY, &labels, DELAY, slots);
        }
    }
    for (owner, counts) in processes {
        for ((driver, gpu), count) in counts {
            let gpu = gpu.map(|gpu| gpu.to_string()).unwrap_or_default();
            let labels = [
                &*owner.namespace,
                &*owner.pod,
                &*owner.container,
                driver,
                &*gpu,
            ];
            families.add(&PROCESSES, &labels, *count as f64);
        }
    }
}
