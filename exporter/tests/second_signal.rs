// SPDX-License-Identifier: Apache-2.0
//! A signal more is one new file per layer and at most four lines in lists: `docs/second-signal.patch` adds one, with the test of
//! its page, and has to apply to this tree. `tests/second-signal/check` builds it.

use std::{path::Path, process::Command};

#[test]
fn a_signal_more_is_one_file_per_layer_and_four_lines_in_lists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("git")
        .args([
            "apply",
            "--check",
            "--numstat",
            "--summary",
            "docs/second-signal.patch",
        ])
        .current_dir(&root)
        .output()
        .expect("git");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the patch does not apply to this tree:\n{errors}"
    );
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let of_test = |file: &str| file.starts_with("exporter/tests/");
    let new: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix(" create mode 100644 "))
        .filter(|file| !of_test(file))
        .collect();
    assert_eq!(
        new,
        [
            "exporter-common/src/reset.rs",
            "exporter-ebpf/src/bin/reset.rs",
            "exporter/src/signals/reset.rs"
        ]
    );
    let edited: u32 = text
        .lines()
        .filter_map(|line| {
            line.split_once('\t')?
                .1
                .split_once('\t')
                .zip(line.split('\t').next())
        })
        .filter(|((_, file), _)| !new.contains(file) && !of_test(file))
        .map(|(_, added)| added.parse::<u32>().expect("a count"))
        .sum();
    assert!(
        (1..=4).contains(&edited),
        "{edited} lines in lists:\n{text}"
    );
}
