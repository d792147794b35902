// SPDX-License-Identifier: Apache-2.0
//! The codec of RDMA netlink against answers that are made up, cut, corrupt or huge; and the enumeration against devices
//! that are slow, odd or silent.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use chandra::signals::rdma::{
    enumeration::{Answer, Enumeration, Fabric, Limits, Listing, PairOwner},
    nldev::{
        self, Device, GET, MAX_PAIRS, NldevError, Part, Question, QueuePair, RES_QP_GET, SYS_GET,
        messages, queue_pairs,
    },
};
use proptest::prelude::*;

/// The numbers of `include/uapi/rdma/rdma_netlink.h`, once more, so that a slip in the codec is seen.
mod uapi {
    pub(crate) const DEV_INDEX: u16 = 1;
    pub(crate) const DEV_NAME: u16 = 2;
    pub(crate) const PORT_INDEX: u16 = 3;
    pub(crate) const RES_QP: u16 = 19;
    pub(crate) const RES_QP_ENTRY: u16 = 20;
    pub(crate) const LQPN: u16 = 21;
    pub(crate) const SQ_PSN: u16 = 24;
    pub(crate) const TYPE: u16 = 26;
    pub(crate) const STATE: u16 = 27;
    pub(crate) const PID: u16 = 28;
    pub(crate) const KERN_NAME: u16 = 29;
    pub(crate) const NETNS_MODE: u16 = 66;
    pub(crate) const DRIVER_DETAILS: u16 = 97;
    pub(crate) const NLM_F_MULTI: u16 = 2;
}

