// SPDX-License-Identifier: Apache-2.0
//! The mixin is for every engine (jb, mixtool, kube-prometheus): a second one makes the same tree of it.

mod common;

use chandra_mixin::jsonnet;
use common::root;
use rsjsonnet_lang::arena::Arena;
use serde_json::Value;

fn by_the_second_engine(expression: &str) -> Value {
    let arena = Arena::new();
    let mut session = rsjsonnet_front::Session::new(&arena);
    session.add_search_path(root());
    let evaluated = session
        .load_virt_file("<test>", expression.as_bytes().to_vec())
        .and_then(|thunk| session.eval_value(&thunk))
        .and_then(|value| session.manifest_json(&value, false));
    serde_json::from_str(&evaluated.expect("it evaluates")).expect("JSON")
}

#[test]
fn a_second_engine_renders_the_same_tree() {
    let first = jsonnet::evaluate(None).expect("it evaluates");
    let second = by_the_second_engine("(import 'mixin/outputs.libsonnet')()");
    let files = first["files"].as_object().expect("files");
    assert!(files.len() > 20, "{} files", files.len());
    for (path, file) in files {
        assert!(*file == second["files"][path], "{path} differs");
    }
    assert!(first == second, "the trees differ elsewhere");
}

#[test]
fn the_four_faces_are_there_for_those_who_import_it() {
    let faces = by_the_second_engine(
        "local m = (import 'mixin/mixin.libsonnet') + { _config+:: { window: '1m' } };
         {
           rules: m.prometheusRules.groups, alerts: m.prometheusAlerts.groups,
           dashboards: std.objectFields(m.grafanaDashboards), window: m._config.window,
         }",
    );
    let rules = faces["rules"].to_string();
    assert!(
        rules.contains("pod:chandra_tcp_retransmits:rate1m"),
        "{rules}"
    );
    assert!(
        !rules.contains("[5m]"),
        "a window that _config does not set"
    );
    assert!(faces["alerts"].to_string().contains("TcpRetransmitsHigh"));
    assert_eq!(faces["dashboards"][0], "chandra-encryption.json");
    assert_eq!(faces["window"], "1m");
}
