// SPDX-License-Identifier: Apache-2.0
//! `chandra top` on pages that are made up: what it prints, byte for byte, and how it ends.
//!
//! `UPDATE_GOLDEN=1` rewrites the golden files. The screen needs tmux.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/screen.rs"]
mod screen;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use chandra::{
    server::{Limits, Site, bind, serve},
    top::{
        history::{History, PAIRS_FLOOR},
        json,
        node::Node,
        reading::Reading,
        table,
        words::{self, THRESHOLDS},
    },
    web::Web,
};
use chandra_mixin::jsonnet;
use screen::Tmux;
use tokio::{runtime::Runtime, sync::oneshot};

const BEFORE: &str = include_str!("top/before.prom");
const AFTER: &str = include_str!("top/after.prom");

/// What happened between the two pages, ten seconds apart; before, sessions came one after the other.
fn node() -> Node {
    let sessions = |n| BEFORE.replace("peer=\"5k+hllGO\"} 30", &format!("peer=\"5k+hllGO\"}} {n}"));
    node_of(&[BEFORE, &sessions(32), &sessions(33), AFTER])
}

/// What happened between the last two of these pages, each ten seconds after the one before.
fn node_of(pages: &[&str]) -> Node {
    let mut history = History::default();
    let mut at = Instant::now();
    for page in pages {
        history.push(Reading::of(page, at).unwrap());
        at += Duration::from_secs(10);
    }
    Node::of(&history).unwrap()
}

/// What is said to be wrong, by the alerts.
fn alerts(node: &Node) -> Vec<&str> {
    node.complaints.iter().map(|one| one.alert).collect()
}

#[test]
fn a_job_that_ends_and_a_rotation_of_keys_are_no_trouble() {
    let ended = AFTER
        .lines()
        .filter(|line| {
            !(line.starts_with("chandra_rdma_queue_pairs{") && line.contains("llama-worker-0"))
        })
        .map(|line| {
            match line.starts_with("chandra_rdma_queue_pairs_destroyed_total{")
                && line.contains("llama-worker-0")
            {
                true => line.replace("} 0", "} 16"),
                false => line.to_owned(),
            }
        });
    let ended = ended.collect::<Vec<_>>().join("\n");
    let node = node_of(&[BEFORE, &ended, &ended, &ended]);
    let of_job = node
        .pods
        .iter()
        .find(|row| row.owner.pod == "llama-worker-0");
    let rdma = of_job.unwrap().rdma.as_ref().unwrap();
    assert_eq!((rdma.queue_pairs, rdma.times_torn_down), (0.0, 1.0));
    // Five sessions at once.
    assert!(!alerts(&node).contains(&"EncryptionRekeyStorm"));
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "{name} is another now:\n{text}");
}

#[test]
fn the_table_is_stable() {
    golden("top.txt", &table::table(&node(), "http://127.0.0.1:9970"));
}

#[test]
fn the_json_is_stable() {
    golden("top.json", &(json(&node()).unwrap() + "\n"));
}

#[test]
fn an_exporter_that_began_anew_is_no_flood() {
    let node = node_of(&[AFTER, BEFORE]);
    for row in &node.pods {
        let tcp = row
            .tcp
            .as_ref()
            .map_or(0.0, |tcp| tcp.retransmits_per_second);
        assert!((0.0..=11.0).contains(&tcp), "{row:?}");
    }
}

#[test]
fn what_it_calls_wrong_is_what_alerts_call_so() {
    let config = format!("(import '{}/mixin.libsonnet')._config", jsonnet::ROOT);
    let tree = jsonnet::evaluate_some(None, &config).unwrap();
    let tree = &tree["files"];
    for threshold in THRESHOLDS {
        let alert = &tree[threshold.signal][threshold.alert];
        assert_eq!(alert["threshold"], threshold.value, "{threshold:?}");
    }
    let straggler = &tree["nccl"]["NcclStraggler"];
    assert_eq!(straggler["lastArrivals"], words::LAST_ARRIVALS);
    assert_eq!(tree["rdma"]["pairsFloor"], PAIRS_FLOOR);
}

/// An exporter with the two pages, in turn.
struct Fake {
    asked: AtomicUsize,
    pods: usize,
}

