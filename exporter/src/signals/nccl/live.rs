// SPDX-License-Identifier: Apache-2.0
//! What do processes have in the maps of the kernel half, and what of that is of nobody any more?
//!
//! The kernel half adds to most values at any time, so user space never writes one of those: what it has to take off stands in a map beside it
//! ([`Corrections`]). Once a second all is counted anew, so that nothing that is out (a return that was not seen, a process that was killed) stays
//! so. What seems wrong has to at two looks, since the maps are not read at one time.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::Hash,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::{
    Pod,
    maps::{self, MapData},
};
use exporter_common::{
    Loss, NO_CGROUP,
    nccl::{
        ANY_PROCESS, Arrivals, Begun, COLLECTIVES, Communicator, Frame, Group, Handle, LATE,
        Layout, MAX_PROCESSES, MAX_SEATS, Member, Owner, Pair, Seat, Share, Shares, Since, Started,
    },
};

use crate::{
    libraries::watch::processes,
    lock::lock,
    probe::{Attached, Counters, Health},
    signals::{entries, follow, removed, was_there},
};

/// What is read: the maps, where the object is loaded.
#[derive(Default)]
pub(super) struct Core {
    pub(super) live: Option<Live>,
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        let Some(live) = &self.live else {
            return Ok(Health::default());
        };
        let mut health = live.counters.health()?;
        health.losses[Loss::Untimed] += live.unpaired;
        Ok(health)
    }
}

/// How long a group without ranks is kept, which may be about to have its first, and the shares of a cgroup that has nothing.
const GROUP_STAYS: Duration = Duration::from_secs(60);

/// The object's maps, for as long as one of them is read or swept.
pub(super) struct Live {
    pub(super) counters: Arc<Counters>,
    pub(super) owners: maps::HashMap<MapData, u64, Owner>,
    pub(super) communicators: maps::HashMap<MapData, Handle, Communicator>,
    pub(super) groups: maps::HashMap<MapData, u64, Group>,
    left: Corrections<u64, u64>,
    seats: maps::HashMap<MapData, Seat, Member>,
    pub(super) pairs: maps::HashMap<MapData, Pair, Arrivals>,
    pub(super) started: maps::HashMap<MapData, Started, Since>,
    pub(super) layouts: maps::HashMap<MapData, u32, Layout>,
    in_progress: maps::HashMap<MapData, Frame, Begun>,
    shares: maps::HashMap<MapData, u64, Shares>,
    returned: Corrections<u64, Shares>,
    /// Seats whose rank is gone without a word, and those of which it seemed so at the last look.
    gone: HashSet<Seat>,
    orphans: HashSet<Seat>,
    /// How many ranks groups counted at the last look, and how many had a communicator, where that differed.
    odd: HashMap<u64, (u64, u64)>,
    /// Groups that had no rank, and cgroups that had nothing, and since when.
    empty: HashMap<u64, Instant>,
    idle: HashMap<u64, Instant>,
    /// Collectives that can never be complete, as it seemed at the last look.
    suspects: HashSet<Pair>,
    /// Collectives that were never complete: some rank's call, or an end that the plugin tells, was not seen.
    pub(super) unpaired: u64,
}

/// A map that only user space writes, beside one to which the kernel half adds: what is written to a value of that one would take the place of
/// what is added meanwhile.
struct Corrections<K, V> {
    map: maps::HashMap<MapData, K, V>,
    written: HashMap<K, V>,
}

impl<K: Pod + Eq + Hash, V: Pod + Default + PartialEq> Corrections<K, V> {
    fn new(map: maps::HashMap<MapData, K, V>) -> Self {
        Self {
            map,
            written: HashMap::new(),
        }
    }

    fn get(&self, key: &K) -> V {
        self.written.get(key).copied().unwrap_or_default()
    }

