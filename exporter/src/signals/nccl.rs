// SPDX-License-Identifier: Apache-2.0
//! Is a job slow because of the network, or because one rank comes late, and which?
//!
//! Hooks: uprobes on libnccl, on the profiler plugin and on libcuda's launch of graphs. Metrics: `chandra_nccl_*`.
//!
//! Two tiers. The host tier compares when the ranks of a communicator on this node call NCCL; it needs nothing of the job. The
//! profiler plugin, where a job has it, tells how long each collective took on the GPU: the rank for which it took the shortest came
//! last, since all end together.
//!
//! A library is probed once, whatever process or container it is found in. As long as no process has had NCCL, nothing is loaded.
//! Whoever attaches probes, which takes long, and whoever reads maps, have nothing to wait for from each other.

mod live;
pub mod pending;
pub mod ranks;
pub mod salt;
mod sites;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::include_bytes_aligned;
use exporter_common::{
    Loss,
    nccl::{
        ANY_PROCESS, CALL, COLLECTIVES, Communicator, GRAPH_SLOT, Group, Handle, INIT, LEARNT,
        Layout, NUMBERED, OPERATIONS, PHASES, SLOTS, SOURCES, Seat, Source, WAIT, call_slots,
        duration_slots, init_slots, wait_slots,
    },
};

use live::{Books, Live, sweep};
use pending::{Naming, Pending};
use ranks::{Ranks, Reading};
use salt::Salt;
use sites::{Kind as Library, Sites};

use super::{
    Attempt, BoundedLog, Entry, Options, Read, Scope, Signal, State, Status, announce, entries,
    removed,
};
use crate::{
    capabilities::{BPF, LIBRARIES, PERFMON, UPROBES},
    families::{Desc, Families, Kind},
    hook::{Hook, Method, Program, Reason, Target},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening, PATIENCE},
    libraries::{
        Identity, Skipped,
        maps::Interest,
        watch::{Found, Snapshot, Watch, Watched, shown},
    },
    lock::{lock, try_lock},
    pods::Labels,
    probe::{self, Attached, FileLink, Health},
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "nccl",
    question: "Is a job slow because one rank comes late, and which?",
    descs: &[
        &INIT_SECONDS,
        &ENQUEUE,
        &ARRIVAL_WAIT,
        &RANK_WAIT,
        &RANK_COLLECTIVES,
        &RANK_LAST,
        &RANK_DURATION,
        &COLLECTIVE,
        &pending::PENDING,
        &pending::OF_COMMUNICATOR,
        &pending::MISSING,
        &GRAPHS,
    ],
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, UPROBES, LIBRARIES],
    attach,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/nccl.o"));

static INIT_SECONDS: Desc = Desc {
    name: "chandra_nccl_init_seconds",
    kind: Kind::Histogram,
    help: "Seconds that communicators took to initialise, by phase.",
    per_pod: true,
    labels: &["phase"],
    values: &[("phase", &PHASES)],
    source: "uprobes on ncclCommInitRankFunc (total), commAlloc, bootstrapInit and bootstrapSplit (rendezvous), initTransportsRank, each phase \
             until the next begins; of a library without symbols only the total, of the exported functions, which return too early in a group \
             and where they do not block",
};

static ENQUEUE: Desc = Desc {
    name: "chandra_nccl_enqueue_seconds",
    kind: Kind::Histogram,
    help: "Seconds that calls of NCCL took on the host, which is not how long the collective took.",
    per_pod: true,
    labels: &["operation"],
    values: &[("operation", &OPERATIONS)],
    source: "uprobes on ncclEnqueueCheck, entry to return; of a library without symbols on the exported functions, of the most used ones as far as \
             24 probes go; not what a CUDA graph replays",
};

static ARRIVAL_WAIT: Desc = Desc {
    name: "chandra_nccl_arrival_wait_seconds",
    kind: Kind::Histogram,
    help: "Seconds that ranks waited for the last one of this node to arrive at a collective.",
    per_pod: true,
    labels: &["operation", "source"],
    values: &[("operation", &OPERATIONS), ("source", &SOURCES)],
    source: "host: from a rank's call to the last rank's call; kernel: from the profiler plugin, how much longer the collective took the rank \
             than the one that it took the shortest (all_gather, reduce_scatter, all_reduce)",
};

