// SPDX-License-Identifier: Apache-2.0
//! Which processes have which libraries mapped, now?
//!
//! A thread looks at processes that are new or whose code has changed, asks the [`helper`](super::helper) what they have mapped and what is
//! in it, and publishes what it knows. Nobody waits for it. What it spends on the processes of one pod is bounded, and who has had least
//! comes first: no pod can keep it from the others.

mod budget;
mod looker;
mod note;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;

use self::looker::Looker;
pub(crate) use self::note::{Note, shown};
use super::{
    Identity, Skipped,
    elf::{Library, Wanted},
    maps::Interest,
};
use crate::{hook::Reason, lock::lock, probe::Room};

/// How often processes are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is watched for.
pub(crate) struct Watched {
    pub(crate) interest: Interest,
    pub(crate) wanted: Wanted,
    /// Says if a library is of use.
    pub(crate) is_of_use: fn(&Library) -> bool,
}

/// A library that is of use, open.
#[derive(Debug)]
pub(crate) struct Found {
    /// Its path, as some process sees it.
    pub(crate) path: String,
    /// Its file: probes go to this and no other, whatever its path becomes.
    pub(crate) file: File,
    pub(crate) library: Library,
    /// The pod, or unit, of that process, on whose account it is looked at.
    pod: Arc<str>,
}

/// What is known now.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Libraries that are of use.
    pub(crate) files: BTreeMap<Identity, Arc<Found>>,
    /// The processes that have some mapped.
    pub(crate) processes: BTreeMap<u32, Vec<Identity>>,
    /// The pods, or units, that these are of.
    pub(crate) pods: BTreeMap<Identity, BTreeSet<Arc<str>>>,
    pub(crate) notes: Vec<Note>,
    pub(crate) skipped: Skipped,
}

/// A watch at work. Dropping it ends it.
pub(crate) struct Watch {
    shared: Arc<Shared>,
}

struct Shared {
    snapshot: Mutex<Arc<Snapshot>>,
    /// The processes that are looked at; all, where nothing is said.
    only: Mutex<Option<BTreeSet<u32>>>,
    stopped: AtomicBool,
}

/// Closed until the exporter has something to show.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets all through, now and later.
    pub fn open(&self) {
        *lock(&self.open) = true;
        self.opened.notify_all();
    }

    /// Waits until it is open.
    pub fn wait(&self) {
        let open = lock(&self.open);
        let passed = self.opened.wait_while(open, |open| !*open);
        drop(passed.unwrap_or_else(PoisonError::into_inner));
    }

    /// Says if it is open.
    pub fn is_open(&self) -> bool {
        *lock(&self.open)
    }
}

impl Snapshot {
    /// Takes places for all probes of a file, on the account of any pod that has it and room.
    ///
    /// # Errors
    /// What to tell of a probe that has no place.
    pub(crate) fn room(
        &self,
        file: &Identity,
        places: usize,
    ) -> Result<Vec<Room>, (Reason, String)> {
        let mut refused = (Reason::NoRoom, "nobody has it any more".to_owned());
        for pod in self.pods.get(file).into_iter().flatten() {
            match Room::take(places, pod) {
                Ok(room) => return Ok(room),
                Err(why) => refused = why,
            }
        }
        Err(refused)
    }
}

impl Watch {
    /// Begins to look once the gate is open; where it is open already, has looked once when this returns.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        signal: &'static str,
        watched: Watched,
        only: Option<BTreeSet<u32>>,
        gate: &Arc<Gate>,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            snapshot: Mutex::default(),
            only: Mutex::new(only),
            stopped: AtomicBool::new(false),
        });
        let mut looker = Looker::new(watched);
        let turn = |looker: &mut Looker, shared: &Shared| {
            let only = lock(&shared.only).clone();
            let Ok(processes) = only.map_or_else(processes, Ok) else {
                return;
            };
            looker.turn(&processes, &mut |snapshot| {
                *lock(&shared.snapshot) = Arc::new(snapshot);
            });
        };
        if gate.is_open() {
            turn(&mut looker, &shared);
        }
        let (told, gate) = (Arc::clone(&shared), Arc::clone(gate));
        thread::Builder::new()
            .name(format!("{signal}-files"))
            .spawn(move || {
                gate.wait();
                while !told.stopped.load(Ordering::Relaxed) {
                    turn(&mut looker, &told);
                    thread::sleep(LOOK_EVERY);
                }
            })
            .context("start the thread that looks for libraries")?;
        Ok(Self { shared })
    }

    /// What is known now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&lock(&self.shared.snapshot))
    }

    /// Has only these processes looked at from now on.
    pub(crate) fn only(&self, processes: BTreeSet<u32>) {
        *lock(&self.shared.only) = Some(processes);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
    }
}

/// The processes that there are, in the initial namespace if this one is.
///
/// # Errors
/// When `/proc` cannot be read, which says nothing of processes.
pub(crate) fn processes() -> io::Result<BTreeSet<u32>> {
    let mut there = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        there.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(there)
}