    fn set(&mut self, key: K, value: V) -> anyhow::Result<()> {
        if self.get(&key) != value {
            let entered = self.map.insert(key, value, 0);
            entered.context("enter a correction into a map")?;
            self.written.insert(key, value);
        }
        Ok(())
    }

    fn remove(&mut self, key: &K) -> anyhow::Result<()> {
        match self.written.remove(key) {
            Some(_) => removed(self.map.remove(key)),
            None => Ok(()),
        }
    }
}

/// What processes have in the maps: read before it is asked which processes there are, so that one that has come meanwhile is not taken for
/// gone.
struct Held {
    layouts: Vec<u32>,
    started: Vec<(Started, Since)>,
    in_progress: Vec<(Frame, Begun)>,
    communicators: Vec<(Handle, Communicator)>,
}

impl Live {
    pub(super) fn new(attached: &mut Attached) -> anyhow::Result<Self> {
        let mut shares: maps::HashMap<MapData, u64, Shares> = attached.map("SHARES")?;
        let rest = shares.insert(NO_CGROUP, Shares::default(), 0);
        rest.context("reserve an entry of the map SHARES")?;
        Ok(Self {
            counters: attached.counters(),
            owners: attached.map("OWNERS")?,
            communicators: attached.map("COMMUNICATORS")?,
            groups: attached.map("GROUPS")?,
            left: Corrections::new(attached.map("LEFT")?),
            seats: attached.map("SEATS")?,
            pairs: attached.map("PAIRS")?,
            started: attached.map("STARTED")?,
            layouts: attached.map("LAYOUTS")?,
            in_progress: attached.map("IN_PROGRESS")?,
            shares,
            returned: Corrections::new(attached.map("RETURNED")?),
            gone: HashSet::new(),
            orphans: HashSet::new(),
            odd: HashMap::new(),
            empty: HashMap::new(),
            idle: HashMap::new(),
            suspects: HashSet::new(),
            unpaired: 0,
        })
    }

    fn held(&self) -> anyhow::Result<Held> {
        let layouts = entries(&self.layouts)?.into_iter();
        Ok(Held {
            layouts: layouts.map(|(process, _)| process).collect(),
            started: entries(&self.started)?,
            in_progress: entries(&self.in_progress)?,
            communicators: entries(&self.communicators)?,
        })
    }

    /// Lets go of what belonged to processes that are gone, and of what can never end; then counts what is left, which mends whatever is out.
    fn sweep(&mut self, mut held: Held, there: &BTreeSet<u32>) -> anyhow::Result<()> {
        let gone = |process: u64| !there.contains(&(process as u32));
        let seated: HashSet<u32> = held
            .communicators
            .iter()
            .map(|(name, _)| name.process as u32)
            .collect();
        let is_full = held.layouts.len() > MAX_PROCESSES as usize / 4 * 3;
        for process in std::mem::take(&mut held.layouts) {
            // Without a communicator it may have to ask again.
            let is_idle = is_full && !seated.contains(&process);
            if process != ANY_PROCESS && (is_idle || gone(process.into())) {
                removed(self.layouts.remove(&process))?;
            }
        }
        let mut trouble = Ok(());
        held.communicators.retain(|(name, _)| {
            let stays = !gone(name.process);
            if !stays {
                note(&mut trouble, removed(self.communicators.remove(name)));
            }
            stays
        });
        held.in_progress.retain(|(frame, _)| {
            let stays = !gone(frame.thread >> 32);
            if !stays {
                note(&mut trouble, removed(self.in_progress.remove(frame)));
            }
            stays
        });
        held.started.retain(|(name, since)| {
            // NCCL loses the times of a channel now and then: what started after it has finished.
            let communicator = self.communicators.get(&name.handle, 0).ok();
            let passed = communicator.is_some_and(|communicator| since.at < communicator.finished);
            let stays = !passed && communicator.is_some() && !gone(name.handle.process);
            if !stays {
                let outcome = was_there(self.started.remove(name));
                self.unpaired += u64::from(passed && matches!(outcome, Ok(true)));
                note(&mut trouble, outcome.map(|_| ()));
            }
            stays
        });
        trouble?;
        let groups: HashMap<u64, Group> = entries(&self.groups)?.into_iter().collect();
        let seats = entries(&self.seats)?;
        self.find_orphans(&seats, &held.communicators);
        self.count_members(&groups, &held)?;
        let pairs = self.clear_pairs(&held.communicators)?;
        self.count_shares(&groups, &seats, &pairs, &held)?;
        let seated: HashSet<u64> = seats.into_iter().map(|(seat, _)| seat.group).collect();
        self.clear_groups(&groups, &seated)
    }