static RANK_WAIT: Desc = Desc {
    name: "chandra_nccl_rank_wait_seconds_total",
    kind: Kind::Counter,
    help: "Seconds that a rank waited for the last one of this node.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the histogram of waits; communicator is NCCL's commHash, with --nccl.salt-file a keyed hash of it, the same on all nodes; the 32 \
             communicators of a container with most wait, 64 ranks of each, at most 512 ranks of a container and 2048 of a node, the rest is other",
};

static RANK_COLLECTIVES: Desc = Desc {
    name: "chandra_nccl_rank_collectives_total",
    kind: Kind::Counter,
    help: "Collectives at which all ranks of this node arrived.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the waits of ranks",
};

static RANK_LAST: Desc = Desc {
    name: "chandra_nccl_rank_last_arrivals_total",
    kind: Kind::Counter,
    help: "Those of them at which the rank was the last of this node.",
    per_pod: true,
    labels: &["communicator", "rank", "source"],
    values: &[("source", &SOURCES)],
    source: "as the waits of ranks",
};

static RANK_DURATION: Desc = Desc {
    name: "chandra_nccl_rank_collective_seconds_total",
    kind: Kind::Counter,
    help: "Seconds that the collectives took on the rank's GPU: of several ranks the one with least came last, whatever node it is on.",
    per_pod: true,
    labels: &["communicator", "rank"],
    values: &[],
    source: "profiler plugin: all_gather, reduce_scatter, all_reduce",
};

static COLLECTIVE: Desc = Desc {
    name: "chandra_nccl_collective_seconds",
    kind: Kind::Histogram,
    help: "Seconds that collectives took on the GPU, the wait for the last rank included.",
    per_pod: true,
    labels: &["operation", "source"],
    values: &[("operation", &OPERATIONS), ("source", &["kernel"])],
    source: "profiler plugin: from the first channel's start to the last one's stop, by the GPU's clock",
};

static GRAPHS: Desc = Desc {
    name: "chandra_nccl_graph_launches_total",
    kind: Kind::Counter,
    help: "Launches of CUDA graphs by processes with NCCL: the collectives in them are not seen.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "uprobe on cuGraphLaunch",
};

fn programs() -> Vec<Program> {
    let program = |(name, is_return)| match is_return {
        true => Program::required(name, Target::Uretprobe),
        false => Program::required(name, Target::Uprobe),
    };
    sites::programs().map(program).collect()
}

/// What the signal is told by flags.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// What names of communicators are made with.
    pub salt: Option<Salt>,
}

/// How often it is asked what is mapped.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// A file that processes have mapped and that has to do with NCCL.
struct Probed {
    found: Arc<Found>,
    sites: Sites,
    links: Vec<FileLink>,
    /// What came of each site, once it has been probed.
    outcomes: Vec<Result<(), (Reason, String)>>,
}

/// The object, for who attaches.
struct Loaded {
    attached: Attached,
    /// For what to do about a refusal; without the types.
    kernel: Kernel,
}

/// What attaches to libraries as they come.
struct Core {
    watch: Watch,
    snapshot: Arc<Snapshot>,
    show_paths: bool,
    loaded: Option<Loaded>,
    books: Books,
    /// Whether loading the object has been tried.
    tried: bool,
    files: BTreeMap<Identity, Probed>,
    /// What all libraries have in common, as the kernel half has been told.
    any: Option<Layout>,
    /// What of the object's loading works with less.
    lacks: Vec<String>,
    failed: Vec<Hook>,
    trouble: Option<String>,
    log: BoundedLog,
    /// What has been logged last.
    logged: Status,
}

/// What is watched for.
fn watched() -> Watched {
    Watched {
        interest: Interest::Nccl,
        wanted: sites::wanted(),
        is_of_use: |library| Sites::of(library).is_some(),
    }
}

impl Core {
    fn new(watch: Watch, show_paths: bool, books: Books) -> Self {
        Self {
            watch,
            snapshot: Arc::default(),
            show_paths,
            loaded: None,
            books,
            tried: false,
            files: BTreeMap::new(),
            any: None,
            lacks: Vec::new(),
            failed: Vec::new(),
            trouble: None,
            log: BoundedLog::new("nccl"),
            logged: Status::bare(State::Absent),
        }
    }