const NESTED: u16 = 0x8000;

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(((value.len() + 4) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(((payload.len() + 16) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(uapi::NLM_F_MULTI.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(77_u32.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn kind(command: u16) -> u16 {
    (5 << 10) + command
}

fn done(sequence: u32, code: i32) -> Vec<u8> {
    message(3, sequence, &code.to_ne_bytes())
}

/// One entry as the kernel writes it (drivers/infiniband/core/nldev.c, fill_res_qp_entry).
fn entry(pair: &QueuePair) -> Vec<u8> {
    let mut bytes = attribute(uapi::PORT_INDEX, &1_u32.to_ne_bytes());
    bytes.extend(attribute(uapi::LQPN, &pair.number.to_ne_bytes()));
    if pair.of_kernel {
        bytes.extend(attribute(uapi::KERN_NAME, b"ib_core\0"));
    }
    if let Some(pid) = pair.pid {
        bytes.extend(attribute(uapi::PID, &pid.to_ne_bytes()));
    }
    bytes.extend(attribute(uapi::SQ_PSN, &9_u32.to_ne_bytes()));
    bytes.extend(attribute(uapi::TYPE, &[pair.kind]));
    bytes.extend(attribute(uapi::STATE, &[pair.state]));
    attribute(uapi::RES_QP_ENTRY | NESTED, &bytes)
}

/// An answer in datagrams of some entries each.
fn answer(pairs: &[QueuePair], sequence: u32, each: usize) -> Vec<Vec<u8>> {
    let mut datagrams: Vec<_> = pairs
        .chunks(each)
        .map(|pairs| {
            let mut payload = attribute(uapi::DEV_INDEX, &3_u32.to_ne_bytes());
            payload.extend(attribute(uapi::DEV_NAME, b"mlx5_0\0"));
            let table: Vec<u8> = pairs.iter().flat_map(entry).collect();
            payload.extend(attribute(uapi::RES_QP | NESTED, &table));
            message(kind(RES_QP_GET), sequence, &payload)
        })
        .collect();
    datagrams.push(done(sequence, 0));
    datagrams
}

fn read(datagrams: &[Vec<u8>], sequence: u32) -> Result<(Vec<QueuePair>, usize, bool), NldevError> {
    let (mut pairs, mut odd) = (Vec::new(), 0);
    for datagram in datagrams {
        let ended = messages(datagram, (RES_QP_GET, sequence), true, |payload| {
            odd += queue_pairs(payload, &mut pairs)?;
            Ok(())
        })?;
        if ended {
            return Ok((pairs, odd, true));
        }
    }
    Ok((pairs, odd, false))
}

fn any_pair() -> impl Strategy<Value = QueuePair> {
    let pid = proptest::option::of(1_u32..);
    (any::<u32>(), any::<u8>(), any::<u8>(), any::<bool>(), pid).prop_map(
        |(number, kind, state, of_kernel, pid)| QueuePair {
            number,
            kind,
            state,
            of_kernel,
            pid,
        },
    )
}

proptest! {
    #[test]
    fn what_the_kernel_writes_is_read(pairs in proptest::collection::vec(any_pair(), 0..200), each in 1..100_usize, sequence: u32) {
        let (seen, odd, ended) = read(&answer(&pairs, sequence, each), sequence).expect("a whole answer");
        prop_assert_eq!(seen, pairs);
        prop_assert_eq!((odd, ended), (0, true));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), command in 0..20_u16) {
        let mut pairs = Vec::new();
        let _ = messages(&bytes, (command, 0), true, |payload| {
            let _ = nldev::device(payload);
            let _ = nldev::exclusive(payload);
            queue_pairs(payload, &mut pairs).map(|_| ())
        });
        let _ = queue_pairs(&bytes, &mut pairs);
        prop_assert!(pairs.len() <= 2 * bytes.len() / 4);
    }

    #[test]
    fn a_cut_or_changed_answer_is_an_error_or_less(
        pairs in proptest::collection::vec(any_pair(), 1..20),
        cut in any::<prop::sample::Index>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut datagram: Vec<u8> = answer(&pairs, 1, 7).concat();
        for (at, byte) in changes {
            let at = at.index(datagram.len());
            datagram[at] = byte;
        }
        datagram.truncate(cut.index(datagram.len() + 1));
        if let Ok((seen, _, _)) = read(&[datagram], 1) {
            prop_assert!(seen.len() <= pairs.len() * 2);
        }
    }
}

/// One pair that the driver does not describe ends the kernel's list, with what its message has before it: whole messages stay.
#[test]
fn what_can_be_had_of_a_list_that_ends_early_is_kept() {
    const DRIVER: u8 = 255;
    const EINVAL: i32 = -22;
    const ENOSYS: i32 = -38;
    let pair = |number, kind, state| QueuePair {
        number,
        kind,
        state,
        of_kernel: false,
        pid: None,
    };
    let (ordinary, of_driver) = (pair(7, 2, 3), pair(9, DRIVER, 3));
    let (later, other, ended) = (pair(7, 2, 6), pair(8, 2, 3), pair(6, 2, 3));
    /// What each part of a list has before its end, and how it ends.
    type Lists<'a> = &'a [(Part, &'a [QueuePair], i32)];
    let listed = |ports, lists: Lists<'_>| {
        let mut asked = Vec::new();
        let pairs = nldev::list(ports, |part, each| {
            asked.push(part);
            let sequence = asked.len() as u32;
            let (_, pairs, code) = lists
                .iter()
                .find(|(of, ..)| *of == part)
                .expect("asked for");
            let mut bytes = Vec::new();
            if !pairs.is_empty() {
                let table: Vec<u8> = pairs.iter().flat_map(entry).collect();
                let payload = attribute(uapi::RES_QP | NESTED, &table);
                bytes = message(kind(RES_QP_GET), sequence, &payload);
            }
            bytes.extend(done(sequence, *code));
            messages(&bytes, (RES_QP_GET, sequence), true, each).map(|_| ())
        });
        (pairs, asked)
    };
    let whole: Lists<'_> = &[(Part::All, &[ordinary, of_driver], 0)];
    let (pairs, asked) = listed(1, whole);
    let pairs = pairs.expect("whole");
    assert_eq!(pairs.pairs, [ordinary, of_driver]);
    assert_eq!((pairs.partial, &asked[..]), (None, &[Part::All][..]));

    // A target of DC: without details the rest is there. What ended meanwhile is not.
    let (pairs, asked) = listed(
        1,
        &[
            (Part::All, &[ended, ordinary, of_driver], EINVAL),
            (Part::Plain, &[later, other], 0),
        ],
    );
    let pairs = pairs.expect("kept");
    assert_eq!(pairs.pairs, [of_driver, later, other]);
    let why = pairs.partial.expect("said");
    assert!(
        why.contains("Invalid argument") && why.contains("only the driver knows"),
        "{why}"
    );
    assert_eq!(asked, [Part::All, Part::Plain]);

    // A raw pair with RSS, which comes first: by port it is left out. One port of two cannot be listed at all.
    let (pairs, asked) = listed(
        2,
        &[
            (Part::All, &[], ENOSYS),
            (Part::Plain, &[], ENOSYS),
            (Part::Port(1), &[later], EINVAL),
            (Part::Port(2), &[other], 0),
        ],
    );
    let pairs = pairs.expect("kept");
    assert_eq!(pairs.pairs, [later, other]);
    let why = pairs.partial.expect("said");
    assert!(why.contains("those in RESET"), "{why}");
    assert_eq!(asked.len(), 4);

    // Nothing at all, of a device that does not say how many ports it has, or of one that has gone.
    let (pairs, _) = listed(0, &[(Part::All, &[], EINVAL), (Part::Plain, &[], EINVAL)]);
    assert!(matches!(pairs, Err(NldevError::Refused(_))));
}

#[test]
fn requests_are_those_of_the_uapi() {
    let mut attributes = attribute(uapi::DEV_INDEX, &3_u32.to_ne_bytes());
    attributes.extend(attribute(uapi::DRIVER_DETAILS, &[1]));
    let mut dump = message(kind(RES_QP_GET), 9, &attributes);
    // NLM_F_REQUEST and NLM_F_DUMP; the kernel fills in the port.
    dump[6..8].copy_from_slice(&0x301_u16.to_ne_bytes());
    dump[12..16].fill(0);
    assert_eq!(nldev::request(Question::pairs_of(3, Part::All), 9), dump);
    let plain = nldev::request(Question::of_all(SYS_GET, false), 1);
    assert_eq!((plain.len(), plain[6]), (16, 1));
    let of_port = nldev::request(Question::pairs_of(3, Part::Port(2)), 1);
    let mut attributes = attribute(uapi::DEV_INDEX, &3_u32.to_ne_bytes());
    attributes.extend(attribute(uapi::PORT_INDEX, &2_u32.to_ne_bytes()));
    assert_eq!(of_port[16..], attributes);
}

#[test]
fn devices_and_the_mode_are_read() {
    let mut payload = attribute(uapi::DEV_INDEX, &7_u32.to_ne_bytes());
    payload.extend(attribute(uapi::DEV_NAME, b"rocep1s0f0\0"));
    payload.extend(attribute(uapi::PORT_INDEX, &2_u32.to_ne_bytes()));
    payload.extend(attribute(40, &[1, 2, 3]));
    let device = nldev::device(&payload).expect("a device");
    let named = Device {
        index: 7,
        name: "rocep1s0f0".to_owned(),
        ports: 2,
    };
    assert_eq!(device, named);
    assert!(nldev::device(&attribute(uapi::DEV_INDEX, &[1, 0, 0, 0])).is_err());
    assert!(nldev::exclusive(&attribute(uapi::NETNS_MODE, &[0])).expect("a mode"));
    assert!(!nldev::exclusive(&attribute(uapi::NETNS_MODE, &[1])).expect("a mode"));
    assert!(!nldev::exclusive(&[]).expect("kernels before 5.1 do not say"));
}

#[test]
fn what_the_kernel_refuses_and_what_is_not_for_us_is_told_apart() {
    let error = |code: i32| message(2, 1, &code.to_ne_bytes());
    let refused = read(&[error(-1)], 1).expect_err("EPERM");
    assert!(
        refused.to_string().contains("Operation not permitted"),
        "{refused}"
    );
    let late = read(&[done(1, -22)], 1).expect_err("EINVAL at the end");
    assert!(late.to_string().contains("Invalid argument"), "{late}");
    // An answer that was given up comes before ours.
    let pair = QueuePair {
        number: 5,
        kind: 2,
        state: 3,
        of_kernel: false,
        pid: Some(4),
    };
    let both = [answer(&[pair; 3], 1, 3), answer(&[pair], 2, 1)].concat();
    assert_eq!(read(&both, 2).expect("ours").0, vec![pair]);
    let overrun = message(4, 1, &[]);
    assert!(read(&[overrun], 1).is_err());
    let mut other = Vec::new();
    let ended = messages(
        &message(kind(GET), 1, &[]),
        (RES_QP_GET, 1),
        true,
        |payload| {
            other.push(payload.len());
            Ok(())
        },
    );
    assert!(matches!(ended, Ok(false)) && other.is_empty());
}

#[test]
fn an_entry_that_lacks_something_costs_only_itself() {
    let pair = QueuePair {
        number: 5,
        kind: 2,
        state: 3,
        of_kernel: true,
        pid: None,
    };
    let stateless = attribute(uapi::RES_QP_ENTRY, &attribute(uapi::LQPN, &[1, 0, 0, 0]));
    let table = [entry(&pair), stateless, entry(&pair)].concat();
    let mut pairs = Vec::new();
    let odd = queue_pairs(&attribute(uapi::RES_QP, &table), &mut pairs).expect("readable");
    assert_eq!((pairs, odd), (vec![pair, pair], 1));
}

#[test]
fn a_device_cannot_list_without_end() {
    let pair = QueuePair {
        number: 5,
        kind: 2,
        state: 3,
        of_kernel: false,
        pid: None,
    };
    let datagram = answer(&[pair; 300], 1, 300).swap_remove(0);
    let mut pairs = Vec::new();
    let result = (0..=MAX_PAIRS / 300).try_for_each(|_| {
        messages(&datagram, (RES_QP_GET, 1), true, |payload| {
            queue_pairs(payload, &mut pairs).map(|_| ())
        })
        .map(|_| ())
    });
    assert!(
        result.is_err() && pairs.len() == MAX_PAIRS,
        "{}",
        pairs.len()
    );
}

/// Devices that answer as they are told.
#[derive(Clone, Default)]
struct Devices(Arc<Made>);

#[derive(Default)]
struct Made {
    calls: AtomicUsize,
    /// Devices that wait until the gate is open.
    gate: (Mutex<bool>, Condvar),
}

impl Fabric for Devices {
    type Device = &'static str;

    fn devices(&self) -> Result<Listing<&'static str>, String> {
        let names = ["broken", "many", "odd", "stuck"];
        let devices = names.map(|name| (name.to_owned(), name));
        Ok(Listing {
            devices: devices.into(),
            troubles: vec!["2 namespaces cannot be looked into".to_owned()],
        })
    }

    fn queue_pairs(&self, device: &&'static str, _: Duration) -> Result<Answer, String> {
        self.0.calls.fetch_add(1, Ordering::SeqCst);
        let pair = |number| QueuePair {
            number,
            kind: 2,
            state: 3,
            of_kernel: false,
            pid: None,
        };
        match *device {
            "broken" => Err("cannot list its queue pairs: Invalid argument".to_owned()),
            "many" => {
                // Through the codec, as a device's answer would be.
                let pairs: Vec<_> = (0..10_000).map(pair).collect();
                let (pairs, _, _) = read(&answer(&pairs, 1, 250), 1).expect("a whole answer");
                let owners = [PairOwner::Cgroup(7), PairOwner::Unknown];
                let pairs = pairs.into_iter();
                Ok(Answer {
                    is_partial: false,
                    pairs: pairs
                        .map(|pair| (pair, owners[pair.number as usize % 2]))
                        .collect(),
                    odd: None,
                })
            }
            "odd" => Ok(Answer {
                is_partial: true,
                pairs: vec![(pair(1), PairOwner::Kernel)],
                odd: Some("3 queue pairs have no number, type or state".to_owned()),
            }),
            _ => {
                let (gate, opened) = &self.0.gate;
                let mut open = gate.lock().expect("a gate");
                while !*open {
                    open = opened.wait(open).expect("a gate");
                }
                Ok(Answer::default())
            }
        }
    }
}

const LIMITS: Limits = Limits {
    interval: Duration::from_millis(50),
    budget: Duration::from_secs(1),
};

fn until<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(got) = get() {
            return got;
        }
        assert!(Instant::now() < end, "not in 20 s: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_device_that_is_slow_broken_or_silent_costs_only_itself() {
    let made = Devices::default();
    let enumeration = Enumeration::start(made.clone(), LIMITS).expect("a thread");
    assert!(
        enumeration.reports(Instant::now()).is_empty(),
        "nobody has asked"
    );
    enumeration.ask();
    let counts = until("the devices that answer have answered", || {
        let reports = enumeration.reports(Instant::now());
        let of = |name: &str| {
            let report = reports.iter().find(|report| report.device == name)?;
            report.counts.clone()
        };
        of("many").zip(of("odd"))
    });
    let (many, odd) = counts;
    assert_eq!(many[&(PairOwner::Cgroup(7), 2, 3)], 5000);
    assert_eq!(many[&(PairOwner::Unknown, 2, 3)], 5000);
    assert_eq!(many.len(), 2, "10 000 pairs are kept as two numbers");
    assert_eq!(odd[&(PairOwner::Kernel, 2, 3)], 1);

    let later = Instant::now() + Duration::from_secs(60);
    let reports = enumeration.reports(later);
    let is_partial = |name: &str| {
        let report = reports.iter().find(|report| report.device == name);
        report.is_some_and(|report| report.is_partial)
    };
    assert!(is_partial("odd") && is_partial("broken") && !is_partial("many"));
    let stuck = reports.iter().find(|report| report.device == "stuck");
    let stuck = stuck.expect("it is listed");
    assert!(stuck.counts.is_none() && stuck.age >= Duration::from_secs(60));
    let troubles = enumeration.troubles(later).join("\n");
    for part in [
        "2 namespaces cannot be looked into",
        "the device broken: cannot list its queue pairs: Invalid argument",
        "the device odd: 3 queue pairs have no number",
        "the device stuck has not answered for 60 s",
    ] {
        assert!(troubles.contains(part), "{part}\n{troubles}");
    }

    // A scrape never waits, however often it asks, and the stuck device is not asked twice.
    let began = Instant::now();
    for _ in 0..1000 {
        enumeration.ask();
        let _ = enumeration.reports(Instant::now());
    }
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    let before = made.0.calls.load(Ordering::SeqCst);
    thread::sleep(LIMITS.interval * 2);
    enumeration.ask();
    until("the others are asked again", || {
        (made.0.calls.load(Ordering::SeqCst) > before).then_some(())
    });
    let (gate, opened) = &made.0.gate;
    *gate.lock().expect("a gate") = true;
    opened.notify_all();
    until("the stuck device answers", || {
        let reports = enumeration.reports(Instant::now());
        reports
            .iter()
            .find(|report| report.device == "stuck")?
            .counts
            .clone()
    });
}

#[test]
fn devices_are_asked_no_more_often_than_the_interval_and_only_when_a_scrape_asks() {
    let made = Devices::default();
    *made.0.gate.0.lock().expect("a gate") = true;
    let limits = Limits {
        interval: Duration::from_secs(3600),
        ..LIMITS
    };
    let enumeration = Enumeration::start(made.clone(), limits).expect("a thread");
    thread::sleep(Duration::from_millis(100));
    assert_eq!(made.0.calls.load(Ordering::SeqCst), 0);
    for _ in 0..100 {
        enumeration.ask();
        thread::sleep(Duration::from_millis(2));
    }
    until("each is asked", || {
        (made.0.calls.load(Ordering::SeqCst) >= 4).then_some(())
    });
    assert_eq!(
        made.0.calls.load(Ordering::SeqCst),
        4,
        "each of four devices once"
    );
}
