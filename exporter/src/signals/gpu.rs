// SPDX-License-Identifier: Apache-2.0
//! How long do the threads that drive a GPU wait for a CPU?
//!
//! Hooks: tp_btf `sched_switch`, `sched_process_fork` and `sched_process_exit`, kprobe `chrdev_open`, iterator
//! `task_file`. Metrics: `chandra_gpu_processes`, `chandra_gpu_runqueue_delay_seconds`.
//!
//! A process drives a GPU while it has one of the devices open by which that is done: nvidia-uvm (CUDA), kfd (ROCm), a
//! render node (everything else), or one named by flag. The kernel half hears of opens and forks at once; which
//! processes still have such a device open, and which were handed one, a walk over all open files tells every ten
//! seconds, or every second where the kernel takes no kprobes.
//!
//! Devices are looked for all the time: a driver may be loaded late. As long as there has been none, nothing is attached.

pub mod calls;
pub mod jobs;
mod library;

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::{
    include_bytes_aligned,
    maps::{self, MapData},
};
use exporter_common::gpu::{DELAY, DRIVERS, Delays, Driver, Process, Thread};

use jobs::Jobs;

use super::{
    Attempt, Entry, Follower, Options, Read, Scope, Signal, State, Status, entries, follow, removed,
};
use crate::{
    capabilities::{BPF, CUDA_LIBRARIES, CUDA_UPROBES, DEVICES, KPROBES, PERFMON},
    families::{Desc, Families, Kind},
    hook::{Hook, Method, Program, Reason, Target},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening, Shown},
    libraries::Skipped,
    lock::{lock, try_lock},
    pods::Labels,
    probe::{self, Attached, Constants, Health},
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "gpu",
    question: "How long do the threads that drive a GPU wait for a CPU?",
    descs: &[
        &PROCESSES,
        &RUNQUEUE_DELAY,
        &jobs::QUEUE,
        &jobs::RUN,
        &calls::CALL,
        &calls::PREEMPTED,
    ],
    objects: &[OBJECT, jobs::OBJECT, calls::OBJECT],
    needs: &[BPF, PERFMON, KPROBES, CUDA_UPROBES, CUDA_LIBRARIES, DEVICES],
    attach,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/gpu.o"));

/// How many counters an owner has.
pub const SLOTS: usize = DELAY.slots();

static PROCESSES: Desc = Desc {
    name: "chandra_gpu_processes",
    kind: Kind::Gauge,
    help: "Processes that have a GPU's device open.",
    per_pod: true,
    labels: &["driver"],
    values: &[("driver", &DRIVERS)],
    source: "open files of nvidia-uvm (nvidia), kfd (amdkfd), a render node (drm) or a device of --gpu.device (other); monitoring tools \
             that open nvidiactl only do not count; not older than ten seconds",
};

static RUNQUEUE_DELAY: Desc = Desc {
    name: "chandra_gpu_runqueue_delay_seconds",
    kind: Kind::Histogram,
    help: "Seconds that threads of these processes were runnable before they ran.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "tracepoint sched:sched_switch and sched_info of the thread: one observation for each arrival on a CPU, after a wake-up, a \
             preemption or the end of a time slice; a CPU limit that throttles the pod is in it",
};

/// What the signal looks at.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Device files that drive a GPU, besides those that are known.
    pub devices: Vec<PathBuf>,
    /// In which share of the time calls of CUDA are timed; never, where there is none.
    pub calls: Option<f64>,
}

const TASK: &[&str] = &[
    "OFF_TASK_TGID",
    "OFF_TASK_PID",
    "OFF_TASK_SIGNAL",
    "OFF_SIGNAL_LIVE",
];

const PROGRAMS: &[Program] = &[
    Program::required("sched_process_exit", Target::TpBtf).needing(TASK),
    Program::wanted("sched_process_fork", Target::TpBtf).needing(&["OFF_TASK_TGID"]),
    Program::required("open_files", Target::Iter("task_file")).needing(&[
        "OFF_TASK_TGID",
        "OFF_FILE_INODE",
        "OFF_INODE_MODE",
        "OFF_INODE_RDEV",
    ]),
    Program::wanted("device_open", Target::Kprobe(&["chrdev_open"])).needing(&["OFF_INODE_RDEV"]),
    Program::required("sched_switch", Target::TpBtf).needing(&[
        "OFF_TASK_TGID",
        "OFF_TASK_PID",
        "OFF_TASK_FLAGS",
        "OFF_QUEUED",
        "OFF_RUN_DELAY",
        "OFF_ARRIVALS",
        "OFF_TASK_CFS_RQ",
        "OFF_CFS_RQ_RQ",
        "OFF_RQ_CLOCK",
    ]),
];

