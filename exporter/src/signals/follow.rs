// SPDX-License-Identifier: Apache-2.0
//! How does a signal follow what comes and goes on this host: modules, devices, libraries?
//!
//! A thread of its own looks at what has come, attaches to it and lets go of what has gone. That may take seconds, and no scrape waits for it:
//! it tries for the lock, and shows what was read before where it is not to be had.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{Read, SIGNALS, State, Status};
use crate::{
    hook::Reason,
    kernel::{Kernel, symbols, uevents::Uevents},
    lock::{lock, try_lock},
    probe::{Attached, Health},
};

/// What attaches to something of this host as it comes, and lets go of it.
pub trait Follower<C>: Send + 'static {
    /// What is told before it has looked.
    fn before(&self) -> Status {
        Status::bare(State::Absent)
    }

    /// Looks at what has come and gone, and tells what has become of it.
    fn follow(&mut self, core: &Mutex<C>, kernel: &dyn Fn() -> Kernel) -> Status;
}

/// What a scrape reads: the maps, and what goes with them.
pub trait Core: Send + 'static {
    /// What the kernel half tells of itself, what was let go of included.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn health(&self) -> anyhow::Result<Health>;
}

/// What objects that were let go of told of themselves, and what the one at work tells.
///
/// # Errors
/// When a map cannot be read.
pub(super) fn health_of(mut gone: Health, live: Option<&Attached>) -> anyhow::Result<Health> {
    if let Some(attached) = live {
        gone += attached.health()?;
    }
    Ok(gone)
}

/// What is followed, for who reads.
#[derive(Debug)]
pub struct Following<C> {
    core: Arc<Mutex<C>>,
    status: Arc<Mutex<Status>>,
    stopped: Arc<AtomicBool>,
    health: Health,
}

impl<C: Core> Following<C> {
    /// Follows in a thread of its own, each time that `wait` returns; and once before, with the kernel as it is now, if that is given. What
    /// becomes of a signal is logged; a part of one logs by itself.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        name: &'static str,
        core: C,
        mut follower: impl Follower<C>,
        now: Option<&Kernel>,
        mut wait: impl FnMut() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let core = Arc::new(Mutex::new(core));
        let status = match now {
            Some(kernel) => follower.follow(&core, &|| kernel.clone()),
            None => follower.before(),
        };
        let is_signal = SIGNALS.iter().any(|entry| entry.name == name);
        let following = Self {
            core: Arc::clone(&core),
            status: Arc::new(Mutex::new(status)),
            stopped: Arc::default(),
            health: Health::default(),
        };
        let (status, stopped) = (
            Arc::clone(&following.status),
            Arc::clone(&following.stopped),
        );
        let follow = move || {
            while !stopped.load(Ordering::Relaxed) {
                wait();
                let before = lock(&status).state;
                let now = follower.follow(&core, &Kernel::read);
                if is_signal {
                    announce(name, before, &now);
                }
                *lock(&status) = now;
            }
        };
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(1 << 20)
            .spawn(follow)
            .with_context(|| {
                format!("start the thread that follows what comes and goes for {name}")
            })?;
        Ok(following)
    }

    /// Reads what is attached, if it can be had soon.
    ///
    /// # Errors
    /// When a map cannot be read; what was read before stays.
    pub fn read(
        &mut self,
        read: impl FnOnce(&mut C) -> anyhow::Result<()>,
    ) -> anyhow::Result<Read> {
        let Some(mut core) = try_lock(&self.core) else {
            return Ok(Read::Before);
        };
        read(&mut core)?;
        self.health = core.health()?;
        Ok(Read::Now)
    }

    /// What is read, for who may wait for it.
    pub fn core(&self) -> Arc<Mutex<C>> {
        Arc::clone(&self.core)
    }

    /// What has become of it.
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    /// Whether this host has it, as far as is known.
    pub fn state(&self) -> State {
        lock(&self.status).state
    }

    /// What the kernel half last told of itself.
    pub fn health(&self) -> Health {
        self.health.clone()
    }
}

impl<C> Drop for Following<C> {
    fn drop(&mut self) {
        // The thread sees it when it next wakes, and lets go of its programs.
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Returns at once, and then after each time.
pub fn at_once_and_every(time: Duration) -> impl FnMut() + Send + 'static {
    let mut is_first = true;
    move || {
        if !std::mem::take(&mut is_first) {
            thread::sleep(time);
        }
    }
}

/// Waits for modules of the kernel to come and go.
pub fn modules(signal: &str) -> impl FnMut() + Send + 'static {
    let mut events = Uevents::listen(signal);
    move || events.wait()
}

