// SPDX-License-Identifier: Apache-2.0
//! Which cgroup is which container, by its path?
//!
//! [`Watcher`] walks the hierarchy and tells a directory what is in it.

mod elsewhere;
mod names;
mod watcher;

use std::sync::Arc;

pub use self::{
    elsewhere::{misplaced, unplaced},
    watcher::{Bell, Watcher},
};
use super::{Found, Place, Rival};

/// Reads a cgroup's place from its path below the root of the hierarchy (`/kubepods.slice/…`).
///
/// Knows the names that the kubelet gives pods with both cgroup drivers, and the names of containers under containerd,
/// CRI-O and Docker. The outermost pod and container win: what a container nests inside is its own.
pub fn place(path: &str) -> Place {
    let Found { place, rival, .. } = found_among(path, find(path), Tree::Nested);
    match rival {
        Some(rival) if rival.is_worse => rival.otherwise,
        _ => place,
    }
}

/// What a path says, by what was found in it, on a node whose pods are in trees that are no worse.
fn found_among(path: &str, found: Option<Candidate>, worst: Tree) -> Found {
    let (place, rival) = match found {
        Some(Candidate {
            tree: Tree::Kubelet,
            place: Some(place),
            ..
        }) => return place.into(),
        Some(Candidate {
            tree,
            root,
            place: Some(place),
        }) => (Some(place), Some((tree, root))),
        _ => (None, None),
    };
    let (name, outer) = (names::name(path), names::outer(path));
    let outer = (outer != name).then(|| outer.into());
    let otherwise = Place::Unit(name.into());
    Found {
        place: place.unwrap_or_else(|| otherwise.clone()),
        rival: rival.map(|(tree, root)| Rival {
            tree,
            root: root.into(),
            otherwise,
            is_worse: tree > worst,
        }),
        outer,
    }
}

/// What a tree that looks like the kubelet's says of a cgroup in it.
struct Candidate {
    tree: Tree,
    /// The path above it.
    root: String,
    /// The pod or the container, if it is one's.
    place: Option<Place>,
}

/// What a process is charged to by its `/proc/PID/cgroup`: its pod's uid, or else its unit.
pub fn charged(cgroups: &str) -> Arc<str> {
    let mut unit_of: Arc<str> = "/".into();
    for path in cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
    {
        // In a cgroup namespace of its own the reader sees what is outside of it below as many `..` as that is deep.
        let inner = path.trim_start_matches("/..");
        let found = find(inner).or_else(|| find(&beside(inner)?).filter(|_| inner != path));
        let found = found.and_then(|found| Some((found.tree, found.place?.uid().cloned()?)));
        match found {
            Some((Tree::Kubelet, uid)) => return uid,
            Some((Tree::Nested, uid)) => return format!("{}/{uid}", names::outer(inner)).into(),
            _ => unit_of = names::outer(inner).into(),
        }
    }
    unit_of
}

/// The path of what lies beside the reader's own pod, or its level, as it is below the root.
fn beside(path: &str) -> Option<String> {
    let first = path.trim_start_matches('/').split('/').next()?;
    if first.starts_with("pod") || LEVELS.contains(&first) {
        return Some(format!("/{KUBEPODS}{path}"));
    }
    let level = match pod_slice(first) {
        Some(_) => first.rsplit_once("-pod")?.0,
        _ => first.strip_suffix(".slice")?.rsplit_once('-')?.0,
    };
    // systemd's slices: a-b-c is in a-b, which is in a.
    let ends = level
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([level.len()]);
    let above: String = ends
        .map(|end| format!("/{}.slice", &level[..end]))
        .collect();
    Some(format!("{above}{path}"))
}

/// Whose a tree is that looks like the kubelet's. Whoever may make cgroups can make one that does: the processes in it then count for
/// pods only where there is none of a better kind, or where the pods' source names both the pod and the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// Below the root of the hierarchy, below a `--cgroup-root` there, or of a service that runs pods.
    Kubelet,
    /// In another service, scope or container: Kubernetes in Docker or LXC, or what looks so.
    Nested,
    /// In the session of a user: Kubernetes without root, or what looks so.
    User,
}

/// Services in whose cgroup a kubelet or a container runtime makes those of pods.
const SERVICES: [&str; 14] = [
    "containerd.service",
    "cri-docker.service",
    "cri-o.service",
    "crio.service",
    "docker.service",
    "k0scontroller.service",
    "k0sworker.service",
    "k3s.service",
    "k3s-agent.service",
    "kubelet.service",
    "rke2-agent.service",
    "rke2-server.service",
    "snap.microk8s.daemon-containerd.service",
    "snap.microk8s.daemon-kubelite.service",
];

