// SPDX-License-Identifier: Apache-2.0
//! How long do calls of the CUDA driver take, and how long of that is their thread kept from running?
//!
//! Hooks: uprobes and uretprobes on functions of every libcuda that a process with a GPU's device has mapped. Metrics:
//! `chandra_cuda_call_seconds`, `chandra_cuda_call_preempted_seconds`.
//!
//! Only with `--cuda-calls`. A probe costs each call about a microsecond, so they are there for a share of the time, the
//! budget: in a window all are attached, and after it none is left and nothing is paid.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    os::fd::AsRawFd,
    path::Path,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
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
    hook::{Hook, Method, Program, Reason, Target},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening},
    libraries::{
        Identity,
        maps::Interest,
        watch::{Found, Snapshot, Watch, Watched, processes, shown},
    },
    lock::lock,
    pods::Labels,
    probe::{self, Attached, Constants, Counters, FileLink, Health},
    signals::{
        Options, Read, Scope, Signal, State, Status, entries,
        follow::{self, BoundedLog, Follower, Following},
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

/// The object, for who attaches.
struct Loaded {
    attached: Attached,
    /// For what to do about a refusal; without the types.
    kernel: Kernel,
}

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

/// A library that processes have mapped.
struct Library {
    found: Arc<Found>,
    /// Where it is probed, or why not.
    sites: Result<Vec<Site>, String>,
    /// What came of each site in the present window, or in the last.
    outcomes: Vec<Result<(), (Reason, String)>>,
    /// The probes, two for each site, that of the entry before that of the return.
    links: Vec<FileLink>,
}

impl Library {
    fn new(found: Arc<Found>) -> Self {
        let sites = library::sites(&found.library);
        Self {
            sites: sites.map_err(|error| format!("{error:#}")),
            found,
            outcomes: Vec::new(),
            links: Vec::new(),
        }
    }

    /// Attaches the probes, those of the returns first: each entry that is seen is followed by a return that is.
    fn attach(&mut self, identity: &Identity, snapshot: &Snapshot, loaded: &mut Loaded) {
        let path = format!("/proc/self/fd/{}", self.found.file.as_raw_fd());
        let path = Path::new(&path);
        self.outcomes.clear();
        for site in self.sites.iter().flatten() {
            let mut attach = |place: u64| {
                let mut to = |program, room| {
                    let attached = &mut loaded.attached;
                    attached.attach_to_file(program, path, place, room, &loaded.kernel)
                };
                let mut room = snapshot.room(identity, 2)?;
                let returns = to(RETURN, room.pop().expect("two"))?;
                let entries = to(ENTRIES[site.call as usize], room.pop().expect("two"))?;
                self.links.extend([entries, returns]);
                Ok(())
            };
            self.outcomes.push(match &site.place {
                Ok(place) => attach(*place),
                Err(why) => Err((Reason::Expensive, why.clone())),
            });
        }
    }
}

/// Detaches probes, in the order of the list, beside everything else: the kernel takes about a tenth of a second for each.
fn detach(links: Vec<FileLink>) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name("cuda".to_owned());
    thread.spawn(move || links.into_iter().for_each(drop))
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
    fn health(&self) -> anyhow::Result<Option<Health>> {
        let live = self.live.as_ref();
        live.map(|live| live.counters.health()).transpose()
    }
}

/// What attaches to libraries as they come, and opens and closes windows.
struct Libraries {
    gpu: Arc<Mutex<super::Core>>,
    budget: f64,
    watch: Watch,
    snapshot: Arc<Snapshot>,
    show_paths: bool,
    loaded: Option<Loaded>,
    /// What came of loading the object, where that failed.
    failed: Option<Vec<Hook>>,
    /// What works with less since the object was loaded.
    lacks: Vec<String>,
    libraries: BTreeMap<Identity, Library>,
    window: Window,
    swept: Instant,
    /// Why the last window was not as it should.
    trouble: Option<String>,
    log: BoundedLog,
    /// What has been logged last.
    logged: Status,
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
        let libraries = Libraries {
            gpu,
            budget,
            watch: Watch::start("cuda", watched(), nobody, &options.gate)?,
            snapshot: Arc::default(),
            show_paths: options.show_paths,
            loaded: None,
            failed: None,
            lacks: Vec::new(),
            libraries: BTreeMap::new(),
            window: Window::Shut { due: now },
            swept: now,
            trouble: None,
            log: BoundedLog::new("gpu"),
            logged: Status::bare(State::Absent),
        };
        let wait = || thread::sleep(LOOK_EVERY);
        Ok(Self {
            following: Following::start("gpu-calls", Core::default(), libraries, None, wait)?,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
        })
    }
}

