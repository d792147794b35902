// SPDX-License-Identifier: Apache-2.0
//! Where is the cgroup hierarchy?

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::statfs;

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

    /// Where controllers of version 1 are mounted.
    pub fn of_controllers() -> impl Iterator<Item = PathBuf> {
        let all = mounts(&mountinfo()).into_iter();
        all.filter(|mount| !mount.second).map(|mount| mount.point)
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
}
