// SPDX-License-Identifier: Apache-2.0
//! Which libraries have processes mapped that have to do with NCCL, and where are they probed?

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsRawFd,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::Context;
use exporter_common::nccl::{ANY_PROCESS, Layout};

use super::{
    OBJECT,
    live::{Core, Live, sweep},
    sites::{self, Kind as Library, Sites},
};
use crate::{
    hook::{Hook, Method, Program, Reason, Target},
    kernel::Kernel,
    libraries::{
        Identity,
        maps::Interest,
        watch::{Found, Snapshot, Watch, Watched, shown},
    },
    lock::lock,
    probe::{self, Attached, FileLink},
    signals::{
        State, Status, entries,
        follow::{BoundedLog, Follower},
        removed,
    },
};

fn programs() -> Vec<Program> {
    let program = |(name, is_return)| match is_return {
        true => Program::required(name, Target::Uretprobe),
        false => Program::required(name, Target::Uprobe),
    };
    sites::programs().map(program).collect()
}

/// A file that processes have mapped and that has to do with NCCL.
struct Probed {
    found: Arc<Found>,
    sites: Sites,
    links: Vec<FileLink>,
    /// What came of each site, once it has been probed.
    outcomes: Vec<Result<(), (Reason, String)>>,
}

/// The object, for who attaches.
struct Loaded {
    attached: Attached,
    /// For what to do about a refusal; without the types.
    kernel: Kernel,
}

/// What attaches to libraries as they come.
pub(super) struct Libraries {
    watch: Watch,
    snapshot: Arc<Snapshot>,
    show_paths: bool,
    loaded: Option<Loaded>,
    /// Whether loading the object has been tried.
    tried: bool,
    files: BTreeMap<Identity, Probed>,
    /// What all libraries have in common, as the kernel half has been told.
    any: Option<Layout>,
    /// What of the object's loading works with less.
    lacks: Vec<String>,
    failed: Vec<Hook>,
    trouble: Option<String>,
    log: BoundedLog,
    /// What has been logged last.
    logged: Status,
}

/// What is watched for.
pub(super) fn watched() -> Watched {
    Watched {
        interest: Interest::Nccl,
        wanted: sites::wanted(),
        is_of_use: |library| Sites::of(library).is_some(),
    }
}

impl Follower<Core> for Libraries {
    /// Attaches to what has come, lets go of what has gone, and tells what has become of it.
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        self.snapshot = self.watch.snapshot();
        self.take_over();
        let nccl = |probed: &Probed| probed.sites.kind != Library::Cuda;
        if !self.tried && self.files.values().any(nccl) {
            self.tried = true;
            self.load(core, kernel());
        }
        self.probe();
        let troubles = [self.tell_layouts(core), sweep(core)];
        let troubles = troubles.into_iter().filter_map(Result::err);
        let troubles: Vec<_> = troubles.map(|error| format!("{error:#}")).collect();
        self.trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        self.log();
        self.status(self.show_paths)
    }
}

impl Libraries {
    pub(super) fn new(watch: Watch, show_paths: bool) -> Self {
        Self {
            watch,
            snapshot: Arc::default(),
            show_paths,
            loaded: None,
            tried: false,
            files: BTreeMap::new(),
            any: None,
            lacks: Vec::new(),
            failed: Vec::new(),
            trouble: None,
            log: BoundedLog::new("nccl"),
            logged: Status::bare(State::Absent),
        }
    }

