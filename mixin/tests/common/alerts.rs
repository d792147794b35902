// SPDX-License-Identifier: Apache-2.0
//! Prometheus and Alertmanager of both generations, between pages that a test makes up and a webhook that it listens on.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Package, http::request, program};

/// Prometheus of both generations.
const PROMETHEUS: [Package; 2] = [
    ("bookworm", "prometheus", "usr/bin/prometheus"),
    ("sid", "prometheus", "usr/bin/prometheus"),
];

const ALERTMANAGER: Package = (
    "bookworm",
    "prometheus-alertmanager",
    "usr/bin/prometheus-alertmanager",
);

/// A server of somebody else's, killed when dropped.
pub struct Server(pub Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An address that nobody listens on.
fn free() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").to_string()
}

/// Answers every request by what `answer` makes of its body, until the test ends. Returns where.
pub fn serve(answer: impl Fn(&str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            if let Some(body) = request(&mut stream) {
                let text = answer(&body);
                let length = text.len();
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nConnection: close";
                let _ = write!(stream, "{head}\r\nContent-Length: {length}\r\n\r\n{text}");
            }
        }
    });
    address
}

/// A string of JSON, empty where there is none.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What the webhook was told: each alert that fires, by its name and labels, and when it was told first.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Vec<(Instant, Value)>>>);

impl Told {
    /// Every alert once.
    pub fn alerts(&self) -> Vec<(Instant, Value)> {
        self.0.lock().expect("no panic").clone()
    }
}

/// Listens for Alertmanager. Returns where, and what it is told.
fn webhook() -> (String, Told) {
    let told = Told::default();
    let kept = told.clone();
    let address = serve(move |body| {
        let message: Value = serde_json::from_str(body).expect("Alertmanager sends JSON");
        for alert in message["alerts"].as_array().into_iter().flatten() {
            let mut kept = kept.0.lock().expect("no panic");
            let known = kept.iter().any(|(_, old)| old["labels"] == alert["labels"]);
            if alert["status"] == "firing" && !known {
                kept.push((Instant::now(), alert.clone()));
            }
        }
        String::new()
    });
    (address, told)
}

/// Starts Alertmanager. Debian's reads its templates from where the package would install them: it gets a /usr/share of its own for
/// that, in a mount namespace. Returns where it listens.
fn alertmanager(program: &Path, folder: &Path, hook: &str) -> (Server, String) {
    let config = folder.join("alertmanager.yaml");
    let text = format!(
        "route: {{ receiver: hook, group_by: [alertname, cluster, node], group_wait: 0s, group_interval: 1s }}\n\
         receivers: [{{ name: hook, webhook_configs: [{{ url: 'http://{hook}/' }}] }}]\n"
    );
    fs::write(&config, text).expect("written");
    let address = free();
    let share = program
        .ancestors()
        .nth(2)
        .expect("the package's /usr")
        .join("share/prometheus");
    let script = "mount -t tmpfs tmpfs /usr/share && cp -r \"$1\" /usr/share/prometheus && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--kill-child",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    command.arg(share).arg(program);
    command.args([
        "--cluster.listen-address=",
        "--web.listen-address",
        &address,
    ]);
    command
        .arg("--config.file")
        .arg(config)
        .arg("--storage.path")
        .arg(folder.join("alertmanager"));
    (start(command, folder.join("alertmanager.log")), address)
}

/// Starts Prometheus, with the rules below `folder`. `targets` are jobs with the node and the address of each. It scrapes and evaluates
/// every second.
fn prometheus(
    program: &Path,
    folder: &Path,
    targets: &[(&str, String, String)],
    alertmanager: &str,
) -> Server {
    let config = folder.join("prometheus.yaml");
    let mut text = format!(
        "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: ['{}/alerts/*.yaml']
alerting: {{ alertmanagers: [{{ static_configs: [{{ targets: ['{alertmanager}'] }}] }}] }}
scrape_configs:
",
        folder.display()
    );
    let mut jobs: Vec<_> = targets.iter().map(|(job, ..)| *job).collect();
    jobs.dedup();
    for job in jobs {
        text += &format!("- job_name: {job}\n  honor_labels: true\n  static_configs:\n");
        for (_, node, address) in targets.iter().filter(|(of, ..)| *of == job) {
            text += &format!("  - {{ targets: ['{address}'], labels: {{ node: {node} }} }}\n");
        }
    }
    fs::write(&config, text).expect("written");
    let mut command = Command::new(program);
    command
        .arg("--config.file")
        .arg(config)
        .arg("--storage.tsdb.path")
        .arg(folder.join("prometheus"));
    command.args(["--web.listen-address", &free()]);
    start(command, folder.join("prometheus.log"))
}

fn start(mut command: Command, log: PathBuf) -> Server {
    let log = fs::File::create(log).expect("a file");
    let child = command
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    Server(child)
}

/// Waits until something holds. False where it does not within the limit.
pub fn comes(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if holds() {
            return true;
        }
        thread::sleep(Duration::from_millis(100));
    }
    holds()
}

/// A generation of Prometheus, with the rules that are rendered with overrides.
pub struct Generation {
    /// Its suite.
    pub suite: &'static str,
    /// Where its rules are, and what it keeps.
    pub folder: PathBuf,
    prometheus: PathBuf,
    alertmanager: PathBuf,
}

/// Prometheus and Alertmanager while they run.
pub struct Watch {
    /// What comes of them.
    pub told: Told,
    folder: PathBuf,
    _servers: [Server; 2],
}

impl Generation {
    /// Starts both. `targets` are jobs with the node and the address of each.
    pub fn watch(&self, targets: &[(&str, String, String)]) -> Watch {
        let (hook, told) = webhook();
        let (alerts, alerts_to) = alertmanager(&self.alertmanager, &self.folder, &hook);
        let prometheus = prometheus(&self.prometheus, &self.folder, targets, &alerts_to);
        Watch {
            told,
            folder: self.folder.clone(),
            _servers: [prometheus, alerts],
        }
    }
}

impl Watch {
    /// What both servers said.
    pub fn logs(&self) -> String {
        let log = |name: &str| fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        format!("{}\n{}", log("prometheus.log"), log("alertmanager.log"))
    }
}

/// Runs a test for each generation that can be had.
pub fn each_generation(overrides: &str, test: impl Fn(&Generation)) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("overrides.jsonnet");
    fs::write(&config, overrides).expect("written");
    let rendered = chandra_mixin::render::files(Some(&config)).expect("it renders");
    let Some(alertmanager) = program(ALERTMANAGER) else {
        return;
    };
    for package in PROMETHEUS {
        let Some(prometheus) = program(package) else {
            continue;
        };
        let folder = folder.path().join(package.0);
        chandra_mixin::write::write(&folder, &rendered).expect("written");
        test(&Generation {
            suite: package.0,
            folder,
            prometheus,
            alertmanager: alertmanager.clone(),
        });
    }
}