    /// Attaches to what has come, lets go of what has gone, and tells what has become of it.
    fn follow(&mut self, kernel: impl FnOnce() -> Kernel) -> Status {
        self.snapshot = self.watch.snapshot();
        self.take_over();
        let nccl = |probed: &Probed| probed.sites.kind != Library::Cuda;
        if !self.tried && self.files.values().any(nccl) {
            self.tried = true;
            self.load(kernel());
        }
        self.probe();
        let books = Arc::clone(&self.books);
        let troubles = [self.tell_layouts(&books), sweep(&books)];
        let troubles = troubles.into_iter().filter_map(Result::err);
        let troubles: Vec<_> = troubles.map(|error| format!("{error:#}")).collect();
        self.trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        self.log();
        self.status(self.show_paths)
    }

    /// Takes over what is mapped now. Launches of graphs say something only beside NCCL.
    fn take_over(&mut self) {
        let found = &self.snapshot.files;
        for (identity, found) in found {
            if !self.files.contains_key(identity)
                && let Some(sites) = Sites::of(&found.library)
            {
                let probed = Probed {
                    found: Arc::clone(found),
                    sites,
                    links: Vec::new(),
                    outcomes: Vec::new(),
                };
                self.files.insert(*identity, probed);
            }
        }
        let kind = |identity: &Identity| self.files.get(identity).map(|probed| probed.sites.kind);
        let beside = self.snapshot.processes.values().filter(|files| {
            let mut files = files.iter();
            files.any(|file| kind(file) == Some(Library::Nccl))
        });
        let beside: BTreeSet<Identity> = beside.flatten().copied().collect();
        // Without its links the file is let go of beside everything else: the kernel takes a tenth of a second for each.
        let mut gone = Vec::new();
        self.files.retain(|identity, probed| {
            let alone = probed.sites.kind == Library::Cuda && !beside.contains(identity);
            let stays = found.contains_key(identity) && !alone;
            if !stays {
                gone.append(&mut probed.links);
            }
            stays
        });
        if !gone.is_empty() {
            let detach = move || gone.into_iter().for_each(drop);
            // Where no thread can be started, they have been dropped with the closure.
            let _ = thread::Builder::new()
                .name("nccl-detach".to_owned())
                .spawn(detach);
        }
    }

    fn load(&mut self, mut kernel: Kernel) {
        let outcome = probe::attach(OBJECT, &programs(), kernel.types(), |_| {}, &kernel);
        kernel.forget_types();
        self.lacks = outcome.notes;
        let Some(mut attached) = outcome.attached else {
            self.failed = outcome.hooks;
            return;
        };
        match Live::new(&mut attached) {
            Ok(live) => {
                *lock(&self.books) = Some(live);
                self.loaded = Some(Loaded { attached, kernel });
            }
            Err(error) => self.lacks.push(format!("{error:#}")),
        }
    }

