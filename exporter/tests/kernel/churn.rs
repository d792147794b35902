// SPDX-License-Identifier: Apache-2.0
//! Pods that come and go under a scrape every second: labels, counters, series and memory of the exporter.
//!
//! Every pod has a network namespace of its own, in which nobody answers its SYNs. RetransSegs of that namespace is
//! what the exporter's map has to count for the pod's cgroups, and that is what the pod's series have to add up to.
//! `CHANDRA_CHURN_PODS` sets the number of pods; from 500 on the exporter runs with its default retention.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use chandra::ledger::PATIENCE;

use super::{alone, can_trace, common::*, process, skip};

const RETRANSMITS: &str = "chandra_tcp_retransmits_total";

/// The pods of the full size, which needs a quarter of an hour.
const FULL: usize = 500;

/// Between two scrapes.
const PERIOD: Duration = Duration::from_secs(1);

/// What a walk, a look at the list and a scrape may take together on a busy machine.
const MARGIN: Duration = Duration::from_secs(5);

/// How much larger than after the warm-up the exporter may be.
const GROWTH_KIB: u64 = 3 << 10;

/// How much of what the kernel counts the map may lack on a host that is not the tests' own: where something keeps
/// programs from running at times, as a sandbox may, all of them miss the same events.
const MISSED: f64 = 0.05;

/// Where the pods' uids start ("ch"): what is ours is found again by it.
const SEED: u64 = 0x6368_0000;

/// What the names of our network namespaces start with.
const NETNS: &str = "chandra-churn-";

/// Says if this host has nobody but the tests: then they know of every event.
fn own_host() -> bool {
    env::var_os("CHANDRA_TEST_VM").is_some()
}

#[derive(Clone, Copy)]
struct Size {
    pods: usize,
    /// Pods at a time.
    slots: usize,
    retention: Duration,
}

impl Size {
    fn read() -> Self {
        // An emulated processor is slower.
        let usual = if own_host() { 20 } else { 60 };
        let pods = env::var("CHANDRA_CHURN_PODS").map_or(usual, |n| n.parse().expect("a number"));
        Self {
            pods,
            slots: (pods / 2).clamp(1, 40),
            retention: Duration::from_secs(if pods < FULL { 20 } else { 300 }),
        }
    }

    /// How long a pod rests between its work: the longer the retention, the longer the pods live.
    fn rest(&self) -> Duration {
        self.retention / 12
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    ListedFirst,
    CgroupFirst,
    /// The list has the pod before its cgroup, and its containers after.
    StatusLate,
    /// The list never has the pod's containers.
    StatusNever,
}

/// What becomes of the k-th pod; it follows from k alone.
struct Plan {
    k: usize,
    order: Order,
    /// Has the name of an earlier pod.
    heir: bool,
    /// Is listed while the cgroup of the name's last holder is there and at work.
    usurper: bool,
}

impl Plan {
    fn of(k: usize, size: Size) -> Self {
        let (slot, generation) = (k % size.slots, k / size.slots);
        let heir = generation > 0 && (slot + generation) % 5 < 3;
        Self {
            k,
            order: match (slot + generation) % 3 {
                _ if !heir && k % 25 == 7 => Order::StatusNever,
                0 => Order::ListedFirst,
                1 => Order::CgroupFirst,
                _ => Order::StatusLate,
            },
            heir,
            usurper: heir && slot % 2 == 0,
        }
    }

    fn restarts(&self) -> usize {
        match self.order {
            Order::StatusNever => 0,
            _ => [1, 0, 0, 0, 2, 0, 0, 0][self.k % 8],
        }
    }

    /// Makes the pod, under its own name or an earlier pod's.
    fn pod(&self, heir_of: Option<(String, String)>) -> Pod {
        let namespace = ["inference", "training", "batch"][self.k % 3];
        let seed = SEED + self.k as u64;
        let (namespace, name) =
            heir_of.unwrap_or_else(|| (namespace.to_owned(), format!("churn-{}", self.k)));
        let mut pod = Pod::new(&namespace, &name, seed);
        pod.containers[0].1 = container_id(seed, 0);
        if self.k.is_multiple_of(5) {
            let sidecar = ("sidecar".to_owned(), container_id(seed, 1));
            pod.containers.push(sidecar);
        }
        pod
    }

