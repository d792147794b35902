// SPDX-License-Identifier: Apache-2.0
//! Which processes have which libraries mapped, now?
//!
//! A thread looks at processes that are new or whose code has changed, asks the [`helper`](super::helper) what they have mapped and what is
//! in it, and publishes what it knows. Nobody waits for it. What it spends on the processes of one pod is bounded, and who has had least
//! comes first: no pod can keep it from the others.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    Identity, Refusal, Skip, Skipped,
    elf::{Library, Wanted},
    helper::{Answer, Ask, Helper, Silence, Stuck},
    maps::{Interest, Mapped},
};
use crate::{hook::Reason, lock::lock, pods::cgroups, probe::Room};

/// How often processes are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long it is not asked again whether a process has new code: longer each time, since a library that comes comes soon.
const RARELY: Duration = Duration::from_secs(16);

/// How long one that seems to have none is not looked at again.
const AT_LEAST: Duration = Duration::from_secs(120);

/// How long what failed is not tried again: at first, and at most.
const AGAIN: Duration = Duration::from_secs(10);
const AGAIN_AT_MOST: Duration = Duration::from_secs(600);

/// Files that are probed at once: of the node, which have one or some containers their own, and of one pod.
const FILES: usize = 16;
const FILES_OF_POD: usize = FILES / 2;

/// Files that are remembered: refused ones of a process, a pod and the node, and those that are of no use, of which PyTorch has some four
/// hundred.
const REFUSED_OF_PROCESS: usize = 64;
const REFUSED_OF_POD: usize = 1024;
const REFUSED: usize = 8192;
const STRANGERS_OF_POD: usize = 4096;
const STRANGERS: usize = 65_536;
/// Places in memory whose files did not come, of a pod and the node.
const SLOW_OF_POD: usize = 64;
const SLOW: usize = 1024;

/// What may be spent on a pod, and on all: at once, and in each second.
const SPEND_ON_POD: Budget = Budget::new(10_000, 50);
const SPEND: Budget = Budget::new(30_000, 250);

/// Helpers that wait in the kernel for good: because of one pod, and of the node. With as many nobody is looked at who has some, and with four
/// times as many nobody.
const STUCK: usize = 8;
const STUCK_OF_POD: usize = 2;

/// Notes that are told, and files that one names.
const NOTES: usize = 20;
const PATHS: usize = 4;

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

/// Something for people that may be about files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    paths: Vec<String>,
    /// How many files it is about besides.
    more: usize,
    text: String,
}

impl Note {
    fn plain(text: impl Into<String>) -> Self {
        Self {
            paths: Vec::new(),
            more: 0,
            text: text.into(),
        }
    }

    /// One for each text, with the first paths that it is about.
    fn of_files<'a>(files: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<Self> {
        let mut by_text: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (path, text) in files {
            by_text.entry(text).or_default().insert(path);
        }
        let note = |(text, paths): (&str, BTreeSet<&str>)| Self {
            more: paths.len().saturating_sub(PATHS),
            paths: paths.into_iter().take(PATHS).map(str::to_owned).collect(),
            text: text.to_owned(),
        };
        by_text.into_iter().map(note).collect()
    }

    /// In one line. The folders of a container's files are its own affair, unless they are asked for.
    pub(crate) fn told(&self, with_paths: bool) -> String {
        if self.paths.is_empty() {
            return self.text.clone();
        }
        let paths: Vec<_> = self
            .paths
            .iter()
            .map(|path| shown(path, with_paths))
            .collect();
        let more = match self.more {
            0 => String::new(),
            more => format!(" and {more} files more"),
        };
        format!("{}{more}: {}", paths.join(", "), self.text)
    }
}

/// A path, or the name at its end, without what would break a line, and not longer than a line.
pub(crate) fn shown(path: &str, whole: bool) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    let shown = if whole { path } else { name };
    let most = if whole { 512 } else { 64 };
    let mut text: String = shown
        .chars()
        .take(most)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if shown.chars().nth(most).is_some() {
        text.push('…');
    }
    text
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

/// Time that may be spent.
#[derive(Clone, Copy, Debug)]
struct Budget {
    /// Of a burst, and what comes back in each second, in milliseconds.
    burst: u64,
    each_second: u64,
}

impl Budget {
    const fn new(burst: u64, each_second: u64) -> Self {
        Self { burst, each_second }
    }
}

/// What has been spent of a [`Budget`].
#[derive(Clone, Copy, Debug)]
struct Spent {
    spent: Duration,
    at: Instant,
}

