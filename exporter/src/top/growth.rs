// SPDX-License-Identifier: Apache-2.0
//! What did counts grow by between two readings, and what do containers of a pod have together?
//!
//! Growth comes first, then the sum: a container that is gone would else look like a counter that began anew.

use std::collections::BTreeMap;

use super::reading::{Arrivals, Counts, Delay, Encrypted};

/// What a counter grew by. One that is smaller began anew.
pub(super) fn grew(before: f64, now: f64) -> f64 {
    if now >= before { now - before } else { now }
}

/// What each of some counters grew by; what was not there before was 0.
pub(super) fn grew_each<K: Clone + Ord>(
    before: Option<&BTreeMap<K, f64>>,
    now: &BTreeMap<K, f64>,
) -> BTreeMap<K, f64> {
    each(before, now, grew)
}

fn each<K: Clone + Ord, V: Copy + Default>(
    before: Option<&BTreeMap<K, V>>,
    now: &BTreeMap<K, V>,
    grew: impl Fn(V, V) -> V,
) -> BTreeMap<K, V> {
    let old = |key| before.and_then(|before| before.get(key)).copied();
    let grown = now.iter().map(|(key, value)| {
        let old = old(key).unwrap_or_default();
        (key.clone(), grew(old, *value))
    });
    grown.collect()
}

fn add_each<K: Ord, V: Default>(
    into: &mut BTreeMap<K, V>,
    from: BTreeMap<K, V>,
    add: impl Fn(&mut V, V),
) {
    for (key, value) in from {
        add(into.entry(key).or_default(), value);
    }
}

impl Counts {
    /// What grew since an older reading; what does not only grow is as it is now.
    pub(super) fn since(&self, before: Option<&Self>) -> Self {
        let ranks = |before, now| each(before, now, Arrivals::since);
        Self {
            retransmits: grew_each(before.map(|old| &old.retransmits), &self.retransmits),
            pairs: self.pairs.clone(),
            created: self.created.map(|now| {
                let old = before.and_then(|old| old.created);
                grew(old.unwrap_or_default(), now)
            }),
            destroyed: grew(before.map_or(0.0, |old| old.destroyed), self.destroyed),
            processes: self.processes.clone(),
            delay: self.delay.since(before.map(|old| &old.delay)),
            ranks: ranks(before.map(|old| &old.ranks), &self.ranks),
            ranks_on_gpu: ranks(before.map(|old| &old.ranks_on_gpu), &self.ranks_on_gpu),
            pending: self.pending,
            missing: self.missing.clone(),
            encrypted: each(
                before.map(|old| &old.encrypted),
                &self.encrypted,
                Encrypted::since,
            ),
        }
    }

    /// Adds what another container of the pod has.
    pub(super) fn add(&mut self, other: Self) {
        let add = |all: &mut f64, more: f64| *all += more;
        let add_ranks = |into: &mut _, from| add_each(into, from, Arrivals::add);
        add_each(&mut self.retransmits, other.retransmits, add);
        add_each(&mut self.pairs, other.pairs, add);
        if let Some(created) = other.created {
            *self.created.get_or_insert_default() += created;
        }
        self.destroyed += other.destroyed;
        add_each(&mut self.processes, other.processes, add);
        for (bound, count) in other.delay.buckets {
            self.delay.add(bound, count);
        }
        self.delay.sum += other.delay.sum;
        add_ranks(&mut self.ranks, other.ranks);
        add_ranks(&mut self.ranks_on_gpu, other.ranks_on_gpu);
        self.pending = self.pending.max(other.pending);
        self.missing.extend(other.missing);
        add_each(&mut self.encrypted, other.encrypted, Encrypted::add);
    }

    /// Queue pairs; the management pairs, which are there as long as the device is, are none of a job's.
    pub(super) fn jobs_pairs(&self) -> impl Iterator<Item = (&str, f64)> {
        let pairs = self.pairs.iter();
        let of_jobs = pairs.filter(|((_, kind, _), _)| !matches!(&**kind, "SMI" | "GSI"));
        of_jobs.map(|((.., state), count)| (&**state, *count))
    }
}

impl Delay {
    /// The buckets' growth. If there are fewer waits than before, all of it began anew.
    fn since(&self, before: Option<&Self>) -> Self {
        let all = |delay: &Self| delay.buckets.last().map_or(0.0, |(_, count)| *count);
        let Some(before) = before.filter(|old| all(old) <= all(self)) else {
            return self.clone();
        };
        let old = |bound| {
            let known = before.buckets.iter().find(|(of, _)| *of == bound);
            known.map_or(0.0, |(_, count)| *count)
        };
        let buckets = self.buckets.iter();
        Self {
            buckets: buckets
                .map(|(bound, count)| (*bound, grew(old(*bound), *count)))
                .collect(),
            sum: grew(before.sum, self.sum),
        }
    }
}

impl Arrivals {
    fn since(before: Self, now: Self) -> Self {
        Self {
            waited: grew(before.waited, now.waited),
            collectives: grew(before.collectives, now.collectives),
            last: grew(before.last, now.last),
        }
    }

    fn add(&mut self, more: Self) {
        self.waited += more.waited;
        self.collectives += more.collectives;
        self.last += more.last;
    }
}

impl Encrypted {
    fn since(before: Self, now: Self) -> Self {
        Self {
            cpu: grew(before.cpu, now.cpu),
            packets: grew(before.packets, now.packets),
            bytes: grew(before.bytes, now.bytes),
        }
    }

    fn add(&mut self, more: Self) {
        self.cpu += more.cpu;
        self.packets += more.packets;
        self.bytes += more.bytes;
    }
}
