// SPDX-License-Identifier: Apache-2.0
//! How does an object get into the kernel, and what came of each hook?
//!
//! Offsets are resolved from BTF, set as constants, and the programs loaded and attached one by one. A hook that is
//! missing costs its own metrics and says why. Metric: `chandra_hook_info`.

use std::{error::Error, fmt, io};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, Map, MapError},
    programs::{BtfTracePoint, ProgramError},
};
use exporter_common::Loss;

use crate::kernel::{Kernel, btf::Btf};

/// How a hook is attached. The label `method` of `chandra_hook_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A raw tracepoint with BTF-typed arguments.
    TpBtf,
    /// A file system watched from user space.
    Inotify,
}

impl Method {
    /// Every method, for the reference.
    pub const LABELS: [&'static str; 2] = ["tp_btf", "inotify"];

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
}

impl Reason {
    /// Every reason, for the reference.
    pub const LABELS: [&'static str; 10] = [
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
    ];

    /// The label.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
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

/// A program of an object.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name in the object, which is also the kernel's name of the hook.
    pub name: &'static str,
    /// How it is attached.
    pub method: Method,
    /// Without it the signal has failed; without another it goes on with less.
    pub required: bool,
    /// The constants that it cannot do without.
    pub needs: &'static [&'static str],
}

/// The constants of an object, resolved from the running kernel.
#[derive(Debug)]
pub struct Constants<'a> {
    btf: &'a Btf,
    values: Vec<(&'static str, u32)>,
    missing: Vec<(&'static str, String)>,
}

impl Constants<'_> {
    /// The kernel's types, for what [`Self::offset`] does not cover.
    pub fn btf(&self) -> &Btf {
        self.btf
    }

    /// Sets a constant to a value.
    pub fn set(&mut self, constant: &'static str, value: u32) {
        self.values.push((constant, value));
    }

    /// Sets a constant to the byte offset of a member, the sum of the offsets where several are named (a struct that
    /// lies in a buffer of another). Says if it could.
    pub fn offset(&mut self, constant: &'static str, members: &[(&str, &str)]) -> bool {
        let offsets: Result<Vec<u32>, _> = members
            .iter()
            .map(|(name, path)| self.btf.field(name, path).map(|field| field.offset))
            .collect();
        match offsets {
            Ok(offsets) => self.set(constant, offsets.iter().sum()),
            Err(error) => {
                self.lack(constant, error.to_string());
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
        let typed = self
            .btf
            .field("sock", "sk_cgrp_data.cgroup")
            .is_ok_and(|field| field.pointer);
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
    /// The object; maps are taken out of it by name.
    pub ebpf: Ebpf,
    lost: Array<aya::maps::MapData, u64>,
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
pub fn attach(
    object: &[u8],
    programs: &'static [Program],
    resolve: impl FnOnce(&mut Constants<'_>),
    kernel: &Kernel,
) -> Outcome {
    let all = |reason: Reason, detail: &str| Outcome {
        hooks: programs
            .iter()
            .map(|p| Hook {
                name: p.name,
                method: p.method,
                reason,
                detail: detail.to_owned(),
            })
            .collect(),
        attached: None,
        notes: Vec::new(),
    };
    let btf = match &kernel.btf {
        Ok(btf) => btf,
        Err(why) => return all(Reason::NoBtf, why),
    };
    let mut constants = Constants {
        btf,
        values: Vec::new(),
        missing: Vec::new(),
    };
    resolve(&mut constants);
    let Constants {
        values, missing, ..
    } = constants;
    let mut loader = EbpfLoader::new();
    for (name, value) in &values {
        loader.override_global(name, value, true);
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
    let types = aya::Btf::from_sys_fs();
    let mut hooks = Vec::new();
    let mut usable = true;
    for program in programs {
        let lacks = missing
            .iter()
            .find(|(constant, _)| program.needs.contains(constant));
        let (reason, detail) = match (lacks, &types) {
            (Some((_, why)), _) => (Reason::NoField, format!("this kernel lacks a field: {why}")),
            (None, Err(error)) => (
                Reason::NoBtf,
                format!("cannot read the kernel's BTF: {error}"),
            ),
            (None, Ok(types)) => match attach_tp_btf(&mut ebpf, program.name, types) {
                Ok(()) => (Reason::Attached, String::new()),
                Err(error) => (
                    reason_of(&error),
                    explain(&format!("attach tp_btf {}", program.name), &error, kernel),
                ),
            },
        };
        usable &= reason == Reason::Attached || !program.required;
        hooks.push(Hook {
            name: program.name,
            method: program.method,
            reason,
            detail,
        });
    }
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
        attached: usable.then_some(Attached { ebpf, lost }),
        notes,
    }
}

fn attach_tp_btf(ebpf: &mut Ebpf, name: &str, btf: &aya::Btf) -> Result<(), ProgramError> {
    let program: &mut BtfTracePoint = ebpf
        .program_mut(name)
        .ok_or(ProgramError::NotLoaded)?
        .try_into()?;
    program.load(name, btf)?;
    program.attach()?;
    Ok(())
}

fn reason_of_object(error: &EbpfError) -> Reason {
    cause(error).map_or(Reason::Failed, reason_of_errno)
}

fn reason_of(error: &ProgramError) -> Reason {
    match error {
        ProgramError::Btf(_) => Reason::NoHook,
        ProgramError::LoadError { io_error, .. } => match reason_of_errno(io_error) {
            Reason::Failed => Reason::Rejected,
            reason => reason,
        },
        other => cause(other).map_or(Reason::Failed, reason_of_errno),
    }
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
    let hint = match cause(error).map(reason_of_errno) {
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
    /// Events that the kernel did not hand to it because it was running already (5.12+).
    pub missed: u64,
}

impl Attached {
    /// Events lost in the kernel half, by [`Loss`].
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn lost(&self) -> anyhow::Result<Vec<(&'static str, u64)>> {
        Loss::LABELS
            .iter()
            .map(|(loss, label)| Ok((*label, self.lost.get(&(*loss as u32), 0)?)))
            .collect()
    }

    /// The kernel's own account of each loaded program, from the program's fdinfo.
    pub fn runs(&self) -> Vec<(String, Runs)> {
        let runs = |program: &aya::programs::Program| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(program.fd().ok()?));
            Some(parse_fdinfo(
                &std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?,
            ))
        };
        self.ebpf
            .programs()
            .filter_map(|(name, program)| Some((name.to_owned(), runs(program)?)))
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
    fn every_reason_has_its_own_label() {
        assert_eq!(Reason::Attached.label(), "attached");
        assert_eq!(Reason::Failed.label(), "failed");
        assert_eq!(Reason::PartOfHierarchy.label(), "part_of_hierarchy");
        assert_eq!(Reason::PartOfHierarchy as usize + 1, Reason::LABELS.len());
    }
}