impl Spent {
    fn new(now: Instant) -> Self {
        Self {
            spent: Duration::ZERO,
            at: now,
        }
    }

    /// What is spent, after what has come back.
    fn now(&mut self, budget: Budget, now: Instant) -> Duration {
        let since = now.saturating_duration_since(self.at);
        let back = since.mul_f64(budget.each_second as f64 / 1000.0);
        self.spent = self.spent.saturating_sub(back);
        self.at = now;
        self.spent
    }

    /// Spends some. What is owed has a bound, so that one long wait is paid back in minutes.
    fn add(&mut self, took: Duration, budget: Budget) {
        let most = Duration::from_millis(budget.burst + budget.each_second * 60);
        self.spent = most.min(self.spent + took);
    }

    fn is_left(&mut self, budget: Budget, now: Instant) -> bool {
        self.now(budget, now) < Duration::from_millis(budget.burst)
    }
}

/// What is known of a process.
struct Look {
    /// The pod, or unit, that it belongs to.
    pod: Arc<str>,
    /// Pages of code that are mapped: where that is the same, hardly anything new is.
    code: u64,
    next: Instant,
    every: Duration,
    /// When it is looked at whatever it seems.
    due: Instant,
    /// Its files that are of use, or refused.
    files: Vec<Identity>,
    /// Why it cannot be known.
    trouble: Option<String>,
    /// Whether it has more mapped than is read or remembered.
    beyond: bool,
    /// At which of its files the last look was cut.
    at: usize,
}

/// What is known of a pod.
struct Pod {
    spent: Spent,
    /// Whether something of it waits for its share of the time.
    waits: bool,
    /// Its files that are refused, and those that are of no use.
    refused: usize,
    strangers: usize,
}

impl Pod {
    fn new() -> Self {
        Self {
            spent: Spent::new(Instant::now()),
            waits: false,
            refused: 0,
            strangers: 0,
        }
    }
}

/// What has been met of a process.
#[derive(Default)]
struct Met {
    /// Its files that are of use or refused, and how many of them are refused.
    files: BTreeSet<Identity>,
    refused: usize,
    /// How many files were met, and whether there was no time for the others.
    done: usize,
    cut: bool,
    /// Whether some did not come.
    late: bool,
}

impl Met {
    /// Adds a file that is refused, unless there are too many. Says if it is among them.
    fn add_refused(&mut self, identity: Identity) -> bool {
        if self.files.contains(&identity) {
            return true;
        }
        let room = self.refused < REFUSED_OF_PROCESS;
        if room {
            self.refused += 1;
            self.files.insert(identity);
        }
        room
    }
}

/// A file that is not looked at.
struct Refused {
    path: String,
    why: String,
    skip: Skip,
    pod: Arc<str>,
    again: Option<Instant>,
    every: Duration,
}

/// A place in memory whose file did not come.
struct Slow {
    path: String,
    why: String,
    pod: Arc<str>,
    again: Instant,
    every: Duration,
    stuck: Option<Stuck>,
    /// Whether it is due to be tried again, and its pod has been told.
    tried: bool,
}

/// A file as it is told apart before it is open: file systems use these numbers again, and it is put off for a while only.
type Key = ((u32, u32), u64);

fn key(mapped: &Mapped) -> Key {
    (mapped.device, mapped.inode)
}

/// What the thread knows.
struct Looker {
    watched: Watched,
    helper: Option<Helper>,
    looks: HashMap<u32, Look>,
    pods: BTreeMap<Arc<str>, Pod>,
    files: BTreeMap<Identity, Arc<Found>>,
    refused: BTreeMap<Identity, Refused>,
    strangers: BTreeMap<Identity, Arc<str>>,
    slow: HashMap<Key, Slow>,
    /// Of processes whose mappings did not come.
    stuck: Vec<(Arc<str>, Stuck)>,
    spent: Spent,
    /// When the helper was last asked, or answered.
    asked: Instant,
    /// When it was last logged that a helper ended.
    complained: Option<Instant>,
    skipped: Skipped,
}

/// Why there is no answer.
enum Failed {
    /// It did not come in time, or the helper ended of it. What is left of the helper.
    Late(Option<Stuck>),
    /// None can be asked.
    NoHelper(String),
}

impl Looker {
    fn new(watched: Watched) -> Self {
        Self {
            watched,
            helper: None,
            looks: HashMap::new(),
            pods: BTreeMap::new(),
            files: BTreeMap::new(),
            refused: BTreeMap::new(),
            strangers: BTreeMap::new(),
            slow: HashMap::new(),
            stuck: Vec::new(),
            spent: Spent::new(Instant::now()),
            asked: Instant::now(),
            complained: None,
            skipped: Skipped::default(),
        }
    }