    /// Probes what is new, and what there was no room for.
    fn probe(&mut self) {
        let Some(loaded) = &mut self.loaded else {
            return;
        };
        for (identity, probed) in &mut self.files {
            let had_no_room = |outcome: &Result<(), (Reason, String)>| {
                matches!(outcome, Err((Reason::NoRoom, _)))
            };
            if !probed.outcomes.is_empty() && !probed.outcomes.iter().all(had_no_room) {
                continue;
            }
            let sites = probed.sites.sites.iter();
            let places = sites.map(|site| site.probes.count()).sum();
            let mut room = match self.snapshot.room(identity, places) {
                Ok(room) => room,
                Err(full) => {
                    probed.outcomes = vec![Err(full); probed.sites.sites.len()];
                    continue;
                }
            };
            probed.outcomes.clear();
            let path = format!("/proc/self/fd/{}", probed.found.file.as_raw_fd());
            let path = Path::new(&path);
            for site in &probed.sites.sites {
                let mut attach = |program: &'static str| {
                    let attached = &mut loaded.attached;
                    let room = room.pop().expect("taken for all");
                    attached.attach_to_file(program, path, site.place, room, &loaded.kernel)
                };
                // The return first: each entry that is seen is followed by a return that is.
                let exit = site.probes.exit.map(&mut attach).transpose();
                let outcome = exit.and_then(|exit| {
                    let entry = attach(site.probes.entry)?;
                    probed.links.push(entry);
                    probed.links.extend(exit);
                    Ok(())
                });
                probed.outcomes.push(outcome);
            }
        }
    }

    /// Tells the kernel half what communicators look like: all of them, or where libraries differ those of each process that has one.
    fn tell_layouts(&mut self, books: &Mutex<Option<Live>>) -> anyhow::Result<()> {
        let mut books = lock(books);
        let Some(live) = &mut *books else {
            return Ok(());
        };
        let files = self.files.values();
        let nccl = files.filter(|probed| probed.sites.kind == Library::Nccl);
        let mut layouts = nccl.map(|probed| probed.sites.layout());
        let first = layouts.next();
        let any = first.filter(|first| layouts.all(|layout| layout == *first));
        if any != self.any {
            match any {
                Some(layout) => live.layouts.insert(ANY_PROCESS, layout, 0)?,
                None => removed(live.layouts.remove(&ANY_PROCESS))?,
            }
            self.any = any;
        }
        for (process, told) in entries(&live.layouts)? {
            let files = self.snapshot.processes.get(&process).into_iter().flatten();
            let mut files = files.filter_map(|file| self.files.get(file));
            let nccl = files.find(|probed| probed.sites.kind == Library::Nccl);
            let layout = nccl.map(|probed| probed.sites.layout());
            if let Some(layout) = layout.filter(|layout| *layout != told) {
                let entered = live.layouts.insert(process, layout, 0);
                entered.context("enter a process into a map")?;
            }
        }
        Ok(())
    }

    /// Versions of NCCL with which the plugin does harm, in processes that have both.
    fn denied(&self) -> BTreeSet<String> {
        let mut denied = BTreeSet::new();
        for files in self.snapshot.processes.values() {
            let files = || files.iter().filter_map(|file| self.files.get(file));
            let plugin = files().any(|probed| probed.sites.kind == Library::Plugin);
            let versions = files().filter_map(|probed| probed.sites.version);
            for version in versions.filter(|version| plugin && version.is_denied()) {
                denied.insert(format!(
                    "the profiler plugin is loaded into NCCL {version}, with which it does harm: see docs/nccl-profiler.md"
                ));
            }
        }
        denied
    }

    /// What has become of it, with the paths of files or only their names.
    fn status(&self, with_paths: bool) -> Status {
        let any = |kind| self.files.values().any(|probed| probed.sites.kind == kind);
        let state = match (&self.loaded, self.tried) {
            (Some(_), _) if any(Library::Nccl) || any(Library::Plugin) => State::Up,
            (None, true) => State::Failed,
            _ => State::Absent,
        };
        // Of several files a hook may be attached in one and have no room in another: it is told twice.
        let mut hooks: BTreeMap<(&'static str, &'static str), (Reason, String)> = BTreeMap::new();
        let mut found = Vec::new();
        let mut full = Vec::new();
        for probed in self.files.values() {
            let library = &probed.found.library;
            let build = match &library.build_id {
                Some(id) if with_paths => format!(", build id {id}"),
                _ => String::new(),
            };
            let path = shown(&probed.found.path, with_paths);
            for lack in &library.lacks {
                found.push(format!("{path} is not read whole: {}", lack.why));
            }
            match (probed.sites.kind, probed.sites.version) {
                (Library::Nccl, Some(version)) if version.is_known() => {
                    found.push(format!("NCCL {version}: {path}{build}"));
                }
                (Library::Nccl, Some(version)) => found.push(format!(
                    "NCCL {version}: {path}{build}; communicators are followed from their beginning only, since this version's are not known"
                )),
                (Library::Nccl, None) => found.push(format!(
                    "NCCL of a version that it does not tell: {path}{build}; communicators are followed from their beginning only"
                )),
                (Library::Plugin, _) => found.push(format!("NCCL profiler plugin: {path}{build}")),
                (Library::Cuda, _) => {}
            }
            if let Some(Err((Reason::NoRoom, why))) = probed.outcomes.first() {
                full.push(format!("{path} is not probed: {why}"));
            }
            for (site, outcome) in probed.sites.sites.iter().zip(&probed.outcomes) {
                let (reason, detail) = match outcome {
                    Ok(()) => (Reason::Attached, String::new()),
                    Err((reason, why)) => (*reason, format!("{} of {path}: {why}", site.name)),
                };
                let known = hooks.entry((site.name, reason.label()));
                known.or_insert((reason, detail));
            }
        }
        let hook = |((name, _), (reason, detail))| Hook {
            name,
            method: Method::Uprobe,
            reason,
            detail,
        };
        let mut hooks: Vec<_> = hooks.into_iter().map(hook).collect();
        hooks.extend(self.failed.iter().cloned());
        let mut notes = self.lacks.clone();
        notes.extend(self.trouble.clone());
        notes.extend(self.denied());
        notes.extend(full);
        let of_files = self.snapshot.notes.iter();
        notes.extend(
            of_files.map(|note| format!("NCCL is not seen everywhere: {}", note.told(with_paths))),
        );
        Status {
            state,
            hooks,
            notes,
            found,
        }
    }

    /// Logs what is new, with all that is known.
    fn log(&mut self) {
        let new = self.status(true);
        for (word, before, now) in [
            ("found ", &self.logged.found, &new.found),
            ("works with less: ", &self.logged.notes, &new.notes),
        ] {
            for text in now.iter().filter(|text| !before.contains(text)) {
                self.log.line(false, &format!("{word}{text}"));
            }
        }
        let told = |detail: &String| self.logged.hooks.iter().any(|hook| hook.detail == *detail);
        for hook in &new.hooks {
            // That there is no room is said once for the file.
            let once = hook.reason == Reason::NoRoom;
            if !once && !hook.detail.is_empty() && !told(&hook.detail) {
                self.log.line(true, &hook.detail);
            }
        }
        announce("nccl", self.logged.state, &new);
        self.logged = new;
    }
}

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Nccl::new(kernel, options))
}