fn resolve(constants: &mut Constants<'_>) {
    for (constant, name, member) in [
        ("OFF_TASK_TGID", "task_struct", "tgid"),
        ("OFF_TASK_PID", "task_struct", "pid"),
        ("OFF_TASK_FLAGS", "task_struct", "flags"),
        ("OFF_TASK_SIGNAL", "task_struct", "signal"),
        ("OFF_SIGNAL_LIVE", "signal_struct", "live.counter"),
        ("OFF_QUEUED", "task_struct", "sched_info.last_queued"),
        ("OFF_RUN_DELAY", "task_struct", "sched_info.run_delay"),
        ("OFF_ARRIVALS", "task_struct", "sched_info.pcount"),
        ("OFF_TASK_CFS_RQ", "task_struct", "se.cfs_rq"),
        ("OFF_CFS_RQ_RQ", "cfs_rq", "rq"),
        ("OFF_RQ_CLOCK", "rq", "clock"),
        ("OFF_FILE_INODE", "file", "f_inode"),
        ("OFF_INODE_MODE", "inode", "i_mode"),
        ("OFF_INODE_RDEV", "inode", "i_rdev"),
    ] {
        constants.offset(constant, &[(name, member)]);
    }
    constants.task_cgroup();
}

/// How old what is known of open files may be: where opens are heard of, and where they are not.
const SEARCH_EVERY: Duration = Duration::from_secs(10);
const SEARCH_OFTEN: Duration = Duration::from_secs(1);

/// How often devices are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Places of this host.
#[derive(Clone, Debug)]
pub struct Places {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl Places {
    /// The devices by which a GPU is driven, by the kernel's `dev_t`, each with the bit of its driver; and what those that are named
    /// and not among them are instead.
    pub fn devices(&self, named: &[PathBuf]) -> (BTreeMap<u32, u32>, Vec<String>) {
        let mut devices = BTreeMap::new();
        let mut add = |major: u32, minor: u32, driver: Driver| {
            *devices.entry(major << 20 | minor).or_default() |= 1 << driver as u32;
        };
        let text = fs::read_to_string(self.proc.join("devices")).unwrap_or_default();
        let lines = text.lines().take_while(|line| *line != "Block devices:");
        for line in lines {
            let mut words = line.split_whitespace();
            let (Some(Ok(major)), Some(name)) = (words.next().map(str::parse), words.next()) else {
                continue;
            };
            // Minor 1 of nvidia-uvm is for debuggers and profilers.
            match name {
                "nvidia-uvm" => add(major, 0, Driver::Nvidia),
                "kfd" => add(major, 0, Driver::Amdkfd),
                _ => {}
            }
        }
        let nodes = fs::read_dir(self.sys.join("class/drm"))
            .into_iter()
            .flatten();
        for node in nodes.flatten() {
            if !node.file_name().to_string_lossy().starts_with("renderD") {
                continue;
            }
            let text = fs::read_to_string(node.path().join("dev")).unwrap_or_default();
            if let Some((major, minor)) = text.trim().split_once(':')
                && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
            {
                add(major, minor, Driver::Drm);
            }
        }
        let mut troubles = Vec::new();
        for path in named {
            match self.number(path) {
                Ok((major, minor)) => add(major, minor, Driver::Other),
                Err(why) => troubles.push(format!("--gpu.device {}: {why}", path.display())),
            }
        }
        (devices, troubles)
    }

    /// The number of a character device's file, here or at the host.
    fn number(&self, path: &Path) -> Result<(u32, u32), &'static str> {
        let at_host = path.strip_prefix("/").unwrap_or(path);
        let at_host = self.proc.join("1/root").join(at_host);
        let mut why = "there is no such device on this host yet";
        for path in [path, &at_host] {
            match fs::metadata(path) {
                Ok(metadata) if metadata.file_type().is_char_device() => {
                    let device = metadata.rdev();
                    return Ok((rustix::fs::major(device), rustix::fs::minor(device)));
                }
                Ok(_) => why = "it is no device file",
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    why = "the host's files may not be looked at; add CAP_SYS_PTRACE";
                }
                Err(_) => {}
            }
        }
        Err(why)
    }
}