    /// Looks at what is due, and lets go of what nobody has any more.
    fn turn(&mut self, there: &BTreeSet<u32>, publish: &mut dyn FnMut(Snapshot)) {
        self.looks.retain(|process, _| there.contains(process));
        self.forget();
        self.try_again();
        let mut due: BTreeMap<Arc<str>, Vec<u32>> = BTreeMap::new();
        for process in there {
            if self.is_due(*process) {
                let pod = &self.looks[process].pod;
                due.entry(Arc::clone(pod)).or_default().push(*process);
            }
        }
        let mut published = Instant::now();
        while let Some(process) = self.take_next(&mut due) {
            self.look(process);
            if published.elapsed() >= LOOK_EVERY {
                publish(self.snapshot());
                published = Instant::now();
            }
        }
        publish(self.snapshot());
    }

    /// Says if a process is to be looked at now.
    fn is_due(&mut self, process: u32) -> bool {
        let now = Instant::now();
        let Some(look) = self.looks.get_mut(&process) else {
            return self.is_new(process, now);
        };
        if now < look.next {
            return false;
        }
        look.next = now + look.every;
        look.every = RARELY.min(look.every * 2);
        let pod = Arc::clone(&look.pod);
        let spent = self.pods.get_mut(&pod).map(|pod| &mut pod.spent);
        if !spent.is_some_and(|spent| spent.is_left(SPEND_ON_POD, now)) {
            return false;
        }
        // A thread of the kernel has none.
        let code = code(process);
        let due = code.is_some_and(|code| {
            let changed = std::mem::replace(&mut look.code, code) != code;
            changed || now >= look.due
        });
        // A pod may have more processes than it costs nothing to ask about.
        self.charge(&pod, now.elapsed());
        due
    }

    /// The same of one that has not been seen before.
    fn is_new(&mut self, process: u32, now: Instant) -> bool {
        let (pod, code) = (pod(process), code(process));
        self.pods.entry(Arc::clone(&pod)).or_insert_with(Pod::new);
        self.charge(&pod, now.elapsed());
        let look = Look {
            pod,
            code: code.unwrap_or_default(),
            next: now + LOOK_EVERY,
            every: LOOK_EVERY,
            due: now + AT_LEAST,
            files: Vec::new(),
            trouble: None,
            beyond: false,
            at: 0,
        };
        self.looks.insert(process, look);
        code.is_some()
    }

    /// The next process to look at: one of the pod that has had least, as long as there is time for it.
    fn take_next(&mut self, due: &mut BTreeMap<Arc<str>, Vec<u32>>) -> Option<u32> {
        let now = Instant::now();
        let all = self.spent.is_left(SPEND, now);
        let mut least: Option<(Duration, Arc<str>)> = None;
        for name in due.keys() {
            let Some(pod) = self.pods.get_mut(name) else {
                continue;
            };
            pod.waits = !all || !pod.spent.is_left(SPEND_ON_POD, now);
            let spent = pod.spent.spent;
            if !pod.waits && least.as_ref().is_none_or(|(other, _)| spent < *other) {
                least = Some((spent, Arc::clone(name)));
            }
        }
        if let Some((_, name)) = least {
            let processes = due.get_mut(&name)?;
            let process = processes.pop();
            if processes.is_empty() {
                due.remove(&name);
            }
            return process;
        }
        // What is left has its turn later.
        for process in std::mem::take(due).into_values().flatten() {
            self.skipped[Skip::Share as usize] += 1;
            if let Some(look) = self.looks.get_mut(&process) {
                look.next = now;
                look.due = now;
            }
        }
        None
    }

    /// Charges a pod for what it took.
    fn charge(&mut self, pod: &Arc<str>, took: Duration) {
        self.spent.add(took, SPEND);
        if let Some(pod) = self.pods.get_mut(pod) {
            pod.spent.add(took, SPEND_ON_POD);
        }
    }

