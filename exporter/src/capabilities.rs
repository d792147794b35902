// SPDX-License-Identifier: Apache-2.0
//! What may this process do, and what of that does it need?
//!
//! Modules and libraries come and go while the exporter runs, and each time programs are attached again: what attaching
//! needs is kept. Everything else is given up before the first thread starts, since capabilities are a thread's own.

use std::fmt;

pub use rustix::thread::CapabilitySet;
use rustix::{
    io,
    thread::{
        CapabilitySets, capabilities, capability_is_in_bounding_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

/// A capability that a signal needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// One capability.
    pub capability: CapabilitySet,
    /// For what; a phrase for people.
    pub why: &'static str,
    /// The flag without which it is not needed.
    pub with: Option<&'static str>,
}

impl Need {
    /// Says if it is there without any flag, or with one of these.
    pub fn applies(&self, flags: &[&str]) -> bool {
        self.with.is_none_or(|flag| flags.contains(&flag))
    }

    const fn only_with(mut self, flag: &'static str) -> Self {
        self.with = Some(flag);
        self
    }
}

/// The flag by which calls of CUDA are timed.
pub const CUDA_CALLS: &str = "--cuda-calls";

/// The flag that names a device.
pub const GPU_DEVICE: &str = "--gpu.device";

/// bpf(2): programs and maps.
pub const BPF: Need = Need {
    capability: CapabilitySet::BPF,
    why: "load programs, make and read maps",
    with: None,
};

/// Programs that read the kernel's memory, and what they are attached to.
pub const PERFMON: Need = Need {
    capability: CapabilitySet::PERFMON,
    why: "programs that read the kernel's memory; tracepoints, kprobes, uprobes",
    with: None,
};

/// perf_event_open(2) where the distribution restricts it.
pub const KPROBES: Need = Need {
    capability: CapabilitySet::SYS_ADMIN,
    why: "kprobes and tracepoints where `kernel.perf_event_paranoid` is above 2, as Debian and Ubuntu set it",
    with: None,
};

/// Uprobes, on kernels since 2025 whatever `kernel.perf_event_paranoid` is, and the file that a process has mapped.
pub const UPROBES: Need = Need {
    capability: CapabilitySet::SYS_ADMIN,
    why: "uprobes on kernels since 2025; the very file that a process has mapped (`/proc/PID/map_files`)",
    with: None,
};

/// What a process has mapped.
pub const LIBRARIES: Need = Need {
    capability: CapabilitySet::SYS_PTRACE,
    why: "find who has the library mapped (`/proc/PID/maps`)",
    with: None,
};

/// The same for libcuda.
pub const CUDA_UPROBES: Need = UPROBES.only_with(CUDA_CALLS);

/// Likewise.
pub const CUDA_LIBRARIES: Need = LIBRARIES.only_with(CUDA_CALLS);

/// A device that is named.
pub const DEVICES: Need = Need {
    capability: CapabilitySet::SYS_PTRACE,
    why: "look at a device of the host from inside a container (`/proc/1/root/dev/…`)",
    with: Some(GPU_DEVICE),
};

/// setns(2).
pub const NAMESPACES: Need = Need {
    capability: CapabilitySet::SYS_ADMIN,
    why: "kprobes, as above; queue pairs of devices that belong to a pod's network namespace (`rdma system` mode exclusive)",
    with: None,
};

/// Finding namespaces to enter.
pub const NAMESPACES_OF_OTHERS: Need = Need {
    capability: CapabilitySet::SYS_PTRACE,
    why: "find those network namespaces (`/proc/PID/ns/net`)",
    with: None,
};

/// What is kept where it is held, and never needed by a signal: reading files that belong to other users (keys, a list of
/// pods, libraries in private folders).
const OTHERS_FILES: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// A port below 1024.
const LOW_PORT: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// The capabilities of some needs, and those that are kept with them. CAP_SYS_RESOURCE is not among them: it raises
/// RLIMIT_MEMLOCK at the start (kernels before 5.11), and the limit stays raised.
pub fn of<'a>(needs: impl IntoIterator<Item = &'a Need>) -> CapabilitySet {
    let needs = needs.into_iter().map(|need| need.capability);
    needs.fold(OTHERS_FILES | LOW_PORT, |all, one| all | one)
}

/// Gives up every other capability, for this thread and those that it starts, also for programs that they would execute.
///
/// # Errors
/// When the kernel refuses; then nothing, or only a part, is given up.
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    let held = capabilities(None)?;
    let tracing = CapabilitySet::BPF | CapabilitySet::PERFMON;
    // CAP_SYS_ADMIN stands for these, and may be all that was given.
    let kept = match held.effective.contains(kept & tracing) {
        true => kept,
        false => kept | CapabilitySet::SYS_ADMIN,
    };
    for other in CapabilitySet::all().difference(kept).iter() {
        // Only who has CAP_SETPCAP may. Without it the bounding set is of no use to a program without privileges.
        if capability_is_in_bounding_set(other) == Ok(true)
            && remove_capability_from_bounding_set(other).is_err()
        {
            break;
        }
    }
    set_capabilities(
        None,
        CapabilitySets {
            effective: held.effective & kept,
            permitted: held.permitted & kept,
            // Ambient capabilities go with the inheritable ones.
            inheritable: CapabilitySet::empty(),
        },
    )?;
    set_no_new_privs(true)
}

/// What this thread may do.
pub fn held() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |held| held.effective)
}

/// Names as capabilities(7) has them, separated by commas.
pub struct Names(pub CapabilitySet);

impl fmt::Display for Names {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, _)) in self.0.iter_names().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(out, "{comma}CAP_{name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_manual() {
        let some = CapabilitySet::BPF | CapabilitySet::SYS_ADMIN;
        assert_eq!(Names(some).to_string(), "CAP_SYS_ADMIN, CAP_BPF");
        assert_eq!(Names(CapabilitySet::empty()).to_string(), "");
    }

    #[test]
    fn raising_the_limit_of_locked_memory_is_given_up() {
        let kept = of(&[BPF, PERFMON]);
        assert!(kept.contains(CapabilitySet::BPF | CapabilitySet::PERFMON));
        assert!(!kept.intersects(CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN));
    }
}
