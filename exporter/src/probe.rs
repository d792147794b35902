// SPDX-License-Identifier: Apache-2.0
//! How does an object get into the kernel, and what came of each hook?
//!
//! Offsets are resolved from BTF, set as constants, and the programs loaded and attached one by one. A hook that is
//! missing costs its own metrics and says why. Metric: `chandra_hook_info`.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use anyhow::Context;
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, Map, MapError},
    programs::{
        BtfTracePoint, Iter, KProbe, ProgramError, TracePoint, UProbe,
        kprobe::KProbeLinkId,
        uprobe::{UProbeLink, UProbeScope},
    },
};
use exporter_common::Loss;

use crate::{
    kernel::{
        Kernel,
        btf::Btf,
        symbols::{self, Function, Symbols},
        tracefs::Tracefs,
    },
    lock::lock,
};

/// How a hook is attached. The label `method` of `chandra_hook_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A raw tracepoint with BTF-typed arguments.
    TpBtf,
    /// A file system watched from user space.
    Inotify,
    /// A breakpoint at a function's entry.
    Kprobe,
    /// A breakpoint at a function's return.
    Kretprobe,
    /// A netlink request.
    Netlink,
    /// A walk over the kernel's objects, done now and then.
    Iter,
    /// A tracepoint with a record, which tracefs describes.
    Tracepoint,
    /// A breakpoint in a file of user space, wherever that is mapped; attached when such a file is found.
    Uprobe,
    /// The same at a function's return.
    Uretprobe,
}

impl Method {
    /// Every method, for the reference.
    pub const LABELS: [&'static str; 9] = [
        "tp_btf",
        "inotify",
        "kprobe",
        "kretprobe",
        "netlink",
        "iter",
        "tracepoint",
        "uprobe",
        "uretprobe",
    ];

    /// The label.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}

/// What came of a hook. The label `reason` of `chandra_hook_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is attached.
    Attached,
    /// The kernel has no BTF.
    NoBtf,
    /// The kernel has no such tracepoint or function.
    NoHook,
    /// A field that the program needs is not in BTF.
    NoField,
    /// A capability is missing, or lockdown refuses.
    NoPermission,
    /// The locked-memory limit or the memory cgroup refuses (kernels before 5.11 charge maps to RLIMIT_MEMLOCK).
    NoMemory,
    /// The verifier refused the program.
    Rejected,
    /// Anything else.
    Failed,
    /// No cgroup v2 hierarchy is mounted.
    NoCgroupV2,
    /// The mount shows only a part of the hierarchy.
    PartOfHierarchy,
    /// It would cost what is probed too much.
    Expensive,
    /// As many probes of files are attached as may be.
    NoRoom,
}

impl Reason {
    /// Every reason, for the reference.
    pub const LABELS: [&'static str; 12] = [
        "attached",
        "no_btf",
        "no_hook",
        "no_field",
        "no_permission",
        "no_memory",
        "rejected",
        "failed",
        "no_cgroup_v2",
        "part_of_hierarchy",
        "expensive",
        "no_room",
    ];