/// Logs what a signal has become, where it was something else before.
fn announce(signal: &str, before: State, now: &Status) {
    if now.state == before {
        return;
    }
    tracing::info!("signal {signal}: {}", now.state.label());
    if now.state == State::Failed {
        let details = now.hooks.iter().map(|hook| &hook.detail);
        for detail in details.filter(|detail| !detail.is_empty()) {
            tracing::error!("signal {signal}: {detail}");
        }
    }
}

/// How many lines are logged about what containers have mapped, which may be another file each second: so many in such a time. All of it
/// stands on the page for people.
const LINES: u32 = 100;
const LINES_IN: Duration = Duration::from_secs(600);

/// A log that no container can fill.
#[derive(Debug)]
struct BoundedLog {
    signal: &'static str,
    since: Instant,
    lines: u32,
}

impl BoundedLog {
    fn new(signal: &'static str) -> Self {
        Self {
            signal,
            since: Instant::now(),
            lines: 0,
        }
    }

    /// Logs a line, as long as there are few.
    fn line(&mut self, is_warning: bool, text: &str) {
        if self.since.elapsed() >= LINES_IN {
            *self = Self::new(self.signal);
        }
        self.lines += 1;
        let signal = self.signal;
        match (self.lines, is_warning) {
            (..LINES, true) => tracing::warn!("signal {signal}: {text}"),
            (..LINES, false) => tracing::info!("signal {signal}: {text}"),
            (LINES, _) => tracing::warn!(
                "signal {signal}: more than {LINES} lines about files; for ten minutes only the page / tells more"
            ),
            _ => {}
        }
    }
}

/// Logs what is new of a status, with all that is known of files.
#[derive(Debug)]
pub(super) struct StatusLog {
    log: BoundedLog,
    logged: Status,
}

impl StatusLog {
    pub(super) fn new(signal: &'static str) -> Self {
        Self {
            log: BoundedLog::new(signal),
            logged: Status::bare(State::Absent),
        }
    }

    /// Takes over what has become of it.
    pub(super) fn tell(&mut self, new: Status) {
        for (word, before, now) in [
            ("found ", &self.logged.found, &new.found),
            ("works with less: ", &self.logged.notes, &new.notes),
        ] {
            for text in now.iter().filter(|text| !before.contains(text)) {
                self.log.line(false, &format!("{word}{text}"));
            }
        }
        let hooks = self.logged.hooks.iter();
        let mut told: BTreeSet<&str> = hooks.map(|hook| hook.detail.as_str()).collect();
        for hook in &new.hooks {
            // That there is no room is a note, once for the file.
            let is_told = hook.reason == Reason::NoRoom || hook.detail.is_empty();
            if !is_told && told.insert(&hook.detail) {
                self.log.line(true, &hook.detail);
            }
        }
        self.logged = new;
    }
}

/// Enough for the some seconds that a chain of modules takes.
const LOOKS: u8 = 5;

/// Which loads of modules the hooks are in.
#[derive(Debug)]
pub(super) struct Loads<const N: usize> {
    modules: [&'static str; N],
    loads: [Option<u64>; N],
    /// How often what is missing is still looked for: a module is announced before all of it is in place.
    looks: u8,
}

impl<const N: usize> Loads<N> {
    /// None is known yet.
    pub(super) fn of(modules: [&'static str; N]) -> Self {
        Self {
            modules,
            loads: [None; N],
            looks: 0,
        }
    }

    /// Looks which are there. Returns those that were before, or nothing where there is nothing to do: none has come or gone, and what is
    /// hooked is complete, or has been looked for often enough.
    pub(super) fn look(&mut self, is_complete: bool) -> Option<[Option<u64>; N]> {
        let loads = self.modules.map(symbols::loaded);
        if loads != self.loads {
            self.looks = LOOKS;
        } else if is_complete || self.looks == 0 {
            return None;
        } else {
            self.looks -= 1;
        }
        Some(std::mem::replace(&mut self.loads, loads))
    }

    /// Which are there.
    pub(super) fn now(&self) -> &[Option<u64>; N] {
        &self.loads
    }

    /// Whether none is there.
    pub(super) fn are_absent(&self) -> bool {
        self.loads.iter().all(Option::is_none)
    }

    /// Whether what is missing is still looked for, since one of them is on its way in or out.
    pub(super) fn may_settle(&self) -> bool {
        let mut there = self.modules.iter();
        let in_motion =
            there.any(|module| symbols::loaded(module).is_some() && !symbols::settled(module));
        self.looks > 0 && in_motion
    }

    /// Has everything looked at anew.
    pub(super) fn forget(&mut self) {
        self.loads = [None; N];
    }
}