    /// Looks at a process.
    fn look(&mut self, process: u32) {
        // It may have been moved since it was met, or be another of the same number.
        let pod = pod(process);
        self.pods.entry(Arc::clone(&pod)).or_insert_with(Pod::new);
        match self.looks.get_mut(&process) {
            Some(look) => look.pod = Arc::clone(&pod),
            None => return,
        }
        let interest = self.watched.interest;
        let asked = self.ask(&Ask::Maps { process, interest }, &pod);
        let maps = match asked.and_then(|()| self.answer(&pod)) {
            Ok((Answer::Maps(Ok(Some(maps))), _)) => maps,
            Ok((Answer::Maps(Err(refusal)), _)) => {
                return self.is_unseen(process, refusal.why, AGAIN);
            }
            Ok(_) => return self.looked(process, Vec::new(), None, AT_LEAST),
            Err(Failed::NoHelper(why)) => return self.is_unseen(process, why, AGAIN),
            Err(failed) => {
                self.skipped[Skip::Deadline as usize] += 1;
                self.keep_stuck(failed, &pod);
                let why = format!(
                    "what process {process} has mapped does not come: {}",
                    late()
                );
                return self.is_unseen(process, why, AGAIN_AT_MOST);
            }
        };
        self.skipped[Skip::Mappings as usize] += u64::from(maps.cut);
        if let Some(look) = self.looks.get_mut(&process) {
            look.beyond = maps.cut;
        }
        let mut met = Met::default();
        self.identify(process, &pod, maps.files, &mut met);
        let Some(look) = self.looks.get_mut(&process) else {
            return;
        };
        // What was not looked at now may be there as before.
        if met.cut || met.late {
            met.files.extend(look.files.iter().copied());
        }
        look.at = if met.cut { look.at + met.done } else { 0 };
        let next = if met.cut { Duration::ZERO } else { AT_LEAST };
        self.looked(process, met.files.into_iter().collect(), None, next);
    }

    /// A process could not be looked at: what was known of it stands.
    fn is_unseen(&mut self, process: u32, why: String, next: Duration) {
        if let Some(look) = self.looks.get_mut(&process) {
            let files = std::mem::take(&mut look.files);
            self.looked(process, files, Some(why), next);
        }
    }

    fn looked(
        &mut self,
        process: u32,
        files: Vec<Identity>,
        trouble: Option<String>,
        next: Duration,
    ) {
        if let Some(look) = self.looks.get_mut(&process) {
            look.files = files;
            look.trouble = trouble;
            look.due = Instant::now() + next;
            if next < AT_LEAST {
                look.next = look.due;
            }
        }
    }

    /// Meets these files, as far as the time goes.
    fn identify(&mut self, process: u32, pod: &Arc<str>, mut files: Vec<Mapped>, met: &mut Met) {
        let now = Instant::now();
        files.retain(|mapped| {
            let slow = self.slow.get(&key(mapped));
            let waits = slow.is_some_and(|slow| now < slow.again || slow.stuck.is_some());
            met.late |= waits;
            !waits
        });
        // Where it was cut the last time it goes on; what is called as it should comes first.
        if !files.is_empty() {
            let at = self.looks.get(&process).map_or(0, |look| look.at);
            let length = files.len();
            files.rotate_left(at % length);
            let interest = self.watched.interest;
            files.sort_by_key(|mapped| !interest.names(mapped.name()));
        }
        while !files.is_empty() {
            if !self.has_time(pod) {
                met.cut = true;
                return;
            }
            let ask = Ask::Identify {
                process,
                files: files.clone(),
            };
            if let Err(failed) = self.ask(&ask, pod) {
                self.keep_stuck(failed, pod);
                met.cut = true;
                return;
            }
            let mut identities = Vec::new();
            while let Some(mapped) = files.get(identities.len()) {
                match self.answer(pod) {
                    Ok((Answer::Identity(identity), _)) => identities.push(identity),
                    answer => {
                        let failed = match answer {
                            Err(failed) => failed,
                            Ok(_) => self.give_up(&Silence::Ended("it is out of step".to_owned())),
                        };
                        self.is_slow(process, &mapped.clone(), pod, failed);
                        met.late = true;
                        break;
                    }
                }
                // What is still to be said would be taken for the answer to another question.
                if identities.len() < files.len() && !self.has_time(pod) {
                    let failed = self.give_up(&Silence::Late);
                    self.keep_stuck(failed, pod);
                    met.cut = true;
                    break;
                }
            }
            // The one that did not come is passed over.
            let come = identities.len() + usize::from(!met.cut);
            let rest = files.split_off(come.min(files.len()));
            for (mapped, identity) in files.iter().zip(identities) {
                met.done += 1;
                self.meet(process, pod, mapped, identity, met);
            }
            if met.cut {
                return;
            }
            files = rest;
        }
    }

    fn keep_stuck(&mut self, failed: Failed, pod: &Arc<str>) {
        if let Failed::Late(Some(stuck)) = failed {
            self.stuck.push((Arc::clone(pod), stuck));
        }
    }

