// SPDX-License-Identifier: Apache-2.0
//! The signals: each is attached, read (maps → ledger) and rendered (ledger → families) by a file of its name.

pub mod encryption;
pub mod follow;
pub mod gpu;
pub mod nccl;
pub mod rdma;
pub mod running;
pub mod tcp;

use std::{
    cell::Cell,
    io::ErrorKind,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::{
    Pod,
    maps::{HashMap, MapData, MapError},
};
use serde::Serialize;

use crate::{
    capabilities::Need,
    families::{Desc, Families},
    hook::Hook,
    kernel::Kernel,
    ledger::{Attribution, Ledger},
    libraries::{Gate, Skipped},
    pods::{Drain, Resolution, View},
    probe::{Attached, Health, Outcome},
};

/// Every signal, in the order of the page.
#[rustfmt::skip] // one line each
pub const SIGNALS: &[Entry] = &[
    tcp::ENTRY,
    rdma::ENTRY,
    gpu::ENTRY,
    nccl::ENTRY,
    encryption::ENTRY,
];

/// What the exporter knows of a signal before it is attached.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// One word, the same in every layer.
    pub name: &'static str,
    /// The question that it answers.
    pub question: &'static str,
    /// Its metrics.
    pub descs: &'static [&'static Desc],
    /// Its objects for the kernel: one of its name, and those of its parts, `<name>_<part>`.
    pub objects: &'static [&'static [u8]],
    /// The capabilities that it takes.
    pub needs: &'static [Need],
    /// Loads and attaches it.
    pub attach: fn(&Kernel, &Options) -> Attempt,
}

/// What every signal is told at attach.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Owners that each signal shows by name.
    pub max_owners: usize,
    /// Where the cgroup v2 hierarchy is, if there is one.
    pub cgroups: Option<PathBuf>,
    /// How `rdma` shows what is new.
    pub rdma: rdma::Settings,
    /// What `encryption` looks at, and how closely.
    pub encryption: encryption::Settings,
    /// What `gpu` looks at.
    pub gpu: gpu::Settings,
    /// How `nccl` names communicators.
    pub nccl: nccl::Settings,
    /// Opened once the first page can be served: nobody looks into processes before.
    pub gate: Arc<Gate>,
    /// Whether paths of containers' files are told, or only their names.
    pub show_paths: bool,
}

/// What has become of a signal: what `/metrics`, the page for people and `chandra check` tell.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Up, absent or failed.
    pub state: State,
    /// Its hooks.
    pub hooks: Vec<Hook>,
    /// What works with less, for people.
    pub notes: Vec<String>,
    /// What it has found on this host, for people.
    pub found: Vec<String>,
    /// What of libraries was not looked at, for a signal that looks into them.
    #[serde(skip)]
    pub skipped: Option<Skipped>,
}

impl Status {
    /// What has become of an object, and what `build` makes of it: up where it can, and failed otherwise.
    fn of<T>(
        outcome: Outcome,
        build: impl FnOnce(Attached) -> anyhow::Result<T>,
    ) -> (Self, Option<T>) {
        let mut status = Self {
            hooks: outcome.hooks,
            notes: outcome.notes,
            ..Self::bare(State::Failed)
        };
        match outcome.attached.map(build) {
            Some(Ok(built)) => {
                status.state = State::Up;
                return (status, Some(built));
            }
            Some(Err(error)) => status.notes.push(format!("{error:#}")),
            None => {}
        }
        (status, None)
    }

    /// That of a signal of which nothing else is known.
    fn bare(state: State) -> Self {
        Self {
            state,
            hooks: Vec::new(),
            notes: Vec::new(),
            found: Vec::new(),
            skipped: None,
        }
    }
}

/// The label `state` of `chandra_signal_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It works, perhaps with less than everything (see its hooks).
    Up,
    /// This host has no such thing: nothing is wrong.
    Absent,
    /// Switched off by a flag.
    Disabled,
    /// It should work and does not.
    Failed,
}

impl State {
    /// All states with their labels.
    pub const LABELS: [(Self, &'static str); 4] = [
        (Self::Up, "up"),
        (Self::Absent, "absent"),
        (Self::Disabled, "disabled"),
        (Self::Failed, "failed"),
    ];

    /// The label.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize].1
    }
}

/// What came of attaching a signal.
pub struct Attempt {
    /// What has become of it.
    pub status: Status,
    /// The signal, where it is up.
    pub signal: Option<Box<dyn Signal>>,
}

impl Attempt {
    /// A signal that was not attached on purpose.
    pub fn without(state: State) -> Self {
        Self {
            status: Status::bare(state),
            signal: None,
        }
    }

    /// A signal that is up when `build` can use the attached object, and failed otherwise.
    pub fn of(
        outcome: Outcome,
        build: impl FnOnce(Attached) -> anyhow::Result<Box<dyn Signal>>,
    ) -> Self {
        let (status, signal) = Status::of(outcome, build);
        Self { status, signal }
    }

