// SPDX-License-Identifier: Apache-2.0
//! What do values of the Cilium chart mean for Chandra's rules and panels? And when does one entry of
//! `hubble.metrics.enabled` say what another says?

use std::ops::Range;

use granit_parser::ScalarStyle;
use serde_json::Value;

use crate::yaml::{Entry, Kind, Node};

/// Where Hubble's static metrics are listed.
pub const METRICS: &str = "hubble.metrics.enabled";

/// Where its dynamic metrics are listed.
pub const CONTENT: &str = "hubble.metrics.dynamic.config.content";

/// What `encryption.type` may be. The chart takes any word and encrypts nothing for one that it does not know.
pub const ENCRYPTION_TYPES: [&str; 3] = ["ipsec", "wireguard", "ztunnel"];

/// The names that Hubble documents. An agent whose list has an unknown one exports no Hubble metrics.
pub const METRIC_NAMES: [&str; 12] = [
    "dns",
    "drop",
    "flow",
    "flows-to-world",
    "http",
    "httpV2",
    "icmp",
    "kafka",
    "policy",
    "port-distribution",
    "sctp",
    "tcp",
];

/// Metrics that exclude each other: the old one and what took its place.
pub const CONFLICTS: [(&str, &str); 1] = [("http", "httpV2")];

/// What `labelsContext` may name.
pub const CONTEXT_LABELS: [&str; 13] = [
    "destination_app",
    "destination_ip",
    "destination_namespace",
    "destination_pod",
    "destination_workload",
    "destination_workload_kind",
    "source_app",
    "source_ip",
    "source_namespace",
    "source_pod",
    "source_workload",
    "source_workload_kind",
    "traffic_direction",
];

/// What follows from a value that is not the one that Chandra renders.
pub fn consequence(path: &str) -> &'static str {
    match path {
        "hubble.enabled" => {
            "there are no Hubble metrics, and drops, flows and DNS by namespace stay dark"
        }
        "hubble.metrics.serviceMonitor.enabled" => {
            "no Prometheus Operator finds Hubble's metrics: scrape port 9965 by other means"
        }
        "prometheus.enabled" => "the agent exports no metrics, and what reads cilium_* stays empty",
        "prometheus.serviceMonitor.enabled" => {
            "no Prometheus Operator finds the agent's metrics: scrape port 9962 by other means"
        }
        "prometheus.serviceMonitor.trustCRDsExist" => {
            "helm template and GitOps fail, since they do not know the operator's API"
        }
        "bpf.events.drop.enabled" => "hubble_drop_total stays 0",
        _ if path.ends_with(".labels.release") => {
            "the Prometheus Operator has to select this label instead"
        }
        METRICS => "what its rules and panels read stays empty",
        _ => "what Chandra renders for it is not used",
    }
}

/// An entry of `hubble.metrics.enabled`: `name:option;key=v1|v2;labelsContext=a,b`.
#[derive(Clone, Debug)]
pub struct Metric<'a> {
    /// The metric.
    pub name: &'a str,
    /// Its options, in their order.
    pub options: Vec<Choice<'a>>,
    end: usize,
}

/// One option.
#[derive(Clone, Debug)]
pub struct Choice<'a> {
    /// Its name; Hubble compares without regard to case.
    pub name: &'a str,
    /// Its values, if it has any.
    pub values: Vec<&'a str>,
    place: Range<usize>,
    separator: char,
    bare: bool,
}

impl<'a> Metric<'a> {
    /// Reads an entry as Hubble reads it.
    pub fn parse(entry: &'a str) -> Self {
        let (name, options) = entry.split_once(':').unwrap_or((entry, ""));
        let mut at = name.len() + 1;
        let mut parsed = Vec::new();
        for option in options.split(';') {
            let place = at..at + option.len();
            at = place.end + 1;
            if option.is_empty() {
                continue;
            }
            let (name, values) = option.split_once('=').unwrap_or((option, ""));
            let separator = if values.contains('|') { '|' } else { ',' };
            parsed.push(Choice {
                name,
                values: values.split(separator).filter(|v| !v.is_empty()).collect(),
                place,
                separator,
                bare: !option.contains('='),
            });
        }
        Self {
            name,
            options: parsed,
            end: entry.len(),
        }
    }

    /// The option that counts: the last of its name.
    pub fn option(&self, name: &str) -> Option<&Choice<'a>> {
        let same = |option: &&Choice<'_>| option.name.eq_ignore_ascii_case(name);
        self.options.iter().rev().find(same)
    }

    /// The labels that the other has by `labelsContext` and this has not.
    pub fn lacks_labels(&self, other: &Metric<'a>) -> Vec<&'a str> {
        let labels = |metric: &Metric<'a>| -> Vec<&'a str> {
            let option = metric.option("labelsContext").into_iter();
            option.flat_map(|option| option.values.clone()).collect()
        };
        let own = labels(self);
        let mut wanted = labels(other);
        wanted.retain(|label| !own.contains(label));
        wanted
    }

    /// What has to be inserted where in the entry's text, so that it says what the other says too.
    pub fn lacks(&self, other: &Metric<'_>) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        let mut appended = String::new();
        for option in &other.options {
            let Some(own) = self.option(option.name) else {
                let values = option.values.join(&option.separator.to_string());
                let equals = if option.bare { "" } else { "=" };
                appended.push_str(&format!(";{}{equals}{values}", option.name));
                continue;
            };
            let mut text = String::new();
            for value in &option.values {
                if own.values.contains(value) {
                    continue;
                }
                match (own.bare, own.values.is_empty() && text.is_empty()) {
                    (true, true) => text.push('='),
                    (false, true) => {}
                    (_, false) => text.push(own.separator),
                }
                text.push_str(value);
            }
            if !text.is_empty() {
                found.push((own.place.end, text));
            }
        }
        if !appended.is_empty() {
            // `drop` wants a colon, `drop:` nothing, `drop:x` a semicolon.
            let text = match self.options.is_empty() {
                true if self.name.len() == self.end => format!(":{}", &appended[1..]),
                true => appended[1..].to_owned(),
                false => appended,
            };
            found.push((self.end, text));
        }
        found
    }
}

