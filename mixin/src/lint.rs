// SPDX-License-Identifier: Apache-2.0
//! What does Helm accept in a values file without a word? Keys that nobody reads, words that mean nothing, lists that a later
//! file replaces, and settings without which Chandra's rules and panels stay empty.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    Failure,
    cilium::{self, CONTEXT_LABELS, ENCRYPTION_TYPES, METRIC_NAMES, METRICS, Metric},
    keys::Spec,
    yaml::{Document, Kind, Node, join},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It does not do what is written there.
    Error,
    /// Something of Chandra's does not work with it.
    Warning,
    /// To be known.
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
        })
    }
}

/// One thing to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file, as the user named it.
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// How bad it is.
    pub severity: Severity,
    /// The path of the key.
    pub path: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            column,
            severity,
            path,
            message,
        } = self;
        write!(
            out,
            "{}:{line}:{column}: {severity}: {path}: {message}",
            file.display()
        )
    }
}

impl Finding {
    /// For machines.
    pub fn json(&self) -> Value {
        json!({
            "file": self.file.display().to_string(),
            "line": self.line,
            "column": self.column,
            "severity": self.severity.to_string(),
            "path": self.path,
            "message": self.message,
        })
    }
}

/// What files are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The chart's keys.
    pub keys: &'a Spec,
    /// Whether it is the Cilium chart.
    pub cilium: bool,
    /// What Chandra renders for the chart.
    pub ours: &'a Value,
}

/// Judges files in the order in which Helm gets them.
///
/// # Errors
///
/// [`Failure::Values`] for what Helm cannot read.
pub fn lint(files: &[(PathBuf, String)], rules: Rules<'_>) -> Result<Vec<Finding>, Failure> {
    let mut documents = Vec::new();
    for (file, text) in files {
        let broken = |problem| Failure::values(file, problem);
        let document = Document::parse(text).map_err(broken)?;
        if let Some(root) = &document.root
            && !matches!(root.kind, Kind::Map { .. })
        {
            return Err(broken(
                root.problem("values are a map: Helm refuses anything else"),
            ));
        }
        document.value().map_err(broken)?;
        documents.push(document);
    }
    let mut linter = Linter {
        files,
        documents: &documents,
        rules,
        found: Vec::new(),
    };
    for index in 0..documents.len() {
        linter.file(index);
    }
    linter.replaced_lists();
    if rules.cilium {
        linter.needed();
    }
    let mut found = linter.found;
    let order = |finding: &Finding| files.iter().position(|(file, _)| *file == finding.file);
    found.sort_by_key(|finding| (order(finding), finding.line, finding.column));
    found.dedup();
    Ok(found)
}

/// A place: the file's number and the node.
#[derive(Clone, Copy)]
struct At<'a> {
    file: usize,
    node: Option<&'a Node>,
}

struct Linter<'a> {
    files: &'a [(PathBuf, String)],
    documents: &'a [Document],
    rules: Rules<'a>,
    found: Vec<Finding>,
}

impl<'a> Linter<'a> {
    fn say(&mut self, at: At<'_>, severity: Severity, path: &str, message: String) {
        let (line, column) = at.node.map_or((1, 1), |node| (node.line, node.column));
        self.found.push(Finding {
            file: self.files[at.file].0.clone(),
            line,
            column,
            severity,
            path: path.to_owned(),
            message,
        });
    }

    fn file(&mut self, index: usize) {
        let document = &self.documents[index];
        for twice in &document.duplicates {
            self.found.push(Finding {
                file: self.files[index].0.clone(),
                line: twice.line,
                column: twice.column,
                severity: Severity::Error,
                path: twice.path.clone(),
                message: format!(
                    "stands in line {} too, which Helm does not read",
                    twice.first
                ),
            });
        }
        if let Some(line) = document.more {
            self.found.push(Finding {
                file: self.files[index].0.clone(),
                line,
                column: 1,
                severity: Severity::Error,
                path: "---".to_owned(),
                message: "a second document, and Helm reads only the first".to_owned(),
            });
        }
        if let Some(root) = &document.root {
            self.keys(index, root, root, self.rules.keys, &mut Vec::new());
            if self.rules.cilium {
                self.metrics(index);
            }
        }
    }

