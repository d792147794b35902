// SPDX-License-Identifier: Apache-2.0
//! How long do calls of the CUDA driver take, and how long of that is their thread kept from running?
//!
//! Hooks: uprobes and uretprobes on functions of every libcuda that a process with a GPU's device has mapped. Metrics:
//! `chandra_cuda_call_seconds`, `chandra_cuda_call_preempted_seconds`.
//!
//! Only with `--cuda-calls`. A probe costs each call about a microsecond, so they are there for a share of the time, the
//! budget: in a window all are attached, and after it none is left and nothing is paid.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::{
    include_bytes_aligned,
    maps::{self, MapData},
};
use exporter_common::gpu::{
    CUDA_CALL, CUDA_CALL_SLOTS, CUDA_CALLS, CudaBegun, CudaCalls, CudaFrame,
};

use super::{
    LOOK_EVERY,
    library::{self, Site},
};
use crate::{
    families::{Desc, Families, Kind},
    hook::{Program, Target},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening},
    libraries::{
        maps::Interest,
        probed::{self, Place, detach},
        watch::{Watch, Watched, processes, shown},
    },
    lock::lock,
    pods::Labels,
    probe::{Attached, Constants, Counters, Health},
    signals::{
        Options, Read, Scope, Signal, State, Status, entries,
        follow::{self, Follower, Following, StatusLog, at_once_and_every},
        removed,
    },
};

pub(super) static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/gpu_calls.o"));

/// How many counters an owner has.
pub const SLOTS: usize = CUDA_CALLS.len() * CUDA_CALL_SLOTS;

pub(super) static CALL: Desc = Desc {
    name: "chandra_cuda_call_seconds",
    kind: Kind::Histogram,
    help: "Seconds that calls of the CUDA driver took, in a sample of the time.",
    per_pod: true,
    labels: &["call"],
    values: &[("call", &CUDA_CALLS)],
    source: "uprobes on functions of libcuda.so.1, with --cuda-calls, in the share of the time that --cuda-calls.budget allows; a call \
             counts if it begins and ends while they are there",
};

pub(super) static PREEMPTED: Desc = Desc {
    name: "chandra_cuda_call_preempted_seconds",
    kind: Kind::Histogram,
    help: "Seconds of these calls in which their thread was runnable and did not run.",
    per_pod: true,
    labels: &["call"],
    values: &[("call", &CUDA_CALLS)],
    source: "growth of the thread's sched_info.run_delay during the call, one observation for each",
};

/// The programs of the calls, in their order.
const ENTRIES: [&str; CUDA_CALLS.len()] = [
    "cuda_launch",
    "cuda_stream_sync",
    "cuda_event_sync",
    "cuda_ctx_sync",
    "cuda_memcpy",
    "cuda_graph",
];

const RETURN: &str = "cuda_return";

const PROGRAMS: &[Program] = &[
    Program::required(ENTRIES[0], Target::Uprobe),
    Program::required(ENTRIES[1], Target::Uprobe),
    Program::required(ENTRIES[2], Target::Uprobe),
    Program::required(ENTRIES[3], Target::Uprobe),
    Program::required(ENTRIES[4], Target::Uprobe),
    Program::required(ENTRIES[5], Target::Uprobe),
    Program::required(RETURN, Target::Uretprobe),
];

fn resolve(constants: &mut Constants<'_>) {
    constants.offset("OFF_RUN_DELAY", &[("task_struct", "sched_info.run_delay")]);
}

/// The shortest window, and the shortest time between two: as often as anybody looks.
const SHORTEST: Duration = Duration::from_secs(1);

/// How often calls are looked for that will not return, their process being gone.
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// The object's maps, for as long as one of them is read or swept.
struct Live {
    counters: Arc<Counters>,
    calls: maps::HashMap<MapData, u64, CudaCalls>,
    in_progress: maps::HashMap<MapData, CudaFrame, CudaBegun>,
}

