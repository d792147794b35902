// SPDX-License-Identifier: Apache-2.0
//! The tree of jsonnet → the text of each file, checked on the way.

use std::{collections::BTreeMap, fs, path::Path};

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
    if let Some(problem) = tree["problems"].as_array().and_then(|list| list.first()) {
        let path = problem["path"].as_str().unwrap_or_default();
        let what = problem["problem"].as_str().unwrap_or_default();
        return Err(wrong_key(path, what, overrides));
    }
    let files = tree["files"]
        .as_object()
        .expect("outputs.libsonnet has files");
    for (path, file) in files {
        for (name, expr) in expressions(&file["yaml"]) {
            if let Err(why) = promql_parser::parser::parse(expr) {
                return Err(Failure::Config(Place {
                    message: format!("{path}: {name}: `{}` is not PromQL: {why}", expr.trim()),
                    file: overrides.unwrap_or(Path::new("")).to_owned(),
                    ..Place::default()
                }));
            }
        }
    }
    files
        .iter()
        .map(|(path, file)| Ok((path.clone(), text(file, files)?)))
        .collect()
}

/// The rules anywhere in a value: what each records or alerts, and its expression.
pub fn expressions(value: &Value) -> Vec<(&str, &str)> {
    match value {
        Value::Object(map) => {
            let name = map
                .get("record")
                .or(map.get("alert"))
                .and_then(Value::as_str);
            if let (Some(name), Some(expr)) = (name, map.get("expr").and_then(Value::as_str)) {
                return vec![(name, expr)];
            }
            map.values().flat_map(expressions).collect()
        }
        Value::Array(list) => list.iter().flat_map(expressions).collect(),
        _ => Vec::new(),
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
