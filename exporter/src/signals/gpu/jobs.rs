// SPDX-License-Identifier: Apache-2.0
//! How long do jobs wait in the kernel's GPU scheduler, and how long do they run?
//!
//! Hooks: tracepoints of `gpu_scheduler`, with their names from 6.16 on or the older ones, whichever tracefs shows. Metrics:
//! `chandra_gpu_job_queue_seconds`, `chandra_gpu_job_run_seconds`.
//!
//! A tracepoint that is in use holds its module. So it is attached only while a process has a device open, which holds the
//! driver and with it the scheduler anyway, and for a minute after.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aya::{
    include_bytes_aligned,
    maps::{self, MapData},
};
use exporter_common::{
    Loss,
    gpu::{JOB, Job, Jobs as Totals, NAME, Ring},
};

use super::LOOK_EVERY;
use crate::{
    families::{Desc, Families, Kind},
    hook::{Hook, Method, Program, Reason, Target},
    kernel::{Kernel, symbols, tracefs::Tracefs},
    ledger::{Attribution, Ledger, OTHER, Opening},
    lock::lock,
    pods::Labels,
    probe::{self, Attached, Constants, Health, NO_TRACEFS},
    signals::{
        Read, Scope, Signal, State, Status, entries,
        follow::{self, Follower, Following, at_once_and_every},
        monotonic, removed,
    },
};

pub(super) static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/gpu_jobs.o"));

/// How many counters an owner has on a ring.
pub const SLOTS: usize = 2 * JOB.slots();

pub(super) static QUEUE: Desc = Desc {
    name: "chandra_gpu_job_queue_seconds",
    kind: Kind::Histogram,
    help: "Seconds that jobs waited in the kernel's GPU scheduler before they were handed to the hardware.",
    per_pod: true,
    labels: &["device", "ring"],
    values: &[],
    source: "tracepoints gpu_scheduler:drm_sched_job_queue and drm_sched_job_run, before 6.16 drm_sched_job and drm_run_job (then \
             without device): drivers that use the DRM scheduler (amdgpu, xe, nouveau and others), not NVIDIA's own driver, not \
             i915, not ROCm's user queues",
};

pub(super) static RUN: Desc = Desc {
    name: "chandra_gpu_job_run_seconds",
    kind: Kind::Histogram,
    help: "Seconds from the handover of a job to the hardware to its end.",
    per_pod: true,
    labels: &["device", "ring"],
    values: &[],
    source: "tracepoints gpu_scheduler:drm_sched_job_run and drm_sched_job_done, before 6.16 drm_run_job and \
             drm_sched_process_job; with the wait for jobs that the ring had before",
};

const PROGRAMS: &[Program] = &[
    Program::wanted(
        "job_done",
        Target::Tracepoint(&[
            "gpu_scheduler:drm_sched_job_done",
            "gpu_scheduler:drm_sched_process_job",
        ]),
    )
    .needing(&["OFF_DONE_FENCE"]),
    Program::required(
        "job_runs",
        Target::Tracepoint(&[
            "gpu_scheduler:drm_sched_job_run",
            "gpu_scheduler:drm_run_job",
        ]),
    )
    .needing(&["OFF_RUN_FENCE"]),
    Program::required(
        "job_queued",
        Target::Tracepoint(&[
            "gpu_scheduler:drm_sched_job_queue",
            "gpu_scheduler:drm_sched_job",
        ]),
    )
    .needing(&["OFF_QUEUE_FENCE", "OFF_QUEUE_RING"]),
];

/// Where the records have their fields, by constant; or what is missing. A job is known by its fence's context and number, where
/// all three records tell it, and otherwise by its fence's address.
fn offsets(tracefs: &Tracefs) -> Vec<(&'static str, Result<u32, String>)> {
    let record = |program: &str| {
        let program = PROGRAMS.iter().find(|each| each.name == program)?;
        let mut events = program.target.events().iter();
        let name = events.find(|name| tracefs.has(name))?;
        Some((*name, tracefs.format(name).ok()?))
    };
    let records = ["job_queued", "job_runs", "job_done"].map(record);
    let numbered = records.iter().flatten().all(|(_, format)| {
        let fields = ["fence_context", "fence_seqno"];
        fields.iter().all(|field| format.offset(field).is_some())
    });
    let fence = if numbered { "fence_context" } else { "fence" };
    let mut offsets = Vec::new();
    for ((name, format), [fence_at, number_at]) in records
        .iter()
        .zip([
            ["OFF_QUEUE_FENCE", "OFF_QUEUE_SEQNO"],
            ["OFF_RUN_FENCE", "OFF_RUN_SEQNO"],
            ["OFF_DONE_FENCE", "OFF_DONE_SEQNO"],
        ])
        .filter_map(|(record, constants)| Some((record.as_ref()?, constants)))
    {
        let found = |field: &str| {
            let offset = format.offset(field);
            offset.ok_or_else(|| format!("{name} has no field {field}"))
        };
        offsets.push((fence_at, found(fence)));
        if numbered {
            offsets.push((number_at, found("fence_seqno")));
        }
        if fence_at == "OFF_QUEUE_FENCE" {
            offsets.push(("OFF_QUEUE_RING", found("name")));
            // 5.10 has the string's address, later kernels where it lies in the record.
            offsets.push(("RING_IS_POINTER", Ok(format.is_pointer("name").into())));
            // Only newer kernels tell it.
            if let Some(offset) = format.offset("dev") {
                offsets.push(("OFF_QUEUE_DEVICE", Ok(offset)));
            }
        }
    }
    offsets
}

