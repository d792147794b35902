// SPDX-License-Identifier: Apache-2.0
//! What is a hook, where does it go, and what came of it?
//!
//! Metric: `chandra_hook_info`.

use serde::Serialize;

/// How a hook is attached. The label `method` of `chandra_hook_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
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
    /// Pods are listed, and none of their containers is in the hierarchy.
    ContainersElsewhere,
    /// It would cost what is probed too much.
    Expensive,
    /// As many probes of files are attached as may be.
    NoRoom,
}

impl Reason {
    /// Every reason, for the reference.
    pub const LABELS: [&'static str; 13] = [
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
        "containers_elsewhere",
        "expensive",
        "no_room",
    ];

    /// The label.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}

/// One hook of a signal, and what came of it.
#[derive(Clone, Debug, Serialize)]
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

/// Where a program goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The kernel's tracepoint of the program's name, with BTF-typed arguments.
    TpBtf,
    /// A walk over all of the kernel's objects of a kind.
    Iter(&'static str),
    /// The one of these tracepoints, `group:event`, that the kernel has.
    Tracepoint(&'static [&'static str]),
    /// The entries of those of these functions that exist.
    Kprobe(&'static [&'static str]),
    /// Their returns.
    Kretprobe(&'static [&'static str]),
    /// Places in files, as those are found.
    Uprobe,
    /// The returns from such places.
    Uretprobe,
}

impl Target {
    /// How programs get there.
    pub const fn method(self) -> Method {
        match self {
            Self::TpBtf => Method::TpBtf,
            Self::Iter(_) => Method::Iter,
            Self::Tracepoint(_) => Method::Tracepoint,
            Self::Kprobe(_) => Method::Kprobe,
            Self::Kretprobe(_) => Method::Kretprobe,
            Self::Uprobe => Method::Uprobe,
            Self::Uretprobe => Method::Uretprobe,
        }
    }

    /// The functions of the kernel that it names.
    pub const fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Kprobe(functions) | Self::Kretprobe(functions) => functions,
            _ => &[],
        }
    }

    /// The tracepoints that it names.
    pub const fn events(self) -> &'static [&'static str] {
        match self {
            Self::Tracepoint(events) => events,
            _ => &[],
        }
    }

    /// Whether the program is verified against the kernel's types.
    pub(crate) const fn is_typed(self) -> bool {
        matches!(self, Self::TpBtf | Self::Iter(_))
    }
}

/// A program of an object.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name in the object; of a typed tracepoint also the kernel's.
    pub name: &'static str,
    /// Where it goes.
    pub target: Target,
    /// What its lack means.
    pub need: Need,
    /// The constants that it cannot do without.
    pub needs: &'static [&'static str],
}

impl Program {
    /// One that the signal goes on without.
    pub const fn wanted(name: &'static str, target: Target) -> Self {
        Self {
            name,
            target,
            need: Need::Wanted,
            needs: &[],
        }
    }

    /// One without which the signal has failed.
    pub const fn required(name: &'static str, target: Target) -> Self {
        Self {
            need: Need::Required,
            ..Self::wanted(name, target)
        }
    }

    /// One for something that not every kernel has.
    pub const fn if_there(name: &'static str, target: Target) -> Self {
        Self {
            need: Need::IfThere,
            ..Self::wanted(name, target)
        }
    }

    /// The same, with the constants that it cannot do without.
    pub const fn needing(self, needs: &'static [&'static str]) -> Self {
        Self { needs, ..self }
    }

    /// Its hooks, all with the same fate.
    pub(crate) fn hooks(&self, reason: Reason, detail: &str) -> Vec<Hook> {
        let place = match &self.target {
            Target::Iter(place) => std::slice::from_ref(place),
            Target::Tracepoint(places) | Target::Kprobe(places) | Target::Kretprobe(places) => {
                places
            }
            Target::TpBtf | Target::Uprobe | Target::Uretprobe => std::slice::from_ref(&self.name),
        };
        self.hooks_at(place, reason, detail)
    }

    /// Some of them.
    pub(crate) fn hooks_at(
        &self,
        places: &[&'static str],
        reason: Reason,
        detail: &str,
    ) -> Vec<Hook> {
        let hook = |name: &&'static str| Hook {
            name,
            method: self.target.method(),
            reason,
            detail: detail.to_owned(),
        };
        places.iter().map(hook).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_label() {
        assert_eq!(Reason::Attached.label(), "attached");
        assert_eq!(Reason::Failed.label(), "failed");
        assert_eq!(Reason::PartOfHierarchy.label(), "part_of_hierarchy");
        assert_eq!(Reason::NoRoom.label(), "no_room");
        assert_eq!(Reason::NoRoom as usize + 1, Reason::LABELS.len());
    }
}
