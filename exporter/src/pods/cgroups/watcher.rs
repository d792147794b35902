// SPDX-License-Identifier: Apache-2.0
//! Which cgroups are there, and which ids have they?
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

use super::{Candidate, Tree, find, found_among};
use crate::pods::Pods;

/// Time between two full walks: the safety net under inotify.
const WALK: Duration = Duration::from_secs(60);

/// The same where inotify has no watches left.
const WALK_UNWATCHED: Duration = Duration::from_secs(5);

/// Least time between two walks that unknown ids ask for.
const WALK_ASKED: Duration = Duration::from_secs(1);

/// Least time between two tellings that cgroups have come: each looks at all of them.
const MET: Duration = Duration::from_millis(200);

/// Levels below the root that are walked. systemd nests 5 deep and a container inside a container doubles that.
const DEPTH: usize = 32;

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
    /// The best kind of tree that pods have been found in.
    tree: Tree,
    /// Whether cgroups have come that nobody has been told of.
    has_new: bool,
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
            tree: Tree::User,
            has_new: false,
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
        let mut met = walked;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let period = if self.watches.is_some() {
                WALK
            } else {
                WALK_UNWATCHED
            };
            let mut time = period.saturating_sub(walked.elapsed());
            if self.has_new {
                time = time.min(MET.saturating_sub(met.elapsed()));
            }
            self.wait(time);
            self.drain(&mut buffer);
            if self.has_new && met.elapsed() >= MET {
                self.has_new = false;
                self.pods.cgroups_met();
                met = Instant::now();
            }
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
                // Gone already: the removal is the next event.
                let _ = self.visit(path, &mut HashSet::new());
            }
        }
    }

    fn walk(&mut self) -> io::Result<()> {
        let mut met = HashSet::new();
        // Before anything is taken for a pod.
        self.tree = best_tree(&self.root, "")?;
        self.visit(String::new(), &mut met)?;
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
    fn visit(&mut self, path: String, met: &mut HashSet<u64>) -> io::Result<()> {
        let full = full(&self.root, &path);
        let id = fs::metadata(&full)?.ino();
        met.insert(id);
        if self.seen.get(&path).is_none_or(|seen| seen.id != id) {
            self.has_new = true;
            let watch = self.watch(&full, &path);
            if let Some(gone) = self.seen.insert(path.clone(), Seen { id, watch }) {
                self.unwatch(gone.watch);
            }
        }
        let found = find(&path);
        if let Some(Candidate {
            tree,
            place: Some(_),
            ..
        }) = found
            && tree < self.tree
        {
            // What was taken for pods in a worse one is looked at again.
            self.tree = tree;
            self.bell.rung.store(true, Ordering::Relaxed);
        }
        self.pods
            .cgroup_found(id, found_among(&path, found, self.tree));
        for child in children(&self.root, &path)? {
            match self.visit(format!("{path}/{child}"), met) {
                // Removed between the listing and the look.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => {}
                other => other?,
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

/// The best kind of tree in which there are pods.
fn best_tree(root: &Path, path: &str) -> io::Result<Tree> {
    let mut best = match find(path) {
        Some(Candidate {
            tree,
            place: Some(_),
            ..
        }) => return Ok(tree),
        _ => Tree::User,
    };
    for child in children(root, path)? {
        match best_tree(root, &format!("{path}/{child}")) {
            Ok(tree) => best = best.min(tree),
            // Removed between the listing and the look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(best)
}

/// The cgroups in one, as deep as is looked.
pub(super) fn children(root: &Path, path: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    if path.matches('/').count() >= DEPTH {
        return Ok(names);
    }
    for entry in fs::read_dir(full(root, path))? {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

fn full(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{Record, Resolution, Source, file};

    const UID: &str = "0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f";
    const ID: &str = "8b1f0e7c6d5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c";

    /// Where the kubelet has a tree, what looks like one elsewhere is none; where it has none, that is its own.
    #[test]
    fn the_best_tree_of_a_node_is_the_kubelets() {
        let folder = tempfile::tempdir().expect("a folder");
        let make = |path: String| {
            let path = folder.path().join(path);
            fs::create_dir_all(&path).expect("made");
            fs::metadata(path).expect("there").ino()
        };
        let own = "user.slice/user-1000.slice/user@1000.service/k3s.slice/k3s-kubepods";
        let of_user = make(format!("{own}/pod{UID}/{ID}"));
        let pods = Arc::new(Pods::new(&Source::Kube, Duration::from_secs(300)));
        let record = serde_json::json!({
            "metadata": {"namespace": "ml", "name": "a", "uid": UID},
            "status": {"containerStatuses": [{
                "name": "main", "containerID": format!("containerd://{ID}"),
                "image": "", "imageID": "", "ready": true, "restartCount": 0,
            }], "phase": "Running"},
        });
        let record = serde_json::from_value(record).expect("a pod");
        pods.pod_found(Record::of(&record).expect("named"), Instant::now());
        let mut watcher = Watcher::new(folder.path().into(), Arc::clone(&pods)).expect("watches");
        let owner = |id| match pods.view().resolve(id) {
            Resolution::Owner(owner) => owner.labels.container.to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(owner(of_user), "main", "the only one that there is");
        let nested = make(format!(
            "system.slice/docker-{ID}.scope/kubepods/pod{UID}/{ID}"
        ));
        watcher.walk().expect("walked");
        assert_eq!((&*owner(nested), &*owner(of_user)), ("main", "Host"));
        // What a former kubelet has left behind is none.
        make("kubepods.slice/kubepods-burstable.slice".to_owned());
        watcher.walk().expect("walked");
        assert_eq!((&*owner(nested), &*owner(of_user)), ("main", "Host"));
        make("kubepods.slice/kubepods-pod00000000_1111_4222_8333_444444444444.slice".to_owned());
        watcher.walk().expect("walked");
        assert_eq!(
            (&*owner(nested), &*owner(of_user)),
            ("main", "Host"),
            "the source names the container, and no better tree has the pod"
        );
        let other = "9".repeat(64);
        let unlisted = make(format!("docker/x/kubepods/pod{UID}/{other}"));
        let slice = UID.replace('-', "_");
        make(format!("kubepods.slice/kubepods-pod{slice}.slice"));
        watcher.walk().expect("walked");
        assert_eq!((&*owner(nested), &*owner(unlisted)), ("Host", "Host"));
    }
    /// Kubernetes in Docker, in a service, without root, in LXC; names of crun and of mismatched drivers; all on one node.
    #[test]
    fn pods_are_found_wherever_their_kubelet_runs() {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/odd-pod-paths");
        let paths = fs::read_to_string(case.join("paths.txt")).expect("a case");
        let records = file::read(&case.join("pods.json")).expect("a list");
        let all: Vec<_> = paths.lines().filter(|line| line.starts_with('/')).collect();
        assert_eq!(all.len(), records.len());
        // Each alone, and all together.
        let alone = all.iter().map(|path| vec![*path]);
        for paths in alone.chain([all.clone()]) {
            let folder = tempfile::tempdir().expect("a folder");
            let pods = Arc::new(Pods::new(&Source::Kube, Duration::from_secs(300)));
            pods.pods_listed(records.clone(), Instant::now());
            for path in &paths {
                fs::create_dir_all(full(folder.path(), path)).expect("made");
            }
            let _watcher = Watcher::new(folder.path().into(), Arc::clone(&pods)).expect("watches");
            for path in &paths {
                let at = all
                    .iter()
                    .position(|other| other == path)
                    .expect("one of all");
                let id = fs::metadata(full(folder.path(), path))
                    .expect("there")
                    .ino();
                let expected = Resolution::Owner(records[at].owner("main"));
                assert_eq!(pods.view().resolve(id), expected, "{path}");
            }
        }
    }

    /// Whoever makes many cgroups gets a few names, and takes none from others.
    #[test]
    fn many_cgroups_of_one_user_are_summed() {
        let folder = tempfile::tempdir().expect("a folder");
        let user = "user.slice/user-1000.slice/user@1000.service";
        let make = |path: String| {
            fs::create_dir_all(folder.path().join(path)).expect("made");
        };
        for at in 0..600 {
            make(format!("{user}/app.slice/{at}.service"));
        }
        make("system.slice/ssh.service".to_owned());
        let pods = Arc::new(Pods::new(&Source::None, Duration::from_secs(300)));
        let mut watcher = Watcher::new(folder.path().into(), Arc::clone(&pods)).expect("watches");
        watcher.walk().expect("walked");
        let owners = pods.view().owners();
        let mut names: Vec<_> = owners
            .iter()
            .map(|owner| &*owner.labels.container)
            .collect();
        names.sort_unstable();
        assert!(names.contains(&"ssh.service"), "{names:?}");
        assert!(names.contains(&"user@1000.service:other"), "{names:?}");
        // The unit itself, its parents, those with names, and the others.
        let own = names
            .iter()
            .filter(|name| name.starts_with("user@1000.service:"));
        assert_eq!(own.count(), 256 + 1);
    }

    /// Of two trees of one kind with one pod neither is believed.
    #[test]
    fn a_pod_in_two_trees_of_a_kind_is_in_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let make = |path: String| {
            let path = folder.path().join(path);
            fs::create_dir_all(&path).expect("made");
            fs::metadata(path).expect("there").ino()
        };
        let own = make(format!("docker/a/kubepods/pod{UID}/{ID}"));
        let pods = Arc::new(Pods::new(&Source::None, Duration::from_secs(300)));
        let mut watcher = Watcher::new(folder.path().into(), Arc::clone(&pods)).expect("watches");
        let name = |id| pods.view().resolve(id).labels().container;
        assert_eq!(&*name(own), ID);
        let other = make(format!("docker/b/kubepods/pod{UID}/{ID}"));
        watcher.walk().expect("walked");
        assert_eq!(&*name(own), format!("docker/a/kubepods/pod{UID}/{ID}"));
        assert_eq!(&*name(other), format!("docker/b/kubepods/pod{UID}/{ID}"));
    }
}
