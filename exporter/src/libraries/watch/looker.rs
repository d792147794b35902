// SPDX-License-Identifier: Apache-2.0
//! Which process is looked at next, and what has it mapped?

mod asking;
mod files;
mod telling;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use self::asking::{Failed, late};
use super::{
    Found, LOOK_EVERY, Snapshot, Watched,
    budget::{Budget, Spent},
};
use crate::{
    libraries::{
        Identity, Skip, Skipped,
        helper::{Answer, Ask, Helper, Silence, Stuck},
        maps::Mapped,
    },
    pods::cgroups,
};

/// How long it is not asked again whether a process has new code: longer each time, since a library that comes comes soon.
const RARELY: Duration = Duration::from_secs(16);

/// How long one that seems to have none is not looked at again.
const AT_LEAST: Duration = Duration::from_secs(120);

/// How long what failed is not tried again: at first, and at most.
const AGAIN: Duration = Duration::from_secs(10);

const AGAIN_AT_MOST: Duration = Duration::from_secs(600);

/// Refused files of a process that are remembered.
const REFUSED_OF_PROCESS: usize = 64;

/// What may be spent on a pod, and on all: at once, and in each second.
const SPEND_ON_POD: Budget = Budget::new(10_000, 50);

const SPEND: Budget = Budget::new(30_000, 250);

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
    /// Of one without room: when a place was last kept for it.
    offered: Option<Instant>,
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
pub(super) struct Looker {
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

impl Looker {
    pub(super) fn new(watched: Watched) -> Self {
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
    pub(super) fn turn(&mut self, there: &BTreeSet<u32>, publish: &mut dyn FnMut(Snapshot)) {
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
