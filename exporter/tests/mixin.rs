// SPDX-License-Identifier: Apache-2.0
//! What rules, alerts and panels read, checked against what is exported: every metric exists, and every label on it.
//!
//! The labels of each expression are inferred as PromQL has it, through recording rules, so that a label which an
//! aggregation drops cannot be grouped by, joined on, or shown in a legend or an alert's text afterwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use chandra::{
    families::{Desc, Kind, POD},
    scrape,
    signals::SIGNALS,
};
use chandra_mixin::{jsonnet, render};
use promql_parser::{
    label::MatchOp,
    parser::{self, Expr, LabelModifier, VectorMatchCardinality, VectorSelector, value::ValueType},
    util::{ExprVisitor, walk_expr},
};
use serde_json::Value;

/// Metrics of others, with the labels that they have when helm-values/ are applied.
///
/// Hubble: pkg/hubble/metrics in Cilium 1.19, with `source` and `destination` where an operator set contexts. Agent: pkg/metrics.
/// `cilium_ipsec_xfrm_error` is a gauge that mirrors a kernel counter. node_exporter: its cpu, netstat and uname collectors. cAdvisor: the
/// kubelet's. kube-state-metrics: internal/store/node.go and pod.go, with the node's name as a label of its own. DCGM: its exporter's
/// defaults. vLLM: vllm/v1/metrics/loggers.py, with the labels of a pod that is a target. OpenTelemetry eBPF instrumentation:
/// pkg/export/attributes/attr_defs.go, with the attributes that are selected.
const OTHERS: &[(&str, Kind, &[&str])] = &[
    (
        "hubble_drop_total",
        Kind::Counter,
        &[
            "reason",
            "protocol",
            "source_namespace",
            "destination_namespace",
            "traffic_direction",
            "source_pod",
            "destination_pod",
            "source",
            "destination",
            "source_ip",
            "destination_ip",
        ],
    ),
    (
        "hubble_flows_processed_total",
        Kind::Counter,
        &[
            "protocol",
            "type",
            "subtype",
            "verdict",
            "source_namespace",
            "destination_namespace",
            "source",
            "destination",
        ],
    ),
    (
        "hubble_policy_verdicts_total",
        Kind::Counter,
        &[
            "direction",
            "match",
            "action",
            "source_namespace",
            "destination_namespace",
            "source",
            "destination",
        ],
    ),
    (
        "hubble_port_distribution_total",
        Kind::Counter,
        &["protocol", "port", "source_namespace", "source_pod"],
    ),
    ("hubble_lost_events_total", Kind::Counter, &["source"]),
    (
        "hubble_dns_queries_total",
        Kind::Counter,
        &[
            "rcode",
            "qtypes",
            "ips_returned",
            "source_namespace",
            "destination_namespace",
            "source",
            "destination",
        ],
    ),
    (
        "hubble_dns_responses_total",
        Kind::Counter,
        &[
            "rcode",
            "qtypes",
            "ips_returned",
            "source_namespace",
            "destination_namespace",
            "source",
            "destination",
        ],
    ),
    (
        "cilium_drop_count_total",
        Kind::Counter,
        &["reason", "direction"],
    ),
    ("cilium_forward_count_total", Kind::Counter, &["direction"]),
    ("cilium_bpf_map_pressure", Kind::Gauge, &["map_name"]),
    (
        "cilium_bpf_map_ops_total",
        Kind::Counter,
        &["map_name", "operation", "outcome"],
    ),
    ("cilium_ipsec_xfrm_error", Kind::Counter, &["type", "error"]),
    ("node_cpu_seconds_total", Kind::Counter, &["cpu", "mode"]),
    (
        "node_uname_info",
        Kind::Gauge,
        &[
            "nodename",
            "release",
            "sysname",
            "version",
            "machine",
            "domainname",
        ],
    ),
    (
        "vllm:e2e_request_latency_seconds",
        Kind::Histogram,
        &["namespace", "pod", "container", "model_name", "engine"],
    ),
    (
        "vllm:time_to_first_token_seconds",
        Kind::Histogram,
        &["namespace", "pod", "container", "model_name", "engine"],
    ),
    (
        "http_server_request_duration_seconds",
        Kind::Histogram,
        &["k8s_namespace_name", "k8s_pod_name"],
    ),
    (
        "hubble_metrics_http_handler_requests_total",
        Kind::Counter,
        &["code"],
    ),
    ("cilium_version", Kind::Gauge, &["version"]),
    (
        "kube_node_status_allocatable",
        Kind::Gauge,
        &["resource", "unit", "exported_node"],
    ),
    (
        "container_network_transmit_packets_total",
        Kind::Counter,
        &["namespace", "pod", "interface"],
    ),
    (
        "container_network_transmit_bytes_total",
        Kind::Counter,
        &["namespace", "pod", "interface"],
    ),
    (
        "kube_pod_info",
        Kind::Gauge,
        &["namespace", "pod", "host_network"],
    ),
    ("node_netstat_Tcp_OutSegs", Kind::Counter, &[]),
    ("DCGM_FI_DEV_GPU_UTIL", Kind::Gauge, &["gpu", "Hostname"]),
    ("up", Kind::Gauge, &[]),
];

