// SPDX-License-Identifier: Apache-2.0
//! The stage of a scenario: two nodes, pods, the exporter, Prometheus with the rendered rules, Alertmanager, a webhook.
//!
//! A node is a network namespace (`gpu-1`, `gpu-2`), joined to the other by an underlay link `eth0` (172.30.0.1 and .2,
//! fd30::1 and ::2) over which the nodes route their pods' addresses (10.1.0.0/24 and 10.2.0.0/24, fd10:1::/64 and
//! fd10:2::/64). A pod is a cgroup and a network namespace. Pods with RDMA are on the host's network: before 6.17 rdma_rxe
//! works in the initial network namespace only, which has a device of each node (`rxe1`, `rxe2`).
//!
//! A scenario may have the nodes encrypt what they route for their pods, as Cilium does: by WireGuard (`wg1` and `wg2`) or by
//! IPsec.
//!
//! Both nodes share a kernel, so one exporter sees both. Prometheus scrapes it as two targets and keeps of each what is
//! the node's: the series of its pods, and of devices, interfaces and peers whose names tell the node. What has none of these
//! labels is on both.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    common::{self, build, cgroup_root, run, succeeds},
    http,
};

const NODES: [&str; 2] = ["gpu-1", "gpu-2"];

/// Between two scrapes, and between two evaluations.
const PERIOD: Duration = Duration::from_secs(2);

/// How long anything may take on a busy machine. Nothing passes by this time; what waits in vain fails by it.
const LIMIT: Duration = Duration::from_secs(600);

/// Evaluations that have to say the same before it counts as settled.
const SETTLED: u32 = 8;

const EXPORTER: &str = "127.0.0.1:9970";
const PROMETHEUS: &str = "127.0.0.1:9090";
const ALERTMANAGER: &str = "127.0.0.1:9093";

/// The overrides of `_config` that make time run faster.
const FASTER: &str = include_str!("faster.jsonnet");

/// What is replayed.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    play: fn(&mut Stage),
    speed: u32,
    overrides: &'static str,
}

impl Scenario {
    pub(crate) const fn new(name: &'static str, play: fn(&mut Stage)) -> Self {
        Self {
            name,
            play,
            speed: 10,
            overrides: "{}",
        }
    }

    /// How much faster than real the windows and waits of the rules are, and what else differs from the defaults: an
    /// object in jsonnet with `_config`.
    pub(crate) const fn speed(self, times: u32, overrides: &'static str) -> Self {
        Self {
            speed: times,
            overrides,
            ..self
        }
    }

    /// Writes the rules as this scenario has them, below its folder.
    pub(crate) fn render(&self, folder: &Path) {
        let folder = folder.join(self.name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a writable folder");
        let (speed, overrides) = (self.speed, self.overrides);
        let config = folder.join("config.jsonnet");
        fs::write(&config, format!("({FASTER})({speed})\n+ {overrides}\n")).expect("written");
        let rendered = chandra_mixin::render::files(Some(&config));
        let mut files = rendered.unwrap_or_else(|e| panic!("{e}"));
        files.retain(|path, _| path.starts_with("alerts/"));
        chandra_mixin::write::write(&folder, &files).expect("written");
    }

    /// Plays it, with the rules that were rendered, and keeps what is worth a look in its folder.
    pub(crate) fn play(&self, folder: &Path) {
        let mut stage = Stage::new(self.name, folder.join(self.name));
        (self.play)(&mut stage);
        stage.over();
    }
}

pub(crate) const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

/// How the nodes encrypt what goes from pods of one to pods of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encryption {
    /// An interface of each node, `wg1` and `wg2`, each with the other as its only peer.
    WireGuard,
    /// ESP in tunnel mode, with AES-GCM as Cilium has it.
    Ipsec,
}

/// An alert that has to come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alert {
    pub(crate) name: &'static str,
    /// All labels but its name, in the order of their names: `namespace=… node=…`.
    pub(crate) labels: &'static str,
    /// What its description contains.
    pub(crate) says: &'static str,
}

/// A pod of a node, running or not.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pod: common::Pod,
    node: usize,
    /// The last part of its address; `None` on the host's network.
    place: Option<usize>,
}

impl Pod {
    /// Its IPv4 address and a port.
    pub(crate) fn at(&self, port: u16) -> String {
        format!("{}:{port}", self.addresses()[0])
    }

    /// Work like an allreduce's: bursts to this pod, with a pause after each.
    pub(crate) fn steps_to(&self, port: u16) -> String {
        format!(
            "while :; do traffic send {} 1; sleep 0.5; done",
            self.at(port)
        )
    }

