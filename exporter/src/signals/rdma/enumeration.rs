// SPDX-License-Identifier: Apache-2.0
//! How many queue pairs does each device have, of whom, in what state?
//!
//! The kernel asks the device's firmware for each queue pair, so this runs beside the scrapes: when one has asked for it,
//! at most once in [`Limits::interval`], each device in a thread of its own with a budget. A device that is slow, answers
//! oddly or never costs itself; its last counts stay, and their age is exported.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use exporter_common::rdma::MAX_DEVICES;

use super::nldev::QueuePair;

/// How often, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Between the starts of two enumerations of a device, at least; ten times its duration where that is longer, so that
    /// a device spends at most a tenth of its time on this.
    pub interval: Duration,
    /// For one enumeration of one device.
    pub budget: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            budget: Duration::from_secs(5),
        }
    }
}

/// Who owns a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PairOwner {
    /// The kernel.
    Kernel,
    /// A cgroup, by its id.
    Cgroup(u64),
    /// Nobody can tell.
    Unknown,
}

/// Where devices and their queue pairs come from.
pub trait Fabric: Send + Sync + 'static {
    /// What names a device to [`Self::queue_pairs`].
    type Device: Clone + Send + 'static;

    /// Lists the devices.
    ///
    /// # Errors
    /// One line, where nothing could be looked at.
    fn devices(&self) -> Result<Listing<Self::Device>, String>;

    /// Lists the queue pairs of a device, each with its owner; and what was odd, in one line.
    ///
    /// # Errors
    /// One line.
    fn queue_pairs(&self, device: &Self::Device, budget: Duration) -> Result<Answer, String>;
}

/// The devices that there are.
#[derive(Clone, Debug)]
pub struct Listing<D> {
    /// By name.
    pub devices: Vec<(String, D)>,
    /// What could not be looked at, in one line each.
    pub troubles: Vec<String>,
}

/// What a device answered.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Every queue pair.
    pub pairs: Vec<(QueuePair, PairOwner)>,
    /// What was odd about the answer.
    pub odd: Option<String>,
    /// Whether there may be more queue pairs.
    pub is_partial: bool,
}

/// Queue pairs by owner, type and state.
pub type Counts = BTreeMap<(PairOwner, u8, u8), u64>;

/// What is known of one device.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// How old the counts are: since the enumeration began that gave them, or since the device was first seen.
    pub age: Duration,
    /// Its queue pairs; `None` as long as it has not answered.
    pub counts: Option<Arc<Counts>>,
    /// Whether there may be more of them.
    pub is_partial: bool,
}

#[derive(Debug, Default)]
struct State {
    asked: bool,
    stopped: bool,
    devices: BTreeMap<String, Known>,
    /// Why nothing could be listed, or what could not be looked at.
    troubles: Vec<String>,
}

#[derive(Debug)]
struct Known {
    first_seen: Instant,
    counts: Option<Arc<Counts>>,
    is_partial: bool,
    /// When the enumeration began that gave the counts.
    counted: Option<Instant>,
    /// When the enumeration began that has not ended.
    running: Option<Instant>,
    /// When the next may begin.
    next: Instant,
    trouble: Option<String>,
}

/// The enumeration of all devices. Dropping it ends its thread.
#[derive(Debug)]
pub struct Enumeration {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Enumeration {
    /// Starts the thread that enumerates when asked.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start<F: Fabric>(fabric: F, limits: Limits) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let fabric = Arc::new(fabric);
        thread::Builder::new()
            .name("rdma-devices".to_owned())
            .stack_size(256 << 10)
            .spawn(move || run(&of_thread, &fabric, limits))?;
        Ok(Self { shared })
    }

    /// Asks for fresh counts, for a later scrape.
    pub fn ask(&self) {
        self.shared.lock().asked = true;
        self.shared.wake.notify_one();
    }

    /// Returns what is known of each device.
    pub fn reports(&self, now: Instant) -> Vec<Report> {
        let state = self.shared.lock();
        let report = |(name, known): (&String, &Known)| Report {
            device: name.clone(),
            age: now.saturating_duration_since(known.counted.unwrap_or(known.first_seen)),
            counts: known.counts.clone(),
            is_partial: known.is_partial,
        };
        state.devices.iter().map(report).collect()
    }

