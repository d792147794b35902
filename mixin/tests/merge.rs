// SPDX-License-Identifier: Apache-2.0
//! Merging into values files of users: what comes out is committed, byte for byte, and whatever comes in, nothing is lost.

mod common;
#[path = "common/renderer.rs"]
mod renderer;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use chandra_mixin::{
    Failure,
    keys::Spec,
    merge::{self, Merged},
    ours::Chart,
    proof,
    yaml::Document,
};
use common::{fixtures, golden, root, said};
use proptest::{prelude::*, sample::select};
use renderer::chandra_mixin;
use serde_json::{Value, json};
use tempfile::TempDir;

fn ours() -> &'static (Value, Spec) {
    static OURS: OnceLock<(Value, Spec)> = OnceLock::new();
    OURS.get_or_init(|| {
        let chart = Chart::find("cilium", None).expect("known");
        let values = chart.values(None, false).expect("rendered");
        (values, chart.keys.expect("embedded"))
    })
}

/// One file with ours for Cilium.
fn merge(text: &str) -> Result<Merged, Failure> {
    let (ours, keys) = ours();
    let files = [("my.yaml".into(), text.to_owned())];
    merge::merge(&files, ours, Some(keys))
}

/// Whether a text is another one with insertions only.
fn is_within(text: &str, longer: &str) -> bool {
    let mut longer = longer.chars();
    text.chars().all(|c| longer.any(|other| other == c))
}

/// A text without the words for nothing, which may go, and without the space in front of them.
fn without_nothings(text: &str) -> String {
    let words = ["~", "null", "[]", "{}", "[ ]", "{ }"];
    words.iter().fold(text.to_owned(), |text, word| {
        text.replace(&format!(" {word}"), "").replace(word, "")
    })
}

#[test]
fn every_fixture_becomes_what_is_committed() {
    let folder = root().join("mixin/tests/values");
    let image = folder.join("image.jsonnet").display().to_string();
    for (name, path) in fixtures() {
        let file = format!("{name}.yaml");
        let mut args = vec!["merge", "--version", "1.19", &file];
        if name == "sidecar" {
            args.extend(["--sidecar", "--config", &image]);
        }
        let output = chandra_mixin(&folder, &args);
        let code = output.status.code().expect("it ends");
        let notes = String::from_utf8(output.stderr).expect("UTF-8");
        golden(
            &folder.join(format!("expected/{name}.merge.txt")),
            &format!("{notes}exit code {code}\n"),
        );
        let merged = folder.join(format!("expected/{name}.merged.yaml"));
        if code != 0 {
            assert_eq!((code, notes.lines().count()), (2, 1), "{name}: {notes}");
            assert!(output.stdout.is_empty() && !merged.exists(), "{name}");
            continue;
        }
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        golden(&merged, &text);

        // Every line of the user's is there, in order, except those that a note names.
        let before = fs::read_to_string(&path).expect("readable");
        let told: BTreeSet<usize> = notes
            .lines()
            .filter_map(|note| note.split(':').nth(1)?.parse().ok())
            .collect();
        let mut after = text.split('\n');
        for (index, line) in before.split('\n').enumerate() {
            let written_anew = ["flow", "anchors", "set-map", "nothing"];
            let known = written_anew.contains(&&*name) || told.contains(&(index + 1));
            let nothing = ["~", "[]", "{}"].iter().any(|word| line.contains(word));
            let last = index + 1 == before.split('\n').count();
            if !known && !nothing && !last {
                assert!(
                    after.any(|other| other == line),
                    "{name}: line {} is not there: {line:?}",
                    index + 1
                );
            }
        }
        assert!(
            name.starts_with("set-") || is_within(&without_nothings(&before), &text),
            "{name}: something of the user's is gone"
        );
        // Nothing that was right for the chart is wrong now.
        let folder = TempDir::new().expect("a folder");
        fs::write(folder.path().join(&file), &text).expect("written");
        for version in ["1.19", "1.20"] {
            let errors = |folder: &Path| -> BTreeSet<String> {
                let args = ["lint", "--severity", "error", "--version", version, &file];
                let found = said(&chandra_mixin(folder, &args));
                let place = |line: &str| line.splitn(4, ':').last().map(str::to_owned);
                found.lines().filter_map(place).collect()
            };
            let (before, after) = (
                errors(path.parent().expect("a folder")),
                errors(folder.path()),
            );
            assert!(after.is_subset(&before), "{name}: {after:#?}");
        }
        let twice = TempDir::new().expect("a folder");
        fs::write(twice.path().join(&file), &text).expect("written");
        let again = chandra_mixin(twice.path(), &args);
        assert!(again.stdout == text.as_bytes(), "{name}: {}", said(&again));
    }
}