/// The object at work.
struct Live {
    attached: Attached,
    processes: maps::HashMap<MapData, u32, Process>,
    threads: maps::HashMap<MapData, u32, Thread>,
    devices: maps::HashMap<MapData, u32, u32>,
    search: maps::Array<MapData, u32>,
    delays: maps::HashMap<MapData, u64, Delays>,
    /// The number of the last search.
    number: u32,
    searched: Option<Instant>,
}

impl Live {
    fn new(mut attached: Attached) -> anyhow::Result<Self> {
        Ok(Self {
            processes: attached.map("PROCESSES")?,
            threads: attached.map("THREADS")?,
            devices: attached.map("DEVICES")?,
            search: attached.map("SEARCH")?,
            delays: attached.map("DELAYS")?,
            attached,
            number: 0,
            searched: None,
        })
    }

    /// Tells the kernel half which devices drive a GPU.
    fn set_devices(
        &mut self,
        old: &BTreeMap<u32, u32>,
        new: &BTreeMap<u32, u32>,
    ) -> anyhow::Result<()> {
        for device in old.keys().filter(|device| !new.contains_key(device)) {
            removed(self.devices.remove(device))?;
        }
        for (device, driver) in new {
            self.devices.insert(device, driver, 0)?;
        }
        Ok(())
    }

    /// Looks through all open files, and lets go of the processes that have no device open any more.
    fn search(&mut self) -> anyhow::Result<()> {
        let number = self.number.wrapping_add(1);
        self.search.set(0, number, 0)?;
        self.attached
            .walk("open_files")
            .context("walk over all open files (bpf iterator task_file)")?;
        self.number = number;
        self.searched = Some(Instant::now());
        let mut gone = HashSet::new();
        for (process, known) in entries(&self.processes)? {
            if known.search == number {
                continue;
            }
            // It may have opened one again this very moment.
            let again = self.processes.get(&process, 0);
            if again.is_ok_and(|now| now.search == number) {
                continue;
            }
            removed(self.processes.remove(&process))?;
            gone.insert(u64::from(process));
        }
        if !gone.is_empty() {
            for (id, thread) in entries(&self.threads)? {
                if gone.contains(&thread.process) {
                    removed(self.threads.remove(&id))?;
                }
            }
        }
        Ok(())
    }
}

/// What the signal sees besides, with an object of its own. Whoever follows and whoever reads do not wait for each other.
trait Part: Send + Sync {
    /// Looks at what has come and gone, every second. `processes` are those that have a device open now, in the initial namespace.
    fn follow(&self, processes: &[u32]);

    /// Its hooks, and for people what works with less.
    fn status(&self) -> (Vec<Hook>, Vec<String>);

    /// Reads its maps and books what they grew by.
    ///
    /// # Errors
    /// When a map cannot be read; what was booked before stays.
    fn read(&self, scope: &Scope<'_>) -> anyhow::Result<Read>;

    /// Renders what has been booked.
    fn render(&self, families: &mut Families);

    /// How well events found their owners.
    fn attribution(&self) -> Attribution;

    /// What its kernel half tells of itself.
    fn health(&self) -> Health;

    /// What of libraries was not looked at, if it looks into them.
    fn skipped(&self) -> Option<Skipped> {
        None
    }
}

/// What follows devices and open files: used by scrapes, and by the thread that looks.
struct Core {
    live: Option<Live>,
    status: Status,
    settings: Settings,
    places: Places,
    devices: BTreeMap<u32, u32>,
    /// What is wrong with devices and searches now; notes of `status`.
    troubles: Vec<String>,
}

impl Follower for Core {
    fn follow(&mut self, kernel: impl FnOnce() -> Kernel) {
        let (devices, mut troubles) = self.places.devices(&self.settings.devices);
        let changed = devices != self.devices;
        if self.live.is_none() && changed && !devices.is_empty() {
            self.load(&kernel());
        }
        if let Some(live) = &mut self.live {
            let heard = self
                .status
                .hooks
                .iter()
                .any(|hook| hook.method == Method::Kprobe && hook.reason == Reason::Attached);
            let every = if heard { SEARCH_EVERY } else { SEARCH_OFTEN };
            let due = live.searched.is_none_or(|at| at.elapsed() >= every);
            let done = match changed {
                true => live.set_devices(&self.devices, &devices),
                false => Ok(()),
            };
            let done = done.and_then(|()| match changed || due {
                true => live.search(),
                false => Ok(()),
            });
            troubles.extend(done.err().map(|error| format!("{error:#}")));
        }
        self.devices = devices;
        if self.live.is_none() && self.devices.is_empty() {
            self.status = Status::bare(State::Absent);
        }
        self.note(troubles);
    }

