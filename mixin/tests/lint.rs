// SPDX-License-Identifier: Apache-2.0
//! What Helm accepts in silence is said: of every fixture what is committed, and of made-up files each kind of finding.

mod common;
#[path = "common/renderer.rs"]
mod renderer;

use std::{fs, path::Path, process::Output};

use common::{fixtures, golden, root, said};
use renderer::chandra_mixin;
use tempfile::TempDir;

fn lint(folder: &Path, args: &[&str]) -> Output {
    chandra_mixin(folder, &[&["lint"], args].concat())
}

/// What is said about one file.
fn found(version: &str, text: &str) -> String {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("my.yaml"), text).expect("written");
    said(&lint(folder.path(), &["--version", version, "my.yaml"]))
}

#[test]
fn every_fixture_has_the_findings_that_are_committed() {
    let folder = root().join("mixin/tests/values");
    for (name, _) in fixtures() {
        let mut all = String::new();
        for version in ["1.19", "1.20"] {
            let output = lint(&folder, &["--version", version, &format!("{name}.yaml")]);
            let code = output.status.code().expect("it ends");
            let expected = match name.as_str() {
                "documents" => 2,
                _ => i32::from(!said(&output).is_empty()),
            };
            assert_eq!(code, expected, "{name}");
            all.push_str(&format!(
                "cilium {version}\n{}exit code {code}\n",
                said(&output)
            ));
        }
        golden(&folder.join(format!("expected/{name}.lint.txt")), &all);
    }
}

#[test]
fn what_is_rendered_only_has_to_be_taken_up_by_the_agents() {
    let folder = root();
    for version in ["1.19", "1.20"] {
        for file in ["helm-values/cilium.yaml", "helm-values/cilium-sidecar.yaml"] {
            let output = lint(
                &folder,
                &["--version", version, "helm-values/cilium.yaml", file],
            );
            let text = said(&output);
            assert!(
                text.lines().count() == 1 && text.contains(": info: rollOutCiliumPods: "),
                "{text}"
            );
            let folder = TempDir::new().expect("a folder");
            fs::write(folder.path().join("my.yaml"), "rollOutCiliumPods: true\n").expect("written");
            let own = folder.path().join("my.yaml").display().to_string();
            let output = lint(
                &root(),
                &["--version", version, file, "helm-values/cilium.yaml", &own],
            );
            assert_eq!(
                (output.status.code(), said(&output)),
                (Some(0), String::new())
            );
        }
    }
}

