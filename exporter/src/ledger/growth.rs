// SPDX-License-Identifier: Apache-2.0
//! What have the kernel's totals risen by, and what of it waits for its owner?

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use super::{PATIENCE, add};

/// Growth of `N` totals of each source `K`, held until somebody takes it.
#[derive(Debug)]
pub struct Growth<K, const N: usize> {
    sources: HashMap<K, Source<N>>,
}

#[derive(Debug)]
struct Source<const N: usize> {
    /// The kernel's totals when they were last noted.
    seen: [u64; N],
    /// Growth that waits for its owner, and since when.
    held: Option<([u64; N], Instant)>,
    /// When the totals last grew.
    grew: Instant,
}

impl<K, const N: usize> Default for Growth<K, N> {
    fn default() -> Self {
        Self {
            sources: HashMap::new(),
        }
    }
}

impl<K: Copy + Eq + Hash, const N: usize> Growth<K, N> {
    /// Notes a source's totals. Those below the last ones are of a source which the kernel forgot and met again.
    pub fn note(&mut self, key: K, totals: [u64; N], now: Instant) {
        let source = self.sources.entry(key).or_insert(Source {
            seen: [0; N],
            held: None,
            grew: now,
        });
        let mut pairs = totals.iter().zip(&source.seen);
        let restarted = pairs.any(|(total, seen)| total < seen);
        let seen = if restarted { [0; N] } else { source.seen };
        let grown: [u64; N] = std::array::from_fn(|i| totals[i] - seen[i]);
        source.seen = totals;
        if grown.iter().any(|by| *by > 0) {
            source.grew = now;
            let (held, _) = source.held.get_or_insert(([0; N], now));
            add(held, &grown);
        }
    }

    /// The sources whose growth is held.
    pub fn held(&self) -> Vec<K> {
        let held = self.sources.iter();
        let held = held.filter(|(_, source)| source.held.is_some());
        held.map(|(key, _)| *key).collect()
    }

    /// Whether growth of a source is held.
    pub fn holds(&self, key: &K) -> bool {
        let source = self.sources.get(key);
        source.is_some_and(|source| source.held.is_some())
    }

    /// Whether what is held of a source may still wait for its owner.
    pub fn may_wait(&self, key: &K, now: Instant) -> bool {
        let held = self.sources.get(key).and_then(|source| source.held);
        held.is_none_or(|(_, since)| now.saturating_duration_since(since) < PATIENCE)
    }

    /// Takes what is held of a source.
    pub fn take(&mut self, key: &K) -> [u64; N] {
        let source = self.sources.get_mut(key);
        let held = source.and_then(|source| source.held.take());
        held.map_or([0; N], |(held, _)| held)
    }

    /// The kernel has begun to count from 0.
    pub fn restart(&mut self) {
        for source in self.sources.values_mut() {
            source.seen = [0; N];
        }
    }

    /// Keeps some of the sources.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.sources.retain(|key, _| keep(key));
    }

    /// Forgets a source.
    pub fn forget(&mut self, key: &K) {
        self.sources.remove(key);
    }

    /// The sources of which nothing is held and that have not grown for `idle`.
    pub fn idle(&self, idle: Duration, now: Instant) -> impl Iterator<Item = K> {
        let old = move |source: &Source<N>| {
            source.held.is_none() && now.saturating_duration_since(source.grew) >= idle
        };
        let sources = self.sources.iter();
        let sources = sources.filter(move |(_, source)| old(source));
        sources.map(|(key, _)| *key)
    }
}
