// SPDX-License-Identifier: Apache-2.0
//! The counter rules, in one place that every signal uses.
//!
//! The kernel counts by source (a cgroup id); series are per owner (namespace, pod, container). A [`Ledger`] books what
//! each source grew by since the last scrape to its owner's account. Its rules:
//!
//! - An account never decreases. A cgroup that is removed takes nothing away; a container that restarts adds on.
//! - An account is opened, at 0, when its owner appears (in a ledger of [`Opening::Events`], at its first event), and
//!   closed when the directory has forgotten the owner.
//! - A pod with the same name and another uid takes the account over and starts at 0: an ordinary counter reset.
//! - What may still find its owner is held back for [`PATIENCE`]; what cannot is booked to `pod="unknown"`.
//! - Owners beyond the limit are booked to `pod="other"`, and stay there for as long as they are known.

mod growth;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::Hash,
    iter::Sum,
    ops::Add,
    sync::Arc,
    time::{Duration, Instant},
};

pub use self::growth::Growth;
use crate::pods::{Labels, Owner, Resolution, UNKNOWN};

/// How long an event waits for the sources to name its owner. The kubelet reports a container's id within its sync
/// period (1 s) plus the API's latency.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The label of owners beyond the limit.
pub const OTHER: &str = "other";

/// How well events found their owners, in units of what the signal counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attribution {
    /// Booked to a pod, the ones folded into `other` included.
    pub pod: u64,
    /// Booked to the host.
    pub host: u64,
    /// Nobody could tell.
    pub unknown: u64,
}

/// Of another ledger.
impl Add for Attribution {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            pod: self.pod + other.pod,
            host: self.host + other.host,
            unknown: self.unknown + other.unknown,
        }
    }
}

impl Sum for Attribution {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::add)
    }
}

/// When an owner's account is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// When the owner appears.
    Owners,
    /// At the first event: for signals of which most owners never have one, and whose accounts are large.
    Events,
}

/// Accounts of `N` counters for each owner, fed from sources keyed by `K`.
#[derive(Debug)]
pub struct Ledger<K, const N: usize> {
    growth: Growth<K, N>,
    accounts: BTreeMap<Labels, Account<N>>,
    host: [u64; N],
    unknown: [u64; N],
    /// Owners whose counts go to `other`, once and for all.
    folded: HashSet<Owner>,
    other: Option<[u64; N]>,
    attribution: Attribution,
    limit: usize,
    opening: Opening,
    /// How long an account is new.
    new_for: Duration,
    /// When it was last booked.
    booked: Option<Instant>,
    units: fn(&[u64; N]) -> u64,
}

#[derive(Debug)]
struct Account<const N: usize> {
    uid: Arc<str>,
    totals: [u64; N],
    opened: Instant,
}

impl<K: Copy + Eq + Hash, const N: usize> Ledger<K, N> {
    /// Makes a ledger with room for `limit` owners beside the host, `unknown` and `other`. `units` is how many units of
    /// [`Attribution`] a growth is worth.
    pub fn new(limit: usize, units: fn(&[u64; N]) -> u64) -> Self {
        Self {
            growth: Growth::default(),
            accounts: BTreeMap::new(),
            host: [0; N],
            unknown: [0; N],
            folded: HashSet::new(),
            other: None,
            attribution: Attribution::default(),
            limit,
            opening: Opening::Owners,
            new_for: Duration::ZERO,
            booked: None,
            units,
        }
    }

    /// Opens accounts at another time.
    pub fn opening(self, opening: Opening) -> Self {
        Self { opening, ..self }
    }

    /// Calls an account new for so long after it was opened.
    pub fn new_for(self, new_for: Duration) -> Self {
        Self { new_for, ..self }
    }

    /// The kernel has begun to count from 0: what the sources grow by is counted from there.
    pub fn restart(&mut self) {
        self.growth.restart();
    }

    /// Books what every source grew by.
    ///
    /// `owners` are all that the directory knows, `readings` the kernel's totals by source. A total below the last one
    /// is that of a source which the kernel forgot and met again.
    pub fn book(
        &mut self,
        owners: &HashSet<Owner>,
        readings: impl IntoIterator<Item = (K, [u64; N])>,
        resolve: impl Fn(K) -> Resolution,
        now: Instant,
    ) {
        let known: HashSet<_> = owners.iter().map(|owner| &owner.labels).collect();
        self.accounts.retain(|labels, _| known.contains(labels));
        self.folded.retain(|owner| owners.contains(owner));
        for owner in owners {
            // A pod's own cgroup counts only what is outside of its containers: rarely anything. Its account is opened by
            // its first event, and restarts with the pod's successor.
            let at_once = self.opening == Opening::Owners && !owner.labels.container.is_empty();
            if at_once || self.accounts.contains_key(&owner.labels) {
                self.open(owner, now);
            }
        }
        self.booked = Some(now);
        for (key, totals) in readings {
            self.growth.note(key, totals, now);
        }
        for key in self.growth.held() {
            let resolution = resolve(key);
            if matches!(resolution, Resolution::Pending(_)) && self.growth.may_wait(&key, now) {
                continue;
            }
            let held = self.growth.take(&key);
            match resolution {
                Resolution::Owner(owner) | Resolution::Pending(Some(owner)) => {
                    self.credit(&owner, &held, now);
                }
                Resolution::Host => {
                    add(&mut self.host, &held);
                    self.attribution.host += (self.units)(&held);
                }
                Resolution::Pending(None) | Resolution::Unknown => self.credit_unknown(&held),
            }
        }
    }