fn resolve(constants: &mut Constants<'_>, tracefs: &Tracefs) {
    for (constant, offset) in offsets(tracefs) {
        match offset {
            Ok(offset) => constants.set(constant, offset),
            Err(why) => constants.lack(constant, why),
        }
    }
}

/// How long the tracepoints are held after the last process has closed its device.
const HOLD: Duration = Duration::from_secs(60);

/// A job whose end has not been seen for so long has had none that is told: its process was killed, the device reset.
const LONGEST: Duration = Duration::from_secs(600);

/// How often such jobs are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

struct Live {
    attached: Attached,
    jobs: maps::HashMap<MapData, [u64; 2], Job>,
    rings: maps::HashMap<MapData, Ring, Totals>,
    swept: Instant,
}

impl Live {
    fn new(mut attached: Attached) -> anyhow::Result<Self> {
        Ok(Self {
            jobs: attached.map("JOBS")?,
            rings: attached.map("RINGS")?,
            attached,
            swept: Instant::now(),
        })
    }

    /// Forgets jobs whose end will not be told. Returns how many.
    fn sweep(&mut self) -> anyhow::Result<u64> {
        if self.swept.elapsed() < SWEEP_EVERY {
            return Ok(0);
        }
        self.swept = Instant::now();
        let now = monotonic();
        let mut forgotten = 0;
        for (key, job) in entries(&self.jobs)? {
            if Duration::from_nanos(now.saturating_sub(job.since)) > LONGEST {
                removed(self.jobs.remove(&key))?;
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }
}

/// A device and a ring as their series have them.
type Names = (String, String);

/// Accounts by device and ring.
type Accounts = BTreeMap<Names, Ledger<Ring, SLOTS>>;

/// Rings that are shown by name: some drivers make one for each queue that a process opens. The rest is `other`.
const SHOWN_RINGS: usize = 64;

/// The jobs of the kernel's GPU scheduler.
pub(super) struct Jobs {
    following: Following<Core>,
    rings: Rings,
}

/// What is read.
#[derive(Default)]
struct Core {
    live: Option<Live>,
    /// An object that is done with, for who follows to let go of.
    retired: Option<Live>,
    /// When a process was last seen with a device open.
    used: Option<Instant>,
    /// What objects that were let go of told of themselves, and jobs that were forgotten.
    health: Health,
}

impl Core {
    fn is_used(&self) -> bool {
        self.used.is_some_and(|at| at.elapsed() < HOLD)
    }
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        let live = self.live.as_ref().map(|live| &live.attached);
        follow::health_of(self.health.clone(), live)
    }
}

/// What follows the use of devices.
struct Uses {
    gpu: Arc<Mutex<super::Core>>,
    status: Status,
    /// Whether the last attempt to attach failed: it is made once for each time that devices come into use.
    failed: bool,
}

impl Follower<Core> for Uses {
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        let is_used_now = !lock(&self.gpu).processes().is_empty();
        let mut locked = lock(core);
        let retired = locked.retired.take();
        if is_used_now {
            locked.used = Some(Instant::now());
        }
        let (used, there) = (locked.is_used(), locked.live.is_some());
        drop(locked);
        drop(retired);
        self.failed &= used;
        if there || self.failed {
            return self.status.clone();
        }
        self.status = Status::bare(State::Absent);
        if used && let Some((status, live)) = load(kernel) {
            self.failed = live.is_none();
            self.status = status;
            lock(core).live = live;
        }
        self.status.clone()
    }
}

impl Jobs {
    /// Begins to follow who uses a GPU.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn new(gpu: Arc<Mutex<super::Core>>, max_owners: usize) -> anyhow::Result<Self> {
        let uses = Uses {
            gpu,
            status: Status::bare(State::Absent),
            failed: false,
        };
        let wait = at_once_and_every(LOOK_EVERY);
        Ok(Self {
            following: Following::start("gpu-jobs", Core::default(), uses, None, wait)?,
            rings: Rings {
                max_owners,
                ..Rings::default()
            },
        })
    }
}