#[test]
fn a_file_is_written_whole_in_its_own_place_and_stdin_is_read() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("my.yaml");
    let text = "# mine\ncluster:\n  name: one\n";
    fs::write(&path, text).expect("written");
    let output = chandra_mixin(folder.path(), &["merge", "my.yaml", "--out", "my.yaml"]);
    assert!(
        output.status.success() && said(&output).is_empty(),
        "{}",
        said(&output)
    );
    let merged = fs::read_to_string(&path).expect("readable");
    assert!(
        merged.starts_with(text) && merged.contains("- flow:labelsContext="),
        "{merged}"
    );

    let mut child = Command::new(env!("CARGO_BIN_EXE_chandra-mixin"))
        .args(["merge", "--chart", "cilium", "--version", "v1.19.6", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let stdin = child.stdin.take();
    stdin
        .expect("a pipe")
        .write_all(b"hubble: {enabled: false}\n")
        .expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", said(&output));
    let notes = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(
        notes.starts_with("stdin:1: hubble.enabled: false stays"),
        "{notes}"
    );
}

#[test]
fn a_file_keeps_its_mode_and_a_link_stays_one() {
    let folder = TempDir::new().expect("a folder");
    let place = |name: &str| folder.path().join(name);
    let mode = |name: &str| {
        fs::metadata(place(name))
            .expect("there")
            .permissions()
            .mode()
            & 0o777
    };
    fs::write(place("secret.yaml"), "a: 1\n").expect("written");
    fs::set_permissions(place("secret.yaml"), fs::Permissions::from_mode(0o600)).expect("set");
    std::os::unix::fs::symlink("secret.yaml", place("link.yaml")).expect("linked");
    let merge = |from: &str, to: &str| {
        let output = chandra_mixin(folder.path(), &["merge", from, "--out", to]);
        assert!(output.status.success(), "{}", said(&output));
    };
    merge("secret.yaml", "new.yaml");
    assert_eq!(mode("new.yaml"), 0o600, "as the values that it has");
    merge("link.yaml", "link.yaml");
    assert!(
        fs::symlink_metadata(place("link.yaml"))
            .expect("there")
            .is_symlink()
    );
    assert_eq!(mode("secret.yaml"), 0o600);
    assert!(
        fs::read_to_string(place("secret.yaml"))
            .expect("there")
            .contains("hubble:")
    );
    merge("secret.yaml", "/dev/null");
    assert!(!fs::metadata("/dev/null").expect("there").is_file());
}

#[test]
fn overrides_reach_the_merged_values() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("my.yaml"), "").expect("written");
    fs::write(
        folder.path().join("my.jsonnet"),
        "{ _config+:: { operator+: { labels: { team: 'ai' } } } }",
    )
    .expect("written");
    let output = chandra_mixin(
        folder.path(),
        &["merge", "my.yaml", "--config", "my.jsonnet"],
    );
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("team: ai") && !said(&output).contains("release:"));
}

#[test]
fn other_charts_are_merged_too() {
    let folder = TempDir::new().expect("a folder");
    let prometheus = "serverFiles:\n  alerting_rules.yml:\n    groups:\n    - name: mine\n      rules: [] # none\n";
    fs::write(folder.path().join("my.yaml"), prometheus).expect("written");
    let output = chandra_mixin(
        folder.path(),
        &["merge", "--chart", "prometheus", "my.yaml"],
    );
    let text = said(&output);
    assert!(
        output.status.success() && text.starts_with(prometheus),
        "{text}"
    );
    let ours = Chart::find("prometheus", Some("29.27.0")).expect("known");
    let ours = ours.values(None, false).expect("rendered");
    let groups = |values: &Value| {
        values["serverFiles"]["alerting_rules.yml"]["groups"]
            .as_array()
            .expect("a list")
            .clone()
    };
    let expected = [vec![json!({"name": "mine", "rules": []})], groups(&ours)].concat();
    assert_eq!(groups(&values(&text)), expected);

    // Nothing written is nothing lost, and is filled.
    for (chart, text, path) in [
        (
            "prometheus",
            "serverFiles:\n  alerting_rules.yml:\n    # groups: []\n",
            "/serverFiles/alerting_rules.yml/groups/0/name",
        ),
        (
            "prometheus",
            "serverFiles:\n  alerting_rules.yml:\n    groups:\n",
            "/serverFiles/alerting_rules.yml/groups/0/name",
        ),
        (
            "kube-prometheus-stack",
            "additionalPrometheusRulesMap:\n",
            "/additionalPrometheusRulesMap/chandra-tcp/groups/0/name",
        ),
    ] {
        let (_folder, output) = merged_files(&[("my.yaml", text)], &["--chart", chart, "my.yaml"]);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{text}: {}",
            said(&output)
        );
        let merged = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(values(&merged).pointer(path).is_some(), "{text}: {merged}");
    }

    let output = chandra_mixin(
        folder.path(),
        &[
            "merge",
            "--chart",
            "kube-prometheus-stack",
            "--version",
            "88.5.3",
            "my.yaml",
        ],
    );
    assert!(output.status.success(), "{}", said(&output));
}

/// Files in a folder, and merging them.
fn merged_files(files: &[(&str, &str)], args: &[&str]) -> (TempDir, Output) {
    let folder = TempDir::new().expect("a folder");
    for (name, text) in files {
        fs::write(folder.path().join(name), text).expect("written");
    }
    let output = chandra_mixin(folder.path(), &[&["merge"], args].concat());
    (folder, output)
}

