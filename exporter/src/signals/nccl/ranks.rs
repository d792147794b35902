// SPDX-License-Identifier: Apache-2.0
//! Whose rank waited, and who came last? The accounts of ranks, by pod and communicator.
//!
//! As a [`crate::ledger::Ledger`] they never decrease, are held until their owner is known, and begin anew with a pod of the same name.
//! Beyond [`NAMED`] communicators of an owner, those with least wait are `other`; one that becomes named, or ceases to be, begins
//! anew, and `other` keeps what it has.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use exporter_common::nccl::{Member, NO_RANK, SOURCES, Seat};

use crate::{
    ledger::{OTHER, PATIENCE, UNKNOWN},
    pods::{Labels, Owner, Resolution},
};

/// Communicators of an owner that are shown by name.
pub const NAMED: usize = 32;

/// Nanoseconds waited, collectives, last arrivals, nanoseconds on the GPU.
pub type Counts = [u64; 4];

fn counts(member: &Member) -> Counts {
    [
        member.wait,
        member.collectives,
        member.last,
        member.duration,
    ]
}

fn add(to: &mut Counts, by: &Counts) {
    for (to, by) in to.iter_mut().zip(by) {
        *to += by;
    }
}

/// Which rank of which communicator, and who tells: an index of [`SOURCES`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    number: Option<u64>,
    source: usize,
}

/// What the kernel half has of a rank.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Where it is.
    pub seat: Seat,
    /// What has been counted.
    pub member: Member,
    /// The communicator's number.
    pub communicator: u64,
    /// An index of [`SOURCES`].
    pub source: usize,
}

#[derive(Debug)]
struct Chair {
    seen: Counts,
    held: Option<(Counts, Instant)>,
}

#[derive(Debug, Default)]
struct Communicator {
    named: bool,
    /// What it waited altogether, named or not.
    waited: u64,
    ranks: BTreeMap<Rank, Counts>,
    /// When some rank of it was last there.
    there: Option<Instant>,
}

#[derive(Debug, Default)]
struct Account {
    uid: Option<Arc<str>>,
    communicators: BTreeMap<u64, Communicator>,
    other: BTreeMap<usize, Counts>,
}

/// The accounts.
#[derive(Debug)]
pub struct Ranks {
    chairs: HashMap<Seat, Chair>,
    accounts: BTreeMap<Labels, Account>,
    limit: usize,
}

impl Ranks {
    /// Makes accounts for `limit` owners beside the host and `unknown`; the rest is `pod="other"`.
    pub fn new(limit: usize) -> Self {
        Self {
            chairs: HashMap::new(),
            accounts: BTreeMap::new(),
            limit,
        }
    }

    /// Books what each rank grew by. Returns the seats that have ended and been booked.
    pub fn book(
        &mut self,
        owners: &HashSet<Owner>,
        readings: &[Reading],
        resolve: impl Fn(u64) -> Resolution,
        retention: Duration,
        now: Instant,
    ) -> Vec<Seat> {
        let known: HashSet<_> = owners.iter().map(|owner| &owner.labels).collect();
        self.accounts.retain(|labels, _| {
            let apart = labels.namespace.is_empty() && labels.container.is_empty();
            apart || known.contains(labels)
        });
        let there: HashSet<_> = readings.iter().map(|reading| reading.seat).collect();
        self.chairs.retain(|seat, _| there.contains(seat));
        let mut ended = Vec::new();
        for reading in readings {
            let chair = self.chairs.entry(reading.seat).or_insert(Chair {
                seen: [0; 4],
                held: None,
            });
            let totals = counts(&reading.member);
            let restarted = totals.iter().zip(&chair.seen).any(|(new, old)| new < old);
            let seen = if restarted { [0; 4] } else { chair.seen };
            chair.seen = totals;
            let grown: Counts = std::array::from_fn(|i| totals[i] - seen[i]);
            if grown.iter().any(|by| *by > 0) {
                add(&mut chair.held.get_or_insert(([0; 4], now)).0, &grown);
            }
            let resolution = resolve(reading.member.cgroup);
            let since = chair.held.map_or(now, |(_, since)| since);
            let patient = now.saturating_duration_since(since) < PATIENCE;
            let (labels, uid) = match resolution {
                Resolution::Pending(_) if patient => continue,
                Resolution::Owner(owner) | Resolution::Pending(Some(owner)) => {
                    (owner.labels, Some(owner.uid))
                }
                Resolution::Host => (Labels::default(), None),
                Resolution::Pending(None) | Resolution::Unknown => {
                    (Labels::only_pod(UNKNOWN), None)
                }
            };
            let held = chair.held.take().map_or([0; 4], |(held, _)| held);
            self.credit(labels, uid, reading, &held, now);
            if reading.member.ended != 0 {
                ended.push(reading.seat);
            }
        }
        for (labels, account) in &mut self.accounts {
            account.communicators.retain(|_, communicator| {
                let there = communicator.there.unwrap_or(now);
                now.saturating_duration_since(there) < retention
            });
            if *labels != Labels::only_pod(OTHER) {
                account.name();
            }
        }
        ended
    }

