// SPDX-License-Identifier: Apache-2.0
//! The rules of the ledger and the directory together: who gets which event, from before a pod has a name until after
//! it is forgotten. The kernel here is a table of totals.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use chandra::{
    ledger::{Attribution, Ledger, Names, Opening, PATIENCE, Shown},
    pods::{Labels, Owner, Place, Pods, Record, Resolution, Source, cgroups},
    signals::Scope,
};
use k8s_openapi::api::core::v1::Pod;
use proptest::{collection::vec, prelude::*, sample::Index};

const RETENTION: Duration = Duration::from_secs(300);

/// More owners than any test here has.
const ROOMY: usize = 1000;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A node with one signal of one counter, and a clock that only tests move.
struct Node {
    pods: Pods,
    ledger: Ledger<u64, 1>,
    /// The kernel's map.
    totals: BTreeMap<u64, u64>,
    now: Instant,
}

impl Node {
    fn new(limit: usize) -> Self {
        Self::with(&Source::Kube, limit)
    }

    fn with(source: &Source, limit: usize) -> Self {
        Self {
            pods: Pods::new(source, RETENTION),
            ledger: Ledger::new(limit, |[events]| *events),
            totals: BTreeMap::new(),
            now: Instant::now(),
        }
    }

    /// The source of names tells of a pod: its uid, its name, its creation second and its containers' ids and names.
    fn told(&self, uid: &str, name: &str, created: i64, containers: &[(&str, &str)]) {
        let record = record(uid, name, created, containers);
        self.pods.pod_found(record, self.now);
    }

    fn deleted(&self, uid: &str) {
        self.pods.pod_gone(uid, self.now);
    }

    /// A container's cgroup appears.
    fn started(&self, cgroup: u64, uid: &str, id: &str) {
        let (uid, id) = (uid.into(), id.into());
        self.pods.cgroup_found(cgroup, Place::Container { uid, id });
    }

    /// A pod's own cgroup appears.
    fn sandboxed(&self, cgroup: u64, uid: &str) {
        self.pods
            .cgroup_found(cgroup, Place::Pod { uid: uid.into() });
    }

    fn unit(&self, cgroup: u64, name: &str) {
        self.pods.cgroup_found(cgroup, Place::Unit(name.into()));
    }

    fn stopped(&self, cgroup: u64) {
        self.pods.cgroup_gone(cgroup, self.now);
    }

    /// The kernel counts events.
    fn count(&mut self, cgroup: u64, events: u64) {
        *self.totals.entry(cgroup).or_default() += events;
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    /// What a scrape does for every signal.
    fn scrape(&mut self) {
        self.pods.expire(self.now);
        let view = self.pods.view();
        let scope = Scope {
            pods: &view,
            now: self.now,
            retention: RETENTION,
            strangers: Cell::new(false),
        };
        let readings = self
            .totals
            .iter()
            .map(|(cgroup, total)| (*cgroup, [*total]));
        self.ledger.book(
            &view.owners(),
            readings,
            |cgroup| scope.resolve(cgroup),
            self.now,
        );
        let dead = |cgroup| !view.knows(cgroup);
        for cgroup in self.ledger.retire(RETENTION, dead, self.now) {
            self.totals.remove(&cgroup);
        }
    }

    fn accounts(&self) -> BTreeMap<Labels, u64> {
        let accounts: Vec<_> = self.ledger.accounts().collect();
        let count = accounts.len();
        let map: BTreeMap<_, _> = accounts
            .into_iter()
            .map(|(labels, [n])| (labels, *n))
            .collect();
        assert_eq!(map.len(), count, "two accounts have the same labels");
        map
    }

    /// The series of a container in the pods' namespace.
    fn series(&self, pod: &str, container: &str) -> Option<u64> {
        self.accounts().get(&labels("ml", pod, container)).copied()
    }

    fn unknown(&self) -> u64 {
        self.accounts()[&labels("", "unknown", "")]
    }

    fn other(&self) -> Option<u64> {
        self.accounts().get(&labels("", "other", "")).copied()
    }

    fn host(&self) -> u64 {
        self.accounts()[&Labels::default()]
    }

    fn attributed(&self) -> u64 {
        let Attribution { pod, host, unknown } = self.ledger.attribution();
        pod + host + unknown
    }
}

fn labels(namespace: &str, pod: &str, container: &str) -> Labels {
    Labels {
        namespace: namespace.into(),
        pod: pod.into(),
        container: container.into(),
    }
}

fn record(uid: &str, name: &str, created: i64, containers: &[(&str, &str)]) -> Record {
    Record {
        uid: uid.into(),
        object: uid.into(),
        namespace: "ml".into(),
        name: name.into(),
        created,
        is_running: true,
        in_host: false,
        addresses: Vec::new(),
        containers: containers
            .iter()
            .map(|(id, name)| ((*id).into(), (*name).into()))
            .collect(),
    }
}

/// A node with the pod `vllm-0`, whose container `main` has the cgroup 10.
fn node_with_a_pod() -> Node {
    let node = Node::new(ROOMY);
    node.told("u1", "vllm-0", 100, &[("c1", "main")]);
    node.started(10, "u1", "c1");
    node
}

#[test]
fn a_container_is_born_at_zero() {
    let mut node = node_with_a_pod();
    node.sandboxed(9, "u1");
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(0));
    assert_eq!(
        (node.host(), node.unknown()),
        (0, 0),
        "born with the ledger"
    );
    assert_eq!(node.other(), None, "nothing is folded");
    assert_eq!(
        node.accounts().len(),
        3,
        "a pod's own cgroup has no series before its first event"
    );
    node.count(10, 7);
    node.count(9, 2);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(7));
    assert_eq!(node.series("vllm-0", ""), Some(2));
}