    /// Meets a file of a process.
    fn meet(
        &mut self,
        process: u32,
        pod: &Arc<str>,
        mapped: &Mapped,
        identity: Result<Option<Identity>, Refusal>,
        met: &mut Met,
    ) {
        let named = self.watched.interest.names(mapped.name());
        let identity = match identity {
            Ok(Some(identity)) => identity,
            Ok(None) => return,
            // Beside the driver some are not meant to be read.
            Err(_) if !named => return,
            Err(refusal) => {
                self.put_off(process, mapped, pod, refusal, None);
                met.late = true;
                return;
            }
        };
        self.slow.remove(&key(mapped));
        if self.strangers.contains_key(&identity) {
            return;
        }
        let now = Instant::now();
        let is_refused = self.refused.get(&identity).is_some_and(|refused| {
            // What one pod has no place for, another may have.
            let waits = refused.again.is_none_or(|again| now < again);
            waits && (refused.skip != Skip::Files || refused.pod == *pod)
        });
        if self.files.contains_key(&identity) {
            met.files.insert(identity);
            return;
        }
        if is_refused {
            if !met.add_refused(identity) {
                self.skipped[Skip::Files as usize] += 1;
                self.is_beyond(process);
            }
            return;
        }
        if met.refused >= REFUSED_OF_PROCESS || !self.may_remember(pod) {
            self.skipped[Skip::Files as usize] += 1;
            self.is_beyond(process);
            return;
        }
        if !self.has_time(pod) {
            met.cut = true;
            return;
        }
        let refusal = match self.examine(process, pod, mapped, identity) {
            Ok(Some(library)) if (self.watched.is_of_use)(&library.library) => {
                match self.admit(identity, library, pod) {
                    Ok(()) => {
                        met.files.insert(identity);
                        return;
                    }
                    Err(refusal) => refusal,
                }
            }
            Ok(Some(_)) => return self.is_stranger(identity, pod),
            Ok(None) => {
                met.late = true;
                return;
            }
            Err(refusal) if !named && !refusal.skip.passes() => {
                return self.is_stranger(identity, pod);
            }
            Err(refusal) => refusal,
        };
        met.add_refused(identity);
        self.refuse(identity, pod, &mapped.path, refusal);
    }

    /// Whether more files of a pod are remembered.
    fn may_remember(&self, pod: &Arc<str>) -> bool {
        self.refused.len() < REFUSED
            && self
                .pods
                .get(pod)
                .is_some_and(|pod| pod.refused < REFUSED_OF_POD)
    }

    /// Remembers a file that is of no use.
    fn is_stranger(&mut self, identity: Identity, pod: &Arc<str>) {
        // Where a pod has had so many they are forgotten, and those that are still there met anew, on its account.
        if let Some(of_pod) = self.pods.get_mut(pod)
            && of_pod.strangers >= STRANGERS_OF_POD
        {
            of_pod.strangers = 0;
            self.strangers.retain(|_, other| other != pod);
        }
        if self.strangers.insert(identity, Arc::clone(pod)).is_none()
            && let Some(pod) = self.pods.get_mut(pod)
        {
            pod.strangers += 1;
        }
    }

    /// Takes a library among those that are probed, if there is room.
    fn admit(&mut self, identity: Identity, found: Found, pod: &Arc<str>) -> Result<(), Refusal> {
        let of_pod = self.files.values().filter(|found| found.pod == *pod);
        let why = if of_pod.count() == FILES_OF_POD {
            format!("one more than the {FILES_OF_POD} files of one pod that are probed at once")
        } else if self.files.len() == FILES {
            format!("one more than the {FILES} files that are probed at once")
        } else {
            self.refused.remove(&identity);
            for lack in &found.library.lacks {
                self.skipped[lack.skip as usize] += 1;
            }
            self.files.insert(identity, Arc::new(found));
            return Ok(());
        };
        Err(Refusal::new(Skip::Files, why))
    }

    fn refuse(&mut self, identity: Identity, pod: &Arc<str>, path: &str, refusal: Refusal) {
        self.skipped[refusal.skip as usize] += 1;
        let every = self
            .refused
            .get(&identity)
            .map_or(AGAIN, |refused| refused.every);
        // What is held of it is bounded, whatever its path is.
        let refused = Refused {
            path: shown(path, true),
            why: refusal.why,
            skip: refusal.skip,
            pod: Arc::clone(pod),
            again: refusal.skip.passes().then(|| Instant::now() + every),
            every: AGAIN_AT_MOST.min(every * 2),
        };
        if self.refused.insert(identity, refused).is_none()
            && let Some(pod) = self.pods.get_mut(pod)
        {
            pod.refused += 1;
        }
    }