    /// Returns what does not work, in one line each.
    pub fn troubles(&self, now: Instant) -> Vec<String> {
        let state = self.shared.lock();
        let of_devices = state.devices.iter().filter_map(|(name, known)| {
            let waiting = known
                .running
                .map(|since| now.saturating_duration_since(since))
                .filter(|waited| *waited > Duration::from_secs(30));
            match (waiting, &known.trouble) {
                (Some(waited), _) => Some(format!(
                    "the device {name} has not answered for {} s: its queue pairs are those of before",
                    waited.as_secs()
                )),
                (None, Some(trouble)) => Some(format!("the device {name}: {trouble}")),
                (None, None) => None,
            }
        });
        state.troubles.iter().cloned().chain(of_devices).collect()
    }
}

impl Drop for Enumeration {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.wake.notify_one();
    }
}

fn run<F: Fabric>(shared: &Arc<Shared>, fabric: &Arc<F>, limits: Limits) {
    let mut last: Option<Instant> = None;
    loop {
        let mut state = shared.lock();
        while !state.asked && !state.stopped {
            state = shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return;
        }
        state.asked = false;
        drop(state);
        let now = Instant::now();
        if last.is_some_and(|last| now < last + limits.interval) {
            continue;
        }
        last = Some(now);
        let listed = fabric.devices();
        let mut state = shared.lock();
        match listed {
            Ok(Listing {
                mut devices,
                mut troubles,
            }) => {
                if devices.len() > MAX_DEVICES as usize {
                    troubles.push(format!(
                        "of {} devices only {MAX_DEVICES} are enumerated",
                        devices.len()
                    ));
                    devices.truncate(MAX_DEVICES as usize);
                }
                state.troubles = troubles;
                state
                    .devices
                    .retain(|name, _| devices.iter().any(|(listed, _)| listed == name));
                for (name, device) in devices {
                    begin(shared, &mut state, fabric, (name, device), limits);
                }
            }
            Err(trouble) => state.troubles = vec![trouble],
        }
    }
}

fn begin<F: Fabric>(
    shared: &Arc<Shared>,
    state: &mut State,
    fabric: &Arc<F>,
    (name, device): (String, F::Device),
    limits: Limits,
) {
    let now = Instant::now();
    let known = state.devices.entry(name.clone()).or_insert_with(|| Known {
        first_seen: now,
        counts: None,
        is_partial: false,
        counted: None,
        running: None,
        next: now,
        trouble: None,
    });
    if known.running.is_some() || now < known.next {
        return;
    }
    let (of_thread, fabric) = (Arc::clone(shared), Arc::clone(fabric));
    let job = {
        let name = name.clone();
        move || {
            let answer = fabric.queue_pairs(&device, limits.budget);
            let counted = answer.map(|answer| {
                let Answer {
                    pairs,
                    odd,
                    is_partial,
                } = answer;
                let mut counts = Counts::new();
                for (pair, owner) in pairs {
                    *counts.entry((owner, pair.kind, pair.state)).or_default() += 1;
                }
                (counts, odd, is_partial)
            });
            let mut state = of_thread.lock();
            // A device that has gone and come back is another one.
            let Some(known) = state.devices.get_mut(&name) else {
                return;
            };
            if known.running != Some(now) {
                return;
            }
            known.running = None;
            known.next = now + limits.interval.max(now.elapsed() * 10);
            match counted {
                Ok((counts, odd, is_partial)) => {
                    known.counts = Some(Arc::new(counts));
                    known.is_partial = is_partial;
                    known.counted = Some(now);
                    known.trouble = odd;
                }
                Err(trouble) => {
                    known.is_partial = true;
                    known.trouble = Some(trouble);
                }
            }
        }
    };
    let thread = thread::Builder::new()
        .name("rdma-device".to_owned())
        .stack_size(256 << 10);
    known.running = Some(now);
    if let Err(error) = thread.spawn(job) {
        known.running = None;
        known.trouble = Some(format!("cannot start a thread for it: {error}"));
    }
}
