// SPDX-License-Identifier: Apache-2.0
//! How long do the threads that drive a GPU wait for a CPU?
//!
//! Hooks: tp_btf `sched_switch`, `sched_process_fork` and `sched_process_exit`, kprobe `chrdev_open`, iterator
//! `task_file`. Metrics: `chandra_gpu_processes`, `chandra_gpu_runqueue_delay_seconds`.
//!
//! A process drives a GPU while it has one of the devices open by which that is done: nvidia-uvm (CUDA), kfd (ROCm), a
//! render node (other GPUs), an accelerator (`/dev/accel/*`), or one named by flag. Which of NVIDIA's it drives `/dev/nvidiaN` tells. The kernel half hears of opens and forks at once; which
//! processes still have such a device open, and which were handed one, a walk over all open files tells every ten
//! seconds, or every second where the kernel takes no kprobes.
//!
//! Devices are looked for all the time: a driver may be loaded late. As long as there has been none, nothing is attached.

pub mod calls;
mod devices;
mod follow;
pub mod jobs;
mod library;
pub(crate) mod metrics;
mod programs;

use std::{collections::BTreeMap, path::PathBuf, thread, time::Duration};

use aya::include_bytes_aligned;

use self::{
    calls::Calls,
    follow::{Core, Devices},
    jobs::Jobs,
    metrics::units,
};
pub use self::{
    devices::Places,
    metrics::{Driven, Processes, SLOTS, render},
};
use super::{
    Attempt, Entry, Options, Read, Scope, Signal, State, Status, entries, follow::Following,
};
use crate::{
    capabilities::{BPF, CUDA_LIBRARIES, CUDA_UPROBES, DEVICES, KPROBES, PERFMON},
    families::Families,
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening, Shown},
    pods::Labels,
    probe::Health,
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "gpu",
    question: "How long do the threads that drive a GPU wait for a CPU?",
    descs: metrics::DESCS,
    objects: &[OBJECT, jobs::OBJECT, calls::OBJECT],
    needs: &[BPF, PERFMON, KPROBES, CUDA_UPROBES, CUDA_LIBRARIES, DEVICES],
    attach,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/gpu.o"));

/// What the signal looks at.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Device files that drive a GPU, besides those that are known.
    pub devices: Vec<PathBuf>,
    /// In which share of the time calls of CUDA are timed; never, where there is none.
    pub calls: Option<f64>,
}

/// How often devices are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Gpu::new(kernel, options))
}

struct Gpu {
    following: Following<Core>,
    /// What is seen besides, with objects of their own.
    parts: Vec<Box<dyn Signal>>,
    ledger: Ledger<u64, SLOTS>,
    max_owners: usize,
    processes: BTreeMap<Labels, Processes>,
}

impl Gpu {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let following = Following::start(
            ENTRY.name,
            Core::default(),
            Devices::new(&options.gpu),
            Some(kernel),
            || thread::sleep(LOOK_EVERY),
        )?;
        let mut parts: Vec<Box<dyn Signal>> =
            vec![Box::new(Jobs::new(following.core(), options.max_owners)?)];
        if let Some(budget) = options.gpu.calls {
            parts.push(Box::new(Calls::new(following.core(), budget, options)?));
        }
        Ok(Self {
            following,
            parts,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
            max_owners: options.max_owners,
            processes: BTreeMap::new(),
        })
    }
}

impl Signal for Gpu {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        let mut all = Read::Now;
        for part in &mut self.parts {
            if part.read(scope)? == Read::Before {
                all = Read::Before;
            }
        }
        let own = self.following.read(|core| {
            let Some(live) = &mut core.live else {
                return Ok(());
            };
            scope.book(&mut self.ledger, &mut live.delays, |delays| delays.slots)?;
            self.processes.clear();
            let mut owners = Shown::new(self.max_owners);
            let mut processes = entries(&live.processes)?;
            // So that beyond the limit the same ones are shown each time.
            processes.sort_by_key(|(_, process)| process.cgroup);
            for (_, process) in processes {
                let driven = live.drivers.driven(process.devices(live.number));
                if driven.is_empty() {
                    continue;
                }
                let labels = owners.of(scope.resolve(process.cgroup));
                let of_owner = self.processes.entry(labels).or_default();
                for gpu in driven {
                    *of_owner.entry(gpu).or_default() += 1;
                }
            }
            Ok(())
        })?;
        Ok(if own == Read::Before { own } else { all })
    }

    fn render(&self, families: &mut Families) {
        if self.following.state() != State::Absent {
            render(self.ledger.accounts(), &self.processes, families);
            for part in &self.parts {
                part.render(families);
            }
        }
    }

    fn attribution(&self) -> Attribution {
        let parts = self.parts.iter().map(|part| part.attribution());
        self.ledger.attribution() + parts.sum::<Attribution>()
    }

    fn health(&self) -> anyhow::Result<Health> {
        let mut all = self.following.health();
        for part in &self.parts {
            all += part.health()?;
        }
        Ok(all)
    }

    fn status(&self) -> Option<Status> {
        let mut status = self.following.status();
        let parts = self.parts.iter().filter_map(|part| part.status());
        for part in parts {
            if status.state == State::Up {
                status.hooks.extend(part.hooks);
                status.notes.extend(part.notes);
            }
            status.skipped = status.skipped.or(part.skipped);
        }
        Some(status)
    }
}