#[test]
fn a_typo_is_shown_with_what_was_meant() {
    for (text, expected) in [
        (
            "hubbel: {}\n",
            "my.yaml:1:1: error: hubbel: the chart does not read this key; did you mean hubble?",
        ),
        (
            "hubble:\n  metrics:\n    enable: [drop]\n",
            "my.yaml:3:5: error: hubble.metrics.enable: the chart does not read this key; did you mean hubble.metrics.enabled?",
        ),
        (
            "trustCRDsExist: true\n",
            "my.yaml:1:1: error: trustCRDsExist: the chart does not read this key; did you mean prometheus.serviceMonitor.trustCRDsExist?",
        ),
        (
            "encryption: {type: wire-guard}\n",
            "my.yaml:1:20: error: encryption.type: \"wire-guard\" is none of ipsec, wireguard, ztunnel, so nothing is encrypted; did you mean wireguard?",
        ),
        (
            "encryption:\n  type: WireGuard\n",
            "did you mean wireguard?",
        ),
        (
            "encryption:\n  nodeEncryption: 'yes'\n",
            "my.yaml:2:3: error: encryption.nodeEncryption: is the text \"yes\", and the chart wants a boolean: Helm refuses it; write a boolean",
        ),
        (
            "hubble: [a]\n",
            "my.yaml:1:1: error: hubble: is a list, and the chart wants a map",
        ),
        (
            "envoy: {log: {defaultLevel: warn}}\n",
            "\"warn\" is none of trace, debug, info, warning",
        ),
        (
            "hubble: {metrics: {enabled: [dorp]}}\n",
            "my.yaml:1:30: error: hubble.metrics.enabled: Hubble knows no metric dorp; did you mean drop?",
        ),
        (
            "hubble: {metrics: {enabled: ['drop:labelsContext=source_namspace']}}\n",
            "labelsContext knows no source_namspace; did you mean source_namespace?",
        ),
        (
            "hubble: {metrics: {enabled: ['drop x', drop, drop]}}\n",
            "drop stands in line 1 too: Hubble registers it twice, and the agent stops; unite their options in one entry",
        ),
        (
            "hubble: {metrics: {enabled: [1]}}\n",
            "an entry is the number 1, and Hubble reads text: it has no such metric; write text, as in drop:sourceContext=pod",
        ),
        (
            "hubble: {metrics: {enabled: [{name: drop, contextOptions: [{name: sourceContext, values: [pod]}]}]}}\n",
            "an entry is a map, and Hubble reads text: it has no such metric; write drop:sourceContext=pod",
        ),
        (
            "hubble: {metrics: {enabled: ['drop: labelsContext=source_namespace']}}\n",
            "has a space, which ends an entry; write drop:labelsContext=source_namespace",
        ),
        (
            "hubble: {metrics: {enabled: [http, httpV2]}}\n",
            "http and httpV2 exclude each other: Hubble exports no metrics; write httpV2 alone",
        ),
        // As `--set` has lists.
        (
            "hubble:\n  metrics:\n    enabled: \"{dns,drop:labelsContext=source_ip\\\\,source_pod}\"\n",
            "and the chart wants a list or null: Helm refuses it; write [\"dns\",\"drop:labelsContext=source_ip,source_pod\"]",
        ),
        (
            "hubble:\n  metrics:\n    enabled: {dns, drop}\n",
            "is a map, and the chart wants a list or null: Helm refuses it; write [\"dns\",\"drop\"]",
        ),
    ] {
        let said = found("1.19", text);
        assert!(
            said.contains(expected),
            "{text}: no {expected:?} in\n{said}"
        );
    }
}

#[test]
fn keys_that_only_templates_read_and_keys_of_the_users_are_known() {
    for text in [
        "devices: eth+\nloadBalancer:\n  mode: dsr\n  algorithm: maglev\npolicyAuditMode: true\n",
        "podLabels: {a.b/c: d}\nextraConfig:\n  any: thing\nnodeSelector:\n  pool: gpu\nglobal: {x: 1}\n",
        "x-labels: &l {a: b}\npodLabels: *l\n",
        "affinity: {nodeAffinity: {}}\nupdateStrategy: {type: OnDelete}\n",
        "operator:\n",
    ] {
        let said = found("1.20", text);
        assert!(!said.contains(": error: "), "{text}: {said}");
    }
}

#[test]
fn the_old_strict_mode_is_deprecated_and_then_gone() {
    let text = "encryption:\n  strictMode:\n    enabled: true\n    egress:\n      enabled: true\n";
    let old = found("1.19.6", text);
    assert!(
        old.contains("my.yaml:3:5: warning: encryption.strictMode.enabled: is deprecated in 1.19"),
        "{old}"
    );
    let new = found("1.20.0", text);
    assert!(new.contains("my.yaml:3:5: error: encryption.strictMode.enabled: was removed in 1.20 and renders to nothing"), "{new}");
    assert_eq!(new.matches("strictMode").count(), 2, "{new}");
}

