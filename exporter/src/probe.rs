// SPDX-License-Identifier: Apache-2.0
//! How does an object get into the kernel?
//!
//! Offsets are resolved from BTF, set as constants, and the programs loaded and attached one by one. A hook that is
//! missing costs its own metrics and says why.

mod constants;
mod explain;
mod files;
mod runs;

use std::{collections::HashMap, io, os::fd::AsFd, path::Path, sync::Arc};

use anyhow::Context;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapError},
    programs::{
        self, BtfTracePoint, Iter, KProbe, ProgramError, TracePoint, UProbe, kprobe::KProbeLinkId,
        uprobe::UProbeScope,
    },
};

use self::explain::{Chain, explain, is_refused_probe, reason_of, reason_of_object};
pub use self::{
    constants::Constants,
    explain::NO_TRACEFS,
    files::{FILE_PROBES, FILE_PROBES_OF_POD, FileLink, Room},
    runs::{Counters, Health, ProgramRuns, Runs},
};
use crate::{
    hook::{Hook, Need, Program, Reason, Target},
    kernel::{
        Kernel,
        btf::Btf,
        symbols::{self, Function, Symbols},
        tracefs::Tracefs,
    },
};

/// An object in the kernel. Dropping it detaches everything.
pub struct Attached {
    ebpf: Ebpf,
    counters: Arc<Counters>,
    values: Vec<(&'static str, u32)>,
    links: Vec<Link>,
    /// Programs that this kernel lacks a field for, and which.
    lacking: HashMap<&'static str, String>,
}

/// A kprobe at work.
struct Link {
    program: &'static str,
    name: &'static str,
    /// The module and the load of it that the probe is in.
    load: Option<(String, u64)>,
    id: KProbeLinkId,
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

/// What programs are attached by.
struct Means<'a> {
    kernel: &'a Kernel,
    /// The kernel's types, for programs that are verified against them.
    types: Option<Result<aya::Btf, aya::BtfError>>,
    /// Where the functions of all kprobes are.
    symbols: Result<Symbols, String>,
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
    let typed = programs.iter().any(|program| program.target.is_typed());
    let mut constants = Constants::new(types);
    constants.set("ARM64", u32::from(cfg!(target_arch = "aarch64")));
    let loaded = match types {
        Err(why) if typed => Err((Reason::NoBtf, why.to_owned())),
        _ => {
            resolve(&mut constants);
            load(object, &constants, kernel)
        }
    };
    let mut attached = match loaded {
        Ok(attached) => attached,
        Err((reason, detail)) => {
            let hooks = programs.iter();
            return Outcome {
                hooks: hooks
                    .flat_map(|program| program.hooks(reason, &detail))
                    .collect(),
                attached: None,
                notes: Vec::new(),
            };
        }
    };
    let means = Means {
        kernel,
        types: typed.then(aya::Btf::from_sys_fs),
        symbols: symbols_of(programs),
    };
    let mut hooks = Vec::new();
    let mut usable = true;
    for program in programs {
        let new = match constants.lacks(program) {
            Some(why) => {
                let detail = format!("this kernel lacks a field: {why}");
                attached.lacking.insert(program.name, detail.clone());
                program.hooks(Reason::NoField, &detail)
            }
            None => attached.attach(program, &means),
        };
        let works = new.iter().any(|hook| hook.reason == Reason::Attached);
        usable &= works || program.need != Need::Required;
        hooks.extend(new);
    }
    attached.keep_programs();
    Outcome {
        hooks,
        attached: usable.then_some(attached),
        notes: constants.missing_besides(programs),
    }
}

/// Loads an object with its constants.
fn load(
    object: &[u8],
    constants: &Constants<'_>,
    kernel: &Kernel,
) -> Result<Attached, (Reason, String)> {
    let mut loader = EbpfLoader::new();
    for (name, value) in constants.values() {
        // Not every object uses what all share.
        loader.override_global(name, value, *name != "ARM64");
    }
    let mut ebpf = loader.load(object).map_err(|error| {
        let reason = reason_of_object(&error);
        (reason, explain("load the object", &error, kernel))
    })?;
    let lost = ebpf
        .take_map("LOST")
        .ok_or("it is not in the object".to_owned())
        .and_then(|map: Map| Array::try_from(map).map_err(|error: MapError| error.to_string()))
        .map_err(|why| (Reason::Failed, format!("cannot use the map LOST: {why}")))?;
    Ok(Attached {
        ebpf,
        counters: Arc::new(Counters::new(lost)),
        values: constants.values().to_vec(),
        links: Vec::new(),
        lacking: HashMap::new(),
    })
}

/// Where the functions of all kprobes live.
fn symbols_of(programs: &[Program]) -> Result<Symbols, String> {
    let functions = programs.iter();
    let functions = functions.flat_map(|program| program.target.functions());
    let mut functions = functions.copied().peekable();
    if functions.peek().is_none() {
        return Ok(Symbols::default());
    }
    Symbols::of_kernel(functions).map_err(|error| format!("cannot read /proc/kallsyms: {error}"))
}

/// The functions of a kprobe that cannot be probed, as far as that is told: what the compiler has changed, or has several copies of,
/// in any case. Of several functions for one thing each kernel has some, so that one that is not there is told if none is.
fn refused(
    program: &Program,
    functions: &[&'static str],
    is_any_here: bool,
    symbols: &Symbols,
) -> Vec<Hook> {
    let is_told = |name: &str| match program.need {
        Need::IfThere => symbols.is_refused(name),
        _ => !is_any_here || symbols.is_refused(name),
    };
    let found = functions.iter().filter(|name| is_told(name));
    let hook = |name: &&'static str| {
        let detail = symbols.find(name).err()?;
        Some(Hook {
            name,
            method: program.target.method(),
            reason: Reason::NoHook,
            detail,
        })
    };
    found.filter_map(hook).collect()
}

/// A program of an object, as what it is.
fn find<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut T, ProgramError>
where
    &'a mut T: TryFrom<&'a mut programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name);
    program.ok_or(ProgramError::NotLoaded)?.try_into()
}

