// SPDX-License-Identifier: Apache-2.0
//! What does a values file say to Helm, and at which byte? The parser is the one that serde-saphyr stands on; scalars mean
//! what Helm's own reader makes of them (YAML 1.1: `yes` is true, `0777` is 511, a later `<<` wins over an earlier key).

mod reader;
mod scalar;

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use serde_json::{Map, Value};

use self::{reader::Reader, scalar::meaning};

/// More nodes than this, aliases written out, are an attack or a mistake.
const MAX_NODES: usize = 1_000_000;

/// So are nodes that lie deeper than this in each other, aliases written out. The parser itself has a limit of 255 without.
const MAX_DEPTH: usize = 400;

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

/// A node as it is written.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// The bytes of a scalar, an alias or a flow collection; of a block collection only where it starts.
    pub span: Range<usize>,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// The anchor in front of it.
    pub anchor: Option<usize>,
    /// Whether a tag stands in front of it.
    pub tagged: bool,
    /// How many nodes it is, and how deep they lie in each other, aliases written out.
    size: (usize, usize),
}

/// The kinds of nodes.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A scalar: its text, how it is written, what it means.
    Scalar {
        /// The text, unescaped.
        text: String,
        /// Plain, quoted, or a block.
        style: ScalarStyle,
        /// What Helm makes of it.
        value: Value,
    },
    /// `- a` or `[a]`.
    List {
        /// In brackets.
        flow: bool,
        /// The items.
        items: Vec<Node>,
    },
    /// `a: b` or `{a: b}`.
    Map {
        /// In braces.
        flow: bool,
        /// The entries.
        entries: Vec<Entry>,
    },
    /// `*name`.
    Alias(usize),
}

/// A key and its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key as JSON has it.
    pub name: String,
    /// The key as it is written.
    pub key: Node,
    /// The value.
    pub value: Node,
}

/// What carries a name, and who uses it.
#[derive(Clone, Debug)]
pub struct Anchor {
    /// Without `&`.
    pub name: String,
    /// The lines of its aliases.
    pub uses: Vec<usize>,
    target: Option<Node>,
}

/// The first document of a file, which is the only one that Helm reads.
#[derive(Clone, Debug)]
pub struct Document {
    /// `None` for a file without content.
    pub root: Option<Node>,
    /// Where the document ends: at `...`, at the next `---` or with the file.
    pub end: usize,
    /// By their number in nodes.
    pub anchors: HashMap<usize, Anchor>,
    /// The line of the first document after this one that is not empty.
    pub more: Option<usize>,
    /// Keys that stand twice in one map: the path, the first line, and the second key's place.
    pub duplicates: Vec<Duplicate>,
}

/// A key that stands twice in one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// Its path.
    pub path: String,
    /// Where the first stands.
    pub first: usize,
    /// Where the second stands.
    pub line: usize,
    /// The second's column.
    pub column: usize,
}

