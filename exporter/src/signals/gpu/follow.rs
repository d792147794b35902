// SPDX-License-Identifier: Apache-2.0
//! Which processes drive a GPU, as devices come and files are opened?

use std::{
    collections::{BTreeMap, HashSet},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::maps::{self, MapData};
use exporter_common::gpu::{Delays, Device, Process, SEARCHED, SEARCHING, Thread};

use super::{
    OBJECT, Settings,
    devices::{Drivers, Opened, Places},
    programs::{PROGRAMS, resolve},
};
use crate::{
    hook::{Method, Reason},
    kernel::Kernel,
    lock::lock,
    probe::{self, Attached, Health},
    signals::{
        State, Status, entries,
        follow::{self, Follower},
        removed,
    },
};

/// How old what is known of open files may be: where opens are heard of, and where they are not.
const SEARCH_EVERY: Duration = Duration::from_secs(10);
const SEARCH_OFTEN: Duration = Duration::from_secs(1);

/// The object at work.
pub(super) struct Live {
    pub(super) attached: Attached,
    pub(super) processes: maps::HashMap<MapData, u32, Process>,
    threads: maps::HashMap<MapData, u32, Thread>,
    devices: maps::HashMap<MapData, u32, Device>,
    search: maps::Array<MapData, u32>,
    pub(super) delays: maps::HashMap<MapData, u64, Delays>,
    /// The number of the last search.
    pub(super) number: u32,
    pub(super) drivers: Drivers,
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
            drivers: Drivers::default(),
            searched: None,
        })
    }

    /// Tells the kernel half which devices drive a GPU.
    fn set_devices(
        &mut self,
        old: &BTreeMap<u32, Opened>,
        new: &BTreeMap<u32, Opened>,
    ) -> anyhow::Result<()> {
        for device in old.keys().filter(|device| !new.contains_key(device)) {
            removed(self.devices.remove(device))?;
        }
        for (device, opened) in new {
            self.devices
                .insert(device, self.drivers.device(opened), 0)?;
        }
        Ok(())
    }

    /// Looks through all open files, and lets go of the processes that have no device open any more.
    fn search(&mut self) -> anyhow::Result<()> {
        let number = self.number.wrapping_add(1);
        self.search.set(SEARCHING, number, 0)?;
        self.attached
            .walk("open_files")
            .context("walk over all open files (bpf iterator task_file)")?;
        self.search.set(SEARCHED, number, 0)?;
        self.number = number;
        self.searched = Some(Instant::now());
        let mut gone = HashSet::new();
        for (process, known) in entries(&self.processes)? {
            if known.search == number {
                // Where one that drives no GPU any more does again, what its threads waited meanwhile is not counted.
                if known.drivers == 0 {
                    gone.insert(u64::from(process));
                }
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

/// What is read.
#[derive(Default)]
pub(super) struct Core {
    pub(super) live: Option<Live>,
}

impl Core {
    /// The processes that drive a GPU now.
    pub(super) fn processes(&self) -> Vec<u32> {
        let known = self.live.as_ref().map(|live| entries(&live.processes));
        let known = known.and_then(Result::ok).unwrap_or_default().into_iter();
        let drive = known.filter(|(_, process)| process.drivers != 0);
        drive.map(|(process, _)| process).collect()
    }
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        let live = self.live.as_ref().map(|live| &live.attached);
        follow::health_of(Health::default(), live)
    }
}

/// What follows devices and open files.
pub(super) struct Devices {
    status: Status,
    settings: Settings,
    places: Places,
    known: BTreeMap<u32, Opened>,
    /// What is wrong with devices and searches now; notes of `status`.
    troubles: Vec<String>,
}

impl Follower<Core> for Devices {
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        let (devices, mut troubles) = self.places.devices(&self.settings.devices);
        let changed = devices != self.known;
        let mut core = lock(core);
        if core.live.is_none() && changed && !devices.is_empty() {
            core.live = self.load(&kernel());
        }
        let mut done = Ok(());
        if let Some(live) = &mut core.live {
            let heard = self
                .status
                .hooks
                .iter()
                .any(|hook| hook.method == Method::Kprobe && hook.reason == Reason::Attached);
            let every = if heard { SEARCH_EVERY } else { SEARCH_OFTEN };
            let due = live.searched.is_none_or(|at| at.elapsed() >= every);
            if changed {
                done = live.set_devices(&self.known, &devices);
            }
            if done.is_ok() && (changed || due) {
                done = live.search();
            }
        }
        // What could not be told is told again.
        if done.is_ok() {
            self.known = devices;
        }
        troubles.extend(done.err().map(|error| format!("{error:#}")));
        if core.live.is_none() && self.known.is_empty() {
            self.status = Status::bare(State::Absent);
        }
        self.note(troubles);
        self.status.clone()
    }
}

impl Devices {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            status: Status::bare(State::Absent),
            settings: settings.clone(),
            places: Places::default(),
            known: BTreeMap::new(),
            troubles: Vec::new(),
        }
    }

    fn load(&mut self, kernel: &Kernel) -> Option<Live> {
        let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), resolve, kernel);
        let (status, live) = Status::of(outcome, Live::new);
        self.status = status;
        live
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