/// What Prometheus and the monitors add to every series.
const TARGET: [&str; 4] = ["job", "instance", "cluster", "node"];

/// Signals that follow processes, which a container without hostPID cannot.
const NEED_HOST_PID: [&str; 2] = ["gpu", "nccl"];

type Labels = BTreeSet<String>;

struct Metric {
    /// `None` for a recording rule, which is a gauge of whatever kind.
    kind: Option<Kind>,
    labels: Labels,
    values: BTreeMap<String, Vec<String>>,
}

type Catalogue = BTreeMap<String, Metric>;

fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the workspace").to_owned()
}

fn descs() -> impl Iterator<Item = &'static Desc> {
    let of_signals = SIGNALS.iter().flat_map(|entry| entry.descs);
    of_signals.chain(scrape::DESCS).copied()
}

fn set<'a>(labels: impl IntoIterator<Item = &'a str>) -> Labels {
    labels.into_iter().map(str::to_owned).collect()
}

fn catalogue() -> Catalogue {
    let mut all = Catalogue::new();
    let mut add = |name: &str,
                   kind: Kind,
                   per_pod: bool,
                   labels: &[&str],
                   values: BTreeMap<String, Vec<String>>| {
        let own = labels
            .iter()
            .chain(POD.iter().filter(|_| per_pod))
            .chain(&TARGET);
        let labels = set(own.copied());
        let mut insert = |name: String, kind, labels| {
            all.insert(
                name,
                Metric {
                    kind: Some(kind),
                    labels,
                    values: values.clone(),
                },
            );
        };
        if kind == Kind::Histogram {
            let mut with_bound = labels.clone();
            with_bound.insert("le".to_owned());
            insert(format!("{name}_bucket"), Kind::Counter, with_bound);
            insert(format!("{name}_sum"), Kind::Counter, labels.clone());
            insert(format!("{name}_count"), Kind::Counter, labels);
        } else {
            insert(name.to_owned(), kind, labels);
        }
    };
    for desc in descs() {
        let values = desc.values.iter().map(|(label, values)| {
            (
                (*label).to_owned(),
                values.iter().map(|value| (*value).to_owned()).collect(),
            )
        });
        add(
            desc.name,
            desc.kind,
            desc.per_pod,
            desc.labels,
            values.collect(),
        );
    }
    for (name, kind, labels) in OTHERS {
        let values = match *name {
            "hubble_drop_total" => drop_reasons(true),
            "cilium_drop_count_total" => drop_reasons(false),
            _ => Vec::new(),
        };
        let values = if values.is_empty() {
            BTreeMap::new()
        } else {
            [("reason".to_owned(), values)].into()
        };
        add(name, *kind, false, labels, values);
    }
    all
}