/// Loads the object. `None` where the kernel has no such scheduler now.
fn load(kernel: &dyn Fn() -> Kernel) -> Option<(Status, Option<Live>)> {
    let Some(tracefs) = Tracefs::find() else {
        symbols::loaded("gpu_sched")?;
        let mut status = Status::bare(State::Failed);
        status.hooks.push(Hook {
            name: PROGRAMS[0].target.events()[0],
            method: Method::Tracepoint,
            reason: Reason::NoHook,
            detail: NO_TRACEFS.to_owned(),
        });
        return Some((status, None));
    };
    // Without the module there is no such scheduler; it comes with a driver.
    let mut names = PROGRAMS.iter().flat_map(|program| program.target.events());
    if !names.any(|name| tracefs.has(name)) {
        return None;
    }
    let kernel = kernel();
    let constants = |constants: &mut Constants<'_>| resolve(constants, &tracefs);
    let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), constants, &kernel);
    let (status, live) = Status::of(outcome, Live::new);
    for hook in status.hooks.iter().filter(|hook| !hook.detail.is_empty()) {
        tracing::warn!("signal gpu: {}", hook.detail);
    }
    Some((status, live))
}

/// What has been counted, by device and ring.
#[derive(Default)]
struct Rings {
    max_owners: usize,
    accounts: Accounts,
    /// The account that each ring of the map is booked to, as long as it is there.
    booked: HashMap<Ring, Names>,
    /// Of accounts that are gone.
    attribution: Attribution,
}

impl Rings {
    /// Books what has been counted.
    fn book(&mut self, live: &mut Live, scope: &Scope<'_>) -> anyhow::Result<()> {
        let mut by_names: BTreeMap<Names, Vec<_>> = BTreeMap::new();
        for (ring, totals) in entries(&live.rings)? {
            let names = match self.booked.get(&ring) {
                Some(names) => names.clone(),
                None => {
                    let own = (text(&ring.device), text(&ring.name));
                    let has_room =
                        self.accounts.contains_key(&own) || self.accounts.len() < SHOWN_RINGS;
                    let names = if has_room { own } else { other() };
                    self.booked.insert(ring, names.clone());
                    names
                }
            };
            self.accounts.entry(names.clone()).or_insert_with(|| {
                let units = |slots: &[u64; SLOTS]| slots[..JOB.sum()].iter().sum();
                Ledger::new(self.max_owners, units).opening(Opening::Events)
            });
            by_names
                .entry(names)
                .or_default()
                .push((ring, totals.slots));
        }
        let owners = scope.pods.owners();
        for (names, ledger) in &mut self.accounts {
            let readings = by_names.remove(names).unwrap_or_default();
            let resolve = |ring: Ring| scope.resolve(ring.cgroup);
            ledger.book(&owners, readings, resolve, scope.now);
            // A process may have a ring for a moment. Those without a name make room for others.
            let is_other = *names == other();
            let dead = |ring: Ring| is_other || !scope.pods.knows(ring.cgroup);
            for ring in ledger.retire(scope.retention, dead, scope.now) {
                self.booked.remove(&ring);
                removed(live.rings.remove(&ring))?;
            }
        }
        let used: HashSet<_> = self.booked.values().collect();
        self.accounts.retain(|names, ledger| {
            let stays = used.contains(names);
            if !stays {
                self.attribution = self.attribution + ledger.attribution();
            }
            stays
        });
        Ok(())
    }
}

/// The names of rings that have none of their own.
fn other() -> Names {
    (OTHER.to_owned(), OTHER.to_owned())
}

/// A name without the zeros behind it.
fn text(name: &[u8; NAME]) -> String {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

impl Signal for Jobs {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.following.read(|core| {
            let is_used = core.is_used();
            let Some(live) = &mut core.live else {
                return Ok(());
            };
            self.rings.book(live, scope)?;
            core.health.losses[Loss::Untimed] += live.sweep()?;
            // After what it counted has been read: the map goes with it.
            if !is_used {
                core.health += live.attached.health()?;
                core.retired = core.live.take();
                self.rings.accounts.values_mut().for_each(Ledger::restart);
            }
            Ok(())
        })
    }

    fn render(&self, families: &mut Families) {
        for ((device, ring), ledger) in &self.rings.accounts {
            render(device, ring, ledger.accounts(), families);
        }
    }

    fn attribution(&self) -> Attribution {
        let ledgers = self.rings.accounts.values().map(Ledger::attribution);
        self.rings.attribution + ledgers.sum::<Attribution>()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.following.health())
    }

    fn status(&self) -> Option<Status> {
        Some(self.following.status())
    }
}