impl Live {
    fn new(attached: &mut Attached) -> anyhow::Result<Self> {
        Ok(Self {
            counters: attached.counters(),
            calls: attached.map("CALLS")?,
            in_progress: attached.map("IN_PROGRESS")?,
        })
    }

    /// Forgets calls that have not returned.
    fn forget(&mut self, which: impl Fn(&CudaFrame) -> bool) -> anyhow::Result<()> {
        for (frame, _) in entries(&self.in_progress)? {
            if which(&frame) {
                removed(self.in_progress.remove(&frame))?;
            }
        }
        Ok(())
    }
}

/// Where a library is probed, or why not.
type Sites = Result<Vec<Site>, String>;

impl probed::Sites for Sites {
    fn places(&self) -> Vec<Place> {
        let place = |site: &Site| Place {
            names: site.names.clone(),
            at: site.place.clone(),
            entry: ENTRIES[site.call as usize],
            exit: Some(RETURN),
        };
        self.iter().flatten().map(place).collect()
    }
}

/// Where the time goes.
enum Window {
    /// No probe is attached; from then on they may be.
    Shut { due: Instant },
    /// They have been since then.
    Open { since: Instant },
    /// They are being detached.
    Closing {
        since: Instant,
        done: JoinHandle<()>,
    },
}

/// Calls of the CUDA driver.
pub(super) struct Calls {
    following: Following<Core>,
    ledger: Ledger<u64, SLOTS>,
}

/// What is read: the maps, where the object is loaded.
#[derive(Default)]
struct Core {
    live: Option<Live>,
}

impl Core {
    /// Forgets calls that have not returned.
    fn forget(&mut self, which: impl Fn(&CudaFrame) -> bool) -> anyhow::Result<()> {
        match &mut self.live {
            Some(live) => live.forget(which),
            None => Ok(()),
        }
    }
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        match &self.live {
            Some(live) => live.counters.health(),
            None => Ok(Health::default()),
        }
    }
}

/// What attaches to libraries as they come, and opens and closes windows.
struct Libraries {
    gpu: Arc<Mutex<super::Core>>,
    budget: f64,
    probed: probed::Libraries<Sites>,
    show_paths: bool,
    window: Window,
    swept: Instant,
    /// Why the last window was not as it should.
    trouble: Option<String>,
    log: StatusLog,
}

/// What is watched for. What is called as the driver is of use, or said why not.
fn watched() -> Watched {
    Watched {
        interest: Interest::Cuda,
        wanted: library::wanted(),
        is_of_use: |_| true,
    }
}

impl Calls {
    /// Begins to follow libraries. Nothing is loaded before the first comes.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn new(
        gpu: Arc<Mutex<super::Core>>,
        budget: f64,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        let nobody = Some(BTreeSet::new());
        let watch = Watch::start("cuda", watched(), nobody, &options.gate)?;
        let libraries = Libraries {
            gpu,
            budget,
            probed: probed::Libraries::new(watch),
            show_paths: options.show_paths,
            window: Window::Shut { due: now },
            swept: now,
            trouble: None,
            log: StatusLog::new("gpu"),
        };
        let wait = at_once_and_every(LOOK_EVERY);
        Ok(Self {
            following: Following::start("gpu-calls", Core::default(), libraries, None, wait)?,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
        })
    }
}

impl Libraries {
    /// Takes over what is mapped now.
    fn take_over(&mut self) {
        let processes = lock(&self.gpu).processes();
        self.probed.watch.only(processes.into_iter().collect());
        self.probed.meet(|found| {
            let sites = library::sites(&found.library);
            Some(sites.map_err(|error| format!("{error:#}")))
        });
        self.probed.let_go(|_, _| true);
    }

    /// Loads the object when there is something to probe.
    fn load(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) {
        let mut files = self.probed.files.values();
        if self.probed.is_waiting() && files.any(|file| file.sites.is_ok()) {
            let live = self
                .probed
                .load(OBJECT, PROGRAMS, resolve, kernel(), Live::new);
            lock(core).live = live;
        }
    }