/// Both vocabularies of Cilium: jsonnet that is JSON, below a comment.
fn drop_reasons(hubble: bool) -> Vec<String> {
    let text =
        fs::read_to_string(root().join("mixin/lib/drop_reasons.libsonnet")).expect("readable");
    let json = &text[text.find('{').expect("an object")..];
    let table: BTreeMap<String, String> = serde_json::from_str(json).expect("JSON");
    let words = table
        .into_iter()
        .map(|(name, sentence)| if hubble { name } else { sentence });
    words.collect()
}

/// What an expression reads and gives.
struct Inference<'a> {
    catalogue: &'a Catalogue,
    read: BTreeSet<String>,
}

impl Inference<'_> {
    /// The labels that the result may have.
    fn labels(&mut self, expr: &Expr) -> Result<Labels, String> {
        match expr {
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) => Ok(Labels::new()),
            Expr::VectorSelector(selector) => self.selector(selector),
            Expr::MatrixSelector(matrix) => self.selector(&matrix.vs),
            Expr::Paren(inner) => self.labels(&inner.expr),
            Expr::Unary(inner) => self.labels(&inner.expr),
            Expr::Subquery(inner) => self.labels(&inner.expr),
            Expr::Aggregate(aggregate) => {
                let inner = self.labels(&aggregate.expr)?;
                match &aggregate.modifier {
                    Some(LabelModifier::Include(by)) => {
                        Ok(known(&by.labels, &inner, &format!("by in {expr}"))?)
                    }
                    Some(LabelModifier::Exclude(without)) => {
                        let without =
                            known(&without.labels, &inner, &format!("without in {expr}"))?;
                        Ok(&inner - &without)
                    }
                    None if ["topk", "bottomk"].contains(&&*aggregate.op.to_string()) => Ok(inner),
                    None => Ok(Labels::new()),
                }
            }
            Expr::Binary(binary) => {
                let (left, right) = (self.labels(&binary.lhs)?, self.labels(&binary.rhs)?);
                if binary.lhs.value_type() == ValueType::Scalar {
                    return Ok(right);
                }
                if binary.rhs.value_type() == ValueType::Scalar {
                    return Ok(left);
                }
                let op = binary.op.to_string();
                let modifier = binary.modifier.as_ref();
                let on = match modifier.and_then(|modifier| modifier.matching.as_ref()) {
                    Some(LabelModifier::Include(on)) => {
                        known(&on.labels, &left, &format!("on, left of {op} in {expr}"))?;
                        Some(known(
                            &on.labels,
                            &right,
                            &format!("on, right of {op} in {expr}"),
                        )?)
                    }
                    Some(LabelModifier::Exclude(_)) => {
                        return Err(format!("ignoring in {expr}: name what is joined on"));
                    }
                    None => None,
                };
                if op == "or" {
                    return Ok(&left | &right);
                }
                if on.is_none() && left != right {
                    return Err(format!(
                        "{op} joins {left:?} with {right:?}, which never match: {expr}"
                    ));
                }
                if ["and", "unless", ">", "<", ">=", "<=", "==", "!="].contains(&&*op) {
                    return Ok(left);
                }
                match modifier.map(|modifier| &modifier.card) {
                    Some(VectorMatchCardinality::ManyToOne(extra)) => Ok(
                        &left | &known(&extra.labels, &right, &format!("group_left in {expr}"))?
                    ),
                    Some(VectorMatchCardinality::OneToMany(extra)) => {
                        Ok(&right
                            | &known(&extra.labels, &left, &format!("group_right in {expr}"))?)
                    }
                    _ => Ok(on.unwrap_or(left)),
                }
            }
            Expr::Call(call) => {
                let args: Vec<&Expr> = call.args.args.iter().map(|arg| &**arg).collect();
                let text = |i: usize| match args[i] {
                    Expr::StringLiteral(literal) => literal.val.clone(),
                    other => panic!("not a string: {other}"),
                };
                if let ("absent", Expr::VectorSelector(selector)) = (call.func.name, args[0]) {
                    self.selector(selector)?;
                    let equal = selector
                        .matchers
                        .matchers
                        .iter()
                        .filter(|m| m.op == MatchOp::Equal);
                    return Ok(equal.map(|m| m.name.clone()).collect());
                }
                if ["rate", "increase", "irate"].contains(&call.func.name)
                    && let Expr::MatrixSelector(matrix) = args[0]
                {
                    let name = matrix.vs.name.as_deref().unwrap_or_default();
                    let kind = self.catalogue.get(name).and_then(|metric| metric.kind);
                    if kind != Some(Kind::Counter) {
                        return Err(format!("{} of {name}, which is no counter", call.func.name));
                    }
                }
                let mut labels = Labels::new();
                for arg in &args {
                    labels.extend(self.labels(arg)?);
                }
                match call.func.name {
                    "label_replace" => {
                        let source = text(3);
                        if !source.is_empty() {
                            known(&[source], &labels, &format!("label_replace in {expr}"))?;
                        }
                        labels.insert(text(1));
                    }
                    "histogram_quantile" if !labels.remove("le") => {
                        return Err(format!("no le is left for {expr}"));
                    }
                    _ => {}
                }
                Ok(labels)
            }
            other => Err(format!("what are the labels of {other}?")),
        }
    }

    fn selector(&mut self, selector: &VectorSelector) -> Result<Labels, String> {
        let name = selector
            .name
            .as_deref()
            .ok_or("a selector without a name")?;
        let metric = self
            .catalogue
            .get(name)
            .ok_or(format!("nobody exports {name}"))?;
        self.read.insert(name.to_owned());
        for matcher in &selector.matchers.matchers {
            let label = &matcher.name;
            if !metric.labels.contains(label) {
                return Err(format!("{name} has no label {label}"));
            }
            let Some(values) = metric.values.get(label) else {
                continue;
            };
            // A dashboard's variable, or a pattern of more than alternatives, may be anything.
            let literal = matcher
                .value
                .replace('|', "")
                .replace([' ', ':', '(', ')', '/', '!'], "");
            if !literal
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_')
            {
                continue;
            }
            for value in matcher.value.split('|').filter(|value| !value.is_empty()) {
                if !values.iter().any(|known| known == value) {
                    return Err(format!("{label} of {name} is never {value:?}"));
                }
            }
        }
        Ok(metric.labels.clone())
    }
}

