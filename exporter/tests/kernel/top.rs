// SPDX-License-Identifier: Apache-2.0
//! `chandra top` beside a live exporter: retransmits of one pod, queue pairs of others, in a terminal; and without an exporter.

use std::process::{Command, Stdio};

use super::{
    alone, can_lose_packets,
    common::*,
    rdma::{Cluster, Rxe, can_rdma},
    screen::Tmux,
};

/// A peer behind a link that loses every fifth packet, and who listens there.
struct Far(std::process::Child);

impl Far {
    fn new() -> Self {
        run("ip netns add chandra-far
             ip link add near type veth peer name far netns chandra-far
             ip addr add 10.79.9.1/24 dev near; ip link set near up
             ip -n chandra-far addr add 10.79.9.2/24 dev far; ip -n chandra-far link set far up
             tc qdisc add dev near root netem loss 20%");
        let traffic = build().join("examples/traffic");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", "chandra-far"]).arg(traffic);
        Self(
            command
                .args(["serve", "10.79.9.2:7000"])
                .spawn()
                .expect("ip"),
        )
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        succeeds("ip netns del chandra-far; ip link del near");
    }
}

/// The cells of a pod's row, by their headings.
fn cell(screen: &str, pod: &str, heading: &str) -> Option<String> {
    let mut lines = screen.lines().skip_while(|line| !line.starts_with("POD"));
    let headings: Vec<_> = lines.next()?.split_whitespace().collect();
    let row = lines.find(|line| line.starts_with(pod))?;
    let at = headings.iter().position(|word| *word == heading)?;
    // A number of pairs in ERR is a word more; here there is none.
    row.split_whitespace().nth(at).map(str::to_owned)
}

#[test]
fn a_terminal_shows_what_the_exporter_sees() {
    let _alone = alone();
    if !can_rdma() || !can_lose_packets() {
        return;
    }
    let Some(tmux) = Tmux::start(80, 24) else {
        return;
    };
    let _device = Rxe::new();
    let _far = Far::new();
    let cluster = Cluster::new(&["gateway", "worker-0", "worker-1"]);
    let mut exporter = cluster.exporter();
    let mut hold = cluster.hold("worker-0", "8");
    let traffic = build().join("examples/traffic");
    let work = format!(
        "while :; do {} send 10.79.9.2:7000 1; done",
        traffic.display()
    );
    let mut sends = cluster.spawn("gateway", &work);
    let top = build().join("chandra");
    let top = format!("{} top --url http://{}", top.display(), exporter.address);
    tmux.run(&top);
    for (columns, lines) in [(80, 24), (200, 50)] {
        tmux.resize(columns, lines);
        let shows = |screen: &str| {
            let sent_again = cell(screen, "training/gateway", "RETR/s");
            let sent_again = sent_again.and_then(|cell| cell.parse::<f64>().ok());
            let pairs = cell(screen, "training/worker-0", "QPs");
            sent_again.is_some_and(|rate| rate > 0.0)
                && pairs.as_deref() == Some("8")
                && screen.contains("rdma up")
        };
        let screen = tmux.until("retransmits and queue pairs", shows);
        println!("--- {columns} x {lines}\n{screen}---");
        assert!(
            screen
                .lines()
                .all(|line| line.chars().count() <= columns as usize)
        );
    }
    tmux.resize(80, 24);
    tmux.keys(&["/"]);
    tmux.line("worker-0");
    tmux.keys(&["r"]);
    let screen = tmux.until("pairs by state", |screen| {
        screen.contains("rdma of training/worker-0") && screen.contains("rxe0 ")
    });
    println!("--- r\n{screen}---");

    let once = run(&format!("{top} --json </dev/null"));
    let json: serde_json::Value = serde_json::from_str(&once).expect("JSON");
    let pods = json["pods"].as_array().expect("pods").iter();
    let worker = pods.clone().find(|pod| pod["pod"] == "worker-0");
    assert_eq!(
        worker.expect("a worker")["rdma"]["queue_pairs"],
        8.0,
        "{once}"
    );

    let (status, _) = exporter.stop("TERM");
    assert!(status.success(), "{status}");
    tmux.until("that it does not answer", |screen| {
        screen.contains("NO ANSWER for")
    });
    tmux.ended(1, "has not answered for ");
    drop(tmux);

    // Nobody listens on the default address: it attaches by itself, and leaves nothing.
    let here = format!(
        "{} top --once --interval 10s --pods none",
        build().join("chandra").display()
    );
    let shell = Command::new("sh")
        .args(["-c", &here])
        .stdin(Stdio::null())
        .output();
    let output = shell.expect("sh");
    let text = String::from_utf8_lossy(&output.stdout);
    println!("--- without an exporter\n{text}---");
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains(", attached here, over "), "{output:?}");
    assert!(
        text.contains("rdma up") && text.contains("tcp up"),
        "{text}"
    );
    for child in [&mut sends, &mut hold] {
        let _ = child.kill();
        let _ = child.wait();
    }
}