    /// The label.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}

/// Probes of files that may be attached at once, of all signals. The kernel takes an eighth of a second to take one out (6.12, 6.18: a
/// grace period under one lock, so threads do not help), and a process that ends waits for all of them: half a minute at most.
pub const FILE_PROBES: usize = 192;

/// Those of them that one pod may have, or one unit of a host without pods.
pub const FILE_PROBES_OF_POD: usize = FILE_PROBES / 2;

/// A place among [`FILE_PROBES`], for a pod.
#[derive(Debug)]
pub struct Room(Arc<str>);

static TAKEN: Mutex<BTreeMap<Arc<str>, usize>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<Arc<str>, usize>> {
    lock(&TAKEN)
}

impl Room {
    /// Takes places for all probes of something, or none: a part of them would tell wrong times.
    ///
    /// # Errors
    /// What to tell of a probe that has no place.
    pub fn take(places: usize, pod: &Arc<str>) -> Result<Vec<Self>, (Reason, String)> {
        let mut taken = taken();
        let all: usize = taken.values().sum();
        let of_pod = taken.get(pod).copied().unwrap_or_default();
        let why = if all + places > FILE_PROBES {
            format!(
                "of {FILE_PROBES} probes of files that may be attached on this node, which is as many as are taken out in half a minute, \
                 {all} are"
            )
        } else if of_pod + places > FILE_PROBES_OF_POD {
            format!(
                "of {FILE_PROBES_OF_POD} probes of files that may be attached for one pod, {of_pod} are"
            )
        } else {
            taken.insert(Arc::clone(pod), of_pod + places);
            return Ok((0..places).map(|_| Self(Arc::clone(pod))).collect());
        };
        Err((Reason::NoRoom, why))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut taken = taken();
        if let Some(of_pod) = taken.get_mut(&self.0) {
            *of_pod -= 1;
            if *of_pod == 0 {
                taken.remove(&self.0);
            }
        }
    }
}

/// A probe of a file, attached until it is dropped.
pub struct FileLink {
    // Dropped first: its place is free when the kernel has taken it out.
    _link: UProbeLink,
    _room: Room,
}

/// One hook of a signal, and what came of it.
#[derive(Clone, Debug)]
pub struct Hook {
    /// The kernel's name of the place.
    pub name: &'static str,
    /// How it is attached.
    pub method: Method,
    /// What came of it.
    pub reason: Reason,
    /// For people: why not, and what to do. Empty when attached.
    pub detail: String,
}

/// What the lack of a hook means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The signal has failed.
    Required,
    /// The signal goes on with less.
    Wanted,
    /// Nothing, where the kernel has no such function: the thing that it would see does not exist there.
    IfThere,
}

/// A program of an object.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name in the object; of a tracepoint also the kernel's.
    pub name: &'static str,
    /// How it is attached.
    pub method: Method,
    /// The functions that a kprobe or kretprobe goes to: all that exist. Of an iterator, what it walks over. Of a tracepoint,
    /// its names as `group:event`, of which the kernel has one.
    pub functions: &'static [&'static str],
    /// What its lack means.
    pub need: Need,
    /// The constants that it cannot do without.
    pub needs: &'static [&'static str],
}