    /// Returns the sources that have not grown for `idle` and that `dead` says are gone, and forgets them: the kernel's
    /// entries may be removed. An event that comes later starts an entry from 0.
    pub fn retire(&mut self, idle: Duration, dead: impl Fn(K) -> bool, now: Instant) -> Vec<K> {
        let idle = self.growth.idle(idle, now);
        let retired: Vec<_> = idle.filter(|key| dead(*key)).collect();
        for key in &retired {
            self.growth.forget(key);
        }
        retired
    }

    /// Returns every account, the host's first, then `unknown` (from the start) and `other` (once it exists).
    pub fn accounts(&self) -> impl Iterator<Item = (Labels, &[u64; N])> {
        let host = (Labels::default(), &self.host);
        let unknown = (Labels::only_pod(UNKNOWN), &self.unknown);
        let other = self
            .other
            .iter()
            .map(|totals| (Labels::only_pod(OTHER), totals));
        let owners = self
            .accounts
            .iter()
            .map(|(labels, account)| (labels.clone(), &account.totals));
        [host, unknown].into_iter().chain(other).chain(owners)
    }

    /// Whether an owner's account was new when the ledger was last booked: not the host's, `unknown`'s and `other`'s.
    pub fn is_new(&self, labels: &Labels) -> bool {
        let opened = self.accounts.get(labels).map(|account| account.opened);
        let ages = opened.zip(self.booked);
        ages.is_some_and(|(opened, now)| now.saturating_duration_since(opened) < self.new_for)
    }

    /// Returns how well events found their owners.
    pub fn attribution(&self) -> Attribution {
        self.attribution
    }

    /// Finds or opens the owner's account; `None` for one that is folded into `other`.
    fn open(&mut self, owner: &Owner, now: Instant) -> Option<&mut Account<N>> {
        if self.folded.contains(owner) {
            return None;
        }
        if !self.accounts.contains_key(&owner.labels) && self.accounts.len() >= self.limit {
            self.folded.insert(owner.clone());
            self.other.get_or_insert([0; N]);
            return None;
        }
        let anew = || Account {
            uid: Arc::clone(&owner.uid),
            totals: [0; N],
            opened: now,
        };
        let account = self
            .accounts
            .entry(owner.labels.clone())
            .or_insert_with(anew);
        // The directory names only the pod that holds a name, so another uid is its successor's.
        if account.uid != owner.uid {
            *account = anew();
        }
        Some(account)
    }

    fn credit(&mut self, owner: &Owner, by: &[u64; N], now: Instant) {
        let units = (self.units)(by);
        // Without Kubernetes an owner is a unit of the host.
        if owner.labels.pod.is_empty() {
            self.attribution.host += units;
        } else {
            self.attribution.pod += units;
        }
        match self.open(owner, now) {
            Some(account) => add(&mut account.totals, by),
            None => add(self.other.get_or_insert([0; N]), by),
        }
    }

    fn credit_unknown(&mut self, by: &[u64; N]) {
        self.attribution.unknown += (self.units)(by);
        add(&mut self.unknown, by);
    }
}

/// Which owners a page shows by name in what is not counted by a [`Ledger`]: as many as it may, the rest is `other`.
#[derive(Debug)]
pub struct Shown {
    labels: BTreeSet<Labels>,
    limit: usize,
}

impl Shown {
    /// Shows none yet, and `limit` at most.
    pub fn new(limit: usize) -> Self {
        Self {
            labels: BTreeSet::new(),
            limit,
        }
    }

    /// The labels under which an owner is shown.
    pub fn of(&mut self, resolution: Resolution) -> Labels {
        let labels = resolution.labels();
        if resolution.owner().is_some() && !self.labels.contains(&labels) {
            if self.labels.len() >= self.limit {
                return Labels::only_pod(OTHER);
            }
            self.labels.insert(labels.clone());
        }
        labels
    }
}

/// Names that whoever runs on the node can choose, of devices and the like: as many as there is room for have series of their own, as long
/// as they are met now and then.
#[derive(Debug)]
pub struct Names<N> {
    met: BTreeMap<N, Instant>,
    limit: usize,
}

impl<N: Ord + Clone> Names<N> {
    /// Has none yet, and room for `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            met: BTreeMap::new(),
            limit,
        }
    }

    /// Meets a name. False if there is no room for it, so that it is `other`.
    pub fn meet(&mut self, name: &N, now: Instant) -> bool {
        let has_room = self.met.contains_key(name) || self.met.len() < self.limit;
        if has_room {
            self.met.insert(name.clone(), now);
        }
        has_room
    }

    /// Forgets those that have not been met for `retention`, and returns them.
    pub fn expire(&mut self, retention: Duration, now: Instant) -> Vec<N> {
        let old = |at: &Instant| now.saturating_duration_since(*at) >= retention;
        let gone = self.met.iter().filter(|(_, at)| old(at));
        let gone: Vec<N> = gone.map(|(name, _)| name.clone()).collect();
        for name in &gone {
            self.met.remove(name);
        }
        gone
    }
}

fn add<const N: usize>(totals: &mut [u64; N], by: &[u64; N]) {
    for (total, by) in totals.iter_mut().zip(by) {
        *total = total.saturating_add(*by);
    }
}
