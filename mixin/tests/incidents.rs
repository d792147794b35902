// SPDX-License-Identifier: Apache-2.0
//! Twelve incidents at once, one on each node: does the on-call get each one's alerts, with its node, its pod and its reason, and no
//! other?
//!
//! The pages of exporters, agents and Hubble are made up; Prometheus of both generations, the rendered rules and Alertmanager are real.
//! Windows and durations are shortened by `_config`, thresholds are the real ones. `make nightly` runs it.

mod common;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use common::alerts::{comes, each_generation, serve, text};

/// Every window and every `for`, in seconds that pass quickly: Prometheus scrapes and evaluates once a second.
const SHORT: &str = "
local windows = { '5m': '10s', '10m': '20s', '15m': '30s', '1h': '60s', '6h': '90s' };
local walk(config) = std.mapWithKey(
  function(key, value)
    if std.isObject(value) then walk(value)
    else if key == 'for' then '4s'
    else if std.endsWith(std.asciiLower(key), 'window') then windows[value]
    else value,
  config,
);
{ _config:: walk(super._config) }
";

/// How long all is well before: longer than any window that an alert below compares with.
const HEALTHY: Duration = Duration::from_secs(45);

/// How long after its cause an alert may come, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// How long it is listened for others once all have come.
const AFTER: Duration = Duration::from_secs(30);

/// When everything began, and when it goes wrong.
#[derive(Clone)]
struct Clock {
    begun: Instant,
    fault: Arc<OnceLock<Instant>>,
}

impl Clock {
    /// Seconds that all was well, and seconds that it has not been since. Neither ever falls, so no counter does.
    fn now(&self) -> (f64, f64) {
        match self.fault.get() {
            Some(at) => {
                let well = at.duration_since(self.begun);
                (well.as_secs_f64(), at.elapsed().as_secs_f64())
            }
            None => (self.begun.elapsed().as_secs_f64(), 0.0),
        }
    }
}

/// A page that is being written.
struct Page {
    well: f64,
    ill: f64,
    text: String,
}

impl Page {
    fn add(&mut self, series: &str, value: f64) {
        let _ = writeln!(self.text, "{series} {value}");
    }

    /// A counter that rises by so much a second, and by so much while its incident lasts. Not in whole steps: two that rise alike differ by
    /// one then, which in the first seconds is a large share.
    fn counter(&mut self, series: &str, well: f64, ill: f64) {
        self.add(series, well * self.well + ill * self.ill);
    }

    /// A histogram of a hundred observations a second up to a bound, and up to another while its incident lasts.
    fn histogram(&mut self, name: &str, labels: &str, bounds: [f64; 3], well: f64, ill: f64) {
        for bound in bounds {
            let [of_well, of_ill] =
                [well, ill].map(|up_to| if up_to <= bound { 100.0 } else { 0.0 });
            self.counter(
                &format!("{name}_bucket{{{labels},le=\"{bound}\"}}"),
                of_well,
                of_ill,
            );
        }
        self.counter(
            &format!("{name}_bucket{{{labels},le=\"+Inf\"}}"),
            100.0,
            100.0,
        );
    }
}