#[test]
fn a_container_that_restarts_adds_on() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.stopped(10);
    node.told("u1", "vllm-0", 100, &[("c2", "main")]);
    node.started(11, "u1", "c2");
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(7));
    node.count(11, 1);
    node.count(10, 2);
    node.wait(seconds(60));
    node.scrape();
    assert_eq!(
        node.series("vllm-0", "main"),
        Some(10),
        "the earlier instance's sockets count as well"
    );
    node.wait(RETENTION);
    node.scrape();
    node.count(11, 5);
    node.scrape();
    assert_eq!(
        node.series("vllm-0", "main"),
        Some(15),
        "forgetting the earlier instance takes nothing away"
    );
    assert_eq!(node.unknown(), 0);
}

#[test]
fn a_new_pod_of_the_same_name_starts_at_zero_and_the_old_ones_late_events_are_unknown() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.deleted("u1");
    node.told("u2", "vllm-0", 160, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(0));
    node.count(10, 3);
    node.count(11, 1);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(1));
    assert_eq!(node.unknown(), 3);
    node.stopped(10);
    node.told("u2", "vllm-0", 160, &[("c2", "main")]);
    node.count(10, 1);
    node.wait(seconds(60));
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(1));
    assert_eq!(node.unknown(), 4);
}

#[test]
fn a_pods_own_series_starts_at_zero_with_its_successor() {
    let mut node = Node::new(ROOMY);
    node.told("u1", "vllm-0", 100, &[]);
    node.sandboxed(10, "u1");
    node.count(10, 5);
    node.scrape();
    assert_eq!(node.series("vllm-0", ""), Some(5));
    node.deleted("u1");
    node.told("u2", "vllm-0", 160, &[]);
    node.sandboxed(11, "u2");
    node.scrape();
    assert_eq!(node.series("vllm-0", ""), Some(0));
    node.count(11, 1);
    node.scrape();
    assert_eq!(node.series("vllm-0", ""), Some(1));
}

#[test]
fn what_waits_for_a_name_that_a_new_pod_takes_is_unknown() {
    let mut node = Node::new(ROOMY);
    node.told("u1", "vllm-0", 100, &[]);
    node.started(10, "u1", "c1");
    node.count(10, 4);
    node.scrape();
    assert_eq!(node.attributed(), 0, "it waits for the container's name");
    node.deleted("u1");
    node.told("u2", "vllm-0", 160, &[]);
    node.scrape();
    assert_eq!(node.unknown(), 4);
    assert_eq!(node.series("vllm-0", ""), None);
}

#[test]
fn an_orphaned_socket_counts_for_its_pod_while_the_pod_is_remembered() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.stopped(10);
    node.deleted("u1");
    node.wait(RETENTION - seconds(1));
    node.count(10, 2);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(9));
    assert_eq!(node.unknown(), 0);
}

#[test]
fn an_account_is_new_from_its_first_event_on_and_anew_with_a_pods_successor() {
    let mut node = node_with_a_pod();
    node.ledger = node.ledger.opening(Opening::Events).new_for(seconds(60));
    let main = labels("ml", "vllm-0", "main");
    node.scrape();
    assert!(!node.ledger.is_new(&main), "there is no account yet");
    node.wait(seconds(100));
    node.count(10, 7);
    for (age, is_new) in [(0, true), (59, true), (60, false)] {
        node.scrape();
        assert_eq!(node.ledger.is_new(&main), is_new, "{age} s");
        assert_eq!(node.series("vllm-0", "main"), Some(7), "it is counted");
        node.wait(seconds(if age == 0 { 59 } else { 1 }));
    }
    node.deleted("u1");
    node.told("u2", "vllm-0", 160, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.scrape();
    assert!(node.ledger.is_new(&main));
    assert!(
        !node.ledger.is_new(&Labels::default())
            && !node.ledger.is_new(&Labels::only_pod("unknown"))
    );
}

#[test]
fn after_the_retention_the_series_is_gone_and_no_event_brings_it_back() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.stopped(10);
    node.deleted("u1");
    node.wait(RETENTION);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None);
    for late in 1..=3 {
        node.count(10, 1);
        node.scrape();
        assert_eq!(node.unknown(), late - 1, "who made it may still turn up");
        node.wait(PATIENCE);
        node.scrape();
        assert_eq!(node.series("vllm-0", "main"), None);
        assert_eq!(node.unknown(), late);
    }
}

#[test]
fn a_deleted_pod_keeps_its_name_while_it_still_runs() {
    let mut node = node_with_a_pod();
    node.deleted("u1");
    for scrape in 1..=3 {
        node.wait(RETENTION);
        node.count(10, 1);
        node.scrape();
        assert_eq!(node.series("vllm-0", "main"), Some(scrape));
    }
}

#[test]
fn a_live_pod_keeps_its_name_while_nothing_of_it_runs() {
    let mut node = node_with_a_pod();
    node.stopped(10);
    node.wait(RETENTION * 2);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None, "the container is gone");
    node.started(11, "u1", "c1");
    node.count(11, 1);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(1));
}