#[test]
fn what_rules_and_panels_need_is_missed() {
    for (text, expected) in [
        (
            "hubble: {enabled: false}\n",
            "my.yaml:1:10: warning: hubble.enabled: is false: there are no Hubble metrics",
        ),
        (
            "bpf: {events: {drop: {enabled: false}}}\n",
            "warning: bpf.events.drop.enabled: is false: hubble_drop_total stays 0",
        ),
        (
            "{}\n",
            "my.yaml:1:1: warning: prometheus.enabled: is not set, and the chart's default is false",
        ),
        (
            "hubble: {metrics: {enabled: [flow]}}\n",
            "my.yaml:1:20: warning: hubble.metrics.enabled: has no drop: there is no hubble_drop_total",
        ),
        (
            "hubble: {metrics: {enabled: ['drop:labelsContext=source_namespace']}}\n",
            "drop lacks labelsContext=destination_namespace,traffic_direction",
        ),
        (
            "prometheus: {enabled: true, serviceMonitor: {enabled: true}}\n",
            "info: prometheus.serviceMonitor.trustCRDsExist: is not set",
        ),
        (
            "hubble: {metrics: {enabled: [drop], dynamic: {enabled: true}}}\n",
            "error: hubble.metrics.enabled: is set together with hubble.metrics.dynamic.enabled",
        ),
        (
            "hubble: {metrics: {dynamic: {enabled: true, config: {content: [{name: flow}]}}}}\n",
            "hubble.metrics.dynamic.config.content: has no drop",
        ),
    ] {
        let said = found("1.19", text);
        assert!(
            said.contains(expected),
            "{text}: no {expected:?} in\n{said}"
        );
    }
}

/// What is on whoever reads it: Hubble's metrics, monitors and agents that are restarted.
const FINE: &str = "prometheus: {enabled: true, serviceMonitor: {enabled: true, trustCRDsExist: true, interval: 30s, labels: {release: prom}}}
hubble: {metrics: {serviceMonitor: {enabled: true, interval: 30s, labels: {release: prom}}, enabled: ['dns:labelsContext=source_namespace,destination_namespace',
  'drop:labelsContext=source_namespace,destination_namespace,traffic_direction', 'flow:labelsContext=source_namespace,destination_namespace',
  'policy:labelsContext=source_namespace,destination_namespace', 'port-distribution:labelsContext=source_namespace,source_pod']}}
rollOutCiliumPods: true
";

#[test]
fn what_makes_encryption_dear_or_its_sessions_short_is_named_with_what_to_write() {
    let settings: [(&str, &str, &str, &str); 10] = [
        (
            "wireguard",
            "",
            "warning: routingMode: is not set, and the chart's default is \"\": each packet is wrapped into VXLAN",
            "write routingMode: native",
        ),
        (
            "ipsec",
            "routingMode: tunnel\n",
            "warning: routingMode: is tunnel: each packet is wrapped into VXLAN",
            "write routingMode: native",
        ),
        (
            "wireguard",
            "encryption: {nodeEncryption: true}\n",
            "warning: encryption.nodeEncryption: is true: traffic between nodes",
            "write encryption.nodeEncryption: false",
        ),
        (
            "wireguard",
            "bpf: {hostLegacyRouting: true}\n",
            "info: bpf.hostLegacyRouting: is true: what is decrypted",
            "write bpf.hostLegacyRouting: false",
        ),
        (
            "wireguard",
            "cni: {chainingMode: aws-cni}\n",
            "warning: cni.enableRouteMTUForCNIChaining: is not set, and the chart's default is false: pods of the chained",
            "write cni.enableRouteMTUForCNIChaining: true",
        ),
        (
            "ipsec",
            "cleanState: true\n",
            "error: cleanState: is true: each start of an agent deletes",
            "write cleanState: false",
        ),
        (
            "wireguard",
            "daemon: {runPath: /tmp/cilium}\n",
            "warning: daemon.runPath: is /tmp/cilium: the node's WireGuard key",
            "write daemon.runPath: /var/run/cilium",
        ),
        (
            "wireguard",
            "encryption: {wireguard: {persistentKeepalive: 5s}}\n",
            "info: encryption.wireguard.persistentKeepalive: is 5s: each node holds a session",
            "write encryption.wireguard.persistentKeepalive: 0s",
        ),
        (
            "ipsec",
            "encryption: {ipsec: {keyWatcher: false}}\n",
            "warning: encryption.ipsec.keyWatcher: is false: an agent takes a rotated key only when",
            "write encryption.ipsec.keyWatcher: true",
        ),
        (
            "ipsec",
            "encryption: {ipsec: {keyRotationDuration: 30s}}\n",
            "warning: encryption.ipsec.keyRotationDuration: is 30s: the old key goes",
            "write encryption.ipsec.keyRotationDuration: 5m",
        ),
    ];
    let folder = TempDir::new().expect("a folder");
    let judged = |kind: &str, enabled: bool, text: &str| {
        let base = format!("{FINE}encryption: {{enabled: {enabled}, type: {kind}}}\n");
        fs::write(folder.path().join("base.yaml"), base).expect("written");
        fs::write(folder.path().join("my.yaml"), text).expect("written");
        said(&lint(
            folder.path(),
            &["--version", "1.19", "base.yaml", "my.yaml"],
        ))
    };
    for (kind, text, message, fix) in settings {
        let found = judged(kind, true, text);
        let line = found.lines().find(|line| line.contains(message));
        let line = line.unwrap_or_else(|| panic!("{text}: no {message:?} in\n{found}"));
        assert!(line.contains(fix), "{text}: no {fix:?} in {line}");
        // Nothing but the overlay, and this.
        let known = usize::from(!line.contains(": routingMode: ")) + 1;
        assert_eq!(found.lines().count(), known, "{text}: {found}");
        assert_eq!(judged(kind, false, text), "", "{text}");
    }
    for (kind, text) in [
        ("wireguard", "routingMode: native\n"),
        (
            "ipsec",
            "routingMode: native\nencryption: {nodeEncryption: true, ipsec: {keyRotationDuration: 1h}, wireguard: {persistentKeepalive: 9s}}\n",
        ),
        (
            "wireguard",
            "gke: {enabled: true}\nencryption: {ipsec: {keyWatcher: false}, wireguard: {persistentKeepalive: 0s}}\n",
        ),
        (
            "wireguard",
            "routingMode: native\ncni: {chainingMode: none}\nbpf: {hostLegacyRouting: false}\n",
        ),
        (
            "wireguard",
            "routingMode: native\ncni: {chainingMode: aws-cni, enableRouteMTUForCNIChaining: true}\n",
        ),
    ] {
        assert_eq!(judged(kind, true, text), "", "{text}");
    }
}