    /// Opens and closes windows, so that their share of the time is within the budget.
    fn turn(&mut self, core: &Mutex<Core>) -> anyhow::Result<()> {
        if !self.probed.is_loaded() {
            return Ok(());
        }
        let now = Instant::now();
        let rest = (1.0 - self.budget) / self.budget;
        match &self.window {
            Window::Shut { due } if now < *due => return Ok(()),
            Window::Shut { .. } => {}
            // Long enough that the time between two is not shorter than the shortest.
            Window::Open { since } => {
                let length = SHORTEST.max(SHORTEST.div_f64(rest.max(1e-6)));
                if self.budget < 1.0 && now - *since >= length {
                    let links = self.probed.take_links();
                    let done = detach(links).context("start a thread")?;
                    self.window = Window::Closing {
                        since: *since,
                        done,
                    };
                    return Ok(());
                }
            }
            Window::Closing { done, .. } if !done.is_finished() => return Ok(()),
            Window::Closing { since, .. } => {
                let since = *since;
                // Nothing runs any more that would write: no call of a later window is taken for one of these.
                lock(core).forget(|_| true)?;
                self.window = Window::Shut {
                    due: now + (now - since).mul_f64(rest),
                };
                return Ok(());
            }
        }
        self.probed
            .probe(|file| file.sites.is_ok() && file.links.is_empty());
        let mut files = self.probed.files.values();
        if matches!(self.window, Window::Shut { .. }) && files.any(|file| !file.links.is_empty()) {
            self.window = Window::Open { since: now };
        }
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.swept = now;
            let there = processes().context("list the processes")?;
            lock(core).forget(|frame| !there.contains(&((frame.thread >> 32) as u32)))?;
        }
        Ok(())
    }

    /// What has become of it, with the paths of files or only their names.
    fn status(&self, with_paths: bool) -> Status {
        let mut own: Vec<_> = self.trouble.iter().cloned().collect();
        own.extend(self.probed.files.values().filter_map(|file| {
            let why = file.sites.as_ref().err()?;
            let path = shown(&file.found.path, with_paths);
            Some(format!("cannot probe {path}: {why}"))
        }));
        let unseen = "calls of CUDA are not seen everywhere";
        Status {
            hooks: self.probed.hooks(with_paths),
            notes: self.probed.notes(own, unseen, with_paths),
            skipped: Some(self.probed.snapshot.skipped),
            ..Status::bare(State::Absent)
        }
    }
}

impl Follower<Core> for Libraries {
    fn before(&self) -> Status {
        self.status(self.show_paths)
    }

    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        self.take_over();
        self.load(core, kernel);
        self.trouble = self.turn(core).err().map(|error| format!("{error:#}"));
        self.log.tell(self.status(true));
        self.status(self.show_paths)
    }
}

impl Signal for Calls {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.following.read(|core| {
            if let Some(live) = &mut core.live {
                scope.book(&mut self.ledger, &mut live.calls, |calls| calls.slots)?;
            }
            Ok(())
        })
    }

    fn render(&self, families: &mut Families) {
        render(self.ledger.accounts(), families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.following.health())
    }

    fn status(&self) -> Option<Status> {
        Some(self.following.status())
    }
}

/// How many calls there were.
fn units(slots: &[u64; SLOTS]) -> u64 {
    let of_call = slots.chunks_exact(CUDA_CALL_SLOTS);
    of_call.flat_map(|call| &call[..CUDA_CALL.sum()]).sum()
}

/// Renders accounts by slot. A call appears with its first.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        for (call, slots) in CUDA_CALLS.iter().zip(slots.chunks_exact(CUDA_CALL_SLOTS)) {
            let labels = [&*owner.namespace, &*owner.pod, &*owner.container, call];
            let (took, preempted) = slots.split_at(CUDA_CALL.slots());
            for (desc, slots) in [(&CALL, took), (&PREEMPTED, preempted)] {
                if slots[..CUDA_CALL.sum()].iter().any(|count| *count > 0) {
                    families.add_histogram(desc, &labels, CUDA_CALL, slots);
                }
            }
        }
    }
}
