// SPDX-License-Identifier: Apache-2.0
//! What the tests share that run the real binary: the exporter as a process, scrapes, pods, cgroups.

#![allow(
    dead_code,
    reason = "every test file is a crate of its own and uses a part"
)]
#![expect(
    unreachable_pub,
    clippy::print_stderr,
    reason = "a module of test crates, which export nothing and show the exporter's log"
)]

pub mod privileges;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// The folder of the build: tests also run where the tree is mounted elsewhere than it was built.
pub fn build() -> PathBuf {
    let exe = env::current_exe().expect("a path");
    exe.parent()
        .and_then(Path::parent)
        .expect("target/<profile>/deps/<test>")
        .to_owned()
}

/// The variable that names a program which starts the exporter in another place (`tests/image/in-pod`), and tells its process.
const IN_POD: &str = "CHANDRA_EXPORTER";

/// In which words.
const PROCESS: &str = "chandra's process is ";

/// The flag that shows new accounts of `rdma` at 0 first.
pub const ZERO_FOR: &str = "--rdma.zero-for";

/// The exporter, running. Killed when dropped.
pub struct Exporter {
    pub child: Child,
    /// The exporter's process, which is the child itself but where [`IN_POD`] starts it.
    pub pid: u32,
    pub address: String,
    pub started: Instant,
    log: mpsc::Receiver<String>,
}

impl Exporter {
    /// Starts it on a free port and waits until it serves.
    pub fn start(args: &[&str]) -> Self {
        let program = env::var_os(IN_POD).map_or_else(|| build().join("chandra"), PathBuf::from);
        Self::start_by(&mut Command::new(program), args)
    }

    /// The same through another program, such as `capsh` or `setpriv`.
    pub fn start_by(command: &mut Command, args: &[&str]) -> Self {
        let started = Instant::now();
        // Counts are read at once, but where a test is about that.
        if !args.contains(&ZERO_FOR) {
            command.args([ZERO_FOR, "0s"]);
        }
        let mut child = command
            .args(["--web.listen-address", "127.0.0.1:0"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the exporter starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (send, log) = mpsc::channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                eprintln!("chandra: {line}");
                let _ = send.send(line);
            }
        });
        let mut exporter = Self {
            pid: child.id(),
            child,
            address: String::new(),
            started,
            log,
        };
        if env::var_os(IN_POD).is_some() {
            let line = exporter.wait_for(PROCESS);
            let pid = line.rsplit(' ').next().and_then(|pid| pid.parse().ok());
            exporter.pid = pid.expect("a process");
        }
        let line = exporter.wait_for("serving on http://");
        exporter.address = line
            .rsplit("http://")
            .next()
            .expect("an address")
            .trim()
            .to_owned();
        exporter
    }

    /// Waits for a log line that contains a text: minutes, in an emulator that shares its host.
    pub fn wait_for(&self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(180);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self
                .log
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("no log line with '{text}'"));
            if line.contains(text) {
                return line;
            }
        }
    }

    pub fn get(&self, path: &str) -> String {
        get(&self.address, path)
    }

    pub fn scrape(&self) -> Scrape {
        Scrape::parse(&self.get("/metrics"))
    }

    /// Scrapes until a condition holds, and returns that scrape.
    pub fn scrape_until(&self, what: &str, holds: impl Fn(&Scrape) -> bool) -> Scrape {
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            let scrape = self.scrape();
            if holds(&scrape) {
                return scrape;
            }
            assert!(Instant::now() < end, "not in 90 s: {what}\n{}", scrape.text);
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Scrapes until a hook of a signal is attached.
    pub fn until_attached(&self, signal: &str, hook: &str) -> Scrape {
        self.scrape_until(&format!("{hook} is attached"), |scrape| {
            let labels = [("signal", signal), ("hook", hook), ("reason", "attached")];
            scrape.sum("chandra_hook_info", &labels) == 1.0
        })
    }

    /// Reads the page for people until a condition holds, and returns it.
    pub fn page_until(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            let page = self.get("/");
            if holds(&page) {
                return page;
            }
            assert!(Instant::now() < end, "not in 90 s: {what}\n{page}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Scrapes until a signal is in a state.
    pub fn until_state(&self, signal: &str, state: &str) -> Scrape {
        self.scrape_until(&format!("{signal} is {state}"), |scrape| {
            let labels = [("signal", signal), ("state", state)];
            scrape.sum("chandra_signal_state", &labels) == 1.0
        })
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: &str) -> (std::process::ExitStatus, Duration) {
        let begin = Instant::now();
        run(&format!("kill -{signal} {}", self.child.id()));
        (self.child.wait().expect("it ends"), begin.elapsed())
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One GET, the body of the answer.
pub fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("the exporter listens");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )
    .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

/// A parsed page.
pub struct Scrape {
    pub series: BTreeMap<String, f64>,
    pub text: String,
}

impl Scrape {
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("series and value");
            (series.to_owned(), value.parse().expect("a number"))
        });
        Self {
            series: series.collect(),
            text: text.to_owned(),
        }
    }

    /// The sum of a metric's series whose labels contain all of the given `name="value"`.
    pub fn sum(&self, metric: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let of_metric = |series: &str| series.split('{').next() == Some(metric);
        let matches = |series: &str| {
            let (_, labels) = series.split_once('{').unwrap_or_default();
            wanted.iter().all(|label| {
                labels
                    .trim_end_matches('}')
                    .split("\",")
                    .any(|own| own.trim_end_matches('"') == label.trim_end_matches('"'))
            })
        };
        self.series
            .iter()
            .filter(|(series, _)| of_metric(series) && matches(series))
            .map(|(_, value)| value)
            .sum()
    }

    pub fn has(&self, metric: &str, label: &str) -> bool {
        self.series
            .keys()
            .any(|series| series.starts_with(metric) && series.contains(label))
    }
}

