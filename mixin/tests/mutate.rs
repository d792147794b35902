// SPDX-License-Identifier: Apache-2.0
//! Do the rule tests test the thresholds? Each is multiplied and divided by 1.5, and each `for` by 3; a mutant that
//! passes all tests of its signal is a threshold that nobody would notice changing. `make mutate-rules` prints them;
//! `make mutate-rules SIGNAL=rdma` those of one signal.

mod common;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

use common::{PROMTOOLS, files, program, root, said};
use promql_parser::{
    parser::{self, Expr},
    util::parse_duration,
};
use serde_json::Value;

/// Multiplies the nth comparison number of an expression that is not 0; `None` if it has fewer.
///
/// "More than none" has no threshold that could be set otherwise.
fn scaled(expr: &Expr, nth: usize, factor: f64) -> Option<(String, f64)> {
    fn walk(expr: &mut Expr, left: &mut usize, factor: f64) -> Option<f64> {
        match expr {
            Expr::Binary(binary) => {
                if binary.op.is_comparison_operator() {
                    for side in [&mut binary.lhs, &mut binary.rhs] {
                        if let Expr::NumberLiteral(number) = &mut **side
                            && number.val != 0.0
                        {
                            if *left == 0 {
                                let old = number.val;
                                number.val *= factor;
                                return Some(old);
                            }
                            *left -= 1;
                        }
                    }
                }
                walk(&mut binary.lhs, left, factor).or_else(|| walk(&mut binary.rhs, left, factor))
            }
            Expr::Aggregate(aggregate) => walk(&mut aggregate.expr, left, factor),
            Expr::Unary(unary) => walk(&mut unary.expr, left, factor),
            Expr::Paren(paren) => walk(&mut paren.expr, left, factor),
            Expr::Subquery(subquery) => walk(&mut subquery.expr, left, factor),
            Expr::Call(call) => call
                .args
                .args
                .iter_mut()
                .find_map(|arg| walk(arg, left, factor)),
            _ => None,
        }
    }
    let mut expr = expr.clone();
    let old = walk(&mut expr, &mut { nth }, factor)?;
    Some((expr.to_string(), old))
}

struct Mutant {
    signal: String,
    /// What is changed, for people.
    what: String,
    rules: Value,
}

/// Every mutant of a file of rules.
fn mutants(signal: &str, rules: &Value) -> Vec<Mutant> {
    let mut mutants = Vec::new();
    let mut add = |what: String, path: String, value: String| {
        let mut mutated = rules.clone();
        *mutated.pointer_mut(&path).expect("the rule is there") = Value::String(value);
        mutants.push(Mutant {
            signal: signal.to_owned(),
            what,
            rules: mutated,
        });
    };
    let groups = rules["groups"].as_array().expect("groups");
    for (g, group) in groups.iter().enumerate() {
        for (r, rule) in group["rules"].as_array().expect("rules").iter().enumerate() {
            let path = format!("/groups/{g}/rules/{r}");
            let name = rule["alert"]
                .as_str()
                .or(rule["record"].as_str())
                .expect("a name");
            let expr =
                parser::parse(rule["expr"].as_str().expect("an expression")).expect("it parses");
            for factor in [1.5, 1.0 / 1.5] {
                for nth in 0.. {
                    let Some((mutated, old)) = scaled(&expr, nth, factor) else {
                        break;
                    };
                    add(
                        format!("{name}: {old} → {}", old * factor),
                        format!("{path}/expr"),
                        mutated,
                    );
                }
            }
            if let Some(duration) = rule["for"].as_str() {
                let old = parse_duration(duration).expect("a duration");
                for new in [old * 3, old / 3] {
                    let value = format!("{}ms", new.as_millis());
                    add(
                        format!("{name}: for {duration} → {value}"),
                        format!("{path}/for"),
                        value,
                    );
                }
            }
        }
    }
    mutants
}

/// Runs a signal's tests against rules, in a folder laid out as the project is.
fn passes(promtool: &Path, folder: &Path, signal: &str, rules: &Value) -> Result<(), String> {
    let alerts = folder.join("alerts");
    let tests = folder.join("tests/promtool");
    fs::create_dir_all(&alerts).expect("created");
    fs::create_dir_all(&tests).expect("created");
    fs::write(alerts.join(format!("{signal}.yaml")), rules.to_string()).expect("written");
    let test = format!("{signal}.yaml");
    fs::copy(root().join("tests/promtool").join(&test), tests.join(&test)).expect("copied");
    let output = Command::new(promtool)
        .current_dir(&tests)
        .args(["test", "rules", &test])
        .output()
        .expect("promtool runs");
    match output.status.success() {
        true => Ok(()),
        false => Err(said(&output)),
    }
}

#[test]
fn every_mutant_breaks_a_test() {
    let Some(promtool) = program(PROMTOOLS[0]) else {
        return;
    };
    let mut all = Vec::new();
    let only = env::var("SIGNAL").unwrap_or_default();
    let of_interest = |signal: &str| only.is_empty() || only == signal;
    for (signal, path) in files("alerts", ".yaml") {
        if !of_interest(&signal) {
            continue;
        }
        let rules: Value =
            serde_saphyr::from_str(&fs::read_to_string(path).expect("readable")).expect("YAML");
        // A mutant is printed from its syntax tree: printing alone must change nothing.
        let mut printed = rules.clone();
        for (g, group) in rules["groups"]
            .as_array()
            .expect("groups")
            .iter()
            .enumerate()
        {
            for (r, rule) in group["rules"].as_array().expect("rules").iter().enumerate() {
                let expr = parser::parse(rule["expr"].as_str().expect("an expression"))
                    .expect("it parses");
                printed["groups"][g]["rules"][r]["expr"] = Value::String(expr.to_string());
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        if let Err(why) = passes(&promtool, folder.path(), &signal, &printed) {
            panic!("{signal}: the tests fail without a mutation: {why}");
        }
        all.extend(mutants(&signal, &printed));
    }
    let total = all.len();
    let left = Mutex::new(all);
    let survivors = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let folder: PathBuf = tempfile::tempdir().expect("a folder").keep();
                loop {
                    let next = left.lock().expect("no panic").pop();
                    let Some(mutant) = next else { break };
                    if passes(&promtool, &folder, &mutant.signal, &mutant.rules).is_ok() {
                        survivors
                            .lock()
                            .expect("no panic")
                            .push(format!("{}: {}", mutant.signal, mutant.what));
                    }
                }
                fs::remove_dir_all(folder).expect("removed");
            });
        }
    });
    let mut survivors = survivors.into_inner().expect("no panic");
    survivors.sort();
    println!(
        "{} of {total} mutants broke a test",
        total - survivors.len()
    );
    let least = if only.is_empty() { 4 * 20 } else { 1 };
    assert!(total >= least, "only {total} mutants: are the rules read?");
    assert!(
        survivors.is_empty(),
        "no test notices:\n{}",
        survivors.join("\n")
    );
}
