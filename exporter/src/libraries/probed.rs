// SPDX-License-Identifier: Apache-2.0
//! Which libraries are probed now, and what came of it?
//!
//! What `nccl` and the calls of CUDA have in common: an object that is loaded once there is something to probe, the files that processes have
//! mapped, probes in them, and what people are told.

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::AsRawFd,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
};

use super::{
    Identity,
    watch::{Found, Snapshot, Watch, shown},
};
use crate::{
    hook::{Hook, Method, Program, Reason},
    kernel::Kernel,
    probe::{self, Attached, Constants, FileLink},
};

/// A function of a file.
pub(crate) struct Place {
    /// Its names, as people know it.
    pub(crate) names: Vec<&'static str>,
    /// Where in the file it is probed, or why it is not.
    pub(crate) at: Result<u64, String>,
    /// The programs at its entry and at its return.
    pub(crate) entry: &'static str,
    pub(crate) exit: Option<&'static str>,
}

/// Where a library is probed.
pub(crate) trait Sites {
    /// All places, in the order in which their probes are detached.
    fn places(&self) -> Vec<Place>;
}

/// Whether something was attached, or why not.
type Outcome = Result<(), (Reason, String)>;

/// Of a file all places have room, or none.
fn has_no_room(outcome: &Outcome) -> bool {
    matches!(outcome, Err((Reason::NoRoom, _)))
}

/// A file that processes have mapped.
pub(crate) struct Probed<S> {
    pub(crate) found: Arc<Found>,
    pub(crate) sites: S,
    /// Its probes, that of an entry before that of the return.
    pub(crate) links: Vec<FileLink>,
    /// What came of each place when it was last probed.
    outcomes: Vec<(Place, Outcome)>,
}

/// The object, for who attaches.
enum Object {
    /// Not loaded yet.
    Waiting,
    /// With the kernel, without its types, for what to do about a refusal.
    Loaded(Box<Attached>, Kernel),
    /// What came of its hooks.
    Failed(Vec<Hook>),
}

/// What is probed, and how.
pub(crate) struct Libraries<S> {
    pub(crate) watch: Watch,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) files: BTreeMap<Identity, Probed<S>>,
    object: Object,
    /// What of the object's loading works with less.
    lacks: Vec<String>,
}

impl<S: Sites> Libraries<S> {
    /// Knows none yet.
    pub(crate) fn new(watch: Watch) -> Self {
        Self {
            watch,
            snapshot: Arc::default(),
            files: BTreeMap::new(),
            object: Object::Waiting,
            lacks: Vec::new(),
        }
    }

    /// Meets what is mapped now.
    pub(crate) fn meet(&mut self, sites: impl Fn(&Found) -> Option<S>) {
        self.snapshot = self.watch.snapshot();
        for (identity, found) in &self.snapshot.files {
            if !self.files.contains_key(identity)
                && let Some(sites) = sites(found)
            {
                let probed = Probed {
                    found: Arc::clone(found),
                    sites,
                    links: Vec::new(),
                    outcomes: Vec::new(),
                };
                self.files.insert(*identity, probed);
            }
        }
    }

    /// Lets go of what nobody has mapped any more, and of what does not stay.
    pub(crate) fn let_go(&mut self, stays: impl Fn(&Identity, &S) -> bool) {
        let mut gone = Vec::new();
        let there = &self.snapshot.files;
        self.files.retain(|identity, probed| {
            let stays = there.contains_key(identity) && stays(identity, &probed.sites);
            if !stays {
                gone.append(&mut probed.links);
            }
            stays
        });
        if !gone.is_empty() {
            // Where no thread can be started, they have been dropped with the closure.
            let _ = detach(gone);
        }
    }

