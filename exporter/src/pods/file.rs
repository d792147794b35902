// SPDX-License-Identifier: Apache-2.0
//! Which pods does a file list?
//!
//! The file holds what `kubectl get pods -A -o json` prints. It is looked at every [`LOOK`] and read when it changed,
//! through symlinks, so that the swap of a ConfigMap's `..data` is seen. Whoever writes it should rename it into place:
//! a half-written file is reported as trouble, and the names stay as they were until the next look.

use std::{
    fmt, fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{anyhow, bail};
use k8s_openapi::{
    api::core::v1::{Pod, PodSpec, PodStatus},
    apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};
use tokio::time::sleep;

use super::{Pods, Record};

/// Time between two looks at the file's metadata.
const LOOK: Duration = Duration::from_millis(500);

/// Largest file that is read: 4000 pods of 16 KiB, which is a large one.
const LARGEST: u64 = 64 << 20;

/// A file this young may change again within one tick of its timestamps, so the next look reads it again.
const YOUNG: Duration = Duration::from_secs(1);

/// A list of pods as the API server and `kubectl` write it.
#[derive(Deserialize)]
pub(super) struct List {
    #[serde(default, rename = "kind", deserialize_with = "list_kind")]
    _kind: (),
    /// The version of the list, and the token of its next page.
    #[serde(default)]
    pub(super) metadata: ListMeta,
    /// The pods.
    #[serde(deserialize_with = "items")]
    pub(super) items: Vec<Item>,
}

/// A pod of a list or a watch: only what is kept of it. The spec is most of a pod's text; one word of it is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Object")]
pub(super) struct Item {
    /// What the directory learns.
    pub(super) record: Record,
    /// The object's version.
    pub(super) version: Option<String>,
}

#[derive(Deserialize)]
struct Object {
    kind: Option<String>,
    #[serde(default)]
    metadata: ObjectMeta,
    spec: Option<Spec>,
    status: Option<PodStatus>,
}

/// What [`Record::of`] reads of a pod's spec.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    host_network: Option<bool>,
}

impl TryFrom<Object> for Item {
    type Error = String;

    fn try_from(
        Object {
            kind,
            metadata,
            spec,
            status,
        }: Object,
    ) -> Result<Self, String> {
        if let Some(kind) = kind.filter(|kind| kind != "Pod") {
            return Err(format!("a {kind} is not a Pod"));
        }
        let pod = Pod {
            metadata,
            status,
            spec: spec.map(|Spec { host_network }| PodSpec {
                host_network,
                ..PodSpec::default()
            }),
        };
        let record = Record::of(&pod).ok_or("a pod without metadata.uid or metadata.name")?;
        Ok(Self {
            record,
            version: pod.metadata.resource_version,
        })
    }
}

fn list_kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("List" | "PodList") => Ok(()),
        Some(kind) => Err(D::Error::custom(format!("a {kind} is not a PodList"))),
    }
}

fn items<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Item>, D::Error> {
    struct Items;

    impl<'de> Visitor<'de> for Items {
        type Value = Vec<Item>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of pods")
        }

        // Go writes an empty slice as null.
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut pods: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            let at = |index| move |error| A::Error::custom(format!("items[{index}]: {error}"));
            while let Some(pod) = pods.next_element().map_err(at(all.len()))? {
                all.push(pod);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(Items)
}

/// Reads the pods in a file.
///
/// # Errors
///
/// One line with the path, and with line and column where the text is at fault.
pub fn read(path: &Path) -> anyhow::Result<Vec<Record>> {
    let name = path.display();
    let unreadable = |error: io::Error| anyhow!("cannot read {name}: {error}");
    // To open a FIFO would wait for its writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        bail!("cannot read {name}: not a regular file");
    }
    let file = fs::File::open(path).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(LARGEST + 1)
        .read_to_end(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > LARGEST {
        bail!("cannot read {name}: larger than {} MiB", LARGEST >> 20);
    }
    let list: List = serde_json::from_slice(&text).map_err(|error| {
        anyhow!("{name} is not what `kubectl get pods -A -o json` prints: {error}")
    })?;
    Ok(list.items.into_iter().map(|item| item.record).collect())
}

/// What tells one state of a file from the next, `cp -p` included: device, inode, length, mtime and ctime.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// Looks at the file. Returns its stamp, or `None` where the next look has to read it in any case, and the pods if it
/// changed.
fn look(path: &Path, seen: Option<Stamp>) -> (Option<Stamp>, anyhow::Result<Option<Vec<Record>>>) {
    let Ok(meta) = fs::metadata(path) else {
        return (None, read(path).map(Some));
    };
    let stamp = (
        meta.dev(),
        meta.ino(),
        meta.len(),
        (meta.mtime(), meta.mtime_nsec()),
        (meta.ctime(), meta.ctime_nsec()),
    );
    if seen == Some(stamp) {
        return (seen, Ok(None));
    }
    // A time in the future is as settled as one in the past: a clock that is wrong must not make every look a read.
    let young = meta.modified().is_ok_and(|at| {
        let now = SystemTime::now();
        now.duration_since(at)
            .or_else(|_| at.duration_since(now))
            .is_ok_and(|age| age < YOUNG)
    });
    let found = read(path).map(Some);
    ((!young).then_some(stamp), found)
}

/// Follows the pods in a file, for ever. A file that is missing or malformed leaves the names as they are.
pub async fn watch(pods: Arc<Pods>, path: PathBuf) {
    let mut seen = None;
    let mut said: Option<String> = None;
    loop {
        let file = path.clone();
        if let Ok((stamp, found)) = tokio::task::spawn_blocking(move || look(&file, seen)).await {
            seen = stamp;
            let now = Instant::now();
            match found {
                Ok(Some(records)) => {
                    pods.pods_listed(records, now);
                    if said.take().is_some() {
                        tracing::info!("{} is readable again", path.display());
                    }
                }
                // What was wrong with an unchanged file still is.
                Ok(None) if said.is_some() => {}
                Ok(None) => pods.pods_unchanged(now),
                Err(error) => {
                    let line = error.to_string();
                    if said.as_ref() != Some(&line) {
                        tracing::warn!("{line}; pods keep their names");
                        said = Some(line.clone());
                    }
                    pods.pods_failed(line);
                }
            }
        }
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_young_file_is_read_by_the_next_look_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pods.json");
        fs::write(&path, "{\"items\": []}").expect("written");
        let (stamp, found) = look(&path, None);
        assert_eq!((stamp, found.ok()), (None, Some(Some(Vec::new()))));

        for time in [
            SystemTime::now() - 2 * YOUNG,
            SystemTime::now() + 60 * YOUNG,
        ] {
            fs::File::options()
                .write(true)
                .open(&path)
                .and_then(|file| file.set_modified(time))
                .expect("dated");
            let (stamp, found) = look(&path, None);
            assert!(stamp.is_some() && found.is_ok_and(|list| list.is_some()));
            let (again, found) = look(&path, stamp);
            assert_eq!((again, found.ok()), (stamp, Some(None)), "nothing changed");
        }
    }
}