/// The labels as a set, all of which have to be in another.
fn known(labels: &[String], inner: &Labels, place: &str) -> Result<Labels, String> {
    match labels.iter().find(|label| !inner.contains(*label)) {
        Some(label) => Err(format!("no label {label}: {place}")),
        None => Ok(labels.iter().cloned().collect()),
    }
}

/// Reads an expression: what it gives, and what it reads added to `read`.
fn infer(expr: &str, catalogue: &Catalogue, read: &mut BTreeSet<String>) -> Result<Labels, String> {
    let parsed = parser::parse(expr).map_err(|why| format!("{expr}: {why}"))?;
    let mut inference = Inference {
        catalogue,
        read: BTreeSet::new(),
    };
    let labels = inference.labels(&parsed)?;
    read.extend(inference.read);
    Ok(labels)
}

/// The words that follow each occurrence of a prefix.
fn words_after<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let ends = |rest: &'a str| {
        rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .map_or(rest, |end| &rest[..end])
    };
    text.match_indices(prefix)
        .map(|(at, _)| ends(&text[at + prefix.len()..]))
        .collect()
}

/// The whole mixin, checked.
struct Checked {
    problems: Vec<String>,
    /// Every metric that something reads.
    read: BTreeSet<String>,
    records: BTreeSet<String>,
    alerts: BTreeMap<String, (String, Value)>,
}

/// The rules of a file, if it has any.
fn rules(path: &str, file: &Value) -> Vec<Value> {
    match path.starts_with("alerts/") {
        true => render::rules(&file["yaml"])
            .iter()
            .map(|rule| rule.body.clone())
            .collect(),
        false => Vec::new(),
    }
}