/// What a node has that is all right, and what of it is not where `incident` is its number. A number of a node is that of its incident.
fn exporter(node: usize, page: &mut Page) {
    let of = |incident: usize, ill: f64, well: f64| if node == incident { ill } else { well };
    let server = format!("namespace=\"serving\",pod=\"vllm-{node}\",container=\"main\"");
    let worker = format!("namespace=\"training\",pod=\"worker-{node}\",container=\"main\"");
    page.add("chandra_build_info{version=\"0.1.0\"}", 1.0);
    for signal in ["encryption", "gpu", "nccl", "rdma", "tcp"] {
        let fails = node == 12 && signal == "rdma" && page.ill > 0.0;
        for (state, holds) in [("up", !fails), ("failed", fails)] {
            let series = format!("chandra_signal_state{{signal=\"{signal}\",state=\"{state}\"}}");
            page.add(&series, f64::from(u8::from(holds)));
        }
        for (result, rate) in [("pod", 40.0), ("host", 8.0), ("unknown", 1.0)] {
            let series =
                format!("chandra_attribution_total{{signal=\"{signal}\",result=\"{result}\"}}");
            page.counter(&series, rate, rate);
        }
        page.counter(
            &format!("chandra_lost_events_total{{signal=\"{signal}\",reason=\"map_full\"}}"),
            0.1,
            0.1,
        );
        page.add(&format!("chandra_series{{signal=\"{signal}\"}}"), 300.0);
    }
    if node == 12 && page.ill > 0.0 {
        page.add(
            "chandra_hook_info{signal=\"rdma\",hook=\"ib_create_qp_user\",reason=\"no_function\"}",
            1.0,
        );
    }
    page.add("chandra_pods_age_seconds", 2.0);

    for pod in [&server, &worker] {
        let lossy = if *pod == server {
            of(4, 40.0, 0.5)
        } else {
            0.5
        };
        page.counter(
            &format!("chandra_tcp_retransmits_total{{{pod},kind=\"fast\"}}"),
            0.5,
            lossy,
        );
    }

    // A worker of eight queue pairs that dies each two seconds.
    page.add(
        "chandra_rdma_enumeration_age_seconds{device=\"mlx5_0\"}",
        3.0,
    );
    let dies = of(5, 4.0, 0.0);
    page.counter(
        &format!("chandra_rdma_queue_pairs_destroyed_total{{{worker}}}"),
        0.0,
        dies,
    );
    for event in ["created", "destroyed"] {
        page.counter(
            &format!("chandra_rdma_device_queue_pairs_{event}_total{{device=\"mlx5_0\"}}"),
            0.0,
            dies,
        );
    }
    for (state, pairs) in [
        ("RTS", 8.0),
        ("ERR", if page.ill > 0.0 { of(6, 3.0, 0.0) } else { 0.0 }),
    ] {
        let series = format!(
            "chandra_rdma_queue_pairs{{{worker},device=\"mlx5_0\",type=\"RC\",state=\"{state}\"}}"
        );
        page.add(&series, pairs);
    }

    page.add(
        &format!("chandra_gpu_processes{{{worker},driver=\"nvidia\",gpu=\"0\"}}"),
        1.0,
    );
    let waits = [0.032768, 0.065536, 0.131072];
    page.histogram(
        "chandra_gpu_runqueue_delay_seconds",
        &worker,
        waits,
        0.032768,
        of(7, 0.131072, 0.032768),
    );
    page.counter(
        &format!("chandra_gpu_runqueue_delay_seconds_sum{{{worker}}}"),
        0.1,
        of(7, 9.0, 0.1),
    );

    // Four ranks take turns in being the last; one is it for good, by 3 ms. Of another node's job one stops.
    let stands_still = node == 9 && page.ill > 0.0;
    let pace = of(9, 0.0, 50.0);
    for rank in 0..4 {
        let labels = format!(
            "{worker},communicator=\"00000000000000{node:02}\",rank=\"{rank}\",source=\"host\""
        );
        let (last, waited) = match (node == 8, rank == 3) {
            (false, _) => (pace / 4.0, pace * 0.0002),
            (true, true) => (49.0, 0.0),
            (true, false) => (0.25, 50.0 * 0.003),
        };
        page.counter(
            &format!("chandra_nccl_rank_collectives_total{{{labels}}}"),
            50.0,
            pace,
        );
        page.counter(
            &format!("chandra_nccl_rank_last_arrivals_total{{{labels}}}"),
            12.5,
            last,
        );
        page.counter(
            &format!("chandra_nccl_rank_wait_seconds_total{{{labels}}}"),
            0.01,
            waited,
        );
    }
    let pending = if stands_still { page.ill } else { 0.02 };
    page.add(
        &format!("chandra_nccl_oldest_pending_seconds{{{worker}}}"),
        pending,
    );
    if stands_still && pending > 10.0 {
        let communicator = format!("communicator=\"00000000000000{node:02}\"");
        page.add(
            &format!("chandra_nccl_communicator_pending_seconds{{{worker},{communicator}}}"),
            pending,
        );
        let missing = format!("{worker},{communicator},rank=\"2\",state=\"stopped\"");
        page.add(
            &format!("chandra_nccl_missing_rank_seconds{{{missing}}}"),
            pending,
        );
    }

    // A session with each peer in two minutes, and with one of them each second.
    for peer in 0..3 {
        let labels =
            format!("protocol=\"wireguard\",interface=\"cilium_wg0\",peer=\"peer-{peer}\"");
        let rate = if peer == 0 {
            of(10, 1.0, 1.0 / 120.0)
        } else {
            1.0 / 120.0
        };
        page.counter(
            &format!("chandra_encryption_peer_sessions_total{{{labels}}}"),
            1.0 / 120.0,
            rate,
        );
    }
    for (pod, busy) in [(&server, of(11, 1.6, 0.2)), (&worker, 0.2)] {
        let labels = format!("{pod},protocol=\"wireguard\",direction=\"encrypt\"");
        page.counter(
            &format!("chandra_encryption_cpu_seconds_total{{{labels}}}"),
            0.2,
            busy,
        );
        page.counter(
            &format!("chandra_encryption_bytes_total{{{labels}}}"),
            2e8,
            2e8,
        );
        page.counter(
            &format!("chandra_encryption_packets_total{{{labels}}}"),
            2e5,
            2e5,
        );
    }
}

