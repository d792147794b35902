// SPDX-License-Identifier: Apache-2.0
//! How do the parser's events become a document?

use super::*;

/// Reads a text's events.
pub(super) struct Reader<'a> {
    pub(super) events: Vec<(Event<'a>, Span)>,
    pub(super) at: usize,
    pub(super) anchors: HashMap<usize, Anchor>,
}

impl Reader<'_> {
    pub(super) fn documents(mut self, text: &str) -> Result<Document, Problem> {
        let mut document: Option<Document> = None;
        while self.at < self.events.len() {
            let (event, span) = &self.events[self.at];
            match event {
                Event::DocumentStart(_, Some(version))
                    if (version.major, version.minor) != (1, 1) =>
                {
                    return Err(Problem {
                        line: span.start.line(),
                        column: span.start.col() + 1,
                        message: "Helm refuses a %YAML directive of another version than 1.1"
                            .to_owned(),
                    });
                }
                Event::StreamStart
                | Event::StreamEnd
                | Event::DocumentStart(..)
                | Event::DocumentEnd => self.at += 1,
                _ => {
                    let mut duplicates = Vec::new();
                    let node = self.node("", &mut duplicates)?;
                    // Nothing at all between two markers.
                    let empty = node.is_null() && node.span.is_empty();
                    match &mut document {
                        None => {
                            let end = match self.events.get(self.at) {
                                Some((Event::DocumentEnd, span)) => start_of(span),
                                _ => text.len(),
                            };
                            document = Some(Document {
                                root: (!empty).then_some(node),
                                end: end.min(text.len()),
                                anchors: HashMap::new(),
                                more: None,
                                duplicates,
                            });
                        }
                        Some(first) if !empty && first.more.is_none() => {
                            first.more = Some(node.line);
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        let mut document = document.unwrap_or(Document {
            root: None,
            end: text.len(),
            anchors: HashMap::new(),
            more: None,
            duplicates: Vec::new(),
        });
        document.anchors = self.anchors;
        Ok(document)
    }

    pub(super) fn node(
        &mut self,
        path: &str,
        duplicates: &mut Vec<Duplicate>,
    ) -> Result<Node, Problem> {
        let (event, span) = self.events[self.at].clone();
        self.at += 1;
        let mut node = Node {
            kind: Kind::Alias(0),
            span: start_of(&span)..span.end.byte_offset().unwrap_or_default(),
            line: span.start.line(),
            column: span.start.col() + 1,
            anchor: event.anchor_id().filter(|id| *id > 0),
            tagged: event.tag().is_some(),
            size: (1, 1),
        };
        match event {
            Event::Scalar(text, style, _, tag) => {
                node.kind = Kind::Scalar {
                    value: meaning(&text, style, tag.as_deref(), node.span.is_empty()),
                    text: text.into_owned(),
                    style,
                };
            }
            Event::Alias(id) => {
                let line = node.line;
                let anchor = self.anchors.get_mut(&id);
                let known = anchor.filter(|anchor| anchor.target.is_some());
                let anchor = known.ok_or_else(|| node.problem("an anchor that contains itself"))?;
                anchor.uses.push(line);
                let target = anchor.target.as_ref();
                node.size = target.map_or(node.size, |target| target.size);
                node.kind = Kind::Alias(id);
            }
            Event::SequenceStart(style, ..) => {
                let mut items = Vec::new();
                while !matches!(self.events[self.at].0, Event::SequenceEnd) {
                    let path = format!("{path}[{}]", items.len());
                    items.push(self.node(&path, duplicates)?);
                }
                let flow = style == StructureStyle::Flow;
                self.end(&mut node, flow);
                node.holds(items.iter())?;
                node.kind = Kind::List { flow, items };
            }
            Event::MappingStart(style, ..) => {
                let mut entries: Vec<Entry> = Vec::new();
                let mut seen = HashSet::new();
                while !matches!(self.events[self.at].0, Event::MappingEnd) {
                    let key = self.node(path, duplicates)?;
                    let name = self.name(&key)?;
                    let path = join(path, &name);
                    let value = self.node(&path, duplicates)?;
                    let entry = Entry { name, key, value };
                    // Each of several `<<` counts.
                    if !entry.merges() && !seen.insert(entry.name.clone()) {
                        let first = entries.iter().find(|other| other.name == entry.name);
                        duplicates.push(Duplicate {
                            path,
                            first: first.map_or(0, |entry| entry.key.line),
                            line: entry.key.line,
                            column: entry.key.column,
                        });
                    }
                    entries.push(entry);
                }
                let flow = style == StructureStyle::Flow;
                self.end(&mut node, flow);
                node.holds(entries.iter().map(|entry| &entry.value))?;
                node.kind = Kind::Map { flow, entries };
            }
            _ => return Err(node.problem("is not YAML that Helm reads")),
        }
        if let Some(anchor) = node.anchor.and_then(|id| self.anchors.get_mut(&id)) {
            anchor.target = Some(node.clone());
        }
        Ok(node)
    }

    /// Takes the end of a collection; brackets have their place, the end of a block has none.
    pub(super) fn end(&mut self, node: &mut Node, flow: bool) {
        if flow && let Some(end) = self.events[self.at].1.end.byte_offset() {
            node.span.end = end;
        }
        self.at += 1;
    }

    /// A key as JSON has it.
    pub(super) fn name(&self, key: &Node) -> Result<String, Problem> {
        let target = match key.kind {
            Kind::Alias(id) => self.anchors.get(&id).and_then(|a| a.target.as_ref()),
            _ => Some(key),
        };
        match target.map(|node| &node.kind) {
            // `<<` is no value.
            Some(Kind::Scalar { text, value, .. }) => Ok(match value {
                Value::Bool(is) => is.to_string(),
                Value::Number(number) => number.to_string(),
                _ => text.clone(),
            }),
            _ => Err(key.problem("Helm cannot read a key that is a list or a map")),
        }
    }
}

pub(super) fn start_of(span: &Span) -> usize {
    span.start.byte_offset().unwrap_or_default()
}
