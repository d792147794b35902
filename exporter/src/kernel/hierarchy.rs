// SPDX-License-Identifier: Apache-2.0
//! Where is the cgroup hierarchy, and does it have the containers?

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::statfs;

use crate::pods::{Place, cgroups::place};

/// Which cgroup hierarchies this host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// cgroup v2 is mounted here. `whole` is false where the mount shows only a part (a cgroup namespace).
    V2 {
        /// The mount point.
        root: PathBuf,
        /// Whether the mount shows the hierarchy from its root.
        whole: bool,
    },
    /// Only cgroup v1 is mounted: sockets and tasks have no cgroup id that means anything.
    V1,
    /// No cgroup file system is mounted.
    Absent,
    /// The place that the user named is not where cgroup v2 is mounted.
    Wrong(PathBuf),
}

impl Hierarchy {
    /// Finds the hierarchy in a `mountinfo` (proc(5)).
    pub fn find(mountinfo: &str) -> Self {
        Self::among(&mounts(mountinfo), |mount| mount.whole)
    }

    /// Takes of these mounts the first that is whole, or else the first that shows a part.
    fn among(mounts: &[Mount], is_whole: impl Fn(&Mount) -> bool) -> Self {
        let second = |mount: &&Mount| mount.second;
        let whole = mounts.iter().filter(second).find(|mount| is_whole(mount));
        match (whole, mounts.iter().find(second)) {
            (Some(mount), _) => Self::V2 {
                root: mount.point.clone(),
                whole: true,
            },
            (None, Some(mount)) => Self::V2 {
                root: mount.point.clone(),
                whole: false,
            },
            (None, None) if !mounts.is_empty() => Self::V1,
            (None, None) => Self::Absent,
        }
    }

    /// Finds the hierarchy of this host, or takes the given mount point.
    pub fn of_host(given: Option<&Path>) -> Self {
        match given {
            // Every folder of a cgroup v2 hierarchy has this file, the root included; any other could be walked as well.
            Some(root) if !root.join("cgroup.controllers").is_file() => {
                Self::Wrong(root.to_owned())
            }
            Some(root) => Self::V2 {
                root: root.to_owned(),
                whole: is_root(root) != Some(false),
            },
            None => Self::among(&mounts(&mountinfo()), |mount| {
                is_root(&mount.point).unwrap_or(mount.whole)
            }),
        }
    }

    /// Where there are pods in another hierarchy of this host: a controller's of version 1, which a container is in as well.
    pub fn pods_elsewhere() -> Option<PathBuf> {
        let all = mounts(&mountinfo()).into_iter();
        let mut first = all.filter(|mount| !mount.second).map(|mount| mount.point);
        first.find(|point| has_pods(point, "", 0, &mut { LOOKED_AT }))
    }

    /// What it means that so many pods are listed and none of their containers is in this hierarchy: one line with what to do.
    pub fn misplaced(&self, pods: usize) -> Option<String> {
        let Self::V2 { root, whole: true } = self else {
            return None;
        };
        let what = match Self::pods_elsewhere() {
            Some(place) => format!(
                "they are in that of cgroup v1 at {}: boot with systemd.unified_cgroup_hierarchy=1, or have the kubelet and the \
                 runtime use the systemd cgroup driver",
                place.display()
            ),
            None => {
                "if they run on this node, name the hierarchy that they are in with --path.cgroupfs"
                    .to_owned()
            }
        };
        Some(format!(
            "{pods} running pods are listed and none of their containers is in the cgroup hierarchy at {}, so every count is the host's: \
             {what}",
            root.display()
        ))
    }

    /// What this means for attribution, where it is not whole: one line with what to do.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::V2 { whole: true, .. } => None,
            Self::V2 { root, whole: false } => Some(format!(
                "{} shows only a part of the cgroup hierarchy (a cgroup namespace): mount the host's and name it with \
                 --path.cgroupfs",
                root.display()
            )),
            Self::V1 => Some(
                "only cgroup v1 is mounted, so nothing can be attributed to pods and every count is the host's: boot with \
                 systemd.unified_cgroup_hierarchy=1"
                    .to_owned(),
            ),
            Self::Wrong(root) => Some(format!(
                "{} is not where cgroup v2 is mounted, so nothing can be attributed to pods: name the place with --path.cgroupfs",
                root.display()
            )),
            Self::Absent => Some(
                "no cgroup file system is mounted, so nothing can be attributed to pods: mount cgroup2 at /sys/fs/cgroup \
                 or name it with --path.cgroupfs"
                    .to_owned(),
            ),
        }
    }
}

