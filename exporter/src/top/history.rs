// SPDX-License-Identifier: Apache-2.0
//! What was read before: the window that rates are over, and for what is rare the last ten minutes.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{
    node::grew,
    reading::{Owner, Reading},
};

/// What rates are over, once there are readings so old.
const WINDOW: Duration = Duration::from_secs(10);

/// How far back sessions and torn down queue pairs count: what the alerts look at.
const LONG: Duration = Duration::from_secs(600);

/// Between two of those counts: at most 61 are kept.
const EVERY: Duration = Duration::from_secs(10);

/// Readings, the newest last.
#[derive(Debug, Default)]
pub struct History {
    readings: VecDeque<Reading>,
    rare: VecDeque<Rare>,
}

type TunnelKey = (String, String);

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

impl History {
    /// Takes a reading.
    pub fn push(&mut self, reading: Reading) {
        let is_due = |last: &Rare| reading.at.duration_since(last.at) >= EVERY;
        if self.rare.back().is_none_or(is_due) {
            self.rare.push_back(Rare::of(&reading));
        }
        let old = |at: &Instant, than| reading.at.duration_since(*at) > than;
        // One that is older than the window stays, or a long pause would leave nothing to compare with.
        while self.rare.get(1).is_some_and(|next| old(&next.at, LONG)) {
            self.rare.pop_front();
        }
        while self
            .readings
            .get(1)
            .is_some_and(|next| old(&next.at, WINDOW))
        {
            self.readings.pop_front();
        }
        self.readings.push_back(reading);
    }

    /// The oldest reading of the window, and the newest.
    pub fn window(&self) -> Option<(&Reading, &Reading)> {
        let newest = self.readings.back()?;
        let oldest = self.readings.front()?;
        (self.readings.len() > 1).then_some((oldest, newest))
    }

    /// Queue pairs that an owner tore down in the last ten minutes, as far as it was looked.
    pub fn torn_down(&self, owner: &Owner) -> f64 {
        let now = self.readings.back().and_then(|now| now.owners.get(owner));
        let first = self.rare.front().and_then(|rare| rare.destroyed.get(owner));
        grew(
            first.copied().unwrap_or_default(),
            now.map_or(0.0, |counts| counts.destroyed),
        )
    }

    /// Sessions with a peer in the last ten minutes, and in how many seconds it was looked.
    pub fn sessions(&self, tunnel: &TunnelKey, peer: &str) -> (f64, f64) {
        let now = self.readings.back();
        let all = now.and_then(|now| now.tunnels.get(tunnel)?.peers.get(peer));
        // A peer that is new among those with most sessions: what it had before is not known.
        let first = self.rare.iter().find_map(|rare| {
            let sessions = rare.sessions.get(tunnel)?.get(peer)?;
            Some((rare.at, *sessions))
        });
        let (Some(now), Some((at, before))) = (now, first) else {
            return (0.0, 0.0);
        };
        let sessions = grew(before, all.copied().unwrap_or_default());
        (sessions, now.at.duration_since(at).as_secs_f64())
    }
}
