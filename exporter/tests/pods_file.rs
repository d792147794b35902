// SPDX-License-Identifier: Apache-2.0
//! The pods of a node, as told by a file.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use chandra::{
    args::Args,
    kernel::{Hierarchy, Kernel},
    pods::{Place, Pods, Record, Source, file},
    scrape::Exporter,
    server::Site,
};
use clap::Parser;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::time::sleep;

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "ml", "uid": format!("uid-{name}")},
        "spec": {"containers": [{"name": "main", "env": [{"name": "A", "value": "ünï\n"}]}]},
        "status": {"containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": true, "restartCount": 0, "containerID": "cri-o://c0",
        }]},
    })
}

fn list(names: &[&str]) -> String {
    let items: Vec<_> = names.iter().map(|name| pod(name)).collect();
    json!({"apiVersion": "v1", "items": items, "kind": "List", "metadata": {"resourceVersion": ""}})
        .to_string()
}

fn error(path: &Path, text: &str) -> String {
    fs::write(path, text).expect("written");
    let line = file::read(path).expect_err("an error").to_string();
    assert!(
        line.contains(path.to_str().expect("a path")) && !line.contains('\n'),
        "{line}"
    );
    line.replace(path.to_str().expect("a path"), "FILE")
}

fn follow(path: &Path) -> Arc<Pods> {
    let pods = Arc::new(Pods::new(
        &Source::File(path.to_owned()),
        Duration::from_secs(300),
    ));
    tokio::spawn(file::watch(Arc::clone(&pods), path.to_owned()));
    pods
}

fn listed(pods: &Pods) -> Vec<String> {
    pods.view()
        .listed()
        .into_iter()
        .map(|(_, name, _)| name.to_string())
        .collect()
}

fn trouble(pods: &Pods) -> String {
    pods.view().trouble().unwrap_or_default().to_owned()
}

async fn until(what: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "not so in time: {what}"
        );
        sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn what_kubectl_prints_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    fs::write(&path, list(&["a", "b"])).expect("written");
    let records = file::read(&path).expect("a list");
    assert_eq!(records.len(), 2);
    assert_eq!(
        (&*records[1].namespace, &*records[1].name, &*records[1].uid),
        ("ml", "b", "uid-b")
    );
    assert_eq!(records[1].containers["c0"].as_ref(), "main");

    fs::write(&path, json!({"items": []}).to_string()).expect("written");
    assert_eq!(file::read(&path).expect("a list"), []);
    fs::write(&path, json!({"kind": "PodList", "items": null}).to_string()).expect("written");
    assert_eq!(file::read(&path).expect("a list"), []);
}

/// A pod with all that is read of one.
fn full() -> Value {
    let status = |name: &str, id: &str| {
        json!({
            "name": name, "image": "", "imageID": "", "ready": true, "restartCount": 2,
            "containerID": format!("containerd://{id}"),
            "state": {"terminated": {"exitCode": 1, "containerID": format!("containerd://{id}0")}},
            "lastState": {"terminated": {"exitCode": 1, "containerID": format!("containerd://{id}1")}},
        })
    };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "a", "namespace": "ml", "uid": "uid-a", "creationTimestamp": "2025-01-01T00:00:00Z",
            "annotations": {
                "kubernetes.io/config.mirror": "x",
                "kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef",
            },
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}],
        },
        "spec": {"containers": [{"name": "main"}], "hostNetwork": true},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "hostIP": "10.0.0.2", "hostIPs": [{"ip": "10.0.0.2"}],
            "containerStatuses": [status("main", "c")],
            "initContainerStatuses": [status("init", "d")],
            "ephemeralContainerStatuses": [status("debug", "e")],
        },
    })
}

/// The paths of all that a value has, itself left out.
fn paths(value: &Value, at: &str, all: &mut Vec<String>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.replace('/', "~1"), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(at, value)| (at.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    for (key, value) in inner {
        let path = format!("{at}/{key}");
        all.push(path.clone());
        paths(value, &path, all);
    }
}

fn without(value: &Value, path: &str) -> Value {
    let mut value = value.clone();
    let (above, key) = path.rsplit_once('/').expect("a path");
    match value.pointer_mut(above) {
        Some(Value::Object(fields)) => drop(fields.remove(&key.replace("~1", "/"))),
        Some(Value::Array(items)) => drop(items.remove(key.parse().expect("an index"))),
        _ => unreachable!("{path}"),
    }
    value
}

/// The parser skips most of a pod. Whatever of one is there or not, the record is that of the whole pod.
#[test]
fn every_field_that_a_record_is_made_of_survives_the_parser() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    let read = |pod: &Value| {
        fs::write(&path, json!({"items": [pod]}).to_string()).expect("written");
        file::read(&path).ok().and_then(|mut records| records.pop())
    };
    let whole = |pod: &Value| {
        let pod: Result<Pod, _> = serde_json::from_value(pod.clone());
        pod.ok().and_then(|pod| Record::of(&pod))
    };
    let full = full();
    let mut all = Vec::new();
    paths(&full, "", &mut all);
    let ordinary = without(&full, "/spec/hostNetwork");
    let mut differ = 0;
    for pod in [&full, &ordinary] {
        let record = whole(pod);
        assert!(record.is_some());
        assert_eq!(read(pod), record);
        for removed in &all {
            if pod.pointer(removed).is_none() {
                continue;
            }
            let less = without(pod, removed);
            // What the API server never leaves out the whole type may demand.
            let Some(expected) = whole(&less) else {
                continue;
            };
            differ += usize::from(Some(&expected) != record.as_ref());
            assert_eq!(read(&less), Some(expected), "without {removed}");
        }
    }
    assert!(differ > 30, "{differ} of what is there matters");
}