fn check(tree: &Value) -> Checked {
    let mut catalogue = catalogue();
    let mut checked = Checked {
        problems: Vec::new(),
        read: BTreeSet::new(),
        records: BTreeSet::new(),
        alerts: BTreeMap::new(),
    };
    let files = tree["files"].as_object().expect("files");
    // In the order in which a file has them, which is the order in which Prometheus evaluates a group.
    for (path, file) in files {
        for rule in rules(path, file) {
            let Some(record) = rule["record"].as_str() else {
                continue;
            };
            let expr = rule["expr"].as_str().expect("an expression");
            if record.split(':').count() != 3 {
                checked
                    .problems
                    .push(format!("{record} is not level:metric:operations"));
            }
            match infer(expr, &catalogue, &mut checked.read) {
                Ok(labels) => {
                    let new = Metric {
                        kind: None,
                        labels,
                        values: BTreeMap::new(),
                    };
                    if catalogue.insert(record.to_owned(), new).is_some() {
                        checked.problems.push(format!("{record} is recorded twice"));
                    }
                    checked.records.insert(record.to_owned());
                }
                Err(why) => checked.problems.push(format!("{record}: {why}")),
            }
        }
    }
    for (path, file) in files {
        for rule in rules(path, file) {
            let Some(alert) = rule["alert"].as_str() else {
                continue;
            };
            check_alert(alert, &rule, &catalogue, &mut checked);
            let signal = path.trim_start_matches("alerts/").trim_end_matches(".yaml");
            checked
                .alerts
                .insert(alert.to_owned(), (signal.to_owned(), rule));
        }
        if path.starts_with("dashboards/") {
            check_dashboard(path, &file["json"], &catalogue, &mut checked);
        }
    }
    checked
}

fn check_alert(alert: &str, rule: &Value, catalogue: &Catalogue, checked: &mut Checked) {
    let mut problem = |why: String| checked.problems.push(format!("{alert}: {why}"));
    let labels = match infer(
        rule["expr"].as_str().expect("an expression"),
        catalogue,
        &mut checked.read,
    ) {
        Ok(labels) => labels,
        Err(why) => return problem(why),
    };
    let texts =
        ["summary", "description"].map(|key| rule["annotations"][key].as_str().unwrap_or_default());
    for text in texts {
        if text.is_empty() {
            problem("a text is missing".to_owned());
        }
        for label in words_after(text, "$labels.") {
            if !labels.contains(label) {
                problem(format!(
                    "its text shows the label {label}, which it does not have"
                ));
            }
        }
        // A list in the text: the query is between backticks, its rows are shown after it.
        for (i, part) in text.split('`').enumerate() {
            if i % 2 == 0 {
                continue;
            }
            let query = part.replace("%q", "\"x\"");
            match infer(&query, catalogue, &mut checked.read) {
                Ok(labels) => {
                    let shown = text.split('`').nth(i + 1).unwrap_or_default();
                    for label in words_after(shown, "$row.Labels.") {
                        if !labels.contains(label) {
                            problem(format!(
                                "a row of its text shows the label {label}, which {query} has not"
                            ));
                        }
                    }
                }
                Err(why) => problem(why),
            }
        }
    }
}

