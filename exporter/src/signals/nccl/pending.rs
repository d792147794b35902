// SPDX-License-Identifier: Apache-2.0
//! For how long has who waited for a collective, and for whom?
//!
//! By container, as alerts on hosts need it; by communicator, whose pace tells whether it hangs or pauses; and the ranks of this node that are
//! missing, with what they do meanwhile. Of a rank on another node nothing is known here. What a job chooses has names as far as [`Ranks`] has
//! given them, the rest is `other`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    time::Duration,
};

use exporter_common::nccl::{
    Communicator, Group, Handle, MAX_SEATS, Member, NO_RANK, Seat, Source,
};

use super::{
    Salt,
    live::{Fate, Live, fate, made},
    ranks::Ranks,
    source,
};
use crate::{
    families::{Desc, Families, Kind},
    ledger::{OTHER, Shown},
    pods::Labels,
    signals::{Scope, entries, monotonic},
};

/// Nanoseconds after which it is told in which communicator others wait, and for whom: a step of a training job is over by then, and most pages
/// need no series for it.
const TOLD_AFTER: u64 = 10_000_000_000;

/// Processes that are asked at a scrape what they do.
const ASKED: usize = 256;

pub(crate) static PENDING: Desc = Desc {
    name: "chandra_nccl_oldest_pending_seconds",
    kind: Kind::Gauge,
    help: "Age of the oldest collective that has been started and not finished.",
    per_pod: true,
    labels: &[],
    values: &[],
    source: "host: since the first rank of this node called it, while another has not; profiler plugin: since it was started, while it has not finished",
};

pub(super) static OF_COMMUNICATOR: Desc = Desc {
    name: "chandra_nccl_communicator_pending_seconds",
    kind: Kind::Gauge,
    help: "Age of the oldest collective of the communicator that has been started and not finished, from 10 s on.",
    per_pod: true,
    labels: &["communicator"],
    values: &[],
    source: "as chandra_nccl_oldest_pending_seconds; communicators as in chandra_nccl_rank_wait_seconds_total, the rest is other",
};

pub(crate) static MISSING: Desc = Desc {
    name: "chandra_nccl_missing_rank_seconds",
    kind: Kind::Gauge,
    help: "Seconds for which other ranks of this node have waited for the rank, from 10 s on.",
    per_pod: true,
    labels: &["communicator", "rank", "state"],
    values: &[("state", &STATES)],
    source: "host: as chandra_nccl_oldest_pending_seconds, of the rank that has not called; state by /proc/PID/stat of its process, of 256 processes",
};

/// What the process of a rank does.
const STATES: [&str; 5] = ["running", "sleeping", "stopped", "gone", "unread"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Sleeping,
    Stopped,
    Gone,
    Unread,
}

/// Reads the letter of a process, the third field of its `stat` (fs/proc/array.c, 7.0). The second is its name, in parentheses, and may hold
/// any character.
fn state(stat: &str) -> State {
    let letter = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    match letter {
        Some('R') => State::Running,
        Some('T' | 't') => State::Stopped,
        Some('Z' | 'X' | 'x') => State::Gone,
        Some(_) => State::Sleeping,
        None => State::Unread,
    }
}

/// A rank, as it was seen last.
#[derive(Clone, Copy, Debug)]
struct Seen {
    cgroup: u64,
    rank: u64,
    handle: Handle,
}

/// A rank that others wait for.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Missing {
    labels: Labels,
    communicator: String,
    rank: String,
    state: &'static str,
}

/// Ages in nanoseconds.
#[derive(Debug, Default)]
pub struct Pending {
    owners: BTreeMap<Labels, u64>,
    communicators: BTreeMap<(Labels, String), u64>,
    missing: BTreeMap<Missing, u64>,
    /// The ranks of each group, those that have gone meanwhile too, as long as somebody of it is there.
    seen: HashMap<u64, HashMap<u64, Seen>>,
}

/// Keeps the larger of two ages.
fn note<K: Ord>(ages: &mut BTreeMap<K, u64>, key: K, age: u64) {
    let oldest = ages.entry(key).or_default();
    *oldest = age.max(*oldest);
}

fn seconds(age: u64) -> f64 {
    age as f64 / 1e9
}

/// What communicators are called.
pub(super) struct Naming<'a> {
    pub(super) groups: &'a HashMap<u64, Group>,
    pub(super) salt: Option<&'a Salt>,
}