struct Nccl {
    books: Books,
    told: Arc<Mutex<Told>>,
    stopped: Arc<AtomicBool>,
    salt: Option<Salt>,
    /// Ranks whose communicator has not been asked for its number, and since when.
    nameless: HashMap<Seat, Instant>,
    max_owners: usize,
    ledger: Ledger<u64, SLOTS>,
    ranks: Ranks,
    pending: Pending,
    health: Health,
}

/// What who attaches tells who reads.
struct Told {
    status: Status,
    skipped: Skipped,
}

impl Nccl {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let watch = Watch::start("nccl", watched(), None, &options.gate)?;
        let books = Books::default();
        let mut core = Core::new(watch, options.show_paths, Arc::clone(&books));
        let mut status = Status::bare(State::Absent);
        let at_once = options.gate.is_open();
        if at_once {
            status = core.follow(|| kernel.clone());
        }
        let told = Arc::new(Mutex::new(Told {
            status,
            skipped: core.snapshot.skipped,
        }));
        let stopped = Arc::new(AtomicBool::new(false));
        let (tells, ends) = (Arc::clone(&told), Arc::clone(&stopped));
        let gate = Arc::clone(&options.gate);
        let follow = move || {
            gate.wait();
            while !ends.load(Ordering::Relaxed) {
                let status = core.follow(Kernel::read);
                let skipped = core.snapshot.skipped;
                *lock(&tells) = Told { status, skipped };
                thread::sleep(FOLLOW_EVERY);
            }
        };
        thread::Builder::new()
            .name("nccl".to_owned())
            .spawn(follow)
            .context("start the thread that probes NCCL")?;
        Ok(Self {
            books,
            told,
            stopped,
            salt: options.nccl.salt.clone(),
            nameless: HashMap::new(),
            max_owners: options.max_owners,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
            ranks: Ranks::new(options.max_owners),
            pending: Pending::default(),
            health: Health::default(),
        })
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // The thread sees it within a second, and lets go of its probes.
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Which tier tells of a communicator: an index of [`SOURCES`].
fn source(handle: &Communicator) -> usize {
    ((handle.process >> 32) as usize).min(SOURCES.len() - 1)
}

impl Nccl {
    /// Books what ranks have counted, and clears the seats of those that have ended.
    fn book_ranks(
        &mut self,
        live: &mut Live,
        known: &[(Communicator, Handle)],
        naming: &Naming<'_>,
        scope: &Scope<'_>,
    ) -> anyhow::Result<()> {
        let unasked = known
            .iter()
            .filter(|(_, handle)| handle.state & LEARNT == 0);
        let unasked: HashSet<Seat> = unasked.map(|(_, handle)| handle.seat()).collect();
        self.nameless.retain(|seat, _| unasked.contains(seat));
        let mut readings = Vec::new();
        for (seat, member) in live.seated()? {
            let hash = naming.groups.get(&seat.group).map_or(0, |group| group.hash);
            if hash == 0 && unasked.contains(&seat) && member.ended == 0 {
                // What it has counted waits for its name.
                let since = *self.nameless.entry(seat).or_insert(scope.now);
                if scope.now.saturating_duration_since(since) < PATIENCE {
                    continue;
                }
            }
            readings.push(Reading {
                seat,
                member,
                communicator: naming.number(seat.group),
                source: source(&member.handle),
            });
        }
        let resolve = |cgroup| scope.resolve(cgroup);
        let owners = scope.pods.owners();
        let ended = self
            .ranks
            .book(&owners, &readings, resolve, scope.retention, scope.now);
        for seat in ended {
            live.clear_seat(&seat)?;
        }
        Ok(())
    }
}

impl Signal for Nccl {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        let books = Arc::clone(&self.books);
        let Some(mut books) = try_lock(&books) else {
            return Ok(Read::Before);
        };
        let Some(live) = &mut *books else {
            return Ok(Read::Now);
        };
        scope.book(&mut self.ledger, &mut live.owners, |owner| owner.slots)?;
        let known = entries(&live.communicators)?;
        let groups: HashMap<u64, Group> = entries(&live.groups)?.into_iter().collect();
        let salt = self.salt.clone();
        let naming = Naming {
            groups: &groups,
            salt: salt.as_ref(),
        };
        self.book_ranks(live, &known, &naming, scope)?;
        self.pending
            .find(live, &known, &naming, &self.ranks, self.max_owners, scope)?;
        self.health = live.counters.health()?;
        self.health.losses[Loss::Untimed] += live.unpaired;
        Ok(Read::Now)
    }