fn values(text: &str) -> Value {
    let document = Document::parse(text).expect("YAML");
    document.value().expect("values")
}

#[test]
fn of_several_files_the_last_gets_what_the_earlier_ones_lack() {
    let base = "hubble:
  metrics:
    # ours since 2021
    enabled: [tcp, 'drop:sourceContext=pod']
    serviceMonitor: {enabled: true, labels: {release: prom}}
prometheus: {enabled: false}
bpf: {events: {drop: {enabled: true}}}
";
    let prod = "# production\ncluster: {name: prod}\n";
    let files = [("base.yaml", base), ("prod.yaml", prod)];
    for args in [
        &["base.yaml", "prod.yaml"][..],
        &["-f", "base.yaml", "-f", "prod.yaml"],
    ] {
        let (folder, output) = merged_files(&files, &[args, &["--out", "merged.yaml"]].concat());
        assert!(output.status.success(), "{}", said(&output));
        let text = fs::read_to_string(folder.path().join("merged.yaml")).expect("written");
        assert!(text.starts_with(prod), "{text}");
        let last = values(&text);
        // Helm replaces lists, so the base's stands here again; maps and what is set already does not.
        let enabled = [
            "tcp",
            "drop:sourceContext=pod;labelsContext=source_namespace,destination_namespace,traffic_direction",
            "dns:labelsContext=source_namespace,destination_namespace",
            "flow:labelsContext=source_namespace,destination_namespace",
            "policy:labelsContext=source_namespace,destination_namespace",
            "port-distribution:labelsContext=source_namespace,source_pod",
        ];
        let expected = json!({
            "cluster": {"name": "prod"},
            "hubble": {"enabled": true, "metrics": {"enabled": enabled, "serviceMonitor": {"interval": "30s"}}},
            "prometheus": {"serviceMonitor": {"enabled": true, "interval": "30s", "labels": {"release": "prom"}, "trustCRDsExist": true}},
        });
        assert_eq!(last, expected);
        let notes: Vec<String> = said(&output).lines().map(str::to_owned).collect();
        for (line, part) in notes.iter().zip([
            "base.yaml:4: hubble.metrics.enabled: drop:sourceContext=pod becomes drop:sourceContext=pod;labelsContext=",
            "base.yaml:5: prometheus.serviceMonitor.labels.release: is prom, as here",
            "base.yaml:6: prometheus.enabled: false stays (Chandra has true): the agent exports no metrics",
        ]) {
            assert!(line.starts_with(part), "{notes:#?}");
        }
        assert_eq!(notes.len(), 3, "{notes:#?}");
        let again = chandra_mixin(folder.path(), &["merge", "base.yaml", "merged.yaml"]);
        assert!(again.stdout == text.as_bytes(), "{}", said(&again));
    }

    // What the earlier file has twice, or as `--set` has lists, is repeated as it is meant.
    for (earlier, entries) in [
        ("hubble: {metrics: {enabled: [dns, 'dns:query']}}\n", 6),
        ("hubble:\n  metrics:\n    enabled: \"{tcp,icmp}\"\n", 7),
    ] {
        let (_folder, output) = merged_files(
            &[("a.yaml", earlier), ("b.yaml", "x: 1\n")],
            &["a.yaml", "b.yaml"],
        );
        assert!(output.status.success(), "{}", said(&output));
        let enabled =
            values(&String::from_utf8_lossy(&output.stdout))["hubble"]["metrics"]["enabled"]
                .clone();
        assert_eq!(enabled.as_array().map(Vec::len), Some(entries), "{enabled}");
    }

    // The last file's word counts, whatever stands before it.
    let (_folder, output) = merged_files(
        &[
            (
                "a.yaml",
                "hubble: {metrics: {enabled: [tcp]}}\nextraContainers: [{name: chandra, image: mine}]\n",
            ),
            ("b.yaml", "hubble:\n  metrics:\n    enabled: [icmp]\n"),
        ],
        &["a.yaml", "b.yaml"],
    );
    let enabled =
        values(&String::from_utf8_lossy(&output.stdout))["hubble"]["metrics"]["enabled"].clone();
    assert_eq!(
        (&enabled[0], enabled.as_array().map(Vec::len)),
        (&json!("icmp"), Some(6))
    );

    for (files, expected) in [
        (
            [("a.yaml", "hubble: {metrics: on}\n"), ("b.yaml", "")],
            "a.yaml: line 1: hubble.metrics is true, and the chart wants a map",
        ),
        (
            [("a.yaml", "- a\n"), ("b.yaml", "")],
            "a.yaml:1:1: values are a map",
        ),
        (
            [("a.yaml", "a: 1\n---\nb: 1\n"), ("b.yaml", "")],
            "a.yaml:3:1: a second document",
        ),
    ] {
        let (folder, output) = merged_files(&files, &["a.yaml", "b.yaml", "--out", "out.yaml"]);
        assert_eq!(
            (output.status.code(), said(&output).lines().count()),
            (Some(2), 1),
            "{}",
            said(&output)
        );
        assert!(said(&output).contains(expected), "{}", said(&output));
        assert!(!folder.path().join("out.yaml").exists());
    }
}