impl Naming<'_> {
    /// The number of a group's communicator on pages.
    pub(super) fn number(&self, group: u64) -> u64 {
        let hash = self.groups.get(&group).map_or(0, |group| group.hash);
        let number = if hash == 0 { group } else { hash };
        self.salt.map_or(number, |salt| salt.name(number))
    }

    fn of(&self, ranks: &Ranks, labels: &Labels, group: u64) -> String {
        let number = self.number(group);
        match ranks.is_named(labels, number) {
            true => format!("{number:016x}"),
            false => OTHER.to_owned(),
        }
    }
}

/// What is found at a look, in an order, so that beyond the limit the same ones are shown each time.
#[derive(Default)]
struct Look {
    /// By cgroup and group, the age of the oldest collective of those who wait.
    pending: BTreeMap<(u64, u64), u64>,
    /// By group and seat, for how long others have waited.
    missing: BTreeMap<(u64, u64), u64>,
}

impl Look {
    /// Finds what the host's tier sees: who has called, and who of those who have been `seen` has not.
    fn at_pairs(
        &mut self,
        live: &Live,
        seats: &HashMap<Seat, Member>,
        made: &HashMap<u64, Vec<Communicator>>,
        seen: &HashMap<u64, HashMap<u64, Seen>>,
        now: u64,
    ) -> anyhow::Result<()> {
        for (pair, arrivals) in entries(&live.pairs)? {
            // What the plugin tells are finished collectives, of which others have not been told: nothing hangs by that.
            if fate(&pair, &arrivals, made) != Fate::Waits {
                continue;
            }
            let waited = now.saturating_sub(arrivals.since);
            let mut by_host = false;
            for (index, at) in arrivals.at.iter().enumerate() {
                let seat = Seat {
                    group: pair.group,
                    index: index as u64,
                };
                let member = seats.get(&seat).filter(|_| *at != 0);
                if let Some(member) = member
                    && source(&member.handle) == Source::Host as usize
                {
                    by_host = true;
                    note(&mut self.pending, (member.cgroup, pair.group), waited);
                }
            }
            if !by_host || waited < TOLD_AFTER {
                continue;
            }
            for index in seen.get(&pair.group).into_iter().flat_map(HashMap::keys) {
                if arrivals.at[*index as usize % MAX_SEATS] == 0 {
                    note(&mut self.missing, (pair.group, *index), waited);
                }
            }
        }
        Ok(())
    }

    /// Finds what the plugin has told to be started and not to be finished.
    fn at_started(&mut self, live: &Live, now: u64) -> anyhow::Result<()> {
        for (name, since) in entries(&live.started)? {
            let communicator = live.communicators.get(&name.handle, 0);
            // What started later has finished: this one is lost.
            if let Ok(communicator) = communicator
                && since.at >= communicator.finished
            {
                let age = now.saturating_sub(since.at);
                note(&mut self.pending, (since.cgroup, communicator.group), age);
            }
        }
        Ok(())
    }
}

impl Pending {
    /// Finds for how long whose collectives have been pending, and for whom.
    pub(super) fn find(
        &mut self,
        live: &Live,
        known: &[(Handle, Communicator)],
        naming: &Naming<'_>,
        ranks: &Ranks,
        max_owners: usize,
        scope: &Scope<'_>,
    ) -> anyhow::Result<()> {
        let now = monotonic();
        let mut look = Look::default();
        let seats: HashMap<Seat, _> = live.seated()?.into_iter().collect();
        for (seat, member) in seats.iter().filter(|(_, member)| member.ended == 0) {
            note(&mut look.pending, (member.cgroup, seat.group), 0);
            let seen = Seen {
                cgroup: member.cgroup,
                rank: member.rank,
                handle: member.handle,
            };
            let of_group = self.seen.entry(seat.group).or_default();
            of_group.insert(seat.index, seen);
        }
        let made = made(known);
        self.seen.retain(|group, _| made.contains_key(group));
        look.at_pairs(live, &seats, &made, &self.seen, now)?;
        look.at_started(live, now)?;
        let mut owners = Shown::new(max_owners);
        self.tell_owners(look.pending, naming, ranks, &mut owners, scope);
        let alive: HashSet<_> = known.iter().map(|(name, _)| *name).collect();
        self.tell_missing(look.missing, &alive, naming, ranks, &mut owners, scope);
        Ok(())
    }

