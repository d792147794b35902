// SPDX-License-Identifier: Apache-2.0
//! Is a merged file what it has to be? By its values alone, whatever the edits were: nothing of the user's is lost, all of
//! ours is there, and nothing else came in.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    cilium::{METRICS, Metric},
    yaml::join,
};

/// By what an item of a list is the same as another one.
pub fn identity(path: &str, item: &Value) -> String {
    match item {
        Value::String(text) if path == METRICS => Metric::parse(text).name.to_owned(),
        // The same flag.
        Value::String(text) if text.starts_with('-') => match text.split_once('=') {
            Some((flag, _)) => flag.to_owned(),
            None => text.clone(),
        },
        // Hubble reads text, so a map is none of its metrics.
        Value::Object(_) if path == METRICS => item.to_string(),
        Value::Object(map) => {
            // A volume may be mounted twice, a path only once.
            let key = match path.ends_with("VolumeMounts") {
                true => "mountPath",
                false => "name",
            };
            match map.get(key) {
                Some(Value::String(name)) => name.clone(),
                _ => item.to_string(),
            }
        }
        other => other.to_string(),
    }
}

/// The path of an item, as messages and exceptions have it.
pub fn item_path(path: &str, identity: &str) -> String {
    format!("{path}[{identity}]")
}

/// Whether two values are the same kind of node.
fn alike(one: &Value, other: &Value) -> bool {
    let kind = |value: &Value| (value.is_object(), value.is_array());
    kind(one) == kind(other)
}

/// The first path of the user's that is not as it was. Nulls at `filled` may have become lists and maps.
pub fn lost(
    before: &Value,
    after: &Value,
    path: &str,
    filled: &BTreeSet<String>,
) -> Option<String> {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            before.iter().find_map(|(key, value)| match after.get(key) {
                Some(after) => lost(value, after, &join(path, key), filled),
                None => Some(join(path, key)),
            })
        }
        (Value::Array(before), Value::Array(after)) => {
            let kept = |(before, after): (&Value, &Value)| match (before, after) {
                (Value::String(before), Value::String(after)) if path == METRICS => {
                    let (before, after) = (Metric::parse(before), Metric::parse(after));
                    before.name == after.name && after.lacks(&before).is_empty()
                }
                _ => before == after,
            };
            let whole = after.len() >= before.len() && before.iter().zip(after).all(kept);
            (!whole).then(|| path.to_owned())
        }
        (Value::Null, _) if filled.contains(path) => None,
        _ => (before != after).then(|| path.to_owned()),
    }
}

/// The first path of ours that is not there. What the user decided otherwise (`kept`) need not be.
pub fn missing(ours: &Value, after: &Value, path: &str, kept: &BTreeSet<String>) -> Option<String> {
    if kept.contains(path) {
        return None;
    }
    match (ours, after) {
        (Value::Object(ours), Value::Object(after)) => ours.iter().find_map(|(key, value)| {
            let path = join(path, key);
            match after.get(key) {
                Some(after) => missing(value, after, &path, kept),
                None => (!kept.contains(&path)).then_some(path),
            }
        }),
        (Value::Array(ours), Value::Array(after)) => ours.iter().find_map(|item| {
            let name = identity(path, item);
            let there = after.iter().any(|after| match (item, after) {
                (Value::String(ours), Value::String(after)) if path == METRICS => {
                    let (ours, after) = (Metric::parse(ours), Metric::parse(after));
                    ours.name == after.name && after.lacks(&ours).is_empty()
                }
                _ => item == after,
            });
            let path = item_path(path, &name);
            (!there && !kept.contains(&path)).then_some(path)
        }),
        _ => (ours != after).then(|| path.to_owned()),
    }
}

/// The first path that is neither the user's nor ours.
pub fn foreign(
    after: &Value,
    before: Option<&Value>,
    ours: Option<&Value>,
    path: &str,
) -> Option<String> {
    let before = before.filter(|before| alike(before, after));
    let ours = ours.filter(|ours| alike(ours, after));
    match after {
        Value::Object(map) => map.iter().find_map(|(key, value)| {
            let path = join(path, key);
            let (before, ours) = (
                before.and_then(|v| v.get(key)),
                ours.and_then(|v| v.get(key)),
            );
            match (before, ours) {
                (None, None) => Some(path),
                _ => foreign(value, before, ours, &path),
            }
        }),
        Value::Array(items) => {
            let list = |value: Option<&Value>| {
                value.and_then(Value::as_array).cloned().unwrap_or_default()
            };
            let (before, ours) = (list(before), list(ours));
            if items.len() > before.len() + ours.len() {
                return Some(path.to_owned());
            }
            items.iter().find_map(|item| {
                let known = before.contains(item) || ours.contains(item);
                let united = path == METRICS && is_union(item, &before, &ours);
                (!known && !united).then(|| item_path(path, &identity(path, item)))
            })
        }
        _ => (Some(after) != before && Some(after) != ours).then(|| path.to_owned()),
    }
}

/// Whether an entry says what an entry of the user's and one of ours say, and no more.
fn is_union(item: &Value, before: &[Value], ours: &[Value]) -> bool {
    let Some(text) = item.as_str() else {
        return false;
    };
    let item = Metric::parse(text);
    let of = |list: &[Value]| -> Vec<String> {
        let texts = list.iter().filter_map(Value::as_str);
        texts
            .filter(|text| Metric::parse(text).name == item.name)
            .map(str::to_owned)
            .collect()
    };
    let (before, ours) = (of(before), of(ours));
    item.options.iter().all(|option| {
        let mut sources = before.iter().chain(&ours).map(|text| Metric::parse(text));
        let mut known = Vec::new();
        let there = sources.by_ref().fold(false, |there, source| {
            let own = source.option(option.name);
            known.extend(
                own.iter()
                    .flat_map(|own| own.values.iter().map(|v| (*v).to_owned())),
            );
            there || own.is_some()
        });
        there
            && option
                .values
                .iter()
                .all(|value| known.iter().any(|k| k == value))
    })
}
