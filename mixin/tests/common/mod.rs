// SPDX-License-Identifier: Apache-2.0
//! What the tests share that judge the rendered files by the real Prometheus.

#![allow(
    dead_code,
    reason = "every test file is a crate of its own and uses a part"
)]
#![expect(
    unreachable_pub,
    reason = "a module of test crates, which export nothing"
)]

pub mod alerts;
pub mod http;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The folder of the whole project.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the workspace").to_owned()
}

/// A package of Debian that has a program: the suite, the package, and the program's path in it.
pub type Package = (&'static str, &'static str, &'static str);

/// promtool of both generations: 2.42 is what Debian 12 has, 3.x what is current.
pub const PROMTOOLS: [Package; 2] = [
    ("bookworm", "prometheus", "usr/bin/promtool"),
    ("sid", "promtool", "usr/bin/promtool"),
];

/// The suite that moves: what it has may be missing any day, or not start here.
const MOVING: &str = "sid";

/// A program out of its package, fetched once, without installing it. `None` where it cannot be had or does not run, with the
/// reason printed; in CI that is a failure, but for the suite that moves.
pub fn program((suite, package, path): Package) -> Option<PathBuf> {
    let fetch = Command::new(root().join("tests/vm/fetch"))
        .args(["--package", suite, package])
        .output()
        .expect("tests/vm/fetch runs");
    let why = if fetch.status.success() {
        let folder = String::from_utf8(fetch.stdout).expect("UTF-8");
        let program = Path::new(folder.trim()).join(path);
        match Command::new(&program).arg("--version").output() {
            Ok(output) if output.status.success() => return Some(program),
            Ok(output) => format!("{}: {}", program.display(), said(&output)),
            Err(error) => format!("{}: {error}", program.display()),
        }
    } else {
        String::from_utf8_lossy(&fetch.stderr).trim().to_owned()
    };
    assert!(
        suite == MOVING || env::var_os("CI").is_none(),
        "CI has to have {package} of {suite}: {why}"
    );
    println!("SKIPPED: {package} of {suite}: {why}");
    None
}

/// Both streams of a program, as text.
pub fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// The files of a folder of the project, by their names without the ending.
pub fn files(folder: &str, ending: &str) -> Vec<(String, PathBuf)> {
    let folder = root().join(folder);
    let entries = folder
        .read_dir()
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.expect("readable").path();
            let name = path.file_name()?.to_str()?.strip_suffix(ending)?.to_owned();
            Some((name, path))
        })
        .collect();
    files.sort();
    files
}

/// The values files of users that merge and lint are tested with, by name.
pub fn fixtures() -> Vec<(String, PathBuf)> {
    files("mixin/tests/values", ".yaml")
}

/// Compares with a committed file, or rewrites it: `UPDATE_GOLDEN=1`.
pub fn golden(path: &Path, text: &str) {
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().expect("a folder")).expect("created");
        fs::write(path, text).expect("written");
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    assert!(
        text == expected,
        "not {} (UPDATE_GOLDEN=1 rewrites it):\n{text}",
        path.display()
    );
}