impl Site for Fake {
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        let at = self.asked.fetch_add(1, SeqCst);
        let mut page = if at == 0 { BEFORE } else { AFTER }.to_owned();
        for pod in 0..self.pods {
            page += &format!(
                "chandra_tcp_retransmits_total{{namespace=\"many\",pod=\"pod-{pod}\",container=\"main\",kind=\"rto\"}} {}\n",
                at * pod
            );
        }
        Ok(page.into_bytes())
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    fn landing(&self) -> String {
        String::new()
    }
}

struct Server {
    url: String,
    stop: Option<oneshot::Sender<()>>,
    runtime: Option<Runtime>,
}

impl Server {
    fn start(pods: usize, web: Web) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let site = Arc::new(Fake {
            asked: AtomicUsize::new(0),
            pods,
        });
        let stopped = async {
            let _ = stopped.await;
        };
        runtime.spawn(serve(
            listener,
            site,
            Arc::new(web),
            Limits::default(),
            stopped,
        ));
        Self {
            url,
            stop: Some(stop),
            runtime: Some(runtime),
        }
    }

    /// Nobody listens there any more.
    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn chandra() -> PathBuf {
    common::build().join("chandra")
}

fn top(arguments: &[&str]) -> Output {
    let mut command = Command::new(chandra());
    command.arg("top").args(arguments);
    command.output().unwrap()
}

/// What it says where it cannot work: one line, and the status.
fn refused(arguments: &[&str]) -> (String, Option<i32>) {
    let output = top(arguments);
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("chandra: "), "{said}");
    (said, output.status.code())
}