#[test]
fn a_diff_is_a_patch_that_makes_the_merged_file() {
    for name in ["comments", "crlf", "multi-indent", "set-text"] {
        let text = fs::read_to_string(root().join(format!("mixin/tests/values/{name}.yaml")))
            .expect("there");
        let (folder, output) = merged_files(
            &[("my.yaml", &text)],
            &["--version", "1.19", "--diff", "my.yaml"],
        );
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(
            fs::read_to_string(folder.path().join("my.yaml")).expect("there"),
            text,
            "nothing is written"
        );
        fs::write(folder.path().join("my.patch"), &output.stdout).expect("written");
        let apply = Command::new("git")
            .current_dir(folder.path())
            .args(["apply", "-p0", "--whitespace=nowarn", "my.patch"])
            .output()
            .expect("git runs");
        assert!(apply.status.success(), "{name}: {}", said(&apply));
        let merged = fs::read_to_string(folder.path().join("my.yaml")).expect("there");
        let expected = root().join(format!("mixin/tests/values/expected/{name}.merged.yaml"));
        assert!(
            merged == fs::read_to_string(expected).expect("committed"),
            "{name}: {merged}"
        );
        let again = chandra_mixin(
            folder.path(),
            &["merge", "--version", "1.19", "--diff", "my.yaml"],
        );
        assert!(again.stdout.is_empty(), "{name}: {}", said(&again));
    }
}

#[test]
fn monitors_get_the_release_that_selects_them() {
    let of = |text: &str, args: &[&str]| {
        let (_folder, output) = merged_files(&[("my.yaml", text)], &[args, &["my.yaml"]].concat());
        assert!(output.status.success(), "{}", said(&output));
        let values = values(&String::from_utf8_lossy(&output.stdout));
        let label = |path: &str| {
            values
                .pointer(&format!("{path}/serviceMonitor/labels/release"))
                .cloned()
        };
        (label("/prometheus"), label("/hubble/metrics"))
    };
    let both = |name: &str| (Some(json!(name)), Some(json!(name)));
    assert_eq!(of("", &[]), both("kube-prometheus-stack"));
    assert_eq!(of("", &["--release", "kps"]), both("kps"));
    let envoy = "envoy: {prometheus: {serviceMonitor: {enabled: true, labels: {release: mon}}}}\n";
    assert_eq!(of(envoy, &[]), both("mon"));
    assert_eq!(of(envoy, &["--release", "kps"]), both("mon"));
    // Two of them: nobody knows.
    let two = format!(
        "{envoy}operator: {{prometheus: {{serviceMonitor: {{labels: {{release: other}}}}}}}}\n"
    );
    assert_eq!(of(&two, &[]), both("kube-prometheus-stack"));
}

#[test]
fn rules_that_the_operators_chart_would_ignore_are_taken_over() {
    let mine = "additionalPrometheusRules:  # since 2020
- name: mine
  additionalLabels: {team: ai}
  groups: [{name: g, rules: [{alert: A, expr: up == 0}]}]
- name: chandra-tcp
  groups: []
";
    let args = ["--chart", "kube-prometheus-stack", "my.yaml"];
    let (folder, output) = merged_files(&[("my.yaml", mine)], &args);
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with(mine), "{text}");
    let rules = &values(&text)["additionalPrometheusRulesMap"];
    assert_eq!(
        rules["mine"],
        json!({"additionalLabels": {"team": "ai"}, "groups": [{"name": "g", "rules": [{"alert": "A", "expr": "up == 0"}]}]})
    );
    assert!(rules["chandra-tcp"]["groups"][0]["name"] == "chandra-tcp.rules");
    let note = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        note.starts_with("my.yaml:1: additionalPrometheusRules: the chart ignores it as soon as"),
        "{note}"
    );
    fs::write(folder.path().join("my.yaml"), &text).expect("written");
    let again = chandra_mixin(folder.path(), &[&["merge"], &args[..]].concat());
    assert!(
        again.stdout == text.as_bytes() && again.stderr.is_empty(),
        "{}",
        said(&again)
    );

    // A name twice, or one of ours, is another key of the map.
    let twice = "additionalPrometheusRules:\n- {name: mine, groups: [{name: A}]}\n- {name: mine, groups: [{name: B}]}\n- {name: chandra-tcp, groups: [{name: C}]}\n";
    let (folder, output) = merged_files(&[("my.yaml", twice)], &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let rules = &values(&text)["additionalPrometheusRulesMap"];
    for (name, group) in [("mine", "A"), ("mine-2", "B"), ("chandra-tcp-2", "C")] {
        assert_eq!(rules[name]["groups"][0]["name"], group, "{rules}");
    }
    // One that is put into the list later is not in the map, and the chart does not read it.
    fs::write(
        folder.path().join("my.yaml"),
        text.replacen(
            "- {name: mine",
            "- {name: late, groups: [{name: D}]}\n- {name: mine",
            1,
        ),
    )
    .expect("written");
    let again = chandra_mixin(folder.path(), &[&["merge"], &args[..]].concat());
    assert!(again.status.success());
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("put late there"),
        "{}",
        said(&again)
    );

    let (_folder, output) = merged_files(
        &[("my.yaml", "additionalPrometheusRules: [{groups: []}]\n")],
        &args,
    );
    assert_eq!(
        (output.status.code(), said(&output).lines().count()),
        (Some(2), 1)
    );
    // Where the map is there already, the list is dead, and stays so.
    let (_folder, output) = merged_files(
        &[(
            "my.yaml",
            "additionalPrometheusRules: [{name: dead}]\nadditionalPrometheusRulesMap: {live: {groups: []}}\n",
        )],
        &args,
    );
    assert!(
        !values(&String::from_utf8_lossy(&output.stdout))["additionalPrometheusRulesMap"]
            .as_object()
            .expect("a map")
            .contains_key("dead")
    );
}

