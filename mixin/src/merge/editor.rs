// SPDX-License-Identifier: Apache-2.0
//! What of ours goes where in a user's file, and what does not?

use granit_parser::ScalarStyle;
use serde_json::{Map, Value};

use super::{
    places::{flow, flow_fields, hard, is_flow, kind},
    *,
};

/// A file that is edited.
pub(super) struct Editor<'a> {
    pub(super) text: &'a str,
    pub(super) document: &'a Document,
    pub(super) keys: Option<&'a Spec>,
    /// The file's number, for notes.
    pub(super) file: usize,
    /// The file's line ending.
    pub(super) eol: &'static str,
    /// The file's indentation, and whether its lists stand deeper than their keys.
    pub(super) step: usize,
    pub(super) indented_lists: bool,
    /// The anchor around the place, and a line that uses it.
    pub(super) shared: Option<(String, usize)>,
    pub(super) plan: Plan,
}

impl Editor<'_> {
    /// Finds out how the file is indented.
    pub(super) fn measure(&mut self, root: &Node) {
        let mut step = None;
        let mut indented = None;
        self.styles(root, &mut step, &mut indented);
        self.step = step.unwrap_or(2);
        self.indented_lists = indented.unwrap_or(false);
    }

    pub(super) fn styles(
        &self,
        node: &Node,
        step: &mut Option<usize>,
        indented: &mut Option<bool>,
    ) {
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

    pub(super) fn note(&mut self, line: usize, path: &str, text: String) {
        self.plan.notes.insert(Note {
            file: self.file,
            line,
            path: path.to_owned(),
            text,
        });
    }

    pub(super) fn map(
        &mut self,
        node: &Node,
        ours: &Map<String, Value>,
        path: &str,
    ) -> Result<(), Problem> {
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

    pub(super) fn entry(
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
    pub(super) fn scalar(&mut self, node: &Node, want: &Value, path: &str) -> Result<(), Problem> {
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
    pub(super) fn borrowed(
        &mut self,
        node: &Node,
        want: &Value,
        path: &str,
    ) -> Result<(), Problem> {
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
    pub(super) fn alias(
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
    pub(super) fn fill(
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

    pub(super) fn list(
        &mut self,
        entry: &Entry,
        want: &[Value],
        path: &str,
    ) -> Result<(), Problem> {
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
    pub(super) fn entries(&mut self, items: &[Node], values: &[Value]) {
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
    pub(super) fn list_of_set(
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
    pub(super) fn metric(
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
}