    /// Whether the object is still to be loaded.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.object, Object::Waiting)
    }

    /// Whether it is loaded.
    pub(crate) fn is_loaded(&self) -> bool {
        matches!(self.object, Object::Loaded(..))
    }

    /// Loads the object. Returns what `build` makes of it.
    pub(crate) fn load<T>(
        &mut self,
        object: &[u8],
        programs: &[Program],
        resolve: impl FnOnce(&mut Constants<'_>),
        mut kernel: Kernel,
        build: impl FnOnce(&mut Attached) -> anyhow::Result<T>,
    ) -> Option<T> {
        let outcome = probe::attach(object, programs, kernel.types(), resolve, &kernel);
        kernel.forget_types();
        self.lacks = outcome.notes;
        let Some(mut attached) = outcome.attached else {
            self.object = Object::Failed(outcome.hooks);
            return None;
        };
        match build(&mut attached) {
            Ok(built) => {
                self.object = Object::Loaded(Box::new(attached), kernel);
                Some(built)
            }
            Err(error) => {
                self.lacks.push(format!("{error:#}"));
                self.object = Object::Failed(Vec::new());
                None
            }
        }
    }

    /// Takes all probes of files, to be detached.
    pub(crate) fn take_links(&mut self) -> Vec<FileLink> {
        let files = self.files.values_mut();
        files.flat_map(|file| mem::take(&mut file.links)).collect()
    }

    /// Probes every file that `wants` it, where there is room for all of its probes.
    pub(crate) fn probe(&mut self, wants: impl Fn(&Probed<S>) -> bool) {
        let Object::Loaded(attached, kernel) = &mut self.object else {
            return;
        };
        for (identity, probed) in &mut self.files {
            if wants(probed) {
                probed.attach(identity, &self.snapshot, attached, kernel);
            }
        }
    }

    /// Every hook. Of several files one may be attached in one and have no room in another: it is told twice.
    pub(crate) fn hooks(&self, with_paths: bool) -> Vec<Hook> {
        let mut hooks: BTreeMap<(&'static str, &'static str), Hook> = BTreeMap::new();
        for probed in self.files.values() {
            let path = shown(&probed.found.path, with_paths);
            for (place, outcome) in &probed.outcomes {
                for name in &place.names {
                    let (reason, detail) = match outcome {
                        Ok(()) => (Reason::Attached, String::new()),
                        Err((reason, why)) => (*reason, format!("{name} of {path}: {why}")),
                    };
                    hooks.entry((name, reason.label())).or_insert(Hook {
                        name,
                        method: Method::Uprobe,
                        reason,
                        detail,
                    });
                }
            }
        }
        let mut hooks: Vec<_> = hooks.into_values().collect();
        if let Object::Failed(failed) = &self.object {
            hooks.extend(failed.iter().cloned());
        }
        hooks
    }

    /// What works with less: the object, what the signal says itself, files without room, and files that are not looked at, of which
    /// `unseen` says what that means.
    pub(crate) fn notes(&self, own: Vec<String>, unseen: &str, with_paths: bool) -> Vec<String> {
        let mut notes = self.lacks.clone();
        notes.extend(own);
        for probed in self.files.values() {
            let mut outcomes = probed.outcomes.iter();
            if let Some((_, Err((_, why)))) = outcomes.find(|(_, outcome)| has_no_room(outcome)) {
                let path = shown(&probed.found.path, with_paths);
                notes.push(format!("{path} is not probed: {why}"));
            }
        }
        let of_files = self.snapshot.notes.iter();
        notes.extend(of_files.map(|note| format!("{unseen}: {}", note.told(with_paths))));
        notes
    }
}

impl<S: Sites> Probed<S> {
    /// Whether it has not been probed, or there was no room for that.
    pub(crate) fn is_new(&self) -> bool {
        let mut outcomes = self.outcomes.iter();
        self.outcomes.is_empty() || outcomes.any(|(_, outcome)| has_no_room(outcome))
    }

    /// Attaches all of its probes, that of a return before that of the entry: each entry that is seen is followed by a return that is.
    fn attach(
        &mut self,
        identity: &Identity,
        snapshot: &Snapshot,
        attached: &mut Attached,
        kernel: &Kernel,
    ) {
        let places = self.sites.places();
        let counts = places.iter().filter(|place| place.at.is_ok());
        let count = counts.map(|place| 1 + usize::from(place.exit.is_some()));
        let expensive = |why: &String| (Reason::Expensive, why.clone());
        let mut room = match snapshot.room(identity, count.sum()) {
            Ok(room) => room,
            Err(full) => {
                let refused = places.into_iter().map(|place| {
                    let why = place.at.as_ref().err();
                    let why = why.map_or_else(|| full.clone(), expensive);
                    (place, Err(why))
                });
                self.outcomes = refused.collect();
                return;
            }
        };
        let file = format!("/proc/self/fd/{}", self.found.file.as_raw_fd());
        let mut outcomes = Vec::new();
        for place in places {
            let outcome = match &place.at {
                Err(why) => Err(expensive(why)),
                Ok(at) => {
                    let mut attach = |program| {
                        let room = room.pop().expect("taken for all");
                        attached.attach_to_file(program, Path::new(&file), *at, room, kernel)
                    };
                    let exit = place.exit.map(&mut attach).transpose();
                    exit.and_then(|exit| {
                        let entry = attach(place.entry)?;
                        self.links.push(entry);
                        self.links.extend(exit);
                        Ok(())
                    })
                }
            };
            outcomes.push((place, outcome));
        }
        self.outcomes = outcomes;
    }
}

/// Detaches probes, in the order of the list, beside everything else: the kernel takes about a tenth of a second for each.
///
/// # Errors
/// When no thread can be started: then they have been detached here.
pub(crate) fn detach(links: Vec<FileLink>) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name("detach".to_owned());
    thread.spawn(move || links.into_iter().for_each(drop))
}
