// SPDX-License-Identifier: Apache-2.0
//! jsonnet, evaluated by libjsonnet (jsonnet-rs), with the mixin's source embedded in this program.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use include_dir::{Dir, include_dir};
use jsonnet::JsonnetVm;
use serde_json::Value;

use crate::{Failure, Place};

/// Where the embedded source appears in messages and imports.
pub const ROOT: &str = "mixin";

static LIB: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/lib");
static SIGNALS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/signals");
static HELM: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/helm");
static TOP: [(&str, &str); 3] = [
    ("config.libsonnet", include_str!("../config.libsonnet")),
    ("mixin.libsonnet", include_str!("../mixin.libsonnet")),
    ("outputs.libsonnet", include_str!("../outputs.libsonnet")),
];

/// The embedded files: their path below [`ROOT`], and their text.
pub fn source() -> Vec<(String, &'static str)> {
    let mut files: Vec<(String, &'static str)> = TOP
        .iter()
        .map(|(path, text)| ((*path).to_owned(), *text))
        .collect();
    for (folder, dir) in [("lib", &LIB), ("signals", &SIGNALS), ("helm", &HELM)] {
        files.extend(dir.files().filter_map(|file| {
            let path = format!("{folder}/{}", file.path().display());
            Some((path, file.contents_utf8()?))
        }));
    }
    files
}

/// `a/b/../c` → `a/c`, so that a file has one name.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir
                if matches!(normal.components().next_back(), Some(Component::Normal(_))) =>
            {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

fn embedded(path: &Path) -> Option<&'static str> {
    let below = path.strip_prefix(ROOT).ok()?.to_str()?;
    source()
        .into_iter()
        .find(|(name, _)| name == below)
        .map(|(_, text)| text)
}

/// The text of a file of the user's, or else of one that is embedded.
fn text_of(path: &Path) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .or_else(|| embedded(path).map(str::to_owned))
}

/// Evaluates `outputs.libsonnet` with the overrides of a file, if there is one.
///
/// # Errors
///
/// As [`evaluate_some`].
pub fn evaluate(overrides: Option<&Path>) -> Result<Value, Failure> {
    evaluate_some(overrides, "outputs.files")
}

