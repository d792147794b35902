// SPDX-License-Identifier: Apache-2.0
//! What do values of the Cilium chart do to Hubble's metrics, to those who scrape them, and to encrypted packets? All of it
//! renders, and is accepted.

use std::{collections::BTreeMap, time::Duration};

use promql_parser::util::parse_duration;
use serde_json::{Value, json};

use super::{At, Found, Linter, Severity, nearest, what};
use crate::{
    cilium::{
        self, CONFLICTS, CONTENT, CONTEXT_LABELS, METRIC_NAMES, METRICS, Metric, as_dynamic,
        as_static,
    },
    yaml::{Kind, Node, join, joined, split},
};

/// Monitors of what runs on every node: each of them is one more scrape of each node.
const PER_NODE: [&str; 3] = [
    "prometheus.serviceMonitor",
    "hubble.metrics.serviceMonitor",
    "envoy.prometheus.serviceMonitor",
];

/// The chart's own interval, and what rules need at most: four scrapes in a window of 5 minutes leave room for 75 s.
const SHORT_INTERVAL: Duration = Duration::from_secs(15);

/// Seconds: how long the old IPsec key has to live at least, since agents take up to a minute each to follow. The chart's default.
const KEY_ROTATION: f64 = 300.0;

/// What a list of Hubble's metrics brings, by metric.
fn series(metric: &str) -> &str {
    match metric {
        "drop" => "hubble_drop_total",
        "flow" => "hubble_flows_processed_total",
        "dns" => "hubble_dns_*",
        "policy" => "hubble_policy_verdicts_total",
        "port-distribution" => "hubble_port_distribution_total",
        other => other,
    }
}

impl<'a> Linter<'a> {
    /// All files together.
    pub(super) fn cilium(&mut self) {
        self.switches();
        self.needed_metrics();
        self.monitors();
        self.restart();
        if self.is_true("encryption.enabled") {
            self.encryption();
        }
    }

    /// The entries of hubble.metrics.enabled, and of hubble.metrics.dynamic.config.content, in one file.
    pub(super) fn metrics(&mut self, file: usize) {
        for path in [METRICS, CONTENT] {
            let keys = split(path);
            let document = &self.documents[file];
            if let (depth, Some(field)) = document.place(&keys)
                && depth == keys.len()
                && let Kind::List { items, .. } = &document.resolve(field.value).kind
            {
                self.entries(file, path, items);
            }
        }
    }

    fn entries(&mut self, file: usize, path: &'static str, items: &'a [Node]) {
        let document = &self.documents[file];
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for item in items {
            let at = At {
                file,
                node: Some(item),
            };
            let value = document.value_at(item).unwrap_or_default();
            let is = what(&document.resolve(item).kind);
            let text = match (path, &value) {
                (METRICS, Value::String(text)) => text.clone(),
                (CONTENT, Value::Object(map)) if map.get("name").is_some_and(Value::is_string) => {
                    as_static(&value)
                }
                (METRICS, _) => {
                    let message =
                        format!("an entry is {is}, and Hubble reads text: it has no such metric");
                    let fix = match value["name"].is_string() {
                        true => format!("write {}", as_static(&value)),
                        false => "write text, as in drop:sourceContext=pod".to_owned(),
                    };
                    self.say(at, Severity::Error, path, message, fix);
                    continue;
                }
                _ => {
                    let message = format!(
                        "an entry is {is}, and Hubble reads a map with a name: it has no such metric"
                    );
                    let fix = match value.as_str() {
                        Some(text) => format!("write {}", as_dynamic(text)),
                        None => "write a map, as in {name: drop}".to_owned(),
                    };
                    self.say(at, Severity::Error, path, message, fix);
                    continue;
                }
            };
            let metric = Metric::parse(&text);
            if path == METRICS && text.contains(char::is_whitespace) {
                let message = format!("{text:?} has a space, which ends an entry");
                let fix = format!("write {}", text.split_whitespace().collect::<String>());
                self.say(at, Severity::Error, path, message, fix);
            }
            self.known(
                at,
                path,
                metric.name,
                &METRIC_NAMES,
                "Hubble knows no metric",
            );
            if let Some(first) = seen.insert(metric.name.to_owned(), item.line) {
                let message = format!(
                    "{} stands in line {first} too: Hubble registers it twice, and the agent stops",
                    metric.name
                );
                let fix = "unite their options in one entry";
                self.say(at, Severity::Error, path, message, fix);
            }
            for (name, other) in CONFLICTS {
                if metric.name == name && seen.contains_key(other)
                    || metric.name == other && seen.contains_key(name)
                {
                    let message =
                        format!("{name} and {other} exclude each other: Hubble exports no metrics");
                    let fix = format!("write {other} alone");
                    self.say(at, Severity::Error, path, message, fix);
                }
            }
            let labels = metric.option("labelsContext").into_iter();
            for label in labels.flat_map(|option| &option.values) {
                self.known(at, path, label, &CONTEXT_LABELS, "labelsContext knows no");
            }
        }
    }