/// Hubble on a node, as helm-values/cilium.yaml has it.
fn hubble(node: usize, page: &mut Page) {
    let of = |incident: usize, ill: f64, well: f64| if node == incident { ill } else { well };
    for (reason, direction, source, destination, well, ill) in [
        (
            "POLICY_DENIED",
            "egress",
            "serving",
            "",
            0.0,
            of(1, 4.0, 0.0),
        ),
        ("POLICY_DENIED", "ingress", "", "web", 0.5, 0.5),
        (
            "UNSUPPORTED_L3_PROTOCOL",
            "ingress",
            "",
            "serving",
            1.0,
            1.0,
        ),
    ] {
        page.counter(
            &format!("hubble_drop_total{{reason=\"{reason}\",traffic_direction=\"{direction}\",source_namespace=\"{source}\",destination_namespace=\"{destination}\"}}"),
            well,
            ill,
        );
    }
    for kind in ["Trace", "PolicyVerdict"] {
        page.counter(
            &format!(
                "hubble_flows_processed_total{{type=\"{kind}\",source_namespace=\"serving\"}}"
            ),
            200.0,
            200.0,
        );
    }
    // A search domain has three names that do not exist for the one that does.
    let namespace = format!("team-{node}");
    page.counter(
        &format!("hubble_dns_queries_total{{rcode=\"\",source_namespace=\"{namespace}\"}}"),
        8.0,
        8.0,
    );
    for (rcode, rate) in [("Non-Existent Domain", 6.0), ("No Error", 2.0)] {
        let labels = format!("rcode=\"{rcode}\",destination_namespace=\"{namespace}\"");
        page.counter(
            &format!("hubble_dns_responses_total{{{labels}}}"),
            rate,
            of(3, rate / 4.0, rate),
        );
    }
}

/// The Cilium agent of a node.
fn agent(node: usize, page: &mut Page) {
    let of = |incident: usize, ill: f64, well: f64| if node == incident { ill } else { well };
    page.add("cilium_version{version=\"1.19.6\"}", 1.0);
    page.counter(
        "cilium_forward_count_total{direction=\"EGRESS\"}",
        2000.0,
        2000.0,
    );
    page.counter(
        "cilium_drop_count_total{reason=\"CT: Map insertion failed\",direction=\"EGRESS\"}",
        0.0,
        of(2, 40.0, 0.0),
    );
    page.add(
        "cilium_bpf_map_pressure{map_name=\"cilium_ct4_global\"}",
        0.55,
    );
}

