// SPDX-License-Identifier: Apache-2.0
//! The renderer as its user meets it: what it writes, what it removes, and how it refuses.

mod common;
#[path = "common/renderer.rs"]
mod renderer;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use common::{root, said};
use renderer::chandra_mixin;
use tempfile::TempDir;

fn render(folder: &Path, args: &[&str]) -> Output {
    chandra_mixin(folder, &[&["render"], args].concat())
}

/// Every file below a folder, with its text.
fn tree(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("readable") {
            let path = entry.expect("readable").path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path
                        .strip_prefix(folder)
                        .expect("below")
                        .display()
                        .to_string();
                    found.push((name, fs::read_to_string(&path).expect("text")));
                }
            }
        }
    }
    found.sort();
    found
}

#[test]
fn what_is_committed_is_what_is_rendered() {
    let output = render(&root(), &["--check"]);
    assert!(
        output.status.success(),
        "run make generate: {}",
        said(&output)
    );
}

#[test]
fn a_file_that_is_not_rendered_any_more_goes_and_others_stay() {
    let out = TempDir::new().expect("a folder");
    assert!(render(out.path(), &[]).status.success());
    let rendered = tree(out.path());
    let place = |name: &str| out.path().join(name);
    fs::copy(place("alerts/tcp.yaml"), place("alerts/gone.yaml")).expect("written");
    fs::copy(
        place("dashboards/chandra.json"),
        place("dashboards/gone.json"),
    )
    .expect("written");
    let own = [
        ("alerts/own.yaml", "groups: []\n"),
        ("dashboards/own.json", "{\"tags\": [\"own\"]}\n"),
    ];
    for (name, text) in own {
        fs::write(place(name), text).expect("written");
    }
    fs::write(place("alerts/tcp.yaml"), "changed").expect("written");
    fs::remove_file(place("dashboards/chandra-tcp.json")).expect("removed");

    let check = render(out.path(), &["--check"]);
    assert_eq!(check.status.code(), Some(1), "{}", said(&check));
    for name in [
        "alerts/tcp.yaml",
        "dashboards/chandra-tcp.json",
        "alerts/gone.yaml",
        "dashboards/gone.json",
    ] {
        assert!(said(&check).contains(name), "{name}: {}", said(&check));
    }
    assert_eq!(said(&check).lines().count(), 4, "{}", said(&check));

    assert!(render(out.path(), &[]).status.success());
    let mut expected = rendered;
    expected.extend(own.map(|(name, text)| (name.to_owned(), text.to_owned())));
    expected.sort();
    assert!(
        tree(out.path()) == expected,
        "not what the first rendering wrote"
    );
    assert!(render(out.path(), &["--check"]).status.success());
    let mode = fs::metadata(place("alerts/tcp.yaml"))
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o644);
}

#[test]
fn overrides_reach_rules_texts_and_panels() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("threshold.libsonnet"), "25").expect("written");
    fs::write(
        folder.path().join("my.jsonnet"),
        "{
           _config+:: {
             selector: 'job=\"mine\"', window: '2m', nodeLabel: 'host', clusterLabel: 'zone',
             severities+: { ticket: 'P3' },
             operator+: { labels: { team: 'ai' } },
             tcp+: { TcpRetransmitsHigh+: { threshold: import 'threshold.libsonnet', 'for': '90s' } },
           },
         }",
    )
    .expect("written");
    let output = render(
        folder.path(),
        &["--config", "my.jsonnet", "--out", "new/place"],
    );
    assert!(output.status.success(), "{}", said(&output));
    let read =
        |name: &str| fs::read_to_string(folder.path().join("new/place").join(name)).expect(name);
    let alerts = read("alerts/tcp.yaml");
    for text in [
        "job=\"mine\"",
        "rate2m > 25",
        "for: 90s",
        "severity: P3",
        "by (zone, host,",
        "$labels.host",
    ] {
        assert!(alerts.contains(text), "{text}: {alerts}");
    }
    assert!(
        !alerts.contains("5m") && !alerts.contains("node,"),
        "{alerts}"
    );
    let dashboard = read("dashboards/chandra-tcp.json");
    assert!(
        dashboard.contains("\"value\": 25") && dashboard.contains("host=~"),
        "{dashboard}"
    );
    assert!(read("manifests/prometheusrule-tcp.yaml").contains("team: ai"));
    let values = read("helm-values/cilium.yaml");
    assert!(values.contains("\n        team: ai\n") && !values.contains("\n        release:"));
    assert!(values.contains("\n#   team: ai here"), "{values}");
}

