// SPDX-License-Identifier: Apache-2.0
//! Which keys does a chart read, of what types, with what defaults? Read from the chart itself (`chandra-mixin keys`), and
//! kept per version in `mixin/charts/`.
//!
//! A key is the chart's own if it stands in `values.yaml`, in `values.schema.json` or as `.Values.a.b` in a template:
//! Cilium's templates read some sixty keys that stand in neither of the files.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{
    Failure,
    yaml::{Document, split},
};

/// The key lists in this program: chart, version, list.
static EMBEDDED: [(&str, &str, &str); 2] = [
    ("cilium", "1.19", include_str!("../charts/cilium-1.19.json")),
    ("cilium", "1.20", include_str!("../charts/cilium-1.20.json")),
];

/// Kubernetes' own types, which templates pass on whole: their keys are not the chart's.
const PASSED_ON: [&str; 14] = [
    "affinity",
    "annotations",
    "labels",
    "livenessProbe",
    "matchLabels",
    "nodeSelector",
    "podLabels",
    "podSecurityContext",
    "readinessProbe",
    "resources",
    "seLinuxOptions",
    "securityContext",
    "startupProbe",
    "updateStrategy",
];

/// What a chart reads at a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Spec {
    /// A map with keys of the chart's.
    Map(BTreeMap<String, Spec>),
    /// A value, or a map for keys of the user's.
    Leaf {
        /// The types of the schema; any where there are none.
        types: Vec<String>,
        /// The chart's default.
        default: Value,
        /// The only words that the schema allows; any where there are none.
        words: Vec<String>,
    },
}

/// The versions of a chart whose key lists are here.
pub fn versions(chart: &str) -> Vec<&'static str> {
    let of = EMBEDDED.iter().filter(|(name, ..)| *name == chart);
    of.map(|(_, version, _)| *version).collect()
}

/// The key list of a chart at a version: `1.19`, or any patch release of it.
pub fn embedded(chart: &str, version: &str) -> Option<Spec> {
    let (_, _, text) = EMBEDDED.iter().find(|(name, known, _)| {
        let rest = version.trim_start_matches('v').strip_prefix(known);
        *name == chart && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
    })?;
    let list: Value = serde_json::from_str(text).expect("committed lists are JSON");
    Some(Spec::from_json(&list["keys"]))
}

impl Spec {
    fn any() -> Self {
        Self::Leaf {
            types: Vec::new(),
            default: Value::Null,
            words: Vec::new(),
        }
    }

    fn from_json(value: &Value) -> Self {
        let words = |value: &Value| -> Vec<String> {
            let list = value.as_array().into_iter().flatten();
            list.filter_map(|word| word.as_str().map(str::to_owned))
                .collect()
        };
        match value {
            Value::Object(map) => {
                let specs = map
                    .iter()
                    .map(|(key, value)| (key.clone(), Self::from_json(value)));
                Self::Map(specs.collect())
            }
            leaf => Self::Leaf {
                types: leaf[0]
                    .as_str()
                    .into_iter()
                    .flat_map(|types| types.split('|'))
                    .filter(|word| !word.is_empty())
                    .map(str::to_owned)
                    .collect(),
                default: leaf[1].clone(),
                words: words(&leaf[2]),
            },
        }
    }

    /// As `from_json` reads it: `["types joined by |", default, [words]]`, what is empty at the end left out.
    fn to_json(&self) -> Value {
        match self {
            Self::Map(map) => {
                let fields = map.iter().map(|(key, spec)| (key.clone(), spec.to_json()));
                Value::Object(fields.collect())
            }
            Self::Leaf {
                types,
                default,
                words,
            } => {
                let mut leaf = vec![json!(types.join("|")), default.clone(), json!(words)];
                if words.is_empty() {
                    leaf.pop();
                    if default.is_null() {
                        leaf.pop();
                        if types.is_empty() {
                            leaf.pop();
                        }
                    }
                }
                Value::Array(leaf)
            }
        }
    }

    /// Whether null at a path (`a.b.c`) is what the chart has there anyhow.
    pub fn deletes_nothing(&self, path: &str) -> bool {
        self.at(&split(path)).is_some_and(Self::is_empty)
    }