    fn keys(
        &mut self,
        file: usize,
        key: &Node,
        node: &'a Node,
        spec: &Spec,
        path: &mut Vec<String>,
    ) {
        let document = &self.documents[file];
        let shown = path
            .iter()
            .fold(String::new(), |path, key| join(&path, key));
        let resolved = document.resolve(node);
        let at = At {
            file,
            node: Some(if path.is_empty() { node } else { key }),
        };
        if resolved.is_null() {
            return;
        }
        match (spec, &resolved.kind) {
            (Spec::Map(map), Kind::Map { .. }) => {
                for field in document.fields(node).unwrap_or_default() {
                    path.push(field.name.to_owned());
                    match map.get(field.name) {
                        Some(spec) => self.keys(file, field.key, field.value, spec, path),
                        None => self.unknown(file, field.key, field.value, path),
                    }
                    path.pop();
                }
            }
            (Spec::Map(_), _) => {
                let message = format!("is {}, and the chart wants a map", what(&resolved.kind));
                self.say(at, Severity::Error, &shown, message);
            }
            (Spec::Leaf { types, words, .. }, kind) => {
                let value = document.value_at(node).unwrap_or_default();
                if !types.is_empty() && !types.iter().any(|known| is_a(&value, known)) {
                    let message = format!(
                        "is {}, and the chart wants {}: Helm refuses it",
                        what(kind),
                        article(types)
                    );
                    self.say(at, Severity::Error, &shown, message);
                } else if let (Value::String(word), false) = (&value, words.is_empty())
                    && !words.contains(word)
                {
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    let message = not_one_of(word, &words);
                    self.say(
                        At {
                            file,
                            node: Some(resolved),
                        },
                        Severity::Error,
                        &shown,
                        message,
                    );
                } else if let (Value::String(word), true) =
                    (&value, self.rules.cilium && shown == "encryption.type")
                    && !ENCRYPTION_TYPES.contains(&word.as_str())
                {
                    let message = format!(
                        "{}: nothing is encrypted",
                        not_one_of(word, &ENCRYPTION_TYPES)
                    );
                    self.say(
                        At {
                            file,
                            node: Some(resolved),
                        },
                        Severity::Error,
                        &shown,
                        message,
                    );
                }
                self.strict_mode(at, &shown, false);
            }
        }
    }

    /// The layout before 1.19.
    fn strict_mode(&mut self, at: At<'_>, path: &str, removed: bool) {
        let old = ["enabled", "cidr", "allowRemoteNodeIdentities"];
        let Some(key) = path
            .strip_prefix("encryption.strictMode.")
            .filter(|key| old.contains(key))
        else {
            return;
        };
        let instead = format!("use encryption.strictMode.egress.{key}");
        match removed {
            true => self.say(
                at,
                Severity::Error,
                path,
                format!(
                    "was removed in 1.20 and renders to nothing, so nothing is strict: {instead}"
                ),
            ),
            false => self.say(
                at,
                Severity::Warning,
                path,
                format!("is deprecated in 1.19 and removed in 1.20: {instead}"),
            ),
        }
    }

