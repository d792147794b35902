// SPDX-License-Identifier: Apache-2.0
//! How do our values come into a user's file without a byte of theirs being lost? Text is inserted at places that the
//! parser names, never rewritten; then the result is read again and has to be what [`proof`] wants, or nothing is written.

mod editor;
mod places;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde_json::{Value, json};

use self::{editor::Editor, places::hard};
use crate::{
    Failure,
    cilium::{self, METRICS, Metric, set_list},
    keys::Spec,
    proof,
    wanted::{Fate, Layer, Wanted, becomes, clash, differs, fate, stays, united, want_kind},
    yaml::{Document, Entry, Kind, Node, Problem, join, split},
};

/// A merged file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Its text.
    pub text: String,
    /// What the user may want to know, in the order of the file.
    pub notes: Vec<Note>,
    /// What of ours is in all files together, but for what notes say stays as it is.
    pub ours: Value,
}

/// What was left as it was, or changed within a line of the user's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// The file's number, in Helm's order.
    pub file: usize,
    /// From 1.
    pub line: usize,
    /// The path of the key.
    pub path: String,
    /// What was done, and what follows from it.
    pub text: String,
}

/// Text that goes in, and how many bytes (a word for null) go out for it.
#[derive(Clone, Debug)]
struct Edit {
    at: usize,
    remove: usize,
    text: String,
}

#[derive(Debug, Default)]
struct Plan {
    edits: Vec<Edit>,
    notes: BTreeSet<Note>,
    /// Paths where the user's word stands against ours.
    kept: BTreeSet<String>,
    /// Paths of nulls, and of empty ones, that became lists or maps.
    filled: BTreeSet<String>,
    /// Paths of what was written as `--set` has lists, and the list that it means.
    lists: BTreeMap<String, Vec<String>>,
}

/// Merges our values into the last of a user's files, which Helm gets in this order.
///
/// # Errors
///
/// [`Failure::Values`] and [`Failure::File`]: a place that cannot be edited without touching something else, and input that
/// Helm would not read as it is written.
pub fn merge(
    files: &[(PathBuf, String)],
    ours: &Value,
    keys: Option<&Spec>,
) -> Result<Merged, Failure> {
    let mut layers = Vec::new();
    for (name, text) in files {
        let broken = |problem| Failure::values(name, problem);
        let document = readable(text).map_err(broken)?;
        let mut value = document.values().map_err(broken)?;
        // The last file is edited, and says so.
        if layers.len() + 1 < files.len() {
            as_lists(&mut value, &document, text);
        }
        layers.push(Layer {
            name: name.clone(),
            document,
            value,
        });
    }
    let wanted = Wanted::of(&layers, ours, keys)?;
    // Without any there is nothing wanted either.
    let last = layers.len() - 1;
    let (name, text) = &files[last];
    let (text, mut notes) = into(text, &layers[last], &wanted, keys, last)
        .map_err(|problem| Failure::values(name, problem))?;
    notes.extend(wanted.notes);
    Ok(Merged {
        text,
        notes: notes.into_iter().collect(),
        ours: wanted.all,
    })
}

/// Takes a list of `--set` for what it means.
fn as_lists(value: &mut Value, document: &Document, text: &str) {
    let path = split(METRICS);
    if let (depth, Some(field)) = document.place(&path)
        && depth == path.len()
        && let Some(list) = set_list(field.value, text)
    {
        put(value, &path, &list);
    }
}

/// Puts a list in the place of what is at a path.
fn put(value: &mut Value, path: &[String], list: &[String]) {
    let place = path.iter().try_fold(value, |value, key| value.get_mut(key));
    if let Some(place) = place {
        *place = json!(list);
    }
}