/// Evaluates the same, of the files only what an expression of `outputs` gives: the rest costs nothing.
///
/// # Errors
///
/// [`Failure::Io`] for a file that cannot be read, [`Failure::Jsonnet`] with the place for what does not evaluate.
pub fn evaluate_some(overrides: Option<&Path>, files: &str) -> Result<Value, Failure> {
    let mut snippet = format!("local outputs = (import '{ROOT}/outputs.libsonnet')(");
    if let Some(path) = overrides {
        // Read here for the system's own word about a file that is not there.
        fs::read_to_string(path).map_err(|source| Failure::io("read", path, source))?;
        let quoted = path.display().to_string().replace('\'', "''");
        snippet.push_str(&format!("import @'{quoted}'"));
    }
    // What is wrong with the overrides is said before anything stumbles over it.
    snippet.push_str(&format!(
        "); {{ problems: outputs.problems, files: if self.problems == [] then {files} else {{}} }}"
    ));
    let mut vm = JsonnetVm::new();
    // Kept where it is: the callback holds a reference to it.
    vm.import_callback(|_, base, wanted| {
        // A file of the embedded source imports embedded files only, whatever lies in the working directory.
        let path = normal(&base.join(wanted));
        let found = match base.starts_with(ROOT)
            || (base.as_os_str().is_empty() && wanted.starts_with(ROOT))
        {
            true => embedded(&path).map(str::to_owned),
            false => fs::read_to_string(&path).ok(),
        };
        found
            .map(|text| (path.clone(), text))
            .ok_or_else(|| format!("no such file: {}", path.display()))
    });
    let result = match vm.evaluate_snippet("render", &snippet) {
        Ok(json) => Ok(json.as_str().to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let json = result.map_err(|message| Failure::Jsonnet(place(&message, overrides)))?;
    serde_json::from_str(&json).map_err(|error| {
        Failure::Jsonnet(Place {
            message: format!("libjsonnet gave what is not JSON: {error}"),
            ..Place::default()
        })
    })
}

/// What libjsonnet's message says: `STATIC ERROR: file:3:5-7: text`, or `RUNTIME ERROR: text` and then a trace of
/// `\tfile:(3:5)-(4:6)\twhere`, innermost first. The place is the innermost in the user's own file, if there is one.
fn place(message: &str, overrides: Option<&Path>) -> Place {
    let first = message.lines().next().unwrap_or_default();
    if let Some(rest) = first.strip_prefix("STATIC ERROR: ") {
        for (at, _) in rest.match_indices(": ") {
            if let Some((file, position)) = location(&rest[..at]) {
                return located(rest[at + 2..].to_owned(), file, position);
            }
        }
        return Place {
            message: rest.to_owned(),
            ..Place::default()
        };
    }
    let text = first.strip_prefix("RUNTIME ERROR: ").unwrap_or(first);
    let trace: Vec<_> = message
        .lines()
        .skip(1)
        .filter_map(|line| location(line.trim_start().split('\t').next()?))
        .collect();
    let own = trace
        .iter()
        .find(|(file, _)| Some(file.as_path()) == overrides.map(normal).as_deref());
    let known = trace.iter().find(|(file, _)| text_of(file).is_some());
    match own.or(known) {
        Some((file, position)) => located(text.to_owned(), file.clone(), *position),
        None => Place {
            message: text.to_owned(),
            file: overrides.unwrap_or(Path::new("")).to_owned(),
            ..Place::default()
        },
    }
}

fn located(message: String, file: PathBuf, position: (usize, usize)) -> Place {
    let line = text_of(&file)
        .and_then(|text| text.lines().nth(position.0 - 1).map(str::to_owned))
        .unwrap_or_default();
    Place {
        message,
        file,
        position: Some(position),
        line,
    }
}

/// `file:3:5`, `file:3:5-7` or `file:(3:5)-(4:6)`.
fn location(text: &str) -> Option<(PathBuf, (usize, usize))> {
    let (file, range) = match text.find(":(") {
        Some(at) => (&text[..at], text[at + 2..].split(')').next()?),
        None => {
            let mut parts = text.rsplitn(3, ':');
            let (column, line, file) = (parts.next()?, parts.next()?, parts.next()?);
            (
                file,
                &text[file.len() + 1..file.len() + 1 + line.len() + 1 + column.len()],
            )
        }
    };
    let (line, column) = range.split_once(':')?;
    let column = column.split('-').next()?;
    let position = (line.parse().ok()?, column.parse().ok()?);
    (position.0 > 0 && position.1 > 0).then(|| (PathBuf::from(file), position))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_from_all_forms_of_libjsonnet() {
        for (text, line, column) in [
            ("a/b.jsonnet:3:5", 3, 5),
            ("a/b.jsonnet:3:5-7", 3, 5),
            ("a/b.jsonnet:(3:5)-(10:2)", 3, 5),
            ("a:b/b.jsonnet:3:5", 3, 5),
        ] {
            let (file, position) = location(text).expect(text);
            assert_eq!(position, (line, column), "{text}");
            assert!(file.ends_with("b.jsonnet"), "{text}");
        }
        for text in ["", "a", "a:3", "a:x:y", "a:0:0", "std.jsonnet"] {
            assert_eq!(location(text), None, "{text}");
        }
    }

    #[test]
    fn a_path_has_one_name() {
        for (path, expected) in [
            ("mixin/signals/../lib/x", "mixin/lib/x"),
            ("./a/./b", "a/b"),
            ("../a", "../a"),
            ("../../a", "../../a"),
            ("/a/../b", "/b"),
        ] {
            assert_eq!(normal(Path::new(path)), Path::new(expected));
        }
    }
}