    /// Takes over what is mapped now. Launches of graphs say something only beside NCCL.
    fn take_over(&mut self) {
        let found = &self.snapshot.files;
        for (identity, found) in found {
            if !self.files.contains_key(identity)
                && let Some(sites) = Sites::of(&found.library)
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
        let kind = |identity: &Identity| self.files.get(identity).map(|probed| probed.sites.kind);
        let beside = self.snapshot.processes.values().filter(|files| {
            let mut files = files.iter();
            files.any(|file| kind(file) == Some(Library::Nccl))
        });
        let beside: BTreeSet<Identity> = beside.flatten().copied().collect();
        // Without its links the file is let go of beside everything else: the kernel takes a tenth of a second for each.
        let mut gone = Vec::new();
        self.files.retain(|identity, probed| {
            let alone = probed.sites.kind == Library::Cuda && !beside.contains(identity);
            let stays = found.contains_key(identity) && !alone;
            if !stays {
                gone.append(&mut probed.links);
            }
            stays
        });
        if !gone.is_empty() {
            let detach = move || gone.into_iter().for_each(drop);
            // Where no thread can be started, they have been dropped with the closure.
            let _ = thread::Builder::new()
                .name("nccl-detach".to_owned())
                .spawn(detach);
        }
    }

    fn load(&mut self, core: &Mutex<Core>, mut kernel: Kernel) {
        let outcome = probe::attach(OBJECT, &programs(), kernel.types(), |_| {}, &kernel);
        kernel.forget_types();
        self.lacks = outcome.notes;
        let Some(mut attached) = outcome.attached else {
            self.failed = outcome.hooks;
            return;
        };
        match Live::new(&mut attached) {
            Ok(live) => {
                lock(core).live = Some(live);
                self.loaded = Some(Loaded { attached, kernel });
            }
            Err(error) => self.lacks.push(format!("{error:#}")),
        }
    }

    /// Probes what is new, and what there was no room for.
    fn probe(&mut self) {
        let Some(loaded) = &mut self.loaded else {
            return;
        };
        for (identity, probed) in &mut self.files {
            let had_no_room = |outcome: &Result<(), (Reason, String)>| {
                matches!(outcome, Err((Reason::NoRoom, _)))
            };
            if !probed.outcomes.is_empty() && !probed.outcomes.iter().all(had_no_room) {
                continue;
            }
            let sites = probed.sites.sites.iter();
            let places = sites.map(|site| site.probes.count()).sum();
            let mut room = match self.snapshot.room(identity, places) {
                Ok(room) => room,
                Err(full) => {
                    probed.outcomes = vec![Err(full); probed.sites.sites.len()];
                    continue;
                }
            };
            probed.outcomes.clear();
            let path = format!("/proc/self/fd/{}", probed.found.file.as_raw_fd());
            let path = Path::new(&path);
            for site in &probed.sites.sites {
                let mut attach = |program: &'static str| {
                    let attached = &mut loaded.attached;
                    let room = room.pop().expect("taken for all");
                    attached.attach_to_file(program, path, site.place, room, &loaded.kernel)
                };
                // The return first: each entry that is seen is followed by a return that is.
                let exit = site.probes.exit.map(&mut attach).transpose();
                let outcome = exit.and_then(|exit| {
                    let entry = attach(site.probes.entry)?;
                    probed.links.push(entry);
                    probed.links.extend(exit);
                    Ok(())
                });
                probed.outcomes.push(outcome);
            }
        }
    }

    /// Tells the kernel half what communicators look like: all of them, or where libraries differ those of each process that has one.
    fn tell_layouts(&mut self, core: &Mutex<Core>) -> anyhow::Result<()> {
        let mut core = lock(core);
        let Some(live) = &mut core.live else {
            return Ok(());
        };
        let files = self.files.values();
        let nccl = files.filter(|probed| probed.sites.kind == Library::Nccl);
        let mut layouts = nccl.map(|probed| probed.sites.layout());
        let first = layouts.next();
        let any = first.filter(|first| layouts.all(|layout| layout == *first));
        if any != self.any {
            match any {
                Some(layout) => live.layouts.insert(ANY_PROCESS, layout, 0)?,
                None => removed(live.layouts.remove(&ANY_PROCESS))?,
            }
            self.any = any;
        }
        for (process, told) in entries(&live.layouts)? {
            let files = self.snapshot.processes.get(&process).into_iter().flatten();
            let mut files = files.filter_map(|file| self.files.get(file));
            let nccl = files.find(|probed| probed.sites.kind == Library::Nccl);
            let layout = nccl.map(|probed| probed.sites.layout());
            if let Some(layout) = layout.filter(|layout| *layout != told) {
                let entered = live.layouts.insert(process, layout, 0);
                entered.context("enter a process into a map")?;
            }
        }
        Ok(())
    }