#[test]
fn a_pod_in_the_hosts_network_has_no_address_of_its_own() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/hostnetwork-address");
    for case in ["one-host-pod.json", "two-host-pods.json"] {
        let pods = Pods::new(&Source::Kube, Duration::from_secs(300));
        let records = file::read(&cases.join(case)).expect("a list");
        assert!(records.iter().any(|record| record.in_host), "{case}");
        pods.pods_listed(records, Instant::now());
        let addresses = pods.view().addresses();
        let owned: Vec<_> = addresses
            .iter()
            .map(|(address, owner)| {
                (
                    address.to_string(),
                    owner.as_ref().map(|owner| owner.labels.pod.to_string()),
                )
            })
            .collect();
        assert_eq!(
            owned,
            [("10.1.0.5".to_owned(), Some("vllm-0".to_owned()))],
            "{case}"
        );
    }
    // Where the spec is not told, the addresses tell.
    let bare = without(&without(&full(), "/spec"), "/status/hostIPs");
    let mut bare = bare;
    bare["status"]["hostIP"] = json!("fd00::1");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    fs::write(&path, json!({"items": [bare]}).to_string()).expect("written");
    let record = file::read(&path).expect("a list").remove(0);
    assert!(record.in_host && record.addresses.is_empty());
}

/// What else is wrong with the hierarchy is told first.
#[test]
fn a_part_of_the_hierarchy_is_told_whatever_pods_there_are() {
    let (exporter, pods) = exporter_of(&Hierarchy::V2 {
        root: "/part".into(),
        whole: false,
    });
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let listed = cases.join("hostnetwork-address/one-host-pod.json");
    pods.pods_listed(file::read(&listed).expect("a list"), Instant::now());
    let page = exporter.landing();
    assert!(
        page.contains("/part shows only a part of the cgroup hierarchy"),
        "{page}"
    );
}

fn exporter_of(hierarchy: &Hierarchy) -> (Exporter, Arc<Pods>) {
    let args = Args::try_parse_from(["chandra", "--pods", "pods.json"]).expect("valid flags");
    let pods = Arc::new(Pods::new(&args.serve.source(), Duration::from_secs(300)));
    let exporter = Exporter::new(
        Vec::new(),
        Arc::clone(&pods),
        Arc::default(),
        None,
        &Kernel::read(),
        hierarchy,
        &args.serve,
    );
    (exporter, pods)
}

/// Pods run, and the hierarchy that is followed has none of their containers: every count would be the host's.
#[test]
fn containers_that_are_elsewhere_are_told() {
    let root = tempfile::tempdir().expect("a folder");
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let listed = cases.join("hostnetwork-address/one-host-pod.json");
    let records = file::read(&listed).expect("a list");
    let (exporter, pods) = exporter_of(&Hierarchy::V2 {
        root: root.path().to_owned(),
        whole: true,
    });
    let told = || {
        let metrics = exporter.metrics().expect("a page");
        let metrics = String::from_utf8(metrics).expect("UTF-8");
        let hook = metrics
            .lines()
            .find(|line| line.contains("hook=\"cgroups\""))
            .unwrap_or_default();
        let reason = hook
            .split("reason=")
            .nth(1)
            .and_then(|rest| rest.split('"').nth(1));
        let page = exporter.landing();
        let is_on_page = page.contains("2 running pods are listed and none of their containers");
        (reason.unwrap_or_default().to_owned(), is_on_page)
    };
    assert_eq!(told(), ("attached".to_owned(), false), "none is listed");
    pods.pods_listed(records.clone(), Instant::now());
    assert_eq!(told(), ("containers_elsewhere".to_owned(), true));
    let uid: Arc<str> = Arc::clone(&records[0].uid);
    pods.cgroup_found(9, Place::Pod { uid });
    assert_eq!(
        told(),
        ("attached".to_owned(), false),
        "one of them is here"
    );
}