    /// A signal that tells by itself what has become of it, or why it could not begin.
    fn following<S: Signal + 'static>(begun: anyhow::Result<S>) -> Self {
        match begun {
            Ok(signal) => Self {
                status: signal
                    .status()
                    .unwrap_or_else(|| Status::bare(State::Absent)),
                signal: Some(Box::new(signal)),
            },
            Err(error) => {
                let mut failed = Self::without(State::Failed);
                failed.status.notes.push(format!("{error:#}"));
                failed
            }
        }
    }
}

/// What came of reading a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// All that there is to read was read.
    Now,
    /// What it reads is held by who attaches to it: what was read before stands.
    Before,
}

/// What a signal reads against: the pods, frozen for one scrape.
#[derive(Debug)]
pub struct Scope<'a> {
    /// Who owns what.
    pub pods: &'a View<'a>,
    /// The time of the scrape.
    pub now: Instant,
    /// How long what is gone is remembered.
    pub retention: Duration,
    /// Set when a cgroup turned up that the directory does not know.
    pub strangers: Cell<bool>,
}

impl Scope<'_> {
    /// Returns the owner of a cgroup id as the kernel half gives it.
    pub fn resolve(&self, cgroup: u64) -> Resolution {
        if cgroup == exporter_common::NO_CGROUP {
            return Resolution::Unknown;
        }
        self.note(cgroup);
        self.pods.resolve(cgroup)
    }

    /// Has a walk asked for if a cgroup is not known.
    pub fn note(&self, cgroup: u64) {
        if cgroup != exporter_common::NO_CGROUP && !self.pods.knows(cgroup) {
            self.strangers.set(true);
        }
    }

    /// Books what totals by cgroup id grew by. Held counts look for their owners anew, even where there are no totals.
    pub fn book_totals<const N: usize>(
        &self,
        ledger: &mut Ledger<u64, N>,
        totals: impl IntoIterator<Item = (u64, [u64; N])>,
    ) {
        let resolve = |cgroup| self.resolve(cgroup);
        ledger.book(&self.pods.owners(), totals, resolve, self.now);
    }

    /// Books what a map of totals by cgroup id grew by, and removes the entries of cgroups that are long gone.
    ///
    /// # Errors
    /// When the map cannot be read; what was booked before stays.
    pub fn book<V: Pod, const N: usize>(
        &self,
        ledger: &mut Ledger<u64, N>,
        map: &mut HashMap<MapData, u64, V>,
        totals: impl Fn(V) -> [u64; N],
    ) -> anyhow::Result<Read> {
        let readings = entries(map)?;
        let readings = readings
            .into_iter()
            .map(|(cgroup, value)| (cgroup, totals(value)));
        self.book_totals(ledger, readings);
        for cgroup in ledger.retire(self.retention, |cgroup| !self.pods.knows(cgroup), self.now) {
            removed(map.remove(&cgroup))?;
        }
        Ok(Read::Now)
    }
}

/// Nanoseconds of the clock that the kernel half reads (`bpf_ktime_get_ns`).
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Reads a whole map. An entry that goes away meanwhile is passed over.
///
/// # Errors
/// When the map cannot be read.
pub fn entries<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>) -> anyhow::Result<Vec<(K, V)>> {
    let there = |entry: &Result<_, MapError>| !matches!(entry, Err(MapError::KeyNotFound));
    let all: Result<_, _> = map.iter().filter(there).collect();
    all.context("read a map")
}

/// What came of removing an entry from a map, where it may have gone by itself.
///
/// # Errors
/// When the kernel refuses.
pub fn removed(outcome: Result<(), MapError>) -> anyhow::Result<()> {
    was_there(outcome).map(|_| ())
}

/// The same, and whether it was there.
pub fn was_there(outcome: Result<(), MapError>) -> anyhow::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        // So says aya 0.14 of a key that is not there.
        Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {
            Ok(false)
        }
        Err(error) => Err(error).context("remove an entry from a map"),
    }
}

/// A signal at work. Dropping it detaches everything.
pub trait Signal: Send {
    /// Reads the maps and books what they grew by.
    ///
    /// # Errors
    /// When a map cannot be read; what was booked before stays.
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read>;

    /// Renders what has been booked.
    fn render(&self, families: &mut Families);

    /// How well events found their owners.
    fn attribution(&self) -> Attribution;

    /// What its kernel half tells of itself.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn health(&self) -> anyhow::Result<Health>;

    /// What has to be done before addresses of pods change hands, for a signal that counts by address.
    fn drain(&self) -> Option<Arc<dyn Drain>> {
        None
    }

    /// What has become of it, for a signal that comes and goes with modules of the kernel.
    fn status(&self) -> Option<Status> {
        None
    }
}