    /// The cgroup of a container, by one of the kubelet's two drivers.
    fn cgroup(&self, pod: &Pod, container: usize) -> String {
        if (self.k / 2).is_multiple_of(2) {
            pod.cgroup(container)
        } else {
            format!(
                "kubepods/burstable/pod{}/{}",
                pod.uid, pod.containers[container].1
            )
        }
    }
}

fn container_id(seed: u64, instance: u64) -> String {
    format!("{:064x}", seed << 16 | instance)
}

/// What has to be true of one pod's series.
struct Fact {
    namespace: String,
    name: String,
    containers: BTreeSet<String>,
    /// Just before the list first had it.
    listed: Instant,
    /// Just before its first segment.
    worked: Instant,
    /// Just after its last container's cgroup was removed.
    gone: Instant,
    /// RetransSegs of its network namespace, at the end.
    kernel: u64,
    /// What the exporter's map had for its cgroups.
    counted: u64,
    /// The exporter could book all of it.
    exact: bool,
}

/// A pod that exists.
struct Life {
    plan: Plan,
    pod: Pod,
    netns: String,
    /// The cgroups of its containers.
    dirs: Vec<PathBuf>,
    /// What the exporter's map had for the cgroups that are gone.
    counted: u64,
    listed: Option<Instant>,
    worked: Option<Instant>,
    work: Vec<Child>,
}

impl Life {
    /// Opens connections that nobody answers, from every container.
    fn work(&mut self, seconds: u64) {
        self.worked.get_or_insert_with(Instant::now);
        let traffic = build().join("examples/traffic");
        for (i, dir) in self.dirs.iter().enumerate() {
            let sockets = 1 + (self.plan.k * 7 + i * 3) % 12;
            let shell = format!(
                "echo $$ >{}/cgroup.procs
                 exec ip netns exec {} {} knock 10.79.0.9:81 {sockets} {seconds}",
                dir.display(),
                self.netns,
                traffic.display()
            );
            let child = Command::new("sh").args(["-ec", &shell]).spawn();
            self.work.push(child.expect("sh"));
        }
    }