/// A mounted hierarchy.
struct Mount {
    point: PathBuf,
    /// Whether it is of version 2.
    second: bool,
    /// Whether it is mounted from its root on, as far as the reader's cgroup namespace shows.
    whole: bool,
}

fn mountinfo() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
}

/// The hierarchies in a `mountinfo`.
fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let second = match right.split(' ').next()? {
            "cgroup2" => true,
            "cgroup" => false,
            _ => return None,
        };
        Some(Mount {
            point: PathBuf::from(unescape(point)),
            second,
            whole: root == "/",
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// `CGROUP2_SUPER_MAGIC` (include/uapi/linux/magic.h).
const CGROUP2: u64 = 0x6367_7270;

/// The inode of a hierarchy's root: kernfs numbers its nodes from 1.
const ROOT: u64 = 1;

/// Says if a mount of cgroup v2 shows the hierarchy from its root on. In a cgroup namespace a part looks whole in `mountinfo`, and the
/// whole like a part. `None` if it is no such mount, or cannot be looked at.
fn is_root(point: &Path) -> Option<bool> {
    let found = statfs(point).ok()?;
    let root = fs::metadata(point).ok()?;
    (found.f_type as u64 == CGROUP2).then(|| root.ino() == ROOT)
}

/// Directories of a hierarchy in which pods are looked for, and how deep.
const LOOKED_AT: usize = 4096;
const DEPTH: usize = 16;

/// Says if there is a pod below a directory.
fn has_pods(root: &Path, path: &str, depth: usize, left: &mut usize) -> bool {
    if matches!(place(path), Place::Pod { .. } | Place::Container { .. }) {
        return true;
    }
    let Ok(entries) = fs::read_dir(root.join(path.trim_start_matches('/'))) else {
        return false;
    };
    let folders = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut names: Vec<_> = folders
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    // Who makes many others does not hide them.
    names.sort_by_key(|name| !name.contains("kube"));
    for name in names {
        if *left == 0 || depth == DEPTH {
            return false;
        }
        *left -= 1;
        if has_pods(root, &format!("{path}/{name}"), depth + 1, left) {
            return true;
        }
    }
    false
}

/// Undoes the octal escapes of `mountinfo`.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (escape, plain)| {
            text.replace(escape, plain)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_on_every_kind_of_host() {
        let v2 = "29 1 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            Hierarchy::find(v2),
            Hierarchy::V2 {
                root: "/sys/fs/cgroup".into(),
                whole: true
            }
        );
        let hybrid = "30 1 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 1 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            Hierarchy::find(hybrid),
            Hierarchy::V2 {
                root: "/sys/fs/cgroup/unified".into(),
                whole: true
            }
        );
        let part = "31 1 0:28 /kubepods/pod1 /sys/fs/cgroup rw shared:3 - cgroup2 cgroup2 rw\n\
                    32 1 0:28 / /host/cgroup\\040two rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            Hierarchy::find(part),
            Hierarchy::V2 {
                root: "/host/cgroup two".into(),
                whole: true
            }
        );
        let v1 = "30 1 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(Hierarchy::find(v1), Hierarchy::V1);
        assert_eq!(Hierarchy::find("garbage\n - \n"), Hierarchy::Absent);
        assert!(
            Hierarchy::V1
                .trouble()
                .is_some_and(|text| text.contains("cgroup v1"))
        );
    }

    #[test]
    fn pods_are_found_in_a_hierarchy_of_version_1() {
        let folder = tempfile::tempdir().expect("a folder");
        let has = || has_pods(folder.path(), "", 0, &mut 100);
        let make = |path: &str| fs::create_dir_all(folder.path().join(path)).expect("made");
        make("system.slice/kubelet.service");
        make("kubepods/burstable");
        assert!(!has());
        make("kubepods/burstable/pod0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f");
        assert!(has());
        assert!(!has_pods(folder.path(), "", 0, &mut 2), "it gives up");
    }
}
