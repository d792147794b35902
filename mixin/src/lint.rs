// SPDX-License-Identifier: Apache-2.0
//! What does Helm accept in a values file without a word? Keys that nobody reads, words that mean nothing, lists that a later
//! file replaces, and settings without which Chandra's rules and panels stay empty.

mod cilium;

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    Failure,
    cilium::{ENCRYPTION_TYPES, METRICS, Metric, set_list},
    keys::Spec,
    wanted::over,
    yaml::{Document, Kind, Node, join, joined, split},
};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
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
    /// What is wrong, and what happens.
    pub message: String,
    /// What to write instead.
    pub fix: String,
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
            fix,
        } = self;
        write!(
            out,
            "{}:{line}:{column}: {severity}: {path}: {message}; {fix}",
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
            "fix": self.fix,
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
    /// The name of the user's Prometheus Operator's release, if it was said.
    pub release: Option<&'a str>,
}

/// What stood right below `encryption.strictMode` before 1.19.
const OLD_STRICT_MODE: [&str; 3] = ["enabled", "cidr", "allowRemoteNodeIdentities"];

/// Judges files in the order in which Helm gets them.
///
/// # Errors
///
/// [`Failure::Values`] for what Helm cannot read.
pub fn lint(files: &[(PathBuf, String)], rules: Rules<'_>) -> Result<Vec<Finding>, Failure> {
    let mut documents = Vec::new();
    let mut all = json!({});
    for (file, text) in files {
        let broken = |problem| Failure::values(file, problem);
        let document = Document::parse(text).map_err(broken)?;
        all = over(&all, &document.values().map_err(broken)?);
        documents.push(document);
    }
    let mut linter = Linter {
        files,
        documents: &documents,
        all,
        rules,
        found: Vec::new(),
    };
    for index in 0..documents.len() {
        linter.file(index);
    }
    linter.replaced_lists();
    if rules.cilium {
        linter.cilium();
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
    /// All files together, as Helm lays them over each other.
    all: Value,
    rules: Rules<'a>,
    found: Vec<Finding>,
}

impl<'a> Linter<'a> {
    fn say(
        &mut self,
        at: At<'_>,
        severity: Severity,
        path: &str,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let (line, column) = at.node.map_or((1, 1), |node| (node.line, node.column));
        self.say_at(
            (at.file, line, column),
            severity,
            path,
            message.into(),
            fix.into(),
        );
    }

    fn say_at(
        &mut self,
        (file, line, column): (usize, usize, usize),
        severity: Severity,
        path: &str,
        message: String,
        fix: String,
    ) {
        self.found.push(Finding {
            file: self.files[file].0.clone(),
            line,
            column,
            severity,
            path: path.to_owned(),
            message,
            fix,
        });
    }

    fn file(&mut self, index: usize) {
        let document = &self.documents[index];
        for twice in &document.duplicates {
            self.say_at(
                (index, twice.line, twice.column),
                Severity::Error,
                &twice.path,
                format!(
                    "stands in line {} too, which Helm does not read",
                    twice.first
                ),
                "leave one of them".to_owned(),
            );
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
        let shown = joined(path);
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
                self.say(at, Severity::Error, &shown, message, "write a map");
            }
            (Spec::Leaf { types, words, .. }, kind) => {
                let value = document.value_at(node).unwrap_or_default();
                let word = At {
                    file,
                    node: Some(resolved),
                };
                if !types.is_empty() && !types.iter().any(|known| is_a(&value, known)) {
                    let message = format!(
                        "is {}, and the chart wants {}: Helm refuses it",
                        what(kind),
                        article(types)
                    );
                    let fix = match set_list(resolved, &self.files[file].1) {
                        Some(list) if types.iter().any(|known| known == "array") => {
                            format!("write {}", json!(list))
                        }
                        _ => format!("write {}", article(types)),
                    };
                    self.say(at, Severity::Error, &shown, message, fix);
                } else if let (Value::String(text), false) = (&value, words.is_empty())
                    && !words.contains(text)
                {
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    let message = not_one_of(text, &words);
                    self.say(word, Severity::Error, &shown, message, one_of(text, &words));
                } else if let (Value::String(text), true) =
                    (&value, self.rules.cilium && shown == "encryption.type")
                    && !ENCRYPTION_TYPES.contains(&text.as_str())
                {
                    let message = format!(
                        "{}, so nothing is encrypted",
                        not_one_of(text, &ENCRYPTION_TYPES)
                    );
                    let fix = one_of(text, &ENCRYPTION_TYPES);
                    self.say(word, Severity::Error, &shown, message, fix);
                }
                self.strict_mode(at, &shown, false);
            }
        }
    }

    /// The layout before 1.19.
    fn strict_mode(&mut self, at: At<'_>, path: &str, removed: bool) {
        let key = path.strip_prefix("encryption.strictMode.");
        let Some(key) = key.filter(|key| OLD_STRICT_MODE.contains(key)) else {
            return;
        };
        let (severity, message) = match removed {
            true => (
                Severity::Error,
                "was removed in 1.20 and renders to nothing, so nothing is strict",
            ),
            false => (
                Severity::Warning,
                "is deprecated in 1.19 and removed in 1.20",
            ),
        };
        let fix = format!("write encryption.strictMode.egress.{key}");
        self.say(at, severity, path, message, fix);
    }

    fn unknown(&mut self, file: usize, key: &Node, value: &Node, path: &[String]) {
        let document = &self.documents[file];
        // Helm gives `global` to every chart; a key that only holds anchors is meant for nobody.
        if path.len() == 1 && (path[0] == "global" || holds_anchors(document, value)) {
            return;
        }
        let shown = joined(path);
        let at = At {
            file,
            node: Some(key),
        };
        let key = shown.strip_prefix("encryption.strictMode.");
        if self.rules.cilium && key.is_some_and(|key| OLD_STRICT_MODE.contains(&key)) {
            return self.strict_mode(at, &shown, true);
        }
        let fix = match self.suggestion(path) {
            Some(path) => format!("did you mean {path}?"),
            None => "take it out, or look the key up in the chart's values.yaml".to_owned(),
        };
        self.say(
            at,
            Severity::Error,
            &shown,
            "the chart does not read this key",
            fix,
        );
    }

    fn suggestion(&self, path: &[String]) -> Option<String> {
        let (name, parents) = path.split_last()?;
        if let Some(Spec::Map(siblings)) = self.rules.keys.at(parents)
            && let Some(near) = nearest(name, siblings.keys().map(String::as_str))
        {
            let mut path = path.to_vec();
            *path.last_mut()? = near.to_owned();
            return Some(joined(&path));
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
        only.then(|| joined(best))
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
            // A null or another scalar takes a list's place too, or that of a map around it.
            for path in lists.keys() {
                if let (depth, Some(field)) = document.place(&split(path)) {
                    let kind = &document.resolve(field.value).kind;
                    if depth > 0 && matches!(kind, Kind::Scalar { .. }) {
                        own.push((path.clone(), field.key, Vec::new()));
                    }
                }
            }
            for (path, node, items) in own {
                let Some((from, line, earlier)) = lists.get(&path) else {
                    lists.insert(path, (file, node.line, items));
                    continue;
                };
                let lost = earlier.iter().filter(|item| !kept(&path, item, &items));
                let lost: Vec<String> = lost.map(|item| short(&path, item)).collect();
                if !lost.is_empty() {
                    let from = format!("{}:{line}", self.files[*from].0.display());
                    let last = path.rsplit('.').next().unwrap_or_default();
                    let severity = match path == METRICS || last.starts_with("extra") {
                        true => Severity::Error,
                        false => Severity::Warning,
                    };
                    let message = format!(
                        "replaces the list of {from} and loses {}: Helm does not merge lists",
                        lost.join(", ")
                    );
                    let at = At {
                        file,
                        node: Some(node),
                    };
                    self.say(at, severity, &path, message, "repeat it here");
                }
                lists.insert(path, (file, node.line, items));
            }
        }
    }

    fn is_true(&self, path: &str) -> bool {
        self.effective(path).value == Value::Bool(true)
    }

    /// What is in force at a path, and where that is written. Null on the way deletes everything below.
    fn effective(&self, path: &str) -> Found<'a> {
        let path = split(path);
        let mut value = Some(&self.all);
        for key in &path {
            value = match value {
                Some(Value::Object(map)) => map.get(key),
                // What is no map has nothing in it.
                Some(_) => Some(&Value::Null),
                None => None,
            };
        }
        let default = match self.rules.keys.at(&path) {
            Some(Spec::Leaf { default, .. }) => default.clone(),
            _ => Value::Null,
        };
        let places = self.documents.iter().enumerate();
        let deepest = places
            .map(|(file, document)| (document.place(&path), file))
            .max_by_key(|((depth, _), file)| (*depth, *file));
        let (file, key) = match deepest {
            Some(((depth, Some(field)), file)) if depth > 0 => (file, Some(field.key)),
            _ => (self.documents.len() - 1, None),
        };
        Found {
            file,
            key,
            set: value.is_some(),
            value: value.cloned().unwrap_or(default),
        }
    }
}

