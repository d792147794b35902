// SPDX-License-Identifier: Apache-2.0
//! Which files are of use, which are not looked at again, and until when?

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use super::{
    AGAIN, AGAIN_AT_MOST, Looker, Met, REFUSED_OF_PROCESS, Refused, Slow,
    asking::{Failed, late},
    key,
};
use crate::libraries::{
    Identity, Refusal, Skip,
    helper::{Answer, Ask, Stuck},
    maps::Mapped,
    watch::{Found, shown},
};

/// Files that are probed at once: of the node, which have one or some containers their own, and of one pod.
const FILES: usize = 16;

const FILES_OF_POD: usize = FILES / 2;

/// Files that are remembered: refused ones of a pod and the node, and those that are of no use, of which PyTorch has some four hundred.
const REFUSED_OF_POD: usize = 1024;
const REFUSED: usize = 8192;
const STRANGERS_OF_POD: usize = 4096;
const STRANGERS: usize = 65_536;
/// Places in memory whose files did not come, of a pod and the node.
const SLOW_OF_POD: usize = 64;
const SLOW: usize = 1024;

impl Looker {
    /// Meets a file of a process.
    pub(super) fn meet(
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
            offered: None,
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

    /// A file did not come.
    pub(super) fn is_slow(
        &mut self,
        process: u32,
        mapped: &Mapped,
        pod: &Arc<str>,
        failed: Failed,
    ) {
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

    /// Lets go of what nobody has any more.
    pub(super) fn forget(&mut self) {
        let looks = || self.looks.values();
        let used: BTreeSet<Identity> = looks().flat_map(|look| &look.files).copied().collect();
        self.files.retain(|identity, _| used.contains(identity));
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

    /// Has as many files tried again at once as there is room for, of those that there was none for: of pods with the fewest first. A place
    /// is kept for one for a while only, since its pod may have no time left to look at it.
    fn use_room(&mut self) {
        let now = Instant::now();
        let mut of_pods: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        for found in self.files.values() {
            *of_pods.entry(Arc::clone(&found.pod)).or_default() += 1;
        }
        let mut left = FILES - self.files.len();
        let waiting = self.refused.values_mut();
        let mut waiting: Vec<_> = waiting
            .filter(|refused| refused.skip == Skip::Files)
            .collect();
        let is_kept = |at: Instant| now.saturating_duration_since(at) < AGAIN;
        for refused in &waiting {
            if refused.offered.is_some_and(is_kept) {
                *of_pods.entry(Arc::clone(&refused.pod)).or_default() += 1;
                left = left.saturating_sub(1);
            }
        }
        waiting.retain(|refused| refused.offered.is_none());
        waiting.sort_by_key(|refused| of_pods.get(&refused.pod).copied().unwrap_or_default());
        for refused in waiting {
            let of_pod = of_pods.entry(Arc::clone(&refused.pod)).or_default();
            if left > 0 && *of_pod < FILES_OF_POD {
                (refused.again, refused.offered) = (Some(now), Some(now));
                *of_pod += 1;
                left -= 1;
            }
        }
    }

    /// Has the processes looked at again whose files are due to be tried again.
    pub(super) fn try_again(&mut self) {
        self.use_room();
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
}

impl Slow {
    fn put_off(&mut self) {
        self.again = Instant::now() + self.every;
        self.every = AGAIN_AT_MOST.min(self.every * 2);
        self.tried = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libraries::{
        elf::{Library, Wanted},
        maps::Interest,
        watch::{
            Watched,
            looker::{Look, Pod},
        },
    };

    fn identity(inode: u64) -> Identity {
        Identity {
            inode,
            size: 1,
            changed: (1, 1),
            device: 0,
        }
    }

    /// A looker that knows processes, each of a pod and with a file of its own, by their numbers.
    struct Node(Looker);

    impl Node {
        fn new() -> Self {
            Self(Looker::new(Watched {
                interest: Interest::Nccl,
                wanted: Wanted::default(),
                is_of_use: |_| true,
            }))
        }

        /// A process that is known, and nothing of its file.
        fn look(&mut self, number: u64, pod: &str) -> Arc<str> {
            let (pod, now): (Arc<str>, _) = (pod.into(), Instant::now());
            let look = Look {
                pod: Arc::clone(&pod),
                code: 0,
                next: now + AGAIN,
                every: AGAIN,
                due: now + AGAIN,
                files: vec![identity(number)],
                trouble: None,
                beyond: false,
                at: 0,
            };
            self.0.looks.insert(number as u32, look);
            self.0.pods.insert(Arc::clone(&pod), Pod::new());
            pod
        }

        /// One whose file is probed, or has no room.
        fn process(&mut self, number: u64, pod: &str) {
            let pod = self.look(number, pod);
            let found = Found {
                path: number.to_string(),
                file: tempfile::tempfile().expect("a file"),
                library: Library::default(),
                pod: Arc::clone(&pod),
            };
            if let Err(refusal) = self.0.admit(identity(number), found, &pod) {
                self.0.refuse(identity(number), &pod, "library", refusal);
            }
        }

        /// One ends. Returns those whose file is tried again now.
        fn end(&mut self, number: u64) -> Vec<u32> {
            self.0.looks.remove(&(number as u32));
            self.0.forget();
            self.0.try_again();
            let now = Instant::now();
            let due = self.0.looks.iter().filter(|(_, look)| look.due <= now);
            let mut due: Vec<_> = due.map(|(number, _)| *number).collect();
            due.sort_unstable();
            due
        }
    }

    #[test]
    fn what_had_no_room_is_tried_again_where_there_is_some_now() {
        let mut node = Node::new();
        for number in 0..FILES_OF_POD as u64 {
            node.process(10 + number, "one");
            node.process(30 + number, "two");
        }
        // Neither has the first, for its pod, and the second, for the node, a place.
        node.process(20, "one");
        node.process(50, "three");
        node.process(51, "three");
        assert_eq!(node.0.files.len(), FILES);
        assert!(node.end(9999).is_empty(), "nobody has it");
        assert_eq!(node.end(30), [50], "the pod of 20 has all it may have");
        // Nobody has looked at 50 yet: a place is kept for it. The next is for the pod with fewer.
        assert_eq!(node.end(10), [50, 51]);
        assert_eq!(node.end(11), [20, 50, 51]);
        node.process(20, "one");
        assert!(node.0.files.contains_key(&identity(20)), "it is probed now");
        // One that is not looked at does not keep its place for ever: 60 has it then.
        let four = node.look(60, "four");
        let full = Refusal::new(Skip::Files, "no room");
        node.0.refuse(identity(60), &four, "library", full);
        assert_eq!(node.end(9999), [50, 51], "two places are kept");
        let kept = node.0.refused.get_mut(&identity(50)).expect("it waits");
        kept.offered = Instant::now().checked_sub(AGAIN * 2);
        assert_eq!(node.end(9999), [50, 51, 60]);
    }
}
