// SPDX-License-Identifier: Apache-2.0
//! What of ours has to stand in the last of a user's values files? What earlier files say counts too: Helm adds maps, and
//! replaces lists and whatever else a later file has.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Map, Value};

use crate::{
    Failure,
    cilium::{self, CONTENT, METRICS, Metric},
    keys::Spec,
    merge::Note,
    proof,
    yaml::{Document, join, joined, split},
};

/// One of the user's files, read.
#[derive(Debug)]
pub(crate) struct Layer {
    pub name: PathBuf,
    pub document: Document,
    pub value: Value,
}

/// What is to be added, and what the user may want to know of it.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// For the last file.
    pub last: Value,
    /// For all of them together.
    pub all: Value,
    pub notes: BTreeSet<Note>,
    /// Paths where the user's word stands against ours.
    pub kept: BTreeSet<String>,
}

/// Lays one file's values over those of the files before it, as Helm does.
pub fn over(earlier: &Value, later: &Value) -> Value {
    let (Value::Object(earlier), Value::Object(later)) = (earlier, later) else {
        return later.clone();
    };
    let mut both = earlier.clone();
    for (key, value) in later {
        let value = match both.get(key) {
            Some(earlier) => over(earlier, value),
            None => value.clone(),
        };
        both.insert(key.clone(), value);
    }
    Value::Object(both)
}

/// What an item of ours is to a list of the user's.
pub(crate) enum Fate {
    /// It is not there.
    New,
    /// It is there.
    Same,
    /// Its metric is there, and lacks this.
    Lacks(usize, Vec<(usize, String)>),
    /// Another one with its name is there, which differs in this.
    Differs(usize, Vec<String>),
}

pub(crate) fn fate(path: &str, have: &[Value], want: &Value) -> Fate {
    if have.contains(want) {
        return Fate::Same;
    }
    let name = proof::identity(path, want);
    let same = have
        .iter()
        .position(|item| proof::identity(path, item) == name);
    let Some(index) = same else {
        return Fate::New;
    };
    match (&have[index], want) {
        (Value::String(have), Value::String(want)) if path == METRICS => {
            match Metric::parse(have).lacks(&Metric::parse(want)) {
                lacks if lacks.is_empty() => Fate::Same,
                lacks => Fate::Lacks(index, lacks),
            }
        }
        (Value::Object(have), Value::Object(want)) => {
            let keys: BTreeSet<&String> = have.keys().chain(want.keys()).collect();
            let different = keys
                .into_iter()
                .filter(|key| have.get(*key) != want.get(*key));
            Fate::Differs(index, different.cloned().collect())
        }
        _ => Fate::Differs(index, vec!["its value".to_owned()]),
    }
}

/// What is said of a list with ours.
pub(crate) struct Remark {
    pub path: String,
    pub text: String,
    /// Whether the user's word stands against ours there.
    pub kept: bool,
}

/// A list of the user's with ours.
pub(crate) fn united(path: &str, have: &[Value], want: &[Value]) -> (Vec<Value>, Vec<Remark>) {
    let mut list = have.to_vec();
    let mut remarks = Vec::new();
    for want in want {
        match fate(path, &list, want) {
            Fate::New => list.push(want.clone()),
            Fate::Same => {}
            Fate::Lacks(index, lacks) => {
                let have = list[index].as_str().unwrap_or_default().to_owned();
                let united = cilium::inserted(&have, &lacks);
                remarks.push(Remark {
                    path: path.to_owned(),
                    text: becomes(&have, &united),
                    kept: false,
                });
                list[index] = Value::String(united);
            }
            Fate::Differs(_, different) => remarks.push(Remark {
                path: proof::item_path(path, &proof::identity(path, want)),
                text: differs(&different),
                kept: true,
            }),
        }
    }
    (list, remarks)
}

/// What is said of an item that stays as it is.
pub(crate) fn differs(different: &[String]) -> String {
    format!(
        "stays as it is; Chandra's differs in {}",
        different.join(", ")
    )
}

/// What is said of a metric that gets more options.
pub(crate) fn becomes(have: &str, united: &str) -> String {
    format!("{have} becomes {united}, which gives its series more labels")
}

/// What is said of a value that stays.
pub(crate) fn stays(value: &Value, want: &Value, path: &str) -> String {
    let null = match value.is_null() {
        true => " and deletes the chart's default",
        false => "",
    };
    let wanted = match want {
        Value::Object(_) | Value::Array(_) => want_kind(want).to_owned(),
        scalar => scalar.to_string(),
    };
    format!(
        "{value} stays{null} (Chandra has {wanted}): {}",
        cilium::consequence(path)
    )
}

/// Whether two values cannot both be right: Helm refuses text where the chart's schema has a boolean; any other word of the
/// user's is theirs.
pub(crate) fn clash(value: &Value, want: &Value) -> bool {
    !value.is_null()
        && (want.is_object() || want.is_array() || want.is_boolean() != value.is_boolean())
}