    fn tell_owners(
        &mut self,
        pending: BTreeMap<(u64, u64), u64>,
        naming: &Naming<'_>,
        ranks: &Ranks,
        owners: &mut Shown,
        scope: &Scope<'_>,
    ) {
        self.owners.clear();
        self.communicators.clear();
        for ((cgroup, group), age) in pending {
            let labels = owners.of(scope.resolve(cgroup));
            if age >= TOLD_AFTER {
                let communicator = naming.of(ranks, &labels, group);
                let key = (labels.clone(), communicator);
                note(&mut self.communicators, key, age);
            }
            note(&mut self.owners, labels, age);
        }
    }

    /// `alive` are the communicators that there are.
    fn tell_missing(
        &mut self,
        missing: BTreeMap<(u64, u64), u64>,
        alive: &HashSet<Handle>,
        naming: &Naming<'_>,
        ranks: &Ranks,
        owners: &mut Shown,
        scope: &Scope<'_>,
    ) {
        self.missing.clear();
        for (asked, ((group, index), waited)) in missing.into_iter().enumerate() {
            let seen = self.seen[&group][&index];
            let state = if !alive.contains(&seen.handle) {
                State::Gone
            } else if asked >= ASKED {
                State::Unread
            } else {
                // The lower half is the process.
                let stat = fs::read_to_string(format!("/proc/{}/stat", seen.handle.process as u32));
                stat.map_or(State::Gone, |stat| state(&stat))
            };
            let labels = owners.of(scope.resolve(seen.cgroup));
            let communicator = naming.of(ranks, &labels, group);
            let has_rank = seen.rank != NO_RANK && communicator != OTHER;
            let missing = Missing {
                labels,
                communicator,
                rank: match has_rank {
                    true => seen.rank.to_string(),
                    false => String::new(),
                },
                state: STATES[state as usize],
            };
            note(&mut self.missing, missing, waited);
        }
    }

    /// What a page shows, for tests: of each container its age, and from 10 s on its communicator and a rank that is stopped.
    pub fn example(ages: impl IntoIterator<Item = (Labels, Duration)>, communicator: &str) -> Self {
        let mut pending = Self::default();
        for (labels, age) in ages {
            let age = age.as_nanos() as u64;
            if age >= TOLD_AFTER {
                let key = (labels.clone(), communicator.to_owned());
                note(&mut pending.communicators, key, age);
                let missing = Missing {
                    labels: labels.clone(),
                    communicator: communicator.to_owned(),
                    rank: "1".to_owned(),
                    state: STATES[State::Stopped as usize],
                };
                note(&mut pending.missing, missing, age);
            }
            note(&mut pending.owners, labels, age);
        }
        pending
    }

    /// Renders the ages.
    pub(super) fn render(&self, families: &mut Families) {
        for (owner, age) in &self.owners {
            let labels = [&*owner.namespace, &*owner.pod, &*owner.container];
            families.add(&PENDING, &labels, seconds(*age));
        }
        for ((owner, communicator), age) in &self.communicators {
            let labels = [
                &*owner.namespace,
                &*owner.pod,
                &*owner.container,
                communicator,
            ];
            families.add(&OF_COMMUNICATOR, &labels, seconds(*age));
        }
        for (missing, age) in &self.missing {
            let owner = &missing.labels;
            let labels = [
                &*owner.namespace,
                &*owner.pod,
                &*owner.container,
                &missing.communicator,
                &missing.rank,
                missing.state,
            ];
            families.add(&MISSING, &labels, seconds(*age));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_follows_the_last_parenthesis() {
        for (stat, expected) in [
            ("7 (python) S 1 7 7", State::Sleeping),
            ("7 (python) D 1", State::Sleeping),
            ("7 (python) R 1", State::Running),
            ("7 (a) R) T 1", State::Stopped),
            ("7 (python) t 1", State::Stopped),
            ("7 (python) Z 1", State::Gone),
            ("7 (python)", State::Unread),
            ("", State::Unread),
        ] {
            assert_eq!(state(stat), expected, "{stat}");
        }
        assert_eq!(STATES[State::Unread as usize], "unread");
        assert_eq!(STATES[State::Gone as usize], "gone");
    }
}
