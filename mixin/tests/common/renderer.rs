// SPDX-License-Identifier: Apache-2.0
//! The renderer itself, which only tests of its own package can start.

use std::{
    path::Path,
    process::{Command, Output},
};

/// Runs the renderer in a folder.
pub(super) fn chandra_mixin(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_chandra-mixin"))
        .current_dir(folder)
        .args(args)
        .output()
        .expect("it runs")
}