/// The constants of an object, resolved from the running kernel.
#[derive(Debug)]
pub struct Constants<'a> {
    types: Result<&'a Btf, &'a str>,
    values: Vec<(&'static str, u32)>,
    missing: Vec<(&'static str, String)>,
}

impl<'a> Constants<'a> {
    /// The kernel's types, for what [`Self::offset`] does not cover, or why they cannot be read.
    pub fn btf(&self) -> Result<&'a Btf, &'a str> {
        self.types
    }

    /// Sets a constant to a value.
    pub fn set(&mut self, constant: &'static str, value: u32) {
        self.values.push((constant, value));
    }

    /// Sets a constant to the byte offset of a member, the sum of the offsets where several are named (a struct that
    /// lies in a buffer of another). Says if it could.
    pub fn offset(&mut self, constant: &'static str, members: &[(&str, &str)]) -> bool {
        let offsets = self.types.map_err(str::to_owned).and_then(|types| {
            let offset = |(name, path): &(&str, &str)| {
                let field = types.field(name, path);
                field
                    .map(|field| field.offset)
                    .map_err(|error| error.to_string())
            };
            members.iter().map(offset).collect::<Result<Vec<u32>, _>>()
        });
        match offsets {
            Ok(offsets) => self.set(constant, offsets.iter().sum()),
            Err(why) => {
                self.lack(constant, why);
                return false;
            }
        }
        true
    }

    /// Sets what the kernel half needs to find a socket's cgroup.
    ///
    /// From 5.15 `sk_cgrp_data.cgroup` is a pointer (commit 8520e224f547, also in late 5.10.y: Debian's 5.10.262 has
    /// it); before, `sk_cgrp_data.val` is a word of pointer and flags. The kernel half does without the owner where OFF_SOCK_CGROUP is absent, so it is set only
    /// with the other two.
    pub fn socket_cgroup(&mut self) {
        let typed = self.types.is_ok_and(|types| {
            types
                .field("sock", "sk_cgrp_data.cgroup")
                .is_ok_and(|field| field.pointer)
        });
        self.set("SOCK_CGROUP_TYPED", u32::from(typed));
        let member = if typed {
            "sk_cgrp_data.cgroup"
        } else {
            "sk_cgrp_data.val"
        };
        if self.offset("OFF_CGROUP_KN", &[("cgroup", "kn")])
            && self.offset("OFF_KERNFS_ID", &[("kernfs_node", "id")])
        {
            self.offset("OFF_SOCK_CGROUP", &[("sock", member)]);
        }
    }

    /// Sets what the kernel half needs to find a task's cgroup. It does without where OFF_TASK_CGROUPS is absent.
    pub fn task_cgroup(&mut self) {
        if self.offset("OFF_SET_CGROUP", &[("css_set", "dfl_cgrp")])
            && self.offset("OFF_CGROUP_KN", &[("cgroup", "kn")])
            && self.offset("OFF_KERNFS_ID", &[("kernfs_node", "id")])
        {
            self.offset("OFF_TASK_CGROUPS", &[("task_struct", "cgroups")]);
        }
    }

    /// Notes that a constant cannot be resolved; the object's default says that it is absent.
    pub fn lack(&mut self, constant: &'static str, why: String) {
        self.missing.push((constant, why));
    }

    /// What could not be resolved, and why.
    pub fn missing(&self) -> &[(&'static str, String)] {
        &self.missing
    }
}

/// An object in the kernel. Dropping it detaches everything.
pub struct Attached {
    /// The object.
    pub ebpf: Ebpf,
    counters: Arc<Counters>,
    values: Vec<(&'static str, u32)>,
    links: Vec<Link>,
}

/// What the kernel tells of an object: its losses and runs. Reading them needs nothing of who attaches and detaches.
pub struct Counters {
    lost: Array<aya::maps::MapData, u64>,
    programs: Vec<(String, OwnedFd)>,
}

/// What [`attach`] did.
pub struct Outcome {
    /// Every hook of the signal.
    pub hooks: Vec<Hook>,
    /// The object, unless a required hook is missing.
    pub attached: Option<Attached>,
    /// Fields that are missing without a hook being lost.
    pub notes: Vec<String>,
}

/// Loads an object, sets its constants and attaches its programs.
///
/// `types` are what the constants are resolved from: the kernel's, or a module's together with them. Programs of
/// tracepoints need them; kprobes may do with less.
pub fn attach(
    object: &[u8],
    programs: &[Program],
    types: Result<&Btf, &str>,
    resolve: impl FnOnce(&mut Constants<'_>),
    kernel: &Kernel,
) -> Outcome {
    let all = |reason: Reason, detail: &str| Outcome {
        hooks: programs
            .iter()
            .flat_map(|program| program.hooks(program.places(), reason, detail))
            .collect(),
        attached: None,
        notes: Vec::new(),
    };
    let is_typed = |program: &Program| matches!(program.method, Method::TpBtf | Method::Iter);
    let typed = programs.iter().any(is_typed);
    if typed && let Err(why) = types {
        return all(Reason::NoBtf, why);
    }
    let mut constants = Constants {
        types,
        values: Vec::new(),
        missing: Vec::new(),
    };
    constants.set("ARM64", u32::from(cfg!(target_arch = "aarch64")));
    resolve(&mut constants);
    let Constants {
        values, missing, ..
    } = constants;
    let mut loader = EbpfLoader::new();
    for (name, value) in &values {
        // Not every object uses what all share.
        loader.override_global(name, value, *name != "ARM64");
    }
    let mut ebpf = match loader.load(object) {
        Ok(ebpf) => ebpf,
        Err(error) => {
            return all(
                reason_of_object(&error),
                &explain("load the object", &error, kernel),
            );
        }
    };
    let lost = match ebpf
        .take_map("LOST")
        .ok_or("it is not in the object".to_owned())
        .and_then(|map: Map| Array::try_from(map).map_err(|error: MapError| error.to_string()))
    {
        Ok(lost) => lost,
        Err(why) => return all(Reason::Failed, &format!("cannot use the map LOST: {why}")),
    };
    let mut attached = Attached {
        ebpf,
        counters: Arc::new(Counters {
            lost,
            programs: Vec::new(),
        }),
        values,
        links: Vec::new(),
    };
    let image = typed.then(aya::Btf::from_sys_fs);
    let symbols = symbols_of(programs);
    let mut hooks = Vec::new();
    let mut usable = true;
    for program in programs {
        let lacks = missing
            .iter()
            .find(|(constant, _)| program.needs.contains(constant));
        let new = match (lacks, &image) {
            (Some((_, why)), _) => program.hooks(
                program.places(),
                Reason::NoField,
                &format!("this kernel lacks a field: {why}"),
            ),
            (None, Some(Err(error))) if is_typed(program) => program.hooks(
                program.places(),
                Reason::NoBtf,
                &format!("cannot read the kernel's BTF: {error}"),
            ),
            (None, Some(Ok(image))) if is_typed(program) => {
                match attach_typed(&mut attached.ebpf, program, image) {
                    Ok(()) => program.hooks(program.places(), Reason::Attached, ""),
                    Err(error) => {
                        let what = format!("attach {} {}", program.method.label(), program.name);
                        program.hooks(
                            program.places(),
                            reason_of(&error),
                            &explain(&what, &error, kernel),
                        )
                    }
                }
            }
            _ if program.method == Method::Tracepoint => {
                attach_tracepoint(&mut attached.ebpf, program, kernel)
            }
            _ if matches!(program.method, Method::Uprobe | Method::Uretprobe) => {
                match load_for_files(&mut attached.ebpf, program) {
                    Ok(()) => program.hooks(program.places(), Reason::Attached, ""),
                    Err(error) => {
                        let what = format!("load the program {}", program.name);
                        program.hooks(
                            program.places(),
                            reason_of(&error),
                            &explain(&what, &error, kernel),
                        )
                    }
                }
            }
            _ => attached.attach_probe(program, program.functions, &symbols, kernel),
        };
        let works = new.iter().any(|hook| hook.reason == Reason::Attached);
        usable &= works || program.need != Need::Required;
        hooks.extend(new);
    }
    attached.keep_programs();
    let needed = |constant: &&str| {
        programs
            .iter()
            .any(|program| program.needs.contains(constant))
    };
    let notes = missing
        .into_iter()
        .filter(|(constant, _)| !needed(constant))
        .map(|(_, why)| why)
        .collect();
    Outcome {
        hooks,
        attached: usable.then_some(attached),
        notes,
    }
}

/// Where the functions of all kprobes live.
fn symbols_of(programs: &[Program]) -> Result<Symbols, String> {
    let probes = programs
        .iter()
        .filter(|program| matches!(program.method, Method::Kprobe | Method::Kretprobe));
    let functions = probes.flat_map(|program| program.functions);
    let mut functions = functions.copied().peekable();
    if functions.peek().is_none() {
        return Ok(Symbols::default());
    }
    Symbols::of_kernel(functions).map_err(|error| format!("cannot read /proc/kallsyms: {error}"))
}

impl Program {
    /// The places that it goes to.
    fn places(&self) -> &[&'static str] {
        if self.functions.is_empty() {
            std::slice::from_ref(&self.name)
        } else {
            self.functions
        }
    }

    /// Some of its hooks, all with the same fate.
    fn hooks(&self, places: &[&'static str], reason: Reason, detail: &str) -> Vec<Hook> {
        let hook = |name: &&'static str| Hook {
            name,
            method: self.method,
            reason,
            detail: detail.to_owned(),
        };
        places.iter().map(hook).collect()
    }
}

impl Attached {
    /// Takes a map out of the object.
    ///
    /// # Errors
    /// When the object has no such map, or it is of another kind.
    pub fn map<T: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> anyhow::Result<T> {
        let map = self.ebpf.take_map(name);
        let map = map.with_context(|| format!("the object has no map {name}"))?;
        map.try_into()
            .with_context(|| format!("use the map {name}"))
    }

    /// Loads a kprobe's program and attaches it to every one of the functions that exists.
    fn attach_probe(
        &mut self,
        program: &Program,
        functions: &[&'static str],
        symbols: &Result<Symbols, String>,
        kernel: &Kernel,
    ) -> Vec<Hook> {
        let symbols = match symbols {
            Ok(symbols) => symbols,
            Err(why) => return program.hooks(functions, Reason::NoHook, why),
        };
        let found: Vec<_> = functions
            .iter()
            .map(|name| (*name, symbols.find(name)))
            .collect();
        let (here, missing): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|(_, function)| function.is_ok());
        if here.is_empty() {
            if program.need == Need::IfThere {
                return Vec::new();
            }
            let hook = |(name, function): (&'static str, Result<Function, String>)| Hook {
                name,
                method: program.method,
                reason: Reason::NoHook,
                detail: function.err().unwrap_or_default(),
            };
            return missing.into_iter().map(hook).collect();
        }
        let probe: Result<&mut KProbe, ProgramError> = self
            .ebpf
            .program_mut(program.name)
            .ok_or(ProgramError::NotLoaded)
            .and_then(TryInto::try_into);
        let loaded = probe.and_then(|probe| match probe.fd() {
            Ok(_) => Ok(()),
            Err(_) => probe.load(),
        });
        if let Err(error) = loaded {
            let what = format!("load the program {}", program.name);
            return program.hooks(
                functions,
                reason_of(&error),
                &explain(&what, &error, kernel),
            );
        }
        // Of several functions for one thing, each kernel has some.
        here.into_iter()
            .map(|(name, function)| {
                let (reason, detail) = match function {
                    Err(why) => (Reason::NoHook, why),
                    Ok(function) => match self.link(program.name, name, &function) {
                        Ok(()) => (Reason::Attached, String::new()),
                        Err(error) => {
                            let what =
                                format!("attach {} {}", program.method.label(), function.target);
                            (reason_of(&error), explain(&what, &error, kernel))
                        }
                    },
                };
                Hook {
                    name,
                    method: program.method,
                    reason,
                    detail,
                }
            })
            .collect()
    }

    fn link(
        &mut self,
        program: &'static str,
        name: &'static str,
        function: &Function,
    ) -> Result<(), ProgramError> {
        // Read before the attach: a reload in between is then seen as one.
        let module = function.module.as_ref();
        let load = module.and_then(|module| symbols::loaded(module));
        let probe: &mut KProbe = self
            .ebpf
            .program_mut(program)
            .ok_or(ProgramError::NotLoaded)?
            .try_into()?;
        let id = probe.attach(&function.target, 0)?;
        self.links.push(Link {
            program,
            name,
            load: module.cloned().zip(load),
            id,
        });
        Ok(())
    }

    /// Attaches a uprobe or uretprobe to a place in a file. Dropping the link detaches it.
    ///
    /// # Errors
    /// Why it could not be attached, and what to do.
    pub fn attach_to_file(
        &mut self,
        program: &'static str,
        file: &Path,
        offset: u64,
        room: Room,
        kernel: &Kernel,
    ) -> Result<FileLink, (Reason, String)> {
        let mut attach = || {
            let probe: &mut UProbe = self
                .ebpf
                .program_mut(program)
                .ok_or(ProgramError::NotLoaded)?
                .try_into()?;
            let id = probe.attach(offset, file, UProbeScope::AllProcesses)?;
            probe.take_link(id)
        };
        let attached = attach().map(|link| FileLink {
            _link: link,
            _room: room,
        });
        attached.map_err(|error| {
            let what = format!("attach {program} at {offset:#x}");
            let reason = reason_of(&error);
            // Since 2025 kernels, stable ones too, want it for uprobes, whatever kernel.perf_event_paranoid is.
            let lacks = reason == Reason::NoPermission && !kernel.is_admin();
            if lacks && is_refused_probe(&error) {
                let why = Chain(&error);
                return (reason, format!("cannot {what}: {why}; add CAP_SYS_ADMIN"));
            }
            (reason, explain(&what, &error, kernel))
        })
    }

    /// Attaches anew what went away with a module, and what came with one. Returns the hooks of all kprobes.
    pub fn follow_modules(&mut self, programs: &[Program], kernel: &Kernel) -> Vec<Hook> {
        let (dead, live): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.links)
                .into_iter()
                .partition(|link| {
                    let load = link.load.as_ref();
                    load.is_some_and(|(module, load)| symbols::loaded(module) != Some(*load))
                });
        self.links = live;
        for link in dead {
            if let Some(program) = self.ebpf.program_mut(link.program)
                && let Ok(probe) = <&mut KProbe>::try_from(program)
            {
                // The kernel has disarmed it; this closes the descriptor.
                let _ = probe.detach(link.id);
            }
        }
        let symbols = symbols_of(programs);
        let mut hooks = Vec::new();
        for program in programs {
            let is_linked = |name: &&'static str| {
                let mut links = self.links.iter();
                links.any(|link| link.program == program.name && link.name == *name)
            };
            let (at_work, left): (Vec<_>, Vec<_>) =
                program.functions.iter().copied().partition(is_linked);
            let linked = at_work.len();
            hooks.extend(at_work.into_iter().map(|name| Hook {
                name,
                method: program.method,
                reason: Reason::Attached,
                detail: String::new(),
            }));
            let came = |name: &&str| symbols.as_ref().is_ok_and(|symbols| symbols.has(name));
            if linked == 0 || left.iter().any(came) {
                hooks.extend(self.attach_probe(program, &left, &symbols, kernel));
            }
        }
        hooks
    }

    /// Has an iterator's program walk once over everything.
    ///
    /// # Errors
    /// When the kernel refuses the walk.
    pub fn walk(&mut self, program: &str) -> anyhow::Result<()> {
        let program: &mut Iter = self
            .ebpf
            .program_mut(program)
            .ok_or(ProgramError::NotLoaded)?
            .try_into()?;
        let id = program.attach()?;
        let mut walk = program.take_link(id)?.into_file()?;
        // It writes nothing, and runs as it is read.
        io::copy(&mut walk, &mut io::sink())?;
        Ok(())
    }

    /// The constants that the object was loaded with.
    pub fn values(&self) -> &[(&'static str, u32)] {
        &self.values
    }
}

/// A kprobe at work.
struct Link {
    program: &'static str,
    name: &'static str,
    /// The module and the load of it that the probe is in.
    load: Option<(String, u64)>,
    id: KProbeLinkId,
}

fn attach_typed(ebpf: &mut Ebpf, what: &Program, btf: &aya::Btf) -> Result<(), ProgramError> {
    let program = ebpf.program_mut(what.name).ok_or(ProgramError::NotLoaded)?;
    if what.method == Method::Iter {
        // It is attached for each walk.
        let program: &mut Iter = program.try_into()?;
        let object = what.functions.first().copied().unwrap_or_default();
        return program.load(object, btf);
    }
    let program: &mut BtfTracePoint = program.try_into()?;
    program.load(what.name, btf)?;
    program.attach()?;
    Ok(())
}

/// Attaches to the one of a tracepoint's names that the kernel has.
fn attach_tracepoint(ebpf: &mut Ebpf, program: &Program, kernel: &Kernel) -> Vec<Hook> {
    let Some(tracefs) = Tracefs::find() else {
        return program.hooks(program.functions, Reason::NoHook, NO_TRACEFS);
    };
    let mut names = program.functions.iter();
    let Some(name) = names.find(|name| tracefs.has(name)) else {
        let why = "this kernel has no such tracepoint";
        return program.hooks(program.functions, Reason::NoHook, why);
    };
    let (group, event) = name.split_once(':').unwrap_or_default();
    let attach = || -> Result<(), ProgramError> {
        let tracepoint = ebpf.program_mut(program.name);
        let tracepoint: &mut TracePoint = tracepoint.ok_or(ProgramError::NotLoaded)?.try_into()?;
        tracepoint.load()?;
        tracepoint.attach(group, event)?;
        Ok(())
    };
    match { attach }() {
        Ok(()) => program.hooks(&[name], Reason::Attached, ""),
        Err(error) => {
            let what = format!("attach tracepoint {name}");
            program.hooks(&[name], reason_of(&error), &explain(&what, &error, kernel))
        }
    }
}

/// What to do where tracepoints cannot be found.
pub const NO_TRACEFS: &str =
    "tracefs is not to be seen: mount it at /sys/kernel/tracing (in a container, from the host)";

/// Loads a program that is attached to files later.
fn load_for_files(ebpf: &mut Ebpf, what: &Program) -> Result<(), ProgramError> {
    let program = ebpf.program_mut(what.name).ok_or(ProgramError::NotLoaded)?;
    let program: &mut UProbe = program.try_into()?;
    program.load()
}

fn reason_of_object(error: &EbpfError) -> Reason {
    cause(error).map_or(Reason::Failed, reason_of_errno)
}

fn reason_of(error: &ProgramError) -> Reason {
    match error {
        ProgramError::Btf(_) => Reason::NoHook,
        // The verifier's own refusals are EACCES, EINVAL or E2BIG; what the process may not do is EPERM.
        ProgramError::LoadError { io_error, .. } => match reason_of_errno(io_error) {
            Reason::Failed => Reason::Rejected,
            Reason::NoPermission if is_verifier(io_error) => Reason::Rejected,
            reason => reason,
        },
        other => cause(other).map_or(Reason::Failed, reason_of_errno),
    }
}

fn is_verifier(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::ACCESS.raw_os_error())
}

/// Says if perf_event_open(2) failed, by which kprobes are attached.
fn is_refused_probe(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<ProgramError>();
    matches!(error, Some(ProgramError::SyscallError(error)) if error.call == "perf_event_open")
}

fn reason_of_errno(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Reason::NoPermission,
        io::ErrorKind::OutOfMemory => Reason::NoMemory,
        io::ErrorKind::NotFound => Reason::NoHook,
        _ => Reason::Failed,
    }
}

/// The I/O error at the bottom of an error's chain.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        next = error.source();
    }
    None
}