    fn finish(&mut self) {
        for mut child in self.work.drain(..) {
            assert!(child.wait().expect("it ends").success(), "the work failed");
        }
    }
}

/// Where the pods appear.
struct Stage {
    size: Size,
    began: Instant,
    root: PathBuf,
    file: PathBuf,
    /// The exporter's map.
    map: OnceLock<Map>,
    listed: Mutex<BTreeMap<String, Pod>>,
    /// The ids of all containers' cgroups that ever were.
    cgroups: Mutex<BTreeSet<u64>>,
    facts: Mutex<Vec<Fact>>,
    /// Scrapes that have ended.
    scrapes: AtomicUsize,
    alive: AtomicUsize,
    most_alive: AtomicUsize,
    restarts: AtomicUsize,
    failed: AtomicBool,
}

impl Stage {
    fn new(size: Size, file: PathBuf) -> Self {
        Self {
            size,
            began: Instant::now(),
            root: cgroup_root(),
            file,
            map: OnceLock::new(),
            listed: Mutex::default(),
            cgroups: Mutex::default(),
            facts: Mutex::default(),
            scrapes: AtomicUsize::new(0),
            alive: AtomicUsize::new(0),
            most_alive: AtomicUsize::new(0),
            restarts: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// Plays the pods of a slot, one after the other.
    fn play(&self, slot: usize) {
        let _alarm = Alarm(&self.failed);
        let mut names: Vec<(String, String)> = Vec::new();
        let mut last: Option<Life> = None;
        for k in (slot..self.size.pods).step_by(self.size.slots) {
            let plan = Plan::of(k, self.size);
            let name = if plan.usurper || k.is_multiple_of(2) {
                names.last()
            } else {
                names.first()
            };
            let pod = plan.pod(name.cloned().filter(|_| plan.heir));
            names.push((pod.namespace.clone(), pod.name.clone()));
            let mut life = self.begin(plan, pod, last.take());
            let next = k + self.size.slots;
            if next < self.size.pods && Plan::of(next, self.size).usurper {
                life.work(6);
                last = Some(life);
            } else {
                life.finish();
                self.end(life, true);
            }
        }
    }

    /// Brings a pod up and lets it work. Ends the pod whose name it takes, if that is still there.
    fn begin(&self, plan: Plan, pod: Pod, holder: Option<Life>) -> Life {
        let netns = format!("{NETNS}{}", plan.k);
        run(&format!(
            "ip netns add {netns}; ip -n {netns} -b - <<E
link add c type veth peer name p
link set c up
link set p up
addr add 10.79.{}.{}/16 dev c
neigh add 10.79.0.9 lladdr 02:00:00:00:00:09 dev c nud permanent
E",
            1 + plan.k / 200,
            1 + plan.k % 200
        ));
        let alive = self.alive.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_alive.fetch_max(alive, Ordering::Relaxed);
        let mut life = Life {
            plan,
            pod,
            netns,
            dirs: Vec::new(),
            counted: 0,
            listed: None,
            worked: None,
            work: Vec::new(),
        };
        life.pod.created = self.began.elapsed().as_secs();
        let victim = holder.as_ref().map(|life| life.pod.uid.clone());
        let seconds = 2 + life.plan.k as u64 % 3;
        let late = Duration::from_millis(2500);

        // Which of two holders caused a number is only known where the second starts after the first has lost the name.
        let early = !life.plan.heir;
        let order = life.plan.order;
        if order == Order::CgroupFirst {
            self.make_cgroups(&mut life);
            if early {
                life.work(seconds);
            }
            thread::sleep(late);
        }
        self.list(&mut life, order < Order::StatusLate, victim);
        if order == Order::ListedFirst {
            thread::sleep(late / 2);
        }
        if order != Order::CgroupFirst {
            self.make_cgroups(&mut life);
        }
        if !early {
            self.scrape(3);
        }
        if life.worked.is_none() {
            life.work(seconds);
        }
        if let Some(mut holder) = holder {
            holder.finish();
            self.end(holder, false);
        }
        if order == Order::StatusLate {
            thread::sleep(late);
            self.list(&mut life, true, None);
        }
        life.finish();
        for restart in 0..life.plan.restarts() {
            self.restart(&mut life, restart);
        }
        self.rest();
        life.work(2);
        life.finish();
        life
    }

    /// Replaces the first container by its next instance. The list learns of it before the cgroup is there, or after.
    fn restart(&self, life: &mut Life, restart: usize) {
        // Both have to be seen: the list forgets an instance as soon as it has the next.
        self.scrape(3);
        life.counted += self.map().value(&life.dirs[0]);
        self.remove_cgroup(&life.dirs[0]);
        life.pod.containers[0].1 = container_id(SEED + life.plan.k as u64, 2 + restart as u64);
        let late = (life.plan.k / 4 + restart).is_multiple_of(2);
        if !late {
            self.list(life, true, None);
        }
        self.make_cgroups(life);
        life.work(2);
        if late {
            thread::sleep(Duration::from_millis(1500));
            self.list(life, true, None);
        }
        life.finish();
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes down a pod that has done its work. `exact` says that the exporter gets the time to book all of it.
    fn end(&self, life: Life, exact: bool) {
        let Life { plan, pod, .. } = &life;
        if exact {
            self.scrape(3);
        }
        let snmp = run(&format!("ip netns exec {} cat /proc/net/snmp", life.netns));
        let mut tcp = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (tcp.next().expect("names"), tcp.next().expect("values"));
        let (_, kernel) = names
            .split(' ')
            .zip(values.split(' '))
            .find(|(name, _)| *name == "RetransSegs")
            .expect("every kernel counts these");
        let values = life.dirs.iter().map(|dir| self.map().value(dir));
        let counted = life.counted + values.sum::<u64>();
        let unlist = || {
            self.change(|listed| {
                listed.remove(&pod.uid);
            });
        };
        let unlisted_first = plan.k.is_multiple_of(2);
        if unlisted_first {
            unlist();
            thread::sleep(PERIOD);
        }
        for dir in &life.dirs {
            self.remove_cgroup(dir);
        }
        let gone = Instant::now();
        self.remove_cgroup(life.dirs[0].parent().expect("the pod's own"));
        if !unlisted_first {
            thread::sleep(PERIOD);
            unlist();
        }
        run(&format!("ip netns del {}", life.netns));
        self.alive.fetch_sub(1, Ordering::Relaxed);
        let mut containers: BTreeSet<_> = pod
            .containers
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        if plan.order == Order::StatusNever {
            containers = BTreeSet::from([String::new()]);
        }
        lock(&self.facts).push(Fact {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            containers,
            listed: life.listed.expect("it was listed"),
            worked: life.worked.expect("it worked"),
            gone,
            kernel: kernel.parse().expect("a counter"),
            counted,
            exact: exact && plan.order != Order::StatusNever,
        });
    }

    fn map(&self) -> &Map {
        self.map.get().expect("the exporter runs")
    }

    /// Lists the pod, with its containers' ids or without, in place of another.
    fn list(&self, life: &mut Life, containers: bool, instead_of: Option<String>) {
        let mut pod = life.pod.clone();
        if !containers {
            pod.containers.clear();
        }
        self.change(|listed| {
            life.listed.get_or_insert_with(Instant::now);
            if let Some(uid) = instead_of {
                listed.remove(&uid);
            }
            listed.insert(pod.uid.clone(), pod);
        });
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Pod>)) {
        let mut listed = lock(&self.listed);
        change(&mut listed);
        let pods: Vec<_> = listed.values().cloned().collect();
        write_pods(&self.file, &pods);
    }

    fn make_cgroups(&self, life: &mut Life) {
        life.dirs = (0..life.pod.containers.len())
            .map(|i| self.root.join(life.plan.cgroup(&life.pod, i)))
            .collect();
        for dir in &life.dirs {
            fs::create_dir_all(dir).expect("a cgroup");
            lock(&self.cgroups).insert(fs::metadata(dir).expect("it is there").ino());
        }
    }

    /// A dead process leaves its cgroup a little later.
    fn remove_cgroup(&self, dir: &Path) {
        while let Err(error) = fs::remove_dir(dir) {
            assert!(!self.failed.load(Ordering::Relaxed), "{error}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn rest(&self) {
        let end = Instant::now() + self.size.rest();
        while Instant::now() < end {
            assert!(!self.failed.load(Ordering::Relaxed), "another pod failed");
            thread::sleep(PERIOD / 4);
        }
    }

    /// Waits until that many more scrapes have ended: all but the first began after this.
    fn scrape(&self, count: usize) {
        let wanted = self.scrapes.load(Ordering::Relaxed) + count;
        while self.scrapes.load(Ordering::Relaxed) < wanted {
            assert!(!self.failed.load(Ordering::Relaxed), "another pod failed");
            thread::sleep(PERIOD / 20);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the others of a panic.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Removes the network namespaces and cgroups that are left, from before as well.
struct Broom(PathBuf);

impl Broom {
    fn sweep(&self) {
        let root = self.0.display();
        let ours = format!("pod{:x}", SEED >> 16);
        // What still runs gives up by itself after some seconds.
        succeeds(&format!(
            "for n in $(ip netns list | grep -o '^{NETNS}[0-9]*'); do ip netns del $n; done
             for i in $(seq 100); do
               left=$(find {root}/kubepods* -depth -type d -path '*{ours}*')
               [ -n \"$left\" ] || break
               rmdir $left || sleep 0.1
             done
             for d in kubepods.slice kubepods; do find {root}/$d -depth -type d -exec rmdir {{}} +; done"
        ));
    }
}

impl Drop for Broom {
    fn drop(&mut self) {
        self.sweep();
    }
}

/// One scrape, and the process after it.
struct Moment {
    begin: Instant,
    end: Instant,
    series: usize,
    rss_kib: u64,
    fds: usize,
    watches: usize,
    cgroups: usize,
}

/// All scrapes.
#[derive(Default)]
struct Recording {
    moments: Vec<Moment>,
    /// The values of each series, by the number of the scrape.
    tracks: HashMap<String, Vec<(usize, f64)>>,
}

impl Recording {
    fn add(&mut self, address: &str, pid: u32, root: &Path) {
        let begin = Instant::now();
        let text = get(address, "/metrics");
        let end = Instant::now();
        let series = Scrape::parse(&text).series;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let rss = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kib| kib.parse().ok());
        let infos = fdinfo(pid);
        self.moments.push(Moment {
            begin,
            end,
            series: series.len(),
            rss_kib: rss.expect("a size"),
            fds: infos.len(),
            cgroups: cgroups(root),
            watches: infos
                .iter()
                .map(|info| info.matches("inotify wd:").count())
                .sum(),
        });
        for (series, value) in series {
            let track = self.tracks.entry(series).or_default();
            track.push((self.moments.len() - 1, value));
        }
    }

    /// The sums over a metric's series by namespace and pod: for each scrape, `None` where there is none.
    fn pods(&self, metric: &str) -> BTreeMap<(String, String), Vec<Option<f64>>> {
        let mut pods = BTreeMap::new();
        for (series, track) in &self.tracks {
            if series.split('{').next() == Some(metric) {
                let sums: &mut Vec<Option<f64>> = pods
                    .entry((label(series, "namespace"), label(series, "pod")))
                    .or_insert_with(|| vec![None; self.moments.len()]);
                for (i, value) in track {
                    *sums[*i].get_or_insert(0.0) += value;
                }
            }
        }
        pods
    }

    /// The last value of a series.
    fn last(&self, series: &str) -> f64 {
        let track = &self.tracks[series];
        track.last().expect("a track has a value").1
    }
}

/// How many cgroups there are at and below one.
fn cgroups(dir: &Path) -> usize {
    // One that goes meanwhile counts as one.
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    1 + dirs.map(|entry| cgroups(&entry.path())).sum::<usize>()
}

fn label(series: &str, name: &str) -> String {
    let labels = series.split_once('{').map_or("", |(_, labels)| labels);
    let of = |separator: &str| {
        let (_, rest) = labels.split_once(&format!("{separator}{name}=\""))?;
        rest.split_once('"').map(|(value, _)| value.to_owned())
    };
    of(",")
        .or_else(|| of("").filter(|_| labels.starts_with(name)))
        .unwrap_or_default()
}

/// What the kernel tells of each descriptor of a process.
fn fdinfo(pid: u32) -> Vec<String> {
    let all = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("it runs");
    // A descriptor may be closed meanwhile.
    all.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .collect()
}

/// The exporter's map of retransmits by cgroup id, by its own id.
struct Map(String);

impl Map {
    fn of(pid: u32) -> Self {
        let infos = fdinfo(pid);
        let ids = infos
            .iter()
            .flat_map(|info| info.lines())
            .filter_map(|line| line.strip_prefix("map_id:"))
            .map(str::trim);
        let ours =
            |id: &&str| run(&format!("bpftool -j map show id {id}")).contains("\"RETRANSMITS\"");
        let id = ids
            .into_iter()
            .find(ours)
            .expect("the exporter has the map");
        Self(id.to_owned())
    }

    /// What it has for the cgroup of a directory: the sum over the kinds.
    fn value(&self, dir: &Path) -> u64 {
        let id = fs::metadata(dir).expect("it is there").ino();
        let key: Vec<_> = id.to_ne_bytes().iter().map(u8::to_string).collect();
        let entry = run(&format!(
            "bpftool -j map lookup id {} key {} || true",
            self.0,
            key.join(" ")
        ));
        // Where there is none, the answer is an error or nothing.
        let entry: serde_json::Value = serde_json::from_str(&entry).unwrap_or_default();
        let bytes = bytes(&entry["value"]);
        bytes.chunks(8).map(number).sum()
    }

    /// The ids of all cgroups that it has.
    fn keys(&self) -> BTreeSet<u64> {
        let dump = run(&format!("bpftool -j map dump id {}", self.0));
        let entries: Vec<serde_json::Value> = serde_json::from_str(&dump).expect("JSON");
        entries
            .iter()
            .map(|entry| number(&bytes(&entry["key"])))
            .collect()
    }
}

/// Bytes as bpftool writes them: `["0x2a", ...]`.
fn bytes(array: &serde_json::Value) -> Vec<u8> {
    let digits = array.as_array().into_iter().flatten();
    digits
        .filter_map(|byte| byte.as_str()?.strip_prefix("0x"))
        .map(|digits| u8::from_str_radix(digits, 16).expect("a byte"))
        .collect()
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("8 bytes"))
}

/// Everything that has to hold, and what does not.
struct Verdict<'a> {
    recording: &'a Recording,
    retention: Duration,
    /// The pods of each name, the eldest first.
    names: BTreeMap<(String, String), Vec<&'a Fact>>,
    wrong: Vec<String>,
}

impl<'a> Verdict<'a> {
    fn new(recording: &'a Recording, facts: &'a [Fact], retention: Duration) -> Self {
        let mut names: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for fact in facts {
            let name = (fact.namespace.clone(), fact.name.clone());
            names.entry(name).or_default().push(fact);
        }
        for facts in names.values_mut() {
            facts.sort_by_key(|fact| fact.listed);
        }
        Self {
            recording,
            retention,
            names,
            wrong: Vec::new(),
        }
    }

    fn at(&self, scrape: usize) -> String {
        let first = self.recording.moments[0].begin;
        let begin = self.recording.moments[scrape].begin;
        format!("at {:.1} s", begin.duration_since(first).as_secs_f64())
    }

    /// No series is of a pod that was not there, and none stays for longer than the retention time.
    fn labels(&mut self) {
        for (series, track) in &self.recording.tracks {
            let name = (label(series, "namespace"), label(series, "pod"));
            if name.0.is_empty() && ["", "unknown", "other"].contains(&&*name.1) {
                continue;
            }
            let container = label(series, "container");
            for (i, _) in track {
                let Moment { begin, end, .. } = self.recording.moments[*i];
                let right = self.names.get(&name).is_some_and(|facts| {
                    facts.iter().any(|fact| {
                        // Empty: the list named it later than the ledger waits.
                        (container.is_empty() || fact.containers.contains(&container))
                            && fact.listed < end
                            && begin < fact.gone + self.retention + MARGIN
                    })
                });
                if !right {
                    self.wrong.push(format!(
                        "{}: {series} is nobody's; pods of that name: {}",
                        self.at(*i),
                        self.names.get(&name).map_or(0, Vec::len)
                    ));
                    break;
                }
            }
        }
    }

    /// No counter decreases, or is absent for a while, unless its name went to another pod meanwhile.
    fn counters(&mut self) -> usize {
        let mut resets = 0;
        for (series, track) in &self.recording.tracks {
            let metric = series.split('{').next().unwrap_or_default();
            if !["_total", "_bucket", "_sum", "_count"]
                .iter()
                .any(|end| metric.ends_with(end))
            {
                continue;
            }
            let name = (label(series, "namespace"), label(series, "pod"));
            let heirs = self.names.get(&name).map_or(&[][..], |facts| &facts[1..]);
            for pair in track.windows(2) {
                let [(i, before), (j, after)] = pair else {
                    unreachable!("windows of two")
                };
                if after >= before && *j == i + 1 {
                    continue;
                }
                let (from, to) = (
                    self.recording.moments[*i].begin,
                    self.recording.moments[*j].end,
                );
                if heirs
                    .iter()
                    .any(|heir| from < heir.worked && heir.listed < to)
                {
                    resets += 1;
                } else {
                    let (from, to) = (self.at(*i), self.at(*j));
                    self.wrong.push(format!(
                        "{series} was {before} {from} and {after} {to}, and is the same pod's"
                    ));
                }
            }
        }
        resets
    }

    /// Every pod has what the map counted for it, or less where the name was taken from it, and is shown for the
    /// retention time. Returns what the pods have.
    fn totals(&mut self) -> f64 {
        let moments = &self.recording.moments;
        let sums = self.recording.pods(RETRANSMITS);
        let mut ours = 0.0;
        for (name, facts) in &self.names {
            let nothing = vec![None; moments.len()];
            let sums = sums.get(name).unwrap_or(&nothing);
            // The name is taken over in the scrape that has nothing of its former holder.
            let taken = |heir: &Fact| {
                let from = moments.partition_point(|moment| moment.end < heir.listed);
                (from..moments.len())
                    .find(|i| sums[*i].is_none_or(|sum| sum == 0.0))
                    .unwrap_or(moments.len())
            };
            let mut begin = 0;
            for (n, fact) in facts.iter().enumerate() {
                let heir = facts.get(n + 1);
                let end = heir.map_or(moments.len(), |heir| taken(heir));
                let span = &sums[begin..end.max(begin)];
                let total = span.iter().flatten().copied().fold(0.0, f64::max);
                ours += total;
                let what = format!("{}/{} (pod {} of the name)", name.0, name.1, n + 1);
                let counted = fact.counted as f64;
                if total > counted || (fact.exact && total != counted) {
                    self.wrong
                        .push(format!("{what} has {total}, the map says {counted}"));
                }
                if let Some(heir) = heir
                    && moments
                        .get(end)
                        .is_none_or(|moment| moment.begin > heir.worked)
                {
                    self.wrong
                        .push(format!("{what} kept its name when the heir began to work"));
                }
                let until = (fact.gone + self.retention)
                    .checked_sub(MARGIN)
                    .expect("not before the boot");
                let shown = (begin..end).rfind(|i| sums[*i].is_some());
                if fact.exact && heir.is_none() && shown.is_none_or(|i| moments[i].end < until) {
                    self.wrong.push(format!("{what} was forgotten early"));
                }
                begin = end.max(begin);
            }
        }
        ours
    }
}

#[test]
fn pods_that_come_and_go_leave_no_wrong_label_no_lost_count_and_no_memory() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let veth = "modprobe -qa veth 2>/dev/null; ip netns add chandra-veth && \
                ip -n chandra-veth link add c type veth peer name p";
    let works = succeeds(veth);
    succeeds("ip netns del chandra-veth");
    if !works {
        return skip("needs root and veth");
    }
    if !process::can_look_into_the_kernel() {
        return;
    }
    // Another run of this test, in another checkout, would have pods of the same names.
    let turn = fs::File::create(env::temp_dir().join("chandra-churn.lock")).expect("a file");
    turn.lock().expect("the other run ends");
    let size = Size::read();
    let folder = tempfile::tempdir().expect("a folder");
    let stage = Stage::new(size, folder.path().join("pods.json"));
    let broom = Broom(stage.root.clone());
    broom.sweep();
    stage.change(|_| {});

    let mut args = vec!["--pods".to_owned(), stage.file.display().to_string()];
    if size.pods < FULL {
        args.extend([
            "--retention".to_owned(),
            format!("{}s", size.retention.as_secs()),
        ]);
    }
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let exporter = Exporter::start(&args);
    let (address, pid) = (exporter.address.as_str(), exporter.child.id());
    let map = stage.map.get_or_init(|| Map::of(pid));

    let done = AtomicBool::new(false);
    let mut recording = Recording::default();
    let mut keys = (0, 0);
    let mut churned = Duration::ZERO;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _alarm = Alarm(&stage.failed);
            while !done.load(Ordering::Relaxed) && !stage.failed.load(Ordering::Relaxed) {
                let begin = Instant::now();
                recording.add(address, pid, &stage.root);
                stage.scrapes.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PERIOD.saturating_sub(begin.elapsed()));
            }
        });
        let _alarm = Alarm(&stage.failed);
        stage.scrape(3);
        let stage = &stage;
        let slots: Vec<_> = (0..size.slots)
            .map(|slot| {
                let begin = stage.size.rest() * slot as u32 / size.slots as u32;
                scope.spawn(move || {
                    thread::sleep(begin);
                    stage.play(slot);
                })
            })
            .collect();
        for slot in slots {
            slot.join().expect("a slot ends well");
        }
        churned = stage.began.elapsed();
        let ours = lock(&stage.cgroups).clone();
        keys.0 = map.keys().intersection(&ours).count();
        // What waits for its owner longer than its cgroup is remembered ends as unknown.
        let end = Instant::now() + size.retention.max(PATIENCE) + MARGIN;
        while Instant::now() < end {
            stage.scrape(1);
        }
        keys.1 = map.keys().intersection(&ours).count();
        done.store(true, Ordering::Relaxed);
    });
    drop(exporter);
    drop(broom);

