// SPDX-License-Identifier: Apache-2.0
//! Names the folder of the BPF objects: the committed ones, or freshly built ones for a test of them.

use std::{env, path::PathBuf};

fn main() {
    let committed = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("../exporter-ebpf/objects");
    let objects = env::var_os("CHANDRA_EBPF_OBJECTS").map_or(committed, PathBuf::from);
    let objects = objects.canonicalize().unwrap_or(objects);
    println!("cargo:rerun-if-env-changed=CHANDRA_EBPF_OBJECTS");
    println!("cargo:rustc-env=CHANDRA_EBPF_OBJECTS={}", objects.display());
}
