// SPDX-License-Identifier: Apache-2.0
//! Which functions of libcuda are probed, and where?

use anyhow::{bail, ensure};
use exporter_common::gpu::CudaCall;
use object::elf::EM_X86_64;

use crate::libraries::elf::{Library, Wanted, cheap};

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

/// What is looked for in a library.
pub(super) fn wanted() -> Wanted {
    Wanted {
        names: FUNCTIONS
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect(),
        ..Wanted::default()
    }
}

/// Finds the functions in a library, each address once.
pub(super) fn sites(library: &Library) -> anyhow::Result<Vec<Site>> {
    let mut sites: Vec<(u64, Site)> = Vec::new();
    for function in &library.functions {
        let known = FUNCTIONS.iter().find(|(known, _)| *known == function.name);
        let Some((name, call)) = known.copied() else {
            continue;
        };
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
    ensure!(
        library.machine == EM_X86_64,
        "it is not of x86-64: what probes cost elsewhere is not known"
    );
    // Probes are detached in this order: those that are hit most go first.
    sites.sort_by_key(|(at, site)| (site.call as u32, *at));
    Ok(sites.into_iter().map(|(_, site)| site).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libraries::elf::Function;

    #[test]
    fn each_function_is_probed_once_and_each_name_once() {
        let function = |name: &str, at| Function {
            name: name.to_owned(),
            at,
            code: vec![0x55],
        };
        let mut library = Library {
            machine: EM_X86_64,
            functions: vec![
                function("cuLaunchKernel", 0x10),
                function("cuLaunchKernel_ptsz", 0x10),
                function("cuLaunchKernel", 0x20),
                function("cuCtxSynchronize", 0x30),
                function("other", 0x40),
            ],
            ..Library::default()
        };
        let found = sites(&library).expect("some");
        let found: Vec<_> = found
            .iter()
            .map(|site| (&*site.names, &site.place))
            .collect();
        let expected: [(&[&str], _); 2] = [
            (&["cuLaunchKernel", "cuLaunchKernel_ptsz"], &Ok(0x10)),
            (&["cuCtxSynchronize"], &Ok(0x30)),
        ];
        assert_eq!(found, expected);
        library.functions.drain(..4);
        let why = sites(&library).expect_err("no driver").to_string();
        assert!(why.contains("it has none of the functions"), "{why}");
    }
}
