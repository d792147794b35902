// SPDX-License-Identifier: Apache-2.0
//! What is this host, as far as eBPF cares?

pub mod btf;
mod hierarchy;
pub mod symbols;
pub mod tracefs;
pub mod uevents;

use std::{fs, sync::Arc};

use btf::Btf;
pub use hierarchy::Hierarchy;
use rustix::process::{Resource, getrlimit};

use crate::capabilities::{self, CapabilitySet};

/// What people are told of the host.
#[derive(Clone, Debug)]
pub struct Host {
    /// The node's name, or else the host's.
    pub name: String,
    /// As `uname -r` says.
    pub release: String,
    /// What is wrong with the cgroup hierarchy.
    pub cgroups: Option<String>,
}

/// The running kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says.
    pub release: String,
    /// The types of the kernel image, or one line that says why they cannot be read.
    pub btf: Result<Arc<Btf>, String>,
    /// CPUs that the kernel has room for: per-CPU maps have a value for each.
    pub possible_cpus: usize,
    /// What this process may do.
    pub capabilities: CapabilitySet,
    lockdown: Option<String>,
}

impl Kernel {
    /// Reads what this host is.
    pub fn read() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned();
        let btf = Btf::vmlinux().map(Arc::new).map_err(|error| {
            format!("{error}; the kernel has to be built with CONFIG_DEBUG_INFO_BTF (every distribution's is since 2021)")
        });
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown")
            .ok()
            .and_then(|text| {
                let (_, rest) = text.split_once('[')?;
                Some(rest.split_once(']')?.0.to_owned())
            });
        let possible = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
        Self {
            release,
            btf,
            possible_cpus: cpus(&possible).unwrap_or(1),
            capabilities: capabilities::held(),
            lockdown,
        }
    }

    /// The types of the kernel image, or why they cannot be read.
    pub fn types(&self) -> Result<&Btf, &str> {
        self.btf.as_ref().map(|btf| &**btf).map_err(String::as_str)
    }

    /// Lets go of the kernel's types, some megabytes that only attaching needs.
    pub fn forget_types(&mut self) {
        if self.btf.is_ok() {
            self.btf = Err("the types have been let go of after attaching".to_owned());
        }
    }

    /// The capabilities that this process lacks, as far as tracing goes: CAP_SYS_ADMIN stands for two others.
    pub fn lacks(&self, mut wanted: CapabilitySet) -> CapabilitySet {
        if self.is_admin() {
            wanted -= CapabilitySet::BPF | CapabilitySet::PERFMON;
        }
        wanted - self.capabilities
    }

    /// Says if the process holds CAP_SYS_ADMIN.
    pub fn is_admin(&self) -> bool {
        self.capabilities.contains(CapabilitySet::SYS_ADMIN)
    }

    /// Says if the process may load tracing programs: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN.
    pub fn may_trace(&self) -> bool {
        self.lacks(CapabilitySet::BPF | CapabilitySet::PERFMON)
            .is_empty()
    }

    /// The lockdown mode that is on, if the kernel tells.
    pub fn lockdown(&self) -> Option<&str> {
        self.lockdown.as_deref()
    }

    /// What to do about a kprobe that may not be opened.
    ///
    /// Debian's and Ubuntu's kernels have a level of `kernel.perf_event_paranoid` above those of the mainline, and set it:
    /// perf_event_open(2), by which kprobes are attached, then wants CAP_SYS_ADMIN and not just CAP_PERFMON.
    pub fn probe_hint(&self) -> String {
        let level = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
        match level.trim().parse::<i32>() {
            Ok(level) if level > 2 && !self.is_admin() => format!(
                "; with kernel.perf_event_paranoid={level} this kernel wants CAP_SYS_ADMIN for kprobes: add it, or set that to 2"
            ),
            _ => self.permission_hint(),
        }
    }

    /// What to do about EPERM.
    pub fn permission_hint(&self) -> String {
        if !self.may_trace() {
            return "; run as root or with CAP_BPF and CAP_PERFMON (before 5.8: CAP_SYS_ADMIN)"
                .to_owned();
        }
        // Before 5.11 a map over RLIMIT_MEMLOCK is refused with EPERM.
        let limited = getrlimit(Resource::Memlock).current.is_some();
        if self.release.starts_with("5.10.") && limited {
            return "; this kernel charges maps to RLIMIT_MEMLOCK: add CAP_SYS_RESOURCE or LimitMEMLOCK=infinity".to_owned();
        }
        match self.lockdown() {
            Some(mode @ ("integrity" | "confidentiality")) => {
                format!("; kernel lockdown is on ({mode}), which refuses tracing")
            }
            _ => "; a security module or the container's seccomp profile may refuse bpf(2)"
                .to_owned(),
        }
    }
}

/// The number of CPUs in a list such as `0-3,8`.
fn cpus(list: &str) -> Option<usize> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok().map(|last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_cpus_are_counted_to_the_last() {
        assert_eq!(cpus("0\n"), Some(1));
        assert_eq!(cpus("0-255\n"), Some(256));
        assert_eq!(cpus("0-3,8-11\n"), Some(12));
        assert_eq!(cpus(""), None);
    }
}