#[test]
fn events_wait_for_the_names_of_pod_and_container() {
    let mut node = Node::new(ROOMY);
    node.count(10, 1);
    node.scrape();
    node.started(10, "u1", "c1");
    node.count(10, 2);
    node.scrape();
    node.told("u1", "vllm-0", 100, &[]);
    node.count(10, 4);
    node.scrape();
    assert_eq!(
        (node.attributed(), node.series("vllm-0", "main")),
        (0, None)
    );
    node.wait(PATIENCE - seconds(1));
    node.told("u1", "vllm-0", 100, &[("c1", "main")]);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(7));
    assert_eq!((node.series("vllm-0", ""), node.unknown()), (None, 0));
}

#[test]
fn events_of_a_container_that_is_never_named_are_the_pods() {
    let mut node = Node::new(ROOMY);
    node.told("u1", "vllm-0", 100, &[]);
    node.started(10, "u1", "c1");
    node.count(10, 4);
    node.scrape();
    node.wait(PATIENCE);
    node.scrape();
    assert_eq!(node.series("vllm-0", ""), Some(4));
    node.scrape();
    assert_eq!(node.series("vllm-0", ""), Some(4), "and they stay");
    assert_eq!(node.ledger.attribution().pod, 4);
    node.told("u1", "vllm-0", 100, &[("c1", "main")]);
    node.count(10, 1);
    node.scrape();
    assert_eq!(
        (node.series("vllm-0", ""), node.series("vllm-0", "main")),
        (Some(4), Some(1)),
        "a name that comes too late has only what comes later"
    );
    node.stopped(10);
    node.wait(RETENTION);
    node.scrape();
    assert_eq!(node.accounts().len(), 2, "both go with the container");
}

#[test]
fn events_of_a_pod_that_is_never_named_are_unknown() {
    let mut node = Node::new(ROOMY);
    node.started(10, "u1", "c1");
    node.count(10, 4);
    node.count(99, 2);
    node.scrape();
    assert_eq!(node.unknown(), 0);
    node.wait(PATIENCE);
    node.scrape();
    assert_eq!(node.unknown(), 6);
    node.told("u1", "vllm-0", 100, &[("c1", "main")]);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(0), "nothing is moved");
    assert_eq!(node.unknown(), 6);
}

#[test]
fn events_without_a_cgroup_are_unknown_at_once() {
    let mut node = node_with_a_pod();
    node.count(exporter_common::NO_CGROUP, 3);
    node.scrape();
    assert_eq!(node.unknown(), 3);
}

#[test]
fn owners_beyond_the_limit_are_other_for_as_long_as_they_are_known() {
    let mut node = Node::new(1);
    node.told("u1", "a", 100, &[("c1", "main")]);
    node.started(10, "u1", "c1");
    node.scrape();
    assert_eq!(node.other(), None);
    node.told("u2", "b", 100, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.scrape();
    assert_eq!(node.other(), Some(0), "born at 0 as well");
    node.count(10, 1);
    node.count(11, 2);
    node.scrape();
    assert_eq!((node.series("a", "main"), node.other()), (Some(1), Some(2)));
    node.deleted("u1");
    node.stopped(10);
    node.wait(RETENTION);
    node.count(11, 4);
    node.scrape();
    assert_eq!(
        (node.series("a", "main"), node.series("b", "main")),
        (None, None),
        "room that is left does not split the counts of one owner"
    );
    assert_eq!(node.other(), Some(6));
    node.stopped(11);
    node.wait(RETENTION);
    node.scrape();
    assert_eq!(node.other(), Some(6), "other outlives its owners");
    node.started(12, "u2", "c2");
    node.scrape();
    assert_eq!(
        node.series("b", "main"),
        Some(0),
        "one that comes back after it was forgotten is like a new one"
    );
    node.deleted("u2");
    node.stopped(12);
    node.wait(RETENTION);
    node.scrape();
    node.told("u3", "b", 900, &[("c3", "main")]);
    node.started(13, "u3", "c3");
    node.count(13, 1);
    node.scrape();
    assert_eq!((node.series("b", "main"), node.other()), (Some(1), Some(6)));
    assert_eq!(node.ledger.attribution().pod, 8, "other is some pod");
}

#[test]
fn a_successor_takes_over_its_predecessors_place_below_the_limit() {
    let mut node = Node::new(1);
    node.told("u1", "a", 100, &[("c1", "main")]);
    node.started(10, "u1", "c1");
    node.scrape();
    node.told("u9", "b", 100, &[("c9", "main")]);
    node.started(19, "u9", "c9");
    node.scrape();
    node.deleted("u1");
    node.told("u2", "a", 200, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.count(11, 1);
    node.count(19, 2);
    node.scrape();
    assert_eq!((node.series("a", "main"), node.other()), (Some(1), Some(2)));
}

#[test]
fn a_kernel_entry_that_starts_again_counts_from_zero() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.totals.insert(10, 3);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(10));
    node.totals.remove(&10);
    node.scrape();
    assert_eq!(
        node.series("vllm-0", "main"),
        Some(10),
        "no entry, no change"
    );

    // One of two counters is enough to tell.
    let mut ledger: Ledger<u64, 2> = Ledger::new(ROOMY, |both| both.iter().sum());
    let owners = node.pods.view().owners();
    for totals in [[7, 0], [2, 5]] {
        let resolve = |cgroup| node.pods.view().resolve(cgroup);
        ledger.book(&owners, [(10, totals)], resolve, node.now);
    }
    let main = labels("ml", "vllm-0", "main");
    let account = ledger.accounts().find(|(labels, _)| *labels == main);
    assert_eq!(account, Some((main.clone(), &[9, 5])));
    assert_eq!(ledger.attribution().pod, 14);
}