#[test]
fn errors_are_one_line_that_says_where_and_what_is_expected() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    let wrong = "FILE is not what `kubectl get pods -A -o json` prints: ";
    assert_eq!(
        error(&path, ""),
        format!("{wrong}EOF while parsing a value at line 1 column 0")
    );
    assert_eq!(
        error(&path, "{\"items\":\n  ["),
        format!("{wrong}items[0]: EOF while parsing a list at line 2 column 3")
    );
    assert_eq!(
        error(&path, "{\"items\": 7}"),
        format!("{wrong}invalid type: integer `7`, expected an array of pods at line 1 column 11")
    );
    assert_eq!(
        error(&path, &pod("a").to_string()).split(" at line").next(),
        Some(&*format!("{wrong}a Pod is not a PodList"))
    );
    assert_eq!(
        error(&path, "{}"),
        format!("{wrong}missing field `items` at line 1 column 2")
    );
    assert_eq!(
        error(&path, "{\"items\": [], \"kind\": \"ServiceList\"}"),
        format!("{wrong}a ServiceList is not a PodList at line 1 column 36")
    );
    let mut mixed: Value = serde_json::from_str(&list(&["a", "b", "c"])).expect("JSON");
    mixed["items"][2]["kind"] = "Service".into();
    let line = error(&path, &mixed.to_string());
    assert!(
        line.starts_with(&format!(
            "{wrong}items[2]: a Service is not a Pod at line 1 column "
        )),
        "{line}"
    );
    mixed["items"][1]["metadata"] = json!({"name": "b"});
    let line = error(&path, &mixed.to_string());
    assert!(
        line.contains("items[1]: a pod without metadata.uid or metadata.name at line 1"),
        "{line}"
    );
    assert!(error(&path, &format!("{} x", list(&[]))).contains("trailing characters at line 1"));
}

#[test]
fn what_is_no_file_of_a_sane_size_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let line = file::read(dir.path()).expect_err("an error").to_string();
    assert!(line.ends_with(": not a regular file"), "{line}");
    let path = dir.path().join("pods.json");
    let line = file::read(&path).expect_err("an error").to_string();
    assert!(
        line.ends_with("pods.json: No such file or directory (os error 2)"),
        "{line}"
    );
    File::create(&path)
        .and_then(|file| file.set_len((64 << 20) + 1))
        .expect("a sparse file");
    let line = file::read(&path).expect_err("an error").to_string();
    assert!(line.ends_with("pods.json: larger than 64 MiB"), "{line}");
}

#[tokio::test]
async fn every_change_of_the_file_reaches_the_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    fs::write(&path, list(&["a"])).expect("written");
    let pods = follow(&path);
    until("the first list", || listed(&pods) == ["a"]).await;
    // As long as before, and at once.
    fs::write(&path, list(&["b"])).expect("written");
    until("a change in place", || listed(&pods) == ["b"]).await;
    let other = dir.path().join("other.json");
    fs::write(&other, list(&["c"])).expect("written");
    fs::rename(&other, &path).expect("renamed");
    until("a file renamed into place", || listed(&pods) == ["c"]).await;
    // The length and the time stay, as with `rsync --times`.
    let time = SystemTime::now() - Duration::from_secs(3600);
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_modified(time))
        .expect("dated");
    sleep(Duration::from_millis(700)).await;
    fs::write(&path, list(&["d"])).expect("written");
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_modified(time))
        .expect("dated");
    until("a change that hides", || listed(&pods) == ["d"]).await;
}

#[tokio::test]
async fn the_swap_of_a_config_map_is_seen() {
    let dir = tempfile::tempdir().expect("a directory");
    for (version, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(dir.path().join(version)).expect("a directory");
        fs::write(dir.path().join(version).join("pods.json"), list(&[name])).expect("written");
    }
    symlink("..1", dir.path().join("..data")).expect("a link");
    let path = dir.path().join("pods.json");
    symlink("..data/pods.json", &path).expect("a link");
    let pods = follow(&path);
    until("the first list", || listed(&pods) == ["a"]).await;
    symlink("..2", dir.path().join("..data_tmp")).expect("a link");
    fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).expect("renamed");
    until("the swap", || listed(&pods) == ["b"]).await;
}

#[tokio::test]
async fn a_file_that_is_malformed_or_missing_keeps_the_names() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    fs::write(&path, list(&["a"])).expect("written");
    let pods = follow(&path);
    until("the first list", || listed(&pods) == ["a"]).await;
    fs::write(&path, "{").expect("written");
    until("trouble", || {
        trouble(&pods).contains("EOF while parsing an object")
    })
    .await;
    let before = pods.view().age(Instant::now()).expect("an age");
    sleep(Duration::from_millis(1700)).await;
    assert!(
        trouble(&pods).contains("EOF while parsing an object"),
        "an unchanged file is no answer"
    );
    assert!(pods.view().age(Instant::now()).expect("an age") > before + Duration::from_secs(1));
    fs::remove_file(&path).expect("removed");
    until("other trouble", || trouble(&pods).contains("No such file")).await;
    assert_eq!(listed(&pods), ["a"]);
    fs::write(&path, list(&["a", "b"])).expect("written");
    until("the second list", || listed(&pods) == ["a", "b"]).await;
    assert_eq!(trouble(&pods), "");
}

#[tokio::test]
async fn an_unchanged_file_is_fresh() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pods.json");
    fs::write(&path, list(&["a"])).expect("written");
    let pods = follow(&path);
    until("the first list", || listed(&pods) == ["a"]).await;
    sleep(Duration::from_millis(3200)).await;
    let age = || pods.view().age(Instant::now()).expect("an age");
    until("a low age", || age() < Duration::from_millis(1500)).await;
}
