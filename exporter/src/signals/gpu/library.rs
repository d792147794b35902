// SPDX-License-Identifier: Apache-2.0
//! Which functions of libcuda are probed, and where?

use std::fs::File;

use anyhow::{bail, ensure};
use exporter_common::gpu::CudaCall;
use object::elf::EM_X86_64;

use crate::libraries::elf::{Elf, cheap};

use CudaCall::{
    ContextSynchronize, EventSynchronize, GraphLaunch, Launch, Memcpy, StreamSynchronize,
};

/// Functions that are probed where the library has them. Not cuEventQuery and cuStreamQuery, which are called in busy loops.
#[rustfmt::skip] // one call a line
pub(super) const FUNCTIONS: &[(&str, CudaCall)] = &[
    ("cuLaunchKernel", Launch), ("cuLaunchKernel_ptsz", Launch),
    ("cuLaunchKernelEx", Launch), ("cuLaunchKernelEx_ptsz", Launch),
    ("cuStreamSynchronize", StreamSynchronize), ("cuStreamSynchronize_ptsz", StreamSynchronize),
    ("cuEventSynchronize", EventSynchronize),
    ("cuCtxSynchronize", ContextSynchronize), ("cuCtxSynchronize_v2", ContextSynchronize),
    ("cuMemcpyHtoD_v2", Memcpy), ("cuMemcpyHtoD_v2_ptds", Memcpy),
    ("cuMemcpyDtoH_v2", Memcpy), ("cuMemcpyDtoH_v2_ptds", Memcpy),
    ("cuGraphLaunch", GraphLaunch), ("cuGraphLaunch_ptsz", GraphLaunch),
];

/// A function of a library, by all of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) names: Vec<&'static str>,
    pub(super) call: CudaCall,
    /// Where in the file it is probed, or why it is not.
    pub(super) place: Result<u64, String>,
}

/// Finds the functions in a library, each address once.
pub(super) fn sites(file: &File) -> anyhow::Result<Vec<Site>> {
    let wanted = |name: &[u8]| {
        let known = FUNCTIONS.iter().find(|(known, _)| known.as_bytes() == name);
        known.copied()
    };
    let elf = Elf::of(file)?;
    ensure!(
        elf.machine == EM_X86_64,
        "it is not of x86-64: what probes cost elsewhere is not known"
    );
    let mut sites: Vec<(u64, Site)> = Vec::new();
    for function in elf.functions(wanted)?.found {
        let (name, call) = function.what;
        // One place a name, whatever the file says.
        if sites.iter().any(|(_, site)| site.names.contains(&name)) {
            continue;
        }
        match sites.iter_mut().find(|(known, _)| *known == function.at) {
            Some((_, site)) => site.names.push(name),
            None => {
                let site = Site {
                    names: vec![name],
                    call,
                    place: cheap(&function.code).map(|skipped| function.at + skipped),
                };
                sites.push((function.at, site));
            }
        }
    }
    if sites.is_empty() {
        bail!("it has none of the functions");
    }
    // Probes are detached in this order: those that are hit most go first.
    sites.sort_by_key(|(at, site)| (site.call as u32, *at));
    Ok(sites.into_iter().map(|(_, site)| site).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libraries::Identity;

    #[test]
    fn what_is_no_library_is_refused() {
        let this = File::open("/proc/self/exe").expect("it runs");
        let why = sites(&this).expect_err("no driver").to_string();
        assert!(why.contains("it has none of the functions"), "{why}");
        let text = File::open("/proc/self/maps").expect("it runs");
        sites(&text).expect_err("no ELF file");
        let folder = File::open("/proc").expect("a folder");
        Identity::of(&folder).expect_err("no file");
    }
}