#[test]
fn what_cannot_be_merged_is_refused_in_one_line() {
    let folder = TempDir::new().expect("a folder");
    let refused = |text: &str, args: &[&str], expected: &str| {
        fs::write(folder.path().join("my.yaml"), text).expect("written");
        let output = chandra_mixin(folder.path(), &[&["merge", "my.yaml"], args].concat());
        let message = said(&output);
        assert_eq!(output.status.code(), Some(2), "{text:?}: {message}");
        assert!(
            message.contains(expected),
            "{text:?}: no {expected:?} in {message}"
        );
        assert_eq!(message.lines().count(), 1, "{text:?}: {message}");
    };
    refused(
        "",
        &["--version", "1.18"],
        "cilium 1.18 is not supported: there are 1.19, 1.20",
    );
    refused("", &["--version", "1.191"], "there are 1.19, 1.20");
    refused(
        "",
        &["--chart", "grafana"],
        "unknown chart grafana: there are cilium, kube-prometheus-stack, prometheus",
    );
    refused(
        "",
        &["--chart", "prometheus", "--sidecar"],
        "--sidecar is for the chart cilium",
    );
    refused(
        "",
        &["--sidecar"],
        "the exporter's image, and none is published: build it (make image)",
    );
    refused(
        "",
        &["--config", "nowhere.jsonnet"],
        "cannot read nowhere.jsonnet",
    );
    refused(
        "",
        &["--out", "nowhere/my.yaml"],
        "cannot write into nowhere",
    );
    refused("a: [", &[], "my.yaml:1:4: is not YAML");
    refused("- a\n", &[], "my.yaml:1:1: values are a map");
    refused(
        "hubble: on\n",
        &[],
        "my.yaml:1:9: hubble is true, and the chart wants a map",
    );
    refused(
        "prometheus:\n  enabled: 'true'\n",
        &[],
        "my.yaml:2:12: prometheus.enabled is \"true\", and the chart wants true or false",
    );
    refused(
        "hubble:\n  metrics: [drop]\n",
        &[],
        "my.yaml:2:12: hubble.metrics is a list, and the chart wants a map",
    );
    refused(
        "hubble: {metrics: {enabled: {drop: x}}}\n",
        &[],
        "my.yaml:1:29: hubble.metrics.enabled is a map, and the chart wants a list",
    );
    refused(
        "hubble:\n  metrics:\n    enabled:\n    - \"dr\\u006fp\"\n",
        &[],
        "my.yaml:4:7: hubble.metrics.enabled: write drop as",
    );
    refused(
        "m: &m [drop]\nhubble:\n  metrics:\n    enabled: *m\n",
        &[],
        "my.yaml:4:14: hubble.metrics.enabled",
    );
    refused(
        "m: &m {labels: {a: b}, enabled: true}\nprometheus: {serviceMonitor: *m}\n",
        &[],
        "prometheus.serviceMonitor.labels.release has to be added, but the map comes from elsewhere",
    );
    refused(
        "!!null null\n",
        &[],
        "my.yaml:1:8: the file is written in a way",
    );
    // What is no list of `--set` is none.
    for text in [
        "{dns, \"drop:labelsContext=a,b\"}",
        "{dns: null, drop: ~}",
        "\n      {dns: 1}",
    ] {
        let text = format!("hubble:\n  metrics:\n    enabled: {text}\n");
        refused(
            &text,
            &[],
            "hubble.metrics.enabled is a map, and the chart wants a list",
        );
    }
    refused(
        "hubble:\n  metrics:\n    enabled: |+\n      {dns,drop}\n\n\n    x: 1\n",
        &[],
        "and the chart wants a list",
    );
    refused(
        "hubble:\n  metrics: {enabled: [tcp, &e flow]}\nlist: [*e]\n",
        &[],
        "my.yaml:3:1: list cannot be merged without touching more",
    );
    refused("a: 1\nb: \u{1}\n", &[], "my.yaml:2:4: is not YAML");
    // A line break at the end would become part of the text.
    refused(
        "dashboards:\n  enabled: true\nextraConfig:\n  a: |\n    text",
        &[],
        "cannot be merged without touching more",
    );
    for args in [
        &["merge"][..],
        &["merge", "nowhere.yaml"],
        &["merge", "--what", "my.yaml"],
        &["merge", "--diff", "--out", "x.yaml", "my.yaml"],
        &["merge", "-f", "my.yaml", "my.yaml"],
        &["lint"],
    ] {
        assert_eq!(
            chandra_mixin(folder.path(), args).status.code(),
            Some(2),
            "{args:?}"
        );
    }
    fs::write(folder.path().join("my.yaml"), b"a: 1\nb: \xff\n").expect("written");
    let output = chandra_mixin(folder.path(), &["merge", "my.yaml"]);
    assert!(
        said(&output).contains("my.yaml:2:1: is not UTF-8"),
        "{}",
        said(&output)
    );
    assert_eq!(
        (output.status.code(), said(&output).lines().count()),
        (Some(2), 1),
        "{}",
        said(&output)
    );
}