    fn render(&self, families: &mut Families) {
        if lock(&self.told).status.state != State::Absent {
            render(self.ledger.accounts(), &self.ranks, &self.pending, families);
        }
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.health.clone())
    }

    fn status(&self) -> Option<Status> {
        Some(lock(&self.told).status.clone())
    }

    fn skipped(&self) -> Option<Skipped> {
        Some(lock(&self.told).skipped)
    }
}

/// How many calls, durations and initialisations there were.
fn units(slots: &[u64; SLOTS]) -> u64 {
    let calls = (0..OPERATIONS.len()).map(|i| (call_slots(i), CALL));
    let durations = (0..COLLECTIVES).map(|i| (duration_slots(i), WAIT));
    let inits = (0..PHASES.len()).map(|i| (init_slots(i), INIT));
    let all = calls.chain(durations).chain(inits);
    all.flat_map(|(first, shape)| &slots[first..first + shape.sum()])
        .sum()
}

/// Renders accounts by slot, ranks, and ages of what is pending. Each appears with its first.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    ranks: &Ranks,
    pending: &Pending,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        let owner = [&*owner.namespace, &*owner.pod, &*owner.container];
        let mut histogram =
            |desc, labels: &[&str], first: usize, shape: exporter_common::histogram::Shape| {
                let slots = &slots[first..first + shape.slots()];
                if slots[..shape.sum()].iter().any(|count| *count > 0) {
                    families.add_histogram(desc, &[&owner[..], labels].concat(), shape, slots);
                }
            };
        for (index, phase) in PHASES.iter().enumerate() {
            histogram(&INIT_SECONDS, &[phase], init_slots(index), INIT);
        }
        for (index, operation) in OPERATIONS.iter().enumerate() {
            histogram(&ENQUEUE, &[operation], call_slots(index), CALL);
        }
        let [host, kernel] = SOURCES;
        for (index, operation) in OPERATIONS[..COLLECTIVES].iter().enumerate() {
            histogram(
                &COLLECTIVE,
                &[operation, kernel],
                duration_slots(index),
                WAIT,
            );
            let place = wait_slots(Source::Host as usize, index);
            histogram(&ARRIVAL_WAIT, &[operation, host], place, WAIT);
        }
        for (index, operation) in OPERATIONS[..NUMBERED].iter().enumerate() {
            let place = wait_slots(Source::Kernel as usize, index);
            histogram(&ARRIVAL_WAIT, &[operation, kernel], place, WAIT);
        }
        if slots[GRAPH_SLOT] > 0 {
            families.add(&GRAPHS, &owner, slots[GRAPH_SLOT] as f64);
        }
    }
    ranks.each(|owner, communicator, rank, source, counts| {
        let labels = [
            &*owner.namespace,
            &*owner.pod,
            &*owner.container,
            communicator,
            rank,
            source,
        ];
        let [wait, collectives, last, duration] = *counts;
        families.add(&RANK_WAIT, &labels, wait as f64 / 1e9);
        families.add(&RANK_COLLECTIVES, &labels, collectives as f64);
        families.add(&RANK_LAST, &labels, last as f64);
        if source == SOURCES[Source::Kernel as usize] {
            families.add(&RANK_DURATION, &labels[..5], duration as f64 / 1e9);
        }
    });
    pending.render(families);
}
