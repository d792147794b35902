// SPDX-License-Identifier: Apache-2.0
//! Which libraries have processes mapped that have to do with NCCL, and where are they probed?

use std::{collections::BTreeSet, sync::Mutex};

use anyhow::Context;
use exporter_common::nccl::{ANY_PROCESS, Layout};

use super::{
    OBJECT,
    live::{Core, Live, sweep},
    sites::{self, Kind, Site, Sites},
};
use crate::{
    hook::{Program, Target},
    kernel::Kernel,
    libraries::{
        Identity,
        maps::Interest,
        probed::{self, Place, Probed},
        watch::{Watch, Watched, shown},
    },
    lock::lock,
    signals::{
        State, Status, entries,
        follow::{Follower, StatusLog},
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

impl probed::Sites for Sites {
    fn places(&self) -> Vec<Place> {
        let place = |site: &Site| Place {
            names: vec![site.name],
            at: Ok(site.place),
            entry: site.probes.entry,
            exit: site.probes.exit,
        };
        self.sites.iter().map(place).collect()
    }
}

/// What attaches to libraries as they come.
pub(super) struct Libraries {
    probed: probed::Libraries<Sites>,
    show_paths: bool,
    /// What all libraries have in common, as the kernel half has been told.
    any: Option<Layout>,
    trouble: Option<String>,
    log: StatusLog,
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
    fn before(&self) -> Status {
        self.status(self.show_paths)
    }

    /// Attaches to what has come, lets go of what has gone, and tells what has become of it.
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        self.take_over();
        let mut files = self.probed.files.values();
        let has_nccl = files.any(|file| file.sites.kind != Kind::Cuda);
        if self.probed.is_waiting() && has_nccl {
            let programs = programs();
            let live = self
                .probed
                .load(OBJECT, &programs, |_| {}, kernel(), Live::new);
            lock(core).live = live;
        }
        self.probed.probe(Probed::is_new);
        let troubles = [self.tell_layouts(core), sweep(core)];
        let troubles = troubles.into_iter().filter_map(Result::err);
        let troubles: Vec<_> = troubles.map(|error| format!("{error:#}")).collect();
        self.trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        self.log.tell(self.status(true));
        self.status(self.show_paths)
    }
}

impl Libraries {
    pub(super) fn new(watch: Watch, show_paths: bool) -> Self {
        Self {
            probed: probed::Libraries::new(watch),
            show_paths,
            any: None,
            trouble: None,
            log: StatusLog::new("nccl"),
        }
    }

    /// Takes over what is mapped now. Launches of graphs say something only beside NCCL.
    fn take_over(&mut self) {
        self.probed.meet(|found| Sites::of(&found.library));
        let files = &self.probed.files;
        let is_nccl = |identity: &Identity| {
            let file = files.get(identity);
            file.is_some_and(|file| file.sites.kind == Kind::Nccl)
        };
        let processes = self.probed.snapshot.processes.values();
        let beside = processes.filter(|files| files.iter().any(is_nccl));
        let beside: BTreeSet<Identity> = beside.flatten().copied().collect();
        self.probed
            .let_go(|identity, sites| sites.kind != Kind::Cuda || beside.contains(identity));
    }

    /// Tells the kernel half what communicators look like: all of them, or where libraries differ those of each process that has one.
    fn tell_layouts(&mut self, core: &Mutex<Core>) -> anyhow::Result<()> {
        let mut core = lock(core);
        let Some(live) = &mut core.live else {
            return Ok(());
        };
        let files = self.probed.files.values();
        let nccl = files.filter(|probed| probed.sites.kind == Kind::Nccl);
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
            let files = self
                .probed
                .snapshot
                .processes
                .get(&process)
                .into_iter()
                .flatten();
            let mut files = files.filter_map(|file| self.probed.files.get(file));
            let nccl = files.find(|probed| probed.sites.kind == Kind::Nccl);
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
        for files in self.probed.snapshot.processes.values() {
            let files = || files.iter().filter_map(|file| self.probed.files.get(file));
            let plugin = files().any(|probed| probed.sites.kind == Kind::Plugin);
            let versions = files().filter_map(|probed| probed.sites.denied());
            for version in versions.filter(|_| plugin) {
                denied.insert(format!(
                    "the profiler plugin is loaded into NCCL {version}, with which it does harm: see docs/nccl-profiler.md"
                ));
            }
        }
        denied
    }

    /// What has become of it, with the paths of files or only their names.
    fn status(&self, with_paths: bool) -> Status {
        let mut files = self.probed.files.values();
        let is_there = files.any(|file| file.sites.kind != Kind::Cuda);
        let state = match (self.probed.is_loaded(), self.probed.is_waiting()) {
            (true, _) if is_there => State::Up,
            (false, false) => State::Failed,
            _ => State::Absent,
        };
        let mut own: Vec<_> = self.trouble.iter().cloned().collect();
        own.extend(self.denied());
        let unseen = "NCCL is not seen everywhere";
        Status {
            hooks: self.probed.hooks(with_paths),
            notes: self.probed.notes(own, unseen, with_paths),
            found: self.found(with_paths),
            skipped: Some(self.probed.snapshot.skipped),
            ..Status::bare(state)
        }
    }

    /// The libraries that have been found.
    fn found(&self, with_paths: bool) -> Vec<String> {
        let mut found = Vec::new();
        for file in self.probed.files.values() {
            let library = &file.found.library;
            let build = match &library.build_id {
                Some(id) if with_paths => format!(", build id {id}"),
                _ => String::new(),
            };
            let path = shown(&file.found.path, with_paths);
            for lack in &library.lacks {
                found.push(format!("{path} is not read whole: {}", lack.why));
            }
            if !file.sites.left_out.is_empty() {
                let names = file.sites.left_out.join(", ");
                found.push(format!(
                    "{path}: not probed, since it has more than a library takes probes: {names}"
                ));
            }
            match file.sites.kind {
                Kind::Nccl => found.push(format!(
                    "{}: {path}{build}{}",
                    name(&file.sites),
                    from_where(&file.sites)
                )),
                Kind::Plugin => found.push(format!("NCCL profiler plugin: {path}{build}")),
                Kind::Cuda => {}
            }
        }
        found
    }
}

/// What people call a library of NCCL.
fn name(sites: &Sites) -> String {
    let name = if sites.is_rccl { "RCCL" } else { "NCCL" };
    match sites.version {
        Some(version) => format!("{name} {version}"),
        None => format!("{name} of a version that it does not tell"),
    }
}

/// From where on its communicators are followed, where that is not from anywhere.
fn from_where(sites: &Sites) -> &'static str {
    match (sites.is_known(), sites.version) {
        (true, _) => "",
        _ if sites.is_rccl => {
            "; communicators are followed from their beginning only, since RCCL's are not known, and phases of an initialisation are not told"
        }
        (false, Some(_)) => {
            "; communicators are followed from their beginning only, since this version's are not known"
        }
        (false, None) => "; communicators are followed from their beginning only",
    }
}