struct Found<'a> {
    file: usize,
    key: Option<&'a Node>,
    value: Value,
    /// Whether the files say so, and not the chart.
    set: bool,
}

impl<'a> Found<'a> {
    /// What is there, as messages begin.
    fn says(&self) -> String {
        let value = match &self.value {
            Value::String(text) if !text.is_empty() => text.clone(),
            other => other.to_string(),
        };
        match self.set {
            true => format!("is {value}"),
            false => format!("is not set, and the chart's default is {value}"),
        }
    }

    fn at(&self) -> At<'a> {
        At {
            file: self.file,
            node: self.key,
        }
    }
}

/// The lists of a file.
fn collect_lists<'a>(
    document: &'a Document,
    node: &'a Node,
    path: &str,
    found: &mut Vec<(String, &'a Node, Vec<Value>)>,
) {
    for field in document.fields(node).unwrap_or_default() {
        let path = join(path, field.name);
        match &document.resolve(field.value).kind {
            Kind::Map { .. } => collect_lists(document, field.value, &path, found),
            Kind::List { .. } => {
                let value = document.value_at(field.value).unwrap_or_default();
                let items = value.as_array().cloned().unwrap_or_default();
                found.push((path, field.key, items));
            }
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
    format!("{word:?} is none of {}", words.join(", "))
}

fn one_of(word: &str, words: &[&str]) -> String {
    match nearest(word, words.iter().copied()) {
        Some(near) => format!("did you mean {near}?"),
        None => "write one of them".to_owned(),
    }
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