/// The alerts that have to come: the labels by which the on-call finds what it is about, and what the text has to say.
fn expected() -> BTreeMap<String, &'static str> {
    let alerts = [
        // Drops have a namespace and no node.
        (
            "HubbleDropsHigh namespace=serving",
            "by reason: POLICY_DENIED ",
        ),
        ("HubbleConntrackFull node=node-2", "cilium_ct4_global 55%"),
        (
            "HubbleDnsUnanswered namespace=team-3",
            "of the DNS queries of namespace team-3 get no response",
        ),
        (
            "TcpRetransmitsHigh namespace=serving node=node-4 pod=vllm-4",
            "by kind: fast ",
        ),
        (
            "RdmaQueuePairSpike container=main namespace=training node=node-5 pod=worker-5",
            "training/worker-5 ",
        ),
        (
            "RdmaQueuePairChurn container=main namespace=training node=node-5 pod=worker-5",
            "training/worker-5 ",
        ),
        (
            "RdmaQueuePairErrors namespace=training node=node-6 pod=worker-6",
            "does not close: 3.",
        ),
        (
            "GpuRunqueueDelayHigh namespace=training node=node-7 pod=worker-7",
            "on this node: training/worker-7 ",
        ),
        (
            "NcclStraggler namespace=training node=node-8 pod=worker-8 rank=3",
            "rank 3 is the last in 98",
        ),
        (
            "NcclCollectiveStuck namespace=training node=node-9 pod=worker-9",
            "Missing: training/worker-9 rank 2 (stopped).",
        ),
        (
            "EncryptionRekeyStorm interface=cilium_wg0 node=node-10 protocol=wireguard",
            "serving/vllm-10 ",
        ),
        (
            "EncryptionCpuHigh namespace=serving node=node-11 pod=vllm-11",
            "on this node: serving/vllm-11 ",
        ),
        (
            "ChandraSignalDown node=node-12 signal=rdma",
            "no_function 1",
        ),
    ];
    alerts
        .into_iter()
        .map(|(name, says)| (name.to_owned(), says))
        .collect()
}

#[test]
#[ignore = "minutes: make nightly runs it"]
fn twelve_incidents_at_once_are_told_each_and_nothing_else() {
    each_generation(SHORT, |generation| {
        let clock = Clock {
            begun: Instant::now(),
            fault: Arc::default(),
        };
        let mut targets = Vec::new();
        for (job, write) in [
            ("chandra", exporter as fn(usize, &mut Page)),
            ("cilium-agent", agent),
            ("hubble-metrics", hubble),
        ] {
            for node in 1..=12 {
                let clock = clock.clone();
                let address = serve(move |_| {
                    let (well, ill) = clock.now();
                    let mut page = Page {
                        well,
                        ill,
                        text: String::new(),
                    };
                    write(node, &mut page);
                    page.text
                });
                targets.push((job, format!("node-{node}"), address));
            }
        }
        let watch = generation.watch(&targets);
        let came = || -> BTreeMap<String, (Instant, String)> {
            let alerts = watch.told.alerts().into_iter().map(|(at, alert)| {
                let labels = alert["labels"].as_object().expect("labels");
                let mut name = text(&labels["alertname"]).to_owned();
                for (label, value) in labels {
                    if !["alertname", "severity"].contains(&&**label) {
                        let _ = write!(name, " {label}={}", text(value));
                    }
                }
                (
                    name,
                    (at, text(&alert["annotations"]["description"]).to_owned()),
                )
            });
            alerts.collect()
        };

        thread::sleep(HEALTHY);
        let early = came();
        assert!(
            early.is_empty(),
            "while all is well: {early:#?}\n{}",
            watch.logs()
        );

        let cause = Instant::now();
        clock.fault.set(cause).expect("once");
        let expected = expected();
        comes(LIMIT, || {
            let came = came();
            expected.keys().all(|name| came.contains_key(name))
        });
        // What else would come, comes after them.
        thread::sleep(AFTER);
        let came = came();
        for (name, (at, description)) in &came {
            println!(
                "{}: {name} after {:.0?}: {description}",
                generation.suite,
                at.duration_since(cause)
            );
        }
        let names = |of: Vec<&String>| of.into_iter().cloned().collect::<Vec<_>>().join("\n");
        assert_eq!(
            names(came.keys().collect()),
            names(expected.keys().collect()),
            "{}",
            watch.logs()
        );
        for (name, says) in &expected {
            let (_, description) = &came[name];
            assert!(description.contains(says), "{name}: {description}");
        }
    });
}