#[test]
fn the_kernels_entry_is_removed_only_when_it_is_idle_and_its_cgroup_forgotten() {
    let mut node = node_with_a_pod();
    node.count(10, 7);
    node.scrape();
    node.wait(RETENTION * 2);
    node.scrape();
    assert!(node.totals.contains_key(&10), "its cgroup exists");
    node.stopped(10);
    node.deleted("u1");
    node.wait(RETENTION - seconds(1));
    node.count(10, 1);
    node.scrape();
    node.wait(seconds(1));
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None);
    assert!(node.totals.contains_key(&10), "it was not idle");
    node.wait(RETENTION);
    node.scrape();
    assert!(!node.totals.contains_key(&10));
    node.count(10, 2);
    node.scrape();
    node.wait(PATIENCE);
    node.scrape();
    assert_eq!(node.unknown(), 2, "a later event starts an entry from 0");
    assert_eq!(node.attributed(), 10);
}

#[test]
fn the_kernels_entry_stays_while_events_wait_for_their_owner() {
    let mut node = Node::new(ROOMY);
    node.count(10, 1);
    node.scrape();
    let retired = |node: &mut Node| node.ledger.retire(Duration::ZERO, |_| true, node.now);
    assert_eq!(retired(&mut node), [] as [u64; 0]);
    node.wait(PATIENCE);
    node.scrape();
    assert_eq!(node.unknown(), 1);
    assert_eq!(retired(&mut node), [10]);
}

#[test]
fn with_names_a_unit_is_the_host() {
    let mut node = Node::new(ROOMY);
    node.unit(1, "/");
    node.unit(2, "ssh.service");
    node.count(1, 1);
    node.count(2, 2);
    node.scrape();
    assert_eq!(node.host(), 3);
    assert_eq!(node.accounts().len(), 2);
    assert_eq!(node.ledger.attribution().host, 3);
}

#[test]
fn without_names_a_cgroup_is_shown_by_its_own() {
    let mut node = Node::with(&Source::None, ROOMY);
    node.unit(1, "/");
    node.unit(2, "ssh.service");
    node.started(3, "u1", "c1");
    node.sandboxed(4, "u1");
    for cgroup in 1..=4 {
        node.count(cgroup, cgroup);
    }
    node.scrape();
    assert_eq!(node.host(), 1, "only the root is the host itself");
    let of = |name| node.accounts().get(&labels("", "", name)).copied();
    assert_eq!(of("ssh.service"), Some(2));
    assert_eq!(of("c1"), Some(3));
    assert_eq!(of("u1"), Some(4));
    assert_eq!(node.unknown(), 0);
    assert_eq!(node.ledger.attribution().host, 10, "none of them is a pod");
}

#[test]
fn without_names_a_unit_that_restarts_adds_on() {
    let mut node = Node::with(&Source::None, ROOMY);
    node.unit(2, "dbus.service");
    node.unit(3, "dbus.service");
    node.count(2, 1);
    node.count(3, 2);
    node.scrape();
    node.stopped(2);
    node.unit(4, "dbus.service");
    node.count(4, 4);
    node.wait(RETENTION);
    node.scrape();
    let unit = labels("", "", "dbus.service");
    assert_eq!(node.accounts().get(&unit), Some(&7));
}

#[test]
fn a_static_pods_cgroup_is_found_by_the_hash_of_its_manifest() {
    let hash = "3a7bd3e2360a3d29eea436fcfb7e44c7";
    let id = "8b1f0e7c6d5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c";
    let mirror: Pod = serde_json::from_value(serde_json::json!({
        "metadata": {
            "name": "etcd-node-7", "namespace": "kube-system",
            "uid": "0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f",
                        "annotations": {
                "kubernetes.io/config.hash": hash,
                "kubernetes.io/config.mirror": hash,
                "kubernetes.io/config.source": "file",
            },
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Node", "name": "node-7", "uid": "n7", "controller": true,
            }],
        },
        "status": { "containerStatuses": [{
            "name": "etcd", "containerID": format!("cri-o://{id}"),
            "image": "", "imageID": "", "ready": true, "restartCount": 0,
        }]},
    }))
    .expect("a pod");
    let mut node = Node::new(ROOMY);
    let record = Record::of(&mirror).expect("a named pod");
    node.pods.pod_found(record, node.now);
    let path = format!(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{hash}.slice/crio-{id}.scope"
    );
    node.pods.cgroup_found(10, cgroups::place(&path));
    node.count(10, 3);
    node.scrape();
    let etcd = labels("kube-system", "etcd-node-7", "etcd");
    assert_eq!(node.accounts().get(&etcd), Some(&3));
}