    fn known(&mut self, at: At<'_>, path: &str, word: &str, words: &[&str], message: &str) {
        if words.contains(&word) {
            return;
        }
        let (severity, fix) = match nearest(word, words.iter().copied()) {
            Some(near) => (Severity::Error, format!("did you mean {near}?")),
            None => (Severity::Warning, format!("write {}", words.join(", "))),
        };
        self.say(at, severity, path, format!("{message} {word}"), fix);
    }

    /// What Chandra has on and the files have not.
    fn switches(&mut self) {
        let hubble = self.is_true("hubble.enabled");
        let agent = self.is_true("prometheus.enabled");
        let mut wanted = Vec::new();
        leaves(self.rules.ours, "", &mut wanted);
        for (path, _) in wanted
            .iter()
            .filter(|(_, value)| **value == Value::Bool(true))
        {
            let pointless = path.starts_with("hubble.") && path != "hubble.enabled" && !hubble
                || path.starts_with("prometheus.") && path != "prometheus.enabled" && !agent
                || path.ends_with(".trustCRDsExist")
                    && !self.is_true("prometheus.serviceMonitor.enabled");
            if pointless || self.is_true(path) {
                continue;
            }
            let severity = match path.as_str() {
                "hubble.enabled" | "prometheus.enabled" | "bpf.events.drop.enabled" => {
                    Severity::Warning
                }
                _ => Severity::Info,
            };
            let found = self.effective(path);
            let message = format!("{}: {}", found.says(), cilium::consequence(path));
            self.say(
                found.at(),
                severity,
                path,
                message,
                format!("write {path}: true"),
            );
        }
    }

    /// Metrics, and labels of metrics, that rules and panels read.
    fn needed_metrics(&mut self) {
        let hubble = self.is_true("hubble.enabled");
        let dynamic = self.is_true("hubble.metrics.dynamic.enabled");
        let found = self.effective(METRICS);
        let is_static = found
            .value
            .as_array()
            .is_some_and(|entries| !entries.is_empty());
        if dynamic && is_static {
            self.say(
                found.at(),
                Severity::Error,
                METRICS,
                "is set together with hubble.metrics.dynamic.enabled: the agent refuses to start with both",
                format!("write {METRICS}: null, and its entries into {CONTENT}"),
            );
        }
        if !hubble {
            return;
        }
        let path = if dynamic { CONTENT } else { METRICS };
        let found = self.effective(path);
        let entries = found.value.as_array().cloned().unwrap_or_default();
        let list: Vec<String> = match dynamic {
            true => entries.iter().map(as_static).collect(),
            false => entries
                .iter()
                .filter_map(|entry| entry.as_str().map(str::to_owned))
                .collect(),
        };
        if dynamic && !self.is_true("hubble.metrics.dynamic.config.createConfigMap") {
            return self.say(
                found.at(),
                Severity::Info,
                path,
                "is not used, since createConfigMap is false: whether rules find their metrics stands in a ConfigMap of your own",
                "see there for those that chandra-mixin merge prints",
            );
        }
        let written = |entry: &str| match dynamic {
            true => as_dynamic(entry),
            false => entry.to_owned(),
        };
        let ours = &self.rules.ours["hubble"]["metrics"]["enabled"];
        let ours = ours.as_array().into_iter().flatten();
        for entry in ours.filter_map(Value::as_str) {
            if let Some((message, fix)) = lacking(entry, &list) {
                let fix = format!("write {}", written(&fix));
                self.say(found.at(), Severity::Warning, path, message, fix);
            }
        }
        self.verdicts(&list);
    }