/// What was tried, why it failed, what to do, in one line.
fn explain(what: &str, error: &(dyn Error + 'static), kernel: &Kernel) -> String {
    let mut why = Chain(error)
        .to_string()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    if why.len() > 400 {
        // A verifier log ends with what it refused.
        let tail = why.char_indices().rev().nth(299).map_or(0, |(at, _)| at);
        why = format!("… {}", &why[tail..]);
    }
    let cause = cause(error);
    let hint = match cause.map(reason_of_errno) {
        Some(Reason::NoPermission) if is_refused_probe(error) => kernel.probe_hint(),
        Some(Reason::NoPermission) if cause.is_some_and(is_verifier) => String::new(),
        Some(Reason::NoPermission) => kernel.permission_hint(),
        Some(Reason::NoMemory) => "; raise LimitMEMLOCK or the container's memory limit".to_owned(),
        _ => String::new(),
    };
    format!("cannot {what}: {why}{hint}")
}

struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let text = error.to_string();
            // aya repeats the source in some messages.
            if !last.contains(&text) {
                write!(f, ": {text}")?;
            }
            last = text;
            next = error.source();
        }
        Ok(())
    }
}

/// What the kernel says of one loaded program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// How often it ran, where the host keeps bpf statistics (`kernel.bpf_stats_enabled`).
    pub runs: u64,
    /// Nanoseconds that it ran, likewise.
    pub nanoseconds: u64,
    /// Events that the kernel did not hand to it because it, or for kprobes any other, was running already (5.12+; for
    /// kprobes from about 6.7).
    pub missed: u64,
}