    fn unknown(&mut self, file: usize, key: &Node, value: &Node, path: &[String]) {
        let document = &self.documents[file];
        // Helm gives `global` to every chart; a key that only holds anchors is meant for nobody.
        if path.len() == 1 && (path[0] == "global" || holds_anchors(document, value)) {
            return;
        }
        let shown = path
            .iter()
            .fold(String::new(), |path, key| join(&path, key));
        let at = At {
            file,
            node: Some(key),
        };
        let removed = ["enabled", "cidr", "allowRemoteNodeIdentities"];
        let strict = shown
            .strip_prefix("encryption.strictMode.")
            .is_some_and(|key| removed.contains(&key));
        if self.rules.cilium && strict {
            return self.strict_mode(at, &shown, true);
        }
        let suggestion = match self.suggestion(path) {
            Some(path) => format!("; did you mean {path}?"),
            None => String::new(),
        };
        self.say(
            at,
            Severity::Error,
            &shown,
            format!("the chart does not read this key{suggestion}"),
        );
    }

    fn suggestion(&self, path: &[String]) -> Option<String> {
        let (name, parents) = path.split_last()?;
        let parents: Vec<&str> = parents.iter().map(String::as_str).collect();
        let shown = |path: &[String]| {
            path.iter()
                .fold(String::new(), |path, key| join(&path, key))
        };
        if let Some(Spec::Map(siblings)) = self.rules.keys.at(&parents)
            && let Some(near) = nearest(name, siblings.keys().map(String::as_str))
        {
            let mut path = path.to_vec();
            *path.last_mut()? = near.to_owned();
            return Some(shown(&path));
        }
        let common =
            |other: &Vec<String>| other.iter().zip(path).take_while(|(a, b)| a == b).count();
        let rank = |place: &Vec<String>| (std::cmp::Reverse(common(place)), place.len());
        let mut places = self.rules.keys.paths_to(name);
        places.sort_by_key(rank);
        let best = places.first()?;
        // A key such as `enabled` is everywhere, which says nothing.
        let only = match places.get(1) {
            None => true,
            Some(next) => common(best) > 0 && rank(next) != rank(best),
        };
        only.then(|| shown(best))
    }

    /// The entries of hubble.metrics.enabled in one file.
    fn metrics(&mut self, file: usize) {
        let document = &self.documents[file];
        let Some(Found {
            node: Some(node), ..
        }) = self.in_file(file, METRICS)
        else {
            return;
        };
        let Kind::List { items, .. } = &document.resolve(node).kind else {
            return;
        };
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for item in items {
            let at = At {
                file,
                node: Some(item),
            };
            let value = document.value_at(item).unwrap_or_default();
            let Some(text) = value.as_str() else {
                let message = format!(
                    "an entry is {}, and has to be text, as in drop:sourceContext=pod",
                    what(&document.resolve(item).kind)
                );
                self.say(at, Severity::Error, METRICS, message);
                continue;
            };
            let metric = Metric::parse(text);
            if text.contains(char::is_whitespace) {
                self.say(
                    at,
                    Severity::Error,
                    METRICS,
                    format!("{text:?} has a space, which ends an entry"),
                );
            }
            if !METRIC_NAMES.contains(&metric.name) {
                let (severity, hint) = match nearest(metric.name, METRIC_NAMES.into_iter()) {
                    Some(near) => (Severity::Error, format!("; did you mean {near}?")),
                    None => (Severity::Warning, String::new()),
                };
                let message = format!("Hubble knows no metric {}{hint}", metric.name);
                self.say(at, severity, METRICS, message);
            }
            if let Some(first) = seen.insert(metric.name.to_owned(), item.line) {
                let message = format!(
                    "{} stands in line {first} too: unite their options",
                    metric.name
                );
                self.say(at, Severity::Error, METRICS, message);
            }
            for label in metric
                .option("labelsContext")
                .iter()
                .flat_map(|option| &option.values)
            {
                if CONTEXT_LABELS.contains(label) {
                    continue;
                }
                let (severity, hint) = match nearest(label, CONTEXT_LABELS.into_iter()) {
                    Some(near) => (Severity::Error, format!("; did you mean {near}?")),
                    None => (Severity::Warning, String::new()),
                };
                self.say(
                    at,
                    severity,
                    METRICS,
                    format!("labelsContext knows no {label}{hint}"),
                );
            }
        }
    }