    /// Finds the seats of ranks whose communicator is gone. A rank that comes this moment seems to be one, but not at two looks.
    fn find_orphans(&mut self, seats: &[(Seat, Member)], known: &[(Handle, Communicator)]) {
        let known: HashMap<_, _> = known
            .iter()
            .map(|(handle, communicator)| (handle, communicator.seat()))
            .collect();
        let sits = |(seat, member): &&(Seat, Member)| {
            member.ended != 0 || known.get(&member.handle) == Some(seat)
        };
        let orphans = seats.iter().filter(|seated| !sits(seated));
        let orphans: HashSet<Seat> = orphans.map(|(seat, _)| *seat).collect();
        self.gone = self.orphans.intersection(&orphans).copied().collect();
        self.orphans = orphans;
    }

    /// Corrects how many ranks groups have. Where one comes or goes this moment it seems wrong, but not the same way at two looks.
    fn count_members(&mut self, groups: &HashMap<u64, Group>, held: &Held) -> anyhow::Result<()> {
        let known = held
            .communicators
            .iter()
            .map(|(_, communicator)| communicator.group);
        let begun = held.in_progress.iter().map(|(_, begun)| begun.group);
        let mut counted: HashMap<u64, u64> = HashMap::new();
        for group in known.chain(begun) {
            *counted.entry(group).or_default() += 1;
        }
        let before = std::mem::take(&mut self.odd);
        for (key, group) in groups {
            let here = counted.get(key).copied().unwrap_or(0);
            let left = group.members.wrapping_sub(here);
            if left == self.left.get(key) {
                continue;
            }
            let seen = (group.members, here);
            match before.get(key) == Some(&seen) {
                true => self.left.set(*key, left)?,
                false => drop(self.odd.insert(*key, seen)),
            }
        }
        Ok(())
    }

    /// Every rank, those that are gone without a word among those that have ended.
    pub(super) fn seated(&self) -> anyhow::Result<Vec<(Seat, Member)>> {
        let mut seats = entries(&self.seats)?;
        for (seat, member) in &mut seats {
            member.ended |= u64::from(self.gone.contains(seat));
        }
        Ok(seats)
    }

    /// Clears the seat of a rank that has ended and been booked.
    pub(super) fn clear_seat(&mut self, seat: &Seat) -> anyhow::Result<()> {
        self.gone.remove(seat);
        removed(self.seats.remove(seat))
    }

    /// Removes groups that have had no rank for a while.
    fn clear_groups(
        &mut self,
        groups: &HashMap<u64, Group>,
        seated: &HashSet<u64>,
    ) -> anyhow::Result<()> {
        let empty = groups
            .iter()
            .filter(|(key, group)| group.members == self.left.get(key) && !seated.contains(key));
        let empty: Vec<u64> = empty.map(|(key, _)| *key).collect();
        for key in rested(&mut self.empty, empty) {
            removed(self.groups.remove(&key))?;
            self.left.remove(&key)?;
        }
        Ok(())
    }