impl Runs {
    /// Adds the runs of another load of the program.
    pub fn plus(self, other: Self) -> Self {
        Self {
            runs: self.runs + other.runs,
            nanoseconds: self.nanoseconds + other.nanoseconds,
            missed: self.missed + other.missed,
        }
    }
}

impl Attached {
    /// Its counters, which may be read beside everything else.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Events lost in the kernel half, by [`Loss`].
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn lost(&self) -> anyhow::Result<Vec<(&'static str, u64)>> {
        self.counters.lost()
    }

    /// The kernel's own account of each loaded program.
    pub fn runs(&self) -> Vec<(String, Runs)> {
        self.counters.runs()
    }

    /// Has the counters know all programs that are loaded.
    fn keep_programs(&mut self) {
        let programs = self.ebpf.programs().filter_map(|(name, program)| {
            let fd = program.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
            Some((name.to_owned(), fd))
        });
        let programs = programs.collect();
        if let Some(counters) = Arc::get_mut(&mut self.counters) {
            counters.programs = programs;
        }
    }
}

impl Counters {
    /// As [`Attached::lost`].
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn lost(&self) -> anyhow::Result<Vec<(&'static str, u64)>> {
        Loss::LABELS
            .iter()
            .map(|(loss, label)| Ok((*label, self.lost.get(&(*loss as u32), 0)?)))
            .collect()
    }