    /// Lists of one file that a later one replaces.
    fn replaced_lists(&mut self) {
        let mut lists: BTreeMap<String, (usize, usize, Vec<Value>)> = BTreeMap::new();
        for file in 0..self.documents.len() {
            let document = &self.documents[file];
            let mut own = Vec::new();
            if let Some(root) = &document.root {
                collect_lists(document, root, "", &mut own);
            }
            for (path, node, items) in own {
                let lost: Vec<String> = match lists.get(&path) {
                    None => Vec::new(),
                    Some((.., earlier)) => earlier
                        .iter()
                        .filter(|item| !kept(&path, item, &items))
                        .map(|item| short(&path, item))
                        .collect(),
                };
                if let (false, Some((from, line, _))) = (lost.is_empty(), lists.get(&path)) {
                    let from = format!("{}:{line}", self.files[*from].0.display());
                    let last = path.rsplit('.').next().unwrap_or_default();
                    let severity = match path == METRICS || last.starts_with("extra") {
                        true => Severity::Error,
                        false => Severity::Warning,
                    };
                    let message = format!(
                        "replaces the list of {from} and loses {}: Helm does not merge lists; repeat it here",
                        lost.join(", ")
                    );
                    self.say(
                        At {
                            file,
                            node: Some(node),
                        },
                        severity,
                        &path,
                        message,
                    );
                }
                if items.is_empty() && node.is_null() && !lists.contains_key(&path) {
                    continue;
                }
                lists.insert(path, (file, node.line, items));
            }
        }
    }

    /// What Chandra's rules and panels need of the chart, all files together.
    fn needed(&mut self) {
        let dynamic = self.is_true("hubble.metrics.dynamic.enabled");
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
            // Cilium's own dashboards are a gift, not a need.
            if pointless || path.ends_with("dashboards.enabled") || self.is_true(path) {
                continue;
            }
            let severity = match path.as_str() {
                "hubble.enabled" | "prometheus.enabled" | "bpf.events.drop.enabled" => {
                    Severity::Warning
                }
                _ => Severity::Info,
            };
            let found = self.effective(path);
            let is = match found.node.is_some() {
                true => format!("is {}", found.value),
                false => format!("is not set, and the chart's default is {}", found.value),
            };
            self.say(
                found.at(),
                severity,
                path,
                format!("{is}: {}", cilium::consequence(path)),
            );
        }

