// SPDX-License-Identifier: Apache-2.0
//! How do our values come into a user's file without a byte of theirs being lost? Text is inserted at places that the
//! parser names, never rewritten; then the result is read again and has to be what [`proof`] wants, or nothing is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use granit_parser::ScalarStyle;
use serde_json::{Map, Value, json};

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

struct Editor<'a> {
    text: &'a str,
    document: &'a Document,
    keys: Option<&'a Spec>,
    /// The file's number, for notes.
    file: usize,
    /// The file's line ending.
    eol: &'static str,
    /// The file's indentation, and whether its lists stand deeper than their keys.
    step: usize,
    indented_lists: bool,
    /// The anchor around the place, and a line that uses it.
    shared: Option<(String, usize)>,
    plan: Plan,
}

impl Editor<'_> {
    /// Finds out how the file is indented.
    fn measure(&mut self, root: &Node) {
        let mut step = None;
        let mut indented = None;
        self.styles(root, &mut step, &mut indented);
        self.step = step.unwrap_or(2);
        self.indented_lists = indented.unwrap_or(false);
    }

    fn styles(&self, node: &Node, step: &mut Option<usize>, indented: &mut Option<bool>) {
        let Kind::Map {
            flow: false,
            entries,
        } = &node.kind
        else {
            return;
        };
        for entry in entries {
            match &entry.value.kind {
                Kind::Map { flow: false, .. }
                    if entry.value.line > entry.key.line
                        && entry.value.column > entry.key.column =>
                {
                    step.get_or_insert(entry.value.column - entry.key.column);
                }
                Kind::List { flow: false, .. } => {
                    if let Some(dash) = self.dash(entry) {
                        indented.get_or_insert(self.column(dash) >= entry.key.column);
                    }
                }
                _ => {}
            }
            self.styles(&entry.value, step, indented);
        }
    }

    fn note(&mut self, line: usize, path: &str, text: String) {
        self.plan.notes.insert(Note {
            file: self.file,
            line,
            path: path.to_owned(),
            text,
        });
    }

    fn map(&mut self, node: &Node, ours: &Map<String, Value>, path: &str) -> Result<(), Problem> {
        let outer = self.shared.clone();
        if let Some((name, line)) = self.document.used(node) {
            self.shared = Some((name.to_owned(), line));
        }
        let mut added = Map::new();
        for (key, want) in ours {
            let path = join(path, key);
            let fields = self.document.fields(node)?;
            match fields.iter().find(|field| field.name == key) {
                None => {
                    added.insert(key.clone(), want.clone());
                }
                Some(field) => match field.entry {
                    Some(entry) => self.entry(node, entry, want, &path)?,
                    None => self.borrowed(field.value, want, &path)?,
                },
            }
        }
        if !added.is_empty() {
            self.insert_keys(node, &added)?;
        }
        self.shared = outer;
        Ok(())
    }

    fn entry(
        &mut self,
        parent: &Node,
        entry: &Entry,
        want: &Value,
        path: &str,
    ) -> Result<(), Problem> {
        let node = &entry.value;
        if let Kind::Alias(_) = node.kind {
            return self.alias(parent, entry, want, path);
        }
        // In a block, `[]` and `{}` become lines of their own.
        let empty = matches!(
            self.text.get(node.span.clone()),
            Some("[]" | "{}" | "[ ]" | "{ }")
        );
        let wanted = match want {
            Value::Object(want) => !want.is_empty() && matches!(node.kind, Kind::Map { .. }),
            Value::Array(want) => !want.is_empty() && matches!(node.kind, Kind::List { .. }),
            _ => false,
        };
        let written_out = node.anchor.is_none() && !node.tagged && !is_flow(parent);
        if empty && wanted && written_out && node.line == entry.key.line {
            return self.fill(parent, entry, want, path);
        }
        if let Value::Array(want) = want
            && let Some(list) = set_list(node, self.text)
        {
            return self.list_of_set(parent, entry, &list, want, path);
        }
        match (&node.kind, want) {
            (Kind::Map { .. }, Value::Object(want)) => self.map(node, want, path),
            (Kind::List { .. }, Value::Array(want)) => self.list(entry, want, path),
            (
                Kind::Scalar {
                    value: Value::Null, ..
                },
                Value::Object(_) | Value::Array(_),
            ) if self.keys.is_some_and(|keys| keys.deletes_nothing(path)) => {
                self.fill(parent, entry, want, path)
            }
            _ => self.scalar(node, want, path),
        }
    }

    /// A value of the user's against one of ours: theirs stays.
    fn scalar(&mut self, node: &Node, want: &Value, path: &str) -> Result<(), Problem> {
        let Kind::Scalar { value, .. } = &self.document.resolve(node).kind else {
            return Err(node.problem(&format!(
                "{path} is {}, and the chart wants {}",
                kind(node),
                want_kind(want)
            )));
        };
        if value == want {
            return Ok(());
        }
        if clash(value, want) {
            return Err(node.problem(&format!(
                "{path} is {value}, and the chart wants {}",
                want_kind(want)
            )));
        }
        self.plan.kept.insert(path.to_owned());
        self.note(node.line, path, stays(value, want, path));
        Ok(())
    }

    /// What came through an alias or a merge key cannot be edited here; it has to be enough as it is.
    fn borrowed(&mut self, node: &Node, want: &Value, path: &str) -> Result<(), Problem> {
        match (&self.document.resolve(node).kind, want) {
            (Kind::Map { .. }, Value::Object(want)) => {
                for (key, want) in want {
                    let path = join(path, key);
                    let fields = self.document.fields(node)?;
                    match fields.iter().find(|field| field.name == key) {
                        Some(field) => self.borrowed(field.value, want, &path)?,
                        None => return Err(node.problem(&format!("{path} has to be added, but the map comes from elsewhere: write it out here"))),
                    }
                }
                Ok(())
            }
            (Kind::Scalar { .. }, _) => self.scalar(node, want, path),
            _ => {
                let have = self.document.value_at(node)?;
                match proof::missing(want, &have, path, &self.plan.kept) {
                    None => Ok(()),
                    Some(path) => Err(node.problem(&format!("{path} has to be added, but the list comes from elsewhere: write it out here"))),
                }
            }
        }
    }

    /// `key: *name` becomes `key:`, `<<: *name` and what is missing.
    fn alias(
        &mut self,
        parent: &Node,
        entry: &Entry,
        want: &Value,
        path: &str,
    ) -> Result<(), Problem> {
        let node = &entry.value;
        let (Kind::Map { .. }, Value::Object(want)) = (&self.document.resolve(node).kind, want)
        else {
            return self.borrowed(node, want, path);
        };
        let mut added = Map::new();
        for (key, want) in want {
            let fields = self.document.fields(node)?;
            match fields.iter().find(|field| field.name == key) {
                Some(field) => self.borrowed(field.value, want, &join(path, key))?,
                None => {
                    added.insert(key.clone(), want.clone());
                }
            }
        }
        if added.is_empty() {
            return Ok(());
        }
        if is_flow(parent) {
            self.edit(node, node.span.start, "{<<: ".to_owned())?;
            let text = format!(", {}}}", flow_fields(&added));
            return self.edit(node, node.span.end, text);
        }
        let column = entry.key.column - 1 + self.step;
        let colon = self.colon(entry).ok_or_else(|| hard(&entry.key, path))?;
        let text = format!("{}{}<<:", self.eol, " ".repeat(column));
        self.edit(node, colon, text)?;
        let lines = self.block(&Value::Object(added), column);
        self.insert_lines(node, self.next_line(node.span.end), &lines)
    }

    /// A list or map in the place of null, or of an empty one.
    fn fill(
        &mut self,
        parent: &Node,
        entry: &Entry,
        want: &Value,
        path: &str,
    ) -> Result<(), Problem> {
        let node = &entry.value;
        if node.anchor.is_some() || node.tagged {
            return Err(hard(node, path));
        }
        let colon = self.colon(entry).ok_or_else(|| hard(&entry.key, path))?;
        self.plan.filled.insert(path.to_owned());
        if is_flow(parent) {
            let text = flow(want);
            if node.span.is_empty() {
                return self.edit(node, colon, format!(" {text}"));
            }
            self.edit(node, node.span.start, text)?;
            self.remove(node.span.start..node.span.end);
            return Ok(());
        }
        if !node.span.is_empty() {
            // The word, and the space in front of it: `enabled: ~ # why` becomes `enabled: # why`.
            let start = node.span.start - usize::from(self.text[..node.span.start].ends_with(' '));
            self.refuse_shared(node)?;
            self.remove(start..node.span.end);
        }
        let deeper = match want {
            Value::Array(_) if !self.indented_lists => 0,
            _ => self.step,
        };
        let lines = self.block(want, entry.key.column - 1 + deeper);
        self.insert_lines(node, self.next_line(colon.max(node.span.end)), &lines)
    }

    fn list(&mut self, entry: &Entry, want: &[Value], path: &str) -> Result<(), Problem> {
        let node = &entry.value;
        let Kind::List { items, .. } = &node.kind else {
            return Err(hard(node, path));
        };
        let outer = self.shared.clone();
        if let Some((name, line)) = self.document.used(node) {
            self.shared = Some((name.to_owned(), line));
        }
        let values: Vec<Value> = items
            .iter()
            .map(|item| self.document.value_at(item))
            .collect::<Result<_, _>>()?;
        if path == METRICS {
            self.entries(items, &values);
        }
        let mut added = Vec::new();
        for want in want {
            match fate(path, &values, want) {
                Fate::New => added.push(want.clone()),
                Fate::Same => {}
                Fate::Lacks(index, lacks) => {
                    self.metric(node, &items[index], &values[index], &lacks)?
                }
                Fate::Differs(index, different) => {
                    let path = proof::item_path(path, &proof::identity(path, want));
                    self.note(items[index].line, &path, differs(&different));
                    self.plan.kept.insert(path);
                }
            }
        }
        if !added.is_empty() {
            self.append(entry, &added, path)?;
        }
        self.shared = outer;
        Ok(())
    }

    /// Entries of hubble.metrics.enabled that the agent cannot take, which merging does not mend.
    fn entries(&mut self, items: &[Node], values: &[Value]) {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for (item, value) in items.iter().zip(values) {
            let Some(text) = value.as_str() else {
                let instead = match value["name"].is_string() {
                    true => format!("write {}", cilium::as_static(value)),
                    false => "an entry is text, as in drop:sourceContext=pod".to_owned(),
                };
                self.note(
                    item.line,
                    METRICS,
                    format!("what is no text stays, and Hubble cannot read it: {instead}"),
                );
                continue;
            };
            let name = Metric::parse(text).name;
            if let Some(first) = seen.insert(name, item.line) {
                self.note(
                    item.line,
                    METRICS,
                    format!("{name} stays here and in line {first}: Hubble registers it twice, and the agent stops; unite them"),
                );
            }
        }
    }

    /// `enabled: "{a,b}"`, which is what `--set` takes, becomes the list that it means.
    fn list_of_set(
        &mut self,
        parent: &Node,
        entry: &Entry,
        list: &[String],
        want: &[Value],
        path: &str,
    ) -> Result<(), Problem> {
        let have: Vec<Value> = list.iter().map(|text| json!(text)).collect();
        let (united, remarks) = united(path, &have, want);
        let line = entry.value.line;
        self.note(
            line,
            path,
            "was a list as --set has them, which Helm refuses here, and is one of YAML now"
                .to_owned(),
        );
        for remark in remarks {
            self.note(line, &remark.path, remark.text);
            self.plan.kept.extend(remark.kept.then_some(remark.path));
        }
        self.plan.lists.insert(path.to_owned(), list.to_vec());
        self.fill(parent, entry, &Value::Array(united), path)
    }

    /// The options of one metric, united within its line.
    fn metric(
        &mut self,
        list: &Node,
        item: &Node,
        have: &Value,
        insertions: &[(usize, String)],
    ) -> Result<(), Problem> {
        let have = have.as_str().unwrap_or_default();
        let name = Metric::parse(have).name;
        let united = cilium::inserted(have, insertions);
        let by_hand = || {
            item.problem(&format!(
                "{METRICS}: write {name} as {united:?} in one line"
            ))
        };
        let (quote, written) = match &item.kind {
            Kind::Scalar {
                style: ScalarStyle::Plain,
                ..
            } => (0, self.text.get(item.span.clone())),
            Kind::Scalar {
                style: ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted,
                ..
            } => (1, self.text.get(item.span.start + 1..item.span.end - 1)),
            // A block of one line, below its header.
            Kind::Scalar {
                style: ScalarStyle::Literal | ScalarStyle::Folded,
                ..
            } => {
                let block = self.text.get(item.span.clone()).unwrap_or_default();
                let indent = block.len() - block.trim_start().len();
                (indent, Some(block.trim()))
            }
            _ => return Err(by_hand()),
        };
        if written != Some(have) {
            return Err(by_hand());
        }
        // A comma ends what is not quoted in brackets.
        let wrap = quote == 0 && is_flow(list);
        if wrap {
            self.edit(item, item.span.start, "\"".to_owned())?;
        }
        for (at, text) in insertions {
            self.edit(item, item.span.start + quote + at, text.clone())?;
        }
        if wrap {
            self.edit(item, item.span.end, "\"".to_owned())?;
        }
        self.note(item.line, METRICS, becomes(have, &united));
        Ok(())
    }

    fn append(&mut self, entry: &Entry, added: &[Value], path: &str) -> Result<(), Problem> {
        let node = &entry.value;
        let Kind::List { flow, items } = &node.kind else {
            return Err(hard(node, path));
        };
        if *flow {
            let texts: Vec<String> = added.iter().map(self::flow).collect();
            return match items.last() {
                None => self.edit(node, node.span.start + 1, texts.join(", ")),
                Some(last) => self.edit(
                    node,
                    last.span.end.max(last.span.start),
                    format!(", {}", texts.join(", ")),
                ),
            };
        }
        let (Some(last), Some(dash)) = (items.last(), self.dash(entry)) else {
            return Err(hard(node, path));
        };
        let column = self.column(dash);
        let lines = self.block(&Value::Array(added.to_vec()), column);
        let mut at = self.end_line(last, dash + 1);
        // Comments as deep as the items are theirs, unless the next key stands as deep.
        if column >= entry.key.column {
            at = self.after_comments(at, column);
        }
        self.insert_lines(node, at, &lines)
    }

    fn insert_keys(&mut self, node: &Node, added: &Map<String, Value>) -> Result<(), Problem> {
        let Kind::Map { flow, entries } = &node.kind else {
            return Err(hard(node, "a map"));
        };
        if *flow {
            let text = flow_fields(added);
            return match entries.last() {
                None => self.edit(node, node.span.start + 1, text),
                Some(last) => {
                    let end = match last.value.span.is_empty() {
                        true => self.colon(last).unwrap_or(last.key.span.end),
                        false => last.value.span.end,
                    };
                    self.edit(node, end, format!(", {text}"))
                }
            };
        }
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Err(hard(node, "a map"));
        };
        // A question mark or an anchor may stand before the first key.
        let before = self.column(first.key.span.start);
        let start = first.key.span.start;
        let line = self.text[..start].rfind('\n').map_or(0, |end| end + 1);
        let mark = self.text[line..start].trim_start_matches([' ', '-', '\u{feff}']);
        let column = before - mark.chars().count();
        let lines = self.block(&Value::Object(added.clone()), column);
        let whole = self
            .document
            .root
            .as_ref()
            .is_some_and(|root| root.span == node.span && root.line == node.line);
        let at = match whole && column == 0 {
            // What follows the last key of the file is the file's.
            true => self.document.end,
            false => {
                let colon = self.colon(last).unwrap_or(last.key.span.end);
                self.after_comments(self.end_line(&last.value, colon), column)
            }
        };
        self.insert_lines(node, at, &lines)
    }

    /// YAML in block style, at a column.
    fn block(&self, value: &Value, column: usize) -> Vec<String> {
        let options = serde_saphyr::ser_options! {
            folded_wrap_chars: 1_000_000,
            indent_step: self.step,
            compact_list_indent: !self.indented_lists,
        };
        let text = serde_saphyr::to_string_with_options(value, options).unwrap_or_default();
        let indent = " ".repeat(column);
        let line = |line: &str| match line.is_empty() {
            true => String::new(),
            false => format!("{indent}{line}"),
        };
        text.lines().map(line).collect()
    }

    fn insert_lines(&mut self, node: &Node, at: usize, lines: &[String]) -> Result<(), Problem> {
        self.refuse_shared(node)?;
        self.lines_at(at, lines);
        Ok(())
    }

    fn lines_at(&mut self, at: usize, lines: &[String]) {
        let lines = lines.join(self.eol);
        let before = &self.text[..at];
        let text = match before.is_empty() || before.ends_with('\n') || before == "\u{feff}" {
            true => format!("{lines}{}", self.eol),
            // The last line of a file that does not end in a line break.
            false => format!("{}{lines}", self.eol),
        };
        self.plan.edits.push(Edit {
            at,
            remove: 0,
            text,
        });
    }

    fn edit(&mut self, node: &Node, at: usize, text: String) -> Result<(), Problem> {
        self.refuse_shared(node)?;
        self.plan.edits.push(Edit {
            at,
            remove: 0,
            text,
        });
        Ok(())
    }

    fn remove(&mut self, range: std::ops::Range<usize>) {
        self.plan.edits.push(Edit {
            at: range.start,
            remove: range.len(),
            text: String::new(),
        });
    }

    fn refuse_shared(&self, node: &Node) -> Result<(), Problem> {
        match &self.shared {
            None => Ok(()),
            Some((name, line)) => Err(node.problem(&format!(
                "what has to be added here would come into line {line} too, which uses the anchor &{name}: write that line out"
            ))),
        }
    }

    /// The byte after the colon of an entry.
    fn colon(&self, entry: &Entry) -> Option<usize> {
        let after = &self.text[entry.key.span.end..];
        let blanks = after.len() - after.trim_start_matches([' ', '\t']).len();
        after[blanks..]
            .starts_with(':')
            .then_some(entry.key.span.end + blanks + 1)
    }

    /// The byte of the first dash of a block list.
    fn dash(&self, entry: &Entry) -> Option<usize> {
        let mut at = self.colon(entry)?;
        loop {
            let rest = &self.text[at..];
            let first = rest.chars().next()?;
            at += match first {
                '-' => return Some(at),
                '#' => rest.find('\n')?,
                '&' | '!' => rest.find(char::is_whitespace)?,
                _ if first.is_whitespace() => first.len_utf8(),
                _ => return None,
            };
        }
    }

    /// The column of a byte, from 0.
    fn column(&self, at: usize) -> usize {
        let line = self.text[..at].rfind('\n').map_or(0, |end| end + 1);
        self.text[line..at]
            .trim_start_matches('\u{feff}')
            .chars()
            .count()
    }

    /// The start of the line after the one of a byte, or the end of the document.
    fn next_line(&self, at: usize) -> usize {
        let end = self.text[at..]
            .find('\n')
            .map_or(self.text.len(), |end| at + end + 1);
        end.min(self.document.end.max(at))
    }

    /// The start of the line after a node. Where nothing is written its value ends at `nothing`.
    fn end_line(&self, node: &Node, nothing: usize) -> usize {
        match &node.kind {
            Kind::Map {
                flow: false,
                entries,
            } => match entries.last() {
                Some(last) => {
                    self.end_line(&last.value, self.colon(last).unwrap_or(last.key.span.end))
                }
                None => self.next_line(nothing),
            },
            Kind::List { flow: false, items } => match items.last() {
                // A dash with nothing after it is on the line of the empty node.
                Some(last) => self.end_line(last, last.span.start),
                None => self.next_line(nothing),
            },
            Kind::Scalar {
                style: ScalarStyle::Literal | ScalarStyle::Folded,
                ..
            } => self.end_of_block(node, nothing),
            _ if node.span.is_empty() => self.next_line(nothing.max(node.span.start)),
            _ => self.next_line(node.span.end),
        }
    }

    fn end_of_block(&self, node: &Node, nothing: usize) -> usize {
        let text = &self.text[node.span.clone()];
        let header = self.text[..node.span.start]
            .rfind(['|', '>'])
            .unwrap_or(node.span.start);
        let keeps = self.text[header..]
            .chars()
            .skip(1)
            .take_while(|c| "+-0123456789".contains(*c))
            .any(|c| c == '+');
        let written = text.trim_end().len();
        match (keeps, written) {
            // Empty lines after it are its own.
            (true, _) => {
                let line = self.text[..node.span.end]
                    .rfind('\n')
                    .map_or(0, |end| end + 1);
                match self.text[line..node.span.end].trim().is_empty() {
                    true => line.max(self.next_line(node.span.start.min(node.span.end))),
                    false => self.next_line(node.span.end),
                }
            }
            (false, 0) => self.next_line(nothing),
            (false, written) => self.next_line(node.span.start + written),
        }
    }

    /// Past the comments right below that are as deep as a column.
    fn after_comments(&self, mut at: usize, column: usize) -> usize {
        while at < self.document.end {
            let line = self.text[at..]
                .split_inclusive('\n')
                .next()
                .unwrap_or_default();
            let indent = line.len() - line.trim_start_matches(' ').len();
            if indent < column || !line[indent..].starts_with('#') {
                break;
            }
            at += line.len();
        }
        at
    }
}

fn hard(node: &Node, path: &str) -> Problem {
    node.problem(&format!(
        "{path} is written in a way that cannot be added to: write it in block style"
    ))
}

fn is_flow(node: &Node) -> bool {
    matches!(
        node.kind,
        Kind::Map { flow: true, .. } | Kind::List { flow: true, .. }
    )
}

fn kind(node: &Node) -> &'static str {
    match node.kind {
        Kind::Scalar { .. } => "a scalar",
        Kind::List { .. } => "a list",
        Kind::Map { .. } => "a map",
        Kind::Alias(_) => "an alias",
    }
}

/// In one line, for places inside of brackets.
fn flow(value: &Value) -> String {
    match value {
        Value::Object(map) => format!("{{{}}}", flow_fields(map)),
        Value::Array(list) => format!(
            "[{}]",
            list.iter().map(self::flow).collect::<Vec<_>>().join(", ")
        ),
        // JSON is YAML.
        other => other.to_string(),
    }
}

fn flow_fields(map: &Map<String, Value>) -> String {
    let fields = map
        .iter()
        .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), flow(value)));
    fields.collect::<Vec<_>>().join(", ")
}