#[test]
fn monitors_are_judged_by_who_selects_them_and_how_often_they_are_scraped() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("base.yaml"), FINE).expect("written");
    let judged = |text: &str, args: &[&str]| {
        fs::write(folder.path().join("my.yaml"), text).expect("written");
        said(&lint(
            folder.path(),
            &[args, &["base.yaml", "my.yaml"]].concat(),
        ))
    };
    assert_eq!(judged("", &[]), "");
    assert_eq!(judged("", &["--release", "prom"]), "");
    let all = judged("", &["--release", "kps"]);
    assert_eq!(
        all.matches(
            "is prom, and your operator's release is kps: a Prometheus selects one of them"
        )
        .count(),
        2,
        "{all}"
    );
    let other = judged(
        "hubble: {metrics: {serviceMonitor: {labels: {release: kps}}}}\n",
        &[],
    );
    assert!(
        other.contains("warning: ") && other.contains("is kps, and another monitor's is prom")
            || other.contains("is prom, and another monitor's is kps"),
        "{other}"
    );
    let none = judged(
        "operator: {prometheus: {serviceMonitor: {enabled: true}}}\n",
        &[],
    );
    assert!(none.contains("info: operator.prometheus.serviceMonitor.labels: has no release: a Prometheus that selects release: prom does not find it; write operator.prometheus.serviceMonitor.labels.release: prom"), "{none}");
    let own = judged(
        "prometheus: {serviceMonitor: {labels: {release: null, team: ai}}}\nhubble: {metrics: {serviceMonitor: {labels: {release: null, team: ai}}}}\n",
        &[],
    );
    assert_eq!(own, "");

    let often = judged("prometheus: {serviceMonitor: {interval: 10s}}\n", &[]);
    assert!(
        often.contains(
            "info: prometheus.serviceMonitor.interval: is 10s: 1000 nodes are 100 scrapes a second"
        ) && often.contains("write prometheus.serviceMonitor.interval: 30s"),
        "{often}"
    );
    let default = judged(
        "hubble: {metrics: {serviceMonitor: {interval: null}}}\n",
        &[],
    );
    assert!(!default.contains("interval"), "{default}");
    let envoy = judged(
        "envoy: {prometheus: {serviceMonitor: {enabled: true, labels: {release: prom}}}}\n",
        &[],
    );
    assert!(
        envoy.contains(
            "envoy.prometheus.serviceMonitor.interval: is not set, and the chart's default is 10s"
        ),
        "{envoy}"
    );
}

