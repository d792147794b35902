// SPDX-License-Identifier: Apache-2.0
//! From the kernel to the on-call: a pod's connections go unanswered, Cilium drops a namespace's packets; Prometheus
//! scrapes the real exporter and a Hubble page, evaluates the rendered rules, and Alertmanager calls a webhook.
//!
//! Rates and durations are shortened, through `_config` alone. The exporter's part needs root, BTF and veth.

mod common;
#[path = "../../mixin/tests/common/mod.rs"]
mod packages;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use common::{Exporter, Pod, build, cgroup_root, run, skip, succeeds, write_pods};
use packages::alerts::{Server, comes, each_generation, serve, text};
use serde_json::Value;

/// How long after its cause an alert may reach the webhook, on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

/// Scrapes of Prometheus in which a false alert would have fired: each is a second, as each evaluation of the rules is.
const HEALTHY: usize = 15;

const OVERRIDES: &str = "{
  _config+:: {
    window: '10s',
    tcp+: { TcpRetransmitsHigh+: { 'for': '3s' } },
    hubble+: { HubbleDropsHigh+: { 'for': '3s' } },
  },
}";

/// Hubble's page, as helm-values/cilium.yaml has it: one namespace is denied packets once the fault is on.
/// Counts how often it is scraped.
fn hubble(fault: Arc<AtomicBool>, scrapes: Arc<AtomicUsize>) -> String {
    let started = Instant::now();
    let denied = Mutex::new(0);
    serve(move |_| {
        scrapes.fetch_add(1, Ordering::Relaxed);
        let flows = started.elapsed().as_millis();
        let mut denied = denied.lock().expect("no panic");
        if fault.load(Ordering::Relaxed) {
            *denied += 7;
        }
        let mut page = String::new();
        for (reason, namespace, value) in [
            ("POLICY_DENIED", "inference", *denied),
            ("POLICY_DENIED", "batch", flows / 100),
            ("UNSUPPORTED_L3_PROTOCOL", "inference", flows / 100),
        ] {
            let _ = writeln!(
                page,
                "hubble_drop_total{{reason=\"{reason}\",protocol=\"TCP\",source_namespace=\"{namespace}\",\
                 destination_namespace=\"\",traffic_direction=\"egress\"}} {value}"
            );
        }
        let _ = writeln!(
            page,
            "hubble_flows_processed_total{{protocol=\"TCP\",type=\"Trace\",subtype=\"to-endpoint\",verdict=\"FORWARDED\"}} {flows}"
        );
        page
    })
}

/// A pod with a network in which nobody answers.
struct Victim {
    pod: Pod,
    cgroup: String,
}

const NETNS: &str = "chandra-alerting";

impl Victim {
    fn new() -> Option<Self> {
        let kernel = chandra::kernel::Kernel::read();
        if !kernel.may_trace() || kernel.btf.is_err() {
            skip("TcpRetransmitsHigh needs root and a kernel with BTF");
            return None;
        }
        let pod = Pod::new("inference", "vllm-0", 0xa1e7);
        let cgroup = format!("{}/{}", cgroup_root().display(), pod.cgroup(0));
        let victim = Self { pod, cgroup };
        victim.sweep();
        let made = succeeds(&format!(
            "modprobe -qa veth 2>/dev/null; ip netns add {NETNS} && ip -n {NETNS} -b - <<E
link add c type veth peer name p
link set c up
link set p up
addr add 10.79.0.1/16 dev c
neigh add 10.79.0.9 lladdr 02:00:00:00:00:09 dev c nud permanent
E"
        ));
        if !made {
            skip("TcpRetransmitsHigh needs veth");
            return None;
        }
        run(&format!("mkdir -p {}", victim.cgroup));
        Some(victim)
    }

    /// Opens connections that nobody answers: each sends its SYN again and again.
    fn suffer(&self) -> Server {
        let traffic = build().join("examples/traffic");
        let shell = format!(
            "echo $$ >{}/cgroup.procs; exec ip netns exec {NETNS} {} knock 10.79.0.9:81 600 60",
            self.cgroup,
            traffic.display()
        );
        Server(
            Command::new("sh")
                .args(["-ec", &shell])
                .spawn()
                .expect("sh"),
        )
    }

