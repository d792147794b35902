// SPDX-License-Identifier: Apache-2.0
//! What a node that makes pods all day costs: the books forget whom they cannot name any more.
//!
//! One test, for the memory of the whole process is measured.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use chandra::{
    ledger::{Ledger, Opening},
    pods::{Place, Pods, Record, Source},
    signals::encryption::{Books, Counted, Holders, Room, SLOTS},
};
use exporter_common::{
    NO_CGROUP,
    encryption::{Flow, Work},
};

const RETENTION: Duration = Duration::from_secs(300);

/// A full node.
const PODS: usize = 110;

/// Pods that come and go: two days and a third of 30 a minute.
const ALL: u64 = 100_000;

/// Once as many have come and gone, the books are as large as they get.
const BEGUN: u64 = 6_000;

/// KiB of memory of this process.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("readable");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("a number")
}

fn flow(pod: u64) -> Flow {
    let [.., a, b, c] = pod.to_be_bytes();
    let mut address = [0; 16];
    address[10..].copy_from_slice(&[0xff, 0xff, 10, a, b, c]);
    Flow {
        address,
        cgroup: NO_CGROUP,
        protocol: 0,
        direction: 0,
    }
}

fn record(pod: u64) -> Record {
    let uid: Arc<str> = format!("{pod:08x}-0000-4000-8000-000000000000").into();
    let [.., a, b, c] = pod.to_be_bytes();
    Record {
        uid: Arc::clone(&uid),
        object: uid,
        namespace: "ml".into(),
        name: format!("job-{pod}").into(),
        created: pod as i64,
        containers: [(format!("{pod:064x}").into(), "main".into())].into(),
        is_running: true,
        in_host: false,
        addresses: vec![IpAddr::from([10, a, b, c])],
    }
}

#[test]
fn a_day_of_thirty_new_pods_a_minute_costs_next_to_nothing() {
    let pods = Pods::new(&Source::Kube, RETENTION);
    let host = HashSet::new();
    let mut books = Books::default();
    let mut ledger: Ledger<usize, SLOTS> =
        Ledger::new(1200, |slots| slots.iter().sum()).opening(Opening::Events);
    let mut kernel: HashMap<Counted, Work> = HashMap::new();
    let mut live = VecDeque::new();
    let mut now = Instant::now();
    let mut before = 0;
    for pod in 0..ALL {
        now += Duration::from_secs(2);
        let record = record(pod);
        let (uid, id) = (Arc::clone(&record.uid), format!("{pod:064x}").into());
        pods.pod_found(record, now);
        pods.cgroup_found(10 + pod, Place::Container { uid, id });
        live.push_back(pod);
        if live.len() > PODS
            && let Some(old) = live.pop_front()
        {
            pods.pod_gone(&self::record(old).object, now);
            pods.cgroup_gone(10 + old, now);
        }
        for pod in &live {
            let work = kernel.entry((Room::Known, flow(*pod))).or_default();
            work.packets += 1;
            work.bytes += 100;
        }
        // An address that nobody has ever had.
        kernel
            .entry((Room::Strangers, flow(1 << 23 | pod)))
            .or_default()
            .packets += 1;
        if pod % 15 != 0 {
            continue;
        }
        pods.expire(now);
        let view = pods.view();
        let holders = Holders::new(&view, &host);
        let work: Vec<_> = kernel
            .iter()
            .map(|(counted, work)| (*counted, *work))
            .collect();
        books.book(&work, &holders, now);
        books.settle(&mut ledger, &holders, RETENTION, now);
        for gone in books.idle(RETENTION, &holders, now) {
            kernel.remove(&gone);
            books.forget(&gone);
        }
        if pod == BEGUN {
            before = resident();
        }
    }
    assert!(kernel.len() < 1000, "{} flows are left", kernel.len());
    let accounts = ledger.accounts().count();
    assert!(accounts < 500, "{accounts} accounts are left");
    let grown = resident().saturating_sub(before);
    println!("{grown} KiB more after {ALL} pods than after {BEGUN}");
    assert!(grown < 2048, "{grown} KiB more");
}