/// Merges what is wanted into a file.
fn into(
    text: &str,
    layer: &Layer,
    wanted: &Wanted,
    keys: Option<&Spec>,
    file: usize,
) -> Result<(String, BTreeSet<Note>), Problem> {
    let ours = &wanted.last;
    let mut plan = plan(text, &layer.document, ours, keys, file)?;
    plan.kept.extend(wanted.kept.iter().cloned());
    let merged = applied(text, &plan.edits);

    let unsafe_at = |what: &str| {
        let (_, field) = layer.document.place(&split(what));
        let (line, column) = field.map_or((1, 1), |field| (field.key.line, field.key.column));
        Problem {
            line,
            column,
            message: format!(
                "{what} cannot be merged without touching more than was asked: merge it by hand"
            ),
        }
    };
    let after_document = Document::parse(&merged)
        .map_err(|problem| unsafe_at(&format!("the file ({})", problem.message)))?;
    let after = after_document.value()?;
    // What was written as a list of `--set` is the list that it means.
    let mut before = layer.value.clone();
    for (path, list) in &plan.lists {
        put(&mut before, &split(path), list);
    }
    let wrong = proof::lost(&before, &after, "", &plan.filled)
        .or_else(|| proof::missing(ours, &after, "", &plan.kept))
        .or_else(|| proof::foreign(&after, Some(&before), Some(ours), ""));
    if let Some(path) = wrong {
        return Err(unsafe_at(&path));
    }
    // What is merged stays as it is when it is merged again.
    if let Some(edit) = self::plan(&merged, &after_document, ours, keys, file)?
        .edits
        .first()
    {
        return Err(unsafe_at(edit.text.trim()));
    }
    Ok((merged, plan.notes))
}

fn readable(text: &str) -> Result<Document, Problem> {
    let document = Document::parse(text)?;
    if let Some(twice) = document.duplicates.first() {
        return Err(Problem {
            line: twice.line,
            column: twice.column,
            message: format!(
                "{} stands here and in line {}: Helm reads only this one; leave one",
                twice.path, twice.first
            ),
        });
    }
    Ok(document)
}

fn plan(
    text: &str,
    document: &Document,
    ours: &Value,
    keys: Option<&Spec>,
    file: usize,
) -> Result<Plan, Problem> {
    let mut editor = Editor {
        text,
        document,
        keys,
        file,
        eol: if text
            .split_inclusive('\n')
            .next()
            .is_some_and(|line| line.ends_with("\r\n"))
        {
            "\r\n"
        } else {
            "\n"
        },
        step: 2,
        indented_lists: false,
        shared: None,
        plan: Plan::default(),
    };
    if let Some(root) = &document.root {
        editor.measure(root);
    }
    match (&document.root, ours) {
        (Some(root), Value::Object(map)) if root.is_null() && !map.is_empty() => {
            if root.anchor.is_some() || root.tagged {
                return Err(hard(root, "the file"));
            }
            // With its line, if nothing else is on it.
            let line = text[root.span.end..].split_inclusive('\n').next();
            let line = line.unwrap_or_default();
            let next = root.span.end + line.len();
            let lines = editor.block(ours, 0);
            match line.trim().is_empty() {
                true => {
                    editor.lines_at(root.span.start, &lines);
                    editor.remove(root.span.start..next);
                }
                false => {
                    editor.remove(root.span.start..root.span.end);
                    editor.lines_at(document.end.max(next), &lines);
                }
            }
        }
        (Some(root), Value::Object(ours)) => editor.map(root, ours, "")?,
        (None, Value::Object(map)) if !map.is_empty() => {
            let lines = editor.block(ours, 0);
            editor.lines_at(document.end, &lines);
        }
        _ => {}
    }
    Ok(editor.plan)
}

fn applied(text: &str, edits: &[Edit]) -> String {
    let mut edits: Vec<&Edit> = edits.iter().collect();
    // Those at one place stay in their order, which is the inner map's before the outer one's.
    edits.sort_by_key(|edit| edit.at);
    let mut merged = String::new();
    let mut at = 0;
    for edit in edits {
        merged.push_str(&text[at..edit.at]);
        merged.push_str(&edit.text);
        at = edit.at + edit.remove;
    }
    merged.push_str(&text[at..]);
    merged
}