/// Prints why a test is skipped. Where everything has to run, that is a failure.
pub fn skip(why: &str) {
    assert!(
        env::var_os("CHANDRA_TEST_ALL").is_none(),
        "CHANDRA_TEST_ALL is set: {why}"
    );
    println!("SKIPPED: {why}");
}

/// Says if this process may load programs that trace.
pub fn may_trace() -> bool {
    let kernel = chandra::kernel::Kernel::read();
    kernel.may_trace() && kernel.btf.is_ok()
}

/// Runs a shell command that must succeed, and returns its output.
pub fn run(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", command])
        .output()
        .expect("sh");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command}\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Says if a shell command succeeds.
pub fn succeeds(command: &str) -> bool {
    Command::new("sh")
        .args(["-c", command])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Where cgroup v2 is mounted.
pub fn cgroup_root() -> PathBuf {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("procfs");
    match chandra::kernel::Hierarchy::find(&mountinfo) {
        chandra::kernel::Hierarchy::V2 { root, .. } => root,
        other => panic!("needs cgroup v2, this host has {other:?}"),
    }
}

/// A pod for a `PodList`, with its containers' cgroups on demand.
#[derive(Clone, Debug)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub created: u64,
    pub containers: Vec<(String, String)>,
    pub addresses: Vec<String>,
    /// Whether it is in the host's network.
    pub in_host: bool,
}

impl Pod {
    /// A pod with one container `main`, whose uid and container id follow from a seed.
    pub fn new(namespace: &str, name: &str, seed: u64) -> Self {
        let uid = format!("{seed:08x}-0000-4000-8000-{seed:012x}");
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid,
            created: seed,
            containers: vec![("main".to_owned(), format!("{seed:064x}"))],
            addresses: Vec::new(),
            in_host: false,
        }
    }

    /// The same in the host's network, whose addresses are those.
    pub fn in_host(mut self, addresses: &[&str]) -> Self {
        self.in_host = true;
        self.at(addresses)
    }

    /// The same with addresses.
    pub fn at(mut self, addresses: &[&str]) -> Self {
        self.addresses = addresses
            .iter()
            .map(|address| (*address).to_owned())
            .collect();
        self
    }

    /// The path of a container's cgroup below the root, as the systemd driver with containerd makes it.
    pub fn cgroup(&self, container: usize) -> String {
        let uid = self.uid.replace('-', "_");
        let id = &self.containers[container].1;
        format!(
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice/cri-containerd-{id}.scope"
        )
    }

    pub fn json(&self) -> serde_json::Value {
        let created = 1_700_000_000 + self.created;
        let statuses: Vec<_> = self
            .containers
            .iter()
            .map(|(name, id)| {
                serde_json::json!({
                    "name": name, "containerID": format!("containerd://{id}"),
                    "image": "", "imageID": "", "ready": true, "restartCount": 0
                })
            })
            .collect();
        let addresses: Vec<_> = self
            .addresses
            .iter()
            .map(|address| serde_json::json!({ "ip": address }))
            .collect();
        serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "namespace": self.namespace, "name": self.name, "uid": self.uid,
                "creationTimestamp": timestamp(created),
            },
            "spec": { "hostNetwork": self.in_host, "containers": [] },
            "status": { "phase": "Running", "containerStatuses": statuses, "podIPs": addresses },
        })
    }
}

/// RFC 3339 of a time in November 2023, which is all that the tests' pods need.
fn timestamp(seconds: u64) -> String {
    let at = seconds - 1_700_000_000;
    let (day, rest) = (14 + at / 86400, at % 86400);
    format!(
        "2023-11-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Writes a `PodList` so that no reader sees half of it.
pub fn write_pods(path: &Path, pods: &[Pod]) {
    let items: Vec<_> = pods.iter().map(Pod::json).collect();
    let list = serde_json::json!({ "apiVersion": "v1", "kind": "PodList", "items": items });
    let new = path.with_extension("new");
    fs::write(&new, list.to_string()).expect("a writable folder");
    fs::rename(&new, path).expect("the same folder");
}