#[test]
fn a_huge_file_is_merged_in_a_moment() {
    let mut text = "hubble:\n  metrics:\n    enabled:\n    - tcp\nextraConfig:\n".to_owned();
    for index in 0..20_000 {
        text.push_str(&format!("  key-{index}: 'value {index}' # {index}\n"));
    }
    let start = Instant::now();
    let merged = merge(&text).expect("merged");
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
    assert!(is_within(&text, &merged.text));
}

#[test]
fn keys_that_stand_behind_a_mark_are_added_to() {
    for text in [
        "&a a: 1\nhubble: {}\n",
        "? a\n: b\n",
        "hubble:\n  &m metrics:\n    port: 1\n",
    ] {
        let merged = merge(text)
            .unwrap_or_else(|failure| panic!("{text}: {failure}"))
            .text;
        assert!(is_within(&without_nothings(text), &merged), "{merged}");
        assert_eq!(values(&merged)["hubble"]["enabled"], true, "{merged}");
    }
    let both = "x: &x {a: 1}\ny: &y {b: 2}\nhubble:\n  <<: *x\n  <<: *y\n";
    let merged = values(&merge(both).expect("merged").text);
    assert_eq!(
        (&merged["hubble"]["a"], &merged["hubble"]["b"]),
        (&json!(1), &json!(2))
    );
}

#[test]
fn a_file_without_values_keeps_what_is_said_in_it() {
    for (text, expected) in [
        ("null\n", "bpf:\n"),
        ("~", "bpf:\n"),
        (
            "null # as helm get values prints it\n# more\n",
            " # as helm get values prints it\nbpf:\n",
        ),
        ("# nothing yet\n", "# nothing yet\nbpf:\n"),
        ("---\n", "---\nbpf:\n"),
        ("--- null\n", "--- \nbpf:\n"),
        ("", "bpf:\n"),
    ] {
        let merged = merge(text).expect(text).text;
        assert!(merged.starts_with(expected), "{text:?}: {merged}");
        assert_eq!(
            text.matches('#').count(),
            merged.matches('#').count(),
            "{merged}"
        );
        assert_eq!(merge(&merged).expect("merged").text, merged);
    }
    let merged = merge("hubble: {metrics: {enabled: \"{}\"}}\n")
        .expect("merged")
        .text;
    assert_eq!(
        values(&merged)["hubble"]["metrics"]["enabled"]
            .as_array()
            .map(Vec::len),
        Some(5)
    );
}

/// A tree of a user's, and how it is written.
#[derive(Clone, Debug)]
enum Tree {
    Scalar(&'static str),
    List(Vec<Tree>),
    Map(Vec<(&'static str, Tree)>),
}

const WORDS: [&str; 13] = [
    "x",
    "'y'",
    "\"é # no comment\"",
    "1",
    "-0x1f",
    "true",
    "~",
    "null",
    "a b",
    "http://x:1/#y",
    "'{}'",
    "\"\\u00e9\\n\"",
    "2001-01-01",
];
/// Keys that the chart has, but not where ours are, and some of users' anchors' places.
const OTHERS: [&str; 8] = [
    "podLabels",
    "extraConfig",
    "\"relay\"",
    "'ui'",
    "größe",
    "k8sServiceHost",
    "priorityClassName",
    "tls",
];

fn any_tree() -> impl Strategy<Value = Tree> {
    let leaf = select(&WORDS[..]).prop_map(Tree::Scalar);
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Tree::List),
            prop::collection::vec((select(&OTHERS[..]), inner), 0..4)
                .prop_map(|fields| Tree::Map(unique(fields))),
        ]
    })
}