    /// Looks into a file. `None` where it is another meanwhile, or mapped no longer.
    fn examine(
        &mut self,
        process: u32,
        pod: &Arc<str>,
        mapped: &Mapped,
        identity: Identity,
    ) -> Result<Option<Found>, Refusal> {
        let ask = Ask::Examine {
            process,
            file: mapped.clone(),
            wanted: self.watched.wanted.clone(),
        };
        let asked = self.ask(&ask, pod);
        match asked.and_then(|()| self.answer(pod)) {
            Ok((Answer::Library(Ok(Some((same, library)))), Some(file))) => Ok((same == identity)
                .then(|| Found {
                    path: mapped.path.clone(),
                    file,
                    library,
                    pod: Arc::clone(pod),
                })),
            Ok((Answer::Library(Err(refusal)), _)) => Err(refusal),
            Ok(_) => Ok(None),
            Err(failed) => {
                self.is_slow(process, mapped, pod, failed);
                Ok(None)
            }
        }
    }

    /// Asks the helper, which is started where there is none.
    fn ask(&mut self, ask: &Ask, pod: &Arc<str>) -> Result<(), Failed> {
        let (all, of_pod) = self.count_stuck(pod);
        if of_pod >= STUCK_OF_POD || (of_pod > 0 && all >= STUCK) || all >= 4 * STUCK {
            let why = format!(
                "no file of its pod is looked at: {of_pod} that do not answer are still waited for ({all} on this node)"
            );
            return Err(Failed::NoHelper(why));
        }
        self.asked = Instant::now();
        let helper = match self.helper.take() {
            Some(helper) => helper,
            None => Helper::start().map_err(|error| Failed::NoHelper(format!("{error:#}")))?,
        };
        let helper = self.helper.insert(helper);
        helper.ask(ask).map_err(|silence| self.give_up(&silence))
    }

    fn answer(&mut self, pod: &Arc<str>) -> Result<(Answer, Option<File>), Failed> {
        let helper = self.helper.as_mut().expect("it was asked");
        let answer = helper.answer();
        let took = self.asked.elapsed();
        self.asked = Instant::now();
        self.charge(pod, took);
        answer.map_err(|silence| self.give_up(&silence))
    }

    fn give_up(&mut self, silence: &Silence) -> Failed {
        if let Silence::Ended(why) = silence
            && self
                .complained
                .is_none_or(|at| at.elapsed() >= AGAIN_AT_MOST)
        {
            self.complained = Some(Instant::now());
            tracing::warn!("looking into files: {why}");
        }
        Failed::Late(self.helper.take().and_then(Helper::give_up))
    }

    fn count_stuck(&self, pod: &Arc<str>) -> (usize, usize) {
        let slow = self.slow.values().filter(|slow| slow.stuck.is_some());
        let pods = slow
            .map(|slow| &slow.pod)
            .chain(self.stuck.iter().map(|(pod, _)| pod));
        pods.fold((0, 0), |(all, of_pod), other| {
            (all + 1, of_pod + usize::from(other == pod))
        })
    }

    /// A file did not come.
    fn is_slow(&mut self, process: u32, mapped: &Mapped, pod: &Arc<str>, failed: Failed) {
        if let Failed::Late(stuck) = failed {
            let why = format!("it is not looked at: {}", late());
            let refusal = Refusal::new(Skip::Deadline, why);
            self.put_off(process, mapped, pod, refusal, stuck);
        }
    }

    /// Does not look at a file again for a while.
    fn put_off(
        &mut self,
        process: u32,
        mapped: &Mapped,
        pod: &Arc<str>,
        refusal: Refusal,
        stuck: Option<Stuck>,
    ) {
        self.skipped[refusal.skip as usize] += 1;
        let key = key(mapped);
        let of_pod = self.slow.values().filter(|slow| slow.pod == *pod).count();
        let full = of_pod >= SLOW_OF_POD || self.slow.len() >= SLOW;
        if full && !self.slow.contains_key(&key) {
            self.skipped[Skip::Files as usize] += 1;
            self.stuck
                .extend(stuck.map(|stuck| (Arc::clone(pod), stuck)));
            self.is_beyond(process);
            return;
        }
        let slow = self.slow.entry(key).or_insert_with(|| Slow {
            path: shown(&mapped.path, true),
            why: String::new(),
            pod: Arc::clone(pod),
            again: Instant::now(),
            every: AGAIN,
            stuck: None,
            tried: false,
        });
        slow.why = refusal.why;
        slow.stuck = stuck;
        slow.put_off();
    }

