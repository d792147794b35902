// SPDX-License-Identifier: Apache-2.0
//! The tree of jsonnet → the text of each file, checked on the way.

use std::{collections::BTreeMap, fs, path::Path};

use promql_parser::util::parse_duration;
use serde_json::{Map, Value};

use crate::{Failure, Place, jsonnet};

/// Stands in every YAML file that is generated, and only there: what has it and is not rendered any more is removed.
pub const MARK: &str = "# Generated from mixin/ by chandra-mixin; do not edit.";

/// The tag that every dashboard has, for the same end: JSON has no comments.
pub const TAG: &str = "chandra-mixin";

/// All files: their path below the output folder, and their text.
///
/// # Errors
///
/// As [`jsonnet::evaluate`], and [`Failure::Config`] for overrides with unknown keys, keys of another type, or from which
/// follows an expression that is not PromQL.
pub fn files(overrides: Option<&Path>) -> Result<BTreeMap<String, String>, Failure> {
    from_tree(&jsonnet::evaluate(overrides)?, overrides)
}

fn from_tree(tree: &Value, overrides: Option<&Path>) -> Result<BTreeMap<String, String>, Failure> {
    let files = checked(tree, overrides)?;
    files
        .iter()
        .map(|(path, file)| Ok((path.clone(), text(file, files)?)))
        .collect()
}

/// What a YAML file holds, before it is text.
///
/// # Errors
///
/// As [`files`].
pub fn values(path: &str, overrides: Option<&Path>) -> Result<Value, Failure> {
    let alone = format!("{{ '{path}': outputs.files['{path}'] }}");
    let tree = jsonnet::evaluate_some(overrides, &alone)?;
    let files = checked(&tree, overrides)?;
    if !refers(&files[path]["yaml"]) {
        return Ok(files[path]["yaml"].clone());
    }
    let tree = jsonnet::evaluate(overrides)?;
    let files = checked(&tree, overrides)?;
    Ok(resolved(&files[path]["yaml"], files))
}

/// Whether a value takes something from another file.
fn refers(value: &Value) -> bool {
    match value {
        Value::Object(map) => {
            map.contains_key("$ref") || map.contains_key("$text") || map.values().any(refers)
        }
        Value::Array(list) => list.iter().any(refers),
        _ => false,
    }
}

fn checked<'a>(
    tree: &'a Value,
    overrides: Option<&Path>,
) -> Result<&'a Map<String, Value>, Failure> {
    if let Some(problem) = tree["problems"].as_array().and_then(|list| list.first()) {
        let path = problem["path"].as_str().unwrap_or_default();
        let what = problem["problem"].as_str().unwrap_or_default();
        return Err(wrong_key(path, what, overrides));
    }
    let files = tree["files"]
        .as_object()
        .expect("outputs.libsonnet has files");
    for (path, file) in files {
        for rule in rules(&file["yaml"]) {
            check(rule).map_err(|why| {
                Failure::Config(Place {
                    message: format!("{path}: {}: {why}", rule.name),
                    file: overrides.unwrap_or(Path::new("")).to_owned(),
                    ..Place::default()
                })
            })?;
        }
    }
    Ok(files)
}

/// A recording or alerting rule.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// What it records or alerts.
    pub name: &'a str,
    /// The whole rule.
    pub body: &'a Value,
}

/// The rules anywhere in a value.
pub fn rules(value: &Value) -> Vec<Rule<'_>> {
    match value {
        Value::Object(map) => match map.get("record").or(map.get("alert")) {
            Some(Value::String(name)) => vec![Rule { name, body: value }],
            _ => map.values().flat_map(rules).collect(),
        },
        Value::Array(list) => list.iter().flat_map(rules).collect(),
        _ => Vec::new(),
    }
}

/// Refuses what Prometheus would refuse to load.
fn check(rule: Rule<'_>) -> Result<(), String> {
    let expr = rule.body["expr"].as_str().unwrap_or_default();
    promql_parser::parser::parse(expr)
        .map_err(|why| format!("`{}` is not PromQL: {why}", expr.trim()))?;
    match rule.body["for"]
        .as_str()
        .map(|text| (text, parse_duration(text)))
    {
        Some((text, Err(_))) => Err(format!("`{text}` is not a duration")),
        _ => Ok(()),
    }
}

/// Finds the key in the user's file, if it is written there as a word of its own.
fn wrong_key(path: &str, what: &str, overrides: Option<&Path>) -> Failure {
    let mut place = Place {
        message: format!("{path}: {what}")
            .trim_start_matches(": ")
            .to_owned(),
        file: overrides.unwrap_or(Path::new("")).to_owned(),
        ..Place::default()
    };
    let key = path.rsplit('.').next().unwrap_or_default();
    let text = overrides.and_then(|path| fs::read_to_string(path).ok());
    for (index, line) in text.iter().flat_map(|text| text.lines()).enumerate() {
        let found = line.match_indices(key).find(|(at, _)| {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let rest = line[at + key.len()..].trim_start_matches(['\'', '"', ' ']);
            !key.is_empty()
                && !line[..*at].ends_with(word)
                && (rest.starts_with(':') || rest.starts_with("+:"))
        });
        if let Some((at, _)) = found {
            place.position = Some((index + 1, line[..at].chars().count() + 1));
            place.line = line.to_owned();
            break;
        }
    }
    Failure::Config(place)
}

fn text(file: &Value, files: &Map<String, Value>) -> Result<String, Failure> {
    if let Some(json) = file.get("json") {
        return Ok(pretty(json));
    }
    let mut text = format!("{MARK}\n");
    for line in file["comment"].as_str().unwrap_or_default().lines() {
        text.push_str(format!("# {line}").trim_end());
        text.push('\n');
    }
    // A long line stays one line: folding it would change nothing but what a diff shows.
    let options = serde_saphyr::ser_options! { folded_wrap_chars: 1_000_000 };
    text.push_str(&serde_saphyr::to_string_with_options(
        &resolved(&file["yaml"], files),
        options,
    )?);
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn pretty(json: &Value) -> String {
    let mut text = serde_json::to_string_pretty(json).expect("a JSON value");
    text.push('\n');
    text
}

/// Replaces each `{ "$ref": path }` by the value of that file, and each `{ "$text": path }` by its text.
fn resolved(value: &Value, files: &Map<String, Value>) -> Value {
    let of = |reference: &Value| &files[reference.as_str().expect("references are paths")];
    match value {
        Value::Object(map) => match (map.get("$ref"), map.get("$text")) {
            (Some(path), _) => of(path)["yaml"].clone(),
            (_, Some(path)) => Value::String(pretty(&of(path)["json"])),
            _ => {
                let fields = map.iter();
                Value::Object(
                    fields
                        .map(|(key, value)| (key.clone(), resolved(value, files)))
                        .collect(),
                )
            }
        },
        Value::Array(list) => {
            Value::Array(list.iter().map(|value| resolved(value, files)).collect())
        }
        other => other.clone(),
    }
}