    /// The keys of a chart that has nothing at these paths, and of which no more is known.
    pub fn empty(paths: &[&[&str]]) -> Self {
        let mut spec = Self::Map(BTreeMap::new());
        for path in paths {
            spec.read_by_template(path);
        }
        spec
    }

    /// The spec at a path, if the chart has one. Below a map for the user's own keys there is none.
    pub fn at(&self, path: &[impl AsRef<str>]) -> Option<&Self> {
        match (self, path) {
            (_, []) => Some(self),
            (Self::Map(map), [key, rest @ ..]) => map.get(key.as_ref())?.at(rest),
            (Self::Leaf { .. }, _) => None,
        }
    }

    /// Whether the chart's default is nothing, so that `null` deletes nothing.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Map(map) => map.values().all(Self::is_empty),
            Self::Leaf { default, .. } => match default {
                Value::Null => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            },
        }
    }

    /// The paths of all keys of this name.
    pub fn paths_to(&self, name: &str) -> Vec<Vec<String>> {
        let Self::Map(map) = self else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (key, spec) in map {
            if key == name {
                found.push(vec![key.clone()]);
            }
            found.extend(spec.paths_to(name).into_iter().map(|mut path| {
                path.insert(0, key.clone());
                path
            }));
        }
        found
    }

    fn from_chart(name: &str, default: Option<&Value>, schema: &Value) -> Self {
        let properties = schema["properties"].as_object();
        let passed_on = PASSED_ON.contains(&name) || name.ends_with("Annotations");
        if let (Some(Value::Object(map)), false) = (default, passed_on)
            && !map.is_empty()
        {
            let mut specs: BTreeMap<String, Self> = BTreeMap::new();
            for (key, value) in map {
                specs.insert(
                    key.clone(),
                    Self::from_chart(key, Some(value), &schema["properties"][key]),
                );
            }
            for (key, schema) in properties.into_iter().flatten() {
                specs
                    .entry(key.clone())
                    .or_insert_with(|| Self::from_chart(key, None, schema));
            }
            return Self::Map(specs);
        }
        if let (None, Some(properties), false) = (default, properties, passed_on)
            && !properties.is_empty()
        {
            let specs = properties
                .iter()
                .map(|(key, schema)| (key.clone(), Self::from_chart(key, None, schema)));
            return Self::Map(specs.collect());
        }
        let mut types = Vec::new();
        let mut words = Vec::new();
        let alternatives = schema["oneOf"].as_array().or(schema["anyOf"].as_array());
        for schema in alternatives.into_iter().flatten().chain([schema]) {
            match &schema["type"] {
                Value::String(one) => types.push(one.clone()),
                Value::Array(many) => {
                    types.extend(many.iter().filter_map(Value::as_str).map(str::to_owned))
                }
                _ => {}
            }
            let listed = schema["enum"].as_array().into_iter().flatten();
            words.extend(listed.filter_map(Value::as_str).map(str::to_owned));
        }
        if !words.is_empty() && !types.iter().any(|known| known == "string") {
            types.push("string".to_owned());
        }
        types.sort();
        types.dedup();
        Self::Leaf {
            types,
            // What is in a map that is passed on says nothing about the keys of the chart.
            default: default.cloned().unwrap_or_default(),
            words,
        }
    }

    /// Adds a key that a template reads.
    fn read_by_template(&mut self, path: &[&str]) {
        if let (Self::Map(map), [key, rest @ ..]) = (self, path) {
            let spec = map.entry((*key).to_owned());
            match rest {
                [] => {
                    spec.or_insert_with(Self::any);
                }
                _ => spec
                    .or_insert_with(|| Self::Map(BTreeMap::new()))
                    .read_by_template(rest),
            }
        }
    }
}