    /// Counts what each cgroup has of the maps, and forgets those that have had nothing for a while.
    fn count_shares(
        &mut self,
        groups: &HashMap<u64, Group>,
        seats: &[(Seat, Member)],
        pairs: &[Pair],
        held: &Held,
    ) -> anyhow::Result<()> {
        let taken: HashMap<u64, Shares> = entries(&self.shares)?.into_iter().collect();
        let mut has: HashMap<u64, Shares> = HashMap::new();
        let mut add = |cgroup: u64, kind: Share| {
            let cgroup = if taken.contains_key(&cgroup) {
                cgroup
            } else {
                NO_CGROUP
            };
            has.entry(cgroup).or_default().counts[kind as usize] += 1;
        };
        for (_, member) in seats {
            add(member.cgroup, Share::Seats);
        }
        for group in groups.values() {
            add(group.cgroup, Share::Groups);
        }
        for pair in pairs {
            let cgroup = groups
                .get(&pair.group)
                .map_or(NO_CGROUP, |group| group.cgroup);
            add(cgroup, Share::Pairs);
        }
        for (_, since) in &held.started {
            add(since.cgroup, Share::Started);
        }
        for (_, begun) in &held.in_progress {
            add(begun.cgroup, Share::Calls);
        }
        let mut nothing = Vec::new();
        for (cgroup, taken) in &taken {
            let has = has.get(cgroup).copied().unwrap_or_default();
            let returned = std::array::from_fn(|i| taken.counts[i].wrapping_sub(has.counts[i]));
            self.returned.set(*cgroup, Shares { counts: returned })?;
            if has == Shares::default() && *cgroup != NO_CGROUP {
                nothing.push(*cgroup);
            }
        }
        for cgroup in rested(&mut self.idle, nothing) {
            removed(self.shares.remove(&cgroup))?;
            self.returned.remove(&cgroup)?;
        }
        Ok(())
    }

    /// Removes collectives for which nobody waits, and those that can never be complete since a rank has gone on. Returns those that are left.
    fn clear_pairs(&mut self, known: &[(Handle, Communicator)]) -> anyhow::Result<Vec<Pair>> {
        // What they have made was read before who has arrived: a rank that has gone on meanwhile has arrived too.
        let made = made(known);
        let (mut suspects, mut left) = (HashSet::new(), Vec::new());
        for (pair, arrivals) in entries(&self.pairs)? {
            let fate = fate(&pair, &arrivals, &made);
            // It may be about to be completed.
            if fate != Fate::Waits && self.suspects.contains(&pair) {
                removed(self.pairs.remove(&pair))?;
                self.unpaired += u64::from(fate == Fate::Missed);
                continue;
            }
            left.push(pair);
            if fate != Fate::Waits {
                suspects.insert(pair);
            }
        }
        self.suspects = suspects;
        Ok(left)
    }
}

/// What each rank of each group has made.
pub(super) fn made(known: &[(Handle, Communicator)]) -> HashMap<u64, Vec<Communicator>> {
    let mut made: HashMap<u64, Vec<Communicator>> = HashMap::new();
    for (_, communicator) in known {
        made.entry(communicator.group)
            .or_default()
            .push(*communicator);
    }
    made
}

/// Keeps the first of several errors.
fn note(first: &mut anyhow::Result<()>, outcome: anyhow::Result<()>) {
    if first.is_ok() {
        *first = outcome;
    }
}

/// Of those that are at rest now, the ones that have been for [`GROUP_STAYS`]; and since when each is.
fn rested(since: &mut HashMap<u64, Instant>, now_at_rest: Vec<u64>) -> Vec<u64> {
    let now = Instant::now();
    let before = std::mem::take(since);
    let (mut long, mut others) = (Vec::new(), HashMap::new());
    for key in now_at_rest {
        let at = before.get(&key).copied().unwrap_or(now);
        if now - at > GROUP_STAYS {
            long.push(key);
        } else {
            others.insert(key, at);
        }
    }
    *since = others;
    long
}