/// An entry with these insertions.
pub fn inserted(entry: &str, insertions: &[(usize, String)]) -> String {
    let mut text = entry.to_owned();
    for (at, insertion) in insertions.iter().rev() {
        text.insert_str(*at, insertion);
    }
    text
}

/// `drop:labelsContext=a,b` as an entry of hubble.metrics.dynamic.config.content.
pub fn as_dynamic(entry: &str) -> String {
    let metric = Metric::parse(entry);
    let options: Vec<String> = metric
        .options
        .iter()
        .map(|option| {
            format!(
                "{{name: {}, values: [{}]}}",
                option.name,
                option.values.join(", ")
            )
        })
        .collect();
    match options.is_empty() {
        true => format!("{{name: {}}}", metric.name),
        false => format!(
            "{{name: {}, contextOptions: [{}]}}",
            metric.name,
            options.join(", ")
        ),
    }
}

/// An entry of hubble.metrics.dynamic.config.content, as hubble.metrics.enabled would have it.
pub fn as_static(entry: &Value) -> String {
    let mut text = entry["name"].as_str().unwrap_or_default().to_owned();
    let options = entry["contextOptions"].as_array().into_iter().flatten();
    for (index, option) in options.enumerate() {
        let separator = if index == 0 { ':' } else { ';' };
        let values = option["values"].as_array().into_iter().flatten();
        let values: Vec<&str> = values.filter_map(Value::as_str).collect();
        let name = option["name"].as_str().unwrap_or_default();
        text.push_str(&format!("{separator}{name}={}", values.join(",")));
    }
    text
}

/// The list that `--set key={a,b}` means, in a values file: as text (`"{a,b}"`), or as a map without values (`{a, b}`).
///
/// Commas part it, and a backslash takes the next character as it is: Helm, pkg/strvals. `text` is the node's file.
pub fn set_list(node: &Node, text: &str) -> Option<Vec<String>> {
    let bare = |entry: &Entry| {
        let plain = matches!(
            entry.key.kind,
            Kind::Scalar {
                style: ScalarStyle::Plain,
                ..
            }
        );
        plain && entry.value.is_null() && entry.value.span.is_empty()
    };
    let inner = match &node.kind {
        Kind::Scalar {
            value: Value::String(text),
            style: ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted,
            ..
        } => text.trim(),
        Kind::Map {
            flow: true,
            entries,
        } if !entries.is_empty() && entries.iter().all(bare) => text.get(node.span.clone())?,
        _ => return None,
    };
    let inner = inner.strip_prefix('{')?.strip_suffix('}')?;
    if inner.contains(['{', '}', '#', '\n']) {
        return None;
    }
    let mut items = vec![String::new()];
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match (c, items.last_mut()) {
            ('\\', Some(item)) => item.extend(chars.next()),
            (',', _) => items.push(String::new()),
            (c, Some(item)) => item.push(c),
            (_, None) => {}
        }
    }
    let items = items.iter().map(|item| item.trim().to_owned());
    Some(items.filter(|item| !item.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn united(user: &str, other: &str) -> String {
        let insertions = Metric::parse(user).lacks(&Metric::parse(other));
        let united = inserted(user, &insertions);
        let again = Metric::parse(&united).lacks(&Metric::parse(other));
        assert!(again.is_empty(), "{united} lacks {again:?}");
        united
    }

    #[test]
    fn options_are_united_and_the_users_stay_in_their_order() {
        let ours = "drop:labelsContext=source_namespace,destination_namespace";
        for (user, expected) in [
            (
                "drop",
                "drop:labelsContext=source_namespace,destination_namespace",
            ),
            (
                "drop:",
                "drop:labelsContext=source_namespace,destination_namespace",
            ),
            (
                "drop:x",
                "drop:x;labelsContext=source_namespace,destination_namespace",
            ),
            (
                "drop:sourceContext=pod|ip;labelsContext=source_namespace",
                "drop:sourceContext=pod|ip;labelsContext=source_namespace,destination_namespace",
            ),
            (
                "drop:labelscontext=source_pod|source_namespace;exemplars=true",
                "drop:labelscontext=source_pod|source_namespace|destination_namespace;exemplars=true",
            ),
            (
                "drop:labelsContext;x",
                "drop:labelsContext=source_namespace,destination_namespace;x",
            ),
            (
                "drop:labelsContext=;x",
                "drop:labelsContext=source_namespace,destination_namespace;x",
            ),
            (ours, ours),
        ] {
            assert_eq!(united(user, ours), expected);
        }
        assert_eq!(
            united("dns:ignoreAAAA", "dns:query"),
            "dns:ignoreAAAA;query"
        );
        assert_eq!(united("flow:a=b", "flow"), "flow:a=b");
    }
}