    /// Versions of NCCL with which the plugin does harm, in processes that have both.
    fn denied(&self) -> BTreeSet<String> {
        let mut denied = BTreeSet::new();
        for files in self.snapshot.processes.values() {
            let files = || files.iter().filter_map(|file| self.files.get(file));
            let plugin = files().any(|probed| probed.sites.kind == Library::Plugin);
            let versions = files().filter_map(|probed| probed.sites.version);
            for version in versions.filter(|version| plugin && version.is_denied()) {
                denied.insert(format!(
                    "the profiler plugin is loaded into NCCL {version}, with which it does harm: see docs/nccl-profiler.md"
                ));
            }
        }
        denied
    }

    /// What has become of it, with the paths of files or only their names.
    fn status(&self, with_paths: bool) -> Status {
        let any = |kind| self.files.values().any(|probed| probed.sites.kind == kind);
        let state = match (&self.loaded, self.tried) {
            (Some(_), _) if any(Library::Nccl) || any(Library::Plugin) => State::Up,
            (None, true) => State::Failed,
            _ => State::Absent,
        };
        // Of several files a hook may be attached in one and have no room in another: it is told twice.
        let mut hooks: BTreeMap<(&'static str, &'static str), (Reason, String)> = BTreeMap::new();
        let mut found = Vec::new();
        let mut full = Vec::new();
        for probed in self.files.values() {
            let library = &probed.found.library;
            let build = match &library.build_id {
                Some(id) if with_paths => format!(", build id {id}"),
                _ => String::new(),
            };
            let path = shown(&probed.found.path, with_paths);
            for lack in &library.lacks {
                found.push(format!("{path} is not read whole: {}", lack.why));
            }
            match (probed.sites.kind, probed.sites.version) {
                (Library::Nccl, Some(version)) if version.is_known() => {
                    found.push(format!("NCCL {version}: {path}{build}"));
                }
                (Library::Nccl, Some(version)) => found.push(format!(
                    "NCCL {version}: {path}{build}; communicators are followed from their beginning only, since this version's are not known"
                )),
                (Library::Nccl, None) => found.push(format!(
                    "NCCL of a version that it does not tell: {path}{build}; communicators are followed from their beginning only"
                )),
                (Library::Plugin, _) => found.push(format!("NCCL profiler plugin: {path}{build}")),
                (Library::Cuda, _) => {}
            }
            if let Some(Err((Reason::NoRoom, why))) = probed.outcomes.first() {
                full.push(format!("{path} is not probed: {why}"));
            }
            for (site, outcome) in probed.sites.sites.iter().zip(&probed.outcomes) {
                let (reason, detail) = match outcome {
                    Ok(()) => (Reason::Attached, String::new()),
                    Err((reason, why)) => (*reason, format!("{} of {path}: {why}", site.name)),
                };
                let known = hooks.entry((site.name, reason.label()));
                known.or_insert((reason, detail));
            }
        }
        let hook = |((name, _), (reason, detail))| Hook {
            name,
            method: Method::Uprobe,
            reason,
            detail,
        };
        let mut hooks: Vec<_> = hooks.into_iter().map(hook).collect();
        hooks.extend(self.failed.iter().cloned());
        let mut notes = self.lacks.clone();
        notes.extend(self.trouble.clone());
        notes.extend(self.denied());
        notes.extend(full);
        let of_files = self.snapshot.notes.iter();
        notes.extend(
            of_files.map(|note| format!("NCCL is not seen everywhere: {}", note.told(with_paths))),
        );
        Status {
            state,
            hooks,
            notes,
            found,
            skipped: Some(self.snapshot.skipped),
        }
    }

    /// Logs what is new, with all that is known.
    fn log(&mut self) {
        let new = self.status(true);
        for (word, before, now) in [
            ("found ", &self.logged.found, &new.found),
            ("works with less: ", &self.logged.notes, &new.notes),
        ] {
            for text in now.iter().filter(|text| !before.contains(text)) {
                self.log.line(false, &format!("{word}{text}"));
            }
        }
        let told = |detail: &String| self.logged.hooks.iter().any(|hook| hook.detail == *detail);
        for hook in &new.hooks {
            // That there is no room is said once for the file.
            let once = hook.reason == Reason::NoRoom;
            if !once && !hook.detail.is_empty() && !told(&hook.detail) {
                self.log.line(true, &hook.detail);
            }
        }
        self.logged = new;
    }
}