        let found = self.effective(METRICS);
        let static_list: Vec<String> = texts(&found.value);
        let (path, list) = match dynamic {
            false => (METRICS, static_list.clone()),
            true => {
                let content = self
                    .effective("hubble.metrics.dynamic.config.content")
                    .value;
                (
                    "hubble.metrics.dynamic.config.content",
                    content
                        .as_array()
                        .into_iter()
                        .flatten()
                        .map(as_static)
                        .collect(),
                )
            }
        };
        if dynamic && !static_list.is_empty() {
            let message = "is set together with hubble.metrics.dynamic.enabled: the agent refuses to start with both".to_owned();
            self.say(found.at(), Severity::Error, METRICS, message);
        }
        if !hubble {
            return;
        }
        let found = self.effective(path);
        if dynamic && !self.is_true("hubble.metrics.dynamic.config.createConfigMap") {
            let message = "the chart does not write the dynamic metrics, so this cannot say whether drop, flow and dns are among them";
            return self.say(found.at(), Severity::Info, path, message.to_owned());
        }
        for want in texts(&self.rules.ours["hubble"]["metrics"]["enabled"]) {
            let want = Metric::parse(&want);
            let series = match want.name {
                "drop" => "hubble_drop_total",
                "flow" => "hubble_flows_processed_total",
                "dns" => "hubble_dns_*",
                name => name,
            };
            let own = list
                .iter()
                .map(|text| Metric::parse(text))
                .find(|own| own.name == want.name);
            let message = match own {
                None => format!("has no {}: there is no {series}", want.name),
                Some(own) => {
                    let labels = |metric: &Metric<'_>| -> Vec<String> {
                        let option = metric.option("labelsContext").into_iter();
                        option
                            .flat_map(|o| &o.values)
                            .map(|v| (*v).to_owned())
                            .collect()
                    };
                    let own = labels(&own);
                    let lacks: Vec<String> = labels(&want)
                        .into_iter()
                        .filter(|label| !own.contains(label))
                        .collect();
                    match lacks.is_empty() {
                        true => continue,
                        false => format!(
                            "{} lacks labelsContext={}: {series} cannot tell whose packets they are",
                            want.name,
                            lacks.join(",")
                        ),
                    }
                }
            };
            self.say(found.at(), Severity::Warning, path, message);
        }
    }

    fn is_true(&self, path: &str) -> bool {
        self.effective(path).value == Value::Bool(true)
    }

    /// What is in force at a path, and where that is written.
    fn effective(&self, path: &str) -> Found<'a> {
        let mut nearest = None;
        for file in (0..self.documents.len()).rev() {
            match self.in_file(file, path) {
                Some(found) if found.whole => return found,
                Some(found) => {
                    nearest.get_or_insert(found);
                }
                None => {}
            }
        }
        let keys: Vec<&str> = path.split('.').collect();
        let value = match self.rules.keys.at(&keys) {
            Some(Spec::Leaf { default, .. }) => default.clone(),
            _ => Value::Null,
        };
        let near = nearest.map_or((self.documents.len() - 1, None), |found: Found<'_>| {
            (found.file, found.key)
        });
        Found {
            file: near.0,
            key: near.1,
            node: None,
            value,
            whole: false,
        }
    }

    /// What a file says at a path. Null on the way deletes everything below.
    fn in_file(&self, file: usize, path: &str) -> Option<Found<'a>> {
        let document = &self.documents[file];
        let mut node = document.root.as_ref()?;
        let mut key = None;
        let mut rest = path.split('.').peekable();
        while let Some(name) = rest.next() {
            let fields = document.fields(node).ok()?;
            let Some(field) = fields.iter().find(|field| field.name == name) else {
                return key.map(|key| Found {
                    file,
                    key: Some(key),
                    node: None,
                    value: Value::Null,
                    whole: false,
                });
            };
            (key, node) = (Some(field.key), field.value);
            let resolved = document.resolve(node);
            if rest.peek().is_some() && !matches!(resolved.kind, Kind::Map { .. }) {
                return Some(Found {
                    file,
                    key,
                    node: Some(node),
                    value: Value::Null,
                    whole: true,
                });
            }
        }
        Some(Found {
            file,
            key,
            node: Some(node),
            value: document.value_at(node).ok()?,
            whole: true,
        })
    }
}

struct Found<'a> {
    file: usize,
    key: Option<&'a Node>,
    node: Option<&'a Node>,
    value: Value,
    /// Whether the whole path is there, and not only keys above it.
    whole: bool,
}

