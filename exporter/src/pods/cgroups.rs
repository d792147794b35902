// SPDX-License-Identifier: Apache-2.0
//! Which cgroup id is which container?
//!
//! Walks the cgroup v2 hierarchy and watches it by inotify. A cgroup's id is its directory's inode number
//! (`cgroup_id()`, include/linux/cgroup.h: `cgrp->kn->id`; kernfs shows it as `st_ino`). A walk repeats every
//! [`WALK`] and whenever an event names a cgroup that is not known, so a lost inotify event costs a second, not a pod.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Place, Pods};

/// Time between two full walks: the safety net under inotify.
const WALK: Duration = Duration::from_secs(60);

/// The same where inotify has no watches left.
const WALK_UNWATCHED: Duration = Duration::from_secs(5);

/// Least time between two walks that unknown ids ask for.
const WALK_ASKED: Duration = Duration::from_secs(1);

/// Levels below the root that are walked. systemd nests 5 deep and a container inside a container doubles that.
const DEPTH: usize = 32;

/// Reads a cgroup's place from its path below the root of the hierarchy (`/kubepods.slice/…`).
///
/// Knows the names that the kubelet gives pods with both cgroup drivers, and the names of containers under containerd,
/// CRI-O and Docker. The outermost pod and container win: what a container nests inside is its own.
pub fn place(path: &str) -> Place {
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    let mut in_pods = false;
    let mut walked = Vec::new();
    while let Some(part) = parts.next() {
        // With mismatched drivers runc puts systemd's "slice:prefix:id" into one directory name.
        let (slice, container) = match part.split(':').collect::<Vec<_>>()[..] {
            [slice, _, id] => (slice, Some(id)),
            _ => (part, None),
        };
        in_pods |= slice.contains("kubepods");
        if in_pods && let Some(uid) = pod_uid(slice) {
            let id = container
                .and_then(container_id)
                .or_else(|| parts.next().and_then(container_id));
            return match id {
                Some(id) => Place::Container { uid, id },
                None => Place::Pod { uid },
            };
        }
        walked.push(part);
    }
    Place::Unit(unit(&walked).into())
}

/// The uid in a pod's directory name: `kubepods-burstable-pod<uid with _>.slice` or `pod<uid>`.
fn pod_uid(part: &str) -> Option<Arc<str>> {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let uid = match name.rfind("-pod") {
        Some(at) if name.contains("kubepods") => name.get(at + 4..)?,
        _ => name.strip_prefix("pod")?,
    };
    // A uid is a UUID; that of a static pod is the 32 hexadecimal digits of a hash.
    let uid = uid.replace('_', "-");
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    (digits == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')).then(|| uid.into())
}

/// The id in a container's directory name: `cri-containerd-<id>.scope`, `crio-<id>`, `docker-<id>.scope`, `<id>` …
///
/// CRI-O's `crio-conmon-<id>` is the container's monitor and runs outside of it.
fn container_id(part: &str) -> Option<Arc<str>> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = name.rsplit_once('-').unwrap_or(("", name));
    let monitor = prefix.ends_with("conmon");
    (!monitor && id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.into())
}

/// What a host without Kubernetes calls a cgroup: the outermost systemd unit that is not a slice, else the innermost
/// directory. A Slurm step is named with its job, since `step_0` alone says nothing.
fn unit(parts: &[&str]) -> String {
    if let Some(at) = parts.iter().position(|part| part.starts_with("job_")) {
        return parts
            .iter()
            .skip(at)
            .take(2)
            .copied()
            .collect::<Vec<_>>()
            .join("/");
    }
    let leaf = |part: &&&str| {
        [".service", ".scope", ".socket", ".mount", ".swap"]
            .iter()
            .any(|end| part.ends_with(end))
    };
    parts
        .iter()
        .find(leaf)
        .or(parts.last())
        .copied()
        .unwrap_or("/")
        .to_owned()
}

/// Asks the watcher for a walk; cheap, and never waits for it.
#[derive(Clone, Debug)]
pub struct Bell {
    rung: Arc<AtomicBool>,
    wake: Arc<rustix::fd::OwnedFd>,
}

impl Bell {
    /// Asks for a walk soon.
    pub fn ring(&self) {
        self.rung.store(true, Ordering::Relaxed);
        // A full eventfd is one that the watcher has yet to read.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Walks and watches one hierarchy into a directory.
#[derive(Debug)]
pub struct Watcher {
    root: PathBuf,
    pods: Arc<Pods>,
    bell: Bell,
    inotify: Option<Inotify>,
    watches: Option<Watches>,
    /// Watched directories, relative to the root.
    dirs: HashMap<WatchDescriptor, String>,
    /// What is at a path, so that a removal, which only has a name, finds the id.
    seen: HashMap<String, Seen>,
}

#[derive(Debug)]
struct Seen {
    id: u64,
    watch: Option<WatchDescriptor>,
}

impl Watcher {
    /// Prepares to watch the hierarchy mounted at `root` and walks it once.
    ///
    /// Where inotify has no instance left (`fs.inotify.max_user_instances`), walks replace it.
    pub fn new(root: PathBuf, pods: Arc<Pods>) -> anyhow::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context("create an eventfd")?;
        let inotify = Inotify::init()
            .inspect_err(|error| {
                tracing::warn!("no inotify for cgroups ({error}): walking every {WALK_UNWATCHED:?}")
            })
            .ok();
        let watches = inotify.as_ref().map(Inotify::watches);
        let bell = Bell {
            rung: Arc::default(),
            wake: Arc::new(wake),
        };
        let mut watcher = Self {
            root,
            pods,
            bell,
            inotify,
            watches,
            dirs: HashMap::new(),
            seen: HashMap::new(),
        };
        watcher
            .walk()
            .with_context(|| format!("walk the cgroups below {}", watcher.root.display()))?;
        Ok(watcher)
    }

    /// Returns the handle that asks for walks.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Follows the hierarchy until the process ends. Blocks: give it a thread.
    pub fn run(mut self) {
        let mut walked = Instant::now();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let period = if self.watches.is_some() {
                WALK
            } else {
                WALK_UNWATCHED
            };
            self.wait(period.saturating_sub(walked.elapsed()));
            self.drain(&mut buffer);
            let asked = self.bell.rung.swap(false, Ordering::Relaxed);
            if asked && walked.elapsed() < WALK_ASKED {
                std::thread::sleep(WALK_ASKED.saturating_sub(walked.elapsed()));
            }
            if asked || walked.elapsed() >= period {
                if let Err(error) = self.walk() {
                    tracing::warn!(
                        "cannot walk the cgroups below {}: {error}",
                        self.root.display()
                    );
                }
                walked = Instant::now();
            }
        }
    }

