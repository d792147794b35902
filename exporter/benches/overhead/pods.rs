// SPDX-License-Identifier: Apache-2.0
//! Pods of one container each: real cgroup directories, and the list that names them.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::common::{Pod, cgroup_root};

/// Uids of these pods begin with it, so that nothing but their directories is removed.
const MARK: u64 = 0xbe9c_0000;

/// What the spec of a pod takes in `kubectl get pods -o json`, roughly. The exporter has to read past it.
const SPEC_BYTES: usize = 8 << 10;

/// The directories, and who removes them.
pub(crate) struct Pods {
    root: PathBuf,
    guard: Child,
    pods: Vec<Pod>,
}

impl Pods {
    /// Starts the guard: a shell of its own process group that waits for the end of its standard input, and so for the
    /// end of this process, whatever ends it, and then removes the directories.
    pub(crate) fn new() -> Self {
        let root = cgroup_root();
        let kept = "kubepods.slice kubepods.slice/kubepods-burstable.slice"
            .split(' ')
            .filter(|slice| root.join(slice).exists())
            .count();
        let guard = Command::new("sh")
            .args([
                "-c",
                "cat >/dev/null; cd \"$ROOT\" || exit
                 for _ in $(seq 100); do
                   find kubepods.slice -depth -type d -path \"*-pod$MARK*\" -exec rmdir {} + 2>/dev/null
                   [ -z \"$(find kubepods.slice -type d -path \"*-pod$MARK*\" -print -quit)\" ] && break
                   sleep 0.1
                 done
                 [ \"$KEPT\" -lt 2 ] && rmdir kubepods.slice/kubepods-burstable.slice 2>/dev/null
                 [ \"$KEPT\" -lt 1 ] && rmdir kubepods.slice 2>/dev/null",
            ])
            .env("ROOT", &root)
            .env("MARK", format!("{:04x}", MARK >> 16))
            .env("KEPT", kept.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh");
        Self {
            root,
            guard,
            pods: Vec::new(),
        }
    }

    /// Makes the directories of the first `count` pods, and the list of them.
    pub(crate) fn grow(&mut self, count: usize, list: &Path) {
        for i in self.pods.len()..count {
            let name = format!("decode-7d9c5b8f64-{i:05}");
            let mut pod = Pod::new("inference", &name, MARK + i as u64);
            pod.created = i as u64;
            fs::create_dir_all(self.root.join(pod.cgroup(0))).expect("a writable cgroup2");
            self.pods.push(pod);
        }
        let items: Vec<_> = self
            .pods
            .iter()
            .map(|pod| {
                let mut item = pod.json();
                item["spec"] = serde_json::json!({
                    "containers": [{"name": "main", "args": ["x".repeat(SPEC_BYTES)]}]
                });
                item
            })
            .collect();
        let pods = serde_json::json!({ "apiVersion": "v1", "kind": "PodList", "items": items });
        fs::write(list, pods.to_string()).expect("a writable folder");
    }

    /// The directories of the containers.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let path = |pod: &Pod| self.root.join(pod.cgroup(0));
        self.pods.iter().map(path).collect()
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}
