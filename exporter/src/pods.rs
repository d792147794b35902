// SPDX-License-Identifier: Apache-2.0
//! Which pod and container does a cgroup belong to?
//!
//! Two sources meet here: the cgroup v2 hierarchy ([`cgroups`]: id → pod uid and container id) and the pods of this
//! node ([`kube`] or [`file`]: uid and container id → names). What only one of them knows is pending, then unknown:
//! never guessed. Metric: `chandra_pods_age_seconds`.

pub mod cgroups;
pub mod file;
pub mod kube;
mod places;
mod record;
mod view;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::IpAddr,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard, Weak},
    time::{Duration, Instant},
};

use self::places::{Cgroup, Cgroups};
pub use self::{
    places::{Found, Place, Rival},
    record::Record,
    view::{Network, View},
};
use crate::lock::lock;

/// The label of owners that nobody can name.
pub const UNKNOWN: &str = "unknown";

/// The name of the root cgroup, which is the host itself.
const ROOT: &str = "/";

/// The id of the root cgroup: kernfs numbers its nodes from 1, the root first.
const ROOT_ID: u64 = 1;

/// Where the names of pods come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The API server, the pods of one node.
    Kube,
    /// A `PodList` in JSON.
    File(PathBuf),
    /// Nowhere: a cgroup is shown by its own name.
    None,
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "kube" => Self::Kube,
            "none" => Self::None,
            path => Self::File(path.into()),
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kube => f.write_str("kube"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::None => f.write_str("none"),
        }
    }
}

/// The labels of one owner. All empty for the host itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels {
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub pod: Arc<str>,
    /// The container's name; without Kubernetes, the cgroup's.
    pub container: Arc<str>,
}

impl Labels {
    /// What names the pod.
    pub fn of_pod(&self) -> (Arc<str>, Arc<str>) {
        (Arc::clone(&self.namespace), Arc::clone(&self.pod))
    }

    /// Labels that belong to no pod but say why.
    pub fn only_pod(pod: &str) -> Self {
        Self {
            pod: pod.into(),
            ..Self::default()
        }
    }
}

/// Labels and the incarnation that they stand for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// What the series carry.
    pub labels: Labels,
    /// The pod's uid (the config hash of a static pod); empty where there is no pod.
    pub uid: Arc<str>,
}

/// What is known of the owner of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// A container of a pod, or a unit of a host without Kubernetes.
    Owner(Owner),
    /// The host: whatever runs outside of pods.
    Host,
    /// The other source may still tell. If it does not in time, the owner is this, or unknown.
    Pending(Option<Owner>),
    /// Nobody can tell, or the name belongs to a newer pod by now.
    Unknown,
}

impl Resolution {
    /// The owner, as far as it is known.
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Self::Owner(owner) | Self::Pending(Some(owner)) => Some(owner),
            Self::Host | Self::Pending(None) | Self::Unknown => None,
        }
    }

    /// The labels under which it is shown.
    pub fn labels(&self) -> Labels {
        match self {
            Self::Host => Labels::default(),
            _ => match self.owner() {
                Some(owner) => owner.labels.clone(),
                None => Labels::only_pod(UNKNOWN),
            },
        }
    }
}

/// Objects that are remembered to claim one uid. Two are a dispute.
const CLAIMS: usize = 8;