#[test]
fn agents_that_nobody_restarts_are_told_and_findings_can_be_left_out() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("base.yaml"), FINE).expect("written");
    fs::write(
        folder.path().join("my.yaml"),
        "rollOutCiliumPods: false\nbpf:\n  events:\n    policyVerdict: {enabled: false}\n",
    )
    .expect("written");
    let output = lint(folder.path(), &["base.yaml", "my.yaml"]);
    assert_eq!(
        said(&output),
        "my.yaml:1:1: info: rollOutCiliumPods: is false: agents keep the metrics and settings that they have until they are restarted; after the upgrade run kubectl -n kube-system rollout restart daemonset/cilium, or write rollOutCiliumPods: true\n\
         my.yaml:4:21: info: bpf.events.policyVerdict.enabled: is false: hubble_policy_verdicts_total stays 0; write bpf.events.policyVerdict.enabled: true, or take policy out of hubble.metrics.enabled\n"
    );
    assert_eq!(output.status.code(), Some(1));
    let output = lint(
        folder.path(),
        &["--severity", "warning", "base.yaml", "my.yaml"],
    );
    assert_eq!(
        (output.status.code(), said(&output)),
        (Some(0), String::new())
    );
}

#[test]
fn a_later_file_that_replaces_a_list_is_told() {
    let folder = TempDir::new().expect("a folder");
    let write =
        |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    write(
        "a.yaml",
        "hubble:\n  metrics:\n    enabled: [tcp, 'drop:sourceContext=pod', flow]\ntolerations: [{key: a}]\nextraArgs: [--x]\n",
    );
    write(
        "b.yaml",
        "hubble:\n  metrics:\n    enabled: [drop, flow]\ntolerations: []\nextraArgs:\n",
    );
    write("c.yaml", "prometheus:\n  enabled: true\n");
    let said = said(&lint(folder.path(), &["a.yaml", "b.yaml", "c.yaml"]));
    for expected in [
        "b.yaml:3:5: error: hubble.metrics.enabled: replaces the list of a.yaml:3 and loses tcp, drop:sourceContext=pod: Helm does not merge lists; repeat it here",
        "b.yaml:4:1: warning: tolerations: replaces the list of a.yaml:4",
        "error: extraArgs: replaces the list of a.yaml:5 and loses --x: Helm",
    ] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
    assert!(!said.contains("warning: prometheus.enabled"), "{said}");
}

#[test]
fn a_null_or_another_word_in_a_lists_place_is_told_and_a_later_map_heals_it() {
    let folder = TempDir::new().expect("a folder");
    let judged = |a: &str, b: &str| {
        fs::write(folder.path().join("a.yaml"), a).expect("written");
        fs::write(folder.path().join("b.yaml"), b).expect("written");
        said(&lint(folder.path(), &["a.yaml", "b.yaml"]))
    };
    let list = "hubble: {metrics: {enabled: [tcp, icmp]}}\n";
    for (text, line) in [
        ("hubble: {metrics: ~}\n", "b.yaml:1:10: "),
        ("hubble: 5\n", "b.yaml:1:1: "),
        ("hubble: {metrics: {enabled: '{tcp}'}}\n", "b.yaml:1:20: "),
    ] {
        let found = judged(list, text);
        let expected = format!(
            "{line}error: hubble.metrics.enabled: replaces the list of a.yaml:1 and loses tcp, icmp"
        );
        assert!(found.contains(&expected), "{text}: {found}");
    }
    let found = judged("hubble: ~\n", "hubble: {relay: {enabled: true}}\n");
    assert!(
        !found.contains("hubble.enabled: is null") && found.contains("has no drop"),
        "{found}"
    );
    let found = judged("hubble: {relay: {enabled: true}}\n", "hubble: ~\n");
    assert!(
        found.contains("b.yaml:1:1: warning: hubble.enabled: is null: there are no Hubble metrics"),
        "{found}"
    );
}