    fn status(&self) -> &Status {
        &self.status
    }
}

impl Core {
    fn load(&mut self, kernel: &Kernel) {
        let attempt = probe::attach(OBJECT, PROGRAMS, kernel.types(), resolve, kernel);
        self.status.hooks = attempt.hooks;
        self.status.notes = attempt.notes;
        self.status.state = State::Failed;
        match attempt.attached.map(Live::new) {
            Some(Ok(live)) => {
                self.live = Some(live);
                self.status.state = State::Up;
            }
            Some(Err(error)) => self.status.notes.push(format!("{error:#}")),
            None => {}
        }
    }

    /// Notes what is wrong now, and logs what was not before.
    fn note(&mut self, troubles: Vec<String>) {
        let new = troubles.iter().filter(|now| !self.troubles.contains(now));
        new.for_each(|trouble| tracing::warn!("signal gpu: {trouble}"));
        let notes = &mut self.status.notes;
        notes.retain(|note| !self.troubles.contains(note));
        notes.extend_from_slice(&troubles);
        self.troubles = troubles;
    }
}

impl Core {
    /// The processes that have a device open now.
    fn processes(&self) -> Vec<u32> {
        let known = self.live.as_ref().map(|live| entries(&live.processes));
        let known = known.and_then(Result::ok).unwrap_or_default();
        known.into_iter().map(|(process, _)| process).collect()
    }
}

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Gpu::new(kernel, options))
}

type Parts = Arc<[Box<dyn Part>]>;

/// Processes of an owner, by driver.
pub type Processes = [u64; DRIVERS.len()];

struct Gpu {
    core: Arc<Mutex<Core>>,
    parts: Parts,
    stopped: Arc<AtomicBool>,
    status: Status,
    ledger: Ledger<u64, SLOTS>,
    max_owners: usize,
    processes: BTreeMap<Labels, Processes>,
    health: Health,
}

impl Gpu {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let mut core = Core {
            live: None,
            status: Status::bare(State::Absent),
            settings: options.gpu.clone(),
            places: Places::default(),
            devices: BTreeMap::new(),
            troubles: Vec::new(),
        };
        core.follow(|| kernel.clone());
        let status = core.status.clone();
        let core = Arc::new(Mutex::new(core));
        let stopped = Arc::new(AtomicBool::new(false));
        let mut parts: Vec<Box<dyn Part>> = vec![Box::new(Jobs::new(options.max_owners))];
        if let Some(budget) = options.gpu.calls {
            parts.push(Box::new(calls::Calls::new(budget, options)?));
        }
        let parts: Parts = parts.into();
        let (followed, told) = (Arc::clone(&core), Arc::clone(&stopped));
        let (seen, besides) = (Arc::clone(&core), Arc::clone(&parts));
        let wait = move || {
            let processes = lock(&seen).processes();
            for part in besides.iter() {
                part.follow(&processes);
            }
            thread::sleep(LOOK_EVERY);
        };
        thread::Builder::new()
            .name("gpu".to_owned())
            .spawn(move || follow("gpu", &followed, &told, wait))
            .context("start the thread that looks for GPUs")?;
        let units = |slots: &[u64; SLOTS]| slots[..DELAY.sum()].iter().sum();
        Ok(Self {
            core,
            parts,
            stopped,
            status,
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
            max_owners: options.max_owners,
            processes: BTreeMap::new(),
            health: Health::default(),
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // The thread sees it within a second, and lets go of its programs.
    }
}

impl Signal for Gpu {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        let mut read = Read::Now;
        for part in self.parts.iter() {
            if part.read(scope)? == Read::Before {
                read = Read::Before;
            }
        }
        // Open files may be looked through.
        let Some(mut core) = try_lock(&self.core) else {
            return Ok(Read::Before);
        };
        self.status = core.status.clone();
        if self.status.state == State::Up {
            for part in self.parts.iter() {
                let (hooks, notes) = part.status();
                self.status.hooks.extend(hooks);
                self.status.notes.extend(notes);
            }
        }
        let Some(live) = &mut core.live else {
            return Ok(read);
        };
        scope.book(&mut self.ledger, &mut live.delays, |delays| delays.slots)?;
        self.processes.clear();
        let mut owners = Shown::new(self.max_owners);
        let mut processes = entries(&live.processes)?;
        // So that beyond the limit the same ones are shown each time.
        processes.sort_by_key(|(_, process)| process.cgroup);
        for (_, process) in processes {
            let labels = owners.of(scope.resolve(process.cgroup));
            let of_owner = self.processes.entry(labels).or_default();
            for (driver, count) in of_owner.iter_mut().enumerate() {
                *count += u64::from(process.drivers >> driver & 1);
            }
        }
        self.health = live.attached.health()?;
        Ok(read)
    }

