// SPDX-License-Identifier: Apache-2.0
//! Whose rank waited, and who came last? The accounts of ranks, by pod and communicator.
//!
//! As a [`crate::ledger::Ledger`] they never decrease, are held until their owner is known, and begin anew with a pod of the same name.
//!
//! A job chooses how many communicators and ranks it has, and what they are called. So an owner has accounts by name for [`NAMED`]
//! communicators, [`RANKS`] ranks of each and [`OF_OWNER`] in all, and a node for [`OF_NODE`]; the rest is `other`. Of the communicators of an
//! owner those with most wait have names; where the node has no room, it is made by the owner that has most. What becomes named, or ceases
//! to be, begins anew, and `other` keeps what it has. Whatever has not been there for the retention time goes.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    sync::Arc,
    time::{Duration, Instant},
};

use exporter_common::nccl::{MAX_SEATS, Member, NO_RANK, SOURCES, Seat};

use crate::{
    ledger::{Growth, OTHER},
    pods::{Labels, Owner, Resolution},
};

/// Communicators of an owner that are shown by name.
pub const NAMED: usize = 32;

/// Ranks of a communicator that one who tells shows by name: as many as have seats.
pub const RANKS: usize = MAX_SEATS;

/// Ranks of all communicators of an owner, of both who tell: 16 communicators with 8 ranks have 256. Each has up to four series.
pub const OF_OWNER: usize = 512;

/// The same of all owners.
pub const OF_NODE: usize = 2048;

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
        *to = to.saturating_add(*by);
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

/// Counts, and when who counts was last there.
#[derive(Debug)]
struct Total {
    counts: Counts,
    there: Instant,
}

impl Total {
    fn new(now: Instant) -> Self {
        Self {
            counts: [0; 4],
            there: now,
        }
    }

    fn add(&mut self, by: &Counts, now: Instant) {
        add(&mut self.counts, by);
        self.there = now;
    }
}

#[derive(Debug, Default)]
struct Communicator {
    named: bool,
    /// What it waited altogether, named or not.
    waited: u64,
    /// Where it is named.
    ranks: BTreeMap<Rank, Total>,
    /// Whether some rank of it is there now.
    there: bool,
}

#[derive(Debug, Default)]
struct Account {
    uid: Option<Arc<str>>,
    communicators: BTreeMap<u64, Communicator>,
    other: BTreeMap<usize, Total>,
    /// How many communicators have names, and how many accounts of ranks these have.
    names: usize,
    named: usize,
}

/// The accounts.
#[derive(Debug)]
pub struct Ranks {
    growth: Growth<Seat, 4>,
    accounts: BTreeMap<Labels, Account>,
    limit: usize,
}

