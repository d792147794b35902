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

use std::{
    env,
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

/// A program out of its package, fetched once, without installing it. `None` where it cannot be had, with the reason
/// printed; in CI that is a failure.
pub fn program((suite, package, path): Package) -> Option<PathBuf> {
    let fetch = Command::new(root().join("tests/vm/fetch"))
        .args(["--package", suite, package])
        .output()
        .expect("tests/vm/fetch runs");
    if fetch.status.success() {
        let folder = String::from_utf8(fetch.stdout).expect("UTF-8");
        return Some(Path::new(folder.trim()).join(path));
    }
    let why = String::from_utf8_lossy(&fetch.stderr).trim().to_owned();
    assert!(
        env::var_os("CI").is_none(),
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