#[test]
fn dynamic_metrics_are_judged_as_static_ones_are() {
    let text = "hubble:
  metrics:
    dynamic:
      enabled: true
      config:
        createConfigMap: true
        content:
        - name: dropp
        - name: flow
        - {name: flow, contextOptions: [{name: labelsContext, values: [source_pood]}]}
        - tcp
";
    let found = found("1.19", text);
    for expected in [
        "my.yaml:8:11: error: hubble.metrics.dynamic.config.content: Hubble knows no metric dropp; did you mean drop?",
        "my.yaml:10:11: error: hubble.metrics.dynamic.config.content: flow stands in line 9 too",
        "labelsContext knows no source_pood; did you mean source_pod?",
        "my.yaml:11:11: error: hubble.metrics.dynamic.config.content: an entry is the text \"tcp\", and Hubble reads a map with a name: it has no such metric; write {name: tcp}",
    ] {
        assert!(found.contains(expected), "no {expected:?} in\n{found}");
    }
}

#[test]
fn findings_are_json_too_and_another_chart_can_be_named() {
    let folder = TempDir::new().expect("a folder");
    let write =
        |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    fs::create_dir_all(folder.path().join("chart/templates")).expect("created");
    write("chart/values.yaml", "image:\n  tag: ''\nreplicas: 1\n");
    write("chart/Chart.yaml", "name: other\nversion: 1.2.3\n");
    write(
        "chart/templates/deployment.yaml",
        "{{ .Values.image.repository }} {{ .Values.token | quote }}\n",
    );
    write(
        "my.yaml",
        "image: {repository: x, tagg: y}\ntoken: z\nreplica: 2\n",
    );
    let output = lint(
        folder.path(),
        &[
            "--chart",
            "other",
            "--chart-dir",
            "chart",
            "--json",
            "my.yaml",
        ],
    );
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(list[0]["fix"], "did you mean image.tag?");
    let paths: Vec<_> = list
        .as_array()
        .expect("a list")
        .iter()
        .map(|f| {
            (
                f["path"].as_str(),
                f["line"].as_u64(),
                f["severity"].as_str(),
            )
        })
        .collect();
    let error = Some("error");
    assert_eq!(
        paths,
        [
            (Some("image.tagg"), Some(1), error),
            (Some("replica"), Some(3), error)
        ]
    );

    let keys = chandra_mixin(folder.path(), &["keys", "chart"]);
    let keys: serde_json::Value = serde_json::from_slice(&keys.stdout).expect("JSON");
    assert_eq!(
        keys["keys"],
        serde_json::json!({"image": {"repository": [], "tag": ["", ""]}, "replicas": ["", 1], "token": []})
    );
}

#[test]
fn what_is_no_values_file_is_refused_in_one_line() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("my.yaml"), "a: [\n").expect("written");
    fs::write(folder.path().join("two.yaml"), "a: 1\n---\nb: 1\n").expect("written");
    fs::write(folder.path().join("list.yaml"), "\n- a\n").expect("written");
    for (args, expected) in [
        (&["two.yaml"][..], "two.yaml:3:1: a second document"),
        (&["list.yaml"], "list.yaml:2:1: values are a map"),
        (&["my.yaml"], "my.yaml:1:4: is not YAML"),
        (&["nowhere.yaml"], "cannot read nowhere.yaml: No such file"),
        (
            &["--version", "1.18", "my.yaml"],
            "cilium 1.18 is not supported: there are 1.19, 1.20",
        ),
        (
            &["--chart", "prometheus", "my.yaml"],
            "the keys of prometheus are not known here: name its folder with --chart-dir",
        ),
        (
            &["--chart-dir", "nowhere", "my.yaml"],
            "cannot read nowhere",
        ),
        (
            &["--chart-dir", "cilium.tgz", "my.yaml"],
            "cilium.tgz: is an archive: unpack it",
        ),
    ] {
        let output = lint(folder.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", said(&output));
        assert!(
            said(&output).contains(expected),
            "{args:?}: no {expected:?} in {}",
            said(&output)
        );
        assert_eq!(
            said(&output).lines().count(),
            1,
            "{args:?}: {}",
            said(&output)
        );
    }
}