    let facts = lock(&stage.facts);
    let moments = &recording.moments;
    let mut verdict = Verdict::new(&recording, &facts, size.retention);
    verdict.labels();
    let resets = verdict.counters();
    let ours = verdict.totals();
    let Verdict {
        names, mut wrong, ..
    } = verdict;

    let kernel: u64 = facts.iter().map(|fact| fact.kernel).sum();
    let counted: u64 = facts.iter().map(|fact| fact.counted).sum();
    let lost_names = counted as f64 - ours;
    let unknown = recording.pods(RETRANSMITS)[&(String::new(), "unknown".to_owned())]
        .last()
        .copied()
        .flatten()
        .expect("unknown is always there");
    let booked = |result: &str| {
        recording.last(&format!(
            "chandra_attribution_total{{signal=\"tcp\",result=\"{result}\"}}"
        ))
    };
    let lost: f64 = recording
        .tracks
        .keys()
        .filter(|series| series.starts_with("chandra_lost_events_total"))
        .map(|series| recording.last(series))
        .sum();
    let left = recording
        .tracks
        .iter()
        .filter(|(series, track)| {
            let name = (label(series, "namespace"), label(series, "pod"));
            names.contains_key(&name) && track.last().is_some_and(|(i, _)| i + 1 == moments.len())
        })
        .count();
    let late = recording
        .tracks
        .iter()
        .filter(|(series, track)| series.starts_with(RETRANSMITS) && track[0].1 > 0.0)
        .count();