    fn credit(
        &mut self,
        labels: Labels,
        uid: Option<Arc<str>>,
        reading: &Reading,
        by: &Counts,
        now: Instant,
    ) {
        let full = self.accounts.len() >= self.limit;
        let labels = match full && !self.accounts.contains_key(&labels) && uid.is_some() {
            true => Labels::only_pod(OTHER),
            false => labels,
        };
        let apart = labels.pod.as_ref() == OTHER && labels.namespace.is_empty();
        let uid = uid.filter(|_| !apart);
        let account = self.accounts.entry(labels).or_default();
        if account.uid != uid {
            *account = Account {
                uid,
                ..Account::default()
            };
        }
        // Of owners that are not told apart no communicator is.
        let named = account.communicators.values();
        let room = !apart && named.filter(|communicator| communicator.named).count() < NAMED;
        let communicator = account
            .communicators
            .entry(reading.communicator)
            .or_insert_with(|| Communicator {
                named: room,
                ..Communicator::default()
            });
        communicator.there = Some(now);
        communicator.waited += by[0];
        let rank = reading.member.rank;
        let rank = Rank {
            number: (rank != NO_RANK).then_some(rank),
            source: reading.source,
        };
        let to = match communicator.named {
            true => communicator.ranks.entry(rank).or_default(),
            false => account.other.entry(reading.source).or_default(),
        };
        add(to, by);
    }

    /// Every rank, with its communicator and source; of communicators that are not named `other`, without a rank.
    pub fn each(&self, mut tell: impl FnMut(&Labels, &str, &str, &str, &Counts)) {
        for (labels, account) in &self.accounts {
            for (number, communicator) in &account.communicators {
                let name = format!("{number:016x}");
                for (rank, counts) in &communicator.ranks {
                    let number = rank.number.map(|number| number.to_string());
                    let number = number.unwrap_or_default();
                    tell(labels, &name, &number, SOURCES[rank.source], counts);
                }
            }
            for (source, counts) in &account.other {
                tell(labels, OTHER, "", SOURCES[*source], counts);
            }
        }
    }
}