    /// A process has more than is read or remembered.
    fn is_beyond(&mut self, process: u32) {
        if let Some(look) = self.looks.get_mut(&process) {
            look.beyond = true;
        }
    }

    fn has_time(&mut self, pod: &Arc<str>) -> bool {
        let now = Instant::now();
        let of_pod = self.pods.get_mut(pod);
        let left = of_pod.is_some_and(|pod| pod.spent.is_left(SPEND_ON_POD, now));
        left && self.spent.is_left(SPEND, now)
    }

    /// Lets go of what nobody has any more.
    fn forget(&mut self) {
        let looks = || self.looks.values();
        let used: BTreeSet<Identity> = looks().flat_map(|look| &look.files).copied().collect();
        let before = self.files.len();
        self.files.retain(|identity, _| used.contains(identity));
        if self.files.len() < before {
            let now = Instant::now();
            let waiting = self.refused.values_mut();
            let waiting = waiting.filter(|refused| refused.skip == Skip::Files);
            for refused in waiting.take(before - self.files.len()) {
                refused.again = Some(now);
            }
        }
        self.refused.retain(|identity, _| used.contains(identity));
        let pods: BTreeSet<&Arc<str>> = looks().map(|look| &look.pod).collect();
        self.pods.retain(|pod, _| pods.contains(pod));
        self.strangers.retain(|_, pod| self.pods.contains_key(pod));
        for pod in self.pods.values_mut() {
            (pod.refused, pod.strangers) = (0, 0);
        }
        for refused in self.refused.values() {
            if let Some(pod) = self.pods.get_mut(&refused.pod) {
                pod.refused += 1;
            }
        }
        for pod in self.strangers.values() {
            if let Some(pod) = self.pods.get_mut(pod) {
                pod.strangers += 1;
            }
        }
        if self.strangers.len() > STRANGERS {
            let most = self.pods.iter().max_by_key(|(_, pod)| pod.strangers);
            if let Some(most) = most.map(|(pod, _)| Arc::clone(pod)) {
                self.strangers.retain(|_, pod| *pod != most);
            }
        }
        for slow in self.slow.values_mut() {
            slow.stuck.take_if(Stuck::has_ended);
        }
        let pods = &self.pods;
        self.slow
            .retain(|_, slow| pods.contains_key(&slow.pod) || slow.stuck.is_some());
        self.stuck.retain_mut(|(_, stuck)| !stuck.has_ended());
    }

    /// Has the processes looked at again whose files are due to be tried again.
    fn try_again(&mut self) {
        let now = Instant::now();
        let due: BTreeSet<Identity> = self
            .refused
            .iter()
            .filter(|(_, refused)| refused.again.is_some_and(|again| now >= again))
            .map(|(identity, _)| *identity)
            .collect();
        // A slow file belongs to no process; those of its pod are looked at again.
        let mut pods: BTreeSet<Arc<str>> = BTreeSet::new();
        self.slow.retain(|_, slow| {
            if slow.stuck.is_some() || now < slow.again {
                return true;
            }
            // Where it has not been met again, nobody has it any more.
            let first = !std::mem::replace(&mut slow.tried, true);
            if first {
                pods.insert(Arc::clone(&slow.pod));
            }
            first || now < slow.again + AGAIN_AT_MOST
        });
        for look in self.looks.values_mut() {
            if pods.contains(&look.pod) || look.files.iter().any(|file| due.contains(file)) {
                look.due = look.due.min(now);
                look.next = look.next.min(now);
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let of_use = |identity: &&Identity| self.files.contains_key(identity);
        let mut processes = BTreeMap::new();
        let mut pods: BTreeMap<Identity, BTreeSet<Arc<str>>> = BTreeMap::new();
        for (process, look) in &self.looks {
            let files: Vec<_> = look.files.iter().filter(of_use).copied().collect();
            for file in &files {
                pods.entry(*file).or_default().insert(Arc::clone(&look.pod));
            }
            if !files.is_empty() {
                processes.insert(*process, files);
            }
        }
        Snapshot {
            files: self.files.clone(),
            processes,
            pods,
            notes: self.notes(),
            skipped: self.skipped,
        }
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        let refused = self.refused.values();
        let refused = refused.map(|refused| (&*refused.path, &*refused.why));
        let slow = self.slow.values().map(|slow| (&*slow.path, &*slow.why));
        let mut about = Note::of_files(refused.chain(slow));
        let looks = self.looks.iter();
        let beyond = looks
            .filter(|(_, look)| look.beyond)
            .map(|(process, _)| process);
        if let Some(first) = beyond.clone().min() {
            notes.push(Note::plain(format!(
                "process {first}{} has more mappings or files than are read or remembered, of which some may be missed",
                others(beyond.count() - 1)
            )));
        }
        let waiting = self.pods.values().filter(|pod| pod.waits).count();
        if waiting > 0 {
            about.push(Note::plain(format!(
                "processes of {waiting} pods or units are looked at later: what they have mapped takes more than its share of the time"
            )));
        }
        let mut unseen: Vec<_> = self
            .looks
            .iter()
            .filter_map(|(process, look)| Some((process, look.trouble.as_ref()?)))
            .collect();
        unseen.sort();
        if let Some((_, why)) = unseen.first() {
            notes.push(Note::plain(format!("{why}{}", others(unseen.len() - 1))));
        }
        let more = about.len().saturating_sub(NOTES);
        about.truncate(NOTES);
        notes.extend(about);
        if more > 0 {
            notes.push(Note::plain(format!("and {more} reasons more")));
        }
        notes
    }
}

impl Slow {
    fn put_off(&mut self) {
        self.again = Instant::now() + self.every;
        self.every = AGAIN_AT_MOST.min(self.every * 2);
        self.tried = false;
    }
}

fn others(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} processes more)"),
    }
}