impl Document {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// What is not YAML, or is YAML that Helm cannot read, and aliases that multiply to more than any values file has.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let options = granit_parser::options! {
            emit_comments: false,
            emit_anchor_events: true,
            block_scalar_eof_without_line_feed: true,
        };
        let mut reader = Reader {
            events: Vec::new(),
            at: 0,
            anchors: HashMap::new(),
        };
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, span) = event.map_err(|error| Problem {
                line: error.marker().line(),
                column: error.marker().col() + 1,
                message: format!("is not YAML: {}", error.info()),
            })?;
            match event {
                // The anchor belongs to the node before it.
                Event::Anchor(id, name) => {
                    reader.anchors.insert(
                        id,
                        Anchor {
                            name: name.into_owned(),
                            uses: Vec::new(),
                            target: None,
                        },
                    );
                }
                event => reader.events.push((event, span)),
            }
        }
        reader.documents(text)
    }

    /// The node that an alias stands for, or the node itself.
    pub fn resolve<'a>(&'a self, node: &'a Node) -> &'a Node {
        match node.kind {
            Kind::Alias(id) => match self.anchors.get(&id).and_then(|a| a.target.as_ref()) {
                Some(target) => self.resolve(target),
                None => node,
            },
            _ => node,
        }
    }

    /// What Helm reads.
    ///
    /// # Errors
    ///
    /// Merge keys of what is no map.
    pub fn value(&self) -> Result<Value, Problem> {
        match &self.root {
            None => Ok(Value::Object(Map::new())),
            Some(root) => self.value_at(root),
        }
    }

    /// What Helm reads of a values file; `null` is what `helm get values` prints where there are none.
    ///
    /// # Errors
    ///
    /// What is no map, a second document, and as [`Document::value`].
    pub fn values(&self) -> Result<Value, Problem> {
        if let Some(line) = self.more {
            return Err(Problem {
                line,
                column: 1,
                message: "a second document: Helm reads only the first; leave one".to_owned(),
            });
        }
        match &self.root {
            Some(root) if root.is_null() => Ok(Value::Object(Map::new())),
            Some(root) if !matches!(root.kind, Kind::Map { .. }) => {
                Err(root.problem("values are a map: Helm refuses anything else"))
            }
            _ => self.value(),
        }
    }

    /// What Helm reads at a node.
    ///
    /// # Errors
    ///
    /// As [`Document::value`].
    pub fn value_at(&self, node: &Node) -> Result<Value, Problem> {
        Ok(match &self.resolve(node).kind {
            Kind::Scalar { value, .. } => value.clone(),
            Kind::Alias(_) => Value::Null,
            Kind::List { items, .. } => {
                let values = items.iter().map(|item| self.value_at(item));
                Value::Array(values.collect::<Result<_, _>>()?)
            }
            Kind::Map { .. } => {
                let mut map = Map::new();
                for field in self.fields(node)? {
                    map.insert(field.name.to_owned(), self.value_at(field.value)?);
                }
                Value::Object(map)
            }
        })
    }

    /// The entries of a map as Helm reads them, those of merge keys among them.
    ///
    /// # Errors
    ///
    /// A merge key of what is no map.
    pub fn fields<'a>(&'a self, node: &'a Node) -> Result<Vec<Field<'a>>, Problem> {
        let mut fields: Vec<Field<'a>> = Vec::new();
        let mut places = HashMap::new();
        let mut set = |field: Field<'a>| match places.get(field.name) {
            Some(place) => fields[*place] = field,
            None => {
                places.insert(field.name, fields.len());
                fields.push(field);
            }
        };
        let Kind::Map { entries, .. } = &self.resolve(node).kind else {
            return Ok(fields);
        };
        for entry in entries {
            if !entry.merges() {
                set(Field {
                    name: &entry.name,
                    key: &entry.key,
                    value: &entry.value,
                    entry: Some(entry),
                });
                continue;
            }
            let sources: Vec<&Node> = match &self.resolve(&entry.value).kind {
                // The first of a list wins.
                Kind::List { items, .. } => items.iter().rev().collect(),
                _ => vec![&entry.value],
            };
            for source in sources {
                if !matches!(self.resolve(source).kind, Kind::Map { .. }) {
                    return Err(entry.key.problem("<< takes a map or a list of maps"));
                }
                for field in self.fields(source)? {
                    set(Field {
                        entry: None,
                        ..field
                    });
                }
            }
        }
        Ok(fields)
    }

    /// How many keys of a path there are, and the last of them.
    pub fn place(&self, path: &[impl AsRef<str>]) -> (usize, Option<Field<'_>>) {
        let mut found = (0, None);
        let mut node = self.root.as_ref();
        for key in path {
            let fields = node.and_then(|node| self.fields(node).ok());
            let mut fields = fields.into_iter().flatten();
            let Some(field) = fields.find(|field| field.name == key.as_ref()) else {
                break;
            };
            found = (found.0 + 1, Some(field));
            node = Some(field.value);
        }
        found
    }

    /// Whether something uses the anchor of this node, and where.
    pub fn used(&self, node: &Node) -> Option<(&str, usize)> {
        let anchor = self.anchors.get(&node.anchor?)?;
        Some((&anchor.name, *anchor.uses.first()?))
    }
}

/// An entry of a map as Helm reads it.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    /// The key.
    pub name: &'a str,
    /// Where the key is written.
    pub key: &'a Node,
    /// The value.
    pub value: &'a Node,
    /// The entry, unless it came through a merge key.
    pub entry: Option<&'a Entry>,
}

impl Entry {
    fn merges(&self) -> bool {
        matches!(&self.key.kind, Kind::Scalar { text, style: ScalarStyle::Plain, .. } if text == "<<")
    }
}

impl Node {
    /// A message about this node.
    pub fn problem(&self, message: &str) -> Problem {
        Problem {
            line: self.line,
            column: self.column,
            message: message.to_owned(),
        }
    }

    /// Adds up what is in it.
    fn holds<'a>(&mut self, inner: impl Iterator<Item = &'a Self>) -> Result<(), Problem> {
        for node in inner {
            self.size.0 += node.size.0;
            self.size.1 = self.size.1.max(node.size.1 + 1);
        }
        match self.size {
            (nodes, _) if nodes > MAX_NODES => {
                Err(self.problem("aliases multiply to more than a million values"))
            }
            (_, depth) if depth > MAX_DEPTH => {
                Err(self.problem("lists and maps lie too deep in each other"))
            }
            _ => Ok(()),
        }
    }

    /// Whether nothing is written where a value could be, or one of the words for nothing.
    pub fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { value, .. } if value.is_null())
    }
}

/// A path as people write it.
pub fn join(path: &str, key: &str) -> String {
    let key = match key.contains(|c: char| c == '.' || c.is_control()) {
        true => format!("{key:?}"),
        false => key.to_owned(),
    };
    match path {
        "" => key,
        _ => format!("{path}.{key}"),
    }
}