fn unique(fields: Vec<(&'static str, Tree)>) -> Vec<(&'static str, Tree)> {
    let mut seen = BTreeSet::new();
    fields
        .into_iter()
        .filter(|(key, _)| seen.insert(*key))
        .collect()
}

/// The same with the keys of its maps in another order.
fn shuffled(tree: Tree) -> BoxedStrategy<Tree> {
    match tree {
        Tree::Scalar(_) => Just(tree).boxed(),
        Tree::List(items) => {
            let items: Vec<_> = items.into_iter().map(shuffled).collect();
            items.prop_map(Tree::List).boxed()
        }
        Tree::Map(fields) => {
            let fields: Vec<_> = fields
                .into_iter()
                .map(|(key, tree)| shuffled(tree).prop_map(move |tree| (key, tree)))
                .collect();
            fields.prop_shuffle().prop_map(Tree::Map).boxed()
        }
    }
}

/// What a user may have at a path of ours, with other keys around it.
fn around(ours: &Value, path: &str) -> BoxedStrategy<Tree> {
    match ours {
        Value::Object(map) => {
            let known: Vec<BoxedStrategy<Option<(&'static str, Tree)>>> = map
                .iter()
                .map(|(key, value)| {
                    let key: &'static str = Box::leak(key.clone().into_boxed_str());
                    let path = format!("{path}.{key}");
                    prop::option::weighted(
                        0.6,
                        around(value, &path).prop_map(move |tree| (key, tree)),
                    )
                    .boxed()
                })
                .collect();
            let others = prop::collection::vec((select(&OTHERS[..]), any_tree()), 0..3);
            (known, others)
                .prop_flat_map(|(known, others)| {
                    let fields: Vec<_> =
                        known.into_iter().flatten().chain(unique(others)).collect();
                    Just(fields).prop_shuffle()
                })
                .prop_map(Tree::Map)
                .boxed()
        }
        Value::Array(_) => {
            let entries = [
                "drop",
                "'tcp'",
                "\"flow\"",
                "drop:sourceContext=pod|ip;labelsContext=source_namespace",
                "dns:query;ignoreAAAA",
                "port-distribution",
                "'icmp:labelsContext=source_pod'",
            ];
            let list =
                prop::sample::subsequence(entries.to_vec(), 0..=entries.len()).prop_shuffle();
            let list = list.prop_map(|entries| {
                let mut names = BTreeSet::new();
                let name = |text: &str| {
                    text.trim_matches(['\'', '"'])
                        .split(':')
                        .next()
                        .unwrap_or_default()
                        .to_owned()
                };
                let once = entries
                    .into_iter()
                    .filter(|entry| names.insert(name(entry)));
                Tree::List(once.map(Tree::Scalar).collect())
            });
            prop_oneof![4 => list, 1 => Just(Tree::Scalar("~")), 1 => Just(Tree::Scalar(""))]
                .boxed()
        }
        Value::Bool(_) => select(&["true", "false", "yes", "off", "~", ""][..])
            .prop_map(Tree::Scalar)
            .boxed(),
        _ => select(&["prom", "'kube-prometheus-stack'", "kube-prometheus-stack"][..])
            .prop_map(Tree::Scalar)
            .boxed(),
    }
}

/// How a tree is written: consumed byte by byte, for one choice after another.
struct Style<'a> {
    choices: std::iter::Cycle<std::slice::Iter<'a, u8>>,
    step: usize,
    text: String,
}

impl Style<'_> {
    fn chance(&mut self, of: u8) -> bool {
        self.choices.next().is_some_and(|choice| choice % of == 0)
    }

    fn flow(&mut self, tree: &Tree) -> String {
        let space = if self.chance(4) { "  " } else { " " };
        match tree {
            Tree::Scalar(word)
                if word.contains(['=', '|', '#']) && !word.starts_with(['\'', '"']) =>
            {
                format!("'{word}'")
            }
            Tree::Scalar(word) => (*word).to_owned(),
            Tree::List(items) => {
                let items: Vec<String> = items.iter().map(|item| self.flow(item)).collect();
                // Nothing at all is no item.
                let items: Vec<String> = items
                    .into_iter()
                    .map(|item| {
                        if item.is_empty() {
                            "~".to_owned()
                        } else {
                            item
                        }
                    })
                    .collect();
                let comma = if !items.is_empty() && self.chance(5) {
                    ","
                } else {
                    ""
                };
                format!("[{}{comma}]", items.join(&format!(",{space}")))
            }
            Tree::Map(fields) => {
                let fields: Vec<String> = fields
                    .iter()
                    .map(|(key, tree)| format!("{key}: {}", self.flow(tree)))
                    .collect();
                format!("{{{}}}", fields.join(&format!(",{space}")))
            }
        }
    }

    fn comment(&mut self, column: usize) {
        if self.chance(5) {
            self.text.push_str(&format!(
                "{}# \tein Kommentar: {{}} [] '\n",
                " ".repeat(column)
            ));
        }
        if self.chance(9) {
            self.text.push('\n');
        }
    }

    fn end(&mut self) {
        let end = if self.chance(6) {
            "   # and why: \t{"
        } else {
            ""
        };
        self.text.push_str(end);
        self.text.push('\n');
    }

    fn map(&mut self, fields: &[(&str, Tree)], column: usize, mut here: bool) {
        for (key, tree) in fields {
            if !here {
                self.comment(column);
                self.text.push_str(&" ".repeat(column));
            }
            here = false;
            self.text.push_str(&format!("{key}:"));
            match tree {
                Tree::Map(fields) if !fields.is_empty() && !self.chance(6) => {
                    self.end();
                    let column = column + self.step + usize::from(self.chance(7));
                    self.map(fields, column, false);
                }
                Tree::List(items) if !items.is_empty() && !self.chance(4) => {
                    self.end();
                    let deeper = if self.chance(2) { self.step } else { 0 };
                    self.list(items, column + deeper);
                }
                Tree::Scalar("") => self.end(),
                Tree::Scalar(word) if self.chance(12) && !word.starts_with(['\'', '"', '~']) => {
                    let header = if self.chance(2) { "|" } else { ">-" };
                    let indent = " ".repeat(column + self.step);
                    self.text
                        .push_str(&format!(" {header}\n{indent}{word}\n\n{indent}  tiefer\n"));
                }
                other => {
                    let text = self.flow(other);
                    self.text.push_str(&format!(" {text}"));
                    self.end();
                }
            }
        }
    }

    fn list(&mut self, items: &[Tree], column: usize) {
        for item in items {
            self.comment(column);
            self.text.push_str(&format!("{}-", " ".repeat(column)));
            match item {
                Tree::Map(fields) if !fields.is_empty() && !self.chance(3) => {
                    self.text.push(' ');
                    self.map(fields, column + 2, true);
                }
                Tree::Scalar("") => self.end(),
                other => {
                    let text = self.flow(other);
                    self.text.push_str(&format!(" {text}"));
                    self.end();
                }
            }
        }
    }
}

