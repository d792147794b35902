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

mod follow;
mod live;
pub(crate) mod metrics;
pub mod pending;
pub mod ranks;
pub mod salt;
mod sites;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aya::include_bytes_aligned;
use exporter_common::nccl::{Communicator, Group, Handle, LEARNT, SLOTS, SOURCES, Seat};

pub use self::metrics::render;
use self::{
    follow::{Libraries, watched},
    live::{Core, Live},
    metrics::units,
    pending::{Naming, Pending},
    ranks::{Ranks, Reading},
    salt::Salt,
};
use super::{
    Attempt, Entry, Options, Read, Scope, Signal, State, Status, entries, follow::Following,
};
use crate::{
    capabilities::{BPF, LIBRARIES, PERFMON, UPROBES},
    families::Families,
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening, PATIENCE},
    libraries::watch::Watch,
    probe::Health,
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "nccl",
    question: "Is a job slow because one rank comes late, and which?",
    descs: metrics::DESCS,
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, UPROBES, LIBRARIES],
    attach,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/nccl.o"));

/// What the signal is told by flags.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// What names of communicators are made with.
    pub salt: Option<Salt>,
}

/// How often it is asked what is mapped.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Nccl::new(kernel, options))
}

struct Nccl {
    following: Following<Core>,
    salt: Option<Salt>,
    ledger: Ledger<u64, SLOTS>,
    ranks: Ranks,
    nameless: Nameless,
    pending: Pending,
    max_owners: usize,
}

impl Nccl {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let watch = Watch::start("nccl", watched(), None, &options.gate)?;
        let libraries = Libraries::new(watch, options.show_paths);
        let now = options.gate.is_open().then_some(kernel);
        let mut gate = Some(Arc::clone(&options.gate));
        let wait = move || match gate.take() {
            Some(gate) => gate.wait(),
            None => thread::sleep(FOLLOW_EVERY),
        };
        Ok(Self {
            following: Following::start("nccl", Core::default(), libraries, now, wait)?,
            salt: options.nccl.salt.clone(),
            ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
            ranks: Ranks::new(options.max_owners),
            nameless: Nameless::default(),
            pending: Pending::default(),
            max_owners: options.max_owners,
        })
    }
}

/// Which tier tells of a communicator: an index of [`SOURCES`].
fn source(handle: &Handle) -> usize {
    ((handle.process >> 32) as usize).min(SOURCES.len() - 1)
}

/// Ranks whose communicator has not been asked for its number, and since when.
#[derive(Debug, Default)]
struct Nameless(HashMap<Seat, Instant>);

impl Nameless {
    /// What has been counted by ranks, but for those that wait for their communicator's name.
    fn readings(
        &mut self,
        live: &Live,
        known: &[(Handle, Communicator)],
        naming: &Naming<'_>,
        now: Instant,
    ) -> anyhow::Result<Vec<Reading>> {
        let unasked = known
            .iter()
            .filter(|(_, communicator)| communicator.state & LEARNT == 0);
        let unasked: HashSet<Seat> = unasked
            .map(|(_, communicator)| communicator.seat())
            .collect();
        self.0.retain(|seat, _| unasked.contains(seat));
        let mut readings = Vec::new();
        for (seat, member) in live.seated()? {
            let hash = naming.groups.get(&seat.group).map_or(0, |group| group.hash);
            if hash == 0 && unasked.contains(&seat) && member.ended == 0 {
                // What it has counted waits for its name.
                let since = *self.0.entry(seat).or_insert(now);
                if now.saturating_duration_since(since) < PATIENCE {
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
        Ok(readings)
    }
}

impl Signal for Nccl {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.following.read(|core| {
            let Some(live) = &mut core.live else {
                return Ok(());
            };
            scope.book(&mut self.ledger, &mut live.owners, |owner| owner.slots)?;
            let known = entries(&live.communicators)?;
            let groups: HashMap<u64, Group> = entries(&live.groups)?.into_iter().collect();
            let naming = Naming {
                groups: &groups,
                salt: self.salt.as_ref(),
            };
            let readings = self.nameless.readings(live, &known, &naming, scope.now)?;
            let (owners, resolve) = (scope.pods.owners(), |cgroup| scope.resolve(cgroup));
            let ended = self
                .ranks
                .book(&owners, &readings, resolve, scope.retention, scope.now);
            for seat in ended {
                live.clear_seat(&seat)?;
            }
            self.pending
                .find(live, &known, &naming, &self.ranks, self.max_owners, scope)
        })
    }

    fn render(&self, families: &mut Families) {
        if self.following.state() != State::Absent {
            render(self.ledger.accounts(), &self.ranks, &self.pending, families);
        }
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
