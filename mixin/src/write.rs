// SPDX-License-Identifier: Apache-2.0
//! The text of each file → the output folder: all of them or none half, and none that is not rendered any more.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::NamedTempFile;

use crate::{
    Failure,
    render::{MARK, TAG},
};

/// Of files that are for whoever may read the folder.
const MODE: u32 = 0o644;

/// Writes the files below a folder, and removes generated ones of the same folders that are not among them.
///
/// Each file is written beside its place first and moved there only when all are complete: a disk that fills up or a
/// folder that cannot be written leaves what was there.
///
/// # Errors
///
/// [`Failure::Io`] for what cannot be written.
pub fn write(out: &Path, files: &BTreeMap<String, String>) -> Result<(), Failure> {
    let mut complete = Vec::new();
    for (name, text) in files {
        let path = out.join(name);
        if fs::read_to_string(&path).is_ok_and(|old| old == *text) {
            continue;
        }
        if path.is_dir() {
            return Err(Failure::io(
                "write",
                &path,
                io::ErrorKind::IsADirectory.into(),
            ));
        }
        let folder = path.parent().expect("files lie in folders").to_owned();
        fs::create_dir_all(&folder).map_err(|e| Failure::io("create", &folder, e))?;
        let file =
            temporary(&folder, text, MODE).map_err(|e| Failure::io("write into", &folder, e))?;
        complete.push((file, path));
    }
    let stale = stale(out, files)?;
    for (file, path) in complete {
        file.persist(&path)
            .map_err(|e| Failure::io("write", &path, e.error))?;
    }
    for path in stale {
        fs::remove_file(&path).map_err(|e| Failure::io("remove", &path, e))?;
    }
    Ok(())
}

/// Writes one file: it is whole, or what was there before. It keeps its mode, and a new one has that of `like`, since values
/// may be secret. Links stay links; what is no file (a pipe, a device) is written to.
///
/// # Errors
///
/// [`Failure::Io`] for what cannot be written.
pub fn file(path: &Path, text: &str, like: &Path) -> Result<(), Failure> {
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let there = fs::metadata(path).ok();
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        return fs::write(path, text).map_err(|error| Failure::io("write", path, error));
    }
    let mode = there.or_else(|| fs::metadata(like).ok().filter(fs::Metadata::is_file));
    let mode = mode.map_or(MODE, |mode| mode.permissions().mode() & 0o777);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let file =
        temporary(folder, text, mode).map_err(|error| Failure::io("write into", folder, error))?;
    file.persist(path)
        .map_err(|error| Failure::io("write", path, error.error))?;
    Ok(())
}

fn temporary(folder: &Path, text: &str, mode: u32) -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// The files that are not what would be written, missing and stale ones included.
///
/// # Errors
///
/// [`Failure::Io`] for a folder that cannot be read.
pub fn differences(out: &Path, files: &BTreeMap<String, String>) -> Result<Vec<String>, Failure> {
    let mut different: Vec<_> = files
        .iter()
        .filter(|(name, text)| fs::read_to_string(out.join(name)).ok().as_ref() != Some(*text))
        .map(|(name, _)| name.clone())
        .collect();
    different.extend(
        stale(out, files)?
            .iter()
            .map(|path| path.display().to_string()),
    );
    Ok(different)
}

/// Generated files of the folders that are written to, which are not rendered any more.
fn stale(out: &Path, files: &BTreeMap<String, String>) -> Result<Vec<PathBuf>, Failure> {
    let mut stale = Vec::new();
    let folders: std::collections::BTreeSet<_> = files
        .keys()
        .filter_map(|name| Path::new(name).parent())
        .collect();
    for folder in folders {
        let path = out.join(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::io("read", &path, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| Failure::io("read", &path, e))?;
            let name = folder.join(entry.file_name());
            let known = name.to_str().is_some_and(|name| files.contains_key(name));
            if !known && generated(&entry.path()) {
                stale.push(entry.path());
            }
        }
    }
    Ok(stale)
}

/// Whether a file is one of ours: by its first line, or by its tag.
fn generated(path: &Path) -> bool {
    let Ok(text) = fs::read_to_string(path) else {
        return false;
    };
    match path.extension().and_then(|e| e.to_str()) {
        Some("yaml") => text.starts_with(MARK),
        Some("json") => serde_json::from_str::<Value>(&text).is_ok_and(|json| {
            let tags = json["tags"].as_array();
            tags.is_some_and(|tags| tags.iter().any(|tag| tag == TAG))
        }),
        _ => false,
    }
}