pub(crate) fn want_kind(value: &Value) -> &'static str {
    match value {
        Value::Object(_) => "a map",
        Value::Array(_) => "a list",
        Value::Bool(_) => "true or false",
        _ => "a scalar",
    }
}

impl Wanted {
    /// Finds out what the files leave to be added.
    ///
    /// # Errors
    ///
    /// A value of an earlier file that Helm refuses in the place of one of ours.
    pub(crate) fn of(layers: &[Layer], ours: &Value, keys: Option<&Spec>) -> Result<Self, Failure> {
        let Some((last, earlier)) = layers.split_last() else {
            return Err(Failure::Unknown("there is no values file".to_owned()));
        };
        let none = Value::Object(Map::new());
        let below = earlier
            .iter()
            .fold(none, |all, layer| over(&all, &layer.value));
        let theirs = over(&below, &last.value);
        let mut wanted = Self {
            last: Value::Null,
            all: ours.clone(),
            notes: BTreeSet::new(),
            kept: BTreeSet::new(),
        };
        wanted.dynamic(layers, &theirs);
        wanted.release(layers, &theirs);
        wanted.rules(layers, &theirs)?;
        wanted.last = wanted.all.clone();
        if let (Value::Object(below), Value::Object(mut rest)) = (&below, wanted.last.take()) {
            let empty = Map::new();
            let last = last.value.as_object().unwrap_or(&empty);
            wanted.above(&mut rest, below, last, "", &Above { earlier, keys })?;
            wanted.last = Value::Object(rest);
        }
        Ok(wanted)
    }

    fn note(&mut self, (file, line): (usize, usize), path: &str, text: String) {
        self.notes.insert(Note {
            file,
            line,
            path: path.to_owned(),
            text,
        });
    }

    /// The agent does not start with static and dynamic metrics, so to dynamic ones nothing is added.
    fn dynamic(&mut self, layers: &[Layer], theirs: &Value) {
        if theirs["hubble"]["metrics"]["dynamic"]["enabled"] != Value::Bool(true) {
            return;
        }
        let metrics = self.all.pointer_mut("/hubble/metrics");
        let Some(list) = metrics
            .and_then(Value::as_object_mut)
            .and_then(|map| map.remove("enabled"))
        else {
            return;
        };
        let entries = list.as_array().into_iter().flatten();
        let content: Vec<String> = entries
            .filter_map(Value::as_str)
            .map(cilium::as_dynamic)
            .collect();
        let path = ["hubble", "metrics", "dynamic", "enabled"];
        self.kept.insert(METRICS.to_owned());
        self.note(
            place(layers, &path),
            "hubble.metrics.dynamic.enabled",
            format!(
                "true stays, so nothing is added to {METRICS}: the agent refuses to start with both; put into {CONTENT}: {}",
                content.join(", ")
            ),
        );
    }

    /// Monitors of the user's have the label by which their operator selects.
    fn release(&mut self, layers: &[Layer], theirs: &Value) {
        let mut written = Vec::new();
        labels(theirs, &mut Vec::new(), &mut written);
        let names: BTreeSet<&str> = written.iter().map(|(_, name)| *name).collect();
        let (1, Some((path, name))) = (names.len(), written.first()) else {
            return;
        };
        let mut ours = Vec::new();
        labels(&self.all, &mut Vec::new(), &mut ours);
        let added: Vec<Vec<String>> = ours
            .into_iter()
            .filter(|(path, own)| own != name && !written.iter().any(|(other, _)| other == path))
            .map(|(path, _)| path)
            .collect();
        if added.is_empty() {
            return;
        }
        set_release(&mut self.all, name);
        let at = place(layers, path);
        for path in added {
            self.note(
                at,
                &joined(&path),
                format!("is {name}, as here: a Prometheus selects monitors by one label"),
            );
        }
    }