fn check_dashboard(path: &str, dashboard: &Value, catalogue: &Catalogue, checked: &mut Checked) {
    let mut problem = |why: String| checked.problems.push(format!("{path}: {why}"));
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let variables: Vec<_> = list(&dashboard["templating"], "list");
    let names: BTreeSet<_> = variables
        .iter()
        .filter_map(|variable| variable["name"].as_str())
        .collect();
    for variable in &variables {
        let Some(query) = variable["query"]["query"].as_str() else {
            continue;
        };
        let inner = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let Some((expr, label)) = inner.and_then(|inner| inner.rsplit_once(", ")) else {
            problem(format!("{query} is no label_values"));
            continue;
        };
        match infer(expr, catalogue, &mut checked.read) {
            Ok(labels) if labels.contains(label) => {}
            Ok(_) => problem(format!("{query}: no such label")),
            Err(why) => problem(why),
        }
    }
    for panel in list(dashboard, "panels") {
        let title = panel["title"].as_str().unwrap_or_default();
        for key in ["title", "description"] {
            if panel[key].as_str().unwrap_or_default().is_empty() {
                problem(format!("{title}: no {key}"));
            }
        }
        for target in list(&panel, "targets") {
            let expr = target["expr"].as_str().unwrap_or_default();
            for variable in words_after(expr, "$") {
                if !names.contains(variable) && !variable.starts_with("__") {
                    problem(format!("{title}: no variable {variable}"));
                }
            }
            match infer(
                &expr.replace("$__range", "1h"),
                catalogue,
                &mut checked.read,
            ) {
                Ok(labels) => {
                    for label in
                        words_after(target["legendFormat"].as_str().unwrap_or_default(), "{{")
                    {
                        if !labels.contains(label) {
                            problem(format!(
                                "{title}: its legend shows {label}, which {expr} has not"
                            ));
                        }
                    }
                }
                Err(why) => problem(format!("{title}: {why}")),
            }
        }
    }
}

fn tree() -> Value {
    jsonnet::evaluate(None).expect("the mixin evaluates")
}

#[test]
fn everything_that_is_read_is_exported_with_its_labels() {
    let checked = check(&tree());
    assert!(
        checked.problems.is_empty(),
        "{}",
        checked.problems.join("\n")
    );
    assert!(
        checked.records.len() > 40 && checked.alerts.len() > 20,
        "too little was found"
    );
    let unread: Vec<_> = checked.records.difference(&checked.read).collect();
    assert!(
        unread.is_empty(),
        "recorded, and read by nothing: {unread:?}"
    );
    let others = OTHERS.iter().map(|(name, ..)| *name);
    for name in others {
        let read = checked.read.iter().any(|read| read.starts_with(name));
        assert!(read, "{name} is listed, and read by nothing");
    }
}

#[test]
fn the_check_sees_what_is_wrong() {
    let catalogue = catalogue();
    for (expr, expected) in [
        ("chandra_tcp_retransmit_total", "nobody exports"),
        ("chandra_tcp_retransmits_total{pid=\"1\"}", "no label pid"),
        ("chandra_tcp_retransmits_total{kind=\"slow\"}", "is never"),
        ("hubble_drop_total{reason=\"Policy denied\"}", "is never"),
        (
            "cilium_drop_count_total{reason=\"POLICY_DENIED\"}",
            "is never",
        ),
        (
            "hubble_drop_total{reason=~\"POLICY_DENIED|CT map full\"}",
            "is never",
        ),
        (
            "sum by (kind) (sum by (pod) (chandra_tcp_retransmits_total))",
            "no label kind",
        ),
        ("rate(chandra_rdma_queue_pairs[5m])", "no counter"),
        (
            "sum by (pod) (chandra_series) / sum by (node) (chandra_series)",
            "no label pod",
        ),
        (
            "sum by (node, signal) (chandra_series) / sum by (node) (chandra_series)",
            "never match",
        ),
        (
            "sum by (node) (chandra_series) and on (pod) sum by (node) (chandra_series)",
            "no label pod",
        ),
        (
            "histogram_quantile(0.9, sum by (pod) (rate(chandra_rdma_queue_pair_lifetime_seconds_bucket[5m])))",
            "no le",
        ),
        (
            "label_replace(chandra_series, \"a\", \"$1\", \"pod\", \"(.*)\")",
            "no label pod",
        ),
        ("sum(", "invalid"),
    ] {
        let why = infer(expr, &catalogue, &mut BTreeSet::new()).expect_err(expr);
        let seen = why.contains(expected) || expected == "invalid";
        assert!(seen, "{expr}: {why}");
    }
    for expr in [
        "hubble_drop_total{reason=\"POLICY_DENIED\"}",
        "cilium_drop_count_total{reason=\"Policy denied\"}",
    ] {
        infer(expr, &catalogue, &mut BTreeSet::new()).expect(expr);
    }
}