    fn sweep(&self) {
        succeeds(&format!(
            "ip netns del {NETNS}; for i in $(seq 50); do [ -d {0} ] || break; rmdir {0} || sleep 0.1; done
             rmdir -p {0}/..",
            self.cgroup
        ));
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.sweep();
    }
}

#[test]
fn an_incident_reaches_the_webhook_with_the_pod_in_its_labels() {
    each_generation(OVERRIDES, |generation| {
        let victim = Victim::new();
        let pods = generation.folder.join("pods.json");
        let listed: Vec<_> = victim.iter().map(|victim| victim.pod.clone()).collect();
        write_pods(&pods, &listed);
        let exporter = Exporter::start(&["--pods", &pods.display().to_string()]);
        let fault = Arc::new(AtomicBool::new(false));
        let scrapes = Arc::new(AtomicUsize::new(0));
        let hubble = hubble(fault.clone(), scrapes.clone());
        let scraped = |times: usize| {
            let until = scrapes.load(Ordering::Relaxed) + times;
            let enough = || scrapes.load(Ordering::Relaxed) >= until;
            assert!(comes(2 * LIMIT, enough), "Prometheus does not scrape");
        };
        let targets = [
            ("chandra", "gpu-1".to_owned(), exporter.address.clone()),
            ("hubble-metrics", "gpu-1".to_owned(), hubble),
        ];
        let watch = generation.watch(&targets);
        let by_name = || -> BTreeMap<String, (Instant, Value)> {
            let alerts = watch.told.alerts().into_iter().map(|(at, alert)| {
                let labels = &alert["labels"];
                let name = format!("{} {}", text(&labels["alertname"]), text(&labels["pod"]));
                (name.trim().to_owned(), (at, alert))
            });
            alerts.collect()
        };

        // Healthy: drops of other namespaces and harmless ones, a pod that is quiet.
        scraped(HEALTHY);
        let early: Vec<_> = by_name().into_keys().collect();
        assert!(
            early.is_empty(),
            "{early:?} while all is well\n{}",
            watch.logs()
        );

        let mut expected = vec!["HubbleDropsHigh"];
        let cause = Instant::now();
        fault.store(true, Ordering::Relaxed);
        let _work = victim.as_ref().map(|victim| {
            expected.push("TcpRetransmitsHigh vllm-0");
            victim.suffer()
        });
        comes(LIMIT, || {
            let told = by_name();
            expected.iter().all(|name| told.contains_key(*name))
        });
        // What else would come, comes with them.
        scraped(3);
        let told = by_name();
        let names: Vec<_> = told.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            expected,
            "{}\n{}",
            exporter.get("/metrics"),
            watch.logs()
        );
        for (name, (at, alert)) in &told {
            let after = at.duration_since(cause);
            println!(
                "{}: {name} after {after:.1?}: {}",
                generation.suite,
                text(&alert["annotations"]["description"])
            );
            assert!(after < LIMIT);
            let labels = &alert["labels"];
            assert_eq!(text(&labels["namespace"]), "inference", "{alert}");
            assert_eq!(text(&labels["severity"]), "warning", "{alert}");
            let annotations = &alert["annotations"];
            let runbook = text(&annotations["runbook_url"]);
            let anchor = format!("#{}", text(&labels["alertname"]).to_lowercase());
            assert!(
                runbook.starts_with("docs/runbooks/") && runbook.ends_with(&anchor),
                "{alert}"
            );
            if name.starts_with("Tcp") {
                assert_eq!(
                    (text(&labels["pod"]), text(&labels["node"])),
                    ("vllm-0", "gpu-1"),
                    "{alert}"
                );
                assert!(
                    text(&annotations["description"])
                        .contains("Pod inference/vllm-0 on node gpu-1 "),
                    "{alert}"
                );
                assert!(
                    text(&annotations["description"]).contains(" syn "),
                    "{alert}"
                );
            } else {
                assert!(
                    text(&annotations["description"]).contains("by reason: POLICY_DENIED "),
                    "{alert}"
                );
            }
        }
    });
}