    /// kube-prometheus-stack ignores the list of rules as soon as the map is there.
    fn rules(&mut self, layers: &[Layer], theirs: &Value) -> Result<(), Failure> {
        let (list, map) = ("additionalPrometheusRules", "additionalPrometheusRulesMap");
        let items = theirs[list].as_array().cloned().unwrap_or_default();
        let Some(wanted) = self.all.get_mut(map).and_then(Value::as_object_mut) else {
            return Ok(());
        };
        if items.is_empty() {
            return Ok(());
        }
        let (file, line) = place(layers, &[list]);
        let mut items_by_name = Vec::new();
        for item in &items {
            let mut rest = item.as_object().cloned().unwrap_or_default();
            let Some(Value::String(name)) = rest.remove("name") else {
                return Err(Failure::bad(
                    &layers[file].name,
                    &format!(
                        "line {line}: {list} has an item without a name, and the chart ignores the list as soon as {map} is set: give it one"
                    ),
                ));
            };
            items_by_name.push((name, Value::Object(rest)));
        }
        let own = theirs[map].as_object().filter(|map| !map.is_empty());
        if let Some(own) = own {
            let mut dead = items_by_name;
            dead.retain(|(_, item)| !own.values().any(|other| other == item));
            if !dead.is_empty() {
                let names: Vec<String> = dead.into_iter().map(|(name, _)| name).collect();
                let names = names.join(", ");
                self.note(
                    (file, line),
                    list,
                    format!("the chart ignores it, since {map} is set: put {names} there"),
                );
            }
            return Ok(());
        }
        for (name, item) in items_by_name {
            // The list may have a name twice, or one of ours; a map has it once.
            let mut free = name.clone();
            let mut next = 2;
            while wanted.get(&free).is_some_and(|other| *other != item) {
                free = format!("{name}-{next}");
                next += 1;
            }
            wanted.insert(free, item);
        }
        self.note(
            (file, line),
            list,
            format!(
                "the chart ignores it as soon as {map} is set: what stands in it stands there too"
            ),
        );
        Ok(())
    }

    /// What is left for the last file above earlier ones.
    fn above(
        &mut self,
        rest: &mut Map<String, Value>,
        below: &Map<String, Value>,
        last: &Map<String, Value>,
        path: &str,
        files: &Above<'_>,
    ) -> Result<(), Failure> {
        let nothing = Map::new();
        let keys: Vec<String> = rest.keys().cloned().collect();
        for key in keys {
            let path = join(path, &key);
            let (Some(want), Some(have)) = (rest.get_mut(&key), below.get(&key)) else {
                continue;
            };
            let there = match (want, have, last.get(&key)) {
                (
                    Value::Object(want),
                    Value::Object(have),
                    last @ (None | Some(Value::Object(_))),
                ) => {
                    let last = last.and_then(Value::as_object).unwrap_or(&nothing);
                    self.above(want, have, last, &path, files)?;
                    want.is_empty()
                }
                // The last file's word counts.
                (_, _, Some(_)) => false,
                (Value::Array(want), Value::Array(have), None) => {
                    let place = files.place(&path);
                    let (united, remarks) = united(&path, have, want);
                    for remark in remarks {
                        self.note(place, &remark.path, remark.text);
                        self.kept.extend(remark.kept.then_some(remark.path));
                    }
                    let there = united == *have;
                    *want = united;
                    there
                }
                (Value::Object(_) | Value::Array(_), Value::Null, None)
                    if files.keys.is_some_and(|keys| keys.deletes_nothing(&path)) =>
                {
                    false
                }
                (want, have, None) if clash(have, want) => {
                    let (file, line) = files.place(&path);
                    return Err(Failure::bad(
                        &files.earlier[file].name,
                        &format!(
                            "line {line}: {path} is {have}, and the chart wants {}",
                            want_kind(want)
                        ),
                    ));
                }
                (want, have, None) => {
                    if want != have {
                        self.note(files.place(&path), &path, stays(have, want, &path));
                        self.kept.insert(path);
                    }
                    true
                }
            };
            if there {
                rest.remove(&key);
            }
        }
        Ok(())
    }
}

struct Above<'a> {
    earlier: &'a [Layer],
    keys: Option<&'a Spec>,
}

impl Above<'_> {
    fn place(&self, path: &str) -> (usize, usize) {
        place(self.earlier, &split(path))
    }
}

/// The last file that has a path, or the most of it, and the line of its key there.
fn place(layers: &[Layer], path: &[impl AsRef<str>]) -> (usize, usize) {
    let of = |(file, layer): (usize, &Layer)| {
        let (depth, field) = layer.document.place(path);
        (depth, file, field.map_or(1, |field| field.key.line))
    };
    let found = layers.iter().enumerate().map(of);
    let (_, file, line) = found.max().unwrap_or((0, 0, 1));
    (file, line)
}

/// The labels `release` of monitors, with their paths.
fn labels<'a>(value: &'a Value, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, &'a str)>) {
    let Value::Object(map) = value else {
        return;
    };
    for (key, value) in map {
        path.push(key.clone());
        match value["labels"]["release"].as_str() {
            Some(name) if key == "serviceMonitor" => {
                let of = ["labels", "release"].map(str::to_owned);
                found.push(([&path[..], &of].concat(), name));
            }
            _ => labels(value, path, found),
        }
        path.pop();
    }
}

/// Gives every monitor that has a label `release` another one.
pub fn set_release(values: &mut Value, name: &str) {
    let Value::Object(map) = values else {
        return;
    };
    for (key, value) in map {
        match value.pointer_mut("/labels/release") {
            Some(release) if key == "serviceMonitor" => *release = name.into(),
            _ => set_release(value, name),
        }
    }
}