/// The keys of a chart: of its folder, or of its `values.yaml` with what lies beside it.
///
/// # Errors
///
/// [`Failure::Io`] and [`Failure::Values`] for what cannot be read.
pub fn of_chart(path: &Path) -> Result<Spec, Failure> {
    let values = values_file(path)?;
    let folder = values.parent().unwrap_or(Path::new(""));
    let text = read(&values)?;
    let document = Document::parse(&text).map_err(|problem| Failure::values(&values, problem))?;
    let defaults = document
        .value()
        .map_err(|problem| Failure::values(&values, problem))?;
    if !defaults.is_object() || document.root.is_none() {
        return Err(Failure::bad(
            &values,
            "has no keys: is it a chart's values.yaml?",
        ));
    }
    let schema_file = folder.join("values.schema.json");
    let schema = match schema_file.is_file() {
        true => serde_json::from_str(&read(&schema_file)?)
            .map_err(|error| Failure::bad(&schema_file, &format!("is not JSON: {error}")))?,
        false => Value::Null,
    };
    let mut spec = Spec::from_chart("", Some(&defaults), &schema);
    for template in templates(&folder.join("templates"))? {
        // It reads keys to refuse them.
        if template.ends_with("validate.yaml") {
            continue;
        }
        // A chart's binary files are no templates.
        let Ok(text) = fs::read_to_string(&template) else {
            continue;
        };
        for (at, found) in text.match_indices(".Values.") {
            let rest = &text[at + found.len()..];
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
            let path = rest[..end.unwrap_or(rest.len())].trim_end_matches('.');
            let path: Vec<&str> = path.split('.').filter(|key| !key.is_empty()).collect();
            spec.read_by_template(&path);
        }
    }
    Ok(spec)
}

fn values_file(path: &Path) -> Result<PathBuf, Failure> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("tgz" | "gz") => Err(Failure::bad(
            path,
            "is an archive: unpack it, and name its folder",
        )),
        _ if path.is_dir() => Ok(path.join("values.yaml")),
        _ => Ok(path.to_owned()),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::io("read", path, error))
}

fn templates(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut found = Vec::new();
    if !folder.is_dir() {
        return Ok(found);
    }
    let entries = fs::read_dir(folder).map_err(|error| Failure::io("read", folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Failure::io("read", folder, error))?;
        // A link to a folder may lead back here.
        match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => found.extend(templates(&entry.path())?),
            false => found.push(entry.path()),
        }
    }
    Ok(found)
}

/// The list of a chart as it is committed: one key a line, with whose work it is.
///
/// # Errors
///
/// As [`of_chart`].
pub fn list(path: &Path) -> Result<String, Failure> {
    let spec = of_chart(path)?;
    let values = values_file(path)?;
    let about = values.with_file_name("Chart.yaml");
    let about = match about.is_file() {
        true => {
            let text = read(&about)?;
            let document =
                Document::parse(&text).map_err(|problem| Failure::values(&about, problem))?;
            document
                .value()
                .map_err(|problem| Failure::values(&about, problem))?
        }
        false => Value::Null,
    };
    let name = about["name"].as_str().unwrap_or("unknown");
    let mut text = format!(
        "{{\n\"chart\": {},\n\"version\": {},\n",
        json!(name),
        json!(about["version"])
    );
    let note = format!(
        "Keys, types and defaults of the {name} chart, from its values.yaml, values.schema.json and templates; under the chart's licence"
    );
    text.push_str(&format!("\"source\": {},\n", json!(note)));
    if name == "cilium" {
        text.push_str("\"license\": \"Apache-2.0, Copyright Authors of Cilium\",\n");
    }
    text.push_str("\"keys\": ");
    write(&spec.to_json(), 0, &mut text);
    text.push_str("\n}\n");
    Ok(text)
}

fn write(value: &Value, depth: usize, text: &mut String) {
    let Value::Object(map) = value else {
        text.push_str(&value.to_string());
        return;
    };
    let fields: Map<String, Value> = map.clone();
    text.push('{');
    for (index, (key, value)) in fields.iter().enumerate() {
        let comma = if index == 0 { "\n" } else { ",\n" };
        text.push_str(&format!("{comma}{}{}: ", " ".repeat(depth + 1), json!(key)));
        write(value, depth + 1, text);
    }
    text.push_str(&format!("\n{}}}", " ".repeat(depth)));
}
