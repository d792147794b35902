// SPDX-License-Identifier: Apache-2.0
//! What was read before: the window that rates are over, and for what is rare the last ten minutes.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{
    growth::grew,
    reading::{Owner, Reading},
};

/// What rates are over, once there are readings so old.
const WINDOW: Duration = Duration::from_secs(10);

/// How far back torn down queue pairs count: what the alert looks at.
const LONG: Duration = Duration::from_secs(600);

/// How far back sessions count: WireGuard needs one in this time.
const RECENT: Duration = Duration::from_secs(120);

/// Queue pairs that an owner has at least where it is said how often it tears them down (`_config.rdma.pairsFloor`): fewer are a tool's.
pub const PAIRS_FLOOR: f64 = 6.0;

/// Between two of those counts: at most 61 are kept.
const EVERY: Duration = Duration::from_secs(10);

/// Readings, the newest last.
#[derive(Debug)]
pub struct History {
    window: Duration,
    readings: VecDeque<Reading>,
    rare: VecDeque<Rare>,
    /// The most queue pairs that each owner was seen with.
    most_pairs: BTreeMap<Owner, f64>,
}

type TunnelKey = (String, String);

/// Sessions with a peer, and in how many seconds it was looked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sessions {
    /// That were derived.
    pub sessions: f64,
    /// It was looked.
    pub seconds: f64,
    /// Looks that found new ones.
    pub bursts: usize,
}

/// What happens seldom, as counted at a time.
#[derive(Debug)]
struct Rare {
    at: Instant,
    destroyed: BTreeMap<Owner, f64>,
    sessions: BTreeMap<TunnelKey, BTreeMap<String, f64>>,
}

impl Rare {
    fn of(reading: &Reading) -> Self {
        let destroyed = reading.owners.iter();
        let destroyed = destroyed.filter(|(_, counts)| counts.created.is_some());
        let tunnels = reading.tunnels.iter();
        Self {
            at: reading.at,
            destroyed: destroyed
                .map(|(owner, counts)| (owner.clone(), counts.destroyed))
                .collect(),
            sessions: tunnels
                .map(|(key, tunnel)| (key.clone(), tunnel.peers.clone()))
                .collect(),
        }
    }
}

impl Default for History {
    fn default() -> Self {
        Self::over(WINDOW)
    }
}

impl History {
    /// Nothing yet; rates are over so long.
    pub fn over(window: Duration) -> Self {
        Self {
            window,
            readings: VecDeque::new(),
            rare: VecDeque::new(),
            most_pairs: BTreeMap::new(),
        }
    }

    /// Takes a reading.
    pub fn push(&mut self, reading: Reading) {
        let is_due = |last: &Rare| reading.at.duration_since(last.at) >= EVERY;
        if self.rare.back().is_none_or(is_due) {
            self.rare.push_back(Rare::of(&reading));
        }
        let old = |at: &Instant, than| reading.at.duration_since(*at) >= than;
        // One that is older than the window stays, or a long pause would leave nothing to compare with.
        while self.rare.get(1).is_some_and(|next| old(&next.at, LONG)) {
            self.rare.pop_front();
        }
        while self
            .readings
            .get(1)
            .is_some_and(|next| old(&next.at, self.window))
        {
            self.readings.pop_front();
        }
        self.most_pairs
            .retain(|owner, _| reading.owners.contains_key(owner));
        for (owner, counts) in &reading.owners {
            let pairs: f64 = counts.jobs_pairs().map(|(_, count)| count).sum();
            if pairs > 0.0 && owner.is_named() {
                let most = self.most_pairs.entry(owner.clone()).or_default();
                *most = most.max(pairs);
            }
        }
        self.readings.push_back(reading);
    }

    /// When the newest reading was asked for.
    pub fn newest(&self) -> Option<Instant> {
        self.readings.back().map(|reading| reading.at)
    }

    /// The oldest reading of the window, and the newest.
    pub fn window(&self) -> Option<(&Reading, &Reading)> {
        let newest = self.readings.back()?;
        let oldest = self.readings.front()?;
        (self.readings.len() > 1).then_some((oldest, newest))
    }

    /// How many times over an owner tore down its queue pairs in the last ten minutes, as far as it was looked; 0 where it was not seen
    /// with so many that it could be told.
    pub fn times_torn_down(&self, owner: &Owner) -> f64 {
        let most = self.most_pairs.get(owner).copied().unwrap_or_default();
        if most < PAIRS_FLOOR {
            return 0.0;
        }
        let now = self.readings.back().and_then(|now| now.owners.get(owner));
        let first = self.rare.front().and_then(|rare| rare.destroyed.get(owner));
        let torn_down = grew(
            first.copied().unwrap_or_default(),
            now.map_or(0.0, |counts| counts.destroyed),
        );
        torn_down / most
    }

    /// Sessions with a peer of late.
    pub fn sessions(&self, tunnel: &TunnelKey, peer: &str) -> Sessions {
        let Some(now) = self.readings.back() else {
            return Sessions::default();
        };
        let recent = self
            .rare
            .iter()
            .filter(|rare| now.at.duration_since(rare.at) <= RECENT);
        let counts = recent.filter_map(|rare| {
            // A peer that is new among those with most sessions: what it had before is not known.
            let sessions = rare.sessions.get(tunnel)?.get(peer)?;
            Some((rare.at, *sessions))
        });
        let last = now.tunnels.get(tunnel).and_then(|of| of.peers.get(peer));
        let counts: Vec<_> = counts.chain(last.map(|last| (now.at, *last))).collect();
        let (Some((first, _)), Some((last, _))) = (counts.first(), counts.last()) else {
            return Sessions::default();
        };
        let steps = counts.iter().zip(counts.iter().skip(1));
        let steps: Vec<_> = steps
            .map(|(before, after)| grew(before.1, after.1))
            .collect();
        Sessions {
            sessions: steps.iter().sum(),
            seconds: last.duration_since(*first).as_secs_f64(),
            bursts: steps.iter().filter(|step| **step > 0.0).count(),
        }
    }
}