    let mut times: Vec<_> = moments
        .iter()
        .map(|moment| moment.end.duration_since(moment.begin))
        .collect();
    times.sort();
    // By then all slots have pods, and the allocator has its arenas.
    let warm = &moments[moments.len() / 8];
    let (first, last) = (&moments[0], moments.last().expect("scrapes"));
    let eighths = (1..8).map(|i| moments[moments.len() * i / 8].rss_kib);
    let eighths = Vec::from_iter(eighths);
    let most_rss = moments.iter().map(|moment| moment.rss_kib).max();
    let most_fds = moments.iter().map(|moment| moment.fds).max();
    let most_watches = moments.iter().map(|moment| moment.watches).max();
    let most_rss = most_rss.expect("scrapes");
    println!(
        "churn: {} pods ({} at a time) and {} restarts in {:.0} s, {} names taken over ({} of them with the former \
         holder at work), {} resets; {} scrapes in {:.0} s, p50 {:.1} ms, max {:.1} ms, at most {} series; \
         retransmits: kernel {kernel}, map {counted}, pods {ours}, unknown {unknown}; series born above 0: {late}; \
         left: {left} series, {} of {} map entries; RSS KiB: first {}, by eighths {eighths:?}, last {}, max {most_rss}; \
         descriptors: first {}, max {}, last {}; inotify watches: first {}, max {}, last {}; lost {lost}",
        facts.len(),
        stage.most_alive.load(Ordering::Relaxed),
        stage.restarts.load(Ordering::Relaxed),
        churned.as_secs_f64(),
        facts.len() - names.len(),
        (0..size.pods)
            .filter(|k| Plan::of(*k, size).usurper)
            .count(),
        resets,
        moments.len(),
        last.end.duration_since(first.begin).as_secs_f64(),
        times[times.len() / 2].as_secs_f64() * 1e3,
        times[times.len() - 1].as_secs_f64() * 1e3,
        moments
            .iter()
            .map(|moment| moment.series)
            .max()
            .unwrap_or_default(),
        keys.1,
        keys.0,
        first.rss_kib,
        last.rss_kib,
        first.fds,
        most_fds.unwrap_or_default(),
        last.fds,
        first.watches,
        most_watches.unwrap_or_default(),
        last.watches,
    );

