// SPDX-License-Identifier: Apache-2.0
//! At which byte is something put into a file, and how is it written there?

use granit_parser::ScalarStyle;
use serde_json::{Map, Value};

use super::*;

impl Editor<'_> {
    pub(super) fn append(
        &mut self,
        entry: &Entry,
        added: &[Value],
        path: &str,
    ) -> Result<(), Problem> {
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

    pub(super) fn insert_keys(
        &mut self,
        node: &Node,
        added: &Map<String, Value>,
    ) -> Result<(), Problem> {
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
    pub(super) fn block(&self, value: &Value, column: usize) -> Vec<String> {
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

    pub(super) fn insert_lines(
        &mut self,
        node: &Node,
        at: usize,
        lines: &[String],
    ) -> Result<(), Problem> {
        self.refuse_shared(node)?;
        self.lines_at(at, lines);
        Ok(())
    }

    pub(super) fn lines_at(&mut self, at: usize, lines: &[String]) {
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

    pub(super) fn edit(&mut self, node: &Node, at: usize, text: String) -> Result<(), Problem> {
        self.refuse_shared(node)?;
        self.plan.edits.push(Edit {
            at,
            remove: 0,
            text,
        });
        Ok(())
    }

    pub(super) fn remove(&mut self, range: std::ops::Range<usize>) {
        self.plan.edits.push(Edit {
            at: range.start,
            remove: range.len(),
            text: String::new(),
        });
    }

    pub(super) fn refuse_shared(&self, node: &Node) -> Result<(), Problem> {
        match &self.shared {
            None => Ok(()),
            Some((name, line)) => Err(node.problem(&format!(
                "what has to be added here would come into line {line} too, which uses the anchor &{name}: write that line out"
            ))),
        }
    }

    /// The byte after the colon of an entry.
    pub(super) fn colon(&self, entry: &Entry) -> Option<usize> {
        let after = &self.text[entry.key.span.end..];
        let blanks = after.len() - after.trim_start_matches([' ', '\t']).len();
        after[blanks..]
            .starts_with(':')
            .then_some(entry.key.span.end + blanks + 1)
    }

    /// The byte of the first dash of a block list.
    pub(super) fn dash(&self, entry: &Entry) -> Option<usize> {
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
    pub(super) fn column(&self, at: usize) -> usize {
        let line = self.text[..at].rfind('\n').map_or(0, |end| end + 1);
        self.text[line..at]
            .trim_start_matches('\u{feff}')
            .chars()
            .count()
    }

    /// The start of the line after the one of a byte, or the end of the document.
    pub(super) fn next_line(&self, at: usize) -> usize {
        let end = self.text[at..]
            .find('\n')
            .map_or(self.text.len(), |end| at + end + 1);
        end.min(self.document.end.max(at))
    }

    /// The start of the line after a node. Where nothing is written its value ends at `nothing`.
    pub(super) fn end_line(&self, node: &Node, nothing: usize) -> usize {
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

    pub(super) fn end_of_block(&self, node: &Node, nothing: usize) -> usize {
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
    pub(super) fn after_comments(&self, mut at: usize, column: usize) -> usize {
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

pub(super) fn hard(node: &Node, path: &str) -> Problem {
    node.problem(&format!(
        "{path} is written in a way that cannot be added to: write it in block style"
    ))
}

pub(super) fn is_flow(node: &Node) -> bool {
    matches!(
        node.kind,
        Kind::Map { flow: true, .. } | Kind::List { flow: true, .. }
    )
}

pub(super) fn kind(node: &Node) -> &'static str {
    match node.kind {
        Kind::Scalar { .. } => "a scalar",
        Kind::List { .. } => "a list",
        Kind::Map { .. } => "a map",
        Kind::Alias(_) => "an alias",
    }
}

/// In one line, for places inside of brackets.
pub(super) fn flow(value: &Value) -> String {
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

pub(super) fn flow_fields(map: &Map<String, Value>) -> String {
    let fields = map
        .iter()
        .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), flow(value)));
    fields.collect::<Vec<_>>().join(", ")
}
