// SPDX-License-Identifier: Apache-2.0
//! How long do calls of the CUDA driver take, and how long of that is their thread kept from running?
//!
//! Hooks: uprobes and uretprobes on functions of every libcuda that a process with a GPU's device has mapped. Metrics:
//! `chandra_cuda_call_seconds`, `chandra_cuda_call_preempted_seconds`.
//!
//! Only with `--cuda-calls`. A probe costs each call about a microsecond, so they are there for a share of the time, the
//! budget: in a window all are attached, and after it none is left and nothing is paid.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io, mem,
    os::fd::AsRawFd,
    path::Path,
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
    Part,
    library::{self, Site},
};
use crate::{
    families::{Desc, Families, Kind},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening},
    libraries::{self as files, Identity},
    pods::Labels,
    probe::{
        self, Attached, Constants, FileLink, Hook, Method, Need, PROBED_FILES, Program, Reason,
        Room, Runs,
    },
    signals::{Scope, entries, removed},
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

const fn program(name: &'static str, method: Method) -> Program {
    Program {
        name,
        method,
        functions: &[],
        need: Need::Required,
        needs: &[],
    }
}

const PROGRAMS: &[Program] = &[
    program(ENTRIES[0], Method::Uprobe),
    program(ENTRIES[1], Method::Uprobe),
    program(ENTRIES[2], Method::Uprobe),
    program(ENTRIES[3], Method::Uprobe),
    program(ENTRIES[4], Method::Uprobe),
    program(ENTRIES[5], Method::Uprobe),
    program(RETURN, Method::Uretprobe),
];

fn resolve(constants: &mut Constants<'_>) {
    constants.offset("OFF_RUN_DELAY", &[("task_struct", "sched_info.run_delay")]);
}

/// The shortest window, and the shortest time between two: as often as anybody looks.
const SHORTEST: Duration = Duration::from_secs(1);

/// How long a process is not looked at again: longer each time, since a library that comes comes soon.
const RARELY: Duration = Duration::from_secs(32);

/// How often calls are looked for that will not return, their process being gone.
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// The object at work.
struct Live {
    attached: Attached,
    /// For what to do about a refusal; without the types.
    kernel: Kernel,
    calls: maps::HashMap<MapData, u64, CudaCalls>,
    in_progress: maps::HashMap<MapData, CudaFrame, CudaBegun>,
}

