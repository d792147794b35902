// SPDX-License-Identifier: Apache-2.0
//! Which cgroups are there, and what is each by its path?

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use super::cgroups::Tree;

/// Cgroups in one unit, container or user's session that have names of their own on a host without Kubernetes: as many as a node
/// has pods. Whoever makes more has them summed.
const NESTED: usize = 256;

/// A cgroup's place, read from its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Outside of pods; the name is what a host without Kubernetes shows as `container`.
    Unit(Arc<str>),
    /// A container of a pod, or a cgroup below one.
    Container {
        /// The pod's uid, with dashes.
        uid: Arc<str>,
        /// The container's id.
        id: Arc<str>,
    },
    /// The pod's own cgroup, or one below it that is no container's.
    Pod {
        /// The pod's uid, with dashes.
        uid: Arc<str>,
    },
}

impl Place {
    pub(super) fn uid(&self) -> Option<&Arc<str>> {
        match self {
            Self::Container { uid, .. } | Self::Pod { uid } => Some(uid),
            Self::Unit(_) => None,
        }
    }
}

/// What a path says of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it is.
    pub place: Place,
    /// Of a tree that is not the kubelet's own and looks like it.
    pub rival: Option<Rival>,
    /// The outermost unit that it is nested in.
    pub outer: Option<Arc<str>>,
}

/// A tree that looks like the kubelet's, and may be anybody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// Its kind.
    pub tree: Tree,
    /// Where it begins. If there are two of a kind with one pod, neither has it.
    pub root: Arc<str>,
    /// What the cgroup is if it is not that pod's.
    pub otherwise: Place,
    /// Whether the node has pods in a better kind of tree. The pods' source then has to name the pod and the container.
    pub is_worse: bool,
}

impl From<Place> for Found {
    fn from(place: Place) -> Self {
        Self {
            place,
            rival: None,
            outer: None,
        }
    }
}

/// A cgroup.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) place: Place,
    pub(super) rival: Option<Rival>,
    outer: Option<Arc<str>>,
    pub(super) gone: Option<Instant>,
}

impl Cgroup {
    fn tree(&self) -> Tree {
        self.rival
            .as_ref()
            .map_or(Tree::Kubelet, |rival| rival.tree)
    }

    /// Where the tree begins that has its pod: the kubelet's is one.
    fn root(&self) -> Arc<str> {
        let root = self.rival.as_ref().map(|rival| &rival.root);
        root.cloned().unwrap_or_default()
    }
}

/// All cgroups that are there, or were within the retention time.
#[derive(Debug, Default)]
pub(super) struct Cgroups {
    by_id: HashMap<u64, Cgroup>,
    /// How many each pod has, by the kind of tree and where that begins.
    of_pods: HashMap<(Arc<str>, Tree), HashMap<Arc<str>, usize>>,
    /// Those that have a name of their own, by the unit that they are nested in.
    named: HashMap<Arc<str>, HashSet<u64>>,
}

impl Cgroups {
    /// Adds or keeps one that exists.
    pub(super) fn found(&mut self, id: u64, found: Found) {
        let outer = found.outer.clone();
        self.remove(id, outer.as_ref());
        let mut cgroup = Cgroup {
            place: found.place,
            rival: found.rival,
            outer,
            gone: None,
        };
        if let Some(uid) = cgroup.place.uid() {
            let of_pod = self.of_pods.entry((Arc::clone(uid), cgroup.tree()));
            *of_pod.or_default().entry(cgroup.root()).or_default() += 1;
        }
        if let Some(outer) = &cgroup.outer {
            let named = self.named.entry(Arc::clone(outer)).or_default();
            if !named.contains(&id) && named.len() >= NESTED {
                let sum = Place::Unit(format!("{outer}:other").into());
                match &mut cgroup.rival {
                    Some(rival) => rival.otherwise = sum,
                    None => cgroup.place = sum,
                }
            } else {
                named.insert(id);
            }
        }
        self.by_id.insert(id, cgroup);
    }

    /// Forgets one. If it is found again in `outer` it keeps its name.
    fn remove(&mut self, id: u64, outer: Option<&Arc<str>>) {
        let Some(cgroup) = self.by_id.remove(&id) else {
            return;
        };
        if let Some(uid) = cgroup.place.uid() {
            let key = (Arc::clone(uid), cgroup.tree());
            let root = cgroup.root();
            if let Some(roots) = self.of_pods.get_mut(&key) {
                if let Some(count) = roots.get_mut(&root) {
                    *count -= 1;
                    if *count == 0 {
                        roots.remove(&root);
                    }
                }
                if roots.is_empty() {
                    self.of_pods.remove(&key);
                }
            }
        }
        if cgroup.outer.as_ref() != outer {
            self.unname(id, cgroup.outer.as_ref());
        }
    }

    /// Takes its name from one, for others to have.
    fn unname(&mut self, id: u64, outer: Option<&Arc<str>>) {
        let Some(outer) = outer else {
            return;
        };
        if let Some(named) = self.named.get_mut(outer) {
            named.remove(&id);
            if named.is_empty() {
                self.named.remove(outer);
            }
        }
    }

    /// Marks one as removed.
    pub(super) fn gone(&mut self, id: u64, now: Instant) {
        let Some(cgroup) = self.by_id.get_mut(&id) else {
            return;
        };
        if cgroup.gone.is_none() {
            cgroup.gone = Some(now);
            let outer = cgroup.outer.clone();
            self.unname(id, outer.as_ref());
        }
    }

    /// Marks as removed all that a walk did not meet.
    pub(super) fn walked(&mut self, met: &HashSet<u64>, now: Instant) {
        let unmet = self.by_id.keys().filter(|id| !met.contains(id));
        for id in unmet.copied().collect::<Vec<_>>() {
            self.gone(id, now);
        }
    }

    /// Forgets those that are not kept any more.
    pub(super) fn retain(&mut self, kept: impl Fn(Option<Instant>) -> bool) {
        let all = self.by_id.iter().filter(|(_, cgroup)| !kept(cgroup.gone));
        for id in all.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.remove(id, None);
        }
    }

    pub(super) fn get(&self, id: u64) -> Option<&Cgroup> {
        self.by_id.get(&id)
    }

    /// All, by id.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, &Cgroup)> {
        self.by_id.iter().map(|(id, cgroup)| (*id, cgroup))
    }

    /// Says if no better tree, and no other of its kind, has the pod of a cgroup.
    pub(super) fn is_sole(&self, cgroup: &Cgroup) -> bool {
        let Some(uid) = cgroup.place.uid() else {
            return false;
        };
        let trees = [Tree::Kubelet, Tree::Nested, Tree::User].into_iter();
        let mut having = trees.filter_map(|tree| {
            let roots = self.of_pods.get(&(Arc::clone(uid), tree))?;
            Some((tree, roots.len()))
        });
        having.next() == Some((cgroup.tree(), 1))
    }
}
