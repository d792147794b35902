// SPDX-License-Identifier: Apache-2.0
//! Are containers in another hierarchy than the one that is followed, and what is to be done?

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{find, watcher::children};
use crate::kernel::Hierarchy;

/// Directories of a hierarchy in which pods are looked for.
const LOOKED_AT: usize = 4096;

/// What brings containers into the hierarchy of version 2.
const REMEDY: &str = "boot with systemd.unified_cgroup_hierarchy=1, or have the kubelet and the runtime use the systemd cgroup driver";

/// What it means that so many pods run by their source, and that none of their containers is in the hierarchy: one line with what to do.
/// `None` where it has another trouble.
pub fn misplaced(hierarchy: &Hierarchy, pods: usize) -> Option<String> {
    let Hierarchy::V2 { root, whole: true } = hierarchy else {
        return None;
    };
    let what = match with_pods() {
        Some(place) => format!(
            "they are in that of cgroup v1 at {}: {REMEDY}",
            place.display()
        ),
        None => {
            "if they run on this node, name the hierarchy that they are in with --path.cgroupfs"
                .to_owned()
        }
    };
    Some(format!(
        "{pods} running pods are listed and none of their containers is in the cgroup hierarchy at {}, so every count is the host's: {what}",
        root.display()
    ))
}

/// The same of a hierarchy that has no pods, if another has.
pub fn unplaced(root: &Path) -> Option<String> {
    let place = with_pods()?;
    Some(format!(
        "v2 at {}, which has no pods; those at {} are in cgroup v1 alone, so every count is the host's: {REMEDY}",
        root.display(),
        place.display()
    ))
}

/// A hierarchy of version 1 that has pods.
fn with_pods() -> Option<PathBuf> {
    let has = |point: &PathBuf| has_pods(point, "", &mut { LOOKED_AT }).unwrap_or(false);
    Hierarchy::of_controllers().find(has)
}

/// Says if there is a pod below a directory.
fn has_pods(root: &Path, path: &str, left: &mut usize) -> io::Result<bool> {
    if find(path).is_some_and(|found| found.place.is_some()) {
        return Ok(true);
    }
    let mut names = children(root, path)?;
    // Who makes many others does not hide them.
    names.sort_by_key(|name| !name.contains("kube"));
    for name in names {
        if *left == 0 {
            break;
        }
        *left -= 1;
        if has_pods(root, &format!("{path}/{name}"), left).unwrap_or(false) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn pods_are_found_in_a_hierarchy_of_version_1() {
        let folder = tempfile::tempdir().expect("a folder");
        let has = || has_pods(folder.path(), "", &mut 100).expect("readable");
        let make = |path: &str| fs::create_dir_all(folder.path().join(path)).expect("made");
        make("system.slice/kubelet.service");
        make("kubepods/burstable");
        assert!(!has());
        make("kubepods/burstable/pod0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f");
        assert!(has());
        let few = has_pods(folder.path(), "", &mut 2);
        assert!(!few.expect("readable"), "it gives up");
    }
}