/// Renders the accounts of a ring by slot. Each histogram appears with its first job.
pub fn render<'a>(
    device: &str,
    ring: &str,
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; SLOTS])>,
    families: &mut Families,
) {
    for (owner, slots) in accounts {
        let labels = [
            &*owner.namespace,
            &*owner.pod,
            &*owner.container,
            device,
            ring,
        ];
        let (queued, run) = slots.split_at(JOB.slots());
        for (desc, slots) in [(&QUEUE, queued), (&RUN, run)] {
            if slots[..JOB.sum()].iter().any(|count| *count > 0) {
                families.add_histogram(desc, &labels, JOB, slots);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel whose tracepoints have these fields, one after the other, eight bytes each, from 8 on.
    fn tracefs(events: [(&str, &[&str]); 3]) -> (tempfile::TempDir, Tracefs) {
        let folder = tempfile::tempdir().expect("a folder");
        for (event, fields) in events {
            let at = folder.path().join("events/gpu_scheduler").join(event);
            std::fs::create_dir_all(&at).expect("made");
            let field = |(i, field): (usize, &&str)| {
                format!("\tfield:u64 {field};\toffset:{};\tsize:8;\n", 8 * (i + 1))
            };
            let fields: String = fields.iter().enumerate().map(field).collect();
            std::fs::write(at.join("format"), fields).expect("written");
            std::fs::write(at.join("id"), "1").expect("written");
        }
        let tracefs = Tracefs::at(folder.path()).expect("there");
        (folder, tracefs)
    }

    #[test]
    fn a_job_is_known_by_its_fence_as_all_records_tell_it() {
        let (_old, old) = tracefs([
            ("drm_sched_job", &["entity", "fence", "*name"]),
            ("drm_run_job", &["entity", "fence", "name"]),
            ("drm_sched_process_job", &["fence"]),
        ]);
        let expected = [
            ("OFF_QUEUE_FENCE", Ok(16)),
            ("OFF_QUEUE_RING", Ok(24)),
            ("RING_IS_POINTER", Ok(1)),
            ("OFF_RUN_FENCE", Ok(16)),
            ("OFF_DONE_FENCE", Ok(8)),
        ];
        assert_eq!(offsets(&old), expected);

        let numbers = ["fence_context", "fence_seqno"];
        let (_new, new) = tracefs([
            (
                "drm_sched_job_queue",
                &["name", "dev", "fence_context", "fence_seqno"],
            ),
            (
                "drm_sched_job_run",
                &["name", "dev", "fence_context", "fence_seqno"],
            ),
            ("drm_sched_job_done", &numbers),
        ]);
        let expected = [
            ("OFF_QUEUE_FENCE", Ok(24)),
            ("OFF_QUEUE_SEQNO", Ok(32)),
            ("OFF_QUEUE_RING", Ok(8)),
            ("RING_IS_POINTER", Ok(0)),
            ("OFF_QUEUE_DEVICE", Ok(16)),
            ("OFF_RUN_FENCE", Ok(24)),
            ("OFF_RUN_SEQNO", Ok(32)),
            ("OFF_DONE_FENCE", Ok(8)),
            ("OFF_DONE_SEQNO", Ok(16)),
        ];
        assert_eq!(offsets(&new), expected);

        // One that does not tell the number: nothing that differs between records is compared.
        let (_mixed, mixed) = tracefs([
            (
                "drm_sched_job_queue",
                &["name", "fence_context", "fence_seqno"],
            ),
            (
                "drm_sched_job_run",
                &["fence", "fence_context", "fence_seqno"],
            ),
            ("drm_sched_job_done", &["fence"]),
        ]);
        let queue = "gpu_scheduler:drm_sched_job_queue has no field fence";
        let expected = [
            ("OFF_QUEUE_FENCE", Err(queue.to_owned())),
            ("OFF_QUEUE_RING", Ok(8)),
            ("RING_IS_POINTER", Ok(0)),
            ("OFF_RUN_FENCE", Ok(8)),
            ("OFF_DONE_FENCE", Ok(8)),
        ];
        assert_eq!(offsets(&mixed), expected);
    }

    #[test]
    fn a_name_ends_at_its_first_zero_or_its_room() {
        let mut name = [0; NAME];
        name[..4].copy_from_slice(b"rcs0");
        assert_eq!(text(&name), "rcs0");
        assert_eq!(text(&[b'x'; NAME]), "x".repeat(NAME));
        assert_eq!(text(&[0; NAME]), "");
    }
}