/// Ours are booleans and texts: a block scalar there would be another type.
fn written(tree: &Tree, choices: &[u8]) -> String {
    let mut style = Style {
        choices: choices.iter().cycle(),
        step: 2,
        text: String::new(),
    };
    style.step = if style.chance(3) { 4 } else { 2 };
    let (windows, marker, unfinished) = (style.chance(4), style.chance(4), style.chance(6));
    if marker {
        style.text.push_str("---\n");
    }
    match tree {
        Tree::Map(fields) if fields.is_empty() || style.chance(8) => {
            let text = style.flow(tree);
            style.text.push_str(&text);
            style.text.push('\n');
        }
        Tree::Map(fields) => style.map(fields, 0, false),
        _ => {}
    }
    style.comment(0);
    let mut text = style.text;
    if unfinished && !text.contains(['|', '>']) {
        text.truncate(text.trim_end().len());
    }
    if windows {
        text.replace('\n', "\r\n")
    } else {
        text
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_the_user_wrote_nothing_is_lost((tree, choices) in {
        let (ours, _) = ours();
        (around(ours, ""), prop::collection::vec(any::<u8>(), 64))
    }) {
        let text = written(&tree, &choices);
        let document = Document::parse(&text).map_err(|problem| TestCaseError::fail(format!("{problem:?}\n{text}")))?;
        let before = document.value().expect("values");
        match merge(&text) {
            Ok(merged) => {
                let after = Document::parse(&merged.text).expect("YAML").value().expect("values");
                let kept = merged.notes.iter().map(|note| note.path.clone()).filter(|path| path != "hubble.metrics.enabled").collect();
                let filled = BTreeSet::from(["hubble.metrics.enabled", "prometheus.serviceMonitor.labels", "hubble.metrics.serviceMonitor.labels"].map(str::to_owned));
                prop_assert_eq!(proof::lost(&before, &after, "", &filled), None, "{}\n---\n{}", text, merged.text);
                prop_assert_eq!(proof::missing(&merged.ours, &after, "", &kept), None, "{}\n---\n{}", text, merged.text);
                prop_assert_eq!(proof::foreign(&after, Some(&before), Some(&merged.ours), ""), None, "{}\n---\n{}", text, merged.text);
                prop_assert!(is_within(&without_nothings(&text), &merged.text), "{}\n---\n{}", text, merged.text);
                let again = merge(&merged.text).expect("merged twice");
                prop_assert_eq!(again.text, merged.text);
            }
            // A block scalar in the place of a boolean, or of an entry.
            Err(problem) if problem.to_string().contains("and the chart wants") || problem.to_string().contains("in one line") => {}
            Err(problem) => prop_assert!(false, "{problem}\n{text}"),
        }
    }

    #[test]
    fn the_order_of_keys_makes_no_difference((tree, shuffled, style) in {
        let (ours, _) = ours();
        let trees = around(ours, "").prop_flat_map(|tree| (Just(tree.clone()), shuffled(tree)));
        (trees, select(vec![[0_u8], [1]])).prop_map(|((tree, shuffled), style)| (tree, shuffled, style))
    }) {
        // One style for all of it.
        let results = [&tree, &shuffled].map(|tree| merge(&written(tree, &style)));
        if let [Ok(one), Ok(other)] = results {
            prop_assert_eq!(values(&one.text), values(&other.text));
            let told = |merged: &Merged| -> BTreeSet<String> {
                merged.notes.iter().map(|note| format!("{}: {}", note.path, note.text)).collect()
            };
            prop_assert_eq!(told(&one), told(&other));
        }
    }

    #[test]
    fn whatever_comes_in_is_merged_or_refused(text in "([a-z]{0,3}|hubble|metrics|enabled|[-:{}\\[\\],&*#|>'\"~ \n\t]|: |- |\n  |\r\n|é){0,24}") {
        if let Ok(merged) = merge(&text) {
            prop_assert!(is_within(&without_nothings(&text), &merged.text), "{:?}\n---\n{}", text, merged.text);
        }
    }
}