    fn addresses(&self) -> [String; 2] {
        let node = self.node + 1;
        match self.place {
            Some(place) => [
                format!("10.{node}.0.{place}"),
                format!("fd10:{node}::{place}"),
            ],
            None => [format!("172.30.0.{node}"), format!("fd30::{node}")],
        }
    }

    /// Its network namespace, if it has one of its own.
    fn netns(&self) -> Option<&str> {
        self.place.map(|_| &*self.pod.name)
    }

    /// The node's end of its link.
    fn link(&self) -> String {
        format!("lxc{}", self.place.expect("a pod with its own network"))
    }

    fn cgroup(&self) -> String {
        format!("{}/{}", cgroup_root().display(), self.pod.cgroup(0))
    }

    /// As the API server tells of it.
    fn json(&self) -> Value {
        let mut pod = self.pod.json();
        let addresses = self.addresses();
        pod["spec"] = serde_json::json!({
            "nodeName": NODES[self.node], "hostNetwork": self.place.is_none(), "containers": [{ "name": "main" }],
        });
        pod["status"]["hostIP"] = format!("172.30.0.{}", self.node + 1).into();
        pod["status"]["podIP"] = addresses[0].clone().into();
        pod["status"]["podIPs"] = addresses
            .iter()
            .map(|address| serde_json::json!({ "ip": address }))
            .collect();
        pod
    }
}

/// What the webhook heard of one alert.
struct Told {
    at: Instant,
    fingerprint: String,
    firing: bool,
    name: String,
    labels: String,
    description: String,
}

/// Everything that a scenario plays on.
pub(crate) struct Stage {
    name: String,
    /// Where is kept what is worth a look.
    folder: PathBuf,
    scratch: tempfile::TempDir,
    begun: Instant,
    fault: Option<Instant>,
    /// The time line.
    lines: Vec<String>,
    pods: Vec<Pod>,
    encryption: Option<Encryption>,
    /// How often the keys of IPsec were rotated.
    rotations: u32,
    gpus: bool,
    /// What runs in each pod that runs, by its name.
    works: BTreeMap<String, Vec<Child>>,
    servers: BTreeMap<&'static str, Child>,
    webhook: String,
    hook: mpsc::Receiver<Told>,
    /// By fingerprint.
    firing: BTreeMap<String, Told>,
    expected: Vec<Alert>,
}

impl Stage {
    fn new(name: &str, folder: PathBuf) -> Self {
        let (send, hook) = mpsc::channel();
        let mut stage = Self {
            name: name.to_owned(),
            folder,
            scratch: tempfile::tempdir().expect("a folder"),
            begun: Instant::now(),
            fault: None,
            lines: Vec::new(),
            pods: Vec::new(),
            encryption: None,
            rotations: 0,
            gpus: false,
            works: BTreeMap::new(),
            servers: BTreeMap::new(),
            webhook: webhook(send),
            hook,
            firing: BTreeMap::new(),
            expected: Vec::new(),
        };
        let kernel = run("uname -r");
        stage.say(&format!("scenario {name}, kernel {}", kernel.trim()));
        stage
    }

    /// A pod with a network of its own, on a node. It runs once it has work.
    pub(crate) fn pod(&mut self, node: &str, namespace: &str, name: &str) -> Pod {
        self.declare(node, namespace, name, true)
    }

    /// A pod on the host's network, where the RDMA device of its node is. Its work has `$UVERBS` (the device's file),
    /// `$RDMA` (its address) and `$NOBODY` (an address to which packets are lost).
    pub(crate) fn rdma_pod(&mut self, node: &str, namespace: &str, name: &str) -> Pod {
        self.declare(node, namespace, name, false)
    }

    fn declare(&mut self, node: &str, namespace: &str, name: &str, network: bool) -> Pod {
        assert!(self.servers.is_empty(), "pods are declared before open()");
        let taken = self.pods.iter().any(|pod| pod.pod.name == name);
        assert!(!taken, "two pods {name}");
        let node = NODES.iter().position(|known| *known == node);
        let number = self.pods.len() + 10;
        let pod = Pod {
            pod: common::Pod::new(namespace, name, number as u64),
            node: node.expect("gpu-1 or gpu-2"),
            place: network.then_some(number),
        };
        self.pods.push(pod.clone());
        pod
    }

    /// Has the nodes encrypt what they route for their pods.
    pub(crate) fn encrypt(&mut self, encryption: Encryption) {
        assert!(self.servers.is_empty(), "said before open()");
        self.encryption = Some(encryption);
    }

    /// Gives the pods a render node, of a driver without hardware, whose file is `$GPU`.
    pub(crate) fn gpus(&mut self) {
        run("modprobe vgem; [ -e /dev/dri/renderD128 ]");
        self.gpus = true;
    }