/// What has to read the kernel's counts by address before addresses change hands.
pub trait Drain: Send + Sync {
    /// Reads them, for the owners that the addresses have until now.
    fn drain(&self, pods: &View<'_>);

    /// Takes in who holds which address from now on.
    fn changed(&self, pods: &View<'_>);

    /// Takes in which cgroups there are, if that does not take long.
    fn met(&self, _: &View<'_>) {}
}

/// Both sources, joined. Reading never waits for a source.
pub struct Pods {
    state: RwLock<State>,
    drains: Mutex<Vec<Weak<dyn Drain>>>,
    /// Without names, a cgroup is shown by its own.
    named: bool,
    /// How long an owner that is gone is remembered.
    retention: Duration,
}

#[derive(Debug, Default)]
struct State {
    cgroups: Cgroups,
    /// By what their cgroups are called, the objects that claim to be that pod: one, but for forged mirrors. None has another's name.
    pods: HashMap<Arc<str>, Vec<Known>>,
    /// By its own uid, which pod an object claims to be. It cannot become another, or whoever writes it could claim many.
    claims: HashMap<Arc<str>, Arc<str>>,
    /// Namespace and name → the uid that holds the name.
    holders: HashMap<Name, Arc<str>>,
    /// When the pods' source last answered.
    fresh: Option<Instant>,
    /// Why the pods' source does not answer, in one line.
    trouble: Option<String>,
}

#[derive(Debug)]
struct Known {
    record: Record,
    gone: Option<Instant>,
}

/// A namespace and a name in it.
type Name = (Arc<str>, Arc<str>);

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Pods {
    /// Makes an empty directory. `retention` is how long the totals of a gone owner stay.
    pub fn new(source: &Source, retention: Duration) -> Self {
        Self {
            state: RwLock::default(),
            drains: Mutex::default(),
            named: *source != Source::None,
            retention,
        }
    }

    /// Freezes the directory for one scrape.
    pub fn view(&self) -> View<'_> {
        View {
            state: self.state.read().unwrap_or_else(PoisonError::into_inner),
            named: self.named,
        }
    }

    /// Makes do without a cgroup v2 hierarchy: the kernel then books every socket and task to its invisible root.
    pub fn without_cgroups(&self) {
        self.cgroup_found(ROOT_ID, Place::Unit(ROOT.into()));
    }

    /// Tells who counts by address that there are new cgroups.
    pub fn cgroups_met(&self) {
        let drains = lock(&self.drains).clone();
        for drain in drains.iter().filter_map(Weak::upgrade) {
            drain.met(&self.view());
        }
    }

    /// Adds or keeps a cgroup that exists.
    pub fn cgroup_found(&self, id: u64, found: impl Into<Found>) {
        self.write().cgroups.found(id, found.into());
    }

    /// Marks a cgroup as removed.
    pub fn cgroup_gone(&self, id: u64, now: Instant) {
        self.write().cgroups.gone(id, now);
    }

    /// Marks as removed every cgroup that a full walk did not meet.
    pub fn cgroups_walked(&self, met: &HashSet<u64>, now: Instant) {
        self.write().cgroups.walked(met, now);
    }

    /// Has counts by address read before each change of who holds an address, for as long as the reader lives.
    pub fn drain_by(&self, drain: &Arc<dyn Drain>) {
        let drain = Arc::downgrade(drain);
        lock(&self.drains).push(drain);
    }

    /// Changes the state. If addresses change hands by that, what was counted by address is read before, and who holds which is told after.
    /// One thread follows the pods' source, so nobody changes the state in between.
    fn change(&self, readdresses: bool, change: impl FnOnce(&mut State)) {
        let drains = match readdresses {
            true => lock(&self.drains).clone(),
            false => Vec::new(),
        };
        let drains: Vec<_> = drains.iter().filter_map(Weak::upgrade).collect();
        for drain in &drains {
            drain.drain(&self.view());
        }
        change(&mut self.write());
        for drain in drains {
            drain.changed(&self.view());
        }
    }

    /// Adds a pod or what is new of it.
    pub fn pod_found(&self, record: Record, now: Instant) {
        let readdresses = self.view().state.readdresses(&record);
        self.change(readdresses, |state| {
            state.upsert(record);
            state.answered(now);
        });
    }

    /// Marks a pod as deleted, by the object that described it. Its name and containers are remembered while its cgroups are.
    pub fn pod_gone(&self, object: &str, now: Instant) {
        let view = self.view();
        let known = view.state.object(object);
        let readdresses = known.is_some_and(|known| view.state.frees(known));
        drop(view);
        self.change(readdresses, |state| {
            if let Some(known) = state.object_mut(object) {
                known.gone.get_or_insert(now);
            }
            state.answered(now);
        });
    }

    /// Replaces the list of pods: those that are not in it are deleted.
    pub fn pods_listed(&self, records: Vec<Record>, now: Instant) {
        let objects = records.iter().map(|record| Arc::clone(&record.object));
        let listed: HashSet<_> = objects.collect();
        let is_gone = |known: &Known| !listed.contains(&known.record.object);
        let view = self.view();
        let mut known = view.state.pods.values().flatten();
        let readdresses = known.any(|known| is_gone(known) && view.state.frees(known))
            || records.iter().any(|record| view.state.readdresses(record));
        drop(view);
        self.change(readdresses, |state| {
            for known in state.pods.values_mut().flatten() {
                if is_gone(known) {
                    known.gone.get_or_insert(now);
                }
            }
            for record in records {
                state.upsert(record);
            }
            state.answered(now);
        });
    }

    /// Notes that the pods' source answered and nothing changed.
    pub fn pods_unchanged(&self, now: Instant) {
        self.write().answered(now);
    }

    /// Notes why the pods' source does not answer; attribution goes on from what is known.
    pub fn pods_failed(&self, trouble: String) {
        self.write().trouble = Some(trouble);
    }

    /// Forgets what has been gone for the retention time. Returns how many cgroups and pods are left.
    pub fn expire(&self, now: Instant) -> (usize, usize) {
        let mut state = self.write();
        let kept = |gone: Option<Instant>| {
            gone.is_none_or(|at| now.saturating_duration_since(at) < self.retention)
        };
        state.cgroups.retain(kept);
        // What may be anybody's keeps no pod in mind.
        let own = state.cgroups.all().map(|(_, cgroup)| cgroup);
        let own = own.filter(|cgroup| !cgroup.rival.as_ref().is_some_and(|rival| rival.is_worse));
        let used: HashSet<_> = own
            .filter_map(|cgroup| cgroup.place.uid())
            .cloned()
            .collect();
        let State {
            cgroups,
            pods,
            claims,
            holders,
            ..
        } = &mut *state;
        pods.retain(|uid, claims| {
            // A pod is remembered as long as its cgroups are, if it is known which it is.
            let own = claims.iter().position(|known| known.record.object == *uid);
            let last = own.or((claims.len() == 1).then_some(0));
            let stays = last.filter(|_| used.contains(uid)).map(|at| {
                let record = &claims[at].record;
                Arc::clone(&record.object)
            });
            claims.retain(|known| kept(known.gone) || stays.as_ref() == Some(&known.record.object));
            !claims.is_empty()
        });
        let objects = pods.values().flatten().map(|known| &known.record.object);
        let objects: HashSet<_> = objects.collect();
        claims.retain(|object, _| objects.contains(object));
        holders.retain(|name, uid| {
            let mut known = pods.get(uid).into_iter().flatten();
            known.any(|known| known.record.full_name() == *name)
        });
        (cgroups.all().count(), objects.len())
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// The addresses that the pod holds now.
    fn addresses(&self) -> &[IpAddr] {
        match self.gone {
            None => &self.record.addresses,
            Some(_) => &[],
        }
    }
}

impl State {
    /// Says if what is new of a pod changes who holds an address.
    fn readdresses(&self, record: &Record) -> bool {
        let known = self.object(&record.object);
        known.map_or(&[][..], Known::addresses) != record.addresses
            || known.is_none() && self.pods.contains_key(&record.uid)
    }

    /// Says if the end of an object changes who holds an address.
    fn frees(&self, known: &Known) -> bool {
        let claims = self.pods.get(&known.record.uid).into_iter().flatten();
        known.gone.is_none()
            && claims
                .into_iter()
                .any(|claim| !claim.addresses().is_empty())
    }

    fn object(&self, object: &str) -> Option<&Known> {
        let mut known = self.pods.get(self.claims.get(object)?)?.iter();
        known.find(|known| &*known.record.object == object)
    }

    fn object_mut(&mut self, object: &str) -> Option<&mut Known> {
        let mut known = self.pods.get_mut(self.claims.get(object)?)?.iter_mut();
        known.find(|known| &*known.record.object == object)
    }

    /// The pod that a uid is: nobody's where several claim it, unless it is one's own.
    fn pod(&self, uid: &Arc<str>) -> Option<&Known> {
        let known = self.pods.get(uid)?;
        let mut own = known.iter().filter(|known| known.record.object == *uid);
        match (own.next(), own.next(), &known[..]) {
            (Some(known), None, _) | (None, None, [known]) => Some(known),
            _ => None,
        }
    }

    /// The same, if that pod has its name now.
    fn holder(&self, uid: &Arc<str>) -> Option<&Known> {
        let holds = |known: &&Known| self.holders.get(&known.record.full_name()) == Some(uid);
        self.pod(uid).filter(holds)
    }

    /// In whose network a cgroup is: its pod's, by uid, or the host's (`Some(None)`). `None` if that is not known.
    fn network(&self, cgroup: &Cgroup) -> Option<Option<Arc<str>>> {
        let Some(uid) = self.place(cgroup).uid() else {
            return Some(None);
        };
        let record = &self.holder(uid)?.record;
        Some((!record.in_host).then(|| Arc::clone(uid)))
    }

    fn answered(&mut self, now: Instant) {
        self.fresh = Some(now);
        self.trouble = None;
    }

    fn upsert(&mut self, mut record: Record) {
        if let Some(claimed) = self.claims.get(&record.object) {
            record.uid = Arc::clone(claimed);
        }
        let name = record.full_name();
        // A static pod whose mirror is made anew is the same pod.
        let mut known = self.pods.get(&record.uid).into_iter().flatten();
        let known = known.find(|known| known.record.full_name() == name);
        let is_new = known.is_none();
        if let Some(known) = known {
            // A container that restarted twice is no longer in the status, but its cgroup may still be. One whose cgroup is
            // forgotten is as well, or a crash loop would pile up ids.
            let earlier = known.record.containers.iter();
            let mut earlier: Vec<_> = earlier
                .filter(|(id, _)| !record.containers.contains_key(*id))
                .collect();
            if !earlier.is_empty() {
                let places = self.cgroups.all();
                let places = places.filter_map(|(_, cgroup)| match &cgroup.place {
                    Place::Container { uid, id } if *uid == record.uid => Some(id),
                    _ => None,
                });
                let used: HashSet<_> = places.collect();
                earlier.retain(|(id, _)| used.contains(id));
            }
            let earlier = earlier
                .into_iter()
                .map(|(id, name)| (Arc::clone(id), Arc::clone(name)));
            record.containers.extend(earlier);
        }
        let holder = self.holders.get(&name).and_then(|uid| {
            let mut claims = self.pods.get(uid)?.iter();
            claims.find(|known| known.record.full_name() == name)
        });
        let holds = holder.is_none_or(|holder| {
            // Creation times are those of several clocks, in whole seconds: a deleted pod has no claim, and in a tie
            // the later arrival wins.
            holder.gone.is_some()
                || record.created > holder.record.created
                || record.created == holder.record.created && is_new
        });
        if holds {
            self.holders.insert(name.clone(), Arc::clone(&record.uid));
        }
        self.claims
            .insert(Arc::clone(&record.object), Arc::clone(&record.uid));
        let known = self.pods.entry(Arc::clone(&record.uid)).or_default();
        known.retain(|known| known.record.full_name() != name);
        // Whoever makes many claims makes one dispute.
        if known.len() < CLAIMS {
            known.push(Known { record, gone: None });
        }
    }

    /// What a cgroup is. In a tree that may be anybody's it is a pod's only if no better tree and no other of its kind has the pod; and on
    /// a node that has a better one only if the pods' source says that the pod runs and has the container.
    fn place<'a>(&self, cgroup: &'a Cgroup) -> &'a Place {
        let Some(rival) = &cgroup.rival else {
            return &cgroup.place;
        };
        let is_listed = || match &cgroup.place {
            Place::Container { uid, id } => self.holder(uid).is_some_and(|known| {
                let Known { record, gone } = known;
                gone.is_none() && record.is_running && record.containers.contains_key(id)
            }),
            _ => false,
        };
        match self.cgroups.is_sole(cgroup) && (!rival.is_worse || is_listed()) {
            true => &cgroup.place,
            false => &rival.otherwise,
        }
    }

    fn resolve(&self, cgroup: &Cgroup, named: bool) -> Resolution {
        let (uid, id) = match self.place(cgroup) {
            Place::Unit(name) if named || &**name == ROOT => return Resolution::Host,
            Place::Unit(name) => {
                let labels = Labels {
                    container: Arc::clone(name),
                    ..Labels::default()
                };
                return Resolution::Owner(Owner {
                    labels,
                    uid: "".into(),
                });
            }
            Place::Container { uid, id } => (uid, Some(id)),
            Place::Pod { uid } => (uid, None),
        };
        if !named {
            let labels = Labels {
                container: Arc::clone(id.unwrap_or(uid)),
                ..Labels::default()
            };
            return Resolution::Owner(Owner {
                labels,
                uid: Arc::clone(uid),
            });
        }
        if !self.pods.contains_key(uid) {
            return Resolution::Pending(None);
        }
        let Some(Known { record, .. }) = self.holder(uid) else {
            return Resolution::Unknown;
        };
        match id {
            None => Resolution::Owner(record.owner("")),
            Some(id) => match record.containers.get(id) {
                Some(name) => Resolution::Owner(record.owner(name)),
                None => Resolution::Pending(Some(record.owner(""))),
            },
        }
    }
}