    /// As [`Attached::runs`], from the program's fdinfo.
    pub fn runs(&self) -> Vec<(String, Runs)> {
        let runs = |fd: &OwnedFd| {
            let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
            Some(parse_fdinfo(&std::fs::read_to_string(path).ok()?))
        };
        let programs = self.programs.iter();
        programs
            .filter_map(|(name, fd)| Some((name.clone(), runs(fd)?)))
            .collect()
    }
}

fn parse_fdinfo(text: &str) -> Runs {
    let value = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok())
            .unwrap_or_default()
    };
    Runs {
        runs: value("run_cnt"),
        nanoseconds: value("run_time_ns"),
        missed: value("recursion_misses"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_old_and_new_kernels_is_read() {
        let old = "pos:\t0\nprog_type:\t26\nrun_time_ns:\t1200\nrun_cnt:\t10\n";
        assert_eq!(
            parse_fdinfo(old),
            Runs {
                runs: 10,
                nanoseconds: 1200,
                missed: 0
            }
        );
        let new = "run_time_ns:\t1\nrun_cnt:\t2\nrecursion_misses:\t3\nverified_insns:\t99\n";
        assert_eq!(
            parse_fdinfo(new),
            Runs {
                runs: 2,
                nanoseconds: 1,
                missed: 3
            }
        );
    }

    #[test]
    fn one_pod_cannot_take_all_places() {
        let (one, other): (Arc<str>, Arc<str>) = ("one".into(), "other".into());
        let all = Room::take(FILE_PROBES_OF_POD, &one).expect("half");
        let (reason, why) = Room::take(1, &one).expect_err("one more");
        assert_eq!(reason, Reason::NoRoom);
        assert!(why.contains("for one pod"), "{why}");
        let half = Room::take(FILE_PROBES_OF_POD, &other).expect("the other half");
        let (_, why) = Room::take(1, &"third".into()).expect_err("full");
        assert!(why.contains("on this node"), "{why}");
        drop(all);
        Room::take(FILE_PROBES_OF_POD, &one).expect("given back");
        drop(half);
        assert!(taken().is_empty());
    }

    #[test]
    fn every_reason_has_its_own_label() {
        assert_eq!(Reason::Attached.label(), "attached");
        assert_eq!(Reason::Failed.label(), "failed");
        assert_eq!(Reason::PartOfHierarchy.label(), "part_of_hierarchy");
        assert_eq!(Reason::NoRoom.label(), "no_room");
        assert_eq!(Reason::NoRoom as usize + 1, Reason::LABELS.len());
    }
}