/// The bounds of every histogram, as the golden pages have them.
fn bounds() -> BTreeMap<String, BTreeSet<String>> {
    let folder = root().join("exporter/tests/golden");
    let mut all = BTreeMap::<_, BTreeSet<_>>::new();
    for entry in fs::read_dir(folder).expect("golden pages") {
        let page = fs::read_to_string(entry.expect("an entry").path()).expect("readable");
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((metric, rest)) = line.split_once("_bucket{") else {
                continue;
            };
            let (_, bound) = rest.split_once("le=\"").expect("a bucket has a bound");
            let bound = bound.split('"').next().expect("quoted").to_owned();
            all.entry(metric.to_owned()).or_default().insert(bound);
        }
    }
    all
}

/// The histograms of whose quantile an expression is a value, itself or through recording rules.
fn quantiles(expr: &Expr, records: &BTreeMap<String, Expr>, found: &mut BTreeSet<String>) {
    struct Buckets<'a>(&'a mut BTreeSet<String>, bool);
    impl ExprVisitor for Buckets<'_> {
        type Error = ();
        fn pre_visit(&mut self, expr: &Expr) -> Result<bool, ()> {
            let name = match expr {
                Expr::VectorSelector(selector) => selector.name.as_deref(),
                Expr::MatrixSelector(matrix) => matrix.vs.name.as_deref(),
                Expr::Call(call) => {
                    self.1 |= call.func.name == "histogram_quantile";
                    None
                }
                _ => None,
            };
            self.0.extend(name.map(str::to_owned));
            Ok(true)
        }
    }
    let mut names = BTreeSet::new();
    let mut buckets = Buckets(&mut names, false);
    walk_expr(&mut buckets, expr).expect("it cannot fail");
    let is_quantile = buckets.1;
    for name in names {
        match name.strip_suffix("_bucket") {
            Some(histogram) if is_quantile => {
                found.insert(histogram.to_owned());
            }
            _ => {
                if let Some(rule) = records.get(&name) {
                    quantiles(rule, records, found);
                }
            }
        }
    }
}

/// Prometheus interpolates within a bucket: a quantile above a threshold that is no bound may be of values below it.
#[test]
fn quantiles_are_compared_with_the_bounds_of_their_buckets() {
    struct Comparisons(Vec<(Expr, f64)>);
    impl ExprVisitor for Comparisons {
        type Error = ();
        fn pre_visit(&mut self, expr: &Expr) -> Result<bool, ()> {
            if let Expr::Binary(binary) = expr
                && binary.op.is_comparison_operator()
                && let Expr::NumberLiteral(number) = &*binary.rhs
            {
                self.0.push(((*binary.lhs).clone(), number.val));
            }
            Ok(true)
        }
    }
    let bounds = bounds();
    let tree = tree();
    let files = tree["files"].as_object().expect("files").iter();
    let rules: Vec<Value> = files.flat_map(|(path, file)| rules(path, file)).collect();
    let expr = |rule: &Value| {
        parser::parse(rule["expr"].as_str().expect("an expression")).expect("it parses")
    };
    let records = rules.iter().filter_map(|rule| {
        let name = rule["record"].as_str()?;
        Some((name.to_owned(), expr(rule)))
    });
    let records = records.collect();
    let mut compared = 0;
    for rule in rules.iter().filter(|rule| rule["alert"].is_string()) {
        let mut comparisons = Comparisons(Vec::new());
        walk_expr(&mut comparisons, &expr(rule)).expect("it cannot fail");
        for (left, threshold) in comparisons.0 {
            let mut histograms = BTreeSet::new();
            quantiles(&left, &records, &mut histograms);
            for histogram in histograms {
                compared += 1;
                let of = bounds
                    .get(&histogram)
                    .unwrap_or_else(|| panic!("{histogram} is on no golden page"));
                assert!(
                    of.contains(&threshold.to_string()),
                    "{}: {threshold} is no bound of {histogram}: {of:?}",
                    rule["alert"]
                );
            }
        }
    }
    assert!(compared >= 4, "only {compared} quantiles are compared");
}