    let mut check = |holds: bool, what: String| {
        if !holds {
            wrong.push(what);
        }
    };
    check(facts.len() == size.pods, "not every pod lived".to_owned());
    check(
        facts.iter().all(|fact| fact.kernel > 0),
        "a pod sent nothing again".to_owned(),
    );
    let own = own_host();
    let missed = kernel.abs_diff(counted) as f64;
    check(
        counted <= kernel && missed <= if own { 0.0 } else { kernel as f64 * MISSED },
        format!("the map has {counted}, the kernel {kernel}"),
    );
    check(
        unknown == lost_names || (!own && unknown > lost_names),
        format!("unknown is {unknown}, and not {lost_names}"),
    );
    check(
        (booked("pod"), booked("unknown")) == (ours, unknown),
        format!("attributed are {}, {}", booked("pod"), booked("unknown")),
    );
    check(left == 0, format!("{left} series are left"));
    check(
        keys.0 > 0 && keys.1 == 0,
        format!("the map has {} of {} cgroups", keys.1, keys.0),
    );
    check(lost == 0.0, format!("{lost} events were lost"));
    check(
        most_rss < warm.rss_kib + GROWTH_KIB,
        format!("grew from {} KiB to {most_rss} KiB", warm.rss_kib),
    );
    check(
        last.fds <= first.fds + 4,
        format!("{} descriptors, then {}", first.fds, last.fds),
    );
    check(
        last.watches <= last.cgroups + 8,
        format!(
            "{} inotify watches for {} cgroups",
            last.watches, last.cgroups
        ),
    );
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