#[test]
fn owners_beyond_the_limit_are_other_in_what_has_no_ledger() {
    let mut shown = Shown::new(2);
    let owner = |pod: &str| {
        let labels = labels("ml", pod, "main");
        let uid = "u".into();
        Resolution::Owner(Owner { labels, uid })
    };
    for pod in ["a", "b", "a"] {
        assert_eq!(shown.of(owner(pod)), labels("ml", pod, "main"));
    }
    assert_eq!(shown.of(owner("c")), Labels::only_pod("other"));
    assert_eq!(shown.of(Resolution::Host), Labels::default());
    let unknown = Labels::only_pod("unknown");
    assert_eq!(shown.of(Resolution::Pending(None)), unknown);
    assert_eq!(shown.of(Resolution::Unknown), unknown);
}

#[test]
fn names_beyond_the_limit_have_room_once_others_are_gone() {
    let begin = Instant::now();
    let mut names = Names::new(2);
    let after = |n| begin + seconds(n);
    assert!(names.meet(&"mlx5_0", begin) && names.meet(&"made-up", begin));
    assert!(!names.meet(&"mlx5_1", after(100)));
    assert!(names.meet(&"mlx5_0", after(200)));
    assert_eq!(names.expire(RETENTION, after(300)), ["made-up"]);
    assert!(names.meet(&"mlx5_1", after(300)) && names.meet(&"mlx5_0", after(300)));
}

/// An object of the API that mirrors a static pod, or says so.
fn mirror(name: &str, uid: &str, hash: &str, owner: &str) -> Record {
    let pod = serde_json::json!({
        "metadata": {
            "name": name, "namespace": "ml", "uid": uid,
            "annotations": {
                "kubernetes.io/config.hash": hash,
                "kubernetes.io/config.mirror": hash,
                "kubernetes.io/config.source": "file",
            },
            "ownerReferences": [{"apiVersion": "v1", "kind": owner, "name": "node-7", "uid": "n7"}],
        },
        "status": { "containerStatuses": [{
            "name": name, "containerID": "containerd://c1",
            "image": "", "imageID": "", "ready": true, "restartCount": 0,
        }]},
    });
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    Record::of(&pod).expect("named")
}

const VICTIM: &str = "0f5e1c6a-7d8e-4f2b-9c3d-1a2b3c4d5e6f";
const HASH: &str = "3a7bd3e2360a3d29eea436fcfb7e44c7";

/// Who may create pods writes what a mirror has; whatever the order in which they are met, nobody gets what another pod did.
#[test]
fn a_forged_mirror_takes_nothing() {
    let bare = VICTIM.replace('-', "");
    let forgers = [
        mirror("forger-a", "f-a", VICTIM, "Node"),
        mirror("forger-b", "f-b", &bare, "Node"),
        mirror("forger-c", "f-c", HASH, "ReplicaSet"),
        mirror("forger-d", "f-d", HASH, "Node"),
    ];
    let victims = [
        record(VICTIM, "victim", 100, &[("c1", "main")]),
        mirror("etcd", "uid-of-the-mirror", HASH, "Node"),
    ];
    let resolved = |node: &Node, forger: &Record| {
        node.started(10, VICTIM, "c1");
        node.started(11, HASH, "c1");
        node.started(12, &forger.object, "c1");
        let view = node.pods.view();
        [10, 11, 12].map(|cgroup| match view.resolve(cgroup) {
            Resolution::Owner(owner) => owner.labels.pod.to_string(),
            other => format!("{other:?}"),
        })
    };
    for forger in &forgers {
        // Two mirrors of one hash: which is the true one cannot be told.
        let is_claimed = forger.object.as_ref() == "f-d";
        let of_static = if is_claimed { "Unknown" } else { "etcd" };
        let own = match forger.object.as_ref() {
            "f-a" | "f-c" => &*forger.name,
            // Its cgroup is not called what it says.
            _ => "Pending(None)",
        };
        let expected = ["victim", of_static, own];
        let all = [&victims[0], &victims[1], forger];
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            let records = || order.map(|at| all[at].clone());
            let listed = Node::new(ROOMY);
            listed.pods.pods_listed(records().into(), listed.now);
            assert_eq!(resolved(&listed, forger), expected, "{order:?}");
            let watched = Node::new(ROOMY);
            for record in records() {
                watched.pods.pod_found(record, watched.now);
            }
            assert_eq!(resolved(&watched, forger), expected, "{order:?}");
            // What it says changes: it claims no more than before.
            let mut changed = forger.clone();
            changed.uid = HASH.into();
            watched.pods.pod_found(changed, watched.now);
            assert_eq!(resolved(&watched, forger), expected, "{order:?}");
            // Its end gives back what it claimed.
            watched.deleted(&forger.object);
            watched.stopped(12);
            watched.pods.expire(watched.now);
            let all: Vec<_> = victims.to_vec();
            watched.pods.pods_listed(all, watched.now);
            watched.stopped(11);
            watched.pods.expire(watched.now + RETENTION);
            let [victim, of_static, _] = resolved(&watched, forger);
            assert_eq!((&*victim, &*of_static), ("victim", "etcd"), "{order:?}");
        }
    }
}

#[test]
fn a_mirror_that_is_made_anew_is_the_same_pod() {
    let mut node = Node::new(ROOMY);
    let at = node.now;
    node.pods.pod_found(mirror("etcd", "m1", HASH, "Node"), at);
    node.started(10, HASH, "c1");
    node.count(10, 3);
    node.scrape();
    node.deleted("m1");
    node.pods.pod_found(mirror("etcd", "m2", HASH, "Node"), at);
    node.deleted("m1");
    node.count(10, 4);
    node.scrape();
    assert_eq!(node.series("etcd", "etcd"), Some(7));
    assert_eq!(node.pods.view().listed().len(), 1);
}