/// What is at the root of the hierarchy, or of a directory of it, and no `--cgroup-root`.
const OTHERS: [&str; 11] = [
    "default",
    "docker",
    "init.scope",
    "k8s.io",
    "libpod_parent",
    "lxc",
    "machine",
    "machine.slice",
    "moby",
    "system.slice",
    "user.slice",
];

impl Tree {
    /// Whose a tree is that begins below these directories.
    fn below(parts: &[&str]) -> Self {
        match parts {
            ["user.slice", ..] => Self::User,
            // Some distributions give runtimes a slice of their own.
            [slice, service] if SERVICES.contains(service) && *slice != "machine.slice" => {
                Self::Kubelet
            }
            _ if parts.iter().all(|part| is_root(part)) => Self::Kubelet,
            _ => Self::Nested,
        }
    }
}

/// Says if a directory may be a part of `--cgroup-root`.
fn is_root(part: &str) -> bool {
    let leaf = [".service", ".scope"].iter().any(|end| part.ends_with(end));
    !leaf && container_id(part).is_none() && !part.contains("lxc.") && !OTHERS.contains(&part)
}

fn candidate(above: &[&str], place: Option<Place>) -> Candidate {
    Candidate {
        tree: Tree::below(above),
        root: above.join("/"),
        place,
    }
}

/// Finds the tree that looks like the kubelet's in a path, and the pod or the container of one.
fn find(path: &str) -> Option<Candidate> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let found = |at: usize, uid, container: Option<&str>| {
        let place = match container.and_then(|part| container_of(part, &uid)) {
            Some(id) => Place::Container { uid, id },
            None => Place::Pod { uid },
        };
        Some(candidate(&parts[..at], Some(place)))
    };
    for (at, part) in parts.iter().enumerate() {
        // With mismatched drivers runc puts systemd's "slice:prefix:id" into one directory name.
        if let Some((slice, _)) = part.split_once(':')
            && let Some((root, uid)) = pod_slice(slice)
            && (root.is_empty() || root.ends_with('-'))
        {
            return found(at, uid, Some(part));
        }
        let before = at.checked_sub(1).map(|before| parts[before]);
        let Some(tree) = tree(part, before) else {
            continue;
        };
        // Of the best kind that guarantees all there is no level of its own.
        let (level, pod) = match parts.get(at + 1) {
            Some(level) if tree.is_level(level) => (*level, at + 2),
            _ => (*part, at + 1),
        };
        return match parts.get(pod).and_then(|part| tree.pod(level, part)) {
            Some(uid) => found(at, uid, parts.get(pod + 1).copied()),
            None => Some(candidate(&parts[..at], None)),
        };
    }
    None
}

/// How the directories below the kubelet's root are called.
enum Names<'a> {
    /// `kubepods`, with plain names below.
    Plain,
    /// A slice, whose name begins those of all below it.
    Slice(&'a str),
}

/// Says how the names go on below a directory that the kubelet's tree begins with. `before` is the one above it.
fn tree<'a>(part: &'a str, before: Option<&str>) -> Option<Names<'a>> {
    if let Some(name) = part.strip_suffix(".slice") {
        let above = before.and_then(|before| before.strip_suffix(".slice"));
        let own = match above {
            // systemd names a slice by all that are above it.
            Some(above) if name != KUBEPODS => name.strip_prefix(above)?.strip_prefix('-')?,
            _ => name,
        };
        return (own == KUBEPODS).then_some(Names::Slice(name));
    }
    // k3s without root puts its own name before it.
    let above = before.and_then(|before| before.strip_suffix(".slice"));
    let own = above.and_then(|above| part.strip_prefix(above)?.strip_prefix('-'));
    (part == KUBEPODS || own == Some(KUBEPODS)).then_some(Names::Plain)
}

/// The kubelet's own directory (`defaultNodeAllocatableCgroupName` of pkg/kubelet/cm).
const KUBEPODS: &str = "kubepods";

/// Classes of pods that have a directory of their own.
const LEVELS: [&str; 2] = ["burstable", "besteffort"];