#[test]
fn alerts_and_panels_link_to_where_the_runbooks_are_served() {
    let folder = TempDir::new().expect("a folder");
    let config = "{ _config+:: { runbookURL: 'https://git.example/runbooks/%s' } }";
    fs::write(folder.path().join("my.jsonnet"), config).expect("written");
    let output = render(folder.path(), &["--config", "my.jsonnet"]);
    assert!(output.status.success(), "{}", said(&output));
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).expect(name);
    let place = "https://git.example/runbooks/nccl.md#ncclstraggler";
    assert!(read("alerts/nccl.yaml").contains(&format!("runbook_url: {place}\n")));
    assert!(read("dashboards/chandra-path.json").contains(&format!("[NcclStraggler]({place})")));
    // A path in the tree is no link, which would lead into Grafana.
    let text = fs::read_to_string(root().join("dashboards/chandra-path.json")).expect("committed");
    assert!(text.contains("NcclStraggler (`docs/runbooks/nccl.md#ncclstraggler`)"));
    assert!(!text.contains("](docs/"));
}

#[test]
fn what_the_pages_show_is_what_is_printed() {
    for (page, commands) in [("docs/dashboards.md", 2), ("mixin/README.md", 2)] {
        let text = fs::read_to_string(root().join(page)).expect("there");
        let mut shown = 0;
        for block in text.split("\n```").skip(1).step_by(2) {
            let folder = TempDir::new().expect("a folder");
            for (name, text) in tree(&root().join("mixin/tests/readme")) {
                fs::write(folder.path().join(name), text).expect("written");
            }
            let steps = block.split("\n$ ").skip(1);
            for (command, expected) in steps.map(|step| step.split_once('\n').unwrap_or((step, "")))
            {
                let Some(args) = command.strip_prefix("chandra-mixin ") else {
                    continue;
                };
                let args: Vec<&str> = args.split(' ').collect();
                let printed = said(&chandra_mixin(folder.path(), &args));
                assert_eq!(printed.trim_end(), expected.trim_end(), "{page}: {command}");
                shown += 1;
            }
        }
        assert_eq!(shown, commands, "{page}");
    }
}

#[test]
fn no_page_upgrades_a_chart_to_whatever_is_newest() {
    let mut commands = 0;
    for folder in [
        "",
        "docs",
        "docs/runbooks",
        "mixin",
        "mixin/helm",
        "helm-values",
        "deploy",
        "deploy/chart",
    ] {
        for entry in fs::read_dir(root().join(folder)).expect("readable") {
            let path = entry.expect("readable").path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            if !matches!(ending, Some("md" | "yaml" | "libsonnet")) {
                continue;
            }
            let text = fs::read_to_string(&path).expect("text");
            for line in text.lines().filter(|line| line.contains("helm upgrade")) {
                let place = format!("{}: {line}", path.display());
                // A folder has one version, `repository/chart` has them all.
                let words: Vec<&str> = line.split_whitespace().collect();
                let repository = words.iter().any(|word| {
                    let name = word.split_once('/');
                    name.is_some_and(|(name, _)| {
                        ["cilium", "prometheus-community", "open-telemetry"].contains(&name)
                    })
                });
                assert!(!line.contains("--reuse-values"), "{place}");
                assert!(!repository || words.contains(&"--version"), "{place}");
                commands += usize::from(repository);
            }
        }
    }
    assert!(commands >= 6, "only {commands} were found");
}

/// One clear message with its place, exit code 2, and nothing written.
fn refused(config: &str, expected: &[&str]) {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("my.jsonnet"), config).expect("written");
    let output = render(folder.path(), &["--config", "my.jsonnet", "--out", "out"]);
    let message = said(&output);
    assert_eq!(output.status.code(), Some(2), "{config}: {message}");
    for text in expected {
        assert!(message.contains(text), "{config}: no {text:?} in {message}");
    }
    assert!(message.lines().count() <= 3, "{config}: {message}");
    assert!(
        !folder.path().join("out").exists(),
        "{config}: something was written"
    );
}

#[test]
fn jsonnet_that_is_broken_is_shown_with_its_place() {
    refused(
        "{\n  _config+:: {\n    window: ,\n  },\n}\n",
        &["my.jsonnet:3:13: ", "    window: ,\n", "            ^"],
    );
    refused(
        "{ _config+:: { window: 'a' + nothing } }",
        &["my.jsonnet:1:30: ", "nothing", "^"],
    );
    refused(
        "{\n\t_config+:: { window: error 'no window' },\n}",
        &["my.jsonnet:2:", "no window", "\t_config"],
    );
    refused(
        "{ _config+:: import 'missing.libsonnet' }",
        &["my.jsonnet:1:14: ", "missing.libsonnet"],
    );
    refused("", &["my.jsonnet:1:1: "]);
    refused("{ a: 'unterminated", &["my.jsonnet:1:6: "]);
    refused(
        "local f(x) = f(x) + 1; { _config+:: { window: f(1) } }",
        &["my.jsonnet:1:", "stack"],
    );
}