/// Two objects of one uid and two names are not what an API server has: neither is believed.
#[test]
fn of_two_names_for_one_uid_neither_is_believed() {
    for (first, second) in [("victim", "other"), ("other", "victim")] {
        let node = Node::new(ROOMY);
        let of = |name| record(VICTIM, name, 100, &[("c1", "main")]);
        node.pods.pods_listed(vec![of(first), of(second)], node.now);
        node.started(10, VICTIM, "c1");
        assert_eq!(node.pods.view().resolve(10), Resolution::Unknown);
    }
}

#[test]
fn without_cgroup_v2_every_count_is_the_hosts() {
    for source in [Source::Kube, Source::None] {
        let mut node = Node::with(&source, ROOMY);
        node.pods.without_cgroups();
        node.told("u1", "vllm-0", 100, &[("c1", "main")]);
        node.count(1, 5);
        node.scrape();
        assert_eq!((node.host(), node.unknown()), (5, 0));
        assert_eq!(node.accounts().len(), 2, "the root is no owner of its own");
    }
}

#[test]
fn of_two_pods_created_in_one_second_the_later_to_arrive_holds_the_name() {
    let mut node = node_with_a_pod();
    node.count(10, 1);
    node.scrape();
    node.told("u2", "vllm-0", 100, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.count(11, 2);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(2));
    // An update of the earlier one is not an arrival.
    node.told("u1", "vllm-0", 100, &[("c1", "main")]);
    node.count(10, 4);
    node.count(11, 8);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(10));
    assert_eq!(node.unknown(), 4);
}

#[test]
fn a_live_pod_holds_its_name_against_a_deleted_one_whatever_their_clocks_said() {
    let mut node = node_with_a_pod();
    node.deleted("u1");
    node.told("u2", "vllm-0", 99, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.count(11, 1);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(1));
}

#[test]
fn an_older_pod_does_not_take_the_name_of_a_younger_one() {
    let mut node = node_with_a_pod();
    node.told("u0", "vllm-0", 40, &[("c0", "main")]);
    node.started(9, "u0", "c0");
    node.count(9, 1);
    node.count(10, 2);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(2));
    assert_eq!(node.unknown(), 1);
    // Nor when the younger one is forgotten: what is left of the older one was never its successor.
    node.deleted("u1");
    node.stopped(10);
    node.deleted("u0");
    node.wait(RETENTION);
    node.count(9, 1);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None);
    assert_eq!(node.unknown(), 2);
}

#[test]
fn a_list_deletes_the_pods_that_it_lacks() {
    let mut node = node_with_a_pod();
    node.told("u2", "vllm-1", 100, &[("c2", "main")]);
    node.started(11, "u2", "c2");
    node.scrape();
    let left = record("u1", "vllm-0", 100, &[("c1", "main")]);
    node.pods.pods_listed(vec![left], node.now);
    let listed = node.pods.view().listed();
    assert_eq!(listed, [("ml".into(), "vllm-0".into(), 1)]);
    node.stopped(11);
    node.wait(RETENTION);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), Some(0));
    assert_eq!(node.series("vllm-1", "main"), None);
}

#[test]
fn a_walk_finds_the_removals_that_nobody_told() {
    let mut node = node_with_a_pod();
    node.count(10, 1);
    node.scrape();
    node.pods.cgroups_walked(&HashSet::new(), node.now);
    node.wait(RETENTION);
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None);
    assert!(!node.pods.view().knows(10));
}

#[test]
fn a_removal_that_is_told_again_is_the_same_removal() {
    let mut node = node_with_a_pod();
    for _ in 0..5 {
        node.scrape();
        assert_eq!(node.series("vllm-0", "main"), Some(0));
        node.pods.cgroups_walked(&HashSet::new(), node.now);
        node.stopped(10);
        node.deleted("u1");
        node.wait(RETENTION / 5);
    }
    node.scrape();
    assert_eq!(node.series("vllm-0", "main"), None);
    assert_eq!(node.pods.expire(node.now), (0, 0));
}

/// One thing that happens on the node of [`World`].
#[derive(Clone, Debug)]
enum Step {
    /// A pod is created, in place of the one that has its name. Its clock is off by some seconds.
    Create {
        name: usize,
        skew: i64,
        told: bool,
    },
    /// A pod is deleted.
    Delete {
        pod: Index,
        told: bool,
    },
    /// A pod's own cgroup or a container's appears.
    Start {
        pod: Index,
        container: Option<usize>,
        told: bool,
        named: bool,
    },
    /// A cgroup is removed.
    Stop {
        cgroup: Index,
        told: bool,
    },
    /// The kernel counts for a cgroup, gone or not; or for none.
    Count {
        cgroup: Option<Index>,
        events: u64,
    },
    /// The source of names sends its whole list.
    List,
    /// The hierarchy is walked.
    Walk,
    Wait(u64),
    Scrape,
}