    /// Says how much CPU time a pod requests, in cores: its weight where CPUs are short, as the kubelet sets it.
    pub(crate) fn requests(&self, pod: &Pod, cores: f64) {
        // Shares of 1024 a core, 2 at least, on the scale of cgroup v2.
        let shares = (1024.0 * cores).max(2.0);
        let weight = 1.0 + (shares - 2.0) * 9999.0 / 262_142.0;
        let container = PathBuf::from(pod.cgroup());
        let of_pod = container.parent().expect("a pod's cgroup");
        let root = cgroup_root();
        let below = of_pod.strip_prefix(&root).expect("below the root");
        let mut folder = root;
        for name in below {
            run(&format!(
                "mkdir -p {0}; echo +cpu >{0}/cgroup.subtree_control",
                folder.display()
            ));
            folder.push(name);
        }
        let folder = of_pod.display();
        run(&format!(
            "mkdir -p {folder}; echo {weight:.0} >{folder}/cpu.weight"
        ));
    }

    /// Builds the network and starts the servers. Returns once everything is seen from end to end.
    pub(crate) fn open(&mut self) {
        self.lay_network();
        match self.encryption {
            Some(Encryption::WireGuard) => self.lay_wireguard(),
            Some(Encryption::Ipsec) => self.lay_ipsec(),
            None => {}
        }
        let rdma = self.pods.iter().any(|pod| pod.place.is_none());
        if rdma {
            add_rdma_devices();
        }
        self.list_pods();
        self.start_servers();
        self.begun = Instant::now();
        self.wait("both nodes are scraped", |stage| {
            stage.holds("count(up{job=\"chandra\"} == 1) == 2")
        });
        let rdma = rdma.then_some("rdma");
        let encryption = self.encryption.map(|_| "encryption");
        let gpu = self.gpus.then_some("gpu");
        let more = [rdma, encryption, gpu].into_iter().flatten();
        for signal in ["tcp"].into_iter().chain(more) {
            let state = format!("chandra_signal_state{{signal=\"{signal}\",state=\"up\"}}");
            self.wait(&format!("signal {signal} is up"), |stage| {
                stage.holds(&format!("count({state} == 1) == 2"))
            });
        }
        self.note("the exporter is scraped, its signals are up");
    }