impl<'a> Found<'a> {
    fn at(&self) -> At<'a> {
        At {
            file: self.file,
            node: self.key,
        }
    }
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// An entry of hubble.metrics.dynamic.config.content, as hubble.metrics.enabled would have it.
fn as_static(entry: &Value) -> String {
    let mut text = entry["name"].as_str().unwrap_or_default().to_owned();
    let options = entry["contextOptions"].as_array().into_iter().flatten();
    for (index, option) in options.enumerate() {
        let separator = if index == 0 { ':' } else { ';' };
        let name = option["name"].as_str().unwrap_or_default();
        text.push_str(&format!(
            "{separator}{name}={}",
            texts(&option["values"]).join(",")
        ));
    }
    text
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

/// The lists of a file, and nulls, which are empty ones where an earlier file has a list.
fn collect_lists<'a>(
    document: &'a Document,
    node: &'a Node,
    path: &str,
    found: &mut Vec<(String, &'a Node, Vec<Value>)>,
) {
    for field in document.fields(node).unwrap_or_default() {
        let path = join(path, field.name);
        let resolved = document.resolve(field.value);
        match &resolved.kind {
            Kind::Map { .. } => collect_lists(document, field.value, &path, found),
            Kind::List { .. } => {
                let value = document.value_at(field.value).unwrap_or_default();
                found.push((
                    path,
                    field.key,
                    value.as_array().cloned().unwrap_or_default(),
                ));
            }
            _ if resolved.is_null() => found.push((path, field.value, Vec::new())),
            Kind::Scalar { .. } | Kind::Alias(_) => {}
        }
    }
}

/// Whether an item of an earlier list is in a later one.
fn kept(path: &str, item: &Value, later: &[Value]) -> bool {
    match item {
        Value::String(text) if path == METRICS => {
            let item = Metric::parse(text);
            let mut later = later.iter().filter_map(Value::as_str).map(Metric::parse);
            later.any(|other| other.name == item.name && other.lacks(&item).is_empty())
        }
        _ => later.contains(item),
    }
}

fn short(path: &str, item: &Value) -> String {
    match item {
        Value::String(text) => text.clone(),
        Value::Object(_) => crate::proof::identity(path, item),
        other => other.to_string(),
    }
}

fn holds_anchors(document: &Document, node: &Node) -> bool {
    if document.used(node).is_some() {
        return true;
    }
    match &node.kind {
        Kind::Map { entries, .. } => entries
            .iter()
            .any(|entry| holds_anchors(document, &entry.value)),
        Kind::List { items, .. } => items.iter().any(|item| holds_anchors(document, item)),
        Kind::Scalar { .. } | Kind::Alias(_) => false,
    }
}

/// The word that a typo was meant to be.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).clamp(1, 3);
    let distance = |other: &str| match other.eq_ignore_ascii_case(word) {
        true => 0,
        false => strsim::damerau_levenshtein(word, other),
    };
    let near = known.map(|other| (distance(other), other));
    near.filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, other)| other)
}

fn not_one_of(word: &str, words: &[&str]) -> String {
    let hint = match nearest(word, words.iter().copied()) {
        Some(near) => format!("; did you mean {near}?"),
        None => String::new(),
    };
    format!("{word:?} is none of {}{hint}", words.join(", "))
}

fn is_a(value: &Value, name: &str) -> bool {
    match (value, name) {
        (Value::Null, _) => true,
        (Value::Number(number), "integer") => number.as_f64().is_some_and(|n| n.fract() == 0.0),
        (Value::Bool(_), "boolean")
        | (Value::Number(_), "number")
        | (Value::String(_), "string")
        | (Value::Array(_), "array")
        | (Value::Object(_), "object") => true,
        _ => false,
    }
}

fn what(kind: &Kind) -> String {
    match kind {
        Kind::Scalar { value, .. } => match value {
            Value::Bool(_) => format!("the boolean {value}"),
            Value::Number(_) => format!("the number {value}"),
            Value::Null => "null".to_owned(),
            _ => format!("the text {value}"),
        },
        Kind::List { .. } => "a list".to_owned(),
        Kind::Map { .. } => "a map".to_owned(),
        Kind::Alias(_) => "an alias".to_owned(),
    }
}

fn article(types: &[String]) -> String {
    let word = |name: &String| match name.as_str() {
        "array" => "a list".to_owned(),
        "object" => "a map".to_owned(),
        "integer" => "a whole number".to_owned(),
        "null" => "null".to_owned(),
        "string" => "text".to_owned(),
        other => format!("a {other}"),
    };
    types.iter().map(word).collect::<Vec<_>>().join(" or ")
}