impl Ranks {
    /// Makes accounts for `limit` owners beside the host and `unknown`; the rest is `pod="other"`.
    pub fn new(limit: usize) -> Self {
        Self {
            growth: Growth::default(),
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
        self.growth.retain(|seat| there.contains(seat));
        let mut ended = Vec::new();
        for reading in readings {
            let seat = reading.seat;
            self.growth.note(seat, counts(&reading.member), now);
            let resolution = resolve(reading.member.cgroup);
            if matches!(resolution, Resolution::Pending(_)) && self.growth.may_wait(&seat, now) {
                // One that waits for nothing waits for nobody.
                if reading.member.ended != 0 && !self.growth.holds(&seat) {
                    ended.push(seat);
                }
                continue;
            }
            let uid = resolution.owner().map(|owner| Arc::clone(&owner.uid));
            let held = self.growth.take(&seat);
            self.credit(resolution.labels(), uid, reading, &held, now);
            if reading.member.ended != 0 {
                ended.push(reading.seat);
            }
        }
        // Whoever sits there next begins anew.
        for seat in &ended {
            self.growth.forget(seat);
        }
        let is_fresh = |total: &Total| now.saturating_duration_since(total.there) < retention;
        for account in self.accounts.values_mut() {
            account.expire(is_fresh);
        }
        self.make_room();
        // What is named where there is no room would be taken at the next look.
        let has_room = self.named() + SOURCES.len() * RANKS < OF_NODE;
        for (labels, account) in &mut self.accounts {
            // Of owners that are not told apart no communicator is.
            if has_room && *labels != Labels::only_pod(OTHER) {
                account.name();
            }
        }
        ended
    }

    /// Whether an owner's communicator is shown by its number.
    pub fn is_named(&self, labels: &Labels, number: u64) -> bool {
        let account = self.accounts.get(labels);
        let communicator = account.and_then(|account| account.communicators.get(&number));
        communicator.is_some_and(|communicator| communicator.named)
    }

    /// How many accounts of ranks have names.
    fn named(&self) -> usize {
        self.accounts.values().map(|account| account.named).sum()
    }

    /// Takes names away until no more have one than a node may have: from the pod that has most, and of its containers from the one that has.
    fn make_room(&mut self) {
        let mut named = self.named();
        let mut by_pod: HashMap<_, usize> = HashMap::new();
        for (labels, account) in &self.accounts {
            *by_pod.entry(labels.of_pod()).or_default() += account.named;
        }
        while named > OF_NODE {
            let most = self.accounts.iter_mut().max_by_key(|(labels, account)| {
                let of_pod = by_pod.get(&labels.of_pod());
                (of_pod.copied(), labels.of_pod(), account.named)
            });
            let Some((labels, most)) = most else {
                return;
            };
            let before = most.named;
            most.take_name();
            let taken = before - most.named;
            named -= taken;
            if let Some(of_pod) = by_pod.get_mut(&labels.of_pod()) {
                *of_pod -= taken;
            }
        }
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
        let rank = reading.member.rank;
        let rank = Rank {
            number: (rank != NO_RANK).then_some(rank),
            source: reading.source,
        };
        match account.own(reading.communicator, rank, by[0], apart, now) {
            Some(own) => own.add(by, now),
            None => {
                let other = account.other.entry(reading.source);
                other.or_insert_with(|| Total::new(now)).add(by, now);
            }
        }
    }

    /// Every rank, with its communicator and source; of communicators that are not named `other`, without a rank.
    pub fn each(&self, mut tell: impl FnMut(&Labels, &str, &str, &str, &Counts)) {
        for (labels, account) in &self.accounts {
            for (number, communicator) in &account.communicators {
                let name = format!("{number:016x}");
                for (rank, total) in &communicator.ranks {
                    let number = rank.number.map(|number| number.to_string());
                    let number = number.unwrap_or_default();
                    tell(labels, &name, &number, SOURCES[rank.source], &total.counts);
                }
            }
            for (source, total) in &account.other {
                tell(labels, OTHER, "", SOURCES[*source], &total.counts);
            }
        }
    }
}

impl Account {
    /// Counts what has names anew.
    fn recount(&mut self) {
        let named = self.communicators.values();
        let named = named.filter(|communicator| communicator.named);
        (self.names, self.named) = named.fold((0, 0), |(names, ranks), communicator| {
            (names + 1, ranks + communicator.ranks.len())
        });
    }

    /// The account of a rank that has waited for so long, if it has one of its own.
    fn own(
        &mut self,
        number: u64,
        rank: Rank,
        waited: u64,
        apart: bool,
        now: Instant,
    ) -> Option<&mut Total> {
        let communicator = self.communicators.entry(number);
        let communicator = communicator.or_insert_with(|| {
            let named = !apart && self.names < NAMED;
            self.names += usize::from(named);
            Communicator {
                named,
                ..Communicator::default()
            }
        });
        communicator.there = true;
        communicator.waited += waited;
        if !communicator.named {
            return None;
        }
        let of_source = communicator.ranks.keys();
        let of_source = of_source
            .filter(|other| other.source == rank.source)
            .count();
        match communicator.ranks.entry(rank) {
            Entry::Occupied(own) => Some(own.into_mut()),
            Entry::Vacant(_) if self.named >= OF_OWNER || of_source >= RANKS => None,
            Entry::Vacant(own) => {
                self.named += 1;
                Some(own.insert(Total::new(now)))
            }
        }
    }

    /// Forgets what is not there any more.
    fn expire(&mut self, is_fresh: impl Fn(&Total) -> bool) {
        self.communicators.retain(|_, communicator| {
            communicator.ranks.retain(|_, total| is_fresh(total));
            // One without accounts shows nothing.
            std::mem::take(&mut communicator.there) || !communicator.ranks.is_empty()
        });
        self.other.retain(|_, total| is_fresh(total));
        self.recount();
    }