    fn lay_network(&self) {
        run("modprobe -a veth sch_netem
             for node in gpu-1 gpu-2; do
               ip netns add $node; ip -n $node link set lo up
               ip netns exec $node sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             done
             ip link add eth0 netns gpu-1 type veth peer name eth0 netns gpu-2");
        for (node, name) in NODES.iter().enumerate() {
            let (own, other) = (node + 1, 2 - node);
            run(&format!(
                "ip -n {name} -b - <<EOF
addr add 172.30.0.{own}/24 dev eth0
addr add fd30::{own}/64 dev eth0 nodad
link set eth0 up
route add 10.{other}.0.0/24 via 172.30.0.{other}
route add fd10:{other}::/64 via fd30::{other}
EOF"
            ));
        }
        for pod in &self.pods {
            let Some(netns) = pod.netns() else { continue };
            let (node, name, link) = (pod.node + 1, NODES[pod.node], pod.link());
            let [v4, v6] = pod.addresses();
            run(&format!(
                "ip netns add {netns}
ip link add {link} netns {name} type veth peer name eth0 netns {netns}
ip -n {name} -b - <<EOF
addr add 10.{node}.0.1/32 dev {link}
addr add fd10:{node}::1/128 dev {link} nodad
link set {link} up
route add {v4} dev {link}
route add {v6} dev {link}
EOF
ip -n {netns} -b - <<EOF
link set lo up
addr add {v4}/32 dev eth0
addr add {v6}/128 dev eth0 nodad
link set eth0 up
route add default via 10.{node}.0.1 dev eth0 onlink
route add default via fd10:{node}::1 dev eth0 onlink
EOF"
            ));
        }
    }

    fn lay_wireguard(&self) {
        run("modprobe wireguard");
        for node in NODES {
            let key = self.scratch(node);
            run(&format!(
                "umask 077; wg genkey >{key}.key; wg pubkey <{key}.key >{key}.pub"
            ));
        }
        for node in NODES {
            let environment = self.environment(node);
            let key = self.scratch(node);
            run(&format!(
                "{environment}
ip -n {node} link add $WG mtu 1420 type wireguard
ip netns exec {node} wg set $WG listen-port 51871 private-key {key}.key \
  peer $PEER allowed-ips $ALLOWED endpoint $ENDPOINT
ip -n {node} link set $WG up
for network in $(echo $ALLOWED | tr , ' '); do ip -n {node} route replace $network dev $WG; done"
            ));
        }
    }

    /// What a shell line on a node may need to know of its tunnel.
    fn environment(&self, node: &str) -> String {
        let Some(Encryption::WireGuard) = self.encryption else {
            return String::new();
        };
        let own = NODES.iter().position(|known| *known == node);
        let own = own.expect("gpu-1 or gpu-2");
        let other = 1 - own;
        let peer = run(&format!("cat {}.pub", self.scratch(NODES[other])));
        format!(
            "WG=wg{} PEER={} ENDPOINT=172.30.0.{n}:51871 ALLOWED=10.{n}.0.0/24,fd10:{n}::/64",
            own + 1,
            peer.trim(),
            n = other + 1,
        )
    }

    fn lay_ipsec(&mut self) {
        run("modprobe -a esp4 xfrm_user gcm");
        self.add_associations();
        for (node, name) in NODES.iter().enumerate() {
            let (own, other) = (node + 1, 2 - node);
            for (direction, from, to) in
                [("out", own, other), ("in", other, own), ("fwd", other, own)]
            {
                run(&format!(
                    "ip -n {name} xfrm policy add src 10.{from}.0.0/24 dst 10.{to}.0.0/24 dir {direction} \
                     tmpl src 172.30.0.{from} dst 172.30.0.{to} proto esp reqid 1 mode tunnel"
                ));
            }
        }
    }

    /// The security associations of the next key, one for each direction, on both nodes. Of several the kernel encrypts with
    /// the youngest and decrypts with the one that the packet names.
    fn add_associations(&mut self) {
        self.rotations += 1;
        let key = run("head -c 20 /dev/urandom | od -An -v -tx1 | tr -d ' \n'");
        // Whoever receives has the new key before anyone sends with it.
        for (name, from, to) in [
            ("gpu-1", 2, 1),
            ("gpu-2", 1, 2),
            ("gpu-1", 1, 2),
            ("gpu-2", 2, 1),
        ] {
            run(&format!(
                "ip -n {name} xfrm state add src 172.30.0.{from} dst 172.30.0.{to} proto esp spi {} reqid 1 mode tunnel \
                 aead 'rfc4106(gcm(aes))' 0x{key} 128",
                0x1000 + self.rotations
            ));
        }
    }

    /// Rotates the key of IPsec as Cilium does: the new one is added beside the old one, which is removed after a while.
    pub(crate) fn rotate_keys(&mut self, old_lives: Duration) {
        self.note(&format!("a new key beside the old one ({old_lives:?})"));
        self.add_associations();
        self.evaluations(old_lives.as_secs().div_ceil(PERIOD.as_secs()) as u32);
        for (name, from, to) in [
            ("gpu-1", 1, 2),
            ("gpu-1", 2, 1),
            ("gpu-2", 1, 2),
            ("gpu-2", 2, 1),
        ] {
            run(&format!(
                "ip -n {name} xfrm state delete src 172.30.0.{from} dst 172.30.0.{to} proto esp spi {}",
                0x1000 + self.rotations - 1
            ));
        }
        self.note("the old key is removed");
    }

    /// Runs a shell line on a node from here on, outside of all pods. It has `$WG` (the node's WireGuard interface), `$PEER`,
    /// `$ENDPOINT` and `$ALLOWED` (its peer's key, address and networks).
    pub(crate) fn on_node(&mut self, node: &'static str, line: &str) {
        let mut command = Command::new("ip");
        let line = format!("{}\n{line}", self.environment(node));
        command.args(["netns", "exec", node, "sh", "-c", &line]);
        self.start(node, command);
    }

    /// Tells the exporter which pods run.
    fn list_pods(&self) {
        let runs = |pod: &&Pod| self.works.contains_key(&pod.pod.name);
        let items: Vec<_> = self.pods.iter().filter(runs).map(Pod::json).collect();
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "PodList", "items": items });
        let new = self.scratch("pods.new");
        fs::write(&new, list.to_string()).expect("written");
        fs::rename(&new, self.scratch("pods.json")).expect("the same folder");
    }

    fn scratch(&self, name: &str) -> String {
        self.scratch.path().join(name).display().to_string()
    }

    fn start_servers(&mut self) {
        let bin = self.folder.with_file_name("bin");

        let mut exporter = Command::new(build().join("chandra"));
        exporter.args(["--web.listen-address", EXPORTER]);
        exporter.args(["--pods", &self.scratch("pods.json")]);
        self.start("chandra", exporter);

        let config = self.folder.join("alertmanager.yaml");
        let text = format!(
            "route: {{ receiver: hook, group_by: [alertname, cluster, node], group_wait: 0s, group_interval: 1s }}\n\
             receivers: [{{ name: hook, webhook_configs: [{{ url: 'http://{}/' }}] }}]\n",
            self.webhook
        );
        fs::write(&config, text).expect("written");
        // Debian's Alertmanager reads its templates from where the package would install them.
        let (templates, share) = (bin.join("templates"), "/usr/share/prometheus");
        run(&format!(
            "mkdir -p {share}; cp -rT {} {share}/alertmanager",
            templates.display()
        ));
        let mut alertmanager = Command::new(bin.join("alertmanager"));
        alertmanager.args(["--web.listen-address", ALERTMANAGER]);
        alertmanager.args(["--storage.path", &self.scratch("alertmanager")]);
        alertmanager.arg("--cluster.listen-address=");
        alertmanager.arg("--config.file").arg(config);
        self.start("alertmanager", alertmanager);

        let config = self.folder.join("prometheus.yaml");
        fs::write(&config, self.prometheus_config()).expect("written");
        let mut prometheus = Command::new(bin.join("prometheus"));
        prometheus.args(["--web.listen-address", PROMETHEUS]);
        prometheus.args(["--storage.tsdb.path", &self.scratch("tsdb")]);
        prometheus.arg("--config.file").arg(config);
        self.start("prometheus", prometheus);

        for url in [
            format!("http://{EXPORTER}/readyz"),
            format!("http://{ALERTMANAGER}/-/ready"),
            format!("http://{PROMETHEUS}/-/ready"),
        ] {
            self.wait(&url, |_| succeeds(&format!("curl -fs {url}")));
        }
    }

    fn start(&mut self, name: &'static str, mut command: Command) {
        let log = fs::File::create(self.folder.join(format!("{name}.log"))).expect("a file");
        let child = command.stdout(Stdio::null()).stderr(log).spawn();
        let child = child.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        self.servers.insert(name, child);
    }

    fn prometheus_config(&self) -> String {
        let pods = |node: usize| {
            let of_node = self.pods.iter().filter(|pod| pod.node == node);
            // Of a node without pods nothing is dropped: an empty name would be that of all that is no pod's.
            let names = of_node.map(|pod| &*pod.pod.name).chain(["-"]);
            names.collect::<Vec<_>>().join("|")
        };
        let [one, two] = NODES;
        let pods = format!("{one};({})|{two};({})", pods(1), pods(0));
        let things = format!("{one};.*2|{two};.*1");
        // IPsec's peer is the other end.
        let peers = format!("{one};172.30.0.1|{two};172.30.0.2");
        let target = |node| format!("{{ targets: ['{EXPORTER}'], labels: {{ node: {node} }} }}");
        format!(
            "global: {{ scrape_interval: {PERIOD:?}, evaluation_interval: {PERIOD:?} }}
rule_files: ['alerts/*.yaml']
alerting: {{ alertmanagers: [{{ static_configs: [{{ targets: ['{ALERTMANAGER}'] }}] }}] }}
scrape_configs:
- job_name: chandra
  honor_labels: true
  static_configs: [{}]
  metric_relabel_configs:
  - {{ source_labels: [node, pod], regex: '{pods}', action: drop }}
  - {{ source_labels: [node, device], regex: '{things}', action: drop }}
  - {{ source_labels: [node, interface], regex: '{things}', action: drop }}
  - {{ source_labels: [node, peer], regex: '{peers}', action: drop }}
",
            NODES.map(target).join(", ")
        )
    }

    /// Starts a shell line in a pod, which has to go on until the pod ends.
    pub(crate) fn work(&mut self, pod: &Pod, line: &str) {
        let name = &pod.pod.name;
        if !self.works.contains_key(name) {
            run(&format!("mkdir -p {}", pod.cgroup()));
            self.works.insert(name.clone(), Vec::new());
            self.list_pods();
        }
        self.run_in(pod, pod.netns(), line);
    }

    /// Starts a shell line in the cgroup of a pod and in a network namespace.
    fn run_in(&mut self, pod: &Pod, netns: Option<&str>, line: &str) {
        let name = &pod.pod.name;
        let log = self.folder.join(format!("{name}.log"));
        let log = fs::File::options().create(true).append(true).open(log);
        let log = log.expect("a file");
        let path = env::var("PATH").unwrap_or_default();
        let examples = build().join("examples");
        let netns = netns.map(|netns| format!("ip netns exec {netns}"));
        let enter = "echo $$ >$1/cgroup.procs && exec $2 sh -c \"$3\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", enter, "sh", &pod.cgroup()])
            .args([&netns.unwrap_or_default(), line])
            .env("PATH", format!("{}:{path}", examples.display()))
            .env("GPU", "/dev/dri/renderD128")
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log);
        if pod.place.is_none() {
            let node = pod.node + 1;
            command
                .env("UVERBS", uverbs(&format!("rxe{node}")))
                .env("RDMA", format!("10.78.{node}.1"))
                .env("NOBODY", format!("10.78.{node}.9"));
        }
        let child = command.spawn().expect("sh");
        self.works.entry(name.clone()).or_default().push(child);
    }

    /// Starts a job that calls NCCL for ever, with a rank in each of these pods; the first also has the process that starts the
    /// others. `tests/nccl-sim/job.c` says what it can be told.
    pub(crate) fn job(&mut self, pods: &[&Pod], arguments: &str) {
        let links = self.scratch(&format!("ranks-{}", pods[0].pod.name));
        fs::create_dir(&links).expect("a new folder");
        for (rank, pod) in pods.iter().enumerate() {
            run(&format!("mkdir -p {}", pod.cgroup()));
            self.works.entry(pod.pod.name.clone()).or_default();
            let link = format!("{links}/{rank}");
            std::os::unix::fs::symlink(pod.cgroup(), link).expect("a link");
        }
        self.list_pods();
        let nccl = self.folder.with_file_name("nccl");
        let nccl = nccl.canonicalize().expect("built by tools/scenario");
        let (nccl, ranks) = (nccl.display(), pods.len());
        // It ends with its input.
        let line = format!(
            "sleep infinity | {nccl}/job --library {nccl}/libnccl.so.2 --ranks {ranks} --cgroup {links}/%d --forever {arguments}"
        );
        // In a network namespace of its own it would not see the others' cgroups (`ip netns exec` mounts another /sys).
        self.run_in(pods[0], None, &line);
    }

    /// Sends a signal to the processes of a pod.
    pub(crate) fn signal(&self, pod: &Pod, signal: &str) {
        run(&format!(
            "kill -{signal} $(cat {}/cgroup.procs)",
            pod.cgroup()
        ));
    }

    /// Ends a pod: its work, its cgroup, its place in the list.
    pub(crate) fn end(&mut self, pod: &Pod) {
        let cgroup = pod.cgroup();
        let works = self.works.remove(&pod.pod.name);
        self.wait("the pod's processes end", |_| {
            succeeds(&format!("kill -9 $(cat {cgroup}/cgroup.procs)"));
            fs::remove_dir(&cgroup).is_ok()
        });
        for mut work in works.into_iter().flatten() {
            work.wait().expect("a child");
        }
        self.list_pods();
    }

    /// Makes a pod's link do what netem can (`loss 10%`), in both directions; or nothing of it, with an empty text.
    pub(crate) fn link(&self, pod: &Pod, does: &str) {
        let netns = pod.netns().expect("a pod with its own network");
        for (netns, link) in [(netns, "eth0"), (NODES[pod.node], &*pod.link())] {
            let tc = format!("tc -n {netns} qdisc");
            run(&match does {
                "" => format!("{tc} del dev {link} root"),
                _ => format!("{tc} replace dev {link} root netem {does} limit 100000"),
            });
        }
    }

    /// All is well for a time, as Prometheus sees it: pods work and send, nothing fires, nothing is about to.
    pub(crate) fn healthy(&mut self, time: Duration) {
        let before = self.sent();
        self.quiet(time);
        for (pod, bytes) in self.sent() {
            assert!(bytes > before[&pod], "{pod} sends nothing");
        }
    }

    /// The same of pods that need not send.
    pub(crate) fn quiet(&mut self, time: Duration) {
        self.note("healthy from here");
        self.evaluations(time.as_secs().div_ceil(PERIOD.as_secs()) as u32);
        self.settle();
    }

    /// Notes that the fault begins.
    pub(crate) fn fault(&mut self, what: &str) {
        self.note(&format!("fault: {what}"));
        self.fault = Some(Instant::now());
    }

    /// Waits until these alerts have come, each once, and whatever else is about to come. They may fire from here on.
    pub(crate) fn expect(&mut self, alerts: &[Alert]) {
        self.expected = alerts.to_vec();
        self.wait("the expected alerts", |stage| {
            let came = |alert: &Alert| stage.firing.values().any(|told| is(alert, told));
            stage.expected.iter().all(came)
        });
        self.settle();
        assert_eq!(self.firing.len(), alerts.len(), "each alert once");
    }

    /// Notes that the cause of the alerts is gone.
    pub(crate) fn mended(&mut self, what: &str) {
        self.note(&format!("mended: {what}"));
    }

    /// Waits until no alert fires any more. None may from then on.
    pub(crate) fn resolved(&mut self) {
        self.wait("the alerts' end", |stage| stage.firing.is_empty());
        self.expected.clear();
    }

    /// Waits until a query gives a result.
    pub(crate) fn until(&mut self, what: &str, query: &str) {
        self.wait(what, |stage| stage.holds(query));
        self.note(what);
    }

    /// Waits until the kernel lists this many queue pairs of pods, ready to send.
    pub(crate) fn queue_pairs(&mut self, wanted: u32) {
        let listed = "sum(pod_state:chandra_rdma_queue_pairs:sum{pod!=\"\",state=\"RTS\"})";
        let what = format!("pods have {wanted} queue pairs");
        self.until(&what, &format!("{listed} == {wanted}"));
    }

    /// Ends the scenario: nothing may come any more.
    fn over(&mut self) {
        self.settle();
        self.note("over: as expected");
    }

    /// Waits for some evaluations, and until each pending alert fires or is not pending any more.
    fn settle(&mut self) {
        self.evaluations(SETTLED);
        self.wait("no alert is pending", |stage| {
            !stage.holds("ALERTS{alertstate=\"pending\"}")
        });
    }

    /// Waits until Prometheus has evaluated the rules so often.
    fn evaluations(&mut self, wanted: u32) {
        let count = |stage: &Self| {
            let rows = stage.query("min(count_over_time(node:chandra_series:sum[1d]))");
            rows.first().copied().unwrap_or_default()
        };
        let goal = count(self) + f64::from(wanted);
        let limit = LIMIT + 3 * PERIOD * wanted;
        self.wait_for("Prometheus evaluates the rules", limit, |stage| {
            count(stage) >= goal
        });
    }

    /// The bytes that running pods have sent.
    fn sent(&self) -> BTreeMap<String, u64> {
        let networked = self.pods.iter().filter(|pod| {
            let runs = self.works.contains_key(&pod.pod.name);
            runs && pod.place.is_some()
        });
        let bytes = networked.map(|pod| {
            let (node, link) = (NODES[pod.node], pod.link());
            let file = format!("/sys/class/net/{link}/statistics/rx_bytes");
            let bytes = run(&format!("ip netns exec {node} cat {file}"));
            (
                pod.pod.name.clone(),
                bytes.trim().parse().expect("a number"),
            )
        });
        bytes.collect()
    }

    fn holds(&self, query: &str) -> bool {
        !self.query(query).is_empty()
    }

    /// The values that a query gives; none while Prometheus does not answer.
    fn query(&self, query: &str) -> Vec<f64> {
        let answer = Command::new("curl")
            .args(["-sG", "--data-urlencode", &format!("query={query}")])
            .arg(format!("http://{PROMETHEUS}/api/v1/query"))
            .output()
            .expect("curl");
        let answer: Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
        assert!(answer["status"] != "error", "{query}: {answer}");
        let rows = answer["data"]["result"].as_array().into_iter().flatten();
        rows.map(|row| text(&row["value"][1]).parse().expect("a number"))
            .collect()
    }

    fn wait(&mut self, what: &str, holds: impl FnMut(&Self) -> bool) {
        self.wait_for(what, LIMIT, holds);
    }

    /// Asks again and again until something holds. Meanwhile no alert may fire that is not expected, and no work end.
    fn wait_for(&mut self, what: &str, limit: Duration, mut holds: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        loop {
            self.hear();
            self.all_run();
            if holds(self) {
                break;
            }
            assert!(begun.elapsed() < limit, "in vain: {what}");
            thread::sleep(Duration::from_millis(500));
        }
    }

    fn all_run(&mut self) {
        let servers = self.servers.iter_mut().map(|(name, child)| (*name, child));
        let works = self.works.iter_mut();
        let works = works.flat_map(|(name, works)| works.iter_mut().map(|work| (&**name, work)));
        for (name, child) in servers.chain(works) {
            let status = child.try_wait().expect("a child");
            assert!(status.is_none(), "{name} ended, see {name}.log: {status:?}");
        }
    }

    /// Takes what the webhook heard, and fails at an alert that is not expected.
    fn hear(&mut self) {
        while let Ok(told) = self.hook.try_recv() {
            let known = self.firing.contains_key(&told.fingerprint);
            if told.firing && !known {
                let after = self.fault.map_or(String::new(), |fault| {
                    let after = told.at.saturating_duration_since(fault);
                    format!(", {} s after the fault", after.as_secs())
                });
                let Told { name, labels, .. } = &told;
                self.note_at(told.at, &format!("{name} fires{after}: {labels}"));
                self.say(&format!("         {}", told.description));
                let expected = self.expected.iter().any(|alert| is(alert, &told));
                let name = told.name.clone();
                self.firing.insert(told.fingerprint.clone(), told);
                assert!(expected, "{name} is not one of {:#?}", self.expected);
            } else if !told.firing && known {
                self.firing.remove(&told.fingerprint);
                self.note_at(told.at, &format!("{} is over: {}", told.name, told.labels));
            }
        }
    }

    /// Adds a line to the time line.
    pub(crate) fn note(&mut self, what: &str) {
        self.note_at(Instant::now(), what);
    }

    fn note_at(&mut self, at: Instant, what: &str) {
        let at = at.saturating_duration_since(self.begun).as_secs();
        self.say(&format!("{:4}:{:02}  {what}", at / 60, at % 60));
    }

    fn say(&mut self, line: &str) {
        println!("{line}");
        self.lines.push(line.to_owned());
    }

    /// Keeps the time line and Prometheus' data, and says how to look at them.
    fn keep(&mut self) {
        let lines = self.lines.join("\n") + "\n";
        let _ = fs::write(self.folder.join("timeline.txt"), lines);
        let Some(mut prometheus) = self.servers.remove("prometheus") else {
            return;
        };
        succeeds(&format!("kill -TERM {}", prometheus.id()));
        let _ = prometheus.wait();
        let data = self.folder.join("prometheus");
        succeeds(&format!(
            "cp -rT {} {}",
            self.scratch("tsdb"),
            data.display()
        ));
        let range = self.begun.elapsed().as_secs() / 60 + 1;
        let now = run("date -u +%Y-%m-%d+%H:%M:%S");
        let folder = format!("target/scenarios/{}", self.name);
        println!(
            "kept in {folder}: time line, rules, logs, Prometheus' data. To look at it:
  target/scenarios/bin/prometheus --config.file=/dev/null --storage.tsdb.path={folder}/prometheus \
             --storage.tsdb.retention.time=10y --web.listen-address=127.0.0.1:9090
  http://127.0.0.1:9090/graph?g0.expr=ALERTS&g0.tab=0&g0.range_input={range}m&g0.end_input={}",
            now.trim()
        );
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if thread::panicking() {
            self.note("FAILED");
        }
        self.keep();
        let works = std::mem::take(&mut self.works).into_values().flatten();
        for mut child in works.chain(std::mem::take(&mut self.servers).into_values()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is(alert: &Alert, told: &Told) -> bool {
    alert.name == told.name && alert.labels == told.labels && told.description.contains(alert.says)
}

/// An rdma_rxe device of each node, in the initial network namespace.
fn add_rdma_devices() {
    run("modprobe -a dummy rdma_rxe rdma_ucm ib_uverbs
         for node in 1 2; do
           ip link add rdma$node type dummy
           ip addr add 10.78.$node.1/24 dev rdma$node; ip link set rdma$node up
           ip neigh add 10.78.$node.9 lladdr 02:00:00:00:00:09 dev rdma$node nud permanent
           rdma link add rxe$node type rxe netdev rdma$node
         done
         for i in $(seq 100); do [ -e /dev/infiniband/uverbs1 ] && break; sleep 0.1; done
         [ -e /dev/infiniband/uverbs1 ]");
}

/// The device file of an RDMA device.
fn uverbs(device: &str) -> String {
    let file = run(&format!(
        "grep -lx {device} /sys/class/infiniband_verbs/uverbs*/ibdev"
    ));
    let folder = Path::new(file.trim()).parent().and_then(Path::file_name);
    let name = folder.expect("a device").display();
    format!("/dev/infiniband/{name}")
}

/// Listens for Alertmanager, and passes on what each message says of each alert.
fn webhook(told: mpsc::Sender<Told>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let at = Instant::now();
            let Some(message) = message(&mut stream) else {
                continue;
            };
            for alert in message["alerts"].as_array().into_iter().flatten() {
                let labels = alert["labels"].as_object().into_iter().flatten();
                let labels: BTreeSet<_> = labels
                    .filter(|(name, _)| *name != "alertname")
                    .map(|(name, value)| format!("{name}={}", text(value)))
                    .collect();
                let sent = told.send(Told {
                    at,
                    fingerprint: text(&alert["fingerprint"]).to_owned(),
                    firing: alert["status"] == "firing",
                    name: text(&alert["labels"]["alertname"]).to_owned(),
                    labels: labels.into_iter().collect::<Vec<_>>().join(" "),
                    description: text(&alert["annotations"]["description"]).to_owned(),
                });
                if sent.is_err() {
                    return;
                }
            }
            let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.write_all(ok);
        }
    });
    address
}

/// The body of a request, as JSON.
fn message(stream: &mut TcpStream) -> Option<Value> {
    serde_json::from_str(&http::request(stream)?).ok()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