#[test]
fn keys_that_nobody_reads_are_refused_with_their_place() {
    refused(
        "{ _config+:: {\n  windows: '1m' } }",
        &[
            "my.jsonnet:2:3: _config.windows: unknown key",
            "  windows: '1m'",
        ],
    );
    refused(
        "{ _config+:: {\n  tcp+: { TcpRetransmitHigh+: { threshold: 1 } } } }",
        &["my.jsonnet:2:11: _config.tcp.TcpRetransmitHigh: unknown key"],
    );
    refused(
        "{ _config+:: { tcp+: { TcpRetransmitsHigh+: {\n treshold: 1 } } } }",
        &["my.jsonnet:2:2: _config.tcp.TcpRetransmitsHigh.treshold: unknown key"],
    );
    refused(
        "{\n  config+:: { window: '1m' } }",
        &["my.jsonnet:2:3: config: unknown key"],
    );
    refused(
        "{ _config+:: { tcp+: { TcpRetransmitsHigh+: { threshold: '5' } } } }",
        &[
            "my.jsonnet:1:47: ",
            "threshold: is of type string, not number",
        ],
    );
    refused("{ _config+:: { rdma: {} } }", &["field does not exist"]);
    refused("[]", &["overrides are an object, not of type array"]);
    refused(
        "{ _config+:: { selector: 'job=chandra' } }",
        &["my.jsonnet: ", "is not PromQL"],
    );
    refused(
        "{ _config+:: { window: '5 minutes' } }",
        &["my.jsonnet: ", "is not PromQL"],
    );
    refused(
        "{ _config+:: { tcp+: { TcpRetransmitsHigh+: { 'for': 'five minutes' } } } }",
        &[
            "my.jsonnet: ",
            "TcpRetransmitsHigh",
            "five minutes",
            "is not a duration",
        ],
    );
    refused(
        "{ _config+:: { tcp+: { TcpRetransmitsHigh+: { severity: 'urgent' } } } }",
        &["urgent"],
    );
}

#[test]
fn places_that_cannot_be_read_or_written_are_named() {
    let folder = TempDir::new().expect("a folder");
    let output = render(folder.path(), &["--config", "nowhere.jsonnet"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("cannot read nowhere.jsonnet: No such file"),
        "{}",
        said(&output)
    );
    assert_eq!(said(&output).lines().count(), 1);

    // Nobody can write below a file, root neither.
    fs::write(folder.path().join("file"), "").expect("written");
    let output = render(folder.path(), &["--out", "file"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(
        said(&output).contains("file/alerts: Not a directory"),
        "{}",
        said(&output)
    );
    assert_eq!(said(&output).lines().count(), 1);

    // A folder in the place of one file: the others are not written either.
    fs::create_dir_all(folder.path().join("out/dashboards/chandra.json/x")).expect("created");
    let output = render(folder.path(), &["--out", "out"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(
        said(&output).contains("out/dashboards/chandra.json"),
        "{}",
        said(&output)
    );
    assert!(tree(&folder.path().join("out")).is_empty(), "half written");

    let output = chandra_mixin(folder.path(), &["rendre"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    let folder = TempDir::new().expect("a folder");
    // A file system of 128 KiB, in a mount namespace of its own.
    let script = "mount -t tmpfs -o size=128k tmpfs \"$1\" && mkdir \"$1/alerts\" && \
         printf old >\"$1/alerts/encryption.yaml\" && \"$0\" render --out \"$1\"; \
         echo \"rc $?\"; find \"$1\" -type f | while read -r f; do echo \"$f: $(cat \"$f\")\"; done";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(env!("CARGO_BIN_EXE_chandra-mixin"))
        .arg(folder.path())
        .output();
    let output = output.expect("unshare runs");
    let message = said(&output);
    if !message.contains("rc ") {
        println!("SKIPPED: no mount namespace here: {message}");
        return;
    }
    assert!(
        message.contains("rc 2") && message.contains("No space left on device"),
        "{message}"
    );
    let files: Vec<_> = message
        .lines()
        .filter(|line| line.starts_with('/'))
        .collect();
    assert_eq!(files.len(), 1, "{message}");
    assert!(
        files[0].ends_with("alerts/encryption.yaml: old"),
        "{message}"
    );
}