impl Names<'_> {
    fn is_level(&self, part: &str) -> bool {
        match self {
            Self::Plain => LEVELS.contains(&part),
            Self::Slice(root) => {
                let level = part
                    .strip_prefix(root)
                    .and_then(|rest| rest.strip_prefix('-'));
                let level = level.and_then(|level| level.strip_suffix(".slice"));
                level.is_some_and(|level| LEVELS.contains(&level))
            }
        }
    }

    /// The uid of a pod's directory in a level's, or in the root.
    fn pod(&self, level: &str, part: &str) -> Option<Arc<str>> {
        match self {
            Self::Plain => uid(part.strip_prefix("pod")?),
            Self::Slice(_) => {
                let rest = part.strip_prefix(level.strip_suffix(".slice")?)?;
                uid(rest.strip_prefix("-pod")?.strip_suffix(".slice")?)
            }
        }
    }
}

/// What stands before the kubelet's root in the name of a pod's slice, and the pod's uid.
fn pod_slice(name: &str) -> Option<(&str, Arc<str>)> {
    let (level, rest) = name.strip_suffix(".slice")?.rsplit_once("-pod")?;
    let ends = LEVELS.map(|name| {
        level
            .strip_suffix(name)
            .and_then(|level| level.strip_suffix('-'))
    });
    let root = ends.into_iter().flatten().next().unwrap_or(level);
    Some((root.strip_suffix(KUBEPODS)?, uid(rest)?))
}

