// SPDX-License-Identifier: Apache-2.0
//! The rules, judged by Prometheus itself: promtool of both generations checks them and runs `tests/promtool/*.yaml`, and the
//! cases of people in `tests/promtool/cases/`.

mod common;

use std::{collections::BTreeSet, fs, process::Command};

use common::{PROMTOOLS, files, program, root, said};
use serde_json::Value;

#[test]
fn both_generations_accept_the_rules_and_their_tests_pass() {
    for package in PROMTOOLS {
        let Some(promtool) = program(package) else {
            continue;
        };
        for (what, list) in [
            ("check", files("alerts", ".yaml")),
            ("test", files("tests/promtool", ".yaml")),
            ("test", files("tests/promtool/cases", ".yaml")),
        ] {
            let paths = list.iter().map(|(_, path)| path);
            let output = Command::new(&promtool)
                .args([what, "rules"])
                .args(paths)
                .output()
                .expect("promtool runs");
            assert!(
                output.status.success(),
                "{}: {}",
                promtool.display(),
                said(&output)
            );
        }
    }
}

fn yaml(path: &std::path::Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

#[test]
fn every_alert_has_a_firing_and_a_silent_case_and_every_record_a_value() {
    for (signal, path) in files("alerts", ".yaml") {
        let tests = yaml(&root().join(format!("tests/promtool/{signal}.yaml")));
        let mut fires = BTreeSet::new();
        let mut silent = BTreeSet::new();
        let mut valued = String::new();
        for test in list(&tests, "tests") {
            let name = test["name"].as_str().unwrap_or_default();
            assert!(!name.is_empty(), "{signal}: a test without a name");
            let cases = || list(test, "alert_rule_test");
            let alerts = cases().filter_map(|case| case["alertname"].as_str());
            for alert in alerts.collect::<BTreeSet<_>>() {
                let expected: Vec<_> = cases()
                    .filter(|case| case["alertname"] == alert)
                    .flat_map(|case| list(case, "exp_alerts"))
                    .collect();
                for one in &expected {
                    for key in ["summary", "description", "runbook_url"] {
                        assert!(
                            one["exp_annotations"][key].is_string(),
                            "{name}: no {key} is expected"
                        );
                    }
                }
                match expected.is_empty() {
                    true => silent.insert(alert),
                    false => fires.insert(alert),
                };
            }
            for case in list(test, "promql_expr_test") {
                valued.push_str(case["expr"].as_str().unwrap_or_default());
                valued.push('\n');
            }
        }
        let rules = yaml(&path);
        for rule in list(&rules, "groups").flat_map(|group| list(group, "rules")) {
            if let Some(alert) = rule["alert"].as_str() {
                assert!(
                    fires.contains(alert),
                    "{alert} has no case in which it fires"
                );
                assert!(
                    silent.contains(alert),
                    "{alert} has no case in which it stays silent"
                );
            }
            if let Some(record) = rule["record"].as_str() {
                assert!(
                    valued.contains(record),
                    "no test asks for the value of {record}"
                );
            }
        }
    }
}