/// What is told of something that was to be loaded or attached.
fn told(
    outcome: Result<(), ProgramError>,
    what: impl FnOnce() -> String,
    kernel: &Kernel,
) -> (Reason, String) {
    match outcome {
        Ok(()) => (Reason::Attached, String::new()),
        Err(error) => (reason_of(&error), explain(&what(), &error, kernel)),
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

    /// Loads a program and attaches it; what is attached later is loaded only.
    fn attach(&mut self, program: &Program, means: &Means<'_>) -> Vec<Hook> {
        let kernel = means.kernel;
        let types = match &means.types {
            Some(Err(error)) if program.target.is_typed() => {
                let detail = format!("cannot read the kernel's BTF: {error}");
                return program.hooks(Reason::NoBtf, &detail);
            }
            types => types.as_ref().and_then(|types| types.as_ref().ok()),
        };
        let name = program.name;
        let attach = || format!("attach {} {name}", program.target.method().label());
        let (reason, detail) = match (program.target, types) {
            (Target::TpBtf, Some(types)) => {
                let done = find::<BtfTracePoint>(&mut self.ebpf, name).and_then(|tracepoint| {
                    tracepoint.load(name, types)?;
                    tracepoint.attach().map(|_| ())
                });
                told(done, attach, kernel)
            }
            // Attached for each walk.
            (Target::Iter(object), Some(types)) => {
                let done = find::<Iter>(&mut self.ebpf, name);
                let done = done.and_then(|walk| walk.load(object, types));
                told(done, attach, kernel)
            }
            (Target::TpBtf | Target::Iter(_), None) => return Vec::new(),
            (Target::Tracepoint(events), _) => {
                return self.attach_tracepoint(program, events, kernel);
            }
            (Target::Kprobe(functions) | Target::Kretprobe(functions), _) => {
                return self.attach_kprobe(program, functions, &means.symbols, kernel);
            }
            // Attached to files as they are found.
            (Target::Uprobe | Target::Uretprobe, _) => {
                let done = find::<UProbe>(&mut self.ebpf, name).and_then(UProbe::load);
                told(done, || format!("load the program {name}"), kernel)
            }
        };
        program.hooks(reason, &detail)
    }

    /// Attaches to the one of a tracepoint's names that the kernel has.
    fn attach_tracepoint(
        &mut self,
        program: &Program,
        events: &[&'static str],
        kernel: &Kernel,
    ) -> Vec<Hook> {
        let Some(tracefs) = Tracefs::find() else {
            return program.hooks(Reason::NoHook, NO_TRACEFS);
        };
        let Some(event) = events.iter().find(|event| tracefs.has(event)) else {
            return program.hooks(Reason::NoHook, "this kernel has no such tracepoint");
        };
        let (group, name) = event.split_once(':').unwrap_or_default();
        let done = find::<TracePoint>(&mut self.ebpf, program.name).and_then(|tracepoint| {
            tracepoint.load()?;
            tracepoint.attach(group, name).map(|_| ())
        });
        let (reason, detail) = told(done, || format!("attach tracepoint {event}"), kernel);
        program.hooks_at(&[event], reason, &detail)
    }

    /// Loads a kprobe's program and attaches it to every one of the functions that exists.
    fn attach_kprobe(
        &mut self,
        program: &Program,
        functions: &[&'static str],
        symbols: &Result<Symbols, String>,
        kernel: &Kernel,
    ) -> Vec<Hook> {
        let symbols = match symbols {
            Ok(symbols) => symbols,
            Err(why) => return program.hooks_at(functions, Reason::NoHook, why),
        };
        let found = functions.iter();
        let here: Vec<_> = found
            .filter_map(|name| Some((*name, symbols.find(name).ok()?)))
            .collect();
        let mut hooks = refused(program, functions, !here.is_empty(), symbols);
        if here.is_empty() {
            return hooks;
        }
        let method = program.target.method();
        let probe = find::<KProbe>(&mut self.ebpf, program.name);
        let loaded = probe.and_then(|probe| match probe.fd() {
            Ok(_) => Ok(()),
            Err(_) => probe.load(),
        });
        if let Err(error) = loaded {
            let what = format!("load the program {}", program.name);
            let detail = explain(&what, &error, kernel);
            return program.hooks_at(functions, reason_of(&error), &detail);
        }
        for (name, function) in here {
            let done = self.link(program.name, name, &function);
            let what = || format!("attach {} {}", method.label(), function.target);
            let (reason, detail) = told(done, what, kernel);
            hooks.push(Hook {
                name,
                method,
                reason,
                detail,
            });
        }
        hooks
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
        let probe = find::<KProbe>(&mut self.ebpf, program)?;
        let id = probe.attach(&function.target, 0).or_else(|error| {
            let short = function.short.as_ref();
            let short = short.filter(|_| reason_of(&error) == Reason::NoHook);
            short.map_or(Err(error), |short| probe.attach(short, 0))
        })?;
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
            let probe = find::<UProbe>(&mut self.ebpf, program)?;
            let id = probe.attach(offset, file, UProbeScope::AllProcesses)?;
            probe.take_link(id)
        };
        let attached = attach().map(|link| FileLink::new(link, room));
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
            if let Ok(probe) = find::<KProbe>(&mut self.ebpf, link.program) {
                // The kernel has disarmed it; this closes the descriptor.
                let _ = probe.detach(link.id);
            }
        }
        let symbols = symbols_of(programs);
        let mut hooks = Vec::new();
        for program in programs {
            if let Some(detail) = self.lacking.get(program.name) {
                hooks.extend(program.hooks(Reason::NoField, detail));
                continue;
            }
            let is_linked = |name: &&'static str| {
                let mut links = self.links.iter();
                links.any(|link| link.program == program.name && link.name == *name)
            };
            let functions = program.target.functions().iter().copied();
            let (at_work, left): (Vec<_>, Vec<_>) = functions.partition(is_linked);
            let linked = at_work.len();
            hooks.extend(at_work.into_iter().map(|name| Hook {
                name,
                method: program.target.method(),
                reason: Reason::Attached,
                detail: String::new(),
            }));
            let came = |name: &&str| symbols.as_ref().is_ok_and(|symbols| symbols.has(name));
            if linked == 0 || left.iter().any(came) {
                hooks.extend(self.attach_kprobe(program, &left, &symbols, kernel));
            } else if let Ok(symbols) = &symbols {
                hooks.extend(refused(program, &left, true, symbols));
            }
        }
        hooks
    }

    /// Has an iterator's program walk once over everything.
    ///
    /// # Errors
    /// When the kernel refuses the walk.
    pub fn walk(&mut self, program: &str) -> anyhow::Result<()> {
        let program = find::<Iter>(&mut self.ebpf, program)?;
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

    /// Its counters, which may be read beside everything else.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// What it tells of itself.
    ///
    /// # Errors
    /// When the map of losses cannot be read.
    pub fn health(&self) -> anyhow::Result<Health> {
        self.counters.health()
    }

    /// Has the counters know all programs that are loaded.
    fn keep_programs(&mut self) {
        let programs = self.ebpf.programs().filter_map(|(name, program)| {
            let fd = program.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
            Some((name.to_owned(), fd))
        });
        let programs = programs.collect();
        if let Some(counters) = Arc::get_mut(&mut self.counters) {
            counters.keep(programs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_compiler_has_changed_is_told_whatever_else_there_is() {
        let text = "0 t here\t[m]\n0 t changed.isra.0\t[m]\n0 t two\t[m]\n0 t two\t[n]\n";
        let names = ["here", "changed", "two", "missing"];
        let symbols = Symbols::read(text.as_bytes(), names).expect("readable");
        const ALL: &[&str] = &["here", "changed", "two", "missing"];
        const NONE: &[&str] = &["missing"];
        let told = |program: &Program, functions| {
            let is_any_here = functions != NONE;
            let hooks = refused(program, functions, is_any_here, &symbols);
            assert!(hooks.iter().all(|hook| hook.reason == Reason::NoHook));
            let names = hooks.iter().map(|hook| hook.name);
            names.collect::<Vec<_>>()
        };
        let wanted = Program::wanted("p", Target::Kprobe(ALL));
        let if_there = Program::if_there("p", Target::Kprobe(ALL));
        assert_eq!(told(&wanted, ALL), ["changed", "two"]);
        assert_eq!(told(&if_there, ALL), ["changed", "two"]);
        // Of several each kernel has some; where it has none, that is told of what should be there.
        assert_eq!(told(&wanted, NONE), ["missing"]);
        assert_eq!(told(&if_there, NONE), [""; 0]);
        let why = &refused(&if_there, ALL, true, &symbols)[0].detail;
        assert!(why.contains("changed.isra.0"), "{why}");
    }
}