#[test]
fn every_alert_has_its_runbook_heading_and_every_heading_its_alert() {
    let checked = check(&tree());
    let mut headings = BTreeMap::new();
    for (alert, (signal, rule)) in &checked.alerts {
        let path = root().join(format!("docs/runbooks/{signal}.md"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let of_signal: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("## "))
            .map(str::to_owned)
            .collect();
        assert!(
            of_signal.contains(alert),
            "{} has no heading for {alert}",
            path.display()
        );
        let url = rule["annotations"]["runbook_url"]
            .as_str()
            .expect("a runbook");
        // By default the project's own file.
        let file = format!("docs/runbooks/{signal}.md#{}", alert.to_lowercase());
        assert_eq!(url, file);
        headings.insert(signal.clone(), of_signal);
    }
    let headings: BTreeSet<_> = headings.into_values().flatten().collect();
    let alerts: BTreeSet<_> = checked.alerts.into_keys().collect();
    assert_eq!(headings, alerts);
}

#[test]
fn the_first_dashboard_is_the_four_panels_in_their_order() {
    let tree = tree();
    let dashboards = tree["files"].as_object().expect("files").iter();
    let dashboards: Vec<_> = dashboards
        .filter(|(path, _)| path.starts_with("dashboards/"))
        .collect();
    let mut uids = BTreeSet::new();
    for (path, file) in dashboards {
        let dashboard = &file["json"];
        assert!(
            uids.insert(dashboard["uid"].as_str().expect("a uid")),
            "{path}: its uid is taken"
        );
        let panels = dashboard["panels"].as_array().expect("panels");
        let place = |panel: &Value| {
            ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().expect("a number"))
        };
        for (i, panel) in panels.iter().enumerate() {
            let [x, y, w, h] = place(panel);
            assert!(x + w <= 24, "{path}: {}", panel["title"]);
            let overlaps = panels[..i]
                .iter()
                .map(place)
                .any(|[a, b, c, d]| x < a + c && a < x + w && y < b + d && b < y + h);
            assert!(!overlaps, "{path}: {} lies over another", panel["title"]);
        }
        if path == "dashboards/chandra.json" {
            let kinds = panels
                .iter()
                .map(|panel| panel["type"].as_str().expect("a type"));
            assert_eq!(
                kinds.collect::<Vec<_>>(),
                ["barchart", "heatmap", "stat", "timeseries"]
            );
            let titles: Vec<_> = panels
                .iter()
                .map(|panel| panel["title"].as_str().expect("a title"))
                .collect();
            let expected = [
                "Hubble drop reasons by namespace",
                "TCP retransmits per pod",
                "RDMA queue pair count",
                "Encryption CPU time",
            ];
            assert_eq!(titles, expected);
        }
    }
}

#[test]
fn every_signal_has_its_part_of_the_mixin() {
    let tree = tree();
    for name in SIGNALS
        .iter()
        .map(|entry| entry.name)
        .chain(["exporter", "hubble", "path"])
    {
        for path in [
            format!("alerts/{name}.yaml"),
            format!("dashboards/chandra-{name}.json"),
        ] {
            assert!(!tree["files"][&path].is_null(), "{path} is not rendered");
        }
    }
    let sidecar = &tree["files"]["helm-values/cilium-sidecar.yaml"]["yaml"]["extraContainers"][0];
    let args: Vec<_> = sidecar["args"]
        .as_array()
        .expect("args")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for signal in NEED_HOST_PID {
        let there = SIGNALS.iter().any(|entry| entry.name == signal);
        let disabled = args.contains(&&*format!("--disable={signal}"));
        assert_eq!(
            there, disabled,
            "{signal} in the sidecar, whose exporter refuses signals that it does not know"
        );
    }
}