    /// Takes the name of the one with least wait.
    fn take_name(&mut self) {
        let named = self.communicators.values_mut();
        let named = named.filter(|communicator| !communicator.ranks.is_empty());
        if let Some(least) = named.min_by_key(|communicator| communicator.waited) {
            least.named = false;
            least.ranks.clear();
        }
        self.recount();
    }

    /// Gives a name to the one with most wait that has none, if another that has one waited half as much.
    fn name(&mut self) {
        let of = |named: bool| {
            let all = self.communicators.iter();
            all.filter(move |(_, communicator)| communicator.named == named)
                .map(|(number, communicator)| (communicator.waited, *number))
        };
        let free = self.names < NAMED;
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
        self.recount();
    }
}

#[cfg(test)]
mod tests {
    use exporter_common::nccl::Handle;

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

    /// Readings of one owner, by its cgroup: of each communicator these ranks.
    fn of(
        cgroup: u64,
        communicators: u64,
        ranks: impl Iterator<Item = u64> + Clone,
    ) -> Vec<Reading> {
        let all = (0..communicators).flat_map(|n| ranks.clone().map(move |rank| (n, rank)));
        all.map(|(communicator, rank)| {
            let mut reading = reading(cgroup << 32 | communicator, rank, [1, 1, 0, 0]);
            reading.member.cgroup = cgroup;
            // Each is another seat, whatever its number.
            reading.seat.index = rank;
            reading
        })
        .collect()
    }

    fn owner(cgroup: u64) -> Owner {
        Owner {
            labels: Labels {
                namespace: "ml".into(),
                pod: format!("pod-{cgroup}").into(),
                container: "main".into(),
            },
            uid: format!("{cgroup}").into(),
        }
    }

    fn book_owners(ranks: &mut Ranks, owners: u64, readings: &[Reading], now: Instant) {
        let all: HashSet<_> = (0..owners).map(owner).collect();
        let resolve = |cgroup| Resolution::Owner(owner(cgroup));
        ranks.book(&all, readings, resolve, Duration::from_secs(300), now);
    }

    /// Accounts with a name, by pod; and all that was counted in collectives.
    fn named(ranks: &Ranks) -> (BTreeMap<String, usize>, u64) {
        let mut by_pod: BTreeMap<String, usize> = BTreeMap::new();
        let mut collectives = 0;
        ranks.each(|labels, communicator, _, _, counts| {
            collectives += counts[1];
            *by_pod.entry(labels.pod.to_string()).or_default() +=
                usize::from(communicator != OTHER);
        });
        (by_pod, collectives)
    }

    #[test]
    fn ranks_that_are_numbered_at_random_are_bounded_and_go_by_themselves() {
        let mut ranks = Ranks::new(10);
        let begin = Instant::now();
        for second in 0..100 {
            let now = begin + Duration::from_secs(second);
            let numbers = (0..100).map(move |i| 1 << 20 | second << 10 | i);
            book_owners(&mut ranks, 1, &of(0, 1, numbers), now);
            let (by_pod, collectives) = named(&ranks);
            assert_eq!(by_pod["pod-0"], RANKS);
            assert_eq!(collectives, 100 * (second + 1), "nothing is lost");
        }
        book_owners(&mut ranks, 1, &[], begin + Duration::from_secs(399));
        assert_eq!(shown(&ranks), []);
    }

    #[test]
    fn one_job_takes_no_name_from_another() {
        let mut ranks = Ranks::new(100);
        let now = Instant::now();
        // A job with eight ranks in sixteen communicators, and then many with as many as they can.
        let victim = of(0, 16, 0..8);
        book_owners(&mut ranks, 1, &victim, now);
        let mut all = victim.clone();
        for attacker in 1..10 {
            all.extend(of(attacker, 4096, 0..1));
            all.extend(of(attacker, 20, 0..64));
            for _ in 0..3 {
                book_owners(&mut ranks, 10, &all, now);
                let (by_pod, _) = named(&ranks);
                assert_eq!(by_pod["pod-0"], 128, "{by_pod:?}");
                assert!(
                    by_pod.values().all(|named| *named <= OF_OWNER),
                    "{by_pod:?}"
                );
                assert!(by_pod.values().sum::<usize>() <= OF_NODE, "{by_pod:?}");
            }
        }
        book_owners(&mut ranks, 10, &victim, now + Duration::from_secs(301));
        assert_eq!(named(&ranks).0, BTreeMap::from([("pod-0".to_owned(), 128)]));
    }
}