impl Libraries {
    /// Takes over what is mapped now, and lets go of what nobody has any more.
    fn take_over(&mut self) {
        let found = &self.snapshot.files;
        for (identity, found) in found {
            let library = || Library::new(Arc::clone(found));
            self.libraries.entry(*identity).or_insert_with(library);
        }
        let mut gone = Vec::new();
        self.libraries.retain(|identity, library| {
            let stays = found.contains_key(identity);
            if !stays {
                gone.append(&mut library.links);
            }
            stays
        });
        if !gone.is_empty() {
            // Where no thread can be started, they are detached here.
            let _ = detach(gone);
        }
    }

    /// Loads the object when there is something to probe.
    fn load(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) {
        let wanted = self.libraries.values().any(|library| library.sites.is_ok());
        if self.loaded.is_some() || self.failed.is_some() || !wanted {
            return;
        }
        let mut kernel = kernel();
        let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), resolve, &kernel);
        kernel.forget_types();
        self.lacks = outcome.notes;
        let Some(mut attached) = outcome.attached else {
            self.failed = Some(outcome.hooks);
            return;
        };
        match Live::new(&mut attached) {
            Ok(live) => {
                lock(core).live = Some(live);
                self.loaded = Some(Loaded { attached, kernel });
            }
            Err(error) => {
                self.lacks.push(format!("{error:#}"));
                self.failed = Some(Vec::new());
            }
        }
    }

    /// Opens and closes windows, so that their share of the time is within the budget.
    fn turn(&mut self, core: &Mutex<Core>) -> anyhow::Result<()> {
        if self.loaded.is_none() {
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
                    let libraries = self.libraries.values_mut();
                    let links = libraries.flat_map(|library| library.links.drain(..));
                    let done = detach(links.collect()).context("start a thread")?;
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
        let Some(loaded) = &mut self.loaded else {
            return Ok(());
        };
        for (identity, library) in &mut self.libraries {
            if library.sites.is_ok() && library.links.is_empty() {
                library.attach(identity, &self.snapshot, loaded);
                if !library.links.is_empty() && matches!(self.window, Window::Shut { .. }) {
                    self.window = Window::Open { since: now };
                }
            }
        }
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.swept = now;
            let there = processes().context("list the processes")?;
            lock(core).forget(|frame| !there.contains(&((frame.thread >> 32) as u32)))?;
        }
        Ok(())
    }

    /// What has become of it, with the paths of files or only their names.
    fn told(&self, with_paths: bool) -> Status {
        let mut hooks: BTreeMap<&'static str, (Reason, String)> = BTreeMap::new();
        for library in self.libraries.values() {
            let path = shown(&library.found.path, with_paths);
            let sites = library.sites.iter().flatten();
            for (site, outcome) in sites.zip(&library.outcomes) {
                for name in &site.names {
                    let (reason, detail) = match outcome {
                        Ok(()) => (Reason::Attached, String::new()),
                        Err((reason, why)) => (*reason, format!("{name} of {path}: {why}")),
                    };
                    let known = hooks
                        .entry(name)
                        .or_insert((Reason::Attached, String::new()));
                    if known.0 == Reason::Attached {
                        *known = (reason, detail);
                    }
                }
            }
        }
        let hook = |(name, (reason, detail))| Hook {
            name,
            method: Method::Uprobe,
            reason,
            detail,
        };
        let mut hooks: Vec<_> = hooks.into_iter().map(hook).collect();
        hooks.extend(self.failed.iter().flatten().cloned());
        let mut notes = self.lacks.clone();
        notes.extend(self.trouble.clone());
        notes.extend(self.libraries.values().filter_map(|library| {
            let why = library.sites.as_ref().err()?;
            let path = shown(&library.found.path, with_paths);
            Some(format!("cannot probe {path}: {why}"))
        }));
        let of_files = self.snapshot.notes.iter();
        notes.extend(of_files.map(|note| {
            format!(
                "calls of CUDA are not seen everywhere: {}",
                note.told(with_paths)
            )
        }));
        Status {
            hooks,
            notes,
            skipped: Some(self.snapshot.skipped),
            ..Status::bare(State::Absent)
        }
    }

    /// Logs what is new, with all that is known.
    fn log(&mut self) {
        let new = self.told(true);
        let before = mem::replace(&mut self.logged, new.clone());
        for note in new.notes.iter().filter(|note| !before.notes.contains(note)) {
            self.log.line(true, note);
        }
        let mut told: Vec<_> = before.hooks.into_iter().map(|hook| hook.detail).collect();
        for hook in new.hooks {
            if !hook.detail.is_empty() && !told.contains(&hook.detail) {
                self.log.line(true, &hook.detail);
                told.push(hook.detail);
            }
        }
    }
}

impl Follower<Core> for Libraries {
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        let processes = lock(&self.gpu).processes();
        self.watch.only(processes.into_iter().collect());
        self.snapshot = self.watch.snapshot();
        self.take_over();
        self.load(core, kernel);
        self.trouble = self.turn(core).err().map(|error| format!("{error:#}"));
        self.log();
        self.told(self.show_paths)
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