/// Keys as people write their path.
pub fn joined(keys: &[impl AsRef<str>]) -> String {
    let all = keys.iter();
    all.fold(String::new(), |path, key| join(&path, key.as_ref()))
}

/// The keys of a path that [`joined`] wrote.
pub fn split(path: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        let quoted = rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let (key, after) = match quoted {
            Some((key, after)) => (key, after.strip_prefix('.').unwrap_or(after)),
            None => rest.split_once('.').unwrap_or((rest, "")),
        };
        keys.push(key.to_owned());
        rest = after;
    }
    keys
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Value {
        let document = Document::parse(text).expect(text);
        document.value().expect(text)
    }

    #[test]
    fn scalars_mean_what_helm_makes_of_them() {
        let text = "{a: yes, b: On, c: 0777, d: 0o17, e: 1_000, f: 0x1f, g: 1e3, h: 2001-01-01, i: ~, j: , k: No, \
                    l: 'yes', m: !!int '3', o: 0o8, p: -0x1f, q: 1:30, r: 09, s: +1, t: 1., u: .5, v: 0b11, w: !!str 1}";
        let expected = json!({
            "a": true, "b": true, "c": 511, "d": 15, "e": 1000, "f": 31, "g": 1000.0, "h": "2001-01-01", "i": null, "j": null,
            "k": false, "l": "yes", "m": 3, "o": "0o8", "p": -31, "q": "1:30", "r": 9, "s": 1, "t": 1.0, "u": 0.5, "v": 3,
            "w": "1",
        });
        assert_eq!(value(text), expected);
        assert_eq!(value("on: 1\n1: x\n"), json!({"true": 1, "1": "x"}));
    }

    #[test]
    fn merge_keys_win_over_what_stands_before_them() {
        let text =
            "b: &b {x: 1}\nc: {x: 9, <<: *b}\nd: {<<: *b, x: 9}\ne: {<<: [*b, {x: 2, z: 3}]}\n";
        let expected = json!({"b": {"x": 1}, "c": {"x": 1}, "d": {"x": 9}, "e": {"x": 1, "z": 3}});
        assert_eq!(value(text), expected);
    }

    #[test]
    fn what_helm_cannot_read_is_said_with_its_place() {
        for (text, line, part) in [
            ("a: [1\n", 1, "is not YAML"),
            ("x: 1\na: &x [*x]\n", 2, "contains itself"),
            ("[a]: 1\n", 1, "a list or a map"),
            ("%YAML 1.2\n---\na: 1\n", 2, "Helm refuses"),
        ] {
            let problem = Document::parse(text).expect_err(text);
            assert!(problem.message.contains(part), "{text}: {problem:?}");
            assert_eq!(problem.line, line, "{text}: {problem:?}");
        }
        let document = Document::parse("a: 1\nb: {<<: [1]}\n").expect("YAML");
        assert!(document.value().is_err());
        let mut bomb = "a0: &a0 [x]\n".to_owned();
        for n in 1..30 {
            bomb.push_str(&format!("a{n}: &a{n} [*a{}, *a{}]\n", n - 1, n - 1));
        }
        let problem = Document::parse(&bomb).expect_err("a bomb");
        assert!(problem.message.contains("multiply"), "{problem:?}");
        let mut chain = "a0: &a0 {x: 1}\n".to_owned();
        let mut merged = chain.clone();
        for n in 1..1000 {
            chain.push_str(&format!("a{n}: &a{n} [*a{}]\n", n - 1));
            merged.push_str(&format!("a{n}: &a{n} {{<<: *a{}}}\n", n - 1));
        }
        for text in [chain, merged] {
            let problem = Document::parse(&text).expect_err("a chain");
            assert!(problem.message.contains("too deep"), "{problem:?}");
        }
    }

    #[test]
    fn a_path_is_split_as_it_was_joined() {
        let keys = ["serverFiles", "alerting_rules.yml", "groups"];
        let path = joined(&keys);
        assert_eq!(path, "serverFiles.\"alerting_rules.yml\".groups");
        assert_eq!(split(&path), keys);
        assert_eq!(split("a.b"), ["a", "b"]);
        assert!(split("").is_empty());
    }

    #[test]
    fn only_the_first_document_counts_and_duplicates_are_found() {
        let document =
            Document::parse("---\na: 1\nb:\n  c: 1\n  'c': 2\n---\n# x\nd: 1\n").expect("YAML");
        assert_eq!(document.more, Some(8));
        assert_eq!(document.end, 28);
        let [twice] = &document.duplicates[..] else {
            panic!("{:?}", document.duplicates)
        };
        assert_eq!(
            (twice.path.as_str(), twice.first, twice.line),
            ("b.c", 4, 5)
        );
        assert!(Document::parse("").expect("YAML").root.is_none());
        assert!(
            Document::parse("# only this\n---\n")
                .expect("YAML")
                .root
                .is_none()
        );
    }
}