fn step() -> impl Strategy<Value = Step> {
    let told = || prop::bool::weighted(0.7);
    prop_oneof![
        3 => (0..NAMES.len(), -5..=5_i64, told())
            .prop_map(|(name, skew, told)| Step::Create { name, skew, told }),
        2 => (any::<Index>(), told()).prop_map(|(pod, told)| Step::Delete { pod, told }),
        6 => (any::<Index>(), prop::option::weighted(0.8, 0..CONTAINERS.len()), told(), told())
            .prop_map(|(pod, container, told, named)| Step::Start { pod, container, told, named }),
        3 => (any::<Index>(), told()).prop_map(|(cgroup, told)| Step::Stop { cgroup, told }),
        12 => (prop::option::weighted(0.95, any::<Index>()), 1..100_u64)
            .prop_map(|(cgroup, events)| Step::Count { cgroup, events }),
        1 => Just(Step::List),
        1 => Just(Step::Walk),
        5 => prop_oneof![3 => 1..40_u64, 1 => 40..400_u64].prop_map(Step::Wait),
        8 => Just(Step::Scrape),
    ]
}

const NAMES: [&str; 3] = ["a", "b", "c"];
const CONTAINERS: [&str; 2] = ["main", "sidecar"];

struct Life {
    name: usize,
    record: Record,
    live: bool,
    /// Whether the directory has been told of its last state.
    told: bool,
}

struct Group {
    place: Place,
    live: bool,
    /// Whether the directory has been told that it exists.
    told: bool,
    /// What the kernel counted for it, ever.
    counted: u64,
}

/// A node, and what really happens on it.
struct World {
    node: Node,
    pods: Vec<Life>,
    cgroups: BTreeMap<u64, Group>,
    counted: u64,
    /// What had been counted at each scrape.
    scraped: Vec<(Instant, u64)>,
    /// The accounts after the last scrape, with the uid behind the labels.
    before: HashMap<Labels, (Arc<str>, u64)>,
    floors: [u64; 3],
    /// The totals of accounts that were closed or taken over.
    closed: u64,
}

impl World {
    fn new(limit: usize) -> Self {
        let node = Node::new(limit);
        node.unit(1, "/");
        node.unit(2, "ssh.service");
        let unit = |name: &str| Group {
            place: Place::Unit(name.into()),
            live: true,
            told: true,
            counted: 0,
        };
        let cgroups = [(1, unit("/")), (2, unit("ssh.service"))];
        Self {
            node,
            pods: Vec::new(),
            cgroups: cgroups.into(),
            counted: 0,
            scraped: Vec::new(),
            before: HashMap::new(),
            floors: [0; 3],
            closed: 0,
        }
    }

    fn act(&mut self, step: &Step, begin: Instant) -> Result<(), TestCaseError> {
        let now = self.node.now;
        match step {
            Step::Create { name, skew, told } => {
                for pod in &mut self.pods {
                    if pod.live && pod.name == *name {
                        pod.live = false;
                        pod.told = false;
                    }
                }
                let uid = format!("u{}", self.pods.len());
                let created = now.duration_since(begin).as_secs() as i64 + 1000 + skew;
                self.pods.push(Life {
                    name: *name,
                    record: record(&uid, NAMES[*name], created, &[]),
                    live: true,
                    told: false,
                });
                if *told {
                    self.tell();
                }
            }
            Step::Delete { pod, told } => {
                let live: Vec<_> = (0..self.pods.len())
                    .filter(|i| self.pods[*i].live)
                    .collect();
                if !live.is_empty() {
                    let pod = &mut self.pods[*pod.get(&live)];
                    (pod.live, pod.told) = (false, false);
                    if *told {
                        self.tell();
                    }
                }
            }
            Step::Start {
                pod,
                container,
                told,
                named,
            } => {
                if self.pods.is_empty() {
                    return Ok(());
                }
                let id = self.cgroups.len() as u64 + 10;
                let pod = pod.index(self.pods.len());
                let life = &mut self.pods[pod];
                let uid = Arc::clone(&life.record.uid);
                let place = match container {
                    None => Place::Pod { uid },
                    Some(container) => {
                        let instance: Arc<str> = format!("c{id}").into();
                        let name = CONTAINERS[*container].into();
                        life.record.containers.insert(Arc::clone(&instance), name);
                        life.told &= !life.live;
                        Place::Container { uid, id: instance }
                    }
                };
                if *told {
                    self.node.pods.cgroup_found(id, place.clone());
                }
                let group = Group {
                    place,
                    live: true,
                    told: *told,
                    counted: 0,
                };
                self.cgroups.insert(id, group);
                if *named {
                    self.tell();
                }
            }
            Step::Stop { cgroup, told } => {
                let live: Vec<_> = self
                    .cgroups
                    .iter()
                    .filter(|(id, group)| **id > 2 && group.live)
                    .map(|(id, _)| *id)
                    .collect();
                if !live.is_empty() {
                    let id = *cgroup.get(&live);
                    if let Some(group) = self.cgroups.get_mut(&id) {
                        group.live = false;
                    }
                    if *told {
                        self.node.stopped(id);
                    }
                }
            }
            Step::Count { cgroup, events } => {
                let ids: Vec<_> = self.cgroups.keys().copied().collect();
                let id = cgroup.map_or(exporter_common::NO_CGROUP, |index| *index.get(&ids));
                self.node.count(id, *events);
                self.counted += events;
                if let Some(group) = self.cgroups.get_mut(&id) {
                    group.counted += events;
                }
            }
            Step::List => {
                let live = self.pods.iter().filter(|pod| pod.live);
                let records = live.map(|pod| pod.record.clone()).collect();
                self.node.pods.pods_listed(records, now);
                for pod in &mut self.pods {
                    pod.told = true;
                }
            }
            Step::Walk => {
                let mut met = HashSet::new();
                for (id, group) in &mut self.cgroups {
                    if group.live {
                        met.insert(*id);
                        group.told = true;
                        self.node.pods.cgroup_found(*id, group.place.clone());
                    }
                }
                self.node.pods.cgroups_walked(&met, now);
            }
            Step::Wait(time) => self.node.wait(seconds(*time)),
            Step::Scrape => {
                self.node.scrape();
                self.inspect()?;
            }
        }
        Ok(())
    }