    /// Whether the metric of policy verdicts, if it is asked for, can count.
    fn verdicts(&mut self, list: &[String]) {
        let verdicts = "bpf.events.policyVerdict.enabled";
        if list.iter().any(|own| Metric::parse(own).name == "policy") && !self.is_true(verdicts) {
            let found = self.effective(verdicts);
            self.say(
                found.at(),
                Severity::Info,
                verdicts,
                format!("{}: {} stays 0", found.says(), series("policy")),
                format!("write {verdicts}: true, or take policy out of {METRICS}"),
            );
        }
    }

    /// How often, and by whose operator, the chart's monitors are followed.
    fn monitors(&mut self) {
        let mut labels: Vec<(String, Found<'a>)> = Vec::new();
        for path in self.rules.keys.paths_to("serviceMonitor") {
            let path = joined(&path);
            let parent = path.trim_end_matches(".serviceMonitor");
            let source = match parent {
                "hubble.metrics" => "hubble.enabled".to_owned(),
                parent => format!("{parent}.enabled"),
            };
            if !self.is_true(&format!("{path}.enabled")) || !self.is_true(&source) {
                continue;
            }
            self.interval(&path);
            labels.push((path.clone(), self.effective(&format!("{path}.labels"))));
        }
        let written = labels
            .iter()
            .find_map(|(_, found)| found.value["release"].as_str());
        let release = self.rules.release.or(written).map(str::to_owned);
        for (path, found) in labels {
            let path = format!("{path}.labels");
            let is = found.value["release"].as_str();
            let nothing = found.value.as_object().is_none_or(|map| map.is_empty());
            let yours = release.as_deref();
            let message = match (is, yours) {
                (Some(is), Some(yours)) if is != yours => {
                    let whose = match self.rules.release {
                        Some(_) => format!("your operator's release is {yours}"),
                        None => format!("another monitor's is {yours}"),
                    };
                    format!("release is {is}, and {whose}: a Prometheus selects one of them")
                }
                (None, Some(yours)) if nothing || self.rules.release.is_some() => {
                    format!("has no release: a Prometheus that selects release: {yours} does not find it")
                }
                (None, None) if nothing => {
                    "is empty: the Prometheus of kube-prometheus-stack selects monitors by the label release".to_owned()
                }
                _ => continue,
            };
            let severity = match is {
                Some(_) => Severity::Warning,
                None => Severity::Info,
            };
            let yours = yours.unwrap_or("NAME_OF_ITS_HELM_RELEASE");
            self.say(
                found.at(),
                severity,
                &path,
                message,
                format!("write {path}.release: {yours}"),
            );
        }
    }

    fn interval(&mut self, monitor: &str) {
        let path = format!("{monitor}.interval");
        let found = self.effective(&path);
        let interval = found
            .value
            .as_str()
            .and_then(|text| parse_duration(text).ok());
        let Some(interval) = interval.filter(|interval| !interval.is_zero()) else {
            return;
        };
        if !PER_NODE.contains(&monitor) || interval >= SHORT_INTERVAL {
            return;
        }
        let message = format!(
            "{}: 1000 nodes are {:.0} scrapes a second, of series for each pair of namespaces and each pod",
            found.says(),
            1000.0 / interval.as_secs_f64()
        );
        let fix = format!("write {path}: 30s, which is enough for every rule");
        self.say(found.at(), Severity::Info, &path, message, fix);
    }

    /// A ConfigMap that changes restarts nothing.
    fn restart(&mut self) {
        let path = "rollOutCiliumPods";
        let touched = ["hubble", "prometheus", "bpf", "encryption"];
        let touched = touched.iter().any(|key| self.all.get(key).is_some());
        if !touched || self.is_true(path) {
            return;
        }
        let found = self.effective(path);
        self.say(
            found.at(),
            Severity::Info,
            path,
            format!(
                "{}: agents keep the metrics and settings that they have until they are restarted",
                found.says()
            ),
            "after the upgrade run kubectl -n kube-system rollout restart daemonset/cilium, or write rollOutCiliumPods: true",
        );
    }

    /// Settings by which a packet is wrapped or encrypted more often than it needs, or a session begins anew.
    ///
    /// Documentation/security/network/encryption-{wireguard,ipsec}.rst and operations/upgrade.rst of Cilium 1.19 and 1.20.
    fn encryption(&mut self) {
        let kind = self.effective("encryption.type").value;
        let wireguard = kind == json!("wireguard");
        let ipsec = kind == json!("ipsec");
        let chained = match self.effective("cni.chainingMode").value {
            Value::String(mode) => !mode.is_empty() && mode != "none",
            _ => false,
        };
        let routed = self.is_true("gke.enabled");
        self.check([
            Setting {
                path: "routingMode",
                severity: Severity::Warning,
                bad: &|value| (wireguard || ipsec) && !routed && value != "native",
                message: "each packet is wrapped into VXLAN or Geneve and then encrypted, which costs its headers and a second pass through the stack on both nodes",
                fix: "write routingMode: native with ipv4NativeRoutingCIDR (and autoDirectNodeRoutes: true where all nodes share an L2 network)",
            },
            Setting {
                path: "encryption.nodeEncryption",
                severity: Severity::Warning,
                bad: &|value| wireguard && *value == json!(true),
                message: "traffic between nodes is encrypted too: NCCL in the host's network, storage, and a request once more on the hop to its backend's node",
                fix: "write encryption.nodeEncryption: false where that traffic has TLS of its own",
            },
            Setting {
                path: "bpf.hostLegacyRouting",
                severity: Severity::Info,
                bad: &|value| *value == json!(true),
                message: "what is decrypted goes through the host's stack, iptables and conntrack again before it reaches the pod",
                fix: "write bpf.hostLegacyRouting: false, unless the host's netfilter has to see pods",
            },
            Setting {
                path: "cni.enableRouteMTUForCNIChaining",
                severity: Severity::Warning,
                bad: &|value| chained && *value != json!(true),
                message: "pods of the chained plugin do not know the smaller MTU: packets are fragmented and each fragment is encrypted, or they are lost",
                fix: "write cni.enableRouteMTUForCNIChaining: true",
            },
        ]);
        self.lasting(wireguard, ipsec);
    }

    /// What makes sessions end.
    fn lasting(&mut self, wireguard: bool, ipsec: bool) {
        let seconds = |value: &Value| value.as_str().and_then(go_duration);
        self.check([
            Setting {
                path: "cleanState",
                severity: Severity::Error,
                bad: &|value| *value == json!(true),
                message: "each start of an agent deletes the node's state, its WireGuard key and its tunnels: every peer begins a new session",
                fix: "write cleanState: false",
            },
            Setting {
                path: "cleanBpfState",
                severity: Severity::Warning,
                bad: &|value| *value == json!(true),
                message: "each start of an agent deletes the node's BPF state, and connections through encrypted tunnels break",
                fix: "write cleanBpfState: false",
            },
            Setting {
                path: "daemon.runPath",
                severity: Severity::Warning,
                bad: &|value| {
                    let path = value.as_str().unwrap_or_default();
                    wireguard
                        && ["/tmp", "/dev/shm"]
                            .iter()
                            .any(|lost| path.starts_with(lost))
                },
                message: "the node's WireGuard key is there, and the folder is emptied while the node runs: a new key, and a new session with every peer",
                fix: "write daemon.runPath: /var/run/cilium",
            },
            Setting {
                path: "encryption.wireguard.persistentKeepalive",
                severity: Severity::Info,
                bad: &|value| wireguard && seconds(value).is_some_and(|every| every > 0.0),
                message: "each node holds a session with every other, with traffic or without: a handshake with each of them every two minutes",
                fix: "write encryption.wireguard.persistentKeepalive: 0s, or 25s where NAT or a stateful firewall is between the nodes",
            },
            Setting {
                path: "encryption.ipsec.keyWatcher",
                severity: Severity::Warning,
                bad: &|value| ipsec && *value == json!(false),
                message: "an agent takes a rotated key only when it restarts, and the old one goes: nodes disagree, and packets between them are lost",
                fix: "write encryption.ipsec.keyWatcher: true",
            },
            Setting {
                path: "encryption.ipsec.keyRotationDuration",
                severity: Severity::Warning,
                bad: &|value| ipsec && seconds(value).is_some_and(|after| after < KEY_ROTATION),
                message: "the old key goes before every node has the new one, and packets between them are lost",
                fix: "write encryption.ipsec.keyRotationDuration: 5m, more in a Cluster Mesh",
            },
        ]);
    }

    fn check<const N: usize>(&mut self, rules: [Setting<'_>; N]) {
        for rule in rules {
            let found = self.effective(rule.path);
            if self.rules.keys.at(&split(rule.path)).is_none() || !(rule.bad)(&found.value) {
                continue;
            }
            let message = format!("{}: {}", found.says(), rule.message);
            self.say(found.at(), rule.severity, rule.path, message, rule.fix);
        }
    }
}

/// What a list of metrics lacks of one that is needed, and the entry that it should have.
fn lacking(entry: &str, list: &[String]) -> Option<(String, String)> {
    let want = Metric::parse(entry);
    let own = list.iter().find(|own| Metric::parse(own).name == want.name);
    let Some(text) = own else {
        let message = format!("has no {}: there is no {}", want.name, series(want.name));
        return Some((message, entry.to_owned()));
    };
    let own = Metric::parse(text);
    let lacks = own.lacks_labels(&want);
    if lacks.is_empty() {
        return None;
    }
    let message = format!(
        "{} lacks labelsContext={}: {} cannot tell whose packets they are",
        want.name,
        lacks.join(","),
        series(want.name)
    );
    Some((message, cilium::inserted(text, &own.lacks(&want))))
}

/// A setting that is not as an encrypted packet would like it.
struct Setting<'a> {
    path: &'static str,
    severity: Severity,
    bad: &'a dyn Fn(&Value) -> bool,
    message: &'static str,
    fix: &'static str,
}

/// Seconds of a duration as Go's `time.ParseDuration` reads it, which agents parse their flags with.
fn go_duration(text: &str) -> Option<f64> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(0.0);
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = &rest[number..];
        let unit = &unit[..unit
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(unit.len())];
        let factor = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += rest[..number].parse::<f64>().ok()? * factor;
        rest = &rest[number + unit.len()..];
    }
    (!text.is_empty()).then_some(seconds)
}

fn leaves<'a>(value: &'a Value, path: &str, found: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                leaves(value, &join(path, key), found);
            }
        }
        leaf => found.push((path.to_owned(), leaf)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, seconds) in [
            ("5m", 300.0),
            ("1.5m", 90.0),
            ("4m59.5s", 299.5),
            ("1h0m0s", 3600.0),
            ("0", 0.0),
            ("250ms", 0.25),
            ("+1µs", 1e-6),
        ] {
            assert_eq!(go_duration(text), Some(seconds), "{text}");
        }
        for text in ["", "30", "5 m", "m", "1d", "-5m", "1..5s", "5m3"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }
}