impl Live {
    fn new(mut attached: Attached, kernel: Kernel) -> anyhow::Result<Self> {
        let mut take = |name: &str| {
            attached
                .ebpf
                .take_map(name)
                .with_context(|| format!("the object has no map {name}"))
        };
        Ok(Self {
            calls: take("CALLS")?.try_into()?,
            in_progress: take("IN_PROGRESS")?.try_into()?,
            attached,
            kernel,
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

/// What is known of a process.
struct Look {
    libraries: Vec<Identity>,
    next: Instant,
    every: Duration,
    /// Why it cannot be known.
    trouble: Option<String>,
}

/// A library that processes have mapped.
struct Library {
    /// Its path, for people.
    path: String,
    /// Its file: probes go to this and no other, whatever its path becomes.
    file: File,
    /// Where it is probed, or why not.
    sites: Result<Vec<Site>, String>,
    /// What came of each site in the present window, or in the last.
    outcomes: Vec<Result<(), (Reason, String)>>,
    /// The probes, two for each site, that of the entry before that of the return.
    links: Vec<FileLink>,
}

impl Library {
    fn new(path: String, file: File) -> Self {
        let sites = library::sites(&file);
        Self {
            sites: sites.map_err(|error| format!("cannot probe {path}: {error:#}")),
            path,
            file,
            outcomes: Vec::new(),
            links: Vec::new(),
        }
    }

    /// Attaches the probes, those of the returns first: each entry that is seen is followed by a return that is.
    fn attach(&mut self, live: &mut Live) {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let path = Path::new(&path);
        self.outcomes.clear();
        for site in self.sites.iter().flatten() {
            let mut attach = |place: u64| {
                let mut to = |program, room| {
                    let attached = &mut live.attached;
                    attached.attach_to_file(program, path, place, room, &live.kernel)
                };
                let mut room = Room::take(2)?;
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
    budget: f64,
    live: Option<Live>,
    /// What came of loading the object, where that failed.
    failed: Option<Vec<Hook>>,
    /// What works with less since the object was loaded.
    lacks: Vec<String>,
    looks: HashMap<u32, Look>,
    libraries: BTreeMap<Identity, Library>,
    window: Window,
    swept: Instant,
    /// Why the last window was not as it should.
    trouble: Option<String>,
    hooks: Vec<Hook>,
    notes: Vec<String>,
    ledger: Ledger<u64, SLOTS>,
    lost: Vec<(&'static str, u64)>,
    runs: Vec<(String, Runs)>,
}

impl Calls {
    /// Begins to follow libraries. Nothing is loaded before the first comes.
    pub(super) fn new(budget: f64, max_owners: usize) -> Self {
        let now = Instant::now();
        Self {
            budget,
            live: None,
            failed: None,
            lacks: Vec::new(),
            looks: HashMap::new(),
            libraries: BTreeMap::new(),
            window: Window::Shut { due: now },
            swept: now,
            trouble: None,
            hooks: Vec::new(),
            notes: Vec::new(),
            ledger: Ledger::new(max_owners, units).opening(Opening::Events),
            lost: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Looks for libraries in processes that are new, and now and then in the others; lets go of what nobody has any more.
    fn look(&mut self, processes: &[u32]) {
        let now = Instant::now();
        let there: BTreeSet<u32> = processes.iter().copied().collect();
        self.looks.retain(|process, _| there.contains(process));
        for process in there {
            let look = self.looks.entry(process).or_insert(Look {
                libraries: Vec::new(),
                next: now,
                every: SHORTEST,
                trouble: None,
            });
            if now < look.next {
                continue;
            }
            look.next = now + look.every;
            look.every = RARELY.min(look.every * 2);
            look.trouble = match find(process, &mut self.libraries) {
                Ok(libraries) => {
                    look.libraries = libraries;
                    None
                }
                Err(error) => Some(format!("{error:#}")),
            };
        }
        let looks = self.looks.values();
        let used: BTreeSet<Identity> = looks.flat_map(|look| &look.libraries).copied().collect();
        let mut gone = Vec::new();
        self.libraries.retain(|identity, library| {
            let same = || Identity::of(&library.file).is_ok_and(|now| now == *identity);
            let stays = used.contains(identity) && same();
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
    fn load(&mut self) {
        let wanted = self.libraries.values().any(|library| library.sites.is_ok());
        if self.live.is_some() || self.failed.is_some() || !wanted {
            return;
        }
        let mut kernel = Kernel::read();
        let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), resolve, &kernel);
        kernel.forget_types();
        self.lacks = outcome.notes;
        match outcome.attached.map(|attached| Live::new(attached, kernel)) {
            Some(Ok(live)) => self.live = Some(live),
            Some(Err(error)) => {
                self.lacks.push(format!("{error:#}"));
                self.failed = Some(Vec::new());
            }
            None => self.failed = Some(outcome.hooks),
        }
    }

    /// Opens and closes windows, so that their share of the time is within the budget.
    fn turn(&mut self) -> anyhow::Result<()> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
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
                // Nothing runs any more that would write: no call of a later window is taken for one of these.
                live.forget(|_| true)?;
                self.window = Window::Shut {
                    due: now + (now - *since).mul_f64(rest),
                };
                return Ok(());
            }
        }
        for library in self.libraries.values_mut() {
            if library.sites.is_ok() && library.links.is_empty() {
                library.attach(live);
                if !library.links.is_empty() && matches!(self.window, Window::Shut { .. }) {
                    self.window = Window::Open { since: now };
                }
            }
        }
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.swept = now;
            let looks = &self.looks;
            live.forget(|frame| !looks.contains_key(&((frame.thread >> 32) as u32)))?;
        }
        Ok(())
    }

    /// Tells what has become of it.
    fn tell(&mut self) {
        let mut hooks: BTreeMap<&'static str, (Reason, String)> = BTreeMap::new();
        for library in self.libraries.values() {
            let sites = library.sites.iter().flatten();
            for (site, outcome) in sites.zip(&library.outcomes) {
                for name in &site.names {
                    let (reason, detail) = match outcome {
                        Ok(()) => (Reason::Attached, String::new()),
                        Err((reason, why)) => {
                            (*reason, format!("{name} of {}: {why}", library.path))
                        }
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
        let before = mem::replace(&mut self.hooks, hooks.into_iter().map(hook).collect());
        let mut told: Vec<_> = before.into_iter().map(|hook| hook.detail).collect();
        self.hooks.extend(self.failed.iter().flatten().cloned());

        let mut notes = self.lacks.clone();
        notes.extend(self.trouble.clone());
        let refused = self.libraries.values();
        notes.extend(refused.filter_map(|library| library.sites.as_ref().err().cloned()));
        let mut unseen = self.looks.values().filter_map(|look| look.trouble.as_ref());
        if let Some(why) = unseen.next() {
            let more = match unseen.count() {
                0 => String::new(),
                more => format!(" (and {more} processes more)"),
            };
            notes.push(format!("calls of CUDA are not seen: {why}{more}"));
        }
        for note in notes.iter().filter(|note| !self.notes.contains(note)) {
            tracing::warn!("signal gpu: {note}");
        }
        for hook in &self.hooks {
            let new = |detail: &String| !detail.is_empty() && !told.contains(detail);
            if new(&hook.detail) {
                tracing::warn!("signal gpu: {}", hook.detail);
                told.push(hook.detail.clone());
            }
        }
        self.notes = notes;
    }
}

/// Finds the libraries of a process, and opens those that are new.
fn find(
    process: u32,
    libraries: &mut BTreeMap<Identity, Library>,
) -> anyhow::Result<Vec<Identity>> {
    let folder = format!("/proc/{process}");
    let folder = Path::new(&folder);
    let Some(maps) = files::read_maps(folder)? else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for mapped in files::mapped(&maps, |name| files::is_library(name, "libcuda")) {
        let file = mapped.open(folder)?;
        let identity = Identity::of(&file).with_context(|| format!("look at {}", mapped.path))?;
        if !libraries.contains_key(&identity) {
            anyhow::ensure!(
                libraries.len() < PROBED_FILES,
                "{} is one more than the {PROBED_FILES} libraries that are probed at once",
                mapped.path
            );
            libraries.insert(identity, Library::new(mapped.path, file));
        }
        found.push(identity);
    }
    Ok(found)
}

impl Part for Calls {
    fn follow(&mut self, processes: &[u32]) {
        self.look(processes);
        self.load();
        self.trouble = self.turn().err().map(|error| format!("{error:#}"));
        self.tell();
    }

    fn status(&self) -> (&[Hook], &[String]) {
        (&self.hooks, &self.notes)
    }

    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<()> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        scope.book(&mut self.ledger, &mut live.calls, |calls| calls.slots)?;
        self.lost = live.attached.lost()?;
        self.runs = live.attached.runs();
        Ok(())
    }

    fn render(&self, families: &mut Families) {
        render(self.ledger.accounts(), families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn lost(&self) -> Vec<(&'static str, u64)> {
        self.lost.clone()
    }

    fn runs(&self) -> Vec<(String, Runs)> {
        self.runs.clone()
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