impl Account {
    /// Gives a name to the one with most wait that has none, if another that has one waited half as much.
    fn name(&mut self) {
        let of = |named: bool| {
            let all = self.communicators.iter();
            all.filter(move |(_, communicator)| communicator.named == named)
                .map(|(number, communicator)| (communicator.waited, *number))
        };
        let free = of(true).count() < NAMED;
        let (Some((most, new)), least) = (of(false).max(), of(true).min()) else {
            return;
        };
        if !free {
            match least {
                Some((least, old)) if least < most / 2 => {
                    if let Some(communicator) = self.communicators.get_mut(&old) {
                        communicator.named = false;
                        communicator.ranks.clear();
                    }
                }
                _ => return,
            }
        }
        if let Some(communicator) = self.communicators.get_mut(&new) {
            communicator.named = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use exporter_common::nccl::Communicator as Handle;

    use super::*;

    fn reading(communicator: u64, rank: u64, totals: Counts) -> Reading {
        let seat = Seat {
            group: communicator,
            index: rank % 64,
        };
        let handle = Handle {
            process: 1,
            address: 2,
        };
        let [wait, collectives, last, duration] = totals;
        let member = Member {
            cgroup: 7,
            handle,
            rank,
            wait,
            collectives,
            last,
            duration,
            ended: 0,
        };
        Reading {
            seat,
            member,
            communicator,
            source: 0,
        }
    }

    fn book(ranks: &mut Ranks, readings: &[Reading], now: Instant) -> Vec<Seat> {
        let host = |_| Resolution::Host;
        let retention = Duration::from_secs(300);
        ranks.book(&HashSet::new(), readings, host, retention, now)
    }

    fn shown(ranks: &Ranks) -> Vec<(String, String, Counts)> {
        let mut all = Vec::new();
        ranks.each(|_, communicator, rank, _, counts| {
            all.push((communicator.to_owned(), rank.to_owned(), *counts));
        });
        all
    }

    #[test]
    fn what_a_rank_grew_by_is_its_communicators() {
        let mut ranks = Ranks::new(10);
        let now = Instant::now();
        book(&mut ranks, &[reading(0xabc, 3, [5, 1, 0, 0])], now);
        book(
            &mut ranks,
            &[
                reading(0xabc, 3, [9, 2, 1, 0]),
                reading(0xabc, NO_RANK, [1, 1, 0, 0]),
            ],
            now,
        );
        let name = "0000000000000abc".to_owned();
        let expected = vec![
            (name.clone(), String::new(), [1, 1, 0, 0]),
            (name, "3".to_owned(), [9, 2, 1, 0]),
        ];
        assert_eq!(shown(&ranks), expected);
    }

    #[test]
    fn beyond_the_limit_they_are_other_and_those_that_wait_most_are_named() {
        let mut ranks = Ranks::new(10);
        let now = Instant::now();
        let all = |wait: &dyn Fn(u64) -> u64| -> Vec<Reading> {
            let numbers = 0..1000;
            numbers.map(|n| reading(n, 0, [wait(n), 1, 0, 0])).collect()
        };
        book(&mut ranks, &all(&|_| 10), now);
        let first = shown(&ranks);
        assert_eq!(first.len(), NAMED + 1);
        let (name, rank, counts) = &first[NAMED];
        assert_eq!((&**name, &**rank), (OTHER, ""));
        assert_eq!(
            *counts,
            [10 * (1000 - NAMED as u64), 1000 - NAMED as u64, 0, 0]
        );
        // Number 999 begins to wait.
        book(&mut ranks, &all(&|n| if n == 999 { 1000 } else { 10 }), now);
        book(&mut ranks, &all(&|n| if n == 999 { 2000 } else { 10 }), now);
        let then = shown(&ranks);
        let named = then.iter().find(|(name, ..)| name == "00000000000003e7");
        assert_eq!(named.expect("named").2, [1000, 0, 0, 0]);
        let other = then.iter().find(|(name, ..)| name == OTHER).expect("there");
        assert!(other.2[0] >= counts[0], "never less");
        assert_eq!(then.len(), NAMED + 1);
    }

    #[test]
    fn what_has_ended_is_booked_once_more_and_its_account_stays_for_a_while() {
        let mut ranks = Ranks::new(10);
        let now = Instant::now();
        let mut last = reading(1, 0, [3, 1, 1, 0]);
        last.member.ended = 1;
        assert_eq!(book(&mut ranks, &[last.clone()], now), [last.seat]);
        book(&mut ranks, &[], now);
        assert_eq!(shown(&ranks).len(), 1);
        book(&mut ranks, &[], now + Duration::from_secs(301));
        assert_eq!(shown(&ranks), []);
    }
}