/// A pod's uid as a name of a directory has it: a UUID, or of a static pod the 32 hexadecimal digits of a hash.
fn uid(text: &str) -> Option<Arc<str>> {
    let uid = text.replace('_', "-");
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    (digits == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')).then(|| uid.into())
}

/// The id of a container by its directory in that of a pod.
fn container_of(part: &str, pod: &Arc<str>) -> Option<Arc<str>> {
    match part.split(':').collect::<Vec<_>>()[..] {
        [slice, _, id] => {
            let (_, of) = pod_slice(slice)?;
            container_id(id).filter(|_| of == *pod)
        }
        _ => container_id(part),
    }
}

/// Hexadecimal digits of a container's id.
const CONTAINER_ID: usize = 64;

/// The id in a container's directory name: `cri-containerd-<id>.scope`, `crio-<id>`, `docker-<id>.scope`, `<id>` …
///
/// CRI-O's `crio-conmon-<id>` is the container's monitor and runs outside of it.
fn container_id(part: &str) -> Option<Arc<str>> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = name.rsplit_once('-').unwrap_or(("", name));
    let monitor = prefix.ends_with("conmon");
    (!monitor && id.len() == CONTAINER_ID && id.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| id.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f";
    const ID: &str = "8b1f0e7c6d5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c";

    fn container() -> Place {
        Place::Container {
            uid: UID.into(),
            id: ID.into(),
        }
    }

    #[test]
    fn a_container_is_found_under_every_driver_and_runtime() {
        let slice = UID.replace('-', "_");
        for path in [
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/crio-{ID}.scope"),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/docker-{ID}.scope"
            ),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/libpod-{ID}.scope"
            ),
            format!("/kubepods/burstable/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            format!("/kubepods/besteffort/pod{UID}/crio-{ID}"),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{slice}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubelet/kubepods/burstable/pod{UID}/{ID}"),
            format!(
                "/system.slice/containerd.service/kubepods-burstable-pod{slice}.slice:cri-containerd:{ID}"
            ),
        ] {
            assert_eq!(place(&path), container(), "{path}");
            assert_eq!(
                place(&format!("{path}/init.scope")),
                container(),
                "nested in {path}"
            );
            assert_eq!(
                place(&format!("{path}/docker/{}", "f".repeat(64))),
                container(),
                "docker inside {path}"
            );
        }
    }

    #[test]
    fn a_static_pod_has_a_hash_for_a_uid() {
        let hash = "3a7bd3e2360a3d29eea436fcfb7e44c7";
        let path = format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{hash}.slice/crio-{ID}.scope"
        );
        assert_eq!(
            place(&path),
            Place::Container {
                uid: hash.into(),
                id: ID.into()
            }
        );
    }

    #[test]
    fn a_pod_without_a_container_is_the_pod() {
        let slice = UID.replace('-', "_");
        for path in [
            format!("/kubepods.slice/kubepods-pod{slice}.slice"),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/crio-conmon-{ID}.scope"),
            format!("/kubepods/pod{UID}"),
        ] {
            assert_eq!(place(&path), Place::Pod { uid: UID.into() }, "{path}");
        }
    }

    #[test]
    fn a_process_belongs_to_its_pod_or_to_its_unit() {
        let of_slice = format!("kubepods-pod{}.slice", UID.replace('-', "_"));
        let burstable = of_slice.replace("-pod", "-burstable-pod");
        let container = format!("cri-containerd-{ID}.scope");
        let nested = format!("docker-{ID}.scope/{UID}");
        let of_nobody = format!("pod{UID}");
        for (text, pod) in [
            (format!("0::/kubepods.slice/{of_slice}/{container}\n"), UID),
            (format!("0::/kubepods.slice/{of_slice}\n"), UID),
            (format!("5:memory:/kubepods/pod{UID}/x\n0::/\n"), UID),
            (format!("0::/../../{burstable}/{container}\n"), UID),
            (format!("0::/../../{of_slice}/{container}\n"), UID),
            (
                format!("0::/../../../kubepods-burstable.slice/{burstable}/{container}\n"),
                UID,
            ),
            (format!("0::/../../pod{UID}/{ID}\n"), UID),
            (format!("0::/../../../burstable/pod{UID}/{ID}\n"), UID),
            (format!("0::/../../kubelet-{burstable}/{container}\n"), UID),
            (format!("0::/pod{UID}/{ID}\n"), &of_nobody),
            (
                format!(
                    "0::/../../../../user.slice/user-1000.slice/user@1000.service/kubepods/pod{UID}/{ID}\n"
                ),
                "user@1000.service",
            ),
            (
                format!("0::/system.slice/docker-{ID}.scope/kubepods/pod{UID}/{ID}\n"),
                &nested,
            ),
            ("0::/system.slice/ssh.service\n".to_owned(), "ssh.service"),
            ("0::/\n".to_owned(), "/"),
            (String::new(), "/"),
        ] {
            assert_eq!(&*charged(&text), pod, "{text}");
        }
    }

    /// Whoever may make cgroups cannot make a pod's.
    #[test]
    fn a_tree_counts_where_it_begins_like_the_kubelets() {
        let slice = UID.replace('-', "_");
        let plain = format!("pod{UID}/{ID}");
        for path in [
            format!("/my-kubepods-copy/{plain}"),
            format!("/kubepods-copy/{plain}"),
            format!("/kubepods.slice.d/kubepods-pod{slice}.slice/{ID}"),
            format!("/kubepods.slice/other-pod{slice}.slice/{ID}"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod{slice}.slice/{ID}"
            ),
            format!("/kubepods/system/{plain}"),
            format!("/kubepods/burstable/besteffort/{plain}"),
            format!("/other.slice/kubepods.slice/x/{plain}"),
            format!("/a.slice/b-kubepods.slice/b-kubepods-pod{slice}.slice/{ID}"),
            format!("/user.slice/user-1000.slice/user@1000.service/kubepods/{plain}"),
            format!(
                "/user.slice/user-1000.slice/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/other-kubepods-x-pod{slice}.slice:cri-containerd:{ID}"),
        ] {
            assert!(matches!(place(&path), Place::Unit(_)), "{path}");
        }
        let tree = |path: &str| find(path).expect("looks like it").tree;
        for (path, expected) in [
            ("/kubepods.slice", Tree::Kubelet),
            ("/kubelet/kubepods", Tree::Kubelet),
            (
                "/system.slice/k3s.service/kubepods/burstable",
                Tree::Kubelet,
            ),
            ("/system.slice/jenkins.service/kubepods", Tree::Nested),
            ("/docker/abc/kubepods", Tree::Nested),
            ("/lxc.payload.x/kubepods", Tree::Nested),
            (
                "/user.slice/user-1000.slice/user@1000.service/k3s.slice/k3s-kubepods",
                Tree::User,
            ),
        ] {
            assert_eq!(tree(path), expected, "{path}");
        }
    }

    #[test]
    fn what_only_looks_like_a_pod_is_the_host() {
        for (path, name) in [
            ("/", "/"),
            ("/kubepods.slice", "kubepods.slice"),
            ("/kubepods/burstable", "kubepods/burstable"),
            ("/kubepods/podman", "kubepods/podman"),
            ("/system.slice/ssh.service", "ssh.service"),
            ("/system.slice/ssh.service/deeper", "ssh.service/deeper"),
            (
                "/user.slice/user-1000.slice/session-3.scope",
                "session-3.scope",
            ),
            (
                "/system.slice/slurmstepd.scope/job_12/step_0/user/task_0",
                "job_12/step_0",
            ),
            ("/lossy", "lossy"),
        ] {
            assert_eq!(place(path), Place::Unit(name.into()), "{path}");
        }
        let outside = format!("/user.slice/pod{UID}/{ID}");
        assert_eq!(
            place(&outside),
            Place::Unit(outside[1..].into()),
            "a pod lives below kubepods"
        );
    }
}