/// What is to become of a collective that is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Ranks wait for others, which may have died: then it hangs.
    Waits,
    /// Nobody waits any more.
    Over,
    /// A rank that is missing has gone on: its call was not seen.
    Missed,
}

/// `made` are the ranks of each group that there are.
pub(super) fn fate(
    pair: &Pair,
    arrivals: &Arrivals,
    made: &HashMap<u64, Vec<Communicator>>,
) -> Fate {
    let members = made.get(&pair.group).map_or(&[][..], Vec::as_slice);
    let arrived =
        |communicator: &&Communicator| arrivals.at[communicator.seat as usize % MAX_SEATS] != 0;
    let (waiting, missing): (Vec<_>, Vec<_>) = members.iter().partition(arrived);
    if waiting.is_empty() || arrivals.count >= arrivals.expected {
        return Fate::Over;
    }
    // What the plugin tells is not numbered by the kernel half.
    let operation = pair.operation as usize;
    let passed = |communicator: &&Communicator| {
        operation < COLLECTIVES && communicator.made[operation] > pair.sequence
    };
    if !missing.iter().any(passed) {
        return Fate::Waits;
    }
    // One that was late to be followed may have called it before.
    let late = members
        .iter()
        .any(|communicator| communicator.state & LATE != 0);
    if late { Fate::Over } else { Fate::Missed }
}

/// Lets go of what belonged to processes that are gone.
pub(super) fn sweep(core: &Mutex<Core>) -> anyhow::Result<()> {
    let held = match &lock(core).live {
        Some(live) => live.held()?,
        None => return Ok(()),
    };
    let there = processes().context("list the processes")?;
    match &mut lock(core).live {
        Some(live) => live.sweep(held, &there),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = Pair {
        group: 1,
        operation: 4,
        sequence: 7,
    };

    fn communicator(seat: u64, made: u64, state: u64) -> Communicator {
        let mut all = [0; COLLECTIVES];
        all[PAIR.operation as usize] = made;
        Communicator {
            group: PAIR.group,
            seat,
            state,
            children: 0,
            finished: 0,
            made: all,
        }
    }

    fn arrivals(seats: &[usize]) -> Arrivals {
        let mut at = [0; MAX_SEATS];
        for seat in seats {
            at[*seat] = 100;
        }
        Arrivals {
            expected: 3,
            count: seats.len() as u64,
            since: 100,
            at,
        }
    }

    #[test]
    fn a_collective_waits_as_long_as_some_rank_does() {
        let of = |seats: &[usize], communicators: Vec<Communicator>| {
            let made = HashMap::from([(PAIR.group, communicators)]);
            fate(&PAIR, &arrivals(seats), &made)
        };
        let (gone_on, waits) = (
            |seat| communicator(seat, 9, 0),
            |seat| communicator(seat, 8, 0),
        );
        let behind = |seat| communicator(seat, 7, 0);
        // The third has not come yet; it is dead.
        assert_eq!(
            of(&[0, 1], vec![waits(0), waits(1), behind(2)]),
            Fate::Waits
        );
        assert_eq!(of(&[0, 1], vec![waits(0), waits(1)]), Fate::Waits);
        // Those who waited are dead; all are.
        assert_eq!(of(&[0, 1], vec![behind(2)]), Fate::Over);
        assert_eq!(of(&[0, 1], Vec::new()), Fate::Over);
        // All have come: it is being reckoned.
        let all = vec![waits(0), waits(1), waits(2)];
        assert_eq!(of(&[0, 1, 2], all), Fate::Over);
        // The third has gone on without having been seen here; it may have been before it was followed.
        let passed = vec![waits(0), waits(1), gone_on(2)];
        assert_eq!(of(&[0, 1], passed), Fate::Missed);
        let late = vec![waits(0), waits(1), communicator(2, 9, LATE)];
        assert_eq!(of(&[0, 1], late), Fate::Over);
    }
}