fn late() -> String {
    format!(
        "no answer in {} s; tried again later",
        super::elf::PATIENCE.as_secs()
    )
}

/// Kilobytes of code that a process has mapped: its own and that of libraries. `None` of a thread of the kernel, or where the process
/// is gone. Reading it takes no lock that the process holds (`task_mem`, fs/proc/task_mmu.c).
fn code(process: u32) -> Option<u64> {
    // A thread's name may be anything.
    let text = fs::read(format!("/proc/{process}/status")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let value = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(value("VmExe:")? + value("VmLib:")?)
}

/// The pod that a process belongs to, or else its unit.
fn pod(process: u32) -> Arc<str> {
    let text = fs::read(format!("/proc/{process}/cgroup")).unwrap_or_default();
    cgroups::charged(&String::from_utf8_lossy(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_comes_back_and_what_is_owed_has_a_bound() {
        let begin = Instant::now();
        let budget = Budget::new(1000, 100);
        let mut spent = Spent::new(begin);
        spent.add(Duration::from_millis(900), budget);
        assert!(spent.is_left(budget, begin));
        spent.add(Duration::from_secs(3600), budget);
        assert_eq!(spent.spent, Duration::from_secs(7));
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!(!spent.is_left(budget, after(59)));
        assert!(spent.is_left(budget, after(61)));
        assert_eq!(spent.now(budget, after(600)), Duration::ZERO);
        // A clock that was read earlier gives nothing back.
        spent.add(Duration::from_millis(1), budget);
        assert_eq!(spent.now(budget, after(500)), Duration::from_millis(1));
    }

    #[test]
    fn files_of_one_reason_are_told_in_one_line() {
        let files = ["/a/1", "/a/2", "/b/3", "/b/4", "/b/5", "/b/6"];
        let files = files.into_iter().map(|path| (path, "no ELF file"));
        let notes = Note::of_files(files.chain([("/c/libnccl.so.2", "late")]));
        let told =
            |with_paths| -> Vec<_> { notes.iter().map(|note| note.told(with_paths)).collect() };
        assert_eq!(
            told(true),
            [
                "/c/libnccl.so.2: late",
                "/a/1, /a/2, /b/3, /b/4 and 2 files more: no ELF file"
            ]
        );
        assert_eq!(told(false)[0], "libnccl.so.2: late");
    }

    #[test]
    fn a_name_cannot_break_a_line_or_fill_a_page() {
        assert_eq!(shown("/a/lib\nnccl.so", false), "lib\u{fffd}nccl.so");
        let long = format!("/{}", "x".repeat(5000));
        assert_eq!(shown(&long, true).chars().count(), 513);
        assert_eq!(shown(&long, false).chars().count(), 65);
        assert_eq!(shown("", true), "");
    }

    /// As they were counted or named, whatever a pod has of others.
    #[test]
    fn a_process_has_few_refused_files_and_each_once() {
        let identity = |inode| Identity {
            inode,
            size: 1,
            changed: (1, 1),
            device: 0,
        };
        let mut met = Met::default();
        for inode in 0..REFUSED_OF_PROCESS as u64 {
            assert!(met.add_refused(identity(inode)));
            assert!(met.add_refused(identity(inode)), "once more is no more");
        }
        assert!(!met.add_refused(identity(9999)));
        assert_eq!(met.files.len(), REFUSED_OF_PROCESS);
    }
}