    fn wait(&self, time: Duration) {
        let timeout = Timespec {
            tv_sec: time.as_secs().min(3600) as i64,
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.bell.wake.as_fd(),
            PollFlags::IN,
        )];
        if let Some(inotify) = &self.inotify {
            fds.push(PollFd::from_borrowed_fd(inotify.as_fd(), PollFlags::IN));
        }
        // An interrupted wait is an early walk at worst.
        let _ = poll(&mut fds, Some(&timeout));
        let _ = rustix::io::read(&*self.bell.wake, &mut [0u8; 8]);
    }

    fn drain(&mut self, buffer: &mut [u8]) {
        let Some(mut inotify) = self.inotify.take() else {
            return;
        };
        loop {
            let events = match inotify.read_events(buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!("cannot read inotify events: {error}");
                    break;
                }
            };
            let mut any = false;
            for event in events {
                any = true;
                self.apply(&event.wd, event.mask, event.name);
            }
            if !any {
                break;
            }
        }
        self.inotify = Some(inotify);
    }

    fn apply(&mut self, wd: &WatchDescriptor, mask: EventMask, name: Option<&OsStr>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.bell.rung.store(true, Ordering::Relaxed);
        } else if mask.contains(EventMask::IGNORED) {
            self.dirs.remove(wd);
        } else if mask.contains(EventMask::ISDIR)
            && let (Some(dir), Some(name)) = (self.dirs.get(wd), name)
        {
            let path = format!("{dir}/{}", name.to_string_lossy());
            if mask.contains(EventMask::DELETE) {
                if let Some(gone) = self.seen.remove(&path) {
                    self.pods.cgroup_gone(gone.id, Instant::now());
                    self.unwatch(gone.watch);
                }
            } else {
                let depth = path.matches('/').count();
                // Gone already: the removal is the next event.
                let _ = self.visit(path, depth, &mut HashSet::new());
            }
        }
    }

    fn walk(&mut self) -> io::Result<()> {
        let mut met = HashSet::new();
        self.visit(String::new(), 0, &mut met)?;
        let gone: Vec<_> = self
            .seen
            .extract_if(|_, seen| !met.contains(&seen.id))
            .collect();
        for (_, gone) in gone {
            self.unwatch(gone.watch);
        }
        self.pods.cgroups_walked(&met, Instant::now());
        Ok(())
    }

    /// Notes one cgroup and everything below it. The watch is set before the children are listed, so a child that
    /// appears meanwhile is seen twice rather than never.
    fn visit(&mut self, path: String, depth: usize, met: &mut HashSet<u64>) -> io::Result<()> {
        let full = full(&self.root, &path);
        let id = fs::metadata(&full)?.ino();
        met.insert(id);
        if self.seen.get(&path).is_none_or(|seen| seen.id != id) {
            let watch = self.watch(&full, &path);
            if let Some(gone) = self.seen.insert(path.clone(), Seen { id, watch }) {
                self.unwatch(gone.watch);
            }
        }
        self.pods.cgroup_found(id, place(&path));
        if depth == DEPTH {
            return Ok(());
        }
        for entry in fs::read_dir(&full)? {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let child = format!("{path}/{}", entry.file_name().to_string_lossy());
                match self.visit(child, depth + 1, met) {
                    // Removed between the listing and the look.
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    fn watch(&mut self, full: &Path, path: &str) -> Option<WatchDescriptor> {
        let watches = self.watches.as_mut()?;
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        match watches.add(full, mask) {
            Ok(wd) => {
                self.dirs.insert(wd.clone(), path.to_owned());
                Some(wd)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(
                    "cannot watch more cgroups ({error}; see fs.inotify.max_user_watches): walking every {WALK_UNWATCHED:?}"
                );
                self.watches = None;
                None
            }
        }
    }

    /// The kernel keeps the watch of a removed cgroup: kernfs leaves the inode its links, so inotify never learns of its
    /// end (6.18). Without this, every pod would cost some of `fs.inotify.max_user_watches`.
    fn unwatch(&mut self, watch: Option<WatchDescriptor>) {
        if let Some(watch) = watch {
            self.dirs.remove(&watch);
            if let Some(watches) = &mut self.watches {
                // Refused where the kernel did remove it.
                let _ = watches.remove(watch);
            }
        }
    }
}

fn full(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
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
    fn what_only_looks_like_a_pod_is_the_host() {
        for (path, name) in [
            ("/", "/"),
            ("/kubepods.slice", "kubepods.slice"),
            ("/kubepods/burstable", "burstable"),
            ("/kubepods/podman", "podman"),
            ("/system.slice/ssh.service", "ssh.service"),
            ("/system.slice/ssh.service/deeper", "ssh.service"),
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
            Place::Unit(ID.into()),
            "a pod lives below kubepods"
        );
    }
}