    fn render(&self, families: &mut Families) {
        if self.status.state != State::Absent {
            render(self.ledger.accounts(), &self.processes, families);
            for part in self.parts.iter() {
                part.render(families);
            }
        }
    }

    fn attribution(&self) -> Attribution {
        let parts = self.parts.iter().map(|part| part.attribution());
        parts.fold(self.ledger.attribution(), Attribution::plus)
    }

    fn health(&self) -> anyhow::Result<Health> {
        let mut all = self.health.clone();
        for part in self.parts.iter() {
            all += part.health();
        }
        Ok(all)
    }

    fn status(&self) -> Option<Status> {
        Some(self.status.clone())
    }

    fn skipped(&self) -> Option<Skipped> {
        self.parts.iter().find_map(|part| part.skipped())
    }
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
        for (driver, count) in DRIVERS.iter().zip(counts) {
            if *count > 0 {
                let labels = [&*owner.namespace, &*owner.pod, &*owner.container, driver];
                families.add(&PROCESSES, &labels, *count as f64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Places) {
        let folder = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        let places = Places {
            proc: folder.path().join("proc"),
            sys: folder.path().join("sys"),
        };
        (folder, places)
    }

    #[test]
    fn devices_that_drive_a_gpu_are_found_and_others_are_not() {
        let (_folder, places) = host(&[
            (
                "proc/devices",
                "Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n226 drm\n234 kfd\n508 nvidia-uvm\n\nBlock devices:\n  7 kfd\n",
            ),
            ("sys/class/drm/card0/dev", "226:0\n"),
            ("sys/class/drm/renderD128/dev", "226:128\n"),
            ("sys/class/drm/renderD300/dev", "226:300\n"),
            ("sys/class/drm/renderD129/dev", "nonsense\n"),
        ]);
        let bit = |driver: Driver| 1 << driver as u32;
        let expected = BTreeMap::from([
            (508 << 20, bit(Driver::Nvidia)),
            (234 << 20, bit(Driver::Amdkfd)),
            (226 << 20 | 128, bit(Driver::Drm)),
            (226 << 20 | 300, bit(Driver::Drm)),
        ]);
        assert_eq!(places.devices(&[]), (expected, Vec::new()));
    }

    #[test]
    fn a_device_may_be_named_and_a_file_that_is_none_is_told() {
        let (folder, places) = host(&[("proc/devices", ""), ("file", "")]);
        let named = [
            PathBuf::from("/dev/null"),
            folder.path().join("file"),
            "/nowhere".into(),
        ];
        let expected = BTreeMap::from([(1 << 20 | 3, 1 << Driver::Other as u32)]);
        let (devices, troubles) = places.devices(&named);
        assert_eq!(devices, expected);
        let file = format!("--gpu.device {}: it is no device file", named[1].display());
        let nowhere = "--gpu.device /nowhere: there is no such device on this host yet";
        assert_eq!(troubles, [file.as_str(), nowhere]);
    }
}