#[test]
fn without_a_terminal_it_is_once() {
    let server = Server::start(0, Web::default());
    let output = top(&["--url", &server.url, "--interval", "1s"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let first = text.lines().next().unwrap();
    assert!(
        first.starts_with(&format!("chandra 9.9.9, {}, over ", server.url)),
        "{first}"
    );
    assert!(text.contains("\nPOD "), "{text}");
    // Nothing that a terminal would act on, whatever containers are called.
    assert!(!text.contains('\x1b'), "{text:?}");

    let output = top(&["--url", &server.url, "--json", "--interval", "1s"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["version"], "9.9.9");
}

#[test]
fn who_does_not_answer_is_told_in_one_line() {
    let mut server = Server::start(0, Web::default());
    let url = server.url.clone();
    server.stop();
    let (said, status) = refused(&["--url", &url]);
    assert!(said.contains(&url) && said.contains("refused"), "{said}");
    assert_eq!(status, Some(1));

    for mistake in [
        &["--url", "9970"][..],
        &["--url", "ftp://host"],
        &["--url", "http://user:word@127.0.0.1:1"],
        &["--url", "https://127.0.0.1:1"],
        &["--url", "https://127.0.0.1:1", "--ca-file", "/nowhere"],
        &["--url", "http://127.0.0.1:1", "--user", "me"],
        &["--interval", "0s"],
    ] {
        let (said, status) = refused(mistake);
        assert_eq!(status, Some(2), "{said}");
    }
}

#[test]
fn what_is_no_exporter_is_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            "HTTP/1.1 503 Busy\r\ncontent-length: 9\r\n\r\nnot\nready",
            "\x15\x03\x01\x00\x02\x02\x46",
        ] {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let (said, _) = refused(&["--url", &url]);
    assert!(said.contains("no exporter of Chandra's"), "{said}");
    let (said, _) = refused(&["--url", &url]);
    assert!(said.contains("503") && said.contains(": not"), "{said}");
    let (said, _) = refused(&["--url", &url]);
    assert!(said.contains("https://"), "{said}");
}

#[test]
fn an_exporter_with_a_password_is_asked_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let hash = bcrypt::hash("secret", 4).unwrap();
    fs::write(
        path("web.yaml"),
        format!("basic_auth_users: {{ me: '{hash}' }}\n"),
    )
    .unwrap();
    fs::write(path("password"), "secret\n").unwrap();
    let web = Web::load(Path::new(&path("web.yaml"))).unwrap();
    let server = Server::start(0, web);
    let (said, _) = refused(&["--url", &server.url]);
    assert!(said.contains("--password-file"), "{said}");
    let (url, password) = (&*server.url, &*path("password"));
    let output = top(&[
        "--url",
        url,
        "--user",
        "me",
        "--password-file",
        password,
        "--interval",
        "1s",
    ]);
    assert!(output.status.success(), "{output:?}");
}

/// A terminal with `chandra top` in it, once it shows the second page.
fn on_screen(server: &Server) -> Option<Tmux> {
    let tmux = Tmux::start(80, 24)?;
    let command = format!(
        "{} top --url {} --interval 1s",
        chandra().display(),
        server.url
    );
    tmux.run(&command);
    tmux.until("the table", |screen| screen.contains("gateway"));
    Some(tmux)
}

#[test]
fn keys_sort_filter_and_open() {
    let server = Server::start(3, Web::default());
    let Some(tmux) = on_screen(&server) else {
        return;
    };
    let screen = tmux.until("complaints", |screen| screen.contains("queue pairs in ERR"));
    assert!(
        screen.lines().all(|line| line.chars().count() <= 80),
        "{screen}"
    );
    tmux.keys(&["/", "g", "a", "t", "e", "Enter"]);
    tmux.until("only the gateway", |screen| {
        screen.contains("inference/gateway") && !screen.contains("llama-worker-0 ")
    });
    tmux.keys(&["Escape"]);
    tmux.until("all again", |screen| {
        screen.contains("training/llama-worker-0")
    });
    tmux.keys(&["r"]);
    tmux.until("a pod's pairs", |screen| screen.contains("rdma of "));
    tmux.keys(&["?"]);
    tmux.until("the help", |screen| screen.contains("hold still"));
    tmux.keys(&["Escape", ">"]);
    tmux.until("sorted by retransmits", |screen| {
        let mut rows = screen.lines().skip_while(|line| !line.starts_with("POD"));
        rows.nth(1).is_some_and(|row| row.starts_with("many/pod-2"))
    });
    for (x, y) in [(200, 50), (30, 6), (1, 1), (80, 24)] {
        tmux.resize(x, y);
    }
    tmux.until("all of it again", |screen| {
        screen.contains("training/llama-worker-0")
    });
    tmux.nothing();
    tmux.resize(81, 24);
    tmux.until("after no room at all", |screen| {
        screen.contains("training/llama-worker-0")
    });
    tmux.keys(&["q"]);
    tmux.ended(0, "");
}

#[test]
fn an_exporter_that_stops_is_told_and_then_given_up() {
    let mut server = Server::start(0, Web::default());
    let Some(tmux) = on_screen(&server) else {
        return;
    };
    server.stop();
    tmux.until("that it does not answer", |screen| {
        screen.contains("NO ANSWER for")
    });
    tmux.ended(1, &format!("chandra: {} has not answered for ", server.url));
}

#[test]
fn signals_leave_the_terminal_as_it_was() {
    let server = Server::start(0, Web::default());
    for (signal, status) in [("TERM", 143), ("INT", 130)] {
        let Some(tmux) = on_screen(&server) else {
            return;
        };
        tmux.signal(signal);
        tmux.ended(status, &format!("chandra: top was ended by SIG{signal}"));
    }
    let Some(tmux) = on_screen(&server) else {
        return;
    };
    let pid = tmux.pid();
    drop(tmux);
    screen::until_gone(pid);
}

#[test]
fn it_stops_for_the_shell_and_goes_on() {
    let server = Server::start(0, Web::default());
    let Some(tmux) = on_screen(&server) else {
        return;
    };
    tmux.keys(&["C-z"]);
    tmux.until("the shell", |screen| {
        screen.contains("Stopped") && !screen.contains("POD")
    });
    tmux.line("fg");
    tmux.until("the table again", |screen| screen.contains("gateway"));
    tmux.keys(&["q"]);
    tmux.until("the shell again", |screen| screen.ends_with("ready:\n"));
    tmux.line("[ \"$before\" = \"$(stty -g)\" ] && echo the same");
    tmux.until("that the terminal is as it was", |screen| {
        screen.contains("\nthe same\n")
    });
}
