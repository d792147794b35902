// SPDX-License-Identifier: Apache-2.0
//! What are people told of files, and how much of their names?

use std::collections::{BTreeMap, BTreeSet};

/// Files that one note names.
const PATHS: usize = 4;

/// Something for people that may be about files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    paths: Vec<String>,
    /// How many files it is about besides.
    more: usize,
    text: String,
}

impl Note {
    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self {
            paths: Vec::new(),
            more: 0,
            text: text.into(),
        }
    }

    /// One for each text, with the first paths that it is about.
    pub(super) fn of_files<'a>(files: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<Self> {
        let mut by_text: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (path, text) in files {
            by_text.entry(text).or_default().insert(path);
        }
        let note = |(text, paths): (&str, BTreeSet<&str>)| Self {
            more: paths.len().saturating_sub(PATHS),
            paths: paths.into_iter().take(PATHS).map(str::to_owned).collect(),
            text: text.to_owned(),
        };
        by_text.into_iter().map(note).collect()
    }

    /// In one line. The folders of a container's files are its own affair, unless they are asked for.
    pub(crate) fn told(&self, with_paths: bool) -> String {
        if self.paths.is_empty() {
            return self.text.clone();
        }
        let paths: Vec<_> = self
            .paths
            .iter()
            .map(|path| shown(path, with_paths))
            .collect();
        let more = match self.more {
            0 => String::new(),
            more => format!(" and {more} files more"),
        };
        format!("{}{more}: {}", paths.join(", "), self.text)
    }
}

/// A path, or the name at its end, without what would break a line, and not longer than a line.
pub(crate) fn shown(path: &str, whole: bool) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    let shown = if whole { path } else { name };
    let most = if whole { 512 } else { 64 };
    let mut text: String = shown
        .chars()
        .take(most)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if shown.chars().nth(most).is_some() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_reason_are_told_in_one_line() {
        let files = ["/a/1", "/a/2", "/b/3", "/b/4", "/b/5", "/b/6"];
        let files = files.into_iter().map(|path| (path, "no ELF file"));
        let notes = Note::of_files(files.chain([("/c/libnccl.so.2", "late")]));
        let told =
            |with_paths| -> Vec<_> { notes.iter().map(|note| note.told(with_paths)).collect() };
        assert_eq!(
            told(true),
            [
                "/c/libnccl.so.2: late",
                "/a/1, /a/2, /b/3, /b/4 and 2 files more: no ELF file"
            ]
        );
        assert_eq!(told(false)[0], "libnccl.so.2: late");
    }

    #[test]
    fn a_name_cannot_break_a_line_or_fill_a_page() {
        assert_eq!(shown("/a/lib\nnccl.so", false), "lib\u{fffd}nccl.so");
        let long = format!("/{}", "x".repeat(5000));
        assert_eq!(shown(&long, true).chars().count(), 513);
        assert_eq!(shown(&long, false).chars().count(), 65);
        assert_eq!(shown("", true), "");
    }
}