    /// A watch tells everything that it has not told, in the order in which it happened.
    fn tell(&mut self) {
        for pod in self.pods.iter_mut().filter(|pod| !pod.told) {
            if pod.live {
                self.node.pods.pod_found(pod.record.clone(), self.node.now);
            } else {
                self.node.pods.pod_gone(&pod.record.uid, self.node.now);
            }
            pod.told = true;
        }
    }

    /// What the kernel counted for a container of a pod; for all of the pod where the container is empty.
    fn truth(&self, uid: &str, container: &str) -> u64 {
        let named = |id: &Arc<str>| {
            let mut records = self.pods.iter().map(|pod| &pod.record);
            records.any(|record| record.containers.get(id).map(|name| &**name) == Some(container))
        };
        let of = |group: &&Group| match &group.place {
            Place::Unit(_) => false,
            Place::Pod { uid: own } => &**own == uid && container.is_empty(),
            Place::Container { uid: own, id } => {
                &**own == uid && (container.is_empty() || named(id))
            }
        };
        self.cgroups
            .values()
            .filter(of)
            .map(|group| group.counted)
            .sum()
    }

    /// Checks everything that holds after every scrape.
    fn inspect(&mut self) -> Result<(), TestCaseError> {
        let node = &self.node;
        let now = node.now;
        let mut accounts = node.accounts();
        let view = node.pods.view();
        let owners: HashMap<_, _> = view
            .owners()
            .into_iter()
            .map(|owner| (owner.labels, owner.uid))
            .collect();

        let total: u64 = accounts.values().sum();
        let [host, unknown] = [Labels::default(), Labels::only_pod("unknown")]
            .map(|labels| accounts.remove(&labels).expect("always there"));
        let other = accounts.remove(&Labels::only_pod("other")).unwrap_or(0);
        let floors = [host, unknown, other];
        for (now, before) in floors.iter().zip(self.floors) {
            prop_assert!(*now >= before, "{floors:?} after {:?}", self.floors);
        }
        self.floors = floors;
        let units = self.cgroups[&1].counted + self.cgroups[&2].counted;
        prop_assert!(host <= units, "a pod's events became the host's");

        let mut after = HashMap::new();
        for (labels, total) in accounts {
            let Some(uid) = owners.get(&labels) else {
                return Err(TestCaseError::fail(format!("nobody knows {labels:?}")));
            };
            let most = self.truth(uid, &labels.container);
            prop_assert!(total <= most, "{labels:?} has {total} of {most}");
            after.insert(labels, (Arc::clone(uid), total));
        }
        for (labels, (uid, total)) in &self.before {
            match after.get(labels) {
                Some((same, now)) if same == uid => {
                    prop_assert!(now >= total, "{labels:?} fell from {total} to {now}");
                }
                _ => self.closed += total,
            }
        }
        self.before = after;

        let attributed = node.attributed();
        prop_assert_eq!(total + self.closed, attributed, "accounts and attribution");
        prop_assert!(attributed <= self.counted, "more than the kernel counted");
        let due = |(at, _): &&(Instant, u64)| now.duration_since(*at) >= PATIENCE;
        let patient = self.scraped.iter().rev().find(due).map_or(0, |(_, n)| *n);
        prop_assert!(
            attributed >= patient,
            "{attributed} of {patient} after 30 s"
        );
        self.scraped.push((now, self.counted));

        // A live pod that the directory was told of is the one that has the name.
        for pod in self.pods.iter().filter(|pod| pod.live && pod.told) {
            for (id, group) in self.cgroups.iter().filter(|(_, group)| group.told) {
                if let Place::Container { uid, .. } = &group.place
                    && *uid == pod.record.uid
                    && view.knows(*id)
                {
                    let found = view.resolve(*id);
                    let owned = matches!(&found, Resolution::Owner(owner) if owner.uid == *uid);
                    prop_assert!(owned, "{:?} is {found:?}", group.place);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_loses_invents_or_misplaces_an_event(
        limit in prop_oneof![0..6_usize, Just(ROOMY)],
        steps in vec(step(), 1..150),
    ) {
        let mut world = World::new(limit);
        let begin = world.node.now;
        for step in &steps {
            world.act(step, begin)?;
            let named = world.node.accounts().len();
            let fixed = 2 + usize::from(world.node.other().is_some());
            prop_assert!(named - fixed <= limit, "{named} accounts");
        }
        world.act(&Step::Scrape, begin)?;
        world.node.wait(PATIENCE);
        world.act(&Step::Scrape, begin)?;
        prop_assert_eq!(world.node.attributed(), world.counted, "nothing waits for ever");
    }
}
